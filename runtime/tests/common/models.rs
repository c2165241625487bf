//! Small llama models of noise, written as GGUF in memory, in the mixtures of types that
//! `llama-quantize` makes.

use std::sync::Arc;

use engraft_kernels::{DType, scalar};
use engraft_runtime::model::Proj;
use engraft_runtime::model::map::Map;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::rng::Rng;
use half::{bf16, f16};

use super::writer::{V, Writer, f32v, strv, u32v};

/// A model's shape and types.
pub struct Spec {
    pub name: &'static str,
    pub d_model: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rope_dim: usize,
    pub d_ff: usize,
    pub layers: usize,
    pub vocab: usize,
    /// Whether the rotary frequencies have divisors, and positions a linear scale.
    pub stretched_rope: bool,
    /// Type of a projection in a layer.
    pub types: fn(usize, Proj) -> DType,
    pub embedding: DType,
    /// `None` ties the head to the embedding.
    pub output: Option<DType>,
}

/// Blocks of 32 as Q4_0 to Q5_1 files mix them; heads of 8, half of each rotated; a tied head.
pub const SHORT_BLOCKS: Spec = Spec {
    name: "short-blocks",
    d_model: 64,
    heads: 8,
    kv_heads: 2,
    head_dim: 8,
    rope_dim: 4,
    d_ff: 160,
    layers: 3,
    vocab: 199,
    stretched_rope: true,
    types: |layer, p| match (p, layer) {
        (Proj::V, 0) => DType::Q8_0,
        (Proj::V, _) => DType::Q5_1,
        (Proj::O, _) => DType::Q5_0,
        (Proj::Gate, _) => DType::IQ4_NL,
        (Proj::Down, 0) => DType::Q4_1,
        (Proj::Down, _) => DType::Q8_0,
        _ => DType::Q4_0,
    },
    embedding: DType::Q8_0,
    output: None,
};

/// Blocks of 256 as K-quants mix them, with the falls to 32 of an MLP whose width is no multiple of
/// 256; heads of 64; a head of its own, longer than one chunk of the vocabulary.
pub const LONG_BLOCKS: Spec = Spec {
    name: "long-blocks",
    d_model: 256,
    heads: 4,
    kv_heads: 1,
    head_dim: 64,
    rope_dim: 64,
    d_ff: 416,
    layers: 2,
    vocab: 1100,
    stretched_rope: false,
    types: |layer, p| match (p, layer) {
        (Proj::Q, _) => DType::Q2_K,
        (Proj::K, _) => DType::Q3_K,
        (Proj::V, _) => DType::Q6_K,
        (Proj::O, _) => DType::Q4_K,
        (Proj::Gate, _) => DType::Q5_K,
        (Proj::Up, _) => DType::IQ4_XS,
        (Proj::Down, 0) => DType::Q5_0,
        (Proj::Down, _) => DType::Q8_0,
    },
    embedding: DType::Q6_K,
    output: Some(DType::Q5_K),
};

/// Floats, of widths that no block and no vector register divides; heads wider than d / heads.
pub const FLOATS: Spec = Spec {
    name: "floats",
    d_model: 44,
    heads: 3,
    kv_heads: 3,
    head_dim: 18,
    rope_dim: 18,
    d_ff: 70,
    layers: 4,
    vocab: 61,
    stretched_rope: false,
    types: |layer, p| match (p as usize + layer) % 3 {
        0 => DType::F32,
        1 => DType::F16,
        _ => DType::BF16,
    },
    embedding: DType::F16,
    output: Some(DType::F32),
};

impl Spec {
    /// The model, of seeded noise with gains as trained models have them.
    pub fn model(&self) -> Arc<ModelFile> {
        let mut rng = Rng::new(5, 0);
        let mut w = Writer::new();
        self.metadata(&mut w);
        let mut add = |w: &mut Writer, name: &str, dtype: DType, (rows, cols): (usize, usize), size: f32| {
            let dims = if rows == 1 { vec![cols as u64] } else { vec![cols as u64, rows as u64] };
            w.add(name, dtype, &dims);
            w.tensor(name).data = match rows {
                1 => (0..cols).flat_map(|_| (1.0 + 0.2 * rng.normal()).to_le_bytes()).collect(),
                _ => matrix_bytes(dtype, rows, cols, size, &mut rng),
            };
        };
        let (d, q, kv) = (self.d_model, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        add(&mut w, "token_embd.weight", self.embedding, (self.vocab, d), 0.3);
        for l in 0..self.layers {
            for norm in ["attn_norm", "ffn_norm"] {
                add(&mut w, &format!("blk.{l}.{norm}.weight"), DType::F32, (1, d), 1.0);
            }
            for p in Proj::ALL {
                let (out, input) = match p {
                    Proj::Q => (q, d),
                    Proj::K | Proj::V => (kv, d),
                    Proj::O => (d, q),
                    Proj::Gate | Proj::Up => (self.d_ff, d),
                    Proj::Down => (d, self.d_ff),
                };
                let name = format!("blk.{l}.{}.weight", p.gguf_name());
                add(&mut w, &name, (self.types)(l, p), (out, input), 1.0 / (input as f32).sqrt());
            }
        }
        add(&mut w, "output_norm.weight", DType::F32, (1, d), 1.0);
        if let Some(dtype) = self.output {
            add(&mut w, "output.weight", dtype, (self.vocab, d), 2.0 / (d as f32).sqrt());
        }
        if self.stretched_rope {
            w.add("rope_freqs.weight", DType::F32, &[self.rope_dim as u64 / 2]);
        }
        let model = ModelFile::from_map(Map::from_vec(self.name, w.bytes()));
        Arc::new(model.expect("a valid model"))
    }

    fn metadata(&self, w: &mut Writer) {
        let uint = |n: usize| -> V { u32v(n as u32) };
        w.set("general.architecture", strv("llama"));
        for (key, value) in [
            ("context_length", uint(512)),
            ("embedding_length", uint(self.d_model)),
            ("block_count", uint(self.layers)),
            ("feed_forward_length", uint(self.d_ff)),
            ("attention.head_count", uint(self.heads)),
            ("attention.head_count_kv", uint(self.kv_heads)),
            ("attention.key_length", uint(self.head_dim)),
            ("attention.value_length", uint(self.head_dim)),
            ("rope.dimension_count", uint(self.rope_dim)),
            ("rope.freq_base", f32v(5_000.0)),
            ("rope.scaling.factor", f32v(if self.stretched_rope { 2.0 } else { 1.0 })),
            ("attention.layer_norm_rms_epsilon", f32v(1e-5)),
        ] {
            w.set(&format!("llama.{key}"), value);
        }
    }
}

/// Where a block's f16 factors lie, and their sizes as multiples of the first that leave a mean of zero
/// under uniformly random codes.
fn factors(dtype: DType) -> &'static [(usize, f32)] {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => &[],
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::IQ4_NL | DType::IQ4_XS => &[(0, 1.0)],
        DType::Q4_1 => &[(0, 1.0), (2, -7.5)],
        DType::Q5_1 => &[(0, 1.0), (2, -15.5)],
        DType::Q2_K => &[(80, 1.0), (82, 1.5)],
        DType::Q3_K => &[(108, 1.0)],
        DType::Q4_K => &[(0, 1.0), (2, 7.5)],
        DType::Q5_K => &[(0, 1.0), (2, 15.5)],
        DType::Q6_K => &[(208, 1.0)],
    }
}

/// Stored bytes of a random matrix whose elements have the root mean square `size`.
fn matrix_bytes(dtype: DType, rows: usize, cols: usize, size: f32, rng: &mut Rng) -> Vec<u8> {
    let n = rows * cols;
    match dtype {
        DType::F32 => return (0..n).flat_map(|_| (size * rng.normal()).to_le_bytes()).collect(),
        DType::F16 => {
            return (0..n).flat_map(|_| f16::from_f32(size * rng.normal()).to_le_bytes()).collect();
        }
        DType::BF16 => {
            return (0..n).flat_map(|_| bf16::from_f32(size * rng.normal()).to_le_bytes()).collect();
        }
        _ => {}
    }
    let row_bytes = dtype.row_bytes(cols).expect("whole blocks");
    let mut bytes: Vec<u8> = (0..rows * row_bytes).map(|_| rng.next_u64() as u8).collect();
    let noise: Vec<f32> = (0..bytes.len() / dtype.block_bytes()).map(|_| 0.75 + 0.5 * rng.f32()).collect();
    set_factors(&mut bytes, dtype, &noise, 1.0);
    let mut row = vec![0.0f32; cols];
    let mut square = 0.0f64;
    for stored in bytes.chunks_exact(row_bytes) {
        scalar::decode::dequantize(dtype, stored, 0, &mut row);
        square += row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    }
    set_factors(&mut bytes, dtype, &noise, size / (square / n as f64).sqrt() as f32);
    bytes
}

fn set_factors(bytes: &mut [u8], dtype: DType, noise: &[f32], unit: f32) {
    for (block, noise) in bytes.chunks_exact_mut(dtype.block_bytes()).zip(noise) {
        for (at, ratio) in factors(dtype) {
            block[*at..at + 2].copy_from_slice(&f16::from_f32(unit * noise * ratio).to_le_bytes());
        }
    }
}
