//! Who looks on while something runs: is told how far it is, and may hold or stop it.

use std::path::Path;

use super::checkpoint::Saved;
use super::course::RolledBack;
use crate::error::Result;
use crate::train::StepReport;

/// Looks on.
pub trait Observer {
    /// Asked before each step, and between the rows of whatever takes long. May rest, and may wait; `save` commits
    /// where a run stands, for a wait that may end in anything.
    ///
    /// # Errors
    /// `Cancelled` to stop; those of `save`.
    fn go_on(&mut self, save: &mut dyn FnMut() -> Result<()>) -> Result<()>;

    /// Something happened in the run of that name.
    fn tell(&mut self, run: &str, event: Event<'_>);

    /// [`Observer::go_on`] of what has nothing to save.
    ///
    /// # Errors
    /// `Cancelled` to stop.
    fn ask(&mut self) -> Result<()> {
        self.go_on(&mut || Ok(()))
    }

    /// Tells something that belongs to no run.
    fn note(&mut self, text: &str) {
        self.tell("", Event::Note(text));
    }

    /// Begins to watch private memory anew.
    fn begin_peak(&mut self) {}

    /// The most private memory since then, in bytes, where somebody measures it.
    fn peak_bytes(&mut self) -> Option<u64> {
        None
    }
}

/// What happened.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// Something to tell people.
    Note(&'a str),
    /// A step was taken.
    Step(&'a Stepping),
    /// A report is due: means since the last one.
    Report(&'a Stepping, Means),
    /// The validation rows were looked at after so many steps.
    Look {
        /// Steps.
        step: u64,
        /// Of the whole run, once that is known.
        total: Option<u64>,
        /// Mean loss, nats per token.
        loss: f64,
    },
    /// A step failed, nothing was changed, and its rows are behind.
    Skipped(&'a str),
    /// The run had diverged, and is at an earlier step.
    RolledBack(&'a RolledBack),
    /// A checkpoint was committed after so many steps.
    Checkpoint(u64, &'a Saved),
    /// An adapter or a model was committed.
    Saved(&'a Path),
}

/// Where a run is after a step.
#[derive(Clone, Copy, Debug)]
pub struct Stepping {
    /// Steps done.
    pub step: u64,
    /// Of the whole run, once that is known.
    pub total: Option<u64>,
    /// What the step did.
    pub report: StepReport,
    /// Tokens that went through the model, of all steps.
    pub tokens: u64,
    /// Seconds of work.
    pub seconds: f64,
}

impl Stepping {
    /// Tokens per second of work.
    pub fn tokens_per_s(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }
}

/// Means over the targets of several steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Means {
    /// Loss, nats per token.
    pub loss: f64,
    /// Divergence from the base, where a penalty weighs it.
    pub kl: Option<f64>,
}

/// Nobody looks on.
pub struct Nobody;

impl Observer for Nobody {
    fn go_on(&mut self, _: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        Ok(())
    }

    fn tell(&mut self, _: &str, _: Event<'_>) {}
}
