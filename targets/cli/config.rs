//! `--config FILE.toml`: each key is a flag's long name (dashes or underscores), each value what one
//! would write after it. Flags on the command line win over the file.

use std::ffi::OsString;
use std::path::Path;

use anyhow::Result;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches};
use engraft_runtime::error::{Error, ErrorKind};

use crate::args::command;
use crate::exit::usage_message;

/// Flags of which one makes the other meaningless: a file's value yields to either.
const RIVALS: [(&str, &str); 2] = [("iters", "epochs"), ("mask-prompt", "no-mask-prompt")];

/// Files beyond this are no settings.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The arguments that `file` stands for, without those that the command line (`given`) overrides.
///
/// # Errors
/// [`ErrorKind::Io`] when it can't be read; [`ErrorKind::Misuse`] for a key that is no flag of the
/// verb, or a value that the flag refuses.
pub(crate) fn arguments(file: &Path, verb: &str, given: &ArgMatches) -> Result<Vec<OsString>> {
    let place = file.display();
    let misuse = |message: String| Error::new(ErrorKind::Misuse, format!("{place}: {message}"));
    let table: toml::Table = read(file)?.parse().map_err(|e: toml::de::Error| misuse(e.to_string()))?;

    let definition = command();
    let flags =
        definition.find_subcommand(verb).into_iter().flat_map(|c| c.get_arguments()).collect::<Vec<_>>();
    let mut arguments = Vec::new();
    for (key, value) in &table {
        let name = key.replace('_', "-");
        let flag = find(&flags, &name).ok_or_else(|| {
            misuse(format!("unknown key `{key}`: keys are the long flags of `engraft {verb} --help`"))
        })?;
        let argument = spell(flag, value).map_err(|rule| misuse(format!("key `{key}`: {rule}")))?;
        // Parsed alone first, so that a refusal names this file rather than the command line.
        if let Some(word) = &argument
            && let Err(error) = command().try_get_matches_from(["engraft", verb, word])
        {
            return Err(misuse(format!("key `{key}`: {}", usage_message(&error))).into());
        }
        if !overridden(&flags, flag, given) {
            arguments.extend(argument.map(OsString::from));
        }
    }
    Ok(arguments)
}

fn read(file: &Path) -> Result<String, Error> {
    let what = format!("reading {} (--config)", file.display());
    let size = std::fs::metadata(file).map_err(|e| Error::io(&what, e))?.len();
    if size > FILE_BYTES_MAX {
        let message = format!("{what}: {size} bytes are too many for a file of settings");
        return Err(Error::new(ErrorKind::Misuse, message));
    }
    std::fs::read_to_string(file).map_err(|e| Error::io(&what, e))
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

/// `--flag=value` for a TOML value; `None` for a switch that is off.
fn spell(flag: &Arg, value: &toml::Value) -> Result<Option<String>, &'static str> {
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
        return Ok(on.then(|| format!("--{long}")));
    }
    let text = match value {
        toml::Value::Array(items) => items.iter().map(scalar).collect::<Result<Vec<_>, _>>()?.join(","),
        single => scalar(single)?,
    };
    Ok(Some(format!("--{long}={text}")))
}

/// Whether the command line gives the flag, or one that replaces it.
fn overridden(flags: &[&Arg], flag: &Arg, given: &ArgMatches) -> bool {
    let long = flag.get_long().unwrap_or_default();
    let rival = RIVALS.iter().find_map(|(a, b)| match long {
        l if l == *a => Some(*b),
        l if l == *b => Some(*a),
        _ => None,
    });
    [Some(long), rival]
        .into_iter()
        .flatten()
        .filter_map(|name| find(flags, name))
        .any(|flag| matches!(given.value_source(flag.get_id().as_str()), Some(ValueSource::CommandLine)))
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
