//! Checksums of a changed frame set right, so that a reader looks at what they cover.

use engraft_codec::Crc32c;

/// Sets all checksums of a frame of one section by the length of its header and of itself; `None` where it
/// is too short for that.
pub fn reseal(bytes: &mut [u8]) -> Option<()> {
    let header = u32::from_le_bytes(bytes.get(64..68)?.try_into().ok()?);
    let header = usize::try_from(header).ok().filter(|n| *n < bytes.len())?;
    let (table, end) = (80 + header + 4, bytes.len().checked_sub(32)?);
    if end < table + 36 + 4 {
        return None;
    }
    let mut seal = Crc32c::new();
    let mut sum = |bytes: &mut [u8], from: usize, to: usize| {
        let crc = Crc32c::of(&bytes[from..to]).to_le_bytes();
        bytes[to..to + 4].copy_from_slice(&crc);
        seal.update(&crc);
    };
    sum(bytes, 0, 76);
    sum(bytes, 80, 80 + header);
    sum(bytes, table, table + 32);
    sum(bytes, table + 36, end - 4);
    let generation: [u8; 8] = bytes[16..24].try_into().ok()?;
    bytes[end..end + 4].copy_from_slice(&seal.finish().to_le_bytes());
    bytes[end + 4..end + 12].copy_from_slice(&generation);
    let crc = Crc32c::of(&bytes[end..end + 28]).to_le_bytes();
    bytes[end + 28..].copy_from_slice(&crc);
    Some(())
}
