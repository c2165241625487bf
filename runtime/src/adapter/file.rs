//! `adapter.engraft`: one file that holds an adapter, binds it to its base, and is believed only
//! whole.
//!
//! A frame of kind ADAPTER (see engraft-codec), schema 4: the three headers below, and the parameters. In
//! f32 they are a section `theta`, every A and Bᵀ in the order of [`Layout`]. In f16 they are two sections of
//! bytes, every A, then every Bᵀ: `theta.low`, the low byte of each number, and `theta.high`, the high bytes
//! as a deflate stream. With DoRA a section `magnitude` follows, every m in the layout's order, always f32: f16
//! would round away what training changed in it. The header repeats the shapes of the adapted projections,
//! so that the file can be checked without its base. Up to schema 3 f16 was a `theta` as it is in f32;
//! schema 2 had no binding; schema 1 was plain LoRA of one rank: the first header alone, and `theta`.

use std::io::{Seek, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use engraft_codec::{Element, Frame, Kind, Meta, Section, Sections, Writer};
use half::f16;
use serde::{Deserialize, Serialize};

use super::binding::{Binding, Fingerprint, PROBES};
use super::config::{Layout, LoraConfig, Override};
use super::packed;
use super::params::{Adapter, BaseIdentity, Init, TrainedWith};
use crate::error::{Error, ErrorKind, Result};
use crate::model::Proj;
use crate::storage::{
    Committed, Disk, Opened, Source, StdIo, StdIoError, Storage, commit, create_dir_all, frame_error,
};

/// The file's name in an adapter directory.
pub const ADAPTER_FILE: &str = "adapter.engraft";

/// Version of the headers and of the meaning of the sections.
const SCHEMA: u16 = 4;
/// The schema before f16 was packed.
const SCHEMA_UNPACKED: u16 = 3;
/// The schema before [`BindingRecord`].
const SCHEMA_UNBOUND: u16 = 2;
/// The schema before [`Variant`].
const SCHEMA_PLAIN: u16 = 1;
const THETA: &str = "theta";
const THETA_LOW: &str = "theta.low";
const THETA_HIGH: &str = "theta.high";
const MAGNITUDE: &str = "magnitude";
/// Bounds on what a header may claim: far above any model this runtime takes.
const LAYERS_MAX: u32 = 1 << 16;
const FEATURES_MAX: u32 = 1 << 24;
/// Low bytes written at once.
const CHUNK: usize = 1024;

/// How parameters are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredAs {
    /// Exactly.
    F32,
    /// Rounded to 11 significant bits; a file of ours packs them in some 13, those of others take 16.
    F16,
}

impl StoredAs {
    /// Both of them, by the names that [`StoredAs::name`] gives.
    pub const ALL: [StoredAs; 2] = [StoredAs::F32, StoredAs::F16];

    /// Its name, in files and settings.
    pub fn name(self) -> &'static str {
        match self {
            StoredAs::F32 => "f32",
            StoredAs::F16 => "f16",
        }
    }
}

/// What reading and writing a frame gives.
type FrameResult<T> = std::result::Result<T, engraft_codec::Error<StdIoError>>;

#[derive(Serialize, Deserialize)]
struct Header {
    architecture: String,
    d_model: u32,
    n_layers: u32,
    vocab: u32,
    rank: u32,
    alpha: f32,
    dropout: f32,
    targets: Vec<Target>,
    layers: Vec<u32>,
    base_name: String,
    steps: u64,
    tokens: u64,
    seed: u64,
    valid_loss_before: Option<f32>,
    valid_loss_after: Option<f32>,
}

#[derive(Serialize, Deserialize)]
struct Target {
    /// Index in [`Proj::ALL`].
    proj: u8,
    outputs: u32,
    inputs: u32,
}

/// What tells an adapter from a plain LoRA of one rank; follows [`Header`].
#[derive(Default, Serialize, Deserialize)]
struct Variant {
    /// Of [`RSLORA`] and [`EVA`]. Schema 2 has a bool here, which reads as the first.
    flags: u8,
    dora: bool,
    overrides: Vec<OverrideRecord>,
}

/// Bits of [`Variant::flags`].
const RSLORA: u8 = 1;
const EVA: u8 = 2;

#[derive(Serialize, Deserialize)]
struct OverrideRecord {
    layer: Option<u32>,
    /// Index in [`Proj::ALL`].
    proj: u8,
    rank: Option<u32>,
    alpha: Option<f32>,
}

/// What the adapter and its base computed when it was saved; follows [`Variant`], where it is known.
#[derive(Serialize, Deserialize)]
struct BindingRecord {
    template: [u8; 32],
    matched: u32,
    base: [f32; PROBES],
    adapted: [f32; PROBES],
}

impl Adapter {
    /// Commits the adapter as `dir/adapter.engraft`, creating `dir` if need be.
    ///
    /// # Errors
    /// [`ErrorKind::NonFinite`] when a parameter is NaN or infinite, or too large for f16;
    /// [`ErrorKind::Misuse`] when the parts of the adapter contradict each other;
    /// [`ErrorKind::Io`]. An older file stays whole.
    pub fn save(&self, storage: &dyn Storage, dir: &Path, precision: StoredAs) -> Result<Committed> {
        self.save_as_bound(storage, dir, precision, self.binding.as_ref())
    }

    /// [`Adapter::save`] with a binding taken of this adapter as it is now.
    ///
    /// # Errors
    /// As [`Adapter::save`].
    pub fn save_bound(
        &self,
        storage: &dyn Storage,
        dir: &Path,
        precision: StoredAs,
        binding: &Binding,
    ) -> Result<Committed> {
        self.save_as_bound(storage, dir, precision, Some(binding))
    }

    fn save_as_bound(
        &self,
        storage: &dyn Storage,
        dir: &Path,
        precision: StoredAs,
        binding: Option<&Binding>,
    ) -> Result<Committed> {
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
        let header = match frame.meta().schema {
            SCHEMA_PLAIN => frame.header().map(|header| (header, Variant::default(), None)),
            SCHEMA_UNBOUND => frame.header().map(|(header, variant)| (header, variant, None)),
            _ => frame.header(),
        };
        let (header, variant, bound): (_, _, Option<BindingRecord>) =
            header.map_err(|e| frame_error(&path, e))?;
        let mut adapter = from_header(header, variant, *frame.base_digest())
            .map_err(|problem| corrupt(&problem).at(path.display()))?;
        adapter.binding = bound
            .map(|record| from_bound(&record, &adapter.layout))
            .transpose()
            .map_err(|problem| corrupt(&problem).at(path.display()))?;
        let stored = check_table(&frame, &adapter.layout).map_err(|e| e.at(path.display()))?;
        source.rewind().map_err(io)?;
        adapter.theta = read_theta(&frame, &mut source, stored, &adapter.layout)
            .map_err(|e| frame_error(&path, e))?
            .ok_or_else(|| corrupt("its packed parameters do not expand to what its shapes imply"))
            .map_err(|e| e.at(path.display()))?;
        match first_nonfinite(&adapter.theta) {
            Some(at) => Err(corrupt(&format!("parameter {at} is NaN or infinite")).at(path.display())),
            None => Ok(adapter),
        }
    }

    /// Rounds the parameters to what a file of this precision holds, so that a binding taken afterwards is
    /// of what will be loaded. Magnitudes are stored exactly.
    ///
    /// # Errors
    /// What keeps [`Adapter::save`] from storing them so.
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
        let bytes = || planar(layout).flatten().map(|i| packed::split(self.theta[i]));
        let count = weights(layout).flatten().count();
        let high = || packed::deflate(count, bytes().map(|[_, high]| high));
        let high = (precision == StoredAs::F16).then(high);
        let mut sections = match &high {
            None => vec![section(THETA, Element::F32, count)?],
            Some(high) => vec![
                section(THETA_LOW, Element::Bytes, count)?,
                section(THETA_HIGH, Element::Bytes, high.len())?,
            ],
        };
        if self.config.dora {
            sections.push(section(MAGNITUDE, Element::F32, magnitudes(layout).flatten().count())?);
        }
        // One file under one name, without successors: it has no generations.
        let meta = Meta { kind: Kind::ADAPTER, schema: SCHEMA, generation: 0, base_digest: self.base.digest };
        let header = (self.header(), self.variant(), binding.map(to_bound));
        let mut writer = Writer::begin(StdIo(out), &meta, &header, &sections)?;
        match &high {
            None => weights(layout).try_for_each(|range| writer.f32(&self.theta[range]))?,
            Some(high) => {
                write_low(&mut writer, bytes().map(|[low, _]| low))?;
                writer.bytes(high)?;
            }
        }
        for range in magnitudes(layout) {
            writer.f32(&self.theta[range])?;
        }
        writer.finish().map(|_| ())
    }

    fn header(&self) -> Header {
        // Shapes come from a validated model: they are far below 2^32.
        let target = |(proj, outputs, inputs): (Proj, usize, usize)| Target {
            proj: index(proj),
            outputs: outputs as u32,
            inputs: inputs as u32,
        };
        Header {
            architecture: self.base.architecture.clone(),
            d_model: self.base.d_model as u32,
            n_layers: self.base.n_layers as u32,
            vocab: self.base.vocab as u32,
            rank: self.config.rank as u32,
            alpha: self.config.alpha,
            dropout: self.config.dropout,
            targets: self.layout.shapes().map(target).collect(),
            layers: self.config.layers.iter().map(|l| *l as u32).collect(),
            base_name: self.meta.base_name.clone(),
            steps: self.meta.steps,
            tokens: self.meta.tokens,
            seed: self.meta.seed,
            valid_loss_before: self.meta.valid_loss_before,
            valid_loss_after: self.meta.valid_loss_after,
        }
    }
}

impl Adapter {
    fn variant(&self) -> Variant {
        let record = |o: &Override| OverrideRecord {
            layer: o.layer.map(|l| l as u32),
            proj: index(o.proj),
            rank: o.rank.map(|r| r as u32),
            alpha: o.alpha,
        };
        let LoraConfig { rslora, dora, overrides, .. } = &self.config;
        let eva = if self.meta.init == Init::Eva { EVA } else { 0 };
        let flags = eva | if *rslora { RSLORA } else { 0 };
        Variant { flags, dora: *dora, overrides: overrides.iter().map(record).collect() }
    }
}

/// Writes the low plane, in pieces.
fn write_low(
    writer: &mut Writer<StdIo<&mut dyn Write>>,
    mut low: impl Iterator<Item = u8>,
) -> FrameResult<()> {
    let mut chunk = [0; CHUNK];
    loop {
        let mut filled = 0;
        for (byte, low) in chunk.iter_mut().zip(low.by_ref()) {
            *byte = low;
            filled += 1;
        }
        if filled == 0 {
            return Ok(());
        }
        writer.bytes(&chunk[..filled])?;
    }
}

/// The projection's number in the file.
fn index(proj: Proj) -> u8 {
    Proj::ALL.iter().position(|p| *p == proj).unwrap_or(Proj::ALL.len()) as u8
}

/// Where A and Bᵀ of each slot lie in θ, as one range.
fn weights(layout: &Layout) -> impl Iterator<Item = Range<usize>> + '_ {
    layout.slots().map(|(_, _, slot)| slot.a.start..slot.b.end)
}

/// Where packed numbers lie in θ: every A, then every Bᵀ. Those of one kind are distributed alike, and code
/// better together.
fn planar(layout: &Layout) -> impl Iterator<Item = Range<usize>> + '_ {
    let a = layout.slots().map(|(_, _, slot)| slot.a);
    a.chain(layout.slots().map(|(_, _, slot)| slot.b))
}

/// Where the magnitudes of each slot lie in θ.
fn magnitudes(layout: &Layout) -> impl Iterator<Item = Range<usize>> + '_ {
    layout.slots().map(|(_, _, slot)| slot.m).filter(|m| !m.is_empty())
}

fn check_kind(frame: &Frame) -> Result<()> {
    match (frame.kind(), frame.meta().schema) {
        (Kind::ADAPTER, SCHEMA_PLAIN | SCHEMA_UNBOUND | SCHEMA_UNPACKED | SCHEMA) => Ok(()),
        (Kind::ADAPTER, newer) => {
            let message =
                format!("an adapter of schema {newer}, where this version knows {SCHEMA}; update Engraft");
            Err(Error::new(ErrorKind::Unsupported, message))
        }
        (Kind::CHECKPOINT, _) => Err(corrupt("a training checkpoint, not an adapter")),
        _ => Err(corrupt("an Engraft file, but not an adapter")),
    }
}

/// The adapter that a header describes, still without parameters.
fn from_header(header: Header, variant: Variant, digest: [u8; 32]) -> std::result::Result<Adapter, String> {
    if digest == [0; 32] {
        return Err("it names no base".into());
    }
    if variant.flags & !(RSLORA | EVA) != 0 {
        return Err(format!("flags {:#x}", variant.flags));
    }
    if !(1..=LAYERS_MAX).contains(&header.n_layers) {
        return Err(format!("{} layers", header.n_layers));
    }
    let mut shapes = Vec::with_capacity(Proj::ALL.len());
    for target in &header.targets {
        let proj = Proj::ALL.get(usize::from(target.proj)).ok_or("an unknown projection")?;
        if !(1..=FEATURES_MAX).contains(&target.outputs) || !(1..=FEATURES_MAX).contains(&target.inputs) {
            return Err(format!("a projection of {} x {}", target.outputs, target.inputs));
        }
        shapes.push((*proj, target.outputs as usize, target.inputs as usize));
    }
    let config = LoraConfig {
        rank: header.rank as usize,
        alpha: header.alpha,
        dropout: header.dropout,
        targets: shapes.iter().map(|(proj, _, _)| *proj).collect(),
        layers: header.layers.iter().map(|l| *l as usize).collect(),
        rslora: variant.flags & RSLORA != 0,
        dora: variant.dora,
        overrides: variant.overrides.iter().map(from_record).collect::<std::result::Result<_, _>>()?,
    };
    config.check(header.n_layers as usize)?;
    let layout = Layout::from_shapes(&config, &shapes).ok_or("more parameters than memory")?;
    let base = BaseIdentity {
        digest,
        architecture: header.architecture,
        d_model: header.d_model as usize,
        n_layers: header.n_layers as usize,
        vocab: header.vocab as usize,
    };
    let meta = TrainedWith {
        base_name: header.base_name,
        steps: header.steps,
        tokens: header.tokens,
        seed: header.seed,
        init: if variant.flags & EVA != 0 { Init::Eva } else { Init::Kaiming },
        valid_loss_before: header.valid_loss_before,
        valid_loss_after: header.valid_loss_after,
    };
    Ok(Adapter { config, layout, theta: Vec::new(), base, meta, binding: None })
}

fn from_record(record: &OverrideRecord) -> std::result::Result<Override, String> {
    Ok(Override {
        layer: record.layer.map(|l| l as usize),
        proj: *Proj::ALL.get(usize::from(record.proj)).ok_or("an unknown projection")?,
        rank: record.rank.map(|r| r as usize),
        alpha: record.alpha,
    })
}

fn to_bound(binding: &Binding) -> BindingRecord {
    BindingRecord {
        template: binding.template,
        // A model's projections are far below 2^32.
        matched: binding.matched as u32,
        base: binding.base.0,
        adapted: binding.adapted.0,
    }
}

fn from_bound(record: &BindingRecord, layout: &Layout) -> std::result::Result<Binding, String> {
    let BindingRecord { template, matched, base, adapted } = record;
    let (matched, projections) = (*matched as usize, layout.slots().count());
    if !(1..=projections).contains(&matched) {
        return Err(format!("{matched} of its {projections} projections are said to find their tensor"));
    }
    let (base, adapted) = (Fingerprint(*base), Fingerprint(*adapted));
    match base.is_finite() && adapted.is_finite() {
        true => Ok(Binding { template: *template, matched, base, adapted }),
        false => Err("its fingerprint holds a NaN or infinity".into()),
    }
}

/// How a file holds its A and Bᵀ.
enum Stored {
    /// One section of numbers.
    Plain(Element),
    /// Two planes, the high one in so many bytes.
    Packed(usize),
}

/// The file must hold exactly the parameters that its header's shapes imply.
fn check_table(frame: &Frame, layout: &Layout) -> Result<Stored> {
    let (sections, magnitude) = match frame.table() {
        [sections @ .., last] if last.name() == MAGNITUDE => (sections, Some(last)),
        sections => (sections, None),
    };
    let bytes = |s: &Section, name| s.name() == name && s.element() == Element::Bytes;
    let (theta, stored) = match sections {
        [theta] if theta.name() == THETA && theta.element() != Element::Bytes => {
            (theta, Stored::Plain(theta.element()))
        }
        [low, high] if bytes(low, THETA_LOW) && bytes(high, THETA_HIGH) => {
            // The file was read whole: it is as long as it says, and so is memory for a part of it.
            let high = usize::try_from(high.count()).map_err(|_| corrupt("more bytes than memory"))?;
            (low, Stored::Packed(high))
        }
        _ => return Err(corrupt("its sections are not theta, whole or packed, and with DoRA magnitude")),
    };
    if magnitude.is_some_and(|m| m.element() != Element::F32) {
        return Err(corrupt("its magnitude is not of f32"));
    }
    let count = |ranges: &mut dyn Iterator<Item = Range<usize>>| ranges.map(|r| r.len() as u64).sum::<u64>();
    let (found, implied) = (theta.count(), count(&mut weights(layout)));
    if found != implied {
        return Err(corrupt(&format!("{found} parameters, where its shapes imply {implied}")));
    }
    let (found, implied) = (magnitude.map_or(0, Section::count), count(&mut magnitudes(layout)));
    if found != implied {
        return Err(corrupt(&format!("{found} magnitudes, where its shapes imply {implied}")));
    }
    Ok(stored)
}

/// Reads θ, all of which the file was seen to hold; `None` when what is packed does not expand to it.
fn read_theta(
    frame: &Frame,
    source: &mut dyn Source,
    stored: Stored,
    layout: &Layout,
) -> FrameResult<Option<Vec<f32>>> {
    let mut sections = frame.sections(StdIo(source))?;
    let mut theta = vec![0.0; layout.len()];
    match stored {
        Stored::Plain(element) => read_plain(&mut sections, element, layout, &mut theta)?,
        Stored::Packed(bytes) => {
            if !read_packed(&mut sections, bytes, layout, &mut theta)? {
                return Ok(None);
            }
        }
    }
    let mut m = vec![0.0; magnitudes(layout).flatten().count()];
    if !m.is_empty() {
        sections.f32(MAGNITUDE, &mut m)?;
        magnitudes(layout).flatten().zip(m).for_each(|(i, m)| theta[i] = m);
    }
    Ok(Some(theta))
}

/// Reads A and Bᵀ of the section `theta`.
fn read_plain(
    sections: &mut Sections<StdIo<&mut dyn Source>>,
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
    // Sections are read whole: the parameters first lie as in the file, then between the magnitudes.
    let mut dense = vec![0.0; count];
    sections.f32(THETA, &mut dense)?;
    weights(layout).flatten().zip(dense).for_each(|(i, value)| theta[i] = value);
    Ok(())
}

/// Reads A and Bᵀ of two planes, the high one packed in so many bytes: whether it expands to them.
fn read_packed(
    sections: &mut Sections<StdIo<&mut dyn Source>>,
    bytes: usize,
    layout: &Layout,
    theta: &mut [f32],
) -> FrameResult<bool> {
    let count = planar(layout).flatten().count();
    let (mut low, mut high, mut stream) = (vec![0; count], vec![0; count], vec![0; bytes]);
    sections.bytes(THETA_LOW, &mut low)?;
    sections.bytes(THETA_HIGH, &mut stream)?;
    if !packed::inflate(&stream, &mut high) {
        return Ok(false);
    }
    let values = low.into_iter().zip(high).map(|(low, high)| packed::join(low, high));
    planar(layout).flatten().zip(values).for_each(|(i, value)| theta[i] = value);
    Ok(true)
}

fn first_nonfinite(theta: &[f32]) -> Option<usize> {
    theta.iter().position(|v| !v.is_finite())
}

fn corrupt(problem: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("{problem}: not a whole adapter; restore it or train again"))
}
