//! Texts of many passages, each behind a heading.

/// A passage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passage<'a> {
    /// Register and title, or empty for what stands before any heading.
    pub name: &'a str,
    /// The text, without white space around it; never empty.
    pub text: &'a str,
}

/// The passages of a text: one behind each line that starts with `%% `. A text without such lines is one
/// passage. Empty passages are left out.
pub fn split(text: &str) -> Vec<Passage<'_>> {
    let (mut passages, mut name, mut start, mut at) = (Vec::new(), "", 0, 0);
    for line in text.split_inclusive('\n') {
        if let Some(heading) = line.strip_prefix("%% ") {
            passages.push(Passage { name, text: text[start..at].trim() });
            (name, start) = (heading.trim(), at + line.len());
        }
        at += line.len();
    }
    passages.push(Passage { name, text: text[start..].trim() });
    passages.retain(|p| !p.text.is_empty());
    passages
}
