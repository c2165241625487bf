//! Codes and messages.
//!
//! A code is for programs and never changes its meaning. A message is for people: it names the file, the place
//! and the remedy. The handle and the thread of a failed call keep its message.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};

use engraft_runtime::{Error, ErrorKind};

use crate::{caller, handle};

/// Success.
pub const ENGRAFT_OK: i32 = 0;
/// The operating system failed to read or write.
pub const ENGRAFT_IO: i32 = -1;
/// The disk or a quota is full.
pub const ENGRAFT_FULL: i32 = -2;
/// Out of memory.
pub const ENGRAFT_NOMEM: i32 = -3;
/// A file doesn't match its format: truncated, damaged or foreign.
pub const ENGRAFT_CORRUPT: i32 = -4;
/// An argument is out of range, contradicts another, or isn't a live handle.
pub const ENGRAFT_MISUSE: i32 = -5;
/// Another call runs on the handle, or another writer uses the folder or store.
pub const ENGRAFT_BUSY: i32 = -6;
/// The caller asked to stop.
pub const ENGRAFT_CANCELLED: i32 = -7;
/// A struct has fields set that this version of the library doesn't know.
pub const ENGRAFT_UNSUPPORTED_VERSION: i32 = -8;
/// An adapter and a model don't belong together.
pub const ENGRAFT_BASE_MISMATCH: i32 = -9;
/// NaN or infinity where a finite number is needed.
pub const ENGRAFT_NONFINITE: i32 = -10;
/// The memory plan exceeds the budget. The message says what would fit.
pub const ENGRAFT_DOES_NOT_FIT: i32 = -11;
/// The gate didn't promote.
pub const ENGRAFT_GATE_REFUSED: i32 = -12;
/// A bug in the library. The handle can only be freed.
pub const ENGRAFT_PANIC: i32 = -13;
/// The data is malformed or leaves nothing to train on.
pub const ENGRAFT_BAD_DATA: i32 = -14;
/// The file is good, but this version can't handle its contents.
pub const ENGRAFT_UNSUPPORTED: i32 = -15;
/// The caller's buffer is too small. It holds the beginning; the length is that of the whole.
pub const ENGRAFT_TOO_SMALL: i32 = -16;

/// All codes by name.
const NAMES: [(i32, &CStr); 17] = [
    (ENGRAFT_OK, c"OK"),
    (ENGRAFT_IO, c"IO"),
    (ENGRAFT_FULL, c"FULL"),
    (ENGRAFT_NOMEM, c"NOMEM"),
    (ENGRAFT_CORRUPT, c"CORRUPT"),
    (ENGRAFT_MISUSE, c"MISUSE"),
    (ENGRAFT_BUSY, c"BUSY"),
    (ENGRAFT_CANCELLED, c"CANCELLED"),
    (ENGRAFT_UNSUPPORTED_VERSION, c"UNSUPPORTED_VERSION"),
    (ENGRAFT_BASE_MISMATCH, c"BASE_MISMATCH"),
    (ENGRAFT_NONFINITE, c"NONFINITE"),
    (ENGRAFT_DOES_NOT_FIT, c"DOES_NOT_FIT"),
    (ENGRAFT_GATE_REFUSED, c"GATE_REFUSED"),
    (ENGRAFT_PANIC, c"PANIC"),
    (ENGRAFT_BAD_DATA, c"BAD_DATA"),
    (ENGRAFT_UNSUPPORTED, c"UNSUPPORTED"),
    (ENGRAFT_TOO_SMALL, c"TOO_SMALL"),
];

/// What a failed call reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: i32,
    pub(crate) message: String,
}

/// The result of everything behind an export.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    pub(crate) fn new(code: i32, message: impl Into<String>) -> Failure {
        Failure { code, message: message.into() }
    }

    pub(crate) fn misuse(message: impl Into<String>) -> Failure {
        Failure::new(ENGRAFT_MISUSE, message)
    }

    pub(crate) fn cancelled(message: impl Into<String>) -> Failure {
        Failure::new(ENGRAFT_CANCELLED, message)
    }

    /// For runtime code that passes it on.
    pub(crate) fn into_error(self) -> Error {
        let kind =
            KINDS.iter().find(|(_, code)| *code == self.code).map_or(ErrorKind::Misuse, |(kind, _)| *kind);
        Error::new(kind, self.message)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::new(code_of(error.kind()), error.to_string())
    }
}

/// The code of each kind of the runtime's errors.
const KINDS: [(ErrorKind, i32); 12] = [
    (ErrorKind::Io, ENGRAFT_IO),
    (ErrorKind::Full, ENGRAFT_FULL),
    (ErrorKind::Corrupt, ENGRAFT_CORRUPT),
    (ErrorKind::Misuse, ENGRAFT_MISUSE),
    (ErrorKind::DoesNotFit, ENGRAFT_DOES_NOT_FIT),
    (ErrorKind::BadData, ENGRAFT_BAD_DATA),
    (ErrorKind::BaseMismatch, ENGRAFT_BASE_MISMATCH),
    (ErrorKind::NonFinite, ENGRAFT_NONFINITE),
    (ErrorKind::Busy, ENGRAFT_BUSY),
    (ErrorKind::Cancelled, ENGRAFT_CANCELLED),
    (ErrorKind::GateRefused, ENGRAFT_GATE_REFUSED),
    (ErrorKind::Unsupported, ENGRAFT_UNSUPPORTED),
];

/// The code for a kind of error. Kinds that a later runtime may add count as unsupported.
fn code_of(kind: ErrorKind) -> i32 {
    KINDS.iter().find(|(known, _)| *known == kind).map_or(ENGRAFT_UNSUPPORTED, |(_, code)| *code)
}

thread_local! {
    /// The message of this thread's last failed call.
    static LAST: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Keeps the message of a failed call, for this thread.
pub(crate) fn remember(failure: &Failure) {
    // A thread that is ending has no place for it and will never ask.
    let _ = LAST.try_with(|last| {
        if let Ok(mut last) = last.try_borrow_mut() {
            last.clone_from(&failure.message);
        }
    });
}

fn remembered() -> String {
    LAST.try_with(|last| last.try_borrow().map(|text| text.clone()).unwrap_or_default()).unwrap_or_default()
}

/// Copies the message of the last failed call on a handle. With NULL, copies the message of this thread's last
/// failed call on any handle, or on none. Works on busy and poisoned handles, and changes no message.
///
/// Every function that copies text writes at most `capacity` bytes into `buffer`, including a NUL, and puts the
/// length of the whole text, without the NUL, into `length` unless that is NULL. To get only the length, pass
/// NULL as `buffer` and 0 as `capacity`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_message(
    handle: *const c_void,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> i32 {
    handle::unheard("engraft_message", || {
        let text = if handle.is_null() { remembered() } else { handle::message_of(handle.addr())? };
        // SAFETY: the crate's contract, for the caller's buffer.
        unsafe { caller::copy_text(&text, buffer, capacity, length) }
    })
}

/// The name of a code, such as "BUSY"; "UNKNOWN" for any other number. The text is static: never free it. It is
/// valid as long as the library is loaded.
#[unsafe(no_mangle)]
pub extern "C" fn engraft_code_name(code: i32) -> *const c_char {
    NAMES.iter().find(|(known, _)| *known == code).map_or(c"UNKNOWN", |(_, name)| name).as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_in_one_row() {
        for (i, (code, _)) in NAMES.iter().enumerate() {
            assert_eq!(*code, -(i as i32));
        }
    }

    #[test]
    fn kinds_have_codes_of_their_own() {
        assert_eq!(code_of(ErrorKind::Busy), ENGRAFT_BUSY);
        let full = Error::io("saving", std::io::ErrorKind::StorageFull.into());
        assert_eq!(Failure::from(full).code, ENGRAFT_FULL);
        assert_eq!(code_of(ErrorKind::Unsupported), ENGRAFT_UNSUPPORTED);
        let back = Failure::cancelled("x").into_error();
        assert_eq!(Failure::from(back), Failure::cancelled("x"));
    }
}
