//! The safe entry points.

use core::ops::Range;
use core::slice::from_raw_parts_mut;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::acts::{QuantActs, QuantActsMut};
use crate::block::DType;
use crate::dispatch::{Bf16Table, GainBwd, Isa, SwigluBwdGains, Table};
use crate::generic::adamw::AdamWStep;
use crate::generic::attention::{self, CachedHead, Head, HeadGrad, QUERIES};
use crate::generic::gemm::{self, LowRank, NN_STRIP, NnItem, NtItem, Rows, TN_SCRATCH_WORDS, TnItem};
use crate::generic::rows::SoftmaxState;
use crate::generic::skinny::DOT_ROWS;
use crate::kv::{KV_BLOCK, Kv, KvRows, KvType};
use crate::pool::Pool;
use crate::scalar;
use crate::view::QMatrix;

/// Rows up to which stored blocks are read anew for each row: packing them would cost more.
const GEMV_ROWS: usize = 8;

/// Elements per item of elementwise work.
const RUN: usize = 16 * 1024;

/// The kernels of one instruction set on one thread pool.
pub struct Kernels {
    isa: Isa,
    table: Option<&'static Table>,
    bf16: Option<&'static Bf16Table>,
    pool: Pool,
    profile: Profile,
}

/// The classes of work that are timed apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Forward products of several rows, the adapter's last product in them.
    Forward,
    /// Products of a few rows.
    Gemv,
    /// Input gradients, the adapter's part in them.
    InputGradient,
    /// Weight gradients, in full fine-tuning.
    WeightGradient,
    /// The adapter's own rank-r products.
    RankR,
    /// Quantization of activations.
    Quantize,
    /// Attention, forward and backward.
    Attention,
    /// Norms, rotary embedding, SwiGLU and other row work.
    Rows,
    /// Softmax and cross-entropy over logits.
    CrossEntropy,
    /// The optimizer.
    Optimizer,
}

impl Op {
    /// All classes.
    pub const ALL: [Op; 10] = [
        Op::Forward,
        Op::Gemv,
        Op::InputGradient,
        Op::WeightGradient,
        Op::RankR,
        Op::Quantize,
        Op::Attention,
        Op::Rows,
        Op::CrossEntropy,
        Op::Optimizer,
    ];
}

/// Nanoseconds per class, as seen by the calling thread.
#[derive(Default)]
struct Profile([AtomicU64; Op::ALL.len()]);

/// Adds the time it lives to a class.
struct Timed<'a>(&'a AtomicU64, Instant);

impl Drop for Timed<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(self.1.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }
}

/// One forward product: y[m, n] (+)= c∘(x · Wᵀ (+ h·b)).
pub struct NtOp<'a> {
    /// `[m, k]`.
    pub x: Rows<'a>,
    /// `[n, k]`.
    pub w: QMatrix<'a>,
    /// Adds h `[m, r]` · b `[r, n]`.
    pub low: Option<LowRank<'a>>,
    /// `[n]`: what each column of the sum is multiplied by, before it is added to y.
    pub gain: Option<&'a [f32]>,
    /// `[m, n]`.
    pub y: &'a mut [f32],
    /// Adds to y instead of overwriting it.
    pub accumulate: bool,
}

/// One summand of an input gradient: dy · W (+ h·b).
#[derive(Clone, Copy)]
pub struct NnOp<'a> {
    /// `[m, n]`; int8 where n and k are multiples of 32.
    pub dy: Rows<'a>,
    /// `[n, k]`.
    pub w: QMatrix<'a>,
    /// Adds h `[m, r]` · b `[r, k]`.
    pub low: Option<LowRank<'a>>,
}

/// Shape of an attention over one sequence.
#[derive(Clone, Copy, Debug)]
pub struct AttnShape {
    /// Query rows.
    pub t: usize,
    /// Cached keys before them.
    pub past: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads.
    pub n_kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
}

/// f32 words of scratch per thread for the products with weights `[n, k]` and rank `rank`, forward, to the
/// input and to the weights.
pub fn gemm_scratch_words(n: usize, k: usize, rank: usize) -> usize {
    gemm::nt_scratch_words(k, rank).max(gemm::nn_scratch_words(n, rank)).max(TN_SCRATCH_WORDS)
}

/// f32 words of scratch per thread for attention over `keys` keys.
pub fn attention_scratch_words(keys: usize, head_dim: usize, backward: bool) -> usize {
    attention::scratch_words(keys, head_dim, backward)
}

/// f32 words of scratch per thread for [`Kernels::attention_cached`] over `keys` keys.
pub fn cached_attention_scratch_words(keys: usize, head_dim: usize) -> usize {
    attention::scratch_words(keys, head_dim, false) + 2 * keys * head_dim
}

/// Columns that one item of a sum over rows takes.
const COLUMNS: usize = 128;

/// Where the gradient that [`Kernels::gain_bwd`] takes lies, and where it goes.
pub enum GainGradient<'a> {
    /// dy, over which dz is written.
    InPlace(&'a mut [f32]),
    /// Both apart.
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
    /// `[n]`: what the sums are divided by; where it is zero, nothing is added. Absent, it is one.
    pub by: Option<&'a [f32]>,
}

impl<'a> ColumnSum<'a> {
    fn shared(self, n: usize) -> SharedSum<'a> {
        assert!(self.out.len() == n && self.by.is_none_or(|by| by.len() == n));
        SharedSum(Shared(self.out.as_mut_ptr()), self.by)
    }
}

/// A [`ColumnSum`] that items of one job share; each adds to its own columns.
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

/// A pointer that items of one job share; each writes its own part.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);
// SAFETY: only handed to items that write disjoint parts, as each use below states.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The part `range` of the shared slice.
    ///
    /// # Safety
    /// The range lies within the slice and no other item uses it meanwhile.
    #[allow(clippy::mut_from_ref, reason = "disjointness is the caller's contract")]
    unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        // SAFETY: the caller's contract.
        unsafe { from_raw_parts_mut(self.0.add(range.start), range.len()) }
    }
}

/// Each worker's own stretch of the caller's scratch.
struct Scratch(Shared<f32>, usize);

impl Scratch {
    fn new(words: &mut [f32], threads: usize, needed: usize) -> Scratch {
        let each = words.len() / threads;
        assert!(each >= needed, "scratch of {each} words per thread, {needed} needed");
        Scratch(Shared(words.as_mut_ptr()), each)
    }

    #[allow(clippy::mut_from_ref, reason = "each worker asks for its own stretch only")]
    fn of(&self, worker: usize) -> &mut [f32] {
        // SAFETY: `new` split the exclusive borrow evenly over the pool's threads, a worker runs one
        // item at a time, and each item asks once.
        unsafe { self.0.part(worker * self.1..(worker + 1) * self.1) }
    }
}

impl Kernels {
    /// Kernels for the CPU's strongest instruction set on `threads` threads.
    pub fn detect(threads: usize) -> Kernels {
        Kernels::with_isa(Isa::detect(), threads)
    }

    /// Kernels for one available instruction set.
    pub fn with_isa(isa: Isa, threads: usize) -> Kernels {
        let (table, bf16) = (isa.table(), isa.bf16());
        Kernels { isa, table, bf16, pool: Pool::new(threads), profile: Profile::default() }
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
        Op::ALL.into_iter().map(|op| (op, self.profile.0[op as usize].load(Ordering::Relaxed)))
    }

    /// Starts the profile anew.
    pub fn reset_profile(&self) {
        self.profile.0.iter().for_each(|t| t.store(0, Ordering::Relaxed));
    }

    fn timed(&self, op: Op) -> Timed<'_> {
        Timed(&self.profile.0[op as usize], Instant::now())
    }

    /// Quantizes x `[m, k]` to int8 into `words` (at least `acts_words(m, k)`), for [`Kernels::qgemm_nt`].
    /// `halves` where any of the weights has groups of 16 (see [`DType::group_len`]).
    pub fn quantize<'a>(
        &self,
        x: &[f32],
        m: usize,
        k: usize,
        halves: bool,
        words: &'a mut [f32],
    ) -> QuantActs<'a> {
        let tile = self.table.map_or(1, |t| if m <= GEMV_ROWS { 1 } else { t.act_tile });
        self.quantize_tiles(x, m, k, tile, halves, words)
    }

    /// The same of a gradient, for [`Kernels::qgemm_nn`]; or of a few rows x, for one [`Kernels::qgemm_nt`]
    /// with weights of groups of 32 that is to go through the tiles all the same.
    pub fn quantize_gradient<'a>(
        &self,
        x: &[f32],
        m: usize,
        k: usize,
        words: &'a mut [f32],
    ) -> QuantActs<'a> {
        self.quantize_tiles(x, m, k, self.table.map_or(1, |t| t.act_tile), false, words)
    }

    fn quantize_tiles<'a>(
        &self,
        x: &[f32],
        m: usize,
        k: usize,
        tile: usize,
        halves: bool,
        words: &'a mut [f32],
    ) -> QuantActs<'a> {
        let _timed = self.timed(Op::Quantize);
        assert_eq!(x.len(), m * k);
        let mut acts = QuantActsMut::new(words, m, k, tile, halves);
        let Some(t) = self.table else {
            scalar::ops::quantize_row(x, acts.codes, acts.scale);
            fill_sums(&mut acts);
            return acts.freeze();
        };
        let target = Shared(&mut acts.target());
        // Several rows an item, so that taking an item costs little beside it.
        let per = (4096 / k).clamp(1, 64);
        self.pool.run(m.div_ceil(per), |item, _| {
            let target = &target;
            for r in item * per..m.min((item + 1) * per) {
                // SAFETY: the ISA is present; row r is within the storage and this item's alone.
                unsafe { (t.quantize_row)(&x[r * k..(r + 1) * k], halves, (*target.0).row(r, k)) }
            }
        });
        acts.freeze()
    }

    /// Runs forward products of m rows; all of them share the pool at once.
    pub fn qgemm_nt(&self, m: usize, ops: &mut [NtOp<'_>], scratch: &mut [f32]) {
        let _timed = self.timed(if m <= GEMV_ROWS { Op::Gemv } else { Op::Forward });
        let Some(t) = self.table else {
            return ops.iter_mut().for_each(|op| scalar_nt(m, op));
        };
        let few = |op: &NtOp<'_>| m <= GEMV_ROWS && reads_stored(op);
        let mut starts = [0usize; 9];
        let mut needed = 0;
        assert!(ops.len() < starts.len());
        for (i, op) in ops.iter().enumerate() {
            check_nt(m, op);
            assert_tile(&op.x, if few(op) { 1 } else { t.act_tile });
            starts[i + 1] = starts[i] + if few(op) { 0 } else { op.w.rows().div_ceil(t.nt_strip) };
            needed = needed.max(gemm::nt_scratch_words(op.w.cols(), op.low.map_or(0, |l| l.rank)));
        }
        if ops.iter().any(few) {
            self.gemv(t, m, ops);
        }
        if starts[ops.len()] == 0 {
            return;
        }
        let scratch = Scratch::new(scratch, self.threads(), needed);
        let total = starts[ops.len()];
        let ys: [Shared<f32>; 8] = core::array::from_fn(|i| {
            Shared(ops.get_mut(i).map_or(core::ptr::null_mut(), |o| o.y.as_mut_ptr()))
        });
        let ops = &*ops;
        self.pool.run(total, |item, worker| {
            let which = (0..ops.len()).find(|i| item < starts[*i + 1]).unwrap_or(0);
            let op = &ops[which];
            let y = &ys[which];
            let it = NtItem {
                m,
                x: op.x,
                w: op.w,
                low: op.low,
                gain: op.gain,
                y: y.0,
                accumulate: op.accumulate,
                unpack: t.unpack,
                strip: t.strip,
                dequant: t.dequant,
            };
            // SAFETY: shapes were checked, items own disjoint strips of y, the scratch is this
            // worker's, and the ISA is present.
            unsafe { (t.nt_item)(&it, (item - starts[which]) * t.nt_strip, scratch.of(worker)) }
        });
    }

    /// Products of a few rows on the stored values. Each thread reads one contiguous part of all weights, since
    /// memory is fastest in long streams.
    fn gemv(&self, t: &Table, m: usize, ops: &mut [NtOp<'_>]) {
        let rows = |op: &NtOp<'_>| if reads_stored(op) { op.w.rows() } else { 0 };
        let total: usize = ops.iter().map(rows).sum();
        let part = total.div_ceil(self.threads());
        let ys: [Shared<f32>; 8] = core::array::from_fn(|i| {
            Shared(ops.get_mut(i).map_or(core::ptr::null_mut(), |o| o.y.as_mut_ptr()))
        });
        let ops = &*ops;
        self.pool.run(total.div_ceil(part), |item, _| {
            let mut first = 0;
            for (op, y) in ops.iter().zip(&ys) {
                let n = rows(op);
                // Cut at whole vectors, so that no row's rounding depends on the number of threads.
                let cut = |at: usize| at.saturating_sub(first).next_multiple_of(16).min(n);
                let (from, to) = (cut(item * part), cut((item + 1) * part));
                // SAFETY: shapes were checked by the caller; items own disjoint columns of each y.
                unsafe { gemv_rows(t, m, op, y, from..to) };
                first += n;
            }
        });
    }

    /// Whether the input gradient through w can be computed with int8 dy, and is faster so.
    pub fn int8_gradient(&self, w: &QMatrix<'_>) -> bool {
        self.table.is_some_and(|t| t.int8_gradient)
            && w.rows().is_multiple_of(32)
            && w.cols().is_multiple_of(32)
    }

    /// Whether the input gradient through w can be computed with bf16 dy.
    pub fn bf16_gradient(&self, w: &QMatrix<'_>) -> bool {
        self.bf16.is_some() && w.rows().is_multiple_of(32) && w.cols().is_multiple_of(32)
    }

    /// Rounds a gradient x `[m, k]` to bf16 into `words` (at least `acts_words(m, k)`), for
    /// [`Kernels::qgemm_nn`]; k is a multiple of 32. On CPUs without bf16 products only the scalar
    /// specification reads it.
    pub fn round_gradient<'a>(&self, x: &[f32], m: usize, k: usize, words: &'a mut [f32]) -> &'a [u16] {
        let _timed = self.timed(Op::Quantize);
        assert!(x.len() == m * k && k.is_multiple_of(32) && 2 * words.len() >= m * k);
        // SAFETY: any bits are two u16, whose alignment is less; the borrow passes to the result.
        let out = unsafe { from_raw_parts_mut(words.as_mut_ptr().cast::<u16>(), m * k) };
        let to = Shared(out.as_mut_ptr());
        let per = (4096 / k).clamp(1, 64);
        self.pool.run(m.div_ceil(per), |item, _| {
            let range = item * per * k..m.min((item + 1) * per) * k;
            // SAFETY: items own disjoint rows.
            let out = unsafe { to.part(range.clone()) };
            match self.bf16 {
                // SAFETY: the ISA is present; the stretch has whole rows of a multiple of 32.
                Some(t) => unsafe { (t.round_row)(&x[range], out.as_mut_ptr()) },
                None => scalar::ops::round_bf16(&x[range], out),
            }
        });
        out
    }

    /// dx[m, k] (+)= Σ over `ops` of dy·W (+ h·b).
    pub fn qgemm_nn(
        &self,
        m: usize,
        ops: &[NnOp<'_>],
        dx: &mut [f32],
        accumulate: bool,
        scratch: &mut [f32],
    ) {
        let _timed = self.timed(Op::InputGradient);
        let Some(first) = ops.first() else { return };
        let k = first.w.cols();
        assert_eq!(dx.len(), m * k);
        for op in ops {
            assert_eq!(op.w.cols(), k);
            check_rows(&op.dy, m, op.w.rows());
            check_low(m, k, op.low);
            let whole = op.w.rows().is_multiple_of(32) && k.is_multiple_of(32);
            assert!(whole || matches!(op.dy, Rows::F32(_)), "rounded gradients need whole blocks of 32");
        }
        let Some(t) = self.table else {
            for (i, op) in ops.iter().enumerate() {
                match op.dy {
                    Rows::F32(dy) => scalar::ops::qgemm_nn(dy, m, &op.w, dx, accumulate || i > 0),
                    Rows::Int8(dy) => scalar::ops::qgemm_nn_int8(&dy, m, &op.w, dx, accumulate || i > 0),
                    Rows::Bf16(dy) => scalar::ops::qgemm_nn_bf16(dy, m, &op.w, dx, accumulate || i > 0),
                }
                if let Some(l) = op.low {
                    scalar::ops::add_low_rank(l.h, m, l.b, l.rank, k, dx);
                }
            }
            return;
        };
        for op in ops {
            assert_tile(&op.dy, t.act_tile);
            let runs = self.bf16.is_some() || !matches!(op.dy, Rows::Bf16(_));
            assert!(runs, "this CPU has no bf16 products: see `bf16_gradient`");
        }
        let rank = ops.iter().map(|o| o.low.map_or(0, |l| l.rank)).max().unwrap_or(0);
        let n = ops.iter().map(|o| o.w.rows()).max().unwrap_or(0);
        let scratch = Scratch::new(scratch, self.threads(), gemm::nn_scratch_words(n, rank));
        let out = Shared(dx.as_mut_ptr());
        self.pool.run(k.div_ceil(NN_STRIP), |item, worker| {
            let out = &out;
            for (i, op) in ops.iter().enumerate() {
                let it = NnItem {
                    m,
                    dy: op.dy,
                    w: op.w,
                    low: op.low,
                    dx: out.0,
                    accumulate: accumulate || i > 0,
                    strip: t.strip,
                    dequant: t.dequant,
                };
                // SAFETY: as in `qgemm_nt`: this item owns its strip of dx for all summands.
                unsafe {
                    match (op.dy, self.bf16) {
                        (Rows::Bf16(dy), Some(t)) => {
                            (t.nn_item)(&it, dy, item * NN_STRIP, scratch.of(worker));
                        }
                        _ => (t.nn_item)(&it, item * NN_STRIP, scratch.of(worker)),
                    }
                }
            }
        });
    }

    /// dw[n, k] (+)= dy[m, n]ᵀ · x[m, k], all f32.
    pub fn gemm_tn(
        &self,
        dy: &[f32],
        x: &[f32],
        m: usize,
        dw: &mut [f32],
        accumulate: bool,
        scratch: &mut [f32],
    ) {
        let _timed = self.timed(Op::WeightGradient);
        let (n, k) = (dy.len() / m, x.len() / m);
        assert!(dy.len() == m * n && x.len() == m * k && dw.len() == n * k);
        let Some(t) = self.table else {
            return scalar::ops::gemm_tn(dy, x, m, n, k, dw, accumulate);
        };
        let scratch = Scratch::new(scratch, self.threads(), TN_SCRATCH_WORDS);
        let out = Shared(dw.as_mut_ptr());
        self.pool.run(k.div_ceil(t.nt_strip), |item, worker| {
            let out = &out;
            let it = TnItem { m, n, k, dy, x, dw: out.0, accumulate };
            // SAFETY: shapes were checked, items own disjoint strips of dw, the scratch is this worker's,
            // and the ISA is present.
            unsafe { (t.tn_item)(&it, item * t.nt_strip, scratch.of(worker)) }
        });
    }

    /// h[m, r] = s · x[m, k] · p[r, k]ᵀ.
    pub fn skinny_nt(&self, s: f32, x: &[f32], m: usize, k: usize, p: &[f32], r: usize, h: &mut [f32]) {
        let _timed = self.timed(Op::RankR);
        assert!(x.len() == m * k && p.len() == r * k && h.len() == m * r);
        let Some(t) = self.table else {
            return scalar::ops::skinny_nt(s, x, m, k, p, r, h);
        };
        let h = Shared(h.as_mut_ptr());
        self.pool.run(m.div_ceil(DOT_ROWS), |item, _| {
            let rows = item * DOT_ROWS..m.min((item + 1) * DOT_ROWS);
            // SAFETY: items own disjoint rows of h; shapes were checked; the ISA is present.
            unsafe {
                let out = h.part(rows.start * r..rows.end * r);
                (t.dot_nt)(s, &x[rows.start * k..rows.end * k], rows.len(), k, p, r, out);
            }
        });
    }

    /// out[r, n] (+)= p[m, r]ᵀ · q[m, n].
    pub fn skinny_tn(
        &self,
        p: &[f32],
        q: &[f32],
        m: usize,
        r: usize,
        n: usize,
        out: &mut [f32],
        accumulate: bool,
    ) {
        let _timed = self.timed(Op::RankR);
        assert!(p.len() == m * r && q.len() == m * n && out.len() == r * n);
        let Some(t) = self.table else {
            return scalar::ops::skinny_tn(p, q, m, r, n, out, accumulate);
        };
        const COLS: usize = 64;
        let out = Shared(out.as_mut_ptr());
        self.pool.run(n.div_ceil(COLS), |item, _| {
            let out = &out;
            let n0 = item * COLS;
            // SAFETY: items own disjoint columns of out; shapes were checked; the ISA is present.
            unsafe { (t.outer_tn)(p, q, m, r, n, n0, COLS.min(n - n0), out.0, accumulate) }
        });
    }

    /// y[m, d] = rmsnorm(x)·w, row by row.
    pub fn rmsnorm(&self, x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
        let _timed = self.timed(Op::Rows);
        let d = w.len();
        assert!(x.len() == y.len() && x.len().is_multiple_of(d));
        let f = self.table.map(|t| t.rmsnorm_row);
        self.rows(d, y, |r, row| match f {
            // SAFETY: equal lengths; the ISA is present.
            Some(f) => unsafe { f(&x[r * d..(r + 1) * d], w, eps, row) },
            None => scalar::ops::rmsnorm_row(&x[r * d..(r + 1) * d], w, eps, row),
        });
    }

    /// dx += gradient of [`Kernels::rmsnorm`] at x, applied to dy.
    pub fn rmsnorm_bwd(&self, x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
        let _timed = self.timed(Op::Rows);
        let d = w.len();
        assert!(x.len() == dy.len() && x.len() == dx.len() && x.len().is_multiple_of(d));
        let f = self.table.map(|t| t.rmsnorm_bwd_row);
        self.rows(d, dx, |r, row| {
            let at = r * d..(r + 1) * d;
            match f {
                // SAFETY: equal lengths; the ISA is present.
                Some(f) => unsafe { f(&x[at.clone()], w, eps, &dy[at], row) },
                None => scalar::ops::rmsnorm_bwd_row(&x[at.clone()], w, eps, &dy[at], row),
            }
        });
    }

    /// dw += gradient of [`Kernels::rmsnorm`] with respect to its weights, at x and applied to dy.
    pub fn rmsnorm_weight_bwd(&self, x: &[f32], eps: f32, dy: &[f32], dw: &mut [f32]) {
        const ROWS: usize = 256;
        let _timed = self.timed(Op::Rows);
        let d = dw.len();
        assert!(x.len() == dy.len() && x.len().is_multiple_of(d));
        if self.table.is_none() {
            let rows = x.chunks_exact(d).zip(dy.chunks_exact(d));
            return rows.for_each(|(x, dy)| scalar::ops::rmsnorm_weight_bwd_row(x, eps, dy, dw));
        }
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

    /// Σ x², in f64, of parts that do not depend on the number of threads.
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
        let f = self.table.map(|t| t.rope_head);
        let sign = if back { -1.0 } else { 1.0 };
        self.rows(heads * head_dim, x, |r, row| {
            let (cos, sin) = cos_sin[pos(r) * 2 * half..][..2 * half].split_at(half);
            for head in row.chunks_exact_mut(head_dim) {
                match f {
                    // SAFETY: the head has 2·half elements at least; the ISA is present.
                    Some(f) => unsafe { f(head, cos, sin, sign) },
                    None => scalar::ops::rope_head(head, cos, sin, sign),
                }
            }
        });
    }

    /// h = silu(g)·u.
    pub fn swiglu(&self, g: &[f32], u: &[f32], h: &mut [f32]) {
        let _timed = self.timed(Op::Rows);
        assert!(g.len() == h.len() && u.len() == h.len());
        let f = self.table.map(|t| t.swiglu);
        self.rows(RUN, h, |i, out| {
            let at = i * RUN..i * RUN + out.len();
            match f {
                // SAFETY: equal lengths; the ISA is present.
                Some(f) => unsafe { f(&g[at.clone()], &u[at], out) },
                None => scalar::ops::swiglu(&g[at.clone()], &u[at], out),
            }
        });
    }

    /// In place g → dg, u → du of h = silu(g)·u.
    pub fn swiglu_bwd(&self, g: &mut [f32], u: &mut [f32], dh: &[f32]) {
        let _timed = self.timed(Op::Rows);
        assert!(g.len() == dh.len() && u.len() == dh.len());
        let f = self.table.map(|t| t.swiglu_bwd);
        let u = Shared(u.as_mut_ptr());
        self.rows(RUN, g, |i, g| {
            let at = i * RUN..i * RUN + g.len();
            // SAFETY: runs are disjoint and of equal lengths.
            let u = unsafe { u.part(at.clone()) };
            match f {
                // SAFETY: equal lengths; the ISA is present.
                Some(f) => unsafe { f(g, u, &dh[at]) },
                None => scalar::ops::swiglu_bwd(g, u, &dh[at]),
            }
        });
    }

    /// [`Kernels::swiglu_bwd`] of `[m, n]` where g and u were multiplied by gains: adds Σ_t dg·g and Σ_t du·u
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
        let f = self.table.map_or(scalar::ops::swiglu_bwd_gains as SwigluBwdGains, |t| t.swiglu_bwd_gains);
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
                    f(g, u, &dh[at], c, [&mut total_g[..width], &mut total_u[..width]]);
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

    /// Backward through y = before + c∘z `[m, n]` (`before` absent: zero): dz = dy∘c, written to `dz` or, where
    /// that is absent, over dy; adds Σ_t dy·(y − before) of each column to `sum`.
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
        let f = self.table.map_or(scalar::ops::gain_bwd as GainBwd, |t| t.gain_bwd);
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
                    f(columns.len(), dy, (y, before), c, dz, total.as_mut_ptr());
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
        let f = self.table.map(|t| t.axpy);
        self.rows(RUN, y, |i, y| {
            let x = &x[i * RUN..i * RUN + y.len()];
            match f {
                // SAFETY: equal lengths; the ISA is present.
                Some(f) => unsafe { f(a, x, y) },
                None => y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x),
            }
        });
    }

    /// Folds the logits `[m, chunk]` of vocabulary rows `first_id..` into each row's running softmax.
    ///
    /// Logits become e^(logit − max). Where the running maximum grew, row r of `dx` (if any) is
    /// rescaled to it.
    pub fn ce_chunk(
        &self,
        logits: &mut [f32],
        chunk: usize,
        first_id: usize,
        targets: &[u32],
        state: &mut [SoftmaxState],
        dx: Option<&mut [f32]>,
    ) {
        let _timed = self.timed(Op::CrossEntropy);
        let m = targets.len();
        assert!(logits.len() == m * chunk && state.len() == m);
        let d = dx.as_ref().map_or(0, |x| x.len() / m.max(1));
        let dx = dx.map(|x| Shared(x.as_mut_ptr()));
        let state = Shared(state.as_mut_ptr());
        self.rows(chunk, logits, |r, row| {
            // SAFETY: row r of state and dx is this item's alone.
            let (st, dx) =
                unsafe { (&mut state.part(r..r + 1)[0], dx.as_ref().map(|x| x.part(r * d..(r + 1) * d))) };
            let factor = match self.table {
                // SAFETY: the ISA is present.
                Some(t) => unsafe { (t.ce_chunk_row)(row, first_id, targets[r] as usize, st) },
                None => scalar::ops::ce_chunk_row(row, first_id, targets[r] as usize, st),
            };
            match (dx, self.table) {
                (Some(dx), _) if factor == 1.0 || dx.is_empty() => {}
                // SAFETY: the ISA is present.
                (Some(dx), Some(t)) => unsafe { (t.scale)(factor, dx) },
                (Some(dx), None) => dx.iter_mut().for_each(|v| *v *= factor),
                (None, _) => {}
            }
        });
    }

    /// Causal attention of one sequence: o `[t, heads·hd]` from q alike and k, v `[past + t, kv·hd]`.
    ///
    /// `lse` `[heads, t]`, if any, receives the log-sum-exp that the backward needs.
    pub fn attention(
        &self,
        s: AttnShape,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        o: &mut [f32],
        lse: Option<&mut [f32]>,
        scratch: &mut [f32],
    ) {
        let _timed = self.timed(Op::Attention);
        self.check_attention(&s, q, k, v, o);
        let keys = s.past + s.t;
        if let Some(l) = &lse {
            assert_eq!(l.len(), s.n_heads * s.t);
        }
        let Some(t) = self.table else {
            return scalar_attention(&s, q, k, v, o, lse);
        };
        let lse = Shared(lse.map_or(core::ptr::null_mut(), |l| l.as_mut_ptr()));
        let o = Shared(o.as_mut_ptr());
        let needed = attention::scratch_words(keys, s.head_dim, false);
        let scratch = Scratch::new(scratch, self.threads(), needed);
        self.pool.run(s.n_heads, |i, worker| {
            let (o, lse) = (&o, &lse);
            let mut h = head(&s, i, q, k, v, o.0);
            if !lse.0.is_null() {
                // SAFETY: lse has n_heads·t elements.
                h.lse = unsafe { lse.0.add(i * s.t) };
            }
            let scratch = scratch.of(worker);
            // SAFETY: shapes were checked, head i writes its own columns and lse, the ISA is present.
            unsafe { (t.attention)(&h, scratch) }
        });
    }

    /// Causal attention of the `t` newest rows over a cache in two parts, which holds them too at its end:
    /// o `[t, heads·hd]` from q alike and `past + t` keys and values in all.
    pub fn attention_cached(
        &self,
        s: AttnShape,
        q: &[f32],
        prefix: KvRows<'_>,
        own: KvRows<'_>,
        o: &mut [f32],
        scratch: &mut [f32],
    ) {
        if s.t == 1 {
            let s = AttnShape { past: prefix.positions(s.n_kv_heads * s.head_dim), ..s };
            return self.attention_batched(s, q, prefix, |_| own, o, scratch);
        }
        let (hd, keys, row) = (s.head_dim, s.past + s.t, s.n_kv_heads * s.head_dim);
        check_cached(&s, q, o, prefix, own);
        assert_eq!(prefix.positions(row) + own.positions(row), keys);
        let Some(table) = self.table else {
            let (k, v) = (all_of(prefix.k, own.k), all_of(prefix.v, own.v));
            return scalar_attention(&s, q, &k, &v, o, None);
        };
        let _timed = self.timed(Op::Attention);
        let scratch = Scratch::new(scratch, self.threads(), cached_attention_scratch_words(keys, hd));
        let o = Shared(o.as_mut_ptr());
        self.pool.run(s.n_heads, |i, worker| {
            let (o, first) = (&o, i / (s.n_heads / s.n_kv_heads) * hd);
            let (kf, rest) = scratch.of(worker).split_at_mut(keys * hd);
            let (vf, rest) = rest.split_at_mut(keys * hd);
            let (prefix, own) = (prefix.head(first, row), own.head(first, row));
            let at = prefix.rows * hd;
            // SAFETY: shapes were checked, head i writes its own columns of o, the ISA is present.
            unsafe {
                (table.kv_expand)(&prefix.k, prefix.rows, hd, &mut kf[..at]);
                (table.kv_expand)(&prefix.v, prefix.rows, hd, &mut vf[..at]);
                (table.kv_expand)(&own.k, own.rows, hd, &mut kf[at..]);
                (table.kv_expand)(&own.v, own.rows, hd, &mut vf[at..]);
                let (q, q_row, o) = (q[i * hd..].as_ptr(), s.n_heads * hd, o.0.add(i * hd));
                let (k, v, scale) = (kf.as_ptr(), vf.as_ptr(), 1.0 / libm::sqrtf(hd as f32));
                let (t, past, lse) = (s.t, s.past, core::ptr::null_mut());
                (table.attention)(&Head { t, past, hd, scale, q, q_row, k, v, kv_row: hd, o, lse }, rest);
            }
        });
    }

    /// Attention of `t` sequences that begin with the same positions: row r of q `[t, heads·hd]` sees the
    /// `past` keys of `prefix` and those of `own(r)`, at whose end its own are; o is shaped as q.
    ///
    /// A row's result does not depend on the other rows, nor on where its positions are parted.
    pub fn attention_batched<'a>(
        &self,
        s: AttnShape,
        q: &[f32],
        prefix: KvRows<'_>,
        own: impl Fn(usize) -> KvRows<'a> + Sync,
        o: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (hd, row) = (s.head_dim, s.n_kv_heads * s.head_dim);
        assert!(s.t > 0);
        let (ty, mut longest) = (own(0).ty(), 0);
        for own in (0..s.t).map(&own) {
            check_cached(&s, q, o, prefix, own);
            assert!(own.ty() == ty && !own.k.is_empty(), "a row sees itself at least");
            longest = longest.max(own.positions(row));
        }
        assert_eq!(prefix.positions(row), s.past);
        let (Some(table), width) = (self.table, s.n_heads * hd) else {
            return scalar_batched(&s, q, prefix, own, o);
        };
        let _timed = self.timed(Op::Attention);
        let scratch = Scratch::new(scratch, self.threads(), QUERIES * (s.past + longest));
        let o = Shared(o.as_mut_ptr());
        // An item is a few queries of one kv head, which read the prefix together, and those of one head lie
        // side by side: its rows of the prefix stay in the cache of the thread that reads them.
        let group = s.n_heads / s.n_kv_heads;
        let (queries, scale) = (s.t * group, 1.0 / libm::sqrtf(hd as f32));
        let per = if s.past > 0 && queries >= QUERIES { QUERIES } else { 1 };
        let items = queries.div_ceil(per);
        self.pool.run(s.n_kv_heads * items, |item, worker| {
            let (o, kv, from) = (&o, item / items, item % items * per);
            let prefix = prefix.head(kv * hd, row);
            let query = |i: usize| {
                let i = (from + i).min(queries - 1);
                let (r, at) = (i / group, i / group * width + (kv * group + i % group) * hd);
                let own = own(r);
                assert!(own.ty() == ty, "the sequences' caches are of one type");
                // The offset lies within o, which is as long as q.
                let (q, o) = (q[at..].as_ptr(), o.0.wrapping_add(at));
                CachedHead { hd, scale, q, prefix, own: own.head(kv * hd, row), o }
            };
            let heads: [CachedHead; QUERIES] = core::array::from_fn(query);
            // SAFETY: shapes were checked, each query writes its own row's columns of o, the ISA is present.
            unsafe { (table.attention_decode)(&heads[..per.min(queries - from)], scratch.of(worker)) }
        });
    }

    /// Gradients of [`Kernels::attention`] (with `past == 0`): dq `[t, heads·hd]`, dk and dv
    /// `[t, kv·hd]`, from d_o and the forward's o and lse. `per_head` holds `2·heads·t·hd` words.
    pub fn attention_bwd(
        &self,
        s: AttnShape,
        (q, k, v): (&[f32], &[f32], &[f32]),
        (o, lse, d_o): (&[f32], &[f32], &[f32]),
        (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
        per_head: &mut [f32],
        scratch: &mut [f32],
    ) {
        let _timed = self.timed(Op::Attention);
        self.check_attention(&s, q, k, v, o);
        let (t, hd) = (s.t, s.head_dim);
        assert!(s.past == 0 && d_o.len() == o.len() && dq.len() == q.len());
        assert!(dk.len() == k.len() && dv.len() == v.len() && lse.len() == s.n_heads * t);
        assert!(per_head.len() >= 2 * s.n_heads * t * hd);
        let Some(table) = self.table else {
            scalar_attention_bwd(&s, (q, k, v), (o, lse, d_o), dq, per_head);
            self.sum_heads(&s, per_head, 0, dk);
            return self.sum_heads(&s, per_head, 1, dv);
        };
        let needed = attention::scratch_words(t, hd, true);
        let scratch = Scratch::new(scratch, self.threads(), needed);
        let (dq, heads) = (Shared(dq.as_mut_ptr()), Shared(per_head.as_mut_ptr()));
        self.pool.run(s.n_heads, |i, worker| {
            let (dq, heads) = (&dq, &heads);
            let mut h = head(&s, i, q, k, v, o.as_ptr().cast_mut());
            h.lse = lse[i * t..].as_ptr().cast_mut();
            // SAFETY: offsets lie within buffers whose lengths were checked; o and lse are only read;
            // head i writes its own columns of dq and its own part of per_head; the ISA is present.
            unsafe {
                let g = HeadGrad {
                    d_o: d_o.as_ptr().add(i * hd),
                    dq: dq.0.add(i * hd),
                    dk: heads.0.add(2 * i * t * hd),
                    dv: heads.0.add((2 * i + 1) * t * hd),
                };
                (table.attention_bwd)(&h, &g, scratch.of(worker));
            }
        });
        self.sum_heads(&s, per_head, 0, dk);
        self.sum_heads(&s, per_head, 1, dv);
    }

    /// Adds the query heads' parts of one kv head in ascending order.
    fn sum_heads(&self, s: &AttnShape, per_head: &[f32], which: usize, out: &mut [f32]) {
        let (t, hd, group) = (s.t, s.head_dim, s.n_heads / s.n_kv_heads);
        self.rows(s.n_kv_heads * hd, out, |r, row| {
            for (kv, dst) in row.chunks_exact_mut(hd).enumerate() {
                dst.fill(0.0);
                for h in kv * group..(kv + 1) * group {
                    let src = &per_head[((2 * h + which) * t + r) * hd..][..hd];
                    dst.iter_mut().zip(src).for_each(|(d, s)| *d += s);
                }
            }
        });
    }

    /// AdamW on all parameters at once.
    pub fn adamw(&self, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], step: &AdamWStep) {
        let _timed = self.timed(Op::Optimizer);
        assert!(p.len() == g.len() && p.len() == m.len() && p.len() == v.len());
        let (ms, vs) = (Shared(m.as_mut_ptr()), Shared(v.as_mut_ptr()));
        self.rows(RUN, p, |i, p| {
            let at = i * RUN..i * RUN + p.len();
            // SAFETY: runs are disjoint and within the moments.
            let (m, v) = unsafe { (ms.part(at.clone()), vs.part(at.clone())) };
            match self.table {
                // SAFETY: equal lengths; the ISA is present.
                Some(t) => unsafe { (t.adamw)(p, &g[at], m, v, step) },
                None => scalar::ops::adamw(p, &g[at], m, v, step),
            }
        });
    }

    /// Decodes row `r` of w to f32.
    pub fn dequantize_row(&self, w: &QMatrix<'_>, r: usize, out: &mut [f32]) {
        assert_eq!(out.len(), w.cols());
        match self.table {
            // SAFETY: out is one whole row; the ISA is present.
            Some(t) => unsafe { (t.dequant)(w.dtype(), w.row(r), 0, out) },
            None => scalar::decode::dequantize(w.dtype(), w.row(r), 0, out),
        }
    }

    /// Splits `data` in runs of `len` (the last may be shorter) and calls `f(index, run)` for each.
    pub fn rows(&self, len: usize, data: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync) {
        let total = data.len();
        let items = total.div_ceil(len);
        // Small work costs less than waking the pool.
        if total <= 4096 {
            return data.chunks_mut(len).enumerate().for_each(|(i, run)| f(i, run));
        }
        // Several rows an item, so that taking an item costs little beside it.
        let per = (4096 / len).clamp(1, 64);
        let data = Shared(data.as_mut_ptr());
        self.pool.run(items.div_ceil(per), |item, _| {
            for i in item * per..items.min((item + 1) * per) {
                // SAFETY: runs are disjoint and within data.
                f(i, unsafe { data.part(i * len..total.min((i + 1) * len)) });
            }
        });
    }

    fn check_attention(&self, s: &AttnShape, q: &[f32], k: &[f32], v: &[f32], o: &[f32]) {
        assert!(s.t > 0 && s.n_kv_heads > 0 && s.n_heads.is_multiple_of(s.n_kv_heads));
        assert!(q.len() == s.t * s.n_heads * s.head_dim && o.len() == q.len());
        assert!(k.len() == (s.past + s.t) * s.n_kv_heads * s.head_dim && v.len() == k.len());
    }
}

/// The values of F32 weights, where they are aligned as such.
fn f32_values<'a>(w: &QMatrix<'a>) -> Option<&'a [f32]> {
    // SAFETY: any bits are an f32.
    let (before, values, after) = unsafe { w.bytes().align_to::<f32>() };
    (w.dtype() == DType::F32 && before.is_empty() && after.is_empty()).then_some(values)
}

/// Whether a product of a few rows needs no panel of W: integer x on blocks, f32 x on F32.
fn reads_stored(op: &NtOp<'_>) -> bool {
    match op.x {
        Rows::Int8(a) => a.tile == 1,
        Rows::F32(_) => f32_values(&op.w).is_some(),
        Rows::Bf16(_) => false,
    }
}

/// Rows of W that stay in the first cache for all rows of x.
const GEMV_W_ROWS: usize = 64;

/// y's columns `rows` of a product of a few rows, some of W's rows at a time.
///
/// # Safety
/// The op's shapes fit, [`reads_stored`] of it, m is [`GEMV_ROWS`] at most, nobody else uses these columns of y,
/// and the CPU has the table's instruction set.
unsafe fn gemv_rows(t: &Table, m: usize, op: &NtOp<'_>, y: &Shared<f32>, rows: Range<usize>) {
    let mut all = [0.0f32; GEMV_ROWS * GEMV_W_ROWS];
    let (n, k) = (op.w.rows(), op.w.cols());
    // Of f32 fewer rows, which then stay there too.
    let step = if matches!(op.x, Rows::Int8(_)) { GEMV_W_ROWS } else { GEMV_W_ROWS / 4 };
    for from in rows.clone().step_by(step) {
        let to = rows.end.min(from + step);
        let width = to - from;
        let out = &mut all[..m * width];
        let w = op.w.rows_range(from, to);
        match op.x {
            // SAFETY: the caller's contract.
            Rows::Int8(acts) => unsafe { dot_stored(t, m, &acts, &w, out) },
            Rows::F32(x) => {
                let values = f32_values(&w).unwrap_or_default();
                // SAFETY: as above; the values are `width` rows of k.
                unsafe { (t.dot_nt)(1.0, x, m, k, values, width, out) }
            }
            Rows::Bf16(_) => unreachable!("bf16 is for input gradients: check_nt"),
        }
        for (r, out) in out.chunks_exact_mut(width).enumerate() {
            for l in op.low.iter() {
                for (j, h) in l.h[r * l.rank..(r + 1) * l.rank].iter().enumerate() {
                    // SAFETY: equal lengths; the ISA is present.
                    unsafe { (t.axpy)(*h, &l.b[j * n + from..j * n + to], out) };
                }
            }
            if let Some(c) = op.gain {
                out.iter_mut().zip(&c[from..to]).for_each(|(o, c)| *o *= c);
            }
            // SAFETY: the caller's contract.
            let y = unsafe { y.part(r * n + from..r * n + to) };
            for (y, o) in y.iter_mut().zip(&*out) {
                *y = if op.accumulate { *y + *o } else { *o };
            }
        }
    }
}

/// out `[m, n]` = x · wᵀ of plain integer rows and stored blocks.
///
/// # Safety
/// x has m rows as long as those of w, and the CPU has the table's instruction set.
unsafe fn dot_stored(t: &Table, m: usize, x: &QuantActs<'_>, w: &QMatrix<'_>, out: &mut [f32]) {
    let (dtype, n, k) = (w.dtype(), w.rows(), w.cols());
    let sums = if dtype.group_len() == 16 { x.bias_sum16 } else { x.bias_sum32 };
    let groups = k / dtype.group_len();
    for r in 0..m {
        let (codes, scale) = (&x.codes[r * k..(r + 1) * k], &x.scale[r * k / 32..(r + 1) * k / 32]);
        let (sums, out) = (&sums[r * groups..(r + 1) * groups], &mut out[r * n..(r + 1) * n]);
        // SAFETY: the caller's contract.
        unsafe { (t.dot_rows)(dtype, w.bytes(), codes, scale, sums, out) };
    }
}

fn check_low(m: usize, n: usize, low: Option<LowRank<'_>>) {
    if let Some(l) = low {
        assert!(l.h.len() == m * l.rank && l.b.len() == l.rank * n);
    }
}

fn check_nt(m: usize, op: &NtOp<'_>) {
    let (n, k) = (op.w.rows(), op.w.cols());
    assert_eq!(op.y.len(), m * n);
    check_rows(&op.x, m, k);
    assert!(!matches!(op.x, Rows::Bf16(_)), "bf16 is for input gradients");
    if let Rows::Int8(a) = op.x {
        assert!(!op.w.dtype().is_float(), "int8 products need block weights");
        assert!(a.halves || op.w.dtype().group_len() != 16, "groups of 16 need their sums");
    }
    check_low(m, n, op.low);
    assert!(op.gain.is_none_or(|c| c.len() == n));
}

fn check_rows(x: &Rows<'_>, m: usize, k: usize) {
    match x {
        Rows::F32(x) => assert_eq!(x.len(), m * k),
        Rows::Bf16(x) => assert_eq!(x.len(), m * k),
        Rows::Int8(a) => {
            let m = m.next_multiple_of(a.tile);
            assert!(a.codes.len() == m * k && a.scale.len() == m * k / 32);
            assert!(a.start16.len() == m * k / 16 && a.start32.len() == m * k / 32);
            assert!(a.bias_sum16.len() == m * k / 16 && a.bias_sum32.len() == m * k / 32);
        }
    }
}

/// Activations must lie as the kernel at hand reads them.
fn assert_tile(x: &Rows<'_>, tile: usize) {
    if let Rows::Int8(a) = x {
        assert_eq!(a.tile, tile, "activations quantized for another product");
    }
}

fn scalar_nt(m: usize, op: &mut NtOp<'_>) {
    check_nt(m, op);
    if let Some(c) = op.gain {
        let mut z = vec![0.0; m * c.len()];
        scalar_nt(m, &mut NtOp { gain: None, y: &mut z, accumulate: false, ..*op });
        for (i, (y, z)) in op.y.iter_mut().zip(z).enumerate() {
            *y = if op.accumulate { *y } else { 0.0 } + c[i % c.len()] * z;
        }
        return;
    }
    match op.x {
        Rows::F32(x) => scalar::ops::qgemm_nt(x, m, &op.w, op.y, op.accumulate),
        Rows::Int8(a) => scalar::ops::qgemm_nt_int8(&a, m, &op.w, op.y, op.accumulate),
        Rows::Bf16(_) => unreachable!("bf16 is for input gradients: check_nt"),
    }
    if let Some(l) = op.low {
        scalar::ops::add_low_rank(l.h, m, l.b, l.rank, op.w.rows(), op.y);
    }
}

fn fill_sums(a: &mut QuantActsMut<'_>) {
    for (i, half) in a.codes.chunks_exact(16).enumerate() {
        let sum: i32 = half.iter().map(|c| i32::from(*c)).sum();
        a.start16[i] = -128 * sum;
        a.bias_sum16[i] = a.scale[i / 2] * sum as f32;
    }
    for i in 0..a.start32.len() {
        a.start32[i] = a.start16[2 * i] + a.start16[2 * i + 1];
        a.bias_sum32[i] = a.scale[i] * (a.start32[i] / -128) as f32;
    }
    debug_assert!(a.k.is_multiple_of(32));
}

/// Head `i` of a checked attention.
fn head(s: &AttnShape, i: usize, q: &[f32], k: &[f32], v: &[f32], o: *mut f32) -> Head {
    let hd = s.head_dim;
    let kv = i / (s.n_heads / s.n_kv_heads) * hd;
    Head {
        t: s.t,
        past: s.past,
        hd,
        scale: 1.0 / libm::sqrtf(hd as f32),
        q: q[i * hd..].as_ptr(),
        q_row: s.n_heads * hd,
        k: k[kv..].as_ptr(),
        v: v[kv..].as_ptr(),
        kv_row: s.n_kv_heads * hd,
        // The offset stays within o, which is as long as q.
        o: o.wrapping_add(i * hd),
        lse: core::ptr::null_mut(),
    }
}

/// Strides and the kv offset of head `i`.
fn head_rows(s: &AttnShape, i: usize) -> (scalar::ops::HeadRows, usize) {
    let (q_row, kv_row) = (s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim);
    let rows = scalar::ops::HeadRows { t: s.t, past: s.past, hd: s.head_dim, q_row, kv_row };
    (rows, i / (s.n_heads / s.n_kv_heads) * s.head_dim)
}

fn scalar_attention(
    s: &AttnShape,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    o: &mut [f32],
    mut lse: Option<&mut [f32]>,
) {
    for i in 0..s.n_heads {
        let (rows, kv) = head_rows(s, i);
        let at = i * s.head_dim;
        let lse = lse.as_deref_mut().map(|l| &mut l[i * s.t..(i + 1) * s.t]);
        scalar::ops::attention(rows, &q[at..], &k[kv..], &v[kv..], &mut o[at..], lse);
    }
}

/// Parts of a cache as f32, one behind the other.
fn all_of(prefix: Kv<'_>, own: Kv<'_>) -> Vec<f32> {
    [prefix, own].iter().flat_map(|x| (0..x.len()).map(|i| x.get(i))).collect()
}

fn scalar_batched<'a>(
    s: &AttnShape,
    q: &[f32],
    prefix: KvRows<'_>,
    own: impl Fn(usize) -> KvRows<'a>,
    o: &mut [f32],
) {
    let (width, row) = (s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim);
    for (r, (q, o)) in q.chunks_exact(width).zip(o.chunks_exact_mut(width)).enumerate() {
        let own = own(r);
        let (k, v) = (all_of(prefix.k, own.k), all_of(prefix.v, own.v));
        let s = AttnShape { t: 1, past: k.len() / row - 1, ..*s };
        scalar_attention(&s, q, &k, &v, o, None);
    }
}

fn check_cached(s: &AttnShape, q: &[f32], o: &[f32], prefix: KvRows<'_>, own: KvRows<'_>) {
    assert!(s.t > 0 && s.n_kv_heads > 0 && s.n_heads.is_multiple_of(s.n_kv_heads));
    assert!(q.len() == s.t * s.n_heads * s.head_dim && o.len() == q.len());
    assert!(prefix.k.is_empty() || prefix.ty() == own.ty(), "parts of a cache are of one type");
    let whole = s.head_dim.is_multiple_of(KV_BLOCK);
    assert!(whole || own.ty() != KvType::Q8, "Q8 heads are whole blocks");
}

fn scalar_attention_bwd(
    s: &AttnShape,
    (q, k, v): (&[f32], &[f32], &[f32]),
    (o, lse, d_o): (&[f32], &[f32], &[f32]),
    dq: &mut [f32],
    per_head: &mut [f32],
) {
    let part = s.t * s.head_dim;
    for (i, grads) in per_head.chunks_exact_mut(2 * part).take(s.n_heads).enumerate() {
        let (rows, kv) = head_rows(s, i);
        let at = i * s.head_dim;
        let (dk, dv) = grads.split_at_mut(part);
        scalar::ops::attention_bwd(
            rows,
            (&q[at..], &k[kv..], &v[kv..]),
            (&o[at..], &lse[i * s.t..], &d_o[at..]),
            (&mut dq[at..], dk, dv),
        );
    }
}
