//! SentencePiece's BPE as llama.cpp runs it: starts from characters, merges the neighbours whose union scores
//! best, and uses bytes for characters without a token. Tokens hold plain blanks here, not U+2581.

use super::Sink;
use super::bpe::WORD_BYTES_MAX;
use super::vocab::{NONE, Vocab, VocabIndex};
use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

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
        let mut scratch = Scratch::default();
        let mut start = 0;
        while start < bytes.len() {
            let mut end = bytes.len().min(start + WORD_BYTES_MAX);
            if self.splits_at_blanks {
                let word = bytes[start..end].windows(2).position(|w| w[0] != b' ' && w[1] == b' ');
                end = word.map_or(end, |at| start + at + 1);
            }
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            self.encode_word(vocab, &text[start..end], start, &mut scratch, sink);
            start = end;
        }
    }

    fn encode_word(&self, vocab: &Vocab, word: &str, base: usize, scratch: &mut Scratch, sink: &mut Sink) {
        scratch.start(word);
        for left in 0..scratch.symbols.len() as u32 {
            self.propose(vocab, word, left, scratch);
        }
        while let Some(union) = scratch.queue.pop() {
            let left = scratch.symbols[union.left as usize];
            let still = left.end == union.middle && left.next != NONE && {
                scratch.symbols[left.next as usize].end == union.end
            };
            if still {
                scratch.merge(union.left);
                self.propose(vocab, word, union.left, scratch);
                if left.prev != NONE {
                    self.propose(vocab, word, left.prev, scratch);
                }
            }
        }
        let mut at = 0;
        while at != NONE {
            let symbol = scratch.symbols[at as usize];
            self.emit(
                vocab,
                &word[symbol.start as usize..symbol.end as usize],
                base + symbol.end as usize,
                sink,
            );
            at = symbol.next;
        }
    }

    /// Queues the union of a symbol with its right neighbour, if it is a token.
    fn propose(&self, vocab: &Vocab, word: &str, left: u32, scratch: &mut Scratch) {
        let symbol = scratch.symbols[left as usize];
        if symbol.next == NONE {
            return;
        }
        let end = scratch.symbols[symbol.next as usize].end;
        let text = &word.as_bytes()[symbol.start as usize..end as usize];
        if text.len() > self.token_bytes_max {
            return;
        }
        if let Some(id) = self.index.find(vocab, text) {
            let score = self.scores.get(id as usize).copied().unwrap_or(0.0);
            scratch.queue.push(Union { score, left, middle: symbol.end, end });
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

#[derive(Clone, Copy)]
struct Symbol {
    start: u32,
    end: u32,
    prev: u32,
    next: u32,
}

/// Two neighbours that may merge: the greatest score first, then the leftmost.
struct Union {
    score: f32,
    left: u32,
    /// Where left ends and right begins; with `end`, tells whether the proposal is still valid.
    middle: u32,
    end: u32,
}

impl Ord for Union {
    fn cmp(&self, other: &Self) -> Ordering {
        let key = |u: &Union| (Reverse(u.left), u.middle, u.end);
        self.score.total_cmp(&other.score).then_with(|| key(self).cmp(&key(other)))
    }
}

impl PartialOrd for Union {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Union {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Union {}

#[derive(Default)]
struct Scratch {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Union>,
}

impl Scratch {
    fn start(&mut self, word: &str) {
        self.queue.clear();
        self.symbols.clear();
        for ((start, c), i) in word.char_indices().zip(0u32..) {
            let end = (start + c.len_utf8()) as u32;
            let prev = i.checked_sub(1).unwrap_or(NONE);
            let next = if end as usize == word.len() { NONE } else { i + 1 };
            self.symbols.push(Symbol { start: start as u32, end, prev, next });
        }
    }

    fn merge(&mut self, left: u32) {
        let right = self.symbols[left as usize].next;
        let gone = self.symbols[right as usize];
        // Marked by an end of 0: no proposal has a middle of 0.
        self.symbols[right as usize].end = 0;
        let kept = &mut self.symbols[left as usize];
        kept.end = gone.end;
        kept.next = gone.next;
        if gone.next != NONE {
            self.symbols[gone.next as usize].prev = left;
        }
    }
}
