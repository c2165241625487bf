//! The model's file, and how it is opened.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use engraft_runtime::error::Error;
use engraft_runtime::model::digest_cache::DigestCache;
use engraft_runtime::model::map::Map;
use engraft_runtime::model::weights::ModelFile;

use super::{misuse, stat};
use crate::truncation;

/// The model's file.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelOptions {
    /// The model: a GGUF file
    #[arg(short = 'm', long = "model", value_name = "FILE", required = true)]
    model: Option<PathBuf>,

    #[command(flatten)]
    opening: OpeningOptions,
}

/// The same of verbs that can do without a model.
#[derive(Args, Clone, Debug)]
pub(crate) struct OptionalModelOptions {
    /// A model: a GGUF file [default of bench and selftest: the built-in one]
    #[arg(short = 'm', long = "model", value_name = "FILE")]
    model: Option<PathBuf>,

    #[command(flatten)]
    opening: OpeningOptions,
}

#[derive(Args, Clone, Debug)]
struct OpeningOptions {
    /// Compute the model's digest again instead of looking it up in the cache
    #[arg(long)]
    no_digest_cache: bool,

    /// Read the model into memory instead of mapping it; this takes as much memory as the file is long
    #[arg(long)]
    no_mmap: bool,
}

impl OptionalModelOptions {
    /// The model, if one is named.
    pub(crate) fn given(&self) -> Option<ModelOptions> {
        let named =
            |model: &PathBuf| ModelOptions { model: Some(model.clone()), opening: self.opening.clone() };
        self.model.as_ref().map(named)
    }
}

impl ModelOptions {
    /// The model's path, which names a file.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] when it names a folder, [`ErrorKind::Io`] when there is no such file.
    pub(crate) fn path(&self) -> Result<&Path, Error> {
        let missing = || misuse("-m/--model is missing: name the model's GGUF file");
        let path = self.model.as_deref().ok_or_else(missing)?;
        let found = stat(path, "-m/--model")?;
        if found.is_dir() {
            return Err(misuse(format!(
                "-m/--model: {} is a folder; name the GGUF file in it",
                path.display()
            )));
        }
        Ok(path)
    }

    /// Maps (or reads) and validates the model.
    ///
    /// # Errors
    /// Those of [`ModelOptions::path`] and [`ModelFile::open`].
    pub(crate) fn open(&self) -> Result<Arc<ModelFile>, Error> {
        let path = self.path()?;
        let map = if self.opening.no_mmap {
            Map::read(path)
        } else {
            truncation::expect(path);
            Map::open(path)
        };
        let mut model = map.and_then(ModelFile::from_map).map_err(|e| e.at("-m/--model"))?;
        if let Some(folder) = self.digest_cache() {
            model = model.with_digest_cache(DigestCache::new(folder));
        }
        log::info!("{}: {:?}", path.display(), model.config());
        Ok(Arc::new(model))
    }

    /// The folder where digests are remembered: `ENGRAFT_CACHE_DIR`, else `engraft` in the user's cache
    /// folder; `None` where there is none, or it is not wanted.
    fn digest_cache(&self) -> Option<PathBuf> {
        // Empty or relative paths count as absent, as the XDG base directory specification wants it.
        let named = |key: &str| std::env::var_os(key).map(PathBuf::from).filter(|p| p.is_absolute());
        let of_user = || {
            let cache = named("XDG_CACHE_HOME").or_else(|| named("HOME").map(|home| home.join(".cache")));
            cache.map(|folder| folder.join("engraft"))
        };
        if self.opening.no_digest_cache { None } else { named("ENGRAFT_CACHE_DIR").or_else(of_user) }
    }
}
