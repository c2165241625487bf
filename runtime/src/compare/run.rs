//! One arm's training: steps within a budget, a look at the validation rows now and then, and the
//! parameters of the best look.

use std::time::Instant;

use super::material::Material;
use super::recipe::{Base, Budget, Method, Recipe};
use super::{Watcher, rate};
use crate::adapter::Adapter;
use crate::data::batches::in_order;
use crate::data::{Batch, Batches, Cursor, Example};
use crate::error::{Error, ErrorKind, Result};
use crate::gate::report::{CurvePoint, RateTest, Run};
use crate::model::tuned::TunedModel;
use crate::plan::{ArenaWords, Request};
use crate::rng::Rng;
use crate::train::guard::FAILED_MAX;
use crate::train::optim::AdamWConfig;
use crate::train::schedule::{Schedule, Shape};
use crate::train::{Arm, FullTrainer, TrainOptions, Trainer, Training};

/// The random stream of an adapter's initial values.
const INIT_STREAM: u64 = 0x494E_4954;
/// Part of a run that the rate grows over.
const WARMUP_SHARE: f64 = 0.05;
/// Steps that tell how long one takes, where minutes are the budget.
const TIMED_STEPS: u64 = 5;

/// What training gave.
pub enum Trained {
    /// An adapter, not bound yet.
    Adapter(Box<Adapter>),
    /// Every weight.
    Full(std::sync::Arc<TunedModel>),
}

/// Trains as a recipe says.
///
/// # Errors
/// `DoesNotFit` beyond `memory` bytes; `Cancelled`; those of the trainers, but a loss that is no number only
/// ends the run.
pub fn train(
    recipe: &Recipe,
    base: &Base,
    material: &Material,
    memory: Option<u64>,
    watcher: &mut dyn Watcher,
) -> Result<(Trained, Run, Option<RateTest>)> {
    recipe.check(base, material, memory)?;
    let (request, plan) = recipe.plan(base, material, memory);
    watcher.begin_peak();
    let tested = match recipe.rate {
        Some(_) => None,
        None => Some(rate::test(recipe, base, material, &request, watcher)?),
    };
    let peak_rate = recipe.rate.or(tested.as_ref().map(|t| t.chosen)).unwrap_or_default();
    let mut arm = arm(recipe, base, &request, peak_rate)?;
    let rows = recipe.rows(material);
    let mut course = Course::new(recipe, &rows, material, peak_rate);
    course.go(&mut arm, watcher)?;
    let run = Run {
        arm: recipe.name.clone(),
        what: recipe.method.describe(),
        parameters: recipe.method.parameters(base.model.config()) as u64,
        learning_rate: peak_rate,
        curve: course.curve,
        steps: arm.steps(),
        best_step: course.best_step,
        ended: course.ended,
        tokens: course.tokens,
        seconds: course.seconds,
        planned_bytes: plan.private_bytes as u64,
        peak_bytes: watcher.peak_bytes(),
    };
    let (best, targets) = (course.best, course.targets);
    let trained = match arm {
        Arm::Adapter(trainer) => {
            let mut adapter = trainer.into_adapter();
            adapter.theta = best;
            (adapter.meta.steps, adapter.meta.tokens) = (course.best_step, targets);
            adapter.meta.valid_loss_before = course.first.map(|l| l as f32);
            adapter.meta.valid_loss_after = course.lowest.map(|l| l as f32);
            Trained::Adapter(Box::new(adapter))
        }
        Arm::Full(trainer) => {
            let mut tuned = trainer.into_weights();
            if let Some(model) = std::sync::Arc::get_mut(&mut tuned) {
                model.values_mut().copy_from_slice(&best);
            }
            Trained::Full(tuned)
        }
    };
    Ok((trained, run, tested))
}

/// The trainer of a recipe, before its first step.
///
/// # Errors
/// `Misuse` for an adapter that does not fit the model.
pub(super) fn arm(recipe: &Recipe, base: &Base, request: &Request, rate: f64) -> Result<Arm> {
    let options = TrainOptions {
        adamw: AdamWConfig {
            weight_decay: recipe.weight_decay,
            max_grad_norm: recipe.max_grad_norm,
            ..AdamWConfig::default()
        },
        schedule: Schedule { shape: Shape::Constant, peak: rate as f32, warmup: 0, total: u64::MAX },
        seed: recipe.seed,
        precision: base.precision,
        gradient: base.gradient,
        kl: recipe.kl,
    };
    let (model, kernels) = (base.model.clone(), base.kernels.clone());
    let words = ArenaWords::new(model.config(), request);
    Ok(match &recipe.method {
        Method::Adapter(lora) => {
            let mut random = Rng::new(recipe.seed, INIT_STREAM);
            let mut adapter = Adapter::init_on(&model, &kernels, lora, &mut || random.f32())?;
            adapter.meta.base_name = model.gguf().string("general.name")?.unwrap_or_default().to_owned();
            adapter.meta.seed = recipe.seed;
            Arm::Adapter(Box::new(Trainer::new(model, kernels, words, adapter, options)))
        }
        Method::Full(_) => Arm::Full(Box::new(FullTrainer::new(model, kernels, words, options))),
    })
}

/// A run on its way.
struct Course<'a> {
    recipe: &'a Recipe,
    rows: &'a [Example],
    material: &'a Material,
    rate: f64,
    /// Steps of the whole run, once that is known.
    total: Option<u64>,
    curve: Vec<CurvePoint>,
    /// Losses since the last point, summed, and their targets.
    recent: (f64, usize),
    /// Validation loss before the first step, and the lowest.
    first: Option<f64>,
    lowest: Option<f64>,
    best_step: u64,
    /// The parameters of the best step: those of the beginning until a look finds a lower loss.
    best: Vec<f32>,
    /// Evaluations since the best one.
    waited: u64,
    /// Failed steps since the last good one.
    failed: u32,
    ended: String,
    tokens: u64,
    targets: u64,
    seconds: f64,
}

impl<'a> Course<'a> {
    fn new(recipe: &'a Recipe, rows: &'a [Example], material: &'a Material, rate: f64) -> Course<'a> {
        let batches = rows.len().div_ceil(recipe.batch.min(rows.len())) as f64;
        let per_batch = rows.iter().map(|e| e.rows()).sum::<usize>() as f64 / batches;
        let steps = |n: f64| Some((n.round() as u64).max(1));
        let total = match recipe.budget {
            Budget::Steps(n) => Some(n.max(1)),
            Budget::Epochs(n) => steps(n * batches),
            Budget::Tokens(n) => steps(n as f64 / per_batch),
            Budget::Minutes(_) => None,
        };
        Course {
            recipe,
            rows,
            material,
            rate,
            total,
            curve: Vec::new(),
            recent: (0.0, 0),
            first: None,
            lowest: None,
            best_step: 0,
            best: Vec::new(),
            waited: 0,
            failed: 0,
            ended: String::new(),
            tokens: 0,
            targets: 0,
            seconds: 0.0,
        }
    }

    /// All steps, or as many as help.
    fn go(&mut self, arm: &mut Arm, watcher: &mut dyn Watcher) -> Result<()> {
        let (recipe, rows) = (self.recipe, self.rows);
        let mut batches = Batches::new(rows, recipe.batch.min(rows.len()), recipe.seed, Cursor::default());
        let mut micro = [Batch::default()];
        self.look(arm, watcher)?;
        self.schedule(arm);
        while self.ended.is_empty() {
            watcher.go_on()?;
            batches.next_into(&mut micro[0]);
            let started = Instant::now();
            let report = match arm.step(&micro) {
                Ok(report) => report,
                Err(error) if error.kind() == ErrorKind::NonFinite => {
                    self.failed += 1;
                    // One bad batch is passed over; beyond that the best look is what a run returns to.
                    if self.failed < FAILED_MAX && arm.numbers().whole {
                        continue;
                    }
                    self.ended = format!("step {}: the loss was no number", arm.steps() + 1);
                    break;
                }
                Err(error) => return Err(error),
            };
            self.failed = 0;
            self.seconds += started.elapsed().as_secs_f64();
            self.tokens += report.tokens as u64;
            self.targets += report.targets as u64;
            self.recent.0 += report.loss * report.targets as f64;
            self.recent.1 += report.targets;
            let step = arm.steps();
            watcher.step(&recipe.name, step, self.total, report.loss, self.tokens as f64 / self.seconds);
            self.time(arm);
            if self.is_due(step) {
                self.look(arm, watcher)?;
            }
            self.end(step);
        }
        Ok(())
    }

    /// Fixes the length of a run of minutes once some steps tell how long one takes.
    fn time(&mut self, arm: &mut Arm) {
        if let (Budget::Minutes(minutes), None) = (self.recipe.budget, self.total)
            && arm.steps() == TIMED_STEPS
        {
            let steps = minutes * 60.0 / (self.seconds / TIMED_STEPS as f64);
            self.total = Some((steps as u64).max(TIMED_STEPS));
            self.schedule(arm);
        }
    }

    /// Linear to zero, after a short warmup; constant until the length is known.
    fn schedule(&self, arm: &mut Arm) {
        let total = self.total.unwrap_or(u64::MAX);
        let warmup = match self.total {
            Some(total) => (total as f64 * WARMUP_SHARE).ceil() as u64,
            None => TIMED_STEPS,
        };
        let shape = if self.total.is_some() { Shape::Linear } else { Shape::Constant };
        arm.set_schedule(Schedule { shape, peak: self.rate as f32, warmup, total });
    }

    fn is_due(&self, step: u64) -> bool {
        // What the last steps gave counts too.
        if self.is_late() {
            return true;
        }
        let Some(total) = self.total else { return false };
        let every = (total / self.recipe.evaluations.max(1)).max(1);
        step == total || step.is_multiple_of(every)
    }

    /// A machine that slows down must not take longer than it was given.
    fn is_late(&self) -> bool {
        matches!(self.recipe.budget, Budget::Minutes(minutes) if self.seconds > 1.1 * 60.0 * minutes)
    }

    fn end(&mut self, step: u64) {
        let patience = self.recipe.patience;
        if self.total == Some(step) {
            self.ended = "all steps done".into();
        } else if patience > 0 && self.waited >= patience {
            self.ended = format!("no better for {patience} evaluations");
        } else if self.is_late() {
            self.ended = "time budget spent".into();
        }
    }

    /// Loss of the validation rows; keeps the parameters if they are the best so far.
    fn look(&mut self, arm: &mut Arm, watcher: &mut dyn Watcher) -> Result<()> {
        let mut stopped = None;
        let rows = in_order(&self.material.valid.data.examples, 1).take_while(|_| {
            stopped = watcher.go_on().err();
            stopped.is_none()
        });
        let found = arm.evaluate(rows);
        if let Some(error) = stopped {
            return Err(error);
        }
        let loss = found.loss_sum / found.targets as f64;
        let (step, recent) = (arm.steps(), self.recent);
        let train = (recent.1 > 0).then(|| recent.0 / recent.1 as f64);
        self.recent = (0.0, 0);
        self.curve.push(CurvePoint { step, train, valid: Some(loss).filter(|l| l.is_finite()) });
        watcher.look(&self.recipe.name, step, loss);
        if step == 0 {
            if !loss.is_finite() {
                let message = "the validation loss of the base is no number: the model is broken";
                return Err(Error::new(ErrorKind::NonFinite, message));
            }
            (self.first, self.lowest) = (Some(loss), Some(loss));
            arm.copy_into(&mut self.best);
        } else if self.lowest.is_some_and(|lowest| loss < lowest) {
            (self.lowest, self.best_step, self.waited) = (Some(loss), step, 0);
            arm.copy_into(&mut self.best);
        } else {
            self.waited += 1;
        }
        Ok(())
    }
}
