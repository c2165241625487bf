//! Activations quantized to int8 in blocks of 32, with the sums the integer tiles start from.

/// Rows of quantized activations: x[i] ≈ scale[i/32] · codes[i].
#[derive(Clone, Copy, Debug)]
pub struct QuantActs<'a> {
    /// `[m, k]`, −127..=127.
    pub codes: &'a [i8],
    /// `[m, k/32]`.
    pub scale: &'a [f32],
    /// scale·Σcodes per 32, `[m, k/32]`.
    pub bias_sum32: &'a [f32],
    /// scale·Σcodes per 16, `[m, k/16]`.
    pub bias_sum16: &'a [f32],
    /// −128·Σcodes per 32, `[m, k/32]`.
    pub start32: &'a [i32],
    /// −128·Σcodes per 16, `[m, k/16]`.
    pub start16: &'a [i32],
}

/// The storage behind [`QuantActs`], cut from a word buffer.
pub struct QuantActsMut<'a> {
    pub(crate) k: usize,
    pub(crate) codes: &'a mut [i8],
    pub(crate) scale: &'a mut [f32],
    pub(crate) bias_sum32: &'a mut [f32],
    pub(crate) bias_sum16: &'a mut [f32],
    pub(crate) start32: &'a mut [i32],
    pub(crate) start16: &'a mut [i32],
}

/// f32 words that m × k quantized activations take.
pub const fn acts_words(m: usize, k: usize) -> usize {
    m * (k / 4 + 3 * (k / 32) + 2 * (k / 16))
}

impl<'a> QuantActsMut<'a> {
    /// Cuts the storage for m × k from `words` (at least [`acts_words`]; k a multiple of 32).
    ///
    /// # Panics
    /// If the buffer is short or k no multiple of 32.
    pub fn new(words: &'a mut [f32], m: usize, k: usize) -> Self {
        assert!(k.is_multiple_of(32) && words.len() >= acts_words(m, k));
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
                k,
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
            codes: self.codes,
            scale: self.scale,
            bias_sum32: self.bias_sum32,
            bias_sum16: self.bias_sum16,
            start32: self.start32,
            start16: self.start16,
        }
    }
}

/// Raw row targets of one quantized row, so that rows can be filled by several threads.
#[derive(Clone, Copy)]
pub(crate) struct RowTarget {
    pub(crate) codes: *mut i8,
    pub(crate) scale: *mut f32,
    pub(crate) bias_sum32: *mut f32,
    pub(crate) bias_sum16: *mut f32,
    pub(crate) start32: *mut i32,
    pub(crate) start16: *mut i32,
}

impl QuantActsMut<'_> {
    /// Pointers to row 0; row r is at multiples of k, k/32 and k/16.
    pub(crate) fn target(&mut self) -> RowTarget {
        RowTarget {
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
    /// The target of row r.
    ///
    /// # Safety
    /// r is a row of the storage that this came from.
    pub(crate) unsafe fn row(self, r: usize, k: usize) -> RowTarget {
        // SAFETY: by the contract all offsets stay within the storage.
        unsafe {
            RowTarget {
                codes: self.codes.add(r * k),
                scale: self.scale.add(r * (k / 32)),
                bias_sum32: self.bias_sum32.add(r * (k / 32)),
                bias_sum16: self.bias_sum16.add(r * (k / 16)),
                start32: self.start32.add(r * (k / 32)),
                start16: self.start16.add(r * (k / 16)),
            }
        }
    }
}
