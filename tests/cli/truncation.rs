//! A model file that is truncated while mapped: every verb reports an error that names it, wherever the cut is. A run
//! that has read the file into memory continues.
#![cfg(any(target_os = "linux", target_os = "android"))]

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use engraft_runtime::error::ErrorKind;
use engraft_runtime::model::map::Map;

use super::{EMULATOR, program, runnable, seedling, shipped, stderr, stdout};

/// Set for the child without a handler: the file that it maps.
const CONTROL: &str = "ENGRAFT_TEST_TRUNCATED";

fn start(arguments: &[&str]) -> Child {
    let mut command = program();
    command.env("ENGRAFT_CACHE_DIR", Path::new(env!("CARGO_TARGET_TMPDIR")).join("engraft-cache"));
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starting engraft")
}

/// A copy of the model to truncate.
fn copy(folder: &Path) -> PathBuf {
    let model = folder.join("model.gguf");
    std::fs::copy(seedling(), &model).expect("copying the model");
    model
}

fn cut(model: &Path, bytes: u64) {
    let file = OpenOptions::new().write(true).open(model).expect("opening the model");
    file.set_len(bytes).expect("cutting the model");
}

/// Lengths to truncate to: from nothing to one byte less than all, on page boundaries and next to them.
fn lengths(n: u64) -> [u64; 8] {
    [0, 1, 4096, (n / 7) | 1, n / 2, n - n / 5, n - 4096, n - 1]
}

/// How a process ended whose model was truncated to `bytes`; true if it reported an error.
#[track_caller]
fn assert_told(output: &Output, place: &str) -> bool {
    let (out, err) = (stdout(output), stderr(output));
    assert_eq!(output.status.signal(), None, "{place}: {err}");
    assert!(!err.contains("panicked"), "{place}: {err}");
    match output.status.code() {
        Some(0) => false,
        // Truncated before it was opened, so the rest isn't a model.
        Some(6) => {
            assert!(err.contains("model.gguf"), "{place}: {err}");
            true
        }
        Some(1) => {
            let words = ["model.gguf", "truncated while in use", "--no-mmap"];
            let empty = ["model.gguf", "empty"];
            let has = |words: &[&str]| words.iter().all(|word| err.contains(word));
            assert!(has(&words) || has(&empty), "{place}: {err}");
            let last: serde_json::Value = serde_json::from_str(out.lines().last().unwrap_or_default())
                .unwrap_or_else(|e| panic!("{place}: {e}: {out}{err}"));
            assert_eq!((&last["error"]["kind"], &last["error"]["exit_code"]), (&"io".into(), &1.into()));
            true
        }
        other => panic!("{place}: {other:?}: {err}"),
    }
}

#[test]
fn training_names_the_file_and_leaves_what_was_saved() {
    if std::env::var_os(EMULATOR).is_some() {
        eprintln!("SKIPPED: a fault of two threads at once, at which QEMU ends the program itself");
        return;
    }
    let n = std::fs::metadata(seedling()).expect("the model").len();
    let data = shipped("demo/private_train.jsonl");
    for (i, bytes) in lengths(n).into_iter().enumerate() {
        let folder = tempfile::tempdir().expect("a folder");
        let (model, out) = (copy(folder.path()), folder.path().join("out"));
        let (path, adapter) = (model.display().to_string(), out.display().to_string());
        let evaluate = if i % 2 == 0 { "1000000" } else { "1" };
        let mut child = start(&[
            "train",
            "-m",
            &path,
            "--data",
            &data,
            "--adapter-path",
            &adapter,
            "--iters",
            "1000000",
            "-t",
            "2",
            "--save-every",
            "3",
            "--steps-per-eval",
            evaluate,
            "--steps-per-report",
            "1",
            "--json",
        ]);
        // Not before an adapter was saved.
        let mut lines = BufReader::new(child.stderr.take().expect("stderr")).lines();
        let mut text = String::new();
        while !text.contains("step 8/") {
            text += &lines.next().expect("more lines").expect("text");
            text.push('\n');
        }
        cut(&model, bytes);
        // Read on, or the pipe fills.
        lines.map_while(Result::ok).for_each(|line| text = text.clone() + &line + "\n");
        let mut stdout = Vec::new();
        child.stdout.take().expect("stdout").read_to_end(&mut stdout).expect("reading");
        let status = child.wait().expect("waiting");
        let output = Output { status, stdout, stderr: text.into_bytes() };
        assert!(assert_told(&output, &format!("cut to {bytes}")), "it went on: cut to {bytes}");
        assert_eq!(output.status.code(), Some(1));
        // What was saved before is whole and belongs to the original base.
        let whole = super::engraft(&["adapter", "show", &adapter]);
        let used = super::engraft(&["generate", "-m", &seedling(), "-p", "x", "-n", "1", "--lora", &adapter]);
        assert_eq!(used.status.code(), Some(0), "{}{}", stderr(&used), stderr(&whole));
    }
    eprintln!("training: {} cuts, {0} told", lengths(n).len());
}

#[test]
fn loading_evaluating_and_generating_name_the_file_or_are_right() {
    let n = std::fs::metadata(seedling()).expect("the model").len();
    let folder = tempfile::tempdir().expect("a folder");
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "switch on the lamp in the kitchen, please. ".repeat(1200)).expect("writing");
    let text = text.display().to_string();
    let verbs: [&[&str]; 2] = [
        &["eval", "--perplexity", &text, "-c", "64", "-t", "1", "--json"],
        &["generate", "-p", "switch on the lamp", "-n", "200", "--temp", "0", "-t", "1", "--json"],
    ];
    let (mut told, mut whole) = (0, 0);
    for verb in verbs {
        let model = copy(folder.path());
        let path = model.display().to_string();
        let with_model = [verb, &["-m", &path][..]].concat();
        let right = answer(&start(&with_model).wait_with_output().expect("waiting"));
        for (i, bytes) in lengths(n).into_iter().enumerate() {
            for delay_ms in [0, 3, 10, 25, 60] {
                let model = copy(folder.path());
                let child = start(&with_model);
                std::thread::sleep(Duration::from_millis(delay_ms + i as u64));
                cut(&model, bytes);
                let output = child.wait_with_output().expect("waiting");
                let place = format!("{}: cut to {bytes} after {delay_ms} ms", verb[0]);
                if assert_told(&output, &place) {
                    told += 1;
                } else {
                    // It had ended, or had read all that it needed.
                    assert_eq!(answer(&output), right, "{place}: a wrong result");
                    whole += 1;
                }
            }
        }
    }
    eprintln!("eval and generate: {told} cuts told, {whole} came too late to matter, 0 wrong results");
    assert!(told >= 20, "only {told} cuts were told");
}

/// A verb's answer, without the times.
fn answer(output: &Output) -> String {
    let last: serde_json::Value = serde_json::from_str(stdout(output).lines().last().unwrap_or_default())
        .unwrap_or_else(|e| panic!("{e}: {}", stderr(output)));
    let keys = ["nll", "text", "tokens"];
    keys.iter().map(|key| format!("{key}={} ", last[*key])).collect()
}

#[test]
fn a_model_in_memory_does_not_mind() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, out) = (copy(folder.path()), folder.path().join("out").display().to_string());
    let (path, data) = (model.display().to_string(), shipped("demo/private_train.jsonl"));
    let mut child = start(&[
        "train",
        "-m",
        &path,
        "--no-mmap",
        "--data",
        &data,
        "--adapter-path",
        &out,
        "--iters",
        "60",
        "-t",
        "2",
        "--steps-per-report",
        "1",
        "--no-digest-cache",
    ]);
    let mut lines = BufReader::new(child.stderr.take().expect("stderr")).lines();
    while !lines.next().expect("more lines").expect("text").contains("step 5/") {}
    cut(&model, 1);
    let rest: Vec<_> = lines.map_while(Result::ok).collect();
    assert_eq!(child.wait().expect("waiting").code(), Some(0), "{rest:?}");
}

#[test]
fn a_library_says_what_it_can() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = copy(folder.path());
    let n = std::fs::metadata(&model).expect("the model").len();
    let map = Map::open(&model).expect("a map");
    map.check_whole().expect("whole");
    // A cut within the last page gives zeros instead of a signal.
    cut(&model, n - 1);
    let error = map.check_whole().expect_err("cut");
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.message().contains("truncated while in use"), "{error}");
    cut(&model, n);
    let error = map.check_whole().expect_err("put back with a zero at its end");
    assert!(error.message().contains("changed while it was in use"), "{error}");
    // Replacing the file by renaming does no harm.
    let model = copy(folder.path());
    let map = Map::open(&model).expect("a map");
    std::fs::write(folder.path().join("other"), "x").expect("writing");
    std::fs::rename(folder.path().join("other"), &model).expect("renaming");
    map.check_whole().expect("still the old file");
}

/// Without the command line's handler the same read kills the process.
#[test]
fn without_the_handler_the_process_dies_of_it() {
    if let Some(file) = std::env::var_os(CONTROL) {
        let map = Map::open(&file).expect("a map");
        cut(Path::new(&file), 0);
        let sum: u64 = map.as_bytes().iter().map(|b| u64::from(*b)).sum();
        panic!("read what is not there: {sum}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let this = std::env::current_exe().expect("this program");
    let name = "truncation::without_the_handler_the_process_dies_of_it";
    let output = runnable(&this)
        .args(["--exact", name, "--nocapture"])
        .env(CONTROL, copy(folder.path()))
        .output()
        .expect("running this test once more");
    assert_eq!(output.status.signal(), Some(7), "{}{}", stdout(&output), stderr(&output));
}
