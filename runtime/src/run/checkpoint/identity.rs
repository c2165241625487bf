//! Which run a checkpoint belongs to: what must agree before it can continue.

use std::fmt::Display;

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::adapter::{LoraConfig, Override};
use crate::data::Example;
use crate::error::{Error, ErrorKind, Result};
use crate::hex;
use crate::nn::divergence::KlPenalty;
use crate::train::TrainOptions;
use crate::train::optim::AdamWConfig;

/// Version of the statement about a run. Raise it when a name, a value or the meaning of one below changes.
const VERSION: u32 = 3;

/// The base, and by name every setting the result depends on. Rows appear as digests: the only trace of a
/// user's text in a checkpoint is what the parameters learned.
///
/// Names and values are spelled out here because files store them; they must not follow identifiers in the
/// code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    base: [u8; 32],
    settings: Vec<(String, String)>,
}

impl Identity {
    /// A run on the model with this digest, training an adapter or (`None`) every weight.
    pub fn new(base: [u8; 32], lora: Option<&LoraConfig>, options: &TrainOptions) -> Identity {
        let identity = Identity { base, settings: Vec::new() };
        let identity = match lora {
            None => identity.with("trained", "every weight"),
            Some(lora) => identity
                .with("trained", if lora.dora { "DoRA" } else { "LoRA" })
                .with("rank", lora.rank)
                .with("alpha", lora.alpha)
                .with("rsLoRA", lora.rslora)
                .with("dropout", lora.dropout)
                .with("projections", listed(lora.targets.iter().map(|proj| proj.hf_name())))
                .with("layers", listed(&lora.layers))
                .with("single ranks and alphas", listed(lora.overrides.iter().map(Override::describe))),
        };
        let TrainOptions { adamw, schedule, seed, precision, gradient, kl, freeze_a } = options;
        let AdamWConfig { beta1, beta2, eps, weight_decay, max_grad_norm, lora_plus_ratio } = adamw;
        let penalty = |kl: &KlPenalty| format!("{} at weight {}", kl.direction.name(), kl.weight);
        identity
            .with("beta1", beta1)
            .with("beta2", beta2)
            .with("epsilon", eps)
            .with("weight decay", weight_decay)
            .with("largest gradient norm", max_grad_norm)
            .with("LoRA+ ratio", lora_plus_ratio)
            .with("schedule", schedule.shape.name())
            .with("learning rate", schedule.peak)
            .with("warmup steps", schedule.warmup)
            .with("steps", schedule.total)
            .with("seed", seed)
            .with("activations", precision.name())
            .with("input gradients", gradient.name())
            .with("A", if *freeze_a { "frozen" } else { "trained" })
            .with("divergence penalty", kl.as_ref().map_or("none".to_string(), penalty))
    }

    /// The same with one more setting.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Display) -> Identity {
        self.settings.push((name.to_string(), value.to_string()));
        self
    }

    /// The same with the digest of these rows.
    #[must_use]
    pub fn with_rows(self, name: &str, rows: &[Example]) -> Identity {
        self.with(name, rows_digest(rows))
    }

    /// One digest of all of it: SHA-256 of its statement in postcard's encoding.
    pub fn digest(&self) -> [u8; 32] {
        stated_digest(&(VERSION, self.base, &self.settings))
    }

    pub(super) fn base(&self) -> &[u8; 32] {
        &self.base
    }

    pub(crate) fn settings(&self) -> &[(String, String)] {
        &self.settings
    }

    /// Checks a checkpoint's statement against this run.
    ///
    /// # Errors
    /// `BaseMismatch`; `Misuse`, listing every setting that differs.
    pub(super) fn check(&self, base: &[u8; 32], settings: &[(String, String)]) -> Result<()> {
        if *base != self.base {
            let message = format!(
                "the checkpoint belongs to a run on another model ({}; this is {}): use that model, or start over \
                 in another folder",
                hex::short(base),
                hex::short(&self.base)
            );
            return Err(Error::new(ErrorKind::BaseMismatch, message));
        }
        let of = |all: &[(String, String)], name: &str| {
            all.iter().find(|(n, _)| n == name).map_or("not there".to_string(), |(_, value)| value.clone())
        };
        let names = self.settings.iter().chain(settings).map(|(name, _)| name);
        let mut differing: Vec<String> = Vec::new();
        for name in names {
            let (then, now) = (of(settings, name), of(&self.settings, name));
            let line = format!("{name} was {then}, now {now}");
            if then != now && !differing.contains(&line) {
                differing.push(line);
            }
        }
        if differing.is_empty() {
            return Ok(());
        }
        let message = format!(
            "the checkpoint is of another run: {}; give the settings and rows it began with, or begin anew in \
             another folder",
            differing.join("; ")
        );
        Err(Error::new(ErrorKind::Misuse, message))
    }
}

/// SHA-256 of a statement in postcard's encoding: what persists must not depend on spellings in the code.
///
/// # Panics
/// Never: postcard encodes strings, numbers and lists of them.
pub(crate) fn stated_digest(stated: &impl Serialize) -> [u8; 32] {
    let bytes = postcard::to_allocvec(stated).expect("plain data is encoded");
    Sha256::digest(bytes).into()
}

/// Hexadecimal digest of the rows' ids and masks, in order.
pub(crate) fn rows_digest(rows: &[Example]) -> String {
    let mut hash = Sha256::new();
    for Example { ids, mask } in rows {
        hash.update((ids.len() as u64).to_le_bytes());
        ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
        mask.iter().for_each(|target| hash.update([u8::from(*target)]));
    }
    hex::encode(&hash.finalize())
}

fn listed<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    if items.is_empty() { "none".into() } else { items.join(",") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Proj;
    use crate::nn::divergence::Direction;
    use crate::nn::{GradientPrecision, Precision};
    use crate::train::schedule::{Schedule, Shape};

    fn run() -> Identity {
        let lora = LoraConfig {
            rank: 8,
            alpha: 16.0,
            rslora: false,
            dropout: 0.05,
            dora: true,
            targets: vec![Proj::Q, Proj::Down],
            layers: vec![1, 2],
            overrides: vec![Override { layer: Some(2), proj: Proj::Q, rank: Some(4), alpha: None }],
        };
        let options = TrainOptions {
            adamw: AdamWConfig::default(),
            schedule: Schedule { shape: Shape::Cosine, peak: 2e-4, warmup: 3, total: 300 },
            seed: 7,
            precision: Precision::Int8,
            gradient: GradientPrecision::Bf16,
            kl: Some(KlPenalty { weight: 0.5, direction: Direction::Reverse }),
            freeze_a: false,
        };
        Identity::new([9; 32], Some(&lora), &options).with("batch size", 2).with_rows("rows", &[])
    }

    /// Checkpoints and verdicts store these words. Changing one breaks resuming across versions: raise
    /// [`VERSION`].
    #[test]
    fn what_is_stated_of_a_run_is_pinned_word_for_word() {
        let stated: Vec<String> = run().settings().iter().map(|(n, v)| format!("{n}: {v}")).collect();
        let expected = [
            "trained: DoRA",
            "rank: 8",
            "alpha: 16",
            "rsLoRA: false",
            "dropout: 0.05",
            "projections: q_proj,down_proj",
            "layers: 1,2",
            "single ranks and alphas: layers.2.q_proj rank 4",
            "beta1: 0.9",
            "beta2: 0.999",
            "epsilon: 0.00000001",
            "weight decay: 0",
            "largest gradient norm: 1",
            "LoRA+ ratio: 1",
            "schedule: cosine",
            "learning rate: 0.0002",
            "warmup steps: 3",
            "steps: 300",
            "seed: 7",
            "activations: int8",
            "input gradients: bf16",
            "A: trained",
            "divergence penalty: reverse at weight 0.5",
            "batch size: 2",
            "rows: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        ];
        assert_eq!(stated, expected);
        assert_eq!(
            hex::encode(&run().digest()),
            "1cb698593113dc4d452561cd6f56712856b06d8a8244f20c8014d960db65ce8f"
        );
    }

    #[test]
    fn every_part_of_the_statement_counts() {
        let other = [
            Identity { base: [8; 32], ..run() },
            run().with("one more", 1),
            Identity { settings: run().settings[1..].to_vec(), ..run() },
        ];
        assert!(other.iter().all(|other| other.digest() != run().digest()));
    }
}
