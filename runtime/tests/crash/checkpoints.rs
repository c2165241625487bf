//! A training run's checkpoints: which step a restart goes on from, and which anchor it could return to.

use std::cell::RefCell;
use std::path::Path;

use engraft_runtime::error::Result;
use engraft_runtime::nn::{GradientPrecision, Precision};
use engraft_runtime::rng::Rng;
use engraft_runtime::run::checkpoint::Progress;
use engraft_runtime::run::{Checkpoints, Identity};
use engraft_runtime::storage::{Storage, remove_stray_files};
use engraft_runtime::train::optim::AdamWConfig;
use engraft_runtime::train::schedule::Shape;
use engraft_runtime::train::{Numbers, NumbersMut};
use engraft_runtime::train::{Schedule, TrainOptions};

use super::device::{Device, Lie};
use super::harness::{Found, Workload};
use super::workloads::NOTHING;

const DIR: &str = "/out/run";
/// Parameters: with their moments more than is written at once.
const LEN: usize = 7000;
/// Every second save is an anchor.
const ANCHORS: u64 = 2;

/// A run, and the device it writes to.
type Running = RefCell<Option<(Device, Checkpoints)>>;

/// A run with two.
pub fn begun() -> Device {
    let device = Device::new();
    save(&device, &Running::default(), 1).and_then(|()| save(&device, &Running::default(), 2)).unwrap();
    device.settled(Lie::None)
}

pub fn all() -> Vec<Workload> {
    vec![
        workload("begin a run with its checkpoint", Device::new(), 1..=2),
        workload("checkpoints of a run, each in the place of one before", begun(), 3..=8),
        ending("end a run, and its checkpoints", begun()),
    ]
}

fn identity() -> Identity {
    let options = TrainOptions {
        adamw: AdamWConfig::default(),
        schedule: Schedule { shape: Shape::Cosine, peak: 1e-3, warmup: 0, total: 9 },
        seed: 1,
        precision: Precision::F32,
        gradient: GradientPrecision::F32,
        kl: None,
        freeze_a: false,
    };
    Identity::new([7; 32], None, &options)
}

/// θ and both moments after a step.
fn numbers(step: u64) -> [Vec<f32>; 3] {
    let mut rng = Rng::new(step, 7);
    [0; 3].map(|_| (0..LEN).map(|_| rng.f32()).collect())
}

/// Takes up the run on this device, which goes on where it is the same as before.
fn save(device: &Device, running: &Running, step: u64) -> Result<()> {
    let mut running = running.borrow_mut();
    if running.as_ref().is_none_or(|(of, _)| !of.is(device)) {
        let mut checkpoints = Checkpoints::open(device, Path::new(DIR))?;
        // What is passed over for a failing device is told, and the run goes on from what is left.
        let _told = restore(device, &mut checkpoints, false)?;
        *running = Some((device.clone(), checkpoints));
    }
    let Some((_, checkpoints)) = running.as_mut() else { unreachable!("it was taken up") };
    let [theta, m, v] = &numbers(step);
    let numbers = Numbers { theta, m, v, best: &[], updates: step, steps: step, whole: true };
    let progress = Progress::default();
    checkpoints.save(device, &identity(), &numbers, &progress, step.is_multiple_of(ANCHORS)).map(drop)
}

/// The step that is restored; an error text where its numbers are not those of the step, or something was
/// passed over.
fn restore(
    device: &Device,
    checkpoints: &mut Checkpoints,
    anchors_only: bool,
) -> Result<std::result::Result<Option<u64>, String>> {
    let [mut theta, mut m, mut v] = [0; 3].map(|_| vec![0.0; LEN]);
    let (mut updates, mut steps, mut broken, mut best) = (0, 0, false, Vec::new());
    let mut into = NumbersMut {
        theta: &mut theta,
        m: &mut m,
        v: &mut v,
        best: &mut best,
        updates: &mut updates,
        steps: &mut steps,
        broken: &mut broken,
    };
    let restored = checkpoints.restore(device, &identity(), &mut into, anchors_only)?;
    if !restored.passed_over.is_empty() {
        return Ok(Err(format!("passed over: {:?}", restored.passed_over)));
    }
    let Some(found) = restored.found else { return Ok(Ok(None)) };
    let is_right = found.steps == steps && updates == steps && !broken && numbers(steps) == [theta, m, v];
    Ok(if is_right { Ok(Some(steps)) } else { Err(format!("step {steps} has other numbers")) })
}

fn find(device: &Device) -> std::result::Result<Found, String> {
    let mut checkpoints = Checkpoints::open(device, Path::new(DIR)).map_err(|e| e.to_string())?;
    let newest = restore(device, &mut checkpoints, false).map_err(|e| e.to_string())??;
    let anchor = restore(device, &mut checkpoints, true).map_err(|e| e.to_string())??;
    match (newest, anchor) {
        (None, None) => Ok(NOTHING),
        (Some(newest), Some(anchor)) if anchor == newest / ANCHORS * ANCHORS => Ok(newest as Found),
        (Some(1), None) => Ok(1),
        other => Err(format!("newest and anchor are {other:?}")),
    }
}

fn workload(name: &'static str, start: Device, steps: std::ops::RangeInclusive<u64>) -> Workload {
    let first = *steps.start() as Found - 1;
    let last = *steps.end() as Found;
    let running = std::rc::Rc::new(Running::default());
    let step = |step: u64| -> Box<dyn Fn(&Device) -> Result<()>> {
        let running = running.clone();
        Box::new(move |device| save(device, &running, step))
    };
    Workload {
        name,
        start,
        steps: steps.map(step).collect(),
        expected: (first..=last).collect(),
        between: None,
        restart: Box::new(|device| match device.is_dir(Path::new(DIR)) {
            true => remove_stray_files(device, Path::new(DIR)).map(drop),
            false => Ok(()),
        }),
        find: Box::new(find),
    }
}

/// Cut short, the newest is what is left.
fn ending(name: &'static str, start: Device) -> Workload {
    let end = |device: &Device| Checkpoints::open(device, Path::new(DIR))?.remove_all(device);
    Workload { steps: vec![Box::new(end)], expected: vec![2, NOTHING], ..workload(name, start, 3..=3) }
}
