//! Everything that the runtime promises, in one program: linking it once instead of once for each file is most of what a
//! first test run costs.

mod adapter_file;
mod approximate;
mod batch;
mod binding;
mod common;
mod compare;
mod crash;
mod data;
mod divergence;
mod eva;
mod exchange;
mod exposure;
mod forward;
mod from;
mod full;
mod gguf;
mod hostile;
mod keep;
mod merge;
mod quiet;
mod reference;
mod replay;
mod resume;
mod store;
mod swapping;
mod tokenizer;
mod training;
mod vocab_file;
