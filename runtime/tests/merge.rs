//! Merging: exact where the type is, faithful in blocks, and everything else byte for byte.

use std::sync::Arc;

use crate::common::TestResult;
use crate::common::models::{FLOATS, LONG_BLOCKS, SHORT_BLOCKS, Spec};
use engraft_kernels::{DType, Kernels, KvType};
use engraft_runtime::ErrorKind;
use engraft_runtime::adapter::exchange::Exchange;
use engraft_runtime::data::Example;
use engraft_runtime::generate::{Sequence, StackedAdapter};
use engraft_runtime::merge::{self, judge::Judge};
use engraft_runtime::model::Proj;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::Precision;
use engraft_runtime::storage::Disk;

const IDS: [u32; 9] = [3, 1, 4, 15, 9, 26, 5, 35, 8];

fn last_logits(model: &Arc<ModelFile>, adapter: Option<Arc<StackedAdapter>>) -> Vec<f32> {
    let kernels = Arc::new(Kernels::detect(1));
    let sequence = Sequence::new(model.clone(), kernels, adapter, Precision::F32, IDS.len(), KvType::F32);
    sequence.expect("a sequence").feed(&IDS).expect("logits").to_vec()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |m, (a, b)| m.max((a - b).abs()))
}

struct Merged {
    model: Arc<ModelFile>,
    beside: Arc<StackedAdapter>,
    merged: Arc<ModelFile>,
}

fn merged(spec: &Spec, dtype: Option<DType>, targets: &[Proj]) -> Merged {
    let model = spec.model();
    let mut adapter = crate::common::adapter(&model, 3, targets, &[0, 1], 0.0);
    // A larger effect, so that logits differ well beyond the comparison's bounds.
    adapter.config.alpha *= 2.0;
    let folder = tempfile::tempdir().expect("a folder");
    let done = merge::write(&Disk, folder.path(), "m.gguf", &model, &adapter.to_exchange(), dtype);
    let merged = ModelFile::open(done.expect("merging").path).expect("a good model");
    let beside =
        Arc::new(StackedAdapter::new(&model, &Kernels::detect(1), &[(adapter, 1.0)]).expect("it fits"));
    Merged { model, beside, merged: Arc::new(merged) }
}

#[test]
fn merged_in_f32_is_the_adapter() {
    for spec in [&FLOATS, &SHORT_BLOCKS, &LONG_BLOCKS] {
        let m = merged(spec, Some(DType::F32), &Proj::ALL);
        let beside = last_logits(&m.model, Some(m.beside));
        let distance = worst(&beside, &last_logits(&m.merged, None));
        let effect = worst(&beside, &last_logits(&m.model, None));
        println!("{}: {distance:e} of {effect}", spec.name);
        assert!(distance < 1e-5 * (1.0 + beside.iter().fold(0.0, |m, v| v.abs().max(m))), "{}", spec.name);
        assert!(effect > 100.0 * distance, "{}: {effect}", spec.name);
    }
}

#[test]
fn what_is_not_adapted_stays_byte_for_byte() {
    for spec in [&FLOATS, &SHORT_BLOCKS, &LONG_BLOCKS] {
        let m = merged(spec, None, &[Proj::V, Proj::Down]);
        let (old, new) = (m.model.gguf(), m.merged.gguf());
        assert_eq!(old.entries().len(), new.entries().len());
        for (a, b) in old.entries().iter().zip(new.entries()) {
            assert_eq!(
                (&a.key, &m.model.bytes()[a.range.clone()]),
                (&b.key, &m.merged.bytes()[b.range.clone()])
            );
        }
        for (a, b) in old.tensors().iter().zip(new.tensors()) {
            assert_eq!((&a.name, a.dtype, &a.dims), (&b.name, b.dtype, &b.dims));
            let adapted = ["blk.0.", "blk.1."].iter().any(|p| a.name.starts_with(p))
                && ["attn_v.weight", "ffn_down.weight"].iter().any(|s| a.name.ends_with(s));
            let same = m.model.bytes()[a.range.clone()] == m.merged.bytes()[b.range.clone()];
            assert_eq!(same, !adapted, "{}", a.name);
        }
    }
}

#[test]
fn magnitudes_scale_the_merged_rows() -> TestResult {
    let model = FLOATS.model();
    let mut exchange: Exchange = crate::common::adapter(&model, 2, &[Proj::O], &[0], 0.0).to_exchange();
    let folder = tempfile::tempdir()?;
    exchange.dora = true;
    exchange.modules[0].magnitude = Some((0..44).map(|i| 0.5 + i as f32).collect());
    let done = merge::write(&Disk, folder.path(), "m.gguf", &model, &exchange, Some(DType::F32))?;
    let merged = ModelFile::open(done.path)?;
    let w = merged.block(0).proj(Proj::O);
    for r in 0..44 {
        let row = w.row(r).as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b)));
        let norm = row.map(|v| v * v).sum::<f64>().sqrt();
        assert!((norm - 0.5 - r as f64).abs() < 1e-5 * (r + 1) as f64, "{r}: {norm}");
    }
    Ok(())
}

#[test]
fn a_type_that_does_not_divide_rows_is_refused() {
    let model = SHORT_BLOCKS.model();
    let exchange = crate::common::adapter(&model, 2, &[Proj::Down], &[0], 0.0).to_exchange();
    let folder = tempfile::tempdir().expect("a folder");
    let error = merge::write(&Disk, folder.path(), "m.gguf", &model, &exchange, Some(DType::Q4_K));
    let error = error.expect_err("rows of 160");
    assert_eq!(error.kind(), ErrorKind::Misuse);
    assert!(error.message().contains("ffn_down") && error.message().contains("256"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).expect("listing").count(), 0);
}

#[test]
fn the_measure_tells_faithful_from_erased() -> TestResult {
    let examples = [Example { ids: IDS.to_vec(), mask: (0..IDS.len()).map(|i| i > 0).collect() }];
    let kernels = Arc::new(Kernels::detect(1));
    let judge = |m: &Merged, merged: &Arc<ModelFile>| {
        Judge::new(&m.model, m.beside.clone(), merged, &kernels, Precision::F32, IDS.len())?
            .score(&examples, |_| true)
    };
    let m = merged(&LONG_BLOCKS, Some(DType::F32), &Proj::ALL);
    let faithful = judge(&m, &m.merged)?;
    assert_eq!(faithful.tokens, IDS.len() - 1);
    assert!(faithful.kl_merged < 1e-8 && faithful.loss().abs() < 1e-5, "{faithful:?}");
    assert!(faithful.kl_base > 1e-3 && !faithful.is_lost(), "{faithful:?}");
    // The base passed off as the merged model: everything is lost.
    let erased = judge(&m, &m.model)?;
    assert!((erased.kl_merged - erased.kl_base).abs() < 1e-12);
    assert!(erased.is_lost(), "{erased:?}");
    let blocks = merged(&LONG_BLOCKS, None, &Proj::ALL);
    let stored = judge(&blocks, &blocks.merged)?;
    println!("requantized: {stored:?}");
    assert!(stored.kl_merged > faithful.kl_merged);
    Ok(())
}
