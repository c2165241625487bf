//! Generated answers: what is asked, what an arm answers, and whether it is right.

use super::material::Rows;
use super::score::Subject;
use crate::data::{Example, Sample};
use crate::error::Result;
use crate::gate::metrics::{begins_exact, begins_json, exact_match, json_match};
use crate::gate::task::Task;
use crate::model::text::Text;
use crate::run::Observer;

/// Tokens of a running text shown as its prompt.
const TEXT_PROMPT: usize = 32;

/// How an answer is compared with the row's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// By the number that a task's answer ends with.
    Numeric(Task),
    /// Exact match, ignoring white space.
    Exact,
    /// As JSON, all fields equal.
    Json,
}

impl Metric {
    /// Its name, as settings and reports have it.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Numeric(task) => task.name(),
            Metric::Exact => "exact",
            Metric::Json => "json",
        }
    }

    /// Whether an answer is right; `None` if the row's own answer can't serve as a reference.
    pub fn is_correct(self, answer: &str, reference: &str) -> Option<bool> {
        match self {
            Metric::Numeric(task) => task.is_correct(answer, reference),
            Metric::Exact => Some(exact_match(answer, reference)),
            Metric::Json => json_match(answer, reference).ok().map(|m| m.all_equal()),
        }
    }

    /// Whether an answer that begins so can still be right. True where that isn't known.
    pub fn can_be_right(self, begun: &str, reference: &str) -> bool {
        match self {
            Metric::Numeric(_) => true,
            Metric::Exact => begins_exact(begun, reference),
            Metric::Json => begins_json(begun),
        }
    }
}

/// How to ask questions.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// How answers are compared with the rows' own; with `None`, only the sample rows are answered.
    pub metric: Option<Metric>,
    /// Most tokens per answer.
    pub tokens: usize,
    /// Rows whose answers are shown.
    pub samples: usize,
}

/// A row as a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// What is asked, for people.
    pub prompt: String,
    /// The row's own answer.
    pub reference: String,
    /// For a running text, where to cut its row (without examples): the prompt is what comes before.
    cut: Option<usize>,
}

impl Question {
    /// Whether it is a running text, which has no answer of its own.
    pub fn is_text(&self) -> bool {
        self.cut.is_some()
    }
}

/// What an arm answered.
#[derive(Clone, Debug, Default)]
pub struct Answered {
    /// Per row, if there is a metric.
    pub correct: Option<Vec<bool>>,
    /// Answers to the sample rows, and whether they are right.
    pub samples: Vec<(String, Option<bool>)>,
    /// Tokens generated.
    pub tokens: usize,
    /// Time.
    pub seconds: f64,
}

/// Rows as questions.
pub fn questions(rows: &Rows, text: &Text) -> Vec<Question> {
    let one = |(sample, example): (&Sample, &Example)| match sample {
        Sample::Text(_) => {
            let cut = TEXT_PROMPT.min(example.ids.len() / 2).max(1);
            let (prompt, reference) = example.ids.split_at(cut);
            let shown = &reference[..reference.len().min(2 * TEXT_PROMPT)];
            Question {
                prompt: text.tokenizer.decode(prompt),
                reference: text.tokenizer.decode(shown),
                cut: Some(cut),
            }
        }
        Sample::Pair { prompt, completion, .. } => {
            Question { prompt: prompt.clone(), reference: completion.clone(), cut: None }
        }
        Sample::Chat { messages, .. } => {
            let last = |role: &str| {
                let found = messages.iter().rfind(|m| m.role == role);
                found.map_or(String::new(), |m| m.content.clone())
            };
            Question { prompt: last("user"), reference: last("assistant"), cut: None }
        }
    };
    rows.samples.iter().zip(&rows.data.examples).map(one).collect()
}

/// Which of `n` rows are shown: `count` of them, evenly spread.
pub fn shown(n: usize, count: usize) -> Vec<usize> {
    let count = count.min(n);
    (0..count).map(|i| i * n / count).collect()
}

/// An arm's answers: to every question if there is a metric, else to the sample rows. `rows` are the questions
/// as the arm reads them; `free_bytes` is the memory available for answering.
///
/// # Errors
/// Those of [`Subject::answers`].
pub fn answer(
    subject: &Subject,
    questions: &[Question],
    rows: &[Example],
    (manner, text): (Manner, &Text),
    free_bytes: usize,
    observer: &mut dyn Observer,
) -> Result<Answered> {
    let shown = shown(questions.len(), manner.samples);
    let mut asked: Vec<usize> = match manner.metric {
        Some(_) => (0..questions.len()).collect(),
        None => shown.clone(),
    };
    // The longest first, so that none is left to end alone.
    asked.sort_by_key(|i| std::cmp::Reverse(rows[*i].trained_tokens()));
    if asked.is_empty() {
        return Ok(Answered::default());
    }
    let prompts: Vec<&[u32]> = asked.iter().map(|i| prompt(&rows[*i], questions[*i].cut)).collect();
    let limit = match manner.metric {
        Some(_) => manner.tokens,
        None => manner.tokens.min(2 * TEXT_PROMPT),
    };
    let is_end = |id: u32| text.tokenizer.is_end(id);
    // What is certainly wrong needs no end, except where people see it.
    let is_lost = |at: usize, answer: &[u32]| {
        let judged = manner.metric.filter(|_| !shown.contains(&asked[at]));
        judged
            .is_some_and(|m| !m.can_be_right(&text.tokenizer.decode(answer), &questions[asked[at]].reference))
    };
    let slots = subject.slots(&prompts, limit, free_bytes);
    let found = subject.answers(&prompts, (limit, slots), &is_end, &is_lost, observer)?;
    let texts: Vec<String> = found.answers.iter().map(|ids| text.tokenizer.decode(ids)).collect();
    let right =
        |at: usize| manner.metric.and_then(|m| m.is_correct(&texts[at], &questions[asked[at]].reference));
    let correct = manner.metric.map(|_| {
        let mut correct = vec![false; questions.len()];
        asked.iter().enumerate().for_each(|(at, question)| correct[*question] = right(at).unwrap_or(false));
        correct
    });
    let samples = shown.iter().filter_map(|i| {
        let at = asked.iter().position(|a| a == i)?;
        Some((texts[at].clone(), right(at)))
    });
    Ok(Answered { correct, samples: samples.collect(), tokens: found.tokens, seconds: found.seconds })
}

/// A row up to its last answer; for a running text, up to its cut.
fn prompt(row: &Example, cut: Option<usize>) -> &[u32] {
    let targets = row.mask.iter().rposition(|m| *m).map_or(row.ids.len(), |last| {
        row.mask[..last].iter().rposition(|m| !*m).map_or(0, |before| before + 1)
    });
    match cut {
        // Whatever precedes the row's own text isn't a target.
        Some(cut) => &row.ids[..(targets.max(1) + cut - 1).min(row.ids.len())],
        None => &row.ids[..targets.max(1)],
    }
}
