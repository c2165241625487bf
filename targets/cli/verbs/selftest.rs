//! `engraft selftest`: checks whether this machine computes correctly.

use anyhow::Result;
use clap::{Args, value_parser};
use engraft_runtime::bytes;
use engraft_runtime::error::{Advice, Error, ErrorKind};
use engraft_runtime::plan::room;
use engraft_runtime::selftest::{self, Check};

use super::{Invocation, demo};
use crate::json;
use crate::options::{OptionalModelOptions, threads_default};
use crate::scratch::Scratch;

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) model: OptionalModelOptions,

    /// Number of threads
    #[arg(short, long, value_name = "N", default_value_t = threads_default(), value_parser = value_parser!(u32).range(1..=256))]
    threads: u32,
}

pub(crate) fn run(options: &Options, invocation: &Invocation) -> Result<()> {
    let model = options.model.given().map_or_else(demo::built_in, |model| model.open())?;
    let threads = options.threads as usize;
    room::hold_bytes(selftest::private_bytes(&model, threads), threads, Advice::SmallerModel)?;
    let scratch = Scratch::new()?;
    let mut checks = Vec::new();
    let mut shown = Ok(());
    let told = selftest::run(&model, threads, scratch.path(), &mut |check| {
        checks.push(check.clone());
        shown = json::line(&row(check));
        shown.is_ok() && !invocation.is_cancelled()
    });
    shown?;
    told?;
    if !selftest::judged_by_reference(&model, threads) {
        let needed = bytes::show(selftest::reference_bytes(&model) as u64);
        eprintln!("left out: the comparison with candle's layers, which needs {needed} of memory");
    }
    let failed: Vec<&Check> = checks.iter().filter(|check| !check.passed()).collect();
    json::line(&format!(
        "{} of {} comparisons are within bounds",
        checks.len() - failed.len(),
        checks.len()
    ))?;
    let object = |check: &Check| {
        json::object! {
            isa: check.isa,
            what: check.what.clone(),
            /// How far it was off; `null` if that isn't finite.
            found: check.found,
            bound: check.bound,
            passed: check.passed(),
        }
    };
    invocation.emit(&json::object! {
        /// Whether all checks are within their bounds.
        passed: failed.is_empty(),
        checks: checks.iter().map(object).collect::<Vec<_>>(),
    })?;
    match failed.first() {
        None => Ok(()),
        Some(first) => Err(invocation.after("selftest", broken(first))),
    }
}

fn row(check: &Check) -> String {
    let Check { isa, what, found, bound } = check;
    let verdict = if check.passed() { "ok" } else { "WRONG" };
    format!("{isa:<8} {what:<42} {found:>9.1e}  (bound {bound:.0e})  {verdict}")
}

/// The error for a machine that computes wrongly.
fn broken(check: &Check) -> Error {
    let message = format!(
        "{}, {}: off by {:.1e}, the bound is {:.0e}; use another instruction set (--isa), and please report this with \
         the output of `engraft --version --verbose`",
        check.isa, check.what, check.found, check.bound
    );
    Error::new(ErrorKind::NonFinite, message)
}
