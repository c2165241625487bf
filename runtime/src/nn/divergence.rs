//! A tuned model's head beside its base's: cross-entropy and the divergence between the two distributions, in
//! one pass over chunks of the vocabulary.
//!
//! Rows come in pairs: the first half of the buffers is the tuned model's, the second the base's, so each
//! chunk of the head's weights is decoded once for both. With z and y their logits, p and q the softmaxes
//! of these, and δ = z − y:
//!
//! ```text
//! forward   KL(q‖p) = lse(z) − lse(y) − Σ q∘δ        ∂/∂z = p − q
//! reverse   KL(p‖q) = lse(y) − lse(z) + Σ p∘δ        ∂/∂z = p∘(δ − Σ p∘δ)
//! ```
//!
//! Σ p·W, and Σ q·W or Σ (p∘δ)·W, accumulate beside the running softmaxes with the same rescaling. So no logit
//! is computed twice, and only one chunk of logits exists at a time.

use std::ops::{Add, AddAssign};

use engraft_kernels::{Kernels, NnOp, SoftmaxState, acts_words};
use strum::IntoStaticStr;

use super::Ctx;
use super::head::{self, HeadBufs, HeadWeights};
use crate::algebra::dot;

/// The direction of a divergence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum Direction {
    /// KL(base‖tuned): what the base finds likely must stay likely. Measured on the new task's data it predicts
    /// forgetting (Shenfeld et al., arXiv 2509.04259). It is also the loss of distillation.
    #[default]
    Forward,
    /// KL(tuned‖base): what the base finds unlikely must not become likely.
    Reverse,
}

impl Direction {
    /// Both of them, by the names that [`Direction::name`] gives.
    pub const ALL: [Direction; 2] = [Direction::Forward, Direction::Reverse];

    /// Its name, in files and settings.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// A penalty for drifting from the base: adds weight·KL to each target's loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KlPenalty {
    /// Finite and above 0.
    pub weight: f32,
    /// Which divergence.
    pub direction: Direction,
}

/// What a gradient is of: Σ cross-entropy + weight·KL, or the divergence alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pull {
    /// The divergence's part.
    pub penalty: KlPenalty,
    /// Whether the targets' own cross-entropies stay out of it: the base's distribution is all there is to learn.
    pub alone: bool,
}

/// A tuned model compared with its base at one target, or sums over several. In nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Compared {
    /// Targets.
    pub targets: usize,
    /// Cross-entropy of the tuned model.
    pub loss: f64,
    /// Cross-entropy of the base.
    pub base_loss: f64,
    /// KL(base‖tuned).
    pub kl_forward: f64,
    /// KL(tuned‖base).
    pub kl_reverse: f64,
}

impl Compared {
    /// The divergence of one direction.
    pub fn kl(&self, direction: Direction) -> f64 {
        match direction {
            Direction::Forward => self.kl_forward,
            Direction::Reverse => self.kl_reverse,
        }
    }
}

impl Add for Compared {
    type Output = Compared;

    fn add(self, other: Compared) -> Compared {
        Compared {
            targets: self.targets + other.targets,
            loss: self.loss + other.loss,
            base_loss: self.base_loss + other.base_loss,
            kl_forward: self.kl_forward + other.kl_forward,
            kl_reverse: self.kl_reverse + other.kl_reverse,
        }
    }
}

impl AddAssign for Compared {
    fn add_assign(&mut self, other: Compared) {
        *self = *self + other;
    }
}

/// Extra columns of the difference buffer beyond a chunk's: the running Σ e^(z − max)∘δ and Σ e^(y − max)∘δ.
const SUMS: usize = 2;

/// Extra f32 words per row for a head beside its base: differences with their sums, and the maxima before a
/// chunk.
pub(super) fn own_words(chunk: usize) -> usize {
    chunk + SUMS + 2
}

/// Buffers beyond those of a head alone.
pub(super) struct PairBufs {
    /// `[rows, chunk + 2]`.
    delta: Vec<f32>,
    /// Maxima of the tuned model's rows, then of the base's, before the current chunk.
    before: Vec<f32>,
    /// Columns of `delta`.
    stride: usize,
    /// Rows whose base values are in the second half of the norms.
    base_rows: usize,
}

impl PairBufs {
    pub(super) fn new(rows: usize, chunk: usize) -> PairBufs {
        let stride = chunk + SUMS;
        PairBufs { delta: vec![0.0; rows * stride], before: vec![0.0; 2 * rows], stride, base_rows: 0 }
    }
}

/// Stores the base's hidden states x `[m, d]` of the rows with a target, for [`loss`] on the same targets.
///
/// # Panics
/// If the buffers were not made for a pair.
pub fn keep_base(ctx: &Ctx<'_>, w: &HeadWeights<'_>, x: &[f32], targets: &[u32], b: &mut HeadBufs) {
    let d = w.norm.len();
    head::gather(x, targets, d, b);
    let r = b.targets.len();
    ctx.kernels.rmsnorm(&b.x[..r * d], w.norm, ctx.config.rms_eps, &mut b.n[r * d..2 * r * d]);
    b.pair.as_mut().expect("a head planned beside its base").base_rows = r;
}

/// Compares the tuned model's hidden states x `[m, d]` with those [`keep_base`] stored; returns sums over the
/// rows with a target. With `train`, writes the gradient that it asks for with respect to x to its slice. `each` receives (row, that target's contribution).
///
/// # Panics
/// If [`keep_base`] wasn't called for these targets.
pub fn loss(
    ctx: &Ctx<'_>,
    w: &HeadWeights<'_>,
    x: &[f32],
    targets: &[u32],
    mut train: Option<(Pull, &mut [f32])>,
    b: &mut HeadBufs,
    kernel: &mut [f32],
    mut each: impl FnMut(usize, Compared),
) -> Compared {
    let d = w.norm.len();
    head::gather(x, targets, d, b);
    let r = b.targets.len();
    assert!(b.pair.as_ref().is_some_and(|p| p.base_rows == r), "the base's rows must be kept first");
    if let Some((_, dx)) = &mut train {
        dx.fill(0.0);
    }
    if r == 0 {
        return Compared::default();
    }
    ctx.kernels.rmsnorm(&b.x[..r * d], w.norm, ctx.config.rms_eps, &mut b.n[..r * d]);
    run_chunks(ctx, w, r, train.as_ref().map(|(pull, _)| pull.penalty.direction), b, kernel);
    let mut sum = Compared::default();
    for i in 0..r {
        let one = compared(b, r, i);
        each(b.at[i] as usize, one);
        sum += one;
    }
    if let Some((pull, dx)) = train {
        head::target_rows(ctx, w, r, b);
        combine(ctx.kernels, r, d, pull, b);
        head::through_norm(ctx, w, r, b, dx);
    }
    sum
}

/// The contribution of target i of r.
fn compared(b: &HeadBufs, r: usize, i: usize) -> Compared {
    let log_sum = |s: &SoftmaxState| f64::from(s.max) + f64::from(s.sum).ln();
    let (tuned, base) = (&b.state[i], &b.state[r + i]);
    let (z, y) = (log_sum(tuned), log_sum(base));
    let [of_p, of_q] = sums(b, i);
    let mean = |sum: f32, s: &SoftmaxState| f64::from(sum) / f64::from(s.sum);
    // Negative only through rounding; NaN stays NaN.
    let kl = |v: f64| if v < 0.0 { 0.0 } else { v };
    Compared {
        targets: 1,
        loss: z - f64::from(tuned.target),
        base_loss: y - f64::from(base.target),
        kl_forward: kl(z - y - mean(of_q, base)),
        kl_reverse: kl(y - z + mean(of_p, tuned)),
    }
}

/// Σ e^(z − max)∘δ and Σ e^(y − max)∘δ of row i.
fn sums(b: &HeadBufs, i: usize) -> [f32; SUMS] {
    let Some(pair) = &b.pair else { return [0.0; SUMS] };
    let end = (i + 1) * pair.stride;
    [pair.delta[end - 2], pair.delta[end - 1]]
}

/// Computes, chunk by chunk, the logits of both halves, their softmaxes and sums and, if given a direction, the
/// products with W its gradient needs.
fn run_chunks(
    ctx: &Ctx<'_>,
    w: &HeadWeights<'_>,
    r: usize,
    train: Option<Direction>,
    b: &mut HeadBufs,
    kernel: &mut [f32],
) {
    let (d, m) = (w.norm.len(), 2 * r);
    b.state[..m].fill(head::EMPTY);
    let Some(pair) = &mut b.pair else { return };
    pair.delta.fill(0.0);
    let forward_words = if ctx.is_int8(&w.w) { acts_words(m, d) } else { 0 };
    let (forward_acts, gradient_acts) = b.acts.split_at_mut(forward_words);
    let n = w.rows(ctx, &b.n[..m * d], m, forward_acts);
    for (first, part) in head::chunks(w.w) {
        let logits = &mut b.logits[..m * part.rows()];
        head::product(ctx, (n, m), part, logits, kernel);
        let dn = if train.is_some() { &mut b.dn[..m * d] } else { &mut [] };
        fold(ctx.kernels, first, train, &b.targets, logits, &mut b.state[..m], pair, dn);
        if train.is_some() {
            let dy = ctx.gradient_rows(logits, m, &part, gradient_acts);
            let op = NnOp { dy, w: part, low: None };
            ctx.kernels.qgemm_nn(m, &[op], &mut b.dn[..m * d], first > 0, kernel);
        }
    }
}

/// Folds one chunk of both halves' logits into states and sums. The logits become the inputs of the gradient's
/// product: e^(z − max), and for the base e^(y − max) or, in reverse, e^(z − max)∘δ.
fn fold(
    k: &Kernels,
    first: usize,
    train: Option<Direction>,
    targets: &[u32],
    logits: &mut [f32],
    state: &mut [SoftmaxState],
    pair: &mut PairBufs,
    dn: &mut [f32],
) {
    let r = targets.len();
    let (c, d, stride) = (logits.len() / (2 * r), dn.len() / (2 * r), pair.stride);
    let (z, y) = logits.split_at_mut(r * c);
    let (dn_z, dn_y) = dn.split_at_mut(r * d);
    let delta = &mut pair.delta[..r * stride];
    k.rows(stride, delta, |i, row| {
        let both = z[i * c..(i + 1) * c].iter().zip(&y[i * c..(i + 1) * c]);
        row.iter_mut().zip(both).for_each(|(delta, (z, y))| *delta = z - y);
    });
    pair.before.iter_mut().zip(&*state).for_each(|(before, s)| *before = s.max);
    let before = &pair.before[..2 * r];
    let (tuned, base) = state.split_at_mut(r);
    k.ce_chunk(z, c, first, targets, tuned, train.is_some().then_some(&mut *dn_z));
    k.ce_chunk(y, c, first, targets, base, (train == Some(Direction::Forward)).then_some(&mut *dn_y));
    let (tuned, base) = (&*tuned, &*base);
    k.rows(stride, delta, |i, row| {
        let (values, sums) = row.split_at_mut(stride - SUMS);
        let (at, values) = (i * c..(i + 1) * c, &values[..c]);
        sums[0] = sums[0] * growth(before[i], &tuned[i]) + dot(&z[at.clone()], values);
        sums[1] = sums[1] * growth(before[r + i], &base[i]) + dot(&y[at], values);
    });
    if train == Some(Direction::Reverse) {
        k.rows(c, y, |i, row| {
            let both = z[i * c..(i + 1) * c].iter().zip(&delta[i * stride..]);
            row.iter_mut().zip(both).for_each(|(y, (e, delta))| *y = e * delta);
        });
        k.rows(d, dn_y, |i, row| {
            let factor = growth(before[i], &tuned[i]);
            row.iter_mut().for_each(|v| *v *= factor);
        });
    }
}

/// The factor for sums relative to a maximum that has grown.
fn growth(before: f32, now: &SoftmaxState) -> f32 {
    if before == f32::NEG_INFINITY { 0.0 } else { (before - now.max).exp() }
}

/// dn of the tuned half = Σ p·W − W_target + weight·(its divergence's gradient by the normed state); the
/// target's rows are in the first half of n.
fn combine(k: &Kernels, r: usize, d: usize, Pull { penalty, alone }: Pull, b: &mut HeadBufs) {
    let Some(pair) = &b.pair else { return };
    let (state, rows, delta, stride) = (&b.state, &b.n, &pair.delta, pair.stride);
    let (dn, other) = b.dn[..2 * r * d].split_at_mut(r * d);
    let (other, weight) = (&*other, penalty.weight);
    k.rows(d, dn, |i, row| {
        let (inv, inv_base) = (1.0 / state[i].sum, 1.0 / state[r + i].sum);
        let mean = delta[(i + 1) * stride - SUMS] * inv;
        let parts = other[i * d..(i + 1) * d].iter().zip(&rows[i * d..(i + 1) * d]);
        for (v, (other, target)) in row.iter_mut().zip(parts) {
            let p = *v * inv;
            let away = match penalty.direction {
                Direction::Forward => p - other * inv_base,
                Direction::Reverse => other * inv - mean * p,
            };
            *v = if alone { weight * away } else { p + weight * away - target };
        }
    });
}
