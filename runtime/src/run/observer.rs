//! Observers of long operations: they hear about progress, and can pause or stop the operation.

use std::path::Path;

use super::checkpoint::Saved;
use super::course::RolledBack;
use crate::error::Result;
use crate::train::StepReport;

/// Watches an operation.
pub trait Observer {
    /// Called before each step, and between the rows of any long operation. It may rest or wait; call `save`
    /// first to commit where a run stands, in case the process doesn't survive the wait.
    ///
    /// # Errors
    /// `Cancelled` to stop; those of `save`.
    fn go_on(&mut self, save: &mut dyn FnMut() -> Result<()>) -> Result<()>;

    /// Reports an event in the run of that name.
    fn tell(&mut self, run: &str, event: Event<'_>);

    /// [`Observer::go_on`] for operations with nothing to save.
    ///
    /// # Errors
    /// `Cancelled` to stop.
    fn ask(&mut self) -> Result<()> {
        self.go_on(&mut || Ok(()))
    }

    /// Reports something that belongs to no run.
    fn note(&mut self, text: &str) {
        self.tell("", Event::Note(text));
    }

    /// Restarts the measurement of peak private memory.
    fn begin_peak(&mut self) {}

    /// The peak of private memory since then, in bytes, if measured.
    fn peak_bytes(&mut self) -> Option<u64> {
        None
    }
}

/// What happened.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// A message for people.
    Note(&'a str),
    /// A step was taken.
    Step(&'a Stepping),
    /// A report is due: means since the last one.
    Report(&'a Stepping, Means),
    /// The validation rows were evaluated.
    Look {
        /// Steps.
        step: u64,
        /// Steps of the whole run, once known.
        total: Option<u64>,
        /// Mean loss, nats per token.
        loss: f64,
        /// Nats per token forgotten of ordinary text set aside, on the set that lost most; `None` without any.
        forgot: Option<f64>,
    },
    /// So many rows of so many were measured, in a pass that may take long.
    Measured {
        /// What is measured, for people.
        what: &'static str,
        /// Rows done.
        done: usize,
        /// All of them.
        all: usize,
    },
    /// A step failed, nothing was changed, and its rows are skipped.
    Skipped(&'a str),
    /// The run had diverged and returned to an earlier step.
    RolledBack(&'a RolledBack),
    /// A checkpoint was committed after this many steps.
    Checkpoint(u64, &'a Saved),
    /// An adapter or a model was committed.
    Saved(&'a Path),
}

/// Where a run is after a step.
#[derive(Clone, Copy, Debug)]
pub struct Stepping {
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run, once known.
    pub total: Option<u64>,
    /// What the step did.
    pub report: StepReport,
    /// Tokens that went through the model, over all steps.
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
    /// Divergence from the base, if there is a KL penalty.
    pub kl: Option<f64>,
}

/// An observer that ignores everything.
pub struct Nobody;

impl Observer for Nobody {
    fn go_on(&mut self, _: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        Ok(())
    }

    fn tell(&mut self, _: &str, _: Event<'_>) {}
}
