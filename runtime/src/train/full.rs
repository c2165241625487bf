//! Full fine-tuning: every weight of the model is a parameter, in f32.

use std::ops::Range;
use std::sync::Arc;

use engraft_kernels::{AdamWStep, Kernels};

use super::chain::{Chain, Evaluated};
use super::numbers::{Numbers, NumbersMut, State};
use super::trainer::{StepReport, TrainOptions};
use crate::data::Batch;
use crate::error::{Error, ErrorKind, Result};
use crate::model::Proj;
use crate::model::tuned::{TunedLayout, TunedModel, Weights};
use crate::model::weights::ModelFile;
use crate::nn::head::HeadGrads;
use crate::nn::{BlockGrads, PairGrad, Precision, WeightGrad};
use crate::plan::{ArenaWords, FullUpdate};

/// One run of full fine-tuning.
pub struct FullTrainer {
    chain: Chain,
    kernels: Arc<Kernels>,
    layout: TunedLayout,
    update: FullUpdate,
    /// In parameter order; with [`FullUpdate::AtOnce`], only those outside the blocks and of one block.
    grads: Vec<f32>,
    pub(super) state: State,
}

impl FullTrainer {
    /// Allocates the arena that `words` describes and dequantizes the model into it. The options' precisions
    /// are ignored: everything is f32.
    ///
    /// # Panics
    /// If `words` aren't for full fine-tuning.
    pub fn new(
        model: Arc<ModelFile>,
        kernels: Arc<Kernels>,
        words: ArenaWords,
        options: TrainOptions,
    ) -> FullTrainer {
        let full = words.full.expect("the words of full fine-tuning");
        let tuned = TunedModel::new(model, &kernels);
        FullTrainer {
            layout: tuned.layout().clone(),
            chain: Chain::new(Arc::new(tuned), kernels.clone(), Precision::F32, words),
            update: full.update,
            grads: vec![0.0; full.gradients],
            state: State::new(options, full.weights),
            kernels,
        }
    }

    /// What a checkpoint stores of it.
    pub fn numbers(&self) -> Numbers<'_> {
        self.state.numbers(self.chain.tuned().map_or(&[], TunedModel::values))
    }

    /// The same, for restoring.
    ///
    /// # Errors
    /// `Misuse` while others hold the weights.
    pub fn numbers_mut(&mut self) -> Result<NumbersMut<'_>> {
        let model = self.chain.weights_mut().ok_or_else(in_use)?;
        Ok(self.state.numbers_mut(model.values_mut()))
    }

    /// Stores the current weights as those of the best look.
    pub fn keep_best(&mut self) {
        self.state.keep_best(self.chain.tuned().map_or(&[], TunedModel::values));
    }

    /// The current weights, for sequences and scoring chains. While any such user is alive,
    /// [`FullTrainer::step`] refuses to change them.
    pub fn weights(&self) -> Weights {
        self.chain.weights()
    }

    /// The final weights: those of the best look, if kept. Everything else is freed.
    pub fn into_weights(mut self) -> Arc<TunedModel> {
        if !self.state.best.is_empty()
            && let Some(model) = self.chain.weights_mut()
        {
            model.values_mut().copy_from_slice(&self.state.best);
        }
        match self.chain.weights() {
            Weights::Tuned(model) => model,
            Weights::Stored(_) => unreachable!("made of tuned weights"),
        }
    }

    /// Gradients of the last step, as sums over its targets. In parameter order, unless blocks are updated at
    /// once.
    pub fn gradients(&self) -> &[f32] {
        &self.grads
    }

    /// One optimizer step over micro-batches.
    ///
    /// # Errors
    /// `NonFinite` if loss or gradient isn't finite: the weights are unchanged, or with [`FullUpdate::AtOnce`]
    /// no further step is possible. `BadData` if no row has a target. `Misuse` if the weights are still in use
    /// elsewhere, or for several micro-batches or clipping with `AtOnce`.
    pub fn step(&mut self, batches: &[Batch]) -> Result<StepReport> {
        self.check(batches)?;
        let lr = self.state.rate();
        let (total, grad_norm) = match (self.update, batches) {
            (FullUpdate::AtOnce, [batch]) => self.step_at_once(batch, lr)?,
            _ => self.step_at_end(batches, lr)?,
        };
        self.state.step += 1;
        Ok(StepReport {
            loss: total.loss_sum / total.targets as f64,
            kl: None,
            targets: total.targets,
            tokens: batches.iter().map(|b| b.ids.len()).sum(),
            grad_norm,
            lr,
        })
    }

    /// Mean loss over the targets of `batches`.
    pub fn evaluate(&mut self, batches: impl Iterator<Item = Batch>) -> Evaluated {
        let mut total = Evaluated::default();
        for b in batches {
            total += self.chain.evaluate(None, &b, |_, _| {});
        }
        total
    }

    /// Checks that a step is possible at all.
    fn check(&mut self, batches: &[Batch]) -> Result<()> {
        let misuse = |message: &str| Err(Error::new(ErrorKind::Misuse, message));
        if self.state.broken {
            return misuse(
                "an earlier step failed midway, so the weights are unusable; restore a checkpoint",
            );
        }
        let clips = self.state.options.adamw.max_grad_norm > 0.0;
        if self.update == FullUpdate::AtOnce && (batches.len() != 1 || clips) {
            return misuse("updating blocks at once needs a single micro-batch and no clipping");
        }
        if self.chain.weights_mut().is_none() {
            return Err(in_use());
        }
        Ok(())
    }

    /// Forward and backward of every micro-batch, then one update of everything.
    fn step_at_end(&mut self, batches: &[Batch], lr: f32) -> Result<(Evaluated, f64)> {
        let mut total = Evaluated::default();
        for (i, batch) in batches.iter().enumerate() {
            let accumulate = i > 0;
            total += self.chain.forward_weights(batch, head_grads(&self.layout, &mut self.grads, accumulate));
            for l in (0..self.chain.config().n_layers).rev() {
                let grads = block_grads(&self.layout, &mut self.grads[self.layout.block(l)], accumulate);
                self.chain.backward_weights(batch, l, grads);
            }
            self.embedding_gradient(batch, accumulate);
        }
        let count = self.counted(&total)?;
        let (outer, layers) = (self.layout.outer(), 0..self.chain.config().n_layers);
        let parts = || std::iter::once(outer.clone()).chain(layers.clone().map(|l| self.layout.block(l)));
        let squares: f64 = parts().map(|at| self.kernels.sum_squares(&self.grads[at])).sum();
        let norm = squares.sqrt() / count;
        let begun = self.state.optimizer.begin_with(norm, count, lr);
        let step = begun.ok_or_else(|| self.state.not_finite())?;
        self.apply(outer.clone(), outer, &step);
        for l in layers {
            self.apply(self.layout.block(l), self.layout.block(l), &step);
        }
        Ok((total, norm))
    }

    /// Forward, then block by block backward and update.
    fn step_at_once(&mut self, batch: &Batch, lr: f32) -> Result<(Evaluated, f64)> {
        let total = self.chain.forward_weights(batch, head_grads(&self.layout, &mut self.grads, false));
        let count = self.counted(&total)?;
        // Without clipping, the update doesn't depend on the norm.
        let begun = self.state.optimizer.begin_with(0.0, count, lr);
        let step = begun.ok_or_else(|| self.state.not_finite())?;
        let outer = self.layout.outer();
        let mut squares = 0.0f64;
        for l in (0..self.chain.config().n_layers).rev() {
            let own = outer.end..self.grads.len();
            let grads = block_grads(&self.layout, &mut self.grads[own.clone()], false);
            self.chain.backward_weights(batch, l, grads);
            squares += self.part_squares(own.clone())?;
            self.apply(self.layout.block(l), own, &step);
        }
        self.embedding_gradient(batch, false);
        squares += self.part_squares(outer.clone())?;
        self.apply(outer.clone(), outer, &step);
        Ok((total, squares.sqrt() / count))
    }

    /// The sum of squares of some gradients, which must be finite.
    fn part_squares(&mut self, at: Range<usize>) -> Result<f64> {
        let squares = self.kernels.sum_squares(&self.grads[at]);
        if squares.is_finite() {
            return Ok(squares);
        }
        self.state.broken = true;
        Err(self.state.not_finite())
    }

    /// The number of a step's targets, as a divisor, checked before anything changes.
    fn counted(&self, total: &Evaluated) -> Result<f64> {
        let count = State::counted(total)?;
        if !total.loss_sum.is_finite() {
            return Err(self.state.not_finite());
        }
        Ok(count)
    }

    fn embedding_gradient(&mut self, batch: &Batch, accumulate: bool) {
        let at = self.layout.token_embd();
        // A tied embedding already has its gradient as the head.
        let begun = accumulate || self.layout.output() == at;
        let grad = WeightGrad { dw: &mut self.grads[at], accumulate: begun }.begun();
        self.chain.backward_embedding(batch, grad);
    }

    /// Updates the parameters `at` with the gradients `from`. Norms don't decay: a gain shouldn't be pulled
    /// toward zero.
    fn apply(&mut self, at: Range<usize>, from: Range<usize>, step: &AdamWStep) {
        let norms = if at.start == 0 { self.layout.output_norm() } else { 0..self.layout.norms()[1].end };
        let gains = AdamWStep { weight_decay: 0.0, ..*step };
        let Some(model) = self.chain.weights_mut() else { return };
        let parts = [(0..norms.start, step), (norms.clone(), &gains), (norms.end..at.len(), step)];
        for (within, step) in parts.into_iter().filter(|(within, _)| !within.is_empty()) {
            let first = at.start + within.start;
            let theta = &mut model.values_mut()[first..at.start + within.end];
            let grads = &self.grads[from.start + within.start..from.start + within.end];
            self.state.optimizer.update_part(&self.kernels, theta, grads, first, step);
        }
    }
}

fn in_use() -> Error {
    Error::new(ErrorKind::Misuse, "the weights are still in use elsewhere; drop their other users first")
}

/// The head's part of the gradients.
fn head_grads<'a>(layout: &TunedLayout, grads: &'a mut [f32], accumulate: bool) -> HeadGrads<'a> {
    let (w, rest) = grads[layout.output().start..].split_at_mut(layout.output().len());
    let norm = &mut rest[..layout.output_norm().len()];
    HeadGrads { norm: WeightGrad { dw: norm, accumulate }, w: WeightGrad { dw: w, accumulate } }
}

/// The gradients of one block, split into its tensors.
fn block_grads<'a>(layout: &TunedLayout, block: &'a mut [f32], accumulate: bool) -> BlockGrads<'a> {
    let mut rest = block;
    let mut cut = |n: usize| {
        let (dw, tail) = std::mem::take(&mut rest).split_at_mut(n);
        rest = tail;
        Some(WeightGrad { dw, accumulate })
    };
    let norms = layout.norms().map(|at| cut(at.len()));
    let pairs = Proj::ALL.map(|p| {
        let w = cut(layout.proj(p).len());
        Some(PairGrad { a: &mut [], bt: &mut [], m: &mut [], w })
    });
    BlockGrads { pairs, norms }
}
