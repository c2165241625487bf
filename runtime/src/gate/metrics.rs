//! Metrics for answers that aren't numbers.

use std::collections::BTreeMap;

use serde_json::Value;

use super::number::Number;
use crate::error::{Error, ErrorKind, Result};

/// Whether two texts are equal once white space at both ends is gone and every run of it within is one
/// space. Case, punctuation and everything else count.
pub fn exact_match(output: &str, reference: &str) -> bool {
    output.split_whitespace().eq(reference.split_whitespace())
}

/// What stands for the first bytes of a character whose others are still to come.
const UNFINISHED: char = '\u{FFFD}';

/// Whether an output that begins so can still be an exact match.
pub fn begins_exact(begun: &str, reference: &str) -> bool {
    let begun = begun.trim_end_matches(UNFINISHED);
    let (mut found, mut expected) = (begun.split_whitespace().peekable(), reference.split_whitespace());
    while let Some(word) = found.next() {
        let Some(whole) = expected.next() else { return false };
        let may_go_on = found.peek().is_none() && !begun.ends_with(char::is_whitespace);
        if !(if may_go_on { whole.starts_with(word) } else { whole == word }) {
            return false;
        }
    }
    true
}

/// Whether an output that begins so can still be JSON, alone or in a Markdown fence.
pub fn begins_json(begun: &str) -> bool {
    let begun = begun.trim_end_matches(UNFINISHED).trim_start();
    let is_open = |e: serde_json::Error| e.is_eof();
    begun.starts_with('`') || serde_json::from_str::<Value>(begun).map_or_else(is_open, |_| true)
}

/// How far a JSON output is what it should be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JsonMatch {
    /// Whether the output is JSON at all.
    pub parsed: bool,
    /// Fields of reference and output together: leaves by their path. Fields that the output made up
    /// count too.
    pub fields: usize,
    /// Fields that are in both with the same value.
    pub equal: usize,
}

impl JsonMatch {
    /// Whether all is equal.
    pub fn all_equal(&self) -> bool {
        self.parsed && self.equal == self.fields
    }

    /// Share of equal fields, from 0 to 1.
    pub fn share(&self) -> f64 {
        if self.all_equal() { 1.0 } else { self.equal as f64 / self.fields.max(1) as f64 }
    }
}

/// Compares a JSON output with a reference, field by field. The output may stand in one Markdown fence
/// and have white space around it, but no other text: who reads JSON from a model reads all of it. Numbers
/// are equal by value (`1`, `1.0`, `1e0`), strings to the character, lists as wholes; the order of an
/// object's keys is free.
///
/// # Errors
/// `BadData` when the reference isn't JSON.
pub fn json_match(output: &str, reference: &str) -> Result<JsonMatch> {
    let wrong = |e| Error::new(ErrorKind::BadData, format!("the reference answer isn't JSON: {e}"));
    let reference: Value = serde_json::from_str(reference).map_err(wrong)?;
    let mut expected = BTreeMap::new();
    leaves("", &reference, &mut expected);
    let Ok(output) = serde_json::from_str::<Value>(unfenced(output)) else {
        return Ok(JsonMatch { parsed: false, fields: expected.len(), equal: 0 });
    };
    let mut found = BTreeMap::new();
    leaves("", &output, &mut found);
    let equal = |(path, value): &(&String, &String)| found.get(*path) == Some(*value);
    let equal = expected.iter().filter(equal).count();
    let made_up = found.keys().filter(|path| !expected.contains_key(*path)).count();
    Ok(JsonMatch { parsed: true, fields: expected.len() + made_up, equal })
}

/// The inside of a Markdown fence, or the text itself.
fn unfenced(text: &str) -> &str {
    let text = text.trim();
    let inside = text.strip_prefix("```").and_then(|t| t.strip_suffix("```"));
    inside.map_or(text, |t| t.strip_prefix("json").unwrap_or(t))
}

/// The leaves of a value by their path (keys in JSON's own quotes, so that no two paths coincide), each
/// in a canonical spelling. Depth is bounded by the parser's limit of 128.
fn leaves(path: &str, value: &Value, out: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (key, value) in fields {
                leaves(&format!("{path}/{}", Value::from(key.as_str())), value, out);
            }
        }
        other => {
            out.insert(path.to_string(), canonical(other));
        }
    }
}

fn canonical(value: &Value) -> String {
    match value {
        Value::Number(n) => Number::last_in(&n.to_string()).map_or_else(|| n.to_string(), |n| n.to_string()),
        Value::Array(items) => {
            format!("[{}]", items.iter().map(canonical).collect::<Vec<_>>().join(","))
        }
        Value::Object(fields) => {
            let one = |(key, value): (&String, &Value)| {
                format!("{}:{}", Value::from(key.as_str()), canonical(value))
            };
            let mut all: Vec<String> = fields.iter().map(one).collect();
            all.sort();
            format!("{{{}}}", all.join(","))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_is_all_that_is_forgiven() {
        assert!(exact_match("  light \n off ", "light off") && exact_match("", " "));
        assert!(!exact_match("Light off", "light off") && !exact_match("light off.", "light off"));
    }

    /// No beginning of a right answer, cut at any byte, counts as lost; wrong ones are lost early.
    #[test]
    fn what_can_still_be_right_goes_on() {
        let begun = |text: &str, to: usize| String::from_utf8_lossy(&text.as_bytes()[..to]).into_owned();
        let reference = "größer  als 7 €";
        for right in [reference, " größer als\n7 €  ", "größer als 7 €"] {
            assert!(exact_match(right, reference));
            assert!((0..=right.len()).all(|to| begins_exact(&begun(right, to), reference)), "{right}");
        }
        for wrong in ["gross", "größer a ls", "größer als 7 € und", "als"] {
            assert!(!begins_exact(wrong, reference), "{wrong}");
        }
        let reference = r#"{"a": -1.5e3, "b": [true, null, "\u00e4ü\\\""], "c": {}}"#;
        let fenced = format!("```json\n{reference}\n```");
        let compact = reference.replace(": ", ":");
        for right in
            [reference, &fenced, &compact, "\n {\"c\":{},\"b\":[true,null,\"äü\\\\\\\"\"],\"a\":-1500} "]
        {
            assert!(json_match(right, reference).unwrap().all_equal(), "{right}");
            assert!((0..=right.len()).all(|to| begins_json(&begun(right, to))), "{right}");
        }
        for wrong in ["I'm", "{a", "{} {", "{\"a\" 1", "[1,,"] {
            assert!(!begins_json(wrong), "{wrong}");
        }
    }

    #[test]
    fn json_is_compared_by_fields() {
        let of = |output: &str| {
            json_match(output, r#"{"a": 1, "b": {"c": "x", "d": [1, {"k": 2}]}, "e": {}}"#).unwrap()
        };
        let all = of("```json\n{\"b\":{\"d\":[1.0,{\"k\":2}],\"c\":\"x\"},\"a\":1e0,\"e\":{}}\n```");
        assert_eq!((all.fields, all.equal, all.all_equal(), all.share()), (4, 4, true, 1.0));
        let part = of(r#" {"a": 2, "b": {"c": "x"}, "z": null} "#);
        assert_eq!((part.fields, part.equal, part.share()), (5, 1, 0.2));
        for bad in ["", "{", "Here: {}", "{} {}", &"[".repeat(100_000)] {
            assert_eq!(of(bad), JsonMatch { parsed: false, fields: 4, equal: 0 });
        }
        assert!(!of("[]").all_equal() && !of("\"1\"").all_equal());
        assert!(
            json_match("5", "5.0").unwrap().all_equal() && !json_match("\"5\"", "5").unwrap().all_equal()
        );
        assert!(json_match("{}", "{}").unwrap().all_equal());
        assert_eq!(json_match("{}", "nothing").unwrap_err().kind(), ErrorKind::BadData);
    }
}
