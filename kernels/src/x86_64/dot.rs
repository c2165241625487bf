//! [`crate::generic::dot`] with 256-bit registers: a tile is 256 elements, a step one chunk.

use core::arch::x86_64::*;

use super::decode::{Scales, block_scales, offset, signed, unsigned};
use crate::block::DType;
use crate::generic::decode::of;
use crate::generic::dot::{RowDot, dot_rows};
use crate::scalar::decode::CHUNK;

pub(crate) const TILE: usize = 256;

/// Chunks in a tile.
pub(crate) const CHUNKS: usize = TILE / CHUNK;

/// Dot products with AVX2, FMA and F16C; with AVX-VNNI where `VNNI`.
pub(crate) struct Dot256<const VNNI: bool>;

dot_rows!(Dot256<false>, "avx2,fma,f16c", dot_rows_avx2);
dot_rows!(Dot256<true>, "avx2,fma,f16c,avxvnni", dot_rows_avxvnni);

impl<const VNNI: bool> RowDot for Dot256<VNNI> {
    type Sums = __m256;
    type Factors = [__m256; 2];
    type X = __m256i;
    type Start = ();
    const STEP: usize = 1;

    #[inline(always)]
    fn chunks_per_tile(_: u32) -> usize {
        CHUNKS
    }

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: the trait's contract, as in all methods here.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn no_factors() -> [__m256; 2] {
        // SAFETY: as above.
        unsafe { [_mm256_setzero_ps(); 2] }
    }

    #[inline(always)]
    unsafe fn begin<const T: u32, const B: usize>(
        tile: &[[u8; B]],
        ahead: usize,
        sums: &mut __m256,
        xd: &[f32],
        xs: &[f32],
        t: usize,
    ) -> [__m256; 2] {
        prefetch(tile.as_flattened(), ahead);
        // SAFETY: as above.
        unsafe {
            let scales = tile_scales::<T, B>(tile);
            *sums = add_biases::<T, B>(*sums, scales.bias, xs, t);
            with_activation_scales::<T, B>(scales.scale, xd)
        }
    }

    #[inline(always)]
    unsafe fn load(x: &[[i8; CHUNK]], j: usize) -> __m256i {
        // SAFETY: as above.
        unsafe { load_codes(&x[j]) }
    }

    /// Leaves sharing the offset's products to the compiler: [`chunk_dot_avx2`] doesn't always need them.
    #[inline(always)]
    unsafe fn start<const T: u32>(_: __m256i) {}

    #[inline(always)]
    unsafe fn step<const T: u32, const B: usize, const J: usize>(
        sums: __m256,
        tile: &[[u8; B]],
        (): (),
        x: __m256i,
        factors: [__m256; 2],
    ) -> __m256 {
        // SAFETY: as above.
        unsafe {
            let (block, j) = block_of_tile::<T, B>(tile, J);
            let dots = _mm256_cvtepi32_ps(chunk_dot::<T, B, VNNI>(block, j, x));
            _mm256_fmadd_ps(dots, factor_of_chunk::<T, B>(factors, J), sums)
        }
    }

    #[inline(always)]
    unsafe fn rest<const T: u32, const B: usize>(
        sums: __m256,
        block: &[u8; B],
        x: &[i8; CHUNK],
        xd: f32,
        xs: f32,
    ) -> __m256 {
        // SAFETY: as above.
        unsafe {
            let Scales { scale, bias } = block_scales::<T, B>(block);
            let dots = _mm256_cvtepi32_ps(chunk_dot::<T, B, VNNI>(block, 0, load_codes(x)));
            let sums = _mm256_fmadd_ps(dots, _mm256_mul_ps(scale[0], _mm256_set1_ps(xd)), sums);
            if !of(T).has_bias() {
                return sums;
            }
            _mm256_fmadd_ps(bias[0], _mm256_zextps128_ps256(_mm_set_ss(xs)), sums)
        }
    }

    #[inline(always)]
    unsafe fn total(sums: __m256) -> f32 {
        // SAFETY: as above.
        unsafe { horizontal_sum(sums) }
    }
}

/// Σ code · x of chunk `j`, in eight lanes of four neighbours each. `x` lies in −127..=127.
#[inline(always)]
unsafe fn chunk_dot<const T: u32, const B: usize, const VNNI: bool>(
    block: &[u8; B],
    j: usize,
    x: __m256i,
) -> __m256i {
    // SAFETY: the caller has the features, AVX-VNNI too where it says so.
    unsafe {
        match VNNI {
            true => chunk_dot_avxvnni::<T, B>(block, j, x),
            false => chunk_dot_avx2::<T, B>(block, j, x),
        }
    }
}

/// Starts fetching the lines `ahead` of `bytes`. A hint: it may point past the matrix.
#[inline]
pub(crate) fn prefetch(bytes: &[u8], ahead: usize) {
    for at in (0..bytes.len()).step_by(64) {
        let line = bytes.as_ptr().wrapping_add(at + ahead);
        // SAFETY: prefetching never faults and every x86-64 CPU has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn chunk_dot_avx2<const T: u32, const B: usize>(block: &[u8; B], j: usize, x: __m256i) -> __m256i {
    let pairs = if offset(T) == 128 {
        // Full-range codes: |code| · ±x sums to at most 2 · 128 · 127, just inside i16.
        let codes = signed::<T, B>(block, j);
        _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes))
    } else {
        // At most six bits: no saturation. The offset's product is shared by all rows.
        let pairs = _mm256_maddubs_epi16(unsigned::<T, B>(block, j), x);
        let shift = _mm256_maddubs_epi16(_mm256_set1_epi8(offset(T) as i8), x);
        if offset(T) == 0 { pairs } else { _mm256_sub_epi16(pairs, shift) }
    };
    _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
#[inline]
fn chunk_dot_avxvnni<const T: u32, const B: usize>(block: &[u8; B], j: usize, x: __m256i) -> __m256i {
    let zero = _mm256_setzero_si256();
    let dots = _mm256_dpbusd_avx_epi32(zero, unsigned::<T, B>(block, j), x);
    let shift = _mm256_dpbusd_avx_epi32(zero, _mm256_set1_epi8(offset(T) as i8), x);
    if offset(T) == 0 { dots } else { _mm256_sub_epi32(dots, shift) }
}

/// The block of a tile that holds its chunk `j`, and the chunk's place in the block.
#[inline]
fn block_of_tile<const T: u32, const B: usize>(tile: &[[u8; B]], j: usize) -> (&[u8; B], usize) {
    if of(T).block_len() == TILE { (&tile[0], j) } else { (&tile[j], 0) }
}

/// Scales and biases of a tile's 8 or 16 groups.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) fn tile_scales<const T: u32, const B: usize>(tile: &[[u8; B]]) -> Scales {
    if of(T).block_len() == TILE {
        return block_scales::<T, B>(&tile[0]);
    }
    let blocks = tile.first_chunk().expect("eight of the tile");
    let zero = _mm256_setzero_ps();
    let (scale, bias) =
        if of(T).has_bias() { pairs_of_blocks(blocks) } else { (halves_of_blocks(blocks), zero) };
    Scales { scale: [scale, zero], bias: [bias, zero] }
}

/// The f16 that each of a tile's eight blocks begins with.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn halves_of_blocks<const B: usize>(blocks: &[[u8; B]; CHUNKS]) -> __m256 {
    let [a, b, c, d, e, f, g, h] = blocks;
    let half = |block: &[u8; B]| i16::from_le_bytes([block[0], block[1]]);
    _mm256_cvtph_ps(_mm_setr_epi16(half(a), half(b), half(c), half(d), half(e), half(f), half(g), half(h)))
}

/// The two f16s that each of a tile's eight blocks begins with.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn pairs_of_blocks<const B: usize>(blocks: &[[u8; B]; CHUNKS]) -> (__m256, __m256) {
    let [a, b, c, d, e, f, g, h] = blocks;
    let pair = |block: &[u8; B]| i32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    let first_then_second = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    let low = _mm_shuffle_epi8(_mm_setr_epi32(pair(a), pair(b), pair(c), pair(d)), first_then_second);
    let high = _mm_shuffle_epi8(_mm_setr_epi32(pair(e), pair(f), pair(g), pair(h)), first_then_second);
    let (first, second) = (_mm_unpacklo_epi64(low, high), _mm_unpackhi_epi64(low, high));
    (_mm256_cvtph_ps(first), _mm256_cvtph_ps(second))
}

/// Each group's scale times the scale of its activations (`xd`: one per chunk from the tile on).
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) fn with_activation_scales<const T: u32, const B: usize>(
    scale: [__m256; 2],
    xd: &[f32],
) -> [__m256; 2] {
    let xd = load_floats(xd);
    if of(T).group_len() == 32 {
        return [_mm256_mul_ps(scale[0], xd), scale[1]];
    }
    let low = _mm256_permutevar8x32_ps(xd, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
    let high = _mm256_permutevar8x32_ps(xd, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7));
    [_mm256_mul_ps(scale[0], low), _mm256_mul_ps(scale[1], high)]
}

/// Adds `bias · xs` of tile `t`'s groups to `sum`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) fn add_biases<const T: u32, const B: usize>(
    sum: __m256,
    bias: [__m256; 2],
    xs: &[f32],
    t: usize,
) -> __m256 {
    match (of(T).has_bias(), of(T).group_len()) {
        (false, _) => sum,
        (true, 32) => _mm256_fmadd_ps(bias[0], load_floats(&xs[8 * t..]), sum),
        (true, _) => {
            let sum = _mm256_fmadd_ps(bias[0], load_floats(&xs[16 * t..]), sum);
            _mm256_fmadd_ps(bias[1], load_floats(&xs[16 * t + 8..]), sum)
        }
    }
}

/// The factor of each lane of chunk `j`'s integer sums: lanes 0–3 are its first 16 elements.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn factor_of_chunk<const T: u32, const B: usize>(factors: [__m256; 2], j: usize) -> __m256 {
    if of(T).group_len() == 32 {
        return _mm256_permutevar8x32_ps(factors[0], _mm256_set1_epi32(j as i32));
    }
    let lanes = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    let lanes = _mm256_add_epi32(lanes, _mm256_set1_epi32(2 * (j % 4) as i32));
    _mm256_permutevar8x32_ps(factors[j / 4], lanes)
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) fn horizontal_sum(v: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) fn load_codes(codes: &[i8; CHUNK]) -> __m256i {
    // SAFETY: the reference covers the 32 bytes read; loadu needs no alignment.
    unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn load_floats(floats: &[f32]) -> __m256 {
    let floats: &[f32; 8] = floats.first_chunk().expect("eight of the tile");
    // SAFETY: the reference covers the eight floats read; loadu needs no alignment.
    unsafe { _mm256_loadu_ps(floats.as_ptr()) }
}
