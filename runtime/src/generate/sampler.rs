//! Choosing the next token from a row of logits.
//!
//! The steps and their order follow llama.cpp's default chain, so options mean what its users expect: repeat
//! penalty → top-k → top-p → min-p → temperature → draw. Top-p and min-p therefore look at the distribution
//! before temperature.

use engraft_kernels::mix;

use crate::error::{Error, ErrorKind, Result};

/// Settings of a [`Sampler`]; the defaults are llama.cpp's, with a fixed seed.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Divides the logits; 0 always picks the most likely token.
    pub temp: f32,
    /// Keeps this many most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest most likely tokens that together hold this share of the probability, at least one; 1
    /// keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this many times as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Penalizes recent tokens: divides positive logits, multiplies others; 1 is off.
    pub repeat_penalty: f32,
    /// How many of the latest tokens count as recent; 0 is off, negative means the whole history.
    pub repeat_last_n: i32,
    /// The same seed and the same logits give the same tokens.
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        SamplerOptions {
            temp: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            seed: 0,
        }
    }
}

impl SamplerOptions {
    /// Options that always pick the most likely token.
    pub fn greedy() -> Self {
        SamplerOptions { temp: 0.0, ..SamplerOptions::default() }
    }

    fn check(&self) -> Result<()> {
        let require = |holds: bool, name: &str, value: f32, range: &str| match holds {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Misuse, format!("{name} is {value}; it must be {range}"))),
        };
        // A NaN fails every one of these comparisons.
        require(self.temp >= 0.0 && self.temp.is_finite(), "temp", self.temp, "finite and not negative")?;
        require((0.0..=1.0).contains(&self.top_p), "top_p", self.top_p, "between 0 and 1")?;
        require((0.0..=1.0).contains(&self.min_p), "min_p", self.min_p, "between 0 and 1")?;
        let penalty = self.repeat_penalty;
        require(
            penalty > 0.0 && penalty.is_finite(),
            "repeat_penalty",
            penalty,
            "finite and above 0 (1 is off)",
        )
    }
}

/// A token that may still be drawn. `weight` is its probability up to a common factor.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    logit: f32,
    token: u32,
    weight: f32,
}

/// The most likely first; among equals the lower token. A total order, so results never depend on how a
/// selection algorithm happens to move elements.
fn likelier_first(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

/// Draws tokens. Holds the random state and scratch, so drawing allocates nothing after the first token of a
/// vocabulary.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    random: SplitMix64,
    candidates: Vec<Candidate>,
    /// One bit per token: already penalized in this call. All clear between calls.
    penalized: Vec<u64>,
}

impl Sampler {
    /// Bytes of scratch per token of the vocabulary, at most.
    pub const TOKEN_BYTES: usize = size_of::<Candidate>() + 1;

    /// A sampler at the start of its seed's random stream.
    ///
    /// # Errors
    /// `Misuse` names the option that is out of range.
    pub fn new(options: SamplerOptions) -> Result<Self> {
        options.check()?;
        let random = SplitMix64(options.seed);
        Ok(Sampler { options, random, candidates: Vec::new(), penalized: Vec::new() })
    }

    /// The settings.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// Chooses the token that follows `history` (oldest first); `logits[token]` is unnormalized and is
    /// overwritten by cleaning and penalties. Returns token 0 where [`Sampler::try_sample`] returns `None`.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32]) -> u32 {
        self.try_sample(logits, history).unwrap_or(0)
    }

    /// Like [`Sampler::sample`], but `None` if no token can be chosen: `logits` is empty or holds only NaN and
    /// −∞, a sign of a broken forward pass.
    ///
    /// NaN and −∞ are never chosen; +∞ counts as the largest finite number. Tokens in the history outside the
    /// vocabulary are ignored.
    pub fn try_sample(&mut self, logits: &mut [f32], history: &[u32]) -> Option<u32> {
        clean(logits);
        self.penalize(logits, history);
        if self.options.temp == 0.0 {
            return most_likely(logits);
        }
        self.keep_top_k(logits);
        self.keep_top_p_and_min_p();
        self.draw()
    }

    /// Like [`Sampler::try_sample`], for callers that can't go on without a token.
    ///
    /// # Errors
    /// `NonFinite`.
    pub fn choose(&mut self, logits: &mut [f32], history: &[u32]) -> Result<u32> {
        self.try_sample(logits, history).ok_or_else(no_token)
    }

    /// Applies the repeat penalty once to each distinct token of the window.
    fn penalize(&mut self, logits: &mut [f32], history: &[u32]) {
        let penalty = self.options.repeat_penalty;
        let window = usize::try_from(self.options.repeat_last_n).unwrap_or(usize::MAX);
        if penalty == 1.0 || window == 0 {
            return;
        }
        let recent = &history[history.len().saturating_sub(window)..];
        self.penalized.resize(logits.len().div_ceil(64), 0);
        for &token in recent {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            let (word, bit) = (token as usize / 64, 1u64 << (token % 64));
            if self.penalized[word] & bit == 0 && *logit != f32::NEG_INFINITY {
                let changed = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                *logit = changed.clamp(f32::MIN, f32::MAX);
            }
            self.penalized[word] |= bit;
        }
        // Clearing by window is cheaper than clearing a bit for every token of the vocabulary.
        for &token in recent {
            if let Some(word) = self.penalized.get_mut(token as usize / 64) {
                *word = 0;
            }
        }
    }

    /// Fills the candidates with the `top_k` likeliest tokens, in no order; with all if `top_k` is 0.
    fn keep_top_k(&mut self, logits: &[f32]) {
        let usable = |(token, &logit): (usize, &f32)| {
            (logit != f32::NEG_INFINITY).then_some(Candidate { logit, token: token as u32, weight: 0.0 })
        };
        let all = logits.iter().enumerate().filter_map(usable);
        self.candidates.clear();
        let k = self.options.top_k;
        if k == 0 || k >= logits.len() {
            self.candidates.reserve(logits.len());
            self.candidates.extend(all);
            return;
        }
        // Collect whatever beats the k-th best so far, and cut back to k when the buffer is full: almost every
        // token of a large vocabulary then costs one comparison.
        let room = k.saturating_mul(2).saturating_add(64).min(logits.len());
        self.candidates.reserve(room);
        let mut kth_best = f32::NEG_INFINITY;
        for candidate in all {
            // A later token equal to the k-th best ranks below it, so only a greater one can enter.
            if candidate.logit <= kth_best {
                continue;
            }
            if self.candidates.len() == room {
                kth_best = self.cut_to(k);
                if candidate.logit <= kth_best {
                    continue;
                }
            }
            self.candidates.push(candidate);
        }
        if self.candidates.len() > k {
            self.cut_to(k);
        }
    }

    /// Keeps the `k` likeliest candidates (`1 <= k < len`) and returns their smallest logit.
    fn cut_to(&mut self, k: usize) -> f32 {
        let (_, kth, _) = self.candidates.select_nth_unstable_by(k - 1, likelier_first);
        let kth_best = kth.logit;
        self.candidates.truncate(k);
        kth_best
    }

    /// Applies top-p, then min-p. Both keep a run of the likeliest candidates, and min-p compares only with the
    /// likeliest, so doing min-p first gives the same set and leaves less to sort.
    fn keep_top_p_and_min_p(&mut self) {
        let max = self.max_logit();
        let SamplerOptions { top_p, min_p, .. } = self.options;
        let mut mass = 0.0f64;
        if top_p < 1.0 {
            for candidate in &mut self.candidates {
                candidate.weight = (candidate.logit - max).exp();
                mass += f64::from(candidate.weight);
            }
        }
        if min_p > 0.0 {
            let least = max + min_p.ln();
            self.candidates.retain(|candidate| candidate.logit >= least);
        }
        if top_p < 1.0 {
            let kept = self.nucleus(f64::from(top_p) * mass);
            self.candidates.truncate(kept);
        }
    }

    /// Sorts as many candidates as needed to reach `wanted` of their weight, and returns their number; all if
    /// they weigh less. Always keeps one, if there is one.
    fn nucleus(&mut self, wanted: f64) -> usize {
        /// Real distributions reach their nucleus within a few hundred tokens of a large vocabulary.
        const FIRST_RUN: usize = 256;
        let mut reached = 0.0f64;
        let mut start = 0;
        let mut run = FIRST_RUN;
        while start < self.candidates.len() {
            let rest = &mut self.candidates[start..];
            let run_len = run.min(rest.len());
            if run_len < rest.len() {
                rest.select_nth_unstable_by(run_len - 1, likelier_first);
            }
            rest[..run_len].sort_unstable_by(likelier_first);
            for (i, candidate) in rest[..run_len].iter().enumerate() {
                reached += f64::from(candidate.weight);
                if reached >= wanted {
                    return start + i + 1;
                }
            }
            start += run_len;
            run = run.saturating_mul(8);
        }
        self.candidates.len()
    }

    /// Draws one of the candidates at the temperature.
    fn draw(&mut self) -> Option<u32> {
        let max = self.max_logit();
        let temp = self.options.temp;
        let mut mass = 0.0f64;
        for candidate in &mut self.candidates {
            candidate.weight = ((candidate.logit - max) / temp).exp();
            mass += f64::from(candidate.weight);
        }
        let mut left = self.random.next_unit() * mass;
        let mut chosen = None;
        for candidate in self.candidates.iter().filter(|candidate| candidate.weight > 0.0) {
            // The fallback in case rounding leaves a remainder after the last candidate.
            chosen = Some(candidate.token);
            left -= f64::from(candidate.weight);
            if left < 0.0 {
                break;
            }
        }
        chosen
    }

    fn max_logit(&self) -> f32 {
        self.candidates.iter().map(|candidate| candidate.logit).fold(f32::NEG_INFINITY, f32::max)
    }
}

/// The error when no token can be chosen.
pub(super) fn no_token() -> Error {
    let message = "no next token can be chosen because all scores are NaN: the model or an adapter is broken";
    Error::new(ErrorKind::NonFinite, message)
}

/// Leaves finite logits and −∞ only: NaN becomes −∞, +∞ the largest finite number.
fn clean(logits: &mut [f32]) {
    for logit in logits {
        *logit = if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) };
    }
}

/// The token of the greatest logit, the lowest among equals; `None` if all are −∞.
fn most_likely(logits: &[f32]) -> Option<u32> {
    let mut best = f32::NEG_INFINITY;
    let mut chosen = None;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > best {
            (best, chosen) = (logit, Some(token as u32));
        }
    }
    chosen
}

/// Sebastiano Vigna's SplitMix64: one word of state, and any seed works.
#[derive(Clone, Debug)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Uniform in [0, 1), a multiple of 2⁻⁵³.
    fn next_unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Options that change nothing: the draw follows the plain softmax.
    fn plain() -> SamplerOptions {
        SamplerOptions {
            temp: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            repeat_last_n: 0,
            seed: 7,
        }
    }

    fn sampler(options: SamplerOptions) -> Sampler {
        Sampler::new(options).expect("valid options")
    }

    fn some_logits(random: &mut SplitMix64, len: usize, spread: f64) -> Vec<f32> {
        (0..len).map(|_| ((random.next_unit() - 0.5) * spread) as f32).collect()
    }

    /// The chain step by step as defined, sorting everything: (token, probability).
    fn expected(logits: &[f32], options: &SamplerOptions, history: &[u32]) -> Vec<(u32, f64)> {
        let window = usize::try_from(options.repeat_last_n).unwrap_or(history.len());
        let recent = &history[history.len().saturating_sub(window)..];
        let penalty = f64::from(options.repeat_penalty);
        let mut kept: Vec<(u32, f64)> = (0u32..)
            .zip(logits.iter().map(|&l| f64::from(l)))
            .map(|(t, l)| match recent.contains(&t) {
                true => (t, if l > 0.0 { l / penalty } else { l * penalty }),
                false => (t, l),
            })
            .collect();
        kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if options.top_k > 0 {
            kept.truncate(options.top_k);
        }
        let weigh = |kept: &[(u32, f64)], temp: f64| -> Vec<f64> {
            let weights: Vec<f64> = kept.iter().map(|c| ((c.1 - kept[0].1) / temp).exp()).collect();
            let mass: f64 = weights.iter().sum();
            weights.iter().map(|w| w / mass).collect()
        };
        let mut sum = 0.0;
        let before = weigh(&kept, 1.0);
        let nucleus = before.iter().take_while(|&&p| (sum < f64::from(options.top_p), sum += p).0).count();
        kept.truncate(nucleus.max(1));
        let renormalized = weigh(&kept, 1.0);
        let floor = renormalized[0] * f64::from(options.min_p);
        kept.truncate(renormalized.iter().take_while(|&&p| p >= floor).count());
        let probabilities = weigh(&kept, f64::from(options.temp));
        kept.iter().map(|c| c.0).zip(probabilities).collect()
    }

    /// Pearson's statistic of `draws` against `expected`, in standard deviations from its mean. Infinite if
    /// a token was drawn that should never be.
    fn deviation(draws: &[u32], expected: &[(u32, f64)]) -> f64 {
        let mut statistic = 0.0;
        let mut seen = 0;
        for &(token, probability) in expected {
            let observed = draws.iter().filter(|&&d| d == token).count();
            let wanted = probability * draws.len() as f64;
            statistic += (observed as f64 - wanted).powi(2) / wanted;
            seen += observed;
        }
        if seen != draws.len() {
            return f64::INFINITY;
        }
        let freedom = (expected.len() as f64 - 1.0).max(1.0);
        (statistic - freedom) / (2.0 * freedom).sqrt()
    }

    fn draw_many(options: SamplerOptions, logits: &[f32], history: &[u32], count: usize) -> Vec<u32> {
        let mut sampler = sampler(options);
        let mut row = logits.to_vec();
        let mut draw = || {
            row.copy_from_slice(logits);
            sampler.sample(&mut row, history)
        };
        (0..count).map(|_| draw()).collect()
    }

    #[test]
    fn splitmix_follows_its_published_sequence() {
        let mut random = SplitMix64(1_234_567);
        assert_eq!(random.next(), 6_457_827_717_110_365_317);
        assert_eq!(random.next(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn draws_follow_the_defined_chain() {
        let mut random = SplitMix64(11);
        let cases = [
            plain(),
            SamplerOptions { temp: 0.5, ..plain() },
            SamplerOptions { top_k: 5, ..plain() },
            SamplerOptions { top_p: 0.7, ..plain() },
            SamplerOptions { min_p: 0.2, ..plain() },
            SamplerOptions { repeat_penalty: 1.8, repeat_last_n: 3, ..plain() },
            SamplerOptions { repeat_penalty: 1.8, repeat_last_n: -1, temp: 1.7, ..plain() },
            SamplerOptions {
                temp: 1.3,
                top_k: 9,
                top_p: 0.9,
                min_p: 0.1,
                repeat_penalty: 1.2,
                repeat_last_n: 2,
                seed: 5,
            },
        ];
        for options in cases {
            let logits = some_logits(&mut random, 24, 5.0);
            let history = [3, 9, 9, 17, 3, 4_000_000_000];
            let draws = draw_many(options.clone(), &logits, &history, 20_000);
            let off = deviation(&draws, &expected(&logits, &options, &history));
            assert!(off < 5.0, "{options:?}: {off} standard deviations off");
            // Negative control: the same check must reject a flatter distribution.
            let wrong = SamplerOptions { temp: options.temp * 1.5, ..options };
            let off = deviation(&draws, &expected(&logits, &wrong, &history));
            assert!(off > 5.0, "the check accepts {wrong:?}: {off}");
        }
    }

    /// A vocabulary larger than the selection's runs and buffer, with many equal logits.
    #[test]
    fn large_vocabularies_keep_exactly_the_defined_tokens() {
        let mut random = SplitMix64(3);
        for round in 0..40 {
            let mut logits = some_logits(&mut random, 3000, 6.0);
            if round % 2 == 0 {
                logits.iter_mut().for_each(|l| *l = (*l * 4.0).round() / 4.0);
            }
            let options = SamplerOptions {
                top_k: [0, 1, 40, 700, 2999, 3000, 9000][round % 7],
                top_p: [1.0, 0.97, 0.5, 0.0][round % 4],
                min_p: [0.0, 0.051][round / 4 % 2],
                ..plain()
            };
            let mut sampler = sampler(options.clone());
            sampler.sample(&mut logits.clone(), &[]);
            let mut kept: Vec<u32> = sampler.candidates.iter().map(|c| c.token).collect();
            let mut wanted: Vec<u32> = expected(&logits, &options, &[]).iter().map(|c| c.0).collect();
            kept.sort_unstable();
            wanted.sort_unstable();
            // The summation order differs, so the token at a nucleus's edge may fall on either side.
            let differing = kept.len().abs_diff(wanted.len());
            assert!(differing <= 1, "{options:?}: {} tokens for {}", kept.len(), wanted.len());
            if differing == 0 {
                assert_eq!(kept, wanted, "{options:?}");
            }
        }
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals_and_ignores_the_seed() {
        let mut sampler = sampler(SamplerOptions { seed: 99, ..SamplerOptions::greedy() });
        assert_eq!(sampler.sample(&mut [0.0, 2.5, -1.0, 2.5], &[]), 1);
    }

    #[test]
    fn a_seed_fixes_the_tokens() {
        let logits = [0.1f32, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8];
        let first = draw_many(plain(), &logits, &[], 64);
        assert_eq!(first, draw_many(plain(), &logits, &[], 64));
        assert_ne!(first, draw_many(SamplerOptions { seed: 8, ..plain() }, &logits, &[], 64));
    }

    #[test]
    fn penalty_weakens_each_recent_token_once() {
        let options = SamplerOptions { repeat_penalty: 2.0, repeat_last_n: 3, ..SamplerOptions::greedy() };
        let mut sampler = sampler(options);
        for _ in 0..2 {
            let mut logits = [8.0, -4.0, 6.0, 1.0, f32::NEG_INFINITY];
            // Token 0 is older than the window; 2 occurs twice in it.
            assert_eq!(sampler.sample(&mut logits, &[0, 2, 1, 2]), 0);
            assert_eq!(logits, [8.0, -8.0, 3.0, 1.0, f32::NEG_INFINITY]);
        }
        let mut logits = [1.0, f32::NEG_INFINITY, -2.0];
        sampler.sample(&mut logits, &[1, 2, u32::MAX]);
        assert_eq!(logits, [1.0, f32::NEG_INFINITY, -4.0]);
    }

    #[test]
    fn broken_logits_are_never_chosen() {
        let bad = [f32::NAN, f32::NEG_INFINITY, -f32::NAN];
        for temp in [0.0, 1e-38, 1.0, f32::MAX] {
            for top_k in [0, 1, 2] {
                let options =
                    SamplerOptions { temp, top_k, repeat_penalty: 1e-30, repeat_last_n: -1, ..plain() };
                let mut sampler = sampler(SamplerOptions { top_p: 0.9, min_p: 0.1, ..options });
                assert_eq!(sampler.try_sample(&mut bad.clone(), &[0, 1]), None);
                assert_eq!(sampler.try_sample(&mut [], &[0, 1]), None);
                assert_eq!(sampler.sample(&mut [], &[]), 0);
                let mut one_good = [bad[0], bad[1], f32::MIN, bad[2]];
                assert_eq!(sampler.try_sample(&mut one_good, &[2, 0]), Some(2));
                let mut infinite = [bad[0], 1e30, f32::INFINITY, bad[1]];
                assert_eq!(sampler.try_sample(&mut infinite, &[]), Some(2));
            }
        }
    }

    #[test]
    fn tokens_after_the_first_reuse_the_scratch() {
        let mut random = SplitMix64(21);
        for top_k in [0, 40] {
            let mut sampler =
                sampler(SamplerOptions { top_k, repeat_penalty: 1.1, ..SamplerOptions::default() });
            // Falling logits fill little of the buffer; later rows must still fit what the first reserved.
            let mut falling: Vec<f32> = (0..2000).map(|t| -(t as f32)).collect();
            sampler.sample(&mut falling, &[5]);
            let scratch = (sampler.candidates.as_ptr(), sampler.penalized.as_ptr());
            for _ in 0..50 {
                let history: Vec<u32> = (0..200).map(|_| (random.next() % 2000) as u32).collect();
                let mut rising: Vec<f32> = (0..2000).map(|t| t as f32 * 0.01).collect();
                sampler.sample(&mut rising, &history);
                sampler.sample(&mut some_logits(&mut random, 2000, 9.0), &history);
            }
            assert_eq!(scratch, (sampler.candidates.as_ptr(), sampler.penalized.as_ptr()));
            assert!(sampler.penalized.iter().all(|&word| word == 0));
        }
    }

    #[test]
    fn options_out_of_range_are_named() {
        let cases = [
            ("temp", SamplerOptions { temp: -0.1, ..plain() }),
            ("temp", SamplerOptions { temp: f32::NAN, ..plain() }),
            ("top_p", SamplerOptions { top_p: 1.5, ..plain() }),
            ("min_p", SamplerOptions { min_p: -0.5, ..plain() }),
            ("repeat_penalty", SamplerOptions { repeat_penalty: 0.0, ..plain() }),
            ("repeat_penalty", SamplerOptions { repeat_penalty: f32::INFINITY, ..plain() }),
        ];
        for (name, options) in cases {
            let error = Sampler::new(options).expect_err(name);
            assert_eq!(error.kind(), ErrorKind::Misuse);
            assert!(error.message().starts_with(name), "{error}");
        }
    }
}
