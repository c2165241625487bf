//! The memory plan: closed formulas for what training will hold, computed before anything is allocated.
//!
//! This module works on integers only, except `room`, which reads the system's limits. A plan over the limit is
//! refused, with a setting that fits.
//!
//! ```
//! use engraft_runtime::ModelFile;
//! use engraft_runtime::plan::{MemoryPlan, Request};
//!
//! # fn main() -> engraft_runtime::Result<()> {
//! let model = ModelFile::open("../targets/cli/seedling.gguf")?;
//! let request = Request { seq: 64, ..Request::default() };
//! let longer = Request { seq: 128, ..request };
//! let bytes = |r: &Request| MemoryPlan::new(model.config(), r).private_bytes;
//! assert!(bytes(&request) < bytes(&longer));
//! # Ok(())
//! # }
//! ```

pub mod keep;
pub mod room;

pub use keep::KeepPlan;

use crate::adapter::binding::PROBES;
use crate::bytes::mib;
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::model::tuned::TunedLayout;
use crate::model::{ModelConfig, Proj};
use crate::nn::block::BlockWords;
use crate::nn::head::{self, HeadWords};
use crate::nn::rope;

/// When full fine-tuning updates the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FullUpdate {
    /// After the step. All gradients are held, so their norm can be clipped and micro-batches summed.
    AtEnd,
    /// Each block as soon as its backward is done. Only the gradients of one block and of the embedding are
    /// held. Needs a single micro-batch and no clipping.
    AtOnce,
}

/// f32 words of full fine-tuning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FullWords {
    /// The trained weights; each of the two moments takes the same.
    pub weights: usize,
    /// Gradients.
    pub gradients: usize,
    /// When the weights are updated.
    pub update: FullUpdate,
}

impl FullWords {
    fn new(c: &ModelConfig, update: FullUpdate) -> FullWords {
        let layout = TunedLayout::new(c);
        let gradients = match update {
            FullUpdate::AtEnd => layout.len(),
            FullUpdate::AtOnce => layout.outer().end + layout.block_len(),
        };
        FullWords { weights: layout.len(), gradients, update }
    }
}

/// A training run's parameters, as far as memory depends on them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Request {
    /// Sequences per micro-batch.
    pub batch: usize,
    /// Most tokens per sequence.
    pub seq: usize,
    /// Adapter parameters.
    pub params: usize,
    /// Those of them that stay as they are, and need neither gradients nor moments.
    pub frozen: usize,
    /// Full fine-tuning instead of an adapter: every weight is trained, and `params` is 0.
    pub full: Option<FullUpdate>,
    /// f32 words of DoRA's norms and gains ([`crate::adapter::Layout::gain_words`]); 0 without it.
    pub gain_words: usize,
    /// Whether the adapter is saved as f16, which needs a rounded copy.
    pub rounds: bool,
    /// Whether the best parameters so far are kept beside the current ones.
    pub best: bool,
    /// Largest rank of a projection.
    pub rank: usize,
    /// Adapted blocks, counted from the first adapted one to the last block of the model: those whose
    /// inputs must be kept.
    pub kept_blocks: usize,
    /// What those blocks keep beside their inputs.
    pub keep: KeepPlan,
    /// Worker threads.
    pub threads: usize,
    /// Whether dropout is on.
    pub dropout: bool,
    /// Whether the base's head runs beside the tuned model's: for a KL term, or to compare the two.
    pub beside_base: bool,
    /// Bytes held only before training starts: sampling replay rows, initializing from data.
    pub preparation_bytes: usize,
    /// Tokens of training, validation and replay data held in memory, with their masks.
    pub data_tokens: usize,
    /// Rows (examples) of that data.
    pub data_rows: usize,
    /// Heap of the tokenizer while it prepares the data, before training starts.
    pub tokenizer_bytes: usize,
    /// Private bytes of the opened model (norms; the whole file if it isn't mapped).
    pub model_bytes: usize,
    /// Bytes of the model file in the map.
    pub mapped_bytes: usize,
}

/// One pool of the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Its name, as machine-readable output prints it.
    pub name: &'static str,
    /// Its size.
    pub bytes: usize,
}

/// Bytes per pool, and in all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Private memory while training, pool by pool.
    pub pools: Vec<Pool>,
    /// Peak private memory of the process: the sum of `pools`.
    pub private_bytes: usize,
    /// Clean pages of the model file, which the system can evict.
    pub mapped_bytes: usize,
}

/// Private memory of the process itself: its relocated data, stacks, allocator overhead.
const PROCESS_BYTES: usize = 3 << 20;
/// Stack and bookkeeping per worker thread.
const THREAD_BYTES: usize = 64 << 10;
/// Bytes per data token: its id and its mask.
const TOKEN_BYTES: usize = 5;
/// Bytes per data row beside its tokens: the lists it stands in, the look-up that finds doubles while rows are read, and
/// what the heap rounds its two small blocks up to.
const ROW_BYTES: usize = 160;
/// Rank of the adapter suggested when full fine-tuning doesn't fit.
const LORA_RANK: usize = 8;

/// Words of everything the arena holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaWords {
    /// θ.
    pub params: usize,
    /// Gradient, and the two moments each.
    pub trained: usize,
    /// Full fine-tuning's weights, moments and gradients.
    pub full: Option<FullWords>,
    /// DoRA's norms of the base, gains, and the scratch they are computed in.
    pub gains: usize,
    /// Saved inputs: one `[rows, d]` per kept block, and one for what enters the head.
    pub saved: usize,
    /// What blocks keep beside their inputs; see [`ArenaWords::kept`].
    pub keep: KeepPlan,
    /// Block buffers.
    pub block: BlockWords,
    /// Head buffers.
    pub head: HeadWords,
    /// Rotary table.
    pub rope: usize,
    /// Rows of the largest micro-batch.
    pub rows: usize,
    /// Kernel scratch, shared by block and head.
    pub kernel: usize,
}

impl ArenaWords {
    /// The arena of a request.
    pub fn new(c: &ModelConfig, r: &Request) -> ArenaWords {
        let rows = r.batch * r.seq;
        let block = BlockWords::new(c, rows, r.seq, r.rank, r.threads, r.dropout, true);
        let head = HeadWords::new(c, rows, r.threads, true, r.beside_base);
        ArenaWords {
            params: r.params,
            trained: r.params - r.frozen,
            full: r.full.map(|update| FullWords::new(c, update)),
            gains: r.gain_words,
            saved: (r.kept_blocks + 1) * rows * c.d_model,
            keep: r.keep,
            rope: rope::table_words(c, r.seq),
            rows,
            kernel: block.kernel().max(head.kernel()),
            block,
            head,
        }
    }
}

impl MemoryPlan {
    /// The plan for a request. If it might exceed this machine's address space, the plan is one pool too large
    /// for any budget.
    pub fn new(c: &ModelConfig, r: &Request) -> MemoryPlan {
        if bytes_at_most(c, r) > usize::MAX as u128 {
            let pools = vec![Pool { name: "beyond_addresses", bytes: usize::MAX }];
            return MemoryPlan { pools, private_bytes: usize::MAX, mapped_bytes: r.mapped_bytes };
        }
        let w = ArenaWords::new(c, r);
        let f = size_of::<f32>();
        let row_state = w.rows * (c.d_model * f + 3 * f);
        let data = r.data_tokens * TOKEN_BYTES + r.data_rows * ROW_BYTES;
        let block = w.block.activations();
        let (weights, gradients) = w.full.map_or((0, 0), |full| (full.weights, full.gradients));
        let mut pools = vec![
            Pool { name: "weights", bytes: f * weights },
            Pool { name: "adapter", bytes: f * w.params },
            Pool { name: "gradients", bytes: f * (w.trained + gradients) },
            Pool { name: "moments", bytes: 2 * f * (w.trained + weights) },
            Pool { name: "gains", bytes: f * w.gains },
            Pool { name: "saved_inputs", bytes: f * w.saved },
            Pool { name: "kept_activations", bytes: f * w.kept() },
            Pool { name: "block_activations", bytes: f * block + row_state },
            Pool { name: "head_chunk", bytes: f * w.head.total() },
            Pool { name: "kernel_scratch", bytes: f * w.kernel },
            Pool { name: "rotary_table", bytes: f * w.rope },
        ];
        let arena: usize = pools.iter().map(|p| p.bytes).sum();
        // The tokenizer is freed before the arena is touched, so only its excess over the arena counts.
        let tokenizer = r.tokenizer_bytes.saturating_sub(arena);
        // The same holds for preparation.
        let preparation = r.preparation_bytes.saturating_sub(arena + tokenizer);
        // Only adapters need it.
        let fingerprint = if r.full.is_some() { 0 } else { f * fingerprint_words(c, r) };
        pools.extend([
            Pool { name: "best_step", bytes: if r.best { f * (w.params + weights) } else { 0 } },
            Pool { name: "rounding", bytes: if r.rounds { f * w.params } else { 0 } },
            Pool { name: "fingerprint", bytes: fingerprint },
            Pool { name: "data", bytes: data },
            Pool { name: "tokenizer", bytes: tokenizer },
            Pool { name: "preparation", bytes: preparation },
            Pool { name: "model_norms", bytes: r.model_bytes },
            Pool { name: "process", bytes: process_bytes(r.threads) },
        ]);
        let private_bytes = pools.iter().map(|p| p.bytes).sum();
        MemoryPlan { pools, private_bytes, mapped_bytes: r.mapped_bytes }
    }

    /// Refuses the plan if it exceeds `budget` bytes, saying what would fit.
    ///
    /// # Errors
    /// `DoesNotFit` with the largest batch, then the longest sequence, then the largest rank that fits.
    pub fn check(&self, c: &ModelConfig, r: &Request, budget: usize) -> Result<()> {
        if self.private_bytes <= budget {
            return Ok(());
        }
        let fits = |r: &Request| MemoryPlan::new(c, r).private_bytes <= budget;
        let refused = |what: &str, advice: Advice| {
            let (needed, budget) = (mib(self.private_bytes), mib(budget));
            let message = format!("{what} needs {needed} of private memory; the budget is {budget}");
            Err(Error::new(ErrorKind::DoesNotFit, message).advise(advice))
        };
        if fits(&Request { preparation_bytes: 0, ..*r }) {
            return refused("preparing for training", Advice::LessPreparation);
        }
        // The advised changes also shrink preparation; it is reported once the rest fits.
        let (asked, r) = (r.keep, &Request { keep: KeepPlan::default(), preparation_bytes: 0, ..*r });
        if asked.blocks() > 0 && fits(r) {
            return refused("the plan", Advice::KeepLess);
        }
        // The advice assumes inputs alone, so it holds if blocks keep what the memory allows.
        refused("the plan", advice(c, r, budget, asked.blocks() > 0))
    }
}

/// What fits: the largest batch, else a smaller adapter, since shorter rows may lose what is to be learned; else the longest
/// sequence, or both.
fn advice(c: &ModelConfig, r: &Request, budget: usize, keep_less: bool) -> Advice {
    let fits = |r: &Request| MemoryPlan::new(c, r).private_bytes <= budget;
    if r.full == Some(FullUpdate::AtEnd) {
        let at_once = Request { full: Some(FullUpdate::AtOnce), ..*r };
        let saves = FullWords::new(c, FullUpdate::AtOnce).gradients < TunedLayout::new(c).len();
        if saves && fits(&at_once) {
            return Advice::UpdateAtOnce;
        }
    }
    let was = (r.batch, r.seq);
    if r.batch > 1 && fits(&Request { batch: 1, ..*r }) {
        let batch = (1..r.batch).rfind(|b| fits(&Request { batch: *b, ..*r })).unwrap_or(1);
        return Advice::Batches { batch, tokens: None, was, keep_less };
    }
    if let Some(rank) = (1..r.rank).rfind(|rank| fits(&with_rank(r, *rank, r.seq))) {
        return Advice::SmallerAdapter { rank, tokens: None, keep_less };
    }
    let shorter = |s: &usize| fits(&Request { batch: 1, seq: *s, ..*r });
    match (16..r.seq).step_by(16).rfind(shorter) {
        Some(seq) => Advice::Batches { batch: 1, tokens: Some(seq), was, keep_less },
        None if r.full.is_some() => instead_of_full(c, r, budget),
        None => smaller_adapter(c, r, budget, keep_less),
    }
}

/// Advice when full fine-tuning doesn't fit, however short the sequences.
fn instead_of_full(c: &ModelConfig, r: &Request, budget: usize) -> Advice {
    let pair = |p: Proj| {
        let (out, inner) = p.shape(c);
        LORA_RANK * (out + inner)
    };
    let params = c.n_layers * Proj::ALL.map(pair).iter().sum::<usize>();
    let lora = Request { full: None, params, frozen: 0, rank: LORA_RANK, ..*r };
    let bytes = MemoryPlan::new(c, &lora).private_bytes;
    let least = Request { full: Some(FullUpdate::AtOnce), batch: 1, seq: 16.min(r.seq), ..*r };
    let full_bytes = MemoryPlan::new(c, &least).private_bytes;
    Advice::AdapterInstead { rank: LORA_RANK, bytes, fits: bytes <= budget, full_bytes }
}

/// The same with an adapter of another rank, and one row of so many positions a batch.
fn with_rank(r: &Request, rank: usize, seq: usize) -> Request {
    let scaled = |parameters: usize| parameters / r.rank.max(1) * rank;
    Request { rank, seq, batch: 1, params: scaled(r.params), frozen: scaled(r.frozen), ..*r }
}

/// Advice when neither a smaller rank nor shorter rows alone are enough.
fn smaller_adapter(c: &ModelConfig, r: &Request, budget: usize, keep_less: bool) -> Advice {
    let fits = |r: &Request| MemoryPlan::new(c, r).private_bytes <= budget;
    for rank in (1..r.rank).rev() {
        for tokens in (16..=r.seq).rev().step_by(16) {
            if fits(&with_rank(r, rank, tokens)) {
                return Advice::SmallerAdapter { rank, tokens: Some(tokens), keep_less };
            }
        }
    }
    Advice::NothingFits { least: MemoryPlan::new(c, &with_rank(r, 1, 16)).private_bytes }
}

/// An upper bound on a request's plan and on every intermediate sum, at most three times the plan. It shows
/// that no sum can wrap, which happens easily with 32 bits.
fn bytes_at_most(c: &ModelConfig, r: &Request) -> u128 {
    let of = |n: usize| n as u128;
    let (d, q, kv, ff) = (of(c.d_model), of(c.d_q()), of(c.d_kv()), of(c.d_ff));
    let (rank, seq, rows) = (of(r.rank), of(r.seq), of(r.batch) * of(r.seq));
    let wide = ff.max(q).max(2 * kv).max(d);
    let block = 3 * d + 4 * q + 2 * kv + 7 * wide + of(c.n_heads) + 10 * rank;
    let chunk = of(head::VOCAB_CHUNK.min(c.vocab)) + 32;
    let head = 2 * (5 * d + 6 * chunk + 16);
    let attention = 3 * q + 2 * kv + d + of(c.n_heads) + 8 * rank;
    let kept = of(r.keep.blocks()) * attention + of(r.keep.all) * (2 * wide + 4 * rank);
    let row = (of(r.kept_blocks) + 2) * d + kept + block + head + 8;
    let scratch = of(r.threads) * ((seq + 64) * (4 * of(c.head_dim) + 64) + 64 * (wide + rank) + (1 << 18));
    let parameters = 8 * of(r.params) + 2 * of(r.gain_words) + seq * of(c.head_dim);
    // The fingerprint also needs a pass of a few tokens.
    let words = (rows + 64) * row + scratch + parameters;
    let tables = if c.tied { 1 } else { 2 };
    let trained = (tables * of(c.vocab) + 1) * d + of(c.n_layers) * d * (2 + 2 * q + 2 * kv + 3 * ff);
    let weights = r.full.map_or(0, |_| 6 * trained);
    let others = [r.tokenizer_bytes, r.preparation_bytes, r.model_bytes, process_bytes(r.threads)];
    let data = of(r.data_tokens) * of(TOKEN_BYTES) + of(r.data_rows) * of(ROW_BYTES);
    let saving = 8 * of(r.params) + (4 << 20);
    4 * (words + weights) + others.into_iter().map(of).sum::<u128>() + data + saving
}

/// Private memory of the process itself with its worker threads.
pub fn process_bytes(threads: usize) -> usize {
    PROCESS_BYTES + threads * THREAD_BYTES
}

/// The memory request for taking a fingerprint ([`crate::probe`]) of adapters of this rank.
pub(crate) fn probing(rank: usize, threads: usize) -> Request {
    Request { batch: 1, seq: PROBES, rank, threads, ..Request::default() }
}

/// f32 words a fingerprint takes while an adapter is saved, for a training run's rank and threads: an arena
/// and, for DoRA, its gains.
fn fingerprint_words(c: &ModelConfig, training: &Request) -> usize {
    let arena = ArenaWords::new(c, &probing(training.rank, training.threads));
    let rows = PROBES * (c.d_model + 3);
    let gains = if training.gain_words > 0 { training.gain_words + arena.kernel } else { 0 };
    arena.saved + arena.block.activations() + arena.head.total() + arena.kernel + arena.rope + rows + gains
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::keep::{Keep, KeepPrecision};

    /// SmolLM2-135M's shape, and one of eight billion parameters.
    fn shapes() -> [ModelConfig; 2] {
        let small = ModelConfig {
            architecture: "llama".into(),
            vocab: 49_152,
            d_model: 576,
            n_layers: 30,
            n_heads: 9,
            n_kv_heads: 3,
            head_dim: 64,
            d_ff: 1536,
            rope_dim: 64,
            rope_base: 1e5,
            rope_scale: 1.0,
            rms_eps: 1e-5,
            context_len: 8192,
            tied: true,
        };
        let large = ModelConfig {
            vocab: 128_256,
            d_model: 4096,
            n_layers: 32,
            n_heads: 32,
            n_kv_heads: 8,
            head_dim: 128,
            d_ff: 14_336,
            tied: false,
            ..small.clone()
        };
        [small, large]
    }

    /// A smaller rank loses less than answers that are cut off.
    #[test]
    fn a_smaller_rank_is_advised_before_shorter_rows() {
        let [c, _] = shapes();
        let request = |rank: usize, seq: usize| {
            with_rank(&Request { rank: 8, params: 8 << 17, kept_blocks: 30, ..Request::default() }, rank, seq)
        };
        let (asked, bytes) = (request(8, 256), |r: &Request| MemoryPlan::new(&c, r).private_bytes);
        let found = advice(&c, &asked, bytes(&request(7, 256)), false);
        assert_eq!(found, Advice::SmallerAdapter { rank: 7, tokens: None, keep_less: false });
        // Rows that are too long at any rank.
        let found = advice(&c, &asked, bytes(&request(8, 64)), false);
        assert!(matches!(found, Advice::Batches { tokens: Some(64..), .. }), "{found:?}");
    }

    #[test]
    fn no_plan_exceeds_its_bound_which_is_near() {
        for c in shapes() {
            for (batch, seq, rank, threads) in
                [(1, 16, 1, 1), (1, 256, 8, 2), (4, 2048, 256, 64), (4096, 8192, 8, 4)]
            {
                for keep in [Keep::Inputs, Keep::Attention, Keep::All] {
                    let params = c.n_layers * rank * 7 * 2 * c.d_ff;
                    let keep = KeepPlan::uniform(keep, KeepPrecision::F32, c.n_layers);
                    let kept_blocks = c.n_layers;
                    let plain = Request {
                        batch,
                        seq,
                        rank,
                        threads,
                        params,
                        kept_blocks,
                        keep,
                        ..Request::default()
                    };
                    for r in [
                        plain,
                        Request { beside_base: true, dropout: true, rounds: true, best: true, ..plain },
                        Request { full: Some(FullUpdate::AtEnd), params: 0, rank: 0, best: true, ..plain },
                    ] {
                        let (plan, bound) =
                            (MemoryPlan::new(&c, &r).private_bytes as u128, bytes_at_most(&c, &r));
                        if bound > usize::MAX as u128 {
                            assert_eq!(plan, usize::MAX as u128, "{r:?}");
                            continue;
                        }
                        assert!(plan <= bound, "{plan} of {bound}: {r:?}");
                        assert!(batch * seq < 256 || bound < 4 * plan, "{bound} for {plan}: {r:?}");
                    }
                }
            }
        }
    }

    /// Sizes that overflow 32 or 64 bits are refused like anything else that doesn't fit.
    #[test]
    fn what_can_not_be_addressed_is_refused() {
        let [c, _] = shapes();
        let r = Request { batch: usize::MAX / 2, seq: 8192, rank: 8, threads: 1, ..Request::default() };
        let plan = MemoryPlan::new(&c, &r);
        assert_eq!(plan.private_bytes, usize::MAX);
        let small = Request { batch: 4096, seq: 8192, ..r };
        let refused = MemoryPlan::new(&c, &small).check(&c, &small, 64 << 20).expect_err("too much");
        assert_eq!(refused.kind(), ErrorKind::DoesNotFit);
    }
}
