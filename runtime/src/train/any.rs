//! What a training run trains: an adapter, or the whole model.

use super::chain::Evaluated;
use super::full::FullTrainer;
use super::numbers::{Numbers, NumbersMut, State};
use super::schedule::Schedule;
use super::trainer::{StepReport, Trainer};
use crate::data::Batch;
use crate::error::Result;

/// Either trainer.
pub enum AnyTrainer {
    /// An adapter beside frozen weights.
    Adapter(Box<Trainer>),
    /// Every weight.
    Full(Box<FullTrainer>),
}

impl AnyTrainer {
    fn state(&self) -> &State {
        match self {
            AnyTrainer::Adapter(trainer) => &trainer.state,
            AnyTrainer::Full(trainer) => &trainer.state,
        }
    }

    fn state_mut(&mut self) -> &mut State {
        match self {
            AnyTrainer::Adapter(trainer) => &mut trainer.state,
            AnyTrainer::Full(trainer) => &mut trainer.state,
        }
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.state().step
    }

    /// What a checkpoint stores of it.
    pub fn numbers(&self) -> Numbers<'_> {
        match self {
            AnyTrainer::Adapter(trainer) => trainer.numbers(),
            AnyTrainer::Full(trainer) => trainer.numbers(),
        }
    }

    /// The same, to be restored.
    ///
    /// # Errors
    /// Those of the trainer.
    pub fn numbers_mut(&mut self) -> Result<NumbersMut<'_>> {
        match self {
            AnyTrainer::Adapter(trainer) => Ok(trainer.numbers_mut()),
            AnyTrainer::Full(trainer) => trainer.numbers_mut(),
        }
    }

    /// One optimizer step.
    ///
    /// # Errors
    /// Those of the trainer.
    pub fn step(&mut self, micro: &[Batch]) -> Result<StepReport> {
        match self {
            AnyTrainer::Adapter(trainer) => trainer.step(micro),
            AnyTrainer::Full(trainer) => trainer.step(micro),
        }
    }

    /// Lets the next step of an adapter stay near the base on these rows, too.
    pub fn stay_near_base_on(&mut self, rows: Batch, weight: f32) {
        if let AnyTrainer::Adapter(trainer) = self {
            trainer.stay_near_base_on(rows, weight);
        }
    }

    /// Uses another schedule from the next step on, for runs whose length is known only once they have started.
    pub fn set_schedule(&mut self, schedule: Schedule) {
        self.state_mut().options.schedule = schedule;
    }

    /// Multiplies the schedule's rates from the next step on.
    pub fn set_rate_factor(&mut self, factor: f32) {
        self.state_mut().rate_factor = factor;
    }

    /// Loss of rows with the current parameters; before an adapter's first step, the base's.
    pub fn evaluate(&mut self, rows: impl Iterator<Item = Batch>) -> Evaluated {
        match self {
            AnyTrainer::Adapter(trainer) => {
                let begun = trainer.state.step > 0 || trainer.adapter().meta.steps > 0;
                trainer.evaluate(rows, begun)
            }
            AnyTrainer::Full(trainer) => trainer.evaluate(rows),
        }
    }

    /// Stores the current parameters as those of the best look.
    pub fn keep_best(&mut self) {
        match self {
            AnyTrainer::Adapter(trainer) => trainer.keep_best(),
            AnyTrainer::Full(trainer) => trainer.keep_best(),
        }
    }
}
