//! What a comparison was, for people: everything that the page and the text on a terminal show.
//!
//! Figures and strings only, as measured: whoever shows them rounds them. [`Report::to_html`] gives the page,
//! [`Report::to_text`] the text; both show the same tables.

pub mod next;
mod outcome;
mod show;
mod tables;
#[cfg(test)]
mod tests;
mod text;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::verdict::Verdict;
pub use next::Next;
use tables::Table;

/// The page, with slots for what is put in. It needs nothing else: no font, no image, no net.
const PAGE: &str = include_str!("page.html");

/// A comparison of arms, from the data to the verdict.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What was asked for: "compare" or "adapt".
    pub title: String,
    /// The base.
    pub model: ModelFacts,
    /// The rows.
    pub data: DataFacts,
    /// What came of it: arms, intervals, forgetting, thresholds, reasons.
    pub verdict: Verdict,
    /// How each trained arm was trained, in the order of the arms.
    pub runs: Vec<ArmRun>,
    /// What scoring each arm took, in the order of the arms.
    pub scoring: Vec<Scoring>,
    /// The learning rate range test, where there was one.
    pub rate_test: Option<RateTest>,
    /// Held-out examples with what the arms answered.
    pub samples: Vec<SampleOutputs>,
    /// Further settings, as name and value.
    pub settings: Vec<(String, String)>,
    /// Whole time.
    pub seconds: f64,
}

/// The base.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelFacts {
    /// As its file calls it; may be empty.
    pub name: String,
    /// The file's name, without its folder.
    pub file: String,
    /// SHA-256 of tensors and tokenizer, hexadecimal.
    pub digest: String,
    /// Weights.
    pub parameters: u64,
    /// The type of most of its matrices, such as `Q4_1`.
    pub dtype: String,
    /// Bytes that are mapped.
    pub mapped_bytes: u64,
}

/// The rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataFacts {
    /// The task, where one was named.
    pub task: Option<String>,
    /// Where they come from.
    pub source: String,
    /// Rows and targets to train on.
    pub train: (u64, u64),
    /// Rows and targets that choose the best step of a run.
    pub valid: (u64, u64),
    /// Rows and targets that the gate decides by.
    pub held_out: (u64, u64),
    /// Rows that were left out.
    pub skipped: u64,
}

/// One run of training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArmRun {
    /// The arm's name.
    pub arm: String,
    /// What was trained, in words: "LoRA, rank 8 on all seven projections".
    pub what: String,
    /// Trained parameters.
    pub parameters: u64,
    /// The highest learning rate of the schedule.
    pub learning_rate: f64,
    /// Losses along the way.
    pub curve: Vec<CurvePoint>,
    /// Steps done.
    pub steps: u64,
    /// The step whose parameters were kept: that of the lowest validation loss.
    pub best_step: u64,
    /// Why it ended: "all steps done", "no better for 3 evaluations", "time budget spent".
    pub ended: String,
    /// Tokens that passed the model forward and backward.
    pub tokens: u64,
    /// Time in steps, evaluations left out.
    pub seconds: f64,
    /// Private memory as planned before the start, bytes.
    pub planned_bytes: u64,
    /// Private memory as measured, bytes, where the system tells.
    pub peak_bytes: Option<u64>,
}

/// Losses at one step, nats per target.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Steps done.
    pub step: u64,
    /// Mean loss on training rows since the last point.
    pub train: Option<f64>,
    /// Loss on the validation rows.
    pub valid: Option<f64>,
}

/// What scoring an arm took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scoring {
    /// The arm's name.
    pub arm: String,
    /// Tokens of its prefix of examples, read once.
    pub prefix_tokens: u64,
    /// Tokens read for the losses, without the prefix.
    pub tokens: u64,
    /// Time for the losses, with the prefix.
    pub nll_seconds: f64,
    /// Tokens generated, where answers were.
    pub generated_tokens: u64,
    /// Time for the answers.
    pub generate_seconds: f64,
}

/// A learning rate range test: a short run whose rate grows with every step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RateTest {
    /// Rate and smoothed training loss, in the order of steps.
    pub points: Vec<(f64, f64)>,
    /// The rate that was chosen.
    pub chosen: f64,
}

/// A held-out example with what the arms answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleOutputs {
    /// The prompt, or how the text begins.
    pub prompt: String,
    /// What the data has for an answer.
    pub reference: String,
    /// By arm.
    pub outputs: Vec<Output>,
}

/// What an arm answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Output {
    /// The arm's name.
    pub arm: String,
    /// The answer.
    pub text: String,
    /// Whether it is right, where the task can tell.
    pub correct: Option<bool>,
}

impl Report {
    /// The report as one offline HTML file: readable on a phone and on paper, in light and dark. A script in it
    /// shows the report's JSON, which is in it, too. Where scripts are off, it shows the verdict's sentence.
    pub fn to_html(&self) -> String {
        let decision = self.verdict.decision.to_string();
        let slots = [
            ("{{title}}", escaped(&format!("{decision}: {}", self.heading()))),
            ("{{decision}}", escaped(&decision)),
            ("{{sentence}}", escaped(&self.verdict.sentence)),
            ("{{report}}", embedded(self)),
            ("{{words}}", embedded(&self.words())),
        ];
        let (mut html, mut rest) = (String::new(), PAGE);
        for (slot, value) in slots {
            // Only the page is searched, never what was put in: a row may well hold the name of a slot.
            let (before, after) = rest.split_once(slot).unwrap_or((rest, ""));
            html.push_str(before);
            html.push_str(&value);
            rest = after;
        }
        html + rest
    }

    /// What the page shares with the text on a terminal: sentences, and tables of strings.
    fn words(&self) -> Value {
        let verdict = &self.verdict;
        json!({
            "heading": self.heading(),
            "decision": verdict.decision.to_string(),
            "warnings": outcome::warnings(verdict),
            "next": self.next_step(),
            "caveat": outcome::caveat(verdict),
            "chosen": outcome::chosen(verdict),
            "rivals": outcome::rivals(verdict),
            "arms": cells(&tables::arms(self)),
            "forgetting": cells(&tables::forgetting(self)),
            "runs": cells(&tables::runs(self)),
            "memory": cells(&tables::memory(self)),
            "scoring": cells(&tables::scoring(self)),
            "reasons": self.reasons(),
            "facts": tables::facts(self),
            "seconds": show::seconds(self.seconds),
        })
    }
}

/// A table for the page's script, with which of its columns are set flush right.
fn cells(table: &Table) -> Value {
    let figures: Vec<bool> = (0..table.head.len()).map(|column| table.is_numeric(column)).collect();
    json!({ "caption": table.caption, "head": table.head, "rows": table.rows, "figures": figures })
}

/// JSON for a script element. No text in it can close the element or open another, since no `<` is left, and
/// nothing in it acts unseen on whoever reads the file.
fn embedded(value: &impl Serialize) -> String {
    // Only the serializer's type is fallible: all keys are texts, and writing to memory doesn't fail.
    let json = serde_json::to_string(value).unwrap_or_default();
    let mut safe = String::with_capacity(json.len());
    for c in json.chars() {
        if c == '<' || show::acts(u32::from(c)) {
            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| safe.push_str(&format!("\\u{unit:04x}")));
        } else {
            safe.push(c);
        }
    }
    safe
}

/// Text for an element of the page; what would act unseen is made visible.
fn escaped(text: &str) -> String {
    let mut safe = String::new();
    for c in show::visible(text).chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            _ => safe.push(c),
        }
    }
    safe
}
