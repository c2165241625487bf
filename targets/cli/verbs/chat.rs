//! `engraft chat`: a conversation line by line; answers stream to stdout.

use std::io::BufRead;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::Result;
use clap::{Args, value_parser};
use engraft_runtime::data::masks::TEXT_ROLE;
use engraft_runtime::error::Error;
use engraft_runtime::generate::{Ended, KvType, Sampler, Sequence};
use engraft_runtime::model::chat::Message;
use engraft_runtime::model::text::{Text, opening};
use engraft_runtime::model::usage::Prompting;

use super::adapter::Stored;
use super::generate::{CONTEXT_DEFAULT_MAX, SamplingOptions, context_asked, emit, sequence, shown};
use super::{Invocation, common};
use crate::options::{AdapterOptions, ComputeOptions, ModelOptions, misuse, parse};

/// How often to check for Ctrl-C while waiting for a line.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Lines longer than this fit no context.
const LINE_BYTES_MAX: usize = 1 << 20;

#[derive(Args, Debug)]
#[command(
    after_help = "Each line of stdin is a message. /reset forgets the conversation; /exit or the end of the input \
                  ends it.\n\nExample:\n  engraft chat -m MODEL.gguf --store store"
)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) model: ModelOptions,

    /// System message at the start of the conversation [default: the adapter's own, if it was trained with one]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,

    /// Maximum tokens per answer (-1: until the model stops or the context is full)
    #[arg(short, long, visible_aliases = ["predict", "max-tokens"], value_name = "N", default_value_t = 512, value_parser = value_parser!(i64).range(-1..=1 << 30))]
    n_predict: i64,

    /// Maximum tokens of the whole conversation [default: the model's trained length, up to 4096]
    #[arg(short, long, value_name = "N", value_parser = value_parser!(u32).range(2..=1 << 20))]
    ctx_size: Option<u32>,

    /// How to store the keys and values of earlier tokens
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = parse::cache_type())]
    cache_type: KvType,

    #[command(flatten)]
    sampling: SamplingOptions,

    #[command(flatten)]
    adapters: AdapterOptions,

    #[command(flatten)]
    compute: ComputeOptions,
}

pub(crate) fn run(options: &Options, invocation: &Invocation) -> Result<()> {
    options.model.path()?;
    options.adapters.files()?;
    let model = options.model.open()?;
    let stored = Stored::of(&model, &options.adapters)?;
    if !stored.few_shot.is_empty() && stored.few_shot.iter().all(|m| m.role == TEXT_ROLE) {
        let message = "--store: its active generation holds few-shot texts, which don't work in a chat; use \
                       `engraft generate`";
        return Err(misuse(message).into());
    }
    let kernels = options.compute.kernels()?;
    let adapter = common::adapters(&model, &kernels, &options.adapters, &stored)?;
    let usage = stored.usage(adapter.as_deref(), &options.adapters);
    let system = match &usage.prompting {
        Prompting::Chat(system) => system.as_deref(),
        Prompting::Text(_) => {
            eprintln!(
                "what is in use was trained on texts, not on a chat: `engraft generate` continues them"
            );
            None
        }
        Prompting::Unknown => None,
    };
    let text = Text::of(&model)?;
    let trained = model.config().context_len;
    let capacity = context_asked(options.ctx_size, trained)?.unwrap_or(trained.min(CONTEXT_DEFAULT_MAX));
    let how = (options.compute.precision, options.cache_type);
    let mut talk = Talk {
        sequence: sequence(model, kernels, adapter, how, capacity)?,
        opening: opening(options.system.as_deref().or(system), &stored.few_shot),
        turns: Vec::new(),
        sampler: Sampler::new(options.sampling.options(&usage))?,
        limit: usize::try_from(options.n_predict).unwrap_or(usize::MAX),
        text: &text,
    };
    let lines = lines();
    while let Some(line) = next_line(&lines, invocation)? {
        match line.trim() {
            "" => continue,
            "/exit" => break,
            "/reset" => talk.turns.clear(),
            message => talk.answer(message, capacity, invocation)?,
        }
    }
    Ok(())
}

/// A conversation, and the sequence that reads it.
struct Talk<'t> {
    sequence: Sequence,
    opening: Vec<Message>,
    turns: Vec<Message>,
    sampler: Sampler,
    limit: usize,
    text: &'t Text,
}

impl Talk<'_> {
    /// Answers a message. One that doesn't fit into the context is reported and dropped.
    fn answer(&mut self, message: &str, capacity: usize, invocation: &Invocation) -> Result<()> {
        self.turns.push(Message::new("user", message));
        let messages = [&self.opening[..], &self.turns].concat();
        let ids = self.text.chat_prompt(&messages)?;
        if ids.len() >= capacity {
            self.turns.pop();
            eprintln!(
                "the message doesn't fit: the conversation would have {} tokens, the context {capacity}; type /reset \
                 to start over, or use a larger --ctx-size",
                ids.len()
            );
            return Ok(());
        }
        let tokenizer = &self.text.tokenizer;
        let by = (tokenizer, tokenizer.decoder());
        let told = shown(&mut self.sequence, &ids, &mut self.sampler, self.limit, by, invocation)?;
        match told.ended {
            Ended::Stopped => return Err(common::cancelled("stopped while answering").into()),
            Ended::Context => {
                eprintln!("stopped: the context of {capacity} tokens is full; type /reset to start over");
            }
            Ended::Model | Ended::Limit => {}
        }
        emit(&told, ids.len(), invocation)?;
        self.turns.push(Message::new("assistant", told.text));
        Ok(())
    }
}

/// The lines of stdin, read on another thread so that Ctrl-C works while waiting for one.
fn lines() -> Receiver<std::io::Result<String>> {
    let (send, lines) = channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            if send.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

/// The next message; `None` at the end.
///
/// # Errors
/// `Cancelled` after Ctrl-C; `Io`; `Misuse` for a line that is too long.
fn next_line(lines: &Receiver<std::io::Result<String>>, invocation: &Invocation) -> Result<Option<String>> {
    loop {
        if invocation.is_cancelled() {
            return Err(common::cancelled("the conversation was stopped").into());
        }
        match lines.recv_timeout(LOOK_EVERY) {
            Ok(Ok(line)) if line.len() > LINE_BYTES_MAX => {
                return Err(misuse("a line of stdin is longer than 1 MiB; shorten it").into());
            }
            Ok(line) => return Ok(Some(line.map_err(|e| Error::io("reading stdin", e))?)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
        }
    }
}
