//! Ordinary text: what an adapter must leave alone. Protected directions are measured on it, and training stays near the
//! base on it; no gate judges by it.

use crate::data::Example;
use crate::data::masks::encode_sample;
use crate::data::{DataOptions, Sample, passages};
use crate::error::{Error, ErrorKind, Result};
use crate::model::text::Text;

/// Longest row, in tokens.
pub const ROW_TOKENS: usize = 96;
/// What messages call it.
const WHAT: &str = "general text";
/// What the headings of answers begin with; the question follows.
const CHAT: &str = "chat: ";
/// The text that is compiled in: passages of many kinds, each behind a line `%% register: title`.
const TEXT: &str = include_str!("general.txt");

/// The built-in rows, each at most `rows_max` long: passages and answers in turns, since answers begin as only answers
/// do and are what training on answers changes first.
///
/// # Errors
/// `BadData` for a text that can't be encoded.
pub fn rows(text: &Text, rows_max: usize) -> Result<Vec<Example>> {
    let rows_max = rows_max.min(ROW_TOKENS);
    let (mut plain, mut chat) = (Vec::new(), Vec::new());
    for passage in passages::split(TEXT) {
        match passage.name.strip_prefix(CHAT) {
            None => {
                let row = encoded(WHAT, Sample::Text(passage.text.to_string()), text, rows_max)?;
                plain.extend(row.map(all_targets));
            }
            Some(prompt) => {
                let (prompt, completion) = (prompt.to_string(), passage.text.to_string());
                let sample = Sample::Pair { prompt, completion, joint: "\n" };
                chat.extend(encoded(WHAT, sample, text, rows_max)?);
            }
        }
    }
    let turns = |(i, row): (usize, Example)| {
        let answer = chat.get(i % chat.len().max(1)).cloned();
        std::iter::once(row).chain(answer)
    };
    Ok(plain.into_iter().enumerate().flat_map(turns).collect())
}

/// Rows in a group of which the last two, a passage and an answer of the built-in text, are set aside.
const GROUP: usize = 10;

/// Ordinary rows that no training sees: by them it is told what training forgets.
#[derive(Clone, Debug, PartialEq)]
pub struct Aside {
    /// What messages call them.
    pub name: String,
    /// The rows.
    pub rows: Vec<Example>,
}

impl Aside {
    /// Every `n`-th row, beginning with the first.
    #[must_use]
    pub fn thinned(&self, n: usize) -> Aside {
        Aside { name: self.name.clone(), rows: self.rows.iter().step_by(n).cloned().collect() }
    }
}

/// Splits general rows into those to train with and those set aside, a fifth: whole passages and answers apart, since a
/// model can keep the one and lose the other.
pub fn set_aside(rows: Vec<Example>) -> (Vec<Example>, Vec<Aside>) {
    let (mut kept, mut aside) = (Vec::new(), Vec::new());
    for (i, row) in rows.into_iter().enumerate() {
        let place = if i % GROUP < GROUP - 2 { &mut kept } else { &mut aside };
        place.push(row);
    }
    // Answers occur more than once.
    kept.retain(|row| !aside.contains(row));
    let is_plain = |row: &Example| row.mask.iter().skip(1).all(|target| *target);
    let (plain, answers): (Vec<_>, Vec<_>) = aside.into_iter().partition(is_plain);
    let sets = [("set aside: text", plain), ("set aside: answers", answers)];
    let sets = sets.into_iter().filter(|(_, rows)| !rows.is_empty());
    (kept, sets.map(|(name, rows)| Aside { name: name.to_string(), rows }).collect())
}

/// The first tokens of a sample; `None` if no target is among them.
///
/// # Errors
/// `BadData`, behind `what`, for a sample that can't be encoded.
pub(crate) fn encoded(what: &str, sample: Sample, text: &Text, rows_max: usize) -> Result<Option<Example>> {
    let bad = |why: String| Error::new(ErrorKind::BadData, format!("{what}: {why}"));
    let whole = encode_sample(&sample, &text.tokenizer, &text.chat, &DataOptions::default()).map_err(bad)?;
    let Example { mut ids, mut mask } = whole;
    ids.truncate(rows_max + 1);
    mask.truncate(rows_max + 1);
    let has_target = mask.iter().skip(1).any(|target| *target);
    Ok(has_target.then_some(Example { ids, mask }))
}

/// The row with every token a target: what it says doesn't matter, only where the model would differ.
pub fn all_targets(row: Example) -> Example {
    let mask = (0..row.ids.len()).map(|at| at > 0).collect();
    Example { mask, ..row }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_aside_is_nowhere_else() {
        // Passages, each followed by one of 23 answers.
        let row = |id: u32, first: bool| Example { ids: vec![id; 3], mask: vec![false, first, true] };
        let rows: Vec<Example> = (0..50).flat_map(|i| [row(100 + i, true), row(i % 23, false)]).collect();
        let (kept, aside) = set_aside(rows.clone());
        let [text, answers] = &aside[..] else { panic!("{aside:?}") };
        assert!(text.rows.iter().all(|row| row.ids[0] >= 100) && text.rows.len() == 10);
        assert!(answers.rows.iter().all(|row| row.ids[0] < 100) && answers.rows.len() == 10);
        let aside = [&text.rows[..], &answers.rows].concat();
        assert!(rows.iter().all(|row| kept.contains(row) != aside.contains(row)));
        assert!(kept.iter().filter(|row| row.ids[0] < 100).count() > 20);
        assert_eq!(text.thinned(4).rows, [0, 4, 8].map(|i| text.rows[i].clone()));
    }
}
