//! Checkpoints: everything a run needs to continue as if it had never stopped, in one file.
//!
//! Each is a numbered generation; the highest number is the newest. Two are kept: the newest, and an older
//! anchor that a diverging run returns to. Anchors come at fixed steps, so where a run returns to doesn't
//! depend on where it was interrupted. A generation is deleted only after its successor was committed and read
//! back.
//!
//! Saving waits for the disk. Writing in the background would need a second copy of parameters and moments:
//! more memory than the plan allows, to save less than one step's time per hundred steps.

mod file;
mod identity;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::guard::Guard;
use crate::data::MixedCursor;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Storage, commit, create_dir_all, frame_error};
use crate::train::{Numbers, NumbersMut};

pub use identity::Identity;
pub(crate) use identity::{rows_digest, stated_digest};

/// Where a run stands, apart from its numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The next rows.
    pub cursor: MixedCursor,
    /// How failed steps were handled.
    pub guard: Guard,
    /// What was counted.
    pub tally: Tally,
    /// Optimizer steps of the whole run, once that is known.
    pub total: Option<u64>,
    /// Looks that count, of the whole run, where time is short; else as many as the settings say.
    pub times: Option<u64>,
    /// All looks at the validation rows so far, in order.
    pub looks: Vec<Look>,
    /// The best of them, if the best one counts.
    pub best: Option<Best>,
}

/// One evaluation of the validation rows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Look {
    /// Steps done.
    pub step: u64,
    /// Mean training loss since the previous look, nats per token; `None` before the first step.
    pub train: Option<f64>,
    /// Mean loss of the validation rows, nats per token; `None` if it isn't finite.
    pub valid: Option<f64>,
}

/// The look whose parameters count.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Steps done at that point.
    pub step: u64,
    /// Loss of the validation rows at that point.
    pub loss: f64,
    /// Their answers that the model was sure of.
    pub sure: u64,
    /// Nats per token forgotten of ordinary text, on the set that lost most.
    pub forgot: f64,
    /// Looks since then.
    pub waited: u64,
}

/// What a run has counted, for its reports and its adapter's file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tally {
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Tokens that the loss was taken on.
    pub targets: u64,
    /// Seconds of work.
    pub seconds: f64,
    /// Loss since the last report.
    pub recent: Mean,
    /// Divergence from the base since then.
    pub recent_kl: Mean,
    /// Loss since the last look.
    pub unlooked: Mean,
    /// Loss of the last report.
    pub reported_loss: Option<f64>,
    /// Its divergence from the base.
    pub reported_kl: Option<f64>,
    /// Held-out loss before the first step.
    pub valid_before: Option<f64>,
    /// Losses then of the sets of ordinary text that are set aside.
    pub aside_before: Vec<f64>,
}

/// A mean over targets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    /// Sum of all values.
    pub sum: f64,
    /// How many there are.
    pub count: u64,
}

impl Mean {
    /// Adds the mean of `count` further values.
    pub fn add(&mut self, mean: f64, count: usize) {
        self.sum += mean * count as f64;
        self.count += count as u64;
    }

    /// The mean; NaN if empty.
    pub fn value(&self) -> f64 {
        self.sum / self.count as f64
    }
}

/// A checkpoint that is on disk and was read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The file.
    pub path: PathBuf,
    /// Its generation.
    pub generation: u64,
    /// Its length.
    pub bytes: u64,
}

/// What a folder could restore.
#[derive(Clone, Debug, Default)]
pub struct Restored {
    /// The checkpoint taken; the numbers are filled from it.
    pub found: Option<Found>,
    /// Checkpoints that couldn't be used.
    pub passed_over: Vec<PassedOver>,
}

impl Restored {
    /// Why some were passed over, in one line.
    pub fn reasons(&self) -> String {
        self.passed_over.iter().map(|p| p.reason.as_str()).collect::<Vec<_>>().join("; ")
    }
}

/// A checkpoint that was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The file.
    pub path: PathBuf,
    /// Its generation.
    pub generation: u64,
    /// Steps done when it was saved.
    pub steps: u64,
    /// Where the run stood.
    pub progress: Progress,
}

/// A checkpoint that couldn't be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassedOver {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

const PREFIX: &str = "checkpoint-";
const SUFFIX: &str = ".engraft";

/// Bytes of a checkpoint's numbers: so many parameters, two moments for the trained ones, and the best look's
/// parameters if it keeps those.
pub fn payload_bytes(parameters: usize, trained: usize, keeps_best: bool) -> u64 {
    let best = if keeps_best { parameters } else { 0 };
    size_of::<f32>() as u64 * [parameters, trained, trained, best].map(|n| n as u64).iter().sum::<u64>()
}

/// The checkpoints in an output folder.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    /// Whether the folder exists durably.
    is_made: bool,
    /// Number of the next one.
    next: u64,
    /// What this run saved or started from, newest first; the next save removes everything else.
    kept: Vec<Held>,
    /// Generations the device failed to read; kept, since a later attempt may succeed.
    unread: Vec<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    generation: u64,
    anchor: bool,
}

impl Checkpoints {
    /// Opens a folder, which may be missing.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn open(storage: &dyn Storage, dir: &Path) -> Result<Checkpoints> {
        let newest = generations(storage, dir)?.first().copied();
        let next = match newest.map(|g| g.checked_add(1)) {
            None => 1,
            Some(Some(next)) => next,
            Some(None) => {
                let message = format!("{}: remove {}", dir.display(), file_name(u64::MAX));
                return Err(Error::new(ErrorKind::Misuse, message));
            }
        };
        Ok(Checkpoints { dir: dir.to_path_buf(), is_made: false, next, kept: Vec::new(), unread: Vec::new() })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The newest file there, intact or not.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn newest_file(&self, storage: &dyn Storage) -> Result<Option<PathBuf>> {
        Ok(generations(storage, &self.dir)?.first().map(|g| self.dir.join(file_name(*g))))
    }

    /// Whether the newest intact checkpoint belongs to this run and can be resumed.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn are_of(&self, storage: &dyn Storage, identity: &Identity) -> Result<bool> {
        for generation in generations(storage, &self.dir)? {
            let path = self.dir.join(file_name(generation));
            match file::checked(storage, &path, generation, identity) {
                Ok(_) => return Ok(true),
                Err(error) if error.kind() == ErrorKind::Io => return Err(error),
                Err(error) if error.kind() == ErrorKind::Corrupt => {}
                Err(_) => return Ok(false),
            }
        }
        Ok(false)
    }

    /// Commits the next generation: on `Ok` it is on disk and was read back. Older generations are then
    /// removed, except one.
    ///
    /// # Errors
    /// [`ErrorKind::NonFinite`] when a number is NaN or infinite, or a step failed midway;
    /// [`ErrorKind::Io`], [`ErrorKind::Full`]. Older generations then stay intact.
    pub fn save(
        &mut self,
        storage: &dyn Storage,
        identity: &Identity,
        numbers: &Numbers<'_>,
        progress: &Progress,
        anchor: bool,
    ) -> Result<Saved> {
        numbers.check().map_err(|e| e.at("the checkpoint is not saved"))?;
        if !self.is_made {
            create_dir_all(storage, &self.dir)?;
            self.is_made = true;
        }
        // A number is never reused, even if what follows fails. Another run may have used some since the folder
        // was listed: a restore lists it before it holds the writer's lock.
        let newest = generations(storage, &self.dir)?.first().copied().unwrap_or(0);
        let generation = self.next.max(newest.saturating_add(1));
        let too_many = || Error::new(ErrorKind::Misuse, "generation numbers are exhausted");
        self.next = generation.checked_add(1).ok_or_else(too_many)?;
        let name = file_name(generation);
        let path = self.dir.join(&name);
        let done = commit(storage, &self.dir, &name, |out| {
            file::write(out, generation, identity, numbers, progress, anchor)
                .map_err(|e| frame_error(&path, e))
        })?;
        let behind = self.kept.iter().find(|kept| anchor || kept.anchor).or(self.kept.first()).copied();
        self.kept = [Held { generation, anchor }].into_iter().chain(behind).collect();
        self.prune(storage);
        Ok(Saved { path, generation, bytes: done.bytes })
    }

    /// Removes all checkpoints: the run is finished or starts over.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn remove_all(&mut self, storage: &dyn Storage) -> Result<()> {
        self.kept.clear();
        self.unread.clear();
        // Oldest first, so an interruption leaves the newest.
        let mut all = generations(storage, &self.dir)?;
        all.reverse();
        for generation in &all {
            let path = self.dir.join(file_name(*generation));
            storage.remove(&path).map_err(|e| Error::io(format!("removing {}", path.display()), e))?;
        }
        if !storage.is_dir(&self.dir) {
            return Ok(());
        }
        // Even if nothing is left to remove: an earlier attempt may have stopped between the two.
        storage.sync_dir(&self.dir).map_err(|e| Error::io(format!("syncing {}", self.dir.display()), e))
    }

    /// Fills `into` from the newest intact checkpoint, or from the newest anchor for a run that diverged; touches
    /// nothing if there is none.
    ///
    /// # Errors
    /// [`ErrorKind::BaseMismatch`] and [`ErrorKind::Misuse`], naming what differs, for an intact checkpoint
    /// with another model, settings or rows; [`ErrorKind::Unsupported`] for one from a newer version;
    /// [`ErrorKind::Io`] if none was intact and the device failed to read one; [`ErrorKind::Corrupt`] if a file
    /// changed while it was read and no other was left.
    pub fn restore(
        &mut self,
        storage: &dyn Storage,
        identity: &Identity,
        into: &mut NumbersMut<'_>,
        anchors_only: bool,
    ) -> Result<Restored> {
        let mut restored = Restored::default();
        let (mut kept, mut unread) = (Vec::new(), Vec::new());
        for generation in generations(storage, &self.dir)? {
            // A run returns to what it saved or started from, never to what was in the folder before.
            if anchors_only && self.kept.iter().all(|kept| kept.generation != generation) {
                continue;
            }
            let path = self.dir.join(file_name(generation));
            let opened = file::open(storage, &path, generation, identity, (into.theta.len(), into.m.len()));
            let read = opened.and_then(|mut checkpoint| {
                let file::Header { anchor, steps, .. } = checkpoint.header;
                let wanted = restored.found.is_none() && (anchor || !anchors_only);
                let progress = if wanted { Some(checkpoint.load(into, anchors_only)?) } else { None };
                Ok((anchor, progress.map(|progress| (steps, progress))))
            });
            match read {
                Ok((anchor, found)) => {
                    if let Some((steps, progress)) = found {
                        restored.found = Some(Found { path, generation, steps, progress });
                    }
                    // Anything newer than the anchor returned to belongs to abandoned steps.
                    if restored.found.is_some() {
                        kept.push(Held { generation, anchor });
                    }
                    // Nothing older than an anchor can be needed.
                    if anchor {
                        break;
                    }
                }
                Err(error)
                    if restored.found.is_some()
                        || [ErrorKind::Corrupt, ErrorKind::Io].contains(&error.kind()) =>
                {
                    if error.kind() == ErrorKind::Io {
                        unread.push(generation);
                    }
                    let reason = error.message().to_owned();
                    restored.passed_over.push(PassedOver { path, reason });
                }
                Err(error) => return Err(error),
            }
        }
        // A checkpoint that merely can't be read now must not count as absent: it would be overwritten.
        if restored.found.is_none() && (*into.broken || !unread.is_empty()) {
            let kind = if unread.is_empty() { ErrorKind::Corrupt } else { ErrorKind::Io };
            let reasons = restored.reasons();
            let message = format!("{}: no checkpoint is intact: {reasons}", self.dir.display());
            return Err(Error::new(kind, message));
        }
        self.kept = kept;
        if anchors_only {
            self.unread.append(&mut unread);
        } else {
            self.unread = unread;
        }
        Ok(restored)
    }

    /// Removes what isn't kept. Whatever can't be removed now goes with a later save.
    fn prune(&self, storage: &dyn Storage) {
        let stays = |g: &u64| self.unread.contains(g) || self.kept.iter().any(|kept| kept.generation == *g);
        let others = generations(storage, &self.dir).unwrap_or_default();
        for generation in others.into_iter().filter(|g| !stays(g)) {
            let path = self.dir.join(file_name(generation));
            if let Err(error) = storage.remove(&path) {
                log::warn!("removing {}: {error}", path.display());
            }
        }
    }
}

fn file_name(generation: u64) -> String {
    format!("{PREFIX}{generation:08}{SUFFIX}")
}

/// The numbers of all checkpoints in a folder, newest first; empty if the folder is missing.
fn generations(storage: &dyn Storage, dir: &Path) -> Result<Vec<u64>> {
    if !storage.is_dir(dir) {
        return Ok(Vec::new());
    }
    let names = storage.list(dir).map_err(|e| Error::io(format!("listing {}", dir.display()), e))?;
    let number = |name: &String| {
        let generation = name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.parse().ok()?;
        (file_name(generation) == *name).then_some(generation)
    };
    let mut found: Vec<u64> = names.iter().filter_map(number).collect();
    found.sort_unstable_by(|a, b| b.cmp(a));
    Ok(found)
}
