//! Stored blocks to integer codes with scales, to floats, and to dot products with int8 activations.
//!
//! The canonical form of a block row is `w[k] = scale[k / G] · code[k] + bias[k / G]` with exact
//! integer codes that already carry ggml's offset, and `G = DType::group_len()`. Every product
//! `scale · code` of a ggml block is exact in f32 (at most 24 significant bits), so the form loses
//! nothing: ggml's formulas and `scale · code + bias` agree to the bit, with or without fused
//! multiply-add.

use half::{bf16, f16};

use crate::block::DType;

/// Elements decoded together: the greatest common block length.
pub const CHUNK: usize = 32;

/// The sixteen levels of IQ4_NL and IQ4_XS (`kvalues_iq4nl` in ggml-common.h).
pub const IQ4_LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Decodes elements `start .. start + codes.len()` of a stored row of a block type.
///
/// `row` holds whole blocks; `start` and `codes.len()` are multiples of 32 (a 256-element block may
/// be entered in the middle); `scale` takes one value per `G = dtype.group_len()` elements, `bias`
/// as many when `dtype.has_bias()` and none otherwise.
///
/// # Panics
/// If `dtype` is a float type, or a length or `start` breaks these rules or exceeds the row.
pub fn unpack(dtype: DType, row: &[u8], start: usize, codes: &mut [i8], scale: &mut [f32], bias: &mut [f32]) {
    assert_unpack(dtype, row, start, codes, scale, bias);
    let groups = CHUNK / dtype.group_len();
    for (i, codes) in codes.as_chunks_mut::<CHUNK>().0.iter_mut().enumerate() {
        let (block, j) = block_at(dtype, row, start + i * CHUNK);
        let scale = &mut scale[i * groups..][..groups];
        let bias = if dtype.has_bias() { &mut bias[i * groups..][..groups] } else { &mut [] };
        match dtype {
            DType::Q4_0 | DType::Q4_1 | DType::Q5_0 | DType::Q5_1 | DType::Q8_0 | DType::IQ4_NL => {
                unpack_small(dtype, block, codes, scale, bias)
            }
            DType::Q2_K => unpack_q2_k(block, j, codes, scale, bias),
            DType::Q3_K => unpack_q3_k(block, j, codes, scale),
            DType::Q4_K => unpack_q4_k(block, j, codes, scale, bias),
            DType::Q5_K => unpack_q5_k(block, j, codes, scale, bias),
            DType::Q6_K => unpack_q6_k(block, j, codes, scale),
            DType::IQ4_XS => unpack_iq4_xs(block, j, codes, scale),
            DType::F32 | DType::F16 | DType::BF16 => unreachable!("asserted to be a block type"),
        }
    }
}

/// The rules of [`unpack`]'s arguments, for every ISA's version of it.
#[track_caller]
pub(crate) fn assert_unpack(
    dtype: DType,
    row: &[u8],
    start: usize,
    codes: &[i8],
    scale: &[f32],
    bias: &[f32],
) {
    assert!(!dtype.is_float(), "{} has no codes", dtype.name());
    assert_range(dtype, row, start, codes.len());
    let groups = codes.len() / dtype.group_len();
    assert_eq!(scale.len(), groups, "scale: one per {} elements", dtype.group_len());
    assert_eq!(bias.len(), if dtype.has_bias() { groups } else { 0 }, "bias: one per group, if any");
}

/// Asserts that `row` holds whole blocks and `start .. start + len` lies in it on chunk boundaries.
#[track_caller]
pub(crate) fn assert_range(dtype: DType, row: &[u8], start: usize, len: usize) {
    assert!(row.len().is_multiple_of(dtype.block_bytes()), "row: whole {} blocks", dtype.name());
    let cols = row.len() / dtype.block_bytes() * dtype.block_len();
    assert!(start <= cols && len <= cols - start, "{start} + {len} elements of a row of {cols}");
    if !dtype.is_float() {
        assert!(
            start.is_multiple_of(CHUNK) && len.is_multiple_of(CHUNK),
            "start and length: multiples of 32"
        );
    }
}

/// The block that holds element `at` of the row, and which of its chunks starts there.
fn block_at(dtype: DType, row: &[u8], at: usize) -> (&[u8], usize) {
    let block = &row[at / dtype.block_len() * dtype.block_bytes()..][..dtype.block_bytes()];
    (block, at % dtype.block_len() / CHUNK)
}

fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Types with 32-element blocks: low nibbles are the first half, high nibbles the second; the
/// fifth bits are one little-endian word, bit k for element k.
fn unpack_small(dtype: DType, block: &[u8], codes: &mut [i8; CHUNK], scale: &mut [f32], bias: &mut [f32]) {
    scale[0] = f16_at(block, 0);
    if dtype.has_bias() {
        bias[0] = f16_at(block, 2);
    }
    if dtype == DType::Q8_0 {
        for (code, &byte) in codes.iter_mut().zip(&block[2..]) {
            *code = byte as i8;
        }
        return;
    }
    let nibbles = &block[block.len() - 16..];
    for (i, &byte) in nibbles.iter().enumerate() {
        codes[i] = (byte & 15) as i8;
        codes[i + 16] = (byte >> 4) as i8;
    }
    if matches!(dtype, DType::Q5_0 | DType::Q5_1) {
        let fifth = u32_at(block, block.len() - 20);
        for (i, code) in codes.iter_mut().enumerate() {
            *code |= ((fifth >> i & 1) << 4) as i8;
        }
    }
    for code in codes {
        *code = match dtype {
            DType::Q4_0 => *code - 8,
            DType::Q5_0 => *code - 16,
            DType::IQ4_NL => IQ4_LEVELS[*code as usize],
            _ => *code,
        };
    }
}

/// Q2_K: scales [16] (low nibble scale, high nibble min), qs [64], d, dmin. Each half of 128
/// elements keeps chunk j in bits 2j of its 32 bytes.
fn unpack_q2_k(block: &[u8], j: usize, codes: &mut [i8; CHUNK], scale: &mut [f32], bias: &mut [f32]) {
    let (d, dmin) = (f16_at(block, 80), f16_at(block, 82));
    for (g, &both) in block[2 * j..2 * j + 2].iter().enumerate() {
        scale[g] = d * (both & 15) as f32;
        bias[g] = -(dmin * (both >> 4) as f32);
    }
    for (code, &byte) in codes.iter_mut().zip(&block[16 + j / 4 * 32..]) {
        *code = (byte >> (j % 4 * 2) & 3) as i8;
    }
}

/// Q3_K: hmask [32] (bit j: chunk j's third bit, set means no −4), qs [64] as in Q2_K, scales [12], d.
/// Of the 16 six-bit scales, the first eight bytes hold the low nibbles, the last four the high bits.
fn unpack_q3_k(block: &[u8], j: usize, codes: &mut [i8; CHUNK], scale: &mut [f32]) {
    let d = f16_at(block, 108);
    let packed = &block[96..108];
    for (g, scale) in scale.iter_mut().enumerate() {
        let index = 2 * j + g;
        let low = if index < 8 { packed[index] & 15 } else { packed[index - 8] >> 4 };
        let high = packed[8 + index % 4] >> (2 * (index / 4)) & 3;
        *scale = d * ((low | high << 4) as i8 - 32) as f32;
    }
    let low = &block[32 + j / 4 * 32..];
    for (i, code) in codes.iter_mut().enumerate() {
        let high = (block[i] >> j & 1) as i8;
        *code = (low[i] >> (j % 4 * 2) & 3) as i8 + 4 * high - 4;
    }
}

/// The six-bit scale and min of chunk `j` in the 12 packed bytes of Q4_K and Q5_K.
fn scale_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let (low, scale_high, min_high) = (packed[j + 4], packed[j - 4] >> 6, packed[j] >> 6);
        (low & 15 | scale_high << 4, low >> 4 | min_high << 4)
    }
}

/// Q4_K: d, dmin, scales [12], qs [128]; 32 bytes hold chunk 2i in low and 2i + 1 in high nibbles.
fn unpack_q4_k(block: &[u8], j: usize, codes: &mut [i8; CHUNK], scale: &mut [f32], bias: &mut [f32]) {
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    let (s, m) = scale_min(&block[4..16], j);
    scale[0] = d * s as f32;
    bias[0] = -(dmin * m as f32);
    for (code, &byte) in codes.iter_mut().zip(&block[block.len() - 128 + j / 2 * 32..]) {
        *code = (byte >> (j % 2 * 4) & 15) as i8;
    }
}

/// Q5_K: Q4_K with qh [32] before qs; bit j of qh\[i\] is the fifth bit of element i of chunk j.
fn unpack_q5_k(block: &[u8], j: usize, codes: &mut [i8; CHUNK], scale: &mut [f32], bias: &mut [f32]) {
    unpack_q4_k(block, j, codes, scale, bias);
    for (code, &byte) in codes.iter_mut().zip(&block[16..48]) {
        *code |= (byte >> j << 4 & 16) as i8;
    }
}

/// Q6_K: ql [128], qh [64], scales [16] (i8), d. Each half of 128 elements: chunks 0 and 1 in the
/// low nibbles of 64 bytes, 2 and 3 in the high ones; chunk j's upper bits are bits 2j of 32 bytes.
fn unpack_q6_k(block: &[u8], j: usize, codes: &mut [i8; CHUNK], scale: &mut [f32]) {
    let d = f16_at(block, 208);
    for (g, scale) in scale.iter_mut().enumerate() {
        *scale = d * (block[192 + 2 * j + g] as i8) as f32;
    }
    let (half, j) = (j / 4, j % 4);
    let low = &block[64 * half + 32 * (j % 2)..];
    let high = &block[128 + 32 * half..];
    for (i, code) in codes.iter_mut().enumerate() {
        let q = low[i] >> (j / 2 * 4) & 15 | (high[i] >> (2 * j) & 3) << 4;
        *code = q as i8 - 32;
    }
}

/// IQ4_XS: d, scales_h (16 bits, two per chunk), scales_l [4] (a nibble per chunk), qs [128]; each
/// chunk's 16 bytes as in IQ4_NL.
fn unpack_iq4_xs(block: &[u8], j: usize, codes: &mut [i8; CHUNK], scale: &mut [f32]) {
    let low = block[4 + j / 2] >> (j % 2 * 4) & 15;
    let high = (u16::from_le_bytes([block[2], block[3]]) >> (2 * j) & 3) as u8;
    scale[0] = f16_at(block, 0) * ((low | high << 4) as i8 - 32) as f32;
    for (i, &byte) in block[8 + 16 * j..][..16].iter().enumerate() {
        codes[i] = IQ4_LEVELS[(byte & 15) as usize];
        codes[i + 16] = IQ4_LEVELS[(byte >> 4) as usize];
    }
}

/// Elements `start .. start + out.len()` of a stored row as floats.
///
/// For block types `start` and `out.len()` are multiples of 32; for float types they are free.
///
/// # Panics
/// If `row` isn't a whole number of blocks, or the range breaks these rules or exceeds the row.
pub fn dequantize(dtype: DType, row: &[u8], start: usize, out: &mut [f32]) {
    assert_range(dtype, row, start, out.len());
    match dtype {
        DType::F32 => {
            for (out, bytes) in out.iter_mut().zip(&row.as_chunks::<4>().0[start..]) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
        DType::F16 => {
            for (out, bytes) in out.iter_mut().zip(&row.as_chunks::<2>().0[start..]) {
                *out = f16::from_le_bytes(*bytes).to_f32();
            }
        }
        DType::BF16 => {
            for (out, bytes) in out.iter_mut().zip(&row.as_chunks::<2>().0[start..]) {
                *out = bf16::from_le_bytes(*bytes).to_f32();
            }
        }
        _ => dequantize_blocks(dtype, row, start, out),
    }
}

/// [`dequantize`] of a block type, which leaves the rules of its arguments to [`unpack`].
pub(crate) fn dequantize_blocks(dtype: DType, row: &[u8], start: usize, out: &mut [f32]) {
    let group = dtype.group_len();
    for (i, out) in out.as_chunks_mut::<CHUNK>().0.iter_mut().enumerate() {
        let (codes, scale, bias) = unpack_chunk(dtype, row, start + i * CHUNK);
        for (k, out) in out.iter_mut().enumerate() {
            *out = scale[k / group] * f32::from(codes[k]) + bias[k / group];
        }
    }
}

/// [`unpack`] of one chunk; of scales and biases, as many as it has groups are set. The other biases are −0, which
/// changes no number, not even a zero's sign.
#[inline(always)]
fn unpack_chunk(dtype: DType, row: &[u8], start: usize) -> ([i8; CHUNK], [f32; 2], [f32; 2]) {
    let groups = CHUNK / dtype.group_len();
    let biases = if dtype.has_bias() { groups } else { 0 };
    let (mut codes, mut scale, mut bias) = ([0; CHUNK], [0.0; 2], [-0.0; 2]);
    unpack(dtype, row, start, &mut codes, &mut scale[..groups], &mut bias[..biases]);
    (codes, scale, bias)
}

/// Dot product of a stored row of a block type with int8 activations:
/// `Σ_g xd · scale_g · (Σ code · xq) + bias_g · xs_g`, integer sums exact.
///
/// `xq` are the activations' codes in −127..=127, one per column; `xd` their scale, one per 32;
/// `xs` is `xd · Σ xq` per `dtype.group_len()` elements, and read only when `dtype.has_bias()`.
///
/// # Panics
/// If `dtype` is a float type or a length differs from this.
pub fn dot_row(dtype: DType, row: &[u8], xq: &[i8], xd: &[f32], xs: &[f32]) -> f32 {
    assert_dot(dtype, row, xq, xd, xs, 1);
    let group = dtype.group_len();
    let groups = CHUNK / group;
    let mut sum = 0.0;
    for (i, xq) in xq.chunks_exact(CHUNK).enumerate() {
        let (codes, scale, bias) = unpack_chunk(dtype, row, i * CHUNK);
        for g in 0..groups {
            let span = g * group..(g + 1) * group;
            let dot: i32 =
                codes[span.clone()].iter().zip(&xq[span]).map(|(&c, &x)| c as i32 * x as i32).sum();
            sum += xd[i] * scale[g] * dot as f32;
            if dtype.has_bias() {
                sum += bias[g] * xs[i * groups + g];
            }
        }
    }
    sum
}

/// [`dot_row`] for `out.len()` consecutive rows in `rows`.
///
/// # Panics
/// If `dtype` is a float type or a length differs from this.
pub fn dot_rows(dtype: DType, rows: &[u8], xq: &[i8], xd: &[f32], xs: &[f32], out: &mut [f32]) {
    assert_dot(dtype, rows, xq, xd, xs, out.len());
    let bytes = xq.len() / dtype.block_len() * dtype.block_bytes();
    for (r, out) in out.iter_mut().enumerate() {
        *out = dot_row(dtype, &rows[r * bytes..][..bytes], xq, xd, xs);
    }
}

/// The rules of [`dot_rows`]'s arguments, for every ISA's version of it.
#[track_caller]
pub(crate) fn assert_dot(dtype: DType, rows: &[u8], xq: &[i8], xd: &[f32], xs: &[f32], count: usize) {
    assert!(!dtype.is_float(), "{} has no codes", dtype.name());
    let bytes = dtype.row_bytes(xq.len()).and_then(|bytes| bytes.checked_mul(count));
    assert_eq!(bytes, Some(rows.len()), "rows: as many elements as xq in each");
    assert_eq!(xd.len(), xq.len() / CHUNK, "xd: one per 32 elements");
    if dtype.has_bias() {
        assert_eq!(xs.len(), xq.len() / dtype.group_len(), "xs: one per {} elements", dtype.group_len());
    }
}
