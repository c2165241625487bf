//! The llama architecture in plain candle autograd, f32 on the CPU: the referee of the hand-written
//! forward and backward passes, and what pretrains the embedded model.
//!
//! Clarity over speed. Every operation carries a gradient, which rules out candle's fused `rms_norm`,
//! `softmax_last_dim` and `rope` (they have no backward) and its quantized matmul (no gradient to its
//! input, and illegal instructions on ARMv8.0). Weights are dequantized before they come here.

use crate::model::config::{ModelConfig, Proj};
use candle_core::{D, Device, Result, Tensor, bail};
use std::collections::HashMap;

/// A target that counts for nothing: the position has no next token to learn.
pub const NO_TARGET: u32 = u32::MAX;

/// One block's weights; all tensors f32.
pub struct BlockWeights {
    /// Gain of the norm before attention, `[d]`.
    pub attn_norm: Tensor,
    /// Gain of the norm before the MLP, `[d]`.
    pub ffn_norm: Tensor,
    /// The projections in [`Proj::ALL`] order, each `[out, in]`.
    pub proj: [Tensor; 7],
}

/// A whole model, dequantized. The tensors may be `Var`s' tensors, and are then trained.
pub struct Weights {
    /// Token embedding, `[V, d]`.
    pub token_embd: Tensor,
    /// The head, `[V, d]`; `None` where it is the embedding.
    pub output: Option<Tensor>,
    /// Gain of the last norm, `[d]`.
    pub output_norm: Tensor,
    /// Divisors of the rotary frequencies (`rope_freqs.weight`), `rope_dim / 2` of them.
    pub rope_freqs: Option<Vec<f32>>,
    /// The blocks, first to last.
    pub blocks: Vec<BlockWeights>,
}

/// One block's weights as row-major vectors.
pub struct PlainBlock {
    /// `[d]`.
    pub attn_norm: Vec<f32>,
    /// `[d]`.
    pub ffn_norm: Vec<f32>,
    /// In [`Proj::ALL`] order, each `[out, in]` row by row.
    pub proj: [Vec<f32>; 7],
}

/// A model as row-major vectors: what dequantization yields.
pub struct PlainWeights {
    /// `[V, d]`.
    pub token_embd: Vec<f32>,
    /// `[V, d]`; `None` where the head is the embedding.
    pub output: Option<Vec<f32>>,
    /// `[d]`.
    pub output_norm: Vec<f32>,
    /// `rope_dim / 2` divisors of the rotary frequencies, where the file has them.
    pub rope_freqs: Option<Vec<f32>>,
    /// The blocks, first to last.
    pub blocks: Vec<PlainBlock>,
}

/// A LoRA or DoRA adapter: each adapted projection adds `scale · (x·Aᵀ)·Bᵀ` to its output, which DoRA
/// then multiplies by `m/‖W + scale·B·A‖`, row by row of W.
#[derive(Default)]
pub struct Lora {
    /// alpha/r, or alpha/√r with rsLoRA, where `scales` names no other.
    pub scale: f32,
    /// (block, projection) to (A `[r, in]`, B `[out, r]`).
    pub pairs: HashMap<(usize, Proj), (Tensor, Tensor)>,
    /// Multipliers of single projections.
    pub scales: HashMap<(usize, Proj), f32>,
    /// DoRA's magnitudes m `[out]`.
    pub magnitudes: HashMap<(usize, Proj), Tensor>,
}

impl Weights {
    /// Puts plain vectors into tensors.
    ///
    /// # Errors
    /// A vector whose length is not the one that `config` implies.
    pub fn from_plain(config: &ModelConfig, plain: PlainWeights) -> Result<Weights> {
        let (v, d) = (config.vocab, config.d_model);
        let vector = |x: Vec<f32>, n: usize| Tensor::from_vec(x, n, &Device::Cpu);
        let matrix = |x: Vec<f32>, shape: (usize, usize)| Tensor::from_vec(x, shape, &Device::Cpu);
        let mut blocks = Vec::with_capacity(plain.blocks.len());
        for block in plain.blocks {
            let mut proj = Vec::with_capacity(7);
            for (p, values) in Proj::ALL.into_iter().zip(block.proj) {
                proj.push(matrix(values, p.shape(config))?);
            }
            let Ok(proj) = <[Tensor; 7]>::try_from(proj) else { bail!("a block has seven projections") };
            let attn_norm = vector(block.attn_norm, d)?;
            blocks.push(BlockWeights { attn_norm, ffn_norm: vector(block.ffn_norm, d)?, proj });
        }
        Ok(Weights {
            token_embd: matrix(plain.token_embd, (v, d))?,
            output: plain.output.map(|x| matrix(x, (v, d))).transpose()?,
            output_norm: vector(plain.output_norm, d)?,
            rope_freqs: plain.rope_freqs,
            blocks,
        })
    }
}

/// Next-token logits of one sequence, `[T, V]`.
///
/// # Errors
/// An id outside the vocabulary, or tensors that do not fit `config`.
pub fn logits(config: &ModelConfig, w: &Weights, lora: Option<&Lora>, ids: &[u32]) -> Result<Tensor> {
    let ids = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
    logits_batch(config, w, lora, &ids)?.squeeze(0)
}

/// Next-token logits of a batch: `ids` is `[B, T]` u32, the result `[B, T, V]`.
///
/// Attention is causal, so sequences shorter than T are padded on the right with any valid id, and the
/// logits of the padding ignored.
///
/// # Errors
/// As [`logits`].
pub fn logits_batch(config: &ModelConfig, w: &Weights, lora: Option<&Lora>, ids: &Tensor) -> Result<Tensor> {
    let (b, t) = ids.dims2()?;
    let rope = Rope::new(config, w.rope_freqs.as_deref(), t)?;
    let mask = causal_mask(t)?;
    let flat_ids = ids.flatten_all()?;
    // The residual stream, [B·T, d]: only attention needs to know where a sequence ends.
    let mut x = w.token_embd.index_select(&flat_ids, 0)?;
    for (layer, block) in w.blocks.iter().enumerate() {
        let linear = Linear { layer, block, lora };
        let h = rms_norm(&x, &block.attn_norm, config.rms_eps)?;
        x = (x + attention(config, &linear, &rope, &mask, &h, (b, t))?)?;
        let h = rms_norm(&x, &block.ffn_norm, config.rms_eps)?;
        x = (x + mlp(&linear, &h)?)?;
    }
    let x = rms_norm(&x, &w.output_norm, config.rms_eps)?;
    let head = w.output.as_ref().unwrap_or(&w.token_embd);
    x.matmul(&head.t()?)?.reshape((b, t, config.vocab))
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
    let ids = Tensor::from_vec(ids, (n, 1), &Device::Cpu)?;
    // The shift cancels in value and in gradient: detached, it only keeps exp in range.
    let max = logits.max_keepdim(1)?.detach();
    let shifted = logits.broadcast_sub(&max)?;
    let log_sum = shifted.exp()?.sum_keepdim(1)?.log()?;
    (log_sum - shifted.gather(&ids, 1)?)?.mean_all()
}

/// One block's projections, each with its adapter where there is one.
struct Linear<'a> {
    layer: usize,
    block: &'a BlockWeights,
    lora: Option<&'a Lora>,
}

impl Linear<'_> {
    /// x `[N, in]` to `[N, out]`: `x·Wᵀ + scale·(x·Aᵀ)·Bᵀ`.
    fn forward(&self, p: Proj, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.block.proj[p as usize].t()?)?;
        let Some(lora) = self.lora else { return Ok(y) };
        let place = (self.layer, p);
        let Some((a, b)) = lora.pairs.get(&place) else { return Ok(y) };
        let scale = f64::from(*lora.scales.get(&place).unwrap_or(&lora.scale));
        let y = (y + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * scale)?)?;
        let Some(m) = lora.magnitudes.get(&place) else { return Ok(y) };
        // The whole of W + s·B·A, which only a referee can afford; its norm is a constant to the gradient.
        let v = (&self.block.proj[p as usize] + (b.matmul(a)? * scale)?)?;
        let norm = v.sqr()?.sum(1)?.sqrt()?.detach();
        y.broadcast_mul(&(m / norm)?)
    }
}

/// `x / rms(x) · gain`, row by row (Zhang & Sennrich 2019). x is `[N, d]`.
fn rms_norm(x: &Tensor, gain: &Tensor, eps: f32) -> Result<Tensor> {
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    let rms = (mean_square + f64::from(eps))?.sqrt()?;
    x.broadcast_div(&rms)?.broadcast_mul(gain)
}

/// SwiGLU (Shazeer 2020): `down(silu(gate(x)) · up(x))`. x is `[N, d]`.
fn mlp(linear: &Linear<'_>, x: &Tensor) -> Result<Tensor> {
    let gate = linear.forward(Proj::Gate, x)?.silu()?;
    let up = linear.forward(Proj::Up, x)?;
    linear.forward(Proj::Down, &(gate * up)?)
}

/// Causal attention with grouped keys and values; x is `[B·T, d]`, and so is the result.
fn attention(
    config: &ModelConfig,
    linear: &Linear<'_>,
    rope: &Rope,
    mask: &Tensor,
    x: &Tensor,
    (b, t): (usize, usize),
) -> Result<Tensor> {
    let (heads, kv, hd) = (config.n_heads, config.n_kv_heads, config.head_dim);
    let split = |y: Tensor, n: usize| y.reshape((b, t, n, hd))?.transpose(1, 2)?.contiguous();
    let q = rope.rotate(&split(linear.forward(Proj::Q, x)?, heads)?)?;
    let k = rope.rotate(&split(linear.forward(Proj::K, x)?, kv)?)?;
    let v = split(linear.forward(Proj::V, x)?, kv)?;
    // Consecutive query heads share a key head, so a group's queries stack as rows of one product.
    let q = q.reshape((b, kv, heads / kv * t, hd))?;
    let scores = (q.matmul(&k.t()?)? / (hd as f64).sqrt())?.reshape((b, heads, t, t))?;
    let weights = softmax(&scores.broadcast_add(mask)?)?;
    let mixed = weights.reshape((b, kv, heads / kv * t, t))?.matmul(&v)?;
    let mixed = mixed.reshape((b, heads, t, hd))?.transpose(1, 2)?.reshape((b * t, heads * hd))?;
    linear.forward(Proj::O, &mixed)
}

/// Softmax over the last dimension.
fn softmax(x: &Tensor) -> Result<Tensor> {
    let max = x.max_keepdim(D::Minus1)?.detach();
    let exp = x.broadcast_sub(&max)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
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
