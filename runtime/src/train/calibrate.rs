//! Times the pieces of a step on this device, and predicts from them the rate for every choice of what blocks
//! keep.

use std::sync::Arc;
use std::time::{Duration, Instant};

use engraft_kernels::Kernels;

use super::chain::{AdapterView, pair_grads};
use super::optim::{AdamW, AdamWConfig};
use crate::adapter::{Gains, Layout, LoraConfig};
use crate::model::weights::ModelFile;
use crate::nn::block::{self, BlockBufs, Keys};
use crate::nn::divergence::{self, Direction, KlPenalty, Pull};
use crate::nn::head::{self, HeadBufs, HeadWeights};
use crate::nn::keep::{Keep, KeepPrecision, Kept};
use crate::nn::{Adapted, Ctx, Dropout, GradientPrecision, Precision, RowMap, rope};
use crate::plan::{ArenaWords, KeepPlan, Request};
use crate::rng::Rng;

/// Blocks to time, evenly spread, since their weights may have different types.
const BLOCKS: usize = 6;
/// Most runs per block.
const REPEATS: usize = 7;
/// No further block is started after this.
const ENOUGH: Duration = Duration::from_millis(1500);

/// Seconds for each piece of one micro-batch: the mean over blocks of the median over repeats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pieces {
    /// A block's forward.
    pub forward_s: f64,
    /// The part from q to x2, recomputed by a block that keeps only its input.
    pub attention_s: f64,
    /// The part for gate and up, recomputed by a block that keeps less than everything.
    pub gate_up_s: f64,
    /// A block's backward when everything was kept, including recomputed norms and activation.
    pub backward_s: f64,
    /// Rounding the attention half to bf16 and back.
    pub convert_attention_s: f64,
    /// The same for everything kept.
    pub convert_all_s: f64,
    /// Head and loss with the gradient, and the base's head if there is a KL term.
    pub head_s: f64,
    /// Embedding, optimizer and DoRA's gains.
    pub rest_s: f64,
}

impl Pieces {
    /// Seconds of a step over one micro-batch: every block forward, the kept ones backward.
    pub fn step_s(&self, n_layers: usize, kept_blocks: usize, keep: &KeepPlan) -> f64 {
        let blocks = n_layers as f64 * self.forward_s + kept_blocks as f64 * self.backward_s;
        // The last block's forward is still in the shared buffers.
        let inputs = kept_blocks.saturating_sub(1 + keep.blocks()) as f64;
        let (attention, all) = (keep.attention as f64, keep.all as f64);
        let again = inputs * (self.attention_s + self.gate_up_s) + attention * self.gate_up_s;
        let converted = match keep.precision {
            KeepPrecision::F32 => 0.0,
            KeepPrecision::Bf16 => attention * self.convert_attention_s + all * self.convert_all_s,
        };
        blocks + again + converted + self.head_s + self.rest_s
    }

    /// Tokens per second of such steps at the request's shape, if every row is full and every token a target.
    pub fn tokens_per_s(&self, n_layers: usize, r: &Request) -> f64 {
        // With a KL term the base also runs forward, slightly faster than with the adapter.
        let base_s = if r.beside_base { n_layers as f64 * self.forward_s } else { 0.0 };
        (r.batch * r.seq) as f64 / (self.step_s(n_layers, r.kept_blocks, &r.keep) + base_s)
    }
}

/// Times the pieces at the request's shape, in about two seconds, or as long as one block takes if that is
/// longer. Allocates less than the request's plan.
pub fn calibrate(
    model: &ModelFile,
    kernels: &Arc<Kernels>,
    lora: &LoraConfig,
    request: &Request,
    precision: Precision,
    gradient: GradientPrecision,
) -> Pieces {
    let mut run = Timing::new(model, kernels, lora, request);
    let c = model.config();
    let mut table = vec![0.0; rope::table_words(c, request.seq)];
    rope::table(c, model.rope_freqs(), &mut table);
    let ctx = Ctx::new(kernels, c, &table, precision).with_gradient(gradient);
    let mut pieces = run.blocks(&ctx, lora.dropout);
    pieces.head_s = run.head(&ctx, request.beside_base);
    pieces.rest_s = run.rest();
    pieces
}

/// Buffers of one block's step, the head's, and the adapter's.
struct Timing<'a> {
    model: &'a ModelFile,
    kernels: &'a Kernels,
    layout: Layout,
    lora: &'a LoraConfig,
    theta: Vec<f32>,
    gains: Gains,
    grads: Vec<f32>,
    optimizer: AdamW,
    block: BlockBufs,
    head: HeadBufs,
    /// `[all, attention]` of one block, in bf16.
    kept: [Kept; 2],
    ids: Vec<u32>,
    seqs: Vec<std::ops::Range<usize>>,
    pos: Vec<u32>,
    x: Vec<f32>,
    y: Vec<f32>,
}

impl<'a> Timing<'a> {
    fn new(model: &'a ModelFile, kernels: &'a Kernels, lora: &'a LoraConfig, r: &Request) -> Timing<'a> {
        let c = model.config();
        let words = ArenaWords::new(c, r);
        let rows = r.batch * r.seq;
        let mut rng = Rng::new(1, 1);
        let layout = Layout::new(c, lora);
        let mut block = BlockBufs::new(&words.block, words.kernel);
        let kept = |keep| Kept::new(&words.block, keep, KeepPrecision::Bf16);
        Timing {
            theta: (0..layout.len()).map(|_| 0.02 * (rng.f32() - 0.5)).collect(),
            grads: vec![0.0; layout.len()],
            optimizer: AdamW::new(AdamWConfig::default(), layout.len()),
            lora,
            gains: Gains::new(model, kernels, &layout, &mut block.kernel),
            block,
            head: HeadBufs::new(&words.head),
            layout,
            kept: [kept(Keep::All), kept(Keep::Attention)],
            ids: (0..rows).map(|_| rng.below(c.vocab as u64) as u32).collect(),
            seqs: (0..r.batch).map(|i| i * r.seq..(i + 1) * r.seq).collect(),
            pos: (0..rows).map(|i| (i % r.seq) as u32).collect(),
            x: vec![0.0; rows * c.d_model],
            y: vec![0.0; rows * c.d_model],
            model,
            kernels,
        }
    }

    fn embed(&mut self) {
        let (embedding, ids, k) = (self.model.token_embd(), &self.ids, self.kernels);
        k.rows(self.model.config().d_model, &mut self.x, |r, row| {
            k.dequantize_row(&embedding, ids[r] as usize, row);
        });
    }

    /// The blocks' pieces, with head and rest left at zero.
    fn blocks(&mut self, ctx: &Ctx<'_>, dropout: f32) -> Pieces {
        let (first, n) = (self.layout.layers()[0], ctx.config.n_layers);
        let count = BLOCKS.min(n - first);
        let chosen = |i: usize| first + i * (n - first) / count;
        let dropout = Dropout { p: dropout, key: 1 };
        self.embed();
        // The first run touches every page.
        self.block_once(ctx, chosen(0), dropout);
        let started = Instant::now();
        let mut samples = vec![Vec::with_capacity(REPEATS); count];
        'enough: for _ in 0..REPEATS {
            for (i, sample) in samples.iter_mut().enumerate() {
                sample.push(self.block_once(ctx, chosen(i), dropout));
                if started.elapsed() > ENOUGH {
                    break 'enough;
                }
            }
        }
        samples.retain(|s| !s.is_empty());
        let mean = |piece: usize| {
            let medians = samples.iter().map(|s| median(s.iter().map(|times| times[piece]).collect()));
            medians.sum::<f64>() / samples.len() as f64
        };
        Pieces {
            forward_s: mean(0),
            attention_s: mean(1),
            gate_up_s: mean(2),
            convert_all_s: mean(3),
            convert_attention_s: mean(4),
            backward_s: mean(5),
            ..Pieces::default()
        }
    }

    /// Seconds of the pieces of block `l`, in the order [`Timing::blocks`] reads.
    fn block_once(&mut self, ctx: &Ctx<'_>, l: usize, dropout: Dropout) -> [f64; 6] {
        let (w, c, m) = (self.model.block(l), ctx.config, self.pos.len());
        let rows = RowMap { seqs: &self.seqs, pos: &self.pos };
        let view = AdapterView {
            layout: &self.layout,
            theta: &self.theta,
            config: self.lora,
            gains: self.gains.c(),
        };
        let (pairs, b, x, y) = (view.pairs(l), &mut self.block, &self.x, &mut self.y);
        let forward = seconds(|| block::forward(ctx, &w, &pairs, rows, x, y, b, Keys::Batch, dropout));
        let attention = seconds(|| block::attention_part(ctx, &w, &pairs, rows, x, b, Keys::Batch, dropout));
        let gate_up = seconds(|| block::gate_up_part(ctx, &w, &pairs, m, b, dropout));
        let [all, part] = self.kept.each_mut().map(|kept| {
            seconds(|| {
                kept.take(ctx.kernels, c, m, x, b);
                kept.give(ctx.kernels, c, m, x, b);
            })
        });
        let grads = pair_grads(&self.layout, l, &mut self.grads);
        y.fill(1e-3);
        // The values don't matter here, so x also serves as the block's output.
        let backward =
            seconds(|| block::backward(ctx, &w, &pairs, grads, rows, (x, x), y, b, Keep::All, dropout, true));
        [forward, attention, gate_up, all, part, backward]
    }

    /// Seconds of head and loss with a target in every row.
    fn head(&mut self, ctx: &Ctx<'_>, beside_base: bool) -> f64 {
        let w = HeadWeights { norm: self.model.output_norm(), w: self.model.output() };
        let (x, ids, dx) = (&self.x, &self.ids, &mut self.y);
        let (head, kernel) = (&mut self.head, &mut self.block.kernel);
        let penalty = KlPenalty { weight: 1.0, direction: Direction::Forward };
        repeated(|| {
            if beside_base {
                divergence::keep_base(ctx, &w, x, ids, head);
                let pull = Some((Pull { penalty, alone: false }, &mut dx[..]));
                divergence::loss(ctx, &w, x, ids, pull, head, kernel, |_, _| {});
                return;
            }
            head::loss(ctx, &w, x, ids, Some(dx), head, kernel, |_, _| {});
        })
    }

    /// Seconds of the embedding, the optimizer and DoRA's gains.
    fn rest(&mut self) -> f64 {
        repeated(|| {
            self.embed();
            let (of, scratch) = ((&self.layout, self.lora), (&mut *self.block.kernel, &mut *self.block.acts));
            self.gains.refresh(self.model, self.kernels, of, &self.theta, scratch);
            self.optimizer.update(self.kernels, &mut self.theta, &self.grads, 1.0, 1e-6);
            self.grads.fill(1e-6);
        })
    }
}

fn seconds(work: impl FnOnce()) -> f64 {
    let started = Instant::now();
    work();
    started.elapsed().as_secs_f64()
}

/// The median of three runs after the first, or the first itself if it took long.
fn repeated(mut work: impl FnMut()) -> f64 {
    let first = seconds(&mut work);
    if first > ENOUGH.as_secs_f64() / 2.0 {
        return first;
    }
    median((0..3).map(|_| seconds(&mut work)).collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::keep::rungs;

    #[test]
    fn more_kept_is_predicted_to_be_no_slower() {
        let pieces = Pieces {
            forward_s: 5.0,
            attention_s: 2.0,
            gate_up_s: 1.5,
            backward_s: 9.0,
            convert_attention_s: 0.1,
            convert_all_s: 0.2,
            head_s: 40.0,
            rest_s: 3.0,
        };
        for precision in [KeepPrecision::F32, KeepPrecision::Bf16] {
            let times: Vec<f64> = rungs(precision, 30).iter().map(|k| -pieces.step_s(30, 30, k)).collect();
            assert!(times.is_sorted(), "{times:?}");
        }
        // Twelve blocks back of thirty; the last of them for nothing, four whole, three by half.
        let keep = KeepPlan { all: 4, attention: 3, precision: KeepPrecision::F32 };
        let expected = 30.0 * 5.0 + 12.0 * 9.0 + 4.0 * 3.5 + 3.0 * 1.5 + 43.0;
        assert!((pieces.step_s(30, 12, &keep) - expected).abs() < 1e-9);
    }
}
