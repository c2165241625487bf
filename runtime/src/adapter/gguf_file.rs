//! llama.cpp's adapters: a GGUF file of type `adapter`, with the pairs as `….lora_a` and `….lora_b`.
//!
//! llama.cpp's loader multiplies by alpha/r (by 1 if alpha is 0), with a single alpha for the file; it knows
//! neither rsLoRA nor DoRA. Rows follow the base file's order.

use std::path::Path;

use engraft_kernels::{DType, scalar};

use super::StoredAs;
use super::exchange::{Exchange, Matrix, Module, Part, Parts, layer_of, name, unknown_tensor, unsupported};
use super::imported::Imported;
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::model::gguf::write::{Header, failed};
use crate::model::gguf::{Gguf, TensorInfo, quote};
use crate::model::map::Map;
use crate::model::{ModelConfig, Proj};
use crate::storage::{Committed, Storage, commit, create_dir_all};

const ALPHA: &str = "adapter.lora.alpha";
const ALORA: &str = "adapter.alora.invocation_tokens";
const ALIGNMENT: usize = 32;

/// Reads a file.
///
/// # Errors
/// `Io`; `Corrupt` if it breaks the format or holds non-finite numbers; `Unsupported` for anything but LoRA on
/// the seven projections; `BaseMismatch` if architecture or shapes differ.
pub fn import(path: &Path, model: &ModelConfig) -> Result<Imported> {
    let map = Map::open(path)?;
    let gguf = Gguf::parse(map.as_bytes(), map.label())?;
    read(&gguf, map.as_bytes(), model).map_err(|e| e.at(path.display()))
}

fn read(gguf: &Gguf, bytes: &[u8], model: &ModelConfig) -> Result<Imported> {
    kind_of_file(gguf, model)?;
    let mut parts = Parts::default();
    for tensor in gguf.tensors() {
        let (module, part) = place(&tensor.name).ok_or_else(|| unknown_tensor(&tensor.name))?;
        let matrix = Matrix { rows: tensor.rows(), cols: tensor.cols(), values: floats(tensor, bytes) };
        parts.put(module, part, matrix)?;
    }
    let alpha = gguf.float(ALPHA)?.unwrap_or(0.0);
    // Without an alpha, or with 0, the loader multiplies by 1.
    let alpha_of = |_, _, rank: usize| Ok(if alpha == 0.0 { rank as f32 } else { alpha });
    let modules = parts.modules(|_| None, alpha_of)?;
    let base_name = gguf.string("general.name")?.unwrap_or_default().to_owned();
    let mut exchange = Exchange { base_name, modules, ..Exchange::default() };
    exchange.check(model)?;
    let prompt = gguf.string("adapter.lora.prompt_prefix")?;
    let warning = |p: &str| {
        format!("the adapter expects prompts to begin with {}; add it to your prompts yourself", quote(p))
    };
    Ok(Imported { exchange, warnings: prompt.map(warning).into_iter().collect() })
}

/// Refuses anything that isn't a LoRA adapter of this architecture, saying what it is.
fn kind_of_file(gguf: &Gguf, model: &ModelConfig) -> Result<()> {
    match gguf.string("general.type")? {
        Some("adapter") => {}
        None | Some("model") => {
            return Err(unsupported("this is a model, not an adapter; use it as the base"));
        }
        Some(other) => return Err(unsupported(format!("general.type is {}, not \"adapter\"", quote(other)))),
    }
    match gguf.string("adapter.type")? {
        Some("lora") => {}
        other => {
            let other = quote(other.unwrap_or_default());
            return Err(unsupported(format!("adapter.type is {other}; only \"lora\" is supported")));
        }
    }
    if gguf.get(ALORA).is_some() {
        return Err(unsupported(
            "an activated LoRA, which only takes effect after its own tokens, is not supported",
        ));
    }
    let architecture = gguf.string("general.architecture")?.unwrap_or_default();
    if architecture != model.architecture {
        let (theirs, ours) = (quote(architecture), quote(&model.architecture));
        let message = format!(
            "the adapter's architecture is {theirs}, the model's is {ours}; use the adapter's own base"
        );
        return Err(Error::new(ErrorKind::BaseMismatch, message));
    }
    Ok(())
}

/// The module and part a tensor's name stands for.
fn place(tensor: &str) -> Option<((usize, Proj), Part)> {
    let (layer, rest) = tensor.strip_prefix("blk.")?.split_once('.')?;
    let (proj, part) = rest.split_once(".weight.")?;
    let proj = Proj::ALL.into_iter().find(|p| p.gguf_name() == proj)?;
    let part = match part {
        "lora_a" => Part::A,
        "lora_b" => Part::B,
        _ => return None,
    };
    Some(((layer_of(layer)?, proj), part))
}

/// A tensor's elements. Sizes were checked when the file was parsed; rows of block types are whole blocks.
fn floats(tensor: &TensorInfo, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; tensor.rows() * tensor.cols()];
    let stored = &bytes[tensor.range.clone()];
    let row_bytes = stored.len() / tensor.rows();
    for (row, stored) in out.chunks_exact_mut(tensor.cols()).zip(stored.chunks_exact(row_bytes)) {
        scalar::decode::dequantize(tensor.dtype, stored, 0, row);
    }
    out
}

/// Writes a file.
///
/// # Errors
/// `Unsupported` for DoRA, with the alternatives; `NonFinite` for numbers that overflow f16; `Misuse` if the
/// path names no file; `Io`.
pub fn export(
    storage: &dyn Storage,
    path: &Path,
    exchange: &Exchange,
    model: &ModelConfig,
    precision: StoredAs,
) -> Result<Committed> {
    if exchange.dora {
        return Err(unsupported(
            "a DoRA adapter can't be written as a GGUF adapter: llama.cpp knows no magnitudes, and its effect is of \
             full rank",
        )
        .advise(Advice::WithoutMagnitudes));
    }
    let file = path.file_name().and_then(|f| f.to_str());
    let file = file.ok_or_else(|| {
        Error::new(ErrorKind::Misuse, format!("{}: the path has no file name", path.display()))
    })?;
    let dir = path.parent().unwrap_or(Path::new(""));
    let alpha = exchange.modules.first().map_or(0.0, |m| exchange.scale(m) * m.rank as f32);
    let (header, data) = encode(exchange, model, alpha, precision)?;
    create_dir_all(storage, dir)?;
    commit(storage, dir, file, |out| {
        header.write(out)?;
        for bytes in &data {
            out.write_all(bytes).map_err(failed)?;
            header.pad(out, bytes.len())?;
        }
        Ok(())
    })
}

fn encode(
    exchange: &Exchange,
    model: &ModelConfig,
    alpha: f32,
    precision: StoredAs,
) -> Result<(Header, Vec<Vec<u8>>)> {
    let mut header = Header::new(ALIGNMENT);
    header.string("general.architecture", &model.architecture);
    header.string("general.type", "adapter");
    header.string("adapter.type", "lora");
    if !exchange.base_name.is_empty() {
        header.string("general.name", &exchange.base_name);
    }
    header.f32(ALPHA, alpha);
    let mut data = Vec::with_capacity(2 * exchange.modules.len());
    for m in &exchange.modules {
        let (outputs, inputs) = m.proj.shape(model);
        let b = folded(exchange, m, alpha);
        for (part, values, dims) in [("lora_a", &m.a, [inputs, m.rank]), ("lora_b", &b, [m.rank, outputs])] {
            let bytes = precision.encode(values).map_err(|e| e.at(name(m)))?;
            let tensor = format!("{}.{part}", m.proj.tensor_name(m.layer));
            let dtype = if precision == StoredAs::F16 { DType::F16 } else { DType::F32 };
            header.tensor(&tensor, dtype, &dims, bytes.len());
            data.push(bytes);
        }
    }
    Ok((header, data))
}

/// B scaled by the part of the module's multiplier that the file's single alpha can't express; unchanged if
/// there is none.
fn folded(exchange: &Exchange, m: &Module, alpha: f32) -> Vec<f32> {
    let (wanted, given) = (exchange.scale(m), alpha / m.rank as f32);
    if wanted == given {
        return m.b.clone();
    }
    let factor = f64::from(wanted) / f64::from(given);
    m.b.iter().map(|v| (f64::from(*v) * factor) as f32).collect()
}
