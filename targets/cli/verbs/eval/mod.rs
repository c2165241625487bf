//! `engraft eval`: the perplexity of a text, or the masked loss of held-out rows and the answers to them.

mod answers;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::{Args, value_parser};
use engraft_kernels::Kernels;
use engraft_runtime::adapter::Adapter;
use engraft_runtime::data::batches::in_order;
use engraft_runtime::data::source::part_file;
use engraft_runtime::data::{self, Dataset, Part, load_train_valid};
use engraft_runtime::error::Error;
use engraft_runtime::eval;
use engraft_runtime::generate::StackedAdapter;
use engraft_runtime::model::chat::Message;
use engraft_runtime::model::text::Text;
use engraft_runtime::model::tokenizer::Special;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::{Adapted, Precision};
use engraft_runtime::train::{Chain, Evaluated};

use self::answers::{AnswerOptions, Right};
use super::adapter::Stored;
use super::{Invocation, common};
use crate::json;
use crate::options::{self, AdapterOptions, ComputeOptions, DataOptions, ModelOptions, misuse, tell_rows};
use crate::units::show_digits;

/// Tokens per window, the default of llama-perplexity.
const TEXT_WINDOW: u32 = 512;
/// Maximum positions per row, the default of `train`.
const ROWS_MAX: u32 = 256;
/// Time between progress lines.
const TELL_EVERY: Duration = Duration::from_secs(2);

#[derive(Args, Debug)]
#[command(group(clap::ArgGroup::new("what").args(["perplexity", "data"]).required(true)))]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) model: ModelOptions,

    /// Measure perplexity on this text file like llama-perplexity, over windows of --ctx-size tokens
    #[arg(long, visible_alias = "file", short = 'f', value_name = "FILE", conflicts_with = "data")]
    perplexity: Option<PathBuf>,

    /// Tokens per window [default: 512, or the model's context], or maximum tokens per row [default: 256]
    #[arg(short, long, visible_alias = "max-seq-length", value_name = "N", value_parser = value_parser!(u32).range(2..=1 << 20))]
    pub(crate) ctx_size: Option<u32>,

    /// Seed for the split; use the one from training
    #[arg(long, value_name = "N", default_value = "0", value_parser = options::parse::seed)]
    pub(crate) seed: u64,

    #[command(flatten)]
    pub(crate) data: DataOptions,

    #[command(flatten)]
    answers: AnswerOptions,

    #[command(flatten)]
    pub(crate) adapters: AdapterOptions,

    #[command(flatten)]
    pub(crate) compute: ComputeOptions,
}

/// The data to measure on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Subject<'a> {
    /// A text file, in llama-perplexity's convention.
    Text(&'a Path),
    /// Rows, masked.
    Rows(&'a Path),
}

impl Options {
    /// The existing text or rows.
    ///
    /// # Errors
    /// [`engraft_runtime::ErrorKind::Misuse`] if neither is given, `Io` if the path doesn't exist.
    pub(crate) fn subject(&self) -> Result<Subject<'_>, Error> {
        match (&self.perplexity, self.data.path()?) {
            (Some(file), _) => options::stat_stream(file, "--perplexity").map(|_| Subject::Text(file)),
            (None, Some(rows)) => Ok(Subject::Rows(rows)),
            (None, None) => Err(misuse("nothing to measure; add --perplexity FILE or --data DIR")),
        }
    }
}

pub(crate) fn run(options: &Options, invocation: &Invocation) -> Result<()> {
    options.model.path()?;
    let subject = options.subject()?;
    options.adapters.files()?;
    let model = options.model.open()?;
    let stored = Stored::of(&model, &options.adapters)?;
    if !stored.few_shot.is_empty() && !options.data.masks_prompt() {
        let message =
            "--no-mask-prompt: few-shot examples from a store are never scored; leave this flag out";
        return Err(misuse(message).into());
    }
    if let Subject::Rows(data) = &subject {
        let named = options.adapters.files()?.into_iter().map(|adapter| adapter.path);
        let read: Vec<PathBuf> = std::iter::once(options.model.path()?.to_path_buf())
            .chain(named)
            .chain(stored.adapter.clone())
            .collect();
        options.answers.check(data, &read)?;
    }
    let kernels = options.compute.kernels()?;
    let adapter = common::adapters(&model, &kernels, &options.adapters, &stored)?;
    let used = Used { kernels: &kernels, adapter, precision: options.compute.precision };
    let (total, answers) = match subject {
        Subject::Text(_) if !stored.few_shot.is_empty() => {
            let message = "--store: its active generation holds few-shot examples, which don't work with \
                           --perplexity; use --data";
            return Err(misuse(message).into());
        }
        Subject::Text(file) => (score_text(options, invocation, &model, &used, file)?, None),
        Subject::Rows(path) => score_rows(options, invocation, &model, &used, stored.few_shot, path)?,
    };
    let nll = common::finite(total.loss_sum / total.targets as f64, "the loss")?;
    let (ppl, tokens) = (nll.exp(), total.targets);
    json::line(&format!(
        "loss {nll:.5} nats/token, perplexity {}, over {tokens} tokens",
        show_digits(ppl, 5)
    ))?;
    invocation.emit(&json::object! {
        /// Mean negative log likelihood of a scored token, in nats.
        nll: nll,
        /// `exp(nll)`.
        ppl: ppl,
        /// Scored tokens.
        tokens: tokens,
        /// `right` of `questions`; `null` without `--metric`.
        answers: answers,
    })
}

/// What computes.
struct Used<'a> {
    kernels: &'a Arc<Kernels>,
    adapter: Option<Arc<StackedAdapter>>,
    precision: Precision,
}

/// A chain for one sequence of at most `rows` positions.
fn chain(model: &Arc<ModelFile>, used: &Used<'_>, rows: usize) -> Chain {
    let rank = used.adapter.as_ref().map_or(0, |adapter| adapter.rank());
    eval::scoring_chain(model.clone(), used.kernels.clone(), used.precision, rank, rows)
}

/// Perplexity of a text, in llama-perplexity's convention.
fn score_text(
    options: &Options,
    invocation: &Invocation,
    model: &Arc<ModelFile>,
    used: &Used<'_>,
    file: &Path,
) -> Result<Evaluated> {
    let trained = model.config().context_len;
    let window = options.ctx_size.map_or(trained.min(TEXT_WINDOW as usize), |asked| asked as usize);
    if window > trained {
        return Err(
            misuse(format!("-c {window}: the model was trained on {trained} positions; lower it")).into()
        );
    }
    let (ids, bos) = encode_text(model, file)?;
    let mut chain = chain(model, used, window);
    let mut told = Instant::now();
    let progress = |done: usize, all: usize, so_far: Evaluated| {
        if told.elapsed() >= TELL_EVERY || done == all {
            told = Instant::now();
            eprintln!(
                "window {done}/{all}  perplexity {}",
                show_digits((so_far.loss_sum / so_far.targets as f64).exp(), 5)
            );
        }
        !invocation.is_cancelled()
    };
    let adapter = used.adapter.as_deref().map(|a| a as &dyn Adapted);
    let scored = eval::perplexity(&mut chain, adapter, &ids, window, bos, progress);
    Ok(scored.map_err(|e| e.at(file.display()))?)
}

/// The text's token ids, starting with BOS if the tokenizer adds one, and that BOS.
pub(super) fn encode_text(model: &ModelFile, file: &Path) -> Result<(Vec<u32>, Option<u32>)> {
    let tokenizer = Text::of(model)?.tokenizer;
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let ids = bos.into_iter().chain(tokenizer.encode(&common::read_text(file)?, Special::Plain)).collect();
    Ok((ids, bos))
}

/// Masked loss of held-out rows, and the answers to them if they are asked for.
fn score_rows(
    options: &Options,
    invocation: &Invocation,
    model: &Arc<ModelFile>,
    used: &Used<'_>,
    few_shot: Vec<Message>,
    path: &Path,
) -> Result<(Evaluated, Option<Right>)> {
    let trained = model.config().context_len;
    let rows_max = (options.ctx_size.unwrap_or(ROWS_MAX) as usize).min(trained);
    let HeldOut { data, reading, which, by_seed } =
        held_out(&options.data, options.seed, model, path, rows_max, few_shot)?;
    if data.rows_max() > trained {
        let message = format!(
            "the few-shot examples and a row have {} tokens together, but the model was trained on {trained}; \
             lower -c",
            data.rows_max()
        );
        return Err(misuse(message).into());
    }
    tell_rows(&data, rows_max);
    eprintln!("{}: {} rows, {which}", data.source.display(), data.examples.len());
    if by_seed {
        warn_of_seeds(&options.adapters, options.seed)?;
    }
    let mut chain = chain(model, used, data.rows_max());
    let adapter = used.adapter.as_deref().map(|a| a as &dyn Adapted);
    let mut total = Evaluated::default();
    for batch in in_order(&data.examples, 1) {
        if invocation.is_cancelled() {
            return Err(common::cancelled("stopped before all rows were scored").into());
        }
        let scored = chain.evaluate(adapter, &batch, |_, _| {});
        total.loss_sum += scored.loss_sum;
        total.targets += scored.targets;
    }
    drop(chain);
    let answers = options.answers.ask((model, used), (data, &reading), invocation)?;
    Ok((total, answers))
}

/// Warns of adapters that were trained with another seed, and so held out other rows.
fn warn_of_seeds(adapters: &AdapterOptions, seed: u64) -> Result<(), Error> {
    for file in adapters.files()? {
        let adapter = Adapter::load(&file.path)?;
        let theirs = adapter.meta.seed;
        // An adapter without a training step, such as an imported one, has seen no row.
        if adapter.meta.steps > 0 && theirs != seed {
            eprintln!(
                "warning: {} was trained with --seed {theirs}, so it may have seen these rows in training; use \
                 --seed {theirs}",
                file.path.display()
            );
        }
    }
    Ok(())
}

/// The rows to score.
pub(super) struct HeldOut {
    pub(super) data: Dataset,
    /// How they were read.
    reading: data::DataOptions,
    /// Which they are, for people.
    pub(super) which: String,
    /// Whether training with the same seed and share holds them out.
    by_seed: bool,
}

/// The rows to score: test.jsonl, else valid.jsonl, else the rows that training with the same seed and share
/// holds out, else all.
pub(super) fn held_out(
    options: &DataOptions,
    seed: u64,
    model: &ModelFile,
    path: &Path,
    rows_max: usize,
    few_shot: Vec<Message>,
) -> Result<HeldOut> {
    let text = Text::of(model)?;
    let reading = data::DataOptions { few_shot, ..options.reading(rows_max, seed) };
    for (part, which) in [(Part::Test, "the test rows"), (Part::Valid, "the validation rows")] {
        if let Some(file) = part_file(path, part)? {
            let data = data::load(&file, &text.tokenizer, &text.chat, &reading)?;
            return Ok(HeldOut { data, reading, which: which.into(), by_seed: false });
        }
    }
    let parts = load_train_valid(path, &text.tokenizer, &text.chat, &reading)?;
    if parts.valid.examples.is_empty() {
        let which = "all of them, none held out".into();
        return Ok(HeldOut { data: parts.train, reading, which, by_seed: false });
    }
    let share = options.valid_fraction;
    let which = format!("held out of the file by --seed {seed} and --valid-fraction {share}");
    Ok(HeldOut { data: parts.valid, reading, which, by_seed: true })
}
