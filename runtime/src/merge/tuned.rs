//! Writes a fully fine-tuned model as a GGUF file: metadata and tokenizer from its base, each matrix in the
//! base's type or the requested one.

use std::io::Write;
use std::path::Path;

use engraft_kernels::DType;

use super::{CHUNK, check_storable, commit_like, copied, quantize, row_bytes};
use crate::error::Result;
use crate::model::gguf::TensorInfo;
use crate::model::gguf::write::failed;
use crate::model::tuned::TunedModel;
use crate::model::weights::ModelFile;
use crate::storage::{Committed, Storage};

/// Checks that a model's matrices can be stored as `dtype`. Call it before spending an hour on training.
///
/// # Errors
/// `Misuse` for a type whose blocks don't divide a row.
pub fn check_type(base: &ModelFile, dtype: Option<DType>) -> Result<()> {
    base.gguf().tensors().iter().try_for_each(|tensor| row_bytes(tensor, stored_as(tensor, dtype)).map(drop))
}

/// Commits the model as `dir/name`: metadata from the base, matrices in their own type or as `dtype`, vectors
/// in their own type.
///
/// # Errors
/// Those of [`check_type`]; `NonFinite` for a weight the type can't hold; `Io`. An older file stays intact.
pub fn write(
    storage: &dyn Storage,
    dir: &Path,
    name: &str,
    tuned: &TunedModel,
    dtype: Option<DType>,
) -> Result<Committed> {
    let type_of = |tensor: &TensorInfo| stored_as(tensor, dtype);
    commit_like((storage, dir, name), tuned.base(), dtype, type_of, |out, tensor, stored| {
        match tuned.tensor(tensor) {
            None => copied(out, stored),
            Some(values) => rows(out, values, tensor.cols(), type_of(tensor)).map_err(|e| e.at(&tensor.name)),
        }
    })
}

/// The type of a tensor in the file.
fn stored_as(tensor: &TensorInfo, dtype: Option<DType>) -> DType {
    dtype.filter(|_| tensor.dims.len() > 1).unwrap_or(tensor.dtype)
}

/// Writes the rows of one tensor; returns the bytes written.
fn rows(out: &mut dyn Write, values: &[f32], cols: usize, dtype: DType) -> Result<usize> {
    let (mut bytes, mut written) = (Vec::new(), 0);
    for part in values.chunks((CHUNK / cols).max(1) * cols) {
        check_storable(part, dtype)?;
        bytes.clear();
        quantize::rows(dtype, part, cols, &mut bytes)?;
        out.write_all(&bytes).map_err(failed)?;
        written += bytes.len();
    }
    Ok(written)
}
