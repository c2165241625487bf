//! The adapter store's workloads: what is active, by its content.

use std::path::Path;

use engraft_runtime::error::Result;
use engraft_runtime::gate::store::{Candidate, GENERATIONS_DIR, InUse, Store};
use engraft_runtime::model::chat::Message;
use engraft_runtime::storage::Storage;

use super::device::{Device, Lie};
use super::harness::{Found, Workload};
use super::workloads::{NOTHING, adapter, model};

const DIR: &str = "/s";
const BASE: [u8; 32] = [7; 32];
/// What may be active; the first two are adapters, made of these as seeds.
const FIRST: Found = 1;
const SECOND: Found = 2;
const EXAMPLES: Found = 3;
const BASE_ALONE: Found = 4;

type Step = Box<dyn Fn(&Device) -> Result<()>>;

fn examples() -> Vec<Message> {
    vec![Message::new("user", "the cave?"), Message::new("assistant", "the study")]
}

fn put(storage: &dyn Storage, what: Found) -> Result<()> {
    let (adapter, examples) = (adapter(what as u64, &[1]), examples());
    let candidate = match what {
        EXAMPLES => Candidate::FewShot(&examples),
        BASE_ALONE => Candidate::Base,
        _ => Candidate::Adapter(&adapter),
    };
    let store = Store::create(storage, Path::new(DIR))?;
    store.promote(&candidate, b"{\"verdict\":\"x\"}", (&BASE, &model()), false).map(drop)
}

fn promote(what: Found) -> Step {
    Box::new(move |device| put(device, what))
}

/// Keeps one that was tried, where there is room for one.
fn try_one(what: Found) -> Step {
    Box::new(move |device| {
        let store = Store::create(device, Path::new(DIR))?;
        let adapter = adapter(what as u64, &[1]);
        store.writer()?.keep_tried(&adapter, b"{}", (&BASE, &model()), 1).map(drop)
    })
}

fn activate(number: u64) -> Step {
    Box::new(move |device| Store::open(device, Path::new(DIR))?.writer()?.activate(number).map(drop))
}

fn prune(keep: usize) -> Step {
    Box::new(move |device| Store::open(device, Path::new(DIR))?.writer()?.prune(keep).map(drop))
}

/// Back to what must be active then. What a failed rollback reached is made sure of, not gone beyond.
fn roll_back(number: u64) -> Step {
    Box::new(move |device| {
        let store = Store::open(device, Path::new(DIR))?;
        let writer = store.writer()?;
        let is_there = store.active()?.is_some_and(|a| a.generation.number == number);
        if is_there { writer.activate(number) } else { writer.rollback() }.map(drop)
    })
}

/// One generation after another, numbered from 1.
fn filled() -> Device {
    let device = Device::new();
    [FIRST, SECOND, EXAMPLES, BASE_ALONE].into_iter().for_each(|what| put(&device, what).unwrap());
    device.settled(Lie::None)
}

fn restart(device: &Device) -> Result<()> {
    let store = Store::create(device, Path::new(DIR))?;
    drop(store.writer()?);
    let listing = store.list()?;
    assert!(listing.unknown.is_empty(), "left behind: {:?}", listing.unknown);
    assert!(listing.generations.iter().all(|g| !g.is_unfinished), "{:?}", listing.generations);
    Ok(())
}

/// What is active, loaded, without a word of complaint.
fn find(device: &Device) -> std::result::Result<Found, String> {
    let dir = Path::new(DIR);
    if !device.is_dir(&dir.join(GENERATIONS_DIR)) {
        return Ok(NOTHING);
    }
    let store = Store::open(device, dir).map_err(|e| e.to_string())?;
    let listing = store.list().map_err(|e| e.to_string())?;
    if let Some(damaged) = listing.generations.iter().find(|g| g.manifest.is_err() && !g.is_unfinished) {
        return Err(format!("told as damaged: {damaged:?}"));
    }
    let Some(active) = store.active().map_err(|e| e.to_string())? else { return Ok(NOTHING) };
    // A store's first promotion replaces no pointer: losing it alone is told.
    let is_first = active.passed_over.iter().all(|told| told.ends_with("there is none"));
    let is_told_of_one = is_first && listing.generations.len() == 1;
    if !active.passed_over.is_empty() && !is_told_of_one {
        return Err(format!("passed over: {:?}", active.passed_over));
    }
    match store.load(&active.generation).map_err(|e| e.to_string())? {
        InUse::Base => Ok(BASE_ALONE),
        InUse::FewShot(messages) if messages == examples() => Ok(EXAMPLES),
        InUse::Adapter(found) if *found == adapter(FIRST as u64, &[1]) => Ok(FIRST),
        InUse::Adapter(found) if *found == adapter(SECOND as u64, &[1]) => Ok(SECOND),
        other => Err(format!("something else is active: {other:?}")),
    }
}

fn workload(name: &'static str, start: Device, steps: Vec<Step>, expected: Vec<Found>) -> Workload {
    let (restart, find) = (Box::new(restart), Box::new(find));
    Workload { name, start, steps, expected, between: None, restart, find }
}

/// The same, with the second active again.
pub fn rolled_back() -> Device {
    let device = filled();
    activate(2)(&device).unwrap();
    device.settled(Lie::None)
}

pub fn all() -> Vec<Workload> {
    vec![
        workload("begin a store", Device::new(), vec![promote(FIRST)], vec![NOTHING, FIRST]),
        workload(
            "promote an adapter, and prune",
            filled(),
            vec![promote(SECOND), prune(1)],
            vec![BASE_ALONE, SECOND, SECOND],
        ),
        workload(
            "promote examples, then the base",
            filled(),
            vec![promote(EXAMPLES), promote(BASE_ALONE)],
            vec![BASE_ALONE, EXAMPLES, BASE_ALONE],
        ),
        workload("begin with one that was tried", Device::new(), vec![try_one(FIRST)], vec![NOTHING; 2]),
        workload(
            "try one, and another in its place",
            filled(),
            vec![try_one(FIRST), try_one(SECOND)],
            vec![BASE_ALONE; 3],
        ),
        workload("prune", filled(), vec![prune(1)], vec![BASE_ALONE; 2]),
        workload("roll back", filled(), vec![roll_back(3)], vec![BASE_ALONE, EXAMPLES]),
        workload("roll back from an older one", rolled_back(), vec![roll_back(1)], vec![SECOND, FIRST]),
        workload("activate", filled(), vec![activate(1)], vec![BASE_ALONE, FIRST]),
    ]
}
