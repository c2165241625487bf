//! The time of a comparison: all of it within the minutes asked for. Training takes what scoring leaves.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::error::Result;
use crate::run::{Event, Observer};

/// How much longer a model takes with an adapter beside it.
const ADAPTED: f64 = 1.4;
/// A tuned model beside its base: both run, and their logits are compared.
const BESIDE: f64 = 2.5;
/// Waits that count as such; shorter ones are the observer's own work.
const WAIT: Duration = Duration::from_millis(50);
/// The least that a training gets of the time asked for, however little scoring leaves.
const LEAST_SHARE: f64 = 0.1;

/// What is left of the time, and what scoring takes.
pub(super) struct Clock {
    started: Instant,
    /// All the time, in seconds; `None` if none was set.
    all: Option<f64>,
    /// Trainings still to come.
    runs: Cell<usize>,
    /// Time spent waiting for the machine, which isn't counted.
    waited: Cell<Duration>,
    /// Whether its shares were told.
    is_told: Cell<bool>,
    /// Seconds of one arm's answers, and of reading a token.
    answers: Cell<f64>,
    token: Cell<f64>,
}

impl Clock {
    /// Starts it, for so many trainings.
    pub(super) fn new(minutes: Option<f64>, runs: usize) -> Clock {
        Clock {
            started: Instant::now(),
            all: minutes.map(|minutes| 60.0 * minutes),
            runs: Cell::new(runs),
            waited: Cell::new(Duration::ZERO),
            is_told: Cell::new(false),
            answers: Cell::new(0.0),
            token: Cell::new(0.0),
        }
    }

    /// Learns from an arm how long scoring takes.
    pub(super) fn scored(&self, (tokens, seconds): (usize, f64), answers: f64) {
        self.token.set((seconds / tokens.max(1) as f64).max(self.token.get()));
        self.answers.set(answers.max(self.answers.get()));
    }

    /// When the next training has to end, so that there is time to judge it (one arm's answers, `alone` tokens read by
    /// it, and `beside` read by it and its base), and for the trainings after it. `None` without a limit.
    pub(super) fn training_ends(&self, alone: usize, beside: usize) -> Option<Instant> {
        Some(Instant::now() + Duration::from_secs_f64(self.own(alone, beside)?))
    }

    /// All the time and that for training, in seconds, the first time; afterwards, or without a limit or a training, `None`.
    pub(super) fn shares(&self, alone: usize, beside: usize) -> Option<(f64, f64)> {
        let (all, runs) = (self.all?, self.runs.get());
        let own = self.own(alone, beside)?;
        (runs > 0 && !self.is_told.replace(true)).then_some((all, own * runs as f64))
    }

    /// Seconds of the next training.
    fn own(&self, alone: usize, beside: usize) -> Option<f64> {
        let (all, left) = self.left()?;
        let tokens = ADAPTED * alone as f64 + BESIDE * beside as f64;
        let after = ADAPTED * self.answers.get() + tokens * self.token.get();
        let runs = self.runs.get().max(1) as f64;
        Some((left / runs - after).max(LEAST_SHARE * all / runs))
    }

    /// A training has ended and was judged.
    pub(super) fn judged(&self) {
        self.runs.set(self.runs.get().saturating_sub(1));
    }

    /// The time asked for, in seconds, and what is left of it.
    pub(super) fn left(&self) -> Option<(f64, f64)> {
        let spent = (self.started.elapsed() - self.waited.get()).as_secs_f64();
        self.all.map(|all| (all, all - spent))
    }
}

/// An observer whose waits a clock doesn't count.
pub(super) struct Patient<'a> {
    pub(super) observer: &'a mut dyn Observer,
    pub(super) clock: &'a Clock,
}

impl Observer for Patient<'_> {
    fn go_on(&mut self, save: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let asked = Instant::now();
        let answer = self.observer.go_on(save);
        let took = asked.elapsed();
        if took >= WAIT {
            self.clock.waited.set(self.clock.waited.get() + took);
        }
        answer
    }

    fn tell(&mut self, run: &str, event: Event<'_>) {
        self.observer.tell(run, event);
    }

    fn begin_peak(&mut self) {
        self.observer.begin_peak();
    }

    fn peak_bytes(&mut self) -> Option<u64> {
        self.observer.peak_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn training_takes_what_scoring_leaves() {
        let seconds = |clock: &Clock, alone, beside| {
            let ends = clock.training_ends(alone, beside).expect("a limit");
            (ends - Instant::now()).as_secs_f64()
        };
        assert!(Clock::new(None, 1).training_ends(9, 9).is_none());
        let clock = Clock::new(Some(2.0), 2);
        assert!((seconds(&clock, 0, 0) - 60.0).abs() < 1.0, "two trainings share two minutes");
        clock.scored((100, 1.0), 10.0);
        // 1.4 · (10 s + 100 · 10 ms) + 2.5 · 200 · 10 ms.
        assert!((seconds(&clock, 100, 200) - (60.0 - 15.4 - 5.0)).abs() < 1.0);
        clock.judged();
        assert!((seconds(&clock, 100, 200) - (120.0 - 20.4)).abs() < 1.0);
        let (all, training) = clock.shares(100, 200).expect("the first time");
        assert!(all == 120.0 && (training - (120.0 - 20.4)).abs() < 1.0, "{training}");
        assert!(clock.shares(100, 200).is_none(), "told once");
        // However little is left, something is trained.
        clock.scored((100, 1.0), 1000.0);
        assert!((seconds(&clock, 0, 0) - 12.0).abs() < 1.0);
    }

    #[test]
    fn waits_are_not_counted() {
        struct Slow;
        impl Observer for Slow {
            fn go_on(&mut self, _: &mut dyn FnMut() -> Result<()>) -> Result<()> {
                std::thread::sleep(2 * WAIT);
                Ok(())
            }

            fn tell(&mut self, _: &str, _: Event<'_>) {}
        }
        let clock = Clock::new(Some(1.0), 1);
        Patient { observer: &mut Slow, clock: &clock }.ask().expect("it goes on");
        assert!(clock.waited.get() >= 2 * WAIT);
        assert!(clock.left().expect("a limit").1 > 59.9);
    }
}
