//! What several verbs do with their options: open the model, choose kernels, load adapters, read data.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use clap::ValueEnum;
use engraft_kernels::{DType, Isa, Kernels};
use engraft_runtime::adapter::{Adapter, Prober};
use engraft_runtime::data::{self, Dataset, OverLong};
use engraft_runtime::error::{Error, ErrorKind, Result};
use engraft_runtime::generate::StackedAdapter;
use engraft_runtime::model::digest_cache::DigestCache;
use engraft_runtime::model::map::Map;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn;

use super::adapter::Stored;
use crate::options::{
    self, AdapterOptions, ComputeOptions, DataOptions, GradientPrecision, ModelOptions, Precision, misuse,
};
use crate::truncation;

/// Skipped rows that are named without `-v`.
const SKIPPED_SHOWN: usize = 10;

/// Maps (or reads) and validates the model.
///
/// # Errors
/// Those of [`ModelOptions::path`] and [`ModelFile::open`].
pub(crate) fn open_model(options: &ModelOptions) -> Result<Arc<ModelFile>> {
    let path = options.path()?;
    let map = if options.no_mmap {
        Map::read(path)
    } else {
        truncation::expect(path);
        Map::open(path)
    };
    let mut model = map.and_then(ModelFile::from_map).map_err(|e| e.at("-m/--model"))?;
    if let Some(folder) = options.digest_cache() {
        model = model.with_digest_cache(DigestCache::new(folder));
    }
    log::info!("{}: {:?}", path.display(), model.config());
    Ok(Arc::new(model))
}

/// The kernels of the instruction set asked for, or of the best one.
///
/// # Errors
/// `Misuse` for an instruction set that this CPU, or this build, has not.
pub(crate) fn kernels(options: &ComputeOptions) -> Result<Arc<Kernels>> {
    let isa = match options.isa.and_then(|isa| isa.to_possible_value()) {
        None => Isa::detect(),
        Some(asked) => Isa::from_name(asked.get_name()).ok_or_else(|| {
            let here: Vec<_> = Isa::available().map(Isa::name).collect();
            misuse(format!(
                "--isa {}: not here; this CPU and build have {}",
                asked.get_name(),
                here.join(", ")
            ))
        })?,
    };
    let kernels = Kernels::with_isa(isa, options.threads as usize);
    log::info!("{} threads, {}", kernels.threads(), isa.name());
    Ok(Arc::new(kernels))
}

/// Refuses to write over a file that is read, whatever the two paths look like.
///
/// # Errors
/// `Misuse`.
pub(crate) fn refuse_input(input: &Path, output: &Path, flag: &str) -> Result<()> {
    match (output.canonicalize(), input.canonicalize()) {
        (Ok(a), Ok(b)) if a == b => {
            let what = output.display();
            Err(misuse(format!("{flag}: {what} is read by this command and never written: name another")))
        }
        _ => Ok(()),
    }
}

/// How products treat activations.
pub(crate) fn precision(options: &ComputeOptions) -> nn::Precision {
    match options.precision {
        Precision::Int8 => nn::Precision::Int8,
        Precision::F32 => nn::Precision::F32,
    }
}

/// How training computes input gradients.
pub(crate) fn gradient(options: &ComputeOptions) -> nn::GradientPrecision {
    match options.gradient_precision {
        None => precision(options).into(),
        Some(GradientPrecision::Int8) => nn::GradientPrecision::Int8,
        Some(GradientPrecision::Bf16) => nn::GradientPrecision::Bf16,
        Some(GradientPrecision::F32) => nn::GradientPrecision::F32,
    }
}

/// The kernels of the best instruction set, for verbs that compute little.
pub(crate) fn best_kernels() -> Arc<Kernels> {
    Arc::new(Kernels::detect(std::thread::available_parallelism().map_or(1, usize::from)))
}

/// All adapters of the command line as one, and that of the store, each held against the model; `None` where
/// there is none.
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

/// One adapter as trained: what it needs to be used also serves to check it.
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
        adapter.check_found(model, prober, now)
    })?;
    Ok(Arc::new(stacked))
}

/// One adapter of this model, or with `force_base` of any model of its shapes, which is then said.
///
/// # Errors
/// Those of [`Adapter::load`] and [`Adapter::check`]. Each names the file.
pub(crate) fn adapter(
    model: &Arc<ModelFile>,
    kernels: &Arc<Kernels>,
    file: &Path,
    force_base: bool,
) -> Result<Adapter> {
    let adapter = load(file)?;
    hold(model, kernels, &adapter, file, force_base, |prober| adapter.check(model, prober))?;
    Ok(adapter)
}

/// An adapter's file; where it looks like one of another tool, the refusal says how that is taken in.
fn load(file: &Path) -> Result<Adapter> {
    Adapter::load(file).map_err(|error| {
        let foreign = ["gguf", "safetensors"].iter().any(|end| file.extension().is_some_and(|e| e == *end));
        if !foreign || error.kind() != ErrorKind::Corrupt {
            return error;
        }
        let hint = options::import_hint(file);
        Error::new(error.kind(), format!("{}; if it is an adapter of another tool, {hint}", error.message()))
    })
}

/// Holds an adapter against the model by `check`; says what was overridden, and what could not be checked.
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
    log::info!("{place}: held against the model in {:.0} ms", 1e3 * started.elapsed().as_secs_f64());
    match checked {
        Err(error) if force_base && error.kind() == ErrorKind::BaseMismatch => {
            adapter.check_shapes(model.config()).map_err(|e| e.at(place))?;
            eprintln!("--force-base: {}: {}", file.display(), without_advice(&error));
        }
        Err(error) => return Err(error.at(place)),
        Ok(unrecorded) if unrecorded.is_empty() => {}
        Ok(unrecorded) => eprintln!(
            "{place}: its file does not record {}, being of an older version or saved unbound: only the base's \
             digest and shapes were checked; train or import it again to have all of it checked",
            unrecorded.join(", ")
        ),
    }
    Ok(())
}

/// What is wrong with the base, without the advice to say what was said.
pub(crate) fn without_advice(error: &Error) -> &str {
    let message = error.message();
    match message.rsplit_once("; ") {
        Some((wrong, advice)) if advice.contains("--force-base") => wrong,
        _ => message,
    }
}

/// Advice to store in a type that rounds less than `used`; empty where there is none.
pub(crate) fn finer_type(used: DType) -> &'static str {
    match used {
        DType::F32 => "",
        DType::F16 => "--type F32",
        DType::Q8_0 | DType::BF16 => "--type F16",
        _ => "--type Q8_0 or F16",
    }
}

/// How the rows of `--data` are read, with at most `rows_max` positions each.
pub(crate) fn data_options(options: &DataOptions, rows_max: usize, seed: u64) -> data::DataOptions {
    data::DataOptions {
        mask_prompt: options.masks_prompt(),
        max_seq_length: rows_max,
        over_long: OverLong::Truncate,
        valid_fraction: options.valid_fraction,
        split_seed: seed,
        ..data::DataOptions::default()
    }
}

/// Tells on stderr what a file held, and every row that was left out or cut.
pub(crate) fn tell_rows(data: &Dataset, rows_max: usize) {
    let shown = if log::log_enabled!(log::Level::Info) { data.skipped.len() } else { SKIPPED_SHOWN };
    for row in data.skipped.iter().take(shown) {
        eprintln!("skipped {row}");
    }
    let source = data.source.display();
    match data.skipped_count {
        0 => {}
        n if n > shown => {
            eprintln!("{source}: {n} rows skipped, {} of them not named (-v names more)", n - shown)
        }
        n => eprintln!("{source}: {n} rows skipped"),
    }
    if data.truncated > 0 {
        eprintln!("{source}: {} rows cut at {rows_max} tokens (--max-seq-length)", data.truncated);
    }
}

/// An error for a measure that is no number.
///
/// # Errors
/// `NonFinite`.
pub(crate) fn finite(value: f64, what: &str) -> Result<f64> {
    if value.is_finite() {
        return Ok(value);
    }
    let message = format!(
        "{what} is {value}: the model or an adapter is broken; try --precision f32, or fetch it again"
    );
    Err(Error::new(ErrorKind::NonFinite, message))
}

/// The error of a run that was stopped.
pub(crate) fn cancelled(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Cancelled, what)
}

/// Reads a text file of UTF-8.
///
/// # Errors
/// `Io`; `BadData` with the place of the first byte that is no UTF-8.
pub(crate) fn read_text(file: &Path) -> Result<String> {
    let bytes = std::fs::read(file).map_err(|e| Error::io(format!("reading {}", file.display()), e))?;
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::new(ErrorKind::BadData, format!("{}: no UTF-8 text at byte {at}: convert it", file.display()))
    })
}
