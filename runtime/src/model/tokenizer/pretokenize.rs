//! Cuts text into words; byte-level BPE merges only within a word.
//!
//! Each scanner implements the regular expression its model was trained with, quoted above it. Unlike a
//! backtracking engine, a scanner has no limit that long runs of blanks could exhaust (the tokenizers crate
//! then silently stops splitting). It allocates nothing and runs in linear time.

use std::sync::OnceLock;
use tokenizers::utils::SysRegex;

/// The pre-tokenizers that GGUF's `tokenizer.ggml.pre` may name here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pre {
    /// `gpt-2`.
    Gpt2,
    /// `smollm`: every digit alone, then `gpt-2` between digits.
    Smollm,
    /// `llama-bpe`, `llama3`, `llama-v3`: digits in groups of up to three.
    Llama3,
    /// `qwen2`: as Llama 3, every digit alone.
    Qwen2,
}

impl Pre {
    pub(super) fn from_name(name: &str) -> Option<Pre> {
        Some(match name {
            "gpt-2" => Pre::Gpt2,
            "smollm" => Pre::Smollm,
            "llama-bpe" | "llama3" | "llama-v3" => Pre::Llama3,
            "qwen2" | "deepseek-r1-qwen" => Pre::Qwen2,
            _ => return None,
        })
    }

    /// Calls `word` with each word's byte range, in order; together they cover the text.
    pub(super) fn split(self, text: &str, mut word: impl FnMut(std::ops::Range<usize>)) {
        if self != Pre::Smollm {
            return self.split_between(text, 0, &mut word);
        }
        let mut segment = 0;
        for (at, c) in text.char_indices().filter(|(_, c)| c.is_numeric()) {
            self.split_between(&text[segment..at], segment, &mut word);
            segment = at + c.len_utf8();
            word(at..segment);
        }
        self.split_between(&text[segment..], segment, &mut word);
    }

    fn split_between(self, text: &str, base: usize, word: &mut impl FnMut(std::ops::Range<usize>)) {
        let mut at = 0;
        while at < text.len() {
            let rest = &text[at..];
            let len = match self {
                Pre::Gpt2 | Pre::Smollm => gpt2_word(rest),
                Pre::Llama3 => llama3_word(rest, 3),
                Pre::Qwen2 => llama3_word(rest, 1),
            };
            word(base + at..base + at + len);
            at += len;
        }
    }
}

/// Length of the first match in non-empty `s` of
/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.
fn gpt2_word(s: &str) -> usize {
    for suffix in ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"] {
        if s.starts_with(suffix) {
            return suffix.len();
        }
    }
    let blank = usize::from(s.starts_with(' '));
    let rest = &s[blank..];
    match rest.chars().next() {
        Some(c) if is_letter(c) => blank + run(rest, is_letter),
        Some(c) if c.is_numeric() => blank + run(rest, char::is_numeric),
        Some(c) if !c.is_whitespace() => blank + run(rest, is_other),
        _ => blanks(s),
    }
}

/// Length of the first match in non-empty `s` of
/// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,D}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`.
fn llama3_word(s: &str, digits_max: usize) -> usize {
    if let Some(len) = contraction_any_case(s) {
        return len;
    }
    let mut chars = s.chars();
    let first = chars.next().unwrap_or(' ');
    if is_letter(first) {
        return run(s, is_letter);
    }
    if first.is_numeric() {
        return s.chars().take(digits_max).take_while(|c| c.is_numeric()).map(char::len_utf8).sum();
    }
    if !is_line_end(first) && chars.next().is_some_and(is_letter) {
        return first.len_utf8() + run(&s[first.len_utf8()..], is_letter);
    }
    let blank = usize::from(first == ' ');
    let others = run(&s[blank..], is_other);
    if others > 0 {
        let end = blank + others;
        return end + run(&s[end..], is_line_end);
    }
    let all = run(s, char::is_whitespace);
    match s[..all].rfind(is_line_end) {
        Some(last) => last + 1,
        None => blanks(s),
    }
}

/// `(?i:'s|'t|'re|'ve|'m|'ll|'d)`; the long s folds to s.
fn contraction_any_case(s: &str) -> Option<usize> {
    let mut chars = s.strip_prefix('\'')?.chars();
    let first = chars.next()?;
    match first.to_ascii_lowercase() {
        's' | 't' | 'm' | 'd' | 'ſ' => Some(1 + first.len_utf8()),
        'r' | 'v' if chars.next().is_some_and(|c| c.eq_ignore_ascii_case(&'e')) => Some(3),
        'l' if s[2..].starts_with(['l', 'L']) => Some(3),
        _ => None,
    }
}

/// `\s+(?!\S)|\s+`: all blanks at the end of the text; before a word, all but the last (which the word
/// may take), at least one.
fn blanks(s: &str) -> usize {
    let all = run(s, char::is_whitespace);
    let last = s[..all].chars().next_back().map_or(0, char::len_utf8);
    if all == s.len() || all == last { all } else { all - last }
}

/// Bytes of the longest prefix of characters of a class.
fn run(s: &str, class: impl Fn(char) -> bool) -> usize {
    s.find(|c| !class(c)).unwrap_or(s.len())
}

fn is_line_end(c: char) -> bool {
    c == '\r' || c == '\n'
}

/// `[^\s\p{L}\p{N}]`.
fn is_other(c: char) -> bool {
    !c.is_whitespace() && !c.is_numeric() && !is_letter(c)
}

/// `\p{L}`. Not `char::is_alphabetic`, which also accepts letter numbers and dependent vowel signs.
fn is_letter(c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_alphabetic();
    }
    static RANGES: OnceLock<Vec<(u32, u32)>> = OnceLock::new();
    let ranges = RANGES.get_or_init(letter_ranges);
    let after = ranges.partition_point(|&(first, _)| first <= c as u32);
    after > 0 && ranges[after - 1].1 >= c as u32
}

/// The ranges of `\p{L}` beyond ASCII (about 5 KiB), taken once from the tokenizers crate's engine so both
/// follow the same Unicode version.
fn letter_ranges() -> Vec<(u32, u32)> {
    // No letters are assigned, or planned, beyond plane 3.
    const END: u32 = 0x4_0000;
    const CHUNK: u32 = 0x1000;
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    let Ok(letters) = SysRegex::new(r"\p{L}+") else { return ranges };
    for start in (0x80..END).step_by(CHUNK as usize) {
        let chunk: String = (start..(start + CHUNK).min(END)).filter_map(char::from_u32).collect();
        for (from, to) in letters.find_iter(&chunk) {
            let mut hit = chunk[from..to].chars();
            let first = hit.next().map_or(0, |c| c as u32);
            let last = hit.next_back().map_or(first, |c| c as u32);
            match ranges.last_mut() {
                Some(before) if before.1 + 1 == first => before.1 = last,
                _ => ranges.push((first, last)),
            }
        }
    }
    ranges.shrink_to_fit();
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    fn random_text(rng: &mut Rng) -> String {
        const PARTS: [&str; 34] = [
            " ",
            " ",
            "  ",
            "\n",
            "\r",
            "\r\n",
            "\t",
            "\u{a0}",
            "\u{2003}",
            "'",
            "'s",
            "'S",
            "'LL",
            "'Re",
            "'ſ",
            "a",
            "Bc",
            "don",
            "é",
            "я",
            "ក",
            "ា",
            "்",
            "中",
            "ⅷ",
            "²",
            "7",
            "42",
            "٣",
            "!",
            "...",
            "🚀",
            "_",
            "\u{1F170}",
        ];
        let n = 1 + rng.below(14);
        (0..n).map(|_| PARTS[rng.below(PARTS.len() as u64) as usize]).collect()
    }

    fn words(pre: Pre, text: &str) -> Vec<(usize, usize)> {
        let mut words = Vec::new();
        pre.split(text, |r| words.push((r.start, r.end)));
        words
    }

    #[test]
    fn scanners_equal_their_regular_expressions() {
        let mut rng = Rng::new(11, 0);
        for (pre, pattern) in [(Pre::Gpt2, GPT2), (Pre::Llama3, LLAMA3), (Pre::Qwen2, QWEN2)] {
            let regex = SysRegex::new(pattern).unwrap();
            for _ in 0..20_000 {
                let text = random_text(&mut rng);
                let expected: Vec<_> = regex.find_iter(&text).collect();
                assert_eq!(words(pre, &text), expected, "{pre:?} {text:?}");
            }
        }
        // The control: the wrong expression must be told apart.
        let regex = SysRegex::new(LLAMA3).unwrap();
        let text = "1234 x";
        assert_ne!(words(Pre::Qwen2, text), regex.find_iter(text).collect::<Vec<_>>());
    }

    #[test]
    fn letters_equal_the_engine_for_every_character() {
        let regex = SysRegex::new(r"^\p{L}$").unwrap();
        for c in (0..=0x10FFFF).step_by(7).filter_map(char::from_u32) {
            let text = c.to_string();
            assert_eq!(is_letter(c), regex.find_iter(&text).next().is_some(), "{:04x}", c as u32);
        }
        assert!(!is_letter('ា') && 'ា'.is_alphabetic());
    }

    #[test]
    fn long_blanks_are_linear_and_covered() {
        let text = format!("{}x", " ".repeat(2_000_000));
        assert_eq!(words(Pre::Smollm, &text), [(0, 1_999_999), (1_999_999, 2_000_001)]);
    }
}
