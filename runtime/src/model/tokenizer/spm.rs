//! SentencePiece's BPE as llama.cpp runs it: starts from characters, merges the neighbours whose union scores
//! best, and uses bytes for characters without a token. Tokens hold plain blanks here, not U+2581.

use super::Sink;
use super::vocab::{NONE, Vocab, VocabIndex};
use super::word::{WORD_BYTES_MAX, Word};

pub(super) struct Spm {
    index: VocabIndex,
    scores: Vec<f32>,
    /// The `<0xHH>` token of each byte, or NONE.
    byte_ids: [u32; 256],
    unknown: u32,
    /// Longest token, in bytes: longer unions need no lookup.
    token_bytes_max: usize,
    /// Whether no token continues past a blank that follows another character. If so, no merge crosses such a
    /// place, and text can be cut there without changing its tokens.
    splits_at_blanks: bool,
}

impl Spm {
    /// `scores` are finite, one per token.
    pub(super) fn new(vocab: &Vocab, scores: &[f32], byte_ids: [u32; 256], unknown: Option<u32>) -> Self {
        let crosses = |text: &[u8]| text.windows(2).any(|w| w[0] != b' ' && w[1] == b' ');
        let text_ids = || vocab.ids().filter(|id| vocab.kind(*id).is_text());
        Spm {
            index: VocabIndex::new(vocab),
            // −0 and 0 are the same score; ordering by bits would separate them.
            scores: scores.iter().map(|s| s + 0.0).collect(),
            byte_ids,
            unknown: unknown.unwrap_or(NONE),
            token_bytes_max: text_ids().map(|id| vocab.bytes(id).len()).max().unwrap_or(0),
            splits_at_blanks: !text_ids().any(|id| crosses(vocab.bytes(id))),
        }
    }

    /// Encodes a run of ordinary text, any space prefix already put before it.
    pub(super) fn encode(&self, vocab: &Vocab, text: &str, sink: &mut Sink) {
        let bytes = text.as_bytes();
        let mut scratch = Word::default();
        let mut start = 0;
        while start < bytes.len() {
            let mut end = bytes.len().min(start + WORD_BYTES_MAX);
            if self.splits_at_blanks {
                let word = bytes[start..end].windows(2).position(|w| w[0] != b' ' && w[1] == b' ');
                end = word.map_or(end, |at| start + at + 1);
            }
            end = text.floor_char_boundary(end);
            self.encode_word(vocab, &text[start..end], start, &mut scratch, sink);
            start = end;
        }
    }

    fn encode_word(&self, vocab: &Vocab, word: &str, base: usize, scratch: &mut Word, sink: &mut Sink) {
        let chars = word.char_indices().map(|(start, c)| (NONE, start + c.len_utf8()));
        scratch.merge(chars, |_, range| {
            let text = Some(&word.as_bytes()[range]).filter(|text| text.len() <= self.token_bytes_max)?;
            let id = self.index.find(vocab, text)?;
            Some((priority(self.scores.get(id as usize).copied().unwrap_or(0.0)), id))
        });
        for (_, range) in scratch.symbols() {
            self.emit(vocab, &word[range.clone()], base + range.end, sink);
        }
    }

    /// One token for the symbol, or one for each of its bytes, or the unknown token.
    fn emit(&self, vocab: &Vocab, text: &str, end: usize, sink: &mut Sink) {
        if let Some(id) = self.index.find(vocab, text.as_bytes()) {
            return sink.push(id, end);
        }
        let start = end - text.len();
        for (i, &b) in text.as_bytes().iter().enumerate() {
            match self.byte_ids[usize::from(b)] {
                NONE if self.unknown != NONE => return sink.push(self.unknown, end),
                NONE => {}
                id => sink.push(id, start + i + 1),
            }
        }
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.index.heap_bytes() + self.scores.capacity() * 4
    }
}

/// A number that orders scores as [`f32::total_cmp`] does.
fn priority(score: f32) -> u32 {
    let bits = score.to_bits();
    if score.is_sign_negative() { !bits } else { bits | 1 << 31 }
}
