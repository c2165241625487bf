//! `engraft merge`: an adapter merged into its model, measured before the file takes its name.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::Result;
use clap::{Args, value_parser};
use engraft_kernels::DType;
use engraft_runtime::adapter::Adapter;
use engraft_runtime::data::Example;
use engraft_runtime::error::{Error, ErrorKind};
use engraft_runtime::generate::StackedAdapter;
use engraft_runtime::merge;
use engraft_runtime::merge::judge::{Judge, Judgement};
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::storage::{Disk, Storage, create_dir_all};

use super::{Session, common, eval};
use crate::json;
use crate::options::{self, ComputeOptions, DataOptions, ModelOptions, adapter_file, misuse, stat};

/// Examples between two reports.
const TELL_EVERY: usize = 8;

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,

    /// The adapter: its folder or its file
    #[arg(long, value_name = "FILE")]
    lora: PathBuf,

    /// The merged model to write: a GGUF file
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// Type of the merged tensors (F32, F16, Q8_0, Q4_K, ...) [default: each its own]
    #[arg(long = "type", value_name = "TYPE", value_parser = dtype)]
    dtype: Option<DType>,

    /// A held-out text to measure on (or --data)
    #[arg(short, long, value_name = "FILE", conflicts_with = "data")]
    file: Option<PathBuf>,

    /// Tokens of a window of the text, or of a row at most
    #[arg(short, long, visible_alias = "max-seq-length", value_name = "N", default_value_t = 512, value_parser = value_parser!(u32).range(2..=1 << 20))]
    ctx_size: u32,

    /// Tokens to score at most
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = value_parser!(u32).range(1..))]
    max_tokens: u32,

    /// Seed of the split, as it was for training
    #[arg(long, value_name = "N", default_value = "0", value_parser = options::seed)]
    seed: u64,

    /// Keep the merged model even if most of the adapter's gain is lost
    #[arg(long)]
    force: bool,

    /// Do not measure: no held-out text is needed, and no loss is noticed
    #[arg(long, conflicts_with_all = ["file", "data"])]
    unmeasured: bool,

    /// Take the adapter for this model though it names another base, where its shapes fit
    #[arg(long)]
    force_base: bool,

    #[command(flatten)]
    data: DataOptions,

    #[command(flatten)]
    compute: ComputeOptions,
}

pub(crate) fn run(options: &Options, session: &Session) -> Result<()> {
    let base = options.model.path()?;
    let file = adapter_file(&options.lora, "--lora")?;
    let (dir, name) = output(&options.output, base)?;
    let data = options.data.path()?;
    if let Some(text) = &options.file {
        stat(text, "-f/--file")?;
    } else if data.is_none() && !options.unmeasured {
        let message =
            "merging can erase an adapter: name a held-out text with --file or --data, or say --unmeasured";
        return Err(misuse(message).into());
    }
    let model = common::open_model(&options.model)?;
    let adapter = common::adapter(&model, &file, options.force_base)?;
    // Read before the work, so that a bad text is refused at once.
    let examples = if options.unmeasured { Vec::new() } else { held_out(options, &model, data)? };
    create_dir_all(&Disk, &dir)?;
    let exchange = adapter.to_exchange();
    let merged_tensors = exchange.modules.len();
    let staged = Staged(dir.join(format!(".{name}.unjudged")));
    let staged_name = format!(".{name}.unjudged");
    let bytes = merge::write(&Disk, &dir, &staged_name, &model, &exchange, options.dtype)?.bytes;
    let measured = match options.unmeasured {
        true => None,
        false => Some(judge(options, session, &model, adapter, &staged.0, &examples)?),
    };
    let lost = measured.as_ref().is_some_and(Judgement::is_lost);
    if let Some(found) = &measured {
        eprintln!("{}", describe(found));
        if lost && !options.force {
            return Err(refusal(found).into());
        }
    }
    place(&staged.0, &dir, &options.output)?;
    json::line(&format!("{merged_tensors} tensors merged: {}", options.output.display()))?;
    if session.json {
        let (output, measured) = (options.output.display().to_string(), measured.as_ref().map(measure));
        json::emit(&json::Merge { output, bytes, merged_tensors, measured, forced: lost })?;
    }
    Ok(())
}

/// The folder and name of the output, which must not be the base: it is mapped, and stays as it is.
fn output(output: &Path, base: &Path) -> Result<(PathBuf, String), Error> {
    let refuse = |why: &str| misuse(format!("-o/--output: {}: {why}", output.display()));
    let name = output.file_name().and_then(|n| n.to_str()).ok_or_else(|| refuse("name a file"))?;
    if output.is_dir() {
        return Err(refuse("a folder: name a file"));
    }
    if let (Ok(a), Ok(b)) = (output.canonicalize(), base.canonicalize())
        && a == b
    {
        return Err(refuse("the base itself, which is never written: name another file"));
    }
    Ok((output.parent().unwrap_or(Path::new("")).to_path_buf(), name.to_string()))
}

/// A file that goes unless it was given its name.
struct Staged(PathBuf);

impl Drop for Staged {
    fn drop(&mut self) {
        // It is gone where the file was placed, and was never there where writing failed.
        let _ = Disk.remove(&self.0);
    }
}

/// Gives the file, which is on disk already, its name.
fn place(staged: &Path, dir: &Path, output: &Path) -> Result<(), Error> {
    let io = |e| Error::io(format!("renaming into place {}", output.display()), e);
    Disk.rename(staged, output).map_err(io)?;
    Disk.sync_dir(dir).map_err(io)
}

/// What to measure on: windows of a text with their second halves scored, or held-out rows; cut at
/// `--max-tokens`.
fn held_out(options: &Options, model: &ModelFile, data: Option<&Path>) -> Result<Vec<Example>> {
    let window = (options.ctx_size as usize).min(model.config().context_len);
    let mut examples = match (&options.file, data) {
        (Some(file), _) => {
            let (ids, bos) = eval::encode_text(model, file)?;
            let mut examples = Vec::new();
            for ids in ids.chunks(window).filter(|w| w.len() >= 2) {
                let mut ids = ids.to_vec();
                ids[0] = bos.unwrap_or(ids[0]);
                let mask = (0..ids.len()).map(|i| i > ids.len() / 2).collect();
                examples.push(Example { ids, mask });
            }
            examples
        }
        (None, Some(path)) => {
            let (data, which) = eval::held_out(&options.data, options.seed, model, path, window, Vec::new())?;
            common::tell_rows(&data, window);
            eprintln!("{}: {} rows, {which}", data.source.display(), data.examples.len());
            data.examples
        }
        (None, None) => Vec::new(),
    };
    let mut left = options.max_tokens as usize;
    examples.retain(|e| {
        let keep = left > 0;
        left = left.saturating_sub(e.mask.iter().skip(1).filter(|m| **m).count());
        keep
    });
    Ok(examples)
}

fn judge(
    options: &Options,
    session: &Session,
    model: &Arc<ModelFile>,
    adapter: Adapter,
    merged: &Path,
    examples: &[Example],
) -> Result<Judgement> {
    let merged = Arc::new(ModelFile::open(merged)?);
    let kernels = common::kernels(&options.compute)?;
    let beside = Arc::new(StackedAdapter::new(model, &kernels, &[(adapter, 1.0)])?);
    let rows = examples.iter().map(|e| e.ids.len()).max().unwrap_or(1);
    let precision = common::precision(&options.compute);
    let mut judge = Judge::new(model, beside, &merged, &kernels, precision, rows)?;
    let progress = |done: usize| {
        if done.is_multiple_of(TELL_EVERY) || done == examples.len() {
            eprintln!("measured {done}/{}", examples.len());
        }
        !session.cancel.load(Ordering::Relaxed)
    };
    Ok(judge.score(examples, progress)?)
}

fn describe(j: &Judgement) -> String {
    format!(
        "held out, {} tokens: base {:.4}, with the adapter {:.4}, merged {:.4} nats/token\n\
         merging costs {:+.4} nats of the adapter's gain of {:.4}; mean KL {:.5}, where the adapter's own is {:.5}",
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

fn refusal(j: &Judgement) -> Error {
    let message = format!(
        "merging loses most of what the adapter does ({:+.4} nats of a gain of {:.4}, mean KL {:.5} of {:.5}): a finer \
         --type such as Q8_0 or F16 loses less; --force keeps the file",
        j.loss(),
        j.gain(),
        j.kl_merged,
        j.kl_base
    );
    Error::new(ErrorKind::GateRefused, message)
}

fn measure(j: &Judgement) -> json::MergeMeasure {
    json::MergeMeasure {
        tokens: j.tokens,
        nll_base: j.nll_base,
        nll_adapter: j.nll_adapter,
        nll_merged: j.nll_merged,
        delta_nll: j.loss(),
        mean_kl: j.kl_merged,
        mean_kl_base: j.kl_base,
    }
}

fn dtype(text: &str) -> Result<DType, String> {
    let named = DType::ALL.into_iter().find(|t| t.name().eq_ignore_ascii_case(text));
    named.ok_or_else(|| format!("must be one of {}", DType::ALL.map(DType::name).join(", ")))
}
