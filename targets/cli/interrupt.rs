//! Ctrl-C and SIGTERM ask the run to stop at the next step. A second Ctrl-C ends the process at once. So does a
//! second SIGTERM, except in a run that saves its progress when asked to stop.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// The exit code of an interrupted run.
const INTERRUPTED: i32 = 130;

/// Installs the handlers and returns the flag that the first signal sets. A run that `saves` isn't killed by repeated
/// SIGTERMs, because `timeout` sends two at once.
pub(crate) fn install(saves: bool) -> Result<Arc<AtomicBool>> {
    let asked = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        if signal == SIGINT || !saves {
            let again = Arc::new(AtomicBool::new(false));
            // In this order, so that the first signal finds its flag unset before it sets it.
            flag::register_conditional_shutdown(signal, INTERRUPTED, Arc::clone(&again))
                .and_then(|_| flag::register(signal, again))
                .context("installing the signal handlers")?;
        }
        flag::register(signal, Arc::clone(&asked)).context("installing the signal handlers")?;
    }
    // A file that may not grow further becomes an error of its write, which names the file, instead of the process's end.
    #[cfg(unix)]
    flag::register(signal_hook::consts::SIGXFSZ, Arc::default()).context("installing the signal handlers")?;
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
