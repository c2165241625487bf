//! The everyday verbs: chat, checking rows, and the self-test.

use std::io::Write as _;
use std::process::Stdio;

use super::{assert_refused, engraft, program, result_of, seedling, stderr, stdout};

/// Chats line by line; returns the JSON of each answer, and stderr.
fn talk(arguments: &[&str], lines: &str) -> (Vec<serde_json::Value>, String) {
    let mut child = program()
        .args([
            "chat",
            "-m",
            &seedling(),
            "-t",
            "2",
            "--temp",
            "0",
            "-n",
            "16",
            "--no-digest-cache",
            "--json",
        ])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("running engraft");
    child.stdin.take().expect("a pipe").write_all(lines.as_bytes()).expect("room in the pipe");
    let output = child.wait_with_output().expect("its end");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let answers = stdout(&output);
    let answers =
        answers.lines().filter(|line| line.starts_with("{\"text\"") || line.contains("\"prompt_tokens\""));
    (answers.map(|line| serde_json::from_str(line).expect("JSON")).collect(), stderr(&output))
}

#[test]
fn a_conversation_goes_on_from_what_was_said_and_can_be_forgotten() {
    let (one, two) = ("turn on the kitchen light", "and the fan in the hall");
    let (answers, _) = talk(&[], &format!("{one}\n\n{two}\n/reset\n{one}\n{two}\n/exit\nnever read\n"));
    let texts: Vec<&str> = answers.iter().filter_map(|a| a["text"].as_str()).collect();
    assert_eq!(texts.len(), 4, "{answers:?}");
    assert!(!texts[0].is_empty());
    // The same again, although the cache still holds the first conversation.
    assert_eq!(texts[..2], texts[2..]);
    let prompts: Vec<u64> = answers.iter().filter_map(|a| a["prompt_tokens"].as_u64()).collect();
    assert!(prompts[1] > prompts[0] && prompts[2] == prompts[0], "{prompts:?}");
    // The answer of `generate` to the same message.
    let model = seedling();
    let alone = result_of(&[
        "generate",
        "-m",
        &model,
        "-p",
        one,
        "--chat",
        "-t",
        "2",
        "--temp",
        "0",
        "-n",
        "16",
        "--no-digest-cache",
    ]);
    assert_eq!(alone["text"], texts[0]);
}

#[test]
fn a_message_without_room_is_told_of_and_forgotten() {
    let long = "turn on the light ".repeat(30);
    let (answers, told) = talk(&["-c", "40"], &format!("{long}\nturn on the light\n"));
    assert_eq!(answers.len(), 1, "{told}");
    assert!(told.contains("the context 40") && told.contains("/reset"), "{told}");
    assert_refused(&["chat", "-m", &seedling(), "-c", "9999"], 2, "usage", &["--ctx-size 9999"]);
}

#[test]
fn rows_are_looked_at_as_training_reads_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let rows: String = (0..20)
        .map(|i| format!("{{\"prompt\": \"light {i}\", \"completion\": \"on {i}\"}}\n"))
        .chain(["{\"prompt\": 7}\n".to_string()])
        .collect();
    std::fs::write(folder.path().join("train.jsonl"), rows).expect("room");
    let test = "{\"text\": \"one two three four five six seven eight nine ten\"}\n";
    std::fs::write(folder.path().join("test.jsonl"), test).expect("room");
    let (model, data) = (seedling(), folder.path().display().to_string());
    let check = ["data", "check", "-m", &model, "--data", &data, "-c", "24"];
    let found = result_of(&check);
    let parts = found["parts"].as_array().expect("parts");
    let [train, valid, held] = &parts[..] else { panic!("{found}") };
    assert_eq!((train["rows"].as_u64(), valid["rows"].as_u64()), (Some(18), Some(2)), "{found}");
    assert_eq!(
        (train["format"].as_str(), held["format"].as_str()),
        (Some("prompt and completion"), Some("text"))
    );
    assert_eq!((&train["skipped"], &held["rows"]), (&1.into(), &1.into()), "{found}");
    let count = |field: &str| train[field].as_u64().expect("a number");
    assert!(count("targets") > 0 && count("targets") < count("tokens"), "{found}");
    assert!(count("shortest") <= count("median") && count("median") <= count("longest"), "{found}");
    assert!(count("longest") <= 24, "{found}");

    // Only prompts: the single token that a row keeps isn't a target.
    let bare = folder.path().join("bare.jsonl");
    std::fs::write(&bare, "{\"prompt\": 1}\n").expect("room");
    let bare = bare.display().to_string();
    assert_refused(&["data", "check", "-m", &model, "--data", &bare], 5, "bad_data", &["bare.jsonl"]);
    assert_refused(&["data", "check", "-m", &model], 2, "usage", &["--data"]);
}

#[test]
fn the_machine_tests_itself() {
    let found = result_of(&["selftest", "-t", "2"]);
    assert_eq!(found["passed"], true, "{found}");
    let checks = found["checks"].as_array().expect("checks");
    assert!(checks.len() > 16 && checks.iter().all(|check| check["passed"] == true), "{found}");
    let folder = tempfile::tempdir().expect("a folder");
    let broken = super::model_like(folder.path());
    assert_refused(&["selftest", "-m", &broken], 6, "corrupt", &["model.gguf"]);
}

#[test]
fn shells_and_man_get_every_verb() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let output = engraft(&["completions", shell]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let text = stdout(&output);
        assert!(text.contains("selftest") && text.contains("memory-budget"), "{shell}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let pages = folder.path().join("man1");
    let output = engraft(&["completions", "--man", &pages.display().to_string()]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let page = |name: &str| std::fs::read_to_string(pages.join(name)).expect("a page");
    assert!(page("engraft.1").contains("engraft\\-train(1)"));
    assert!(page("engraft-train.1").contains("memory\\-budget"));
    assert_eq!(engraft(&["completions"]).status.code(), Some(2));
}
