//! The loops around an instruction set's decoding of stored blocks: which blocks a range of a row touches, and
//! where their output goes. Semantics and panics are those of [`crate::scalar::decode`].
//!
//! Per-type functions take the type as a constant (`T`, ggml's id), so each type becomes its own machine code and
//! the `match` in it disappears. A *chunk* is 32 elements; every type's chunks can be decoded on their own.

use crate::block::DType;
use crate::scalar::decode::CHUNK;

/// How an instruction set decodes a chunk.
///
/// All methods are `unsafe` for the reason given in [`super::simd`].
pub(crate) trait Decode {
    /// Scales and biases of one block's groups, as [`Decode::dequantize_chunk`] takes them.
    type Scales;

    /// All scales (and biases) of one block.
    unsafe fn scales<const T: u32, const B: usize>(block: &[u8; B]) -> Self::Scales;
    /// The same as values, with biases after the scales; zeros for types without biases.
    unsafe fn values(scales: &Self::Scales) -> ([f32; 16], [f32; 16]);
    /// Exact codes of chunk `j` of a block.
    unsafe fn codes<const T: u32, const B: usize>(block: &[u8; B], j: usize, out: &mut [i8; CHUNK]);
    /// Chunk `j` of a block as floats.
    unsafe fn dequantize_chunk<const T: u32, const B: usize>(
        block: &[u8; B],
        j: usize,
        scales: &Self::Scales,
        out: &mut [f32; CHUNK],
    );
    /// Elements from `start` of a row of F16 or BF16.
    unsafe fn dequantize_halves(dtype: DType, row: &[u8], start: usize, out: &mut [f32]);
}

/// `$function::<T, B>(arguments)` with the constants of one block type.
macro_rules! call {
    ($name:ident, $function:ident ($($argument:expr),*)) => {
        $function::<{ DType::$name.ggml_id() }, { DType::$name.block_bytes() }>($($argument),*)
    };
}
pub(crate) use call;

/// `$function::<T, B>(arguments)` with the constants of block type `$dtype`.
macro_rules! with_block_type {
    ($dtype:expr, $function:ident ($($argument:expr),*)) => {
        match $dtype {
            DType::Q4_0 => $crate::generic::decode::call!(Q4_0, $function ($($argument),*)),
            DType::Q4_1 => $crate::generic::decode::call!(Q4_1, $function ($($argument),*)),
            DType::Q5_0 => $crate::generic::decode::call!(Q5_0, $function ($($argument),*)),
            DType::Q5_1 => $crate::generic::decode::call!(Q5_1, $function ($($argument),*)),
            DType::Q8_0 => $crate::generic::decode::call!(Q8_0, $function ($($argument),*)),
            DType::Q2_K => $crate::generic::decode::call!(Q2_K, $function ($($argument),*)),
            DType::Q3_K => $crate::generic::decode::call!(Q3_K, $function ($($argument),*)),
            DType::Q4_K => $crate::generic::decode::call!(Q4_K, $function ($($argument),*)),
            DType::Q5_K => $crate::generic::decode::call!(Q5_K, $function ($($argument),*)),
            DType::Q6_K => $crate::generic::decode::call!(Q6_K, $function ($($argument),*)),
            DType::IQ4_NL => $crate::generic::decode::call!(IQ4_NL, $function ($($argument),*)),
            DType::IQ4_XS => $crate::generic::decode::call!(IQ4_XS, $function ($($argument),*)),
            DType::F32 | DType::F16 | DType::BF16 => unreachable!("asserted to be a block type"),
        }
    };
}
pub(crate) use with_block_type;

/// `$body` for each chunk of 256 elements, with `$j` a constant in each: shifts become immediate and registers
/// are assigned statically, which the compiler doesn't achieve by unrolling a loop this long.
macro_rules! for_each_chunk {
    ($j:ident, $body:block) => {
        $crate::generic::decode::for_each_chunk!($j, $body, 0 1 2 3 4 5 6 7)
    };
    ($j:ident, $body:block, $($index:literal)*) => {
        $({
            const $j: usize = $index;
            $body
        })*
    };
}
pub(crate) use for_each_chunk;

/// `$module::$function::<$isa, T, B>(arguments)` with the constants of block type `$dtype`, each type in a function
/// with the instruction set's features. A macro, since a function's instruction set can't be a generic parameter.
macro_rules! by_type {
    (
        $(#[$attribute:meta])* $isa:ty, $features:literal,
        $dtype:expr, $module:ident::$function:ident ($($argument:ident: $type:ty),*)
    ) => {{
        $(#[$attribute])*
        #[target_feature(enable = $features)]
        fn of_type<const T: u32, const B: usize>($($argument: $type),*) {
            // SAFETY: the features are enabled here.
            unsafe { $crate::generic::$module::$function::<$isa, T, B>($($argument),*) }
        }
        $crate::generic::decode::with_block_type!($dtype, of_type($($argument),*))
    }};
}
pub(crate) use by_type;

/// The decoding functions of one instruction set, from its [`Decode`].
macro_rules! decoders {
    ($isa:ty, $features:literal) => {
        /// [`crate::scalar::decode::unpack`] on this instruction set.
        ///
        /// # Safety
        /// The CPU has it.
        #[target_feature(enable = $features)]
        pub(crate) unsafe fn unpack(
            dtype: DType,
            row: &[u8],
            start: usize,
            codes: &mut [i8],
            scale: &mut [f32],
            bias: &mut [f32],
        ) {
            $crate::scalar::decode::assert_unpack(dtype, row, start, codes, scale, bias);
            $crate::generic::decode::by_type!(
                $isa, $features,
                dtype, decode::unpack(row: &[u8], start: usize, codes: &mut [i8], scale: &mut [f32], bias: &mut [f32])
            )
        }

        /// [`crate::scalar::decode::dequantize`] on this instruction set.
        ///
        /// # Safety
        /// The CPU has it.
        #[target_feature(enable = $features)]
        pub(crate) unsafe fn dequantize(dtype: DType, row: &[u8], start: usize, out: &mut [f32]) {
            $crate::scalar::decode::assert_range(dtype, row, start, out.len());
            match dtype {
                DType::F32 => $crate::scalar::decode::dequantize(dtype, row, start, out),
                // SAFETY: the features are enabled here.
                DType::F16 | DType::BF16 => unsafe {
                    <$isa as $crate::generic::decode::Decode>::dequantize_halves(dtype, row, start, out)
                },
                _ => $crate::generic::decode::by_type!(
                    $isa, $features,
                    dtype, decode::dequantize(row: &[u8], start: usize, out: &mut [f32])
                ),
            }
        }

        /// Decodes 32 columns from `start` of successive rows of `row_bytes` each, into rows of 32.
        ///
        /// # Panics
        /// If `bytes` has fewer rows than `out`, or a row is too short.
        ///
        /// # Safety
        /// The CPU has the instruction set.
        #[target_feature(enable = $features)]
        pub(crate) unsafe fn dequantize_strip(
            dtype: DType,
            bytes: &[u8],
            row_bytes: usize,
            start: usize,
            out: &mut [[f32; CHUNK]],
        ) {
            if dtype.is_float() {
                for (row, out) in bytes.chunks_exact(row_bytes).zip(out) {
                    // SAFETY: the features are enabled here.
                    unsafe { dequantize(dtype, row, start, out) };
                }
                return;
            }
            $crate::generic::decode::by_type!(
                $isa, $features,
                dtype, decode::strip(bytes: &[u8], row_bytes: usize, start: usize, out: &mut [[f32; CHUNK]])
            )
        }
    };
}
pub(crate) use decoders;

/// `$body` for each of the chunks of a block of type `$t` from chunk `$first` on: of a whole block, with `$j` a
/// constant.
macro_rules! chunks_of_block {
    ($t:ident, $first:ident, $chunks:ident, |$j:ident, $out:ident| $body:expr) => {
        if $chunks.len() == chunks_per_block($t) {
            for_each_chunk!(J, {
                if J < chunks_per_block($t) {
                    let ($j, $out) = (J, &mut $chunks[J]);
                    $body;
                }
            });
        } else {
            for ($j, $out) in ($first..).zip($chunks.iter_mut()) {
                $body;
            }
        }
    };
}

/// The type with ggml id `t`; evaluated at compile time.
pub(crate) const fn of(t: u32) -> DType {
    DType::from_ggml(t).expect("a type's own id")
}

/// Chunks in a block of the type with id `t`.
pub(crate) const fn chunks_per_block(t: u32) -> usize {
    of(t).block_len() / CHUNK
}

/// The block that holds chunk `at` of the row, the chunk's index in it, and how many of the `left` chunks it
/// holds from there on.
#[inline(always)]
fn block_part<const T: u32, const B: usize>(
    blocks: &[[u8; B]],
    at: usize,
    left: usize,
) -> (&[u8; B], usize, usize) {
    let per_block = chunks_per_block(T);
    let first = at % per_block;
    (&blocks[at / per_block], first, left.min(per_block - first))
}

/// Codes, scales and biases of whole chunks of a row.
///
/// # Safety
/// D's features are present.
#[inline(always)]
pub(crate) unsafe fn unpack<D: Decode, const T: u32, const B: usize>(
    row: &[u8],
    start: usize,
    codes: &mut [i8],
    scale: &mut [f32],
    bias: &mut [f32],
) {
    let groups = CHUNK / of(T).group_len();
    let blocks = row.as_chunks::<B>().0;
    let (mut at, mut left) = (start / CHUNK, codes.as_chunks_mut::<CHUNK>().0);
    while !left.is_empty() {
        let (block, first, n) = block_part::<T, B>(blocks, at, left.len());
        let done = (at - start / CHUNK) * groups;
        // SAFETY: the caller's contract.
        let (s, b) = unsafe { D::values(&D::scales::<T, B>(block)) };
        scale[done..][..n * groups].copy_from_slice(&s[first * groups..][..n * groups]);
        if of(T).has_bias() {
            bias[done..][..n * groups].copy_from_slice(&b[first * groups..][..n * groups]);
        }
        let (now, later) = left.split_at_mut(n);
        // SAFETY: the caller's contract.
        chunks_of_block!(T, first, now, |j, out| unsafe { D::codes::<T, B>(block, j, out) });
        (at, left) = (at + n, later);
    }
}

/// Whole chunks of a row as floats.
///
/// # Safety
/// D's features are present.
#[inline(always)]
pub(crate) unsafe fn dequantize<D: Decode, const T: u32, const B: usize>(
    row: &[u8],
    start: usize,
    out: &mut [f32],
) {
    let blocks = row.as_chunks::<B>().0;
    let (mut at, mut left) = (start / CHUNK, out.as_chunks_mut::<CHUNK>().0);
    while !left.is_empty() {
        let (block, first, n) = block_part::<T, B>(blocks, at, left.len());
        // SAFETY: the caller's contract.
        let scales = unsafe { D::scales::<T, B>(block) };
        let (now, later) = left.split_at_mut(n);
        // SAFETY: the caller's contract.
        chunks_of_block!(T, first, now, |j, out| unsafe {
            D::dequantize_chunk::<T, B>(block, j, &scales, out)
        });
        (at, left) = (at + n, later);
    }
}

/// One chunk of each of successive rows as floats.
///
/// # Safety
/// D's features are present.
#[inline(always)]
pub(crate) unsafe fn strip<D: Decode, const T: u32, const B: usize>(
    bytes: &[u8],
    row_bytes: usize,
    start: usize,
    out: &mut [[f32; CHUNK]],
) {
    let chunk = start / CHUNK;
    let (at, j) = (chunk / chunks_per_block(T) * B, chunk % chunks_per_block(T));
    for (row, out) in bytes.chunks_exact(row_bytes).zip(out) {
        let block = row[at..].first_chunk::<B>().expect("the strip lies within the row");
        // SAFETY: the caller's contract.
        unsafe { D::dequantize_chunk::<T, B>(block, j, &D::scales::<T, B>(block), out) };
    }
}

/// The eight scales and eight mins of Q4_K and Q5_K, a byte each.
#[inline]
pub(crate) fn six_bits_q4_k<const B: usize>(block: &[u8; B]) -> (u64, u64) {
    let word = |at: usize| u32::from_le_bytes(*block[at..].first_chunk().expect("inside the block"));
    let (scales, mins, lows) = (word(4), word(8), word(12));
    let upper = |word: u32| (word >> 2) & 0x3030_3030;
    let join = |low: u32, high: u32| (low & 0x3f3f_3f3f) as u64 | (high as u64) << 32;
    (join(scales, lows & 0x0f0f_0f0f | upper(scales)), join(mins, lows >> 4 & 0x0f0f_0f0f | upper(mins)))
}
