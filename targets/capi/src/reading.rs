//! A session's sequence at work: reads a prompt, and draws what follows.

use std::time::Instant;

use engraft_runtime::generate::{Sampler, Sequence};
use engraft_runtime::model::text::Text;
use engraft_runtime::run::Control;

use crate::caller;
use crate::error::{ENGRAFT_CANCELLED, Result};
use crate::session::{
    ENGRAFT_ENDED_CANCELLED, ENGRAFT_ENDED_CONTEXT, ENGRAFT_ENDED_LIMIT, ENGRAFT_ENDED_MODEL, GenerateInfo,
    GenerateParams, Reader,
};

/// What is generated.
pub(crate) struct Answer<'a> {
    pub(crate) reader: &'a Reader,
    pub(crate) text: String,
    pub(crate) ids: Vec<u32>,
}

impl Answer<'_> {
    /// Whether to go on.
    fn take(&mut self, part: &str) -> bool {
        self.text.push_str(part);
        self.reader.take(part)
    }
}

/// A sequence, and the ids that its cache holds.
pub(crate) struct Reading<'s> {
    pub(crate) sequence: &'s mut Sequence,
    /// Empty after a reading that came to no end.
    pub(crate) read: Vec<u32>,
}

impl Reading<'_> {
    /// Reads what the cache does not hold of a prompt; gives the row of its last token.
    fn read(&mut self, ids: &[u32], control: &Control) -> Result<usize> {
        let same = self.read.iter().zip(ids).take_while(|(a, b)| a == b).count();
        // Logits come of reading: one token at least.
        let same = same.min(ids.len().saturating_sub(1));
        self.sequence.truncate(same);
        self.read.clear();
        let mut last = 0;
        self.sequence.read(&ids[same..], |_, rows| {
            last = rows - 1;
            control.check()
        })?;
        self.read.extend_from_slice(ids);
        Ok(last)
    }

    /// Draws tokens until the model ends, the limit or the context is reached, or the caller stops it.
    pub(crate) fn go_on(
        &mut self,
        ids: &[u32],
        (text, sampler): (&Text, &mut Sampler),
        p: &GenerateParams,
        control: &Control,
        answer: &mut Answer<'_>,
    ) -> Result<GenerateInfo> {
        let mut info = GenerateInfo { prompt_tokens: ids.len() as u64, ..caller::zeroed() };
        let started = Instant::now();
        let last = self.read(ids, control);
        info.prompt_seconds = started.elapsed().as_secs_f64();
        let last = match last {
            Err(failure) if failure.code == ENGRAFT_CANCELLED => {
                return Ok(GenerateInfo { ended: ENGRAFT_ENDED_CANCELLED, ..info });
            }
            last => last?,
        };
        let mut logits = self.sequence.logits_at(last);
        let started = Instant::now();
        let tokenizer = &text.tokenizer;
        // A chat's answer is a text of its own; a continuation keeps the blank that it begins with.
        let mut decoder = if p.chat != 0 { tokenizer.decoder() } else { tokenizer.decoder_continuing() };
        let (limit, mut history) = (p.limit(), ids.to_vec());
        info.ended = loop {
            if control.is_cancelled() {
                break ENGRAFT_ENDED_CANCELLED;
            }
            let id = sampler.choose(logits, &history)?;
            if tokenizer.is_end(id) {
                break ENGRAFT_ENDED_MODEL;
            }
            history.push(id);
            answer.ids.push(id);
            if !answer.take(&decoder.push(id)) {
                break ENGRAFT_ENDED_CANCELLED;
            }
            if answer.ids.len() >= limit {
                break ENGRAFT_ENDED_LIMIT;
            }
            if self.sequence.room() == 0 {
                break ENGRAFT_ENDED_CONTEXT;
            }
            logits = self.sequence.feed(&[id])?;
            self.read.push(id);
        };
        if info.ended != ENGRAFT_ENDED_CANCELLED && !answer.take(&decoder.finish()) {
            info.ended = ENGRAFT_ENDED_CANCELLED;
        }
        info.tokens = answer.ids.len() as u64;
        info.seconds = started.elapsed().as_secs_f64();
        info.generation = self.sequence.generation().unwrap_or(0);
        Ok(info)
    }
}
