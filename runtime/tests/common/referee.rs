//! The referee: `reference.rs` with candle's autograd on the dequantized model, and AdamW in f64.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::{Device, Result, Tensor, Var};
use engraft_kernels::{QMatrix, scalar};
use engraft_runtime::adapter::{Adapter, Layout};
use engraft_runtime::data::Batch;
use engraft_runtime::model::Proj;
use engraft_runtime::model::tuned::TunedLayout;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::divergence::{Direction, KlPenalty};
use engraft_runtime::reference::{Lora, NO_TARGET, Reference, loss as loss_of};
use engraft_runtime::train::optim::AdamWConfig;

/// Sums over the targets of a step, gradients in the order of θ.
pub struct Sums {
    pub loss: f64,
    /// The divergence that is penalized, unweighted.
    pub kl: f64,
    pub targets: usize,
    pub grads: Vec<f32>,
}

fn dequantize(w: &QMatrix<'_>) -> Vec<f32> {
    let mut out = vec![0.0; w.rows() * w.cols()];
    for (r, row) in out.chunks_exact_mut(w.cols()).enumerate() {
        scalar::decode::dequantize(w.dtype(), w.row(r), 0, row);
    }
    out
}

/// All weights of a model as f32 tensors by name, dequantized by the specification.
pub fn tensors(model: &ModelFile) -> Result<HashMap<String, Tensor>> {
    let matrix = |w: &QMatrix<'_>| Tensor::from_vec(dequantize(w), (w.rows(), w.cols()), &Device::Cpu);
    let vector = |x: &[f32]| Tensor::from_slice(x, x.len(), &Device::Cpu);
    let mut all = HashMap::new();
    let mut put = |name: String, tensor: Tensor| all.insert(format!("{name}.weight"), tensor);
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
    Ok(all)
}

/// The referee of a model.
pub fn reference(model: &ModelFile) -> Result<Reference> {
    Reference::new(model.config(), tensors(model)?, model.rope_freqs().map(<[f32]>::to_vec))
}

/// Loss and gradients of one step with parameters `theta` in the layout of `adapter`.
pub fn sums(reference: &Reference, adapter: &Adapter, theta: &[f32], batches: &[Batch]) -> Result<Sums> {
    penalized_sums(reference, adapter, theta, batches, None)
}

/// The same with a penalty on leaving the base, whose gradient is added.
pub fn penalized_sums(
    reference: &Reference,
    adapter: &Adapter,
    theta: &[f32],
    batches: &[Batch],
    penalty: Option<KlPenalty>,
) -> Result<Sums> {
    let mut lora = Lora::default();
    let mut vars = Vec::new();
    for (layer, proj, s) in adapter.layout.slots() {
        let a = Tensor::from_slice(&theta[s.a.clone()], (s.rank, s.inputs), &Device::Cpu)?;
        let b = Tensor::from_slice(&theta[s.b.clone()], (s.rank, s.outputs), &Device::Cpu)?;
        let (a, b) = (Var::from_tensor(&a)?, Var::from_tensor(&b.t()?.contiguous()?)?);
        lora.pairs.insert((layer, proj), (a.as_tensor().clone(), b.as_tensor().clone()));
        lora.scales.insert((layer, proj), adapter.config.scale_of(layer, proj));
        let m = (!s.m.is_empty()).then(|| Var::from_slice(&theta[s.m.clone()], s.outputs, &Device::Cpu));
        let m = m.transpose()?;
        lora.magnitudes.extend(m.as_ref().map(|m| ((layer, proj), m.as_tensor().clone())));
        vars.push((s, a, b, m));
    }
    let (mut total, mut kl, mut targets): (Option<Tensor>, f64, usize) = (None, 0.0, 0);
    let mut loss_sum = 0.0;
    for (batch, seq) in batches.iter().flat_map(|b| b.seqs.iter().map(move |s| (b, s.clone()))) {
        let wanted = &batch.targets[seq.clone()];
        let n = wanted.iter().filter(|t| **t != NO_TARGET).count();
        if n == 0 {
            continue;
        }
        let logits = reference.logits(Some(&lora), &batch.ids[seq.clone()])?;
        let mut loss = (loss_of(&logits, wanted)? * n as f64)?;
        loss_sum += f64::from(loss.to_scalar::<f32>()?);
        if let Some(KlPenalty { weight, direction }) = penalty {
            let base = reference.logits(None, &batch.ids[seq])?;
            let own = divergence(&logits, &base, wanted, direction)?;
            kl += f64::from(own.to_scalar::<f32>()?);
            loss = (loss + (own * f64::from(weight))?)?;
        }
        total = Some(total.map_or(Ok(loss.clone()), |t| t + loss)?);
        targets += n;
    }
    let Some(total) = total else { candle_core::bail!("a step without a target") };
    let gradients = total.backward()?;
    let mut grads = vec![0.0; adapter.layout.len()];
    for (s, a, b, m) in &vars {
        let of = |v: &Var| gradients.get(v).cloned().map_or_else(|| v.zeros_like(), Ok);
        grads[s.a.clone()].copy_from_slice(&of(a)?.flatten_all()?.to_vec1::<f32>()?);
        grads[s.b.clone()].copy_from_slice(&of(b)?.t()?.flatten_all()?.to_vec1::<f32>()?);
        if let Some(m) = m {
            grads[s.m.clone()].copy_from_slice(&of(m)?.to_vec1::<f32>()?);
        }
    }
    Ok(Sums { loss: loss_sum, kl, targets, grads })
}

/// Σ KL over the rows with a target, as it is defined, from whole rows of logits.
fn divergence(tuned: &Tensor, base: &Tensor, targets: &[u32], direction: Direction) -> Result<Tensor> {
    let rows: Vec<u32> = (0..).zip(targets).filter(|(_, t)| **t != NO_TARGET).map(|(i, _)| i).collect();
    let n = rows.len();
    let rows = Tensor::from_vec(rows, n, &Device::Cpu)?;
    let log_softmax = |x: &Tensor| -> Result<Tensor> {
        let x = x.index_select(&rows, 0)?;
        let x = x.broadcast_sub(&x.max_keepdim(1)?.detach())?;
        x.broadcast_sub(&x.exp()?.sum_keepdim(1)?.log()?)
    };
    let (tuned, base) = (log_softmax(tuned)?, log_softmax(base)?);
    match direction {
        Direction::Forward => (base.exp()? * (&base - &tuned)?)?.sum_all(),
        Direction::Reverse => (tuned.exp()? * (&tuned - &base)?)?.sum_all(),
    }
}

/// Loss and gradients of one step of full fine-tuning, for weights `values` as they lie.
pub fn full_sums(model: &ModelFile, values: &[f32], batches: &[Batch]) -> Result<Sums> {
    let c = model.config();
    let layout = TunedLayout::new(c);
    let mut vars = Vec::new();
    let mut var = |at: Range<usize>, shape: Vec<usize>| -> Result<Tensor> {
        let var = Var::from_slice(&values[at.clone()], shape, &Device::Cpu)?;
        let tensor = var.as_tensor().clone();
        vars.push((at, var));
        Ok(tensor)
    };
    let (v, d) = (c.vocab, c.d_model);
    let mut all = HashMap::new();
    all.insert("token_embd.weight".to_string(), var(layout.token_embd(), vec![v, d])?);
    all.insert("output_norm.weight".to_string(), var(layout.output_norm(), vec![d])?);
    if !c.tied {
        all.insert("output.weight".to_string(), var(layout.output(), vec![v, d])?);
    }
    for l in 0..c.n_layers {
        let norms = ["attn_norm", "ffn_norm"].map(|name| (name, vec![d]));
        let projections = Proj::ALL.map(|p| (p.gguf_name(), vec![p.shape(c).0, p.shape(c).1]));
        for (name, shape) in norms.into_iter().chain(projections) {
            let name = format!("blk.{l}.{name}.weight");
            let at = layout.tensor(&name).expect("a trained tensor");
            all.insert(name, var(at, shape)?);
        }
    }
    let reference = Reference::new(c, all, model.rope_freqs().map(<[f32]>::to_vec))?;
    let (total, targets) = total_loss(&reference, None, batches)?;
    let gradients = total.backward()?;
    let mut grads = vec![0.0; layout.len()];
    for (at, var) in vars {
        let own = gradients.get(&var).cloned().map_or_else(|| var.zeros_like(), Ok)?;
        grads[at].copy_from_slice(&own.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(Sums { loss: f64::from(total.to_scalar::<f32>()?), kl: 0.0, targets, grads })
}

/// The summed loss of all targets of a step, and how many they are.
fn total_loss(reference: &Reference, lora: Option<&Lora>, batches: &[Batch]) -> Result<(Tensor, usize)> {
    let (mut total, mut targets): (Option<Tensor>, usize) = (None, 0);
    for (batch, seq) in batches.iter().flat_map(|b| b.seqs.iter().map(move |s| (b, s.clone()))) {
        let wanted = &batch.targets[seq.clone()];
        let n = wanted.iter().filter(|t| **t != NO_TARGET).count();
        if n == 0 {
            continue;
        }
        let logits = reference.logits(lora, &batch.ids[seq])?;
        let loss = (loss_of(&logits, wanted)? * n as f64)?;
        total = Some(total.map_or(Ok(loss.clone()), |t| t + loss)?);
        targets += n;
    }
    let Some(total) = total else { candle_core::bail!("a step without a target") };
    Ok((total, targets))
}

/// AdamW with clipping, as its paper writes it, in f64.
pub struct AdamW {
    config: AdamWConfig,
    pub theta: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
    updates: i32,
    /// Learning rate and weight decay of each parameter, as multiples of the configured ones.
    factors: Vec<(f64, f64)>,
}

impl AdamW {
    pub fn new(config: AdamWConfig, theta: &[f32]) -> AdamW {
        let theta: Vec<f64> = theta.iter().map(|v| f64::from(*v)).collect();
        let n = theta.len();
        AdamW { config, m: vec![0.0; n], v: vec![0.0; n], theta, updates: 0, factors: vec![(1.0, 1.0); n] }
    }

    /// For an adapter's parameters: B at its own rate, no decay of magnitudes.
    pub fn of(config: AdamWConfig, adapter: &Adapter) -> AdamW {
        let mut adamw = AdamW::new(config, &adapter.theta);
        for (_, _, s) in adapter.layout.slots() {
            adamw.factors[s.b].fill((f64::from(config.lora_plus_ratio), 1.0));
            adamw.factors[s.m].fill((1.0, 0.0));
        }
        adamw
    }

    pub fn theta_f32(&self) -> Vec<f32> {
        self.theta.iter().map(|v| *v as f32).collect()
    }

    /// For all weights of a model: no decay of norms.
    pub fn full(config: AdamWConfig, layout: &TunedLayout, n_layers: usize, values: &[f32]) -> AdamW {
        let mut adamw = AdamW::new(config, values);
        adamw.factors[layout.output_norm()].fill((1.0, 0.0));
        for l in 0..n_layers {
            let start = layout.block(l).start;
            adamw.factors[start..start + layout.norms()[1].end].fill((1.0, 0.0));
        }
        adamw
    }

    /// One update; returns the norm of the mean gradient before clipping.
    pub fn update(&mut self, sums: &Sums, lr: f32) -> f64 {
        let c = &self.config;
        let [beta1, beta2, eps, decay, max, lr] =
            [c.beta1, c.beta2, c.eps, c.weight_decay, c.max_grad_norm, lr].map(f64::from);
        let mean: Vec<f64> = sums.grads.iter().map(|g| f64::from(*g) / sums.targets as f64).collect();
        let norm = mean.iter().map(|g| g * g).sum::<f64>().sqrt();
        let clip = if max > 0.0 && norm > max { max / norm } else { 1.0 };
        self.updates += 1;
        for (i, g) in mean.iter().map(|g| g * clip).enumerate() {
            self.m[i] = beta1 * self.m[i] + (1.0 - beta1) * g;
            self.v[i] = beta2 * self.v[i] + (1.0 - beta2) * g * g;
            let m = self.m[i] / (1.0 - beta1.powi(self.updates));
            let v = self.v[i] / (1.0 - beta2.powi(self.updates));
            let (rate, decays) = self.factors[i];
            self.theta[i] -= lr * rate * (m / (v.sqrt() + eps) + decay * decays * self.theta[i]);
        }
        norm
    }
}

/// The largest max|a − b| / max|b| over the tensors (each A, B and m) of a layout, and its place.
pub fn worst(layout: &Layout, a: &[f32], b: &[f32]) -> (f64, String) {
    let mut worst = (0.0, String::new());
    for (layer, proj, s) in layout.slots() {
        for (name, at) in [("A", s.a), ("B", s.b), ("m", s.m)] {
            let error = relative(&a[at.clone()], &b[at]);
            if error > worst.0 || error.is_nan() {
                worst = (error, format!("{name} of {} in block {layer}", proj.hf_name()));
            }
        }
    }
    worst
}

/// max|a − b| / max|b|; infinite where b is zero and a is not.
pub fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let max = |values: &mut dyn Iterator<Item = f32>| {
        values
            .fold(0.0f64, |m, v| if m.is_nan() || v.is_nan() { f64::NAN } else { m.max(f64::from(v.abs())) })
    };
    let difference = max(&mut a.iter().zip(b).map(|(a, b)| a - b));
    if difference == 0.0 { 0.0 } else { difference / max(&mut b.iter().copied()) }
}

/// The smallest cosine between the tensors of a layout, and its place.
pub fn least_cosine(layout: &Layout, a: &[f32], b: &[f32]) -> (f64, String) {
    let mut least = (1.0, String::new());
    for (layer, proj, s) in layout.slots() {
        for (name, at) in [("A", s.a), ("B", s.b), ("m", s.m)] {
            let cosine = cosine(&a[at.clone()], &b[at]);
            if cosine < least.0 || cosine.is_nan() {
                least = (cosine, format!("{name} of {} in block {layer}", proj.hf_name()));
            }
        }
    }
    least
}

/// Cosine of the angle between two vectors; 1 where both are zero.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms == 0.0 && dot(a, a) == dot(b, b) { 1.0 } else { dot(a, b) / norms }
}
