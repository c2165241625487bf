//! How a call that runs is stopped, held and cooled: from any thread, from callbacks, without waiting.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Failure, Result};

/// The device is cool: work at full speed. As `ProcessInfo.ThermalState.nominal`.
pub const ENGRAFT_THERMAL_NOMINAL: i32 = 0;
/// It is warm: a tenth of the time is spent resting.
pub const ENGRAFT_THERMAL_FAIR: i32 = 1;
/// It is hot: half of the time is spent resting.
pub const ENGRAFT_THERMAL_SERIOUS: i32 = 2;
/// It is too hot: work waits until this changes.
pub const ENGRAFT_THERMAL_CRITICAL: i32 = 3;

/// The longest wait at a time: a state that has changed is noticed by then, even if nobody says so.
const REST_MAX: Duration = Duration::from_secs(10);

/// What is asked of a call that runs.
#[derive(Debug, Default)]
pub(crate) struct Control {
    cancelled: AtomicBool,
    pace: Mutex<Pace>,
    /// Told of every change.
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    paused: bool,
    thermal: i32,
}

impl Control {
    /// The call that runs, and those that follow, end as cancelled.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        // Between a look at the flag and the wait for a change this lock is held.
        drop(self.pace());
        self.changed.notify_all();
    }

    /// Takes back a cancellation and a pause.
    pub(crate) fn resume(&self) {
        self.cancelled.store(false, Ordering::Release);
        self.pace().paused = false;
        self.changed.notify_all();
    }

    pub(crate) fn pause(&self) {
        self.pace().paused = true;
        self.changed.notify_all();
    }

    /// # Errors
    /// `MISUSE` for a state that is none.
    pub(crate) fn set_thermal(&self, thermal: i32) -> Result<()> {
        if !(ENGRAFT_THERMAL_NOMINAL..=ENGRAFT_THERMAL_CRITICAL).contains(&thermal) {
            return Err(Failure::misuse(format!("{thermal} is no thermal state")));
        }
        self.pace().thermal = thermal;
        self.changed.notify_all();
        Ok(())
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// # Errors
    /// `CANCELLED`.
    pub(crate) fn check(&self) -> Result<()> {
        match self.is_cancelled() {
            true => Err(Failure::cancelled("cancelled")),
            false => Ok(()),
        }
    }

    /// After work that took so long: rests as the heat demands, and waits while paused or too hot, which `held`
    /// is told of first.
    ///
    /// # Errors
    /// `CANCELLED`, without waiting any longer; those of `held`.
    pub(crate) fn rest(&self, worked: Duration, held: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let began = Instant::now();
        let (mut pace, mut told) = (self.pace(), false);
        loop {
            self.check()?;
            let is_held = pace.paused || pace.thermal == ENGRAFT_THERMAL_CRITICAL;
            let rest = match pace.thermal {
                _ if is_held => REST_MAX,
                ENGRAFT_THERMAL_SERIOUS => worked.saturating_sub(began.elapsed()),
                ENGRAFT_THERMAL_FAIR => (worked / 9).saturating_sub(began.elapsed()),
                _ => Duration::ZERO,
            };
            if rest.is_zero() {
                return Ok(());
            }
            if is_held && !told {
                drop(pace);
                held()?;
                told = true;
                pace = self.pace();
                continue;
            }
            told &= is_held;
            // No callback runs and nothing else is held while this waits.
            let waited = self.changed.wait_timeout(pace, rest.min(REST_MAX));
            (pace, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ENGRAFT_CANCELLED;
    use std::sync::Arc;

    #[test]
    fn a_paused_call_goes_on_when_told_and_ends_when_cancelled() {
        let control = Arc::new(Control::default());
        control.pause();
        let its = control.clone();
        let waiting = std::thread::spawn(move || {
            let mut told = 0;
            let rested = its.rest(Duration::ZERO, &mut || {
                told += 1;
                Ok(())
            });
            (rested, told)
        });
        std::thread::sleep(Duration::from_millis(30));
        assert!(!waiting.is_finished());
        control.resume();
        assert_eq!(waiting.join().unwrap(), (Ok(()), 1));
        control.set_thermal(ENGRAFT_THERMAL_CRITICAL).unwrap();
        let its = control.clone();
        let waiting = std::thread::spawn(move || {
            its.rest(Duration::ZERO, &mut || Ok(())).map_err(|failure| failure.code)
        });
        std::thread::sleep(Duration::from_millis(30));
        assert!(!waiting.is_finished());
        control.cancel();
        assert_eq!(waiting.join().unwrap(), Err(ENGRAFT_CANCELLED));
    }

    #[test]
    fn heat_costs_time_in_proportion_to_the_work() {
        let control = Control::default();
        let rest = |thermal: i32| {
            control.set_thermal(thermal).unwrap();
            let began = Instant::now();
            control.rest(Duration::from_millis(90), &mut || Ok(())).unwrap();
            began.elapsed().as_millis()
        };
        let (cool, fair, serious) =
            (rest(ENGRAFT_THERMAL_NOMINAL), rest(ENGRAFT_THERMAL_FAIR), rest(ENGRAFT_THERMAL_SERIOUS));
        assert!(cool < serious && fair >= 9 && serious >= 90, "{cool} {fair} {serious}");
        assert!(control.set_thermal(4).is_err() && control.set_thermal(-1).is_err());
    }
}
