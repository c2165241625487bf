//! What this machine can do at best: the yardsticks of the kernels' figures, on one thread.

use std::hint::black_box;
use std::time::Instant;

use engraft_kernels::Isa;

/// Best of several runs of `f`, which does `work` operations, in 10⁹ a second.
fn best(work: f64, mut f: impl FnMut()) -> f64 {
    let time = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    work / (0..20).map(|_| time(&mut f)).fold(f64::INFINITY, f64::min) / 1e9
}

/// GB/s of reading 256 MiB that no cache holds.
pub fn memory_gb_s() -> f64 {
    let words = vec![1u64; 32 << 20];
    let mut sum = 0u64;
    best(8.0 * words.len() as f64, || sum = sum.wrapping_add(black_box(&words).iter().sum::<u64>()))
}

/// GFLOP/s of fused multiply-adds in registers; none where this file has no loop for the ISA.
pub fn fma_gflop_s(isa: Isa) -> Option<f64> {
    match isa.name() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: holding the token proves that the CPU has the ISA.
        "avx512" => Some(best(x86_64::WORK * 16.0 * 2.0, || unsafe { x86_64::fma_avx512() })),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        "avx2" | "avxvnni" => Some(best(x86_64::WORK * 8.0 * 2.0, || unsafe { x86_64::fma_avx2() })),
        _ => None,
    }
}

/// GOP/s (a multiplication and an addition are two) of 8-bit dot products in registers.
pub fn int8_gop_s(isa: Isa) -> Option<f64> {
    match isa.name() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: holding the token proves that the CPU has the ISA.
        "avx512" => Some(best(x86_64::WORK * 64.0 * 2.0, || unsafe { x86_64::dot_avx512() })),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        "avxvnni" => Some(best(x86_64::WORK * 32.0 * 2.0, || unsafe { x86_64::dot_avxvnni() })),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        "avx2" => Some(best(x86_64::WORK * 32.0 * 2.0, || unsafe { x86_64::dot_avx2() })),
        _ => None,
    }
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Chains that run side by side: more than latency times throughput of any of these instructions.
    const CHAINS: usize = 12;
    const STEPS: usize = 100_000;
    /// Vector instructions of one call.
    pub const WORK: f64 = (CHAINS * STEPS) as f64;

    macro_rules! chains {
        ($name:ident, $features:literal, $zero:expr, $x:expr, |$acc:ident, $v:ident| $step:expr) => {
            #[target_feature(enable = $features)]
            pub fn $name() {
                let $v = black_box($x);
                let mut acc = [$zero; CHAINS];
                for _ in 0..STEPS {
                    for $acc in &mut acc {
                        *$acc = $step;
                    }
                }
                black_box(acc);
            }
        };
    }

    chains!(fma_avx512, "avx512f", _mm512_setzero_ps(), _mm512_set1_ps(0.5), |a, x| _mm512_fmadd_ps(
        x, x, *a
    ));
    chains!(fma_avx2, "avx2,fma", _mm256_setzero_ps(), _mm256_set1_ps(0.5), |a, x| _mm256_fmadd_ps(x, x, *a));
    chains!(dot_avx512, "avx512f,avx512vnni", _mm512_setzero_si512(), _mm512_set1_epi8(1), |a, x| {
        _mm512_dpbusd_epi32(*a, x, x)
    });
    chains!(dot_avxvnni, "avx2,avxvnni", _mm256_setzero_si256(), _mm256_set1_epi8(1), |a, x| {
        _mm256_dpbusd_avx_epi32(*a, x, x)
    });
    chains!(dot_avx2, "avx2", _mm256_setzero_si256(), _mm256_set1_epi8(1), |a, x| {
        let pairs = _mm256_maddubs_epi16(_mm256_xor_si256(x, *a), x);
        _mm256_add_epi32(*a, _mm256_madd_epi16(pairs, x))
    });
}
