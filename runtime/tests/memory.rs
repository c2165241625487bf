//! Memory is what the plan says: building a trainer allocates the plan's arena, and a step allocates
//! nothing.
//!
//! One test alone in its program: the counters see every thread.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::models::{FLOATS, LONG_BLOCKS, SHORT_BLOCKS};
use common::{TestResult, adapter_of, batch, request};
use engraft_kernels::Kernels;
use engraft_runtime::adapter::{Adapter, LoraConfig, StoredAs as Stored};
use engraft_runtime::data::Batch;
use engraft_runtime::generate::replay::{Sampling, Starts};
use engraft_runtime::generate::{KvType, Prefix, Sequences, StackedAdapter};
use engraft_runtime::model::text::Text;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::model::{ModelConfig, Proj};
use engraft_runtime::nn::Precision;
use engraft_runtime::nn::keep::KeepPrecision;
use engraft_runtime::plan::{ArenaWords, FullUpdate, KeepPlan, MemoryPlan, Request};
use engraft_runtime::probe::Prober;
use engraft_runtime::rng::Rng;
use engraft_runtime::storage::Disk;
use engraft_runtime::train::eva::{self, EvaWords};
use engraft_runtime::train::optim::AdamWConfig;
use engraft_runtime::train::schedule::Shape;
use engraft_runtime::train::{Direction, FullTrainer, KlPenalty, Schedule, TrainOptions, Trainer};

/// Allocations so far, and bytes allocated and not freed.
static CALLS: AtomicUsize = AtomicUsize::new(0);
static LIVE: AtomicUsize = AtomicUsize::new(0);
/// The most that was alive at once.
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn count(bytes: usize) {
    CALLS.fetch_add(1, Ordering::SeqCst);
    let live = LIVE.fetch_add(bytes, Ordering::SeqCst) + bytes;
    PEAK.fetch_max(live, Ordering::SeqCst);
}

struct Counting;

#[global_allocator]
static HEAP: Counting = Counting;

// SAFETY: every call is passed on to the system's allocator unchanged; the counters are atomics, so
// touching them never allocates.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promises about `layout` are the system allocator's demands.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promises about `layout` are the system allocator's demands.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: `ptr` came from `System.alloc` with this layout, as the caller promises.
        unsafe { System.dealloc(ptr, layout) }
    }
}

/// The pools that are allocated before the first step, by name.
const ARENA: [&str; 11] = [
    "weights",
    "adapter",
    "gradients",
    "moments",
    "gains",
    "saved_inputs",
    "kept_activations",
    "block_activations",
    "head_chunk",
    "kernel_scratch",
    "rotary_table",
];

/// Returns when every worker has begun to work: a thread's start-up allocates, and may be late.
fn wake_all(kernels: &Kernels) {
    let barrier = std::sync::Barrier::new(kernels.threads());
    // As many items as threads, none of which ends before all have begun.
    let mut runs = vec![0.0; kernels.threads() * 8192];
    kernels.rows(8192, &mut runs, |_, _| {
        barrier.wait();
    });
}

#[test]
fn the_arena_is_the_plan_and_a_step_allocates_nothing() -> TestResult {
    let before = CALLS.load(Ordering::SeqCst);
    drop(std::hint::black_box(vec![0u8; 64]));
    assert!(CALLS.load(Ordering::SeqCst) > before, "the counter does not count");
    for (spec, layers) in [(&SHORT_BLOCKS, vec![1, 2]), (&LONG_BLOCKS, vec![0, 1])] {
        let model = spec.model();
        let blocks = layers.len() - 1;
        let all = |precision| KeepPlan { all: blocks, attention: 0, precision };
        let attention = |precision| KeepPlan { all: 0, attention: blocks, precision };
        let kl = |direction| Some(KlPenalty { weight: 0.1, direction });
        for (precision, dropout, threads, keep, dora, kl) in [
            (Precision::Int8, 0.0, 1, KeepPlan::default(), false, None),
            (Precision::Int8, 0.1, 2, attention(KeepPrecision::F32), false, kl(Direction::Forward)),
            (Precision::Int8, 0.1, 2, attention(KeepPrecision::Bf16), true, None),
            (Precision::Int8, 0.0, 2, all(KeepPrecision::Bf16), false, None),
            (Precision::F32, 0.0, 2, all(KeepPrecision::F32), true, kl(Direction::Reverse)),
            (Precision::Int8, 0.0, 1, KeepPlan::default(), true, None),
        ] {
            let kernels = Arc::new(Kernels::detect(threads));
            let c = model.config();
            wake_all(&kernels);
            let live = LIVE.load(Ordering::SeqCst);
            let plain = LoraConfig::new(c, 4, 8.0, dropout, &Proj::ALL, &layers)?;
            let start = adapter_of(&model, &LoraConfig { dora, ..plain });
            let beside_base = kl.is_some();
            let request = Request { keep, beside_base, ..request(c, &start, 3, 32, threads) };
            let options = TrainOptions {
                adamw: AdamWConfig::default(),
                schedule: Schedule { shape: Shape::Constant, peak: 1e-3, warmup: 0, total: 10 },
                seed: 0,
                precision,
                gradient: precision.into(),
                kl,
                freeze_a: false,
            };
            let mut trainer =
                Trainer::new(model.clone(), kernels.clone(), ArenaWords::new(c, &request), start, options);
            let allocated = LIVE.load(Ordering::SeqCst) - live;
            let planned = planned_pools(c, &request, &ARENA);
            eprintln!(
                "{} dropout {dropout} {keep:?} DoRA {dora} {kl:?}: {allocated} bytes allocated, {planned} planned",
                spec.name
            );
            assert!(allocated.abs_diff(planned) * 100 <= planned, "{allocated} bytes, {planned} planned");

            let mut rng = Rng::new(6, 6);
            let rows: [&[usize]; 3] = [&[7, 3, 30], &[32, 32, 32], &[1]];
            let steps: Vec<[Batch; 2]> =
                rows.iter().map(|r| [batch(c, r, &mut rng), batch(c, &[9], &mut rng)]).collect();
            trainer.step(&steps[0])?;
            let calls = CALLS.load(Ordering::SeqCst);
            for step in &steps {
                trainer.step(step)?;
            }
            let calls = CALLS.load(Ordering::SeqCst) - calls;
            assert_eq!(calls, 0, "{} {precision:?} dropout {dropout}: allocations in three steps", spec.name);

            fingerprint_is_planned(&model, &kernels, trainer.adapter(), &request)?;
            rounding_is_planned(&model, trainer.adapter(), &request)?;
        }
    }
    eva_is_planned()?;
    sampling_is_planned()?;
    batches_are_planned()?;
    full_fine_tuning_keeps_to_its_plan()
}

/// Bytes that `work` held at most beyond what was there.
fn peak_of(work: impl FnOnce() -> TestResult) -> Result<usize, Box<dyn std::error::Error>> {
    let live = LIVE.load(Ordering::SeqCst);
    PEAK.store(live, Ordering::SeqCst);
    work()?;
    Ok(PEAK.load(Ordering::SeqCst) - live)
}

fn assert_planned(what: &str, peak: usize, planned: usize) {
    eprintln!("{what}: {peak} bytes at most, {planned} planned");
    assert!(peak.abs_diff(planned) * 50 <= planned, "{what}: {peak} bytes, {planned} planned");
}

/// What saving takes for the fingerprint, beside the file's buffers.
fn fingerprint_is_planned(
    model: &Arc<ModelFile>,
    kernels: &Arc<Kernels>,
    adapter: &Adapter,
    request: &Request,
) -> TestResult {
    let taken = peak_of(|| {
        let mut prober = Prober::new(model, kernels, adapter.layout.rank_max());
        prober.bind(adapter)?;
        Ok(())
    })?;
    let planned = planned_pools(model.config(), request, &["fingerprint"]);
    eprintln!("fingerprint: {taken} bytes at most, {planned} planned");
    assert!(taken <= planned + 1024 && taken * 10 >= planned * 9, "{taken} of {planned}");
    Ok(())
}

/// Saving as f16 stays within what the plan counts for it.
fn rounding_is_planned(model: &Arc<ModelFile>, adapter: &Adapter, request: &Request) -> TestResult {
    let folder = tempfile::tempdir()?;
    // Saving has buffers of its own, whatever is saved.
    let saving = peak_of(|| adapter.save(&Disk, folder.path(), Stored::F32).map(drop).map_err(Into::into))?;
    let taken = peak_of(|| {
        let mut rounded = adapter.clone();
        rounded.round_to(Stored::F16)?;
        rounded.save(&Disk, folder.path(), Stored::F16)?;
        Ok(())
    })?
    .saturating_sub(saving);
    let planned = planned_pools(model.config(), &Request { rounds: true, ..*request }, &["rounding"]);
    assert_eq!(planned_pools(model.config(), request, &["rounding"]), 0);
    eprintln!("rounding: {taken} bytes at most, {planned} planned");
    // A copy, and what a clone allocates beside the numbers.
    assert!((planned / 2..planned + 4096).contains(&taken), "{taken} of {planned}");
    Ok(())
}

/// Initialization from data stays within its words too.
fn eva_is_planned() -> TestResult {
    let model = LONG_BLOCKS.model();
    let kernels = Arc::new(Kernels::detect(2));
    wake_all(&kernels);
    let mut rng = Rng::new(6, 6);
    let batches: Vec<Batch> = (0..4).map(|_| batch(model.config(), &[32, 32, 32], &mut rng)).collect();
    for targets in [&Proj::ALL[..], &[Proj::Q, Proj::V]] {
        let lora = LoraConfig::new(model.config(), 4, 8.0, 0.0, targets, &[0, 1])?;
        let mut adapter = adapter_of(&model, &lora);
        let words = EvaWords::new(model.config(), &adapter.layout, (96, 32, 4 * 96), 2);
        let peak = peak_of(|| {
            Ok(eva::initialize(&mut adapter, &model, &kernels, Precision::Int8, &batches, 0, |_| Ok(()))?)
        })?;
        assert_planned("EVA", peak, 4 * words.total());
    }
    Ok(())
}

/// So does the sampling of replay rows.
fn sampling_is_planned() -> TestResult {
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../targets/cli/seedling.gguf");
    let model = Arc::new(ModelFile::open(file)?);
    let kernels = Arc::new(Kernels::detect(2));
    wake_all(&kernels);
    let starts = Starts::of(&Text::of(&model)?, 64)?;
    let sampling = Sampling { count: 6, tokens: 40, rows_max: 64, seed: 0 };
    let mut rows = 0;
    let peak = peak_of(|| {
        let sampled = sampling.run(&model, &kernels, Precision::Int8, &starts, |_| true)?;
        rows = sampled.iter().map(|e| size_of_val(e) + 5 * e.ids.len()).sum();
        Ok(())
    })?;
    assert_planned("sampling", peak - rows, sampling.bytes(model.config(), &starts, 2));
    Ok(())
}

/// So do several sequences behind one prefix, and their steps allocate nothing.
fn batches_are_planned() -> TestResult {
    let model = LONG_BLOCKS.model();
    let c = model.config();
    let one = adapter_of(&model, &LoraConfig::new(c, 4, 8.0, 0.0, &Proj::ALL, &[0, 1])?);
    let kernels = Arc::new(Kernels::detect(2));
    wake_all(&kernels);
    let stacked = Arc::new(StackedAdapter::new(&model, &kernels, &[(one, 1.0)])?);
    let ids: Vec<u32> = (0..90).collect();
    for (slots, capacity, cache) in [(3, 40, KvType::F16), (20, 12, KvType::Q8), (1, 300, KvType::F32)] {
        let adapters = || Some(stacked.clone());
        let live = LIVE.load(Ordering::SeqCst);
        let prefix = Prefix::read(model.clone(), kernels.clone(), adapters(), Precision::Int8, cache, &ids)?;
        let held = LIVE.load(Ordering::SeqCst) - live;
        let (planned, prefix) = (Prefix::bytes(c, ids.len(), cache), Arc::new(prefix));
        assert!(held.abs_diff(planned) * 100 <= planned, "prefix: {held} bytes, {planned} planned");
        let mut calls = Vec::with_capacity(1000);
        let peak = peak_of(|| {
            let (model, kernels, prefix) = (model.clone(), kernels.clone(), prefix.clone());
            let mut batch =
                Sequences::new(model, kernels, adapters(), Precision::Int8, prefix, slots, capacity)?;
            let prompts = vec![vec![7, 8]; slots + 1];
            batch.complete(
                &prompts,
                8,
                |_| false,
                |_| {
                    calls.push(CALLS.load(Ordering::SeqCst));
                    true
                },
            )?;
            Ok(())
        })?;
        let planned = Sequences::bytes(c, ids.len(), slots, capacity, 4, 2, cache);
        assert_planned(&format!("{slots} sequences"), peak, planned);
        // After the prompts, whose answers grow once to four tokens and once to eight.
        let steps = &calls[slots..slots + 7];
        assert_eq!(steps[3] - steps[0], slots, "one growth of each answer");
    }
    Ok(())
}

/// Bytes of some pools of a plan.
fn planned_pools(c: &ModelConfig, request: &Request, names: &[&str]) -> usize {
    let plan = MemoryPlan::new(c, request);
    plan.pools.iter().filter(|p| names.contains(&p.name)).map(|p| p.bytes).sum()
}

/// The same of full fine-tuning, whenever it updates its weights.
fn full_fine_tuning_keeps_to_its_plan() -> TestResult {
    for (spec, update, max_grad_norm, threads) in [
        (&SHORT_BLOCKS, FullUpdate::AtEnd, 1.0, 2),
        (&LONG_BLOCKS, FullUpdate::AtOnce, 0.0, 1),
        (&FLOATS, FullUpdate::AtOnce, 0.0, 2),
        (&FLOATS, FullUpdate::AtEnd, 1.0, 1),
    ] {
        let model = spec.model();
        let kernels = Arc::new(Kernels::detect(threads));
        let c = model.config();
        wake_all(&kernels);
        let live = LIVE.load(Ordering::SeqCst);
        let keep = KeepPlan { all: 1, attention: 0, precision: KeepPrecision::Bf16 };
        let (full, kept_blocks) = (Some(update), c.n_layers);
        let request = Request { batch: 3, seq: 32, full, kept_blocks, keep, threads, ..Request::default() };
        let options = TrainOptions {
            adamw: AdamWConfig { max_grad_norm, ..AdamWConfig::default() },
            schedule: Schedule { shape: Shape::Constant, peak: 1e-3, warmup: 0, total: 10 },
            seed: 0,
            precision: Precision::F32,
            gradient: Precision::F32.into(),
            kl: None,
            freeze_a: false,
        };
        let mut trainer = FullTrainer::new(model.clone(), kernels, ArenaWords::new(c, &request), options);
        let allocated = LIVE.load(Ordering::SeqCst) - live;
        let planned = planned_pools(c, &request, &ARENA);
        eprintln!("{} full, {update:?}: {allocated} bytes allocated, {planned} planned", spec.name);
        assert!(allocated.abs_diff(planned) * 100 <= planned, "{allocated} bytes, {planned} planned");
        let mut rng = Rng::new(6, 6);
        let steps = [[batch(c, &[7, 3, 30], &mut rng)], [batch(c, &[32, 32, 32], &mut rng)]];
        trainer.step(&steps[0])?;
        let calls = CALLS.load(Ordering::SeqCst);
        steps.iter().try_for_each(|step| trainer.step(step).map(|_| ()))?;
        assert_eq!(CALLS.load(Ordering::SeqCst) - calls, 0, "{} full: allocations in two steps", spec.name);
    }
    Ok(())
}
