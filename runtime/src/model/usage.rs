//! How a model is meant to be used: as the rows put their questions that it was trained or judged on.

use serde::{Deserialize, Serialize};

use super::chat::Message;

/// Longest system message that is remembered.
const SYSTEM_BYTES_MAX: usize = 1 << 16;

/// How a question is put.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Prompting {
    /// Unknown, or not always in one way.
    #[default]
    Unknown,
    /// As the beginning of a text, with this behind it.
    Text(String),
    /// As a message in the model's chat template, behind this system message, if there is one.
    Chat(Option<String>),
}

/// How a question is put, and how its answer is drawn.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// How a question is put.
    pub prompting: Prompting,
    /// Whether answers were judged as the most likely tokens give them.
    pub greedy: bool,
}

impl Prompting {
    /// A chat that begins with these messages.
    pub fn chat(messages: &[Message]) -> Prompting {
        let system = messages.iter().take_while(|m| m.role == "system").map(|m| m.content.as_str());
        let system: Vec<&str> = system.collect();
        match system[..] {
            [system] if system.len() <= SYSTEM_BYTES_MAX => Prompting::Chat(Some(system.to_string())),
            _ => Prompting::Chat(None),
        }
    }

    /// What holds for both.
    #[must_use]
    pub fn and(self, other: &Prompting) -> Prompting {
        match (self, other) {
            (all, other) if all == *other => all,
            // Rows with several system messages, or some without, are a chat all the same.
            (Prompting::Chat(_), Prompting::Chat(_)) => Prompting::Chat(None),
            _ => Prompting::Unknown,
        }
    }
}

impl Usage {
    /// What holds for both; unknown for none. Nobody judged several adapters together.
    pub fn of_all<'a>(all: impl IntoIterator<Item = &'a Usage>) -> Usage {
        let all = all.into_iter().cloned();
        let both = |a: Usage, b: Usage| Usage {
            prompting: a.prompting.and(&b.prompting),
            greedy: a.greedy && b.greedy,
        };
        all.reduce(both).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_rows_share_is_how_they_are_put() {
        let chat = |system: Option<&str>| Prompting::Chat(system.map(str::to_string));
        let text = |joint: &str| Prompting::Text(joint.to_string());
        let shared = |all: &[Prompting]| all.iter().cloned().reduce(|a, b| a.and(&b)).expect("some");
        assert_eq!(shared(&[chat(Some("a")), chat(Some("a"))]), chat(Some("a")));
        assert_eq!(shared(&[chat(Some("a")), chat(Some("b")), chat(Some("a"))]), chat(None));
        assert_eq!(shared(&[text("\n"), text("\n")]), text("\n"));
        assert_eq!(shared(&[text("\n"), text("")]), Prompting::Unknown);
        assert_eq!(shared(&[text(""), chat(None)]), Prompting::Unknown);
        let usage = |prompting, greedy| Usage { prompting, greedy };
        let both = [usage(chat(None), true), usage(chat(None), false)];
        assert_eq!(Usage::of_all(&both), usage(chat(None), false));
        assert_eq!(Usage::of_all([]), Usage::default());
    }
}
