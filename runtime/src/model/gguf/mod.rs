//! GGUF files (versions 2 and 3, little-endian): checked once, whole, before anything is used.
//!
//! The format is ggml's `docs/gguf.md`: magic, version, counts, key/value metadata, tensor
//! descriptions, padding, tensor data. [`Gguf::parse`] refuses a file unless every rule holds, so the rest of
//! the program sees only typed values and ranges inside the file. Arrays (a vocabulary has around a hundred
//! thousand strings) stay in the file and are read by iteration.

mod parse;
mod value;
pub mod write;

use std::ops::Range;

use engraft_kernels::DType;

use crate::error::{Error, ErrorKind, Result};

pub(crate) use parse::quote;
pub use parse::{
    MAX_ALIGNMENT, MAX_ENTRIES, MAX_HEADER_BYTES, MAX_KEY_BYTES, MAX_NAME_BYTES, MAX_STRING_BYTES,
    MAX_TENSORS,
};
pub use value::{Array, Strings, Value, ValueType};

/// The validated description of a GGUF file; it does not hold the file's bytes.
#[derive(Debug)]
pub struct Gguf {
    label: Box<str>,
    version: u32,
    alignment: usize,
    data_start: usize,
    entries: Vec<Entry>,
    /// Indices into `entries` in the order of their keys.
    entries_by_key: Vec<u32>,
    tensors: Vec<TensorInfo>,
    /// Indices into `tensors` in the order of their names.
    tensors_by_name: Vec<u32>,
}

/// One key of the metadata with its value.
#[derive(Debug)]
pub struct Entry {
    /// The key, unique in the file.
    pub key: Box<str>,
    /// The decoded value.
    pub value: Value,
    /// Where the encoded value lies in the file (after its type).
    pub range: Range<usize>,
}

/// One tensor: what it is and where its bytes lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name, unique in the file.
    pub name: Box<str>,
    /// Element type.
    pub dtype: DType,
    /// 1 to 4 extents, the fastest-running (row length) first, as ggml's `ne`.
    pub dims: Box<[usize]>,
    /// Its byte range within the file, as long as `dtype` and `dims` imply.
    pub range: Range<usize>,
}

impl TensorInfo {
    /// The row length: the fastest-running extent.
    pub fn cols(&self) -> usize {
        self.dims[0]
    }

    /// How many rows: the product of the other extents.
    pub fn rows(&self) -> usize {
        self.dims[1..].iter().product()
    }
}

impl Gguf {
    /// Checks the whole file in `bytes`; `label` names it in this and all later errors.
    ///
    /// Time and memory are bounded by the length of the header, itself at most
    /// [`MAX_HEADER_BYTES`]; tensor data is not read.
    ///
    /// # Errors
    /// `Corrupt` or `Unsupported`, with the place in the file and what to do.
    pub fn parse(bytes: &[u8], label: &str) -> Result<Gguf> {
        parse::file(bytes, label).map_err(|e| e.at(label))
    }

    /// The name that errors give the file.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Format version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Bytes to which tensors are aligned: a power of two.
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// Where tensor data begins (in a file without tensors, possibly past its end).
    pub fn data_start(&self) -> usize {
        self.data_start
    }

    /// The metadata in the order of the file.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The metadata in the order of its keys.
    pub fn entries_by_key(&self) -> impl Iterator<Item = &Entry> {
        self.entries_by_key.iter().map(|&i| &self.entries[i as usize])
    }

    /// The tensors in the order of the file, which is also the order of their data.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Index into [`Gguf::tensors`] of the tensor with a name.
    pub fn tensor_index(&self, name: &str) -> Option<usize> {
        let by_name = &self.tensors_by_name;
        let found = by_name.binary_search_by(|&i| (*self.tensors[i as usize].name).cmp(name));
        Some(by_name[found.ok()?] as usize)
    }

    /// The tensor with a name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        Some(&self.tensors[self.tensor_index(name)?])
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let by_key = &self.entries_by_key;
        let found = by_key.binary_search_by(|&i| (*self.entries[i as usize].key).cmp(key));
        Some(&self.entries[by_key[found.ok()?] as usize].value)
    }

    /// A non-negative integer of any stored width.
    ///
    /// # Errors
    /// `Corrupt` for another type or a negative number.
    pub fn uint(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a non-negative integer", Value::as_uint)
    }

    /// A float; an `f64` is rounded to `f32`.
    ///
    /// # Errors
    /// `Corrupt` for another type. NaN and infinities are passed on.
    pub fn float(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a float", |value| match value {
            Value::F32(v) => Some(*v),
            Value::F64(v) => Some(*v as f32),
            _ => None,
        })
    }

    /// A boolean.
    ///
    /// # Errors
    /// `Corrupt` for another type.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |value| if let Value::Bool(v) = value { Some(*v) } else { None })
    }

    /// A string.
    ///
    /// # Errors
    /// `Corrupt` for another type.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| if let Value::String(v) = value { Some(&**v) } else { None })
    }

    /// Where an array lies, and of what it is made.
    ///
    /// # Errors
    /// `Corrupt` for another type.
    pub fn array(&self, key: &str) -> Result<Option<&Array>> {
        self.typed(key, "an array", |value| if let Value::Array(v) = value { Some(v) } else { None })
    }

    /// An array of strings, read from the file's `bytes` as the iterator goes.
    ///
    /// # Errors
    /// `Corrupt` for another type. Each item is a `Result`, since a mapped file can change under us.
    pub fn strings<'a>(&'a self, key: &str, bytes: &'a [u8]) -> Result<Option<Strings<'a>>> {
        let found = self.elements(key, bytes, "strings", |t| t == ValueType::String)?;
        Ok(found.map(|(array, bytes)| Strings::new(&self.label, bytes, array.count)))
    }

    /// An array of integers of any stored width, read from the file's `bytes` as the iterator goes;
    /// a `u64` above `i64::MAX` saturates.
    ///
    /// # Errors
    /// `Corrupt` for another type.
    pub fn ints<'a>(
        &self,
        key: &str,
        bytes: &'a [u8],
    ) -> Result<Option<impl ExactSizeIterator<Item = i64> + use<'a>>> {
        let found = self.elements(key, bytes, "integers", ValueType::is_integer)?;
        Ok(found.map(|(&Array { element, .. }, bytes)| {
            bytes.chunks_exact(element.min_bytes()).map(move |b| value::integer(element, b))
        }))
    }

    /// An array of `f32` or `f64`, read from the file's `bytes` as the iterator goes, as `f32`.
    ///
    /// # Errors
    /// `Corrupt` for another type.
    pub fn floats<'a>(
        &self,
        key: &str,
        bytes: &'a [u8],
    ) -> Result<Option<impl ExactSizeIterator<Item = f32> + use<'a>>> {
        let is_float = |t| matches!(t, ValueType::F32 | ValueType::F64);
        let found = self.elements(key, bytes, "floats", is_float)?;
        Ok(found.map(|(&Array { element, .. }, bytes)| {
            bytes.chunks_exact(element.min_bytes()).map(move |b| value::float(element, b))
        }))
    }

    /// The value of a key as `read` understands it, which refuses all types but `wanted`.
    fn typed<'g, T>(
        &'g self,
        key: &str,
        wanted: &str,
        read: impl Fn(&'g Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| {
            let (key, found) = (quote(key), value.value_type().name());
            let message = format!("metadata key {key} must be {wanted} but is of type {found}");
            self.error(ErrorKind::Corrupt, message)
        })
    }

    /// An array of elements that `is_wanted` accepts, and its bytes.
    fn elements<'a>(
        &self,
        key: &str,
        bytes: &'a [u8],
        wanted: &str,
        is_wanted: fn(ValueType) -> bool,
    ) -> Result<Option<(&Array, &'a [u8])>> {
        let Some(array) = self.array(key)? else { return Ok(None) };
        if !is_wanted(array.element) {
            let (key, found) = (quote(key), array.element.name());
            let message = format!("metadata key {key} must be an array of {wanted}, not of {found}");
            return Err(self.error(ErrorKind::Corrupt, message));
        }
        let bytes = bytes.get(array.range.clone()).ok_or_else(|| {
            let message = format!("{key} lies outside the given bytes: they belong to another file");
            self.error(ErrorKind::Misuse, message)
        })?;
        Ok(Some((array, bytes)))
    }

    /// A getter's result for `key`, or an error naming the missing key.
    ///
    /// # Errors
    /// `Corrupt` for `None`.
    pub fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(ErrorKind::Corrupt, format!("metadata key {} is missing", quote(key))))
    }

    /// An error about this file.
    pub(crate) fn error(&self, kind: ErrorKind, message: impl std::fmt::Display) -> Error {
        Error::new(kind, format!("{}: {message}", self.label))
    }
}
