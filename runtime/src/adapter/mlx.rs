//! Adapters of mlx_lm: a folder of `adapter_config.json` and `adapters.safetensors`.
//!
//! A is `[in, r]` and B `[r, out]` there, and the multiplier is given directly (`scale`), so alpha is scale ·
//! r. Rank and multiplier are the same for all modules. Rows are in Hugging Face's order.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value, json};

use super::StoredAs;
use super::exchange::{
    Exchange, Matrix, Module, Part, Parts, RowOrder, corrupt, hf_path, hf_path_in_block, module_of,
    transpose, unknown_tensor, unsupported,
};
use super::imported::{Imported, read_json};
use super::peft::{CONFIG_FILE, short, whole, write};
use super::safetensors::{self, Tensor};
use crate::error::{Result, told};
use crate::model::ModelConfig;
use crate::storage::Storage;

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

/// Writes the folder. Lower ranks are filled up with zeros, and where a module's multiplier differs from the first one's,
/// its B makes up for it.
///
/// # Errors
/// `NonFinite` for numbers that overflow f16; `Io`.
pub fn export(
    storage: &dyn Storage,
    dir: &Path,
    exchange: &Exchange,
    model: &ModelConfig,
    precision: StoredAs,
) -> Result<()> {
    let modules = &exchange.modules;
    let rank = modules.iter().map(|m| m.rank).max().unwrap_or_default();
    let scale = modules.first().map_or(1.0, |m| exchange.scale(m));
    let tensors = modules.iter().flat_map(|m| tensors_of(m, model, rank, exchange.scale(m) / scale));
    let tensors: Vec<Tensor> = tensors.collect();
    let first = modules.iter().map(|m| m.layer).min().unwrap_or_default();
    let keys: BTreeSet<String> = modules.iter().map(|m| hf_path_in_block(m.proj)).collect();
    let base = Some(&exchange.base_name).filter(|name| !name.is_empty());
    let config = json!({
        "fine_tune_type": if exchange.dora { "dora" } else { "lora" },
        "lora_parameters": {
            "dropout": short(exchange.dropout),
            "keys": keys,
            "rank": rank,
            "scale": short(scale),
        },
        "model": base,
        "num_layers": model.n_layers - first,
    });
    write(storage, dir, (TENSORS_FILE, &tensors, precision), &config)
}

/// A module's tensors at a rank of at least its own, with B multiplied by a factor.
fn tensors_of(m: &Module, model: &ModelConfig, rank: usize, factor: f32) -> Vec<Tensor> {
    let (outputs, inputs) = m.proj.shape(model);
    let (path, rows) = (hf_path(m.layer, m.proj), RowOrder::of(model, m.proj));
    let mut a = vec![0.0; inputs * rank];
    for (k, row) in m.a.chunks_exact(inputs).enumerate() {
        row.iter().enumerate().for_each(|(i, v)| a[i * rank + k] = *v);
    }
    let mut b = vec![0.0; rank * outputs];
    transpose(&rows.to_hf(&m.b, m.rank), m.rank, &mut b[..m.rank * outputs]);
    b.iter_mut().for_each(|v| *v *= factor);
    let (a, b) =
        (Tensor::of(&path, "lora_a", &[inputs, rank], a), Tensor::of(&path, "lora_b", &[rank, outputs], b));
    let mut tensors = vec![a, b];
    if let Some(magnitude) = &m.magnitude {
        tensors.push(Tensor::of(&path, "m", &[outputs], rows.to_hf(magnitude, 1)));
    }
    tensors
}
