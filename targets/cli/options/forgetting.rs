//! What stands against forgetting what the model knew.

use std::path::PathBuf;

use clap::{Args, value_parser};
use engraft_runtime::error::Error;
use engraft_runtime::run::settings;
use engraft_runtime::train::{Direction, KlPenalty};

use super::{misuse, parse};

/// What keeps a model near what it was.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Against forgetting")]
pub(crate) struct ForgettingOptions {
    /// Mix rows that the model knew into every batch: from a .jsonl file, or sampled from the base before training
    #[arg(long, value_name = "FILE|base", value_parser = replay_source)]
    pub(crate) replay: Option<ReplaySource>,

    /// Share of the rows that is replayed, at most 0.9 [default: 0.1 with --replay]
    #[arg(long, value_name = "SHARE", value_parser = parse::replay_share)]
    replay_share: Option<f64>,

    /// Rows to sample with --replay base [default: 64]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1_000_000))]
    replay_count: Option<u32>,

    /// Tokens to sample for each of them at most [default: 64]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1 << 20))]
    replay_tokens: Option<u32>,

    /// Weight of the divergence from the base in each token's loss; adapters only [default: 0, none]
    #[arg(long, value_name = "W", value_parser = parse::kl_weight)]
    kl_weight: Option<f32>,

    /// Which divergence [default: forward]
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

impl ForgettingOptions {
    /// The share of replayed rows, 0 without any.
    ///
    /// # Errors
    /// `Misuse` for a share of nothing.
    pub(crate) fn share(&self) -> Result<f64, Error> {
        match (&self.replay, self.replay_share) {
            (Some(_), share) => Ok(share.unwrap_or(settings::REPLAY_SHARE)),
            (None, None) => Ok(0.0),
            (None, Some(_)) => {
                Err(misuse("--replay-share needs something to replay: add --replay FILE or --replay base"))
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
                return Err(misuse(format!("{flag} is for rows that the base writes: add --replay base")));
            }
        }
        match (self.kl_direction, self.kl_weight) {
            (Some(_), None) => Err(misuse("--kl-direction has no effect without --kl-weight")),
            _ => Ok(()),
        }
    }

    /// Rows to sample from the base, and tokens of each at most.
    pub(crate) fn sampled(&self) -> (usize, usize) {
        let (rows, tokens) = (self.replay_count, self.replay_tokens);
        let rows = rows.map_or(settings::REPLAY_COUNT, |n| n as usize);
        (rows, tokens.map_or(settings::REPLAY_TOKENS, |n| n as usize))
    }

    /// The penalty on leaving the base, if there is one.
    pub(crate) fn penalty(&self) -> Option<KlPenalty> {
        let direction = self.kl_direction.unwrap_or_default();
        self.kl_weight.filter(|weight| *weight > 0.0).map(|weight| KlPenalty { weight, direction })
    }
}
