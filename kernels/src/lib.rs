//! Kernels on GGUF quantization blocks.
#![cfg_attr(not(any(test, feature = "std")), no_std)]

pub mod block;
pub mod scalar;
pub mod view;
#[cfg(target_arch = "x86_64")]
pub mod x86_64;

pub use block::DType;
pub use view::{QMatrix, ViewError};
