//! Linear layers with an adapter: forward and backward.

use engraft_kernels::{
    GainGradient, Kernels, LowRank, NnOp, NtOp, QMatrix, QuantActs, Rows, acts_words, drop_elements,
};

use super::{Ctx, Dropout, Pair, PairGrad, dora};

/// One linear layer's part in a product that shares its input with others.
pub struct Linear<'a> {
    /// Frozen weights `[out, in]`.
    pub w: QMatrix<'a>,
    /// Its adapter, if any.
    pub pair: Option<Pair<'a>>,
    /// Receives s·x·Aᵀ `[m, r]` (kept for the backward).
    pub h: &'a mut [f32],
    /// `[m, out]`.
    pub y: &'a mut [f32],
    /// Adds to y, which then holds the residual.
    pub accumulate: bool,
}

/// Scratch of the linear layers.
pub struct LinearScratch<'a> {
    /// Quantized activations: `acts_words` of one input, or of the gradients of all layers that share it.
    pub acts: &'a mut [f32],
    /// The kernels' scratch.
    pub kernel: &'a mut [f32],
    /// `[m, k]` for dropout; empty if it is off.
    pub dropped: &'a mut [f32],
}

/// y = c∘(x·Wᵀ + s·(x·Aᵀ)·Bᵀ) for up to three layers that share x `[m, k]`; c is 1 without DoRA.
pub fn forward(
    ctx: &Ctx<'_>,
    m: usize,
    x: &[f32],
    layers: &mut [Linear<'_>],
    dropout: Dropout,
    scratch: &mut LinearScratch<'_>,
) {
    let k = x.len() / m;
    for (i, l) in layers.iter_mut().enumerate() {
        if let Some(p) = l.pair {
            rank_input(
                ctx,
                m,
                x,
                &p,
                l.h,
                Dropout { key: dropout.key + i as u64, ..dropout },
                scratch.dropped,
            );
        }
    }
    let halves = layers.iter().any(|l| l.w.dtype().group_len() == 16);
    let int8 = layers.iter().any(|l| ctx.is_int8(&l.w));
    let acts = int8.then(|| ctx.kernels.quantize(x, m, k, halves, scratch.acts));
    let mut ops = layers.iter_mut().map(|l| nt_op(l, m, x, acts));
    match (ops.next(), ops.next(), ops.next()) {
        (Some(a), Some(b), Some(c)) => ctx.kernels.qgemm_nt(m, &mut [a, b, c], scratch.kernel),
        (Some(a), Some(b), None) => ctx.kernels.qgemm_nt(m, &mut [a, b], scratch.kernel),
        (Some(a), None, _) => ctx.kernels.qgemm_nt(m, &mut [a], scratch.kernel),
        (None, ..) => {}
    }
}

/// Through y = c∘z: adds to the gradient of m and turns dy into the gradient of z. Does nothing without a gain.
pub fn backward_gain(
    ctx: &Ctx<'_>,
    pair: Option<Pair<'_>>,
    grad: &mut Option<PairGrad<'_>>,
    y: &[f32],
    dy: &mut [f32],
) {
    let (Some(gain), Some(grad)) = (pair.and_then(|p| p.gain), grad) else { return };
    ctx.kernels.gain_bwd(GainGradient::InPlace(dy), y, None, gain.c, dora::sum(&gain, grad.m));
}

/// The same for y = before + c∘z, leaving dy unchanged: the gradient of z goes to `own`, or is dy itself
/// without a gain.
pub fn backward_gain_residual<'a>(
    ctx: &Ctx<'_>,
    pair: Option<Pair<'_>>,
    grad: &mut Option<PairGrad<'_>>,
    (y, before): (&[f32], &[f32]),
    dy: &'a [f32],
    own: &'a mut [f32],
) -> &'a [f32] {
    let (Some(gain), Some(grad)) = (pair.and_then(|p| p.gain), grad) else { return dy };
    let own = &mut own[..dy.len()];
    let gradient = GainGradient::Apart { dy, dz: own };
    ctx.kernels.gain_bwd(gradient, y, Some(before), gain.c, dora::sum(&gain, grad.m));
    own
}

/// h = s·x·Aᵀ.
pub fn rank_input(
    ctx: &Ctx<'_>,
    m: usize,
    x: &[f32],
    p: &Pair<'_>,
    h: &mut [f32],
    dropout: Dropout,
    buf: &mut [f32],
) {
    let x = dropped(ctx.kernels, x, buf, dropout, 0);
    ctx.kernels.skinny_nt(p.scale, x, m, x.len() / m, p.a, p.rank, &mut h[..m * p.rank]);
}

fn nt_op<'a>(l: &'a mut Linear<'_>, m: usize, x: &'a [f32], acts: Option<QuantActs<'a>>) -> NtOp<'a> {
    let rows = match acts {
        Some(a) if !l.w.dtype().is_float() => Rows::Int8(a),
        _ => Rows::F32(x),
    };
    let low = l.pair.map(|p| LowRank { h: &l.h[..m * p.rank], b: p.bt, rank: p.rank });
    NtOp { x: rows, w: l.w, low, gain: l.pair.and_then(|p| p.gains()), y: l.y, accumulate: l.accumulate }
}

/// One linear layer's part in the backward of layers that share their input.
pub struct LinearGrad<'a> {
    /// Frozen weights `[out, in]`.
    pub w: QMatrix<'a>,
    /// Its adapter.
    pub pair: Option<Pair<'a>>,
    /// s·x·Aᵀ of the forward `[m, r]`.
    pub h: &'a [f32],
    /// Receives s·dy·B `[m, r]`.
    pub dh: &'a mut [f32],
    /// Gradient of x·Wᵀ + s·(x·Aᵀ)·Bᵀ `[m, out]`: any gain is already in it.
    pub dy: &'a [f32],
    /// The adapter's gradients.
    pub grad: Option<PairGrad<'a>>,
}

/// Adds to the adapters' gradients: dB = s·dyᵀ·(x·Aᵀ), dA = (s·dy·B)ᵀ·x; or produces those of the weights: dW =
/// dyᵀ·x. Must run before x is overwritten.
pub fn backward_pairs(
    ctx: &Ctx<'_>,
    m: usize,
    x: &[f32],
    layers: &mut [LinearGrad<'_>],
    dropout: Dropout,
    scratch: &mut LinearScratch<'_>,
) {
    let k = x.len() / m;
    for (i, l) in layers.iter_mut().enumerate() {
        if let Some(w) = l.grad.as_mut().and_then(|g| g.w.as_mut()) {
            ctx.kernels.gemm_tn(l.dy, x, m, w.dw, w.accumulate, scratch.kernel);
        }
        let (Some(p), Some(g)) = (l.pair, l.grad.as_mut()) else { continue };
        let out = l.dy.len() / m;
        ctx.kernels.skinny_nt(p.scale, l.dy, m, out, p.bt, p.rank, &mut l.dh[..m * p.rank]);
        ctx.kernels.skinny_tn(&l.h[..m * p.rank], l.dy, m, p.rank, out, g.bt, true);
        // A frozen A has no gradient.
        if !g.a.is_empty() {
            let x = dropped(ctx.kernels, x, scratch.dropped, dropout, i);
            ctx.kernels.skinny_tn(&l.dh[..m * p.rank], x, m, p.rank, k, g.a, true);
        }
    }
}

/// dx = Σ dy·W + (s·dy·B)·A over the layers, after [`backward_pairs`].
pub fn backward_input(
    ctx: &Ctx<'_>,
    m: usize,
    layers: &[LinearGrad<'_>],
    dx: &mut [f32],
    dropout: Dropout,
    scratch: &mut LinearScratch<'_>,
) {
    let fused = dropout.p == 0.0;
    let (mut rest, mut rows) = (&mut *scratch.acts, [Rows::F32(&[]); 3]);
    for (l, rows) in layers.iter().zip(&mut rows) {
        let (own, others) = rest.split_at_mut(acts_words(m, l.w.rows()).min(rest.len()));
        (*rows, rest) = (ctx.gradient_rows(l.dy, m, &l.w, own), others);
    }
    let op = |i: usize| nn_op(&layers[i], rows[i], m, fused);
    match layers {
        [_] => ctx.kernels.qgemm_nn(m, &[op(0)], dx, false, scratch.kernel),
        [_, _] => ctx.kernels.qgemm_nn(m, &[op(0), op(1)], dx, false, scratch.kernel),
        [_, _, _] => ctx.kernels.qgemm_nn(m, &[op(0), op(1), op(2)], dx, false, scratch.kernel),
        _ => unreachable!("at most three layers share an input"),
    }
    if !fused {
        for (i, l) in layers.iter().enumerate() {
            add_dropped_branch(ctx, m, l, dx, dropout, i, scratch.dropped);
        }
    }
}

fn nn_op<'a>(l: &'a LinearGrad<'_>, dy: Rows<'a>, m: usize, fused: bool) -> NnOp<'a> {
    let low = l.pair.filter(|_| fused).map(|p| LowRank { h: &l.dh[..m * p.rank], b: p.a, rank: p.rank });
    NnOp { dy, w: l.w, low }
}

/// dx += mask∘((s·dy·B)·A)/(1 − p).
fn add_dropped_branch(
    ctx: &Ctx<'_>,
    m: usize,
    l: &LinearGrad<'_>,
    dx: &mut [f32],
    dropout: Dropout,
    which: usize,
    branch: &mut [f32],
) {
    let Some(p) = l.pair else { return };
    let k = dx.len() / m;
    let branch = &mut branch[..m * k];
    ctx.kernels.rows(k, branch, |t, row| {
        row.fill(0.0);
        for (j, a) in p.a.chunks_exact(k).enumerate() {
            let h = l.dh[t * p.rank + j];
            row.iter_mut().zip(a).for_each(|(r, a)| *r += h * a);
        }
        drop_elements(row, t * k, dropout.p, dropout.key.wrapping_add(which as u64));
    });
    ctx.kernels.axpy(1.0, branch, dx);
}

/// x with dropped elements zero and the others scaled by 1/(1 − p); x itself where dropout is off.
fn dropped<'a>(k: &Kernels, x: &'a [f32], buf: &'a mut [f32], d: Dropout, which: usize) -> &'a [f32] {
    if d.p == 0.0 {
        return x;
    }
    let buf = &mut buf[..x.len()];
    buf.copy_from_slice(x);
    k.drop_elements(buf, d.p, d.key.wrapping_add(which as u64));
    buf
}
