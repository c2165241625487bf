//! Decoding of stored blocks: every ISA's version against ggml's formulas, candle and real files.

mod formula;

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use engraft_kernels::scalar::decode as scalar;
use engraft_kernels::{DType, Isa};

/// A small generator (splitmix64), so that every case is reproducible from its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Roughly normal, so that quantizers meet both small and large values.
    fn normal(&mut self) -> f32 {
        (0..4).map(|_| (self.next() >> 40) as f32 / (1 << 24) as f32 - 0.5).sum()
    }
}

/// Offsets of a block's f16 fields.
fn f16_fields(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::IQ4_NL | DType::IQ4_XS | DType::F16 => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
        DType::F32 | DType::BF16 => &[],
    }
}

/// `cols` elements of random bytes whose scales are finite (any f16 but infinities and NaNs).
fn random_row(dtype: DType, cols: usize, random: &mut Random) -> Vec<u8> {
    let mut row: Vec<u8> = (0..dtype.row_bytes(cols).unwrap()).map(|_| random.next() as u8).collect();
    for block in row.chunks_exact_mut(dtype.block_bytes()) {
        for &at in f16_fields(dtype) {
            if block[at + 1] & 0x7c == 0x7c {
                block[at + 1] ^= 0x40;
            }
        }
    }
    row
}

fn is_block(dtype: &DType) -> bool {
    !dtype.is_float()
}

/// Unpacks a range and evaluates `scale · code + bias`.
fn through_codes(isa: Isa, dtype: DType, row: &[u8], start: usize, len: usize) -> Vec<f32> {
    let groups = len / dtype.group_len();
    let (mut codes, mut scale) = (vec![0; len], vec![0.0; groups]);
    let mut bias = vec![0.0; if dtype.has_bias() { groups } else { 0 }];
    isa.unpack(dtype, row, start, &mut codes, &mut scale, &mut bias);
    let value = |k: usize| {
        let g = k / dtype.group_len();
        let product = scale[g] * codes[k] as f32;
        if dtype.has_bias() { product + bias[g] } else { product }
    };
    (0..len).map(value).collect()
}

#[track_caller]
fn assert_same_bits(what: &str, ours: &[f32], expected: &[f32]) {
    assert_eq!(ours.len(), expected.len(), "{what}");
    for (k, (a, b)) in ours.iter().zip(expected).enumerate() {
        // Zeros of either sign are the same weight; NaNs appear only in raw float types.
        let same = a.to_bits() == b.to_bits() || a == b || (a.is_nan() && b.is_nan());
        assert!(same, "{what}: element {k} is {a:e}, not {b:e}");
    }
}

#[test]
fn codes_and_plain_formula_agree_on_random_blocks() {
    let mut random = Random(1);
    for isa in Isa::available() {
        for dtype in DType::ALL.into_iter().filter(is_block) {
            for cols in [256, 768, 2048] {
                let row = random_row(dtype, cols, &mut random);
                let plain = formula::dequantize(dtype, &row);
                let what = format!("{} {} {cols}", isa.name(), dtype.name());
                assert_same_bits(&what, &through_codes(isa, dtype, &row, 0, cols), &plain);
            }
        }
    }
}

#[test]
fn every_range_of_chunks_decodes_as_part_of_the_whole() {
    let mut random = Random(2);
    let cols = 768;
    for isa in Isa::available() {
        for dtype in DType::ALL.into_iter().filter(is_block) {
            let row = random_row(dtype, cols, &mut random);
            let whole = formula::dequantize(dtype, &row);
            for start in (0..=cols).step_by(32) {
                for len in (0..=cols - start).step_by(32) {
                    let what = format!("{} {} {start}+{len}", isa.name(), dtype.name());
                    let expected = &whole[start..start + len];
                    assert_same_bits(&what, &through_codes(isa, dtype, &row, start, len), expected);
                    let mut out = vec![0.0; len];
                    isa.dequantize(dtype, &row, start, &mut out);
                    assert_same_bits(&what, &out, expected);
                }
            }
        }
    }
}

#[test]
fn float_rows_decode_at_any_offset() {
    let mut random = Random(3);
    for isa in Isa::available() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let row = random_row(dtype, 100, &mut random);
            let mut whole = vec![0.0; 100];
            scalar::dequantize(dtype, &row, 0, &mut whole);
            for (start, len) in [(0, 0), (0, 1), (1, 7), (3, 16), (5, 33), (31, 69), (99, 1), (100, 0)] {
                let mut out = vec![0.0; len];
                isa.dequantize(dtype, &row, start, &mut out);
                let what = format!("{} {} {start}+{len}", isa.name(), dtype.name());
                assert_same_bits(&what, &out, &whole[start..start + len]);
            }
        }
    }
}

#[test]
fn candle_dequantizes_its_own_blocks_to_the_same_floats() {
    let types = [
        (GgmlDType::F32, DType::F32),
        (GgmlDType::F16, DType::F16),
        (GgmlDType::BF16, DType::BF16),
        (GgmlDType::Q4_0, DType::Q4_0),
        (GgmlDType::Q4_1, DType::Q4_1),
        (GgmlDType::Q5_0, DType::Q5_0),
        (GgmlDType::Q5_1, DType::Q5_1),
        (GgmlDType::Q8_0, DType::Q8_0),
        (GgmlDType::Q2K, DType::Q2_K),
        (GgmlDType::Q3K, DType::Q3_K),
        (GgmlDType::Q4K, DType::Q4_K),
        (GgmlDType::Q5K, DType::Q5_K),
        (GgmlDType::Q6K, DType::Q6_K),
    ];
    let mut random = Random(4);
    let data: Vec<f32> = (0..4 * 768).map(|_| random.normal()).collect();
    let tensor = Tensor::from_vec(data, (4, 768), &Device::Cpu).unwrap();
    for (theirs, dtype) in types {
        let stored = QTensor::quantize(&tensor, theirs).unwrap();
        let bytes = stored.data().unwrap();
        let expected = stored.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        for isa in Isa::available() {
            let what = format!("{} {}", isa.name(), dtype.name());
            let mut out = vec![0.0; expected.len()];
            isa.dequantize(dtype, &bytes, 0, &mut out);
            assert_same_bits(&what, &out, &expected);
            if is_block(&dtype) {
                assert_same_bits(&what, &through_codes(isa, dtype, &bytes, 0, out.len()), &expected);
            }
        }
    }
}

/// candle lacks the IQ4 types, so their formula stands here once more, from ggml's description:
/// IQ4_XS is eight IQ4_NL chunks with six-bit scales around 32.
#[test]
fn iq4_blocks_follow_the_level_table() {
    const LEVELS: [f32; 16] =
        [-127., -104., -83., -65., -49., -35., -22., -10., 1., 13., 25., 38., 53., 69., 89., 113.];
    // d = 0.5; scales_h gives chunk 5 the high bits 10, scales_l its low nibble 0111: 0b100111 = 39.
    let mut block = [0u8; 136];
    block[0..2].copy_from_slice(&half::f16::from_f32(0.5).to_le_bytes());
    block[2..4].copy_from_slice(&(0b10u16 << 10).to_le_bytes());
    block[4 + 2] = 0x70;
    for (i, byte) in block[8 + 5 * 16..][..16].iter_mut().enumerate() {
        *byte = (i | (15 - i) << 4) as u8;
    }
    for isa in Isa::available() {
        let mut out = [0.0; 256];
        isa.dequantize(DType::IQ4_XS, &block, 0, &mut out);
        let rising = LEVELS.map(|level| 0.5 * 7.0 * level);
        assert_eq!(out[160..176], rising, "{}", isa.name());
        assert!(out[176..192].iter().eq(rising.iter().rev()), "{}", isa.name());
        // A chunk with zero bits has scale −32 and only the lowest level.
        assert!(out[..160].iter().all(|&w| w == 0.5 * -32.0 * -127.0), "{}", isa.name());

        let nl: Vec<u8> = block[0..2].iter().chain(&block[88..104]).copied().collect();
        let mut out = [0.0; 32];
        isa.dequantize(DType::IQ4_NL, &nl, 0, &mut out);
        assert_eq!(out[..16], LEVELS.map(|level| 0.5 * level), "{}", isa.name());
        assert!(out[16..].iter().eq(LEVELS.map(|level| 0.5 * level).iter().rev()), "{}", isa.name());
    }
}

/// The checker itself: a decoder with one wrong bit must not pass.
#[test]
fn a_flipped_bit_is_noticed() {
    let mut random = Random(5);
    for dtype in DType::ALL.into_iter().filter(is_block) {
        let row = random_row(dtype, 256, &mut random);
        let mut other = row.clone();
        let at = dtype.block_bytes() - 9;
        other[at] ^= 0x10;
        let scalar = Isa::SCALAR;
        let (a, b) =
            (through_codes(scalar, dtype, &row, 0, 256), through_codes(scalar, dtype, &other, 0, 256));
        assert_ne!(a, b, "{}", dtype.name());
    }
}

/// Activations in the form that dot products take: codes, scale per 32, scaled sums per group.
struct Activations {
    xq: Vec<i8>,
    xd: Vec<f32>,
    xs: Vec<f32>,
}

/// Codes over the whole of −127..=127, with runs of the extremes so that sums reach their bounds.
fn random_activations(dtype: DType, cols: usize, random: &mut Random) -> Activations {
    let code = |random: &mut Random, k: usize| match k / 64 % 4 {
        0 => 127,
        1 => -127,
        _ => (random.next() as i8).max(-127),
    };
    let xq: Vec<i8> = (0..cols).map(|k| code(random, k)).collect();
    let xd: Vec<f32> = (0..cols / 32).map(|_| random.normal() / 100.0).collect();
    let group = dtype.group_len();
    let sum = |(g, xq): (usize, &[i8])| xd[g * group / 32] * xq.iter().map(|&x| x as f32).sum::<f32>();
    let xs = xq.chunks(group).enumerate().map(sum).collect();
    Activations { xq, xd, xs }
}

/// Blocks as a quantizer makes them: scales of ordinary size, codes anywhere, extremes included.
fn ordinary_row(dtype: DType, cols: usize, random: &mut Random) -> Vec<u8> {
    let mut row = random_row(dtype, cols, random);
    for (i, block) in row.chunks_exact_mut(dtype.block_bytes()).enumerate() {
        if i % 3 == 1 {
            // Every bit set, or none: the greatest and the least code of any layout.
            block.fill(if i % 2 == 0 { 0xff } else { 0 });
        }
        if i % 3 == 1 && dtype == DType::Q8_0 {
            block.fill(0x80);
        }
        for &at in f16_fields(dtype) {
            block[at..at + 2].copy_from_slice(&half::f16::from_f32(random.normal() / 16.0).to_le_bytes());
        }
    }
    row
}

#[test]
fn dot_products_follow_the_dequantized_weights() {
    let mut random = Random(6);
    for isa in Isa::available() {
        for dtype in DType::ALL.into_iter().filter(is_block) {
            for (cols, rows) in [(0, 2), (32, 1), (96, 3), (256, 4), (576, 5), (768, 7), (1536, 9)] {
                let Some(row_bytes) = dtype.row_bytes(cols) else { continue };
                let bytes: Vec<u8> = (0..rows).flat_map(|_| ordinary_row(dtype, cols, &mut random)).collect();
                assert_eq!(bytes.len(), rows * row_bytes);
                let x = random_activations(dtype, cols, &mut random);
                let mut out = vec![f32::NAN; rows];
                isa.dot_rows(dtype, &bytes, &x.xq, &x.xd, &x.xs, &mut out);
                for (r, &out) in out.iter().enumerate() {
                    let mut w = vec![0.0; cols];
                    scalar::dequantize(dtype, &bytes[r * row_bytes..][..row_bytes], 0, &mut w);
                    let term = |k: usize| w[k] as f64 * x.xd[k / 32] as f64 * x.xq[k] as f64;
                    let (sum, size) = (0..cols).map(term).fold((0.0, 0.0), |(s, n), t| (s + t, n + t.abs()));
                    // Integer sums are exact, so only some additions round, relative to their terms.
                    let error = (out as f64 - sum).abs();
                    let what = format!("{} {} {rows}×{cols} row {r}", isa.name(), dtype.name());
                    assert!(error <= 2e-6 * size, "{what}: {out}, not {sum} (of {size})");
                }
            }
        }
    }
}

#[test]
fn a_rows_dot_product_does_not_depend_on_its_neighbours() {
    let mut random = Random(7);
    let (rows, cols) = (11, 768);
    for isa in Isa::available() {
        for dtype in DType::ALL.into_iter().filter(is_block) {
            let bytes: Vec<u8> = (0..rows).flat_map(|_| ordinary_row(dtype, cols, &mut random)).collect();
            let x = random_activations(dtype, cols, &mut random);
            let mut all = vec![0.0; rows];
            isa.dot_rows(dtype, &bytes, &x.xq, &x.xd, &x.xs, &mut all);
            for (row, &expected) in bytes.chunks_exact(bytes.len() / rows).zip(&all) {
                let mut one = [0.0];
                isa.dot_rows(dtype, row, &x.xq, &x.xd, &x.xs, &mut one);
                assert_eq!(one[0].to_bits(), expected.to_bits(), "{} {}", isa.name(), dtype.name());
            }
        }
    }
}

/// The bound of the dot product test is tight enough to notice one code that is off by one.
#[test]
fn an_off_by_one_code_is_noticed() {
    let mut random = Random(8);
    let x = random_activations(DType::Q4_0, 576, &mut random);
    let row = ordinary_row(DType::Q4_0, 576, &mut random);
    let mut w = vec![0.0; 576];
    scalar::dequantize(DType::Q4_0, &row, 0, &mut w);
    let size: f64 = (0..576).map(|k| (w[k] * x.xd[k / 32] * x.xq[k] as f32).abs() as f64).sum();
    let step = half::f16::from_le_bytes([row[0], row[1]]).to_f32();
    assert!((step * x.xd[0] * x.xq[0] as f32).abs() as f64 > 100.0 * 2e-6 * size);
}

#[test]
#[should_panic(expected = "elements of a row of")]
fn a_range_past_the_row_is_refused() {
    scalar::dequantize(DType::Q4_0, &[0; 18], 32, &mut [0.0; 32]);
}

#[test]
#[should_panic(expected = "multiples of 32")]
fn a_range_inside_a_chunk_is_refused() {
    scalar::dequantize(DType::Q4_K, &[0; 144], 16, &mut [0.0; 32]);
}

/// The folder of test models, or `None` with a loud notice.
fn shared(file: &str) -> Option<Vec<u8>> {
    let root = std::env::var_os("ENGRAFT_SHARED").map(PathBuf::from);
    let root = root.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared"));
    let path = root.join("models/babyllama").join(file);
    match std::fs::read(&path) {
        Ok(bytes) => Some(bytes),
        Err(error) => {
            eprintln!("SKIPPED: {}: {error}", path.display());
            None
        }
    }
}

/// Tensors of a trusted GGUF file by name: type, elements, and offset of the data in the file.
fn tensors(file: &[u8]) -> HashMap<String, (u32, usize, usize)> {
    struct Reader<'a>(&'a [u8], usize);
    impl Reader<'_> {
        fn int(&mut self, bytes: usize) -> u64 {
            self.1 += bytes;
            self.0[self.1 - bytes..self.1].iter().rev().fold(0, |n, &b| n << 8 | b as u64)
        }
        fn string(&mut self) -> String {
            let len = self.int(8) as usize;
            self.1 += len;
            String::from_utf8_lossy(&self.0[self.1 - len..self.1]).into_owned()
        }
        fn skip_value(&mut self, kind: u64) {
            match kind {
                0 | 1 | 7 => self.1 += 1,
                2 | 3 => self.1 += 2,
                4..=6 => self.1 += 4,
                8 => drop(self.string()),
                9 => {
                    let (kind, len) = (self.int(4), self.int(8));
                    (0..len).for_each(|_| self.skip_value(kind));
                }
                _ => self.1 += 8,
            }
        }
    }
    let mut r = Reader(file, 8);
    let (count, pairs) = (r.int(8), r.int(8));
    for _ in 0..pairs {
        r.string();
        let kind = r.int(4);
        r.skip_value(kind);
    }
    let mut found = HashMap::new();
    for _ in 0..count {
        let (name, dims) = (r.string(), r.int(4));
        let elements = (0..dims).map(|_| r.int(8) as usize).product();
        found.insert(name, (r.int(4) as u32, elements, r.int(8) as usize));
    }
    let data = r.1.next_multiple_of(32);
    found.values_mut().for_each(|t| t.2 += data);
    found
}

/// Real files of one model: decoded weights stay close to the f32 file's.
#[test]
fn quantized_files_are_close_to_their_float_original() {
    let Some(original) = shared("babyllama-tok361-f32.gguf") else { return };
    let floats = tensors(&original);
    // Root mean square error relative to the weights', as the bits per weight let expect.
    for (name, bound) in [("IQ4_NL", 0.10), ("Q4_0", 0.12), ("Q4_K_M", 0.10), ("Q8_0", 0.01)] {
        let Some(file) = shared(&format!("babyllama-tok361-{name}.gguf")) else { return };
        for (tensor, (id, elements, at)) in tensors(&file) {
            let dtype = DType::from_ggml(id).unwrap();
            let bytes = &file[at..][..elements / dtype.block_len() * dtype.block_bytes()];
            let mut expected = vec![0.0; elements];
            scalar::dequantize(DType::F32, &original[floats[&tensor].2..][..4 * elements], 0, &mut expected);
            for isa in Isa::available() {
                let mut out = vec![0.0; elements];
                isa.dequantize(dtype, bytes, 0, &mut out);
                let square = |x: f32| (x as f64).powi(2);
                let error: f64 = out.iter().zip(&expected).map(|(a, b)| square(a - b)).sum();
                let norm: f64 = expected.iter().map(|&b| square(b)).sum();
                let relative = (error / norm).sqrt();
                assert!(relative < bound, "{} {name} {tensor} ({}): {relative}", isa.name(), dtype.name());
            }
        }
    }
}
