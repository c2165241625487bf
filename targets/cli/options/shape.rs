//! Options shared by `train`, `plan`, `compare` and `adapt`: which parts an adapter adapts, and the optimizer.

use std::path::PathBuf;

use clap::{Args, value_parser};
use engraft_runtime::adapter::{ADAPTER_FILE, LoraConfig, Override, StoredAs};
use engraft_runtime::error::Result;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::model::{ModelConfig, Proj};
use engraft_runtime::run::{Begin, Earlier, Settings, Warmup, settings};
use engraft_runtime::train::schedule::Shape;

use super::adapters::active_in;
use super::parse::{self, Layers, Modules, Pattern};
use super::{misuse, stat};

/// Which parts an adapter adapts, and how it starts.
#[derive(Args, Clone, Debug)]
pub(crate) struct ShapeOptions {
    /// Projections to adapt: all, or a list of q, k, v, o, gate, up, down
    #[arg(long, value_name = "LIST", default_value = "all", value_parser = parse::modules)]
    lora_modules: Modules,

    /// Adapt the last N transformer blocks (-1: all)
    #[arg(long, value_name = "N", default_value = "-1", value_parser = parse::layers)]
    num_layers: Layers,

    /// Share of the adapter's inputs set to zero during training
    #[arg(long, visible_alias = "lora-dropout", value_name = "SHARE", default_value_t = 0.0, value_parser = parse::below_one)]
    dropout: f64,

    /// Multiply the adapter's effect by alpha/sqrt(r) instead of alpha/r (rsLoRA)
    #[arg(long, visible_alias = "rslora")]
    use_rslora: bool,

    /// Different ranks for some projections: a list such as q=4,down=16 or layers.3.q=4
    #[arg(long, value_name = "LIST", default_value = "", hide_default_value = true, value_parser = parse::ranks)]
    rank_pattern: Pattern<u32>,

    /// Different alphas for some projections, in the same form
    #[arg(long, value_name = "LIST", default_value = "", hide_default_value = true, value_parser = parse::alphas)]
    alpha_pattern: Pattern<f32>,

    /// How to store the numbers in the adapter's file
    #[arg(long, default_value = "f32", value_parser = parse::stored_as())]
    pub(crate) adapter_precision: StoredAs,

    /// How to initialize A (B starts at zero, so the adapter has no effect at first)
    #[arg(long, default_value = "kaiming", value_parser = ["kaiming", "eva"])]
    init: String,

    /// Batches of training rows that --init eva analyzes [default: 8]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=4096))]
    eva_batches: Option<u32>,

    /// Go on with a finished adapter (its file, its folder, or a store's active one) instead of beginning a new one
    #[arg(long, value_name = "ADAPTER")]
    pub(crate) from: Option<PathBuf>,
}

impl ShapeOptions {
    /// How to initialize A.
    pub(crate) fn begin(&self) -> Begin {
        match self.init.as_str() {
            "eva" => Begin::Eva(self.eva_batches.map_or(settings::EVA_BATCHES, |n| n as usize)),
            _ => Begin::Random,
        }
    }

    /// Refuses flags that would do nothing.
    ///
    /// # Errors
    /// `Misuse`.
    pub(super) fn check(&self) -> Result<()> {
        match self.eva_batches.is_some() && self.begin() == Begin::Random {
            true => Err(misuse("--eva-batches has no effect without --init eva; add it")),
            false => Ok(()),
        }
    }

    /// The adapter to go on with, if any.
    ///
    /// # Errors
    /// `Misuse` for flags that the adapter decides; those of [`Earlier::open`] and [`Store::active`].
    pub(crate) fn earlier(&self, rank: bool, model: &ModelFile) -> Result<Option<Earlier>> {
        let Some(path) = &self.from else { return Ok(None) };
        let own = ShapeOptions { from: None, adapter_precision: StoredAs::F32, ..self.clone() };
        let decided = own.given().or(rank.then_some("--rank"));
        if let Some(flag) = decided {
            return Err(misuse(format!("{flag} is decided by the adapter of --from; leave it out")));
        }
        let found = stat(path, "--from")?;
        let file = match found.is_dir() && !path.join(ADAPTER_FILE).exists() {
            false => path.clone(),
            true => active_in(path, "--from")?,
        };
        Earlier::open(&file, model).map(Some).map_err(|e| e.at("--from"))
    }

    /// The adapter's settings, checked against a model.
    ///
    /// # Errors
    /// `Misuse`.
    pub(crate) fn lora(
        &self,
        model: &ModelConfig,
        rank: usize,
        alpha: f32,
        dora: bool,
    ) -> Result<LoraConfig> {
        let n = model.n_layers;
        let first = match self.num_layers {
            Layers::All => 0,
            Layers::Last(count) => n.checked_sub(count as usize).ok_or_else(|| {
                misuse(format!(
                    "--num-layers {count}: the model has {n} blocks; give at most {n}, or -1 for all"
                ))
            })?,
        };
        let layers: Vec<usize> = (first..n).collect();
        let targets = &self.lora_modules.0;
        let plain = LoraConfig::new(model, rank, alpha, self.dropout as f32, targets, &layers)?;
        LoraConfig { rslora: self.use_rslora, dora, overrides: self.overrides(), ..plain }.checked(model)
    }

    /// The overrides from `--rank-pattern` and `--alpha-pattern`.
    fn overrides(&self) -> Vec<Override> {
        let rank = |(place, rank): &(parse::Place, u32)| place.of(Some(*rank as usize), None);
        let alpha = |(place, alpha): &(parse::Place, f32)| place.of(None, Some(*alpha));
        self.rank_pattern.0.iter().map(rank).chain(self.alpha_pattern.0.iter().map(alpha)).collect()
    }

    /// The first given flag that has an effect only on adapters.
    pub(super) fn given(&self) -> Option<&'static str> {
        let flags = [
            ("--lora-modules", self.lora_modules.0.len() < Proj::ALL.len()),
            ("--num-layers", self.num_layers != Layers::All),
            ("--dropout", self.dropout > 0.0),
            ("--use-rslora", self.use_rslora),
            ("--rank-pattern", !self.rank_pattern.0.is_empty()),
            ("--alpha-pattern", !self.alpha_pattern.0.is_empty()),
            ("--adapter-precision", self.adapter_precision != StoredAs::F32),
            ("--init eva", self.begin() != Begin::Random),
            ("--from", self.from.is_some()),
        ];
        flags.into_iter().find(|(_, given)| *given).map(|(flag, _)| flag)
    }
}

/// Batches and the optimizer.
#[derive(Args, Clone, Debug)]
pub(crate) struct OptimizerOptions {
    /// Sequences per batch [default: 1; with --protect: 8]
    #[arg(short, long, value_name = "N", value_parser = value_parser!(u32).range(1..=4096))]
    pub(crate) batch_size: Option<u32>,

    /// Batches to sum gradients over before each step
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..=65_536))]
    grad_accumulation_steps: u32,

    /// Learning rate of B as a multiple of A's (LoRA+)
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = parse::positive_f32)]
    pub(super) lora_plus_ratio: f32,

    /// How the learning rate falls after the warmup
    #[arg(long, default_value = "linear", value_parser = parse::schedule())]
    schedule: Shape,

    /// Steps of rising learning rate at the start [default: 0; for compare and adapt: 5 % of the run]
    #[arg(long, value_name = "N")]
    warmup_steps: Option<u32>,

    /// AdamW's decoupled weight decay
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = parse::not_negative_f32)]
    weight_decay: f32,

    /// Scale gradients down to this norm (0: never)
    #[arg(long, value_name = "X", default_value_t = settings::MAX_GRAD_NORM, value_parser = parse::not_negative_f32)]
    max_grad_norm: f32,
}

impl OptimizerOptions {
    /// Puts these options into the settings.
    pub(crate) fn apply(&self, settings: Settings) -> Settings {
        Settings {
            batch: self.batch_size.map_or(settings.batch, |n| n as usize),
            accumulation: self.grad_accumulation_steps as usize,
            lora_plus_ratio: self.lora_plus_ratio,
            shape: self.schedule,
            warmup: self.warmup_steps.map_or(settings.warmup, |n| Warmup::Steps(n.into())),
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_grad_norm,
            ..settings
        }
    }
}

/// Refuses options that full fine-tuning ignores, because it trains no adapter.
///
/// # Errors
/// `Misuse`.
pub(super) fn refuse_for_full(shape: &ShapeOptions, optimizer: &OptimizerOptions) -> Result<()> {
    let ratio = (optimizer.lora_plus_ratio != 1.0).then_some("--lora-plus-ratio");
    match shape.given().or(ratio) {
        None => Ok(()),
        Some(flag) => Err(misuse(format!("{flag} is for adapters; leave it out with --fine-tune-type full"))),
    }
}

/// Refuses what would decide how A begins beside protected directions.
///
/// # Errors
/// `Misuse`.
pub(super) fn refuse_beside_protection(shape: &ShapeOptions) -> Result<()> {
    match shape.begin() == Begin::Random {
        true => Ok(()),
        false => Err(misuse("--init and --protect both decide how A begins; choose one (--protect off)")),
    }
}
