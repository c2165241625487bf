//! `engraft train`: trains an adapter, or the whole model, within its memory plan.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use engraft_kernels::DType;
use engraft_runtime::data::{Example, TrainValid};
use engraft_runtime::error::{Error, ErrorKind};
use engraft_runtime::merge;
use engraft_runtime::model::Proj;
use engraft_runtime::run::{Base, Checkpoints, Event, Method, Observer, Run, RunRows, Start, Trained};
use engraft_runtime::storage::{Disk, FileLock, create_dir_all, lock_folder};

use super::prepare::{Prepared, Replay, prepare, room_of};
use super::resume::{self, ResumeOptions};
use super::{Invocation, WATCH_INTERVAL, common};
use crate::conditions::{Conditions, WhenOptions};
use crate::json;
use crate::memory::Watch;
use crate::metrics::{Metrics, StepRecord};
use crate::options::{TuneOptions, misuse, stat};
use crate::progress::{Progress, Step};

/// The model of a finished run.
const MODEL_FILE: &str = "model.gguf";
/// The model of a stopped run. It never replaces a finished one.
const STOPPED_FILE: &str = "stopped.gguf";

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) tune: TuneOptions,

    #[command(flatten)]
    pub(crate) resume: ResumeOptions,

    #[command(flatten)]
    when: WhenOptions,
}

pub(crate) fn run(options: &Options, invocation: &Invocation) -> Result<()> {
    let tune = &options.tune;
    let watch = Watch::start(WATCH_INTERVAL);
    tune.model.path()?;
    tune.data.required_path()?;
    let lock = claim_output(options)?;
    if tune.is_full() {
        for name in [MODEL_FILE, STOPPED_FILE] {
            common::refuse_input(tune.model.path()?, &tune.adapter_path.join(name), "--adapter-path")?;
        }
    }
    let mut conditions = options.when.watch()?;
    let deadline = options.resume.time_budget.map(|time| Instant::now() + time);
    conditions.end_at(deadline);
    conditions.go_on(&invocation.cancel, &mut |notice| eprintln!("{notice}"))?;
    let prepared = prepare(tune, || room_of(tune, options.when.device()))?;
    eprint!("{}", prepared.describe());
    eprintln!("{}", prepared.table());
    eprintln!("{}", prepared.wear.describe(None));
    prepared.check()?;
    create_dir_all(&Disk, &tune.adapter_path)?;
    // Held until the end.
    let _lock = lock.map_or_else(|| take_lock(&tune.adapter_path), Ok)?;
    let screen = Screen {
        tune,
        cancel: invocation.cancel.clone(),
        conditions,
        deadline,
        progress: Progress::on_stderr(tune.run.steps_per_report, None),
        metrics: Metrics::default(),
        watch,
        failed: Ok(()),
    };
    invocation.emit(&Training::begin(options, prepared, screen)?)
}

/// Locks the output folder, if it exists, before reading or changing anything in it.
fn claim_output(options: &Options) -> Result<Option<FileLock>> {
    let folder = &options.tune.adapter_path;
    if !folder.exists() {
        return Ok(None);
    }
    // Refused now, before hours of training.
    if !stat(folder, "--adapter-path")?.is_dir() {
        let message = format!("--adapter-path: {} is a file; name a folder", folder.display());
        return Err(misuse(message).into());
    }
    let lock = take_lock(folder)?;
    options.resume.open(folder)?;
    Ok(Some(lock))
}

fn take_lock(folder: &Path) -> Result<FileLock, Error> {
    lock_folder(&Disk, folder).map_err(|e| e.at("--adapter-path"))
}

/// A run, its rows, and the screen that shows it.
struct Training<'a> {
    options: &'a Options,
    prepared: &'a Prepared,
    rows: RunRows<'a>,
    run: Run,
    screen: Screen<'a>,
}

impl Training<'_> {
    /// Does the whole run and returns what `--json` prints.
    fn begin(options: &Options, mut prepared: Prepared, mut screen: Screen<'_>) -> Result<serde_json::Value> {
        let tune = &options.tune;
        let base = tune.compute.base(prepared.model.clone(), 0)?;
        let replay = replay_rows(&mut prepared, &base, &mut screen)?;
        let general = std::mem::take(&mut prepared.general);
        let Some(data) = prepared.data.take() else { return Ok(serde_json::Value::Null) };
        let TrainValid { train, valid, .. } = &data;
        let rows = RunRows {
            train: &train.examples,
            valid: &valid.examples,
            replay: &replay,
            general: &general,
            aside: &[],
        };
        let checkpoints = options.resume.open(&tune.adapter_path)?;
        let start = match options.resume.resume {
            true => Start::Resume(checkpoints),
            false => Start::Fresh(Some(checkpoints)),
        };
        let (settings, request) = (prepared.settings.clone(), &prepared.planned.request);
        let begun = Run::begin("", &base, settings, request, rows, start, &mut screen);
        let (mut run, restored) = begun?;
        run.save_in(&tune.adapter_path);
        if options.resume.resume
            && let Some(result) = resume::finished(&tune.adapter_path, run.identity())
        {
            // The finished run may have been killed before it removed its checkpoints.
            run.remove_checkpoints()?;
            eprintln!("{}: this run is finished; nothing is left to do", tune.adapter_path.display());
            return Ok(result);
        }
        screen.progress = Progress::on_stderr(tune.run.steps_per_report, run.total());
        if options.resume.resume {
            screen.note(&resume::describe(&restored, &tune.adapter_path, run.total()));
        }
        let mut training = Training { options, prepared: &prepared, rows, run, screen };
        match &restored.found {
            Some(found) => training.screen.metrics.cut(&tune.adapter_path, found.steps)?,
            None => training.replace()?,
        }
        Ok(serde_json::to_value(training.train()?)?)
    }

    /// A fresh run replaces a finished one in the same folder.
    fn replace(&mut self) -> Result<()> {
        let folder = &self.options.tune.adapter_path;
        if resume::forget_finished(folder)? {
            let what = if self.options.tune.is_full() { "model" } else { "adapter" };
            self.screen.note(&format!("{}: replaces the {what} of a finished run", folder.display()));
        }
        Ok(self.screen.metrics.begin(folder)?)
    }

    /// Takes all steps, and measures the held-out loss before and after.
    fn go(&mut self) -> Result<(), Error> {
        self.run.open(self.rows, &mut self.screen)?;
        let done = self.run.go(self.rows, None, &mut self.screen);
        self.screen.progress.finish();
        if done.as_ref().is_err_and(|given_up| given_up.kind() == ErrorKind::Busy) {
            self.keep()?;
        }
        done?;
        self.screen.failed()?;
        self.run.look(self.rows, &mut self.screen).map(drop)
    }

    /// Does the run and writes the result's file. Afterwards there is nothing to resume.
    fn train(mut self) -> Result<json::Train> {
        match self.go() {
            Err(stopped) if stopped.kind() == ErrorKind::Cancelled => {
                return Err(common::cancelled(self.stop()?).into());
            }
            done => done?,
        }
        let tune = &self.options.tune;
        let tally = self.run.progress().tally.clone();
        let (valid_loss_before, valid_loss_after) = self.run.valid_losses();
        let mut result = json::Train {
            steps: self.run.steps(),
            tokens: tally.tokens,
            tokens_per_s: tally.tokens as f64 / tally.seconds,
            planned_private_bytes: self.prepared.planned.plan.private_bytes as u64,
            peak_private_bytes: None,
            train_loss: tally.reported_loss.unwrap_or(f64::NAN),
            train_kl: tally.reported_kl,
            valid_loss_before,
            valid_loss_after,
            adapter: None,
            model: None,
            valid_loss_stored: None,
        };
        let identity = self.run.identity().clone();
        let mut checkpoints = Checkpoints::open(&Disk, &tune.adapter_path)?;
        if let Some(file) = self.run.save(&Disk, &tune.adapter_path)? {
            self.screen.note(&format!("saved {}", file.display()));
            result.adapter = Some(file.display().to_string());
        }
        if let (Some(before), Some(after)) = (valid_loss_before, valid_loss_after)
            && after > before
        {
            self.screen.note(&format!(
                "warning: the held-out loss rose from {before:.4} to {after:.4}, so the result does worse than what it \
                 began with; train again at a lower --learning-rate, or for fewer steps"
            ));
        }
        let Training { run, mut screen, rows, prepared, .. } = self;
        if let (Trained::Full(tuned), Method::Full(dtype)) = (run.finish(), &prepared.settings.method) {
            let file = merge::tuned::write(&Disk, &tune.adapter_path, MODEL_FILE, &tuned, *dtype)?.path;
            drop(tuned);
            screen.note(&format!("saved {}", file.display()));
            let stored = common::held_out_loss(&tune.compute, rows.valid, &file, &mut screen)?;
            if let (Some(before), Some(after), Some(stored)) = (valid_loss_before, valid_loss_after, stored) {
                let used = dtype.unwrap_or(prepared.model.block(0).proj(Proj::Down).dtype());
                screen.note(&describe_stored(before, after, stored, used));
            }
            (result.model, result.valid_loss_stored) = (Some(file.display().to_string()), Some(stored));
        }
        result.peak_private_bytes = screen.watch.sample();
        screen.failed()?;
        resume::note_finished(&tune.adapter_path, &identity, &result)?;
        checkpoints.remove_all(&Disk)?;
        Ok(result)
    }

    /// Commits a checkpoint and the result so far. Returns the result's file, if there is one; a model gets a
    /// separate name.
    fn keep(&mut self) -> Result<Option<PathBuf>, Error> {
        self.run.checkpoint(false, &mut self.screen)?;
        let folder = &self.options.tune.adapter_path;
        if let Some(file) = self.run.save(&Disk, folder)? {
            return Ok(Some(file));
        }
        let (Some(tuned), Method::Full(dtype)) = (self.run.weights(), &self.prepared.settings.method) else {
            return Ok(None);
        };
        Ok(Some(merge::tuned::write(&Disk, folder, STOPPED_FILE, &tuned, *dtype)?.path))
    }

    /// What to tell after Ctrl-C or when time is up. Keeps what was learned so far, if anything.
    fn stop(&mut self) -> Result<String, Error> {
        let (step, total) = (self.run.steps(), self.run.total().unwrap_or_default());
        let cancelled = self.screen.is_cancelled();
        let why = if cancelled { "stopped" } else { "--time-budget: out of time" };
        let again = "run the same command with --resume to continue";
        if step == 0 && !cancelled {
            // A checkpoint, because a run that restarts with as little time would never take a step.
            self.run.checkpoint(true, &mut self.screen)?;
            return Ok(format!("{why} before the first step; {again}"));
        }
        if step == 0 {
            // Nothing is lost: another start repeats it all.
            self.run.remove_checkpoints()?;
            return Ok(format!("{why} before the first step; nothing was saved"));
        }
        let kept = match self.keep() {
            Ok(file) => file.map_or(String::new(), |f| format!("; saved {}", f.display())),
            Err(error) if error.kind() == ErrorKind::NonFinite => {
                format!("; {error}, so the last checkpoint counts")
            }
            Err(error) => return Err(error),
        };
        Ok(format!("{why} after step {step} of {total}{kept}; {again}"))
    }
}

/// The rows to replay, sampled now if they come from the base; empty without `--replay`.
fn replay_rows(prepared: &mut Prepared, base: &Base, screen: &mut Screen<'_>) -> Result<Vec<Example>> {
    let sampled = match std::mem::replace(&mut prepared.replay, Replay::Rows(Vec::new())) {
        Replay::Rows(rows) => return Ok(rows),
        Replay::Sampled(sampled) => sampled,
    };
    let started = Instant::now();
    let rows = sampled.rows(base, screen)?;
    let tokens: usize = rows.iter().map(Example::trained_tokens).sum();
    let seconds = started.elapsed().as_secs_f64();
    eprintln!("sampled {} rows of {tokens} tokens from the base in {seconds:.1} s", rows.len());
    Ok(rows)
}

/// How much of the gain was left after storing the model.
fn describe_stored(before: f64, after: f64, stored: f64, used: DType) -> String {
    let text = format!(
        "held-out loss before {before:.4}, after {after:.4} (f32 weights), in the written file {stored:.4}"
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

/// Shows a run on stderr and records it next to its adapter.
struct Screen<'a> {
    tune: &'a TuneOptions,
    cancel: Arc<AtomicBool>,
    /// When the run must wait for the machine, and when its time is up.
    conditions: Conditions,
    deadline: Option<Instant>,
    progress: Progress,
    metrics: Metrics,
    watch: Watch,
    /// The first record that couldn't be written.
    failed: Result<(), Error>,
}

impl Screen<'_> {
    fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    /// # Errors
    /// That of the first record that couldn't be written.
    fn failed(&mut self) -> Result<(), Error> {
        std::mem::replace(&mut self.failed, Ok(()))
    }

    fn record(&mut self, record: &StepRecord) {
        let written = self.metrics.append(record);
        self.remember(written);
    }

    fn remember(&mut self, written: Result<(), Error>) {
        if self.failed.is_ok() {
            self.failed = written;
        }
    }
}

impl Observer for Screen<'_> {
    fn go_on(
        &mut self,
        save: &mut dyn FnMut() -> engraft_runtime::Result<()>,
    ) -> engraft_runtime::Result<()> {
        self.failed()?;
        self.conditions.observe(&self.cancel, &mut self.progress, save)?;
        match self.is_cancelled() || self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            true => Err(common::cancelled("stopped")),
            false => Ok(()),
        }
    }

    fn tell(&mut self, _: &str, event: Event<'_>) {
        match event {
            Event::Step(at) => self.progress.step(&Step {
                step: at.step,
                loss: at.report.loss,
                tokens_per_s: at.tokens_per_s(),
                peak_private_bytes: self.watch.sample(),
                elapsed_s: at.seconds,
            }),
            Event::Report(at, means) => self.record(&StepRecord {
                step: at.step,
                train_loss: Some(means.loss),
                kl: means.kl,
                learning_rate: Some(at.report.lr.into()),
                grad_norm: Some(at.report.grad_norm),
                tokens_per_s: Some(at.tokens_per_s()),
                peak_private_bytes: self.watch.sample(),
                ..StepRecord::default()
            }),
            Event::Look { step, total, loss, .. } => {
                self.record(&StepRecord { step, valid_loss: Some(loss), ..StepRecord::default() });
                let total = total.unwrap_or_default();
                self.progress.note(&format!("step {step}/{total}  held-out loss {loss:.4}"));
            }
            Event::Measured { .. } => {}
            Event::Note(text) => self.progress.note(text),
            Event::Skipped(why) => self.progress.note(&format!("skipped: {why}")),
            Event::RolledBack(back) => {
                self.progress.note(&back.describe());
                let cut = self.metrics.cut(&self.tune.adapter_path, back.to);
                self.remember(cut);
            }
            Event::Checkpoint(step, saved) => {
                let path = saved.path.display();
                self.progress.note(&format!("checkpoint saved at step {step}: {path}"));
            }
            Event::Saved(_) => {}
        }
    }
}
