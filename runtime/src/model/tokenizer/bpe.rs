//! Byte-level byte pair encoding (GPT-2's): merges by rank within each word.

use super::Sink;
use super::pretokenize::Pre;
use super::vocab::{NONE, Vocab, VocabIndex, table_slots};
use super::word::{WORD_BYTES_MAX, Word};
use crate::error::{Error, ErrorKind, Result};
use crate::model::gguf::quote;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

/// (left, right) become `result`; lower ranks first.
#[derive(Clone, Copy)]
struct Merge {
    left: u32,
    right: u32,
    rank: u32,
    result: u32,
}

const NO_MERGE: Merge = Merge { left: NONE, right: NONE, rank: NONE, result: NONE };

/// Bytes of heap that n merges take.
pub(super) fn merges_heap_bytes(n: usize) -> usize {
    table_slots(n) * size_of::<Merge>()
}

pub(super) struct Bpe {
    pre: Pre,
    /// Open addressing by (left, right).
    merges: Vec<Merge>,
    hasher: RandomState,
    /// The token of each single byte, or NONE.
    byte_ids: [u32; 256],
    /// For vocabularies, such as Llama 3's, where a word that is a token skips the merges.
    whole_words: Option<VocabIndex>,
}

impl Bpe {
    /// The merges are lines "left right" in GPT-2's byte alphabet, in order of rank.
    pub(super) fn new(vocab: &Vocab, pre: Pre, merges: &[&str]) -> Result<Self> {
        let index = VocabIndex::new(vocab);
        let mut byte_ids = [NONE; 256];
        for b in 0..=255u8 {
            byte_ids[usize::from(b)] = index.find(vocab, &[b]).unwrap_or(NONE);
        }
        let table = vec![NO_MERGE; table_slots(merges.len())];
        let mut bpe = Bpe { pre, merges: table, hasher: RandomState::new(), byte_ids, whole_words: None };
        let alphabet = ByteAlphabet::new();
        let (mut left, mut right) = (Vec::new(), Vec::new());
        for (rank, line) in merges.iter().enumerate() {
            let bad = || {
                Error::new(
                    ErrorKind::Corrupt,
                    format!("tokenizer.ggml.merges[{rank}] is not a merge of tokens: {}", quote(line)),
                )
            };
            let (l, r) = split_merge(line).ok_or_else(bad)?;
            alphabet.decode(l, &mut left);
            alphabet.decode(r, &mut right);
            let left_id = index.find(vocab, &left).ok_or_else(bad)?;
            let right_id = index.find(vocab, &right).ok_or_else(bad)?;
            left.extend_from_slice(&right);
            let result = index.find(vocab, &left).ok_or_else(bad)?;
            let slot = bpe.slot(left_id, right_id);
            if bpe.merges[slot].left == NONE {
                bpe.merges[slot] = Merge { left: left_id, right: right_id, rank: rank as u32, result };
            }
        }
        if pre == Pre::Llama3 {
            bpe.whole_words = Some(index);
        }
        Ok(bpe)
    }

    fn slot(&self, left: u32, right: u32) -> usize {
        let mask = self.merges.len() - 1;
        let mut slot = self.hasher.hash_one((u64::from(left) << 32) | u64::from(right)) as usize & mask;
        loop {
            let held = &self.merges[slot];
            if held.left == NONE || (held.left == left && held.right == right) {
                return slot;
            }
            slot = (slot + 1) & mask;
        }
    }

    /// Encodes a span of ordinary text.
    pub(super) fn encode(&self, vocab: &Vocab, text: &str, sink: &mut Sink) {
        let mut scratch = Word::default();
        self.pre.split(text, |word| {
            let mut start = word.start;
            while start < word.end {
                let end = text.floor_char_boundary(word.end.min(start + WORD_BYTES_MAX));
                self.encode_word(vocab, &text.as_bytes()[start..end], start, &mut scratch, sink);
                start = end;
            }
        });
    }

    fn encode_word(&self, vocab: &Vocab, word: &[u8], base: usize, scratch: &mut Word, sink: &mut Sink) {
        if let Some(id) = self.whole_words.as_ref().and_then(|index| index.find(vocab, word)) {
            return sink.push(id, base + word.len());
        }
        let bytes = word.iter().map(|b| self.byte_ids[usize::from(*b)]).zip(1..);
        scratch.merge(bytes, |[left, right], _| {
            let merge = self.merges[self.slot(left, right)];
            (merge.left != NONE).then_some((!merge.rank, merge.result))
        });
        // A byte without a token is dropped, as in the tokenizers crate and llama.cpp.
        for (id, range) in scratch.symbols().filter(|(id, _)| *id != NONE) {
            sink.push(id, base + range.end);
        }
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.merges.capacity() * size_of::<Merge>()
            + self.whole_words.as_ref().map_or(0, VocabIndex::heap_bytes)
    }
}

/// Splits "left right" at the first blank after the first character.
fn split_merge(line: &str) -> Option<(&str, &str)> {
    let first = line.chars().next()?.len_utf8();
    let at = first + line[first..].find(' ')?;
    let right = &line[at + 1..];
    (!right.is_empty()).then_some((&line[..at], right))
}

/// GPT-2's printable alphabet for bytes: printable Latin-1 stands for itself, the other bytes for the
/// characters from U+0100 on, in order.
pub(super) struct ByteAlphabet {
    /// The byte of characters U+0000 to U+01FF; 256 for none.
    bytes: [u16; 512],
}

impl ByteAlphabet {
    pub(super) fn new() -> Self {
        let mut bytes = [256u16; 512];
        let mut next = 256;
        for b in 0..=255u16 {
            let printable = matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
            let c = if printable { usize::from(b) } else { next };
            next += usize::from(!printable);
            bytes[c] = b;
        }
        ByteAlphabet { bytes }
    }

    /// Writes the bytes `text` stands for; characters outside the alphabet stand for their UTF-8.
    pub(super) fn decode(&self, text: &str, out: &mut Vec<u8>) {
        out.clear();
        for c in text.chars() {
            match self.bytes.get(c as usize) {
                Some(&b) if b < 256 => out.push(b as u8),
                _ => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
    }
}
