//! Files from strangers: fixed cases of every format that is read, each with how it must be refused, and
//! mutations of good files by seed. None may panic, take long, or take memory that its size does not warrant.

mod mutate;
mod reseal;
mod rows;
mod run;
mod subject;
mod sweep;
mod template;
mod tensors;
mod vocab;
