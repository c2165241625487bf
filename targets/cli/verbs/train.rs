//! `engraft train`: a LoRA adapter, trained inside its memory plan.

use std::path::Path;

use anyhow::Result;
use clap::Args;
use engraft_runtime::error::{Error, ErrorKind};

use super::Session;
use crate::options::{TuneOptions, misuse, stat};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) tune: TuneOptions,
}

pub(crate) fn run(options: Options, _session: &Session) -> Result<()> {
    let tune = &options.tune;
    tune.model.path()?;
    data_path(tune)?;
    check_output(&tune.adapter_path)?;
    eprintln!("{}", tune.lora.describe());
    Err(Error::new(ErrorKind::Unsupported, "train: not part of this build").into())
}

/// The data's path, which training can't do without.
fn data_path(tune: &TuneOptions) -> Result<&Path, Error> {
    let missing = || misuse("--data is missing: name a folder that holds train.jsonl, or a .jsonl file");
    tune.data.path()?.ok_or_else(missing)
}

/// Refuses an output that is a file, before an hour of training finds out.
fn check_output(folder: &Path) -> Result<(), Error> {
    if folder.exists() && !stat(folder, "--adapter-path")?.is_dir() {
        let message = format!("--adapter-path: {} is a file: name a folder", folder.display());
        return Err(misuse(message));
    }
    Ok(())
}
