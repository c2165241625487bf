//! Continues a prompt: reads it, then draws token by token, streaming the text to a listener.

use std::time::Instant;

use super::{Sampler, Sequence};
use crate::error::{Error, ErrorKind, Result};
use crate::model::tokenizer::{Decoder, Tokenizer};

/// Why a continuation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The model ended it.
    Model,
    /// The requested number of tokens was reached.
    Limit,
    /// The context is full.
    Context,
    /// The listener stopped it.
    Stopped,
}

/// Receives a continuation as it is generated.
pub trait Listener {
    /// Whether to continue; called before each token and after each part of the prompt.
    fn goes_on(&mut self) -> bool {
        true
    }

    /// Receives the text a token adds, possibly empty; return false to stop.
    fn hear(&mut self, part: &str) -> bool;
}

impl<F: FnMut(&str) -> bool> Listener for F {
    fn hear(&mut self, part: &str) -> bool {
        self(part)
    }
}

/// The generated continuation.
#[derive(Clone, Debug, PartialEq)]
pub struct Continuation {
    /// As text.
    pub text: String,
    /// As ids, without the end token.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub ended: Ended,
    /// Tokens of the prompt that had to be read; the sequence already held the others.
    pub prompt_read: usize,
    /// Seconds to read them.
    pub prompt_seconds: f64,
    /// Seconds to draw tokens.
    pub seconds: f64,
}

impl Continuation {
    /// Tokens per second after the first, whose logits came from the prompt; 0 without tokens.
    pub fn tokens_per_s(&self) -> f64 {
        if self.seconds > 0.0 { self.ids.len().saturating_sub(1) as f64 / self.seconds } else { 0.0 }
    }
}

/// Draws at most `limit` tokens after the prompt `ids`. The prompt is read from where it differs from what
/// `sequence` already holds. `decoder` produces the text, and decides whether it may start with a blank.
///
/// # Errors
/// `NonFinite` if no token can be chosen; those of [`Sequence::read`]. On error the sequence is emptied.
pub fn go_on(
    sequence: &mut Sequence,
    ids: &[u32],
    sampler: &mut Sampler,
    limit: usize,
    (tokenizer, decoder): (&Tokenizer, Decoder<'_>),
    listener: &mut dyn Listener,
) -> Result<Continuation> {
    let done = draw(sequence, ids, sampler, limit, (tokenizer, decoder), listener);
    if done.is_err() {
        sequence.truncate(0);
    }
    done
}

fn draw(
    sequence: &mut Sequence,
    ids: &[u32],
    sampler: &mut Sampler,
    limit: usize,
    (tokenizer, mut decoder): (&Tokenizer, Decoder<'_>),
    listener: &mut dyn Listener,
) -> Result<Continuation> {
    let (text, ended) = (String::new(), Ended::Stopped);
    let prompt_read = ids.len() - sequence.rewind_to(ids);
    let mut out =
        Continuation { text, ids: Vec::new(), ended, prompt_read, prompt_seconds: 0.0, seconds: 0.0 };
    let started = Instant::now();
    let last = read_prompt(sequence, &ids[ids.len() - prompt_read..], listener)?;
    out.prompt_seconds = started.elapsed().as_secs_f64();
    let Some(last) = last else { return Ok(out) };
    let (started, mut history) = (Instant::now(), ids.to_vec());
    let mut logits = sequence.logits_at(last);
    out.ended = loop {
        if out.ids.len() >= limit {
            break Ended::Limit;
        }
        if !listener.goes_on() {
            break Ended::Stopped;
        }
        let id = sampler.choose(logits, &history)?;
        if tokenizer.is_end(id) {
            break Ended::Model;
        }
        history.push(id);
        out.ids.push(id);
        let part = decoder.push(id);
        out.text.push_str(&part);
        if !listener.hear(&part) {
            break Ended::Stopped;
        }
        if out.ids.len() == limit {
            break Ended::Limit;
        }
        if sequence.room() == 0 {
            break Ended::Context;
        }
        logits = sequence.feed(&[id])?;
    };
    let rest = decoder.finish();
    if out.ended != Ended::Stopped {
        out.text.push_str(&rest);
        if !listener.hear(&rest) {
            out.ended = Ended::Stopped;
        }
    }
    out.seconds = started.elapsed().as_secs_f64();
    Ok(out)
}

/// Reads the rest of a prompt; returns the row of its last token, or `None` if stopped.
fn read_prompt(sequence: &mut Sequence, ids: &[u32], listener: &mut dyn Listener) -> Result<Option<usize>> {
    let (mut last, mut stopped) = (0, false);
    let read = sequence.read(ids, |_, rows| {
        last = rows - 1;
        stopped = !listener.goes_on();
        match stopped {
            true => Err(Error::new(ErrorKind::Cancelled, "stopped")),
            false => Ok(()),
        }
    });
    match read {
        Err(_) if stopped => Ok(None),
        read => read.map(|()| Some(last)),
    }
}
