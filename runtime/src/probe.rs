//! Checks whether an adapter and a model belong together, by fingerprints of what both compute, taken when an
//! adapter is saved and again when it is loaded.
//!
//! This catches what a digest can't: an adapter that loads but does nothing, or does something different than
//! before. Fingerprints use f32 throughout, where instruction sets differ only by rounding; quantized
//! activations would amplify rounding into different probabilities.
//!
//! ```
//! use engraft_runtime::Base;
//! use engraft_runtime::probe::Prober;
//!
//! # fn main() -> engraft_runtime::Result<()> {
//! let base = Base::open("../targets/cli/seedling.gguf")?;
//! let mut prober = Prober::new(&base.model, &base.kernels, 1);
//! let (one, other) = (prober.base(), prober.base());
//! assert!(one.agrees(&other));
//! # Ok(())
//! # }
//! ```

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use engraft_kernels::Kernels;

use crate::adapter::binding::{Binding, Fingerprint, PROBES};
use crate::adapter::gains::Gains;
use crate::adapter::{Adapter, Layout, StoredAs};
use crate::data::Batch;
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::hex;
use crate::model::weights::ModelFile;
use crate::nn::{Adapted, Precision};
use crate::plan::{self, ArenaWords};
use crate::rng::mix;
use crate::storage::{Committed, Storage};
use crate::train::chain::{AdapterView, Chain};

/// Takes fingerprints of a model: an arena of [`PROBES`] rows.
pub struct Prober {
    model: Arc<ModelFile>,
    kernels: Arc<Kernels>,
    chain: Chain,
    batch: Batch,
    base: Option<Fingerprint>,
}

impl Prober {
    /// For adapters whose ranks add up to at most `rank`.
    pub fn new(model: &Arc<ModelFile>, kernels: &Arc<Kernels>, rank: usize) -> Prober {
        let words = ArenaWords::new(model.config(), &plan::probing(rank, kernels.threads()));
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

    /// The base's own fingerprint, computed once.
    pub fn base(&mut self) -> Fingerprint {
        match self.base {
            Some(found) => found,
            None => *self.base.insert(take(&mut self.chain, None, &self.batch)),
        }
    }

    /// The fingerprint with adapters already in use.
    pub fn with(&mut self, adapted: &dyn Adapted) -> Fingerprint {
        take(&mut self.chain, Some(adapted), &self.batch)
    }

    /// The fingerprint with a stored adapter. A DoRA costs two passes over the weights it adapts.
    pub fn of(&mut self, adapter: &Adapter) -> Fingerprint {
        let Adapter { layout, config, theta, .. } = adapter;
        let gains = Gains::of(&self.model, &self.kernels, adapter);
        self.with(&AdapterView { layout, config, theta, gains: gains.c() })
    }

    /// Commits an adapter in a folder, bound to its base by what both compute. The file may round; the adapter
    /// in memory doesn't change.
    ///
    /// # Errors
    /// Those of [`Prober::bind`] and [`Adapter::save_bound`].
    pub fn save(
        &mut self,
        adapter: &Adapter,
        stored: StoredAs,
        (storage, folder): (&dyn Storage, &Path),
    ) -> Result<Committed> {
        let mut adapter = Cow::Borrowed(adapter);
        if stored == StoredAs::F16 {
            // Take the fingerprint of what will be loaded.
            adapter.to_mut().round_to(stored)?;
        }
        let binding = self.bind(&adapter)?;
        adapter.save_bound(storage, folder, stored, &binding)
    }

    /// The binding of an adapter to its base in their current state.
    ///
    /// # Errors
    /// `BaseMismatch` if the shapes don't match the model's; `NonFinite` if the outputs aren't finite; those of
    /// [`ModelFile::template_digest`].
    pub fn bind(&mut self, adapter: &Adapter) -> Result<Binding> {
        adapter.check_shapes(self.model.config())?;
        let (base, adapted) = (self.base(), self.of(adapter));
        for (found, what) in [(&base, "the base"), (&adapted, "the base with the adapter")] {
            if !found.is_finite() {
                let message = format!("{what} produces non-finite outputs on fixed tokens");
                return Err(Error::new(ErrorKind::NonFinite, message));
            }
        }
        self.model.check_whole()?;
        let matched = matched(&self.model, &adapter.layout);
        Ok(Binding { template: self.model.template_digest()?, matched, base, adapted })
    }

    /// Checks an adapter against the model: base digest, shapes and its [`Binding`]. Returns the names of what
    /// its file doesn't record and so couldn't be checked.
    ///
    /// Costs one pass of [`PROBES`] tokens, and the model's digest (see [`ModelFile::with_digest_cache`]).
    ///
    /// # Errors
    /// `BaseMismatch`, naming everything that differs, which a caller may override. `Corrupt`, which must not
    /// be overridden, for an adapter that does nothing or whose outputs aren't finite.
    pub fn check(&mut self, adapter: &Adapter) -> Result<Vec<&'static str>> {
        adapter.check_shapes(self.model.config())?;
        let now = self.of(adapter);
        self.check_found(adapter, now)
    }

    /// [`Prober::check`] with a fingerprint [taken](Prober::with) of this adapter alone, already in use, so a
    /// DoRA's gains aren't computed twice.
    ///
    /// # Errors
    /// As [`Prober::check`].
    pub fn check_found(&mut self, adapter: &Adapter, now: Fingerprint) -> Result<Vec<&'static str>> {
        let model = self.model.clone();
        adapter.check_shapes(model.config())?;
        model.check_whole()?;
        if !now.is_finite() {
            return Err(corrupt("with the adapter, the model's outputs aren't finite: it is broken"));
        }
        self.check_does_something(adapter, now)?;
        let mut differs = Vec::new();
        if let Some(then) = &adapter.binding {
            if then.template != model.template_digest()? {
                differs.push("the chat template differs".to_string());
            }
            let found = matched(&model, &adapter.layout);
            if then.matched != found {
                differs.push(format!(
                    "{found} projections match a tensor, but {} did when it was saved",
                    then.matched
                ));
            }
            if !now.agrees(&then.adapted) {
                differs.push(other_outputs(then, now, self.base()));
            }
        }
        if adapter.base.digest != model.digest() {
            return Err(another_base(&model, adapter, &differs));
        }
        match differs.is_empty() {
            true if adapter.binding.is_some() => Ok(Vec::new()),
            true => Ok(vec!["chat template", "matched tensors", "outputs on fixed tokens"]),
            false => Err(mismatch(differs.join("; "))),
        }
    }

    /// The base's own fingerprint costs a pass, so take it only if the two may be equal.
    fn check_does_something(&mut self, adapter: &Adapter, now: Fingerprint) -> Result<()> {
        if adapter.binding.is_some_and(|then| !now.agrees(&then.base)) {
            return Ok(());
        }
        let matched = matched(&self.model, &adapter.layout);
        check_effect(&Binding { template: [0; 32], matched, base: self.base(), adapted: now }, adapter)
    }
}

fn take(chain: &mut Chain, adapted: Option<&dyn Adapted>, batch: &Batch) -> Fingerprint {
    let mut found = Fingerprint::default();
    chain.evaluate(adapted, batch, |row, loss| found.0[row] = loss as f32);
    found
}

/// Adapted projections whose tensor the model has, in the shape the adapter expects.
fn matched(model: &ModelFile, layout: &Layout) -> usize {
    let finds = |layer: usize, proj, shape: (usize, usize)| {
        layer < model.config().n_layers && {
            let tensor = model.block(layer).proj(proj);
            (tensor.rows(), tensor.cols()) == shape
        }
    };
    layout.slots().filter(|(layer, proj, s)| finds(*layer, *proj, (s.outputs, s.inputs))).count()
}

/// Refuses an adapter without any effect.
///
/// # Errors
/// `Corrupt`.
pub fn check_effect(binding: &Binding, adapter: &Adapter) -> Result<()> {
    if binding.matched == 0 {
        return Err(corrupt("none of its projections is in the model, so it would do nothing"));
    }
    // Compared to the bit: an effect fully hidden by rounding is no effect.
    if binding.adapted != binding.base {
        return Ok(());
    }
    Err(corrupt(match has_weights(adapter) {
        true => {
            "the adapter loads but does nothing: its B isn't zero, yet no output of the base changes; \
             it is broken or was made for another base"
        }
        false => {
            "the adapter does nothing: all of its B is zero, as before any training; train it, or take another"
        }
    }))
}

/// Whether any of B isn't zero.
fn has_weights(adapter: &Adapter) -> bool {
    adapter.layout.slots().any(|(_, _, s)| adapter.theta[s.b].iter().any(|b| *b != 0.0))
}

fn another_base(model: &ModelFile, adapter: &Adapter, differs: &[String]) -> Error {
    let what = match (differs.is_empty(), adapter.binding.is_some()) {
        (false, _) => format!(" ({})", differs.join("; ")),
        // A difference in weights the fixed tokens use would have shown.
        (true, true) => {
            " (it computes the same on fixed tokens, so its tokenizer or its weights for other tokens differ)"
                .into()
        }
        (true, false) => String::new(),
    };
    mismatch(format!(
        "the adapter was trained on another base: {} ({}); this model is {}{what}",
        hex::short(&adapter.base.digest),
        adapter.base_name(),
        hex::short(&model.digest()),
    ))
}

/// Says which of the two computes something different than when the adapter was saved.
fn other_outputs(then: &Binding, adapted: Fingerprint, base: Fingerprint) -> String {
    match base.agrees(&then.base) {
        false => format!(
            "the base's outputs differ by up to {:.3} nats on fixed tokens",
            base.distance(&then.base)
        ),
        true => format!(
            "the base computes as before, but with the adapter the outputs differ by up to {:.3} nats: the adapter \
             was not read back as it was saved",
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
