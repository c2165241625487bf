//! What the gate demands, and what must not be forgotten.

use std::path::{Path, PathBuf};

use clap::Args;
use engraft_runtime::compare::answers::Metric;
use engraft_runtime::compare::material::Rows;
use engraft_runtime::compare::retention::RetentionSet;
use engraft_runtime::data::{self, DataOptions as Reading};
use engraft_runtime::error::Result;
use engraft_runtime::gate::verdict::Thresholds;
use engraft_runtime::model::text::Text;

use super::{misuse, parse, stat};
use crate::verbs::common;

/// What the gate demands.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Gate")]
pub(crate) struct GateOptions {
    /// Two-sided level of the intervals and tests
    #[arg(long, value_name = "P", default_value_t = Thresholds::default().alpha, value_parser = parse::positive)]
    level: f64,

    /// What an improvement's lower bound must exceed, nats per token
    #[arg(long, value_name = "NATS", default_value_t = 0.0, value_parser = parse::not_negative)]
    improvement_min: f64,

    /// Ceiling of the loss that retention texts may gain, nats per token
    #[arg(long, value_name = "NATS", default_value_t = Thresholds::default().retention_nll_max, value_parser = parse::not_negative)]
    retention_nll_max: f64,

    /// Ceiling of KL(tuned‖base) on retention texts, nats per token
    #[arg(long, value_name = "NATS", default_value_t = Thresholds::default().retention_kl_max, value_parser = parse::not_negative)]
    retention_kl_max: f64,

    /// Ceiling of KL(tuned‖base) on the task, nats per token (default: none)
    #[arg(long, value_name = "NATS", value_parser = parse::not_negative)]
    task_kl_max: Option<f64>,

    /// Where answers are judged, let a lower loss alone win
    #[arg(long)]
    loss_alone: bool,

    /// Decide nothing with fewer held-out rows than this
    #[arg(long, value_name = "N", default_value_t = Thresholds::default().examples_min)]
    examples_min: usize,

    /// Bootstrap resamples
    #[arg(long, value_name = "N", default_value_t = Thresholds::default().resamples)]
    resamples: usize,

    /// Seed of the bootstrap
    #[arg(long, value_name = "N", default_value = "0", value_parser = parse::seed)]
    pub(crate) seed: u64,

    /// What must not be forgotten, beside the text that is built in: a text, or rows as .jsonl (may be repeated)
    #[arg(long, value_name = "FILE")]
    retention: Vec<PathBuf>,

    /// How answers to rows of --retention are compared with their own [default: as --metric says]
    #[arg(long, value_parser = parse::retention_metric())]
    retention_metric: Option<Metric>,

    /// Leave the built-in retention text out
    #[arg(long)]
    no_built_in_retention: bool,
}

impl GateOptions {
    /// What the gate demands of arms, examples among them or not.
    pub(crate) fn thresholds(&self, few_shot_required: bool) -> Thresholds {
        Thresholds {
            alpha: self.level,
            improvement_min: self.improvement_min,
            retention_nll_max: self.retention_nll_max,
            retention_kl_max: self.retention_kl_max,
            task_kl_max: self.task_kl_max,
            examples_min: self.examples_min,
            resamples: self.resamples,
            few_shot_required,
            accuracy_required: !self.loss_alone,
        }
    }

    /// What must not be forgotten.
    ///
    /// # Errors
    /// Those of reading; `Misuse` for two of one name.
    pub(crate) fn retention(
        &self,
        text: &Text,
        reading: &Reading,
        usual: Option<Metric>,
    ) -> Result<Vec<RetentionSet>> {
        let mut all: Vec<RetentionSet> = Vec::new();
        let rows_max = reading.max_seq_length;
        if !self.no_built_in_retention {
            all.push(RetentionSet::built_in(text, rows_max)?);
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
                return Err(misuse(format!("--retention: two texts are called {name}: rename one")));
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
