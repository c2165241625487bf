//! The parts of `pretrain`: the corpus, the tokenizer, the model and its file, the adaptation check.

pub mod adapt;
pub mod corpus;
pub mod gguf;
pub mod rng;
pub mod tokens;
pub mod train;
