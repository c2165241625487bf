//! What ties an adapter to its base beyond the base's digest.
//!
//! A digest says two files are the same. A fingerprint says they *compute* the same: it records
//! log-probabilities of fixed tokens after fixed tokens, for the base alone and with the adapter. It is taken
//! when the adapter is saved and again when it is loaded ([`crate::probe`]).

use serde::{Deserialize, Serialize};

/// Log-probabilities in a fingerprint.
pub const PROBES: usize = 8;

/// The most, in nats, that two fingerprints of the same computation may differ by. It is thirteen times the
/// largest difference measured between instruction sets in f32 (3e-4; ten quantizations of a 135M-parameter
/// model and eight of two small ones). It is half the smallest difference measured between two files of one
/// model (8.7e-3, a Q4_1 and itself stored as F16; 0.03 between separately quantized files).
pub const TOLERANCE: f32 = 0.004;

/// Negative log-probabilities of [`PROBES`] fixed tokens, each after the fixed tokens before it, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Fingerprint(pub [f32; PROBES]);

impl Fingerprint {
    /// The largest difference between two values; infinite if either is NaN.
    pub fn distance(&self, other: &Fingerprint) -> f32 {
        let differences = self.0.iter().zip(&other.0).map(|(a, b)| (a - b).abs());
        differences.fold(0.0, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) })
    }

    /// Whether both come from the same computation, up to rounding.
    pub fn agrees(&self, other: &Fingerprint) -> bool {
        self.distance(other) <= TOLERANCE
    }

    /// Whether every value is a number.
    pub fn is_finite(&self) -> bool {
        self.0.iter().all(|v| v.is_finite())
    }
}

/// What an adapter file records about its base, and about itself on that base.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Binding {
    /// Digest of the base's chat template.
    pub template: [u8; 32],
    /// Adapted projections whose tensor was found.
    pub matched: usize,
    /// The base alone.
    pub base: Fingerprint,
    /// The base with the adapter.
    pub adapted: Fingerprint,
}
