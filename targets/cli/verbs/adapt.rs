//! `engraft adapt`: plan, check the data, train what the budget allows, judge, and promote only what is
//! better than doing nothing and than a better prompt.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use engraft_runtime::compare::{Outcome, Promotion};
use engraft_runtime::error::Error;
use engraft_runtime::gate::store::{Generation, LAST_DIR, Store, Writer};
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::storage::{Disk, check_dir_within};

use super::Invocation;
use super::compare::{Screen, UNFINISHED_DIR, tell, write};
use crate::contest::{ContestOptions, Verb};
use crate::exit::AfterJson;
use crate::json;
use crate::options::{ArmName, misuse};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) contest: ContestOptions,

    /// The adapter store: what wins becomes its active generation (created if it is missing)
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
}

pub(crate) fn run(options: &Options, invocation: &Invocation) -> Result<()> {
    let contest = &options.contest;
    contest.model.path()?;
    contest.data()?;
    let missing = || misuse("--store is missing: name the folder for what is promoted");
    let folder = options.store.as_ref().ok_or_else(missing)?;
    let whole = "--arms full: a store keeps adapters, not whole models; `compare` measures full fine-tuning, \
                 and `train --fine-tune-type full` writes it";
    contest.refuse_arm(ArmName::Full, whole)?;
    let store = Store::create(&Disk, folder).map_err(|e| e.at("--store"))?;
    // From the start: two runs into one store would train for an hour to find out.
    let writer = store.writer()?;
    let last = folder.join(LAST_DIR);
    check_dir_within(&Disk, &last)?;
    let verb = Verb {
        title: "adapt",
        arms: &[ArmName::FewShot, ArmName::Lora, ArmName::Dora],
        search: true,
        folder: None,
        unfinished: &last.join(UNFINISHED_DIR),
    };
    let mut screen = Screen::new(invocation.cancel.clone(), Some(contest.when.watch()?));
    let (outcome, _) = contest.hold(&verb, &mut screen)?;
    write(&last, &outcome)?;
    let model = contest.model.open()?;
    let promoted = promote(&writer, &outcome, &model)?;
    tell(&outcome.report)?;
    let refused = match &promoted {
        Some(generation) => {
            eprintln!("{}: generation {} is active now", folder.display(), generation.number);
            None
        }
        None => outcome.verdict.require_promotion().err(),
    };
    eprintln!("{}: report.html", last.display());
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

/// Makes what the verdict names a generation; nothing where the base stays, and with a word why not where no store can
/// hold what is best.
pub(super) fn promote(
    writer: &Writer<'_>,
    outcome: &Outcome,
    model: &ModelFile,
) -> Result<Option<Generation>, Error> {
    match outcome.promote(writer, model)? {
        Promotion::Active(generation) => Ok(Some(generation)),
        Promotion::BaseStays => Ok(None),
        Promotion::CannotHold(why) => {
            eprintln!("what is best can't be promoted: {why}");
            Ok(None)
        }
    }
}
