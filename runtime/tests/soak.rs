//! What runs for days must not grow: train, checkpoint, restore, save, load, swap and generate in a loop, with
//! private memory and open descriptors looked at after each round.
//!
//! One test alone runs at a time: memory is the process's. The long run, an hour unless told otherwise, under
//! a cap on memory:
//!
//! ```text
//! cargo test --release -p engraft-runtime --test soak --no-run      # prints the program's path
//! ENGRAFT_SOAK_SECONDS=3600 prlimit --data=$((32 << 20)) PROGRAM --ignored --nocapture
//! ```
#![cfg(target_os = "linux")]

mod common;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{TestResult, adapter, batch, request};
use engraft_kernels::{Kernels, KvType};
use engraft_runtime::adapter::{Adapter, StoredAs as Stored};
use engraft_runtime::data::Batch;
use engraft_runtime::generate::{AdapterSlot, Sequence, StackedAdapter};
use engraft_runtime::model::Proj;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::Precision;
use engraft_runtime::plan::{ArenaWords, room};
use engraft_runtime::probe::Prober;
use engraft_runtime::rng::Rng;
use engraft_runtime::run::{Checkpoints, Identity, Progress};
use engraft_runtime::storage::Disk;
use engraft_runtime::train::optim::AdamWConfig;
use engraft_runtime::train::schedule::Shape;
use engraft_runtime::train::{Schedule, TrainOptions, Trainer};

/// Rounds before the first look: pools, caches and the allocator have their size by then.
const WARM_UP: usize = 10;
/// Rounds of a run at least, however slow the machine: 64 KiB a round are then more than the bound.
const ROUNDS_MIN: usize = 30;
/// Time between two looks in a long run, and looks at most.
const SAMPLE_EVERY: Duration = Duration::from_millis(50);
const SAMPLES_MAX: usize = 80_000;
/// Private memory may move by so much from the first rounds to the last.
const DRIFT_BYTES: i64 = 1 << 20;
/// Seconds of the long run, and of each run in CI.
const LONG: u64 = 3600;
const SHORT: u64 = 6;

/// What the process holds.
#[derive(Clone, Copy, Debug)]
struct Held {
    private_bytes: i64,
    descriptors: usize,
}

fn held() -> Result<Held, Box<dyn std::error::Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let kib = |name: &str| -> Option<i64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    let private_bytes = 1024 * (kib("RssAnon").ok_or("no RssAnon")? + kib("VmSwap").unwrap_or(0));
    Ok(Held { private_bytes, descriptors: std::fs::read_dir("/proc/self/fd")?.count() })
}

/// How far a run drifted from its first rounds after the warm-up to its last.
#[derive(Debug)]
#[allow(dead_code, reason = "all of it is printed")]
struct Drift {
    samples: usize,
    private_bytes: i64,
    descriptors: i64,
    peak_bytes: i64,
}

impl Drift {
    /// Medians of the first and last fifth: a page here or there is noise, growth is not.
    fn of(samples: &[Held]) -> Drift {
        let fifth = samples.len().div_ceil(5);
        let median = |part: &[Held]| {
            let mut bytes: Vec<i64> = part.iter().map(|h| h.private_bytes).collect();
            bytes.sort_unstable();
            bytes[bytes.len() / 2]
        };
        let (first, last) = (&samples[..fifth], &samples[samples.len() - fifth..]);
        Drift {
            samples: samples.len(),
            private_bytes: median(last) - median(first),
            descriptors: last[fifth - 1].descriptors as i64 - first[0].descriptors as i64,
            peak_bytes: samples.iter().map(|h| h.private_bytes).max().unwrap_or(0),
        }
    }

    fn is_flat(&self) -> bool {
        self.private_bytes < DRIFT_BYTES && self.descriptors <= 0
    }
}

/// What lives as long as the loop.
struct Loop {
    model: Arc<ModelFile>,
    kernels: Arc<Kernels>,
    slot: Arc<AdapterSlot>,
    sequence: Sequence,
    start: Adapter,
    rng: Rng,
}

impl Loop {
    fn new() -> Result<Loop, Box<dyn std::error::Error>> {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../targets/cli/seedling.gguf");
        let model = Arc::new(ModelFile::open(file)?);
        let kernels = Arc::new(Kernels::detect(1));
        let slot = Arc::new(AdapterSlot::new(None));
        let mut sequence =
            Sequence::new(model.clone(), kernels.clone(), None, Precision::Int8, 48, KvType::F16)?;
        sequence.follow(slot.clone());
        let layers: Vec<usize> = (0..model.config().n_layers).collect();
        let start = adapter(&model, 8, &Proj::ALL, &layers, 0.0);
        Ok(Loop { model, kernels, slot, sequence, start, rng: Rng::new(1, 1) })
    }

    /// A new trainer's steps, a checkpoint of them, the adapter saved, loaded, checked, and put under a running sequence.
    fn round(&mut self, folder: &Path) -> TestResult {
        let c = self.model.config();
        let options = TrainOptions {
            adamw: AdamWConfig::default(),
            schedule: Schedule { shape: Shape::Constant, peak: 1e-3, warmup: 0, total: 3 },
            seed: 0,
            precision: Precision::Int8,
            gradient: Precision::Int8.into(),
            kl: None,
            freeze_a: false,
        };
        let identity = Identity::new(self.model.digest(), Some(&self.start.config), &options);
        let words = ArenaWords::new(c, &request(c, &self.start, 2, 32, 1));
        let start = self.start.clone();
        let mut trainer = Trainer::new(self.model.clone(), self.kernels.clone(), words, start, options);
        for _ in 0..3 {
            let rows: [usize; 2] = [32, 7];
            let micro: [Batch; 1] = [batch(c, &rows, &mut self.rng)];
            trainer.step(&micro)?;
        }
        let mut checkpoints = Checkpoints::open(&Disk, folder)?;
        let saved =
            checkpoints.save(&Disk, &identity, &trainer.numbers(), &Progress::default(), true)?.generation;
        let restored = checkpoints.restore(&Disk, &identity, &mut trainer.numbers_mut(), false)?;
        assert_eq!(restored.found.map(|found| found.generation), Some(saved));
        let trained = trainer.into_adapter();
        let mut prober = Prober::new(&self.model, &self.kernels, trained.layout.rank_max());
        let binding = prober.bind(&trained)?;
        trained.save_bound(&Disk, folder, Stored::F32, &binding)?;

        let loaded = Adapter::load(folder)?;
        prober.check(&loaded)?;
        let stacked = StackedAdapter::new(&self.model, &self.kernels, &[(loaded, 1.0)])?;
        let generation = self.slot.swap(Some(Arc::new(stacked)));
        self.sequence.truncate(0);
        let mut id = 1;
        for _ in 0..24 {
            let logits = self.sequence.feed(&[id])?;
            let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
            id = best.map_or(0, |(id, _)| id as u32);
        }
        assert_eq!(self.sequence.generation(), Some(generation));
        Ok(())
    }

    /// Rounds for a time; `spoil` may hold on to something after each.
    fn run(&mut self, time: Duration, mut spoil: impl FnMut()) -> Result<Drift, Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        // Touched now, so that what is written down does not count as growth.
        let mut samples = vec![held()?; SAMPLES_MAX];
        samples.clear();
        for _ in 0..WARM_UP {
            self.round(folder.path())?;
        }
        let (begun, mut told, mut sampled) = (Instant::now(), Instant::now(), Instant::now());
        let mut rounds = 0;
        while begun.elapsed() < time || rounds < ROUNDS_MIN {
            self.round(folder.path())?;
            spoil();
            rounds += 1;
            if samples.len() < SAMPLES_MAX && (sampled.elapsed() > SAMPLE_EVERY || time.is_zero()) {
                sampled = Instant::now();
                samples.push(held()?);
            }
            if told.elapsed() > Duration::from_secs(60) {
                told = Instant::now();
                eprintln!("{:>5} s  {rounds} rounds  {:?}", begun.elapsed().as_secs(), Drift::of(&samples));
            }
        }
        eprintln!("{rounds} rounds in {} s", begun.elapsed().as_secs());
        Ok(Drift::of(&samples))
    }
}

#[test]
fn a_short_run_is_flat_and_leaks_are_caught() -> TestResult {
    let mut all = Loop::new()?;
    let flat = all.run(Duration::from_secs(SHORT), || ())?;
    eprintln!("as it is: {flat:?}");
    assert!(flat.is_flat(), "{flat:?}");

    let mut leaked: Vec<Vec<u8>> = Vec::new();
    let memory = all.run(Duration::ZERO, || leaked.push(std::hint::black_box(vec![1; 64 << 10])))?;
    eprintln!("64 KiB leaked a round: {memory:?}");
    assert!(!memory.is_flat() && memory.private_bytes >= DRIFT_BYTES, "{memory:?}");
    drop(leaked);

    let mut open = Vec::new();
    let descriptors = all.run(Duration::ZERO, || open.extend(File::open("/proc/self/status")))?;
    eprintln!("a descriptor leaked a round: {descriptors:?}");
    assert!(!descriptors.is_flat() && descriptors.descriptors > 0, "{descriptors:?}");
    Ok(())
}

#[test]
#[ignore = "runs for an hour: see the top of this file"]
fn a_long_run_is_flat() -> TestResult {
    let seconds = match std::env::var("ENGRAFT_SOAK_SECONDS") {
        Ok(text) => text.parse()?,
        Err(_) => LONG,
    };
    eprintln!("{seconds} s; {:?}", room::here(1));
    let drift = Loop::new()?.run(Duration::from_secs(seconds), || ())?;
    eprintln!("{seconds} s: {drift:?}");
    assert!(drift.is_flat(), "{drift:?}");
    Ok(())
}
