//! EVA (Paischer et al., arXiv 2410.07170): initializes A with the directions in which a projection's inputs
//! vary most over a few batches of data. B starts at zero, so the model is unchanged.
//!
//! Only rows with a target count, as in PEFT's default, but uncentered: PEFT first subtracts their mean. Ranks
//! stay equal (ρ = 1). Nothing depends on A yet, so the walk goes block by block: all batches pass a block, its
//! inputs are collected, and their leading right singular vectors become A.

use std::sync::Arc;

use engraft_kernels::Kernels;

use super::subspace::Subspace;
use crate::adapter::{Adapter, Init, Layout};
use crate::data::Batch;
use crate::data::batches::NO_TARGET;
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::model::weights::ModelFile;
use crate::model::{ModelConfig, Proj};
use crate::nn::block::{self, BlockBufs, BlockWords, Keys};
use crate::nn::{Ctx, Dropout, Precision, RowMap, rope};
use crate::rng::Rng;

/// Projections that share an input, in the order of [`BlockBufs::inputs`].
const SHARING: [&[Proj]; 4] =
    [&[Proj::Q, Proj::K, Proj::V], &[Proj::O], &[Proj::Gate, Proj::Up], &[Proj::Down]];
/// First random stream of the starting vectors; each input of each block has its own.
const STREAM: u64 = 0x4556_4100 << 32;

/// f32 words of everything [`initialize`] allocates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvaWords {
    rows: usize,
    seq: usize,
    /// Rows of all batches.
    tokens: usize,
    /// Width of each collected input; 0 if no projection reading it is adapted.
    widths: [usize; 4],
    rank: usize,
    block: BlockWords,
    d: usize,
    rope: usize,
}

impl EvaWords {
    /// For batches of at most `rows` rows, `tokens` in total, in sequences of at most `seq`.
    pub fn new(
        c: &ModelConfig,
        layout: &Layout,
        (rows, seq, tokens): (usize, usize, usize),
        threads: usize,
    ) -> EvaWords {
        let adapted = |projs: &[Proj]| layout.slots().any(|(_, p, _)| projs.contains(&p));
        let widths = SHARING.map(|projs| if adapted(projs) { projs[0].shape(c).1 } else { 0 });
        EvaWords {
            rows,
            seq,
            tokens,
            widths,
            rank: layout.rank_max(),
            block: BlockWords::new(c, rows, seq, 0, threads, false, false),
            d: c.d_model,
            rope: rope::table_words(c, seq),
        }
    }

    /// Total words.
    pub fn total(&self) -> usize {
        let widest = self.widths.into_iter().max().unwrap_or(0);
        (self.tokens + self.rows) * self.d
            + self.tokens * (1 + self.widths.iter().sum::<usize>())
            + Subspace::words(self.tokens, widest, self.rank)
            + self.block.activations()
            + self.block.kernel()
            + self.rope
    }
}

/// Sets A of every adapted projection from its inputs over `batches`. After each batch and each input,
/// `progress` receives the number of blocks done; return false to stop, which leaves A partly set.
///
/// # Errors
/// `Misuse` if a rank exceeds its projection's width; `BadData` for batches without a target; `NonFinite` if an
/// input isn't finite; `Cancelled`.
pub fn initialize(
    adapter: &mut Adapter,
    model: &ModelFile,
    kernels: &Arc<Kernels>,
    precision: Precision,
    batches: &[Batch],
    seed: u64,
    mut progress: impl FnMut(usize) -> bool,
) -> Result<()> {
    if let Some((layer, proj, s)) = adapter.layout.slots().find(|(_, _, s)| s.rank > s.inputs) {
        let message = format!(
            "EVA: rank {} of {} in block {layer} exceeds its {} inputs",
            s.rank,
            proj.hf_name(),
            s.inputs
        );
        return Err(Error::new(ErrorKind::Misuse, message).advise(Advice::LowerRank));
    }
    if !batches.iter().any(|b| b.trained_tokens() > 0) {
        return Err(Error::new(ErrorKind::BadData, "EVA: none of the batches has a token to train on"));
    }
    let c = model.config();
    let mut walk = Walk::new(model, kernels, precision, &adapter.layout, batches);
    let last = adapter.layout.layers().last().copied().unwrap_or(0);
    for layer in 0..=last {
        let adapted = adapter.layout.block(layer).is_some();
        let mut go_on = || match progress(layer) {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Cancelled, "stopped during EVA initialization")),
        };
        let rows = walk.pass(layer, adapted, &mut go_on)?;
        for (which, projs) in SHARING.into_iter().enumerate().filter(|_| adapted) {
            walk.set(adapter, (layer, which, projs), rows, seed)
                .map_err(|e| e.at(format!("EVA: {}, block {layer} of {}", projs[0].hf_name(), c.n_layers)))?;
            go_on()?;
        }
    }
    adapter.meta.init = Init::Eva;
    Ok(())
}

/// All batches, advancing through the blocks together.
struct Walk<'a> {
    model: &'a ModelFile,
    kernels: &'a Kernels,
    precision: Precision,
    batches: &'a [Batch],
    words: EvaWords,
    rope: Vec<f32>,
    /// Hidden states of all batches, `[tokens, d]`, and of one after a block.
    x: Vec<f32>,
    y: Vec<f32>,
    /// Positions of all batches' rows.
    pos: Vec<u32>,
    block: BlockBufs,
    /// Collected inputs, `[tokens, width]` each.
    inputs: [Vec<f32>; 4],
    space: Subspace,
}

impl<'a> Walk<'a> {
    fn new(
        model: &'a ModelFile,
        kernels: &'a Kernels,
        precision: Precision,
        layout: &Layout,
        batches: &'a [Batch],
    ) -> Walk<'a> {
        let c = model.config();
        let tokens = batches.iter().map(Batch::rows).sum();
        let rows = batches.iter().map(Batch::rows).max().unwrap_or(0);
        let seqs = || batches.iter().flat_map(|b| &b.seqs);
        let seq = seqs().map(|s| s.len()).max().unwrap_or(0);
        let words = EvaWords::new(c, layout, (rows, seq, tokens), kernels.threads());
        let mut table = vec![0.0; words.rope];
        rope::table(c, model.rope_freqs(), &mut table);
        let mut x = vec![0.0; tokens * words.d];
        let ids: Vec<u32> = batches.iter().flat_map(|b| &b.ids).copied().collect();
        kernels.rows(words.d, &mut x, |r, row| {
            kernels.dequantize_row(&model.token_embd(), ids[r] as usize, row);
        });
        let widest = words.widths.into_iter().max().unwrap_or(0);
        Walk {
            rope: table,
            x,
            y: vec![0.0; rows * words.d],
            pos: seqs().flat_map(|s| 0..s.len() as u32).collect(),
            block: BlockBufs::new(&words.block, words.block.kernel()),
            inputs: words.widths.map(|width| vec![0.0; tokens * width]),
            space: Subspace::new(tokens, widest, words.rank),
            words,
            model,
            kernels,
            precision,
            batches,
        }
    }

    /// Passes all batches through a block. With `collect`, keeps its inputs for the rows with a target; returns
    /// how many there are. Calls `go_on` after each batch, and stops if it fails.
    fn pass(&mut self, layer: usize, collect: bool, go_on: &mut impl FnMut() -> Result<()>) -> Result<usize> {
        let (c, d) = (self.model.config(), self.words.d);
        let ctx = Ctx::new(self.kernels, c, &self.rope, self.precision);
        let (mut first, mut kept) = (0, 0);
        for batch in self.batches {
            let m = batch.rows();
            let rows = RowMap { seqs: &batch.seqs, pos: &self.pos[first..first + m] };
            let (x, y) = (&mut self.x[first * d..(first + m) * d], &mut self.y[..m * d]);
            let (w, b) = (self.model.block(layer), &mut self.block);
            block::forward(&ctx, &w, &[None; 7], rows, x, y, b, Keys::Batch, Dropout::OFF);
            x.copy_from_slice(y);
            first += m;
            let targets = batch.targets.iter().enumerate().filter(|(_, t)| collect && **t != NO_TARGET);
            for (row, _) in targets {
                for (own, input) in self.inputs.iter_mut().zip(self.block.inputs(c, m)) {
                    let width = input.len() / m;
                    if !own.is_empty() {
                        own[kept * width..(kept + 1) * width]
                            .copy_from_slice(&input[row * width..(row + 1) * width]);
                    }
                }
                kept += 1;
            }
            go_on()?;
        }
        Ok(kept)
    }

    /// Sets A of the projections that share an input, from the first rows of the same vectors.
    fn set(
        &mut self,
        adapter: &mut Adapter,
        (layer, which, projs): (usize, usize, &[Proj]),
        rows: usize,
        seed: u64,
    ) -> Result<()> {
        let slots: Vec<_> = projs.iter().filter_map(|p| adapter.layout.slot(layer, *p)).collect();
        let Some(rank) = slots.iter().map(|s| s.rank).max() else { return Ok(()) };
        let width = self.words.widths[which];
        let mut rng = Rng::new(seed, STREAM + (layer * SHARING.len() + which) as u64);
        let x = &self.inputs[which][..rows * width];
        let vectors = self.space.leading(self.kernels, x, (rows, width), rank, &mut rng);
        let vectors = vectors
            .ok_or_else(|| Error::new(ErrorKind::NonFinite, "an input isn't finite: the model is broken"))?;
        for slot in slots {
            let a = &mut adapter.theta[slot.a];
            a.copy_from_slice(&vectors[..a.len()]);
        }
        Ok(())
    }
}
