//! Dot products of stored rows with one vector of int8 activations: decoding by one token is a
//! read of every weight once, so codes are expanded in registers and never written.
//!
//! Semantics and panics are those of [`crate::scalar::decode::dot_rows`]. Sums of products are exact
//! integers per group; only the order of the float additions differs between versions. A row's
//! result does not depend on which rows are computed beside it.
//!
//! A *tile* is one block of 256 elements, or four of 32. The matrix products of i8mm would waste
//! half of each instruction on a single row of activations, so `dotprod` serves there too.

use core::arch::aarch64::*;

use super::decode::{Scales, block_scales, chunks_per_block, of, offset, shifted, with_block_type};
use super::dotprod::sdot;
use crate::block::DType;
use crate::scalar::decode::{CHUNK, assert_dot};

const fn chunks_per_tile(t: u32) -> usize {
    if of(t).block_len() == CHUNK { 4 } else { chunks_per_block(t) }
}

/// `$body` for each chunk of 256 elements, with `$j` its constant number and `$lane` its lane among
/// four.
macro_rules! for_each_chunk {
    ($j:ident, $lane:ident, $body:block) => {
        for_each_chunk!($j, $lane, $body, 0 1 2 3 4 5 6 7)
    };
    ($j:ident, $lane:ident, $body:block, $($index:literal)*) => {
        $({
            const $j: usize = $index;
            const $lane: i32 = $index % 4;
            $body
        })*
    };
}

/// Defines `$public` and its per-type kernel for one instruction set. A macro, since a function's
/// instruction set can't be a generic parameter.
macro_rules! dot_rows {
    ($(#[$doc:meta])* $features:literal, $public:ident, $kernel:ident, $start:ident, $chunk_dot:ident) => {
        $(#[$doc])*
        #[target_feature(enable = $features)]
        pub unsafe fn $public(
            dtype: DType,
            rows: &[u8],
            xq: &[i8],
            xd: &[f32],
            xs: &[f32],
            out: &mut [f32],
        ) {
            assert_dot(dtype, rows, xq, xd, xs, out.len());
            let bytes = xq.len() / dtype.block_len() * dtype.block_bytes();
            let row = |r: usize| &rows[r * bytes..(r + 1) * bytes];
            let (fours, ones) = out.as_chunks_mut::<4>();
            for (i, out) in fours.iter_mut().enumerate() {
                let rows = [row(4 * i), row(4 * i + 1), row(4 * i + 2), row(4 * i + 3)];
                *out = with_block_type!(dtype, $kernel::<4>(rows, xq, xd, xs));
            }
            for (i, out) in ones.iter_mut().enumerate() {
                [*out] = with_block_type!(dtype, $kernel::<1>([row(4 * fours.len() + i)], xq, xd, xs));
            }
        }

        // A function of its own per type: in one body with all others the compiler keeps fewer of its
        // values in registers, and no report on it could be read.
        #[inline(never)]
        #[target_feature(enable = $features)]
        fn $kernel<const T: u32, const B: usize, const R: usize>(
            rows: [&[u8]; R],
            xq: &[i8],
            xd: &[f32],
            xs: &[f32],
        ) -> [f32; R] {
            let zero = vdupq_n_f32(0.0);
            let mut sums = [zero; R];
            let per_tile = chunks_per_tile(T) / chunks_per_block(T);
            let mut blocks: [&[[u8; B]]; R] = [&[]; R];
            for r in 0..R {
                blocks[r] = rows[r].as_chunks::<B>().0;
            }
            let (x_tiles, x_rest) = tiles_of_chunks::<T>(xq);
            for (t, x) in x_tiles.chunks_exact(chunks_per_tile(T)).enumerate() {
                let mut tiles = blocks;
                let mut factors = [[zero; 4]; R];
                for r in 0..R {
                    tiles[r] = &blocks[r][t * per_tile..][..per_tile];
                    let scales = tile_scales::<T, B>(tiles[r]);
                    factors[r] = with_activation_scales::<T>(scales.scale, &xd[t * chunks_per_tile(T)..]);
                    sums[r] = add_biases::<T>(sums[r], scales.bias, xs, t);
                }
                for_each_chunk!(J, LANE, {
                    if J < chunks_per_tile(T) {
                        let x = load_codes(&x[J]);
                        let start = $start::<T>(x);
                        for r in 0..R {
                            let codes = if chunks_per_block(T) == 1 {
                                shifted::<T, B>(&tiles[r][J], 0)
                            } else {
                                shifted::<T, B>(&tiles[r][0], J)
                            };
                            let dots = vcvtq_f32_s32($chunk_dot::<T>(start, codes, x));
                            sums[r] = if of(T).group_len() == 32 {
                                vfmaq_laneq_f32::<LANE>(sums[r], dots, factors[r][J / 4])
                            } else {
                                vfmaq_f32(sums[r], dots, twice(factors[r][J / 2], J % 2))
                            };
                        }
                    }
                });
            }
            // What is left of a row of 32-element blocks.
            let done = x_tiles.len();
            for (i, x) in x_rest.iter().enumerate() {
                if chunks_per_block(T) != 1 {
                    break;
                }
                let (c, x) = (done + i, load_codes(x));
                let start = $start::<T>(x);
                for r in 0..R {
                    let Scales { scale, bias } = block_scales::<T, B>(&blocks[r][c]);
                    let dots = $chunk_dot::<T>(start, shifted::<T, B>(&blocks[r][c], 0), x);
                    sums[r] = vfmaq_f32(sums[r], vcvtq_f32_s32(dots), vmulq_n_f32(scale[0], xd[c]));
                    if of(T).has_bias() {
                        sums[r] = vfmaq_f32(sums[r], bias[0], vsetq_lane_f32::<0>(xs[c], zero));
                    }
                }
            }
            let mut out = [0.0; R];
            for r in 0..R {
                out[r] = vaddvq_f32(sums[r]);
            }
            out
        }
    };
}

dot_rows! {
    /// [`crate::scalar::decode::dot_rows`] with NEON.
    ///
    /// # Panics
    /// As the scalar version.
    ///
    /// # Safety
    /// The CPU has NEON.
    "neon", dot_rows_neon, dot_kernel_neon, start_neon, chunk_dot_neon
}

dot_rows! {
    /// [`crate::scalar::decode::dot_rows`] with dot products.
    ///
    /// # Panics
    /// As the scalar version.
    ///
    /// # Safety
    /// The CPU has NEON and dotprod.
    "neon,dotprod", dot_rows_dotprod, dot_kernel_dotprod, start_dotprod, chunk_dot_dotprod
}

/// −offset · Σ x, in the lanes that [`chunk_dot_neon`] adds to; of each half in groups of 16.
#[target_feature(enable = "neon")]
#[inline]
fn start_neon<const T: u32>(x: [int8x16_t; 2]) -> [int32x4_t; 2] {
    let zero = vdupq_n_s32(0);
    if offset(T) == 0 {
        return [zero; 2];
    }
    let minus = -(offset(T) as i16);
    if of(T).group_len() == 32 {
        let sum = vpadalq_s8(vpaddlq_s8(x[0]), x[1]);
        return [vpaddlq_s16(vmulq_n_s16(sum, minus)), zero];
    }
    x.map(|half| vpaddlq_s16(vmulq_n_s16(vpaddlq_s8(half), minus)))
}

/// Σ code · x of a chunk in four lanes; in groups of 16, lanes 0–1 are the first group.
#[target_feature(enable = "neon")]
#[inline]
fn chunk_dot_neon<const T: u32>(
    start: [int32x4_t; 2],
    codes: [int8x16_t; 2],
    x: [int8x16_t; 2],
) -> int32x4_t {
    // Two products of full-range codes stay within 16 bits, and so do four of codes below 64.
    let narrow = !matches!(of(T), DType::Q8_0 | DType::IQ4_NL | DType::IQ4_XS);
    let first = vmull_s8(vget_low_s8(codes[0]), vget_low_s8(x[0]));
    let first = vmlal_high_s8(first, codes[0], x[0]);
    if narrow && of(T).group_len() == 32 {
        let all = vmlal_s8(first, vget_low_s8(codes[1]), vget_low_s8(x[1]));
        return vpadalq_s16(start[0], vmlal_high_s8(all, codes[1], x[1]));
    }
    let second = vmull_s8(vget_low_s8(codes[1]), vget_low_s8(x[1]));
    let second = vmlal_high_s8(second, codes[1], x[1]);
    if of(T).group_len() == 32 {
        return vpadalq_s16(vpadalq_s16(start[0], first), second);
    }
    vpaddq_s32(vpadalq_s16(start[0], first), vpadalq_s16(start[1], second))
}

/// As [`start_neon`].
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn start_dotprod<const T: u32>(x: [int8x16_t; 2]) -> [int32x4_t; 2] {
    let (zero, minus) = (vdupq_n_s32(0), vdupq_n_s8(-offset(T)));
    if offset(T) == 0 {
        return [zero; 2];
    }
    // SAFETY: dotprod is enabled here.
    unsafe {
        let first = sdot(zero, x[0], minus);
        if of(T).group_len() == 32 {
            [sdot(first, x[1], minus), zero]
        } else {
            [first, sdot(zero, x[1], minus)]
        }
    }
}

/// As [`chunk_dot_neon`].
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn chunk_dot_dotprod<const T: u32>(
    start: [int32x4_t; 2],
    codes: [int8x16_t; 2],
    x: [int8x16_t; 2],
) -> int32x4_t {
    // SAFETY: dotprod is enabled here.
    unsafe {
        let first = sdot(start[0], codes[0], x[0]);
        if of(T).group_len() == 32 {
            sdot(first, codes[1], x[1])
        } else {
            vpaddq_s32(first, sdot(start[1], codes[1], x[1]))
        }
    }
}

/// The activations' chunks: those of whole tiles, and the rest.
fn tiles_of_chunks<const T: u32>(xq: &[i8]) -> (&[[i8; CHUNK]], &[[i8; CHUNK]]) {
    let chunks = xq.as_chunks::<CHUNK>().0;
    chunks.split_at(chunks.len() / chunks_per_tile(T) * chunks_per_tile(T))
}

/// Scales and biases of a tile's 4, 8 or 16 groups.
#[target_feature(enable = "neon")]
#[inline]
fn tile_scales<const T: u32, const B: usize>(tile: &[[u8; B]]) -> Scales {
    if chunks_per_block(T) != 1 {
        return block_scales::<T, B>(&tile[0]);
    }
    let [a, b, c, d] = tile.first_chunk().expect("four blocks of the tile");
    let zero = vdupq_n_f32(0.0);
    let mut scales = Scales { scale: [zero; 4], bias: [zero; 4] };
    let half = |bits| vcvt_f32_f16(vreinterpret_f16_u16(bits));
    // Joined in general registers: lane by lane into a vector each would cost a vector operation.
    if of(T).has_bias() {
        let word = |block: &[u8; B]| u32::from_le_bytes(*block.first_chunk().expect("a whole block")) as u64;
        let pairs = vcombine_u64(vcreate_u64(word(a) | word(b) << 32), vcreate_u64(word(c) | word(d) << 32));
        let pairs = vreinterpretq_u32_u64(pairs);
        scales.scale[0] = half(vmovn_u32(pairs));
        scales.bias[0] = half(vshrn_n_u32::<16>(pairs));
    } else {
        let word = |block: &[u8; B]| u16::from_le_bytes(*block.first_chunk().expect("a whole block")) as u64;
        scales.scale[0] = half(vcreate_u16(word(a) | word(b) << 16 | word(c) << 32 | word(d) << 48));
    }
    scales
}

/// Each group's scale times the scale of its activations (`xd`: one per chunk from the tile on).
#[target_feature(enable = "neon")]
#[inline]
fn with_activation_scales<const T: u32>(scale: [float32x4_t; 4], xd: &[f32]) -> [float32x4_t; 4] {
    let mut factors = scale;
    if of(T).group_len() == 32 {
        for i in 0..chunks_per_tile(T) / 4 {
            factors[i] = vmulq_f32(scale[i], load_floats(&xd[4 * i..]));
        }
        return factors;
    }
    for i in 0..4 {
        factors[i] = vmulq_f32(scale[i], twice(load_floats(&xd[i / 2 * 4..]), i % 2));
    }
    factors
}

/// Lanes 0, 0, 1, 1 of `v`, or 2, 2, 3, 3.
#[target_feature(enable = "neon")]
#[inline]
fn twice(v: float32x4_t, half: usize) -> float32x4_t {
    if half == 0 { vzip1q_f32(v, v) } else { vzip2q_f32(v, v) }
}

/// Adds `bias · xs` of tile `t`'s groups to `sum`.
#[target_feature(enable = "neon")]
#[inline]
fn add_biases<const T: u32>(
    mut sum: float32x4_t,
    bias: [float32x4_t; 4],
    xs: &[f32],
    t: usize,
) -> float32x4_t {
    if !of(T).has_bias() {
        return sum;
    }
    let groups = chunks_per_tile(T) * (CHUNK / of(T).group_len());
    for i in 0..groups / 4 {
        sum = vfmaq_f32(sum, bias[i], load_floats(&xs[t * groups + 4 * i..]));
    }
    sum
}

#[target_feature(enable = "neon")]
#[inline]
fn load_codes(codes: &[i8; CHUNK]) -> [int8x16_t; 2] {
    // SAFETY: the reference covers the 32 bytes read.
    unsafe { [vld1q_s8(codes.as_ptr()), vld1q_s8(codes.as_ptr().add(16))] }
}

#[target_feature(enable = "neon")]
#[inline]
fn load_floats(floats: &[f32]) -> float32x4_t {
    let floats: &[f32; 4] = floats.first_chunk().expect("four of the tile");
    // SAFETY: the reference covers the four floats read.
    unsafe { vld1q_f32(floats.as_ptr()) }
}
