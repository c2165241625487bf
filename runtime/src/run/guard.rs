//! Handles a loss that isn't finite or keeps growing. A failed step is skipped, a diverged run returns to an
//! earlier checkpoint at half the learning rate, and a run that keeps diverging stops. Decisions follow from
//! the losses alone, and their state is part of every checkpoint.

use serde::{Deserialize, Serialize};

use crate::error::{Advice, Error, ErrorKind, Result};
use crate::train::StepReport;

/// Consecutive failed steps after which a run counts as diverged. One bad batch is no reason to roll back;
/// parameters that are NaN fail every step.
pub const FAILED_MAX: u32 = 3;
/// Most rollbacks: if a run still diverges at an eighth of its rate, the rate isn't the cause.
pub const ROLLBACKS_MAX: u32 = 3;
/// Factor on the learning rate for each rollback.
const CUT: f32 = 0.5;
/// Steps the smoothed loss averages over, so one hard row doesn't count as divergence.
const SMOOTHED_STEPS: u64 = 20;
/// A run has diverged if its smoothed loss exceeds its best by this factor and by [`MARGIN`]. Losses of single
/// rows vary by more, means of twenty don't; a diverging run passes both within a few steps.
const RATIO: f64 = 3.0;
/// Nats; lets a loss near zero multiply.
const MARGIN: f64 = 1.0;

/// Watches a run's steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Guard {
    /// What is left of the learning rate: a power of one half.
    pub factor: f32,
    /// Failed steps since the last good one.
    pub failed: u32,
    /// Failed steps in all.
    pub skipped: u64,
    /// Rollbacks to an earlier checkpoint.
    pub rollbacks: u32,
    /// Smoothed loss of the last steps, nats.
    smoothed: f64,
    /// Steps that went into it.
    seen: u64,
    /// Its lowest value, once it averages over enough steps.
    best: Option<f64>,
}

/// The verdict on a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Judged {
    /// A good step.
    Good(StepReport),
    /// It failed and changed nothing: continue with the next rows.
    Skipped(String),
    /// The run diverged: return to an earlier checkpoint.
    Diverged(String),
}

impl Default for Guard {
    fn default() -> Guard {
        Guard { factor: 1.0, failed: 0, skipped: 0, rollbacks: 0, smoothed: 0.0, seen: 0, best: None }
    }
}

impl Guard {
    /// Judges the outcome of a trainer's step. `whole` is false if the step left parameters partly updated.
    ///
    /// # Errors
    /// The step's own, unless it is `NonFinite`.
    pub fn judge(&mut self, outcome: Result<StepReport>, whole: bool) -> Result<Judged> {
        let report = match outcome {
            Ok(report) => report,
            Err(error) if error.kind() == ErrorKind::NonFinite => {
                self.failed += 1;
                self.skipped += 1;
                let message = error.message().to_owned();
                let is_over = !whole || self.failed >= FAILED_MAX;
                return Ok(if is_over { Judged::Diverged(message) } else { Judged::Skipped(message) });
            }
            Err(error) => return Err(error),
        };
        self.failed = 0;
        self.seen += 1;
        self.smoothed += (report.loss - self.smoothed) / self.seen.min(SMOOTHED_STEPS) as f64;
        if let Some(best) = self.best.filter(|best| self.smoothed > (RATIO * best).max(best + MARGIN)) {
            let (now, steps) = (self.smoothed, SMOOTHED_STEPS);
            let what = format!("the loss of the last {steps} steps is {now:.3}, up from {best:.3}");
            return Ok(Judged::Diverged(what));
        }
        if self.seen >= SMOOTHED_STEPS {
            self.best = Some(self.best.map_or(self.smoothed, |best| best.min(self.smoothed)));
        }
        Ok(Judged::Good(report))
    }

    /// Whether the run is steady enough to be returned to: below half of what counts as divergence.
    pub fn is_steady(&self) -> bool {
        let limit = |best: f64| (0.5 * (1.0 + RATIO) * best).max(best + 0.5 * MARGIN);
        self.failed == 0 && self.best.is_none_or(|best| self.smoothed <= limit(best))
    }

    /// Checks whether another rollback is allowed, after what `happened` at `step`.
    ///
    /// # Errors
    /// `NonFinite` if there were too many already.
    pub fn check_rollback(&self, step: u64, happened: &str) -> Result<()> {
        if self.rollbacks < ROLLBACKS_MAX {
            return Ok(());
        }
        let message = format!(
            "stopped at step {step} after {} rollbacks to an earlier checkpoint, the last at {} of the \
             learning rate: {happened}",
            self.rollbacks, self.factor
        );
        Err(Error::new(ErrorKind::NonFinite, message).advise(Advice::LowerRate))
    }

    /// Continues at half the learning rate from an earlier checkpoint, whose guard is given.
    pub fn rolled_back_to(&mut self, then: &Guard) {
        let (factor, rollbacks) = (self.factor * CUT, self.rollbacks + 1);
        *self = Guard { factor, rollbacks, failed: 0, skipped: self.skipped, ..then.clone() };
    }

    /// Whether a run can have these numbers; a file may hold anything.
    pub(super) fn is_sane(&self) -> bool {
        let finite = self.smoothed.is_finite() && self.best.is_none_or(f64::is_finite);
        finite && self.factor > 0.0 && self.factor <= 1.0 && self.rollbacks <= ROLLBACKS_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loss(loss: f64) -> Result<StepReport> {
        Ok(StepReport { loss, kl: None, targets: 1, tokens: 1, grad_norm: 1.0, lr: 1e-3 })
    }

    fn failure() -> Result<StepReport> {
        Err(Error::new(ErrorKind::NonFinite, "no number"))
    }

    fn judged(guard: &mut Guard, outcome: Result<StepReport>) -> &'static str {
        match guard.judge(outcome, true).unwrap() {
            Judged::Good(_) => "good",
            Judged::Skipped(_) => "skipped",
            Judged::Diverged(_) => "diverged",
        }
    }

    #[test]
    fn three_failures_in_a_row_are_a_divergence() {
        let mut guard = Guard::default();
        for _ in 0..10 {
            assert_eq!(
                [failure(), failure(), loss(1.0)].map(|o| judged(&mut guard, o)),
                ["skipped", "skipped", "good"]
            );
        }
        assert!(guard.is_steady());
        assert_eq!([failure(), failure(), failure()].map(|o| judged(&mut guard, o))[2], "diverged");
        assert!(!guard.is_steady());
        assert!(matches!(Guard::default().judge(failure(), false), Ok(Judged::Diverged(_))));
        let other = Err(Error::new(ErrorKind::BadData, "no row"));
        assert_eq!(guard.judge(other, true).unwrap_err().kind(), ErrorKind::BadData);
    }

    #[test]
    fn noise_is_no_divergence_and_an_explosion_is() {
        let mut guard = Guard::default();
        // Rows of very different difficulty, in a fixed mixture.
        let noise = |i: u64| [0.02, 4.0, 0.5, 2.0, 0.1, 3.0][(i * 7 % 6) as usize];
        assert!((0..2000).all(|i| judged(&mut guard, loss(noise(i))) == "good"));
        // From a tenth of a nat to one is still none: the margin is absolute there.
        let mut low = Guard::default();
        assert!((0..100).all(|_| judged(&mut low, loss(0.1)) == "good"));
        assert!((0..100).all(|_| judged(&mut low, loss(1.0)) == "good"));
        let after = (0..40).position(|_| judged(&mut guard, loss(12.0)) == "diverged");
        assert!(after.is_some_and(|steps| steps < 20), "{after:?}");
    }

    #[test]
    fn returns_halve_the_rate_and_end() {
        let (mut guard, then) = (Guard::default(), Guard::default());
        for k in 1..=ROLLBACKS_MAX {
            guard.check_rollback(7, "no number").unwrap();
            guard.rolled_back_to(&then);
            assert_eq!((guard.rollbacks, guard.factor), (k, 0.5f32.powi(k as i32)));
        }
        let error = guard.check_rollback(7, "no number").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NonFinite);
        for words in ["step 7", "no number", "0.125"] {
            assert!(error.message().contains(words), "{words}: {error}");
        }
    }
}
