//! Runs that are stopped, killed or out of time, and resuming them.
#![cfg(unix)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use engraft_runtime::rng::Rng;

use super::{assert_refused, engraft, last_line, program, result_of, seedling, shipped, stderr, stdout};

const STEPS: u64 = 40;

/// A short run that uses every source of randomness.
fn command(out: &Path, more: &[&str]) -> Vec<String> {
    let (model, data, out) = (seedling(), shipped("demo/private_train.jsonl"), out.display().to_string());
    let steps = STEPS.to_string();
    let words = ["train", "-m", &model, "--data", &data, "--adapter-path", &out, "--iters", &steps];
    let settings =
        ["-b", "2", "-lr", "2e-3", "--dropout", "0.1", "--save-every", "0", "--steps-per-report", "4"];
    let words = words.iter().chain(&settings).chain(more);
    words.map(|word| word.to_string()).collect()
}

fn run(out: &Path, more: &[&str]) -> std::process::Output {
    let words = command(out, more);
    engraft(&words.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Starts a run whose stderr goes to a file.
fn start(out: &Path, told: &Path, more: &[&str]) -> Child {
    program()
        .env("ENGRAFT_CACHE_DIR", Path::new(env!("CARGO_TARGET_TMPDIR")).join("engraft-cache"))
        .args(command(out, more))
        .stdout(Stdio::null())
        .stderr(File::create(told).expect("a file"))
        .spawn()
        .expect("starting")
}

fn read(file: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(file).unwrap_or_default()).into_owned()
}

/// The number after these words, at their last occurrence in a complete line.
fn last_number(text: &str, words: &str) -> Option<u64> {
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    let digits = |at: &str| at.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok();
    whole.rsplit(words).next().filter(|_| whole.contains(words)).and_then(digits)
}

/// The adapter of an uninterrupted run, and its metrics without times.
fn uncut(folder: &Path) -> (Vec<u8>, Vec<String>) {
    let out = folder.join("uncut");
    let output = run(&out, &["-t", "2", "--checkpoint-every", "0"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(!stderr(&output).contains("checkpoint saved"), "{}", stderr(&output));
    (adapter(&out), losses(&out))
}

fn adapter(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("adapter.engraft")).expect("the adapter")
}

/// Steps and losses of the records.
fn losses(out: &Path) -> Vec<String> {
    let record = |line: &str| {
        let record: serde_json::Value = serde_json::from_str(line).expect("a record");
        format!("{} {} {}", record["step"], record["train_loss"], record["valid_loss"])
    };
    read(&out.join("metrics.jsonl")).lines().map(record).collect()
}

fn checkpoints(out: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(out).expect("listing").map(|entry| entry.expect("an entry").path());
    let mut found: Vec<PathBuf> =
        entries.filter(|path| path.display().to_string().contains("checkpoint-")).collect();
    found.sort();
    found
}

#[test]
fn an_interrupted_run_resumes_to_the_same_adapter() {
    let folder = tempfile::tempdir().expect("a folder");
    let (expected, recorded) = uncut(folder.path());
    let (out, told) = (folder.path().join("out"), folder.path().join("told"));
    let mut child = start(&out, &told, &["-t", "1", "--checkpoint-every", "5"]);
    let begun = Instant::now();
    while last_number(&read(&told), "checkpoint saved at step ") < Some(5) {
        assert!(begun.elapsed() < Duration::from_secs(120), "{}", read(&told));
        std::thread::sleep(Duration::from_millis(5));
    }
    let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill");
    assert!(killed.success());
    assert_eq!(child.wait().expect("an end").code(), Some(130), "{}", read(&told));
    assert!(read(&told).contains("--resume to continue"), "{}", read(&told));
    let stopped = last_number(&read(&told), "checkpoint saved at step ").expect("a step");
    assert_eq!(checkpoints(&out).len(), 2);

    // Forgetting the flag or changing a setting loses nothing.
    let plain = command(&out, &[]);
    let plain: Vec<&str> = plain.iter().map(String::as_str).collect();
    assert_refused(&plain, 2, "usage", &["checkpoint-", "--resume", "--overwrite-checkpoints"]);
    assert_refused(&[&plain[..], &["--resume", "--rank", "4"]].concat(), 2, "usage", &["rank was 8, now 4"]);
    let newest = checkpoints(&out).pop().expect("a checkpoint");
    let good = std::fs::read(&newest).expect("reading");

    // The newest one is damaged: the other is used, with a message.
    std::fs::write(&newest, &good[..good.len() / 2]).expect("writing");
    let short = run(&out, &["--resume", "--time-budget", "0s"]);
    assert_eq!(short.status.code(), Some(130), "{}", stderr(&short));
    for words in ["passed over: ", "resumed: "] {
        assert!(stderr(&short).contains(words), "{words}: {}", stderr(&short));
    }
    std::fs::write(&newest, &good).expect("writing");
    for path in checkpoints(&out).into_iter().filter(|path| *path > newest) {
        std::fs::remove_file(path).expect("removing");
    }

    let resumed = run(&out, &["-t", "2", "--resume"]);
    assert_eq!(resumed.status.code(), Some(0), "{}", stderr(&resumed));
    let line = format!("resumed: {}, step {stopped} of {STEPS}", newest.display());
    assert!(stderr(&resumed).contains(&line), "{line}: {}", stderr(&resumed));
    assert!(adapter(&out) == expected, "the adapter differs");
    assert_eq!(losses(&out), recorded);
    assert!(checkpoints(&out).is_empty());

    // A finished run stays finished: from another folder, and if its end was cut short.
    std::fs::write(&newest, &good).expect("writing");
    let (above, name) = (out.parent().expect("a folder"), out.file_name().expect("a name"));
    let words = command(Path::new(name), &["-t", "2", "--resume", "--json"]);
    let again = program().args(words).current_dir(above).output().expect("running");
    assert_eq!(again.status.code(), Some(0), "{}", stderr(&again));
    assert!(stderr(&again).contains("this run is finished"), "{}", stderr(&again));
    assert_eq!(last_line(&again)["steps"], STEPS);
    assert!(checkpoints(&out).is_empty());
    // A new run may start where another is finished.
    let other = run(&out, &["-t", "2", "--resume", "--rank", "4", "--json"]);
    assert!(stderr(&other).contains("starting from the beginning"), "{}", stderr(&other));
    assert_eq!(
        (other.status.code(), &last_line(&other)["steps"]),
        (Some(0), &STEPS.into()),
        "{}",
        stdout(&other)
    );
}

#[test]
fn a_run_out_of_time_is_unfinished_and_goes_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    for kind in ["dora", "full"] {
        let out = |name: &str| folder.path().join(format!("{kind}-{name}")).display().to_string();
        let words = |out: &str| {
            let run =
                ["train", "-m", &model, "--data", &data, "-t", "2", "--adapter-path", out, "--iters", "6"];
            run.iter().chain(&["--fine-tune-type", kind]).map(|word| word.to_string()).collect::<Vec<_>>()
        };
        let (whole, cut) = (out("whole"), out("cut"));
        let uncut = words(&whole);
        result_of(&uncut.iter().map(String::as_str).collect::<Vec<_>>());
        let mut rounds = 0;
        // No step was taken, and preparation isn't repeated.
        let mut first = words(&cut);
        first.extend(["--checkpoint-every", "1", "--time-budget", "0s"].map(str::to_string));
        let first = engraft(&first.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(first.status.code(), Some(130), "{}", stderr(&first));
        assert!(stderr(&first).contains("checkpoint saved at step 0"), "{}", stderr(&first));
        // An unfinished run that is resumed over and over, as by a timer.
        loop {
            let mut words = words(&cut);
            let more = [
                "--resume",
                "--checkpoint-every",
                "1",
                "--time-budget",
                if rounds < 3 { "1s" } else { "1h" },
            ];
            words.extend(more.map(str::to_string));
            let output = engraft(&words.iter().map(String::as_str).collect::<Vec<_>>());
            rounds += 1;
            match output.status.code() {
                Some(130) => assert!(stderr(&output).contains("--time-budget"), "{}", stderr(&output)),
                code => {
                    assert_eq!(code, Some(0), "{}", stderr(&output));
                    break;
                }
            }
        }
        let name = if kind == "full" { "model.gguf" } else { "adapter.engraft" };
        let bytes = |out: &str| std::fs::read(Path::new(out).join(name)).expect("the result");
        assert!(bytes(&whole) == bytes(&cut), "{kind}: the results differ after {rounds} rounds");
    }
}

#[test]
fn a_run_that_can_only_diverge_stops_and_says_why() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("out");
    let words = command(&out, &["-t", "2", "--max-grad-norm", "0", "--learning-rate", "1e30"]);
    let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
    let usual = words.iter().position(|word| *word == "-lr").expect("the usual rate");
    words.drain(usual..usual + 2);
    assert_refused(
        &words,
        1,
        "non_finite",
        &["3 rollbacks", "0.125 of the learning rate", "--learning-rate"],
    );
    let told = stderr(&engraft(&[&words[..], &["--resume"]].concat()));
    for words in ["resumed: ", "skipped: ", "back to step 0, at 0.5 of the learning rate"] {
        assert!(told.contains(words), "{words}: {told}");
    }
    assert!(!out.join("adapter.engraft").exists(), "nothing that is no number is written");
    assert_eq!(checkpoints(&out).len(), 1);
}

/// Kills runs at random moments until there were enough kills; each run is resumed until it is done.
fn kills(count: u64) {
    let seed = std::env::var("ENGRAFT_KILL_SEED").ok().and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("ENGRAFT_KILL_SEED={seed}");
    let mut rng = Rng::new(seed, 0);
    let folder = tempfile::tempdir().expect("a folder");
    let (expected, recorded) = uncut(folder.path());
    let (out, told) = (folder.path().join("out"), folder.path().join("told"));
    let flags = ["-t", "1", "--resume", "--checkpoint-every", "2"];
    let (mut killed, mut finished, mut lost, mut corrupt, mut acknowledged) = (0, 0, 0, 0, None);
    // Adjusts to about the time of a run on this machine, so that kills fall anywhere in it.
    let mut whole = Duration::from_millis(400);
    while killed < count {
        let begun = Instant::now();
        let mut child = start(&out, &told, &flags);
        let delay = whole.mul_f64(rng.f64());
        let mut ended = None;
        while begun.elapsed() < delay && ended.is_none() {
            std::thread::sleep(Duration::from_micros(500));
            ended = child.try_wait().expect("waiting");
        }
        let status = ended.unwrap_or_else(|| {
            child.kill().expect("killing");
            child.wait().expect("an end")
        });
        let text = read(&told);
        corrupt += u64::from(text.contains("passed over: "));
        // This process starts at or after what an earlier one acknowledged.
        if text.contains("resumed: ") || text.contains("starting from the beginning") {
            let from = last_number(&text, ", step ").filter(|_| text.contains("resumed: "));
            lost += u64::from(from < acknowledged);
        }
        acknowledged = last_number(&text, "checkpoint saved at step ").max(acknowledged);
        match status.code() {
            None => {
                killed += 1;
                let grows = if text.contains("checkpoint saved") { 1.0 } else { 1.1 };
                whole = whole.mul_f64(grows).min(Duration::from_secs(10));
            }
            Some(0) => {
                assert!(adapter(&out) == expected, "the adapter differs: ENGRAFT_KILL_SEED={seed}");
                assert_eq!(losses(&out), recorded, "ENGRAFT_KILL_SEED={seed}");
                std::fs::remove_dir_all(&out).expect("removing");
                finished += 1;
                acknowledged = None;
                whole = whole.mul_f64(0.7);
            }
            code => panic!("{code:?}: {text}"),
        }
        if text.contains(&format!("saved {}", out.join("adapter.engraft").display())) {
            // Killed after the last step: the next process may find no checkpoint any more.
            acknowledged = None;
        }
    }
    let last = run(&out, &flags);
    assert_eq!(last.status.code(), Some(0), "{}", stderr(&last));
    assert!(adapter(&out) == expected, "the adapter differs: ENGRAFT_KILL_SEED={seed}");
    println!("{killed} kills, {} runs finished bit-identical, {corrupt} corrupt, {lost} lost", finished + 1);
    assert_eq!((corrupt, lost), (0, 0), "ENGRAFT_KILL_SEED={seed}");
}

#[test]
fn a_killed_run_loses_nothing_that_was_acknowledged() {
    kills(24);
}

#[test]
#[ignore = "half an hour; run: cargo test --test cli -- --ignored --nocapture a_thousand_kills"]
fn a_thousand_kills_lose_nothing_that_was_acknowledged() {
    kills(1000);
}

#[test]
fn a_finished_run_is_not_replaced_silently() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("out");
    let told = || {
        let output = run(&out, &["-t", "2", "--checkpoint-every", "0"]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stderr(&output).contains("replaces the adapter of a finished run")
    };
    assert_eq!([told(), told()], [false, true]);
}
