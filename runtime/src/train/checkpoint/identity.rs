//! Which run a checkpoint is of: what must agree for it to go on.

use std::fmt::{Debug, Display};

use sha2::{Digest, Sha256};

use crate::adapter::LoraConfig;
use crate::data::Example;
use crate::error::{Error, ErrorKind, Result};
use crate::hex;
use crate::train::TrainOptions;

/// The base, and every setting that the result depends on, by name. Rows are among them as digests: no text
/// of a user's is in a checkpoint but what the parameters learned of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    base: [u8; 32],
    settings: Vec<(String, String)>,
}

impl Identity {
    /// A run on the model of this digest, of an adapter or (`None`) of every weight.
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
                .with_debug("projections", &lora.targets)
                .with_debug("layers", &lora.layers)
                .with_debug("single ranks and alphas", &lora.overrides),
        };
        let TrainOptions { adamw, schedule, seed, precision, gradient, kl } = options;
        identity
            .with_debug("optimizer", adamw)
            .with_debug("schedule", &schedule.shape)
            .with("learning rate", schedule.peak)
            .with("warmup steps", schedule.warmup)
            .with("steps", schedule.total)
            .with("seed", seed)
            .with_debug("precision", precision)
            .with_debug("gradient precision", gradient)
            .with_debug("divergence penalty", kl)
    }

    /// The same with one more setting.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Display) -> Identity {
        self.settings.push((name.to_string(), value.to_string()));
        self
    }

    /// The same with rows, as the digest of their ids and masks in their order.
    #[must_use]
    pub fn with_rows(self, name: &str, rows: &[Example]) -> Identity {
        let mut hash = Sha256::new();
        for Example { ids, mask } in rows {
            hash.update((ids.len() as u64).to_le_bytes());
            ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
            mask.iter().for_each(|target| hash.update([u8::from(*target)]));
        }
        self.with(name, hex::encode(&hash.finalize()))
    }

    /// One digest of all of it.
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new().chain_update(self.base);
        for text in self.settings.iter().flat_map(|(name, value)| [name, value]) {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
        hash.finalize().into()
    }

    pub(super) fn base(&self) -> &[u8; 32] {
        &self.base
    }

    pub(super) fn settings(&self) -> &[(String, String)] {
        &self.settings
    }

    /// Holds what a checkpoint says against this run.
    ///
    /// # Errors
    /// `BaseMismatch`; `Misuse` with every setting that differs.
    pub(super) fn check(&self, base: &[u8; 32], settings: &[(String, String)]) -> Result<()> {
        if *base != self.base {
            let message = format!(
                "the checkpoint is of a run on another model ({}, this is {}): give that one, or begin anew \
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
            let line = format!("{name} was {then}, and is {now}");
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

    fn with_debug(self, name: &str, value: &impl Debug) -> Identity {
        self.with(name, format!("{value:?}"))
    }
}
