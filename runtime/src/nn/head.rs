//! The head with its loss: final norm, logits, cross-entropy, and the gradient of all three, in chunks
//! of the vocabulary.
//!
//! The softmax runs online over the chunks, and its gradient Σ_v softmax_v·W_v accumulates beside it with the
//! same rescaling. So no logit is computed twice, and at most rows × chunk of them exist at a time.

use engraft_kernels::{NnOp, NtOp, QMatrix, Rows, SoftmaxState, acts_words, gemm_scratch_words};

use super::divergence::{self, PairBufs};
use super::{Ctx, WeightGrad};
use crate::model::ModelConfig;

/// Vocabulary rows of one chunk.
pub const VOCAB_CHUNK: usize = 1024;

/// A softmax over nothing yet.
pub(super) const EMPTY: SoftmaxState = SoftmaxState { max: f32::NEG_INFINITY, sum: 0.0, target: 0.0 };

/// f32 words of the head's buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadWords {
    rows: usize,
    d: usize,
    chunk: usize,
    acts: usize,
    kernel: usize,
    train: bool,
    /// Whether a base's head runs beside it, which takes two rows for each.
    beside_base: bool,
}

impl HeadWords {
    /// For at most `rows` rows with a loss; with `beside_base`, each also has the base's row ([`divergence`]).
    pub fn new(c: &ModelConfig, rows: usize, threads: usize, train: bool, beside_base: bool) -> Self {
        let all = if beside_base { 2 * rows } else { rows };
        // Inputs forward, the chunk's gradient backward.
        let words = |k: usize| if k.is_multiple_of(32) { acts_words(all, k) } else { 0 };
        let chunk = VOCAB_CHUNK.min(c.vocab);
        let acts = words(c.d_model) + if train { words(chunk.next_multiple_of(32)) } else { 0 };
        let kernel = gemm_scratch_words(chunk, c.d_model, 0) * threads;
        HeadWords { rows, d: c.d_model, chunk, acts, kernel, train, beside_base }
    }

    /// Rows of norms, gradients and logits.
    fn all(&self) -> usize {
        if self.beside_base { 2 * self.rows } else { self.rows }
    }

    /// Total words, without the kernel scratch, which is borrowed from the block.
    pub fn total(&self) -> usize {
        let (rows, all) = (self.rows, self.all());
        let grads = if self.train { all * self.d } else { 0 };
        let pair = if self.beside_base { rows * divergence::own_words(self.chunk) } else { 0 };
        rows * self.d + all * self.d + grads + all * self.chunk + self.acts + 3 * all + 2 * rows + pair
    }

    /// Words of the block's kernel scratch the head needs.
    pub fn kernel(&self) -> usize {
        self.kernel
    }
}

/// The head's buffers.
pub struct HeadBufs {
    /// Rows of x with a loss, and their norm. If the base runs beside, its rows come second, from the norm on.
    pub(super) x: Vec<f32>,
    pub(super) n: Vec<f32>,
    pub(super) dn: Vec<f32>,
    pub(super) logits: Vec<f32>,
    pub(super) acts: Vec<f32>,
    pub(super) state: Vec<SoftmaxState>,
    pub(super) targets: Vec<u32>,
    pub(super) at: Vec<u32>,
    pub(super) pair: Option<PairBufs>,
}

impl HeadBufs {
    /// Allocates what `words` says.
    pub fn new(w: &HeadWords) -> HeadBufs {
        HeadBufs {
            x: vec![0.0; w.rows * w.d],
            n: vec![0.0; w.all() * w.d],
            dn: vec![0.0; if w.train { w.all() * w.d } else { 0 }],
            logits: vec![0.0; w.all() * w.chunk],
            acts: vec![0.0; w.acts],
            state: vec![EMPTY; w.all()],
            targets: Vec::with_capacity(w.rows),
            at: Vec::with_capacity(w.rows),
            pair: w.beside_base.then(|| PairBufs::new(w.rows, w.chunk)),
        }
    }
}

/// The frozen weights of the head.
pub struct HeadWeights<'a> {
    /// `[d]`.
    pub norm: &'a [f32],
    /// `[V, d]`.
    pub w: QMatrix<'a>,
}

impl HeadWeights<'_> {
    /// Normed rows `[m, d]` in the form the product with W takes.
    pub(super) fn rows<'r>(&self, ctx: &Ctx<'_>, n: &'r [f32], m: usize, acts: &'r mut [f32]) -> Rows<'r> {
        let halves = self.w.dtype().group_len() == 16;
        match ctx.is_int8(&self.w) {
            true => Rows::Int8(ctx.kernels.quantize(n, m, self.norm.len(), halves, acts)),
            false => Rows::F32(n),
        }
    }
}

/// The head's weights chunk by chunk, each with its first vocabulary row.
pub(super) fn chunks<'a>(w: QMatrix<'a>) -> impl Iterator<Item = (usize, QMatrix<'a>)> {
    let vocab = w.rows();
    (0..vocab)
        .step_by(VOCAB_CHUNK)
        .map(move |first| (first, w.rows_range(first, vocab.min(first + VOCAB_CHUNK))))
}

/// Logits `[m, rows of W]`.
pub(super) fn product(
    ctx: &Ctx<'_>,
    (x, m): (Rows<'_>, usize),
    w: QMatrix<'_>,
    y: &mut [f32],
    kernel: &mut [f32],
) {
    ctx.kernels.qgemm_nt(m, &mut [NtOp { x, w, low: None, gain: None, y, accumulate: false }], kernel);
}

/// Sum of the cross-entropies (nats) and count over the rows with a target (≠ `u32::MAX`).
///
/// x is `[m, d]`. With `dx` (zeroed here), the sum's gradient is written there. `each` receives (row, loss).
pub fn loss(
    ctx: &Ctx<'_>,
    w: &HeadWeights<'_>,
    x: &[f32],
    targets: &[u32],
    mut dx: Option<&mut [f32]>,
    b: &mut HeadBufs,
    kernel: &mut [f32],
    mut each: impl FnMut(usize, f64),
) -> (f64, usize) {
    let d = w.norm.len();
    gather(x, targets, d, b);
    let r = b.targets.len();
    if let Some(dx) = dx.as_deref_mut() {
        dx.fill(0.0);
    }
    if r == 0 {
        return (0.0, 0);
    }
    let train = dx.is_some();
    ctx.kernels.rmsnorm(&b.x[..r * d], w.norm, ctx.config.rms_eps, &mut b.n[..r * d]);
    run_chunks(ctx, w, r, train, b, kernel);
    let sum = sum_losses(r, b, &mut each);
    if let Some(dx) = dx {
        target_rows(ctx, w, r, b);
        finish_rows(ctx, r, d, b);
        through_norm(ctx, w, r, b, dx);
    }
    (sum, r)
}

/// The sum of the losses of r rows; `each` receives every one.
fn sum_losses(r: usize, b: &HeadBufs, each: &mut impl FnMut(usize, f64)) -> f64 {
    let mut sum = 0.0;
    for (s, at) in b.state[..r].iter().zip(&b.at) {
        let loss = f64::from(s.max) + f64::from(s.sum).ln() - f64::from(s.target);
        each(*at as usize, loss);
        sum += loss;
    }
    sum
}

/// Gradients of the head's weights.
pub struct HeadGrads<'a> {
    /// `[d]`.
    pub norm: WeightGrad<'a>,
    /// `[V, d]`.
    pub w: WeightGrad<'a>,
}

/// As [`loss`] with `dx`, and the gradients of the head's own weights.
///
/// dW = pᵀ·n needs the probabilities themselves, so the logits are computed twice: once for their sums, and
/// again, chunk by chunk, for the gradients.
pub fn loss_with_weights(
    ctx: &Ctx<'_>,
    w: &HeadWeights<'_>,
    x: &[f32],
    targets: &[u32],
    dx: &mut [f32],
    grads: HeadGrads<'_>,
    b: &mut HeadBufs,
    kernel: &mut [f32],
) -> (f64, usize) {
    let d = w.norm.len();
    gather(x, targets, d, b);
    let r = b.targets.len();
    dx.fill(0.0);
    let (dnorm, accumulate) = (grads.norm.begun(), grads.w.accumulate);
    if r == 0 {
        grads.w.begun();
        return (0.0, 0);
    }
    ctx.kernels.rmsnorm(&b.x[..r * d], w.norm, ctx.config.rms_eps, &mut b.n[..r * d]);
    run_chunks(ctx, w, r, false, b, kernel);
    let sum = sum_losses(r, b, &mut |_, _| {});
    // With the log-sum-exp as the maximum, the same pass over the chunks gives probabilities.
    for s in &mut b.state[..r] {
        (s.max, s.sum) = (s.max + s.sum.ln(), 0.0);
    }
    for (first, part) in chunks(w.w) {
        let n = &b.n[..r * d];
        let logits = &mut b.logits[..r * part.rows()];
        product(ctx, (Rows::F32(n), r), part, logits, kernel);
        ctx.kernels.ce_chunk(logits, part.rows(), first, &b.targets, &mut b.state[..r], None);
        for (row, target) in logits.chunks_exact_mut(part.rows()).zip(&b.targets) {
            if let Some(p) = (*target as usize).checked_sub(first).and_then(|i| row.get_mut(i)) {
                *p -= 1.0;
            }
        }
        let op = NnOp { dy: Rows::F32(logits), w: part, low: None };
        ctx.kernels.qgemm_nn(r, &[op], &mut b.dn[..r * d], first > 0, kernel);
        let dw = &mut grads.w.dw[first * d..(first + part.rows()) * d];
        ctx.kernels.gemm_tn(logits, n, r, dw, accumulate, kernel);
    }
    let (x, dn) = (&b.x[..r * d], &b.dn[..r * d]);
    ctx.kernels.rmsnorm_weight_bwd(x, ctx.config.rms_eps, dn, dnorm);
    through_norm(ctx, w, r, b, dx);
    (sum, r)
}

/// Copies the rows with a target to the front of the buffers.
pub(super) fn gather(x: &[f32], targets: &[u32], d: usize, b: &mut HeadBufs) {
    b.targets.clear();
    b.at.clear();
    for (i, t) in targets.iter().enumerate().filter(|(_, t)| **t != u32::MAX) {
        let r = b.targets.len();
        b.x[r * d..(r + 1) * d].copy_from_slice(&x[i * d..(i + 1) * d]);
        b.targets.push(*t);
        b.at.push(i as u32);
    }
}

/// Logits, running softmax and Σ e^(logit − max)·W, chunk by chunk.
fn run_chunks(
    ctx: &Ctx<'_>,
    w: &HeadWeights<'_>,
    r: usize,
    train: bool,
    b: &mut HeadBufs,
    kernel: &mut [f32],
) {
    let d = w.norm.len();
    b.state[..r].fill(EMPTY);
    let forward_words = if ctx.is_int8(&w.w) { acts_words(r, d) } else { 0 };
    let (forward_acts, gradient_acts) = b.acts.split_at_mut(forward_words);
    let n = w.rows(ctx, &b.n[..r * d], r, forward_acts);
    for (first, part) in chunks(w.w) {
        let logits = &mut b.logits[..r * part.rows()];
        product(ctx, (n, r), part, logits, kernel);
        // This buffer exists only for training.
        let dn = if train { Some(&mut b.dn[..r * d]) } else { None };
        ctx.kernels.ce_chunk(logits, part.rows(), first, &b.targets, &mut b.state[..r], dn);
        if train {
            let dy = ctx.gradient_rows(logits, r, &part, gradient_acts);
            let op = NnOp { dy, w: part, low: None };
            ctx.kernels.qgemm_nn(r, &[op], &mut b.dn[..r * d], first > 0, kernel);
        }
    }
}

/// Writes the targets' rows of W into n, whose values are no longer needed.
pub(super) fn target_rows(ctx: &Ctx<'_>, w: &HeadWeights<'_>, r: usize, b: &mut HeadBufs) {
    let (d, targets) = (w.norm.len(), &b.targets);
    ctx.kernels.rows(d, &mut b.n[..r * d], |i, row| {
        ctx.kernels.dequantize_row(&w.w, targets[i] as usize, row);
    });
}

/// dn = dn/Σ − W_target.
fn finish_rows(ctx: &Ctx<'_>, r: usize, d: usize, b: &mut HeadBufs) {
    let (state, target_rows) = (&b.state, &b.n);
    ctx.kernels.rows(d, &mut b.dn[..r * d], |i, row| {
        let inv = 1.0 / state[i].sum;
        for (v, t) in row.iter_mut().zip(&target_rows[i * d..]) {
            *v = *v * inv - t;
        }
    });
}

/// dn through the norm into the rows of dx.
pub(super) fn through_norm(ctx: &Ctx<'_>, w: &HeadWeights<'_>, r: usize, b: &mut HeadBufs, dx: &mut [f32]) {
    let d = w.norm.len();
    let n = &mut b.n[..r * d];
    n.fill(0.0);
    ctx.kernels.rmsnorm_bwd(&b.x[..r * d], w.norm, ctx.config.rms_eps, &b.dn[..r * d], n);
    for (i, at) in b.at.iter().enumerate() {
        let at = *at as usize;
        dx[at * d..(at + 1) * d].copy_from_slice(&n[i * d..(i + 1) * d]);
    }
}

/// Writes the likeliest token after each of m rows of x `[m, d]` to `out`: the first with the greatest logit,
/// where +∞ counts as the largest finite number. `None` if all are NaN or −∞.
///
/// Multiplies m rows with each chunk of the vocabulary; at most m × chunk logits exist at a time.
pub fn likeliest(
    ctx: &Ctx<'_>,
    w: &HeadWeights<'_>,
    x: &[f32],
    b: &mut HeadBufs,
    kernel: &mut [f32],
    out: &mut [Option<u32>],
) {
    let (d, m) = (w.norm.len(), out.len());
    ctx.kernels.rmsnorm(x, w.norm, ctx.config.rms_eps, &mut b.n[..m * d]);
    let n = w.rows(ctx, &b.n[..m * d], m, &mut b.acts);
    out.fill(None);
    b.state[..m].fill(EMPTY);
    for (first, part) in chunks(w.w) {
        let logits = &mut b.logits[..m * part.rows()];
        product(ctx, (n, m), part, logits, kernel);
        let each = logits.chunks_exact(part.rows()).zip(&mut b.state).zip(&mut *out);
        for ((logits, state), out) in each {
            let top = greatest(logits).min(f32::MAX);
            if top > state.max {
                state.max = top;
                *out = logits.iter().position(|l| *l >= top).map(|at| (first + at) as u32);
            }
        }
    }
}

/// The greatest of the values that aren't NaN; −∞ if there is none.
fn greatest(values: &[f32]) -> f32 {
    let (whole, rest) = values.as_chunks::<16>();
    let mut top = [f32::NEG_INFINITY; 16];
    for values in whole {
        for (top, v) in top.iter_mut().zip(values) {
            *top = if *v > *top { *v } else { *top };
        }
    }
    top.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a })
}

/// Logits `[V]` of one row of x.
pub fn logits(
    ctx: &Ctx<'_>,
    w: &HeadWeights<'_>,
    x: &[f32],
    b: &mut HeadBufs,
    kernel: &mut [f32],
    out: &mut [f32],
) {
    let d = w.norm.len();
    ctx.kernels.rmsnorm(x, w.norm, ctx.config.rms_eps, &mut b.n[..d]);
    let n = w.rows(ctx, &b.n[..d], 1, &mut b.acts);
    product(ctx, (n, 1), w.w, out, kernel);
}

/// Logits `[n, V]` of n rows of x, chunk by chunk of the vocabulary.
pub fn gathered_logits(
    ctx: &Ctx<'_>,
    w: &HeadWeights<'_>,
    x: &[f32],
    rows: &[usize],
    b: &mut HeadBufs,
    kernel: &mut [f32],
    out: &mut [f32],
) {
    let (n, d, vocab) = (rows.len(), w.norm.len(), w.w.rows());
    assert_eq!(out.len(), n * vocab, "one row of logits for each row of x");
    for (i, row) in rows.iter().enumerate() {
        b.x[i * d..(i + 1) * d].copy_from_slice(&x[row * d..(row + 1) * d]);
    }
    ctx.kernels.rmsnorm(&b.x[..n * d], w.norm, ctx.config.rms_eps, &mut b.n[..n * d]);
    let normed = w.rows(ctx, &b.n[..n * d], n, &mut b.acts);
    for (first, part) in chunks(w.w) {
        let logits = &mut b.logits[..n * part.rows()];
        product(ctx, (normed, n), part, logits, kernel);
        for (out, chunk) in out.chunks_exact_mut(vocab).zip(logits.chunks_exact(part.rows())) {
            out[first..first + part.rows()].copy_from_slice(chunk);
        }
    }
}
