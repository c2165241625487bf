//! A user's text stays where the user put it. It never appears in messages, logs, records or reports, and adapters and
//! checkpoints contain only what was learned from it.
#![cfg(unix)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Output;

use super::{engraft, seedling, stderr, stdout};

/// A word that none of our messages contains, put into good and bad rows.
const MARKER: &str = "zyxwvsecret";

/// Training rows with the marker in every value.
fn good_rows() -> String {
    let rows = (0..40).map(|i| {
        format!("{{\"prompt\":\"the {MARKER} code {i}\",\"completion\":\"{MARKER} answers {}\"}}\n", i * 7)
    });
    rows.collect()
}

/// Rows with every kind of fault, with the marker close to it.
fn bad_rows() -> String {
    let rows = [
        format!("{{\"prompt\":\"{MARKER}\",\"completion\":7}}"),
        format!("{{\"prompt\":\"{MARKER}\"}}"),
        format!("{{\"prompt\":\"{MARKER}\",\"completion\":\"\"}}"),
        format!("{{\"prompt\":\"{MARKER}"),
        format!("not JSON {MARKER}"),
        format!("\"{MARKER}\""),
        format!("[\"{MARKER}\"]"),
        format!("{{\"messages\":[{{\"role\":\"{MARKER}\",\"content\":\"{MARKER}\"}}]}}"),
        format!("{{\"messages\":[{{\"role\":\"user\",\"content\":[\"{MARKER}\"]}}]}}"),
        format!("{{\"messages\":\"{MARKER}\"}}"),
        format!("{{\"text\":[\"{MARKER}\"]}}"),
        format!("{{\"prompt\":\"\\ud800{MARKER}\",\"completion\":\"x\"}}"),
    ];
    rows.join("\n") + "\n"
}

/// The places with the marker as plain UTF-8 or UTF-16.
fn places(folder: &Path, found: &mut Vec<PathBuf>, looked: &mut usize) {
    let wide: Vec<u8> = MARKER.bytes().flat_map(|b| [b, 0]).collect();
    for entry in std::fs::read_dir(folder).expect("listing") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            places(&path, found, looked);
            continue;
        }
        let bytes = std::fs::read(&path).expect("reading");
        *looked += 1;
        let holds = |word: &[u8]| bytes.windows(word.len()).any(|w| w.eq_ignore_ascii_case(word));
        if holds(MARKER.as_bytes()) || holds(&wide) {
            found.push(path);
        }
    }
}

#[track_caller]
fn assert_silent(output: &Output, what: &str) {
    let (out, err) = (stdout(output), stderr(output));
    for text in [&out, &err] {
        assert!(!text.to_lowercase().contains(MARKER), "{what}: {text}");
    }
    assert!(!err.contains("panicked"), "{what}: {err}");
}

#[test]
fn no_message_log_or_file_holds_a_users_text() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    std::fs::create_dir(&data).expect("a folder");
    std::fs::write(data.join("train.jsonl"), good_rows() + &bad_rows()).expect("writing");
    let bad = folder.path().join("data/bad.jsonl");
    std::fs::write(&bad, bad_rows()).expect("writing");
    let out = folder.path().join("out");
    std::fs::create_dir(&out).expect("a folder");
    let (model, path) = (seedling(), data.display().to_string());
    let at = |name: &str| out.join(name).display().to_string();

    let trace = "-vvv";
    let train =
        ["train", "-m", &model, "--data", &path, "--iters", "12", "--save-every", "4", trace, "--json"];
    let trained = engraft(&[&train[..], &["--adapter-path", &at("adapter")]].concat());
    assert_eq!(trained.status.code(), Some(0), "{}", stderr(&trained));
    assert_silent(&trained, "train");
    // The message has the line and the key, so that the user can find the row.
    let err = stderr(&trained);
    assert!(err.contains("skipped") && err.contains("train.jsonl:41") && err.contains("completion"), "{err}");

    let bad = bad.display().to_string();
    let refused = engraft(&["train", "-m", &model, "--data", &bad, "--adapter-path", &at("none"), trace]);
    assert_eq!(refused.status.code(), Some(5), "{}", stderr(&refused));
    assert_silent(&refused, "nothing but bad rows");
    let cut = at("cut");
    let short = [&train[..], &["--adapter-path", &cut, "--max-seq-length", "4"]].concat();
    assert_silent(&engraft(&short), "rows cut to nothing");

    // Without samples, because a report shows those on purpose.
    let compare = ["compare", "-m", &model, "--data", &path, "--arms", "few-shot,lora", "--iters", "4"];
    let compare =
        [&compare[..], &["--samples", "0", "--shots", "1", "--answer-tokens", "4", "--metric", "exact"]];
    let compared = engraft(&[&compare.concat()[..], &["--out", &at("compared"), trace, "--json"]].concat());
    assert_eq!(compared.status.code(), Some(0), "{}", stderr(&compared));
    assert_silent(&compared, "compare");

    let (mut found, mut looked) = (Vec::new(), 0);
    places(&out, &mut found, &mut looked);
    assert!(found.is_empty(), "in the clear: {found:?}");
    assert!(looked >= 5, "only {looked} files");
    eprintln!("{looked} files and 4 runs' output without the marker");

    let mode = |file: &Path| std::fs::metadata(file).expect("a file").permissions().mode() & 0o777;
    assert_eq!(mode(&out.join("adapter")), 0o700);
    for name in ["adapter.engraft", "metrics.jsonl", "lock"] {
        assert_eq!(mode(&out.join("adapter").join(name)), 0o600, "{name}");
    }
}

#[test]
fn the_search_finds_what_is_there() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("a"), format!("..{}..", MARKER.to_uppercase())).expect("writing");
    let wide: Vec<u8> = MARKER.encode_utf16().flat_map(u16::to_le_bytes).collect();
    std::fs::write(folder.path().join("b"), wide).expect("writing");
    std::fs::write(folder.path().join("c"), "nothing").expect("writing");
    let (mut found, mut looked) = (Vec::new(), 0);
    places(folder.path(), &mut found, &mut looked);
    assert_eq!((found.len(), looked), (2, 3));
}
