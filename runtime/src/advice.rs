//! Advice after a refusal, as data. Each target words it in its callers' terms: a flag, a field, a keyword. The
//! `Display` text here names none of them.

use std::fmt;

use crate::bytes::mib;

/// What the caller can do about an error.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Advice {
    /// It fits if blocks keep only what the memory allows.
    KeepLess,
    /// Smaller batches fit.
    Batches {
        /// Sequences per batch.
        batch: usize,
        /// Most tokens per row; `None` to leave them as they are.
        tokens: Option<usize>,
        /// The refused batch and tokens.
        was: (usize, usize),
        /// Whether blocks must also keep what the memory allows.
        keep_less: bool,
    },
    /// A smaller adapter fits.
    SmallerAdapter {
        /// Its rank.
        rank: usize,
        /// Most tokens per row, with one row per batch; `None` if rows can stay as long as they are.
        tokens: Option<usize>,
        /// Whether blocks must also keep what the memory allows.
        keep_less: bool,
    },
    /// It fits without clipping and without accumulation: each block's gradients are then used at once.
    UpdateAtOnce,
    /// An adapter instead of every weight.
    AdapterInstead {
        /// Its rank.
        rank: usize,
        /// Bytes that takes.
        bytes: usize,
        /// Whether it fits.
        fits: bool,
        /// The fewest bytes full fine-tuning takes.
        full_bytes: usize,
    },
    /// No setting fits; the smallest takes this many bytes.
    NothingFits {
        /// Bytes.
        least: usize,
    },
    /// Fewer batches for EVA, or shorter rows sampled for replay.
    LessPreparation,
    /// A lower learning rate.
    LowerRate,
    /// A lower learning rate, or checkpoints more often.
    LowerRateOrCheckpoints,
    /// Exact activations; if that fails too, fetch the file again.
    ExactActivations,
    /// A lower rank.
    LowerRank,
    /// The adapter's own base, or using it on this one anyway.
    OwnBase,
    /// The file is an adapter: it goes beside its model.
    UseAsAdapter,
    /// Join all parts of a split model first.
    JoinParts,
    /// Reading a model into memory instead of mapping it, which takes its size.
    ReadInstead,
    /// Mapping a model instead of reading it.
    MapInstead,
    /// Fewer examples in the prompt, or more training rows.
    FewerExamplesOrMoreRows,
    /// Fewer examples in the prompt, or shorter rows.
    FewerExamplesOrShorterRows,
    /// Score only the answers: prompts after examples must be masked.
    MaskPrompts,
    /// More rows, another held-out share, or separate files.
    AnotherSplit,
    /// A shorter context.
    ShorterContext,
    /// A smaller model.
    SmallerModel,
    /// A longer context.
    LongerContext,
    /// Longer rows.
    LongerRows,
    /// Another storage type.
    AnotherType,
    /// Merging, another format, or the nearest LoRA of a given rank.
    WithoutMagnitudes,
    /// Another generation, by its number.
    AnotherGeneration,
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Advice::KeepLess => f.write_str("it fits if blocks keep only what the memory allows"),
            Advice::Batches { batch, tokens: None, was: (was, _), keep_less } => {
                write!(f, "{}a batch of {batch} fits (it was {was})", kept(keep_less))
            }
            Advice::Batches { batch, tokens: Some(tokens), was, keep_less } => write!(
                f,
                "{}a batch of {batch} with rows of {tokens} tokens fits (it was {} with {})",
                kept(keep_less),
                was.0,
                was.1
            ),
            Advice::SmallerAdapter { rank, tokens, keep_less } => {
                let length = tokens.map_or(String::new(), |tokens| format!(" of {tokens} tokens"));
                write!(f, "{}rank {rank} with one row{length} a batch fits", kept(keep_less))
            }
            Advice::UpdateAtOnce => f.write_str(
                "it fits without a largest gradient norm and without accumulation: each block's gradients are then \
                 used and forgotten at once",
            ),
            Advice::AdapterInstead { rank, bytes, fits, full_bytes } => {
                let verb = if *fits { "fits in" } else { "would take" };
                let (bytes, full) = (mib(*bytes), mib(*full_bytes));
                write!(f, "a LoRA of rank {rank} {verb} {bytes}; full fine-tuning takes at least {full}")
            }
            Advice::NothingFits { least } => {
                write!(f, "no setting of this model fits: rank 1 with rows of 16 tokens needs {}", mib(*least))
            }
            Advice::LessPreparation => {
                f.write_str("it fits with fewer batches for EVA, or shorter rows sampled for replay")
            }
            Advice::LowerRate => f.write_str("lower the learning rate"),
            Advice::LowerRateOrCheckpoints => {
                f.write_str("lower the learning rate, or write checkpoints more often")
            }
            Advice::ExactActivations => {
                f.write_str("try again with exact activations; if that fails too, fetch the file again")
            }
            Advice::LowerRank => f.write_str("lower the rank"),
            Advice::OwnBase => f.write_str(
                "use the GGUF file it was made for, make it again on this one, or use it on this base anyway, \
                 with no guarantee that the result makes sense",
            ),
            Advice::UseAsAdapter => f.write_str("use it as an adapter, together with its model"),
            Advice::JoinParts => f.write_str("join the parts with `llama-gguf-split --merge`"),
            Advice::ReadInstead => f.write_str("reading the model into memory instead of mapping it may help"),
            Advice::MapInstead => f.write_str("map the file instead of reading it"),
            Advice::FewerExamplesOrMoreRows => {
                f.write_str("put fewer examples in the prompt, or give more rows")
            }
            Advice::FewerExamplesOrShorterRows => {
                f.write_str("give it more memory, put fewer examples in the prompt, or use shorter rows")
            }
            Advice::MaskPrompts => f.write_str("score the answers only"),
            Advice::AnotherSplit => {
                f.write_str("give more rows, hold out another share, or give the parts as separate files")
            }
            Advice::ShorterContext => f.write_str("a shorter context takes less"),
            Advice::SmallerModel => f.write_str("a smaller model takes less"),
            Advice::LongerContext => f.write_str("raise the context size"),
            Advice::LongerRows => f.write_str("allow longer rows"),
            Advice::AnotherType => f.write_str("choose another type"),
            Advice::WithoutMagnitudes => f.write_str(
                "merge it into the model, export it in PEFT's format, or write the nearest LoRA of a rank, whose \
                 error is reported",
            ),
            Advice::AnotherGeneration => f.write_str("name another generation"),
        }
    }
}

fn kept(less: &bool) -> &'static str {
    if *less { "keeping what the memory allows, " } else { "" }
}
