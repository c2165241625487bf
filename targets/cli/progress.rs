//! Progress of a training run on stderr: a bar on a terminal, plain lines elsewhere.

use std::io::{IsTerminal, Write};

use engraft_runtime::bytes;

use crate::units::show_seconds;

/// Seconds between redraws of the bar: often enough to look alive.
const REDRAW_S: f64 = 0.1;

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// A bar that is redrawn in place, in this many columns.
    Bar { columns: usize },
    /// A line every so many steps.
    Lines { every: u64 },
}

impl Style {
    /// The style that fits stderr: a bar on a terminal that can draw one.
    pub(crate) fn for_stderr(every: u32) -> Style {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        if dumb || !std::io::stderr().is_terminal() {
            return Style::Lines { every: every.max(1).into() };
        }
        let columns = std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok()).unwrap_or(80);
        Style::Bar { columns }
    }
}

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
#[derive(Debug)]
pub(crate) struct ProgressLine<W: Write> {
    out: W,
    style: Style,
    /// The run's number of steps, if known.
    total: Option<u64>,
    drawn_at_s: f64,
    bar_stands: bool,
}

impl<W: Write> ProgressLine<W> {
    /// Shows a run of `total` steps on `out` (stderr, or a test's buffer).
    pub(crate) fn new(out: W, style: Style, total: Option<u64>) -> Self {
        let total = total.map(|steps| steps.max(1));
        ProgressLine { out, style, total, drawn_at_s: f64::NEG_INFINITY, bar_stands: false }
    }

    /// Shows a step if it is due. A failed write is ignored: it mustn't stop the training.
    pub(crate) fn step(&mut self, step: &Step) {
        let last = self.total.is_some_and(|total| step.step >= total);
        match self.style {
            Style::Lines { every } if last || step.step == 1 || step.step.is_multiple_of(every) => {
                let _ = writeln!(self.out, "step {}  {}", self.count(step), self.facts(step));
            }
            Style::Lines { .. } => {}
            Style::Bar { columns } if last || step.elapsed_s - self.drawn_at_s >= REDRAW_S => {
                self.drawn_at_s = step.elapsed_s;
                self.bar_stands = true;
                let _ = write!(self.out, "\r\x1b[K{}", self.bar(step, columns));
                let _ = self.out.flush();
            }
            Style::Bar { .. } => {}
        }
    }

    /// Prints a separate line above the bar.
    pub(crate) fn note(&mut self, text: &str) {
        let clear = if self.bar_stands { "\r\x1b[K" } else { "" };
        self.bar_stands = false;
        let _ = writeln!(self.out, "{clear}{text}");
    }

    /// Ends the bar's line, so that further output starts on a new one.
    pub(crate) fn finish(&mut self) {
        if std::mem::take(&mut self.bar_stands) {
            let _ = writeln!(self.out);
        }
    }

    fn count(&self, step: &Step) -> String {
        self.total.map_or_else(|| step.step.to_string(), |total| format!("{}/{total}", step.step))
    }

    fn facts(&self, step: &Step) -> String {
        let eta = self.total.filter(|_| step.elapsed_s > 0.0).map_or_else(String::new, |total| {
            let left = total.saturating_sub(step.step) as f64;
            format!("  ETA {}", show_seconds(step.elapsed_s / step.step.max(1) as f64 * left))
        });
        let peak = step.peak_private_bytes.map_or(String::new(), |b| format!("  peak {}", bytes::show(b)));
        let (loss, rate) = (step.loss, step.tokens_per_s);
        format!("loss {loss:.4}  {rate:.0} tokens/s{peak}{eta}")
    }

    /// The bar's line, at most `columns - 1` wide, because a full line wraps on some terminals.
    fn bar(&self, step: &Step, columns: usize) -> String {
        let count = self.count(step);
        let facts = self.facts(step);
        let room = columns.saturating_sub(count.len() + facts.len() + 6).min(40);
        let line = match self.total {
            Some(total) if room >= 5 => {
                let done = (room as u64 * step.step.min(total) / total) as usize;
                format!("{count} [{}{}]  {facts}", "=".repeat(done), " ".repeat(room - done))
            }
            _ => format!("{count}  {facts}"),
        };
        line.chars().take(columns.saturating_sub(1)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(step: u64, elapsed_s: f64) -> Step {
        Step { step, loss: 1.5, tokens_per_s: 180.4, peak_private_bytes: Some(97 << 20), elapsed_s }
    }

    fn shown(style: Style, total: Option<u64>, steps: impl Iterator<Item = Step>) -> String {
        let mut buffer = Vec::new();
        let mut progress = ProgressLine::new(&mut buffer, style, total);
        steps.for_each(|s| progress.step(&s));
        progress.note("saved");
        progress.finish();
        String::from_utf8(buffer).unwrap()
    }

    #[test]
    fn lines_come_at_their_steps() {
        let text = shown(Style::Lines { every: 10 }, Some(25), (1..=25).map(|s| at(s, s as f64)));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "step 1/25  loss 1.5000  180 tokens/s  peak 97.0 MiB  ETA 24s");
        assert!(lines[1].starts_with("step 10/25") && lines[1].ends_with("ETA 15s"));
        assert!(lines[3].starts_with("step 25/25") && lines[3].ends_with("ETA 0s"));
        assert_eq!((lines.len(), lines[4]), (5, "saved"));
        assert!(!text.contains('\x1b'));
    }

    #[test]
    fn what_is_not_known_is_not_told() {
        let text = shown(Style::Lines { every: 10 }, None, (1..=20).map(|s| at(s, s as f64)));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "step 1  loss 1.5000  180 tokens/s  peak 97.0 MiB");
        assert!(lines[2].starts_with("step 20  ") && !text.contains("ETA"), "{text}");
        let text = shown(Style::Bar { columns: 90 }, None, (1..=20).map(|s| at(s, s as f64)));
        assert!(text.contains("20  loss") && !text.contains('='), "{text}");
        let text = shown(Style::Lines { every: 10 }, Some(20), [at(1, 0.0)].into_iter());
        assert!(text.starts_with("step 1/20  loss") && !text.contains("ETA"), "{text}");
    }

    #[test]
    fn the_bar_is_redrawn_in_bounds() {
        let steps = || (1..=1000).map(|s| at(s, s as f64 * 0.01));
        let text = shown(Style::Bar { columns: 90 }, Some(1000), steps());
        let drawings: Vec<_> = text.split("\r\x1b[K").skip(1).collect();
        assert!((90..=112).contains(&drawings.len()), "{}", drawings.len());
        assert!(drawings.iter().all(|d| d.trim_end().len() < 90));
        assert!(drawings[50].contains("[=") && drawings[50].contains("tokens/s"));
        for columns in [0, 1, 10, 40] {
            let text = shown(Style::Bar { columns }, Some(1000), steps());
            assert!(text.split("\r\x1b[K").all(|d| d.trim_end().len() < columns.max(6)), "{columns}");
        }
    }
}
