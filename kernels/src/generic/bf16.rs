//! The input gradient in bf16 with f32 sums, over the instruction sets that multiply bf16: half of f32's bytes
//! and at least twice its products per instruction, with f32's range.

use super::gemm::{NN_CHUNK, NN_STRIP, add_low, decode_strip, pack_strip_low, take};
use super::simd::Simd;
use super::tile::{row_pointers, store_tile};
use crate::items::NnItem;

/// An instruction set's bf16 operations, in addition to its f32 vectors. As in [`Simd`], every method may only
/// run where the CPU has the features.
pub trait Bf16: Simd {
    /// Successive elements of a sum that one instruction multiplies; panels store them together.
    const TOGETHER: usize;
    /// Rows of the tile.
    const MR: usize;

    /// Rounds LANES f32 to bf16, to nearest, ties to even.
    unsafe fn store_rounded(p: *mut u16, v: Self::F);

    /// Rounds LANES columns of TOGETHER rows, `row` f32 apart, and writes `[LANES][TOGETHER]`.
    unsafe fn round_columns(p: *mut u16, column: *const f32, row: usize);

    /// acc[m][v] += Σ over `k` of a[m] · panel, the panel being `[k/TOGETHER][NV·LANES][TOGETHER]` and k a
    /// multiple of 32.
    unsafe fn dot<const MR: usize, const NV: usize>(
        acc: &mut [[Self::F; NV]; MR],
        k: usize,
        a: &[*const u16; MR],
        panel: *const u16,
    );
}

/// Rounds a row to bf16; its length is a multiple of 32.
///
/// # Safety
/// `out` has as many elements as x, and the CPU has S's features.
#[inline(always)]
pub unsafe fn round_row<S: Bf16>(x: &[f32], out: *mut u16) {
    for i in (0..x.len()).step_by(S::LANES) {
        // SAFETY: the caller's contract.
        unsafe { S::store_rounded(out.add(i), S::load(x.as_ptr().add(i))) }
    }
}

/// The strip of `NN_STRIP` input columns from `c0`, summed over all rows of W, for dy in bf16 `[m, n]`.
///
/// # Safety
/// As for [`super::gemm::nn_item`]; n and k are multiples of 32.
#[inline(always)]
pub unsafe fn nn_item<S: Bf16, const MR: usize, const NV: usize>(
    it: &NnItem<'_>,
    dy: &[u16],
    c0: usize,
    mut scratch: &mut [f32],
) {
    let (n, k, nr) = (it.w.rows(), it.w.cols(), NV * S::LANES);
    let low = pack_strip_low(it.low, k, c0, &mut scratch);
    let (group, _) = take(&mut scratch, NN_STRIP * 32).as_chunks_mut::<NN_STRIP>();
    let panel = take(&mut scratch, NN_CHUNK * NN_STRIP / 2).as_mut_ptr().cast::<u16>();
    for n0 in (0..n).step_by(NN_CHUNK) {
        let chunk = NN_CHUNK.min(n - n0);
        // SAFETY: the caller's contract; panels have the sizes written.
        unsafe {
            for g in (0..chunk).step_by(32) {
                decode_strip(&it.w, it.strip, it.dequant, n0 + g, c0, NN_STRIP, group);
                for sub in (0..NN_STRIP).step_by(nr) {
                    let to = panel.add(sub * chunk + g * nr);
                    pack_columns::<S, NV>(group.as_ptr().cast::<f32>().add(sub), to);
                }
            }
            for m0 in (0..it.m).step_by(MR) {
                let rows = MR.min(it.m - m0);
                let a = row_pointers::<u16, MR>(dy.as_ptr().add(m0 * n + n0), n, rows);
                for sub in (0..NN_STRIP).step_by(nr) {
                    let mut acc = [[S::zero(); NV]; MR];
                    S::dot::<MR, NV>(&mut acc, chunk, &a, panel.add(sub * chunk));
                    if n0 + chunk == n {
                        let low = (low.as_ptr().wrapping_add(sub), NN_STRIP);
                        add_low::<S, MR, NV>(&mut acc, it.low, low, m0, rows);
                    }
                    let y = it.dx.add(m0 * k + c0 + sub);
                    store_tile::<S, MR, NV>(&acc, rows, nr, y, k, it.accumulate || n0 > 0);
                }
            }
        }
    }
}

/// NV·LANES columns of 32 rows of 32 into the panel.
#[inline(always)]
unsafe fn pack_columns<S: Bf16, const NV: usize>(column: *const f32, panel: *mut u16) {
    let (t, lanes) = (S::TOGETHER, S::LANES);
    for i in 0..32 / t {
        for v in 0..NV {
            // SAFETY: the caller's panels.
            unsafe {
                let from = column.add(i * t * NN_STRIP + v * lanes);
                S::round_columns(panel.add((i * NV + v) * lanes * t), from, NN_STRIP);
            }
        }
    }
}
