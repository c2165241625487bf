//! Ctrl-C and SIGTERM ask the run to stop at the next step; a second Ctrl-C ends the process at once. So does a
//! second SIGTERM, but for a run that saves what it has when it is asked.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// The exit code of an interrupted run.
const INTERRUPTED: i32 = 130;

/// Installs the handlers and gives the flag that the first signal sets. Of a run that `saves`, SIGTERM ends nothing
/// however often it comes: `timeout` sends two at once.
pub(crate) fn install(saves: bool) -> Result<Arc<AtomicBool>> {
    let asked = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        if signal == SIGINT || !saves {
            let again = Arc::new(AtomicBool::new(false));
            // In this order: the first signal finds its flag unset, and only then sets it.
            flag::register_conditional_shutdown(signal, INTERRUPTED, Arc::clone(&again))
                .and_then(|_| flag::register(signal, again))
                .context("installing the handler of signals")?;
        }
        flag::register(signal, Arc::clone(&asked)).context("installing the handler of signals")?;
    }
    Ok(asked)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    #[test]
    fn the_first_signals_only_ask() {
        let asked = super::install(true).unwrap();
        assert!(!asked.load(Ordering::SeqCst));
        for signal in [super::SIGTERM, super::SIGTERM, super::SIGINT] {
            asked.store(false, Ordering::SeqCst);
            signal_hook::low_level::raise(signal).unwrap();
            assert!(asked.load(Ordering::SeqCst));
        }
    }
}
