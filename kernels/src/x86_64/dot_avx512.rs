//! [`super::dot`] with 512-bit registers: two chunks, 64 codes, at a time.

use core::arch::x86_64::*;

use super::decode::{
    IQ4_UNSIGNED, Scales, block_scales, for_each_chunk, load128, load256, of, offset, unsigned,
    with_block_type,
};
use super::dot::{
    CHUNKS, TILE, add_biases, horizontal_sum, load_codes, prefetch, prefetch_distance, tile_scales,
    with_activation_scales,
};
use crate::block::DType;
use crate::scalar::decode::{CHUNK, assert_dot};

/// [`crate::scalar::decode::dot_rows`] with AVX-512 VNNI.
///
/// # Panics
/// As the scalar version.
///
/// # Safety
/// The CPU has AVX2, FMA, F16C, and of AVX-512: F, BW, VL and VNNI.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub unsafe fn dot_rows_avx512(dtype: DType, rows: &[u8], xq: &[i8], xd: &[f32], xs: &[f32], out: &mut [f32]) {
    assert_dot(dtype, rows, xq, xd, xs, out.len());
    let bytes = xq.len() / dtype.block_len() * dtype.block_bytes();
    let ahead = prefetch_distance(4 * bytes);
    let row = |r: usize| &rows[r * bytes..(r + 1) * bytes];
    let (fours, ones) = out.as_chunks_mut::<4>();
    for (i, out) in fours.iter_mut().enumerate() {
        let rows = [row(4 * i), row(4 * i + 1), row(4 * i + 2), row(4 * i + 3)];
        *out = with_block_type!(dtype, dot_kernel::<4>(rows, xq, xd, xs, ahead));
    }
    for (i, out) in ones.iter_mut().enumerate() {
        [*out] = with_block_type!(dtype, dot_kernel::<1>([row(4 * fours.len() + i)], xq, xd, xs, ahead));
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn dot_kernel<const T: u32, const B: usize, const R: usize>(
    rows: [&[u8]; R],
    xq: &[i8],
    xd: &[f32],
    xs: &[f32],
    ahead: usize,
) -> [f32; R] {
    let mut sums = [_mm512_setzero_ps(); R];
    let mut narrow_sums = [_mm256_setzero_ps(); R];
    let per_tile = TILE / of(T).block_len();
    let mut blocks: [&[[u8; B]]; R] = [&[]; R];
    for r in 0..R {
        blocks[r] = rows[r].as_chunks::<B>().0;
    }
    let (x_tiles, x_rest) = xq.as_chunks::<TILE>();
    for (t, x) in x_tiles.iter().enumerate() {
        let mut tiles = blocks;
        let mut factors = [_mm512_setzero_ps(); R];
        for r in 0..R {
            tiles[r] = &blocks[r][t * per_tile..][..per_tile];
            prefetch(tiles[r].as_flattened(), ahead);
            let scales = tile_scales::<T, B>(tiles[r]);
            factors[r] = join(with_activation_scales::<T, B>(scales.scale, &xd[t * CHUNKS..]));
            narrow_sums[r] = add_biases::<T, B>(narrow_sums[r], scales.bias, xs, t);
        }
        for_each_chunk!(
            i,
            {
                let x = load512(x, 64 * i);
                let start = minus_offset_times::<T>(x);
                for r in 0..R {
                    let dots = _mm512_dpbusd_epi32(start, unsigned_pair::<T, B>(tiles[r], i), x);
                    let factor = factor_of_pair::<T>(factors[r], i);
                    sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), factor, sums[r]);
                }
            },
            0 1 2 3
        );
    }
    // What is left of a row of 32-element blocks.
    let done = x_tiles.len() * CHUNKS;
    for (i, x) in x_rest.as_chunks::<CHUNK>().0.iter().enumerate() {
        if of(T).block_len() == TILE {
            break;
        }
        let (c, x) = (done + i, load_codes(x));
        let zero = _mm256_setzero_si256();
        let shift = _mm256_dpbusd_epi32(zero, _mm256_set1_epi8(offset(T) as i8), x);
        let (xd, start) = (_mm256_set1_ps(xd[c]), _mm256_sub_epi32(zero, shift));
        for r in 0..R {
            let Scales { scale, bias } = block_scales::<T, B>(&blocks[r][c]);
            let dots = _mm256_dpbusd_epi32(start, unsigned::<T, B>(&blocks[r][c], 0), x);
            let factor = _mm256_mul_ps(scale[0], xd);
            narrow_sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), factor, narrow_sums[r]);
            if of(T).has_bias() {
                let xs = _mm256_zextps128_ps256(_mm_set_ss(xs[c]));
                narrow_sums[r] = _mm256_fmadd_ps(bias[0], xs, narrow_sums[r]);
            }
        }
    }
    let mut out = [0.0; R];
    for r in 0..R {
        out[r] = horizontal_sum(add_halves(sums[r], narrow_sums[r]));
    }
    out
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
