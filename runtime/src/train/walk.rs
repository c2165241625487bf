//! All batches, advancing through the blocks of a base together: what passes a block is there for all of them before
//! the next block begins, so that only one block's inputs are ever looked at.

use std::sync::Arc;

use engraft_kernels::Kernels;

use crate::adapter::Layout;
use crate::data::Batch;
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::model::weights::ModelFile;
use crate::model::{ModelConfig, Proj};
use crate::nn::block::{self, BlockBufs, BlockWords, Keys};
use crate::nn::{Ctx, Dropout, Precision, RowMap, rope};

/// Projections that share an input, in the order of [`BlockBufs::inputs`].
pub(super) const SHARING: [&[Proj]; 4] =
    [&[Proj::Q, Proj::K, Proj::V], &[Proj::O], &[Proj::Gate, Proj::Up], &[Proj::Down]];

/// f32 words of a [`Walk`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WalkWords {
    rows: usize,
    tokens: usize,
    block: BlockWords,
    d: usize,
    rope: usize,
}

impl WalkWords {
    /// For batches of at most `rows` rows, `tokens` in total, in sequences of at most `seq`.
    pub(super) fn new(
        c: &ModelConfig,
        (rows, seq, tokens): (usize, usize, usize),
        threads: usize,
    ) -> WalkWords {
        let block = BlockWords::new(c, rows, seq, 0, threads, false, false);
        WalkWords { rows, tokens, block, d: c.d_model, rope: rope::table_words(c, seq) }
    }

    /// Total words.
    pub(super) fn total(&self) -> usize {
        let hidden = (self.tokens + self.rows) * self.d + self.tokens;
        hidden + self.block.activations() + self.block.kernel() + self.rope
    }
}

/// The hidden states of all batches, and the buffers of one block.
pub(super) struct Walk<'a> {
    model: &'a ModelFile,
    pub(super) kernels: &'a Kernels,
    precision: Precision,
    batches: &'a [Batch],
    rope: Vec<f32>,
    /// Hidden states of all batches, `[tokens, d]`, and of one after a block.
    x: Vec<f32>,
    y: Vec<f32>,
    /// Positions of all batches' rows.
    pos: Vec<u32>,
    block: BlockBufs,
}

impl<'a> Walk<'a> {
    /// Embeds all batches.
    pub(super) fn new(
        model: &'a ModelFile,
        kernels: &'a Arc<Kernels>,
        precision: Precision,
        batches: &'a [Batch],
    ) -> Walk<'a> {
        let c = model.config();
        let words = WalkWords::new(c, extent(batches), kernels.threads());
        let mut table = vec![0.0; words.rope];
        rope::table(c, model.rope_freqs(), &mut table);
        let mut x = vec![0.0; words.tokens * words.d];
        let ids: Vec<u32> = batches.iter().flat_map(|b| &b.ids).copied().collect();
        kernels.rows(words.d, &mut x, |r, row| {
            kernels.dequantize_row(&model.token_embd(), ids[r] as usize, row);
        });
        Walk {
            rope: table,
            x,
            y: vec![0.0; words.rows * words.d],
            pos: batches.iter().flat_map(|b| &b.seqs).flat_map(|s| 0..s.len() as u32).collect(),
            block: BlockBufs::new(&words.block, words.block.kernel()),
            model,
            kernels,
            precision,
            batches,
        }
    }

    /// Passes all batches through a block; `each` gets the block's four inputs of each batch, and the kernels'
    /// scratch. Stops if it fails.
    pub(super) fn pass(
        &mut self,
        layer: usize,
        each: &mut dyn FnMut(&Batch, [&[f32]; 4], &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let c = self.model.config();
        let d = c.d_model;
        let ctx = Ctx::new(self.kernels, c, &self.rope, self.precision);
        let mut first = 0;
        for batch in self.batches {
            let m = batch.rows();
            let rows = RowMap { seqs: &batch.seqs, pos: &self.pos[first..first + m] };
            let (x, y) = (&mut self.x[first * d..(first + m) * d], &mut self.y[..m * d]);
            let (w, b) = (self.model.block(layer), &mut self.block);
            block::forward(&ctx, &w, &[None; 7], rows, x, y, b, Keys::Batch, Dropout::OFF);
            x.copy_from_slice(y);
            first += m;
            let mut scratch = std::mem::take(&mut self.block.kernel);
            let done = each(batch, self.block.inputs(c, m), &mut scratch);
            self.block.kernel = scratch;
            done?;
        }
        Ok(())
    }
}

/// Rows of the largest batch, the longest sequence, and the rows of all batches.
pub(super) fn extent(batches: &[Batch]) -> (usize, usize, usize) {
    let seqs = batches.iter().flat_map(|b| &b.seqs);
    let rows = batches.iter().map(Batch::rows).max().unwrap_or(0);
    (rows, seqs.map(|s| s.len()).max().unwrap_or(0), batches.iter().map(Batch::rows).sum())
}

/// Width of each input; 0 if no projection that reads it is adapted.
pub(super) fn widths(c: &ModelConfig, layout: &Layout) -> [usize; 4] {
    let adapted = |projs: &[Proj]| layout.slots().any(|(_, p, _)| projs.contains(&p));
    SHARING.map(|projs| if adapted(projs) { projs[0].shape(c).1 } else { 0 })
}

/// The error for an input that holds a NaN or an infinity.
pub(super) fn not_finite() -> Error {
    Error::new(ErrorKind::NonFinite, "an input isn't finite: the model is broken")
}

/// Refuses more directions than an input has.
///
/// # Errors
/// `Misuse` if a rank exceeds its projection's width.
pub(super) fn check_ranks(layout: &Layout) -> Result<()> {
    let Some((layer, proj, slot)) = layout.slots().find(|(_, _, s)| s.rank > s.inputs) else { return Ok(()) };
    let (name, rank, inputs) = (proj.hf_name(), slot.rank, slot.inputs);
    let message = format!("rank {rank} of {name} in block {layer} exceeds its {inputs} inputs");
    Err(Error::new(ErrorKind::Misuse, message).advise(Advice::LowerRank))
}
