//! Measures what merging cost: compares the merged model with the base plus adapter, on text neither was
//! trained on.

use std::sync::Arc;

use engraft_kernels::{Kernels, KvType};

use crate::data::Example;
use crate::error::{Error, ErrorKind, Result};
use crate::generate::{Sequence, StackedAdapter};
use crate::model::weights::ModelFile;
use crate::nn::Precision;

/// Positions read between comparisons of logits.
const PART: usize = 128;

/// Means over the scored tokens, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Judgement {
    /// Scored tokens.
    pub tokens: usize,
    /// Negative log likelihood of the base alone.
    pub nll_base: f64,
    /// Of the base with the adapter.
    pub nll_adapter: f64,
    /// Of the merged model.
    pub nll_merged: f64,
    /// KL(base with adapter ‖ merged): what merging changed.
    pub kl_merged: f64,
    /// KL(base with adapter ‖ base): what the adapter changed.
    pub kl_base: f64,
}

impl Judgement {
    /// What the adapter gains on this text, nats per token.
    pub fn gain(&self) -> f64 {
        self.nll_base - self.nll_adapter
    }

    /// How much of that gain merging lost.
    pub fn loss(&self) -> f64 {
        self.nll_merged - self.nll_adapter
    }

    /// Whether most of what the adapter does is gone. That is either most of its gain, if this text shows one,
    /// or its effect: the merged model is no nearer to the adapted one than the base alone. The second test
    /// also catches a faint adapter whose gain is within rounding noise.
    pub fn is_lost(&self) -> bool {
        let gone = self.gain() > 0.0 && self.loss() > 0.5 * self.gain();
        gone || self.kl_merged >= self.kl_base
    }
}

/// The three models being compared.
pub struct Judge {
    base: Sequence,
    adapted: Sequence,
    merged: Sequence,
    log_p: Vec<f64>,
}

impl Judge {
    /// Sequences for examples of at most `rows` positions.
    ///
    /// # Errors
    /// Those of [`Sequence::new`].
    pub fn new(
        base: &Arc<ModelFile>,
        adapter: Arc<StackedAdapter>,
        merged: &Arc<ModelFile>,
        kernels: &Arc<Kernels>,
        precision: Precision,
        rows: usize,
    ) -> Result<Judge> {
        let compared = [(base, None), (base, Some(adapter)), (merged, None)];
        Judge::of(compared, kernels, precision, rows)
    }

    /// The same for any adapter that replaces another on one base.
    ///
    /// # Errors
    /// Those of [`Sequence::new`].
    pub fn beside(
        base: &Arc<ModelFile>,
        adapter: Arc<StackedAdapter>,
        instead: Arc<StackedAdapter>,
        kernels: &Arc<Kernels>,
        precision: Precision,
        rows: usize,
    ) -> Result<Judge> {
        let compared = [(base, None), (base, Some(adapter)), (base, Some(instead))];
        Judge::of(compared, kernels, precision, rows)
    }

    fn of(
        compared: [(&Arc<ModelFile>, Option<Arc<StackedAdapter>>); 3],
        kernels: &Arc<Kernels>,
        precision: Precision,
        rows: usize,
    ) -> Result<Judge> {
        let log_p = vec![0.0; compared[0].0.config().vocab];
        let [base, adapted, merged] = compared.map(|(model, adapter)| {
            Sequence::new(model.clone(), kernels.clone(), adapter, precision, rows, KvType::F32)
        });
        Ok(Judge { base: base?, adapted: adapted?, merged: merged?, log_p })
    }

    /// Scores the masked tokens of examples. `progress` receives the number of examples done; return false to
    /// stop.
    ///
    /// # Errors
    /// `BadData` for no token to score; `NonFinite` if a model's output isn't finite; `Cancelled`; those of
    /// [`Sequence::read`].
    pub fn score(
        &mut self,
        examples: &[Example],
        mut progress: impl FnMut(usize) -> bool,
    ) -> Result<Judgement> {
        let mut sum = Judgement::default();
        for (i, example) in examples.iter().enumerate() {
            self.example(example, &mut sum)?;
            if !progress(i + 1) {
                return Err(Error::new(ErrorKind::Cancelled, "stopped before the merged model was measured"));
            }
        }
        if sum.tokens == 0 {
            return Err(Error::new(ErrorKind::BadData, "the held-out text has no token to score"));
        }
        let n = sum.tokens as f64;
        let mean = Judgement {
            tokens: sum.tokens,
            nll_base: sum.nll_base / n,
            nll_adapter: sum.nll_adapter / n,
            nll_merged: sum.nll_merged / n,
            kl_merged: sum.kl_merged / n,
            kl_base: sum.kl_base / n,
        };
        let all = [mean.nll_base, mean.nll_adapter, mean.nll_merged, mean.kl_merged, mean.kl_base];
        match all.iter().all(|v| v.is_finite()) {
            true => Ok(mean),
            false => Err(Error::new(ErrorKind::NonFinite, "a loss or a divergence isn't finite")),
        }
    }

    fn example(&mut self, example: &Example, sum: &mut Judgement) -> Result<()> {
        let Some(inputs) = example.ids.len().checked_sub(1) else { return Ok(()) };
        let Judge { base, adapted, merged, log_p } = self;
        for sequence in [&mut *base, &mut *adapted, &mut *merged] {
            sequence.truncate(0);
        }
        for (part, ids) in example.ids[..inputs].chunks(PART).enumerate() {
            for sequence in [&mut *base, &mut *adapted, &mut *merged] {
                sequence.read(ids, |_, _| Ok(()))?;
            }
            for row in 0..ids.len() {
                let next = part * PART + row + 1;
                if !example.mask[next] {
                    continue;
                }
                let target = example.ids[next] as usize;
                log_softmax(adapted.logits_at(row), log_p);
                let [b, m] = [&mut *base, &mut *merged].map(|s| against(log_p, s.logits_at(row), target));
                sum.tokens += 1;
                sum.nll_adapter -= log_p[target];
                (sum.nll_base, sum.kl_base) = (sum.nll_base + b.0, sum.kl_base + b.1);
                (sum.nll_merged, sum.kl_merged) = (sum.nll_merged + m.0, sum.kl_merged + m.1);
            }
        }
        Ok(())
    }
}

fn log_sum(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|v| f64::from(v - max).exp()).sum();
    f64::from(max) + sum.ln()
}

fn log_softmax(logits: &[f32], out: &mut [f64]) {
    let total = log_sum(logits);
    for (o, v) in out.iter_mut().zip(logits) {
        *o = f64::from(*v) - total;
    }
}

/// The negative log likelihood of `target` under `logits`, and KL(p ‖ softmax(logits)).
fn against(log_p: &[f64], logits: &[f32], target: usize) -> (f64, f64) {
    let total = log_sum(logits);
    let kl = log_p.iter().zip(logits).map(|(p, q)| p.exp() * (p - (f64::from(*q) - total))).sum();
    (total - f64::from(logits[target]), kl)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_and_likelihood_are_those_of_their_definitions() {
        let mut p = vec![0.0; 3];
        log_softmax(&[1.0, 2.0, 3.0], &mut p);
        let (nll, kl) = against(&p, &[1.0, 2.0, 3.0], 2);
        assert!((nll - 0.407_605_964).abs() < 1e-7 && kl.abs() < 1e-12);
        let (nll, kl) = against(&p, &[0.0, 0.0, 0.0], 1);
        assert!(
            (nll - 3.0_f64.ln()).abs() < 1e-12 && (kl - (3.0_f64.ln() - 0.832_395_5)).abs() < 1e-6,
            "{kl}"
        );
    }

    #[test]
    fn a_lost_gain_is_seen() {
        let at = |nll_merged, kl_merged| Judgement {
            tokens: 1,
            nll_base: 3.0,
            nll_adapter: 2.8,
            nll_merged,
            kl_merged,
            kl_base: 0.2,
        };
        assert!(!at(2.85, 0.1).is_lost() && at(2.85, 0.3).is_lost() && at(2.95, 0.0).is_lost());
        let harmful = |kl_merged| Judgement { nll_adapter: 3.1, ..at(3.0, kl_merged) };
        assert!(!harmful(0.15).is_lost() && harmful(0.25).is_lost());
    }
}
