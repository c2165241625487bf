//! The retention text that is compiled in: what an ordinary model should still do after it was trained
//! on something else. It was written for this project, in registers that private data seldom covers
//! all at once: instructions, facts, dialogue, letters, code, lists, stories, news, verse.
//!
//! It is small (about 3,000 words): enough to see a loss of a few hundredths of a nat per token, no
//! substitute for a retention text of the user's own kind.

use sha2::{Digest, Sha256};

pub use crate::data::passages::{Passage, split};
use crate::hex;

/// The compiled-in text: UTF-8 in passages, each behind a line `%% register: title`.
pub const TEXT: &str = include_str!("retention.txt");
/// What reports call the compiled-in text.
pub const NAME: &str = "built-in";

/// Answers to everyday questions, one a line, written for this project: `{"prompt", "completion"}`.
const ANSWERS: &str = include_str!("answers.jsonl");
/// What reports call them.
pub const ANSWERS_NAME: &str = "everyday answers";

/// The built-in questions with their answers.
pub fn answers() -> Vec<(String, String)> {
    #[derive(serde::Deserialize)]
    struct Row {
        prompt: String,
        completion: String,
    }
    let rows = ANSWERS.lines().filter_map(|line| serde_json::from_str::<Row>(line).ok());
    rows.map(|row| (row.prompt, row.completion)).collect()
}

/// The passages of the compiled-in text.
pub fn passages() -> Vec<Passage<'static>> {
    split(TEXT)
}

/// SHA-256 of the compiled-in text in hexadecimal: part of the settings that a verdict is bound to.
pub fn digest() -> String {
    hex::encode(&Sha256::digest([TEXT, ANSWERS].concat()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_answers_is_one() {
        let all = answers();
        assert_eq!((all.len(), ANSWERS.lines().count()), (80, 80));
        assert!(all.iter().all(|(prompt, answer)| !prompt.is_empty() && !answer.is_empty()));
    }

    #[test]
    fn the_text_is_what_it_should_be() {
        let all = passages();
        assert!((24..=40).contains(&all.len()), "{} passages", all.len());
        let words: usize = all.iter().map(|p| p.text.split_whitespace().count()).sum();
        assert!((2500..=5000).contains(&words), "{words} words");
        let registers: std::collections::BTreeSet<_> =
            all.iter().filter_map(|p| p.name.split_once(": ")).map(|(register, _)| register).collect();
        assert!(registers.len() >= 8, "{registers:?}");
        let names: std::collections::BTreeSet<_> = all.iter().map(|p| p.name).collect();
        assert_eq!(names.len(), all.len(), "each has a name of its own");
        assert!(!TEXT.contains('\r') && TEXT.ends_with('\n') && all.iter().all(|p| !p.text.contains("%%")));
        assert_eq!(digest().len(), 64);
    }

    #[test]
    fn texts_are_split_at_headings() {
        let passage = |name, text| Passage { name, text };
        assert_eq!(split("a\nb\n"), [passage("", "a\nb")]);
        assert_eq!(
            split("%% one\n\nx\n%% two\n%% three\r\ny %% z"),
            [passage("one", "x"), passage("three", "y %% z")]
        );
        assert!(split("").is_empty() && split("%% only\n \n").is_empty());
    }
}
