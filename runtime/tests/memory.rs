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
use engraft_runtime::adapter::LoraConfig;
use engraft_runtime::data::Batch;
use engraft_runtime::model::{ModelConfig, Proj};
use engraft_runtime::nn::Precision;
use engraft_runtime::nn::keep::KeepPrecision;
use engraft_runtime::plan::{ArenaWords, FullUpdate, KeepPlan, MemoryPlan, Request};
use engraft_runtime::rng::Rng;
use engraft_runtime::train::optim::AdamWConfig;
use engraft_runtime::train::schedule::Shape;
use engraft_runtime::train::{FullTrainer, Schedule, TrainOptions, Trainer};

/// Allocations so far, and bytes allocated and not freed.
static CALLS: AtomicUsize = AtomicUsize::new(0);
static LIVE: AtomicUsize = AtomicUsize::new(0);

struct Counting;

#[global_allocator]
static HEAP: Counting = Counting;

// SAFETY: every call is passed on to the system's allocator unchanged; the counters are atomics, so
// touching them never allocates.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::SeqCst);
        LIVE.fetch_add(layout.size(), Ordering::SeqCst);
        // SAFETY: the caller's promises about `layout` are the system allocator's demands.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::SeqCst);
        LIVE.fetch_add(layout.size(), Ordering::SeqCst);
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
        for (precision, dropout, threads, keep, dora) in [
            (Precision::Int8, 0.0, 1, KeepPlan::default(), false),
            (Precision::Int8, 0.1, 2, attention(KeepPrecision::F32), false),
            (Precision::Int8, 0.1, 2, attention(KeepPrecision::Bf16), true),
            (Precision::Int8, 0.0, 2, all(KeepPrecision::Bf16), false),
            (Precision::F32, 0.0, 2, all(KeepPrecision::F32), true),
            (Precision::Int8, 0.0, 1, KeepPlan::default(), true),
        ] {
            let kernels = Arc::new(Kernels::detect(threads));
            let c = model.config();
            wake_all(&kernels);
            let live = LIVE.load(Ordering::SeqCst);
            let plain = LoraConfig::new(c, 4, 8.0, dropout, &Proj::ALL, &layers)?;
            let start = adapter_of(&model, &LoraConfig { dora, ..plain });
            let request = Request { keep, ..request(c, &start, 3, 32, threads) };
            let options = TrainOptions {
                adamw: AdamWConfig::default(),
                schedule: Schedule { shape: Shape::Constant, peak: 1e-3, warmup: 0, total: 10 },
                seed: 0,
                precision,
                gradient: precision.into(),
            };
            let mut trainer =
                Trainer::new(model.clone(), kernels, ArenaWords::new(c, &request), start, options);
            let allocated = LIVE.load(Ordering::SeqCst) - live;
            let planned = planned_arena(c, &request);
            eprintln!(
                "{} dropout {dropout} {keep:?} DoRA {dora}: {allocated} bytes allocated, {planned} planned",
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
        }
    }
    full_fine_tuning_keeps_to_its_plan()
}

/// Bytes of the pools that are allocated before the first step.
fn planned_arena(c: &ModelConfig, request: &Request) -> usize {
    let plan = MemoryPlan::new(c, request);
    let pool = |name: &&str| plan.pools.iter().find(|p| p.name == *name).map_or(0, |p| p.bytes);
    ARENA.iter().map(pool).sum()
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
        };
        let mut trainer = FullTrainer::new(model.clone(), kernels, ArenaWords::new(c, &request), options);
        let allocated = LIVE.load(Ordering::SeqCst) - live;
        let planned = planned_arena(c, &request);
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
