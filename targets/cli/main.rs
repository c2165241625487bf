//! `engraft`: plans, trains, judges and uses LoRA adapters on quantized GGUF models, on the CPU.
//!
//! This is only the command line; the runtime computes every number. Results go to stdout, progress and
//! logs to stderr, and the exit code tells the kind of failure (see `exit.rs`).

mod advice;
mod again;
mod args;
mod conditions;
mod config;
mod contest;
mod exit;
mod interrupt;
mod json;
mod logger;
mod memory;
mod metrics;
mod options;
mod progress;
mod provenance;
mod scratch;
#[cfg(unix)]
mod truncation;
mod units;
mod verbs;

use std::process::ExitCode;

/// Other systems refuse to truncate a mapped file, so there is nothing to watch.
#[cfg(not(unix))]
mod truncation {
    pub(crate) fn install(_: bool) {}
    pub(crate) fn expect(_: &std::path::Path) {}
}

fn main() -> ExitCode {
    // SAFETY: no other thread exists yet, so nothing reads the environment meanwhile. candle reads this
    // variable when it builds its thread pool, which must not compete with the kernels' pool.
    unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };

    let arguments: Vec<_> = std::env::args_os().collect();
    // Taken from the raw words, because parsing errors must be reported as JSON, too.
    let json = arguments.iter().any(|a| a == "--json");
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error, json),
    }
}

fn run(arguments: Vec<std::ffi::OsString>) -> anyhow::Result<()> {
    let cli = args::parse(arguments)?;
    logger::install(cli.verbose);
    if cli.version {
        return Ok(json::line(&provenance::version(cli.verbose > 0))?);
    }
    let Some(command) = cli.command else {
        return Err(args::missing_verb());
    };
    truncation::install(cli.json);
    let cancel = interrupt::install(command.saves_when_asked())?;
    let invocation = verbs::Invocation { json: cli.json, cancel };
    verbs::run(command, &invocation)
}
