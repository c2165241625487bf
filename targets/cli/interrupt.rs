//! Ctrl-C and SIGTERM ask the run to stop at the next step; a second Ctrl-C ends the process at once.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// The exit code of an interrupted run.
const INTERRUPTED: i32 = 130;

/// Installs the handlers and gives the flag that the first signal sets.
pub(crate) fn install() -> Result<Arc<AtomicBool>> {
    let asked = Arc::new(AtomicBool::new(false));
    // SIGTERM ends nothing, however often it comes: `timeout` sends two, and service managers send what they like.
    let again = Arc::new(AtomicBool::new(false));
    // In this order: the first Ctrl-C finds its flag unset, and only then sets it.
    flag::register_conditional_shutdown(SIGINT, INTERRUPTED, Arc::clone(&again))
        .and_then(|_| flag::register(SIGINT, again))
        .and_then(|_| flag::register(SIGINT, Arc::clone(&asked)))
        .and_then(|_| flag::register(SIGTERM, Arc::clone(&asked)))
        .context("installing the handler of Ctrl-C")?;
    Ok(asked)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    #[test]
    fn the_first_signals_only_ask() {
        let asked = super::install().unwrap();
        assert!(!asked.load(Ordering::SeqCst));
        for signal in [super::SIGTERM, super::SIGTERM, super::SIGINT] {
            asked.store(false, Ordering::SeqCst);
            signal_hook::low_level::raise(signal).unwrap();
            assert!(asked.load(Ordering::SeqCst));
        }
    }
}
