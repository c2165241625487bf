//! The gate: arms are trained and compared on held-out rows, and only what is better than doing nothing, and
//! than a better prompt, may be promoted.

use std::ffi::{c_char, c_void};
use std::sync::Arc;
use std::time::Instant;

use engraft_runtime::adapter::LoraConfig;
use engraft_runtime::compare::answers::Metric;
use engraft_runtime::compare::material::{Limits, Material};
use engraft_runtime::compare::recipe::{Base, Budget, Method, Recipe, choose_rank};
use engraft_runtime::compare::retention::RetentionSet;
use engraft_runtime::compare::shots::Choice;
use engraft_runtime::compare::{Kept, Outcome, Watcher, compare};
use engraft_runtime::gate::retention;
use engraft_runtime::gate::task::Task;
use engraft_runtime::gate::verdict::{Decision, Thresholds};
use engraft_runtime::model::Proj;
use engraft_runtime::model::text::Text;
use engraft_runtime::nn::divergence::{Direction, KlPenalty};
use engraft_runtime::plan::room;
use engraft_runtime::{Error, ErrorKind, compare as comparing};

use crate::adapter::{self, Adapter};
use crate::caller::{self, Out, number, or, structs};
use crate::control::Control;
use crate::data::{self, Data};
use crate::error::{ENGRAFT_GATE_REFUSED, Failure, Result};
use crate::handle::{self, Exclusive, Kind};
use crate::model::{self, Model};
use crate::trainer::{
    ENGRAFT_EVENT_HELD, ENGRAFT_EVENT_NOTE, ENGRAFT_EVENT_STEP, ENGRAFT_EVENT_VALIDATION, Listener, Progress,
    ProgressCallback,
};

/// Examples in the prompt.
pub const ENGRAFT_ARM_FEW_SHOT: u32 = 1;
/// A LoRA adapter.
pub const ENGRAFT_ARM_LORA: u32 = 2;
/// A DoRA adapter.
pub const ENGRAFT_ARM_DORA: u32 = 4;

/// Answers are not compared, beyond what the data's task says.
pub const ENGRAFT_METRIC_NONE: u32 = 0;
/// Answers are compared word for word, white space aside.
pub const ENGRAFT_METRIC_EXACT: u32 = 1;
/// Answers are compared as JSON, all fields equal.
pub const ENGRAFT_METRIC_JSON: u32 = 2;

/// Nothing was judged yet.
pub const ENGRAFT_DECISION_NONE: u32 = 0;
/// A trained arm is to be promoted.
pub const ENGRAFT_DECISION_PROMOTE: u32 = 1;
/// Examples in the prompt do as well without training.
pub const ENGRAFT_DECISION_KEEP_PROMPTING: u32 = 2;
/// The base alone stays.
pub const ENGRAFT_DECISION_KEEP_BASE: u32 = 3;

/// Settings of a comparison that says nothing; the command line's.
const SHOTS: u32 = 5;
const STEPS: u32 = 300;
const ANSWER_TOKENS: u32 = 256;
const SAMPLES: usize = 4;
const EVALUATIONS: u32 = 10;
const PATIENCE: u64 = 3;
/// What reports call the caller's own text.
const OWN_RETENTION: &str = "own";
/// A rank to begin with, where it is searched, and alpha/r.
const RANK: u32 = 8;
const SCALE: f32 = 2.0;

/// A comparison of arms, with its verdict. One call at a time; what steers it may be called from anywhere.
pub struct Gate {
    _opaque: [u8; 0],
}

impl Kind for Gate {
    type Value = Value;
    const NAME: &'static str = "gate";

    fn close(value: &Value) -> bool {
        value.trial.close()
    }
}

/// What is behind a gate handle.
pub(crate) struct Value {
    control: Control,
    pub(crate) trial: Exclusive<Trial>,
}

/// A comparison, before and after.
pub(crate) struct Trial {
    pub(crate) model: Arc<model::Inner>,
    data: Arc<data::Inner>,
    params: GateParams,
    /// The caller's own text that must not be forgotten; may be empty.
    retention: String,
    outcome: Option<Outcome>,
}

/// What is compared. Zero is the default of everything.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct GateParams {
    /// `sizeof(engraft_gate_params)`.
    pub struct_size: u32,
    /// `ENGRAFT_ARM_*` beside the base alone (0: all). Without few-shot, training need not beat it.
    pub arms: u32,
    /// Examples in a few-shot prompt, at most 64 (0: 5).
    pub shots: u32,
    /// Steps of each trained arm (0: 300).
    pub steps: u32,
    /// Sequences of a step (0: 1).
    pub batch_size: u32,
    /// Rank of the adapters (0: the largest that memory and rows allow, up to 16).
    pub rank: u32,
    /// `ENGRAFT_METRIC_*`; data of a task is compared as the task says.
    pub metric: u32,
    /// Tokens of an answer at most, up to 65536 (0: 256).
    pub answer_tokens: u32,
    /// Training rows at most (0: all).
    pub train_rows: u32,
    /// Held-out rows at most (0: all).
    pub held_out_rows: u32,
    /// Held-out rows below which nothing is decided (0: 20).
    pub examples_min: u32,
    /// Bootstrap resamples (0: 10000).
    pub resamples: u32,
    /// Looks at the validation rows in a run (0: 10).
    pub evaluations: u32,
    /// Threads (0: as many as there are cores).
    pub threads: u32,
    /// 1 keeps activations in 32 bits.
    pub exact: u32,
    /// 1 lets a lower loss alone win, where answers are compared.
    pub loss_alone: u32,
    /// 1 leaves out the text that is built in, which training must not harm. Then name one of your own.
    pub no_built_in_retention: u32,
    /// 0.
    pub reserved: u32,
    /// Minutes to train, shared by the trained arms, instead of steps (0: steps count).
    pub minutes: f64,
    /// Learning rate at its highest (0: found by a range test).
    pub learning_rate: f64,
    /// Two-sided level of the intervals and tests (0: 0.05).
    pub level: f64,
    /// Seed of adapters, examples and the bootstrap.
    pub seed: u64,
    /// Bytes of private memory that training and scoring may take (0: what the machine leaves this process).
    pub memory_budget: u64,
    /// A text that training must not harm, beside the one that is built in: UTF-8, in passages behind lines that
    /// begin with `%% `, or as one. The library keeps a copy. NULL for none.
    pub retention: *const c_char,
    /// Bytes of `retention`.
    pub retention_length: usize,
    /// Weight of the divergence from the base in each token's loss, 0 to 1e6 (0: none); half as much time again.
    pub kl_weight: f64,
}

// SAFETY: numbers, and a text that is copied in the call that it is given to and never read afterwards.
unsafe impl Send for GateParams {}
// SAFETY: the same.
unsafe impl Sync for GateParams {}

structs!(GateParams = "engraft_gate_params");

impl Trial {
    /// What came of it.
    ///
    /// # Errors
    /// `MISUSE` before the comparison was run.
    pub(crate) fn outcome(&self) -> Result<&Outcome> {
        self.outcome.as_ref().ok_or_else(|| Failure::misuse("nothing was judged yet: call engraft_gate_run"))
    }

    /// What the verdict names.
    ///
    /// # Errors
    /// `GATE_REFUSED` where the base alone stays, or where each question has examples of its own.
    pub(crate) fn winner(&self) -> Result<&Kept> {
        let outcome = self.outcome()?;
        let kept = match &outcome.verdict.decision {
            Decision::Promote { arm } | Decision::KeepPrompting { arm, .. } => outcome.kept(arm),
            Decision::KeepBase => None,
        };
        match kept {
            Some(kept @ Kept::Adapter(_)) => Ok(kept),
            Some(kept @ Kept::FewShot(messages)) if !messages.is_empty() => Ok(kept),
            _ => Err(Failure::new(ENGRAFT_GATE_REFUSED, outcome.verdict.sentence.clone())),
        }
    }

    /// Reads everything, and takes all arms through.
    fn run(&mut self, control: &Control, listener: &Listener) -> Result<()> {
        self.outcome = None;
        let (p, file, text) = (&self.params, &self.model.file, self.model.text()?);
        let limit = |n: u32| (n > 0).then_some(n as usize);
        let limits = Limits { train_rows: limit(p.train_rows), held_out_rows: limit(p.held_out_rows) };
        let options = &self.data.options;
        let material = Material::read_from(self.data.parts(), &text, options, limits)?;
        self.data.check_unchanged()?;
        let precision = model::precision(p.exact);
        let base = Base {
            tokenizer_bytes: Text::heap_bytes(file)? + self.data.text_bytes() + self.data.rows_bytes(),
            model: file.clone(),
            kernels: model::kernels(p.threads)?,
            precision,
            gradient: precision.into(),
        };
        let mut watcher = Looker::new(control, listener);
        let settings = settings(self, &base, &material, &text, &mut watcher)?;
        let judged = compare(&base, &material, (&text, options), &settings, &mut watcher)?;
        // Behind the last question whether to go on.
        if let Some(refused) = watcher.refused {
            return Err(refused);
        }
        control.check()?;
        self.outcome = Some(judged);
        Ok(())
    }

    /// What must not be forgotten.
    fn retention(&self, text: &Text) -> Result<Vec<RetentionSet>> {
        let built_in = (self.params.no_built_in_retention == 0).then(retention::passages);
        let own = (!self.retention.is_empty()).then(|| retention::split(&self.retention));
        let mut all = Vec::new();
        for (name, passages) in [(retention::NAME, built_in), (OWN_RETENTION, own)] {
            if let Some(passages) = passages {
                let passages: Vec<&str> = passages.iter().map(|passage| passage.text).collect();
                all.push(RetentionSet::of_text(name, &passages, text, self.data.options.max_seq_length)?);
            }
        }
        Ok(all)
    }

    fn decision(&self) -> (u32, &str) {
        let Some(outcome) = &self.outcome else { return (ENGRAFT_DECISION_NONE, "") };
        match &outcome.verdict.decision {
            Decision::Promote { arm } => (ENGRAFT_DECISION_PROMOTE, arm),
            Decision::KeepPrompting { arm, .. } => (ENGRAFT_DECISION_KEEP_PROMPTING, arm),
            Decision::KeepBase => (ENGRAFT_DECISION_KEEP_BASE, ""),
        }
    }
}

impl GateParams {
    /// Refuses what no comparison could be made with, before anything is read.
    ///
    /// # Errors
    /// `MISUSE` that names the field.
    fn check(&self, task: Option<Task>, has_retention: bool) -> Result<()> {
        caller::unused(self.reserved)?;
        for (name, value, max) in [
            ("shots", self.shots, 64),
            ("steps", self.steps, 100_000_000),
            ("batch_size", self.batch_size, 4096),
            ("rank", self.rank, 256),
            ("answer_tokens", self.answer_tokens, 1 << 16),
            ("resamples", self.resamples, 1_000_000),
            ("evaluations", self.evaluations, 1_000_000),
        ] {
            if value > max {
                return Err(Failure::misuse(format!("{name} is {value}, and must be at most {max}")));
            }
        }
        let trained = self.arms()? & (ENGRAFT_ARM_LORA | ENGRAFT_ARM_DORA) != 0;
        if trained && self.no_built_in_retention != 0 && !has_retention {
            let message = "no_built_in_retention is 1, and retention names no text: what training forgets would \
                           be unknown, and nothing trained could win";
            return Err(Failure::misuse(message));
        }
        self.metric(task)?;
        model::threads(self.threads)?;
        for checked in [self.minutes(), self.rate(), self.level(), self.kl()] {
            checked?;
        }
        Ok(())
    }

    fn arms(&self) -> Result<u32> {
        let all = ENGRAFT_ARM_FEW_SHOT | ENGRAFT_ARM_LORA | ENGRAFT_ARM_DORA;
        match self.arms {
            0 => Ok(all),
            arms if arms & !all == 0 => Ok(arms),
            arms => Err(Failure::misuse(format!("arms is {arms:#x}: no such arms"))),
        }
    }

    fn metric(&self, task: Option<Task>) -> Result<Option<Metric>> {
        match (task, self.metric) {
            (Some(task), _) => Ok(Some(Metric::Numeric(task))),
            (None, ENGRAFT_METRIC_NONE) => Ok(None),
            (None, ENGRAFT_METRIC_EXACT) => Ok(Some(Metric::Exact)),
            (None, ENGRAFT_METRIC_JSON) => Ok(Some(Metric::Json)),
            (None, other) => Err(Failure::misuse(format!("{other} is no metric"))),
        }
    }

    fn minutes(&self) -> Result<f64> {
        number(self.minutes, (0.0, None), 0.0..=1e6, "minutes")
    }

    fn rate(&self) -> Result<f64> {
        number(self.learning_rate, (0.0, None), 0.0..=1.0, "learning_rate")
    }

    fn level(&self) -> Result<f64> {
        number(self.level, (Thresholds::default().alpha, None), 1e-6..=0.5, "level")
    }

    fn kl(&self) -> Result<f64> {
        number(self.kl_weight, (0.0, None), 0.0..=1e6, "kl_weight")
    }

    /// The bytes that hold here: those asked for, and no more than the machine leaves. None where nobody asked,
    /// and the machine has what the arms take unasked.
    fn limit(&self, recipes: &[Recipe], base: &Base, material: &Material) -> Option<u64> {
        let room = room::here(base.kernels.threads()).map(|room| room.bytes);
        if self.memory_budget > 0 {
            return Some(room.map_or(self.memory_budget, |room| room.min(self.memory_budget)));
        }
        let private = |recipe: &Recipe| recipe.plan(base, material, None).1.private_bytes as u64;
        room.filter(|room| recipes.iter().any(|recipe| private(recipe) > *room))
    }
}

/// The settings of the comparison.
fn settings(
    trial: &Trial,
    base: &Base,
    material: &Material,
    text: &Text,
    watcher: &mut Looker<'_>,
) -> Result<comparing::Settings> {
    let p = &trial.params;
    let few_shot = p.arms()? & ENGRAFT_ARM_FEW_SHOT != 0;
    let recipes = recipes(p, base, material, watcher)?;
    let memory_budget = p.limit(&recipes, base, material);
    let plain = Thresholds::default();
    Ok(comparing::Settings {
        title: "adapt".into(),
        shots: if few_shot { vec![(or(p.shots, SHOTS), Choice::Seeded(p.seed))] } else { Vec::new() },
        recipes,
        metric: p.metric(trial.data.task)?,
        answer_tokens: or(p.answer_tokens, ANSWER_TOKENS),
        retention: trial.retention(text)?,
        thresholds: Thresholds {
            alpha: p.level()?,
            examples_min: if p.examples_min == 0 { plain.examples_min } else { p.examples_min as usize },
            resamples: if p.resamples == 0 { plain.resamples } else { p.resamples as usize },
            few_shot_required: few_shot,
            accuracy_required: p.loss_alone == 0,
            ..plain
        },
        seed: p.seed,
        samples: SAMPLES,
        memory_budget,
        folder: None,
    })
}

/// One recipe for each trained arm that memory allows; the others are told of.
///
/// # Errors
/// `DOES_NOT_FIT` where nothing is left that the base could be compared with.
fn recipes(
    p: &GateParams,
    base: &Base,
    material: &Material,
    watcher: &mut Looker<'_>,
) -> Result<Vec<Recipe>> {
    let kinds = [(ENGRAFT_ARM_LORA, "lora"), (ENGRAFT_ARM_DORA, "dora")];
    let arms = p.arms()?;
    let kinds: Vec<_> = kinds.into_iter().filter(|(arm, _)| arms & arm != 0).collect();
    let minutes = p.minutes()?;
    let length = match minutes > 0.0 {
        true => Budget::Minutes(minutes / kinds.len().max(1) as f64),
        false => Budget::Steps(or(p.steps, STEPS) as u64),
    };
    let (mut recipes, mut held, mut left_out) = (Vec::new(), 0, None);
    for (arm, name) in kinds {
        let mut recipe = recipe(p, name, arm == ENGRAFT_ARM_DORA, length, base)?;
        // What an arm has trained stays in memory while the next one trains.
        match fit(&mut recipe, p, &base.beside(held), material) {
            Ok(()) => {
                held += size_of::<f32>() * recipe.method.parameters(base.model.config());
                recipes.push(recipe);
            }
            Err(error) if error.kind() == ErrorKind::DoesNotFit => {
                watcher.note(&format!("left out: {}", error.message()));
                left_out = Some(error);
            }
            Err(error) => return Err(error.into()),
        }
    }
    match left_out.filter(|_| recipes.is_empty() && arms & ENGRAFT_ARM_FEW_SHOT == 0) {
        Some(error) => Err(error.into()),
        None => Ok(recipes),
    }
}

fn recipe(p: &GateParams, name: &str, dora: bool, budget: Budget, base: &Base) -> Result<Recipe> {
    let (c, rank) = (base.model.config(), or(p.rank, RANK));
    let layers: Vec<usize> = (0..c.n_layers).collect();
    let plain = LoraConfig::new(c, rank, SCALE * rank as f32, 0.0, &Proj::ALL, &layers)?;
    let (rate, kl) = (p.rate()?, p.kl()?);
    Ok(Recipe {
        name: name.to_string(),
        method: Method::Adapter(LoraConfig { dora, ..plain }.checked(c)?),
        rate: (rate > 0.0).then_some(rate),
        budget,
        batch: or(p.batch_size, 1),
        seed: p.seed,
        evaluations: or(p.evaluations, EVALUATIONS) as u64,
        patience: PATIENCE,
        weight_decay: 0.0,
        max_grad_norm: 1.0,
        kl: (kl > 0.0).then_some(KlPenalty { weight: kl as f32, direction: Direction::Forward }),
        replay: Vec::new(),
    })
}

/// A rank that fits, where none was asked for.
fn fit(
    recipe: &mut Recipe,
    p: &GateParams,
    base: &Base,
    material: &Material,
) -> std::result::Result<(), Error> {
    if p.rank == 0 {
        let limit = p.limit(std::slice::from_ref(recipe), base, material);
        recipe.method = Method::Adapter(choose_rank(recipe, base, material, limit)?);
    }
    let limit = p.limit(std::slice::from_ref(recipe), base, material);
    recipe.check(base, material, limit).map(drop)
}

/// Looks on, tells the caller, and stops, holds and cools the comparison.
struct Looker<'a> {
    control: &'a Control,
    listener: &'a Listener,
    /// Why the caller wants it to end.
    refused: Option<Failure>,
    valid_loss: f64,
    began: Instant,
    /// Since when it works without rest.
    working: Instant,
}

impl<'a> Looker<'a> {
    fn new(control: &'a Control, listener: &'a Listener) -> Looker<'a> {
        let now = Instant::now();
        Looker { control, listener, refused: None, valid_loss: f64::NAN, began: now, working: now }
    }

    fn tell(&mut self, progress: Progress, text: &str) {
        let seconds = self.began.elapsed().as_secs_f64();
        let progress = Progress { valid_loss: self.valid_loss, seconds, ..progress.with_text(text) };
        // What is being told can't fail; the next question whether to go on answers for it.
        if let Err(refused) = self.listener.tell(&progress) {
            self.refused.get_or_insert(refused);
        }
    }
}

impl Watcher for Looker<'_> {
    fn go_on(&mut self) -> std::result::Result<(), Error> {
        let (control, worked) = (self.control, self.working.elapsed());
        let heard = |refused: &Option<Failure>| refused.clone().map_or(Ok(()), Err);
        heard(&self.refused).map_err(Failure::into_error)?;
        let rested = control.rest(worked, &mut || {
            self.tell(Progress::of(ENGRAFT_EVENT_HELD), "");
            heard(&self.refused)
        });
        self.working = Instant::now();
        rested.map_err(Failure::into_error)
    }

    fn note(&mut self, text: &str) {
        self.tell(Progress::of(ENGRAFT_EVENT_NOTE), text);
    }

    fn step(&mut self, arm: &str, step: u64, total: Option<u64>, loss: f64, tokens_per_s: f64) {
        let steps = total.unwrap_or(0);
        self.tell(Progress { step, steps, loss, tokens_per_s, ..Progress::of(ENGRAFT_EVENT_STEP) }, arm);
    }

    fn look(&mut self, arm: &str, step: u64, loss: f64) {
        self.valid_loss = loss;
        self.tell(Progress { step, ..Progress::of(ENGRAFT_EVENT_VALIDATION) }, arm);
    }

    fn begin_peak(&mut self) {}

    /// An app measures itself: this process is not ours alone.
    fn peak_bytes(&mut self) -> Option<u64> {
        None
    }
}

/// Makes all settings the default. `struct_size` is `sizeof(engraft_gate_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_default_params(params: *mut GateParams, struct_size: usize) -> i32 {
    handle::alone("engraft_gate_default_params", || {
        // SAFETY: the crate's contract, for the caller's struct.
        unsafe { caller::default_settings(params, struct_size) }
    })
}

/// Makes a gate for data; nothing is computed yet. `params` may be NULL. `*gate` is freed with
/// `engraft_gate_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_create(
    model: *const Model,
    data: *const Data,
    params: *const GateParams,
    gate: *mut *mut Gate,
) -> i32 {
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::clear(gate) };
    handle::call("engraft_gate_create", model, |model| {
        // SAFETY: the crate's contract, for the caller's place and struct.
        let (out, params) = unsafe { (Out::new(gate)?, caller::settings(params)?) };
        let data = handle::find(data)?.value.clone();
        data.check_of(model)?;
        // SAFETY: the crate's contract, for the text that the struct names.
        let retention = unsafe { caller::text(params.retention, params.retention_length, "retention") }?;
        params.check(data.task, !retention.is_empty())?;
        let retention = retention.to_owned();
        let trial = Trial { model: model.clone(), data, params, retention, outcome: None };
        out.publish(Value { control: Control::default(), trial: Exclusive::new(trial) })
    })
}

/// Frees a gate and what it kept. `BUSY` while a call runs on it. NULL is nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_free(gate: *mut Gate) -> i32 {
    handle::free("engraft_gate_free", gate)
}

/// Trains and measures all arms, and judges them: 0 whatever the verdict is. `callback` may be NULL; false
/// from it ends the call with `CANCELLED`, and nothing is judged. What an earlier run judged is gone as soon as
/// this begins. `BAD_DATA` where the data is of files that have changed since they were opened.
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

/// Puts the decision (`ENGRAFT_DECISION_*`) into `*decision`, and copies the name of the arm that it names,
/// which may be empty; see `engraft_message` for the buffer.
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

/// Copies the report as one HTML page, which holds sample rows and answers to them; see `engraft_message`
/// for the buffer.
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

/// Copies what the verdict names: an adapter, or examples. `GATE_REFUSED` where the base alone stays.
/// `*adapter` is freed with `engraft_adapter_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_adapter(gate: *const Gate, adapter: *mut *mut Adapter) -> i32 {
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::clear(adapter) };
    handle::call("engraft_gate_adapter", gate, |gate| {
        // SAFETY: the crate's contract, for the caller's place.
        let out = unsafe { Out::new(adapter) }?;
        let trial = gate.trial.enter()?;
        let found = match trial.winner()? {
            Kept::FewShot(messages) => adapter::Inner::without_parameters(&trial.model, messages.clone()),
            Kept::Adapter(parameters) => {
                let kernels = model::kernels(trial.params.threads)?;
                adapter::Inner::trusted(&trial.model, &kernels, (**parameters).clone())?
            }
            Kept::File(_) | Kept::Model(_) => return Err(Failure::misuse("what won is a file")),
        };
        out.publish(found)
    })
}

/// Ends the call that runs, and those that follow, with `CANCELLED`, until `engraft_gate_resume`. From
/// anywhere, at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_cancel(gate: *const Gate) -> i32 {
    handle::call("engraft_gate_cancel", gate, |gate| {
        gate.control.cancel();
        Ok(())
    })
}

/// Lets the call that runs wait, until `engraft_gate_resume` or `engraft_gate_cancel`. From anywhere, at any
/// time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_pause(gate: *const Gate) -> i32 {
    handle::call("engraft_gate_pause", gate, |gate| {
        gate.control.pause();
        Ok(())
    })
}

/// Takes back a pause and a cancellation. From anywhere, at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_resume(gate: *const Gate) -> i32 {
    handle::call("engraft_gate_resume", gate, |gate| {
        gate.control.resume();
        Ok(())
    })
}

/// Says how hot the device is (`ENGRAFT_THERMAL_*`): the comparison rests accordingly. From anywhere, at any
/// time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_gate_set_thermal(gate: *const Gate, thermal: i32) -> i32 {
    handle::call("engraft_gate_set_thermal", gate, |gate| gate.control.set_thermal(thermal))
}
