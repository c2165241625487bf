//! A model that reads tokens, with its adapters and the buffers of one pass through all blocks.

use std::sync::Arc;

use engraft_kernels::Kernels;

use super::stacked::StackedAdapter;
use crate::error::Result;
use crate::model::ModelConfig;
use crate::model::tuned::Weights;
use crate::nn::block::{self, BlockBufs, BlockWords, Keys};
use crate::nn::head::{HeadBufs, HeadWeights, HeadWords};
use crate::nn::{Adapted, Ctx, Dropout, Precision, RowMap, rope};

/// What the buffers have room for, apart from adapters.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    /// Rows read at once.
    pub(super) rows: usize,
    /// Positions that a row may see.
    pub(super) positions: usize,
    /// Rows that the head takes at once.
    pub(super) head_rows: usize,
}

impl Extent {
    fn words(self, c: &ModelConfig, rank: usize, threads: usize) -> (BlockWords, HeadWords, usize) {
        let block = BlockWords::new(c, self.rows, self.positions, rank, threads, false, false);
        let head = HeadWords::new(c, self.head_rows, threads, false, false);
        let kernel = block.kernel().max(head.kernel());
        (block, head, kernel)
    }

    /// Bytes of the buffers, with adapters of rank `rank`.
    pub(super) fn bytes(self, c: &ModelConfig, rank: usize, threads: usize) -> usize {
        let (block, head, kernel) = self.words(c, rank, threads);
        let words = block.activations() + kernel + head.total() + rope::table_words(c, self.positions);
        // Each row's input, output and position.
        4 * (words + self.rows * (2 * c.d_model + 1))
    }
}

/// A model with adapters and buffers.
pub(super) struct Pass {
    pub(super) model: Weights,
    pub(super) kernels: Arc<Kernels>,
    pub(super) adapters: Option<Arc<StackedAdapter>>,
    pub(super) precision: Precision,
    extent: Extent,
    /// The rank the buffers have room for.
    rank: usize,
    rope: Vec<f32>,
    /// Outputs of the last pass.
    x: Vec<f32>,
    y: Vec<f32>,
    pos: Vec<u32>,
    block: BlockBufs,
    head: HeadBufs,
}

impl Pass {
    /// Allocates the buffers.
    ///
    /// # Errors
    /// `BaseMismatch` for adapters stacked for a model of other shapes.
    pub(super) fn new(
        model: Weights,
        kernels: Arc<Kernels>,
        adapters: Option<Arc<StackedAdapter>>,
        precision: Precision,
        extent: Extent,
    ) -> Result<Pass> {
        let c = model.config();
        adapters.as_ref().map_or(Ok(()), |a| a.check_fits(c))?;
        let rank = adapters.as_ref().map_or(0, |a| a.rank());
        let (block, head, kernel) = extent.words(c, rank, kernels.threads());
        let mut table = vec![0.0; rope::table_words(c, extent.positions)];
        rope::table(c, model.rope_freqs(), &mut table);
        Ok(Pass {
            rope: table,
            x: vec![0.0; extent.rows * c.d_model],
            y: vec![0.0; extent.rows * c.d_model],
            pos: Vec::with_capacity(extent.rows),
            block: BlockBufs::new(&block, kernel),
            head: HeadBufs::new(&head),
            extent,
            rank,
            precision,
            adapters,
            kernels,
            model,
        })
    }

    /// Uses other adapters from now on; buffers grow if their rank exceeds all earlier ones.
    ///
    /// # Errors
    /// `BaseMismatch` for adapters stacked for a model of other shapes; the old ones stay.
    pub(super) fn use_adapters(&mut self, adapters: Option<Arc<StackedAdapter>>) -> Result<()> {
        if let Some(new) = &adapters {
            let c = self.model.config();
            new.check_fits(c)?;
            if new.rank() > self.rank {
                self.rank = new.rank();
                let (block, _, kernel) = self.extent.words(c, self.rank, self.kernels.threads());
                self.block = BlockBufs::new(&block, kernel);
            }
        }
        self.adapters = adapters;
        Ok(())
    }

    /// Runs all blocks over tokens at their positions; leaves the outputs in [`Pass::outputs`]. `each` passes a
    /// layer's keys on.
    pub(super) fn run(
        &mut self,
        ids: &[u32],
        positions: impl Iterator<Item = usize>,
        mut each: impl FnMut(usize, &mut dyn FnMut(Keys<'_>)),
    ) {
        self.pos.clear();
        self.pos.extend(positions.map(|p| p as u32));
        let (embedding, c) = (self.model.token_embd(), self.model.config());
        let (kernels, n) = (&*self.kernels, ids.len() * c.d_model);
        kernels.rows(c.d_model, &mut self.x[..n], |r, row| {
            kernels.dequantize_row(&embedding, ids[r] as usize, row);
        });
        let ctx = Ctx::new(kernels, c, &self.rope, self.precision);
        let rows = RowMap { seqs: &[], pos: &self.pos };
        for l in 0..c.n_layers {
            let pairs = self.adapters.as_ref().map_or([None; 7], |a| a.pairs(l));
            let (w, x, y) = (self.model.block(l), &self.x[..n], &mut self.y[..n]);
            each(l, &mut |keys| {
                block::forward(&ctx, &w, &pairs, rows, x, y, &mut self.block, keys, Dropout::OFF);
            });
            std::mem::swap(&mut self.x, &mut self.y);
        }
    }

    /// Hidden states of the last pass, before the final norm.
    pub(super) fn outputs(&self) -> &[f32] {
        &self.x
    }

    /// Gives `f` what the head's functions take: the context, the head's weights, the outputs of the last pass,
    /// the head's buffers and the kernels' scratch.
    pub(super) fn head<T>(
        &mut self,
        f: impl FnOnce(&Ctx<'_>, &HeadWeights<'_>, &[f32], &mut HeadBufs, &mut [f32]) -> T,
    ) -> T {
        let w = HeadWeights { norm: self.model.output_norm(), w: self.model.output() };
        let ctx = Ctx::new(&self.kernels, self.model.config(), &self.rope, self.precision);
        f(&ctx, &w, &self.x, &mut self.head, &mut self.block.kernel)
    }
}
