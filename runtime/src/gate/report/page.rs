//! The report as one HTML file that needs nothing else: no script, no font, no image, no net.

use super::super::verdict::{ArmReport, Decision};
use super::html::Html;
use super::outcome::{Standing, caveat, next_step, outcome, warnings, zero_shot};
use super::tables::{self, Table};
use super::{Output, Report, SampleOutputs, chart, show};

/// Colours in light and dark, and a layout from 360 px on.
const STYLE: &str = include_str!("page.css");
/// Nothing may be loaded or run; only the style in the file counts.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";
/// Samples that are in sight at once; the others unfold.
const SAMPLES_OPEN: usize = 3;

impl Report {
    /// The report as one offline HTML file: readable on a phone and on paper, in light and dark. Foreign
    /// text is escaped, and what would act unseen in it is made visible. Sections without content are
    /// left out.
    pub fn to_html(&self) -> String {
        let mut h = Html::default();
        h.raw("<!DOCTYPE html>\n");
        h.element("html", &[("lang", "en")], |h| {
            h.element("head", &[], |h| self.head(h));
            h.element("body", &[], |h| {
                h.element("header", &[], |h| self.verdict(h));
                h.element("main", &[], |h| {
                    self.arms(h);
                    self.forgetting(h);
                    self.training(h);
                    self.costs(h);
                    self.examples(h);
                    self.why(h);
                    self.fine_print(h);
                });
            });
        });
        h.raw("\n");
        h.finish()
    }

    fn head(&self, h: &mut Html) {
        h.void("meta", &[("charset", "utf-8")]);
        h.void("meta", &[("http-equiv", "Content-Security-Policy"), ("content", POLICY)]);
        h.void("meta", &[("name", "viewport"), ("content", "width=device-width, initial-scale=1")]);
        h.void("meta", &[("name", "color-scheme"), ("content", "light dark")]);
        h.leaf("title", &[], &format!("{}: {}", self.verdict.decision, self.heading()));
        h.element("style", &[], |h| h.raw(STYLE));
    }

    /// Model and task, as far as they have names.
    pub(super) fn heading(&self) -> String {
        let model = if self.model.name.is_empty() { &self.model.file } else { &self.model.name };
        let task = self.data.task.as_deref().unwrap_or(&self.data.source);
        let parts = [self.title.as_str(), model, task].map(show::one_line);
        parts.into_iter().filter(|p| !p.is_empty()).collect::<Vec<_>>().join(" · ")
    }

    fn verdict(&self, h: &mut Html) {
        h.leaf("h1", &[], &self.heading());
        let class = match &self.verdict.decision {
            _ if self.verdict.leak_count > 0 => "badge leak",
            Decision::Promote { .. } => "badge promote",
            Decision::KeepPrompting { .. } => "badge prompting",
            Decision::KeepBase => "badge base",
        };
        h.leaf("span", &[("class", class)], &self.verdict.decision.to_string());
        h.leaf("p", &[("class", "sentence")], &self.verdict.sentence);
        let warnings = warnings(&self.verdict);
        if !warnings.is_empty() {
            list(h, "warnings", &warnings);
        }
        h.element("p", &[("class", "next")], |h| {
            h.leaf("strong", &[], "Next: ");
            h.text(&next_step(&self.verdict, &self.model.file));
        });
    }

    fn arms(&self, h: &mut Html) {
        let table = tables::arms(self);
        if table.rows.is_empty() {
            return;
        }
        h.leaf("h2", &[], "Arms");
        if let Some(caveat) = caveat(&self.verdict) {
            h.leaf("p", &[("class", "bad")], caveat);
        }
        let class = |row: usize| {
            let arm: &ArmReport = &self.verdict.arms[row];
            if outcome(&self.verdict, arm).0 == Standing::Chosen { "chosen" } else { "" }
        };
        stacked(h, &table, class);
        let levels = self.verdict.arms.iter().flat_map(|a| &a.comparisons).map(|c| 100.0 * (1.0 - c.level));
        let (low, high) = levels.fold((100.0, 0.0), |(l, h), x| (f64::min(l, x), f64::max(h, x)));
        if low > high {
            return;
        }
        let of = if high - low < 0.05 { format!("{low:.1} %") } else { format!("{low:.1} to {high:.1} %") };
        let note = format!(
            "Gains are the rival's loss less the arm's on the same {} held-out examples. Paired \
             bootstrap intervals of {of}: each at the level of its \
             arm's step in Holm's correction.",
            show::count(self.verdict.held_out.examples as u64)
        );
        h.leaf("p", &[("class", "note")], &note);
        h.element("div", &[("class", "charts")], |h| {
            for rival in chart::rivals(&self.verdict) {
                chart::gains(h, &self.verdict, rival);
            }
        });
    }

    fn forgetting(&self, h: &mut Html) {
        let table = tables::forgetting(self);
        if table.rows.is_empty() {
            return;
        }
        h.leaf("h2", &[], "Forgetting");
        h.element("div", &[("class", "charts")], |h| chart::forgetting(h, &self.verdict));
        h.element("details", &[], |h| {
            h.leaf("summary", &[], "The same as a table");
            scrolled(h, &table);
        });
    }

    fn training(&self, h: &mut Html) {
        let table = tables::runs(self);
        let test = self.rate_test.as_ref().filter(|t| !t.points.is_empty());
        if table.rows.is_empty() && test.is_none() {
            return;
        }
        h.leaf("h2", &[], "Training");
        h.element("div", &[("class", "charts")], |h| {
            chart::curves(h, &self.runs);
            if let Some(test) = test {
                chart::rates(h, test);
            }
        });
        if !table.rows.is_empty() {
            scrolled(h, &table);
        }
    }

    fn costs(&self, h: &mut Html) {
        let tables = [tables::memory(self), tables::scoring(self)];
        if tables.iter().all(|t| t.rows.is_empty()) {
            return;
        }
        h.leaf("h2", &[], "Memory and speed");
        for table in tables.iter().filter(|t| !t.rows.is_empty()) {
            scrolled(h, table);
        }
        if self.seconds.is_finite() && self.seconds > 0.0 {
            let whole = show::seconds(self.seconds);
            let note = format!("Whole time: {whole}. Memory is private memory; the model's file is mapped.");
            h.leaf("p", &[("class", "note")], &note);
        }
    }

    fn examples(&self, h: &mut Html) {
        if self.samples.is_empty() {
            return;
        }
        h.leaf("h2", &[], "Samples");
        let (open, folded) = self.samples.split_at(self.samples.len().min(SAMPLES_OPEN));
        for (i, sample) in open.iter().enumerate() {
            self.example(h, i + 1, sample);
        }
        if !folded.is_empty() {
            h.element("details", &[], |h| {
                h.leaf("summary", &[], &format!("{} more", folded.len()));
                for (i, sample) in folded.iter().enumerate() {
                    self.example(h, SAMPLES_OPEN + i + 1, sample);
                }
            });
        }
    }

    fn example(&self, h: &mut Html, number: usize, sample: &SampleOutputs) {
        h.element("article", &[("class", "sample")], |h| {
            h.leaf("h3", &[], &format!("Sample {number}"));
            h.element("dl", &[], |h| {
                said(h, "Prompt", None, &sample.prompt);
                said(h, "Reference", None, &sample.reference);
                for output in self.in_order(sample) {
                    said(h, &output.arm, output.correct, &output.text);
                }
            });
        });
    }

    /// Answers, those of the base alone first.
    pub(super) fn in_order<'a>(&self, sample: &'a SampleOutputs) -> Vec<&'a Output> {
        let before = zero_shot(&self.verdict);
        let mut outputs: Vec<&Output> = sample.outputs.iter().collect();
        outputs.sort_by_key(|o| Some(o.arm.as_str()) != before);
        outputs
    }

    fn why(&self, h: &mut Html) {
        let groups = self.reasons();
        if groups.is_empty() {
            return;
        }
        h.leaf("h2", &[], "Reasons");
        for (name, reasons) in groups {
            h.element("h3", &[], |h| h.foreign(&name));
            list(h, "", &reasons);
        }
    }

    /// All reasons, by arm, then what was undecided and what leaked.
    pub(super) fn reasons(&self) -> Vec<(String, Vec<String>)> {
        let v = &self.verdict;
        let of_arm = |r: &String| v.arms.iter().any(|a| a.reasons.contains(r));
        let general: Vec<String> =
            v.reasons.iter().filter(|r| **r != v.sentence && !of_arm(r)).cloned().collect();
        let mut groups = vec![("In general".to_string(), general)];
        groups.extend(v.arms.iter().map(|a| (show::one_line(&a.name), a.reasons.clone())));
        groups.push(("Undecided".to_string(), v.undecided.clone()));
        let how = |exact: bool| if exact { "equals" } else { "nearly equals" };
        let mut leaks: Vec<String> =
            v.leaks.iter().map(|l| format!("{} {} {}", l.held_out, how(l.exact), l.train)).collect();
        if v.leak_count > v.leaks.len() {
            leaks.push(format!("and {} more", show::count((v.leak_count - v.leaks.len()) as u64)));
        }
        groups.push(("Held-out rows in the training data".to_string(), leaks));
        groups.retain(|(_, reasons)| !reasons.is_empty());
        groups
    }

    fn fine_print(&self, h: &mut Html) {
        let groups = tables::facts(self);
        h.leaf("h2", &[], "Fine print");
        h.element("details", &[], |h| {
            h.leaf("summary", &[], "Model, data, thresholds, settings, digests");
            for (name, facts) in groups {
                h.leaf("h3", &[], name);
                h.element("dl", &[("class", "facts")], |h| {
                    for (name, value) in facts {
                        h.leaf("dt", &[], &name);
                        h.element("dd", &[], |h| h.foreign(&value));
                    }
                });
            }
        });
    }
}

fn list(h: &mut Html, class: &'static str, items: &[String]) {
    h.element("ul", &[("class", class)], |h| {
        for item in items {
            h.element("li", &[], |h| h.foreign(item));
        }
    });
}

/// A question, a reference or an answer, with its mark in sign and word.
fn said(h: &mut Html, who: &str, correct: Option<bool>, text: &str) {
    if text.is_empty() && correct.is_none() && who == "Reference" {
        return;
    }
    h.element("dt", &[], |h| {
        h.foreign(who);
        match correct {
            Some(true) => h.leaf("span", &[("class", "good")], " ✓ right"),
            Some(false) => h.leaf("span", &[("class", "bad")], " ✗ wrong"),
            None => {}
        }
    });
    let shown = if text.trim().is_empty() { "(nothing)" } else { text };
    // A long text scrolls in its box, which the keyboard must reach.
    let focus: &[(&'static str, &str)] = if text.len() > 800 {
        &[("class", "said"), ("dir", "auto"), ("tabindex", "0")]
    } else {
        &[("class", "said"), ("dir", "auto")]
    };
    h.leaf("dd", focus, shown);
}

/// A table that becomes a block a row where it is narrow. The roles keep it a table for those who hear it.
fn stacked(h: &mut Html, table: &Table, class: impl Fn(usize) -> &'static str) {
    h.element("div", &[("class", "scroll")], |h| {
        h.element("table", &[("class", "stack"), ("role", "table")], |h| cells(h, table, class));
    });
}

/// A table that scrolls in its own box where it is narrow.
fn scrolled(h: &mut Html, table: &Table) {
    let label = ("aria-label", table.caption);
    h.element("div", &[("class", "scroll"), ("role", "region"), label, ("tabindex", "0")], |h| {
        h.element("table", &[("role", "table")], |h| cells(h, table, |_| ""));
    });
}

fn cells(h: &mut Html, table: &Table, class: impl Fn(usize) -> &'static str) {
    let kind = |column: usize| if table.is_numeric(column) { "figure" } else { "" };
    h.leaf("caption", &[], table.caption);
    h.element("thead", &[("role", "rowgroup")], |h| {
        h.element("tr", &[("role", "row")], |h| {
            for (i, name) in table.head.iter().enumerate() {
                h.leaf("th", &[("scope", "col"), ("role", "columnheader"), ("class", kind(i))], name);
            }
        });
    });
    h.element("tbody", &[("role", "rowgroup")], |h| {
        for (r, row) in table.rows.iter().enumerate() {
            h.element("tr", &[("role", "row"), ("class", class(r))], |h| {
                for (i, cell) in row.iter().enumerate() {
                    match i {
                        0 => h.element("th", &[("scope", "row"), ("role", "rowheader")], |h| h.foreign(cell)),
                        _ => {
                            let name = ("data-name", table.head[i]);
                            let class = if cell == show::DASH { "figure none" } else { kind(i) };
                            h.element("td", &[("role", "cell"), name, ("class", class)], |h| h.foreign(cell));
                        }
                    }
                }
            });
        }
    });
}
