//! Numbers of f16 in less than 16 bits, without loss.
//!
//! The low byte of an f16 is mantissa, and noise. The high byte is sign, exponent and two bits of mantissa;
//! those of trained weights carry some five bits of information. So the two become planes: the low one is
//! stored as it is, the high one as a deflate stream.

use half::f16;
use miniz_oxide::DataFormat;
use miniz_oxide::deflate::core::{CompressionStrategy, CompressorOxide, TDEFLFlush, compress_to_output};
use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};

/// Bytes compressed at once.
const CHUNK: usize = 1024;
/// What a compressor allocates, rounded up.
const COMPRESSOR_BYTES: usize = 512 << 10;

/// Private bytes that saving `params` parameters as f16 takes while it lasts, at most: their rounded copy,
/// the high plane's stream, and the compressor.
pub fn saving_bytes(params: usize) -> usize {
    params * (size_of::<f32>() + 1) + COMPRESSOR_BYTES
}

/// The bytes of `value` as f16: low, high.
pub(super) fn split(value: f32) -> [u8; 2] {
    f16::from_f32(value).to_le_bytes()
}

/// The value of an f16 of these two bytes.
pub(super) fn join(low: u8, high: u8) -> f32 {
    f16::from_le_bytes([low, high]).to_f32()
}

/// Compresses the high bytes of some `count` f16 numbers.
pub(super) fn deflate(count: usize, mut plane: impl Iterator<Item = u8>) -> Vec<u8> {
    // Noise has no repeats worth a search. Runs it may have: a matrix of zeros.
    let mut compressor = CompressorOxide::with_params(DataFormat::Raw, 9, CompressionStrategy::RLE, 15);
    let mut stream = Vec::with_capacity(count);
    let mut chunk = [0; CHUNK];
    loop {
        let mut filled = 0;
        for (byte, high) in chunk.iter_mut().zip(plane.by_ref()) {
            *byte = high;
            filled += 1;
        }
        let flush = if filled < CHUNK { TDEFLFlush::Finish } else { TDEFLFlush::None };
        // With an output that takes everything, all input is consumed and nothing can fail.
        compress_to_output(&mut compressor, &chunk[..filled], flush, |bytes| {
            stream.extend_from_slice(bytes);
            true
        });
        if filled < CHUNK {
            return stream;
        }
    }
}

/// Expands what [`deflate`] made into `plane`: whether all of `stream` is whole and fills it exactly. Nothing
/// is written or allocated beyond `plane`, whatever the stream claims.
pub(super) fn inflate(stream: &[u8], plane: &mut [u8]) -> bool {
    let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (status, read, written) =
        decompress(&mut Box::<DecompressorOxide>::default(), stream, plane, 0, flags);
    status == TINFLStatus::Done && read == stream.len() && written == plane.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn noise(count: usize) -> Vec<u8> {
        let mut rng = Rng::new(3, 0);
        (0..count).map(|_| split((rng.next_u64() >> 40) as f32 / (1 << 24) as f32 - 0.5)[1]).collect()
    }

    /// What the stream expands to in a buffer of `count` bytes.
    fn expand(stream: &[u8], count: usize) -> Option<Vec<u8>> {
        let mut plane = vec![0; count];
        inflate(stream, &mut plane).then_some(plane)
    }

    #[test]
    fn planes_come_back_to_the_byte() {
        let mixed: Vec<u8> = noise(40_000).into_iter().chain(vec![0; 300_000]).chain(0..=255).collect();
        for count in [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, mixed.len()] {
            let stream = deflate(count, mixed[..count].iter().copied());
            assert_eq!(expand(&stream, count).as_deref(), Some(&mixed[..count]), "{count}");
        }
        let (zeros, noisy) = (deflate(9, [0; 50_000].into_iter()), deflate(9, noise(50_000).into_iter()));
        assert!(zeros.len() < 300 && noisy.len() < 35_000, "{} {}", zeros.len(), noisy.len());
    }

    #[test]
    fn every_f16_splits_and_joins_to_itself() {
        for bits in 0..=u16::MAX {
            let value = f16::from_bits(bits);
            let [low, high] = split(value.to_f32());
            let back = join(low, high);
            assert!(
                back.to_bits() == value.to_f32().to_bits() || value.is_nan() && back.is_nan(),
                "{bits:#x}"
            );
        }
    }

    #[test]
    fn streams_of_another_length_are_refused() {
        let plane = noise(3000);
        let stream = deflate(3000, plane.iter().copied());
        assert!(expand(&stream, 3000).is_some(), "positive control");
        for count in [0, 1, 2999, 3001, 6000] {
            assert_eq!(expand(&stream, count), None, "{count}");
        }
        for cut in 0..stream.len() {
            assert_eq!(expand(&stream[..cut], 3000), None, "cut to {cut}");
        }
        assert_eq!(expand(&[&stream[..], &[0]].concat(), 3000), None, "a byte too many");
        let bomb = deflate(0, std::iter::repeat_n(0, 10_000_000));
        assert!(bomb.len() < 50_000, "{}", bomb.len());
        assert_eq!(expand(&bomb, 3000), None, "a bomb");
    }

    #[test]
    fn flipped_streams_expand_to_nothing_or_to_the_length() {
        let stream = deflate(3000, noise(3000).into_iter());
        let refused = (0..8 * stream.len()).filter(|bit| {
            let mut flipped = stream.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            expand(&flipped, 3000).is_none()
        });
        assert!(refused.count() > stream.len());
    }
}
