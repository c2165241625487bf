//! Engraft for other languages: a C ABI over the runtime, described to C by `include/engraft.h`.
//!
//! Four modules hold the interface together. [`error`] has the codes that every call returns, and their
//! messages. [`handle`] keeps what callers hold and catches panics. Only [`caller`] reads or writes the
//! callers' memory. [`control`] stops, pauses and cools a running call. The others do the work: open a
//! [`model`], read [`data`], [`plan`], train with a [`trainer`] or let the [`gate`] decide, keep the winner
//! in a [`store`], add an [`adapter`] to the base, and generate in a [`session`]. Warnings go to [`log`].
//!
//! # The rules
//!
//! - Every function returns a code: 0, or a negative one of [`error`]. Results go into out parameters.
//! - A handle is a number, never an address. Nothing here follows it as a pointer, so a handle that was freed,
//!   is of another kind, or was made up is refused with `ENGRAFT_MISUSE`. NULL may always be freed.
//! - Handles keep alive what they need: a model may be freed while its trainer lives.
//! - A panic ends the call with `ENGRAFT_PANIC`. From then on the handle can only be freed.
//! - Trainers, gates and sessions serve one call at a time, from any thread. Another call returns
//!   `ENGRAFT_BUSY` at once, even from within a callback. All other handles may be shared. The functions that
//!   steer a running call (cancel, pause, resume, set_thermal) never wait and may be called from anywhere.
//! - Callbacks run on the thread of their call, with no lock held, and must not unwind. (The busy flag is a
//!   lock, but it is only ever tried: nobody waits for it.)
//! - The library writes only to the log callback, reads no environment variable and installs no signal handler.
//!
//! # Safety
//!
//! One contract covers all functions. A pointer is NULL or points to what its type says, with the length given
//! next to it, aligned as in C, and readable (or writable, for out parameters) during the call. A callback may
//! be called until the call that it was passed to returns. All unsafe code of this crate relies on this
//! contract; it is in [`caller`] and next to the callbacks.
#![allow(clippy::missing_safety_doc, reason = "one contract for all functions, in the crate's documentation")]
// Some features leave out the only users of shared code.
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
#[cfg(all(test, feature = "gate"))]
mod used;

use std::ffi::c_char;

use error::Result;

/// Version of this interface: the major version in the upper half, the minor version in the lower. A program
/// works with libraries of the same major version and the same or a higher minor version.
pub const ENGRAFT_ABI_VERSION: u32 = 1 << 16;

/// The interface version that the library was built with; compare it with `ENGRAFT_ABI_VERSION`.
#[unsafe(no_mangle)]
pub extern "C" fn engraft_abi_version() -> u32 {
    ENGRAFT_ABI_VERSION
}

/// Copies the library's version, such as "0.1.0"; see `engraft_message` for the buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_version(buffer: *mut c_char, capacity: usize, length: *mut usize) -> i32 {
    handle::alone("engraft_version", || -> Result<()> {
        // SAFETY: the crate's contract, for the caller's buffer.
        unsafe { caller::copy_text(env!("CARGO_PKG_VERSION"), buffer, capacity, length) }
    })
}
