//! One file per verb: its options, and what it does with the runtime.

pub(crate) mod adapt;
pub(crate) mod adapter;
mod arm;
pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod common;
pub(crate) mod compare;
pub(crate) mod data;
pub(crate) mod demo;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod generate;
pub(crate) mod import;
mod measure;
pub(crate) mod merge;
pub(crate) mod plan;
mod prepare;
mod resume;
pub(crate) mod selftest;
pub(crate) mod train;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Result;

use crate::args::Verb;

/// How often private memory is looked at.
const WATCH_INTERVAL: Duration = Duration::from_millis(10);
/// The random stream of an adapter's initial values.
const INIT_STREAM: u64 = 0x494E_4954;

/// What every verb is given beside its options.
pub(crate) struct Session {
    /// Whether the last line on stdout shall be the result as JSON.
    pub(crate) json: bool,
    /// Set by Ctrl-C: stop at the next step, keep what is there, and end with `Cancelled`.
    pub(crate) cancel: Arc<AtomicBool>,
}

/// Runs a verb.
///
/// # Errors
/// The runtime's, whose kind decides the exit code.
pub(crate) fn run(verb: Verb, session: &Session) -> Result<()> {
    match verb {
        Verb::Plan(options) => plan::run(&options, session),
        Verb::Train(options) => train::run(&options, session),
        Verb::Compare(options) => compare::run(&options, session),
        Verb::Adapt(options) => adapt::run(&options, session),
        Verb::Generate(options) => generate::run(&options, session),
        Verb::Chat(options) => chat::run(&options, session),
        Verb::Data(options) => data::run(&options, session),
        Verb::Eval(options) => eval::run(&options, session),
        Verb::Import(options) => import::run(&options, session),
        Verb::Export(options) => export::run(&options, session),
        Verb::Merge(options) => merge::run(&options, session),
        Verb::Adapter(options) => adapter::run(&options, session),
        Verb::Demo(options) => demo::run(&options, session),
        Verb::Bench(options) => bench::run(&options, session),
        Verb::Selftest(options) => selftest::run(&options, session),
    }
}
