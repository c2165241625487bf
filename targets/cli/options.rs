//! Options that several verbs share. Each value is checked where it is read, so a verb's body meets
//! only values in range; what depends on files is checked by the functions that give paths.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum, value_parser};
use engraft_kernels::DType;
use engraft_runtime::adapter::Override;
use engraft_runtime::error::{Error, ErrorKind};
use engraft_runtime::model::Proj;
use engraft_runtime::train::{Direction, KlPenalty};

use crate::units;

/// The adapter's file within `--adapter-path`.
pub(crate) const ADAPTER_FILE: &str = "adapter.engraft";

/// The settings of an adapter of PEFT or MLX, within its folder.
const FOREIGN_CONFIG: &str = "adapter_config.json";

/// Learning rates of runs that say none.
const RATE_ADAPTER: f64 = 2e-4;
const RATE_FULL: f64 = 2e-5;

/// Rank and alpha of a run that says none.
pub(crate) const RANK_DEFAULT: u32 = 8;
const ALPHA_DEFAULT: f32 = 16.0;

/// Steps of a run that says neither `--iters` nor `--epochs`.
const ITERS_DEFAULT: u32 = 300;

/// Share of replayed rows where only what to replay is said.
const REPLAY_SHARE: f64 = 0.1;

/// Rows that are sampled from the base, and tokens of each, where nothing else is said.
const REPLAY_COUNT: u32 = 64;
const REPLAY_TOKENS: u32 = 64;

/// Batches that EVA looks at where nothing else is said.
const EVA_BATCHES: u32 = 8;

/// The model's file.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelOptions {
    /// The model: a GGUF file
    #[arg(short = 'm', long = "model", value_name = "FILE")]
    model: Option<PathBuf>,

    /// Read the whole model to know it again, instead of remembering its digest for this state of the file
    #[arg(long)]
    no_digest_cache: bool,

    /// Read the model into memory instead of mapping it: it takes its size, and its file may then change
    #[arg(long)]
    pub(crate) no_mmap: bool,
}

impl ModelOptions {
    /// Whether a model is named.
    pub(crate) fn is_given(&self) -> bool {
        self.model.is_some()
    }

    /// The folder where digests are remembered: `ENGRAFT_CACHE_DIR`, else `engraft` in the user's cache
    /// folder; `None` where there is none, or it is not wanted.
    pub(crate) fn digest_cache(&self) -> Option<PathBuf> {
        // Empty or relative paths count as absent, as the XDG base directory specification wants it.
        let named = |key: &str| std::env::var_os(key).map(PathBuf::from).filter(|p| p.is_absolute());
        let of_user = || {
            let cache = named("XDG_CACHE_HOME").or_else(|| named("HOME").map(|home| home.join(".cache")));
            cache.map(|folder| folder.join("engraft"))
        };
        if self.no_digest_cache { None } else { named("ENGRAFT_CACHE_DIR").or_else(of_user) }
    }

    /// The model's path, which names a file.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] when the flag is missing or names a folder, [`ErrorKind::Io`] when there
    /// is no such file.
    pub(crate) fn path(&self) -> Result<&Path, Error> {
        let missing = || misuse("-m/--model is missing: name the model's GGUF file");
        let path = self.model.as_deref().ok_or_else(missing)?;
        let found = stat(path, "-m/--model")?;
        if found.is_dir() {
            return Err(misuse(format!(
                "-m/--model: {} is a folder: name the GGUF file in it",
                path.display()
            )));
        }
        Ok(path)
    }
}

/// How to compute.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Computing")]
pub(crate) struct ComputeOptions {
    /// Threads; results do not depend on their number
    #[arg(short, long, value_name = "N", default_value_t = threads_default(), value_parser = value_parser!(u32).range(1..=256))]
    pub(crate) threads: u32,

    /// Activations in the products with quantized weights
    #[arg(long, value_enum, default_value_t = Precision::Int8)]
    pub(crate) precision: Precision,

    /// Input gradients in training [default: as --precision]
    #[arg(long, value_enum)]
    pub(crate) gradient_precision: Option<GradientPrecision>,

    /// Use this instruction set instead of the best one (for testing)
    #[arg(long, value_enum)]
    pub(crate) isa: Option<Isa>,
}

/// Activations in the products with quantized weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Precision {
    /// Quantized to 8 bits per block of 32, as llama.cpp does: the fast path
    Int8,
    /// Kept as they are
    F32,
}

/// Input gradients in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum GradientPrecision {
    /// Gradients and weights quantized to 8 bits per block of 32: the fast path
    Int8,
    /// Both rounded to bf16, where the CPU multiplies it (AVX-512 BF16, Armv8.6); elsewhere f32
    Bf16,
    /// Kept as they are
    F32,
}

/// The instruction sets that the kernels may be told to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Isa {
    Scalar,
    Portable,
    Avx2,
    #[value(name = "avxvnni")]
    AvxVnni,
    Avx512,
    Neon,
    Dotprod,
    I8mm,
}

/// Where rows come from, and which of their tokens count.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Data")]
pub(crate) struct DataOptions {
    /// Folder with train.jsonl, valid.jsonl, test.jsonl (or one file, which is split)
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,

    /// Learn and score the answers only (the default)
    #[arg(long, alias = "assistant-loss-only", num_args = 0..=1, require_equals = true, value_name = "BOOL",
          default_missing_value = "true", conflicts_with = "no_mask_prompt")]
    mask_prompt: Option<bool>,

    /// Learn and score prompts as well as answers
    #[arg(long)]
    no_mask_prompt: bool,

    /// Share of the rows held out when there is no valid.jsonl
    #[arg(long, value_name = "SHARE", default_value_t = 0.1, value_parser = below_one)]
    pub(crate) valid_fraction: f64,
}

impl DataOptions {
    /// The data's path, which exists; `None` when the flag is absent.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when there is no such folder or file.
    pub(crate) fn path(&self) -> Result<Option<&Path>, Error> {
        self.data.as_deref().map(|path| stat(path, "--data").map(|_| path)).transpose()
    }

    /// Whether the loss leaves prompts out.
    pub(crate) fn masks_prompt(&self) -> bool {
        self.mask_prompt.unwrap_or(true) && !self.no_mask_prompt
    }
}

/// Adapters to use, in order.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Adapters")]
pub(crate) struct AdapterOptions {
    /// An adapter: its folder or its file (may be repeated)
    #[arg(long, value_name = "FILE")]
    lora: Vec<PathBuf>,

    /// An adapter at a scale: 1 is as trained, 0 is off (may be repeated)
    #[arg(long, value_name = "FILE:SCALE", value_parser = scaled_adapter)]
    lora_scaled: Vec<ScaledAdapter>,

    /// Use what is active in an adapter store: its adapter, or its few-shot examples
    #[arg(long, value_name = "DIR")]
    pub(crate) store: Option<PathBuf>,

    /// Use adapters of another base where their shapes fit: nothing promises that the result makes sense
    #[arg(long)]
    pub(crate) force_base: bool,
}

/// An adapter's file and the factor put on its effect.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ScaledAdapter {
    pub(crate) path: PathBuf,
    pub(crate) scale: f32,
}

impl AdapterOptions {
    /// All adapters, folders resolved to the file within.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when one is missing.
    pub(crate) fn files(&self) -> Result<Vec<ScaledAdapter>, Error> {
        let plain = self.lora.iter().map(|path| (path, 1.0, "--lora"));
        let scaled = self.lora_scaled.iter().map(|a| (&a.path, a.scale, "--lora-scaled"));
        let resolve = |(path, scale, flag): (&PathBuf, f32, &str)| {
            Ok(ScaledAdapter { path: adapter_file(path, flag)?, scale })
        };
        plain.chain(scaled).map(resolve).collect()
    }
}

/// An adapter's file, which exists: the path itself, or the file in the folder it names.
///
/// # Errors
/// [`ErrorKind::Io`] when it is missing, [`ErrorKind::Unsupported`] for a folder of another tool.
pub(crate) fn adapter_file(path: &Path, flag: &str) -> Result<PathBuf, Error> {
    if !stat(path, flag)?.is_dir() {
        return Ok(path.to_path_buf());
    }
    let file = path.join(ADAPTER_FILE);
    if !file.exists() && path.join(FOREIGN_CONFIG).exists() {
        let message = format!("{flag}: {} is a folder of PEFT or MLX: {}", path.display(), import_hint(path));
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    stat(&file, flag).map(|_| file)
}

/// How an adapter of another tool is taken in.
pub(crate) fn import_hint(from: &Path) -> String {
    format!("take it in with `engraft import -m MODEL.gguf --from {}`", from.display())
}

/// How the numbers of an adapter are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum StoredAs {
    /// Exactly
    #[default]
    F32,
    /// Rounded to 11 significant bits, in less than half the size
    F16,
}

impl From<StoredAs> for engraft_runtime::adapter::Precision {
    fn from(stored: StoredAs) -> Self {
        match stored {
            StoredAs::F32 => Self::F32,
            StoredAs::F16 => Self::F16,
        }
    }
}

/// Everything that shapes a training run, and so its memory: `plan` and `train` take the same flags.
#[derive(Args, Clone, Debug)]
pub(crate) struct TuneOptions {
    #[command(flatten)]
    pub(crate) model: ModelOptions,

    /// Settings as a TOML file: keys are the long flags, and flags given here win
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) config: Option<PathBuf>,

    /// Folder for adapter.engraft (model.gguf with --fine-tune-type full), metrics.jsonl and checkpoints
    #[arg(long, value_name = "DIR", default_value = "adapter")]
    pub(crate) adapter_path: PathBuf,

    /// Refuse to start when the plan needs more private memory (60M, 1.5G, or bytes)
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes)]
    pub(crate) memory_budget: Option<u64>,

    /// What each block keeps of its forward, so that its backward need not compute it again
    #[arg(long, value_enum, default_value_t = Keep::Auto)]
    pub(crate) keep: Keep,

    /// How it is kept: f32 leaves gradients as they are, bf16 takes half the memory
    #[arg(long, value_enum, default_value_t = KeepPrecision::F32)]
    pub(crate) keep_precision: KeepPrecision,

    /// Seed of the split, the order of rows, the initial adapter and dropout (-1: another each time)
    #[arg(long, value_name = "N", default_value = "0", value_parser = seed)]
    pub(crate) seed: u64,

    #[command(flatten)]
    pub(crate) data: DataOptions,

    #[command(flatten)]
    pub(crate) lora: LoraOptions,

    #[command(flatten)]
    pub(crate) retention: RetentionOptions,

    #[command(flatten)]
    pub(crate) run: RunOptions,

    #[command(flatten)]
    pub(crate) compute: ComputeOptions,
}

/// What blocks keep for their backward: memory against time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Keep {
    /// What is fastest within --memory-budget; without one, within 128 MiB
    Auto,
    /// Their inputs alone: the least memory
    Inputs,
    /// Also what the attention's half computes
    Attention,
    /// Everything: the fastest
    All,
}

/// The format of what blocks keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KeepPrecision {
    F32,
    Bf16,
}

/// What is trained: an adapter, or the model.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Adapter")]
pub(crate) struct LoraOptions {
    /// What to train
    #[arg(long, value_enum, default_value_t = FineTune::Lora)]
    pub(crate) fine_tune_type: FineTune,

    /// With full: type of the model's matrices (F32, F16, Q8_0, Q4_K, ...) [default: each as in the base]
    #[arg(long = "type", value_name = "TYPE", value_parser = dtype)]
    pub(crate) dtype: Option<DType>,

    /// Rank r
    #[arg(long, visible_alias = "lora-rank", value_name = "R", default_value_t = RANK_DEFAULT, value_parser = value_parser!(u32).range(1..=256))]
    pub(crate) rank: u32,

    /// Alpha: the adapter's effect is multiplied by alpha/r (by alpha/sqrt(r) with --use-rslora)
    #[arg(long, visible_alias = "lora-alpha", value_name = "ALPHA", default_value_t = ALPHA_DEFAULT, value_parser = positive_f32)]
    pub(crate) alpha: f32,

    /// Projections to adapt: all, or a list of q, k, v, o, gate, up, down
    #[arg(long, value_name = "LIST", default_value = "all", value_parser = modules)]
    pub(crate) lora_modules: Modules,

    /// Adapt the last N transformer blocks (-1: all)
    #[arg(long, value_name = "N", default_value = "-1", value_parser = layers)]
    pub(crate) num_layers: Layers,

    /// Share of the adapter's inputs set to zero while training
    #[arg(long, visible_alias = "lora-dropout", value_name = "SHARE", default_value_t = 0.0, value_parser = below_one)]
    pub(crate) dropout: f64,

    /// Multiply the adapter's effect by alpha/sqrt(r) instead of alpha/r (rsLoRA)
    #[arg(long, visible_alias = "rslora")]
    pub(crate) use_rslora: bool,

    /// Other ranks: a list such as q=4,down=16 or layers.3.q=4
    #[arg(long, value_name = "LIST", default_value = "", hide_default_value = true, value_parser = ranks)]
    pub(crate) rank_pattern: Pattern<u32>,

    /// Other alphas, in the same form
    #[arg(long, value_name = "LIST", default_value = "", hide_default_value = true, value_parser = alphas)]
    pub(crate) alpha_pattern: Pattern<f32>,

    /// How the adapter's file holds its numbers
    #[arg(long, value_enum, default_value_t = StoredAs::F32)]
    pub(crate) adapter_precision: StoredAs,

    /// How A begins (B begins as zero, so that nothing is changed yet)
    #[arg(long, value_enum, default_value_t = Init::Kaiming)]
    pub(crate) init: Init,

    /// Batches of training rows that --init eva looks at [default: 8]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=4096))]
    eva_batches: Option<u32>,
}

/// How A begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Init {
    /// Uniformly random
    Kaiming,
    /// As the directions in which each projection's inputs vary most on the training rows
    Eva,
}

impl LoraOptions {
    /// Batches that `--init eva` looks at.
    pub(crate) fn eva_batches(&self) -> u32 {
        self.eva_batches.unwrap_or(EVA_BATCHES)
    }

    /// What `--rank-pattern` and `--alpha-pattern` name.
    pub(crate) fn overrides(&self) -> Vec<Override> {
        let rank = |(place, rank): &(Place, u32)| place.of(Some(*rank as usize), None);
        let alpha = |(place, alpha): &(Place, f32)| place.of(None, Some(*alpha));
        self.rank_pattern.0.iter().map(rank).chain(self.alpha_pattern.0.iter().map(alpha)).collect()
    }
}

impl TuneOptions {
    /// Refuses flags that would do nothing beside the others.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`], with the flag's name.
    pub(crate) fn check_effects(&self) -> Result<(), Error> {
        self.retention.check()?;
        if self.lora.eva_batches.is_some() && self.lora.init != Init::Eva {
            return Err(misuse("--eva-batches is for --init eva, which looks at them"));
        }
        self.check_kind()
    }

    /// Refuses flags that would do nothing beside `--fine-tune-type`.
    fn check_kind(&self) -> Result<(), Error> {
        let (lora, run) = (&self.lora, &self.run);
        if lora.fine_tune_type != FineTune::Full {
            return match lora.dtype {
                None => Ok(()),
                Some(_) => Err(misuse("--type is for --fine-tune-type full, which writes a model")),
            };
        }
        let meant_for_adapters = [
            ("--rank", lora.rank != RANK_DEFAULT),
            ("--alpha", lora.alpha != ALPHA_DEFAULT),
            ("--lora-modules", lora.lora_modules.0.len() < Proj::ALL.len()),
            ("--num-layers", lora.num_layers != Layers::All),
            ("--dropout", lora.dropout > 0.0),
            ("--use-rslora", lora.use_rslora),
            ("--rank-pattern", !lora.rank_pattern.0.is_empty()),
            ("--alpha-pattern", !lora.alpha_pattern.0.is_empty()),
            ("--lora-plus-ratio", run.lora_plus_ratio != 1.0),
            ("--adapter-precision", lora.adapter_precision != StoredAs::F32),
            ("--init eva", lora.init == Init::Eva),
        ];
        if self.compute.gradient_precision.is_some() {
            let message = "--gradient-precision is for adapters; --fine-tune-type full computes in f32";
            return Err(misuse(message));
        }
        if self.retention.penalty().is_some() {
            let message = "--kl-weight weighs an adapter against the base beneath it, which \
                           --fine-tune-type full does not keep; --replay works with both";
            return Err(misuse(message));
        }
        match meant_for_adapters.iter().find(|(_, given)| *given) {
            None => Ok(()),
            Some((flag, _)) => {
                Err(misuse(format!("{flag} shapes an adapter; --fine-tune-type full trains every weight")))
            }
        }
    }
}

/// A projection in one layer or, without it, in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    layer: Option<usize>,
    proj: Proj,
}

impl Place {
    fn of(self, rank: Option<usize>, alpha: Option<f32>) -> Override {
        Override { layer: self.layer, proj: self.proj, rank, alpha }
    }
}

/// Values of single projections.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Pattern<T>(Vec<(Place, T)>);

/// What a training run changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FineTune {
    /// A low-rank adapter beside the frozen model
    Lora,
    /// The same, and a magnitude for each output row of what is adapted
    Dora,
    /// Every weight of the model, in f32; the result is a model
    Full,
}

/// The projections to adapt, in storage order, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Modules(pub(crate) Vec<Proj>);

/// The transformer blocks to adapt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layers {
    All,
    /// The last so many, at least one.
    Last(u32),
}

/// What keeps a model near what it was.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Against forgetting")]
pub(crate) struct RetentionOptions {
    /// Replay rows among the training rows: of a .jsonl file, or sampled from the base before training starts
    #[arg(long, value_name = "FILE|base", value_parser = replay)]
    pub(crate) replay: Option<ReplaySource>,

    /// Share of the rows that are replayed, at most 0.9 [default: 0.1 with --replay]
    #[arg(long, value_name = "SHARE", value_parser = replay_share)]
    replay_share: Option<f64>,

    /// Rows to sample with --replay base [default: 64]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1_000_000))]
    replay_count: Option<u32>,

    /// Tokens to sample for each of them at most [default: 64]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1 << 20))]
    replay_tokens: Option<u32>,

    /// Weight of the divergence from the base in each token's loss [default: 0, none]
    #[arg(long, value_name = "W", value_parser = kl_weight)]
    kl_weight: Option<f32>,

    /// Which divergence [default: forward]
    #[arg(long, value_enum)]
    kl_direction: Option<KlDirection>,
}

impl RetentionOptions {
    /// The share of replayed rows, 0 without any.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] for a share of nothing.
    pub(crate) fn share(&self) -> Result<f64, Error> {
        match (&self.replay, self.replay_share) {
            (Some(_), share) => Ok(share.unwrap_or(REPLAY_SHARE)),
            (None, None) => Ok(0.0),
            (None, Some(_)) => {
                Err(misuse("--replay-share: name what to replay: --replay FILE or --replay base"))
            }
        }
    }

    /// Refuses flags that would do nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`], with the flag's name.
    fn check(&self) -> Result<(), Error> {
        let samples = self.replay == Some(ReplaySource::Base);
        for (flag, given) in [("--replay-count", self.replay_count), ("--replay-tokens", self.replay_tokens)]
        {
            if given.is_some() && !samples {
                return Err(misuse(format!("{flag} is for rows that the base writes: say --replay base")));
            }
        }
        match (self.kl_direction, self.kl_weight) {
            (Some(_), None) => Err(misuse("--kl-direction: say with --kl-weight how much it counts")),
            _ => Ok(()),
        }
    }

    /// Rows to sample from the base, and tokens of each at most.
    pub(crate) fn sampled(&self) -> (usize, usize) {
        let (rows, tokens) = (self.replay_count, self.replay_tokens);
        (rows.unwrap_or(REPLAY_COUNT) as usize, tokens.unwrap_or(REPLAY_TOKENS) as usize)
    }

    /// The penalty on leaving the base, if there is one.
    pub(crate) fn penalty(&self) -> Option<KlPenalty> {
        let direction = match self.kl_direction {
            None | Some(KlDirection::Forward) => Direction::Forward,
            Some(KlDirection::Reverse) => Direction::Reverse,
        };
        self.kl_weight.filter(|weight| *weight > 0.0).map(|weight| KlPenalty { weight, direction })
    }
}

/// Where replayed rows come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ReplaySource {
    /// The model itself.
    Base,
    /// Rows of any known format.
    File(PathBuf),
}

/// Which way the divergence from the base is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KlDirection {
    /// KL(base‖tuned): what was likely stays likely
    Forward,
    /// KL(tuned‖base): what was unlikely stays unlikely
    Reverse,
}

/// The course of a run.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Training")]
pub(crate) struct RunOptions {
    /// Optimizer steps (300, unless --epochs is given)
    #[arg(long, value_name = "N", conflicts_with = "epochs", value_parser = value_parser!(u32).range(1..=100_000_000))]
    iters: Option<u32>,

    /// Passes over the training rows
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1_000_000))]
    epochs: Option<u32>,

    /// Sequences that go through the model together
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..=4096))]
    pub(crate) batch_size: u32,

    /// Batches whose gradients are summed before a step
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..=65_536))]
    pub(crate) grad_accumulation_steps: u32,

    /// Tokens of a sequence at most
    #[arg(short = 'c', long, visible_alias = "ctx-size", value_name = "N", default_value_t = 256, value_parser = value_parser!(u32).range(2..=1 << 20))]
    pub(crate) max_seq_length: u32,

    /// Learning rate at its highest (also -lr) [default: 2e-4, and 2e-5 with --fine-tune-type full]
    #[arg(long, visible_alias = "lr", value_name = "RATE", value_parser = positive)]
    learning_rate: Option<f64>,

    /// Learning rate of B as a multiple of A's (LoRA+)
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = positive_f32)]
    pub(crate) lora_plus_ratio: f32,

    /// How the learning rate falls after the warmup
    #[arg(long, value_enum, default_value_t = Schedule::Linear)]
    pub(crate) schedule: Schedule,

    /// Steps in which the learning rate rises from zero
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) warmup_steps: u32,

    /// AdamW's decoupled weight decay
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = not_negative)]
    pub(crate) weight_decay: f64,

    /// Scale gradients down to this norm (0: never)
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = not_negative)]
    pub(crate) max_grad_norm: f64,

    /// Steps between reports
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = value_parser!(u32).range(1..))]
    pub(crate) steps_per_report: u32,

    /// Steps between measurements of the held-out loss (0: at the start and the end only)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) steps_per_eval: u32,

    /// Steps between saves of the adapter (0: at the end only, as --fine-tune-type full always does)
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) save_every: u32,

    /// Steps between checkpoints, from which --resume goes on and to which a run that diverges returns (0: only
    /// when stopped)
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) checkpoint_every: u32,
}

impl RunOptions {
    /// The highest learning rate. A model bears about a tenth of what an adapter does.
    pub(crate) fn learning_rate(&self, kind: FineTune) -> f64 {
        self.learning_rate.unwrap_or(usual_rate(kind))
    }

    /// How long to train.
    pub(crate) fn length(&self) -> Length {
        match (self.iters, self.epochs) {
            (_, Some(epochs)) => Length::Epochs(epochs),
            (iters, None) => Length::Iters(iters.unwrap_or(ITERS_DEFAULT)),
        }
    }
}

/// The learning rate of a run that says none.
pub(crate) fn usual_rate(kind: FineTune) -> f64 {
    if kind == FineTune::Full { RATE_FULL } else { RATE_ADAPTER }
}

/// How long to train: at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Length {
    /// Optimizer steps.
    Iters(u32),
    /// Passes over the training rows.
    Epochs(u32),
}

/// The course of the learning rate after the warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Schedule {
    /// Stays
    Constant,
    /// Falls to zero on a line
    Linear,
    /// Falls to zero on half a cosine
    Cosine,
}

/// An error in how the program was called.
pub(crate) fn misuse(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Misuse, message)
}

/// What the system knows of a path that a flag named.
pub(crate) fn stat(path: &Path, flag: &str) -> Result<std::fs::Metadata, Error> {
    std::fs::metadata(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            Error::new(ErrorKind::Io, format!("{flag}: {} does not exist: check the path", path.display()))
        }
        _ => Error::io(format!("{flag}: {}", path.display()), e),
    })
}

pub(crate) fn threads_default() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get().min(256) as u32)
}

/// A finite number that obeys a rule.
fn number(text: &str, rule: &str, holds: impl Fn(f64) -> bool) -> Result<f64, String> {
    let value: f64 = text.trim().parse().map_err(|_| format!("must be a number {rule}"))?;
    if value.is_finite() && holds(value) { Ok(value) } else { Err(format!("must be a number {rule}")) }
}

pub(crate) fn positive(text: &str) -> Result<f64, String> {
    number(text, "above 0", |v| v > 0.0)
}

/// A positive number that f32 can hold as such.
pub(crate) fn positive_f32(text: &str) -> Result<f32, String> {
    Ok(number(text, "above 0 and at most 1e6", |v| v as f32 > 0.0 && v <= 1e6)? as f32)
}

pub(crate) fn not_negative(text: &str) -> Result<f64, String> {
    number(text, "of at least 0", |v| v >= 0.0)
}

pub(crate) fn below_one(text: &str) -> Result<f64, String> {
    number(text, "of at least 0 and below 1", |v| (0.0..1.0).contains(&v))
}

fn replay(text: &str) -> Result<ReplaySource, String> {
    match text {
        "" => Err("must be a file, or base".into()),
        "base" => Ok(ReplaySource::Base),
        file => Ok(ReplaySource::File(file.into())),
    }
}

fn replay_share(text: &str) -> Result<f64, String> {
    number(text, "of 0 to 0.9", |v| (0.0..=0.9).contains(&v))
}

pub(crate) fn kl_weight(text: &str) -> Result<f32, String> {
    Ok(number(text, "of 0 to 1e6", |v| v == 0.0 || v as f32 > 0.0 && v <= 1e6)? as f32)
}

/// A seed; -1 draws one.
pub(crate) fn seed(text: &str) -> Result<u64, String> {
    if text == "-1" {
        use std::hash::{BuildHasher, RandomState};
        return Ok(RandomState::new().hash_one(0u8));
    }
    text.parse().map_err(|_| "must be a whole number of at least 0, or -1 for another each time".into())
}

/// A type by ggml's name.
pub(crate) fn dtype(text: &str) -> Result<DType, String> {
    let named = DType::ALL.into_iter().find(|t| t.name().eq_ignore_ascii_case(text));
    named.ok_or_else(|| format!("must be one of {}", DType::ALL.map(DType::name).join(", ")))
}

fn layers(text: &str) -> Result<Layers, String> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(Layers::All),
        Ok(n @ 1..=65_536) => Ok(Layers::Last(n as u32)),
        _ => Err("must be a number of blocks, at least 1, or -1 for all".into()),
    }
}

pub(crate) fn modules(text: &str) -> Result<Modules, String> {
    if ["all", "all-linear"].contains(&text) {
        return Ok(Modules(Proj::ALL.to_vec()));
    }
    let named = |name: &str| {
        let last = name.trim().rsplit('.').next().unwrap_or_default();
        Proj::from_name(last).ok_or_else(|| {
            format!("`{}` is no projection: name some of q, k, v, o, gate, up, down, or all", name.trim())
        })
    };
    let mut found = text.split(',').map(named).collect::<Result<Vec<_>, _>>()?;
    found.sort();
    found.dedup();
    Ok(Modules(found))
}

fn ranks(text: &str) -> Result<Pattern<u32>, String> {
    pattern(text, |value| value.parse().ok().filter(|r| (1..=256).contains(r)).ok_or("a rank of 1 to 256"))
}

fn alphas(text: &str) -> Result<Pattern<f32>, String> {
    pattern(text, |value| positive_f32(value).map_err(|_| "an alpha above 0 and at most 1e6"))
}

/// A list of PLACE=VALUE: a projection, or a path that names its layer too, as PEFT's patterns do.
fn pattern<T>(text: &str, value: impl Fn(&str) -> Result<T, &'static str>) -> Result<Pattern<T>, String> {
    let entry = |entry: &str| {
        let form = || format!("`{entry}` must be PLACE=VALUE, such as q=4 or layers.3.q=4");
        let (path, number) = entry.split_once('=').ok_or_else(form)?;
        let mut words = path.trim().split('.').rev();
        let proj = words.next().and_then(Proj::from_name).ok_or_else(form)?;
        let words: Vec<_> = words.collect();
        // Read from the end: the layer's number stands before the word `layers`.
        let layer = match words.iter().position(|w| *w == "layers") {
            Some(at) => {
                let number = at.checked_sub(1).and_then(|i| words[i].parse().ok());
                Some(number.ok_or_else(form)?)
            }
            None if words.iter().all(|w| ["self_attn", "mlp"].contains(w)) => None,
            None => return Err(form()),
        };
        let number = value(number.trim()).map_err(|wanted| format!("`{entry}`: {wanted} is needed"))?;
        Ok((Place { layer, proj }, number))
    };
    let entries = text.split(',').map(str::trim).filter(|e| !e.is_empty());
    Ok(Pattern(entries.map(entry).collect::<Result<_, String>>()?))
}

/// FILE:SCALE, split at the last colon, for paths may hold some.
fn scaled_adapter(text: &str) -> Result<ScaledAdapter, String> {
    let form = || "must be FILE:SCALE, such as home/adapter.engraft:0.5".to_string();
    let (path, scale) = text.rsplit_once(':').filter(|(path, _)| !path.is_empty()).ok_or_else(form)?;
    let scale: f32 = scale.parse().ok().filter(|s: &f32| s.is_finite()).ok_or_else(form)?;
    Ok(ScaledAdapter { path: path.into(), scale })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_take_every_naming() {
        let all = Modules(Proj::ALL.to_vec());
        assert_eq!(modules("all").unwrap(), all);
        assert_eq!(modules("q,k,v,o,gate,up,down").unwrap(), all);
        assert_eq!(
            modules("mlp.down_proj, self_attn.q_proj,attn_q").unwrap(),
            Modules(vec![Proj::Q, Proj::Down])
        );
        assert!(modules("").is_err() && modules("q,,v").is_err());
    }

    #[test]
    fn patterns_name_projections_and_layers() {
        let place = |layer, proj| Place { layer, proj };
        let parsed = ranks("q=4, layers.3.mlp.down_proj=16,model.layers.12.self_attn.v_proj=1").unwrap();
        let expected =
            vec![(place(None, Proj::Q), 4), (place(Some(3), Proj::Down), 16), (place(Some(12), Proj::V), 1)];
        assert_eq!(parsed, Pattern(expected));
        assert_eq!(alphas("").unwrap(), Pattern(vec![]));
        assert_eq!(alphas("gate=0.5").unwrap(), Pattern(vec![(place(None, Proj::Gate), 0.5)]));
        for bad in ["q", "q=", "q=0", "q=257", "x=4", "layers.q=4", "layers.x.q=4", "3.q=4", "q=4=5", "=4"] {
            assert!(ranks(bad).is_err(), "{bad}");
        }
        assert!(alphas("q=nan").is_err() && alphas("q=0").is_err());
    }

    #[test]
    fn adapters_carry_scales() {
        let scaled = |path: &str, scale| ScaledAdapter { path: path.into(), scale };
        assert_eq!(scaled_adapter("c:/a.engraft:-0.5").unwrap(), scaled("c:/a.engraft", -0.5));
        for bad in ["a", "a:", ":1", "a:nan", "a:inf"] {
            assert!(scaled_adapter(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn layers_and_seeds() {
        assert_eq!(layers("-1"), Ok(Layers::All));
        assert_eq!(layers("4"), Ok(Layers::Last(4)));
        assert!(layers("0").is_err() && layers("-2").is_err() && layers("x").is_err());
        assert_eq!(seed("7"), Ok(7));
        assert!(seed("-2").is_err());
        assert_ne!(seed("-1"), seed("-1"));
    }
}
