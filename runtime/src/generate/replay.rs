//! Rows sampled from the base itself, for replay while training an adapter: free-running text, and answers to
//! plain questions.

use std::sync::Arc;

use engraft_kernels::{Kernels, KvType};

use super::{Sampler, SamplerOptions, Sequence};
use crate::data::Example;
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::model::ModelConfig;
use crate::model::chat::{Message, TemplateKind, encode_pieces};
use crate::model::text::Text;
use crate::model::weights::ModelFile;
use crate::nn::Precision;

/// Questions without a subject: the base chooses where the answer goes.
const QUESTIONS: [&str; 12] = [
    "Tell me something interesting.",
    "Explain a concept that you know well.",
    "Write a short story.",
    "What can you help me with?",
    "Give me some advice.",
    "Write a few lines of code and explain them.",
    "Summarize an event in history.",
    "Ask yourself a question and answer it.",
    "How does something in everyday life work?",
    "Solve a small problem step by step.",
    "Describe a place.",
    "Write a list of useful facts.",
];

/// The openings of sampled rows, and the tokens that end them. Holds no tokenizer.
#[derive(Clone, Debug)]
pub struct Starts {
    prompts: Vec<Vec<u32>>,
    ends: Vec<u32>,
}

impl Starts {
    /// The token that begins texts and, if the model has its own chat template, plain questions; only openings
    /// of fewer than `rows_max` tokens.
    ///
    /// # Errors
    /// `Unsupported` for a model with neither; `Misuse` if none fits `rows_max`; those of the template.
    pub fn of(text: &Text, rows_max: usize) -> Result<Starts> {
        let tokenizer = &text.tokenizer;
        let begin = tokenizer.bos().or(tokenizer.eos()).map(|id| vec![id]);
        let mut prompts = Vec::new();
        if text.chat.kind() == TemplateKind::Model {
            for question in QUESTIONS {
                let messages = [Message::new("user", question)];
                let pieces = text.chat.render_messages(&messages, true)?;
                prompts.extend(begin.clone());
                prompts.push(encode_pieces(tokenizer, &pieces, &messages).0);
            }
        } else {
            prompts.extend(begin);
        }
        if prompts.is_empty() {
            let message = "the model has neither a token that begins texts nor a chat template; replay rows \
                           from a file instead";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        prompts.retain(|p| !p.is_empty() && p.len() < rows_max);
        if prompts.is_empty() {
            let message = format!("a row of {rows_max} tokens has no room for a sample");
            return Err(Error::new(ErrorKind::Misuse, message).advise(Advice::LongerRows));
        }
        let vocab = tokenizer.vocab_size() as u32;
        Ok(Starts { prompts, ends: (0..vocab).filter(|id| tokenizer.is_end(*id)).collect() })
    }

    /// Most tokens of row `i`, when `tokens` are sampled and the row has at most `rows_max` positions.
    fn len(&self, i: usize, tokens: usize, rows_max: usize) -> usize {
        (self.prompts[i % self.prompts.len()].len() + tokens).min(rows_max + 1)
    }
}

/// How many rows to sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampling {
    /// Rows.
    pub count: usize,
    /// Most tokens sampled per row, at least 1.
    pub tokens: usize,
    /// Most positions per row.
    pub rows_max: usize,
    /// Seed.
    pub seed: u64,
}

impl Sampling {
    /// Upper bounds: tokens of all rows, positions of the longest.
    pub fn extent(&self, starts: &Starts) -> (usize, usize) {
        let len = |i: usize| starts.len(i, self.tokens, self.rows_max);
        ((0..self.count).map(len).sum(), (0..self.count).map(len).max().unwrap_or(1) - 1)
    }

    /// Most bytes [`Sampling::run`] holds, apart from the rows themselves.
    pub fn bytes(&self, c: &ModelConfig, starts: &Starts, threads: usize) -> usize {
        let capacity = self.extent(starts).1 + 1;
        Sequence::bytes(c, capacity, 0, threads, KvType::F16) + c.vocab * Sampler::TOKEN_BYTES
    }

    /// Samples the rows at temperature 1 from the whole vocabulary. Only sampled tokens are targets. The same
    /// seed gives the same rows on any number of threads. Before each token, `progress` receives the number of
    /// rows done; return false to stop.
    ///
    /// # Errors
    /// `NonFinite` if no token can be chosen; `Cancelled`; those of [`Sequence::new`].
    pub fn run(
        &self,
        model: &Arc<ModelFile>,
        kernels: &Arc<Kernels>,
        precision: Precision,
        starts: &Starts,
        mut progress: impl FnMut(usize) -> bool,
    ) -> Result<Vec<Example>> {
        let capacity = self.extent(starts).1 + 1;
        let mut sequence =
            Sequence::new(model.clone(), kernels.clone(), None, precision, capacity, KvType::F16)?;
        let options = SamplerOptions {
            temp: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: self.seed,
            ..Default::default()
        };
        let mut sampler = Sampler::new(options)?;
        let mut examples = Vec::with_capacity(self.count);
        for i in 0..self.count {
            let prompt = &starts.prompts[i % starts.prompts.len()];
            let limit = starts.len(i, self.tokens, self.rows_max) - prompt.len();
            let is_end = |id| starts.ends.contains(&id);
            let sampled = complete(&mut sequence, &mut sampler, prompt, limit, is_end, |_| progress(i))?;
            let mut ids = Vec::with_capacity(prompt.len() + sampled.len());
            ids.extend_from_slice(prompt);
            ids.extend_from_slice(&sampled);
            let mask = (0..ids.len()).map(|at| at >= prompt.len()).collect();
            examples.push(Example { ids, mask });
            if !progress(i + 1) {
                return Err(stopped());
            }
        }
        Ok(examples)
    }
}

/// Continues a prompt from an empty cache: at most `limit` tokens, including the end token. Before each token,
/// `progress` receives their number; return false to stop.
///
/// # Errors
/// `NonFinite` if no token can be chosen; `Cancelled`; those of [`Sequence::feed`].
pub fn complete(
    sequence: &mut Sequence,
    sampler: &mut Sampler,
    prompt: &[u32],
    limit: usize,
    is_end: impl Fn(u32) -> bool,
    mut progress: impl FnMut(usize) -> bool,
) -> Result<Vec<u32>> {
    sequence.truncate(0);
    let mut answer = Vec::new();
    let mut logits = sequence.feed(prompt)?;
    while answer.len() < limit {
        if !progress(answer.len()) {
            return Err(stopped());
        }
        let id = sampler.choose(logits, &[])?;
        answer.push(id);
        if is_end(id) || answer.len() == limit || sequence.room() == 0 {
            break;
        }
        logits = sequence.feed(&[id])?;
    }
    Ok(answer)
}

fn stopped() -> Error {
    Error::new(ErrorKind::Cancelled, "stopped while the model's own text was sampled")
}
