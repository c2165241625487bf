//! `engraft import`: converts another tool's adapter and binds it to a model.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use engraft_runtime::adapter::foreign::Format;
use engraft_runtime::adapter::{Adapter, StoredAs};
use engraft_runtime::hex;
use engraft_runtime::probe::{Prober, check_effect};
use engraft_runtime::storage::{Disk, create_dir_all, lock_folder};

use super::{Invocation, common};
use crate::json;
use crate::options::{ModelOptions, parse, stat};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,

    /// The adapter: a PEFT or MLX folder, or a GGUF file; the format is detected
    #[arg(long, value_name = "PATH")]
    from: PathBuf,

    /// Output folder for adapter.engraft
    #[arg(long, value_name = "DIR", default_value = "adapter")]
    adapter_path: PathBuf,

    /// How to store its numbers
    #[arg(long = "type", value_name = "TYPE", default_value = "f32", value_parser = parse::stored_as())]
    stored: StoredAs,
}

pub(crate) fn run(options: &Options, invocation: &Invocation) -> Result<()> {
    options.model.path()?;
    stat(&options.from, "--from")?;
    let format = Format::detect(&options.from)?;
    let model = options.model.open()?;
    let imported = format.import(&options.from, model.config())?;
    for warning in &imported.warnings {
        eprintln!("warning: {warning}");
    }
    let digest = model.digest();
    let place = options.from.display();
    let mut adapter =
        Adapter::from_exchange(model.config(), digest, imported.exchange).map_err(|e| e.at(&place))?;
    adapter.meta.base_name = model.gguf().string("general.name")?.unwrap_or_default().to_owned();
    adapter.round_to(options.stored).map_err(|e| e.at(&place))?;
    let mut prober = Prober::new(&model, &common::best_kernels(), adapter.layout.rank_max());
    let binding = prober.bind(&adapter).map_err(|e| e.at(&place))?;
    check_effect(&binding, &adapter).map_err(|e| e.at(&place))?;
    adapter.binding = Some(binding);
    create_dir_all(&Disk, &options.adapter_path)?;
    let _lock = lock_folder(&Disk, &options.adapter_path).map_err(|e| e.at("--adapter-path"))?;
    let file = adapter.save(&Disk, &options.adapter_path, options.stored)?.path;
    let base = hex::short(&digest);
    eprintln!(
        "{} adapters don't identify their base: bound to {} ({base}) because the shapes fit",
        format.name(),
        model.label()
    );
    let (modules, rank) = (adapter.layout.slots().count(), adapter.config.rank);
    json::line(&format!(
        "{modules} projections, rank {rank}, effective multiplier {}: {}",
        adapter.config.scale(),
        file.display()
    ))?;
    invocation.emit(&json::object! {
        /// `peft`, `mlx` or `gguf`.
        format: format.name(),
        /// Adapted projections, over all blocks.
        modules: modules,
        rank: rank,
        alpha: adapter.config.alpha,
        /// Digest of the base that it was bound to.
        base: base,
        /// Parts of the adapter that were ignored.
        warnings: imported.warnings,
        /// Path of the adapter's file.
        adapter: file.display().to_string(),
    })
}
