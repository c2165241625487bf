//! A training run: its settings ([`settings`]), the memory it needs ([`prepare`]), its course from first step
//! to last ([`run`]), and who watches it ([`observer`]).
//!
//! [`setup`] makes what a run trains with. Below that, [`course`] is a run between two looks: its steps, how failed ones are handled ([`guard`]), and
//! the [`checkpoint`]s it resumes from or rolls back to. [`control`] is the part of an observer that other
//! threads steer: pause, cancel, heat.
//!
//! ```
//! use engraft_runtime::data::load_train_valid;
//! use engraft_runtime::*;
//!
//! # fn main() -> Result<()> {
//! let base = Base::open("../targets/cli/seedling.gguf")?;
//! let text = Text::of(&base.model)?;
//! let reading = DataOptions { max_seq_length: 128, ..DataOptions::default() };
//! let file = "../targets/cli/demo/private_train.jsonl".as_ref();
//! let data = load_train_valid(file, &text.tokenizer, &text.chat, &reading)?;
//! let rows = RunRows { train: &data.train.examples, valid: &data.valid.examples, ..RunRows::default() };
//!
//! let settings = Settings { length: Length::Steps(5), ..Settings::new(Method::usual(base.model.config())?) };
//! let planned = base.plan(&settings, rows, &Limit::here(&base))?;
//! let start = Start::Fresh(None);
//! let (mut run, _) = Run::begin("", &base, settings, &planned.request, rows, start, &mut Nobody)?;
//! run.go(rows, None, &mut Nobody)?;
//! assert_eq!(run.steps(), 5);
//! # Ok(())
//! # }
//! ```

pub mod checkpoint;
pub mod control;
pub mod course;
mod directions;
pub mod general;
pub mod guard;
mod look;
pub mod observer;
pub mod prepare;
#[allow(clippy::module_inception, reason = "the run itself, next to its parts")]
pub mod run;
pub mod settings;
pub mod setup;

pub use checkpoint::{Checkpoints, Identity, Progress};
pub use control::{Control, Heat};
pub use course::{Course, RolledBack, Stepped};
pub use guard::{Guard, Judged};
pub use observer::{Event, Means, Nobody, Observer, Stepping};
pub use prepare::{Base, Extent, Limit, Planned, RunRows, SampledReplay, Setting, Wear};
pub use run::{Run, Start, Trained};
pub use settings::{Begin, KeepChoice, Length, Looks, Method, Settings, Warmup};
pub use setup::Earlier;
