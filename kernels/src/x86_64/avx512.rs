//! AVX-512 (F, BW, VL, DQ) with VNNI.

use core::arch::x86_64::*;

use crate::block::DType;
use crate::generic::simd::{CodeClass, Int8, Simd, vector_operations};

/// AVX-512 F, BW, VL, DQ and VNNI.
#[derive(Clone, Copy)]
pub struct Avx512;

impl Simd for Avx512 {
    type F = __m512;
    const LANES: usize = 16;
    const F32_MR: usize = 12;
    const NV: usize = 2;
    const DOT_TR: usize = 4;

    vector_operations! {
        zero() => _mm512_setzero_ps();
        add(a, b) => _mm512_add_ps(a, b);
        sub(a, b) => _mm512_sub_ps(a, b);
        mul(a, b) => _mm512_mul_ps(a, b);
        div(a, b) => _mm512_div_ps(a, b);
        fma(a, b, c) => _mm512_fmadd_ps(a, b, c);
        max(a, b) => _mm512_max_ps(a, b);
        min(a, b) => _mm512_min_ps(a, b);
        abs(a) => _mm512_abs_ps(a);
        sqrt(a) => _mm512_sqrt_ps(a);
        round(a) => _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        pow2(n) => _mm512_scalef_ps(_mm512_set1_ps(1.0), n);
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        // SAFETY: the CPU has the features, by the trait's contract; so in each block below.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        // SAFETY: see splat; p is readable for 16 f32.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        // SAFETY: see splat; p is readable for 16 f16.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> __m512 {
        // SAFETY: see splat; p is readable for 16 bytes.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        // SAFETY: see splat; p is writable for 16 f32.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn sum(a: __m512) -> f32 {
        // SAFETY: see splat.
        unsafe { _mm512_reduce_add_ps(a) }
    }
    /// The same halves are added to each other, of several vectors at once.
    #[inline(always)]
    unsafe fn sum4([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        // SAFETY: see splat; the store covers the four lanes of the array.
        unsafe {
            let halves =
                |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
            let (ab, cd) = (halves(a, b), halves(c, d));
            let s = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd));
            let s = _mm512_add_ps(s, _mm512_permute_ps::<0b0100_1110>(s));
            let s = _mm512_add_ps(s, _mm512_movehdup_ps(s));
            let first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
            let mut sums = [0.0; 4];
            let low = _mm512_castps512_ps128(_mm512_permutexvar_ps(first, s));
            _mm_storeu_ps(sums.as_mut_ptr(), low);
            sums
        }
    }
    #[inline(always)]
    unsafe fn hmax(a: __m512) -> f32 {
        // SAFETY: see splat.
        unsafe { _mm512_reduce_max_ps(a) }
    }
    #[inline(always)]
    unsafe fn deinterleave(a: __m512, b: __m512) -> (__m512, __m512) {
        // SAFETY: see splat.
        unsafe {
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
            (_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b))
        }
    }
    #[inline(always)]
    unsafe fn interleave(even: __m512, odd: __m512) -> (__m512, __m512) {
        // SAFETY: see splat.
        unsafe {
            let lo = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let hi = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            (_mm512_permutex2var_ps(even, lo, odd), _mm512_permutex2var_ps(even, hi, odd))
        }
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, src_row: usize, dst: *mut f32, dst_row: usize) {
        // SAFETY: see splat; the caller's rows.
        unsafe {
            // Loops, here and below: closures given to core's array functions lose the ISA's features.
            let mut r = [_mm512_setzero_ps(); 16];
            for i in 0..16 {
                r[i] = _mm512_loadu_ps(src.add(i * src_row));
            }
            let mut t = r;
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            // r[4i + j]: of columns j, 4 + j, 8 + j, 12 + j, the rows 4i..4i + 4.
            for i in 0..4 {
                let (a, b) = (_mm512_castps_pd(t[4 * i]), _mm512_castps_pd(t[4 * i + 1]));
                let (c, d) = (_mm512_castps_pd(t[4 * i + 2]), _mm512_castps_pd(t[4 * i + 3]));
                r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
                r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
                r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
                r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
            }
            for j in 0..4 {
                let even = _mm512_shuffle_f32x4::<0x88>(r[j], r[4 + j]);
                let odd = _mm512_shuffle_f32x4::<0xdd>(r[j], r[4 + j]);
                let even_high = _mm512_shuffle_f32x4::<0x88>(r[8 + j], r[12 + j]);
                let odd_high = _mm512_shuffle_f32x4::<0xdd>(r[8 + j], r[12 + j]);
                let columns = [
                    _mm512_shuffle_f32x4::<0x88>(even, even_high),
                    _mm512_shuffle_f32x4::<0x88>(odd, odd_high),
                    _mm512_shuffle_f32x4::<0xdd>(even, even_high),
                    _mm512_shuffle_f32x4::<0xdd>(odd, odd_high),
                ];
                for q in 0..4 {
                    _mm512_storeu_ps(dst.add((4 * q + j) * dst_row), columns[q]);
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: __m512) {
        // SAFETY: see splat; p is writable for 16 bytes.
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v))) }
    }
}

impl Int8 for Avx512 {
    type I = __m512i;
    const I8_MR: usize = 6;
    const INT8_GRADIENT: bool = true;

    fn class(dtype: DType) -> CodeClass {
        CodeClass { offset: 128, acc16: 0, bias: dtype.has_bias(), start_at_sum: true }
    }

    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> __m512i {
        // SAFETY: see splat.
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn to_f32(a: __m512i) -> __m512 {
        // SAFETY: see splat.
        unsafe { _mm512_cvtepi32_ps(a) }
    }

    #[inline(always)]
    unsafe fn store_quads(p: *mut u8, rows: [__m512; 4]) {
        // SAFETY: see splat; p is writable for 64 bytes.
        unsafe {
            let low = _mm512_set1_epi32(255);
            let (a, b) = (_mm512_cvtps_epi32(rows[0]), _mm512_cvtps_epi32(rows[1]));
            let (c, d) = (_mm512_cvtps_epi32(rows[2]), _mm512_cvtps_epi32(rows[3]));
            let ab =
                _mm512_or_si512(_mm512_and_si512(a, low), _mm512_slli_epi32::<8>(_mm512_and_si512(b, low)));
            let cd = _mm512_or_si512(
                _mm512_slli_epi32::<16>(_mm512_and_si512(c, low)),
                _mm512_slli_epi32::<24>(d),
            );
            let quads = _mm512_xor_si512(_mm512_or_si512(ab, cd), _mm512_set1_epi8(i8::MIN));
            _mm512_storeu_si512(p.cast(), quads);
        }
    }

    #[inline(always)]
    unsafe fn dot_quads<const MR: usize, const NV: usize, const ACC16: usize>(
        acc: &mut [[__m512i; NV]; MR],
        q: usize,
        codes: *const u8,
        x: &[*const i8; MR],
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            for i in 0..q {
                let row = codes.add(i * NV * 64);
                let mut w = [_mm512_setzero_si512(); NV];
                for v in 0..NV {
                    w[v] = _mm512_loadu_si512(row.add(v * 64).cast());
                }
                for m in 0..MR {
                    let xv = _mm512_set1_epi32(x[m].add(i * 4).cast::<i32>().read_unaligned());
                    for v in 0..NV {
                        acc[m][v] = _mm512_dpbusd_epi32(acc[m][v], w[v], xv);
                    }
                }
            }
        }
    }
}
