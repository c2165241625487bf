//! Trainers: each trains an adapter step by step within its memory plan.

use std::ffi::{c_char, c_void};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use engraft_kernels::Kernels;
use engraft_runtime::data::Example;
use engraft_runtime::run::{self, Control, RunRows, Start};
use engraft_runtime::storage::Disk;

use crate::adapter::{self, Adapter, Held};
use crate::caller;
use crate::control;
use crate::data::{self, Data};
use crate::error::{ENGRAFT_BAD_DATA, ENGRAFT_CORRUPT, ENGRAFT_IO, Failure, Result};
use crate::handle::{self, Exclusive, kind};
use crate::model::{self, Model};
use crate::plan::{Request, TrainParams};
use crate::progress::{ENGRAFT_EVENT_NOTE, ENGRAFT_EVENT_STEP, Listener, Looker, Progress, ProgressCallback};

/// A training run. One call at a time; functions that steer it may be called from anywhere.
pub struct Trainer {
    _opaque: [u8; 0],
}

kind!(Trainer, Value, "trainer", run);

/// The value behind a trainer handle.
pub(crate) struct Value {
    control: Control,
    run: Exclusive<Run>,
}

/// A run, its rows, and the work it still has to rest from.
struct Run {
    run: run::Run,
    model: Arc<model::Inner>,
    kernels: Arc<Kernels>,
    data: Arc<data::Inner>,
    /// Rows that the model already knows.
    replay: Vec<Example>,
    /// The lock on the folder with its checkpoints.
    held: Option<Held>,
    /// The time of the last call that it hasn't rested from.
    took: Duration,
}

impl Run {
    /// Plans and allocates what the plan says.
    fn new(model: &Arc<model::Inner>, data: &Arc<data::Inner>, params: &TrainParams) -> Result<Run> {
        let request = Request::new(params, model, Some(data))?;
        let planned = request.planned(model, Some(data))?;
        request.limit.hold(&planned.plan, model.file.config(), &planned.request)?;
        let base = request.base(model, Some(data), params.threads)?;
        let replay = request.replay.read(&base, &mut run::Nobody)?;
        let rows = rows(data, &replay);
        let (settings, start) = (request.settings, Start::Fresh(None));
        let (run, _) = run::Run::begin("", &base, settings, &planned.request, rows, start, &mut run::Nobody)?;
        Ok(Run {
            run,
            model: model.clone(),
            kernels: base.kernels,
            data: data.clone(),
            replay,
            held: None,
            took: Duration::ZERO,
        })
    }

    /// Runs a long call under observation.
    fn watched<T>(
        &mut self,
        control: &Control,
        listener: &Listener,
        call: impl FnOnce(&mut run::Run, RunRows<'_>, &mut Looker<'_>) -> engraft_runtime::Result<T>,
    ) -> Result<T> {
        let now = Progress::of_run(ENGRAFT_EVENT_STEP, &self.run);
        let mut looker = Looker::new(control, listener, now, self.took);
        let rows = rows(&self.data, &self.replay);
        let done = call(&mut self.run, rows, &mut looker);
        self.took = looker.owed();
        looker.end(done)
    }

    /// Takes this many steps, or all that are left. Repeats steps that a return to a checkpoint undid.
    fn go(&mut self, count: Option<u64>, control: &Control, listener: &Listener) -> Result<()> {
        let until = count.map(|n| self.run.steps().saturating_add(n));
        self.watched(control, listener, |run, rows, looker| run.go(rows, until, looker))
    }

    /// Takes one step and returns its event.
    fn step(&mut self, control: &Control) -> Result<u32> {
        let done =
            self.watched(control, &Listener::nobody(), |run, rows, looker| run.advance(rows, looker))?;
        Ok(if done { ENGRAFT_EVENT_STEP } else { ENGRAFT_EVENT_NOTE })
    }

    /// Loss on the validation rows: the base's before the first step.
    fn evaluate(&mut self, control: &Control) -> Result<f64> {
        let found = self.watched(control, &Listener::nobody(), |run, rows, looker| run.look(rows, looker))?;
        found.ok_or_else(|| Failure::new(ENGRAFT_BAD_DATA, "there are no validation rows"))
    }

    fn save(&mut self, folder: &Path) -> Result<()> {
        let _held = adapter::hold(folder, self.held.as_ref())?;
        self.run.save(&Disk, folder)?;
        Ok(())
    }

    /// Commits everything that the run needs to continue, and the adapter. From then on the folder is this run's.
    fn checkpoint(&mut self, folder: &Path) -> Result<()> {
        let held = adapter::hold(folder, self.held.as_ref())?;
        self.run.keep_in(&adapter::one_name(folder))?;
        self.held = held.or(self.held.take());
        self.run.checkpoint(true, &mut run::Nobody)?;
        self.save(folder)
    }

    /// Continues from a checkpoint. Reading takes no lock.
    fn restore(&mut self, folder: &Path) -> Result<()> {
        let nobody = Control::default();
        let own = adapter::one_name(folder);
        let restored = self.watched(&nobody, &Listener::nobody(), |run, rows, _| run.restore(&own, rows))?;
        match restored.found {
            Some(_) => Ok(()),
            None if restored.passed_over.is_empty() => {
                let message = format!("{}: there is no checkpoint", folder.display());
                Err(Failure::new(ENGRAFT_IO, message))
            }
            None => Err(Failure::new(ENGRAFT_CORRUPT, restored.reasons())),
        }
    }

    /// The adapter in its current state, for use.
    fn snapshot(&mut self) -> Result<adapter::Inner> {
        let parameters = self.run.snapshot()?.ok_or_else(|| Failure::misuse("there is no adapter"))?;
        adapter::Inner::trusted(&self.model, &self.kernels, parameters)
    }
}

/// The rows of a run on this data.
pub(crate) fn rows<'a>(data: &'a data::Inner, replay: &'a [Example]) -> RunRows<'a> {
    let rows = &data.rows;
    RunRows { train: &rows.train.examples, valid: &rows.valid.examples, replay, ..RunRows::default() }
}

/// Makes a trainer. Plans first, and returns `DOES_NOT_FIT` if the plan exceeds the budget, before allocating
/// anything large. Then allocates all memory for training. `params` may be NULL. `*trainer` is freed with
/// `engraft_trainer_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_create(
    model: *const Model,
    data: *const Data,
    params: *const TrainParams,
    trainer: *mut *mut Trainer,
) -> i32 {
    let make = |model: &Arc<model::Inner>| {
        // SAFETY: the crate's contract, for the caller's struct.
        let params: TrainParams = unsafe { caller::settings(params) }?;
        let data = handle::find(data)?;
        data.value.check_of(model)?;
        let run = Run::new(model, &data.value, &params)?;
        Ok(Value { control: Control::default(), run: Exclusive::new(run) })
    };
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::make("engraft_trainer_create", model, trainer, make) }
}

/// Frees a trainer and ends its threads. `BUSY` while a call runs on it. Does nothing for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_free(trainer: *mut Trainer) -> i32 {
    handle::free("engraft_trainer_free", trainer)
}

/// Takes one step. `progress` may be NULL; otherwise set its `struct_size` first. `MISUSE` once all steps are
/// done. If a step is skipped because its loss isn't finite, or the run returns to its checkpoint (see
/// `engraft_trainer_checkpoint`), the `event` of `progress` is `ENGRAFT_EVENT_NOTE`, `step` stays or falls, and
/// the log says why.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_step(trainer: *const Trainer, progress: *mut Progress) -> i32 {
    handle::call("engraft_trainer_step", trainer, |trainer| {
        // SAFETY: the crate's contract, for the caller's struct.
        unsafe { caller::check_answer(progress) }?;
        let mut run = trainer.run.enter()?;
        if let Some(ended) = run.run.ended() {
            return Err(Failure::misuse(ended));
        }
        let event = run.step(&trainer.control)?;
        match progress.is_null() {
            true => Ok(()),
            // SAFETY: the crate's contract, for the caller's struct.
            false => unsafe { caller::answer(progress, Progress::of_run(event, &run.run)) },
        }
    })
}

/// Takes this many steps, or with 0 all that are left. `callback` may be NULL; it is called after each step, and
/// if it returns false, the call ends with `CANCELLED`. What was trained stays, and another call continues. If
/// the run returns to its checkpoint, `step` falls, a note says so, and the steps are repeated.
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

/// Puts the loss on the validation rows into `*loss`: the base's before the first step, with the adapter
/// afterwards. `BAD_DATA` if there are no such rows.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_evaluate(trainer: *const Trainer, loss: *mut f64) -> i32 {
    handle::call("engraft_trainer_evaluate", trainer, |trainer| {
        let found = trainer.run.enter()?.evaluate(&trainer.control)?;
        // SAFETY: the crate's contract, for the caller's number.
        unsafe { caller::put(loss, found) };
        Ok(())
    })
}

/// Gets the progress of a run. Set `struct_size` first. `BUSY` during a call, when the callback gets it instead.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_progress(trainer: *const Trainer, progress: *mut Progress) -> i32 {
    handle::call("engraft_trainer_progress", trainer, |trainer| {
        let now = Progress::of_run(ENGRAFT_EVENT_STEP, &trainer.run.enter()?.run);
        // SAFETY: the crate's contract, for the caller's struct.
        unsafe { caller::answer(progress, now) }
    })
}

/// Commits the current adapter as `adapter.engraft` in a folder, which is created if missing. When this returns
/// 0, the file is on disk, was read back, and only its owner can read it. `BUSY` if another trainer has its
/// checkpoints in the folder, or another call or process writes to it.
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

/// Commits everything that the run needs to continue, and the adapter as `engraft_trainer_save` does, to a
/// folder, which is created if missing. When this returns 0, both are on disk and were read back. From then on the
/// folder belongs to this trainer, until the trainer is freed or uses another one. All other writers to it get
/// `BUSY`, even other trainers and `engraft_adapter_save` in this process; so does this call if there is such a
/// writer already. The two newest checkpoints are kept; those of another run are replaced.
///
/// A run diverges after three steps in a row without a finite loss, or when its loss grows without end. It then
/// returns to its last checkpoint at half the learning rate, and a note says so. After three returns, or without
/// a checkpoint, its steps return `NONFINITE`.
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

/// Continues from the newest good checkpoint in a folder, with the same result as if the run had never stopped.
/// The trainer must have taken no step, and must be made with the run's model, rows and settings; `BASE_MISMATCH`
/// or `MISUSE` names a difference. `IO` if there is no checkpoint, `CORRUPT` if none is good; the trainer is
/// unchanged then.
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

/// Copies the current adapter, for sessions, slots and stores. `*adapter` is freed with `engraft_adapter_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_adapter(trainer: *const Trainer, adapter: *mut *mut Adapter) -> i32 {
    let make = |trainer: &Value| trainer.run.enter()?.snapshot();
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::make("engraft_trainer_adapter", trainer, adapter, make) }
}

/// Ends the running call, and later ones, with `CANCELLED` before their next step, until
/// `engraft_trainer_resume`. Saving still works. May be called from anywhere, at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_cancel(trainer: *const Trainer) -> i32 {
    handle::tell("engraft_trainer_cancel", trainer, |trainer| trainer.control.cancel())
}

/// Makes the running call, and later ones, wait before their next step, until `engraft_trainer_resume` or
/// `engraft_trainer_cancel`. May be called from anywhere, at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_pause(trainer: *const Trainer) -> i32 {
    handle::tell("engraft_trainer_pause", trainer, |trainer| trainer.control.pause())
}

/// Undoes a pause or a cancellation. May be called from anywhere, at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_resume(trainer: *const Trainer) -> i32 {
    handle::tell("engraft_trainer_resume", trainer, |trainer| trainer.control.resume())
}

/// Sets how hot the device is (`ENGRAFT_THERMAL_*`), so that training rests accordingly. May be called from
/// anywhere, at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_trainer_set_thermal(trainer: *const Trainer, thermal: i32) -> i32 {
    handle::call("engraft_trainer_set_thermal", trainer, |trainer| {
        control::set_thermal(&trainer.control, thermal)
    })
}

#[cfg(all(test, feature = "gate"))]
mod tests;
