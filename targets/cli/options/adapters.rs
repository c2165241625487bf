//! Adapters to use.

use std::path::{Path, PathBuf};

use clap::Args;
use engraft_runtime::error::{Error, ErrorKind};
use engraft_runtime::gate::store::Store;
use engraft_runtime::storage::Disk;

use super::{misuse, stat};

/// The adapter's file inside `--adapter-path`.
pub(crate) const ADAPTER_FILE: &str = "adapter.engraft";

/// The settings of a PEFT or MLX adapter, inside its folder.
const FOREIGN_CONFIG: &str = "adapter_config.json";

/// Adapters to use, in order.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Adapters")]
pub(crate) struct AdapterOptions {
    /// Use this adapter: a folder or a file (may be repeated)
    #[arg(long, value_name = "FILE")]
    lora: Vec<PathBuf>,

    /// Use this adapter at a scale: 1 is as trained, 0 is off (may be repeated)
    #[arg(long, value_name = "FILE:SCALE", value_parser = scaled_adapter)]
    lora_scaled: Vec<ScaledAdapter>,

    /// Use what is active in this adapter store: an adapter or few-shot examples
    #[arg(long, value_name = "DIR")]
    pub(crate) store: Option<PathBuf>,

    /// Use adapters made for another base if their shapes fit; the result may make no sense
    #[arg(long)]
    pub(crate) force_base: bool,
}

/// An adapter's file and the factor on its effect.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ScaledAdapter {
    pub(crate) path: PathBuf,
    pub(crate) scale: f32,
}

impl AdapterOptions {
    /// Whether adapters are named one by one.
    pub(crate) fn names_some(&self) -> bool {
        !self.lora.is_empty() || !self.lora_scaled.is_empty()
    }

    /// All adapters, with folders resolved to the file inside.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when one is missing.
    pub(crate) fn files(&self) -> Result<Vec<ScaledAdapter>, Error> {
        let plain = self.lora.iter().map(|path| (path, 1.0, "--lora"));
        let scaled = self.lora_scaled.iter().map(|a| (&a.path, a.scale, "--lora-scaled"));
        let resolve = |(path, scale, flag): (&PathBuf, f32, &str)| {
            Ok(ScaledAdapter { path: adapter_file(path, flag)?, scale })
        };
        plain.chain(scaled).map(resolve).collect()
    }
}

/// The one adapter that a verb reads.
#[derive(Args, Clone, Debug)]
#[command(group(clap::ArgGroup::new("adapter").args(["lora", "store"]).required(true)))]
pub(crate) struct AdapterOption {
    /// The adapter: a folder or a file
    #[arg(long, value_name = "FILE")]
    lora: Option<PathBuf>,

    /// The adapter that is active in this store
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,

    /// Use the adapter even if it was made for another base, if its shapes fit
    #[arg(long)]
    pub(crate) force_base: bool,
}

impl AdapterOption {
    /// The adapter's file.
    ///
    /// # Errors
    /// Those of [`adapter_file`] and [`active_in`].
    pub(crate) fn file(&self) -> Result<PathBuf, Error> {
        match (&self.lora, &self.store) {
            (Some(path), _) => adapter_file(path, "--lora"),
            (None, Some(folder)) => active_in(folder, "--store"),
            (None, None) => Err(misuse("the adapter is missing; add --lora FILE or --store DIR")),
        }
    }
}

/// The file of the adapter that is active in a store.
///
/// # Errors
/// `Misuse` if there is none; those of [`Store::active`].
pub(crate) fn active_in(folder: &Path, flag: &str) -> Result<PathBuf, Error> {
    stat(folder, flag)?;
    let store = Store::open(&Disk, folder).map_err(|e| e.at(flag))?;
    let active = store.active()?.and_then(|active| store.adapter_file(&active.generation));
    active.ok_or_else(|| {
        misuse(format!("{flag}: no adapter is active in {}; name an adapter", folder.display()))
    })
}

/// An existing adapter file: the path itself, or the file inside if the path is a folder.
///
/// # Errors
/// [`ErrorKind::Io`] when it is missing, [`ErrorKind::Unsupported`] for another tool's folder.
pub(crate) fn adapter_file(path: &Path, flag: &str) -> Result<PathBuf, Error> {
    if !stat(path, flag)?.is_dir() {
        return Ok(path.to_path_buf());
    }
    let file = path.join(ADAPTER_FILE);
    if !file.exists() && path.join(FOREIGN_CONFIG).exists() {
        let message = format!("{flag}: {} is a PEFT or MLX adapter; {}", path.display(), import_hint(path));
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    stat(&file, flag).map(|_| file)
}

/// How to import another tool's adapter.
pub(crate) fn import_hint(from: &Path) -> String {
    format!("import it with `engraft import -m MODEL.gguf --from {}`", from.display())
}

/// Parses FILE:SCALE. Splits at the last colon, because paths may contain colons.
fn scaled_adapter(text: &str) -> Result<ScaledAdapter, String> {
    let form = || "must be FILE:SCALE, such as home/adapter.engraft:0.5".to_string();
    let (path, scale) = text.rsplit_once(':').filter(|(path, _)| !path.is_empty()).ok_or_else(form)?;
    let scale: f32 = scale.parse().ok().filter(|s: &f32| s.is_finite()).ok_or_else(form)?;
    Ok(ScaledAdapter { path: path.into(), scale })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_carry_scales() {
        let scaled = |path: &str, scale| ScaledAdapter { path: path.into(), scale };
        assert_eq!(scaled_adapter("c:/a.engraft:-0.5").unwrap(), scaled("c:/a.engraft", -0.5));
        for bad in ["a", "a:", ":1", "a:nan", "a:inf"] {
            assert!(scaled_adapter(bad).is_err(), "{bad}");
        }
    }
}
