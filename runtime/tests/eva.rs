//! EVA: A spans what a projection's inputs vary in, the model stays as it is, and files say so.

use std::ops::Range;
use std::sync::Arc;

use crate::common::models::{FLOATS, LONG_BLOCKS, SHORT_BLOCKS};
use crate::common::{TestResult, batch, request};
use engraft_kernels::Kernels;
use engraft_runtime::adapter::{Adapter, Init, LoraConfig, Override, StoredAs as Stored, peft};
use engraft_runtime::data::Batch;
use engraft_runtime::data::batches::NO_TARGET;
use engraft_runtime::model::Proj;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::block::{self, BlockBufs, BlockWords, Keys};
use engraft_runtime::nn::{Ctx, Dropout, Precision, RowMap, rope};
use engraft_runtime::plan::ArenaWords;
use engraft_runtime::rng::Rng;
use engraft_runtime::storage::Disk;
use engraft_runtime::train::chain::AdapterView;
use engraft_runtime::train::{Chain, eva};

const ROWS: [&[usize]; 3] = [&[13, 5, 1, 21], &[40], &[33, 7, 19]];

pub(crate) fn batches(model: &ModelFile) -> Vec<Batch> {
    let mut rng = Rng::new(7, 7);
    ROWS.map(|rows| batch(model.config(), rows, &mut rng)).to_vec()
}

fn config(model: &ModelFile, dora: bool) -> LoraConfig {
    let c = model.config();
    let layers: Vec<usize> = (0..c.n_layers).collect();
    let plain = LoraConfig::new(c, 4, 8.0, 0.0, &Proj::ALL, &layers).expect("settings");
    let k = Override { layer: None, proj: Proj::K, rank: Some(2), alpha: None };
    LoraConfig { dora, overrides: vec![k], ..plain }.checked(c).expect("settings")
}

fn begun(model: &Arc<ModelFile>, dora: bool, threads: usize) -> Result<Adapter, engraft_runtime::Error> {
    let kernels = Arc::new(Kernels::detect(threads));
    let mut rng = Rng::new(1, 1);
    let mut adapter = Adapter::init_on(model, &kernels, &config(model, dora), &mut || rng.f32())?;
    eva::initialize(&mut adapter, model, &kernels, Precision::F32, &batches(model), 5, |_| Ok(()))?;
    Ok(adapter)
}

/// The inputs of one projection at the rows with a target, sequence by sequence.
pub(crate) fn inputs(model: &ModelFile, layer: usize, which: usize, masked: bool) -> Vec<Vec<f64>> {
    let c = model.config();
    let kernels = Kernels::detect(1);
    let mut table = vec![0.0; rope::table_words(c, 64)];
    rope::table(c, model.rope_freqs(), &mut table);
    let precision = Precision::F32;
    let ctx = Ctx::new(&kernels, c, &table, precision);
    let words = BlockWords::new(c, 64, 64, 0, 1, false, false);
    let mut bufs = BlockBufs::new(&words, words.kernel());
    let mut found = Vec::new();
    for (batch, seq) in batches(model).iter().flat_map(|b| b.seqs.iter().map(move |s| (b, s.clone()))) {
        let m = seq.len();
        let whole: Vec<Range<usize>> = std::iter::once(0..m).collect();
        let pos: Vec<u32> = (0..m as u32).collect();
        let rows = RowMap { seqs: &whole, pos: &pos };
        let mut x = vec![0.0; m * c.d_model];
        for (row, id) in x.chunks_exact_mut(c.d_model).zip(&batch.ids[seq.clone()]) {
            kernels.dequantize_row(&model.token_embd(), *id as usize, row);
        }
        for l in 0..=layer {
            let mut y = vec![0.0; x.len()];
            let w = model.block(l);
            block::forward(&ctx, &w, &[None; 7], rows, &x, &mut y, &mut bufs, Keys::Batch, Dropout::OFF);
            x = y;
        }
        let input = bufs.inputs(c, m)[which];
        let rows = input.chunks_exact(input.len() / m).zip(&batch.targets[seq]);
        let rows = rows.filter(|(_, t)| !masked || **t != NO_TARGET);
        found.extend(rows.map(|(row, _)| row.iter().map(|v| f64::from(*v)).collect::<Vec<_>>()));
    }
    found
}

/// Eigenvalues of a symmetric matrix, largest first, by Jacobi's rotations.
fn eigenvalues(mut a: Vec<Vec<f64>>) -> Vec<f64> {
    let n = a.len();
    for _ in 0..12 {
        for p in 0..n {
            for q in p + 1..n {
                if a[p][q] == 0.0 {
                    continue;
                }
                let angle = 0.5 * (2.0 * a[p][q]).atan2(a[q][q] - a[p][p]);
                let (s, c) = angle.sin_cos();
                for row in &mut a {
                    (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
                }
                for i in 0..n {
                    (a[p][i], a[q][i]) = (c * a[p][i] - s * a[q][i], s * a[p][i] + c * a[q][i]);
                }
            }
        }
    }
    let mut values: Vec<f64> = (0..n).map(|i| a[i][i]).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    values
}

fn dot(a: &[f32], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * b).sum()
}

#[test]
fn a_spans_what_its_inputs_vary_in() -> TestResult {
    for spec in [&SHORT_BLOCKS, &FLOATS] {
        let model = spec.model();
        let adapter = begun(&model, false, 2)?;
        for (layer, proj, which) in
            [(0, Proj::Q, 0), (1, Proj::K, 0), (1, Proj::O, 1), (0, Proj::Up, 2), (2, Proj::Down, 3)]
        {
            let slot = adapter.layout.slot(layer, proj).ok_or("no slot")?;
            let rows: Vec<&[f32]> = adapter.theta[slot.a].chunks_exact(slot.inputs).collect();
            for (i, a) in rows.iter().enumerate() {
                for (j, b) in rows.iter().enumerate() {
                    let b: Vec<f64> = b.iter().map(|v| f64::from(*v)).collect();
                    assert!((dot(a, &b) - f64::from(u8::from(i == j))).abs() < 1e-5, "not orthonormal");
                }
            }
            let x = inputs(&model, layer, which, true);
            let mut gram = vec![vec![0.0; slot.inputs]; slot.inputs];
            for row in &x {
                for (g, a) in gram.iter_mut().zip(row) {
                    g.iter_mut().zip(row).for_each(|(g, b)| *g += a * b);
                }
            }
            let best: f64 = eigenvalues(gram)[..slot.rank].iter().sum();
            let share = |rows: &[&[f32]], x: &[Vec<f64>]| {
                x.iter().flat_map(|x| rows.iter().map(|a| dot(a, x).powi(2))).sum::<f64>()
            };
            let captured = share(&rows, &x) / best;
            // Any four directions, to see that the measure tells.
            let mut rng = Rng::new(9, 9);
            let random: Vec<f32> = (0..slot.inputs).map(|_| rng.normal()).collect();
            let size = random.iter().map(|v| v * v).sum::<f32>().sqrt();
            let random: Vec<f32> = random.iter().map(|v| v / size).collect();
            let by_chance = share(&[&random], &x) * slot.rank as f64 / best;
            eprintln!("{} {proj:?} {layer}: {captured} of the best, {by_chance} by chance", spec.name);
            assert!((0.99..1.0 + 1e-6).contains(&captured), "{} {proj:?}: {captured}", spec.name);
            assert!(by_chance < 0.8, "{by_chance}");
        }
        // Rows without a target do not count: with them the best would be another.
        assert!(inputs(&model, 0, 0, false).len() > inputs(&model, 0, 0, true).len());
        assert_eq!(adapter.meta.init, Init::Eva);
    }
    Ok(())
}

#[test]
fn the_model_begins_as_its_base_for_any_number_of_threads() -> TestResult {
    for spec in [&SHORT_BLOCKS, &LONG_BLOCKS] {
        let model = spec.model();
        for dora in [false, true] {
            let adapter = begun(&model, dora, 1)?;
            assert!(adapter == begun(&model, dora, 3)?, "{}: the bits depend on threads", spec.name);
            let kernels = Arc::new(Kernels::detect(1));
            let request = request(model.config(), &adapter, 1, 60, 1);
            let words = ArenaWords::new(model.config(), &request);
            let mut chain = Chain::new(model.clone(), kernels, Precision::Int8, words);
            let gains = vec![1.0; adapter.layout.rows()];
            let view = AdapterView {
                layout: &adapter.layout,
                theta: &adapter.theta,
                config: &adapter.config,
                gains: &gains,
            };
            for batch in batches(&model) {
                let base = chain.evaluate(None, &batch, |_, _| {});
                assert_eq!(chain.evaluate(Some(&view), &batch, |_, _| {}), base);
            }
        }
    }
    Ok(())
}

#[test]
fn files_tell_how_a_began() -> TestResult {
    let model = SHORT_BLOCKS.model();
    let adapter = begun(&model, false, 1)?;
    let folder = tempfile::tempdir()?;
    adapter.save(&Disk, folder.path(), Stored::F32)?;
    assert!(Adapter::load(folder.path())? == adapter);
    let theirs = folder.path().join("peft");
    peft::export(&Disk, &theirs, &adapter.to_exchange(), model.config(), Stored::F32)?;
    let text = std::fs::read_to_string(theirs.join(peft::CONFIG_FILE))?;
    let settings: serde_json::Value = serde_json::from_str(&text)?;
    assert_eq!(settings["init_lora_weights"], "eva");
    let back = peft::import(&theirs, model.config())?;
    assert_eq!(back.exchange.init, Init::Eva);
    Ok(())
}

#[test]
fn what_cannot_begin_so_is_refused() -> TestResult {
    use engraft_runtime::ErrorKind::{BadData, Misuse};
    let model = FLOATS.model();
    let c = model.config();
    let kernels = Arc::new(Kernels::detect(1));
    let begin = |rank: usize, batches: &[Batch]| {
        let config = LoraConfig::new(c, rank, 8.0, 0.0, &[Proj::Q], &[0]).expect("settings");
        let mut adapter = Adapter::init_on(&model, &kernels, &config, &mut || 0.25).expect("an adapter");
        eva::initialize(&mut adapter, &model, &kernels, Precision::F32, batches, 0, |_| Ok(()))
            .map_err(|e| e.kind())
    };
    assert_eq!(begin(45, &batches(&model)), Err(Misuse), "more directions than inputs");
    assert_eq!(begin(44, &batches(&model)), Ok(()));
    let mut silent = batches(&model);
    silent.iter_mut().for_each(|b| b.targets.fill(NO_TARGET));
    assert_eq!(begin(4, &silent), Err(BadData));
    assert_eq!(begin(4, &[]), Err(BadData));
    Ok(())
}

#[test]
fn a_walk_stops_within_a_block_when_told() {
    use engraft_runtime::{Error, ErrorKind};
    let model = FLOATS.model();
    let kernels = Arc::new(Kernels::detect(1));
    let blocks = model.config().n_layers;
    let begin = |calls_max: usize| {
        let mut adapter =
            Adapter::init_on(&model, &kernels, &config(&model, false), &mut || 0.25).expect("an adapter");
        let mut told = Vec::new();
        let go_on = |done| {
            told.push(done);
            match told.len() < calls_max {
                true => Ok(()),
                false => Err(Error::new(ErrorKind::Cancelled, "told to stop")),
            }
        };
        let ended =
            eva::initialize(&mut adapter, &model, &kernels, Precision::F32, &batches(&model), 0, go_on);
        (ended.map_err(|e| e.kind()), told)
    };
    let (ended, told) = begin(usize::MAX);
    // Each block: three batches, then q with k and v, o, gate with up, down.
    assert_eq!((ended, told.len()), (Ok(()), blocks * 7));
    assert!(told.is_sorted() && told.last() == Some(&(blocks - 1)));
    for calls in [1, 2, 4, 8] {
        assert_eq!(begin(calls), (Err(ErrorKind::Cancelled), told[..calls].to_vec()));
    }
}
