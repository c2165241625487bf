//! A run gives back its best step, keeps its budget and its seed, and refuses what does not fit.

use std::sync::Arc;

use engraft_kernels::DType;
use engraft_runtime::ErrorKind;
use engraft_runtime::adapter::Adapter;
use engraft_runtime::compare::material::Material;
use engraft_runtime::compare::recipe::{Base, Budget, Method, Recipe, choose_rank};
use engraft_runtime::compare::run::{Trained, train};
use engraft_runtime::compare::score::Subject;
use engraft_runtime::gate::report::Run;
use engraft_runtime::generate::StackedAdapter;

use super::{Quiet, base_of, household, recipe, subject, text_of};

/// Relative bound of a session's loss, whose keys and values are in f16, beside the trainer's.
const CACHE: f64 = 1e-3;

fn trained(recipe: &Recipe, base: &Base, material: &Material) -> (Trained, Run) {
    let (trained, run, tested) = train(recipe, base, material, None, &mut Quiet::default()).expect("a run");
    assert_eq!(tested.is_none(), recipe.rate.is_some());
    (trained, run)
}

fn adapter_of(recipe: &Recipe, base: &Base, material: &Material) -> (Adapter, Run) {
    match trained(recipe, base, material) {
        (Trained::Adapter(adapter), run) => (*adapter, run),
        (Trained::Full(_), _) => panic!("every weight, where an adapter was asked for"),
    }
}

/// The loss of validation rows, as a scoring session has it.
fn validation(subject: &Subject, material: &Material) -> f64 {
    let found = subject.losses(&material.valid.data.examples, &mut Quiet::default()).expect("losses").nll;
    let targets: usize = found.iter().map(|e| e.targets).sum();
    found.iter().map(|e| e.sum).sum::<f64>() / targets as f64
}

fn with(base: &Base, adapter: Adapter) -> Subject {
    let stacked = StackedAdapter::new(&base.model, &base.kernels, &[(adapter, 1.0)]).expect("it fits");
    Subject { adapter: Some(Arc::new(stacked)), ..subject(base) }
}

/// The lowest validation loss of a curve, and its step.
fn lowest(run: &Run) -> (f64, u64) {
    let points = run.curve.iter().filter_map(|p| Some((p.valid?, p.step)));
    points.min_by(|a, b| a.0.total_cmp(&b.0)).expect("a look")
}

#[test]
fn the_best_step_is_what_comes_back() {
    let base = base_of(2);
    let material = household(&text_of(&base), 5);
    let untrained = validation(&subject(&base), &material);
    let mut best_steps = Vec::new();
    // A rate that helps to the end, one that helps and then harms, and one that only harms.
    for rate in [1e-3, 3e-2, 1.0] {
        let (adapter, run) = adapter_of(&recipe(&base, "lora", rate, Budget::Steps(30)), &base, &material);
        let (loss, step) = lowest(&run);
        assert_eq!((run.best_step, adapter.meta.steps), (step, step), "rate {rate}");
        let found = validation(&with(&base, adapter), &material);
        assert!((found / loss - 1.0).abs() < CACHE, "rate {rate}: {found}, and the curve's lowest is {loss}");
        assert!((run.curve[0].valid.expect("a loss") / untrained - 1.0).abs() < CACHE);
        assert_eq!(
            (run.curve.first().map(|p| p.step), run.curve.last().map(|p| p.step)),
            (Some(0), Some(30))
        );
        best_steps.push(step);
    }
    eprintln!("best steps {best_steps:?}");
    assert!(best_steps[0] > 20 && best_steps[1] < 30, "{best_steps:?}: the last step was always best");
    assert_eq!(best_steps[2], 0, "nothing was better than the base");
}

#[test]
fn full_fine_tuning_gives_its_best_step_too() {
    let base = base_of(2);
    let material = household(&text_of(&base), 5);
    for (rate, helps) in [(3e-4, true), (0.3, false)] {
        let plain = recipe(&base, "full", rate, Budget::Steps(20));
        let full = Recipe { method: Method::Full(Some(DType::F32)), ..plain };
        let (Trained::Full(tuned), run) = trained(&full, &base, &material) else { panic!("an adapter") };
        let (loss, step) = lowest(&run);
        assert_eq!((run.best_step, step > 0), (step, helps), "rate {rate}");
        let found = validation(&Subject { weights: tuned.into(), ..subject(&base) }, &material);
        assert!((found / loss - 1.0).abs() < CACHE, "rate {rate}: {found}, and the curve's lowest is {loss}");
    }
}

#[test]
fn a_run_that_does_not_get_better_ends() {
    let base = base_of(2);
    let material = household(&text_of(&base), 5);
    let harmful = recipe(&base, "lora", 1.0, Budget::Steps(40));
    for patience in [1, 3] {
        let (_, run) = adapter_of(&Recipe { patience, ..harmful.clone() }, &base, &material);
        assert_eq!((run.steps, run.best_step), (4 * patience, 0), "a look after every fourth step");
        assert_eq!(run.ended, format!("no better for {patience} evaluations"));
    }
    let (_, run) = adapter_of(&Recipe { patience: 0, ..harmful }, &base, &material);
    assert_eq!((run.steps, run.ended.as_str()), (40, "all steps done"));
}

#[test]
fn budgets_are_kept() {
    let base = base_of(2);
    let material = household(&text_of(&base), 5);
    let rows = &material.train.data.examples;
    let positions: Vec<u64> = rows.iter().map(|e| e.rows() as u64).collect();
    let of = |budget| adapter_of(&recipe(&base, "lora", 1e-3, budget), &base, &material).1;
    assert_eq!(of(Budget::Steps(7)).steps, 7);
    let epoch: u64 = positions.iter().sum();
    let per_epoch = rows.len().div_ceil(8) as u64;
    for epochs in [0.5, 2.0] {
        let run = of(Budget::Epochs(epochs));
        assert_eq!(run.steps, (epochs * per_epoch as f64).round() as u64);
        if epochs == 2.0 {
            assert_eq!(run.tokens, 2 * epoch);
        }
    }
    // To a step: its rows are not cut.
    let largest = 8 * positions.iter().max().expect("rows");
    for tokens in [epoch / 2, 3 * epoch] {
        let run = of(Budget::Tokens(tokens));
        assert!(run.tokens.abs_diff(tokens) <= largest, "{} of {tokens} tokens", run.tokens);
    }
    let least = of(Budget::Tokens(1));
    assert_eq!(least.steps, 1);
    // A step and the look after it go to their end, however long a machine takes for them.
    let slack = 2.0 + 2.0 * least.seconds;
    for minutes in [1e-6, 0.01] {
        let run = of(Budget::Minutes(minutes));
        eprintln!("{minutes} minutes: {} steps in {:.3} s, {}", run.steps, run.seconds, run.ended);
        assert!(run.steps >= 1 && run.seconds < 60.0 * minutes * 2.0 + slack, "{} s", run.seconds);
        assert_eq!(run.curve.last().map(|p| p.step), Some(run.steps), "the last steps were not looked at");
    }
}

#[test]
fn a_seed_gives_the_same_bits_with_any_number_of_threads() {
    let bits = |threads, seed| {
        let base = base_of(threads);
        let material = household(&text_of(&base), 5);
        let plain = recipe(&base, "lora", 2e-3, Budget::Steps(12));
        let (adapter, run) = adapter_of(&Recipe { seed, ..plain }, &base, &material);
        (adapter.theta.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), run.curve)
    };
    let first = bits(1, 0);
    assert!(first == bits(2, 0), "threads change the result");
    assert!(first == bits(1, 0), "a run does not repeat");
    assert!(first != bits(1, 1), "the seed changes nothing");
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_trained() {
    let base = base_of(2);
    let material = household(&text_of(&base), 5);
    for rate in [Some(1e-3), None] {
        let recipe = Recipe { rate, ..recipe(&base, "lora", 1e-3, Budget::Steps(5)) };
        let mut watcher = Quiet::default();
        let error = train(&recipe, &base, &material, Some(100_000), &mut watcher).err().expect("too little");
        assert_eq!(error.kind(), ErrorKind::DoesNotFit);
        assert!(error.message().contains("lora"), "{error}");
        assert_eq!((watcher.steps, watcher.looks.len()), (0, 0));
        assert_eq!(
            choose_rank(&recipe, &base, &material, Some(100_000)).unwrap_err().kind(),
            ErrorKind::DoesNotFit
        );
    }
    // The largest rank that fits is chosen, and with it the same effect of a step.
    let plain = recipe(&base, "lora", 1e-3, Budget::Steps(5));
    let bytes = |rank: usize| {
        let Method::Adapter(lora) = &plain.method else { panic!("no adapter") };
        let lora = engraft_runtime::adapter::LoraConfig { rank, ..lora.clone() };
        let recipe = Recipe { method: Method::Adapter(lora), ..plain.clone() };
        recipe.check(&base, &material, None).expect("no budget").private_bytes as u64
    };
    let unbounded = choose_rank(&plain, &base, &material, None).expect("a rank").rank;
    assert!(unbounded >= 2, "the rows carry {unbounded}");
    assert!(bytes(unbounded) > bytes(1));
    let chosen = choose_rank(&plain, &base, &material, Some(bytes(1))).expect("a rank");
    assert!(chosen.rank <= unbounded && chosen.scale() == 2.0, "{chosen:?}");
}

#[test]
fn a_loss_that_is_no_number_ends_the_run_alone() {
    let base = base_of(2);
    let material = household(&text_of(&base), 5);
    let (adapter, run) = adapter_of(&recipe(&base, "lora", 1e30, Budget::Steps(20)), &base, &material);
    assert!(run.ended.contains("no number"), "{}", run.ended);
    assert!(run.steps < 20 && run.best_step == 0, "{run:?}");
    assert!(adapter.theta.iter().all(|v| v.is_finite()));
}

#[test]
fn a_stop_is_heard_and_a_rate_is_found() {
    let base = base_of(2);
    let material = household(&text_of(&base), 5);
    let plain = recipe(&base, "lora", 1e-3, Budget::Steps(1000));
    let mut watcher = Quiet { stop_after: Some(3), ..Quiet::default() };
    let error = train(&plain, &base, &material, None, &mut watcher).err().expect("stopped");
    assert_eq!((error.kind(), watcher.steps), (ErrorKind::Cancelled, 3));

    let searching = Recipe { rate: None, budget: Budget::Steps(20), ..plain };
    let (_, run, tested) = train(&searching, &base, &material, None, &mut Quiet::default()).expect("a run");
    let tested = tested.expect("a test");
    assert_eq!(run.learning_rate, tested.chosen);
    assert!((1e-4..2e-2).contains(&tested.chosen), "{}", tested.chosen);
    assert!(lowest(&run).0 < 0.9 * run.curve[0].valid.expect("a loss"), "the rate teaches nothing");
}
