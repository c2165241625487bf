//! A run in progress: steps, how failed ones are handled, and checkpoints of its whole state.

use std::path::PathBuf;
use std::time::Instant;

use super::checkpoint::{Checkpoints, Identity, Progress, Restored, Saved};
use super::guard::Judged;
use crate::data::{Batch, Mixed, MixedCursor};
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::train::{AnyTrainer, StepReport};

/// The outcome of a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Stepped {
    /// One step further.
    Done(StepReport),
    /// The step failed, nothing was changed, and its rows are skipped.
    Skipped(String),
    /// The run had diverged and returned to an earlier step.
    RolledBack(RolledBack),
}

/// A return to an earlier checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct RolledBack {
    /// What happened.
    pub why: String,
    /// Steps done before the return.
    pub from: u64,
    /// Steps done after it.
    pub to: u64,
    /// The checkpoint.
    pub path: PathBuf,
    /// What is left of the learning rate.
    pub factor: f32,
}

impl RolledBack {
    /// The return in one line.
    pub fn describe(&self) -> String {
        let RolledBack { why, from, to, factor, .. } = self;
        format!("diverged after step {from} ({why}): back to step {to}, at {factor} of the learning rate")
    }
}

/// A run without its trainer and rows, which callers pass in.
pub struct Course {
    /// The place for checkpoints, if there is one.
    pub checkpoints: Option<Checkpoints>,
    /// Which run they belong to.
    pub identity: Identity,
    /// Where it stands. The cursor is only updated when the run is saved or restored.
    pub progress: Progress,
}

impl Course {
    /// At the start, with no place for checkpoints.
    pub fn new(identity: Identity) -> Course {
        Course { checkpoints: None, identity, progress: Progress::default() }
    }

    /// The same, keeping checkpoints here from now on.
    #[must_use]
    pub fn kept_in(self, checkpoints: impl Into<Option<Checkpoints>>) -> Course {
        Course { checkpoints: checkpoints.into(), ..self }
    }

    /// Removes all checkpoints.
    ///
    /// # Errors
    /// Those of [`Checkpoints::remove_all`].
    pub fn remove_checkpoints(&mut self, storage: &dyn Storage) -> Result<()> {
        self.checkpoints.as_mut().map_or(Ok(()), |checkpoints| checkpoints.remove_all(storage))
    }

    /// One optimizer step on the next rows, filled into `micro`.
    ///
    /// # Errors
    /// Those of the trainer, but `NonFinite` only once rolling back no longer helps or there is no checkpoint
    /// to return to.
    pub fn step(
        &mut self,
        storage: &dyn Storage,
        trainer: &mut AnyTrainer,
        batches: &mut Mixed<'_>,
        micro: &mut [Batch],
    ) -> Result<Stepped> {
        let started = Instant::now();
        micro.iter_mut().for_each(|batch| batches.next_into(batch));
        let outcome = trainer.step(micro);
        let whole = trainer.numbers().whole;
        let Progress { guard, tally, .. } = &mut self.progress;
        tally.seconds += started.elapsed().as_secs_f64();
        match guard.judge(outcome, whole)? {
            Judged::Good(report) => {
                tally.tokens += report.tokens as u64;
                tally.targets += report.targets as u64;
                tally.recent.add(report.loss, report.targets);
                tally.unlooked.add(report.loss, report.targets);
                tally.recent_kl.add(report.kl.unwrap_or_default(), report.targets);
                Ok(Stepped::Done(report))
            }
            Judged::Skipped(why) => Ok(Stepped::Skipped(why)),
            Judged::Diverged(why) => self.roll_back(storage, trainer, batches, &why).map(Stepped::RolledBack),
        }
    }

    /// Commits where the run stands. An `anchor` is what a diverging run returns to; a run that is no longer
    /// steady doesn't set one.
    ///
    /// # Errors
    /// Those of [`Checkpoints::save`].
    pub fn save(
        &mut self,
        storage: &dyn Storage,
        trainer: &AnyTrainer,
        cursor: MixedCursor,
        anchor: bool,
    ) -> Result<Saved> {
        self.progress.cursor = cursor;
        let anchor = anchor && self.progress.guard.is_steady();
        let checkpoints = self.checkpoints.as_mut().ok_or_else(no_place)?;
        checkpoints.save(storage, &self.identity, &trainer.numbers(), &self.progress, anchor)
    }

    /// Continues from the newest intact checkpoint; changes nothing if there is none.
    ///
    /// # Errors
    /// Those of [`Checkpoints::restore`].
    pub fn resume(
        &mut self,
        storage: &dyn Storage,
        trainer: &mut AnyTrainer,
        batches: &mut Mixed<'_>,
    ) -> Result<Restored> {
        let checkpoints = self.checkpoints.as_mut().ok_or_else(no_place)?;
        let restored = checkpoints.restore(storage, &self.identity, &mut trainer.numbers_mut()?, false)?;
        if let Some(found) = &restored.found {
            self.go_on(found.progress.clone(), trainer, batches);
        }
        Ok(restored)
    }

    /// Returns to the last anchor at half the learning rate; `happened` says why.
    ///
    /// # Errors
    /// `NonFinite` if there is none, or the run has rolled back too often; those of [`Checkpoints::restore`].
    pub fn roll_back(
        &mut self,
        storage: &dyn Storage,
        trainer: &mut AnyTrainer,
        batches: &mut Mixed<'_>,
        happened: &str,
    ) -> Result<RolledBack> {
        let from = trainer.numbers().steps;
        self.progress.guard.check_rollback(from, happened)?;
        let restored = match &mut self.checkpoints {
            None => Restored::default(),
            Some(kept) => kept
                .restore(storage, &self.identity, &mut trainer.numbers_mut()?, true)
                .map_err(|e| e.at(format!("stopped after step {from}: {happened}")))?,
        };
        let reasons = restored.reasons();
        let Some(found) = restored.found else {
            let why = if reasons.is_empty() { reasons } else { format!(" ({reasons})") };
            let message =
                format!("stopped after step {from}: {happened}; there is no checkpoint to go back to{why}");
            return Err(Error::new(ErrorKind::NonFinite, message).advise(Advice::LowerRateOrCheckpoints));
        };
        let mut guard = self.progress.guard.clone();
        guard.rolled_back_to(&found.progress.guard);
        let factor = guard.factor;
        // The best look stays: its parameters are from before the divergence.
        let best = self.progress.best;
        self.go_on(Progress { guard, best, ..found.progress }, trainer, batches);
        Ok(RolledBack { why: happened.to_string(), from, to: found.steps, path: found.path, factor })
    }

    fn go_on(&mut self, progress: Progress, trainer: &mut AnyTrainer, batches: &mut Mixed<'_>) {
        trainer.set_rate_factor(progress.guard.factor);
        batches.seek(progress.cursor);
        self.progress = progress;
    }
}

fn no_place() -> Error {
    Error::new(ErrorKind::Misuse, "no folder was given for checkpoints")
}
