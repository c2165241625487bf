//! The library's warnings and notes, passed to a callback. By default they go nowhere.
//!
//! Only our crates may log: a dependency might log the text that it works on, and a user's text must never
//! appear in a log.

use std::cell::RefCell;
use std::ffi::{c_char, c_void};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use ::log::{LevelFilter, Log, Metadata, Record};

use crate::error::{ENGRAFT_BUSY, Failure};
use crate::handle;

/// No lines.
pub const ENGRAFT_LOG_NONE: i32 = 0;
/// Errors.
pub const ENGRAFT_LOG_ERROR: i32 = 1;
/// Warnings that a user should see.
pub const ENGRAFT_LOG_WARN: i32 = 2;
/// Choices that the library made.
pub const ENGRAFT_LOG_INFO: i32 = 3;
/// Details for finding a bug.
pub const ENGRAFT_LOG_DEBUG: i32 = 4;

/// Takes a line: its level and its text, which isn't NUL-terminated. Called from any thread, also from several
/// at once. It must not wait for another thread that calls `engraft_log_set`.
pub type LogCallback =
    Option<unsafe extern "C" fn(level: i32, text: *const c_char, length: usize, user: *mut c_void)>;

/// A callback in use.
struct Sink {
    callback: unsafe extern "C" fn(i32, *const c_char, usize, *mut c_void),
    user: *mut c_void,
}

// SAFETY: the header demands that the callback may be called from any thread with its `user`.
unsafe impl Send for Sink {}
// SAFETY: from several at once, too.
unsafe impl Sync for Sink {}

static SINK: RwLock<Option<Arc<Sink>>> = RwLock::new(None);

thread_local! {
    /// The sinks whose callbacks this thread is in, nested.
    static WITHIN: RefCell<Vec<*const Sink>> = const { RefCell::new(Vec::new()) };
}

struct Logger;

/// Passes all lines up to `level` to `callback`, which replaces the previous one; NULL ends logging. When this
/// returns, the previous callback isn't running and never will again (except for a call that this one is made
/// from). `BUSY` if the program already has a logger for Rust code, which then gets the library's lines.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_log_set(callback: LogCallback, user: *mut c_void, level: i32) -> i32 {
    handle::alone("engraft_log_set", || {
        let filter = match level {
            ENGRAFT_LOG_NONE => LevelFilter::Off,
            ENGRAFT_LOG_ERROR => LevelFilter::Error,
            ENGRAFT_LOG_WARN => LevelFilter::Warn,
            ENGRAFT_LOG_INFO => LevelFilter::Info,
            ENGRAFT_LOG_DEBUG => LevelFilter::Debug,
            _ => return Err(Failure::misuse(format!("{level} isn't a log level"))),
        };
        if !installed() {
            return Err(Failure::new(ENGRAFT_BUSY, "the program already has a logger for Rust code"));
        }
        let next = callback.map(|callback| Arc::new(Sink { callback, user }));
        ::log::set_max_level(if next.is_some() { filter } else { LevelFilter::Off });
        let before = {
            let mut sink = SINK.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *sink, next)
        };
        if let Some(before) = before {
            // Each line in progress has a share; new lines find the next sink.
            let of_it = |within: &RefCell<Vec<_>>| count(&within.borrow(), Arc::as_ptr(&before));
            let own = WITHIN.try_with(of_it).unwrap_or(0);
            while Arc::strong_count(&before) > 1 + own {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    })
}

fn count(within: &[*const Sink], sink: *const Sink) -> usize {
    within.iter().filter(|one| **one == sink).count()
}

/// Whether the process's logger is ours. Installs ours if there is none.
fn installed() -> bool {
    static OURS: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *OURS.get_or_init(|| ::log::set_logger(&Logger).is_ok())
}

/// Whether a module belongs to one of our crates.
fn is_ours(target: &str) -> bool {
    let root = target.split("::").next().unwrap_or_default();
    root == "engraft" || root.starts_with("engraft_")
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= ::log::max_level() && is_ours(metadata.target())
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let sink = SINK.read().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(sink) = sink else { return };
        // Both count from errors, 1; here traces are details, too.
        let level = (record.level() as i32).min(ENGRAFT_LOG_DEBUG);
        let text = record.args().to_string();
        let _ = WITHIN.try_with(|within| within.borrow_mut().push(Arc::as_ptr(&sink)));
        // SAFETY: the crate's contract, for callbacks: this one may be called until the engraft_log_set that
        // replaces it returns, which waits for the share held here.
        unsafe { (sink.callback)(level, text.as_ptr().cast(), text.len(), sink.user) };
        let _ = WITHIN.try_with(|within| within.borrow_mut().pop());
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{self, ModelParams};
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::{Mutex, mpsc};

    /// One test at a time has the callback.
    static ALONE: Mutex<()> = Mutex::new(());

    /// Where the callbacks of the test below are: another thread in the second one, and how deep this one is.
    static IS_IN_SECOND: AtomicBool = AtomicBool::new(false);
    static DEPTH: AtomicUsize = AtomicUsize::new(0);

    fn set(callback: LogCallback) {
        // SAFETY: the callbacks use nothing of their caller's.
        let code = unsafe { engraft_log_set(callback, std::ptr::null_mut(), ENGRAFT_LOG_INFO) };
        assert_eq!(code, crate::error::ENGRAFT_OK);
    }

    /// Other tests log, too.
    fn is_own(text: *const c_char, length: usize) -> bool {
        // SAFETY: the library's text has this length.
        let text = unsafe { std::slice::from_raw_parts(text.cast::<u8>(), length) };
        text.starts_with(b"own: ")
    }

    unsafe extern "C" fn first(_: i32, text: *const c_char, length: usize, _: *mut c_void) {
        if !is_own(text, length) {
            return;
        }
        set(Some(second));
        let slow = std::thread::spawn(|| ::log::warn!("own: from another thread"));
        while !IS_IN_SECOND.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        ::log::warn!("own: from within the first");
        slow.join().expect("no panic");
    }

    unsafe extern "C" fn second(_: i32, text: *const c_char, length: usize, _: *mut c_void) {
        if !is_own(text, length) {
            return;
        }
        // The first caller stays for a while; the second one, within `first`, ends it all meanwhile.
        if DEPTH.fetch_add(1, Ordering::AcqRel) == 0 {
            IS_IN_SECOND.store(true, Ordering::Release);
            std::thread::sleep(Duration::from_millis(100));
            IS_IN_SECOND.store(false, Ordering::Release);
            return;
        }
        set(None);
        assert!(!IS_IN_SECOND.load(Ordering::Acquire), "the callback that was replaced still runs");
    }

    /// A call from within two callbacks, one within another, waits for the one that it replaces.
    #[test]
    fn what_was_replaced_runs_no_more() {
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        set(Some(first));
        ::log::warn!("own: begin");
        assert_eq!(DEPTH.load(Ordering::Acquire), 2);
    }

    /// The model of the test below, and whether the callback was told its digest.
    static MODEL: AtomicUsize = AtomicUsize::new(0);
    static IS_TOLD: AtomicBool = AtomicBool::new(false);

    fn digest_of_model() -> bool {
        let mut digest = [0u8; 32];
        let model = std::ptr::without_provenance(MODEL.load(Ordering::Acquire));
        // SAFETY: a number, and a place of 32 bytes.
        let code = unsafe { model::engraft_model_digest(model, digest.as_mut_ptr()) };
        code == crate::error::ENGRAFT_OK && digest != [0; 32]
    }

    unsafe extern "C" fn asks(_: i32, text: *const c_char, length: usize, _: *mut c_void) {
        // SAFETY: the library's text has this length.
        let text = unsafe { std::slice::from_raw_parts(text.cast::<u8>(), length) };
        if text.starts_with(b"the digest is not kept") {
            IS_TOLD.store(digest_of_model(), Ordering::Release);
        }
    }

    /// A callback that calls back waits for nothing that its own call holds.
    #[test]
    fn who_hears_of_a_digest_may_ask_for_it() {
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../cli/seedling.gguf");
        // A folder that can't be made: a file is in its place.
        let (cache, mut params) = (format!("{path}/cache"), crate::caller::zeroed::<ModelParams>());
        params.struct_size = size_of::<ModelParams>() as u32;
        (params.digest_cache, params.digest_cache_length) = (cache.as_ptr().cast(), cache.len());
        let mut made = std::ptr::null_mut();
        // SAFETY: texts have the lengths that are said, and the rest is ours.
        let code = unsafe { model::engraft_model_open(path.as_ptr().cast(), path.len(), &params, &mut made) };
        assert_eq!(code, crate::error::ENGRAFT_OK);
        MODEL.store(made.addr(), Ordering::Release);
        set(Some(asks));
        let (send, done) = mpsc::channel();
        std::thread::spawn(move || send.send(digest_of_model()));
        assert_eq!(done.recv_timeout(Duration::from_secs(60)), Ok(true), "it waits for itself");
        set(None);
        assert!(IS_TOLD.load(Ordering::Acquire));
        // SAFETY: a handle.
        assert_eq!(unsafe { model::engraft_model_free(made) }, crate::error::ENGRAFT_OK);
    }

    #[test]
    fn dependencies_stay_unheard() {
        assert!(is_ours("engraft::model") && is_ours("engraft_runtime::train") && is_ours("engraft"));
        assert!(!is_ours("tokenizers::models") && !is_ours("engrafting"));
    }
}
