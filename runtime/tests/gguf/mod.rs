//! GGUF: what is read, what it agrees with, and everything that is refused.

mod accept;
mod grid;
pub(crate) mod heap;
mod hostile;
mod map;
mod shared;
