//! Writing a frame in one pass.

use embedded_io::Write;
use serde::Serialize;

use crate::crc32c::Crc32c;
use crate::error::{Error, Part};
use crate::layout::{
    CHUNK_BYTES, Element, HEADER_BYTES_MAX, Meta, Preamble, SECTIONS_MAX, Section, encode_footer,
    frame_bytes, has_duplicate_names,
};

/// Writes a frame: begin with the section table, append each section's elements in its order (in as
/// many pieces as the caller likes), finish. After an error the output is incomplete: discard it.
pub struct Writer<'s, W> {
    out: W,
    sections: &'s [Section],
    index: usize,
    /// Bytes still missing from the section at `index`.
    left: u64,
    crc: Crc32c,
    seal: Crc32c,
    generation: u64,
    file_bytes: u64,
}

impl<'s, W: Write> Writer<'s, W> {
    /// Writes the preamble, the header and the table of `sections`.
    ///
    /// # Errors
    /// [`Error::Limit`] for a header beyond 1 MiB or too many sections, [`Error::Misuse`] for a name
    /// used twice, [`Error::Io`].
    pub fn begin<H: Serialize + ?Sized>(
        out: W,
        meta: &Meta,
        header: &H,
        sections: &'s [Section],
    ) -> Result<Self, Error<W::Error>> {
        let header =
            postcard::to_allocvec(header).map_err(|_| Error::Misuse("header is not serializable"))?;
        if header.len() > HEADER_BYTES_MAX {
            return Err(Error::Limit(Part::Header));
        }
        if sections.len() > SECTIONS_MAX {
            return Err(Error::Limit(Part::Table));
        }
        if has_duplicate_names(sections) {
            return Err(Error::Misuse("two sections share a name"));
        }
        let file_bytes = frame_bytes(header.len(), sections).ok_or(Error::Limit(Part::Table))?;
        let preamble = Preamble {
            meta: *meta,
            file_bytes,
            header_bytes: header.len() as u32,
            sections: sections.len() as u32,
        };
        let (crc, seal) = (Crc32c::new(), Crc32c::new());
        let generation = meta.generation;
        let mut writer = Writer { out, sections, index: 0, left: 0, crc, seal, generation, file_bytes };
        writer.preamble(&preamble)?;
        writer.append(&header)?;
        writer.close_part()?;
        for section in sections {
            writer.append(&section.encode())?;
        }
        writer.close_part()?;
        writer.open_section()?;
        Ok(writer)
    }

    /// Bytes of the finished frame.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Appends elements to the current section, which must be [`Element::F32`].
    ///
    /// # Errors
    /// [`Error::Misuse`] for another element type or more elements than declared, [`Error::Io`].
    pub fn f32(&mut self, values: &[f32]) -> Result<(), Error<W::Error>> {
        self.elements(Element::F32, values, f32::to_le_bytes)
    }

    /// Appends elements, as bit patterns, to the current section, which must be [`Element::F16`].
    ///
    /// # Errors
    /// As [`Writer::f32`].
    pub fn f16_bits(&mut self, values: &[u16]) -> Result<(), Error<W::Error>> {
        self.elements(Element::F16, values, u16::to_le_bytes)
    }

    fn elements<T: Copy, const N: usize>(
        &mut self,
        element: Element,
        values: &[T],
        encode: fn(T) -> [u8; N],
    ) -> Result<(), Error<W::Error>> {
        self.claim(element, values.len())?;
        let mut chunk = [0; CHUNK_BYTES];
        for piece in values.chunks(CHUNK_BYTES / N) {
            for (bytes, value) in chunk.as_chunks_mut().0.iter_mut().zip(piece) {
                *bytes = encode(*value);
            }
            self.append(&chunk[..piece.len() * N])?;
        }
        self.end_if_full()
    }

    /// Appends bytes to the current section, which must be [`Element::Bytes`].
    ///
    /// # Errors
    /// As [`Writer::f32`].
    pub fn bytes(&mut self, values: &[u8]) -> Result<(), Error<W::Error>> {
        self.claim(Element::Bytes, values.len())?;
        self.append(values)?;
        self.end_if_full()
    }

    /// Writes the footer, flushes, and returns the output.
    ///
    /// # Errors
    /// [`Error::Misuse`] when a section lacks elements, [`Error::Io`].
    pub fn finish(mut self) -> Result<W, Error<W::Error>> {
        if self.index < self.sections.len() {
            return Err(Error::Misuse("a section has fewer elements than declared"));
        }
        let footer = encode_footer(self.seal.clone().finish(), self.generation, self.file_bytes);
        write_all(&mut self.out, &footer)?;
        self.out.flush().map_err(Error::Io)?;
        Ok(self.out)
    }

    /// The preamble carries its own checksum within its bytes.
    fn preamble(&mut self, preamble: &Preamble) -> Result<(), Error<W::Error>> {
        let bytes = preamble.encode();
        self.seal.update(&bytes[bytes.len() - 4..]);
        write_all(&mut self.out, &bytes)
    }

    /// Claims room for `count` elements in the current section.
    fn claim(&mut self, element: Element, count: usize) -> Result<(), Error<W::Error>> {
        if count == 0 {
            return Ok(());
        }
        let section = self.sections.get(self.index).ok_or(Error::Misuse("every section is already full"))?;
        if section.element() != element {
            return Err(Error::Misuse("the section has a different element type"));
        }
        let bytes = (count as u64).checked_mul(element.size() as u64);
        let left = bytes.and_then(|bytes| self.left.checked_sub(bytes));
        self.left = left.ok_or(Error::Misuse("more elements than the section declares"))?;
        Ok(())
    }

    fn end_if_full(&mut self) -> Result<(), Error<W::Error>> {
        if self.left == 0 && self.index < self.sections.len() {
            self.close_part()?;
            self.index += 1;
            self.open_section()?;
        }
        Ok(())
    }

    /// Sets `left` for the section at `index`, closing empty sections on the way.
    fn open_section(&mut self) -> Result<(), Error<W::Error>> {
        while let Some(section) = self.sections.get(self.index) {
            self.left = section.bytes();
            if self.left > 0 {
                break;
            }
            self.close_part()?;
            self.index += 1;
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), Error<W::Error>> {
        self.crc.update(bytes);
        write_all(&mut self.out, bytes)
    }

    fn close_part(&mut self) -> Result<(), Error<W::Error>> {
        let crc = core::mem::take(&mut self.crc).finish().to_le_bytes();
        self.seal.update(&crc);
        write_all(&mut self.out, &crc)
    }
}

fn write_all<W: Write>(out: &mut W, mut bytes: &[u8]) -> Result<(), Error<W::Error>> {
    while !bytes.is_empty() {
        let n = out.write(bytes).map_err(Error::Io)?;
        if n == 0 {
            return Err(Error::WriteZero);
        }
        bytes = bytes.get(n..).ok_or(Error::WriteZero)?;
    }
    Ok(())
}
