//! A training run: its settings ([`settings`]), the memory it needs ([`prepare`]), its course from first step
//! to last ([`run`]), and who watches it ([`observer`]).
//!
//! Below that, [`course`] is a run between two looks: its steps, how failed ones are handled ([`guard`]), and
//! the [`checkpoint`]s it resumes from or rolls back to. [`control`] is the part of an observer that other
//! threads steer: pause, cancel, heat.

pub mod checkpoint;
pub mod control;
pub mod course;
pub mod guard;
pub mod observer;
pub mod prepare;
#[allow(clippy::module_inception, reason = "the run itself, next to its parts")]
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
