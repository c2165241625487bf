//! What a block keeps of its forward for its backward: nothing but its input, or more, in f32 or bf16.
//!
//! f32 costs no copy: the block's own vectors take the place of the shared ones while it computes, so
//! its gradients are those of recomputation to the bit. bf16 takes half the room and is converted after
//! the forward and before the backward.

use engraft_kernels::Kernels;

use super::block::{AttentionActs, BlockBufs, BlockWords, MlpActs};
use crate::model::ModelConfig;

/// What the backward of a block finds of its forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keep {
    /// The block's input alone: full checkpointing.
    #[default]
    Inputs,
    /// Also q, k, v, the attention's output and log-sum-exp, x2, and the rank-r inputs of q, k, v, o.
    Attention,
    /// Also gate and up, and the rank-r inputs of gate, up, down: what is left to do again are norms and
    /// the activation, row by row.
    All,
}

/// How kept values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeepPrecision {
    /// As computed: gradients are those of recomputation, to the bit.
    #[default]
    F32,
    /// Rounded to the nearest bf16, ties to even; the log-sum-exp stays f32, for the softmax computed from
    /// it must sum to one. Of x2 what the attention added to x is rounded: the backward of DoRA takes it
    /// as x2 − x, and beside a large x its rounding would drown it.
    Bf16,
}

/// f32 words that one block keeps.
pub fn kept_words(w: &BlockWords, keep: Keep, precision: KeepPrecision) -> usize {
    let packed = |n: usize| match precision {
        KeepPrecision::F32 => n,
        KeepPrecision::Bf16 => n.div_ceil(2),
    };
    // The gradients that reuse gate and up need their whole width; rounded values are only read.
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
    /// Vectors that change places with the shared ones.
    F32(AttentionActs, Option<MlpActs>),
    /// Two values a word, in the order of [`values`], and the log-sum-exp.
    Bf16(Vec<f32>, Vec<f32>),
}

impl Kept {
    /// Room for one block; `keep` is more than its input.
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

    /// Before the block's forward: its own vectors into the buffers.
    pub fn lend(&mut self, b: &mut BlockBufs) {
        self.change_places(b);
    }

    /// After the block's forward over `m` rows from x: keeps its values. Of bf16 the buffers no longer
    /// hold x2.
    pub fn take(&mut self, k: &Kernels, c: &ModelConfig, m: usize, x: &[f32], b: &mut BlockBufs) {
        self.change_places(b);
        let Buffer::Bf16(words, lse) = &mut self.store else { return };
        k.axpy(-1.0, x, &mut b.attention.x2[..x.len()]);
        lse[..m * c.n_heads].copy_from_slice(&b.attention.lse[..m * c.n_heads]);
        let mut rest = &mut words[..];
        for (value, n) in values(c, m, self.keep, b) {
            let (own, tail) = std::mem::take(&mut rest).split_at_mut(n.div_ceil(2));
            pack_bf16(k, &value[..n], own);
            rest = tail;
        }
    }

    /// Before the block's backward over `m` rows from x: the kept values into the buffers.
    pub fn give(&mut self, k: &Kernels, c: &ModelConfig, m: usize, x: &[f32], b: &mut BlockBufs) {
        self.change_places(b);
        let Buffer::Bf16(words, lse) = &self.store else { return };
        b.attention.lse[..m * c.n_heads].copy_from_slice(&lse[..m * c.n_heads]);
        let mut rest = &words[..];
        for (value, n) in values(c, m, self.keep, b) {
            let (own, tail) = rest.split_at(n.div_ceil(2));
            unpack_bf16(k, own, &mut value[..n]);
            rest = tail;
        }
        k.axpy(1.0, x, &mut b.attention.x2[..x.len()]);
    }

    /// After the block's backward: the shared vectors back into the buffers.
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

/// The buffers whose values are kept, with their lengths for `m` rows.
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

/// Rank-r inputs, of whatever ranks: small beside the others, so kept at their full length.
fn whole<const N: usize>(low: &mut [Vec<f32>; N]) -> impl Iterator<Item = (&mut Vec<f32>, usize)> {
    low.iter_mut().map(|l| {
        let n = l.len();
        (l, n)
    })
}

/// Words that one item of a conversion packs.
const RUN: usize = 4096;

/// Rounds x to bf16, two values a word: of each run of 2·`RUN`, the first half in the low halves.
fn pack_bf16(k: &Kernels, x: &[f32], words: &mut [f32]) {
    k.rows(RUN, words, |i, words| {
        let x = &x[2 * i * RUN..x.len().min(2 * (i + 1) * RUN)];
        let (low, high) = x.split_at(words.len());
        let pairs = low.iter().zip(high);
        words.iter_mut().zip(pairs).for_each(|(w, (l, h))| {
            *w = f32::from_bits(round_bf16(*l) >> 16 | round_bf16(*h) & 0xffff_0000);
        });
        // Of an odd number of values the last word holds one.
        if high.len() < low.len() {
            words[high.len()] = f32::from_bits(round_bf16(low[high.len()]) >> 16);
        }
    });
}

/// The inverse of [`pack_bf16`].
fn unpack_bf16(k: &Kernels, words: &[f32], x: &mut [f32]) {
    k.rows(2 * RUN, x, |i, x| {
        let words = &words[i * RUN..words.len().min((i + 1) * RUN)];
        let (low, high) = x.split_at_mut(words.len());
        low.iter_mut().zip(words).for_each(|(x, w)| *x = f32::from_bits(w.to_bits() << 16));
        high.iter_mut().zip(words).for_each(|(x, w)| *x = f32::from_bits(w.to_bits() & 0xffff_0000));
    });
}

/// The bits of x rounded to bf16, ties to even, in the upper half; the lower half is left over. NaN
/// stays NaN.
fn round_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    if x.is_nan() { bits | 0x0040_0000 } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_round_to_the_nearest_bf16() {
        let kernels = Kernels::detect(2);
        let mut rng = crate::rng::Rng::new(5, 5);
        for n in [0, 1, 2, 7, RUN, 2 * RUN, 2 * RUN + 1, 5 * RUN + 3] {
            let mut x: Vec<f32> =
                (0..n).map(|_| rng.normal() * 10f32.powi(rng.below(60) as i32 - 30)).collect();
            let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE / 8.0];
            let ties = [0x3f80_8000, 0x3f81_8000, 0x3f80_8001].map(f32::from_bits);
            x.iter_mut().zip(special.into_iter().chain(ties)).for_each(|(x, s)| *x = s);
            let (mut words, mut back) = (vec![0.0; n.div_ceil(2)], vec![1.0; n]);
            pack_bf16(&kernels, &x, &mut words);
            unpack_bf16(&kernels, &words, &mut back);
            for (x, back) in x.iter().zip(&back) {
                assert_eq!(back.to_bits(), nearest(*x).to_bits(), "{x}");
            }
        }
        assert!(f32::from_bits(round_bf16(f32::from_bits(0x7fff_ffff)) & 0xffff_0000).is_nan());
        assert!(f32::from_bits(round_bf16(f32::from_bits(0xff80_0001)) & 0xffff_0000).is_nan());
    }

    /// The nearer of the two neighbours, by their distances; of equals the even one.
    fn nearest(x: f32) -> f32 {
        let down = x.to_bits() & 0xffff_0000;
        if f32::from_bits(down) == x {
            return x;
        }
        let up = down.wrapping_add(0x1_0000);
        // Beyond the largest bf16 the next step counts as 2^128.
        let value = |bits: u32| match f32::from_bits(bits) {
            v if v.is_finite() => f64::from(v),
            v => f64::from(v.signum()) * 2f64.powi(128),
        };
        let (to_down, to_up) = ((f64::from(x) - value(down)).abs(), (f64::from(x) - value(up)).abs());
        let pick = if to_down == to_up {
            if down >> 16 & 1 == 0 { down } else { up }
        } else if to_down < to_up {
            down
        } else {
            up
        };
        f32::from_bits(pick)
    }
}
