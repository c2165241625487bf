//! Answers to held-out questions, judged as the gate judges them.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use clap::{Args, value_parser};
use engraft_runtime::compare::SCORING_BYTES;
use engraft_runtime::compare::answers::{Manner, Metric, answer, questions};
use engraft_runtime::compare::material::Rows;
use engraft_runtime::compare::score::Subject;
use engraft_runtime::data::source::part_file;
use engraft_runtime::data::{DataOptions as Reading, Dataset, Part};
use engraft_runtime::error::Error;
use engraft_runtime::model::text::Text;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::plan::room;
use engraft_runtime::run::settings;
use engraft_runtime::storage::{Disk, commit};
use serde::Serialize;

use super::Used;
use crate::json;
use crate::options::{misuse, parse, stat};
use crate::verbs::Invocation;
use crate::verbs::common::output_file;
use crate::verbs::compare::Screen;

/// How answers are judged.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Answers")]
pub(crate) struct AnswerOptions {
    /// Also let the model answer the rows, and count the right answers
    #[arg(long, requires = "data", value_parser = parse::metric())]
    metric: Option<Metric>,

    /// Write every answer, beside the row's own, to a file of JSON lines
    #[arg(long, value_name = "FILE.jsonl", requires = "metric")]
    answers: Option<PathBuf>,

    /// Maximum tokens per answer
    #[arg(long, value_name = "N", default_value_t = settings::ANSWER_TOKENS as u32, value_parser = value_parser!(u32).range(1..=1 << 16))]
    answer_tokens: u32,
}

/// How many answers are right.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Right {
    /// Right answers.
    right: usize,
    /// Questions.
    questions: usize,
}

/// A line of the file of answers.
#[derive(Serialize)]
struct Line<'a> {
    prompt: &'a str,
    answer: &'a str,
    expected: &'a str,
    right: bool,
}

impl AnswerOptions {
    /// Refuses to write answers over what this command reads, before it computes anything.
    ///
    /// # Errors
    /// `Misuse`; `Io` if there is no such folder.
    pub(super) fn check(&self, data: &Path, others: &[PathBuf]) -> Result<()> {
        let Some(file) = &self.answers else { return Ok(()) };
        let mut inputs = vec![data.to_path_buf()];
        for part in [Part::Train, Part::Valid, Part::Test] {
            inputs.extend(part_file(data, part)?);
        }
        let all = inputs.iter().chain(others).map(PathBuf::as_path);
        let (folder, _) = output_file(file, "--answers", all)?;
        if !folder.as_os_str().is_empty() {
            stat(&folder, "--answers")?;
        }
        Ok(())
    }

    /// Lets the model answer rows that were read so, and prints how many answers are right.
    ///
    /// # Errors
    /// `Misuse` for rows without answers; `DoesNotFit`; `Cancelled`; `Io`.
    pub(super) fn ask(
        &self,
        (model, used): (&Arc<ModelFile>, &Used<'_>),
        (data, reading): (Dataset, &Reading),
        invocation: &Invocation,
    ) -> Result<Option<Right>> {
        if self.metric.is_none() {
            return Ok(None);
        }
        let text = Text::of(model)?;
        let source = data.source.clone();
        let rows = Rows::of(data, reading)?;
        let questions = questions(&rows, &text);
        if questions.iter().any(|question| question.is_text()) {
            let message = format!(
                "--metric: {}: running text has no answers to judge; give rows with prompt and completion",
                source.display()
            );
            return Err(misuse(message).into());
        }
        // Whoever wants to read the answers wants them whole.
        let samples = if self.answers.is_some() { questions.len() } else { 0 };
        let manner = Manner { metric: self.metric, tokens: self.answer_tokens as usize, samples };
        let subject = Subject {
            weights: model.clone().into(),
            adapter: used.adapter.clone(),
            kernels: used.kernels.clone(),
            precision: used.precision,
        };
        let room = room::here(used.kernels.threads()).map_or(SCORING_BYTES, |room| room.bytes);
        let free = room.min(SCORING_BYTES) as usize;
        let mut screen = Screen::new(invocation.cancel.clone(), None);
        let examples = &rows.data.examples;
        let found = answer(&subject, &questions, examples, (manner, &text), free, &mut screen)?;
        let correct = found.correct.unwrap_or_default();
        let right = Right { right: correct.iter().filter(|c| **c).count(), questions: correct.len() };
        let share = 100.0 * right.right as f64 / right.questions.max(1) as f64;
        json::line(&format!("{} of {} answers right, {share:.1} %", right.right, right.questions))?;
        if let Some(file) = &self.answers {
            let lines = questions.iter().zip(&found.samples).map(|(question, (answer, right))| Line {
                prompt: &question.prompt,
                answer,
                expected: &question.reference,
                right: right.unwrap_or(false),
            });
            write(file, lines)?;
            eprintln!("answers: {}", file.display());
        }
        Ok(Some(right))
    }
}

/// Writes lines of JSON into a file, whole or not at all.
fn write<'a>(file: &Path, lines: impl Iterator<Item = Line<'a>>) -> Result<()> {
    let mut text = Vec::new();
    for line in lines {
        serde_json::to_writer(&mut text, &line)?;
        text.write_all(b"\n")?;
    }
    let (folder, name) = output_file(file, "--answers", [])?;
    commit(&Disk, &folder, &name, |out| {
        out.write_all(&text).map_err(|e| Error::io(format!("--answers: writing {}", file.display()), e))
    })?;
    Ok(())
}
