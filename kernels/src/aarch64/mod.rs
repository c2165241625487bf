//! 64-bit ARM: one file per step of the instruction set, and what the steps share.
//!
//! There is no bf16 step. Every core with `bfmmla` (Armv8.6) also has `smmla`, whose int8 input
//! gradient makes 32 products an instruction where `bfmmla` makes 16 and f32's `fmla` 4; the f32
//! path is for those who ask for f32, and rounding its operands to bf16 would not give it to them.

pub mod decode;
pub mod dot;
pub mod dotprod;
pub mod i8mm;
pub mod neon;
