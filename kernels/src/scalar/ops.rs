//! The operations on rows, written as their formulas.

use crate::acts::{RowTarget, quantize_row};
use crate::items::{AdamWStep, SoftmaxState};

/// h[rows, r] = s · x[rows, k] · p[r, k]ᵀ.
pub(crate) fn dot_nt(s: f32, x: &[f32], rows: usize, k: usize, p: &[f32], r: usize, h: &mut [f32]) {
    for t in 0..rows {
        for j in 0..r {
            let dot: f32 = (0..k).map(|i| x[t * k + i] * p[j * k + i]).sum();
            h[t * r + j] = s * dot;
        }
    }
}

/// Columns `n0..n0 + cols` of out[r, n] (+)= p[m, r]ᵀ · q[m, n].
///
/// # Safety
/// `out` covers r × n, and nobody else uses these columns meanwhile.
pub(crate) unsafe fn outer_tn(
    p: &[f32],
    q: &[f32],
    m: usize,
    r: usize,
    n: usize,
    n0: usize,
    cols: usize,
    out: *mut f32,
    accumulate: bool,
) {
    for j in 0..r {
        for i in n0..n0 + cols {
            let dot: f32 = (0..m).map(|t| p[t * r + j] * q[t * n + i]).sum();
            // SAFETY: the caller's contract.
            let out = unsafe { &mut *out.add(j * n + i) };
            *out = if accumulate { *out + dot } else { dot };
        }
    }
}

/// Quantizes one row to int8 into its storage, with the sums that tiles of any instruction set start from.
///
/// # Safety
/// `t` is the storage of a row of x's length.
pub(crate) unsafe fn quantize_row_into(x: &[f32], halves: bool, t: RowTarget) {
    for (b, x) in x.chunks_exact(32).enumerate() {
        let (mut codes, mut scale) = ([0i8; 32], [0.0f32]);
        quantize_row(x, &mut codes, &mut scale);
        let sum = |codes: &[i8]| codes.iter().map(|c| i32::from(*c)).sum::<i32>();
        // SAFETY: the caller's contract.
        unsafe {
            let t = t.blocks(b);
            core::ptr::copy_nonoverlapping(codes.as_ptr(), t.codes, 32);
            *t.scale = scale[0];
            *t.start32 = -128 * sum(&codes);
            *t.bias_sum32 = scale[0] * sum(&codes) as f32;
            for h in 0..if halves { 2 } else { 0 } {
                let sum = sum(&codes[16 * h..16 * (h + 1)]);
                *t.start16.add(h * t.tile) = -128 * sum;
                *t.bias_sum16.add(h * t.tile) = scale[0] * sum as f32;
            }
        }
    }
}

/// y = x / sqrt(mean(x²) + eps) · w.
pub(crate) fn rmsnorm_row(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    let inv = inverse_rms(x, eps);
    for i in 0..x.len() {
        y[i] = x[i] * inv * w[i];
    }
}

/// dx += inv·(w∘dy) − x·inv³/d·Σ(w∘dy∘x).
pub(crate) fn rmsnorm_bwd_row(x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    let inv = inverse_rms(x, eps);
    let dot: f32 = (0..x.len()).map(|i| w[i] * dy[i] * x[i]).sum();
    let c = -inv * inv * inv / x.len() as f32 * dot;
    for i in 0..x.len() {
        dx[i] += dy[i] * w[i] * inv + x[i] * c;
    }
}

/// 1 / sqrt(mean(x²) + eps).
pub(crate) fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mean = x.iter().map(|v| f64::from(v * v)).sum::<f64>() as f32 / x.len() as f32;
    1.0 / libm::sqrtf(mean + eps)
}

/// Rotates interleaved pairs: (a, b) → (a·cos − b·sin, a·sin + b·cos); sign −1 rotates back.
pub(crate) fn rope_head(x: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    for i in 0..cos.len() {
        let (a, b, c, s) = (x[2 * i], x[2 * i + 1], cos[i], sin[i] * sign);
        x[2 * i] = a * c - b * s;
        x[2 * i + 1] = a * s + b * c;
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + libm::expf(-x))
}

/// h = g·σ(g)·u.
pub(crate) fn swiglu(g: &[f32], u: &[f32], h: &mut [f32]) {
    for i in 0..g.len() {
        h[i] = g[i] * sigmoid(g[i]) * u[i];
    }
}

/// In place g → dg, u → du.
pub(crate) fn swiglu_bwd(g: &mut [f32], u: &mut [f32], dh: &[f32]) {
    for i in 0..g.len() {
        let s = sigmoid(g[i]);
        let silu = g[i] * s;
        g[i] = dh[i] * u[i] * (s + silu * (1.0 - s));
        u[i] = dh[i] * silu;
    }
}

/// The same with gains; see `generic::rows::swiglu_bwd_gains`.
pub(crate) fn swiglu_bwd_gains(
    g: &mut [f32],
    u: &mut [f32],
    dh: &[f32],
    c: [&[f32]; 2],
    sums: [&mut [f32]; 2],
) {
    for i in 0..g.len() {
        let before = (g[i], u[i]);
        swiglu_bwd(&mut g[i..=i], &mut u[i..=i], &dh[i..=i]);
        sums[0][i] += g[i] * before.0;
        sums[1][i] += u[i] * before.1;
        g[i] *= c[0][i];
        u[i] *= c[1][i];
    }
}

/// `n` columns of one row backward through a gain; see `generic::rows::gain_bwd`.
///
/// # Safety
/// All pointers but a null `before` cover n elements.
pub(crate) unsafe fn gain_bwd(
    n: usize,
    dy: *const f32,
    (y, before): (*const f32, *const f32),
    c: *const f32,
    dz: *mut f32,
    sum: *mut f32,
) {
    for i in 0..n {
        // SAFETY: the caller's contract.
        unsafe {
            let before = if before.is_null() { 0.0 } else { *before.add(i) };
            let d = *dy.add(i);
            *sum.add(i) += d * (*y.add(i) - before);
            *dz.add(i) = d * *c.add(i);
        }
    }
}

/// One chunk of the running softmax; see `generic::rows::ce_chunk_row`.
pub(crate) fn ce_chunk_row(logits: &mut [f32], first_id: usize, target: usize, st: &mut SoftmaxState) -> f32 {
    if let Some(l) = target.checked_sub(first_id).and_then(|i| logits.get(i)) {
        st.target = *l;
    }
    let top = logits.iter().fold(st.max, |a, b| a.max(*b));
    let factor = if st.max == f32::NEG_INFINITY { 0.0 } else { libm::expf(st.max - top) };
    st.sum *= factor;
    for l in logits.iter_mut() {
        *l = libm::expf(*l - top);
        st.sum += *l;
    }
    st.max = top;
    factor
}

/// y += a·x.
pub(crate) fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

/// y = a·y.
pub(crate) fn scale(a: f32, y: &mut [f32]) {
    y.iter_mut().for_each(|y| *y *= a);
}

/// AdamW on one run.
pub(crate) fn adamw(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], s: &AdamWStep) {
    for i in 0..p.len() {
        let g = g[i] * s.grad_scale;
        m[i] = s.beta1 * m[i] + (1.0 - s.beta1) * g;
        v[i] = s.beta2 * v[i] + (1.0 - s.beta2) * g * g;
        let step = m[i] * s.correct1 / (libm::sqrtf(v[i] * s.correct2) + s.eps);
        p[i] = p[i] * (1.0 - s.lr * s.weight_decay) - s.lr * step;
    }
}
