//! Turns a GGUF file into validated views: the file map, the parser, the hyperparameters, the weights, the
//! tokenizer and the chat template.
//!
//! ```
//! use engraft_runtime::{ModelFile, Text};
//!
//! # fn main() -> engraft_runtime::Result<()> {
//! let model = ModelFile::open("../targets/cli/seedling.gguf")?;
//! println!("{} blocks of width {}", model.config().n_layers, model.config().d_model);
//! let text = Text::of(&model)?;
//! assert!(!text.plain_prompt(&[], "turn on the light").is_empty());
//! # Ok(())
//! # }
//! ```

pub mod chat;
pub mod config;
pub mod digest_cache;
pub mod gguf;
pub mod map;
pub mod text;
pub mod tokenizer;
pub mod tuned;
pub mod usage;
pub mod weights;

pub use config::{ModelConfig, Proj};
