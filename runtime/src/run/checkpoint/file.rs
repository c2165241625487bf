//! A checkpoint's file: a frame of kind CHECKPOINT (see engraft-codec). Its sections `theta`, `m` and `v` are
//! f32, one element per parameter. So is `best`, the θ of the best look, if the run keeps one. The header says
//! which run it belongs to and where that run stood.

use std::io::{Seek, Write};
use std::path::{Path, PathBuf};

use engraft_codec::{Element, Frame, Kind, Meta, Section, Writer};
use serde::{Deserialize, Serialize};

use super::{Identity, Progress};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Opened, ReadSeek, StdIo, StdIoError, Storage, frame_error};
use crate::train::{Numbers, NumbersMut};

/// Version of the header and of the sections.
const SCHEMA: u16 = 4;
const SECTIONS: [&str; 4] = ["theta", "m", "v", "best"];

#[derive(Serialize, Deserialize)]
pub(super) struct Header<Settings, State> {
    /// The run's settings; its base is in the frame.
    settings: Settings,
    pub(super) steps: u64,
    updates: u64,
    pub(super) anchor: bool,
    progress: State,
}

/// Writes a generation in one pass, straight from the trainer's memory.
pub(super) fn write(
    out: &mut dyn Write,
    generation: u64,
    identity: &Identity,
    numbers: &Numbers<'_>,
    progress: &Progress,
    anchor: bool,
) -> std::result::Result<(), engraft_codec::Error<StdIoError>> {
    let count = numbers.theta.len();
    let header = Header {
        settings: identity.settings(),
        steps: numbers.steps,
        updates: numbers.updates,
        anchor,
        progress,
    };
    let meta = Meta { kind: Kind::CHECKPOINT, schema: SCHEMA, generation, base_digest: *identity.base() };
    let sections = sections((count, numbers.m.len()), progress)
        .ok_or(engraft_codec::Error::Misuse("too many parameters"))?;
    let mut writer = Writer::begin(StdIo(out), &meta, &header, &sections)?;
    let best = progress.best.map(|_| numbers.best);
    for values in [numbers.theta, numbers.m, numbers.v].into_iter().chain(best) {
        writer.f32(values)?;
    }
    writer.finish().map(|_| ())
}

/// A fully verified checkpoint that belongs to the run that asks.
pub(super) struct Checked {
    path: PathBuf,
    frame: Frame,
    source: Box<dyn ReadSeek>,
    pub(super) header: Header<Vec<(String, String)>, Progress>,
}

/// Opens and checks a file, without allocating anything of its size.
pub(super) fn open(
    storage: &dyn Storage,
    path: &Path,
    generation: u64,
    identity: &Identity,
    lengths: (usize, usize),
) -> Result<Checked> {
    let checked = checked(storage, path, generation, identity)?;
    if sections(lengths, &checked.header.progress).is_none_or(|sections| checked.frame.table() != sections) {
        return Err(corrupt(path, "its sections don't match its run"));
    }
    Ok(checked)
}

fn corrupt(path: &Path, what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("{}: {what}", path.display()))
}

/// Checks a file, and that it belongs to this run.
pub(super) fn checked(
    storage: &dyn Storage,
    path: &Path,
    generation: u64,
    identity: &Identity,
) -> Result<Checked> {
    let Opened { mut source, bytes } = storage.open(path).map_err(|e| reading(path, e))?;
    let frame = Frame::verify(StdIo(&mut source), bytes).map_err(|e| frame_error(path, e))?;
    if frame.kind() != Kind::CHECKPOINT {
        return Err(corrupt(path, "an Engraft file, but not a checkpoint"));
    }
    if frame.meta().schema != SCHEMA {
        let message = format!(
            "{}: checkpoint schema {}; this version knows schema {SCHEMA}; continue with the version that \
             wrote it",
            path.display(),
            frame.meta().schema
        );
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    if frame.meta().generation != generation {
        let what = format!("it is generation {}, but its name says otherwise", frame.meta().generation);
        return Err(corrupt(path, &what));
    }
    let header: Header<Vec<(String, String)>, Progress> = frame.header().map_err(|e| frame_error(path, e))?;
    identity.check(frame.base_digest(), &header.settings).map_err(|e| e.at(path.display()))?;
    if !header.progress.guard.is_sane() {
        return Err(corrupt(path, "its learning rate or smoothed loss is out of range"));
    }
    Ok(Checked { path: path.to_path_buf(), frame, source, header })
}

impl Checked {
    /// Reads it into a trainer, which counts as broken until everything is there. A trainer that rolls back
    /// keeps its best look.
    pub(super) fn load(&mut self, into: &mut NumbersMut<'_>, returns: bool) -> Result<Progress> {
        let (path, progress) = (&self.path, &self.header.progress);
        self.source.rewind().map_err(|e| reading(path, e))?;
        *into.broken = true;
        let mut sections = self.frame.sections(StdIo(&mut self.source)).map_err(|e| frame_error(path, e))?;
        if !returns {
            let best = if progress.best.is_some() { into.theta.len() } else { 0 };
            into.best.resize(best, 0.0);
        }
        let parts = [&mut *into.theta, &mut *into.m, &mut *into.v];
        let best = progress.best.filter(|_| !returns).map(|_| &mut into.best[..]);
        for (name, values) in SECTIONS.into_iter().zip(parts.into_iter().chain(best)) {
            sections.f32(name, values).map_err(|e| frame_error(path, e))?;
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                let message = format!("{}: {name}[{at}] is NaN or infinite", path.display());
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
        }
        (*into.updates, *into.steps, *into.broken) = (self.header.updates, self.header.steps, false);
        Ok(progress.clone())
    }
}

/// The sections for so many parameters, and so many trained ones.
fn sections((parameters, trained): (usize, usize), progress: &Progress) -> Option<Vec<Section>> {
    let count = if progress.best.is_some() { SECTIONS.len() } else { SECTIONS.len() - 1 };
    let lengths = [parameters, trained, trained, parameters];
    let section = |(name, n): (&&str, usize)| Section::new(name, Element::F32, n as u64);
    SECTIONS[..count].iter().zip(lengths).map(section).collect()
}

fn reading(path: &Path, error: std::io::Error) -> Error {
    Error::io(format!("reading checkpoint {}", path.display()), error)
}
