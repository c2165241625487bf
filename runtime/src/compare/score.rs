//! Scores an arm on rows: losses, distance from the base, answers.

use std::sync::Arc;
use std::time::Instant;

use engraft_kernels::{Kernels, KvType};

use crate::data::Example;
use crate::data::batches::NO_TARGET;
use crate::error::Result;
use crate::gate::verdict::ExampleNll;
use crate::generate::batch::{Prefix, Sequences};
use crate::generate::{Sequence, StackedAdapter};
use crate::model::ModelConfig;
use crate::model::tuned::Weights;
use crate::nn::Precision;
use crate::nn::divergence::Compared;
use crate::nn::head::{HeadBufs, HeadWords};
use crate::run::{Base, Event, Observer};

/// Rows whose logits are held at once, for each of two models.
const LOGIT_ROWS: usize = 32;

/// How keys and values are kept while an arm is scored.
const CACHE: KvType = KvType::F16;

/// One arm's model: weights, and an adapter on them.
#[derive(Clone)]
pub struct Subject {
    /// The base's weights, or tuned ones.
    pub weights: Weights,
    /// The adapter, if any.
    pub adapter: Option<Arc<StackedAdapter>>,
    /// The kernels to compute with.
    pub kernels: Arc<Kernels>,
    /// How products are computed.
    pub precision: Precision,
}

/// The result of scoring rows, and its cost.
#[derive(Clone, Debug, Default)]
pub struct Scored {
    /// Loss per row.
    pub nll: Vec<ExampleNll>,
    /// Tokens that all rows share at the start, read once.
    pub prefix_tokens: usize,
    /// All other tokens read.
    pub tokens: usize,
    /// Time.
    pub seconds: f64,
}

/// Answers, and their cost.
#[derive(Clone, Debug, Default)]
pub struct Answered {
    /// Ids per prompt, without the end token.
    pub answers: Vec<Vec<u32>>,
    /// Tokens generated.
    pub tokens: usize,
    /// Time.
    pub seconds: f64,
}

impl Subject {
    /// The base alone.
    pub fn of(base: &Base) -> Subject {
        Subject {
            weights: base.model.clone().into(),
            adapter: None,
            kernels: base.kernels.clone(),
            precision: base.precision,
        }
    }

    fn config(&self) -> &ModelConfig {
        self.weights.config()
    }

    /// Positions the model was trained for.
    pub fn context(&self) -> usize {
        self.config().context_len
    }

    fn sequence(&self, capacity: usize) -> Result<Sequence> {
        let (weights, kernels) = (self.weights.clone(), self.kernels.clone());
        Sequence::new(weights, kernels, self.adapter.clone(), self.precision, capacity, CACHE)
    }

    fn rank(&self) -> usize {
        self.adapter.as_ref().map_or(0, |a| a.rank())
    }

    /// Bytes [`Subject::losses`] holds for rows of at most `rows_max` positions.
    pub fn losses_bytes(&self, rows_max: usize) -> usize {
        let (c, threads) = (self.config(), self.kernels.threads());
        let head = HeadWords::new(c, Sequence::rows(rows_max), threads, false, false).total();
        Sequence::bytes(c, rows_max, self.rank(), threads, CACHE) + size_of::<f32>() * head
    }

    /// Bytes [`Subject::beside`] holds for such rows.
    pub fn beside_bytes(&self, rows_max: usize) -> usize {
        let logits = LOGIT_ROWS.min(Sequence::rows(rows_max)) * self.config().vocab;
        2 * (self.losses_bytes(rows_max) + size_of::<f32>() * logits)
    }

    /// The most simultaneous answers `bytes` allow, from 1 to [`Sequences::SLOTS`].
    pub fn slots(&self, prompts: &[&[u32]], limit: usize, bytes: usize) -> usize {
        let (c, threads, shared) = (self.config(), self.kernels.threads(), shared_length(prompts));
        let own = self.own_positions(prompts, limit);
        let fits = |slots: &usize| {
            let sequence = Sequences::bytes(c, shared, *slots, own, self.rank(), threads, CACHE);
            sequence + Prefix::bytes(c, shared, CACHE) <= bytes
        };
        (1..=Sequences::SLOTS.min(prompts.len().max(1))).rev().find(fits).unwrap_or(1)
    }

    /// Positions of a prompt and its answer, after the shared prefix. Limited to what the model was trained
    /// for; an answer ends there.
    fn own_positions(&self, prompts: &[&[u32]], limit: usize) -> usize {
        let shared = shared_length(prompts);
        let longest = prompts.iter().map(|p| p.len() - shared).max().unwrap_or(1);
        let room = self.config().context_len.saturating_sub(shared);
        longest.saturating_add(limit).min(room).max(longest + 1)
    }

    fn head(&self, rows: usize) -> HeadBufs {
        HeadBufs::new(&HeadWords::new(self.config(), rows, self.kernels.threads(), false, false))
    }

    /// Losses of rows. Their common prefix is read once.
    ///
    /// # Errors
    /// `Cancelled`; those of [`Sequence::new`] and [`Sequence::read`].
    pub fn losses(&self, examples: &[Example], observer: &mut dyn Observer) -> Result<Scored> {
        let started = Instant::now();
        let longest = examples.iter().map(Example::rows).max().unwrap_or(0).max(1);
        let prefix = common_prefix(examples);
        let mut sequence = self.sequence(longest)?;
        let mut head = self.head(Sequence::rows(longest));
        let mut scored = Scored { prefix_tokens: prefix, ..Scored::default() };
        if prefix > 0 {
            sequence.read(&examples[0].ids[..prefix], |_, _| Ok(()))?;
        }
        for example in examples {
            sequence.truncate(prefix);
            let (mut sum, mut targets, mut at) = (0.0, 0, prefix);
            let mut wanted = Vec::new();
            sequence.read(&example.ids[prefix..example.rows()], |sequence, rows| {
                wanted.clear();
                wanted.extend((at..at + rows).map(|i| target(example, i)));
                at += rows;
                let (loss, count) = sequence.losses(&mut head, &wanted, |_, _| {});
                (sum, targets) = (sum + loss, targets + count);
                Ok(())
            })?;
            scored.nll.push(ExampleNll { sum, targets });
            scored.tokens += example.rows() - prefix;
            let (done, all) = (scored.nll.len(), examples.len());
            observer.tell("", Event::Measured { what: "losses", done, all });
            observer.ask()?;
        }
        scored.seconds = started.elapsed().as_secs_f64();
        Ok(scored)
    }

    /// Losses and divergences of a tuned model beside its base over the targets of rows.
    ///
    /// # Errors
    /// `Cancelled`; those of [`Sequence::new`] and [`Sequence::read`].
    pub fn beside(&self, base: &Subject, rows: &[Example], observer: &mut dyn Observer) -> Result<Compared> {
        let longest = rows.iter().map(Example::rows).max().unwrap_or(0).max(1);
        let (mut tuned, mut plain) = (self.sequence(longest)?, base.sequence(longest)?);
        let part_rows = Sequence::rows(longest);
        let (vocab, held) = (self.config().vocab, LOGIT_ROWS.min(part_rows));
        let mut heads = [self.head(held), base.head(held)];
        let mut logits = [vec![0.0; held * vocab], vec![0.0; held * vocab]];
        let mut total = Compared::default();
        for (i, example) in rows.iter().enumerate().filter(|(_, e)| e.rows() > 0) {
            tuned.truncate(0);
            plain.truncate(0);
            for (part, ids) in example.ids[..example.rows()].chunks(part_rows).enumerate() {
                tuned.read(ids, |_, _| Ok(()))?;
                plain.read(ids, |_, _| Ok(()))?;
                let wanted: Vec<(usize, u32)> = (0..ids.len())
                    .map(|row| (row, target(example, part * part_rows + row)))
                    .filter(|(_, target)| *target != NO_TARGET)
                    .collect();
                for group in wanted.chunks(held) {
                    let at: Vec<usize> = group.iter().map(|(row, _)| *row).collect();
                    let n = at.len() * vocab;
                    tuned.logits_of(&at, &mut heads[0], &mut logits[0][..n]);
                    plain.logits_of(&at, &mut heads[1], &mut logits[1][..n]);
                    let [z, y] = [&logits[0][..n], &logits[1][..n]];
                    total += compare_logits(self.kernels.threads(), z, y, group, vocab);
                }
            }
            observer.tell("", Event::Measured { what: "what was forgotten", done: i + 1, all: rows.len() });
            observer.ask()?;
        }
        Ok(total)
    }

    /// Greedy answers to prompts, of at most `limit` tokens each. The prompts' common prefix is read once. An answer also
    /// ends once `is_over` says so of its prompt's index and its tokens so far.
    ///
    /// # Errors
    /// Those of [`Sequences`]; `Cancelled`.
    pub fn answers(
        &self,
        prompts: &[&[u32]],
        (limit, slots): (usize, usize),
        is_end: &dyn Fn(u32) -> bool,
        is_over: &dyn Fn(usize, &[u32]) -> bool,
        observer: &mut dyn Observer,
    ) -> Result<Answered> {
        let started = Instant::now();
        let shared = shared_length(prompts);
        let Subject { weights, adapter, kernels, precision } = self.clone();
        let first = prompts.first().map_or(&[][..], |p| &p[..shared]);
        let prefix =
            Prefix::read(weights.clone(), kernels.clone(), adapter.clone(), precision, CACHE, first)?;
        let (prefix, positions) = (Arc::new(prefix), self.own_positions(prompts, limit));
        let mut batch = Sequences::new(weights, kernels, adapter, precision, prefix, slots, positions)?;
        let own: Vec<Vec<u32>> = prompts.iter().map(|p| p[shared..].to_vec()).collect();
        let is_over =
            |i: usize, answer: &[u32]| answer.last().is_some_and(|last| is_end(*last)) || is_over(i, answer);
        let mut answers = batch.complete_until(&own, limit, is_over, |done| {
            observer.tell("", Event::Measured { what: "answers", done, all: prompts.len() });
            observer.ask().is_ok()
        })?;
        let tokens = answers.iter().map(Vec::len).sum();
        for answer in &mut answers {
            if answer.last().is_some_and(|id| is_end(*id)) {
                answer.pop();
            }
        }
        Ok(Answered { answers, tokens, seconds: started.elapsed().as_secs_f64() })
    }

    /// An embedder for texts, to compare them with others.
    ///
    /// # Errors
    /// Those of [`Sequence::new`].
    pub fn embedder(&self, capacity: usize) -> Result<Embedder> {
        Ok(Embedder { sequence: self.sequence(capacity.min(1024))?, d: self.config().d_model })
    }
}

/// Mean hidden states of the last block.
pub struct Embedder {
    sequence: Sequence,
    d: usize,
}

impl Embedder {
    /// The mean over a text's tokens, normalized to length 1; zeros without tokens.
    ///
    /// # Errors
    /// Those of [`Sequence::read`].
    pub fn embed(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        let mut mean = vec![0.0f32; self.d];
        self.sequence.truncate(0);
        let ids = &ids[..ids.len().min(self.sequence.room())];
        if ids.is_empty() {
            return Ok(mean);
        }
        self.sequence.read(ids, |sequence, rows| {
            for row in sequence.hidden(rows).chunks_exact(mean.len()) {
                mean.iter_mut().zip(row).for_each(|(m, v)| *m += v);
            }
            Ok(())
        })?;
        let norm = mean.iter().map(|v| v * v).sum::<f32>().sqrt();
        if norm > 0.0 && norm.is_finite() {
            mean.iter_mut().for_each(|v| *v /= norm);
        }
        Ok(mean)
    }
}

/// The target of position `i`, if it has one.
fn target(example: &Example, i: usize) -> u32 {
    if example.mask[i + 1] { example.ids[i + 1] } else { NO_TARGET }
}

/// Length of the prefix that all rows share and that neither contains nor predicts a target; the rest of each
/// row is never empty.
pub fn common_prefix(examples: &[Example]) -> usize {
    let free = |e: &Example| e.mask.iter().position(|m| *m).unwrap_or(e.ids.len()).saturating_sub(1);
    let ids: Vec<&[u32]> = examples.iter().map(|e| &e.ids[..free(e)]).collect();
    if examples.len() < 2 { 0 } else { shared(&ids) }
}

/// Length of the prompts' common prefix, at most one less than the shortest.
fn shared_length(prompts: &[&[u32]]) -> usize {
    let but_last: Vec<&[u32]> = prompts.iter().map(|p| &p[..p.len().saturating_sub(1)]).collect();
    if prompts.len() < 2 { 0 } else { shared(&but_last) }
}

fn shared(all: &[&[u32]]) -> usize {
    let Some(first) = all.first() else { return 0 };
    let with = |other: &&[u32]| first.iter().zip(*other).take_while(|(a, b)| a == b).count();
    all.iter().map(with).min().unwrap_or(0)
}

/// Sums over rows of logits: tuned z and base y, both `[rows, vocab]`; each thread takes a run of rows.
fn compare_logits(threads: usize, z: &[f32], y: &[f32], group: &[(usize, u32)], vocab: usize) -> Compared {
    let mut found = vec![Compared::default(); group.len()];
    let share = group.len().div_ceil(threads);
    std::thread::scope(|scope| {
        let runs = found.chunks_mut(share).zip(group.chunks(share));
        for ((found, group), (z, y)) in runs.zip(z.chunks(share * vocab).zip(y.chunks(share * vocab))) {
            scope.spawn(move || {
                let rows = z.chunks_exact(vocab).zip(y.chunks_exact(vocab));
                for ((found, (_, target)), (z, y)) in found.iter_mut().zip(group).zip(rows) {
                    *found = compare_row(z, y, *target as usize);
                }
            });
        }
    });
    found.into_iter().fold(Compared::default(), |sum, one| sum + one)
}

fn compare_row(z: &[f32], y: &[f32], target: usize) -> Compared {
    let (lz, ly) = (log_sum(z), log_sum(y));
    let mut c = Compared {
        targets: 1,
        loss: lz - f64::from(z[target]),
        base_loss: ly - f64::from(y[target]),
        ..Compared::default()
    };
    for (a, b) in z.iter().zip(y) {
        let (a, b) = (f64::from(*a) - lz, f64::from(*b) - ly);
        // If both are below e^-30, the term can't affect the sums' digits.
        if a < -30.0 && b < -30.0 {
            continue;
        }
        c.kl_forward += b.exp() * (b - a);
        c.kl_reverse += a.exp() * (a - b);
    }
    c
}

fn log_sum(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|v| f64::from((v - max).exp())).sum();
    f64::from(max) + sum.ln()
}
