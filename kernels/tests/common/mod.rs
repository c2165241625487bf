//! Seeded inputs and comparisons that the kernel tests share.
#![allow(dead_code, reason = "each test binary uses its own part")]

use engraft_kernels::{DType, QMatrix};

/// SplitMix64 (Steele, Lea & Flood 2014).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in −1..1.
    pub fn f32(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn vec(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.f32()).collect()
    }
}

/// Offsets of the f16 scales within a block.
fn scale_offsets(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => &[],
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::IQ4_NL | DType::IQ4_XS => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
    }
}

/// Random bytes of a matrix, with scales that keep elements near ±1.
pub fn random_bytes(dtype: DType, rows: usize, cols: usize, rng: &mut Rng) -> Vec<u8> {
    let n = rows * dtype.row_bytes(cols).expect("a shape the type can hold");
    match dtype {
        DType::F32 => return (0..rows * cols).flat_map(|_| rng.f32().to_le_bytes()).collect(),
        DType::F16 => {
            return (0..rows * cols).flat_map(|_| half::f16::from_f32(rng.f32()).to_le_bytes()).collect();
        }
        DType::BF16 => {
            return (0..rows * cols).flat_map(|_| half::bf16::from_f32(rng.f32()).to_le_bytes()).collect();
        }
        _ => {}
    }
    let mut bytes: Vec<u8> = (0..n).map(|_| rng.next() as u8).collect();
    let size = match dtype {
        DType::Q8_0 | DType::IQ4_NL => 0.01,
        DType::Q4_K | DType::Q5_K | DType::IQ4_XS => 0.002,
        DType::Q6_K => 0.0005,
        _ => 0.02,
    };
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        for at in scale_offsets(dtype) {
            let s = half::f16::from_f32(size * (0.75 + 0.25 * rng.f32()));
            block[*at..at + 2].copy_from_slice(&s.to_le_bytes());
        }
    }
    bytes
}

pub fn view(dtype: DType, rows: usize, cols: usize, bytes: &[u8]) -> QMatrix<'_> {
    QMatrix::new(dtype, rows, cols, bytes).expect("bytes of that shape")
}

/// Asserts |a − b| ≤ tol·(1 + largest |b|) for each element.
pub fn assert_close(what: &str, a: &[f32], b: &[f32], tol: f32) {
    assert_eq!(a.len(), b.len(), "{what}");
    let top = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        assert!(
            (x - y).abs() <= tol * (1.0 + top),
            "{what}: element {i} is {x}, expected {y} (largest {top})"
        );
    }
}
