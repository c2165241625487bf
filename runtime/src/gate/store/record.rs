//! The two small files that hold a store together, a generation's manifest and the pointer to the active
//! one: a JSON object on one line, and on the next its CRC32C, so that a cut or a flipped bit is noticed
//! before anything is believed.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use engraft_codec::Crc32c;

use crate::error::{Error, ErrorKind, Result, told};

/// Version of both records.
const FORMAT: u32 = 1;
/// Between a record and its sum.
const SUM: &str = "crc32c ";

/// A file of a generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Its name within the generation.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// SHA-256 of its content.
    #[serde(with = "hexadecimal")]
    pub sha256: [u8; 32],
}

impl FileRecord {
    /// The record of a file that is in memory.
    pub(super) fn of(name: &str, content: &[u8]) -> FileRecord {
        let sha256 = Sha256::digest(content).into();
        FileRecord { name: name.into(), bytes: content.len() as u64, sha256 }
    }
}

/// What a generation puts beside its base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContentKind {
    /// An adapter.
    Adapter,
    /// Examples that go before every prompt.
    FewShot,
    /// Nothing: the base alone was best.
    Base,
}

/// A generation, as its manifest describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generation {
    format: u32,
    /// Its number: 1 for a store's first, and never given twice.
    #[serde(rename = "generation")]
    pub number: u64,
    /// What it puts beside the base.
    pub content: ContentKind,
    /// Digest of the base it was made for.
    #[serde(with = "hexadecimal")]
    pub base: [u8; 32],
    /// The generation that was active when this one was promoted.
    pub previous: Option<u64>,
    /// Whether it was only tried: kept for its figures, and never active.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tried: bool,
    /// Its files, without the manifest.
    pub files: Vec<FileRecord>,
}

impl Generation {
    pub(super) fn new(
        number: u64,
        content: ContentKind,
        base: [u8; 32],
        (previous, tried): (Option<u64>, bool),
        files: Vec<FileRecord>,
    ) -> Generation {
        Generation { format: FORMAT, number, content, base, previous, tried, files }
    }

    /// Bytes of its files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().fold(0, |sum, f| sum.saturating_add(f.bytes))
    }
}

/// Which generation is active.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pointer {
    format: u32,
    pub(super) generation: u64,
    /// Where a rollback leads.
    pub(super) previous: Option<u64>,
    /// The highest number ever given, so that no number comes twice though its generation was pruned.
    pub(super) highest: u64,
    /// The active generation's files, its manifest among them.
    pub(super) files: Vec<FileRecord>,
}

impl Pointer {
    pub(super) fn new(
        generation: u64,
        previous: Option<u64>,
        highest: u64,
        files: Vec<FileRecord>,
    ) -> Pointer {
        Pointer { format: FORMAT, generation, previous, highest, files }
    }
}

/// The bytes of a record.
///
/// # Errors
/// None in practice: the records hold nothing that JSON can't.
pub(super) fn encode(record: &impl Serialize) -> Result<Vec<u8>> {
    let failed = |e: serde_json::Error| Error::new(ErrorKind::Misuse, format!("a record of a store: {e}"));
    let mut bytes = serde_json::to_vec(record).map_err(failed)?;
    bytes.push(b'\n');
    let sum = Crc32c::of(&bytes);
    bytes.extend_from_slice(format!("{SUM}{sum:08x}\n").as_bytes());
    Ok(bytes)
}

/// The record that the bytes hold, and nothing else.
///
/// # Errors
/// [`ErrorKind::Corrupt`], [`ErrorKind::Unsupported`] for a whole record of a newer format.
pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    let corrupt = |problem: String| Error::new(ErrorKind::Corrupt, problem);
    let split = bytes.len().checked_sub(SUM.len() + 9).filter(|at| *at > 0);
    let (body, tail) = bytes.split_at(split.ok_or_else(|| corrupt("cut short".into()))?);
    if tail != format!("{SUM}{:08x}\n", Crc32c::of(body)).as_bytes() {
        return Err(corrupt("its checksum does not match: cut or damaged".into()));
    }
    let parse = |e: serde_json::Error| corrupt(told(e));
    let Version { format } = serde_json::from_slice(body).map_err(parse)?;
    if format != FORMAT {
        let message = format!("format {format}, where this version knows {FORMAT}; update Engraft");
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    serde_json::from_slice(body).map_err(parse)
}

/// 32 bytes in lowercase hexadecimal.
pub(super) mod hexadecimal {
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::hex;

    pub fn serialize<S: Serializer>(bytes: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(bytes))
    }

    pub fn deserialize<'d, D: Deserializer<'d>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(deserializer)?;
        hex::decode(&text).ok_or_else(|| D::Error::custom("a digest must have 64 hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cut_and_every_flipped_bit_is_noticed() {
        let pointer = Pointer::new(7, Some(5), 9, vec![FileRecord::of("adapter.engraft", b"x")]);
        let bytes = encode(&pointer).unwrap();
        assert_eq!(decode::<Pointer>(&bytes).unwrap(), pointer);
        for cut in 0..bytes.len() {
            assert!(decode::<Pointer>(&bytes[..cut]).is_err(), "{cut}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode::<Pointer>(&flipped).is_err(), "{bit}");
        }
    }

    #[test]
    fn a_newer_format_is_no_damage() {
        let newer = serde_json::json!({ "format": 2, "whatever": 1 });
        assert_eq!(decode::<Pointer>(&encode(&newer).unwrap()).unwrap_err().kind(), ErrorKind::Unsupported);
        let name = format!("whatever\u{1b}[2J{}", "z".repeat(9999));
        let foreign = serde_json::json!({ "format": 1, (name): 1 });
        let error = decode::<Pointer>(&encode(&foreign).unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(!error.message().contains('\u{1b}') && error.message().len() < 999, "{error:?}");
    }
}
