//! Several sequences at once: what each of them says is what it would say alone.

use std::path::Path;
use std::sync::Arc;

use crate::common::models::{FLOATS, LONG_BLOCKS, SHORT_BLOCKS};
use crate::common::{TestResult, adapter};
use engraft_kernels::{Kernels, KvType};
use engraft_runtime::ErrorKind;
use engraft_runtime::generate::batch::{CYCLE_TOKENS, is_cycle};
use engraft_runtime::generate::replay::complete;
use engraft_runtime::generate::{Prefix, Sampler, SamplerOptions, Sequence, Sequences, StackedAdapter};
use engraft_runtime::model::Proj;
use engraft_runtime::model::chat::{Message, encode_pieces};
use engraft_runtime::model::text::Text;
use engraft_runtime::model::tuned::{TunedModel, Weights};
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::Precision;
use engraft_runtime::rng::Rng;

/// A model with or without adapters, and how it computes.
#[derive(Clone)]
struct Arm {
    model: Weights,
    adapters: Option<Arc<StackedAdapter>>,
    precision: Precision,
    cache: KvType,
}

impl Arm {
    fn of(model: impl Into<Weights>) -> Arm {
        Arm { model: model.into(), adapters: None, precision: Precision::F32, cache: KvType::F32 }
    }

    fn adapted(model: &Arc<ModelFile>) -> Arm {
        let layers: Vec<usize> = (0..model.config().n_layers).collect();
        let one = adapter(model, 4, &Proj::ALL, &layers, 0.0);
        let stacked = StackedAdapter::new(model, &Kernels::detect(1), &[(one, 1.0)]).expect("it fits");
        Arm { adapters: Some(Arc::new(stacked)), ..Arm::of(model.clone()) }
    }

    fn prefix(&self, ids: &[u32]) -> Arc<Prefix> {
        let kernels = Arc::new(Kernels::detect(2));
        let (model, adapters) = (self.model.clone(), self.adapters.clone());
        Arc::new(Prefix::read(model, kernels, adapters, self.precision, self.cache, ids).expect("a prefix"))
    }

    fn batch(&self, threads: usize, prefix: &Arc<Prefix>, slots: usize, capacity: usize) -> Sequences {
        let kernels = Arc::new(Kernels::detect(threads));
        let (model, adapters) = (self.model.clone(), self.adapters.clone());
        Sequences::new(model, kernels, adapters, self.precision, prefix.clone(), slots, capacity)
            .expect("a sequence")
    }

    /// What a sequence says to each prompt alone, cut where a batch would.
    fn alone(
        &self,
        prefix: &[u32],
        prompts: &[Vec<u32>],
        capacity: usize,
        limit: usize,
        is_end: impl Fn(u32) -> bool,
    ) -> TestResult<Vec<Vec<u32>>> {
        let kernels = Arc::new(Kernels::detect(1));
        let (model, adapters) = (self.model.clone(), self.adapters.clone());
        let room = prefix.len() + capacity;
        let mut sequence = Sequence::new(model, kernels, adapters, self.precision, room, self.cache)?;
        let mut sampler = Sampler::new(SamplerOptions::greedy())?;
        let mut answers = Vec::new();
        for prompt in prompts {
            let whole = [prefix, prompt].concat();
            let mut answer = complete(&mut sequence, &mut sampler, &whole, limit, &is_end, |_| true)?;
            let cut = (CYCLE_TOKENS..answer.len()).find(|n| is_cycle(&answer[..*n]));
            answer.truncate(cut.unwrap_or(answer.len()));
            answers.push(answer);
        }
        Ok(answers)
    }
}

fn ids(rng: &mut Rng, n: usize, vocab: usize) -> Vec<u32> {
    (0..n).map(|_| rng.below(vocab as u64) as u32).collect()
}

/// Prompts of ragged lengths, some of them longer than a part that is read at once.
fn ragged(rng: &mut Rng, vocab: usize) -> Vec<Vec<u32>> {
    [3, 1, 40, 7, 260, 1, 12, 2, 5, 33].map(|n| ids(rng, n, vocab)).to_vec()
}

const CAPACITY: usize = 300;
const LIMIT: usize = 30;

#[test]
fn sequences_say_what_each_says_alone() -> TestResult {
    for spec in [&SHORT_BLOCKS, &LONG_BLOCKS, &FLOATS] {
        let model = spec.model();
        let mut rng = Rng::new(3, 3);
        let vocab = model.config().vocab;
        let prompts = ragged(&mut rng, vocab);
        let tuned = Arc::new(TunedModel::new(model.clone(), &Kernels::detect(1)));
        for (name, arm) in
            [("base", Arm::of(model.clone())), ("adapter", Arm::adapted(&model)), ("tuned", Arm::of(tuned))]
        {
            for before in [0, 60] {
                let first = ids(&mut rng, before, vocab);
                let is_end = |id: u32| id % 97 == 5;
                let expected = arm.alone(&first, &prompts, CAPACITY, LIMIT, is_end)?;
                assert!(expected.concat().len() > 100, "{}: {expected:?} end at once", spec.name);
                let prefix = arm.prefix(&first);
                for (slots, threads) in [(1, 1), (5, 2), (9, 2)] {
                    let mut batch = arm.batch(threads, &prefix, slots, CAPACITY);
                    let answers = batch.complete(&prompts, LIMIT, is_end, |_| true)?;
                    assert_eq!(answers, expected, "{} {name}, prefix {before}, {slots} slots", spec.name);
                    // Nothing of a run is left in the next.
                    let again = batch.complete(&prompts[3..5], LIMIT, is_end, |_| true)?;
                    assert_eq!(again, expected[3..5]);
                }
                if before > 0 && name == "base" {
                    let mut other = first.clone();
                    other[30] = (other[30] + 1) % vocab as u32;
                    let other = arm.batch(1, &arm.prefix(&other), 5, CAPACITY).complete(
                        &prompts,
                        LIMIT,
                        is_end,
                        |_| true,
                    )?;
                    assert_ne!(other, expected, "{}: another prefix went unnoticed", spec.name);
                }
            }
        }
    }
    Ok(())
}

/// The built-in model, trained, with each type of cache and both precisions.
#[test]
fn a_trained_model_answers_alike_in_any_number_of_slots() -> TestResult {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../targets/cli/seedling.gguf");
    let model = Arc::new(ModelFile::open(file)?);
    let text = Text::of(&model)?;
    let ask = |what: &str| -> TestResult<Vec<u32>> {
        let messages = [Message::new("user", what)];
        let pieces = text.chat.render_messages(&messages, true)?;
        Ok(encode_pieces(&text.tokenizer, &pieces, &messages).0)
    };
    let rooms = ["kitchen", "hall", "bedroom", "garage", "office", "garden"];
    let mut prompts = Vec::new();
    for room in rooms {
        prompts.push(ask(&format!("turn on the lamp in the {room}"))?);
        prompts.push(ask(&format!("please switch the light off, {room}"))?);
    }
    let common = (0..).find(|i| prompts.iter().any(|p| p.get(*i) != prompts[0].get(*i))).unwrap_or(0);
    assert!(common > 0, "the prompts share their beginning");
    let (first, rest) = (prompts[0][..common].to_vec(), prompts.iter().map(|p| p[common..].to_vec()));
    let rest: Vec<Vec<u32>> = rest.collect();
    let is_end = |id| text.tokenizer.is_end(id);
    for (precision, cache) in [
        (Precision::F32, KvType::F32),
        (Precision::F32, KvType::F16),
        (Precision::Int8, KvType::F16),
        (Precision::Int8, KvType::F32),
    ] {
        let arm = Arm { precision, cache, ..Arm::of(model.clone()) };
        let expected = arm.alone(&first, &rest, 128, 60, is_end)?;
        assert!(expected.iter().all(|a| a.len() > 2 && a.last().is_some_and(|id| is_end(*id))));
        for (first, prompts) in [(&first[..], &rest), (&[], &prompts)] {
            for (slots, threads) in [(1, 1), (5, 2), (12, 1), (12, 2)] {
                let mut batch = arm.batch(threads, &arm.prefix(first), slots, 128);
                let answers = batch.complete(prompts, 60, is_end, |_| true)?;
                assert_eq!(answers, expected, "{precision:?} {cache:?}, {slots} slots");
            }
        }
    }
    Ok(())
}

#[test]
fn answers_end_where_they_must() -> TestResult {
    let model = SHORT_BLOCKS.model();
    let arm = Arm::of(model.clone());
    let mut rng = Rng::new(5, 5);
    let prompts: Vec<Vec<u32>> = (0..4).map(|_| ids(&mut rng, 6, 199)).collect();
    let prefix = arm.prefix(&ids(&mut rng, 9, 199));
    // At the limit, one token included that the cache never sees; without a limit's room; when full.
    let mut batch = arm.batch(1, &prefix, 3, 10);
    for (limit, length) in [(0, 0), (1, 1), (3, 3), (5, 5), (100, 5)] {
        let answers = batch.complete(&prompts, limit, |_| false, |_| true)?;
        assert!(answers.iter().all(|a| a.len() == length), "{limit}: {answers:?}");
    }
    assert!(batch.complete(&[], 5, |_| false, |_| true)?.is_empty());
    // The token that ends is the last.
    let first = batch.complete(&prompts, 1, |_| false, |_| true)?;
    let ends: Vec<u32> = first.concat();
    assert_eq!(batch.complete(&prompts, 5, |id| ends.contains(&id), |_| true)?, first);
    // A cycle, after it was seen for CYCLE_TOKENS.
    let long = arm.batch(1, &prefix, 4, 400).complete(&prompts, 390, |_| false, |_| true)?;
    for answer in &long {
        assert!(answer.len() == 390 || is_cycle(answer), "{} tokens", answer.len());
        assert!((0..answer.len()).all(|n| !is_cycle(&answer[..n])), "it went on in a cycle");
    }
    assert!(is_cycle(&[7; CYCLE_TOKENS]) && !is_cycle(&[7; CYCLE_TOKENS - 1]));
    let period = |p: u32| (0..CYCLE_TOKENS as u32).map(|i| i % p).collect::<Vec<_>>();
    assert!(is_cycle(&period(16)) && !is_cycle(&period(17)));
    Ok(())
}

#[test]
fn wrong_input_is_refused() -> TestResult {
    let model = SHORT_BLOCKS.model();
    let arm = Arm::of(model.clone());
    let prefix = arm.prefix(&[1, 2, 3]);
    let mut batch = arm.batch(1, &prefix, 2, 8);
    let mut refused = |prompts: &[Vec<u32>]| {
        let e = batch.complete(prompts, 4, |_| false, |_| panic!("nothing was to be read")).expect_err("bad");
        assert_eq!(e.kind(), ErrorKind::Misuse);
        e.to_string()
    };
    assert!(refused(&[vec![1], vec![2; 9]]).contains("prompt 1 has 9 tokens"));
    assert!(refused(&[vec![1], vec![2], vec![]]).contains("prompt 2 has 0 tokens"));
    assert!(refused(&[vec![1, 199]]).contains("prompt 0: token 199"));
    assert!(refused(&[vec![u32::MAX]]).contains("prompt 0"));
    // Stopped after the second answer of five.
    let prompts = vec![vec![4, 5]; 5];
    let mut told = Vec::new();
    let stop = |done| {
        told.push(done);
        done < 2
    };
    let e = batch.complete(&prompts, 3, |_| false, stop).expect_err("stopped");
    assert_eq!(e.kind(), ErrorKind::Cancelled);
    assert!(told.is_sorted() && told.last() == Some(&2));

    let build = |model: Weights, adapters, precision, prefix: &Arc<Prefix>, slots, capacity| {
        let kernels = Arc::new(Kernels::detect(1));
        Sequences::new(model, kernels, adapters, precision, prefix.clone(), slots, capacity)
            .map_or_else(|e| Some(e.kind()), |_| None)
    };
    let (own, f32) = (Weights::from(model.clone()), Precision::F32);
    let adapted = Arm::adapted(&model);
    let mismatch = Some(ErrorKind::BaseMismatch);
    assert_eq!(build(own.clone(), None, f32, &prefix, 2, 8), None);
    assert_eq!(build(own.clone(), None, f32, &prefix, 0, 8), Some(ErrorKind::Misuse));
    assert_eq!(build(own.clone(), None, f32, &prefix, 2, 0), Some(ErrorKind::Misuse));
    assert_eq!(build(own.clone(), None, Precision::Int8, &prefix, 2, 8), mismatch);
    assert_eq!(build(own.clone(), adapted.adapters.clone(), f32, &prefix, 2, 8), mismatch);
    assert_eq!(build(own.clone(), None, f32, &adapted.prefix(&[1]), 2, 8), mismatch);
    assert_eq!(build(LONG_BLOCKS.model().into(), None, f32, &prefix, 2, 8), mismatch);
    let tuned = Arc::new(TunedModel::new(model.clone(), &Kernels::detect(1)));
    assert_eq!(build(tuned.into(), None, f32, &prefix, 2, 8), mismatch);
    assert_eq!(build(own, adapted.adapters.clone(), f32, &arm.prefix(&[]), 2, 8), None, "of no tokens");
    let read = |ids: &[u32]| {
        let kernels = Arc::new(Kernels::detect(1));
        Prefix::read(model.clone(), kernels, None, f32, KvType::F32, ids)
            .map_or_else(|e| Some(e.kind()), |_| None)
    };
    assert_eq!((read(&[198]), read(&[199])), (None, Some(ErrorKind::Misuse)));
    Ok(())
}

#[test]
fn broken_weights_are_an_error() -> TestResult {
    let model = SHORT_BLOCKS.model();
    let mut tuned = TunedModel::new(model, &Kernels::detect(1));
    tuned.values_mut().fill(f32::NAN);
    let arm = Arm::of(Arc::new(tuned));
    let e = arm
        .batch(1, &arm.prefix(&[]), 2, 8)
        .complete(&[vec![1], vec![2]], 4, |_| false, |_| true)
        .expect_err("no token can be chosen");
    assert_eq!(e.kind(), ErrorKind::NonFinite);
    Ok(())
}
