//! The command line: verbs, global flags, and how arguments become checked options.

use std::ffi::OsString;

use clap::{Arg, Command, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config;
use crate::verbs::{
    adapt, adapter, bench, chat, compare, completions, data, demo, eval, export, generate, import, merge,
    plan, selftest, train,
};

/// Adapt a quantized language model to your own text, on this machine's CPU.
#[derive(Debug, Parser)]
#[command(name = "engraft", disable_version_flag = true, arg_required_else_help = true)]
#[command(after_help = "Exit codes: 0 success; 1 error; 2 usage; 3 does not fit the memory budget; 4 gate \
                        refused; 5 bad data; 6 unusable or incompatible model or adapter; 130 interrupted or out of time.")]
pub(crate) struct Cli {
    /// Print the version; with --verbose also commit, target, instruction set and device profiles
    #[arg(short = 'V', long)]
    pub(crate) version: bool,

    /// Log more to stderr (-v info, -vv debug, -vvv trace)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,

    /// End stdout with one JSON object: the result, or the error
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: Option<Verb>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Print the memory that a training run will take, pool by pool, and whether it fits
    Plan(plan::Options),
    /// Train an adapter (LoRA, DoRA), or every weight, inside the plan
    Train(train::Options),
    /// Compare arms on held-out data: the base alone, behind examples, and trained
    Compare(compare::Options),
    /// Train, compare with doing nothing and with prompting, and promote only what is better
    Adapt(adapt::Options),
    /// Continue a prompt, with any number of adapters
    Generate(generate::Options),
    /// Talk with the model, with any number of adapters
    Chat(chat::Options),
    /// Measure perplexity on a text, or masked loss on held-out data
    Eval(eval::Options),
    /// Look at rows as training would read them
    Data(data::Options),
    /// Take in an adapter of PEFT, MLX or llama.cpp, and bind it to this model
    Import(import::Options),
    /// Write an adapter for PEFT or llama.cpp
    Export(export::Options),
    /// Merge an adapter into its model, and measure what that loses
    Merge(merge::Options),
    /// Look at what was promoted into an adapter store, check it, go back, clear out
    Adapter(adapter::Options),
    /// Teach the built-in model a household's private words, and measure it: no file, no network
    Demo(demo::Options),
    /// Measure this machine in a few seconds: training, reading, generating
    Bench(bench::Options),
    /// Check what this machine computes: each instruction set, gradients, threads, an adapter's file
    Selftest(selftest::Options),
    /// Print completions for a shell, or write man pages
    Completions(completions::Options),
}

impl Verb {
    /// Whether it saves what it has when it is asked to stop.
    pub(crate) fn saves_when_asked(&self) -> bool {
        matches!(self, Verb::Train(_))
    }
}

/// Parses the words of a command line (the first is the program's name); flags that are absent are
/// taken from the `--config` file where there is one.
///
/// # Errors
/// A `clap::Error` for a wrong command line (and for `--help`); the runtime's error for the file.
pub(crate) fn parse(words: Vec<OsString>) -> anyhow::Result<Cli> {
    let mut words = spell_out_lr(words);
    let Ok(given) = without_required().try_get_matches_from(&words) else {
        // The help and every refusal show what is required.
        let matches = command().try_get_matches_from(&words)?;
        return Ok(Cli::from_arg_matches(&matches)?);
    };
    if let Some((verb, given)) = given.subcommand()
        && let Ok(Some(file)) = given.try_get_one::<std::path::PathBuf>("config")
    {
        let from_file = config::arguments(file, verb, given)?;
        let after_verb = words.iter().position(|w| w == verb).map_or(words.len(), |i| i + 1);
        words.splice(after_verb..after_verb, from_file);
    }
    let matches = command().try_get_matches_from(&words)?;
    Ok(Cli::from_arg_matches(&matches)?)
}

/// Arguments that these verbs can't do without, though other verbs can.
const REQUIRED: [(&str, &[&str]); 3] =
    [("train", &["data"]), ("compare", &["data"]), ("adapt", &["data", "store"])];

/// The command line's definition. A number below zero is a value for every flag that takes one, so
/// that the refusal names the flag and its range instead of an unknown flag `-1`.
pub(crate) fn command() -> Command {
    let lenient = |arg: Arg| match arg.get_action().takes_values() {
        true => arg.allow_negative_numbers(true),
        false => arg,
    };
    let command = Cli::command().mut_subcommands(|verb| verb.mut_args(lenient));
    REQUIRED.iter().fold(command, |command, (verb, names)| {
        let require = |verb: Command, name: &&str| verb.mut_arg(*name, |arg| arg.required(true));
        command.mut_subcommand(verb, |verb| names.iter().fold(verb, require))
    })
}

/// The same where nothing is required: what is missing may stand in a file.
pub(crate) fn without_required() -> Command {
    command().mut_subcommands(|verb| verb.mut_args(|arg| arg.required(false)))
}

/// The usage error for a command line with global flags only.
pub(crate) fn missing_verb() -> anyhow::Error {
    let mut command = command();
    let verbs: Vec<_> = command.get_subcommands().map(Command::get_name).collect();
    let message = format!("name a verb: {} (see `engraft --help`)", verbs.join(", "));
    command.error(clap::error::ErrorKind::MissingSubcommand, message).into()
}

/// mlx_lm writes the learning rate's short flag with two letters (`-lr 1e-4`), which clap would read
/// as two flags of one letter each.
fn spell_out_lr(words: Vec<OsString>) -> Vec<OsString> {
    let tunes = words.iter().skip(1).find(|w| !w.as_encoded_bytes().starts_with(b"-"));
    if !tunes.is_some_and(|verb| ["train", "plan", "compare", "adapt"].iter().any(|v| verb == v)) {
        return words;
    }
    let spell = |word: OsString| match word.to_str() {
        Some("-lr") => "--learning-rate".into(),
        Some(text) => match text.strip_prefix("-lr=") {
            Some(value) => format!("--learning-rate={value}").into(),
            None => word,
        },
        None => word,
    };
    words.into_iter().map(spell).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(line: &str) -> anyhow::Result<crate::options::TuneOptions> {
        let words = std::iter::once("engraft").chain(line.split_whitespace()).chain(["--data", "rows"]);
        match parse(words.map(OsString::from).collect())?.command {
            Some(Verb::Train(options)) => Ok(options.tune),
            other => panic!("not train: {other:?}"),
        }
    }

    #[test]
    fn the_command_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn names_of_both_tools_are_understood() {
        let ours = train("train -m m.gguf --rank 4 --alpha 8 --mask-prompt -b 2 -c 128 --learning-rate 1e-3");
        let theirs = train(
            "train --model m.gguf --lora-rank 4 --lora-alpha 8 --assistant-loss-only --batch-size 2 \
             --max-seq-length 128 -lr 1e-3",
        );
        let third = train("train -m m.gguf --rank=4 --alpha=8 --batch-size=2 --ctx-size=128 -lr=1e-3");
        let expected = format!("{:?}", ours.unwrap()).replace("mask_prompt: Some(true)", "mask_prompt: None");
        for other in [theirs, third] {
            let other =
                format!("{:?}", other.unwrap()).replace("mask_prompt: Some(true)", "mask_prompt: None");
            assert_eq!(other, expected);
        }
    }

    #[test]
    fn out_of_range_values_name_their_flag() {
        for (line, flag) in [
            ("train --rank 0", "--rank"),
            ("train --rank 257", "--rank"),
            ("train --rank -1", "--rank"),
            ("train --alpha -2", "--alpha"),
            ("train --num-layers -2", "--num-layers"),
            ("train --alpha nan", "--alpha"),
            ("train -lr -1", "--learning-rate"),
            ("train --dropout 1", "--dropout"),
            ("train --batch-size 0", "--batch-size"),
            ("train --num-layers 0", "--num-layers"),
            ("train --lora-modules q,bogus", "--lora-modules"),
            ("train --memory-budget 60Q", "--memory-budget"),
            ("train --valid-fraction 1", "--valid-fraction"),
            ("train --replay-share 0.91", "--replay-share"),
            ("train --replay-count 0", "--replay-count"),
            ("train --kl-weight -0.1", "--kl-weight"),
            ("train --kl-weight 2e6", "--kl-weight"),
            ("train --kl-direction sideways", "--kl-direction"),
            ("train --init pissa", "--init"),
            ("train --eva-batches 0", "--eva-batches"),
            ("generate -p x --temp -0.5", "--temp"),
            ("generate -p x --top-p 0", "--top-p"),
            ("generate -p x --lora-scaled a:b", "--lora-scaled"),
        ] {
            let words = std::iter::once("engraft").chain(line.split(' ')).map(OsString::from).collect();
            let error = parse(words).expect_err(line);
            assert!(error.to_string().contains(flag), "{line}: {error}");
            assert_eq!(crate::exit::code(&error), 2, "{line}");
        }
    }

    #[test]
    fn lr_is_left_alone_in_prompts() {
        let words = ["engraft", "generate", "-m", "m.gguf", "-p", "-lr"].map(OsString::from).to_vec();
        assert_eq!(spell_out_lr(words.clone()), words);
    }
}
