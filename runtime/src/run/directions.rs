//! Keeps protected directions on disk: to find them, ordinary text passes through the whole model, and every run on
//! one model finds the same ones.
//!
//! One file for each base, in the folder that holds digests of models: a frame of kind DIRECTIONS (see engraft-codec)
//! with A of each adapted projection. A file that is damaged, or of other text, ranks or another CPU, counts as absent
//! and is replaced.

use std::io::Seek;
use std::path::Path;

use engraft_codec::{Element, Frame, Kind, Meta, Section, Writer};
use engraft_kernels::Kernels;

use super::checkpoint::{rows_digest, stated_digest};
use crate::adapter::{Adapter, Slot};
use crate::data::Example;
use crate::error::{Error, ErrorKind, Result};
use crate::hex;
use crate::model::Proj;
use crate::nn::Precision;
use crate::storage::{Opened, StdIo, Storage, commit, create_dir_all, frame_error};

/// Version of the header, of the sections, and of how directions are found.
const SCHEMA: u16 = 1;

/// What the directions depend on.
pub(super) struct Found {
    /// Digest of the base.
    base: [u8; 32],
    /// Digest of everything else.
    of: [u8; 32],
}

impl Found {
    /// Directions for an adapter of this shape, measured on these rows.
    pub(super) fn new(
        adapter: &Adapter,
        (kernels, precision): (&Kernels, Precision),
        rows: &[Example],
        (energy, seed): (f32, u64),
    ) -> Found {
        let shapes: Vec<_> =
            adapter.layout.slots().map(|(layer, proj, slot)| (layer, proj as usize, slot.rank)).collect();
        let how = (kernels.isa().name(), precision.name(), energy.to_bits(), seed);
        let rows = rows_digest(rows);
        Found { base: adapter.base.digest, of: stated_digest(&(SCHEMA, shapes, how, rows)) }
    }

    /// The file's name.
    fn name(&self) -> String {
        format!("directions-{}", hex::short(&self.base))
    }

    /// Sets A from the folder's file; returns whether it holds exactly these directions. If not, A may have changed.
    pub(super) fn load(&self, storage: &dyn Storage, folder: &Path, adapter: &mut Adapter) -> bool {
        let path = folder.join(self.name());
        match self.read(storage, &path, adapter) {
            Ok(found) => found,
            Err(error) => {
                log::info!("protected directions are measured anew: {error}");
                false
            }
        }
    }

    fn read(&self, storage: &dyn Storage, path: &Path, adapter: &mut Adapter) -> Result<bool> {
        let reading = |e| Error::io(format!("reading {}", path.display()), e);
        if storage.kind(path).map_err(reading)?.is_none() {
            return Ok(false);
        }
        let Opened { mut source, bytes } = storage.open(path).map_err(reading)?;
        let framed = |e| frame_error(path, e);
        let frame = Frame::verify(StdIo(&mut source), bytes).map_err(framed)?;
        let meta = frame.meta();
        if (meta.kind, meta.schema, meta.base_digest) != (Kind::DIRECTIONS, SCHEMA, self.base) {
            return Ok(false);
        }
        let of: [u8; 32] = frame.header().map_err(framed)?;
        if of != self.of || frame.table() != sections(adapter)? {
            return Ok(false);
        }
        source.rewind().map_err(reading)?;
        let mut parts = frame.sections(StdIo(&mut source)).map_err(framed)?;
        let Adapter { layout, theta, .. } = adapter;
        for (layer, proj, slot) in layout.slots() {
            parts.f32(&name(layer, proj), &mut theta[slot.a.clone()]).map_err(framed)?;
            if theta[slot.a].iter().any(|v| !v.is_finite()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Keeps A in the folder.
    ///
    /// # Errors
    /// Those of [`commit`]. Callers may ignore them: without the file, only time is lost.
    pub(super) fn keep(&self, storage: &dyn Storage, folder: &Path, adapter: &Adapter) -> Result<()> {
        let (name, sections) = (self.name(), sections(adapter)?);
        let meta = Meta { kind: Kind::DIRECTIONS, schema: SCHEMA, generation: 0, base_digest: self.base };
        create_dir_all(storage, folder)?;
        let write = |out: &mut dyn std::io::Write| {
            let mut writer = Writer::begin(StdIo(out), &meta, &self.of, &sections)?;
            for (_, _, slot) in adapter.layout.slots() {
                writer.f32(&adapter.theta[slot.a])?;
            }
            writer.finish().map(drop)
        };
        commit(storage, folder, &name, |out| write(out).map_err(|e| frame_error(&folder.join(&name), e)))
            .map(drop)
    }
}

fn name(layer: usize, proj: Proj) -> String {
    format!("{layer}.{}", proj.hf_name())
}

/// A's sections, one for each adapted projection.
fn sections(adapter: &Adapter) -> Result<Vec<Section>> {
    let too_large = || Error::new(ErrorKind::Misuse, "the adapter is too large");
    let section = |(layer, proj, slot): (usize, Proj, Slot)| {
        Section::new(&name(layer, proj), Element::F32, slot.a.len() as u64).ok_or_else(too_large)
    };
    adapter.layout.slots().map(section).collect()
}
