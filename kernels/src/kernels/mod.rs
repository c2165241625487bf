//! The safe entry points, one file per kind of operation. Shapes are asserted here once; then the work is split
//! over the pool by outputs.

mod attention;
mod loss;
mod optimizer;
mod products;
mod profile;
mod rows;
mod share;

pub use attention::{AttnShape, attention_scratch_words, cached_attention_scratch_words};
pub use products::{NnOp, NtOp, gemm_scratch_words};
pub use profile::Op;
pub use rows::{ColumnSum, GainGradient};

use profile::{Profile, Timed};
use share::Shared;

use crate::dispatch::{Bf16Table, Isa, Table};
use crate::pool::Pool;

/// Elements per item of elementwise work.
const RUN: usize = 16 * 1024;

/// The kernels of one instruction set on one thread pool.
pub struct Kernels {
    isa: Isa,
    table: &'static Table,
    bf16: Option<&'static Bf16Table>,
    pool: Pool,
    profile: Profile,
}

impl Kernels {
    /// Kernels for the CPU's strongest instruction set on `threads` threads.
    pub fn detect(threads: usize) -> Kernels {
        Kernels::with_isa(Isa::detect(), threads)
    }

    /// Kernels for one available instruction set.
    pub fn with_isa(isa: Isa, threads: usize) -> Kernels {
        Kernels::on(isa, Pool::new(threads))
    }

    fn on(isa: Isa, pool: Pool) -> Kernels {
        Kernels { isa, table: isa.table(), bf16: isa.bf16(), pool, profile: Profile::default() }
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads in use.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Nanoseconds spent per class since these kernels were made or [`Kernels::reset_profile`].
    pub fn profile(&self) -> impl Iterator<Item = (Op, u64)> + '_ {
        self.profile.all()
    }

    /// Resets the profile.
    pub fn reset_profile(&self) {
        self.profile.reset();
    }

    fn timed(&self, op: Op) -> Timed<'_> {
        self.profile.timed(op)
    }

    /// Splits `data` in runs of `len` (the last may be shorter) and calls `f(index, run)` for each.
    pub fn rows(&self, len: usize, data: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync) {
        let total = data.len();
        let items = total.div_ceil(len);
        // Small work costs less than waking the pool.
        if total <= 4096 {
            return data.chunks_mut(len).enumerate().for_each(|(i, run)| f(i, run));
        }
        // Several rows per item, so the cost of taking an item is negligible.
        let per = (4096 / len).clamp(1, 64);
        let data = Shared(data.as_mut_ptr());
        self.pool.run(items.div_ceil(per), |item, _| {
            for i in item * per..items.min((item + 1) * per) {
                // SAFETY: runs are disjoint and within data.
                f(i, unsafe { data.part(i * len..total.min((i + 1) * len)) });
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, NtOp, QMatrix, Rows, gemm_scratch_words};

    /// Products on a pool with fewer threads than requested: each worker must stay in its own part of the
    /// scratch.
    #[test]
    fn products_under_refused_threads_stay_in_their_scratch() {
        let (m, n, k) = (9, 200, 64);
        let values =
            |n: usize, step: usize| (0..n).map(|i| (i * step % 17) as f32 - 8.0).collect::<Vec<f32>>();
        let (x, w) = (values(m * k, 5), values(n * k, 7));
        let bytes: Vec<u8> = w.iter().flat_map(|w| w.to_le_bytes()).collect();
        let w = QMatrix::new(DType::F32, n, k, &bytes).unwrap();
        let product = |kernels: &Kernels| {
            const GUARD: f32 = 1234.5;
            let words = kernels.threads() * gemm_scratch_words(n, k, 0);
            let mut scratch = vec![GUARD; words + 4096];
            let mut y = vec![0.0; m * n];
            let op = NtOp { x: Rows::F32(&x), w, low: None, gain: None, y: &mut y, accumulate: false };
            kernels.qgemm_nt(m, &mut [op], &mut scratch[..words]);
            assert!(
                scratch[words..].iter().all(|word| *word == GUARD),
                "written beyond the caller's scratch"
            );
            y
        };
        let whole = product(&Kernels::with_isa(Isa::SCALAR, 1));
        for refused in 1..4 {
            let pool = || {
                let mut asked = 0;
                Pool::started_by(4, &mut |_, work| {
                    asked += 1;
                    (asked != refused).then(|| std::thread::spawn(work))
                })
            };
            for isa in [Isa::SCALAR, Isa::detect()] {
                let kernels = Kernels::on(isa, pool());
                assert_eq!(kernels.threads(), 3);
                for _ in 0..50 {
                    // Whole numbers: exact in any order.
                    assert_eq!(product(&kernels), whole, "{} with thread {refused} refused", isa.name());
                }
            }
        }
    }
}
