//! The rules: a file passes all of them or is refused.
//!
//! Parsers of this format have repeatedly broken on overflowing products of counts read from the file. So every
//! size comes from [`checked_size`], every byte from [`Cursor::take`], and no count allocates before the bytes
//! it promises are known to exist.

use std::fmt::Display;
use std::ops::Range;

use engraft_kernels::DType;

use super::value::{Array, Value, ValueType};
use super::{Entry, Gguf, TensorInfo};
use crate::error::{Error, ErrorKind, Result};

/// Most tensors of a file.
pub const MAX_TENSORS: u64 = 65_536;
/// Most metadata keys of a file.
pub const MAX_ENTRIES: u64 = 65_536;
/// Longest key, in bytes.
pub const MAX_KEY_BYTES: usize = 65_535;
/// Longest tensor name, in bytes (ggml's 64 with its terminator).
pub const MAX_NAME_BYTES: usize = 63;
/// Longest string value, in bytes.
pub const MAX_STRING_BYTES: u64 = 16 << 20;
/// Largest alignment, in bytes.
pub const MAX_ALIGNMENT: u64 = 1 << 20;
/// Longest header (all before the tensor data), in bytes: bounds the time of parsing. The largest
/// vocabularies in use need about 16 MiB.
pub const MAX_HEADER_BYTES: usize = 256 << 20;

const MAGIC: &[u8; 4] = b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
/// Below the least encoding of a tensor's description and of a metadata entry.
const MIN_TENSOR_BYTES: u64 = 24;
const MIN_ENTRY_BYTES: u64 = 13;

/// Checks a whole file; errors name the place in it, not the file.
pub(super) fn file(bytes: &[u8], label: &str) -> Result<Gguf> {
    let mut cursor = Cursor { bytes, pos: 0 };
    let version = preamble(&mut cursor)?;
    let n_tensors = count(&mut cursor, "tensors", MAX_TENSORS, MIN_TENSOR_BYTES)?;
    let n_entries = count(&mut cursor, "metadata keys", MAX_ENTRIES, MIN_ENTRY_BYTES)?;

    let mut entries = Vec::new();
    for i in 0..n_entries {
        entries
            .push(entry(&mut cursor).map_err(|e| e.at(format_args!("metadata entry {i} of {n_entries}")))?);
    }
    let entries_by_key = sorted(entries.len(), |i| &entries[i].key)
        .map_err(|key| corrupt(format_args!("metadata key {} occurs twice", quote(key))))?;
    let alignment = alignment(&entries)?;

    let mut described = Vec::new();
    for i in 0..n_tensors {
        described
            .push(description(&mut cursor).map_err(|e| e.at(format_args!("tensor {i} of {n_tensors}")))?);
    }
    let data_start = checked_align(cursor.pos as u64, alignment)
        .and_then(|start| usize::try_from(start).ok())
        .ok_or_else(|| corrupt("the header's length overflows"))?;
    let tensors = place(described, data_start as u64, alignment, bytes.len() as u64)?;
    let tensors_by_name = sorted(tensors.len(), |i| &tensors[i].name)
        .map_err(|name| corrupt(format_args!("tensor name {} occurs twice", quote(name))))?;

    Ok(Gguf {
        label: label.into(),
        version,
        alignment: alignment as usize,
        data_start,
        entries,
        entries_by_key,
        tensors,
        tensors_by_name,
    })
}

/// Magic and version.
fn preamble(cursor: &mut Cursor<'_>) -> Result<u32> {
    let magic: [u8; 4] = cursor.fixed(&"the magic")?;
    if magic.iter().rev().eq(MAGIC) {
        return Err(byte_swapped());
    }
    if &magic != MAGIC {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "not a GGUF file: it begins with \"{}\" instead of \"GGUF\"; a web page or a Git LFS pointer \
                 saved in its place begins with text",
                magic.escape_ascii()
            ),
        ));
    }
    let version = cursor.u32(&"the version")?;
    match version {
        2 | 3 => Ok(version),
        _ if matches!(version.swap_bytes(), 1..=3) => Err(byte_swapped()),
        _ => Err(unsupported(format_args!(
            "GGUF version {version} is not supported; convert the model again to version 2 or 3"
        ))),
    }
}

/// One of the two counts, checked against what the rest of the file can hold.
fn count(cursor: &mut Cursor<'_>, what: &str, max: u64, min_bytes: u64) -> Result<u64> {
    let n = cursor.u64(&format_args!("the number of {what}"))?;
    let possible = max.min(cursor.remaining() / min_bytes);
    if n > possible {
        return Err(corrupt(format_args!("it declares {n} {what}; at most {possible} fit")));
    }
    Ok(n)
}

/// A key and its value.
fn entry(cursor: &mut Cursor<'_>) -> Result<Entry> {
    let at = cursor.pos;
    let key = cursor.string(&"key")?;
    if key.is_empty() || key.len() > MAX_KEY_BYTES {
        return Err(corrupt(format_args!(
            "byte {at}: a key of {} bytes; 1 to {MAX_KEY_BYTES} are allowed",
            key.len()
        )));
    }
    let value_type = value_type(cursor).map_err(|e| e.at(quote(key)))?;
    let start = cursor.pos;
    let value = value(cursor, value_type).map_err(|e| e.at(quote(key)))?;
    Ok(Entry { key: key.into(), value, range: start..cursor.pos })
}

fn value_type(cursor: &mut Cursor<'_>) -> Result<ValueType> {
    let at = cursor.pos;
    let id = cursor.u32(&"value type")?;
    ValueType::from_repr(id)
        .ok_or_else(|| corrupt(format_args!("byte {at}: value type {id} does not exist (0 to 12 do)")))
}

fn value(cursor: &mut Cursor<'_>, value_type: ValueType) -> Result<Value> {
    let what = &"value";
    Ok(match value_type {
        ValueType::U8 => Value::U8(u8::from_le_bytes(cursor.fixed(what)?)),
        ValueType::I8 => Value::I8(i8::from_le_bytes(cursor.fixed(what)?)),
        ValueType::U16 => Value::U16(u16::from_le_bytes(cursor.fixed(what)?)),
        ValueType::I16 => Value::I16(i16::from_le_bytes(cursor.fixed(what)?)),
        ValueType::U32 => Value::U32(u32::from_le_bytes(cursor.fixed(what)?)),
        ValueType::I32 => Value::I32(i32::from_le_bytes(cursor.fixed(what)?)),
        ValueType::F32 => Value::F32(f32::from_le_bytes(cursor.fixed(what)?)),
        ValueType::U64 => Value::U64(u64::from_le_bytes(cursor.fixed(what)?)),
        ValueType::I64 => Value::I64(i64::from_le_bytes(cursor.fixed(what)?)),
        ValueType::F64 => Value::F64(f64::from_le_bytes(cursor.fixed(what)?)),
        ValueType::Bool => Value::Bool(boolean(cursor)?),
        ValueType::String => Value::String(cursor.string(what)?.into()),
        ValueType::Array => Value::Array(array(cursor)?),
    })
}

fn boolean(cursor: &mut Cursor<'_>) -> Result<bool> {
    let at = cursor.pos;
    match cursor.fixed(&"bool")? {
        [0u8] => Ok(false),
        [1] => Ok(true),
        [b] => Err(corrupt(format_args!("byte {at}: a bool is 0 or 1, not {b}"))),
    }
}

/// Walks over an array: its elements are checked here and read later, from the file.
fn array(cursor: &mut Cursor<'_>) -> Result<Array> {
    let element = value_type(cursor)?;
    if element == ValueType::Array {
        return Err(unsupported("arrays of arrays are not supported; no known model needs one"));
    }
    let at = cursor.pos;
    let declared = cursor.u64(&"array length")?;
    let needed = checked_size(&[declared, element.min_bytes() as u64]);
    let needed = needed.filter(|&n| n <= cursor.remaining()).ok_or_else(|| {
        let (name, left) = (element.name(), cursor.remaining());
        corrupt(format_args!(
            "byte {at}: an array of {declared} {name} values needs more than the {left} bytes left"
        ))
    })?;
    let start = cursor.pos;
    match element {
        ValueType::String => {
            for i in 0..declared {
                cursor.string(&format_args!("array element {i}"))?;
            }
        }
        ValueType::Bool => {
            for _ in 0..declared {
                boolean(cursor)?;
            }
        }
        _ => {
            cursor.take(needed, &"array")?;
        }
    }
    // `declared` is at most the file's length, since each element takes a byte or more.
    Ok(Array { element, count: declared as usize, range: start..cursor.pos })
}

/// The alignment that the metadata sets, or the format's default.
fn alignment(entries: &[Entry]) -> Result<u64> {
    const KEY: &str = "general.alignment";
    let Some(entry) = entries.iter().find(|e| &*e.key == KEY) else { return Ok(DEFAULT_ALIGNMENT) };
    match entry.value {
        Value::U32(v) if v.is_power_of_two() && u64::from(v) <= MAX_ALIGNMENT => Ok(u64::from(v)),
        Value::U32(v) => {
            Err(corrupt(format_args!("{KEY} is {v}; a power of two up to {MAX_ALIGNMENT} is allowed")))
        }
        ref other => {
            Err(corrupt(format_args!("{KEY} must be of type u32, not {}", other.value_type().name())))
        }
    }
}

/// A tensor's description, before its place in the file is checked.
struct Description<'a> {
    name: &'a str,
    dtype: DType,
    dims: Box<[usize]>,
    offset: u64,
    size: u64,
}

fn description<'a>(cursor: &mut Cursor<'a>) -> Result<Description<'a>> {
    let at = cursor.pos;
    let name = cursor.string(&"tensor name")?;
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains('\0') {
        return Err(corrupt(format_args!(
            "byte {at}: tensor name {}: 1 to {MAX_NAME_BYTES} bytes without NUL are allowed",
            quote(name)
        )));
    }
    shape(cursor, name).map_err(|e| e.at(quote(name)))
}

fn shape<'a>(cursor: &mut Cursor<'a>, name: &'a str) -> Result<Description<'a>> {
    let at = cursor.pos;
    let n_dims = cursor.u32(&"number of dimensions")?;
    if !(1..=4).contains(&n_dims) {
        return Err(corrupt(format_args!("byte {at}: {n_dims} dimensions; 1 to 4 are allowed")));
    }
    let mut dims = [1u64; 4];
    let dims = &mut dims[..n_dims as usize];
    for dim in &mut *dims {
        *dim = cursor.u64(&"dimension")?;
    }
    if dims.contains(&0) {
        return Err(corrupt(format_args!("byte {at}: a dimension of {dims:?} is 0")));
    }
    let id = cursor.u32(&"element type")?;
    let dtype = DType::from_ggml(id).ok_or_else(|| {
        unsupported(format_args!(
            "element type {id} is not supported; quantize the model to one of {}",
            DType::ALL.map(DType::name).join(", ")
        ))
    })?;
    let offset = cursor.u64(&"offset")?;
    let size = tensor_size(dtype, dims)?;
    let dims: Option<Box<[usize]>> = dims.iter().map(|&d| usize::try_from(d).ok()).collect();
    let dims = dims.ok_or_else(|| corrupt("a dimension exceeds this machine's address space"))?;
    Ok(Description { name, dtype, dims, offset, size })
}

/// Bytes of a tensor's data.
fn tensor_size(dtype: DType, dims: &[u64]) -> Result<u64> {
    let block = dtype.block_len() as u64;
    if !dims[0].is_multiple_of(block) {
        return Err(corrupt(format_args!(
            "rows of {} elements are not a whole number of {} blocks of {block}",
            dims[0],
            dtype.name()
        )));
    }
    // The element count must not overflow either: others compute it.
    checked_size(dims)
        .and_then(|elements| checked_size(&[elements / block, dtype.block_bytes() as u64]))
        .ok_or_else(|| corrupt(format_args!("the size of {dims:?} elements of {} overflows", dtype.name())))
}

/// Assigns each tensor its range: in file order, without holes or overlaps, inside the file.
fn place(
    described: Vec<Description<'_>>,
    data_start: u64,
    alignment: u64,
    len: u64,
) -> Result<Vec<TensorInfo>> {
    let mut expected = 0u64;
    let mut tensors = Vec::with_capacity(described.len());
    for d in described {
        let name = quote(d.name);
        if !d.offset.is_multiple_of(alignment) {
            let offset = d.offset;
            return Err(corrupt(format_args!("{name}: offset {offset} is not a multiple of {alignment}")));
        }
        if d.offset != expected {
            let offset = d.offset;
            return Err(corrupt(format_args!(
                "{name}: offset {offset}, but the tensors before it end at {expected} (a hole or an overlap)"
            )));
        }
        let range = checked_range(data_start, d.offset, d.size).filter(|r| r.end as u64 <= len);
        let range = range.ok_or_else(|| {
            corrupt(format_args!(
                "{name}: its {} bytes at {data_start} + {} reach past the file's end at {len}",
                d.size, d.offset
            ))
        })?;
        expected = d
            .offset
            .checked_add(d.size)
            .and_then(|end| checked_align(end, alignment))
            .ok_or_else(|| corrupt(format_args!("{name}: the offset after it overflows")))?;
        tensors.push(TensorInfo { name: d.name.into(), dtype: d.dtype, dims: d.dims, range });
    }
    Ok(tensors)
}

/// The product of sizes and counts: the one multiplication in this parser.
fn checked_size(factors: &[u64]) -> Option<u64> {
    factors.iter().try_fold(1u64, |product, &f| product.checked_mul(f))
}

/// `pos` rounded up to a power of two.
fn checked_align(pos: u64, alignment: u64) -> Option<u64> {
    Some(pos.checked_add(alignment - 1)? & !(alignment - 1))
}

fn checked_range(data_start: u64, offset: u64, size: u64) -> Option<Range<usize>> {
    let start = data_start.checked_add(offset)?;
    let end = start.checked_add(size)?;
    Some(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
}

/// The order of `n` names, or a name that occurs twice.
fn sorted<'a>(n: usize, name: impl Fn(usize) -> &'a str) -> std::result::Result<Vec<u32>, &'a str> {
    // At most 65,536 of them.
    let mut order: Vec<u32> = (0..n as u32).collect();
    order.sort_unstable_by_key(|&i| name(i as usize));
    match order.windows(2).find(|w| name(w[0] as usize) == name(w[1] as usize)) {
        Some(twice) => Err(name(twice[0] as usize)),
        None => Ok(order),
    }
}

/// Reads the header forward, never past its end.
struct Cursor<'a> {
    bytes: &'a [u8],
    pos: usize,
}

impl<'a> Cursor<'a> {
    fn remaining(&self) -> u64 {
        (self.bytes.len() - self.pos) as u64
    }

    /// The next `n` bytes.
    fn take(&mut self, n: u64, what: &dyn Display) -> Result<&'a [u8]> {
        let (at, left) = (self.pos, self.remaining());
        if n > left {
            return Err(corrupt(format_args!("byte {at}: {what} needs {n} bytes, {left} are left")));
        }
        let end = at + n as usize;
        if end > MAX_HEADER_BYTES {
            return Err(unsupported(format_args!(
                "byte {at}: {what}: the header exceeds {MAX_HEADER_BYTES} bytes"
            )));
        }
        self.pos = end;
        Ok(&self.bytes[at..end])
    }

    fn fixed<const N: usize>(&mut self, what: &dyn Display) -> Result<[u8; N]> {
        let bytes = self.take(N as u64, what)?;
        bytes.try_into().map_err(|_| corrupt(format_args!("{what} is truncated")))
    }

    fn u32(&mut self, what: &dyn Display) -> Result<u32> {
        Ok(u32::from_le_bytes(self.fixed(what)?))
    }

    fn u64(&mut self, what: &dyn Display) -> Result<u64> {
        Ok(u64::from_le_bytes(self.fixed(what)?))
    }

    fn string(&mut self, what: &dyn Display) -> Result<&'a str> {
        let at = self.pos;
        let len = self.u64(what)?;
        if len > MAX_STRING_BYTES {
            return Err(corrupt(format_args!(
                "byte {at}: {what} declares {len} bytes; at most {MAX_STRING_BYTES} are allowed"
            )));
        }
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|e| corrupt(format_args!("byte {at}: {what} is not UTF-8 ({e})")))
    }
}

/// A name from the file for a message: control characters escaped, length bounded.
pub(crate) fn quote(name: &str) -> String {
    const SHOWN: usize = 80;
    let mut chars = name.chars();
    let mut shown = format!("\"{}", chars.by_ref().take(SHOWN).collect::<String>().escape_debug());
    shown.push_str(if chars.next().is_some() { "…\"" } else { "\"" });
    shown
}

fn corrupt(message: impl Display) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("{message}; the file is damaged or truncated: fetch or convert it again"),
    )
}

fn unsupported(message: impl Display) -> Error {
    Error::new(ErrorKind::Unsupported, message.to_string())
}

fn byte_swapped() -> Error {
    unsupported("a byte-swapped (big-endian) GGUF file; convert the model to little-endian")
}
