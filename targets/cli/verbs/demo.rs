//! `engraft demo`: the whole way in under a minute, on the model that is compiled in.

use anyhow::Result;
use clap::{Args, value_parser};
use engraft_runtime::error::{Error, ErrorKind};

use super::Session;
use crate::options::{self, ComputeOptions};

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Optimizer steps (default: as many as the demo needs)
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=100_000))]
    pub(crate) iters: Option<u32>,

    /// Seed of the initial adapter and the order of rows
    #[arg(long, value_name = "N", default_value = "0", value_parser = options::seed)]
    pub(crate) seed: u64,

    #[command(flatten)]
    pub(crate) compute: ComputeOptions,
}

pub(crate) fn run(_options: &Options, _session: &Session) -> Result<()> {
    Err(Error::new(ErrorKind::Unsupported, "demo: not part of this build").into())
}
