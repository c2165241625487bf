//! The vector operations an ISA provides; every algorithm in this folder is written once, on top of them.
//!
//! All methods are `unsafe` for one shared reason: they may only run on a CPU that has the ISA's
//! features, inside a function compiled for them (the wrappers in `x86_64` and `aarch64`). They are
//! `inline(always)` so that they take on the caller's context.

use crate::block::DType;

/// How the integer tile treats the codes of one element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeClass {
    /// Added to each code when it is packed, so that an unsigned × signed product can be used.
    pub offset: i32,
    /// Products that may be summed in 16 bits before widening (0 where the ISA does not widen by hand).
    pub acc16: usize,
    /// Whether the panel carries a bias per group (the type's own, or the offset folded into it).
    pub bias: bool,
    /// Whether the tile starts from −128·Σx, held with the activations.
    pub start_at_sum: bool,
}

/// Methods of [`Simd`] from vectors to a vector that are one expression of intrinsics.
macro_rules! vector_operations {
    ($($name:ident($($arg:ident),*) => $value:expr;)*) => {
        $(
            #[inline(always)]
            unsafe fn $name($($arg: Self::F),*) -> Self::F {
                // SAFETY: the instruction set is present, by the trait's contract.
                unsafe { $value }
            }
        )*
    };
}
#[allow(unused_imports, reason = "the portable vectors use none")]
pub(crate) use vector_operations;

/// One instruction set's vectors of f32.
pub trait Simd: Copy {
    /// Vector of `LANES` f32.
    type F: Copy;
    /// f32 per vector.
    const LANES: usize;
    /// Rows of the f32 tile.
    const F32_MR: usize;
    /// Vectors per row of a tile.
    const NV: usize;
    /// Rank rows the skinny dot kernel holds at once.
    const DOT_TR: usize;

    /// All lanes zero.
    unsafe fn zero() -> Self::F;
    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self::F;
    /// Unaligned load.
    unsafe fn load(p: *const f32) -> Self::F;
    /// Loads `LANES` f16, given as their bits.
    unsafe fn load_f16(p: *const u16) -> Self::F;
    /// Loads `LANES` i8.
    unsafe fn load_i8(p: *const i8) -> Self::F;
    /// Unaligned store.
    unsafe fn store(p: *mut f32, v: Self::F);
    /// a + b
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    /// a − b
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    /// a · b
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// a / b
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// a · b + c, rounded once where the instruction set can.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// acc[m][v] += Σ a[m][i] · b[i·b_row + v·LANES ..] over the leading steps i < k that the ISA can take
    /// several at a time; returns their number.
    #[inline(always)]
    unsafe fn fma_steps<const MR: usize, const NV: usize>(
        _acc: &mut [[Self::F; NV]; MR],
        _k: usize,
        _a: &[*const f32; MR],
        _b: *const f32,
        _b_row: usize,
    ) -> usize {
        0
    }
    /// Larger of each lane.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// Smaller of each lane.
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// |a|
    unsafe fn abs(a: Self::F) -> Self::F;
    /// Square root.
    unsafe fn sqrt(a: Self::F) -> Self::F;
    /// Nearest integer, ties to even, as f32.
    unsafe fn round(a: Self::F) -> Self::F;
    /// 2^n for integral n in −126..=127.
    unsafe fn pow2(n: Self::F) -> Self::F;
    /// Sum of lanes.
    unsafe fn sum(a: Self::F) -> f32;
    /// [`Simd::sum`] of four vectors, to the bit.
    #[inline(always)]
    unsafe fn sum4(a: [Self::F; 4]) -> [f32; 4] {
        // SAFETY: the trait's contract.
        unsafe { [Self::sum(a[0]), Self::sum(a[1]), Self::sum(a[2]), Self::sum(a[3])] }
    }
    /// Largest lane.
    unsafe fn hmax(a: Self::F) -> f32;
    /// Splits interleaved pairs: lanes of `a` then `b` in memory order give (even elements, odd elements).
    unsafe fn deinterleave(a: Self::F, b: Self::F) -> (Self::F, Self::F);
    /// The inverse of [`Simd::deinterleave`].
    unsafe fn interleave(even: Self::F, odd: Self::F) -> (Self::F, Self::F);
    /// Transposes `LANES` × `LANES` words of any meaning: dst[j·dst_row + i] = src[i·src_row + j].
    unsafe fn transpose(src: *const f32, src_row: usize, dst: *mut f32, dst_row: usize);

    /// Rounds lanes (within −127..=127) to i8 and stores `LANES` bytes.
    unsafe fn store_i8(p: *mut i8, v: Self::F);
}

/// The additional operations of the integer tile.
pub trait Int8: Simd {
    /// Vector of `LANES` i32.
    type I: Copy;
    /// Rows of the integer tile.
    const I8_MR: usize;
    /// Whether the integer tile beats f32 for 8-bit codes, which makes int8 input gradients worthwhile.
    const INT8_GRADIENT: bool;
    /// Successive codes of one column stored together in a panel: 4, or 8 for a matrix instruction.
    const CODES_TOGETHER: usize = 4;
    /// Where integer sums start.
    const SUMS_START: i32 = 0;

    /// The class of a block type on this ISA.
    fn class(dtype: DType) -> CodeClass;
    /// All lanes `x`.
    unsafe fn splat_i32(x: i32) -> Self::I;
    /// Integer sums (below 2^22, started at `SUMS_START`) to f32, exactly.
    unsafe fn to_f32(a: Self::I) -> Self::F;
    /// Rounds and packs four rows of codes (within −127..=127) as `LANES` quads of bytes, one every
    /// `CODES_TOGETHER` bytes, the offset of 8-bit classes applied.
    unsafe fn store_quads(p: *mut u8, rows: [Self::F; 4]);

    /// Adds products of `q` quads to the accumulators.
    ///
    /// `codes` is `[4·q/C][NV·LANES][C]` bytes, C being `CODES_TOGETHER`, with the class's offset
    /// applied; `x[m]` points at 4·q signed activation codes of row m. `ACC16` is the class's `acc16`.
    unsafe fn dot_quads<const MR: usize, const NV: usize, const ACC16: usize>(
        acc: &mut [[Self::I; NV]; MR],
        q: usize,
        codes: *const u8,
        x: &[*const i8; MR],
    );
}

/// e^x, relative error below 2e-7 in −87..=88; inputs outside are clamped to that range.
///
/// Cody–Waite reduction and the degree-6 polynomial of Cephes' `expf`.
#[inline(always)]
pub unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    // SAFETY: the caller runs on a CPU with S's features (the module's contract).
    unsafe {
        let x = S::max(S::min(x, S::splat(88.0)), S::splat(-87.0));
        let n = S::round(S::mul(x, S::splat(core::f32::consts::LOG2_E)));
        let r = S::fma(n, S::splat(-0.693_359_4), x);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = S::fma(p, r, S::splat(c));
        }
        let y = S::add(S::fma(p, S::mul(r, r), r), S::splat(1.0));
        S::mul(y, S::pow2(n))
    }
}
