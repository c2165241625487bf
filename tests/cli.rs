//! The command line as users see it: exit codes, messages that name the flag and the remedy, and the JSON object at
//! the end of stdout. Also the device profiles that build.rs checks.

#[path = "../build.rs"]
#[allow(dead_code, reason = "cargo calls its main, the tests its parser")]
mod build_script;

#[path = "cli/adapters.rs"]
mod adapters;
#[path = "cli/answers.rs"]
mod answers;
#[path = "cli/contest.rs"]
mod contest;
#[path = "cli/demo.rs"]
mod demo;
#[path = "cli/everyday.rs"]
mod everyday;
#[path = "cli/examples.rs"]
mod examples;
#[path = "cli/locks.rs"]
mod locks;
#[cfg(unix)]
#[path = "cli/next.rs"]
mod next;
#[cfg(unix)]
#[path = "cli/places.rs"]
mod places;
#[path = "cli/privacy.rs"]
mod privacy;
#[cfg(unix)]
#[path = "cli/prose.rs"]
mod prose;
#[path = "cli/resume.rs"]
mod resume;
#[path = "cli/room.rs"]
mod room;
#[path = "cli/search.rs"]
mod search;
#[path = "cli/truncation.rs"]
mod truncation;

use std::path::Path;
use std::process::{Command, Output};

use engraft_runtime::adapter::Adapter;
use engraft_runtime::gate::store::{Candidate, Store};
use engraft_runtime::model::chat::Message;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::storage::Disk;

/// Names the emulator if these tests run under one, because the kernel can't start their program itself.
const EMULATOR: &str = "ENGRAFT_TEST_EMULATOR";

/// The built program, or another one for the same machine.
fn program() -> Command {
    runnable(Path::new(env!("CARGO_BIN_EXE_engraft")))
}

fn runnable(path: &Path) -> Command {
    let Some(emulator) = std::env::var_os(EMULATOR) else { return Command::new(path) };
    let mut command = Command::new(emulator);
    command.arg(path);
    command
}

/// Whether memory can be measured: it is counted per process, and an emulator takes more than the program in it.
fn memory_is_the_programs() -> bool {
    let alone = std::env::var_os(EMULATOR).is_none();
    if !alone {
        eprintln!("SKIPPED: memory, which would be the emulator's");
    }
    alone
}

/// The peak memory that a training reports, if the system reports it.
#[track_caller]
fn assert_within_plan(trained: &serde_json::Value) {
    let (peak, planned) = (&trained["peak_private_bytes"], &trained["planned_private_bytes"]);
    if memory_is_the_programs() && !peak.is_null() {
        assert!(peak.as_u64().expect("bytes") <= planned.as_u64().expect("bytes"), "{trained}");
    }
}

fn engraft(arguments: &[&str]) -> Output {
    let mut command = program();
    command.env("ENGRAFT_CACHE_DIR", Path::new(env!("CARGO_TARGET_TMPDIR")).join("engraft-cache"));
    command.args(arguments).output().expect("running engraft")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs with `--json` and asserts a refusal: its exit code, and words of its message both on stderr and in the object
/// on stdout's last line.
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

/// A file that looks like a model until it is read.
fn model_like(folder: &Path) -> String {
    let file = folder.join("model.gguf");
    std::fs::write(&file, b"GGUF").expect("writing");
    file.display().to_string()
}

#[test]
fn the_verbs_are_listed() {
    let output = engraft(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    for word in [
        "plan",
        "train",
        "compare",
        "adapt",
        "generate",
        "chat",
        "eval",
        "data",
        "import",
        "export",
        "merge",
        "adapter",
        "demo",
        "bench",
        "selftest",
        "completions",
        "Exit codes",
    ] {
        assert!(stdout(&output).contains(word), "{word}");
    }
    let verbs = [
        "plan",
        "train",
        "compare",
        "adapt",
        "generate",
        "chat",
        "eval",
        "data",
        "import",
        "export",
        "merge",
        "adapter",
        "demo",
        "bench",
        "selftest",
        "completions",
    ];
    for verb in verbs {
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
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        assert_ne!(line("isa"), "scalar");
    }
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
    assert_refused(&["train", "--data", "."], 2, "usage", &["--model"]);
    assert_refused(&["plan", "-m", "."], 2, "usage", &["--model", "folder"]);
    assert_refused(&["generate", "-p", "x", "--temp", "-1"], 2, "usage", &["--temp"]);
    let system = ["generate", "-m", &seedling(), "-p", "x", "--system", "y"];
    assert_refused(&system, 2, "usage", &["--chat"]);
}

#[test]
fn a_verb_says_what_it_misses() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = model_like(folder.path());
    let a_file = folder.path().join("taken");
    std::fs::write(&a_file, "x").expect("writing");
    let (here, taken) = (folder.path().display().to_string(), a_file.display().to_string());
    assert_refused(&["train", "-m", &model], 2, "usage", &["--data"]);
    let warm = ["train", "-m", &model, "--data", ".", "--start-below", "80", "--pause-above", "70"];
    assert_refused(&warm, 2, "usage", &["--start-below 80", "--pause-above"]);
    assert_refused(&["adapt", "--device", "toaster"], 2, "usage", &["--device", "pi-5-8g"]);
    assert_refused(
        &["train", "-m", &model, "--data", &here, "--adapter-path", &taken],
        2,
        "usage",
        &["--adapter-path"],
    );
    assert_refused(&["generate", "-m", &model], 2, "usage", &["--prompt <TEXT>", "--file <FILE>"]);
    assert_refused(&["eval", "-m", &model], 2, "usage", &["--perplexity <FILE>", "--data"]);
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
    // A folder means the adapter inside, which is missing here.
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

/// The small model in the repository.
fn seedling() -> String {
    shipped("seedling.gguf")
}

fn shipped(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("targets/cli").join(name).display().to_string()
}

/// Runs with `--json`, asserts success, and returns the object on stdout's last line.
#[track_caller]
fn result_of(arguments: &[&str]) -> serde_json::Value {
    let output = engraft(&[arguments, &["--json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
    last_line(&output)
}

#[track_caller]
fn last_line(output: &Output) -> serde_json::Value {
    serde_json::from_str(stdout(output).lines().last().expect("a last line")).expect("JSON")
}

#[track_caller]
fn assert_keys(object: &serde_json::Value, expected: &[&str]) {
    let found: std::collections::BTreeSet<_> =
        object.as_object().expect("an object").keys().map(String::as_str).collect();
    assert_eq!(found, expected.iter().copied().collect());
}

const TRAIN_KEYS: [&str; 10] = [
    "steps",
    "tokens",
    "tokens_per_s",
    "planned_private_bytes",
    "peak_private_bytes",
    "train_loss",
    "train_kl",
    "valid_loss_before",
    "valid_loss_after",
    "adapter",
];

#[test]
fn training_changes_what_eval_and_generate_see() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let adapter = folder.path().join("home").display().to_string();
    let trained = result_of(&[
        "train",
        "-m",
        &model,
        "--data",
        &data,
        "--adapter-path",
        &adapter,
        "--iters",
        "12",
        "-b",
        "4",
        "--grad-accumulation-steps",
        "2",
        "-lr",
        "2e-3",
        "--steps-per-eval",
        "5",
        "-t",
        "2",
    ]);
    assert_keys(&trained, &TRAIN_KEYS);
    assert_eq!(trained["steps"], 12);
    let (before, after) = (&trained["valid_loss_before"], &trained["valid_loss_after"]);
    assert!(after.as_f64() < before.as_f64(), "{before} to {after}");
    assert_within_plan(&trained);
    let metrics = std::fs::read_to_string(Path::new(&adapter).join("metrics.jsonl")).expect("metrics");
    let records: Vec<serde_json::Value> =
        metrics.lines().map(|l| serde_json::from_str(l).expect("a record")).collect();
    let held_out: Vec<_> = records.iter().filter(|r| r.get("valid_loss").is_some()).collect();
    let steps: Vec<_> = held_out.iter().map(|r| r["step"].as_u64()).collect();
    assert_eq!(steps, [Some(0), Some(5), Some(10), Some(12)]);

    // The same rows are held out, whatever the length limit.
    let eval = ["eval", "-m", &model, "--data", &data, "-c", "200"];
    let (plain, adapted) = (result_of(&eval), result_of(&[&eval[..], &["--lora", &adapter]].concat()));
    assert_keys(&adapted, &["nll", "ppl", "tokens", "answers"]);
    assert_eq!(&plain["nll"], before);
    assert!((adapted["nll"].as_f64().expect("nll") - after.as_f64().expect("loss")).abs() < 1e-4);

    // At scale 0 an adapter has no effect; two halves make a whole.
    let scaled = |scale: &str| format!("{adapter}/adapter.engraft:{scale}");
    let off = result_of(&[&eval[..], &["--lora-scaled", &scaled("0")]].concat());
    assert_eq!(off["nll"], plain["nll"]);
    let half = scaled("0.5");
    let exactly = [&eval[..], &["--precision", "f32"]].concat();
    let nll = |adapters: &[&str]| result_of(&[&exactly[..], adapters].concat())["nll"].as_f64().expect("nll");
    let difference = nll(&["--lora-scaled", &half, "--lora-scaled", &half]) - nll(&["--lora", &adapter]);
    assert!(difference.abs() < 1e-4, "{difference}");

    let generate = ["generate", "-m", &model, "-p", "turn on the light", "--chat", "--temp", "0", "-n", "24"];
    let said = result_of(&[&generate[..], &["--lora", &adapter]].concat());
    assert_keys(&said, &["text", "prompt_tokens", "tokens", "tokens_per_s", "stopped"]);
    let streamed = engraft(&[&generate[..], &["--lora", &adapter]].concat());
    assert_eq!(stdout(&streamed).trim_end_matches('\n'), said["text"].as_str().expect("text"));
    assert_adapters_are_checked(folder.path(), &adapter, &generate);
}

#[test]
fn a_penalty_and_replay_hold_the_model_near_its_base() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let general = folder.path().join("general.jsonl").display().to_string();
    std::fs::write(&general, "{\"text\":\"turn on the light\"}\n{\"text\":\"good night\"}\n")
        .expect("writing");
    let run = |name: &str, flags: &[&str]| {
        let adapter = folder.path().join(name).display().to_string();
        let train = ["train", "-m", &model, "--data", &data, "--adapter-path", &adapter, "--iters", "20"];
        let output = engraft(&[&train[..], &["-b", "4", "-lr", "2e-3", "-t", "2", "--json"], flags].concat());
        assert_eq!(output.status.code(), Some(0), "{flags:?}: {}", stderr(&output));
        let trained = last_line(&output);
        assert_keys(&trained, &TRAIN_KEYS);
        assert_within_plan(&trained);
        let bytes = std::fs::read(folder.path().join(name).join("adapter.engraft")).expect("the adapter");
        (trained, stderr(&output), bytes)
    };
    let (plain, ..) = run("plain", &[]);
    assert!(plain["train_kl"].is_null());
    let kl = |trained: &serde_json::Value| trained["train_kl"].as_f64().expect("a divergence");
    let (loose, told, _) = run("loose", &["--kl-weight", "1e-6"]);
    assert!(told.contains("KL(base‖tuned) at weight 0.000001: the base runs forward once more"), "{told}");
    let (tight, ..) = run("tight", &["--kl-weight", "20", "--kl-direction", "reverse"]);
    assert!(kl(&tight) < 0.5 * kl(&loose), "{} and {}", kl(&tight), kl(&loose));
    let metrics = std::fs::read_to_string(folder.path().join("tight/metrics.jsonl")).expect("metrics");
    assert!(metrics.contains("\"kl\":"), "{metrics}");

    let (_, told, from_file) = run("file", &["--replay", &general, "--replay-share", "0.5"]);
    assert!(told.contains("2 rows with") && told.contains("0.5 of each batch's rows"), "{told}");
    let sampled = ["--replay", "base", "--replay-count", "6", "--replay-tokens", "12"];
    let (_, told, from_base) = run("base", &sampled);
    assert!(told.contains("sampled 6 rows"), "{told}");
    assert!(from_base == run("again", &sampled).2, "sampling and training are not reproducible");
    assert!(from_base != from_file);

    let train = ["train", "-m", &model, "--data", &data];
    let misused = [&train[..], &["--replay-share", "0.5"]].concat();
    assert_refused(&misused, 2, "usage", &["--replay-share", "--replay base"]);
    assert_refused(&[&train[..], &["--replay", "gone.jsonl"]].concat(), 1, "io", &["--replay", "gone.jsonl"]);
    let tight = [&train[..], &["--memory-budget", "5M", "--replay", "base"]].concat();
    assert_refused(&tight, 3, "does_not_fit", &["--memory-budget"]);
}

#[test]
fn eva_begins_as_the_base_and_is_kept_in_the_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let adapter = folder.path().join("home").display().to_string();
    let flags = ["--init", "eva", "--eva-batches", "3", "-b", "4", "-t", "2"];
    let train =
        ["train", "-m", &model, "--data", &data, "--adapter-path", &adapter, "--iters", "12", "--json"];
    let output = engraft(&[&train[..], &["-lr", "2e-3"], &flags].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("EVA: A from 3 batches"), "{}", stderr(&output));
    let trained = last_line(&output);
    let loss = |name: &str| trained[name].as_f64().expect("a loss");
    assert!(loss("valid_loss_after") < loss("valid_loss_before"), "{trained}");
    assert_within_plan(&trained);
    let peft = folder.path().join("peft").display().to_string();
    result_of(&["export", "-m", &model, "--lora", &adapter, "--format", "peft", "-o", &peft]);
    let settings = std::fs::read_to_string(Path::new(&peft).join("adapter_config.json")).expect("settings");
    assert!(settings.contains("\"init_lora_weights\": \"eva\""), "{settings}");
    // Many batches need more memory than training itself; the plan says so.
    let plan = ["plan", "-m", &model, "--no-calibration", "--keep", "inputs", "--init"];
    let bytes = |flags: &[&str]| {
        let plan = result_of(&[&plan[..], flags].concat());
        plan["pools"]["preparation"].as_u64().expect("a pool")
    };
    assert_eq!(bytes(&["kaiming"]), 0);
    assert!(bytes(&["eva", "--eva-batches", "200"]) > 100_000_000);
    let tight = [&plan[..], &["eva", "--eva-batches", "200", "--memory-budget", "100M"]].concat();
    let output = engraft(&tight);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("fewer --eva-batches"), "{}", stderr(&output));
}

#[test]
fn dora_with_patterns_trains_tells_its_multipliers_and_infers_as_trained() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let adapter = folder.path().join("home").display().to_string();
    let flags = ["--fine-tune-type", "dora", "--rslora", "--rank-pattern", "q=4,layers.1.down=2"];
    let run = ["train", "-m", &model, "--data", &data, "--adapter-path", &adapter, "--json"];
    // In f32: int8 activations near a tie may round either way in the two orders of computing.
    let exact = ["--precision", "f32"];
    let short = ["--iters", "6", "-b", "4", "-lr", "2e-3", "--lora-plus-ratio", "4"];
    let output = engraft(&[&run[..], &flags, &short, &exact].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    for line in [
        "DoRA on q_proj: effective multiplier alpha/sqrt(r) = 16/sqrt(4) = 8",
        "down_proj (layer 1): effective multiplier alpha/sqrt(r) = 16/sqrt(2) = 11.31",
    ] {
        assert!(stderr(&output).contains(line), "{line}: {}", stderr(&output));
    }
    let trained = last_line(&output);
    let loss = |name: &str| trained[name].as_f64().expect("a loss");
    assert!(loss("valid_loss_after") < loss("valid_loss_before"), "{trained}");
    let eval = ["eval", "-m", &model, "--data", &data, "-c", "200"];
    let nll = |more: &[&str]| result_of(&[&eval[..], &exact, more].concat())["nll"].as_f64().expect("nll");
    assert!((nll(&["--lora", &adapter]) - loss("valid_loss_after")).abs() < 1e-4);
    let off = format!("{adapter}/adapter.engraft:0");
    assert!((nll(&["--lora-scaled", &off]) - loss("valid_loss_before")).abs() < 1e-6);
    assert_refused(&[&run[..7], &["--rank-pattern", "q=0"]].concat(), 2, "usage", &["q=0"]);
    let nowhere = ["--rank-pattern", "q=4", "--lora-modules", "v"];
    assert_refused(&[&run[..7], &nowhere].concat(), 2, "usage", &["q_proj", "not adapted"]);
}

#[test]
fn an_adapter_in_f16_is_small_and_scores_as_in_f32() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    // Without int8 activations, which may round either way if the adapter is slightly off.
    let eval = ["eval", "-m", &model, "--data", &data, "-c", "200", "--precision", "f32"];
    let [(exact, exactly), (small, rounded)] = ["f32", "f16"].map(|precision| {
        let adapter = folder.path().join(precision).display().to_string();
        let train = ["train", "-m", &model, "--data", &data, "--adapter-path", &adapter];
        let short = ["--iters", "6", "-b", "4", "-lr", "2e-3", "--save-every", "3", "--precision", "f32"];
        let trained = result_of(&[&train[..], &short, &["--adapter-precision", precision]].concat());
        let nll = result_of(&[&eval[..], &["--lora", &adapter]].concat())["nll"].as_f64().expect("nll");
        assert!((trained["valid_loss_after"].as_f64().expect("loss") - nll).abs() < 1e-3, "{trained} {nll}");
        let file = std::fs::metadata(Path::new(&adapter).join("adapter.engraft")).expect("an adapter");
        (file.len(), nll)
    });
    assert!(2 * small < exact + 1000, "{small} of {exact} bytes");
    assert!((exactly - rounded).abs() < 1e-3, "{exactly} {rounded}");
    let full = ["train", "-m", &model, "--data", &data, "--fine-tune-type", "full"];
    let flag = ["--adapter-precision", "f16"];
    assert_refused(&[&full[..], &flag].concat(), 2, "usage", &["--adapter-precision"]);
}

/// Another base, a damaged adapter, and a file that isn't an adapter: each is refused with 6.
fn assert_adapters_are_checked(folder: &Path, adapter: &str, generate: &[&str]) {
    let mut other = std::fs::read(seedling()).expect("reading");
    let last = other.len() - 1;
    other[last] ^= 1;
    let base = folder.join("other.gguf").display().to_string();
    std::fs::write(&base, other).expect("writing");
    let elsewhere: Vec<&str> =
        generate.iter().map(|a| if a.ends_with(".gguf") { &base } else { *a }).collect();
    let with = |arguments: &[&str], adapter: &str, kind: &str, word: &str| {
        assert_refused(&[arguments, &["--lora", adapter]].concat(), 6, kind, &[word]);
    };
    with(&elsewhere, adapter, "base_mismatch", "another base");
    let forced = engraft(&[&elsewhere[..], &["--lora", adapter, "--force-base"]].concat());
    assert_eq!(forced.status.code(), Some(0), "{}", stderr(&forced));
    assert!(stderr(&forced).contains("--force-base") && stderr(&forced).contains("another base"));

    let mut bytes = std::fs::read(Path::new(adapter).join("adapter.engraft")).expect("reading");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    let damaged = folder.join("damaged.engraft").display().to_string();
    std::fs::write(&damaged, &bytes).expect("writing");
    with(generate, &damaged, "corrupt", "damaged.engraft");
    std::fs::write(&damaged, &bytes[..middle]).expect("writing");
    with(generate, &damaged, "corrupt", "damaged.engraft");
    with(generate, &seedling(), "corrupt", "seedling.gguf");
}

/// A golden file that PEFT wrote.
fn golden(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peft/golden").join(name).display().to_string()
}

#[test]
fn adapters_travel_in_and_out() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (base, ours, file, again) = (golden("base.gguf"), path("ours"), path("a.gguf"), path("again"));
    let import = ["import", "-m", &base, "--adapter-path", &ours, "--from"];
    let taken = result_of(&[&import[..], &[&golden("lora")]].concat());
    assert_keys(&taken, &["format", "modules", "rank", "alpha", "base", "warnings", "adapter"]);
    assert_eq!(
        (&taken["format"], &taken["modules"], &taken["alpha"]),
        (&"peft".into(), &14.into(), &6.0.into())
    );
    let export = ["export", "-m", &base, "--lora", &ours, "--format"];
    let written = result_of(&[&export[..], &["gguf", "-o", &file]].concat());
    assert_keys(&written, &["format", "modules", "output", "approximation"]);
    assert!(written["approximation"].is_null());
    let back = result_of(&["import", "-m", &base, "--adapter-path", &again, "--from", &file]);
    assert_eq!(back["format"], "gguf");
    let bytes = |folder: &str| std::fs::read(Path::new(folder).join("adapter.engraft")).expect("reading");
    assert_eq!(bytes(&ours), bytes(&again));
    result_of(&[&export[..], &["peft", "-o", &path("peft"), "--base-name", "some/base"]].concat());
    result_of(&["import", "-m", &base, "--adapter-path", &again, "--from", &path("peft")]);
    assert_eq!(bytes(&ours), bytes(&again));

    let into = |from: &str, kind: &str, words: &[&str]| {
        assert_refused(
            &["import", "-m", &base, "--adapter-path", &path("no"), "--from", from],
            6,
            kind,
            words,
        );
    };
    let dora = path("dora");
    result_of(&["import", "-m", &base, "--adapter-path", &dora, "--from", &golden("dora")]);
    let as_lora = ["export", "-m", &base, "--lora", &dora, "--format", "gguf", "-o", &path("dora.gguf")];
    assert_refused(&as_lora, 6, "unsupported", &["DoRA", "merge", "--dora-svd-rank"]);
    into(&base, "unsupported", &["base.gguf", "a model"]);
    into(&path("ours/adapter.engraft"), "unsupported", &["not a GGUF"]);
    let tensors = folder.path().join("peft/adapter_model.safetensors");
    let good = std::fs::read(&tensors).expect("reading");
    std::fs::write(&tensors, &good[..good.len() - 1]).expect("writing");
    into(&path("peft"), "corrupt", &["adapter_model.safetensors", "bytes of data"]);
    std::fs::write(&tensors, [&good[..good.len() - 4], &f32::NAN.to_le_bytes()].concat()).expect("writing");
    into(&path("peft"), "corrupt", &["adapter_model.safetensors", "NaN"]);
    let other = ["import", "-m", &seedling(), "--adapter-path", &path("no"), "--from", &file];
    assert_refused(&other, 6, "base_mismatch", &["a.gguf", "own base"]);
    let elsewhere = ["export", "-m", &seedling(), "--lora", &ours, "--format", "gguf", "-o", &file];
    assert_refused(&elsewhere, 6, "base_mismatch", &["another base"]);
    assert!(!Path::new(&path("no")).exists(), "nothing is written for what is refused");
}

#[test]
fn merging_is_measured_and_refused_where_it_erases() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let (adapter, out) = (path("home"), path("merged.gguf"));
    let train = ["train", "-m", &model, "--data", &data, "--adapter-path", &adapter, "--iters", "12"];
    result_of(&[&train[..], &["-b", "4", "-lr", "2e-3", "-t", "2"]].concat());
    let merge = ["merge", "-m", &model, "--lora", &adapter, "-t", "2", "-o"];
    let measured = [&merge[..], &[&out, "--data", &data]].concat();
    let merged = result_of(&[&measured[..], &["--type", "f16"]].concat());
    assert_keys(&merged, &["output", "bytes", "merged_tensors", "measured", "forced"]);
    let figures = &merged["measured"];
    let of = |key: &str| figures[key].as_f64().expect(key);
    assert!(of("nll_base") - of("nll_adapter") > 0.05, "{figures}");
    assert!(of("delta_nll").abs() < 0.01 && of("mean_kl") < 0.1 * of("mean_kl_base"), "{figures}");
    // On its own, the merged model scores like the base with its adapter.
    let eval = ["eval", "--data", &data, "-c", "512", "-m"];
    let alone = result_of(&[&eval[..], &[&out]].concat());
    assert!((alone["nll"].as_f64().expect("nll") - of("nll_merged")).abs() < 2e-3, "{alone} {figures}");

    // Four bits round away one step at a tiny rate: refused, and the older file stays.
    let faint = path("faint");
    let train = ["train", "-m", &model, "--data", &data, "--adapter-path", &faint, "--iters", "1"];
    result_of(&[&train[..], &["-lr", "1e-5", "-t", "2"]].concat());
    let coarse = ["merge", "-m", &model, "--lora", &faint, "-o", &out, "--data", &data, "--type", "q4_0"];
    let before = std::fs::read(&out).expect("the merged model");
    assert_refused(
        &coarse,
        4,
        "gate_refused",
        &["merging as Q4_0 loses most", "--force", "--type Q8_0 or F16 loses less"],
    );
    assert_eq!(std::fs::read(&out).expect("the merged model"), before);
    assert_eq!(result_of(&[&coarse[..], &["--force"]].concat())["forced"], true);
    assert_eq!(std::fs::read_dir(folder.path()).expect("listing").count(), 3, "nothing is left beside");
    assert_refused(&[&merge[..], &[&out]].concat(), 2, "usage", &["--unmeasured"]);
    let input = ["is an input of this command"];
    assert_refused(&[&merge[..], &[&model, "--unmeasured"]].concat(), 2, "usage", &input);
    let export = ["export", "-m", &model, "--lora", &faint, "--format", "gguf", "-o"];
    assert_refused(&[&export[..], &[&model]].concat(), 2, "usage", &input);
    assert_refused(&[&export[..], &[&format!("{faint}/adapter.engraft")]].concat(), 2, "usage", &input);
    assert_refused(&[&merge[..], &[&out, "--unmeasured", "--type", "q9"]].concat(), 2, "usage", &["--type"]);
    let unmeasured = result_of(&[&merge[..], &[&out, "--unmeasured"]].concat());
    assert!(unmeasured["measured"].is_null());
}

/// Promotes into a store for the built-in model, without `engraft adapt`.
fn promote(dir: &Path, candidate: &Candidate<'_>) -> u64 {
    let model = ModelFile::open(Path::new(&seedling())).expect("the model");
    let store = Store::create(&Disk, dir).expect("a store");
    let base = (&model.digest(), model.config());
    store.promote(candidate, b"{\"verdict\":\"PROMOTE\"}", base, false).expect("promoting").number
}

/// Trains a little on the built-in model and returns the adapter.
fn trained(folder: &Path, name: &str, more: &[&str]) -> Adapter {
    let out = folder.join(name).display().to_string();
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let train = ["train", "-m", &model, "--data", &data, "--adapter-path", &out, "-b", "4", "-t", "2"];
    result_of(&[&train[..], &["-lr", "2e-3"], more].concat());
    Adapter::load(Path::new(&out)).expect("the adapter")
}

#[test]
fn a_store_is_used_rolled_back_and_pruned() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("store");
    let (model, data, store) = (seedling(), shipped("demo/private_train.jsonl"), dir.display().to_string());
    assert_eq!(promote(&dir, &Candidate::Adapter(&trained(folder.path(), "a", &["--iters", "3"]))), 1);
    assert_eq!(promote(&dir, &Candidate::Adapter(&trained(folder.path(), "b", &["--iters", "9"]))), 2);
    let adapter = |words: &[&str]| result_of(&[&["adapter"], words, &["--store", &store]].concat());
    let listed = adapter(&["ls"]);
    assert_keys(&listed, &["active", "generations", "passed_over", "unknown"]);
    assert_eq!((&listed["active"], &listed["generations"][0]["verdict"]), (&2.into(), &"PROMOTE".into()));
    assert_eq!(adapter(&["show"])["adapter"]["steps"], 9);
    assert_eq!(adapter(&["show", "1"])["adapter"]["steps"], 3);

    // eval and generate use what is active, like --lora.
    let eval = ["eval", "-m", &model, "--data", &data, "-c", "200", "-t", "2"];
    let nll = |more: &[&str]| result_of(&[&eval[..], more].concat())["nll"].as_f64().expect("nll");
    let path = |name: &str| folder.path().join(name).display().to_string();
    assert_eq!(nll(&["--store", &store]), nll(&["--lora", &path("b")]));
    let back = adapter(&["rollback"]);
    assert_eq!((&back["active"], &back["was"]), (&1.into(), &2.into()));
    assert_eq!(nll(&["--store", &store]), nll(&["--lora", &path("a")]));
    let twice = ["adapter", "rollback", "--store", &store];
    assert_refused(&twice, 2, "usage", &["generation 1", "the first"]);
    assert_eq!(adapter(&["rollback", "--to", "2"])["active"], 2);
    assert_refused(&[&twice[..], &["--to", "9"]].concat(), 2, "usage", &["no generation 9"]);
    assert_eq!(adapter(&["verify", "-m", &model])["good"], serde_json::json!([1, 2]));

    // What a killed promotion leaves is reported, isn't damage, and goes with the next one.
    let killed = dir.join("generations/000003");
    std::fs::create_dir(&killed).expect("a folder");
    std::fs::write(killed.join("adapter.engraft"), "half of it").expect("writing");
    let found = adapter(&["verify", "-m", &model]);
    assert_keys(&found, &["active", "good", "unfinished", "problems"]);
    assert_eq!((&found["active"], &found["good"]), (&2.into(), &serde_json::json!([1, 2])));
    assert_eq!((&found["unfinished"], &found["problems"]), (&serde_json::json!([3]), &serde_json::json!([])));
    assert_eq!(adapter(&["ls"])["generations"][2]["unfinished"], true);
    assert_eq!(promote(&dir, &Candidate::Base), 3);
    assert_eq!(nll(&["--store", &store]), nll(&[]));
    assert_eq!(adapter(&["prune", "--keep", "1"])["removed"], serde_json::json!([1]));
    assert_refused(&["adapter", "prune", "--store", &store, "--keep", "0"], 2, "usage", &["--keep"]);
    let opened = Store::open(&Disk, &dir).expect("the store");
    let held = opened.writer().expect("the lock");
    assert_refused(
        &["adapter", "prune", "--store", &store],
        1,
        "busy",
        &["another process", &format!("{store}/lock")],
    );
    drop(held);
    assert_refused(&["adapter", "ls", "--store", &path("gone")], 1, "io", &["--store", "check the path"]);
    assert_refused(&["adapter", "ls", "--store", &path("a")], 2, "usage", &["no adapter store"]);
    assert_refused(&["adapter", "ls"], 2, "usage", &["--store"]);
    assert_stores_are_checked(folder.path(), &dir, &eval);
}

/// Another base, a damaged file, a damaged pointer: 6, or the previous generation with a note on stderr.
fn assert_stores_are_checked(folder: &Path, dir: &Path, eval: &[&str]) {
    let store = dir.display().to_string();
    result_of(&["adapter", "rollback", "--store", &store]);
    let mut other = std::fs::read(seedling()).expect("reading");
    let last = other.len() - 1;
    other[last] ^= 1;
    let base = folder.join("other.gguf").display().to_string();
    std::fs::write(&base, other).expect("writing");
    let elsewhere = [&["eval", "-m", &base], &eval[3..], &["--store", &store]].concat();
    assert_refused(&elsewhere, 6, "base_mismatch", &["another base", "adapter.engraft"]);
    let forced = engraft(&[&elsewhere[..], &["--force-base"]].concat());
    assert_eq!(forced.status.code(), Some(0), "{}", stderr(&forced));
    let verify = ["adapter", "verify", "--store", &store];
    assert_eq!(engraft(&[&verify[..], &["-m", &base]].concat()).status.code(), Some(6));

    let file = dir.join("generations/000002/adapter.engraft");
    let bytes = std::fs::read(&file).expect("reading");
    std::fs::write(&file, &bytes[..bytes.len() / 2]).expect("writing");
    let output = engraft(&[&verify[..], &["--json"]].concat());
    assert_eq!(output.status.code(), Some(6), "{}", stderr(&output));
    assert_eq!(last_line(&output)["good"], serde_json::json!([3]));
    // The only older generation was pruned: nothing is left to use.
    let used = [eval, &["--store", &store]].concat();
    assert_refused(&used, 6, "corrupt", &["adapter.engraft"]);
    std::fs::write(&file, bytes).expect("writing");
    std::fs::write(dir.join("active"), "{}").expect("writing");
    let output = engraft(&used);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    for words in ["passed over: ", "active: ", "cut short", "generation 3, the base alone"] {
        assert!(stderr(&output).contains(words), "{words}: {}", stderr(&output));
    }
}

#[test]
fn few_shot_examples_of_a_store_go_before_every_prompt() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("store");
    let (model, data, store) = (seedling(), shipped("demo/private_train.jsonl"), dir.display().to_string());
    let examples = [Message::new("user", "turn on the lamp"), Message::new("assistant", "{\"x\":1}")];
    assert_eq!(promote(&dir, &Candidate::FewShot(&examples)), 1);
    let generate = ["generate", "-m", &model, "-p", "turn on the light", "--temp", "0", "-n", "8", "-t", "2"];
    // They are of a chat, so that a prompt is one, too.
    let [by_itself, as_chat] =
        [&[][..], &["--chat"]].map(|more| result_of(&[&generate[..], &["--store", &store], more].concat()));
    assert_eq!(
        (&by_itself["text"], &by_itself["prompt_tokens"]),
        (&as_chat["text"], &as_chat["prompt_tokens"])
    );
    assert_refused(&[&generate[..], &["--store", &store, "--plain"]].concat(), 2, "usage", &["--plain"]);
    let tokens = |more: &[&str]| {
        result_of(&[&generate[..], &["--chat"], more].concat())["prompt_tokens"].as_u64().expect("tokens")
    };
    assert!(tokens(&["--store", &store]) > tokens(&[]) + 8);
    // The same rows and targets are scored, after the examples, whatever the limit cuts.
    for limit in ["200", "24"] {
        let eval = ["eval", "-m", &model, "--data", &data, "-t", "2", "-c", limit];
        let (plain, after) = (result_of(&eval), result_of(&[&eval[..], &["--store", &store]].concat()));
        assert_eq!(plain["tokens"], after["tokens"]);
        assert_ne!(plain["nll"], after["nll"]);
    }
    let text = ["eval", "-m", &model, "--store", &store, "--perplexity", &shipped("demo/everyday.txt")];
    assert_refused(&text, 2, "usage", &["few-shot", "--data"]);
    let shown = result_of(&["adapter", "show", "--store", &store]);
    assert_eq!(shown["few_shot"][1]["content"], "{\"x\":1}");
}

#[test]
fn full_fine_tuning_writes_a_model_that_scores_as_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (model, data, out) = (seedling(), shipped("demo/private_train.jsonl"), path("tuned"));
    let train = ["train", "-m", &model, "--data", &data, "-t", "2", "--fine-tune-type", "full"];
    let run = [&train[..], &["-b", "4", "-lr", "1e-3", "--iters", "8", "--adapter-path"]].concat();
    let output = engraft(&[&run[..], &[&out, "--type", "f16", "--json"]].concat());
    let told = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{told}");
    for word in ["warning", "2606.06920", "--fine-tune-type lora", "held-out loss before", "weights"] {
        assert!(told.contains(word), "{word}: {told}");
    }
    let tuned = last_line(&output);
    assert_keys(&tuned, &[&TRAIN_KEYS[..9], &["model", "valid_loss_stored"]].concat());
    let loss = |key: &str| tuned[key].as_f64().expect(key);
    assert!(loss("valid_loss_after") < loss("valid_loss_before") - 0.05, "{tuned}");
    assert!((loss("valid_loss_stored") - loss("valid_loss_after")).abs() < 0.02, "{tuned}");
    assert_within_plan(&tuned);
    // The file is a model like any other: the tokenizer and the template came along.
    let file = tuned["model"].as_str().expect("a path");
    let eval = ["eval", "-m", file, "--data", &data, "-c", "200", "-t", "2"];
    let nll = result_of(&eval)["nll"].as_f64().expect("nll");
    assert!((nll - loss("valid_loss_stored")).abs() < 1e-4, "{nll} of {tuned}");
    let said = result_of(&["generate", "-m", file, "-p", "turn on the light", "--chat", "-n", "8"]);
    assert!(!said["text"].as_str().expect("text").is_empty());

    // Block by block takes less memory; the base's types are the default.
    let small = result_of(&[&run[..], &[&path("small"), "--max-grad-norm", "0"]].concat());
    assert!(small["planned_private_bytes"].as_u64() < tuned["planned_private_bytes"].as_u64());
    let size =
        |file: &serde_json::Value| std::fs::metadata(file.as_str().expect("a path")).expect("a file").len();
    let of_base = std::fs::metadata(&model).expect("the base").len();
    assert_eq!(size(&small["model"]), of_base);
    assert!(size(&tuned["model"]) > of_base);
    assert_full_is_planned_and_checked(&train, &path("none"));
}

/// Too small a budget is refused with what fits; flags for adapters are refused by name.
fn assert_full_is_planned_and_checked(train: &[&str], out: &str) {
    let plan = [&["plan"], &train[1..]].concat();
    let shown = result_of(&plan);
    for pool in ["weights", "gradients", "moments"] {
        assert!(shown["pools"][pool].as_u64() > Some(1 << 20), "{pool}: {shown}");
    }
    assert_eq!(shown["pools"]["adapter"], 0);
    let at_once = result_of(&[&plan[..], &["--max-grad-norm", "0", "--keep", "inputs"]].concat());
    let bytes = |plan: &serde_json::Value| plan["planned_private_bytes"].as_u64().expect("bytes");
    let at = |budget: u64, hints: &[&str]| {
        let budget = budget.to_string();
        let bounded = [train, &["--adapter-path", out, "--memory-budget", &budget]].concat();
        assert_refused(&bounded, 3, "does_not_fit", &[&["--memory-budget", " fits"], hints].concat());
    };
    at(bytes(&at_once) + 100_000, &["--max-grad-norm 0"]);
    at(bytes(&at_once) / 2, &["--fine-tune-type lora"]);
    for (flag, value) in
        [("--rank", "4"), ("--lora-modules", "q"), ("--num-layers", "2"), ("--dropout", "0.1")]
    {
        assert_refused(&[train, &[flag, value]].concat(), 2, "usage", &[flag, "for adapters"]);
    }
    assert_refused(&[train, &["--type", "q4_k"]].concat(), 2, "usage", &["--type"]);
    assert_refused(&["plan", "-m", train[2], "--type", "f16"], 2, "usage", &["--fine-tune-type full"]);
    assert!(!Path::new(out).exists(), "nothing is made of what is refused");
}

#[test]
fn broken_models_are_refused_with_6() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("model.gguf");
    let path = file.display().to_string();
    let good = std::fs::read(seedling()).expect("reading");
    for cut in [0, 3, 24, 1000, good.len() / 2, good.len() - 1] {
        std::fs::write(&file, &good[..cut]).expect("writing");
        assert_refused(&["plan", "-m", &path], 6, "corrupt", &["model.gguf"]);
    }
    std::fs::write(&file, "{\"not\": \"a model\"}, but long enough for a header").expect("writing");
    assert_refused(&["plan", "-m", &path], 6, "corrupt", &["model.gguf"]);
    // A flipped bit in the description may still make a valid model; it never makes a crash.
    let mut refused = 0;
    for i in 0..40 {
        let (mut bytes, at) = (good.clone(), i * 67);
        bytes[at] ^= 1 << (i % 8);
        std::fs::write(&file, bytes).expect("writing");
        let output = engraft(&["generate", "-m", &path, "-p", "a", "-n", "1"]);
        assert!(matches!(output.status.code(), Some(0 | 1 | 6)), "byte {at}: {}", stderr(&output));
        refused += usize::from(output.status.code() == Some(6));
    }
    assert!(refused > 5, "{refused}");
}

#[test]
fn data_that_can_not_be_trained_on_is_refused_with_5() {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, out) = (folder.path().join("rows.jsonl"), folder.path().join("out").display().to_string());
    let (path, model) = (file.display().to_string(), seedling());
    let user_only = r#"{"messages":[{"role":"user","content":"hello"}]}"#;
    for (text, word) in [
        ("", "no rows"),
        ("\n\n", "no rows"),
        ("no json\n", "line 1"),
        ("{\"sentence\":\"x\"}\n", "sentence"),
        ("{\"prompt\":\"x\",\"completion\":\" \"}\n", "completion"),
        (user_only, "assistant"),
    ] {
        std::fs::write(&file, text).expect("writing");
        let train = ["train", "-m", &model, "--data", &path, "--adapter-path", &out, "--iters", "1"];
        assert_refused(&train, 5, "bad_data", &["rows.jsonl", word]);
        assert_refused(&["eval", "-m", &model, "--data", &path], 5, "bad_data", &["rows.jsonl"]);
    }
    assert!(!Path::new(&out).exists(), "nothing is made before the data is good");
    std::fs::write(&file, "too short").expect("writing");
    assert_refused(
        &["eval", "-m", &model, "--perplexity", &path, "-c", "64"],
        5,
        "bad_data",
        &["rows.jsonl"],
    );
    std::fs::write(&file, [0xff, 0xfe]).expect("writing");
    assert_refused(&["eval", "-m", &model, "--perplexity", &path, "-c", "64"], 5, "bad_data", &["UTF-8"]);
}

#[test]
fn a_budget_is_kept_and_its_hint_fits() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let out = folder.path().join("out").display().to_string();
    // Only inputs: the least that the model needs.
    let run = ["-m", &model, "--data", &data, "-b", "8", "-t", "2", "--keep", "inputs"];
    let plan = result_of(&[&["plan"], &run[..]].concat());
    let pools = plan["pools"].as_object().expect("pools");
    assert_keys(
        &plan,
        &[
            "planned_private_bytes",
            "mapped_bytes",
            "pools",
            "fits",
            "ladder",
            "checkpoint_bytes",
            "checkpoint_mb_per_hour",
        ],
    );
    assert!(plan["checkpoint_mb_per_hour"].as_f64() > Some(0.0), "{plan}");
    assert_eq!(plan["checkpoint_bytes"].as_u64(), pools["adapter"].as_u64().map(|bytes| 3 * bytes));
    let planned = plan["planned_private_bytes"].as_u64();
    assert_eq!(pools.values().map(|b| b.as_u64().expect("bytes")).sum::<u64>(), planned.expect("bytes"));
    let all = plan["planned_private_bytes"].as_u64().expect("bytes");
    let one = result_of(&[&["plan"], &run[..4], &["-b", "1", "-t", "2", "--keep", "inputs"]].concat());
    let one = one["planned_private_bytes"].as_u64().expect("bytes");
    // Room for a smaller batch, then only for shorter rows.
    for budget in [(all + one) / 2, one - 100_000] {
        let budget = budget.to_string();
        let bounded = [&run[..], &["--memory-budget", &budget]].concat();
        let output = engraft(&[&["plan", "--json"], &bounded[..]].concat());
        assert_eq!((output.status.code(), &last_line(&output)["error"]["exit_code"]), (Some(3), &3.into()));
        let printed = stdout(&output);
        let plan: serde_json::Value =
            serde_json::from_str(printed.lines().rev().nth(1).expect("the plan")).expect("JSON");
        assert_eq!(plan["fits"], false);
        let train = [&["train", "--adapter-path", &out, "--iters", "2"], &bounded[..]].concat();
        assert_refused(&train, 3, "does_not_fit", &["--memory-budget", " fits"]);
        let told = stderr(&output);
        let hint = told
            .split("the budget is")
            .nth(1)
            .and_then(|t| t.split("; ").nth(1)?.split(" fits").next())
            .expect("a hint");
        let mut with_hint: Vec<&str> = train.clone();
        let b = with_hint.iter().position(|a| *a == "-b").expect("the batch");
        with_hint.drain(b..b + 2);
        with_hint.extend(hint.split(' '));
        let trained = result_of(&with_hint);
        assert!(trained["planned_private_bytes"].as_u64() <= budget.parse().ok());
    }
}

#[test]
fn the_ladder_leads_from_inputs_to_all() {
    let model = seedling();
    let plan = ["plan", "-m", &model, "-b", "4", "-t", "2"];
    let shown = result_of(&plan);
    let rungs = shown["ladder"].as_array().expect("rungs").clone();
    for rung in &rungs {
        assert_keys(
            rung,
            &["keep", "precision", "planned_private_bytes", "predicted_tokens_per_s", "chosen"],
        );
    }
    let bytes = |rung: &serde_json::Value| rung["planned_private_bytes"].as_u64().expect("bytes");
    let rate = |rung: &serde_json::Value| rung["predicted_tokens_per_s"].as_f64().expect("a rate");
    assert!(rungs.is_sorted_by_key(bytes), "{rungs:?}");
    // Keeping more in f32 is never slower; the model is so small that everything fits by default.
    let exact: Vec<_> = rungs.iter().filter(|r| r["precision"] == "f32").collect();
    assert!(exact.is_sorted_by(|a, b| rate(a) <= rate(b)), "{exact:?}");
    assert_eq!((&exact[0]["keep"], &exact[exact.len() - 1]["keep"]), (&"inputs".into(), &"all".into()));
    let chosen: Vec<_> = rungs.iter().filter(|r| r["chosen"] == true).collect();
    assert!(chosen.len() == 1 && chosen[0]["keep"] == "all", "{chosen:?}");
    assert_eq!(chosen[0]["planned_private_bytes"], shown["planned_private_bytes"]);

    // A budget in between chooses what fits; a level that doesn't fit is refused with a remedy.
    let (least, most) = (bytes(exact[0]), bytes(exact[exact.len() - 1]));
    let budget = ((least + most) / 2).to_string();
    let bounded = [&plan[..], &["--memory-budget", &budget, "--no-calibration"]].concat();
    let within = result_of(&bounded);
    let chosen = within["planned_private_bytes"].as_u64().expect("bytes");
    assert!(chosen > least && chosen <= (least + most) / 2, "{chosen}");
    assert!(within["ladder"][0]["predicted_tokens_per_s"].is_null());
    let refused = engraft(&[&bounded[..], &["--keep", "all"]].concat());
    assert_eq!(refused.status.code(), Some(3));
    assert!(stderr(&refused).contains("--keep auto fits"), "{}", stderr(&refused));
    let halved =
        result_of(&[&plan[..], &["--keep", "all", "--keep-precision", "bf16", "--no-calibration"]].concat());
    let halved = halved["planned_private_bytes"].as_u64().expect("bytes");
    assert!(halved > least && halved < most, "{least} < {halved} < {most}");
    assert_refused(&["plan", "-m", &model, "--keep", "much"], 2, "usage", &["--keep"]);
}

#[test]
fn the_bench_measures_the_built_in_model() {
    let shown = result_of(&["bench", "-t", "2"]);
    for key in ["train_tokens_per_s", "prefill_tokens_per_s", "decode_tokens_per_s"] {
        assert!(shown[key].as_f64() > Some(0.0), "{shown}");
    }
    let shares = shown["shares"].as_object().expect("shares");
    let sum: f64 = shares.values().filter_map(serde_json::Value::as_f64).sum();
    assert!((0.3..=1.01).contains(&sum), "{shares:?}");
}

#[test]
#[cfg(unix)]
fn an_interrupted_run_saves_and_exits_with_130() {
    let folder = tempfile::tempdir().expect("a folder");
    interrupted(folder.path(), "lora", "adapter.engraft");
    // A finished model stays, whatever happens to the next run.
    let valid = folder.path().join("out/model.gguf");
    std::fs::write(&valid, "a finished one").expect("writing");
    let out = interrupted(folder.path(), "full", "stopped.gguf");
    assert_eq!(std::fs::read_to_string(&valid).expect("reading"), "a finished one");
    let stopped = out.join("stopped.gguf").display().to_string();
    result_of(&["generate", "-m", &stopped, "-p", "a", "-n", "1"]);
}

/// Runs a training that is stopped once it has begun; returns its folder, which then has `file`.
#[cfg(unix)]
fn interrupted(folder: &Path, kind: &str, file: &str) -> std::path::PathBuf {
    let out = folder.join("out");
    let _ = std::fs::remove_file(out.join("metrics.jsonl"));
    let mut child = program()
        .args([
            "train",
            "-m",
            &seedling(),
            "--data",
            &shipped("demo/private_train.jsonl"),
            "--iters",
            "1000000",
        ])
        .args(["--overwrite-checkpoints", "--fine-tune-type", kind, "--save-every", "0", "--json"])
        .arg("--adapter-path")
        .arg(&out)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("starting");
    let metrics = out.join("metrics.jsonl");
    let begun = || std::fs::read_to_string(&metrics).is_ok_and(|text| text.contains("train_loss"));
    for _ in 0..600 {
        if begun() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill");
    assert!(killed.success());
    assert_eq!(child.wait().expect("an end").code(), Some(130));
    assert!(out.join(file).is_file());
    out
}

#[test]
fn settings_that_do_not_suit_the_model_are_refused_with_2() {
    let model = seedling();
    let generate = ["generate", "-m", &model, "-p", "a"];
    assert_refused(&[&generate[..], &["-c", "100000"]].concat(), 2, "usage", &["--ctx-size", "256"]);
    assert_refused(&["generate", "-m", &model, "-p", ""], 2, "usage", &["empty"]);
    assert_refused(&["plan", "-m", &model, "--num-layers", "9"], 2, "usage", &["--num-layers", "4"]);
    let isa = if cfg!(target_arch = "aarch64") { "avx2" } else { "neon" };
    assert_refused(&[&generate[..], &["--isa", isa]].concat(), 2, "usage", &["--isa", "scalar"]);
}
