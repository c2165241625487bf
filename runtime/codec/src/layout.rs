//! The fixed parts of a frame as bytes: preamble, table entries, footer, and the sizes of all.

use crate::FRAME_VERSION;
use crate::crc32c::Crc32c;
use crate::error::{Error, Part};

/// Largest postcard header in bytes: a reader on a small device must be able to hold it.
pub const HEADER_BYTES_MAX: usize = 1 << 20;
/// Most sections of a frame.
pub const SECTIONS_MAX: usize = 4096;
/// Longest section name in bytes.
pub const NAME_BYTES_MAX: usize = 20;
/// Bytes of the digest of the base model.
pub const DIGEST_BYTES: usize = 32;

pub(crate) const MAGIC: [u8; 8] = *b"ENGRAFT\x1a";
pub(crate) const END_MAGIC: [u8; 8] = *b"\x1aTFARGNE";
pub(crate) const PREAMBLE_BYTES: usize = 80;
pub(crate) const ENTRY_BYTES: usize = 32;
pub(crate) const CRC_BYTES: usize = 4;
pub(crate) const FOOTER_BYTES: usize = 32;
/// Bytes converted or summed at once, on the stack.
pub(crate) const CHUNK_BYTES: usize = 4096;

/// What a frame holds: four ASCII letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kind(pub [u8; 4]);

impl Kind {
    /// A trained adapter.
    pub const ADAPTER: Kind = Kind(*b"ADPT");
    /// A training checkpoint.
    pub const CHECKPOINT: Kind = Kind(*b"CKPT");
    /// Protected directions: A of every projection, before any training.
    pub const DIRECTIONS: Kind = Kind(*b"DIRS");
}

/// What a frame says about itself ahead of its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    /// What the frame holds.
    pub kind: Kind,
    /// Version of the kind's header and sections.
    pub schema: u16,
    /// Numbers the successive files under one name. The higher number is the newer file; no clock is consulted.
    pub generation: u64,
    /// Digest of the base model the content belongs to.
    pub base_digest: [u8; DIGEST_BYTES],
}

/// Element type of a section; the discriminant is its code in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// Uninterpreted bytes.
    Bytes = 0,
    /// IEEE 754 binary32.
    F32 = 1,
    /// IEEE 754 binary16.
    F16 = 2,
}

impl Element {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Element::Bytes => 1,
            Element::F32 => 4,
            Element::F16 => 2,
        }
    }

    fn from_code(code: u32) -> Option<Element> {
        [Element::Bytes, Element::F32, Element::F16].into_iter().find(|e| *e as u32 == code)
    }
}

/// One named run of elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    name: [u8; NAME_BYTES_MAX],
    element: Element,
    count: u64,
}

impl Section {
    /// A section called `name` (1 to 20 printable ASCII bytes) of `count` elements; `None` for any other name,
    /// or if the size overflows u64.
    pub fn new(name: &str, element: Element, count: u64) -> Option<Section> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(|b| b.is_ascii_graphic()) {
            return None;
        }
        count.checked_mul(element.size() as u64)?;
        let mut padded = [0; NAME_BYTES_MAX];
        padded[..name.len()].copy_from_slice(name.as_bytes());
        Some(Section { name: padded, element, count })
    }

    /// The section's name.
    pub fn name(&self) -> &str {
        let len = self.name.iter().position(|&b| b == 0).unwrap_or(NAME_BYTES_MAX);
        // A name is ASCII by construction.
        core::str::from_utf8(&self.name[..len]).unwrap_or("")
    }

    /// Type of its elements.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Number of elements.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Bytes of all elements.
    pub fn bytes(&self) -> u64 {
        // Checked when the section was made.
        self.count * self.element.size() as u64
    }

    pub(crate) fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut out = [0; ENTRY_BYTES];
        out[..20].copy_from_slice(&self.name);
        out[20..24].copy_from_slice(&(self.element as u32).to_le_bytes());
        out[24..].copy_from_slice(&self.count.to_le_bytes());
        out
    }

    pub(crate) fn decode(entry: &[u8; ENTRY_BYTES]) -> Option<Section> {
        let name = &entry[..NAME_BYTES_MAX];
        let len = name.iter().position(|&b| b == 0).unwrap_or(NAME_BYTES_MAX);
        if name[len..].iter().any(|&b| b != 0) {
            return None;
        }
        let element = Element::from_code(u32_at(entry, 20))?;
        Section::new(core::str::from_utf8(&name[..len]).ok()?, element, u64_at(entry, 24))
    }
}

/// The decoded preamble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Preamble {
    pub(crate) meta: Meta,
    pub(crate) file_bytes: u64,
    pub(crate) header_bytes: u32,
    pub(crate) sections: u32,
}

impl Preamble {
    pub(crate) fn encode(&self) -> [u8; PREAMBLE_BYTES] {
        let mut out = [0; PREAMBLE_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..10].copy_from_slice(&FRAME_VERSION.to_le_bytes());
        out[10..12].copy_from_slice(&self.meta.schema.to_le_bytes());
        out[12..16].copy_from_slice(&self.meta.kind.0);
        out[16..24].copy_from_slice(&self.meta.generation.to_le_bytes());
        out[24..32].copy_from_slice(&self.file_bytes.to_le_bytes());
        out[32..64].copy_from_slice(&self.meta.base_digest);
        out[64..68].copy_from_slice(&self.header_bytes.to_le_bytes());
        out[68..72].copy_from_slice(&self.sections.to_le_bytes());
        let crc = Crc32c::of(&out[..76]);
        out[76..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    pub(crate) fn decode<E>(b: &[u8; PREAMBLE_BYTES]) -> Result<Preamble, Error<E>> {
        if b[..8] != MAGIC {
            return Err(Error::Foreign);
        }
        if Crc32c::of(&b[..76]) != u32_at(b, 76) {
            return Err(Error::Damaged(Part::Preamble));
        }
        let version = u16_at(b, 8);
        if version != FRAME_VERSION {
            return Err(Error::Version { found: version });
        }
        if u32_at(b, 72) != 0 {
            return Err(Error::Damaged(Part::Preamble));
        }
        let mut kind = [0; 4];
        kind.copy_from_slice(&b[12..16]);
        let mut base_digest = [0; DIGEST_BYTES];
        base_digest.copy_from_slice(&b[32..64]);
        Ok(Preamble {
            meta: Meta { kind: Kind(kind), schema: u16_at(b, 10), generation: u64_at(b, 16), base_digest },
            file_bytes: u64_at(b, 24),
            header_bytes: u32_at(b, 64),
            sections: u32_at(b, 68),
        })
    }
}

/// The footer of a frame of `file_bytes` whose part checksums have the checksum `seal`.
pub(crate) fn encode_footer(seal: u32, generation: u64, file_bytes: u64) -> [u8; FOOTER_BYTES] {
    let mut out = [0; FOOTER_BYTES];
    out[..4].copy_from_slice(&seal.to_le_bytes());
    out[4..12].copy_from_slice(&generation.to_le_bytes());
    out[12..20].copy_from_slice(&file_bytes.to_le_bytes());
    out[20..28].copy_from_slice(&END_MAGIC);
    let crc = Crc32c::of(&out[..28]);
    out[28..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Bytes before the first section: preamble, header, table. No overflow: all three are bounded.
pub(crate) fn prefix_bytes(header_bytes: usize, sections: usize) -> u64 {
    (PREAMBLE_BYTES + header_bytes + CRC_BYTES + sections * ENTRY_BYTES + CRC_BYTES) as u64
}

/// Bytes of the whole frame, `None` beyond u64.
pub(crate) fn frame_bytes(header_bytes: usize, sections: &[Section]) -> Option<u64> {
    let mut total = prefix_bytes(header_bytes, sections.len());
    for section in sections {
        total = total.checked_add(section.bytes())?.checked_add(CRC_BYTES as u64)?;
    }
    total.checked_add(FOOTER_BYTES as u64)
}

/// Whether two sections share a name.
pub(crate) fn has_duplicate_names(sections: &[Section]) -> bool {
    let mut names: alloc::vec::Vec<_> = sections.iter().map(|s| s.name).collect();
    names.sort_unstable();
    names.windows(2).any(|pair| pair[0] == pair[1])
}

// Callers pass constant offsets into fixed arrays.
fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

pub(crate) fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}
