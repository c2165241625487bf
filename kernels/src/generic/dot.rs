//! Dot products of stored rows with one vector of int8 activations: decoding one token reads every weight once,
//! so codes are expanded in registers and never written.
//!
//! Semantics and panics are those of [`crate::scalar::decode::dot_rows`]. Sums of products are exact integers per
//! group; only the order of the float additions differs between versions. A row's result doesn't depend on
//! which other rows are computed with it.
//!
//! A *tile* is the unit for which an instruction set reads scales at once: one block of 256 elements, or
//! several of 32.

use super::decode::{chunks_per_block, for_each_chunk, of};
use crate::scalar::decode::CHUNK;

/// How an instruction set multiplies the chunks of a tile.
///
/// All methods are `unsafe` for the reason given in [`super::simd`].
pub(crate) trait RowDot {
    /// A row's sums.
    type Sums: Copy;
    /// The factors of a tile's integer sums.
    type Factors: Copy;
    /// Activations of one step.
    type X: Copy;
    /// The initial integer sums of a step.
    type Start: Copy;
    /// Chunks per step.
    const STEP: usize;

    /// Chunks in a tile of type `T`, a multiple of [`RowDot::STEP`] and of the type's own block.
    fn chunks_per_tile(t: u32) -> usize;
    /// Zero sums.
    unsafe fn zero() -> Self::Sums;
    /// Placeholder factors, about to be overwritten.
    unsafe fn no_factors() -> Self::Factors;
    /// Begins tile `t` of a row: prefetches `ahead` bytes further, adds the tile's biases times `xs` to the
    /// sums, and returns its scales times `xd`, the activations' scales from this tile on.
    unsafe fn begin<const T: u32, const B: usize>(
        tile: &[[u8; B]],
        ahead: usize,
        sums: &mut Self::Sums,
        xd: &[f32],
        xs: &[f32],
        t: usize,
    ) -> Self::Factors;
    /// Activations of the step that begins with chunk `j` of a tile's.
    unsafe fn load(x: &[[i8; CHUNK]], j: usize) -> Self::X;
    /// Minus the codes' offset times the activations: shared by all rows.
    unsafe fn start<const T: u32>(x: Self::X) -> Self::Start;
    /// Adds the products of the step that begins with chunk `J` of a tile.
    unsafe fn step<const T: u32, const B: usize, const J: usize>(
        sums: Self::Sums,
        tile: &[[u8; B]],
        start: Self::Start,
        x: Self::X,
        factors: Self::Factors,
    ) -> Self::Sums;
    /// Adds the products of a one-chunk block after the last whole tile; its activations have scale `xd` and
    /// sum `xs`.
    unsafe fn rest<const T: u32, const B: usize>(
        sums: Self::Sums,
        block: &[u8; B],
        x: &[i8; CHUNK],
        xd: f32,
        xs: f32,
    ) -> Self::Sums;
    /// The sum of a row's sums.
    unsafe fn total(sums: Self::Sums) -> f32;
}

/// Dot products of all rows, by fours.
///
/// # Safety
/// D's features are present.
#[inline(always)]
pub(crate) unsafe fn all_rows<D: RowDot, const T: u32, const B: usize>(
    rows: &[u8],
    xq: &[i8],
    xd: &[f32],
    xs: &[f32],
    out: &mut [f32],
) {
    let bytes = xq.len() / of(T).block_len() * B;
    let ahead = prefetch_distance(4 * bytes);
    let row = |r: usize| &rows[r * bytes..(r + 1) * bytes];
    let (fours, ones) = out.as_chunks_mut::<4>();
    for (i, out) in fours.iter_mut().enumerate() {
        let group = [row(4 * i), row(4 * i + 1), row(4 * i + 2), row(4 * i + 3)];
        // SAFETY: the caller's contract.
        *out = unsafe { few_rows::<D, T, B, 4>(group, xq, xd, xs, ahead) };
    }
    for (i, out) in ones.iter_mut().enumerate() {
        // SAFETY: the caller's contract.
        [*out] = unsafe { few_rows::<D, T, B, 1>([row(4 * fours.len() + i)], xq, xd, xs, ahead) };
    }
}

/// Dot products of R rows.
///
/// # Safety
/// D's features are present.
#[inline(always)]
unsafe fn few_rows<D: RowDot, const T: u32, const B: usize, const R: usize>(
    rows: [&[u8]; R],
    xq: &[i8],
    xd: &[f32],
    xs: &[f32],
    ahead: usize,
) -> [f32; R] {
    // SAFETY: the caller's contract.
    unsafe {
        let per_tile = D::chunks_per_tile(T);
        let mut sums = [D::zero(); R];
        let mut blocks: [&[[u8; B]]; R] = [&[]; R];
        for r in 0..R {
            blocks[r] = rows[r].as_chunks::<B>().0;
        }
        let chunks = xq.as_chunks::<CHUNK>().0;
        let (x_tiles, x_rest) = chunks.split_at(chunks.len() / per_tile * per_tile);
        for (t, x) in x_tiles.chunks_exact(per_tile).enumerate() {
            let mut tiles = blocks;
            let xd = &xd[t * per_tile..];
            let mut factors = [D::no_factors(); R];
            for r in 0..R {
                let blocks_per_tile = per_tile / chunks_per_block(T);
                tiles[r] = &blocks[r][t * blocks_per_tile..][..blocks_per_tile];
                factors[r] = D::begin::<T, B>(tiles[r], ahead, &mut sums[r], xd, xs, t);
            }
            for_each_chunk!(J, {
                if J < per_tile && J.is_multiple_of(D::STEP) {
                    let x = D::load(x, J);
                    let start = D::start::<T>(x);
                    for r in 0..R {
                        sums[r] = D::step::<T, B, J>(sums[r], tiles[r], start, x, factors[r]);
                    }
                }
            });
        }
        // The rest of a row of 32-element blocks.
        for (i, x) in x_rest.iter().enumerate() {
            if chunks_per_block(T) != 1 {
                break;
            }
            let c = x_tiles.len() + i;
            let xs = if of(T).has_bias() { xs[c] } else { 0.0 };
            for r in 0..R {
                sums[r] = D::rest::<T, B>(sums[r], &blocks[r][c], x, xd[c], xs);
            }
        }
        let mut out = [0.0; R];
        for r in 0..R {
            out[r] = D::total(sums[r]);
        }
        out
    }
}

/// Defines `$public` over the [`RowDot`] of one instruction set.
macro_rules! dot_rows {
    ($isa:ty, $features:literal, $public:ident) => {
        /// [`crate::scalar::decode::dot_rows`] on this instruction set.
        ///
        /// # Safety
        /// The CPU has it.
        #[target_feature(enable = $features)]
        pub(crate) unsafe fn $public(
            dtype: DType,
            rows: &[u8],
            xq: &[i8],
            xd: &[f32],
            xs: &[f32],
            out: &mut [f32],
        ) {
            $crate::scalar::decode::assert_dot(dtype, rows, xq, xd, xs, out.len());
            // A separate function per type: in a shared body the compiler keeps fewer values in registers, and
            // profiles would be unreadable. It takes all rows: a small model's are so short that choosing the
            // function for every four of them would show.
            $crate::generic::decode::by_type!(
                #[inline(never)] $isa, $features,
                dtype, dot::all_rows(rows: &[u8], xq: &[i8], xd: &[f32], xs: &[f32], out: &mut [f32])
            );
        }
    };
}
pub(crate) use dot_rows;

/// How far ahead of its use a weight is prefetched, in bytes: whole groups of rows, so every line is fetched
/// once, and far enough to cover memory latency.
fn prefetch_distance(group_bytes: usize) -> usize {
    const LEAST_BYTES: usize = 4096;
    group_bytes * LEAST_BYTES.div_ceil(group_bytes.max(1))
}
