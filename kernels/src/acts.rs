//! Activations quantized to int8 in blocks of 32, with the sums the integer tiles start from.

/// Rows of the tallest integer tile of any instruction set.
pub(crate) const TILE_ROWS_MAX: usize = 8;

/// Lower bound on a block's largest element, so that 127 over it stays finite.
pub(crate) const AMAX_LEAST: f32 = 1e-30;

/// Quantizes one row to int8 in blocks of 32 (scale = max|x| / 127).
pub(crate) fn quantize_row(x: &[f32], codes: &mut [i8], scale: &mut [f32]) {
    for (b, block) in x.chunks_exact(32).enumerate() {
        let amax = block.iter().fold(AMAX_LEAST, |a, v| a.max(v.abs()));
        // Codes can't hold NaN or infinity, so the scale carries it.
        scale[b] = if block.iter().all(|v| v.is_finite()) { amax / 127.0 } else { f32::NAN };
        let inv = 127.0 / amax;
        for (i, v) in block.iter().enumerate() {
            codes[b * 32 + i] = libm::rintf(v * inv) as i8;
        }
    }
}

/// Rows of quantized activations: `x[i] ≈ scale[i/32] · codes[i]`.
///
/// Stored in the order the integer tile reads: `tile` rows together, in blocks of 32 columns, row by row within
/// each block. The last rows are padded to a full tile. With a `tile` of 1 they are plain rows.
#[derive(Clone, Copy, Debug)]
pub struct QuantActs<'a> {
    /// Rows stored together.
    pub tile: usize,
    /// Whether the sums of 16 are filled.
    pub halves: bool,
    /// `[m/tile, k/32, tile, 32]`, −127..=127.
    pub codes: &'a [i8],
    /// `[m/tile, k/32, tile]`.
    pub scale: &'a [f32],
    /// scale·Σcodes per 32, `[m/tile, k/32, tile]`.
    pub bias_sum32: &'a [f32],
    /// scale·Σcodes per 16, `[m/tile, k/16, tile]`; filled only if `halves`, as is `start16`.
    pub bias_sum16: &'a [f32],
    /// −128·Σcodes per 32, `[m/tile, k/32, tile]`.
    pub start32: &'a [i32],
    /// −128·Σcodes per 16, `[m/tile, k/16, tile]`.
    pub start16: &'a [i32],
}

/// The storage behind [`QuantActs`], cut from a word buffer.
pub struct QuantActsMut<'a> {
    pub(crate) tile: usize,
    pub(crate) halves: bool,
    pub(crate) codes: &'a mut [i8],
    pub(crate) scale: &'a mut [f32],
    pub(crate) bias_sum32: &'a mut [f32],
    pub(crate) bias_sum16: &'a mut [f32],
    pub(crate) start32: &'a mut [i32],
    pub(crate) start16: &'a mut [i32],
}

/// f32 words for m × k quantized activations with any tile, or for as many bf16.
pub const fn acts_words(m: usize, k: usize) -> usize {
    let words = row_words(k);
    (m + TILE_ROWS_MAX - 1) * if words > k / 2 { words } else { k / 2 }
}

const fn row_words(k: usize) -> usize {
    k / 4 + 3 * (k / 32) + 2 * (k / 16)
}

impl<'a> QuantActsMut<'a> {
    /// Cuts the storage for m × k in tiles of `tile` rows from `words` (at least [`acts_words`]; k a
    /// multiple of 32).
    ///
    /// # Panics
    /// If the buffer is too short or k isn't a multiple of 32.
    pub fn new(words: &'a mut [f32], m: usize, k: usize, tile: usize, halves: bool) -> Self {
        let m = m.next_multiple_of(tile);
        assert!(k.is_multiple_of(32) && words.len() >= m * row_words(k));
        let (codes, rest) = words.split_at_mut(m * k / 4);
        let (scale, rest) = rest.split_at_mut(m * k / 32);
        let (bias_sum32, rest) = rest.split_at_mut(m * k / 32);
        let (bias_sum16, rest) = rest.split_at_mut(m * k / 16);
        let (start32, rest) = rest.split_at_mut(m * k / 32);
        let (start16, _) = rest.split_at_mut(m * k / 16);
        // SAFETY: f32, i8 and i32 have no invalid bit patterns; alignment of i8 and i32 is at most
        // that of f32; lengths are the same bytes; the borrows are split from one exclusive borrow.
        unsafe {
            QuantActsMut {
                tile,
                halves,
                codes: core::slice::from_raw_parts_mut(codes.as_mut_ptr().cast(), m * k),
                scale,
                bias_sum32,
                bias_sum16,
                start32: core::slice::from_raw_parts_mut(start32.as_mut_ptr().cast(), m * k / 32),
                start16: core::slice::from_raw_parts_mut(start16.as_mut_ptr().cast(), m * k / 16),
            }
        }
    }

    /// The finished activations.
    pub fn freeze(self) -> QuantActs<'a> {
        QuantActs {
            tile: self.tile,
            halves: self.halves,
            codes: self.codes,
            scale: self.scale,
            bias_sum32: self.bias_sum32,
            bias_sum16: self.bias_sum16,
            start32: self.start32,
            start16: self.start16,
        }
    }
}

/// Raw targets for one quantized row, so several threads can fill rows.
#[derive(Clone, Copy)]
pub(crate) struct RowTarget {
    /// Rows that lie together: a row's blocks are this many blocks apart.
    pub(crate) tile: usize,
    pub(crate) codes: *mut i8,
    pub(crate) scale: *mut f32,
    pub(crate) bias_sum32: *mut f32,
    pub(crate) bias_sum16: *mut f32,
    pub(crate) start32: *mut i32,
    pub(crate) start16: *mut i32,
}

impl QuantActsMut<'_> {
    /// Pointers to row 0.
    pub(crate) fn target(&mut self) -> RowTarget {
        RowTarget {
            tile: self.tile,
            codes: self.codes.as_mut_ptr(),
            scale: self.scale.as_mut_ptr(),
            bias_sum32: self.bias_sum32.as_mut_ptr(),
            bias_sum16: self.bias_sum16.as_mut_ptr(),
            start32: self.start32.as_mut_ptr(),
            start16: self.start16.as_mut_ptr(),
        }
    }
}

impl RowTarget {
    /// The same row from block `b` of 32 on.
    ///
    /// # Safety
    /// The row has that block.
    pub(crate) unsafe fn blocks(self, b: usize) -> RowTarget {
        let at = b * self.tile;
        // SAFETY: the caller's contract.
        unsafe { self.offset(at, 2 * at) }
    }

    /// The target of row r.
    ///
    /// # Safety
    /// r is a row of the storage that this came from.
    pub(crate) unsafe fn row(self, r: usize, k: usize) -> RowTarget {
        // The row's first block of 32, and of 16.
        let (above, within) = (r / self.tile * self.tile, r % self.tile);
        // SAFETY: the caller's contract.
        unsafe { self.offset(above * (k / 32) + within, above * (k / 16) + within) }
    }

    /// The target from so many blocks of 32, and of 16, on.
    ///
    /// # Safety
    /// The storage has those blocks.
    unsafe fn offset(self, at32: usize, at16: usize) -> RowTarget {
        // SAFETY: by the contract all offsets stay within the storage.
        unsafe {
            RowTarget {
                tile: self.tile,
                codes: self.codes.add(at32 * 32),
                scale: self.scale.add(at32),
                bias_sum32: self.bias_sum32.add(at32),
                bias_sum16: self.bias_sum16.add(at16),
                start32: self.start32.add(at32),
                start16: self.start16.add(at16),
            }
        }
    }
}
