//! Protected directions: A begins inside the subspace that ordinary text leaves quiet, and stays there.
//!
//! A low-rank update changes a projection's output only for inputs that A sees. The inputs of ordinary text fill few
//! directions; the others hold a small share ε of their energy. Rows of A drawn there hardly see ordinary text, so B
//! may learn what it likes. Where to begin is that of LoRA-Null (arXiv 2503.02659) and of CorDA's knowledge-preserved
//! mode (arXiv 2406.05223); A is frozen as in FFA-LoRA (arXiv 2403.12313).
//!
//! The walk goes block by block, as EVA's does: it holds the hidden states of all rows, one block's four covariances,
//! and the eigenvectors of one. Every sum has one order, so the result doesn't depend on the number of threads.

use std::sync::Arc;

use engraft_kernels::{Kernels, SymmetricEigen};

use super::walk::{SHARING, Walk, WalkWords, check_ranks, not_finite, widths};
use crate::adapter::{Adapter, Init, Layout};
use crate::algebra::dot;
use crate::data::Batch;
use crate::error::Result;
use crate::model::weights::ModelFile;
use crate::model::{ModelConfig, Proj};
use crate::nn::Precision;
use crate::rng::Rng;

/// First random stream of the draws; each projection of each block has its own.
const STREAM: u64 = 0x5155_4900 << 32;
/// Norm of a row of A.
const ROW_NORM: f32 = 0.577_350_26;

/// f32 words of everything [`initialize`] allocates, beside the batches: for at most `rows` rows in a batch and
/// `tokens` in total, in sequences of at most `seq`.
pub fn words(c: &ModelConfig, layout: &Layout, extent: (usize, usize, usize), threads: usize) -> usize {
    let widths = widths(c, layout);
    let squares = widths.map(|n| n * n);
    let widest = widths.into_iter().max().unwrap_or(0);
    // The quiet directions of one input, at most all, and the random mixture of one projection.
    let draw = widest * (2 * layout.rank_max());
    WalkWords::new(c, extent, threads).total()
        + squares.iter().sum::<usize>()
        + SymmetricEigen::words(widest)
        + draw
}

/// Draws A of every adapted projection inside the directions that the inputs over `batches` leave quiet: those of the
/// least energy whose shares add up to at most `energy`, and twice the rank at least. After each batch and each input,
/// `go_on` receives the number of blocks done; its error ends the walk, which leaves A partly set.
///
/// # Errors
/// `Misuse` if a rank exceeds its projection's width; `NonFinite` if an input isn't finite; those of `go_on`.
pub fn initialize(
    adapter: &mut Adapter,
    model: &ModelFile,
    kernels: &Arc<Kernels>,
    precision: Precision,
    batches: &[Batch],
    (energy, seed): (f32, u64),
    mut go_on: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    check_ranks(&adapter.layout)?;
    let c = model.config();
    let mut walk = Walk::new(model, kernels, precision, batches);
    let mut covariances = widths(c, &adapter.layout).map(|n| vec![0.0; n * n]);
    let last = adapter.layout.layers().last().copied().unwrap_or(0);
    for layer in 0..=last {
        let adapted = adapter.layout.block(layer).is_some();
        covariances.iter_mut().for_each(|own| own.fill(0.0));
        walk.pass(layer, &mut |batch, inputs, scratch| {
            let m = batch.rows();
            for (own, x) in covariances.iter_mut().zip(inputs).filter(|(own, _)| adapted && !own.is_empty()) {
                kernels.gemm_tn(x, x, m, own, true, scratch);
            }
            go_on(layer)
        })?;
        for (covariance, projs) in covariances.iter().zip(SHARING).filter(|_| adapted) {
            draw(adapter, covariance, (layer, projs), (energy, seed))
                .map_err(|e| e.at(format!("{}, block {layer} of {}", projs[0].hf_name(), c.n_layers)))?;
            go_on(layer)?;
        }
    }
    adapter.meta.init = Init::Quiet;
    Ok(())
}

/// Sets A of the projections that share an input with this covariance.
fn draw(
    adapter: &mut Adapter,
    covariance: &[f32],
    (layer, projs): (usize, &[Proj]),
    (energy, seed): (f32, u64),
) -> Result<()> {
    let slots: Vec<_> = projs.iter().filter_map(|p| Some((*p, adapter.layout.slot(layer, *p)?))).collect();
    let Some(rank) = slots.iter().map(|(_, s)| s.rank).max() else { return Ok(()) };
    let n = slots[0].1.inputs;
    let found = SymmetricEigen::new(covariance, n).ok_or_else(not_finite)?;
    let values: Vec<f64> = found.values().iter().map(|v| f64::from(*v).max(0.0)).collect();
    let quiet = quiet(&values, energy).max(2 * rank).min(n);
    for (proj, slot) in slots {
        let stream = STREAM + (layer * Proj::ALL.len() + proj as usize) as u64;
        let mix = orthonormal(slot.rank, quiet, &mut Rng::new(seed, stream));
        found.mix_first(quiet, &mix, slot.rank, ROW_NORM, &mut adapter.theta[slot.a]);
    }
    Ok(())
}

/// How many of the smallest values, which rise, hold less than this share of all.
fn quiet(values: &[f64], share: f32) -> usize {
    let bound = values.iter().sum::<f64>() * f64::from(share);
    let sums = values.iter().scan(0.0, |sum, value| {
        *sum += value;
        Some(*sum)
    });
    sums.take_while(|sum| *sum < bound).count()
}

/// Random orthonormal rows `[r, n]`, by Gram and Schmidt on normal numbers, twice for their rounding.
fn orthonormal(r: usize, n: usize, random: &mut Rng) -> Vec<f32> {
    let mut rows: Vec<f32> = (0..r * n).map(|_| random.normal()).collect();
    for i in 0..r {
        let (before, rest) = rows.split_at_mut(i * n);
        let own = &mut rest[..n];
        for other in before.chunks_exact(n).chain(before.chunks_exact(n)) {
            let share = dot(own, other);
            own.iter_mut().zip(other).for_each(|(v, o)| *v -= share * o);
        }
        let norm = dot(own, own).sqrt();
        own.iter_mut().for_each(|v| *v /= norm);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quiet_values_stay_below_their_share() {
        let values = [0.0, 0.1, 0.2, 0.7, 9.0];
        assert_eq!(quiet(&values, 0.01), 1);
        assert_eq!(quiet(&values, 0.0301), 3);
        assert_eq!(quiet(&values, 1.0), 4);
        assert_eq!(quiet(&values, 0.0), 0);
    }

    #[test]
    fn random_rows_are_orthonormal() {
        let rows = orthonormal(5, 40, &mut Rng::new(1, 2));
        for (i, a) in rows.chunks_exact(40).enumerate() {
            for (j, b) in rows.chunks_exact(40).enumerate() {
                assert!((dot(a, b) - f32::from(i == j)).abs() < 1e-5, "{i} {j}");
            }
        }
    }
}
