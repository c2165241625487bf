use super::*;
use crate::gate::leak::{RowHash, leaks};
use crate::rng::Rng;

const N: usize = 60;

/// Losses of about `mean` nats per token: an example's own difficulty, which all arms share by the first
/// seed, and an arm's own noise.
fn losses(mean: f64, noise: f64, seed: u64, n: usize) -> Vec<ExampleNll> {
    let mut shared = Rng::new(1, 1);
    let mut own = Rng::new(seed, 2);
    let one = |i| {
        let targets = 5 + i % 7;
        let mut normal = || f64::from(shared.normal());
        let token = mean + 0.5 * normal() + noise * f64::from(own.normal());
        ExampleNll { sum: token * targets as f64, targets }
    };
    (0..n).map(one).collect()
}

fn arm(name: &str, kind: ArmKind, mean: f64) -> ArmResult {
    let seed = name.bytes().map(u64::from).sum();
    let retention = match kind {
        ArmKind::Trained => {
            vec![Retention { text: "built-in".into(), delta_nll: 0.01, kl: 0.02, retained: None }]
        }
        _ => vec![],
    };
    let nll = losses(mean, 0.1, seed, N);
    ArmResult { name: name.into(), kind, nll, correct: None, retention, task_kl: None, strength: None }
}

fn zero() -> ArmResult {
    arm("zero-shot", ArmKind::ZeroShot, 3.0)
}

fn few(mean: f64) -> ArmResult {
    arm("5-shot", ArmKind::FewShot { k: 5 }, mean)
}

fn lora(mean: f64) -> ArmResult {
    arm("lora", ArmKind::Trained, mean)
}

fn quick() -> Thresholds {
    Thresholds { resamples: 1000, ..Thresholds::default() }
}

fn judged(arms: &[ArmResult]) -> Verdict {
    judge(arms, &[], &quick(), &Basis::default()).unwrap()
}

fn solved(count: usize) -> Option<Vec<bool>> {
    Some((0..N).map(|i| i < count).collect())
}

#[test]
fn a_better_arm_is_promoted_and_the_best_of_two() {
    let v = judged(&[zero(), few(2.8), lora(2.5), arm("dora", ArmKind::Trained, 2.4)]);
    assert_eq!(v.decision, Decision::Promote { arm: "dora".into() }, "{:#?}", v.reasons);
    assert_eq!(v.require_promotion().unwrap(), "dora");
    let told =
        "Promoted: dora predicts the held-out text better than the model alone, with or without examples";
    assert!(v.sentence.starts_with(told), "{}", v.sentence);
    let figures = ["dora beats zero-shot by 0.5", "dora beats zero-shot by 0.6"];
    assert!(v.reasons.iter().any(|r| figures.iter().any(|f| r.starts_with(f))), "{:#?}", v.reasons);
    assert!(v.arms[2].eligible && v.arms[3].eligible && v.undecided.is_empty());
    assert_eq!(v.arms[3].comparisons.len(), 2);
    // The second of two in Holm's order is tested at twice the first's level.
    let levels: Vec<f64> = v.arms[2..].iter().map(|a| a.comparisons[0].level).collect();
    assert!(levels.contains(&0.025) && levels.contains(&0.05), "{levels:?}");
}

#[test]
fn prompting_is_kept_where_training_adds_nothing() {
    let v = judged(&[zero(), few(2.5), lora(2.6)]);
    assert_eq!(v.decision, Decision::KeepPrompting { arm: "5-shot".into(), k: 5 }, "{:#?}", v.reasons);
    assert_eq!(v.decision.to_string(), "KEEP_PROMPTING(5)");
    assert_eq!(v.require_promotion().unwrap_err().kind(), ErrorKind::GateRefused);
    assert!(v.reasons.iter().any(|r| r.starts_with("lora is worse than 5-shot by 0.")), "{:#?}", v.reasons);
    assert!(!v.arms[2].negative_transfer, "it is better than zero-shot");
}

#[test]
fn negative_transfer_is_named() {
    let v = judged(&[zero(), few(3.0), lora(3.3)]);
    assert_eq!(v.decision, Decision::KeepBase);
    assert!(v.arms[2].negative_transfer);
    assert_eq!(
        v.sentence,
        "Nothing promoted, the model stays as it is: lora does worse than the model alone."
    );
    assert!(v.reasons.iter().any(|r| r.starts_with("Negative transfer: lora is worse than zero-shot")));
    assert!(!v.arms[1].negative_transfer);
}

#[test]
fn forgetting_turns_a_winner_down() {
    let mut forgetful = lora(2.0);
    forgetful.retention[0].delta_nll = 0.05;
    let v = judged(&[zero(), few(2.8), forgetful.clone()]);
    assert_eq!(v.decision, Decision::KeepPrompting { arm: "5-shot".into(), k: 5 });
    assert!(v.reasons.iter().any(|r| r.contains("is 0.0500 nats per token, above 0.03")), "{:#?}", v.reasons);
    for (delta_nll, kl) in [(0.0, 0.6), (f64::NAN, 0.0), (0.0, f64::INFINITY)] {
        forgetful.retention[0] = Retention { text: "t".into(), delta_nll, kl, retained: None };
        assert_eq!(judged(&[zero(), few(3.0), forgetful.clone()]).decision, Decision::KeepBase);
    }
    forgetful.retention.clear();
    let v = judged(&[zero(), few(3.0), forgetful]);
    assert!(v.promoted().is_none() && v.undecided.iter().any(|u| u.contains("wasn't measured")));
    let mut far = lora(2.0);
    far.task_kl = Some(0.5);
    let strict = |task_kl_max| Thresholds { task_kl_max, ..quick() };
    let promoted =
        |t| judge(&[zero(), few(2.8), far.clone()], &[], &t, &Basis::default()).unwrap().promoted().is_some();
    assert!(promoted(strict(None)) && promoted(strict(Some(1.0))) && !promoted(strict(Some(0.4))));
}

#[test]
fn lost_answers_to_a_retention_task_turn_a_winner_down() {
    let with = |lost: usize, gained: usize| {
        let mut arm = lora(2.0);
        let before: Vec<bool> = (0..N).map(|i| i < 50).collect();
        let after = (0..N).map(|i| if i < 50 { i >= lost } else { i < 50 + gained }).collect();
        arm.retention[0].retained = Some(Retained { before, after });
        judged(&[zero(), few(2.8), arm])
    };
    let v = with(8, 0);
    assert_eq!(v.decision, Decision::KeepPrompting { arm: "5-shot".into(), k: 5 });
    let told = "lora forgets answers on built-in: 70.0 % right, 83.3 % before; 8 lost and 0 gained of 60";
    assert!(v.reasons.iter().any(|r| r.starts_with(told)), "{:#?}", v.reasons);
    // As many gained as lost is another matter, and three lost can't tell.
    for (lost, gained) in [(8, 8), (3, 0), (0, 8)] {
        assert_eq!(with(lost, gained).promoted(), Some("lora"), "{lost} lost, {gained} gained");
    }
    let mut arm = lora(2.0);
    arm.retention[0].retained = Some(Retained { before: vec![true], after: vec![] });
    let refused = judge(&[zero(), few(2.8), arm], &[], &quick(), &Basis::default());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Misuse);
}

#[test]
fn lower_accuracy_turns_a_winner_down() {
    let with = |arm: ArmResult, count| ArmResult { correct: solved(count), ..arm };
    let v = judged(&[with(zero(), 20), with(few(2.9), 30), with(lora(2.5), 30)]);
    let told = "lora solves significantly more examples than zero-shot: 10 examples";
    assert!(v.reasons.iter().any(|r| r.starts_with(told)), "{:#?}", v.reasons);
    let v = judged(&[with(zero(), 30), with(few(2.9), 30), with(lora(2.5), 20)]);
    assert!(v.promoted().is_none() && v.arms[2].negative_transfer, "{:#?}", v.reasons);
    assert!(v.reasons.iter().any(|r| r.contains("significantly fewer examples")), "{:#?}", v.reasons);
    // Three discordant pairs can't tell.
    let loss_alone = Thresholds { accuracy_required: false, ..quick() };
    let arms = [with(zero(), 30), with(few(2.9), 30), with(lora(2.5), 27)];
    let v = judge(&arms, &[], &loss_alone, &Basis::default()).unwrap();
    assert_eq!(v.promoted(), Some("lora"));
    let v = judged(&arms);
    assert!(v.promoted().is_none(), "{:#?}", v.reasons);
    assert!(v.undecided.iter().any(|u| u.contains("isn't shown to solve more")), "{:#?}", v.undecided);
    let more = judged(&[arms[0].clone(), arms[1].clone(), with(lora(2.5), 40)]);
    assert_eq!(more.promoted(), Some("lora"));
    assert_eq!(
        more.sentence,
        "Promoted: lora answers 40 of 60 held-out examples right; the model alone answers 30. It writes \
         ordinary text about 1 % worse than before."
    );
    assert!(v.reasons.iter().any(|r| r.contains("5 discordant pairs are needed")), "{:#?}", v.reasons);
    assert_eq!(v.arms[0].accuracy, Some(0.5));
}

#[test]
fn a_broken_arm_harms_nobody_else() {
    let mut broken = arm("full", ArmKind::Trained, 1.0);
    broken.nll[7].sum = f64::NAN;
    let v = judged(&[zero(), few(2.8), lora(2.4), broken.clone()]);
    assert_eq!(v.promoted(), Some("lora"), "{:#?}", v.reasons);
    assert!(v.reasons.iter().any(|r| r.starts_with("full is broken")) && !v.arms[3].eligible);
    assert!(v.arms[3].nll.is_none() && !v.to_json().unwrap().contains("NaN"));
    broken.nll[7].sum = f64::INFINITY;
    assert_eq!(judged(&[zero(), few(3.0), broken]).decision, Decision::KeepBase);
}

#[test]
fn a_broken_few_shot_arm_is_no_rival() {
    for loss in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let mut broken = arm("9-shot", ArmKind::FewShot { k: 9 }, 2.6);
        broken.nll[7].sum = loss;
        // Solved answers of an arm without a loss prove nothing either.
        broken.correct = solved(N);
        let mut tuned = lora(2.4);
        tuned.correct = solved(N / 2);
        let v = judged(&[zero(), few(2.8), broken.clone(), tuned.clone()]);
        assert_eq!(v.promoted(), Some("lora"), "{:#?}", v.reasons);
        let against: Vec<&str> = v.arms[3].comparisons.iter().map(|c| c.against.as_str()).collect();
        assert_eq!(against, ["zero-shot", "5-shot"]);
        for reason in ["9-shot is broken", "lora isn't compared with 9-shot"] {
            assert!(v.reasons.iter().any(|r| r.starts_with(reason)), "{reason}: {:#?}", v.reasons);
        }
        // It stands in nobody's way, and helps nobody: what the others get is what they get without it.
        let mut without = judged(&[zero(), few(2.8), tuned.clone()]);
        without.arms[2].reasons.push(v.arms[3].reasons.last().unwrap().clone());
        assert_eq!(v.arms[3], without.arms[2]);
        // A worse trained arm still loses.
        assert_eq!(judged(&[zero(), few(2.4), broken.clone(), lora(2.6)]).promoted(), None);

        let alone = [zero(), broken, tuned];
        let v = judged(&alone);
        assert_eq!(v.decision, Decision::KeepBase);
        assert!(
            v.undecided.iter().any(|u| u.starts_with("No few-shot arm has a finite loss")),
            "{:?}",
            v.undecided
        );
        let t = Thresholds { few_shot_required: false, ..quick() };
        assert_eq!(judge(&alone, &[], &t, &Basis::default()).unwrap().promoted(), Some("lora"));
    }
}

#[test]
fn too_few_examples_decide_nothing() {
    let short = |mut arm: ArmResult, n| {
        arm.nll.truncate(n);
        arm
    };
    let arms = |n| [short(zero(), n), short(few(2.8), n), short(lora(1.0), n)];
    let v = judged(&arms(19));
    assert_eq!(v.decision, Decision::KeepBase);
    assert!(v.undecided[0].contains("19 held-out examples are too few"), "{:?}", v.undecided);
    assert_eq!(judged(&arms(20)).promoted(), Some("lora"));
    // Thresholds can't go below what the level allows.
    let t = Thresholds { examples_min: 0, ..quick() };
    let v = judge(&arms(5), &[], &t, &Basis::default()).unwrap();
    assert!(v.promoted().is_none() && v.held_out.examples_min == 6);
    // Examples without targets are none.
    let mut empty = arms(20);
    empty.iter_mut().for_each(|a| a.nll[3] = ExampleNll::default());
    assert!(judged(&empty).promoted().is_none());
}

#[test]
fn leaks_are_refused_and_named() {
    let train = [RowHash::new("train.jsonl:1", "What is two plus 2?")];
    let held = [RowHash::new("valid.jsonl:9", "what is TWO plus 2")];
    let found = leaks(&train, &held);
    let v = judge(&[zero(), few(2.8), lora(1.0)], &found, &quick(), &Basis::default()).unwrap();
    assert_eq!((&v.decision, v.leak_count), (&Decision::KeepBase, 1));
    assert!(v.sentence.contains("valid.jsonl:9 nearly equals train.jsonl:1"), "{}", v.sentence);
}

#[test]
fn equal_arms_have_no_winner() {
    // The same arm twice: every difference is 0.
    let twin =
        ArmResult { name: "twin".into(), kind: ArmKind::Trained, retention: lora(0.0).retention, ..zero() };
    let v = judged(&[zero(), few(3.0), twin]);
    assert!(v.promoted().is_none() && !v.arms[2].negative_transfer);
    assert!(v.undecided.iter().any(|u| u.starts_with("twin against zero-shot")));
    // Arms that differ by luck alone, as with shuffled labels: two trained ones and a few-shot.
    let lucky = |seed: u64| {
        let noise = |mut arm: ArmResult, salt| {
            arm.nll = losses(3.0, 0.5, seed * 10 + salt, N);
            arm
        };
        let arms = [
            noise(zero(), 1),
            noise(few(3.0), 2),
            noise(lora(3.0), 3),
            noise(arm("b", ArmKind::Trained, 3.0), 4),
        ];
        judge(
            &arms,
            &[],
            &Thresholds { few_shot_required: seed.is_multiple_of(2), ..quick() },
            &Basis { seed, ..Basis::default() },
        )
        .unwrap()
    };
    let verdicts: Vec<Verdict> = (0..100).map(lucky).collect();
    assert!(verdicts.iter().filter(|v| v.promoted().is_none()).count() >= 99);
    assert!(verdicts.iter().filter(|v| v.decision == Decision::KeepBase).count() >= 95);
    // Against zero-shot alone, without the second hurdle.
    let alone = |seed: &u64| {
        let noise = |mut arm: ArmResult, salt| {
            arm.nll = losses(3.0, 0.5, seed * 10 + salt, N);
            arm
        };
        let t = Thresholds { few_shot_required: false, ..quick() };
        let v = judge(
            &[noise(zero(), 1), noise(lora(3.0), 2)],
            &[],
            &t,
            &Basis { seed: *seed, ..Basis::default() },
        );
        v.unwrap().promoted().is_none()
    };
    assert!((0..100).filter(alone).count() >= 95);
}

#[test]
fn training_needs_few_shot_to_compare_with() {
    let v = judged(&[zero(), lora(2.0)]);
    assert!(
        v.promoted().is_none()
            && v.undecided.iter().any(|u| u.contains("Few-shot prompting wasn't measured"))
    );
    let t = Thresholds { few_shot_required: false, ..quick() };
    let v = judge(&[zero(), lora(2.0)], &[], &t, &Basis::default()).unwrap();
    assert_eq!(v.promoted(), Some("lora"));
    assert_eq!(judged(&[zero()]).decision, Decision::KeepBase);
}

#[test]
fn a_least_improvement_is_demanded() {
    let arms = [zero(), few(2.99), lora(2.5)];
    let promoted = |improvement_min| {
        let t = Thresholds { improvement_min, ..quick() };
        judge(&arms, &[], &t, &Basis::default()).unwrap()
    };
    let v = promoted(0.3);
    assert_eq!(v.promoted(), Some("lora"));
    // The gain is shown whole, not less what is demanded.
    assert_eq!(
        v.arms[2].comparisons[0].gain.map(|g| (g * 1e6).round()),
        judged(&arms).arms[2].comparisons[0].gain.map(|g| (g * 1e6).round())
    );
    assert!(promoted(0.8).promoted().is_none());
}

#[test]
fn equal_input_gives_equal_bytes() {
    let binding = Basis { model: "aa".into(), data_split: "bb".into(), settings: "cc".into(), seed: 7 };
    let arms = [zero(), few(2.8), lora(2.5)];
    let json = |b: &Basis| judge(&arms, &[], &quick(), b).unwrap().to_json().unwrap();
    let text = json(&binding);
    assert_eq!(text, json(&binding));
    assert_ne!(text, json(&Basis { seed: 8, ..binding.clone() }));
    assert!(
        text.starts_with(
            "{\n  \"schema\": 1,\n  \"decision\": \"PROMOTE\",\n  \"arm\": \"lora\",\n  \"sentence\": "
        ),
        "{text}"
    );
    let back = Verdict::from_json(&text).unwrap();
    assert_eq!((back.decision.to_string(), &back.binding), ("PROMOTE(lora)".into(), &binding));
    assert_eq!(back.arms[2].kind, ArmKind::Trained);
    assert_eq!(Verdict::from_json("{}").unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(Verdict::from_json("{\"schema\":9}").unwrap_err().kind(), ErrorKind::Unsupported);
    for arms in [vec![zero()], vec![zero(), few(2.5)]] {
        let text = judged(&arms).to_json().unwrap();
        assert_eq!(Verdict::from_json(&text).unwrap().decision, judged(&arms).decision);
    }
}

#[test]
fn an_arm_does_not_move_anothers_interval() {
    let alone = judged(&[zero(), few(2.8), lora(2.5)]);
    let beside = judged(&[zero(), few(2.8), lora(2.5), arm("bad", ArmKind::Trained, 4.0)]);
    assert_eq!(alone.arms[1], beside.arms[1]);
    assert_eq!(alone.arms[2].comparisons[0].gain, beside.arms[2].comparisons[0].gain);
    assert_eq!(beside.promoted(), Some("lora"));
}

#[test]
fn wrong_arguments_are_refused() {
    let kind = |arms: &[ArmResult], t: Thresholds| {
        judge(arms, &[], &t, &Basis::default()).map(|_| ()).unwrap_err().kind()
    };
    assert_eq!(kind(&[few(2.0)], quick()), ErrorKind::Misuse);
    assert_eq!(kind(&[], quick()), ErrorKind::Misuse);
    assert_eq!(kind(&[zero(), zero()], quick()), ErrorKind::Misuse);
    assert_eq!(kind(&[zero(), few(2.0), few(2.0)], quick()), ErrorKind::Misuse);
    assert_eq!(kind(&[zero(), arm("x", ArmKind::FewShot { k: 0 }, 1.0)], quick()), ErrorKind::Misuse);
    let mut other = lora(2.0);
    other.nll[0].targets += 1;
    assert_eq!(kind(&[zero(), other.clone()], quick()), ErrorKind::Misuse);
    other.nll.pop();
    assert_eq!(kind(&[zero(), other], quick()), ErrorKind::Misuse);
    assert_eq!(
        kind(&[zero(), ArmResult { correct: Some(vec![true]), ..lora(2.0) }], quick()),
        ErrorKind::Misuse
    );
    assert_eq!(kind(&[ArmResult { nll: vec![], ..zero() }], quick()), ErrorKind::BadData);
    let mut nan = zero();
    nan.nll[0].sum = f64::NAN;
    assert_eq!(kind(&[nan], quick()), ErrorKind::NonFinite);
    for t in [
        Thresholds { alpha: 0.0, ..quick() },
        Thresholds { alpha: f64::NAN, ..quick() },
        Thresholds { resamples: 0, ..quick() },
        Thresholds { resamples: 30, ..quick() },
        Thresholds { resamples: usize::MAX, ..quick() },
        Thresholds { improvement_min: -1.0, ..quick() },
        Thresholds { retention_kl_max: f64::NAN, ..quick() },
    ] {
        assert_eq!(kind(&[zero()], t), ErrorKind::Misuse, "{t:?}");
    }
}

#[test]
fn harm_that_the_corrected_interval_does_not_show_is_explained() {
    let told = |upper: f64| {
        let plain = Comparison::without_figures("zero-shot", 0.025, None);
        let c = Comparison { gain: Some(-0.1), lower: Some(-0.2), upper: Some(upper), worse: true, ..plain };
        report::sentence("lora", &c, ArmKind::Trained, true)
    };
    assert!(told(0.01).contains("[-0.2000, 0.0100] at 97.5 % (below 0 without Holm's correction)"));
    assert!(told(-0.01).ends_with("[-0.2000, -0.0100] at 97.5 %."), "{}", told(-0.01));
}

fn in_use(mean: f64) -> ArmResult {
    arm("generation 1", ArmKind::Active, mean)
}

#[test]
fn nothing_replaces_what_it_does_not_beat() {
    let kept = Decision::KeepActive { arm: "generation 1".into() };
    // Both beat the base, neither what is in use, in whatever order they are given.
    for arms in
        [vec![zero(), in_use(2.0), few(2.5), lora(2.4)], vec![lora(2.4), few(2.5), in_use(2.0), zero()]]
    {
        let v = judged(&arms);
        assert_eq!(v.decision, kept, "{:#?}", v.reasons);
        assert!(
            v.sentence.contains("what is in use stays: lora isn't shown to do better than what is in use")
        );
    }
    // Nor does its twin.
    let twin = ArmResult {
        name: "lora".into(),
        kind: ArmKind::Trained,
        retention: lora(2.0).retention,
        ..in_use(2.0)
    };
    assert_eq!(judged(&[zero(), few(2.8), in_use(2.0), twin]).decision, kept);
    // What is better does, be the rest as it may.
    let promoted = Decision::Promote { arm: "lora".into() };
    assert_eq!(judged(&[zero(), few(2.8), in_use(2.4), lora(2.0)]).decision, promoted);
    let prompted = Decision::KeepPrompting { arm: "5-shot".into(), k: 5 };
    assert_eq!(judged(&[zero(), few(2.0), in_use(2.4)]).decision, prompted);
    // A lower loss doesn't make up for a single answer.
    let answers = |arm: ArmResult, right| ArmResult { correct: solved(right), ..arm };
    let all = |right| {
        [answers(zero(), 5), answers(few(2.8), 6), answers(in_use(2.4), 40), answers(lora(2.0), right)]
    };
    assert_eq!(judged(&all(40)).decision, promoted);
    let v = judged(&all(39));
    assert_eq!(v.decision, kept);
    assert!(v.sentence.contains("lora answers fewer examples right than what is in use"), "{}", v.sentence);
    // It stays where nothing can be decided; and what is broken gives way.
    let leak = Leak { held_out: "a:1".into(), train: "b:1".into(), exact: true };
    let leaky = judge(&[zero(), in_use(2.4), lora(2.0)], &[leak], &quick(), &Basis::default()).unwrap();
    assert_eq!(leaky.decision, kept);
    let mut broken = in_use(2.0);
    broken.nll[0].sum = f64::NAN;
    assert_eq!(judged(&[zero(), few(2.8), broken, lora(2.4)]).decision, promoted);
    let two = [zero(), in_use(2.0), ArmResult { name: "generation 2".into(), ..in_use(2.0) }];
    assert_eq!(judge(&two, &[], &quick(), &Basis::default()).unwrap_err().kind(), ErrorKind::Misuse);
}

#[test]
fn a_baseline_is_measured_and_never_promoted() {
    let full = |mean| arm("full", ArmKind::Baseline, mean);
    let retention = lora(0.0).retention;
    let full = |mean| ArmResult { retention: retention.clone(), ..full(mean) };
    let v = judged(&[zero(), few(2.8), lora(2.5), full(2.0)]);
    assert_eq!(v.decision, Decision::Promote { arm: "lora".into() });
    assert!(v.arms[3].comparisons.iter().all(|c| c.better) && !v.arms[3].eligible, "{:#?}", v.arms[3]);
    let v = judged(&[zero(), few(3.0), full(2.0)]);
    assert_eq!(v.decision, Decision::KeepBase);
    assert!(v.sentence.contains("full is only a baseline"), "{}", v.sentence);
    // What it isn't a rival of, it doesn't cost: the others are judged as without it.
    let alone = judged(&[zero(), few(2.8), lora(2.5)]);
    let beside = judged(&[zero(), few(2.8), lora(2.5), full(2.0)]);
    assert_eq!(alone.arms[2], beside.arms[2]);
}

#[test]
fn what_must_be_kept_is_the_users_choice() {
    let forgetful = |delta_nll| {
        let retention = vec![Retention { text: "built-in".into(), delta_nll, kl: 0.1, retained: None }];
        vec![zero(), few(3.0), ArmResult { retention, ..lora(2.0) }]
    };
    let judged = |keep: KeepGeneral, delta_nll| {
        let (retention_nll_max, retention_kl_max) = keep.ceilings();
        let thresholds = Thresholds { retention_nll_max, retention_kl_max, ..quick() };
        judge(&forgetful(delta_nll), &[], &thresholds, &Basis::default()).unwrap()
    };
    for (keep, most) in [(KeepGeneral::Strict, 0.03), (KeepGeneral::Moderate, 0.1)] {
        assert!(judged(keep, most - 0.001).promoted().is_some(), "{keep:?}");
        let v = judged(keep, most + 0.001);
        assert!(
            v.promoted().is_none() && v.sentence.contains("writes ordinary text about"),
            "{}",
            v.sentence
        );
    }
    let v = judged(KeepGeneral::Off, 4.0);
    assert!(v.sentence.ends_with("about 5360 % worse than before."), "{}", v.sentence);
    assert!(v.reasons.iter().any(|r| r.ends_with("not judged.")), "{:#?}", v.reasons);
    // No ceiling is a word that JSON knows.
    let read = Verdict::from_json(&v.to_json().unwrap()).unwrap();
    assert_eq!((read.thresholds, read.decision), (v.thresholds, v.decision));
    assert!(
        judged(KeepGeneral::Strict, -0.01).sentence.ends_with("It writes ordinary text as well as before.")
    );
}
