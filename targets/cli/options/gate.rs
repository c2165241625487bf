//! The gate's thresholds, and what a trained arm must not forget.

use std::path::{Path, PathBuf};

use clap::Args;
use engraft_runtime::compare::answers::Metric;
use engraft_runtime::compare::material::Rows;
use engraft_runtime::compare::retention::RetentionSet;
use engraft_runtime::data::{self, DataOptions as Reading};
use engraft_runtime::error::Result;
use engraft_runtime::gate::verdict::{KeepGeneral, Thresholds};
use engraft_runtime::model::text::Text;

use super::{misuse, parse, stat};
use crate::verbs::common;

/// The gate's thresholds.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Gate")]
pub(crate) struct GateOptions {
    /// Two-sided significance level of intervals and tests
    #[arg(long, value_name = "P", default_value_t = Thresholds::default().alpha, value_parser = parse::positive)]
    level: f64,

    /// Minimum for the lower bound of an improvement, nats per token
    #[arg(long, value_name = "NATS", default_value_t = 0.0, value_parser = parse::not_negative)]
    improvement_min: f64,

    /// How much of ordinary text must be kept
    #[arg(long, default_value = "strict", value_parser = parse::keep_general())]
    keep_general: KeepGeneral,

    /// Maximum increase of the loss on retention texts, nats per token [default: as --keep-general]
    #[arg(long, value_name = "NATS", value_parser = parse::not_negative)]
    retention_nll_max: Option<f64>,

    /// Maximum KL(tuned‖base) on retention texts, nats per token [default: as --keep-general]
    #[arg(long, value_name = "NATS", value_parser = parse::not_negative)]
    retention_kl_max: Option<f64>,

    /// Maximum KL(tuned‖base) on the task, nats per token [default: no limit]
    #[arg(long, value_name = "NATS", value_parser = parse::not_negative)]
    task_kl_max: Option<f64>,

    /// Let a lower loss win even if no more answers are right
    #[arg(long)]
    loss_alone: bool,

    /// Minimum number of held-out rows for a decision
    #[arg(long, value_name = "N", default_value_t = Thresholds::default().examples_min)]
    examples_min: usize,

    /// Bootstrap resamples
    #[arg(long, value_name = "N", default_value_t = Thresholds::default().resamples)]
    resamples: usize,

    /// Seed for the bootstrap
    #[arg(long, value_name = "N", default_value = "0", value_parser = parse::seed)]
    pub(crate) seed: u64,

    /// What must not be forgotten, in addition to the built-in text: a text or a .jsonl file (may be repeated)
    #[arg(long, value_name = "FILE")]
    retention: Vec<PathBuf>,

    /// How to compare answers to --retention rows with the reference [default: as --metric]
    #[arg(long, value_parser = parse::retention_metric())]
    retention_metric: Option<Metric>,

    /// Leave out the built-in retention text and the built-in everyday answers
    #[arg(long)]
    no_built_in_retention: bool,
}

impl GateOptions {
    /// The gate's thresholds, with or without a few-shot arm required.
    pub(crate) fn thresholds(&self, few_shot_required: bool) -> Thresholds {
        let (nll_max, kl_max) = self.keep_general.ceilings();
        Thresholds {
            alpha: self.level,
            improvement_min: self.improvement_min,
            retention_nll_max: self.retention_nll_max.unwrap_or(nll_max),
            retention_kl_max: self.retention_kl_max.unwrap_or(kl_max),
            task_kl_max: self.task_kl_max,
            examples_min: self.examples_min,
            resamples: self.resamples,
            few_shot_required,
            accuracy_required: !self.loss_alone,
        }
    }

    /// Whether the built-in text must not be forgotten.
    pub(crate) fn judges_built_in(&self) -> bool {
        !self.no_built_in_retention
    }

    /// The texts and rows that must not be forgotten.
    ///
    /// # Errors
    /// Those of reading; `Misuse` for two with the same name.
    pub(crate) fn retention(
        &self,
        text: &Text,
        reading: &Reading,
        usual: Option<Metric>,
    ) -> Result<Vec<RetentionSet>> {
        let mut all: Vec<RetentionSet> = Vec::new();
        let rows_max = reading.max_seq_length;
        if !self.no_built_in_retention {
            all.extend(RetentionSet::built_in(text, rows_max)?);
        }
        for file in &self.retention {
            stat(file, "--retention")?;
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let set = if file.extension().is_some_and(|e| e == "jsonl") {
                let metric = self.retention_metric.or(usual);
                retention_rows(file, &name, text, reading, metric).map_err(|e| e.at("--retention"))?
            } else {
                let whole = common::read_text(file)?;
                RetentionSet::of_passages(&name, &whole, text, rows_max).map_err(|e| e.at(file.display()))?
            };
            if all.iter().any(|known| known.name == name) {
                return Err(misuse(format!("--retention: two texts are named {name}; rename one")));
            }
            all.push(set);
        }
        Ok(all)
    }
}

fn retention_rows(
    file: &Path,
    name: &str,
    text: &Text,
    reading: &Reading,
    metric: Option<Metric>,
) -> Result<RetentionSet> {
    let reader = match metric {
        Some(Metric::Numeric(task)) => Some(task.reader()),
        _ => None,
    };
    let reading = Reading { reader, ..reading.clone() };
    let rows = Rows::of(data::load(file, &text.tokenizer, &text.chat, &reading)?, &reading)?;
    Ok(RetentionSet::of_rows(name, &rows, metric, text))
}
