//! The model: its shape, its start, batches, the training loop, and how often it answers exactly.

use super::rng::Rng;
use super::tokens::Encoded;
use anyhow::{Result, ensure};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use engraft_runtime::model::config::{ModelConfig, Proj};
use engraft_runtime::reference::{self, BlockWeights, Lora, NO_TARGET, Weights};
use std::time::Instant;

/// About 0.9 million parameters; every row a multiple of 32, so that every matrix quantizes to Q8_0.
pub(crate) fn config(vocab: usize) -> ModelConfig {
    ModelConfig {
        architecture: "llama".into(),
        vocab,
        d_model: 128,
        n_layers: 4,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 32,
        d_ff: 384,
        rope_dim: 32,
        rope_base: 10_000.0,
        rope_scale: 1.0,
        rms_eps: 1e-5,
        context_len: 256,
        tied: true,
    }
}

/// Random weights and the `Var`s behind them, the matrices apart from the gains.
pub(crate) struct Trainable {
    /// The model as the reference computes it.
    pub(crate) weights: Weights,
    /// Everything that learns.
    pub(crate) vars: Vec<Var>,
}

impl Trainable {
    /// Normal initialization; what writes to the residual stream starts smaller, by the depth.
    pub(crate) fn new(config: &ModelConfig, rng: &mut Rng) -> Result<Trainable> {
        let mut vars = Vec::new();
        let mut var = |values: Vec<f32>, shape: &[usize]| -> Result<Tensor> {
            let var = Var::from_vec(values, shape, &Device::Cpu)?;
            vars.push(var.clone());
            Ok(var.as_tensor().clone())
        };
        let d = config.d_model;
        let token_embd = var(rng.normal(config.vocab * d, 0.05), &[config.vocab, d])?;
        let mut blocks = Vec::new();
        for _ in 0..config.n_layers {
            let mut proj = Vec::new();
            for p in Proj::ALL {
                let (out, inp) = p.shape(config);
                let residual = matches!(p, Proj::O | Proj::Down);
                let depth = if residual { 2.0 * config.n_layers as f64 } else { 1.0 };
                proj.push(var(rng.normal(out * inp, 0.06 / depth.sqrt()), &[out, inp])?);
            }
            let Ok(proj) = <[Tensor; 7]>::try_from(proj) else { unreachable!("seven projections") };
            let attn_norm = var(vec![1.0; d], &[d])?;
            blocks.push(BlockWeights { attn_norm, ffn_norm: var(vec![1.0; d], &[d])?, proj });
        }
        let output_norm = var(vec![1.0; d], &[d])?;
        let weights = Weights { token_embd, output: None, output_norm, rope_freqs: None, blocks };
        Ok(Trainable { weights, vars })
    }
}

/// Sequences side by side, padded on the right.
pub(crate) struct Batch {
    ids: Tensor,
    targets: Vec<u32>,
    width: usize,
}

impl Batch {
    /// Pads to the longest.
    pub(crate) fn new(sequences: &[&Encoded]) -> Result<Batch> {
        let width = sequences.iter().map(|s| s.ids.len()).max().unwrap_or(0);
        ensure!(width > 0, "an empty batch");
        let mut ids = Vec::with_capacity(sequences.len() * width);
        let mut targets = Vec::with_capacity(ids.capacity());
        for s in sequences {
            let padding = width - s.ids.len();
            ids.extend(s.ids.iter().copied().chain(std::iter::repeat_n(0, padding)));
            targets.extend(s.targets.iter().copied().chain(std::iter::repeat_n(NO_TARGET, padding)));
        }
        Ok(Batch { ids: Tensor::from_vec(ids, (sequences.len(), width), &Device::Cpu)?, targets, width })
    }

    /// Mean cross-entropy of the answers' tokens.
    pub(crate) fn loss(&self, config: &ModelConfig, w: &Weights, lora: Option<&Lora>) -> Result<Tensor> {
        Ok(reference::loss(&reference::logits_batch(config, w, lora, &self.ids)?, &self.targets)?)
    }

    /// For each sequence, the likeliest token at each place of its answer, given the true answer so
    /// far. Where all of them are the true ones, greedy decoding gives exactly the answer, so counting
    /// exact answers needs no decoding loop.
    pub(crate) fn likeliest(
        &self,
        config: &ModelConfig,
        w: &Weights,
        lora: Option<&Lora>,
    ) -> Result<Vec<Vec<u32>>> {
        let best = reference::logits_batch(config, w, lora, &self.ids)?.argmax(D::Minus1)?;
        let best: Vec<u32> = best.to_dtype(DType::U32)?.flatten_all()?.to_vec1()?;
        let rows = best.chunks(self.width).zip(self.targets.chunks(self.width));
        let answer = |(got, want): (&[u32], &[u32])| {
            got.iter().zip(want).filter(|(_, want)| **want != NO_TARGET).map(|(got, _)| *got).collect()
        };
        Ok(rows.map(answer).collect())
    }
}

/// The fraction of `sequences` answered exactly, and what was answered (as [`Batch::likeliest`] has it)
/// to those that were not.
pub(crate) fn exact_match(
    config: &ModelConfig,
    w: &Weights,
    lora: Option<&Lora>,
    sequences: &[Encoded],
) -> Result<(f64, Vec<(usize, Vec<u32>)>)> {
    let mut wrong = Vec::new();
    let all: Vec<&Encoded> = sequences.iter().collect();
    for (chunk, part) in all.chunks(32).enumerate() {
        for (i, answer) in Batch::new(part)?.likeliest(config, w, lora)?.into_iter().enumerate() {
            let truth = part[i].targets.iter().filter(|id| **id != NO_TARGET);
            if !answer.iter().eq(truth) {
                wrong.push((chunk * 32 + i, answer));
            }
        }
    }
    Ok((1.0 - wrong.len() as f64 / sequences.len() as f64, wrong))
}

/// Batches of similar lengths, in random order: little padding, no order of difficulty.
pub(crate) fn batches(sequences: &[Encoded], size: usize, rng: &mut Rng) -> Result<Vec<Batch>> {
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    rng.shuffle(&mut order);
    order.sort_by_key(|i| sequences[*i].ids.len());
    let mut batches = Vec::new();
    for part in order.chunks(size) {
        let part: Vec<&Encoded> = part.iter().map(|i| &sequences[*i]).collect();
        batches.push(Batch::new(&part)?);
    }
    rng.shuffle(&mut batches);
    Ok(batches)
}

/// AdamW over `batches`, in order, with a short warmup and a cosine to a twentieth of `peak_rate`.
pub(crate) fn run(
    batches: &[Batch],
    vars: Vec<Var>,
    peak_rate: f64,
    report_every: usize,
    loss: impl Fn(&Batch) -> Result<Tensor>,
) -> Result<()> {
    let params = ParamsAdamW { lr: 0.0, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.01 };
    let mut optimizer = AdamW::new(vars, params)?;
    let (started, total) = (Instant::now(), batches.len());
    let warmup = (total / 20).max(1);
    let mut sum = 0.0;
    for (step, batch) in batches.iter().enumerate() {
        let progress = step as f64 / total as f64;
        let cosine = 0.525 + 0.475 * (std::f64::consts::PI * progress).cos();
        optimizer.set_learning_rate(peak_rate * cosine * ((step + 1) as f64 / warmup as f64).min(1.0));
        let loss = loss(batch)?;
        let value = loss.to_scalar::<f32>()?;
        ensure!(value.is_finite(), "the loss is {value} at step {step}");
        sum += value;
        optimizer.backward_step(&loss)?;
        if (step + 1) % report_every == 0 {
            let seconds = started.elapsed().as_secs_f64();
            let mean = sum / report_every as f32;
            eprintln!("step {:>5}/{total}  loss {mean:.4}  {seconds:.0} s", step + 1);
            sum = 0.0;
        }
    }
    Ok(())
}
