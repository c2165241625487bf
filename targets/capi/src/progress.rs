//! Progress: what callers learn while a call runs, and how they pause or stop it.

use std::ffi::{c_char, c_void};
use std::ptr::null_mut;
use std::time::{Duration, Instant};

use engraft_runtime as runtime;
use engraft_runtime::run::{Control, Event, Observer, Run};

use crate::caller::{structs, zeroed};
use crate::error::{Failure, Result};

/// A step is done; the fields from `step` on describe it.
pub const ENGRAFT_EVENT_STEP: u32 = 0;
/// The validation rows were evaluated; `valid_loss` is their loss. Only from gates.
pub const ENGRAFT_EVENT_VALIDATION: u32 = 1;
/// The call is paused, or the device is too hot: it waits once this event's callback has returned.
pub const ENGRAFT_EVENT_HELD: u32 = 2;
/// A note; see `text`.
pub const ENGRAFT_EVENT_NOTE: u32 = 3;

/// The progress of a run.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Progress {
    /// The struct's size in the library's version.
    pub struct_size: u32,
    /// `ENGRAFT_EVENT_*`.
    pub event: u32,
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run; 0 while unknown.
    pub steps: u64,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Mean loss of the last step, in nats per token; NaN before the first.
    pub loss: f64,
    /// Loss on the validation rows at their last evaluation; NaN before the first.
    pub valid_loss: f64,
    /// Learning rate of the last step.
    pub learning_rate: f64,
    /// Norm of the last step's gradient, before scaling it down.
    pub grad_norm: f64,
    /// Tokens per second of work.
    pub tokens_per_s: f64,
    /// Seconds of work.
    pub seconds: f64,
    /// The gate's arm, or a note's text: UTF-8, not NUL-terminated, valid during the callback. NULL for none.
    pub text: *const c_char,
    /// Bytes of `text`.
    pub text_length: usize,
}

structs!(Progress = "engraft_progress");

/// Receives progress; returning false cancels. Called on the thread of the call that it was passed to.
pub type ProgressCallback =
    Option<unsafe extern "C" fn(progress: *const Progress, user: *mut c_void) -> bool>;

/// The receiver of progress.
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

    /// Tells nobody.
    pub(crate) fn nobody() -> Listener {
        Listener { callback: None, user: null_mut() }
    }

    /// # Errors
    /// `CANCELLED` if the callback returns false.
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
    /// An event without figures yet.
    pub(crate) fn of(event: u32) -> Progress {
        Progress {
            struct_size: size_of::<Progress>() as u32,
            event,
            loss: f64::NAN,
            valid_loss: f64::NAN,
            ..zeroed()
        }
    }

    /// The progress of a run, now.
    pub(crate) fn of_run(event: u32, run: &Run) -> Progress {
        let tally = &run.progress().tally;
        let (before, after) = run.valid_losses();
        Progress {
            step: run.steps(),
            steps: run.total().unwrap_or(0),
            tokens: tally.tokens,
            loss: run.last().map_or(f64::NAN, |last| last.loss),
            valid_loss: after.or(before).unwrap_or(f64::NAN),
            learning_rate: run.last().map_or(0.0, |last| last.lr.into()),
            grad_norm: run.last().map_or(0.0, |last| last.grad_norm),
            tokens_per_s: if tally.seconds > 0.0 { tally.tokens as f64 / tally.seconds } else { 0.0 },
            seconds: tally.seconds,
            ..Progress::of(event)
        }
    }

    /// The same with a text, which must live as long as it is used.
    pub(crate) fn with_text(self, text: &str) -> Progress {
        Progress { text: text.as_ptr().cast(), text_length: text.len(), ..self }
    }
}

/// Watches a running call: tells the caller, and stops, pauses and cools it.
pub(crate) struct Looker<'a> {
    control: &'a Control,
    listener: &'a Listener,
    /// Why the caller wants it to end.
    refused: Option<Failure>,
    /// What was told last: what stands while a call is held.
    now: Progress,
    /// Work of an earlier call that was not rested from.
    owed: Duration,
    /// Since when it works without rest.
    working: Instant,
}

impl<'a> Looker<'a> {
    pub(crate) fn new(
        control: &'a Control,
        listener: &'a Listener,
        now: Progress,
        owed: Duration,
    ) -> Looker<'a> {
        Looker { control, listener, refused: None, now, owed, working: Instant::now() }
    }

    /// Work that was not rested from.
    pub(crate) fn owed(&self) -> Duration {
        self.owed + self.working.elapsed()
    }

    /// What became of the call, unless the caller wanted it to end.
    ///
    /// # Errors
    /// `CANCELLED`; those of the call.
    pub(crate) fn end<T>(self, done: runtime::Result<T>) -> Result<T> {
        match self.refused {
            Some(refused) => Err(refused),
            None => Ok(done?),
        }
    }

    fn event(&mut self, progress: Progress, text: &str) {
        self.now = progress;
        // What is being told can't fail; the next question whether to go on answers for it.
        if let Err(refused) = self.listener.tell(&progress.with_text(text)) {
            self.refused.get_or_insert(refused);
        }
    }

    fn heard(&self) -> runtime::Result<()> {
        self.refused.clone().map_or(Ok(()), |refused| Err(refused.into_error()))
    }
}

impl Observer for Looker<'_> {
    fn go_on(&mut self, save: &mut dyn FnMut() -> runtime::Result<()>) -> runtime::Result<()> {
        self.heard()?;
        let (control, worked) = (self.control, self.owed());
        let rested = control.rest(worked, &mut || {
            save()?;
            self.event(Progress { event: ENGRAFT_EVENT_HELD, ..self.now }, "");
            self.heard()
        });
        (self.owed, self.working) = (Duration::ZERO, Instant::now());
        rested
    }

    fn tell(&mut self, run: &str, event: Event<'_>) {
        let now = self.now;
        let note = Progress { event: ENGRAFT_EVENT_NOTE, ..now };
        match event {
            Event::Note(text) => self.event(note, text),
            Event::Skipped(why) => self.warn(note, &format!("skipped: {why}")),
            Event::RolledBack(back) => self.warn(Progress { step: back.to, ..note }, &back.describe()),
            Event::Step(at) => {
                let report = at.report;
                let progress = Progress {
                    event: ENGRAFT_EVENT_STEP,
                    step: at.step,
                    steps: at.total.unwrap_or(0),
                    tokens: at.tokens,
                    loss: report.loss,
                    learning_rate: report.lr.into(),
                    grad_norm: report.grad_norm,
                    tokens_per_s: at.tokens_per_s(),
                    seconds: at.seconds,
                    ..now
                };
                self.event(progress, run);
            }
            Event::Look { step, loss, .. } => {
                let event = ENGRAFT_EVENT_VALIDATION;
                self.event(Progress { event, step, valid_loss: loss, ..now }, run);
            }
            Event::Measured { .. } | Event::Report(..) | Event::Checkpoint(..) | Event::Saved(_) => {}
        }
    }
}

impl Looker<'_> {
    fn warn(&mut self, progress: Progress, text: &str) {
        ::log::warn!("{text}");
        self.event(progress, text);
    }
}
