//! The object that `--json` prints on the last line of stdout: one type per verb, and one for errors.
//! Field names are stable.

use std::io::{self, Write};

use engraft_runtime::compare::Outcome;
use engraft_runtime::gate::verdict::Decision;
use engraft_runtime::generate::{Continuation, Ended};
use engraft_runtime::selftest::Check;
use serde::{Serialize, Serializer};

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

/// `engraft eval`.
#[derive(Debug, Serialize)]
pub(crate) struct Eval {
    /// Mean negative log likelihood of a scored token, in nats.
    pub(crate) nll: f64,
    /// `exp(nll)`.
    pub(crate) ppl: f64,
    /// Scored tokens.
    pub(crate) tokens: u64,
}

/// `engraft generate`.
#[derive(Debug, Serialize)]
pub(crate) struct Generate {
    pub(crate) text: String,
    pub(crate) prompt_tokens: u64,
    pub(crate) tokens: u64,
    pub(crate) tokens_per_s: f64,
    /// `end` when the model stopped, `length` at `--n-predict`, `context` when the context was full.
    pub(crate) stopped: &'static str,
}

impl Generate {
    /// The result of continuing a prompt of so many tokens.
    pub(crate) fn of(told: &Continuation, prompt_tokens: usize) -> Generate {
        Generate {
            text: told.text.clone(),
            prompt_tokens: prompt_tokens as u64,
            tokens: told.ids.len() as u64,
            tokens_per_s: told.tokens_per_s(),
            stopped: match told.ended {
                Ended::Model | Ended::Stopped => "end",
                Ended::Limit => "length",
                Ended::Context => "context",
            },
        }
    }
}

/// `engraft import`.
#[derive(Debug, Serialize)]
pub(crate) struct Import {
    /// `peft`, `mlx` or `gguf`.
    pub(crate) format: &'static str,
    /// Adapted projections, over all blocks.
    pub(crate) modules: usize,
    pub(crate) rank: usize,
    pub(crate) alpha: f32,
    /// Digest of the base that it was bound to.
    pub(crate) base: String,
    /// Parts of the adapter that were ignored.
    pub(crate) warnings: Vec<String>,
    /// Path of the adapter's file.
    pub(crate) adapter: String,
}

/// `engraft export`.
#[derive(Debug, Serialize)]
pub(crate) struct Export {
    /// `peft` or `gguf`.
    pub(crate) format: &'static str,
    /// Adapted projections, over all blocks.
    pub(crate) modules: usize,
    /// The file or folder.
    pub(crate) output: String,
    /// The plain LoRA written instead of a DoRA; `null` without `--dora-svd-rank`.
    pub(crate) approximation: Option<ExportApproximation>,
}

/// A plain LoRA that replaces a DoRA. Errors are shares of the change, in Frobenius norms.
#[derive(Debug, Serialize)]
pub(crate) struct ExportApproximation {
    pub(crate) rank: u32,
    /// Of all projections together.
    pub(crate) relative_error: f64,
    pub(crate) projections: Vec<ProjectionError>,
    /// `null` without a held-out text.
    pub(crate) measured: Option<ExportMeasure>,
}

/// The error of one projection.
#[derive(Debug, Serialize)]
pub(crate) struct ProjectionError {
    pub(crate) layer: usize,
    /// As Hugging Face names it.
    pub(crate) projection: &'static str,
    pub(crate) relative_error: f64,
}

/// What the plain LoRA costs on held-out text: means over scored tokens, in nats.
#[derive(Debug, Serialize)]
pub(crate) struct ExportMeasure {
    pub(crate) tokens: usize,
    pub(crate) nll_base: f64,
    /// With the DoRA.
    pub(crate) nll_adapter: f64,
    pub(crate) nll_exported: f64,
    /// KL(base with the DoRA ‖ base with the written LoRA).
    pub(crate) mean_kl: f64,
    /// KL(base with the DoRA ‖ base).
    pub(crate) mean_kl_base: f64,
}

/// `engraft merge`. Measures are means over scored tokens, in nats.
#[derive(Debug, Serialize)]
pub(crate) struct Merge {
    /// The merged model's file.
    pub(crate) output: String,
    pub(crate) bytes: u64,
    /// Changed tensors.
    pub(crate) merged_tensors: usize,
    /// `null` with `--unmeasured`.
    pub(crate) measured: Option<MergeMeasure>,
    /// Whether most of the gain was lost and only `--force` kept the file.
    pub(crate) forced: bool,
}

/// What merging cost.
#[derive(Debug, Serialize)]
pub(crate) struct MergeMeasure {
    pub(crate) tokens: usize,
    pub(crate) nll_base: f64,
    /// The base with the adapter.
    pub(crate) nll_adapter: f64,
    pub(crate) nll_merged: f64,
    /// `nll_merged - nll_adapter`.
    pub(crate) delta_nll: f64,
    /// KL(base with adapter ‖ merged).
    pub(crate) mean_kl: f64,
    /// KL(base with adapter ‖ base), for comparison.
    pub(crate) mean_kl_base: f64,
}

/// `engraft adapter ls`.
#[derive(Debug, Serialize)]
pub(crate) struct AdapterList {
    /// The generation in use; `null` if there is none.
    pub(crate) active: Option<u64>,
    pub(crate) generations: Vec<AdapterListed>,
    /// Generations that should have been used instead, and why they weren't.
    pub(crate) passed_over: Vec<String>,
    /// Names in the folder that don't belong to the store.
    pub(crate) unknown: Vec<String>,
}

/// One generation of a store. If its manifest is missing or damaged, `problem` says so, and all but the
/// number is `null`.
#[derive(Debug, Default, Serialize)]
pub(crate) struct AdapterListed {
    pub(crate) generation: u64,
    pub(crate) active: bool,
    /// `adapter`, `few_shot` or `base`.
    pub(crate) content: Option<&'static str>,
    /// The word in verdict.json under `verdict`.
    pub(crate) verdict: Option<String>,
    pub(crate) bytes: Option<u64>,
    /// Digest of the base it was made for.
    pub(crate) base: Option<String>,
    /// The generation that a rollback from it leads to.
    pub(crate) previous: Option<u64>,
    pub(crate) problem: Option<String>,
    /// Whether it is only what an interrupted command left behind: harmless, removed by the next writer.
    pub(crate) unfinished: bool,
}

/// `engraft adapter show`.
#[derive(Debug, Serialize)]
pub(crate) struct AdapterShow {
    #[serde(flatten)]
    pub(crate) listed: AdapterListed,
    pub(crate) files: Vec<AdapterFile>,
    /// `null` unless it is an adapter.
    pub(crate) adapter: Option<AdapterSettings>,
    /// The examples; `null` unless it is few-shot examples.
    pub(crate) few_shot: Option<Vec<AdapterTurn>>,
    /// verdict.json as stored; `null` if it isn't JSON.
    pub(crate) verdict_json: serde_json::Value,
}

/// A file of a generation.
#[derive(Debug, Serialize)]
pub(crate) struct AdapterFile {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
}

/// How an adapter was made.
#[derive(Debug, Serialize)]
pub(crate) struct AdapterSettings {
    pub(crate) dora: bool,
    pub(crate) rank: usize,
    pub(crate) alpha: f32,
    pub(crate) parameters: usize,
    pub(crate) steps: u64,
    pub(crate) tokens: u64,
    pub(crate) seed: u64,
    pub(crate) valid_loss_before: Option<f32>,
    pub(crate) valid_loss_after: Option<f32>,
}

/// A message of a few-shot prefix.
#[derive(Debug, Serialize)]
pub(crate) struct AdapterTurn {
    pub(crate) role: String,
    pub(crate) content: String,
}

/// `engraft adapter verify`.
#[derive(Debug, Serialize)]
pub(crate) struct AdapterVerify {
    pub(crate) active: Option<u64>,
    /// Generations that are whole and, with `-m`, belong to the model.
    pub(crate) good: Vec<u64>,
    /// Left by interrupted promotions or prunings: harmless, removed by the next writer.
    pub(crate) unfinished: Vec<u64>,
    pub(crate) problems: Vec<String>,
}

/// `engraft adapter rollback`.
#[derive(Debug, Serialize)]
pub(crate) struct AdapterRollback {
    pub(crate) active: u64,
    /// The generation that was active before; `null` if there was none.
    pub(crate) was: Option<u64>,
}

/// `engraft adapter prune`.
#[derive(Debug, Serialize)]
pub(crate) struct AdapterPrune {
    pub(crate) removed: Vec<u64>,
    /// Generations whose folder stays because it holds other files.
    pub(crate) left: Vec<u64>,
}

/// `engraft demo`. Fractions of exactly right answers, 0 to 1.
#[derive(Debug, Serialize)]
pub(crate) struct Demo {
    pub(crate) before_exact: f64,
    pub(crate) after_exact: f64,
    pub(crate) retention_before: f64,
    pub(crate) retention_after: f64,
    /// `PROMOTE`, `KEEP_PROMPTING` or `KEEP_BASE`, with its arm.
    #[serde(flatten)]
    pub(crate) decision: Decision,
    /// The decision in one sentence.
    pub(crate) sentence: String,
    /// Of the base with examples in its prompt.
    pub(crate) few_shot_exact: f64,
    /// Of the adapter, on the everyday commands.
    pub(crate) forgetting: DemoForgetting,
    /// The result of full fine-tuning.
    pub(crate) full: DemoFull,
    pub(crate) seconds: f64,
}

/// What an arm of the demo forgot of the everyday commands, nats per token; `null` if that isn't finite.
#[derive(Debug, Serialize)]
pub(crate) struct DemoForgetting {
    pub(crate) delta_nll: Option<f64>,
    /// KL(tuned‖base).
    pub(crate) kl: Option<f64>,
}

/// Full fine-tuning in the demo, with fractions as in [`Demo`].
#[derive(Debug, Serialize)]
pub(crate) struct DemoFull {
    pub(crate) learning_rate: f64,
    pub(crate) after_exact: f64,
    pub(crate) retention_after: f64,
    #[serde(flatten)]
    pub(crate) forgetting: DemoForgetting,
    /// Whether it passed the gate.
    pub(crate) eligible: bool,
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

/// `engraft data check`.
#[derive(Debug, Serialize)]
pub(crate) struct DataCheck {
    /// train, valid and, if there is one, test.
    pub(crate) parts: Vec<DataPart>,
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

/// `engraft selftest`.
#[derive(Debug, Serialize)]
pub(crate) struct Selftest {
    /// Whether all checks are within their bounds.
    pub(crate) passed: bool,
    pub(crate) checks: Vec<SelftestCheck>,
}

/// One comparison of `engraft selftest`.
#[derive(Debug, Serialize)]
pub(crate) struct SelftestCheck {
    pub(crate) isa: &'static str,
    pub(crate) what: String,
    /// How far it was off; `null` if that isn't finite.
    pub(crate) found: f64,
    pub(crate) bound: f64,
    pub(crate) passed: bool,
}

impl From<&Check> for SelftestCheck {
    fn from(check: &Check) -> SelftestCheck {
        let Check { isa, what, found, bound } = check.clone();
        SelftestCheck { isa, what, found, bound, passed: check.passed() }
    }
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

/// Writes a part of a result to stdout at once.
///
/// # Errors
/// As [`line`].
pub(crate) fn show(part: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    let shown = stdout.write_all(part.as_bytes()).and_then(|()| stdout.flush());
    shown.map_err(|e| io::Error::new(e.kind(), format!("writing to stdout: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

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
