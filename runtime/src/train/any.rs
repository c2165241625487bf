//! What a training run trains: an adapter, or the whole model.

use super::chain::Evaluated;
use super::full::FullTrainer;
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
    /// Steps done.
    pub fn steps(&self) -> u64 {
        match self {
            AnyTrainer::Adapter(trainer) => trainer.steps(),
            AnyTrainer::Full(trainer) => trainer.steps(),
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

    /// Takes another schedule from the next step on.
    pub fn set_schedule(&mut self, schedule: Schedule) {
        match self {
            AnyTrainer::Adapter(trainer) => trainer.set_schedule(schedule),
            AnyTrainer::Full(trainer) => trainer.set_schedule(schedule),
        }
    }

    /// Loss of rows with the current parameters; before the first step, the base's.
    pub fn evaluate(&mut self, rows: impl Iterator<Item = Batch>) -> Evaluated {
        match self {
            AnyTrainer::Adapter(trainer) => {
                let begun = trainer.steps() > 0;
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
