//! Every operation, plainly: the specification that the SIMD paths are tested against, and the
//! fallback where no SIMD path exists.

pub mod decode;
pub mod ops;
