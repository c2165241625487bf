//! Training: the chain of blocks, the optimizer's step, the schedule, and the trainer that owns them.

pub mod arm;
pub mod calibrate;
pub mod chain;
pub mod checkpoint;
pub mod course;
pub mod eva;
pub mod full;
pub mod guard;
pub mod optim;
pub mod schedule;
pub mod subspace;
pub mod trainer;

pub use crate::nn::divergence::{Compared, Direction, KlPenalty};
pub use arm::Arm;
pub use chain::{Chain, Evaluated};
pub use checkpoint::{Checkpoints, Identity, Progress};
pub use course::{Course, RolledBack, Stepped, Training};
pub use full::FullTrainer;
pub use guard::{Guard, Judged};
pub use optim::AdamW;
pub use schedule::Schedule;
pub use trainer::{StepReport, TrainOptions, Trainer};
