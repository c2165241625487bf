//! Engraft for other languages: a C ABI over the runtime, described to C by `include/engraft.h`.
//!
//! The story, in the order of its files: [`error`] has the codes that every call returns, and the messages
//! behind them; [`handle`] keeps what callers hold, and stands between them and a panic; [`caller`] is all
//! that reads or writes their memory; [`control`] is how a call that runs is stopped, held and cooled. Then
//! what there is to do: open a [`model`], read [`data`], [`plan`], train with a [`trainer`] or let the
//! [`gate`] decide, keep what won in a [`store`], put an [`adapter`] beside the base and generate in a
//! [`session`]. [`log`] is where warnings go.
//!
//! # The rules
//!
//! - Every function returns a code: 0, or a negative one of [`error`]. What came is in an out parameter.
//! - A handle is a number, never an address. Nothing here reads what it points to, so a handle that was
//!   freed, that is of another kind, or that was made up is refused with `ENGRAFT_MISUSE`. NULL may always be
//!   freed.
//! - Handles keep alive what they need: a model may be freed while its trainer lives.
//! - A panic ends the call with `ENGRAFT_PANIC`, and the handle can only be freed from then on.
//! - Trainers, gates and sessions serve one call at a time, from any thread; another one returns
//!   `ENGRAFT_BUSY` at once, also from within a callback. All other handles may be shared. What steers a call
//!   that runs (cancel, pause, resume, thermal state) never waits and may be called from anywhere.
//! - Callbacks run on the thread of the call that they belong to, with no lock held; they must not unwind.
//!   (The busy flag is a lock that is only ever tried: nobody waits for it.)
//! - No output but through the log callback, no environment variables, no signal handlers.
//!
//! # Safety
//!
//! One contract for all functions: pointers are NULL or point to what their types say, of the length given
//! beside them, aligned as C aligns it, readable (or writable, for out parameters) during the call; a
//! callback may be called until the call returns that it was given to. All unsafe code of this crate rests
//! on this, and lies in [`caller`] and beside the callbacks.
#![allow(clippy::missing_safety_doc, reason = "one contract for all functions, in the crate's documentation")]
// What several of the parts share that can be left out.
#![cfg_attr(not(all(feature = "train", feature = "gate")), allow(dead_code))]

// A panic must be caught before it reaches C; with panic=abort it would end the whole app.
#[cfg(not(panic = "unwind"))]
compile_error!("engraft-capi catches panics: build it with panic = \"unwind\"");

pub mod adapter;
pub mod caller;
pub mod control;
#[cfg(feature = "train")]
pub mod data;
pub mod error;
#[cfg(feature = "gate")]
pub mod gate;
pub mod handle;
pub mod log;
pub mod model;
#[cfg(feature = "train")]
pub mod plan;
#[cfg(feature = "train")]
pub mod progress;
pub mod session;
pub mod store;
#[cfg(all(test, feature = "gate"))]
mod tests;
#[cfg(feature = "train")]
pub mod trainer;

use std::ffi::c_char;

use error::Result;

/// Version of this interface: its major part in the upper half, its minor part in the lower. Programs work
/// with libraries of the same major part whose minor part is not lower.
pub const ENGRAFT_ABI_VERSION: u32 = 1 << 16;

/// The interface's version that the library was built with; compare it with `ENGRAFT_ABI_VERSION`.
#[unsafe(no_mangle)]
pub extern "C" fn engraft_abi_version() -> u32 {
    ENGRAFT_ABI_VERSION
}

/// Copies the library's own version, such as "0.1.0"; see `engraft_message` for the buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_version(buffer: *mut c_char, capacity: usize, length: *mut usize) -> i32 {
    handle::alone("engraft_version", || -> Result<()> {
        // SAFETY: the crate's contract, for the caller's buffer.
        unsafe { caller::copy_text(env!("CARGO_PKG_VERSION"), buffer, capacity, length) }
    })
}
