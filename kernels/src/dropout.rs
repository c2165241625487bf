//! Dropout in which every choice follows from a key and a position, so the backward can recompute any part of a
//! mask.

use crate::Kernels;

/// Elements of one item of the work.
const RUN: usize = 4096;

/// Steele, Lea and Flood's `mix64` (variant 13 of Stafford's finalizers; OOPSLA 2014): a bijection of 64 bits in which
/// every bit of the result depends on every bit of `z`.
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Sets elements `first..` of x to zero with probability `p`, and multiplies the others by 1/(1 − p); element i's fate is
/// a hash of (`key`, i).
pub fn drop_elements(x: &mut [f32], first: usize, p: f32, key: u64) {
    let keep = 1.0 / (1.0 - p);
    let limit = (f64::from(p) * (1u64 << 32) as f64) as u64;
    let key = mix(key);
    for (i, v) in x.iter_mut().enumerate() {
        let hash = mix(key.wrapping_add((first + i) as u64)) >> 32;
        *v = if hash < limit { 0.0 } else { *v * keep };
    }
}

impl Kernels {
    /// [`drop_elements`] over all of x, on all threads.
    pub fn drop_elements(&self, x: &mut [f32], p: f32, key: u64) {
        self.rows(RUN, x, |r, run| drop_elements(run, r * RUN, p, key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_drop_what_the_whole_drops_and_as_much_as_asked() {
        let (n, p) = (3 * RUN + 5, 0.3);
        let mut whole = vec![1.0; n];
        Kernels::detect(2).drop_elements(&mut whole, p, 7);
        let mut parts = vec![1.0; n];
        for (i, part) in parts.chunks_mut(100).enumerate() {
            drop_elements(part, 100 * i, p, 7);
        }
        assert!(whole == parts);
        let dropped = whole.iter().filter(|v| **v == 0.0).count() as f32 / n as f32;
        assert!((dropped - p).abs() < 0.02, "{dropped}");
        assert!(whole.iter().all(|v| *v == 0.0 || (v - 1.0 / 0.7).abs() < 1e-6));
        let mut other = vec![1.0; n];
        drop_elements(&mut other, 0, p, 8);
        assert!(other != whole);
    }
}
