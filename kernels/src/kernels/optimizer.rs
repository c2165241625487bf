//! The optimizer's step.

use crate::items::AdamWStep;

use super::share::Shared;
use super::{Kernels, Op, RUN};

impl Kernels {
    /// AdamW on all parameters at once.
    pub fn adamw(&self, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], step: &AdamWStep) {
        let _timed = self.timed(Op::Optimizer);
        assert!(p.len() == g.len() && p.len() == m.len() && p.len() == v.len());
        let (ms, vs) = (Shared(m.as_mut_ptr()), Shared(v.as_mut_ptr()));
        self.rows(RUN, p, |i, p| {
            let at = i * RUN..i * RUN + p.len();
            // SAFETY: runs are disjoint, of equal lengths and within the moments; the ISA is present.
            unsafe { (self.table.adamw)(p, &g[at.clone()], ms.part(at.clone()), vs.part(at), step) }
        });
    }

    /// Σ x², in f64, over parts that don't depend on the number of threads.
    pub fn sum_squares(&self, x: &[f32]) -> f64 {
        const PARTS: usize = 64;
        const LANES: usize = 8;
        let _timed = self.timed(Op::Optimizer);
        let mut sums = [0.0f64; PARTS];
        let shared = Shared(sums.as_mut_ptr());
        let len = x.len().div_ceil(PARTS);
        self.pool.run(PARTS, |item, _| {
            let part = &x[x.len().min(item * len)..x.len().min((item + 1) * len)];
            let (whole, rest) = part.as_chunks::<LANES>();
            let mut lanes = [0.0f64; LANES];
            for v in whole {
                for (sum, v) in lanes.iter_mut().zip(v) {
                    *sum += f64::from(*v) * f64::from(*v);
                }
            }
            let rest: f64 = rest.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
            // SAFETY: items own one sum each.
            unsafe { shared.part(item..item + 1)[0] = lanes.iter().sum::<f64>() + rest };
        });
        sums.iter().sum()
    }
}
