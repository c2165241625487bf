//! NEON with bf16 matrix products (Armv8.6): `bfmmla` multiplies two rows by two columns, four deep.

use core::arch::aarch64::*;
use core::arch::asm;

use super::i8mm::I8mm;
use crate::generic::bf16::Bf16;
use crate::generic::simd::Simd;

impl Bf16 for I8mm {
    const TOGETHER: usize = 4;
    const MR: usize = 8;

    #[inline(always)]
    unsafe fn store_rounded(p: *mut u16, v: float32x4_t) {
        // SAFETY: bf16 by the trait's contract; p is writable for 4 bf16.
        unsafe { vst1_u16(p, bfcvtn(v)) }
    }

    #[inline(always)]
    unsafe fn round_columns(p: *mut u16, column: *const f32, row: usize) {
        // SAFETY: as in store_rounded; 4 columns of 4 rows are readable, p is writable for 16 bf16, which the
        // store interleaves: column by column.
        unsafe {
            let rows = uint16x4x4_t(
                bfcvtn(vld1q_f32(column)),
                bfcvtn(vld1q_f32(column.add(row))),
                bfcvtn(vld1q_f32(column.add(2 * row))),
                bfcvtn(vld1q_f32(column.add(3 * row))),
            );
            vst4_u16(p, rows);
        }
    }

    #[inline(always)]
    unsafe fn dot<const MR: usize, const NV: usize>(
        acc: &mut [[float32x4_t; NV]; MR],
        k: usize,
        a: &[*const u16; MR],
        panel: *const u16,
    ) {
        const { assert!(MR.is_multiple_of(2), "bfmmla takes rows in pairs") }
        // SAFETY: the trait's contract.
        unsafe {
            // Squares of rows 2m, 2m + 1 by columns 0–1 and 2–3 of each vector; the upper half of the
            // array is not used: a length of MR / 2 can't be written.
            let mut squares = [[[Self::zero(); 2]; NV]; MR];
            for i in 0..k / 4 {
                let panel = panel.add(i * NV * 16);
                let mut columns = [[vdupq_n_u16(0); 2]; NV];
                for v in 0..NV {
                    columns[v] = [vld1q_u16(panel.add(v * 16)), vld1q_u16(panel.add(v * 16 + 8))];
                }
                for m in 0..MR / 2 {
                    let pair = vcombine_u16(vld1_u16(a[2 * m].add(4 * i)), vld1_u16(a[2 * m + 1].add(4 * i)));
                    for v in 0..NV {
                        squares[m][v][0] = bfmmla(squares[m][v][0], pair, columns[v][0]);
                        squares[m][v][1] = bfmmla(squares[m][v][1], pair, columns[v][1]);
                    }
                }
            }
            for m in 0..MR / 2 {
                for v in 0..NV {
                    let [left, right] = squares[m][v];
                    let (left, right) = (vreinterpretq_f64_f32(left), vreinterpretq_f64_f32(right));
                    let upper = vreinterpretq_f32_f64(vzip1q_f64(left, right));
                    let lower = vreinterpretq_f32_f64(vzip2q_f64(left, right));
                    acc[2 * m][v] = vaddq_f32(acc[2 * m][v], upper);
                    acc[2 * m + 1][v] = vaddq_f32(acc[2 * m + 1][v], lower);
                }
            }
        }
    }
}

/// Four f32 rounded to bf16.
///
/// # Safety
/// The CPU has bf16.
#[target_feature(enable = "neon,bf16")]
#[inline]
unsafe fn bfcvtn(x: float32x4_t) -> uint16x4_t {
    let rounded: uint16x4_t;
    // SAFETY: the instruction is enabled here and touches only its registers.
    unsafe {
        asm!(
            "bfcvtn {r:v}.4h, {x:v}.4s",
            r = out(vreg) rounded, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    rounded
}

/// `sum` as a 2 × 2 square plus rows · columnsᵀ, each two times four bf16.
///
/// # Safety
/// The CPU has bf16.
#[target_feature(enable = "neon,bf16")]
#[inline]
unsafe fn bfmmla(mut sum: float32x4_t, rows: uint16x8_t, columns: uint16x8_t) -> float32x4_t {
    // SAFETY: the instruction is enabled here and touches only its registers.
    unsafe {
        asm!(
            "bfmmla {s:v}.4s, {r:v}.8h, {c:v}.8h",
            s = inout(vreg) sum, r = in(vreg) rows, c = in(vreg) columns,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
