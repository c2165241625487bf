//! Adapters in use: any number stacked as one, and a slot that many sequences read them from.

use std::sync::Arc;

use arc_swap::ArcSwap;
use engraft_kernels::Kernels;

use crate::adapter::{Adapter, Gains, Slot};
use crate::error::{Error, ErrorKind, Result};
use crate::model::usage::Usage;
use crate::model::weights::ModelFile;
use crate::model::{ModelConfig, Proj};
use crate::nn::{Adapted, BlockPairs, Gain, Pair};

/// Gains nearer to zero are moved to this, since parts are divided by them.
const GAIN_MIN: f64 = 1e-20;

/// Any number of adapters as one: ranks side by side, scales folded into B.
///
/// Each adapter adds its change to the base, times its factor: W + Σ f·(W′ − W), where W′ is W + s·B·A for a
/// LoRA and c∘(W + s·B·A) for a DoRA. So order doesn't matter; 1 is as trained, 0 is off. (PEFT gives the same
/// for LoRAs, for one DoRA, and for LoRAs after one DoRA; for other combinations its result depends on their
/// order.)
pub struct StackedAdapter {
    /// Per block and projection.
    pairs: Vec<[Option<Stacked>; 7]>,
    rank: usize,
    /// The shapes it fits.
    config: ModelConfig,
    usage: Usage,
}

/// The adapters of one projection as one.
struct Stacked {
    /// `[r, in]`.
    a: Vec<f32>,
    /// Bᵀ `[r, out]`, divided by the gain if there is one.
    bt: Vec<f32>,
    rank: usize,
    /// 1 + Σ f·(c − 1) `[out]`; empty without DoRA.
    gain: Vec<f32>,
}

impl Stacked {
    /// `parts` are slot, parameters, factor, multiplier, and with DoRA gains.
    fn new(parts: &[Part<'_>]) -> Option<Stacked> {
        let outputs = parts.first()?.0.outputs;
        let mut gain = vec![1.0f64; outputs];
        for (_, _, factor, _, c) in parts {
            let c = c.iter().flat_map(|c| c.iter());
            gain.iter_mut().zip(c).for_each(|(g, c)| *g += f64::from(*factor) * (f64::from(*c) - 1.0));
        }
        // Quotients must stay finite.
        gain.iter_mut().filter(|g| g.abs() < GAIN_MIN).for_each(|g| *g = GAIN_MIN);
        let (mut a, mut bt, mut rank) = (Vec::new(), Vec::new(), 0);
        for (slot, theta, factor, scale, c) in parts {
            a.extend_from_slice(&theta[slot.a.clone()]);
            let effect = f64::from(scale * factor);
            let own = |i: usize| c.map_or(1.0, |c| f64::from(c[i])) / gain[i];
            for row in theta[slot.b.clone()].chunks_exact(outputs) {
                bt.extend(row.iter().enumerate().map(|(i, b)| (f64::from(*b) * effect * own(i)) as f32));
            }
            rank += slot.rank;
        }
        let has_gain = parts.iter().any(|(.., c)| c.is_some());
        let gain = gain.iter().filter(|_| has_gain).map(|g| *g as f32).collect();
        Some(Stacked { a, bt, rank, gain })
    }

    fn pair(&self) -> Pair<'_> {
        let gain = (!self.gain.is_empty()).then_some(Gain { c: &self.gain, m: &[] });
        Pair { a: &self.a, bt: &self.bt, rank: self.rank, scale: 1.0, gain }
    }
}

impl StackedAdapter {
    /// Stacks adapters with a factor each (1 is as trained). A DoRA costs one pass over the weights it adapts.
    ///
    /// # Errors
    /// `BaseMismatch` if an adapter's shapes don't match the model's.
    pub fn new(model: &ModelFile, kernels: &Kernels, adapters: &[(Adapter, f32)]) -> Result<StackedAdapter> {
        let c = model.config();
        adapters.iter().try_for_each(|(a, _)| a.check_shapes(c))?;
        let gains: Vec<Gains> = adapters.iter().map(|(a, _)| Gains::of(model, kernels, a)).collect();
        let pairs: Vec<[Option<Stacked>; 7]> = (0..c.n_layers)
            .map(|l| {
                Proj::ALL.map(|p| {
                    let all = adapters.iter().zip(&gains);
                    let parts: Vec<_> = all.filter_map(|((a, f), gains)| part(a, *f, gains, l, p)).collect();
                    Stacked::new(&parts)
                })
            })
            .collect();
        let rank = pairs.iter().flatten().flatten().map(|s| s.rank).max().unwrap_or(0);
        let acting = adapters.iter().filter(|(_, factor)| *factor != 0.0);
        let usage = Usage::of_all(acting.map(|(adapter, _)| &adapter.meta.usage));
        Ok(StackedAdapter { pairs, rank, config: c.clone(), usage })
    }

    /// How all of its adapters are meant to be used.
    pub fn usage(&self) -> &Usage {
        &self.usage
    }

    /// The largest rank of a projection, which buffers must have room for.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Checks that a model has the shapes the adapters were stacked for.
    ///
    /// # Errors
    /// `BaseMismatch`.
    pub fn check_fits(&self, model: &ModelConfig) -> Result<()> {
        match self.config == *model {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::BaseMismatch,
                "these adapters were stacked for a model with other shapes; stack them for this one",
            )),
        }
    }
}

impl Adapted for StackedAdapter {
    fn pairs(&self, layer: usize) -> BlockPairs<'_> {
        self.pairs[layer].each_ref().map(|p| p.as_ref().map(Stacked::pair))
    }
}

/// Slot, parameters, factor, multiplier and gains of one adapter at one place.
type Part<'a> = (Slot, &'a [f32], f32, f32, Option<&'a [f32]>);

fn part<'a>(a: &'a Adapter, factor: f32, gains: &'a Gains, layer: usize, proj: Proj) -> Option<Part<'a>> {
    let slot = a.layout.slot(layer, proj)?;
    let c = a.config.dora.then(|| &gains.c()[slot.rows()]);
    Some((slot, &a.theta, factor, a.config.scale_of(layer, proj), c))
}

/// The content of an [`AdapterSlot`].
pub struct Published {
    /// Number of swaps so far.
    pub generation: u64,
    /// The adapters; `None` for the base alone.
    pub adapters: Option<Arc<StackedAdapter>>,
}

/// A slot from which any number of sequences take their adapters, checking before every reading call. Neither
/// reading nor swapping blocks: adapters are loaded and stacked beforehand, and old ones live until the last
/// sequence drops them.
pub struct AdapterSlot {
    current: ArcSwap<Published>,
}

impl AdapterSlot {
    /// A slot of generation 0.
    pub fn new(adapters: Option<Arc<StackedAdapter>>) -> AdapterSlot {
        AdapterSlot { current: ArcSwap::from_pointee(Published { generation: 0, adapters }) }
    }

    /// Swaps the adapters for every sequence that follows the slot, from the next token each one reads; returns
    /// the new generation.
    pub fn swap(&self, adapters: Option<Arc<StackedAdapter>>) -> u64 {
        let next =
            |old: &Arc<Published>| Published { generation: old.generation + 1, adapters: adapters.clone() };
        self.current.rcu(next).generation + 1
    }

    /// The current content.
    pub fn load(&self) -> Arc<Published> {
        self.current.load_full()
    }

    /// The current content if its generation differs from `seen`. Takes no lock and, if nothing changed,
    /// doesn't touch the reference count.
    pub(super) fn newer_than(&self, seen: Option<u64>) -> Option<Arc<Published>> {
        let current = self.current.load();
        (Some(current.generation) != seen).then(|| Arc::clone(&current))
    }
}
