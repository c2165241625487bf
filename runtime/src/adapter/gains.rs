//! DoRA's gains for a whole adapter: the norms of the base's rows, computed once, and for each new θ the
//! factors that scale the forward's outputs.

use engraft_kernels::Kernels;

use super::config::{Layout, LoraConfig, Slot};
use super::params::Adapter;
use crate::model::weights::ModelFile;
use crate::nn::{Pair, dora};

/// Norms and gains of every adapted output row, in the order of θ; empty without DoRA.
#[derive(Clone, Debug, Default)]
pub struct Gains {
    /// ‖W_i‖ of the dequantized weights.
    base: Vec<f32>,
    /// m_i/‖W_i + s·B_i·A‖.
    c: Vec<f32>,
    scratch: Vec<f32>,
}

impl Layout {
    /// f32 words [`Gains`] needs for this layout; 0 without DoRA.
    pub fn gain_words(&self) -> usize {
        if !self.has_magnitudes() {
            return 0;
        }
        let scratch = |(_, _, s): (_, _, Slot)| dora::scratch_words(s.outputs, s.rank);
        dora::words(self.rows()) + self.slots().map(scratch).max().unwrap_or(0)
    }

    /// Whether the adapter is a DoRA.
    pub fn has_magnitudes(&self) -> bool {
        self.slots().any(|(_, _, s)| !s.m.is_empty())
    }
}

/// ‖W_i‖ of the dequantized rows of every adapted projection, in the order of θ. `kernel` is scratch of
/// [`kernel_words`].
pub fn base_norms(model: &ModelFile, kernels: &Kernels, layout: &Layout, kernel: &mut [f32]) -> Vec<f32> {
    let mut norms = vec![0.0; layout.rows()];
    for (layer, proj, slot) in layout.slots() {
        kernels.row_norms(&model.block(layer).proj(proj), kernel, &mut norms[slot.rows()]);
    }
    norms
}

/// f32 words of kernel scratch needed for a layout's norms and gains.
pub fn kernel_words(layout: &Layout, threads: usize) -> usize {
    let words = |(_, _, s): (_, _, Slot)| dora::kernel_words(s.outputs, s.inputs, s.rank, threads);
    layout.slots().map(words).max().unwrap_or(0)
}

impl Gains {
    /// The base's norms, with gains of 1 until [`Gains::refresh`].
    pub fn new(model: &ModelFile, kernels: &Kernels, layout: &Layout, kernel: &mut [f32]) -> Gains {
        if !layout.has_magnitudes() {
            return Gains::default();
        }
        let scratch = vec![0.0; layout.gain_words() - dora::words(layout.rows())];
        Gains { base: base_norms(model, kernels, layout, kernel), c: vec![1.0; layout.rows()], scratch }
    }

    /// The gains of an adapter as it is, with scratch of their own.
    pub fn of(model: &ModelFile, kernels: &Kernels, adapter: &Adapter) -> Gains {
        let Adapter { layout, config, theta, .. } = adapter;
        let needed = if config.dora { kernel_words(layout, kernels.threads()) } else { 0 };
        let mut kernel = vec![0.0; needed];
        let mut gains = Gains::new(model, kernels, layout, &mut kernel);
        gains.refresh(model, kernels, (layout, config), theta, (&mut kernel, &mut []));
        gains
    }

    /// Computes the gains of the current θ: one product of r rows with every adapted matrix. `kernel` is
    /// scratch; A's rows are in int8 where `acts` has room for them (see [`dora::gains`]).
    pub fn refresh(
        &mut self,
        model: &ModelFile,
        kernels: &Kernels,
        (layout, config): (&Layout, &LoraConfig),
        theta: &[f32],
        (kernel, acts): (&mut [f32], &mut [f32]),
    ) {
        if self.base.is_empty() {
            return;
        }
        for (layer, proj, s) in layout.slots() {
            let (rows, scale) = (s.rows(), config.scale_of(layer, proj));
            let pair = Pair { a: &theta[s.a], bt: &theta[s.b], rank: s.rank, scale, gain: None };
            dora::gains(
                kernels,
                &model.block(layer).proj(proj),
                &pair,
                &theta[s.m],
                &self.base[rows.clone()],
                &mut self.c[rows],
                &mut self.scratch,
                (&mut *kernel, &mut *acts),
            );
        }
    }

    /// m/‖W + s·B·A‖ of every adapted row, in the order of θ.
    pub fn c(&self) -> &[f32] {
        &self.c
    }
}
