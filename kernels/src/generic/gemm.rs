//! The matrix products on stored weights: one item is one strip of output columns for all rows.

use super::simd::{CodeClass, Int8, Simd};
use super::tile::{ActTile, CodePanel, f32_tile, int8_tile, row_pointers, store_tile};
use crate::acts::QuantActs;
use crate::block::DType;
use crate::items::{DequantFn, LowRank, NnItem, NtItem, Rows, StripFn, TnItem};
use crate::view::QMatrix;

/// Columns the input gradient decodes at once: one block of 32.
pub const NN_STRIP: usize = 32;
/// Weight rows the input gradient decodes at once.
pub const NN_CHUNK: usize = 256;

/// Rows of x and dy the weight gradient sums at once: their panel stays in the L1 cache.
const TN_CHUNK: usize = 256;

/// f32 words of scratch per weight gradient item.
pub const TN_SCRATCH_WORDS: usize = TN_CHUNK * 32;

/// f32 words of scratch per forward item: W has rows of `k` elements, the adapter rank r.
pub fn nt_scratch_words(k: usize, rank: usize) -> usize {
    // The widest panel has 32 columns and is largest in f32. The rows decoded before transposing (16 rows of
    // codes, scales and biases) fit in the part an integer panel leaves free.
    32 * k + 16 * NN_STRIP + 32 * rank + 64
}

/// f32 words of scratch per input gradient item: W has `n` rows.
pub fn nn_scratch_words(n: usize, rank: usize) -> usize {
    let int8 = NN_STRIP * 32 + NN_STRIP * n / 4 + NN_STRIP * (n / 32 + 1);
    int8.max(NN_CHUNK * NN_STRIP) + NN_STRIP * rank + 64
}

/// Takes `n` words off the front of the scratch.
pub(crate) fn take<'s>(scratch: &mut &'s mut [f32], n: usize) -> &'s mut [f32] {
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
pub unsafe fn nt_item<S: Int8, const F_MR: usize, const I_MR: usize, const NV: usize>(
    it: &NtItem<'_>,
    n0: usize,
    scratch: &mut [f32],
) {
    // SAFETY: the caller's contract, passed on.
    unsafe {
        match it.x {
            Rows::F32(x) => nt_f32::<S, F_MR, NV>(it, x, n0, scratch),
            Rows::Int8(acts) => nt_class::<S, I_MR, NV>(it, acts, n0, scratch),
            Rows::Bf16(_) => unreachable!("bf16 is for input gradients"),
        }
    }
}

/// The integer tile for the class this ISA assigns to W's type.
#[inline(always)]
unsafe fn nt_class<S: Int8, const MR: usize, const NV: usize>(
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
    // SAFETY: the caller's contract; the panel has k rows of nr.
    unsafe {
        let panel = pack_f32::<S>(it, n0, nr, &mut scratch);
        let gain = pack_gain(it.gain, n0, nr, &mut scratch);
        let low = pack_low::<S, NV>(it.low, n, n0, scratch);
        for m0 in (0..it.m).step_by(MR) {
            let rows = MR.min(it.m - m0);
            let mut acc = [[S::zero(); NV]; MR];
            let a = row_pointers::<f32, MR>(x.as_ptr().add(m0 * k), k, rows);
            f32_tile::<S, MR, NV>(&mut acc, k, &a, 1, panel, nr);
            add_low::<S, MR, NV>(&mut acc, it.low, (low, nr), m0, rows);
            scale_tile::<S, MR, NV>(&mut acc, gain);
            store_tile::<S, MR, NV>(&acc, rows, valid, it.y.add(m0 * n + n0), n, it.accumulate);
        }
    }
}

/// Decodes nr rows of W into the f32 tile's panel `[k][nr]`, strip of columns by strip of columns.
#[inline(always)]
unsafe fn pack_f32<S: Simd>(it: &NtItem<'_>, n0: usize, nr: usize, scratch: &mut &mut [f32]) -> *const f32 {
    let (k, valid) = (it.w.cols(), nr.min(it.w.rows() - n0));
    let panel = take(scratch, k * nr);
    let (strip, _) = take(scratch, S::LANES * NN_STRIP).as_chunks_mut::<NN_STRIP>();
    if valid < nr {
        panel.fill(0.0);
    }
    for j0 in (0..valid).step_by(S::LANES) {
        let rows = S::LANES.min(valid - j0);
        for c0 in (0..k).step_by(NN_STRIP) {
            let cols = NN_STRIP.min(k - c0);
            // SAFETY: the caller's contract.
            unsafe { decode_strip(&it.w, it.strip, it.dequant, n0 + j0, c0, cols, &mut strip[..rows]) };
            let to = &mut panel[c0 * nr + j0..];
            transpose_rows::<S>(strip.as_flattened(), NN_STRIP, cols, rows, to, nr);
        }
    }
    panel.as_ptr()
}

#[inline(always)]
unsafe fn nt_int8<
    S: Int8,
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
        let gain = pack_gain(it.gain, n0, nr, &mut scratch);
        let low = pack_low::<S, NV>(it.low, n, n0, scratch);
        let groups = k / G;
        let (bias_sum, start) =
            if G == 16 { (acts.bias_sum16, acts.start16) } else { (acts.bias_sum32, acts.start32) };
        for m0 in (0..it.m).step_by(MR) {
            let rows = MR.min(it.m - m0);
            let x = ActTile {
                codes: acts.codes.as_ptr().add(m0 * k),
                scale: acts.scale.as_ptr().add(m0 * (k / 32)),
                bias_sum: bias_sum.as_ptr().add(m0 * groups),
                start: start.as_ptr().add(m0 * groups),
            };
            let mut acc = [[S::zero(); NV]; MR];
            int8_tile::<S, MR, NV, G, BIAS, START, ACC16>(&mut acc, k, x, panel);
            add_low::<S, MR, NV>(&mut acc, it.low, (low, nr), m0, rows);
            scale_tile::<S, MR, NV>(&mut acc, gain);
            store_tile::<S, MR, NV>(&acc, rows, valid, it.y.add(m0 * n + n0), n, it.accumulate);
        }
    }
}

/// Decodes NR rows of W into the integer tile's panel: LANES rows at a time, then transposed.
#[inline(always)]
unsafe fn pack_codes<S: Int8, const NV: usize, const G: usize, const BIAS: bool>(
    it: &NtItem<'_>,
    class: CodeClass,
    n0: usize,
    scratch: &mut &mut [f32],
) -> CodePanel {
    let (k, nr, dtype) = (it.w.cols(), NV * S::LANES, it.w.dtype());
    let (valid, groups) = (nr.min(it.w.rows() - n0), k / G);
    let codes = take(scratch, k * nr / 4);
    let scale = take(scratch, groups * nr);
    let bias = take(scratch, groups * nr);
    let row_codes = take(scratch, S::LANES * k / 4);
    let row_scale = take(scratch, S::LANES * groups);
    let row_bias = take(scratch, S::LANES * groups);
    if valid < nr {
        codes.fill(0.0);
        scale.fill(0.0);
        bias.fill(0.0);
    }
    let own_bias = if dtype.has_bias() { groups } else { 0 };
    for j0 in (0..valid).step_by(S::LANES) {
        let rows = S::LANES.min(valid - j0);
        // SAFETY: an f32 slice of n words is 4n bytes, any of which is a valid i8.
        let bytes = unsafe { core::slice::from_raw_parts_mut(row_codes.as_mut_ptr().cast::<i8>(), rows * k) };
        for j in 0..rows {
            let own = j * groups..j * groups + own_bias;
            let (codes, scale) =
                (&mut bytes[j * k..(j + 1) * k], &mut row_scale[j * groups..(j + 1) * groups]);
            // SAFETY: the caller's contract.
            unsafe { (it.unpack)(dtype, it.w.row(n0 + j0 + j), 0, codes, scale, &mut row_bias[own]) };
        }
        let offset = class.offset as i8;
        bytes.iter_mut().for_each(|c| *c = c.wrapping_add(offset));
        if BIAS {
            let fold = if class.start_at_sum { 0.0 } else { class.offset as f32 };
            for (b, s) in row_bias[..rows * groups].iter_mut().zip(&*row_scale) {
                *b = (if own_bias > 0 { *b } else { 0.0 }) - s * fold;
            }
            transpose_rows::<S>(row_bias, groups, groups, rows, &mut bias[j0..], nr);
        }
        transpose_rows::<S>(row_scale, groups, groups, rows, &mut scale[j0..], nr);
        if S::CODES_TOGETHER == 8 {
            transpose_pairs(row_codes, k / 8, rows, &mut codes[2 * j0..], nr);
        } else {
            transpose_rows::<S>(row_codes, k / 4, k / 4, rows, &mut codes[j0..], nr);
        }
    }
    CodePanel { codes: codes.as_ptr().cast(), scale: scale.as_ptr(), bias: bias.as_ptr() }
}

/// dst[c·dst_row + j] = src[j·src_row + c] for `cols` columns of up to LANES rows of words of any meaning.
#[inline(always)]
fn transpose_rows<S: Simd>(
    src: &[f32],
    src_row: usize,
    cols: usize,
    rows: usize,
    dst: &mut [f32],
    dst_row: usize,
) {
    let whole = if rows == S::LANES { cols / S::LANES * S::LANES } else { 0 };
    assert!(cols <= src_row && src.len() >= rows * src_row);
    assert!(cols == 0 || dst.len() >= (cols - 1) * dst_row + rows);
    for c in (0..whole).step_by(S::LANES) {
        // SAFETY: LANES rows and columns from c lie within both, as asserted; S's features are present
        // where any kernel of S runs.
        unsafe { S::transpose(src.as_ptr().add(c), src_row, dst.as_mut_ptr().add(c * dst_row), dst_row) };
    }
    for c in whole..cols {
        for j in 0..rows {
            // SAFETY: as above.
            unsafe { *dst.get_unchecked_mut(c * dst_row + j) = *src.get_unchecked(j * src_row + c) };
        }
    }
}

/// dst[c·dst_row + j] = src[j·cols + c], of pairs of words.
#[inline(always)]
fn transpose_pairs(src: &[f32], cols: usize, rows: usize, dst: &mut [f32], dst_row: usize) {
    assert!(src.len() >= 2 * rows * cols && (cols == 0 || dst.len() >= 2 * ((cols - 1) * dst_row + rows)));
    let (from, to) = (src.as_ptr().cast::<u64>(), dst.as_mut_ptr().cast::<u64>());
    for j in 0..rows {
        for c in 0..cols {
            // SAFETY: both pairs lie within their slices, as asserted; any bits are two words.
            unsafe { to.add(c * dst_row + j).write_unaligned(from.add(j * cols + c).read_unaligned()) };
        }
    }
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

/// The strip's gains, zero-padded to `nr`; null where there are none.
#[inline(always)]
fn pack_gain(gain: Option<&[f32]>, n0: usize, nr: usize, scratch: &mut &mut [f32]) -> *const f32 {
    let Some(c) = gain else { return core::ptr::null() };
    let (panel, valid) = (take(scratch, nr), nr.min(c.len() - n0));
    panel[..valid].copy_from_slice(&c[n0..n0 + valid]);
    panel[valid..].fill(0.0);
    panel.as_ptr()
}

#[inline(always)]
unsafe fn scale_tile<S: Simd, const MR: usize, const NV: usize>(
    acc: &mut [[S::F; NV]; MR],
    gain: *const f32,
) {
    if gain.is_null() {
        return;
    }
    for v in 0..NV {
        // SAFETY: the panel has NV vectors.
        unsafe {
            let c = S::load(gain.add(v * S::LANES));
            for m in 0..MR {
                acc[m][v] = S::mul(acc[m][v], c);
            }
        }
    }
}

/// Adds h·b to a tile of rows `m0..m0 + rows`; the panel holds b's part in rows of `panel_row`.
#[inline(always)]
pub(super) unsafe fn add_low<S: Simd, const MR: usize, const NV: usize>(
    acc: &mut [[S::F; NV]; MR],
    low: Option<LowRank<'_>>,
    (panel, panel_row): (*const f32, usize),
    m0: usize,
    rows: usize,
) {
    let Some(l) = low else { return };
    // SAFETY: h has r columns for each row; the panel was packed for r rows.
    unsafe {
        let h = row_pointers::<f32, MR>(l.h.as_ptr().add(m0 * l.rank), l.rank, rows);
        f32_tile::<S, MR, NV>(acc, l.rank, &h, 1, panel, panel_row);
    }
}

/// The strip of `NN_STRIP` input columns from `c0`, summed over all rows of W.
///
/// # Safety
/// As for [`nt_item`].
#[inline(always)]
pub unsafe fn nn_item<S: Int8, const F_MR: usize, const I_MR: usize, const NV: usize>(
    it: &NnItem<'_>,
    c0: usize,
    mut scratch: &mut [f32],
) {
    let valid = NN_STRIP.min(it.w.cols() - c0);
    let low = pack_strip_low(it.low, it.w.cols(), c0, &mut scratch);
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
            Rows::Bf16(_) => unreachable!("bf16 has its own item"),
        }
    }
}

/// The strip's columns of b `[r, k]` as rows of 32, zero-padded.
#[inline(always)]
pub(super) fn pack_strip_low<'s>(
    low: Option<LowRank<'_>>,
    k: usize,
    c0: usize,
    scratch: &mut &'s mut [f32],
) -> &'s [f32] {
    let valid = NN_STRIP.min(k - c0);
    let strip = take(scratch, NN_STRIP * low.map_or(0, |l| l.rank));
    if let Some(l) = low {
        for j in 0..l.rank {
            let dst = &mut strip[j * NN_STRIP..(j + 1) * NN_STRIP];
            dst[..valid].copy_from_slice(&l.b[j * k + c0..j * k + c0 + valid]);
            dst[valid..].fill(0.0);
        }
    }
    strip
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
    let (panel, _) = take(&mut scratch, NN_CHUNK * NN_STRIP).as_chunks_mut::<NN_STRIP>();
    for n0 in (0..n).step_by(NN_CHUNK) {
        let chunk = NN_CHUNK.min(n - n0);
        // SAFETY: c0 is a multiple of 32 within the row; block types have whole blocks of 32.
        unsafe { decode_strip(&it.w, it.strip, it.dequant, n0, c0, valid, &mut panel[..chunk]) };
        let last = n0 + chunk == n;
        // SAFETY: the caller's contract; dy has n columns, dx k.
        unsafe {
            for m0 in (0..it.m).step_by(MR) {
                let rows = MR.min(it.m - m0);
                let a = row_pointers::<f32, MR>(dy.as_ptr().add(m0 * n + n0), n, rows);
                for sub in (0..valid).step_by(nr) {
                    let mut acc = [[S::zero(); NV]; MR];
                    let panel = panel.as_ptr().cast::<f32>().add(sub);
                    f32_tile::<S, MR, NV>(&mut acc, chunk, &a, 1, panel, NN_STRIP);
                    if last {
                        let low = (low.as_ptr().wrapping_add(sub), NN_STRIP);
                        add_low::<S, MR, NV>(&mut acc, it.low, low, m0, rows);
                    }
                    let y = it.dx.add(m0 * k + c0 + sub);
                    let add = it.accumulate || n0 > 0;
                    store_tile::<S, MR, NV>(&acc, rows, nr.min(valid - sub), y, k, add);
                }
            }
        }
    }
}

/// Columns `c0..c0 + valid` of W's rows from `n0`, as rows of 32, zero-padded.
#[inline(always)]
pub(super) unsafe fn decode_strip(
    w: &QMatrix<'_>,
    strip: StripFn,
    dequant: DequantFn,
    n0: usize,
    c0: usize,
    valid: usize,
    out: &mut [[f32; NN_STRIP]],
) {
    if valid == NN_STRIP {
        let bytes = w.rows_range(n0, n0 + out.len()).bytes();
        // SAFETY: the caller's contract.
        return unsafe { strip(w.dtype(), bytes, w.row_bytes(), c0, out) };
    }
    for (i, row) in out.iter_mut().enumerate() {
        // SAFETY: the caller's contract; only float types have ragged rows.
        unsafe { dequant(w.dtype(), w.row(n0 + i), c0, &mut row[..valid]) };
        row[valid..].fill(0.0);
    }
}

/// The strip of NV·LANES columns of dw from `k0`, for all its rows.
///
/// # Safety
/// dy is m × n, x is m × k, dw covers n × k; `k0` is a multiple of the strip below k, no other item writes
/// the strip, the scratch has [`TN_SCRATCH_WORDS`], and the CPU has S's features.
#[inline(always)]
pub unsafe fn tn_item<S: Simd, const MR: usize, const NV: usize>(
    it: &TnItem<'_>,
    k0: usize,
    mut scratch: &mut [f32],
) {
    let (n, k, nr) = (it.n, it.k, NV * S::LANES);
    let valid = nr.min(k - k0);
    let panel = take(&mut scratch, TN_CHUNK * nr);
    for m0 in (0..it.m).step_by(TN_CHUNK) {
        let chunk = TN_CHUNK.min(it.m - m0);
        for (t, row) in panel[..chunk * nr].chunks_exact_mut(nr).enumerate() {
            let at = (m0 + t) * k + k0;
            row[..valid].copy_from_slice(&it.x[at..at + valid]);
            row[valid..].fill(0.0);
        }
        // SAFETY: the caller's contract; the panel has `chunk` rows of nr.
        unsafe {
            for n0 in (0..n).step_by(MR) {
                let rows = MR.min(n - n0);
                let a = row_pointers::<f32, MR>(it.dy.as_ptr().add(m0 * n + n0), 1, rows);
                let mut acc = [[S::zero(); NV]; MR];
                f32_tile::<S, MR, NV>(&mut acc, chunk, &a, n, panel.as_ptr(), nr);
                let add = it.accumulate || m0 > 0;
                store_tile::<S, MR, NV>(&acc, rows, valid, it.dw.add(n0 * k + k0), k, add);
            }
        }
    }
}

/// The integer form: W's columns are requantized in groups of 32 rows, so the forward's tile can also sum over
/// rows.
#[inline(always)]
unsafe fn nn_int8<S: Int8, const MR: usize, const NV: usize, const START: bool, const ACC16: usize>(
    it: &NnItem<'_>,
    dy: QuantActs<'_>,
    c0: usize,
    low: &[f32],
    mut scratch: &mut [f32],
) {
    let (n, k, nr) = (it.w.rows(), it.w.cols(), NV * S::LANES);
    let (group, _) = take(&mut scratch, NN_STRIP * 32).as_chunks_mut::<NN_STRIP>();
    let codes = take(&mut scratch, NN_STRIP * n / 4);
    let groups = n / 32;
    let scale = take(&mut scratch, NN_STRIP * groups);
    // SAFETY: the caller's contract; n and k are multiples of 32, panels have the sizes written.
    unsafe {
        for g in 0..groups {
            decode_strip(&it.w, it.strip, it.dequant, 32 * g, c0, NN_STRIP, group);
            for sub in 0..NN_STRIP / nr {
                let codes = codes.as_mut_ptr().cast::<u8>().add(sub * nr * n + g * 32 * nr);
                let scale = scale.as_mut_ptr().add(sub * nr * groups + g * nr);
                quantize_columns::<S, NV>(group.as_ptr().cast::<f32>().add(sub * nr), codes, scale);
            }
        }
        for m0 in (0..it.m).step_by(MR) {
            let rows = MR.min(it.m - m0);
            let x = ActTile {
                codes: dy.codes.as_ptr().add(m0 * n),
                scale: dy.scale.as_ptr().add(m0 * groups),
                bias_sum: dy.bias_sum32.as_ptr().add(m0 * groups),
                start: dy.start32.as_ptr().add(m0 * groups),
            };
            for sub in 0..NN_STRIP / nr {
                let scale = scale.as_ptr().add(sub * nr * groups);
                let codes = codes.as_ptr().cast::<u8>().add(sub * nr * n);
                let panel = CodePanel { codes, scale, bias: core::ptr::null() };
                let mut acc = [[S::zero(); NV]; MR];
                int8_tile::<S, MR, NV, 32, false, START, ACC16>(&mut acc, n, x, panel);
                let low = (low.as_ptr().wrapping_add(sub * nr), NN_STRIP);
                add_low::<S, MR, NV>(&mut acc, it.low, low, m0, rows);
                let y = it.dx.add(m0 * k + c0 + sub * nr);
                store_tile::<S, MR, NV>(&acc, rows, nr, y, k, it.accumulate);
            }
        }
    }
}

/// Quantizes NR columns of 32 rows (of 32 elements each) to int8, a scale per column.
#[inline(always)]
unsafe fn quantize_columns<S: Int8, const NV: usize>(group: *const f32, codes: *mut u8, scale: *mut f32) {
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
