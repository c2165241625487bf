//! A run from its first step to its last: begin, step, look, checkpoint, finish.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::checkpoint::{Best, Checkpoints, Identity, Look, Restored};
use super::course::{Course, RolledBack, Stepped};
use super::observer::{Event, Means, Observer, Stepping};
use super::prepare::{Base, RunRows};
use super::settings::{Begin, Length, Looks, Method, Settings, Warmup};
use crate::adapter::{Adapter, Init, LoraConfig};
use crate::data::batches::in_order;
use crate::data::{Batch, Batches, Cursor, Example, Mixed, MixedCursor};
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::model::tuned::{TunedModel, Weights};
use crate::nn::keep::KeepPrecision;
use crate::plan::{ArenaWords, Request};
use crate::probe::Prober;
use crate::rng::Rng;
use crate::storage::{Disk, Storage, create_dir_all};
use crate::train::schedule::{Schedule, Shape};
use crate::train::{AnyTrainer, FullTrainer, StepReport, TrainOptions, Trainer, eva, quiet};

/// Random stream of an adapter's initial values.
const INIT_STREAM: u64 = 0x494E_4954;
/// General rows of a step that stays near the base.
const GENERAL_PER_STEP: u64 = 3;

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

/// A training run: everything it holds and has counted.
pub struct Run {
    name: String,
    settings: Settings,
    base: Base,
    trainer: AnyTrainer,
    course: Course,
    /// The micro-batches of a step, refilled each time.
    micro: Vec<Batch>,
    /// Sequences per batch, at most the number of rows.
    batch: usize,
    /// The highest learning rate.
    peak: f64,
    valid_after: Option<f64>,
    /// Whether that loss is of the current parameters.
    is_valid_of_now: bool,
    /// The last step.
    last: Option<StepReport>,
    /// Where the adapter is saved during the run, if anywhere.
    saves_in: Option<PathBuf>,
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
        let batch = request.batch;
        let mut batches = mixed(&settings, batch, rows, MixedCursor::default());
        let (total, options) = total_and_options(base, &settings, &batches, rows);
        let peak = settings.rate.unwrap_or(settings.method.usual_rate());
        let identity = identity(base, &settings, request, &options, rows);
        let micro = vec![Batch::default(); settings.accumulation];
        let (mut course, resumes) = match start {
            Start::Fresh(None) => (Course::new(identity), false),
            Start::Fresh(Some(checkpoints)) => (Course::new(identity).kept_in(checkpoints), false),
            Start::Resume(checkpoints) => {
                let resumes = checkpoints.newest_file(&Disk)?.is_some();
                (Course::new(identity).kept_in(checkpoints), resumes)
            }
        };
        let mut make = |resumes: bool| {
            trainer(base, &settings, request, &options, rows, resumes, (name, &mut *observer))
        };
        let mut trainer = make(resumes)?;
        let restored = match resumes {
            true => course.resume(&Disk, &mut trainer, &mut batches)?,
            false => Restored::default(),
        };
        if resumes && restored.found.is_none() && settings.begin != Begin::Random {
            // The adapter was made without initial values, for a checkpoint that isn't there. Drop it first:
            // the plan has room for one.
            drop(trainer);
            trainer = make(false)?;
        }
        if restored.found.is_none() {
            course.progress.total = total;
        }
        let (name, valid_after, last, ended) = (name.to_string(), None, None, None);
        let (is_valid_of_now, saves_in, base) = (false, None, base.clone());
        let mut run = Run {
            name,
            settings,
            base,
            trainer,
            course,
            micro,
            batch,
            peak,
            valid_after,
            is_valid_of_now,
            last,
            saves_in,
            is_restored: restored.found.is_some(),
            ended,
        };
        run.schedule();
        run.end();
        Ok((run, restored))
    }

    /// The identity that checkpoints of a run with these settings carry; allocates nothing.
    pub fn identity_of(base: &Base, settings: &Settings, request: &Request, rows: RunRows<'_>) -> Identity {
        let batches = mixed(settings, request.batch, rows, MixedCursor::default());
        let (_, options) = total_and_options(base, settings, &batches, rows);
        identity(base, settings, request, &options, rows)
    }

    /// Its settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The identity its checkpoints carry.
    pub fn identity(&self) -> &Identity {
        self.course.identity()
    }

    /// The trainer in its current state.
    pub fn trainer(&self) -> &AnyTrainer {
        &self.trainer
    }

    /// The same, for callers that modify parameters between steps.
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

    /// The step whose parameters count: the best look's, or the last.
    pub fn best_step(&self) -> u64 {
        self.course.progress.best.map_or(self.steps(), |best| best.step)
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
        if self.settings.checkpoint_every > 0 && self.course.has_place() {
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
        let mut batches = mixed(&self.settings, self.batch, rows, self.course.progress.cursor);
        self.end();
        while self.ended.is_none() && until.is_none_or(|until| self.steps() < until) {
            self.turn(&mut batches, rows, observer)?;
        }
        Ok(())
    }

    /// One step, with what is due after it. Returns whether it was taken: false if it was skipped, was rolled
    /// back, or the run has ended.
    ///
    /// # Errors
    /// Those of [`Run::go`].
    pub fn advance(&mut self, rows: RunRows<'_>, observer: &mut dyn Observer) -> Result<bool> {
        let mut batches = mixed(&self.settings, self.batch, rows, self.course.progress.cursor);
        self.end();
        match self.ended {
            Some(_) => Ok(false),
            None => self.turn(&mut batches, rows, observer),
        }
    }

    /// Asks whether to go on, takes a step, and does what is due.
    fn turn(
        &mut self,
        batches: &mut Mixed<'_>,
        rows: RunRows<'_>,
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        let mut saved = None;
        let save = &mut || {
            saved = self.save_where_it_stands()?;
            Ok(())
        };
        let asked = observer.go_on(save);
        if let Some(saved) = saved {
            observer.tell(&self.name, Event::Checkpoint(self.steps(), &saved));
        }
        let done = match asked {
            Ok(()) => match self.step(batches, rows, observer)? {
                true => self.follow(rows, observer).map(|()| true),
                false => Ok(false),
            },
            Err(refused) => Err(refused),
        };
        let done = match done {
            // The error came from before or after the step, not from the step itself.
            Err(broken) if broken.kind() == ErrorKind::NonFinite => {
                self.go_back(batches, broken.message(), observer)?;
                false
            }
            done => done?,
        };
        self.end();
        Ok(done)
    }

    /// One step on the next rows; returns whether it was taken.
    fn step(
        &mut self,
        batches: &mut Mixed<'_>,
        rows: RunRows<'_>,
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        if let Some(weight) = self.settings.general_kl.filter(|_| self.steps().is_multiple_of(2)) {
            self.trainer
                .stay_near_base_on(general_rows(rows.general, self.steps(), self.settings.seed), weight);
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
                self.time();
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

    /// Fixes the length of a timed run once some steps show how long one takes.
    fn time(&mut self) {
        let seconds = self.course.progress.tally.seconds;
        if let Some(total) = self.settings.timed(self.total(), self.steps(), seconds) {
            self.course.progress.total = Some(total);
            self.schedule();
        }
    }

    /// The learning rates for the length known so far.
    fn schedule(&mut self) {
        self.trainer.set_schedule(self.settings.schedule(self.peak, self.total()));
    }

    fn is_late(&self) -> bool {
        self.settings.is_late(self.course.progress.tally.seconds)
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
        if due(self.settings.checkpoint_every) && self.course.has_place() {
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

    fn is_look_due(&self) -> bool {
        let step = self.steps();
        match self.settings.looks {
            Looks::Every(every) => every > 0 && step.is_multiple_of(every) && Some(step) != self.total(),
            // The last steps' parameters count too.
            Looks::Best { .. } if self.is_late() => true,
            Looks::Best { times, .. } => self
                .total()
                .is_some_and(|total| step == total || step.is_multiple_of((total / times.max(1)).max(1))),
        }
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

    /// Evaluates the held-out rows; returns their mean loss, reported and recorded, or `None` without such
    /// rows. Before the first step this is the base's loss. If the best look counts and this is it, keeps the
    /// parameters.
    ///
    /// # Errors
    /// `NonFinite` for a loss that isn't finite, except that after the first step it merely can't be the best
    /// look. Those of the observer: a partial evaluation is discarded.
    pub fn look(&mut self, rows: RunRows<'_>, observer: &mut dyn Observer) -> Result<Option<f64>> {
        let mut stopped = Ok(());
        let asked = in_order(rows.valid, 1).take_while(|_| {
            stopped = observer.go_on(&mut || Ok(()));
            stopped.is_ok()
        });
        let found = self.trainer.evaluate(asked);
        stopped?;
        self.base.model.check_whole()?;
        if found.targets == 0 {
            return Ok(None);
        }
        let (step, loss) = (self.steps(), found.loss_sum / found.targets as f64);
        if !loss.is_finite() && (step == 0 || !self.settings.keeps_best()) {
            let message = format!("the held-out loss is {loss}: the model or an adapter is broken");
            return Err(Error::new(ErrorKind::NonFinite, message).advise(Advice::ExactActivations));
        }
        observer.tell(&self.name, Event::Look { step, total: self.total(), loss });
        let train = std::mem::take(&mut self.course.progress.tally.unlooked);
        let train = (train.count > 0).then(|| train.value());
        let valid = Some(loss).filter(|loss| loss.is_finite());
        self.course.progress.looks.push(Look { step, train, valid });
        if step == 0 {
            self.course.progress.tally.valid_before = Some(loss);
        } else {
            (self.valid_after, self.is_valid_of_now) = (Some(loss), true);
        }
        if self.settings.keeps_best() {
            self.keep_if_best(step, loss);
        }
        Ok(Some(loss))
    }

    /// Keeps the current parameters if no look was better; the initial parameters count until then.
    fn keep_if_best(&mut self, step: u64, loss: f64) {
        let best = &mut self.course.progress.best;
        if best.is_none_or(|best| loss < best.loss) {
            *best = Some(Best { step, loss, waited: 0 });
            self.trainer.keep_best();
        } else if let Some(best) = best {
            best.waited += 1;
        }
    }

    /// Commits where the run stands. An `anchor` is what a diverging run returns to.
    ///
    /// # Errors
    /// Those of [`Checkpoints::save`]; `Misuse` if no folder was given.
    pub fn checkpoint(&mut self, anchor: bool, observer: &mut dyn Observer) -> Result<()> {
        let cursor = self.course.progress.cursor;
        let saved = self.course.save(&Disk, &self.trainer, cursor, anchor)?;
        observer.tell(&self.name, Event::Checkpoint(self.steps(), &saved));
        Ok(())
    }

    /// Saves before a wait the process may not survive; does nothing without a folder, or once the run has
    /// ended.
    fn save_where_it_stands(&mut self) -> Result<Option<super::checkpoint::Saved>> {
        if !self.course.has_place() || self.ended.is_some() {
            return Ok(None);
        }
        let cursor = self.course.progress.cursor;
        self.course.save(&Disk, &self.trainer, cursor, false).map(Some)
    }

    /// Saves the adapter in a folder every [`Settings::save_every`] steps.
    pub fn save_in(&mut self, folder: &Path) {
        self.saves_in = Some(folder.to_path_buf());
    }

    /// Keeps checkpoints in a folder from now on.
    ///
    /// # Errors
    /// Those of [`Checkpoints::open`].
    pub fn keep_in(&mut self, folder: &Path) -> Result<()> {
        self.course.keep_in(&Disk, folder)
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
        let mut course = Course::new(self.course.identity().clone());
        course.keep_in(&Disk, folder)?;
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

    /// Returns to the last anchor, because of something found after a step.
    fn go_back(
        &mut self,
        batches: &mut Mixed<'_>,
        happened: &str,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let back = self.course.roll_back(&Disk, &mut self.trainer, batches, happened)?;
        self.went_back(&back, observer);
        Ok(())
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
        let steps = self.steps();
        let after = self.valid_after.filter(|_| self.is_valid_of_now);
        let (targets, before) = {
            let tally = &self.course.progress.tally;
            (tally.targets, tally.valid_before)
        };
        let AnyTrainer::Adapter(trainer) = &mut self.trainer else { return };
        let meta = trainer.meta_mut();
        (meta.steps, meta.tokens) = (steps, targets);
        meta.valid_loss_before = before.map(|loss| loss as f32);
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
                    (adapter.meta.steps, adapter.meta.valid_loss_after) = (best.step, Some(best.loss as f32));
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

/// Draws A inside the directions that general rows leave quiet.
fn protect(
    adapter: &mut Adapter,
    base: &Base,
    energy: f32,
    general: &[Example],
    (name, observer): (&str, &mut dyn Observer),
) -> Result<()> {
    let started = Instant::now();
    let batches: Vec<Batch> = in_order(general, super::prepare::GENERAL_ROWS).collect();
    let mut stopped = Ok(());
    let go_on = |_: usize| {
        stopped = observer.go_on(&mut || Ok(()));
        stopped.is_ok()
    };
    // Of one seed, so that it is the same for every run on this model.
    let (model, kernels) = (&base.model, &base.kernels);
    let done = quiet::initialize(adapter, model, kernels, base.precision, &batches, (energy, 0), go_on);
    stopped.and(done)?;
    let took = started.elapsed().as_secs_f64();
    let told = format!("protected directions from {} rows of ordinary text in {took:.1} s", general.len());
    observer.tell(name, Event::Note(&told));
    Ok(())
}

/// The general rows of a step: some in turn, from a place of the run's own.
fn general_rows(general: &[Example], step: u64, seed: u64) -> Batch {
    let mut batch = Batch::default();
    let first = crate::rng::mix(seed).wrapping_add(step / 2 * GENERAL_PER_STEP);
    for i in (0..GENERAL_PER_STEP).filter(|_| !general.is_empty()) {
        batch.push(&general[(first.wrapping_add(i) % general.len() as u64) as usize]);
    }
    batch
}

/// The run's rows in order, from where it stands.
fn mixed<'a>(settings: &Settings, batch: usize, rows: RunRows<'a>, cursor: MixedCursor) -> Mixed<'a> {
    Mixed::new(rows.train, rows.replay, settings.replay_share, batch, settings.seed, cursor)
}

/// Steps of the whole run, if known in advance, and the trainer's options.
fn total_and_options(
    base: &Base,
    settings: &Settings,
    batches: &Mixed<'_>,
    rows: RunRows<'_>,
) -> (Option<u64>, TrainOptions) {
    let positions = rows.train.iter().map(Example::rows).sum();
    let total = settings.steps(batches, positions);
    let peak = settings.rate.unwrap_or(settings.method.usual_rate());
    (total, settings.options(base, settings.schedule(peak, total)))
}

/// The trainer, with its arena allocated.
fn trainer(
    base: &Base,
    settings: &Settings,
    request: &Request,
    options: &TrainOptions,
    rows: RunRows<'_>,
    resumes: bool,
    watched: (&str, &mut dyn Observer),
) -> Result<AnyTrainer> {
    let (model, kernels) = (base.model.clone(), base.kernels.clone());
    let adapter = match &settings.method {
        Method::Adapter(lora) => Some(fresh_adapter(base, settings, lora, rows, resumes, watched)?),
        Method::Full(_) => None,
    };
    let words = ArenaWords::new(model.config(), request);
    Ok(match adapter {
        Some(adapter) => {
            AnyTrainer::Adapter(Box::new(Trainer::new(model, kernels, words, adapter, options.clone())))
        }
        None => AnyTrainer::Full(Box::new(FullTrainer::new(model, kernels, words, options.clone()))),
    })
}

/// A trainer that starts as the run's does, at a constant rate.
///
/// # Errors
/// Those of [`Run::begin`].
pub fn trainer_at(
    base: &Base,
    settings: &Settings,
    request: &Request,
    rows: RunRows<'_>,
    rate: f64,
    watched: (&str, &mut dyn Observer),
) -> Result<AnyTrainer> {
    let constant = Schedule { shape: Shape::Constant, peak: rate as f32, warmup: 0, total: u64::MAX };
    trainer(base, settings, request, &settings.options(base, constant), rows, false, watched)
}

/// An adapter that changes nothing yet. If the run `resumes`, its numbers come from a checkpoint, so EVA
/// doesn't read any rows.
fn fresh_adapter(
    base: &Base,
    settings: &Settings,
    lora: &LoraConfig,
    rows: RunRows<'_>,
    resumes: bool,
    (name, observer): (&str, &mut dyn Observer),
) -> Result<Adapter> {
    let mut random = Rng::new(settings.seed, INIT_STREAM);
    let mut adapter = Adapter::init_on(&base.model, &base.kernels, lora, &mut || random.f32())?;
    adapter.meta.base_name = base.model.gguf().string("general.name")?.unwrap_or_default().to_owned();
    adapter.meta.seed = settings.seed;
    let count = match settings.begin {
        Begin::Random => return Ok(adapter),
        Begin::Eva(count) => count,
        Begin::Protected(energy) => {
            adapter.meta.init = Init::Quiet;
            if !resumes {
                protect(&mut adapter, base, energy, rows.general, (name, observer))?;
            }
            return Ok(adapter);
        }
    };
    if resumes {
        adapter.meta.init = Init::Eva;
        return Ok(adapter);
    }
    let started = Instant::now();
    // The batches training would start with, each once.
    let batches = Batches::new(rows.train, settings.batch, settings.seed, Cursor::default());
    let count = batches.batches_per_epoch().min(count);
    let batches: Vec<Batch> = batches.take(count).collect();
    let mut stopped = Ok(());
    let go_on = |_: usize| {
        stopped = observer.go_on(&mut || Ok(()));
        stopped.is_ok()
    };
    let done = eva::initialize(
        &mut adapter,
        &base.model,
        &base.kernels,
        base.precision,
        &batches,
        settings.seed,
        go_on,
    );
    stopped.and(done)?;
    let took: Duration = started.elapsed();
    let told = format!("EVA: A from {count} batches in {:.1} s", took.as_secs_f64());
    observer.tell(name, Event::Note(&told));
    Ok(adapter)
}

/// Everything a run's result depends on.
fn identity(
    base: &Base,
    settings: &Settings,
    request: &Request,
    options: &TrainOptions,
    rows: RunRows<'_>,
) -> Identity {
    let keep = &request.keep;
    let kept = match keep.precision {
        // Then it only affects speed.
        KeepPrecision::F32 => "exactly".to_string(),
        KeepPrecision::Bf16 => format!("as bf16: {}", keep.describe(request.kept_blocks)),
    };
    settled(base, settings, options)
        .with("batch size", request.batch)
        .with("kept for the backward", kept)
        .with_rows("training rows", rows.train)
        .with_rows("held-out rows", rows.valid)
        .with_rows("replayed rows", rows.replay)
        .with_rows("general rows", rows.general)
}

/// What is fixed before rows and memory are known.
fn settled(base: &Base, settings: &Settings, options: &TrainOptions) -> Identity {
    let begin = match settings.begin {
        Begin::Random => "random".to_string(),
        Begin::Eva(batches) => format!("EVA of {batches} batches"),
        Begin::Protected(energy) => format!("inside {energy} of ordinary text's energy"),
    };
    let stored = match settings.method {
        Method::Adapter(_) => settings.stored.name().to_string(),
        Method::Full(dtype) => dtype.map_or("as in the base".to_string(), |dtype| dtype.name().to_string()),
    };
    let looks = match settings.looks {
        Looks::Every(_) => "the last step counts".to_string(),
        Looks::Best { times, patience } => format!("the best of {times} looks counts, {patience} end it"),
    };
    Identity::new(base.model.digest(), settings.method.lora(), options)
        .with("accumulation steps", settings.accumulation)
        .with("initial values", begin)
        .with("share of replayed rows", settings.replay_share)
        .with("stored as", stored)
        .with("looks", looks)
        .with("divergence on general rows", settings.general_kl.unwrap_or_default())
}

/// A run's settings by name, worded as files may store them.
pub(crate) fn stated(settings: &Settings, base: &Base) -> Vec<(String, String)> {
    let options = settings.options(base, settings.schedule(settings.rate.unwrap_or_default(), None));
    let length = match settings.length {
        Length::Steps(n) => format!("{n} steps"),
        Length::Epochs(n) => format!("{n} epochs"),
        Length::Tokens(n) => format!("{n} tokens"),
        Length::Minutes(n) => format!("{n} minutes"),
    };
    let warmup = match settings.warmup {
        Warmup::Steps(n) => format!("{n} steps"),
        Warmup::Share(share) => format!("{share} of the run"),
    };
    settled(base, settings, &options)
        .with("length", length)
        .with("warmup", warmup)
        .with("batch size", settings.batch)
        .with("rate is searched", settings.rate.is_none())
        .settings()
        .to_vec()
}
