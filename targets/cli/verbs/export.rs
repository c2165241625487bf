//! `engraft export`: writes an adapter in another tool's format.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use clap::{Args, value_parser};
use engraft_kernels::Kernels;
use engraft_runtime::adapter::approximate::{self, Approximation, ModuleError};
use engraft_runtime::adapter::foreign::Format;
use engraft_runtime::adapter::{Adapter, StoredAs};
use engraft_runtime::data::Example;
use engraft_runtime::error::Error;
use engraft_runtime::generate::StackedAdapter;
use engraft_runtime::merge::judge::{Judge, Judgement};
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::storage::Disk;
use serde::Serialize;

use super::measure::{self, HeldOut};
use super::{Invocation, common};
use crate::json;
use crate::options::{AdapterOption, ComputeOptions, ModelOptions, misuse, parse};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,

    #[command(flatten)]
    adapter: AdapterOption,

    /// Format to write
    #[arg(long, value_parser = parse::format())]
    format: Format,

    /// Folder (PEFT, MLX) or file (GGUF) to write
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,

    /// How to store its numbers
    #[arg(long = "type", value_name = "TYPE", default_value = "f32", value_parser = parse::stored_as())]
    stored: StoredAs,

    /// Name of the base for PEFT's or MLX's settings, such as its name on a hub
    #[arg(long, value_name = "NAME")]
    base_name: Option<String>,

    /// Write a DoRA as the nearest plain LoRA of this rank and report the error (and the loss, with --data or --file)
    #[arg(long, value_name = "R", value_parser = value_parser!(u32).range(1..=256))]
    dora_svd_rank: Option<u32>,

    #[command(flatten)]
    held_out: HeldOut,

    #[command(flatten)]
    compute: ComputeOptions,
}

pub(crate) fn run(options: &Options, invocation: &Invocation) -> Result<()> {
    options.model.path()?;
    let file = options.adapter.file()?;
    check_paths(options, &file)?;
    let model = options.model.open()?;
    let kernels = options.compute.kernels()?;
    let adapter = common::adapter(&model, &kernels, &file, options.adapter.force_base)?;
    // Read first, so that a bad text is refused at once.
    let examples = options.held_out.examples(&model)?;
    let (mut exchange, approximated) = match options.dora_svd_rank {
        None => (adapter.to_exchange(), None),
        Some(rank) => {
            let found = approximate(options, invocation, (&model, &kernels), &adapter, rank as usize)?;
            tell(&found);
            let measured = match examples.is_empty() {
                true => None,
                false => Some(judge(options, invocation, (&model, &kernels), adapter, &found, &examples)?),
            };
            let figures = figures(rank, &found, measured);
            (found.exchange, Some(figures))
        }
    };
    if let Some(name) = &options.base_name {
        exchange.base_name.clone_from(name);
    }
    let (output, stored) = (&options.output, options.stored);
    options.format.export(&Disk, output, &exchange, model.config(), stored)?;
    let format = options.format.name();
    let (modules, output) = (exchange.modules.len(), output.display().to_string());
    json::line(&format!("{modules} projections written as {format}: {output}"))?;
    invocation.emit(&json::object! {
        /// `peft`, `mlx` or `gguf`.
        format: format,
        /// Adapted projections, over all blocks.
        modules: modules,
        /// The file or folder.
        output: output,
        /// The plain LoRA written instead of a DoRA; `null` without `--dora-svd-rank`.
        approximation: approximated,
    })
}

fn check_paths(options: &Options, adapter: &Path) -> Result<(), Error> {
    let output = &options.output;
    common::refuse_input(options.model.path()?, output, "-o/--output")?;
    common::refuse_input(adapter, output, "-o/--output")?;
    if (options.format == Format::Gguf && output.is_dir())
        || (options.format != Format::Gguf && output.is_file())
    {
        let wanted = if options.format == Format::Gguf { "a file" } else { "a folder" };
        return Err(misuse(format!("-o/--output: {}: name {wanted}", output.display())));
    }
    if options.held_out.is_given()? && options.dora_svd_rank.is_none() {
        return Err(misuse("--file and --data measure what --dora-svd-rank loses, which is not given"));
    }
    Ok(())
}

/// The nearest plain LoRA, with progress.
fn approximate(
    options: &Options,
    invocation: &Invocation,
    (model, kernels): (&ModelFile, &Kernels),
    adapter: &Adapter,
    rank: usize,
) -> Result<Approximation, Error> {
    let per_layer = adapter.config.targets.len();
    let progress = |done: usize, all: usize| {
        if done.is_multiple_of(4 * per_layer) || done == all {
            eprintln!("approximated {done}/{all} projections");
        }
        !invocation.is_cancelled()
    };
    let seed = options.held_out.seed;
    approximate::low_rank(model, kernels, adapter, rank, seed, progress).map_err(|e| e.at("--dora-svd-rank"))
}

/// Prints the errors of all projections, one line per block, and the total.
fn tell(found: &Approximation) {
    for block in found.errors.chunk_by(|a, b| a.layer == b.layer) {
        let of = |e: &ModuleError| format!("{} {:.4}", e.proj.hf_name(), e.relative());
        let line: Vec<_> = block.iter().map(of).collect();
        eprintln!("layer {}: relative error of {}", block[0].layer, line.join(", "));
    }
    eprintln!("relative error of the whole change (Frobenius norm): {:.4}", found.relative_error());
}

/// Compares the base, the DoRA and its replacement on held-out text.
fn judge(
    options: &Options,
    invocation: &Invocation,
    (model, kernels): (&Arc<ModelFile>, &Arc<Kernels>),
    adapter: Adapter,
    found: &Approximation,
    examples: &[Example],
) -> Result<Judgement> {
    let instead = Adapter::from_exchange(model.config(), model.digest(), found.exchange.clone())?;
    let stacked = |adapter| StackedAdapter::new(model, kernels, &[(adapter, 1.0)]).map(Arc::new);
    let (rows, precision) = (measure::rows_max(examples), options.compute.precision);
    let mut judge = Judge::beside(model, stacked(adapter)?, stacked(instead)?, kernels, precision, rows)?;
    let j = measure::score(&mut judge, examples, invocation)?;
    eprintln!(
        "held out, {} tokens: base {:.4}, with the DoRA {:.4}, with the LoRA {:.4} nats/token\n\
         mean KL from the DoRA to the LoRA {:.5}, from the DoRA to the base {:.5}",
        j.tokens, j.nll_base, j.nll_adapter, j.nll_merged, j.kl_merged, j.kl_base
    );
    if j.is_lost() {
        eprintln!("warning: most of the DoRA's effect is lost; a higher --dora-svd-rank keeps more");
    }
    Ok(j)
}

/// A plain LoRA that replaces a DoRA. Errors are shares of the change, in Frobenius norms; what it costs on held-out
/// text are means over scored tokens, in nats.
fn figures(rank: u32, found: &Approximation, measured: Option<Judgement>) -> impl Serialize + use<> {
    let projection = |e: &ModuleError| {
        json::object! {
            layer: e.layer,
            /// As Hugging Face names it.
            projection: e.proj.hf_name(),
            relative_error: e.relative(),
        }
    };
    json::object! {
        rank: rank,
        /// Of all projections together.
        relative_error: found.relative_error(),
        projections: found.errors.iter().map(projection).collect::<Vec<_>>(),
        /// `null` without a held-out text.
        measured: measured.map(|j| json::object! {
            tokens: j.tokens,
            nll_base: j.nll_base,
            /// With the DoRA.
            nll_adapter: j.nll_adapter,
            nll_exported: j.nll_merged,
            /// KL(base with the DoRA ‖ base with the written LoRA).
            mean_kl: j.kl_merged,
            /// KL(base with the DoRA ‖ base).
            mean_kl_base: j.kl_base,
        }),
    }
}
