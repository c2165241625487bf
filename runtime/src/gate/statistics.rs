//! What differences between two arms mean, when both answered the same held-out examples.
//!
//! Everything is made of additions, multiplications and divisions of `f64` in a fixed order, so that a
//! verdict has the same bits wherever it is computed again from the same figures.

use crate::rng::Rng;

/// Stream of the bootstrap's draws. All comparisons of one seed resample the same examples, so that an
/// arm's interval does not depend on which other arms are there.
const BOOTSTRAP_STREAM: u64 = 0x424F_4F54;

/// A paired percentile bootstrap (Efron and Tibshirani 1993, chapters 13 and 16) of a weighted mean
/// difference `Σ dᵢ / Σ wᵢ`, where the examples are resampled and each keeps its weight: tokens within
/// an example depend on each other, examples do not.
#[derive(Clone, Debug, PartialEq)]
pub struct Bootstrap {
    mean: f64,
    /// The statistic of each resample, ascending.
    replicates: Vec<f64>,
}

impl Bootstrap {
    /// Resamples `pairs` of (difference, weight) `resamples` times. Pairs without weight are left out;
    /// `None` when nothing is left, a figure is not finite, a weight is negative, or `resamples` is 0.
    pub fn new(pairs: &[(f64, f64)], resamples: usize, seed: u64) -> Option<Bootstrap> {
        let sound = |(d, w): &(f64, f64)| d.is_finite() && w.is_finite() && *w >= 0.0;
        if resamples == 0 || !pairs.iter().all(sound) {
            return None;
        }
        let pairs: Vec<(f64, f64)> = pairs.iter().copied().filter(|(_, w)| *w > 0.0).collect();
        if pairs.is_empty() {
            return None;
        }
        let ratio = |(d, w): (f64, f64)| d / w;
        let add = |a: (f64, f64), b: (f64, f64)| (a.0 + b.0, a.1 + b.1);
        let mut rng = Rng::new(seed, BOOTSTRAP_STREAM);
        let n = pairs.len() as u64;
        let mut resample = |_| ratio((0..n).fold((0.0, 0.0), |s, _| add(s, pairs[rng.below(n) as usize])));
        let mut replicates: Vec<f64> = (0..resamples).map(&mut resample).collect();
        replicates.sort_unstable_by(f64::total_cmp);
        let mean = ratio(pairs.iter().fold((0.0, 0.0), |s, p| add(s, *p)));
        let widened = widening(pairs.len());
        replicates.iter_mut().for_each(|r| *r = mean + widened * (*r - mean));
        mean.is_finite().then_some(Bootstrap { mean, replicates })
    }

    /// The weighted mean difference of the examples themselves.
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// The two-sided interval of confidence 1 − `alpha`: the replicates of rank ⌊α/2·(B+1)⌋ from below
    /// and from above. Infinite on both sides when B is too small to reach that far.
    pub fn interval(&self, alpha: f64) -> (f64, f64) {
        let b = self.replicates.len();
        let rank = (alpha / 2.0 * (b as f64 + 1.0)) as usize;
        match rank {
            0 => (f64::NEG_INFINITY, f64::INFINITY),
            _ => (self.replicates[rank.min(b) - 1], self.replicates[b - rank.min(b)]),
        }
    }

    /// The smallest α whose interval lies above 0: `2·(1 + #{replicates ≤ 0}) / (B + 1)`, at most 1.
    pub fn p_above_zero(&self) -> f64 {
        let against = self.replicates.iter().filter(|r| **r <= 0.0).count();
        (2.0 * (against as f64 + 1.0) / (self.replicates.len() as f64 + 1.0)).min(1.0)
    }
}

/// What percentiles of `n` examples are too narrow by (Hesterberg 2015, section 3.4): √(n/(n−1)) of the
/// sample's own spread, and Student's t over the normal's quantile, by the first term of its expansion,
/// 1 + (z²+1)/(4(n−1)), at the z of a two-sided level of about 0.0125. One example tells nothing of spread.
fn widening(n: usize) -> f64 {
    const Z: f64 = 2.5;
    let (n, free) = (n as f64, n.saturating_sub(1).max(1) as f64);
    (n / free).sqrt() * (1.0 + (Z * Z + 1.0) / (4.0 * free))
}

/// Paired correctness of two arms by McNemar's exact test: under the null hypothesis each discordant
/// pair falls to either side with probability ½.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct McNemar {
    /// Examples that only the first arm solved.
    pub only_first: usize,
    /// Examples that only the second arm solved.
    pub only_second: usize,
    /// The two-sided exact conditional p-value, `min(1, 2·P(X ≤ min(b, c)))`, X ~ Binomial(b + c, ½).
    pub p_exact: f64,
    /// The two-sided mid-p-value, `p_exact − P(X = min(b, c))` (1 − that ½·P for b = c): Fagerland,
    /// Lydersen and Laake (2013) recommend it, since the exact test is needlessly conservative.
    pub p_mid: f64,
}

/// Steps in which [`McNemar::examples_to_decide`] looks for its answer, which is no more exact.
const GROWTH: f64 = 1.05;
/// How many times the examples at hand are worth naming as an answer.
pub const REACH: u64 = 100;

impl McNemar {
    /// Discordant pairs: only these carry information.
    pub fn discordant(&self) -> usize {
        self.only_first + self.only_second
    }

    /// Tests two arms on the same examples; examples beyond the shorter list are ignored.
    pub fn new(first: &[bool], second: &[bool]) -> McNemar {
        let count = |a: bool| first.iter().zip(second).filter(|(x, y)| **x == a && **y != a).count();
        McNemar::of(count(true), count(false))
    }

    /// About how many examples in place of `examples` let the first arm's lead reach `level`, both counts growing in
    /// proportion; at least `examples`. `None` if it isn't ahead, or beyond [`REACH`] times as many.
    pub fn examples_to_decide(&self, examples: usize, level: f64) -> Option<u64> {
        if self.only_first <= self.only_second {
            return None;
        }
        let decides = |factor: f64| {
            let [first, second] = [self.only_first, self.only_second].map(|n| (n as f64 * factor).round());
            McNemar::of(first as usize, second as usize).p_mid <= level
        };
        let mut factor = 1.0;
        while !decides(factor) {
            factor *= GROWTH;
            if factor > REACH as f64 {
                return None;
            }
        }
        Some((examples as f64 * factor).ceil() as u64)
    }

    /// The test for counts of discordant pairs.
    pub fn of(only_first: usize, only_second: usize) -> McNemar {
        let (n, k) = (only_first + only_second, only_first.min(only_second));
        // Terms of the binomial relative to the central one, outwards: no factorial, no logarithm, and
        // what underflows is far below any level.
        let middle = n / 2;
        let (mut term, mut total, mut tail, mut at_k) = (1.0f64, 0.0, 0.0, 0.0);
        for i in (0..=middle).rev() {
            let mirrored = if 2 * i == n { 1.0 } else { 2.0 };
            total += mirrored * term;
            if i <= k {
                tail += term;
            }
            if i == k {
                at_k = term;
            }
            term *= i as f64 / (n - i + 1) as f64;
        }
        let p_exact = (2.0 * tail / total).min(1.0);
        let p_mid = match n {
            0 => 1.0,
            _ if 2 * k == n => 1.0 - 0.5 * at_k / total,
            _ => (2.0 * tail - at_k) / total,
        };
        McNemar { only_first, only_second, p_exact, p_mid }
    }
}

/// The fewest discordant pairs whose mid-p-value can reach `alpha`: all on one side, 2⁻ᵈ ≤ α.
pub fn discordant_min(alpha: f64) -> usize {
    halvings(alpha)
}

/// The fewest held-out examples that could ever decide at `alpha` among `comparisons` by Holm's first
/// step: were all differences of one sign, an exact sign test still gives 2·2⁻ⁿ. No honest method on
/// fewer examples may claim more, though a bootstrap would.
pub fn examples_min(alpha: f64, comparisons: usize) -> usize {
    1 + halvings(alpha / comparisons.max(1) as f64)
}

/// The smallest n with 2⁻ⁿ ≤ x; 1,100 where no n reaches it.
fn halvings(x: f64) -> usize {
    let mut power = 1.0;
    (0..1100)
        .find(|_| {
            let reached = power <= x;
            power *= 0.5;
            reached
        })
        .unwrap_or(1100)
}

/// One hypothesis after Holm's step-down.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stepped {
    /// The level it was tested at, α / (m − rank).
    pub level: f64,
    /// The adjusted p-value.
    pub adjusted: f64,
    /// Whether it and all with smaller p were rejected.
    pub rejected: bool,
}

/// Holm's step-down procedure (1979) over a family of p-values: errors of the whole family stay below
/// `alpha`, whatever the dependence. Ties go by place. A NaN counts as 1.
pub fn holm(p: &[f64], alpha: f64) -> Vec<Stepped> {
    let value = |i: usize| if p[i].is_nan() { 1.0 } else { p[i] };
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| value(*a).total_cmp(&value(*b)));
    let mut out = vec![Stepped { level: alpha, adjusted: 1.0, rejected: false }; p.len()];
    let (mut going, mut running) = (true, 0.0f64);
    for (rank, i) in order.into_iter().enumerate() {
        let left = (p.len() - rank) as f64;
        running = running.max((left * value(i)).min(1.0));
        going &= value(i) <= alpha / left;
        out[i] = Stepped { level: alpha / left, adjusted: running, rejected: going };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-12
    }

    /// 2·Σ C(n,i)/2ⁿ in whole numbers.
    fn exact_by_integers(n: u32, k: u32) -> f64 {
        let mut term = 1u128;
        let mut tail = 0u128;
        for i in 0..=k {
            tail += term;
            term = term * u128::from(n - i) / u128::from(i + 1);
        }
        (2.0 * tail as f64 / (1u128 << n) as f64).min(1.0)
    }

    #[test]
    fn mcnemar_has_the_known_values() {
        // R: binom.test(1, 10)$p.value = 22/1024; the mid-p takes choose(10, 1)/1024 off.
        let t = McNemar::of(1, 9);
        assert!(near(t.p_exact, 22.0 / 1024.0) && near(t.p_mid, 12.0 / 1024.0), "{t:?}");
        // Fagerland, Lydersen and Laake (2013), table 1: b = 1, c = 7 gives 0.0703 and 0.0391.
        let t = McNemar::of(7, 1);
        assert!(near(t.p_exact, 0.070_312_5) && near(t.p_mid, 0.039_062_5), "{t:?}");
        assert!(near(McNemar::of(0, 0).p_exact, 1.0) && near(McNemar::of(6, 6).p_exact, 1.0));
        // C(12, 6) = 924 of 4096.
        assert!(near(McNemar::of(6, 6).p_mid, 1.0 - 462.0 / 4096.0));
        for n in 1..=110 {
            for k in 0..=n / 2 {
                let (ours, exact) =
                    (McNemar::of(k as usize, (n - k) as usize).p_exact, exact_by_integers(n, k));
                assert!((ours - exact).abs() <= 1e-12 * exact.max(1e-30), "{n} {k}: {ours} {exact}");
            }
        }
        // Where 2⁻ⁿ is no f64 any more.
        let t = McNemar::of(1000, 1100);
        assert!(t.p_exact > 0.02 && t.p_exact < 0.04 && t.p_mid < t.p_exact, "{t:?}");
        assert_eq!(McNemar::of(0, 100_000).p_exact, 0.0);
    }

    #[test]
    fn mcnemar_counts_discordant_pairs() {
        let t = McNemar::new(&[true, true, false, false, true], &[true, false, true, false, false]);
        assert_eq!((t.only_first, t.only_second, t.discordant()), (2, 1, 3));
    }

    #[test]
    fn a_lead_tells_how_many_examples_it_takes() {
        // One alone of 60: five alone reach 2^-5 < 0.05, so about 300, to the step of the search.
        let needed = McNemar::of(1, 0).examples_to_decide(60, 0.05).expect("ahead");
        assert!((270..=315).contains(&needed), "{needed}");
        assert_eq!(McNemar::of(30, 2).examples_to_decide(100, 0.05), Some(100), "decided already");
        assert_eq!(McNemar::of(2, 2).examples_to_decide(100, 0.05), None);
        assert_eq!(McNemar::of(1, 3).examples_to_decide(100, 0.05), None);
        assert_eq!(McNemar::of(501, 500).examples_to_decide(3000, 0.05), None, "out of reach");
    }

    #[test]
    fn holm_is_that_of_r() {
        // R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") = 0.03 0.06 0.06 0.02
        let stepped = holm(&[0.01, 0.04, 0.03, 0.005], 0.05);
        for (s, r) in stepped.iter().zip([0.03, 0.06, 0.06, 0.02]) {
            assert!(near(s.adjusted, r), "{s:?}");
        }
        assert_eq!(stepped.iter().map(|s| s.rejected).collect::<Vec<_>>(), [true, false, false, true]);
        // 0.04 alone would pass at its own step, but a smaller one failed before it.
        assert!(!holm(&[0.04, 0.03], 0.05)[0].rejected);
        assert!(!holm(&[f64::NAN], 0.05)[0].rejected && holm(&[], 0.05).is_empty());
    }

    #[test]
    fn the_fewest_examples_follow_from_the_level() {
        // 2·2⁻⁶ = 0.031 ≤ 0.05 < 2·2⁻⁵; 2⁻⁵ = 0.031 ≤ 0.05 < 2⁻⁴.
        assert_eq!((examples_min(0.05, 1), discordant_min(0.05)), (6, 5));
        assert_eq!((examples_min(0.05, 3), examples_min(0.05, 0)), (7, 6));
        assert!(examples_min(0.0, 1) > 1000);
        assert!(McNemar::of(0, 5).p_mid <= 0.05 && McNemar::of(0, 4).p_mid > 0.05);
    }

    #[test]
    fn the_bootstrap_knows_its_normal_limit() {
        let mut rng = Rng::new(5, 1);
        let pairs: Vec<_> = (0..400).map(|_| (f64::from(rng.normal()) + 0.3, 1.0)).collect();
        let b = Bootstrap::new(&pairs, 4000, 1).unwrap();
        let n = 400.0;
        let mean = pairs.iter().map(|p| p.0).sum::<f64>() / n;
        let sd = (pairs.iter().map(|p| (p.0 - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
        let (lower, upper) = b.interval(0.05);
        assert!(near(b.mean(), mean));
        // mean ± 1.96·sd/√n, widened by under 1 % at 400; percentiles of 4,000 replicates are good to a few hundredths of that.
        let half = 1.959_964 * sd / n.sqrt();
        assert!((lower - (mean - half)).abs() < 0.1 * half, "{lower} {}", mean - half);
        assert!((upper - (mean + half)).abs() < 0.1 * half, "{upper} {}", mean + half);
        assert!(b.p_above_zero() < 0.001);
        assert_eq!(b, Bootstrap::new(&pairs, 4000, 1).unwrap());
        assert_ne!(b, Bootstrap::new(&pairs, 4000, 2).unwrap());
    }

    #[test]
    fn level_and_p_agree() {
        let mut rng = Rng::new(9, 1);
        for shift in 0..40 {
            let pairs: Vec<_> =
                (0..30).map(|_| (f64::from(rng.normal()) + f64::from(shift) * 0.02, 2.0)).collect();
            let b = Bootstrap::new(&pairs, 1000, shift as u64).unwrap();
            for alpha in [0.05, 0.0251, 0.0167] {
                assert_eq!(b.interval(alpha).0 > 0.0, b.p_above_zero() <= alpha, "{shift} {alpha}");
            }
        }
    }

    #[test]
    fn hostile_figures_give_no_interval() {
        assert_eq!(Bootstrap::new(&[], 10, 0), None);
        assert_eq!(Bootstrap::new(&[(1.0, 0.0)], 10, 0), None);
        assert_eq!(Bootstrap::new(&[(1.0, 1.0)], 0, 0), None);
        assert_eq!(Bootstrap::new(&[(1.0, 1.0), (f64::NAN, 1.0)], 10, 0), None);
        assert_eq!(Bootstrap::new(&[(f64::INFINITY, 1.0)], 10, 0), None);
        assert_eq!(Bootstrap::new(&[(1.0, -1.0), (1.0, 2.0)], 10, 0), None);
        let zero = Bootstrap::new(&[(0.0, 1.0), (0.0, 3.0)], 100, 0).unwrap();
        assert_eq!((zero.interval(0.05), zero.p_above_zero()), ((0.0, 0.0), 1.0));
        assert_eq!(zero.interval(0.001), (f64::NEG_INFINITY, f64::INFINITY), "too few resamples");
    }

    #[test]
    fn weights_make_a_ratio_of_sums() {
        let b = Bootstrap::new(&[(3.0, 1.0), (1.0, 3.0), (9.0, 0.0)], 50, 0).unwrap();
        assert!(near(b.mean(), 1.0), "the pair without weight is left out");
    }

    /// How often, of `runs` pairs of arms with `n` examples each, the first is found better.
    fn wins(runs: u64, n: usize, shift: f64) -> usize {
        let won = |seed: &u64| {
            let mut rng = Rng::new(*seed, 77);
            let mut difference = || f64::from(rng.normal()) - f64::from(rng.normal()) + shift;
            let pairs: Vec<_> = (0..n).map(|_| (difference(), 1.0)).collect();
            Bootstrap::new(&pairs, 400, *seed).unwrap().interval(0.05).0 > 0.0
        };
        (0..runs).filter(won).count()
    }

    #[test]
    fn equal_arms_seldom_differ_and_unequal_ones_do() {
        // Nominal are 2.5 %.
        let (many, few) = (wins(2000, 60, 0.0), wins(2000, 20, 0.0));
        assert!((30..=70).contains(&many), "{many} of 2000 on 60 examples");
        assert!((30..=70).contains(&few), "{few} of 2000 on 20 examples");
        assert!(wins(100, 60, 1.0) >= 95);
    }
}
