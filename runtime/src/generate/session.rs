//! One sequence being read and continued: prefill in batches, then token by token.

use std::sync::Arc;

use engraft_kernels::{Kernels, KvType};

use super::kv_cache::KvCache;
use crate::adapter::gains::kernel_words;
use crate::adapter::{Adapter, Gains, Slot};
use crate::error::{Error, ErrorKind, Result};
use crate::model::Proj;
use crate::model::weights::ModelFile;
use crate::nn::block::{self, BlockBufs, BlockWords, Keys};
use crate::nn::head::{self, HeadBufs, HeadWeights, HeadWords};
use crate::nn::{Adapted, BlockPairs, Ctx, Dropout, Gain, Pair, Precision, RowMap, rope};

/// Tokens read at once: enough rows for the tiles, little memory.
const PREFILL_ROWS: usize = 256;

/// Gains nearer to zero than this become it, since parts are divided by them.
const GAIN_MIN: f64 = 1e-20;

/// Any number of adapters as one: ranks side by side, scales folded into B.
///
/// Each adapter adds to the base what it changes in it, times its factor: W + Σ f·(W′ − W), where W′ is
/// W + s·B·A of a LoRA and c∘(W + s·B·A) of a DoRA. So the order does not matter, 1 is as trained and 0 is
/// off. (PEFT gives the same for LoRAs, for one DoRA, and for LoRAs after one DoRA; of others its result
/// depends on their order.)
pub struct StackedAdapter {
    /// Per block and projection.
    pairs: Vec<[Option<Stacked>; 7]>,
    rank: usize,
}

/// The adapters of one projection as one.
struct Stacked {
    /// `[r, in]`.
    a: Vec<f32>,
    /// Bᵀ `[r, out]`, divided by the gain where there is one.
    bt: Vec<f32>,
    rank: usize,
    /// 1 + Σ f·(c − 1) `[out]`; empty without DoRA.
    gain: Vec<f32>,
}

impl Stacked {
    /// `parts` are slot, parameters, factor, multiplier, and with DoRA gains.
    fn new(parts: &[Part<'_>]) -> Option<Stacked> {
        let outputs = parts.first()?.0.outputs;
        let mut gain = vec![1.0f64; outputs];
        for (_, _, factor, _, c) in parts {
            let c = c.iter().flat_map(|c| c.iter());
            gain.iter_mut().zip(c).for_each(|(g, c)| *g += f64::from(*factor) * (f64::from(*c) - 1.0));
        }
        // What is divided by it must stay finite.
        gain.iter_mut().filter(|g| g.abs() < GAIN_MIN).for_each(|g| *g = GAIN_MIN);
        let (mut a, mut bt, mut rank) = (Vec::new(), Vec::new(), 0);
        for (slot, theta, factor, scale, c) in parts {
            a.extend_from_slice(&theta[slot.a.clone()]);
            let effect = f64::from(scale * factor);
            let own = |i: usize| c.map_or(1.0, |c| f64::from(c[i])) / gain[i];
            for row in theta[slot.b.clone()].chunks_exact(outputs) {
                bt.extend(row.iter().enumerate().map(|(i, b)| (f64::from(*b) * effect * own(i)) as f32));
            }
            rank += slot.rank;
        }
        let has_gain = parts.iter().any(|(.., c)| c.is_some());
        let gain = gain.iter().filter(|_| has_gain).map(|g| *g as f32).collect();
        Some(Stacked { a, bt, rank, gain })
    }

    fn pair(&self) -> Pair<'_> {
        let gain = (!self.gain.is_empty()).then_some(Gain { c: &self.gain, m: &[] });
        Pair { a: &self.a, bt: &self.bt, rank: self.rank, scale: 1.0, gain }
    }
}

impl StackedAdapter {
    /// Stacks adapters with a factor each (1 is as trained). A DoRA costs one reading of the weights that
    /// it adapts.
    ///
    /// # Errors
    /// `BaseMismatch` when an adapter's shapes are not the model's.
    pub fn new(model: &ModelFile, kernels: &Kernels, adapters: &[(Adapter, f32)]) -> Result<StackedAdapter> {
        let c = model.config();
        adapters.iter().try_for_each(|(a, _)| a.check_shapes(c))?;
        let gains: Vec<Gains> = adapters.iter().map(|(a, _)| gains_of(model, kernels, a)).collect();
        let pairs: Vec<[Option<Stacked>; 7]> = (0..c.n_layers)
            .map(|l| {
                Proj::ALL.map(|p| {
                    let all = adapters.iter().zip(&gains);
                    let parts: Vec<_> = all.filter_map(|((a, f), gains)| part(a, *f, gains, l, p)).collect();
                    Stacked::new(&parts)
                })
            })
            .collect();
        let rank = pairs.iter().flatten().flatten().map(|s| s.rank).max().unwrap_or(0);
        Ok(StackedAdapter { pairs, rank })
    }

    /// The largest rank of a projection: what buffers must hold.
    pub fn rank(&self) -> usize {
        self.rank
    }
}

impl Adapted for StackedAdapter {
    fn pairs(&self, layer: usize) -> BlockPairs<'_> {
        self.pairs[layer].each_ref().map(|p| p.as_ref().map(Stacked::pair))
    }
}

/// Slot, parameters, factor, multiplier and gains of one adapter at one place.
type Part<'a> = (Slot, &'a [f32], f32, f32, Option<&'a [f32]>);

fn part<'a>(a: &'a Adapter, factor: f32, gains: &'a Gains, layer: usize, proj: Proj) -> Option<Part<'a>> {
    let slot = a.layout.slot(layer, proj)?;
    let c = a.config.dora.then(|| &gains.c()[slot.rows()]);
    Some((slot, &a.theta, factor, a.config.scale_of(layer, proj), c))
}

fn gains_of(model: &ModelFile, kernels: &Kernels, a: &Adapter) -> Gains {
    let mut scratch = vec![0.0; kernel_words(&a.layout, kernels.threads())];
    let mut gains = Gains::new(model, kernels, &a.layout, &mut scratch);
    gains.refresh(model, kernels, (&a.layout, &a.config), &a.theta, (&mut scratch, &mut []));
    gains
}

/// A sequence with its cache. Private memory: 2·L·capacity·kv elements and the buffers of one prefill.
pub struct Session {
    model: Arc<ModelFile>,
    kernels: Arc<Kernels>,
    adapter: Option<Arc<StackedAdapter>>,
    precision: Precision,
    capacity: usize,
    filled: usize,
    cache: KvCache,
    rope: Vec<f32>,
    x: Vec<f32>,
    y: Vec<f32>,
    pos: Vec<u32>,
    block: BlockBufs,
    head: HeadBufs,
    logits: Vec<f32>,
}

impl Session {
    /// A session for at most `capacity` tokens, whose cache is of type `cache`.
    ///
    /// # Errors
    /// `Unsupported` where the cache's type does not suit the model.
    pub fn new(
        model: Arc<ModelFile>,
        kernels: Arc<Kernels>,
        adapter: Option<Arc<StackedAdapter>>,
        precision: Precision,
        capacity: usize,
        cache: KvType,
    ) -> Result<Session> {
        let c = model.config();
        let rows = PREFILL_ROWS.min(capacity);
        let rank = adapter.as_ref().map_or(0, |a| a.rank);
        let words = BlockWords::new(c, rows, capacity, rank, kernels.threads(), false, false);
        let head = HeadWords::new(c, 1, kernels.threads(), false);
        let mut table = vec![0.0; rope::table_words(c, capacity)];
        rope::table(c, model.rope_freqs(), &mut table);
        Ok(Session {
            capacity,
            filled: 0,
            cache: KvCache::new(c, capacity, cache)?,
            rope: table,
            x: vec![0.0; rows * c.d_model],
            y: vec![0.0; rows * c.d_model],
            pos: Vec::with_capacity(rows),
            block: BlockBufs::new(&words, words.kernel().max(head.kernel())),
            head: HeadBufs::new(&head),
            logits: vec![0.0; c.vocab],
            precision,
            adapter,
            kernels,
            model,
        })
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.filled
    }

    /// Whether nothing was read yet.
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// Tokens that still fit.
    pub fn room(&self) -> usize {
        self.capacity - self.filled
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.filled = self.filled.min(len);
    }

    /// Reads tokens and returns the logits `[V]` of what follows them.
    ///
    /// # Errors
    /// `Misuse` for no tokens, more than there is room for, or an id outside the vocabulary.
    pub fn feed(&mut self, ids: &[u32]) -> Result<&mut [f32]> {
        let mut last = 0;
        self.read(ids, |_, rows| {
            last = rows - 1;
            Ok(())
        })?;
        Ok(self.logits_at(last))
    }

    /// Reads tokens part by part. After each part, `after` may ask [`Session::logits_at`] of its rows;
    /// it is given how many they are.
    ///
    /// # Errors
    /// As [`Session::feed`], and those of `after`.
    pub fn read(
        &mut self,
        ids: &[u32],
        mut after: impl FnMut(&mut Session, usize) -> Result<()>,
    ) -> Result<()> {
        let vocab = self.model.config().vocab;
        if ids.is_empty() || ids.len() > self.room() {
            let message = format!(
                "{} tokens do not fit the context's {} left; raise --ctx-size",
                ids.len(),
                self.room()
            );
            return Err(Error::new(ErrorKind::Misuse, message));
        }
        if let Some(bad) = ids.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::new(
                ErrorKind::Misuse,
                format!("token {bad} is outside the vocabulary of {vocab}"),
            ));
        }
        for part in ids.chunks(PREFILL_ROWS) {
            self.run(part);
            after(self, part.len())?;
        }
        Ok(())
    }

    /// Logits `[V]` of what follows row `row` of the part that was read last.
    ///
    /// # Panics
    /// If the part had no such row.
    pub fn logits_at(&mut self, row: usize) -> &mut [f32] {
        let d = self.model.config().d_model;
        let w = HeadWeights { norm: self.model.output_norm(), w: self.model.output() };
        let ctx = Ctx {
            kernels: &self.kernels,
            config: self.model.config(),
            rope: &self.rope,
            precision: self.precision,
            gradient: self.precision.into(),
        };
        let x = &self.x[row * d..(row + 1) * d];
        head::logits(&ctx, &w, x, &mut self.head, &mut self.block.kernel, &mut self.logits);
        &mut self.logits
    }

    /// Runs all blocks over one part; its outputs are in `x` then.
    fn run(&mut self, ids: &[u32]) {
        let c = self.model.config();
        let (n, d) = (ids.len(), c.d_model);
        self.pos.clear();
        self.pos.extend((self.filled..self.filled + n).map(|p| p as u32));
        let (embedding, kernels) = (self.model.token_embd(), &*self.kernels);
        kernels.rows(d, &mut self.x[..n * d], |r, row| {
            kernels.dequantize_row(&embedding, ids[r] as usize, row);
        });
        let ctx = Ctx {
            kernels,
            config: c,
            rope: &self.rope,
            precision: self.precision,
            gradient: self.precision.into(),
        };
        let rows = RowMap { seqs: &[], pos: &self.pos };
        for l in 0..c.n_layers {
            let cache = self.cache.layer(l, self.filled);
            let pairs = self.adapter.as_ref().map_or([None; 7], |a| a.pairs(l));
            let (x, y) = (&self.x[..n * d], &mut self.y[..n * d]);
            block::forward(
                &ctx,
                &self.model.block(l),
                &pairs,
                rows,
                x,
                y,
                &mut self.block,
                Keys::Cache(cache),
                Dropout::OFF,
            );
            std::mem::swap(&mut self.x, &mut self.y);
        }
        self.filled += n;
    }
}
