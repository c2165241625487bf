//! The memory plan: what training will hold, in closed formulas, before anything is allocated.
//!
//! This room sees integers only, but for `room`, which asks the system for its limits. What the plan exceeds
//! is refused with a setting that fits.

pub mod keep;
pub mod room;

pub use keep::KeepPlan;

use crate::adapter::{binding, saving_bytes};
use crate::error::{Error, ErrorKind, Result};
use crate::model::tuned::TunedLayout;
use crate::model::{ModelConfig, Proj};
use crate::nn::block::BlockWords;
use crate::nn::head::HeadWords;
use crate::nn::rope;

/// When full fine-tuning updates the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FullUpdate {
    /// After the step: all gradients are held, so their norm can be clipped and micro-batches summed.
    AtEnd,
    /// Each block as soon as its backward is done: the gradients of one block and of the embedding are
    /// held. For a single micro-batch, without clipping.
    AtOnce,
}

/// f32 words of full fine-tuning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FullWords {
    /// The trained weights; each of the two moments alike.
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

/// What a training run asks for, as far as memory depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Request {
    /// Sequences per micro-batch.
    pub batch: usize,
    /// Tokens per sequence at most.
    pub seq: usize,
    /// Adapter parameters.
    pub params: usize,
    /// Full fine-tuning instead of an adapter: every weight is trained, and `params` is 0.
    pub full: Option<FullUpdate>,
    /// f32 words of DoRA's norms and gains ([`crate::adapter::Layout::gain_words`]); 0 without it.
    pub gain_words: usize,
    /// Whether the adapter is saved as f16, which takes a rounded copy of it.
    pub packed: bool,
    /// Whether the parameters of the best step so far are kept beside the present ones.
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
    /// Bytes held before training starts and gone by then: sampling replay rows, initializing from data.
    pub preparation_bytes: usize,
    /// Tokens of training, validation and replay data held in memory, with their masks.
    pub data_tokens: usize,
    /// Rows (examples) of that data.
    pub data_rows: usize,
    /// Heap of the tokenizer while it prepares the data, before training starts.
    pub tokenizer_bytes: usize,
    /// Private bytes of the opened model (norms; the whole file where it is not mapped).
    pub model_bytes: usize,
    /// Bytes of the model file in the map.
    pub mapped_bytes: usize,
}

/// One pool of the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Its name, as `plan --json` prints it.
    pub name: &'static str,
    /// Its size.
    pub bytes: usize,
}

/// Bytes per pool, and in all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Private memory while training, pool by pool.
    pub pools: Vec<Pool>,
    /// The largest private memory of the process: the sum of `pools`.
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
/// Bytes per data row beside its tokens.
const ROW_BYTES: usize = 64;
/// Rank of the adapter that is named where full fine-tuning does not fit.
const LORA_RANK: usize = 8;

/// Words of everything the arena holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaWords {
    /// θ, gradient, and the two moments each.
    pub params: usize,
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
    /// The plan of a request.
    pub fn new(c: &ModelConfig, r: &Request) -> MemoryPlan {
        let w = ArenaWords::new(c, r);
        let f = size_of::<f32>();
        let row_state = w.rows * (c.d_model * f + 3 * f);
        let data = r.data_tokens * TOKEN_BYTES + r.data_rows * ROW_BYTES;
        let block = w.block.activations();
        let (weights, gradients) = w.full.map_or((0, 0), |full| (full.weights, full.gradients));
        let arena = f
            * (3 * weights
                + gradients
                + 4 * w.params
                + w.gains
                + w.saved
                + w.kept()
                + block
                + w.head.total()
                + w.kernel
                + w.rope)
            + row_state;
        // The tokenizer is gone before the arena is touched; what its peak exceeds the arena by counts.
        let tokenizer = r.tokenizer_bytes.saturating_sub(arena);
        // So is all preparation.
        let preparation = r.preparation_bytes.saturating_sub(arena + tokenizer);
        // Taken of adapters only.
        let fingerprint = if r.full.is_some() { 0 } else { f * binding::words(c, r) };
        let pools = vec![
            Pool { name: "weights", bytes: f * weights },
            Pool { name: "adapter", bytes: f * w.params },
            Pool { name: "gradients", bytes: f * (w.params + gradients) },
            Pool { name: "moments", bytes: 2 * f * (w.params + weights) },
            Pool { name: "gains", bytes: f * w.gains },
            Pool { name: "saved_inputs", bytes: f * w.saved },
            Pool { name: "kept_activations", bytes: f * w.kept() },
            Pool { name: "block_activations", bytes: f * block + row_state },
            Pool { name: "head_chunk", bytes: f * w.head.total() },
            Pool { name: "kernel_scratch", bytes: f * w.kernel },
            Pool { name: "rotary_table", bytes: f * w.rope },
            Pool { name: "best_step", bytes: if r.best { f * (w.params + weights) } else { 0 } },
            Pool { name: "packing", bytes: if r.packed { saving_bytes(w.params) } else { 0 } },
            Pool { name: "fingerprint", bytes: fingerprint },
            Pool { name: "data", bytes: data },
            Pool { name: "tokenizer", bytes: tokenizer },
            Pool { name: "preparation", bytes: preparation },
            Pool { name: "model_norms", bytes: r.model_bytes },
            Pool { name: "process", bytes: process_bytes(r.threads) },
        ];
        let private_bytes = pools.iter().map(|p| p.bytes).sum();
        MemoryPlan { pools, private_bytes, mapped_bytes: r.mapped_bytes }
    }

    /// Refuses the plan when it exceeds `budget` bytes, naming what would fit.
    ///
    /// # Errors
    /// `DoesNotFit` with the largest sequence (then batch) that fits.
    pub fn check(&self, c: &ModelConfig, r: &Request, budget: usize) -> Result<()> {
        if self.private_bytes <= budget {
            return Ok(());
        }
        let fits = |r: &Request| MemoryPlan::new(c, r).private_bytes <= budget;
        if fits(&Request { preparation_bytes: 0, ..*r }) {
            let message = format!(
                "what precedes training needs {} of private memory, the budget is {}; fewer --eva-batches, or \
                 fewer --replay-tokens, fit",
                mib(self.private_bytes),
                mib(budget)
            );
            return Err(Error::new(ErrorKind::DoesNotFit, message));
        }
        // Preparation shrinks with what the hints change; it is told of once the rest fits.
        let (asked, r) = (r.keep, &Request { keep: KeepPlan::default(), preparation_bytes: 0, ..*r });
        let hint = if asked.blocks() > 0 && fits(r) {
            "--keep auto fits (it keeps what the budget allows)".to_string()
        } else {
            // The hints count inputs alone, so they hold for `auto`, and for other levels with it.
            let auto = if asked.blocks() > 0 { "--keep auto " } else { "" };
            format!("{auto}{}", self.hint(c, r, budget))
        };
        Err(Error::new(
            ErrorKind::DoesNotFit,
            format!(
                "the plan needs {} of private memory, the budget is {}; {hint}",
                mib(self.private_bytes),
                mib(budget)
            ),
        ))
    }

    /// The largest batch, else the longest sequence, that fits.
    fn hint(&self, c: &ModelConfig, r: &Request, budget: usize) -> String {
        let fits = |r: &Request| MemoryPlan::new(c, r).private_bytes <= budget;
        if r.full == Some(FullUpdate::AtEnd) {
            let at_once = Request { full: Some(FullUpdate::AtOnce), ..*r };
            let saves = FullWords::new(c, FullUpdate::AtOnce).gradients < TunedLayout::new(c).len();
            if saves && fits(&at_once) {
                return "--max-grad-norm 0 --grad-accumulation-steps 1 fits (each block's gradients are used \
                        and forgotten at once)"
                    .into();
            }
        }
        if r.batch > 1 && fits(&Request { batch: 1, ..*r }) {
            let batch = (1..r.batch).rfind(|b| fits(&Request { batch: *b, ..*r })).unwrap_or(1);
            format!("--batch-size {batch} fits (was {})", r.batch)
        } else {
            let shorter = |s: &usize| fits(&Request { batch: 1, seq: *s, ..*r });
            match (16..r.seq).step_by(16).rfind(shorter) {
                Some(s) => {
                    format!("--batch-size 1 --max-seq-length {s} fits (was {} and {})", r.batch, r.seq)
                }
                None if r.full.is_some() => self.instead_of_full(c, r, budget),
                None => self.smaller_adapter(c, r, budget),
            }
        }
    }

    /// The hint where full fine-tuning does not fit however short the sequences.
    fn instead_of_full(&self, c: &ModelConfig, r: &Request, budget: usize) -> String {
        let layers = c.n_layers;
        let pair = |p: Proj| {
            let (out, inner) = p.shape(c);
            LORA_RANK * (out + inner)
        };
        let params = layers * Proj::ALL.map(pair).iter().sum::<usize>();
        let lora = Request { full: None, params, rank: LORA_RANK, ..*r };
        let bytes = MemoryPlan::new(c, &lora).private_bytes;
        let least = Request { full: Some(FullUpdate::AtOnce), batch: 1, seq: 16.min(r.seq), ..*r };
        let least = mib(MemoryPlan::new(c, &least).private_bytes);
        let what = format!("--fine-tune-type lora --rank {LORA_RANK}");
        match bytes <= budget {
            true => format!("{what} fits; full fine-tuning of this model takes {least} at least"),
            false => format!("{what} would take {}, full fine-tuning {least} at least", mib(bytes)),
        }
    }

    /// The hint where no sequence length helps alone.
    fn smaller_adapter(&self, c: &ModelConfig, r: &Request, budget: usize) -> String {
        let with_rank = |rank: usize, seq: usize| Request {
            rank,
            seq,
            batch: 1,
            params: r.params / r.rank.max(1) * rank,
            ..*r
        };
        let fits = |r: &Request| MemoryPlan::new(c, r).private_bytes <= budget;
        for rank in (1..r.rank).rev() {
            for seq in (16..=r.seq).rev().step_by(16) {
                if fits(&with_rank(rank, seq)) {
                    return format!("--rank {rank} --batch-size 1 --max-seq-length {seq} fits");
                }
            }
        }
        let least = MemoryPlan::new(c, &with_rank(1, 16)).private_bytes;
        format!("no setting of this model fits; the smallest (rank 1, sequence 16) needs {}", mib(least))
    }
}

/// Private memory of the process itself with its worker threads.
pub fn process_bytes(threads: usize) -> usize {
    PROCESS_BYTES + threads * THREAD_BYTES
}

/// A size for people, by 1024: `97.3 MiB`.
pub fn show_bytes(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, "B");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

/// Bytes as MiB for people.
pub fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}
