//! The chain: embedding, blocks forward, head with loss, blocks backward in reverse. Blocks keep their inputs
//! and whatever else the plan grants. It is a plain loop over slices of one arena, without a tape or
//! allocation.

mod compare;

use std::ops::AddAssign;
use std::sync::Arc;

use engraft_kernels::Kernels;

use crate::adapter::{Layout, LoraConfig};
use crate::data::Batch;
use crate::model::tuned::{TunedModel, Weights};
use crate::model::{ModelConfig, Proj};
use crate::nn::block::{self, BlockBufs, Keys};
use crate::nn::head::{self, HeadBufs, HeadGrads, HeadWeights};
use crate::nn::keep::{Keep, Kept};
use crate::nn::{
    Adapted, BlockGrads, BlockPairGrads, BlockPairs, Ctx, Dropout, Gain, GradientPrecision, Pair, PairGrad,
    Precision, RowMap, rope,
};
use crate::plan::ArenaWords;

/// A model with the buffers to run micro-batches through it.
pub struct Chain {
    model: Weights,
    kernels: Arc<Kernels>,
    precision: Precision,
    gradient: GradientPrecision,
    words: ArenaWords,
    rope: Vec<f32>,
    /// `[kept + 1, rows, d]`: inputs of the blocks from `first_kept`, then of the head.
    saved: Vec<f32>,
    /// The running gradient `[rows, d]`.
    dx: Vec<f32>,
    pos: Vec<u32>,
    block: BlockBufs,
    /// What blocks keep beside their inputs, from the second-last block down.
    kept: Vec<Kept>,
    head: HeadBufs,
}

/// The adapter as the chain reads it.
#[derive(Clone, Copy)]
pub struct AdapterView<'a> {
    /// Where each pair lies.
    pub layout: &'a Layout,
    /// All parameters.
    pub theta: &'a [f32],
    /// Gives each pair's multiplier.
    pub config: &'a LoraConfig,
    /// DoRA's gains of this θ (see [`crate::adapter::Gains`]); empty without it.
    pub gains: &'a [f32],
}

impl Adapted for AdapterView<'_> {
    fn pairs(&self, layer: usize) -> BlockPairs<'_> {
        Proj::ALL.map(|p| {
            let s = self.layout.slot(layer, p)?;
            let scale = self.config.scale_of(layer, p);
            let gain =
                (!s.m.is_empty()).then(|| Gain { c: &self.gains[s.rows()], m: &self.theta[s.m.clone()] });
            Some(Pair { a: &self.theta[s.a], bt: &self.theta[s.b], rank: s.rank, scale, gain })
        })
    }
}

/// The result of a pass over a micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Evaluated {
    /// Sum of cross-entropies, nats.
    pub loss_sum: f64,
    /// Targets.
    pub targets: usize,
    /// Evaluated micro-batches of which every target is likelier than all else together: with one row each, the answers
    /// that greedy choice gives word for word, and surely.
    pub sure: usize,
}

impl AddAssign for Evaluated {
    fn add_assign(&mut self, other: Evaluated) {
        self.loss_sum += other.loss_sum;
        self.targets += other.targets;
        self.sure += other.sure;
    }
}

impl Chain {
    /// Allocates the arena.
    pub fn new(
        model: impl Into<Weights>,
        kernels: Arc<Kernels>,
        precision: Precision,
        words: ArenaWords,
    ) -> Chain {
        let model = model.into();
        let c = model.config();
        let mut table = vec![0.0; words.rope];
        rope::table(c, model.rope_freqs(), &mut table);
        Chain {
            rope: table,
            saved: vec![0.0; words.saved],
            dx: vec![0.0; words.rows * c.d_model],
            pos: Vec::with_capacity(words.rows),
            block: BlockBufs::new(&words.block, words.kernel),
            kept: (1..=words.keep.blocks())
                .map(|from_last| Kept::new(&words.block, words.keep.of(from_last), words.keep.precision))
                .collect(),
            head: HeadBufs::new(&words.head),
            gradient: precision.into(),
            precision,
            words,
            kernels,
            model,
        }
    }

    /// Sets another precision for input gradients than the forward's.
    #[must_use]
    pub fn with_gradient_precision(mut self, gradient: GradientPrecision) -> Chain {
        self.gradient = gradient;
        self
    }

    /// The model's shapes.
    pub fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    /// Most rows of a micro-batch.
    pub fn rows(&self) -> usize {
        self.words.rows
    }

    /// The weights, shared.
    pub fn weights(&self) -> Weights {
        self.model.clone()
    }

    /// The weights of full fine-tuning; `None` if they are a file's.
    pub fn tuned(&self) -> Option<&TunedModel> {
        match &self.model {
            Weights::Stored(_) => None,
            Weights::Tuned(model) => Some(model),
        }
    }

    /// The weights, mutable; `None` if they are a file's, or shared.
    pub fn weights_mut(&mut self) -> Option<&mut TunedModel> {
        match &mut self.model {
            Weights::Stored(_) => None,
            Weights::Tuned(model) => Arc::get_mut(model),
        }
    }

    /// The kernels' scratch, for other uses between passes.
    pub fn kernel_scratch(&mut self) -> &mut [f32] {
        &mut self.block.kernel
    }

    /// The kernel scratch and the room for quantized activations, which is empty if `exact`.
    pub fn gain_scratch(&mut self, exact: bool) -> (&mut [f32], &mut [f32]) {
        let acts = if exact { 0 } else { self.block.acts.len() };
        (&mut self.block.kernel, &mut self.block.acts[..acts])
    }

    /// Loss of a micro-batch; `each` receives (row, loss) for every target.
    pub fn evaluate(
        &mut self,
        adapter: Option<&dyn Adapted>,
        batch: &Batch,
        mut each: impl FnMut(usize, f64),
    ) -> Evaluated {
        self.forward(adapter, batch, Dropout::OFF, self.model.config().n_layers);
        let mut is_sure = true;
        let found = self.head_loss(batch, 0, false, |row, loss| {
            is_sure &= loss < std::f64::consts::LN_2;
            each(row, loss);
        });
        Evaluated { sure: usize::from(is_sure && found.targets > 0), ..found }
    }

    /// Loss of a micro-batch; adds its gradient to `grads`, which lie as their layout says: that of θ, or
    /// [`Layout::without_a`] while A is frozen.
    pub fn accumulate(
        &mut self,
        adapter: AdapterView<'_>,
        batch: &Batch,
        dropout: Dropout,
        grads: (&Layout, &mut [f32]),
    ) -> Evaluated {
        let first = adapter.layout.layers()[0];
        self.forward(Some(&adapter), batch, dropout, first);
        let result = self.head_loss(batch, self.config().n_layers - first, true, |_, _| {});
        self.backward(adapter, batch, dropout, grads, first);
        result
    }

    /// Loss of a micro-batch, and the gradients of the head's weights. Leaves the blocks ready for
    /// [`Chain::backward_weights`].
    pub(super) fn forward_weights(&mut self, batch: &Batch, grads: HeadGrads<'_>) -> Evaluated {
        self.forward(None, batch, Dropout::OFF, 0);
        let c = self.model.config();
        let n = batch.ids.len() * c.d_model;
        let w = HeadWeights { norm: self.model.output_norm(), w: self.model.output() };
        let ctx = Ctx::new(&self.kernels, c, &self.rope, self.precision).with_gradient(self.gradient);
        let (x, dx) = (&self.saved[c.n_layers * n..(c.n_layers + 1) * n], &mut self.dx[..n]);
        let (head, kernel) = (&mut self.head, &mut self.block.kernel);
        let (loss_sum, targets) =
            head::loss_with_weights(&ctx, &w, x, &batch.targets, dx, grads, head, kernel);
        Evaluated { loss_sum, targets, sure: 0 }
    }

    /// The gradients of block `l`'s weights; call it after the blocks above.
    pub(super) fn backward_weights(&mut self, batch: &Batch, l: usize, grads: BlockGrads<'_>) {
        // The first block's input needs a gradient too: the embedding is trained.
        self.backward_block(&[None; 7], grads, batch, l, 0, Dropout::OFF);
    }

    /// Adds to the gradient of the embedding `[V, d]`; call it after all blocks.
    pub(super) fn backward_embedding(&self, batch: &Batch, grad: &mut [f32]) {
        let d = self.model.config().d_model;
        for (id, dx) in batch.ids.iter().zip(self.dx.chunks_exact(d)) {
            let row = &mut grad[*id as usize * d..(*id as usize + 1) * d];
            row.iter_mut().zip(dx).for_each(|(g, v)| *g += v);
        }
    }

    /// Runs all blocks; the inputs of blocks from `first_kept` on stay in `saved`.
    fn forward(&mut self, adapter: Option<&dyn Adapted>, batch: &Batch, dropout: Dropout, first_kept: usize) {
        let c = self.model.config();
        let (rows, d) = (batch.ids.len(), c.d_model);
        let most = self.words.rows;
        assert!(rows <= most, "a micro-batch of {rows} rows exceeds the arena's {most}");
        self.pos.clear();
        self.pos.extend(batch.seqs.iter().flat_map(|s| 0..s.len() as u32));
        let embedding = self.model.token_embd();
        let kernels = &*self.kernels;
        kernels.rows(d, &mut self.saved[..rows * d], |r, row| {
            kernels.dequantize_row(&embedding, batch.ids[r] as usize, row);
        });
        let ctx = Ctx::new(kernels, c, &self.rope, self.precision).with_gradient(self.gradient);
        let map = RowMap { seqs: &batch.seqs, pos: &self.pos };
        for l in 0..c.n_layers {
            // Blocks below the first kept one pass their output through slot 0 and the dx buffer.
            let at = l.saturating_sub(first_kept) * rows * d;
            let (x, y) = self.saved.split_at_mut(at + rows * d);
            let (x, kept) = (&mut x[at..], l >= first_kept);
            let y = if kept { &mut y[..rows * d] } else { &mut self.dx[..rows * d] };
            let pairs = adapter.map_or([None; 7], |a| a.pairs(l));
            let from_last = c.n_layers - 1 - l;
            let mut own =
                if kept { from_last.checked_sub(1).and_then(|i| self.kept.get_mut(i)) } else { None };
            if let Some(own) = &mut own {
                own.lend(&mut self.block);
            }
            let (w, dropout) = (self.model.block(l), dropout_of(dropout, l));
            block::forward(&ctx, &w, &pairs, map, x, y, &mut self.block, Keys::Batch, dropout);
            if let Some(own) = &mut own {
                own.take(kernels, c, rows, x, &mut self.block);
            }
            if !kept {
                x.copy_from_slice(y);
            }
        }
    }

    /// Loss of the rows in slot `slot` of `saved`; with `train`, its gradient in `dx`.
    fn head_loss(
        &mut self,
        batch: &Batch,
        slot: usize,
        train: bool,
        each: impl FnMut(usize, f64),
    ) -> Evaluated {
        let c = self.model.config();
        let n = batch.ids.len() * c.d_model;
        let w = HeadWeights { norm: self.model.output_norm(), w: self.model.output() };
        let ctx = Ctx::new(&self.kernels, c, &self.rope, self.precision).with_gradient(self.gradient);
        let (x, dx) = (&self.saved[slot * n..(slot + 1) * n], train.then_some(&mut self.dx[..n]));
        let (head, kernel) = (&mut self.head, &mut self.block.kernel);
        let (loss_sum, targets) = head::loss(&ctx, &w, x, &batch.targets, dx, head, kernel, each);
        Evaluated { loss_sum, targets, sure: 0 }
    }

    /// Walks the blocks back to the first adapted one.
    fn backward(
        &mut self,
        adapter: AdapterView<'_>,
        batch: &Batch,
        dropout: Dropout,
        (layout, grads): (&Layout, &mut [f32]),
        first: usize,
    ) {
        for l in (first..self.config().n_layers).rev() {
            let grads = pair_grads(layout, l, grads);
            self.backward_block(&adapter.pairs(l), grads.into(), batch, l, first, dropout);
        }
    }

    /// Walks block `l` back; `first` is the lowest that has gradients.
    fn backward_block(
        &mut self,
        pairs: &BlockPairs<'_>,
        grads: BlockGrads<'_>,
        batch: &Batch,
        l: usize,
        first: usize,
        dropout: Dropout,
    ) {
        let c = self.model.config();
        let n = batch.ids.len() * c.d_model;
        let ctx = Ctx::new(&self.kernels, c, &self.rope, self.precision).with_gradient(self.gradient);
        let map = RowMap { seqs: &batch.seqs, pos: &self.pos };
        let (x, y) = self.saved[(l - first) * n..(l - first + 2) * n].split_at(n);
        // The shared buffers still hold the last block's forward: the head uses its scratch only.
        let mut own = (c.n_layers - 1 - l).checked_sub(1).map(|i| self.kept.get_mut(i));
        let found = match &mut own {
            None => Keep::All,
            Some(None) => Keep::Inputs,
            Some(Some(own)) => {
                own.give(&self.kernels, c, batch.ids.len(), x, &mut self.block);
                own.keep()
            }
        };
        // Below the lowest block only a trained embedding needs a gradient.
        let want_dx = l > first || grads.norms[0].is_some();
        let (w, dx, dropout) = (self.model.block(l), &mut self.dx[..n], dropout_of(dropout, l));
        let b = &mut self.block;
        block::backward(&ctx, &w, pairs, grads, map, (x, y), dx, b, found, dropout, want_dx);
        if let Some(Some(own)) = own {
            own.release(&mut self.block);
        }
    }
}

/// One block's part of `grads`, split into its pairs.
pub(super) fn pair_grads<'a>(layout: &Layout, layer: usize, grads: &'a mut [f32]) -> BlockPairGrads<'a> {
    let Some(block) = layout.block(layer) else { return Default::default() };
    let mut rest = &mut grads[block];
    Proj::ALL.map(|p| {
        let s = layout.slot(layer, p)?;
        let (a, tail) = std::mem::take(&mut rest).split_at_mut(s.a.len());
        let (bt, tail) = tail.split_at_mut(s.b.len());
        let (m, tail) = tail.split_at_mut(s.m.len());
        rest = tail;
        Some(PairGrad { a, bt, m, w: None })
    })
}

/// Each block drops different elements.
fn dropout_of(d: Dropout, layer: usize) -> Dropout {
    Dropout { p: d.p, key: d.key.wrapping_mul(1021).wrapping_add(layer as u64) }
}
