//! AVX2 + FMA + F16C, and a variant with AVX-VNNI's integer dot product.

use core::arch::x86_64::*;

use crate::block::DType;
use crate::generic::simd::{CodeClass, Int8, Simd, vector_operations};

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub struct Avx2;

/// AVX2 with AVX-VNNI.
#[derive(Clone, Copy)]
pub struct AvxVnni;

/// Codes of at most 6 bits become unsigned by an offset; 8-bit ones use the sign trick.
fn class_avx2(dtype: DType) -> CodeClass {
    let (offset, acc16) = match dtype {
        DType::Q4_0 => (8, 8),
        DType::Q5_0 => (16, 4),
        DType::Q3_K => (4, 8),
        DType::Q6_K => (32, 2),
        DType::Q4_1 | DType::Q4_K | DType::Q2_K => (0, 8),
        DType::Q5_1 | DType::Q5_K => (0, 4),
        _ => (0, 1),
    };
    CodeClass { offset, acc16, bias: dtype.has_bias() || offset != 0, start_at_sum: false }
}

macro_rules! simd_f32_avx2 {
    () => {
        type F = __m256;
        const LANES: usize = 8;
        const F32_MR: usize = 6;
        const NV: usize = 2;
        const DOT_TR: usize = 2;

        vector_operations! {
            zero() => _mm256_setzero_ps();
            add(a, b) => _mm256_add_ps(a, b);
            sub(a, b) => _mm256_sub_ps(a, b);
            mul(a, b) => _mm256_mul_ps(a, b);
            div(a, b) => _mm256_div_ps(a, b);
            fma(a, b, c) => _mm256_fmadd_ps(a, b, c);
            max(a, b) => _mm256_max_ps(a, b);
            min(a, b) => _mm256_min_ps(a, b);
            abs(a) => _mm256_andnot_ps(_mm256_set1_ps(-0.0), a);
            sqrt(a) => _mm256_sqrt_ps(a);
            round(a) => _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            // SAFETY: the CPU has the features, by the trait's contract; so in each block below.
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            // SAFETY: see splat; p is readable for 8 f32.
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> __m256 {
            // SAFETY: see splat; p is readable for 8 f16.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_i8(p: *const i8) -> __m256 {
            // SAFETY: see splat; p is readable for 8 bytes.
            unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m256) {
            // SAFETY: see splat; p is writable for 8 f32.
            unsafe { _mm256_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn pow2(n: __m256) -> __m256 {
            // SAFETY: see splat.
            unsafe {
                let i = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(i))
            }
        }
        #[inline(always)]
        unsafe fn sum(a: __m256) -> f32 {
            // SAFETY: see splat.
            unsafe {
                let s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
                let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
                _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)))
            }
        }
        #[inline(always)]
        unsafe fn hmax(a: __m256) -> f32 {
            // SAFETY: see splat.
            unsafe {
                let s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
                let s = _mm_max_ps(s, _mm_movehl_ps(s, s));
                _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)))
            }
        }
        #[inline(always)]
        unsafe fn deinterleave(a: __m256, b: __m256) -> (__m256, __m256) {
            // SAFETY: see splat.
            unsafe {
                let lo = _mm256_permute2f128_ps::<0x20>(a, b);
                let hi = _mm256_permute2f128_ps::<0x31>(a, b);
                let even = _mm256_shuffle_ps::<0x88>(lo, hi);
                let odd = _mm256_shuffle_ps::<0xdd>(lo, hi);
                (even, odd)
            }
        }
        #[inline(always)]
        unsafe fn interleave(even: __m256, odd: __m256) -> (__m256, __m256) {
            // SAFETY: see splat.
            unsafe {
                let lo = _mm256_unpacklo_ps(even, odd);
                let hi = _mm256_unpackhi_ps(even, odd);
                (_mm256_permute2f128_ps::<0x20>(lo, hi), _mm256_permute2f128_ps::<0x31>(lo, hi))
            }
        }
        #[inline(always)]
        unsafe fn transpose(src: *const f32, src_row: usize, dst: *mut f32, dst_row: usize) {
            // SAFETY: see splat; the caller's rows.
            unsafe {
                // half[i][j]: of columns j and 4 + j, the rows 4i..4i + 4. A loop, since closures given
                // to core's array functions lose the ISA's features.
                let mut half = [[_mm256_setzero_ps(); 4]; 2];
                for i in 0..2 {
                    let row = src.add(4 * i * src_row);
                    let (a, b) = (_mm256_loadu_ps(row), _mm256_loadu_ps(row.add(src_row)));
                    let (c, d) =
                        (_mm256_loadu_ps(row.add(2 * src_row)), _mm256_loadu_ps(row.add(3 * src_row)));
                    let (ab, ab_high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                    let (cd, cd_high) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
                    half[i] = [
                        _mm256_shuffle_ps::<0x44>(ab, cd),
                        _mm256_shuffle_ps::<0xee>(ab, cd),
                        _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
                        _mm256_shuffle_ps::<0xee>(ab_high, cd_high),
                    ];
                }
                for j in 0..4 {
                    let (low, high) = (half[0][j], half[1][j]);
                    _mm256_storeu_ps(dst.add(j * dst_row), _mm256_permute2f128_ps::<0x20>(low, high));
                    _mm256_storeu_ps(dst.add((4 + j) * dst_row), _mm256_permute2f128_ps::<0x31>(low, high));
                }
            }
        }
        #[inline(always)]
        unsafe fn store_i8(p: *mut i8, v: __m256) {
            // SAFETY: see splat; p is writable for 8 bytes.
            unsafe {
                let i = _mm256_cvtps_epi32(v);
                let w = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256::<1>(i));
                _mm_storel_epi64(p.cast(), _mm_packs_epi16(w, w));
            }
        }
    };
}

/// The integer tile's parts that do not depend on how products are formed.
macro_rules! simd_i32_avx2 {
    () => {
        type I = __m256i;
        const I8_MR: usize = 3;

        #[inline(always)]
        unsafe fn splat_i32(x: i32) -> __m256i {
            // SAFETY: see splat.
            unsafe { _mm256_set1_epi32(x) }
        }
        #[inline(always)]
        unsafe fn to_f32(a: __m256i) -> __m256 {
            // SAFETY: see splat.
            unsafe { _mm256_cvtepi32_ps(a) }
        }
        #[inline(always)]
        unsafe fn store_quads(p: *mut u8, rows: [__m256; 4]) {
            // SAFETY: see splat; p is writable for 32 bytes.
            unsafe {
                let low = _mm256_set1_epi32(255);
                let (a, b) = (_mm256_cvtps_epi32(rows[0]), _mm256_cvtps_epi32(rows[1]));
                let (c, d) = (_mm256_cvtps_epi32(rows[2]), _mm256_cvtps_epi32(rows[3]));
                let ab = _mm256_or_si256(
                    _mm256_and_si256(a, low),
                    _mm256_slli_epi32::<8>(_mm256_and_si256(b, low)),
                );
                let cd = _mm256_or_si256(
                    _mm256_slli_epi32::<16>(_mm256_and_si256(c, low)),
                    _mm256_slli_epi32::<24>(d),
                );
                let flip = _mm256_set1_epi8(if Self::INT8_GRADIENT { i8::MIN } else { 0 });
                _mm256_storeu_si256(p.cast(), _mm256_xor_si256(_mm256_or_si256(ab, cd), flip));
            }
        }
    };
}

impl Simd for Avx2 {
    simd_f32_avx2!();
}

impl Simd for AvxVnni {
    simd_f32_avx2!();
}

impl Int8 for Avx2 {
    simd_i32_avx2!();
    // The sign trick that 8-bit codes need costs what f32 costs.
    const INT8_GRADIENT: bool = false;

    fn class(dtype: DType) -> CodeClass {
        class_avx2(dtype)
    }

    #[inline(always)]
    unsafe fn dot_quads<const MR: usize, const NV: usize, const ACC16: usize>(
        acc: &mut [[__m256i; NV]; MR],
        q: usize,
        codes: *const u8,
        x: &[*const i8; MR],
    ) {
        // SAFETY: the trait's contract; ACC16 keeps 16-bit sums below 2^15 (2·127·ACC16·max code).
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let step = if ACC16 < q { ACC16 } else { q };
            let mut i = 0;
            while i < q {
                let mut s16 = [[_mm256_setzero_si256(); NV]; MR];
                for j in 0..step {
                    let row = codes.add((i + j) * NV * 32);
                    let mut w = [_mm256_setzero_si256(); NV];
                    for v in 0..NV {
                        w[v] = _mm256_loadu_si256(row.add(v * 32).cast());
                    }
                    for m in 0..MR {
                        let xv = _mm256_set1_epi32(x[m].add((i + j) * 4).cast::<i32>().read_unaligned());
                        for v in 0..NV {
                            let p = if ACC16 == 1 {
                                _mm256_maddubs_epi16(_mm256_abs_epi8(w[v]), _mm256_sign_epi8(xv, w[v]))
                            } else {
                                _mm256_maddubs_epi16(w[v], xv)
                            };
                            s16[m][v] = if j == 0 { p } else { _mm256_add_epi16(s16[m][v], p) };
                        }
                    }
                }
                for m in 0..MR {
                    for v in 0..NV {
                        acc[m][v] = _mm256_add_epi32(acc[m][v], _mm256_madd_epi16(s16[m][v], ones));
                    }
                }
                i += step;
            }
        }
    }
}

impl Int8 for AvxVnni {
    simd_i32_avx2!();
    const INT8_GRADIENT: bool = true;

    fn class(dtype: DType) -> CodeClass {
        CodeClass { offset: 128, acc16: 0, bias: dtype.has_bias(), start_at_sum: true }
    }

    #[inline(always)]
    unsafe fn dot_quads<const MR: usize, const NV: usize, const ACC16: usize>(
        acc: &mut [[__m256i; NV]; MR],
        q: usize,
        codes: *const u8,
        x: &[*const i8; MR],
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            for i in 0..q {
                let row = codes.add(i * NV * 32);
                let mut w = [_mm256_setzero_si256(); NV];
                for v in 0..NV {
                    w[v] = _mm256_loadu_si256(row.add(v * 32).cast());
                }
                for m in 0..MR {
                    let xv = _mm256_set1_epi32(x[m].add(i * 4).cast::<i32>().read_unaligned());
                    for v in 0..NV {
                        acc[m][v] = _mm256_dpbusd_avx_epi32(acc[m][v], w[v], xv);
                    }
                }
            }
        }
    }
}
