//! When long work may run: while other programs are idle, the machine is cool, or it has mains power.

mod readings;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum, value_parser};
use engraft_runtime::error::{Error, ErrorKind, Result};

use crate::options::misuse;
use crate::progress::Progress;
use crate::provenance::{PROFILES, profile};
use crate::units;
pub(crate) use readings::System;
use readings::{Processor, Readings};

/// Time between two checks of the machine.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How often a waiting run checks for Ctrl-C.
const HEAR_EVERY: Duration = Duration::from_millis(100);
/// The limits without a profile. A Pi's firmware throttles at 80 °C.
const START_BELOW_C: u32 = 65;
const PAUSE_ABOVE_C: u32 = 78;
/// Share of all processors that other programs may use by default.
const IDLE_BELOW: f64 = 0.25;

/// A condition that the machine must meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Condition {
    /// Other programs use little of the processors
    Idle,
    /// The warmest sensor is below --pause-above, and was below --start-below since the last pause
    Cool,
    /// The machine doesn't run on a battery
    Powered,
}

/// When to run.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "When to run")]
pub(crate) struct WhenOptions {
    /// Run only while the machine is all of these: idle, cool, powered
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',')]
    only_when: Vec<Condition>,

    /// Use this device's profile: its memory, and for cool its temperatures
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(PROFILES.iter().map(|p| p.name)))]
    device: Option<String>,

    /// For cool: start, and restart after a pause, below this temperature in °C [default: 65, or the device's]
    #[arg(long, value_name = "C", value_parser = value_parser!(u32).range(1..=150))]
    start_below: Option<u32>,

    /// For cool: pause above this temperature in °C [default: 78, or the device's]
    #[arg(long, value_name = "C", value_parser = value_parser!(u32).range(1..=150))]
    pause_above: Option<u32>,

    /// For idle: share of all processors that other programs may use [default: 0.25]
    #[arg(long, value_name = "SHARE", value_parser = units::parse_share)]
    idle_below: Option<f64>,

    /// Give up after waiting this long in total (90s, 30m, 4h) [default: never]
    #[arg(long, value_name = "TIME", value_parser = units::parse_duration)]
    wait: Option<Duration>,
}

impl WhenOptions {
    /// The device given with `--device`.
    pub(crate) fn device(&self) -> Option<&str> {
        self.device.as_deref()
    }

    /// Starts watching these conditions on this machine.
    ///
    /// # Errors
    /// `Misuse` for temperatures in the wrong order, limits without a condition, and conditions that this
    /// machine can't measure.
    pub(crate) fn watch(&self) -> Result<Conditions> {
        self.watch_on(Box::new(System::default()))
    }

    /// A flag that has no effect, because no condition is given.
    fn idle_flag(&self) -> Option<&'static str> {
        let given = [
            ("--start-below", self.start_below.is_some()),
            ("--pause-above", self.pause_above.is_some()),
            ("--idle-below", self.idle_below.is_some()),
            ("--wait", self.wait.is_some()),
        ];
        let idle = given.into_iter().find(|(_, given)| *given && self.only_when.is_empty());
        idle.map(|(flag, _)| flag)
    }

    fn watch_on(&self, mut readings: Box<dyn Readings>) -> Result<Conditions> {
        let profile = self.device().and_then(profile);
        let start_c = self.start_below.unwrap_or(profile.map_or(START_BELOW_C, |p| p.start_c));
        let pause_c = self.pause_above.unwrap_or(profile.map_or(PAUSE_ABOVE_C, |p| p.stop_c));
        if start_c >= pause_c {
            return Err(misuse(format!("--start-below {start_c} must be below --pause-above ({pause_c})")));
        }
        if let Some(flag) = self.idle_flag() {
            return Err(misuse(format!("{flag} has no effect without --only-when; add it")));
        }
        let unknown = |what: &str, condition: &str| {
            let message =
                format!("--only-when {condition}: this machine doesn't report its {what}; leave it out");
            Err(misuse(message))
        };
        for condition in &self.only_when {
            match condition {
                Condition::Cool if readings.temperature().is_none() => {
                    return unknown("temperature", "cool");
                }
                Condition::Idle if readings.processor().is_none() => return unknown("load", "idle"),
                _ => {}
            }
        }
        Ok(Conditions {
            asked: self.only_when.clone(),
            limits: Limits { start_c, pause_c, busy_max: self.idle_below.unwrap_or(IDLE_BELOW) },
            patience: self.wait,
            readings,
            running: false,
            processor: None,
            looked: None,
            waited: Duration::ZERO,
            deadline: None,
        })
    }
}

#[derive(Clone, Copy, Debug)]
struct Limits {
    start_c: u32,
    pause_c: u32,
    busy_max: f64,
}

/// What to tell the user about a wait.
#[derive(Clone, Debug)]
pub(crate) enum Notice {
    /// The run starts waiting, for this reason.
    Waits(String),
    /// The wait is over.
    GoesOn,
}

impl std::fmt::Display for Notice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Notice::Waits(why) => write!(f, "waiting: {why}"),
            Notice::GoesOn => f.write_str("continuing"),
        }
    }
}

/// Watches the machine for a run.
pub(crate) struct Conditions {
    asked: Vec<Condition>,
    limits: Limits,
    patience: Option<Duration>,
    readings: Box<dyn Readings>,
    /// Whether the run is going. It may get warmer then than at its start.
    running: bool,
    /// Processor time at the last check.
    processor: Option<Processor>,
    looked: Option<Instant>,
    waited: Duration,
    /// When waiting ends, whatever the machine's state.
    deadline: Option<Instant>,
}

impl Conditions {
    /// Sets the time until which to wait at most.
    pub(crate) fn end_at(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// Returns when the run may continue, is cancelled, or is out of time. It is cheap to call often, because
    /// it checks the machine rarely. Before each wait it tells `tell` the reason, once.
    ///
    /// # Errors
    /// `Busy` after waiting longer than allowed.
    pub(crate) fn go_on(&mut self, cancel: &AtomicBool, tell: &mut dyn FnMut(Notice)) -> Result<()> {
        if self.asked.is_empty() || self.looked.is_some_and(|at| at.elapsed() < LOOK_EVERY) {
            return Ok(());
        }
        let mut told = false;
        while let Some(why) = self.obstacle() {
            self.running = false;
            if !told {
                tell(Notice::Waits(why.clone()));
                told = true;
            }
            let begun = Instant::now();
            let ends = || {
                let is_over = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
                is_over || cancel.load(Ordering::Relaxed)
            };
            while begun.elapsed() < LOOK_EVERY && !ends() {
                std::thread::sleep(HEAR_EVERY);
            }
            if ends() {
                return Ok(());
            }
            self.waited += begun.elapsed();
            if self.patience.is_some_and(|patience| self.waited >= patience) {
                let message = format!("--wait: gave up after {} s of waiting: {why}", self.waited.as_secs());
                return Err(Error::new(ErrorKind::Busy, message));
            }
        }
        if told {
            tell(Notice::GoesOn);
        }
        self.running = true;
        self.looked = Some(Instant::now());
        Ok(())
    }

    /// The same for an observer of a run: shows each notice, and saves before a wait.
    ///
    /// # Errors
    /// Those of [`Conditions::go_on`] and of saving.
    pub(crate) fn observe(
        &mut self,
        cancel: &AtomicBool,
        progress: &mut Progress,
        save: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let mut saved = Ok(());
        self.go_on(cancel, &mut |notice| {
            progress.note(&notice.to_string());
            if matches!(notice, Notice::Waits(_)) {
                saved = save();
            }
        })?;
        saved
    }

    /// The reason why the run can't continue now.
    fn obstacle(&mut self) -> Option<String> {
        self.asked.clone().into_iter().find_map(|condition| match condition {
            Condition::Idle => self.busy(),
            Condition::Cool => self.warm(),
            Condition::Powered => {
                let on_battery = self.readings.powered() == Some(false);
                on_battery.then(|| "the machine runs on its battery".to_string())
            }
        })
    }

    fn warm(&mut self) -> Option<String> {
        let limit = if self.running { self.limits.pause_c } else { self.limits.start_c };
        match self.readings.temperature() {
            Some(now) if now < f64::from(limit) => None,
            Some(now) => Some(format!("the machine has {now:.0} °C; the limit is {limit} °C")),
            // A failed sensor mustn't let the machine overheat.
            None => Some("the temperature can't be read any more".into()),
        }
    }

    /// Too much use of the processors by others since the last check. The first check can't tell.
    fn busy(&mut self) -> Option<String> {
        let Some(now) = self.readings.processor() else {
            return Some("the processors' load can't be read any more".into());
        };
        let Some(before) = self.processor.replace(now) else {
            return Some("the processors' load is being measured".into());
        };
        let share = now.used_by_others_since(&before)?;
        (share > self.limits.busy_max).then(|| {
            let limit = 100.0 * self.limits.busy_max;
            format!("other programs use {:.0} % of the processors; the limit is {limit:.0} %", 100.0 * share)
        })
    }
}

#[cfg(test)]
mod tests;
