//! EVA (Paischer et al., arXiv 2410.07170): initializes A with the directions in which a projection's inputs
//! vary most over a few batches of data. B starts at zero, so the model is unchanged.
//!
//! Only rows with a target count, as in PEFT's default, but uncentered: PEFT first subtracts their mean. Ranks
//! stay equal (ρ = 1). Nothing depends on A yet, so the walk goes block by block: all batches pass a block, its
//! inputs are collected, and their leading right singular vectors become A.

use std::sync::Arc;

use engraft_kernels::Kernels;

use super::subspace::Subspace;
use super::walk::{SHARING, Walk, WalkWords, check_ranks, extent, not_finite, widths};
use crate::adapter::{Adapter, Init, Layout};
use crate::data::Batch;
use crate::data::batches::NO_TARGET;
use crate::error::{Error, ErrorKind, Result};
use crate::model::weights::ModelFile;
use crate::model::{ModelConfig, Proj};
use crate::nn::Precision;
use crate::rng::Rng;

/// First random stream of the starting vectors; each input of each block has its own.
const STREAM: u64 = 0x4556_4100 << 32;

/// f32 words of everything [`initialize`] allocates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvaWords {
    walk: WalkWords,
    /// Rows of all batches.
    tokens: usize,
    /// Width of each collected input; 0 if no projection reading it is adapted.
    widths: [usize; 4],
    rank: usize,
}

impl EvaWords {
    /// For batches of at most `rows` rows, `tokens` in total, in sequences of at most `seq`.
    pub fn new(
        c: &ModelConfig,
        layout: &Layout,
        (rows, seq, tokens): (usize, usize, usize),
        threads: usize,
    ) -> EvaWords {
        let walk = WalkWords::new(c, (rows, seq, tokens), threads);
        EvaWords { walk, tokens, widths: widths(c, layout), rank: layout.rank_max() }
    }

    /// Total words.
    pub fn total(&self) -> usize {
        let widest = self.widths.into_iter().max().unwrap_or(0);
        self.walk.total()
            + self.tokens * self.widths.iter().sum::<usize>()
            + Subspace::words(self.tokens, widest, self.rank)
    }
}

/// Sets A of every adapted projection from its inputs over `batches`. After each batch and each input,
/// `go_on` receives the number of blocks done; its error ends the walk, which leaves A partly set.
///
/// # Errors
/// `Misuse` if a rank exceeds its projection's width; `BadData` for batches without a target; `NonFinite` if an
/// input isn't finite; those of `go_on`.
pub fn initialize(
    adapter: &mut Adapter,
    model: &ModelFile,
    kernels: &Arc<Kernels>,
    precision: Precision,
    batches: &[Batch],
    seed: u64,
    mut go_on: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    check_ranks(&adapter.layout).map_err(|e| e.at("EVA"))?;
    if !batches.iter().any(|b| b.trained_tokens() > 0) {
        return Err(Error::new(ErrorKind::BadData, "EVA: none of the batches has a token to train on"));
    }
    let c = model.config();
    let mut walk = Walk::new(model, kernels, precision, batches);
    let mut collected = Collected::new(c, &adapter.layout, batches, kernels.threads());
    let last = adapter.layout.layers().last().copied().unwrap_or(0);
    for layer in 0..=last {
        let adapted = adapter.layout.block(layer).is_some();
        collected.rows = 0;
        walk.pass(layer, &mut |batch, inputs, _| {
            if adapted {
                collected.take(batch, inputs);
            }
            go_on(layer)
        })?;
        for (which, projs) in SHARING.into_iter().enumerate().filter(|_| adapted) {
            collected
                .set(walk.kernels, adapter, (layer, which, projs), seed)
                .map_err(|e| e.at(format!("EVA: {}, block {layer} of {}", projs[0].hf_name(), c.n_layers)))?;
            go_on(layer)?;
        }
    }
    adapter.meta.init = Init::Eva;
    Ok(())
}

/// One block's inputs at the rows with a target.
struct Collected {
    /// `[tokens, width]` each.
    inputs: [Vec<f32>; 4],
    rows: usize,
    space: Subspace,
}

impl Collected {
    fn new(c: &ModelConfig, layout: &Layout, batches: &[Batch], threads: usize) -> Collected {
        let words = EvaWords::new(c, layout, extent(batches), threads);
        let tokens = words.tokens;
        let widest = words.widths.into_iter().max().unwrap_or(0);
        Collected {
            inputs: words.widths.map(|width| vec![0.0; tokens * width]),
            rows: 0,
            space: Subspace::new(tokens, widest, words.rank),
        }
    }

    /// Adds a batch's.
    fn take(&mut self, batch: &Batch, inputs: [&[f32]; 4]) {
        let m = batch.rows();
        for (row, _) in batch.targets.iter().enumerate().filter(|(_, t)| **t != NO_TARGET) {
            for (own, input) in self.inputs.iter_mut().zip(inputs) {
                let width = input.len() / m;
                if !own.is_empty() {
                    let kept = self.rows * width..(self.rows + 1) * width;
                    own[kept].copy_from_slice(&input[row * width..(row + 1) * width]);
                }
            }
            self.rows += 1;
        }
    }

    /// Sets A of the projections that share an input, from the first rows of the same vectors.
    fn set(
        &mut self,
        kernels: &Kernels,
        adapter: &mut Adapter,
        (layer, which, projs): (usize, usize, &[Proj]),
        seed: u64,
    ) -> Result<()> {
        let slots: Vec<_> = projs.iter().filter_map(|p| adapter.layout.slot(layer, *p)).collect();
        let Some(rank) = slots.iter().map(|s| s.rank).max() else { return Ok(()) };
        let width = slots[0].inputs;
        let mut rng = Rng::new(seed, STREAM + (layer * SHARING.len() + which) as u64);
        let x = &self.inputs[which][..self.rows * width];
        let vectors = self.space.leading(kernels, x, (self.rows, width), rank, &mut rng);
        let vectors = vectors.ok_or_else(not_finite)?;
        for slot in slots {
            let a = &mut adapter.theta[slot.a];
            a.copy_from_slice(&vectors[..a.len()]);
        }
        Ok(())
    }
}
