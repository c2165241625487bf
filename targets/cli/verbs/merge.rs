//! `engraft merge`: merges an adapter into its model and measures the result before it keeps the file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use engraft_kernels::{DType, Kernels};
use engraft_runtime::adapter::Adapter;
use engraft_runtime::data::Example;
use engraft_runtime::error::{Error, ErrorKind};
use engraft_runtime::generate::StackedAdapter;
use engraft_runtime::merge;
use engraft_runtime::merge::judge::{Judge, Judgement};
use engraft_runtime::model::Proj;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::storage::{Disk, Storage, create_dir_all};
use serde::Serialize;

use super::measure::{self, HeldOut};
use super::{Invocation, common};
use crate::json;
use crate::options::{AdapterOption, ComputeOptions, ModelOptions, misuse};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,

    #[command(flatten)]
    adapter: AdapterOption,

    /// Merged model to write: a GGUF file
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// Type of the merged tensors (F32, F16, Q8_0, Q4_K, ...) [default: as in the model]
    #[arg(long = "type", value_name = "TYPE", value_parser = crate::options::parse::dtype)]
    dtype: Option<DType>,

    /// Keep the merged model even if it loses most of the adapter's gain
    #[arg(long)]
    force: bool,

    /// Don't measure: needs no held-out text, but notices no loss
    #[arg(long, conflicts_with_all = ["file", "data"])]
    unmeasured: bool,

    #[command(flatten)]
    held_out: HeldOut,

    #[command(flatten)]
    compute: ComputeOptions,
}

pub(crate) fn run(options: &Options, invocation: &Invocation) -> Result<()> {
    let base = options.model.path()?;
    let file = options.adapter.file()?;
    let (dir, name) = common::output_file(&options.output, "-o/--output", [base, file.as_path()])?;
    if !options.held_out.is_given()? && !options.unmeasured {
        let message = "merging can erase an adapter; add a held-out text with --file or --data, or skip the check with --unmeasured";
        return Err(misuse(message).into());
    }
    let model = options.model.open()?;
    let kernels = options.compute.kernels()?;
    let adapter = common::adapter(&model, &kernels, &file, options.adapter.force_base)?;
    // Read first, so that a bad text is refused at once.
    let examples = if options.unmeasured { Vec::new() } else { options.held_out.examples(&model)? };
    create_dir_all(&Disk, &dir)?;
    let exchange = adapter.to_exchange();
    let merged_tensors = exchange.modules.len();
    let staged = Staged(dir.join(format!(".{name}.unjudged")));
    let staged_name = format!(".{name}.unjudged");
    let bytes = merge::write(&Disk, &dir, &staged_name, &model, &exchange, options.dtype)?.bytes;
    let measured = match options.unmeasured {
        true => None,
        false => Some(judge(options, invocation, (&model, &kernels), adapter, &staged.0, &examples)?),
    };
    let lost = measured.as_ref().is_some_and(Judgement::is_lost);
    if let Some(found) = &measured {
        eprintln!("{}", describe(found));
        if lost && !options.force {
            let used = options.dtype.unwrap_or(model.block(0).proj(Proj::Down).dtype());
            return Err(refusal(found, used).into());
        }
    }
    place(&staged.0, &dir, &options.output)?;
    json::line(&format!("{merged_tensors} tensors merged: {}", options.output.display()))?;
    invocation.emit(&json::object! {
        /// The merged model's file.
        output: options.output.display().to_string(),
        bytes: bytes,
        /// Changed tensors.
        merged_tensors: merged_tensors,
        /// `null` with `--unmeasured`.
        measured: measured.as_ref().map(figures),
        /// Whether most of the gain was lost and only `--force` kept the file.
        forced: lost,
    })
}

/// A file that is removed on drop, unless it was renamed into place.
struct Staged(PathBuf);

impl Drop for Staged {
    fn drop(&mut self) {
        // The file may be missing: it was renamed, or writing failed.
        let _ = Disk.remove(&self.0);
    }
}

/// Renames the file, which is already on disk, into place.
fn place(staged: &Path, dir: &Path, output: &Path) -> Result<(), Error> {
    let io = |e| Error::io(format!("renaming into place {}", output.display()), e);
    Disk.rename(staged, output).map_err(io)?;
    Disk.sync_dir(dir).map_err(io)
}

fn judge(
    options: &Options,
    invocation: &Invocation,
    (model, kernels): (&Arc<ModelFile>, &Arc<Kernels>),
    adapter: Adapter,
    merged: &Path,
    examples: &[Example],
) -> Result<Judgement> {
    let merged = Arc::new(ModelFile::open(merged)?);
    let beside = Arc::new(StackedAdapter::new(model, kernels, &[(adapter, 1.0)])?);
    let (rows, precision) = (measure::rows_max(examples), options.compute.precision);
    let mut judge = Judge::new(model, beside, &merged, kernels, precision, rows)?;
    Ok(measure::score(&mut judge, examples, invocation)?)
}

fn describe(j: &Judgement) -> String {
    format!(
        "held out, {} tokens: base {:.4}, with the adapter {:.4}, merged {:.4} nats/token\n\
         merging costs {:+.4} nats of the adapter's gain of {:.4}; mean KL {:.5}, the adapter's is {:.5}",
        j.tokens,
        j.nll_base,
        j.nll_adapter,
        j.nll_merged,
        j.loss(),
        j.gain(),
        j.kl_merged,
        j.kl_base
    )
}

fn refusal(j: &Judgement, used: DType) -> Error {
    let why = if j.gain() > 0.0 && j.loss() > 0.5 * j.gain() {
        format!("{:+.4} nats of a gain of {:.4}", j.loss(), j.gain())
    } else {
        format!(
            "the merged model is no closer to the adapted one than the base is: mean KL {:.5} of {:.5}",
            j.kl_merged, j.kl_base
        )
    };
    let advice = match common::finer_type(used) {
        "" => String::new(),
        finer => format!("{finer} loses less; "),
    };
    let used = used.name();
    let message = format!(
        "merging as {used} loses most of the adapter's effect ({why}); {advice}--force keeps the file"
    );
    Error::new(ErrorKind::GateRefused, message)
}

/// What merging cost: means over scored tokens, in nats.
fn figures(j: &Judgement) -> impl Serialize + use<> {
    json::object! {
        tokens: j.tokens,
        nll_base: j.nll_base,
        /// The base with the adapter.
        nll_adapter: j.nll_adapter,
        nll_merged: j.nll_merged,
        /// `nll_merged - nll_adapter`.
        delta_nll: j.loss(),
        /// KL(base with adapter ‖ merged).
        mean_kl: j.kl_merged,
        /// KL(base with adapter ‖ base), for comparison.
        mean_kl_base: j.kl_base,
    }
}
