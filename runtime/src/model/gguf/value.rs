//! Metadata values: their types, scalars, and arrays that stay in the file.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};

/// A metadata value's type; the discriminant is its number in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    /// Every type, by its number.
    pub const ALL: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::String,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    /// The type with a number.
    pub fn from_id(id: u32) -> Option<ValueType> {
        ValueType::ALL.get(usize::try_from(id).ok()?).copied()
    }

    /// The number in the file.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// Encoded bytes: exact for scalars, the least possible for strings and arrays.
    pub fn min_bytes(self) -> usize {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 | ValueType::String => 8,
            ValueType::Array => 4 + 8,
        }
    }

    /// Whether it is one of the eight integer types.
    pub fn is_integer(self) -> bool {
        !matches!(
            self,
            ValueType::F32 | ValueType::F64 | ValueType::Bool | ValueType::String | ValueType::Array
        )
    }

    /// The name in messages.
    pub fn name(self) -> &'static str {
        match self {
            ValueType::U8 => "u8",
            ValueType::I8 => "i8",
            ValueType::U16 => "u16",
            ValueType::I16 => "i16",
            ValueType::U32 => "u32",
            ValueType::I32 => "i32",
            ValueType::F32 => "f32",
            ValueType::Bool => "bool",
            ValueType::String => "string",
            ValueType::Array => "array",
            ValueType::U64 => "u64",
            ValueType::I64 => "i64",
            ValueType::F64 => "f64",
        }
    }
}

/// A metadata value, of the type the file gives it.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(Box<str>),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl Value {
    /// The type.
    pub fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::String(_) => ValueType::String,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// The integer, if it is one and not negative.
    pub fn as_uint(&self) -> Option<u64> {
        match *self {
            Value::U8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::U64(v) => Some(v),
            Value::I8(v) => v.try_into().ok(),
            Value::I16(v) => v.try_into().ok(),
            Value::I32(v) => v.try_into().ok(),
            Value::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }
}

/// An array that stays in the file; each element was checked when the file was parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Array {
    /// Type of each element; never an array.
    pub element: ValueType,
    /// Number of elements.
    pub count: usize,
    /// Where the elements lie in the file.
    pub range: Range<usize>,
}

/// The strings of an array, in order. Ends after the first error.
#[derive(Clone, Debug)]
pub struct Strings<'a> {
    label: &'a str,
    rest: &'a [u8],
    left: usize,
}

impl<'a> Strings<'a> {
    pub(super) fn new(label: &'a str, bytes: &'a [u8], count: usize) -> Self {
        Strings { label, rest: bytes, left: count }
    }

    fn take_one(&mut self) -> Option<&'a str> {
        let (len, rest) = self.rest.split_first_chunk::<8>()?;
        let (text, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        self.rest = rest;
        std::str::from_utf8(text).ok()
    }
}

impl<'a> Iterator for Strings<'a> {
    type Item = Result<&'a str>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let text = self.take_one();
        if text.is_none() {
            self.left = 0;
        }
        Some(text.ok_or_else(|| {
            let label = self.label;
            Error::new(ErrorKind::Corrupt, format!("{label}: it changed while it was in use; load it again"))
        }))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Strings<'_> {}

/// Decodes one element of an integer array; `b` has the type's width.
pub(super) fn integer(element: ValueType, b: &[u8]) -> i64 {
    let mut wide = [0u8; 8];
    wide[..b.len()].copy_from_slice(b);
    let unsigned = u64::from_le_bytes(wide);
    match element {
        ValueType::I8 => i64::from(unsigned as u8 as i8),
        ValueType::I16 => i64::from(unsigned as u16 as i16),
        ValueType::I32 => i64::from(unsigned as u32 as i32),
        ValueType::I64 => unsigned as i64,
        _ => i64::try_from(unsigned).unwrap_or(i64::MAX),
    }
}

/// Decodes one element of a float array; `b` has the type's width.
pub(super) fn float(element: ValueType, b: &[u8]) -> f32 {
    let mut wide = [0u8; 8];
    wide[..b.len()].copy_from_slice(b);
    let bits = u64::from_le_bytes(wide);
    if element == ValueType::F64 { f64::from_bits(bits) as f32 } else { f32::from_bits(bits as u32) }
}
