//! Replay: mixes rows the model already knew into the new ones, to prevent forgetting.

use serde::{Deserialize, Serialize};

use super::{Batch, Batches, Cursor, Example};

/// Keeps this order independent of the new rows' order.
const ORDER: u64 = 0x5245_504C;

/// A position in a run through new and replayed rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MixedCursor {
    /// In the new rows.
    pub data: Cursor,
    /// In the replayed ones.
    pub replay: Cursor,
}

/// Endless batches in which a share of the rows is replayed: ⌊n·share⌋ of the first n rows, so the share holds
/// over any stretch, whatever the batch size. New and replayed rows are each reshuffled for every pass. Without
/// replay it yields the same batches as [`Batches`].
pub struct Mixed<'d> {
    data: Batches<'d>,
    replay: Option<Batches<'d>>,
    /// In units of 2⁻³².
    share: u64,
    batch_size: usize,
    rows: [usize; 2],
}

impl<'d> Mixed<'d> {
    /// Starts at the beginning or at a saved cursor. `batch_size` is in rows, at least 1. `share` is in [0, 1),
    /// and ignored if `replay` is empty.
    pub fn new(
        data: &'d [Example],
        replay: &'d [Example],
        share: f64,
        batch_size: usize,
        seed: u64,
        cursor: MixedCursor,
    ) -> Mixed<'d> {
        let parts = (share.clamp(0.0, 1.0) * (1u64 << 32) as f64).round() as u64;
        let replayed = !replay.is_empty() && parts > 0;
        Mixed {
            data: Batches::new(data, batch_size, seed, cursor.data),
            replay: replayed.then(|| Batches::new(replay, 1, seed ^ ORDER, cursor.replay)),
            share: parts.min((1 << 32) - 1),
            batch_size: batch_size.max(1),
            rows: [data.len(), replay.len()],
        }
    }

    /// Where the next batch begins: pass it to [`Self::new`] to continue from there.
    pub fn cursor(&self) -> MixedCursor {
        let replay = self.replay.as_ref().map_or_else(Cursor::default, Batches::cursor);
        MixedCursor { data: self.data.cursor(), replay }
    }

    /// Moves to a saved position in a run through the same rows.
    pub fn seek(&mut self, cursor: MixedCursor) {
        self.data.seek(cursor.data);
        if let Some(replay) = &mut self.replay {
            replay.seek(cursor.replay);
        }
    }

    /// Average number of batches in which every new row occurs once.
    pub fn batches_per_epoch(&self) -> usize {
        if self.replay.is_none() {
            return self.data.batches_per_epoch();
        }
        let new = 1.0 - self.share as f64 / (1u64 << 32) as f64;
        (self.rows[0] as f64 / (self.batch_size as f64 * new)).ceil() as usize
    }

    /// Fills a batch with the next rows, reusing its buffers. It stays empty only if there are no new rows.
    pub fn next_into(&mut self, batch: &mut Batch) {
        let cursor = self.cursor();
        let Some(replay) = self.replay.as_mut().filter(|_| self.rows[0] > 0) else {
            return self.data.next_into(batch);
        };
        batch.clear();
        let done = |c: Cursor, rows: usize| u128::from(c.epoch) * rows as u128 + u128::from(c.index);
        let first = done(cursor.data, self.rows[0]) + done(cursor.replay, self.rows[1]);
        let replayed = |rows: u128| (rows * u128::from(self.share)) >> 32;
        for at in first..first + self.batch_size as u128 {
            match replayed(at + 1) > replayed(at) {
                true => replay.push_next(batch),
                false => self.data.push_next(batch),
            }
        }
    }
}
