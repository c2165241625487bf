//! NaN and infinity at each place where they can arise: nothing of it is ever written, the run goes back,
//! and a run that was cut goes the same way.

use engraft_runtime::data::Batch;
use engraft_runtime::error::ErrorKind;
use engraft_runtime::model::map::Map;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::run::guard::{FAILED_MAX, ROLLBACKS_MAX};
use engraft_runtime::run::{Course, Stepped};
use engraft_runtime::storage::Disk;
use engraft_runtime::train::AnyTrainer;

use super::{Case, PLAIN, TestResult, World, result};
use crate::common::models::{FLOATS, SHORT_BLOCKS};

const EVERY: u64 = 5;

/// What is spoiled, and after which step.
type Spoil = fn(&mut AnyTrainer) -> TestResult;

/// A run with checkpoints, spoiled once after step 12, cut after step `cut`; what it gives in the end, and how
/// often it went back.
fn run(case: &Case, spoil: Spoil, cut: Option<u64>) -> TestResult<(Vec<u32>, u32)> {
    let (world, folder) = (World::new(), tempfile::tempdir()?);
    let (mut arm, mut batches) = (world.arm(case, 1), world.batches(case));
    let mut course = world.course(case, folder.path());
    let mut micro = vec![Batch::default(); case.accumulation];
    course.save(&Disk, &arm, batches.cursor(), true)?;
    let mut cut = cut;
    while arm.steps() < case.steps {
        let stepped = course.step(&Disk, &mut arm, &mut batches, &mut micro)?;
        let steps = arm.steps();
        if !matches!(stepped, Stepped::Done(_)) {
            continue;
        }
        // By its own count, so that a run that comes by again at half the rate is spared.
        if steps == 12 && course.progress.guard.rollbacks == 0 {
            spoil(&mut arm)?;
        }
        let mut saved = Ok(());
        if steps.is_multiple_of(EVERY) || cut == Some(steps) {
            let anchor = steps.is_multiple_of(EVERY);
            saved = course.save(&Disk, &arm, batches.cursor(), anchor).map(|_| ());
        }
        if cut == Some(steps) {
            cut = None;
            (arm, batches) = (world.arm(case, 2), world.batches(case));
            course = world.course(case, folder.path());
            assert!(course.resume(&Disk, &mut arm, &mut batches)?.found.is_some());
        } else if let Err(error) = saved {
            assert_eq!(error.kind(), ErrorKind::NonFinite, "{error}");
            course.roll_back(&Disk, &mut arm, &mut batches, error.message())?;
        }
    }
    course.save(&Disk, &arm, batches.cursor(), false)?;
    Ok((result(&arm, folder.path())?.0, course.progress.guard.rollbacks))
}

fn theta(arm: &mut AnyTrainer) -> TestResult {
    arm.numbers_mut()?.theta[5] = f32::NAN;
    Ok(())
}

#[test]
fn what_is_no_number_is_left_behind_wherever_the_run_is_cut() -> TestResult {
    let spoils: [(&str, Spoil); 5] = [
        ("a parameter", theta),
        ("a parameter that overflows the gradient", |arm| {
            arm.numbers_mut()?.theta.fill(1e30);
            Ok(())
        }),
        ("a first moment", |arm| {
            arm.numbers_mut()?.m[5] = f32::NAN;
            Ok(())
        }),
        ("a second moment", |arm| {
            arm.numbers_mut()?.v[5] = f32::INFINITY;
            Ok(())
        }),
        ("nothing", |_| Ok(())),
    ];
    let full = Case { name: "every weight", rank: None, dropout: 0.0, accumulation: 1, clip: 0.0, ..PLAIN };
    let mut runs = 0;
    for case in [Case { steps: 22, ..PLAIN }, Case { steps: 22, ..full }] {
        for (what, spoil) in spoils {
            let (uncut, rollbacks) = run(&case, spoil, None)?;
            assert_eq!(rollbacks, u32::from(what != "nothing"), "{}: {what}", case.name);
            for cut in [3, 10, 11, 17] {
                let (resumed, again) = run(&case, spoil, Some(cut))?;
                assert_eq!(again, rollbacks, "{}: {what}, cut after {cut}", case.name);
                assert!(resumed == uncut, "{}: {what}, cut after {cut}", case.name);
                runs += 1;
            }
        }
    }
    println!("{runs} cut runs went back as the uncut ones did, and ended bit-identical");
    Ok(())
}

#[test]
fn nothing_that_is_no_number_is_saved() -> TestResult {
    let (world, folder, case) = (World::new(), tempfile::tempdir()?, Case { steps: 4, ..PLAIN });
    for (part, value) in [(0, f32::NAN), (1, f32::INFINITY), (2, f32::NEG_INFINITY), (3, 0.0)] {
        let (mut arm, batches) = (world.arm(&case, 1), world.batches(&case));
        let numbers = arm.numbers_mut()?;
        match part {
            0 => numbers.theta[7] = value,
            1 => numbers.m[7] = value,
            2 => numbers.v[7] = value,
            _ => *numbers.broken = true,
        }
        let error = world.course(&case, folder.path()).save(&Disk, &arm, batches.cursor(), true).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NonFinite, "{error}");
        assert_eq!(std::fs::read_dir(folder.path())?.count(), 0);
    }
    Ok(())
}

#[test]
fn a_run_that_keeps_diverging_stops() -> TestResult {
    let (world, folder, case) = (World::new(), tempfile::tempdir()?, Case { steps: 9, ..PLAIN });
    let mut micro = vec![Batch::default(); case.accumulation];
    // Without a checkpoint there is nothing to go back to.
    let stop = |mut course: Course, saved: bool| -> TestResult<(u64, String)> {
        let (mut arm, mut batches) = (world.arm(&case, 1), world.batches(&case));
        let mut micro = micro.clone();
        if saved {
            course.save(&Disk, &arm, batches.cursor(), true)?;
        }
        for tried in 1.. {
            theta(&mut arm)?;
            match course.step(&Disk, &mut arm, &mut batches, &mut micro) {
                Ok(stepped) => assert!(!matches!(stepped, Stepped::Done(_)), "{stepped:?}"),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::NonFinite);
                    return Ok((tried, error.to_string()));
                }
            }
        }
        Err("it goes on for ever".into())
    };
    let (tried, message) = stop(world.course(&case, folder.path()), false)?;
    assert_eq!(tried, u64::from(FAILED_MAX));
    assert!(message.contains("no checkpoint to go back to"), "{message}");
    let (tried, message) = stop(world.course(&case, folder.path()), true)?;
    assert_eq!(tried, u64::from(FAILED_MAX * (ROLLBACKS_MAX + 1)));
    for words in ["step 0", "0.125 of the learning rate", "isn't finite", "lower the learning rate"] {
        assert!(message.contains(words), "{words}: {message}");
    }
    // What is on disk is still the good one.
    let (mut arm, mut batches) = (world.arm(&case, 1), world.batches(&case));
    let mut course = world.course(&case, folder.path());
    assert!(course.resume(&Disk, &mut arm, &mut batches)?.found.is_some());
    assert!(matches!(course.step(&Disk, &mut arm, &mut batches, &mut micro)?, Stepped::Done(_)));
    Ok(())
}

/// A model file may hold any bits as weights, or as scales of their blocks; what they give is caught at the
/// first step.
#[test]
fn weights_that_are_no_numbers_are_caught() -> TestResult {
    for model in [FLOATS.model(), SHORT_BLOCKS.model()] {
        caught(World { model, ..World::new() })?;
    }
    Ok(())
}

fn caught(good: World) -> TestResult {
    let (case, folder) = (Case { steps: 4, ..PLAIN }, tempfile::tempdir()?);
    let mut bytes = good.model.bytes().to_vec();
    let at = good.model.block(1).proj(engraft_runtime::model::Proj::Up);
    let offset = at.bytes().as_ptr() as usize - good.model.bytes().as_ptr() as usize;
    // A float, or the half that is a block's scale.
    bytes[offset..offset + 4].fill(0xff);
    let world =
        World { model: std::sync::Arc::new(ModelFile::from_map(Map::from_vec("nan", bytes))?), ..good };
    let (mut arm, mut batches) = (world.arm(&case, 1), world.batches(&case));
    let mut course = world.course(&case, folder.path());
    let mut micro = vec![Batch::default(); case.accumulation];
    let before = result(&arm, &folder.path().join("before"))?;
    for _ in 1..FAILED_MAX {
        assert!(matches!(course.step(&Disk, &mut arm, &mut batches, &mut micro)?, Stepped::Skipped(_)));
    }
    let error = course.step(&Disk, &mut arm, &mut batches, &mut micro).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NonFinite);
    assert_eq!(result(&arm, &folder.path().join("after"))?, before);
    Ok(())
}
