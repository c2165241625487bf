//! What a tuned model must not forget: texts, by their losses, and tasks, by their losses and answers.

use super::answers::{Metric, Question, questions};
use super::material::Rows;
use crate::data::masks::encode_sample;
use crate::data::{DataOptions, Example, Sample};
use crate::error::{Error, ErrorKind, Result};
use crate::gate::retention;
use crate::model::text::Text;
use crate::run::general::encoded;

/// One thing to retain.
#[derive(Clone, Debug)]
pub struct RetentionSet {
    /// What the verdict calls it.
    pub name: String,
    /// Its rows.
    pub rows: Vec<Example>,
    /// For a task: the rows as questions, and how to compare answers.
    pub task: Option<(Vec<Question>, Metric)>,
}

impl RetentionSet {
    /// What is built in ([`gate::retention`](crate::gate::retention)): a text, and answers to everyday questions. A
    /// model can keep the one and lose the other.
    ///
    /// # Errors
    /// Those of [`RetentionSet::of_text`] and [`RetentionSet::of_answers`].
    pub fn built_in(text: &Text, rows_max: usize) -> Result<Vec<RetentionSet>> {
        let written = RetentionSet::of_passages(retention::NAME, retention::TEXT, text, rows_max)?;
        let answers =
            RetentionSet::of_answers(retention::ANSWERS_NAME, &retention::answers(), text, rows_max)?;
        Ok(vec![written, answers])
    }

    /// Rows whose losses count alone.
    ///
    /// # Errors
    /// `BadData`, behind `what`, without any.
    fn plain(name: &str, rows: Vec<Example>, what: &str) -> Result<RetentionSet> {
        match rows.is_empty() {
            false => Ok(RetentionSet { name: name.to_string(), rows, task: None }),
            true => Err(Error::new(ErrorKind::BadData, format!("{what}: no token to predict"))),
        }
    }

    /// Questions with their answers, of which every token counts; what exceeds `rows_max` is cut.
    ///
    /// # Errors
    /// `BadData` if no answer has a token to predict.
    pub fn of_answers(
        name: &str,
        pairs: &[(String, String)],
        text: &Text,
        rows_max: usize,
    ) -> Result<RetentionSet> {
        let what = format!("retention answers {name}");
        let mut rows = Vec::new();
        for (prompt, completion) in pairs.iter().cloned() {
            let sample = Sample::Pair { prompt, completion, joint: "\n" };
            rows.extend(encoded(&what, sample, text, rows_max)?);
        }
        RetentionSet::plain(name, rows, &what)
    }

    /// A text in passages; each follows a line that starts with `%% `.
    ///
    /// # Errors
    /// Those of [`RetentionSet::of_text`].
    pub fn of_passages(name: &str, whole: &str, text: &Text, rows_max: usize) -> Result<RetentionSet> {
        let passages: Vec<&str> = retention::split(whole).iter().map(|passage| passage.text).collect();
        RetentionSet::of_text(name, &passages, text, rows_max)
    }

    /// A text: one row per passage, in which every token counts.
    ///
    /// # Errors
    /// `BadData` for a text without a token to predict.
    pub fn of_text(name: &str, passages: &[&str], text: &Text, rows_max: usize) -> Result<RetentionSet> {
        let plain = DataOptions::default();
        let what = format!("retention text {name}");
        let bad = |why: String| Error::new(ErrorKind::BadData, format!("{what}: {why}"));
        let mut rows = Vec::new();
        for passage in passages {
            let sample = Sample::Text((*passage).to_string());
            let row = encode_sample(&sample, &text.tokenizer, &text.chat, &plain).map_err(bad)?;
            for (ids, mask) in row.ids.chunks(rows_max + 1).zip(row.mask.chunks(rows_max + 1)) {
                let mut mask = mask.to_vec();
                mask[0] = false;
                if mask.iter().any(|m| *m) {
                    rows.push(Example { ids: ids.to_vec(), mask });
                }
            }
        }
        RetentionSet::plain(name, rows, &what)
    }

    /// Rows of a task, whose answers count if there is a metric.
    pub fn of_rows(name: &str, rows: &Rows, metric: Option<Metric>, text: &Text) -> RetentionSet {
        let task = metric.map(|metric| (questions(rows, text), metric));
        RetentionSet { name: name.to_string(), rows: rows.data.examples.clone(), task }
    }
}
