//! The leading right singular vectors of a tall matrix, by subspace iteration. It takes only a few products of
//! k rows with the matrix, and never forms one of its width squared.

use engraft_kernels::Kernels;

use crate::algebra::{dot, jacobi_sweep, set_identity};
use crate::rng::Rng;

/// Extra vectors to iterate, so that the last requested ones also converge.
const OVERSAMPLE: usize = 8;
/// Most iterations.
const ITERATIONS: usize = 16;
/// Iteration ends when no vector's share of the matrix's energy changes by more than this fraction.
const SETTLED: f64 = 1e-2;
/// A row that keeps less than this fraction after projecting out the others depends on them; the rest is
/// rounding.
const DEPENDENT: f32 = 1e-5;
/// Most redraws for a dependent row.
const DRAWS: usize = 8;
/// Most sweeps of Jacobi's method, which converges quadratically; five or six are typical.
const SWEEPS: usize = 30;

/// Buffers of an iteration.
pub struct Subspace {
    /// `[k, n]`, rows orthonormal.
    q: Vec<f32>,
    z: Vec<f32>,
    /// `[t, k]`.
    h: Vec<f32>,
    /// `[k, k]` each: qᵀXᵀXq and its eigenvectors, by rows.
    gram: Vec<f64>,
    vectors: Vec<f64>,
}

impl Subspace {
    /// f32 words for up to `t` rows of up to `n` columns and `r` vectors.
    pub fn words(t: usize, n: usize, r: usize) -> usize {
        let k = (r + OVERSAMPLE).min(n);
        2 * k * n + t * k + 4 * k * k
    }

    /// Allocates the buffers.
    pub fn new(t: usize, n: usize, r: usize) -> Subspace {
        let k = (r + OVERSAMPLE).min(n);
        let (zeros, squares) = (|len: usize| vec![0.0; len], || vec![0.0; k * k]);
        Subspace { q: zeros(k * n), z: zeros(k * n), h: zeros(t * k), gram: squares(), vectors: squares() }
    }

    /// The first r right singular vectors of x `[t, n]`, `[r, n]` with orthonormal rows; if x has fewer, the
    /// rest are random. `None` if x isn't finite.
    ///
    /// # Panics
    /// If r exceeds n, or the buffers are smaller.
    pub fn leading(
        &mut self,
        kernels: &Kernels,
        x: &[f32],
        (t, n): (usize, usize),
        r: usize,
        rng: &mut Rng,
    ) -> Option<&[f32]> {
        assert!(r <= n, "{r} orthonormal vectors of {n} elements");
        let k = (r + OVERSAMPLE).min(n);
        self.q[..k * n].iter_mut().for_each(|v| *v = rng.normal());
        orthonormalize(&mut self.q[..k * n], n, rng);
        let mut before = vec![0.0; k];
        for _ in 0..ITERATIONS {
            self.project(kernels, x, (t, n), k);
            let energy = energies(&self.h[..t * k], k);
            if !energy.iter().all(|e| e.is_finite()) {
                return None;
            }
            let settled = |(now, before): (&f64, &f64)| (now - before).abs() <= SETTLED * now;
            if energy.iter().zip(&before).take(r).all(settled) {
                break;
            }
            before = energy;
            kernels.skinny_tn(&self.h[..t * k], x, t, k, n, &mut self.z[..k * n], false);
            std::mem::swap(&mut self.q, &mut self.z);
            orthonormalize(&mut self.q[..k * n], n, rng);
        }
        self.project(kernels, x, (t, n), k);
        Some(self.rotate(t, n, k, r))
    }

    /// h = x·qᵀ.
    fn project(&mut self, kernels: &Kernels, x: &[f32], (t, n): (usize, usize), k: usize) {
        kernels.skinny_nt(1.0, x, t, n, &self.q[..k * n], k, &mut self.h[..t * k]);
    }

    /// Rotates q to the directions in its span along which x is longest, in descending order (Rayleigh–Ritz).
    fn rotate(&mut self, t: usize, n: usize, k: usize, r: usize) -> &[f32] {
        let gram = &mut self.gram[..k * k];
        gram.fill(0.0);
        for row in self.h[..t * k].chunks_exact(k) {
            for i in 0..k {
                for j in 0..k {
                    gram[i * k + j] += f64::from(row[i]) * f64::from(row[j]);
                }
            }
        }
        let vectors = &mut self.vectors[..k * k];
        eigen(gram, vectors, k);
        let mut order: Vec<usize> = (0..k).collect();
        order.sort_by(|i, j| gram[j * k + j].total_cmp(&gram[i * k + i]).then(i.cmp(j)));
        for (row, at) in self.z[..r * n].chunks_exact_mut(n).zip(&order) {
            for (c, v) in row.iter_mut().enumerate() {
                let terms = (0..k).map(|j| vectors[at * k + j] * f64::from(self.q[j * n + c]));
                *v = terms.sum::<f64>() as f32;
            }
        }
        &self.z[..r * n]
    }
}

/// Σ h² of each column.
fn energies(h: &[f32], k: usize) -> Vec<f64> {
    let mut sums = vec![0.0; k];
    for row in h.chunks_exact(k) {
        sums.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(*v) * f64::from(*v));
    }
    sums
}

/// Gram–Schmidt on rows of n elements, run twice, which suffices in f32. A row that depends on earlier ones is
/// redrawn.
fn orthonormalize(q: &mut [f32], n: usize, rng: &mut Rng) {
    for i in 0..q.len() / n {
        let (before, rest) = q.split_at_mut(i * n);
        let row = &mut rest[..n];
        for _ in 0..DRAWS {
            let size = dot(row, row).sqrt();
            if size > 0.0 {
                // Normalize first: squares of large rows would overflow, those of small ones vanish.
                row.iter_mut().for_each(|v| *v /= size);
            }
            for _ in 0..2 {
                for other in before.chunks_exact(n) {
                    let along = dot(row, other);
                    row.iter_mut().zip(other).for_each(|(v, o)| *v -= along * o);
                }
            }
            let left = dot(row, row).sqrt();
            if left > DEPENDENT {
                row.iter_mut().for_each(|v| *v /= left);
                break;
            }
            row.iter_mut().for_each(|v| *v = rng.normal());
        }
    }
}

/// Diagonalizes a symmetric a `[k, k]`: eigenvalues on its diagonal, eigenvectors in the rows of `vectors`.
fn eigen(a: &mut [f64], vectors: &mut [f64], k: usize) {
    set_identity(vectors, k);
    // Below the rounding of the diagonal.
    let is_nothing = |app: f64, aqq: f64, apq: f64| apq.abs() <= 1e-14 * (app * aqq).abs().sqrt();
    for _ in 0..SWEEPS {
        if jacobi_sweep(a, vectors, k, is_nothing) == 0.0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A matrix `[t, n]` whose successive directions shrink by `decay`.
    fn matrix(t: usize, n: usize, decay: f32, rng: &mut Rng) -> Vec<f32> {
        let mut directions: Vec<f32> = (0..n * n).map(|_| rng.normal()).collect();
        orthonormalize(&mut directions, n, rng);
        let mut x = vec![0.0f32; t * n];
        for row in x.chunks_exact_mut(n) {
            for (i, d) in directions.chunks_exact(n).enumerate() {
                let size = decay.powi(i as i32) * rng.normal();
                row.iter_mut().zip(d).for_each(|(v, d)| *v += size * d);
            }
        }
        x
    }

    /// The largest |a·bᵀ − 1| of rows of a and b.
    fn apart(a: &[f32], b: &[f32], k: usize, n: usize) -> f32 {
        let pairs = (0..k).flat_map(|i| (0..k).map(move |j| (i, j)));
        let off = pairs.map(|(i, j)| {
            let d = dot(&a[i * n..(i + 1) * n], &b[j * n..(j + 1) * n]);
            (d - f32::from(u8::from(i == j))).abs()
        });
        off.fold(0.0, f32::max)
    }

    #[test]
    fn vectors_are_those_of_the_whole_gram_matrix() {
        let (t, n, r) = (200, 48, 5);
        for (decay, bound) in [(0.5, 1e-2), (0.8, 3e-2)] {
            let mut rng = Rng::new(3, 3);
            let x = matrix(t, n, decay, &mut rng);
            // The full XᵀX, which only a test can afford.
            let mut gram = vec![0.0f64; n * n];
            for row in x.chunks_exact(n) {
                for i in 0..n {
                    (0..n).for_each(|j| gram[i * n + j] += f64::from(row[i]) * f64::from(row[j]));
                }
            }
            let whole = gram.clone();
            let mut vectors = vec![0.0; n * n];
            eigen(&mut gram, &mut vectors, n);
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|i, j| gram[j * n + j].total_cmp(&gram[i * n + i]));
            let mut space = Subspace::new(t, n, r);
            let kernels = Kernels::detect(2);
            let found = space.leading(&kernels, &x, (t, n), r, &mut rng).expect("finite").to_vec();
            assert!(apart(&found, &found, r, n) < 1e-5, "not orthonormal");
            for (row, at) in found.chunks_exact(n).zip(&order) {
                let value = gram[at * n + at];
                let along: f64 = (0..n).map(|c| f64::from(row[c]) * vectors[at * n + c]).sum();
                assert!(1.0 - along.abs() < bound, "{decay}: {along}");
                let times = (0..n).map(|i| (0..n).map(|j| whole[i * n + j] * f64::from(row[j])).sum::<f64>());
                let own: f64 = times.zip(row).map(|(w, v)| w * f64::from(*v)).sum();
                assert!((own / value - 1.0).abs() < 1e-2, "{own} for {value}");
            }
        }
    }

    #[test]
    fn few_rows_are_filled_up_and_nan_is_refused() {
        let (kernels, mut rng) = (Kernels::detect(1), Rng::new(4, 4));
        let (t, n, r) = (3, 20, 8);
        let mut x = matrix(t, n, 1.0, &mut rng);
        let mut space = Subspace::new(t, n, r);
        let found = space.leading(&kernels, &x, (t, n), r, &mut rng).expect("finite").to_vec();
        assert!(apart(&found, &found, r, n) < 1e-5);
        // The three rows lie within the first three vectors.
        for row in x.chunks_exact(n) {
            let within: f32 = found[..3 * n].chunks_exact(n).map(|v| dot(v, row).powi(2)).sum();
            assert!((within / dot(row, row) - 1.0).abs() < 1e-3);
        }
        let zeros = vec![0.0; t * n];
        let found = space.leading(&kernels, &zeros, (t, n), r, &mut rng).expect("finite").to_vec();
        assert!(apart(&found, &found, r, n) < 1e-5, "an input of zeros");
        x[7] = f32::NAN;
        assert!(space.leading(&kernels, &x, (t, n), r, &mut rng).is_none());
    }
}
