//! Row formats: what each key means, and which format a file has.

use crate::model::chat::Message;
use serde_json::{Map, Value};

/// The format of a file's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `{"messages": [{"role", "content"}…], "tools": […]?}`.
    Messages,
    /// `{"prompt", "completion"}`.
    PromptCompletion,
    /// `{"question", "answer"}`.
    QuestionAnswer,
    /// `{"text"}`.
    Text,
}

impl Format {
    /// All formats; a row that fits several is read as the first.
    pub const ALL: [Format; 4] =
        [Format::Messages, Format::PromptCompletion, Format::QuestionAnswer, Format::Text];
}

/// What to do with rows beyond the length limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OverLong {
    /// Cut the end off.
    Truncate,
    /// Fail, naming the row.
    Refuse,
}

/// A custom row reader; the error says what is wrong, without quoting the row.
pub type RowReader = fn(&Value) -> Result<Sample, String>;

/// How data is read.
#[derive(Clone, Debug)]
pub struct DataOptions {
    /// Reads each row into a conversation, instead of using the keys below.
    pub reader: Option<RowReader>,
    /// Key of running text.
    pub text_key: String,
    /// Key of a prompt.
    pub prompt_key: String,
    /// Key of its completion.
    pub completion_key: String,
    /// Key of a conversation.
    pub messages_key: String,
    /// Key of a question.
    pub question_key: String,
    /// Key of its answer.
    pub answer_key: String,
    /// Take the loss on answers only, instead of on every token. Running text always counts in full.
    pub mask_prompt: bool,
    /// Join prompt and completion as they are, even for a model with a chat template.
    pub raw: bool,
    /// Most positions per row. A row keeps one more id, since its last is only predicted.
    pub max_seq_length: usize,
    /// What to do with longer rows.
    pub over_long: OverLong,
    /// Share of a single file held out for validation, in 0..1.
    pub valid_fraction: f64,
    /// Seed of that split.
    pub split_seed: u64,
    /// Messages inserted before every conversation, after its system message. They are never targets, and don't
    /// count toward the length limit or the split.
    pub few_shot: Vec<Message>,
}

impl Default for DataOptions {
    fn default() -> Self {
        DataOptions {
            reader: None,
            text_key: "text".into(),
            prompt_key: "prompt".into(),
            completion_key: "completion".into(),
            messages_key: "messages".into(),
            question_key: "question".into(),
            answer_key: "answer".into(),
            mask_prompt: true,
            raw: false,
            max_seq_length: 512,
            over_long: OverLong::Truncate,
            valid_fraction: 0.1,
            split_seed: 0,
            few_shot: Vec::new(),
        }
    }
}

impl DataOptions {
    /// The keys that a format needs.
    pub fn keys(&self, format: Format) -> Vec<&str> {
        match format {
            Format::Messages => vec![&self.messages_key],
            Format::PromptCompletion => vec![&self.prompt_key, &self.completion_key],
            Format::QuestionAnswer => vec![&self.question_key, &self.answer_key],
            Format::Text => vec![&self.text_key],
        }
    }

    /// Reads a row in this format, or with the custom reader.
    ///
    /// The error says what is wrong, without quoting the row.
    pub fn sample(&self, row: &Value, format: Format) -> Result<Sample, String> {
        self.reader.map_or_else(|| Sample::parse(row, format, self), |read| read(row))
    }

    /// The format whose keys a row has.
    pub fn detect(&self, row: &Value) -> Option<Format> {
        let row = row.as_object()?;
        Format::ALL.into_iter().find(|format| self.keys(*format).iter().all(|key| row.contains_key(*key)))
    }
}

/// A row's content.
#[derive(Clone, Debug, PartialEq)]
pub enum Sample {
    /// Running text.
    Text(String),
    /// A prompt and its completion; also a question and its answer.
    Pair {
        /// The prompt.
        prompt: String,
        /// The completion.
        completion: String,
        /// The separator when they are joined without a template.
        joint: &'static str,
    },
    /// A conversation.
    Chat {
        /// The turns.
        messages: Vec<Message>,
        /// The tools' description, if there is one.
        tools: Option<Value>,
    },
}

impl Sample {
    /// Reads a row of a known format, ignoring other keys. The error says what is wrong, without quoting the
    /// row.
    pub fn parse(row: &Value, format: Format, options: &DataOptions) -> Result<Sample, String> {
        let row = row.as_object().ok_or("not a JSON object")?;
        Ok(match format {
            Format::Text => Sample::Text(text_of(row, &options.text_key)?),
            Format::PromptCompletion => Sample::Pair {
                prompt: text_of(row, &options.prompt_key)?,
                completion: text_of(row, &options.completion_key)?,
                joint: "",
            },
            Format::QuestionAnswer => Sample::Pair {
                prompt: text_of(row, &options.question_key)?,
                completion: text_of(row, &options.answer_key)?,
                joint: "\n",
            },
            Format::Messages => {
                Sample::Chat { messages: messages_of(row, &options.messages_key)?, tools: tools_of(row)? }
            }
        })
    }
}

fn text_of(row: &Map<String, Value>, key: &str) -> Result<String, String> {
    match row.get(key) {
        None => Err(format!("no key \"{key}\"")),
        Some(Value::String(text)) if text.trim().is_empty() => Err(format!("\"{key}\" is empty")),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(format!("\"{key}\" is not a string")),
    }
}

fn messages_of(row: &Map<String, Value>, key: &str) -> Result<Vec<Message>, String> {
    let list = row.get(key).ok_or_else(|| format!("no key \"{key}\""))?;
    let list = list.as_array().ok_or_else(|| format!("\"{key}\" is not a list"))?;
    let mut messages = Vec::with_capacity(list.len());
    for (i, entry) in list.iter().enumerate() {
        let text = |field: &str| {
            let value = entry.get(field).ok_or_else(|| format!("message {i} has no \"{field}\""))?;
            value
                .as_str()
                .map(str::to_owned)
                .ok_or_else(|| format!("message {i}: \"{field}\" is not a string"))
        };
        messages.push(Message { role: text("role")?, content: text("content")? });
    }
    let answered = messages.iter().any(|m| m.role == "assistant" && !m.content.trim().is_empty());
    if answered { Ok(messages) } else { Err(format!("\"{key}\" holds no assistant message with content")) }
}

fn tools_of(row: &Map<String, Value>) -> Result<Option<Value>, String> {
    match row.get("tools") {
        None | Some(Value::Null) => Ok(None),
        Some(tools @ Value::Array(_)) => Ok(Some(tools.clone())),
        Some(_) => Err("\"tools\" is not a list".into()),
    }
}
