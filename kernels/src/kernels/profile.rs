//! Where the time goes: nanoseconds per class of work, as seen by the calling thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// The classes of work that are timed separately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Forward products of several rows, including the adapter's last product.
    Forward,
    /// Products of a few rows.
    Gemv,
    /// Input gradients, including the adapter's part.
    InputGradient,
    /// Weight gradients, in full fine-tuning.
    WeightGradient,
    /// The adapter's own rank-r products.
    RankR,
    /// Quantization of activations.
    Quantize,
    /// Attention, forward and backward.
    Attention,
    /// Norms, rotary embedding, SwiGLU and other row work.
    Rows,
    /// Softmax and cross-entropy over logits.
    CrossEntropy,
    /// The optimizer.
    Optimizer,
}

impl Op {
    /// What it is, for people.
    pub fn words(self) -> &'static str {
        match self {
            Op::Forward => "forward products",
            Op::Gemv => "products of a few rows",
            Op::InputGradient => "gradients of inputs",
            Op::WeightGradient => "gradients of weights",
            Op::RankR => "the adapter's own products",
            Op::Quantize => "rounding of activations",
            Op::Attention => "attention",
            Op::Rows => "norms, rotations, gates",
            Op::CrossEntropy => "softmax and loss",
            Op::Optimizer => "optimizer",
        }
    }

    /// All classes.
    pub const ALL: [Op; 10] = [
        Op::Forward,
        Op::Gemv,
        Op::InputGradient,
        Op::WeightGradient,
        Op::RankR,
        Op::Quantize,
        Op::Attention,
        Op::Rows,
        Op::CrossEntropy,
        Op::Optimizer,
    ];
}

/// Nanoseconds per class.
#[derive(Default)]
pub(super) struct Profile([AtomicU64; Op::ALL.len()]);

impl Profile {
    /// Adds the time until the result is dropped to a class.
    pub(super) fn timed(&self, op: Op) -> Timed<'_> {
        Timed(&self.0[op as usize], Instant::now())
    }

    /// All classes with their nanoseconds.
    pub(super) fn all(&self) -> impl Iterator<Item = (Op, u64)> + '_ {
        Op::ALL.into_iter().map(|op| (op, self.0[op as usize].load(Ordering::Relaxed)))
    }

    /// Resets all classes.
    pub(super) fn reset(&self) {
        self.0.iter().for_each(|t| t.store(0, Ordering::Relaxed));
    }
}

/// Adds its lifetime to a class.
pub(super) struct Timed<'a>(&'a AtomicU64, Instant);

impl Drop for Timed<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(self.1.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }
}
