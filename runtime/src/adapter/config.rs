//! Which projections of which layers are adapted, at what rank, and where their parameters are stored.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::model::{ModelConfig, Proj};

/// Largest rank. Kernels size their tiles by it, and an adapter beyond it is no longer small.
pub const RANK_MAX: usize = 256;

/// The settings of an adapter: y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ on each adapted projection, where s is alpha/r, or
/// alpha/√r with rsLoRA (Kalajdzievski, arXiv 2312.03732). With DoRA (Liu et al., arXiv 2402.09353) each
/// output is then multiplied by m/‖W + s·B·A‖, row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank r, 1 to [`RANK_MAX`], unless overridden.
    pub rank: usize,
    /// Alpha, finite and above 0, unless overridden.
    pub alpha: f32,
    /// Probability that an input element of the LoRA branch is dropped in training, in [0, 1).
    pub dropout: f32,
    /// The adapted projections: in storage order, each once.
    pub targets: Vec<Proj>,
    /// The adapted layers: ascending, each once.
    pub layers: Vec<usize>,
    /// Whether s is alpha/√r.
    pub rslora: bool,
    /// Whether each output row has its own magnitude (DoRA).
    pub dora: bool,
    /// Ranks and alphas of individual projections, sorted by layer (all-layer overrides first), then
    /// projection.
    pub overrides: Vec<Override>,
}

/// Rank or alpha of a projection, in one layer or in all. An override for one layer beats one for all layers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Override {
    /// The layer; all of them where `None`.
    pub layer: Option<usize>,
    /// The projection.
    pub proj: Proj,
    /// Its rank, if overridden.
    pub rank: Option<usize>,
    /// Its alpha, if overridden.
    pub alpha: Option<f32>,
}

/// Projections that share rank and alpha, in the order of θ: how the multiplier is reported to people.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// Rank r.
    pub rank: usize,
    /// Alpha.
    pub alpha: f32,
    /// s.
    pub scale: f32,
    /// Layer and projection.
    pub members: Vec<(usize, Proj)>,
}

impl LoraConfig {
    /// Settings of a plain LoRA, checked against a model. Targets and layers may come in any order and repeat.
    /// After setting further fields on the result, call [`LoraConfig::checked`].
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`], naming the setting and its range.
    pub fn new(
        model: &ModelConfig,
        rank: usize,
        alpha: f32,
        dropout: f32,
        targets: &[Proj],
        layers: &[usize],
    ) -> Result<LoraConfig> {
        let (targets, layers) = (targets.to_vec(), layers.to_vec());
        let config = LoraConfig {
            rank,
            alpha,
            dropout,
            targets,
            layers,
            rslora: false,
            dora: false,
            overrides: Vec::new(),
        };
        config.checked(model)
    }

    /// The same settings in canonical order, with overrides of the same place merged, checked against a model.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`], naming the setting and its range; also for an override of something not adapted,
    /// or two overrides that contradict each other.
    pub fn checked(mut self, model: &ModelConfig) -> Result<LoraConfig> {
        let misuse = |problem: String| Error::new(ErrorKind::Misuse, problem);
        self.targets.sort_unstable();
        self.targets.dedup();
        self.layers.sort_unstable();
        self.layers.dedup();
        self.merge_overrides().map_err(misuse)?;
        self.check(model.n_layers).map_err(misuse)?;
        if Layout::from_shapes(&self, &shapes(model, &self.targets)).is_none() {
            let rank = self.rank_max();
            return Err(misuse(format!("rank {rank} on this model exceeds this machine's address space")));
        }
        Ok(self)
    }

    /// Sorts the overrides and merges those for the same place.
    fn merge_overrides(&mut self) -> std::result::Result<(), String> {
        self.overrides.sort_by_key(|o| (o.layer, o.proj));
        let mut merged: Vec<Override> = Vec::with_capacity(self.overrides.len());
        for o in &self.overrides {
            match merged.last_mut().filter(|last| (last.layer, last.proj) == (o.layer, o.proj)) {
                None => merged.push(*o),
                Some(last) if last.rank.and(o.rank).is_some() || last.alpha.and(o.alpha).is_some() => {
                    return Err(format!("{} is given two ranks or two alphas", o.place()));
                }
                Some(last) => (last.rank, last.alpha) = (last.rank.or(o.rank), last.alpha.or(o.alpha)),
            }
        }
        self.overrides = merged;
        Ok(())
    }

    /// The LoRA branch's multiplier where nothing is overridden: alpha/rank, or alpha/√rank.
    pub fn scale(&self) -> f32 {
        self.multiplier(self.rank, self.alpha)
    }

    /// Multiplies every projection's alpha.
    pub fn scale_alpha(&mut self, factor: f32) {
        self.alpha *= factor;
        self.overrides.iter_mut().filter_map(|o| o.alpha.as_mut()).for_each(|alpha| *alpha *= factor);
    }

    /// The rank of one projection.
    pub fn rank_of(&self, layer: usize, proj: Proj) -> usize {
        self.overridden(layer, proj, |o| o.rank).unwrap_or(self.rank)
    }

    /// The alpha of one projection.
    pub fn alpha_of(&self, layer: usize, proj: Proj) -> f32 {
        self.overridden(layer, proj, |o| o.alpha).unwrap_or(self.alpha)
    }

    /// The multiplier s of one projection.
    pub fn scale_of(&self, layer: usize, proj: Proj) -> f32 {
        self.multiplier(self.rank_of(layer, proj), self.alpha_of(layer, proj))
    }

    /// The largest rank of a projection.
    pub fn rank_max(&self) -> usize {
        let ranks = self.layers.iter().flat_map(|l| self.targets.iter().map(|p| self.rank_of(*l, *p)));
        ranks.max().unwrap_or(self.rank)
    }

    /// The distinct pairs of rank and alpha, in the order in which θ meets them.
    pub fn cases(&self) -> Vec<Case> {
        let mut cases: Vec<Case> = Vec::new();
        for (&layer, &proj) in self.layers.iter().flat_map(|l| self.targets.iter().map(move |p| (l, p))) {
            let (rank, alpha) = (self.rank_of(layer, proj), self.alpha_of(layer, proj));
            match cases.iter_mut().find(|c| (c.rank, c.alpha) == (rank, alpha)) {
                Some(case) => case.members.push((layer, proj)),
                None => {
                    let scale = self.multiplier(rank, alpha);
                    cases.push(Case { rank, alpha, scale, members: vec![(layer, proj)] });
                }
            }
        }
        cases
    }

    fn multiplier(&self, rank: usize, alpha: f32) -> f32 {
        if self.rslora { alpha / (rank as f32).sqrt() } else { alpha / rank as f32 }
    }

    /// The value of the override that applies to this place, if any.
    fn overridden<T>(&self, layer: usize, proj: Proj, value: impl Fn(&Override) -> Option<T>) -> Option<T> {
        // Overrides are sorted and unique, so search: a file may hold many of them, and many layers.
        let at = |wanted: Option<usize>| {
            let found = self.overrides.binary_search_by_key(&(wanted, proj), |o| (o.layer, o.proj));
            value(&self.overrides[found.ok()?])
        };
        at(Some(layer)).or_else(|| at(None))
    }

    /// Checks everything that needs no shapes, for a model of `n_layers`.
    pub(super) fn check(&self, n_layers: usize) -> std::result::Result<(), String> {
        let LoraConfig { rank, alpha, dropout, targets, layers, overrides, .. } = self;
        check_rank(*rank)?;
        check_alpha(*alpha)?;
        if !(0.0..1.0).contains(dropout) {
            return Err(format!("dropout {dropout} must be at least 0 and below 1"));
        }
        if targets.is_empty() || !targets.is_sorted_by(|a, b| a < b) {
            return Err(
                "adapted projections: name at least one of q, k, v, o, gate, up, down, each once".into()
            );
        }
        if layers.is_empty() || !layers.is_sorted_by(|a, b| a < b) {
            return Err("adapted layers: name at least one, each once, ascending".into());
        }
        if let Some(last) = layers.last().filter(|l| **l >= n_layers) {
            return Err(format!(
                "layer {last} is adapted, but the model's layers are 0 to {}",
                n_layers.saturating_sub(1)
            ));
        }
        if !overrides.is_sorted_by(|a, b| (a.layer, a.proj) < (b.layer, b.proj)) {
            return Err("ranks and alphas of individual projections: give each place once, in order".into());
        }
        overrides.iter().try_for_each(|o| self.check_override(o).map_err(|e| format!("{}: {e}", o.place())))
    }

    /// An override that reaches nothing would silently have no effect.
    fn check_override(&self, o: &Override) -> std::result::Result<(), String> {
        if o.rank.is_none() && o.alpha.is_none() {
            return Err("neither rank nor alpha is given".into());
        }
        o.rank.map_or(Ok(()), check_rank)?;
        o.alpha.map_or(Ok(()), check_alpha)?;
        if !self.targets.contains(&o.proj) || o.layer.is_some_and(|l| self.layers.binary_search(&l).is_err())
        {
            return Err("its rank or alpha is given, but it is not adapted".into());
        }
        Ok(())
    }
}

impl Override {
    /// In words: "layers.3.q_proj rank 4 alpha 8".
    pub fn describe(&self) -> String {
        let rank = self.rank.map_or(String::new(), |rank| format!(" rank {rank}"));
        let alpha = self.alpha.map_or(String::new(), |alpha| format!(" alpha {alpha}"));
        format!("{}{rank}{alpha}", self.place())
    }

    /// The place, for messages.
    fn place(&self) -> String {
        let proj = self.proj.hf_name();
        self.layer.map_or_else(|| proj.to_string(), |l| format!("layers.{l}.{proj}"))
    }
}

pub(super) fn check_rank(rank: usize) -> std::result::Result<(), String> {
    match (1..=RANK_MAX).contains(&rank) {
        true => Ok(()),
        false => Err(format!("rank {rank} is not in 1 to {RANK_MAX}")),
    }
}

pub(super) fn check_alpha(alpha: f32) -> std::result::Result<(), String> {
    match alpha.is_finite() && alpha > 0.0 {
        true => Ok(()),
        false => Err(format!("alpha {alpha} is not a finite number above 0")),
    }
}

/// Where one projection's parameters lie in θ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// A, [rank, inputs] row-major.
    pub a: Range<usize>,
    /// Bᵀ, [rank, outputs] row-major: every product reads B along its outputs.
    pub b: Range<usize>,
    /// DoRA's magnitudes m, `[outputs]`; empty without DoRA.
    pub m: Range<usize>,
    /// Rank r.
    pub rank: usize,
    /// Input features of the projection.
    pub inputs: usize,
    /// Output features of the projection.
    pub outputs: usize,
    /// Output features of all slots before this one: the offset of its rows among all rows.
    pub rows_before: usize,
}

impl Slot {
    /// Its rows among the output rows of all slots, the order norms and gains are stored in.
    pub fn rows(&self) -> Range<usize> {
        self.rows_before..self.rows_before + self.outputs
    }
}

/// The order of all parameters in one flat vector θ: for each adapted layer, ascending, and each adapted
/// projection, in storage order: A, then Bᵀ, then (with DoRA) m. A layer's parameters form one contiguous
/// block; blocks differ in length where ranks do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    layers: Vec<usize>,
    /// The adapted projections with their (out, in).
    shapes: Vec<(Proj, usize, usize)>,
    /// The slots of each layer in turn, one per shape.
    slots: Vec<Slot>,
}

impl Layout {
    /// The layout of `config` on `model`.
    ///
    /// # Panics
    /// If `config` was not made by [`LoraConfig::new`] for this model and its size overflows.
    pub fn new(model: &ModelConfig, config: &LoraConfig) -> Layout {
        Layout::from_shapes(config, &shapes(model, &config.targets))
            .expect("LoraConfig::new has checked the sizes")
    }

    /// The layout for projections of given (out, in); `None` when a size overflows.
    pub(super) fn from_shapes(config: &LoraConfig, shapes: &[(Proj, usize, usize)]) -> Option<Layout> {
        let mut slots = Vec::with_capacity(config.layers.len().checked_mul(shapes.len())?);
        let (mut at, mut rows) = (0_usize, 0_usize);
        for &layer in &config.layers {
            for &(proj, outputs, inputs) in shapes {
                let rank = config.rank_of(layer, proj);
                let b = at.checked_add(rank.checked_mul(inputs)?)?;
                let m = b.checked_add(rank.checked_mul(outputs)?)?;
                let end = m.checked_add(if config.dora { outputs } else { 0 })?;
                slots.push(Slot { a: at..b, b: b..m, m: m..end, rank, inputs, outputs, rows_before: rows });
                (at, rows) = (end, rows.checked_add(outputs)?);
            }
        }
        // θ is f32: its bytes must be addressable too.
        at.checked_mul(size_of::<f32>())?;
        Some(Layout { layers: config.layers.clone(), shapes: shapes.to_vec(), slots })
    }

    /// The same slots without A: where gradients lie while A is frozen.
    pub fn without_a(&self) -> Layout {
        let mut at = 0;
        let slot = |s: &Slot| {
            let b = at..at + s.b.len();
            let m = b.end..b.end + s.m.len();
            let a = at..at;
            at = m.end;
            Slot { a, b, m, ..s.clone() }
        };
        let slots = self.slots.iter().map(slot).collect();
        Layout { slots, ..self.clone() }
    }

    /// Parameters of all layers.
    #[allow(clippy::len_without_is_empty, reason = "a layout is never empty")]
    pub fn len(&self) -> usize {
        self.slots.last().map_or(0, |s| s.m.end)
    }

    /// Output rows of all adapted projections.
    pub fn rows(&self) -> usize {
        self.slots.last().map_or(0, |s| s.rows().end)
    }

    /// The largest rank.
    pub fn rank_max(&self) -> usize {
        self.slots.iter().map(|s| s.rank).max().unwrap_or(0)
    }

    /// The adapted layers, ascending.
    pub fn layers(&self) -> &[usize] {
        &self.layers
    }

    /// A layer's block in θ; `None` when the layer is not adapted.
    pub fn block(&self, layer: usize) -> Option<Range<usize>> {
        let slots = self.slots_of(layer)?;
        Some(slots.first()?.a.start..slots.last()?.m.end)
    }

    /// A projection's slot in θ; `None` when it is not adapted.
    pub fn slot(&self, layer: usize, proj: Proj) -> Option<Slot> {
        let index = self.shapes.iter().position(|(p, _, _)| *p == proj)?;
        self.slots_of(layer)?.get(index).cloned()
    }

    /// All slots in the order of θ.
    pub fn slots(&self) -> impl Iterator<Item = (usize, Proj, Slot)> + '_ {
        let places = self.layers.iter().flat_map(|l| self.shapes.iter().map(move |(p, _, _)| (*l, *p)));
        places.zip(&self.slots).map(|((layer, proj), slot)| (layer, proj, slot.clone()))
    }

    /// The adapted projections with their (out, in).
    pub(super) fn shapes(&self) -> impl Iterator<Item = (Proj, usize, usize)> + '_ {
        self.shapes.iter().copied()
    }

    fn slots_of(&self, layer: usize) -> Option<&[Slot]> {
        let (index, n) = (self.layers.binary_search(&layer).ok()?, self.shapes.len());
        self.slots.get(index * n..(index + 1) * n)
    }
}

pub(super) fn shapes(model: &ModelConfig, targets: &[Proj]) -> Vec<(Proj, usize, usize)> {
    let shape = |proj: &Proj| {
        let (outputs, inputs) = proj.shape(model);
        (*proj, outputs, inputs)
    };
    targets.iter().map(shape).collect()
}
