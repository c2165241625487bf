//! Answers that `eval` judges are those that the verdict counted.

use std::path::Path;

use engraft_runtime::gate::verdict::Verdict;

use super::{assert_refused, engraft, program, result_of, seedling, shipped, stderr, stdout};

#[test]
fn eval_counts_the_answers_that_the_verdict_counted() {
    let folder = tempfile::tempdir().expect("a folder");
    let within = |name: &str| folder.path().join(name).display().to_string();
    let (model, everyday) = (seedling(), shipped("demo/generic_test.jsonl"));
    let (data, store, file) = (within("data"), within("store"), within("answers.jsonl"));
    std::fs::create_dir(&data).expect("a folder");
    for part in ["train", "test"] {
        let rows = shipped(&format!("demo/private_{part}.jsonl"));
        std::fs::copy(rows, Path::new(&data).join(format!("{part}.jsonl"))).expect("copying");
    }
    let adapt = ["adapt", "-m", &model, "--data", &data, "--store", &store, "-t", "2", "-b", "4", "-k", "3"];
    let how =
        ["--resamples", "1000", "--no-built-in-retention", "--retention", &everyday, "--protect", "off"];
    let more = ["--metric", "json", "--iters", "30", "-lr", "2e-3", "--samples", "0"];
    let output = engraft(&[&adapt[..], &how, &more].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let verdict = std::fs::read_to_string(Path::new(&store).join("last/verdict.json")).expect("reading");
    let verdict = Verdict::from_json(&verdict).expect("a verdict");
    let share =
        |arm: &str| verdict.arms.iter().find(|a| a.name == arm).and_then(|a| a.accuracy).expect("answers");

    let eval = ["eval", "-m", &model, "--data", &data, "-t", "2", "--metric", "json"];
    let with_store = ["--store", &store, "--answers", &file];
    let (base, adapted) = (result_of(&eval), result_of(&[&eval[..], &with_store].concat()));
    for (found, expected) in [(&base, share("zero-shot")), (&adapted, share("lora"))] {
        let number = |key: &str| found["answers"][key].as_f64().expect("a number");
        assert_eq!(number("questions"), 50.0, "{found}");
        assert!((number("right") / 50.0 - expected).abs() < 1e-9, "{found}: {expected}");
    }
    assert!(share("lora") > share("zero-shot"), "it learned something");
    let lines = std::fs::read_to_string(&file).expect("reading");
    let lines: Vec<serde_json::Value> =
        lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let right = lines.iter().filter(|line| line["right"] == true).count();
    assert_eq!((lines.len(), adapted["answers"]["right"].as_u64()), (50, Some(right as u64)));
    assert!(lines.iter().all(|line| line["prompt"].is_string() && line["answer"].is_string()), "{lines:?}");

    answer_alike(&lines, &["-m", &model, "--store", &store, "-t", "2"], &within("talk.txt"));

    // What is active leaves the store like any adapter.
    let file = Path::new(&store).join("generations/000001/adapter.engraft").display().to_string();
    let written = |name: &str, words: &[&str]| {
        let output = within(name);
        let more = ["-m", &model, "-o", &output, "-t", "2"];
        result_of(&[words, &more].concat());
        std::fs::read(&output).expect("reading")
    };
    for words in [&["export", "--format", "gguf"][..], &["merge", "--unmeasured"]] {
        let by_store = written("by-store.gguf", &[words, &["--store", &store]].concat());
        let by_file = written("by-file.gguf", &[words, &["--lora", &file]].concat());
        assert!(by_store == by_file, "{words:?}");
    }
    let text = within("text.jsonl");
    std::fs::write(&text, "{\"text\": \"no question\"}\n").expect("writing");
    let of_text = ["eval", "-m", &model, "--data", &text, "--metric", "exact"];
    assert_refused(&of_text, 2, "usage", &["--metric", "running text"]);
    // Nothing that is read is written over, nor any row beside it.
    let copy = within("model.gguf");
    std::fs::copy(&model, &copy).expect("copying");
    let of_copy = ["eval", "-m", &copy, "--data", &data, "--store", &store, "--metric", "json"];
    for own in [copy.clone(), file, format!("{data}/test.jsonl"), format!("{data}/train.jsonl")] {
        let over = [&of_copy[..], &["--answers", &own]].concat();
        assert_refused(&over, 2, "usage", &["--answers", "is an input"]);
    }
    let nowhere = within("nowhere/answers.jsonl");
    let nowhere = [&of_copy[..], &["--answers", &nowhere]].concat();
    assert_refused(&nowhere, 1, "io", &["--answers", "nowhere"]);
    assert!(std::fs::read(&copy).expect("reading") == std::fs::read(&model).expect("reading"));
}

/// What generates and talks answers as was judged, without being told how.
fn answer_alike(lines: &[serde_json::Value], used: &[&str], talk_file: &str) {
    let answers: Vec<String> =
        lines.iter().map(|line| line["answer"].as_str().expect("text").into()).collect();
    let mut talk = String::new();
    for (line, answer) in lines.iter().zip(&answers) {
        let prompt = line["prompt"].as_str().expect("text");
        let said = result_of(&[&["generate", "-p", prompt], used].concat());
        assert_eq!(said["text"].as_str().map(str::trim), Some(answer.trim()), "{prompt}");
        talk += &format!("{prompt}\n/reset\n");
    }
    std::fs::write(talk_file, &talk).expect("writing");
    let lines_in = std::fs::File::open(talk_file).expect("opening");
    let output = program().arg("chat").args(used).stdin(lines_in).output().expect("running engraft");
    let told = stdout(&output);
    assert_eq!(
        told.lines().map(str::trim).collect::<Vec<_>>(),
        answers.iter().map(|a| a.trim()).collect::<Vec<_>>()
    );
    // A drawn answer takes a word.
    let drawn = ["--temp", "2", "--top-k", "0", "--top-p", "1", "--min-p", "0"];
    let prompt = lines[0]["prompt"].as_str().expect("text");
    let said = result_of(&[&["generate", "-p", prompt], used, &drawn].concat());
    assert_ne!(said["text"].as_str().map(str::trim), Some(answers[0].trim()));
}
