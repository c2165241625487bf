//! What ties an adapter to its base beyond the base's digest, and how it is held against a model.
//!
//! A digest says that files are the same. The fingerprint says that they *compute* the same: the
//! log-probabilities of fixed tokens after fixed tokens, of the base alone and with the adapter, taken when
//! the adapter is saved and again when it is loaded. It catches what no digest can: an adapter that loads
//! and does nothing, or something else than it did. It is taken in f32 throughout, where instruction sets
//! differ by rounding alone: quantized activations would carry a rounding to other tokens' odds.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use engraft_kernels::Kernels;

use super::StoredAs;
use super::config::Layout;
use super::gains::{self, Gains};
use super::params::Adapter;
use crate::data::Batch;
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::hex;
use crate::model::weights::ModelFile;
use crate::nn::{Adapted, Precision};
use crate::plan::{ArenaWords, Request};
use crate::rng::mix;
use crate::storage::{Committed, Storage};
use crate::train::chain::{AdapterView, Chain};

/// Log-probabilities of a fingerprint.
pub const PROBES: usize = 8;

/// Nats that two fingerprints of the same computation may differ by: thirteen times what instruction sets
/// were seen to differ by in f32 (3e-4, ten quantizations of a model of 135M parameters and eight of two
/// small ones), and half of the least that separated two files of one model (8.7e-3, a Q4_1 and itself
/// stored as F16; 0.03 between files quantized apart).
pub const TOLERANCE: f32 = 0.004;

/// Negative log-probabilities of [`PROBES`] fixed tokens, each after the fixed tokens before it, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Fingerprint(pub [f32; PROBES]);

impl Fingerprint {
    /// The largest difference of a value; infinite where one is no number.
    pub fn distance(&self, other: &Fingerprint) -> f32 {
        let differences = self.0.iter().zip(&other.0).map(|(a, b)| (a - b).abs());
        differences.fold(0.0, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) })
    }

    /// Whether both are of the same computation, up to rounding.
    pub fn agrees(&self, other: &Fingerprint) -> bool {
        self.distance(other) <= TOLERANCE
    }

    /// Whether every value is a number.
    pub fn is_finite(&self) -> bool {
        self.0.iter().all(|v| v.is_finite())
    }
}

/// What an adapter file says of the base and of itself on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Binding {
    /// [`ModelFile::template_digest`].
    pub template: [u8; 32],
    /// Adapted projections that found their tensor.
    pub matched: usize,
    /// The base alone.
    pub base: Fingerprint,
    /// The base with the adapter.
    pub adapted: Fingerprint,
}

/// Takes fingerprints of a model: an arena of [`PROBES`] rows.
pub struct Prober {
    model: Arc<ModelFile>,
    kernels: Arc<Kernels>,
    chain: Chain,
    batch: Batch,
    base: Option<Fingerprint>,
}

impl Prober {
    /// For adapters whose ranks together are at most `rank`.
    pub fn new(model: &Arc<ModelFile>, kernels: &Arc<Kernels>, rank: usize) -> Prober {
        let words = ArenaWords::new(model.config(), &request(rank, kernels.threads()));
        let vocab = model.config().vocab as u64;
        let token = |i: usize| (mix(i as u64 + 1) % vocab) as u32;
        let batch = Batch {
            ids: (0..PROBES).map(token).collect(),
            targets: (PROBES..2 * PROBES).map(token).collect(),
            seqs: std::iter::once(0..PROBES).collect(),
        };
        let chain = Chain::new(model.clone(), kernels.clone(), Precision::F32, words);
        Prober { model: model.clone(), kernels: kernels.clone(), chain, batch, base: None }
    }

    /// The fingerprint of the base alone; computed once.
    pub fn base(&mut self) -> Fingerprint {
        match self.base {
            Some(found) => found,
            None => *self.base.insert(take(&mut self.chain, None, &self.batch)),
        }
    }

    /// The fingerprint with adapters that are in use already.
    pub fn with(&mut self, adapted: &dyn Adapted) -> Fingerprint {
        take(&mut self.chain, Some(adapted), &self.batch)
    }

    /// The fingerprint with an adapter as it is stored. A DoRA costs two readings of what it adapts.
    pub fn of(&mut self, adapter: &Adapter) -> Fingerprint {
        let Adapter { layout, config, theta, .. } = adapter;
        let needed = if config.dora { gains::kernel_words(layout, self.kernels.threads()) } else { 0 };
        let mut scratch = vec![0.0; needed];
        let mut gains = Gains::new(&self.model, &self.kernels, layout, &mut scratch);
        gains.refresh(&self.model, &self.kernels, (layout, config), theta, (&mut scratch, &mut []));
        drop(scratch);
        self.with(&AdapterView { layout, config, theta, gains: gains.c() })
    }

    /// Commits an adapter in a folder, bound to its base by what both compute. Whatever is rounded in the file, the
    /// adapter stays as it is.
    ///
    /// # Errors
    /// Those of [`Binding::of`] and [`Adapter::save_bound`].
    pub fn save(
        &mut self,
        adapter: &Adapter,
        stored: StoredAs,
        (storage, folder): (&dyn Storage, &Path),
    ) -> Result<Committed> {
        let mut adapter = Cow::Borrowed(adapter);
        if stored == StoredAs::F16 {
            // The fingerprint is of what will be loaded.
            adapter.to_mut().round_to(stored)?;
        }
        let model = self.model.clone();
        let binding = Binding::of(&adapter, &model, self)?;
        adapter.save_bound(storage, folder, stored, &binding)
    }
}

fn take(chain: &mut Chain, adapted: Option<&dyn Adapted>, batch: &Batch) -> Fingerprint {
    let mut found = Fingerprint::default();
    chain.evaluate(adapted, batch, |row, loss| found.0[row] = loss as f32);
    found
}

/// What a [`Prober`] asks of memory.
fn request(rank: usize, threads: usize) -> Request {
    Request { batch: 1, seq: PROBES, params: 0, rank, kept_blocks: 0, threads, ..Request::default() }
}

/// f32 words that a fingerprint takes while an adapter is saved: the arena of a [`Prober`] for the rank and
/// threads of a training run, and for DoRA its gains.
pub fn words(model: &crate::model::ModelConfig, training: &Request) -> usize {
    let arena = ArenaWords::new(model, &request(training.rank, training.threads));
    let rows = PROBES * (model.d_model + 3);
    let gains = if training.gain_words > 0 { training.gain_words + arena.kernel } else { 0 };
    arena.saved + arena.block.activations() + arena.head.total() + arena.kernel + arena.rope + rows + gains
}

/// Adapted projections whose tensor the model has, in the shape that the adapter takes it for.
fn matched(model: &ModelFile, layout: &Layout) -> usize {
    let finds = |layer: usize, proj, shape: (usize, usize)| {
        layer < model.config().n_layers && {
            let tensor = model.block(layer).proj(proj);
            (tensor.rows(), tensor.cols()) == shape
        }
    };
    layout.slots().filter(|(layer, proj, s)| finds(*layer, *proj, (s.outputs, s.inputs))).count()
}

impl Binding {
    /// The binding of an adapter to its base, as both are now.
    ///
    /// # Errors
    /// `BaseMismatch` where the shapes are not the model's; `NonFinite` where the outputs are no numbers;
    /// those of [`ModelFile::template_digest`].
    pub fn of(adapter: &Adapter, model: &ModelFile, prober: &mut Prober) -> Result<Binding> {
        adapter.check_shapes(model.config())?;
        let (base, adapted) = (prober.base(), prober.of(adapter));
        for (found, what) in [(&base, "the base"), (&adapted, "the base with the adapter")] {
            if !found.is_finite() {
                let message = format!("{what} gives no finite numbers on fixed tokens");
                return Err(Error::new(ErrorKind::NonFinite, message));
            }
        }
        model.check_whole()?;
        let matched = matched(model, &adapter.layout);
        Ok(Binding { template: model.template_digest()?, matched, base, adapted })
    }

    /// Refuses an adapter that has something to do and does nothing.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn check_effect(&self, adapter: &Adapter) -> Result<()> {
        if self.matched == 0 {
            return Err(corrupt("none of its projections is in the model: it would do nothing"));
        }
        // To the bit: an effect that rounding hides entirely is none.
        match self.adapted == self.base && has_effect(adapter) {
            true => Err(corrupt(
                "the adapter loads and does nothing: its B is not zero, and yet no output of the base changes; \
                 it is broken or was made for another base",
            )),
            false => Ok(()),
        }
    }
}

/// Whether an adapter has anything that should change outputs.
fn has_effect(adapter: &Adapter) -> bool {
    adapter.layout.slots().any(|(_, _, s)| adapter.theta[s.b].iter().any(|b| *b != 0.0))
}

impl Adapter {
    /// Holds the adapter against a model: base digest, shapes, and what its [`Binding`] says. Gives the
    /// names of what its file does not record, and so could not be checked.
    ///
    /// Costs one pass of [`PROBES`] tokens, and the model's digest (see [`ModelFile::with_digest_cache`]).
    ///
    /// # Errors
    /// `BaseMismatch` that names everything that differs; of another kind where nothing could override it:
    /// `Corrupt` for an adapter that does nothing or gives no numbers.
    pub fn check(&self, model: &ModelFile, prober: &mut Prober) -> Result<Vec<&'static str>> {
        self.check_shapes(model.config())?;
        let now = prober.of(self);
        self.check_found(model, prober, now)
    }

    /// [`Adapter::check`] with a fingerprint that was [taken](Prober::with) of this adapter alone, as it is in
    /// use: what a DoRA needs to be used is then not computed twice.
    ///
    /// # Errors
    /// As [`Adapter::check`].
    pub fn check_found(
        &self,
        model: &ModelFile,
        prober: &mut Prober,
        now: Fingerprint,
    ) -> Result<Vec<&'static str>> {
        self.check_shapes(model.config())?;
        model.check_whole()?;
        if !now.is_finite() {
            return Err(corrupt("with the adapter the model gives no numbers: it is broken"));
        }
        self.check_does_something(model, prober, now)?;
        let mut differs = Vec::new();
        if let Some(then) = &self.binding {
            if then.template != model.template_digest()? {
                differs.push("the chat template is another".to_string());
            }
            let found = matched(model, &self.layout);
            if then.matched != found {
                differs.push(format!("{found} projections find their tensor, where {} did", then.matched));
            }
            if !now.agrees(&then.adapted) {
                differs.push(other_outputs(then, now, prober.base()));
            }
        }
        if self.base.digest != model.digest() {
            return Err(self.another_base(model, &differs));
        }
        match differs.is_empty() {
            true if self.binding.is_some() => Ok(Vec::new()),
            true => Ok(vec!["chat template", "matched tensors", "outputs on fixed tokens"]),
            false => Err(mismatch(differs.join("; "))),
        }
    }

    /// The base's own fingerprint costs a pass, so it is taken where it may be equal only.
    fn check_does_something(&self, model: &ModelFile, prober: &mut Prober, now: Fingerprint) -> Result<()> {
        if self.binding.is_some_and(|then| !now.agrees(&then.base)) {
            return Ok(());
        }
        let matched = matched(model, &self.layout);
        Binding { template: [0; 32], matched, base: prober.base(), adapted: now }.check_effect(self)
    }

    fn another_base(&self, model: &ModelFile, differs: &[String]) -> Error {
        let what = match (differs.is_empty(), self.binding.is_some()) {
            (false, _) => format!(" ({})", differs.join("; ")),
            // Weights that the fixed tokens reach would have shown.
            (true, true) => {
                " (it computes the same on fixed tokens: its tokenizer, or weights for other tokens differ)"
                    .into()
            }
            (true, false) => String::new(),
        };
        mismatch(format!(
            "the adapter was trained on another base: {} ({}), and this model is {}{what}",
            hex::short(&self.base.digest),
            self.base_name(),
            hex::short(&model.digest()),
        ))
    }
}

/// Which of the two computes otherwise than when the adapter was saved.
fn other_outputs(then: &Binding, adapted: Fingerprint, base: Fingerprint) -> String {
    match base.agrees(&then.base) {
        false => format!(
            "the base's weights compute something else: up to {:.3} nats on fixed tokens",
            base.distance(&then.base)
        ),
        true => format!(
            "the base computes as before, but with the adapter the outputs differ by up to {:.3} nats: the adapter \
             is not read as it was saved",
            adapted.distance(&then.adapted)
        ),
    }
}

fn corrupt(problem: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, problem)
}

fn mismatch(problem: String) -> Error {
    Error::new(ErrorKind::BaseMismatch, problem).advise(Advice::OwnBase)
}
