//! Plans: how much memory a run will take, before any of it is allocated.

use std::ffi::c_char;
use std::ops::RangeInclusive;
use std::sync::Arc;

use engraft_runtime::adapter::{Layout, LoraConfig};
use engraft_runtime::generate::{KvType, Session};
use engraft_runtime::model::{ModelConfig, Proj};
use engraft_runtime::nn::keep::KeepPrecision;
use engraft_runtime::plan::{MemoryPlan, Request, keep, room};
use engraft_runtime::train::optim::AdamWConfig;
use engraft_runtime::train::schedule::{Schedule, Shape};
use engraft_runtime::train::{Direction, KlPenalty, TrainOptions};

use crate::caller::{self, Out, number, or, structs};
use crate::data::{self, Data};
use crate::error::{Failure, Result};
use crate::handle::{self, Kind};
use crate::model::{self, Model};
use crate::session::SessionParams;

/// The query projection, in `modules`.
pub const ENGRAFT_MODULE_Q: u32 = 1;
/// The key projection.
pub const ENGRAFT_MODULE_K: u32 = 2;
/// The value projection.
pub const ENGRAFT_MODULE_V: u32 = 4;
/// The output projection.
pub const ENGRAFT_MODULE_O: u32 = 8;
/// The MLP's gate.
pub const ENGRAFT_MODULE_GATE: u32 = 16;
/// The MLP's way up.
pub const ENGRAFT_MODULE_UP: u32 = 32;
/// The MLP's way down.
pub const ENGRAFT_MODULE_DOWN: u32 = 64;

/// The learning rate falls linearly to zero.
pub const ENGRAFT_SCHEDULE_LINEAR: u32 = 0;
/// It falls to zero as half a cosine.
pub const ENGRAFT_SCHEDULE_COSINE: u32 = 1;
/// It stays.
pub const ENGRAFT_SCHEDULE_CONSTANT: u32 = 2;

/// Settings of a run that says nothing; the command line's.
const RANK: u32 = 8;
const RANK_MAX: u32 = 4096;
const SCALE: f32 = 2.0;
const STEPS: u64 = 300;
const RATE: f64 = 2e-4;
const BATCH_MAX: u32 = 4096;
const ACCUMULATION_MAX: u32 = 65_536;

/// A memory plan. Never changes; may be used by any number of threads at once.
pub struct Plan {
    _opaque: [u8; 0],
}

impl Kind for Plan {
    type Value = Inner;
    const NAME: &'static str = "plan";
}

/// What is behind a plan handle.
pub(crate) struct Inner {
    plan: MemoryPlan,
    budget: u64,
    /// Why it does not fit, and what would.
    advice: Option<String>,
}

/// How an adapter is trained. Zero is the default of everything.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct TrainParams {
    /// `sizeof(engraft_train_params)`.
    pub struct_size: u32,
    /// Rank of the adapter, at most 256 (0: 8).
    pub rank: u32,
    /// Alpha: the adapter's effect is multiplied by alpha/rank (0: twice the rank).
    pub alpha: f32,
    /// Share of the adapter's inputs that is set to zero while training, below 1.
    pub dropout: f32,
    /// `ENGRAFT_MODULE_*`: what is adapted (0: all seven).
    pub modules: u32,
    /// How many of the last blocks are adapted (0: all).
    pub num_layers: u32,
    /// 1 for DoRA.
    pub dora: u32,
    /// 1 multiplies by alpha/sqrt(rank) instead.
    pub rslora: u32,
    /// Sequences of a batch (0: 1).
    pub batch_size: u32,
    /// Batches whose gradients are summed before a step (0: 1).
    pub grad_accumulation_steps: u32,
    /// `ENGRAFT_SCHEDULE_*`.
    pub schedule: u32,
    /// Steps in which the learning rate rises from zero.
    pub warmup_steps: u32,
    /// Optimizer steps of the whole run (0: 300).
    pub steps: u64,
    /// Learning rate at its highest (0: 2e-4).
    pub learning_rate: f64,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients are scaled down to this norm (0: 1; below 0: never).
    pub max_grad_norm: f64,
    /// LoRA+: the learning rate of B as a multiple of A's (0: 1).
    pub lora_plus_ratio: f64,
    /// Weight of the divergence from the base in each token's loss, 0 to 1e6 (0: none).
    pub kl_weight: f64,
    /// Seed of the initial adapter, of dropout, and of the order of rows.
    pub seed: u64,
    /// Bytes of private memory that the run may take (0: no limit).
    pub memory_budget: u64,
    /// Threads (0: as many as there are cores).
    pub threads: u32,
    /// 1 keeps activations in 32 bits, for comparison; by default they take 8 in products.
    pub exact: u32,
    /// 1 saves the adapter in 16 bits.
    pub half: u32,
    /// 0.
    pub reserved: u32,
}

/// What a plan says.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct PlanInfo {
    /// `sizeof(engraft_plan_info)`.
    pub struct_size: u32,
    /// 1 where it is within the budget, if there is one, and within what the machine leaves this process.
    pub fits: u32,
    /// Bytes of private memory at most: the sum of the pools.
    pub private_bytes: u64,
    /// Bytes of the model's file that are mapped beside them, which the system may drop.
    pub mapped_bytes: u64,
    /// The budget that was asked about; 0 for none.
    pub budget_bytes: u64,
    /// Pools.
    pub pools: u64,
}

structs!(TrainParams = "engraft_train_params", PlanInfo = "engraft_plan_info");

/// The settings of a run, checked.
pub(crate) struct Settings {
    pub(crate) lora: LoraConfig,
    pub(crate) options: TrainOptions,
    pub(crate) batch: usize,
    pub(crate) accumulation: usize,
    pub(crate) threads: usize,
    pub(crate) budget: u64,
    pub(crate) half: bool,
}

impl Settings {
    /// # Errors
    /// `MISUSE` that names the field.
    pub(crate) fn new(p: &TrainParams, c: &ModelConfig) -> Result<Settings> {
        caller::unused(p.reserved)?;
        let precision = model::precision(p.exact);
        let within = |value: u32, max: u32, name: &str| match value <= max {
            true => Ok(or(value, 1)),
            false => Err(Failure::misuse(format!("{name} is {value}, and must be at most {max}"))),
        };
        Ok(Settings {
            lora: lora(p, c)?,
            batch: within(p.batch_size, BATCH_MAX, "batch_size")?,
            accumulation: within(p.grad_accumulation_steps, ACCUMULATION_MAX, "grad_accumulation_steps")?,
            threads: model::threads(p.threads)?,
            budget: p.memory_budget,
            half: p.half != 0,
            options: TrainOptions {
                adamw: adamw(p)?,
                schedule: schedule(p)?,
                seed: p.seed,
                precision,
                gradient: precision.into(),
                kl: penalty(p.kl_weight)?,
            },
        })
    }

    pub(crate) fn budget(&self) -> Option<usize> {
        (self.budget > 0).then(|| usize::try_from(self.budget).unwrap_or(usize::MAX))
    }

    /// What the run asks of memory; without data, as if all rows were as long as they may be.
    pub(crate) fn request(&self, model: &model::Inner, data: Option<&data::Inner>) -> Result<Request> {
        let (c, layout) = (model.file.config(), Layout::new(model.file.config(), &self.lora));
        let mut request = Request {
            batch: self.batch,
            seq: c.context_len.min(data::ROW_TOKENS as usize),
            params: layout.len(),
            gain_words: layout.gain_words(),
            packed: self.half,
            rank: self.lora.rank_max(),
            kept_blocks: c.n_layers - self.lora.layers[0],
            threads: self.threads,
            dropout: self.lora.dropout > 0.0,
            beside_base: self.options.kl.is_some(),
            model_bytes: model.resident_bytes()?,
            mapped_bytes: model.file.mapped_bytes(),
            ..Request::default()
        };
        if let Some(data) = data {
            let (train, valid) = (&data.rows.train, &data.rows.valid);
            let examples = || train.examples.iter().chain(&valid.examples);
            request.batch = request.batch.min(train.examples.len());
            request.seq = train.rows_max().max(valid.rows_max());
            request.data_tokens = examples().map(|e| e.ids.len()).sum();
            request.data_rows = examples().count();
            request.model_bytes += data.text_bytes();
        }
        let budget = self.budget().unwrap_or(keep::UNASKED_BYTES);
        let room = room::here(self.threads);
        let room = room.map_or(usize::MAX, |r| usize::try_from(r.bytes).unwrap_or(usize::MAX));
        request.keep = keep::choose(c, &request, KeepPrecision::F32, budget.min(room));
        Ok(request)
    }

    /// Holds a plan against the budget, and against what the machine leaves this process.
    ///
    /// # Errors
    /// `DOES_NOT_FIT`, with what would.
    pub(crate) fn check(&self, plan: &MemoryPlan, c: &ModelConfig, request: &Request) -> Result<()> {
        let budget = self.budget().map(|bytes| (bytes, "memory_budget"));
        Ok(room::hold(plan, (c, request), budget, room::here(self.threads).as_ref())?)
    }
}

/// What is adapted.
fn lora(p: &TrainParams, c: &ModelConfig) -> Result<LoraConfig> {
    let rank = or(p.rank, RANK);
    let alpha = if p.alpha == 0.0 { SCALE * rank as f32 } else { p.alpha };
    if p.modules >= 1 << Proj::ALL.len() {
        return Err(Failure::misuse(format!("modules is {:#x}: no such projections", p.modules)));
    }
    let is_adapted = |i: &usize| p.modules == 0 || p.modules >> i & 1 == 1;
    let targets: Vec<Proj> = (0..Proj::ALL.len()).filter(is_adapted).map(|i| Proj::ALL[i]).collect();
    let first = match p.num_layers as usize {
        0 => 0,
        n if n <= c.n_layers => c.n_layers - n,
        n => return Err(Failure::misuse(format!("num_layers is {n}, the model has {}", c.n_layers))),
    };
    let layers: Vec<usize> = (first..c.n_layers).collect();
    let plain = LoraConfig::new(c, rank, alpha, p.dropout, &targets, &layers)?;
    Ok(LoraConfig { rslora: p.rslora != 0, dora: p.dora != 0, ..plain }.checked(c)?)
}

fn adamw(p: &TrainParams) -> Result<AdamWConfig> {
    const POSITIVE: RangeInclusive<f64> = 0.0..=1e6;
    Ok(AdamWConfig {
        weight_decay: number(p.weight_decay, (0.0, None), POSITIVE, "weight_decay")? as f32,
        max_grad_norm: number(p.max_grad_norm, (1.0, Some(0.0)), POSITIVE, "max_grad_norm")? as f32,
        lora_plus_ratio: number(p.lora_plus_ratio, (1.0, None), POSITIVE, "lora_plus_ratio")? as f32,
        ..AdamWConfig::default()
    })
}

fn schedule(p: &TrainParams) -> Result<Schedule> {
    let shape = match p.schedule {
        ENGRAFT_SCHEDULE_LINEAR => Shape::Linear,
        ENGRAFT_SCHEDULE_COSINE => Shape::Cosine,
        ENGRAFT_SCHEDULE_CONSTANT => Shape::Constant,
        other => return Err(Failure::misuse(format!("{other} is no schedule"))),
    };
    let peak = number(p.learning_rate, (RATE, None), 0.0..=1.0, "learning_rate")? as f32;
    let total = if p.steps == 0 { STEPS } else { p.steps };
    Ok(Schedule { shape, peak, warmup: p.warmup_steps.into(), total })
}

/// The penalty on leaving the base.
fn penalty(weight: f64) -> Result<Option<KlPenalty>> {
    let weight = number(weight, (0.0, None), 0.0..=1e6, "kl_weight")? as f32;
    Ok((weight > 0.0).then_some(KlPenalty { weight, direction: Direction::Forward }))
}

/// Makes all settings the default. `struct_size` is `sizeof(engraft_train_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_train_default_params(params: *mut TrainParams, struct_size: usize) -> i32 {
    handle::alone("engraft_train_default_params", || {
        // SAFETY: the crate's contract, for the caller's struct.
        unsafe { caller::default_settings(params, struct_size) }
    })
}

/// Plans a run; 0 also where it does not fit, which the plan tells. Without `data` (NULL), rows are taken for
/// as long as they may be by default. `params` may be NULL. `*plan` is freed with `engraft_plan_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_plan_create(
    model: *const Model,
    data: *const Data,
    params: *const TrainParams,
    plan: *mut *mut Plan,
) -> i32 {
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::clear(plan) };
    handle::call("engraft_plan_create", model, |model| {
        // SAFETY: the crate's contract, for the caller's place and struct.
        let (out, params) = unsafe { (Out::new(plan)?, caller::settings(params)?) };
        let data = handle::find_if_given(data)?;
        let data: Option<&Arc<data::Inner>> = data.as_ref().map(|data| &data.value);
        data.map_or(Ok(()), |data| data.check_of(model))?;
        let c = model.file.config();
        let settings = Settings::new(&params, c)?;
        let request = settings.request(model, data.map(|data| &**data))?;
        let plan = MemoryPlan::new(c, &request);
        let advice = settings.check(&plan, c, &request).err().map(|failure| failure.message);
        out.publish(Inner { plan, budget: settings.budget, advice })
    })
}

/// Frees a plan. NULL is nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_plan_free(plan: *mut Plan) -> i32 {
    handle::free("engraft_plan_free", plan)
}

/// Tells what a plan says. Set `struct_size` before.
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

/// Copies the name of the `index`-th pool, and puts its size into `*bytes`, unless that is NULL; see
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
        let unknown = || Failure::misuse(format!("there is no pool {index}, but {} of them", pools.len()));
        let pool = pools.get(index).ok_or_else(unknown)?;
        // SAFETY: the crate's contract, for the caller's number and buffer.
        unsafe {
            caller::put(bytes, pool.bytes as u64);
            caller::copy_text(pool.name, buffer, capacity, length)
        }
    })
}

/// Copies why a plan does not fit, and what would; an empty text where it fits. See `engraft_message` for
/// the buffer.
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

/// Puts the bytes that a session with these settings will take, with adapters up to `rank`, into `*bytes`:
/// its cache and buffers. The tokenizer comes to it once a model. `params` may be NULL. `MISUSE` for a rank above
/// 4096: adapters of 256 at most, several of them stacked.
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
        if rank > RANK_MAX {
            return Err(Failure::misuse(format!("rank is {rank}, and must be at most {RANK_MAX}")));
        }
        let c = model.file.config();
        let (capacity, cache): (usize, KvType) = (params.capacity(c)?, params.cache()?);
        let threads = model::threads(params.threads)?;
        let found = Session::bytes(c, capacity, rank as usize, threads, cache);
        // SAFETY: the crate's contract, for the caller's number.
        unsafe { caller::put(bytes, found as u64) };
        Ok(())
    })
}
