//! Turns JSONL files into token ids with loss masks, and those into ragged batches.
//!
//! Unusable rows are skipped, counted and named; data that leaves nothing to train on is an error. Masks follow
//! from who wrote each piece of a rendered row, never from searching the text.
//!
//! ```
//! use engraft_runtime::data::{Origin, load_from};
//! use engraft_runtime::{Base, DataOptions, Text};
//!
//! # fn main() -> engraft_runtime::Result<()> {
//! let base = Base::open("../targets/cli/seedling.gguf")?;
//! let text = Text::of(&base.model)?;
//! let lines = br#"{"prompt": "dim the lamp", "completion": "{\"lamp\": 30}"}"#;
//! let origin = Origin::Memory { name: "rows".as_ref(), lines };
//! let data = load_from(origin, &text.tokenizer, &text.chat, &DataOptions::default())?;
//! let row = &data.examples[0];
//! assert!(row.trained_tokens() < row.ids.len(), "the loss is of the answer alone");
//! # Ok(())
//! # }
//! ```

pub mod batches;
pub mod formats;
pub mod jsonl;
pub mod masks;
pub mod passages;
pub mod replay;
pub mod source;

pub use batches::{Batch, Batches, Cursor};
pub use formats::{DataOptions, Format, OverLong, RowReader, Sample};
pub use replay::{Mixed, MixedCursor};
pub use source::{
    Origin, Part, TrainValid, load, load_from, load_parts, load_train_valid, samples_from, split, split_off,
};

use std::path::{Path, PathBuf};

use crate::model::usage::Prompting;

/// A row as the model sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// Token ids; at least 2.
    pub ids: Vec<u32>,
    /// `mask[i]`: token i is a target, predicted from the tokens before it; `mask[0]` is false.
    pub mask: Vec<bool>,
}

impl Example {
    /// Targets in the example.
    pub fn trained_tokens(&self) -> usize {
        self.mask.iter().filter(|m| **m).count()
    }

    /// Positions the model computes: one fewer than ids.
    pub fn rows(&self) -> usize {
        self.ids.len().saturating_sub(1)
    }
}

/// A row that was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1.
    pub line: usize,
    /// Why, without the row's text.
    pub reason: String,
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.reason)
    }
}

/// The rows of a file.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// The rows, in the file's order.
    pub examples: Vec<Example>,
    /// Rows that were left out; at most [`SKIPPED_NAMED_MAX`] are named.
    pub skipped: Vec<Skipped>,
    /// Rows that were left out, in all.
    pub skipped_count: usize,
    /// Rows that were cut at the length limit.
    pub truncated: usize,
    /// The format found.
    pub format: Format,
    /// The file.
    pub source: PathBuf,
    /// The line of each example in the file, from 1.
    pub lines: Vec<u32>,
    /// A hash of each example's whole row, before truncation: [`split`] uses it.
    pub keys: Vec<u64>,
    /// How all of them put their questions.
    pub prompting: Prompting,
}

/// Most skipped rows that are named; the rest are only counted.
pub const SKIPPED_NAMED_MAX: usize = 1000;

impl Dataset {
    /// A file without rows.
    pub(crate) fn empty(file: &Path, format: Format) -> Dataset {
        let (skipped, source) = (Vec::new(), file.to_owned());
        let (examples, lines, keys) = (Vec::new(), Vec::new(), Vec::new());
        let prompting = Prompting::Unknown;
        Dataset { examples, skipped, skipped_count: 0, truncated: 0, format, source, lines, keys, prompting }
    }

    /// Targets in all examples.
    pub fn trained_tokens(&self) -> usize {
        self.examples.iter().map(Example::trained_tokens).sum()
    }

    /// The longest example's positions.
    pub fn rows_max(&self) -> usize {
        self.examples.iter().map(Example::rows).max().unwrap_or(0)
    }

    /// Bytes of heap that the examples hold, counted from their buffers.
    pub fn heap_bytes(&self) -> usize {
        let one = |e: &Example| e.ids.capacity() * 4 + e.mask.capacity();
        self.examples.capacity() * size_of::<Example>() + self.examples.iter().map(one).sum::<usize>()
    }
}
