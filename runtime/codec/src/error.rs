//! Why a frame was refused.

use core::fmt;

/// A part of a frame, to say where it is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The first 80 bytes.
    Preamble,
    /// The postcard header.
    Header,
    /// The section table.
    Table,
    /// The section with this index.
    Section(u32),
    /// The last 32 bytes.
    Footer,
}

/// An error of reading or writing a frame; `E` is the error of the underlying I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error<E> {
    /// Reading or writing failed.
    Io(E),
    /// The output accepts no more bytes.
    WriteZero,
    /// The file does not begin with the magic.
    Foreign,
    /// The file's length differs from the one it declares, or the file ends early.
    Length,
    /// A part's checksum or content is wrong.
    Damaged(Part),
    /// The frame is intact, but this reader doesn't know its version.
    Version {
        /// The version found.
        found: u16,
    },
    /// A part is larger than the format allows (when writing).
    Limit(Part),
    /// The caller wrote or asked for something other than the section table says.
    Misuse(&'static str),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Preamble => f.write_str("preamble"),
            Part::Header => f.write_str("header"),
            Part::Table => f.write_str("section table"),
            Part::Section(index) => write!(f, "section {index}"),
            Part::Footer => f.write_str("footer"),
        }
    }
}

impl<E: fmt::Display> fmt::Display for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Io(source) => write!(f, "{source}"),
            Error::WriteZero => f.write_str("the output accepts no more bytes"),
            Error::Foreign => f.write_str("not an Engraft file (it does not begin with ENGRAFT)"),
            Error::Length => {
                f.write_str("truncated or extended (its length differs from the one it declares)")
            }
            Error::Damaged(part) => write!(f, "damaged in its {part} (checksum or content is wrong)"),
            Error::Version { found } => {
                write!(f, "frame version {found}; this reader knows version {}", crate::FRAME_VERSION)
            }
            Error::Limit(part) => write!(f, "the {part} is larger than the format allows"),
            Error::Misuse(what) => f.write_str(what),
        }
    }
}

impl<E: fmt::Debug + fmt::Display> core::error::Error for Error<E> {}
