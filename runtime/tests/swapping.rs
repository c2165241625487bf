//! Adapters swapped between tokens: each token is computed with exactly one published set, and sequences
//! beside it notice nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::common::models::{FLOATS, SHORT_BLOCKS};
use crate::common::{TestResult, adapter, adapter_of};
use engraft_kernels::{Kernels, KvType};
use engraft_runtime::ErrorKind;
use engraft_runtime::adapter::LoraConfig;
use engraft_runtime::generate::{AdapterSlot, Sequence, StackedAdapter};
use engraft_runtime::model::Proj;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::Precision;

/// Tokens of a sequence.
const TOKENS: usize = 48;
/// Sequences that generate side by side.
const SESSIONS: usize = 4;
/// Swaps while they do.
const SWAPS: u64 = 1_500;

/// Two sets: a LoRA, and a scaled DoRA beside another LoRA, whose ranks together are larger.
fn sets(model: &ModelFile) -> [Arc<StackedAdapter>; 2] {
    let layers: Vec<usize> = (0..model.config().n_layers).collect();
    let lora = adapter(model, 4, &Proj::ALL, &layers, 0.0);
    let dora = adapter_of(model, &LoraConfig { dora: true, ..lora.config.clone() });
    let small = adapter(model, 3, &[Proj::Q, Proj::Down], &layers, 0.0);
    let stack = |all: &[_]| Arc::new(StackedAdapter::new(model, &Kernels::detect(1), all).expect("they fit"));
    [stack(&[(lora, 1.0)]), stack(&[(dora, 0.7), (small, -1.5)])]
}

fn sequence(model: &Arc<ModelFile>, adapters: Option<Arc<StackedAdapter>>) -> Sequence {
    let kernels = Arc::new(Kernels::detect(1));
    Sequence::new(model.clone(), kernels, adapters, Precision::Int8, TOKENS, KvType::F16).expect("a sequence")
}

/// A token, the generation it was computed with, and the logits of what follows, to the bit.
#[derive(Clone, Debug, PartialEq)]
struct Step {
    id: u32,
    generation: u64,
    logits: Vec<u32>,
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|v| v.to_bits()).collect()
}

fn likeliest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(id, _)| id as u32)
}

/// Sequences from one start, until `done`.
fn generate(
    model: &Arc<ModelFile>,
    slot: &Arc<AdapterSlot>,
    start: u32,
    done: &AtomicBool,
) -> Vec<Vec<Step>> {
    let mut sequence = sequence(model, None);
    sequence.follow(slot.clone());
    let mut all = Vec::new();
    while !done.load(Ordering::Relaxed) || all.is_empty() {
        sequence.truncate(0);
        let (mut id, mut steps) = (start, Vec::new());
        for _ in 0..TOKENS {
            let logits = sequence.feed(&[id]).expect("room");
            let (next, logits) = (likeliest(logits), bits(logits));
            steps.push(Step { id, generation: sequence.generation().expect("a slot"), logits });
            id = next;
        }
        // Enough to check, without keeping all of a fast machine's.
        if all.len() < 40 {
            all.push(steps);
        }
    }
    all
}

#[test]
fn every_token_is_of_one_published_set_while_others_are_swapped_in() {
    let model = SHORT_BLOCKS.model();
    let sets = sets(&model);
    let slot = Arc::new(AdapterSlot::new(Some(sets[0].clone())));
    let (done, ready) = (AtomicBool::new(false), AtomicUsize::new(0));
    let made: Vec<Vec<Vec<Step>>> = std::thread::scope(|scope| {
        let (model, slot, done, ready) = (&model, &slot, &done, &ready);
        let workers: Vec<_> = (0..SESSIONS)
            .map(|i| {
                scope.spawn(move || {
                    ready.fetch_add(1, Ordering::SeqCst);
                    generate(model, slot, 7 + i as u32, done)
                })
            })
            .collect();
        while ready.load(Ordering::SeqCst) < SESSIONS {
            std::thread::yield_now();
        }
        for swap in 1..=SWAPS {
            assert_eq!(slot.swap(Some(sets[swap as usize % 2].clone())), swap);
            std::thread::sleep(Duration::from_micros(100));
        }
        done.store(true, Ordering::Relaxed);
        workers.into_iter().map(|w| w.join().expect("no panic")).collect()
    });
    let (mut mixed, mut tokens) = (0, 0);
    let mut alone = sequence(&model, None);
    for steps in made.iter().flatten() {
        alone.truncate(0);
        for (i, step) in steps.iter().enumerate() {
            let set = &sets[step.generation as usize % 2];
            alone.set_adapters(Some(set.clone())).expect("it fits");
            let logits = alone.feed(&[step.id]).expect("room");
            assert_eq!(bits(logits), step.logits, "token {i} of generation {}", step.generation);
            assert!(steps.get(i + 1).is_none_or(|next| next.id == likeliest(logits)));
        }
        assert!(steps.is_sorted_by_key(|s| s.generation), "a sequence never goes back");
        mixed += usize::from(steps[0].generation != steps[TOKENS - 1].generation);
        tokens += steps.len();
    }
    println!("{tokens} tokens checked, {mixed} sequences saw a swap");
    assert!(mixed > 0, "no sequence saw a swap: nothing was tested");
    // The control: the other set gives other logits.
    alone.truncate(0);
    let first = &made[0][0][0];
    alone.set_adapters(Some(sets[1 - first.generation as usize % 2].clone())).expect("it fits");
    assert_ne!(bits(alone.feed(&[first.id]).expect("room")), first.logits);
}

#[test]
fn a_swap_counts_from_the_next_token_and_for_one_session_only() -> TestResult {
    let model = SHORT_BLOCKS.model();
    let [a, b] = sets(&model);
    let (mut one, mut two) = (sequence(&model, Some(a.clone())), sequence(&model, Some(a.clone())));
    let prompt = [5, 6, 7, 8];
    assert_eq!(bits(one.feed(&prompt)?), bits(two.feed(&prompt)?));
    one.set_adapters(Some(b.clone()))?;
    assert_ne!(bits(one.feed(&[9])?), bits(two.feed(&[9])?));
    let mut undisturbed = sequence(&model, Some(a.clone()));
    undisturbed.feed(&prompt)?;
    undisturbed.feed(&[9])?;
    assert_eq!(bits(two.feed(&[10])?), bits(undisturbed.feed(&[10])?));

    // What was read before the swap stays as it was, until it is read anew.
    let mut fresh = sequence(&model, Some(b.clone()));
    let whole = bits(fresh.feed(&[5, 6, 7, 8, 9])?);
    one.truncate(4);
    assert_ne!(bits(one.feed(&[9])?), whole);
    assert_eq!(bits(one.refresh()?), whole);
    assert_eq!((one.len(), one.room()), (5, TOKENS - 5));
    assert_eq!(bits(one.feed(&[10])?), bits(fresh.feed(&[10])?));
    // The base alone is a set like others.
    one.set_adapters(None)?;
    let mut base = sequence(&model, None);
    base.feed(&[5, 6, 7, 8, 9, 10])?;
    one.refresh()?;
    assert_eq!(bits(one.feed(&[11])?), bits(base.feed(&[11])?));
    assert_eq!(sequence(&model, None).refresh().expect_err("nothing was read").kind(), ErrorKind::Misuse);
    Ok(())
}

#[test]
fn a_prompt_is_read_with_one_set_and_a_slot_may_be_left() -> TestResult {
    let model = SHORT_BLOCKS.model();
    let [a, b] = sets(&model);
    let slot = Arc::new(AdapterSlot::new(None));
    let mut followed = sequence(&model, None);
    followed.follow(slot.clone());
    assert_eq!(followed.generation(), None);
    followed.feed(&[1, 2])?;
    assert_eq!(followed.generation(), Some(0));
    assert_eq!(slot.swap(Some(a.clone())), 1);
    assert_eq!(slot.swap(Some(b.clone())), 2);
    assert_eq!((slot.load().generation, followed.generation()), (2, Some(0)));
    followed.feed(&[3])?;
    assert_eq!(followed.generation(), Some(2));
    followed.set_adapters(Some(a))?;
    slot.swap(None);
    let mut own = sequence(&model, slot.load().adapters.clone());
    assert_ne!(bits(followed.refresh()?), bits(own.feed(&[1, 2, 3])?));
    assert_eq!(followed.generation(), None);
    Ok(())
}

#[test]
fn adapters_of_another_model_are_refused_and_the_old_ones_stay() -> TestResult {
    let (model, other) = (SHORT_BLOCKS.model(), FLOATS.model());
    let [a, _] = sets(&model);
    let [foreign, _] = sets(&other);
    let mut used = sequence(&model, Some(a.clone()));
    let expected = bits(used.feed(&[1, 2])?);
    let refused = used.set_adapters(Some(foreign.clone())).expect_err("other shapes");
    assert_eq!(refused.kind(), ErrorKind::BaseMismatch);
    used.truncate(0);
    assert_eq!(bits(used.feed(&[1, 2])?), expected);
    used.follow(Arc::new(AdapterSlot::new(Some(foreign))));
    assert_eq!(used.feed(&[3]).expect_err("other shapes").kind(), ErrorKind::BaseMismatch);
    assert_eq!(used.len(), 2);
    Ok(())
}
