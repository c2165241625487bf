//! x86-64: one file per step of the instruction set.

pub mod avx2;
pub mod avx512;
