//! `adapter.engraft`: one file that holds an adapter, binds it to its base, and is believed only
//! whole.
//!
//! A frame of kind ADAPTER (see engraft-codec), schema 1: the header below, and one section
//! `theta`, the flat parameters in the order of [`Layout`], as f32 or f16. The header repeats the
//! shapes of the adapted projections, so that the file can be checked without its base.

use std::io::{Seek, Write};
use std::path::{Path, PathBuf};

use engraft_codec::{Element, Frame, Kind, Meta, Section, Writer};
use half::f16;
use serde::{Deserialize, Serialize};

use super::config::{Layout, LoraConfig};
use super::params::{Adapter, BaseIdentity, TrainedWith};
use crate::error::{Error, ErrorKind, Result};
use crate::model::Proj;
use crate::storage::{Committed, Disk, Opened, StdIo, Storage, commit, create_dir_all, frame_error};

/// The file's name in an adapter directory.
pub const ADAPTER_FILE: &str = "adapter.engraft";

/// Version of [`Header`] and of the meaning of `theta`.
const SCHEMA: u16 = 1;
const THETA: &str = "theta";
/// Bounds on what a header may claim: far above any model this runtime takes.
const LAYERS_MAX: u32 = 1 << 16;
const FEATURES_MAX: u32 = 1 << 24;
/// Numbers converted to f16 at once.
const CHUNK: usize = 1024;

/// How parameters are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Exactly.
    F32,
    /// Rounded to 11 significant bits, in half the size.
    F16,
}

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

impl Adapter {
    /// Commits the adapter as `dir/adapter.engraft`, creating `dir` if need be.
    ///
    /// # Errors
    /// [`ErrorKind::NonFinite`] when a parameter is NaN or infinite, or too large for f16;
    /// [`ErrorKind::Misuse`] when the parts of the adapter contradict each other;
    /// [`ErrorKind::Io`]. An older file stays whole.
    pub fn save(&self, storage: &dyn Storage, dir: &Path, precision: Precision) -> Result<Committed> {
        let path = dir.join(ADAPTER_FILE);
        self.check_storable(precision).map_err(|e| e.at(path.display()))?;
        create_dir_all(storage, dir)?;
        commit(storage, dir, ADAPTER_FILE, |out| {
            self.write(out, precision).map_err(|e| frame_error(&path, e))
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
        let header = frame.header().map_err(|e| frame_error(&path, e))?;
        let mut adapter = from_header(header, *frame.base_digest())
            .map_err(|problem| corrupt(&problem).at(path.display()))?;
        let element = check_table(&frame, &adapter.layout).map_err(|e| e.at(path.display()))?;
        source.rewind().map_err(io)?;
        adapter.theta = read_theta(&frame, &mut source, element, adapter.layout.len())
            .map_err(|e| frame_error(&path, e))?;
        match first_nonfinite(&adapter.theta) {
            Some(at) => Err(corrupt(&format!("parameter {at} is NaN or infinite")).at(path.display())),
            None => Ok(adapter),
        }
    }

    fn check_storable(&self, precision: Precision) -> Result<()> {
        let misuse = |problem: String| Error::new(ErrorKind::Misuse, problem);
        self.config.check(self.base.n_layers).map_err(misuse)?;
        let shapes: Vec<_> = self.layout.shapes().collect();
        let layout = Layout::from_shapes(self.config.rank, &self.config.layers, &shapes);
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
        let overflows = |v: &f32| !f16::from_f32(*v).is_finite();
        match self.theta.iter().position(overflows) {
            Some(at) if precision == Precision::F16 => {
                let message = format!("parameter {at} ({}) exceeds f16; save as f32", self.theta[at]);
                Err(Error::new(ErrorKind::NonFinite, message))
            }
            _ => Ok(()),
        }
    }

    fn write(
        &self,
        out: &mut dyn Write,
        precision: Precision,
    ) -> std::result::Result<(), engraft_codec::Error<crate::storage::StdIoError>> {
        let element = match precision {
            Precision::F32 => Element::F32,
            Precision::F16 => Element::F16,
        };
        let theta = Section::new(THETA, element, self.theta.len() as u64);
        let sections = [theta.ok_or(engraft_codec::Error::Misuse("the adapter is too large"))?];
        // One file under one name, without successors: it has no generations.
        let meta = Meta { kind: Kind::ADAPTER, schema: SCHEMA, generation: 0, base_digest: self.base.digest };
        let mut writer = Writer::begin(StdIo(out), &meta, &self.header(), &sections)?;
        match precision {
            Precision::F32 => writer.f32(&self.theta)?,
            Precision::F16 => {
                let mut bits = [0; CHUNK];
                for piece in self.theta.chunks(CHUNK) {
                    for (b, v) in bits.iter_mut().zip(piece) {
                        *b = f16::from_f32(*v).to_bits();
                    }
                    writer.f16_bits(&bits[..piece.len()])?;
                }
            }
        }
        writer.finish().map(|_| ())
    }

    fn header(&self) -> Header {
        // Shapes come from a validated model: they are far below 2^32.
        let target = |(proj, outputs, inputs): (Proj, usize, usize)| Target {
            proj: Proj::ALL.iter().position(|p| *p == proj).unwrap_or(Proj::ALL.len()) as u8,
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

fn check_kind(frame: &Frame) -> Result<()> {
    match (frame.kind(), frame.meta().schema) {
        (Kind::ADAPTER, SCHEMA) => Ok(()),
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
fn from_header(header: Header, digest: [u8; 32]) -> std::result::Result<Adapter, String> {
    if digest == [0; 32] {
        return Err("it names no base".into());
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
    };
    config.check(header.n_layers as usize)?;
    let layout =
        Layout::from_shapes(config.rank, &config.layers, &shapes).ok_or("more parameters than memory")?;
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
        valid_loss_before: header.valid_loss_before,
        valid_loss_after: header.valid_loss_after,
    };
    Ok(Adapter { config, layout, theta: Vec::new(), base, meta })
}

/// The file must hold exactly the parameters that its header's shapes imply.
fn check_table(frame: &Frame, layout: &Layout) -> Result<Element> {
    let [theta] = frame.table() else {
        return Err(corrupt("it must hold one section, theta"));
    };
    if theta.name() != THETA || theta.element() == Element::Bytes {
        return Err(corrupt("its section is not theta of f32 or f16"));
    }
    if theta.count() != layout.len() as u64 {
        let message = format!("{} parameters, where its shapes imply {}", theta.count(), layout.len());
        return Err(corrupt(&message));
    }
    Ok(theta.element())
}

/// Reads θ: `len` numbers, which the file was seen to hold.
fn read_theta(
    frame: &Frame,
    source: &mut dyn crate::storage::Source,
    element: Element,
    len: usize,
) -> std::result::Result<Vec<f32>, engraft_codec::Error<crate::storage::StdIoError>> {
    let mut sections = frame.sections(StdIo(source))?;
    if element == Element::F32 {
        let mut theta = vec![0.0; len];
        sections.f32(THETA, &mut theta)?;
        return Ok(theta);
    }
    let mut theta = Vec::with_capacity(len);
    sections.f16_bits(THETA, len, |bits| theta.push(f16::from_bits(bits).to_f32()))?;
    Ok(theta)
}

fn first_nonfinite(theta: &[f32]) -> Option<usize> {
    theta.iter().position(|v| !v.is_finite())
}

fn corrupt(problem: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("{problem}: not a whole adapter; restore it or train again"))
}
