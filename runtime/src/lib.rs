//! Engraft's runtime: loads a quantized GGUF model without copying it, plans memory, trains a LoRA
//! adapter inside the plan, evaluates and generates. See ARCHITECTURE.md for the rooms and the one
//! way data takes through them.
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

pub use error::{Advice, Error, ErrorKind, Result};
