//! Each algorithm once, over the vector trait of `simd`.

pub mod adamw;
pub mod attention;
pub mod bf16;
pub mod decode;
pub mod dot;
pub mod gemm;
pub mod rows;
pub mod simd;
pub mod skinny;
pub mod tile;
