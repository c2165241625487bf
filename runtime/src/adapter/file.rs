//! `adapter.engraft`: one file that holds an adapter, binds it to its base, and is trusted only if intact.
//!
//! A frame of kind ADAPTER (see engraft-codec): the header below, then the parameters. Section `theta`
//! holds every A and Bᵀ in the order of [`Layout`], as f32 or f16. With DoRA, section `magnitude` follows:
//! every m in the layout's order, always f32, since f16 would round away what training changed. The header
//! repeats the shapes of the adapted projections so the file can be checked without its base.

use std::io::{Seek, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use engraft_codec::{Element, Frame, Kind, Meta, Section, Sections, Writer};
use half::f16;
use serde::{Deserialize, Serialize};
use strum::IntoStaticStr;

use super::binding::Binding;
use super::config::{Layout, LoraConfig, Override};
use super::params::{Adapter, BaseIdentity, Init, TrainedWith};
use crate::error::{Error, ErrorKind, Result};
use crate::model::Proj;
use crate::model::usage::Usage;
use crate::storage::{
    Committed, Disk, Opened, ReadSeek, StdIo, StdIoError, Storage, commit, create_dir_all, frame_error,
};

/// The file's name in an adapter directory.
pub const ADAPTER_FILE: &str = "adapter.engraft";

/// Version of the headers and of the meaning of the sections.
const SCHEMA: u16 = 5;
/// The version before, whose header says nothing of usage.
const SCHEMA_BEFORE: u16 = 4;
const THETA: &str = "theta";
const MAGNITUDE: &str = "magnitude";
/// Bounds on what a header may claim, far above any model this runtime accepts.
const LAYERS_MAX: usize = 1 << 16;
const FEATURES_MAX: usize = 1 << 24;
/// Numbers rounded and written at once.
const CHUNK: usize = 1024;

/// How parameters are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum StoredAs {
    /// Exactly.
    F32,
    /// Rounded to 11 significant bits, in half the size.
    F16,
}

impl StoredAs {
    /// Both of them, by the names that [`StoredAs::name`] gives.
    pub const ALL: [StoredAs; 2] = [StoredAs::F32, StoredAs::F16];

    /// Its name, in files and settings.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Numbers as a file of another tool holds them.
    ///
    /// # Errors
    /// `NonFinite` for a number that overflows f16.
    pub(super) fn encode(self, values: &[f32]) -> Result<Vec<u8>> {
        if self == StoredAs::F32 {
            return Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect());
        }
        match values.iter().find(|v| !f16::from_f32(**v).is_finite()) {
            Some(v) => Err(Error::new(ErrorKind::NonFinite, format!("{v} exceeds f16; export as f32"))),
            None => Ok(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()),
        }
    }
}

/// The result of reading or writing a frame.
type FrameResult<T> = std::result::Result<T, engraft_codec::Error<StdIoError>>;

/// The file's header; the order of all fields, and of those within them, is the format. `U` is [`Usage`], or nothing in
/// the version before.
#[derive(Serialize, Deserialize)]
struct Header<U> {
    base: BaseIdentity,
    rank: usize,
    alpha: f32,
    dropout: f32,
    /// The adapted projections with their (out, in).
    targets: Vec<(Proj, usize, usize)>,
    layers: Vec<usize>,
    trained: TrainedWith,
    /// Of [`RSLORA`], [`EVA`] and [`QUIET`].
    flags: u8,
    dora: bool,
    overrides: Vec<Override>,
    binding: Option<Binding>,
    usage: U,
}

/// Bits of [`Header::flags`].
const RSLORA: u8 = 1;
const EVA: u8 = 2;
const QUIET: u8 = 4;

impl Adapter {
    /// Commits the adapter as `dir/adapter.engraft`, creating `dir` if needed.
    ///
    /// # Errors
    /// [`ErrorKind::NonFinite`] when a parameter is NaN or infinite, or too large for f16;
    /// [`ErrorKind::Misuse`] when the parts of the adapter contradict each other;
    /// [`ErrorKind::Io`]. An older file stays intact.
    pub fn save(&self, storage: &dyn Storage, dir: &Path, precision: StoredAs) -> Result<Committed> {
        self.save_bound(storage, dir, precision, self.binding.as_ref())
    }

    /// [`Adapter::save`], with a binding taken of this adapter in its current state.
    ///
    /// # Errors
    /// As [`Adapter::save`].
    pub fn save_bound<'b>(
        &self,
        storage: &dyn Storage,
        dir: &Path,
        precision: StoredAs,
        binding: impl Into<Option<&'b Binding>>,
    ) -> Result<Committed> {
        let binding = binding.into();
        let path = dir.join(ADAPTER_FILE);
        self.check_storable(precision).map_err(|e| e.at(path.display()))?;
        create_dir_all(storage, dir)?;
        commit(storage, dir, ADAPTER_FILE, |out| {
            self.write(out, precision, binding).map_err(|e| frame_error(&path, e))
        })
    }

    /// Loads an adapter from its file, or from a directory that holds `adapter.engraft`. The base is
    /// not checked here: see [`Adapter::check_base`].
    ///
    /// # Errors
    /// [`ErrorKind::Io`], [`ErrorKind::Corrupt`] for a damaged or foreign file,
    /// [`ErrorKind::Unsupported`] for one of a newer version.
    pub fn load(path: &Path) -> Result<Adapter> {
        Adapter::load_from(&Disk, path)
    }

    /// [`Adapter::load`] from any storage.
    ///
    /// # Errors
    /// As [`Adapter::load`].
    pub fn load_from(storage: &dyn Storage, path: &Path) -> Result<Adapter> {
        let path = if storage.is_dir(path) { path.join(ADAPTER_FILE) } else { PathBuf::from(path) };
        let io = |e| Error::io(format!("reading adapter {}", path.display()), e);
        let Opened { mut source, bytes } = storage.open(&path).map_err(io)?;
        let frame = Frame::verify(StdIo(&mut source), bytes).map_err(|e| frame_error(&path, e))?;
        check_kind(&frame).map_err(|e| e.at(path.display()))?;
        let digest = *frame.base_digest();
        let described = match frame.meta().schema {
            SCHEMA_BEFORE => {
                let header: Header<()> = frame.header().map_err(|e| frame_error(&path, e))?;
                from_header(header, Usage::default(), digest)
            }
            _ => {
                let mut header: Header<Usage> = frame.header().map_err(|e| frame_error(&path, e))?;
                let usage = std::mem::take(&mut header.usage);
                from_header(header, usage, digest)
            }
        };
        let mut adapter = described.map_err(|problem| corrupt(&problem).at(path.display()))?;
        let element = check_table(&frame, &adapter.layout).map_err(|e| e.at(path.display()))?;
        source.rewind().map_err(io)?;
        adapter.theta =
            read_theta(&frame, &mut source, element, &adapter.layout).map_err(|e| frame_error(&path, e))?;
        match first_nonfinite(&adapter.theta) {
            Some(at) => Err(corrupt(&format!("parameter {at} is NaN or infinite")).at(path.display())),
            None => Ok(adapter),
        }
    }

    /// Rounds the parameters to the file's precision, so a binding taken afterwards describes what will be
    /// loaded. Magnitudes are stored exactly.
    ///
    /// # Errors
    /// Whatever would make [`Adapter::save`] refuse that precision.
    pub fn round_to(&mut self, precision: StoredAs) -> Result<()> {
        self.check_storable(precision)?;
        if precision == StoredAs::F16 {
            let Adapter { layout, theta, .. } = self;
            weights(layout).flatten().for_each(|i| theta[i] = f16::from_f32(theta[i]).to_f32());
        }
        Ok(())
    }

    fn check_storable(&self, precision: StoredAs) -> Result<()> {
        let misuse = |problem: String| Error::new(ErrorKind::Misuse, problem);
        self.config.check(self.base.n_layers).map_err(misuse)?;
        let shapes: Vec<_> = self.layout.shapes().collect();
        let layout = Layout::from_shapes(&self.config, &shapes);
        let targets = self.config.targets.iter();
        if layout.as_ref() != Some(&self.layout)
            || self.theta.len() != self.layout.len()
            || !targets.eq(shapes.iter().map(|(proj, _, _)| proj))
        {
            return Err(misuse("the adapter's configuration, layout and parameters do not agree".into()));
        }
        if self.base.digest == [0; 32] {
            return Err(misuse("the adapter names no base".into()));
        }
        if let Some(at) = first_nonfinite(&self.theta) {
            let message = format!("parameter {at} is NaN or infinite; the adapter is not saved");
            return Err(Error::new(ErrorKind::NonFinite, message));
        }
        let overflows = |i: &usize| !f16::from_f32(self.theta[*i]).is_finite();
        match weights(&self.layout).flatten().find(overflows) {
            Some(at) if precision == StoredAs::F16 => {
                let message = format!("parameter {at} ({}) exceeds f16; save as f32", self.theta[at]);
                Err(Error::new(ErrorKind::NonFinite, message))
            }
            _ => Ok(()),
        }
    }

    fn write(&self, out: &mut dyn Write, precision: StoredAs, binding: Option<&Binding>) -> FrameResult<()> {
        let layout = &self.layout;
        let section = |name, element, count: usize| {
            let section = Section::new(name, element, count as u64);
            section.ok_or(engraft_codec::Error::Misuse("the adapter is too large"))
        };
        let element = match precision {
            StoredAs::F32 => Element::F32,
            StoredAs::F16 => Element::F16,
        };
        let mut sections = vec![section(THETA, element, weights(layout).flatten().count())?];
        if self.config.dora {
            sections.push(section(MAGNITUDE, Element::F32, magnitudes(layout).flatten().count())?);
        }
        // A single file with no successors needs no generations.
        let meta = Meta { kind: Kind::ADAPTER, schema: SCHEMA, generation: 0, base_digest: self.base.digest };
        let mut writer = Writer::begin(StdIo(out), &meta, &self.header(binding), &sections)?;
        for range in weights(layout) {
            let values = &self.theta[range];
            match precision {
                StoredAs::F32 => writer.f32(values)?,
                StoredAs::F16 => values.chunks(CHUNK).try_for_each(|values| {
                    let mut bits = [0; CHUNK];
                    bits.iter_mut().zip(values).for_each(|(bits, v)| *bits = f16::from_f32(*v).to_bits());
                    writer.f16_bits(&bits[..values.len()])
                })?,
            }
        }
        for range in magnitudes(layout) {
            writer.f32(&self.theta[range])?;
        }
        writer.finish().map(|_| ())
    }

    fn header(&self, binding: Option<&Binding>) -> Header<Usage> {
        let LoraConfig { rank, alpha, dropout, layers, rslora, dora, overrides, .. } = &self.config;
        let init = match self.meta.init {
            Init::Kaiming => 0,
            Init::Eva => EVA,
            Init::Quiet => QUIET,
        };
        Header {
            base: self.base.clone(),
            rank: *rank,
            alpha: *alpha,
            dropout: *dropout,
            targets: self.layout.shapes().collect(),
            layers: layers.clone(),
            trained: self.meta.clone(),
            flags: init | if *rslora { RSLORA } else { 0 },
            dora: *dora,
            overrides: overrides.clone(),
            binding: binding.copied(),
            usage: self.meta.usage.clone(),
        }
    }
}

/// Where A and Bᵀ of each slot lie in θ, as one range.
fn weights(layout: &Layout) -> impl Iterator<Item = Range<usize>> + '_ {
    layout.slots().map(|(_, _, slot)| slot.a.start..slot.b.end)
}

/// Where the magnitudes of each slot lie in θ.
fn magnitudes(layout: &Layout) -> impl Iterator<Item = Range<usize>> + '_ {
    layout.slots().map(|(_, _, slot)| slot.m).filter(|m| !m.is_empty())
}

fn check_kind(frame: &Frame) -> Result<()> {
    match (frame.kind(), frame.meta().schema) {
        (Kind::ADAPTER, SCHEMA | SCHEMA_BEFORE) => Ok(()),
        (Kind::ADAPTER, other) => {
            let remedy = if other > SCHEMA { "update Engraft" } else { "train or import it again" };
            let message = format!("adapter schema {other}; this version knows schema {SCHEMA}; {remedy}");
            Err(Error::new(ErrorKind::Unsupported, message))
        }
        (Kind::CHECKPOINT, _) => Err(corrupt("a training checkpoint, not an adapter")),
        _ => Err(corrupt("an Engraft file, but not an adapter")),
    }
}

/// The adapter a header describes, without its parameters yet.
fn from_header<U>(header: Header<U>, usage: Usage, digest: [u8; 32]) -> std::result::Result<Adapter, String> {
    let Header { base, rank, alpha, dropout, targets: shapes, layers, trained, .. } = header;
    let Header { flags, dora, overrides, binding, .. } = header;
    if digest == [0; 32] {
        return Err("it names no base".into());
    }
    if flags & !(RSLORA | EVA | QUIET) != 0 {
        return Err(format!("flags {flags:#x}"));
    }
    if !(1..=LAYERS_MAX).contains(&base.n_layers) {
        return Err(format!("{} layers", base.n_layers));
    }
    let features = 1..=FEATURES_MAX;
    let unfit =
        |(_, out, inner): &&(Proj, usize, usize)| !features.contains(out) || !features.contains(inner);
    if let Some((_, outputs, inputs)) = shapes.iter().find(unfit) {
        return Err(format!("a projection of {outputs} x {inputs}"));
    }
    let targets = shapes.iter().map(|(proj, _, _)| *proj).collect();
    let rslora = flags & RSLORA != 0;
    let config = LoraConfig { rank, alpha, dropout, targets, layers, rslora, dora, overrides };
    config.check(base.n_layers)?;
    let layout = Layout::from_shapes(&config, &shapes).ok_or("more parameters than memory can hold")?;
    binding.map_or(Ok(()), |binding| check_binding(&binding, &layout))?;
    let init = match flags {
        _ if flags & EVA != 0 => Init::Eva,
        _ if flags & QUIET != 0 => Init::Quiet,
        _ => Init::Kaiming,
    };
    let (base, meta) = (BaseIdentity { digest, ..base }, TrainedWith { init, usage, ..trained });
    Ok(Adapter { config, layout, theta: Vec::new(), base, meta, binding })
}

fn check_binding(binding: &Binding, layout: &Layout) -> std::result::Result<(), String> {
    let (matched, projections) = (binding.matched, layout.slots().count());
    if !(1..=projections).contains(&matched) {
        return Err(format!("it claims that {matched} of its {projections} projections matched a tensor"));
    }
    match binding.base.is_finite() && binding.adapted.is_finite() {
        true => Ok(()),
        false => Err("its fingerprint holds a NaN or infinity".into()),
    }
}

/// Checks that the file holds exactly the parameters its header's shapes imply; returns how it stores A and Bᵀ.
fn check_table(frame: &Frame, layout: &Layout) -> Result<Element> {
    let (theta, magnitude) = match frame.table() {
        [theta] => (theta, None),
        [theta, magnitude] if magnitude.name() == MAGNITUDE => (theta, Some(magnitude)),
        _ => return Err(corrupt("its sections are not theta (and, with DoRA, magnitude)")),
    };
    if theta.name() != THETA || theta.element() == Element::Bytes {
        return Err(corrupt("its theta is neither f32 nor f16"));
    }
    if magnitude.is_some_and(|m| m.element() != Element::F32) {
        return Err(corrupt("its magnitude is not f32"));
    }
    let count = |ranges: &mut dyn Iterator<Item = Range<usize>>| ranges.map(|r| r.len() as u64).sum::<u64>();
    let (found, implied) = (theta.count(), count(&mut weights(layout)));
    if found != implied {
        return Err(corrupt(&format!("it holds {found} parameters, but its shapes imply {implied}")));
    }
    let (found, implied) = (magnitude.map_or(0, Section::count), count(&mut magnitudes(layout)));
    if found != implied {
        return Err(corrupt(&format!("it holds {found} magnitudes, but its shapes imply {implied}")));
    }
    Ok(theta.element())
}

/// Reads θ; the file is known to hold all of it.
fn read_theta(
    frame: &Frame,
    source: &mut dyn ReadSeek,
    element: Element,
    layout: &Layout,
) -> FrameResult<Vec<f32>> {
    let mut sections = frame.sections(StdIo(source))?;
    let mut theta = vec![0.0; layout.len()];
    read_weights(&mut sections, element, layout, &mut theta)?;
    let mut m = vec![0.0; magnitudes(layout).flatten().count()];
    if !m.is_empty() {
        sections.f32(MAGNITUDE, &mut m)?;
        magnitudes(layout).flatten().zip(m).for_each(|(i, m)| theta[i] = m);
    }
    Ok(theta)
}

/// Reads A and Bᵀ of the section `theta`.
fn read_weights(
    sections: &mut Sections<StdIo<&mut dyn ReadSeek>>,
    element: Element,
    layout: &Layout,
    theta: &mut [f32],
) -> FrameResult<()> {
    let count = weights(layout).flatten().count();
    if element == Element::F16 {
        let mut at = weights(layout).flatten();
        return sections.f16_bits(THETA, count, |bits| {
            at.next().into_iter().for_each(|i| theta[i] = f16::from_bits(bits).to_f32());
        });
    }
    if count == theta.len() {
        return sections.f32(THETA, theta);
    }
    // Sections are read whole: parameters first land in file order, then move apart to make room for the
    // magnitudes.
    let mut dense = vec![0.0; count];
    sections.f32(THETA, &mut dense)?;
    weights(layout).flatten().zip(dense).for_each(|(i, value)| theta[i] = value);
    Ok(())
}

fn first_nonfinite(theta: &[f32]) -> Option<usize> {
    theta.iter().position(|v| !v.is_finite())
}

fn corrupt(problem: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("{problem}: the adapter is incomplete; restore it or train again"))
}
