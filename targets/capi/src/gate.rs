//! The gate trains arms and compares them on held-out rows. Only what beats both the unchanged model and a
//! better prompt may be promoted.

use std::ffi::{c_char, c_void};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use engraft_runtime::ErrorKind;
use engraft_runtime::adapter::LoraConfig;
use engraft_runtime::compare::answers::Metric;
use engraft_runtime::compare::material::{Folds, Limits, Material, Rows};
use engraft_runtime::compare::recipe::Recipe;
use engraft_runtime::compare::retention::RetentionSet;
use engraft_runtime::compare::shots::{self, Choice};
use engraft_runtime::compare::{Contest, InUse, Outcome, Product, compare, fitting};
use engraft_runtime::data::masks::prompting_behind;
use engraft_runtime::gate::store::Store as Folder;
use engraft_runtime::gate::task::Task;
use engraft_runtime::gate::verdict::{Decision, Thresholds};
use engraft_runtime::model::text::Text;
use engraft_runtime::model::usage::Usage;
use engraft_runtime::model::{ModelConfig, Proj};
use engraft_runtime::plan::room;
use engraft_runtime::run::{
    Base, Control, Length, Limit, Looks, Method, Observer, RunRows, Settings, general, settings,
};
use engraft_runtime::storage::Disk;
use engraft_runtime::train::KlPenalty;

use crate::adapter::{self, Adapter};
use crate::caller::{self, at_most, number, or, structs};
use crate::control;
use crate::data::{self, Data};
use crate::error::{ENGRAFT_GATE_REFUSED, Failure, Result};
use crate::handle::{self, Exclusive, kind};
use crate::model::{self, Model};
use crate::plan::{Replayed, penalty};
use crate::progress::{ENGRAFT_EVENT_STEP, Listener, Looker, Progress, ProgressCallback};
use crate::store::Store;

/// Examples in the prompt.
pub const ENGRAFT_ARM_FEW_SHOT: u32 = 1;
/// A LoRA adapter.
pub const ENGRAFT_ARM_LORA: u32 = 2;
/// A DoRA adapter.
pub const ENGRAFT_ARM_DORA: u32 = 4;

/// Don't compare answers, except as the data's task says.
pub const ENGRAFT_METRIC_NONE: u32 = 0;
/// Compare answers word for word, except for white space.
pub const ENGRAFT_METRIC_EXACT: u32 = 1;
/// Compare answers as JSON, all fields equal.
pub const ENGRAFT_METRIC_JSON: u32 = 2;

/// Nothing has been judged yet.
pub const ENGRAFT_DECISION_NONE: u32 = 0;
/// Promote a trained arm.
pub const ENGRAFT_DECISION_PROMOTE: u32 = 1;
/// Keep prompting: examples in the prompt help, and no trained arm passed.
pub const ENGRAFT_DECISION_KEEP_PROMPTING: u32 = 2;
/// Keep the base alone.
pub const ENGRAFT_DECISION_KEEP_BASE: u32 = 3;
/// Keep the store's active generation: nothing is shown to be better.
pub const ENGRAFT_DECISION_KEEP_ACTIVE: u32 = 4;

/// The name of the caller's text in reports.
const OWN_RETENTION: &str = "own";
/// The name of the caller's rows in reports.
const OWN_ROWS: &str = "own rows";

/// A comparison of arms and its verdict. One call at a time; functions that steer it may be called from anywhere.
pub struct Gate {
    _opaque: [u8; 0],
}

kind!(Gate, Value, "gate", trial);

/// The value behind a gate handle.
pub(crate) struct Value {
    control: Control,
    pub(crate) trial: Exclusive<Trial>,
}

/// A comparison, before and after.
pub(crate) struct Trial {
    pub(crate) model: Arc<model::Inner>,
    data: Arc<data::Inner>,
    params: GateParams,
    /// `ENGRAFT_ARM_*`.
    arms: u32,
    metric: Option<Metric>,
    thresholds: Thresholds,
    kl: Option<KlPenalty>,
    replay: Replayed,
    replay_share: f64,
    /// The caller's text that must not be forgotten; may be empty.
    retention: String,
    /// The caller's rows that must not be forgotten.
    retention_rows: Option<Arc<data::Inner>>,
    /// The folder for checkpoints of unfinished arms.
    unfinished: Option<PathBuf>,
    /// The folder of the store whose active generation must be beaten.
    store: Option<PathBuf>,
    outcome: Option<Outcome>,
}

/// What to compare. Zero is the default for every field.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct GateParams {
    /// `sizeof(engraft_gate_params)`.
    pub struct_size: u32,
    /// `ENGRAFT_ARM_*` to compare with the base alone (0: all). Without few-shot, training needn't beat it.
    pub arms: u32,
    /// Examples in a few-shot prompt, at most 64 (0: 5).
    pub shots: u32,
    /// Steps per trained arm (0: 300).
    pub steps: u32,
    /// Sequences per step (0: 8 for a protected LoRA, else 1).
    pub batch_size: u32,
    /// Rank of the adapters (0: the largest that memory allows, up to 64 for a protected LoRA; for others up to 16, as
    /// rows allow).
    pub rank: u32,
    /// `ENGRAFT_METRIC_*`; the data's task overrides it.
    pub metric: u32,
    /// Maximum tokens per answer, up to 65536 (0: 256).
    pub answer_tokens: u32,
    /// Maximum number of training rows (0: all).
    pub train_rows: u32,
    /// Maximum number of held-out rows (0: all).
    pub held_out_rows: u32,
    /// Minimum number of held-out rows for a decision (0: 20).
    pub examples_min: u32,
    /// Bootstrap resamples (0: 10000).
    pub resamples: u32,
    /// Evaluations on the validation rows per run (0: 10).
    pub evaluations: u32,
    /// Threads (0: as many as there are cores).
    pub threads: u32,
    /// 1 keeps activations in 32 bits.
    pub exact: u32,
    /// 1 lets a lower loss win even if no more answers are right.
    pub loss_alone: u32,
    /// 1 leaves out the built-in text that training must not harm. Then supply your own.
    pub no_built_in_retention: u32,
    /// 1 lets a LoRA act on what ordinary text uses, too. By default it keeps to directions that such text leaves quiet,
    /// which costs some gain and saves most of what a plain LoRA forgets.
    pub protect_off: u32,
    /// Minutes for everything instead of steps: training takes what scoring leaves (0: use steps).
    pub minutes: f64,
    /// Peak learning rate (0: 2e-3 for a protected LoRA, else found by a range test).
    pub learning_rate: f64,
    /// Two-sided significance level of intervals and tests (0: 0.05).
    pub level: f64,
    /// Seed for adapters, examples and the bootstrap.
    pub seed: u64,
    /// Bytes of private memory that training and scoring may take (0: what the machine leaves this process).
    pub memory_budget: u64,
    /// A text that training must not harm, in addition to the built-in one: UTF-8. Lines that start with `%% `
    /// separate passages; without them it is one passage. The library keeps a copy. NULL for none.
    pub retention: *const c_char,
    /// Bytes of `retention`.
    pub retention_length: usize,
    /// Weight of the divergence from the base in each token's loss, 0 to 1e6 (0: off). Adds about half the time.
    pub kl_weight: f64,
    /// Data whose training rows the model already knows, mixed into the batches. NULL for none.
    pub replay: *const Data,
    /// Number of rows to sample from the base instead (0: none).
    pub replay_count: u32,
    /// Maximum tokens per sampled row (0: 64).
    pub replay_tokens: u32,
    /// Share of replayed rows, at most 0.9 (0: 0.1 if there is something to replay).
    pub replay_share: f64,
    /// Data whose answers training must not harm, in addition to retention texts: all its rows. NULL for none.
    pub retention_rows: *const Data,
    /// A folder for unfinished work, in UTF-8, created if missing. The same comparison continues from it after the
    /// process has ended, and a diverging run returns to it. NULL for none. The library keeps a copy.
    pub unfinished: *const c_char,
    /// Bytes of `unfinished`.
    pub unfinished_length: usize,
    /// A store whose active generation is compared, too: nothing replaces it that isn't better. NULL for none.
    pub store: *const Store,
}

// SAFETY: numbers, and a text that is copied during the call and never read afterwards.
unsafe impl Send for GateParams {}
// SAFETY: the same.
unsafe impl Sync for GateParams {}

structs!(GateParams = "engraft_gate_params");

impl Trial {
    /// Its outcome.
    ///
    /// # Errors
    /// `MISUSE` before the comparison has run.
    pub(crate) fn outcome(&self) -> Result<&Outcome> {
        self.outcome
            .as_ref()
            .ok_or_else(|| Failure::misuse("nothing has been judged yet; call engraft_gate_run"))
    }

    /// What the verdict chose.
    ///
    /// # Errors
    /// `GATE_REFUSED` if what is there stays, or if the examples differ for each question.
    pub(crate) fn winner(&self) -> Result<&Product> {
        let outcome = self.outcome()?;
        match outcome.winner() {
            Some(kept @ Product::Adapter(_)) => Ok(kept),
            Some(kept @ Product::FewShot(messages)) if !messages.is_empty() => Ok(kept),
            _ => Err(Failure::new(ENGRAFT_GATE_REFUSED, outcome.verdict.sentence.clone())),
        }
    }

    /// Reads everything, trains and measures all arms, and judges them.
    fn run(&mut self, control: &Control, listener: &Listener) -> Result<()> {
        self.outcome = None;
        let mut looker = Looker::new(control, listener, Progress::of(ENGRAFT_EVENT_STEP), Duration::ZERO);
        let judged = self.judged(&mut looker);
        // After the last check whether to continue.
        let judged = looker.end(judged)?;
        control.check()?;
        self.outcome = Some(judged);
        Ok(())
    }

    fn judged(&self, looker: &mut Looker<'_>) -> engraft_runtime::Result<Outcome> {
        let (p, file) = (&self.params, &self.model.file);
        let text = self.model.text().map_err(Failure::into_error)?;
        let limit = |n: u32| (n > 0).then_some(n as usize);
        let folds = Folds { turns: settings::FOLDS, below: self.thresholds.examples_min };
        let limits = Limits {
            train_rows: limit(p.train_rows),
            held_out_rows: limit(p.held_out_rows),
            folds: Some(folds),
        };
        let options = &self.data.options;
        let material = Material::read_from(self.data.parts(), &text, options, limits)?;
        self.data.check_unchanged().map_err(Failure::into_error)?;
        let precision = model::precision(p.exact);
        let base = Base {
            held_bytes: Text::heap_bytes(file)? + self.data.text_bytes() + self.data.rows_bytes(),
            model: file.clone(),
            kernels: model::kernels(p.threads).map_err(Failure::into_error)?,
            precision,
            gradient: precision.into(),
        };
        let contest = self.contest(&base, &material, &text, looker)?;
        compare(&base, &material, (&text, options), &contest, looker)
    }

    /// The contest: every trained arm that fits into memory; the others are reported.
    fn contest(
        &self,
        base: &Base,
        material: &Material,
        text: &Text,
        looker: &mut Looker<'_>,
    ) -> engraft_runtime::Result<Contest> {
        let p = &self.params;
        let few_shot = self.arms & ENGRAFT_ARM_FEW_SHOT != 0;
        let limit = Limit {
            budget: (p.memory_budget > 0).then_some(p.memory_budget),
            room: room::here(base.kernels.threads()),
        };
        if let Some(sampled) = &self.replay.sampled {
            sampled.check(base, &limit)?;
        }
        let replay = self.replay.read(base, looker)?;
        let (general, aside) = match self.protects() {
            true => general::set_aside(general::rows(text, self.data.options.max_seq_length)?),
            false => (Vec::new(), Vec::new()),
        };
        let recipes = self.recipes(base.model.config())?;
        let how = (p.rank == 0, true, false);
        let recipes = match fitting(
            recipes,
            base,
            material,
            (RunRows { replay: &replay, general: &general, aside: &aside, ..RunRows::default() }, &limit),
            how,
            looker,
        ) {
            // If no arm fits, examples in the prompt can still be compared with the base.
            Err(error) if few_shot && error.kind() == ErrorKind::DoesNotFit => Vec::new(),
            recipes => recipes?,
        };
        let shots = (or(p.shots, settings::SHOTS as u32), Choice::Seeded(p.seed));
        let shots = if few_shot { vec![shots] } else { Vec::new() };
        let parts = (&material.train, &material.held_out);
        let shots = shots::fitting(shots, base, parts, (text, &self.data.options), looker)?;
        Ok(Contest {
            active: self.in_use(base, looker)?,
            given: Vec::new(),
            aside,
            title: "adapt".into(),
            thresholds: Thresholds { few_shot_required: !shots.is_empty(), ..self.thresholds },
            shots,
            recipes,
            replay,
            general,
            metric: self.metric,
            answer_tokens: or(p.answer_tokens, settings::ANSWER_TOKENS as u32),
            retention: self.retention(text)?,
            seed: p.seed,
            samples: settings::SAMPLES,
            minutes: (p.minutes > 0.0).then_some(p.minutes),
            limit,
            folder: None,
            unfinished: self.unfinished.clone(),
        })
    }

    /// The store's active generation.
    fn in_use(
        &self,
        base: &Base,
        looker: &mut Looker<'_>,
    ) -> engraft_runtime::Result<Option<(String, InUse)>> {
        let Some(folder) = &self.store else { return Ok(None) };
        InUse::of_store(&Folder::open(&Disk, folder)?, &base.model, &mut |why| looker.note(why))
    }

    /// Whether a LoRA is trained and keeps to protected directions.
    fn protects(&self) -> bool {
        self.arms & ENGRAFT_ARM_LORA != 0 && self.params.protect_off == 0
    }

    /// One recipe for each trained arm.
    fn recipes(&self, c: &ModelConfig) -> engraft_runtime::Result<Vec<Recipe>> {
        let kinds = [(ENGRAFT_ARM_LORA, "lora"), (ENGRAFT_ARM_DORA, "dora")];
        let kinds: Vec<_> = kinds.into_iter().filter(|(arm, _)| self.arms & arm != 0).collect();
        let p = &self.params;
        let layers: Vec<usize> = (0..c.n_layers).collect();
        let length = match p.minutes > 0.0 {
            true => Length::Minutes(p.minutes / kinds.len().max(1) as f64),
            false => Length::Steps(or(p.steps, settings::STEPS as u32) as u64),
        };
        let recipe = |(arm, name): (u32, &str)| {
            let protects = arm == ENGRAFT_ARM_LORA && self.protects();
            let usual = if protects { settings::protected_rank(c) } else { settings::RANK };
            let rank = or(p.rank, usual as u32);
            let plain = LoraConfig::new(c, rank, settings::SCALE * rank as f32, 0.0, &Proj::ALL, &layers)?;
            let lora = LoraConfig { dora: arm == ENGRAFT_ARM_DORA, ..plain }.checked(c)?;
            let usual = Settings { rate: None, ..Settings::of_arm(Method::Adapter(lora)) };
            let usual = if protects { usual.protected() } else { usual };
            let settings = Settings {
                rate: (p.learning_rate > 0.0).then_some(p.learning_rate).or(usual.rate),
                length,
                batch: or(p.batch_size, usual.batch as u32),
                seed: p.seed,
                looks: Looks::Best {
                    times: or(p.evaluations, settings::EVALUATIONS as u32) as u64,
                    patience: settings::PATIENCE,
                },
                kl: self.kl,
                replay_share: self.replay_share,
                ..usual
            };
            Ok(Recipe::new(name, settings))
        };
        kinds.into_iter().map(recipe).collect()
    }

    /// What must not be forgotten.
    fn retention(&self, text: &Text) -> engraft_runtime::Result<Vec<RetentionSet>> {
        let rows_max = self.data.options.max_seq_length;
        let mut all = Vec::new();
        if self.params.no_built_in_retention == 0 {
            all.extend(RetentionSet::built_in(text, rows_max)?);
        }
        if !self.retention.is_empty() {
            all.push(RetentionSet::of_passages(OWN_RETENTION, &self.retention, text, rows_max)?);
        }
        if let Some(data) = &self.retention_rows {
            let metric = data.task.map(Metric::Numeric).or(self.metric);
            let rows = Rows::read(data.parts().train, text, &data.options)?;
            all.push(RetentionSet::of_rows(OWN_ROWS, &rows, metric, text));
        }
        Ok(all)
    }

    fn decision(&self) -> (u32, &str) {
        let Some(outcome) = &self.outcome else { return (ENGRAFT_DECISION_NONE, "") };
        match &outcome.verdict.decision {
            Decision::Promote { arm } => (ENGRAFT_DECISION_PROMOTE, arm),
            Decision::KeepPrompting { arm, .. } => (ENGRAFT_DECISION_KEEP_PROMPTING, arm),
            Decision::KeepActive { arm } => (ENGRAFT_DECISION_KEEP_ACTIVE, arm),
            Decision::KeepBase => (ENGRAFT_DECISION_KEEP_BASE, ""),
        }
    }
}

impl Trial {
    /// Refuses settings that allow no comparison, before reading anything.
    ///
    /// # Errors
    /// `MISUSE`, naming the field.
    fn new(
        model: &Arc<model::Inner>,
        data: Arc<data::Inner>,
        mut params: GateParams,
        (retention, unfinished): (String, Option<PathBuf>),
    ) -> Result<Trial> {
        let p = &mut params;
        data.check_of(model)?;
        p.check()?;
        let arms = p.arms()?;
        let store = handle::find_if_given(p.store)?.map(|store| store.value.folder.clone());
        let retention_rows = handle::find_if_given(p.retention_rows)?.map(|rows| rows.value.clone());
        retention_rows.as_ref().map_or(Ok(()), |rows: &Arc<data::Inner>| rows.check_of(model))?;
        let trained = arms & (ENGRAFT_ARM_LORA | ENGRAFT_ARM_DORA) != 0;
        let retains = p.no_built_in_retention == 0 || !retention.is_empty() || retention_rows.is_some();
        if trained && !retains {
            let message = "no_built_in_retention is 1, and neither retention nor retention_rows is given: what \
                           training forgets would be unknown, and nothing trained could win";
            return Err(Failure::misuse(message));
        }
        let usual = Thresholds::default();
        let thresholds = Thresholds {
            alpha: number(p.level, (usual.alpha, None), 1e-6..=0.5, "level")?,
            examples_min: or(p.examples_min, usual.examples_min as u32),
            resamples: or(p.resamples, usual.resamples as u32),
            accuracy_required: p.loss_alone == 0,
            ..usual
        };
        p.minutes = number(p.minutes, (0.0, None), 0.0..=1e6, "minutes")?;
        p.learning_rate = number(p.learning_rate, (0.0, None), 0.0..=1.0, "learning_rate")?;
        let rows = (p.replay, p.replay_count, p.replay_tokens);
        let replay = Replayed::new(rows, model, data.options.max_seq_length, p.seed)?;
        Ok(Trial {
            arms,
            metric: p.metric(data.task)?,
            thresholds,
            kl: penalty(p.kl_weight, 0)?,
            replay_share: replay.share(p.replay_share)?,
            replay,
            retention,
            retention_rows,
            unfinished,
            store,
            outcome: None,
            model: model.clone(),
            data,
            params,
        })
    }
}

impl GateParams {
    fn check(&self) -> Result<()> {
        at_most(self.protect_off, 1, "protect_off")?;
        for (name, value, max) in [
            ("shots", self.shots, 64),
            ("steps", self.steps, 100_000_000),
            ("batch_size", self.batch_size, 4096),
            ("rank", self.rank, 256),
            ("answer_tokens", self.answer_tokens, 1 << 16),
            ("resamples", self.resamples, 1_000_000),
            ("evaluations", self.evaluations, 1_000_000),
        ] {
            at_most(value, max, name)?;
        }
        model::threads(self.threads).map(drop)
    }

    fn arms(&self) -> Result<u32> {
        let all = ENGRAFT_ARM_FEW_SHOT | ENGRAFT_ARM_LORA | ENGRAFT_ARM_DORA;
        match self.arms {
            0 => Ok(all),
            arms if arms & !all == 0 => Ok(arms),
            arms => Err(Failure::misuse(format!("arms is {arms:#x}; use ENGRAFT_ARM_*"))),
        }
    }

    fn metric(&self, task: Option<Task>) -> Result<Option<Metric>> {
        match (task, self.metric) {
            (Some(task), _) => Ok(Some(Metric::Numeric(task))),
            (None, ENGRAFT_METRIC_NONE) => Ok(None),
            (None, ENGRAFT_METRIC_EXACT) => Ok(Some(Metric::Exact)),
            (None, ENGRAFT_METRIC_JSON) => Ok(Some(Metric::Json)),
            (None, other) => Err(Failure::misuse(format!("metric is {other}; use one of ENGRAFT_METRIC_*"))),
        }
    }
}

/// Sets all fields to their default. `struct_size` is `sizeof(engraft_gate_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_default_params(params: *mut GateParams, struct_size: usize) -> i32 {
    // SAFETY: the crate's contract, for the caller's struct.
    unsafe { caller::defaults("engraft_gate_default_params", params, struct_size) }
}

/// Makes a gate for data without computing anything yet. `params` may be NULL. `*gate` is freed with
/// `engraft_gate_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_create(
    model: *const Model,
    data: *const Data,
    params: *const GateParams,
    gate: *mut *mut Gate,
) -> i32 {
    let make = |model: &Arc<model::Inner>| {
        // SAFETY: the crate's contract, for the caller's struct.
        let params: GateParams = unsafe { caller::settings(params) }?;
        let data = handle::find(data)?.value.clone();
        // SAFETY: the crate's contract, for the text and the path that the struct names.
        let (retention, unfinished) = unsafe {
            let retention = caller::text(params.retention, params.retention_length, "retention")?;
            let unfinished = match params.unfinished.is_null() {
                true => None,
                false => Some(caller::path(params.unfinished, params.unfinished_length, "unfinished")?),
            };
            (retention.to_owned(), unfinished)
        };
        let trial = Trial::new(model, data, params, (retention, unfinished))?;
        Ok(Value { control: Control::default(), trial: Exclusive::new(trial) })
    };
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::make("engraft_gate_create", model, gate, make) }
}

/// Frees a gate and what it kept. `BUSY` while a call runs on it. Does nothing for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_free(gate: *mut Gate) -> i32 {
    handle::free("engraft_gate_free", gate)
}

/// Trains and measures all arms and judges them; returns 0 whatever the verdict. `callback` may be NULL; if it
/// returns false, the call ends with `CANCELLED` and nothing is judged. An earlier verdict is gone as soon as this
/// begins. `BAD_DATA` if the data's files have changed since they were opened.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_run(
    gate: *const Gate,
    callback: ProgressCallback,
    user: *mut c_void,
) -> i32 {
    handle::call("engraft_gate_run", gate, |gate| {
        // SAFETY: the crate's contract, for callbacks: it is called until this call returns.
        let listener = unsafe { Listener::new(callback, user) };
        gate.trial.enter()?.run(&gate.control, &listener)
    })
}

/// Puts the decision (`ENGRAFT_DECISION_*`) into `*decision` and copies the name of its arm, which may be empty;
/// see `engraft_message` for the buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_decision(
    gate: *const Gate,
    decision: *mut u32,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> i32 {
    handle::call("engraft_gate_decision", gate, |gate| {
        let trial = gate.trial.enter()?;
        let (found, arm) = trial.decision();
        // SAFETY: the crate's contract, for the caller's number and buffer.
        unsafe {
            caller::put(decision, found);
            caller::copy_text(arm, buffer, capacity, length)
        }
    })
}

/// Copies the verdict as JSON, with its reasons and figures; see `engraft_message` for the buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_verdict(
    gate: *const Gate,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> i32 {
    handle::call("engraft_gate_verdict", gate, |gate| {
        let verdict = gate.trial.enter()?.outcome()?.verdict.to_json()?;
        // SAFETY: the crate's contract, for the caller's buffer.
        unsafe { caller::copy_text(&verdict, buffer, capacity, length) }
    })
}

/// Copies the report as a single HTML page with sample rows and answers; see `engraft_message` for the buffer.
/// Without JavaScript, the page shows the verdict alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_report(
    gate: *const Gate,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> i32 {
    handle::call("engraft_gate_report", gate, |gate| {
        let page = gate.trial.enter()?.outcome()?.report.to_html();
        // SAFETY: the crate's contract, for the caller's buffer.
        unsafe { caller::copy_text(&page, buffer, capacity, length) }
    })
}

/// Copies what the verdict chose: an adapter or examples. `GATE_REFUSED` if what is there stays. `*adapter` is
/// freed with `engraft_adapter_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_adapter(gate: *const Gate, adapter: *mut *mut Adapter) -> i32 {
    let make = |gate: &Value| {
        let trial = gate.trial.enter()?;
        match trial.winner()? {
            Product::FewShot(messages) => {
                let usage = Usage { prompting: prompting_behind(messages), greedy: trial.metric.is_some() };
                Ok(adapter::Inner::without_parameters(&trial.model, messages.clone(), usage))
            }
            Product::Adapter(parameters) => {
                let kernels = model::kernels(trial.params.threads)?;
                adapter::Inner::trusted(&trial.model, &kernels, (**parameters).clone())
            }
            Product::File(_) | Product::Model(_) => Err(Failure::misuse("the winner is a file")),
        }
    };
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::make("engraft_gate_adapter", gate, adapter, make) }
}

/// Ends the running call, and later ones, with `CANCELLED` until `engraft_gate_resume`. May be called from
/// anywhere, at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_cancel(gate: *const Gate) -> i32 {
    handle::tell("engraft_gate_cancel", gate, |gate| gate.control.cancel())
}

/// Makes the running call wait until `engraft_gate_resume` or `engraft_gate_cancel`. May be called from anywhere,
/// at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_pause(gate: *const Gate) -> i32 {
    handle::tell("engraft_gate_pause", gate, |gate| gate.control.pause())
}

/// Undoes a pause or a cancellation. May be called from anywhere, at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_resume(gate: *const Gate) -> i32 {
    handle::tell("engraft_gate_resume", gate, |gate| gate.control.resume())
}

/// Sets how hot the device is (`ENGRAFT_THERMAL_*`), so that the comparison rests accordingly. May be called from
/// anywhere, at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_set_thermal(gate: *const Gate, thermal: i32) -> i32 {
    handle::call("engraft_gate_set_thermal", gate, |gate| control::set_thermal(&gate.control, thermal))
}
