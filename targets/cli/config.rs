//! `--config FILE.toml`: each key is a flag's long name (with dashes or underscores), each value what follows
//! the flag. Flags on the command line override the file.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::Result;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Command};
use engraft_runtime::error::{Error, ErrorKind};

use crate::args::{command, without_required};
use crate::exit::usage_message;

/// Pairs of flags that exclude each other without sharing a group. Giving one overrides the other in the file.
const RIVALS: [(&str, &str); 3] =
    [("iters", "epochs"), ("mask-prompt", "no-mask-prompt"), ("task", "metric")];

/// Larger files can't be settings.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The arguments in `file`, without those that the command line (`given`) overrides.
///
/// # Errors
/// [`ErrorKind::Io`] if it can't be read; [`ErrorKind::Misuse`] for a key that isn't a flag of the verb, or a
/// value that the flag refuses.
pub(crate) fn arguments(file: &Path, verb: &str, given: &ArgMatches) -> Result<Vec<OsString>> {
    let place = file.display();
    let misuse = |message: String| Error::new(ErrorKind::Misuse, format!("{place}: {}", told(&message)));
    let table: toml::Table = read(file)?.parse().map_err(|e: toml::de::Error| misuse(e.to_string()))?;

    let mut definition = command();
    // Groups that arguments name exist only after this.
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
        // Parsed alone first, so that an error names this file and not the command line.
        let alone = ["engraft", verb].into_iter().chain(spelled.iter().map(String::as_str));
        if let Err(error) = without_required().try_get_matches_from(alone) {
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
    // Read with a limit: a device or a pipe has no length to check first.
    let opened = File::open(file).and_then(|f| f.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes));
    opened.map_err(|e| Error::io(&what, e))?;
    let misuse = |problem: String| Error::new(ErrorKind::Misuse, format!("{what}: {problem}"));
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(misuse(format!("more than {FILE_BYTES_MAX} bytes are too many for a settings file")));
    }
    String::from_utf8(bytes).map_err(|_| misuse("not UTF-8; save it as UTF-8 text".into()))
}

/// A message that quotes the file, with bounded length and without control characters.
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

/// Spells a TOML value as `--flag=value`: nothing for a switch that is off, and one argument per item if the
/// flag is repeated instead of taking a list.
fn spell(flag: &Arg, value: &toml::Value) -> Result<Vec<String>, &'static str> {
    let long = flag.get_long().unwrap_or_default();
    let scalar = |value: &toml::Value| match value {
        toml::Value::String(text) => Ok(text.clone()),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Float(number) => Ok(number.to_string()),
        toml::Value::Boolean(on) => Ok(on.to_string()),
        _ => Err("must be text, a number, true or false, or a list of these"),
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

/// Whether the command line has this flag or one that replaces it.
fn overridden(verb: &Command, flags: &[&Arg], flag: &Arg, given: &ArgMatches) -> bool {
    let rivals = RIVALS.iter().filter_map(|(a, b)| match flag.get_long()? {
        long if long == *a => Some(*b),
        long if long == *b => Some(*a),
        _ => None,
    });
    let rivals = rivals.filter_map(|name| find(flags, name)).map(Arg::get_id);
    // At most one flag of a group may be given, unless the group is only a list of options.
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
    use crate::options::TuneOptions;
    use engraft_runtime::run::Length;

    fn train(toml: &str, flags: &[&str]) -> Result<TuneOptions> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("settings.toml");
        std::fs::write(&file, toml)?;
        let line = ["engraft", "--json", "train", "-m", "m.gguf", "--data", "rows"];
        let mut words: Vec<OsString> = line.map(OsString::from).to_vec();
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
        let of = |flags: &[&str]| train(toml, flags).unwrap().settings(&small(), None).unwrap();
        let settings = of(&["--rank", "16"]);
        let lora = settings.method.lora().unwrap();
        assert_eq!((lora.rank, lora.alpha, lora.targets.len()), (16, 32.0, 2));
        assert_eq!((settings.rate, settings.length), (Some(1e-3), Length::Epochs(2.0)));
        assert_eq!(of(&["--iters", "7"]).length, Length::Steps(7));
    }

    fn small() -> engraft_runtime::model::ModelConfig {
        crate::verbs::demo::built_in().unwrap().config().clone()
    }

    fn adapt(toml: &str, flags: &[&str]) -> Result<String> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("settings.toml");
        std::fs::write(&file, toml)?;
        let line = ["engraft", "adapt", "-m", "m.gguf", "--data", "rows", "--store", "s"];
        let mut words: Vec<OsString> = line.map(OsString::from).to_vec();
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

    /// Files that aren't settings, each with a part of its error. They are refused with code 2 and a message of
    /// bounded length without control characters.
    #[test]
    fn hostile_files_are_refused() {
        let deep =
            |open: &str, close: &str, n: usize| format!("rank = {}1{}", open.repeat(n), close.repeat(n));
        let long = "k\\u001b[2J".repeat(20_000);
        let mut cases = vec![
            ("a NUL".to_string(), "rank = 4\0".into(), "line 1"),
            ("a byte".into(), "rank = \u{7f}".into(), "line 1"),
            ("half a table".into(), "[train".into(), "line 1"),
            ("a table".into(), "[rank]\nx = 1".into(), "`rank`"),
            ("tables of a list".into(), "[[rank]]\n[[rank]]".into(), "`rank`"),
            ("a key twice".into(), "rank = 4\nrank = 5".into(), "line 2"),
            ("a key twice in another spelling".into(), "lora-alpha = 0\nlora_alpha = 4".into(), "lora"),
            ("a dotted key".into(), "rank.x = 4".into(), "`rank`"),
            ("an empty key".into(), "\"\" = 4".into(), "unknown key"),
            ("a date".into(), "rank = 1979-05-27T07:32:00Z".into(), "`rank`"),
            ("infinity".into(), "lora-alpha = inf".into(), "`lora-alpha`"),
            ("not a number".into(), "lora-alpha = nan".into(), "`lora-alpha`"),
            ("beyond i64".into(), "rank = 9223372036854775808".into(), "line 1"),
            ("the least i64".into(), "rank = -9223372036854775808".into(), "`rank`"),
            ("beyond f64".into(), "lora-alpha = 1e999".into(), "lora-alpha"),
            ("a flag for a key".into(), "\"--rank\" = 4".into(), "unknown key"),
            ("a value that is a flag".into(), "rank = \"--help\"".into(), "`rank`"),
            ("control characters in a key".into(), format!("\"{long}\" = 1"), "unknown key"),
            ("control characters in a value".into(), format!("rank = \"{long}\""), "`rank`"),
            ("control characters that aren't TOML".into(), "\u{1b}[2J".repeat(20_000), "line 1"),
            ("a line without end".into(), "x".repeat(1 << 20), "line 1"),
            ("a list without end".into(), format!("rank = [{}1]", "1,".repeat(400_000)), "`rank`"),
            (
                "a list of texts without end".into(),
                format!("lora-modules = [{}\"q\"]", "\"z\",".repeat(150_000)),
                "`lora-modules`",
            ),
            ("too long".into(), "#".repeat((1 << 20) + 1), "too many"),
        ];
        for n in [79, 80, 81, 1000, 200_000] {
            cases.push((format!("{n} lists"), deep("[", "]", n), ""));
            cases.push((format!("{n} tables"), deep("{a=", "}", n.min(150_000)), ""));
            cases.push((format!("{n} open lists"), deep("[", "", n), ""));
            cases.push((format!("{n} dots"), format!("a{} = 1", ".a".repeat(n)), ""));
            cases.push((format!("{n} dots of a table"), format!("[a{}]", ".a".repeat(n)), ""));
        }
        for (name, text, part) in &cases {
            let begin = std::time::Instant::now();
            let error = train(text, &[]).expect_err(name);
            let told = error.to_string();
            assert!(told.contains("settings.toml") && told.contains(part), "{name}: {told}");
            assert!(
                told.len() < 8192 && !told.contains(|c: char| c.is_control() && c != '\n'),
                "{name}: {told:?}"
            );
            assert_eq!(crate::exit::code(&error), 2, "{name}");
            // A release build promises 100 ms; this is looser because other tests run at the same time.
            assert!(begin.elapsed().as_secs() < 5, "{name} took {:?}", begin.elapsed());
        }
        eprintln!("{} settings files are refused", cases.len());
    }

    #[test]
    fn files_that_are_no_text_or_have_no_end_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("settings.toml");
        std::fs::write(&file, b"rank = \xff").unwrap();
        let message = read(&file).unwrap_err();
        assert!(message.kind() == ErrorKind::Misuse && message.message().contains("not UTF-8"), "{message}");
        #[cfg(unix)]
        for (device, part) in [("/dev/zero", "too many"), ("/dev/urandom", "too many")] {
            let error = read(Path::new(device)).unwrap_err();
            assert!(error.kind() == ErrorKind::Misuse && error.message().contains(part), "{device}: {error}");
        }
    }

    const WORDS: [&str; 24] = [
        "rank",
        "lora_alpha",
        "learning-rate",
        "lora-modules",
        "epochs",
        "mask-prompt",
        "=",
        "=",
        "=",
        "\n",
        "\n",
        "\n",
        "4",
        "-1",
        "1e-3",
        "\"q\"",
        "[",
        "]",
        "{",
        "}",
        ",",
        ".",
        "true",
        "9223372036854775807",
    ];

    /// Words of good files, replaced, moved and doubled by a seed: refused or read, but never a panic.
    #[test]
    fn mutated_files_are_refused_or_read() {
        let seed = std::env::var("ENGRAFT_MUTATION_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(7_u64);
        let mut state = seed | 1;
        let mut below = |n: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % n
        };
        let (mut read, mut refused) = (0, 0);
        for case in 0..1500 {
            let mut words = vec![
                "rank",
                "=",
                "4",
                "\n",
                "lora-modules",
                "=",
                "[",
                "\"q\"",
                "]",
                "\n",
                "epochs",
                "=",
                "2",
                "\n",
            ];
            for _ in 0..1 + below(3) {
                let at = below(words.len());
                match below(4) {
                    0 => words[at] = WORDS[below(WORDS.len())],
                    1 => words.insert(at, WORDS[below(WORDS.len())]),
                    2 => drop(words.remove(at)),
                    _ => words.swap(at, 0),
                }
            }
            match train(&words.join(" "), &[]) {
                Ok(_) => read += 1,
                Err(e) => {
                    assert_eq!(crate::exit::code(&e), 2, "seed {seed}, case {case}: {e}");
                    refused += 1;
                }
            }
        }
        eprintln!("settings, seed {seed}: {read} read, {refused} refused");
        assert!(read > 50 && refused > 50);
    }
}
