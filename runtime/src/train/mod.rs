//! Training step by step: the chain of blocks, the optimizer's step, the schedule, and the trainer that owns them.
//!
//! ```
//! use engraft_runtime::train::schedule::{Schedule, Shape};
//!
//! let schedule = Schedule { shape: Shape::Linear, peak: 2e-4, warmup: 10, total: 100 };
//! assert!(schedule.rate(5) < schedule.rate(10) && schedule.rate(90) < schedule.rate(20));
//! ```

pub mod any;
pub mod calibrate;
pub mod chain;
pub mod eva;
pub mod full;
pub mod numbers;
pub mod optim;
pub mod quiet;
pub mod schedule;
pub mod subspace;
pub mod trainer;
mod walk;

pub use crate::nn::divergence::{Compared, Direction, KlPenalty, Pull};
pub use any::AnyTrainer;
pub use chain::{Chain, Evaluated};
pub use full::FullTrainer;
pub use numbers::{Numbers, NumbersMut};
pub use optim::AdamW;
pub use schedule::Schedule;
pub use trainer::{StepReport, TrainOptions, Trainer};
