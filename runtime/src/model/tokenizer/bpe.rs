//! Byte-level byte pair encoding (GPT-2's): merges by rank within each word.

use super::Sink;
use super::pretokenize::Pre;
use super::vocab::{NONE, Vocab, VocabIndex, table_slots};
use crate::error::{Error, ErrorKind, Result};
use crate::model::gguf::quote;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

/// Words are cut at this many bytes, which bounds the memory for merging. No tokenizer was trained on longer
/// words.
pub(super) const WORD_BYTES_MAX: usize = 1 << 16;

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
        let mut scratch = Scratch::default();
        self.pre.split(text, |word| {
            let mut start = word.start;
            while start < word.end {
                let mut end = word.end.min(start + WORD_BYTES_MAX);
                while !text.is_char_boundary(end) {
                    end -= 1;
                }
                self.encode_word(vocab, &text.as_bytes()[start..end], start, &mut scratch, sink);
                start = end;
            }
        });
    }

    fn encode_word(&self, vocab: &Vocab, word: &[u8], base: usize, scratch: &mut Scratch, sink: &mut Sink) {
        if let Some(id) = self.whole_words.as_ref().and_then(|index| index.find(vocab, word)) {
            return sink.push(id, base + word.len());
        }
        scratch.start(word, &self.byte_ids);
        for left in 0..word.len().saturating_sub(1) {
            self.propose(left as u32, scratch);
        }
        while let Some(Reverse((_, left, left_id, right_id, result))) = scratch.queue.pop() {
            let held = scratch.symbols[left as usize];
            let still = held.id == left_id && held.next != NONE && {
                scratch.symbols[held.next as usize].id == right_id
            };
            if still {
                scratch.merge(left, result);
                self.propose(left, scratch);
                if scratch.symbols[left as usize].prev != NONE {
                    self.propose(scratch.symbols[left as usize].prev, scratch);
                }
            }
        }
        let mut at = 0;
        while at != NONE {
            let symbol = scratch.symbols[at as usize];
            // A byte without a token is dropped, as in the tokenizers crate and llama.cpp.
            if symbol.id != NONE {
                sink.push(symbol.id, base + symbol.end as usize);
            }
            at = symbol.next;
        }
    }

    /// Queues the merge of a symbol with its right neighbour, if such a merge exists.
    fn propose(&self, left: u32, scratch: &mut Scratch) {
        let symbol = scratch.symbols[left as usize];
        if symbol.next == NONE || symbol.id == NONE {
            return;
        }
        let right = scratch.symbols[symbol.next as usize].id;
        let merge = self.merges[self.slot(symbol.id, right)];
        if merge.left != NONE {
            scratch.queue.push(Reverse((merge.rank, left, symbol.id, right, merge.result)));
        }
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.merges.capacity() * size_of::<Merge>()
            + self.whole_words.as_ref().map_or(0, VocabIndex::heap_bytes)
    }
}

/// A linked list of symbols over one word.
#[derive(Clone, Copy)]
struct Symbol {
    /// NONE once merged away, or for a byte without a token.
    id: u32,
    prev: u32,
    next: u32,
    /// End in the word, in bytes.
    end: u32,
}

/// A candidate merge: (rank, left symbol, its id, its neighbour's id, result), ordered by lowest rank, then
/// leftmost.
type Candidate = (u32, u32, u32, u32, u32);

#[derive(Default)]
struct Scratch {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Reverse<Candidate>>,
}

impl Scratch {
    fn start(&mut self, word: &[u8], byte_ids: &[u32; 256]) {
        self.queue.clear();
        self.symbols.clear();
        let last = word.len() as u32 - 1;
        self.symbols.extend(word.iter().zip(0u32..).map(|(&b, i)| Symbol {
            id: byte_ids[usize::from(b)],
            prev: if i == 0 { NONE } else { i - 1 },
            next: if i == last { NONE } else { i + 1 },
            end: i + 1,
        }));
    }

    /// Replaces a symbol and its right neighbour by `result`.
    fn merge(&mut self, left: u32, result: u32) {
        let right = self.symbols[left as usize].next;
        let gone = self.symbols[right as usize];
        self.symbols[right as usize].id = NONE;
        let kept = &mut self.symbols[left as usize];
        kept.id = result;
        kept.next = gone.next;
        kept.end = gone.end;
        if gone.next != NONE {
            self.symbols[gone.next as usize].prev = left;
        }
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
