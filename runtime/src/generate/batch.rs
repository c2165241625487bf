//! Continues several sequences at once that start with the same tokens.
//!
//! A step reads all weights, whether for one token or for one token of each sequence. The common prefix is read
//! once; its keys and values are held once and stay in the CPU's cache while all sequences attend to them.

use std::sync::Arc;

use engraft_kernels::{Kernels, KvType};

use super::kv_cache::KvCache;
use super::pass::{Extent, Pass};
use super::sampler::no_token;
use super::sequence::{Sequence, check_ids};
use super::stacked::StackedAdapter;
use crate::error::{Error, ErrorKind, Result};
use crate::model::ModelConfig;
use crate::model::tuned::Weights;
use crate::nn::Precision;
use crate::nn::block::{Keys, KvBatch, KvLayer};
use crate::nn::head;

/// An answer ends once its last this many tokens repeat one short cycle: greedy choice never leaves it.
pub const CYCLE_TOKENS: usize = 64;
/// The longest cycle detected.
pub const CYCLE_PERIOD_MAX: usize = 16;

/// Whether the last [`CYCLE_TOKENS`] tokens repeat with a period of at most [`CYCLE_PERIOD_MAX`].
pub fn is_cycle(answer: &[u32]) -> bool {
    let Some(from) = answer.len().checked_sub(CYCLE_TOKENS) else { return false };
    let last = &answer[from..];
    (1..=CYCLE_PERIOD_MAX).any(|p| last[p..] == last[..CYCLE_TOKENS - p])
}

/// The tokens sequences start with, read once by one model with one set of adapters. Immutable.
pub struct Prefix {
    model: Weights,
    adapters: Option<Arc<StackedAdapter>>,
    precision: Precision,
    ids: Vec<u32>,
    cache: KvCache,
}

impl Prefix {
    /// Reads `ids`, which may be empty; stores keys and values as type `cache`.
    ///
    /// # Errors
    /// Those of [`Sequence::new`] and [`Sequence::read`].
    pub fn read(
        model: impl Into<Weights>,
        kernels: Arc<Kernels>,
        adapters: Option<Arc<StackedAdapter>>,
        precision: Precision,
        cache: KvType,
        ids: &[u32],
    ) -> Result<Prefix> {
        let model = model.into();
        let cache = if ids.is_empty() {
            KvCache::new(model.config(), 0, cache)?
        } else {
            let mut sequence =
                Sequence::new(model.clone(), kernels, adapters.clone(), precision, ids.len(), cache)?;
            sequence.read(ids, |_, _| Ok(()))?;
            sequence.into_cache()
        };
        Ok(Prefix { model, adapters, precision, ids: ids.to_vec(), cache })
    }

    /// The tokens.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Bytes a prefix of `len` tokens holds.
    pub fn bytes(c: &ModelConfig, len: usize, cache: KvType) -> usize {
        KvCache::bytes(c, len, cache) + len * size_of::<u32>()
    }

    /// Checks that a model with its adapters would compute the same keys and values.
    fn check_of(&self, pass: &Pass) -> Result<()> {
        let same_adapters = match (&self.adapters, &pass.adapters) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        let same = self.model.is(&pass.model) && same_adapters && self.precision == pass.precision;
        // An empty prefix is the same for every model of these shapes.
        let fits = if self.ids.is_empty() { self.model.config() == pass.model.config() } else { same };
        match fits {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::BaseMismatch,
                "this prefix was read by another model, with other adapters or in another precision; read it again \
                 with these",
            )),
        }
    }
}

/// Sequences that continue one [`Prefix`] side by side. Private memory: [`Sequences::bytes`], and the
/// answers.
pub struct Sequences {
    pass: Pass,
    prefix: Arc<Prefix>,
    capacity: usize,
    /// Own positions, `[L, slots, capacity, kv·hd]`.
    cache: KvCache,
    slots: Vec<Option<Continuation>>,
    /// For each row of a step: its slot, the slot's filled positions, and the token read.
    rows: Vec<(usize, usize)>,
    ids: Vec<u32>,
    chosen: Vec<Option<u32>>,
}

/// The work of a slot.
#[derive(Clone, Copy)]
struct Continuation {
    /// Index of the prompt.
    prompt: usize,
    /// Own positions filled.
    past: usize,
    /// The next token.
    last: u32,
}

impl Sequences {
    /// The default number of slots, memory permitting. Stored blocks are decoded once for all rows of a step,
    /// so more slots are faster, with diminishing returns: for SmolLM2-135M (Q4_1, AVX-512, one thread), 24
    /// slots reach 0.76 of the rate of 48, and 16 reach 0.55. It is a multiple of every instruction set's tile
    /// rows.
    pub const SLOTS: usize = 48;

    /// `slots` sequences of at most `capacity` positions each after the prefix, stored as the prefix's are.
    ///
    /// # Errors
    /// `Misuse` without slots or capacity; `BaseMismatch` for adapters stacked for a model of other shapes, or
    /// a prefix read by another model, with other adapters or in another precision.
    pub fn new(
        model: impl Into<Weights>,
        kernels: Arc<Kernels>,
        adapters: Option<Arc<StackedAdapter>>,
        precision: Precision,
        prefix: Arc<Prefix>,
        slots: usize,
        capacity: usize,
    ) -> Result<Sequences> {
        if slots == 0 || capacity == 0 {
            let message = format!("{slots} sequences of {capacity} tokens: both must be at least 1");
            return Err(Error::new(ErrorKind::Misuse, message));
        }
        let extent = Sequences::extent(prefix.ids.len(), slots, capacity);
        let pass = Pass::new(model.into(), kernels, adapters, precision, extent)?;
        prefix.check_of(&pass)?;
        Ok(Sequences {
            cache: KvCache::new(pass.model.config(), slots * capacity, prefix.cache.ty())?,
            slots: vec![None; slots],
            rows: Vec::with_capacity(slots),
            ids: Vec::with_capacity(slots),
            chosen: vec![None; slots],
            capacity,
            prefix,
            pass,
        })
    }

    fn extent(prefix: usize, slots: usize, capacity: usize) -> Extent {
        let rows = Sequence::rows(capacity).max(slots);
        Extent { rows, positions: prefix + capacity, head_rows: slots }
    }

    /// Bytes held apart from the answers, for `slots` sequences of `capacity` positions after a prefix of
    /// `prefix` tokens, with adapters of rank `rank`. The prefix's own [`Prefix::bytes`] come on top.
    pub fn bytes(
        c: &ModelConfig,
        prefix: usize,
        slots: usize,
        capacity: usize,
        rank: usize,
        threads: usize,
        cache: KvType,
    ) -> usize {
        let buffers = Sequences::extent(prefix, slots, capacity).bytes(c, rank, threads);
        let slot = size_of::<Option<Continuation>>()
            + size_of::<(usize, usize)>()
            + size_of::<u32>()
            + size_of::<Option<u32>>();
        buffers + slots * slot + KvCache::bytes(c, slots * capacity, cache)
    }

    /// Greedy answers after the prefix and each prompt: at most `limit` tokens, including the end token. An
    /// answer also ends when its slot is full or it [`is_cycle`]. A slot whose answer ends takes the next
    /// prompt at once.
    ///
    /// Answers come in the order of the prompts, regardless of the number of threads. They equal those of a
    /// [`Sequence`] that reads prefix and prompt and takes the likeliest token, for any number of slots, unless
    /// two scores agree up to the last bits: products of up to eight rows are summed in a different order than
    /// larger ones (except quantized weights in f32). The same prompts with the same number of slots always
    /// give the same answers.
    ///
    /// After each prompt and each step, `progress` receives the number of answers done; return false to stop.
    ///
    /// # Errors
    /// `Misuse` for a prompt that is empty, longer than the capacity or holds ids outside the vocabulary,
    /// checked before any is read; `NonFinite` if no token can be chosen; `Cancelled`.
    pub fn complete(
        &mut self,
        prompts: &[Vec<u32>],
        limit: usize,
        is_end: impl Fn(u32) -> bool,
        progress: impl FnMut(usize) -> bool,
    ) -> Result<Vec<Vec<u32>>> {
        let is_over = |_: usize, answer: &[u32]| answer.last().is_some_and(|last| is_end(*last));
        self.complete_until(prompts, limit, is_over, progress)
    }

    /// [`Sequences::complete`], where an answer ends once `is_over` says so of its prompt's index and its tokens so far.
    ///
    /// # Errors
    /// As [`Sequences::complete`].
    pub fn complete_until(
        &mut self,
        prompts: &[Vec<u32>],
        limit: usize,
        is_over: impl Fn(usize, &[u32]) -> bool,
        mut progress: impl FnMut(usize) -> bool,
    ) -> Result<Vec<Vec<u32>>> {
        self.check_prompts(prompts)?;
        let mut answers = vec![Vec::new(); prompts.len()];
        let mut waiting = 0..if limit == 0 { 0 } else { prompts.len() };
        self.slots.fill(None);
        let mut go_on = |done: usize| match progress(done) {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Cancelled, "stopped while answers were generated")),
        };
        let mut done = 0;
        loop {
            for slot in 0..self.slots.len() {
                while self.slots[slot].is_none() {
                    let Some(i) = waiting.next() else { break };
                    self.read(slot, i, &prompts[i])?;
                    done += usize::from(self.take_token(slot, &mut answers, limit, &is_over));
                    go_on(done)?;
                }
            }
            if self.slots.iter().all(Option::is_none) {
                return Ok(answers);
            }
            self.step()?;
            for row in 0..self.rows.len() {
                done += usize::from(self.take_token(self.rows[row].0, &mut answers, limit, &is_over));
            }
            go_on(done)?;
        }
    }

    fn check_prompts(&self, prompts: &[Vec<u32>]) -> Result<()> {
        for (i, prompt) in prompts.iter().enumerate() {
            let (n, room) = (prompt.len(), self.capacity);
            if n == 0 || n > room {
                let message = format!(
                    "prompt {i} has {n} tokens where each sequence has room for 1 to {room}: shorten it, or raise \
                     the capacity"
                );
                return Err(Error::new(ErrorKind::Misuse, message));
            }
            check_ids(self.pass.model.config(), prompt).map_err(|e| e.at(format!("prompt {i}")))?;
        }
        Ok(())
    }

    /// Adds a slot's next token to its answer. If that was the last, frees the slot and returns true.
    fn take_token(
        &mut self,
        slot: usize,
        answers: &mut [Vec<u32>],
        limit: usize,
        is_over: &impl Fn(usize, &[u32]) -> bool,
    ) -> bool {
        let Some(s) = self.slots[slot] else { return false };
        let answer = &mut answers[s.prompt];
        answer.push(s.last);
        let full = answer.len() == limit || s.past == self.capacity;
        let ended = full || is_over(s.prompt, answer) || is_cycle(answer);
        if ended {
            self.slots[slot] = None;
        }
        ended
    }

    /// Reads a prompt into a slot, in parts as a [`Sequence`] does.
    fn read(&mut self, slot: usize, prompt: usize, ids: &[u32]) -> Result<()> {
        let mut past = 0;
        let rows = Sequence::rows(self.capacity);
        for part in ids.chunks(rows) {
            let Sequences { pass, prefix, cache, slots, .. } = &mut *self;
            let from = prefix.ids.len() + past;
            pass.run(part, from..from + part.len(), |l, go_on| {
                let (k, v) = cache.part(l, slot, slots.len());
                go_on(Keys::Cache(KvLayer { prefix: prefix.cache.rows(l), k, v, past }));
            });
            past += part.len();
        }
        let last = (ids.len() - 1) % rows;
        self.choose(last..last + 1);
        self.pass.model.file().check_whole()?;
        let last = self.chosen[0].ok_or_else(no_token)?;
        self.slots[slot] = Some(Continuation { prompt, past, last });
        Ok(())
    }

    /// Reads one token of every sequence and chooses each one's next.
    fn step(&mut self) -> Result<()> {
        self.rows.clear();
        self.ids.clear();
        for (slot, s) in self.slots.iter().enumerate().filter_map(|(i, s)| Some((i, s.as_ref()?))) {
            self.rows.push((slot, s.past));
            self.ids.push(s.last);
        }
        let Sequences { pass, prefix, cache, ids, rows, capacity, .. } = &mut *self;
        let positions = rows.iter().map(|(_, past)| prefix.ids.len() + past);
        pass.run(ids, positions, |l, go_on| {
            let (prefix, (k, v)) = (prefix.cache.rows(l), cache.layer(l));
            go_on(Keys::Sequences(KvBatch { prefix, k, v, capacity: *capacity, rows }));
        });
        self.choose(0..self.rows.len());
        self.pass.model.file().check_whole()?;
        for (&(slot, past), chosen) in self.rows.iter().zip(&self.chosen) {
            if let Some(s) = &mut self.slots[slot] {
                (s.past, s.last) = (past + 1, chosen.ok_or_else(no_token)?);
            }
        }
        Ok(())
    }

    /// Writes the likeliest token after some rows of the last forward to the front of `chosen`.
    fn choose(&mut self, rows: std::ops::Range<usize>) {
        let chosen = &mut self.chosen[..rows.len()];
        self.pass.head(|ctx, w, x, head, kernel| {
            let d = w.norm.len();
            head::likeliest(ctx, w, &x[rows.start * d..rows.end * d], head, kernel, chosen);
        });
    }
}
