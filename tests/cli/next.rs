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
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let command = told(&output, "Use it: ");
    assert!(command.contains("generate") && command.contains("store"), "{command}");
    assert_eq!(typed(&command, folder.path()), Some(0), "{command}");

    // `compare` keeps arms in folders.
    let out = folder.path().join("compared").display().to_string();
    let compare = ["compare", "-m", &model, "--data", &data, "--out", &out, "--arms", "few-shot,lora"];
    let output = engraft(&[&compare[..], &QUICK, &learn].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let command = told(&output, "Type: ");
    assert!(command.contains("--lora"), "{command}");
    assert_eq!(typed(&command, folder.path()), Some(0), "{command}");
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
    // Too little to learn anything, far too fast, and much for little.
    let (code, longer) = seen(&adapt, &["--iters", "4", "-lr", "1e-4"]);
    assert!(code == Some(4) && longer.contains("--iters 8"), "{longer}");
    let (code, gentler) = seen(&adapt, &["--iters", "20", "-lr", "5e-1"]);
    assert!(
        code == Some(4) && (gentler.contains("--learning-rate") || gentler.contains("--iters 40")),
        "{gentler}"
    );
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
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let command = told(&output, "Type: ");
    assert!(command.contains("--keep-general moderate"), "{command}");
    assert_eq!(typed(&command, folder.path()), Some(0), "{command}");

    // Rows that are on both sides.
    let train = Path::new(&data).join("train.jsonl");
    std::fs::copy(&train, Path::new(&data).join("test.jsonl")).expect("copying");
    let few = ["--iters", "4", "-lr", "1e-4", "--retention", &everyday];
    let output = engraft(&[&compare[..], &QUICK, &few].concat());
    let command = told(&output, "Type: ");
    assert!(command.contains("data check"), "{command}");
    assert_eq!(typed(&command, folder.path()), Some(0), "{command}");
}
