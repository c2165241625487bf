//! Writes GGUF version 3: a header of metadata and tensor descriptions, then each tensor's bytes.

use std::io::Write;

use engraft_kernels::DType;

use super::ValueType;
use crate::error::{Error, Result};

const VERSION: u32 = 3;

/// The header of a file to write: everything before the tensors' bytes.
#[derive(Clone, Debug)]
pub struct Header {
    alignment: usize,
    /// Keys, types and values, encoded.
    entries: Vec<u8>,
    n_entries: u64,
    /// Descriptions of the tensors, encoded.
    tensors: Vec<u8>,
    n_tensors: u64,
    /// Offset of the next tensor's data from the end of the header.
    offset: u64,
}

impl Header {
    /// A header without entries, for tensors aligned to `alignment` bytes (a power of two). An alignment other
    /// than 32 must also be an entry, `general.alignment`.
    pub fn new(alignment: usize) -> Header {
        Header { alignment, entries: Vec::new(), n_entries: 0, tensors: Vec::new(), n_tensors: 0, offset: 0 }
    }

    /// Adds a key with an already encoded value: the bytes that follow the type in the file.
    pub fn raw(&mut self, key: &str, value_type: ValueType, value: &[u8]) {
        text(&mut self.entries, key);
        self.entries.extend_from_slice(&value_type.id().to_le_bytes());
        self.entries.extend_from_slice(value);
        self.n_entries += 1;
    }

    /// Adds a string.
    pub fn string(&mut self, key: &str, value: &str) {
        let mut encoded = Vec::new();
        text(&mut encoded, value);
        self.raw(key, ValueType::String, &encoded);
    }

    /// Adds an f32.
    pub fn f32(&mut self, key: &str, value: f32) {
        self.raw(key, ValueType::F32, &value.to_le_bytes());
    }

    /// Adds a u32.
    pub fn u32(&mut self, key: &str, value: u32) {
        self.raw(key, ValueType::U32, &value.to_le_bytes());
    }

    /// Describes the next tensor: `dims` as ggml's `ne`, `bytes` of data.
    pub fn tensor(&mut self, name: &str, dtype: DType, dims: &[usize], bytes: usize) {
        text(&mut self.tensors, name);
        self.tensors.extend_from_slice(&(dims.len() as u32).to_le_bytes());
        for d in dims {
            self.tensors.extend_from_slice(&(*d as u64).to_le_bytes());
        }
        self.tensors.extend_from_slice(&dtype.ggml_id().to_le_bytes());
        self.tensors.extend_from_slice(&self.offset.to_le_bytes());
        self.offset += (bytes + self.padding(bytes)) as u64;
        self.n_tensors += 1;
    }

    /// Writes the header, padded. The tensors' bytes follow in order, each followed by [`Header::pad`].
    ///
    /// # Errors
    /// `Io`.
    pub fn write(&self, out: &mut dyn Write) -> Result<()> {
        let mut head = b"GGUF".to_vec();
        head.extend_from_slice(&VERSION.to_le_bytes());
        head.extend_from_slice(&self.n_tensors.to_le_bytes());
        head.extend_from_slice(&self.n_entries.to_le_bytes());
        let length = head.len() + self.entries.len() + self.tensors.len();
        for part in [&head, &self.entries, &self.tensors] {
            out.write_all(part).map_err(failed)?;
        }
        self.pad(out, length)
    }

    /// Pads after `bytes` bytes up to the alignment.
    ///
    /// # Errors
    /// `Io`.
    pub fn pad(&self, out: &mut dyn Write, bytes: usize) -> Result<()> {
        out.write_all(&vec![0; self.padding(bytes)]).map_err(failed)
    }

    fn padding(&self, bytes: usize) -> usize {
        bytes.next_multiple_of(self.alignment) - bytes
    }
}

fn text(out: &mut Vec<u8>, s: &str) {
    out.extend_from_slice(&(s.len() as u64).to_le_bytes());
    out.extend_from_slice(s.as_bytes());
}

pub(crate) fn failed(e: std::io::Error) -> Error {
    Error::io("writing GGUF", e)
}
