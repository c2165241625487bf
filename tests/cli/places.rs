//! Where the command line writes: full disks, permissions, and links.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output};

use engraft_runtime::adapter::Adapter;

use super::{EMULATOR, engraft, seedling, shipped, stderr};

/// Runs a shell script with the program as `$ENGRAFT` and more variables.
fn shell(wrapper: &[&str], script: &str, names: &[(&str, &str)]) -> Output {
    let line = [wrapper, &["sh", "-c", script]].concat();
    let mut command = Command::new(line[0]);
    let emulator = std::env::var(EMULATOR).unwrap_or_default();
    let program = format!("{emulator} {}", env!("CARGO_BIN_EXE_engraft"));
    command.args(&line[1..]).envs(names.iter().copied()).env("ENGRAFT", program);
    command.env("ENGRAFT_CACHE_DIR", Path::new(env!("CARGO_TARGET_TMPDIR")).join("engraft-cache"));
    command.output().expect("running sh")
}

/// Trains the built-in model a little.
const TRAIN: &str = "train -m $MODEL --data $DATA ${ITERS:---iters 2} -b 4 -t 1 -c 128 --adapter-path";

fn texts(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), stderr(output))
}

/// An error about a full device must say where it happened and what helps.
#[track_caller]
fn assert_told(output: &Output, words: &[&str]) {
    let told = texts(output);
    assert_eq!(output.status.code(), Some(1), "{told}");
    let error = told.lines().rfind(|l| l.starts_with("error:")).unwrap_or_else(|| panic!("{told}"));
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

/// A limit on file size, as with a quota; it needs no privileges.
#[test]
fn a_limit_on_files_keeps_the_earlier_adapter() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data, out) = (seedling(), shipped("demo/private_train.jsonl"), folder.path().join("out"));
    let place = out.display().to_string();
    let names = [("MODEL", model.as_str()), ("DATA", &data), ("OUT", &place)];
    let first = shell(&[], &format!("$ENGRAFT {TRAIN} $OUT"), &names);
    assert!(first.status.success(), "{}", texts(&first));
    let before = Adapter::load(&out).expect("the first adapter");
    // In blocks of 512 bytes.
    let limited = format!("ulimit -f 16; $ENGRAFT {TRAIN} $OUT --seed 9");
    assert_told(&shell(&[], &limited, &names), &["out/", "ulimit -f"]);
    assert_eq!(Adapter::load(&out).expect("the first adapter"), before);
    let left: Vec<_> =
        std::fs::read_dir(&out).expect("listing").map(|e| e.expect("an entry").file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().ends_with("-tmp")), "{left:?}");
    let again = shell(&[], &format!("$ENGRAFT {TRAIN} $OUT --seed 9 --overwrite-checkpoints"), &names);
    assert!(again.status.success(), "{}", texts(&again));
    assert_ne!(Adapter::load(&out).expect("the second adapter"), before);
}

/// A separate disk in a separate namespace, with less and less room.
#[test]
fn a_full_disk_keeps_the_earlier_adapter() {
    let alone = ["unshare", "--user", "--map-root-user", "--mount"];
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::create_dir(at("disk")).expect("a folder");
    let (model, data, disk, seen) = (seedling(), shipped("demo/private_train.jsonl"), at("disk"), at("seen"));
    let names = [("MODEL", model.as_str()), ("DATA", &data), ("DISK", &disk), ("SEEN", &seen)];
    let mount = "mount -t tmpfs -o size=4m none $DISK";
    if !Command::new(alone[0]).arg("--version").output().is_ok_and(|o| o.status.success())
        || !shell(&alone, mount, &names).status.success()
    {
        eprintln!("SKIPPED: no small disk can be mounted here (unshare --user --mount, tmpfs)");
        return;
    }
    let train = format!("$ENGRAFT {TRAIN} $DISK/out");
    for free_kib in [0, 8, 40] {
        // Fill all but the room that must stay free, then free it again.
        let script = format!(
            "{mount} && {train} && cp -r $DISK/out $SEEN.before && head -c {free_kib}K /dev/zero >$DISK/room && \
             {{ cat /dev/zero >$DISK/filler 2>&-; rm $DISK/room; {train} --seed 9; code=$?; cp -r $DISK/out $SEEN; \
             rm $DISK/filler; {train} --seed 9 --overwrite-checkpoints 2>&- && cp -r $DISK/out $SEEN.after; exit $code; }}"
        );
        assert_told(&shell(&alone, &script, &names), &["disk/out/", "No space left", "free some"]);
        let loaded = |suffix: &str| Adapter::load(Path::new(&format!("{seen}{suffix}"))).expect("an adapter");
        assert_eq!(loaded(""), loaded(".before"), "{free_kib} KiB free");
        assert_ne!(loaded(""), loaded(".after"), "{free_kib} KiB free");
        for suffix in ["", ".before", ".after"] {
            std::fs::remove_dir_all(format!("{seen}{suffix}")).expect("removing");
        }
    }
}

/// Asserts that only the owner can access every file and folder, under a umask that forbids nothing; counts them.
fn assert_private(root: &Path) -> usize {
    let (mut waiting, mut seen) = (vec![root.to_path_buf()], 0);
    while let Some(path) = waiting.pop() {
        let found = std::fs::symlink_metadata(&path).expect("it is there");
        let mode = found.permissions().mode() & 0o777;
        assert_eq!(mode, if found.is_dir() { 0o700 } else { 0o600 }, "{}", path.display());
        seen += 1;
        if found.is_dir() {
            waiting.extend(std::fs::read_dir(&path).expect("listing").map(|e| e.expect("an entry").path()));
        }
    }
    seen
}

#[test]
fn what_is_written_is_for_its_owner_only() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("out");
    let (model, data, place) = (seedling(), shipped("demo/private_train.jsonl"), out.display().to_string());
    let everyday = shipped("demo/generic_test.jsonl");
    let names = [("MODEL", model.as_str()), ("DATA", &data), ("OUT", &place), ("EVERYDAY", &everyday)];
    let contest = "-m $MODEL --data $DATA -t 1 -b 4 -k 3 --iters 2 -lr 1e-3 --resamples 200 --arms lora --samples 0 \
                   --no-built-in-retention --retention $EVERYDAY";
    let script = format!(
        "set -e; umask 000; export ENGRAFT_CACHE_DIR=$OUT/cache; $ENGRAFT {TRAIN} $OUT/a/b
         ITERS='--iters 100000'
         $ENGRAFT {TRAIN} $OUT/stopped --time-budget 1s || test $? = 130
         ITERS=
         $ENGRAFT export -m $MODEL --lora $OUT/a/b --format peft -o $OUT/peft/c
         $ENGRAFT export -m $MODEL --lora $OUT/a/b --format gguf -o $OUT/gguf/a.gguf
         $ENGRAFT merge -m $MODEL --lora $OUT/a/b --unmeasured -o $OUT/merged/m.gguf
         $ENGRAFT compare {contest} --out $OUT/compared
         $ENGRAFT adapt {contest} --rank 4 --valid-fraction 0.5 --protect off --store $OUT/store || test $? = 4"
    );
    let output = shell(&[], &script, &names);
    assert!(output.status.success(), "{}", texts(&output));
    for name in [
        "a/b/metrics.jsonl",
        "a/b/adapter.engraft",
        "merged/m.gguf",
        "compared/report.html",
        "compared/lora/adapter.engraft",
        "store/last/report.html",
        "store/lock",
        "cache/digests",
    ] {
        assert!(out.join(name).exists(), "{name} is not there: {}", texts(&output));
    }
    let stopped = std::fs::read_dir(out.join("stopped")).expect("listing");
    let mut stopped = stopped.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned());
    assert!(stopped.any(|name| name.starts_with("checkpoint-")), "{}", texts(&output));
    let seen = assert_private(&out);
    eprintln!("{seen} files and folders");
    assert!(seen >= 25, "{seen}");
    // The control: a file open to others is found.
    std::fs::set_permissions(out.join("merged"), PermissionsExt::from_mode(0o755)).expect("opening");
    assert!(std::panic::catch_unwind(|| assert_private(&out)).is_err());
}

/// A link in an output folder is replaced or refused; its target doesn't change.
#[test]
fn links_lead_nowhere() {
    let folder = tempfile::tempdir().expect("a folder");
    let (out, outside) = (folder.path().join("out"), folder.path().join("outside"));
    for dir in [&out, &outside] {
        std::fs::create_dir(dir).expect("a folder");
    }
    let theirs = outside.join("theirs");
    std::fs::write(&theirs, "theirs").expect("writing");
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let (place, everyday) = (out.display().to_string(), shipped("demo/generic_test.jsonl"));
    let train = ["train", "-m", &model, "--data", &data, "--iters", "1", "-b", "4", "-t", "1", "-c", "128"];
    let train = [&train[..], &["--adapter-path", &place]].concat();

    symlink(&theirs, out.join("adapter.engraft")).expect("linking");
    let replaced = engraft(&train);
    assert!(replaced.status.success(), "{}", stderr(&replaced));
    assert!(!out.join("adapter.engraft").is_symlink());

    std::fs::remove_file(out.join("metrics.jsonl")).expect("removing");
    symlink(&theirs, out.join("metrics.jsonl")).expect("linking");
    let refused = engraft(&train);
    assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));

    for name in ["lora", "last"] {
        symlink(&outside, out.join(name)).expect("linking");
    }
    let contest =
        ["-m", &model, "--data", &data, "-t", "1", "-b", "4", "-k", "3", "--iters", "1", "-lr", "1e-3"];
    let more = ["--arms", "lora", "--no-built-in-retention", "--retention", &everyday, "--resamples", "200"];
    for (verb, place_flag) in [("compare", "--out"), ("adapt", "--store")] {
        let refused = engraft(&[&[verb], &contest[..], &more, &[place_flag, &place]].concat());
        let told = stderr(&refused);
        assert!(refused.status.code() == Some(2) && told.contains("a link"), "{verb}: {told}");
    }
    let left: Vec<_> = std::fs::read_dir(&outside).expect("listing").collect();
    assert_eq!((left.len(), std::fs::read_to_string(&theirs).expect("reading").as_str()), (1, "theirs"));
}

#[test]
fn a_closed_stdout_ends_quietly_and_a_full_one_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, told) = (seedling(), folder.path().join("told"));
    let place = told.display().to_string();
    let names = [("MODEL", model.as_str()), ("TOLD", &place)];
    let generate = "$ENGRAFT generate -m $MODEL -p 'turn on' -n 8 --temp 0";
    shell(&[], &format!("{{ {generate} 2>$TOLD; echo code $? >>$TOLD; }} | true"), &names);
    let quiet = std::fs::read_to_string(&told).expect("what was told");
    assert!(quiet.contains("code 1") && !quiet.contains("error"), "{quiet}");
    if Path::new("/dev/full").exists() {
        assert_told(&shell(&[], &format!("{generate} >/dev/full"), &names), &["writing to stdout"]);
    }
}

/// Nothing waits for a pipe that nobody writes to, and a device is no file; a prompt may come from a pipe.
#[test]
fn pipes_and_devices_are_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data, pipe) = (seedling(), shipped("demo/private_train.jsonl"), folder.path().join("pipe"));
    let pipe = pipe.display().to_string();
    let names = [("MODEL", model.as_str()), ("DATA", &data), ("PIPE", &pipe)];
    let run = |arguments: &str| shell(&["timeout", "20"], &format!("$ENGRAFT {arguments}"), &names);
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("mkfifo").success());
    for (arguments, flag, what) in [
        ("eval -m $PIPE --data $DATA", "-m/--model", "pipe"),
        ("eval -m $MODEL --data $PIPE", "--data", "pipe"),
        ("train -m $MODEL --data $DATA --replay $PIPE", "--replay", "pipe"),
        ("train -m $MODEL --data $DATA --from $PIPE", "--from", "pipe"),
        ("import -m $MODEL --from $PIPE", "--from", "pipe"),
        ("generate -m $MODEL -f /dev/zero", "-f/--file", "device"),
        ("eval -m /dev/zero --data $DATA", "-m/--model", "device"),
    ] {
        let told = texts(&run(arguments));
        let error = told.lines().find(|line| line.starts_with("error:")).unwrap_or_default();
        assert!(error.contains(flag) && error.contains(what), "{arguments}: {told}");
        assert_eq!(run(arguments).status.code(), Some(2), "{arguments}: {told}");
    }
    let piped = shell(&[], "echo turn on the lamp | $ENGRAFT generate -m $MODEL -n 4 -f /dev/stdin", &names);
    assert!(piped.status.success(), "{}", texts(&piped));
}
