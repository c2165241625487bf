//! What a run is made from: its trainer, how an adapter begins, and everything its result depends on.

use std::path::{Path, PathBuf};
use std::time::Instant;

use sha2::{Digest, Sha256};

use super::checkpoint::Identity;
use super::directions::Found;
use super::observer::{Event, Observer};
use super::prepare::{Base, GENERAL_ROWS, RunRows};
use super::settings::{Begin, Length, Looks, Method, Settings, Warmup};
use crate::adapter::{Adapter, Init, LoraConfig};
use crate::data::batches::in_order;
use crate::data::{Batch, Batches, Cursor, Example, Mixed, MixedCursor};
use crate::error::{Error, ErrorKind, Result};
use crate::hex;
use crate::model::weights::ModelFile;
use crate::nn::keep::KeepPrecision;
use crate::plan::{ArenaWords, Request};
use crate::rng::Rng;
use crate::storage::Disk;
use crate::train::schedule::{Schedule, Shape};
use crate::train::{AnyTrainer, FullTrainer, TrainOptions, Trainer, eva, quiet};

/// Random stream of an adapter's initial values.
const INIT_STREAM: u64 = 0x494E_4954;
/// Seed of protected directions: one for all runs, so that each model has its own.
const DIRECTIONS_SEED: u64 = 0;

/// A finished adapter that a run goes on with.
#[derive(Clone, Debug, PartialEq)]
pub struct Earlier {
    file: PathBuf,
    /// Of its parameters.
    digest: String,
    /// What it adapts.
    pub lora: LoraConfig,
    /// How its A began.
    pub init: Init,
}

impl Earlier {
    /// An adapter in a file or folder, for a model.
    ///
    /// # Errors
    /// Those of [`Adapter::load`]; `BaseMismatch`.
    pub fn open(path: &Path, model: &ModelFile) -> Result<Earlier> {
        let adapter = Adapter::load(path)?;
        adapter.check_base(&model.digest(), model.config()).map_err(|e| e.at(path.display()))?;
        let digest = digest(&adapter);
        let Adapter { config: lora, meta, .. } = adapter;
        Ok(Earlier { file: path.to_path_buf(), digest, lora, init: meta.init })
    }

    /// Its parameters.
    fn load(&self) -> Result<Adapter> {
        let adapter = Adapter::load(&self.file)?;
        match digest(&adapter) == self.digest {
            true => Ok(adapter),
            false => {
                let message = format!("{}: the adapter has changed since the run began", self.file.display());
                Err(Error::new(ErrorKind::Io, message))
            }
        }
    }
}

/// Of θ; what it means is in the run's identity. Taken without a copy, which no plan has room for.
fn digest(adapter: &Adapter) -> String {
    let mut hash = Sha256::new();
    adapter.theta.iter().for_each(|value| hash.update(value.to_le_bytes()));
    hex::encode(&hash.finalize())
}

/// A run's rows in order, from a cursor.
pub(super) fn mixed<'a>(
    settings: &Settings,
    batch: usize,
    rows: RunRows<'a>,
    cursor: MixedCursor,
) -> Mixed<'a> {
    Mixed::new(rows.train, rows.replay, settings.replay_share, batch, settings.seed, cursor)
}

/// What a run is made from.
pub(super) struct Setup<'a> {
    base: &'a Base,
    settings: &'a Settings,
    request: &'a Request,
    rows: RunRows<'a>,
    /// Steps of the whole run, if known in advance.
    pub(super) total: Option<u64>,
    options: TrainOptions,
}

impl<'a> Setup<'a> {
    pub(super) fn new(
        base: &'a Base,
        settings: &'a Settings,
        request: &'a Request,
        rows: RunRows<'a>,
    ) -> Setup<'a> {
        let batches = mixed(settings, request.batch, rows, MixedCursor::default());
        let positions = rows.train.iter().map(Example::rows).sum();
        let total = settings.steps(&batches, positions);
        let options = settings.options(base, settings.schedule(settings.peak(), total));
        Setup { base, settings, request, rows, total, options }
    }

    /// The trainer, with its arena allocated. If the run `resumes`, its numbers come from a checkpoint.
    pub(super) fn trainer(&self, resumes: bool, watched: (&str, &mut dyn Observer)) -> Result<AnyTrainer> {
        let (model, kernels) = (self.base.model.clone(), self.base.kernels.clone());
        let words = ArenaWords::new(model.config(), self.request);
        let options = self.options.clone();
        Ok(match &self.settings.method {
            Method::Adapter(lora) => {
                let adapter = self.adapter(lora, resumes, watched)?;
                AnyTrainer::Adapter(Box::new(Trainer::new(model, kernels, words, adapter, options)))
            }
            Method::Full(_) => AnyTrainer::Full(Box::new(FullTrainer::new(model, kernels, words, options))),
        })
    }

    /// The adapter to go on with, or one that changes nothing yet. If the run `resumes`, no rows are read for it.
    fn adapter(
        &self,
        lora: &LoraConfig,
        resumes: bool,
        (name, observer): (&str, &mut dyn Observer),
    ) -> Result<Adapter> {
        let Setup { base: Base { model, kernels, precision, .. }, settings, rows, .. } = *self;
        if let Some(earlier) = &settings.from {
            return earlier.load();
        }
        let mut random = Rng::new(settings.seed, INIT_STREAM);
        let mut adapter = Adapter::init_on(model, kernels, lora, &mut || random.f32())?;
        adapter.meta.base_name = model.gguf().string("general.name")?.unwrap_or_default().to_owned();
        adapter.meta.seed = settings.seed;
        adapter.meta.init = match settings.begin {
            Begin::Random => Init::Kaiming,
            Begin::Eva(_) => Init::Eva,
            Begin::Protected(_) => Init::Quiet,
        };
        let started = Instant::now();
        let go_on = |_: usize| observer.ask();
        let what = match settings.begin {
            Begin::Random => return Ok(adapter),
            _ if resumes => return Ok(adapter),
            Begin::Protected(energy) => {
                let draw = (energy, DIRECTIONS_SEED);
                let found = Found::new(&adapter, (kernels, *precision), rows.general, draw);
                let folder = model.cache_folder();
                if folder.is_some_and(|folder| found.load(&Disk, folder, &mut adapter)) {
                    "protected directions, measured before".to_string()
                } else {
                    let batches: Vec<Batch> = in_order(rows.general, GENERAL_ROWS).collect();
                    quiet::initialize(&mut adapter, model, kernels, *precision, &batches, draw, go_on)?;
                    if let Some(Err(error)) = folder.map(|folder| found.keep(&Disk, folder, &adapter)) {
                        log::info!("protected directions are not kept: {error}");
                    }
                    format!("protected directions from {} rows of ordinary text", rows.general.len())
                }
            }
            Begin::Eva(count) => {
                // The batches training would start with, each once.
                let batches = Batches::new(rows.train, settings.batch, settings.seed, Cursor::default());
                let count = batches.batches_per_epoch().min(count);
                let batches: Vec<Batch> = batches.take(count).collect();
                eva::initialize(&mut adapter, model, kernels, *precision, &batches, settings.seed, go_on)?;
                format!("EVA: A from {count} batches")
            }
        };
        let told = format!("{what} in {:.1} s", started.elapsed().as_secs_f64());
        observer.tell(name, Event::Note(&told));
        Ok(adapter)
    }

    /// Everything a run's result depends on.
    pub(super) fn identity(&self) -> Identity {
        let Setup { request: Request { keep, kept_blocks, batch, .. }, rows, .. } = self;
        let kept = match keep.precision {
            // Then it only affects speed.
            KeepPrecision::F32 => "exactly".to_string(),
            KeepPrecision::Bf16 => format!("as bf16: {}", keep.describe(*kept_blocks)),
        };
        let aside: Vec<Example> = rows.aside.iter().flat_map(|set| set.rows.clone()).collect();
        settled(self.base, self.settings, &self.options)
            .with("batch size", batch)
            .with("kept for the backward", kept)
            .with_rows("training rows", rows.train)
            .with_rows("held-out rows", rows.valid)
            .with_rows("replayed rows", rows.replay)
            .with_rows("general rows", rows.general)
            .with_rows("rows set aside", &aside)
    }
}

/// A trainer that starts as the run's does, at a constant rate.
///
/// # Errors
/// Those of [`Run::begin`].
pub fn trainer_at(
    base: &Base,
    settings: &Settings,
    request: &Request,
    rows: RunRows<'_>,
    rate: f64,
    watched: (&str, &mut dyn Observer),
) -> Result<AnyTrainer> {
    let constant = Schedule { shape: Shape::Constant, peak: rate as f32, warmup: 0, total: u64::MAX };
    let options = settings.options(base, constant);
    Setup { base, settings, request, rows, total: None, options }.trainer(false, watched)
}

/// What is fixed before rows and memory are known.
fn settled(base: &Base, settings: &Settings, options: &TrainOptions) -> Identity {
    let begin = match settings.begin {
        Begin::Random => "random".to_string(),
        Begin::Eva(batches) => format!("EVA of {batches} batches"),
        Begin::Protected(energy) => format!("inside {energy} of ordinary text's energy"),
    };
    let stored = match settings.method {
        Method::Adapter(_) => settings.stored.name().to_string(),
        Method::Full(dtype) => dtype.map_or("as in the base".to_string(), |dtype| dtype.name().to_string()),
    };
    let looks = match settings.looks {
        Looks::Every(_) => "the last step counts".to_string(),
        Looks::Best { times, patience } => {
            let by = if settings.by_answers { " by its answers" } else { "" };
            let within = match settings.forgets_most {
                most if most.is_finite() => format!(", less beyond {most} forgotten"),
                _ => String::new(),
            };
            format!("the best of {times} looks counts{by}{within}, {patience} end it")
        }
    };
    let identity = Identity::new(base.model.digest(), settings.method.lora(), options);
    let identity = match &settings.from {
        None => identity,
        Some(earlier) => identity.with("goes on with", &earlier.digest),
    };
    identity
        .with("accumulation steps", settings.accumulation)
        .with("initial values", begin)
        .with("share of replayed rows", settings.replay_share)
        .with("stored as", stored)
        .with("looks", looks)
        .with("divergence on general rows", settings.general_kl.unwrap_or_default())
}

/// A run's settings by name, worded as files may store them.
pub(crate) fn stated(settings: &Settings, base: &Base) -> Vec<(String, String)> {
    let options = settings.options(base, settings.schedule(settings.rate.unwrap_or_default(), None));
    let length = match settings.length {
        Length::Steps(n) => format!("{n} steps"),
        Length::Epochs(n) => format!("{n} epochs"),
        Length::Tokens(n) => format!("{n} tokens"),
        Length::Minutes(n) => format!("{n} minutes"),
    };
    let warmup = match settings.warmup {
        Warmup::Steps(n) => format!("{n} steps"),
        Warmup::Share(share) => format!("{share} of the run"),
    };
    settled(base, settings, &options)
        .with("length", length)
        .with("warmup", warmup)
        .with("batch size", settings.batch)
        .with("rate is searched", settings.rate.is_none())
        .settings()
        .to_vec()
}
