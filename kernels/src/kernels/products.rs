//! Matrix products with stored weights, and those of the adapter's rank.

use core::ops::Range;
use core::slice::from_raw_parts_mut;

use crate::acts::{QuantActs, QuantActsMut};
use crate::block::DType;
use crate::dispatch::Table;
use crate::generic::gemm::{self, NN_STRIP, TN_SCRATCH_WORDS};
use crate::generic::skinny::DOT_ROWS;
use crate::items::{LowRank, NnItem, NtItem, Rows, TnItem};
use crate::scalar;
use crate::view::QMatrix;

use super::share::{Scratch, Shared};
use super::{Kernels, Op};

/// Up to this many rows, stored blocks are reread for each row: packing them would cost more.
const GEMV_ROWS: usize = 8;

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

/// f32 words of scratch per thread for the products with weights `[n, k]` and rank `rank`, forward, to the
/// input and to the weights.
pub fn gemm_scratch_words(n: usize, k: usize, rank: usize) -> usize {
    gemm::nt_scratch_words(k, rank).max(gemm::nn_scratch_words(n, rank)).max(TN_SCRATCH_WORDS)
}

impl Kernels {
    /// Quantizes x `[m, k]` to int8 into `words` (at least `acts_words(m, k)`), for [`Kernels::qgemm_nt`].
    /// `halves` if any of the weights has groups of 16 (see [`DType::group_len`]).
    pub fn quantize<'a>(
        &self,
        x: &[f32],
        m: usize,
        k: usize,
        halves: bool,
        words: &'a mut [f32],
    ) -> QuantActs<'a> {
        let tile = if m <= GEMV_ROWS { 1 } else { self.table.act_tile };
        self.quantize_tiles(x, m, k, tile, halves, words)
    }

    /// The same for a gradient, for [`Kernels::qgemm_nn`]. Also for a few rows x, to force a
    /// [`Kernels::qgemm_nt`] with weights of groups of 32 through the tiles.
    pub fn quantize_gradient<'a>(
        &self,
        x: &[f32],
        m: usize,
        k: usize,
        words: &'a mut [f32],
    ) -> QuantActs<'a> {
        self.quantize_tiles(x, m, k, self.table.act_tile, false, words)
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
        let mut target = acts.target();
        let target = Shared(&mut target);
        // Several rows per item, so the cost of taking an item is negligible.
        let per = (4096 / k).clamp(1, 64);
        self.pool.run(m.div_ceil(per), |item, _| {
            let target = &target;
            for r in item * per..m.min((item + 1) * per) {
                // SAFETY: the ISA is present; row r is within the storage and this item's alone.
                unsafe { (self.table.quantize_row)(&x[r * k..(r + 1) * k], halves, (*target.0).row(r, k)) }
            }
        });
        acts.freeze()
    }

    /// Runs forward products of m rows; all of them share the pool at once.
    pub fn qgemm_nt(&self, m: usize, ops: &mut [NtOp<'_>], scratch: &mut [f32]) {
        let _timed = self.timed(if m <= GEMV_ROWS { Op::Gemv } else { Op::Forward });
        let t = self.table;
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
            self.gemv(m, ops);
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
    fn gemv(&self, m: usize, ops: &mut [NtOp<'_>]) {
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
                // Split at whole vectors, so rounding doesn't depend on the number of threads.
                let cut = |at: usize| at.saturating_sub(first).next_multiple_of(16).min(n);
                let (from, to) = (cut(item * part), cut((item + 1) * part));
                // SAFETY: shapes were checked by the caller; items own disjoint columns of each y.
                unsafe { gemv_rows(self.table, m, op, y, from..to) };
                first += n;
            }
        });
    }

    /// Whether w can be multiplied with int8 activations, and that is faster.
    pub fn int8_product(&self, w: &QMatrix<'_>) -> bool {
        self.table.int8_products && !w.dtype().is_float()
    }

    /// Whether the input gradient through w can be computed with int8 dy, and that is faster.
    pub fn int8_gradient(&self, w: &QMatrix<'_>) -> bool {
        self.table.int8_gradient && w.rows().is_multiple_of(32) && w.cols().is_multiple_of(32)
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
        let round_row = self.bf16.map_or(scalar::products::round_bf16 as unsafe fn(_, _), |t| t.round_row);
        let to = Shared(out.as_mut_ptr());
        let per = (4096 / k).clamp(1, 64);
        self.pool.run(m.div_ceil(per), |item, _| {
            let range = item * per * k..m.min((item + 1) * per) * k;
            // SAFETY: items own disjoint rows.
            let out = unsafe { to.part(range.clone()) };
            // SAFETY: the ISA is present; the stretch has whole rows of a multiple of 32.
            unsafe { (round_row)(&x[range], out.as_mut_ptr()) }
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
        let t = self.table;
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
        let t = self.table;
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
        let h = Shared(h.as_mut_ptr());
        self.pool.run(m.div_ceil(DOT_ROWS), |item, _| {
            let rows = item * DOT_ROWS..m.min((item + 1) * DOT_ROWS);
            // SAFETY: items own disjoint rows of h; shapes were checked; the ISA is present.
            unsafe {
                let out = h.part(rows.start * r..rows.end * r);
                (self.table.dot_nt)(s, &x[rows.start * k..rows.end * k], rows.len(), k, p, r, out);
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
        const COLS: usize = 64;
        let out = Shared(out.as_mut_ptr());
        self.pool.run(n.div_ceil(COLS), |item, _| {
            let out = &out;
            let n0 = item * COLS;
            // SAFETY: items own disjoint columns of out; shapes were checked; the ISA is present.
            unsafe { (self.table.outer_tn)(p, q, m, r, n, n0, COLS.min(n - n0), out.0, accumulate) }
        });
    }
}

/// The values of F32 weights, if they are aligned.
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

/// Rows of W that stay in the L1 cache for all rows of x.
const GEMV_W_ROWS: usize = 64;

/// y's columns `rows` of a product of a few rows, some of W's rows at a time.
///
/// # Safety
/// The op's shapes fit, [`reads_stored`] of it, m is [`GEMV_ROWS`] at most, nobody else uses these columns of y,
/// and the CPU has the table's instruction set.
unsafe fn gemv_rows(t: &Table, m: usize, op: &NtOp<'_>, y: &Shared<f32>, rows: Range<usize>) {
    let mut all = [0.0f32; GEMV_ROWS * GEMV_W_ROWS];
    let (n, k) = (op.w.rows(), op.w.cols());
    // Fewer rows for f32, so they stay there too.
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

/// Asserts that activations have the layout this kernel reads.
fn assert_tile(x: &Rows<'_>, tile: usize) {
    if let Rows::Int8(a) = x {
        assert_eq!(a.tile, tile, "activations were quantized for another product");
    }
}
