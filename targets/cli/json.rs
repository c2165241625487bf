//! The object that `--json` prints on the last line of stdout. A verb composes its own with [`object`], unless its
//! fields are also shown to people or printed by other verbs; those types are here. Field names are stable.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};

use engraft_runtime::compare::Outcome;
use engraft_runtime::gate::store::ContentKind;
use engraft_runtime::gate::verdict::Decision;
use serde::{Serialize, Serializer};

/// An object with these fields in their order, of a type that has no name.
macro_rules! object {
    ($($(#[$about:meta])* $field:ident: $value:expr),+ $(,)?) => {{
        #[allow(non_camel_case_types, reason = "each field's type is named like the field")]
        let object = {
            #[derive(serde::Serialize)]
            struct Object<$($field),+> {
                $($(#[$about])* $field: $field),+
            }
            Object { $($field: $value),+ }
        };
        object
    }};
}
pub(crate) use object;

/// `engraft plan`. Sizes in bytes.
#[derive(Debug, Serialize)]
pub(crate) struct Plan {
    /// Private memory of the whole process.
    pub(crate) planned_private_bytes: u64,
    /// The model file's pages. They are clean and evictable, so they are counted separately.
    pub(crate) mapped_bytes: u64,
    /// The pools that make up the private memory, in this order.
    #[serde(serialize_with = "as_map")]
    pub(crate) pools: Vec<(String, u64)>,
    /// Whether the plan is within `--memory-budget` (true without one).
    pub(crate) fits: bool,
    /// What blocks may keep for their backward pass, from the least memory to the most.
    pub(crate) ladder: Vec<Rung>,
    /// Bytes that each checkpoint writes.
    pub(crate) checkpoint_bytes: u64,
    /// Megabytes that checkpoints write in an hour; `null` if the rate is unknown or they are written only on a stop.
    pub(crate) checkpoint_mb_per_hour: Option<f64>,
}

/// One pattern of what blocks keep.
#[derive(Debug, Serialize)]
pub(crate) struct Rung {
    /// `inputs`, `attention`, `all`, or which blocks keep what.
    pub(crate) keep: String,
    /// `f32` or `bf16`.
    pub(crate) precision: String,
    pub(crate) planned_private_bytes: u64,
    /// `null` without calibration.
    pub(crate) predicted_tokens_per_s: Option<f64>,
    /// Whether this run uses it.
    pub(crate) chosen: bool,
}

/// `engraft compare`.
#[derive(Debug, Serialize)]
pub(crate) struct Compare {
    /// `PROMOTE`, `KEEP_PROMPTING` or `KEEP_BASE`, with its arm.
    #[serde(flatten)]
    pub(crate) decision: Decision,
    /// The decision in one sentence.
    pub(crate) sentence: String,
    /// Held-out loss per arm, nats per token; `null` for a broken arm.
    pub(crate) losses: Vec<(String, Option<f64>)>,
    /// Share of right answers per arm, if answers were judged.
    pub(crate) accuracies: Vec<(String, Option<f64>)>,
    /// The folder with verdict.json and the reports.
    pub(crate) folder: String,
    pub(crate) seconds: f64,
}

impl Compare {
    /// The short form of an outcome.
    pub(crate) fn of(outcome: &Outcome, folder: &str) -> Compare {
        let verdict = &outcome.verdict;
        Compare {
            decision: verdict.decision.clone(),
            sentence: verdict.sentence.clone(),
            losses: verdict.arms.iter().map(|a| (a.name.clone(), a.nll)).collect(),
            accuracies: verdict.arms.iter().map(|a| (a.name.clone(), a.accuracy)).collect(),
            folder: folder.to_string(),
            seconds: outcome.report.seconds,
        }
    }
}

/// `engraft adapt`.
#[derive(Debug, Serialize)]
pub(crate) struct Adapt {
    /// The generation that is active now; `null` if nothing was promoted.
    pub(crate) generation: Option<u64>,
    #[serde(flatten)]
    pub(crate) compared: Compare,
}

/// `engraft train`. Losses are means over trained tokens, in nats.
#[derive(Debug, Serialize)]
pub(crate) struct Train {
    pub(crate) steps: u64,
    /// Tokens that went through the model while training, padding excluded.
    pub(crate) tokens: u64,
    pub(crate) tokens_per_s: f64,
    pub(crate) planned_private_bytes: u64,
    /// `null` where the system doesn't report it.
    pub(crate) peak_private_bytes: Option<u64>,
    pub(crate) train_loss: f64,
    /// Divergence from the base, per trained token; `null` without `--kl-weight`.
    pub(crate) train_kl: Option<f64>,
    /// `null` without validation data; the same goes for the next field.
    pub(crate) valid_loss_before: Option<f64>,
    pub(crate) valid_loss_after: Option<f64>,
    /// Path of the adapter's file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) adapter: Option<String>,
    /// With full fine-tuning, path of the model's file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) model: Option<String>,
    /// Held-out loss of that file. `valid_loss_after` is that of the f32 weights; the difference is the
    /// cost of storing them. `null` without validation data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) valid_loss_stored: Option<Option<f64>>,
}

/// One generation of a store. If its manifest is missing or damaged, `problem` says so, and all but the
/// number is `null`.
#[derive(Debug, Default, Serialize)]
pub(crate) struct AdapterListed {
    pub(crate) generation: u64,
    pub(crate) active: bool,
    /// `adapter`, `few_shot` or `base`.
    pub(crate) content: Option<ContentKind>,
    /// The word in verdict.json under `verdict`.
    pub(crate) verdict: Option<String>,
    pub(crate) bytes: Option<u64>,
    /// Digest of the base it was made for.
    pub(crate) base: Option<String>,
    /// The generation that a rollback from it leads to.
    pub(crate) previous: Option<u64>,
    /// Whether it was only tried, and is never active.
    pub(crate) tried: bool,
    pub(crate) problem: Option<String>,
    /// Whether it is only what an interrupted command left behind: harmless, removed by the next writer.
    pub(crate) unfinished: bool,
}

/// `engraft bench`. Rates are medians.
#[derive(Debug, Serialize)]
pub(crate) struct Bench {
    pub(crate) isa: &'static str,
    pub(crate) threads: usize,
    /// Tokens of the training sequence.
    pub(crate) train_tokens: usize,
    pub(crate) train_tokens_per_s: f64,
    pub(crate) planned_private_bytes: u64,
    pub(crate) prefill_tokens: usize,
    pub(crate) prefill_tokens_per_s: f64,
    pub(crate) decode_tokens: usize,
    pub(crate) decode_tokens_per_s: f64,
    /// Share of the training step per kind of work, 0 to 1.
    #[serde(serialize_with = "as_map")]
    pub(crate) shares: Vec<(String, f64)>,
}

/// One part of the rows. Lengths are in tokens that the model computes.
#[derive(Debug, Serialize)]
pub(crate) struct DataPart {
    pub(crate) part: &'static str,
    pub(crate) file: String,
    pub(crate) format: &'static str,
    pub(crate) rows: usize,
    pub(crate) tokens: usize,
    /// Tokens that count in the loss.
    pub(crate) targets: usize,
    pub(crate) shortest: usize,
    pub(crate) median: usize,
    pub(crate) longest: usize,
    /// Rows cut at the limit.
    pub(crate) cut: usize,
    /// Rows that can't be used.
    pub(crate) skipped: usize,
    /// Rows that are also training rows.
    pub(crate) duplicates: usize,
}

/// What any verb prints when it fails.
#[derive(Debug, Serialize)]
pub(crate) struct Failure<'a> {
    pub(crate) error: ErrorBody<'a>,
}

/// The class, the message for people, and the exit code of a failure.
#[derive(Debug, Serialize)]
pub(crate) struct ErrorBody<'a> {
    pub(crate) kind: &'static str,
    pub(crate) message: &'a str,
    pub(crate) exit_code: u8,
}

/// Writes pairs as a map in their order, which a sorted map would lose.
fn as_map<V: Serialize, S: Serializer>(pools: &[(String, V)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(pools.iter().map(|(name, bytes)| (name, bytes)))
}

/// Writes the object as one line of stdout.
///
/// # Errors
/// Those of writing, including a closed pipe.
pub(crate) fn emit(object: &impl Serialize) -> io::Result<()> {
    line(&serde_json::to_string(object)?)
}

/// Writes a line to stdout. Unlike `println!`, it doesn't panic if the reader is gone.
///
/// # Errors
/// Those of writing, including a closed pipe.
pub(crate) fn line(text: &str) -> io::Result<()> {
    show(&format!("{text}\n"))
}

/// Writes a part of a result to stdout at once. On a terminal, which control characters of a model's text could steer,
/// they are shown as what they are.
///
/// # Errors
/// As [`line`].
pub(crate) fn show(part: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    let part = if stdout.is_terminal() { visible(part) } else { Cow::Borrowed(part) };
    let shown = stdout.write_all(part.as_bytes()).and_then(|()| stdout.flush());
    shown.map_err(|e| io::Error::new(e.kind(), format!("writing to stdout: {e}")))
}

/// The text with every control character but line ends and tabs spelled out, as `\u{1b}`.
fn visible(text: &str) -> Cow<'_, str> {
    let steers = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if !text.contains(steers) {
        return Cow::Borrowed(text);
    }
    let spelled = |c: char| if steers(c) { c.escape_unicode().to_string() } else { c.to_string() };
    Cow::Owned(text.chars().map(spelled).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_spelled_out() {
        assert_eq!(visible("a\tb\n€"), "a\tb\n€");
        assert_eq!(visible("\u{1b}[2J\u{7}x\r\u{9b}"), "\\u{1b}[2J\\u{7}x\\u{d}\\u{9b}");
    }

    #[test]
    fn fields_are_those_documented() {
        let pools = vec![("theta".to_string(), 4), ("arena".to_string(), 8)];
        let plan = Plan {
            planned_private_bytes: 12,
            mapped_bytes: 100,
            pools,
            fits: true,
            ladder: vec![],
            checkpoint_bytes: 6,
            checkpoint_mb_per_hour: None,
        };
        assert_eq!(
            serde_json::to_string(&plan).unwrap(),
            r#"{"planned_private_bytes":12,"mapped_bytes":100,"pools":{"theta":4,"arena":8},"fits":true,"ladder":[],"#
                .to_string()
                + r#""checkpoint_bytes":6,"checkpoint_mb_per_hour":null}"#
        );
        let train = Train {
            steps: 1,
            tokens: 2,
            tokens_per_s: 3.0,
            planned_private_bytes: 4,
            peak_private_bytes: None,
            train_loss: 5.0,
            train_kl: None,
            valid_loss_before: None,
            valid_loss_after: Some(6.0),
            adapter: Some("a".into()),
            model: None,
            valid_loss_stored: None,
        };
        assert_eq!(
            serde_json::to_string(&train).unwrap(),
            r#"{"steps":1,"tokens":2,"tokens_per_s":3.0,"planned_private_bytes":4,"peak_private_bytes":null,"#
                .to_string()
                + r#""train_loss":5.0,"train_kl":null,"valid_loss_before":null,"valid_loss_after":6.0,"adapter":"a"}"#
        );
        let error = ErrorBody { kind: "io", message: "m", exit_code: 1 };
        assert_eq!(
            serde_json::to_string(&Failure { error }).unwrap(),
            r#"{"error":{"kind":"io","message":"m","exit_code":1}}"#
        );
    }
}
