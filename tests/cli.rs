//! The command line as its users meet it: exit codes, messages that name flag and remedy, and the
//! JSON object that ends stdout; and the device profiles that build.rs checks.

#[path = "../build.rs"]
#[allow(dead_code, reason = "cargo calls its main, the tests its parser")]
mod build_script;

use std::path::Path;
use std::process::{Command, Output};

fn engraft(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_engraft")).args(arguments).output().expect("running engraft")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs with `--json` and asserts a refusal: its exit code, words of its message, both on stderr and
/// in the object on stdout's last line.
#[track_caller]
fn assert_refused(arguments: &[&str], code: i32, kind: &str, words: &[&str]) {
    let output = engraft(&[arguments, &["--json"]].concat());
    let (out, err) = (stdout(&output), stderr(&output));
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {err}");
    let last: serde_json::Value =
        serde_json::from_str(out.lines().last().expect("a last line")).expect("JSON");
    assert_eq!(last["error"]["kind"], kind, "{arguments:?}: {last}");
    assert_eq!(last["error"]["exit_code"], code, "{arguments:?}: {last}");
    for word in words {
        assert!(err.contains(word), "{arguments:?}: `{word}` is not in: {err}");
        assert!(last["error"]["message"].as_str().is_some_and(|m| m.contains(word)), "{arguments:?}: {last}");
    }
    assert!(!err.contains("panicked"), "{err}");
}

/// A file that passes for a model until it is read.
fn model_like(folder: &Path) -> String {
    let file = folder.join("model.gguf");
    std::fs::write(&file, b"GGUF").expect("writing");
    file.display().to_string()
}

#[test]
fn the_verbs_are_listed() {
    let output = engraft(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    for word in ["plan", "train", "generate", "eval", "demo", "Exit codes"] {
        assert!(stdout(&output).contains(word), "{word}");
    }
    for verb in ["plan", "train", "generate", "eval", "demo"] {
        assert_eq!(engraft(&[verb, "--help"]).status.code(), Some(0), "{verb}");
    }
}

#[test]
fn the_version_tells_where_the_binary_comes_from() {
    let short = stdout(&engraft(&["--version"]));
    assert_eq!(short.trim(), format!("engraft {}", env!("CARGO_PKG_VERSION")));
    let long = stdout(&engraft(&["--version", "--verbose"]));
    let line = |name: &str| {
        let found =
            long.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_else(|| panic!("{name}: {long}"));
        found.trim().to_string()
    };
    let commit = line("commit");
    assert!(
        commit == "unknown" || (commit.len() == 40 && commit.bytes().all(|b| b.is_ascii_hexdigit())),
        "{commit}"
    );
    assert!(line("target").contains('-'));
    assert!(!line("isa").is_empty());
    let profiles: usize = line("profiles").parse().expect("a count");
    let files =
        std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("targets/profiles")).expect("listing");
    assert_eq!(profiles, files.count());
    assert!(long.contains("pi-zero-2w"));
}

#[test]
fn a_wrong_command_line_is_refused_with_2() {
    assert_refused(&["train", "--no-such-flag"], 2, "usage", &["--no-such-flag"]);
    assert_refused(&["trian"], 2, "usage", &["trian"]);
    assert_refused(&["-v"], 2, "usage", &["verb"]);
    assert_refused(&["train", "--rank", "0"], 2, "usage", &["--rank", "256"]);
    assert_refused(&["train", "--iters", "3", "--epochs", "1"], 2, "usage", &["--epochs"]);
    assert_refused(&["train", "--data", "."], 2, "usage", &["-m/--model", "GGUF"]);
    assert_refused(&["plan", "-m", "."], 2, "usage", &["--model", "folder"]);
    assert_refused(&["generate", "-p", "x", "--temp", "-1"], 2, "usage", &["--temp"]);
    assert_refused(&["generate", "-p", "x", "--system", "y"], 2, "usage", &["--chat"]);
}

#[test]
fn a_verb_says_what_it_misses() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = model_like(folder.path());
    let a_file = folder.path().join("taken");
    std::fs::write(&a_file, "x").expect("writing");
    let (here, taken) = (folder.path().display().to_string(), a_file.display().to_string());
    assert_refused(&["train", "-m", &model], 2, "usage", &["--data", "train.jsonl"]);
    assert_refused(
        &["train", "-m", &model, "--data", &here, "--adapter-path", &taken],
        2,
        "usage",
        &["--adapter-path"],
    );
    assert_refused(&["generate", "-m", &model], 2, "usage", &["-p TEXT"]);
    assert_refused(&["eval", "-m", &model], 2, "usage", &["--perplexity FILE"]);
}

#[test]
fn missing_files_are_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = model_like(folder.path());
    let gone = folder.path().join("gone").display().to_string();
    assert_refused(&["plan", "-m", &gone], 1, "io", &["--model", &gone, "check the path"]);
    assert_refused(&["train", "-m", &model, "--data", &gone], 1, "io", &["--data", &gone]);
    assert_refused(&["train", "-m", &model, "--config", &gone], 1, "io", &["--config", &gone]);
    assert_refused(&["generate", "-m", &model, "-p", "x", "--lora", &gone], 1, "io", &["--lora", &gone]);
    assert_refused(&["generate", "-m", &model, "-f", &gone], 1, "io", &["--file", &gone]);
    assert_refused(&["eval", "-m", &model, "--perplexity", &gone], 1, "io", &["--perplexity", &gone]);
    // A folder stands for the adapter within, which is missing here.
    let here = folder.path().display().to_string();
    assert_refused(&["generate", "-m", &model, "-p", "x", "--lora", &here], 1, "io", &["adapter.engraft"]);
}

#[test]
fn settings_files_are_checked() {
    let folder = tempfile::tempdir().expect("a folder");
    let settings = folder.path().join("settings.toml");
    let path = settings.display().to_string();
    for (text, word) in [("ranks = 8", "ranks"), ("rank = 0", "rank"), ("rank", "line 1")] {
        std::fs::write(&settings, text).expect("writing");
        assert_refused(&["train", "--config", &path], 2, "usage", &["settings.toml", word]);
    }
}

#[test]
fn the_shipped_profiles_are_good() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("targets/profiles");
    let profiles = build_script::read_profiles(&folder).expect("the shipped profiles");
    assert!(profiles.len() >= 7);
}

#[test]
fn bad_profiles_stop_the_build() {
    let good = "name = \"x\"\nram_mib = 512\nthreads = 4\nisa_floor = \"neon\"\nnotes = \"n\"\n\
                [thermal]\nstart_c = 60\nstop_c = 80\n";
    assert!(build_script::parse_profile(good, "x").is_ok());
    for (from, to, key) in [
        ("name = \"x\"", "name = \"y\"", "name"),
        ("ram_mib = 512", "", "ram_mib"),
        ("ram_mib = 512", "ram_mib = -1", "line 2"),
        ("ram_mib = 512", "ram_mib = 8", "ram_mib"),
        ("threads = 4", "threads = 0", "threads"),
        ("threads = 4", "threads = 4\ncores = 4", "cores"),
        ("\"neon\"", "\"mmx\"", "isa_floor"),
        ("start_c = 60", "start_c = 80", "thermal.start_c"),
        ("stop_c = 80", "stop_c = 800", "thermal.stop_c"),
        ("notes = \"n\"", "notes = \"\"", "notes"),
    ] {
        let error = build_script::parse_profile(&good.replace(from, to), "x").expect_err(to);
        assert!(error.contains(key), "{to}: {error}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("x.toml"), good.replace("512", "\"much\"")).expect("writing");
    let error = build_script::read_profiles(folder.path()).expect_err("a text as a number");
    assert!(error.contains("x.toml") && error.contains("line 2"), "{error}");
    assert!(build_script::read_profiles(tempfile::tempdir().expect("a folder").path()).is_err());
}
