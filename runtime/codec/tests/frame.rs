//! A frame round-trips exactly, and nothing but a whole, unchanged frame is accepted.

use engraft_codec::embedded_io::{ErrorKind, ErrorType, Read, Write};
use engraft_codec::{Crc32c, Element, Error, FRAME_VERSION, Frame, Kind, Meta, Part, Section, Writer};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize, Debug, PartialEq, Clone)]
struct Header {
    name: String,
    steps: u64,
    layers: Vec<u32>,
}

const META: Meta = Meta { kind: Kind::ADAPTER, schema: 3, generation: 41, base_digest: [0xa5; 32] };

fn header() -> Header {
    Header { name: "seedling".into(), steps: 300, layers: vec![0, 1, 7] }
}

/// About 4 KiB over three element types and an empty section.
fn sections() -> Vec<Section> {
    let section = |name, element, count| Section::new(name, element, count).unwrap();
    vec![
        section("theta", Element::F32, 700),
        section("none", Element::F32, 0),
        section("half", Element::F16, 301),
        section("rng", Element::Bytes, 129),
    ]
}

fn floats() -> Vec<f32> {
    (0..700).map(|i| (i as f32 - 350.0) * 0.37).collect()
}

fn halves() -> Vec<u16> {
    (0..301).map(|i| i * 211).collect()
}

fn blob() -> Vec<u8> {
    (0..129).map(|i| (i * 7 + 3) as u8).collect()
}

fn sample() -> Vec<u8> {
    let sections = sections();
    let mut writer = Writer::begin(Sink::default(), &META, &header(), &sections).unwrap();
    let declared = writer.file_bytes();
    for piece in floats().chunks(97) {
        writer.f32(piece).unwrap();
    }
    writer.f16_bits(&halves()).unwrap();
    writer.bytes(&blob()).unwrap();
    let bytes = writer.finish().unwrap().bytes;
    assert_eq!(bytes.len() as u64, declared);
    bytes
}

fn verify(bytes: &[u8]) -> Result<Frame, Error<core::convert::Infallible>> {
    Frame::verify(bytes, bytes.len() as u64)
}

#[test]
fn round_trip() {
    let bytes = sample();
    let frame = verify(&bytes).unwrap();
    assert_eq!(*frame.meta(), META);
    assert_eq!(frame.table(), sections());
    assert_eq!(frame.header::<Header, ()>().unwrap(), header());

    let mut read = frame.sections(Trickle { bytes: &bytes, at: 0 }).unwrap();
    let mut theta = vec![0.0; 700];
    read.f32("theta", &mut theta).unwrap();
    assert_eq!(theta, floats());
    let mut half = Vec::new();
    read.f16_bits("half", 301, |bits| half.push(bits)).unwrap();
    assert_eq!(half, halves());
    let mut rng = vec![0; 129];
    read.bytes("rng", &mut rng).unwrap();
    assert_eq!(rng, blob());

    let mut passing_over = frame.sections(&bytes[..]).unwrap();
    passing_over.bytes("rng", &mut rng).unwrap();
    assert_eq!(rng, blob());
    assert!(matches!(passing_over.f32("theta", &mut theta), Err(Error::Misuse(_))));
}

#[test]
fn sections_longer_than_a_chunk_round_trip() {
    let values: Vec<f32> = (0..5000).map(|i| i as f32).collect();
    let sections = [Section::new("theta", Element::F32, 5000).unwrap()];
    let mut writer = Writer::begin(Sink::default(), &META, &header(), &sections).unwrap();
    writer.f32(&values).unwrap();
    let bytes = writer.finish().unwrap().bytes;
    let mut out = vec![0.0; 5000];
    verify(&bytes).unwrap().sections(&bytes[..]).unwrap().f32("theta", &mut out).unwrap();
    assert_eq!(out, values);
}

#[test]
fn layout_is_the_documented_one() {
    let bytes = sample();
    assert_eq!(&bytes[..8], b"ENGRAFT\x1a");
    assert_eq!(bytes[8..10], FRAME_VERSION.to_le_bytes());
    assert_eq!(&bytes[12..16], b"ADPT");
    assert_eq!(bytes[16..24], 41u64.to_le_bytes());
    assert_eq!(bytes[24..32], (bytes.len() as u64).to_le_bytes());
    assert_eq!(&bytes[bytes.len() - 12..bytes.len() - 4], b"\x1aTFARGNE");
    // The check value of CRC-32C in the usual catalogues.
    assert_eq!(Crc32c::of(b"123456789"), 0xe306_9283);
}

#[test]
fn every_flipped_bit_is_refused() {
    let good = sample();
    assert!(good.len() > 3500 && good.len() < 4500, "{}", good.len());
    assert!(verify(&good).is_ok());
    let mut bytes = good.clone();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            bytes[at] ^= 1 << bit;
            assert!(verify(&bytes).is_err(), "bit {bit} of byte {at}");
            bytes[at] ^= 1 << bit;
        }
    }
    assert_eq!(bytes, good);
}

#[test]
fn every_prefix_and_every_extension_is_refused() {
    let good = sample();
    for len in 0..good.len() {
        assert!(verify(&good[..len]).is_err(), "{len} bytes");
        // The file system's length is right, the data ends early (a file cut under the reader).
        assert!(Frame::verify(&good[..len], good.len() as u64).is_err(), "{len} bytes behind a full length");
    }
    let mut longer = good.clone();
    longer.push(0);
    assert_eq!(verify(&longer).unwrap_err(), Error::Length);
}

#[test]
fn damage_is_named_by_part() {
    let good = sample();
    let flipped = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        verify(&bytes).unwrap_err()
    };
    assert_eq!(flipped(3), Error::Foreign);
    assert_eq!(flipped(9), Error::Damaged(Part::Preamble));
    assert_eq!(flipped(85), Error::Damaged(Part::Header));
    assert_eq!(flipped(good.len() - 1), Error::Damaged(Part::Footer));
    assert_eq!(flipped(good.len() - 40), Error::Damaged(Part::Section(3)));
    assert_eq!(verify(b"GGUF").unwrap_err(), Error::Foreign);
    assert_eq!(verify(&good[..20]).unwrap_err(), Error::Length);
}

#[test]
fn a_newer_version_is_told_from_damage() {
    let mut bytes = sample();
    bytes[8] = 2;
    let crc = Crc32c::of(&bytes[..76]);
    bytes[76..80].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(verify(&bytes).unwrap_err(), Error::Version { found: 2 });
}

#[test]
fn huge_declared_sizes_are_refused_before_any_allocation() {
    // Fields of the preamble, resealed with a right checksum: only the bounds stand in the way.
    for (at, value) in [(64, u32::MAX), (64, 1 << 20), (68, u32::MAX), (68, 4096)] {
        let mut bytes = sample();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let crc = Crc32c::of(&bytes[..76]);
        bytes[76..80].copy_from_slice(&crc.to_le_bytes());
        assert!(verify(&bytes).is_err());
    }
}

#[test]
fn lying_section_tables_are_refused() {
    let header_bytes = u32::from_le_bytes(sample()[64..68].try_into().unwrap()) as usize;
    let table = 80 + header_bytes + 4;
    let end = table + 4 * 32;
    let with = |edit: &dyn Fn(&mut [u8])| {
        let mut bytes = sample();
        edit(&mut bytes[table..end]);
        let crc = Crc32c::of(&bytes[table..end]);
        bytes[end..end + 4].copy_from_slice(&crc.to_le_bytes());
        verify(&bytes).unwrap_err()
    };
    assert_eq!(with(&|t| t[24..32].fill(0xff)), Error::Damaged(Part::Table));
    assert_eq!(with(&|t| t[24] ^= 1), Error::Length);
    assert_eq!(with(&|t| t[20] = 9), Error::Damaged(Part::Table));
    assert_eq!(with(&|t| t[0] = 0), Error::Damaged(Part::Table));
    assert_eq!(with(&|t| t.copy_within(0..20, 64)), Error::Damaged(Part::Table));
    // A table that is right in itself, but not the one this file was sealed with.
    assert_eq!(with(&|t| t[0] = b'x'), Error::Damaged(Part::Footer));
}

#[test]
fn a_file_changed_between_the_readings_is_noticed() {
    let good = sample();
    let frame = verify(&good).unwrap();
    let mut theta = vec![0.0; 700];
    let mut swapped = good.clone();
    swapped[17] ^= 1;
    assert!(frame.sections(&swapped[..]).is_err());
    // A wholly valid file with another first section.
    let sections = sections();
    let mut writer = Writer::begin(Sink::default(), &META, &header(), &sections).unwrap();
    writer.f32(&[1.5; 700]).unwrap();
    writer.f16_bits(&halves()).unwrap();
    writer.bytes(&blob()).unwrap();
    let other = writer.finish().unwrap().bytes;
    assert!(verify(&other).is_ok());
    let mut read = frame.sections(&other[..]).unwrap();
    assert_eq!(read.f32("theta", &mut theta).unwrap_err(), Error::Damaged(Part::Section(0)));
}

#[test]
fn the_writer_holds_its_caller_to_the_table() {
    let sections = sections();
    let begin = || Writer::begin(Sink::default(), &META, &header(), &sections).unwrap();
    assert!(matches!(begin().f32(&[0.0; 701]), Err(Error::Misuse(_))));
    assert!(matches!(begin().f16_bits(&[0]), Err(Error::Misuse(_))));
    let mut short = begin();
    short.f32(&[0.0; 699]).unwrap();
    assert!(matches!(short.finish(), Err(Error::Misuse(_))));
    let twice = [sections[0], sections[0]];
    assert!(matches!(Writer::begin(Sink::default(), &META, &(), &twice), Err(Error::Misuse(_))));
    let large = vec![0u8; (1 << 20) + 1];
    assert!(matches!(Writer::begin(Sink::default(), &META, &large, &[]), Err(Error::Limit(Part::Header))));
    assert!(Section::new("a name with blanks", Element::F32, 1).is_none());
    assert!(Section::new("theta", Element::F32, u64::MAX).is_none());
}

#[test]
fn a_failing_output_is_an_error_at_every_write() {
    let sections = sections();
    for room in 0..sample().len() {
        let sink = Sink { bytes: Vec::new(), room: Some(room) };
        let result = Writer::begin(sink, &META, &header(), &sections).and_then(|mut writer| {
            writer.f32(&floats())?;
            writer.f16_bits(&halves())?;
            writer.bytes(&blob())?;
            writer.finish()
        });
        assert!(matches!(result, Err(Error::Io(ErrorKind::Other))), "room for {room} bytes");
    }
}

#[test]
fn a_header_of_another_shape_is_refused() {
    let bytes = sample();
    let frame = verify(&bytes).unwrap();
    assert_eq!(frame.header::<u8, ()>().unwrap_err(), Error::Damaged(Part::Header));
}

/// Takes bytes in small pieces; fails once `room` is used up.
#[derive(Default)]
struct Sink {
    bytes: Vec<u8>,
    room: Option<usize>,
}

impl ErrorType for Sink {
    type Error = ErrorKind;
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> Result<usize, ErrorKind> {
        let room = self.room.map_or(usize::MAX, |room| room - self.bytes.len());
        let n = bytes.len().min(1000).min(room);
        if n == 0 {
            return Err(ErrorKind::Other);
        }
        self.bytes.extend_from_slice(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> Result<(), ErrorKind> {
        Ok(())
    }
}

/// Gives bytes in pieces of changing size.
struct Trickle<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl ErrorType for Trickle<'_> {
    type Error = ErrorKind;
}

impl Read for Trickle<'_> {
    fn read(&mut self, out: &mut [u8]) -> Result<usize, ErrorKind> {
        let n = out.len().min(1 + self.at % 13).min(self.bytes.len() - self.at);
        out[..n].copy_from_slice(&self.bytes[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}
