//! AdamW with moments that can be exported, so that training can be resumed.

use engraft_kernels::{AdamWStep, Kernels};

use crate::adapter::Layout;

/// Hyperparameters of AdamW.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// β₁.
    pub beta1: f32,
    /// β₂.
    pub beta2: f32,
    /// ε.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Largest gradient norm; larger gradients are scaled down to it. 0 switches clipping off.
    pub max_grad_norm: f32,
    /// LoRA+ (Hayou et al., arXiv 2402.12354): the learning rate of B as a multiple of A's. 1 is plain.
    pub lora_plus_ratio: f32,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        AdamWConfig {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            lora_plus_ratio: 1.0,
        }
    }
}

/// AdamW over one flat parameter vector.
pub struct AdamW {
    config: AdamWConfig,
    /// First moments, in the order of θ.
    pub m: Vec<f32>,
    /// Second moments.
    pub v: Vec<f32>,
    /// Updates made.
    pub updates: u64,
}

impl AdamW {
    /// Zero moments for `n` parameters.
    pub fn new(config: AdamWConfig, n: usize) -> AdamW {
        AdamW { config, m: vec![0.0; n], v: vec![0.0; n], updates: 0 }
    }

    /// One update with gradients summed over `count` targets; returns the norm of their mean.
    ///
    /// Changes nothing if the norm isn't finite.
    pub fn update(&mut self, k: &Kernels, theta: &mut [f32], grads: &[f32], count: f64, lr: f32) -> f64 {
        let (norm, step) = self.begin(grads, count, lr);
        if let Some(step) = step {
            self.update_part(k, theta, grads, 0, &step);
        }
        norm
    }

    /// [`AdamW::update`] for an adapter's parameters: B at its own rate, magnitudes without decay, which would
    /// pull them from the base's values toward zero. The second layout is that of gradients and moments; what it
    /// lacks stays as it is.
    pub fn update_adapter(
        &mut self,
        k: &Kernels,
        (layout, trained): (&Layout, &Layout),
        theta: &mut [f32],
        grads: &[f32],
        count: f64,
        lr: f32,
    ) -> f64 {
        let AdamWConfig { lora_plus_ratio: ratio, weight_decay, .. } = self.config;
        let decays_all = weight_decay == 0.0 || layout.slots().all(|(_, _, s)| s.m.is_empty());
        if ratio == 1.0 && decays_all && layout.len() == trained.len() {
            return self.update(k, theta, grads, count, lr);
        }
        let (norm, step) = self.begin(grads, count, lr);
        let Some(step) = step else { return norm };
        let of_b = AdamWStep { lr: lr * ratio, ..step };
        let of_m = AdamWStep { weight_decay: 0.0, ..step };
        for ((_, _, slot), (_, _, own)) in layout.slots().zip(trained.slots()) {
            let parts = [(slot.a, own.a, &step), (slot.b, own.b, &of_b), (slot.m, own.m, &of_m)];
            for (range, own, step) in parts.into_iter().filter(|(_, own, _)| !own.is_empty()) {
                let first = own.start;
                self.update_part(k, &mut theta[range], &grads[own], first, step);
            }
        }
        norm
    }

    /// Counts an update whose mean gradient has `norm`, and returns its parameters for [`AdamW::update_part`].
    /// `None`, without counting, if the norm isn't finite.
    pub fn begin_with(&mut self, norm: f64, count: f64, lr: f32) -> Option<AdamWStep> {
        if !norm.is_finite() {
            return None;
        }
        let c = &self.config;
        let clip = match f64::from(c.max_grad_norm) {
            max if max > 0.0 && norm > max => max / norm,
            _ => 1.0,
        };
        self.updates += 1;
        let correct = |beta: f32| (1.0 / (1.0 - f64::from(beta).powf(self.updates as f64))) as f32;
        Some(AdamWStep {
            lr,
            beta1: c.beta1,
            beta2: c.beta2,
            eps: c.eps,
            weight_decay: c.weight_decay,
            correct1: correct(c.beta1),
            correct2: correct(c.beta2),
            grad_scale: (clip / count) as f32,
        })
    }

    /// Updates part of the parameters, whose moments start at `first`.
    pub fn update_part(
        &mut self,
        k: &Kernels,
        theta: &mut [f32],
        grads: &[f32],
        first: usize,
        step: &AdamWStep,
    ) {
        let at = first..first + theta.len();
        k.adamw(theta, grads, &mut self.m[at.clone()], &mut self.v[at], step);
    }

    /// The norm of the mean gradient, and the due update if the norm is finite.
    fn begin(&mut self, grads: &[f32], count: f64, lr: f32) -> (f64, Option<AdamWStep>) {
        let norm = norm(grads) / count;
        (norm, self.begin_with(norm, count, lr))
    }
}

/// Euclidean norm, summed in f64 in index order.
fn norm(g: &[f32]) -> f64 {
    g.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt()
}
