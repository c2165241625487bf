//! How the items of one job share their output.

use core::ops::Range;
use core::slice::from_raw_parts_mut;

/// A pointer shared by the items of one job; each writes its own part.
#[derive(Clone, Copy)]
pub(super) struct Shared<T>(pub(super) *mut T);
// SAFETY: only handed to items that write disjoint parts, as each use below states.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The part `range` of the shared slice.
    ///
    /// # Safety
    /// The range lies within the slice and no other item uses it meanwhile.
    #[allow(clippy::mut_from_ref, reason = "disjointness is the caller's contract")]
    pub(super) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        // SAFETY: the caller's contract.
        unsafe { from_raw_parts_mut(self.0.add(range.start), range.len()) }
    }
}

/// Each worker's own part of the caller's scratch.
pub(super) struct Scratch(Shared<f32>, usize);

impl Scratch {
    pub(super) fn new(words: &mut [f32], threads: usize, needed: usize) -> Scratch {
        let each = words.len() / threads;
        assert!(each >= needed, "scratch of {each} words per thread, {needed} needed");
        Scratch(Shared(words.as_mut_ptr()), each)
    }

    #[allow(clippy::mut_from_ref, reason = "each worker asks only for its own part")]
    pub(super) fn of(&self, worker: usize) -> &mut [f32] {
        // SAFETY: `new` split the exclusive borrow evenly over the pool's threads, a worker runs one
        // item at a time, and each item asks once.
        unsafe { self.0.part(worker * self.1..(worker + 1) * self.1) }
    }
}
