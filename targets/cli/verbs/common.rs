//! Work that several verbs share: loading adapters, measuring, refusing.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use engraft_kernels::{DType, Kernels};
use engraft_runtime::adapter::Adapter;
use engraft_runtime::data::Example;
use engraft_runtime::data::batches::in_order;
use engraft_runtime::error::{Advice, Error, ErrorKind, Result};
use engraft_runtime::eval::scoring_chain;
use engraft_runtime::generate::StackedAdapter;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::probe::Prober;
use engraft_runtime::run::Observer;
use engraft_runtime::train::Evaluated;

use super::adapter::Stored;
use crate::options::{self, AdapterOptions, ComputeOptions, misuse};

/// Refuses to overwrite an input file, even if the two paths look different.
///
/// # Errors
/// `Misuse`.
pub(crate) fn refuse_input(input: &Path, output: &Path, flag: &str) -> Result<()> {
    match (output.canonicalize(), input.canonicalize()) {
        (Ok(a), Ok(b)) if a == b => {
            let what = output.display();
            Err(misuse(format!("{flag}: {what} is an input of this command; name another file")))
        }
        _ => Ok(()),
    }
}

/// The folder and the name of a file to write, which must be none of these inputs.
///
/// # Errors
/// `Misuse`.
pub(crate) fn output_file<'a>(
    output: &Path,
    flag: &str,
    inputs: impl IntoIterator<Item = &'a Path>,
) -> Result<(PathBuf, String)> {
    let refuse = |why: &str| misuse(format!("{flag}: {} {why}", output.display()));
    let name = output.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| refuse("isn't a file name; name a file"))?;
    if output.is_dir() {
        return Err(refuse("is a folder; name a file"));
    }
    for input in inputs {
        refuse_input(input, output, flag)?;
    }
    Ok((output.parent().unwrap_or(Path::new("")).to_path_buf(), name.to_string()))
}

/// Kernels for the best instruction set, for verbs that compute little.
pub(crate) fn best_kernels() -> Arc<Kernels> {
    Arc::new(Kernels::detect(std::thread::available_parallelism().map_or(1, usize::from)))
}

/// All adapters of the command line and the store as one, each checked against the model; `None` without any.
///
/// # Errors
/// Those of [`adapter`].
pub(crate) fn adapters(
    model: &Arc<ModelFile>,
    kernels: &Arc<Kernels>,
    options: &AdapterOptions,
    store: &Stored,
) -> Result<Option<Arc<StackedAdapter>>> {
    let named = options.files()?.into_iter().map(|file| (file.path, file.scale));
    let files: Vec<_> = named.chain(store.adapter.iter().map(|file| (file.clone(), 1.0))).collect();
    if let [(file, 1.0)] = &files[..] {
        return adapter_in_use(model, kernels, file, options.force_base).map(Some);
    }
    let mut loaded = Vec::with_capacity(files.len());
    for (file, scale) in &files {
        loaded.push((adapter(model, kernels, file, options.force_base)?, *scale));
    }
    if loaded.is_empty() {
        return Ok(None);
    }
    Ok(Some(Arc::new(StackedAdapter::new(model, kernels, &loaded)?)))
}

/// A single adapter at scale 1. It is checked in the form in which it is used.
fn adapter_in_use(
    model: &Arc<ModelFile>,
    kernels: &Arc<Kernels>,
    file: &Path,
    force_base: bool,
) -> Result<Arc<StackedAdapter>> {
    let alone = [(load(file)?, 1.0)];
    let stacked = StackedAdapter::new(model, kernels, &alone).map_err(|e| e.at(file.display()))?;
    let adapter = &alone[0].0;
    hold(model, kernels, adapter, file, force_base, |prober| {
        let now = prober.with(&stacked);
        prober.check_found(adapter, now)
    })?;
    Ok(Arc::new(stacked))
}

/// An adapter made for this model. With `force_base` any adapter whose shapes fit, with a message.
///
/// # Errors
/// Those of [`Adapter::load`] and [`Prober::check`], with the file's name.
pub(crate) fn adapter(
    model: &Arc<ModelFile>,
    kernels: &Arc<Kernels>,
    file: &Path,
    force_base: bool,
) -> Result<Adapter> {
    let adapter = load(file)?;
    hold(model, kernels, &adapter, file, force_base, |prober| prober.check(&adapter))?;
    Ok(adapter)
}

/// Loads an adapter's file. If it looks like another tool's, the error says how to import it.
fn load(file: &Path) -> Result<Adapter> {
    Adapter::load(file).map_err(|error| {
        let foreign = ["gguf", "safetensors"].iter().any(|end| file.extension().is_some_and(|e| e == *end));
        if !foreign || error.kind() != ErrorKind::Corrupt {
            return error;
        }
        let hint = options::import_hint(file);
        Error::new(error.kind(), format!("{}; if it is another tool's adapter, {hint}", error.message()))
    })
}

/// Checks an adapter against the model with `check`. Reports what was overridden and what couldn't be checked.
fn hold(
    model: &Arc<ModelFile>,
    kernels: &Arc<Kernels>,
    adapter: &Adapter,
    file: &Path,
    force_base: bool,
    check: impl FnOnce(&mut Prober) -> Result<Vec<&'static str>>,
) -> Result<()> {
    let (place, started) = (file.display(), Instant::now());
    let mut prober = Prober::new(model, kernels, adapter.layout.rank_max());
    let checked = check(&mut prober);
    log::info!("{place}: checked against the model in {:.0} ms", 1e3 * started.elapsed().as_secs_f64());
    match checked {
        Err(error) if force_base && error.kind() == ErrorKind::BaseMismatch => {
            adapter.check_shapes(model.config()).map_err(|e| e.at(place))?;
            eprintln!("--force-base: {}: {}", file.display(), error.message());
        }
        Err(error) => return Err(error.at(place)),
        Ok(unrecorded) if unrecorded.is_empty() => {}
        Ok(unrecorded) => eprintln!(
            "{place}: the file doesn't record {}, so only the base's digest and shapes were checked; train or import \
             the adapter again for a full check",
            unrecorded.join(", ")
        ),
    }
    Ok(())
}

/// The flag for a type that rounds less than `used`; empty if there is none.
pub(crate) fn finer_type(used: DType) -> &'static str {
    match used {
        DType::F32 => "",
        DType::F16 => "--type F32",
        DType::Q8_0 | DType::BF16 => "--type F16",
        _ => "--type Q8_0 or F16",
    }
}

/// Refuses a figure that isn't finite.
///
/// # Errors
/// `NonFinite`.
pub(crate) fn finite(value: f64, what: &str) -> Result<f64> {
    if value.is_finite() {
        return Ok(value);
    }
    let message = format!("{what} is {value}: the model or an adapter is broken");
    Err(Error::new(ErrorKind::NonFinite, message).advise(Advice::ExactActivations))
}

/// The held-out loss of a model's file, as measured by `eval`; `None` without held-out rows.
///
/// # Errors
/// Those of opening the file and of the observer; `NonFinite`.
pub(crate) fn held_out_loss(
    compute: &ComputeOptions,
    rows: &[Example],
    file: &Path,
    observer: &mut dyn Observer,
) -> Result<Option<f64>> {
    if rows.is_empty() {
        return Ok(None);
    }
    let (model, kernels) = (Arc::new(ModelFile::open(file)?), compute.kernels()?);
    let longest = rows.iter().map(Example::rows).max().unwrap_or(1);
    let mut chain = scoring_chain(model, kernels, compute.precision, 0, longest);
    let mut total = Evaluated::default();
    for batch in in_order(rows, 1) {
        observer.ask()?;
        let scored = chain.evaluate(None, &batch, |_, _| {});
        total.loss_sum += scored.loss_sum;
        total.targets += scored.targets;
    }
    let loss = total.loss_sum / total.targets as f64;
    Ok(Some(finite(loss, "the held-out loss of the written model")?))
}

/// The error of a stopped run.
pub(crate) fn cancelled(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Cancelled, what)
}

/// Longest text that is read whole.
const TEXT_BYTES_MAX: u64 = 1 << 30;

/// Reads a UTF-8 text file, or a pipe to its end.
///
/// # Errors
/// `Io`; `BadData` for one that is too long, or with the position of the first byte that isn't UTF-8.
pub(crate) fn read_text(file: &Path) -> Result<String> {
    let reading = |e| Error::io(format!("reading {}", file.display()), e);
    let mut bytes = Vec::new();
    let source = std::fs::File::open(file).map_err(reading)?;
    source.take(TEXT_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(reading)?;
    if bytes.len() as u64 > TEXT_BYTES_MAX {
        let message = format!("{}: longer than 1 GiB; name a shorter text", file.display());
        return Err(Error::new(ErrorKind::BadData, message));
    }
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::new(
            ErrorKind::BadData,
            format!("{}: not UTF-8 at byte {at}; convert it to UTF-8", file.display()),
        )
    })
}
