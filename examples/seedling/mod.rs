//! The parts of `pretrain`: the corpus, the tokenizer, the model and its file, the adaptation check.

pub(crate) mod adapt;
pub(crate) mod corpus;
pub(crate) mod gguf;
pub(crate) mod rng;
pub(crate) mod tokens;
pub(crate) mod train;
