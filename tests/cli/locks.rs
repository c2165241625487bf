//! One writer per folder: processes that race for it, and a holder that is killed.
#![cfg(unix)]

use std::io::Read;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use super::{engraft, program, seedling, shipped, stderr, stdout};

/// Processes that race.
const RACERS: usize = 8;

/// A process that ends with its test, however the test ends.
#[derive(Debug)]
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A verb that writes to `folder` until it is killed.
fn begin(verb: &[&str], folder: &Path) -> Running {
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let mut command = program();
    command.env("ENGRAFT_CACHE_DIR", Path::new(env!("CARGO_TARGET_TMPDIR")).join("engraft-cache"));
    command.args(verb).arg(folder).args(["-m", &model, "--data", &data, "--iters", "1000000", "-t", "1"]);
    Running(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("starting engraft"))
}

/// Waits until all but one have ended; returns the remaining one and the output of the others.
fn settle(mut racers: Vec<Running>) -> (Vec<Running>, Vec<(Option<i32>, String)>) {
    let (begun, mut losers) = (Instant::now(), Vec::new());
    while racers.len() > 1 && begun.elapsed() < Duration::from_secs(60) {
        let mut left = Vec::new();
        for mut racer in racers {
            match racer.0.try_wait().expect("waiting") {
                None => left.push(racer),
                Some(status) => {
                    let mut said = String::new();
                    racer.0.stderr.take().expect("a pipe").read_to_string(&mut said).expect("reading");
                    losers.push((status.code(), said));
                }
            }
        }
        racers = left;
        std::thread::sleep(Duration::from_millis(10));
    }
    (racers, losers)
}

/// Eight processes, one writer; it is killed, and the next one gets in.
#[track_caller]
fn race(verb: &[&str], folder: &Path) {
    let (mut holders, losers) = settle((0..RACERS).map(|_| begin(verb, folder)).collect());
    assert_eq!(losers.len(), RACERS - 1, "{verb:?}: {losers:?}");
    for (code, message) in &losers {
        assert_eq!(*code, Some(1), "{verb:?}: {message}");
        let words = ["another process is writing to", "lock"];
        assert!(words.iter().all(|word| message.contains(word)), "{verb:?}: {message}");
    }
    let mut holder = holders.pop().expect("a holder");
    assert!(holder.0.try_wait().expect("waiting").is_none(), "{verb:?}: the holder has ended");
    // SIGKILL: the process can't clean up.
    holder.0.kill().expect("killing");
    holder.0.wait().expect("waiting");
    let (mut next, freed) = (begin(verb, folder), Instant::now());
    let mut second = begin(verb, folder);
    // One of the two is refused, so the other holds what the killed one held.
    let ended = loop {
        let ended: Vec<_> = [&mut next, &mut second].map(|c| c.0.try_wait().expect("waiting")).into();
        if ended.iter().any(Option::is_some) || freed.elapsed() > Duration::from_secs(30) {
            break ended;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let codes: Vec<_> = ended.iter().flatten().map(|status| status.code()).collect();
    assert_eq!(codes, [Some(1)], "{verb:?}: one gets in and one does not");
    eprintln!("{verb:?}: {RACERS} raced, 1 wrote, {} were refused", losers.len());
}

#[test]
fn of_eight_writers_one_gets_in() {
    let folder = tempfile::tempdir().expect("a folder");
    race(&["train", "--resume", "--adapter-path"], &folder.path().join("adapter"));
    race(
        &["adapt", "--arms", "lora", "--valid-fraction", "0.5", "--protect", "off", "--store"],
        &folder.path().join("store"),
    );
    race(&["compare", "--arms", "lora", "--out"], &folder.path().join("out"));
}

#[test]
fn a_refused_writer_changes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("adapter");
    let holder = begin(&["train", "--adapter-path"], &out);
    let begun = Instant::now();
    while !out.join("metrics.jsonl").exists() && begun.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(10));
    }
    // Except checkpoints, which the holder keeps writing.
    let names = || {
        let listing = std::fs::read_dir(&out).expect("listing");
        let names = listing.map(|entry| entry.expect("an entry").file_name().into_string().expect("text"));
        let mut names: Vec<_> = names.filter(|name| !name.contains("checkpoint-")).collect();
        names.sort();
        names
    };
    let before = names();
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let path = out.display().to_string();
    let refused = engraft(&["train", "-m", &model, "--data", &data, "--adapter-path", &path, "--json"]);
    assert_eq!(refused.status.code(), Some(1), "{}", stderr(&refused));
    assert!(stdout(&refused).contains("\"busy\""), "{}", stdout(&refused));
    assert_eq!(names(), before);
    drop(holder);
}

/// The next writer removes a killed writer's unfinished files; other files stay.
#[test]
fn unfinished_files_go() {
    let folder = tempfile::tempdir().expect("a folder");
    let (stray, own) = (".adapter.engraft.1-0.engraft-tmp", "notes.txt");
    for name in [stray, own] {
        std::fs::write(folder.path().join(name), "x").expect("writing");
    }
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let out = folder.path().to_str().expect("a path of text");
    let ran = engraft(&["train", "-m", &model, "--data", &data, "--iters", "1", "--adapter-path", out]);
    assert!(ran.status.success(), "{}", stderr(&ran));
    assert!(!folder.path().join(stray).exists() && folder.path().join(own).exists());
    assert!(folder.path().join("adapter.engraft").exists());
}
