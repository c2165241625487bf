//! The runtime's rooms and the arrows between them: compares its `use` lines with ARCHITECTURE.md.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::code::code_only;
use super::{files, read};

/// Each room with those that it uses.
type Arrows = BTreeMap<String, BTreeSet<String>>;

#[test]
fn rooms_use_what_the_architecture_says_and_nothing_points_back() {
    let sources: Vec<_> =
        files().into_iter().filter(|f| is_source(f)).map(|f| (f.clone(), read(&f))).collect();
    assert!(sources.len() > 100, "the runtime's sources were not found");
    let told = read(Path::new("ARCHITECTURE.md"));
    assert_eq!(compare(&found(&sources), &told), Vec::<String>::new());
}

#[test]
fn wrong_arrows_are_found() {
    let source = |path: &str, text: &str| (PathBuf::from("runtime/src").join(path), text.to_string());
    let rooms = [
        source(
            "plan/mod.rs",
            "use crate::model::{self, Shape};\nuse crate::plan::room;\n// crate::train::step\n",
        ),
        source("model.rs", "#[cfg(test)]\nmod tests {\n    use crate::plan::Plan;\n}\n"),
        source("lib.rs", "pub use crate::plan::Plan;"),
    ];
    let told = |lines: &str| format!("{MARKER}\n\n```text\n{lines}```\n");
    let right = told("plan   model\nmodel\n");
    assert_eq!(compare(&found(&rooms), &right), Vec::<String>::new(), "the control");
    for (lines, finding) in [
        ("plan\nmodel\n", "plan uses model, which ARCHITECTURE.md doesn't say"),
        ("plan   model\nmodel   plan\n", "model doesn't use plan"),
        ("model\nplan   model\n", "plan uses model, which stands above it"),
        ("plan   model\n", "model isn't named"),
        ("plan   model\nmodel\ntrain\n", "train: there is no such room"),
    ] {
        let findings = compare(&found(&rooms), &told(lines));
        assert!(findings.iter().any(|f| f.contains(finding)), "{finding}: {findings:?}");
    }
    assert_eq!(compare(&found(&rooms), "# Architecture\n").len(), 1, "a list that is gone");
}

/// A module's file is `mod.rs` inside its folder, never next to it.
#[test]
fn module_files_stand_in_their_folders() {
    let all = files();
    assert_eq!(beside_their_folders(&all), Vec::<String>::new());
    let bad = ["runtime/src/plan.rs", "runtime/src/plan/room.rs", "tests/cli.rs", "tests/cli/room.rs"];
    assert_eq!(beside_their_folders(&bad.map(PathBuf::from).into()), ["runtime/src/plan.rs"]);
}

fn beside_their_folders(files: &BTreeSet<PathBuf>) -> Vec<String> {
    let is_beside = |file: &&PathBuf| {
        // Cargo expects the other convention for test programs.
        let is_source = file.extension().is_some_and(|e| e == "rs") && !file.starts_with("tests");
        is_source && files.iter().any(|other| other.starts_with(file.with_extension("")))
    };
    files.iter().filter(is_beside).map(|file| file.display().to_string()).collect()
}

const MARKER: &str = "<!-- the runtime's rooms: held by tests/tidy -->";

fn is_source(file: &Path) -> bool {
    file.starts_with("runtime/src") && file.extension().is_some_and(|e| e == "rs")
}

/// The room that a source stands in; none for the crate's root, and for files of tests.
fn room(file: &Path) -> Option<String> {
    let within = file.strip_prefix("runtime/src").ok()?;
    let first = within.components().next()?.as_os_str().to_str()?.trim_end_matches(".rs");
    (first != "lib" && !within.ends_with("tests.rs")).then(|| first.to_string())
}

/// The arrows of these sources, their comments and unit tests left out.
fn found(sources: &[(PathBuf, String)]) -> Arrows {
    let rooms: BTreeSet<String> = sources.iter().filter_map(|(file, _)| room(file)).collect();
    let mut arrows: Arrows = rooms.iter().map(|room| (room.clone(), BTreeSet::new())).collect();
    for (file, text) in sources {
        let Some(from) = room(file) else { continue };
        let code = String::from_utf8(code_only(text)).expect("blanked text is UTF-8 or blank");
        let code = code.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        for part in code.split("crate::").skip(1) {
            let to: String = part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if to != from && rooms.contains(&to) {
                arrows.entry(from.clone()).or_default().insert(to);
            }
        }
    }
    arrows
}

/// What is wrong with the list in ARCHITECTURE.md. A line is a room and the rooms that it uses, which must all stand
/// below it.
fn compare(found: &Arrows, architecture: &str) -> Vec<String> {
    let Some((_, rest)) = architecture.split_once(MARKER) else {
        return vec![format!("ARCHITECTURE.md has no `{MARKER}`")];
    };
    let lines: Vec<_> = rest.split("```").nth(1).unwrap_or_default().lines().skip(1).collect();
    let told: Vec<(String, BTreeSet<String>)> = lines
        .iter()
        .filter_map(|line| {
            let mut words = line.split([' ', ',']).filter(|word| !word.is_empty()).map(str::to_string);
            Some((words.next()?, words.collect()))
        })
        .collect();
    let mut findings = Vec::new();
    for (i, (from, uses)) in told.iter().enumerate() {
        let Some(really) = found.get(from) else {
            findings.push(format!("{from}: there is no such room"));
            continue;
        };
        let above = |to: &&String| told[..i].iter().any(|(room, _)| room == *to);
        findings
            .extend(uses.iter().filter(above).map(|to| format!("{from} uses {to}, which stands above it")));
        let untold = really.difference(uses);
        findings.extend(untold.map(|to| format!("{from} uses {to}, which ARCHITECTURE.md doesn't say")));
        findings.extend(uses.difference(really).map(|to| format!("{from} doesn't use {to}")));
    }
    let named = |room: &&String| told.iter().any(|(told, _)| told == *room);
    findings.extend(found.keys().filter(|room| !named(room)).map(|room| format!("{room} isn't named")));
    findings
}
