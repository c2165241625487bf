//! The options of a training run. They also determine its memory, so `plan` and `train` take the same flags.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum, value_parser};
use engraft_kernels::DType;
use engraft_runtime::adapter::ADAPTER_FILE;
use engraft_runtime::error::Result;
use engraft_runtime::model::ModelConfig;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::keep::KeepPrecision;
use engraft_runtime::run::{Earlier, KeepChoice, Length, Looks, Method, Settings, settings};

use super::shape::{refuse_beside_protection, refuse_for_full};
use super::{
    ComputeOptions, DataOptions, ForgettingOptions, ModelOptions, OptimizerOptions, ShapeOptions, misuse,
    parse,
};
use crate::units;

/// All options of a training run.
#[derive(Args, Clone, Debug)]
pub(crate) struct TuneOptions {
    #[command(flatten)]
    pub(crate) model: ModelOptions,

    /// Settings as a TOML file: keys are the long flags, and flags given here win
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) config: Option<PathBuf>,

    /// Output folder for adapter.engraft (or model.gguf with --fine-tune-type full), metrics.jsonl and checkpoints
    #[arg(long, value_name = "DIR", default_value = "adapter")]
    pub(crate) adapter_path: PathBuf,

    /// Seed for the split, the row order, the initial adapter and dropout (-1: a new one each time)
    #[arg(long, value_name = "N", default_value = "0", value_parser = parse::seed)]
    pub(crate) seed: u64,

    #[command(flatten)]
    pub(crate) memory: MemoryOptions,

    #[command(flatten)]
    pub(crate) data: DataOptions,

    #[command(flatten)]
    what: WhatOptions,

    #[command(flatten)]
    pub(crate) forgetting: ForgettingOptions,

    #[command(flatten)]
    pub(crate) run: RunOptions,

    #[command(flatten)]
    pub(crate) compute: ComputeOptions,
}

/// How much memory to use.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Memory")]
pub(crate) struct MemoryOptions {
    /// Refuse to start if the plan needs more private memory than this (60M, 1.5G, or bytes)
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes)]
    pub(crate) memory_budget: Option<u64>,

    /// What each block keeps from its forward pass, to save recomputing it in the backward pass
    #[arg(long, default_value = "auto", value_parser = parse::keep())]
    pub(crate) keep: KeepChoice,

    /// Precision of the kept values
    #[arg(long, default_value = "f32", value_parser = parse::keep_precision())]
    pub(crate) keep_precision: KeepPrecision,
}

/// What is trained: an adapter, or the model.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Adapter")]
struct WhatOptions {
    /// What to train
    #[arg(long, value_enum, default_value_t = FineTune::Lora)]
    fine_tune_type: FineTune,

    /// For full: type of the written model's matrices (F32, F16, Q8_0, Q4_K, ...) [default: as in the base]
    #[arg(long = "type", value_name = "TYPE", value_parser = parse::dtype)]
    dtype: Option<DType>,

    /// Rank r
    #[arg(long, visible_alias = "lora-rank", value_name = "R", default_value_t = settings::RANK as u32, value_parser = value_parser!(u32).range(1..=256))]
    rank: u32,

    /// Alpha: the adapter's effect is scaled by alpha/r (by alpha/sqrt(r) with --use-rslora)
    #[arg(long, visible_alias = "lora-alpha", value_name = "ALPHA", default_value_t = settings::ALPHA, value_parser = parse::positive_f32)]
    alpha: f32,

    #[command(flatten)]
    shape: ShapeOptions,
}

/// What a training run changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FineTune {
    /// A low-rank adapter next to the frozen model
    Lora,
    /// The same, plus a magnitude for each output row of the adapted matrices
    Dora,
    /// Every weight of the model, in f32; the result is a new model
    Full,
}

/// Length, learning rate and reports of a run.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Training")]
pub(crate) struct RunOptions {
    /// Optimizer steps [default: 300, unless --epochs is given]
    #[arg(long, value_name = "N", conflicts_with = "epochs", value_parser = value_parser!(u32).range(1..=100_000_000))]
    iters: Option<u32>,

    /// Passes over the training rows
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1_000_000))]
    epochs: Option<u32>,

    /// Maximum tokens per sequence
    #[arg(short = 'c', long, visible_alias = "ctx-size", value_name = "N", default_value_t = settings::ROW_TOKENS as u32, value_parser = value_parser!(u32).range(2..=1 << 20))]
    pub(crate) max_seq_length: u32,

    /// Peak learning rate (also -lr) [default: 2e-4, or 2e-5 with --fine-tune-type full]
    #[arg(long, visible_alias = "lr", value_name = "RATE", value_parser = parse::positive)]
    learning_rate: Option<f64>,

    #[command(flatten)]
    pub(crate) optimizer: OptimizerOptions,

    /// Steps between reports
    #[arg(long, value_name = "N", default_value_t = settings::REPORT_EVERY as u32, value_parser = value_parser!(u32).range(1..))]
    pub(crate) steps_per_report: u32,

    /// Steps between measurements of the held-out loss (0: only at the start and the end)
    #[arg(long, value_name = "N", default_value_t = 0)]
    steps_per_eval: u32,

    /// Steps between saves of the adapter (0: only at the end, as --fine-tune-type full always does)
    #[arg(long, value_name = "N", default_value_t = settings::SAVE_EVERY as u32)]
    save_every: u32,

    /// Steps between checkpoints, which --resume continues from and a diverging run returns to (0: only when stopped)
    #[arg(long, value_name = "N", default_value_t = settings::CHECKPOINT_EVERY as u32)]
    checkpoint_every: u32,
}

/// Whether two paths lead to the same place that exists.
fn is_same(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

impl TuneOptions {
    /// Whether every weight is trained.
    pub(crate) fn is_full(&self) -> bool {
        self.what.fine_tune_type == FineTune::Full
    }

    /// The adapter that the run goes on with, if any.
    ///
    /// # Errors
    /// Those of [`ShapeOptions::earlier`]; `Misuse` where that would be overwritten.
    pub(crate) fn earlier(&self, model: &ModelFile) -> Result<Option<Earlier>> {
        let own = self.adapter_path.join(ADAPTER_FILE);
        if self
            .what
            .shape
            .from
            .as_ref()
            .is_some_and(|from| is_same(from, &own) || is_same(from, &self.adapter_path))
        {
            let message =
                "--from: that adapter would be overwritten; name another folder with --adapter-path";
            return Err(misuse(message));
        }
        self.what.shape.earlier(self.what.rank != settings::RANK as u32, model)
    }

    /// The settings of the run on a model, going on with an earlier adapter, if any.
    ///
    /// # Errors
    /// `Misuse` for flags that have no effect with the others, or don't fit the model.
    pub(crate) fn settings(&self, model: &ModelConfig, earlier: Option<Earlier>) -> Result<Settings> {
        self.check_effects()?;
        let protects = self.forgetting.protects_from(earlier.as_ref(), false)? && !self.is_full();
        let (what, run) = (&self.what, &self.run);
        let method = match what.fine_tune_type {
            FineTune::Full => Method::Full(what.dtype),
            kind => {
                let dora = kind == FineTune::Dora;
                Method::Adapter(what.shape.lora(model, what.rank as usize, what.alpha, dora)?)
            }
        };
        let plain = Settings { begin: what.shape.begin(), ..Settings::new(method) };
        let settings = if protects { self.forgetting.protect(plain) } else { plain };
        let settings = match earlier {
            Some(earlier) => settings.going_on(earlier),
            None => settings,
        };
        let settings = run.optimizer.apply(settings);
        Ok(Settings {
            stored: what.shape.adapter_precision,
            length: match (run.iters, run.epochs) {
                (_, Some(epochs)) => Length::Epochs(epochs.into()),
                (iters, None) => Length::Steps(iters.map_or(settings::STEPS, u64::from)),
            },
            rate: run.learning_rate.or(settings.rate),
            kl: self.forgetting.penalty(),
            replay_share: self.forgetting.share()?,
            seed: self.seed,
            keep: self.memory.keep,
            keep_precision: self.memory.keep_precision,
            looks: Looks::Every(run.steps_per_eval.into()),
            checkpoint_every: run.checkpoint_every.into(),
            save_every: run.save_every.into(),
            report_every: run.steps_per_report.into(),
            ..settings
        })
    }

    /// Refuses flags that would have no effect with the others.
    fn check_effects(&self) -> Result<()> {
        self.forgetting.check()?;
        self.what.shape.check()?;
        let what = &self.what;
        if self.forgetting.protects(false) {
            refuse_beside_protection(&what.shape)?;
            if what.fine_tune_type != FineTune::Lora {
                let message = "--protect is for --fine-tune-type lora: a DoRA's magnitudes act on every input, and full \
                               fine-tuning has no directions to keep to";
                return Err(misuse(message));
            }
        }
        if !self.is_full() {
            return match what.dtype {
                None => Ok(()),
                Some(_) => Err(misuse("--type has no effect on adapters; it is for --fine-tune-type full")),
            };
        }
        let of_adapters =
            [("--rank", what.rank != settings::RANK as u32), ("--alpha", what.alpha != settings::ALPHA)];
        if let Some((flag, _)) = of_adapters.iter().find(|(_, given)| *given) {
            return Err(misuse(format!("{flag} is for adapters; leave it out with --fine-tune-type full")));
        }
        refuse_for_full(&what.shape, &self.run.optimizer)?;
        if self.compute.gradient_precision.is_some() {
            let message =
                "--gradient-precision is for adapters; leave it out, --fine-tune-type full computes in f32";
            return Err(misuse(message));
        }
        if self.forgetting.penalty().is_some() {
            let message = "--kl-weight needs the base model, which --fine-tune-type full doesn't keep; use --replay \
                           instead";
            return Err(misuse(message));
        }
        Ok(())
    }
}
