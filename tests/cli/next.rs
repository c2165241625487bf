//! Each outcome ends in a command, and the command works as printed.

use std::path::Path;
use std::process::Output;

use super::{engraft, seedling, shipped, stderr};

/// The last line of stderr that begins so, without its beginning.
fn told(output: &Output, begins: &str) -> String {
    let all = stderr(output);
    let line = all.lines().rev().find_map(|line| line.strip_prefix(begins));
    line.unwrap_or_else(|| panic!("no line begins with {begins}: {all}")).to_string()
}

/// Runs a command as a shell does; returns its exit code.
fn typed(command: &str, folder: &Path) -> Option<i32> {
    let binary = Path::new(env!("CARGO_BIN_EXE_engraft"));
    let own = binary.parent().expect("its folder").display().to_string();
    let path = format!("{own}:{}", std::env::var("PATH").unwrap_or_default());
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", command]).env("PATH", path).current_dir(folder);
    let output = shell.output().expect("a shell");
    assert!(!stderr(&output).contains("error:"), "{command}: {}", stderr(&output));
    output.status.code()
}

/// Rows of the demo to train on, and others to decide by, each answer changed by `change`.
fn rows(folder: &Path, change: impl Fn(usize, &str) -> String) -> String {
    let data = folder.join("my rows");
    std::fs::create_dir(&data).expect("a folder");
    for part in ["train", "test"] {
        let text = std::fs::read_to_string(shipped(&format!("demo/private_{part}.jsonl"))).expect("reading");
        let lines: Vec<String> = text.lines().enumerate().map(|(i, line)| change(i, line)).collect();
        std::fs::write(data.join(format!("{part}.jsonl")), lines.join("\n")).expect("writing");
    }
    data.display().to_string()
}

/// Asserts that a comparison succeeded and ends in a command with this word, which works.
fn ends_in(output: &Output, begins: &str, word: &str, folder: &Path) {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    let command = told(output, begins);
    assert!(command.contains(word), "{command}");
    assert_eq!(typed(&command, folder), Some(0), "{command}");
}

const QUICK: [&str; 12] = [
    "-t",
    "2",
    "-b",
    "4",
    "-k",
    "3",
    "--resamples",
    "1000",
    "--samples",
    "0",
    "--no-built-in-retention",
    "--protect=off",
];

#[test]
fn what_is_promoted_is_used_as_printed() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, everyday) = (seedling(), shipped("demo/generic_test.jsonl"));
    let data = rows(folder.path(), |_, line| line.to_string());
    let store = folder.path().join("store").display().to_string();
    let learn = ["--retention", &everyday, "--metric", "json", "--iters", "30", "-lr", "2e-3"];
    let adapt = ["adapt", "-m", &model, "--data", &data, "--store", &store];
    let output = engraft(&[&adapt[..], &QUICK, &learn].concat());
    ends_in(&output, "Use it: ", "--store", folder.path());

    // `compare` keeps arms in folders.
    let out = folder.path().join("compared").display().to_string();
    let compare = ["compare", "-m", &model, "--data", &data, "--out", &out, "--arms", "few-shot,lora"];
    let output = engraft(&[&compare[..], &QUICK, &learn].concat());
    ends_in(&output, "Type: ", "--lora", folder.path());
}

#[test]
fn examples_that_win_are_used_as_printed() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data) = (seedling(), rows(folder.path(), |_, line| line.to_string()));
    let (store, out) = (folder.path().join("home"), folder.path().join("compared"));
    let (store, out) = (store.display().to_string(), out.display().to_string());
    let by_loss = ["--arms", "few-shot"];
    let adapt = ["adapt", "-m", &model, "--data", &data, "--store", &store];
    let output = engraft(&[&adapt[..], &QUICK, &by_loss].concat());
    ends_in(&output, "Use it: ", "--store", folder.path());
    let compare = ["compare", "-m", &model, "--data", &data, "--out", &out];
    let output = engraft(&[&compare[..], &QUICK, &by_loss].concat());
    ends_in(&output, "Type: ", "--arms few-shot", folder.path());
}

#[test]
fn what_is_refused_is_tried_again_as_printed() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, everyday) = (seedling(), shipped("demo/generic_test.jsonl"));
    // Every answer is another's, so that nothing can be learned.
    let all = std::fs::read_to_string(shipped("demo/private_train.jsonl")).expect("reading");
    let answers: Vec<String> = all.lines().map(|line| line.to_string()).collect();
    let data = rows(folder.path(), |i, line| {
        let mut row: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let other: serde_json::Value =
            serde_json::from_str(&answers[(i * 7 + 3) % answers.len()]).expect("JSON");
        row["completion"] = other["completion"].clone();
        row.to_string()
    });
    let (store, out) = (folder.path().join("store"), folder.path().join("compared"));
    let (store, out) = (store.display().to_string(), out.display().to_string());
    let adapt = ["adapt", "-m", &model, "--data", &data, "--store", &store, "--arms", "lora"];
    let compare = ["compare", "-m", &model, "--data", &data, "--out", &out, "--arms", "lora"];
    let seen = |verb: &[&str], more: &[&str]| {
        let more = [&["--retention", &everyday, "--metric", "json"], more].concat();
        let output = engraft(&[verb, &QUICK, &more].concat());
        let command = told(&output, "Type: ");
        let code = typed(&command, folder.path());
        assert!(code == Some(0) || code == Some(4), "{command}: {code:?}");
        (output.status.code(), command)
    };
    // Too little to learn anything.
    let (code, longer) = seen(&adapt, &["--iters", "4", "-lr", "1e-4"]);
    assert!(code == Some(4) && longer.contains("--iters 8"), "{longer}");
    // Rows to learn from that answer otherwise than those that decide: training does harm.
    let train = Path::new(&data).join("train.jsonl");
    let refusing = |line: &str| {
        let mut row: serde_json::Value = serde_json::from_str(line).expect("JSON");
        row["completion"] = "no".into();
        row.to_string()
    };
    std::fs::write(&train, answers.iter().map(|line| refusing(line)).collect::<Vec<_>>().join("\n"))
        .expect("writing");
    let (code, gentler) = seen(&adapt, &["--iters", "20", "-lr", "2e-3"]);
    assert!(code == Some(4) && gentler.contains("--learning-rate 5.0e-4"), "{gentler}");
    assert_eq!(seen(&compare, &["--iters", "4", "-lr", "1e-4"]).0, Some(0));
}

#[test]
fn what_forgets_is_kept_nearer_or_tolerated_as_printed() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, everyday) = (seedling(), shipped("demo/generic_test.jsonl"));
    let data = rows(folder.path(), |_, line| line.to_string());
    let out = folder.path().join("compared").display().to_string();
    let compare = ["compare", "-m", &model, "--data", &data, "--out", &out, "--arms", "few-shot,lora"];
    let fast = ["--retention", &everyday, "--metric", "json", "--iters", "60", "-lr", "1e-2"];
    let output = engraft(&[&compare[..], &QUICK, &fast].concat());
    ends_in(&output, "Type: ", "--keep-general moderate", folder.path());

    // Rows that are on both sides.
    let train = Path::new(&data).join("train.jsonl");
    std::fs::copy(&train, Path::new(&data).join("test.jsonl")).expect("copying");
    let few = ["--iters", "4", "-lr", "1e-4", "--retention", &everyday];
    let output = engraft(&[&compare[..], &QUICK, &few].concat());
    ends_in(&output, "Type: ", "data check", folder.path());
}
