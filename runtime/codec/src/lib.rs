//! The on-disk frame of Engraft's adapters and checkpoints.
//!
//! A frame is one file: a preamble that says what it is, a small postcard header, raw tensors and a footer,
//! each with its own CRC32C. It is written from slices in one pass, with no buffer the size of the file, and
//! read in two: [`Frame::verify`] checks every byte before anything is handed out, then [`Frame::sections`]
//! reads the tensors into the caller's memory and checks them again.
//!
//! # Layout
//! Every number is little-endian on every machine; floats are IEEE 754 bit patterns.
//!
//! | part | bytes | content |
//! |---|---|---|
//! | preamble | 80 | magic `ENGRAFT\x1a`, frame version u16, header schema u16, kind 4 letters, generation u64, file bytes u64, base digest 32, header bytes u32, sections u32, zero u32, CRC u32 |
//! | header | n + 4 | postcard of the kind's own header (at most 1 MiB), CRC u32 |
//! | table | 32·sections + 4 | per section: name 20 (ASCII, zero-padded), element u32, count u64; CRC u32 |
//! | sections | bytes + 4 each | elements without padding, CRC u32 |
//! | footer | 32 | seal u32, generation u64, file bytes u64, magic `\x1aTFARGNE`, CRC u32 |
//!
//! Each CRC covers its own part; the seal is the CRC32C of all the CRCs before it, so parts of two good files
//! can't be spliced into a third.
//!
//! # Versions
//! Magic, length and CRC of the preamble never change, so any reader can tell a newer file
//! ([`Error::Version`]) from a damaged one ([`Error::Damaged`]). The frame version counts changes of
//! this layout; a reader accepts the versions it knows and refuses all others. The schema counts changes of a
//! kind's header and sections and belongs to the crate that defines the kind.
//!
//! # Example
//! ```
//! use engraft_codec::{Element, Frame, Kind, Meta, Section, Writer};
//!
//! let meta = Meta { kind: Kind::ADAPTER, schema: 1, generation: 1, base_digest: [0; 32] };
//! let sections = [Section::new("theta", Element::F32, 2).unwrap()];
//! let mut file = [0_u8; 512];
//! let mut writer = Writer::begin(&mut file[..], &meta, "header", &sections).unwrap();
//! let length = writer.file_bytes() as usize;
//! writer.f32(&[1.0, 2.0]).unwrap();
//! writer.finish().unwrap();
//!
//! let whole = |file: &[u8]| Frame::verify(&file[..length], length as u64).is_ok();
//! assert!(whole(&file));
//! file[100] ^= 1;
//! assert!(!whole(&file));
//! ```
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod crc32c;
mod error;
mod layout;
mod reader;
mod writer;

pub use crc32c::Crc32c;
pub use error::{Error, Part};
pub use layout::{
    DIGEST_BYTES, Element, HEADER_BYTES_MAX, Kind, Meta, NAME_BYTES_MAX, SECTIONS_MAX, Section,
};
pub use reader::{Frame, Sections};
pub use writer::Writer;

/// The layout version this crate reads and writes.
pub const FRAME_VERSION: u16 = 1;

/// The I/O traits frames are read and written through, re-exported at the version used here.
pub use embedded_io;
