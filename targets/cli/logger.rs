//! Logs to stderr, for `-v`. Only our own crates are heard: a dependency might log the text it
//! works on, and a user's text belongs in no log.

use std::io::{IsTerminal, Write};

use log::{LevelFilter, Log, Metadata, Record};

struct Logger;

/// Installs the logger: warnings always, then info, debug and trace with each `-v`.
pub(crate) fn install(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    // Fails only when a logger is there already, which is then as good.
    if log::set_logger(&Logger).is_ok() {
        log::set_max_level(level);
    }
}

/// Whether records of a module are ours to print.
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
        // A progress bar may stand on the line.
        let clear = if std::io::stderr().is_terminal() { "\r\x1b[K" } else { "" };
        let level = record.level().as_str().to_ascii_lowercase();
        // A closed stderr can't be told to anyone.
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
