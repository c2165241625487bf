//! Turns a GGUF file into validated views: the file map, the parser, the hyperparameters, the weights, the
//! tokenizer and the chat template.

pub mod chat;
pub mod config;
pub mod digest_cache;
pub mod gguf;
pub mod map;
pub mod text;
pub mod tokenizer;
pub mod tuned;
pub mod weights;

pub use config::{ModelConfig, Proj};
