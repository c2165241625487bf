//! `engraft adapter promote`: puts an adapter into use that `adapt` refused, that `train` made or that was imported:
//! through the gate, or past it by its user's word.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use engraft_runtime::error::{Error, ErrorKind};
use engraft_runtime::gate::store::{Candidate, Generation, LAST_DIR, Store, Writer};
use engraft_runtime::storage::Disk;

use super::compare::{Screen, UNFINISHED_DIR, tell, write};
use super::{Invocation, adapt, common};
use crate::contest::{ContestOptions, Held, Verb};
use crate::json;
use crate::options::{ArmName, adapter_file, misuse};

/// The arm of the adapter that is put before the gate.
const GIVEN: &str = "adapter";

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// An adapter's file or folder, or the number of a generation that was tried
    #[arg(value_name = "ADAPTER|GENERATION")]
    adapter: String,

    /// The adapter store
    #[arg(long, value_name = "DIR")]
    store: PathBuf,

    /// Promote it without the gate, for this reason, which the store keeps
    #[arg(long, value_name = "TEXT", conflicts_with = "data")]
    because: Option<String>,

    #[command(flatten)]
    contest: ContestOptions,
}

pub(crate) fn run(options: &Options, invocation: &Invocation) -> Result<()> {
    let store = Store::create(&Disk, &options.store).map_err(|e| e.at("--store"))?;
    let file = file(&options.adapter, &store)?;
    let writer = store.writer()?;
    let (generation, refused) = match &options.because {
        Some(reason) => (Some(by_word(&file, reason, options, &writer)?), None),
        None => by_gate(&file, options, (&store, &writer), invocation)?,
    };
    if let Some(generation) = &generation {
        json::line(&format!("{}: generation {} is active now.", options.store.display(), generation.number))?;
    }
    invocation.emit(&json::object! {
        /// The generation that is active now; `null` if nothing was promoted.
        generation: generation.map(|g| g.number),
    })?;
    match refused {
        None => Ok(()),
        Some(error) => Err(invocation.after("adapter promote", error)),
    }
}

/// The adapter's file.
fn file(named: &str, store: &Store<'_>) -> Result<PathBuf, Error> {
    let Ok(number) = named.parse() else { return adapter_file(Path::new(named), "ADAPTER") };
    let generation = store.verify(number)?;
    let none =
        || misuse(format!("generation {number} holds examples, not an adapter; roll back to it instead"));
    store.adapter_file(&generation).ok_or_else(none)
}

/// Promotes an adapter that the gate didn't judge, or refused. It must belong to the model all the same.
fn by_word(file: &Path, reason: &str, options: &Options, writer: &Writer<'_>) -> Result<Generation> {
    let model = options.contest.model.open()?;
    let adapter = common::adapter(&model, &common::best_kernels(), file, false)?;
    let verdict = serde_json::json!({ "decision": "PROMOTE", "by": "its user", "because": reason });
    let base = (&model.digest(), model.config());
    let promoted =
        writer.promote(&Candidate::Adapter(&adapter), verdict.to_string().as_bytes(), base, false)?;
    eprintln!("Promoted by your word; the gate didn't judge it.");
    Ok(promoted)
}

/// Compares the adapter with the base, with examples and with what is in use, and promotes it if it wins.
fn by_gate(
    file: &Path,
    options: &Options,
    (store, writer): (&Store<'_>, &Writer<'_>),
    invocation: &Invocation,
) -> Result<(Option<Generation>, Option<Error>)> {
    let contest = &options.contest;
    let missing =
        || misuse("give --data, rows for the gate to judge by, or --because, a reason to do without");
    contest.data.path()?.ok_or_else(missing)?;
    for trained in [ArmName::Lora, ArmName::Dora, ArmName::Full] {
        contest.refuse_arm(trained, "--arms: nothing is trained here; name few-shot, or leave it out")?;
    }
    let last = store.dir().join(LAST_DIR);
    let verb = Verb {
        title: "adapter promote",
        arms: &[ArmName::FewShot],
        search: false,
        active: adapt::in_use(store, contest.model.open()?.as_ref())?,
        given: vec![(GIVEN.to_string(), file.to_path_buf())],
        folder: None,
        unfinished: &last.join(UNFINISHED_DIR),
    };
    let mut screen = Screen::new(invocation.cancel.clone(), Some(contest.when.watch()?));
    let Held { outcome, .. } = contest.hold(&verb, &mut screen)?;
    write(&last, &outcome)?;
    // Examples that win are no reason to promote them: nobody asked.
    let promoted = match outcome.verdict.promoted() {
        Some(_) => adapt::promote(writer, &outcome, contest.model.open()?.as_ref())?,
        None => None,
    };
    tell(&outcome.report)?;
    let refused = match promoted {
        Some(_) => None,
        None => Some(Error::new(ErrorKind::GateRefused, outcome.verdict.sentence.clone())),
    };
    Ok((promoted, refused))
}
