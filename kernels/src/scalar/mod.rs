//! Every operation, plainly: the specification that all other versions are tested against.

pub(crate) mod attention;
pub mod decode;
pub(crate) mod ops;
pub(crate) mod products;
