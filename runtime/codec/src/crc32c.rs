//! CRC32C (Castagnoli), the checksum of every part of a frame.

use crc::{CRC_32_ISCSI, Crc, Digest, Table};

// Sixteen tables (16 KiB): a checkpoint of tens of megabytes is summed twice per commit.
static TABLES: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

/// A running CRC32C.
#[derive(Clone)]
pub struct Crc32c(Digest<'static, u32, Table<16>>);

impl Crc32c {
    /// The sum of no bytes yet.
    pub fn new() -> Self {
        Crc32c(TABLES.digest())
    }

    /// Adds bytes to the sum.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The sum of all bytes added.
    pub fn finish(self) -> u32 {
        self.0.finalize()
    }

    /// The sum of one slice.
    pub fn of(bytes: &[u8]) -> u32 {
        TABLES.checksum(bytes)
    }
}

impl Default for Crc32c {
    fn default() -> Self {
        Crc32c::new()
    }
}
