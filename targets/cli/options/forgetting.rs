//! Options against forgetting what the model knew.

use std::path::PathBuf;

use clap::{Args, value_parser};
use engraft_runtime::adapter::Init;
use engraft_runtime::error::Error;
use engraft_runtime::run::{Begin, Earlier, Settings, settings};
use engraft_runtime::train::{Direction, KlPenalty};

use super::{misuse, parse};

/// Options that keep a model close to its base.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Against forgetting")]
pub(crate) struct ForgettingOptions {
    /// Mix rows that the model already knows into the batches: from a .jsonl file, or sampled from the base
    #[arg(long, value_name = "FILE|base", value_parser = replay_source)]
    pub(crate) replay: Option<ReplaySource>,

    /// Share of replayed rows, at most 0.9 [default: 0.1 with --replay]
    #[arg(long, value_name = "SHARE", value_parser = parse::replay_share)]
    replay_share: Option<f64>,

    /// Rows to sample with --replay base [default: 64]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1_000_000))]
    replay_count: Option<u32>,

    /// Maximum tokens per sampled row [default: 64]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1 << 20))]
    replay_tokens: Option<u32>,

    /// Let a LoRA act only where ordinary text is quiet: general (the built-in text), off, or a .jsonl file with rows
    /// to protect; may be repeated [default: off; for adapt: general]
    #[arg(long, value_name = "general|off|FILE", value_parser = protect_source)]
    pub(crate) protect: Vec<ProtectSource>,

    /// Share of ordinary text's energy that the protected directions leave to the adapter [default: 0.08]
    #[arg(long, value_name = "SHARE", value_parser = parse::positive_f32)]
    protect_energy: Option<f32>,

    /// Weight of the divergence from the base on ordinary text, in every second step [default: 4]
    #[arg(long, value_name = "W", value_parser = parse::kl_weight)]
    general_kl: Option<f32>,

    /// Weight of the divergence from the base in each token's loss; adapters only [default: 0, off]
    #[arg(long, value_name = "W", value_parser = parse::kl_weight)]
    kl_weight: Option<f32>,

    /// Direction of the divergence [default: forward]
    #[arg(long, value_parser = parse::kl_direction())]
    kl_direction: Option<Direction>,
}

/// Where replayed rows come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ReplaySource {
    /// The model itself.
    Base,
    /// Rows of any known format.
    File(PathBuf),
}

fn replay_source(text: &str) -> Result<ReplaySource, String> {
    match text {
        "" => Err("must be a file, or base".into()),
        "base" => Ok(ReplaySource::Base),
        file => Ok(ReplaySource::File(file.into())),
    }
}

/// What is protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ProtectSource {
    /// Nothing.
    Off,
    /// The built-in text.
    General,
    /// Rows of any known format.
    File(PathBuf),
}

fn protect_source(text: &str) -> Result<ProtectSource, String> {
    match text {
        "" => Err("must be general, off, or a file".into()),
        "off" => Ok(ProtectSource::Off),
        "general" => Ok(ProtectSource::General),
        file => Ok(ProtectSource::File(file.into())),
    }
}

impl ForgettingOptions {
    /// Whether ordinary text is protected, which is `usual` unless somebody says.
    pub(crate) fn protects(&self, usual: bool) -> bool {
        if self.protect.is_empty() { usual } else { !self.protect.contains(&ProtectSource::Off) }
    }

    /// Puts the protection into settings.
    pub(super) fn protect(&self, settings: Settings) -> Settings {
        let protected = settings.protected();
        let energy = self.protect_energy.map_or(protected.begin, Begin::Protected);
        let weight = self.general_kl.or(protected.general_kl).filter(|weight| *weight > 0.0);
        Settings { begin: energy, general_kl: weight, ..protected }
    }

    /// Whether a run protects ordinary text: as it is told, or as the adapter it goes on with does.
    ///
    /// # Errors
    /// `Misuse` if that adapter's A isn't in protected directions, and they were asked for.
    pub(super) fn protects_from(&self, earlier: Option<&Earlier>, usual: bool) -> Result<bool, Error> {
        let Some(earlier) = earlier else { return Ok(self.protects(usual)) };
        let is_quiet = earlier.init == Init::Quiet;
        match !is_quiet && self.protects(false) {
            true => Err(misuse(
                "--protect: the adapter of --from wasn't trained in protected directions; leave it out",
            )),
            false => Ok(self.protects(is_quiet) && is_quiet),
        }
    }

    /// The share of replayed rows; 0 without `--replay`.
    ///
    /// # Errors
    /// `Misuse` for a share without `--replay`.
    pub(crate) fn share(&self) -> Result<f64, Error> {
        match (&self.replay, self.replay_share) {
            (Some(_), share) => Ok(share.unwrap_or(settings::REPLAY_SHARE)),
            (None, None) => Ok(0.0),
            (None, Some(_)) => {
                Err(misuse("--replay-share needs something to replay; add --replay FILE or --replay base"))
            }
        }
    }

    /// Refuses flags that would do nothing.
    ///
    /// # Errors
    /// `Misuse`, with the flag's name.
    pub(super) fn check(&self) -> Result<(), Error> {
        self.share()?;
        let samples = self.replay == Some(ReplaySource::Base);
        for (flag, given) in [("--replay-count", self.replay_count), ("--replay-tokens", self.replay_tokens)]
        {
            if given.is_some() && !samples {
                return Err(misuse(format!("{flag} is for rows sampled from the base; add --replay base")));
            }
        }
        let protects = self.protects(true);
        if !protects && self.protect.len() > 1 {
            return Err(misuse("--protect off leaves nothing to protect; leave it out, or the others"));
        }
        for (flag, given) in [("--protect-energy", self.protect_energy), ("--general-kl", self.general_kl)] {
            if given.is_some() && !protects {
                return Err(misuse(format!("{flag} has no effect with --protect off; leave it out")));
            }
        }
        match (self.kl_direction, self.kl_weight) {
            (Some(_), None) => Err(misuse("--kl-direction has no effect without --kl-weight; add it")),
            _ => Ok(()),
        }
    }

    /// How many rows to sample from the base, and the maximum tokens of each.
    pub(crate) fn sampled(&self) -> (usize, usize) {
        let (rows, tokens) = (self.replay_count, self.replay_tokens);
        let rows = rows.map_or(settings::REPLAY_COUNT, |n| n as usize);
        (rows, tokens.map_or(settings::REPLAY_TOKENS, |n| n as usize))
    }

    /// The penalty on moving away from the base, if any.
    pub(crate) fn penalty(&self) -> Option<KlPenalty> {
        let direction = self.kl_direction.unwrap_or_default();
        self.kl_weight.filter(|weight| *weight > 0.0).map(|weight| KlPenalty { weight, direction })
    }
}
