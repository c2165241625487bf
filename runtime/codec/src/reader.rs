//! Reading a frame: verify all of it first, then read the sections into the caller's memory.

use alloc::vec;
use alloc::vec::Vec;

use embedded_io::Read;
use serde::Deserialize;

use crate::crc32c::Crc32c;
use crate::error::{Error, Part};
use crate::layout::{
    CHUNK_BYTES, CRC_BYTES, DIGEST_BYTES, ENTRY_BYTES, Element, FOOTER_BYTES, HEADER_BYTES_MAX, Kind, Meta,
    PREAMBLE_BYTES, Preamble, SECTIONS_MAX, Section, encode_footer, frame_bytes, has_duplicate_names,
    prefix_bytes, u32_at,
};

/// A frame whose every byte was checked. It holds the header and the section table, not the sections.
#[derive(Clone, Debug)]
pub struct Frame {
    meta: Meta,
    header: Vec<u8>,
    sections: Vec<Section>,
    /// Checksum of each section; the second reading must match it.
    section_crcs: Vec<u32>,
    /// Checksum of all bytes before the first section, for the same reason.
    prefix_crc: u32,
}

impl Frame {
    /// Reads the `file_bytes` bytes of a frame and checks all of them. Allocates at most the header (1 MiB) and
    /// the table (4096 entries), and each only once `file_bytes` is known to be large enough.
    ///
    /// # Errors
    /// [`Error::Foreign`], [`Error::Length`], [`Error::Damaged`], [`Error::Version`], [`Error::Io`].
    pub fn verify<R: Read>(input: R, file_bytes: u64) -> Result<Frame, Error<R::Error>> {
        let mut source = Input::new(input);
        let preamble = source.preamble(file_bytes)?;
        let header_bytes = preamble.header_bytes as usize;
        let count = preamble.sections as usize;
        if header_bytes > HEADER_BYTES_MAX || count > SECTIONS_MAX {
            return Err(Error::Damaged(Part::Preamble));
        }
        if prefix_bytes(header_bytes, count) > file_bytes {
            return Err(Error::Length);
        }
        let header = source.part(header_bytes, Part::Header)?;
        let table = source.part(count * ENTRY_BYTES, Part::Table)?;
        let sections = decode_table(&table).ok_or(Error::Damaged(Part::Table))?;
        if frame_bytes(header_bytes, &sections) != Some(file_bytes) {
            return Err(Error::Length);
        }
        let prefix_crc = source.prefix.clone().finish();
        let mut section_crcs = Vec::with_capacity(count);
        for (index, section) in sections.iter().enumerate() {
            let part = Part::Section(index as u32);
            section_crcs.push(source.stream(section.bytes(), part, |_| ())?);
        }
        source.footer(&preamble)?;
        Ok(Frame { meta: preamble.meta, header, sections, section_crcs, prefix_crc })
    }

    /// Kind, schema, generation and base digest.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// What the frame holds.
    pub fn kind(&self) -> Kind {
        self.meta.kind
    }

    /// Digest of the base model.
    pub fn base_digest(&self) -> &[u8; DIGEST_BYTES] {
        &self.meta.base_digest
    }

    /// The header, decoded as the kind's own type.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the bytes aren't such a header, or hold more than one.
    pub fn header<'a, H: Deserialize<'a>, E>(&'a self) -> Result<H, Error<E>> {
        match postcard::take_from_bytes(&self.header) {
            Ok((header, [])) => Ok(header),
            _ => Err(Error::Damaged(Part::Header)),
        }
    }

    /// The section table, in file order.
    pub fn table(&self) -> &[Section] {
        &self.sections
    }

    /// The section called `name`.
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.name() == name)
    }

    /// Starts the second reading, from the first byte of the same file, which hands out the sections.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the file is no longer the verified one, [`Error::Length`],
    /// [`Error::Io`].
    pub fn sections<R: Read>(&self, input: R) -> Result<Sections<'_, R>, Error<R::Error>> {
        let mut source = Input::new(input);
        let mut crc = Crc32c::new();
        source.take(prefix_bytes(self.header.len(), self.sections.len()), |piece| crc.update(piece))?;
        if crc.finish() != self.prefix_crc {
            return Err(Error::Damaged(Part::Preamble));
        }
        Ok(Sections { frame: self, source, index: 0 })
    }
}

/// The sections of a verified frame, read in file order.
pub struct Sections<'f, R> {
    frame: &'f Frame,
    source: Input<R>,
    index: usize,
}

impl<R: Read> Sections<'_, R> {
    /// Fills `out` with the section `name`, skipping those before it.
    ///
    /// # Errors
    /// [`Error::Misuse`] when no such section lies ahead, or its type or length differs; [`Error::Damaged`]
    /// when the file is no longer the verified one (don't use what `out` then holds); [`Error::Length`],
    /// [`Error::Io`].
    pub fn f32(&mut self, name: &str, out: &mut [f32]) -> Result<(), Error<R::Error>> {
        let mut rest = out.iter_mut();
        self.read(name, Element::F32, rest.len(), |bytes| {
            // The chunks come first: zip asks its first iterator first, and must not drop a value.
            for (b, value) in bytes.chunks_exact(4).zip(rest.by_ref()) {
                *value = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        })
    }

    /// Passes the section `name` of `count` binary16 elements to `each`, one bit pattern at a time, so the
    /// caller can convert without a second buffer.
    ///
    /// # Errors
    /// As [`Sections::f32`].
    pub fn f16_bits(
        &mut self,
        name: &str,
        count: usize,
        mut each: impl FnMut(u16),
    ) -> Result<(), Error<R::Error>> {
        self.read(name, Element::F16, count, |bytes| {
            for b in bytes.chunks_exact(2) {
                each(u16::from_le_bytes([b[0], b[1]]));
            }
        })
    }

    /// Fills `out` with the byte section `name`.
    ///
    /// # Errors
    /// As [`Sections::f32`].
    pub fn bytes(&mut self, name: &str, out: &mut [u8]) -> Result<(), Error<R::Error>> {
        let mut at = 0;
        self.read(name, Element::Bytes, out.len(), |bytes| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        })
    }

    /// Skips sections up to `name`, then streams it through `give` in whole elements.
    fn read(
        &mut self,
        name: &str,
        element: Element,
        count: usize,
        mut give: impl FnMut(&[u8]),
    ) -> Result<(), Error<R::Error>> {
        let ahead = self.frame.sections[self.index..].iter().position(|s| s.name() == name);
        let wanted = self.index + ahead.ok_or(Error::Misuse("no section with this name lies ahead"))?;
        let section = self.frame.sections[wanted];
        if section.element() != element || section.count() != count as u64 {
            return Err(Error::Misuse("the section has a different type or length"));
        }
        while self.index < wanted {
            self.one(|_| ())?;
        }
        self.one(&mut give)
    }

    fn one(&mut self, give: impl FnMut(&[u8])) -> Result<(), Error<R::Error>> {
        let part = Part::Section(self.index as u32);
        let crc = self.source.stream(self.frame.sections[self.index].bytes(), part, give)?;
        if crc != self.frame.section_crcs[self.index] {
            return Err(Error::Damaged(part));
        }
        self.index += 1;
        Ok(())
    }
}

fn decode_table(table: &[u8]) -> Option<Vec<Section>> {
    let (entries, _) = table.as_chunks::<ENTRY_BYTES>();
    let sections = entries.iter().map(Section::decode).collect::<Option<Vec<_>>>()?;
    (!has_duplicate_names(&sections)).then_some(sections)
}

/// The input, with its running checksums.
struct Input<R> {
    input: R,
    /// Of every byte before the first section.
    prefix: Crc32c,
    /// Of every part checksum so far.
    seal: Crc32c,
}

impl<R: Read> Input<R> {
    fn new(input: R) -> Self {
        Input { input, prefix: Crc32c::new(), seal: Crc32c::new() }
    }

    fn exact(&mut self, mut out: &mut [u8]) -> Result<(), Error<R::Error>> {
        while !out.is_empty() {
            let n = self.input.read(out).map_err(Error::Io)?;
            if n == 0 || n > out.len() {
                return Err(Error::Length);
            }
            out = &mut out[n..];
        }
        Ok(())
    }

    fn preamble(&mut self, file_bytes: u64) -> Result<Preamble, Error<R::Error>> {
        let mut bytes = [0; PREAMBLE_BYTES];
        // Even a short file can be classified: foreign, or ours but truncated.
        let there = usize::try_from(file_bytes).map_or(PREAMBLE_BYTES, |n| n.min(PREAMBLE_BYTES));
        self.exact(&mut bytes[..there])?;
        let magic = crate::layout::MAGIC;
        if there < PREAMBLE_BYTES && (there == 0 || magic.iter().zip(&bytes[..there]).any(|(a, b)| a != b)) {
            return Err(Error::Foreign);
        }
        if there < PREAMBLE_BYTES {
            return Err(Error::Length);
        }
        self.prefix.update(&bytes);
        self.seal.update(&bytes[PREAMBLE_BYTES - CRC_BYTES..]);
        let preamble = Preamble::decode(&bytes)?;
        if preamble.file_bytes != file_bytes {
            return Err(Error::Length);
        }
        Ok(preamble)
    }

    /// Reads a part of bounded size into memory and checks it.
    fn part(&mut self, bytes: usize, part: Part) -> Result<Vec<u8>, Error<R::Error>> {
        let mut out = vec![0; bytes];
        self.exact(&mut out)?;
        self.prefix.update(&out);
        let crc = self.check_crc(Crc32c::of(&out), part)?;
        self.prefix.update(&crc.to_le_bytes());
        Ok(out)
    }

    /// Streams a part of any size through `give` and checks it; returns its checksum.
    fn stream(
        &mut self,
        bytes: u64,
        part: Part,
        mut give: impl FnMut(&[u8]),
    ) -> Result<u32, Error<R::Error>> {
        let mut crc = Crc32c::new();
        self.take(bytes, |piece| {
            crc.update(piece);
            give(piece);
        })?;
        self.check_crc(crc.finish(), part)
    }

    /// Streams `bytes` bytes in pieces of [`CHUNK_BYTES`] (the last may be shorter): pieces hold
    /// whole elements.
    fn take(&mut self, mut bytes: u64, mut give: impl FnMut(&[u8])) -> Result<(), Error<R::Error>> {
        let mut chunk = [0; CHUNK_BYTES];
        while bytes > 0 {
            let n = usize::try_from(bytes).map_or(CHUNK_BYTES, |n| n.min(CHUNK_BYTES));
            self.exact(&mut chunk[..n])?;
            give(&chunk[..n]);
            bytes -= n as u64;
        }
        Ok(())
    }

    fn check_crc(&mut self, computed: u32, part: Part) -> Result<u32, Error<R::Error>> {
        let mut stored = [0; CRC_BYTES];
        self.exact(&mut stored)?;
        self.seal.update(&stored);
        if u32_at(&stored, 0) != computed {
            return Err(Error::Damaged(part));
        }
        Ok(computed)
    }

    fn footer(&mut self, preamble: &Preamble) -> Result<(), Error<R::Error>> {
        let mut footer = [0; FOOTER_BYTES];
        self.exact(&mut footer)?;
        let seal = self.seal.clone().finish();
        if footer != encode_footer(seal, preamble.meta.generation, preamble.file_bytes) {
            return Err(Error::Damaged(Part::Footer));
        }
        Ok(())
    }
}
