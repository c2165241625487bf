//! Rows that are in training and held-out data both: a gate that sees one has nothing to say.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Sets hashes of normalized text apart from those of plain text.
const NEAR_DOMAIN: &[u8] = b"engraft near duplicate 1\0";

/// What a row is recognized by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowHash {
    /// Where the row is, for people: "train.jsonl:12".
    pub row: String,
    /// SHA-256 of the text as it is.
    pub exact: [u8; 32],
    /// SHA-256 of [`normalized`] text.
    pub near: [u8; 32],
}

impl RowHash {
    /// Hashes a row. Give a task's question alone (a held-out question is leaked by training on it with
    /// other words in the answer), and for running text the whole of it.
    pub fn new(row: impl Into<String>, text: &str) -> RowHash {
        let near = Sha256::new().chain_update(NEAR_DOMAIN).chain_update(normalized(text));
        RowHash { row: row.into(), exact: Sha256::digest(text).into(), near: near.finalize().into() }
    }
}

/// Lower case letters and digits with single spaces for all between them: case, punctuation and layout
/// are gone, while numbers stay, for the same question with other numbers is another question. A text
/// without letters and digits keeps its characters.
pub fn normalized(text: &str) -> String {
    let kept = |c: char| if c.is_alphanumeric() { c } else { ' ' };
    let words: String = text.chars().map(kept).flat_map(char::to_lowercase).collect();
    let words: Vec<&str> = words.split_whitespace().collect();
    match words.is_empty() {
        true => text.split_whitespace().collect::<Vec<_>>().join(" "),
        false => words.join(" "),
    }
}

/// A held-out row that training saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leak {
    /// The held-out row's name.
    pub held_out: String,
    /// The name of the first training row that equals it.
    pub train: String,
    /// Whether they are equal to the byte, not only after normalization.
    pub exact: bool,
}

/// The held-out rows that training rows equal, exactly or after normalization, in the held-out order.
pub fn leaks(train: &[RowHash], held_out: &[RowHash]) -> Vec<Leak> {
    let mut exact: HashMap<&[u8; 32], &RowHash> = HashMap::with_capacity(train.len());
    let mut near: HashMap<&[u8; 32], &RowHash> = HashMap::with_capacity(train.len());
    for row in train {
        exact.entry(&row.exact).or_insert(row);
        near.entry(&row.near).or_insert(row);
    }
    let found = |row: &RowHash| {
        let (train, is_exact) = match exact.get(&row.exact) {
            Some(train) => (train, true),
            None => (near.get(&row.near)?, false),
        };
        Some(Leak { held_out: row.row.clone(), train: train.row.clone(), exact: is_exact })
    };
    held_out.iter().filter_map(found).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(name: &str, texts: &[&str]) -> Vec<RowHash> {
        texts.iter().enumerate().map(|(i, t)| RowHash::new(format!("{name}:{}", i + 1), t)).collect()
    }

    #[test]
    fn equal_rows_are_named() {
        let train =
            rows("train", &["How many apples?", "Two plus 2?", "Ein Gruß", "!!!", "How many apples?"]);
        let held = rows(
            "test",
            &["how  many\tAPPLES", "Two plus 3?", "Two plus 2?", "ein gruß!", "???", "how manyapples", "!!!"],
        );
        let found: Vec<_> =
            leaks(&train, &held).into_iter().map(|l| (l.held_out, l.train, l.exact)).collect();
        let leak = |held: &str, train: &str, exact| (held.to_string(), train.to_string(), exact);
        let expected = [
            leak("test:1", "train:1", false),
            leak("test:3", "train:2", true),
            leak("test:4", "train:3", false),
            leak("test:7", "train:4", true),
        ];
        assert_eq!(found, expected);
        assert!(leaks(&[], &held).is_empty() && leaks(&train, &[]).is_empty());
    }
}
