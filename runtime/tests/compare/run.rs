//! A run gives back its best step, keeps its budget and its seed, and refuses what does not fit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use engraft_kernels::DType;
use engraft_runtime::ErrorKind;
use engraft_runtime::adapter::Adapter;
use engraft_runtime::compare::Contest;
use engraft_runtime::compare::answers::{Manner, Metric, answer, questions};
use engraft_runtime::compare::material::Material;
use engraft_runtime::compare::recipe::Recipe;
use engraft_runtime::compare::score::Subject;
use engraft_runtime::compare::train::train;
use engraft_runtime::data::Example;
use engraft_runtime::data::batches::in_order;
use engraft_runtime::eval::scoring_chain;
use engraft_runtime::gate::report::ArmRun;
use engraft_runtime::generate::StackedAdapter;
use engraft_runtime::run::{Base, Length, Limit, Looks, Method, RunRows, Settings, Trained};
use engraft_runtime::train::chain::AdapterView;

use super::{Quiet, base_of, household, recipe, subject, text_of, with};

/// Relative bound of a sequence's loss, whose keys and values are in f16, beside the trainer's.
const CACHE: f64 = 1e-3;

fn trained(recipe: &Recipe, base: &Base, material: &Material) -> (Trained, ArmRun) {
    let contest = Contest::new("one arm");
    let (trained, run, tested) =
        train(recipe, base, material, &contest, (None, &mut Quiet::default())).expect("a run");
    assert_eq!(tested.is_none(), recipe.settings.rate.is_some());
    (trained, run)
}

fn adapter_of(recipe: &Recipe, base: &Base, material: &Material) -> (Adapter, ArmRun) {
    match trained(recipe, base, material) {
        (Trained::Adapter(adapter), run) => (*adapter, run),
        (Trained::Full(_), _) => panic!("every weight, where an adapter was asked for"),
    }
}

/// The loss of validation rows, as a scoring sequence has it.
fn validation(subject: &Subject, material: &Material) -> f64 {
    let found = subject.losses(&material.valid.data.examples, &mut Quiet::default()).expect("losses").nll;
    let targets: usize = found.iter().map(|e| e.targets).sum();
    found.iter().map(|e| e.sum).sum::<f64>() / targets as f64
}

fn tuned(base: &Base, adapter: Adapter) -> Subject {
    let stacked = StackedAdapter::new(&base.model, &base.kernels, &[(adapter, 1.0)]).expect("it fits");
    Subject { adapter: Some(Arc::new(stacked)), ..subject(base) }
}

/// The lowest validation loss of a curve, and its step.
fn lowest(run: &ArmRun) -> (f64, u64) {
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
        let (adapter, run) = adapter_of(&recipe(&base, "lora", rate, Length::Steps(30)), &base, &material);
        let (loss, step) = lowest(&run);
        assert_eq!((run.best_step, adapter.meta.steps), (step, step), "rate {rate}");
        let found = validation(&tuned(&base, adapter), &material);
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
        let plain = recipe(&base, "full", rate, Length::Steps(20));
        let full = with(&plain, |s| Settings { method: Method::Full(Some(DType::F32)), ..s });
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
    let harmful = recipe(&base, "lora", 1.0, Length::Steps(40));
    for patience in [1, 3] {
        let looks = Looks::Best { times: 10, patience };
        let (_, run) = adapter_of(&with(&harmful, |s| Settings { looks, ..s }), &base, &material);
        assert_eq!((run.steps, run.best_step), (4 * patience, 0), "a look after every fourth step");
        assert_eq!(run.ended, format!("no better for {patience} looks"));
    }
    let (_, run) = adapter_of(&harmful, &base, &material);
    assert_eq!((run.steps, run.ended.as_str()), (40, "all steps done"));
}

#[test]
fn budgets_are_kept() {
    let base = base_of(2);
    let material = household(&text_of(&base), 5);
    let rows = &material.train.data.examples;
    let positions: Vec<u64> = rows.iter().map(|e| e.rows() as u64).collect();
    let of = |budget| adapter_of(&recipe(&base, "lora", 1e-3, budget), &base, &material).1;
    assert_eq!(of(Length::Steps(7)).steps, 7);
    let epoch: u64 = positions.iter().sum();
    let per_epoch = rows.len().div_ceil(8) as u64;
    for epochs in [0.5, 2.0] {
        let run = of(Length::Epochs(epochs));
        assert_eq!(run.steps, (epochs * per_epoch as f64).round() as u64);
        if epochs == 2.0 {
            assert_eq!(run.tokens, 2 * epoch);
        }
    }
    // To a step: its rows are not cut.
    let largest = 8 * positions.iter().max().expect("rows");
    for tokens in [epoch / 2, 3 * epoch] {
        let run = of(Length::Tokens(tokens));
        assert!(run.tokens.abs_diff(tokens) <= largest, "{} of {tokens} tokens", run.tokens);
    }
    let least = of(Length::Tokens(1));
    assert_eq!(least.steps, 1);
    // A step and the look after it go to their end, however long a machine takes for them.
    let slack = 2.0 + 2.0 * least.seconds;
    for minutes in [1e-6, 0.01] {
        let run = of(Length::Minutes(minutes));
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
        let plain = recipe(&base, "lora", 2e-3, Length::Steps(12));
        let (adapter, run) = adapter_of(&with(&plain, |s| Settings { seed, ..s }), &base, &material);
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
    let limit = |bytes: u64| Limit { budget: Some(bytes), room: None };
    let contest = Contest { limit: limit(100_000), ..Contest::new("one arm") };
    for rate in [Some(1e-3), None] {
        let recipe = with(&recipe(&base, "lora", 1e-3, Length::Steps(5)), |s| Settings { rate, ..s });
        let mut watcher = Quiet::default();
        let error =
            train(&recipe, &base, &material, &contest, (None, &mut watcher)).err().expect("too little");
        assert_eq!(error.kind(), ErrorKind::DoesNotFit);
        assert!(error.message().contains("lora"), "{error}");
        assert_eq!((watcher.steps, watcher.looks.len()), (0, 0));
        let ranked = recipe.with_largest_rank(&base, &material, RunRows::default(), &contest.limit);
        assert_eq!(ranked.unwrap_err().kind(), ErrorKind::DoesNotFit);
    }
    // The largest rank that fits is chosen, and with it the same effect of a step.
    let plain = recipe(&base, "lora", 1e-3, Length::Steps(5));
    let lora_of = |recipe: &Recipe| recipe.settings.method.lora().expect("an adapter").clone();
    let bytes = |rank: usize| {
        let lora = engraft_runtime::adapter::LoraConfig { rank, ..lora_of(&plain) };
        let recipe = with(&plain, |s| Settings { method: Method::Adapter(lora), ..s });
        let planned =
            recipe.check(&base, &material, RunRows::default(), &Limit::default()).expect("no budget");
        planned.plan.private_bytes as u64
    };
    let chosen = |limit: &Limit| {
        lora_of(
            &plain.clone().with_largest_rank(&base, &material, RunRows::default(), limit).expect("a rank"),
        )
    };
    let unbounded = chosen(&Limit::default()).rank;
    assert!(unbounded >= 2, "the rows carry {unbounded}");
    assert!(bytes(unbounded) > bytes(1));
    let bounded = chosen(&limit(bytes(1)));
    assert!(bounded.rank <= unbounded && bounded.scale() == 2.0, "{bounded:?}");
}

#[test]
fn a_loss_that_is_no_number_ends_the_run_alone() {
    let base = base_of(2);
    let material = household(&text_of(&base), 5);
    let (adapter, run) = adapter_of(&recipe(&base, "lora", 1e30, Length::Steps(20)), &base, &material);
    assert!(run.ended.contains("isn't finite"), "{}", run.ended);
    assert!(run.steps < 20 && run.best_step == 0, "{run:?}");
    assert!(adapter.theta.iter().all(|v| v.is_finite()));
}

#[test]
fn a_stop_is_heard_and_a_rate_is_found() {
    let base = base_of(2);
    let material = household(&text_of(&base), 5);
    let (plain, contest) = (recipe(&base, "lora", 1e-3, Length::Steps(1000)), Contest::new("one arm"));
    let mut watcher = Quiet { stop_after: Some(3), ..Quiet::default() };
    let error = train(&plain, &base, &material, &contest, (None, &mut watcher)).err().expect("stopped");
    assert_eq!((error.kind(), watcher.steps), (ErrorKind::Cancelled, 3));

    let searching = with(&plain, |s| Settings { rate: None, length: Length::Steps(20), ..s });
    let found = train(&searching, &base, &material, &contest, (None, &mut Quiet::default())).expect("a run");
    let (_, run, tested) = found;
    let tested = tested.expect("a test");
    assert_eq!(run.learning_rate, tested.chosen);
    assert!((1e-4..2e-2).contains(&tested.chosen), "{}", tested.chosen);
    assert!(lowest(&run).0 < 0.9 * run.curve[0].valid.expect("a loss"), "the rate teaches nothing");
}

/// Where arms have a folder for what is unfinished, the same arm goes on from where it was stopped, to the same bits,
/// and its range test isn't made twice.
#[test]
fn an_arm_that_was_stopped_goes_on_to_the_same_result() {
    let (base, folder) = (base_of(2), tempfile::tempdir().expect("a folder"));
    let material = household(&text_of(&base), 5);
    let plain = recipe(&base, "lora", 1e-3, Length::Steps(20));
    let searching = with(&plain, |s| Settings { rate: None, checkpoint_every: 5, ..s });
    let contest = Contest { unfinished: Some(folder.path().into()), ..Contest::new("one arm") };
    let bits = |trained: Trained| match trained {
        Trained::Adapter(adapter) => adapter.theta.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
        Trained::Full(_) => panic!("every weight"),
    };
    let whole = train(&searching, &base, &material, &Contest::new("one arm"), (None, &mut Quiet::default()));
    let (whole, run, tested) = whole.expect("a run");
    let whole = bits(whole);

    let test_steps = tested.expect("a test").points.len() as u64;
    let mut stopped = Quiet { stop_after: Some(test_steps + 13), ..Quiet::default() };
    let error = train(&searching, &base, &material, &contest, (None, &mut stopped)).err().expect("stopped");
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    for (left, which) in [(10, "stopped"), (0, "finished")] {
        let mut watcher = Quiet::default();
        let (found, again, _) =
            train(&searching, &base, &material, &contest, (None, &mut watcher)).expect("the rest of the run");
        assert_eq!(watcher.steps, left, "{which}: steps that were left, without any of a range test");
        assert_eq!((again.curve, again.best_step), (run.curve.clone(), run.best_step), "{which}");
        assert!(bits(found) == whole, "{which}: other bits");
    }
    // Of another seed nothing is gone on from.
    let other = with(&searching, |s| Settings { seed: 1, rate: Some(1e-3), ..s });
    let mut watcher = Quiet::default();
    train(&other, &base, &material, &contest, (None, &mut watcher)).expect("a run");
    assert_eq!(watcher.steps, 20);
}

/// A training that has to end does, with a look at what it has learned, however long it was to be; one whose length is
/// minutes takes no more steps than fit.
#[test]
fn training_ends_in_time() {
    let base = base_of(2);
    let material = household(&text_of(&base), 25);
    let contest = Contest::new("one arm");
    for length in [Length::Steps(1_000_000), Length::Minutes(60.0)] {
        let (began, time) = (Instant::now(), Duration::from_secs(2));
        let recipe = recipe(&base, "lora", 1e-3, length);
        let mut watcher = Quiet::default();
        let found = train(&recipe, &base, &material, &contest, (Some(began + time), &mut watcher));
        let (_, run, _) = found.expect("a run");
        let took = began.elapsed();
        assert!(took < time + time / 4, "{took:?}");
        assert!(run.steps > 6 && run.best_step > 0, "{} steps", run.steps);
        assert_eq!(watcher.looks.last().map(|look| look.0), Some(run.steps), "the last step is looked at");
        let expected = if length == Length::Minutes(60.0) { "all steps done" } else { "time budget spent" };
        assert!(run.ended == expected || run.ended == "time budget spent", "{}", run.ended);
    }
}

/// Rows that a model is sure of are answered word for word, and the look that counts by answers is sure of no fewer than
/// the one that counts by its loss.
#[test]
fn looks_count_by_answers_where_those_are_judged() {
    let base = base_of(2);
    let text = text_of(&base);
    let material = household(&text, 30);
    let recipe = recipe(&base, "lora", 4e-3, Length::Steps(40));
    let longest = material.rows_max();
    let trained = |metric| {
        let contest = Contest { metric, ..Contest::new("one arm") };
        let found = train(&recipe, &base, &material, &contest, (None, &mut Quiet::default()));
        match found.expect("a run") {
            (Trained::Adapter(adapter), run, _) => (*adapter, run.best_step),
            (Trained::Full(_), ..) => panic!("an adapter was asked for"),
        }
    };
    let sure = |adapter: &Adapter, rows: &[Example]| -> Vec<bool> {
        let Adapter { layout, theta, config, .. } = adapter;
        let (model, kernels) = (base.model.clone(), base.kernels.clone());
        let mut chain = scoring_chain(model, kernels, base.precision, 4, longest);
        let view = AdapterView { layout, theta, config, gains: &[] };
        in_order(rows, 1).map(|row| chain.evaluate(Some(&view), &row, |_, _| {}).sure == 1).collect()
    };
    let ((by_loss, first), (by_answers, second)) = (trained(None), trained(Some(Metric::Exact)));
    let valid = &material.valid.data.examples;
    let count = |adapter: &Adapter| sure(adapter, valid).iter().filter(|sure| **sure).count();
    let counts = (count(&by_loss), count(&by_answers));
    eprintln!("step {first}: sure of {}; step {second}: sure of {}", counts.0, counts.1);
    assert!(counts.1 >= counts.0 && counts.1 > 0, "{counts:?}");

    let rows = &material.held_out.data.examples;
    let tuned = Subject {
        adapter: Some(base.stack(&[(by_answers.clone(), 1.0)]).expect("it fits")),
        ..subject(&base)
    };
    let asked = questions(&material.held_out, &text);
    let manner = Manner { metric: Some(Metric::Exact), tokens: 24, samples: 0 };
    let found =
        answer(&tuned, &asked, rows, (manner, &text), 64 << 20, &mut Quiet::default()).expect("answers");
    let right = found.correct.expect("judged");
    let sure = sure(&by_answers, rows);
    assert!(sure.iter().any(|sure| *sure) && !sure.iter().all(|sure| *sure), "{sure:?}");
    assert!(sure.iter().zip(&right).all(|(sure, right)| !sure || *right), "{sure:?} {right:?}");
}
