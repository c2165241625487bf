//! What the README and the guides tell people to type. Every block that is fenced as `sh` runs here, in the order of its
//! page and in one folder for each page; only trainings are cut short.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use engraft_runtime::gate::verdict::Verdict;

/// What a page's folder calls the real model.
const MODEL: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// Rows that pages call `letters`: running text.
const LETTERS: usize = 60;
/// What `--minutes` is cut to, and `--iters`.
const MINUTES: &str = "0.1";
const STEPS: u32 = 40;
/// What a block may be fenced as that nobody runs: it shows files, what was printed, or needs a network.
const SHOWN: [&str; 6] = ["console", "json", "toml", "text", "c", "rust"];

/// A block of commands.
#[derive(Debug, PartialEq)]
struct Block {
    line: usize,
    commands: String,
    exit_codes: Vec<i32>,
}

/// The blocks that run.
///
/// # Errors
/// Names the line of a block whose fence doesn't say what it is.
fn blocks(page: &str) -> Result<Vec<Block>, String> {
    let (mut found, mut open, mut exit_codes) = (Vec::new(), None::<Option<Block>>, vec![0]);
    for (number, line) in (1..).zip(page.lines()) {
        let fence = line.trim_start().strip_prefix("```");
        match (&mut open, fence) {
            (None, Some("sh")) => {
                let exit_codes = std::mem::replace(&mut exit_codes, vec![0]);
                open = Some(Some(Block { line: number, commands: String::new(), exit_codes }));
            }
            (None, Some(tag)) if SHOWN.contains(&tag) => open = Some(None),
            (None, Some(tag)) => return Err(format!("line {number}: a block of {tag:?}: sh, or {SHOWN:?}")),
            (Some(block), Some(_)) => {
                found.extend(block.take());
                open = None;
            }
            (Some(Some(block)), None) => block.commands += &format!("{line}\n"),
            (Some(None), None) => {}
            (None, None) => {
                if let Some(codes) = line.strip_prefix("<!-- exits with ") {
                    let codes = codes.strip_suffix(" -->").unwrap_or(codes).split(" or ").map(str::parse);
                    exit_codes =
                        codes.collect::<Result<_, _>>().map_err(|e| format!("line {number}: {e}"))?;
                }
            }
        }
    }
    match open {
        None => Ok(found),
        Some(_) => Err("the last block isn't closed".to_string()),
    }
}

/// The same commands with trainings of a few seconds.
fn cut_short(commands: &str) -> String {
    let (mut short, mut flag) = (String::new(), "");
    for part in commands.split_inclusive(char::is_whitespace) {
        let word = part.trim_end();
        short += &match (flag, word.parse::<u32>()) {
            ("--minutes", Ok(_)) => part.replace(word, MINUTES),
            ("--iters" | "--epochs", Ok(steps)) => part.replace(word, &steps.min(STEPS).to_string()),
            _ => part.to_string(),
        };
        flag = word;
    }
    short
}

fn pages() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let guide = std::fs::read_dir(root.join("targets/cli/guide")).expect("the guides");
    let mut pages: Vec<_> = guide.map(|entry| entry.expect("a guide").path()).collect();
    pages.push(root.join("README.md"));
    pages.sort();
    pages
}

/// What pages take for granted.
fn lay_out(folder: &Path, model: &Path) {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    for (what, name) in [(model, MODEL), (&examples, "examples")] {
        std::os::unix::fs::symlink(what, folder.join(name)).expect("a link");
    }
    let commands = include_str!("../../targets/cli/demo/private_train.jsonl");
    let letter = |i: usize| {
        let day = i % 28 + 1;
        serde_json::json!({ "text": format!(
            "Vienna, the {day}th. My dear friend, your letter number {i} reached me only today, and I thank you for \
             it. The copyist has {day} pages left, and the quartet will be ready before the month is out."
        ) })
    };
    let letters =
        |which: std::ops::Range<usize>| which.map(|i| format!("{}\n", letter(i))).collect::<String>();
    for (name, rows) in [("commands", commands), ("letters", &letters(0..LETTERS))] {
        std::fs::create_dir(folder.join(name)).expect("a folder");
        std::fs::write(folder.join(name).join("train.jsonl"), rows).expect("rows");
    }
}

#[test]
fn every_block_says_what_it_is() {
    let all = pages();
    assert!(all.len() >= 6, "{all:?}");
    for page in all {
        let text = std::fs::read_to_string(&page).expect("a page");
        blocks(&text).unwrap_or_else(|why| panic!("{}: {why}", page.display()));
    }
}

#[test]
fn blocks_are_found_and_bad_ones_are_named() {
    let page =
        "a\n```sh\none\ntwo\n```\n<!-- exits with 3 or 4 -->\n```sh\nthree\n```\n```text\nshown\n```\n";
    let block = |line, commands: &str, codes: &[i32]| Block {
        line,
        commands: commands.into(),
        exit_codes: codes.to_vec(),
    };
    assert_eq!(blocks(page), Ok(vec![block(2, "one\ntwo\n", &[0]), block(7, "three\n", &[3, 4])]));
    assert!(blocks("```\nno tag\n```\n").unwrap_err().contains("line 1"));
    assert!(blocks("```sh\nnever closed\n").is_err());
    assert!(blocks("<!-- exits with pride -->\n").is_err());
    let typed = "engraft adapt --minutes 10 \\\n    --iters 300\nengraft train --iters 5 -p 300\n";
    let run = "engraft adapt --minutes 0.1 \\\n    --iters 40\nengraft train --iters 5 -p 300\n";
    assert_eq!(cut_short(typed), run);
}

fn real_model() -> PathBuf {
    PathBuf::from(std::env::var_os("ENGRAFT_MODEL").expect("set ENGRAFT_MODEL to the model's file"))
}

#[test]
#[ignore = "needs ENGRAFT_MODEL"]
fn the_rows_in_examples_teach_the_real_model() {
    let (folder, model) = (tempfile::tempdir().expect("a folder"), real_model().display().to_string());
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (data, store) = (root.join("examples/data"), folder.path().join("home").display().to_string());
    let data = data.display().to_string();
    let adapt = ["adapt", "-m", &model, "--data", &data, "--metric", "exact", "--store", &store];
    let output = super::engraft(&[&adapt[..], &["--iters", "100"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", super::stderr(&output));
    let verdict = std::fs::read_to_string(folder.path().join("home/last/verdict.json")).expect("a verdict");
    let verdict = Verdict::from_json(&verdict).expect("a verdict");
    let share =
        |arm: &str| verdict.arms.iter().find(|a| a.name == arm).and_then(|a| a.accuracy).expect("answers");
    assert_eq!(verdict.promoted(), Some("lora"), "{}", verdict.sentence);
    let (lora, shots, alone) = (share("lora"), share("5-shot"), share("zero-shot"));
    assert!(lora >= 0.6 && lora > shots + 0.15 && lora > alone + 0.15, "{lora}, {shots}, {alone}");
    let ask =
        ["generate", "-m", &model, "--store", &store, "-p", "The brake lever is loose, can you mend it?"];
    let said = super::result_of(&ask);
    assert_eq!(said["text"].as_str().map(str::trim), Some("repair"), "{said}");
}

#[test]
#[ignore = "needs ENGRAFT_MODEL"]
fn commands_of_the_readme_and_the_guides_run_on_the_real_model() {
    let model = real_model();
    let programs = Path::new(env!("CARGO_BIN_EXE_engraft")).parent().expect("a folder");
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default());
    let mut ran = 0;
    for page in pages() {
        let folder = tempfile::tempdir().expect("a folder");
        let is_readme = page.ends_with("README.md") && !page.ends_with("guide/README.md");
        lay_out(folder.path(), &model);
        let text = std::fs::read_to_string(&page).expect("a page");
        for block in blocks(&text).expect("blocks") {
            let (mut command, started) = (Command::new("bash"), Instant::now());
            let commands = cut_short(&block.commands);
            command.args(["-euo", "pipefail", "-c", &commands]).current_dir(folder.path());
            command.env("PATH", &path).env("ENGRAFT_CACHE_DIR", folder.path().join("cache"));
            let output = command.stdin(std::process::Stdio::null()).output().expect("running bash");
            let place = format!("{}:{}", page.display(), block.line);
            let said = super::stderr(&output);
            let code = output.status.code();
            let expected = code.is_some_and(|code| block.exit_codes.contains(&code));
            assert!(expected, "{place}: {code:?}: {commands}{said}");
            eprintln!("{place}: {:.1} s", started.elapsed().as_secs_f64());
            ran += 1;
        }
        // Whatever the verdict is, there was one.
        assert!(!is_readme || folder.path().join("home/last/verdict.json").is_file(), "adapt judged nothing");
    }
    assert!(ran >= 20, "only {ran} blocks");
}
