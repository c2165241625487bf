//! Engraft.
fn main() {}
