//! Plans: how much memory a run will take, before allocating any of it.

use std::ffi::c_char;
use std::ops::RangeInclusive;
use std::sync::Arc;

use engraft_runtime::adapter::{LoraConfig, StoredAs};
use engraft_runtime::data::Example;
use engraft_runtime::generate::replay::Starts;
use engraft_runtime::generate::{KvType, Sequence};
use engraft_runtime::model::usage::Usage;
use engraft_runtime::model::{ModelConfig, Proj};
use engraft_runtime::plan::{MemoryPlan, room};
use engraft_runtime::run::{
    Base, Begin, Extent, Length, Limit, Method, Observer, Planned, RunRows, SampledReplay, Setting, Settings,
    Warmup, settings,
};
use engraft_runtime::train::schedule::Shape;
use engraft_runtime::train::{Direction, KlPenalty};

use crate::caller::{self, at_most, number, or, structs};
use crate::data::{self, Data};
use crate::error::{Failure, Result};
use crate::handle::{self, kind};
use crate::model::{self, Model};
use crate::session::SessionParams;
use crate::trainer;

/// The query projection, in `modules`.
pub const ENGRAFT_MODULE_Q: u32 = 1;
/// The key projection.
pub const ENGRAFT_MODULE_K: u32 = 2;
/// The value projection.
pub const ENGRAFT_MODULE_V: u32 = 4;
/// The output projection.
pub const ENGRAFT_MODULE_O: u32 = 8;
/// The MLP's gate projection.
pub const ENGRAFT_MODULE_GATE: u32 = 16;
/// The MLP's up projection.
pub const ENGRAFT_MODULE_UP: u32 = 32;
/// The MLP's down projection.
pub const ENGRAFT_MODULE_DOWN: u32 = 64;

/// The learning rate falls linearly to zero.
pub const ENGRAFT_SCHEDULE_LINEAR: u32 = 0;
/// The learning rate falls to zero along half a cosine.
pub const ENGRAFT_SCHEDULE_COSINE: u32 = 1;
/// The learning rate stays the same.
pub const ENGRAFT_SCHEDULE_CONSTANT: u32 = 2;

const RANK_MAX: u32 = 4096;
const BATCH_MAX: u32 = 4096;
const ACCUMULATION_MAX: u32 = 65_536;
const EVA_BATCHES_MAX: u32 = 4096;
const REPLAY_COUNT_MAX: u32 = 1_000_000;

/// A memory plan. Immutable; any number of threads may use it at once.
pub struct Plan {
    _opaque: [u8; 0],
}

kind!(Plan, Inner, "plan");

/// The value behind a plan handle.
pub(crate) struct Inner {
    plan: MemoryPlan,
    budget: u64,
    /// Why it doesn't fit, and what would.
    advice: Option<String>,
}

/// How to train an adapter. Zero is the default for every field.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct TrainParams {
    /// `sizeof(engraft_train_params)`.
    pub struct_size: u32,
    /// Rank of the adapter, at most 256 (0: 8).
    pub rank: u32,
    /// Alpha: the adapter's effect is scaled by alpha/rank (0: twice the rank).
    pub alpha: f32,
    /// Share of the adapter's inputs set to zero during training, below 1.
    pub dropout: f32,
    /// `ENGRAFT_MODULE_*`: which projections to adapt (0: all seven).
    pub modules: u32,
    /// How many of the last blocks to adapt (0: all).
    pub num_layers: u32,
    /// 1 for DoRA.
    pub dora: u32,
    /// 1 scales by alpha/sqrt(rank) instead.
    pub rslora: u32,
    /// Sequences per batch (0: 1).
    pub batch_size: u32,
    /// Batches to sum gradients over before each step (0: 1).
    pub grad_accumulation_steps: u32,
    /// `ENGRAFT_SCHEDULE_*`.
    pub schedule: u32,
    /// Steps of rising learning rate at the start.
    pub warmup_steps: u32,
    /// Optimizer steps of the whole run (0: 300).
    pub steps: u64,
    /// Peak learning rate (0: 2e-4).
    pub learning_rate: f64,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// Scale gradients down to this norm (0: 1; negative: never).
    pub max_grad_norm: f64,
    /// LoRA+: the learning rate of B as a multiple of A's (0: 1).
    pub lora_plus_ratio: f64,
    /// Weight of the divergence from the base in each token's loss, 0 to 1e6 (0: off).
    pub kl_weight: f64,
    /// Seed for the initial adapter, dropout and the row order.
    pub seed: u64,
    /// Bytes of private memory that the run may take (0: no limit).
    pub memory_budget: u64,
    /// Threads (0: as many as there are cores).
    pub threads: u32,
    /// 1 keeps activations in 32 bits, for comparison; by default products take them in 8 bits.
    pub exact: u32,
    /// 1 saves the adapter in 16 bits.
    pub half: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Data whose training rows the model already knows, mixed into the batches. NULL for none.
    pub replay: *const Data,
    /// Number of rows to sample from the base instead, when the trainer is made; takes a while (0: none).
    pub replay_count: u32,
    /// Maximum tokens per sampled row (0: 64).
    pub replay_tokens: u32,
    /// Share of replayed rows, at most 0.9 (0: 0.1 if there is something to replay).
    pub replay_share: f64,
    /// Batches of rows to initialize A from when the trainer is made: A starts as the main directions of their inputs
    /// (EVA) (0: A starts at random).
    pub eva_batches: u32,
    /// 1 reverses the divergence of `kl_weight` to KL(tuned‖base).
    pub kl_reverse: u32,
}

/// A plan's figures.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct PlanInfo {
    /// `sizeof(engraft_plan_info)`.
    pub struct_size: u32,
    /// 1 if it is within the budget, if any, and within what the machine leaves this process.
    pub fits: u32,
    /// Maximum bytes of private memory: the sum of the pools.
    pub private_bytes: u64,
    /// Mapped bytes of the model's file, not part of the private memory; the system may drop them.
    pub mapped_bytes: u64,
    /// The requested budget; 0 for none.
    pub budget_bytes: u64,
    /// Number of pools.
    pub pools: u64,
}

structs!(TrainParams = "engraft_train_params", PlanInfo = "engraft_plan_info");

/// A run's checked settings.
pub(crate) struct Request {
    pub(crate) settings: Settings,
    pub(crate) limit: Limit,
    exact: u32,
    threads: usize,
    pub(crate) replay: Replayed,
}

impl Request {
    /// # Errors
    /// `MISUSE` that names the field.
    pub(crate) fn new(
        p: &TrainParams,
        model: &Arc<model::Inner>,
        data: Option<&Arc<data::Inner>>,
    ) -> Result<Request> {
        caller::unused(p.reserved)?;
        let c = model.file.config();
        let threads = model::threads(p.threads)?;
        let rows_max = data.map_or(c.context_len.min(settings::ROW_TOKENS), |d| d.options.max_seq_length);
        let replay = Replayed::new((p.replay, p.replay_count, p.replay_tokens), model, rows_max, p.seed)?;
        let prompting = data.map(|data| data.rows.train.prompting.clone()).unwrap_or_default();
        let usage = Usage { prompting, greedy: false };
        let settings = Settings { replay_share: replay.share(p.replay_share)?, usage, ..settings_of(p, c)? };
        Ok(Request {
            settings,
            limit: Limit {
                budget: (p.memory_budget > 0).then_some(p.memory_budget),
                room: room::here(threads),
            },
            exact: p.exact,
            threads,
            replay,
        })
    }

    /// The run's memory; without data, as if all rows had the maximum length.
    pub(crate) fn planned(&self, model: &model::Inner, data: Option<&data::Inner>) -> Result<Planned> {
        let c = model.file.config();
        let replay = self.replay.given();
        let rows = data.map_or(RunRows { replay, ..RunRows::default() }, |data| trainer::rows(data, replay));
        let extent = match data {
            Some(_) => Extent::of(rows, [].iter()),
            None => Extent::unknown(c.context_len.min(settings::ROW_TOKENS)),
        };
        let setting = Setting {
            model: &model.file,
            threads: self.threads,
            extent,
            sampled: self.replay.sampled.as_ref(),
            rows,
            tokenizer_bytes: 0,
            held_bytes: held_bytes(model, data)?,
        };
        Ok(Planned::new(&self.settings, &setting, &self.limit))
    }

    /// The model, and how to compute.
    pub(crate) fn base(
        &self,
        model: &model::Inner,
        data: Option<&data::Inner>,
        threads: u32,
    ) -> Result<Base> {
        let precision = model::precision(self.exact);
        Ok(Base {
            model: model.file.clone(),
            kernels: model::kernels(threads)?,
            precision,
            gradient: precision.into(),
            held_bytes: held_bytes(model, data)?,
        })
    }
}

/// Private bytes besides the model's: its tokenizer, and the memory that the rows were read from.
fn held_bytes(model: &model::Inner, data: Option<&data::Inner>) -> Result<usize> {
    Ok(model.text_bytes()? + data.map_or(0, data::Inner::text_bytes))
}

/// Rows to replay, from a caller's struct.
pub(crate) struct Replayed {
    /// From another handle.
    rows: Option<Arc<data::Inner>>,
    /// Still to be sampled from the base.
    pub(crate) sampled: Option<SampledReplay>,
}

impl Replayed {
    /// # Errors
    /// `MISUSE` for both kinds at once, and for rows read for another model.
    pub(crate) fn new(
        (rows, count, tokens): (*const Data, u32, u32),
        model: &Arc<model::Inner>,
        rows_max: usize,
        seed: u64,
    ) -> Result<Replayed> {
        let rows = handle::find_if_given(rows)?.map(|data| data.value.clone());
        rows.as_ref().map_or(Ok(()), |data| data.check_of(model))?;
        let tokens = or(tokens, settings::REPLAY_TOKENS as u32);
        let sampled = match (&rows, count) {
            (_, 0) => None,
            (Some(_), _) => return Err(Failure::misuse("replay and replay_count are both set; choose one")),
            (None, count) => {
                let count = at_most(count, REPLAY_COUNT_MAX, "replay_count")?;
                let starts = Starts::of(&*model.text()?, rows_max)?;
                Some(SampledReplay::new(starts, count as usize, tokens.min(rows_max), rows_max, seed))
            }
        };
        Ok(Replayed { rows, sampled })
    }

    fn given(&self) -> &[Example] {
        self.rows.as_ref().map_or(&[], |data| &data.rows.train.examples)
    }

    /// The rows; those from the base are sampled now.
    pub(crate) fn read(
        &self,
        base: &Base,
        observer: &mut dyn Observer,
    ) -> engraft_runtime::Result<Vec<Example>> {
        match &self.sampled {
            Some(sampled) => sampled.rows(base, observer),
            None => Ok(self.given().to_vec()),
        }
    }

    /// The share of replayed rows; 0 without replay.
    ///
    /// # Errors
    /// `MISUSE` for a share without replay, or of more than nine tenths.
    pub(crate) fn share(&self, asked: f64) -> Result<f64> {
        let usual = match self.rows.is_some() || self.sampled.is_some() {
            true => settings::REPLAY_SHARE,
            false if asked == 0.0 => return Ok(0.0),
            false => return Err(Failure::misuse("replay_share needs replay or replay_count")),
        };
        number(asked, (usual, None), 0.0..=0.9, "replay_share")
    }
}

/// The settings of a run; without replay.
fn settings_of(p: &TrainParams, c: &ModelConfig) -> Result<Settings> {
    const POSITIVE: RangeInclusive<f64> = 0.0..=1e6;
    let within = |value: u32, (usual, max): (usize, u32), name: &str| {
        at_most(value, max, name).map(|value| or(value, usual as u32))
    };
    let plain = Settings::new(Method::Adapter(lora(p, c)?));
    let norm = (settings::MAX_GRAD_NORM.into(), Some(0.0));
    let eva = within(p.eva_batches, (0, EVA_BATCHES_MAX), "eva_batches")?;
    Ok(Settings {
        begin: if eva > 0 { Begin::Eva(eva) } else { Begin::Random },
        length: Length::Steps(if p.steps == 0 { settings::STEPS } else { p.steps }),
        batch: within(p.batch_size, (settings::BATCH, BATCH_MAX), "batch_size")?,
        accumulation: within(p.grad_accumulation_steps, (1, ACCUMULATION_MAX), "grad_accumulation_steps")?,
        rate: Some(number(p.learning_rate, (settings::RATE_ADAPTER, None), 0.0..=1.0, "learning_rate")?),
        shape: shape(p.schedule)?,
        warmup: Warmup::Steps(p.warmup_steps.into()),
        weight_decay: number(p.weight_decay, (0.0, None), POSITIVE, "weight_decay")? as f32,
        max_grad_norm: number(p.max_grad_norm, norm, POSITIVE, "max_grad_norm")? as f32,
        lora_plus_ratio: number(p.lora_plus_ratio, (1.0, None), POSITIVE, "lora_plus_ratio")? as f32,
        kl: penalty(p.kl_weight, p.kl_reverse)?,
        seed: p.seed,
        stored: if p.half != 0 { StoredAs::F16 } else { StoredAs::F32 },
        // The caller decides when, and hears of every step.
        checkpoint_every: 0,
        save_every: 0,
        report_every: 0,
        ..plain
    })
}

/// The adapter's settings.
fn lora(p: &TrainParams, c: &ModelConfig) -> Result<LoraConfig> {
    let rank = or(p.rank, settings::RANK as u32);
    let alpha = if p.alpha == 0.0 { settings::SCALE * rank as f32 } else { p.alpha };
    if p.modules >= 1 << Proj::ALL.len() {
        return Err(Failure::misuse(format!("modules is {:#x}; use ENGRAFT_MODULE_*", p.modules)));
    }
    let is_adapted = |i: &usize| p.modules == 0 || p.modules >> i & 1 == 1;
    let targets: Vec<Proj> = (0..Proj::ALL.len()).filter(is_adapted).map(|i| Proj::ALL[i]).collect();
    let first = match p.num_layers as usize {
        0 => 0,
        n if n <= c.n_layers => c.n_layers - n,
        n => return Err(Failure::misuse(format!("num_layers is {n}, but the model has {}", c.n_layers))),
    };
    let layers: Vec<usize> = (first..c.n_layers).collect();
    let plain = LoraConfig::new(c, rank, alpha, p.dropout, &targets, &layers)?;
    Ok(LoraConfig { rslora: p.rslora != 0, dora: p.dora != 0, ..plain }.checked(c)?)
}

fn shape(schedule: u32) -> Result<Shape> {
    match schedule {
        ENGRAFT_SCHEDULE_LINEAR => Ok(Shape::Linear),
        ENGRAFT_SCHEDULE_COSINE => Ok(Shape::Cosine),
        ENGRAFT_SCHEDULE_CONSTANT => Ok(Shape::Constant),
        other => Err(Failure::misuse(format!("schedule is {other}; use one of ENGRAFT_SCHEDULE_*"))),
    }
}

/// The penalty on moving away from the base.
pub(crate) fn penalty(weight: f64, reverse: u32) -> Result<Option<KlPenalty>> {
    let weight = number(weight, (0.0, None), 0.0..=1e6, "kl_weight")? as f32;
    let direction = if reverse != 0 { Direction::Reverse } else { Direction::Forward };
    Ok((weight > 0.0).then_some(KlPenalty { weight, direction }))
}

/// Sets all fields to their default. `struct_size` is `sizeof(engraft_train_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_train_default_params(params: *mut TrainParams, struct_size: usize) -> i32 {
    // SAFETY: the crate's contract, for the caller's struct.
    unsafe { caller::defaults("engraft_train_default_params", params, struct_size) }
}

/// Plans a run. Returns 0 even if the run doesn't fit; the plan says so. If `data` is NULL, rows are assumed to
/// have the default maximum length. `params` may be NULL. `*plan` is freed with `engraft_plan_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_plan_create(
    model: *const Model,
    data: *const Data,
    params: *const TrainParams,
    plan: *mut *mut Plan,
) -> i32 {
    let make = |model: &Arc<model::Inner>| {
        // SAFETY: the crate's contract, for the caller's struct.
        let params: TrainParams = unsafe { caller::settings(params) }?;
        let data = handle::find_if_given(data)?;
        let data: Option<&Arc<data::Inner>> = data.as_ref().map(|data| &data.value);
        data.map_or(Ok(()), |data| data.check_of(model))?;
        let request = Request::new(&params, model, data)?;
        let Planned { request: asked, plan } = request.planned(model, data.map(|data| &**data))?;
        let held = request.limit.hold(&plan, model.file.config(), &asked);
        let advice = held.err().map(|error| error.to_string());
        let budget = params.memory_budget;
        Ok(Inner { plan, budget, advice })
    };
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::make("engraft_plan_create", model, plan, make) }
}

/// Frees a plan. Does nothing for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_plan_free(plan: *mut Plan) -> i32 {
    handle::free("engraft_plan_free", plan)
}

/// Gets a plan's figures. Set `struct_size` first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_plan_get_info(plan: *const Plan, info: *mut PlanInfo) -> i32 {
    handle::call("engraft_plan_get_info", plan, |inner| {
        let found = PlanInfo {
            struct_size: 0,
            fits: u32::from(inner.advice.is_none()),
            private_bytes: inner.plan.private_bytes as u64,
            mapped_bytes: inner.plan.mapped_bytes as u64,
            budget_bytes: inner.budget,
            pools: inner.plan.pools.len() as u64,
        };
        // SAFETY: the crate's contract, for the caller's struct.
        unsafe { caller::answer(info, found) }
    })
}

/// Copies the name of the `index`-th pool and puts its size into `*bytes` unless that is NULL; see
/// `engraft_message` for the buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_plan_pool(
    plan: *const Plan,
    index: usize,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
    bytes: *mut u64,
) -> i32 {
    handle::call("engraft_plan_pool", plan, |inner| {
        let pools = &inner.plan.pools;
        let unknown = || Failure::misuse(format!("there is no pool {index}; there are {}", pools.len()));
        let pool = pools.get(index).ok_or_else(unknown)?;
        // SAFETY: the crate's contract, for the caller's number and buffer.
        unsafe {
            caller::put(bytes, pool.bytes as u64);
            caller::copy_text(pool.name, buffer, capacity, length)
        }
    })
}

/// Copies why a plan doesn't fit and what would; an empty text if it fits. See `engraft_message` for the buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_plan_advice(
    plan: *const Plan,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> i32 {
    handle::call("engraft_plan_advice", plan, |inner| {
        let advice = inner.advice.as_deref().unwrap_or_default();
        // SAFETY: the crate's contract, for the caller's buffer.
        unsafe { caller::copy_text(advice, buffer, capacity, length) }
    })
}

/// Puts the bytes that a session with these settings, and adapters up to `rank`, will take into `*bytes`: its
/// cache and buffers. Each model adds its tokenizer once. `params` may be NULL. `MISUSE` for a rank above 4096; an
/// adapter has at most 256, but several can be stacked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_session_bytes(
    model: *const Model,
    params: *const SessionParams,
    rank: u32,
    bytes: *mut u64,
) -> i32 {
    handle::call("engraft_session_bytes", model, |model| {
        // SAFETY: the crate's contract, for the caller's struct.
        let params: SessionParams = unsafe { caller::settings(params) }?;
        caller::unused(params.reserved)?;
        at_most(rank, RANK_MAX, "rank")?;
        let c = model.file.config();
        let (capacity, cache): (usize, KvType) = (params.capacity(c)?, params.cache()?);
        let threads = model::threads(params.threads)?;
        let found = Sequence::bytes(c, capacity, rank as usize, threads, cache);
        // SAFETY: the crate's contract, for the caller's number.
        unsafe { caller::put(bytes, found as u64) };
        Ok(())
    })
}
