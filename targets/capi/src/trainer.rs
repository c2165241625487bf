//! Trainers: an adapter, trained step by step inside its plan.

use std::ffi::{c_char, c_void};
use std::path::Path;
use std::ptr::null;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engraft_kernels::Kernels;
use engraft_runtime::adapter::{Adapter as Parameters, Binding};
use engraft_runtime::data::batches::in_order;
use engraft_runtime::data::{Batch, Mixed};
use engraft_runtime::plan::{ArenaWords, MemoryPlan};
use engraft_runtime::rng::Rng;
use engraft_runtime::storage::Disk;
use engraft_runtime::train::checkpoint::Tally;
use engraft_runtime::train::{self, Course, Identity, Stepped};

use crate::adapter::{self, Adapter, Held};
use crate::caller::{self, Out, structs};
use crate::control::Control;
use crate::data::{self, Data};
use crate::error::{ENGRAFT_BAD_DATA, ENGRAFT_CORRUPT, ENGRAFT_IO, ENGRAFT_NONFINITE, Failure, Result};
use crate::handle::{self, Exclusive, Kind};
use crate::model::{self, Model};
use crate::plan::{Settings, TrainParams};

/// The random stream of an adapter's initial values: the command line's.
const INIT_STREAM: u64 = 0x494E_4954;

/// A step is done: `step`, `loss` and what follows are of it.
pub const ENGRAFT_EVENT_STEP: u32 = 0;
/// The rows to validate with were looked at: `valid_loss` is their loss. Of gates alone.
pub const ENGRAFT_EVENT_VALIDATION: u32 = 1;
/// The call is paused, or it is too hot: it waits once this event's callback has returned.
pub const ENGRAFT_EVENT_HELD: u32 = 2;
/// `text` is something to tell.
pub const ENGRAFT_EVENT_NOTE: u32 = 3;

/// How far a run is.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Progress {
    /// Bytes of this struct as the library knows it.
    pub struct_size: u32,
    /// `ENGRAFT_EVENT_*`.
    pub event: u32,
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run; 0 while unknown.
    pub steps: u64,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Mean loss of the last step, in nats per token; NaN before it.
    pub loss: f64,
    /// Loss on the rows to validate with, when they were looked at last; NaN before.
    pub valid_loss: f64,
    /// Learning rate of the last step.
    pub learning_rate: f64,
    /// Norm of its gradient, before it was scaled down.
    pub grad_norm: f64,
    /// Tokens per second of work.
    pub tokens_per_s: f64,
    /// Seconds of work.
    pub seconds: f64,
    /// The gate's arm, or what a note says: UTF-8 that no NUL ends, valid during the callback. NULL for none.
    pub text: *const c_char,
    /// Bytes of `text`.
    pub text_length: usize,
}

structs!(Progress = "engraft_progress");

/// Is told of progress; false cancels. Called on the thread of the call that it was given to.
pub type ProgressCallback =
    Option<unsafe extern "C" fn(progress: *const Progress, user: *mut c_void) -> bool>;

/// A run of training. One call at a time; what steers it may be called from anywhere.
pub struct Trainer {
    _opaque: [u8; 0],
}

impl Kind for Trainer {
    type Value = Value;
    const NAME: &'static str = "trainer";

    fn close(value: &Value) -> bool {
        value.run.close()
    }
}

/// What is behind a trainer handle.
pub(crate) struct Value {
    control: Control,
    run: Exclusive<Run>,
}

/// A run: everything it holds, and what it has counted.
struct Run {
    trainer: train::Trainer,
    model: Arc<model::Inner>,
    kernels: Arc<Kernels>,
    data: Arc<data::Inner>,
    settings: Settings,
    /// Sequences of a batch: no more than there are.
    batch: usize,
    /// Where it stands, and its checkpoints once a folder was named for them.
    course: Course,
    /// Where its checkpoints are, so that nobody else writes there.
    held: Option<Held>,
    /// The micro-batches of a step, filled anew each time.
    micro: Vec<Batch>,
    valid_after: Option<f64>,
    /// Whether that is the loss of the adapter as it is now.
    is_valid_of_now: bool,
    /// The last step.
    last: Option<train::StepReport>,
    /// What the last step took and was not rested from.
    took: Duration,
}

/// Who is told of progress.
pub(crate) struct Listener {
    callback: ProgressCallback,
    user: *mut c_void,
}

impl Listener {
    /// # Safety
    /// The crate's contract, for callbacks: as long as this lives.
    pub(crate) unsafe fn new(callback: ProgressCallback, user: *mut c_void) -> Listener {
        Listener { callback, user }
    }

    /// # Errors
    /// `CANCELLED` where the answer is false.
    pub(crate) fn tell(&self, progress: &Progress) -> Result<()> {
        let Some(callback) = self.callback else { return Ok(()) };
        // SAFETY: the crate's contract, for callbacks, as `new` demands.
        match unsafe { callback(progress, self.user) } {
            true => Ok(()),
            false => Err(Failure::cancelled("cancelled by the progress callback")),
        }
    }
}

impl Progress {
    /// An event that says nothing yet.
    pub(crate) fn of(event: u32) -> Progress {
        Progress {
            struct_size: size_of::<Progress>() as u32,
            event,
            step: 0,
            steps: 0,
            tokens: 0,
            loss: f64::NAN,
            valid_loss: f64::NAN,
            learning_rate: 0.0,
            grad_norm: 0.0,
            tokens_per_s: 0.0,
            seconds: 0.0,
            text: null(),
            text_length: 0,
        }
    }

    /// The same with a text, which must live as long as it is used.
    pub(crate) fn with_text(self, text: &str) -> Progress {
        Progress { text: text.as_ptr().cast(), text_length: text.len(), ..self }
    }
}

impl Run {
    /// Plans, and allocates what the plan says.
    fn new(model: &Arc<model::Inner>, data: &Arc<data::Inner>, params: &TrainParams) -> Result<Run> {
        let (file, c) = (&model.file, model.file.config());
        let settings = Settings::new(params, c)?;
        let request = settings.request(model, Some(data))?;
        settings.check(&MemoryPlan::new(c, &request), c, &request)?;
        let kernels = model::kernels(params.threads)?;
        let mut random = Rng::new(params.seed, INIT_STREAM);
        let mut parameters = Parameters::init_on(file, &kernels, &settings.lora, &mut || random.f32())?;
        parameters.meta.base_name = file.gguf().string("general.name")?.unwrap_or_default().to_owned();
        parameters.meta.seed = params.seed;
        let words = ArenaWords::new(c, &request);
        let options = settings.options.clone();
        let identity = Identity::new(parameters.base.digest, Some(&settings.lora), &options)
            .with("batch size", request.batch)
            .with("accumulation steps", settings.accumulation)
            .with("stored as", if settings.half { "f16" } else { "f32" })
            .with_rows("training rows", &data.rows.train.examples)
            .with_rows("held-out rows", &data.rows.valid.examples);
        let trainer = train::Trainer::new(file.clone(), kernels.clone(), words, parameters, options);
        Ok(Run {
            trainer,
            model: model.clone(),
            kernels,
            data: data.clone(),
            batch: request.batch,
            course: Course::new(identity),
            micro: vec![Batch::default(); settings.accumulation],
            held: None,
            valid_after: None,
            is_valid_of_now: false,
            last: None,
            took: Duration::ZERO,
            settings,
        })
    }

    fn steps(&self) -> u64 {
        self.settings.options.schedule.total
    }

    /// The rows to train on, from where the run stands.
    fn batches<'a>(&self, data: &'a data::Inner) -> Mixed<'a> {
        let (rows, seed) = (&data.rows.train.examples, self.settings.options.seed);
        Mixed::new(rows, &[], 0.0, self.batch, seed, self.course.progress.cursor)
    }

    /// So many steps, or all that are left; what a return to a checkpoint undoes is done again.
    fn go(&mut self, count: Option<u64>, control: &Control, listener: &Listener) -> Result<()> {
        let data = self.data.clone();
        let mut batches = self.batches(&data);
        let until = count.map_or(self.steps(), |n| self.trainer.steps().saturating_add(n).min(self.steps()));
        while self.trainer.steps() < until {
            let held = self.progress(ENGRAFT_EVENT_HELD);
            self.rest(control, &mut || listener.tell(&held))?;
            match self.step(&mut batches)? {
                None => listener.tell(&self.progress(ENGRAFT_EVENT_STEP))?,
                Some(note) => listener.tell(&self.progress(ENGRAFT_EVENT_NOTE).with_text(&note))?,
            }
        }
        Ok(())
    }

    /// Rests from the last step, and waits while held.
    fn rest(&mut self, control: &Control, held: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        control.rest(self.took, held)?;
        self.took = Duration::ZERO;
        Ok(())
    }

    /// One step on the next rows; says what became of one that was none.
    fn step(&mut self, batches: &mut Mixed<'_>) -> Result<Option<String>> {
        let started = Instant::now();
        let stepped = self.course.step(&Disk, &mut self.trainer, batches, &mut self.micro);
        self.took = started.elapsed();
        // A step that fails is not tried again on the same rows.
        self.course.progress.cursor = batches.cursor();
        self.is_valid_of_now = false;
        let note = match stepped? {
            Stepped::Done(report) => {
                self.last = Some(report);
                return Ok(None);
            }
            Stepped::Skipped(why) => format!("skipped: {why}"),
            Stepped::RolledBack(back) => back.describe(),
        };
        ::log::warn!("{note}");
        Ok(Some(note))
    }

    /// [`Run::step`] alone; gives the event that it was.
    fn step_once(&mut self, control: &Control) -> Result<u32> {
        self.rest(control, &mut || Ok(()))?;
        let data = self.data.clone();
        let mut batches = self.batches(&data);
        let note = self.step(&mut batches)?;
        Ok(note.map_or(ENGRAFT_EVENT_STEP, |_| ENGRAFT_EVENT_NOTE))
    }

    /// Loss on the rows to validate with: of the base before the first step.
    fn evaluate(&mut self, control: &Control) -> Result<f64> {
        let data = self.data.clone();
        let begun = self.trainer.steps() > 0;
        // Once stopped it stays so, whoever takes the cancellation back meanwhile: part of the rows is no result.
        let (mut stopped, mut working) = (Ok(()), Instant::now());
        let rows = in_order(&data.rows.valid.examples, 1).take_while(|_| {
            stopped = control.rest(working.elapsed(), &mut || Ok(()));
            working = Instant::now();
            stopped.is_ok()
        });
        let found = self.trainer.evaluate(rows, begun);
        stopped?;
        if found.targets == 0 {
            return Err(Failure::new(ENGRAFT_BAD_DATA, "there are no rows to validate with"));
        }
        let loss = found.loss_sum / found.targets as f64;
        if !loss.is_finite() {
            let message = format!("the loss is {loss}: the model or the adapter is broken");
            return Err(Failure::new(ENGRAFT_NONFINITE, message));
        }
        let before = &mut self.course.progress.tally.valid_before;
        *(if begun { &mut self.valid_after } else { before }) = Some(loss);
        self.is_valid_of_now = begun;
        Ok(loss)
    }

    fn progress(&self, event: u32) -> Progress {
        let Tally { tokens, seconds, valid_before, .. } = self.course.progress.tally;
        Progress {
            step: self.trainer.steps(),
            steps: self.steps(),
            tokens,
            loss: self.last.map_or(f64::NAN, |last| last.loss),
            valid_loss: self.valid_after.or(valid_before).unwrap_or(f64::NAN),
            learning_rate: self.last.map_or(0.0, |last| last.lr.into()),
            grad_norm: self.last.map_or(0.0, |last| last.grad_norm),
            tokens_per_s: if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 },
            seconds,
            ..Progress::of(event)
        }
    }

    /// Writes into the adapter how it was trained.
    fn note_training(&mut self) {
        let Tally { targets, valid_before: before, .. } = self.course.progress.tally;
        let steps = self.trainer.steps();
        let after = self.valid_after.filter(|_| self.is_valid_of_now);
        let meta = self.trainer.meta_mut();
        (meta.steps, meta.tokens) = (steps, targets);
        meta.valid_loss_before = before.map(|loss| loss as f32);
        meta.valid_loss_after = after.map(|loss| loss as f32);
    }

    /// # Errors
    /// `MISUSE` after a restore that failed midway.
    fn check_whole(&self) -> Result<()> {
        match self.trainer.numbers().whole {
            true => Ok(()),
            false => Err(Failure::misuse(
                "a restore failed midway: restore another checkpoint, or free the trainer",
            )),
        }
    }

    fn save(&mut self, folder: &Path) -> Result<()> {
        self.check_whole()?;
        let _held = adapter::hold(folder, self.held.as_ref())?;
        self.note_training();
        let precision = adapter::stored(u32::from(self.settings.half));
        adapter::save(&self.model, &self.kernels, self.trainer.adapter(), folder, precision)
    }

    /// Commits everything that the run needs to go on, and the adapter. The folder is this run's from then on.
    fn checkpoint(&mut self, folder: &Path) -> Result<()> {
        let held = adapter::hold(folder, self.held.as_ref())?;
        self.course.keep_in(&Disk, &adapter::one_name(folder))?;
        self.held = held.or(self.held.take());
        let cursor = self.course.progress.cursor;
        self.course.save(&Disk, &self.trainer, cursor, true)?;
        self.save(folder)
    }

    /// Goes on where a checkpoint stood. Reading takes no lock.
    fn restore(&mut self, folder: &Path) -> Result<()> {
        if self.trainer.steps() > 0 {
            return Err(Failure::misuse("a trainer is restored before its first step: create another"));
        }
        // Of a course of its own: where this fails, the checkpoints that the run may go back to are its own still.
        let mut course = Course::new(self.course.identity().clone());
        course.keep_in(&Disk, &adapter::one_name(folder))?;
        let data = self.data.clone();
        let mut batches = self.batches(&data);
        let restored = course.resume(&Disk, &mut self.trainer, &mut batches)?;
        match restored.found {
            Some(_) => {
                self.course = course;
                Ok(())
            }
            None if restored.passed_over.is_empty() => {
                let message = format!("{}: there is no checkpoint", folder.display());
                Err(Failure::new(ENGRAFT_IO, message))
            }
            None => Err(Failure::new(ENGRAFT_CORRUPT, restored.reasons())),
        }
    }

    /// The adapter as it is now, for use.
    fn snapshot(&mut self) -> Result<adapter::Inner> {
        self.check_whole()?;
        self.note_training();
        let mut parameters = self.trainer.adapter().clone();
        let mut prober = self.model.prober(&self.kernels, parameters.layout.rank_max());
        parameters.binding = Some(Binding::of(&parameters, &self.model.file, &mut prober)?);
        drop(prober);
        adapter::Inner::trusted(&self.model, &self.kernels, parameters)
    }
}

/// Makes a trainer: plans, refuses what exceeds the budget (`DOES_NOT_FIT`, before anything large is
/// allocated), and allocates everything that training takes. `params` may be NULL. `*trainer` is freed with
/// `engraft_trainer_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_create(
    model: *const Model,
    data: *const Data,
    params: *const TrainParams,
    trainer: *mut *mut Trainer,
) -> i32 {
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::clear(trainer) };
    handle::call("engraft_trainer_create", model, |model| {
        // SAFETY: the crate's contract, for the caller's place and struct.
        let (out, params) = unsafe { (Out::new(trainer)?, caller::settings(params)?) };
        let data = handle::find(data)?;
        data.value.check_of(model)?;
        let run = Run::new(model, &data.value, &params)?;
        out.publish(Value { control: Control::default(), run: Exclusive::new(run) })
    })
}

/// Frees a trainer and ends its threads. `BUSY` while a call runs on it. NULL is nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_free(trainer: *mut Trainer) -> i32 {
    handle::free("engraft_trainer_free", trainer)
}

/// One step. `progress` may be NULL; else set its `struct_size` before. `MISUSE` once all steps are done. Where a
/// step was skipped for a loss that is not finite, or the run went back to its checkpoint (see
/// `engraft_trainer_checkpoint`), `event` of `progress` is `ENGRAFT_EVENT_NOTE`, `step` has not risen or has
/// fallen, and the log says why.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_step(trainer: *const Trainer, progress: *mut Progress) -> i32 {
    handle::call("engraft_trainer_step", trainer, |trainer| {
        // SAFETY: the crate's contract, for the caller's struct.
        unsafe { caller::check_answer(progress) }?;
        let mut run = trainer.run.enter()?;
        if run.trainer.steps() >= run.steps() {
            return Err(Failure::misuse(format!("all {} steps are done", run.steps())));
        }
        let event = run.step_once(&trainer.control)?;
        match progress.is_null() {
            true => Ok(()),
            // SAFETY: the crate's contract, for the caller's struct.
            false => unsafe { caller::answer(progress, run.progress(event)) },
        }
    })
}

/// So many steps, or with 0 all that are left. `callback` may be NULL; it is called after each step, and
/// false from it ends the call with `CANCELLED`. What was trained stays, and another call goes on. Where the run
/// goes back to its checkpoint, `step` falls, a note says so, and the steps are done anew.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_run(
    trainer: *const Trainer,
    steps: u64,
    callback: ProgressCallback,
    user: *mut c_void,
) -> i32 {
    handle::call("engraft_trainer_run", trainer, |trainer| {
        // SAFETY: the crate's contract, for callbacks: it is called until this call returns.
        let listener = unsafe { Listener::new(callback, user) };
        let mut run = trainer.run.enter()?;
        run.go((steps > 0).then_some(steps), &trainer.control, &listener)
    })
}

/// Puts the loss on the rows to validate with into `*loss`: of the base before the first step, with the
/// adapter afterwards. `BAD_DATA` where there are none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_evaluate(trainer: *const Trainer, loss: *mut f64) -> i32 {
    handle::call("engraft_trainer_evaluate", trainer, |trainer| {
        let found = trainer.run.enter()?.evaluate(&trainer.control)?;
        // SAFETY: the crate's contract, for the caller's number.
        unsafe { caller::put(loss, found) };
        Ok(())
    })
}

/// Tells how far a run is. Set `struct_size` before. `BUSY` while it runs: the callback is told then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_progress(trainer: *const Trainer, progress: *mut Progress) -> i32 {
    handle::call("engraft_trainer_progress", trainer, |trainer| {
        let now = trainer.run.enter()?.progress(ENGRAFT_EVENT_STEP);
        // SAFETY: the crate's contract, for the caller's struct.
        unsafe { caller::answer(progress, now) }
    })
}

/// Commits the adapter as it is now as `adapter.engraft` in a folder, which is made if it is missing. When
/// this returns 0, the file is on disk and was read back; readable by its owner only. `BUSY` where another trainer
/// has its checkpoints in the folder, or another call or process writes to it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_save(
    trainer: *const Trainer,
    folder: *const c_char,
    folder_length: usize,
) -> i32 {
    handle::call("engraft_trainer_save", trainer, |trainer| {
        // SAFETY: the crate's contract, for the caller's path.
        let folder = unsafe { caller::path(folder, folder_length, "folder") }?;
        trainer.run.enter()?.save(&folder)
    })
}

/// Commits everything that the run needs to go on, and beside it the adapter as `engraft_trainer_save` does, in a
/// folder, which is made if it is missing. When this returns 0, both are on disk and were read back. From then on
/// the folder is this trainer's, until it is freed or names another one: all others that write there, trainers
/// and `engraft_adapter_save` in this process, too, get `BUSY`, as this call does where there is such a writer
/// already. The newest two checkpoints stay there; those of another run are replaced. A run that diverges (three
/// steps in a row without a finite loss, or a loss that grows without end) returns to its last checkpoint at half
/// the learning rate and tells so by a note; after three returns, or without a checkpoint, its steps are
/// `NONFINITE`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_checkpoint(
    trainer: *const Trainer,
    folder: *const c_char,
    folder_length: usize,
) -> i32 {
    handle::call("engraft_trainer_checkpoint", trainer, |trainer| {
        // SAFETY: the crate's contract, for the caller's path.
        let folder = unsafe { caller::path(folder, folder_length, "folder") }?;
        trainer.run.enter()?.checkpoint(&folder)
    })
}

/// Goes on where the newest whole checkpoint in a folder stood, to the same result as if the run had never
/// stopped. The trainer must have taken no step, and be created with the model, rows and settings of the run:
/// `BASE_MISMATCH` or `MISUSE` names what differs. `IO` where there is no checkpoint, `CORRUPT` where none is
/// whole; then the trainer is as it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_restore(
    trainer: *const Trainer,
    folder: *const c_char,
    folder_length: usize,
) -> i32 {
    handle::call("engraft_trainer_restore", trainer, |trainer| {
        // SAFETY: the crate's contract, for the caller's path.
        let folder = unsafe { caller::path(folder, folder_length, "folder") }?;
        trainer.run.enter()?.restore(&folder)
    })
}

/// Copies the adapter as it is now, for sessions, slots and stores. `*adapter` is freed with
/// `engraft_adapter_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_adapter(trainer: *const Trainer, adapter: *mut *mut Adapter) -> i32 {
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::clear(adapter) };
    handle::call("engraft_trainer_adapter", trainer, |trainer| {
        // SAFETY: the crate's contract, for the caller's place.
        let out = unsafe { Out::new(adapter) }?;
        let copy = trainer.run.enter()?.snapshot()?;
        out.publish(copy)
    })
}

/// Ends the call that runs, and those that follow, with `CANCELLED` before their next step, until
/// `engraft_trainer_resume`. From anywhere, at any time. Saving goes on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_cancel(trainer: *const Trainer) -> i32 {
    handle::call("engraft_trainer_cancel", trainer, |trainer| {
        trainer.control.cancel();
        Ok(())
    })
}

/// Lets the call that runs, and those that follow, wait before their next step, until
/// `engraft_trainer_resume` or `engraft_trainer_cancel`. From anywhere, at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_pause(trainer: *const Trainer) -> i32 {
    handle::call("engraft_trainer_pause", trainer, |trainer| {
        trainer.control.pause();
        Ok(())
    })
}

/// Takes back a pause and a cancellation. From anywhere, at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_resume(trainer: *const Trainer) -> i32 {
    handle::call("engraft_trainer_resume", trainer, |trainer| {
        trainer.control.resume();
        Ok(())
    })
}

/// Says how hot the device is (`ENGRAFT_THERMAL_*`): training rests accordingly. From anywhere, at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_set_thermal(trainer: *const Trainer, thermal: i32) -> i32 {
    handle::call("engraft_trainer_set_thermal", trainer, |trainer| trainer.control.set_thermal(thermal))
}

#[cfg(all(test, feature = "gate"))]
mod tests;
