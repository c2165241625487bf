//! The two register tiles all matrix products are built from: f32 × f32 and int8 × codes.

use super::simd::{Int8, Simd};

/// The first elements of MR rows of stride `row`; rows past `rows` repeat the last.
///
/// # Safety
/// `rows` rows start at `first`.
#[inline(always)]
pub unsafe fn row_pointers<T, const MR: usize>(first: *const T, row: usize, rows: usize) -> [*const T; MR] {
    let mut pointers = [first; MR];
    for m in 1..MR {
        // SAFETY: the caller's contract.
        pointers[m] = unsafe { first.add(m.min(rows - 1) * row) };
    }
    pointers
}

/// acc[m][v] += Σ_k a[m·a_row + k·a_step] · b[k·b_row + v·LANES ..]
///
/// # Safety
/// All addressed elements are readable; S's features are present.
#[inline(always)]
pub unsafe fn f32_tile<S: Simd, const MR: usize, const NV: usize>(
    acc: &mut [[S::F; NV]; MR],
    k: usize,
    a: &[*const f32; MR],
    a_step: usize,
    b: *const f32,
    b_row: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let done = if a_step == 1 { S::fma_steps::<MR, NV>(acc, k, a, b, b_row) } else { 0 };
        for i in done..k {
            let bp = b.add(i * b_row);
            let mut bv = [S::zero(); NV];
            for v in 0..NV {
                bv[v] = S::load(bp.add(v * S::LANES));
            }
            for m in 0..MR {
                let av = S::splat(*a[m].add(i * a_step));
                for v in 0..NV {
                    acc[m][v] = S::fma(av, bv[v], acc[m][v]);
                }
            }
        }
    }
}

/// One tile's quantized activations; MR values lie together everywhere (see `QuantActs`).
#[derive(Clone, Copy)]
pub struct ActTile {
    /// `[k/32][MR][32]` codes.
    pub codes: *const i8,
    /// Scale per block of 32, `[k/32][MR]`.
    pub scale: *const f32,
    /// Scale·Σcodes per group (of 16 or 32, as the panel's), `[k/G][MR]`.
    pub bias_sum: *const f32,
    /// −128·Σcodes per group, `[k/G][MR]`.
    pub start: *const i32,
}

/// A packed strip of NV·LANES weight rows.
#[derive(Clone, Copy)]
pub struct CodePanel {
    /// `[k/C][NR][C]` codes, C being the ISA's `CODES_TOGETHER`.
    pub codes: *const u8,
    /// `[k/G][NR]`.
    pub scale: *const f32,
    /// `[k/G][NR]`, read where BIAS.
    pub bias: *const f32,
}

/// acc += activations · panelᵀ over k columns in groups of G.
///
/// # Safety
/// Pointers cover k columns (k a multiple of 32); S's features are present.
#[inline(always)]
pub unsafe fn int8_tile<
    S: Int8,
    const MR: usize,
    const NV: usize,
    const G: usize,
    const BIAS: bool,
    const START: bool,
    const ACC16: usize,
>(
    acc: &mut [[S::F; NV]; MR],
    k: usize,
    x: ActTile,
    w: CodePanel,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let nr = NV * S::LANES;
        for g in 0..k / G {
            let mut ints = [[S::splat_i32(S::SUMS_START); NV]; MR];
            if START {
                for m in 0..MR {
                    ints[m] = [S::splat_i32(S::SUMS_START + *x.start.add(g * MR + m)); NV];
                }
            }
            let block = g * G / 32;
            let codes = x.codes.add(block * MR * 32 + g * G % 32);
            let mut xp = [codes; MR];
            for m in 1..MR {
                xp[m] = codes.add(m * 32);
            }
            S::dot_quads::<MR, NV, ACC16>(&mut ints, G / 4, w.codes.add(g * G * nr), &xp);
            for v in 0..NV {
                let ws = S::load(w.scale.add(g * nr + v * S::LANES));
                for m in 0..MR {
                    let s = S::mul(ws, S::splat(*x.scale.add(block * MR + m)));
                    acc[m][v] = S::fma(S::to_f32(ints[m][v]), s, acc[m][v]);
                }
                if BIAS {
                    let wb = S::load(w.bias.add(g * nr + v * S::LANES));
                    for m in 0..MR {
                        acc[m][v] = S::fma(wb, S::splat(*x.bias_sum.add(g * MR + m)), acc[m][v]);
                    }
                }
            }
        }
    }
}

/// Adds to or overwrites up to MR × `n` elements of y with the tile.
///
/// # Safety
/// `y` covers `rows` rows of stride `y_row` with `n` elements each; S's features are present.
#[inline(always)]
pub unsafe fn store_tile<S: Simd, const MR: usize, const NV: usize>(
    acc: &[[S::F; NV]; MR],
    rows: usize,
    n: usize,
    y: *mut f32,
    y_row: usize,
    accumulate: bool,
) {
    // SAFETY: the caller's contract.
    unsafe {
        if n == NV * S::LANES {
            for m in 0..MR {
                if m < rows {
                    for v in 0..NV {
                        let p = y.add(m * y_row + v * S::LANES);
                        let old = if accumulate { S::load(p) } else { S::zero() };
                        S::store(p, if accumulate { S::add(old, acc[m][v]) } else { acc[m][v] });
                    }
                }
            }
            return;
        }
        // Ragged right edge: through a buffer of the widest tile (4 vectors of 16).
        let mut buf = [0.0f32; 64];
        for m in 0..rows.min(MR) {
            for v in 0..NV {
                S::store(buf.as_mut_ptr().add(v * S::LANES), acc[m][v]);
            }
            for (i, b) in buf.iter().enumerate().take(n) {
                let p = y.add(m * y_row + i);
                *p = if accumulate { *p + b } else { *b };
            }
        }
    }
}
