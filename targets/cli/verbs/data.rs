//! `engraft data`: shows how `train` would read rows, without training.

use std::path::Path;

use anyhow::Result;
use clap::{Args, Subcommand, value_parser};
use engraft_runtime::data::source::part_file;
use engraft_runtime::data::{self, Dataset, Example, Format, Part, load_train_valid};
use engraft_runtime::error::{Error, ErrorKind};
use engraft_runtime::model::text::Text;
use engraft_runtime::run::settings;

use super::Invocation;
use crate::json;
use crate::options::{self, DataOptions, ModelOptions, tell_rows};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Read the rows as training would, and show formats, tokens, and what is cut, skipped or held out
    #[command(after_help = "Example:\n  engraft data check -m MODEL.gguf --data rows")]
    Check(CheckOptions),
}

#[derive(Args, Debug)]
#[command(group(clap::ArgGroup::new("what").args(["data"]).required(true)))]
struct CheckOptions {
    #[command(flatten)]
    model: ModelOptions,

    /// Maximum tokens per row; longer rows are cut
    #[arg(short = 'c', long, visible_alias = "ctx-size", value_name = "N", default_value_t = settings::ROW_TOKENS as u32, value_parser = value_parser!(u32).range(2..=1 << 20))]
    max_seq_length: u32,

    /// Seed for the split
    #[arg(long, value_name = "N", default_value = "0", value_parser = options::parse::seed)]
    seed: u64,

    #[command(flatten)]
    data: DataOptions,
}

pub(crate) fn run(options: &Options, invocation: &Invocation) -> Result<()> {
    match &options.what {
        What::Check(check) => check.run(invocation),
    }
}

impl CheckOptions {
    fn run(&self, invocation: &Invocation) -> Result<()> {
        self.model.path()?;
        let path = self.data.required_path()?;
        let model = self.model.open()?;
        let text = Text::of(&model)?;
        let rows_max = (self.max_seq_length as usize).min(model.config().context_len);
        let reading = self.data.reading(rows_max, self.seed);
        let read = load_train_valid(path, &text.tokenizer, &text.chat, &reading)?;
        let test = part_file(path, Part::Test)?;
        let test = test.map(|file| data::load(&file, &text.tokenizer, &text.chat, &reading)).transpose()?;
        let mut parts = vec![part("train", &read.train, 0), part("valid", &read.valid, read.duplicates)];
        for held in [&read.train, &read.valid].into_iter().chain(&test) {
            // A part that was split off comes from a file that is reported already.
            if !(read.split_by_seed && std::ptr::eq(held, &read.valid)) {
                tell_rows(held, rows_max);
            }
        }
        parts.extend(test.as_ref().map(|test| part("test", test, 0)));
        for part in &parts {
            json::line(&describe(part))?;
        }
        if read.split_by_seed {
            let share = self.data.valid_fraction;
            json::line(&format!(
                "valid is split off with --seed {} and --valid-fraction {share}",
                self.seed
            ))?;
        }
        invocation.emit(&json::object! { parts: parts })?;
        match read.train.trained_tokens() {
            0 => Err(nothing_to_train(path).into()),
            _ => Ok(()),
        }
    }
}

fn nothing_to_train(path: &Path) -> Error {
    let message = format!(
        "{}: no row has a token to train on; raise --max-seq-length, or try --no-mask-prompt",
        path.display()
    );
    Error::new(ErrorKind::BadData, message)
}

fn part(name: &'static str, data: &Dataset, duplicates: usize) -> json::DataPart {
    let mut lengths: Vec<usize> = data.examples.iter().map(Example::rows).collect();
    lengths.sort_unstable();
    let at = |i: usize| lengths.get(i).copied().unwrap_or(0);
    json::DataPart {
        part: name,
        file: data.source.display().to_string(),
        format: format_name(data.format),
        rows: lengths.len(),
        tokens: lengths.iter().sum(),
        targets: data.trained_tokens(),
        shortest: at(0),
        median: at(lengths.len() / 2),
        longest: at(lengths.len().saturating_sub(1)),
        cut: data.truncated,
        skipped: data.skipped_count,
        duplicates,
    }
}

fn format_name(format: Format) -> &'static str {
    match format {
        Format::Messages => "messages",
        Format::PromptCompletion => "prompt and completion",
        Format::QuestionAnswer => "question and answer",
        Format::Text => "text",
    }
}

fn describe(p: &json::DataPart) -> String {
    let mut line = format!(
        "{:<5} {} ({}): {} rows of {} to {} tokens (median {}), {} in all, {} trained on",
        p.part, p.file, p.format, p.rows, p.shortest, p.longest, p.median, p.tokens, p.targets
    );
    for (count, what) in
        [(p.cut, "cut"), (p.skipped, "skipped"), (p.duplicates, "also among the training rows")]
    {
        if count > 0 {
            line += &format!("; {count} {what}");
        }
    }
    line
}
