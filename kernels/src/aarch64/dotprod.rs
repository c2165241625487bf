//! NEON with the dot product extension (Cortex-A55, A76 and later): int8 by `sdot`.
//!
//! The intrinsics are not stable, so the instruction is written out.

use core::arch::aarch64::*;
use core::arch::asm;

use super::neon::{MAGIC, less_magic, quads, simd_f32_neon, simd_i32_neon};
use crate::block::DType;
use crate::generic::simd::{CodeClass, Int8, Simd};

/// Armv8.2 dot products.
#[derive(Clone, Copy)]
pub struct DotProd;

impl Simd for DotProd {
    simd_f32_neon!();
}

impl Int8 for DotProd {
    simd_i32_neon!();
    const I8_MR: usize = 6;

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
        // SAFETY: see splat; p is writable for 16 bytes.
        unsafe { vst1q_u8(p, vreinterpretq_u8_u32(quads(rows))) }
    }

    #[inline(always)]
    unsafe fn dot_quads<const MR: usize, const NV: usize, const ACC16: usize>(
        acc: &mut [[int32x4_t; NV]; MR],
        q: usize,
        codes: *const u8,
        x: &[*const i8; MR],
    ) {
        macro_rules! quad {
            ($xv:ident, $row:expr, $lane:literal) => {
                let row: *const i8 = $row;
                let mut w = [vdupq_n_s8(0); NV];
                for v in 0..NV {
                    w[v] = vld1q_s8(row.add(v * 16));
                }
                for m in 0..MR {
                    for v in 0..NV {
                        acc[m][v] = sdot_quad::<$lane>(acc[m][v], w[v], $xv[m]);
                    }
                }
            };
        }
        // SAFETY: the trait's contract; groups have 16 or 32 codes, so quads come in fours.
        unsafe {
            let mut i = 0;
            while i < q {
                let mut xv = [vdupq_n_s8(0); MR];
                for m in 0..MR {
                    xv[m] = vld1q_s8(x[m].add(4 * i));
                }
                let row = codes.add(i * NV * 16).cast::<i8>();
                quad!(xv, row, 0);
                quad!(xv, row.add(NV * 16), 1);
                quad!(xv, row.add(2 * NV * 16), 2);
                quad!(xv, row.add(3 * NV * 16), 3);
                i += 4;
            }
        }
    }
}

/// Each lane of `sum` plus the products of its quad of `a` with quad `LANE` of `b`.
///
/// # Safety
/// The CPU has dotprod.
#[target_feature(enable = "neon,dotprod")]
#[inline]
pub(crate) unsafe fn sdot_quad<const LANE: usize>(
    mut sum: int32x4_t,
    a: int8x16_t,
    b: int8x16_t,
) -> int32x4_t {
    // SAFETY: the instruction is enabled here and touches only its registers.
    unsafe {
        asm!(
            "sdot {s:v}.4s, {a:v}.16b, {b:v}.4b[{lane}]",
            s = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b, lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Each lane of `sum` plus the products of its quads of `a` and `b`.
///
/// # Safety
/// The CPU has dotprod.
#[target_feature(enable = "neon,dotprod")]
#[inline]
pub(crate) unsafe fn sdot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction is enabled here and touches only its registers.
    unsafe {
        asm!(
            "sdot {s:v}.4s, {a:v}.16b, {b:v}.16b",
            s = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
