//! Progress of a training run on stderr: a bar on a terminal, plain lines when piped.

use std::io::{IsTerminal, Write};

use engraft_runtime::bytes;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::units::show_seconds;

/// Maximum redraws of the bar per second.
const REDRAWS_PER_S: u8 = 10;
/// Steps done and in total, then the facts and the remaining time.
const OF_MANY: &str = "{pos}/{len} [{bar:30}] {msg}  ETA {eta}";
/// The same while the total is unknown.
const OF_UNKNOWN: &str = "{pos}  {msg}";

/// A run's state after a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    /// Steps done, from 1.
    pub(crate) step: u64,
    /// Training loss in nats.
    pub(crate) loss: f64,
    pub(crate) tokens_per_s: f64,
    pub(crate) peak_private_bytes: Option<u64>,
    /// Seconds that the steps so far took; 0 while unknown.
    pub(crate) elapsed_s: f64,
}

/// Shows the steps of one run.
pub(crate) struct Progress {
    shown: Shown,
    /// The run's number of steps, if known.
    total: Option<u64>,
}

enum Shown {
    Bar(ProgressBar),
    /// A line every so many steps.
    Lines {
        every: u64,
        out: Box<dyn Write>,
    },
}

impl Progress {
    /// For a run of `total` steps, on stderr: a bar if that is a terminal that can draw one, otherwise a line every so many
    /// steps.
    pub(crate) fn on_stderr(every: u32, total: Option<u64>) -> Progress {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let shown = match dumb || !std::io::stderr().is_terminal() {
            true => Shown::Lines { every: every.max(1).into(), out: Box::new(std::io::stderr()) },
            false => Shown::Bar(bar(total, ProgressDrawTarget::stderr_with_hz(REDRAWS_PER_S))),
        };
        Progress { shown, total }
    }

    /// Shows a step if it is due. A failed write is ignored: it mustn't stop the training.
    pub(crate) fn step(&mut self, step: &Step) {
        let last = self.total.is_some_and(|total| step.step >= total);
        match &mut self.shown {
            Shown::Lines { every, out } if last || step.step == 1 || step.step.is_multiple_of(*every) => {
                let count = self.total.map_or(String::new(), |total| format!("/{total}"));
                let eta = eta(step, self.total);
                let _ = writeln!(out, "step {}{count}  {}{eta}", step.step, facts(step));
            }
            Shown::Lines { .. } => {}
            Shown::Bar(bar) => {
                bar.set_message(facts(step));
                bar.set_position(step.step);
            }
        }
    }

    /// Prints a line, above the bar.
    pub(crate) fn note(&mut self, text: &str) {
        match &mut self.shown {
            Shown::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            Shown::Lines { out, .. } => {
                let _ = writeln!(out, "{text}");
            }
        }
    }

    /// Leaves the bar as it is, so that further output starts on a new line.
    pub(crate) fn finish(&mut self) {
        if let Shown::Bar(bar) = &self.shown
            && bar.position() > 0
        {
            bar.abandon();
        }
    }
}

fn bar(total: Option<u64>, target: ProgressDrawTarget) -> ProgressBar {
    let template = if total.is_some() { OF_MANY } else { OF_UNKNOWN };
    let style = ProgressStyle::with_template(template);
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ");
    ProgressBar::with_draw_target(total, target).with_style(style)
}

fn facts(step: &Step) -> String {
    let peak = step.peak_private_bytes.map_or(String::new(), |b| format!("  peak {}", bytes::show(b)));
    format!("loss {:.4}  {:.0} tokens/s{peak}", step.loss, step.tokens_per_s)
}

fn eta(step: &Step, total: Option<u64>) -> String {
    total.filter(|_| step.elapsed_s > 0.0).map_or_else(String::new, |total| {
        let left = total.saturating_sub(step.step) as f64;
        format!("  ETA {}", show_seconds(step.elapsed_s / step.step.max(1) as f64 * left))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use indicatif::{InMemoryTerm, TermLike};

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn at(step: u64, elapsed_s: f64) -> Step {
        Step { step, loss: 1.5, tokens_per_s: 180.4, peak_private_bytes: Some(97 << 20), elapsed_s }
    }

    fn lines(every: u64, total: Option<u64>, steps: impl Iterator<Item = Step>) -> String {
        let buffer = Buffer::default();
        let shown = Shown::Lines { every, out: Box::new(buffer.clone()) };
        let mut progress = Progress { shown, total };
        steps.for_each(|s| progress.step(&s));
        progress.note("saved");
        progress.finish();
        String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap()
    }

    /// What stands on a terminal of so many columns.
    fn screen(columns: u16, total: Option<u64>, steps: impl Iterator<Item = Step>) -> String {
        let terminal = InMemoryTerm::new(5, columns);
        let target = ProgressDrawTarget::term_like(Box::new(terminal.clone()));
        let mut progress = Progress { shown: Shown::Bar(bar(total, target)), total };
        steps.for_each(|s| progress.step(&s));
        progress.finish();
        assert_eq!(terminal.width(), columns);
        terminal.contents()
    }

    #[test]
    fn lines_come_at_their_steps() {
        let text = lines(10, Some(25), (1..=25).map(|s| at(s, s as f64)));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "step 1/25  loss 1.5000  180 tokens/s  peak 97.0 MiB  ETA 24s");
        assert!(lines[1].starts_with("step 10/25") && lines[1].ends_with("ETA 15s"));
        assert!(lines[3].starts_with("step 25/25") && lines[3].ends_with("ETA 0s"));
        assert_eq!((lines.len(), lines[4]), (5, "saved"));
        assert!(!text.contains('\x1b'));
    }

    #[test]
    fn what_is_not_known_is_not_told() {
        let text = lines(10, None, (1..=20).map(|s| at(s, s as f64)));
        let all: Vec<_> = text.lines().collect();
        assert_eq!(all[0], "step 1  loss 1.5000  180 tokens/s  peak 97.0 MiB");
        assert!(all[2].starts_with("step 20  ") && !text.contains("ETA"), "{text}");
        let text = lines(10, Some(20), [at(1, 0.0)].into_iter());
        assert!(text.starts_with("step 1/20  loss") && !text.contains("ETA"), "{text}");
        let text = screen(90, None, (1..=20).map(|s| at(s, s as f64)));
        assert!(text.starts_with("20  loss 1.5000") && !text.contains('='), "{text}");
    }

    #[test]
    fn the_bar_tells_all_of_it() {
        let text = screen(100, Some(1000), (1..=1000).map(|s| at(s, s as f64 * 0.01)));
        let bar =
            "1000/1000 [==============================] loss 1.5000  180 tokens/s  peak 97.0 MiB  ETA 0s";
        assert_eq!(text, bar);
        for columns in [10, 40] {
            let text = screen(columns, Some(1000), (1..=500).map(|s| at(s, s as f64 * 0.01)));
            assert!(text.lines().all(|line| line.len() <= columns as usize), "{text}");
        }
    }
}
