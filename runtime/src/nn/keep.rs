//! What a block keeps of its forward for its backward: only its input, or more, in f32 or bf16.
//!
//! f32 costs no copy: the block's own vectors replace the shared ones while it computes, so its gradients equal
//! those of recomputation to the bit. bf16 takes half the memory, and is converted after the forward and before
//! the backward.

use engraft_kernels::Kernels;

use super::block::{AttentionActs, BlockBufs, BlockWords, MlpActs};
use crate::model::ModelConfig;

/// What a block's backward finds of its forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keep {
    /// The block's input alone: full checkpointing.
    #[default]
    Inputs,
    /// Also q, k, v, the attention's output and log-sum-exp, x2, and the rank-r inputs of q, k, v, o.
    Attention,
    /// Also gate and up, and the rank-r inputs of gate, up, down. Only norms and the activation are recomputed,
    /// row by row.
    All,
}

/// How kept values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeepPrecision {
    /// As computed: gradients equal those of recomputation, to the bit.
    #[default]
    F32,
    /// Rounded to the nearest bf16, ties to even; the log-sum-exp stays f32, because the softmax computed from
    /// it must sum to one. For x2, only what attention added to x is rounded: DoRA's backward needs x2 − x,
    /// which the rounding of a large x would drown.
    Bf16,
}

/// f32 words one block keeps.
pub fn kept_words(w: &BlockWords, keep: Keep, precision: KeepPrecision) -> usize {
    let packed = |n: usize| match precision {
        KeepPrecision::F32 => n,
        KeepPrecision::Bf16 => n.div_ceil(2),
    };
    // Gradients reuse gate and up at full width, while rounded values are only read.
    let wide = if precision == KeepPrecision::F32 { w.wide } else { w.ff };
    let attention = 2 * packed(w.q) + 2 * packed(w.kv) + packed(w.d) + w.lse + 4 * packed(w.low);
    let mlp = 2 * packed(wide) + 3 * packed(w.low);
    match keep {
        Keep::Inputs => 0,
        Keep::Attention => attention,
        Keep::All => attention + mlp,
    }
}

/// The kept values of one block.
pub struct Kept {
    keep: Keep,
    store: Buffer,
}

#[allow(clippy::large_enum_variant, reason = "one per block, and the large one is the common one")]
enum Buffer {
    /// Vectors that swap with the shared ones.
    F32(AttentionActs, Option<MlpActs>),
    /// Two values a word, in the order of [`values`], and the log-sum-exp.
    Bf16(Vec<f32>, Vec<f32>),
}

impl Kept {
    /// Room for one block; `keep` must be more than its input.
    pub fn new(w: &BlockWords, keep: Keep, precision: KeepPrecision) -> Kept {
        let store = match precision {
            KeepPrecision::F32 => {
                Buffer::F32(AttentionActs::new(w), (keep == Keep::All).then(|| MlpActs::new(w)))
            }
            KeepPrecision::Bf16 => {
                Buffer::Bf16(vec![0.0; kept_words(w, keep, precision) - w.lse], vec![0.0; w.lse])
            }
        };
        Kept { keep, store }
    }

    /// What the backward will find.
    pub fn keep(&self) -> Keep {
        self.keep
    }

    /// Before the block's forward: swaps its own vectors into the buffers.
    pub fn lend(&mut self, b: &mut BlockBufs) {
        self.change_places(b);
    }

    /// After the block's forward over `m` rows from x: keeps its values. With bf16, the buffers no longer hold
    /// x2.
    pub fn take(&mut self, k: &Kernels, c: &ModelConfig, m: usize, x: &[f32], b: &mut BlockBufs) {
        self.change_places(b);
        let Buffer::Bf16(words, lse) = &mut self.store else { return };
        k.axpy(-1.0, x, &mut b.attention.x2[..x.len()]);
        lse[..m * c.n_heads].copy_from_slice(&b.attention.lse[..m * c.n_heads]);
        let mut rest = &mut words[..];
        for (value, n) in values(c, m, self.keep, b) {
            let (own, tail) = std::mem::take(&mut rest).split_at_mut(n.div_ceil(2));
            k.pack_bf16(&value[..n], own);
            rest = tail;
        }
    }

    /// Before the block's backward over `m` rows from x: puts the kept values into the buffers.
    pub fn give(&mut self, k: &Kernels, c: &ModelConfig, m: usize, x: &[f32], b: &mut BlockBufs) {
        self.change_places(b);
        let Buffer::Bf16(words, lse) = &self.store else { return };
        b.attention.lse[..m * c.n_heads].copy_from_slice(&lse[..m * c.n_heads]);
        let mut rest = &words[..];
        for (value, n) in values(c, m, self.keep, b) {
            let (own, tail) = rest.split_at(n.div_ceil(2));
            k.unpack_bf16(own, &mut value[..n]);
            rest = tail;
        }
        k.axpy(1.0, x, &mut b.attention.x2[..x.len()]);
    }

    /// After the block's backward: swaps the shared vectors back into the buffers.
    pub fn release(&mut self, b: &mut BlockBufs) {
        self.change_places(b);
    }

    fn change_places(&mut self, b: &mut BlockBufs) {
        if let Buffer::F32(attention, mlp) = &mut self.store {
            std::mem::swap(attention, &mut b.attention);
            if let Some(mlp) = mlp {
                std::mem::swap(mlp, &mut b.mlp);
            }
        }
    }
}

/// The buffers to keep, with their lengths for `m` rows.
fn values<'b>(
    c: &ModelConfig,
    m: usize,
    keep: Keep,
    b: &'b mut BlockBufs,
) -> impl Iterator<Item = (&'b mut Vec<f32>, usize)> {
    let AttentionActs { q, k, v, att, x2, low, .. } = &mut b.attention;
    let (mq, mkv, md, mf) = (m * c.d_q(), m * c.d_kv(), m * c.d_model, m * c.d_ff);
    let first = [(q, mq), (k, mkv), (v, mkv), (att, mq), (x2, md)];
    let mlp = (keep == Keep::All).then_some(&mut b.mlp).into_iter();
    let second = mlp.flat_map(move |MlpActs { g, u, low }| [(g, mf), (u, mf)].into_iter().chain(whole(low)));
    first.into_iter().chain(whole(low)).chain(second)
}

/// Rank-r inputs, whatever their ranks: small beside the others, so kept at full length.
fn whole<const N: usize>(low: &mut [Vec<f32>; N]) -> impl Iterator<Item = (&mut Vec<f32>, usize)> {
    low.iter_mut().map(|l| {
        let n = l.len();
        (l, n)
    })
}
