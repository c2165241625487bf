//! An adapter merged into its base: W' = diag(c)·(W + s·B·A), stored again as blocks.
//!
//! Tensors are computed one at a time, a few rows at once, so memory is bounded by a row's length. Storing can
//! round a small update away, so a merged file is [measured](judge) before it is trusted.
//!
//! ```
//! use engraft_runtime::adapter::Adapter;
//! use engraft_runtime::{Base, Disk, Method, merge};
//!
//! # fn main() -> engraft_runtime::Result<()> {
//! let base = Base::open("../targets/cli/seedling.gguf")?;
//! let Method::Adapter(config) = Method::usual(base.model.config())? else { unreachable!() };
//! let adapter = Adapter::init_on(&base.model, &base.kernels, &config, &mut || 0.5)?;
//!
//! let folder = std::env::temp_dir().join(format!("engraft-merge-{}", std::process::id()));
//! engraft_runtime::storage::create_dir_all(&Disk, &folder)?;
//! let written = merge::write(&Disk, &folder, "merged.gguf", &base.model, &adapter.to_exchange(), None)?;
//! println!("{} bytes", written.bytes);
//! # std::fs::remove_dir_all(folder).unwrap();
//! # Ok(())
//! # }
//! ```

pub mod judge;
pub mod quantize;
pub mod tuned;

use std::io::Write;
use std::path::Path;

use engraft_kernels::{DType, QMatrix, scalar};

use crate::adapter::exchange::{Exchange, Module};
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::model::gguf::write::{Header, failed};
use crate::model::gguf::{Entry, TensorInfo, ValueType};
use crate::model::weights::ModelFile;
use crate::storage::{Committed, Storage, commit};

/// Elements computed at once.
const CHUNK: usize = 1 << 17;
const FILE_TYPE: &str = "general.file_type";

/// Commits the merged model as `dir/name`: metadata from the base, untouched tensors byte for byte, the others
/// in their own type or as `dtype`.
///
/// # Errors
/// `Misuse` for a type whose blocks don't divide a row; `NonFinite` if the sum leaves the type's range; those
/// of [`Exchange::check`]; `Io`. An older file stays intact.
pub fn write(
    storage: &dyn Storage,
    dir: &Path,
    name: &str,
    base: &ModelFile,
    exchange: &Exchange,
    dtype: Option<DType>,
) -> Result<Committed> {
    let mut exchange = exchange.clone();
    exchange.check(base.config())?;
    let module = |tensor: &TensorInfo| module_of(tensor, &exchange);
    let type_of = |tensor: &TensorInfo| module(tensor).and(dtype).unwrap_or(tensor.dtype);
    commit_like((storage, dir, name), base, dtype, type_of, |out, tensor, stored| {
        let written = match module(tensor) {
            None => copied(out, stored)?,
            Some(m) => {
                merged(out, tensor, stored, &exchange, m, type_of(tensor)).map_err(|e| e.at(&tensor.name))?
            }
        };
        base.check_whole()?;
        Ok(written)
    })
}

/// Commits a model with the metadata and tensors of `base`: each tensor in its type, which must divide its rows,
/// and with the bytes that `write` writes and counts.
fn commit_like(
    (storage, dir, name): (&dyn Storage, &Path, &str),
    base: &ModelFile,
    dtype: Option<DType>,
    type_of: impl Fn(&TensorInfo) -> DType,
    write: impl Fn(&mut dyn Write, &TensorInfo, &[u8]) -> Result<usize>,
) -> Result<Committed> {
    let gguf = base.gguf();
    let mut header = Header::new(gguf.alignment());
    for entry in gguf.entries() {
        put_entry(&mut header, entry, base.bytes(), dtype);
    }
    for tensor in gguf.tensors() {
        let dtype = type_of(tensor);
        header.tensor(&tensor.name, dtype, &tensor.dims, row_bytes(tensor, dtype)? * tensor.rows());
    }
    commit(storage, dir, name, |out| {
        header.write(out)?;
        for tensor in gguf.tensors() {
            let stored = &base.bytes()[tensor.range.clone()];
            let written = write(out, tensor, stored)?;
            header.pad(out, written)?;
        }
        Ok(())
    })
}

/// Writes a tensor as it is stored; returns the bytes written.
fn copied(out: &mut dyn Write, stored: &[u8]) -> Result<usize> {
    out.write_all(stored).map_err(failed)?;
    Ok(stored.len())
}

/// Copies an entry, updating the file's type if the merged tensors have another.
fn put_entry(header: &mut Header, entry: &Entry, bytes: &[u8], dtype: Option<DType>) {
    let value_type = entry.value.value_type();
    match dtype.and_then(file_type) {
        Some(new) if &*entry.key == FILE_TYPE && value_type == ValueType::U32 => header.u32(FILE_TYPE, new),
        _ => header.raw(&entry.key, value_type, &bytes[entry.range.clone()]),
    }
}

/// `general.file_type` of a file made mostly of one type (llama.cpp's numbers).
fn file_type(dtype: DType) -> Option<u32> {
    Some(match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Q4_0 => 2,
        DType::Q4_1 => 3,
        DType::Q8_0 => 7,
        DType::Q5_0 => 8,
        DType::Q5_1 => 9,
        DType::Q2_K => 10,
        DType::Q3_K => 12,
        DType::Q4_K => 15,
        DType::Q5_K => 17,
        DType::Q6_K => 18,
        DType::IQ4_NL => 25,
        DType::IQ4_XS => 30,
        DType::BF16 => 32,
    })
}

/// The module that changes a tensor.
fn module_of<'e>(tensor: &TensorInfo, exchange: &'e Exchange) -> Option<&'e Module> {
    exchange.modules.iter().find(|m| *m.proj.tensor_name(m.layer) == *tensor.name)
}

/// Bytes of a tensor's rows in a type.
fn row_bytes(tensor: &TensorInfo, dtype: DType) -> Result<usize> {
    dtype.row_bytes(tensor.cols()).ok_or_else(|| {
        let (name, cols, block) = (&tensor.name, tensor.cols(), dtype.block_len());
        let message = format!("{name}: rows of {cols} don't divide into {} blocks of {block}", dtype.name());
        Error::new(ErrorKind::Misuse, message).advise(Advice::AnotherType)
    })
}

/// Writes one tensor's merged rows; returns the bytes written.
fn merged(
    out: &mut dyn Write,
    tensor: &TensorInfo,
    stored: &[u8],
    exchange: &Exchange,
    module: &Module,
    dtype: DType,
) -> Result<usize> {
    let cols = tensor.cols();
    let at_once = (CHUNK / cols).max(1);
    let (mut values, mut bytes, mut written) = (vec![0.0; at_once * cols], Vec::new(), 0);
    let w = QMatrix::new(tensor.dtype, tensor.rows(), cols, stored)
        .map_err(|_| Error::new(ErrorKind::Corrupt, "its size doesn't match its shape"))?;
    for first in (0..tensor.rows()).step_by(at_once) {
        let count = at_once.min(tensor.rows() - first);
        for (i, row) in values[..count * cols].chunks_exact_mut(cols).enumerate() {
            merged_row(&w, exchange, module, first + i, row);
            check_storable(row, dtype).map_err(|e| e.at(format_args!("row {}", first + i)))?;
        }
        bytes.clear();
        quantize::rows(dtype, &values[..count * cols], cols, &mut bytes)?;
        out.write_all(&bytes).map_err(failed)?;
        written += bytes.len();
    }
    Ok(written)
}

/// Refuses values that aren't finite or overflow f16, which stores floats and every block's scale.
fn check_storable(values: &[f32], dtype: DType) -> Result<()> {
    let most = if matches!(dtype, DType::F32 | DType::BF16) { f32::MAX } else { 65_504.0 };
    match values.iter().find(|v| !v.is_finite() || v.abs() > most) {
        Some(bad) => {
            Err(Error::new(ErrorKind::NonFinite, format!("{bad} can't be stored as {}", dtype.name())))
        }
        None => Ok(()),
    }
}

/// Row `r` of diag(c)·(W + s·B·A), c = m / ‖row‖ for DoRA and 1 else.
fn merged_row(w: &QMatrix<'_>, exchange: &Exchange, m: &Module, r: usize, row: &mut [f32]) {
    scalar::decode::dequantize(w.dtype(), w.row(r), 0, row);
    let scale = exchange.scale(m);
    for (b, a) in m.b[r * m.rank..(r + 1) * m.rank].iter().zip(m.a.chunks_exact(row.len())) {
        let factor = scale * b;
        for (v, a) in row.iter_mut().zip(a) {
            *v += factor * a;
        }
    }
    if let Some(magnitude) = &m.magnitude {
        let norm = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        // A row of zeros has no direction, so it stays.
        let c = if norm > 0.0 { (f64::from(magnitude[r]) / norm) as f32 } else { 1.0 };
        row.iter_mut().for_each(|v| *v *= c);
    }
}
