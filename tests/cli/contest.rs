//! `compare` and `adapt` as users see them: what they write, what they refuse, and what the store contains afterwards.

use std::path::Path;
use std::process::{Command, Stdio};

use engraft_runtime::gate::store::Store;
use engraft_runtime::gate::verdict::Verdict;
use engraft_runtime::storage::Disk;

use super::{assert_keys, assert_refused, engraft, last_line, program, result_of, seedling, shipped, stderr};

/// The keys of `compare --json`, whatever the decision.
const COMPARED: [&str; 6] = ["decision", "sentence", "losses", "accuracies", "folder", "seconds"];

/// The demo's private commands as a folder: forty for training, fifty for the decision.
fn commands(folder: &Path) -> String {
    let data = folder.join("data");
    std::fs::create_dir(&data).expect("a folder");
    for part in ["train", "test"] {
        let rows = shipped(&format!("demo/private_{part}.jsonl"));
        std::fs::copy(rows, data.join(format!("{part}.jsonl"))).expect("copying");
    }
    data.display().to_string()
}

/// A verb on the built-in model, with settings for its size, and everyday commands as what it must not forget.
fn contest<'a>(
    verb: &'a str,
    model: &'a str,
    data: &'a str,
    everyday: &'a str,
    more: &[&'a str],
) -> Vec<&'a str> {
    let usual = [verb, "-m", model, "--data", data, "-t", "2", "-b", "4", "-k", "3", "--resamples", "1000"];
    let kept = ["--no-built-in-retention", "--retention", everyday, "--samples", "1", "--protect", "off"];
    [&usual[..], &kept, more].concat()
}

/// Enough training to win.
const WINNING: [&str; 4] = ["--iters", "30", "-lr", "2e-3"];

fn loss_of(result: &serde_json::Value, arm: &str) -> f64 {
    let losses = result["losses"].as_array().expect("losses");
    losses.iter().find(|l| l[0] == arm).and_then(|l| l[1].as_f64()).expect("the arm's loss")
}

#[test]
fn a_comparison_writes_its_verdict_its_report_and_its_arms() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data, everyday) = (seedling(), commands(folder.path()), shipped("demo/generic_test.jsonl"));
    let out = folder.path().join("out");
    let place = out.display().to_string();
    let arms = ["--arms", "few-shot,lora,full", "--full-learning-rate", "1e-5", "--out", &place];
    let arms = [&arms[..], &["--retention-metric", "exact"]].concat();
    let result = result_of(&contest("compare", &model, &data, &everyday, &[&WINNING[..], &arms].concat()));
    assert_keys(&result, &[&COMPARED[..], &["arm"]].concat());
    assert_eq!((&result["decision"], &result["arm"]), (&"PROMOTE".into(), &"lora".into()), "{result}");
    assert_eq!(result["folder"], place.as_str());

    let read = |name: &str| std::fs::read_to_string(out.join(name)).expect(name);
    let verdict = Verdict::from_json(&read("verdict.json")).expect("a verdict");
    assert_eq!(
        (verdict.promoted(), verdict.sentence.as_str()),
        (Some("lora"), result["sentence"].as_str().expect("a sentence"))
    );
    let names: Vec<&str> = verdict.arms.iter().map(|a| a.name.as_str()).collect();
    assert_eq!(names, ["zero-shot", "3-shot", "lora", "full"]);
    let kept = verdict.arms[2].retention[0].retained.expect("everyday answers");
    assert!(kept.questions == 120 && kept.before > 0.9 && !kept.paired.worse, "{kept:?}");
    let page = read("report.html");
    assert!(page.contains("Promoted: lora") && page.contains("</html>"), "{}", &page[..200]);
    let report: serde_json::Value = serde_json::from_str(&read("report.json")).expect("JSON");
    assert_eq!((&report["title"], &report["verdict"]["arm"]), (&"compare".into(), &"lora".into()));

    // Each arm's files give the reported losses.
    let test = format!("{data}/test.jsonl");
    let eval = |more: &[&str]| {
        let words = ["eval", "--data", &test, "--valid-fraction", "0", "-c", "200", "-t", "2"];
        result_of(&[&words[..], more].concat())["nll"].as_f64().expect("a loss")
    };
    let adapter = out.join("lora/adapter.engraft").display().to_string();
    let full = out.join("full/model.gguf").display().to_string();
    for (arm, words) in [
        ("zero-shot", vec!["-m", &model]),
        ("lora", vec!["-m", &model, "--lora", &adapter]),
        ("full", vec!["-m", &full]),
    ] {
        let (found, told) = (eval(&words), loss_of(&result, arm));
        assert!((found - told).abs() < 0.02 * told.max(0.1), "{arm}: {found}, and {told} was told");
    }
    let generate = ["generate", "-m", &model, "--lora", &adapter, "-p", "it's cold in the cave", "--chat"];
    assert!(result_of(&[&generate[..], &["-n", "4"]].concat())["text"].is_string());
}

#[test]
fn wrong_comparisons_are_refused_with_a_remedy() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data, everyday) = (seedling(), commands(folder.path()), shipped("demo/generic_test.jsonl"));
    let taken = folder.path().join("taken").display().to_string();
    std::fs::write(&taken, "x").expect("writing");
    let store = folder.path().join("store").display().to_string();
    assert_refused(&["compare", "-m", &model], 2, "usage", &["--data"]);
    assert_refused(&["compare", "--data", &data], 2, "usage", &["--model"]);
    assert_refused(
        &["compare", "-m", &model, "--data", &taken, "--out", &taken],
        2,
        "usage",
        &["--out", "folder"],
    );
    let with = |verb, more: &[&'static str]| {
        contest(verb, &model, &data, &everyday, more).into_iter().map(str::to_string).collect::<Vec<_>>()
    };
    let refused = |verb, more: &[&'static str], code, kind: &str, words: &[&str]| {
        let arguments = with(verb, more);
        assert_refused(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), code, kind, words);
    };
    refused("compare", &["--arms", "few-shot,nonsense"], 2, "usage", &["--arms", "nonsense"]);
    refused("compare", &["--iters", "3", "--tokens", "50"], 2, "usage", &["--iters", "--tokens"]);
    refused("compare", &["--task", "gsm8k", "--metric", "exact"], 2, "usage", &["--metric"]);
    refused("compare", &["--seeds", "1,1"], 2, "usage", &["--seeds"]);
    refused("compare", &["--level", "2"], 2, "usage", &["alpha"]);
    refused("compare", &["--task", "gsm8k"], 5, "bad_data", &["train.jsonl"]);
    refused("adapt", &["--iters", "3"], 2, "usage", &["--store"]);
    let many =
        [&["compare"], &["-m", &model, "--data", &data][..], &["-k", "64", "--arms", "few-shot"]].concat();
    assert_refused(&many, 5, "bad_data", &["--shots", "64"]);
    let whole = ["adapt", "-m", &model, "--data", &data, "--store", &store, "--arms", "full"];
    assert_refused(&whole, 2, "usage", &["--arms full", "compare"]);
    assert!(!Path::new(&store).exists(), "nothing is made for what is refused");
    let little = ["--memory-budget", "100K"];
    let compare = [&["compare", "-m", &model, "--data", &data][..], &little, &["--arms", "lora"]].concat();
    assert_refused(&compare, 3, "does_not_fit", &["lora"]);
    let adapt =
        [&["adapt", "-m", &model, "--data", &data, "--store", &store][..], &little, &["--arms", "lora"]];
    assert_refused(&adapt.concat(), 3, "does_not_fit", &["lora"]);
}

/// The active generation of a store.
fn active(store: &str) -> serde_json::Value {
    let listed = result_of(&["adapter", "ls", "--store", store]);
    assert_eq!(listed["unknown"], serde_json::json!([]), "all of the folder is the store's own");
    listed["active"].clone()
}

#[test]
fn what_wins_is_active_and_what_loses_changes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data, everyday) = (seedling(), commands(folder.path()), shipped("demo/generic_test.jsonl"));
    let store = folder.path().join("store").display().to_string();
    let settings = folder.path().join("settings.toml");
    std::fs::write(
        &settings,
        "iters = 30\nlearning-rate = 2e-3\nrank = 4\narms = [\"few-shot\", \"lora\"]\n",
    )
    .expect("writing");
    let file = settings.display().to_string();
    let adapt = |data: &str, more: &[&str]| {
        let words = contest("adapt", &model, data, &everyday, &["--store", &store, "--json"]);
        engraft(&[&words[..], more].concat())
    };
    let output = adapt(&data, &["--config", &file]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let result = last_line(&output);
    assert_keys(&result, &[&COMPARED[..], &["arm", "generation"]].concat());
    assert_eq!((&result["generation"], &result["arm"]), (&1.into(), &"lora".into()), "{result}");
    for words in ["LoRA, rank 4", "Promoted: lora", "generation 1 is active", "Use it: engraft generate -m "]
    {
        assert!(stderr(&output).contains(words), "{words}: {}", stderr(&output));
    }
    assert_eq!(active(&store), 1);
    let test = format!("{data}/test.jsonl");
    let eval = ["eval", "-m", &model, "--data", &test, "--valid-fraction", "0", "-c", "200", "-t", "2"];
    let nll = result_of(&[&eval[..], &["--store", &store]].concat())["nll"].as_f64().expect("a loss");
    assert!((nll - loss_of(&result, "lora")).abs() < 0.01, "{nll}: {result}");

    assert_leaks_decide_nothing(folder.path(), &data, &store, &adapt);

    // Nor does a worse one replace it, though it beats the base; the same examples as before don't even beat that.
    let output = adapt(&data, &["--arms", "few-shot,lora", "--iters", "8", "-lr", "1e-3", "--rank", "2"]);
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    let result = last_line(&output);
    assert_eq!(
        (&result["decision"], &result["arm"]),
        (&"KEEP_ACTIVE".into(), &"generation 1".into()),
        "{result}"
    );
    assert!((loss_of(&result, "generation 1") - nll).abs() < 0.01, "{nll}: {result}");
    assert!(loss_of(&result, "lora") < loss_of(&result, "zero-shot"), "{result}");
    assert!(stderr(&output).contains("what is in use stays: lora"), "{}", stderr(&output));
    assert_eq!(active(&store), 1);
    assert_promotes_by_hand(&store, &model, &data, &everyday);

    // A second writer fails at once and not after its training.
    let opened = Store::open(&Disk, Path::new(&store)).expect("the store");
    let held = opened.writer().expect("the lock");
    let output = adapt(&data, &["--iters", "1000000"]);
    assert_eq!((output.status.code(), &last_line(&output)["error"]["kind"]), (Some(1), &"busy".into()));
    drop(held);
}

/// Held-out rows that are also training rows decide nothing: 4, and the active generation stays.
fn assert_leaks_decide_nothing(
    folder: &Path,
    data: &str,
    store: &str,
    adapt: &dyn Fn(&str, &[&str]) -> std::process::Output,
) {
    let leaky = folder.join("leaky");
    std::fs::create_dir(&leaky).expect("a folder");
    for part in ["train", "test"] {
        std::fs::copy(format!("{data}/train.jsonl"), leaky.join(format!("{part}.jsonl"))).expect("copying");
    }
    let output = adapt(&leaky.display().to_string(), &[&WINNING[..], &["--arms", "few-shot,lora"]].concat());
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    let result = last_line(&output);
    assert_eq!(
        (&result["decision"], &result["generation"]),
        (&"KEEP_ACTIVE".into(), &serde_json::Value::Null)
    );
    for words in
        ["leak: held-out row test.jsonl:1 equals train.jsonl:1", "what is in use stays", "Split the data"]
    {
        assert!(stderr(&output).contains(words), "{words}: {}", stderr(&output));
    }
    assert_eq!(active(store), 1);
    let last = Verdict::from_json(
        &std::fs::read_to_string(Path::new(store).join("last/verdict.json")).expect("reading"),
    );
    assert_eq!(last.expect("a verdict").leak_count, 40);
}

/// What the last run tried is there: the gate refuses it again, and its user's word is enough.
fn assert_promotes_by_hand(store: &str, model: &str, data: &str, everyday: &str) {
    let listed = result_of(&["adapter", "ls", "--store", store]);
    let tried = listed["generations"].as_array().and_then(|all| all.iter().find(|g| g["tried"] == true));
    let number = tried.expect("one that was tried")["generation"].to_string();
    let promote = ["adapter", "promote", &number, "--store", store, "-m", model];
    assert_refused(&promote, 2, "usage", &["--data", "--because"]);
    let rows = ["--data", data, "--retention", everyday, "--no-built-in-retention", "-t", "2", "-k", "3"];
    let output = engraft(&[&promote[..], &rows, &["--json"]].concat());
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("adapter isn't shown to do better than what is in use"),
        "{}",
        stderr(&output)
    );
    assert_eq!(active(store), 1);
    let back = ["adapter", "rollback", "--store", store, "--to", &number];
    assert_refused(&back, 2, "usage", &["tried"]);
    let promoted = result_of(&[&promote[..], &["--because", "it writes as we do"]].concat());
    assert_eq!(promoted["generation"], active(store));
    let shown = result_of(&["adapter", "show", "--store", store]);
    assert_eq!(shown["verdict_json"]["because"], "it writes as we do", "{shown}");
    // Better than that it is again what was in use before, and by the gate.
    let first = std::path::Path::new(store).join("generations/000001/adapter.engraft").display().to_string();
    let judged = ["adapter", "promote", &first, "--store", store, "-m", model];
    let again = result_of(&[&judged[..], &rows].concat());
    assert_eq!(again["generation"], active(store));
    assert_eq!(result_of(&["adapter", "rollback", "--store", store])["was"], again["generation"]);
    result_of(&["adapter", "rollback", "--store", store, "--to", "1"]);
}

#[test]
fn examples_that_win_go_before_every_prompt() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data, everyday) = (seedling(), commands(folder.path()), shipped("demo/generic_test.jsonl"));
    let store = folder.path().join("store").display().to_string();
    // Enough memory to score but not to train: the arms are left out, and prompting remains.
    let words = ["--store", &store, "--memory-budget", "6M", "--valid-fraction", "0.1"];
    let output = engraft(&[&contest("adapt", &model, &data, &everyday, &words)[..], &["--json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("left out: lora: "), "{}", stderr(&output));
    let result = last_line(&output);
    assert_eq!((&result["decision"], &result["k"]), (&"KEEP_PROMPTING".into(), &3.into()), "{result}");
    assert_eq!((&result["generation"], active(&store)), (&1.into(), 1.into()));
    let shown = result_of(&["adapter", "show", "--store", &store]);
    assert_eq!(shown["few_shot"].as_array().map(Vec::len), Some(6), "{shown}");
    // They are in use now, and no better than themselves.
    let output = engraft(&[&contest("adapt", &model, &data, &everyday, &words)[..], &["--json"]].concat());
    let again = last_line(&output);
    assert_eq!((output.status.code(), &again["decision"]), (Some(4), &"KEEP_ACTIVE".into()), "{again}");
    assert_eq!(loss_of(&again, "generation 1"), loss_of(&again, "3-shot"));
    // With less, not even that can be measured; the active generation stays.
    let less = contest("adapt", &model, &data, &everyday, &["--store", &store, "--memory-budget", "100K"]);
    assert_refused(&less, 3, "does_not_fit", &["zero-shot", "--memory-budget"]);
    assert_eq!(active(&store), 1);
    let generate = ["generate", "-m", &model, "-p", "turn on the light", "--chat", "-n", "2", "-t", "2"];
    let tokens =
        |more: &[&str]| result_of(&[&generate[..], more].concat())["prompt_tokens"].as_u64().expect("tokens");
    assert!(tokens(&["--store", &store]) > tokens(&[]) + 30);
}

#[test]
#[cfg(unix)]
fn a_stop_promotes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data, everyday) = (seedling(), commands(folder.path()), shipped("demo/generic_test.jsonl"));
    let store = folder.path().join("store").display().to_string();
    let told = folder.path().join("stderr.txt");
    let long = ["--store", &store, "--iters", "1000000", "-lr", "1e-4", "--arms", "lora"];
    // Nothing was stopped yet.
    let resume = [&long[..], &["--resume"]].concat();
    let resume = contest("adapt", &model, &data, &everyday, &resume);
    assert_refused(&resume, 2, "usage", &["--resume", "leave it out"]);
    let first = contest("adapt", &model, &data, &everyday, &long);
    let said = interrupted(&first, &told, "validation loss");
    assert!(said.contains("nothing was promoted"), "{said}");
    assert_eq!(active(&store), serde_json::Value::Null);
    assert!(!Path::new(&store).join("last/verdict.json").exists());
    assert!(said.contains("Run the same command again"), "{said}");
    interrupted(&resume, &told, "continues after step");
}

/// Runs a command until it says something, and stops it with Ctrl-C's signal; returns what it told.
#[cfg(unix)]
fn interrupted(words: &[&str], told: &Path, until: &str) -> String {
    let out = std::fs::File::create(told).expect("a file");
    let mut child = program().args(words).stdout(Stdio::null()).stderr(out).spawn().expect("starting");
    let said = || std::fs::read_to_string(told).unwrap_or_default();
    for _ in 0..600 {
        if said().contains(until) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(said().contains(until), "{}", said());
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill");
    assert!(killed.success());
    assert_eq!(child.wait().expect("an end").code(), Some(130));
    said()
}

/// What `adapt` does when it is told nothing: it protects ordinary text, and holds answers against it, too.
#[test]
fn adapting_protects_ordinary_text() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data) = (seedling(), commands(folder.path()));
    let store = folder.path().join("store").display().to_string();
    let words =
        ["adapt", "-m", &model, "--data", &data, "-t", "2", "--iters", "40", "-k", "3", "--metric", "exact"];
    let output = engraft(&[&words[..], &["--resamples", "500", "--store", &store]].concat());
    let told = stderr(&output);
    assert!(output.status.code().is_some_and(|code| [0, 4].contains(&code)), "{told}");
    for words in ["protected directions", "lora: on built-in the loss", "lora: on everyday answers the loss"]
    {
        assert!(told.contains(words), "{words}: {told}");
    }
    assert_refused(
        &[&words[..], &["--store", &store, "--protect", "off", "--general-kl", "1"]].concat(),
        2,
        "usage",
        &["--general-kl"],
    );
}

#[test]
fn protection_that_could_not_hold_is_refused() {
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let train = ["train", "-m", &model, "--data", &data, "--protect", "general"];
    for (more, words) in [
        (&["--init", "eva"][..], &["--init", "--protect off"][..]),
        (&["--fine-tune-type", "dora"], &["magnitudes"]),
        (&["--fine-tune-type", "full"], &["--protect"]),
        (&["--protect-energy", "0"], &["--protect-energy"]),
    ] {
        assert_refused(&[&train[..], more].concat(), 2, "usage", words);
    }
    let missing = ["train", "-m", &model, "--data", &data, "--protect", "nowhere.jsonl"];
    assert_refused(&missing, 1, "io", &["--protect", "nowhere.jsonl"]);
}

#[test]
fn the_help_tells_the_defaults() {
    for verb in ["compare", "adapt"] {
        let help = super::stdout(&engraft(&[verb, "--help"]));
        let words = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for told in
            ["few-shot and lora]", "by a range test]", "the largest that fits]", "[default: 2e-5]", "-lr"]
        {
            assert!(words.contains(told), "{verb}: {told}: {help}");
        }
    }
}

#[test]
fn spellings_of_other_tools_are_understood() {
    let model = seedling();
    let generate = ["generate", "-m", &model, "-p", "turn on the light", "--temperature", "0"];
    for limit in ["--predict", "--max-tokens", "-n"] {
        let said = result_of(&[&generate[..], &[limit, "3"]].concat());
        assert!(said["tokens"].as_u64() <= Some(3), "{limit}: {said}");
    }
    for verb in ["train", "plan", "compare", "adapt"] {
        assert_refused(&[verb, "--lr", "0"], 2, "usage", &["--learning-rate"]);
    }
}

#[test]
fn flags_without_effect_are_refused() {
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let settings = tempfile::tempdir().expect("a folder");
    let file = settings.path().join("settings.toml").display().to_string();
    for (flag, value, other) in [
        ("replay-count", "5", "--replay base"),
        ("replay-tokens", "5", "--replay base"),
        ("kl-direction", "reverse", "--kl-weight"),
        ("eva-batches", "3", "--init eva"),
        ("wait", "1s", "--only-when"),
    ] {
        let train = ["train", "-m", &model, "--data", &data];
        let long = format!("--{flag}");
        assert_refused(&[&train[..], &[long.as_str(), value]].concat(), 2, "usage", &[long.as_str(), other]);
        std::fs::write(&file, format!("{flag} = \"{value}\"")).expect("writing");
        assert_refused(&[&train[..], &["--config", &file]].concat(), 2, "usage", &[long.as_str(), other]);
    }
    let weighed = ["plan", "-m", &model, "--no-calibration", "--config", &file, "--kl-weight", "0"];
    std::fs::write(&file, "kl-direction = \"reverse\"").expect("writing");
    assert_eq!(engraft(&weighed).status.code(), Some(0), "a weight of 0 is one");
}
