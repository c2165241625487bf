//! The supported element types of GGUF tensors, and the size and layout of their blocks.
//!
//! Layouts are those of ggml's `ggml-common.h`; every block is a plain run of unaligned little-endian bytes, so
//! matrices are addressed as bytes and decoded by offset.

use strum::{FromRepr, IntoStaticStr, VariantArray};

/// Element type of a stored matrix, named and numbered as in ggml (`enum ggml_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromRepr, IntoStaticStr, VariantArray)]
#[repr(u8)]
#[allow(non_camel_case_types, reason = "ggml's own names, as users know them")]
#[allow(missing_docs, reason = "the names are the documentation; see `block_bytes` for layouts")]
pub enum DType {
    F32 = 0,
    F16 = 1,
    BF16 = 30,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ4_NL = 20,
    IQ4_XS = 23,
}

impl DType {
    /// Every supported type.
    pub const ALL: [DType; 15] = *DType::VARIANTS.first_chunk().expect("there are fifteen");

    /// The type with ggml's numeric id, if it is supported.
    pub const fn from_ggml(id: u32) -> Option<DType> {
        if id <= u8::MAX as u32 { DType::from_repr(id as u8) } else { None }
    }

    /// ggml's numeric id.
    pub const fn ggml_id(self) -> u32 {
        self as u32
    }

    /// ggml's name, as llama-quantize prints it.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Elements per block.
    pub const fn block_len(self) -> usize {
        match self {
            DType::F32 | DType::F16 | DType::BF16 => 1,
            DType::Q4_0 | DType::Q4_1 | DType::Q5_0 | DType::Q5_1 | DType::Q8_0 | DType::IQ4_NL => 32,
            DType::Q2_K | DType::Q3_K | DType::Q4_K | DType::Q5_K | DType::Q6_K | DType::IQ4_XS => 256,
        }
    }

    /// Bytes per block.
    pub const fn block_bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::Q4_0 | DType::IQ4_NL => 2 + 16,
            DType::Q4_1 => 2 + 2 + 16,
            DType::Q5_0 => 2 + 4 + 16,
            DType::Q5_1 => 2 + 2 + 4 + 16,
            DType::Q8_0 => 2 + 32,
            DType::Q2_K => 16 + 64 + 2 + 2,
            DType::Q3_K => 32 + 64 + 12 + 2,
            DType::Q4_K => 2 + 2 + 12 + 128,
            DType::Q5_K => 2 + 2 + 12 + 32 + 128,
            DType::Q6_K => 128 + 64 + 16 + 2,
            DType::IQ4_XS => 2 + 2 + 4 + 128,
        }
    }

    /// Whether elements are stored as floats, one by one.
    pub const fn is_float(self) -> bool {
        self.block_len() == 1
    }

    /// Elements that share one scale: 16 or 32 for block types, 0 for floats.
    pub const fn group_len(self) -> usize {
        match self {
            DType::F32 | DType::F16 | DType::BF16 => 0,
            DType::Q2_K | DType::Q3_K | DType::Q6_K => 16,
            _ => 32,
        }
    }

    /// Whether a group has an additive bias (a "min") beside its scale.
    pub const fn has_bias(self) -> bool {
        matches!(self, DType::Q4_1 | DType::Q5_1 | DType::Q2_K | DType::Q4_K | DType::Q5_K)
    }

    /// Bytes of one row of `cols` elements; `None` if `cols` isn't a multiple of the block length or the
    /// product overflows.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }
}
