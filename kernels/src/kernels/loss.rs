//! Softmax and cross-entropy over the vocabulary, chunk by chunk.

use crate::items::SoftmaxState;

use super::share::Shared;
use super::{Kernels, Op};

impl Kernels {
    /// Folds the logits `[m, chunk]` of vocabulary rows `first_id..` into each row's running softmax.
    ///
    /// Logits become e^(logit − max). If the running maximum grew, row r of `dx` (if any) is rescaled to it.
    pub fn ce_chunk(
        &self,
        logits: &mut [f32],
        chunk: usize,
        first_id: usize,
        targets: &[u32],
        state: &mut [SoftmaxState],
        dx: Option<&mut [f32]>,
    ) {
        let _timed = self.timed(Op::CrossEntropy);
        let m = targets.len();
        assert!(logits.len() == m * chunk && state.len() == m);
        let d = dx.as_ref().map_or(0, |x| x.len() / m.max(1));
        let dx = dx.map(|x| Shared(x.as_mut_ptr()));
        let state = Shared(state.as_mut_ptr());
        self.rows(chunk, logits, |r, row| {
            // SAFETY: row r of state and dx is this item's alone.
            let (st, dx) =
                unsafe { (&mut state.part(r..r + 1)[0], dx.as_ref().map(|x| x.part(r * d..(r + 1) * d))) };
            // SAFETY: the ISA is present.
            let factor = unsafe { (self.table.ce_chunk_row)(row, first_id, targets[r] as usize, st) };
            if let Some(dx) = dx
                && factor != 1.0
            {
                // SAFETY: as above.
                unsafe { (self.table.scale)(factor, dx) }
            }
        });
    }
}
