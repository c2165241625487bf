//! 64-bit ARM: one file per step of the instruction set, and what the steps share.

pub mod bf16;
pub mod decode;
pub mod dot;
pub mod dotprod;
pub mod i8mm;
pub mod neon;
