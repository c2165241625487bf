//! NEON decoding of stored blocks, under the loops of [`crate::generic::decode`]: two registers hold the codes of a
//! chunk.

use core::arch::aarch64::*;

use crate::block::DType;
use crate::generic::decode::{Decode, decoders, of, six_bits_q4_k};
use crate::scalar::decode::{CHUNK, IQ4_LEVELS};

/// Decoding with NEON.
pub(crate) struct NeonDecode;

decoders!(NeonDecode, "neon");

impl Decode for NeonDecode {
    /// As values: a lane that is a variable costs a load either way.
    type Scales = ([f32; 16], [f32; 16]);

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn scales<const T: u32, const B: usize>(block: &[u8; B]) -> Self::Scales {
        let Scales { scale, bias } = block_scales::<T, B>(block);
        (to_array(scale), to_array(bias))
    }

    #[inline(always)]
    unsafe fn values(scales: &Self::Scales) -> ([f32; 16], [f32; 16]) {
        *scales
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn codes<const T: u32, const B: usize>(block: &[u8; B], j: usize, out: &mut [i8; CHUNK]) {
        store_codes(signed::<T, B>(block, j), out);
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn dequantize_chunk<const T: u32, const B: usize>(
        block: &[u8; B],
        j: usize,
        (scale, bias): &Self::Scales,
        out: &mut [f32; CHUNK],
    ) {
        let codes = signed::<T, B>(block, j);
        for (h, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let group = if of(T).group_len() == 16 { 2 * j + h } else { j % 16 };
            let words = widened(codes[h]);
            for (word, out) in words.into_iter().zip(out.as_chunks_mut::<4>().0) {
                let floats = vcvtq_f32_s32(word);
                // scale · code is exact, so fused and separate rounding agree.
                let values = if of(T).has_bias() {
                    vfmaq_n_f32(vdupq_n_f32(bias[group]), floats, scale[group])
                } else {
                    vmulq_n_f32(floats, scale[group])
                };
                // SAFETY: the reference covers the four floats written.
                unsafe { vst1q_f32(out.as_mut_ptr(), values) }
            }
        }
    }

    #[target_feature(enable = "neon")]
    unsafe fn dequantize_halves(dtype: DType, row: &[u8], start: usize, out: &mut [f32]) {
        let (wide, rest) = out.as_chunks_mut::<4>();
        for (out, bytes) in wide.iter_mut().zip(row[2 * start..].as_chunks::<8>().0) {
            let bits = vcreate_u16(u64::from_le_bytes(*bytes));
            let floats = if dtype == DType::F16 {
                vcvt_f32_f16(vreinterpret_f16_u16(bits))
            } else {
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(bits)))
            };
            // SAFETY: the reference covers the four floats written.
            unsafe { vst1q_f32(out.as_mut_ptr(), floats) }
        }
        crate::scalar::decode::dequantize(dtype, row, start + 4 * wide.len(), rest);
    }
}

/// The offset in [`shifted`] codes: subtracting it once from a sum of products is cheaper than from every code.
pub(crate) const fn offset(t: u32) -> i8 {
    match of(t) {
        DType::Q4_0 => 8,
        DType::Q5_0 => 16,
        DType::Q3_K => 4,
        DType::Q6_K => 32,
        _ => 0,
    }
}

/// Exact codes of chunk `j` of a block.
#[target_feature(enable = "neon")]
#[inline]
fn signed<const T: u32, const B: usize>(block: &[u8; B], j: usize) -> [int8x16_t; 2] {
    let [a, b] = shifted::<T, B>(block, j);
    if offset(T) == 0 {
        return [a, b];
    }
    let off = vdupq_n_s8(offset(T));
    [vsubq_s8(a, off), vsubq_s8(b, off)]
}

/// Codes of chunk `j` of a block plus `offset(T)`.
///
/// Layouts are explained at the scalar functions of the same types.
#[target_feature(enable = "neon")]
#[inline]
pub(crate) fn shifted<const T: u32, const B: usize>(block: &[u8; B], j: usize) -> [int8x16_t; 2] {
    let half = 32 * (j / 4);
    let [a, b] = match of(T) {
        DType::Q4_0 | DType::Q4_1 => nibbles(load(block, B - 16)),
        DType::Q5_0 | DType::Q5_1 => {
            let [a, b] = nibbles(load(block, B - 16));
            [vorrq_u8(a, fifth_bits(block, B - 20)), vorrq_u8(b, fifth_bits(block, B - 18))]
        }
        DType::Q2_K => bits(load2(block, 16 + half), 2 * (j % 4), 3),
        DType::Q3_K => {
            let [a, b] = bits(load2(block, 32 + half), 2 * (j % 4), 3);
            let [c, d] = bit_of(load2(block, 0), j, 4);
            [vorrq_u8(a, c), vorrq_u8(b, d)]
        }
        DType::Q4_K => bits(load2(block, 16 + 32 * (j / 2)), 4 * (j % 2), 15),
        DType::Q5_K => {
            let [a, b] = bits(load2(block, 48 + 32 * (j / 2)), 4 * (j % 2), 15);
            let [c, d] = bit_of(load2(block, 16), j, 16);
            [vorrq_u8(a, c), vorrq_u8(b, d)]
        }
        DType::Q6_K => {
            let [a, b] = bits(load2(block, 2 * half + 32 * (j % 2)), 4 * (j % 4 / 2), 15);
            let [c, d] = bits(load2(block, 128 + half), 2 * (j % 4), 3);
            [vsliq_n_u8::<4>(a, c), vsliq_n_u8::<4>(b, d)]
        }
        DType::IQ4_NL => levels(nibbles(load(block, 2))),
        DType::IQ4_XS => levels(nibbles(load(block, 8 + 16 * j))),
        _ => load2(block, 2),
    };
    [vreinterpretq_s8_u8(a), vreinterpretq_s8_u8(b)]
}

/// Low nibbles, then high ones.
#[target_feature(enable = "neon")]
#[inline]
fn nibbles(bytes: uint8x16_t) -> [uint8x16_t; 2] {
    [vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8::<4>(bytes)]
}

/// `bytes >> shift & mask`, byte by byte; `shift` is 0, 2, 4 or 6.
#[target_feature(enable = "neon")]
#[inline]
fn bits(bytes: [uint8x16_t; 2], shift: usize, mask: u8) -> [uint8x16_t; 2] {
    let [a, b] = bytes;
    // Immediate shifts: where the chunk is a constant, one instruction each.
    let (a, b) = match shift {
        0 => (a, b),
        2 => (vshrq_n_u8::<2>(a), vshrq_n_u8::<2>(b)),
        4 => (vshrq_n_u8::<4>(a), vshrq_n_u8::<4>(b)),
        _ => (vshrq_n_u8::<6>(a), vshrq_n_u8::<6>(b)),
    };
    let mask = vdupq_n_u8(mask);
    [vandq_u8(a, mask), vandq_u8(b, mask)]
}

/// `value` in each byte whose bit `index` is set, 0 elsewhere.
#[target_feature(enable = "neon")]
#[inline]
fn bit_of(bytes: [uint8x16_t; 2], index: usize, value: u8) -> [uint8x16_t; 2] {
    let (mask, value) = (vdupq_n_u8(1 << index), vdupq_n_u8(value));
    let [a, b] = bytes;
    [vandq_u8(vtstq_u8(a, mask), value), vandq_u8(vtstq_u8(b, mask), value)]
}

/// 16 in byte k when bit k of the 16-bit word at `at` is set.
#[target_feature(enable = "neon")]
#[inline]
fn fifth_bits<const B: usize>(block: &[u8; B], at: usize) -> uint8x16_t {
    // Byte k gets byte k / 8 of the word, then its own bit k % 8 is singled out.
    let bytes = vcombine_u8(vdup_n_u8(block[at]), vdup_n_u8(block[at + 1]));
    let own = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
    vandq_u8(vtstq_u8(bytes, own), vdupq_n_u8(16))
}

/// IQ4 levels of nibble values.
#[target_feature(enable = "neon")]
#[inline]
fn levels(nibbles: [uint8x16_t; 2]) -> [uint8x16_t; 2] {
    // SAFETY: the table has the 16 bytes read.
    let table = unsafe { vreinterpretq_u8_s8(vld1q_s8(IQ4_LEVELS.as_ptr())) };
    let [a, b] = nibbles;
    [vqtbl1q_u8(table, a), vqtbl1q_u8(table, b)]
}

/// Scales and biases of up to 16 groups, in order.
#[derive(Clone, Copy)]
pub(crate) struct Scales {
    pub(crate) scale: [float32x4_t; 4],
    pub(crate) bias: [float32x4_t; 4],
}

/// All scales (and biases) of one block. For 32-element blocks every lane is the same.
#[target_feature(enable = "neon")]
#[inline]
pub(crate) fn block_scales<const T: u32, const B: usize>(block: &[u8; B]) -> Scales {
    let none = [vdupq_n_f32(0.0); 4];
    let scale_only = |scale| Scales { scale, bias: none };
    match of(T) {
        DType::Q4_1 | DType::Q5_1 => Scales { scale: [half_at(block, 0); 4], bias: [half_at(block, 2); 4] },
        DType::Q2_K => {
            let [scale, min] = nibbles(load(block, 0));
            let minus = vnegq_f32(half_at(block, 82));
            Scales {
                scale: bytes_times(vreinterpretq_s8_u8(scale), half_at(block, 80)),
                bias: bytes_times(vreinterpretq_s8_u8(min), minus),
            }
        }
        DType::Q4_K | DType::Q5_K => {
            let (scale, min) = six_bits_q4_k(block);
            let both = vreinterpretq_s8_u64(vcombine_u64(vcreate_u64(scale), vcreate_u64(min)));
            let [a, b, c, d] = bytes_times(both, vdupq_n_f32(1.0));
            let (d_all, minus) = (half_at(block, 0), vnegq_f32(half_at(block, 2)));
            let zero = none[0];
            Scales {
                scale: [vmulq_f32(a, d_all), vmulq_f32(b, d_all), zero, zero],
                bias: [vmulq_f32(c, minus), vmulq_f32(d, minus), zero, zero],
            }
        }
        DType::Q3_K => scale_only(bytes_times(six_bits_q3_k(block), half_at(block, 108))),
        DType::Q6_K => scale_only(bytes_times(vreinterpretq_s8_u8(load(block, 192)), half_at(block, 208))),
        DType::IQ4_XS => scale_only(bytes_times(six_bits_iq4_xs(block), half_at(block, 0))),
        _ => scale_only([half_at(block, 0); 4]),
    }
}

/// Sixteen signed bytes as floats, times `d`.
#[target_feature(enable = "neon")]
#[inline]
fn bytes_times(bytes: int8x16_t, d: float32x4_t) -> [float32x4_t; 4] {
    let [w0, w1, w2, w3] = widened(bytes);
    [
        vmulq_f32(vcvtq_f32_s32(w0), d),
        vmulq_f32(vcvtq_f32_s32(w1), d),
        vmulq_f32(vcvtq_f32_s32(w2), d),
        vmulq_f32(vcvtq_f32_s32(w3), d),
    ]
}

/// Sixteen signed bytes as words.
#[target_feature(enable = "neon")]
#[inline]
fn widened(bytes: int8x16_t) -> [int32x4_t; 4] {
    let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
    [vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)]
}

/// The sixteen scales of Q3_K, a signed byte each.
#[target_feature(enable = "neon")]
#[inline]
fn six_bits_q3_k<const B: usize>(block: &[u8; B]) -> int8x16_t {
    let word = |at: usize| u32::from_le_bytes(*block[at..].first_chunk().expect("inside the block"));
    let (a, b, high) = (word(96), word(100), word(104));
    let low = |word: u32, shift: u32| ((word >> shift) & 0x0f0f_0f0f) as u64;
    let top = |shift: u32| (((high >> shift) & 0x0303_0303) << 4) as u64;
    let first = low(a, 0) | top(0) | (low(b, 0) | top(2)) << 32;
    let second = low(a, 4) | top(4) | (low(b, 4) | top(6)) << 32;
    let both = vreinterpretq_s8_u64(vcombine_u64(vcreate_u64(first), vcreate_u64(second)));
    vsubq_s8(both, vdupq_n_s8(32))
}

/// The eight scales of IQ4_XS, a signed byte each.
#[target_feature(enable = "neon")]
#[inline]
fn six_bits_iq4_xs<const B: usize>(block: &[u8; B]) -> int8x16_t {
    let low = u32::from_le_bytes(*block[4..].first_chunk().expect("inside the block"));
    let high = u16::from_le_bytes(*block[2..].first_chunk().expect("inside the block"));
    let byte = |j: u32| (low >> (4 * j) & 15 | (high as u32 >> (2 * j) & 3) << 4) as u64;
    let all = (0..8).fold(0, |all, j| all | byte(j) << (8 * j));
    let both = vreinterpretq_s8_u64(vcombine_u64(vcreate_u64(all), vcreate_u64(0)));
    vsubq_s8(both, vdupq_n_s8(32))
}

/// The f16 at `at`, in every lane.
#[target_feature(enable = "neon")]
#[inline]
pub(crate) fn half_at<const B: usize>(block: &[u8; B], at: usize) -> float32x4_t {
    let bits = u16::from_le_bytes(*block[at..].first_chunk().expect("inside the block"));
    vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits)))
}

#[target_feature(enable = "neon")]
#[inline]
fn load(bytes: &[u8], at: usize) -> uint8x16_t {
    let bytes: &[u8; 16] = bytes[at..].first_chunk().expect("inside the block");
    // SAFETY: the reference covers the 16 bytes read.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

#[target_feature(enable = "neon")]
#[inline]
fn load2(bytes: &[u8], at: usize) -> [uint8x16_t; 2] {
    [load(bytes, at), load(bytes, at + 16)]
}

#[target_feature(enable = "neon")]
#[inline]
fn store_codes(codes: [int8x16_t; 2], out: &mut [i8; CHUNK]) {
    // SAFETY: the reference covers the 32 bytes written.
    unsafe {
        vst1q_s8(out.as_mut_ptr(), codes[0]);
        vst1q_s8(out.as_mut_ptr().add(16), codes[1]);
    }
}

#[target_feature(enable = "neon")]
#[inline]
fn to_array(vectors: [float32x4_t; 4]) -> [f32; 16] {
    let mut out = [0.0; 16];
    for (v, out) in vectors.into_iter().zip(out.as_chunks_mut::<4>().0) {
        // SAFETY: the reference covers the four floats written.
        unsafe { vst1q_f32(out.as_mut_ptr(), v) }
    }
    out
}
