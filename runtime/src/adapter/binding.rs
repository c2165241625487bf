//! What ties an adapter to its base beyond the base's digest.
//!
//! A digest says that files are the same. The fingerprint says that they *compute* the same: the log-probabilities of fixed
//! tokens after fixed tokens, of the base alone and with the adapter, taken when the adapter is saved and again when it is
//! loaded ([`crate::probe`]).

/// Log-probabilities of a fingerprint.
pub const PROBES: usize = 8;

/// Nats that two fingerprints of the same computation may differ by: thirteen times what instruction sets
/// were seen to differ by in f32 (3e-4, ten quantizations of a model of 135M parameters and eight of two
/// small ones), and half of the least that separated two files of one model (8.7e-3, a Q4_1 and itself
/// stored as F16; 0.03 between files quantized apart).
pub const TOLERANCE: f32 = 0.004;

/// Negative log-probabilities of [`PROBES`] fixed tokens, each after the fixed tokens before it, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Fingerprint(pub [f32; PROBES]);

impl Fingerprint {
    /// The largest difference of a value; infinite where one isn't a number.
    pub fn distance(&self, other: &Fingerprint) -> f32 {
        let differences = self.0.iter().zip(&other.0).map(|(a, b)| (a - b).abs());
        differences.fold(0.0, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) })
    }

    /// Whether both are of the same computation, up to rounding.
    pub fn agrees(&self, other: &Fingerprint) -> bool {
        self.distance(other) <= TOLERANCE
    }

    /// Whether every value is a number.
    pub fn is_finite(&self) -> bool {
        self.0.iter().all(|v| v.is_finite())
    }
}

/// What an adapter file says of the base and of itself on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Binding {
    /// Digest of the base's chat template.
    pub template: [u8; 32],
    /// Adapted projections that found their tensor.
    pub matched: usize,
    /// The base alone.
    pub base: Fingerprint,
    /// The base with the adapter.
    pub adapted: Fingerprint,
}
