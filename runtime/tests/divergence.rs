//! The penalty on leaving the base: values and gradients against the referee and finite differences,
//! nothing where the adapter does nothing, and that it holds a model near its base.

use std::sync::Arc;

use crate::common::models::{FLOATS, LONG_BLOCKS, SHORT_BLOCKS, Spec};
use crate::common::{TestResult, adapter, adapter_of, batch, comparing_chain, referee, request};
use engraft_kernels::{Isa, Kernels};
use engraft_runtime::adapter::{Adapter, Gains, LoraConfig};
use engraft_runtime::data::Batch;
use engraft_runtime::model::Proj;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::{Dropout, Precision};
use engraft_runtime::plan::{ArenaWords, Request};
use engraft_runtime::rng::Rng;
use engraft_runtime::train::chain::AdapterView;
use engraft_runtime::train::optim::AdamWConfig;
use engraft_runtime::train::schedule::Shape;
use engraft_runtime::train::{
    Chain, Compared, Direction, KlPenalty, Pull, Schedule, StepReport, TrainOptions, Trainer,
};

const ROWS: [&[usize]; 2] = [&[13, 5, 1, 21], &[40]];
const DIRECTIONS: [Direction; 2] = [Direction::Forward, Direction::Reverse];

/// What is trained, beside its base.
struct Bench {
    chain: Chain,
    adapter: Adapter,
    gains: Gains,
    batches: Vec<Batch>,
}

impl Bench {
    fn new(model: &Arc<ModelFile>, adapter: Adapter, kernels: Arc<Kernels>, precision: Precision) -> Bench {
        let mut rng = Rng::new(2, 2);
        let batches = ROWS.map(|rows| batch(model.config(), rows, &mut rng)).to_vec();
        let request =
            Request { beside_base: true, ..request(model.config(), &adapter, 1, 40, kernels.threads()) };
        let words = ArenaWords::new(model.config(), &request);
        let mut chain = Chain::new(model.clone(), kernels.clone(), precision, words);
        let mut gains = Gains::new(model, &kernels, &adapter.layout, chain.kernel_scratch());
        let of = (&adapter.layout, &adapter.config);
        gains.refresh(model, &kernels, of, &adapter.theta, chain.gain_scratch(true));
        Bench { chain, adapter, gains, batches }
    }

    /// Sums over all batches, and the gradient, with a penalty or of the loss alone.
    fn run(&mut self, penalty: Option<KlPenalty>) -> (Compared, Vec<f32>) {
        self.pulled(penalty.map(|penalty| Pull { penalty, alone: false }))
    }

    /// The same with whatever pulls.
    fn pulled(&mut self, pull: Option<Pull>) -> (Compared, Vec<f32>) {
        let (mut sum, mut grads) = (Compared::default(), vec![0.0; self.adapter.theta.len()]);
        let a = &self.adapter;
        for b in &self.batches {
            let view =
                AdapterView { layout: &a.layout, theta: &a.theta, config: &a.config, gains: self.gains.c() };
            let into = (&a.layout, &mut grads[..]);
            match pull {
                Some(pull) => sum += self.chain.accumulate_near_base(view, b, Dropout::OFF, pull, into),
                None => sum.loss += self.chain.accumulate(view, b, Dropout::OFF, into).loss_sum,
            }
        }
        (sum, grads)
    }
}

fn all_of(spec: &Spec) -> Vec<usize> {
    (0..spec.layers).collect()
}

fn one_thread() -> Arc<Kernels> {
    Arc::new(Kernels::detect(1))
}

/// An adapter that moved its model: with the noise of the other tests the divergence is faint.
fn moved(model: &ModelFile, targets: &[Proj], layers: &[usize], dora: bool) -> Adapter {
    let config = adapter(model, 4, targets, layers, 0.0).config;
    adapter_of(model, &LoraConfig { dora, ..config })
}

#[test]
fn values_and_gradients_are_the_referees() -> TestResult {
    for spec in [&SHORT_BLOCKS, &LONG_BLOCKS, &FLOATS] {
        let model = spec.model();
        let reference = referee::reference(&model)?;
        for (direction, dora, layers) in [
            (Direction::Forward, false, all_of(spec)),
            (Direction::Reverse, true, all_of(spec)),
            (Direction::Reverse, false, vec![spec.layers - 1]),
        ] {
            let start = moved(&model, &Proj::ALL, &layers, dora);
            let penalty = KlPenalty { weight: 0.7, direction };
            let mut bench = Bench::new(&model, start.clone(), one_thread(), Precision::F32);
            let (sum, grads) = bench.run(Some(penalty));
            let judged = |penalty| {
                let batches = &bench.batches;
                referee::penalized_sums(&reference, &start, &start.theta, batches, Some(penalty))
            };
            let expected = judged(penalty)?;
            let kl = sum.kl(direction);
            let (error, place) = referee::worst(&start.layout, &grads, &expected.grads);
            eprintln!(
                "{} {direction:?} DoRA {dora}: KL {kl}, {}; gradient {error:e}",
                spec.name, expected.kl
            );
            assert_eq!(sum.targets, expected.targets);
            assert!((sum.loss / expected.loss - 1.0).abs() < 1e-5);
            assert!((kl / expected.kl - 1.0).abs() < 1e-3, "{kl} for {}", expected.kl);
            assert!(error < 1e-4, "{error} at {place}");
            // A slightly other weight, and the other direction, must be seen.
            let other = DIRECTIONS[usize::from(direction == DIRECTIONS[0])];
            for wrong in [KlPenalty { weight: 0.75, ..penalty }, KlPenalty { direction: other, weight: 0.7 }]
            {
                let wrong = referee::worst(&start.layout, &grads, &judged(wrong)?.grads).0;
                assert!(wrong > 3.0 * error, "{}: {wrong:e} is too near to {error:e}", spec.name);
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_are_slopes() {
    let model = SHORT_BLOCKS.model();
    for direction in DIRECTIONS {
        let start = moved(&model, &Proj::ALL, &[0, 1, 2], false);
        let mut bench = Bench::new(&model, start.clone(), one_thread(), Precision::F32);
        let penalty = KlPenalty { weight: 3.0, direction };
        let (_, grads) = bench.run(Some(penalty));
        let (_, plain) = bench.run(None);
        let (mut worst, mut unpenalized) = (0.0f64, 0.0f64);
        for (_, _, s) in start.layout.slots() {
            for at in [s.a, s.b] {
                let i = at.max_by(|i, j| grads[*i].abs().total_cmp(&grads[*j].abs())).expect("elements");
                let (h, before) = (2e-3f32, bench.adapter.theta[i]);
                let mut at_offset = |offset: f32| {
                    bench.adapter.theta[i] = before + offset;
                    let (sum, _) = bench.run(Some(penalty));
                    bench.adapter.theta[i] = before;
                    sum.loss + f64::from(penalty.weight) * sum.kl(direction)
                };
                let slope = (at_offset(h) - at_offset(-h)) / (2.0 * f64::from(h));
                worst = worst.max((slope / f64::from(grads[i]) - 1.0).abs());
                unpenalized = unpenalized.max((slope / f64::from(plain[i]) - 1.0).abs());
            }
        }
        eprintln!("{direction:?}: finite differences {worst:e}; of the loss alone {unpenalized:e}");
        assert!(worst < 2e-2, "{direction:?}: off by {worst}");
        assert!(unpenalized > 0.1, "{direction:?}: a missing penalty went unnoticed");
    }
}

#[test]
fn an_adapter_that_does_nothing_is_not_penalized() {
    for spec in [&SHORT_BLOCKS, &LONG_BLOCKS, &FLOATS] {
        let model = spec.model();
        // How gemm sums depends on the number of rows, of which there are twice as many with the base beside.
        for isa in Isa::available().filter(|isa| *isa != Isa::PORTABLE) {
            for precision in [Precision::F32, Precision::Int8] {
                let mut start = moved(&model, &Proj::ALL, &all_of(spec), false);
                let slots: Vec<_> = start.layout.slots().collect();
                slots.into_iter().for_each(|(_, _, s)| start.theta[s.b].fill(0.0));
                let mut bench = Bench::new(&model, start, Arc::new(Kernels::with_isa(isa, 1)), precision);
                let (plain_sum, plain) = bench.run(None);
                for direction in DIRECTIONS {
                    let (sum, grads) = bench.run(Some(KlPenalty { weight: 100.0, direction }));
                    assert_eq!((sum.kl_forward, sum.kl_reverse), (0.0, 0.0), "{} {}", spec.name, isa.name());
                    assert_eq!((sum.loss, sum.base_loss), (sum.base_loss, plain_sum.loss));
                    assert!(grads == plain, "{} {} {precision:?} {direction:?}", spec.name, isa.name());
                }
            }
        }
    }
}

#[test]
fn int8_stays_within_its_bound() -> TestResult {
    for spec in [&SHORT_BLOCKS, &LONG_BLOCKS] {
        let model = spec.model();
        for direction in DIRECTIONS {
            let start = moved(&model, &Proj::ALL, &all_of(spec), false);
            let penalty = KlPenalty { weight: 2.0, direction };
            let run =
                |precision| Bench::new(&model, start.clone(), one_thread(), precision).run(Some(penalty));
            let ((exact, slopes), (sum, grads)) = (run(Precision::F32), run(Precision::Int8));
            let turn = 1.0 - referee::least_cosine(&start.layout, &grads, &slopes).0;
            eprintln!("int8 {} {direction:?}: {sum:?} for {exact:?}, turned by {turn:e}", spec.name);
            assert!((sum.kl(direction) / exact.kl(direction) - 1.0).abs() < 0.05);
            assert!(turn < 1e-2, "{turn}");
        }
    }
    Ok(())
}

#[test]
fn comparing_tells_each_target_and_the_losses_of_both() -> TestResult {
    let model = LONG_BLOCKS.model();
    let start = moved(&model, &Proj::ALL, &[0, 1], true);
    let kernels = one_thread();
    let bench = Bench::new(&model, start.clone(), kernels.clone(), Precision::Int8);
    let mut chain = comparing_chain(&model, &kernels, Precision::Int8, 40);
    let view = AdapterView {
        layout: &start.layout,
        theta: &start.theta,
        config: &start.config,
        gains: bench.gains.c(),
    };
    let (mut seen, mut places) = (Compared::default(), Vec::new());
    let mut total = Compared::default();
    for (i, batch) in bench.batches.iter().enumerate() {
        total += chain.compare(&view, batch, |row, one| {
            seen += one;
            assert!(one.kl_forward > 0.0 && one.kl_reverse > 0.0);
            places.push((i, row));
        });
    }
    assert_eq!(seen.targets, total.targets);
    assert!((seen.kl_forward / total.kl_forward - 1.0).abs() < 1e-12);
    let wanted = bench.batches.iter().enumerate();
    let wanted: Vec<_> = wanted
        .flat_map(|(b, batch)| {
            let rows = batch.targets.iter().enumerate().filter(|(_, t)| **t != u32::MAX);
            rows.map(move |(row, _)| (b, row)).collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(places, wanted);
    let mut silent = bench.batches[0].clone();
    silent.targets.fill(u32::MAX);
    let nothing = chain.compare(&view, &silent, |_, _| panic!("a row without a target"));
    assert_eq!(nothing, Compared::default());
    for (with, sum) in [(true, total.loss), (false, total.base_loss)] {
        let losses = bench.batches.iter().map(|b| {
            let adapter = with.then_some(&view as &dyn engraft_runtime::nn::Adapted);
            chain.evaluate(adapter, b, |_, _| {}).loss_sum
        });
        let alone: f64 = losses.sum();
        assert!((sum / alone - 1.0).abs() < 1e-6, "{sum} for {alone}");
    }
    Ok(())
}

/// Some steps on the same rows with a penalty of this weight; the last report, and how far the model
/// then lies from its base.
fn train(
    model: &Arc<ModelFile>,
    kernels: Arc<Kernels>,
    start: &Adapter,
    penalty: Option<KlPenalty>,
    steps: u64,
) -> Result<(StepReport, Compared, Vec<u32>), engraft_runtime::Error> {
    let request = Request { beside_base: true, ..request(model.config(), start, 1, 40, kernels.threads()) };
    let options = TrainOptions {
        adamw: AdamWConfig::default(),
        schedule: Schedule { shape: Shape::Constant, peak: 4e-3, warmup: 0, total: steps },
        seed: 0,
        precision: Precision::Int8,
        gradient: Precision::Int8.into(),
        kl: penalty,
        freeze_a: false,
    };
    let words = ArenaWords::new(model.config(), &request);
    let mut trainer = Trainer::new(model.clone(), kernels, words, start.clone(), options);
    let batches = [batch(model.config(), ROWS[0], &mut Rng::new(3, 3))];
    let mut report = trainer.step(&batches)?;
    for _ in 1..steps {
        report = trainer.step(&batches)?;
    }
    let bits = trainer.adapter().theta.iter().map(|v| v.to_bits()).collect();
    Ok((report, trainer.compare(batches.into_iter()), bits))
}

#[test]
fn a_penalty_holds_the_model_near_its_base() -> TestResult {
    let model = SHORT_BLOCKS.model();
    let mut start = moved(&model, &Proj::ALL, &[0, 1, 2], false);
    let slots: Vec<_> = start.layout.slots().collect();
    slots.into_iter().for_each(|(_, _, s)| start.theta[s.b].fill(0.0));
    for direction in DIRECTIONS {
        let far = |weight: Option<f32>| -> Result<f64, engraft_runtime::Error> {
            let penalty = weight.map(|weight| KlPenalty { weight, direction });
            let (report, compared, _) = train(&model, one_thread(), &start, penalty, 20)?;
            assert_eq!(report.kl.is_some(), weight.is_some());
            Ok(compared.kl(direction) / compared.targets as f64)
        };
        let (free, held, tight) = (far(None)?, far(Some(1.0))?, far(Some(10.0))?);
        eprintln!("{direction:?}: KL {free} without a penalty, {held} at weight 1, {tight} at 10");
        assert!(held < 0.7 * free && tight < 0.3 * held, "{free}, {held}, {tight}");
    }
    Ok(())
}

#[test]
fn any_number_of_threads_gives_the_same_bits() -> TestResult {
    let model = LONG_BLOCKS.model();
    let start = moved(&model, &Proj::ALL, &[0, 1], false);
    for (isa, direction) in Isa::available().zip(DIRECTIONS.into_iter().cycle()) {
        let penalty = Some(KlPenalty { weight: 0.5, direction });
        let one = train(&model, Arc::new(Kernels::with_isa(isa, 1)), &start, penalty, 2)?;
        let three = train(&model, Arc::new(Kernels::with_isa(isa, 3)), &start, penalty, 2)?;
        assert!(one == three, "{}", isa.name());
    }
    Ok(())
}
