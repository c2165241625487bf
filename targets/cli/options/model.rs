//! The model's file and how to open it.

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

/// The same for verbs that work without a model.
#[derive(Args, Clone, Debug)]
pub(crate) struct OptionalModelOptions {
    /// The model: a GGUF file [default for bench and selftest: the built-in model]
    #[arg(short = 'm', long = "model", value_name = "FILE")]
    model: Option<PathBuf>,

    #[command(flatten)]
    opening: OpeningOptions,
}

#[derive(Args, Clone, Debug)]
struct OpeningOptions {
    /// Compute the model's digest instead of looking it up in the cache
    #[arg(long)]
    no_digest_cache: bool,

    /// Read the model into memory instead of mapping it; this takes as much memory as the file is large
    #[arg(long)]
    no_mmap: bool,
}

impl OptionalModelOptions {
    /// The model, if one is given.
    pub(crate) fn given(&self) -> Option<ModelOptions> {
        let named =
            |model: &PathBuf| ModelOptions { model: Some(model.clone()), opening: self.opening.clone() };
        self.model.as_ref().map(named)
    }
}

impl ModelOptions {
    /// The path of the model's existing file.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] for a folder, [`ErrorKind::Io`] when there is no such file.
    pub(crate) fn path(&self) -> Result<&Path, Error> {
        let missing = || misuse("-m/--model is missing; name the model's GGUF file");
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

    /// The folder that digests are cached in: `ENGRAFT_CACHE_DIR`, else `engraft` in the user's cache folder.
    /// `None` if there is no such folder or the user doesn't want a cache.
    fn digest_cache(&self) -> Option<PathBuf> {
        // Empty and relative paths count as absent, as the XDG base directory specification demands.
        let named = |key: &str| std::env::var_os(key).map(PathBuf::from).filter(|p| p.is_absolute());
        let of_user = || {
            let cache = named("XDG_CACHE_HOME").or_else(|| named("HOME").map(|home| home.join(".cache")));
            cache.map(|folder| folder.join("engraft"))
        };
        if self.opening.no_digest_cache { None } else { named("ENGRAFT_CACHE_DIR").or_else(of_user) }
    }
}
