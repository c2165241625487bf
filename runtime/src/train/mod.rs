//! Training: the chain of blocks, the optimizer's step, the schedule, and the trainer that owns them.

pub mod calibrate;
pub mod chain;
pub mod full;
pub mod optim;
pub mod schedule;
pub mod trainer;

pub use chain::{Chain, Evaluated};
pub use full::FullTrainer;
pub use optim::AdamW;
pub use schedule::Schedule;
pub use trainer::{StepReport, TrainOptions, Trainer};
