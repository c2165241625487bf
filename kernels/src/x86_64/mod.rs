//! x86-64 versions of the operations, a file per step.

pub mod decode;
pub mod dot;
pub mod dot_avx512;
