//! Eigenvectors of symmetric matrices, by faer on one thread: the result doesn't depend on how many there are.

use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd_scratch};
use faer::linalg::solvers::SelfAdjointEigen;
use faer::{Mat, MatRef, Side, get_global_parallelism};

/// The eigenvalues of a symmetric matrix in rising order, and their vectors.
pub struct SymmetricEigen {
    values: Vec<f32>,
    vectors: Mat<f32>,
}

impl SymmetricEigen {
    /// f32 words that [`SymmetricEigen::new`] allocates for a matrix `[n, n]`, beside the matrix: eigenvectors twice, their
    /// values, what faer works in, and what its products pack, which was measured to be less than three matrices.
    pub fn words(n: usize) -> usize {
        let (vectors, par) = (ComputeEigenvectors::Yes, get_global_parallelism());
        let work = self_adjoint_evd_scratch::<f32>(n, vectors, par, Default::default());
        5 * n * n + 2 * n + work.unaligned_bytes_required().div_ceil(size_of::<f32>())
    }

    /// Of `a` `[n, n]`, of which one triangle is read; `None` if an element isn't finite or the method doesn't converge.
    ///
    /// # Panics
    /// If `a` has another size.
    pub fn new(a: &[f32], n: usize) -> Option<SymmetricEigen> {
        if !a.iter().all(|v| v.is_finite()) {
            return None;
        }
        let found = SelfAdjointEigen::new(MatRef::from_column_major_slice(a, n, n), Side::Lower).ok()?;
        let values = found.S().column_vector().iter().copied().collect();
        Some(SymmetricEigen { values, vectors: found.U().to_owned() })
    }

    /// The eigenvalues, rising.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Writes `r` mixtures of the first `k` vectors, times `s`, to `out` `[r, n]`; `mix` is `[r, k]`.
    ///
    /// # Panics
    /// If a size doesn't match.
    pub fn mix_first(&self, k: usize, mix: &[f32], r: usize, s: f32, out: &mut [f32]) {
        let n = self.values.len();
        assert!(mix.len() == r * k && out.len() == r * n && k <= n);
        let mixed = self.vectors.subcols(0, k) * MatRef::from_column_major_slice(mix, k, r);
        for (row, column) in out.chunks_exact_mut(n).zip(mixed.col_iter()) {
            row.iter_mut().zip(column.iter()).for_each(|(v, m)| *v = s * m);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_belong_to_their_values() {
        // 2 and 4 along the diagonals of the plane, 9 beside it.
        let a = [3.0, 1.0, 0.0, 1.0, 3.0, 0.0, 0.0, 0.0, 9.0];
        let found = SymmetricEigen::new(&a, 3).expect("finite");
        let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(near(found.values(), &[2.0, 4.0, 9.0]), "{:?}", found.values());
        let mut out = [0.0; 6];
        found.mix_first(2, &[1.0, 0.0, 0.0, 2.0], 2, 3.0, &mut out);
        let half = 0.5f32.sqrt();
        let (first, second) = (out[0].signum(), out[3].signum());
        assert!(near(&out[..3], &[3.0 * half * first, -3.0 * half * first, 0.0]), "{out:?}");
        assert!(near(&out[3..], &[6.0 * half * second, 6.0 * half * second, 0.0]), "{out:?}");
        assert!(SymmetricEigen::new(&[f32::NAN; 9], 3).is_none());
    }
}
