//! Adapters of other tools: recognized by their content and read into an [`Exchange`].

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::exchange::{Exchange, unsupported};
use super::imported::{Imported, read_json};
use super::{ADAPTER_FILE, StoredAs, gguf_file, mlx, peft};
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::model::ModelConfig;
use crate::storage::Storage;

/// The formats that can be read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A folder with `adapter_config.json` and `adapter_model.safetensors`.
    Peft,
    /// A folder with `adapter_config.json` and `adapters.safetensors`.
    Mlx,
    /// llama.cpp's: one GGUF file.
    Gguf,
}

impl Format {
    /// A short name.
    pub fn name(self) -> &'static str {
        match self {
            Format::Peft => "peft",
            Format::Mlx => "mlx",
            Format::Gguf => "gguf",
        }
    }

    /// The format of the adapter at `path`.
    ///
    /// # Errors
    /// `Io`; `Unsupported` or `Misuse` for anything else, saying what it appears to be.
    pub fn detect(path: &Path) -> Result<Format> {
        let place = path.display();
        if !path.is_dir() {
            let mut magic = [0; 4];
            let file = File::open(path).and_then(|mut f| f.read(&mut magic));
            file.map_err(|e| Error::io(format!("reading {place}"), e))?;
            return match &magic {
                b"GGUF" => Ok(Format::Gguf),
                _ => Err(unsupported(format!(
                    "{place}: not a GGUF file; give a GGUF adapter, or the folder of a PEFT or MLX adapter"
                ))),
            };
        }
        let config = path.join(peft::CONFIG_FILE);
        if !config.exists() {
            let misuse = |message| Error::new(ErrorKind::Misuse, message);
            return Err(match path.join(ADAPTER_FILE).exists() {
                true => misuse(format!("{place}: this is already one of Engraft's own adapters"))
                    .advise(Advice::UseAsAdapter),
                false => misuse(format!("{place}: not an adapter folder: it has no {}", peft::CONFIG_FILE)),
            });
        }
        let settings = read_json(&config)?;
        let has = |key| settings.contains_key(key);
        if has("peft_type") {
            Ok(Format::Peft)
        } else if has("lora_parameters") || has("fine_tune_type") || path.join(mlx::TENSORS_FILE).exists() {
            Ok(Format::Mlx)
        } else {
            Err(unsupported(format!("{}: neither PEFT nor MLX settings", config.display())))
        }
    }

    /// Reads an adapter of this format for a model.
    ///
    /// # Errors
    /// Those of [`peft::import`], [`mlx::import`] and [`gguf_file::import`].
    pub fn import(self, path: &Path, model: &ModelConfig) -> Result<Imported> {
        match self {
            Format::Peft => peft::import(path, model),
            Format::Mlx => mlx::import(path, model),
            Format::Gguf => gguf_file::import(path, model),
        }
    }

    /// Writes an adapter in this format: a folder, or for [`Format::Gguf`] a file.
    ///
    /// # Errors
    /// Those of [`peft::export`], [`mlx::export`] and [`gguf_file::export`].
    pub fn export(
        self,
        storage: &dyn Storage,
        path: &Path,
        exchange: &Exchange,
        model: &ModelConfig,
        precision: StoredAs,
    ) -> Result<()> {
        match self {
            Format::Peft => peft::export(storage, path, exchange, model, precision),
            Format::Mlx => mlx::export(storage, path, exchange, model, precision),
            Format::Gguf => gguf_file::export(storage, path, exchange, model, precision).map(drop),
        }
    }
}
