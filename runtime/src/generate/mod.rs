//! Generation: choosing tokens from logits.

pub mod sampler;
