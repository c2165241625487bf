//! Work items of the matrix products on stored weights. One item owns one strip of output columns
//! for all rows, so results do not depend on how items meet threads.

use super::simd::{CodeClass, Simd};
use super::tile::{ActRows, CodePanel, f32_tile, int8_tile, store_tile};
use crate::acts::QuantActs;
use crate::block::DType;
use crate::view::QMatrix;

/// Columns of the strips that the input gradient decodes at once: one block of 32.
pub const NN_STRIP: usize = 32;
/// Weight rows that the input gradient decodes at once.
pub const NN_CHUNK: usize = 256;

/// Decodes part of a stored row to codes, scales and biases (see `decode`).
pub type UnpackFn = unsafe fn(DType, &[u8], usize, &mut [i8], &mut [f32], &mut [f32]);
/// Decodes part of a stored row to f32.
pub type DequantFn = unsafe fn(DType, &[u8], usize, &mut [f32]);
/// Decodes 32 columns of successive rows: (type, rows, bytes per row, first column, out).
pub type StripFn = unsafe fn(DType, &[u8], usize, usize, &mut [[f32; 32]]);

/// The low-rank part of a product: adds h·b with h `[m, r]` and b `[r, n]`, both row-major.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    /// `[m, r]`, the adapter's scale already in it.
    pub h: &'a [f32],
    /// `[r, n]`.
    pub b: &'a [f32],
    /// Rank r.
    pub rank: usize,
}

/// The left operand of a forward product.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// f32 `[m, k]`.
    F32(&'a [f32]),
    /// int8 codes in blocks of 32.
    Int8(QuantActs<'a>),
}

/// y[m, n] (+)= x[m, k] · W[n, k]ᵀ (+ h·b).
#[derive(Clone, Copy)]
pub struct NtItem<'a> {
    pub m: usize,
    pub x: Rows<'a>,
    pub w: QMatrix<'a>,
    pub low: Option<LowRank<'a>>,
    /// Row-major `[m, n]`, written by strips.
    pub y: *mut f32,
    pub accumulate: bool,
    pub unpack: UnpackFn,
    pub dequant: DequantFn,
}

/// dx[m, k] (+)= dy[m, n] · W[n, k] (+ h·b with b `[r, k]`).
#[derive(Clone, Copy)]
pub struct NnItem<'a> {
    pub m: usize,
    pub dy: Rows<'a>,
    pub w: QMatrix<'a>,
    pub low: Option<LowRank<'a>>,
    pub dx: *mut f32,
    pub accumulate: bool,
    pub strip: StripFn,
    pub dequant: DequantFn,
}

/// f32 words of scratch that a forward item needs: W has rows of `k` elements, the adapter rank r.
pub fn nt_scratch_words(k: usize, rank: usize) -> usize {
    // The widest panel has 32 columns; the f32 panel is the largest form, and one decoded row stands
    // beside it as codes, scales and biases.
    32 * k + k + 2 * (k / 16 + 2) + 32 * rank + 64
}

/// f32 words of scratch that an input gradient's item needs: W has `n` rows.
pub fn nn_scratch_words(n: usize, rank: usize) -> usize {
    let int8 = NN_STRIP * 32 + NN_STRIP * n / 4 + NN_STRIP * (n / 32 + 1);
    int8.max(NN_CHUNK * NN_STRIP) + NN_STRIP * rank + 64
}

/// Takes `n` words off the front of the scratch.
fn take<'s>(scratch: &mut &'s mut [f32], n: usize) -> &'s mut [f32] {
    let (a, b) = core::mem::take(scratch).split_at_mut(n);
    *scratch = b;
    a
}

/// One strip of NV·LANES output columns from `n0`.
///
/// # Safety
/// The item's shapes were checked, `n0` is a multiple of the strip below `w.rows()`, no other item
/// writes the strip, the scratch has `scratch_words`, and the CPU has S's features.
#[inline(always)]
pub unsafe fn nt_item<S: Simd, const F_MR: usize, const I_MR: usize, const NV: usize>(
    it: &NtItem<'_>,
    n0: usize,
    scratch: &mut [f32],
) {
    // SAFETY: the caller's contract, passed on.
    unsafe {
        match it.x {
            Rows::F32(x) => nt_f32::<S, F_MR, NV>(it, x, n0, scratch),
            Rows::Int8(acts) => nt_class::<S, I_MR, NV>(it, acts, n0, scratch),
        }
    }
}

/// The integer tile of the class that the ISA gives W's type.
#[inline(always)]
unsafe fn nt_class<S: Simd, const MR: usize, const NV: usize>(
    it: &NtItem<'_>,
    acts: QuantActs<'_>,
    n0: usize,
    scratch: &mut [f32],
) {
    let c = S::class(it.w.dtype());
    macro_rules! tile {
        ($group:literal, $bias:literal, $start:literal, $acc16:literal) => {
            // SAFETY: the caller's contract, passed on.
            unsafe { nt_int8::<S, MR, NV, $group, $bias, $start, $acc16>(it, acts, c, n0, scratch) }
        };
    }
    match (it.w.dtype().group_len(), c.bias, c.start_at_sum, c.acc16) {
        (32, false, true, _) => tile!(32, false, true, 0),
        (32, true, true, _) => tile!(32, true, true, 0),
        (16, false, true, _) => tile!(16, false, true, 0),
        (16, true, true, _) => tile!(16, true, true, 0),
        (32, false, false, 0) => tile!(32, false, false, 0),
        (32, true, false, 0) => tile!(32, true, false, 0),
        (16, false, false, 0) => tile!(16, false, false, 0),
        (16, true, false, 0) => tile!(16, true, false, 0),
        (32, false, false, 1) => tile!(32, false, false, 1),
        (32, false, false, 2) => tile!(32, false, false, 2),
        (32, true, false, 4) => tile!(32, true, false, 4),
        (32, false, false, 8) => tile!(32, false, false, 8),
        (32, true, false, 8) => tile!(32, true, false, 8),
        (16, true, false, 2) => tile!(16, true, false, 2),
        (16, false, false, 8) => tile!(16, false, false, 8),
        (16, true, false, 8) => tile!(16, true, false, 8),
        _ => unreachable!("no integer tile for {} on this ISA", it.w.dtype().name()),
    }
}

#[inline(always)]
unsafe fn nt_f32<S: Simd, const MR: usize, const NV: usize>(
    it: &NtItem<'_>,
    x: &[f32],
    n0: usize,
    mut scratch: &mut [f32],
) {
    let (k, n, nr) = (it.w.cols(), it.w.rows(), NV * S::LANES);
    let valid = nr.min(n - n0);
    let panel = take(&mut scratch, k * nr);
    let row = take(&mut scratch, k);
    // SAFETY: the caller's contract; panel and row have the sizes used.
    unsafe {
        if valid < nr {
            panel.fill(0.0);
        }
        for j in 0..valid {
            (it.dequant)(it.w.dtype(), it.w.row(n0 + j), 0, row);
            for i in 0..k {
                *panel.get_unchecked_mut(i * nr + j) = *row.get_unchecked(i);
            }
        }
        let low = pack_low::<S, NV>(it.low, n, n0, scratch);
        for m0 in (0..it.m).step_by(MR) {
            let rows = MR.min(it.m - m0);
            let mut acc = [[S::zero(); NV]; MR];
            let a: [*const f32; MR] = core::array::from_fn(|m| x.as_ptr().add((m0 + m.min(rows - 1)) * k));
            f32_tile::<S, MR, NV>(&mut acc, k, &a, 1, panel.as_ptr(), nr);
            add_low::<S, MR, NV>(&mut acc, it.low, low, m0, rows);
            store_tile::<S, MR, NV>(&acc, rows, valid, it.y.add(m0 * n + n0), n, it.accumulate);
        }
    }
}

#[inline(always)]
unsafe fn nt_int8<
    S: Simd,
    const MR: usize,
    const NV: usize,
    const G: usize,
    const BIAS: bool,
    const START: bool,
    const ACC16: usize,
>(
    it: &NtItem<'_>,
    acts: QuantActs<'_>,
    class: CodeClass,
    n0: usize,
    mut scratch: &mut [f32],
) {
    let (k, n, nr) = (it.w.cols(), it.w.rows(), NV * S::LANES);
    let valid = nr.min(n - n0);
    // SAFETY: the caller's contract; `pack_codes` fills the whole panel it returns.
    unsafe {
        let panel = pack_codes::<S, NV, G, BIAS>(it, class, n0, &mut scratch);
        let low = pack_low::<S, NV>(it.low, n, n0, scratch);
        let groups = k / G;
        let (bias_sum, start) =
            if G == 16 { (acts.bias_sum16, acts.start16) } else { (acts.bias_sum32, acts.start32) };
        for m0 in (0..it.m).step_by(MR) {
            let rows = MR.min(it.m - m0);
            let at = |m: usize| m0 + m.min(rows - 1);
            let x = ActRows::<MR> {
                codes: core::array::from_fn(|m| acts.codes.as_ptr().add(at(m) * k)),
                scale: core::array::from_fn(|m| acts.scale.as_ptr().add(at(m) * (k / 32))),
                bias_sum: core::array::from_fn(|m| bias_sum.as_ptr().add(at(m) * groups)),
                start: core::array::from_fn(|m| start.as_ptr().add(at(m) * groups)),
            };
            let mut acc = [[S::zero(); NV]; MR];
            int8_tile::<S, MR, NV, G, BIAS, START, ACC16>(&mut acc, k, &x, panel);
            add_low::<S, MR, NV>(&mut acc, it.low, low, m0, rows);
            store_tile::<S, MR, NV>(&acc, rows, valid, it.y.add(m0 * n + n0), n, it.accumulate);
        }
    }
}

/// Decodes NR rows of W into the integer tile's panel.
#[inline(always)]
unsafe fn pack_codes<S: Simd, const NV: usize, const G: usize, const BIAS: bool>(
    it: &NtItem<'_>,
    class: CodeClass,
    n0: usize,
    scratch: &mut &mut [f32],
) -> CodePanel {
    let (k, nr, dtype) = (it.w.cols(), NV * S::LANES, it.w.dtype());
    let valid = nr.min(it.w.rows() - n0);
    let codes = take(scratch, k * nr / 4);
    let scale = take(scratch, k / G * nr);
    let bias = take(scratch, k / G * nr);
    let row_codes = take(scratch, k / 4);
    let row_scale = take(scratch, k / G);
    let row_bias = take(scratch, k / G);
    // SAFETY: an f32 slice of k/4 words is k bytes, any of which is a valid i8; indices stay within
    // the slices taken above.
    unsafe {
        if valid < nr {
            codes.fill(0.0);
            scale.fill(0.0);
            bias.fill(0.0);
        }
        let row_i8 = core::slice::from_raw_parts_mut(row_codes.as_mut_ptr().cast::<i8>(), k);
        let quads = codes.as_mut_ptr().cast::<u32>();
        let flip = (class.offset as u32 & 0xff) * 0x0101_0101;
        for j in 0..valid {
            let own_bias = if dtype.has_bias() { k / G } else { 0 };
            (it.unpack)(dtype, it.w.row(n0 + j), 0, row_i8, row_scale, &mut row_bias[..own_bias]);
            let src = row_i8.as_ptr().cast::<u32>();
            let t = S::CODES_TOGETHER / 4;
            for q in 0..k / 4 {
                let at = (q / t * nr + j) * t + q % t;
                *quads.add(at) = add_bytes(src.add(q).read_unaligned(), flip);
            }
            for g in 0..k / G {
                let s = *row_scale.get_unchecked(g);
                *scale.get_unchecked_mut(g * nr + j) = s;
                if BIAS {
                    let own = if own_bias > 0 { *row_bias.get_unchecked(g) } else { 0.0 };
                    let fold = if class.start_at_sum { 0.0 } else { s * class.offset as f32 };
                    *bias.get_unchecked_mut(g * nr + j) = own - fold;
                }
            }
        }
    }
    CodePanel { codes: codes.as_ptr().cast(), scale: scale.as_ptr(), bias: bias.as_ptr() }
}

/// Adds four bytes lane by lane, without carries between them.
#[inline(always)]
fn add_bytes(a: u32, b: u32) -> u32 {
    ((a & 0x7f7f_7f7f).wrapping_add(b & 0x7f7f_7f7f)) ^ ((a ^ b) & 0x8080_8080)
}

/// Copies the strip's columns of b, zero-padded to NR.
#[inline(always)]
unsafe fn pack_low<S: Simd, const NV: usize>(
    low: Option<LowRank<'_>>,
    n: usize,
    n0: usize,
    mut scratch: &mut [f32],
) -> *const f32 {
    let Some(l) = low else { return core::ptr::null() };
    let nr = NV * S::LANES;
    let valid = nr.min(n - n0);
    let panel = take(&mut scratch, l.rank * nr);
    for j in 0..l.rank {
        panel[j * nr..j * nr + valid].copy_from_slice(&l.b[j * n + n0..j * n + n0 + valid]);
        panel[j * nr + valid..(j + 1) * nr].fill(0.0);
    }
    panel.as_ptr()
}

#[inline(always)]
unsafe fn add_low<S: Simd, const MR: usize, const NV: usize>(
    acc: &mut [[S::F; NV]; MR],
    low: Option<LowRank<'_>>,
    panel: *const f32,
    m0: usize,
    rows: usize,
) {
    let Some(l) = low else { return };
    // SAFETY: h has r columns for each row; the panel was packed for r rows.
    unsafe {
        let h: [*const f32; MR] = core::array::from_fn(|m| l.h.as_ptr().add((m0 + m.min(rows - 1)) * l.rank));
        f32_tile::<S, MR, NV>(acc, l.rank, &h, 1, panel, NV * S::LANES);
    }
}

/// The strip of `NN_STRIP` input columns from `c0`, summed over all rows of W.
///
/// # Safety
/// As for [`nt_item`].
#[inline(always)]
pub unsafe fn nn_item<S: Simd, const F_MR: usize, const I_MR: usize, const NV: usize>(
    it: &NnItem<'_>,
    c0: usize,
    mut scratch: &mut [f32],
) {
    let k = it.w.cols();
    let valid = NN_STRIP.min(k - c0);
    let low = take(&mut scratch, NN_STRIP * it.low.map_or(0, |l| l.rank));
    if let Some(l) = it.low {
        for j in 0..l.rank {
            let dst = &mut low[j * NN_STRIP..(j + 1) * NN_STRIP];
            dst[..valid].copy_from_slice(&l.b[j * k + c0..j * k + c0 + valid]);
            dst[valid..].fill(0.0);
        }
    }
    // SAFETY: the caller's contract, passed on.
    unsafe {
        match it.dy {
            Rows::F32(dy) => nn_f32::<S, F_MR, NV>(it, dy, c0, valid, low, scratch),
            Rows::Int8(dy) => {
                // The codes made here use all eight bits, as Q8_0's do.
                let c = S::class(DType::Q8_0);
                match (c.start_at_sum, c.acc16) {
                    (true, _) => nn_int8::<S, I_MR, NV, true, 0>(it, dy, c0, low, scratch),
                    (false, 0) => nn_int8::<S, I_MR, NV, false, 0>(it, dy, c0, low, scratch),
                    (false, 2) => nn_int8::<S, I_MR, NV, false, 2>(it, dy, c0, low, scratch),
                    (false, _) => nn_int8::<S, I_MR, NV, false, 1>(it, dy, c0, low, scratch),
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn nn_f32<S: Simd, const MR: usize, const NV: usize>(
    it: &NnItem<'_>,
    dy: &[f32],
    c0: usize,
    valid: usize,
    low: &[f32],
    mut scratch: &mut [f32],
) {
    let (n, k, nr) = (it.w.rows(), it.w.cols(), NV * S::LANES);
    let panel = take(&mut scratch, NN_CHUNK * NN_STRIP);
    for n0 in (0..n).step_by(NN_CHUNK) {
        let chunk = NN_CHUNK.min(n - n0);
        // SAFETY: c0 is a multiple of 32 within the row; block types have whole blocks of 32.
        unsafe { decode_strip(it, n0, chunk, c0, valid, &mut panel[..chunk * NN_STRIP]) };
        let last = n0 + chunk == n;
        // SAFETY: the caller's contract; dy has n columns, dx k.
        unsafe {
            for m0 in (0..it.m).step_by(MR) {
                let rows = MR.min(it.m - m0);
                let a: [*const f32; MR] =
                    core::array::from_fn(|m| dy.as_ptr().add((m0 + m.min(rows - 1)) * n + n0));
                for sub in (0..valid).step_by(nr) {
                    let mut acc = [[S::zero(); NV]; MR];
                    f32_tile::<S, MR, NV>(&mut acc, chunk, &a, 1, panel.as_ptr().add(sub), NN_STRIP);
                    if last {
                        add_strip_low::<S, MR, NV>(
                            &mut acc,
                            it.low,
                            low.as_ptr().wrapping_add(sub),
                            m0,
                            rows,
                        );
                    }
                    let y = it.dx.add(m0 * k + c0 + sub);
                    let add = it.accumulate || n0 > 0;
                    store_tile::<S, MR, NV>(&acc, rows, nr.min(valid - sub), y, k, add);
                }
            }
        }
    }
}

/// Columns `c0..c0 + valid` of `chunk` rows from `n0`, as rows of 32, zero-padded.
#[inline(always)]
unsafe fn decode_strip(it: &NnItem<'_>, n0: usize, chunk: usize, c0: usize, valid: usize, out: &mut [f32]) {
    let row_bytes = it.w.row_bytes();
    let (rows, _) = out.as_chunks_mut::<NN_STRIP>();
    if valid == NN_STRIP {
        let bytes = it.w.rows_range(n0, n0 + chunk).bytes();
        // SAFETY: the caller's contract.
        return unsafe { (it.strip)(it.w.dtype(), bytes, row_bytes, c0, rows) };
    }
    for (i, row) in rows.iter_mut().enumerate() {
        // SAFETY: the caller's contract; only float types have ragged rows.
        unsafe { (it.dequant)(it.w.dtype(), it.w.row(n0 + i), c0, &mut row[..valid]) };
        row[valid..].fill(0.0);
    }
}

#[inline(always)]
unsafe fn add_strip_low<S: Simd, const MR: usize, const NV: usize>(
    acc: &mut [[S::F; NV]; MR],
    low: Option<LowRank<'_>>,
    strip: *const f32,
    m0: usize,
    rows: usize,
) {
    let Some(l) = low else { return };
    // SAFETY: h has r columns for each row; the strip was packed for r rows of 32.
    unsafe {
        let h: [*const f32; MR] = core::array::from_fn(|m| l.h.as_ptr().add((m0 + m.min(rows - 1)) * l.rank));
        f32_tile::<S, MR, NV>(acc, l.rank, &h, 1, strip, NN_STRIP);
    }
}

/// The integer form: W's columns are quantized anew along its rows, in groups of 32 rows, so that the
/// tile of the forward serves the sum over rows too.
#[inline(always)]
unsafe fn nn_int8<S: Simd, const MR: usize, const NV: usize, const START: bool, const ACC16: usize>(
    it: &NnItem<'_>,
    dy: QuantActs<'_>,
    c0: usize,
    low: &[f32],
    mut scratch: &mut [f32],
) {
    let (n, k, nr) = (it.w.rows(), it.w.cols(), NV * S::LANES);
    let group = take(&mut scratch, NN_STRIP * 32);
    let codes = take(&mut scratch, NN_STRIP * n / 4);
    let scale = take(&mut scratch, NN_STRIP * n / 32);
    // SAFETY: the caller's contract; n and k are multiples of 32, panels have the sizes written.
    unsafe {
        for g in 0..n / 32 {
            decode_strip(it, 32 * g, 32, c0, NN_STRIP, group);
            for sub in 0..NN_STRIP / nr {
                let codes = codes.as_mut_ptr().cast::<u8>().add(sub * nr * n + g * 32 * nr);
                let scale = scale.as_mut_ptr().add(sub * nr * (n / 32) + g * nr);
                quantize_columns::<S, NV>(group.as_ptr().add(sub * nr), codes, scale);
            }
        }
        for m0 in (0..it.m).step_by(MR) {
            let rows = MR.min(it.m - m0);
            let at = |m: usize| m0 + m.min(rows - 1);
            let x = ActRows::<MR> {
                codes: core::array::from_fn(|m| dy.codes.as_ptr().add(at(m) * n)),
                scale: core::array::from_fn(|m| dy.scale.as_ptr().add(at(m) * (n / 32))),
                bias_sum: core::array::from_fn(|m| dy.bias_sum32.as_ptr().add(at(m) * (n / 32))),
                start: core::array::from_fn(|m| dy.start32.as_ptr().add(at(m) * (n / 32))),
            };
            for sub in 0..NN_STRIP / nr {
                let scale = scale.as_ptr().add(sub * nr * (n / 32));
                let codes = codes.as_ptr().cast::<u8>().add(sub * nr * n);
                let panel = CodePanel { codes, scale, bias: core::ptr::null() };
                let mut acc = [[S::zero(); NV]; MR];
                int8_tile::<S, MR, NV, 32, false, START, ACC16>(&mut acc, n, &x, panel);
                add_strip_low::<S, MR, NV>(&mut acc, it.low, low.as_ptr().wrapping_add(sub * nr), m0, rows);
                let y = it.dx.add(m0 * k + c0 + sub * nr);
                store_tile::<S, MR, NV>(&acc, rows, nr, y, k, it.accumulate);
            }
        }
    }
}

/// Quantizes NR columns of 32 rows (of 32 elements each) to int8, a scale per column.
#[inline(always)]
unsafe fn quantize_columns<S: Simd, const NV: usize>(group: *const f32, codes: *mut u8, scale: *mut f32) {
    // SAFETY: the caller's panels.
    unsafe {
        for v in 0..NV {
            let column = group.add(v * S::LANES);
            let mut top = S::zero();
            for i in 0..32 {
                top = S::max(top, S::abs(S::load(column.add(i * NN_STRIP))));
            }
            // A column of zeros gets a tiny scale and codes of zero.
            let inv = S::div(S::splat(127.0), S::max(top, S::splat(1e-30)));
            S::store(scale.add(v * S::LANES), S::mul(top, S::splat(1.0 / 127.0)));
            for q in 0..8 {
                let row = column.add(4 * q * NN_STRIP);
                let rows = [
                    S::mul(S::load(row), inv),
                    S::mul(S::load(row.add(NN_STRIP)), inv),
                    S::mul(S::load(row.add(2 * NN_STRIP)), inv),
                    S::mul(S::load(row.add(3 * NN_STRIP)), inv),
                ];
                let t = S::CODES_TOGETHER / 4;
                S::store_quads(codes.add(((q / t * NV + v) * S::LANES * t + q % t) * 4), rows);
            }
        }
    }
}
