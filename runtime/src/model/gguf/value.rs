//! Metadata values: their types, scalars, and arrays that stay in the file.

use std::ops::Range;

use strum::{EnumDiscriminants, FromRepr, IntoStaticStr, VariantArray};

use crate::error::{Error, ErrorKind, Result};

/// A metadata value, of the type the file gives it. A type's number in the file is its place here.
#[derive(Clone, Debug, PartialEq, EnumDiscriminants)]
#[strum_discriminants(name(ValueType), derive(FromRepr, IntoStaticStr, VariantArray))]
#[strum_discriminants(repr(u32), strum(serialize_all = "lowercase"))]
#[strum_discriminants(doc = "A metadata value's type; the discriminant is its number in the file.")]
#[strum_discriminants(allow(missing_docs, reason = "the names are the documentation"))]
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

impl ValueType {
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
        self.into()
    }
}

impl Value {
    /// The type.
    pub fn value_type(&self) -> ValueType {
        self.into()
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
