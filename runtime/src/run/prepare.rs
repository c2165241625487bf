//! Plans the memory a run takes, from its settings, its rows and what the machine has left, before allocating
//! any.

use std::path::Path;
use std::sync::Arc;

use engraft_kernels::Kernels;

use super::general::Aside;
use super::settings::{Begin, KeepChoice, Method, Settings};
use crate::adapter::{Adapter, Layout};
use crate::bytes;
use crate::data::Example;
use crate::data::batches::max_tokens;
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::generate::replay::{Sampling, Starts};
use crate::generate::{KvType, Sequence, StackedAdapter};
use crate::model::ModelConfig;
use crate::model::text::Text;
use crate::model::tuned::TunedLayout;
use crate::model::weights::ModelFile;
use crate::nn::keep::KeepPrecision;
use crate::nn::{GradientPrecision, Precision};
use crate::plan::room::{self, Room};
use crate::plan::{KeepPlan, MemoryPlan, Request, keep, process_bytes};
use crate::rng::Rng;
use crate::train::calibrate::Pieces;
use crate::train::eva::EvaWords;
use crate::train::quiet;

use super::Observer;
use super::checkpoint::payload_bytes;

/// Random stream of the seed for sampled replay rows.
const REPLAY_STREAM: u64 = 0x5245_504C;
/// Tokens of the shortest rows worth planning for.
const LEAST_SEQ: usize = 16;
/// General rows that pass a block at once while directions are measured.
pub(super) const GENERAL_ROWS: usize = 4;
/// Ranks to choose from.
const RANKS: [usize; 5] = [1, 2, 4, 8, 16];
/// Most trained parameters per target: beyond this, a larger rank memorizes rows rather than learning what they
/// share.
const PARAMS_PER_TARGET: usize = 100;

/// The model that runs train on, and how to compute.
#[derive(Clone)]
pub struct Base {
    /// Its file.
    pub model: Arc<ModelFile>,
    /// What computes.
    pub kernels: Arc<Kernels>,
    /// Activations.
    pub precision: Precision,
    /// Input gradients.
    pub gradient: GradientPrecision,
    /// Private bytes held beside the model throughout every run: a tokenizer, texts, what earlier runs left.
    pub held_bytes: usize,
}

impl Base {
    /// Opens a model file with the usual choices: the CPU's strongest instruction set on all threads,
    /// activations and gradients in int8, and memory for a tokenizer.
    ///
    /// # Errors
    /// Those of [`ModelFile::open`] and [`Text::heap_bytes`].
    pub fn open(path: impl AsRef<Path>) -> Result<Base> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let model = Arc::new(ModelFile::open(path)?);
        Ok(Base {
            held_bytes: Text::heap_bytes(&model)?,
            kernels: Arc::new(Kernels::detect(threads)),
            precision: Precision::Int8,
            gradient: GradientPrecision::Int8,
            model,
        })
    }

    /// A sequence of at most `capacity` tokens on this model with these adapters; keys and values in f16.
    ///
    /// # Errors
    /// Those of [`Sequence::new`].
    pub fn sequence(&self, adapters: Option<Arc<StackedAdapter>>, capacity: usize) -> Result<Sequence> {
        let (model, kernels) = (self.model.clone(), self.kernels.clone());
        Sequence::new(model, kernels, adapters, self.precision, capacity, KvType::F16)
    }

    /// Plans a run on these rows and checks the plan against a limit.
    ///
    /// # Errors
    /// `DoesNotFit`, saying what is needed and what fits.
    pub fn plan(&self, settings: &Settings, rows: RunRows<'_>, limit: &Limit) -> Result<Planned> {
        let planned = self.planned(settings, rows, std::iter::empty(), limit);
        limit.hold(&planned.plan, self.model.config(), &planned.request)?;
        Ok(planned)
    }

    /// Plans a run on these rows, with `others` in memory beside them.
    pub(crate) fn planned<'a>(
        &self,
        settings: &Settings,
        rows: RunRows<'a>,
        others: impl Iterator<Item = &'a Example> + Clone,
        limit: &Limit,
    ) -> Planned {
        let setting = Setting {
            model: &self.model,
            threads: self.kernels.threads(),
            extent: Extent::of(rows, others),
            rows,
            sampled: None,
            tokenizer_bytes: 0,
            held_bytes: self.held_bytes,
        };
        Planned::new(settings, &setting, limit)
    }

    /// Stacks adapters, each with a scale, for sequences on this model.
    ///
    /// # Errors
    /// Those of [`StackedAdapter::new`].
    pub fn stack(&self, adapters: &[(Adapter, f32)]) -> Result<Arc<StackedAdapter>> {
        StackedAdapter::new(&self.model, &self.kernels, adapters).map(Arc::new)
    }

    /// The same with `bytes` more held throughout.
    pub fn beside(&self, bytes: usize) -> Base {
        Base { held_bytes: self.held_bytes + bytes, ..self.clone() }
    }

    /// Private bytes of the process before any run: its own, the model's and [`Base::held_bytes`].
    pub fn resident_bytes(&self) -> usize {
        process_bytes(self.kernels.threads()) + self.model.private_bytes() + self.held_bytes
    }
}

/// The rows of a run. The caller owns them and passes the same ones to every call.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunRows<'a> {
    /// Rows to train on.
    pub train: &'a [Example],
    /// Held-out rows for validation.
    pub valid: &'a [Example],
    /// Rows the model already knew, replayed among the training rows.
    pub replay: &'a [Example],
    /// Ordinary text: what protected directions are measured on, and where the tuned model stays near its base.
    pub general: &'a [Example],
    /// Ordinary text that isn't trained on: at each look, how much of it the model forgot.
    pub aside: &'a [Aside],
}

/// What memory depends on, of a set of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Training rows; 0 while unknown.
    pub train_rows: usize,
    /// Positions of the longest row, validation rows included.
    pub longest: usize,
    /// Token ids of all rows in memory.
    pub tokens: usize,
    /// Rows in memory.
    pub rows: usize,
}

impl Extent {
    /// The extent of rows not loaded yet, of at most this many positions each.
    pub fn unknown(longest: usize) -> Extent {
        Extent { train_rows: 0, longest, tokens: 0, rows: 0 }
    }

    /// The extent of a run's rows, and of `others` held in memory beside them.
    pub fn of<'a>(rows: RunRows<'a>, others: impl Iterator<Item = &'a Example> + Clone) -> Extent {
        let aside = || rows.aside.iter().flat_map(|set| &set.rows);
        let own =
            || rows.train.iter().chain(rows.valid).chain(rows.replay).chain(rows.general).chain(aside());
        let all = || own().chain(others.clone());
        Extent {
            train_rows: rows.train.len(),
            longest: own().map(Example::rows).max().unwrap_or(0),
            tokens: all().map(|e| e.ids.len()).sum(),
            rows: all().count(),
        }
    }
}

/// Replay rows that the base itself generates.
pub struct SampledReplay {
    starts: Starts,
    sampling: Sampling,
}

impl SampledReplay {
    /// `count` rows of at most `tokens` new tokens after their opening, and at most `rows_max` positions
    /// overall.
    pub fn new(starts: Starts, count: usize, tokens: usize, rows_max: usize, seed: u64) -> SampledReplay {
        let seed = Rng::new(seed, REPLAY_STREAM).next_u64();
        SampledReplay { starts, sampling: Sampling { count, tokens, rows_max, seed } }
    }

    /// Upper bounds: tokens of all rows, number of rows, positions of the longest.
    pub fn extent(&self) -> (usize, usize, usize) {
        let (tokens, longest) = self.sampling.extent(&self.starts);
        (tokens, self.sampling.count, longest)
    }

    fn bytes(&self, c: &ModelConfig, threads: usize) -> usize {
        self.sampling.bytes(c, &self.starts, threads)
    }

    /// Checks that sampling fits a limit.
    ///
    /// # Errors
    /// `DoesNotFit`.
    pub fn check(&self, base: &Base, limit: &Limit) -> Result<()> {
        let needed = base.resident_bytes() + self.bytes(base.model.config(), base.kernels.threads());
        let Some(bytes) = limit.bytes().filter(|bytes| *bytes < needed as u64) else { return Ok(()) };
        let (needed, left) = (bytes::show(needed as u64), bytes::show(bytes));
        let message =
            format!("sampling rows to replay needs {needed} of private memory; {left} is available");
        Err(Error::new(ErrorKind::DoesNotFit, message).advise(Advice::LessPreparation))
    }

    /// Generates the rows.
    ///
    /// # Errors
    /// Those of the observer; those of [`Sampling::run`].
    pub fn rows(&self, base: &Base, observer: &mut dyn Observer) -> Result<Vec<Example>> {
        let mut stopped = Ok(());
        let go_on = |_: usize| {
            stopped = observer.go_on(&mut || Ok(()));
            stopped.is_ok()
        };
        let rows = self.sampling.run(&base.model, &base.kernels, base.precision, &self.starts, go_on);
        stopped.and(rows)
    }
}

/// The memory a run may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limit {
    /// The requested budget in bytes.
    pub budget: Option<u64>,
    /// The tightest limit from the system or a device's profile.
    pub room: Option<Room>,
}

impl Limit {
    /// The memory the system leaves this process.
    pub fn here(base: &Base) -> Limit {
        Limit { budget: None, room: room::here(base.kernels.threads()) }
    }

    /// The effective limit in bytes; `None` if there is none.
    pub fn bytes(&self) -> Option<u64> {
        let room = self.room.as_ref().map(|room| room.bytes);
        self.budget.into_iter().chain(room).min()
    }

    /// Checks a plan against both.
    ///
    /// # Errors
    /// `DoesNotFit`, saying whose limit it is, what is needed and what fits.
    pub fn hold(&self, plan: &MemoryPlan, c: &ModelConfig, request: &Request) -> Result<()> {
        if let Some(bytes) = self.budget {
            plan.check(c, request, usize::try_from(bytes).unwrap_or(usize::MAX))?;
        }
        self.room.as_ref().map_or(Ok(()), |room| room.hold(plan, c, request))
    }
}

/// What planning a run needs beyond its settings.
#[derive(Clone, Copy)]
pub struct Setting<'a> {
    /// The model.
    pub model: &'a ModelFile,
    /// Worker threads.
    pub threads: usize,
    /// What memory depends on, of the rows.
    pub extent: Extent,
    /// Those that walk through the blocks before training.
    pub rows: RunRows<'a>,
    /// Rows the base has yet to generate.
    pub sampled: Option<&'a SampledReplay>,
    /// Heap of a tokenizer that is freed before the run starts.
    pub tokenizer_bytes: usize,
    /// What is held throughout; see [`Base::held_bytes`].
    pub held_bytes: usize,
}

/// Positions that walk through the blocks before training: of the largest batch, and of all. EVA's are of rows to
/// train on, those of protected directions of general ones.
fn walk_positions(settings: &Settings, setting: &Setting<'_>) -> (usize, usize) {
    let Setting { extent, rows, .. } = setting;
    match settings.begin {
        _ if settings.from.is_some() => (0, 0),
        Begin::Random => (0, 0),
        Begin::Protected(_) => {
            let all = rows.general.iter().map(Example::rows).sum();
            (max_tokens(rows.general, GENERAL_ROWS), all)
        }
        Begin::Eva(count) => {
            let in_epoch = rows.train.len().div_ceil(settings.batch);
            let (largest, batches) = match rows.train.is_empty() {
                true => (settings.batch * extent.longest, count),
                false => (max_tokens(rows.train, settings.batch), count.min(in_epoch)),
            };
            (largest, largest * batches)
        }
    }
}

/// A run's memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// The request.
    pub request: Request,
    /// The memory it takes.
    pub plan: MemoryPlan,
}

impl Planned {
    /// Plans a run. Its blocks keep whatever is fastest within `limit`, or within [`keep::UNASKED_BYTES`] if no
    /// limit is set.
    pub fn new(settings: &Settings, setting: &Setting<'_>, limit: &Limit) -> Planned {
        let c = setting.model.config();
        let mut request = request(settings, setting, walk_positions(settings, setting));
        request.keep = keep_plan(settings, c, &request, limit);
        let plan = MemoryPlan::new(c, &request);
        Planned { request, plan }
    }

    /// The choices of what blocks keep, by memory: each rung with its plan.
    pub fn ladder(&self, c: &ModelConfig, pieces: Option<&Pieces>) -> Vec<Rung> {
        let asked = &self.request;
        let mut rungs = keep::rungs(KeepPrecision::F32, asked.kept_blocks);
        // Inputs alone are f32 either way.
        rungs.extend(keep::rungs(KeepPrecision::Bf16, asked.kept_blocks).into_iter().skip(1));
        if !rungs.contains(&asked.keep) && asked.keep.blocks() > 0 {
            rungs.push(asked.keep);
        }
        let rung = |keep: KeepPlan| {
            let request = Request { keep, ..*asked };
            Rung {
                keep,
                private_bytes: MemoryPlan::new(c, &request).private_bytes,
                tokens_per_s: pieces.map(|p| p.tokens_per_s(c.n_layers, &request)),
                chosen: keep == asked.keep || keep.blocks() + asked.keep.blocks() == 0,
            }
        };
        let mut ladder: Vec<_> = rungs.into_iter().map(rung).collect();
        ladder.sort_by_key(|r| r.private_bytes);
        ladder
    }
}

/// One trade-off between memory and time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rung {
    /// What blocks keep.
    pub keep: KeepPlan,
    /// Private bytes the run then takes.
    pub private_bytes: usize,
    /// Tokens per second predicted by timing a few blocks, if timed.
    pub tokens_per_s: Option<f64>,
    /// Whether the plan chose this rung.
    pub chosen: bool,
}

fn request(settings: &Settings, setting: &Setting<'_>, walk: (usize, usize)) -> Request {
    let c = setting.model.config();
    let extent = setting.extent;
    let request = Request {
        seq: extent.longest,
        threads: setting.threads,
        tokenizer_bytes: setting.tokenizer_bytes,
        model_bytes: setting.model.private_bytes() + setting.held_bytes,
        mapped_bytes: setting.model.mapped_bytes(),
        ..settings.request(c)
    };
    let preparation_bytes = preparation_bytes(settings, c, &request, setting, walk);
    let (tokens, rows, longest) = setting.sampled.map_or((0, 0, 0), SampledReplay::extent);
    Request {
        seq: extent.longest.max(longest),
        data_tokens: extent.tokens + tokens,
        data_rows: extent.rows + rows,
        // With replay, batches can be larger than the training rows alone would fill.
        batch: match extent.train_rows {
            0 => request.batch,
            _ if settings.replay_share > 0.0 => request.batch,
            rows => request.batch.min(rows),
        },
        preparation_bytes,
        ..request
    }
}

/// The peak before training, apart from data: EVA's walk or the sampling of replay rows.
fn preparation_bytes(
    settings: &Settings,
    c: &ModelConfig,
    r: &Request,
    setting: &Setting<'_>,
    (largest, all): (usize, usize),
) -> usize {
    let walk = settings.method.lora().map_or(0, |lora| {
        let layout = Layout::new(c, lora);
        let extent = (largest, r.seq, all);
        let words = match settings.begin {
            _ if settings.from.is_some() => return 0,
            Begin::Random => return 0,
            Begin::Eva(_) => EvaWords::new(c, &layout, extent, r.threads).total(),
            Begin::Protected(_) => quiet::words(c, &layout, extent, r.threads),
        };
        size_of::<f32>() * (words + layout.len())
    });
    walk.max(setting.sampled.map_or(0, |sampled| sampled.bytes(c, r.threads)))
}

fn keep_plan(settings: &Settings, c: &ModelConfig, request: &Request, limit: &Limit) -> KeepPlan {
    if let KeepChoice::Fixed(level) = settings.keep {
        return KeepPlan::uniform(level, settings.keep_precision, request.kept_blocks);
    }
    let unasked = match request.full {
        None => keep::UNASKED_BYTES,
        // On top of what the weights take anyway.
        Some(_) => MemoryPlan::new(c, request).private_bytes + keep::UNASKED_BYTES,
    };
    let bytes = |b: u64| usize::try_from(b).unwrap_or(usize::MAX);
    let room = limit.room.as_ref().map_or(usize::MAX, |room| bytes(room.bytes));
    let budget = limit.budget.map_or(unasked, bytes);
    keep::choose(c, request, settings.keep_precision, budget.min(room))
}

/// Refuses, before a tokenizer or rows take any memory, what can't fit however short the rows are.
///
/// # Errors
/// `DoesNotFit`.
pub fn refuse_early(settings: &Settings, setting: &Setting<'_>, room: Option<Room>) -> Result<()> {
    let c = setting.model.config();
    // How many positions will walk isn't known yet.
    let request = request(settings, setting, (0, 0));
    let least = Request { batch: 1, seq: request.seq.min(LEAST_SEQ), ..request };
    Limit { budget: None, room }.hold(&MemoryPlan::new(c, &least), c, &least)
}

/// The settings with the largest rank that passes `check` and that the number of targets supports. The
/// multiplier alpha/r stays fixed so one learning rate suits every rank.
///
/// # Errors
/// The last error of `check`, `DoesNotFit`, if no rank fits; `Misuse` for full fine-tuning.
pub fn with_largest_rank(
    settings: &Settings,
    c: &ModelConfig,
    targets: usize,
    check: impl Fn(&Settings) -> Result<()>,
) -> Result<Settings> {
    let lora = settings
        .method
        .lora()
        .ok_or_else(|| Error::new(ErrorKind::Misuse, "full fine-tuning has no rank"))?;
    let of = |rank: usize| {
        let alpha = lora.alpha / lora.rank as f32 * rank as f32;
        let lora = crate::adapter::LoraConfig { rank, alpha, ..lora.clone() };
        Settings { method: Method::Adapter(lora), ..settings.clone() }
    };
    // In protected directions the rank isn't what rows have to carry.
    let protected = matches!(settings.begin, Begin::Protected(_));
    let carried =
        |s: &Settings| protected || s.method.parameters(c) <= targets.saturating_mul(PARAMS_PER_TARGET);
    let ranks = RANKS.into_iter().filter(|rank| !protected || *rank < lora.rank);
    let ranks: Vec<usize> = ranks.chain(protected.then_some(lora.rank)).collect();
    let mut refused = None;
    for rank in ranks.into_iter().rev() {
        let settings = of(rank);
        if rank > RANKS[0] && !carried(&settings) {
            continue;
        }
        match check(&settings) {
            Ok(()) => return Ok(settings),
            Err(error) => refused = Some(error),
        }
    }
    Err(refused.unwrap_or_else(|| Error::new(ErrorKind::DoesNotFit, "no rank fits")))
}

/// How much checkpoints write to storage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wear {
    /// Bytes of one checkpoint.
    pub bytes: u64,
    /// Steps between checkpoints; 0 for one only when stopped.
    every: u64,
    /// Average tokens per step; the maximum if there is no data yet.
    tokens_per_step: f64,
}

impl Wear {
    /// The wear of a planned run.
    pub fn new(settings: &Settings, c: &ModelConfig, request: &Request) -> Wear {
        let parameters = if request.full.is_some() { TunedLayout::new(c).len() } else { request.params };
        let per_row = match request.data_rows {
            0 => request.seq as f64,
            rows => request.data_tokens as f64 / rows as f64,
        };
        let rows = (request.batch * settings.accumulation) as f64;
        Wear {
            bytes: payload_bytes(parameters, parameters - request.frozen, request.best),
            every: settings.checkpoint_every,
            tokens_per_step: rows * per_row,
        }
    }

    /// MB written per hour at this rate.
    pub fn mb_per_hour(&self, tokens_per_s: Option<f64>) -> Option<f64> {
        let steps_per_hour = 3600.0 * tokens_per_s.filter(|_| self.every > 0)? / self.tokens_per_step;
        Some(1e-6 * self.bytes as f64 * steps_per_hour / self.every as f64)
    }

    /// For people.
    pub fn describe(&self, tokens_per_s: Option<f64>) -> String {
        let each = match self.every {
            0 => "when stopped".to_string(),
            every => format!("every {every} steps"),
        };
        let hourly = self.mb_per_hour(tokens_per_s);
        let hourly = hourly.map_or(String::new(), |mb| format!(", about {mb:.0} MB written per hour"));
        format!("checkpoints: {} {each}{hourly}", bytes::show(self.bytes))
    }
}
