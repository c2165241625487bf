//! The model: its shape, its start, batches, the training loop, and how often it answers exactly.

use crate::rng::Rng;
use crate::tokens::Encoded;
use anyhow::{Context, Result, anyhow, ensure};
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use engraft_runtime::model::config::{ModelConfig, Proj};
use engraft_runtime::reference::{self, Lora, NO_TARGET, Reference};
use std::collections::HashMap;
use std::thread::ScopedJoinHandle;
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

/// Normal initialization; matrices that write to the residual stream start smaller, scaled by depth.
pub(crate) fn fresh(config: &ModelConfig, rng: &mut Rng) -> Result<HashMap<String, Tensor>> {
    let d = config.d_model;
    let mut tensors = HashMap::new();
    let mut put = |name: String, values: Vec<f32>, shape: &[usize]| -> Result<()> {
        tensors.insert(format!("{name}.weight"), Tensor::from_vec(values, shape, &Device::Cpu)?);
        Ok(())
    };
    put("token_embd".into(), rng.normal(config.vocab * d, 0.05), &[config.vocab, d])?;
    for layer in 0..config.n_layers {
        for p in Proj::ALL {
            let (out, inp) = p.shape(config);
            let residual = matches!(p, Proj::O | Proj::Down);
            let depth = if residual { 2.0 * config.n_layers as f64 } else { 1.0 };
            let values = rng.normal(out * inp, 0.06 / depth.sqrt());
            put(format!("blk.{layer}.{}", p.gguf_name()), values, &[out, inp])?;
        }
        put(format!("blk.{layer}.attn_norm"), vec![1.0; d], &[d])?;
        put(format!("blk.{layer}.ffn_norm"), vec![1.0; d], &[d])?;
    }
    put("output_norm".into(), vec![1.0; d], &[d])?;
    Ok(tensors)
}

/// A fully trainable model.
pub(crate) struct Trainable {
    /// As the reference computes it.
    pub(crate) reference: Reference,
    /// Its tensors by name, those of `vars`.
    pub(crate) tensors: HashMap<String, Tensor>,
    /// All trainable tensors, in a fixed order.
    pub(crate) vars: Vec<Var>,
}

impl Trainable {
    /// Makes every tensor of a tied model trainable.
    pub(crate) fn new(config: &ModelConfig, mut tensors: HashMap<String, Tensor>) -> Result<Trainable> {
        let mut vars = Vec::new();
        let mut names: Vec<String> = tensors.keys().cloned().collect();
        names.sort();
        for name in names {
            let Some(tensor) = tensors.get_mut(&name) else { continue };
            let var = Var::from_tensor(tensor)?;
            *tensor = var.as_tensor().clone();
            vars.push(var);
        }
        Ok(Trainable { reference: Reference::new(config, tensors.clone(), None)?, tensors, vars })
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
    pub(crate) fn loss(&self, model: &Reference, lora: Option<&Lora>) -> Result<Tensor> {
        Ok(reference::loss(&model.logits_batch(lora, &self.ids)?, &self.targets)?)
    }

    /// For each sequence, the likeliest token at each place of its answer, given the true answer so
    /// far. If all of them are right, greedy decoding gives exactly the answer, so counting exact answers needs
    /// no decoding loop.
    pub(crate) fn likeliest(&self, model: &Reference, lora: Option<&Lora>) -> Result<Vec<Vec<u32>>> {
        let best = model.logits_batch(lora, &self.ids)?.argmax(D::Minus1)?;
        let best: Vec<u32> = best.to_dtype(DType::U32)?.flatten_all()?.to_vec1()?;
        let rows = best.chunks(self.width).zip(self.targets.chunks(self.width));
        let answer = |(got, want): (&[u32], &[u32])| {
            got.iter().zip(want).filter(|(_, want)| **want != NO_TARGET).map(|(got, _)| *got).collect()
        };
        Ok(rows.map(answer).collect())
    }
}

/// The fraction of `sequences` answered exactly, and the answers (as in [`Batch::likeliest`]) to those that
/// weren't.
pub(crate) fn exact_match(
    model: &Reference,
    lora: Option<&Lora>,
    sequences: &[Encoded],
) -> Result<(f64, Vec<(usize, Vec<u32>)>)> {
    let mut wrong = Vec::new();
    let all: Vec<&Encoded> = sequences.iter().collect();
    for (chunk, part) in all.chunks(32).enumerate() {
        for (i, answer) in Batch::new(part)?.likeliest(model, lora)?.into_iter().enumerate() {
            let truth = part[i].targets.iter().filter(|id| **id != NO_TARGET);
            if !answer.iter().eq(truth) {
                wrong.push((chunk * 32 + i, answer));
            }
        }
    }
    Ok((1.0 - wrong.len() as f64 / sequences.len() as f64, wrong))
}

/// Batches of similar lengths, in random order: little padding, no order of difficulty. Each is split
/// into `lanes` parts, to be computed side by side.
pub(crate) fn batches(
    sequences: &[Encoded],
    size: usize,
    lanes: usize,
    rng: &mut Rng,
) -> Result<Vec<Vec<Batch>>> {
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    rng.shuffle(&mut order);
    order.sort_by_key(|i| sequences[*i].ids.len());
    let mut batches = Vec::new();
    for part in order.chunks(size) {
        let part: Vec<&Encoded> = part.iter().map(|i| &sequences[*i]).collect();
        batches.push(part.chunks(size.div_ceil(lanes)).map(Batch::new).collect::<Result<Vec<_>>>()?);
    }
    rng.shuffle(&mut batches);
    Ok(batches)
}

/// Learning rates: a short warmup to `peak`, then a cosine to `floor` times that.
pub(crate) struct Cosine {
    pub(crate) peak: f64,
    pub(crate) floor: f64,
}

impl Cosine {
    fn rate(&self, step: usize, total: usize) -> f64 {
        let warmup = (total / 20).max(1);
        let cosine = 0.5 + 0.5 * (std::f64::consts::PI * step as f64 / total as f64).cos();
        let warm = ((step + 1) as f64 / warmup as f64).min(1.0);
        self.peak * warm * (self.floor + (1.0 - self.floor) * cosine)
    }
}

/// AdamW over `batches`, in order.
pub(crate) fn run(
    batches: &[Vec<Batch>],
    vars: &[Var],
    schedule: &Cosine,
    loss: impl Fn(&Batch) -> Result<Tensor> + Sync,
) -> Result<()> {
    const REPORT_EVERY: usize = 50;
    let params = ParamsAdamW { lr: 0.0, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.01 };
    let mut optimizer = AdamW::new(vars.to_vec(), params)?;
    let (started, total) = (Instant::now(), batches.len());
    let mut sum = 0.0;
    for (step, batch) in batches.iter().enumerate() {
        optimizer.set_learning_rate(schedule.rate(step, total));
        let (value, gradient) = gradient(batch, vars, &loss)?;
        ensure!(value.is_finite(), "the loss is {value} at step {step}");
        sum += value;
        optimizer.step(&gradient)?;
        if (step + 1) % REPORT_EVERY == 0 {
            let seconds = started.elapsed().as_secs_f64();
            let mean = sum / REPORT_EVERY as f32;
            eprintln!("step {:>5}/{total}  loss {mean:.4}  {seconds:.0} s", step + 1);
            sum = 0.0;
        }
    }
    Ok(())
}

/// The mean of the parts' losses and its gradient, each part on its own thread.
fn gradient(
    parts: &[Batch],
    vars: &[Var],
    loss: &(impl Fn(&Batch) -> Result<Tensor> + Sync),
) -> Result<(f32, GradStore)> {
    let share = 1.0 / parts.len() as f64;
    let part = |batch: &Batch| -> Result<(f32, GradStore)> {
        let loss = (loss(batch)? * share)?;
        Ok((loss.to_scalar()?, loss.backward()?))
    };
    let mut done = std::thread::scope(|threads| {
        let part = &part;
        let running: Vec<_> = parts.iter().map(|batch| threads.spawn(move || part(batch))).collect();
        let join =
            |thread: ScopedJoinHandle<'_, _>| thread.join().map_err(|_| anyhow!("a thread panicked"))?;
        running.into_iter().map(join).collect::<Result<Vec<_>>>()
    })?;
    let (mut value, mut sum) = done.pop().context("an empty batch")?;
    for (other, gradient) in &done {
        value += other;
        for var in vars {
            let (Some(a), Some(b)) = (sum.get(var), gradient.get(var)) else { continue };
            let total = (a + b)?;
            sum.insert(var, total);
        }
    }
    Ok((value, sum))
}
