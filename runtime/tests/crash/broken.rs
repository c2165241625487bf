//! Six writers that lose data, each by one mistake: the harness must catch every one, or it proves nothing.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::path::Path;
use std::rc::Rc;

use engraft_runtime::error::{Error, Result};
use engraft_runtime::storage::{Storage, StorageFile, remove_stray_files};

use super::device::{Device, Lie};
use super::harness::{Found, Workload};
use super::workloads::{NOTHING, adapter};

const DIR: &str = "/out";
const NAME: &str = "adapter.engraft";
const TEMP: &str = ".adapter.engraft.0-0.engraft-tmp";
const SLOTS: [&str; 2] = ["slot.0", "slot.1"];

type Writer = fn(&Device, &[u8]) -> Result<Option<Box<dyn StorageFile>>>;

pub fn all() -> Vec<Workload> {
    vec![
        replacing("no file fsync", unsynced_file),
        replacing("no directory fsync", unsynced_directory),
        replacing("rename before fsync", renamed_too_early),
        replacing("truncate in place", in_place),
        replacing("acknowledge before fsync", acknowledged_too_early),
        slots_without_checksum(),
    ]
}

/// The same as the six, done right: the harness must let it pass.
pub fn control() -> Workload {
    replacing("the control", done_right)
}

fn io(error: std::io::Error) -> Error {
    Error::io("writing", error)
}

/// The steps of a right commit, up to its rename.
fn written(device: &Device, bytes: &[u8], is_synced: bool) -> Result<Box<dyn StorageFile>> {
    let mut file = device.create_new(&Path::new(DIR).join(TEMP)).map_err(io)?;
    file.write_all(bytes).map_err(io)?;
    if is_synced {
        file.sync().map_err(io)?;
    }
    Ok(file)
}

fn renamed(device: &Device) -> Result<()> {
    device.rename(&Path::new(DIR).join(TEMP), &Path::new(DIR).join(NAME)).map_err(io)
}

fn synced(device: &Device) -> Result<()> {
    device.sync_dir(Path::new(DIR)).map_err(io)
}

fn done_right(device: &Device, bytes: &[u8]) -> Result<Option<Box<dyn StorageFile>>> {
    written(device, bytes, true)?;
    renamed(device)?;
    synced(device).map(|()| None)
}

fn unsynced_file(device: &Device, bytes: &[u8]) -> Result<Option<Box<dyn StorageFile>>> {
    written(device, bytes, false)?;
    renamed(device)?;
    synced(device).map(|()| None)
}

fn unsynced_directory(device: &Device, bytes: &[u8]) -> Result<Option<Box<dyn StorageFile>>> {
    written(device, bytes, true)?;
    renamed(device).map(|()| None)
}

fn renamed_too_early(device: &Device, bytes: &[u8]) -> Result<Option<Box<dyn StorageFile>>> {
    let mut file = written(device, bytes, false)?;
    renamed(device)?;
    file.sync().map_err(io)?;
    synced(device).map(|()| None)
}

/// The trait can't truncate, so that nobody does: what comes nearest is to write under the name itself.
fn in_place(device: &Device, bytes: &[u8]) -> Result<Option<Box<dyn StorageFile>>> {
    device.remove(&Path::new(DIR).join(NAME)).map_err(io)?;
    let mut file = device.create_new(&Path::new(DIR).join(NAME)).map_err(io)?;
    file.write_all(bytes).map_err(io)?;
    file.sync().map_err(io)?;
    synced(device).map(|()| None)
}

/// The sync comes, after the word was given: see [`replacing`].
fn acknowledged_too_early(device: &Device, bytes: &[u8]) -> Result<Option<Box<dyn StorageFile>>> {
    let file = written(device, bytes, false)?;
    renamed(device)?;
    Ok(Some(file))
}

/// An adapter over another. What a writer gives back is synced in a step of its own, which has nothing to
/// acknowledge.
fn replacing(name: &'static str, write: Writer) -> Workload {
    let bytes = |seed| {
        let device = Device::new();
        let saved =
            adapter(seed, &[0, 1]).save(&device, Path::new(DIR), engraft_runtime::adapter::StoredAs::F32);
        saved.expect("a device that works");
        device.files()[0].1.to_vec()
    };
    let (old, new) = (bytes(1), bytes(2));
    let start = Device::new();
    start
        .create_dir(Path::new(DIR))
        .and_then(|()| {
            let mut file = start.create_new(&Path::new(DIR).join(NAME))?;
            file.write_all(&old)
        })
        .expect("a device that works");
    let late: Rc<RefCell<Option<Box<dyn StorageFile>>>> = Rc::default();
    let kept = late.clone();
    let put = move |device: &Device| {
        *kept.borrow_mut() = write(device, &new)?;
        Ok(())
    };
    let sync = move |device: &Device| match late.borrow_mut().take() {
        None => Ok(()),
        Some(mut file) => file.sync().map_err(io).and_then(|()| synced(device)),
    };
    let find = |device: &Device| {
        let found = engraft_runtime::adapter::Adapter::load_from(device, Path::new(DIR));
        let found = found.map_err(|e| e.to_string())?;
        let known = [1, 2].into_iter().find(|seed| adapter(*seed, &[0, 1]) == found);
        known.map(|seed| seed as Found).ok_or_else(|| "torn, and taken".to_string())
    };
    Workload {
        name,
        start: start.settled(Lie::None),
        steps: vec![Box::new(put), Box::new(sync)],
        expected: vec![1, 2, 2],
        between: None,
        restart: Box::new(|device| remove_stray_files(device, Path::new(DIR)).map(drop)),
        find: Box::new(find),
    }
}

// ---------------------------------------------------------------------------------------------------
// Two slots, written in turn, each with a number; the higher one counts

/// Three pages, the number first.
fn slot(number: u8) -> Vec<u8> {
    [vec![number; 8], (0..3 * 4096 - 8).map(|i| (i % 250) as u8 ^ number).collect()].concat()
}

fn write_slot(device: &Device, number: u8) -> Result<()> {
    let path = Path::new(DIR).join(SLOTS[usize::from(number) % 2]);
    if device.kind(&path).map_err(io)?.is_some() {
        device.remove(&path).map_err(io)?;
    }
    let mut file = device.create_new(&path).map_err(io)?;
    file.write_all(&slot(number)).map_err(io)?;
    file.sync().map_err(io)?;
    synced(device)
}

/// The slot with the higher number: nothing else is asked of it.
fn newest_slot(device: &Device) -> std::result::Result<Found, String> {
    let read = |name: &&str| {
        let mut bytes = Vec::new();
        device.open(&Path::new(DIR).join(name)).ok()?.source.read_to_end(&mut bytes).ok()?;
        (bytes.len() >= 8).then_some(bytes)
    };
    let Some(newest) = SLOTS.iter().filter_map(read).max_by_key(|bytes| bytes[0]) else { return Ok(NOTHING) };
    if newest != slot(newest[0]) {
        return Err("torn, and taken".into());
    }
    Ok(usize::from(newest[0]))
}

fn slots_without_checksum() -> Workload {
    let start = Device::new();
    start.create_dir(Path::new(DIR)).expect("a device that works");
    [1, 2].into_iter().for_each(|number| write_slot(&start, number).expect("a device that works"));
    Workload {
        name: "slots without checksum",
        start: start.settled(Lie::None),
        steps: vec![Box::new(|device| write_slot(device, 3)), Box::new(|device| write_slot(device, 4))],
        expected: vec![2, 3, 4],
        between: None,
        restart: Box::new(|_| Ok(())),
        find: Box::new(newest_slot),
    }
}
