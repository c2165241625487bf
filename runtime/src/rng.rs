//! The one random generator of the runtime: counter-based, so its whole state is three integers. A checkpoint
//! can hold it, and any draw can be reproduced without replaying earlier ones.
//!
//! The output is SplitMix64's finalizer (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number
//! Generators", OOPSLA 2014) applied to a Weyl sequence whose start and odd increment derive from
//! (seed, stream). Not for secrets.
//!
//! ```
//! use engraft_runtime::rng::Rng;
//!
//! let mut random = Rng::new(0, 1);
//! let first = random.next_u64();
//! // Any draw can be found again.
//! assert_eq!(Rng::at(0, 1, 0).next_u64(), first);
//! ```

pub(crate) use engraft_kernels::mix;
use serde::{Deserialize, Serialize};

/// The golden ratio in 64-bit fixed point, made odd: SplitMix64's default increment.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// A random stream. Equal (seed, stream, counter) give equal draws on every platform.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rng {
    seed: u64,
    stream: u64,
    counter: u64,
}

impl Rng {
    /// The start of a stream. Each use (init, dropout, shuffle, sampler) has its own stream number, so extra
    /// draws in one never shift another.
    pub fn new(seed: u64, stream: u64) -> Self {
        Rng { seed, stream, counter: 0 }
    }

    /// A stream after `counter` draws of 64 bits.
    pub fn at(seed: u64, stream: u64, counter: u64) -> Self {
        Rng { seed, stream, counter }
    }

    /// Draws of 64 bits made so far; with seed and stream, the whole state.
    pub fn counter(&self) -> u64 {
        self.counter
    }

    /// The next 64 uniform bits.
    pub fn next_u64(&mut self) -> u64 {
        let key = mix(self.seed.wrapping_add(GOLDEN)) ^ mix(self.stream.wrapping_mul(GOLDEN).wrapping_add(1));
        // An increment per stream: two streams never run through the same Weyl sequence.
        let gamma = mix(key ^ GOLDEN) | 1;
        let value = mix(mix(key).wrapping_add(gamma.wrapping_mul(self.counter)));
        self.counter = self.counter.wrapping_add(1);
        value
    }

    /// Uniform in [0, 1), a multiple of 2⁻²⁴. One draw.
    pub fn f32(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 * (1.0 / (1u32 << 24) as f32)
    }

    /// Uniform in [0, 1), a multiple of 2⁻⁵³. One draw.
    pub fn f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in 0..n without bias (Lemire's multiply-and-reject); 0 for n = 0. At least one draw.
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 {
            return 0;
        }
        let reject_below = n.wrapping_neg() % n;
        loop {
            let wide = u128::from(self.next_u64()) * u128::from(n);
            if wide as u64 >= reject_below {
                return (wide >> 64) as u64;
            }
        }
    }

    /// A standard normal value by Box–Muller, discarding the pair's second value so the state stays a counter.
    /// Two draws.
    pub fn normal(&mut self) -> f32 {
        // 1 − u is in (0, 1]: the logarithm is finite.
        let radius = (-2.0 * (1.0 - self.f64()).ln()).sqrt();
        let angle = std::f64::consts::TAU * self.f64();
        (radius * angle.cos()) as f32
    }

    /// A uniformly random order (Fisher–Yates), in place.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            items.swap(last, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_reproducible_seekable_and_apart() {
        let mut a = Rng::new(7, 1);
        let first: Vec<u64> = (0..100).map(|_| a.next_u64()).collect();
        let mut late = Rng::at(7, 1, 60);
        assert_eq!(late.next_u64(), first[60]);
        for (seed, stream) in [(8, 1), (7, 2), (1, 7)] {
            let mut b = Rng::new(seed, stream);
            assert_eq!(first.iter().filter(|v| **v == b.next_u64()).count(), 0);
        }
    }

    #[test]
    fn moments_and_ranges() {
        let mut rng = Rng::new(1, 2);
        let n = 200_000;
        let (mut sum, mut square, mut uniform) = (0.0f64, 0.0f64, 0.0f64);
        for _ in 0..n {
            let x = f64::from(rng.normal());
            assert!(x.is_finite());
            sum += x;
            square += x * x;
            let u = rng.f32();
            assert!((0.0..1.0).contains(&u));
            uniform += f64::from(u);
        }
        let n = f64::from(n);
        // Five standard errors each.
        assert!((sum / n).abs() < 5.0 / n.sqrt(), "{}", sum / n);
        assert!((square / n - 1.0).abs() < 5.0 * (2.0 / n).sqrt());
        assert!((uniform / n - 0.5).abs() < 5.0 * (1.0 / 12.0 / n).sqrt());
        let mut seen = [0u32; 7];
        (0..7000).for_each(|_| seen[rng.below(7) as usize] += 1);
        assert!(seen.iter().all(|c| (850..1150).contains(c)), "{seen:?}");
        assert_eq!(rng.below(0), 0);
        assert_eq!(rng.below(1), 0);
    }

    #[test]
    fn shuffle_permutes() {
        let mut items: Vec<u32> = (0..1000).collect();
        Rng::new(3, 0).shuffle(&mut items);
        assert_ne!(items, (0..1000).collect::<Vec<_>>());
        let mut sorted = items.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        let mut again: Vec<u32> = (0..1000).collect();
        Rng::new(3, 0).shuffle(&mut again);
        assert_eq!(items, again);
    }
}
