//! One sequence: prefilled in batches, then continued token by token.

use std::sync::Arc;

use engraft_kernels::{Kernels, KvRows, KvType};

use super::kv_cache::KvCache;
use super::pass::{Extent, Pass};
use super::stacked::{AdapterSlot, StackedAdapter};
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::model::ModelConfig;
use crate::model::tuned::Weights;
use crate::nn::Precision;
use crate::nn::block::{Keys, KvLayer};
use crate::nn::head::{self, HeadBufs};

/// Tokens read at once: enough rows for the tiles at little memory.
const PREFILL_ROWS: usize = 256;

/// A sequence with its cache. Private memory: 2·L·capacity·kv elements, the buffers of one prefill, and the ids
/// read.
///
/// Sequences share the model, and adapters if they use the same ones, but never affect each other.
/// (Multi-threaded kernels serve one caller at a time. To run sequences in parallel without waiting, give each
/// single-threaded kernels.)
///
/// Adapters may be swapped between any two reading calls. Later tokens are computed with the new ones; the
/// cache keeps earlier keys and values as the old ones made them, until [`Sequence::refresh`] recomputes them.
pub struct Sequence {
    pass: Pass,
    /// Where adapters come from, unless set on this sequence.
    slot: Option<Arc<AdapterSlot>>,
    /// The slot generation the adapters came from.
    generation: Option<u64>,
    capacity: usize,
    filled: usize,
    /// Ids of what the cache holds.
    ids: Vec<u32>,
    cache: KvCache,
    logits: Vec<f32>,
}

impl Sequence {
    /// A sequence on a model file or on tuned weights, for at most `capacity` tokens, with a cache of type
    /// `cache`.
    ///
    /// # Errors
    /// `Unsupported` if the cache's type doesn't suit the model; `BaseMismatch` for adapters stacked for a
    /// model of other shapes.
    pub fn new(
        model: impl Into<Weights>,
        kernels: Arc<Kernels>,
        adapters: Option<Arc<StackedAdapter>>,
        precision: Precision,
        capacity: usize,
        cache: KvType,
    ) -> Result<Sequence> {
        let pass = Pass::new(model.into(), kernels, adapters, precision, Sequence::extent(capacity))?;
        let c = pass.model.config();
        Ok(Sequence {
            capacity,
            filled: 0,
            ids: Vec::with_capacity(capacity),
            cache: KvCache::new(c, capacity, cache)?,
            logits: vec![0.0; c.vocab],
            slot: None,
            generation: None,
            pass,
        })
    }

    /// Bytes a sequence of `capacity` tokens holds, with adapters of rank `rank`.
    pub fn bytes(c: &ModelConfig, capacity: usize, rank: usize, threads: usize, cache: KvType) -> usize {
        // The buffers of a part, the logits, and the ids read.
        let buffers = Sequence::extent(capacity).bytes(c, rank, threads) + 4 * (c.vocab + capacity);
        KvCache::bytes(c, capacity, cache).saturating_add(buffers)
    }

    /// Tokens a sequence of this capacity reads at once.
    pub fn rows(capacity: usize) -> usize {
        PREFILL_ROWS.min(capacity)
    }

    fn extent(capacity: usize) -> Extent {
        Extent { rows: Sequence::rows(capacity), positions: capacity, head_rows: 1 }
    }

    /// Uses these adapters from the next token on, and stops following a slot. Neither blocks nor loads
    /// anything; buffers grow if the rank exceeds all earlier ones.
    ///
    /// # Errors
    /// `BaseMismatch` for adapters stacked for a model of other shapes; the old ones stay.
    pub fn set_adapters(&mut self, adapters: Option<Arc<StackedAdapter>>) -> Result<()> {
        self.pass.use_adapters(adapters)?;
        (self.slot, self.generation) = (None, None);
        Ok(())
    }

    /// Takes adapters from a slot, checked before each reading call, so a prompt is read with one set. Adapters
    /// that don't fit the model are refused by the call that would use them.
    pub fn follow(&mut self, slot: Arc<AdapterSlot>) {
        (self.slot, self.generation) = (Some(slot), None);
    }

    /// The slot generation used last; `None` without a slot or before the first read.
    pub fn generation(&self) -> Option<u64> {
        self.generation
    }

    /// Rereads everything in the cache, as if the current adapters had been there from the start; returns the
    /// logits `[V]` of the next token.
    ///
    /// # Errors
    /// `Misuse` for an empty cache, and those of [`Sequence::feed`], after which the cache is empty.
    pub fn refresh(&mut self) -> Result<&mut [f32]> {
        let ids = std::mem::replace(&mut self.ids, Vec::with_capacity(self.capacity));
        if ids.is_empty() {
            return Err(Error::new(
                ErrorKind::Misuse,
                "nothing has been read yet, so there is nothing to refresh",
            ));
        }
        self.filled = 0;
        self.feed(&ids)
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.filled
    }

    /// Whether the cache is empty.
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// How many more tokens fit.
    pub fn room(&self) -> usize {
        self.capacity - self.filled
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.filled = self.filled.min(len);
        self.ids.truncate(len);
    }

    /// Forgets everything that differs from a prompt, and at least the prompt's last token, since only reading
    /// gives logits. Returns how many of its tokens stay read.
    pub fn rewind_to(&mut self, prompt: &[u32]) -> usize {
        let same = self.ids.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let same = same.min(prompt.len().saturating_sub(1));
        self.truncate(same);
        same
    }

    /// Reads tokens and returns the logits `[V]` of the next one.
    ///
    /// # Errors
    /// `Misuse` for no tokens, more than there is room for, or an id outside the vocabulary;
    /// `BaseMismatch` if the followed slot holds adapters for a model of other shapes.
    pub fn feed(&mut self, ids: &[u32]) -> Result<&mut [f32]> {
        let mut last = 0;
        self.read(ids, |_, rows| {
            last = rows - 1;
            Ok(())
        })?;
        self.logits_at(last);
        self.pass.model.file().check_whole()?;
        Ok(&mut self.logits)
    }

    /// Reads tokens part by part. After each part, `after` receives its number of rows and may call
    /// [`Sequence::logits_at`] on them.
    ///
    /// # Errors
    /// As [`Sequence::feed`], and those of `after`.
    pub fn read(
        &mut self,
        ids: &[u32],
        mut after: impl FnMut(&mut Sequence, usize) -> Result<()>,
    ) -> Result<()> {
        if ids.is_empty() || ids.len() > self.room() {
            let message =
                format!("{} tokens don't fit: the context has room for {} more", ids.len(), self.room());
            return Err(Error::new(ErrorKind::Misuse, message).advise(Advice::LongerContext));
        }
        check_ids(self.pass.model.config(), ids)?;
        self.take_from_slot()?;
        for part in ids.chunks(PREFILL_ROWS) {
            self.run(part);
            self.pass.model.file().check_whole()?;
            after(self, part.len())?;
        }
        Ok(())
    }

    /// Checks the slot; does nothing more if nothing was swapped.
    fn take_from_slot(&mut self) -> Result<()> {
        let Some(new) = self.slot.as_ref().and_then(|s| s.newer_than(self.generation)) else { return Ok(()) };
        self.pass.use_adapters(new.adapters.clone())?;
        self.generation = Some(new.generation);
        Ok(())
    }

    /// The cache alone, without the buffers that fill it.
    pub(super) fn into_cache(self) -> KvCache {
        self.cache
    }

    /// Logits `[V]` of the token after row `row` of the last part read.
    ///
    /// # Panics
    /// If the part had no such row.
    pub fn logits_at(&mut self, row: usize) -> &mut [f32] {
        let logits = &mut self.logits;
        self.pass.head(|ctx, w, x, head, kernel| {
            let d = w.norm.len();
            head::logits(ctx, w, &x[row * d..(row + 1) * d], head, kernel, logits);
        });
        &mut self.logits
    }

    /// Sum of losses (nats) and count over the rows of the last part read that have a target (≠ `u32::MAX`).
    /// `head` must have room for them.
    ///
    /// # Panics
    /// If the part had fewer rows than there are targets.
    pub(crate) fn losses(
        &mut self,
        head: &mut HeadBufs,
        targets: &[u32],
        each: impl FnMut(usize, f64),
    ) -> (f64, usize) {
        self.pass.head(|ctx, w, x, _, kernel| {
            head::loss(ctx, w, &x[..targets.len() * w.norm.len()], targets, None, head, kernel, each)
        })
    }

    /// Logits `[n, V]` of the tokens after n rows of the last part read. `head` must have room for them.
    ///
    /// # Panics
    /// If the part had no such rows, or `out` has another size.
    pub(crate) fn logits_of(&mut self, rows: &[usize], head: &mut HeadBufs, out: &mut [f32]) {
        self.pass.head(|ctx, w, x, _, kernel| head::gathered_logits(ctx, w, x, rows, head, kernel, out));
    }

    /// Hidden states `[rows, d]` of the first rows of the last part read, before the final norm.
    ///
    /// # Panics
    /// If the part had fewer rows.
    pub(crate) fn hidden(&self, rows: usize) -> &[f32] {
        &self.pass.outputs()[..rows * self.pass.model.config().d_model]
    }

    /// Runs all blocks over one part.
    fn run(&mut self, ids: &[u32]) {
        let Sequence { pass, cache, filled: past, .. } = self;
        pass.run(ids, *past..*past + ids.len(), |l, go_on| {
            let (k, v) = cache.layer(l);
            go_on(Keys::Cache(KvLayer { prefix: KvRows::NONE, k, v, past: *past }));
        });
        self.filled += ids.len();
        self.ids.extend_from_slice(ids);
    }
}

/// Refuses ids without an embedding.
pub(super) fn check_ids(c: &ModelConfig, ids: &[u32]) -> Result<()> {
    match ids.iter().find(|id| **id as usize >= c.vocab) {
        None => Ok(()),
        Some(bad) => {
            let message = format!("token {bad} is outside the vocabulary of {}", c.vocab);
            Err(Error::new(ErrorKind::Misuse, message))
        }
    }
}
