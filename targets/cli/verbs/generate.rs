//! `engraft generate`: continues a prompt, streamed to stdout.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, value_parser};
use engraft_runtime::error::{Error, ErrorKind};

use super::Session;
use crate::options::{self, AdapterOptions, ComputeOptions, ModelOptions, misuse};

/// Prompts beyond this can't fit a context.
const PROMPT_BYTES_MAX: u64 = 16 << 20;

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) model: ModelOptions,

    /// The prompt
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file", allow_hyphen_values = true)]
    prompt: Option<String>,

    /// Read the prompt from a file (-: from stdin)
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Put the prompt into the model's chat template as the user's message
    #[arg(long)]
    pub(crate) chat: bool,

    /// The system message of the chat
    #[arg(long, value_name = "TEXT", requires = "chat", allow_hyphen_values = true)]
    pub(crate) system: Option<String>,

    /// Tokens to generate at most (-1: until the model ends or the context is full)
    #[arg(short, long, value_name = "N", default_value_t = 128, value_parser = value_parser!(i64).range(-1..=1 << 30))]
    n_predict: i64,

    /// Tokens of the context (default: what the model was trained for, at most 4096)
    #[arg(short, long, value_name = "N", value_parser = value_parser!(u32).range(2..=1 << 20))]
    pub(crate) ctx_size: Option<u32>,

    #[command(flatten)]
    pub(crate) sampling: Sampling,

    #[command(flatten)]
    pub(crate) adapters: AdapterOptions,

    #[command(flatten)]
    pub(crate) compute: ComputeOptions,
}

/// How the next token is drawn.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct Sampling {
    /// Temperature (0: always the likeliest token)
    #[arg(long, value_name = "T", default_value_t = 0.8, value_parser = temperature)]
    pub(crate) temp: f32,

    /// Draw among the K likeliest tokens (0: all)
    #[arg(long, value_name = "K", default_value_t = 40)]
    pub(crate) top_k: u32,

    /// Draw among the likeliest tokens that hold this probability together (1: all)
    #[arg(long, value_name = "P", default_value_t = 0.95, value_parser = share_above_zero)]
    pub(crate) top_p: f32,

    /// Drop tokens below this share of the likeliest one's probability (0: none)
    #[arg(long, value_name = "P", default_value_t = 0.05, value_parser = share)]
    pub(crate) min_p: f32,

    /// Make recent tokens less likely (1: off)
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = options::positive_f32)]
    pub(crate) repeat_penalty: f32,

    /// Seed of the draws (-1: another each time)
    #[arg(long, value_name = "N", default_value = "0", value_parser = options::seed)]
    pub(crate) seed: u64,
}

impl Options {
    /// The limit on generated tokens; `None` for no limit but the context.
    pub(crate) fn n_predict(&self) -> Option<usize> {
        usize::try_from(self.n_predict).ok()
    }

    /// The prompt, from the flag or the file.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] when there is none, or it is too long or no UTF-8; [`ErrorKind::Io`].
    pub(crate) fn prompt(&self) -> Result<String, Error> {
        match (&self.prompt, &self.file) {
            (Some(text), _) => Ok(text.clone()),
            (None, Some(file)) if file.as_os_str() == "-" => read_prompt(std::io::stdin().lock(), "stdin"),
            (None, Some(file)) => {
                options::stat(file, "-f/--file")?;
                let open = std::fs::File::open(file);
                let opened = open.map_err(|e| Error::io(format!("-f/--file: {}", file.display()), e))?;
                read_prompt(opened, &file.display().to_string())
            }
            (None, None) => Err(misuse("a prompt is missing: give it with -p TEXT or -f FILE")),
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
        return Err(misuse(format!("-f/--file: {name} is longer than 16 MiB: shorten it")));
    }
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        misuse(format!("-f/--file: {name} is no UTF-8 text at byte {at}: convert it"))
    })
}

fn temperature(text: &str) -> Result<f32, String> {
    let value = options::not_negative(text)?;
    if value <= 100.0 { Ok(value as f32) } else { Err("must be at most 100".into()) }
}

fn share(text: &str) -> Result<f32, String> {
    let value = options::not_negative(text)?;
    if value <= 1.0 { Ok(value as f32) } else { Err("must be at most 1".into()) }
}

fn share_above_zero(text: &str) -> Result<f32, String> {
    share(text).ok().filter(|v| *v > 0.0).ok_or_else(|| "must be a number above 0 and at most 1".into())
}

pub(crate) fn run(options: Options, _session: &Session) -> Result<()> {
    let _model: &Path = options.model.path()?;
    options.adapters.files()?;
    options.prompt()?;
    Err(Error::new(ErrorKind::Unsupported, "generate: not part of this build").into())
}
