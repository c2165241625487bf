//! A trainer's learned numbers, as a checkpoint stores them.

use super::chain::Evaluated;
use super::optim::AdamW;
use super::trainer::TrainOptions;
use crate::error::{Advice, Error, ErrorKind, Result};

/// What every trainer has beside its parameters and their gradients.
pub(super) struct State {
    pub(super) optimizer: AdamW,
    pub(super) options: TrainOptions,
    /// Factor on the schedule's rates.
    pub(super) rate_factor: f32,
    /// Optimizer steps done.
    pub(super) step: u64,
    /// Parameters of the best look; empty without one.
    pub(super) best: Vec<f32>,
    /// Whether a step failed after changing some parameters, or a restore failed midway.
    pub(super) broken: bool,
}

impl State {
    /// Before the first step, for so many trained parameters.
    pub(super) fn new(options: TrainOptions, trained: usize) -> State {
        let optimizer = AdamW::new(options.adamw, trained);
        State { optimizer, options, rate_factor: 1.0, step: 0, best: Vec::new(), broken: false }
    }

    /// The learning rate of the next step.
    pub(super) fn rate(&self) -> f32 {
        self.options.schedule.rate(self.step) * self.rate_factor
    }

    /// Stores these parameters as those of the best look.
    pub(super) fn keep_best(&mut self, theta: &[f32]) {
        self.best.clear();
        self.best.extend_from_slice(theta);
    }

    pub(super) fn numbers<'a>(&'a self, theta: &'a [f32]) -> Numbers<'a> {
        let AdamW { m, v, updates, .. } = &self.optimizer;
        Numbers { theta, m, v, best: &self.best, updates: *updates, steps: self.step, whole: !self.broken }
    }

    pub(super) fn numbers_mut<'a>(&'a mut self, theta: &'a mut [f32]) -> NumbersMut<'a> {
        let State { step: steps, best, broken, .. } = self;
        let AdamW { m, v, updates, .. } = &mut self.optimizer;
        NumbersMut { theta, m, v, best, updates, steps, broken }
    }

    /// The number of a step's targets, as a divisor.
    ///
    /// # Errors
    /// `BadData` if there is none.
    pub(super) fn counted(total: &Evaluated) -> Result<f64> {
        match total.targets {
            0 => Err(Error::new(ErrorKind::BadData, "the step has no token to train on")),
            targets => Ok(targets as f64),
        }
    }

    /// The error of the next step when it comes upon a NaN or an infinity.
    pub(super) fn not_finite(&self) -> Error {
        let what = format!("step {}: loss or gradient isn't finite", self.step + 1);
        Error::new(ErrorKind::NonFinite, what).advise(Advice::LowerRate)
    }
}

/// Parameters θ and the moments of those that are trained, in one order.
pub struct Numbers<'a> {
    /// Parameters.
    pub theta: &'a [f32],
    /// First moments.
    pub m: &'a [f32],
    /// Second moments.
    pub v: &'a [f32],
    /// Parameters of the best look; empty if there was none.
    pub best: &'a [f32],
    /// Updates of AdamW.
    pub updates: u64,
    /// Optimizer steps.
    pub steps: u64,
    /// Whether they are consistent: false after a step or restore failed midway.
    pub whole: bool,
}

/// The same, for filling.
pub struct NumbersMut<'a> {
    /// Parameters.
    pub theta: &'a mut [f32],
    /// First moments.
    pub m: &'a mut [f32],
    /// Second moments.
    pub v: &'a mut [f32],
    /// Parameters of the best look.
    pub best: &'a mut Vec<f32>,
    /// Updates of AdamW.
    pub updates: &'a mut u64,
    /// Optimizer steps.
    pub steps: &'a mut u64,
    /// Set while they are being filled; the trainer refuses to step meanwhile.
    pub broken: &'a mut bool,
}

impl Numbers<'_> {
    /// Refuses to write a NaN or an infinity.
    ///
    /// # Errors
    /// [`ErrorKind::NonFinite`], with its place.
    pub fn check(&self) -> Result<()> {
        let refuse = |problem: String| Err(Error::new(ErrorKind::NonFinite, problem));
        if !self.whole {
            return refuse(format!("step {} failed midway", self.steps + 1));
        }
        let parts = [
            ("parameter", self.theta),
            ("first moment", self.m),
            ("second moment", self.v),
            ("parameter of the best look", self.best),
        ];
        for (what, values) in parts {
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                return refuse(format!("step {}: {what} {at} is NaN or infinite", self.steps));
            }
        }
        Ok(())
    }
}
