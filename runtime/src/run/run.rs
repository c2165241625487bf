//! A run from its first step to its last: begin, step, look, checkpoint, finish.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::checkpoint::{Checkpoints, Identity, Restored, Saved};
use super::course::{Course, RolledBack, Stepped};
use super::observer::{Event, Means, Observer, Stepping};
use super::prepare::{Base, RunRows};
use super::settings::{Begin, Looks, Settings};
use super::setup::{Setup, mixed};
use crate::adapter::Adapter;
use crate::data::{Batch, Example, Mixed, MixedCursor};
use crate::error::{Error, ErrorKind, Result};
use crate::model::tuned::{TunedModel, Weights};
use crate::plan::Request;
use crate::probe::Prober;
use crate::storage::{Disk, Storage, create_dir_all};
use crate::train::{AnyTrainer, StepReport};

/// General rows of a step that stays near the base.
const GENERAL_PER_STEP: u64 = 3;

/// Share of a timed run's seconds that looks may take, and the least number of them all the same.
const LOOKS_SHARE: f64 = 0.2;
const LOOKS_MIN: u64 = 3;

/// How a run starts.
pub enum Start {
    /// From scratch, with checkpoints in this folder, if any.
    Fresh(Option<Checkpoints>),
    /// From the newest intact checkpoint in this folder, or from scratch if there is none.
    Resume(Checkpoints),
}

/// The result of training.
pub enum Trained {
    /// An adapter, not yet bound to its base.
    Adapter(Box<Adapter>),
    /// Every weight.
    Full(Arc<TunedModel>),
}

/// A run's rows, and those to train on in order.
struct Feed<'a> {
    rows: RunRows<'a>,
    batches: Mixed<'a>,
}

/// A training run: everything it holds and has counted.
pub struct Run {
    pub(super) name: String,
    pub(super) settings: Settings,
    pub(super) base: Base,
    pub(super) trainer: AnyTrainer,
    pub(super) course: Course,
    /// The micro-batches of a step, refilled each time.
    micro: Vec<Batch>,
    /// Sequences per batch, at most the number of rows.
    batch: usize,
    pub(super) valid_after: Option<f64>,
    /// Whether that loss is of the current parameters.
    pub(super) is_valid_of_now: bool,
    /// Steps and targets of an adapter that this run goes on with.
    earlier: (u64, u64),
    /// The last step.
    last: Option<StepReport>,
    /// Where the adapter is saved during the run, if anywhere.
    saves_in: Option<PathBuf>,
    /// When the run has to end, whatever its length.
    end_by: Option<Instant>,
    /// Time that the last look took.
    pub(super) look_time: Duration,
    /// Whether the run resumed from a checkpoint.
    is_restored: bool,
    /// Why the run ended, once it has.
    ended: Option<String>,
}

impl Run {
    /// Allocates what the request asks for, and resumes from a checkpoint if `start` says so. Nothing is
    /// trained yet, except that EVA initializes A from the rows.
    ///
    /// # Errors
    /// `Misuse` for an adapter that doesn't fit the model; those of [`Checkpoints::restore`], of EVA, and of
    /// the observer.
    pub fn begin(
        name: &str,
        base: &Base,
        settings: Settings,
        request: &Request,
        rows: RunRows<'_>,
        start: Start,
        observer: &mut dyn Observer,
    ) -> Result<(Run, Restored)> {
        let setup = Setup::new(base, &settings, request, rows);
        let (checkpoints, resumes) = match start {
            Start::Fresh(checkpoints) => (checkpoints, false),
            Start::Resume(checkpoints) => {
                let resumes = checkpoints.newest_file(&Disk)?.is_some();
                (Some(checkpoints), resumes)
            }
        };
        let mut course = Course::new(setup.identity()).kept_in(checkpoints);
        let mut trainer = setup.trainer(resumes, (name, &mut *observer))?;
        let earlier = match &trainer {
            AnyTrainer::Adapter(trainer) => (trainer.adapter().meta.steps, trainer.adapter().meta.tokens),
            AnyTrainer::Full(_) => (0, 0),
        };
        let mut batches = mixed(&settings, request.batch, rows, MixedCursor::default());
        let restored = match resumes {
            true => course.resume(&Disk, &mut trainer, &mut batches)?,
            false => Restored::default(),
        };
        if resumes && restored.found.is_none() && settings.begin != Begin::Random {
            // The adapter was made without initial values, for a checkpoint that isn't there. Drop it first:
            // the plan has room for one.
            drop(trainer);
            trainer = setup.trainer(false, (name, &mut *observer))?;
        }
        if restored.found.is_none() {
            course.progress.total = setup.total;
        }
        let mut run = Run {
            name: name.to_string(),
            base: base.clone(),
            trainer,
            course,
            micro: vec![Batch::default(); settings.accumulation],
            batch: request.batch,
            valid_after: None,
            is_valid_of_now: false,
            earlier,
            last: None,
            saves_in: None,
            end_by: None,
            look_time: Duration::ZERO,
            is_restored: restored.found.is_some(),
            ended: None,
            settings,
        };
        run.schedule();
        run.end();
        Ok((run, restored))
    }

    /// The identity that checkpoints of a run with these settings carry; allocates nothing.
    pub fn identity_of(base: &Base, settings: &Settings, request: &Request, rows: RunRows<'_>) -> Identity {
        Setup::new(base, settings, request, rows).identity()
    }

    /// The identity its checkpoints carry.
    pub fn identity(&self) -> &Identity {
        &self.course.identity
    }

    /// The trainer, for callers that modify parameters between steps.
    pub fn trainer_mut(&mut self) -> &mut AnyTrainer {
        &mut self.trainer
    }

    /// Where the run stands and what it has counted.
    pub fn progress(&self) -> &super::Progress {
        &self.course.progress
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.trainer.steps()
    }

    /// Steps of the whole run; `None` while a timed run hasn't measured its steps yet.
    pub fn total(&self) -> Option<u64> {
        self.course.progress.total
    }

    /// Held-out loss at the last look, and before the first step.
    pub fn valid_losses(&self) -> (Option<f64>, Option<f64>) {
        (self.course.progress.tally.valid_before, self.valid_after)
    }

    /// The last step taken in this process.
    pub fn last(&self) -> Option<&StepReport> {
        self.last.as_ref()
    }

    /// Why the run ended; `None` while steps remain.
    pub fn ended(&self) -> Option<&str> {
        self.ended.as_deref()
    }

    /// Does what precedes the first step of a fresh run: removes older checkpoints, evaluates the held-out rows
    /// and commits the first checkpoint. A resumed run does only what is still missing.
    ///
    /// # Errors
    /// Those of [`Run::look`] and [`Run::checkpoint`].
    pub fn open(&mut self, rows: RunRows<'_>, observer: &mut dyn Observer) -> Result<()> {
        if self.is_restored {
            // A run stopped right away never evaluated.
            if self.steps() == 0 && self.course.progress.looks.is_empty() {
                self.look(rows, observer)?;
            }
            return Ok(());
        }
        self.course.remove_checkpoints(&Disk)?;
        self.look(rows, observer)?;
        if self.settings.checkpoint_every > 0 && self.course.checkpoints.is_some() {
            self.checkpoint(true, observer)?;
        }
        Ok(())
    }

    /// Steps until this many are done, or all of them, doing what is due after each.
    ///
    /// # Errors
    /// Those of the observer. From a step, `NonFinite` only once rolling back no longer helps, or if there is
    /// neither a checkpoint to return to nor a best look to fall back on.
    pub fn go(&mut self, rows: RunRows<'_>, until: Option<u64>, observer: &mut dyn Observer) -> Result<()> {
        let mut feed = self.feed(rows);
        self.end();
        while self.ended.is_none() && until.is_none_or(|until| self.steps() < until) {
            self.turn(&mut feed, observer)?;
        }
        Ok(())
    }

    /// One step, with what is due after it. Returns whether it was taken: false if it was skipped, was rolled
    /// back, or the run has ended.
    ///
    /// # Errors
    /// Those of [`Run::go`].
    pub fn advance(&mut self, rows: RunRows<'_>, observer: &mut dyn Observer) -> Result<bool> {
        let mut feed = self.feed(rows);
        self.end();
        match self.ended {
            Some(_) => Ok(false),
            None => self.turn(&mut feed, observer),
        }
    }

    /// The rows in order, from where the run stands.
    fn feed<'a>(&self, rows: RunRows<'a>) -> Feed<'a> {
        Feed { rows, batches: mixed(&self.settings, self.batch, rows, self.course.progress.cursor) }
    }

    /// Asks whether to go on, takes a step, and does what is due.
    fn turn(&mut self, feed: &mut Feed<'_>, observer: &mut dyn Observer) -> Result<bool> {
        let mut saved = None;
        let save = &mut || {
            saved = self.save_where_it_stands()?;
            Ok(())
        };
        let waits = Instant::now();
        let asked = observer.go_on(save);
        // Time spent waiting for the machine isn't the run's.
        if let Some(end_by) = &mut self.end_by {
            *end_by += waits.elapsed();
        }
        if let Some(saved) = saved {
            observer.tell(&self.name, Event::Checkpoint(self.steps(), &saved));
        }
        let done = match asked {
            Ok(()) => match self.step(feed, observer)? {
                true => self.follow(feed.rows, observer).map(|()| true),
                false => Ok(false),
            },
            Err(refused) => Err(refused),
        };
        let done = match done {
            // The error came from before or after the step, not from the step itself.
            Err(broken) if broken.kind() == ErrorKind::NonFinite => {
                let (batches, why) = (&mut feed.batches, broken.message());
                let back = self.course.roll_back(&Disk, &mut self.trainer, batches, why)?;
                self.went_back(&back, observer);
                false
            }
            done => done?,
        };
        self.end();
        Ok(done)
    }

    /// One step on the next rows; returns whether it was taken.
    fn step(&mut self, Feed { rows, batches }: &mut Feed<'_>, observer: &mut dyn Observer) -> Result<bool> {
        if let Some(weight) = self.settings.general_kl.filter(|_| self.steps().is_multiple_of(2)) {
            let general = general_rows(rows.general, self.steps(), &self.settings);
            self.trainer.stay_near_base_on(general, weight);
        }
        let stepped = self.course.step(&Disk, &mut self.trainer, batches, &mut self.micro);
        // A failed step isn't retried on the same rows.
        self.course.progress.cursor = batches.cursor();
        self.is_valid_of_now = false;
        match stepped {
            Ok(Stepped::Done(report)) => {
                self.last = Some(report);
                let stepping = self.stepping(report);
                observer.tell(&self.name, Event::Step(&stepping));
                self.time(observer);
                return Ok(true);
            }
            Ok(Stepped::Skipped(why)) => observer.tell(&self.name, Event::Skipped(&why)),
            Ok(Stepped::RolledBack(back)) => self.went_back(&back, observer),
            Err(error) if error.kind() == ErrorKind::NonFinite && self.course.progress.best.is_some() => {
                self.ended = Some(error.message().to_string());
            }
            Err(error) => return Err(error),
        }
        Ok(false)
    }

    fn stepping(&self, report: StepReport) -> Stepping {
        let tally = &self.course.progress.tally;
        let (step, total) = (self.steps(), self.total());
        Stepping { step, total, report, tokens: tally.tokens, seconds: tally.seconds }
    }

    /// Fixes the length of a timed run once some steps show how long one takes, and its number of looks.
    fn time(&mut self, observer: &mut dyn Observer) {
        let (seconds, wanted) = (self.course.progress.tally.seconds, self.settings.look_count());
        let left = self.end_by.map(|end_by| end_by.saturating_duration_since(Instant::now()).as_secs_f64());
        let looks = left.map_or(wanted, |left| affordable(wanted, left, self.look_time.as_secs_f64()));
        let for_steps = left.map(|left| left - looks as f64 * self.look_time.as_secs_f64());
        if let Some(total) = self.settings.timed(self.total(), self.steps(), seconds, for_steps) {
            self.course.progress.total = Some(total);
            self.course.progress.times = Some(looks);
            self.schedule();
            if looks < wanted {
                let name = &self.name;
                observer.note(&format!("{name}: time is short, so {looks} looks instead of {wanted}"));
            }
        }
    }

    /// The learning rates for the length known so far.
    fn schedule(&mut self) {
        self.trainer.set_schedule(self.settings.schedule(self.settings.peak(), self.total()));
    }

    pub(super) fn is_late(&self) -> bool {
        match self.end_by {
            Some(end_by) => Instant::now() + self.look_time >= end_by,
            None => self.settings.is_late(self.course.progress.tally.seconds),
        }
    }

    /// Does what is due after a good step.
    fn follow(&mut self, rows: RunRows<'_>, observer: &mut dyn Observer) -> Result<()> {
        self.report(observer);
        if self.is_look_due() {
            self.look(rows, observer)?;
        }
        let (step, total) = (self.steps(), self.total());
        let due = |every: u64| every > 0 && step.is_multiple_of(every) && Some(step) != total;
        if due(self.settings.save_every)
            && let Some(folder) = self.saves_in.clone()
            && let Some(file) = self.save(&Disk, &folder)?
        {
            observer.tell(&self.name, Event::Saved(&file));
        }
        // Comes last: a run resumed from it has nothing of this step left to do.
        if due(self.settings.checkpoint_every) && self.course.checkpoints.is_some() {
            self.checkpoint(true, observer)?;
        }
        Ok(())
    }

    /// Reports the means since the last report, if one is due.
    fn report(&mut self, observer: &mut dyn Observer) {
        let (step, every) = (self.steps(), self.settings.report_every);
        let due = every > 0 && (step.is_multiple_of(every) || Some(step) == self.total() || step == 1);
        let Some(report) = self.last.filter(|_| due) else { return };
        let tally = &mut self.course.progress.tally;
        let loss = std::mem::take(&mut tally.recent).value();
        let kl = std::mem::take(&mut tally.recent_kl).value();
        (tally.reported_loss, tally.reported_kl) = (Some(loss), report.kl.map(|_| kl));
        let means = Means { loss, kl: tally.reported_kl };
        observer.tell(&self.name, Event::Report(&self.stepping(report), means));
    }

    /// Sets why the run ended, if it has.
    fn end(&mut self) {
        if self.ended.is_some() {
            return;
        }
        let patience = match self.settings.looks {
            Looks::Best { patience, .. } => patience,
            Looks::Every(_) => 0,
        };
        let waited = self.course.progress.best.map_or(0, |best| best.waited);
        if self.total().is_some_and(|total| self.steps() >= total) {
            self.ended = Some("all steps done".into());
        } else if patience > 0 && waited >= patience {
            self.ended = Some(format!("no better for {patience} looks"));
        } else if self.is_late() {
            self.ended = Some("time budget spent".into());
        }
    }

    /// Commits where the run stands. An `anchor` is what a diverging run returns to.
    ///
    /// # Errors
    /// Those of [`Checkpoints::save`]; `Misuse` if no folder was given.
    pub fn checkpoint(&mut self, anchor: bool, observer: &mut dyn Observer) -> Result<()> {
        let saved = self.commit(anchor)?;
        observer.tell(&self.name, Event::Checkpoint(self.steps(), &saved));
        Ok(())
    }

    /// Saves before a wait the process may not survive; does nothing without a folder, or once the run has
    /// ended.
    fn save_where_it_stands(&mut self) -> Result<Option<Saved>> {
        if self.course.checkpoints.is_none() || self.ended.is_some() {
            return Ok(None);
        }
        self.commit(false).map(Some)
    }

    fn commit(&mut self, anchor: bool) -> Result<Saved> {
        self.course.save(&Disk, &self.trainer, self.course.progress.cursor, anchor)
    }

    /// Ends the run by that time, with a look if looks count. Time spent waiting for the observer moves it.
    pub fn end_by(&mut self, time: Instant) {
        self.end_by = Some(time);
    }

    /// Saves the adapter in a folder every [`Settings::save_every`] steps.
    pub fn save_in(&mut self, folder: &Path) {
        self.saves_in = Some(folder.to_path_buf());
    }

    /// Keeps checkpoints in a folder from now on, unless they already are there.
    ///
    /// # Errors
    /// Those of [`Checkpoints::open`].
    pub fn keep_in(&mut self, folder: &Path) -> Result<()> {
        if self.course.checkpoints.as_ref().is_none_or(|checkpoints| checkpoints.dir() != folder) {
            self.course.checkpoints = Some(Checkpoints::open(&Disk, folder)?);
        }
        Ok(())
    }

    /// Continues from the newest intact checkpoint in a folder, which becomes the run's own. Only before the
    /// first step; changes nothing if there is no checkpoint.
    ///
    /// # Errors
    /// `Misuse` after the first step; those of [`Checkpoints::restore`].
    pub fn restore(&mut self, folder: &Path, rows: RunRows<'_>) -> Result<Restored> {
        if self.steps() > 0 {
            let message = "a run can only be restored before its first step: start a new one";
            return Err(Error::new(ErrorKind::Misuse, message));
        }
        // A separate course: if restoring fails, the run still has its own checkpoints to return to.
        let checkpoints = Checkpoints::open(&Disk, folder)?;
        let mut course = Course::new(self.course.identity.clone()).kept_in(checkpoints);
        let mut batches = mixed(&self.settings, self.batch, rows, MixedCursor::default());
        let restored = course.resume(&Disk, &mut self.trainer, &mut batches)?;
        if restored.found.is_some() {
            self.course = course;
            self.is_restored = true;
            self.schedule();
            self.end();
        }
        Ok(restored)
    }

    /// Removes all checkpoints: the run is finished or starts over.
    ///
    /// # Errors
    /// Those of [`Checkpoints::remove_all`].
    pub fn remove_checkpoints(&mut self) -> Result<()> {
        self.course.remove_checkpoints(&Disk)
    }

    fn went_back(&mut self, back: &RolledBack, observer: &mut dyn Observer) {
        self.is_valid_of_now = false;
        observer.tell(&self.name, Event::RolledBack(back));
    }

    /// # Errors
    /// `Misuse` after a restore that failed midway.
    fn check_whole(&self) -> Result<()> {
        match self.trainer.numbers().whole {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::Misuse,
                "a restore failed midway: restore another checkpoint, or start over",
            )),
        }
    }

    /// The current adapter, bound to its base by what both compute; `None` if every weight is trained.
    ///
    /// # Errors
    /// `Misuse` after a restore that failed midway; those of [`Prober::bind`].
    pub fn snapshot(&mut self) -> Result<Option<Adapter>> {
        self.check_whole()?;
        self.note_training();
        let AnyTrainer::Adapter(trainer) = &self.trainer else { return Ok(None) };
        let mut adapter = trainer.adapter().clone();
        adapter.binding = Some(self.prober(&adapter).bind(&adapter)?);
        Ok(Some(adapter))
    }

    /// Commits the current adapter, bound to its base, in a folder; `None` if there is no adapter. Training
    /// continues unrounded, whatever the file's precision.
    ///
    /// # Errors
    /// Those of [`Run::snapshot`] and [`Adapter::save_bound`].
    pub fn save(&mut self, storage: &dyn Storage, folder: &Path) -> Result<Option<PathBuf>> {
        self.check_whole()?;
        self.note_training();
        let AnyTrainer::Adapter(trainer) = &self.trainer else { return Ok(None) };
        let (stored, mut prober) = (self.settings.stored, self.prober(trainer.adapter()));
        create_dir_all(storage, folder)?;
        Ok(Some(prober.save(trainer.adapter(), stored, (storage, folder))?.path))
    }

    fn prober(&self, adapter: &Adapter) -> Prober {
        Prober::new(&self.base.model, &self.base.kernels, adapter.layout.rank_max())
    }

    /// Records in the adapter how it was trained.
    fn note_training(&mut self) {
        let after = self.valid_after.filter(|_| self.is_valid_of_now);
        let tally = &self.course.progress.tally;
        let (steps, targets) = (self.earlier.0 + self.steps(), self.earlier.1 + tally.targets);
        let usage = self.settings.usage.clone();
        let AnyTrainer::Adapter(trainer) = &mut self.trainer else { return };
        let meta = trainer.meta_mut();
        meta.usage = usage;
        (meta.steps, meta.tokens) = (steps, targets);
        meta.valid_loss_before = tally.valid_before.map(|loss| loss as f32);
        meta.valid_loss_after = after.map(|loss| loss as f32);
    }

    /// The result: the parameters that count. Everything else is freed.
    pub fn finish(mut self) -> Trained {
        self.note_training();
        let best = self.course.progress.best;
        match self.trainer {
            AnyTrainer::Adapter(trainer) => {
                let mut adapter = trainer.into_adapter();
                if let Some(best) = best {
                    adapter.meta.steps = self.earlier.0 + best.step;
                    adapter.meta.valid_loss_after = Some(best.loss as f32);
                }
                Trained::Adapter(Box::new(adapter))
            }
            AnyTrainer::Full(trainer) => Trained::Full(trainer.into_weights()),
        }
    }

    /// The current weights, if every weight is trained.
    pub fn weights(&self) -> Option<Arc<TunedModel>> {
        match &self.trainer {
            AnyTrainer::Adapter(_) => None,
            AnyTrainer::Full(trainer) => match trainer.weights() {
                Weights::Tuned(tuned) => Some(tuned),
                Weights::Stored(_) => None,
            },
        }
    }
}

/// So many looks of those wanted as take no more than a fair share of the seconds left, at least some.
fn affordable(wanted: u64, left: f64, look: f64) -> u64 {
    let afforded = LOOKS_SHARE * left.max(0.0) / look.max(1e-9);
    wanted.min((afforded as u64).max(LOOKS_MIN))
}

/// The general rows of a step: some in turn, from a place of the run's own; no more than the arena's batch holds.
fn general_rows(general: &[Example], step: u64, settings: &Settings) -> Batch {
    let mut batch = Batch::default();
    let count = GENERAL_PER_STEP.min(settings.batch as u64);
    let first = crate::rng::mix(settings.seed).wrapping_add(step / 2 * count);
    for i in (0..count).filter(|_| !general.is_empty()) {
        batch.push(&general[(first.wrapping_add(i) % general.len() as u64) as usize]);
    }
    batch
}
