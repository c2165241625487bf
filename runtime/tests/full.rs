//! Full fine-tuning against the referee: every tensor's gradient, the weights after some steps; against
//! finite differences; the same bits however threads, memory and updates are arranged; and what tuned
//! weights serve.

use std::sync::Arc;

use crate::common::models::{FLOATS, LONG_BLOCKS, SHORT_BLOCKS, Spec};
use crate::common::{TestResult, batch, referee};
use engraft_kernels::{DType, Kernels, KvType};
use engraft_runtime::ErrorKind;
use engraft_runtime::data::Batch;
use engraft_runtime::eval::scoring_chain;
use engraft_runtime::generate::Sequence;
use engraft_runtime::merge;
use engraft_runtime::model::tuned::{TunedLayout, TunedModel, Weights};
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::keep::KeepPrecision;
use engraft_runtime::nn::{GradientPrecision, Precision};
use engraft_runtime::plan::{ArenaWords, FullUpdate, KeepPlan, Request};
use engraft_runtime::rng::Rng;
use engraft_runtime::storage::Disk;
use engraft_runtime::train::optim::AdamWConfig;
use engraft_runtime::train::schedule::Shape;
use engraft_runtime::train::{FullTrainer, Schedule, TrainOptions};

const SPECS: [&Spec; 3] = [&FLOATS, &SHORT_BLOCKS, &LONG_BLOCKS];
const IDS: [u32; 9] = [3, 1, 4, 15, 9, 26, 5, 35, 8];

fn options(clip: f32) -> TrainOptions {
    TrainOptions {
        adamw: AdamWConfig { weight_decay: 0.1, max_grad_norm: clip, ..AdamWConfig::default() },
        schedule: Schedule { shape: Shape::Constant, peak: 1e-3, warmup: 2, total: 10 },
        seed: 0,
        precision: Precision::Int8,
        gradient: GradientPrecision::Int8,
        kl: None,
        freeze_a: false,
    }
}

fn trainer(
    model: &Arc<ModelFile>,
    threads: usize,
    clip: f32,
    full: FullUpdate,
    keep: KeepPlan,
) -> FullTrainer {
    let c = model.config();
    let request = Request {
        batch: 1,
        seq: 64,
        full: Some(full),
        kept_blocks: c.n_layers,
        keep,
        threads,
        ..Request::default()
    };
    let kernels = Arc::new(Kernels::detect(threads));
    FullTrainer::new(model.clone(), kernels, ArenaWords::new(c, &request), options(clip))
}

/// Steps of micro-batches: ragged sequences, one of a single row, one without any target.
fn data(model: &ModelFile, steps: usize, micro: &[&[usize]]) -> Vec<Vec<Batch>> {
    let mut rng = Rng::new(2, 2);
    (0..steps).map(|_| micro.iter().map(|rows| batch(model.config(), rows, &mut rng)).collect()).collect()
}

fn values(trainer: &FullTrainer) -> Vec<f32> {
    match trainer.weights() {
        Weights::Tuned(model) => model.values().to_vec(),
        Weights::Stored(_) => panic!("not tuned"),
    }
}

/// The names of all trained tensors, and where they lie.
fn tensors(model: &ModelFile) -> Vec<(String, std::ops::Range<usize>)> {
    let layout = TunedLayout::new(model.config());
    let all =
        model.gguf().tensors().iter().filter_map(|t| Some((t.name.to_string(), layout.tensor(&t.name)?)));
    all.collect()
}

/// The largest relative difference of a tensor, and its name.
fn worst(model: &ModelFile, a: &[f32], b: &[f32]) -> (f64, String) {
    let each = tensors(model).into_iter().map(|(name, at)| (referee::relative(&a[at.clone()], &b[at]), name));
    each.fold((0.0, String::new()), |w, t| if t.0 > w.0 || t.0.is_nan() { t } else { w })
}

#[test]
fn the_layout_holds_each_tensor_once() {
    for spec in SPECS {
        let model = spec.model();
        let mut seen = vec![0u8; TunedLayout::new(model.config()).len()];
        tensors(&model).into_iter().flat_map(|(_, at)| at).for_each(|i| seen[i] += 1);
        assert!(seen.iter().all(|n| *n == 1), "{}", spec.name);
    }
    let layout = TunedLayout::new(FLOATS.model().config());
    for none in ["blk.4.attn_q.weight", "blk.x.attn_q.weight", "blk.0.attn_q.bias", "rope_freqs.weight", ""] {
        assert_eq!(layout.tensor(none), None, "{none}");
    }
}

#[test]
fn some_steps_follow_the_referee() -> TestResult {
    for spec in SPECS {
        let model = spec.model();
        let mut trainer = trainer(&model, 1, 1.0, FullUpdate::AtEnd, KeepPlan::default());
        let layout = TunedLayout::new(model.config());
        let mut adamw =
            referee::AdamW::full(options(1.0).adamw, &layout, model.config().n_layers, &values(&trainer));
        for (i, step) in data(&model, 5, &[&[13, 5, 1, 21], &[40]]).iter().enumerate() {
            let sums = referee::full_sums(&model, &adamw.theta_f32(), step)?;
            let report = trainer.step(step)?;
            let loss = sums.loss / sums.targets as f64;
            assert!((report.loss - loss).abs() < 1e-5 * loss, "{}: {} for {loss}", spec.name, report.loss);
            let (error, place) = worst(&model, trainer.gradients(), &sums.grads);
            assert!(error < 2e-4, "{} step {i}: {error:e} at {place}", spec.name);
            let mut spoiled = sums.grads.clone();
            spoiled[layout.output_norm().start] *= 1.01;
            assert!(
                i > 0 || worst(&model, trainer.gradients(), &spoiled).0 > 2e-4,
                "a spoiled gain goes unseen"
            );
            let norm = adamw.update(&sums, options(1.0).schedule.rate(i as u64));
            assert!((report.grad_norm - norm).abs() < 1e-4 * norm, "{} for {norm}", report.grad_norm);
        }
        let (error, place) = worst(&model, &values(&trainer), &adamw.theta_f32());
        println!("{}: weights differ by {error:e} at {place}", spec.name);
        assert!(error < 1e-3, "{}: {error:e} at {place}", spec.name);
    }
    Ok(())
}

#[test]
fn gradients_are_slopes_of_the_loss() -> TestResult {
    let model = FLOATS.model();
    let step = data(&model, 1, &[&[13, 5, 9]]).remove(0);
    let mut trainer = trainer(&model, 1, 0.0, FullUpdate::AtEnd, KeepPlan::default());
    let start = values(&trainer);
    trainer.step(&step)?;
    let kernels = Arc::new(Kernels::detect(1));
    let loss_at = |moved: &[f32]| {
        let mut tuned = TunedModel::new(model.clone(), &kernels);
        tuned.values_mut().copy_from_slice(moved);
        let mut chain = scoring_chain(Arc::new(tuned), kernels.clone(), Precision::F32, 0, 64);
        chain.evaluate(None, &step[0], |_, _| {}).loss_sum
    };
    for (name, at) in tensors(&model) {
        // Along the gradient itself the difference quotient is |g|, far above f32 rounding.
        let grad = &trainer.gradients()[at.clone()];
        let norm = grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!(norm > 1e-3, "{name}: gradient vanishes ({norm:e})");
        let size = 1e-2;
        let slope = [1.0, -1.0].map(|sign| {
            let mut moved = start.clone();
            let step = |(v, g): (&mut f32, &f32)| *v += (sign * size / norm * f64::from(*g)) as f32;
            moved[at.clone()].iter_mut().zip(grad).for_each(step);
            loss_at(&moved)
        });
        let slope = (slope[0] - slope[1]) / (2.0 * size);
        assert!((slope / norm - 1.0).abs() < 1e-2, "{name}: slope {slope}, gradient {norm}");
    }
    Ok(())
}

#[test]
fn the_bits_do_not_depend_on_threads_memory_or_when_weights_are_updated() -> TestResult {
    for spec in SPECS {
        let model = spec.model();
        let blocks = model.config().n_layers - 1;
        let all = KeepPlan { all: blocks, attention: 0, precision: KeepPrecision::F32 };
        let inputs = KeepPlan::default();
        let steps = data(&model, 3, &[&[13, 5, 1, 21]]);
        let run = |threads, clip, full, keep| -> Result<Vec<u32>, engraft_runtime::Error> {
            let mut trainer = trainer(&model, threads, clip, full, keep);
            steps.iter().try_for_each(|s| trainer.step(s).map(|_| ()))?;
            Ok(values(&trainer).iter().map(|v| v.to_bits()).collect())
        };
        let plain = run(1, 0.0, FullUpdate::AtEnd, inputs)?;
        assert!(plain == run(3, 0.0, FullUpdate::AtEnd, inputs)?, "{}: threads", spec.name);
        assert!(plain == run(2, 0.0, FullUpdate::AtEnd, all)?, "{}: what blocks keep", spec.name);
        assert!(plain == run(1, 0.0, FullUpdate::AtOnce, inputs)?, "{}: updated at once", spec.name);
        assert!(plain != run(1, 1e-3, FullUpdate::AtEnd, inputs)?, "{}: clipping does nothing", spec.name);
    }
    Ok(())
}

#[test]
fn what_can_not_be_done_is_refused_and_changes_nothing() -> TestResult {
    let model = FLOATS.model();
    let step = data(&model, 1, &[&[13, 5, 9]]).remove(0);
    let kind = |r: Result<_, engraft_runtime::Error>| {
        r.map(|_: engraft_runtime::train::StepReport| ()).map_err(|e| e.kind())
    };
    let mut at_end = trainer(&model, 1, 1.0, FullUpdate::AtEnd, KeepPlan::default());
    let held = at_end.weights();
    assert_eq!(kind(at_end.step(&step)), Err(ErrorKind::Misuse), "weights that are held elsewhere");
    drop(held);
    let before = values(&at_end);
    let mut idle = step.clone();
    idle.iter_mut().for_each(|b| b.targets.fill(u32::MAX));
    assert_eq!(kind(at_end.step(&idle)), Err(ErrorKind::BadData));
    assert!(values(&at_end) == before && at_end.numbers().steps == 0);
    assert_eq!(kind(at_end.step(&step)), Ok(()));
    let mut clipping = trainer(&model, 1, 1.0, FullUpdate::AtOnce, KeepPlan::default());
    assert_eq!(kind(clipping.step(&step)), Err(ErrorKind::Misuse));
    let mut at_once = trainer(&model, 1, 0.0, FullUpdate::AtOnce, KeepPlan::default());
    assert_eq!(kind(at_once.step(&[step[0].clone(), step[0].clone()])), Err(ErrorKind::Misuse));
    assert_eq!(kind(at_once.step(&step)), Ok(()));
    Ok(())
}

#[test]
fn sessions_run_on_tuned_weights() -> TestResult {
    let kernels = Arc::new(Kernels::detect(2));
    let logits = |weights: Weights| -> Result<Vec<f32>, engraft_runtime::Error> {
        let mut sequence =
            Sequence::new(weights, kernels.clone(), None, Precision::F32, IDS.len(), KvType::F32)?;
        Ok(sequence.feed(&IDS)?.to_vec())
    };
    for spec in SPECS {
        let model = spec.model();
        let mut trainer = trainer(&model, 2, 1.0, FullUpdate::AtEnd, KeepPlan::default());
        let (file, fresh) = (logits(model.clone().into())?, logits(trainer.weights())?);
        assert!(referee::relative(&fresh, &file) < 1e-5, "{}: dequantized is the file", spec.name);
        trainer.step(&data(&model, 1, &[&[30, 5]]).remove(0))?;
        let tuned = logits(trainer.weights())?;
        assert!(referee::relative(&tuned, &file) > 1e-4, "{}: a step changes what sequences see", spec.name);
    }
    Ok(())
}

#[test]
fn the_model_that_is_written_is_what_was_tuned() -> TestResult {
    let folder = tempfile::tempdir()?;
    for spec in SPECS {
        let model = spec.model();
        let mut trainer = trainer(&model, 2, 1.0, FullUpdate::AtEnd, KeepPlan::default());
        trainer.step(&data(&model, 1, &[&[30, 5]]).remove(0))?;
        let tuned = trainer.into_weights();
        let written = |dtype| -> Result<ModelFile, engraft_runtime::Error> {
            ModelFile::open(merge::tuned::write(&Disk, folder.path(), "m.gguf", &tuned, dtype)?.path)
        };
        let again = TunedModel::new(Arc::new(written(Some(DType::F32))?), &Kernels::detect(1));
        let bits = |m: &TunedModel| m.values().iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert!(bits(&again) == bits(&tuned), "{}: f32 is exact", spec.name);
        let own = written(None)?;
        for (old, new) in model.gguf().tensors().iter().zip(own.gguf().tensors()) {
            assert_eq!((&old.name, old.dtype, &old.dims), (&new.name, new.dtype, &new.dims));
        }
        for (old, new) in model.gguf().entries().iter().zip(own.gguf().entries()) {
            let (a, b) = (&model.bytes()[old.range.clone()], &own.bytes()[new.range.clone()]);
            assert_eq!((&old.key, a), (&new.key, b), "{}", spec.name);
        }
        let stored = TunedModel::new(Arc::new(own), &Kernels::detect(1));
        let (error, place) = worst(&model, stored.values(), tuned.values());
        assert!(error < 0.3, "{}: {error} at {place}", spec.name);
        // A weight that a type can't hold is refused, and the file before it stays.
        let before = std::fs::read(folder.path().join("m.gguf"))?;
        let mut broken = TunedModel::new(model.clone(), &Kernels::detect(1));
        broken.values_mut()[7] = f32::NAN;
        let refused = merge::tuned::write(&Disk, folder.path(), "m.gguf", &broken, None).map(|_| ());
        assert_eq!(refused.map_err(|e| e.kind()), Err(ErrorKind::NonFinite));
        assert!(std::fs::read(folder.path().join("m.gguf"))? == before);
    }
    assert_eq!(
        merge::tuned::check_type(&FLOATS.model(), Some(DType::Q4_0)).map_err(|e| e.kind()),
        Err(ErrorKind::Misuse)
    );
    Ok(())
}

#[test]
fn a_loss_that_is_not_finite_changes_nothing() -> TestResult {
    let model = FLOATS.model();
    let step = data(&model, 1, &[&[13, 5, 9]]).remove(0);
    for (clip, update) in [(1.0, FullUpdate::AtEnd), (0.0, FullUpdate::AtOnce)] {
        let mut options = options(clip);
        options.schedule.peak = f32::INFINITY;
        let c = model.config();
        let full = Some(update);
        let request =
            Request { batch: 1, seq: 64, full, kept_blocks: c.n_layers, threads: 1, ..Request::default() };
        let words = ArenaWords::new(c, &request);
        let mut trainer = FullTrainer::new(model.clone(), Arc::new(Kernels::detect(1)), words, options);
        // The first step's infinite rate breaks the weights; the second sees it and moves nothing.
        trainer.step(&step)?;
        let before: Vec<u32> = values(&trainer).iter().map(|v| v.to_bits()).collect();
        assert_eq!(trainer.step(&step).map(|_| ()).map_err(|e| e.kind()), Err(ErrorKind::NonFinite));
        let after: Vec<u32> = values(&trainer).iter().map(|v| v.to_bits()).collect();
        assert!(before == after && trainer.numbers().steps == 1, "{update:?}");
    }
    Ok(())
}
