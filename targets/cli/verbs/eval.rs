//! `engraft eval`: perplexity of a text, or masked loss of held-out rows.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, value_parser};
use engraft_runtime::error::{Error, ErrorKind};

use super::Session;
use crate::options::{self, AdapterOptions, ComputeOptions, DataOptions, ModelOptions, misuse};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) model: ModelOptions,

    /// A text file: perplexity as llama-perplexity computes it, over windows of --ctx-size tokens
    #[arg(long, visible_alias = "file", short = 'f', value_name = "FILE", conflicts_with = "data")]
    perplexity: Option<PathBuf>,

    /// Tokens of a window, or of a row at most
    #[arg(short, long, visible_alias = "max-seq-length", value_name = "N", default_value_t = 512, value_parser = value_parser!(u32).range(2..=1 << 20))]
    pub(crate) ctx_size: u32,

    /// Seed of the split, as it was for training
    #[arg(long, value_name = "N", default_value = "0", value_parser = options::seed)]
    pub(crate) seed: u64,

    #[command(flatten)]
    pub(crate) data: DataOptions,

    #[command(flatten)]
    pub(crate) adapters: AdapterOptions,

    #[command(flatten)]
    pub(crate) compute: ComputeOptions,
}

/// What to measure on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Subject<'a> {
    /// A text file, in llama-perplexity's convention.
    Text(&'a Path),
    /// Rows, masked.
    Rows(&'a Path),
}

impl Options {
    /// The text or the rows, which exist.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] when neither is given, [`ErrorKind::Io`] when it is missing.
    pub(crate) fn subject(&self) -> Result<Subject<'_>, Error> {
        match (&self.perplexity, self.data.path()?) {
            (Some(file), _) => options::stat(file, "--perplexity").map(|_| Subject::Text(file)),
            (None, Some(rows)) => Ok(Subject::Rows(rows)),
            (None, None) => Err(misuse("nothing to measure: give --perplexity FILE or --data DIR")),
        }
    }
}

pub(crate) fn run(options: Options, _session: &Session) -> Result<()> {
    options.model.path()?;
    options.subject()?;
    options.adapters.files()?;
    Err(Error::new(ErrorKind::Unsupported, "eval: not part of this build").into())
}
