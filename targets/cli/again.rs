//! Commands to type next: this one again with other flags, or another on the same files.

use std::ffi::OsString;
use std::path::Path;

use engraft_runtime::gate::report::{Next, Report};

/// A flag's spellings, the first of which is written.
type Flag = &'static [&'static str];

const MINUTES: Flag = &["--minutes"];
const STEPS: Flag = &["--iters"];
const EPOCHS: Flag = &["--epochs"];
const TOKENS: Flag = &["--tokens"];
const RATE: Flag = &["--learning-rate", "-lr", "--lr"];
const ARMS: Flag = &["--arms"];
const OUT: Flag = &["--out", "-o"];
const STORE: Flag = &["--store"];
const KEEP: Flag = &["--keep-general"];
/// Minutes where nothing says how long.
const MINUTES_NEXT: f64 = 20.0;
/// What is left of a learning rate that did harm.
const GENTLER: f64 = 0.25;

/// A command line, as its words.
pub(crate) struct Line(Vec<String>);

impl Line {
    /// This process's own.
    pub(crate) fn own() -> Line {
        Line::of(std::env::args_os())
    }

    fn of(words: impl IntoIterator<Item = OsString>) -> Line {
        let words = words.into_iter().skip(1).map(|word| word.to_string_lossy().into_owned());
        Line(std::iter::once("engraft".to_string()).chain(words).collect())
    }

    fn is(word: &str, flag: Flag) -> Option<Option<String>> {
        let (name, value) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
        flag.contains(&name).then(|| value.map(str::to_string))
    }

    /// The value of a flag.
    fn value(&self, flag: Flag) -> Option<String> {
        let at = self.0.iter().position(|word| Line::is(word, flag).is_some())?;
        Line::is(&self.0[at], flag)?.or_else(|| self.0.get(at + 1).cloned())
    }

    /// The same without a flag and its value.
    fn without(&self, flag: Flag) -> Line {
        let (mut words, mut skips) = (Vec::new(), false);
        for word in &self.0 {
            match Line::is(word, flag) {
                _ if std::mem::take(&mut skips) => {}
                Some(value) => skips = value.is_none(),
                None => words.push(word.clone()),
            }
        }
        Line(words)
    }

    /// The same with a flag set.
    fn with(&self, flag: Flag, value: &str) -> Line {
        let Line(mut words) = self.without(flag);
        words.extend([flag[0].to_string(), value.to_string()]);
        Line(words)
    }

    /// The same comparison by `adapt`, of examples alone, which a store then holds.
    fn adapting_examples(&self) -> Line {
        let Line(mut words) = self.without(OUT).with(ARMS, "few-shot").with(STORE, "store");
        words.iter_mut().filter(|word| *word == "compare").take(1).for_each(|word| *word = "adapt".into());
        Line(words)
    }

    /// The same for twice as long.
    fn longer(&self) -> Line {
        for flag in [MINUTES, STEPS, EPOCHS, TOKENS] {
            let value: Option<f64> = self.value(flag).and_then(|value| value.parse().ok());
            if let Some(value) = value {
                return self.with(flag, &(2.0 * value).to_string());
            }
        }
        self.with(MINUTES, &MINUTES_NEXT.to_string())
    }

    /// As a shell reads it.
    pub(crate) fn shown(&self) -> String {
        self.0.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
    }
}

/// A word for a POSIX shell.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=./,:+@%".contains(c);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => word.to_string(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

/// Where a comparison leaves what it made.
#[derive(Clone, Copy)]
pub(crate) enum Place<'a> {
    /// A store, whose active generation is the winner.
    Store(&'a Path),
    /// A folder with a subfolder for each arm.
    Folder(&'a Path),
}

/// The one command to type after a comparison, on these files.
pub(crate) fn after(
    report: &Report,
    line: &Line,
    (model, data): (&Path, &Path),
    (place, chat): (Place<'_>, bool),
) -> String {
    let path = |path: &Path| quoted(&path.display().to_string());
    let (base, data) = (path(model), path(data));
    let prompt = if chat { "a question" } else { "the beginning of a text" };
    let generate = |of: &str| format!("engraft generate -m {base} {of} -p '{prompt}'");
    match (report.next(), place) {
        (Next::Use { .. } | Next::Prompt { .. }, Place::Store(store)) => {
            generate(&format!("--store {}", path(store)))
        }
        (Next::Use { arm }, Place::Folder(folder)) => {
            let of = folder.join(arm);
            let whole = of.join(engraft_runtime::compare::MODEL_FILE);
            match whole.is_file() {
                true => format!("engraft generate -m {} -p '{prompt}'", path(&whole)),
                false => generate(&format!("--lora {}", path(&of))),
            }
        }
        (Next::Prompt { .. }, Place::Folder(_)) => line.adapting_examples().shown(),
        (Next::SplitApart | Next::HoldOut(_), _) => format!("engraft data check -m {base} --data {data}"),
        (Next::KeepMore { .. }, _) => match line.value(KEEP).as_deref() {
            None | Some("strict") => line.with(KEEP, "moderate").shown(),
            Some(_) => line.longer().shown(),
        },
        (Next::Gentler, _) => {
            let rates = report.runs.iter().map(|run| run.learning_rate).filter(|rate| *rate > 0.0);
            let rate = rates.reduce(f64::min).unwrap_or(1e-3) * GENTLER;
            line.with(RATE, &format!("{rate:.1e}")).shown()
        }
        (Next::MoreAnswers { .. } | Next::More { .. }, _) => line.longer().shown(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(words: &str) -> Line {
        Line::of(words.split(' ').map(OsString::from))
    }

    #[test]
    fn a_flag_is_set_once_however_it_was_given() {
        let plain = line("/bin/engraft adapt -m a.gguf --data rows");
        assert_eq!(plain.longer().shown(), "engraft adapt -m a.gguf --data rows --minutes 20");
        for given in ["--minutes 10", "--minutes=10"] {
            let longer = line(&format!("engraft adapt {given} -m a")).longer().shown();
            assert_eq!(longer, "engraft adapt -m a --minutes 20");
        }
        assert_eq!(line("engraft compare --iters 30").longer().shown(), "engraft compare --iters 60");
        assert_eq!(line("engraft compare --epochs 1.5").longer().shown(), "engraft compare --epochs 3");
        let examples = line("engraft compare -o out --arms lora,few-shot -k 3").adapting_examples().shown();
        assert_eq!(examples, "engraft adapt -k 3 --arms few-shot --store store");
        let gentler = line("engraft adapt -lr 2e-3 -t 2").with(RATE, "5e-4").shown();
        assert_eq!(gentler, "engraft adapt -t 2 --learning-rate 5e-4");
    }

    #[test]
    fn a_shell_reads_what_is_shown() {
        for (word, shown) in
            [("a b", "'a b'"), ("it's", r"'it'\''s'"), ("", "''"), ("--rate=1e-3", "--rate=1e-3")]
        {
            assert_eq!(quoted(word), shown);
        }
    }
}
