//! One file per verb: its options and its calls into the runtime.

pub(crate) mod adapt;
pub(crate) mod adapter;
pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod common;
pub(crate) mod compare;
pub(crate) mod completions;
pub(crate) mod data;
pub(crate) mod demo;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod generate;
pub(crate) mod import;
mod measure;
pub(crate) mod merge;
pub(crate) mod plan;
pub(crate) mod prepare;
mod promote;
mod resume;
pub(crate) mod selftest;
pub(crate) mod train;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use engraft_runtime::error::Error;
use serde::Serialize;

use crate::args::Verb;
use crate::exit::AfterJson;
use crate::json;

/// How often to measure private memory.
const WATCH_INTERVAL: Duration = Duration::from_millis(10);

/// What every verb gets besides its options.
pub(crate) struct Invocation {
    /// Whether to print the result as JSON on the last line of stdout.
    pub(crate) json: bool,
    /// Set by Ctrl-C: stop at the next step, keep what is done, and end with `Cancelled`.
    pub(crate) cancel: Arc<AtomicBool>,
}

impl Invocation {
    /// Prints the result as JSON, if that was asked for.
    fn emit(&self, result: &impl Serialize) -> Result<()> {
        if self.json {
            json::emit(result)?;
        }
        Ok(())
    }

    /// An error that comes after a verb's result, which may be on stdout as JSON already.
    fn after(&self, verb: &'static str, error: Error) -> anyhow::Error {
        let error = anyhow::Error::from(error);
        if self.json { error.context(AfterJson(verb)) } else { error }
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }
}

/// Runs a verb.
///
/// # Errors
/// The runtime's errors, whose kind determines the exit code.
pub(crate) fn run(verb: Verb, invocation: &Invocation) -> Result<()> {
    match verb {
        Verb::Plan(options) => plan::run(&options, invocation),
        Verb::Train(options) => train::run(&options, invocation),
        Verb::Compare(options) => compare::run(&options, invocation),
        Verb::Adapt(options) => adapt::run(&options, invocation),
        Verb::Generate(options) => generate::run(&options, invocation),
        Verb::Chat(options) => chat::run(&options, invocation),
        Verb::Data(options) => data::run(&options, invocation),
        Verb::Eval(options) => eval::run(&options, invocation),
        Verb::Import(options) => import::run(&options, invocation),
        Verb::Export(options) => export::run(&options, invocation),
        Verb::Merge(options) => merge::run(&options, invocation),
        Verb::Adapter(options) => adapter::run(&options, invocation),
        Verb::Demo(options) => demo::run(&options, invocation),
        Verb::Bench(options) => bench::run(&options, invocation),
        Verb::Selftest(options) => selftest::run(&options, invocation),
        Verb::Completions(options) => completions::run(&options),
    }
}
