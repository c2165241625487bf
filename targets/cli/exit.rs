//! Turns errors into an exit code, a line on stderr and, with `--json`, an object on stdout.

use std::process::ExitCode;

use engraft_runtime::error::{Error, ErrorKind};

use crate::{advice, json};

/// The exit code of a wrong command line.
const USAGE: u8 = 2;

/// The documented exit code of an error's kind.
pub(crate) fn code_of(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Misuse => USAGE,
        ErrorKind::DoesNotFit => 3,
        ErrorKind::GateRefused => 4,
        ErrorKind::BadData => 5,
        // The model or adapter can't be used: damaged, foreign, of an unknown type, or made for another base.
        ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::BaseMismatch => 6,
        ErrorKind::Cancelled => 130,
        _ => 1,
    }
}

/// Marks an error whose result is already on stdout as JSON, so that nothing may follow it.
#[derive(Debug)]
pub(crate) struct AfterJson(pub(crate) &'static str);

impl std::fmt::Display for AfterJson {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

/// The exit code of any error.
pub(crate) fn code(error: &anyhow::Error) -> u8 {
    match (error.downcast_ref::<clap::Error>(), error.downcast_ref::<Error>()) {
        (Some(usage), _) if !usage.use_stderr() => 0,
        (Some(_), _) => USAGE,
        (None, Some(error)) => code_of(error.kind()),
        (None, None) => 1,
    }
}

/// The stable name of an error's class, as shown by `--json`.
fn kind_name(error: &anyhow::Error) -> &'static str {
    if error.is::<clap::Error>() {
        return "usage";
    }
    match error.downcast_ref::<Error>().map(Error::kind) {
        Some(ErrorKind::Io) => "io",
        Some(ErrorKind::Full) => "full",
        Some(ErrorKind::Corrupt) => "corrupt",
        Some(ErrorKind::Unsupported) => "unsupported",
        Some(ErrorKind::Misuse) => "usage",
        Some(ErrorKind::DoesNotFit) => "does_not_fit",
        Some(ErrorKind::BadData) => "bad_data",
        Some(ErrorKind::BaseMismatch) => "base_mismatch",
        Some(ErrorKind::NonFinite) => "non_finite",
        Some(ErrorKind::Busy) => "busy",
        Some(ErrorKind::Cancelled) => "cancelled",
        Some(ErrorKind::GateRefused) => "gate_refused",
        _ => "error",
    }
}

/// The message of a usage error, without its label and the hints below it.
pub(crate) fn usage_message(error: &clap::Error) -> String {
    let text = error.to_string();
    let message = text.split("\n\n").next().unwrap_or_default();
    let lines: Vec<_> = message.trim_start_matches("error: ").lines().map(str::trim).collect();
    lines.join(" ")
}

/// Prints the error and returns its exit code. Help isn't an error: it goes to stdout with code 0.
pub(crate) fn report(error: &anyhow::Error, json: bool) -> ExitCode {
    let code = code(error);
    if is_broken_pipe(error) {
        // The reader of stdout has had enough, like `head`. Nothing is wrong, and nobody is left to tell.
        return ExitCode::from(code);
    }
    match error.downcast_ref::<clap::Error>() {
        // If stdout or stderr is closed, there is nobody to tell.
        Some(usage) => drop(usage.print()),
        // What the gate decides is a result.
        None if code == code_of(ErrorKind::GateRefused) => eprintln!("{}", message(error)),
        None => eprintln!("error: {}", message(error)),
    }
    if json
        && code != 0
        && !error.is::<AfterJson>()
        && let Some(object) = object(error)
    {
        drop(json::line(&object));
    }
    ExitCode::from(code)
}

/// Whether stdout is closed at its other end.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    kind == Some(std::io::ErrorKind::BrokenPipe)
}

/// What happened and what to type next.
fn message(error: &anyhow::Error) -> String {
    let Some(told) = error.downcast_ref().map(advice::told) else { return format!("{error:#}") };
    // Context that was added on the way up comes before the error itself.
    let outer: Vec<String> =
        error.chain().take_while(|e| !e.is::<Error>()).map(ToString::to_string).collect();
    outer.into_iter().chain([told]).collect::<Vec<_>>().join(": ")
}

/// The error as a line of JSON.
pub(crate) fn object(error: &anyhow::Error) -> Option<String> {
    let message = error.downcast_ref().map_or_else(|| message(error), usage_message);
    let body = json::ErrorBody { kind: kind_name(error), message: &message, exit_code: code(error) };
    serde_json::to_string(&json::Failure { error: body }).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_documented() {
        for (kind, expected) in [
            (ErrorKind::Io, 1),
            (ErrorKind::Full, 1),
            (ErrorKind::Corrupt, 6),
            (ErrorKind::Unsupported, 6),
            (ErrorKind::Misuse, 2),
            (ErrorKind::DoesNotFit, 3),
            (ErrorKind::BadData, 5),
            (ErrorKind::BaseMismatch, 6),
            (ErrorKind::NonFinite, 1),
            (ErrorKind::Busy, 1),
            (ErrorKind::Cancelled, 130),
            (ErrorKind::GateRefused, 4),
        ] {
            assert_eq!(code(&Error::new(kind, "x").into()), expected, "{kind:?}");
            assert_ne!(kind_name(&Error::new(kind, "x").into()), "error", "{kind:?}");
        }
        assert_eq!(code(&anyhow::anyhow!("other")), 1);
    }

    #[test]
    fn usage_messages_are_one_line() {
        let refuse = |words: &[&str]| crate::args::command().try_get_matches_from(words).unwrap_err();
        let bad = refuse(&["engraft", "train", "--rank", "0"]);
        assert_eq!(usage_message(&bad), "invalid value '0' for '--rank <R>': 0 is not in 1..=256");
        let bad = refuse(&["engraft", "train", "--schedule", "up"]);
        assert!(usage_message(&bad).ends_with("[possible values: constant, linear, cosine]"));
    }

    #[test]
    fn context_keeps_the_code() {
        let inner = anyhow::Error::from(Error::new(ErrorKind::DoesNotFit, "x"));
        assert_eq!(code(&inner.context("while planning")), 3);
    }
}
