//! One transformer block. The forward reads:
//!
//! ```text
//! n1 = rmsnorm(x)·w1          q, k, v = n1·Wqᵀ, n1·Wkᵀ, n1·Wvᵀ;  q, k = rope(q), rope(k)
//! x2 = x + attention(q, k, v)·Woᵀ
//! n2 = rmsnorm(x2)·w2         g, u = n2·Wgᵀ, n2·Wuᵀ;  h = silu(g)∘u
//! y  = x2 + h·Wdᵀ
//! ```
//!
//! The backward walks these lines from last to first. It finds x, and the other values that [`Keep`] keeps; it
//! recomputes the rest, with the same functions from the same inputs.
//!
//! With DoRA each product is multiplied by its gains c. The gradient of a magnitude is a sum over rows of
//! dy∘y/m, so the backward needs each projection's output. It rotates q and k back, v, g and u are at hand, and
//! the outputs of o and down are x2 − x and y − x2. Nothing extra is kept.

use engraft_kernels::{
    AttnShape, KvMut, KvRows, acts_words, attention_scratch_words, cached_attention_scratch_words,
    gemm_scratch_words,
};

use super::keep::Keep;
use super::linear::{self, Linear, LinearGrad, LinearScratch};
use super::{BlockGrads, BlockPairs, Ctx, Dropout, PairGrad, RowMap, WeightGrad, dora};
use crate::model::weights::FrozenBlock;
use crate::model::{ModelConfig, Proj};

/// f32 words of each buffer of a block for M rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockWords {
    pub(super) d: usize,
    pub(super) q: usize,
    pub(super) kv: usize,
    pub(super) ff: usize,
    /// Holds M×ff, and the query-wide gradients that reuse it.
    pub(super) wide: usize,
    pub(super) lse: usize,
    per_head: usize,
    pub(super) low: usize,
    acts: usize,
    kernel: usize,
    dropped: usize,
}

impl BlockWords {
    /// For `m` rows in sequences of at most `seq`, adapters of rank `rank`, and `threads` threads.
    pub fn new(
        c: &ModelConfig,
        m: usize,
        seq: usize,
        rank: usize,
        threads: usize,
        dropout: bool,
        train: bool,
    ) -> Self {
        let widest = c.d_ff.max(c.d_q()).max(c.d_model);
        let blocks = |k: usize| if k.is_multiple_of(32) { acts_words(m, k) } else { 0 };
        let attention = if train {
            attention_scratch_words(seq, c.head_dim, true)
        } else {
            cached_attention_scratch_words(seq, c.head_dim)
        };
        let kernel = gemm_scratch_words(widest, widest, rank).max(attention);
        BlockWords {
            d: m * c.d_model,
            q: m * c.d_q(),
            kv: m * c.d_kv(),
            ff: m * c.d_ff,
            wide: m * c.d_ff.max(c.d_q()).max(2 * c.d_kv()),
            lse: if train { m * c.n_heads } else { 0 },
            per_head: if train { 2 * seq * c.d_q() } else { 0 },
            low: m * rank,
            acts: if train {
                blocks(c.d_model).max(blocks(c.d_q()) + 2 * blocks(c.d_kv())).max(2 * blocks(c.d_ff))
            } else {
                blocks(c.d_model).max(blocks(c.d_q())).max(blocks(c.d_ff))
            },
            kernel: kernel * threads,
            dropped: if dropout { m * widest } else { 0 },
        }
    }

    /// Total words of activations.
    pub fn activations(&self) -> usize {
        3 * self.d
            + 2 * self.q
            + 2 * self.kv
            + 3 * self.wide
            + self.lse
            + self.per_head
            + 10 * self.low
            + self.acts
            + self.dropped
    }

    /// Total words of kernel scratch.
    pub fn kernel(&self) -> usize {
        self.kernel
    }
}

/// The values from the first half of a block's forward, up to x2.
pub struct AttentionActs {
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    pub(super) att: Vec<f32>,
    pub(super) lse: Vec<f32>,
    pub(super) x2: Vec<f32>,
    /// Rank-r inputs of q, k, v, o.
    pub(super) low: [Vec<f32>; 4],
}

impl AttentionActs {
    /// Allocates what the words say.
    pub fn new(w: &BlockWords) -> AttentionActs {
        let z = |n: usize| vec![0.0f32; n];
        AttentionActs {
            q: z(w.q),
            k: z(w.kv),
            v: z(w.kv),
            att: z(w.q),
            lse: z(w.lse),
            x2: z(w.d),
            low: std::array::from_fn(|_| z(w.low)),
        }
    }
}

/// The values from the second half.
pub struct MlpActs {
    pub(super) g: Vec<f32>,
    pub(super) u: Vec<f32>,
    /// Rank-r inputs of gate, up, down.
    pub(super) low: [Vec<f32>; 3],
}

impl MlpActs {
    /// Allocates what the words say.
    pub fn new(w: &BlockWords) -> MlpActs {
        let z = |n: usize| vec![0.0f32; n];
        MlpActs { g: z(w.wide), u: z(w.wide), low: std::array::from_fn(|_| z(w.low)) }
    }
}

/// The buffers of one block, reused by every block.
pub struct BlockBufs {
    n1: Vec<f32>,
    /// From q to x2; a block that keeps them lends its own buffers.
    pub(super) attention: AttentionActs,
    n2: Vec<f32>,
    /// Gate and up; lent the same way.
    pub(super) mlp: MlpActs,
    h: Vec<f32>,
    per_head: Vec<f32>,
    dlow: Vec<f32>,
    /// Quantized activations; DoRA's gains borrow it between passes.
    pub acts: Vec<f32>,
    dropped: Vec<f32>,
    /// The kernels' scratch; the head borrows it too.
    pub kernel: Vec<f32>,
}

impl BlockBufs {
    /// Allocates what the words say; `kernel` is the scratch for everything that shares these buffers.
    pub fn new(w: &BlockWords, kernel: usize) -> BlockBufs {
        let z = |n: usize| vec![0.0f32; n];
        BlockBufs {
            n1: z(w.d),
            attention: AttentionActs::new(w),
            n2: z(w.d),
            mlp: MlpActs::new(w),
            h: z(w.wide),
            per_head: z(w.per_head),
            dlow: z(3 * w.low),
            acts: z(w.acts),
            dropped: z(w.dropped),
            kernel: z(kernel),
        }
    }
}

impl BlockBufs {
    /// The inputs of q, k and v, of o, of gate and up, and of down, in the last forward of `m` rows.
    pub fn inputs(&self, c: &ModelConfig, m: usize) -> [&[f32]; 4] {
        let (d, q, ff) = (m * c.d_model, m * c.d_q(), m * c.d_ff);
        [&self.n1[..d], &self.attention.att[..q], &self.n2[..d], &self.h[..ff]]
    }
}

/// Keys and values of one sequence's earlier positions: a prefix's, then its own.
pub struct KvLayer<'a> {
    /// Positions that come first, only read.
    pub prefix: KvRows<'a>,
    /// Keys, rotated, `[capacity, kv·hd]`.
    pub k: KvMut<'a>,
    /// Values, `[capacity, kv·hd]`.
    pub v: KvMut<'a>,
    /// Own positions filled before this call.
    pub past: usize,
}

/// Keys and values of several sequences with the same prefix.
pub struct KvBatch<'a> {
    /// Positions that come first, only read.
    pub prefix: KvRows<'a>,
    /// Own keys, rotated, `[sequences, capacity, kv·hd]`.
    pub k: KvMut<'a>,
    /// Own values, `[sequences, capacity, kv·hd]`.
    pub v: KvMut<'a>,
    /// Own positions of each sequence.
    pub capacity: usize,
    /// For each row, its sequence and the number of own positions before the row; each sequence at most once.
    pub rows: &'a [(usize, usize)],
}

/// Where attention finds keys and values.
pub enum Keys<'a> {
    /// In this batch alone.
    Batch,
    /// In a cache (of a single sequence), to which this batch is appended.
    Cache(KvLayer<'a>),
    /// In the cache of each row's own sequence, to which the row is appended.
    Sequences(KvBatch<'a>),
}

/// n1 = rmsnorm(x)·w1.
fn first_norm(ctx: &Ctx<'_>, w: &FrozenBlock<'_>, x: &[f32], b: &mut BlockBufs) {
    ctx.kernels.rmsnorm(x, w.attn_norm, ctx.config.rms_eps, &mut b.n1[..x.len()]);
}

/// From n1 to x2: the part that a block with [`Keep::Attention`] doesn't recompute.
pub fn attention_part(
    ctx: &Ctx<'_>,
    w: &FrozenBlock<'_>,
    pairs: &BlockPairs<'_>,
    rows: RowMap<'_>,
    x: &[f32],
    b: &mut BlockBufs,
    keys: Keys<'_>,
    dropout: Dropout,
) {
    let (c, m) = (ctx.config, rows.rows());
    let (md, mq, mkv) = (m * c.d_model, m * c.d_q(), m * c.d_kv());
    let mut scratch = LinearScratch { acts: &mut b.acts, kernel: &mut b.kernel, dropped: &mut b.dropped };
    let AttentionActs { q, k, v, att, lse, x2, low: [lq, lk, lv, lo] } = &mut b.attention;
    linear::forward(
        ctx,
        m,
        &b.n1[..md],
        &mut [
            layer(w, pairs, Proj::Q, lq, &mut q[..mq], false),
            layer(w, pairs, Proj::K, lk, &mut k[..mkv], false),
            layer(w, pairs, Proj::V, lv, &mut v[..mkv], false),
        ],
        dropout.at(0),
        &mut scratch,
    );
    let half = c.rope_dim / 2;
    let pos = |r: usize| rows.pos[r] as usize;
    ctx.kernels.rope(&mut q[..mq], c.n_heads, c.head_dim, ctx.rope, half, pos, false);
    ctx.kernels.rope(&mut k[..mkv], c.n_kv_heads, c.head_dim, ctx.rope, half, pos, false);
    attention(ctx, rows, q, k, v, att, lse, keys, scratch.kernel);
    ctx.kernels.copy(x, c.d_model, &mut x2[..md]);
    let o = layer(w, pairs, Proj::O, lo, &mut x2[..md], true);
    linear::forward(ctx, m, &att[..mq], &mut [o], dropout.at(1), &mut scratch);
}

/// n2 = rmsnorm(x2)·w2.
fn second_norm(ctx: &Ctx<'_>, w: &FrozenBlock<'_>, md: usize, b: &mut BlockBufs) {
    ctx.kernels.rmsnorm(&b.attention.x2[..md], w.ffn_norm, ctx.config.rms_eps, &mut b.n2[..md]);
}

/// g and u from n2: the part that a block with [`Keep::All`] doesn't recompute either.
pub fn gate_up_part(
    ctx: &Ctx<'_>,
    w: &FrozenBlock<'_>,
    pairs: &BlockPairs<'_>,
    m: usize,
    b: &mut BlockBufs,
    dropout: Dropout,
) {
    let (md, mf) = (m * ctx.config.d_model, m * ctx.config.d_ff);
    let mut scratch = LinearScratch { acts: &mut b.acts, kernel: &mut b.kernel, dropped: &mut b.dropped };
    let MlpActs { g, u, low: [lg, lu, _] } = &mut b.mlp;
    linear::forward(
        ctx,
        m,
        &b.n2[..md],
        &mut [
            layer(w, pairs, Proj::Gate, lg, &mut g[..mf], false),
            layer(w, pairs, Proj::Up, lu, &mut u[..mf], false),
        ],
        dropout.at(2),
        &mut scratch,
    );
}

/// h = silu(g)∘u.
fn activation(ctx: &Ctx<'_>, mf: usize, b: &mut BlockBufs) {
    ctx.kernels.swiglu(&b.mlp.g[..mf], &b.mlp.u[..mf], &mut b.h[..mf]);
}

fn attention(
    ctx: &Ctx<'_>,
    rows: RowMap<'_>,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    att: &mut [f32],
    lse: &mut [f32],
    keys: Keys<'_>,
    scratch: &mut [f32],
) {
    let c = ctx.config;
    let (dq, dkv) = (c.d_q(), c.d_kv());
    let shape = |t: usize, past: usize| attn_shape(c, t, past);
    match keys {
        Keys::Cache(mut cache) => {
            let (t, past) = (rows.rows(), cache.past);
            cache.k.store(past * dkv, &k[..t * dkv]);
            cache.v.store(past * dkv, &v[..t * dkv]);
            let own = KvRows { k: cache.k.first((past + t) * dkv), v: cache.v.first((past + t) * dkv) };
            let s = shape(t, cache.prefix.k.len() / dkv + past);
            ctx.kernels.attention_cached(s, &q[..t * dq], cache.prefix, own, &mut att[..t * dq], scratch);
        }
        Keys::Sequences(mut batch) => {
            let first = |sequence: usize| sequence * batch.capacity * dkv;
            let each = k.chunks_exact(dkv).zip(v.chunks_exact(dkv));
            for (&(sequence, past), (k, v)) in batch.rows.iter().zip(each) {
                assert!(past < batch.capacity);
                batch.k.store(first(sequence) + past * dkv, k);
                batch.v.store(first(sequence) + past * dkv, v);
            }
            let (t, keys, values) = (rows.rows(), &batch.k, &batch.v);
            let own = |r: usize| {
                let (sequence, past) = batch.rows[r];
                let at = first(sequence)..first(sequence) + (past + 1) * dkv;
                KvRows { k: keys.range(at.clone()), v: values.range(at) }
            };
            let s = shape(t, batch.prefix.k.len() / dkv);
            ctx.kernels.attention_batched(s, &q[..t * dq], batch.prefix, own, &mut att[..t * dq], scratch);
        }
        Keys::Batch => {
            for s in rows.seqs {
                let (qs, ks) = (s.start * dq..s.end * dq, s.start * dkv..s.end * dkv);
                let keep = lse.get_mut(s.start * c.n_heads..s.end * c.n_heads);
                let (k, v) = (&k[ks.clone()], &v[ks]);
                ctx.kernels.attention(shape(s.len(), 0), &q[qs.clone()], k, v, &mut att[qs], keep, scratch);
            }
        }
    }
}

fn attn_shape(c: &ModelConfig, t: usize, past: usize) -> AttnShape {
    AttnShape { t, past, n_heads: c.n_heads, n_kv_heads: c.n_kv_heads, head_dim: c.head_dim }
}

/// y = block(x), both `[m, d]`.
pub fn forward(
    ctx: &Ctx<'_>,
    w: &FrozenBlock<'_>,
    pairs: &BlockPairs<'_>,
    rows: RowMap<'_>,
    x: &[f32],
    y: &mut [f32],
    b: &mut BlockBufs,
    keys: Keys<'_>,
    dropout: Dropout,
) {
    let (c, m) = (ctx.config, rows.rows());
    first_norm(ctx, w, x, b);
    attention_part(ctx, w, pairs, rows, x, b, keys, dropout);
    second_norm(ctx, w, m * c.d_model, b);
    gate_up_part(ctx, w, pairs, m, b, dropout);
    activation(ctx, m * c.d_ff, b);
    let mut scratch = LinearScratch { acts: &mut b.acts, kernel: &mut b.kernel, dropped: &mut b.dropped };
    ctx.kernels.copy(&b.attention.x2[..m * c.d_model], c.d_model, y);
    let down = layer(w, pairs, Proj::Down, &mut b.mlp.low[2], y, true);
    linear::forward(ctx, m, &b.h[..m * c.d_ff], &mut [down], dropout.at(3), &mut scratch);
}

/// Turns dy into dx in place, for the block with input x and output y (read only if Down has a gain). Adds to
/// the adapter's gradients, or produces those of the weights. The buffers hold the part of this block's forward
/// that `found` names; afterwards they hold none of it.
///
/// If `want_dx` is false, dy is left meaningless: nothing below the first trained block needs it.
pub fn backward<'g>(
    ctx: &Ctx<'_>,
    w: &FrozenBlock<'_>,
    pairs: &BlockPairs<'_>,
    grads: impl Into<BlockGrads<'g>>,
    rows: RowMap<'_>,
    (x, y): (&[f32], &[f32]),
    dy: &mut [f32],
    b: &mut BlockBufs,
    found: Keep,
    dropout: Dropout,
    want_dx: bool,
) {
    recompute(ctx, w, pairs, rows, x, b, found, dropout);
    let BlockGrads { pairs: [gq, gk, gv, go, gg, gu, gd], norms: [first, second] } = grads.into();
    mlp_backward(ctx, w, pairs, [gg, gu, gd], second, rows.rows(), y, dy, b, dropout);
    attention_backward(ctx, w, pairs, [gq, gk, gv, go], first, rows, x, dy, b, dropout, want_dx);
}

/// Restores the buffers to their state after the forward.
fn recompute(
    ctx: &Ctx<'_>,
    w: &FrozenBlock<'_>,
    pairs: &BlockPairs<'_>,
    rows: RowMap<'_>,
    x: &[f32],
    b: &mut BlockBufs,
    found: Keep,
    dropout: Dropout,
) {
    let (c, m) = (ctx.config, rows.rows());
    first_norm(ctx, w, x, b);
    if found == Keep::Inputs {
        attention_part(ctx, w, pairs, rows, x, b, Keys::Batch, dropout);
    }
    second_norm(ctx, w, m * c.d_model, b);
    if found != Keep::All {
        gate_up_part(ctx, w, pairs, m, b, dropout);
    }
    activation(ctx, m * c.d_ff, b);
    if let Some(p) = pairs[Proj::Down as usize].filter(|_| found != Keep::All) {
        let (h, low) = (&b.h[..m * c.d_ff], &mut b.mlp.low[2]);
        linear::rank_input(ctx, m, h, &p, low, dropout.at(3), &mut b.dropped);
    }
}

/// dy → dx2 through y = x2 + (silu(g)∘u)·Wdᵀ.
fn mlp_backward(
    ctx: &Ctx<'_>,
    w: &FrozenBlock<'_>,
    pairs: &BlockPairs<'_>,
    [mut gg, mut gu, mut gd]: [Option<PairGrad<'_>>; 3],
    norm: Option<WeightGrad<'_>>,
    m: usize,
    y: &[f32],
    dy: &mut [f32],
    b: &mut BlockBufs,
    dropout: Dropout,
) {
    let c = ctx.config;
    let (md, mf) = (m * c.d_model, m * c.d_ff);
    let MlpActs { g, u, low: [lg, lu, ld] } = &mut b.mlp;
    let mut s = LinearScratch { acts: &mut b.acts, kernel: &mut b.kernel, dropped: &mut b.dropped };
    let part = m * pairs.iter().flatten().map(|p| p.rank).max().unwrap_or(0);
    let (d0, d1) = b.dlow.split_at_mut(part);
    // y = x2 + h·Wdᵀ; with a gain n1 takes the gradient of its output, and is computed again for q, k, v
    let (pair, between) = (pairs[Proj::Down as usize], (y, &b.attention.x2[..md]));
    let own = linear::backward_gain_residual(ctx, pair, &mut gd, between, dy, &mut b.n1);
    let mut down = [grad(w, pairs, Proj::Down, ld, d0, own, gd)];
    linear::backward_pairs(ctx, m, &b.h[..mf], &mut down, dropout.at(3), &mut s);
    linear::backward_input(ctx, m, &down, &mut b.h[..mf], dropout.at(3), &mut s);
    // h = silu(g)∘u
    activation_backward(ctx, pairs, (&mut gg, &mut gu), &mut g[..mf], &mut u[..mf], &b.h[..mf]);
    // g, u = n2·Wgᵀ, n2·Wuᵀ
    let mut both =
        [grad(w, pairs, Proj::Gate, lg, d0, &g[..mf], gg), grad(w, pairs, Proj::Up, lu, d1, &u[..mf], gu)];
    linear::backward_pairs(ctx, m, &b.n2[..md], &mut both, dropout.at(2), &mut s);
    linear::backward_input(ctx, m, &both, &mut b.n2[..md], dropout.at(2), &mut s);
    // n2 = rmsnorm(x2)·w2
    norm_backward(ctx, &b.attention.x2[..md], w.ffn_norm, norm, &b.n2[..md], dy);
}

/// Through n = rmsnorm(x)·w: adds to dx, and produces the gradient of w if w is trained.
fn norm_backward(
    ctx: &Ctx<'_>,
    x: &[f32],
    w: &[f32],
    grad: Option<WeightGrad<'_>>,
    dn: &[f32],
    dx: &mut [f32],
) {
    if let Some(grad) = grad {
        ctx.kernels.rmsnorm_weight_bwd(x, ctx.config.rms_eps, dn, grad.begun());
    }
    ctx.kernels.rmsnorm_bwd(x, w, ctx.config.rms_eps, dn, dx);
}

/// g, u → dg, du, with any gains of gate and up already in them.
fn activation_backward(
    ctx: &Ctx<'_>,
    pairs: &BlockPairs<'_>,
    (gg, gu): (&mut Option<PairGrad<'_>>, &mut Option<PairGrad<'_>>),
    g: &mut [f32],
    u: &mut [f32],
    dh: &[f32],
) {
    let gain = |p: Proj| pairs[p as usize].and_then(|pair| pair.gain);
    let (gate, up) = (gain(Proj::Gate), gain(Proj::Up));
    if gate.is_none() && up.is_none() {
        return ctx.kernels.swiglu_bwd(g, u, dh);
    }
    let gate = gate.as_ref().zip(gg.as_mut()).map(|(gain, grad)| (gain.c, dora::sum(gain, grad.m)));
    let up = up.as_ref().zip(gu.as_mut()).map(|(gain, grad)| (gain.c, dora::sum(gain, grad.m)));
    ctx.kernels.swiglu_bwd_gains(g, u, dh, ctx.config.d_ff, [gate, up]);
}

/// dx2 → dx through x2 = x + attention(rope(q), rope(k), v)·Woᵀ.
fn attention_backward(
    ctx: &Ctx<'_>,
    w: &FrozenBlock<'_>,
    pairs: &BlockPairs<'_>,
    [mut gq, mut gk, mut gv, mut go]: [Option<PairGrad<'_>>; 4],
    norm: Option<WeightGrad<'_>>,
    rows: RowMap<'_>,
    x: &[f32],
    dy: &mut [f32],
    b: &mut BlockBufs,
    dropout: Dropout,
    want_dx: bool,
) {
    let (c, m) = (ctx.config, rows.rows());
    let (md, mq, mkv) = (m * c.d_model, m * c.d_q(), m * c.d_kv());
    let mut s = LinearScratch { acts: &mut b.acts, kernel: &mut b.kernel, dropped: &mut b.dropped };
    let part = m * pairs.iter().flatten().map(|p| p.rank).max().unwrap_or(0);
    let (d0, rest) = b.dlow.split_at_mut(part);
    let (d1, d2) = rest.split_at_mut(part);
    let AttentionActs { q, k, v, att, lse, x2, low: [lq, lk, lv, lo] } = &mut b.attention;
    // x2 = x + att·Woᵀ; h is free and takes d(att), n2 takes the gradient of the output if o has a gain
    let own =
        linear::backward_gain_residual(ctx, pairs[Proj::O as usize], &mut go, (&x2[..md], x), dy, &mut b.n2);
    let mut o = [grad(w, pairs, Proj::O, lo, d0, own, go)];
    linear::backward_pairs(ctx, m, &att[..mq], &mut o, dropout.at(1), &mut s);
    linear::backward_input(ctx, m, &o, &mut b.h[..mq], dropout.at(1), &mut s);
    // att = attention(q, k, v); g takes dq, u takes dk and dv
    let (dq, (dk, dv)) = (&mut b.mlp.g[..mq], b.mlp.u[..2 * mkv].split_at_mut(mkv));
    for seq in rows.seqs {
        let (qs, ks) = (seq.start * c.d_q()..seq.end * c.d_q(), seq.start * c.d_kv()..seq.end * c.d_kv());
        let lse = &lse[seq.start * c.n_heads..seq.end * c.n_heads];
        ctx.kernels.attention_bwd(
            attn_shape(c, seq.len(), 0),
            (&q[qs.clone()], &k[ks.clone()], &v[ks.clone()]),
            (&att[qs.clone()], lse, &b.h[qs.clone()]),
            (&mut dq[qs], &mut dk[ks.clone()], &mut dv[ks]),
            &mut b.per_head,
            s.kernel,
        );
    }
    let pos = |r: usize| rows.pos[r] as usize;
    ctx.kernels.rope(dq, c.n_heads, c.head_dim, ctx.rope, c.rope_dim / 2, pos, true);
    ctx.kernels.rope(dk, c.n_kv_heads, c.head_dim, ctx.rope, c.rope_dim / 2, pos, true);
    for (p, heads, grad, y, dy) in [
        (Proj::Q, c.n_heads, &mut gq, &mut q[..mq], &mut *dq),
        (Proj::K, c.n_kv_heads, &mut gk, &mut k[..mkv], &mut *dk),
        (Proj::V, 0, &mut gv, &mut v[..mkv], &mut *dv),
    ] {
        let pair = pairs[p as usize];
        if heads > 0 && pair.is_some_and(|pair| pair.gain.is_some()) {
            ctx.kernels.rope(y, heads, c.head_dim, ctx.rope, c.rope_dim / 2, pos, true);
        }
        linear::backward_gain(ctx, pair, grad, y, dy);
    }
    if pairs[Proj::Down as usize].is_some_and(|pair| pair.gain.is_some()) {
        ctx.kernels.rmsnorm(x, w.attn_norm, c.rms_eps, &mut b.n1[..md]);
    }
    // q, k, v = n1·Wqᵀ, n1·Wkᵀ, n1·Wvᵀ
    let mut qkv = [
        grad(w, pairs, Proj::Q, lq, d0, dq, gq),
        grad(w, pairs, Proj::K, lk, d1, dk, gk),
        grad(w, pairs, Proj::V, lv, d2, dv, gv),
    ];
    linear::backward_pairs(ctx, m, &b.n1[..md], &mut qkv, dropout.at(0), &mut s);
    if want_dx {
        linear::backward_input(ctx, m, &qkv, &mut b.n1[..md], dropout.at(0), &mut s);
        // n1 = rmsnorm(x)·w1
        norm_backward(ctx, x, w.attn_norm, norm, &b.n1[..md], dy);
    }
}

fn layer<'a>(
    w: &FrozenBlock<'a>,
    pairs: &BlockPairs<'a>,
    p: Proj,
    h: &'a mut [f32],
    y: &'a mut [f32],
    accumulate: bool,
) -> Linear<'a> {
    Linear { w: w.proj(p), pair: pairs[p as usize], h, y, accumulate }
}

fn grad<'a>(
    w: &FrozenBlock<'a>,
    pairs: &BlockPairs<'a>,
    p: Proj,
    h: &'a [f32],
    dh: &'a mut [f32],
    dy: &'a [f32],
    grad: Option<PairGrad<'a>>,
) -> LinearGrad<'a> {
    LinearGrad { w: w.proj(p), pair: pairs[p as usize], h, dh, dy, grad }
}

impl Dropout {
    /// The dropout of one of the block's four inputs.
    fn at(self, input: u64) -> Dropout {
        Dropout { p: self.p, key: self.key.wrapping_mul(4).wrapping_add(input).wrapping_mul(8) }
    }
}
