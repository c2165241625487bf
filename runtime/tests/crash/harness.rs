//! Cuts the power before every operation of a workload, and of the recovery after it; makes every call
//! fail; and holds what is found against what was acknowledged.

use std::fmt;

use engraft_runtime::error::{ErrorKind, Result};
use engraft_runtime::rng::Rng;

use super::device::{Device, Fault, Lie};

/// A number for each thing that a reader may find; what each stands for is the workload's own.
pub type Found = usize;

/// Acknowledged steps, one after another, and how a program starts and reads.
pub struct Workload {
    pub name: &'static str,
    /// What is there, durable, before the first step.
    pub start: Device,
    /// `Ok` acknowledges. A step that is repeated after it failed leads where it would have led.
    pub steps: Vec<Box<dyn Fn(&Device) -> Result<()>>>,
    /// What a reader must find before the first step, and after each.
    pub expected: Vec<Found>,
    /// What a reader may find beside the old and the new while a step runs.
    pub between: Option<Found>,
    /// What a program does when it starts.
    pub restart: Box<dyn Fn(&Device) -> Result<()>>,
    /// What a reader finds; an error where it is torn, lost, or foreign.
    pub find: Box<dyn Fn(&Device) -> std::result::Result<Found, String>>,
}

/// How many states to look at.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// After each operation.
    pub states: usize,
    /// Of these, how many are recovered with every operation of the recovery cut in its turn.
    pub recovered: usize,
    /// After each operation of a recovery.
    pub again: usize,
    pub seed: u64,
}

/// What came of it.
#[derive(Default)]
pub struct Tally {
    /// Operations that were cut or failed.
    pub cuts: usize,
    /// States that were looked at.
    pub states: usize,
    pub wrong: Vec<String>,
}

impl Tally {
    fn check(&mut self, found: std::result::Result<(), String>, place: impl fmt::Display) {
        self.states += 1;
        self.wrong.extend(found.err().map(|e| format!("{place}: {e}")));
    }

    pub fn add(&mut self, other: Tally) {
        self.cuts += other.cuts;
        self.states += other.states;
        self.wrong.extend(other.wrong);
    }
}

impl Workload {
    /// Runs the steps from `first` on: how many were acknowledged in all, and why it ended early.
    fn run(&self, device: &Device, first: usize) -> (usize, Result<()>) {
        for (i, step) in self.steps.iter().enumerate().skip(first) {
            if let Err(error) = step(device) {
                return (i, Err(error));
            }
        }
        (self.steps.len(), Ok(()))
    }

    /// Whether it leaves any file that was not there, rather than fewer.
    pub fn writes(&self) -> bool {
        let device = self.start.fork(usize::MAX);
        let (before, ended) = (device.files(), self.run(&device, 0));
        ended.1.is_ok() && device.files().iter().any(|file| !before.contains(file))
    }

    /// Whether a reader finds what it may, after so many acknowledged steps and with another perhaps begun.
    fn judge(&self, device: &Device, acknowledged: usize) -> std::result::Result<(), String> {
        let found = (self.find)(device)?;
        let next = (acknowledged < self.steps.len()).then(|| self.expected[acknowledged + 1]);
        let between = self.between.filter(|_| next.is_some());
        if found == self.expected[acknowledged] || Some(found) == next || Some(found) == between {
            return Ok(());
        }
        Err(format!("{found} is found, after {acknowledged} steps: lost, or never written"))
    }

    /// What must hold after a restart: nothing is lost, no temporary file is left, and the rest can be done.
    fn go_on(&self, device: &Device, acknowledged: usize) -> std::result::Result<(), String> {
        self.judge(device, acknowledged)?;
        if let Some((path, _)) = device.files().iter().find(|(path, _)| path.ends_with(".engraft-tmp")) {
            return Err(format!("{path} is left"));
        }
        let device = device.fork(usize::MAX);
        self.run(&device, acknowledged).1.map_err(|e| format!("going on: {e:?}"))?;
        // Acknowledged now, so it outlives a cut right after.
        for cut in device.after_a_cut(2, &mut Rng::new(0, 0)) {
            self.judge(&cut, self.steps.len()).map_err(|e| format!("having gone on: {e}"))?;
        }
        Ok(())
    }
}

/// Cuts the power before every change and after the last one.
pub fn cut_everywhere(workload: &Workload, effort: Effort) -> Tally {
    let (mut tally, mut rng) = (Tally::default(), Rng::new(effort.seed, 1));
    for k in 0.. {
        let device = workload.start.fork(k);
        let (acknowledged, ended) = workload.run(&device, 0);
        tally.cuts += 1;
        let states = device.after_a_cut(effort.states, &mut rng);
        let chosen = rng.below(states.len() as u64) as usize;
        for (i, cut) in states.iter().enumerate() {
            let place = format!("{}, cut before change {k}, state {i}", workload.name);
            tally.check(workload.judge(cut, acknowledged), &place);
            if (i + states.len() - chosen) % states.len() < effort.recovered {
                cut_again(workload, cut, acknowledged, effort.again, &place, &mut tally, &mut rng);
            }
        }
        if !device.is_off() {
            if let Err(e) = ended {
                tally.wrong.push(format!("{} failed with the power on: {e:?}", workload.name));
            }
            return tally;
        }
    }
    unreachable!()
}

/// Recovers, with the power cut before every change, and recovers from that.
fn cut_again(
    workload: &Workload,
    after: &Device,
    acknowledged: usize,
    limit: usize,
    place: &str,
    tally: &mut Tally,
    rng: &mut Rng,
) {
    for j in 0.. {
        let device = after.fork(j);
        let ended = (workload.restart)(&device);
        if !device.is_off() {
            let found = ended.map_err(|e| format!("restarting: {e:?}"));
            tally.check(found.and_then(|()| workload.go_on(&device, acknowledged)), place);
            return;
        }
        for cut in device.after_a_cut(limit, rng) {
            let place = format!("{place}, cut again before change {j}");
            tally.check(workload.judge(&cut, acknowledged), &place);
            let ended = (workload.restart)(&cut).map_err(|e| format!("restarting: {e:?}"));
            tally.check(ended.and_then(|()| workload.go_on(&cut, acknowledged)), &place);
        }
    }
}

/// Makes the k-th call fail, for every k, alone or with all after it; then cuts the power, or restarts.
pub fn fail_everywhere(workload: &Workload, fault: Fault, lasting: bool, cuts: usize) -> Tally {
    let (mut tally, mut rng) = (Tally::default(), Rng::new(1, 2));
    for k in 1.. {
        let device = workload.start.fork(usize::MAX);
        device.fail(fault, k, lasting);
        let (acknowledged, ended) = workload.run(&device, 0);
        let place = format!("{}, {fault:?} at call {k}, lasting {lasting}", workload.name);
        if !device.mend() {
            tally.wrong.extend(ended.err().map(|e| format!("{place} was never reached: {e:?}")));
            return tally;
        }
        tally.cuts += 1;
        let expected = |kind| match fault {
            Fault::Full => kind == ErrorKind::Full,
            Fault::Broken | Fault::Unsynced => kind == ErrorKind::Io,
            Fault::Interrupted => kind == ErrorKind::Io,
            Fault::Short => false,
        };
        let error = ended.err().filter(|e| !expected(e.kind()));
        tally.wrong.extend(error.map(|e| format!("{place}: {e:?}")));
        tally.check(workload.judge(&device, acknowledged), &place);
        for cut in device.after_a_cut(cuts, &mut rng) {
            tally.check(workload.judge(&cut, acknowledged), format!("{place}, then cut"));
        }
        let ended = (workload.restart)(&device).map_err(|e| format!("restarting: {e:?}"));
        tally.check(ended.and_then(|()| workload.go_on(&device, acknowledged)), &place);
    }
    unreachable!()
}

/// The same workload on a device that forgets a duty once the start is durable.
pub fn lied_to(mut workload: Workload, lie: Lie) -> Workload {
    workload.start = workload.start.settled(lie);
    workload
}
