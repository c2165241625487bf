//! `engraft export`: an adapter in the format of another tool.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use engraft_runtime::adapter::{gguf_file, peft};
use engraft_runtime::storage::Disk;

use super::{Session, common};
use crate::json;
use crate::options::{ModelOptions, StoredAs, adapter_file, misuse};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,

    /// The adapter: its folder or its file
    #[arg(long, value_name = "FILE")]
    lora: PathBuf,

    /// The format to write
    #[arg(long, value_enum)]
    format: Format,

    /// The folder (PEFT) or file (GGUF) to write
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,

    /// How its numbers are stored
    #[arg(long = "type", value_enum, value_name = "TYPE", default_value_t = StoredAs::F32)]
    stored: StoredAs,

    /// Name of the base that PEFT's settings shall give, such as its name on a hub
    #[arg(long, value_name = "NAME")]
    base_name: Option<String>,

    /// Take the adapter for this model though it names another base, where its shapes fit
    #[arg(long)]
    force_base: bool,
}

/// The formats that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A folder for PEFT
    Peft,
    /// A file for llama.cpp
    Gguf,
}

pub(crate) fn run(options: &Options, session: &Session) -> Result<()> {
    options.model.path()?;
    let file = adapter_file(&options.lora, "--lora")?;
    let output = &options.output;
    if (options.format == Format::Gguf && output.is_dir())
        || (options.format == Format::Peft && output.is_file())
    {
        let wanted = if options.format == Format::Gguf { "a file" } else { "a folder" };
        return Err(misuse(format!("-o/--output: {}: name {wanted}", output.display())).into());
    }
    let model = common::open_model(&options.model)?;
    let mut exchange = common::adapter(&model, &file, options.force_base)?.to_exchange();
    if let Some(name) = &options.base_name {
        exchange.base_name.clone_from(name);
    }
    let format = match options.format {
        Format::Peft => {
            peft::export(&Disk, output, &exchange, model.config(), options.stored.into())?;
            "peft"
        }
        Format::Gguf => {
            gguf_file::export(&Disk, output, &exchange, model.config(), options.stored.into())?;
            "gguf"
        }
    };
    let modules = exchange.modules.len();
    json::line(&format!("{modules} projections written as {format}: {}", output.display()))?;
    if session.json {
        json::emit(&json::Export { format, modules, output: output.display().to_string() })?;
    }
    Ok(())
}
