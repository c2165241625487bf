//! NEON as every 64-bit ARM core has it (Cortex-A53, A72): f32 by `fmla`, int8 by widening products.

use core::arch::aarch64::*;

use crate::block::DType;
use crate::generic::simd::{CodeClass, Int8, Simd};

/// Armv8.0 Advanced SIMD.
#[derive(Clone, Copy)]
pub struct Neon;

/// Everything except the integer tile, which differs between the steps.
macro_rules! simd_f32_neon {
    () => {
        type F = float32x4_t;
        const LANES: usize = 4;
        // 8 × 8: 16 accumulators, 8 rows of x (four steps each) and 2 vectors of W, of 32 registers;
        // four products a load.
        const F32_MR: usize = 8;
        const NV: usize = 2;
        const DOT_TR: usize = 4;

        $crate::generic::simd::vector_operations! {
            zero() => vdupq_n_f32(0.0);
            add(a, b) => vaddq_f32(a, b);
            sub(a, b) => vsubq_f32(a, b);
            mul(a, b) => vmulq_f32(a, b);
            div(a, b) => vdivq_f32(a, b);
            fma(a, b, c) => vfmaq_f32(c, a, b);
            max(a, b) => vmaxq_f32(a, b);
            min(a, b) => vminq_f32(a, b);
            abs(a) => vabsq_f32(a);
            sqrt(a) => vsqrtq_f32(a);
            round(a) => vrndnq_f32(a);
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> float32x4_t {
            // SAFETY: the CPU has the features, by the trait's contract; so in each block below.
            unsafe { vdupq_n_f32(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> float32x4_t {
            // SAFETY: see splat; p is readable for 4 f32.
            unsafe { vld1q_f32(p) }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> float32x4_t {
            // SAFETY: see splat; p is readable for 4 f16.
            unsafe { vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))) }
        }
        #[inline(always)]
        unsafe fn load_i8(p: *const i8) -> float32x4_t {
            // SAFETY: see splat; p is readable for 4 bytes.
            unsafe {
                let bytes = vcreate_s8(u64::from(p.cast::<u32>().read_unaligned()));
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))))
            }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: float32x4_t) {
            // SAFETY: see splat; p is writable for 4 f32.
            unsafe { vst1q_f32(p, v) }
        }
        #[inline(always)]
        unsafe fn pow2(n: float32x4_t) -> float32x4_t {
            // SAFETY: see splat.
            unsafe {
                let i = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
                vreinterpretq_f32_s32(vshlq_n_s32::<23>(i))
            }
        }
        #[inline(always)]
        unsafe fn sum(a: float32x4_t) -> f32 {
            // SAFETY: see splat.
            unsafe { vaddvq_f32(a) }
        }
        #[inline(always)]
        unsafe fn hmax(a: float32x4_t) -> f32 {
            // SAFETY: see splat.
            unsafe { vmaxvq_f32(a) }
        }
        #[inline(always)]
        unsafe fn deinterleave(a: float32x4_t, b: float32x4_t) -> (float32x4_t, float32x4_t) {
            // SAFETY: see splat.
            unsafe { (vuzp1q_f32(a, b), vuzp2q_f32(a, b)) }
        }
        #[inline(always)]
        unsafe fn interleave(even: float32x4_t, odd: float32x4_t) -> (float32x4_t, float32x4_t) {
            // SAFETY: see splat.
            unsafe { (vzip1q_f32(even, odd), vzip2q_f32(even, odd)) }
        }
        #[inline(always)]
        unsafe fn transpose(src: *const f32, src_row: usize, dst: *mut f32, dst_row: usize) {
            // SAFETY: see splat; the caller's rows.
            unsafe {
                let (a, b) = (vld1q_f32(src), vld1q_f32(src.add(src_row)));
                let (c, d) = (vld1q_f32(src.add(2 * src_row)), vld1q_f32(src.add(3 * src_row)));
                let (ac, ac_high) = (vzip1q_f32(a, c), vzip2q_f32(a, c));
                let (bd, bd_high) = (vzip1q_f32(b, d), vzip2q_f32(b, d));
                vst1q_f32(dst, vzip1q_f32(ac, bd));
                vst1q_f32(dst.add(dst_row), vzip2q_f32(ac, bd));
                vst1q_f32(dst.add(2 * dst_row), vzip1q_f32(ac_high, bd_high));
                vst1q_f32(dst.add(3 * dst_row), vzip2q_f32(ac_high, bd_high));
            }
        }
        #[inline(always)]
        unsafe fn store_i8(p: *mut i8, v: float32x4_t) {
            // SAFETY: see splat; p is writable for 4 bytes.
            unsafe {
                let i = vmovn_s32(vcvtnq_s32_f32(v));
                let b = vmovn_s16(vcombine_s16(i, i));
                p.cast::<u32>().write_unaligned(vget_lane_u32::<0>(vreinterpret_u32_s8(b)));
            }
        }
        #[inline(always)]
        unsafe fn fma_steps<const MR: usize, const NV: usize>(
            acc: &mut [[float32x4_t; NV]; MR],
            k: usize,
            a: &[*const f32; MR],
            b: *const f32,
            b_row: usize,
        ) -> usize {
            // SAFETY: the caller's contract, passed on.
            unsafe { $crate::aarch64::neon::fma_four_steps::<MR, NV>(acc, k, a, b, b_row) }
        }
    };
}
pub(crate) use simd_f32_neon;

/// The integer tile's parts that do not depend on how products are formed.
macro_rules! simd_i32_neon {
    () => {
        type I = int32x4_t;
        const INT8_GRADIENT: bool = true;

        #[inline(always)]
        unsafe fn splat_i32(x: i32) -> int32x4_t {
            // SAFETY: see splat.
            unsafe { vdupq_n_s32(x) }
        }
    };
}
pub(crate) use simd_i32_neon;

/// [`Simd::fma_steps`] using products by element: a row's next four values take one load and no broadcast
/// instructions.
#[inline(always)]
pub(crate) unsafe fn fma_four_steps<const MR: usize, const NV: usize>(
    acc: &mut [[float32x4_t; NV]; MR],
    k: usize,
    a: &[*const f32; MR],
    b: *const f32,
    b_row: usize,
) -> usize {
    macro_rules! step {
        ($av:ident, $bp:expr, $lane:literal) => {
            let bp: *const f32 = $bp;
            let mut bv = [vdupq_n_f32(0.0); NV];
            for v in 0..NV {
                bv[v] = vld1q_f32(bp.add(v * 4));
            }
            for m in 0..MR {
                for v in 0..NV {
                    acc[m][v] = vfmaq_laneq_f32::<$lane>(acc[m][v], bv[v], $av[m]);
                }
            }
        };
    }
    let steps = k / 4 * 4;
    // SAFETY: the caller's contract.
    unsafe {
        let mut i = 0;
        while i < steps {
            let mut av = [vdupq_n_f32(0.0); MR];
            for m in 0..MR {
                av[m] = vld1q_f32(a[m].add(i));
            }
            let bp = b.add(i * b_row);
            step!(av, bp, 0);
            step!(av, bp.add(b_row), 1);
            step!(av, bp.add(2 * b_row), 2);
            step!(av, bp.add(3 * b_row), 3);
            i += 4;
        }
    }
    steps
}

/// The bits of 1.5 · 2^23 as f32: added to an integer below 2^22, they are the bits of their sum.
pub(crate) const MAGIC: i32 = 0x4b40_0000;

/// An integer that [`MAGIC`] was added to, as f32: a subtraction runs on every vector pipe, while a conversion
/// would wait for the single pipe that converts.
#[inline(always)]
pub(crate) unsafe fn less_magic(a: int32x4_t) -> float32x4_t {
    // SAFETY: every 64-bit ARM core has NEON.
    unsafe { vsubq_f32(vreinterpretq_f32_s32(a), vdupq_n_f32(f32::from_bits(MAGIC as u32))) }
}

/// Four rows of codes as quads of bytes, one quad per column.
#[inline(always)]
pub(crate) unsafe fn quads(rows: [float32x4_t; 4]) -> uint32x4_t {
    // SAFETY: every 64-bit ARM core has NEON.
    unsafe {
        let [a, b, c, d] = rows;
        let ab = vsliq_n_s32::<8>(vcvtnq_s32_f32(a), vcvtnq_s32_f32(b));
        let abc = vsliq_n_s32::<16>(ab, vcvtnq_s32_f32(c));
        vreinterpretq_u32_s32(vsliq_n_s32::<24>(abc, vcvtnq_s32_f32(d)))
    }
}

impl Simd for Neon {
    simd_f32_neon!();
}

impl Int8 for Neon {
    simd_i32_neon!();
    const I8_MR: usize = 4;

    fn class(dtype: DType) -> CodeClass {
        // 16 bits hold eight products of 127 with a code below 32, or two with a full-range code.
        let acc16 = match dtype {
            DType::Q8_0 | DType::IQ4_NL | DType::IQ4_XS => 2,
            _ => 8,
        };
        CodeClass { offset: 0, acc16, bias: dtype.has_bias(), start_at_sum: false }
    }

    #[inline(always)]
    unsafe fn to_f32(a: int32x4_t) -> float32x4_t {
        // SAFETY: see splat.
        unsafe { vcvtq_f32_s32(a) }
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
        // SAFETY: the trait's contract; ACC16 keeps 16-bit sums within ±2^15 (127·ACC16·max |code|).
        unsafe {
            // Sums of two neighbouring bytes of a quad, columns 0–1 and 2–3 of each vector.
            let mut pairs = [[[vdupq_n_s32(0); 2]; NV]; MR];
            let step = if ACC16 < q { ACC16 } else { q };
            let mut i = 0;
            while i < q {
                if ACC16 == 2 {
                    two_quads::<MR, NV>(&mut pairs, codes.add(i * NV * 16), x, i);
                } else {
                    narrow_quads::<MR, NV>(&mut pairs, step, codes.add(i * NV * 16), x, i);
                }
                i += step;
            }
            for m in 0..MR {
                for v in 0..NV {
                    acc[m][v] = vaddq_s32(acc[m][v], vpaddq_s32(pairs[m][v][0], pairs[m][v][1]));
                }
            }
        }
    }
}

/// Quad `at` of an activation row, four times.
#[inline(always)]
unsafe fn spread(x: *const i8, at: usize) -> int8x16_t {
    // SAFETY: the caller's row; the load has no alignment needs.
    unsafe { vreinterpretq_s8_s32(vdupq_n_s32(x.add(at * 4).cast::<i32>().read_unaligned())) }
}

/// Full-range codes: the products of two quads, then 32 bits.
#[inline(always)]
unsafe fn two_quads<const MR: usize, const NV: usize>(
    pairs: &mut [[[int32x4_t; 2]; NV]; MR],
    codes: *const u8,
    x: &[*const i8; MR],
    at: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut w = [[vdupq_n_s8(0); NV]; 2];
        for j in 0..2 {
            for v in 0..NV {
                w[j][v] = vld1q_s8(codes.add((j * NV + v) * 16).cast());
            }
        }
        for m in 0..MR {
            let (x0, x1) = (spread(x[m], at), spread(x[m], at + 1));
            for v in 0..NV {
                let low = vmull_s8(vget_low_s8(w[0][v]), vget_low_s8(x0));
                let low = vmlal_s8(low, vget_low_s8(w[1][v]), vget_low_s8(x1));
                pairs[m][v][0] = vpadalq_s16(pairs[m][v][0], low);
                let high = vmlal_high_s8(vmull_high_s8(w[0][v], x0), w[1][v], x1);
                pairs[m][v][1] = vpadalq_s16(pairs[m][v][1], high);
            }
        }
    }
}

/// Codes of few bits: `n` quads are summed in 16 bits before they widen.
#[inline(always)]
unsafe fn narrow_quads<const MR: usize, const NV: usize>(
    pairs: &mut [[[int32x4_t; 2]; NV]; MR],
    n: usize,
    codes: *const u8,
    x: &[*const i8; MR],
    at: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut sums = [[[vdupq_n_s16(0); 2]; NV]; MR];
        for j in 0..n {
            let mut w = [vdupq_n_s8(0); NV];
            for v in 0..NV {
                w[v] = vld1q_s8(codes.add((j * NV + v) * 16).cast());
            }
            for m in 0..MR {
                let xj = spread(x[m], at + j);
                for v in 0..NV {
                    sums[m][v][0] = vmlal_s8(sums[m][v][0], vget_low_s8(w[v]), vget_low_s8(xj));
                    sums[m][v][1] = vmlal_high_s8(sums[m][v][1], w[v], xj);
                }
            }
        }
        for m in 0..MR {
            for v in 0..NV {
                for h in 0..2 {
                    pairs[m][v][h] = vpadalq_s16(pairs[m][v][h], sums[m][v][h]);
                }
            }
        }
    }
}
