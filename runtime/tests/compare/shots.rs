//! Examples before rows: which they are, and that the rows' own targets stay what they were.

use std::path::Path;

use engraft_runtime::compare::material::{Limits, Material};
use engraft_runtime::compare::score::Subject;
use engraft_runtime::compare::shots::{Choice, rows_after, turns};
use engraft_runtime::data::masks::encode_after;
use engraft_runtime::data::{DataOptions, Example, Sample};
use engraft_runtime::model::chat::Message;
use engraft_runtime::model::text::Text;
use engraft_runtime::model::tokenizer::Special;
use engraft_runtime::{Advice, ErrorKind};

use super::{base_of, household, reading, subject, text_of, write_rows};

/// Positions that no test is about.
const CONTEXT: usize = 4096;

fn after(
    k: usize,
    choice: Choice,
    m: &Material,
    (text, options): (&Text, &DataOptions),
    base: &Subject,
) -> (Vec<Example>, Vec<Message>) {
    rows_after((k, choice), (&m.train, &m.held_out), (text, options), base, CONTEXT).expect("shots")
}

/// The ids that are to be predicted.
fn targets(row: &Example) -> Vec<u32> {
    row.ids.iter().zip(&row.mask).filter(|(_, m)| **m).map(|(id, _)| *id).collect()
}

#[test]
fn a_seed_chooses_the_same_examples_for_all_rows() {
    let base = base_of(1);
    let (text, plain) = (text_of(&base), subject(&base));
    let material = household(&text, 30);
    let chosen = |seed, k| after(k, Choice::Seeded(seed), &material, (&text, &reading()), &plain);
    let (rows, shots) = chosen(0, 3);
    assert_eq!((rows.clone(), shots.clone()), chosen(0, 3));
    assert_ne!(shots, chosen(1, 3).1);
    assert_eq!(shots, chosen(0, 5).1[..6], "more examples keep the ones there are");
    let asked =
        |samples: &[Sample]| -> Vec<Vec<Message>> { samples.iter().map(|s| turns(s, true)).collect() };
    let (train, held_out) = (asked(&material.train.samples), asked(&material.held_out.samples));
    for seed in 0..20 {
        let (_, shots) = chosen(seed, 5);
        let shots: Vec<Vec<Message>> = shots.chunks(2).map(<[Message]>::to_vec).collect();
        assert!(shots.iter().all(|s| train.contains(s) && !held_out.contains(s)), "seed {seed}");
        assert!(shots.iter().enumerate().all(|(i, s)| !shots[..i].contains(s)), "no example twice");
    }
    // Each row is what it is behind these very turns.
    let options = DataOptions { few_shot: shots, ..reading() };
    for (row, sample) in rows.iter().zip(&material.held_out.samples) {
        let expected = encode_after(sample, &text.tokenizer, &text.chat, &options).expect("a row");
        assert_eq!(row.ids[..], expected.ids[..row.ids.len()]);
    }
}

#[test]
fn the_nearest_examples_stand_nearest() {
    let base = base_of(1);
    let (text, plain) = (text_of(&base), subject(&base));
    let material = household(&text, 12);
    let (rows, common) = after(4, Choice::Nearest, &material, (&text, &reading()), &plain);
    assert!(common.is_empty(), "each row has examples of its own");
    let mut embedder = plain.embedder(plain.context()).expect("an embedder");
    let mut embed = |sample: &Sample| {
        let Sample::Pair { prompt, .. } = sample else { panic!("not a pair") };
        embedder.embed(&text.tokenizer.encode(prompt, Special::Plain)).expect("an embedding")
    };
    let known: Vec<Vec<f32>> = material.train.samples.iter().map(&mut embed).collect();
    let mut sets = Vec::new();
    for (row, sample) in rows.iter().zip(&material.held_out.samples) {
        let own = embed(sample);
        let likeness = |e: &Vec<f32>| -> f64 {
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            dot(e, &own) / (dot(e, e) * dot(&own, &own)).sqrt()
        };
        let mut order: Vec<usize> = (0..known.len()).collect();
        order.sort_by(|a, b| likeness(&known[*a]).total_cmp(&likeness(&known[*b])));
        let nearest = order[order.len() - 4..].to_vec();
        let few_shot = nearest.iter().flat_map(|i| turns(&material.train.samples[*i], true)).collect();
        let options = DataOptions { few_shot, ..reading() };
        let expected = encode_after(sample, &text.tokenizer, &text.chat, &options).expect("a row");
        assert_eq!(row.ids[..], expected.ids[..row.ids.len()]);
        sets.push(nearest);
    }
    assert!(sets.iter().any(|set| *set != sets[0]), "all rows chose alike: nothing was compared");
    // A question that is among the training rows is its own nearest.
    let own: Vec<Vec<f32>> = material.train.samples.iter().map(&mut embed).collect();
    let unit = |e: &Vec<f32>| (e.iter().map(|v| v * v).sum::<f32>() - 1.0).abs() < 1e-5;
    assert!(own.iter().all(unit));
    let same = Material { held_out: material.train.clone(), ..material.clone() };
    let (rows, _) = after(1, Choice::Nearest, &same, (&text, &reading()), &plain);
    for (row, sample) in rows.iter().zip(&same.train.samples) {
        let options = DataOptions { few_shot: turns(sample, true), ..reading() };
        let expected = encode_after(sample, &text.tokenizer, &text.chat, &options).expect("a row");
        assert_eq!(row.ids[..], expected.ids[..row.ids.len()]);
    }
}

fn written(folder: &Path, rows: &[String], text: &Text, options: &DataOptions) -> Material {
    write_rows(folder.join("rows.jsonl"), rows);
    Material::read(folder, text, options, Limits::default()).expect("good rows")
}

#[test]
fn targets_behind_examples_are_those_of_the_rows_alone() {
    let base = base_of(1);
    let (text, plain) = (text_of(&base), subject(&base));
    let chat = |i: usize| {
        let turn = |role: &str, content: String| serde_json::json!({"role": role, "content": content});
        serde_json::json!({"messages": [
            turn("system", "You run a house.".into()),
            turn("user", format!("turn on lamp {i}")),
            turn("assistant", format!("{{\"do\":\"on\",\"in\":{i}}}")),
            turn("user", "and off".into()),
            turn("assistant", "{\"do\":\"off\"}".into()),
        ]})
        .to_string()
    };
    let running =
        |i: usize| serde_json::json!({"text": format!("turn on the lamp in {i} minutes")}).to_string();
    let command = |i: usize| super::pair(&format!("turn on lamp {i}"), "{\"do\":\"on\"}");
    let raw = DataOptions { raw: true, ..reading() };
    let kinds: [(&str, &dyn Fn(usize) -> String, DataOptions); 6] = [
        ("chat", &chat, reading()),
        ("chat, cut", &chat, reading()),
        ("pairs of a chat model", &command, reading()),
        ("plain pairs", &command, raw.clone()),
        ("plain pairs, cut", &command, raw),
        ("running text", &running, reading()),
    ];
    for (name, row, options) in kinds {
        let folder = tempfile::tempdir().expect("a folder");
        let rows: Vec<String> = (100..130).map(row).collect();
        let mut material = written(folder.path(), &rows, &text, &options);
        let whole = material.train.clone();
        if name.contains("cut") {
            // Examples are whole, the rows are not.
            let short =
                DataOptions { max_seq_length: material.held_out.data.rows_max() - 2, ..options.clone() };
            material = written(folder.path(), &rows, &text, &short);
            assert!(material.held_out.data.truncated + material.train.data.truncated > 0, "{name}");
            material.train = whole;
        }
        for choice in [Choice::Seeded(0), Choice::Nearest] {
            let (rows, shots) = after(2, choice, &material, (&text, &options), &plain);
            assert_eq!(rows.len(), material.held_out.samples.len());
            for (row, own) in rows.iter().zip(&material.held_out.data.examples) {
                assert_eq!(targets(row), targets(own), "{name}, {choice:?}");
                assert!(row.rows() > own.rows() + 10, "{name}: there is nothing before the row");
                assert_eq!((row.ids.len(), row.mask[0]), (row.mask.len(), false));
                // What is predicted last, and from what, ends both.
                let end = row.mask.iter().rposition(|m| *m).expect("a target");
                let own_end = own.mask.iter().rposition(|m| *m).expect("a target");
                let n = own_end.min(6);
                assert_eq!(row.ids[end - n..=end], own.ids[own_end - n..=own_end], "{name}");
            }
            assert_eq!(shots.is_empty(), choice == Choice::Nearest);
            // What is kept for later prompts opens as the rows do.
            let opening = shots.iter().filter(|m| m.role == "system").count();
            assert_eq!(opening, usize::from(name.starts_with("chat") && !shots.is_empty()), "{name}");
        }
    }
}

#[test]
fn too_few_examples_and_too_long_rows_are_refused() {
    let base = base_of(1);
    let (text, plain) = (text_of(&base), subject(&base));
    let material = household(&text, 20);
    let refused = |k, context, options: &DataOptions| {
        let parts = (&material.train, &material.held_out);
        rows_after((k, Choice::Seeded(0)), parts, (&text, options), &plain, context).unwrap_err()
    };
    let error = refused(64, CONTEXT, &reading());
    assert_eq!(error.kind(), ErrorKind::BadData);
    assert!(
        error.message().contains("64") && error.advice() == Some(&Advice::FewerExamplesOrMoreRows),
        "{error}"
    );
    let error = refused(8, 64, &reading());
    assert_eq!(error.kind(), ErrorKind::Misuse);
    assert!(
        error.message().contains("test.jsonl:1")
            && error.advice() == Some(&Advice::FewerExamplesOrShorterRows),
        "{error}"
    );
    let short = DataOptions { max_seq_length: 5, ..reading() };
    assert!(refused(1, CONTEXT, &short).message().contains("only 0 training rows"));
}
