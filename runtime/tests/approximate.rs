//! The nearest LoRA of a DoRA: held against dense matrices in f64, whose singular values are known.

use std::sync::Arc;

use crate::common::models::{LONG_BLOCKS, SHORT_BLOCKS};
use crate::common::{TestResult, adapter, adapter_of};
use engraft_kernels::{Kernels, KvType, scalar};
use engraft_runtime::ErrorKind;
use engraft_runtime::adapter::approximate::{Approximation, low_rank};
use engraft_runtime::adapter::{Adapter, LoraConfig, Slot};
use engraft_runtime::generate::{Sequence, StackedAdapter};
use engraft_runtime::model::Proj;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::Precision;

fn dora(model: &ModelFile, rank: usize) -> Adapter {
    let layers: Vec<usize> = (0..model.config().n_layers).collect();
    adapter_of(model, &LoraConfig { dora: true, ..adapter(model, rank, &Proj::ALL, &layers, 0.0).config })
}

fn approximate(model: &ModelFile, adapter: &Adapter, rank: usize, threads: usize) -> Approximation {
    low_rank(model, &Kernels::detect(threads), adapter, rank, 1, |_, _| true).expect("a DoRA of this model")
}

/// ΔW `[out, in]` by its definition.
fn dense(model: &ModelFile, adapter: &Adapter, layer: usize, proj: Proj, slot: &Slot) -> Vec<Vec<f64>> {
    let (w, theta) = (model.block(layer).proj(proj), &adapter.theta);
    let scale = f64::from(adapter.config.scale_of(layer, proj));
    let (a, bt) = (&theta[slot.a.clone()], &theta[slot.b.clone()]);
    let mut stored = vec![0.0; slot.inputs];
    (0..slot.outputs)
        .map(|i| {
            scalar::decode::dequantize(w.dtype(), w.row(i), 0, &mut stored);
            let mut row: Vec<f64> = stored.iter().map(|v| f64::from(*v)).collect();
            for j in 0..slot.rank {
                let b = scale * f64::from(bt[j * slot.outputs + i]);
                let a = &a[j * slot.inputs..(j + 1) * slot.inputs];
                row.iter_mut().zip(a).for_each(|(v, a)| *v += b * f64::from(*a));
            }
            let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
            let c = f64::from(theta[slot.m.start + i]) / norm;
            row.iter().zip(&stored).map(|(v, w)| c * v - f64::from(*w)).collect()
        })
        .collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Squared singular values, the largest first: rows are turned against each other until all are orthogonal.
fn squared_singular_values(mut rows: Vec<Vec<f64>>) -> Vec<f64> {
    if rows.len() > rows[0].len() {
        rows = (0..rows[0].len()).map(|j| rows.iter().map(|r| r[j]).collect()).collect();
    }
    for _ in 0..30 {
        let mut turned = false;
        for p in 0..rows.len() {
            for q in p + 1..rows.len() {
                let (a, b, c) = (dot(&rows[p], &rows[p]), dot(&rows[q], &rows[q]), dot(&rows[p], &rows[q]));
                if c.abs() <= 1e-13 * (a * b).sqrt() {
                    continue;
                }
                turned = true;
                let theta = (b - a) / (2.0 * c);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let cos = 1.0 / (t * t + 1.0).sqrt();
                let (head, tail) = rows.split_at_mut(q);
                for (x, y) in head[p].iter_mut().zip(&mut tail[0]) {
                    (*x, *y) = (cos * *x - t * cos * *y, t * cos * *x + cos * *y);
                }
            }
        }
        if !turned {
            break;
        }
    }
    let mut values: Vec<f64> = rows.iter().map(|r| dot(r, r)).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    values
}

#[test]
fn errors_are_the_least_possible_and_are_told_as_they_are() {
    let model = SHORT_BLOCKS.model();
    let adapter = dora(&model, 3);
    let rank = 5;
    let found = approximate(&model, &adapter, rank, 2);
    let mut worst = 0.0_f64;
    for ((layer, proj, slot), (m, told)) in
        adapter.layout.slots().zip(found.exchange.modules.iter().zip(&found.errors))
    {
        assert_eq!((m.layer, m.proj, m.rank), (layer, proj, rank));
        let delta = dense(&model, &adapter, layer, proj, &slot);
        let norm = delta.iter().map(|r| dot(r, r)).sum::<f64>().sqrt();
        let mut left = 0.0;
        for (i, row) in delta.iter().enumerate() {
            for (at, v) in row.iter().enumerate() {
                let product: f64 = (0..rank)
                    .map(|j| f64::from(m.b[i * rank + j]) * f64::from(m.a[j * slot.inputs + at]))
                    .sum();
                left += (v - product).powi(2);
            }
        }
        let least: f64 = squared_singular_values(delta).iter().skip(rank).sum();
        assert!((told.norm - norm).abs() < 1e-4 * norm, "{layer} {proj:?}: {} {norm}", told.norm);
        assert!((told.error - left.sqrt()).abs() < 1e-4 * norm, "{} {}", told.error, left.sqrt());
        worst = worst.max(left.sqrt() / least.sqrt());
    }
    println!("at most {worst} times the least possible error");
    assert!(worst < 1.02, "{worst}");
    assert!(found.relative_error() > 0.1, "the change is of full rank: {}", found.relative_error());
}

#[test]
fn a_change_of_low_rank_is_found_whole() {
    // Magnitudes that keep every gain at exactly 1 leave s·B·A, which is of the adapter's rank.
    let model = LONG_BLOCKS.model();
    let mut adapter = dora(&model, 4);
    for (layer, proj, slot) in adapter.layout.clone().slots() {
        let w = model.block(layer).proj(proj);
        let scale = adapter.config.scale_of(layer, proj);
        let mut row = vec![0.0; slot.inputs];
        for i in 0..slot.outputs {
            scalar::decode::dequantize(w.dtype(), w.row(i), 0, &mut row);
            for j in 0..slot.rank {
                let b = scale * adapter.theta[slot.b.start + j * slot.outputs + i];
                let a = &adapter.theta[slot.a.clone()][j * slot.inputs..(j + 1) * slot.inputs];
                row.iter_mut().zip(a).for_each(|(v, a)| *v += b * a);
            }
            adapter.theta[slot.m.start + i] =
                row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt() as f32;
        }
    }
    let whole = approximate(&model, &adapter, 4, 2).relative_error();
    let less = approximate(&model, &adapter, 3, 2).relative_error();
    assert!(whole < 1e-4 && less > 0.1, "{whole} {less}");
}

#[test]
fn with_every_direction_the_logits_are_those_of_the_dora() -> TestResult {
    let model = SHORT_BLOCKS.model();
    let adapter = dora(&model, 3);
    let logits = |adapter: Option<Adapter>| -> TestResult<Vec<f32>> {
        let kernels = Arc::new(Kernels::detect(1));
        let stacked = adapter.map(|a| StackedAdapter::new(&model, &kernels, &[(a, 1.0)])).transpose()?;
        let adapters = stacked.map(Arc::new);
        let mut sequence = Sequence::new(model.clone(), kernels, adapters, Precision::F32, 8, KvType::F32)?;
        Ok(sequence.feed(&[3, 1, 4, 1, 5])?.to_vec())
    };
    let expected = logits(Some(adapter.clone()))?;
    let distance = |other: &[f32]| expected.iter().zip(other).fold(0.0_f32, |m, (a, b)| m.max((a - b).abs()));
    let mut errors = Vec::new();
    for rank in [1, 4, 16, 64] {
        let found = approximate(&model, &adapter, rank, 2);
        errors.push(found.relative_error());
        let plain = Adapter::from_exchange(model.config(), model.digest(), found.exchange)?;
        assert!(!plain.config.dora);
        let far = distance(&logits(Some(plain))?);
        println!("rank {rank}: relative error {}, logits off by {far}", errors[errors.len() - 1]);
        assert!(rank < 64 || far < 1e-3, "{far}");
    }
    assert!(errors.is_sorted_by(|a, b| a > b) && errors[3] < 1e-5, "{errors:?}");
    assert!(distance(&logits(None)?) > 0.1, "the control");
    Ok(())
}

#[test]
fn a_seed_gives_the_same_bits_on_any_number_of_threads() {
    let model = LONG_BLOCKS.model();
    let adapter = dora(&model, 2);
    let one = approximate(&model, &adapter, 3, 1);
    assert_eq!(one.exchange, approximate(&model, &adapter, 3, 2).exchange);
    let other = low_rank(&model, &Kernels::detect(1), &adapter, 3, 2, |_, _| true).expect("another seed");
    assert_ne!(one.exchange, other.exchange);
}

#[test]
fn what_can_not_be_approximated_is_refused() {
    let model = SHORT_BLOCKS.model();
    let (adapter, kernels) = (dora(&model, 2), Kernels::detect(1));
    let kind = |model: &ModelFile, adapter: &Adapter, rank: usize, go_on: bool| {
        low_rank(model, &kernels, adapter, rank, 0, |_, _| go_on).expect_err("a refusal").kind()
    };
    assert_eq!(kind(&model, &adapter, 0, true), ErrorKind::Misuse);
    assert_eq!(kind(&model, &adapter, 257, true), ErrorKind::Misuse);
    assert_eq!(kind(&model, &adapter, 2, false), ErrorKind::Cancelled);
    assert_eq!(kind(&LONG_BLOCKS.model(), &adapter, 2, true), ErrorKind::BaseMismatch);
    let mut plain = adapter.clone();
    plain.config.dora = false;
    assert_eq!(kind(&model, &plain, 2, true), ErrorKind::Misuse);
}
