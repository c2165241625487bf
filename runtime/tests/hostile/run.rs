//! Runs inputs under watch: panics, time and allocated bytes of each.

use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use engraft_runtime::{ErrorKind, Result};

use crate::gguf::heap::allocated;

/// Longest time of an input: the project's promise for optimized code, and room for the development
/// profile's and for a machine that does other things; an emulator takes some twenty times as long.
pub(crate) static TIME_MAX: LazyLock<Duration> = LazyLock::new(|| {
    let millis = if cfg!(debug_assertions) { 500 } else { 100 };
    let times = if std::env::var_os("ENGRAFT_TEST_EMULATOR").is_some() { 20 } else { 1 };
    Duration::from_millis(times * millis)
});
/// Longest message, in bytes.
pub(crate) const MESSAGE_MAX: usize = 2048;

/// The time that this thread had a core, where the system tells (other processes may have had it meanwhile);
/// else the time that passed.
pub(crate) struct Clock {
    begin: Instant,
    on_core: Option<Duration>,
}

impl Clock {
    pub(crate) fn start() -> Clock {
        Clock { begin: Instant::now(), on_core: on_core() }
    }

    pub(crate) fn time(&self) -> Duration {
        let passed = self.begin.elapsed();
        // Asking costs more than most inputs do.
        if passed < *TIME_MAX / 10 {
            return passed;
        }
        self.on_core.zip(on_core()).map_or(passed, |(before, now)| now.saturating_sub(before).min(passed))
    }
}

fn on_core() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(Duration::from_nanos(text.split(' ').next()?.parse().ok()?))
}

/// A bound on the bytes that an input of `len` bytes may have allocated, freed ones included.
pub(crate) type HeapMax = fn(len: usize) -> usize;

/// What became of an input.
pub(crate) struct Outcome {
    pub(crate) result: Result<()>,
    pub(crate) time: Duration,
    pub(crate) heap: usize,
}

/// Runs one input.
///
/// # Errors
/// What it did that no input may: a panic, too much time or memory, a message without a place or without end.
pub(crate) fn watch(
    bytes: &[u8],
    subject: fn(&[u8]) -> Result<()>,
    heap_max: HeapMax,
) -> std::result::Result<Outcome, String> {
    let clock = Clock::start();
    let caught = catch_unwind(AssertUnwindSafe(|| allocated(|| subject(bytes))));
    let time = clock.time();
    let Ok((result, heap)) = caught else { return Err("it panics".into()) };
    if time > *TIME_MAX {
        return Err(format!("it takes {} ms", time.as_millis()));
    }
    if heap > heap_max(bytes.len()) {
        return Err(format!("it allocates {heap} bytes for {}", bytes.len()));
    }
    if let Err(e) = &result {
        let message = e.message();
        if message.len() > MESSAGE_MAX || message.chars().any(|c| c.is_control() && c != '\n') {
            let shown: String = message.chars().take(200).collect();
            return Err(format!("its message has {} bytes or control characters: {shown:?}", message.len()));
        }
        if !message.contains("hostile") {
            return Err(format!("its message names no file: {message}"));
        }
    }
    Ok(Outcome { result, time, heap })
}

/// An input, and how it must be refused: the kind and a part of the message; or used, where there is none.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) refused: Option<(ErrorKind, String)>,
}

/// Runs cases and prints their number, the slowest and the largest.
pub(crate) fn all(what: &str, cases: &[Case], subject: fn(&[u8]) -> Result<()>, heap_max: HeapMax) {
    let mut names: Vec<_> = cases.iter().map(|c| &c.name).collect();
    names.sort_unstable();
    assert!(names.array_windows().all(|[a, b]| a != b), "each case has its own name");
    let (mut wrong, mut wrongs) = (String::new(), 0);
    let (mut slowest, mut largest) = ((Duration::ZERO, ""), (0, ""));
    for case in cases {
        let problem = match (watch(&case.bytes, subject, heap_max), &case.refused) {
            (Err(problem), _) => Some(problem),
            (Ok(outcome), refused) => {
                slowest = slowest.max((outcome.time, &case.name));
                largest = largest.max((outcome.heap, &case.name));
                match (outcome.result, refused) {
                    (Ok(()), None) => None,
                    (Err(e), Some((kind, part))) if e.kind() == *kind && e.message().contains(part) => None,
                    (Ok(()), Some(_)) => Some("accepted".into()),
                    (Err(e), wanted) => Some(format!("wanted {wanted:?}, got {e:?}")),
                }
            }
        };
        if let Some(problem) = problem {
            wrongs += 1;
            let _ = writeln!(wrong, "{}: {problem}", case.name);
        }
    }
    eprintln!(
        "{what}: {} cases; slowest {} µs ({}), most memory {} bytes ({})",
        cases.len(),
        slowest.0.as_micros(),
        slowest.1,
        largest.0,
        largest.1
    );
    assert_eq!(wrongs, 0, "{what}: {wrongs} of {} cases:\n{wrong}", cases.len());
}

/// A list of cases under construction.
#[derive(Default)]
pub(crate) struct Cases(pub(crate) Vec<Case>);

impl Cases {
    pub(crate) fn refused(
        &mut self,
        name: impl Into<String>,
        kind: ErrorKind,
        part: &str,
        bytes: impl Into<Vec<u8>>,
    ) {
        self.0.push(Case { name: name.into(), bytes: bytes.into(), refused: Some((kind, part.into())) });
    }

    pub(crate) fn used(&mut self, name: impl Into<String>, bytes: impl Into<Vec<u8>>) {
        self.0.push(Case { name: name.into(), bytes: bytes.into(), refused: None });
    }
}
