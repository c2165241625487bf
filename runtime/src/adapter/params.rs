//! The parameters of an adapter, and the base model they belong to.

use engraft_kernels::Kernels;
use serde::{Deserialize, Serialize};

use super::binding::Binding;
use super::config::{Layout, LoraConfig, shapes};
use super::gains;
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::hex;
use crate::model::ModelConfig;
use crate::model::usage::Usage;
use crate::model::weights::ModelFile;

/// Which base model an adapter belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseIdentity {
    /// SHA-256 that identifies the base's weights, quantization and tokenizer. Files hold it elsewhere: in their
    /// frame.
    #[serde(skip)]
    pub digest: [u8; 32],
    /// `general.architecture`.
    pub architecture: String,
    /// Model width.
    pub d_model: usize,
    /// Transformer blocks.
    pub n_layers: usize,
    /// Rows of the token embedding.
    pub vocab: usize,
}

impl BaseIdentity {
    /// The identity of a model with this digest.
    pub fn new(digest: [u8; 32], model: &ModelConfig) -> BaseIdentity {
        BaseIdentity {
            digest,
            architecture: model.architecture.clone(),
            d_model: model.d_model,
            n_layers: model.n_layers,
            vocab: model.vocab,
        }
    }
}

/// How A was initialized. (B starts at zero.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// Uniformly random, as Kaiming's initialization with a = √5.
    #[default]
    Kaiming,
    /// As the leading right singular vectors of inputs (EVA).
    Eva,
    /// Inside the directions that ordinary text leaves quiet, where it stayed.
    Quiet,
}

/// How an adapter was trained. What it computes doesn't depend on it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainedWith {
    /// The base's own name (`general.name`).
    pub base_name: String,
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens that the loss was taken on.
    pub tokens: u64,
    /// Seed of initial values, order and dropout.
    pub seed: u64,
    /// How A was initialized. Files hold it elsewhere: in their flags.
    #[serde(skip)]
    pub init: Init,
    /// Held-out loss when its training began, nats per token: of the base alone, or of the adapter it went on with.
    pub valid_loss_before: Option<f32>,
    /// Held-out loss with the adapter, nats per token.
    pub valid_loss_after: Option<f32>,
    /// How it is meant to be used. Files hold it elsewhere: at their header's end.
    #[serde(skip)]
    pub usage: Usage,
}

/// A LoRA or DoRA adapter in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// What is adapted.
    pub config: LoraConfig,
    /// Where each pair lies in `theta`.
    pub layout: Layout,
    /// All parameters, `layout.len()` of them.
    pub theta: Vec<f32>,
    /// The base it belongs to.
    pub base: BaseIdentity,
    /// How it was trained.
    pub meta: TrainedWith,
    /// What its file records about the base; `None` before the first save, and for older files.
    pub binding: Option<Binding>,
}

impl Adapter {
    /// An adapter that changes nothing yet: A ~ U(−1/√in, 1/√in), which is Kaiming's uniform
    /// initialization with a = √5, and B = 0. `uniform` returns numbers in [0, 1); it is called once per
    /// element of A, in the order of θ.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] when `config` doesn't fit `model`, or asks for DoRA.
    pub fn init(
        model: &ModelConfig,
        config: &LoraConfig,
        base_digest: [u8; 32],
        uniform: &mut dyn FnMut() -> f32,
    ) -> Result<Adapter> {
        if config.dora {
            let message = "DoRA starts from the norms of the base's weights: Adapter::init_on takes them";
            return Err(Error::new(ErrorKind::Misuse, message));
        }
        Adapter::fresh(model, config, base_digest, uniform)
    }

    /// The same for LoRA or DoRA on a model's weights. DoRA's magnitudes are the norms of the dequantized rows,
    /// so every gain is exactly 1.
    ///
    /// # Errors
    /// As [`Adapter::init`].
    pub fn init_on(
        model: &ModelFile,
        kernels: &Kernels,
        config: &LoraConfig,
        uniform: &mut dyn FnMut() -> f32,
    ) -> Result<Adapter> {
        let mut adapter = Adapter::fresh(model.config(), config, model.digest(), uniform)?;
        if !adapter.config.dora {
            return Ok(adapter);
        }
        let mut scratch = vec![0.0; gains::kernel_words(&adapter.layout, kernels.threads())];
        let norms = gains::base_norms(model, kernels, &adapter.layout, &mut scratch);
        for (_, _, slot) in adapter.layout.slots() {
            adapter.theta[slot.m.clone()].copy_from_slice(&norms[slot.rows()]);
        }
        Ok(adapter)
    }

    fn fresh(
        model: &ModelConfig,
        config: &LoraConfig,
        base_digest: [u8; 32],
        uniform: &mut dyn FnMut() -> f32,
    ) -> Result<Adapter> {
        let config = config.clone().checked(model)?;
        let layout = Layout::new(model, &config);
        let mut theta = vec![0.0; layout.len()];
        for (_, _, slot) in layout.slots() {
            let bound = 1.0 / (slot.inputs as f32).sqrt();
            for a in &mut theta[slot.a] {
                *a = (2.0 * uniform() - 1.0) * bound;
            }
        }
        let base = BaseIdentity::new(base_digest, model);
        Ok(Adapter { config, layout, theta, base, meta: TrainedWith::default(), binding: None })
    }

    /// Checks that the adapter belongs to the model with this digest.
    ///
    /// # Errors
    /// [`ErrorKind::BaseMismatch`].
    pub fn check_base(&self, digest: &[u8; 32], model: &ModelConfig) -> Result<()> {
        if self.base.digest != *digest {
            let message = format!(
                "the adapter was trained on another base: {} ({}); this model is {}",
                hex::short(&self.base.digest),
                self.base_name(),
                hex::short(digest)
            );
            return Err(Error::new(ErrorKind::BaseMismatch, message).advise(Advice::OwnBase));
        }
        self.check_shapes(model)
    }

    /// Checks only that the adapter's shapes match the model's, which must hold even if the user overrides the
    /// digest check.
    ///
    /// # Errors
    /// [`ErrorKind::BaseMismatch`].
    pub fn check_shapes(&self, model: &ModelConfig) -> Result<()> {
        let here = BaseIdentity::new(self.base.digest, model);
        let same_shapes = self.layout.shapes().eq(shapes(model, &self.config.targets));
        if self.base == here && same_shapes {
            return Ok(());
        }
        let describe = |b: &BaseIdentity| {
            format!(
                "{:?}, width {}, {} layers, vocabulary {}",
                b.architecture, b.d_model, b.n_layers, b.vocab
            )
        };
        let message = format!(
            "the adapter was trained on another base with different shapes: {}; this model is {}{}; use its own base",
            describe(&self.base),
            describe(&here),
            if same_shapes { "" } else { " (projections of other sizes)" }
        );
        Err(Error::new(ErrorKind::BaseMismatch, message))
    }

    /// The base's name, quoted: it comes from a file.
    pub(crate) fn base_name(&self) -> String {
        if self.meta.base_name.is_empty() { "unnamed".into() } else { format!("{:?}", self.meta.base_name) }
    }
}
