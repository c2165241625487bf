//! Kernels on GGUF quantization blocks: matrix products forward and to the input, rank-r products,
//! normalization, rotary embedding, attention, SwiGLU, cross-entropy and AdamW.
//!
//! [`Kernels`] is the safe entry: it asserts every shape once, splits the work over its thread pool
//! by outputs, and runs the kernels of the instruction set it was made for. Kernels know nothing of layers,
//! files or errors; wrong shapes are bugs in the caller and panic.
//!
//! ```
//! use engraft_kernels::{Kernels, QMatrix};
//!
//! // One row of f32 "blocks" read back through the safe entry.
//! let weights = [0.5_f32, -1.0, 2.0, 0.25];
//! let matrix = QMatrix::of_f32(2, 2, &weights).unwrap();
//! let kernels = Kernels::detect(1);
//! let mut row = [0.0; 2];
//! kernels.dequantize_row(&matrix, 1, &mut row);
//! assert_eq!(row, [2.0, 0.25]);
//! ```

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod acts;
mod bf16;
mod block;
mod dispatch;
mod dropout;
mod eigen;
#[allow(missing_docs, reason = "loops whose variables carry the formulas' names")]
mod generic;
mod items;
mod kernels;
mod kv;
mod pool;
mod portable;
pub mod scalar;
mod view;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use acts::{QuantActs, acts_words};
pub use block::DType;
pub use dispatch::Isa;
pub use dropout::{drop_elements, mix};
pub use eigen::SymmetricEigen;
pub use items::{AdamWStep, LowRank, Rows, SoftmaxState};
pub use kernels::{
    AttnShape, ColumnSum, GainGradient, Kernels, NnOp, NtOp, Op, attention_scratch_words,
    cached_attention_scratch_words, gemm_scratch_words,
};
pub use kv::{KV_BLOCK, Kv, KvMut, KvRows, KvType};
pub use view::{QMatrix, ViewError};
