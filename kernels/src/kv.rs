//! Keys and values of earlier positions, as a cache stores them.

use core::ops::Range;

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use crate::acts::quantize_row;

/// Elements that share a scale in [`KvType::Q8`].
pub const KV_BLOCK: usize = 32;

/// How a cache stores its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    /// As computed.
    F32,
    /// IEEE half precision.
    F16,
    /// int8 in blocks of 32 with an f32 scale; heads must be whole blocks.
    Q8,
}

/// Rows of a cache, `[positions, kv·hd]`.
#[derive(Clone, Copy, Debug)]
pub enum Kv<'a> {
    /// f32.
    F32(&'a [f32]),
    /// Bits of f16.
    F16(&'a [u16]),
    /// Codes, and a scale per 32 of them.
    Q8(&'a [i8], &'a [f32]),
}

/// Rows of a cache, for writing.
#[derive(Debug)]
pub enum KvMut<'a> {
    /// f32.
    F32(&'a mut [f32]),
    /// Bits of f16.
    F16(&'a mut [u16]),
    /// Codes, and a scale per 32 of them.
    Q8(&'a mut [i8], &'a mut [f32]),
}

impl KvMut<'_> {
    /// Stores x from element `at` on.
    ///
    /// # Panics
    /// If x doesn't fit, or `at` and x aren't whole blocks of a `Q8` cache.
    pub fn store(&mut self, at: usize, x: &[f32]) {
        match self {
            KvMut::F32(d) => d[at..at + x.len()].copy_from_slice(x),
            KvMut::F16(d) => d[at..at + x.len()].reinterpret_cast_mut::<f16>().convert_from_f32_slice(x),
            KvMut::Q8(codes, scale) => {
                assert!(at.is_multiple_of(KV_BLOCK) && x.len().is_multiple_of(KV_BLOCK));
                let codes = codes[at..at + x.len()].chunks_exact_mut(KV_BLOCK);
                let scale = scale[at / KV_BLOCK..].iter_mut();
                for ((x, codes), scale) in x.chunks_exact(KV_BLOCK).zip(codes).zip(scale) {
                    quantize_row(x, codes, core::slice::from_mut(scale));
                }
            }
        }
    }

    /// The first `elements` elements, for reading.
    pub fn first(&self, elements: usize) -> Kv<'_> {
        self.range(0..elements)
    }

    /// A range of elements, for reading; whole blocks of a `Q8` cache.
    pub fn range(&self, at: Range<usize>) -> Kv<'_> {
        match self {
            KvMut::F32(d) => Kv::F32(&d[at]),
            KvMut::F16(d) => Kv::F16(&d[at]),
            KvMut::Q8(codes, scale) => {
                Kv::Q8(&codes[at.clone()], &scale[at.start / KV_BLOCK..at.end / KV_BLOCK])
            }
        }
    }
}

/// Keys and values of the same positions, `[positions, kv·hd]` each and of one type.
#[derive(Clone, Copy, Debug)]
pub struct KvRows<'a> {
    /// Keys, rotated.
    pub k: Kv<'a>,
    /// Values.
    pub v: Kv<'a>,
}

impl KvRows<'_> {
    /// No positions.
    pub const NONE: KvRows<'static> = KvRows { k: Kv::F32(&[]), v: Kv::F32(&[]) };

    /// How the elements are stored.
    pub fn ty(&self) -> KvType {
        self.k.ty()
    }

    /// Positions of `row` elements.
    ///
    /// # Panics
    /// If keys and values differ in number or type, or aren't whole rows.
    pub(crate) fn positions(&self, row: usize) -> usize {
        assert!(self.k.len() == self.v.len() && self.k.ty() == self.v.ty());
        assert!(self.k.len().is_multiple_of(row));
        self.k.len() / row
    }

    /// One head of the rows: elements from `first` of each row of `row` elements.
    pub(crate) fn head(&self, first: usize, row: usize) -> CachedRows {
        let rows = self.positions(row);
        // Without rows there is no first element, but then it isn't read either.
        let first = if rows == 0 { 0 } else { first };
        CachedRows { k: self.k.head(first, row), v: self.v.head(first, row), rows }
    }
}

impl Kv<'_> {
    /// How the elements are stored.
    pub fn ty(&self) -> KvType {
        match self {
            Kv::F32(_) => KvType::F32,
            Kv::F16(_) => KvType::F16,
            Kv::Q8(..) => KvType::Q8,
        }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            Kv::F32(d) => d.len(),
            Kv::F16(d) => d.len(),
            Kv::Q8(codes, _) => codes.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element `i` as f32.
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Kv::F32(d) => d[i],
            Kv::F16(d) => f16::from_bits(d[i]).to_f32(),
            Kv::Q8(codes, scale) => f32::from(codes[i]) * scale[i / KV_BLOCK],
        }
    }

    /// One head of the rows: elements from `first` of each row of `row` elements.
    pub(crate) fn head(&self, first: usize, row: usize) -> KvHead {
        let (ty, data, scale) = match self {
            Kv::F32(d) => (KvType::F32, d[first..].as_ptr().cast(), core::ptr::null()),
            Kv::F16(d) => (KvType::F16, d[first..].as_ptr().cast(), core::ptr::null()),
            Kv::Q8(codes, scale) => {
                (KvType::Q8, codes[first..].as_ptr().cast(), scale[first / KV_BLOCK..].as_ptr())
            }
        };
        KvHead { ty, data, scale, row }
    }
}

/// One head's rows as the kernels read them.
#[derive(Clone, Copy)]
pub(crate) struct KvHead {
    pub(crate) ty: KvType,
    /// The head's first element of the first row.
    pub(crate) data: *const u8,
    /// Its scale, if the type has one.
    pub(crate) scale: *const f32,
    /// Elements per row.
    pub(crate) row: usize,
}

impl KvHead {
    /// Element `i` of a row, as f32.
    ///
    /// # Safety
    /// There are such a row and element.
    #[inline(always)]
    pub(crate) unsafe fn get(&self, row: usize, i: usize) -> f32 {
        let at = row * self.row + i;
        // SAFETY: the caller's contract; a row of `Q8` is whole blocks.
        unsafe {
            match self.ty {
                KvType::F32 => *self.data.cast::<f32>().add(at),
                KvType::F16 => f16::from_bits(*self.data.cast::<u16>().add(at)).to_f32(),
                KvType::Q8 => {
                    let scale = *self.scale.add(row * (self.row / KV_BLOCK) + i / KV_BLOCK);
                    f32::from(*self.data.cast::<i8>().add(at)) * scale
                }
            }
        }
    }
}

/// One head's keys and values of some positions.
#[derive(Clone, Copy)]
pub(crate) struct CachedRows {
    pub(crate) k: KvHead,
    pub(crate) v: KvHead,
    pub(crate) rows: usize,
}
