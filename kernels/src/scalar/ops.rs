//! The operations as their formulas read.

use half::bf16;

use super::decode::dequantize;
use crate::acts::QuantActs;
use crate::generic::adamw::AdamWStep;
use crate::generic::rows::AMAX_LEAST;
use crate::generic::rows::SoftmaxState;
use crate::view::QMatrix;

/// Visits W[r, c] for all elements in row order, decoding 32 at a time.
fn for_each_weight(w: &QMatrix<'_>, mut f: impl FnMut(usize, usize, f32)) {
    let mut buf = [0.0f32; 32];
    for r in 0..w.rows() {
        for c0 in (0..w.cols()).step_by(32) {
            let n = 32.min(w.cols() - c0);
            dequantize(w.dtype(), w.row(r), c0, &mut buf[..n]);
            for i in 0..n {
                f(r, c0 + i, buf[i]);
            }
        }
    }
}

/// y[m, n] (+)= x[m, k] · W[n, k]ᵀ.
pub fn qgemm_nt(x: &[f32], m: usize, w: &QMatrix<'_>, y: &mut [f32], accumulate: bool) {
    let (n, k) = (w.rows(), w.cols());
    if !accumulate {
        y[..m * n].fill(0.0);
    }
    for_each_weight(w, |r, c, v| {
        for t in 0..m {
            y[t * n + r] += x[t * k + c] * v;
        }
    });
}

/// The same for quantized activations: `x[i] = scale[i/32]·code[i]`.
pub fn qgemm_nt_int8(x: &QuantActs<'_>, m: usize, w: &QMatrix<'_>, y: &mut [f32], accumulate: bool) {
    let (n, k) = (w.rows(), w.cols());
    if !accumulate {
        y[..m * n].fill(0.0);
    }
    for_each_weight(w, |r, c, v| {
        for t in 0..m {
            let s = x.scale[(t * k + c) / 32];
            y[t * n + r] += s * f32::from(x.codes[t * k + c]) * v;
        }
    });
}

/// dx[m, k] (+)= dy[m, n] · W[n, k].
pub fn qgemm_nn(dy: &[f32], m: usize, w: &QMatrix<'_>, dx: &mut [f32], accumulate: bool) {
    let (n, k) = (w.rows(), w.cols());
    if !accumulate {
        dx[..m * k].fill(0.0);
    }
    for_each_weight(w, |r, c, v| {
        for t in 0..m {
            dx[t * k + c] += dy[t * n + r] * v;
        }
    });
}

/// x rounded to bf16, to nearest, ties to even.
pub fn round_bf16(x: &[f32], out: &mut [u16]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = bf16::from_f32(*x).to_bits();
    }
}

/// [`qgemm_nn`] with gradients in bf16 and W rounded to bf16; sums in f32.
pub fn qgemm_nn_bf16(dy: &[u16], m: usize, w: &QMatrix<'_>, dx: &mut [f32], accumulate: bool) {
    let (n, k) = (w.rows(), w.cols());
    if !accumulate {
        dx[..m * k].fill(0.0);
    }
    for_each_weight(w, |r, c, v| {
        for t in 0..m {
            dx[t * k + c] += bf16::from_bits(dy[t * n + r]).to_f32() * bf16::from_f32(v).to_f32();
        }
    });
}

/// The same with int8 gradients: W's columns are quantized anew in groups of 32 rows, each group's
/// scale its largest magnitude / 127. W has whole groups and blocks of 32 columns.
pub fn qgemm_nn_int8(dy: &QuantActs<'_>, m: usize, w: &QMatrix<'_>, dx: &mut [f32], accumulate: bool) {
    let (n, k) = (w.rows(), w.cols());
    if !accumulate {
        dx[..m * k].fill(0.0);
    }
    let mut block = [[0.0f32; 32]; 32];
    for (g, c0) in (0..n / 32).flat_map(|g| (0..k).step_by(32).map(move |c0| (g, c0))) {
        for (i, row) in block.iter_mut().enumerate() {
            dequantize(w.dtype(), w.row(32 * g + i), c0, row);
        }
        for c in 0..32 {
            let amax = block.iter().fold(0.0f32, |a, row| a.max(row[c].abs()));
            let inv = 127.0 / amax.max(1e-30);
            for t in 0..m {
                let codes = &dy.codes[t * n + 32 * g..][..32];
                let dot = |i: usize| i32::from(codes[i]) * libm::rintf(block[i][c] * inv) as i32;
                let sum: i32 = (0..32).map(dot).sum();
                dx[t * k + c0 + c] += sum as f32 * (amax / 127.0) * dy.scale[t * (n / 32) + g];
            }
        }
    }
}

/// y[m, n] += h[m, r] · b[r, n].
pub fn add_low_rank(h: &[f32], m: usize, b: &[f32], r: usize, n: usize, y: &mut [f32]) {
    for t in 0..m {
        for j in 0..r {
            for i in 0..n {
                y[t * n + i] += h[t * r + j] * b[j * n + i];
            }
        }
    }
}

/// h[m, r] = s · x[m, k] · p[r, k]ᵀ.
pub fn skinny_nt(s: f32, x: &[f32], m: usize, k: usize, p: &[f32], r: usize, h: &mut [f32]) {
    for t in 0..m {
        for j in 0..r {
            let dot: f32 = (0..k).map(|i| x[t * k + i] * p[j * k + i]).sum();
            h[t * r + j] = s * dot;
        }
    }
}

/// out[r, n] (+)= p[m, r]ᵀ · q[m, n].
pub fn skinny_tn(p: &[f32], q: &[f32], m: usize, r: usize, n: usize, out: &mut [f32], accumulate: bool) {
    for j in 0..r {
        for i in 0..n {
            let dot: f32 = (0..m).map(|t| p[t * r + j] * q[t * n + i]).sum();
            out[j * n + i] = if accumulate { out[j * n + i] + dot } else { dot };
        }
    }
}

/// dw[n, k] (+)= dy[m, n]ᵀ · x[m, k].
pub fn gemm_tn(dy: &[f32], x: &[f32], m: usize, n: usize, k: usize, dw: &mut [f32], accumulate: bool) {
    if !accumulate {
        dw.fill(0.0);
    }
    for t in 0..m {
        for i in 0..n {
            for j in 0..k {
                dw[i * k + j] += dy[t * n + i] * x[t * k + j];
            }
        }
    }
}

/// Quantizes one row to int8 in blocks of 32 (scale = max|x| / 127).
pub fn quantize_row(x: &[f32], codes: &mut [i8], scale: &mut [f32]) {
    for (b, block) in x.chunks_exact(32).enumerate() {
        let amax = block.iter().fold(AMAX_LEAST, |a, v| a.max(v.abs()));
        // Codes can't hold what is no number: the scale does.
        scale[b] = if block.iter().all(|v| v.is_finite()) { amax / 127.0 } else { f32::NAN };
        let inv = 127.0 / amax;
        for (i, v) in block.iter().enumerate() {
            codes[b * 32 + i] = libm::rintf(v * inv) as i8;
        }
    }
}

/// y = x / sqrt(mean(x²) + eps) · w.
pub fn rmsnorm_row(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    let inv = inverse_rms(x, eps);
    for i in 0..x.len() {
        y[i] = x[i] * inv * w[i];
    }
}

/// dx += inv·(w∘dy) − x·inv³/d·Σ(w∘dy∘x).
pub fn rmsnorm_bwd_row(x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    let inv = inverse_rms(x, eps);
    let dot: f32 = (0..x.len()).map(|i| w[i] * dy[i] * x[i]).sum();
    let c = -inv * inv * inv / x.len() as f32 * dot;
    for i in 0..x.len() {
        dx[i] += dy[i] * w[i] * inv + x[i] * c;
    }
}

/// dw += x∘dy / sqrt(mean(x²) + eps).
pub fn rmsnorm_weight_bwd_row(x: &[f32], eps: f32, dy: &[f32], dw: &mut [f32]) {
    let inv = inverse_rms(x, eps);
    for i in 0..x.len() {
        dw[i] += dy[i] * x[i] * inv;
    }
}

/// 1 / sqrt(mean(x²) + eps).
pub fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mean = x.iter().map(|v| f64::from(v * v)).sum::<f64>() as f32 / x.len() as f32;
    1.0 / libm::sqrtf(mean + eps)
}

/// Rotates interleaved pairs: (a, b) → (a·cos − b·sin, a·sin + b·cos); sign −1 rotates back.
pub fn rope_head(x: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
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
pub fn swiglu(g: &[f32], u: &[f32], h: &mut [f32]) {
    for i in 0..g.len() {
        h[i] = g[i] * sigmoid(g[i]) * u[i];
    }
}

/// In place g → dg, u → du.
pub fn swiglu_bwd(g: &mut [f32], u: &mut [f32], dh: &[f32]) {
    for i in 0..g.len() {
        let s = sigmoid(g[i]);
        let silu = g[i] * s;
        g[i] = dh[i] * u[i] * (s + silu * (1.0 - s));
        u[i] = dh[i] * silu;
    }
}

/// The same behind gains; see `generic::rows::swiglu_bwd_gains`.
pub fn swiglu_bwd_gains(g: &mut [f32], u: &mut [f32], dh: &[f32], c: [&[f32]; 2], sums: [&mut [f32]; 2]) {
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
pub unsafe fn gain_bwd(
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
pub fn ce_chunk_row(logits: &mut [f32], first_id: usize, target: usize, st: &mut SoftmaxState) -> f32 {
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

/// Strides of one head's rows within wider matrices.
#[derive(Clone, Copy, Debug)]
pub struct HeadRows {
    /// Query rows.
    pub t: usize,
    /// Keys before the first query row.
    pub past: usize,
    /// Elements per head.
    pub hd: usize,
    /// Elements from one query (or output) row to the next.
    pub q_row: usize,
    /// Elements from one key (or value) row to the next.
    pub kv_row: usize,
}

impl HeadRows {
    fn scale(&self) -> f32 {
        1.0 / libm::sqrtf(self.hd as f32)
    }

    fn score(&self, q: &[f32], k: &[f32], i: usize, j: usize) -> f32 {
        (0..self.hd).map(|e| q[i * self.q_row + e] * k[j * self.kv_row + e]).sum::<f32>() * self.scale()
    }
}

/// One head's causal attention; slices start at the head's first element.
pub fn attention(s: HeadRows, q: &[f32], k: &[f32], v: &[f32], o: &mut [f32], mut lse: Option<&mut [f32]>) {
    for i in 0..s.t {
        let own = s.past + i;
        let top = (0..=own).map(|j| s.score(q, k, i, j)).fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = (0..=own).map(|j| libm::expf(s.score(q, k, i, j) - top)).sum();
        if let Some(l) = lse.as_deref_mut() {
            l[i] = top + libm::logf(sum);
        }
        let row = &mut o[i * s.q_row..i * s.q_row + s.hd];
        row.fill(0.0);
        for j in 0..=own {
            let p = libm::expf(s.score(q, k, i, j) - top) / sum;
            for e in 0..s.hd {
                row[e] += p * v[j * s.kv_row + e];
            }
        }
    }
}

/// Gradients of [`attention`]: dq has the stride of q, dk and dv are `[keys, hd]` of this head alone.
pub fn attention_bwd(
    s: HeadRows,
    (q, k, v): (&[f32], &[f32], &[f32]),
    (o, lse, d_o): (&[f32], &[f32], &[f32]),
    (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
) {
    dk.fill(0.0);
    dv.fill(0.0);
    for i in 0..s.t {
        let at = i * s.q_row;
        let d: f32 = (0..s.hd).map(|e| o[at + e] * d_o[at + e]).sum();
        dq[at..at + s.hd].fill(0.0);
        for j in 0..=s.past + i {
            let p = libm::expf(s.score(q, k, i, j) - lse[i]);
            let dp: f32 = (0..s.hd).map(|e| d_o[at + e] * v[j * s.kv_row + e]).sum();
            let ds = p * (dp - d) * s.scale();
            for e in 0..s.hd {
                dq[at + e] += ds * k[j * s.kv_row + e];
                dk[j * s.hd + e] += ds * q[at + e];
                dv[j * s.hd + e] += p * d_o[at + e];
            }
        }
    }
}

/// AdamW on one run.
pub fn adamw(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], s: &AdamWStep) {
    for i in 0..p.len() {
        let g = g[i] * s.grad_scale;
        m[i] = s.beta1 * m[i] + (1.0 - s.beta1) * g;
        v[i] = s.beta2 * v[i] + (1.0 - s.beta2) * g * g;
        let step = m[i] * s.correct1 / (libm::sqrtf(v[i] * s.correct2) + s.eps);
        p[i] = p[i] * (1.0 - s.lr * s.weight_decay) - s.lr * step;
    }
}
