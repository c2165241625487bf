//! Which projections of which layers are adapted, at what rank, and where their parameters lie.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::model::{ModelConfig, Proj};

/// Largest rank: beyond it an adapter is no longer small, and kernels size their tiles by it.
pub const RANK_MAX: usize = 256;

/// The settings of a LoRA adapter: y = x·Wᵀ + (alpha/rank)·(x·Aᵀ)·Bᵀ on each adapted projection.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank r, 1 to [`RANK_MAX`].
    pub rank: usize,
    /// Alpha, finite and above 0.
    pub alpha: f32,
    /// Probability that an input element of the LoRA branch is dropped in training, in [0, 1).
    pub dropout: f32,
    /// The adapted projections: in storage order, each once.
    pub targets: Vec<Proj>,
    /// The adapted layers: ascending, each once.
    pub layers: Vec<usize>,
}

impl LoraConfig {
    /// Settings checked against a model. Targets and layers may come in any order and repeat.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] that names the setting and its range.
    pub fn new(
        model: &ModelConfig,
        rank: usize,
        alpha: f32,
        dropout: f32,
        targets: &[Proj],
        layers: &[usize],
    ) -> Result<LoraConfig> {
        let (mut targets, mut layers) = (targets.to_vec(), layers.to_vec());
        targets.sort_unstable();
        targets.dedup();
        layers.sort_unstable();
        layers.dedup();
        let config = LoraConfig { rank, alpha, dropout, targets, layers };
        config.check(model.n_layers).map_err(|problem| Error::new(ErrorKind::Misuse, problem))?;
        let layout = Layout::from_shapes(rank, &config.layers, &shapes(model, &config.targets));
        if layout.is_none() {
            let message = format!("rank {rank} on this model exceeds this machine's address space");
            return Err(Error::new(ErrorKind::Misuse, message));
        }
        Ok(config)
    }

    /// The multiplier of the LoRA branch: alpha/rank.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }

    /// Checks everything that needs no shapes, for a model of `n_layers`.
    pub(super) fn check(&self, n_layers: usize) -> std::result::Result<(), String> {
        let LoraConfig { rank, alpha, dropout, targets, layers } = self;
        if !(1..=RANK_MAX).contains(rank) {
            return Err(format!("rank {rank} is not within 1 to {RANK_MAX}"));
        }
        if !(alpha.is_finite() && *alpha > 0.0) {
            return Err(format!("alpha {alpha} is not a finite number above 0"));
        }
        if !(0.0..1.0).contains(dropout) {
            return Err(format!("dropout {dropout} is not within 0 to 1 (1 excluded)"));
        }
        if targets.is_empty() || !targets.is_sorted_by(|a, b| a < b) {
            return Err(
                "adapted projections: name at least one of q, k, v, o, gate, up, down, each once".into()
            );
        }
        if layers.is_empty() || !layers.is_sorted_by(|a, b| a < b) {
            return Err("adapted layers: name at least one, each once, ascending".into());
        }
        match layers.last() {
            Some(last) if *last >= n_layers => Err(format!(
                "layer {last} is adapted, but the model's layers are 0 to {}",
                n_layers.saturating_sub(1)
            )),
            _ => Ok(()),
        }
    }
}

/// Where the pair of one projection lies in θ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// A, [rank, inputs] row-major.
    pub a: Range<usize>,
    /// Bᵀ, [rank, outputs] row-major: every product reads B along its outputs.
    pub b: Range<usize>,
    /// Rank r.
    pub rank: usize,
    /// Input features of the projection.
    pub inputs: usize,
    /// Output features of the projection.
    pub outputs: usize,
}

/// The order of all parameters in one flat vector θ: for each adapted layer ascending, for each
/// adapted projection in storage order, A then Bᵀ. A layer's parameters are one contiguous block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    layers: Vec<usize>,
    /// The slots of one block, relative to its start; every block has the same.
    slots: Vec<(Proj, Slot)>,
    block_len: usize,
}

impl Layout {
    /// The layout of `config` on `model`.
    ///
    /// # Panics
    /// If `config` was not made by [`LoraConfig::new`] for this model and its size overflows.
    pub fn new(model: &ModelConfig, config: &LoraConfig) -> Layout {
        Layout::from_shapes(config.rank, &config.layers, &shapes(model, &config.targets))
            .expect("LoraConfig::new has checked the sizes")
    }

    /// The layout for projections of given (out, in); `None` when a size overflows.
    pub(super) fn from_shapes(
        rank: usize,
        layers: &[usize],
        shapes: &[(Proj, usize, usize)],
    ) -> Option<Layout> {
        let mut slots = Vec::with_capacity(shapes.len());
        let mut at = 0_usize;
        for &(proj, outputs, inputs) in shapes {
            let b = at.checked_add(rank.checked_mul(inputs)?)?;
            let end = b.checked_add(rank.checked_mul(outputs)?)?;
            slots.push((proj, Slot { a: at..b, b: b..end, rank, inputs, outputs }));
            at = end;
        }
        // θ is f32: its bytes must be addressable too.
        at.checked_mul(layers.len())?.checked_mul(size_of::<f32>())?;
        Some(Layout { layers: layers.to_vec(), slots, block_len: at })
    }

    /// Parameters of all layers.
    #[allow(clippy::len_without_is_empty, reason = "a layout is never empty")]
    pub fn len(&self) -> usize {
        self.block_len * self.layers.len()
    }

    /// Parameters of one layer's block.
    pub fn block_len(&self) -> usize {
        self.block_len
    }

    /// The adapted layers, ascending.
    pub fn layers(&self) -> &[usize] {
        &self.layers
    }

    /// A layer's block in θ; `None` when the layer is not adapted.
    pub fn block(&self, layer: usize) -> Option<Range<usize>> {
        let index = self.layers.binary_search(&layer).ok()?;
        Some(index * self.block_len..(index + 1) * self.block_len)
    }

    /// A projection's slot in θ; `None` when it is not adapted.
    pub fn slot(&self, layer: usize, proj: Proj) -> Option<Slot> {
        let start = self.block(layer)?.start;
        Some(shifted(self.slot_in_block(proj)?, start))
    }

    /// A projection's slot within any layer's block (relative to the block's start).
    pub fn slot_in_block(&self, proj: Proj) -> Option<&Slot> {
        self.slots.iter().find(|(p, _)| *p == proj).map(|(_, slot)| slot)
    }

    /// All slots in the order of θ.
    pub fn slots(&self) -> impl Iterator<Item = (usize, Proj, Slot)> + '_ {
        self.layers.iter().enumerate().flat_map(move |(index, &layer)| {
            let start = index * self.block_len;
            self.slots.iter().map(move |(proj, slot)| (layer, *proj, shifted(slot, start)))
        })
    }

    /// The adapted projections with their (out, in).
    pub(super) fn shapes(&self) -> impl Iterator<Item = (Proj, usize, usize)> + '_ {
        self.slots.iter().map(|(proj, slot)| (*proj, slot.outputs, slot.inputs))
    }
}

pub(super) fn shapes(model: &ModelConfig, targets: &[Proj]) -> Vec<(Proj, usize, usize)> {
    let shape = |proj: &Proj| {
        let (outputs, inputs) = proj.shape(model);
        (*proj, outputs, inputs)
    };
    targets.iter().map(shape).collect()
}

fn shifted(slot: &Slot, by: usize) -> Slot {
    let move_range = |range: &Range<usize>| range.start + by..range.end + by;
    Slot { a: move_range(&slot.a), b: move_range(&slot.b), ..slot.clone() }
}
