//! `engraft generate`: continues a prompt and streams the result to stdout.

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use clap::{Args, value_parser};
use engraft_kernels::Kernels;
use engraft_runtime::data::masks::TEXT_ROLE;
use engraft_runtime::error::{Advice, Error};
use engraft_runtime::generate::{
    Continuation, Ended, KvType, Listener, Sampler, SamplerOptions, Sequence, StackedAdapter, go_on,
};
use engraft_runtime::model::ModelConfig;
use engraft_runtime::model::chat::Message;
use engraft_runtime::model::text::{Text, opening};
use engraft_runtime::model::tokenizer::{Decoder, Tokenizer};
use engraft_runtime::model::usage::{Prompting, Usage};
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::Precision;
use engraft_runtime::plan::room;

use super::adapter::Stored;
use super::{Invocation, common};
use crate::json;
use crate::options::{self, AdapterOptions, ComputeOptions, ModelOptions, misuse};

/// Maximum tokens of a context that no flag limits.
pub(super) const CONTEXT_DEFAULT_MAX: usize = 4096;
/// Temperature where nobody judged answers.
const TEMPERATURE: f32 = 0.8;
/// Longer prompts fit no context.
const PROMPT_BYTES_MAX: u64 = 16 << 20;

#[derive(Args, Debug)]
#[command(group(clap::ArgGroup::new("what").args(["prompt", "file"]).required(true)))]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) model: ModelOptions,

    /// The prompt
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file", allow_hyphen_values = true)]
    prompt: Option<String>,

    /// Read the prompt from a file (- for stdin)
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Put the prompt into the model's chat template as the user's message [default: as the adapter was trained]
    #[arg(long, conflicts_with = "plain")]
    pub(crate) chat: bool,

    /// Continue the prompt as it is [default: as the adapter was trained; so without one]
    #[arg(long)]
    pub(crate) plain: bool,

    /// System message of the chat [default: the one that the adapter was trained with, if there is one]
    #[arg(long, value_name = "TEXT", conflicts_with = "plain", allow_hyphen_values = true)]
    pub(crate) system: Option<String>,

    /// Maximum tokens to generate (-1: until the model stops or the context is full)
    #[arg(short, long, visible_aliases = ["predict", "max-tokens"], value_name = "N", default_value_t = 128, value_parser = value_parser!(i64).range(-1..=1 << 30))]
    n_predict: i64,

    /// Maximum tokens of prompt and answer [default: what they need; with -n -1, the model's length, up to 4096]
    #[arg(short, long, value_name = "N", value_parser = value_parser!(u32).range(2..=1 << 20))]
    pub(crate) ctx_size: Option<u32>,

    /// How to store the keys and values of earlier tokens
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = options::parse::cache_type())]
    pub(crate) cache_type: KvType,

    #[command(flatten)]
    pub(crate) sampling: SamplingOptions,

    #[command(flatten)]
    pub(crate) adapters: AdapterOptions,

    #[command(flatten)]
    pub(crate) compute: ComputeOptions,
}

/// How to draw the next token.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingOptions {
    /// Temperature (0: always the most likely token) [default: 0 where answers were judged so, else 0.8]
    #[arg(long, visible_alias = "temperature", value_name = "T", value_parser = temperature)]
    pub(crate) temp: Option<f32>,

    /// Draw from the K most likely tokens (0: all)
    #[arg(long, value_name = "K", default_value_t = 40)]
    pub(crate) top_k: u32,

    /// Draw from the most likely tokens that together have this probability (1: all)
    #[arg(long, value_name = "P", default_value_t = 0.95, value_parser = share_above_zero)]
    pub(crate) top_p: f32,

    /// Drop tokens below this share of the top token's probability (0: none)
    #[arg(long, value_name = "P", default_value_t = 0.05, value_parser = share)]
    pub(crate) min_p: f32,

    /// Make recent tokens less likely (1: off)
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = options::parse::positive_f32)]
    pub(crate) repeat_penalty: f32,

    /// Seed for the draws (-1: a new one each time)
    #[arg(long, value_name = "N", default_value = "0", value_parser = options::parse::seed)]
    pub(crate) seed: u64,
}

impl Options {
    /// The limit on generated tokens; `None` if only the context limits them.
    pub(crate) fn n_predict(&self) -> Option<usize> {
        usize::try_from(self.n_predict).ok()
    }

    /// The prompt, from the flag or the file.
    ///
    /// # Errors
    /// `Misuse` if there is none, or it is too long or not UTF-8; `Io`.
    pub(crate) fn prompt(&self) -> Result<String, Error> {
        match (&self.prompt, &self.file) {
            (Some(text), _) => Ok(text.clone()),
            (None, Some(file)) if file.as_os_str() == "-" => read_prompt(std::io::stdin().lock(), "stdin"),
            (None, Some(file)) => {
                options::stat_stream(file, "-f/--file")?;
                let open = std::fs::File::open(file);
                let opened = open.map_err(|e| Error::io(format!("-f/--file: {}", file.display()), e))?;
                read_prompt(opened, &file.display().to_string())
            }
            (None, None) => Err(misuse("the prompt is missing; add -p TEXT or -f FILE")),
        }
    }
}

fn read_prompt(source: impl Read, name: &str) -> Result<String, Error> {
    let mut bytes = Vec::new();
    source
        .take(PROMPT_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io(format!("-f/--file: reading {name}"), e))?;
    if bytes.len() as u64 > PROMPT_BYTES_MAX {
        return Err(misuse(format!("-f/--file: {name} is longer than 16 MiB; shorten it")));
    }
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        misuse(format!("-f/--file: {name} isn't UTF-8 at byte {at}; convert it to UTF-8"))
    })
}

fn temperature(text: &str) -> Result<f32, String> {
    let value = options::parse::not_negative(text)?;
    if value <= 100.0 { Ok(value as f32) } else { Err("must be at most 100".into()) }
}

fn share(text: &str) -> Result<f32, String> {
    let value = options::parse::not_negative(text)?;
    if value <= 1.0 { Ok(value as f32) } else { Err("must be at most 1".into()) }
}

fn share_above_zero(text: &str) -> Result<f32, String> {
    share(text).ok().filter(|v| *v > 0.0).ok_or_else(|| "must be a number above 0 and at most 1".into())
}

pub(crate) fn run(options: &Options, invocation: &Invocation) -> Result<()> {
    options.model.path()?;
    options.adapters.files()?;
    let prompt = options.prompt()?;
    let model = options.model.open()?;
    let stored = Stored::of(&model, &options.adapters)?;
    let kernels = options.compute.kernels()?;
    let adapter = common::adapters(&model, &kernels, &options.adapters, &stored)?;
    let usage = stored.usage(adapter.as_deref(), &options.adapters);
    let prompting = prompting(options, &usage.prompting)?;
    let is_chat = matches!(prompting, Prompting::Chat(_));
    if !stored.few_shot.is_empty() && is_chat == stored.few_shot.iter().all(|m| m.role == TEXT_ROLE) {
        let message = match is_chat {
            true => "--store: its active generation holds few-shot texts, not a chat; leave out --chat",
            false => "--store: its active generation holds few-shot examples of a chat; leave out --plain",
        };
        return Err(misuse(message).into());
    }
    let text = Text::of(&model)?;
    let ids = prompt_ids(&prompting, &text, &stored.few_shot, &prompt)?;
    let capacity = capacity(options, model.config(), ids.len())?;
    let how = (options.compute.precision, options.cache_type);
    let mut sequence = sequence(model, kernels, adapter, how, capacity)?;
    let mut sampler = Sampler::new(options.sampling.options(&usage))?;
    let limit = options.n_predict().unwrap_or(usize::MAX);
    // A chat's answer starts a new text; a continuation keeps its leading blank.
    let decoder = if is_chat { text.tokenizer.decoder() } else { text.tokenizer.decoder_continuing() };
    let told = shown(&mut sequence, &ids, &mut sampler, limit, (&text.tokenizer, decoder), invocation)?;
    if told.ended == Ended::Stopped {
        return Err(common::cancelled("stopped while generating").into());
    }
    if told.ended == Ended::Context {
        eprintln!("stopped: the context of {capacity} tokens is full");
    }
    emit(&told, ids.len(), invocation)
}

/// Prints the result of continuing a prompt of so many tokens for machines.
pub(super) fn emit(told: &Continuation, prompt_tokens: usize, invocation: &Invocation) -> Result<()> {
    invocation.emit(&json::object! {
        text: &told.text,
        prompt_tokens: prompt_tokens,
        tokens: told.ids.len(),
        tokens_per_s: told.tokens_per_s(),
        /// `end` when the model stopped, `length` at `--n-predict`, `context` when the context was full.
        stopped: match told.ended {
            Ended::Model | Ended::Stopped => "end",
            Ended::Limit => "length",
            Ended::Context => "context",
        },
    })
}

impl SamplingOptions {
    /// The sampler's settings, where nothing else is said, as answers were judged.
    pub(super) fn options(&self, usage: &Usage) -> SamplerOptions {
        SamplerOptions {
            temp: self.temp.unwrap_or(if usage.greedy { 0.0 } else { TEMPERATURE }),
            top_k: self.top_k as usize,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            seed: self.seed,
            ..SamplerOptions::default()
        }
    }
}

/// How the prompt is put: as the flags say, else as what is in use was trained or judged.
///
/// # Errors
/// `Misuse` for a system message where there is no chat.
fn prompting(options: &Options, judged: &Prompting) -> Result<Prompting, Error> {
    let own = || options.system.clone();
    match judged {
        _ if options.plain => Ok(Prompting::Text(String::new())),
        Prompting::Chat(system) => Ok(Prompting::Chat(own().or_else(|| system.clone()))),
        _ if options.chat => Ok(Prompting::Chat(own())),
        _ if options.system.is_some() => Err(misuse("--system begins a chat; add --chat")),
        Prompting::Text(joint) => Ok(Prompting::Text(joint.clone())),
        Prompting::Unknown => Ok(Prompting::Text(String::new())),
    }
}

/// The prompt's token ids; no text in it becomes a control token. In a chat it goes into the template, after
/// the few-shot examples, whose instruction a system message replaces.
fn prompt_ids(how: &Prompting, text: &Text, few_shot: &[Message], prompt: &str) -> Result<Vec<u32>> {
    let ids = match how {
        Prompting::Chat(system) => {
            let mut messages = opening(system.as_deref(), few_shot);
            messages.push(Message::new("user", prompt));
            text.chat_prompt(&messages)?
        }
        Prompting::Text(joint) => text.plain_prompt(few_shot, &format!("{prompt}{joint}")),
        Prompting::Unknown => text.plain_prompt(few_shot, prompt),
    };
    if ids.is_empty() {
        return Err(misuse(
            "the prompt is empty, and this model has no token that begins a text; add -p TEXT",
        )
        .into());
    }
    Ok(ids)
}

/// The context's length: what the user asked for, else what prompt and answer need, limited by the model.
fn capacity(options: &Options, model: &ModelConfig, prompt: usize) -> Result<usize, Error> {
    let trained = model.context_len;
    let capacity = match (context_asked(options.ctx_size, trained)?, options.n_predict()) {
        (Some(asked), _) => asked,
        (None, Some(n)) => prompt.saturating_add(n).min(trained),
        (None, None) => trained.min(CONTEXT_DEFAULT_MAX.max(prompt)),
    };
    if prompt > capacity {
        let hint = if capacity < trained { "raise --ctx-size" } else { "shorten it" };
        return Err(misuse(format!("the prompt has {prompt} tokens, but the context {capacity}; {hint}")));
    }
    Ok(capacity)
}

/// A sequence of at most `capacity` tokens, if there is memory for it.
///
/// # Errors
/// `DoesNotFit`; those of [`Sequence::new`].
pub(super) fn sequence(
    model: Arc<ModelFile>,
    kernels: Arc<Kernels>,
    adapter: Option<Arc<StackedAdapter>>,
    (precision, cache): (Precision, KvType),
    capacity: usize,
) -> Result<Sequence, Error> {
    let (rank, threads) = (adapter.as_ref().map_or(0, |a| a.rank()), kernels.threads());
    let need = Sequence::bytes(model.config(), capacity, rank, threads, cache);
    room::hold_bytes(need, threads, Advice::ShorterContext)?;
    Sequence::new(model, kernels, adapter, precision, capacity, cache)
}

/// The context's length that the user asked for, if any.
///
/// # Errors
/// `Misuse` for more than the model was trained on.
pub(super) fn context_asked(asked: Option<u32>, trained: usize) -> Result<Option<usize>, Error> {
    match asked.map(|n| n as usize) {
        Some(asked) if asked > trained => Err(misuse(format!(
            "--ctx-size {asked}: the model was trained on {trained} positions; give at most {trained}"
        ))),
        asked => Ok(asked),
    }
}

/// Continues a prompt, streaming the text to stdout, and reports the speed.
pub(super) fn shown(
    sequence: &mut Sequence,
    ids: &[u32],
    sampler: &mut Sampler,
    limit: usize,
    by: (&Tokenizer, Decoder<'_>),
    invocation: &Invocation,
) -> Result<Continuation> {
    let mut stdout = Stdout { invocation, failed: Ok(()) };
    let done = go_on(sequence, ids, sampler, limit, by, &mut stdout);
    stdout.failed?;
    json::line("")?;
    let done = done?;
    let prompt = done.prompt_read as f64 / done.prompt_seconds;
    eprintln!(
        "prompt: {} tokens, {prompt:.1} tokens/s; answer: {} tokens, {:.1} tokens/s",
        done.prompt_read,
        done.ids.len(),
        done.tokens_per_s()
    );
    Ok(done)
}

/// Shows text until Ctrl-C, or until stdout is closed.
struct Stdout<'a> {
    invocation: &'a Invocation,
    failed: std::io::Result<()>,
}

impl Listener for Stdout<'_> {
    fn goes_on(&mut self) -> bool {
        !self.invocation.is_cancelled()
    }

    fn hear(&mut self, part: &str) -> bool {
        self.failed = json::show(part);
        self.failed.is_ok()
    }
}
