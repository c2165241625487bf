//! Tasks with numeric answers: what is asked, and what counts as the answer.
//!
//! An answer is looked for by these rules, in this order; the first that finds a number decides:
//!
//! 1. behind `####` (four or more);
//! 2. behind the words "answer is", in any case;
//! 3. inside LaTeX's `\boxed{}`;
//! 4. the last number of the text.
//!
//! Of several marks the last one with a number counts, for a solution may correct itself. Behind a mark
//! (1, 2) the rest of its sentence or line is read, and if that holds no number the next sentence or line
//! that isn't blank; in a box, what stands between its braces. There, the number behind the last `=`
//! counts if there is one, else the first: `x = 5`, and `5 apples of 8`. What a model goes on to ask
//! itself behind a line that starts with `Question:` is cut off first. [`super::number`] tells what is
//! read as a number, and how: exactly, without floats.

use serde_json::Value;
use strum::IntoStaticStr;

use super::number::{Found, Number, normalize, scan};
use crate::data::{RowReader, Sample};
use crate::error::{Error, ErrorKind};
use crate::model::chat::Message;

/// A task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum Task {
    /// GSM8K (Cobbe et al. 2021): grade school mathematics, answers behind `####`.
    Gsm8k,
    /// Orca-Math (Mitra et al. 2024): word problems with answers in prose.
    OrcaMath,
    /// SVAMP (Patel et al. 2021): one-step word problems with bare numbers as answers.
    Svamp,
}

/// A question with its worked answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Solved {
    /// The question.
    pub question: String,
    /// The answer, with the mark that the task's instruction asks for.
    pub answer: String,
}

impl Task {
    /// All of them.
    pub const ALL: [Task; 3] = [Task::Gsm8k, Task::OrcaMath, Task::Svamp];

    /// The name as `--task` takes it.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// The task of a name.
    ///
    /// # Errors
    /// `Misuse`, naming the known ones.
    pub fn from_name(name: &str) -> crate::Result<Task> {
        Task::ALL.into_iter().find(|task| task.name() == name).ok_or_else(|| {
            let known = Task::ALL.map(Task::name).join(", ");
            Error::new(ErrorKind::Misuse, format!("no task is named {name:?}; known are {known}"))
        })
    }

    /// What the system turn says: the same with and without examples, so that only the examples differ.
    pub fn instruction(self) -> &'static str {
        match self {
            Task::Gsm8k => {
                "Solve the math problem step by step. End with a line that holds #### and then the final answer as a number."
            }
            Task::OrcaMath => {
                "Solve the math problem step by step. End with the sentence: The answer is, followed by the final number."
            }
            Task::Svamp => "Solve the math problem. Answer with #### and then the final answer as a number.",
        }
    }

    /// The turns that ask a question, after `shots` as earlier turns of user and assistant: all but the
    /// last turn are the same for every question, so that their keys and values can be kept.
    pub fn chat(self, shots: &[Solved], question: &str) -> Vec<Message> {
        let mut turns = vec![Message::new("system", self.instruction())];
        for shot in shots {
            turns.push(Message::new("user", shot.question.trim()));
            turns.push(Message::new("assistant", shot.answer.trim()));
        }
        turns.push(Message::new("user", question.trim()));
        turns
    }

    /// A row to train on: the turns of [`Task::chat`] without shots, and the answer.
    pub fn taught(self, row: &Solved) -> Vec<Message> {
        let mut turns = self.chat(&[], &row.question);
        turns.push(Message::new("assistant", row.answer.trim()));
        turns
    }

    /// The same for models without a chat template: shots and question as `Question: …`, `Answer: …`,
    /// with a blank line between, up to the last `Answer:`. The completion starts with a space.
    pub fn plain(self, shots: &[Solved], question: &str) -> String {
        let mut text = format!("{}\n\n", self.instruction());
        for shot in shots {
            text += &format!("Question: {}\nAnswer: {}\n\n", shot.question.trim(), shot.answer.trim());
        }
        text + &format!("Question: {}\nAnswer:", question.trim())
    }

    /// Reads a row: `question` and `answer`, or for SVAMP also `Body`, `Question` and `Answer`. An answer
    /// that is a bare number gets the mark that the instruction asks for.
    ///
    /// # Errors
    /// `BadData` when a key is missing or the answer holds no number.
    pub fn row(self, row: &Value) -> crate::Result<Solved> {
        let text = |key: &str| match row.get(key) {
            Some(Value::String(text)) if !text.trim().is_empty() => Some(text.trim().to_string()),
            Some(Value::Number(number)) => Some(number.to_string()),
            _ => None,
        };
        let bad = |what: &str| Error::new(ErrorKind::BadData, format!("a row of {}: {what}", self.name()));
        let asked = || match (text("Body"), text("Question")) {
            // Some bodies lack the point that ends them.
            (Some(body), Some(question)) if body.ends_with(['.', '?', '!', ',']) => {
                Some(format!("{body} {question}"))
            }
            (Some(body), Some(question)) => Some(format!("{body}. {question}")),
            _ => None,
        };
        let question = text("question").or_else(asked).ok_or_else(|| bad("no question"))?;
        let answer = text("answer").or_else(|| text("Answer")).ok_or_else(|| bad("no answer"))?;
        let number = extract(&answer).ok_or_else(|| bad("its answer holds no number"))?;
        let is_bare = answer.chars().all(|c| c.is_ascii_digit() || "+-.,/$%".contains(c));
        let answer = match self {
            Task::Gsm8k | Task::Svamp if is_bare => format!("#### {number}"),
            Task::OrcaMath if is_bare => format!("The answer is {number}."),
            _ => answer,
        };
        Ok(Solved { question, answer })
    }

    /// What reads the task's rows into conversations to learn: [`Task::row`] and [`Task::taught`].
    pub fn reader(self) -> RowReader {
        fn read(task: Task, row: &Value) -> Result<Sample, String> {
            let solved = task.row(row).map_err(|e| e.message().to_string())?;
            Ok(Sample::Chat { messages: task.taught(&solved), tools: None })
        }
        match self {
            Task::Gsm8k => |row| read(Task::Gsm8k, row),
            Task::OrcaMath => |row| read(Task::OrcaMath, row),
            Task::Svamp => |row| read(Task::Svamp, row),
        }
    }

    /// Whether a completion gives the reference's number; `None` when the reference has none, which
    /// [`Task::row`] rules out.
    pub fn is_correct(self, completion: &str, reference: &str) -> Option<bool> {
        let expected = extract(reference)?;
        Some(extract(completion) == Some(expected))
    }
}

/// The answer of a completion by the rules of this module; `None` when it holds no number. Takes time
/// linear in the text's length.
pub fn extract(completion: &str) -> Option<Number> {
    let completion = completion.split("\nQuestion:").next().unwrap_or_default();
    let chars = normalize(completion);
    let marks = Marks::of(&chars);
    let numbers = scan(&chars);
    let reader = Reader { chars: &chars, ends: &marks.ends, numbers: &numbers };
    let behind = |places: &[usize]| places.iter().rev().find_map(|at| reader.behind(*at)).cloned();
    let boxed = || marks.boxes.iter().rev().find_map(|(start, end)| reader.within(*start, *end)).cloned();
    behind(&marks.hashes)
        .or_else(|| behind(&marks.answers))
        .or_else(boxed)
        .or_else(|| numbers.last().map(|f| f.value.clone()))
}

/// Places in a text, ascending.
#[derive(Default)]
struct Marks {
    /// Just behind each `####`.
    hashes: Vec<usize>,
    /// Just behind each "answer is".
    answers: Vec<usize>,
    /// What stands in each box: from its open brace's inside to its closing one.
    boxes: Vec<(usize, usize)>,
    /// Where sentences and lines end; the text's end is the last.
    ends: Vec<usize>,
}

impl Marks {
    fn of(chars: &[char]) -> Marks {
        let starts_with = |i: usize, word: &str| {
            word.chars()
                .enumerate()
                .all(|(k, c)| chars.get(i + k).is_some_and(|x| x.to_ascii_lowercase() == c))
        };
        let mut marks = Marks::default();
        // Open braces: the place inside, and whether it is a box's.
        let mut open: Vec<(usize, bool)> = Vec::new();
        for (i, c) in chars.iter().enumerate() {
            match c {
                '#' if i >= 3
                    && chars[i - 3..i].iter().all(|c| *c == '#')
                    && chars.get(i + 1) != Some(&'#') =>
                {
                    marks.hashes.push(i + 1);
                }
                'a' | 'A' if starts_with(i, "answer is") => {
                    let next = chars.get(i + 9).copied().unwrap_or(' ');
                    if !next.is_alphanumeric() && next != '\'' {
                        marks.answers.push(i + 9);
                    }
                }
                '{' => {
                    let word = &chars[i.saturating_sub(6)..i];
                    open.push((i + 1, word.iter().collect::<String>() == "\\boxed"));
                }
                '}' => {
                    if let Some((start, true)) = open.pop() {
                        marks.boxes.push((start, i));
                    }
                }
                '\n' => marks.ends.push(i),
                '.' | '!' | '?' if chars.get(i + 1).is_none_or(|c| c.is_whitespace()) => marks.ends.push(i),
                _ => {}
            }
        }
        marks.ends.push(chars.len());
        marks
    }
}

struct Reader<'a> {
    chars: &'a [char],
    ends: &'a [usize],
    numbers: &'a [Found],
}

impl<'a> Reader<'a> {
    /// The number of the sentence or line from `at`, or of the next one that isn't blank.
    fn behind(&self, at: usize) -> Option<&'a Number> {
        let first = self.ends.partition_point(|end| *end < at);
        let own_end = *self.ends.get(first)?;
        self.within(at, own_end).or_else(|| {
            let spans = self.ends[first..].windows(2).map(|w| (w[0] + 1, w[1]));
            let is_blank = |(start, end): &(usize, usize)| {
                start >= end || self.chars[*start..*end].iter().all(|c| c.is_whitespace())
            };
            // Eight are enough for any layout, and keep a text of marks and points from taking forever.
            let (start, end) = spans.take(8).find(|span| !is_blank(span))?;
            self.within(start, end)
        })
    }

    /// Of the numbers that start in a span, the one behind its last `=`, else the first.
    fn within(&self, start: usize, end: usize) -> Option<&'a Number> {
        let from = |place: usize| self.numbers.partition_point(|f| f.start < place);
        let inside = &self.numbers[from(start)..from(end).max(from(start))];
        let first = inside.first()?;
        let equals = self.chars[start..end].iter().rposition(|c| *c == '=').map(|p| start + p);
        let behind_equals = equals.and_then(|e| inside.iter().find(|f| f.start > e));
        Some(&behind_equals.unwrap_or(first).value)
    }
}

#[cfg(test)]
mod tests;
