//! GGUF: what is read, what it agrees with, and everything that is refused.

mod accept;
mod heap;
mod hostile;
mod map;
mod shared;
mod writer;
