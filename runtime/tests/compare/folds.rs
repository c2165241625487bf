//! Few rows, each held out once in turn: how they are shared out, and what turns decide.

use std::collections::BTreeMap;

use engraft_runtime::ErrorKind;
use engraft_runtime::compare::answers::Metric;
use engraft_runtime::compare::material::{Folds, Limits, Material};
use engraft_runtime::compare::retention::RetentionSet;
use engraft_runtime::compare::shots::Choice;
use engraft_runtime::compare::{Contest, Product, check_decidable, compare};
use engraft_runtime::error::Result;
use engraft_runtime::gate::verdict::{Decision, Thresholds};
use engraft_runtime::model::text::Text;
use engraft_runtime::rng::Rng;
use engraft_runtime::run::Length;

use super::{Quiet, base_of, lines, pair, reading, recipe, text_of, write_rows};

const TURNS: Folds = Folds { turns: 3, below: usize::MAX };

fn in_turns(rows: &[String], text: &Text, folds: Folds) -> Result<Material> {
    let folder = tempfile::tempdir().expect("a folder");
    write_rows(folder.path().join("train.jsonl"), rows);
    Material::read(folder.path(), text, &reading(), Limits { folds: Some(folds), ..Limits::default() })
}

#[test]
fn each_row_is_held_out_once_and_equal_rows_together() {
    let text = text_of(&base_of(1));
    let mut rows = lines("demo/private_test.jsonl")[..23].to_vec();
    rows.extend([rows[3].clone(), rows[3].clone()]);
    let material = in_turns(&rows, &text, TURNS).expect("good rows");
    assert_eq!((material.folds.len(), material.held_out.samples.len()), (3, 25));
    let mut turn_of = BTreeMap::new();
    for (turn, fold) in material.folds.iter().enumerate() {
        let mut others: Vec<u32> =
            [&fold.train, &fold.valid].iter().flat_map(|r| r.data.lines.clone()).collect();
        others.extend(&fold.held_out.data.lines);
        others.sort_unstable();
        assert_eq!(others, (1..=25).collect::<Vec<_>>(), "turn {turn} has every row on one side");
        for (line, sample) in fold.held_out.data.lines.iter().zip(&fold.held_out.samples) {
            assert!(turn_of.insert(*line, turn).is_none(), "row {line} is held out twice");
            let at = material.held_out.data.lines.iter().position(|l| l == line).expect("held out");
            assert_eq!(material.held_out.samples[at], *sample);
        }
        assert!((6..=12).contains(&fold.held_out.samples.len()) && !fold.valid.samples.is_empty());
    }
    assert!(turn_of[&4] == turn_of[&24] && turn_of[&4] == turn_of[&25], "{turn_of:?}");
    assert!(material.leaks.is_empty(), "{:?}", material.leaks);
    // All rows are there for what is kept.
    assert_eq!(material.train.samples.len() + material.valid.samples.len(), 25);
    let again = in_turns(&rows, &text, TURNS).expect("good rows");
    let other = in_turns(&rows, &text, Folds { turns: 4, ..TURNS }).expect("good rows");
    assert!(again.digest == material.digest && other.digest != material.digest);

    // Where enough rows would be held out anyway, nothing is done in turns.
    let plenty = in_turns(&rows, &text, Folds { turns: 3, below: 5 }).expect("good rows");
    assert!(plenty.folds.is_empty() && plenty.held_out.samples.len() == 5);
    let few = in_turns(&rows[..2], &text, TURNS).expect_err("two rows in three turns");
    assert_eq!(few.kind(), ErrorKind::BadData);
    let few = in_turns(&rows[..15], &text, TURNS).expect("good rows");
    let few = check_decidable(&few, &Thresholds::default(), 0.2).expect_err("fifteen decide nothing");
    assert_eq!(few.kind(), ErrorKind::GateRefused);
    assert!(few.to_string().contains("it takes 20") && !few.to_string().contains("rows in all"), "{few}");
}

/// Thirty private commands: six would be held out, which decides nothing. In turns they decide, and what is kept is
/// trained on all of them.
#[test]
fn few_rows_decide_in_turns() {
    let base = base_of(2);
    let text = text_of(&base);
    let rows = lines("demo/private_train.jsonl")[..30].to_vec();
    let material = in_turns(&rows, &text, TURNS).expect("good rows");
    let general = RetentionSet::built_in(&text, 64).expect("built in");
    let contest = Contest {
        shots: vec![(2, Choice::Seeded(0))],
        recipes: vec![recipe(&base, "lora", 2e-3, Length::Steps(30))],
        metric: Some(Metric::Json),
        answer_tokens: 24,
        retention: general,
        thresholds: Thresholds {
            retention_nll_max: 9.0,
            retention_kl_max: 9.0,
            resamples: 2000,
            ..Thresholds::default()
        },
        samples: 2,
        ..Contest::new("adapt")
    };
    let mut watcher = Quiet::default();
    let outcome = compare(&base, &material, (&text, &reading()), &contest, &mut watcher).expect("a verdict");
    let verdict = &outcome.verdict;
    assert_eq!(verdict.promoted(), Some("lora"), "{:#?}", verdict.reasons);
    let lora = verdict.arms.iter().find(|arm| arm.name == "lora").expect("the arm");
    assert_eq!(lora.comparisons.len(), 2);
    assert_eq!(verdict.held_out.examples, 30);
    assert_eq!(lora.retention.len(), 2, "what was forgotten is measured on what is kept");
    assert!(outcome.report.samples.iter().all(|sample| sample.outputs.len() == 3));
    let Some(Product::Adapter(adapter)) = outcome.kept("lora") else { panic!("nothing is kept") };
    assert!(adapter.binding.is_some());
    let turns = watcher.notes.iter().filter(|note| note.starts_with("turn ")).count();
    assert_eq!(turns, 3, "{:?}", watcher.notes);
    let Some(Product::FewShot(examples)) = outcome.kept("2-shot") else { panic!("nothing is kept") };
    assert_eq!(examples.len(), 4);
}

/// The negative control: rows whose answers were dealt out anew teach nothing that another row's turn could show.
#[test]
fn shuffled_labels_are_not_promoted_in_turns() {
    let base = base_of(2);
    let text = text_of(&base);
    let of = |line: &String, key: &str| {
        let row: serde_json::Value = serde_json::from_str(line).expect("JSON");
        row[key].as_str().expect("a text").to_string()
    };
    let rows = lines("demo/generic_test.jsonl")[..36].to_vec();
    let mut labels: Vec<String> = rows.iter().map(|row| of(row, "completion")).collect();
    Rng::new(5, 3).shuffle(&mut labels);
    let dealt: Vec<String> =
        rows.iter().zip(&labels).map(|(row, label)| pair(&of(row, "prompt"), label)).collect();
    let material = in_turns(&dealt, &text, TURNS).expect("good rows");
    let contest = Contest {
        recipes: vec![recipe(&base, "lora", 2e-3, Length::Steps(40))],
        metric: Some(Metric::Json),
        answer_tokens: 24,
        retention: RetentionSet::built_in(&text, 64).expect("built in"),
        thresholds: Thresholds {
            retention_nll_max: 9.0,
            retention_kl_max: 9.0,
            resamples: 1000,
            few_shot_required: false,
            ..Thresholds::default()
        },
        ..Contest::new("adapt")
    };
    let outcome =
        compare(&base, &material, (&text, &reading()), &contest, &mut Quiet::default()).expect("a verdict");
    assert_eq!(outcome.verdict.decision, Decision::KeepBase, "{:#?}", outcome.verdict.reasons);
}
