//! One home for a run of training: what it is told ([`settings`]), the memory that it takes ([`prepare`]), how it goes
//! from its first step to its last ([`run`]), and who looks on ([`observer`]).
//!
//! Below that, [`course`] is a run between two looks: steps, what becomes of those that fail ([`guard`]), and
//! [`checkpoint`]s, from which it goes on or to which it goes back. [`control`] is an observer's part that other threads
//! steer: pause, cancel, heat.

pub mod checkpoint;
pub mod control;
pub mod course;
pub mod guard;
pub mod observer;
pub mod prepare;
#[allow(clippy::module_inception, reason = "the run itself, beside what it is made of")]
pub mod run;
pub mod settings;

pub use checkpoint::{Checkpoints, Identity, Progress};
pub use control::{Control, Heat};
pub use course::{Course, RolledBack, Stepped, Training};
pub use guard::{Guard, Judged};
pub use observer::{Event, Means, Nobody, Observer, Stepping};
pub use prepare::{Base, Extent, Limit, Planned, RunRows, SampledReplay, Setting, Wear};
pub use run::{Run, Start, Trained};
pub use settings::{Begin, KeepChoice, Length, Looks, Method, Settings, Warmup};
