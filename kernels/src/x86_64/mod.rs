//! x86-64: one file per step of the instruction set, and what the steps share.

pub mod avx2;
pub mod avx512;
pub mod avx512_bf16;
pub mod decode;
pub mod dot;
pub mod dot_avx512;
