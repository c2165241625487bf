//! The matrix products, written as their formulas, strip by strip.

use half::bf16;

use super::decode::dequantize;
use crate::acts::QuantActs;
use crate::items::{LowRank, NnItem, NtItem, Rows, TnItem};

/// Columns of a strip of the output.
pub(crate) const STRIP: usize = 32;

/// y[t, i] (+)= c[i]·(Σ_k x[t, k]·W[i, k] (+ Σ_j h[t, j]·b[j, i])) for the strip of i from `n0`.
///
/// # Safety
/// The item's shapes were checked, nobody else writes the strip, and the scratch holds a row of W.
pub(crate) unsafe fn nt_item(it: &NtItem<'_>, n0: usize, scratch: &mut [f32]) {
    let (n, k) = (it.w.rows(), it.w.cols());
    let w = &mut scratch[..k];
    for i in n0..n.min(n0 + STRIP) {
        dequantize(it.w.dtype(), it.w.row(i), 0, w);
        for t in 0..it.m {
            let product: f32 = (0..k).map(|c| element(&it.x, t * k, c) * w[c]).sum();
            let z = product + low_rank(it.low, t, i, n);
            let z = it.gain.map_or(z, |c| c[i] * z);
            // SAFETY: the caller's contract.
            let y = unsafe { &mut *it.y.add(t * n + i) };
            *y = if it.accumulate { *y + z } else { z };
        }
    }
}

/// Element `c` of the plain row of a matrix that begins at `at`.
fn element(x: &Rows<'_>, at: usize, c: usize) -> f32 {
    match x {
        Rows::F32(x) => x[at + c],
        Rows::Int8(x) => x.scale[(at + c) / 32] * f32::from(x.codes[at + c]),
        Rows::Bf16(x) => bf16::from_bits(x[at + c]).to_f32(),
    }
}

/// Σ_j h[t, j]·b[j, i] of b `[r, n]`.
fn low_rank(low: Option<LowRank<'_>>, t: usize, i: usize, n: usize) -> f32 {
    low.map_or(0.0, |l| (0..l.rank).map(|j| l.h[t * l.rank + j] * l.b[j * n + i]).sum())
}

/// dx[t, c] (+)= Σ_i dy[t, i]·W[i, c] (+ Σ_j h[t, j]·b[j, c]) for the strip of c from `c0`. With dy in int8 or bf16,
/// W's columns are rounded the same way. For int8 they are requantized in groups of 32 rows, with each group's
/// largest magnitude / 127 as its scale.
///
/// # Safety
/// As for [`nt_item`]; the strip is dx's.
pub(crate) unsafe fn nn_item(it: &NnItem<'_>, c0: usize, _: &mut [f32]) {
    let (n, k) = (it.w.rows(), it.w.cols());
    let width = STRIP.min(k - c0);
    for t in 0..it.m {
        for c in c0..c0 + width {
            // SAFETY: the caller's contract.
            let dx = unsafe { &mut *it.dx.add(t * k + c) };
            *dx = if it.accumulate { *dx } else { 0.0 } + low_rank(it.low, t, c, k);
        }
    }
    let mut group = [[0.0f32; STRIP]; 32];
    for first in (0..n).step_by(32) {
        let rows = 32.min(n - first);
        for (i, row) in group[..rows].iter_mut().enumerate() {
            dequantize(it.w.dtype(), it.w.row(first + i), c0, &mut row[..width]);
        }
        for (t, c) in (0..it.m).flat_map(|t| (0..width).map(move |c| (t, c))) {
            let column = |i: usize| group[i][c];
            let sum = match it.dy {
                Rows::Int8(dy) => int8_group(&dy, (t, n), first / 32, column),
                Rows::Bf16(_) => (0..rows)
                    .map(|i| element(&it.dy, t * n, first + i) * bf16::from_f32(column(i)).to_f32())
                    .sum(),
                Rows::F32(_) => (0..rows).map(|i| element(&it.dy, t * n, first + i) * column(i)).sum::<f32>(),
            };
            // SAFETY: the caller's contract.
            unsafe { *it.dx.add(t * k + c0 + c) += sum };
        }
    }
}

/// The products of group `g` of row t of dy `[m, n]` with a column, quantized.
fn int8_group(dy: &QuantActs<'_>, (t, n): (usize, usize), g: usize, column: impl Fn(usize) -> f32) -> f32 {
    let top = (0..32).fold(0.0f32, |top, i| top.max(column(i).abs()));
    let inverse = 127.0 / top.max(1e-30);
    let codes = &dy.codes[t * n + 32 * g..][..32];
    let dot = |i: usize| i32::from(codes[i]) * libm::rintf(column(i) * inverse) as i32;
    (0..32).map(dot).sum::<i32>() as f32 * (top / 127.0) * dy.scale[t * (n / 32) + g]
}

/// dw[i, c] (+)= Σ_t dy[t, i]·x[t, c] for the strip of c from `c0`.
///
/// # Safety
/// As for [`nt_item`]; the strip is dw's.
pub(crate) unsafe fn tn_item(it: &TnItem<'_>, c0: usize, _: &mut [f32]) {
    for i in 0..it.n {
        for c in c0..it.k.min(c0 + STRIP) {
            let sum: f32 = (0..it.m).map(|t| it.dy[t * it.n + i] * it.x[t * it.k + c]).sum();
            // SAFETY: the caller's contract.
            let dw = unsafe { &mut *it.dw.add(i * it.k + c) };
            *dw = if it.accumulate { *dw + sum } else { sum };
        }
    }
}

/// x rounded to bf16, to nearest, ties to even.
///
/// # Safety
/// `out` has x's length.
pub(crate) unsafe fn round_bf16(x: &[f32], out: *mut u16) {
    for (i, x) in x.iter().enumerate() {
        // SAFETY: the caller's contract.
        unsafe { *out.add(i) = bf16::from_f32(*x).to_bits() };
    }
}

/// 32 columns from `start` of successive rows of `row_bytes` each.
///
/// # Panics
/// If `bytes` has fewer rows than `out`, or a row is too short.
pub(crate) fn dequantize_strip(
    dtype: crate::block::DType,
    bytes: &[u8],
    row_bytes: usize,
    start: usize,
    out: &mut [[f32; STRIP]],
) {
    for (row, out) in bytes.chunks_exact(row_bytes).zip(out) {
        dequantize(dtype, row, start, out);
    }
}
