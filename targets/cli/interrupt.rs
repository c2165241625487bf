//! Ctrl-C asks the run to stop at the next step; a second Ctrl-C ends the process at once.

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
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal finds the flag unset, and only then sets it.
        flag::register_conditional_shutdown(signal, INTERRUPTED, Arc::clone(&asked))
            .and_then(|_| flag::register(signal, Arc::clone(&asked)))
            .context("installing the handler of Ctrl-C")?;
    }
    Ok(asked)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    #[test]
    fn the_first_signal_only_asks() {
        let asked = super::install().unwrap();
        assert!(!asked.load(Ordering::SeqCst));
        signal_hook::low_level::raise(signal_hook::consts::SIGINT).unwrap();
        assert!(asked.load(Ordering::SeqCst));
    }
}
