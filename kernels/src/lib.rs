//! Kernels on GGUF quantization blocks: matrix products forward and to the input, rank-r products,
//! normalization, rotary embedding, attention, SwiGLU, cross-entropy and AdamW.
//!
//! [`Kernels`] is the safe entry: it asserts every shape once, splits the work over its thread pool
//! by outputs, and runs the kernels of the instruction set it was made for. Kernels know no layers,
//! files or errors; wrong shapes are bugs of the caller and panic.
#![cfg_attr(not(any(test, feature = "std")), no_std)]
// On other processors only the scalar specification runs, and nothing instantiates the generic algorithms.
#![cfg_attr(not(any(target_arch = "aarch64", target_arch = "x86_64")), allow(dead_code))]

#[cfg(target_arch = "aarch64")]
pub mod aarch64;
pub mod acts;
pub mod block;
mod dispatch;
#[allow(missing_docs, reason = "work items whose fields carry the formulas' names")]
mod generic;
#[cfg(feature = "std")]
mod kernels;
pub mod kv;
#[cfg(feature = "std")]
pub mod pool;
pub mod scalar;
pub mod view;
#[cfg(target_arch = "x86_64")]
pub mod x86_64;

pub use acts::{QuantActs, QuantActsMut, acts_words};
pub use block::DType;
pub use dispatch::Isa;
pub use generic::adamw::AdamWStep;
pub use generic::gemm::{LowRank, Rows};
pub use generic::rows::SoftmaxState;
#[cfg(feature = "std")]
pub use kernels::{
    AttnShape, ColumnSum, GainGradient, Kernels, NnOp, NtOp, Op, attention_scratch_words,
    cached_attention_scratch_words, gemm_scratch_words,
};
pub use kv::{KV_BLOCK, Kv, KvMut, KvRows, KvType};
pub use view::{QMatrix, ViewError};
