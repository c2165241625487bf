//! DoRA's gains c = m/‖W + s·B·A‖, one per output row, without ever forming W + s·B·A:
//!
//! ```text
//! ‖W_i + s·B_i·A‖² = ‖W_i‖² + 2s·Q_i·B_i,   Q = W·Aᵀ + (s/2)·B·(A·Aᵀ)
//! ```
//!
//! ‖W_i‖ is computed once, from the dequantized weights; Q costs one product of r rows with W for each new θ.
//! The gradient treats the norm as a constant (Liu et al., arXiv 2402.09353, section 4.3).

use engraft_kernels::{ColumnSum, Kernels, LowRank, NtOp, QMatrix, Rows, acts_words, gemm_scratch_words};

use super::{Gain, Pair};

/// f32 words for the norms and gains of `rows` output rows.
pub fn words(rows: usize) -> usize {
    2 * rows
}

/// f32 words of scratch for a projection of `outputs` rows with an adapter of rank `rank`: Qᵀ and A·Aᵀ.
pub fn scratch_words(outputs: usize, rank: usize) -> usize {
    rank * (outputs + rank)
}

/// f32 words of the kernels' scratch for a projection `[outputs, inputs]`.
pub fn kernel_words(outputs: usize, inputs: usize, rank: usize, threads: usize) -> usize {
    gemm_scratch_words(outputs, inputs, rank).max(inputs) * threads
}

/// Fills `gains` `[out]` of one projection: m divided by the norm of W + s·B·A, where `base` `[out]` holds the
/// norms of W. A row with norm zero gets 1.
///
/// Exactly 1 if B is zero and m is `base`. If `acts` has room for A's rows in int8, W·Aᵀ uses them, as the
/// forward's products do. It enters the norm only through B, so the rounding is scaled by the size of the
/// update relative to W. Without room it is exact to f32.
pub fn gains(
    kernels: &Kernels,
    w: &QMatrix<'_>,
    p: &Pair<'_>,
    m: &[f32],
    base: &[f32],
    gains: &mut [f32],
    scratch: &mut [f32],
    (kernel, acts): (&mut [f32], &mut [f32]),
) {
    let (r, n, k) = (p.rank, w.rows(), w.cols());
    let (q, rest) = scratch.split_at_mut(r * n);
    let aat = &mut rest[..r * r];
    kernels.skinny_nt(0.5 * p.scale, p.a, r, k, p.a, r, aat);
    let low = Some(LowRank { h: aat, b: p.bt, rank: r });
    let x = if kernels.int8_product(w) && w.dtype().group_len() == 32 && acts.len() >= acts_words(r, k) {
        Rows::Int8(kernels.quantize_gradient(p.a, r, k, acts))
    } else {
        Rows::F32(p.a)
    };
    kernels.qgemm_nt(r, &mut [NtOp { x, w: *w, low, gain: None, y: q, accumulate: false }], kernel);
    gains.fill(0.0);
    kernels.column_dots(p.bt, q, n, ColumnSum { out: gains, by: None });
    for ((g, m), base) in gains.iter_mut().zip(m).zip(base) {
        *g = gain(*m, *base, 2.0 * f64::from(p.scale) * f64::from(*g));
    }
}

/// m/n with n² = base² + grown, via (m − n)/n, which avoids cancellation: m and `base` are close, and n − base
/// = grown/(n + base).
fn gain(m: f32, base: f32, grown: f64) -> f32 {
    let (m, base) = (f64::from(m), f64::from(base));
    let norm = (base * base + grown).max(0.0).sqrt();
    if norm == 0.0 {
        return 1.0;
    }
    (1.0 + ((m - base) - grown / (norm + base)) / norm) as f32
}

impl<'a> Pair<'a> {
    /// The gains of its rows, if it is a DoRA.
    pub fn gains(&self) -> Option<&'a [f32]> {
        self.gain.map(|g| g.c)
    }
}

/// Where to add the gradient of m: Σ_t dy·y/m, which equals Σ_t dy·(y/c)/n without needing n.
pub(super) fn sum<'a>(gain: &Gain<'a>, out: &'a mut [f32]) -> ColumnSum<'a> {
    ColumnSum { out, by: Some(gain.m) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_gains_do_not_cancel() {
        // One part in ten million above the base, which f32 couldn't tell from 1.
        for (m, base, grown) in [(3.0f32, 3.0f32, 1.8e-6f64), (0.7, 0.7, -3e-8), (5.0, 5.0, 0.0)] {
            let n = (f64::from(base).powi(2) + grown).sqrt();
            let expected = f64::from(m) / n;
            assert_eq!(gain(m, base, grown), expected as f32);
        }
        assert_eq!(gain(1.1, 1.1, 0.0), 1.0);
        assert_eq!(gain(0.0, 0.0, 0.0), 1.0, "a row of zeros");
        assert!(gain(0.0, 0.0, 2.0).abs() < 1e-15);
        assert!(gain(1.0, 1.0, -1.5).is_finite(), "rounding below zero");
    }
}
