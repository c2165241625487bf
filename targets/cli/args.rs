//! The command line: verbs, global options, and how arguments become checked options.

use std::ffi::OsString;

use clap::{Arg, Command, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config;
use crate::verbs::{
    adapt, adapter, bench, chat, compare, completions, data, demo, eval, export, generate, import, merge,
    plan, selftest, train,
};

/// Heading of the options that every verb takes.
const GLOBAL: &str = "Global options";

/// Adapt a quantized language model to your own text, on this machine's CPU.
#[derive(Debug, Parser)]
#[command(name = "engraft", disable_version_flag = true, arg_required_else_help = true)]
#[command(
    after_help = "Exit codes: 0 success; 1 error; 2 wrong usage; 3 doesn't fit into memory; 4 refused by the \
                        gate; 5 bad data; 6 unusable or incompatible model or adapter; 130 interrupted or out of \
                        time.\n\nExample:\n  engraft demo"
)]
pub(crate) struct Cli {
    /// Print the version; with --verbose also the commit, target, instruction set and device profiles
    #[arg(short = 'V', long, help_heading = GLOBAL)]
    pub(crate) version: bool,

    /// Log more to stderr (-v info, -vv debug, -vvv trace)
    #[arg(short, long, global = true, help_heading = GLOBAL, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,

    /// Print the result, or the error, as one JSON object on the last line of stdout
    #[arg(long, global = true, help_heading = GLOBAL)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: Option<Verb>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Print how much memory a training run will take, pool by pool, and whether it fits
    #[command(after_help = "Example:\n  engraft plan -m MODEL.gguf --data rows --memory-budget 512M")]
    Plan(plan::Options),
    /// Train an adapter (LoRA or DoRA), or every weight, within the planned memory
    #[command(after_help = "Example:\n  engraft train -m MODEL.gguf --data rows --adapter-path adapter")]
    Train(train::Options),
    /// Compare the model alone, with examples in its prompt, and trained, on held-out rows
    #[command(
        after_help = "Example:\n  engraft compare -m MODEL.gguf --data rows --arms few-shot,lora --out out"
    )]
    Compare(compare::Options),
    /// Train, compare with doing nothing and with prompting, and promote only what is better
    #[command(after_help = "Example:\n  engraft adapt -m MODEL.gguf --data rows --store store")]
    Adapt(adapt::Options),
    /// Continue a prompt, with any number of adapters
    #[command(
        after_help = "Example:\n  engraft generate -m MODEL.gguf --lora adapter --chat -p \"Where is the cave?\""
    )]
    Generate(generate::Options),
    /// Chat with the model, with any number of adapters
    Chat(chat::Options),
    /// Measure perplexity on a text, or the loss on held-out rows
    #[command(after_help = "Example:\n  engraft eval -m MODEL.gguf --lora adapter --data rows")]
    Eval(eval::Options),
    /// Check rows the way training reads them
    #[command(after_help = "Example:\n  engraft data check -m MODEL.gguf --data rows")]
    Data(data::Options),
    /// Import an adapter from PEFT, MLX or llama.cpp and bind it to this model
    #[command(
        after_help = "Example:\n  engraft import -m MODEL.gguf --from peft-adapter --adapter-path adapter"
    )]
    Import(import::Options),
    /// Export an adapter for PEFT or llama.cpp
    #[command(
        after_help = "Example:\n  engraft export -m MODEL.gguf --lora adapter --format peft -o peft-adapter"
    )]
    Export(export::Options),
    /// Merge an adapter into its model and measure the loss of quality
    #[command(
        after_help = "Example:\n  engraft merge -m MODEL.gguf --lora adapter --data rows -o merged.gguf"
    )]
    Merge(merge::Options),
    /// List, check, roll back and prune what was promoted into an adapter store
    #[command(after_help = "Example:\n  engraft adapter ls --store store")]
    Adapter(adapter::Options),
    /// Teach the built-in model a household's private words and judge the result: needs no file, no network
    #[command(after_help = "Example:\n  engraft demo --store store")]
    Demo(demo::Options),
    /// Measure this machine's speed in a few seconds: training, reading, generating
    #[command(after_help = "Example:\n  engraft bench -m MODEL.gguf")]
    Bench(bench::Options),
    /// Check that this machine computes correctly: instruction sets, gradients, threads, adapter files
    #[command(after_help = "Example:\n  engraft selftest")]
    Selftest(selftest::Options),
    /// Print completions for a shell, or write man pages
    Completions(completions::Options),
}

impl Verb {
    /// Whether the verb saves its progress when asked to stop.
    pub(crate) fn saves_when_asked(&self) -> bool {
        matches!(self, Verb::Train(_))
    }
}

/// Parses a command line, whose first word is the program's name. Flags that are absent come from the
/// `--config` file, if one is given.
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

/// Arguments that are required by these verbs and optional in others.
const REQUIRED: [(&str, &[&str]); 3] =
    [("train", &["data"]), ("compare", &["data"]), ("adapt", &["data", "store"])];

/// The command line's definition. Flags accept negative numbers as values, so that the error names the
/// flag and its range instead of an unknown flag `-1`.
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

/// The same with nothing required, because a file may supply what is missing.
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

/// mlx_lm writes the learning rate's short flag with two letters (`-lr 1e-4`), which clap would read as
/// two one-letter flags.
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

    /// The verb and those below it.
    fn all(verb: &Command) -> Vec<&Command> {
        std::iter::once(verb).chain(verb.get_subcommands()).collect()
    }

    #[test]
    fn every_help_ends_with_an_example_that_parses() {
        let whole = command();
        for verb in whole.get_subcommands().flat_map(all) {
            let help = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
            let (_, example) =
                help.split_once("Example:\n  ").unwrap_or_else(|| panic!("{}", verb.get_name()));
            let typed = example.split(" > ").next().unwrap_or_default();
            let mut words = Vec::new();
            for (i, part) in typed.split('"').enumerate() {
                match i % 2 {
                    0 => words.extend(part.split_whitespace()),
                    _ => words.push(part),
                }
            }
            assert_eq!(words[0], "engraft", "{example}");
            assert!(words.contains(&verb.get_name()), "{example}");
            if let Err(error) = command().try_get_matches_from(&words) {
                panic!("{example}: {error}");
            }
        }
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
