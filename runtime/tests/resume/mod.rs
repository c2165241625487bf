//! Checkpoints: a run that is cut anywhere ends as one that is not, damage is never accepted, nothing that
//! is no number is ever written, and what diverges goes back.

mod damage;
mod divergence;

use std::path::Path;
use std::sync::Arc;

use crate::common::TestResult;
use crate::common::models::FLOATS;
use engraft_kernels::Kernels;
use engraft_runtime::adapter::{ADAPTER_FILE, Adapter, LoraConfig, StoredAs as Stored};
use engraft_runtime::data::{Batch, Example, Mixed, MixedCursor};
use engraft_runtime::model::Proj;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::Precision;
use engraft_runtime::plan::{ArenaWords, FullUpdate, Request};
use engraft_runtime::rng::Rng;
use engraft_runtime::run::{Checkpoints, Course, Identity, Stepped};
use engraft_runtime::storage::Disk;
use engraft_runtime::train::optim::AdamWConfig;
use engraft_runtime::train::schedule::Shape;
use engraft_runtime::train::{
    AnyTrainer, Direction, FullTrainer, KlPenalty, Schedule, TrainOptions, Trainer,
};

/// What is trained, and how.
#[derive(Clone)]
struct Case {
    name: &'static str,
    /// An adapter of this rank; every weight without one.
    rank: Option<usize>,
    dora: bool,
    dropout: f32,
    accumulation: usize,
    replay: f64,
    kl: bool,
    clip: f32,
    steps: u64,
}

const PLAIN: Case = Case {
    name: "LoRA with dropout, replay and accumulation",
    rank: Some(7),
    dora: false,
    dropout: 0.1,
    accumulation: 2,
    replay: 0.3,
    kl: false,
    clip: 1.0,
    steps: 50,
};

fn cases() -> Vec<Case> {
    let plain = Case { dropout: 0.0, accumulation: 1, replay: 0.0, steps: 8, ..PLAIN };
    let full = Case { rank: None, steps: 5, ..plain.clone() };
    vec![
        Case { name: "DoRA", dora: true, dropout: 0.2, ..plain.clone() },
        Case { name: "LoRA near its base", kl: true, replay: 0.5, ..plain },
        Case { name: "every weight, at the end of a step", accumulation: 2, ..full.clone() },
        Case { name: "every weight, block by block", clip: 0.0, ..full },
    ]
}

/// Rows of random ids.
fn rows(seed: u64, count: usize) -> Vec<Example> {
    let mut rng = Rng::new(seed, 9);
    let row = |_| {
        let n = 3 + rng.below(10) as usize;
        let ids = (0..n).map(|_| rng.below(FLOATS.vocab as u64) as u32).collect();
        Example { ids, mask: (0..n).map(|i| i > 0).collect() }
    };
    (0..count).map(row).collect()
}

/// Everything a run is made of.
struct World {
    model: Arc<ModelFile>,
    data: Vec<Example>,
    replay: Vec<Example>,
}

impl World {
    fn new() -> World {
        World { model: FLOATS.model(), data: rows(1, 23), replay: rows(2, 7) }
    }

    fn lora(&self, case: &Case) -> Option<LoraConfig> {
        let rank = case.rank?;
        let c = self.model.config();
        let layers: Vec<usize> = (0..c.n_layers).collect();
        let plain = LoraConfig::new(c, rank, 16.0, case.dropout, &[Proj::Q, Proj::V], &layers);
        Some(LoraConfig { dora: case.dora, ..plain.expect("a valid setting") })
    }

    fn options(&self, case: &Case) -> TrainOptions {
        let precision = Precision::Int8;
        TrainOptions {
            adamw: AdamWConfig { weight_decay: 0.1, max_grad_norm: case.clip, ..AdamWConfig::default() },
            schedule: Schedule { shape: Shape::Cosine, peak: 4e-3, warmup: 3, total: case.steps },
            seed: 3,
            precision,
            gradient: precision.into(),
            kl: case.kl.then_some(KlPenalty { weight: 0.5, direction: Direction::Forward }),
            freeze_a: false,
        }
    }

    /// A trainer at its beginning.
    fn arm(&self, case: &Case, threads: usize) -> AnyTrainer {
        let (c, kernels) = (self.model.config(), Arc::new(Kernels::detect(threads)));
        let options = self.options(case);
        let Some(lora) = self.lora(case) else {
            let update = if case.clip > 0.0 { FullUpdate::AtEnd } else { FullUpdate::AtOnce };
            let request = Request {
                batch: 2,
                seq: 12,
                full: Some(update),
                kept_blocks: c.n_layers,
                threads,
                ..Request::default()
            };
            let words = ArenaWords::new(c, &request);
            return AnyTrainer::Full(Box::new(FullTrainer::new(self.model.clone(), kernels, words, options)));
        };
        let mut rng = Rng::new(3, 1);
        let adapter = Adapter::init_on(&self.model, &kernels, &lora, &mut || rng.f32()).expect("an adapter");
        let request = Request { beside_base: case.kl, ..crate::common::request(c, &adapter, 2, 12, threads) };
        let words = ArenaWords::new(c, &request);
        AnyTrainer::Adapter(Box::new(Trainer::new(self.model.clone(), kernels, words, adapter, options)))
    }

    fn batches(&self, case: &Case) -> Mixed<'_> {
        Mixed::new(&self.data, &self.replay, case.replay, 2, 3, MixedCursor::default())
    }

    fn identity(&self, case: &Case) -> Identity {
        let lora = self.lora(case);
        Identity::new(self.model.digest(), lora.as_ref(), &self.options(case))
            .with("batch", 2)
            .with_rows("training rows", &self.data)
            .with_rows("replayed rows", &self.replay)
    }

    fn course(&self, case: &Case, dir: &Path) -> Course {
        Course::new(self.identity(case)).kept_in(Checkpoints::open(&Disk, dir).expect("a folder"))
    }
}

/// Steps until so many are done.
fn go(
    course: &mut Course,
    arm: &mut AnyTrainer,
    batches: &mut Mixed<'_>,
    case: &Case,
    until: u64,
) -> TestResult {
    let mut micro = vec![Batch::default(); case.accumulation];
    while arm.steps() < until {
        let stepped = course.step(&Disk, arm, batches, &mut micro)?;
        assert!(matches!(stepped, Stepped::Done(_)), "{}: {stepped:?}", case.name);
    }
    Ok(())
}

/// Everything that training changed, bit by bit, and the adapter's file.
fn result(arm: &AnyTrainer, dir: &Path) -> TestResult<(Vec<u32>, Vec<u8>)> {
    let numbers = arm.numbers();
    let parts = [numbers.theta, numbers.m, numbers.v];
    let bits = parts.iter().flat_map(|part| part.iter().map(|v| v.to_bits())).collect();
    let AnyTrainer::Adapter(trainer) = arm else { return Ok((bits, Vec::new())) };
    trainer.adapter().save(&Disk, dir, Stored::F32)?;
    Ok((bits, std::fs::read(dir.join(ADAPTER_FILE))?))
}

/// Cuts a run after each of its steps; gives how many of the resumed ones end as the uncut one.
fn cut_everywhere(case: &Case) -> TestResult<u64> {
    let world = World::new();
    let folder = tempfile::tempdir()?;
    let dir = |k: u64| folder.path().join(format!("{k}"));
    let (mut arm, mut batches) = (world.arm(case, 1), world.batches(case));
    for k in 0..case.steps {
        let mut course = world.course(case, &dir(k));
        go(&mut course, &mut arm, &mut batches, case, k)?;
        course.save(&Disk, &arm, batches.cursor(), true)?;
    }
    go(&mut world.course(case, &dir(0)), &mut arm, &mut batches, case, case.steps)?;
    let uncut = result(&arm, folder.path())?;
    let mut equal = 0;
    for k in 0..case.steps {
        let (mut arm, mut batches) = (world.arm(case, 1 + k as usize % 3), world.batches(case));
        let mut course = world.course(case, &dir(k));
        let restored = course.resume(&Disk, &mut arm, &mut batches)?;
        let found = restored.found.ok_or("no checkpoint")?;
        assert_eq!((found.steps, arm.steps(), restored.passed_over.len()), (k, k, 0));
        go(&mut course, &mut arm, &mut batches, case, case.steps)?;
        equal += u64::from(result(&arm, folder.path())? == uncut);
    }
    Ok(equal)
}

#[test]
fn a_run_cut_at_any_of_its_steps_ends_as_if_it_were_not() -> TestResult {
    let equal = cut_everywhere(&PLAIN)?;
    println!("{}: {equal} of {} resumed runs are bit-identical", PLAIN.name, PLAIN.steps);
    assert_eq!(equal, PLAIN.steps);
    for case in cases() {
        let equal = cut_everywhere(&case)?;
        println!("{}: {equal} of {} resumed runs are bit-identical", case.name, case.steps);
        assert_eq!(equal, case.steps, "{}", case.name);
    }
    Ok(())
}

/// The negative control: what resumes without one part of the state must not end alike.
#[test]
fn every_part_of_a_checkpoint_matters() -> TestResult {
    let (world, folder, case) = (World::new(), tempfile::tempdir()?, Case { steps: 12, ..PLAIN });
    let (mut arm, mut batches) = (world.arm(&case, 1), world.batches(&case));
    let mut course = world.course(&case, folder.path());
    go(&mut course, &mut arm, &mut batches, &case, 5)?;
    course.save(&Disk, &arm, batches.cursor(), true)?;
    go(&mut course, &mut arm, &mut batches, &case, 12)?;
    let uncut = result(&arm, folder.path())?.0;
    let mut caught = 0;
    for part in ["nothing", "theta", "m", "v", "updates", "steps", "cursor", "factor"] {
        let (mut arm, mut batches) = (world.arm(&case, 1), world.batches(&case));
        let mut course = world.course(&case, folder.path());
        course.resume(&Disk, &mut arm, &mut batches)?;
        let numbers = arm.numbers_mut()?;
        match part {
            "theta" => numbers.theta[0] += 1e-6,
            "m" => numbers.m.fill(0.0),
            "v" => numbers.v.fill(0.0),
            "updates" => *numbers.updates = 0,
            "steps" => *numbers.steps = 4,
            "cursor" => batches.seek(MixedCursor::default()),
            "factor" => arm.set_rate_factor(0.5),
            _ => {}
        }
        go(&mut course, &mut arm, &mut batches, &case, 12)?;
        let differs = result(&arm, folder.path())?.0 != uncut;
        assert_eq!(differs, part != "nothing", "without {part}");
        caught += usize::from(differs);
    }
    println!("{caught} of 7 broken resumes are caught");
    Ok(())
}

#[test]
fn a_checkpoint_is_of_one_run_only() -> TestResult {
    let (world, folder, case) = (World::new(), tempfile::tempdir()?, Case { steps: 4, ..PLAIN });
    let (arm, batches) = (world.arm(&case, 1), world.batches(&case));
    world.course(&case, folder.path()).save(&Disk, &arm, batches.cursor(), true)?;
    let lora = world.lora(&case);
    let options = world.options(&case);
    let longer = TrainOptions { schedule: Schedule { total: 9, ..options.schedule }, ..options.clone() };
    let base = world.model.digest();
    let others = [
        (Identity::new([7; 32], lora.as_ref(), &options), "another model"),
        (Identity::new(base, lora.as_ref(), &longer), "steps was 4, now 9"),
        (world.identity(&Case { rank: Some(2), ..case.clone() }), "rank was 7, now 2"),
        (world.identity(&Case { dora: true, ..case.clone() }), "trained was LoRA, now DoRA"),
        (Identity::new(base, None, &options).with("batch", 2), "every weight"),
        (Identity::new(base, lora.as_ref(), &options).with("batch", 4), "batch was 2, now 4"),
        (
            Identity::new(base, lora.as_ref(), &options).with_rows("training rows", &rows(5, 3)),
            "training rows",
        ),
    ];
    let mut refused = 0;
    for (identity, words) in others {
        let (mut arm, mut batches) = (world.arm(&case, 1), world.batches(&case));
        let before = result(&arm, folder.path())?;
        let mut course = Course::new(identity).kept_in(Checkpoints::open(&Disk, folder.path())?);
        let error = course.resume(&Disk, &mut arm, &mut batches).expect_err(words);
        assert!(error.message().contains(words), "{words}: {error}");
        assert!(error.message().contains("checkpoint-00000001.engraft"), "{error}");
        assert_eq!(result(&arm, folder.path())?, before, "{words}: nothing is touched");
        refused += 1;
    }
    println!("{refused} of 7 other runs are refused");
    let mut swapped = world.data.clone();
    swapped.swap(0, 1);
    let of = |data: &[Example]| world.identity(&case).with_rows("x", data).digest();
    assert_ne!(of(&world.data), of(&swapped), "order counts");
    Ok(())
}

#[test]
fn two_stay_and_one_of_them_is_an_anchor() -> TestResult {
    let (world, folder, case) = (World::new(), tempfile::tempdir()?, Case { steps: 4, ..PLAIN });
    let (arm, batches) = (world.arm(&case, 1), world.batches(&case));
    let mut course = world.course(&case, folder.path());
    let listed = || -> TestResult<Vec<String>> {
        let names = std::fs::read_dir(folder.path())?.map(|e| Ok(e?.file_name().into_string()));
        let mut names: Vec<String> =
            names.collect::<Result<Result<_, _>, std::io::Error>>()?.map_err(|name| format!("{name:?}"))?;
        names.sort();
        Ok(names.iter().map(|n| n.trim_matches(|c: char| !c.is_ascii_digit()).to_string()).collect())
    };
    let mut save = |anchor| course.save(&Disk, &arm, batches.cursor(), anchor).map(|saved| saved.generation);
    let expected: [(bool, &[&str]); 6] = [
        (true, &["00000001"]),
        (true, &["00000001", "00000002"]),
        (false, &["00000002", "00000003"]),
        (false, &["00000002", "00000004"]),
        (true, &["00000004", "00000005"]),
        (true, &["00000005", "00000006"]),
    ];
    for (i, (anchor, left)) in expected.into_iter().enumerate() {
        assert_eq!(save(anchor)?, 1 + i as u64);
        assert_eq!(listed()?, left);
    }
    // Another process counts on, and keeps what it began with.
    let mut again = world.course(&case, folder.path());
    let (mut arm, mut batches) = (world.arm(&case, 1), world.batches(&case));
    let restored = again.resume(&Disk, &mut arm, &mut batches)?;
    assert_eq!(restored.found.map(|f| f.generation), Some(6));
    assert_eq!(again.save(&Disk, &arm, batches.cursor(), false)?.generation, 7);
    assert_eq!(listed()?, ["00000006", "00000007"]);
    again.remove_checkpoints(&Disk)?;
    assert!(listed()?.is_empty());
    let none = world.course(&case, folder.path()).resume(&Disk, &mut arm, &mut batches)?;
    assert!(none.found.is_none() && none.passed_over.is_empty());

    // Behind a run that went back stays what it went back to, not what it had come to.
    let mut back = world.course(&case, folder.path());
    let [anchor, _] = [true, false].map(|anchor| back.save(&Disk, &arm, batches.cursor(), anchor));
    assert_eq!(back.roll_back(&Disk, &mut arm, &mut batches, "in a test")?.path, anchor?.path);
    back.save(&Disk, &arm, batches.cursor(), true)?;
    assert_eq!(listed()?, ["00000001", "00000003"]);
    Ok(())
}
