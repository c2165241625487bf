//! [`crate::generic::dot`] with 512-bit registers: two chunks (64 codes) per step.

use core::arch::x86_64::*;

use super::decode::{IQ4_UNSIGNED, Scales, block_scales, load128, load256, offset, unsigned};
use super::dot::{
    CHUNKS, TILE, add_biases, horizontal_sum, load_codes, prefetch, tile_scales, with_activation_scales,
};
use crate::block::DType;
use crate::generic::decode::of;
use crate::generic::dot::{RowDot, dot_rows};
use crate::scalar::decode::CHUNK;

/// Dot products with AVX-512 F, BW, VL and VNNI.
pub(crate) struct Dot512;

dot_rows!(Dot512, "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni", dot_rows_avx512);

impl RowDot for Dot512 {
    /// Of whole steps, and of biases and the rest.
    type Sums = (__m512, __m256);
    type Factors = __m512;
    type X = __m512i;
    type Start = __m512i;
    const STEP: usize = 2;

    #[inline(always)]
    fn chunks_per_tile(_: u32) -> usize {
        CHUNKS
    }

    #[inline(always)]
    unsafe fn zero() -> Self::Sums {
        // SAFETY: the trait's contract, as in all methods here.
        unsafe { (_mm512_setzero_ps(), _mm256_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn no_factors() -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn begin<const T: u32, const B: usize>(
        tile: &[[u8; B]],
        ahead: usize,
        sums: &mut Self::Sums,
        xd: &[f32],
        xs: &[f32],
        t: usize,
    ) -> __m512 {
        prefetch(tile.as_flattened(), ahead);
        // SAFETY: as above.
        unsafe {
            let scales = tile_scales::<T, B>(tile);
            sums.1 = add_biases::<T, B>(sums.1, scales.bias, xs, t);
            join(with_activation_scales::<T, B>(scales.scale, xd))
        }
    }

    #[inline(always)]
    unsafe fn load(x: &[[i8; CHUNK]], j: usize) -> __m512i {
        // SAFETY: as above.
        unsafe { load512(x.as_flattened(), CHUNK * j) }
    }

    #[inline(always)]
    unsafe fn start<const T: u32>(x: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { minus_offset_times::<T>(x) }
    }

    #[inline(always)]
    unsafe fn step<const T: u32, const B: usize, const J: usize>(
        (wide, narrow): Self::Sums,
        tile: &[[u8; B]],
        start: __m512i,
        x: __m512i,
        factors: __m512,
    ) -> Self::Sums {
        // SAFETY: as above.
        unsafe {
            let dots = _mm512_dpbusd_epi32(start, unsigned_pair::<T, B>(tile, J / 2), x);
            let factor = factor_of_pair::<T>(factors, J / 2);
            (_mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), factor, wide), narrow)
        }
    }

    #[inline(always)]
    unsafe fn rest<const T: u32, const B: usize>(
        (wide, narrow): Self::Sums,
        block: &[u8; B],
        x: &[i8; CHUNK],
        xd: f32,
        xs: f32,
    ) -> Self::Sums {
        // SAFETY: as above.
        unsafe {
            let (x, zero) = (load_codes(x), _mm256_setzero_si256());
            let shift = _mm256_dpbusd_epi32(zero, _mm256_set1_epi8(offset(T) as i8), x);
            let Scales { scale, bias } = block_scales::<T, B>(block);
            let dots = _mm256_dpbusd_epi32(_mm256_sub_epi32(zero, shift), unsigned::<T, B>(block, 0), x);
            let factor = _mm256_mul_ps(scale[0], _mm256_set1_ps(xd));
            let narrow = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), factor, narrow);
            if !of(T).has_bias() {
                return (wide, narrow);
            }
            (wide, _mm256_fmadd_ps(bias[0], _mm256_zextps128_ps256(_mm_set_ss(xs)), narrow))
        }
    }

    #[inline(always)]
    unsafe fn total((wide, narrow): Self::Sums) -> f32 {
        // SAFETY: as above.
        unsafe { horizontal_sum(add_halves(wide, narrow)) }
    }
}

/// −offset · Σ x of four neighbours, in each lane: where the sum of products starts.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn minus_offset_times<const T: u32>(x: __m512i) -> __m512i {
    let zero = _mm512_setzero_si512();
    if offset(T) == 0 {
        return zero;
    }
    _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, _mm512_set1_epi8(offset(T) as i8), x))
}

/// Unsigned codes (code plus `offset(T)`) of chunks `2i` and `2i + 1` of a tile.
///
/// Layouts are explained at the functions of the same types in `scalar::decode`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn unsigned_pair<const T: u32, const B: usize>(tile: &[[u8; B]], i: usize) -> __m512i {
    if of(T).block_len() != TILE {
        return unsigned_pair_small::<T, B>(&tile[2 * i], &tile[2 * i + 1]);
    }
    let (block, half, j) = (&tile[0], i / 2, 2 * i % 4);
    match of(T) {
        DType::Q2_K => bits(twice(block, 16 + 32 * half), 2 * j, 2 * j + 2, 3),
        DType::Q3_K => {
            let low = bits(twice(block, 32 + 32 * half), 2 * j, 2 * j + 2, 3);
            add_where_set(low, twice(block, 0), i, 4)
        }
        DType::Q4_K => bits(twice(block, 16 + 32 * i), 0, 4, 15),
        DType::Q5_K => {
            let low = bits(twice(block, 48 + 32 * i), 0, 4, 15);
            add_where_set(low, twice(block, 16), i, 16)
        }
        DType::Q6_K => {
            let low = bits(load512(block.as_slice(), 64 * half), 2 * j, 2 * j, 15);
            let high = bits(twice(block, 128 + 32 * half), 2 * j, 2 * j + 2, 3);
            _mm512_or_si512(low, _mm512_slli_epi16::<4>(high))
        }
        _ => {
            let both = _mm512_castsi256_si512(load256(block, 8 + 32 * i));
            iq4(nibbles(_mm512_shuffle_i64x2::<0b01_01_00_00>(both, both)))
        }
    }
}

/// [`unsigned_pair`] of two blocks of 32 elements.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn unsigned_pair_small<const T: u32, const B: usize>(first: &[u8; B], second: &[u8; B]) -> __m512i {
    if of(T) == DType::Q8_0 {
        let both = _mm512_castsi256_si512(load256(first, 2));
        let both = _mm512_inserti64x4::<1>(both, load256(second, 2));
        return _mm512_xor_si512(both, _mm512_set1_epi8(-128));
    }
    let both = _mm256_set_m128i(load128(second, B - 16), load128(first, B - 16));
    let both = _mm512_castsi256_si512(both);
    let low = nibbles(_mm512_shuffle_i64x2::<0b01_01_00_00>(both, both));
    match of(T) {
        DType::Q5_0 | DType::Q5_1 => {
            let word =
                |block: &[u8; B]| u32::from_le_bytes(*block[B - 20..].first_chunk().expect("in the block"));
            let fifth = word(first) as u64 | (word(second) as u64) << 32;
            _mm512_mask_add_epi8(low, fifth, low, _mm512_set1_epi8(16))
        }
        DType::IQ4_NL => iq4(low),
        _ => low,
    }
}

/// 32 bytes of a block, in both halves.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn twice(block: &[u8], at: usize) -> __m512i {
    _mm512_broadcast_i64x4(load256(block, at))
}

/// Low nibbles in even 128-bit lanes, high nibbles in odd ones.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn nibbles(bytes: __m512i) -> __m512i {
    let shifts = _mm512_set_epi64(
        0x0004000400040004,
        0x0004000400040004,
        0,
        0,
        0x0004000400040004,
        0x0004000400040004,
        0,
        0,
    );
    _mm512_and_si512(_mm512_srlv_epi16(bytes, shifts), _mm512_set1_epi8(15))
}

/// `bytes >> shift & mask` with a shift for each half.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn bits(bytes: __m512i, low_shift: usize, high_shift: usize, mask: i8) -> __m512i {
    let low = _mm512_castsi256_si512(_mm256_set1_epi16(low_shift as i16));
    let shifts = _mm512_inserti64x4::<1>(low, _mm256_set1_epi16(high_shift as i16));
    _mm512_and_si512(_mm512_srlv_epi16(bytes, shifts), _mm512_set1_epi8(mask))
}

/// Adds `value` where bit `2i` (lower half) or `2i + 1` (upper half) of `flags` is set.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn add_where_set(codes: __m512i, flags: __m512i, i: usize, value: i8) -> __m512i {
    let low = _mm512_castsi256_si512(_mm256_set1_epi8((1u8 << (2 * i)) as i8));
    let masks = _mm512_inserti64x4::<1>(low, _mm256_set1_epi8((2u8 << (2 * i)) as i8));
    let set = _mm512_test_epi8_mask(flags, masks);
    _mm512_mask_add_epi8(codes, set, codes, _mm512_set1_epi8(value))
}

/// IQ4 levels plus 128 of nibble values.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn iq4(nibbles: __m512i) -> __m512i {
    _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load128(&IQ4_UNSIGNED, 0)), nibbles)
}

/// The factor of each lane of chunk pair `i`'s integer sums, from a tile's 8 or 16 factors.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn factor_of_pair<const T: u32>(factors: __m512, i: usize) -> __m512 {
    let (lanes, first) = if of(T).group_len() == 32 {
        (_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), 2 * i)
    } else {
        (_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), 4 * i)
    };
    _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(first as i32)), factors)
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn join(halves: [__m256; 2]) -> __m512 {
    let low = _mm512_castps_si512(_mm512_castps256_ps512(halves[0]));
    _mm512_castsi512_ps(_mm512_inserti64x4::<1>(low, _mm256_castps_si256(halves[1])))
}

/// The sum of both halves of `wide` and of `narrow`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn add_halves(wide: __m512, narrow: __m256) -> __m256 {
    let high = _mm512_extracti64x4_epi64::<1>(_mm512_castps_si512(wide));
    let both = _mm256_add_ps(_mm512_castps512_ps256(wide), _mm256_castsi256_ps(high));
    _mm256_add_ps(both, narrow)
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn load512<N: Copy>(bytes: &[N], at: usize) -> __m512i {
    const { assert!(size_of::<N>() == 1) };
    let bytes: &[N; 64] = bytes[at..].first_chunk().expect("inside the block or tile");
    // SAFETY: the reference covers the 64 bytes read; loadu needs no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}
