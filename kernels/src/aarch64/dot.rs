//! [`crate::generic::dot`] with 128-bit registers: a tile is one block of 256 elements or four of 32, a step one
//! chunk. The matrix products of i8mm would waste half of each instruction on a single row of activations, so
//! `dotprod` serves there too.

use core::arch::aarch64::*;

use super::decode::{Scales, block_scales, offset, shifted};
use super::dotprod::sdot;
use crate::block::DType;
use crate::generic::decode::{chunks_per_block, of};
use crate::generic::dot::{RowDot, dot_rows};
use crate::scalar::decode::CHUNK;

const fn chunks_per_tile(t: u32) -> usize {
    if of(t).block_len() == CHUNK { 4 } else { chunks_per_block(t) }
}

/// Dot products with NEON; with its dot product instructions where `DOTPROD`.
pub(crate) struct Dot128<const DOTPROD: bool>;

dot_rows!(Dot128<false>, "neon", dot_rows_neon);
dot_rows!(Dot128<true>, "neon,dotprod", dot_rows_dotprod);

impl<const DOTPROD: bool> RowDot for Dot128<DOTPROD> {
    type Sums = float32x4_t;
    type Factors = [float32x4_t; 4];
    type X = [int8x16_t; 2];
    type Start = [int32x4_t; 2];
    const STEP: usize = 1;

    #[inline(always)]
    fn chunks_per_tile(t: u32) -> usize {
        chunks_per_tile(t)
    }

    #[inline(always)]
    unsafe fn zero() -> float32x4_t {
        // SAFETY: the trait's contract, as in all methods here.
        unsafe { vdupq_n_f32(0.0) }
    }

    #[inline(always)]
    unsafe fn no_factors() -> [float32x4_t; 4] {
        // SAFETY: as above.
        unsafe { [vdupq_n_f32(0.0); 4] }
    }

    /// These cores fetch ahead by themselves.
    #[inline(always)]
    unsafe fn begin<const T: u32, const B: usize>(
        tile: &[[u8; B]],
        _ahead: usize,
        sums: &mut float32x4_t,
        xd: &[f32],
        xs: &[f32],
        t: usize,
    ) -> [float32x4_t; 4] {
        // SAFETY: as above.
        unsafe {
            let scales = tile_scales::<T, B>(tile);
            *sums = add_biases::<T>(*sums, scales.bias, xs, t);
            with_activation_scales::<T>(scales.scale, xd)
        }
    }

    #[inline(always)]
    unsafe fn load(x: &[[i8; CHUNK]], j: usize) -> [int8x16_t; 2] {
        // SAFETY: as above.
        unsafe { load_codes(&x[j]) }
    }

    #[inline(always)]
    unsafe fn start<const T: u32>(x: [int8x16_t; 2]) -> [int32x4_t; 2] {
        // SAFETY: as above.
        unsafe { if DOTPROD { start_dotprod::<T>(x) } else { start_neon::<T>(x) } }
    }

    #[inline(always)]
    unsafe fn step<const T: u32, const B: usize, const J: usize>(
        sums: float32x4_t,
        tile: &[[u8; B]],
        start: [int32x4_t; 2],
        x: [int8x16_t; 2],
        factors: [float32x4_t; 4],
    ) -> float32x4_t {
        // SAFETY: as above.
        unsafe {
            let (block, j) = if chunks_per_block(T) == 1 { (&tile[J], 0) } else { (&tile[0], J) };
            let dots = vcvtq_f32_s32(chunk_dot::<T, DOTPROD>(start, shifted::<T, B>(block, j), x));
            if of(T).group_len() == 16 {
                return vfmaq_f32(sums, dots, twice(factors[J / 2], J % 2));
            }
            match J % 4 {
                0 => vfmaq_laneq_f32::<0>(sums, dots, factors[J / 4]),
                1 => vfmaq_laneq_f32::<1>(sums, dots, factors[J / 4]),
                2 => vfmaq_laneq_f32::<2>(sums, dots, factors[J / 4]),
                _ => vfmaq_laneq_f32::<3>(sums, dots, factors[J / 4]),
            }
        }
    }

    #[inline(always)]
    unsafe fn rest<const T: u32, const B: usize>(
        sums: float32x4_t,
        block: &[u8; B],
        x: &[i8; CHUNK],
        xd: f32,
        xs: f32,
    ) -> float32x4_t {
        // SAFETY: as above.
        unsafe {
            let x = load_codes(x);
            let Scales { scale, bias } = block_scales::<T, B>(block);
            let dots = chunk_dot::<T, DOTPROD>(Self::start::<T>(x), shifted::<T, B>(block, 0), x);
            let sums = vfmaq_f32(sums, vcvtq_f32_s32(dots), vmulq_n_f32(scale[0], xd));
            if !of(T).has_bias() {
                return sums;
            }
            vfmaq_f32(sums, bias[0], vsetq_lane_f32::<0>(xs, vdupq_n_f32(0.0)))
        }
    }

    #[inline(always)]
    unsafe fn total(sums: float32x4_t) -> f32 {
        // SAFETY: as above.
        unsafe { vaddvq_f32(sums) }
    }
}

/// Σ code · x of a chunk in four lanes; in groups of 16, lanes 0–1 are the first group.
#[inline(always)]
unsafe fn chunk_dot<const T: u32, const DOTPROD: bool>(
    start: [int32x4_t; 2],
    codes: [int8x16_t; 2],
    x: [int8x16_t; 2],
) -> int32x4_t {
    // SAFETY: the caller has NEON, and dotprod where it says so.
    unsafe {
        match DOTPROD {
            true => chunk_dot_dotprod::<T>(start, codes, x),
            false => chunk_dot_neon::<T>(start, codes, x),
        }
    }
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
