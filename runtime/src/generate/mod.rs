//! Generation: a session with its key/value cache, and the sampler.

pub mod sampler;
pub mod session;

pub use sampler::{Sampler, SamplerOptions};
pub use session::{Session, StackedAdapter};
