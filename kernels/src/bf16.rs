//! Rounding to bf16, two values per word, which halves what a block keeps of its forward.

use crate::Kernels;

/// Words that one item of a conversion packs.
const RUN: usize = 4096;

impl Kernels {
    /// Rounds x to bf16, two values per word: in each run of 8,192, the first half goes to the low halves. With
    /// an odd count, the last word holds one value.
    ///
    /// # Panics
    /// If `words` hasn't half as many words as x has values.
    pub fn pack_bf16(&self, x: &[f32], words: &mut [f32]) {
        assert_eq!(words.len(), x.len().div_ceil(2));
        self.rows(RUN, words, |i, words| {
            let x = &x[2 * i * RUN..x.len().min(2 * (i + 1) * RUN)];
            let (low, high) = x.split_at(words.len());
            let pairs = low.iter().zip(high);
            words.iter_mut().zip(pairs).for_each(|(w, (l, h))| {
                *w = f32::from_bits(round_bf16(*l) >> 16 | round_bf16(*h) & 0xffff_0000);
            });
            // With an odd count, the last word holds one value.
            if high.len() < low.len() {
                words[high.len()] = f32::from_bits(round_bf16(low[high.len()]) >> 16);
            }
        });
    }

    /// The inverse of [`Kernels::pack_bf16`].
    ///
    /// # Panics
    /// If `words` hasn't half as many words as x has values.
    pub fn unpack_bf16(&self, words: &[f32], x: &mut [f32]) {
        assert_eq!(words.len(), x.len().div_ceil(2));
        self.rows(2 * RUN, x, |i, x| {
            let words = &words[i * RUN..words.len().min((i + 1) * RUN)];
            let (low, high) = x.split_at_mut(words.len());
            low.iter_mut().zip(words).for_each(|(x, w)| *x = f32::from_bits(w.to_bits() << 16));
            high.iter_mut().zip(words).for_each(|(x, w)| *x = f32::from_bits(w.to_bits() & 0xffff_0000));
        });
    }
}

/// The bits of x rounded to bf16, ties to even, in the upper half; the lower half is garbage. NaN stays NaN.
fn round_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    if x.is_nan() { bits | 0x0040_0000 } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dropout::mix;

    #[test]
    fn values_round_to_the_nearest_bf16() {
        let kernels = Kernels::detect(2);
        let mut rng = 5;
        for n in [0, 1, 2, 7, RUN, 2 * RUN, 2 * RUN + 1, 5 * RUN + 3] {
            let mut draw = || {
                rng += 1;
                (mix(rng) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            };
            let mut x: Vec<f32> = (0..n).map(|_| draw() * 10f32.powi((30.0 * draw()) as i32)).collect();
            let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE / 8.0];
            let ties = [0x3f80_8000, 0x3f81_8000, 0x3f80_8001].map(f32::from_bits);
            x.iter_mut().zip(special.into_iter().chain(ties)).for_each(|(x, s)| *x = s);
            let (mut words, mut back) = (vec![0.0; n.div_ceil(2)], vec![1.0; n]);
            kernels.pack_bf16(&x, &mut words);
            kernels.unpack_bf16(&words, &mut back);
            for (x, back) in x.iter().zip(&back) {
                assert_eq!(back.to_bits(), nearest(*x).to_bits(), "{x}");
            }
        }
        assert!(f32::from_bits(round_bf16(f32::from_bits(0x7fff_ffff)) & 0xffff_0000).is_nan());
        assert!(f32::from_bits(round_bf16(f32::from_bits(0xff80_0001)) & 0xffff_0000).is_nan());
    }

    /// The nearer of the two neighbours; on a tie, the even one.
    fn nearest(x: f32) -> f32 {
        let down = x.to_bits() & 0xffff_0000;
        if f32::from_bits(down) == x {
            return x;
        }
        let up = down.wrapping_add(0x1_0000);
        // Beyond the largest bf16 the next step counts as 2^128.
        let value = |bits: u32| match f32::from_bits(bits) {
            v if v.is_finite() => f64::from(v),
            v => f64::from(v.signum()) * 2f64.powi(128),
        };
        let (to_down, to_up) = ((f64::from(x) - value(down)).abs(), (f64::from(x) - value(up)).abs());
        let pick = if to_down == to_up {
            if down >> 16 & 1 == 0 { down } else { up }
        } else if to_down < to_up {
            down
        } else {
            up
        };
        f32::from_bits(pick)
    }
}
