//! AVX2 decoding of stored blocks, under the loops of [`crate::generic::decode`]: one 256-bit register holds the
//! codes of a chunk.

use core::arch::x86_64::*;

use crate::block::DType;
use crate::generic::decode::{Decode, decoders, of, six_bits_q4_k};
use crate::scalar::decode::{CHUNK, IQ4_LEVELS};

/// Decoding with AVX2, FMA and F16C.
pub(crate) struct Avx2Decode;

decoders!(Avx2Decode, "avx2,fma,f16c");

impl Decode for Avx2Decode {
    type Scales = Scales;

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn scales<const T: u32, const B: usize>(block: &[u8; B]) -> Scales {
        block_scales::<T, B>(block)
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn values(scales: &Scales) -> ([f32; 16], [f32; 16]) {
        (to_array(scales.scale), to_array(scales.bias))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn codes<const T: u32, const B: usize>(block: &[u8; B], j: usize, out: &mut [i8; CHUNK]) {
        store256(signed::<T, B>(block, j), out);
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn dequantize_chunk<const T: u32, const B: usize>(
        block: &[u8; B],
        j: usize,
        scales: &Scales,
        out: &mut [f32; CHUNK],
    ) {
        let codes = signed::<T, B>(block, j);
        let (low, high) = (_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes));
        let quarters = [low, _mm_srli_si128::<8>(low), high, _mm_srli_si128::<8>(high)];
        for (q, (quarter, out)) in quarters.into_iter().zip(out.as_chunks_mut::<8>().0).enumerate() {
            let group = if of(T).group_len() == 16 { 2 * j + q / 2 } else { j };
            let lane = _mm256_set1_epi32(group as i32 % 8);
            let scale = _mm256_permutevar8x32_ps(scales.scale[group / 8], lane);
            let floats = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(quarter));
            // scale · code is exact, so fused and separate rounding agree.
            let values = if of(T).has_bias() {
                let bias = _mm256_permutevar8x32_ps(scales.bias[group / 8], lane);
                _mm256_fmadd_ps(scale, floats, bias)
            } else {
                _mm256_mul_ps(scale, floats)
            };
            store_floats(values, out);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dequantize_halves(dtype: DType, row: &[u8], start: usize, out: &mut [f32]) {
        let (wide, rest) = out.as_chunks_mut::<8>();
        for (out, bytes) in wide.iter_mut().zip(row[2 * start..].as_chunks::<16>().0) {
            let bits = load128(bytes, 0);
            let floats = if dtype == DType::F16 {
                _mm256_cvtph_ps(bits)
            } else {
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
            };
            store_floats(floats, out);
        }
        crate::scalar::decode::dequantize(dtype, row, start + 8 * wide.len(), rest);
    }
}

/// What is added to the stored bits' number to make it non-negative; see [`unsigned`].
pub(crate) const fn offset(t: u32) -> u8 {
    match of(t) {
        DType::Q4_0 => 8,
        DType::Q5_0 => 16,
        DType::Q3_K => 4,
        DType::Q6_K => 32,
        DType::Q8_0 | DType::IQ4_NL | DType::IQ4_XS => 128,
        _ => 0,
    }
}

/// Exact signed codes of chunk `j` of a block.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) fn signed<const T: u32, const B: usize>(block: &[u8; B], j: usize) -> __m256i {
    match of(T) {
        DType::Q8_0 => load256(block, 2),
        DType::IQ4_NL => levels(nibbles(load128(block, 2)), 0),
        DType::IQ4_XS => levels(nibbles(load128(block, 8 + 16 * j)), 0),
        _ if offset(T) == 0 => unsigned::<T, B>(block, j),
        _ => _mm256_sub_epi8(unsigned::<T, B>(block, j), _mm256_set1_epi8(offset(T) as i8)),
    }
}

/// Unsigned codes of chunk `j` of a block: the exact code plus `offset(T)`.
///
/// Layouts are explained at the scalar functions of the same types.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) fn unsigned<const T: u32, const B: usize>(block: &[u8; B], j: usize) -> __m256i {
    match of(T) {
        DType::Q4_0 => nibbles(load128(block, 2)),
        DType::Q4_1 => nibbles(load128(block, 4)),
        DType::Q5_0 => _mm256_or_si256(nibbles(load128(block, 6)), fifth_bits(block, 2)),
        DType::Q5_1 => _mm256_or_si256(nibbles(load128(block, 8)), fifth_bits(block, 4)),
        DType::Q2_K => bits(load256(block, 16 + 32 * (j / 4)), 2 * (j % 4), 3),
        DType::Q3_K => {
            let low = bits(load256(block, 32 + 32 * (j / 4)), 2 * (j % 4), 3);
            _mm256_or_si256(low, bit(load256(block, 0), j, 4))
        }
        DType::Q4_K => bits(load256(block, 16 + 32 * (j / 2)), 4 * (j % 2), 15),
        DType::Q5_K => {
            let low = bits(load256(block, 48 + 32 * (j / 2)), 4 * (j % 2), 15);
            _mm256_or_si256(low, bit(load256(block, 16), j, 16))
        }
        DType::Q6_K => {
            let low = bits(load256(block, 64 * (j / 4) + 32 * (j % 2)), 4 * (j % 4 / 2), 15);
            let high = bits(load256(block, 128 + 32 * (j / 4)), 2 * (j % 4), 3);
            _mm256_or_si256(low, _mm256_slli_epi16::<4>(high))
        }
        DType::IQ4_NL => levels(nibbles(load128(block, 2)), offset(T)),
        DType::IQ4_XS => levels(nibbles(load128(block, 8 + 16 * j)), offset(T)),
        _ => _mm256_xor_si256(load256(block, 2), _mm256_set1_epi8(offset(T) as i8)),
    }
}

/// Low nibbles in the lower half, high nibbles in the upper.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn nibbles(bytes: __m128i) -> __m256i {
    let both = _mm256_set_m128i(_mm_srli_epi16::<4>(bytes), bytes);
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

/// `bytes >> shift & mask`, byte by byte; `mask` must not reach bits shifted in from a neighbour.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn bits(bytes: __m256i, shift: usize, mask: i8) -> __m256i {
    let shifted = _mm256_srl_epi16(bytes, _mm_cvtsi32_si128(shift as i32));
    _mm256_and_si256(shifted, _mm256_set1_epi8(mask))
}

/// `value` in each byte whose bit `index` is set, 0 elsewhere.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn bit(bytes: __m256i, index: usize, value: i8) -> __m256i {
    let mask = _mm256_set1_epi8((1u8 << index) as i8);
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, mask), mask);
    _mm256_and_si256(set, _mm256_set1_epi8(value))
}

/// 16 in byte k when bit k of the 32-bit word at `at` is set.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn fifth_bits<const B: usize>(block: &[u8; B], at: usize) -> __m256i {
    let word = i32::from_le_bytes(*block[at..].first_chunk().expect("inside the block"));
    // Byte k of the result gets byte k / 8 of the word, then its own bit k % 8 is singled out.
    let spread = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    let mask = _mm256_set1_epi64x(0x8040201008040201u64 as i64);
    let bytes = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), spread), mask);
    _mm256_and_si256(_mm256_cmpeq_epi8(bytes, mask), _mm256_set1_epi8(16))
}

/// IQ4 levels, plus 0 or 128, of nibble values.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn levels(nibbles: __m256i, offset: u8) -> __m256i {
    let table = if offset == 0 { &IQ4_SIGNED } else { &IQ4_UNSIGNED };
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(table, 0)), nibbles)
}

/// [`IQ4_LEVELS`] as bytes.
const IQ4_SIGNED: [u8; 16] = iq4_bytes(0);

/// [`IQ4_LEVELS`] + 128.
pub(crate) const IQ4_UNSIGNED: [u8; 16] = iq4_bytes(128);

const fn iq4_bytes(offset: u8) -> [u8; 16] {
    let mut bytes = [0; 16];
    let mut i = 0;
    while i < 16 {
        bytes[i] = (IQ4_LEVELS[i] as u8).wrapping_add(offset);
        i += 1;
    }
    bytes
}

/// Scales and biases of up to 16 groups, in order.
#[derive(Clone, Copy)]
pub(crate) struct Scales {
    pub(crate) scale: [__m256; 2],
    pub(crate) bias: [__m256; 2],
}

/// All scales (and biases) of one block. For 32-element blocks every lane is the same.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) fn block_scales<const T: u32, const B: usize>(block: &[u8; B]) -> Scales {
    let zero = _mm256_setzero_ps();
    let [first, second] = match of(T) {
        DType::Q2_K => [80, 82],
        DType::Q3_K => [108, 108],
        DType::Q6_K => [208, 208],
        _ => [0, 2],
    };
    let (d, m) = (half_at(block, first), half_at(block, second));
    match of(T) {
        DType::Q4_1 | DType::Q5_1 => Scales { scale: [d; 2], bias: [m; 2] },
        DType::Q2_K => {
            let (both, low) = (load128(block, 0), _mm_set1_epi8(15));
            let scale = bytes_times(_mm_and_si128(both, low), d);
            let minus = _mm256_sub_ps(zero, m);
            let min = bytes_times(_mm_and_si128(_mm_srli_epi16::<4>(both), low), minus);
            Scales { scale, bias: min }
        }
        DType::Q4_K | DType::Q5_K => {
            let (scale, min) = six_bits_q4_k(block);
            let pair = bytes_times(_mm_set_epi64x(min as i64, scale as i64), _mm256_set1_ps(1.0));
            let bias = _mm256_mul_ps(pair[1], _mm256_sub_ps(zero, m));
            Scales { scale: [_mm256_mul_ps(pair[0], d), zero], bias: [bias, zero] }
        }
        DType::Q3_K => Scales { scale: bytes_times(six_bits_q3_k(block), d), bias: [zero; 2] },
        DType::Q6_K => Scales { scale: bytes_times(load128(block, 192), d), bias: [zero; 2] },
        DType::IQ4_XS => {
            let scale = _mm256_mul_ps(_mm256_cvtepi32_ps(six_bits_iq4_xs(block)), d);
            Scales { scale: [scale, zero], bias: [zero; 2] }
        }
        _ => Scales { scale: [d; 2], bias: [zero; 2] },
    }
}

/// Sixteen signed bytes as floats, times `d`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn bytes_times(bytes: __m128i, d: __m256) -> [__m256; 2] {
    // No closure here: one that runs inside `map` would not be inlined with its instruction set.
    let low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    let high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes)));
    [_mm256_mul_ps(low, d), _mm256_mul_ps(high, d)]
}

/// The sixteen scales of Q3_K, a signed byte each.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn six_bits_q3_k<const B: usize>(block: &[u8; B]) -> __m128i {
    let word = |at: usize| u32::from_le_bytes(*block[at..].first_chunk().expect("inside the block"));
    let (low, high) = (word(96) as u64 | (word(100) as u64) << 32, word(104));
    let nibbles = _mm_set_epi64x((low >> 4) as i64, low as i64);
    let high = _mm_srlv_epi32(_mm_set1_epi32(high as i32), _mm_set_epi32(6, 4, 2, 0));
    let high = _mm_slli_epi16::<4>(_mm_and_si128(high, _mm_set1_epi8(3)));
    let both = _mm_or_si128(_mm_and_si128(nibbles, _mm_set1_epi8(15)), high);
    _mm_sub_epi8(both, _mm_set1_epi8(32))
}

/// The eight scales of IQ4_XS.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn six_bits_iq4_xs<const B: usize>(block: &[u8; B]) -> __m256i {
    let low = i32::from_le_bytes(*block[4..].first_chunk().expect("inside the block"));
    let high = u16::from_le_bytes(*block[2..].first_chunk().expect("inside the block"));
    let low = _mm256_srlv_epi32(_mm256_set1_epi32(low), _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0));
    let shifts = _mm256_set_epi32(14, 12, 10, 8, 6, 4, 2, 0);
    let high = _mm256_srlv_epi32(_mm256_set1_epi32(high as i32), shifts);
    let low = _mm256_and_si256(low, _mm256_set1_epi32(15));
    let high = _mm256_slli_epi32::<4>(_mm256_and_si256(high, _mm256_set1_epi32(3)));
    _mm256_sub_epi32(_mm256_or_si256(low, high), _mm256_set1_epi32(32))
}

/// The f16 at `at`, in every lane.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) fn half_at<const B: usize>(block: &[u8; B], at: usize) -> __m256 {
    let bits = u16::from_le_bytes(*block[at..].first_chunk().expect("inside the block"));
    _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits as i32)))
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) fn load128(bytes: &[u8], at: usize) -> __m128i {
    let bytes: &[u8; 16] = bytes[at..].first_chunk().expect("inside the block");
    // SAFETY: the reference covers the 16 bytes read; loadu needs no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) fn load256(bytes: &[u8], at: usize) -> __m256i {
    let bytes: &[u8; 32] = bytes[at..].first_chunk().expect("inside the block");
    // SAFETY: the reference covers the 32 bytes read; loadu needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store256(value: __m256i, out: &mut [i8; CHUNK]) {
    // SAFETY: the reference covers the 32 bytes written; storeu needs no alignment.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), value) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) fn store_floats(value: __m256, out: &mut [f32; 8]) {
    // SAFETY: the reference covers the eight floats written; storeu needs no alignment.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), value) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn to_array(pair: [__m256; 2]) -> [f32; 16] {
    let mut out = [0.0; 16];
    let (halves, _) = out.as_chunks_mut::<8>();
    store_floats(pair[0], &mut halves[0]);
    store_floats(pair[1], &mut halves[1]);
    out
}
