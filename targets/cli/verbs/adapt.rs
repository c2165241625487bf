//! `engraft adapt`: plans, checks the data, trains what the budget allows, judges it, and promotes only
//! what beats both the unchanged model and a better prompt.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use engraft_runtime::compare::{InUse, Outcome, Promotion};
use engraft_runtime::error::{Error, ErrorKind};
use engraft_runtime::gate::store::{Generation, LAST_DIR, Store, Writer};
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::storage::{Disk, check_dir_within};

use super::Invocation;
use super::compare::{REPORT_PAGE, Screen, UNFINISHED_DIR, tell, write};
use crate::again::{self, Line, Place};
use crate::contest::{ContestOptions, Held, Verb};
use crate::exit::AfterJson;
use crate::json;
use crate::options::{ArmName, misuse};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) contest: ContestOptions,

    /// Adapter store to put the winner into, as its active generation (created if missing)
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,

    /// Go on with the same command where Ctrl-C stopped it, which happens anyway; refused if nothing was stopped
    #[arg(long)]
    resume: bool,

    /// Adapters to keep in the store that were tried and not promoted: the newest N
    #[arg(long, value_name = "N", default_value_t = KEEP_TRIED)]
    keep_candidates: u32,
}

/// Adapters kept that were not promoted: the last one, for whoever wants it all the same.
const KEEP_TRIED: u32 = 1;

pub(crate) fn run(options: &Options, invocation: &Invocation) -> Result<()> {
    let contest = &options.contest;
    contest.model.path()?;
    contest.data()?;
    let missing = || misuse("--store is missing; name the folder that the winner goes into");
    let folder = options.store.as_ref().ok_or_else(missing)?;
    let whole = "--arms full: a store keeps adapters, not whole models; `compare` measures full fine-tuning, \
                 and `train --fine-tune-type full` writes it";
    contest.refuse_arm(ArmName::Full, whole)?;
    let store = Store::create(&Disk, folder).map_err(|e| e.at("--store"))?;
    // Locked before training: otherwise a second run on this store would only fail after hours.
    let writer = store.writer()?;
    let last = folder.join(LAST_DIR);
    check_dir_within(&Disk, &last)?;
    if options.resume && !last.join(UNFINISHED_DIR).is_dir() {
        let message = format!("--resume: {} holds no stopped training; leave it out", folder.display());
        return Err(misuse(message).into());
    }
    let verb = Verb {
        title: "adapt",
        arms: &[ArmName::FewShot, ArmName::Lora],
        search: true,
        given: Vec::new(),
        active: in_use(&store, contest.model.open()?.as_ref())?,
        folder: None,
        unfinished: &last.join(UNFINISHED_DIR),
    };
    let mut screen = Screen::new(invocation.cancel.clone(), Some(contest.when.watch()?));
    let Held { outcome, chat, .. } = contest.hold(&verb, &mut screen)?;
    write(&last, &outcome)?;
    let model = contest.model.open()?;
    let promoted = promote(&writer, &outcome, &model)?;
    let tried = outcome.keep_tried(&writer, &model, options.keep_candidates as usize)?;
    let files = (contest.model.path()?, contest.data()?);
    let next = again::after(&outcome.report, &Line::own(), files, (Place::Store(folder), chat));
    tell(&outcome.report)?;
    eprintln!("Report: {}", last.join(REPORT_PAGE).display());
    for (arm, number) in &tried {
        eprintln!(
            "{arm} is kept as generation {number}, not in use; to use it all the same: engraft adapter promote {number} \
             --store {} -m {} --because \"REASON\"",
            folder.display(),
            contest.model.path()?.display()
        );
    }
    let refused = match &promoted {
        Some(generation) => {
            eprintln!("{}", outcome.verdict.sentence);
            eprintln!("{}: generation {} is active now.", folder.display(), generation.number);
            eprintln!("Use it: {next}");
            None
        }
        None => refusal(&outcome, &next),
    };
    if invocation.json {
        let generation = promoted.map(|g| g.number);
        json::emit(&json::Adapt {
            generation,
            compared: json::Compare::of(&outcome, &last.display().to_string()),
        })?;
    }
    match refused {
        None => Ok(()),
        Some(error) if invocation.json => Err(anyhow::Error::from(error).context(AfterJson("adapt"))),
        Some(error) => Err(error.into()),
    }
}

/// The store's active generation, which a new one must beat.
pub(super) fn in_use(store: &Store<'_>, model: &ModelFile) -> Result<Option<(String, InUse)>, Error> {
    InUse::of_store(store, model, &mut |why| eprintln!("warning: {why}"))
}

/// The error when nothing was promoted: what happened and why, then what to try; `None` for a promotion.
fn refusal(outcome: &Outcome, next: &str) -> Option<Error> {
    outcome.verdict.require_promotion().err().map(|refused| {
        let message = format!("{}\nNext: {}\nType: {next}", refused.message(), outcome.report.next_step());
        Error::new(ErrorKind::GateRefused, message)
    })
}

/// Makes the chosen arm the store's active generation. Returns `None` if the base stays, and, with a message, if a
/// store can't hold the winner.
pub(super) fn promote(
    writer: &Writer<'_>,
    outcome: &Outcome,
    model: &ModelFile,
) -> Result<Option<Generation>, Error> {
    match outcome.promote(writer, model)? {
        Promotion::Active(generation) => Ok(Some(generation)),
        Promotion::NothingChanges => Ok(None),
        Promotion::CannotHold(why) => {
            eprintln!("the best arm can't be promoted: {why}");
            Ok(None)
        }
    }
}
