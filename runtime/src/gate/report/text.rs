//! The report as text for a terminal: what the page shows, without its curves.

use std::borrow::Cow;

use textwrap::{Options, WordSeparator, WordSplitter, WrapAlgorithm, wrap};

use super::super::verdict::{Comparison, Decision};
use super::outcome::{caveat, rivals, warnings, zero_shot};
use super::tables::{self, Table, word};
use super::{Output, Report, SampleOutputs, show};

/// Columns below which nothing is narrowed further.
const WIDTH_MIN: usize = 40;
/// Columns that no line exceeds, whatever the terminal claims.
const WIDTH_MAX: usize = 400;
/// Columns that prose doesn't exceed, however wide the terminal.
const PROSE_MAX: usize = 100;
/// Lines of a prompt or an answer before it is cut.
const SAMPLE_LINES_MAX: usize = 5;
/// Samples before the rest is only counted.
const SAMPLES_MAX: usize = 3;

impl Report {
    /// The report as text for a terminal of `width` columns (taken as 40 to 400), with colours as ANSI codes
    /// where `colour` is set. Control characters in foreign text are made visible, so none of them
    /// reaches the terminal.
    pub fn to_text(&self, width: usize, colour: bool) -> String {
        let mut sheet = Sheet { out: String::new(), width: width.clamp(WIDTH_MIN, WIDTH_MAX), colour };
        self.tell_verdict(&mut sheet);
        self.tell_arms(&mut sheet);
        let tables =
            [tables::forgetting, tables::runs, tables::memory, tables::scoring].map(|table| table(self));
        for table in tables {
            if !table.rows.is_empty() {
                sheet.heading(table.caption);
                sheet.table(&table);
            }
        }
        self.tell_samples(&mut sheet);
        for (i, (name, reasons)) in self.reasons().into_iter().enumerate() {
            if i == 0 {
                sheet.heading("Reasons");
            }
            sheet.say(Tone::Bold, 0, &name);
            reasons.iter().for_each(|r| sheet.item(r));
        }
        self.tell_facts(&mut sheet);
        sheet.out
    }

    fn tell_verdict(&self, sheet: &mut Sheet) {
        let tone = match &self.verdict.decision {
            _ if self.verdict.leak_count > 0 => Tone::Bad,
            Decision::Promote { .. } => Tone::Good,
            Decision::KeepPrompting { .. } | Decision::KeepActive { .. } | Decision::KeepBase => Tone::Bold,
        };
        sheet.say(tone, 0, &self.verdict.sentence);
        sheet.say(Tone::Plain, 0, &format!("Next: {}", self.next_step()));
        sheet.say(Tone::Plain, 0, &self.heading());
        sheet.say(Tone::Plain, 0, &self.verdict.decision.to_string());
        warnings(&self.verdict).iter().for_each(|w| sheet.say(Tone::Open, 0, &format!("! {w}")));
    }

    fn tell_arms(&self, sheet: &mut Sheet) {
        let table = tables::arms(self);
        if table.rows.is_empty() {
            return;
        }
        sheet.heading(table.caption);
        if let Some(caveat) = caveat(&self.verdict) {
            sheet.say(Tone::Bad, 0, caveat);
        }
        sheet.table(&table);
        for rival in rivals(&self.verdict) {
            let arms = self.verdict.arms.iter();
            let found = arms
                .filter_map(|a| Some((a.name.as_str(), a.comparisons.iter().find(|c| c.against == rival)?)));
            sheet.gains(rival, &found.collect::<Vec<_>>());
        }
    }

    fn tell_samples(&self, sheet: &mut Sheet) {
        if self.samples.is_empty() {
            return;
        }
        sheet.heading("Samples");
        for (i, sample) in self.samples.iter().take(SAMPLES_MAX).enumerate() {
            sheet.say(Tone::Bold, 0, &format!("{}. Prompt", i + 1));
            sheet.excerpt(&sample.prompt);
            if !sample.reference.is_empty() {
                sheet.say(Tone::Bold, 2, "Reference");
                sheet.excerpt(&sample.reference);
            }
            for output in self.in_order(sample) {
                let (tone, mark) = match output.correct {
                    Some(true) => (Tone::Good, " ✓ right"),
                    Some(false) => (Tone::Bad, " ✗ wrong"),
                    None => (Tone::Bold, ""),
                };
                sheet.say(tone, 2, &format!("{}{mark}", show::one_line(&output.arm)));
                sheet.excerpt(&output.text);
            }
        }
        if self.samples.len() > SAMPLES_MAX {
            sheet.say(Tone::Plain, 0, &format!("{} more in the page.", self.samples.len() - SAMPLES_MAX));
        }
    }

    /// Answers, those of the base alone first.
    fn in_order<'a>(&self, sample: &'a SampleOutputs) -> Vec<&'a Output> {
        let before = zero_shot(&self.verdict);
        let mut outputs: Vec<&Output> = sample.outputs.iter().collect();
        outputs.sort_by_key(|o| Some(o.arm.as_str()) != before);
        outputs
    }

    fn tell_facts(&self, sheet: &mut Sheet) {
        sheet.heading("Fine print");
        for (group, facts) in tables::facts(self) {
            sheet.say(Tone::Bold, 0, group);
            for (name, value) in facts {
                sheet.say(Tone::Plain, 2, &format!("{}: {}", show::one_line(&name), show::one_line(&value)));
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Tone {
    Plain,
    Bold,
    Good,
    Bad,
    Open,
}

/// The text as it is written.
struct Sheet {
    out: String,
    width: usize,
    colour: bool,
}

impl Sheet {
    /// A line as it is.
    fn line(&mut self, tone: Tone, line: &str) {
        let code = match tone {
            _ if !self.colour => "",
            Tone::Plain => "",
            Tone::Bold => "\x1b[1m",
            Tone::Good => "\x1b[32m",
            Tone::Bad => "\x1b[31m",
            Tone::Open => "\x1b[33m",
        };
        let end = if code.is_empty() { "" } else { "\x1b[0m" };
        self.out.push_str(&format!("{code}{}{end}\n", line.trim_end()));
    }

    fn heading(&mut self, name: &str) {
        self.out.push('\n');
        self.line(Tone::Bold, name);
        let rule = "─".repeat(show::columns(name).min(self.width));
        self.line(Tone::Plain, &rule);
    }

    /// Prose, wrapped and indented.
    fn say(&mut self, tone: Tone, indent: usize, text: &str) {
        for line in wrapped(text, self.width.min(PROSE_MAX) - indent) {
            self.line(tone, &format!("{}{line}", " ".repeat(indent)));
        }
    }

    fn item(&mut self, text: &str) {
        for (i, line) in wrapped(text, self.width.min(PROSE_MAX) - 2).into_iter().enumerate() {
            self.line(Tone::Plain, &format!("{} {line}", if i == 0 { "-" } else { " " }));
        }
    }

    /// The first lines of a text.
    fn excerpt(&mut self, text: &str) {
        let lines = wrapped(text, self.width.min(PROSE_MAX) - 4);
        if lines.is_empty() {
            self.line(Tone::Plain, "    (nothing)");
        }
        for line in lines.iter().take(SAMPLE_LINES_MAX) {
            self.line(Tone::Plain, &format!("    {line}"));
        }
        if lines.len() > SAMPLE_LINES_MAX {
            self.line(Tone::Plain, "    …");
        }
    }

    /// Columns as far as the width goes, then the others below, each part with the rows' names. Words are
    /// wrapped inside their columns.
    fn table(&mut self, table: &Table) {
        const WORDS_MAX: usize = 30;
        let limit = self.width / 3;
        let size = |column: usize| {
            let longest_word = table.head[column].split(' ').map(show::columns).max().unwrap_or(0);
            let cells = table.rows.iter().map(|r| show::columns(&r[column])).max().unwrap_or(0);
            let cells = if table.is_numeric(column) { cells } else { cells.min(limit.min(WORDS_MAX)) };
            longest_word.max(cells)
        };
        let sizes: Vec<usize> = (0..table.head.len()).map(size).collect();
        let mut part = vec![0];
        let mut used = sizes[0];
        for column in 1..sizes.len() {
            if used + 2 + sizes[column] > self.width && part.len() > 1 {
                self.part(table, &sizes, &part);
                self.out.push('\n');
                (part, used) = (vec![0], sizes[0]);
            }
            part.push(column);
            used += 2 + sizes[column];
        }
        self.part(table, &sizes, &part);
    }

    fn part(&mut self, table: &Table, sizes: &[usize], columns: &[usize]) {
        // A last column of words takes the room that is left.
        let last = columns[columns.len() - 1];
        let before: usize = columns.iter().filter(|c| **c != last).map(|c| sizes[*c] + 2).sum();
        let left = self.width.saturating_sub(before).max(sizes[last]);
        let size = |c: usize| if c == last && !table.is_numeric(c) { left } else { sizes[c] };
        let head: Vec<String> = table.head.iter().map(|h| h.to_string()).collect();
        for (i, row) in std::iter::once(&head).chain(&table.rows).enumerate() {
            let cells: Vec<Vec<String>> = columns.iter().map(|c| wrapped(&row[*c], size(*c))).collect();
            let height = cells.iter().map(Vec::len).max().unwrap_or(0);
            for l in 0..height {
                let cell = |(c, lines): (&usize, &Vec<String>)| {
                    // The names of columns stand on the line above the first row.
                    let skip = if i == 0 { height - lines.len() } else { 0 };
                    let text = l.checked_sub(skip).and_then(|l| lines.get(l)).map_or("", String::as_str);
                    padded(text, size(*c), table.is_numeric(*c))
                };
                let parts: Vec<String> = columns.iter().zip(&cells).map(cell).collect();
                self.line(if i == 0 { Tone::Bold } else { Tone::Plain }, &parts.join("  "));
            }
        }
    }

    /// Intervals as bars around the line of no gain.
    fn gains(&mut self, rival: &str, rows: &[(&str, &Comparison)]) {
        const NAME_MAX: usize = 16;
        let figures = rows.iter().flat_map(|(_, c)| [c.lower, c.gain, c.upper]).flatten();
        let (low, high) = figures
            .filter(|x| x.is_finite())
            .map(|x| x.clamp(-1e12, 1e12))
            .fold((0.0, 0.0), |(l, h), x| (f64::min(l, x), f64::max(h, x)));
        let names =
            rows.iter().map(|(n, _)| show::columns(&show::one_line(n))).max().unwrap_or(0).min(NAME_MAX);
        let figure = |c: &Comparison| format!("{} {}", show::change(c.gain), word(c));
        let figures = rows.iter().map(|(_, c)| show::columns(&figure(c))).max().unwrap_or(0);
        let bar = self.width.saturating_sub(names + figures + 4).min(48);
        if rows.is_empty() || high <= low || bar < 9 {
            return;
        }
        self.out.push('\n');
        self.say(
            Tone::Plain,
            0,
            &format!("Gain over {} (│ none, ● gain, ├ ┤ interval)", show::one_line(rival)),
        );
        let at = |x: f64| ((x.clamp(low, high) - low) / (high - low) * (bar - 1) as f64).round() as usize;
        for (name, c) in rows {
            let tone = match word(c) {
                "better" => Tone::Good,
                "worse" => Tone::Bad,
                _ => Tone::Open,
            };
            let name = padded(&show::cut(name, names), names, false);
            self.line(tone, &format!("{name}  {}  {}", interval_bar(c, at, bar), figure(c)));
        }
    }
}

/// "··├──●──┤··│··".
fn interval_bar(c: &Comparison, at: impl Fn(f64) -> usize, bar: usize) -> String {
    let place = |x: Option<f64>| x.filter(|x| x.is_finite()).map(&at);
    let mut cells = vec!['·'; bar];
    cells[at(0.0)] = '│';
    let ends = place(c.lower).zip(place(c.upper));
    if let Some((from, to)) = ends.filter(|(from, to)| from <= to) {
        cells[from..=to].fill('─');
        if (from..=to).contains(&at(0.0)) {
            cells[at(0.0)] = '┼';
        }
        (cells[from], cells[to]) = ('├', '┤');
    }
    if let Some(gain) = place(c.gain) {
        cells[gain] = '●';
    }
    cells.into_iter().collect()
}

fn padded(text: &str, size: usize, right: bool) -> String {
    let blanks = " ".repeat(size.saturating_sub(show::columns(text)));
    if right { blanks + text } else { text.to_string() + &blanks }
}

/// The text in lines of at most so many columns, broken at blanks, and inside words that are too long.
/// Blank lines and blanks at both ends of the text are gone.
fn wrapped(text: &str, size: usize) -> Vec<String> {
    let options = Options::new(size)
        .wrap_algorithm(WrapAlgorithm::FirstFit)
        .word_separator(WordSeparator::AsciiSpace)
        .word_splitter(WordSplitter::NoHyphenation);
    let visible = show::visible(text);
    let paragraphs = visible.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "));
    let lines = |p: String| wrap(&p, &options).into_iter().map(Cow::into_owned).collect::<Vec<_>>();
    paragraphs.filter(|p| !p.is_empty()).flat_map(lines).collect()
}
