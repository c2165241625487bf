//! Adapters of mlx_lm: a folder of `adapter_config.json` and `adapters.safetensors`.
//!
//! A is `[in, r]` and B `[r, out]` there, and the multiplier is given directly (`scale`), so alpha is scale ·
//! r. Rows are in Hugging Face's order.

use std::path::Path;

use serde_json::Value;

use super::exchange::{
    Exchange, Matrix, Part, Parts, RowOrder, corrupt, module_of, transpose, unknown_tensor, unsupported,
};
use super::imported::{Imported, read_json};
use super::peft::{CONFIG_FILE, whole};
use super::safetensors::{self, Tensor};
use crate::error::{Result, told};
use crate::model::ModelConfig;

/// The tensors' file.
pub const TENSORS_FILE: &str = "adapters.safetensors";

/// Reads a folder.
///
/// # Errors
/// As [`super::peft::import`].
pub fn import(dir: &Path, model: &ModelConfig) -> Result<Imported> {
    let file = dir.join(CONFIG_FILE);
    let settings = MlxSettings::read(&read_json(&file)?).map_err(|e| e.at(file.display()))?;
    let file = dir.join(TENSORS_FILE);
    let mut parts = Parts::default();
    safetensors::read(&file, |tensor| put(&mut parts, tensor))?;
    settings.exchange(parts, model).map_err(|e| e.at(file.display()))
}

fn put(parts: &mut Parts, tensor: Tensor) -> Result<()> {
    let unknown = || unknown_tensor(&tensor.name);
    let (path, part) = [(".lora_a", Part::A), (".lora_b", Part::B), (".m", Part::Magnitude)]
        .into_iter()
        .find_map(|(suffix, part)| Some((tensor.name.strip_suffix(suffix)?, part)))
        .ok_or_else(unknown)?;
    let module = module_of(path).ok_or_else(unknown)?;
    let matrix = match (part, &tensor.shape[..]) {
        (Part::Magnitude, [n]) => Matrix { rows: *n, cols: 1, values: tensor.values },
        _ => {
            let (rows, cols) = tensor.matrix()?;
            let mut values = vec![0.0; tensor.values.len()];
            transpose(&tensor.values, cols, &mut values);
            Matrix { rows: cols, cols: rows, values }
        }
    };
    parts.put(module, part, matrix)
}

struct MlxSettings {
    rank: usize,
    scale: f32,
    dropout: f32,
    dora: bool,
    /// How many blocks are adapted, the last ones; `None` for all.
    blocks: Option<usize>,
}

impl MlxSettings {
    fn read(object: &serde_json::Map<String, Value>) -> Result<MlxSettings> {
        let dora = match object.get("fine_tune_type") {
            None | Some(Value::Null) => false,
            Some(Value::String(kind)) if kind == "lora" => false,
            Some(Value::String(kind)) if kind == "dora" => true,
            Some(other) => {
                return Err(unsupported(format!(
                    "fine_tune_type {} is not supported; only lora is",
                    told(other)
                )));
            }
        };
        let parameters = object.get("lora_parameters").and_then(Value::as_object);
        let parameters = parameters.ok_or_else(|| corrupt("lora_parameters is missing"))?;
        let number = |key: &str| {
            parameters
                .get(key)
                .map(|v| v.as_f64().ok_or_else(|| corrupt(format!("{key} is not a number"))))
                .transpose()
        };
        let required =
            |key: &str| number(key)?.ok_or_else(|| corrupt(format!("lora_parameters: {key} is missing")));
        Ok(MlxSettings {
            rank: whole("rank", required("rank")?)?,
            scale: required("scale")? as f32,
            dropout: number("dropout")?.unwrap_or(0.0) as f32,
            dora,
            blocks: match object.get("num_layers").and_then(Value::as_f64) {
                Some(count) if count >= 0.0 => Some(whole("num_layers", count)?),
                // -1 is all of them.
                _ => None,
            },
        })
    }

    fn exchange(self, parts: Parts, model: &ModelConfig) -> Result<Imported> {
        let MlxSettings { rank, scale, dropout, dora, blocks } = self;
        let first = blocks.map_or(0, |count| model.n_layers.saturating_sub(count));
        if let Some((layer, proj)) = parts.names().find(|(layer, _)| *layer < first) {
            return Err(corrupt(format!(
                "it has tensors for layers.{layer}.{}, but num_layers says that the last {} of the model's {} blocks are \
                 adapted",
                proj.hf_name(),
                model.n_layers - first,
                model.n_layers
            )));
        }
        let modules = parts.modules(
            |proj| Some(RowOrder::of(model, proj)),
            |layer, proj, found| match found == rank {
                true => Ok(scale * rank as f32),
                false => Err(corrupt(format!(
                    "layers.{layer}.{}: tensors have rank {found}, but lora_parameters say {rank}",
                    proj.hf_name()
                ))),
            },
        )?;
        let mut exchange = Exchange { dora, dropout, modules, ..Exchange::default() };
        exchange.check(model)?;
        Ok(Imported { exchange, warnings: Vec::new() })
    }
}
