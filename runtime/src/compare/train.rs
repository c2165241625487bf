//! Trains one arm: a range test if no rate is given, the run, and the report's facts about it.

use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::material::Material;
use super::recipe::Recipe;
use super::strength::MARGIN;
use super::{Contest, rate};
use crate::error::{Error, ErrorKind, Result};
use crate::gate::report::{ArmRun, CurvePoint, RateTest};
use crate::hex;
use crate::model::usage::Usage;
use crate::run::checkpoint::Look;
use crate::run::{Base, Checkpoints, Identity, Observer, Run, RunRows, Settings, Start, Trained};
use crate::storage::{Disk, Storage, commit, create_dir_all, create_dir_within};

/// File with an unfinished arm's range test, beside its checkpoints.
const RATE_TEST_FILE: &str = "range-test.json";
/// What the folder of a turn's unfinished arms begins with.
pub(super) const TURN: &str = "turn-";
/// A longer file can't be ours.
const RATE_TEST_BYTES_MAX: u64 = 1 << 20;

/// Trains an arm by its recipe, to its end or until that time. With a folder for unfinished arms it resumes where the
/// same arm stopped, and leaves its state there until [`clear`].
///
/// # Errors
/// `DoesNotFit` beyond the limit; `Cancelled`; those of the trainers, except that a diverging run just ends.
pub fn train(
    recipe: &Recipe,
    base: &Base,
    material: &Material,
    contest: &Contest,
    (ends, observer): (Option<Instant>, &mut dyn Observer),
) -> Result<(Trained, ArmRun, Option<RateTest>)> {
    let Contest { limit, unfinished, .. } = contest;
    let planned = recipe.check(base, material, contest.shared(), limit)?;
    observer.begin_peak();
    let own = recipe.rows(material);
    let rows = RunRows { train: &own, valid: &material.valid.data.examples, ..contest.shared() };
    let folder = unfinished.as_ref().map(|folder| folder.join(&recipe.name));
    let tested = match recipe.settings.rate {
        Some(_) => None,
        None => {
            let of = Run::identity_of(base, &recipe.settings, &planned.request, rows);
            let test = || rate::test(recipe, base, rows, &planned.request, observer);
            Some(remembered(folder.as_deref(), &of, test)?)
        }
    };
    let rate = recipe.settings.rate.or(tested.as_ref().map(|test| test.chosen));
    let forgets_most = MARGIN * contest.thresholds.retention_nll_max;
    let by_answers = contest.metric.is_some();
    let usage = Usage { prompting: material.train.data.prompting.clone(), greedy: by_answers };
    let settings = Settings { rate, by_answers, forgets_most, usage, ..recipe.settings.clone() };
    let of = Run::identity_of(base, &settings, &planned.request, rows);
    let start = start(folder.as_deref(), &of)?;
    let begun = Run::begin(&recipe.name, base, settings, &planned.request, rows, start, observer);
    let (mut run, restored) = begun?;
    if let Some(ends) = ends {
        run.end_by(ends);
    }
    if let Some(found) = restored.found {
        observer.note(&format!("{}: continues after step {}", recipe.name, found.steps));
    }
    run.open(rows, observer)?;
    run.go(rows, None, observer)?;
    if folder.is_some() && run.last().is_some() {
        match run.checkpoint(false, observer) {
            // It diverged and the best look counts, so there is nothing to continue from.
            Err(error) if error.kind() == ErrorKind::NonFinite => {}
            done => done?,
        }
    }
    let progress = run.progress();
    let point = |look: &Look| CurvePoint { step: look.step, train: look.train, valid: look.valid };
    let told = ArmRun {
        arm: recipe.name.clone(),
        what: recipe.settings.method.describe(),
        parameters: recipe.settings.method.parameters(base.model.config()) as u64,
        learning_rate: rate.unwrap_or_default(),
        curve: progress.looks.iter().map(point).collect(),
        steps: run.steps(),
        best_step: progress.best.map_or(run.steps(), |best| best.step),
        ended: run.ended().unwrap_or_default().to_string(),
        tokens: progress.tally.tokens,
        seconds: progress.tally.seconds,
        planned_bytes: planned.plan.private_bytes as u64,
        peak_bytes: observer.peak_bytes(),
    };
    Ok((run.finish(), told, tested))
}

/// Resumes from the newest checkpoint of exactly this arm, if there is one; other arms' checkpoints are
/// ignored.
fn start(folder: Option<&Path>, of: &Identity) -> Result<Start> {
    let Some(folder) = folder else { return Ok(Start::Fresh(None)) };
    create_folder(folder)?;
    let checkpoints = Checkpoints::open(&Disk, folder)?;
    match checkpoints.are_of(&Disk, of)? {
        true => Ok(Start::Resume(checkpoints)),
        false => Ok(Start::Fresh(Some(checkpoints))),
    }
}

/// An arm's subfolder.
fn create_folder(folder: &Path) -> Result<()> {
    folder.parent().map_or(Ok(()), |all| create_dir_all(&Disk, all))?;
    create_dir_within(&Disk, folder)
}

#[derive(Serialize, Deserialize)]
struct Remembered {
    /// Digest of the run's identity.
    run: String,
    test: RateTest,
}

/// The stored range test of exactly this arm, if there is one; else runs the test and stores it.
fn remembered(
    folder: Option<&Path>,
    of: &Identity,
    test: impl FnOnce() -> Result<RateTest>,
) -> Result<RateTest> {
    let Some(folder) = folder else { return test() };
    let (path, run) = (folder.join(RATE_TEST_FILE), hex::encode(&of.digest()));
    let is_ours = path.metadata().is_ok_and(|m| m.is_file() && m.len() <= RATE_TEST_BYTES_MAX);
    let found = is_ours.then(|| std::fs::read(&path).ok()).flatten();
    let found: Option<Remembered> = found.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    if let Some(found) = found.filter(|found| found.run == run && found.test.chosen.is_finite()) {
        return Ok(found.test);
    }
    let test = test()?;
    create_folder(folder)?;
    let text = serde_json::to_vec(&Remembered { run, test: test.clone() })
        .map_err(|e| Error::new(ErrorKind::NonFinite, format!("{}: {e}", path.display())))?;
    commit(&Disk, folder, RATE_TEST_FILE, |out| {
        out.write_all(&text).map_err(|e| Error::io(format!("writing {}", path.display()), e))
    })?;
    Ok(test)
}

/// Removes what unfinished arms of this and earlier comparisons left, once this one is finished. Anyone else's
/// files stay.
///
/// # Errors
/// `Io`.
pub(super) fn clear(contest: &Contest) -> Result<()> {
    let Some(unfinished) = contest.unfinished.as_ref().filter(|folder| folder.is_dir()) else {
        return Ok(());
    };
    clear_folder(unfinished)
}

fn clear_folder(unfinished: &Path) -> Result<()> {
    for name in
        Disk.list(unfinished).map_err(|e| Error::io(format!("listing {}", unfinished.display()), e))?
    {
        let folder = unfinished.join(&name);
        if !folder.is_dir() || folder.is_symlink() {
            continue;
        }
        if name.starts_with(TURN) {
            clear_folder(&folder)?;
            continue;
        }
        Checkpoints::open(&Disk, &folder)?.remove_all(&Disk)?;
        let path = folder.join(RATE_TEST_FILE);
        if path.exists() {
            Disk.remove(&path).map_err(|e| Error::io(format!("removing {}", path.display()), e))?;
        }
        drop(std::fs::remove_dir(&folder));
    }
    drop(std::fs::remove_dir(unfinished));
    Ok(())
}
