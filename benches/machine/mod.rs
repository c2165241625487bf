//! This machine's peak rates on one thread, as yardsticks for the kernels' figures.

use std::hint::black_box;
use std::time::Instant;

use engraft_kernels::Isa;

/// A loop of vector instructions without memory access, and its operations per run.
#[derive(Clone, Copy)]
pub struct Probe {
    run: fn(),
    operations: f64,
}

impl Probe {
    /// 10⁹ operations a second, of one run (a fraction of a millisecond).
    pub fn rate(&self) -> f64 {
        let start = Instant::now();
        (self.run)();
        self.operations / start.elapsed().as_secs_f64() / 1e9
    }
}

/// GB/s of reading 256 MiB that no cache holds, best of several runs.
pub fn memory_gb_s() -> f64 {
    let words = vec![1u64; 32 << 20];
    let read = || {
        let start = Instant::now();
        black_box(black_box(&words).iter().fold(0u64, |sum, w| sum.wrapping_add(*w)));
        8.0 * words.len() as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    (0..10).map(|_| read()).fold(0.0, f64::max)
}

/// Fused multiply-adds of f32 (two operations each); `None` if this file has no loop for the ISA.
pub fn fma(isa: Isa) -> Option<Probe> {
    #[cfg(target_arch = "x86_64")]
    return match isa.name() {
        "avx512" => Some(Probe { run: x86_64::fma_avx512, operations: x86_64::WORK * 32.0 }),
        "avx2" | "avxvnni" => Some(Probe { run: x86_64::fma_avx2, operations: x86_64::WORK * 16.0 }),
        _ => None,
    };
    #[cfg(not(target_arch = "x86_64"))]
    return {
        _ = isa;
        None
    };
}

/// Products of bf16 summed in f32 (two operations each).
pub fn bf16(isa: Isa) -> Option<Probe> {
    #[cfg(target_arch = "x86_64")]
    return (isa.name() == "avx512" && std::is_x86_feature_detected!("avx512bf16"))
        .then_some(Probe { run: x86_64::dot_avx512_bf16, operations: x86_64::WORK * 64.0 });
    #[cfg(not(target_arch = "x86_64"))]
    return {
        _ = isa;
        None
    };
}

/// 8-bit dot products (a multiplication and an addition are two operations).
pub fn int8(isa: Isa) -> Option<Probe> {
    #[cfg(target_arch = "x86_64")]
    return match isa.name() {
        "avx512" => Some(Probe { run: x86_64::dot_avx512, operations: x86_64::WORK * 128.0 }),
        "avxvnni" => Some(Probe { run: x86_64::dot_avxvnni, operations: x86_64::WORK * 64.0 }),
        "avx2" => Some(Probe { run: x86_64::dot_avx2, operations: x86_64::WORK * 64.0 }),
        _ => None,
    };
    #[cfg(not(target_arch = "x86_64"))]
    return {
        _ = isa;
        None
    };
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Independent chains: more than latency times throughput of any of these instructions.
    const CHAINS: usize = 12;
    const STEPS: usize = 100_000;
    /// Vector instructions of one call.
    pub const WORK: f64 = (CHAINS * STEPS) as f64;

    macro_rules! chains {
        ($($name:ident, $features:literal, $zero:expr, $x:expr, |$acc:ident, $v:ident| $step:expr;)*) => {
            $(pub fn $name() {
                // SAFETY: called only through a `Probe` for an ISA token, which proves these features.
                unsafe { with_features::$name() }
            })*

            mod with_features {
                use super::*;

                $(#[target_feature(enable = $features)]
                pub fn $name() {
                    let $v = black_box($x);
                    let mut acc = [$zero; CHAINS];
                    for _ in 0..STEPS {
                        for $acc in &mut acc {
                            *$acc = $step;
                        }
                    }
                    black_box(acc);
                })*
            }
        };
    }

    chains!(
        fma_avx512, "avx512f", _mm512_setzero_ps(), _mm512_set1_ps(0.5), |a, x| _mm512_fmadd_ps(x, x, *a);
        fma_avx2, "avx2,fma", _mm256_setzero_ps(), _mm256_set1_ps(0.5), |a, x| _mm256_fmadd_ps(x, x, *a);
        dot_avx512_bf16, "avx512f,avx512bf16", _mm512_setzero_ps(), _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5), _mm512_set1_ps(0.5)), |a, x| {
            _mm512_dpbf16_ps(*a, x, x)
        };
        dot_avx512, "avx512f,avx512vnni", _mm512_setzero_si512(), _mm512_set1_epi8(1), |a, x| {
            _mm512_dpbusd_epi32(*a, x, x)
        };
        dot_avxvnni, "avx2,avxvnni", _mm256_setzero_si256(), _mm256_set1_epi8(1), |a, x| {
            _mm256_dpbusd_avx_epi32(*a, x, x)
        };
        dot_avx2, "avx2", _mm256_setzero_si256(), _mm256_set1_epi8(1), |a, x| {
            let pairs = _mm256_maddubs_epi16(_mm256_xor_si256(x, *a), x);
            _mm256_add_epi32(*a, _mm256_madd_epi16(pairs, x))
        };
    );
}
