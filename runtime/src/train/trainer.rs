//! The trainer: parameters, gradients, optimizer and chain of one run.

use std::sync::Arc;

use engraft_kernels::Kernels;

use super::chain::{AdapterView, Chain, Evaluated};
use super::numbers::{Numbers, NumbersMut, State};
use super::optim::AdamWConfig;
use super::schedule::Schedule;
use crate::adapter::{Adapter, Gains, Layout, TrainedWith};
use crate::data::Batch;
use crate::error::{Error, ErrorKind, Result};
use crate::model::weights::ModelFile;
use crate::nn::divergence::{Compared, Direction, KlPenalty, Pull};
use crate::nn::{Dropout, GradientPrecision, Precision};
use crate::plan::ArenaWords;

/// Settings of the optimization.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainOptions {
    /// The optimizer's.
    pub adamw: AdamWConfig,
    /// Learning rate per step.
    pub schedule: Schedule,
    /// Seed of dropout.
    pub seed: u64,
    /// How products are computed.
    pub precision: Precision,
    /// How input gradients are computed.
    pub gradient: GradientPrecision,
    /// A penalty for drifting from the base; requires `beside_base` in the plan.
    pub kl: Option<KlPenalty>,
    /// Whether A stays as it begins, so that it needs neither gradients nor moments (as in FFA-LoRA, arXiv
    /// 2403.12313).
    pub freeze_a: bool,
}

/// What one optimizer step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Mean loss over the step's targets, nats.
    pub loss: f64,
    /// Mean divergence from the base, nats per target, before weighting; `None` without a penalty.
    pub kl: Option<f64>,
    /// Targets of the step.
    pub targets: usize,
    /// Tokens of the step.
    pub tokens: usize,
    /// Norm of the mean gradient, before clipping.
    pub grad_norm: f64,
    /// Learning rate used.
    pub lr: f32,
}

/// One training run.
pub struct Trainer {
    chain: Chain,
    kernels: Arc<Kernels>,
    model: Arc<ModelFile>,
    adapter: Adapter,
    gains: Gains,
    /// The precision at which the current θ's gains were computed, if they were.
    fresh: Option<Precision>,
    /// Where gradients and moments lie: as in θ, or without A while that is frozen.
    trained: Layout,
    grads: Vec<f32>,
    pub(super) state: State,
    /// Rows of ordinary text on which the next step also stays near the base, and the weight of their mean
    /// divergence.
    general: Option<(Batch, f32)>,
}

impl Trainer {
    /// Allocates the arena that `words` describes and takes the adapter.
    pub fn new(
        model: Arc<ModelFile>,
        kernels: Arc<Kernels>,
        words: ArenaWords,
        adapter: Adapter,
        options: TrainOptions,
    ) -> Trainer {
        let trained = if options.freeze_a { adapter.layout.without_a() } else { adapter.layout.clone() };
        let n = trained.len();
        let mut chain = Chain::new(model.clone(), kernels.clone(), options.precision, words)
            .with_gradient_precision(options.gradient);
        Trainer {
            gains: Gains::new(&model, &kernels, &adapter.layout, chain.kernel_scratch()),
            fresh: None,
            chain,
            model,
            kernels,
            trained,
            grads: vec![0.0; n],
            state: State::new(options, n),
            adapter,
            general: None,
        }
    }

    /// Lets the next step also keep the model near its base on these rows: their mean KL(base‖tuned) joins the step's
    /// mean loss with this weight; their own words are no targets. Needs `beside_base` in the plan.
    pub fn stay_near_base_on(&mut self, rows: Batch, weight: f32) {
        self.general = Some((rows, weight));
    }

    /// The current adapter.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// What the adapter's file will say about its training.
    pub fn meta_mut(&mut self) -> &mut TrainedWith {
        &mut self.adapter.meta
    }

    /// What a checkpoint stores of it.
    pub fn numbers(&self) -> Numbers<'_> {
        self.state.numbers(&self.adapter.theta)
    }

    /// The same, for restoring.
    pub fn numbers_mut(&mut self) -> NumbersMut<'_> {
        self.fresh = None;
        self.state.numbers_mut(&mut self.adapter.theta)
    }

    /// Stores the current parameters as those of the best look.
    pub fn keep_best(&mut self) {
        self.state.keep_best(&self.adapter.theta);
    }

    /// The final adapter, with the parameters of the best look, if kept.
    pub fn into_adapter(mut self) -> Adapter {
        if !self.state.best.is_empty() {
            self.adapter.theta = self.state.best;
        }
        self.adapter
    }

    /// Gradients of the last step, as sums over its targets, in the order of θ; those of A are missing while it is
    /// frozen.
    pub fn gradients(&self) -> &[f32] {
        &self.grads
    }

    /// One optimizer step over micro-batches.
    ///
    /// # Errors
    /// `NonFinite` if loss or gradient isn't finite; `BadData` if no row has a target; `Misuse` after a restore
    /// that failed midway; `Io` if the model's file was truncated or changed. θ is unchanged in every case.
    pub fn step(&mut self, batches: &[Batch]) -> Result<StepReport> {
        if self.state.broken {
            return Err(Error::new(ErrorKind::Misuse, "a restore failed midway: restore another checkpoint"));
        }
        self.model.check_whole()?;
        self.grads.fill(0.0);
        self.refresh(self.state.options.precision);
        let (mut total, mut kl_sum) = (Evaluated::default(), 0.0);
        let mut tokens = 0;
        for (i, b) in batches.iter().enumerate() {
            let (e, kl) = self.accumulate(i, b);
            total += e;
            kl_sum += kl;
            tokens += b.ids.len();
        }
        let count = State::counted(&total)?;
        kl_sum += self.stay_near_base(total.targets);
        // Data read from a file truncated meanwhile must not change θ.
        self.model.check_whole()?;
        let lr = self.state.rate();
        let theta = &mut self.adapter.theta;
        // A non-finite loss must not change θ, whatever its gradient looks like.
        let grad_norm = match total.loss_sum.is_finite() && kl_sum.is_finite() {
            true => {
                let layouts = (&self.adapter.layout, &self.trained);
                self.state.optimizer.update_adapter(&self.kernels, layouts, theta, &self.grads, count, lr)
            }
            false => f64::NAN,
        };
        if !grad_norm.is_finite() {
            return Err(self.state.not_finite());
        }
        self.state.step += 1;
        self.fresh = None;
        let kl = self.state.options.kl.map(|_| kl_sum / count);
        Ok(StepReport { loss: total.loss_sum / count, kl, targets: total.targets, tokens, grad_norm, lr })
    }

    /// Adds the gradient of micro-batch `i` of a step; returns its loss, and its divergence if there is a
    /// penalty.
    fn accumulate(&mut self, i: usize, batch: &Batch) -> (Evaluated, f64) {
        let dropout = self.dropout(i);
        let view = view(&self.adapter, &self.gains);
        let Some(penalty) = self.state.options.kl else {
            return (self.chain.accumulate(view, batch, dropout, (&self.trained, &mut self.grads)), 0.0);
        };
        let (grads, pull) = ((&self.trained, &mut self.grads[..]), Pull { penalty, alone: false });
        let c = self.chain.accumulate_near_base(view, batch, dropout, pull, grads);
        (Evaluated { loss_sum: c.loss, targets: c.targets, sure: 0 }, c.kl(penalty.direction))
    }

    /// Adds the gradient of the general rows' divergence, weighted against `targets` of the step; returns that
    /// divergence, which only tells whether it is finite.
    fn stay_near_base(&mut self, targets: usize) -> f64 {
        let Some((batch, weight)) = self.general.take() else { return 0.0 };
        let own = batch.trained_tokens();
        if own == 0 {
            return 0.0;
        }
        let weight = weight * targets as f32 / own as f32;
        let pull = Pull { penalty: KlPenalty { weight, direction: Direction::Forward }, alone: true };
        let (view, grads) = (view(&self.adapter, &self.gains), (&self.trained, &mut self.grads[..]));
        let found = self.chain.accumulate_near_base(view, &batch, Dropout::OFF, pull, grads);
        if found.kl_forward.is_finite() { 0.0 } else { f64::NAN }
    }

    /// Mean loss over the targets of `batches`, with the adapter or (None) the base alone.
    pub fn evaluate(&mut self, batches: impl Iterator<Item = Batch>, with_adapter: bool) -> Evaluated {
        let mut total = Evaluated::default();
        // The same gains a sequence uses, to the bit.
        self.refresh(Precision::F32);
        for b in batches {
            let view = view(&self.adapter, &self.gains);
            total += self.chain.evaluate(with_adapter.then_some(&view), &b, |_, _| {});
        }
        total
    }

    /// Compares the tuned model with its base over the targets of `batches`: sums of losses and divergences.
    ///
    /// # Panics
    /// If the plan wasn't made with `beside_base`.
    pub fn compare(&mut self, batches: impl Iterator<Item = Batch>) -> Compared {
        self.refresh(Precision::F32);
        let mut total = Compared::default();
        for b in batches {
            total += self.chain.compare(&view(&self.adapter, &self.gains), &b, |_, _| {});
        }
        total
    }

    /// Updates DoRA's gains to θ: once per optimizer step, however many micro-batches it has. A step uses the
    /// same gains whether or not an evaluation came before it.
    fn refresh(&mut self, precision: Precision) {
        if self.fresh == Some(precision) {
            return;
        }
        self.fresh = Some(precision);
        let Adapter { layout, config, theta, .. } = &self.adapter;
        let scratch = self.chain.gain_scratch(precision == Precision::F32);
        self.gains.refresh(&self.model, &self.kernels, (layout, config), theta, scratch);
    }

    fn dropout(&self, micro: usize) -> Dropout {
        let p = self.adapter.config.dropout;
        let key =
            crate::rng::mix(self.state.options.seed ^ crate::rng::mix(self.state.step << 16 | micro as u64));
        Dropout { p, key }
    }
}

fn view<'a>(a: &'a Adapter, gains: &'a Gains) -> AdapterView<'a> {
    AdapterView { layout: &a.layout, theta: &a.theta, config: &a.config, gains: gains.c() }
}
