//! Merging within a word: the symbols that cover it, and proposals to merge two neighbours, best first.

use super::vocab::NONE;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

/// Words are cut at this many bytes, which bounds the memory for merging. No tokenizer was trained on longer
/// words.
pub(super) const WORD_BYTES_MAX: usize = 1 << 16;

/// A linked list of symbols over one word.
#[derive(Clone, Copy)]
struct Symbol {
    id: u32,
    prev: u32,
    next: u32,
    /// End in the word, in bytes; 0 once merged away.
    end: u32,
}

/// A candidate merge: (priority, left symbol, where it ends and its neighbour begins, where that ends, result),
/// ordered by highest priority, then leftmost. The ends tell whether it is still valid.
type Candidate = (u32, Reverse<u32>, u32, u32, u32);

/// A word's symbols. Holds its buffers from one word to the next.
#[derive(Default)]
pub(super) struct Word {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Candidate>,
}

impl Word {
    /// Merges a word's parts, each given by its id and where it ends. `propose` takes the ids of two neighbours
    /// and the range of both, and gives the priority and the id of their merge, if there is one.
    pub(super) fn merge(
        &mut self,
        parts: impl Iterator<Item = (u32, usize)>,
        propose: impl Fn([u32; 2], Range<usize>) -> Option<(u32, u32)>,
    ) {
        self.queue.clear();
        self.symbols.clear();
        let symbol = |((id, end), i): ((u32, usize), u32)| Symbol {
            id,
            prev: i.checked_sub(1).unwrap_or(NONE),
            next: i + 1,
            end: end as u32,
        };
        self.symbols.extend(parts.zip(0..).map(symbol));
        if let Some(last) = self.symbols.last_mut() {
            last.next = NONE;
        }
        for left in 0..self.symbols.len() as u32 {
            self.propose(left, &propose);
        }
        while let Some((_, Reverse(left), middle, end, id)) = self.queue.pop() {
            let held = self.symbols[left as usize];
            let right = self.symbols.get(held.next as usize).map(|right| right.end);
            if held.end == middle && right == Some(end) {
                self.join(left, id);
                self.propose(left, &propose);
                if held.prev != NONE {
                    self.propose(held.prev, &propose);
                }
            }
        }
    }

    /// Each symbol's id and range.
    pub(super) fn symbols(&self) -> impl Iterator<Item = (u32, Range<usize>)> + '_ {
        let all = std::iter::successors(self.symbols.first(), |s| self.symbols.get(s.next as usize));
        all.map(|symbol| (symbol.id, self.start(symbol)..symbol.end as usize))
    }

    fn start(&self, symbol: &Symbol) -> usize {
        self.symbols.get(symbol.prev as usize).map_or(0, |prev| prev.end as usize)
    }

    /// Queues the merge of a symbol with its right neighbour, if there is one.
    fn propose(&mut self, left: u32, propose: &impl Fn([u32; 2], Range<usize>) -> Option<(u32, u32)>) {
        let symbol = self.symbols[left as usize];
        let Some(right) = self.symbols.get(symbol.next as usize) else { return };
        let range = self.start(&symbol)..right.end as usize;
        if let Some((priority, result)) = propose([symbol.id, right.id], range) {
            self.queue.push((priority, Reverse(left), symbol.end, right.end, result));
        }
    }

    /// Replaces a symbol and its right neighbour by `id`.
    fn join(&mut self, left: u32, id: u32) {
        let right = self.symbols[left as usize].next as usize;
        let gone = self.symbols[right];
        self.symbols[right].end = 0;
        let kept = &mut self.symbols[left as usize];
        *kept = Symbol { id, next: gone.next, end: gone.end, ..*kept };
        if let Some(after) = self.symbols.get_mut(gone.next as usize) {
            after.prev = left;
        }
    }
}
