//! What a run trains, how, and for how long. All defaults live here: targets turn flags, structs and keyword
//! arguments into [`Settings`], and take from here whatever their users leave out.

use engraft_kernels::DType;

use crate::adapter::{Init, Layout, LoraConfig, StoredAs};
use crate::data::Mixed;
use crate::error::Result;
use crate::model::tuned::TunedLayout;
use crate::model::usage::Usage;
use crate::model::{ModelConfig, Proj};
use crate::nn::divergence::KlPenalty;
use crate::nn::keep::{Keep, KeepPrecision};
use crate::plan::{FullUpdate, Request};
use crate::train::optim::AdamWConfig;
use crate::train::schedule::{Schedule, Shape};

use super::{Base, Earlier};
use crate::train::TrainOptions;

/// Rank of an adapter.
pub const RANK: usize = 8;
/// Alpha if only the rank is given.
pub const ALPHA: f32 = 16.0;
/// Alpha as a multiple of the rank, when the rank is chosen automatically.
pub const SCALE: f32 = 2.0;
/// Highest learning rate of an adapter.
pub const RATE_ADAPTER: f64 = 2e-4;
/// Highest learning rate for full fine-tuning: a model tolerates about a tenth of an adapter's rate.
pub const RATE_FULL: f64 = 2e-5;
/// Optimizer steps.
pub const STEPS: u64 = 300;
/// Sequences per batch.
pub const BATCH: usize = 1;
/// Most tokens per row, for training alone.
pub const ROW_TOKENS: usize = 256;
/// Most tokens per row when comparing arms: answers that follow examples need more.
pub const ROW_TOKENS_COMPARED: usize = 512;
/// Largest norm of a gradient.
pub const MAX_GRAD_NORM: f32 = 1.0;
/// Share of the rows held out if there is no validation file.
pub const VALID_FRACTION: f64 = 0.1;
/// Steps between checkpoints.
pub const CHECKPOINT_EVERY: u64 = 100;
/// Steps that a report averages over.
pub const REPORT_EVERY: u64 = 10;
/// Steps between saves of the adapter.
pub const SAVE_EVERY: u64 = 100;
/// Batches EVA reads.
pub const EVA_BATCHES: usize = 8;
/// Share of replayed rows, if rows are replayed.
pub const REPLAY_SHARE: f64 = 0.1;
/// Rows sampled from the base for replay.
pub const REPLAY_COUNT: usize = 64;
/// Most tokens sampled per replay row.
pub const REPLAY_TOKENS: usize = 64;
/// Share of ordinary text's energy that protected directions leave to an adapter.
pub const PROTECT_ENERGY: f32 = 0.08;
/// Rank of an adapter in protected directions, for models wide enough.
pub const RANK_PROTECTED: usize = 64;
/// Widths of the model for each rank of such an adapter.
const WIDTHS_PER_RANK: usize = 9;
/// Peak learning rate of such an adapter: B alone bears ten times what A and B do.
pub const RATE_PROTECTED: f64 = 2e-3;
/// Sequences per batch of such an adapter.
pub const BATCH_PROTECTED: usize = 8;
/// Weight of the divergence on general rows, in every second step, where directions are protected.
pub const GENERAL_KL: f32 = 4.0;
/// Looks at the validation rows of an arm.
pub const EVALUATIONS: u64 = 10;
/// Consecutive looks without a lower loss that end an arm.
pub const PATIENCE: u64 = 3;
/// Examples in a few-shot prompt.
pub const SHOTS: usize = 5;
/// Turns in which few rows are each held out once.
pub const FOLDS: usize = 5;
/// Most tokens of a judged answer.
pub const ANSWER_TOKENS: usize = 256;
/// Held-out rows a report shows with every arm's answer.
pub const SAMPLES: usize = 4;

/// Share of an arm's run spent on warmup.
const WARMUP_SHARE: f64 = 0.05;
/// Steps timed to size a run given in minutes: an even number, since every second one may also read general rows.
const TIMED_STEPS: u64 = 6;

/// What is trained.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// An adapter: LoRA or DoRA.
    Adapter(LoraConfig),
    /// Every weight. The result is a file whose matrices have this type, or each the type it has in the base.
    Full(Option<DType>),
}

impl Method {
    /// A LoRA of rank [`RANK`] and alpha [`ALPHA`] on all projections of all blocks.
    ///
    /// # Errors
    /// `Misuse` if the model is too narrow for it.
    pub fn usual(c: &ModelConfig) -> Result<Method> {
        let layers: Vec<usize> = (0..c.n_layers).collect();
        LoraConfig::new(c, RANK, ALPHA, 0.0, &Proj::ALL, &layers).map(Method::Adapter)
    }

    /// In words: "LoRA, rank 8, alpha 16, on q, v of 30 blocks".
    pub fn describe(&self) -> String {
        let lora = match self {
            Method::Adapter(lora) => lora,
            Method::Full(dtype) => {
                let stored = dtype.map_or("as in the base".to_string(), |d| d.name().to_string());
                return format!("full fine-tuning, stored {stored}");
            }
        };
        let kind = if lora.dora { "DoRA" } else { "LoRA" };
        let on = match lora.targets.len() == Proj::ALL.len() {
            true => "all seven projections".to_string(),
            false => lora.targets.iter().map(|p| p.hf_name()).collect::<Vec<_>>().join(", "),
        };
        let blocks = lora.layers.len();
        format!("{kind}, rank {}, alpha {}, on {on} of {blocks} blocks", lora.rank, lora.alpha)
    }

    /// Trained parameters.
    pub fn parameters(&self, c: &ModelConfig) -> usize {
        match self {
            Method::Adapter(lora) => Layout::new(c, lora).len(),
            Method::Full(_) => TunedLayout::new(c).len(),
        }
    }

    /// The adapter's settings, if an adapter is trained.
    pub fn lora(&self) -> Option<&LoraConfig> {
        match self {
            Method::Adapter(lora) => Some(lora),
            Method::Full(_) => None,
        }
    }

    /// The default learning rate.
    pub fn usual_rate(&self) -> f64 {
        match self {
            Method::Adapter(_) => RATE_ADAPTER,
            Method::Full(_) => RATE_FULL,
        }
    }
}

/// How A is initialized. B starts at zero, so the model is unchanged at first.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Begin {
    /// Uniformly random.
    #[default]
    Random,
    /// As the directions in which each projection's inputs vary most, over this many batches (EVA).
    Eva(usize),
    /// At random inside the directions that ordinary text leaves quiet: those that hold this share of the energy of
    /// its inputs. A stays there, and B alone is trained (see [`crate::train::quiet`]).
    Protected(f32),
}

/// How long a run may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// Optimizer steps.
    Steps(u64),
    /// Passes through the training rows.
    Epochs(f64),
    /// Tokens passed forward and backward through the model.
    Tokens(u64),
    /// Minutes spent in steps.
    Minutes(f64),
}

/// Steps over which the learning rate rises from zero.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// This many.
    Steps(u64),
    /// A share of the run.
    Share(f64),
}

/// When to evaluate the validation rows between the first step and the last, and what follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Looks {
    /// Every this many steps, for reporting only (0: never). The last step's parameters count.
    Every(u64),
    /// `times` times, evenly spaced. The best look's parameters count; `patience` looks without a better one
    /// end the run (0: never).
    Best {
        /// Looks.
        times: u64,
        /// Looks without a lower loss.
        patience: u64,
    },
}

/// What blocks keep for their backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeepChoice {
    /// Whatever is fastest within the available memory.
    #[default]
    Auto,
    /// The same in every block.
    Fixed(Keep),
}

/// The rank of an adapter in protected directions.
pub fn protected_rank(c: &ModelConfig) -> usize {
    (c.d_model / WIDTHS_PER_RANK).clamp(1, RANK_PROTECTED)
}

/// What a run trains, how, and how long.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// What is trained.
    pub method: Method,
    /// How an adapter is initialized.
    pub begin: Begin,
    /// A finished adapter to go on with, instead of a new one. Its optimizer begins anew.
    pub from: Option<Earlier>,
    /// How long.
    pub length: Length,
    /// Sequences per batch.
    pub batch: usize,
    /// Batches whose gradients are summed before a step.
    pub accumulation: usize,
    /// The peak learning rate; if `None`, a range test finds it.
    pub rate: Option<f64>,
    /// How the rate falls after the warmup.
    pub shape: Shape,
    /// The warmup.
    pub warmup: Warmup,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Largest gradient norm, 0 for none.
    pub max_grad_norm: f32,
    /// LoRA+: the learning rate of B as a multiple of A's.
    pub lora_plus_ratio: f32,
    /// A penalty on leaving the base; adapters only.
    pub kl: Option<KlPenalty>,
    /// Every second step, the weight of the mean KL(base‖tuned) on a few general rows; adapters only.
    pub general_kl: Option<f32>,
    /// Share of replayed rows, if there are rows to replay.
    pub replay_share: f64,
    /// Seed of the initial adapter, of dropout and of the order of rows.
    pub seed: u64,
    /// What blocks keep.
    pub keep: KeepChoice,
    /// How they keep it.
    pub keep_precision: KeepPrecision,
    /// Looks at the validation rows.
    pub looks: Looks,
    /// Whether the best look is the one that is sure of the most answers, and only of equals the one with the lowest loss.
    /// Losses turn before answers do: they count how sure a model is of what it gets wrong.
    pub by_answers: bool,
    /// Most nats per token of ordinary text set aside that a look may have forgotten and still count in full; one that
    /// forgot more counts for as much less as it will have to be weakened.
    pub forgets_most: f64,
    /// How the adapter is meant to be used.
    pub usage: Usage,
    /// How the adapter's file holds its numbers.
    pub stored: StoredAs,
    /// Steps between checkpoints (0: only when the run is stopped).
    pub checkpoint_every: u64,
    /// Steps between saves of the adapter (0: at the end only).
    pub save_every: u64,
    /// Steps a report averages over (0: no reports).
    pub report_every: u64,
}

impl Settings {
    /// The defaults of a standalone run.
    pub fn new(method: Method) -> Settings {
        Settings {
            begin: Begin::Random,
            from: None,
            length: Length::Steps(STEPS),
            batch: BATCH,
            accumulation: 1,
            rate: Some(method.usual_rate()),
            shape: Shape::Linear,
            warmup: Warmup::Steps(0),
            weight_decay: 0.0,
            max_grad_norm: MAX_GRAD_NORM,
            lora_plus_ratio: 1.0,
            kl: None,
            general_kl: None,
            replay_share: 0.0,
            seed: 0,
            keep: KeepChoice::Auto,
            keep_precision: KeepPrecision::F32,
            looks: Looks::Every(0),
            by_answers: false,
            forgets_most: f64::INFINITY,
            usage: Usage::default(),
            stored: StoredAs::F32,
            checkpoint_every: CHECKPOINT_EVERY,
            save_every: SAVE_EVERY,
            report_every: REPORT_EVERY,
            method,
        }
    }

    /// The defaults of an arm compared with others: its best look counts.
    pub fn of_arm(method: Method) -> Settings {
        let looks = Looks::Best { times: EVALUATIONS, patience: PATIENCE };
        let warmup = Warmup::Share(WARMUP_SHARE);
        Settings { warmup, looks, save_every: 0, report_every: 0, ..Settings::new(method) }
    }

    /// The same in protected directions.
    #[must_use]
    pub fn protected(self) -> Settings {
        Settings {
            begin: Begin::Protected(PROTECT_ENERGY),
            general_kl: Some(GENERAL_KL),
            rate: Some(RATE_PROTECTED),
            batch: BATCH_PROTECTED,
            ..self
        }
    }

    /// The settings that go on with a finished adapter. One whose A began in protected directions keeps to them.
    #[must_use]
    pub fn going_on(self, earlier: Earlier) -> Settings {
        let settings = match earlier.init {
            Init::Quiet if matches!(self.begin, Begin::Protected(_)) => self,
            Init::Quiet => self.protected(),
            Init::Kaiming | Init::Eva => self,
        };
        Settings { method: Method::Adapter(earlier.lora.clone()), from: Some(earlier), ..settings }
    }

    /// Whether ordinary text is read before or during training.
    pub fn reads_general(&self) -> bool {
        self.general_kl.is_some() || (self.from.is_none() && matches!(self.begin, Begin::Protected(_)))
    }

    /// Whether the best look's parameters are kept beside the current ones.
    pub fn keeps_best(&self) -> bool {
        matches!(self.looks, Looks::Best { .. })
    }

    /// Optimizer steps for rows that make this many batches and positions; `None` if the clock decides.
    pub(super) fn steps(&self, batches: &Mixed<'_>, positions: usize) -> Option<u64> {
        let in_epoch = batches.batches_per_epoch() as f64;
        let steps = |batches: f64| {
            let whole = batches.round().max(1.0) as u64;
            Some(whole.div_ceil(self.accumulation as u64))
        };
        match self.length {
            Length::Steps(n) => Some(n.max(1)),
            Length::Epochs(n) => steps(n * in_epoch),
            Length::Tokens(n) => steps(n as f64 / (positions as f64 / in_epoch)),
            Length::Minutes(_) => None,
        }
    }

    /// The length in steps of a run given in minutes, derived from the `seconds` its first steps took, and from what is
    /// `left` beside its looks, if that is set; `None` if it is known already or can't be told yet.
    pub(super) fn timed(
        &self,
        total: Option<u64>,
        step: u64,
        seconds: f64,
        left: Option<f64>,
    ) -> Option<u64> {
        match (self.length, total) {
            (Length::Minutes(minutes), None) if step == TIMED_STEPS => {
                let left = left.unwrap_or(minutes * 60.0 - seconds).max(0.0);
                let steps = left * TIMED_STEPS as f64 / seconds;
                Some(TIMED_STEPS + steps as u64)
            }
            _ => None,
        }
    }

    /// Looks that count, of a whole run.
    pub(super) fn look_count(&self) -> u64 {
        match self.looks {
            Looks::Best { times, .. } => times,
            Looks::Every(_) => 0,
        }
    }

    /// Whether a run given in minutes has used them up; a machine may slow down.
    pub(super) fn is_late(&self, seconds: f64) -> bool {
        matches!(self.length, Length::Minutes(minutes) if seconds > 1.1 * 60.0 * minutes)
    }

    /// The highest learning rate: the one that is set, or the usual one until a range test has found it.
    pub(super) fn peak(&self) -> f64 {
        self.rate.unwrap_or(self.method.usual_rate())
    }

    /// The learning-rate schedule for `total` steps; until that is known, constant after a short warmup.
    pub(super) fn schedule(&self, peak: f64, total: Option<u64>) -> Schedule {
        let peak = peak as f32;
        let Some(total) = total else {
            return Schedule { shape: Shape::Constant, peak, warmup: TIMED_STEPS, total: u64::MAX };
        };
        let warmup = match self.warmup {
            Warmup::Steps(steps) => steps,
            Warmup::Share(share) => (total as f64 * share).ceil() as u64,
        };
        Schedule { shape: self.shape, peak, warmup, total }
    }

    /// The optimizer's settings.
    pub(super) fn options(&self, base: &Base, schedule: Schedule) -> TrainOptions {
        TrainOptions {
            adamw: AdamWConfig {
                weight_decay: self.weight_decay,
                max_grad_norm: self.max_grad_norm,
                lora_plus_ratio: self.lora_plus_ratio,
                ..AdamWConfig::default()
            },
            schedule,
            seed: self.seed,
            precision: base.precision,
            gradient: base.gradient,
            kl: self.kl,
            freeze_a: matches!(self.begin, Begin::Protected(_)),
        }
    }

    /// The memory request, as far as it depends on what is trained.
    pub(super) fn request(&self, c: &ModelConfig) -> Request {
        let request = Request {
            batch: self.batch,
            best: self.keeps_best(),
            rounds: self.stored == StoredAs::F16,
            beside_base: self.kl.is_some() || self.general_kl.is_some(),
            kept_blocks: c.n_layers,
            ..Request::default()
        };
        let Method::Adapter(lora) = &self.method else {
            // With no norm to clip and no sums to wait for, each gradient can be used at once.
            let at_once = self.max_grad_norm == 0.0 && self.accumulation == 1;
            let full = Some(if at_once { FullUpdate::AtOnce } else { FullUpdate::AtEnd });
            return Request { full, ..request };
        };
        let layout = Layout::new(c, lora);
        let protected = matches!(self.begin, Begin::Protected(_));
        Request {
            params: layout.len(),
            frozen: if protected { layout.len() - layout.without_a().len() } else { 0 },
            gain_words: layout.gain_words(),
            rank: lora.rank_max(),
            kept_blocks: c.n_layers - lora.layers[0],
            dropout: lora.dropout > 0.0,
            ..request
        }
    }
}
