//! Counts the bytes that the current thread allocates, to hold the parser to what it was given.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static ALLOCATED: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static HEAP: Counting = Counting;

// SAFETY: every call is passed on to the system's allocator unchanged; the counter is a plain cell
// with constant initialization and no destructor, so touching it never allocates.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.with(|a| a.set(a.get().saturating_add(layout.size())));
        // SAFETY: the caller's promises about `layout` are the system allocator's demands.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.with(|a| a.set(a.get().saturating_add(layout.size())));
        // SAFETY: the caller's promises about `layout` are the system allocator's demands.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: `ptr` came from `System.alloc` with this layout, as the caller promises.
        unsafe { System.dealloc(ptr, layout) }
    }
}

/// Bytes allocated by this thread during `f` (freed ones count too).
pub(crate) fn allocated<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let before = ALLOCATED.get();
    let value = f();
    (value, ALLOCATED.get() - before)
}

#[test]
fn counts() {
    let (v, n) = allocated(|| vec![1u8; 1 << 20]);
    assert!(v.len() == 1 << 20 && n >= 1 << 20, "counted {n}");
}
