//! Training against the referee: losses, every adapter gradient, the parameters; dropout; and the same
//! bits for any number of threads.

use std::sync::Arc;

use crate::common::models::{FLOATS, LONG_BLOCKS, SHORT_BLOCKS, Spec};
use crate::common::{TestResult, adapter, adapter_of, batch, referee, request, shared};
use engraft_kernels::{Isa, Kernels, scalar};
use engraft_runtime::adapter::gains::kernel_words;
use engraft_runtime::adapter::{Adapter, Gains, LoraConfig, Override};
use engraft_runtime::data::Batch;
use engraft_runtime::model::Proj;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::{Dropout, GradientPrecision, Precision};
use engraft_runtime::plan::ArenaWords;
use engraft_runtime::reference::Reference;
use engraft_runtime::rng::Rng;
use engraft_runtime::train::chain::AdapterView;
use engraft_runtime::train::optim::AdamWConfig;
use engraft_runtime::train::schedule::Shape;
use engraft_runtime::train::{Chain, Schedule, TrainOptions, Trainer};

/// Rows of the sequences of each micro-batch.
const MICRO: [&[usize]; 2] = [&[13, 5, 1, 21], &[40]];
const SEQ: usize = 40;
/// The bound of int8 activations: relative error of the loss, and 1 − cosine of every gradient tensor.
const INT8_LOSS: f64 = 1e-2;
const INT8_TURN: f64 = 1e-2;
/// Relative error of a gain taken with A in int8.
const INT8_GAINS: f64 = 1e-3;
/// The same of bf16 input gradients beside an exact forward.
const BF16_LOSS: f64 = 1e-3;
const BF16_TURN: f64 = 1e-4;
/// As [`INT8_TURN`], of the real model, whose thirty blocks add up the rounding of as many inputs.
const INT8_TURN_REAL: f64 = 3e-2;

fn options(precision: Precision, total: u64, clip: f32) -> TrainOptions {
    TrainOptions {
        adamw: AdamWConfig { weight_decay: 0.1, max_grad_norm: clip, ..AdamWConfig::default() },
        schedule: Schedule { shape: Shape::Cosine, peak: 4e-3, warmup: 3, total },
        seed: 3,
        precision,
        gradient: precision.into(),
        kl: None,
        freeze_a: false,
    }
}

fn trainer(model: &Arc<ModelFile>, kernels: &Arc<Kernels>, start: &Adapter, o: &TrainOptions) -> Trainer {
    let request = request(model.config(), start, 1, SEQ.max(64), kernels.threads());
    let words = ArenaWords::new(model.config(), &request);
    Trainer::new(model.clone(), kernels.clone(), words, start.clone(), o.clone())
}

/// The same for a referee that stands [`Referee::Apart`]. At the usual ε of 1e-8, AdamW's first update of an
/// element whose gradient is nearly zero is that gradient's rounding, at the size of the rate.
fn smooth(total: u64, clip: f32) -> TrainOptions {
    let usual = options(Precision::F32, total, clip);
    TrainOptions { adamw: AdamWConfig { eps: 1e-6, ..usual.adamw }, ..usual }
}

/// How far a run strayed from the referee's, at its worst step.
#[derive(Debug, Default)]
struct Strayed {
    /// |loss − referee's| / referee's.
    loss: f64,
    /// max|a − b| / max|b| of a gradient tensor.
    grad: f64,
    /// 1 − the cosine of a gradient tensor.
    turn: f64,
    /// As `grad`, of the parameters after the last step.
    theta: f64,
    /// Where the worst gradient was.
    place: String,
    /// Steps in which the norm was clipped.
    clipped: usize,
}

/// Where the referee stands at each step.
#[derive(Clone, Copy, PartialEq)]
enum Referee {
    /// On parameters of its own, moved by its own gradients.
    Apart,
    /// On the trainer's parameters, its optimizer moved by the trainer's gradients. Where B begins at
    /// zero, AdamW's first updates are the signs of gradients, and of an element whose gradient is
    /// nearly zero the sign is rounding: two runs then part by more than their gradients differ.
    Beside,
}

/// Runs trainer and referee side by side on the same data.
fn side_by_side(
    model: &Arc<ModelFile>,
    reference: &Reference,
    start: &Adapter,
    o: &TrainOptions,
    steps: &[Vec<Batch>],
    stands: Referee,
    spoil: f32,
) -> Result<Strayed, Box<dyn std::error::Error>> {
    // Small work is done sooner by one thread.
    let kernels = Arc::new(Kernels::detect(if model.config().vocab < 10_000 { 1 } else { 2 }));
    let mut trainer = trainer(model, &kernels, start, o);
    let mut adamw = referee::AdamW::of(o.adamw, start);
    let mut judged = start.clone();
    judged.config.alpha *= spoil;
    let mut strayed = Strayed::default();
    for (i, batches) in steps.iter().enumerate() {
        let theta = match stands {
            Referee::Apart => adamw.theta_f32(),
            Referee::Beside => trainer.adapter().theta.clone(),
        };
        let mut sums = referee::sums(reference, &judged, &theta, batches)?;
        let report = trainer.step(batches)?;
        assert_eq!(report.targets, sums.targets);
        assert_eq!(report.tokens, batches.iter().map(Batch::rows).sum::<usize>());
        let loss = sums.loss / sums.targets as f64;
        strayed.loss = strayed.loss.max((report.loss - loss).abs() / loss);
        let (error, place) = referee::worst(&start.layout, trainer.gradients(), &sums.grads);
        if error > strayed.grad || error.is_nan() {
            (strayed.grad, strayed.place) = (error, format!("{place}, step {i}"));
        }
        let (cosine, _) = referee::least_cosine(&start.layout, trainer.gradients(), &sums.grads);
        strayed.turn = strayed.turn.max(1.0 - cosine);
        if stands == Referee::Beside {
            sums.grads.copy_from_slice(trainer.gradients());
        }
        let norm = adamw.update(&sums, o.schedule.rate(i as u64));
        assert!((report.grad_norm - norm).abs() < 0.1 * norm, "{} for {norm}", report.grad_norm);
        strayed.clipped +=
            usize::from(o.adamw.max_grad_norm > 0.0 && norm > f64::from(o.adamw.max_grad_norm));
    }
    strayed.theta = referee::worst(&start.layout, &trainer.adapter().theta, &adamw.theta_f32()).0;
    Ok(strayed)
}

/// Steps of two micro-batches each: ragged sequences, one of a single row, one without any target.
fn data(model: &ModelFile, steps: usize) -> Vec<Vec<Batch>> {
    let mut rng = Rng::new(2, 2);
    (0..steps).map(|_| MICRO.map(|rows| batch(model.config(), rows, &mut rng)).to_vec()).collect()
}

/// A model with what is adapted of it: all, or projections and layers picked so that the first adapted
/// block is not the first, and one block between adapted ones is not.
fn settings(spec: &Spec) -> Vec<(usize, Vec<Proj>, Vec<usize>)> {
    let last = spec.layers - 1;
    let some = if spec.layers > 3 { vec![1, last] } else { vec![last] };
    vec![
        (4, Proj::ALL.to_vec(), (0..spec.layers).collect()),
        (3, vec![Proj::K, Proj::O, Proj::Up], some.clone()),
        (8, vec![Proj::Q, Proj::V, Proj::Gate, Proj::Down], some),
    ]
}

#[test]
fn ten_steps_follow_the_referee() -> TestResult {
    for spec in [&SHORT_BLOCKS, &LONG_BLOCKS, &FLOATS] {
        let model = spec.model();
        let reference = referee::reference(&model)?;
        let steps = data(&model, 10);
        // Always clipped, never, and now and then.
        for ((rank, targets, layers), clip) in settings(spec).into_iter().zip([0.5, 0.0, 1.5]) {
            let start = adapter(&model, rank, &targets, &layers, 0.0);
            let o = smooth(10, clip);
            let strayed = side_by_side(&model, &reference, &start, &o, &steps, Referee::Apart, 1.0)?;
            eprintln!("{} rank {rank} {targets:?} {layers:?}: {strayed:?}", spec.name);
            assert!(strayed.loss < 1e-4, "{}: {strayed:?}", spec.name);
            assert!(strayed.grad < 1e-3, "{}: {strayed:?}", spec.name);
            assert!(strayed.theta < 1e-3, "{}: {strayed:?}", spec.name);
            assert!(if clip == 0.0 { strayed.clipped == 0 } else { strayed.clipped > 0 }, "{}", spec.name);
        }
    }
    Ok(())
}

/// Ranks that differ by layer, multipliers by rank, B at a rate of its own, and decay.
fn mixed(model: &ModelFile, dora: bool) -> LoraConfig {
    let c = model.config();
    let layers: Vec<usize> = (0..c.n_layers).collect();
    let plain = LoraConfig::new(c, 4, 8.0, 0.0, &Proj::ALL, &layers).expect("valid settings");
    let of = |layer, proj, rank, alpha| Override { layer, proj, rank, alpha };
    let overrides = vec![
        of(None, Proj::Down, Some(9), None),
        of(Some(1), Proj::Down, Some(1), Some(2.0)),
        of(None, Proj::Q, None, Some(3.0)),
        of(Some(0), Proj::V, Some(17), None),
    ];
    let config = LoraConfig { rslora: true, dora, overrides, ..plain };
    config.checked(c).expect("valid settings")
}

#[test]
fn ranks_multipliers_and_rates_of_their_own_follow_the_referee() -> TestResult {
    for spec in [&SHORT_BLOCKS, &LONG_BLOCKS, &FLOATS] {
        let model = spec.model();
        let reference = referee::reference(&model)?;
        let start = adapter_of(&model, &mixed(&model, false));
        assert_eq!(start.layout.rank_max(), 17);
        let mut o = smooth(10, 0.5);
        (o.adamw.lora_plus_ratio, o.schedule.peak) = (4.0, 1e-3);
        let strayed = side_by_side(&model, &reference, &start, &o, &data(&model, 10), Referee::Apart, 1.0)?;
        eprintln!("{}: {strayed:?}", spec.name);
        assert!(
            strayed.loss < 1e-4 && strayed.grad < 1e-3 && strayed.theta < 1e-3,
            "{}: {strayed:?}",
            spec.name
        );
        // The referee at one rate must part from it.
        let mut adamw = referee::AdamW::new(o.adamw, &start.theta);
        let kernels = Arc::new(Kernels::detect(1));
        let mut trainer = trainer(&model, &kernels, &start, &o);
        let batches = &data(&model, 1)[0];
        adamw.update(&referee::sums(&reference, &start, &start.theta, batches)?, o.schedule.rate(0));
        trainer.step(batches)?;
        let off = referee::worst(&start.layout, &trainer.adapter().theta, &adamw.theta_f32()).0;
        assert!(off > 1e-3, "{}: a fourfold rate of B went unnoticed: {off}", spec.name);
    }
    Ok(())
}

/// The adapter as a DoRA whose magnitudes are noise around the base's norms.
fn as_dora(model: &ModelFile, start: &Adapter) -> Adapter {
    adapter_of(model, &LoraConfig { dora: true, ..start.config.clone() })
}

#[test]
fn ten_steps_of_dora_follow_the_referee() -> TestResult {
    for spec in [&SHORT_BLOCKS, &LONG_BLOCKS, &FLOATS] {
        let model = spec.model();
        let reference = referee::reference(&model)?;
        let of_settings = settings(spec).into_iter();
        let mut starts: Vec<_> =
            of_settings.map(|(r, p, l)| as_dora(&model, &adapter(&model, r, &p, &l, 0.0))).collect();
        starts.push(adapter_of(&model, &mixed(&model, true)));
        for (start, clip) in starts.into_iter().zip([0.5, 0.0, 1.5, 0.5]) {
            let mut o = options(Precision::F32, 10, clip);
            o.adamw.lora_plus_ratio = if clip == 1.5 { 2.0 } else { 1.0 };
            let strayed =
                side_by_side(&model, &reference, &start, &o, &data(&model, 10), Referee::Beside, 1.0)?;
            eprintln!("DoRA {} {:?}: {strayed:?}", spec.name, start.config);
            assert!(strayed.loss < 1e-4, "{}: {strayed:?}", spec.name);
            assert!(strayed.grad < 1e-4 && strayed.theta < 1e-5, "{}: {strayed:?}", spec.name);
        }
        let start = as_dora(&model, &adapter(&model, 4, &Proj::ALL, &[0, 1], 0.0));
        let o = options(Precision::Int8, 5, 0.5);
        if spec.name != FLOATS.name {
            let strayed =
                side_by_side(&model, &reference, &start, &o, &data(&model, 5), Referee::Beside, 1.0)?;
            eprintln!("DoRA int8 {}: {strayed:?}", spec.name);
            assert!(strayed.loss < INT8_LOSS && strayed.turn < INT8_TURN, "{}: {strayed:?}", spec.name);
        }
    }
    Ok(())
}

#[test]
fn dora_begins_as_the_base_to_the_bit() -> TestResult {
    for spec in [&SHORT_BLOCKS, &LONG_BLOCKS, &FLOATS] {
        let model = spec.model();
        let layers: Vec<usize> = (0..spec.layers).collect();
        let plain = LoraConfig::new(model.config(), 4, 8.0, 0.0, &Proj::ALL, &layers)?;
        let config = LoraConfig { dora: true, ..plain };
        for (isa, precision) in
            Isa::available().flat_map(|isa| [(isa, Precision::F32), (isa, Precision::Int8)])
        {
            let kernels = Arc::new(Kernels::with_isa(isa, 2));
            let mut rng = Rng::new(1, 1);
            let start = Adapter::init_on(&model, &kernels, &config, &mut || rng.f32())?;
            let batches = || data(&model, 1).into_iter().flatten();
            let run = |start: &Adapter, with: bool| {
                trainer(&model, &kernels, start, &options(precision, 1, 0.0)).evaluate(batches(), with)
            };
            let base = run(&start, false);
            let begun = run(&start, true);
            // The scalar product adds a residual within its sum, DoRA's after it: that rounds otherwise.
            if isa.name() == "scalar" {
                let bound = if precision == Precision::F32 { 1e-6 } else { INT8_LOSS };
                assert!((begun.loss_sum / base.loss_sum - 1.0).abs() < bound, "{} {precision:?}", spec.name);
            } else {
                assert_eq!(begun, base, "{} {} {precision:?}", spec.name, isa.name());
            }
            // A millionth more of one magnitude is seen.
            let mut other = start.clone();
            let (_, _, slot) = start.layout.slots().last().ok_or("no slot")?;
            other.theta[slot.m].iter_mut().for_each(|m| *m *= 1.0 + 1e-6);
            assert_ne!(run(&other, true), base, "{} {} {precision:?}", spec.name, isa.name());
        }
    }
    Ok(())
}

/// c of every adapted row in f64 from the whole of W + s·B·A, its weights passed through `rounded`.
fn whole_gains(model: &ModelFile, a: &Adapter, rounded: fn(f32) -> f32) -> Vec<f64> {
    let mut gains = Vec::new();
    for (layer, proj, s) in a.layout.slots() {
        let (w, scale) = (model.block(layer).proj(proj), f64::from(a.config.scale_of(layer, proj)));
        let (am, bt, m) = (&a.theta[s.a.clone()], &a.theta[s.b.clone()], &a.theta[s.m.clone()]);
        let mut row = vec![0.0; s.inputs];
        for i in 0..s.outputs {
            scalar::decode::dequantize(w.dtype(), w.row(i), 0, &mut row);
            let square = |k: usize| {
                let low =
                    (0..s.rank).map(|j| f64::from(bt[j * s.outputs + i]) * f64::from(am[j * s.inputs + k]));
                (f64::from(rounded(row[k])) + scale * low.sum::<f64>()).powi(2)
            };
            gains.push(f64::from(m[i]) / (0..s.inputs).map(square).sum::<f64>().sqrt());
        }
    }
    gains
}

#[test]
fn gains_are_those_of_the_whole_matrix() -> TestResult {
    for spec in [&SHORT_BLOCKS, &LONG_BLOCKS, &FLOATS] {
        let model = spec.model();
        let start = adapter_of(&model, &mixed(&model, true));
        let worst = |rounded, acts: usize| {
            let whole = whole_gains(&model, &start, rounded);
            let mut worst = Vec::new();
            for isa in Isa::available() {
                let kernels = Kernels::with_isa(isa, 2);
                let mut scratch = vec![0.0; kernel_words(&start.layout, 2)];
                let mut gains = Gains::new(&model, &kernels, &start.layout, &mut scratch);
                let of = (&start.layout, &start.config);
                gains.refresh(&model, &kernels, of, &start.theta, (&mut scratch, &mut vec![0.0; acts]));
                let off = gains.c().iter().zip(&whole).map(|(c, w)| (f64::from(*c) / w - 1.0).abs());
                worst.push(off.fold(0.0, f64::max));
            }
            worst
        };
        let exact = worst(|w| w, 0);
        let bf16 = worst(|w| f32::from_bits((w.to_bits() + 0x8000) & 0xffff_0000), 0);
        // B is of A's size here, many times what training makes of it.
        let int8 = worst(|w| w, 1 << 20);
        eprintln!("{}: gains with A in int8 are {int8:?} off", spec.name);
        assert!(int8.iter().all(|e| *e < INT8_GAINS), "{}: {int8:?}", spec.name);
        eprintln!("{}: gains are {exact:?} off; of weights in bf16 {bf16:?}", spec.name);
        assert!(exact.iter().all(|e| *e < 2e-6), "{}: {exact:?}", spec.name);
        assert!(bf16.iter().all(|e| *e > 1e-5), "{}: norms of another precision went unnoticed", spec.name);
    }
    Ok(())
}

#[test]
fn a_wrong_scale_would_be_noticed() -> TestResult {
    let model = SHORT_BLOCKS.model();
    let reference = referee::reference(&model)?;
    let start = adapter(&model, 4, &Proj::ALL, &[0, 1, 2], 0.0);
    let o = options(Precision::F32, 1, 0.5);
    let strayed = side_by_side(&model, &reference, &start, &o, &data(&model, 1), Referee::Apart, 1.01)?;
    assert!(strayed.grad > 3e-3, "one percent more alpha went unnoticed: {strayed:?}");
    Ok(())
}

#[test]
fn int8_activations_stay_within_their_bound() -> TestResult {
    for spec in [&SHORT_BLOCKS, &LONG_BLOCKS] {
        let model = spec.model();
        let reference = referee::reference(&model)?;
        for (rank, targets, layers) in settings(spec) {
            let start = adapter(&model, rank, &targets, &layers, 0.0);
            let o = options(Precision::Int8, 10, 0.5);
            let strayed =
                side_by_side(&model, &reference, &start, &o, &data(&model, 10), Referee::Apart, 1.0)?;
            eprintln!("int8 {} rank {rank} {targets:?} {layers:?}: {strayed:?}", spec.name);
            assert!(strayed.loss < INT8_LOSS && strayed.turn < INT8_TURN, "{}: {strayed:?}", spec.name);
        }
    }
    Ok(())
}

/// bf16 has 8 significant bits, and its errors average out over a sum: the same data, only dx rounded.
#[test]
fn bf16_gradients_stay_within_their_bound() -> TestResult {
    for spec in [&SHORT_BLOCKS, &LONG_BLOCKS] {
        let model = spec.model();
        let reference = referee::reference(&model)?;
        for (rank, targets, layers) in settings(spec) {
            let start = adapter(&model, rank, &targets, &layers, 0.0);
            let o = TrainOptions { gradient: GradientPrecision::Bf16, ..options(Precision::F32, 10, 0.5) };
            let strayed =
                side_by_side(&model, &reference, &start, &o, &data(&model, 10), Referee::Apart, 1.0)?;
            eprintln!("bf16 {} rank {rank} {targets:?} {layers:?}: {strayed:?}", spec.name);
            assert!(strayed.loss < BF16_LOSS && strayed.turn < BF16_TURN, "{}: {strayed:?}", spec.name);
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs ENGRAFT_MODEL"]
fn the_real_model_follows_the_referee() -> TestResult {
    let path = shared::real_model();
    let model = Arc::new(ModelFile::open(path)?);
    let reference = referee::reference(&model)?;
    let layers: Vec<usize> = (0..model.config().n_layers).collect();
    let mut start = adapter(&model, 8, &Proj::ALL, &layers, 0.0);
    let slots: Vec<_> = start.layout.slots().collect();
    // As training begins: B is zero.
    slots.into_iter().for_each(|(_, _, slot)| start.theta[slot.b].fill(0.0));
    let text = "The lamp beside the window was the only light in the house. When the wind rose, the old man \
                closed his book, counted the boats that were still out, and went down to the harbour with a \
                rope over his shoulder. Nobody had asked him to go, and nobody would have stayed behind.";
    let ids = engraft_runtime::model::text::Text::of(&model)?
        .tokenizer
        .encode(text, engraft_runtime::model::tokenizer::Special::Plain);
    let mask = (0..ids.len()).map(|i| i > 8).collect();
    let mut one = Batch::default();
    one.push(&engraft_runtime::data::Example { ids, mask });
    assert!((48..=64).contains(&one.rows()), "{} rows", one.rows());
    for (precision, steps) in [(Precision::F32, 10), (Precision::Int8, 3)] {
        let o = TrainOptions {
            schedule: Schedule { shape: Shape::Constant, peak: 2e-4, warmup: 0, total: 10 },
            ..options(precision, 10, 1.0)
        };
        let data = vec![vec![one.clone()]; steps];
        let strayed = side_by_side(&model, &reference, &start, &o, &data, Referee::Beside, 1.0)?;
        eprintln!("real model, {precision:?}, {steps} steps of {} rows: {strayed:?}", one.rows());
        match precision {
            Precision::F32 => {
                assert!(strayed.loss < 1e-4 && strayed.grad < 1e-3 && strayed.theta < 1e-3, "{strayed:?}");
            }
            Precision::Int8 => {
                assert!(strayed.loss < INT8_LOSS && strayed.turn < INT8_TURN_REAL, "{strayed:?}");
            }
        }
    }
    Ok(())
}

/// A chain with room for dropout, and what to run through it.
struct Bench {
    chain: Chain,
    adapter: Adapter,
    gains: Gains,
    model: Arc<ModelFile>,
    kernels: Arc<Kernels>,
    batch: Batch,
}

impl Bench {
    fn new(spec: &Spec, dora: bool) -> Bench {
        let model = spec.model();
        let layers: Vec<usize> = (0..spec.layers).collect();
        let plain = LoraConfig::new(model.config(), 4, 8.0, 0.3, &Proj::ALL, &layers).expect("settings");
        let adapter = adapter_of(&model, &LoraConfig { dora, ..plain });
        let batch = batch(model.config(), MICRO[0], &mut Rng::new(4, 4));
        let request = request(model.config(), &adapter, 1, SEQ, 1);
        let words = ArenaWords::new(model.config(), &request);
        let kernels = Arc::new(Kernels::detect(1));
        let mut chain = Chain::new(model.clone(), kernels.clone(), Precision::F32, words);
        let gains = Gains::new(&model, &kernels, &adapter.layout, chain.kernel_scratch());
        let mut bench = Bench { chain, adapter, gains, model, kernels, batch };
        bench.refresh();
        bench
    }

    /// Brings the gains to θ.
    fn refresh(&mut self) {
        let Adapter { layout, config, theta, .. } = &self.adapter;
        let scratch = self.chain.gain_scratch(true);
        self.gains.refresh(&self.model, &self.kernels, (layout, config), theta, scratch);
    }

    /// Sum of the losses, and its gradient.
    fn run(&mut self, dropout: Dropout) -> (f64, Vec<f32>) {
        let mut grads = vec![0.0; self.adapter.theta.len()];
        let a = &self.adapter;
        let view =
            AdapterView { layout: &a.layout, theta: &a.theta, config: &a.config, gains: self.gains.c() };
        let e = self.chain.accumulate(view, &self.batch, dropout, (&a.layout, &mut grads));
        (e.loss_sum, grads)
    }

    /// The largest relative difference between the gradient under `forward` and the central difference
    /// of the loss under `differences`, over the steepest element of each tensor.
    fn difference_error(&mut self, forward: Dropout, differences: Dropout) -> f64 {
        let (_, grads) = self.run(forward);
        let slots: Vec<_> = self.adapter.layout.slots().collect();
        let mut worst = 0.0f64;
        let ranges = slots.into_iter().flat_map(|(_, _, s)| [(s.a, false), (s.b, false), (s.m, true)]);
        for (at, is_magnitude) in ranges.filter(|(at, _)| !at.is_empty()) {
            let steepest = at.max_by(|i, j| grads[*i].abs().total_cmp(&grads[*j].abs())).expect("elements");
            let (h, before) = (2e-3f32, self.adapter.theta[steepest]);
            let mut at_offset = |offset: f32| {
                self.adapter.theta[steepest] = before + offset;
                // The norm is a constant to the gradient of A and B: their gains stay as they were.
                if is_magnitude {
                    self.refresh();
                }
                self.run(differences).0
            };
            let slope = (at_offset(h) - at_offset(-h)) / (2.0 * f64::from(h));
            self.adapter.theta[steepest] = before;
            self.refresh();
            worst = worst.max((slope / f64::from(grads[steepest]) - 1.0).abs());
        }
        worst
    }
}

#[test]
fn dropout_drops_the_same_in_forward_and_backward() {
    for dora in [false, true] {
        let mut bench = Bench::new(&SHORT_BLOCKS, dora);
        let (one, other) = (Dropout { p: 0.3, key: 17 }, Dropout { p: 0.3, key: 18 });
        let error = bench.difference_error(one, one);
        let spoiled = bench.difference_error(one, other);
        eprintln!("DoRA {dora}: finite differences under dropout: {error:e}; with another mask: {spoiled:e}");
        assert!(error < 2e-2, "DoRA {dora}: off by {error}");
        assert!(spoiled > 0.2, "DoRA {dora}: another mask went unnoticed: {spoiled}");
        let (loss, grads) = bench.run(one);
        assert_eq!((loss, grads), bench.run(one), "one key, one mask");
        assert_ne!(bench.run(one).0, bench.run(other).0);
    }
}

#[test]
fn dropout_keeps_the_mean_and_none_is_none() {
    let mut bench = Bench::new(&SHORT_BLOCKS, false);
    let plain = bench.run(Dropout::OFF);
    assert_eq!(plain, bench.run(Dropout { p: 0.0, key: 99 }), "p = 0 is no dropout, bit for bit");
    // While B is zero the loss does not feel the masks, so dB is linear in them: its mean over keys is
    // the gradient without dropout.
    let slots: Vec<_> = bench.adapter.layout.slots().map(|(_, _, s)| s).collect();
    slots.iter().for_each(|s| bench.adapter.theta[s.b.clone()].fill(0.0));
    let (loss, expected) = bench.run(Dropout::OFF);
    let keys = 400;
    let mut mean = vec![0.0f64; expected.len()];
    for key in 0..keys {
        let (dropped, grads) = bench.run(Dropout { p: 0.3, key });
        assert_eq!(dropped, loss);
        mean.iter_mut().zip(&grads).for_each(|(m, g)| *m += f64::from(*g) / keys as f64);
    }
    for s in &slots {
        let pairs = s.b.clone().map(|i| (mean[i], f64::from(expected[i])));
        let (off, size) = pairs.fold((0.0, 0.0), |(o, s), (m, e)| (o + (m - e).powi(2), s + e * e));
        let error = (off / size).sqrt();
        assert!(error < 0.1, "the mean over {keys} masks is {error} off");
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() -> TestResult {
    let model = LONG_BLOCKS.model();
    for (precision, dropout, dora) in
        [(Precision::Int8, 0.1, false), (Precision::F32, 0.0, false), (Precision::Int8, 0.0, true)]
    {
        let start = adapter(&model, 4, &Proj::ALL, &[0, 1], dropout);
        let start = if dora { as_dora(&model, &start) } else { start };
        let mut rng = Rng::new(9, 9);
        let steps: Vec<[Batch; 1]> =
            (0..3).map(|_| [batch(model.config(), &[13, 5, 1, 17], &mut rng)]).collect();
        for isa in Isa::available() {
            let run = |threads: usize| -> Result<(Vec<u32>, Vec<u64>), engraft_runtime::Error> {
                let kernels = Arc::new(Kernels::with_isa(isa, threads));
                let mut trainer = trainer(&model, &kernels, &start, &options(precision, 3, 0.5));
                let losses = steps.iter().map(|s| trainer.step(s).map(|r| r.loss.to_bits()));
                let losses = losses.collect::<Result<_, _>>()?;
                let numbers = trainer.adapter().theta.iter().chain(trainer.gradients());
                Ok((numbers.map(|v| v.to_bits()).collect(), losses))
            };
            let one = run(1)?;
            for threads in [2, 4] {
                assert!(run(threads)? == one, "{} {precision:?}: {threads} threads", isa.name());
            }
        }
    }
    Ok(())
}

#[test]
fn a_step_that_is_not_finite_changes_nothing() -> TestResult {
    let model = SHORT_BLOCKS.model();
    let mut start = adapter(&model, 4, &Proj::ALL, &[0, 1, 2], 0.0);
    start.theta[0] = f32::NAN;
    let kernels = Arc::new(Kernels::detect(1));
    let mut trainer = trainer(&model, &kernels, &start, &options(Precision::F32, 2, 0.5));
    let error = trainer.step(&data(&model, 1)[0]).expect_err("a NaN in A reaches the loss");
    assert_eq!(error.kind(), engraft_runtime::ErrorKind::NonFinite);
    assert_eq!(trainer.numbers().steps, 0);
    let bits = |theta: &[f32]| theta.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
    assert_eq!(bits(&trainer.adapter().theta), bits(&start.theta));
    Ok(())
}
