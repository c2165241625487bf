//! Held-out figures: perplexity of a text, and masked loss of examples.

use std::sync::Arc;

use engraft_kernels::Kernels;

use crate::data::Batch;
use crate::error::{Error, ErrorKind, Result};
use crate::model::tuned::Weights;
use crate::nn::divergence::Compared;
use crate::nn::{Adapted, Precision};
use crate::plan::{ArenaWords, Request};
use crate::train::chain::{Chain, Evaluated};

/// A chain for scoring alone: one sequence at a time, nothing kept for a backward.
pub fn scoring_chain(
    model: impl Into<Weights>,
    kernels: Arc<Kernels>,
    precision: Precision,
    rank: usize,
    seq: usize,
) -> Chain {
    let model = model.into();
    let words = ArenaWords::new(model.config(), &scoring(&kernels, rank, seq));
    Chain::new(model, kernels, precision, words)
}

/// The same for [`compare`]: a tuned model beside its base.
pub fn comparing_chain(
    model: impl Into<Weights>,
    kernels: Arc<Kernels>,
    precision: Precision,
    rank: usize,
    seq: usize,
) -> Chain {
    let model = model.into();
    let request = Request { beside_base: true, ..scoring(&kernels, rank, seq) };
    let words = ArenaWords::new(model.config(), &request);
    Chain::new(model, kernels, precision, words)
}

fn scoring(kernels: &Kernels, rank: usize, seq: usize) -> Request {
    Request { batch: 1, seq, rank, threads: kernels.threads(), ..Request::default() }
}

/// A tuned model beside its base over the targets of `batches`: sums of both losses and of the divergence
/// in both directions. `each` sees (batch, row, what that target adds).
///
/// # Panics
/// If the chain is not one of [`comparing_chain`], or a batch has more rows than it was made for.
pub fn compare(
    chain: &mut Chain,
    adapter: &dyn Adapted,
    batches: impl Iterator<Item = Batch>,
    mut each: impl FnMut(usize, usize, Compared),
) -> Compared {
    let mut total = Compared::default();
    for (i, batch) in batches.enumerate() {
        total += chain.compare(adapter, &batch, |row, one| each(i, row, one));
    }
    total
}

/// Perplexity in llama-perplexity's convention: windows of `ctx` tokens without overlap, each begun by
/// BOS (replacing its first token) where the tokenizer adds one, and only the second half of each
/// window scored.
///
/// # Errors
/// `BadData` when the text has less than two windows; `progress` may return false to cancel.
pub fn perplexity(
    chain: &mut Chain,
    adapter: Option<&dyn Adapted>,
    ids: &[u32],
    ctx: usize,
    bos: Option<u32>,
    mut progress: impl FnMut(usize, usize, Evaluated) -> bool,
) -> Result<Evaluated> {
    if ids.len() < 2 * ctx {
        let message = format!("the text has {} tokens; {} are needed for -c {ctx}", ids.len(), 2 * ctx);
        return Err(Error::new(ErrorKind::BadData, message));
    }
    let windows = ids.len() / ctx;
    let mut total = Evaluated::default();
    let mut batch = Batch::default();
    for (i, window) in ids.chunks_exact(ctx).enumerate() {
        batch.clear();
        batch.ids.extend_from_slice(&window[..ctx - 1]);
        if let Some(bos) = bos {
            batch.ids[0] = bos;
        }
        batch
            .targets
            .extend(window[1..].iter().enumerate().map(|(p, id)| if p < ctx / 2 { u32::MAX } else { *id }));
        batch.seqs.push(0..ctx - 1);
        let e = chain.evaluate(adapter, &batch, |_, _| {});
        total.loss_sum += e.loss_sum;
        total.targets += e.targets;
        if !progress(i + 1, windows, total) {
            return Err(Error::new(ErrorKind::Cancelled, "cancelled"));
        }
    }
    chain.weights().file().check_whole()?;
    Ok(total)
}
