//! AVX-512 BF16: two bf16 products per lane, summed in f32 (`vdpbf16ps`).

use core::arch::x86_64::*;

use super::avx512::Avx512;
use crate::generic::bf16::Bf16;

impl Bf16 for Avx512 {
    const TOGETHER: usize = 2;
    const MR: usize = 12;

    #[inline(always)]
    unsafe fn store_rounded(p: *mut u16, v: __m512) {
        // SAFETY: AVX-512 BF16 by the trait's contract; p is writable for 16 bf16.
        unsafe { _mm256_storeu_si256(p.cast(), bits(_mm512_cvtneps_pbh(v))) }
    }

    #[inline(always)]
    unsafe fn round_columns(p: *mut u16, column: *const f32, row: usize) {
        // SAFETY: as in store_rounded; 16 columns of two rows are readable, p is writable for 32 bf16.
        unsafe {
            let low = bits(_mm512_cvtneps_pbh(_mm512_loadu_ps(column)));
            let high = bits(_mm512_cvtneps_pbh(_mm512_loadu_ps(column.add(row))));
            let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high));
            _mm512_storeu_si512(p.cast(), _mm512_or_si512(_mm512_cvtepu16_epi32(low), high));
        }
    }

    #[inline(always)]
    unsafe fn dot<const MR: usize, const NV: usize>(
        acc: &mut [[__m512; NV]; MR],
        k: usize,
        a: &[*const u16; MR],
        panel: *const u16,
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            for i in 0..k / 2 {
                let mut w = [_mm512_setzero_si512(); NV];
                for v in 0..NV {
                    w[v] = _mm512_loadu_si512(panel.add((i * NV + v) * 32).cast());
                }
                for m in 0..MR {
                    let pair = _mm512_set1_epi32(a[m].add(2 * i).cast::<i32>().read_unaligned());
                    for v in 0..NV {
                        acc[m][v] = _mm512_dpbf16_ps(acc[m][v], as_bf16(w[v]), as_bf16(pair));
                    }
                }
            }
        }
    }
}

/// The bits of sixteen bf16: no intrinsic stores them.
#[inline(always)]
fn bits(v: __m256bh) -> __m256i {
    // SAFETY: both are 32 bytes of any value.
    unsafe { core::mem::transmute(v) }
}

#[inline(always)]
fn as_bf16(v: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes of any value.
    unsafe { core::mem::transmute(v) }
}
