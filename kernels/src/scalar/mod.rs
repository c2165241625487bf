//! Every operation in plain code: the specification all other versions are tested against.

pub(crate) mod attention;
pub mod decode;
pub(crate) mod ops;
pub(crate) mod products;
