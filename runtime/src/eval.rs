//! Held-out evaluation: chains for scoring, and the perplexity of a text.
//!
//! ```
//! use engraft_runtime::eval::{perplexity, scoring_chain};
//! use engraft_runtime::model::tokenizer::Special;
//! use engraft_runtime::{Base, Text};
//!
//! # fn main() -> engraft_runtime::Result<()> {
//! let base = Base::open("../targets/cli/seedling.gguf")?;
//! let text = Text::of(&base.model)?;
//! let ids = text.tokenizer.encode(&"turn on the light in the hall. ".repeat(8), Special::Plain);
//! let window = 32;
//! let mut chain = scoring_chain(base.model.clone(), base.kernels.clone(), base.precision, 0, window);
//! let scored = perplexity(&mut chain, None, &ids, window, text.tokenizer.bos(), |_, _, _| true)?;
//! println!("perplexity {:.2}", (scored.loss_sum / scored.targets as f64).exp());
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;

use engraft_kernels::Kernels;

use crate::data::Batch;
use crate::error::{Error, ErrorKind, Result};
use crate::model::tuned::Weights;
use crate::nn::{Adapted, Precision};
use crate::plan::{ArenaWords, Request};
use crate::train::chain::{Chain, Evaluated};

/// A chain for scoring only: one sequence at a time, with nothing kept for a backward.
pub fn scoring_chain(
    model: impl Into<Weights>,
    kernels: Arc<Kernels>,
    precision: Precision,
    rank: usize,
    seq: usize,
) -> Chain {
    let model = model.into();
    let request = Request { batch: 1, seq, rank, threads: kernels.threads(), ..Request::default() };
    let words = ArenaWords::new(model.config(), &request);
    Chain::new(model, kernels, precision, words)
}

/// Perplexity in llama-perplexity's convention: windows of `ctx` tokens without overlap, each starting with BOS
/// (replacing its first token) if the tokenizer adds one. Only the second half of each window is scored.
///
/// # Errors
/// `BadData` if the text is shorter than two windows; `progress` may return false to cancel.
pub fn perplexity(
    chain: &mut Chain,
    adapter: Option<&dyn Adapted>,
    ids: &[u32],
    ctx: usize,
    bos: Option<u32>,
    mut progress: impl FnMut(usize, usize, Evaluated) -> bool,
) -> Result<Evaluated> {
    if ids.len() < 2 * ctx {
        let message =
            format!("the text has {} tokens; {} are needed for a context of {ctx}", ids.len(), 2 * ctx);
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
