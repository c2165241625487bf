//! One error type for the whole runtime. The kind is the stable part: exit codes and the C ABI map it.
//!
//! ```
//! use engraft_runtime::{Base, ErrorKind};
//!
//! let error = Base::open("no such file.gguf").err().unwrap();
//! assert_eq!(error.kind(), ErrorKind::Io);
//! println!("{error}");
//! ```

use std::fmt;

pub use crate::advice::Advice;

/// What went wrong, in classes a caller can act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Reading or writing failed in the operating system.
    Io,
    /// The disk is full, or a quota or file size limit is reached.
    Full,
    /// A file breaks its format (truncated, flipped bits, foreign, wrong sizes).
    Corrupt,
    /// The format is right, but this version can't handle what it holds.
    Unsupported,
    /// An argument or setting is out of range or contradicts another.
    Misuse,
    /// The memory plan exceeds the budget.
    DoesNotFit,
    /// Training or evaluation data is malformed, or leaves nothing to train on.
    BadData,
    /// An adapter and a model (or tokenizer) don't belong together.
    BaseMismatch,
    /// A NaN or infinity appeared where none may be.
    NonFinite,
    /// Another process holds the output.
    Busy,
    /// The caller asked to stop.
    Cancelled,
    /// The gate did not promote.
    GateRefused,
}

/// An error: its kind, a message that names file and place, and advice where its wording depends on the caller.
#[derive(Clone)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    advice: Option<Advice>,
}

/// The runtime's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of a kind with a message for people.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into(), advice: None }
    }

    /// An operating system error while doing `what` (for example "opening models/a.gguf").
    pub fn io(what: impl fmt::Display, source: std::io::Error) -> Self {
        let (kind, remedy) = (kind_of(&source), remedy_of(&source));
        Error { kind, message: format!("{what}: {source}{remedy}"), advice: None }
    }

    /// The class of the error.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What happened and where, for people, without the advice.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The advice, for the caller to word.
    pub fn advice(&self) -> Option<&Advice> {
        self.advice.as_ref()
    }

    /// The same error with advice.
    #[must_use]
    pub fn advise(self, advice: Advice) -> Self {
        Error { advice: Some(advice), ..self }
    }

    /// The same error, prefixed with the place where it happened.
    #[must_use]
    pub fn at(self, place: impl fmt::Display) -> Self {
        Error { message: format!("{place}: {}", self.message), ..self }
    }
}

/// The class of an operating system error: `Full` if making room would help, else `Io`.
pub(crate) fn kind_of(source: &std::io::Error) -> ErrorKind {
    match source.kind() {
        std::io::ErrorKind::StorageFull
        | std::io::ErrorKind::QuotaExceeded
        | std::io::ErrorKind::FileTooLarge => ErrorKind::Full,
        _ => ErrorKind::Io,
    }
}

/// A remedy, if the system's message doesn't suggest one.
pub(crate) fn remedy_of(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::StorageFull => "; free some space there, or use another place",
        std::io::ErrorKind::QuotaExceeded => "; free some of the quota, or use another place",
        std::io::ErrorKind::FileTooLarge => {
            "; raise the file size limit (ulimit -f), or use a place that allows larger files"
        }
        _ => "",
    }
}

/// Sanitizes text from a file or library for a message: bounds its length, and removes control characters,
/// which a terminal would obey.
pub(crate) fn told(words: impl fmt::Display) -> String {
    const SHOWN: usize = 300;
    let words = words.to_string();
    let mut shown: String = words.chars().take(SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if words.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.advice {
            None => f.write_str(&self.message),
            Some(advice) => write!(f, "{}; {advice}", self.message),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.kind)
    }
}

impl std::error::Error for Error {}
