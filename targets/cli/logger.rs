//! Logs to stderr, for `-v`. Only our crates may log: a dependency might log the text it works on, and a
//! user's text must never appear in a log.

use std::io::{IsTerminal, Write};

use log::{LevelFilter, Log, Metadata, Record};

struct Logger;

/// Installs the logger. Warnings are always shown; each `-v` adds info, debug and trace.
pub(crate) fn install(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    // Fails only if a logger is installed already, which will do.
    if log::set_logger(&Logger).is_ok() {
        log::set_max_level(level);
    }
}

/// Whether a module belongs to one of our crates.
fn is_ours(target: &str) -> bool {
    let root = target.split("::").next().unwrap_or_default();
    root == "engraft" || root.starts_with("engraft_")
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level() && is_ours(metadata.target())
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        // A progress bar may be on this line.
        let clear = if std::io::stderr().is_terminal() { "\r\x1b[K" } else { "" };
        let level = record.level().as_str().to_ascii_lowercase();
        // If stderr is closed, there is nobody to tell.
        let _ = writeln!(std::io::stderr(), "{clear}{level}: {}", record.args());
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::is_ours;

    #[test]
    fn dependencies_stay_unheard() {
        assert!(is_ours("engraft::verbs") && is_ours("engraft_kernels::dispatch") && is_ours("engraft"));
        assert!(!is_ours("tokenizers::models") && !is_ours("engrafting"));
    }
}
