//! `engraft train`: an adapter, or the whole model, trained inside its memory plan.

use std::borrow::Cow;
use std::io::Stderr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use engraft_kernels::Kernels;
use engraft_runtime::adapter::{Adapter, Binding, LoraConfig, Precision, Prober};
use engraft_runtime::data::batches::in_order;
use engraft_runtime::data::{Batch, Batches, Cursor, Example, Mixed, MixedCursor, TrainValid};
use engraft_runtime::error::Error;
use engraft_runtime::model::tuned::Weights;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::plan::ArenaWords;
use engraft_runtime::rng::Rng;
use engraft_runtime::storage::{Disk, create_dir_all, lock_folder};
use engraft_runtime::train::optim::AdamWConfig;
use engraft_runtime::train::schedule::{Schedule, Shape};
use engraft_runtime::train::{Arm, FullTrainer, StepReport, TrainOptions, Trainer, eva};

use super::arm::{MODEL_FILE, STOPPED_FILE, score_file, write_model};
use super::prepare::{Prepared, Replay, describe_retention, prepare, room_of};
use super::{INIT_STREAM, Session, WATCH_INTERVAL, common};
use crate::conditions::{Conditions, WhenOptions};
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
    check_output(&tune.adapter_path)?;
    if tune.lora.fine_tune_type == options::FineTune::Full {
        for name in [MODEL_FILE, STOPPED_FILE] {
            common::refuse_input(tune.model.path()?, &tune.adapter_path.join(name), "--adapter-path")?;
        }
    }
    let mut conditions = options.when.watch()?;
    conditions.go_on(&session.cancel, &mut |line| eprintln!("{line}"))?;
    let mut prepared = prepare(tune, room_of(tune, options.when.device()))?;
    eprintln!("{}", prepared.describe());
    eprint!("{}", describe_retention(tune, &prepared)?);
    eprintln!("{}", prepared.table());
    prepared.check(tune.memory_budget)?;
    create_dir_all(&Disk, &tune.adapter_path)?;
    // Until the end; before anything in the folder is read or changed.
    let _lock = lock_folder(&Disk, &tune.adapter_path).map_err(|e| e.at("--adapter-path"))?;
    let kernels = common::kernels(&tune.compute)?;
    let replay = replay_rows(tune, session, &mut prepared, &kernels)?;
    let Some(data) = prepared.data.take() else { return Ok(()) };
    let result =
        Run::new(tune, session, &prepared, (&data, &replay), kernels, watch)?.train(&mut conditions)?;
    if session.json {
        json::emit(&result)?;
    }
    Ok(())
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

/// An adapter that changes nothing yet, begun as `--init` says.
fn fresh_adapter(
    tune: &TuneOptions,
    session: &Session,
    prepared: &Prepared,
    lora: &LoraConfig,
    data: &TrainValid,
    kernels: &Arc<Kernels>,
) -> Result<Adapter> {
    let model = &prepared.model;
    let mut random = Rng::new(tune.seed, INIT_STREAM);
    let mut adapter = Adapter::init_on(model, kernels, lora, &mut || random.f32())?;
    adapter.meta.base_name = model.gguf().string("general.name")?.unwrap_or_default().to_owned();
    adapter.meta.seed = tune.seed;
    if tune.lora.init == options::Init::Eva {
        let started = Instant::now();
        // The batches that training would begin with, none of them twice.
        let size = tune.run.batch_size as usize;
        let batches = Batches::new(&data.train.examples, size, tune.seed, Cursor::default());
        let count = batches.batches_per_epoch().min(tune.lora.eva_batches as usize);
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

/// A run of training: everything it holds, and what it has counted.
struct Run<'a> {
    tune: &'a TuneOptions,
    session: &'a Session,
    data: &'a TrainValid,
    arm: Arm,
    model: Arc<ModelFile>,
    kernels: Arc<Kernels>,
    batches: Mixed<'a>,
    /// The micro-batches of a step, filled anew each time.
    micro: Vec<Batch>,
    steps: u64,
    planned_bytes: u64,
    watch: Watch,
    metrics: Metrics,
    progress: Progress<Stderr>,
    tokens: u64,
    targets: u64,
    seconds: f64,
    /// Loss of the steps since the last report, and of the last full report.
    recent: Mean,
    reported_loss: f64,
    /// The same of the divergence from the base, where it is weighed.
    recent_kl: Mean,
    reported_kl: Option<f64>,
    valid_before: Option<f64>,
    valid_after: Option<f64>,
}

/// A mean over targets.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    sum: f64,
    count: usize,
}

impl<'a> Run<'a> {
    /// Allocates the arena.
    fn new(
        tune: &'a TuneOptions,
        session: &'a Session,
        prepared: &Prepared,
        (data, replay): (&'a TrainValid, &'a [Example]),
        kernels: Arc<Kernels>,
        watch: Watch,
    ) -> Result<Run<'a>> {
        let per_step = tune.run.grad_accumulation_steps as usize;
        let (size, share) = (prepared.request.batch, tune.retention.share()?);
        let batches =
            Mixed::new(&data.train.examples, replay, share, size, tune.seed, MixedCursor::default());
        let steps = match tune.run.length() {
            Length::Iters(n) => u64::from(n),
            Length::Epochs(n) => {
                (u64::from(n) * batches.batches_per_epoch() as u64).div_ceil(per_step as u64)
            }
        };
        Ok(Run {
            arm: arm(tune, session, prepared, data, &kernels, steps)?,
            model: prepared.model.clone(),
            kernels,
            batches,
            micro: vec![Batch::default(); per_step],
            steps,
            planned_bytes: prepared.plan.private_bytes as u64,
            watch,
            metrics: Metrics::open(&tune.adapter_path)?,
            progress: Progress::new(std::io::stderr(), Style::for_stderr(tune.run.steps_per_report), steps),
            tokens: 0,
            targets: 0,
            seconds: 0.0,
            recent: Mean::default(),
            reported_loss: f64::NAN,
            recent_kl: Mean::default(),
            reported_kl: None,
            valid_before: None,
            valid_after: None,
            tune,
            session,
            data,
        })
    }

    /// The whole run: held-out loss, steps, held-out loss, and the adapter's file.
    fn train(mut self, conditions: &mut Conditions) -> Result<json::Train> {
        self.valid_before = self.evaluate()?;
        while self.arm.steps() < self.steps && !self.is_cancelled() {
            self.step()?;
            let wait = conditions.go_on(&self.session.cancel, &mut |line| self.progress.note(line));
            if let Err(given_up) = wait {
                self.save_stopped()?;
                return Err(given_up.into());
            }
        }
        self.progress.finish();
        if self.is_cancelled() {
            return Err(self.stopped());
        }
        self.valid_after = self.evaluate()?;
        let mut result = json::Train {
            steps: self.arm.steps(),
            tokens: self.tokens,
            tokens_per_s: self.tokens as f64 / self.seconds,
            planned_private_bytes: self.planned_bytes,
            peak_private_bytes: None,
            train_loss: self.reported_loss,
            train_kl: self.reported_kl,
            valid_loss_before: self.valid_before,
            valid_loss_after: self.valid_after,
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
            if let (Some(before), Some(after), Some(stored)) = (self.valid_before, self.valid_after, stored) {
                self.progress.note(&describe_stored(before, after, stored));
            }
            (result.model, result.valid_loss_stored) = (Some(file.display().to_string()), Some(stored));
        }
        result.peak_private_bytes = self.watch.sample();
        Ok(result)
    }

    /// One optimizer step, and what is due after it.
    fn step(&mut self) -> Result<()> {
        let started = Instant::now();
        for batch in &mut self.micro {
            self.batches.next_into(batch);
        }
        let report = self.arm.step(&self.micro)?;
        self.seconds += started.elapsed().as_secs_f64();
        self.tokens += report.tokens as u64;
        self.targets += report.targets as u64;
        self.recent.sum += report.loss * report.targets as f64;
        self.recent.count += report.targets;
        self.recent_kl.sum += report.kl.unwrap_or_default() * report.targets as f64;
        self.recent_kl.count += report.targets;
        self.show(&report)?;

        let (step, run) = (self.arm.steps(), &self.tune.run);
        let due = |every: u32| every > 0 && step.is_multiple_of(every.into()) && step < self.steps;
        let (evaluate, save) = (due(run.steps_per_eval), due(run.save_every));
        if evaluate {
            self.evaluate()?;
        }
        if save {
            self.save_adapter()?;
        }
        Ok(())
    }

    /// Progress of a step, and its record where one is due.
    fn show(&mut self, report: &StepReport) -> Result<()> {
        let step = self.arm.steps();
        let tokens_per_s = self.tokens as f64 / self.seconds;
        let peak_private_bytes = self.watch.sample();
        let loss = report.loss;
        self.progress.step(&Step { step, loss, tokens_per_s, peak_private_bytes, elapsed_s: self.seconds });
        if !step.is_multiple_of(self.tune.run.steps_per_report.into()) && step != self.steps && step != 1 {
            return Ok(());
        }
        self.reported_loss = self.recent.sum / self.recent.count as f64;
        self.recent = Mean::default();
        self.reported_kl = report.kl.map(|_| self.recent_kl.sum / self.recent_kl.count as f64);
        self.recent_kl = Mean::default();
        self.metrics.append(&StepRecord {
            step,
            train_loss: Some(self.reported_loss),
            kl: self.reported_kl,
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
        (meta.steps, meta.tokens) = (steps, self.targets);
        meta.valid_loss_before = self.valid_before.map(|l| l as f32);
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

    /// Ctrl-C: what is learned so far is kept, if anything is.
    fn stopped(&mut self) -> anyhow::Error {
        let step = self.arm.steps();
        if step == 0 {
            return common::cancelled("stopped before the first step: nothing to save").into();
        }
        match self.save_stopped() {
            Ok(file) => {
                let total = self.steps;
                let saved = file.map_or("nothing to save".into(), |f| format!("saved {}", f.display()));
                common::cancelled(format!("stopped after step {step} of {total}; {saved}")).into()
            }
            Err(error) => error,
        }
    }
}

/// What became of a gain when the model was stored.
fn describe_stored(before: f64, after: f64, stored: f64) -> String {
    let text = format!(
        "held-out loss before {before:.4}, after {after:.4} (f32 weights), of the file written {stored:.4}"
    );
    match after < before && stored - after > 0.5 * (before - after) {
        true => text + "\nwarning: storing lost most of the gain; train again with --type Q8_0 or F16",
        false => text,
    }
}

/// The trainer, its arena allocated.
fn arm(
    tune: &TuneOptions,
    session: &Session,
    prepared: &Prepared,
    data: &TrainValid,
    kernels: &Arc<Kernels>,
    steps: u64,
) -> Result<Arm> {
    let (model, kernels) = (prepared.model.clone(), kernels.clone());
    let options = train_options(tune, steps);
    let adapter = match &prepared.lora {
        Some(lora) => Some(fresh_adapter(tune, session, prepared, lora, data, &kernels)?),
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
