//! Resuming: which run a folder's checkpoints belong to, which run was finished there, and how long to train.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use engraft_runtime::error::Error;
use engraft_runtime::hex;
use engraft_runtime::run::checkpoint::{PassedOver, Restored};
use engraft_runtime::run::{Checkpoints, Identity};
use engraft_runtime::storage::{Disk, Storage, commit};

use serde::{Deserialize, Serialize};

use crate::json;
use crate::options::misuse;
use crate::units;

/// A finished run leaves this next to its result, so that resuming it does nothing.
const FINISHED_FILE: &str = "finished.json";
/// Larger files aren't ours.
const FINISHED_BYTES_MAX: u64 = 1 << 20;

/// Stopping and resuming.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Stopping and resuming")]
pub(crate) struct ResumeOptions {
    /// Continue from the newest good checkpoint in --adapter-path, or start from the beginning if there is none
    #[arg(long, conflicts_with = "overwrite_checkpoints")]
    pub(crate) resume: bool,

    /// Remove the checkpoints of an unfinished run and start over
    #[arg(long)]
    pub(crate) overwrite_checkpoints: bool,

    /// Stop with a checkpoint and exit code 130 after this time, waits included (90s, 30m, 4h)
    #[arg(long, value_name = "TIME", value_parser = units::parse_duration)]
    pub(crate) time_budget: Option<Duration>,
}

impl ResumeOptions {
    /// Opens the output folder. Forgetting a flag must never cost an unfinished run.
    ///
    /// # Errors
    /// Those of [`Checkpoints::open`]; `Misuse` if there are checkpoints and no flag says what to do with them.
    pub(crate) fn open(&self, folder: &Path) -> Result<Checkpoints, Error> {
        let checkpoints = Checkpoints::open(&Disk, folder)?;
        match checkpoints.newest_file(&Disk)? {
            Some(newest) if !self.resume && !self.overwrite_checkpoints => Err(misuse(format!(
                "{} belongs to an unfinished run; --resume continues it, --overwrite-checkpoints starts over, \
                 another --adapter-path leaves it alone",
                newest.display()
            ))),
            _ => Ok(checkpoints),
        }
    }
}

/// What was restored, for people.
pub(crate) fn describe(restored: &Restored, folder: &Path, steps: Option<u64>) -> String {
    let over = |p: &PassedOver| format!("passed over: {}\n", p.reason);
    let text: String = restored.passed_over.iter().map(over).collect();
    match &restored.found {
        Some(found) => {
            let steps = steps.unwrap_or_default();
            text + &format!("resumed: {}, step {} of {steps}", found.path.display(), found.steps)
        }
        None => {
            text + &format!("{}: no checkpoint to resume from; starting from the beginning", folder.display())
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Finished {
    /// Digest of the run's identity.
    run: String,
    /// The result, as printed with `--json`.
    result: serde_json::Value,
}

/// The result of this run, if it was finished in `folder` and its file is still there.
pub(crate) fn finished(folder: &Path, identity: &Identity) -> Option<serde_json::Value> {
    let path = folder.join(FINISHED_FILE);
    if path.metadata().ok()?.len() > FINISHED_BYTES_MAX {
        return None;
    }
    let finished: Finished = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    let file = ["adapter", "model"].iter().find_map(|key| finished.result.get(key)?.as_str());
    // Only the name counts: the path is relative to where that run started.
    let name = file.and_then(|file| Path::new(file).file_name());
    let is_there = name.is_some_and(|name| folder.join(name).is_file());
    (finished.run == hex::encode(&identity.digest()) && is_there).then_some(finished.result)
}

/// Records that this run is finished. Afterwards its checkpoints can be removed.
///
/// # Errors
/// `Io`.
pub(crate) fn note_finished(folder: &Path, identity: &Identity, result: &json::Train) -> Result<()> {
    let note = Finished { run: hex::encode(&identity.digest()), result: serde_json::to_value(result)? };
    let text = serde_json::to_vec(&note)?;
    let place = folder.join(FINISHED_FILE);
    commit(&Disk, folder, FINISHED_FILE, |out| {
        out.write_all(&text).map_err(|e| Error::io(format!("writing {}", place.display()), e))
    })?;
    Ok(())
}

/// Removes the record of a finished run whose result is about to be replaced. Returns whether there was one.
///
/// # Errors
/// `Io`.
pub(crate) fn forget_finished(folder: &Path) -> Result<bool, Error> {
    let path = folder.join(FINISHED_FILE);
    match Disk.remove(&path) {
        Ok(()) => {
            let synced = Disk.sync_dir(folder);
            synced.map(|()| true).map_err(|e| Error::io(format!("syncing {}", folder.display()), e))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::io(format!("removing {}", path.display()), e)),
    }
}
