//! Checked views of stored matrices: the only way bytes become a matrix.

use crate::block::DType;

/// A frozen matrix of `rows` × `cols` elements, row-major, as a GGUF file stores it.
///
/// A GGUF tensor with `ne = [in, out]` is `rows = out`, `cols = in`.
#[derive(Clone, Copy, Debug)]
pub struct QMatrix<'a> {
    dtype: DType,
    rows: usize,
    cols: usize,
    bytes: &'a [u8],
}

/// Why bytes can't be a matrix of the given shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ViewError {
    /// `cols` isn't a multiple of the type's block length, or a size overflows.
    Shape,
    /// The byte count differs from what the shape needs.
    Length {
        /// Bytes the shape needs.
        needed: usize,
        /// Bytes given.
        given: usize,
    },
}

impl<'a> QMatrix<'a> {
    /// A view of `bytes` as a matrix.
    ///
    /// # Errors
    /// [`ViewError::Shape`] for an impossible shape, [`ViewError::Length`] for a wrong byte count.
    pub fn new(dtype: DType, rows: usize, cols: usize, bytes: &'a [u8]) -> Result<Self, ViewError> {
        let row = dtype.row_bytes(cols).ok_or(ViewError::Shape)?;
        let needed = row.checked_mul(rows).ok_or(ViewError::Shape)?;
        if needed != bytes.len() {
            return Err(ViewError::Length { needed, given: bytes.len() });
        }
        Ok(QMatrix { dtype, rows, cols, bytes })
    }

    /// A view of f32 values, row-major, as a matrix of type F32.
    ///
    /// # Errors
    /// As [`QMatrix::new`].
    pub fn of_f32(rows: usize, cols: usize, values: &'a [f32]) -> Result<Self, ViewError> {
        // Stored floats are little-endian, and these bytes must be such.
        const { assert!(cfg!(target_endian = "little")) };
        // SAFETY: f32 has no padding and bytes no alignment; the length is that of the same memory.
        let bytes = unsafe { core::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
        QMatrix::new(DType::F32, rows, cols, bytes)
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Rows (output features).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns (input features).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.cols / self.dtype.block_len() * self.dtype.block_bytes()
    }

    /// All stored bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Rows `from..to` as a matrix.
    ///
    /// # Panics
    /// If the range is out of order or out of range.
    #[must_use]
    pub fn rows_range(&self, from: usize, to: usize) -> QMatrix<'a> {
        let n = self.row_bytes();
        QMatrix { rows: to - from, bytes: &self.bytes[from * n..to * n], ..*self }
    }

    /// The stored bytes of row `r`.
    ///
    /// # Panics
    /// If `r` is out of range.
    pub fn row(&self, r: usize) -> &'a [u8] {
        let n = self.row_bytes();
        &self.bytes[r * n..(r + 1) * n]
    }
}
