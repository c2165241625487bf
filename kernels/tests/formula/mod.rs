//! ggml's formulas, element by element: the judge of [`engraft_kernels::scalar::decode`], with which they
//! deliberately share no step.

use engraft_kernels::DType;
use engraft_kernels::scalar::decode::IQ4_LEVELS;
use half::f16;

/// A whole stored row of a block type as floats.
pub fn dequantize(dtype: DType, row: &[u8]) -> Vec<f32> {
    let blocks = row.chunks_exact(dtype.block_bytes());
    blocks.flat_map(|block| (0..dtype.block_len()).map(move |k| element(dtype, block, k))).collect()
}

fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Element `k` of a block.
fn element(dtype: DType, b: &[u8], k: usize) -> f32 {
    // Bit field helpers over the element's position: `nibble` of the split-halves layout of 32.
    let nibble = |qs: usize| (b[qs + k % 16] >> if k % 32 < 16 { 0 } else { 4 } & 15) as i32;
    let fifth = |qh: usize| ((b[qh + k / 8] >> (k % 8) & 1) as i32) << 4;
    // Position in a 256-element block: half of 128, lane in 32 bytes, and the chunk within the half.
    let (half, lane, quarter) = (k / 128, k % 32, k / 32 % 4);
    let two_bits = |qs: usize| (b[qs + 32 * half + lane] >> (2 * quarter) & 3) as i32;
    match dtype {
        DType::Q4_0 => f16_at(b, 0) * (nibble(2) - 8) as f32,
        DType::Q4_1 => f16_at(b, 0) * nibble(4) as f32 + f16_at(b, 2),
        DType::Q5_0 => f16_at(b, 0) * ((nibble(6) | fifth(2)) - 16) as f32,
        DType::Q5_1 => f16_at(b, 0) * (nibble(8) | fifth(4)) as f32 + f16_at(b, 2),
        DType::Q8_0 => f16_at(b, 0) * (b[2 + k] as i8) as f32,
        DType::IQ4_NL => f16_at(b, 0) * IQ4_LEVELS[nibble(2) as usize] as f32,
        DType::Q2_K => {
            let both = b[k / 16];
            f16_at(b, 80) * (both & 15) as f32 * two_bits(16) as f32 - f16_at(b, 82) * (both >> 4) as f32
        }
        DType::Q3_K => {
            let scale = six_bit_q3_k([u32_at(b, 96), u32_at(b, 100), u32_at(b, 104)], k / 16);
            let minus = if b[lane] & 1 << (k / 32) != 0 { 0 } else { 4 };
            f16_at(b, 108) * (scale - 32) as f32 * (two_bits(32) - minus) as f32
        }
        DType::Q4_K | DType::Q5_K => {
            let mut q = b[b.len() - 128 + k / 64 * 32 + lane] as i32 >> (4 * (k / 32 % 2)) & 15;
            if dtype == DType::Q5_K && b[16 + lane] & 1 << (k / 32) != 0 {
                q += 16;
            }
            let (scale, min) = six_bits_q4_k([u32_at(b, 4), u32_at(b, 8), u32_at(b, 12)], k / 32);
            f16_at(b, 0) * scale as f32 * q as f32 - f16_at(b, 2) * min as f32
        }
        DType::Q6_K => {
            let low = b[64 * half + k % 64] as i32 >> if k % 128 < 64 { 0 } else { 4 } & 15;
            let high = b[128 + 32 * half + lane] as i32 >> (2 * quarter) & 3;
            f16_at(b, 208) * (b[192 + k / 16] as i8) as f32 * ((low | high << 4) - 32) as f32
        }
        DType::IQ4_XS => {
            let low = u32_at(b, 4) >> (4 * (k / 32)) & 15;
            let high = u32_at(b, 0) >> 16 >> (2 * (k / 32)) & 3;
            let level = IQ4_LEVELS[nibble(8 + k / 32 * 16) as usize];
            f16_at(b, 0) * ((low | high << 4) as i32 - 32) as f32 * level as f32
        }
        DType::F32 | DType::F16 | DType::BF16 => unreachable!("floats have no blocks"),
    }
}

/// Scale `index` of Q3_K's 16, from the three little-endian words that pack them.
fn six_bit_q3_k(words: [u32; 3], index: usize) -> i32 {
    let byte = 8 * (index % 4);
    let low = words[index / 4 % 2] >> (byte + 4 * (index / 8)) & 15;
    let high = words[2] >> (byte + 2 * (index / 4)) & 3;
    (low | high << 4) as i32
}

/// Scale and min `index` of Q4_K's eight, from the three little-endian words that pack them.
fn six_bits_q4_k(words: [u32; 3], index: usize) -> (u32, u32) {
    let byte = 8 * (index % 4);
    let [scales, mins, lows] = words.map(|word| word >> byte & 255);
    match index {
        0..4 => (scales & 63, mins & 63),
        _ => (lows & 15 | (scales >> 6) << 4, lows >> 4 | (mins >> 6) << 4),
    }
}
