//! Checks what this device computes, for machines the tests never ran on.
//!
//! A training step of a few tokens compares every instruction set of the CPU with the scalar specification.
//! Difference quotients of the loss, along each kind of adapter matrix, check the gradients. A second run with
//! another number of threads must give the same bits. An adapter is committed and read back. If memory allows,
//! the same model in candle's layers and autograd ([`crate::reference`]) checks everything at once.
//!
//! ```
//! use engraft_runtime::Base;
//!
//! # fn main() -> engraft_runtime::Result<()> {
//! let base = Base::open("../targets/cli/seedling.gguf")?;
//! println!("{} bytes of private memory", engraft_runtime::selftest::private_bytes(&base.model, 2));
//! # Ok(())
//! # }
//! ```

use std::path::Path;
use std::sync::Arc;

use engraft_kernels::{Isa, Kernels};

use crate::adapter::{Adapter, LoraConfig, StoredAs as Stored};
use crate::data::Batch;
use crate::error::{Error, ErrorKind, Result};
use crate::model::Proj;
use crate::model::tuned::TunedLayout;
use crate::model::weights::ModelFile;
use crate::nn::Precision;
use crate::plan::room;
use crate::plan::{ArenaWords, MemoryPlan, Request};
use crate::rng::Rng;
use crate::storage::Disk;
use crate::train::optim::AdamWConfig;
use crate::train::schedule::{Schedule, Shape};
use crate::train::{TrainOptions, Trainer};

/// Tokens of the step.
const TOKENS: usize = 8;
/// Rank of its adapter.
const RANK: usize = 4;
/// Bounds several times the rounding of thirty blocks of a real model, and far below the error of a wrong
/// kernel. For f32: |loss − specified| / specified, and for each gradient tensor max|g − specified| /
/// max|specified|.
const F32_LOSS: f64 = 1e-4;
const F32_GRADIENT: f64 = 5e-3;
/// For int8: the same for the loss, and 1 − cosine between all gradients.
const INT8_LOSS: f64 = 4e-2;
const INT8_TURN: f64 = 3e-2;
/// |difference quotient − |g|| / |g|, along the gradient of one kind of matrix.
const DIFFERENCE: f64 = 1e-2;
/// Change in loss between the two ends of a difference, in nats: far above its rounding, but small enough to be
/// nearly linear.
const CHANGE: f64 = 2e-2;

/// One comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Check {
    /// The instruction set.
    pub isa: &'static str,
    /// What was compared.
    pub what: String,
    /// How far it was off.
    pub found: f64,
    /// How far it may be.
    pub bound: f64,
}

impl Check {
    /// Whether it is within its bound; NaN is not.
    pub fn passed(&self) -> bool {
        self.found <= self.bound
    }
}

/// Bytes of private memory the test needs for `model`; check that this fits before running it.
pub fn private_bytes(model: &ModelFile, threads: usize) -> usize {
    // Two trainers at once, and the gradients both are compared with.
    2 * MemoryPlan::new(model.config(), &request(model, threads)).private_bytes
}

/// Makes all comparisons and passes each to `tell`, which returns whether to continue. `folder` must exist; an
/// adapter is written there, and only that file remains.
///
/// # Errors
/// `Cancelled` if `tell` returns false; `Io` if the adapter can't be written or read back; `NonFinite` if a
/// loss isn't finite.
pub fn run(
    model: &Arc<ModelFile>,
    threads: usize,
    folder: &Path,
    tell: &mut dyn FnMut(&Check) -> bool,
) -> Result<()> {
    let adapter = adapter(model)?;
    let mut tell = |isa: Isa, what: &str, found: f64, bound: f64| match tell(&Check {
        isa: isa.name(),
        what: what.to_owned(),
        found,
        bound,
    }) {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Cancelled, "the self-test was stopped")),
    };
    let step = |isa, threads, precision| Step::take(model, &adapter, isa, threads, precision);
    let specified = step(Isa::SCALAR, threads, Precision::F32)?;
    for isa in Isa::available().filter(|isa| *isa != Isa::SCALAR) {
        let found = step(isa, threads, Precision::F32)?;
        tell(isa, "loss of a step in f32", found.loss_apart(&specified), F32_LOSS)?;
        tell(isa, "gradients in f32", found.gradients_apart(&specified, &adapter), F32_GRADIENT)?;
        let found = step(isa, threads, Precision::Int8)?;
        tell(isa, "loss of a step in int8", found.loss_apart(&specified), INT8_LOSS)?;
        tell(
            isa,
            "direction of gradients in int8",
            1.0 - cosine(&found.gradients, &specified.gradients),
            INT8_TURN,
        )?;
    }
    let isa = Isa::detect();
    let gradients = step(isa, threads, Precision::F32)?.gradients;
    differences(model, &adapter, (isa, threads), &gradients, &mut |what, found| {
        tell(isa, what, found, DIFFERENCE)
    })?;
    for precision in [Precision::F32, Precision::Int8] {
        let (one, more) = (step(isa, 1, precision)?, step(isa, threads.max(2), precision)?);
        let what = format!("bits changed by threads, {precision:?}");
        tell(isa, &what, one.bits_apart(&more) as f64, 0.0)?;
    }
    tell(isa, "parameters changed on disk", changed_on_disk(&adapter, folder)? as f64, 0.0)?;
    #[cfg(feature = "candle")]
    if judged_by_reference(model, threads) {
        let found = step(isa, threads, Precision::F32)?;
        let judged = referee::judge(model, &adapter, (isa, threads))?;
        tell(isa, "loss against candle's", found.loss_apart(&judged), F32_LOSS)?;
        tell(isa, "gradients against candle's", found.gradients_apart(&judged, &adapter), F32_GRADIENT)?;
    }
    Ok(())
}

/// Extra bytes for the reference: every weight in f32, and the activations for its backward.
pub fn reference_bytes(model: &ModelFile) -> usize {
    let c = model.config();
    let weights = size_of::<f32>() * TunedLayout::new(c).len();
    // Per token: activations of all blocks, and the head's logits several times over.
    let row = c.n_layers * (12 * c.d_model + 6 * c.d_ff) + 8 * c.vocab;
    weights + size_of::<f32>() * rows(model) * row
}

/// Whether [`run`] ends with the reference: if it is part of this build and fits the available memory.
pub fn judged_by_reference(model: &ModelFile, threads: usize) -> bool {
    let needed = (private_bytes(model, threads) + reference_bytes(model)) as u64;
    cfg!(feature = "candle") && room::here(threads).is_none_or(|room| needed <= room.bytes)
}

/// The model in candle's layers, with the adapter.
#[cfg(feature = "candle")]
mod referee {
    use candle_core::{Device, Result as Candle, Tensor, Var};

    use super::*;
    use crate::reference::{Lora, Reference, loss};

    /// Loss and gradients of the step, by candle's autograd.
    pub(super) fn judge(model: &ModelFile, adapter: &Adapter, (isa, threads): (Isa, usize)) -> Result<Step> {
        // Candle has no separate error for running out of memory.
        step(model, adapter, &Kernels::with_isa(isa, threads))
            .map_err(|e| Error::new(ErrorKind::NonFinite, format!("the reference model failed: {e}")))
    }

    fn step(model: &ModelFile, adapter: &Adapter, kernels: &Kernels) -> Candle<Step> {
        let (mut lora, mut vars) = (Lora::default(), Vec::new());
        for (layer, proj, s) in adapter.layout.slots() {
            let theta = |at: &std::ops::Range<usize>, shape| {
                Tensor::from_slice(&adapter.theta[at.clone()], shape, &Device::Cpu)
            };
            let a = Var::from_tensor(&theta(&s.a, (s.rank, s.inputs))?)?;
            let b = Var::from_tensor(&theta(&s.b, (s.rank, s.outputs))?.t()?.contiguous()?)?;
            lora.pairs.insert((layer, proj), (a.as_tensor().clone(), b.as_tensor().clone()));
            lora.scales.insert((layer, proj), adapter.config.scale_of(layer, proj));
            vars.push((s, a, b));
        }
        let batch = batch(model);
        let logits = Reference::of(model, kernels)?.logits(Some(&lora), &batch.ids)?;
        let mean = loss(&logits, &batch.targets)?;
        let sums = (&mean * batch.targets.len() as f64)?.backward()?;
        let mut gradients = vec![0.0; adapter.layout.len()];
        for (s, a, b) in vars {
            let of = |var: &Var| sums.get(var).cloned().map_or_else(|| var.zeros_like(), Ok);
            gradients[s.a].copy_from_slice(&of(&a)?.flatten_all()?.to_vec1::<f32>()?);
            gradients[s.b].copy_from_slice(&of(&b)?.t()?.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(Step { loss: f64::from(mean.to_scalar::<f32>()?), gradients })
    }
}

fn config(model: &ModelFile) -> Result<LoraConfig> {
    let layers: Vec<usize> = (0..model.config().n_layers).collect();
    LoraConfig::new(model.config(), RANK, 2.0 * RANK as f32, 0.0, &Proj::ALL, &layers)
}

/// An adapter of every projection whose B is noise, so none of its gradients vanish.
fn adapter(model: &ModelFile) -> Result<Adapter> {
    let mut random = Rng::new(1, 0);
    let mut adapter = Adapter::init(model.config(), &config(model)?, model.digest(), &mut || random.f32())?;
    let slots: Vec<_> = adapter.layout.slots().collect();
    for (_, _, slot) in slots {
        adapter.theta[slot.b].iter_mut().for_each(|b| *b = 0.05 * random.normal());
    }
    Ok(adapter)
}

fn rows(model: &ModelFile) -> usize {
    TOKENS.min(model.config().context_len)
}

fn request(model: &ModelFile, threads: usize) -> Request {
    let c = model.config();
    let params = config(model).map_or(0, |lora| crate::adapter::Layout::new(c, &lora).len());
    Request {
        batch: 1,
        seq: rows(model),
        params,
        rank: RANK,
        kept_blocks: c.n_layers,
        threads,
        model_bytes: model.private_bytes(),
        mapped_bytes: model.mapped_bytes(),
        ..Request::default()
    }
}

/// Random tokens, each the target of the one before.
fn batch(model: &ModelFile) -> Batch {
    let (rows, mut random) = (rows(model), Rng::new(2, 2));
    let ids: Vec<u32> = (0..=rows).map(|_| random.below(model.config().vocab as u64) as u32).collect();
    let whole = 0..rows;
    Batch { targets: ids[1..].to_vec(), ids: ids[..rows].to_vec(), seqs: vec![whole] }
}

fn trainer(
    model: &Arc<ModelFile>,
    adapter: &Adapter,
    (isa, threads): (Isa, usize),
    precision: Precision,
) -> Trainer {
    let options = TrainOptions {
        adamw: AdamWConfig::default(),
        schedule: Schedule { shape: Shape::Constant, peak: 1e-4, warmup: 0, total: 1 },
        seed: 0,
        precision,
        gradient: precision.into(),
        kl: None,
        freeze_a: false,
    };
    let kernels = Arc::new(Kernels::with_isa(isa, threads));
    let words = ArenaWords::new(model.config(), &request(model, threads));
    Trainer::new(model.clone(), kernels, words, adapter.clone(), options)
}

/// The result of a step.
struct Step {
    loss: f64,
    /// Sums over the targets, in the order of θ.
    gradients: Vec<f32>,
}

impl Step {
    fn take(
        model: &Arc<ModelFile>,
        adapter: &Adapter,
        isa: Isa,
        threads: usize,
        precision: Precision,
    ) -> Result<Step> {
        let mut trainer = trainer(model, adapter, (isa, threads), precision);
        let loss = trainer.step(&[batch(model)])?.loss;
        Ok(Step { loss, gradients: trainer.gradients().to_vec() })
    }

    fn loss_apart(&self, specified: &Step) -> f64 {
        (self.loss - specified.loss).abs() / specified.loss
    }

    /// The deviation of the worst tensor.
    fn gradients_apart(&self, specified: &Step, adapter: &Adapter) -> f64 {
        let of =
            |at: std::ops::Range<usize>| largest_apart(&self.gradients[at.clone()], &specified.gradients[at]);
        let tensors = adapter.layout.slots().flat_map(|(_, _, slot)| [slot.a, slot.b]).map(of);
        tensors.fold(0.0, |worst, apart| if apart > worst || apart.is_nan() { apart } else { worst })
    }

    fn bits_apart(&self, other: &Step) -> usize {
        let pairs = self.gradients.iter().zip(&other.gradients);
        let differ = pairs.filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        differ + usize::from(self.loss.to_bits() != other.loss.to_bits())
    }
}

/// Checks the gradient of each kind of matrix, over all blocks together, against the loss: along the gradient g
/// its difference quotient must be |g|.
fn differences(
    model: &Arc<ModelFile>,
    adapter: &Adapter,
    computing: (Isa, usize),
    gradients: &[f32],
    tell: &mut dyn FnMut(&str, f64) -> Result<()>,
) -> Result<()> {
    let mut trainer = trainer(model, adapter, computing, Precision::F32);
    let targets = rows(model) as f64;
    for proj in Proj::ALL {
        for name in ["A", "B"] {
            let slots = adapter.layout.slots().filter(|(_, p, _)| *p == proj);
            let places: Vec<_> = slots.map(|(_, _, s)| if name == "A" { s.a } else { s.b }).collect();
            let squares = places.iter().flat_map(|at| &gradients[at.clone()]).map(|g| f64::from(*g).powi(2));
            // The loss is a mean, while the gradients are sums.
            let norm = squares.sum::<f64>().sqrt() / targets;
            let length = CHANGE / 2.0 / norm;
            let mut loss_at = |sign: f64| {
                let theta = trainer.numbers_mut().theta;
                theta.copy_from_slice(&adapter.theta);
                for at in &places {
                    let moves =
                        gradients[at.clone()].iter().map(|g| sign * length * f64::from(*g) / targets / norm);
                    theta[at.clone()].iter_mut().zip(moves).for_each(|(value, by)| *value += by as f32);
                }
                let e = trainer.evaluate(std::iter::once(batch(model)), true);
                e.loss_sum / e.targets as f64
            };
            let quotient = (loss_at(1.0) - loss_at(-1.0)) / (2.0 * length);
            tell(
                &format!("differences of the loss, {name} of {}", proj.hf_name()),
                (quotient - norm).abs() / norm,
            )?;
        }
    }
    Ok(())
}

/// max|a − b| / max|b|; NaN if either contains one.
fn largest_apart(a: &[f32], b: &[f32]) -> f64 {
    let largest = |values: &mut dyn Iterator<Item = f64>| {
        values.fold(0.0f64, |m, v| if v.is_nan() || v.abs() > m { v.abs() } else { m })
    };
    let apart = largest(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    if apart == 0.0 { 0.0 } else { apart / largest(&mut b.iter().map(|b| f64::from(*b))) }
}

/// The cosine of the angle between two vectors.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// The number of parameters that changed when committed and read back.
fn changed_on_disk(adapter: &Adapter, folder: &Path) -> Result<usize> {
    adapter.save(&Disk, folder, Stored::F32)?;
    let loaded = Adapter::load(folder)?;
    let pairs = loaded.theta.iter().zip(&adapter.theta);
    let differ = pairs.filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    Ok(differ + loaded.theta.len().abs_diff(adapter.theta.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::map::Map;

    fn seedling() -> Arc<ModelFile> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../targets/cli/seedling.gguf");
        let map = Map::read(Path::new(path)).expect("the model of the repository");
        Arc::new(ModelFile::from_map(map).expect("a valid model"))
    }

    #[test]
    fn this_machine_passes_and_can_be_stopped() {
        let (model, folder) = (seedling(), tempfile::tempdir().expect("a folder"));
        let mut checks = Vec::new();
        run(&model, 2, folder.path(), &mut |check| {
            checks.push(check.clone());
            true
        })
        .expect("a whole run");
        let failed: Vec<_> = checks.iter().filter(|check| !check.passed()).collect();
        assert!(failed.is_empty(), "{failed:#?}");
        let sets = Isa::available().count() - 1;
        let judged = if judged_by_reference(&model, 2) { 2 } else { 0 };
        assert_eq!(checks.len(), 4 * sets + 2 * Proj::ALL.len() + 3 + judged);
        let mut told = 0;
        let stopped = run(&model, 1, folder.path(), &mut |_| {
            told += 1;
            false
        });
        assert_eq!((stopped.unwrap_err().kind(), told), (ErrorKind::Cancelled, 1));
    }

    /// The errors the comparisons must find: a multiplier 2% off, gradients 5% off in one kind of matrix, and a
    /// NaN.
    #[test]
    fn what_is_wrong_is_found() {
        let model = seedling();
        let adapter = adapter(&model).expect("an adapter");
        let step = |adapter: &Adapter| {
            Step::take(&model, adapter, Isa::detect(), 1, Precision::F32).expect("a step")
        };
        let (right, mut spoilt) = (step(&adapter), adapter.clone());
        spoilt.config.alpha *= 1.02;
        assert!(step(&spoilt).gradients_apart(&right, &adapter) > F32_GRADIENT);
        #[cfg(feature = "candle")]
        {
            let judged = referee::judge(&model, &adapter, (Isa::detect(), 1)).expect("the reference");
            assert!(
                right.loss_apart(&judged) < F32_LOSS
                    && right.gradients_apart(&judged, &adapter) < F32_GRADIENT
            );
            let spoilt = step(&spoilt);
            assert!(
                spoilt.loss_apart(&judged) > F32_LOSS
                    || spoilt.gradients_apart(&judged, &adapter) > F32_GRADIENT
            );
        }

        let mut gradients = right.gradients.clone();
        for (_, proj, slot) in adapter.layout.slots() {
            if proj == Proj::Down {
                gradients[slot.a].iter_mut().for_each(|g| *g *= 1.05);
            }
        }
        let mut wrong = Vec::new();
        differences(&model, &adapter, (Isa::detect(), 1), &gradients, &mut |what, found| {
            wrong.extend((found > DIFFERENCE).then(|| what.to_owned()));
            Ok(())
        })
        .expect("all of them");
        assert_eq!(wrong, ["differences of the loss, A of down_proj"]);

        let mut lost = right.gradients.clone();
        lost[7] = f32::NAN;
        let lost = Step { loss: right.loss, gradients: lost };
        assert!(lost.gradients_apart(&right, &adapter).is_nan() && lost.bits_apart(&right) == 1);
        let found = 1.0 - cosine(&lost.gradients, &right.gradients);
        assert!(!Check { isa: "x", what: String::new(), found, bound: INT8_TURN }.passed());
    }
}
