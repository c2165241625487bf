//! Approximates a DoRA by the nearest plain LoRA of a given rank.
//!
//! A DoRA's change to a projection, ΔW = c∘(W + s·B·A) − W, has full rank wherever a gain c isn't 1. The
//! nearest matrix of a given rank is its truncated singular value decomposition (Eckart and Young), found here
//! by randomized subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061): ΔW is only ever multiplied
//! by a few rows at a time, so W stays in its blocks except for the kernels' panels. The error is then measured
//! row by row against the numbers that will be written, not estimated.

use engraft_kernels::{Kernels, LowRank, NnOp, NtOp, QMatrix, Rows, gemm_scratch_words};

use super::exchange::{Exchange, Module, transpose};
use super::gains::Gains;
use super::params::Adapter;
use super::{RANK_MAX, Slot};
use crate::algebra::{jacobi_sweep, set_identity};
use crate::error::{Error, ErrorKind, Result};
use crate::model::Proj;
use crate::model::weights::ModelFile;
use crate::rng::Rng;

/// Extra directions to track beyond those kept: they absorb what would otherwise mix into the kept ones.
const BESIDE: usize = 8;
/// Passes of the directions through ΔWᵀ·ΔW: the singular values of such a change decay slowly.
const ROUNDS: usize = 4;
/// Random stream of the initial directions.
const STREAM: u64 = 0x5356_445f;
/// Rows per work item when measuring the error.
const ERROR_ROWS: usize = 16;
/// A direction that keeps less than this share of its length once the others are subtracted is mere rounding.
const NOTHING: f64 = 1e-5;

/// How far a projection's approximation is from its change, in Frobenius norms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModuleError {
    /// Transformer block.
    pub layer: usize,
    /// Projection within the block.
    pub proj: Proj,
    /// ‖ΔW‖.
    pub norm: f64,
    /// ‖ΔW − B·A‖.
    pub error: f64,
}

impl ModuleError {
    /// The error as a share of the change; 0 where nothing changes.
    pub fn relative(&self) -> f64 {
        share(self.error, self.norm)
    }
}

/// A plain LoRA in place of a DoRA.
#[derive(Clone, Debug)]
pub struct Approximation {
    /// The adapter; its multiplier is 1 everywhere.
    pub exchange: Exchange,
    /// One for each module.
    pub errors: Vec<ModuleError>,
}

impl Approximation {
    /// The error of all projections together, as a share of their change.
    pub fn relative_error(&self) -> f64 {
        let total =
            |of: fn(&ModuleError) -> f64| self.errors.iter().map(|e| of(e).powi(2)).sum::<f64>().sqrt();
        share(total(|e| e.error), total(|e| e.norm))
    }
}

fn share(error: f64, norm: f64) -> f64 {
    if norm == 0.0 { 0.0 } else { error / norm }
}

/// The LoRA of rank `rank` (less where a projection is narrower) nearest to a DoRA on its base. `seed` sets the
/// initial directions. `progress` receives the number of projections done and the total; return false to stop.
///
/// # Errors
/// `Misuse` if the adapter isn't a DoRA or the rank is outside 1 to [`RANK_MAX`]; `BaseMismatch` if the model's
/// shapes differ; `Cancelled`.
pub fn low_rank(
    model: &ModelFile,
    kernels: &Kernels,
    adapter: &Adapter,
    rank: usize,
    seed: u64,
    mut progress: impl FnMut(usize, usize) -> bool,
) -> Result<Approximation> {
    let misuse = |problem: String| Err(Error::new(ErrorKind::Misuse, problem));
    adapter.check_shapes(model.config())?;
    if !adapter.config.dora {
        return misuse(
            "the adapter is a plain LoRA, which needs no approximation: export it as it is".into(),
        );
    }
    if !(1..=RANK_MAX).contains(&rank) {
        return misuse(format!("rank {rank} is not within 1 to {RANK_MAX}"));
    }
    let Adapter { layout, config, theta, .. } = adapter;
    let found = Gains::of(model, kernels, adapter);
    let all = layout.slots().count();
    let (mut modules, mut errors) = (Vec::with_capacity(all), Vec::with_capacity(all));
    for (done, (layer, proj, slot)) in layout.slots().enumerate() {
        let rank = rank.min(slot.outputs).min(slot.inputs);
        let w = model.block(layer).proj(proj);
        let mut delta = Delta::new(kernels, w, &slot, theta, config.scale_of(layer, proj), found.c());
        let mut rng = Rng::new(seed, STREAM ^ done as u64);
        let (a, bt) = delta.nearest(rank, &mut rng);
        let (norm, error) = delta.error(&a, &bt, rank);
        errors.push(ModuleError { layer, proj, norm, error });
        let mut b = vec![0.0; bt.len()];
        transpose(&bt, slot.outputs, &mut b);
        modules.push(Module { layer, proj, rank, alpha: rank as f32, a, b, magnitude: None });
        if !progress(done + 1, all) {
            return Err(Error::new(ErrorKind::Cancelled, "stopped before the approximation was complete"));
        }
    }
    let base_name = adapter.meta.base_name.clone();
    let exchange = Exchange { base_name, modules, dropout: config.dropout, ..Exchange::default() };
    Ok(Approximation { exchange, errors })
}

/// One projection's change, as an operator to multiply by.
struct Delta<'a> {
    kernels: &'a Kernels,
    w: QMatrix<'a>,
    /// `[r, in]`.
    a: &'a [f32],
    /// `[r, out]`.
    bt: &'a [f32],
    rank: usize,
    scale: f32,
    /// `[out]`.
    c: &'a [f32],
    kernel: Vec<f32>,
}

impl<'a> Delta<'a> {
    fn new(
        kernels: &'a Kernels,
        w: QMatrix<'a>,
        slot: &Slot,
        theta: &'a [f32],
        scale: f32,
        gains: &'a [f32],
    ) -> Delta<'a> {
        let words = gemm_scratch_words(slot.outputs, slot.inputs, slot.rank);
        Delta {
            kernels,
            w,
            a: &theta[slot.a.clone()],
            bt: &theta[slot.b.clone()],
            rank: slot.rank,
            scale,
            c: &gains[slot.rows()],
            kernel: vec![0.0; words * kernels.threads()],
        }
    }

    /// x·ΔWᵀ `[m, out]` of x `[m, in]`, by c∘(W + s·B·A) − W = (c − 1)∘W + c∘s·B·A, which avoids cancellation.
    fn rows(&mut self, x: &[f32]) -> Vec<f32> {
        let (n, k, r) = (self.w.rows(), self.w.cols(), self.rank);
        let m = x.len() / k;
        let (mut y, mut h) = (vec![0.0; m * n], vec![0.0; m * r]);
        self.kernels.skinny_nt(self.scale, x, m, k, self.a, r, &mut h);
        let op = NtOp { x: Rows::F32(x), w: self.w, low: None, gain: None, y: &mut y, accumulate: false };
        self.kernels.qgemm_nt(m, &mut [op], &mut self.kernel);
        let (c, bt) = (self.c, self.bt);
        self.kernels.rows(n, &mut y, |t, row| {
            row.iter_mut().zip(c).for_each(|(y, c)| *y *= c - 1.0);
            for (h, b) in h[t * r..(t + 1) * r].iter().zip(bt.chunks_exact(n)) {
                row.iter_mut().zip(b).zip(c).for_each(|((y, b), c)| *y += c * (h * b));
            }
        });
        y
    }

    /// y·ΔW `[m, in]` of y `[m, out]`.
    fn columns(&mut self, y: &[f32]) -> Vec<f32> {
        let (n, k, r) = (self.w.rows(), self.w.cols(), self.rank);
        let m = y.len() / n;
        let times = |f: &dyn Fn(f32) -> f32| -> Vec<f32> {
            y.chunks_exact(n).flat_map(|row| row.iter().zip(self.c).map(|(y, c)| y * f(*c))).collect()
        };
        let (gained, changed) = (times(&|c| c), times(&|c| c - 1.0));
        let (mut x, mut h) = (vec![0.0; m * k], vec![0.0; m * r]);
        self.kernels.skinny_nt(self.scale, &gained, m, n, self.bt, r, &mut h);
        let low = Some(LowRank { h: &h, b: self.a, rank: r });
        let op = NnOp { dy: Rows::F32(&changed), w: self.w, low };
        self.kernels.qgemm_nn(m, &[op], &mut x, false, &mut self.kernel);
        x
    }

    /// A `[rank, in]` and Bᵀ `[rank, out]` whose product is nearest to ΔW, singular values shared evenly.
    fn nearest(&mut self, rank: usize, rng: &mut Rng) -> (Vec<f32>, Vec<f32>) {
        let (n, k) = (self.w.rows(), self.w.cols());
        let followed = (rank + BESIDE).min(n).min(k);
        let mut x: Vec<f32> = (0..followed * k).map(|_| rng.normal()).collect();
        let mut q = Vec::new();
        for _ in 0..ROUNDS {
            orthonormalize(&mut x, k);
            q = self.rows(&x);
            orthonormalize(&mut q, n);
            x = self.columns(&q);
        }
        // Now ΔW ≈ Qᵀ·X, and X's singular vectors turn Q's directions into those of ΔW.
        let (values, vectors) = eigen(gram(&x, k), followed);
        let (mut a, mut bt) = (vec![0.0; rank * k], vec![0.0; rank * n]);
        for j in 0..rank {
            let root = values[j].max(0.0).sqrt().sqrt();
            let turn = &vectors[j * followed..(j + 1) * followed];
            combine(turn, &x, if root > 0.0 { 1.0 / root } else { 0.0 }, &mut a[j * k..(j + 1) * k]);
            combine(turn, &q, root, &mut bt[j * n..(j + 1) * n]);
        }
        (a, bt)
    }

    /// ‖ΔW‖ and ‖ΔW − B·A‖, row by row.
    fn error(&self, a: &[f32], bt: &[f32], rank: usize) -> (f64, f64) {
        let (n, k) = (self.w.rows(), self.w.cols());
        let mut sums = vec![0.0_f32; 2 * n];
        let add = |row: &mut [f32], factor: f32, a: &[f32]| {
            row.iter_mut().zip(a).for_each(|(v, a)| *v += factor * a);
        };
        self.kernels.rows(2 * ERROR_ROWS, &mut sums, |item, sums| {
            let mut row = vec![0.0; k];
            for (i, sums) in sums.chunks_exact_mut(2).enumerate() {
                let i = item * ERROR_ROWS + i;
                let c = self.c[i];
                self.kernels.dequantize_row(&self.w, i, &mut row);
                row.iter_mut().for_each(|v| *v *= c - 1.0);
                for j in 0..self.rank {
                    add(&mut row, c * self.scale * self.bt[j * n + i], &self.a[j * k..(j + 1) * k]);
                }
                sums[0] = square(&row) as f32;
                for j in 0..rank {
                    add(&mut row, -bt[j * n + i], &a[j * k..(j + 1) * k]);
                }
                sums[1] = square(&row) as f32;
            }
        });
        let total =
            |which: usize| sums.iter().skip(which).step_by(2).map(|v| f64::from(*v)).sum::<f64>().sqrt();
        (total(0), total(1))
    }
}

fn square(row: &[f32]) -> f64 {
    row.iter().map(|v| f64::from(*v).powi(2)).sum()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// out = factor·Σ_i turn_i·row_i.
fn combine(turn: &[f64], rows: &[f32], factor: f64, out: &mut [f32]) {
    let n = out.len();
    for (i, o) in out.iter_mut().enumerate() {
        let sum: f64 = turn.iter().zip(rows.chunks_exact(n)).map(|(t, row)| t * f64::from(row[i])).sum();
        *o = (factor * sum) as f32;
    }
}

/// Orthonormalizes rows of `n` by Gram–Schmidt, run twice. Rows that depend on earlier ones become zero.
fn orthonormalize(rows: &mut [f32], n: usize) {
    for i in 0..rows.len() / n {
        let (before, rest) = rows.split_at_mut(i * n);
        let row = &mut rest[..n];
        let length = square(row).sqrt();
        for _ in 0..2 {
            for other in before.chunks_exact(n) {
                let along = dot(row, other);
                row.iter_mut()
                    .zip(other)
                    .for_each(|(v, o)| *v = (f64::from(*v) - along * f64::from(*o)) as f32);
            }
        }
        let left = square(row).sqrt();
        let factor = if left > NOTHING * length { 1.0 / left } else { 0.0 };
        row.iter_mut().for_each(|v| *v = (f64::from(*v) * factor) as f32);
    }
}

/// Dot products of all pairs of rows of `n`.
fn gram(rows: &[f32], n: usize) -> Vec<f64> {
    let row = |i: usize| &rows[i * n..(i + 1) * n];
    let m = rows.len() / n;
    (0..m * m).map(|at| dot(row(at / m), row(at % m))).collect()
}

/// Eigenvalues of a symmetric matrix `[m, m]`, the largest first, and their vectors as rows (Jacobi's method).
fn eigen(mut g: Vec<f64>, m: usize) -> (Vec<f64>, Vec<f64>) {
    /// Sweeps converge quadratically: a handful is enough, this is far more.
    const SWEEPS_MAX: usize = 40;
    let mut v = vec![0.0; m * m];
    set_identity(&mut v, m);
    let scale = (0..m).map(|i| g[i * m + i].abs()).fold(0.0, f64::max);
    for _ in 0..SWEEPS_MAX {
        if jacobi_sweep(&mut g, &mut v, m, |_, _, _| false) <= 1e-15 * scale {
            break;
        }
    }
    let mut order: Vec<usize> = (0..m).collect();
    order.sort_by(|a, b| g[b * m + b].total_cmp(&g[a * m + a]));
    let values = order.iter().map(|i| g[i * m + i]).collect();
    (values, order.iter().flat_map(|i| v[i * m..(i + 1) * m].to_vec()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eigenvectors_are_those_of_their_definition() {
        let mut rng = Rng::new(1, 1);
        let m = 12;
        let rows: Vec<f32> = (0..m * 30).map(|_| rng.normal()).collect();
        let g = gram(&rows, 30);
        let (values, vectors) = eigen(g.clone(), m);
        assert!(values.is_sorted_by(|a, b| a >= b));
        for (j, value) in values.iter().enumerate() {
            let v = &vectors[j * m..(j + 1) * m];
            for i in 0..m {
                let product: f64 = (0..m).map(|l| g[i * m + l] * v[l]).sum();
                assert!((product - value * v[i]).abs() < 1e-9 * values[0], "{j} {i}");
            }
        }
        assert_eq!(eigen(vec![0.0; 4], 2).0, [0.0, 0.0]);
    }

    #[test]
    fn dependent_rows_become_zero() {
        let mut rows = vec![3.0, 4.0, 0.0, 6.0, 8.0, 0.0, 0.0, 1.0, 1.0];
        orthonormalize(&mut rows, 3);
        assert_eq!(rows[3..6], [0.0; 3]);
        assert!((square(&rows[..3]) - 1.0).abs() < 1e-6 && dot(&rows[..3], &rows[6..]).abs() < 1e-6);
    }
}
