//! `engraft train`: an adapter, or the whole model, trained inside its memory plan.

use std::borrow::Cow;
use std::io::Stderr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use engraft_kernels::{DType, Kernels};
use engraft_runtime::adapter::{Adapter, Binding, Init, LoraConfig, Precision, Prober};
use engraft_runtime::data::batches::in_order;
use engraft_runtime::data::{Batch, Batches, Cursor, Example, Mixed, MixedCursor, TrainValid};
use engraft_runtime::error::{Error, ErrorKind};
use engraft_runtime::model::Proj;
use engraft_runtime::model::tuned::Weights;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::plan::ArenaWords;
use engraft_runtime::rng::Rng;
use engraft_runtime::storage::{Disk, FileLock, create_dir_all, lock_folder};
use engraft_runtime::train::checkpoint::{Restored, Tally};
use engraft_runtime::train::optim::AdamWConfig;
use engraft_runtime::train::schedule::{Schedule, Shape};
use engraft_runtime::train::{
    Arm, Course, FullTrainer, RolledBack, StepReport, Stepped, TrainOptions, Trainer, eva,
};

use super::arm::{MODEL_FILE, STOPPED_FILE, score_file, write_model};
use super::prepare::{Prepared, Replay, describe_retention, prepare, room_of};
use super::resume::{self, ResumeOptions};
use super::{INIT_STREAM, Session, WATCH_INTERVAL, common};
use crate::conditions::{Conditions, Notice, WhenOptions};
use crate::json;
use crate::memory::Watch;
use crate::metrics::{Metrics, StepRecord};
use crate::options::{self, Length, TuneOptions, misuse, stat};
use crate::progress::{Progress, Step, Style};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) tune: TuneOptions,

    #[command(flatten)]
    pub(crate) resume: ResumeOptions,

    #[command(flatten)]
    when: WhenOptions,
}

pub(crate) fn run(options: &Options, session: &Session) -> Result<()> {
    let tune = &options.tune;
    let watch = Watch::start(WATCH_INTERVAL);
    tune.model.path()?;
    if tune.data.path()?.is_none() {
        return Err(
            misuse("--data is missing: name a folder that holds train.jsonl, or a .jsonl file").into()
        );
    }
    let lock = claim_output(options)?;
    if tune.lora.fine_tune_type == options::FineTune::Full {
        for name in [MODEL_FILE, STOPPED_FILE] {
            common::refuse_input(tune.model.path()?, &tune.adapter_path.join(name), "--adapter-path")?;
        }
    }
    let mut conditions = options.when.watch()?;
    let deadline = options.resume.time_budget.map(|time| Instant::now() + time);
    conditions.end_at(deadline);
    conditions.go_on(&session.cancel, &mut |notice| eprintln!("{notice}"))?;
    let mut prepared = prepare(tune, || room_of(tune, options.when.device()))?;
    eprintln!("{}", prepared.describe());
    eprint!("{}", describe_retention(tune, &prepared)?);
    eprintln!("{}", prepared.table());
    eprintln!("{}", prepared.wear.describe(None));
    prepared.check(tune.memory_budget)?;
    create_dir_all(&Disk, &tune.adapter_path)?;
    // Until the end.
    let _lock = match lock {
        Some(lock) => lock,
        None => take_lock(&tune.adapter_path)?,
    };
    let mut checkpoints = options.resume.open(&tune.adapter_path)?;
    let kernels = common::kernels(&tune.compute)?;
    let replay = replay_rows(tune, session, &mut prepared, &kernels)?;
    let Some(data) = prepared.data.take() else { return Ok(()) };
    let rows = (&data, &replay[..]);
    let (batches, train) = lay_out(tune, &prepared, rows)?;
    let identity = resume::identity(tune, &prepared, rows, &train)?;
    if options.resume.resume
        && let Some(result) = resume::finished(&tune.adapter_path, &identity)
    {
        // A run may end between its result and its checkpoints.
        checkpoints.remove_all(&Disk)?;
        eprintln!("{}: this run is finished: nothing to go on with", tune.adapter_path.display());
        if session.json {
            json::emit(&result)?;
        }
        return Ok(());
    }
    let resumes = options.resume.resume && checkpoints.newest_file(&Disk)?.is_some();
    let course = Course::new(identity).kept_in(checkpoints);
    let setting = Setting {
        tune,
        resume: &options.resume,
        resumes,
        session,
        prepared: &prepared,
        data: &data,
        deadline,
    };
    let run = Run::new(&setting, (batches, train), course, kernels, watch)?;
    let result = run.train(&mut conditions)?;
    if session.json {
        json::emit(&result)?;
    }
    Ok(())
}

/// Locks the output folder, where there is one, before anything in it is read or changed.
fn claim_output(options: &Options) -> Result<Option<FileLock>> {
    let folder = &options.tune.adapter_path;
    check_output(folder)?;
    if !folder.is_dir() {
        return Ok(None);
    }
    let lock = take_lock(folder)?;
    options.resume.open(folder)?;
    Ok(Some(lock))
}

fn take_lock(folder: &Path) -> Result<FileLock, Error> {
    lock_folder(&Disk, folder).map_err(|e| e.at("--adapter-path"))
}

/// The order of rows, and the optimizer's settings, which know how long the run is.
fn lay_out<'a>(
    tune: &TuneOptions,
    prepared: &Prepared,
    (data, replay): (&'a TrainValid, &'a [Example]),
) -> Result<(Mixed<'a>, TrainOptions)> {
    let (size, share) = (prepared.request.batch, tune.retention.share()?);
    let batches = Mixed::new(&data.train.examples, replay, share, size, tune.seed, MixedCursor::default());
    let per_step = u64::from(tune.run.grad_accumulation_steps);
    let steps = match tune.run.length() {
        Length::Iters(n) => u64::from(n),
        Length::Epochs(n) => (u64::from(n) * batches.batches_per_epoch() as u64).div_ceil(per_step),
    };
    Ok((batches, train_options(tune, steps)))
}

/// The rows to replay, sampled now where they come from the base; none without `--replay`.
fn replay_rows(
    tune: &TuneOptions,
    session: &Session,
    prepared: &mut Prepared,
    kernels: &Arc<Kernels>,
) -> Result<Vec<Example>> {
    let (starts, sampling) = match prepared.replay.take() {
        None => return Ok(Vec::new()),
        Some(Replay::Rows(rows)) => return Ok(rows),
        Some(Replay::Sampled(starts, sampling)) => (starts, sampling),
    };
    let started = Instant::now();
    let go_on = |_: usize| !session.cancel.load(Ordering::Relaxed);
    let rows = sampling.run(&prepared.model, kernels, common::precision(&tune.compute), &starts, go_on)?;
    let tokens: usize = rows.iter().map(Example::trained_tokens).sum();
    let seconds = started.elapsed().as_secs_f64();
    eprintln!("sampled {} rows of {tokens} tokens from the base in {seconds:.1} s", rows.len());
    Ok(rows)
}

/// An adapter that changes nothing yet, begun as `--init` says; where it `resumes`, its numbers come from a
/// checkpoint, and nothing is looked at for them.
fn fresh_adapter(
    setting: &Setting<'_>,
    lora: &LoraConfig,
    kernels: &Arc<Kernels>,
    resumes: bool,
) -> Result<Adapter> {
    let Setting { tune, session, prepared, data, .. } = *setting;
    let model = &prepared.model;
    let mut random = Rng::new(tune.seed, INIT_STREAM);
    let mut adapter = Adapter::init_on(model, kernels, lora, &mut || random.f32())?;
    adapter.meta.base_name = model.gguf().string("general.name")?.unwrap_or_default().to_owned();
    adapter.meta.seed = tune.seed;
    if tune.lora.init == options::Init::Eva && resumes {
        adapter.meta.init = Init::Eva;
    } else if tune.lora.init == options::Init::Eva {
        let started = Instant::now();
        // The batches that training would begin with, none of them twice.
        let size = tune.run.batch_size as usize;
        let batches = Batches::new(&data.train.examples, size, tune.seed, Cursor::default());
        let count = batches.batches_per_epoch().min(tune.lora.eva_batches() as usize);
        let batches: Vec<Batch> = batches.take(count).collect();
        let (precision, go_on) =
            (common::precision(&tune.compute), |_: usize| !session.cancel.load(Ordering::Relaxed));
        eva::initialize(&mut adapter, model, kernels, precision, &batches, tune.seed, go_on)?;
        eprintln!("EVA: A from {count} batches in {:.1} s", started.elapsed().as_secs_f64());
    }
    Ok(adapter)
}

/// Refuses an output that is a file, before an hour of training finds out.
fn check_output(folder: &Path) -> Result<(), Error> {
    if folder.exists() && !stat(folder, "--adapter-path")?.is_dir() {
        let message = format!("--adapter-path: {} is a file: name a folder", folder.display());
        return Err(misuse(message));
    }
    Ok(())
}

/// What a run is given.
#[derive(Clone, Copy)]
struct Setting<'a> {
    tune: &'a TuneOptions,
    resume: &'a ResumeOptions,
    /// Whether there is a checkpoint to go on from, whole or not.
    resumes: bool,
    session: &'a Session,
    prepared: &'a Prepared,
    data: &'a TrainValid,
    /// When its time is over.
    deadline: Option<Instant>,
}

/// A run of training: everything it holds, and what it has counted.
struct Run<'a> {
    setting: Setting<'a>,
    tune: &'a TuneOptions,
    session: &'a Session,
    data: &'a TrainValid,
    arm: Arm,
    /// Where it stands, and its checkpoints.
    course: Course,
    model: Arc<ModelFile>,
    kernels: Arc<Kernels>,
    batches: Mixed<'a>,
    /// The micro-batches of a step, filled anew each time.
    micro: Vec<Batch>,
    steps: u64,
    watch: Watch,
    metrics: Metrics,
    progress: Progress<Stderr>,
    valid_after: Option<f64>,
}

impl<'a> Run<'a> {
    /// Allocates the arena.
    fn new(
        setting: &Setting<'a>,
        (mut batches, options): (Mixed<'a>, TrainOptions),
        mut course: Course,
        kernels: Arc<Kernels>,
        watch: Watch,
    ) -> Result<Run<'a>> {
        let Setting { tune, session, prepared, data, resume, resumes, .. } = *setting;
        let steps = options.schedule.total;
        let mut trainer = arm(setting, &options, &kernels, resumes)?;
        let restored = match resumes {
            true => course.resume(&Disk, &mut trainer, &mut batches)?,
            false => Restored::default(),
        };
        if resumes && restored.found.is_none() && tune.lora.init == options::Init::Eva {
            // It was begun for numbers that are not there. The plan has room for one.
            drop(trainer);
            trainer = arm(setting, &options, &kernels, false)?;
        }
        let mut run = Run {
            arm: trainer,
            course,
            model: prepared.model.clone(),
            kernels,
            batches,
            micro: vec![Batch::default(); tune.run.grad_accumulation_steps as usize],
            steps,
            watch,
            metrics: Metrics::open(&tune.adapter_path)?,
            progress: Progress::new(
                std::io::stderr(),
                Style::for_stderr(tune.run.steps_per_report),
                Some(steps),
            ),
            valid_after: None,
            setting: *setting,
            tune,
            session,
            data,
        };
        if resume.resume {
            run.progress.note(&resume::describe(&restored, &tune.adapter_path, steps));
        }
        match &restored.found {
            Some(found) => run.metrics = Metrics::reopen(&tune.adapter_path, found.steps)?,
            None => run.begin()?,
        }
        Ok(run)
    }

    /// What comes before the first step of a run that goes on from nothing.
    fn begin(&mut self) -> Result<()> {
        self.course.remove_checkpoints(&Disk)?;
        if resume::forget_finished(&self.tune.adapter_path)? {
            let folder = self.tune.adapter_path.display();
            let what = if matches!(self.arm, Arm::Full(_)) { "model" } else { "adapter" };
            self.progress.note(&format!("{folder}: replaces the {what} of a finished run"));
        }
        self.metrics = Metrics::begin(&self.tune.adapter_path)?;
        self.tally().valid_before = self.evaluate()?;
        if self.tune.run.checkpoint_every > 0 && !self.is_cancelled() {
            self.checkpoint(true)?;
        }
        Ok(())
    }

    fn tally(&mut self) -> &mut Tally {
        &mut self.course.progress.tally
    }

    /// The whole run: steps, held-out loss, and the adapter's file.
    fn train(mut self, conditions: &mut Conditions) -> Result<json::Train> {
        while self.arm.steps() < self.steps && !self.is_stopping() {
            self.step()?;
            match self.wait(conditions) {
                Ok(()) => {}
                Err(broken) if broken.kind() == ErrorKind::NonFinite => self.go_back(broken.message())?,
                Err(given_up) => {
                    self.keep()?;
                    return Err(given_up.into());
                }
            }
        }
        self.progress.finish();
        if self.is_cancelled() || self.arm.steps() < self.steps {
            return Err(self.stopped());
        }
        self.finish()
    }

    /// Comes back when the machine may go on. A pause may end in anything, so it begins with a checkpoint.
    fn wait(&mut self, conditions: &mut Conditions) -> Result<(), Error> {
        let mut saved = Ok(());
        conditions.go_on(&self.session.cancel.clone(), &mut |notice| {
            self.progress.note(&notice.to_string());
            if matches!(notice, Notice::Waits(_)) && self.arm.steps() < self.steps {
                saved = self.checkpoint(false);
            }
        })?;
        saved
    }

    /// Held-out loss, and the result's file. Then nothing is left to go on with.
    fn finish(mut self) -> Result<json::Train> {
        self.valid_after = self.evaluate()?;
        if self.is_cancelled() {
            return Err(self.stopped());
        }
        let steps = self.arm.steps();
        let planned_private_bytes = self.setting.prepared.plan.private_bytes as u64;
        let valid_loss_after = self.valid_after;
        let tally = self.tally().clone();
        let mut result = json::Train {
            steps,
            tokens: tally.tokens,
            tokens_per_s: tally.tokens as f64 / tally.seconds,
            planned_private_bytes,
            peak_private_bytes: None,
            train_loss: tally.reported_loss.unwrap_or(f64::NAN),
            train_kl: tally.reported_kl,
            valid_loss_before: tally.valid_before,
            valid_loss_after,
            adapter: None,
            model: None,
            valid_loss_stored: None,
        };
        if let Some(file) = self.save_adapter()? {
            self.progress.note(&format!("saved {}", file.display()));
            result.adapter = Some(file.display().to_string());
        }
        if let Arm::Full(trainer) = self.arm {
            let file = write_model(self.tune, &trainer.into_weights(), MODEL_FILE)?;
            self.progress.note(&format!("saved {}", file.display()));
            let stored = score_file(self.tune, self.session, self.data, &file)?;
            if let (Some(before), Some(after), Some(stored)) = (tally.valid_before, valid_loss_after, stored)
            {
                let (base, asked) = (&self.setting.prepared.model, self.setting.prepared.dtype);
                let used = asked.unwrap_or(base.block(0).proj(Proj::Down).dtype());
                self.progress.note(&describe_stored(before, after, stored, used));
            }
            (result.model, result.valid_loss_stored) = (Some(file.display().to_string()), Some(stored));
        }
        result.peak_private_bytes = self.watch.sample();
        resume::note_finished(&self.tune.adapter_path, self.course.identity(), &result)?;
        self.course.remove_checkpoints(&Disk)?;
        Ok(result)
    }

    /// One optimizer step, and what is due after it.
    fn step(&mut self) -> Result<()> {
        match self.course.step(&Disk, &mut self.arm, &mut self.batches, &mut self.micro)? {
            Stepped::Done(report) => match self.follow(&report) {
                Err(error) if is_nonfinite(&error) => self.go_back(&format!("{error:#}")),
                done => done,
            },
            Stepped::Skipped(why) => {
                self.progress.note(&format!("skipped: {why}"));
                Ok(())
            }
            Stepped::RolledBack(back) => self.went_back(&back),
        }
    }

    /// What is due after a good step.
    fn follow(&mut self, report: &StepReport) -> Result<()> {
        self.show(report)?;
        let (step, run) = (self.arm.steps(), &self.tune.run);
        let due = |every: u32| every > 0 && step.is_multiple_of(every.into()) && step < self.steps;
        let checkpoint = due(run.checkpoint_every);
        let (evaluate, save) = (due(run.steps_per_eval), due(run.save_every));
        if evaluate {
            self.evaluate()?;
        }
        if save {
            self.save_adapter()?;
        }
        // The last: going on from it, nothing of this step is due any more.
        if checkpoint {
            self.checkpoint(true)?;
        }
        Ok(())
    }

    /// Commits where the run stands.
    fn checkpoint(&mut self, anchor: bool) -> Result<(), Error> {
        let saved = self.course.save(&Disk, &self.arm, self.batches.cursor(), anchor)?;
        self.progress.note(&format!("checkpoint saved step {}: {}", self.arm.steps(), saved.path.display()));
        Ok(())
    }

    /// Returns to the last anchor, for what showed after a step.
    fn go_back(&mut self, happened: &str) -> Result<()> {
        let back = self.course.roll_back(&Disk, &mut self.arm, &mut self.batches, happened)?;
        self.went_back(&back)
    }

    /// Tells of a return to an earlier step, whose successors are recorded anew.
    fn went_back(&mut self, back: &RolledBack) -> Result<()> {
        self.progress.note(&back.describe());
        self.metrics = Metrics::reopen(&self.tune.adapter_path, back.to)?;
        Ok(())
    }

    /// Progress of a step, and its record where one is due.
    fn show(&mut self, report: &StepReport) -> Result<()> {
        let step = self.arm.steps();
        let peak_private_bytes = self.watch.sample();
        let tally = &mut self.course.progress.tally;
        let (loss, elapsed_s) = (report.loss, tally.seconds);
        let tokens_per_s = tally.tokens as f64 / elapsed_s;
        self.progress.step(&Step { step, loss, tokens_per_s, peak_private_bytes, elapsed_s });
        if !step.is_multiple_of(self.tune.run.steps_per_report.into()) && step != self.steps && step != 1 {
            return Ok(());
        }
        tally.reported_loss = Some(std::mem::take(&mut tally.recent).value());
        let kl = std::mem::take(&mut tally.recent_kl).value();
        tally.reported_kl = report.kl.map(|_| kl);
        self.metrics.append(&StepRecord {
            step,
            train_loss: tally.reported_loss,
            kl: tally.reported_kl,
            learning_rate: Some(report.lr.into()),
            grad_norm: Some(report.grad_norm),
            tokens_per_s: Some(tokens_per_s),
            peak_private_bytes,
            ..StepRecord::default()
        })?;
        Ok(())
    }

    /// Held-out loss, recorded and shown; `None` without held-out rows, or when stopped midway.
    fn evaluate(&mut self) -> Result<Option<f64>> {
        let session = self.session;
        let rows = in_order(&self.data.valid.examples, 1);
        let rows = rows.take_while(|_| !session.cancel.load(Ordering::Relaxed));
        let total = self.arm.evaluate(rows);
        self.model.check_whole()?;
        if total.targets == 0 || self.is_cancelled() {
            return Ok(None);
        }
        let loss = common::finite(total.loss_sum / total.targets as f64, "the held-out loss")?;
        let step = self.arm.steps();
        self.metrics.append(&StepRecord { step, valid_loss: Some(loss), ..StepRecord::default() })?;
        self.progress.note(&format!("step {step}/{}  held-out loss {loss:.4}", self.steps));
        Ok(Some(loss))
    }

    /// Commits the adapter as it is now, bound to its base by what both compute; `None` where there is none.
    fn save_adapter(&mut self) -> Result<Option<PathBuf>> {
        let Arm::Adapter(trainer) = &mut self.arm else { return Ok(None) };
        let steps = trainer.steps();
        let meta = trainer.meta_mut();
        let tally = &self.course.progress.tally;
        (meta.steps, meta.tokens) = (steps, tally.targets);
        meta.valid_loss_before = tally.valid_before.map(|l| l as f32);
        meta.valid_loss_after = self.valid_after.map(|l| l as f32);
        let stored = self.tune.lora.adapter_precision.into();
        let mut adapter = Cow::Borrowed(trainer.adapter());
        if stored == Precision::F16 {
            // Training goes on with what it has; the fingerprint is of what will be loaded.
            adapter.to_mut().round_to(stored)?;
        }
        let mut prober = Prober::new(&self.model, &self.kernels, adapter.layout.rank_max());
        let binding = Binding::of(&adapter, &self.model, &mut prober)?;
        let saved = adapter.save_bound(&Disk, &self.tune.adapter_path, stored, &binding)?;
        Ok(Some(saved.path))
    }

    fn is_cancelled(&self) -> bool {
        self.session.cancel.load(Ordering::Relaxed)
    }

    fn is_stopping(&self) -> bool {
        self.is_cancelled() || self.setting.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Commits where the run stands, and what it has so far; `None` where there is no file for that.
    fn keep(&mut self) -> Result<Option<PathBuf>> {
        self.checkpoint(false)?;
        self.save_stopped()
    }

    /// Commits what is there of an unfinished run: an adapter under its name, a model under one of its own.
    fn save_stopped(&mut self) -> Result<Option<PathBuf>> {
        match &self.arm {
            Arm::Adapter(_) => self.save_adapter(),
            Arm::Full(trainer) => match trainer.weights() {
                Weights::Tuned(tuned) => Ok(Some(write_model(self.tune, &tuned, STOPPED_FILE)?)),
                Weights::Stored(_) => Ok(None),
            },
        }
    }

    /// Ctrl-C, or no time left: what is learned so far is kept, if anything is.
    fn stopped(&mut self) -> anyhow::Error {
        let (step, total) = (self.arm.steps(), self.steps);
        let why = if self.is_cancelled() { "stopped" } else { "--time-budget: out of time" };
        if step == 0 && !self.is_cancelled() {
            // With as little time again, a run that begins anew would never take a step.
            let message = match self.checkpoint(true) {
                Ok(()) => format!("{why} before the first step; the same command with --resume goes on"),
                Err(error) => return error.into(),
            };
            return common::cancelled(message).into();
        }
        if step == 0 {
            // Nothing that another start would not do again.
            if let Err(error) = self.course.remove_checkpoints(&Disk) {
                return error.into();
            }
            return common::cancelled(format!("{why} before the first step: nothing to save")).into();
        }
        let kept = match self.keep() {
            Ok(file) => file.map_or(String::new(), |f| format!("; saved {}", f.display())),
            Err(error) if is_nonfinite(&error) => format!("; {error:#}: the last one counts"),
            Err(error) => return error,
        };
        let message =
            format!("{why} after step {step} of {total}{kept}; the same command with --resume goes on");
        common::cancelled(message).into()
    }
}

fn is_nonfinite(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Error>().is_some_and(|e| e.kind() == ErrorKind::NonFinite)
}

/// What became of a gain when the model was stored.
fn describe_stored(before: f64, after: f64, stored: f64, used: DType) -> String {
    let text = format!(
        "held-out loss before {before:.4}, after {after:.4} (f32 weights), of the file written {stored:.4}"
    );
    if after >= before || stored - after <= 0.5 * (before - after) {
        return text;
    }
    let warning = format!("{text}\nwarning: storing as {} lost most of the gain", used.name());
    match common::finer_type(used) {
        "" => warning,
        finer => format!("{warning}; train again with {finer}"),
    }
}

/// The trainer, its arena allocated.
fn arm(setting: &Setting<'_>, options: &TrainOptions, kernels: &Arc<Kernels>, resumes: bool) -> Result<Arm> {
    let prepared = setting.prepared;
    let (model, kernels, options) = (prepared.model.clone(), kernels.clone(), options.clone());
    let adapter = match &prepared.lora {
        Some(lora) => Some(fresh_adapter(setting, lora, &kernels, resumes)?),
        None => None,
    };
    let words = ArenaWords::new(model.config(), &prepared.request);
    Ok(match adapter {
        Some(adapter) => Arm::Adapter(Box::new(Trainer::new(model, kernels, words, adapter, options))),
        None => Arm::Full(Box::new(FullTrainer::new(model, kernels, words, options))),
    })
}

/// The optimizer's settings from the flags.
fn train_options(tune: &TuneOptions, steps: u64) -> TrainOptions {
    let run = &tune.run;
    let shape = match run.schedule {
        options::Schedule::Constant => Shape::Constant,
        options::Schedule::Linear => Shape::Linear,
        options::Schedule::Cosine => Shape::Cosine,
    };
    TrainOptions {
        adamw: AdamWConfig {
            weight_decay: run.weight_decay as f32,
            max_grad_norm: run.max_grad_norm as f32,
            lora_plus_ratio: run.lora_plus_ratio,
            ..AdamWConfig::default()
        },
        schedule: Schedule {
            shape,
            peak: run.learning_rate(tune.lora.fine_tune_type) as f32,
            warmup: run.warmup_steps.into(),
            total: steps,
        },
        seed: tune.seed,
        precision: common::precision(&tune.compute),
        gradient: common::gradient(&tune.compute),
        kl: tune.retention.penalty(),
    }
}
