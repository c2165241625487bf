//! NEON with int8 matrix products (Armv8.6: Cortex-A510, A710, X2 and later): int8 by `smmla`.
//!
//! One instruction multiplies two rows by two columns, eight deep, so panels hold eight successive
//! codes of a column together where the other steps hold four.

use core::arch::aarch64::*;
use core::arch::asm;

use super::neon::{MAGIC, less_magic, quads, simd_f32_neon, simd_i32_neon};
use crate::block::DType;
use crate::generic::simd::{CodeClass, Int8, Simd};

/// Armv8.6 int8 matrix products, with the dot products that every such core has.
#[derive(Clone, Copy)]
pub struct I8mm;

impl Simd for I8mm {
    simd_f32_neon!();
}

impl Int8 for I8mm {
    simd_i32_neon!();
    const I8_MR: usize = 6;
    const CODES_TOGETHER: usize = 8;

    fn class(dtype: DType) -> CodeClass {
        CodeClass { offset: 0, acc16: 0, bias: dtype.has_bias(), start_at_sum: false }
    }

    const SUMS_START: i32 = MAGIC;

    #[inline(always)]
    unsafe fn to_f32(a: int32x4_t) -> float32x4_t {
        // SAFETY: see splat.
        unsafe { less_magic(a) }
    }

    #[inline(always)]
    unsafe fn store_quads(p: *mut u8, rows: [float32x4_t; 4]) {
        // SAFETY: see splat; p is writable for the first half of each of four columns' eight bytes.
        unsafe {
            let (q, p) = (quads(rows), p.cast::<u32>());
            p.write_unaligned(vgetq_lane_u32::<0>(q));
            p.add(2).write_unaligned(vgetq_lane_u32::<1>(q));
            p.add(4).write_unaligned(vgetq_lane_u32::<2>(q));
            p.add(6).write_unaligned(vgetq_lane_u32::<3>(q));
        }
    }

    #[inline(always)]
    unsafe fn dot_quads<const MR: usize, const NV: usize, const ACC16: usize>(
        acc: &mut [[int32x4_t; NV]; MR],
        q: usize,
        codes: *const u8,
        x: &[*const i8; MR],
    ) {
        const { assert!(MR.is_multiple_of(2), "smmla takes rows in pairs") }
        macro_rules! octet {
            ($squares:ident, $pairs:expr, $w:expr) => {
                let w: *const i8 = $w;
                let mut columns = [[vdupq_n_s8(0); 2]; NV];
                for v in 0..NV {
                    columns[v] = [vld1q_s8(w.add(v * 32)), vld1q_s8(w.add(v * 32 + 16))];
                }
                for m in 0..MR / 2 {
                    for v in 0..NV {
                        $squares[m][v][0] = smmla($squares[m][v][0], $pairs[m], columns[v][0]);
                        $squares[m][v][1] = smmla($squares[m][v][1], $pairs[m], columns[v][1]);
                    }
                }
            };
        }
        // SAFETY: the trait's contract; groups have 16 or 32 codes, so quads come in fours.
        unsafe {
            // Squares of rows 2m, 2m + 1 by columns 0–1 and 2–3 of each vector. Of this array and the
            // next the upper half is not used: a length of MR / 2 can't be written.
            let mut squares = [[[vdupq_n_s32(0); 2]; NV]; MR];
            for m in 0..MR / 2 {
                for v in 0..NV {
                    squares[m][v] = halves(acc[2 * m][v], acc[2 * m + 1][v]);
                }
            }
            let mut i = 0;
            while i < q {
                let mut first = [vdupq_n_s8(0); MR];
                let mut second = first;
                for m in 0..MR / 2 {
                    let (a, b) = (vld1q_s8(x[2 * m].add(4 * i)), vld1q_s8(x[2 * m + 1].add(4 * i)));
                    let [low, high] = halves(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b));
                    (first[m], second[m]) = (vreinterpretq_s8_s32(low), vreinterpretq_s8_s32(high));
                }
                let w = codes.add(i * NV * 16).cast::<i8>();
                octet!(squares, first, w);
                octet!(squares, second, w.add(NV * 32));
                i += 4;
            }
            for m in 0..MR / 2 {
                for v in 0..NV {
                    [acc[2 * m][v], acc[2 * m + 1][v]] = halves(squares[m][v][0], squares[m][v][1]);
                }
            }
        }
    }
}

/// The lower halves of both, and the upper halves: two rows of four to two squares, and back.
#[inline(always)]
unsafe fn halves(a: int32x4_t, b: int32x4_t) -> [int32x4_t; 2] {
    // SAFETY: every 64-bit ARM core has NEON.
    unsafe {
        let (a, b) = (vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b));
        [vreinterpretq_s32_s64(vzip1q_s64(a, b)), vreinterpretq_s32_s64(vzip2q_s64(a, b))]
    }
}

/// `sum` as a 2 × 2 square plus rows · columnsᵀ, each two times eight bytes.
///
/// # Safety
/// The CPU has i8mm.
#[target_feature(enable = "neon,i8mm")]
#[inline]
unsafe fn smmla(mut sum: int32x4_t, rows: int8x16_t, columns: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction is enabled here and touches only its registers.
    unsafe {
        asm!(
            "smmla {s:v}.4s, {r:v}.16b, {c:v}.16b",
            s = inout(vreg) sum, r = in(vreg) rows, c = in(vreg) columns,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
