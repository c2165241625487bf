//! Compares the tuned model with its base on the same rows. The base's hidden states come from the same weights
//! without the adapter, in a separate forward that keeps nothing for a backward.

use super::{AdapterView, Chain};
use crate::adapter::Layout;
use crate::data::Batch;
use crate::nn::divergence::{self, Compared, Pull};
use crate::nn::head::HeadWeights;
use crate::nn::{Adapted, Ctx, Dropout};

impl Chain {
    /// Losses of the tuned model and its base on a micro-batch, and their divergence. `each` receives (row,
    /// that target's contribution).
    ///
    /// # Panics
    /// If the chain was not planned with `beside_base`.
    pub fn compare(
        &mut self,
        adapter: &dyn Adapted,
        batch: &Batch,
        each: impl FnMut(usize, Compared),
    ) -> Compared {
        self.take_base(batch);
        self.forward(Some(adapter), batch, Dropout::OFF, self.model.config().n_layers);
        self.compare_heads(batch, 0, None, each)
    }

    /// [`Chain::accumulate`] beside the base: adds the gradient of what pulls.
    ///
    /// # Panics
    /// As [`Chain::compare`].
    pub fn accumulate_near_base(
        &mut self,
        adapter: AdapterView<'_>,
        batch: &Batch,
        dropout: Dropout,
        pull: Pull,
        grads: (&Layout, &mut [f32]),
    ) -> Compared {
        // The base goes first: the backward needs the tuned last block's forward in the shared buffers.
        self.take_base(batch);
        let first = adapter.layout.layers()[0];
        self.forward(Some(&adapter), batch, dropout, first);
        let slot = self.config().n_layers - first;
        let result = self.compare_heads(batch, slot, Some(pull), |_, _| {});
        self.backward(adapter, batch, dropout, grads, first);
        result
    }

    /// Runs the base forward; its last hidden states go to the head's buffers.
    fn take_base(&mut self, batch: &Batch) {
        self.forward(None, batch, Dropout::OFF, self.model.config().n_layers);
        let c = self.model.config();
        let n = batch.ids.len() * c.d_model;
        let w = HeadWeights { norm: self.model.output_norm(), w: self.model.output() };
        let ctx = Ctx::new(&self.kernels, c, &self.rope, self.precision).with_gradient(self.gradient);
        divergence::keep_base(&ctx, &w, &self.saved[..n], &batch.targets, &mut self.head);
    }

    /// The tuned model's head on slot `slot` of `saved`; with `train`, the gradient in `dx`.
    fn compare_heads(
        &mut self,
        batch: &Batch,
        slot: usize,
        train: Option<Pull>,
        each: impl FnMut(usize, Compared),
    ) -> Compared {
        let c = self.model.config();
        let n = batch.ids.len() * c.d_model;
        let w = HeadWeights { norm: self.model.output_norm(), w: self.model.output() };
        let ctx = Ctx::new(&self.kernels, c, &self.rope, self.precision).with_gradient(self.gradient);
        let x = &self.saved[slot * n..(slot + 1) * n];
        let pull = train.map(|pull| (pull, &mut self.dx[..n]));
        let (head, kernel) = (&mut self.head, &mut self.block.kernel);
        divergence::loss(&ctx, &w, x, &batch.targets, pull, head, kernel, each)
    }
}
