//! The rows of a comparison: how they are shared out, what tells them apart, and what was seen before.

use std::collections::BTreeSet;
use std::path::Path;

use engraft_runtime::ErrorKind;
use engraft_runtime::compare::material::{Limits, Material, Rows};
use engraft_runtime::data::{DataOptions, Sample};
use engraft_runtime::gate::leak::Leak;
use engraft_runtime::gate::task::Task;
use engraft_runtime::model::text::Text;

use super::{base_of, lines, pair, read, reading, shipped, text_of, write_rows};

fn text() -> Text {
    text_of(&base_of(1))
}

fn read_with(path: &Path, text: &Text, options: &DataOptions, limits: Limits) -> Material {
    Material::read(path, text, options, limits).expect("good rows")
}

fn numbers(rows: &Rows) -> Vec<u32> {
    rows.data.lines.clone()
}

fn source(rows: &Rows) -> String {
    rows.data.source.file_name().expect("a file").to_string_lossy().into_owned()
}

#[test]
fn one_file_becomes_three_parts_that_share_no_row() {
    let (text, file) = (text(), shipped("demo/generic_test.jsonl"));
    let whole = read(&file, &text).expect("the demo's rows");
    let parts = [&whole.train, &whole.valid, &whole.held_out].map(numbers);
    assert_eq!(parts[2].len(), 24, "a fifth of 120 rows is held out");
    assert_eq!(parts[1].len(), 19, "a fifth of the others validates");
    let all: BTreeSet<u32> = parts.iter().flatten().copied().collect();
    assert_eq!((all.len(), all.first(), all.last()), (120, Some(&1), Some(&120)));
    assert_eq!(whole.train.name(0), format!("generic_test.jsonl:{}", parts[0][0]));
    for (rows, part) in [(&whole.train, &parts[0]), (&whole.held_out, &parts[2])] {
        assert_eq!(rows.samples.len(), part.len());
        let (row, line) = (&rows.samples[0], &lines("demo/generic_test.jsonl")[part[0] as usize - 1]);
        let Sample::Pair { prompt, .. } = row else { panic!("not a pair: {row:?}") };
        assert!(line.contains(prompt.as_str()), "samples stand in the order of their rows");
    }

    let again = read(&file, &text).expect("the demo's rows");
    assert_eq!((again.digest.clone(), numbers(&again.held_out)), (whole.digest.clone(), parts[2].clone()));
    let other = DataOptions { split_seed: 1, ..reading() };
    let other = read_with(&file, &text, &other, Limits::default());
    assert!(numbers(&other.held_out) != parts[2] && other.digest != whole.digest);

    // Fewer rows to train on are a choice among them; what is held out, and what validates, stays.
    let few = Limits { train_rows: Some(10), ..Limits::default() };
    let few = read_with(&file, &text, &reading(), few);
    assert_eq!((numbers(&few.valid), numbers(&few.held_out)), (parts[1].clone(), parts[2].clone()));
    assert_eq!(few.train.samples.len(), 10);
    assert!(numbers(&few.train).iter().all(|row| parts[0].contains(row)));
    let fewer = Limits { train_rows: Some(10), held_out_rows: Some(7), folds: None };
    let fewer = read_with(&file, &text, &reading(), fewer);
    assert_eq!((numbers(&fewer.train), fewer.held_out.samples.len()), (numbers(&few.train), 7));
    assert!(numbers(&fewer.held_out).iter().all(|row| parts[2].contains(row)));
    assert_ne!(few.digest, fewer.digest);
}

#[test]
fn folders_give_the_parts_that_they_have() {
    let (text, rows) = (text(), lines("demo/generic_test.jsonl"));
    let parts = |names: &[&str]| {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, own) in names.iter().zip(rows.chunks(30)) {
            write_rows(folder.path().join(name), own);
        }
        let found = read(folder.path(), &text).expect("good rows");
        let count = |rows: &Rows| (source(rows), rows.samples.len());
        [count(&found.train), count(&found.valid), count(&found.held_out)]
    };
    let of = |expected: [(&str, usize); 3]| expected.map(|(name, count)| (name.to_string(), count));
    let (train, valid, test) = ("train.jsonl", "valid.jsonl", "test.jsonl");
    assert_eq!(parts(&[train, valid, test]), of([(train, 30), (valid, 30), (test, 30)]));
    assert_eq!(parts(&[train, test]), of([(train, 24), (train, 6), (test, 30)]));
    assert_eq!(parts(&[train, valid]), of([(train, 24), (train, 6), (valid, 30)]));
    assert_eq!(parts(&["rows.jsonl"]), of([("rows.jsonl", 19), ("rows.jsonl", 5), ("rows.jsonl", 6)]));
}

#[test]
fn a_part_without_rows_is_refused() {
    let (text, rows) = (text(), lines("demo/generic_test.jsonl"));
    let refused = |name: &str, rows: &[String], options: &DataOptions, words: &str| {
        let folder = tempfile::tempdir().expect("a folder");
        write_rows(folder.path().join(name), rows);
        let error = Material::read(folder.path(), &text, options, Limits::default()).expect_err(words);
        assert_eq!(error.kind(), ErrorKind::BadData, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    refused("train.jsonl", &rows[..1], &reading(), "no row is left");
    refused("train.jsonl", &rows[..2], &reading(), "to validate with");
    let none = DataOptions { valid_fraction: 0.0, ..reading() };
    refused("train.jsonl", &rows, &none, "hold out another share");
    refused("test.jsonl", &rows, &reading(), "no train.jsonl");
    let task = DataOptions { reader: Some(Task::Gsm8k.reader()), ..reading() };
    refused("train.jsonl", &rows, &task, "question");
}

#[test]
fn one_other_token_gives_another_digest() {
    let text = text();
    let digest = |part: &str, with: &str| {
        let folder = tempfile::tempdir().expect("a folder");
        for (i, name) in ["train.jsonl", "valid.jsonl", "test.jsonl"].iter().enumerate() {
            let row = |n: usize| {
                let lamp = if *name == part && n == 2 { with } else { "lamp" };
                pair(&format!("turn on {lamp} {i} {n}"), "{\"do\":\"on\"}")
            };
            write_rows(folder.path().join(name), &(0..4).map(row).collect::<Vec<_>>());
        }
        read(folder.path(), &text).expect("good rows").digest
    };
    let plain = digest("", "");
    assert_eq!(plain.len(), 64);
    assert_eq!(plain, digest("train.jsonl", "lamp"));
    for part in ["train.jsonl", "valid.jsonl", "test.jsonl"] {
        assert_ne!(plain, digest(part, "light"), "{part}");
    }
    // The same ids with other targets are other rows.
    let file = shipped("demo/generic_test.jsonl");
    let unmasked = DataOptions { mask_prompt: false, ..reading() };
    let whole = read_with(&file, &text, &unmasked, Limits::default());
    assert_ne!(whole.digest, read(&file, &text).expect("good rows").digest);
}

fn leak(held_out: &str, train: &str, exact: bool) -> Leak {
    Leak { held_out: held_out.into(), train: train.into(), exact }
}

#[test]
fn rows_that_were_seen_are_named() {
    let text = text();
    let folder = tempfile::tempdir().expect("a folder");
    let train: Vec<String> =
        (1..=20).map(|i| pair(&format!("Turn on lamp {i}"), "{\"do\":\"on\"}")).collect();
    let test = [
        pair("Open the door", "{\"do\":\"open\"}"),
        pair("Turn on lamp 7", "{\"do\":\"on\"}"),
        pair("turn ON -- lamp 12!", "{\"do\":\"on\"}"),
        pair("Turn on lamp 21", "{\"do\":\"on\"}"),
        // The same request with another meaning is another pair.
        pair("Turn on lamp 3", "{\"do\":\"check\"}"),
    ];
    write_rows(folder.path().join("train.jsonl"), &train);
    write_rows(folder.path().join("test.jsonl"), &test);
    // Wherever the split puts rows 7 and 12: to train with or to choose the best step by.
    for split_seed in 0..4 {
        let options = DataOptions { split_seed, ..reading() };
        let found = read_with(folder.path(), &text, &options, Limits::default());
        let expected =
            [leak("test.jsonl:2", "train.jsonl:7", true), leak("test.jsonl:3", "train.jsonl:12", false)];
        assert_eq!(found.leaks, expected, "split {split_seed}");
    }
    write_rows(folder.path().join("test.jsonl"), &[test[0].clone(), test[3].clone()]);
    assert!(read(folder.path(), &text).expect("good rows").leaks.is_empty());
}

#[test]
fn a_task_asks_in_its_own_way_and_its_questions_leak() {
    let text = text();
    let folder = tempfile::tempdir().expect("a folder");
    let row = |question: &str, answer: &str| {
        serde_json::json!({"question": question, "answer": answer}).to_string()
    };
    let train: Vec<String> = (1..=9).map(|i| row(&format!("What is {i} and 2?"), "So.\n#### 3")).collect();
    write_rows(folder.path().join("train.jsonl"), &train);
    let test = [row("What is 40 and 2?", "#### 42"), row("what is 4 AND 2", "Other words.\n#### 6")];
    write_rows(folder.path().join("test.jsonl"), &test);
    let options = DataOptions { reader: Some(Task::Gsm8k.reader()), max_seq_length: 250, ..reading() };
    let found = read_with(folder.path(), &text, &options, Limits::default());
    assert_eq!(found.leaks, [leak("test.jsonl:2", "train.jsonl:4", false)]);
    let Sample::Chat { messages, .. } = &found.held_out.samples[0] else { panic!("no conversation") };
    let said: Vec<(&str, &str)> = messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
    let expected =
        [("system", Task::Gsm8k.instruction()), ("user", "What is 40 and 2?"), ("assistant", "#### 42")];
    assert_eq!(said, expected);
    // Rows with a question and an answer are recognized by the question without a task, too.
    let plain = read_with(folder.path(), &text, &reading(), Limits::default());
    assert_eq!(plain.leaks, found.leaks);
}
