//! Engraft's runtime: maps a quantized GGUF model without copying it, plans memory, trains a LoRA or DoRA adapter inside
//! that plan, and keeps the adapter only if it beats the model alone on rows it never saw.
//!
//! What most programs need is at the top of this crate; the modules hold the rest. A whole life of an adapter:
//!
//! ```
//! use engraft_runtime::*;
//!
//! # fn main() -> Result<()> {
//! # let (model, rows) = ("../targets/cli/seedling.gguf", "../targets/cli/demo/private_train.jsonl");
//! let base = Base::open(model)?;
//! let text = Text::of(&base.model)?;
//!
//! // Rows, split into those to train on, those that choose the best step, and those that decide.
//! let reading = DataOptions { max_seq_length: 128, ..DataOptions::default() };
//! let material = Material::read(rows.as_ref(), &text, &reading, Limits::default())?;
//!
//! // Plan: what a run would take, before any of it is taken.
//! let method = Method::usual(base.model.config())?;
//! let settings = Settings { length: Length::Steps(20), ..Settings::of_arm(method) };
//! let recipe = Recipe::new("lora", settings);
//! let limit = Limit::here(&base);
//! let planned = recipe.check(&base, &material, RunRows::default(), &limit)?;
//! println!("{} bytes of private memory", planned.plan.private_bytes);
//!
//! // Train, then judge: better than doing nothing, and how much was forgotten?
//! let retention = RetentionSet::built_in(&text, reading.max_seq_length)?;
//! let contest = Contest { recipes: vec![recipe], retention, limit, ..Contest::new("example") };
//! let outcome = compare(&base, &material, (&text, &reading), &contest, &mut Nobody)?;
//! println!("{}", outcome.verdict.sentence);
//! # Ok(())
//! # }
//! ```
//!
//! `examples/` has programs to start from. ARCHITECTURE.md describes the modules and the one way data takes through
//! them.
#![deny(unsafe_code)]

pub mod adapter;
mod advice;
mod algebra;
pub mod bytes;
pub mod compare;
pub mod data;
pub mod error;
pub mod eval;
pub mod gate;
pub mod generate;
pub mod hex;
pub mod merge;
pub mod model;
pub mod nn;
pub mod plan;
pub mod probe;
#[cfg(feature = "candle")]
pub mod reference;
pub mod rng;
pub mod run;
pub mod selftest;
pub mod storage;
pub mod train;

pub use engraft_kernels::{Isa, Kernels};

pub use adapter::{Adapter, LoraConfig};
pub use compare::answers::Metric;
pub use compare::material::{Limits, Material, Rows};
pub use compare::recipe::Recipe;
pub use compare::retention::RetentionSet;
pub use compare::shots::Choice;
pub use compare::{Contest, Outcome, Product, Promotion, compare};
pub use data::{DataOptions, Example};
pub use error::{Advice, Error, ErrorKind, Result};
pub use gate::store::{Candidate, Store};
pub use gate::verdict::{Decision, Thresholds, Verdict};
pub use generate::{
    AdapterSlot, Ended, KvType, Listener, Sampler, SamplerOptions, Sequence, StackedAdapter, go_on,
};
pub use model::Proj;
pub use model::chat::Message;
pub use model::text::Text;
pub use model::weights::ModelFile;
pub use run::{
    Base, Checkpoints, Event, Length, Limit, Looks, Method, Nobody, Observer, Planned, Run, RunRows,
    Settings, Start, Trained,
};
pub use storage::Disk;
