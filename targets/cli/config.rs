//! `--config FILE.toml`: each key is a flag's long name (dashes or underscores), each value what one
//! would write after it. Flags on the command line win over the file.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::Result;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Command};
use engraft_runtime::error::{Error, ErrorKind};

use crate::args::command;
use crate::exit::usage_message;

/// Flags of which one makes the other meaningless, beside those of one group: a file's value yields to either.
const RIVALS: [(&str, &str); 3] =
    [("iters", "epochs"), ("mask-prompt", "no-mask-prompt"), ("task", "metric")];

/// Files beyond this are no settings.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The arguments that `file` stands for, without those that the command line (`given`) overrides.
///
/// # Errors
/// [`ErrorKind::Io`] when it can't be read; [`ErrorKind::Misuse`] for a key that is no flag of the
/// verb, or a value that the flag refuses.
pub(crate) fn arguments(file: &Path, verb: &str, given: &ArgMatches) -> Result<Vec<OsString>> {
    let place = file.display();
    let misuse = |message: String| Error::new(ErrorKind::Misuse, format!("{place}: {}", told(&message)));
    let table: toml::Table = read(file)?.parse().map_err(|e: toml::de::Error| misuse(e.to_string()))?;

    let mut definition = command();
    // Groups that arguments name exist only then.
    definition.build();
    let of_verb = definition.find_subcommand(verb).unwrap_or(&definition);
    let flags: Vec<&Arg> = of_verb.get_arguments().collect();
    let mut arguments = Vec::new();
    for (key, value) in &table {
        let name = key.replace('_', "-");
        let flag = find(&flags, &name).ok_or_else(|| {
            misuse(format!("unknown key `{key}`: keys are the long flags of `engraft {verb} --help`"))
        })?;
        let spelled = spell(flag, value).map_err(|rule| misuse(format!("key `{key}`: {rule}")))?;
        // Parsed alone first, so that a refusal names this file rather than the command line.
        let alone = ["engraft", verb].into_iter().chain(spelled.iter().map(String::as_str));
        if let Err(error) = command().try_get_matches_from(alone) {
            return Err(misuse(format!("key `{key}`: {}", usage_message(&error))).into());
        }
        if !overridden(of_verb, &flags, flag, given) {
            arguments.extend(spelled.into_iter().map(OsString::from));
        }
    }
    Ok(arguments)
}

fn read(file: &Path) -> Result<String, Error> {
    let what = format!("reading {} (--config)", file.display());
    let mut bytes = Vec::new();
    // A device or a pipe has no length that could be asked for before.
    let opened = File::open(file).and_then(|f| f.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes));
    opened.map_err(|e| Error::io(&what, e))?;
    let misuse = |problem: String| Error::new(ErrorKind::Misuse, format!("{what}: {problem}"));
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(misuse(format!("more than {FILE_BYTES_MAX} bytes are too many for a file of settings")));
    }
    String::from_utf8(bytes).map_err(|_| misuse("not UTF-8: save it as a text in UTF-8".into()))
}

/// A message with words of the file: of bounded length, and without what a terminal would obey.
fn told(message: &str) -> String {
    const SHOWN: usize = 1000;
    let plain = |c: char| if c.is_control() && c != '\n' { ' ' } else { c };
    let shown: String = message.chars().take(SHOWN).map(plain).collect();
    if message.chars().nth(SHOWN).is_some() { shown + "…" } else { shown }
}

/// The verb's flag with a long name or alias.
fn find<'a>(flags: &[&'a Arg], name: &str) -> Option<&'a Arg> {
    if ["config", "help"].contains(&name) {
        return None;
    }
    let named = |flag: &&&Arg| {
        flag.get_long() == Some(name) || flag.get_all_aliases().unwrap_or_default().contains(&name)
    };
    flags.iter().find(named).copied()
}

/// `--flag=value` for a TOML value; nothing for a switch that is off, and one for each item of a list where
/// the flag is repeated rather than given a list.
fn spell(flag: &Arg, value: &toml::Value) -> Result<Vec<String>, &'static str> {
    let long = flag.get_long().unwrap_or_default();
    let scalar = |value: &toml::Value| match value {
        toml::Value::String(text) => Ok(text.clone()),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Float(number) => Ok(number.to_string()),
        toml::Value::Boolean(on) => Ok(on.to_string()),
        _ => Err("must be a text, a number, true or false, or a list of these"),
    };
    if matches!(flag.get_action(), ArgAction::SetTrue) {
        let on = value.as_bool().ok_or("must be true or false")?;
        return Ok(on.then(|| format!("--{long}")).into_iter().collect());
    }
    let is_repeated = matches!(flag.get_action(), ArgAction::Append) && flag.get_value_delimiter().is_none();
    let text = match value {
        toml::Value::Array(items) if is_repeated => {
            return items.iter().map(|item| Ok(format!("--{long}={}", scalar(item)?))).collect();
        }
        toml::Value::Array(items) => items.iter().map(scalar).collect::<Result<Vec<_>, _>>()?.join(","),
        single => scalar(single)?,
    };
    Ok(vec![format!("--{long}={text}")])
}

/// Whether the command line gives the flag, or one that replaces it.
fn overridden(verb: &Command, flags: &[&Arg], flag: &Arg, given: &ArgMatches) -> bool {
    let rivals = RIVALS.iter().filter_map(|(a, b)| match flag.get_long()? {
        long if long == *a => Some(*b),
        long if long == *b => Some(*a),
        _ => None,
    });
    let rivals = rivals.filter_map(|name| find(flags, name)).map(Arg::get_id);
    // Of a group that is no mere list of options, one flag is given at most.
    let is_choice = |group: &&ArgGroup| !(*group).clone().is_multiple();
    let groups = verb.get_groups().filter(is_choice).filter(|g| g.get_args().any(|id| id == flag.get_id()));
    [flag.get_id()]
        .into_iter()
        .chain(rivals)
        .chain(groups.flat_map(ArgGroup::get_args))
        .any(|id| matches!(given.value_source(id.as_str()), Some(ValueSource::CommandLine)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Verb, parse};
    use crate::options::{Length, TuneOptions};

    fn train(toml: &str, flags: &[&str]) -> Result<TuneOptions> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("settings.toml");
        std::fs::write(&file, toml)?;
        let mut words: Vec<OsString> = ["engraft", "--json", "train"].map(OsString::from).to_vec();
        words.extend(flags.iter().map(OsString::from));
        words.extend(["--config".into(), file.into()]);
        match parse(words)?.command {
            Some(Verb::Train(options)) => Ok(options.tune),
            other => panic!("not train: {other:?}"),
        }
    }

    #[test]
    fn keys_are_flags_and_flags_win() {
        let toml =
            "rank = 4\nlora_alpha = 32\nlearning-rate = 1e-3\nlora-modules = [\"q\", \"v_proj\"]\nepochs = 2";
        let options = train(toml, &["--rank", "16"]).unwrap();
        assert_eq!((options.lora.rank, options.lora.alpha), (16, 32.0));
        assert_eq!(options.run.learning_rate(options.lora.fine_tune_type), 1e-3);
        assert_eq!(options.lora.lora_modules.0.len(), 2);
        assert_eq!(options.run.length(), Length::Epochs(2));
        assert_eq!(train(toml, &["--iters", "7"]).unwrap().run.length(), Length::Iters(7));
    }

    fn adapt(toml: &str, flags: &[&str]) -> Result<String> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("settings.toml");
        std::fs::write(&file, toml)?;
        let mut words: Vec<OsString> = ["engraft", "adapt"].map(OsString::from).to_vec();
        words.extend(flags.iter().map(OsString::from));
        words.extend(["--config".into(), file.into()]);
        match parse(words)?.command {
            Some(Verb::Adapt(options)) => Ok(format!("{options:?}")),
            other => panic!("not adapt: {other:?}"),
        }
    }

    #[test]
    fn one_budget_gives_way_to_another() {
        let of = |toml: &str, flags: &[&str]| {
            let told = adapt(toml, flags).unwrap();
            ["iters", "epochs", "tokens", "minutes"].map(|name| told.contains(&format!("{name}: Some(")))
        };
        assert_eq!(of("iters = 7", &[]), [true, false, false, false]);
        assert_eq!(of("iters = 7", &["--minutes", "3"]), [false, false, false, true]);
        assert_eq!(of("tokens = 7\nrank = 2", &["--epochs", "0.5"]), [false, true, false, false]);
        assert_eq!(of("minutes = 7", &["--minutes", "3"]), [false, false, false, true]);
        let two = adapt("iters = 7\nepochs = 1", &[]).unwrap_err();
        assert_eq!(crate::exit::code(&two), 2, "{two}");
        let told = adapt("metric = \"json\"", &["--task", "gsm8k"]).unwrap();
        assert!(told.contains("metric: None") && told.contains("task: Some(Gsm8k)"), "{told}");
    }

    #[test]
    fn lists_are_lists_or_repeated_flags() {
        let told = adapt("seeds = [3, 4]\narms = [\"few-shot\", \"lora\"]", &["-lr", "1e-3"]).unwrap();
        for words in ["seeds: [3, 4]", "arms: [FewShot, Lora]", "learning_rate: Some(0.001)"] {
            assert!(told.contains(words), "{words}: {told}");
        }
        let told = adapt("retention = [\"a.txt\", \"b.txt\"]", &[]).unwrap();
        assert!(told.contains("retention: [\"a.txt\", \"b.txt\"]"), "{told}");
        let told = adapt("retention = [\"a.txt\"]", &["--retention", "c.txt"]).unwrap();
        assert!(told.contains("retention: [\"c.txt\"]"), "{told}");
    }

    #[test]
    fn switches_can_be_off() {
        assert!(train("", &[]).unwrap().data.masks_prompt());
        assert!(!train("mask-prompt = false", &[]).unwrap().data.masks_prompt());
        assert!(train("mask-prompt = false", &["--mask-prompt"]).unwrap().data.masks_prompt());
        assert!(!train("mask-prompt = true", &["--no-mask-prompt"]).unwrap().data.masks_prompt());
        assert!(train("no-mask-prompt = false", &[]).unwrap().data.masks_prompt());
    }

    #[test]
    fn unknown_keys_and_bad_values_name_file_and_key() {
        for (toml, key) in [
            ("ranks = 4", "`ranks`"),
            ("config = \"other.toml\"", "`config`"),
            ("rank = 0", "`rank`"),
            ("rank = {}", "`rank`"),
            ("no-mask-prompt = 3", "`no-mask-prompt`"),
            ("rank = ", "line 1"),
        ] {
            let error = train(toml, &["--rank", "16"]).expect_err(toml);
            let text = error.to_string();
            assert!(text.contains("settings.toml") && text.contains(key), "{toml}: {text}");
            assert_eq!(crate::exit::code(&error), 2, "{toml}");
        }
    }
}
