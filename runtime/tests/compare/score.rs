//! Losses and divergences of a sequence against those of the training chain, which reads rows whole.

use std::sync::Arc;

use engraft_kernels::Kernels;
use engraft_runtime::adapter::{Adapter, Gains};
use engraft_runtime::compare::score::{Subject, common_prefix};
use engraft_runtime::data::batches::in_order;
use engraft_runtime::data::{Batch, Example};
use engraft_runtime::eval::scoring_chain;
use engraft_runtime::generate::StackedAdapter;
use engraft_runtime::model::Proj;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::Precision;
use engraft_runtime::nn::divergence::{Compared, Direction};
use engraft_runtime::rng::Rng;
use engraft_runtime::train::chain::AdapterView;

use super::Quiet;
use crate::common::models::{FLOATS, LONG_BLOCKS, SHORT_BLOCKS, Spec};
use crate::common::{TestResult, adapter, adapter_of, comparing_chain};

/// Relative bounds of a row's loss beside the chain's: a sequence keeps keys and values in f16, the chain in f32,
/// and int8 rounds each block of an activation anew.
const F32_LOSS: f64 = 1e-3;
const INT8_LOSS: f64 = 1e-2;
/// The same of a row with what is common read before, beside the row alone: sums in another order, whose last
/// digit f16 may round to another key or value, and int8 to another code.
const F32_PREFIX: f64 = 1e-4;
const INT8_PREFIX: f64 = 1e-3;

/// Rows that begin alike for `prefix` ids, none of which is a target; the rest is noise, of other lengths
/// each.
fn rows(vocab: usize, prefix: usize, rng: &mut Rng) -> Vec<Example> {
    let mut id = || rng.below(vocab as u64) as u32;
    let begin: Vec<u32> = (0..prefix).map(|_| id()).collect();
    let lengths = [9, 2, 33, 5];
    let own = lengths.map(|n| (0..n).map(|_| id()).collect::<Vec<u32>>());
    let row = |(i, own): (usize, &Vec<u32>)| {
        let ids: Vec<u32> = begin.iter().chain(own).copied().collect();
        let last = ids.len() - 1;
        let mask = (0..ids.len()).map(|at| at > prefix && (at == last || (at + i) % 3 > 0)).collect();
        Example { ids, mask }
    };
    own.iter().enumerate().map(row).collect()
}

fn tuned(model: &ModelFile, dora: bool) -> Adapter {
    let layers: Vec<usize> = (0..model.config().n_layers).collect();
    let config = adapter(model, 4, &Proj::ALL, &layers, 0.0).config;
    adapter_of(model, &engraft_runtime::adapter::LoraConfig { dora, ..config })
}

fn stacked(model: &Arc<ModelFile>, kernels: &Kernels, adapter: &Adapter) -> Arc<StackedAdapter> {
    Arc::new(StackedAdapter::new(model, kernels, &[(adapter.clone(), 1.0)]).expect("it fits"))
}

fn subject(spec: &Spec, precision: Precision) -> (Arc<ModelFile>, Subject) {
    let model = spec.model();
    let kernels = Arc::new(Kernels::detect(1));
    (model.clone(), Subject { weights: model.into(), adapter: None, kernels, precision })
}

/// What the chain makes of each row alone, with an adapter.
fn by_chain(model: &Arc<ModelFile>, subject: &Subject, own: &Adapter, rows: &[Example]) -> Vec<(f64, usize)> {
    let longest = rows.iter().map(Example::rows).max().expect("rows");
    let mut chain = scoring_chain(model.clone(), subject.kernels.clone(), subject.precision, 4, longest);
    let mut gains = Gains::new(model, &subject.kernels, &own.layout, chain.kernel_scratch());
    let of = (&own.layout, &own.config);
    gains.refresh(model, &subject.kernels, of, &own.theta, chain.gain_scratch(true));
    let view = AdapterView { layout: &own.layout, theta: &own.theta, config: &own.config, gains: gains.c() };
    let one = |batch: Batch| {
        let found = chain.evaluate(Some(&view), &batch, |_, _| {});
        (found.loss_sum, found.targets)
    };
    in_order(rows, 1).map(one).collect()
}

#[test]
fn losses_are_those_of_the_chain_with_a_shared_prefix_and_without() -> TestResult {
    for (spec, dora) in [(&SHORT_BLOCKS, false), (&LONG_BLOCKS, false), (&FLOATS, true)] {
        for (precision, bound, near) in
            [(Precision::F32, F32_LOSS, F32_PREFIX), (Precision::Int8, INT8_LOSS, INT8_PREFIX)]
        {
            let (model, plain) = subject(spec, precision);
            let own = tuned(&model, dora);
            let subject = Subject { adapter: Some(stacked(&model, &plain.kernels, &own)), ..plain.clone() };
            for prefix in [0, 1, 20] {
                let rows = rows(spec.vocab, prefix, &mut Rng::new(3, prefix as u64));
                let expected = by_chain(&model, &subject, &own, &rows);
                let found = subject.losses(&rows, &mut Quiet::default())?;
                assert_eq!(found.prefix_tokens, common_prefix(&rows));
                assert!(found.prefix_tokens >= prefix, "what is common is read once");
                let positions: usize = rows.iter().map(|r| r.rows() - found.prefix_tokens).sum();
                assert_eq!(found.tokens, positions);
                for (i, (row, (sum, targets))) in rows.iter().zip(&expected).enumerate() {
                    let place = format!("{} {precision:?}, prefix {prefix}, row {i}", spec.name);
                    let alone = subject.losses(std::slice::from_ref(row), &mut Quiet::default())?;
                    assert_eq!(alone.prefix_tokens, 0);
                    let (one, alone) = (found.nll[i], alone.nll[0]);
                    assert_eq!((one.targets, alone.targets), (*targets, *targets), "{place}");
                    assert!((one.sum / sum - 1.0).abs() < bound, "{place}: {} for {sum}", one.sum);
                    assert!(
                        (one.sum / alone.sum - 1.0).abs() < near,
                        "{place}: {} for {}",
                        one.sum,
                        alone.sum
                    );
                }
                // The control: another model's losses are seen to differ.
                let base = plain.losses(&rows, &mut Quiet::default())?;
                let far = |(a, b): (&engraft_runtime::gate::verdict::ExampleNll, &(f64, usize))| {
                    (a.sum / b.0 - 1.0).abs() > bound
                };
                assert!(base.nll.iter().zip(&expected).any(far), "{}: the adapter was not seen", spec.name);
            }
        }
    }
    Ok(())
}

#[test]
fn a_model_beside_its_base_is_as_far_as_the_chain_says() -> TestResult {
    for spec in [&SHORT_BLOCKS, &LONG_BLOCKS, &FLOATS] {
        let (model, base) = subject(spec, Precision::F32);
        let own = tuned(&model, false);
        let tuned = Subject { adapter: Some(stacked(&model, &base.kernels, &own)), ..base.clone() };
        let rows = rows(spec.vocab, 6, &mut Rng::new(5, 0));
        let longest = rows.iter().map(Example::rows).max().expect("rows");
        let mut chain = comparing_chain(&model, &base.kernels, Precision::F32, longest);
        let view = AdapterView { layout: &own.layout, theta: &own.theta, config: &own.config, gains: &[] };
        let mut expected = Compared::default();
        in_order(&rows, 1).for_each(|batch| expected += chain.compare(&view, &batch, |_, _| {}));
        let found = tuned.beside(&base, &rows, &mut Quiet::default())?;
        assert_eq!(found.targets, expected.targets);
        assert!((found.loss / expected.loss - 1.0).abs() < F32_LOSS);
        assert!((found.base_loss / expected.base_loss - 1.0).abs() < F32_LOSS);
        for direction in [Direction::Forward, Direction::Reverse] {
            let (found, expected) = (found.kl(direction), expected.kl(direction));
            eprintln!("{} {direction:?}: {found} for {expected}", spec.name);
            assert!(expected > 1e-3, "the adapter moves nothing");
            assert!((found / expected - 1.0).abs() < 1e-2, "{}: {found} for {expected}", spec.name);
        }
        // Swapped, the directions are swapped.
        let back = base.beside(&tuned, &rows, &mut Quiet::default())?;
        assert!((back.kl(Direction::Forward) / found.kl(Direction::Reverse) - 1.0).abs() < 1e-6);
        // Equal models, whether or not an adapter that does nothing is beside one of them.
        let mut nothing = own.clone();
        let slots: Vec<_> = nothing.layout.slots().collect();
        slots.into_iter().for_each(|(_, _, slot)| nothing.theta[slot.b].fill(0.0));
        let same = Subject { adapter: Some(stacked(&model, &base.kernels, &nothing)), ..base.clone() };
        for equal in [
            tuned.beside(&tuned, &rows, &mut Quiet::default())?,
            same.beside(&base, &rows, &mut Quiet::default())?,
        ] {
            assert_eq!(equal.loss, equal.base_loss);
            assert!(equal.kl(Direction::Forward).abs() < 1e-9 && equal.kl(Direction::Reverse).abs() < 1e-9);
        }
    }
    Ok(())
}

#[test]
fn what_is_no_number_is_told_and_no_panic() -> TestResult {
    let (model, base) = subject(&SHORT_BLOCKS, Precision::F32);
    let rows = rows(SHORT_BLOCKS.vocab, 4, &mut Rng::new(7, 0));
    for broken in [f32::NAN, f32::INFINITY] {
        for precision in [Precision::F32, Precision::Int8] {
            let mut own = tuned(&model, false);
            let (_, _, slot) = own.layout.slots().last().expect("a slot");
            own.theta[slot.b].fill(broken);
            let adapter = Some(stacked(&model, &base.kernels, &own));
            let subject = Subject { adapter, precision, ..base.clone() };
            let found = subject.losses(&rows, &mut Quiet::default())?;
            assert!(found.nll.iter().all(|one| !one.sum.is_finite() && one.targets > 0), "{:?}", found.nll);
            let plain = Subject { precision, ..base.clone() };
            let beside = subject.beside(&plain, &rows, &mut Quiet::default())?;
            assert!(!beside.loss.is_finite() && !beside.kl(Direction::Reverse).is_finite());
            assert!(beside.base_loss.is_finite());
        }
    }
    Ok(())
}

#[test]
fn a_stop_is_heard_while_rows_are_scored() {
    let (_, base) = subject(&SHORT_BLOCKS, Precision::F32);
    let rows = rows(SHORT_BLOCKS.vocab, 4, &mut Rng::new(7, 0));
    let stop = || Quiet { stop_after: Some(0), ..Quiet::default() };
    let kind = engraft_runtime::ErrorKind::Cancelled;
    assert_eq!(base.losses(&rows, &mut stop()).unwrap_err().kind(), kind);
    assert_eq!(base.beside(&base, &rows, &mut stop()).unwrap_err().kind(), kind);
}
