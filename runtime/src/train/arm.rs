//! What a training run trains: an adapter, or the whole model.

use super::chain::Evaluated;
use super::course::Training;
use super::full::FullTrainer;
use super::schedule::Schedule;
use super::trainer::{StepReport, Trainer};
use crate::data::Batch;
use crate::error::Result;
use crate::model::tuned::Weights;

/// Either trainer.
pub enum Arm {
    /// An adapter beside frozen weights.
    Adapter(Box<Trainer>),
    /// Every weight.
    Full(Box<FullTrainer>),
}

impl Arm {
    /// Steps done.
    pub fn steps(&self) -> u64 {
        match self {
            Arm::Adapter(trainer) => trainer.steps(),
            Arm::Full(trainer) => trainer.steps(),
        }
    }

    /// One optimizer step.
    ///
    /// # Errors
    /// Those of the trainer.
    pub fn step(&mut self, micro: &[Batch]) -> Result<StepReport> {
        match self {
            Arm::Adapter(trainer) => trainer.step(micro),
            Arm::Full(trainer) => trainer.step(micro),
        }
    }

    /// Takes another schedule from the next step on.
    pub fn set_schedule(&mut self, schedule: Schedule) {
        match self {
            Arm::Adapter(trainer) => trainer.set_schedule(schedule),
            Arm::Full(trainer) => trainer.set_schedule(schedule),
        }
    }

    pub(super) fn as_training_mut(&mut self) -> &mut dyn Training {
        match self {
            Arm::Adapter(trainer) => &mut **trainer,
            Arm::Full(trainer) => &mut **trainer,
        }
    }

    /// Loss of rows as things stand; before the first step, of the base.
    pub fn evaluate(&mut self, rows: impl Iterator<Item = Batch>) -> Evaluated {
        match self {
            Arm::Adapter(trainer) => {
                let begun = trainer.steps() > 0;
                trainer.evaluate(rows, begun)
            }
            Arm::Full(trainer) => trainer.evaluate(rows),
        }
    }

    /// Copies the parameters as they are now.
    pub fn copy_into(&self, kept: &mut Vec<f32>) {
        kept.clear();
        match self {
            Arm::Adapter(trainer) => kept.extend_from_slice(&trainer.adapter().theta),
            Arm::Full(trainer) => {
                if let Weights::Tuned(tuned) = trainer.weights() {
                    kept.extend_from_slice(tuned.values());
                }
            }
        }
    }
}
