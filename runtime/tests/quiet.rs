//! Protected directions: A hardly sees what it was protected from, stays as it begins, and costs neither gradients nor
//! moments; B learns as it always did.

use std::sync::Arc;

use crate::common::models::{FLOATS, LONG_BLOCKS, SHORT_BLOCKS};
use crate::common::{TestResult, request};
use crate::eva::{batches, inputs};
use engraft_kernels::Kernels;
use engraft_runtime::adapter::{Adapter, Init, LoraConfig, StoredAs};
use engraft_runtime::model::Proj;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::Precision;
use engraft_runtime::plan::{ArenaWords, MemoryPlan, Request};
use engraft_runtime::rng::Rng;
use engraft_runtime::storage::Disk;
use engraft_runtime::train::optim::AdamWConfig;
use engraft_runtime::train::schedule::{Schedule, Shape};
use engraft_runtime::train::{TrainOptions, Trainer, quiet};

const RANK: usize = 3;
/// Where each projection's input is among the four of a block.
const INPUTS: [(Proj, usize); 7] =
    [(Proj::Q, 0), (Proj::K, 0), (Proj::V, 0), (Proj::O, 1), (Proj::Gate, 2), (Proj::Up, 2), (Proj::Down, 3)];

fn begun(
    model: &Arc<ModelFile>,
    energy: f32,
    dora: bool,
    threads: usize,
) -> Result<Adapter, engraft_runtime::Error> {
    let kernels = Arc::new(Kernels::detect(threads));
    let layers: Vec<usize> = (0..model.config().n_layers).collect();
    let plain = LoraConfig::new(model.config(), RANK, 6.0, 0.0, &Proj::ALL, &layers)?;
    let config = LoraConfig { dora, ..plain }.checked(model.config())?;
    let mut rng = Rng::new(1, 1);
    let mut adapter = Adapter::init_on(model, &kernels, &config, &mut || rng.f32())?;
    let rows = batches(model);
    quiet::initialize(&mut adapter, model, &kernels, Precision::F32, &rows, (energy, 5), |_| Ok(()))?;
    Ok(adapter)
}

fn trainer(model: &Arc<ModelFile>, start: &Adapter, freeze_a: bool) -> Trainer {
    let options = TrainOptions {
        adamw: AdamWConfig::default(),
        schedule: Schedule { shape: Shape::Constant, peak: 1e-2, warmup: 0, total: 100 },
        seed: 3,
        precision: Precision::F32,
        gradient: Precision::F32.into(),
        kl: None,
        freeze_a,
    };
    let request = Request { beside_base: true, ..request(model.config(), start, 4, 40, 1) };
    let words = ArenaWords::new(model.config(), &request);
    Trainer::new(model.clone(), Arc::new(Kernels::detect(1)), words, start.clone(), options)
}

/// The share of an input's energy that A's rows see, were they of norm 1 and everything there is.
fn seen(model: &ModelFile, adapter: &Adapter, layer: usize, proj: Proj, which: usize) -> f64 {
    let slot = adapter.layout.slot(layer, proj).expect("adapted");
    let rows: Vec<&[f32]> = adapter.theta[slot.a].chunks_exact(slot.inputs).collect();
    let (mut through, mut all) = (0.0, 0.0);
    for x in inputs(model, layer, which, false) {
        all += x.iter().map(|v| v * v).sum::<f64>();
        for a in &rows {
            let dot: f64 = a.iter().zip(&x).map(|(a, x)| f64::from(*a) * x).sum();
            through += 3.0 * dot * dot;
        }
    }
    through / all
}

#[test]
fn a_hardly_sees_what_it_is_protected_from() -> TestResult {
    for spec in [&SHORT_BLOCKS, &FLOATS] {
        let model = spec.model();
        // So little that twice the rank is what counts.
        let (quiet, usual) = (begun(&model, 1e-9, false, 2)?, begun(&model, 0.999, false, 2)?);
        for layer in 0..model.config().n_layers {
            for (proj, which) in INPUTS {
                let of = |adapter: &Adapter| seen(&model, adapter, layer, proj, which);
                let (quiet, usual) = (of(&quiet), of(&usual));
                assert!(quiet < 0.2 * usual, "{layer} {proj:?}: {quiet} of {usual}");
            }
        }
        // What may be seen of the energy is a bound.
        let some = begun(&model, 0.05, false, 2)?;
        for (proj, which) in INPUTS {
            let share = seen(&model, &some, 1, proj, which);
            assert!(share < 0.05 + 1e-4, "{proj:?}: {share}");
        }
    }
    Ok(())
}

#[test]
fn any_number_of_threads_draws_the_same_bits() -> TestResult {
    let model = LONG_BLOCKS.model();
    let bits = |threads| -> Result<Vec<u32>, engraft_runtime::Error> {
        Ok(begun(&model, 0.02, false, threads)?.theta.iter().map(|v| v.to_bits()).collect())
    };
    assert!(bits(1)? == bits(3)?);
    Ok(())
}

/// Freezing A changes nothing for B: its first gradient is that of a run that trains both, to the bit.
#[test]
fn a_stays_and_b_learns() -> TestResult {
    let model = SHORT_BLOCKS.model();
    for dora in [false, true] {
        let start = begun(&model, 0.02, dora, 1)?;
        let rows = batches(&model);
        let (mut frozen, mut free) = (trainer(&model, &start, true), trainer(&model, &start, false));
        frozen.step(&rows[..1])?;
        free.step(&rows[..1])?;
        let own = start.layout.without_a();
        assert_eq!(frozen.gradients().len(), own.len());
        for ((_, _, all), (_, _, own)) in start.layout.slots().zip(own.slots()) {
            assert_eq!(own.a.len(), 0);
            assert_eq!(frozen.gradients()[own.b], free.gradients()[all.b]);
            assert_eq!(frozen.gradients()[own.m], free.gradients()[all.m]);
        }
        for _ in 0..3 {
            frozen.step(&rows[..1])?;
            free.step(&rows[..1])?;
        }
        for (_, _, slot) in start.layout.slots() {
            let of =
                |trainer: &Trainer, range: std::ops::Range<usize>| trainer.adapter().theta[range].to_vec();
            assert_eq!(of(&frozen, slot.a.clone()), start.theta[slot.a.clone()]);
            assert_ne!(of(&free, slot.a.clone()), start.theta[slot.a.clone()], "the control trains A");
            assert_ne!(of(&frozen, slot.b.clone()), start.theta[slot.b.clone()]);
        }
    }
    Ok(())
}

/// Rows whose own words aren't learned pull the model back to its base.
#[test]
fn general_rows_hold_the_model_near_its_base() -> TestResult {
    let model = SHORT_BLOCKS.model();
    let start = begun(&model, 0.5, false, 1)?;
    let rows = batches(&model);
    let far = |weight: f32| -> Result<(f64, f64), engraft_runtime::Error> {
        let mut trainer = trainer(&model, &start, true);
        for _ in 0..20 {
            if weight > 0.0 {
                trainer.stay_near_base_on(rows[2].clone(), weight);
            }
            trainer.step(&rows[..1])?;
        }
        let general = trainer.compare(std::iter::once(rows[2].clone()));
        let own = trainer.compare(std::iter::once(rows[0].clone()));
        Ok((general.kl_forward, own.loss - own.base_loss))
    };
    let ((free, learned), (held, still)) = (far(0.0)?, far(10.0)?);
    assert!(held < 0.5 * free, "{held} of {free}");
    assert!(still < 0.5 * learned && learned < 0.0, "it goes on learning: {still} of {learned}");
    Ok(())
}

#[test]
fn plans_leave_out_what_is_frozen() -> TestResult {
    let model = SHORT_BLOCKS.model();
    let start = begun(&model, 0.02, false, 1)?;
    let c = model.config();
    let asked = request(c, &start, 2, 16, 1);
    let frozen = start.layout.len() - start.layout.without_a().len();
    let plan = |frozen| MemoryPlan::new(c, &Request { frozen, ..asked }).private_bytes;
    assert_eq!(plan(0) - plan(frozen), 3 * 4 * frozen);
    Ok(())
}

#[test]
fn files_say_how_a_began() -> TestResult {
    let model = SHORT_BLOCKS.model();
    let folder = tempfile::tempdir()?;
    let start = begun(&model, 0.02, false, 1)?;
    let saved = start.save(&Disk, folder.path(), StoredAs::F32)?;
    let read = Adapter::load(&saved.path)?;
    assert_eq!((read.meta.init, read.theta == start.theta), (Init::Quiet, true));
    Ok(())
}

/// A run in protected directions that stops and resumes ends with the same bits: A comes from the checkpoint, and the
/// general rows follow from the step.
#[test]
fn a_protected_run_resumes_to_the_same_bits() -> TestResult {
    use engraft_runtime::data::load_train_valid;
    use engraft_runtime::run::general;
    use engraft_runtime::{
        Base, Checkpoints, DataOptions, Length, Limit, Method, Nobody, Run, RunRows, Settings, Start, Text,
    };

    let base = Base::open("../targets/cli/seedling.gguf")?;
    let text = Text::of(&base.model)?;
    let reading = DataOptions { max_seq_length: 64, ..DataOptions::default() };
    let file = "../targets/cli/demo/private_train.jsonl".as_ref();
    let data = load_train_valid(file, &text.tokenizer, &text.chat, &reading)?;
    let general = general::rows(&text, 48)?;
    let rows = RunRows { train: &data.train.examples, general: &general[..24], ..RunRows::default() };
    let layers: Vec<usize> = (0..base.model.config().n_layers).collect();
    let lora = LoraConfig::new(base.model.config(), 4, 8.0, 0.0, &Proj::ALL, &layers)?;
    let settings = Settings { length: Length::Steps(6), ..Settings::new(Method::Adapter(lora)).protected() };
    let planned = base.plan(&settings, rows, &Limit::default())?;
    let run = |start, until| -> Result<(Vec<u32>, usize), engraft_runtime::Error> {
        let asked = (settings.clone(), &planned.request);
        let (mut run, restored) = Run::begin("", &base, asked.0, asked.1, rows, start, &mut Nobody)?;
        run.go(rows, until, &mut Nobody)?;
        if until.is_some() {
            run.checkpoint(true, &mut Nobody)?;
        }
        let theta = run.snapshot()?.expect("an adapter").theta;
        let from = restored.found.map_or(0, |found| found.steps as usize);
        Ok((theta.iter().map(|v| v.to_bits()).collect(), from))
    };
    let folder = tempfile::tempdir()?;
    let checkpoints = || Checkpoints::open(&Disk, folder.path());
    let (whole, _) = run(Start::Fresh(None), None)?;
    let (part, _) = run(Start::Fresh(Some(checkpoints()?)), Some(3))?;
    let (resumed, from) = run(Start::Resume(checkpoints()?), None)?;
    assert!(from == 3 && part != whole && resumed == whole);
    Ok(())
}
