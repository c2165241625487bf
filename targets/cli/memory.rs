//! The process's private memory as the system counts it, to compare with the plan.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Watches for the largest private memory on a separate thread, to catch peaks within a step. Stops when dropped.
///
/// Private means anonymous pages (heap, stacks), in memory or swapped out. Pages of mapped files are
/// clean and evictable, so they don't count.
#[derive(Debug)]
pub(crate) struct Watch {
    seen: Arc<Seen>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Seen {
    peak_bytes: AtomicU64,
    stop: AtomicBool,
}

impl Watch {
    /// Starts sampling every `interval`. If no thread can be started, only [`Watch::sample`] measures.
    pub(crate) fn start(interval: Duration) -> Watch {
        let seen = Arc::new(Seen::default());
        let its = Arc::clone(&seen);
        let look = move || {
            while !its.stop.load(Ordering::Relaxed) && its.sample().is_some() {
                std::thread::park_timeout(interval);
            }
        };
        let thread = std::thread::Builder::new().name("memory".into()).stack_size(64 << 10).spawn(look).ok();
        Watch { seen, thread }
    }

    /// Measures now and returns the peak since the start, in bytes; `None` where the system doesn't report it.
    pub(crate) fn sample(&self) -> Option<u64> {
        self.seen.sample()
    }
}

impl Seen {
    fn sample(&self) -> Option<u64> {
        let now = private_bytes()?;
        Some(self.peak_bytes.fetch_max(now, Ordering::Relaxed).max(now))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.seen.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // The thread can't panic. Even if it did, the peak so far would be valid.
            let _ = thread.join();
        }
    }
}

/// Private memory now, in bytes. Allocates nothing, so that measuring doesn't change the result.
fn private_bytes() -> Option<u64> {
    if !cfg!(target_os = "linux") && !cfg!(target_os = "android") {
        return None;
    }
    let mut buffer = [0u8; 8192];
    // The kernel writes this file in one piece, so one read gets it all.
    let filled = std::fs::File::open("/proc/self/status").ok()?.read(&mut buffer).ok()?;
    parse_status(std::str::from_utf8(&buffer[..filled]).ok()?)
}

/// `RssAnon` plus `VmSwap` from `/proc/PID/status`, in bytes; `None` without `RssAnon`.
fn parse_status(status: &str) -> Option<u64> {
    let kib = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    kib("RssAnon")?.checked_add(kib("VmSwap").unwrap_or(0))?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_parsed() {
        let status =
            "Name:\tRssAnon: 7 kB\nVmHWM:\t 9 kB\nRssAnon:\t     120 kB\nRssFile:\t 5 kB\nVmSwap:\t 8 kB\n";
        assert_eq!(parse_status(status), Some(128 * 1024));
        assert_eq!(parse_status("RssAnon:\t120 kB\n"), Some(120 * 1024));
        assert_eq!(parse_status("VmSwap:\t120 kB\n"), None);
        assert_eq!(parse_status("RssAnon:\t99999999999999999999 kB\n"), None);
        assert_eq!(parse_status("RssAnon:\t18446744073709551615 kB\n"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_passing_peak_is_seen_and_kept() {
        const BYTES: usize = 48 << 20;
        let watch = Watch::start(Duration::from_millis(1));
        let big = std::hint::black_box(vec![1u8; BYTES]);
        std::thread::sleep(Duration::from_millis(200));
        // Not measured through the watch: its thread must have seen the peak by itself. Other tests allocate and free
        // memory meanwhile, so the bound is loose.
        let during = private_bytes().unwrap();
        drop(big);
        let after = watch.sample().unwrap();
        assert!(during >= BYTES as u64 && after + BYTES as u64 / 10 >= during, "{during} to {after}");
    }
}
