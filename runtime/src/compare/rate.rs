//! The learning rate range test (Smith, arXiv 1506.01186): a short run whose rate grows with every step, which
//! shows the rate at which the loss falls fastest.
//!
//! A batch's loss says more about its rows than about the parameters. So the test watches how far the loss lies
//! below the untrained base's on the same batch.

use std::time::Instant;

use super::recipe::Recipe;
use crate::data::{Batch, Batches, Cursor};
use crate::error::{ErrorKind, Result};
use crate::gate::report::RateTest;
use crate::model::tuned::Weights;
use crate::plan::{ArenaWords, Request};
use crate::run::setup::trainer_at;
use crate::run::{Base, Event, Method, Observer, RunRows, Stepping};
use crate::train::Chain;
use crate::train::schedule::{Schedule, Shape};

/// Steps of the test.
const STEPS: usize = 48;
/// Rates of adapters, first and last.
const ADAPTER: (f64, f64) = (2e-5, 2e-2);
/// Rates of full fine-tuning.
const FULL: (f64, f64) = (1e-6, 1e-3);
/// Weight of past steps in the smoothed loss.
const MEMORY: f64 = 0.75;
/// The test ends at this rise above the lowest smoothed loss, nats.
const RISE: f64 = 0.3;
/// The chosen rate as a fraction of the one with the lowest smoothed loss. That is about where steps become too
/// long, and a run stays at its peak far longer than the test does.
const PART: f64 = 0.25;

/// Tries rates on the training rows, starting from the recipe's initial state.
///
/// # Errors
/// Those of training, except that a non-finite loss only ends the test; `Cancelled`.
pub fn test(
    recipe: &Recipe,
    base: &Base,
    rows: RunRows<'_>,
    request: &Request,
    observer: &mut dyn Observer,
) -> Result<RateTest> {
    let Recipe { name, settings, .. } = recipe;
    let size = settings.batch.min(rows.train.len());
    let batches: Vec<Batch> =
        Batches::new(rows.train, size, settings.seed, Cursor::default()).take(STEPS).collect();
    let plain = plain_losses(base, request, &batches, observer)?;
    let (low, high) = if matches!(settings.method, Method::Full(_)) { FULL } else { ADAPTER };
    let rate_of = |i: usize| low * (high / low).powf(i as f64 / (STEPS - 1) as f64);
    let name = format!("{name}: range test");
    let mut trainer = trainer_at(base, settings, request, rows, low, (&name, &mut *observer))?;
    let mut curve = Curve::default();
    let (started, mut tokens) = (Instant::now(), 0);
    observer.note(&format!("{name}, {} steps at rates of {low:.0e} to {high:.0e}", batches.len()));
    for (i, batch) in batches.iter().enumerate() {
        observer.ask()?;
        let peak = rate_of(i) as f32;
        trainer.set_schedule(Schedule { shape: Shape::Constant, peak, warmup: 0, total: u64::MAX });
        let report = match trainer.step(std::slice::from_ref(batch)) {
            Ok(report) => report,
            Err(error) if error.kind() == ErrorKind::NonFinite => break,
            Err(error) => return Err(error),
        };
        tokens += batch.ids.len() as u64;
        let (step, total) = (i as u64 + 1, Some(batches.len() as u64));
        let seconds = started.elapsed().as_secs_f64();
        observer.tell(&name, Event::Step(&Stepping { step, total, report, tokens, seconds }));
        // This loss is of the parameters before the step.
        if i > 0 && curve.push(rate_of(i - 1), report.loss - plain[i]) {
            break;
        }
    }
    let chosen = curve.chosen().unwrap_or(low);
    observer.note(&format!("{}: the range test chose a learning rate of {chosen:.2e}", recipe.name));
    Ok(RateTest { points: curve.points, chosen })
}

/// The untrained base's loss on each batch.
fn plain_losses(
    base: &Base,
    request: &Request,
    batches: &[Batch],
    observer: &mut dyn Observer,
) -> Result<Vec<f64>> {
    let request =
        Request { full: None, rank: 0, params: 0, beside_base: false, keep: Default::default(), ..*request };
    let words = ArenaWords::new(base.model.config(), &request);
    let model: Weights = base.model.clone().into();
    let mut chain = Chain::new(model, base.kernels.clone(), base.precision, words);
    let mut losses = Vec::with_capacity(batches.len());
    for batch in batches {
        observer.ask()?;
        let found = chain.evaluate(None, batch, |_, _| {});
        losses.push(found.loss_sum / found.targets.max(1) as f64);
    }
    Ok(losses)
}

/// Smoothed losses by rate.
#[derive(Default)]
struct Curve {
    points: Vec<(f64, f64)>,
    average: f64,
    weight: f64,
}

impl Curve {
    /// Adds the loss reached with steps up to this rate; returns whether it rose too far to continue.
    fn push(&mut self, rate: f64, loss: f64) -> bool {
        self.average = MEMORY * self.average + (1.0 - MEMORY) * loss;
        self.weight = MEMORY * self.weight + (1.0 - MEMORY);
        let smoothed = self.average / self.weight;
        self.points.push((rate, smoothed));
        let lowest = self.points.iter().map(|p| p.1).fold(f64::INFINITY, f64::min);
        !smoothed.is_finite() || smoothed > lowest + RISE
    }

    fn chosen(&self) -> Option<f64> {
        let finite = self.points.iter().filter(|p| p.1.is_finite());
        finite.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(rate, _)| rate * PART)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A loss that falls as the rate grows, until it blows up.
    fn curve(breaks_at: f64) -> Curve {
        let mut curve = Curve::default();
        for i in 0..STEPS {
            let rate = 1e-5 * 1e3f64.powf(i as f64 / (STEPS - 1) as f64);
            let loss = if rate < breaks_at { -rate.sqrt() } else { 3.0 * (rate / breaks_at) };
            if curve.push(rate, loss) {
                break;
            }
        }
        curve
    }

    #[test]
    fn the_rate_stays_below_where_losses_rise() {
        for breaks_at in [1e-4, 1e-3, 5e-3] {
            let curve = curve(breaks_at);
            let chosen = curve.chosen().unwrap();
            assert!(chosen < breaks_at && chosen > breaks_at / 20.0, "{chosen} of {breaks_at}");
            assert!(curve.points.len() < STEPS, "the test ends where losses rise");
        }
        assert_eq!(Curve::default().chosen(), None);
    }
}
