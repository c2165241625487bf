//! Stops, pauses and cools whatever is running, from any thread or callback, without blocking the caller.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};

/// The longest single wait: a change is noticed by then even without a notification.
const REST_MAX: Duration = Duration::from_secs(10);

/// How hot the device is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Heat {
    /// Cool: work at full speed.
    #[default]
    Nominal,
    /// Warm: a tenth of the time is spent resting.
    Fair,
    /// Hot: half of the time is spent resting.
    Serious,
    /// Too hot: work waits until this changes.
    Critical,
}

/// Requests to whatever is running.
#[derive(Debug, Default)]
pub struct Control {
    cancelled: AtomicBool,
    pace: Mutex<Pace>,
    /// Notified of every change.
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    paused: bool,
    heat: Heat,
}

impl Control {
    /// Ends what is running, and whatever follows, as cancelled.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        // `rest` holds this lock between checking the flag and waiting for a change.
        drop(self.pace());
        self.changed.notify_all();
    }

    /// Undoes a cancellation or a pause.
    pub fn resume(&self) {
        self.cancelled.store(false, Ordering::Release);
        self.pace().paused = false;
        self.changed.notify_all();
    }

    /// Makes what is running wait until it is resumed or cancelled.
    pub fn pause(&self) {
        self.pace().paused = true;
        self.changed.notify_all();
    }

    /// Makes what is running rest as this heat demands.
    pub fn set_heat(&self, heat: Heat) {
        self.pace().heat = heat;
        self.changed.notify_all();
    }

    /// Whether it has been cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// # Errors
    /// `Cancelled`.
    pub fn check(&self) -> Result<()> {
        match self.is_cancelled() {
            true => Err(Error::new(ErrorKind::Cancelled, "cancelled")),
            false => Ok(()),
        }
    }

    /// Call after work that took `worked`: rests as the heat demands, and waits while paused or too hot. `held`
    /// is called before such a wait.
    ///
    /// # Errors
    /// `Cancelled`, without further waiting; those of `held`.
    pub fn rest<E: From<Error>>(
        &self,
        worked: Duration,
        held: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let began = Instant::now();
        let (mut pace, mut told) = (self.pace(), false);
        loop {
            self.check()?;
            let is_held = pace.paused || pace.heat == Heat::Critical;
            let rest = match pace.heat {
                _ if is_held => REST_MAX,
                Heat::Serious => worked.saturating_sub(began.elapsed()),
                Heat::Fair => (worked / 9).saturating_sub(began.elapsed()),
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
            // While this waits, no callback runs and no other lock is held.
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
    use std::sync::Arc;

    fn waiting(control: &Arc<Control>) -> std::thread::JoinHandle<(Result<()>, u32)> {
        let its = control.clone();
        std::thread::spawn(move || {
            let mut told = 0;
            let rested = its.rest(Duration::ZERO, &mut || {
                told += 1;
                Ok(())
            });
            (rested, told)
        })
    }

    #[test]
    fn a_paused_call_goes_on_when_told_and_ends_when_cancelled() {
        let control = Arc::new(Control::default());
        control.pause();
        let paused = waiting(&control);
        std::thread::sleep(Duration::from_millis(30));
        assert!(!paused.is_finished());
        control.resume();
        let (rested, told) = paused.join().unwrap();
        assert!(rested.is_ok() && told == 1);
        control.set_heat(Heat::Critical);
        let hot = waiting(&control);
        std::thread::sleep(Duration::from_millis(30));
        assert!(!hot.is_finished());
        control.cancel();
        assert_eq!(hot.join().unwrap().0.unwrap_err().kind(), ErrorKind::Cancelled);
    }

    #[test]
    fn heat_costs_time_in_proportion_to_the_work() {
        let control = Control::default();
        let rest = |heat: Heat| {
            control.set_heat(heat);
            let began = Instant::now();
            control.rest::<Error>(Duration::from_millis(90), &mut || Ok(())).unwrap();
            began.elapsed().as_millis()
        };
        let (cool, fair, serious) = (rest(Heat::Nominal), rest(Heat::Fair), rest(Heat::Serious));
        assert!(cool < serious && fair >= 9 && serious >= 90, "{cool} {fair} {serious}");
    }
}
