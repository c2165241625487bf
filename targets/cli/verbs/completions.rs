//! `engraft completions`: completions for shells and pages for man(1), made from the command line's definition.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use clap_complete::Shell;
use engraft_runtime::error::Error;
use engraft_runtime::storage::{Disk, create_dir_all};

use crate::args;
use crate::json;

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
#[command(
    after_help = "For man pages: engraft completions --man man1\n\nExample:\n  engraft completions bash > \
                  ~/.local/share/bash-completion/completions/engraft"
)]
pub(crate) struct Options {
    /// Print completions for this shell
    #[arg(value_enum)]
    shell: Option<Shell>,

    /// Write the man pages into this folder (created if missing)
    #[arg(long, value_name = "DIR")]
    man: Option<PathBuf>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if let Some(folder) = &options.man {
        write_pages(folder)?;
    }
    let Some(shell) = options.shell else { return Ok(()) };
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut args::command(), "engraft", &mut text);
    Ok(json::line(String::from_utf8(text)?.trim_end())?)
}

fn write_pages(folder: &Path) -> Result<(), Error> {
    create_dir_all(&Disk, folder)?;
    clap_mangen::generate_to(args::command(), folder)
        .map_err(|e| Error::io(format!("writing man pages into {}", folder.display()), e))
}
