//! How an arm is to be trained, and the memory that it takes.

use std::borrow::Cow;
use std::sync::Arc;

use engraft_kernels::{DType, Kernels};

use super::material::Material;
use crate::adapter::{Layout, LoraConfig};
use crate::data::Example;
use crate::error::{Error, ErrorKind, Result};
use crate::model::tuned::TunedLayout;
use crate::model::weights::ModelFile;
use crate::model::{ModelConfig, Proj};
use crate::nn::divergence::KlPenalty;
use crate::nn::keep::KeepPrecision;
use crate::nn::{GradientPrecision, Precision};
use crate::plan::{FullUpdate, MemoryPlan, Request, keep, process_bytes};

/// Ranks to choose from.
const RANKS: [usize; 5] = [1, 2, 4, 8, 16];
/// Trained parameters that a target may stand for, at most: beyond it a larger rank learns the rows rather
/// than what they have in common.
const PARAMS_PER_TARGET: usize = 100;

/// The model that arms are trained on, and how to compute.
#[derive(Clone)]
pub struct Base {
    /// Its file.
    pub model: Arc<ModelFile>,
    /// What computes.
    pub kernels: Arc<Kernels>,
    /// Activations.
    pub precision: Precision,
    /// Input gradients.
    pub gradient: GradientPrecision,
    /// Private heap of the tokenizer, and of what else lives as long as the comparison.
    pub tokenizer_bytes: usize,
}

impl Base {
    /// The same where `bytes` more are held throughout.
    pub fn beside(&self, bytes: usize) -> Base {
        Base { tokenizer_bytes: self.tokenizer_bytes + bytes, ..self.clone() }
    }

    /// Private bytes of what is held throughout: process, model, tokenizer and rows.
    pub fn resident_bytes(&self, material: &Material) -> usize {
        let parts = [&material.train, &material.valid, &material.held_out];
        let rows: usize = parts.iter().map(|r| r.data.heap_bytes()).sum();
        let own = process_bytes(self.kernels.threads());
        own + self.model.private_bytes() + self.tokenizer_bytes + material.text_bytes() + rows
    }
}

/// What is trained.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// An adapter: LoRA or DoRA.
    Adapter(LoraConfig),
    /// Every weight. The arm is the file that comes of it, of this type.
    Full(Option<DType>),
}

impl Method {
    /// In words: "LoRA, rank 8, alpha 16, on q, v of 30 blocks".
    pub fn describe(&self) -> String {
        let Method::Adapter(lora) = self else {
            let Method::Full(dtype) = self else { return String::new() };
            let stored = dtype.map_or("as in the base".to_string(), |d| d.name().to_string());
            return format!("full fine-tuning, stored {stored}");
        };
        let kind = if lora.dora { "DoRA" } else { "LoRA" };
        let on = match lora.targets.len() == Proj::ALL.len() {
            true => "all seven projections".to_string(),
            false => lora.targets.iter().map(|p| p.hf_name()).collect::<Vec<_>>().join(", "),
        };
        let blocks = lora.layers.len();
        format!("{kind}, rank {}, alpha {}, on {on} of {blocks} blocks", lora.rank, lora.alpha)
    }

    /// Trained parameters.
    pub fn parameters(&self, c: &ModelConfig) -> usize {
        match self {
            Method::Adapter(lora) => Layout::new(c, lora).len(),
            Method::Full(_) => TunedLayout::new(c).len(),
        }
    }
}

/// How long a run may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Optimizer steps.
    Steps(u64),
    /// Passes through the training rows.
    Epochs(f64),
    /// Tokens that pass the model forward and backward.
    Tokens(u64),
    /// Minutes in steps.
    Minutes(f64),
}

/// An arm that is to be trained.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// Its name.
    pub name: String,
    /// What is trained.
    pub method: Method,
    /// The highest learning rate; `None` lets a range test choose it.
    pub rate: Option<f64>,
    /// How long, at most.
    pub budget: Budget,
    /// Sequences of a step.
    pub batch: usize,
    /// Of the initial adapter, dropout and the order of rows.
    pub seed: u64,
    /// Evaluations on the validation rows, spread over the run.
    pub evaluations: u64,
    /// Evaluations without a lower loss before the run ends; 0 never ends it.
    pub patience: u64,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Largest gradient norm, 0 for none.
    pub max_grad_norm: f32,
    /// A penalty on leaving the base; adapters only.
    pub kl: Option<KlPenalty>,
    /// Rows that are trained on among the material's: what the base is to keep, such as its own answers.
    pub replay: Vec<Example>,
}

impl Recipe {
    /// The rows of the run: the material's, and what is replayed.
    pub fn rows<'r>(&'r self, material: &'r Material) -> Cow<'r, [Example]> {
        let own = &material.train.data.examples;
        match self.replay.is_empty() {
            true => Cow::Borrowed(own),
            false => Cow::Owned([&own[..], &self.replay].concat()),
        }
    }

    /// What the run asks of memory, and the plan; what blocks keep is the fastest that `budget` bytes allow.
    pub fn plan(&self, base: &Base, material: &Material, budget: Option<u64>) -> (Request, MemoryPlan) {
        let c = base.model.config();
        let parts = [&material.train, &material.valid, &material.held_out];
        // The rows of a run with replay are a copy.
        let rows = self.rows(material);
        let copied = if self.replay.is_empty() { &[][..] } else { &rows };
        let examples = || parts.iter().flat_map(|r| &r.data.examples).chain(&self.replay).chain(copied);
        let longest = rows.iter().map(Example::rows).max().unwrap_or(1);
        let mut request = Request {
            batch: self.batch.min(rows.len()),
            seq: longest.max(material.valid.data.rows_max()),
            threads: base.kernels.threads(),
            best: true,
            beside_base: self.kl.is_some(),
            data_tokens: examples().map(|e| e.ids.len()).sum(),
            data_rows: examples().count(),
            model_bytes: base.model.private_bytes() + base.tokenizer_bytes + material.text_bytes(),
            mapped_bytes: base.model.mapped_bytes(),
            kept_blocks: c.n_layers,
            ..Request::default()
        };
        match &self.method {
            Method::Adapter(lora) => {
                let layout = Layout::new(c, lora);
                request.params = layout.len();
                request.gain_words = layout.gain_words();
                request.rank = lora.rank_max();
                request.kept_blocks = c.n_layers - lora.layers[0];
                request.dropout = lora.dropout > 0.0;
            }
            Method::Full(_) => {
                let at_once = self.max_grad_norm == 0.0;
                request.full = Some(if at_once { FullUpdate::AtOnce } else { FullUpdate::AtEnd });
            }
        }
        let unasked = match request.full {
            None => keep::UNASKED_BYTES,
            Some(_) => MemoryPlan::new(c, &request).private_bytes + keep::UNASKED_BYTES,
        };
        let budget = budget.map_or(unasked, |b| usize::try_from(b).unwrap_or(usize::MAX));
        request.keep = keep::choose(c, &request, KeepPrecision::F32, budget);
        let plan = MemoryPlan::new(c, &request);
        (request, plan)
    }

    /// Holds the plan against a budget of bytes.
    ///
    /// # Errors
    /// `DoesNotFit`, with a setting that fits.
    pub fn check(&self, base: &Base, material: &Material, budget: Option<u64>) -> Result<MemoryPlan> {
        let (request, plan) = self.plan(base, material, budget);
        if let Some(bytes) = budget {
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            plan.check(base.model.config(), &request, bytes).map_err(|e| e.at(&self.name))?;
        }
        Ok(plan)
    }
}

/// The largest rank whose plan fits a budget of bytes, and that the rows' targets can carry.
///
/// # Errors
/// `DoesNotFit` where none does.
pub fn choose_rank(
    recipe: &Recipe,
    base: &Base,
    material: &Material,
    budget: Option<u64>,
) -> Result<LoraConfig> {
    let Method::Adapter(lora) = &recipe.method else {
        return Err(Error::new(ErrorKind::Misuse, "full fine-tuning has no rank"));
    };
    let targets = material.train.data.trained_tokens();
    let of = |rank: usize| {
        // The multiplier alpha/r stays, so that one learning rate suits every rank.
        let alpha = lora.alpha / lora.rank as f32 * rank as f32;
        LoraConfig { rank, alpha, ..lora.clone() }
    };
    let carried = |rank: usize| {
        let params = Layout::new(base.model.config(), &of(rank)).len();
        rank == RANKS[0] || params <= targets.saturating_mul(PARAMS_PER_TARGET)
    };
    let fits = |rank: usize| {
        let recipe = Recipe { method: Method::Adapter(of(rank)), ..recipe.clone() };
        recipe.check(base, material, budget)
    };
    let mut refused = None;
    for rank in RANKS.into_iter().rev().filter(|r| carried(*r)) {
        match fits(rank) {
            Ok(_) => return Ok(of(rank)),
            Err(error) => refused = Some(error),
        }
    }
    Err(refused.unwrap_or_else(|| Error::new(ErrorKind::DoesNotFit, "no rank fits")))
}
