//! The gate, so that no one ships a worse model: what it promotes is kept in a [`store`].

pub mod store;
