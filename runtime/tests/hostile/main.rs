//! Files from strangers: fixed cases of every format that is read, each with how it must be refused, and
//! mutations of good files by seed. None may panic, take long, or take memory that its size does not warrant.

#[path = "../gguf/heap.rs"]
mod heap;
mod mutate;
mod reseal;
mod rows;
mod run;
mod subject;
mod sweep;
mod template;
mod tensors;
mod vocab;
#[path = "../gguf/writer.rs"]
#[allow(dead_code, reason = "the model's own tests use the rest")]
mod writer;
