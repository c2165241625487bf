//! Quantizes rows of f32 to stored blocks, for every type that can be read.
//!
//! candle quantizes the types it knows, if the feature `candle` is on. It doesn't know IQ4_NL and IQ4_XS; for
//! those, this module searches each group's scale for the least weighted square error over the sixteen levels.

use engraft_kernels::DType;
use engraft_kernels::scalar::decode::IQ4_LEVELS;
use half::f16;

use crate::error::{Error, ErrorKind, Result};

/// Elements that share a scale.
const GROUP: usize = 32;
/// Groups of an IQ4_XS block.
const GROUPS: usize = 8;
/// Scales tried on each side of the one that maps the largest element to the largest level.
const TRIES: i32 = 7;

/// Appends `rows`, each of `cols` elements (whole blocks of `dtype`), as stored blocks.
///
/// # Errors
/// `Misuse` if rows aren't whole blocks.
pub fn rows(dtype: DType, rows: &[f32], cols: usize, out: &mut Vec<u8>) -> Result<()> {
    let misuse = |e: &dyn std::fmt::Display| {
        Error::new(ErrorKind::Misuse, format!("quantizing rows of {cols} to {}: {e}", dtype.name()))
    };
    if dtype.row_bytes(cols).is_none() || !rows.len().is_multiple_of(cols) {
        return Err(misuse(&format_args!(
            "its blocks have {} elements; choose another type",
            dtype.block_len()
        )));
    }
    match dtype {
        DType::IQ4_NL => rows.chunks_exact(GROUP).for_each(|group| iq4_nl(group, out)),
        DType::IQ4_XS => rows.chunks_exact(GROUPS * GROUP).for_each(|block| iq4_xs(block, out)),
        _ => by_candle(dtype, rows, cols, out).map_err(|e| misuse(&e))?,
    }
    Ok(())
}

#[cfg(not(feature = "candle"))]
fn by_candle(_: DType, _: &[f32], _: usize, _: &mut Vec<u8>) -> std::result::Result<(), &'static str> {
    Err("this build lacks the feature candle, which provides the quantizers")
}

#[cfg(feature = "candle")]
fn by_candle(dtype: DType, rows: &[f32], cols: usize, out: &mut Vec<u8>) -> candle_core::Result<()> {
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    let known = match dtype {
        DType::F32 => GgmlDType::F32,
        DType::F16 => GgmlDType::F16,
        DType::BF16 => GgmlDType::BF16,
        DType::Q4_0 => GgmlDType::Q4_0,
        DType::Q4_1 => GgmlDType::Q4_1,
        DType::Q5_0 => GgmlDType::Q5_0,
        DType::Q5_1 => GgmlDType::Q5_1,
        DType::Q8_0 => GgmlDType::Q8_0,
        DType::Q2_K => GgmlDType::Q2K,
        DType::Q3_K => GgmlDType::Q3K,
        DType::Q4_K => GgmlDType::Q4K,
        DType::Q5_K => GgmlDType::Q5K,
        DType::Q6_K => GgmlDType::Q6K,
        DType::IQ4_NL | DType::IQ4_XS => candle_core::bail!("candle doesn't support this type"),
    };
    let tensor = Tensor::from_slice(rows, (rows.len() / cols, cols), &Device::Cpu)?;
    out.extend_from_slice(&QTensor::quantize(&tensor, known)?.data()?);
    Ok(())
}

/// The level nearest to a value.
fn nearest(value: f32) -> u8 {
    let above = IQ4_LEVELS.partition_point(|l| f32::from(*l) < value);
    if above == 0 {
        return 0;
    }
    if above == IQ4_LEVELS.len() {
        return above as u8 - 1;
    }
    let (low, high) = (f32::from(IQ4_LEVELS[above - 1]), f32::from(IQ4_LEVELS[above]));
    (if value - low < high - value { above - 1 } else { above }) as u8
}

fn level(code: u8) -> f32 {
    f32::from(IQ4_LEVELS[usize::from(code)])
}

/// The codes of a group at a scale; zeros at scale 0.
fn codes(group: &[f32], scale: f32) -> [u8; GROUP] {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    std::array::from_fn(|i| nearest(group[i] * inverse))
}

/// The group scale with the least error, with elements weighted by their squares. For fixed codes the best
/// scale is a quotient of two sums; candidate codes come from scales around the largest element's.
fn best_scale(group: &[f32]) -> f32 {
    let largest = group.iter().copied().fold(0.0_f32, |m, v| if v.abs() > m.abs() { v } else { m });
    if largest.abs() < 1e-15 {
        return 0.0;
    }
    let (mut best, mut scale) = (0.0_f32, 0.0);
    for try_ in -TRIES..=TRIES {
        for end in [level(0), level(15)] {
            let inverse = (end + try_ as f32) / largest;
            let (mut xq, mut qq) = (0.0_f32, 0.0_f32);
            for x in group {
                let (weight, q) = (x * x, level(nearest(x * inverse)));
                xq += weight * q * x;
                qq += weight * q * q;
            }
            if qq > 0.0 && xq * xq > best * qq {
                (best, scale) = (xq * xq / qq, xq / qq);
            }
        }
    }
    scale
}

/// Sixteen bytes: low nibbles hold the first half.
fn put_codes(codes: &[u8; GROUP], out: &mut Vec<u8>) {
    out.extend((0..GROUP / 2).map(|i| codes[i] | codes[i + GROUP / 2] << 4));
}

fn iq4_nl(group: &[f32], out: &mut Vec<u8>) {
    let scale = f16::from_f32(best_scale(group));
    out.extend_from_slice(&scale.to_le_bytes());
    put_codes(&codes(group, scale.to_f32()), out);
}

/// d, the groups' high bits, their low nibbles, the codes; a group's scale is d·(bits − 32).
fn iq4_xs(block: &[f32], out: &mut Vec<u8>) {
    let mut scales = [0.0_f32; GROUPS];
    for (scale, group) in scales.iter_mut().zip(block.chunks_exact(GROUP)) {
        *scale = best_scale(group);
    }
    let largest = scales.iter().copied().fold(0.0_f32, |m, v| if v.abs() > m.abs() { v } else { m });
    // The range is −32 to +31, so the largest takes the longer side.
    let d = f16::from_f32(-largest / 32.0);
    let inverse = if d.to_f32() == 0.0 { 0.0 } else { 1.0 / d.to_f32() };
    let bits = scales.map(|s| (s * inverse).round().clamp(-32.0, 31.0) as i32);
    let stored = bits.map(|b| (b + 32) as u16);
    out.extend_from_slice(&d.to_le_bytes());
    let high = stored.iter().enumerate().fold(0_u16, |h, (i, s)| h | (s >> 4) << (2 * i));
    out.extend_from_slice(&high.to_le_bytes());
    out.extend(stored.chunks_exact(2).map(|s| (s[0] & 15) as u8 | ((s[1] & 15) as u8) << 4));
    for (group, bits) in block.chunks_exact(GROUP).zip(bits) {
        put_codes(&codes(group, d.to_f32() * bits as f32), out);
    }
}

#[cfg(test)]
mod tests {
    use engraft_kernels::scalar::decode::dequantize;

    use super::*;
    use crate::rng::Rng;

    /// Relative root mean square error of a row of noise that is stored and read.
    fn error(dtype: DType) -> f64 {
        let mut rng = Rng::new(3, 1);
        let row: Vec<f32> = (0..4096).map(|_| 0.05 * rng.normal()).collect();
        let mut stored = Vec::new();
        rows(dtype, &row, 2048, &mut stored).expect("whole blocks");
        assert_eq!(stored.len(), 2 * dtype.row_bytes(2048).expect("whole blocks"));
        let mut back = vec![0.0; row.len()];
        for (out, bytes) in back.chunks_exact_mut(2048).zip(stored.chunks_exact(stored.len() / 2)) {
            dequantize(dtype, bytes, 0, out);
        }
        let sum = |f: &dyn Fn(usize) -> f32| (0..row.len()).map(|i| f64::from(f(i)).powi(2)).sum::<f64>();
        (sum(&|i| row[i] - back[i]) / sum(&|i| row[i])).sqrt()
    }

    #[test]
    fn every_type_is_read_as_written() {
        // About what the number of levels allows on normal noise, a third above what was measured.
        for (dtype, bound) in [
            (DType::F32, 0.0),
            (DType::F16, 4e-4),
            (DType::BF16, 3e-3),
            (DType::Q8_0, 0.008),
            (DType::Q6_K, 0.025),
            (DType::Q5_0, 0.06),
            (DType::Q5_1, 0.05),
            (DType::Q5_K, 0.05),
            (DType::Q4_0, 0.12),
            (DType::Q4_1, 0.1),
            (DType::Q4_K, 0.1),
            (DType::IQ4_NL, 0.1),
            (DType::IQ4_XS, 0.1),
            (DType::Q3_K, 0.25),
            (DType::Q2_K, 0.4),
        ] {
            let found = error(dtype);
            println!("{} {found:.4}", dtype.name());
            assert!(found <= bound, "{}: {found}", dtype.name());
        }
    }

    #[test]
    fn zeros_and_levels_are_exact() {
        for dtype in [DType::IQ4_NL, DType::IQ4_XS] {
            let levels: Vec<f32> = (0..256).map(|i| 0.5 * f32::from(IQ4_LEVELS[i * 7 % 16])).collect();
            for row in [vec![0.0; 256], levels] {
                let (mut stored, mut back) = (Vec::new(), vec![1.0; 256]);
                rows(dtype, &row, 256, &mut stored).expect("whole blocks");
                dequantize(dtype, &stored, 0, &mut back);
                let worst = row.iter().zip(&back).fold(0.0_f32, |m, (a, b)| m.max((a - b).abs()));
                // A scale of IQ4_XS is d·(bits − 32): d is rounded to f16.
                assert!(worst < 0.05, "{}: {worst}", dtype.name());
            }
        }
    }

    #[test]
    fn broken_blocks_are_refused() {
        let error = rows(DType::Q4_K, &[0.0; 64], 32, &mut Vec::new()).expect_err("half a block");
        assert!(error.message().contains("256"), "{error}");
    }
}
