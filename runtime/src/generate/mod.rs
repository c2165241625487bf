//! Generation: a sequence with its key/value cache, and the sampler.

pub mod batch;
pub mod continuation;
pub mod kv_cache;
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
