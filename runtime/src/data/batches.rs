//! Ragged batches: concatenated sequences without padding, in an order that a cursor of two integers can
//! resume.

use super::Example;
use crate::rng::Rng;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The target of a position without loss.
pub const NO_TARGET: u32 = u32::MAX;

/// First random stream of the shuffle; each epoch uses the next one.
const SHUFFLE_STREAM: u64 = 0x5348_5546 << 32;

/// A micro-batch. A sequence of n ids gives n − 1 rows: position i holds its id i and predicts its id
/// i + 1.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The id at each row.
    pub ids: Vec<u32>,
    /// The id to predict at each row, [`NO_TARGET`] for no loss.
    pub targets: Vec<u32>,
    /// The rows of each sequence.
    pub seqs: Vec<Range<usize>>,
}

impl Batch {
    /// Rows of the batch.
    pub fn rows(&self) -> usize {
        self.ids.len()
    }

    /// Rows with a loss.
    pub fn trained_tokens(&self) -> usize {
        self.targets.iter().filter(|t| **t != NO_TARGET).count()
    }

    /// Empties the batch and keeps its buffers.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.targets.clear();
        self.seqs.clear();
    }

    /// Appends a sequence.
    pub fn push(&mut self, example: &Example) {
        let start = self.ids.len();
        let rows = example.rows();
        self.ids.extend_from_slice(&example.ids[..rows]);
        let next = example.ids.iter().zip(&example.mask).skip(1);
        self.targets.extend(next.map(|(id, target)| if *target { *id } else { NO_TARGET }));
        self.seqs.push(start..start + rows);
    }
}

/// A position in a run through the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Completed passes through the data.
    pub epoch: u64,
    /// Examples of this pass already used.
    pub index: u64,
}

/// Endless batches. Each pass through the examples has its own order, derived from seed and epoch. The last
/// batch of a pass may have fewer sequences.
pub struct Batches<'d> {
    examples: &'d [Example],
    batch_size: usize,
    seed: u64,
    cursor: Cursor,
    /// The order of this epoch.
    order: Vec<u32>,
}

impl<'d> Batches<'d> {
    /// Starts at the beginning ([`Cursor::default`]) or at a saved cursor. `batch_size` is in sequences, at
    /// least 1; a cursor beyond the data starts the next epoch.
    pub fn new(examples: &'d [Example], batch_size: usize, seed: u64, cursor: Cursor) -> Self {
        let mut batches =
            Batches { examples, batch_size: batch_size.max(1), seed, cursor, order: Vec::new() };
        batches.order.reserve_exact(examples.len());
        batches.shuffle();
        batches
    }

    /// Where the next batch begins: pass it to [`Self::new`] to continue from there.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Moves to a saved position in a run through the same examples.
    pub fn seek(&mut self, cursor: Cursor) {
        self.cursor = cursor;
        self.shuffle();
    }

    /// Rows of the largest possible batch, for the memory plan.
    pub fn max_tokens(&self) -> usize {
        max_tokens(self.examples, self.batch_size)
    }

    /// Batches of one pass.
    pub fn batches_per_epoch(&self) -> usize {
        self.examples.len().div_ceil(self.batch_size)
    }

    /// Fills a batch with the next sequences, reusing its buffers. It stays empty only if there are no
    /// examples.
    pub fn next_into(&mut self, batch: &mut Batch) {
        batch.clear();
        self.push(self.batch_size, batch);
    }

    /// Appends the next sequence to a batch, regardless of the batch size.
    pub fn push_next(&mut self, batch: &mut Batch) {
        self.push(1, batch);
    }

    /// Appends the next `count` sequences, or however many this pass has left.
    fn push(&mut self, count: usize, batch: &mut Batch) {
        if self.examples.is_empty() {
            return;
        }
        if self.cursor.index as usize >= self.examples.len() {
            self.cursor = Cursor { epoch: self.cursor.epoch.wrapping_add(1), index: 0 };
            self.shuffle();
        }
        let start = self.cursor.index as usize;
        let end = self.examples.len().min(start.saturating_add(count));
        for at in &self.order[start..end] {
            batch.push(&self.examples[*at as usize]);
        }
        self.cursor.index = end as u64;
    }

    fn shuffle(&mut self) {
        self.order.clear();
        self.order.extend((0..self.examples.len()).map(|i| i as u32));
        Rng::new(self.seed, SHUFFLE_STREAM.wrapping_add(self.cursor.epoch)).shuffle(&mut self.order);
    }
}

impl Iterator for Batches<'_> {
    type Item = Batch;

    /// `None` only if there are no examples.
    fn next(&mut self) -> Option<Batch> {
        let mut batch = Batch::default();
        self.next_into(&mut batch);
        (!batch.seqs.is_empty()).then_some(batch)
    }
}

/// The examples once, in their original order, for evaluation.
pub fn in_order(examples: &[Example], batch_size: usize) -> impl Iterator<Item = Batch> + '_ {
    examples.chunks(batch_size.max(1)).map(|chunk| {
        let mut batch = Batch::default();
        chunk.iter().for_each(|example| batch.push(example));
        batch
    })
}

/// Rows of the largest batch of `batch_size` sequences, whatever their order.
pub fn max_tokens(examples: &[Example], batch_size: usize) -> usize {
    let mut rows: Vec<usize> = examples.iter().map(Example::rows).collect();
    rows.sort_unstable_by(|a, b| b.cmp(a));
    rows.iter().take(batch_size.max(1)).sum()
}
