//! Ordinary text: what an adapter must leave alone. Protected directions are measured on it, and training stays near the
//! base on it; no gate judges by it.

use crate::data::Example;
use crate::data::masks::encode_sample;
use crate::data::{DataOptions, Sample};
use crate::error::{Error, ErrorKind, Result};
use crate::gate::retention;
use crate::model::text::Text;

/// Longest row, in tokens.
pub const ROW_TOKENS: usize = 96;
/// The text that is compiled in: passages of many kinds, each behind a line `%% register: title`.
const TEXT: &str = include_str!("general.txt");

/// The built-in rows, each at most `rows_max` long.
///
/// # Errors
/// `BadData` if no row is left.
pub fn rows(text: &Text, rows_max: usize) -> Result<Vec<Example>> {
    let rows_max = rows_max.min(ROW_TOKENS);
    let plain = DataOptions::default();
    let mut rows = Vec::new();
    for passage in retention::split(TEXT) {
        let sample = Sample::Text(passage.text.to_string());
        let bad = |why: String| Error::new(ErrorKind::BadData, format!("general text: {why}"));
        let row = encode_sample(&sample, &text.tokenizer, &text.chat, &plain).map_err(bad)?;
        let pieces = row.ids.chunks(rows_max + 1).filter(|ids| ids.len() > 1);
        rows.extend(
            pieces.map(|ids| all_targets(Example { ids: ids.to_vec(), mask: vec![true; ids.len()] })),
        );
    }
    match rows.is_empty() {
        false => Ok(rows),
        true => Err(Error::new(ErrorKind::BadData, "the general text has no row")),
    }
}

/// The row with every token a target: what it says doesn't matter, only where the model would differ.
pub fn all_targets(row: Example) -> Example {
    let mask = (0..row.ids.len()).map(|at| at > 0).collect();
    Example { mask, ..row }
}
