//! Generation: a sequence with its key/value cache, and the sampler.
//!
//! ```
//! use engraft_runtime::{Base, Message, Sampler, SamplerOptions, Text, go_on};
//!
//! # fn main() -> engraft_runtime::Result<()> {
//! let base = Base::open("../targets/cli/seedling.gguf")?;
//! let text = Text::of(&base.model)?;
//! let mut sequence = base.sequence(None, 128)?;
//! let prompt = text.chat_prompt(&[Message::new("user", "turn on the light in the hall")])?;
//! let mut sampler = Sampler::new(SamplerOptions::greedy())?;
//! let by = (&text.tokenizer, text.tokenizer.decoder());
//! let answer = go_on(&mut sequence, &prompt, &mut sampler, 32, by, &mut |_: &str| true)?;
//! println!("{}", answer.text);
//! # Ok(())
//! # }
//! ```

pub mod batch;
pub mod continuation;
pub mod kv_cache;
mod pass;
pub mod replay;
pub mod sampler;
pub mod sequence;
pub mod stacked;

pub use batch::{Prefix, Sequences};
pub use continuation::{Continuation, Ended, Listener, go_on};
pub use engraft_kernels::KvType;
pub use sampler::{Sampler, SamplerOptions};
pub use sequence::Sequence;
pub use stacked::{AdapterSlot, StackedAdapter};
