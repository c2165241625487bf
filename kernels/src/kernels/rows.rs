//! Norms, rotary embedding, gates, gains and sums, row by row or column by column.

use core::ops::Range;

use crate::scalar;
use crate::view::QMatrix;

use super::share::{Scratch, Shared};
use super::{Kernels, Op, RUN};

/// Columns per item of a sum over rows.
const COLUMNS: usize = 128;

/// Where [`Kernels::gain_bwd`] reads its gradient and writes the result.
pub enum GainGradient<'a> {
    /// dy, overwritten with dz.
    InPlace(&'a mut [f32]),
    /// Separate buffers.
    Apart {
        /// `[m, n]`.
        dy: &'a [f32],
        /// `[m, n]`.
        dz: &'a mut [f32],
    },
}

/// Receives a sum per column.
pub struct ColumnSum<'a> {
    /// `[n]`, added to.
    pub out: &'a mut [f32],
    /// `[n]`: divisors of the sums; where one is zero, nothing is added. `None` divides by one.
    pub by: Option<&'a [f32]>,
}

impl<'a> ColumnSum<'a> {
    fn shared(self, n: usize) -> SharedSum<'a> {
        assert!(self.out.len() == n && self.by.is_none_or(|by| by.len() == n));
        SharedSum(Shared(self.out.as_mut_ptr()), self.by)
    }
}

/// A [`ColumnSum`] shared by the items of one job; each adds to its own columns.
struct SharedSum<'a>(Shared<f32>, Option<&'a [f32]>);

impl SharedSum<'_> {
    /// Adds the sums of some columns.
    ///
    /// # Safety
    /// The columns are among those the sum was made for, and no other item adds to them.
    unsafe fn add(&self, columns: Range<usize>, total: &[f32]) {
        // SAFETY: the caller's contract.
        let out = unsafe { self.0.part(columns.clone()) };
        match self.1 {
            None => out.iter_mut().zip(total).for_each(|(o, t)| *o += t),
            Some(by) => {
                let live = out.iter_mut().zip(total).zip(&by[columns]).filter(|(_, by)| **by != 0.0);
                live.for_each(|((o, t), by)| *o += t / by);
            }
        }
    }
}

impl Kernels {
    /// y[m, d] = rmsnorm(x)·w, row by row.
    pub fn rmsnorm(&self, x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
        let _timed = self.timed(Op::Rows);
        let d = w.len();
        assert!(x.len() == y.len() && x.len().is_multiple_of(d));
        // SAFETY: equal lengths; the ISA is present.
        self.rows(d, y, |r, row| unsafe { (self.table.rmsnorm_row)(&x[r * d..(r + 1) * d], w, eps, row) });
    }

    /// dx += gradient of [`Kernels::rmsnorm`] at x, applied to dy.
    pub fn rmsnorm_bwd(&self, x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
        let _timed = self.timed(Op::Rows);
        let d = w.len();
        assert!(x.len() == dy.len() && x.len() == dx.len() && x.len().is_multiple_of(d));
        self.rows(d, dx, |r, row| {
            let at = r * d..(r + 1) * d;
            // SAFETY: equal lengths; the ISA is present.
            unsafe { (self.table.rmsnorm_bwd_row)(&x[at.clone()], w, eps, &dy[at], row) }
        });
    }

    /// dw += gradient of [`Kernels::rmsnorm`] with respect to its weights, at x and applied to dy.
    pub fn rmsnorm_weight_bwd(&self, x: &[f32], eps: f32, dy: &[f32], dw: &mut [f32]) {
        const ROWS: usize = 256;
        let _timed = self.timed(Op::Rows);
        let d = dw.len();
        assert!(x.len() == dy.len() && x.len().is_multiple_of(d));
        let dw = Shared(dw.as_mut_ptr());
        for (x, dy) in x.chunks(ROWS * d).zip(dy.chunks(ROWS * d)) {
            let mut inv = [0.0f32; ROWS];
            inv.iter_mut().zip(x.chunks_exact(d)).for_each(|(i, x)| *i = scalar::ops::inverse_rms(x, eps));
            let (dw, inv) = (&dw, &inv);
            self.pool.run(d.div_ceil(COLUMNS), |item, _| {
                let columns = item * COLUMNS..d.min((item + 1) * COLUMNS);
                // SAFETY: items own disjoint columns of dw.
                let dw = unsafe { dw.part(columns.clone()) };
                for (t, inv) in inv.iter().enumerate().take(x.len() / d) {
                    let at = t * d + columns.start..t * d + columns.end;
                    let pairs = x[at.clone()].iter().zip(&dy[at]);
                    dw.iter_mut().zip(pairs).for_each(|(w, (x, dy))| *w += dy * x * inv);
                }
            });
        }
    }

    /// Rotates every head of x `[m, heads·hd]`; row r uses `table[pos(r)]`: cosines then sines.
    pub fn rope(
        &self,
        x: &mut [f32],
        heads: usize,
        head_dim: usize,
        cos_sin: &[f32],
        half: usize,
        pos: impl Fn(usize) -> usize + Sync,
        back: bool,
    ) {
        let _timed = self.timed(Op::Rows);
        assert!(2 * half <= head_dim && x.len().is_multiple_of(heads * head_dim));
        let sign = if back { -1.0 } else { 1.0 };
        self.rows(heads * head_dim, x, |r, row| {
            let (cos, sin) = cos_sin[pos(r) * 2 * half..][..2 * half].split_at(half);
            for head in row.chunks_exact_mut(head_dim) {
                // SAFETY: the head has 2·half elements at least; the ISA is present.
                unsafe { (self.table.rope_head)(head, cos, sin, sign) }
            }
        });
    }

    /// h = silu(g)·u.
    pub fn swiglu(&self, g: &[f32], u: &[f32], h: &mut [f32]) {
        let _timed = self.timed(Op::Rows);
        assert!(g.len() == h.len() && u.len() == h.len());
        self.rows(RUN, h, |i, out| {
            let at = i * RUN..i * RUN + out.len();
            // SAFETY: equal lengths; the ISA is present.
            unsafe { (self.table.swiglu)(&g[at.clone()], &u[at], out) }
        });
    }

    /// In place g → dg, u → du of h = silu(g)·u.
    pub fn swiglu_bwd(&self, g: &mut [f32], u: &mut [f32], dh: &[f32]) {
        let _timed = self.timed(Op::Rows);
        assert!(g.len() == dh.len() && u.len() == dh.len());
        let u = Shared(u.as_mut_ptr());
        self.rows(RUN, g, |i, g| {
            let at = i * RUN..i * RUN + g.len();
            // SAFETY: runs are disjoint and of equal lengths; the ISA is present.
            unsafe { (self.table.swiglu_bwd)(g, u.part(at.clone()), &dh[at]) }
        });
    }

    /// [`Kernels::swiglu_bwd`] for `[m, n]` when g and u were multiplied by gains: adds Σ_t dg·g and Σ_t du·u
    /// of each column to the sums, and leaves dg and du multiplied by the gains. Without a gain c is 1.
    pub fn swiglu_bwd_gains(
        &self,
        g: &mut [f32],
        u: &mut [f32],
        dh: &[f32],
        n: usize,
        gains: [Option<(&[f32], ColumnSum<'_>)>; 2],
    ) {
        let _timed = self.timed(Op::Rows);
        assert!(g.len() == dh.len() && u.len() == dh.len() && dh.len().is_multiple_of(n));
        let m = dh.len() / n;
        let (g, u) = (Shared(g.as_mut_ptr()), Shared(u.as_mut_ptr()));
        let gains = gains.map(|gain| gain.map(|(c, sum)| (c, sum.shared(n))));
        assert!(gains.iter().flatten().all(|(c, _)| c.len() == n));
        self.pool.run(n.div_ceil(COLUMNS), |item, _| {
            let columns = item * COLUMNS..n.min((item + 1) * COLUMNS);
            let width = columns.len();
            let ones = [1.0; COLUMNS];
            let c = |i: usize| gains[i].as_ref().map_or(&ones[..width], |(c, _)| &c[columns.clone()]);
            let c = [c(0), c(1)];
            let [mut total_g, mut total_u] = [[0.0f32; COLUMNS]; 2];
            for t in 0..m {
                let at = t * n + columns.start..t * n + columns.end;
                // SAFETY: items own disjoint columns of g and u, whose lengths were checked; all stretches
                // are of one length; the ISA is present.
                unsafe {
                    let (g, u) = (g.part(at.clone()), u.part(at.clone()));
                    (self.table.swiglu_bwd_gains)(
                        g,
                        u,
                        &dh[at],
                        c,
                        [&mut total_g[..width], &mut total_u[..width]],
                    );
                }
            }
            for (gain, total) in gains.iter().zip([total_g, total_u]) {
                if let Some((_, sum)) = gain {
                    // SAFETY: items own disjoint columns.
                    unsafe { sum.add(columns.clone(), &total[..width]) };
                }
            }
        });
    }

    /// Adds Σ_t a·b of each column of `[m, n]` to `sum`.
    pub fn column_dots(&self, a: &[f32], b: &[f32], n: usize, sum: ColumnSum<'_>) {
        let _timed = self.timed(Op::Rows);
        assert!(a.len() == b.len() && a.len().is_multiple_of(n));
        let m = a.len() / n;
        let sum = sum.shared(n);
        self.pool.run(n.div_ceil(COLUMNS), |item, _| {
            let columns = item * COLUMNS..n.min((item + 1) * COLUMNS);
            let mut total = [0.0f32; COLUMNS];
            for t in 0..m {
                let at = t * n + columns.start..t * n + columns.end;
                total.iter_mut().zip(&a[at.clone()]).zip(&b[at]).for_each(|((s, a), b)| *s += a * b);
            }
            // SAFETY: items own disjoint columns.
            unsafe { sum.add(columns.clone(), &total[..columns.len()]) };
        });
    }

    /// Backward through y = before + c∘z `[m, n]` (`before` absent: zero): dz = dy∘c, written to `dz` or,
    /// without one, over dy; adds Σ_t dy·(y − before) of each column to `sum`.
    pub fn gain_bwd(
        &self,
        dy: GainGradient<'_>,
        y: &[f32],
        before: Option<&[f32]>,
        c: &[f32],
        sum: ColumnSum<'_>,
    ) {
        let _timed = self.timed(Op::Rows);
        let (len, n) = (y.len(), c.len());
        let (dy, dz) = match dy {
            GainGradient::InPlace(d) => {
                assert_eq!(d.len(), len);
                let d = d.as_mut_ptr();
                (d.cast_const(), Shared(d))
            }
            GainGradient::Apart { dy, dz } => {
                assert!(dy.len() == len && dz.len() == len);
                (dy.as_ptr(), Shared(dz.as_mut_ptr()))
            }
        };
        assert!(len.is_multiple_of(n) && before.is_none_or(|b| b.len() == len));
        let (dy, sum) = (Shared(dy.cast_mut()), sum.shared(n));
        self.pool.run(n.div_ceil(COLUMNS), |item, _| {
            let columns = item * COLUMNS..n.min((item + 1) * COLUMNS);
            let mut total = [0.0f32; COLUMNS];
            let (dy, dz) = (&dy, &dz);
            for t in 0..len / n {
                let at = t * n + columns.start;
                let before = before.map_or(core::ptr::null(), |b| b[at..].as_ptr());
                // SAFETY: items own disjoint columns of dy and dz, within lengths that were checked; the
                // ISA is present.
                unsafe {
                    let (y, c) = (y[at..].as_ptr(), c[columns.start..].as_ptr());
                    let (dy, dz) = (dy.0.add(at), dz.0.add(at));
                    (self.table.gain_bwd)(columns.len(), dy, (y, before), c, dz, total.as_mut_ptr());
                }
            }
            // SAFETY: items own disjoint columns.
            unsafe { sum.add(columns.clone(), &total[..columns.len()]) };
        });
    }

    /// Euclidean norms of the rows of w, decoded to f32 and summed in f64.
    pub fn row_norms(&self, w: &QMatrix<'_>, scratch: &mut [f32], out: &mut [f32]) {
        const ROWS: usize = 16;
        assert_eq!(out.len(), w.rows());
        let (out, k) = (Shared(out.as_mut_ptr()), w.cols());
        let scratch = Scratch::new(scratch, self.threads(), k);
        self.pool.run(w.rows().div_ceil(ROWS), |item, worker| {
            let rows = item * ROWS..w.rows().min((item + 1) * ROWS);
            let row = &mut scratch.of(worker)[..k];
            // SAFETY: items own disjoint rows of out.
            let out = unsafe { out.part(rows.clone()) };
            for (r, out) in rows.zip(out) {
                self.dequantize_row(w, r, row);
                *out = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt() as f32;
            }
        });
    }

    /// y = x, `[m, d]`, each thread its rows.
    pub fn copy(&self, x: &[f32], d: usize, y: &mut [f32]) {
        let _timed = self.timed(Op::Rows);
        assert_eq!(x.len(), y.len());
        self.rows(d, y, |r, row| row.copy_from_slice(&x[r * d..r * d + row.len()]));
    }

    /// y += a·x.
    pub fn axpy(&self, a: f32, x: &[f32], y: &mut [f32]) {
        let _timed = self.timed(Op::Rows);
        assert_eq!(x.len(), y.len());
        self.rows(RUN, y, |i, y| {
            let x = &x[i * RUN..i * RUN + y.len()];
            // SAFETY: equal lengths; the ISA is present.
            unsafe { (self.table.axpy)(a, x, y) }
        });
    }

    /// Decodes row `r` of w to f32.
    pub fn dequantize_row(&self, w: &QMatrix<'_>, r: usize, out: &mut [f32]) {
        assert_eq!(out.len(), w.cols());
        self.isa.dequantize(w.dtype(), w.row(r), 0, out);
    }
}
