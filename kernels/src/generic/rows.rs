//! Operations on one row or one run of elements: norm, quantization, rope, SwiGLU, cross-entropy.

use super::simd::{Simd, exp};
use crate::acts::{AMAX_LEAST, RowTarget};
use crate::items::SoftmaxState;

/// Runs `body` over whole vectors of `0..n`; the caller handles the rest from the returned index.
macro_rules! vectors {
    ($s:ty, $n:expr, $i:ident, $body:block) => {{
        let mut $i = 0;
        while $i + <$s>::LANES <= $n {
            $body
            $i += <$s>::LANES;
        }
        $i
    }};
}

/// Σ x², accumulated in f64 like ggml: every activation of the layer depends on it.
#[inline(always)]
fn sum_squares(x: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f64; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for i in 0..LANES {
            sums[i] += f64::from(x[i] * x[i]);
        }
    }
    let rest: f64 = rest.iter().map(|v| f64::from(v * v)).sum();
    (sums.iter().sum::<f64>() + rest) as f32
}

/// y = x / sqrt(mean(x²) + eps) · w.
///
/// # Safety
/// Equal lengths; S's features are present.
#[inline(always)]
pub unsafe fn rmsnorm_row<S: Simd>(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    // SAFETY: the caller's contract.
    unsafe {
        let inv = 1.0 / libm::sqrtf(sum_squares(x) / x.len() as f32 + eps);
        let done = vectors!(S, x.len(), i, {
            let v = S::mul(S::load(x.as_ptr().add(i)), S::splat(inv));
            S::store(y.as_mut_ptr().add(i), S::mul(v, S::load(w.as_ptr().add(i))));
        });
        for i in done..x.len() {
            y[i] = x[i] * inv * w[i];
        }
    }
}

/// dx += d rmsnorm(x)·w / dx applied to dy: inv·(w∘dy) − x·inv³/d·Σ(w∘dy∘x).
///
/// # Safety
/// Equal lengths; S's features are present.
#[inline(always)]
pub unsafe fn rmsnorm_bwd_row<S: Simd>(x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    // SAFETY: the caller's contract.
    unsafe {
        let d = x.len() as f32;
        let inv = 1.0 / libm::sqrtf(sum_squares(x) / d + eps);
        let mut acc = S::zero();
        let done = vectors!(S, x.len(), i, {
            let g = S::mul(S::load(dy.as_ptr().add(i)), S::load(w.as_ptr().add(i)));
            acc = S::fma(g, S::load(x.as_ptr().add(i)), acc);
        });
        let mut dot = S::sum(acc);
        for i in done..x.len() {
            dot += dy[i] * w[i] * x[i];
        }
        let c = -inv * inv * inv / d * dot;
        vectors!(S, x.len(), i, {
            let g = S::mul(S::load(dy.as_ptr().add(i)), S::load(w.as_ptr().add(i)));
            let t = S::fma(g, S::splat(inv), S::load(dx.as_ptr().add(i)));
            S::store(dx.as_mut_ptr().add(i), S::fma(S::load(x.as_ptr().add(i)), S::splat(c), t));
        });
        for i in done..x.len() {
            dx[i] += dy[i] * w[i] * inv + x[i] * c;
        }
    }
}

/// Quantizes one row to int8 in blocks of 32: scale = max|x| / 127, codes rounded to nearest even. With
/// `halves`, the sums of 16 are written too, which only types with groups of 16 read.
///
/// # Safety
/// `x.len()` is a multiple of 32, `t` is that row's storage; S's features are present.
#[inline(always)]
pub unsafe fn quantize_row<S: Simd>(x: &[f32], halves: bool, t: RowTarget) {
    for (i, x) in x.chunks(32 * S::LANES).enumerate() {
        // SAFETY: the caller's contract; the storage of later blocks follows that of earlier ones.
        unsafe { quantize_blocks::<S>(x, halves, t.blocks(i * S::LANES)) };
    }
}

/// Up to LANES blocks, so values computed once per block fill a vector.
#[inline(always)]
unsafe fn quantize_blocks<S: Simd>(x: &[f32], halves: bool, t: RowTarget) {
    let (n, lanes) = (x.len() / 32, S::LANES);
    let mut first = [0.0f32; 256];
    let mut second = [0.0f32; 256];
    let (mut scale, mut inverse, mut sums) = ([0.0f32; 16], [0.0f32; 16], [[0.0f32; 16]; 2]);
    // SAFETY: loads and stores stay within x, within LANES rows of LANES in the buffers, and within the
    // storage of n blocks.
    unsafe {
        for i in 0..n {
            let p = x.as_ptr().add(32 * i);
            let mut top = S::abs(S::load(p));
            for j in (lanes..32).step_by(lanes) {
                top = S::max(top, S::abs(S::load(p.add(j))));
            }
            S::store(first.as_mut_ptr().add(i * lanes), top);
        }
        let top = S::max(across::<S, true>(&first), S::splat(AMAX_LEAST));
        S::store(scale.as_mut_ptr(), S::div(top, S::splat(127.0)));
        S::store(inverse.as_mut_ptr(), S::div(S::splat(127.0), top));
        for i in 0..n {
            let (p, codes) = (x.as_ptr().add(32 * i), t.codes.add(32 * i * t.tile));
            let inverse = S::splat(inverse[i]);
            let mut sum = [S::zero(); 2];
            for h in 0..2 {
                for j in (16 * h..16 * h + 16).step_by(lanes) {
                    let q = S::round(S::mul(S::load(p.add(j)), inverse));
                    S::store_i8(codes.add(j), q);
                    sum[h] = S::add(sum[h], q);
                }
            }
            if halves {
                S::store(second.as_mut_ptr().add(i * lanes), sum[1]);
            } else {
                sum[0] = S::add(sum[0], sum[1]);
            }
            S::store(first.as_mut_ptr().add(i * lanes), sum[0]);
        }
        S::store(sums[0].as_mut_ptr(), across::<S, false>(&first));
        if halves {
            S::store(sums[1].as_mut_ptr(), across::<S, false>(&second));
        }
        for i in 0..n {
            let (at, sum) = (i * t.tile, sums[0][i] + sums[1][i]);
            // Neither the largest element nor the codes show a NaN. Without this, NaN inputs would yield
            // ordinary numbers.
            let scale = if sum.is_nan() { sum } else { scale[i] };
            *t.scale.add(at) = scale;
            *t.bias_sum32.add(at) = scale * sum;
            *t.start32.add(at) = start(sum);
            for h in 0..if halves { 2 } else { 0 } {
                let at = (2 * i + h) * t.tile;
                *t.bias_sum16.add(at) = scale * sums[h][i];
                *t.start16.add(at) = start(sums[h][i]);
            }
        }
    }
}

/// The start value for a sum of codes. Codes from NaN have no sum; their scale marks them.
#[inline(always)]
fn start(sum: f32) -> i32 {
    (sum as i32).wrapping_mul(-128)
}

/// Lane i: the largest element, or the sum, of row i of LANES × LANES.
#[inline(always)]
unsafe fn across<S: Simd, const MAX: bool>(rows: &[f32; 256]) -> S::F {
    let mut columns = [0.0f32; 256];
    // SAFETY: S's features are present where any kernel of S runs; LANES² is at most 256.
    unsafe {
        S::transpose(rows.as_ptr(), S::LANES, columns.as_mut_ptr(), S::LANES);
        let mut all = S::load(columns.as_ptr());
        for j in 1..S::LANES {
            let column = S::load(columns.as_ptr().add(j * S::LANES));
            all = if MAX { S::max(all, column) } else { S::add(all, column) };
        }
        all
    }
}

/// Rotates interleaved pairs of one head's first `2·cos.len()` elements; `sign` −1 rotates back.
///
/// # Safety
/// `x` has at least `2·cos.len()` elements; S's features are present.
#[inline(always)]
pub unsafe fn rope_head<S: Simd>(x: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    // SAFETY: the caller's contract.
    unsafe {
        let half = cos.len();
        let done = vectors!(S, half, i, {
            let p = x.as_mut_ptr().add(2 * i);
            let (a, b) = S::deinterleave(S::load(p), S::load(p.add(S::LANES)));
            let c = S::load(cos.as_ptr().add(i));
            let s = S::mul(S::load(sin.as_ptr().add(i)), S::splat(sign));
            let ra = S::sub(S::mul(a, c), S::mul(b, s));
            let rb = S::fma(a, s, S::mul(b, c));
            let (lo, hi) = S::interleave(ra, rb);
            S::store(p, lo);
            S::store(p.add(S::LANES), hi);
        });
        for i in done..half {
            let (a, b, c, s) = (x[2 * i], x[2 * i + 1], cos[i], sin[i] * sign);
            x[2 * i] = a * c - b * s;
            x[2 * i + 1] = a * s + b * c;
        }
    }
}

#[inline(always)]
unsafe fn sigmoid<S: Simd>(x: S::F) -> S::F {
    // SAFETY: S's features are present.
    unsafe {
        let e = exp::<S>(S::sub(S::zero(), x));
        S::div(S::splat(1.0), S::add(S::splat(1.0), e))
    }
}

/// h = silu(g)·u = g·σ(g)·u.
///
/// # Safety
/// Equal lengths; S's features are present.
#[inline(always)]
pub unsafe fn swiglu<S: Simd>(g: &[f32], u: &[f32], h: &mut [f32]) {
    // SAFETY: the caller's contract.
    unsafe {
        let done = vectors!(S, g.len(), i, {
            let gv = S::load(g.as_ptr().add(i));
            let s = S::mul(gv, sigmoid::<S>(gv));
            S::store(h.as_mut_ptr().add(i), S::mul(s, S::load(u.as_ptr().add(i))));
        });
        for i in done..g.len() {
            let mut b = [[0.0f32; 16]; 3];
            (b[0][0], b[1][0]) = (g[i], u[i]);
            let gv = S::load(b[0].as_ptr());
            let s = S::mul(gv, sigmoid::<S>(gv));
            S::store(b[2].as_mut_ptr(), S::mul(s, S::load(b[1].as_ptr())));
            h[i] = b[2][0];
        }
    }
}

/// (dg, du) of silu(g)·u.
#[inline(always)]
unsafe fn swiglu_grad<S: Simd>(g: S::F, u: S::F, dh: S::F) -> (S::F, S::F) {
    // SAFETY: S's features are present.
    unsafe {
        let s = sigmoid::<S>(g);
        let silu = S::mul(g, s);
        // silu' = σ + silu·(1 − σ)
        let slope = S::fma(silu, S::sub(S::splat(1.0), s), s);
        (S::mul(S::mul(dh, u), slope), S::mul(dh, silu))
    }
}

/// In place g → dg, u → du for h = silu(g)·u, given dh.
///
/// # Safety
/// Equal lengths; S's features are present.
#[inline(always)]
pub unsafe fn swiglu_bwd<S: Simd>(g: &mut [f32], u: &mut [f32], dh: &[f32]) {
    // SAFETY: the caller's contract.
    unsafe {
        let done = vectors!(S, dh.len(), i, {
            let (gp, up) = (g.as_mut_ptr().add(i), u.as_mut_ptr().add(i));
            let (dg, du) = swiglu_grad::<S>(S::load(gp), S::load(up), S::load(dh.as_ptr().add(i)));
            S::store(gp, dg);
            S::store(up, du);
        });
        for i in done..dh.len() {
            let mut b = [[0.0f32; 16]; 3];
            (b[0][0], b[1][0], b[2][0]) = (g[i], u[i], dh[i]);
            let (dg, du) =
                swiglu_grad::<S>(S::load(b[0].as_ptr()), S::load(b[1].as_ptr()), S::load(b[2].as_ptr()));
            S::store(b[0].as_mut_ptr(), dg);
            S::store(b[1].as_mut_ptr(), du);
            (g[i], u[i]) = (b[0][0], b[1][0]);
        }
    }
}

/// [`swiglu_bwd`] for part of a row whose g and u were multiplied by gains c: adds dg·g and du·u to `sums`, and
/// leaves dg·c and du·c.
///
/// # Safety
/// Equal lengths; S's features are present.
#[inline(always)]
pub unsafe fn swiglu_bwd_gains<S: Simd>(
    g: &mut [f32],
    u: &mut [f32],
    dh: &[f32],
    c: [&[f32]; 2],
    sums: [&mut [f32]; 2],
) {
    let [sum_g, sum_u] = sums;
    // SAFETY: the caller's contract.
    unsafe {
        let done = vectors!(S, dh.len(), i, {
            let (gp, up) = (g.as_mut_ptr().add(i), u.as_mut_ptr().add(i));
            let (gv, uv) = (S::load(gp), S::load(up));
            let (dg, du) = swiglu_grad::<S>(gv, uv, S::load(dh.as_ptr().add(i)));
            let (sg, su) = (sum_g.as_mut_ptr().add(i), sum_u.as_mut_ptr().add(i));
            S::store(sg, S::fma(dg, gv, S::load(sg)));
            S::store(su, S::fma(du, uv, S::load(su)));
            S::store(gp, S::mul(dg, S::load(c[0].as_ptr().add(i))));
            S::store(up, S::mul(du, S::load(c[1].as_ptr().add(i))));
        });
        for i in done..dh.len() {
            let before = (g[i], u[i]);
            swiglu_bwd::<S>(&mut g[i..=i], &mut u[i..=i], &dh[i..=i]);
            sum_g[i] += g[i] * before.0;
            sum_u[i] += u[i] * before.1;
            g[i] *= c[0][i];
            u[i] *= c[1][i];
        }
    }
}

/// `n` columns of one row, backward through y = before + c∘z: sum += dy·(y − before), dz = dy·c. A null
/// `before` is zero; dz may be dy.
///
/// # Safety
/// All pointers but a null `before` cover n elements; S's features are present.
#[inline(always)]
pub unsafe fn gain_bwd<S: Simd>(
    n: usize,
    dy: *const f32,
    (y, before): (*const f32, *const f32),
    c: *const f32,
    dz: *mut f32,
    sum: *mut f32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let done = vectors!(S, n, i, {
            let dv = S::load(dy.add(i));
            let mut yv = S::load(y.add(i));
            if !before.is_null() {
                yv = S::sub(yv, S::load(before.add(i)));
            }
            S::store(sum.add(i), S::fma(dv, yv, S::load(sum.add(i))));
            S::store(dz.add(i), S::mul(dv, S::load(c.add(i))));
        });
        for i in done..n {
            let before = if before.is_null() { 0.0 } else { *before.add(i) };
            let d = *dy.add(i);
            *sum.add(i) += d * (*y.add(i) - before);
            *dz.add(i) = d * *c.add(i);
        }
    }
}

/// y += a·x.
///
/// # Safety
/// Equal lengths; S's features are present.
#[inline(always)]
pub unsafe fn axpy<S: Simd>(a: f32, x: &[f32], y: &mut [f32]) {
    // SAFETY: the caller's contract.
    unsafe {
        let done = vectors!(S, x.len(), i, {
            let v = S::fma(S::splat(a), S::load(x.as_ptr().add(i)), S::load(y.as_ptr().add(i)));
            S::store(y.as_mut_ptr().add(i), v);
        });
        for i in done..x.len() {
            y[i] += a * x[i];
        }
    }
}

/// y = a·y.
///
/// # Safety
/// S's features are present.
#[inline(always)]
pub unsafe fn scale<S: Simd>(a: f32, y: &mut [f32]) {
    // SAFETY: the caller's contract.
    unsafe {
        let done = vectors!(S, y.len(), i, {
            let p = y.as_mut_ptr().add(i);
            S::store(p, S::mul(S::splat(a), S::load(p)));
        });
        for v in &mut y[done..] {
            *v *= a;
        }
    }
}

/// Largest element; −∞ for an empty run.
///
/// # Safety
/// S's features are present.
#[inline(always)]
pub unsafe fn max<S: Simd>(x: &[f32]) -> f32 {
    // SAFETY: the caller's contract.
    unsafe {
        let mut top = S::splat(f32::NEG_INFINITY);
        let done = vectors!(S, x.len(), i, {
            top = S::max(S::load(x.as_ptr().add(i)), top);
        });
        x[done..].iter().fold(S::hmax(top), |a, b| a.max(*b))
    }
}

/// x = e^(x·c − m) in place; returns the sum.
///
/// # Safety
/// S's features are present.
#[inline(always)]
pub unsafe fn exp_sum<S: Simd>(x: &mut [f32], c: f32, m: f32) -> f32 {
    // SAFETY: the caller's contract.
    unsafe {
        let mut acc = S::zero();
        let done = vectors!(S, x.len(), i, {
            let p = x.as_mut_ptr().add(i);
            let e = exp::<S>(S::fma(S::load(p), S::splat(c), S::splat(-m)));
            acc = S::add(acc, e);
            S::store(p, e);
        });
        let mut total = S::sum(acc);
        for i in done..x.len() {
            let mut b = [x[i]; 16];
            S::store(b.as_mut_ptr(), exp::<S>(S::fma(S::load(b.as_ptr()), S::splat(c), S::splat(-m))));
            x[i] = b[0];
            total += b[0];
        }
        total
    }
}

/// The dot product of two runs.
///
/// # Safety
/// Equal lengths; S's features are present.
#[inline(always)]
pub unsafe fn dot<S: Simd>(a: &[f32], b: &[f32]) -> f32 {
    // SAFETY: the caller's contract.
    unsafe {
        let mut acc = S::zero();
        let done = vectors!(S, a.len(), i, {
            acc = S::fma(S::load(a.as_ptr().add(i)), S::load(b.as_ptr().add(i)), acc);
        });
        let mut s = S::sum(acc);
        for i in done..a.len() {
            s += a[i] * b[i];
        }
        s
    }
}

/// Folds one chunk of a row's logits into its state; logits become e^(logit − max), and the factor by
/// which everything accumulated before must be multiplied is returned.
///
/// This is the online softmax of Milakov & Gimelshein (arXiv 1805.02867) over the vocabulary.
///
/// # Safety
/// S's features are present.
#[inline(always)]
pub unsafe fn ce_chunk_row<S: Simd>(
    logits: &mut [f32],
    first_id: usize,
    target: usize,
    st: &mut SoftmaxState,
) -> f32 {
    if let Some(l) = target.checked_sub(first_id).and_then(|i| logits.get(i)) {
        st.target = *l;
    }
    // SAFETY: the caller's contract.
    unsafe {
        let top = max::<S>(logits).max(st.max);
        let factor = if st.max == f32::NEG_INFINITY {
            0.0
        } else {
            let mut b = [st.max - top; 16];
            S::store(b.as_mut_ptr(), exp::<S>(S::load(b.as_ptr())));
            b[0]
        };
        st.sum = st.sum * factor + exp_sum::<S>(logits, 1.0, top);
        st.max = top;
        factor
    }
}
