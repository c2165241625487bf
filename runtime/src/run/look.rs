//! Looks: how good the parameters are now, on rows held out and on ordinary text set aside, and which of a run's looks
//! counts.

use std::time::Instant;

use super::checkpoint::{Best, Look};
use super::observer::{Event, Observer};
use super::prepare::RunRows;
use super::run::Run;
use super::settings::{Looks, Settings};
use crate::data::Example;
use crate::data::batches::in_order;
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::train::chain::Evaluated;

impl Run {
    pub(super) fn is_look_due(&self) -> bool {
        let step = self.steps();
        match self.settings.looks {
            Looks::Every(every) => every > 0 && step.is_multiple_of(every) && Some(step) != self.total(),
            // The last steps' parameters count too.
            Looks::Best { .. } if self.is_late() => true,
            Looks::Best { times, .. } => {
                let times = self.course.progress.times.unwrap_or(times).max(1);
                self.total().is_some_and(|total| step == total || step.is_multiple_of((total / times).max(1)))
            }
        }
    }

    /// Evaluates the held-out rows, and what is set aside; returns the held-out rows' mean loss, reported and recorded, or
    /// `None` without such rows. Before the first step this is the base's loss. If the best look counts and this is it,
    /// keeps the parameters.
    ///
    /// # Errors
    /// `NonFinite` for a loss that isn't finite, except that after the first step it merely can't be the best
    /// look. Those of the observer: a partial evaluation is discarded.
    pub fn look(&mut self, rows: RunRows<'_>, observer: &mut dyn Observer) -> Result<Option<f64>> {
        let began = Instant::now();
        let found = self.evaluated(rows.valid, observer)?;
        let mut aside = Vec::new();
        for set in if self.settings.keeps_best() { rows.aside } else { &[] } {
            let found = self.evaluated(&set.rows, observer)?;
            aside.push(found.loss_sum / found.targets as f64);
        }
        self.look_time = began.elapsed();
        self.base.model.check_whole()?;
        if found.targets == 0 {
            return Ok(None);
        }
        let (step, loss) = (self.steps(), found.loss_sum / found.targets as f64);
        if !loss.is_finite() && (step == 0 || !self.settings.keeps_best()) {
            let message = format!("the held-out loss is {loss}: the model or an adapter is broken");
            return Err(Error::new(ErrorKind::NonFinite, message).advise(Advice::ExactActivations));
        }
        let tally = &mut self.course.progress.tally;
        if step == 0 {
            (tally.valid_before, tally.aside_before) = (Some(loss), aside.clone());
        }
        let lost = aside.iter().zip(&tally.aside_before).map(|(now, before)| now - before);
        let forgot = lost.max_by(f64::total_cmp);
        let train = std::mem::take(&mut tally.unlooked);
        observer.tell(&self.name, Event::Look { step, total: self.total(), loss, forgot });
        let train = (train.count > 0).then(|| train.value());
        let valid = Some(loss).filter(|loss| loss.is_finite());
        self.course.progress.looks.push(Look { step, train, valid });
        if step > 0 {
            (self.valid_after, self.is_valid_of_now) = (Some(loss), true);
        }
        if self.settings.keeps_best() {
            let (sure, forgot) = (found.sure as u64, forgot.unwrap_or_default());
            self.keep_if_best(Best { step, loss, sure, forgot, waited: 0 });
        }
        Ok(Some(loss))
    }

    fn evaluated(&mut self, rows: &[Example], observer: &mut dyn Observer) -> Result<Evaluated> {
        let mut stopped = Ok(());
        let asked = in_order(rows, 1).take_while(|_| {
            stopped = observer.ask();
            stopped.is_ok()
        });
        let found = self.trainer.evaluate(asked);
        stopped.map(|()| found)
    }

    /// Keeps the current parameters if no look was better; the initial parameters count until then.
    fn keep_if_best(&mut self, now: Best) {
        let before = self.course.progress.tally.valid_before.unwrap_or(now.loss);
        match &mut self.course.progress.best {
            Some(best) if worth(&now, before, &self.settings) <= worth(best, before, &self.settings) => {
                best.waited += 1;
            }
            // A loss that isn't a number is no better than any.
            Some(best) if !now.loss.is_finite() => best.waited += 1,
            best => {
                *best = Some(now);
                self.trainer.keep_best();
            }
        }
    }
}

/// What a look is worth: its answers, if those count, then its gain over the loss before training. Both are shares of
/// what it has at full strength: the share at which, forgetting being about in proportion to strength, it would forget no
/// more than it may. Looks that forget little enough are so compared by answers alone.
fn worth(look: &Best, before: f64, settings: &Settings) -> (f64, f64) {
    let most = settings.forgets_most.max(0.0);
    // Forgetting that isn't a number leaves nothing.
    let strength = if look.forgot <= most { 1.0 } else { (most / look.forgot).max(0.0) };
    let answers = if settings.by_answers { strength * look.sure as f64 } else { 0.0 };
    let gain = before - look.loss;
    (answers, if gain > 0.0 { strength * gain } else { gain })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::Method;

    #[test]
    fn a_look_that_forgets_too_much_counts_for_as_much_less() {
        let method = Method::Full(None);
        let settings = Settings { by_answers: true, forgets_most: 0.02, ..Settings::of_arm(method) };
        let look = |sure, loss, forgot| Best { step: 1, loss, sure, forgot, waited: 0 };
        let is_better =
            |a: Best, b: Best, settings: &Settings| worth(&a, 3.0, settings) > worth(&b, 3.0, settings);
        // Within the ceiling answers decide, and the loss of equals.
        assert!(is_better(look(30, 2.0, 0.02), look(29, 1.0, -0.5), &settings));
        assert!(is_better(look(30, 1.0, 0.01), look(30, 2.0, -0.5), &settings));
        // At 0.4 of its strength, forty answers are worth sixteen.
        assert!(is_better(look(17, 2.0, 0.0), look(40, 0.1, 0.05), &settings));
        assert!(is_better(look(40, 0.1, 0.05), look(15, 2.0, 0.0), &settings));
        // By losses, it is the gain that shrinks; what gains nothing doesn't get better by forgetting.
        let by_loss = Settings { by_answers: false, ..settings.clone() };
        assert!(is_better(look(0, 2.0, 0.0), look(40, 1.0, 0.05), &by_loss));
        assert!(is_better(look(0, 3.0, 0.0), look(40, 4.0, 0.05), &by_loss));
        // Nothing need be kept, or nothing may be lost.
        let off = Settings { forgets_most: f64::INFINITY, ..settings.clone() };
        assert!(is_better(look(40, 0.1, 5.0), look(39, 2.0, 0.0), &off));
        // What isn't a number is worth nothing.
        assert!(is_better(look(1, 2.9, 0.0), look(40, 0.1, f64::NAN), &settings));
        let none = Settings { forgets_most: 0.0, ..settings };
        assert!(is_better(look(1, 2.9, 0.0), look(40, 0.1, 0.001), &none));
        assert!(!is_better(look(0, f64::NAN, 0.0), look(0, 3.0, 0.0), &by_loss));
    }
}
