//! The llama architecture in candle's own layers and autograd, f32 on the CPU. It checks the hand-written
//! forward and backward passes, in the tests and on a user's device ([`crate::selftest`]).
//!
//! Clarity over speed. Every operation carries a gradient, which rules out candle's fused `rms_norm`, `softmax_last_dim` and
//! `rope` (they have no backward) and its quantized matmul (no gradient to its input, and illegal instructions on
//! ARMv8.0). So weights must be dequantized first.
//!
//! ```
//! use engraft_runtime::Base;
//! use engraft_runtime::reference::{Reference, loss};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let base = Base::open("../targets/cli/seedling.gguf")?;
//! let reference = Reference::of(&base.model, &base.kernels)?;
//! let logits = reference.logits(None, &[1, 2, 3])?;
//! println!("{} nats per token", loss(&logits, &[2, 3, 4])?.to_scalar::<f32>()?);
//! # Ok(())
//! # }
//! ```

use std::collections::HashMap;

use candle_core::{D, DType, Device, Result, Tensor, bail};
use candle_nn::{
    Embedding, Linear, Module, RmsNorm, VarBuilder, embedding, linear_no_bias, loss::cross_entropy, ops,
    rms_norm,
};
use engraft_kernels::{Kernels, QMatrix};

use crate::model::config::{ModelConfig, Proj};
use crate::model::weights::ModelFile;

/// Marks a position without a target: there is no next token to learn.
pub const NO_TARGET: u32 = u32::MAX;

/// A LoRA or DoRA adapter: each adapted projection adds `scale · (x·Aᵀ)·Bᵀ` to its output, which DoRA
/// then multiplies by `m/‖W + scale·B·A‖`, row by row of W.
#[derive(Default)]
pub struct Lora {
    /// alpha/r, or alpha/√r with rsLoRA, unless `scales` overrides it.
    pub scale: f32,
    /// (block, projection) to (A `[r, in]`, B `[out, r]`).
    pub pairs: HashMap<(usize, Proj), (Tensor, Tensor)>,
    /// Multipliers of individual projections.
    pub scales: HashMap<(usize, Proj), f32>,
    /// DoRA's magnitudes m `[out]`.
    pub magnitudes: HashMap<(usize, Proj), Tensor>,
}

/// A model, as candle computes it.
pub struct Reference {
    config: ModelConfig,
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
    /// Divisors of the rotary frequencies, `rope_dim / 2` of them.
    rope_freqs: Option<Vec<f32>>,
}

struct Block {
    attn_norm: RmsNorm,
    ffn_norm: RmsNorm,
    /// In [`Proj::ALL`] order.
    proj: [Linear; 7],
}

impl Reference {
    /// A model of f32 tensors by their GGUF names, `token_embd.weight` and so on; pass a `Var`'s tensor to
    /// train it.
    ///
    /// # Errors
    /// A tensor that is missing or doesn't have the shape `config` implies.
    pub fn new(
        config: &ModelConfig,
        tensors: HashMap<String, Tensor>,
        rope_freqs: Option<Vec<f32>>,
    ) -> Result<Reference> {
        let (v, d, eps) = (config.vocab, config.d_model, f64::from(config.rms_eps));
        let all = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let block = |layer: usize| -> Result<Block> {
            let of = all.pp("blk").pp(layer);
            let proj = |p: Proj| {
                let (outputs, inputs) = p.shape(config);
                linear_no_bias(inputs, outputs, of.pp(p.gguf_name()))
            };
            let proj = Proj::ALL.into_iter().map(proj).collect::<Result<Vec<_>>>()?;
            let Ok(proj) = <[Linear; 7]>::try_from(proj) else { bail!("a block has seven projections") };
            Ok(Block {
                attn_norm: rms_norm(d, eps, of.pp("attn_norm"))?,
                ffn_norm: rms_norm(d, eps, of.pp("ffn_norm"))?,
                proj,
            })
        };
        let embedding = embedding(v, d, all.pp("token_embd"))?;
        Ok(Reference {
            blocks: (0..config.n_layers).map(block).collect::<Result<_>>()?,
            norm: rms_norm(d, eps, all.pp("output_norm"))?,
            head: match config.tied {
                true => Linear::new(embedding.embeddings().clone(), None),
                false => linear_no_bias(d, v, all.pp("output"))?,
            },
            config: config.clone(),
            embedding,
            rope_freqs,
        })
    }

    /// A model's file, dequantized.
    ///
    /// # Errors
    /// Those of candle, if memory runs short.
    pub fn of(model: &ModelFile, kernels: &Kernels) -> Result<Reference> {
        let matrix = |w: &QMatrix<'_>| {
            let mut values = vec![0.0; w.rows() * w.cols()];
            for (r, row) in values.chunks_exact_mut(w.cols()).enumerate() {
                kernels.dequantize_row(w, r, row);
            }
            Tensor::from_vec(values, (w.rows(), w.cols()), &Device::Cpu)
        };
        let vector = |x: &[f32]| Tensor::from_slice(x, x.len(), &Device::Cpu);
        let mut tensors = HashMap::new();
        let mut put = |name: String, tensor: Tensor| tensors.insert(format!("{name}.weight"), tensor);
        put("token_embd".into(), matrix(&model.token_embd())?);
        put("output_norm".into(), vector(model.output_norm())?);
        if !model.config().tied {
            put("output".into(), matrix(&model.output())?);
        }
        for layer in 0..model.config().n_layers {
            let block = model.block(layer);
            put(format!("blk.{layer}.attn_norm"), vector(block.attn_norm)?);
            put(format!("blk.{layer}.ffn_norm"), vector(block.ffn_norm)?);
            for (proj, w) in Proj::ALL.into_iter().zip(&block.proj) {
                put(format!("blk.{layer}.{}", proj.gguf_name()), matrix(w)?);
            }
        }
        Reference::new(model.config(), tensors, model.rope_freqs().map(<[f32]>::to_vec))
    }

    /// Next-token logits of one sequence, `[T, V]`.
    ///
    /// # Errors
    /// An id outside the vocabulary; an adapter of other shapes.
    pub fn logits(&self, lora: Option<&Lora>, ids: &[u32]) -> Result<Tensor> {
        let ids = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
        self.logits_batch(lora, &ids)?.squeeze(0)
    }

    /// Next-token logits of a batch: `ids` is `[B, T]` u32, the result `[B, T, V]`.
    ///
    /// Attention is causal, so sequences shorter than T are padded on the right with any valid id, and the
    /// padding's logits ignored.
    ///
    /// # Errors
    /// As [`Reference::logits`].
    pub fn logits_batch(&self, lora: Option<&Lora>, ids: &Tensor) -> Result<Tensor> {
        let (b, t) = ids.dims2()?;
        let rope = Rope::new(&self.config, self.rope_freqs.as_deref(), t)?;
        let mask = causal_mask(t)?;
        // The residual stream, [B·T, d]: only attention needs to know where a sequence ends.
        let mut x = self.embedding.forward(&ids.flatten_all()?)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let adapted = Adapted { layer, block, lora };
            let h = block.attn_norm.forward_diff(&x)?;
            x = (x + attention(&self.config, &adapted, &rope, &mask, &h, (b, t))?)?;
            let h = block.ffn_norm.forward_diff(&x)?;
            x = (x + mlp(&adapted, &h)?)?;
        }
        let x = self.norm.forward_diff(&x)?;
        self.head.forward(&x)?.reshape((b, t, self.config.vocab))
    }
}

/// Mean cross-entropy in nats over the rows of `logits` (`[N, V]`, or `[B, T, V]` flattened) that have
/// a target; `targets` holds one id per row, or [`NO_TARGET`].
///
/// # Errors
/// No row has a target, or the lengths differ.
pub fn loss(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let vocab = logits.dim(D::Minus1)?;
    let logits = logits.reshape(((), vocab))?;
    if logits.dim(0)? != targets.len() {
        bail!("{} rows of logits for {} targets", logits.dim(0)?, targets.len());
    }
    let (rows, ids): (Vec<u32>, Vec<u32>) =
        (0u32..).zip(targets).filter(|(_, id)| **id != NO_TARGET).map(|(row, id)| (row, *id)).unzip();
    let n = rows.len();
    if n == 0 {
        bail!("no position has a target");
    }
    let logits = logits.index_select(&Tensor::from_vec(rows, n, &Device::Cpu)?, 0)?;
    cross_entropy(&logits, &Tensor::from_vec(ids, n, &Device::Cpu)?)
}

/// One block's projections, each with its adapter, if any.
struct Adapted<'a> {
    layer: usize,
    block: &'a Block,
    lora: Option<&'a Lora>,
}

impl Adapted<'_> {
    /// x `[N, in]` to `[N, out]`: `x·Wᵀ + scale·(x·Aᵀ)·Bᵀ`.
    fn forward(&self, p: Proj, x: &Tensor) -> Result<Tensor> {
        let frozen = &self.block.proj[p as usize];
        let y = frozen.forward(x)?;
        let Some(lora) = self.lora else { return Ok(y) };
        let place = (self.layer, p);
        let Some((a, b)) = lora.pairs.get(&place) else { return Ok(y) };
        let scale = f64::from(*lora.scales.get(&place).unwrap_or(&lora.scale));
        let y = (y + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * scale)?)?;
        let Some(m) = lora.magnitudes.get(&place) else { return Ok(y) };
        // The full W + s·B·A, which only a reference can afford; the gradient treats its norm as a constant.
        let v = (frozen.weight() + (b.matmul(a)? * scale)?)?;
        let norm = v.sqr()?.sum(1)?.sqrt()?.detach();
        y.broadcast_mul(&(m / norm)?)
    }
}

/// SwiGLU (Shazeer 2020): `down(silu(gate(x)) · up(x))`. x is `[N, d]`.
fn mlp(adapted: &Adapted<'_>, x: &Tensor) -> Result<Tensor> {
    let gate = ops::silu(&adapted.forward(Proj::Gate, x)?)?;
    let up = adapted.forward(Proj::Up, x)?;
    adapted.forward(Proj::Down, &(gate * up)?)
}

/// Causal attention with grouped keys and values; x is `[B·T, d]`, and so is the result.
fn attention(
    config: &ModelConfig,
    adapted: &Adapted<'_>,
    rope: &Rope,
    mask: &Tensor,
    x: &Tensor,
    (b, t): (usize, usize),
) -> Result<Tensor> {
    let (heads, kv, hd) = (config.n_heads, config.n_kv_heads, config.head_dim);
    let split = |y: Tensor, n: usize| y.reshape((b, t, n, hd))?.transpose(1, 2)?.contiguous();
    let q = rope.rotate(&split(adapted.forward(Proj::Q, x)?, heads)?)?;
    let k = rope.rotate(&split(adapted.forward(Proj::K, x)?, kv)?)?;
    let v = split(adapted.forward(Proj::V, x)?, kv)?;
    // Consecutive query heads share a key head, so a group's queries stack as rows of one product.
    let q = q.reshape((b, kv, heads / kv * t, hd))?;
    let scores = (q.matmul(&k.t()?)? / (hd as f64).sqrt())?.reshape((b, heads, t, t))?;
    let weights = ops::softmax(&scores.broadcast_add(mask)?, D::Minus1)?;
    let mixed = weights.reshape((b, kv, heads / kv * t, t))?.matmul(&v)?;
    let mixed = mixed.reshape((b, heads, t, hd))?.transpose(1, 2)?.reshape((b * t, heads * hd))?;
    adapted.forward(Proj::O, &mixed)
}

/// `[T, T]`: 0 where row i may see column j ≤ i, −∞ elsewhere.
fn causal_mask(t: usize) -> Result<Tensor> {
    let mask: Vec<f32> =
        (0..t).flat_map(|i| (0..t).map(move |j| if j <= i { 0.0 } else { f32::NEG_INFINITY })).collect();
    Tensor::from_vec(mask, (t, t), &Device::Cpu)
}

/// Rotary position embedding (Su et al. 2021) in the pairing of GGUF's `llama`: elements 2i and 2i+1 of
/// a head turn by `pos · base^(−2i/rope_dim) / (rope_scale · rope_freqs[i])`.
struct Rope {
    /// `[T, rope_dim/2, 1]`.
    cos: Tensor,
    /// `[T, rope_dim/2, 1]`.
    sin: Tensor,
}

impl Rope {
    fn new(config: &ModelConfig, rope_freqs: Option<&[f32]>, t: usize) -> Result<Rope> {
        let pairs = config.rope_dim / 2;
        if let Some(divisors) = rope_freqs
            && divisors.len() != pairs
        {
            bail!("{} rope_freqs for {pairs} rotary pairs", divisors.len());
        }
        let mut angles = Vec::with_capacity(t * pairs);
        for pos in 0..t {
            for i in 0..pairs {
                let exponent = -(2.0 * i as f64) / config.rope_dim as f64;
                let divisor = f64::from(config.rope_scale) * rope_freqs.map_or(1.0, |f| f64::from(f[i]));
                angles.push(pos as f64 * f64::from(config.rope_base).powf(exponent) / divisor);
            }
        }
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|a| f(*a) as f32).collect();
            Tensor::from_vec(values, (t, pairs, 1), &Device::Cpu)
        };
        Ok(Rope { cos: table(f64::cos)?, sin: table(f64::sin)? })
    }

    /// x `[B, H, T, head_dim]` to the same shape; elements past `rope_dim` stay as they are.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let (b, h, t, hd) = x.dims4()?;
        let pairs = self.cos.dim(1)?;
        let turned = x.narrow(3, 0, 2 * pairs)?.reshape((b, h, t, pairs, 2))?;
        let (even, odd) = (turned.narrow(4, 0, 1)?, turned.narrow(4, 1, 1)?);
        let new_even = (even.broadcast_mul(&self.cos)? - odd.broadcast_mul(&self.sin)?)?;
        let new_odd = (even.broadcast_mul(&self.sin)? + odd.broadcast_mul(&self.cos)?)?;
        let turned = Tensor::cat(&[new_even, new_odd], 4)?.reshape((b, h, t, 2 * pairs))?;
        if 2 * pairs == hd {
            return Ok(turned);
        }
        Tensor::cat(&[&turned, &x.narrow(3, 2 * pairs, hd - 2 * pairs)?], 3)
    }
}
