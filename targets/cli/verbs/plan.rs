//! `engraft plan`: the memory of a training run, before it starts.

use anyhow::Result;
use clap::Args;
use engraft_runtime::error::{Error, ErrorKind};

use super::Session;
use crate::options::TuneOptions;

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) tune: TuneOptions,
}

pub(crate) fn run(options: Options, _session: &Session) -> Result<()> {
    let tune = &options.tune;
    tune.model.path()?;
    tune.data.path()?;
    eprintln!("{}", tune.lora.describe());
    Err(Error::new(ErrorKind::Unsupported, "plan: not part of this build").into())
}
