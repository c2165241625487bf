//! Held-out text for `merge` and `export`, to measure how much they lose of an adapter's effect.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, value_parser};
use engraft_runtime::data::Example;
use engraft_runtime::error::{Error, ErrorKind};
use engraft_runtime::merge::judge::{Judge, Judgement};
use engraft_runtime::model::weights::ModelFile;

use super::{Invocation, eval};
use crate::options::{self, DataOptions, stat, tell_rows};

/// Examples between progress lines.
const TELL_EVERY: usize = 8;

/// The text or rows to measure on, and how much of it.
#[derive(Args, Clone, Debug)]
pub(crate) struct HeldOut {
    /// Held-out text to measure on (or use --data)
    #[arg(short, long, value_name = "FILE", conflicts_with = "data")]
    file: Option<PathBuf>,

    /// Tokens per window of the text, or maximum tokens per row
    #[arg(short, long, visible_alias = "max-seq-length", value_name = "N", default_value_t = 512, value_parser = value_parser!(u32).range(2..=1 << 20))]
    ctx_size: u32,

    /// Maximum number of tokens to score
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = value_parser!(u32).range(1..))]
    max_tokens: u32,

    /// Seed for the split; use the one from training
    #[arg(long, value_name = "N", default_value = "0", value_parser = options::parse::seed)]
    pub(crate) seed: u64,

    #[command(flatten)]
    data: DataOptions,
}

impl HeldOut {
    /// Whether a text or rows are given. They must exist.
    ///
    /// # Errors
    /// `Io` if they don't.
    pub(crate) fn is_given(&self) -> Result<bool, Error> {
        if let Some(text) = &self.file {
            return stat(text, "-f/--file").map(|_| true);
        }
        Ok(self.data.path()?.is_some())
    }

    /// Windows of the text, each scored on its second half, or held-out rows; up to `--max-tokens`.
    pub(crate) fn examples(&self, model: &ModelFile) -> Result<Vec<Example>> {
        let window = (self.ctx_size as usize).min(model.config().context_len);
        let mut examples = match (&self.file, self.data.path()?) {
            (Some(file), _) => windows(model, file, window)?,
            (None, Some(path)) => {
                let eval::HeldOut { data, which, .. } =
                    eval::held_out(&self.data, self.seed, model, path, window, Vec::new())?;
                tell_rows(&data, window);
                eprintln!("{}: {} rows, {which}", data.source.display(), data.examples.len());
                data.examples
            }
            (None, None) => Vec::new(),
        };
        let mut left = self.max_tokens as usize;
        examples.retain(|e| {
            let keep = left > 0;
            left = left.saturating_sub(e.mask.iter().skip(1).filter(|m| **m).count());
            keep
        });
        if self.is_given()? && !examples.iter().any(|e| e.mask.iter().skip(1).any(|m| *m)) {
            let message = "the held-out text has no token to score; use a longer one";
            return Err(Error::new(ErrorKind::BadData, message).into());
        }
        Ok(examples)
    }
}

fn windows(model: &ModelFile, file: &Path, window: usize) -> Result<Vec<Example>> {
    let (ids, bos) = eval::encode_text(model, file)?;
    let mut examples = Vec::new();
    for ids in ids.chunks(window).filter(|w| w.len() >= 2) {
        let mut ids = ids.to_vec();
        ids[0] = bos.unwrap_or(ids[0]);
        let mask = (0..ids.len()).map(|i| i > ids.len() / 2).collect();
        examples.push(Example { ids, mask });
    }
    Ok(examples)
}

/// Positions of the longest example.
pub(crate) fn rows_max(examples: &[Example]) -> usize {
    examples.iter().map(|e| e.ids.len()).max().unwrap_or(1)
}

/// Scores the examples and reports progress.
///
/// # Errors
/// Those of [`Judge::score`].
pub(crate) fn score(
    judge: &mut Judge,
    examples: &[Example],
    invocation: &Invocation,
) -> Result<Judgement, Error> {
    judge.score(examples, |done| {
        if done.is_multiple_of(TELL_EVERY) || done == examples.len() {
            eprintln!("measured {done}/{}", examples.len());
        }
        !invocation.is_cancelled()
    })
}
