//! Where rows come from and which of their tokens count.

use std::path::{Path, PathBuf};

use clap::Args;
use engraft_runtime::data::{self, Dataset, OverLong};
use engraft_runtime::error::Error;
use engraft_runtime::run::settings;

use super::{misuse, parse, stat};

/// How many skipped rows are listed without `-v`.
const SKIPPED_SHOWN: usize = 10;

/// Where rows come from and which of their tokens count.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Data")]
pub(crate) struct DataOptions {
    /// Folder with train.jsonl and optionally valid.jsonl and test.jsonl, or one .jsonl file to be split
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,

    /// Learn and score only the answers (the default)
    #[arg(long, alias = "assistant-loss-only", num_args = 0..=1, require_equals = true, value_name = "BOOL",
          default_missing_value = "true", conflicts_with = "no_mask_prompt")]
    mask_prompt: Option<bool>,

    /// Learn and score prompts as well as answers
    #[arg(long)]
    no_mask_prompt: bool,

    /// Share of the rows to hold out if there is no valid.jsonl
    #[arg(long, value_name = "SHARE", default_value_t = settings::VALID_FRACTION, value_parser = parse::below_one)]
    pub(crate) valid_fraction: f64,
}

impl DataOptions {
    /// The data's existing path; `None` without the flag.
    ///
    /// # Errors
    /// `Io` when there is no such folder or file.
    pub(crate) fn path(&self) -> Result<Option<&Path>, Error> {
        self.data.as_deref().map(|path| stat(path, "--data").map(|_| path)).transpose()
    }

    /// The same if it must be given.
    ///
    /// # Errors
    /// `Misuse` without the flag; those of [`DataOptions::path`].
    pub(crate) fn required_path(&self) -> Result<&Path, Error> {
        let missing = || misuse("--data is missing; name a folder that holds train.jsonl, or a .jsonl file");
        self.path()?.ok_or_else(missing)
    }

    /// Whether only answers are learned and scored.
    pub(crate) fn masks_prompt(&self) -> bool {
        self.mask_prompt.unwrap_or(true) && !self.no_mask_prompt
    }

    /// How to read the rows, with at most `rows_max` positions each.
    pub(crate) fn reading(&self, rows_max: usize, seed: u64) -> data::DataOptions {
        data::DataOptions {
            mask_prompt: self.masks_prompt(),
            max_seq_length: rows_max,
            over_long: OverLong::Truncate,
            valid_fraction: self.valid_fraction,
            split_seed: seed,
            ..data::DataOptions::default()
        }
    }
}

/// Reports on stderr the rows of a file that were skipped or cut.
pub(crate) fn tell_rows(data: &Dataset, rows_max: usize) {
    let shown = if log::log_enabled!(log::Level::Info) { data.skipped.len() } else { SKIPPED_SHOWN };
    for row in data.skipped.iter().take(shown) {
        eprintln!("skipped {row}");
    }
    let source = data.source.display();
    match data.skipped_count {
        0 => {}
        n if n > shown => {
            eprintln!("{source}: {n} rows skipped; {} of them aren't listed (-v lists more)", n - shown)
        }
        n => eprintln!("{source}: {n} rows skipped"),
    }
    if data.truncated > 0 {
        eprintln!("{source}: {} rows cut at {rows_max} tokens (see --max-seq-length)", data.truncated);
    }
}
