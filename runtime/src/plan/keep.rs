//! What each block keeps: the trade-off between memory and time.
//!
//! The backward, which needs the kept values, starts at the last block, so the last blocks keep the most. The
//! very last keeps everything for free: the shared buffers still hold its forward when its backward starts.

use std::fmt;

use super::{ArenaWords, MemoryPlan, Request};
use crate::model::ModelConfig;
use crate::nn::keep::{Keep, KeepPrecision};

/// What each kept block except the last keeps. From the end: first blocks that keep everything, then blocks
/// that keep the attention half, then blocks that keep inputs alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeepPlan {
    /// Blocks before the last that keep everything.
    pub all: usize,
    /// Blocks before those that keep the attention half.
    pub attention: usize,
    /// How they store it.
    pub precision: KeepPrecision,
}

impl KeepPlan {
    /// One level for all of `kept_blocks` blocks.
    pub fn uniform(keep: Keep, precision: KeepPrecision, kept_blocks: usize) -> KeepPlan {
        let blocks = kept_blocks.saturating_sub(1);
        let count = |level: Keep| if keep == level { blocks } else { 0 };
        KeepPlan { all: count(Keep::All), attention: count(Keep::Attention), precision }
    }

    /// What the block `from_last` blocks before the last keeps in its own memory. (The last, 0, needs none.)
    pub fn of(&self, from_last: usize) -> Keep {
        match from_last {
            0 => Keep::Inputs,
            n if n <= self.all => Keep::All,
            n if n <= self.all + self.attention => Keep::Attention,
            _ => Keep::Inputs,
        }
    }

    /// Blocks that keep more than their input in their own memory.
    pub fn blocks(&self) -> usize {
        self.all + self.attention
    }

    /// For people and JSON: `inputs`, `attention`, `all`, or how many blocks keep what.
    pub fn describe(&self, kept_blocks: usize) -> String {
        let inputs = kept_blocks.saturating_sub(1 + self.blocks());
        let parts: Vec<_> = [("all", self.all), ("attention", self.attention), ("inputs", inputs)]
            .into_iter()
            .filter(|(_, n)| *n > 0)
            .collect();
        match parts[..] {
            [] => "inputs".into(),
            [(name, _)] => name.into(),
            _ => parts.iter().map(|(name, n)| format!("{name} {n}")).collect::<Vec<_>>().join(", "),
        }
    }
}

impl fmt::Display for KeepPrecision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            KeepPrecision::F32 => "f32",
            KeepPrecision::Bf16 => "bf16",
        })
    }
}

/// Private memory a run may take by default: without a budget, the automatic choice keeps what fits into it.
pub const UNASKED_BYTES: usize = 128 << 20;

/// Steps between "inputs" and "all" that the ladder shows.
const QUARTERS: usize = 4;

/// Multiply-adds per row for each half of a block's forward, which keeping it saves. Includes the adapter's,
/// and the attention's over `seq` positions.
fn costs(c: &ModelConfig, r: &Request) -> (usize, usize) {
    let low = |n: usize, k: usize| n * k + r.rank * (n + k);
    let scores = r.seq * c.d_q();
    let attention = 2 * low(c.d_q(), c.d_model) + 2 * low(c.d_kv(), c.d_model) + scores;
    let mlp = 2 * low(c.d_ff, c.d_model);
    (attention, mlp)
}

/// The pattern that saves the most multiply-adds within `budget` bytes; inputs alone if nothing fits.
///
/// The choice depends only on shapes, so planning and training agree on every machine.
pub fn choose(c: &ModelConfig, r: &Request, precision: KeepPrecision, budget: usize) -> KeepPlan {
    let blocks = r.kept_blocks.saturating_sub(1);
    let (attention, mlp) = costs(c, r);
    let fits = |keep: &KeepPlan| MemoryPlan::new(c, &Request { keep: *keep, ..*r }).private_bytes <= budget;
    let best_with = |all: usize| {
        let plan = |attention: usize| KeepPlan { all, attention, precision };
        // Memory grows with the count, so bisect for the largest that fits.
        let (mut low, mut high) = (0, blocks - all);
        while low < high {
            let middle = (low + high).div_ceil(2);
            if fits(&plan(middle)) { low = middle } else { high = middle - 1 }
        }
        plan(low)
    };
    let saved = |k: &KeepPlan| k.all * (attention + mlp) + k.attention * attention;
    let inputs = KeepPlan { precision, ..KeepPlan::default() };
    // On a tie, take the first, which keeps fewer blocks whole.
    (0..=blocks)
        .map(best_with)
        .filter(fits)
        .fold(inputs, |best, k| if saved(&k) > saved(&best) { k } else { best })
}

/// The rungs to show for one precision, from inputs alone to everything.
pub fn rungs(precision: KeepPrecision, kept_blocks: usize) -> Vec<KeepPlan> {
    let blocks = kept_blocks.saturating_sub(1);
    let part = |quarters: usize| blocks * quarters / QUARTERS;
    let attention = [2, 4].map(|q| KeepPlan { attention: part(q), all: 0, precision });
    let all = [1, 2, 3, 4].map(|q| KeepPlan { all: part(q), attention: blocks - part(q), precision });
    let mut rungs = vec![KeepPlan { precision, ..KeepPlan::default() }];
    for rung in attention.into_iter().chain(all) {
        if !rungs.contains(&rung) {
            rungs.push(rung);
        }
    }
    rungs
}

impl ArenaWords {
    /// f32 words of the activations blocks keep for their backward.
    pub fn kept(&self) -> usize {
        let words = |keep: Keep| crate::nn::keep::kept_words(&self.block, keep, self.keep.precision);
        self.keep.all * words(Keep::All) + self.keep.attention * words(Keep::Attention)
    }
}
