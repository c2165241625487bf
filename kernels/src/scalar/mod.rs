//! Every operation, plainly: the specification of the SIMD versions, and the fallback.

pub mod decode;
