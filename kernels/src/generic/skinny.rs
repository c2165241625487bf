//! Products in which one dimension is the adapter's rank r.

use super::simd::Simd;
use super::tile::{f32_tile, row_pointers};

/// Rows that one item of [`dot_nt`] handles.
pub const DOT_ROWS: usize = 16;

/// h[m, r] = s · x[m, k] · p[r, k]ᵀ for the rows of one item.
///
/// # Safety
/// `x` is `rows × k`, `p` is `r × k`, `h` is `rows × r`; S's features are present.
#[inline(always)]
pub unsafe fn dot_nt<S: Simd, const TR: usize>(
    s: f32,
    x: &[f32],
    rows: usize,
    k: usize,
    p: &[f32],
    r: usize,
    h: &mut [f32],
) {
    const TM: usize = 4;
    // SAFETY: the caller's contract; row indices are clamped to the last row.
    unsafe {
        for m0 in (0..rows).step_by(TM) {
            for r0 in (0..r).step_by(TR) {
                let xp = row_pointers::<f32, TM>(x.as_ptr().add(m0 * k), k, rows - m0);
                let pp = row_pointers::<f32, TR>(p.as_ptr().add(r0 * k), k, r - r0);
                let mut acc = [[S::zero(); TR]; TM];
                let mut i = 0;
                while i + S::LANES <= k {
                    let mut xv = [S::zero(); TM];
                    for m in 0..TM {
                        xv[m] = S::load(xp[m].add(i));
                    }
                    for j in 0..TR {
                        let pv = S::load(pp[j].add(i));
                        for m in 0..TM {
                            acc[m][j] = S::fma(xv[m], pv, acc[m][j]);
                        }
                    }
                    i += S::LANES;
                }
                for m in 0..TM.min(rows - m0) {
                    for j in 0..TR.min(r - r0) {
                        let mut sum = S::sum(acc[m][j]);
                        for t in i..k {
                            sum += *xp[m].add(t) * *pp[j].add(t);
                        }
                        h[(m0 + m) * r + r0 + j] = s * sum;
                    }
                }
            }
        }
    }
}

/// out[r, n] (+)= pᵀ[m, r] · q[m, n] for the columns `n0..n0+cols` of one item.
///
/// # Safety
/// `p` is `m × r`, `q` is `m × n`, `out` covers `r × n`; the item alone writes its columns; S's
/// features are present.
#[inline(always)]
pub unsafe fn outer_tn<S: Simd, const MR: usize, const NV: usize>(
    p: &[f32],
    q: &[f32],
    m: usize,
    r: usize,
    n: usize,
    n0: usize,
    cols: usize,
    out: *mut f32,
    accumulate: bool,
) {
    let nr = NV * S::LANES;
    // SAFETY: the caller's contract.
    unsafe {
        for c in (n0..n0 + cols).step_by(nr) {
            let valid = nr.min(n0 + cols - c);
            for r0 in (0..r).step_by(MR) {
                let rows = MR.min(r - r0);
                if valid == nr {
                    let a = row_pointers::<f32, MR>(p.as_ptr().add(r0), 1, rows);
                    let mut acc = [[S::zero(); NV]; MR];
                    f32_tile::<S, MR, NV>(&mut acc, m, &a, r, q.as_ptr().add(c), n);
                    super::tile::store_tile::<S, MR, NV>(&acc, rows, nr, out.add(r0 * n + c), n, accumulate);
                } else {
                    for j in r0..r0 + rows {
                        for i in c..c + valid {
                            let mut s = 0.0;
                            for t in 0..m {
                                s += p[t * r + j] * q[t * n + i];
                            }
                            let o = out.add(j * n + i);
                            *o = if accumulate { *o + s } else { s };
                        }
                    }
                }
            }
        }
    }
}
