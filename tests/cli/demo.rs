//! The demo: an adapter passes the gate, full fine-tuning on the same examples doesn't, and no file is left.

use std::path::Path;
use std::process::Output;

use engraft_runtime::gate::store::{ContentKind, Store, VERDICT_FILE};
use engraft_runtime::gate::verdict::Verdict;
use engraft_runtime::storage::Disk;

use super::{assert_keys, last_line, program, stderr, stdout};

/// Runs the demo with its own folder for temporary files.
fn demo(temporary: &Path, arguments: &[&str]) -> Output {
    let mut command = program();
    for key in ["TMPDIR", "TMP", "TEMP"] {
        command.env(key, temporary);
    }
    command.arg("demo").args(arguments).output().expect("running engraft")
}

fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).expect("a folder").next().is_none()
}

#[test]
fn the_demo_promotes_the_adapter_and_refuses_full_fine_tuning() {
    let (temporary, kept) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let place = kept.path().join("store");
    // Less than half the usual steps: fewer exact answers, the same verdict.
    let output =
        demo(temporary.path(), &["--iters", "120", "--store", &place.display().to_string(), "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let shown = last_line(&output);
    assert_keys(
        &shown,
        &[
            "before_exact",
            "after_exact",
            "retention_before",
            "retention_after",
            "decision",
            "arm",
            "sentence",
            "few_shot_exact",
            "forgetting",
            "full",
            "seconds",
        ],
    );
    let number = |value: &serde_json::Value| value.as_f64().unwrap_or_else(|| panic!("{value} in {shown}"));
    assert_eq!((&shown["decision"], &shown["arm"]), (&"PROMOTE".into(), &"lora".into()));
    assert!(number(&shown["before_exact"]) < 0.1 && number(&shown["few_shot_exact"]) < 0.1, "{shown}");
    assert!(number(&shown["after_exact"]) >= 0.3, "{shown}");
    assert!(number(&shown["retention_after"]) >= number(&shown["retention_before"]) - 0.01, "{shown}");
    assert!(number(&shown["forgetting"]["delta_nll"]) < 0.01, "{shown}");
    let full = &shown["full"];
    assert_eq!(full["eligible"], false, "{shown}");
    assert!(number(&full["after_exact"]) >= 0.8, "it learns the task, too: {shown}");
    assert!(number(&full["delta_nll"]) > 0.03 && number(&full["retention_after"]) < 0.9, "{shown}");
    let text = stdout(&output);
    for words in [
        "Promoted: the trained adapter answers",
        "Refused: full fine-tuning",
        "above 0.03",
        "with everyday words",
        "after: ",
        "Use it: engraft generate",
        "engraft adapt -m MODEL.gguf",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert!(is_empty(temporary.path()), "something is left");

    let store = Store::open(&Disk, &place).expect("a store");
    let active = store.active().expect("whole").expect("a generation").generation;
    assert_eq!((active.number, active.content), (1, ContentKind::Adapter));
    let verdict =
        std::fs::read_to_string(place.join("generations/000001").join(VERDICT_FILE)).expect("a text");
    assert_eq!(Verdict::from_json(&verdict).expect("a verdict").promoted(), Some("lora"));
}

#[test]
fn a_demo_that_hardly_trains_leaves_nothing_either() {
    let temporary = tempfile::tempdir().expect("a folder");
    let output = demo(temporary.path(), &["--iters", "1", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let shown = last_line(&output);
    assert_eq!(shown["after_exact"], 0.0, "{shown}");
    assert_eq!(
        shown["full"]["retention_after"], shown["retention_before"],
        "one step harms nothing: {shown}"
    );
    assert!(!stdout(&output).contains("is active"), "{}", stdout(&output));
    assert!(is_empty(temporary.path()), "something is left");
}
