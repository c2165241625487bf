//! Linear algebra shared by several modules: an inner product, and eigenvectors of small symmetric matrices.
//! Every sum is formed in a fixed order.

/// Σ a∘b, in sixteen partial sums that fit one or more vector registers.
#[inline]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// The identity `[k, k]`, the start of Jacobi's method.
pub(crate) fn set_identity(vectors: &mut [f64], k: usize) {
    vectors.iter_mut().enumerate().for_each(|(at, v)| *v = f64::from(u8::from(at / k == at % k)));
}

/// One sweep of Jacobi's method over a symmetric a `[k, k]`. Rotations zero each off-diagonal element a_pq in
/// turn, except where `is_nothing(a_pp, a_qq, a_pq)`. Over the sweeps, eigenvalues move to the diagonal and
/// their vectors to the rows of `vectors`, which starts as [`set_identity`]. Returns the size of the largest
/// rotated element, 0 if there was none (Golub & Van Loan, Matrix Computations, section 8.5).
pub(crate) fn jacobi_sweep(
    a: &mut [f64],
    vectors: &mut [f64],
    k: usize,
    is_nothing: impl Fn(f64, f64, f64) -> bool,
) -> f64 {
    let mut largest = 0.0f64;
    for p in 0..k {
        for q in p + 1..k {
            let (app, aqq, apq) = (a[p * k + p], a[q * k + q], a[p * k + q]);
            if apq == 0.0 || is_nothing(app, aqq, apq) {
                continue;
            }
            largest = largest.max(apq.abs());
            let tau = (aqq - app) / (2.0 * apq);
            let t = if tau == 0.0 { 1.0 } else { tau.signum() / (tau.abs() + (1.0 + tau * tau).sqrt()) };
            let c = 1.0 / (1.0 + t * t).sqrt();
            let s = t * c;
            for i in 0..k {
                rotate(a, (i * k + p, i * k + q), c, s);
            }
            for i in 0..k {
                rotate(a, (p * k + i, q * k + i), c, s);
                rotate(vectors, (p * k + i, q * k + i), c, s);
            }
        }
    }
    largest
}

/// Two elements by a plane rotation.
fn rotate(a: &mut [f64], (i, j): (usize, usize), c: f64, s: f64) {
    let (x, y) = (a[i], a[j]);
    (a[i], a[j]) = (c * x - s * y, s * x + c * y);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn sweeps_lead_to_the_eigenvectors_of_their_definition() {
        let (k, mut rng) = (13, Rng::new(1, 1));
        let mut whole = vec![0.0; k * k];
        for p in 0..k {
            for q in p..k {
                let value = f64::from(rng.normal());
                (whole[p * k + q], whole[q * k + p]) = (value, value);
            }
        }
        let (mut a, mut vectors) = (whole.clone(), vec![0.0; k * k]);
        set_identity(&mut vectors, k);
        let sizes: Vec<f64> =
            (0..8).map(|_| jacobi_sweep(&mut a, &mut vectors, k, |_, _, _| false)).collect();
        assert!(sizes[0] > 1.0 && sizes[7] < 1e-14, "{sizes:?}");
        for (p, v) in vectors.chunks_exact(k).enumerate() {
            for (i, row) in whole.chunks_exact(k).enumerate() {
                let product: f64 = row.iter().zip(v).map(|(a, b)| a * b).sum();
                assert!((product - a[p * k + p] * v[i]).abs() < 1e-12, "{p} {i}");
            }
            let length: f64 = v.iter().map(|v| v * v).sum();
            assert!((length - 1.0).abs() < 1e-12);
        }
        // Negligible elements stay.
        assert_eq!(jacobi_sweep(&mut whole.clone(), &mut vectors, k, |_, _, _| true), 0.0);
    }

    #[test]
    fn an_inner_product_of_any_length_is_that_of_f64() {
        let mut rng = Rng::new(2, 2);
        for n in [0, 1, 15, 16, 17, 100] {
            let mut values = || (0..n).map(|_| rng.normal()).collect::<Vec<f32>>();
            let (a, b) = (values(), values());
            let wanted: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            assert!((f64::from(dot(&a, &b)) - wanted).abs() < 1e-5, "{n}");
        }
    }
}
