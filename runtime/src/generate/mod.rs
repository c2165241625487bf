//! Generation: a session with its key/value cache, and the sampler.

pub mod batch;
pub mod kv_cache;
pub mod replay;
pub mod sampler;
pub mod session;
pub mod stacked;

pub use batch::{BatchSession, Prefix};
pub use engraft_kernels::KvType;
pub use sampler::{Sampler, SamplerOptions};
pub use session::Session;
pub use stacked::{AdapterSlot, StackedAdapter};
