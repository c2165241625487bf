//! Whole comparisons. The gate refuses labels that were shuffled, rates that are far too high, rows that were
//! seen before, and arms that are equal; and it lets through what was learned.

use engraft_runtime::adapter::LoraConfig;
use engraft_runtime::compare::answers::{Manner, Metric, answer, questions};
use engraft_runtime::compare::material::{Material, Rows};
use engraft_runtime::compare::recipe::Recipe;
use engraft_runtime::compare::retention::RetentionSet;
use engraft_runtime::compare::shots::Choice;
use engraft_runtime::compare::{Contest, InUse, Outcome, Product, ZERO_SHOT, check, compare, fitting};
use engraft_runtime::data;
use engraft_runtime::data::masks::TEXT_ROLE;
use engraft_runtime::error::{ErrorKind, Result};
use engraft_runtime::gate::verdict::{
    ArmKind, ArmReport, ArmResult, Basis, Decision, ExampleNll, Retention, Thresholds, judge,
};
use engraft_runtime::model::chat::Message;
use engraft_runtime::model::text::Text;
use engraft_runtime::nn::keep::Keep;
use engraft_runtime::rng::Rng;
use engraft_runtime::run::general::Aside;
use engraft_runtime::run::{Base, KeepChoice, Length, Limit, Looks, Method, RunRows, Settings};

use super::{
    Quiet, base_of, household, lines, pair, read, reading, recipe, shipped, subject, text_of, with,
    write_rows,
};

/// Everyday commands, which the base knows and must not forget.
fn everyday(text: &Text) -> Vec<RetentionSet> {
    let file = shipped("demo/generic_test.jsonl");
    let rows = data::load(&file, &text.tokenizer, &text.chat, &reading()).expect("the demo's rows").examples;
    let rows = rows.into_iter().take(40).collect();
    vec![RetentionSet { name: "everyday".into(), rows, task: None }]
}

/// The same rows, set aside for what training forgets.
fn aside(contest: &Contest) -> Vec<Aside> {
    contest.retention.iter().map(|set| Aside { name: set.name.clone(), rows: set.rows.clone() }).collect()
}

fn contest(text: &Text, recipes: Vec<Recipe>) -> Contest {
    Contest {
        shots: vec![(3, Choice::Seeded(0))],
        recipes,
        answer_tokens: 24,
        retention: everyday(text),
        thresholds: Thresholds { resamples: 2000, ..Thresholds::default() },
        samples: 2,
        ..Contest::new("compare")
    }
}

fn held(base: &Base, material: &Material, contest: &Contest) -> Result<Outcome> {
    let text = text_of(base);
    compare(base, material, (&text, &reading()), contest, &mut Quiet::default())
}

/// A comparison of the base, of examples, and of these recipes.
fn judged(base: &Base, material: &Material, recipes: Vec<Recipe>) -> Outcome {
    held(base, material, &contest(&text_of(base), recipes)).expect("a verdict")
}

fn arm<'o>(outcome: &'o Outcome, name: &str) -> &'o ArmReport {
    outcome.verdict.arms.iter().find(|a| a.name == name).expect("the arm")
}

#[test]
fn what_was_learned_is_promoted() {
    let base = base_of(2);
    let material = household(&text_of(&base), 50);
    let lora = recipe(&base, "lora", 2e-3, Length::Steps(30));
    let config = lora.settings.method.lora().expect("an adapter").clone();
    let dora = Method::Adapter(LoraConfig { dora: true, ..config });
    let dora = with(&lora, |s| Settings { method: dora, rate: Some(1e-5), ..s });
    let dora = Recipe { name: "dora".into(), ..dora };
    let contest = Contest { metric: Some(Metric::Json), ..contest(&text_of(&base), vec![lora, dora]) };
    let outcome = held(&base, &material, &contest).expect("a verdict");
    assert_eq!(outcome.verdict.promoted(), Some("lora"), "{:#?}", outcome.verdict.reasons);
    let accuracy = |name: &str| arm(&outcome, name).accuracy.expect("answers were judged");
    assert!(accuracy("lora") > 0.4 && accuracy(ZERO_SHOT) < 0.2, "{:#?}", outcome.verdict.reasons);
    assert!(outcome.report.samples.len() == 2 && outcome.report.samples[0].outputs.len() == 4);

    // What is kept is what was judged, and it is bound to its base.
    let Some(Product::Adapter(adapter)) = outcome.kept("lora") else { panic!("nothing is kept") };
    assert!(adapter.binding.is_some() && adapter.meta.steps == outcome.report.runs[0].best_step);
    let Some(Product::FewShot(turns)) = outcome.kept("3-shot") else { panic!("nothing is kept") };
    assert_eq!(turns.len(), 6);
    assert!(outcome.kept(ZERO_SHOT).is_none());
}

/// A verdict is bound to all that its figures depend on, be it what is in use, by more than its name, or the rows that
/// strength is chosen on.
#[test]
fn a_verdict_is_bound_to_what_it_compared() {
    let base = base_of(2);
    let text = text_of(&base);
    let material = household(&text, 20);
    let plain = Contest { shots: Vec::new(), ..contest(&text, Vec::new()) };
    let bound =
        |contest: &Contest| held(&base, &material, contest).expect("a verdict").verdict.binding.settings;
    let in_use = |answer: &str| {
        let turns = vec![Message::new("user", "the cave?"), Message::new("assistant", answer)];
        Contest { active: Some(("generation 1".into(), InUse::FewShot(turns))), ..plain.clone() }
    };
    let calibrated = Contest { aside: aside(&plain), ..plain.clone() };
    let all = [bound(&plain), bound(&calibrated), bound(&in_use("study")), bound(&in_use("cellar"))];
    assert!((1..all.len()).all(|i| !all[..i].contains(&all[i])), "{all:?}");
    assert_eq!(all[2], bound(&in_use("study")));
}

/// What forgets too much at full strength is weakened until ordinary text is within the ceilings, and is judged, kept
/// and reported as such.
#[test]
fn strength_falls_until_little_is_forgotten() {
    let base = base_of(2);
    let text = text_of(&base);
    let material = household(&text, 50);
    let lora = recipe(&base, "lora", 4e-3, Length::Steps(40));
    let lora = with(&lora, |lora| Settings { looks: Looks::Best { times: 1, patience: 0 }, ..lora });
    let plain = contest(&text, vec![lora]);
    let ceiling = 0.02;
    let thresholds = Thresholds { retention_nll_max: ceiling, ..plain.thresholds };
    let plain = Contest { thresholds, ..plain };
    let whole = held(&base, &material, &plain).expect("a verdict");
    let lost = |outcome: &Outcome| arm(outcome, "lora").retention[0].delta_nll.expect("a figure");
    assert!(lost(&whole) > ceiling, "nothing to weaken: {}", lost(&whole));

    let weakened = Contest { aside: aside(&plain), ..plain.clone() };
    let weakened = held(&base, &material, &weakened).expect("a verdict");
    assert!(lost(&weakened) <= ceiling, "{}", lost(&weakened));
    let told = |outcome: &Outcome| outcome.report.runs[0].what.contains("of its strength");
    assert!(told(&weakened) && !told(&whole));
    let alpha = |outcome: &Outcome| match outcome.kept("lora") {
        Some(Product::Adapter(adapter)) => (adapter.config.alpha, adapter.theta.clone()),
        _ => panic!("nothing is kept"),
    };
    let ((full, before), (less, after)) = (alpha(&whole), alpha(&weakened));
    assert!(before == after && less < full && less > 0.1 * full, "{less} of {full}");
    assert!(arm(&weakened, "lora").reasons.iter().any(|r| r.contains("of its full strength")));

    // What forgets little acts fully.
    let gentle = Thresholds { retention_nll_max: 1.0, retention_kl_max: 9.0, ..plain.thresholds };
    let gentle = Contest { aside: aside(&plain), thresholds: gentle, ..plain };
    assert_eq!(alpha(&held(&base, &material, &gentle).expect("a verdict")).0, full);
}

/// The look that counts is the best of those that forget little enough, or what is nearest to it; without a ceiling, the
/// best of all.
#[test]
fn the_look_that_counts_forgets_little() {
    let base = base_of(2);
    let text = text_of(&base);
    let material = household(&text, 50);
    let lora = recipe(&base, "lora", 4e-3, Length::Steps(40));
    let plain = contest(&text, vec![lora]);
    let plain = Contest { metric: None, aside: aside(&plain), ..plain };
    let counted = |retention_nll_max: f64| {
        let thresholds = Thresholds { retention_nll_max, retention_kl_max: 9.0, ..plain.thresholds };
        let contest = Contest { thresholds, ..plain.clone() };
        let mut seen = Quiet::default();
        let outcome = compare(&base, &material, (&text, &reading()), &contest, &mut seen).expect("a verdict");
        (outcome.report.runs[0].best_step, seen.looks, seen.forgot)
    };
    let (of_all, looks, forgot) = counted(f64::INFINITY);
    let of_losses = looks.iter().min_by(|a, b| a.1.total_cmp(&b.1)).expect("looks").0;
    assert_eq!(of_all, of_losses);
    // A ceiling between what the best look forgot and what an earlier one did.
    let last = looks.iter().position(|look| look.0 == of_all).expect("it");
    let least = forgot[1..last].iter().copied().fold(f64::INFINITY, f64::min);
    assert!(least < forgot[last], "nothing to choose: {forgot:?}");
    let (within, ..) = counted((0.9 * least + 0.1 * forgot[last]) / 0.8);
    let chosen = looks.iter().position(|look| look.0 == within).expect("it");
    assert!(forgot[chosen] < forgot[last], "step {within} of {looks:?}, {forgot:?}");
}

/// Commands of the everyday kind: eighty to train with, each with the answer of another, and forty with their
/// own to decide by. Answers stand as `form` writes them.
fn shuffled(text: &Text, seed: u64, form: impl Fn(&str) -> String) -> Material {
    let rows: Vec<(String, String)> = lines("demo/generic_test.jsonl")
        .iter()
        .map(|line| {
            let row: serde_json::Value = serde_json::from_str(line).expect("JSON");
            let of = |key: &str| row[key].as_str().expect("a text").to_string();
            (of("prompt"), form(&of("completion")))
        })
        .collect();
    let (train, test) = rows.split_at(80);
    let mut labels: Vec<&String> = train.iter().map(|r| &r.1).collect();
    Rng::new(seed, 3).shuffle(&mut labels);
    let folder = tempfile::tempdir().expect("a folder");
    let moved = train.iter().zip(labels).map(|(row, label)| pair(&row.0, label));
    write_rows(folder.path().join("train.jsonl"), &moved.collect::<Vec<_>>());
    write_rows(folder.path().join("test.jsonl"), &test.iter().map(|r| pair(&r.0, &r.1)).collect::<Vec<_>>());
    read(folder.path(), text).expect("good rows")
}

/// What labels are shuffled by.
fn seeds() -> &'static [u64] {
    let all = &[7, 31, 53];
    if std::env::var_os("ENGRAFT_TEST_EMULATOR").is_none() {
        return all;
    }
    eprintln!("SKIPPED: two of three seeds, each of which takes an emulator many minutes");
    &all[..1]
}

/// Answers in the base's own form: what it knows is unlearned, which the loss shows.
#[test]
fn shuffled_labels_are_not_promoted() {
    let base = base_of(2);
    let text = text_of(&base);
    for &seed in seeds() {
        let material = shuffled(&text, seed, str::to_string);
        let outcome = judged(&base, &material, vec![recipe(&base, "lora", 2e-3, Length::Steps(60))]);
        eprintln!("labels shuffled by {seed}: {}", outcome.verdict.sentence);
        assert!(outcome.report.runs[0].best_step > 0, "nothing was learned from the shuffled rows");
        assert_eq!(outcome.verdict.promoted(), None, "{:#?}", outcome.verdict.reasons);
        assert!(arm(&outcome, "lora").negative_transfer, "{:#?}", outcome.verdict.reasons);
    }
}

/// Answers in a form that the base does not know: that much is learned from wrong labels, too, and the loss
/// falls far. Only the answers show that nothing else is.
#[test]
fn shuffled_labels_that_teach_a_form_are_not_promoted() {
    let base = base_of(2);
    let text = text_of(&base);
    let form = |answer: &str| answer.replace(['{', '}', '"'], "").replace(':', " = ").replace(',', "; ");
    for &seed in seeds() {
        let material = shuffled(&text, seed, form);
        let recipes = vec![recipe(&base, "lora", 2e-3, Length::Steps(60))];
        let contest = Contest { metric: Some(Metric::Exact), ..contest(&text, recipes) };
        let outcome = held(&base, &material, &contest).expect("a verdict");
        let (verdict, lora) = (&outcome.verdict, arm(&outcome, "lora"));
        eprintln!("labels shuffled by {seed}: {} {:?}", verdict.sentence, lora.accuracy);
        assert_eq!(verdict.promoted(), None, "{:#?}", verdict.reasons);
        assert!(lora.comparisons.iter().all(|c| c.better), "its loss is lower: {:#?}", lora.reasons);
        let why = |u: &String| u.contains("isn't shown to solve more");
        assert!(verdict.undecided.iter().any(why), "{:#?}", verdict.undecided);
    }
}

#[test]
fn a_rate_a_hundred_times_too_high_is_not_promoted() {
    let base = base_of(2);
    let material = household(&text_of(&base), 50);
    let looks = Looks::Best { times: 10, patience: 3 };
    let wild = with(&recipe(&base, "lora", 0.2, Length::Steps(30)), |s| Settings { looks, ..s });
    let outcome = judged(&base, &material, vec![wild]);
    eprintln!("{}\n{:#?}", outcome.verdict.sentence, arm(&outcome, "lora").reasons);
    assert_eq!(outcome.verdict.promoted(), None);
    assert_eq!(outcome.verdict.require_promotion().unwrap_err().kind(), ErrorKind::GateRefused);
    let lora = arm(&outcome, "lora");
    assert!(!lora.eligible && lora.reasons.iter().any(|r| r.starts_with("lora")), "{:#?}", lora.reasons);
    // The run itself says that no step was better than none.
    assert_eq!((outcome.report.runs[0].best_step, outcome.report.runs[0].steps), (0, 9));
}

#[test]
fn rows_that_were_seen_leave_the_base_as_it_is() {
    let base = base_of(2);
    let text = text_of(&base);
    let folder = tempfile::tempdir().expect("a folder");
    let train = lines("demo/private_train.jsonl");
    write_rows(folder.path().join("train.jsonl"), &train);
    let mut test = lines("demo/private_test.jsonl");
    test[4] = train[8].clone();
    test[9] = train[17].to_lowercase();
    write_rows(folder.path().join("test.jsonl"), &test);
    let material = read(folder.path(), &text).expect("good rows");
    let contest = contest(&text, vec![recipe(&base, "lora", 2e-3, Length::Steps(30))]);
    let mut watcher = Quiet::default();
    let outcome = compare(&base, &material, (&text, &reading()), &contest, &mut watcher).expect("a verdict");
    assert!(watcher.notes[0].contains("the base will stay"), "{:?}", watcher.notes);
    let verdict = &outcome.verdict;
    assert_eq!((&verdict.decision, verdict.leak_count), (&Decision::KeepBase, 2));
    for named in ["test.jsonl:5", "train.jsonl:9"] {
        assert!(verdict.sentence.contains(named), "{named}: {}", verdict.sentence);
    }
    let named = verdict.leaks.iter().map(|l| (l.held_out.as_str(), l.train.as_str())).collect::<Vec<_>>();
    assert_eq!(named, [("test.jsonl:5", "train.jsonl:9"), ("test.jsonl:10", "train.jsonl:18")]);
    // It was the leak alone: the arm's figures are those of a winner.
    let gain = arm(&outcome, "lora").comparisons[0].gain.expect("a gain");
    assert!(gain > 0.5 && arm(&outcome, "lora").comparisons[0].better, "{gain}");
}

#[test]
fn equal_arms_have_no_winner() {
    let base = base_of(2);
    let material = household(&text_of(&base), 50);
    // Steps too short to be felt: B stays zero, or as good as that.
    let still = |name: &str| recipe(&base, name, 1e-12, Length::Steps(3));
    let outcome = judged(&base, &material, vec![still("one"), still("two")]);
    let verdict = &outcome.verdict;
    assert_eq!(verdict.promoted(), None, "{:#?}", verdict.reasons);
    for name in ["one", "two"] {
        let against = &arm(&outcome, name).comparisons[0];
        assert_eq!(against.against, ZERO_SHOT);
        assert!(against.gain.expect("a gain").abs() < 1e-6 && !against.better && !against.worse);
        assert!(verdict.undecided.iter().any(|u| u.starts_with(&format!("{name} against {ZERO_SHOT}"))));
        assert!(!arm(&outcome, name).negative_transfer);
    }
    // One recipe twice gives one result twice, to the bit: neither is before the other.
    let [one, two] = ["one", "two"].map(|name| arm(&outcome, name));
    assert_eq!((one.nll, &one.retention, one.task_kl), (two.nll, &two.retention, two.task_kl));
    // Holm tests them at levels of their own, so that intervals differ.
    let gains = |a: &ArmReport| a.comparisons.iter().map(|c| (c.gain, c.p)).collect::<Vec<_>>();
    assert_eq!(gains(one), gains(two));
}

/// Losses of a model on `n` rows: each row's own difficulty, which all models share, and the model's own luck.
fn luck(name: &str, kind: ArmKind, n: usize, seed: u64) -> ArmResult {
    let (mut shared, mut own) = (Rng::new(1, 1), Rng::new(seed, 2));
    let one = |i| {
        let targets = 5 + i % 7;
        let token = 3.0 + 0.5 * f64::from(shared.normal()) + 0.5 * f64::from(own.normal());
        ExampleNll { sum: token * targets as f64, targets }
    };
    let retention = match kind {
        ArmKind::Trained => {
            vec![Retention { text: "everyday".into(), delta_nll: 0.0, kl: 0.0, retained: None }]
        }
        _ => Vec::new(),
    };
    let nll = (0..n).map(one).collect();
    ArmResult { name: name.into(), kind, nll, correct: None, retention, task_kl: None, strength: None }
}

#[test]
fn of_two_models_of_one_quality_none_wins() {
    let thresholds = Thresholds { few_shot_required: false, resamples: 1000, ..Thresholds::default() };
    // Twenty rows are the fewest that the gate takes.
    for (n, seeds, most) in [(20, 400, 20), (60, 100, 5), (300, 100, 5)] {
        let wins = |gain: f64, seeds: u64| {
            let promoted = |seed: &u64| {
                let zero = luck(ZERO_SHOT, ArmKind::ZeroShot, n, 2 * seed);
                let mut tuned = luck("lora", ArmKind::Trained, n, 2 * seed + 1);
                tuned.nll.iter_mut().for_each(|e| e.sum -= gain * e.targets as f64);
                let basis = Basis { seed: *seed, ..Basis::default() };
                judge(&[zero, tuned], &[], &thresholds, &basis).expect("a verdict").promoted().is_some()
            };
            (0..seeds).filter(promoted).count()
        };
        let (equal, better) = (wins(0.0, seeds), wins(1.0, 20));
        eprintln!("{n} rows: {equal} of {seeds} equal models win, and {better} of 20 better ones");
        assert!(equal <= most, "{n} rows: {equal} of {seeds} win by luck");
        assert!(better >= 19, "{n} rows: {better} of 20 win by merit");
    }
}

#[test]
fn equal_comparisons_give_equal_bytes() {
    let json = |threads: usize, rate: f64, seed: u64| {
        let base = base_of(threads);
        let material = household(&text_of(&base), 25);
        let recipes = vec![recipe(&base, "lora", rate, Length::Steps(8))];
        let contest = Contest { seed, ..contest(&text_of(&base), recipes) };
        let outcome = held(&base, &material, &contest).expect("a verdict");
        outcome.verdict.to_json().expect("JSON")
    };
    let first = json(1, 1e-3, 0);
    assert_eq!(first, json(1, 1e-3, 0));
    assert_eq!(first, json(2, 1e-3, 0), "threads change the verdict");
    assert_ne!(first, json(2, 2e-3, 1));
}

#[test]
fn what_can_not_be_is_refused_before_anything_is_measured() {
    let base = base_of(2);
    let text = text_of(&base);
    let material = household(&text, 25);
    let plain = recipe(&base, "lora", 1e-3, Length::Steps(8));
    let good = contest(&text, vec![plain.clone()]);
    let full = with(&plain, |s| Settings { method: Method::Full(None), ..s });
    let limit = Limit { budget: Some(100_000), room: None };
    for (contest, kind, word) in [
        (Contest { limit, ..good.clone() }, ErrorKind::DoesNotFit, "lora"),
        (
            Contest { shots: vec![(60, Choice::Nearest)], ..good.clone() },
            ErrorKind::BadData,
            "fewer examples",
        ),
        (Contest { recipes: vec![full], ..good.clone() }, ErrorKind::Misuse, "folder"),
        (
            Contest { thresholds: Thresholds { resamples: 30, ..good.thresholds }, ..good },
            ErrorKind::Misuse,
            "resamples",
        ),
    ] {
        let mut watcher = Quiet::default();
        let found = compare(&base, &material, (&text, &reading()), &contest, &mut watcher);
        let error = found.err().expect(word);
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(word), "{error}");
        assert!(watcher.steps == 0 && watcher.notes.is_empty(), "{:?}", watcher.notes);
    }
}

#[test]
fn examples_of_texts_are_kept_as_texts() {
    let base = base_of(2);
    let text = text_of(&base);
    let folder = tempfile::tempdir().expect("a folder");
    let row = |i: usize| serde_json::json!({"text": format!("turn on the lamp in {i} minutes")}).to_string();
    write_rows(folder.path().join("rows.jsonl"), &(1..=60).map(row).collect::<Vec<_>>());
    let material = read(folder.path(), &text).expect("good rows");
    let outcome = judged(&base, &material, Vec::new());
    let Some(Product::FewShot(turns)) = outcome.kept("3-shot") else { panic!("nothing is kept") };
    assert!(turns.len() == 3 && turns.iter().all(|t| t.role == TEXT_ROLE), "{turns:?}");
    assert!(outcome.report.samples.iter().all(|s| s.outputs.len() == 2));
}

/// What an arm has trained stays in memory while the next one trains: an arm that fits only without it is left out, and
/// what is left passes the check that all of it fits.
#[test]
fn arms_are_fitted_beside_what_earlier_arms_hold() {
    let base = base_of(2);
    let material = household(&text_of(&base), 25);
    // Else blocks would keep less, and all would fit.
    let least = |s| Settings { keep: KeepChoice::Fixed(Keep::Inputs), ..s };
    let [one, two] = ["one", "two"].map(|name| with(&recipe(&base, name, 1e-3, Length::Steps(2)), least));
    let alone = one
        .check(&base, &material, RunRows::default(), &Limit::default())
        .expect("no limit")
        .plan
        .private_bytes;
    let held = size_of::<f32>() * one.settings.method.parameters(base.model.config());
    for (bytes, names) in [(alone + held / 2, &["one"][..]), (alone + held, &["one", "two"])] {
        let limit = Limit { budget: Some(bytes as u64), room: None };
        let mut watcher = Quiet::default();
        let beside = (RunRows::default(), &limit);
        let recipes = vec![one.clone(), two.clone()];
        let fit = fitting(recipes, &base, &material, beside, (false, true, false), &mut watcher);
        let recipes = fit.expect("one fits at least");
        assert_eq!(recipes.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), names);
        let told = watcher.notes.iter().any(|note| note.starts_with("left out: two: "));
        assert_eq!(told, names.len() == 1, "{:?}", watcher.notes);
        let contest = Contest { recipes, limit, ..contest(&text_of(&base), Vec::new()) };
        check(&base, &material, &reading(), &contest).expect("what was fitted fits");
    }
}

/// What is certainly wrong isn't written to its end, and what is counted right stays the same: on commands that the base
/// knows, and on those that it gets wrong. Rows that people see are written out.
#[test]
fn wrong_answers_end_early_and_count_the_same() {
    let base = base_of(2);
    let text = text_of(&base);
    let (material, subject) = (household(&text, 30), subject(&base));
    let everyday = Rows::of(
        data::load(&shipped("demo/generic_test.jsonl"), &text.tokenizer, &text.chat, &reading())
            .expect("rows"),
        &reading(),
    );
    let mut saved = false;
    for (rows, metric) in [
        (&material.held_out, Metric::Exact),
        (&material.held_out, Metric::Json),
        (&everyday.expect("samples"), Metric::Exact),
    ] {
        let questions = questions(rows, &text);
        let examples = &rows.data.examples;
        let count = examples.len();
        let asked = |samples| {
            let how = (Manner { metric: Some(metric), tokens: 24, samples }, &text);
            answer(&subject, &questions, examples, how, 64 << 20, &mut Quiet::default()).expect("answers")
        };
        let (short, long) = (asked(0), asked(count));
        assert_eq!(short.correct, long.correct);
        assert_eq!(long.samples.len(), count);
        let right = short.correct.expect("judged").iter().filter(|right| **right).count();
        assert!(short.tokens <= long.tokens);
        saved |= right < count / 2 && 5 * short.tokens < 4 * long.tokens;
    }
    assert!(saved, "nothing ended early");
}
