//! The programs of examples/, run as their users run them, on the built-in model.

use std::path::Path;
use std::process::Command;

use super::{stderr, stdout};

const MODEL: &str = "targets/cli/seedling.gguf";
const ROWS: &str = "targets/cli/demo/private_train.jsonl";
const QUESTION: &str = "turn on the light in the cave";

/// What an example prints. `cargo test` builds the examples, too; where one test alone was asked for, cargo builds them
/// now.
fn run(name: &str, arguments: &[&str]) -> String {
    let programs = Path::new(env!("CARGO_BIN_EXE_engraft")).parent().expect("a folder");
    let built = programs.join("examples").join(name).with_extension(std::env::consts::EXE_EXTENSION);
    let mut command = match built.exists() {
        true => super::runnable(&built),
        false => {
            let mut cargo = Command::new(env!("CARGO"));
            cargo.args(["run", "--quiet", "--offline", "--example", name, "--"]);
            cargo
        }
    };
    let output =
        command.current_dir(env!("CARGO_MANIFEST_DIR")).args(arguments).output().expect("running it");
    assert!(output.status.success(), "{name} {arguments:?}: {}", stderr(&output));
    stdout(&output) + &stderr(&output)
}

fn within(folder: &tempfile::TempDir, name: &str) -> String {
    folder.path().join(name).display().to_string()
}

#[test]
fn examples_run_on_the_built_in_model() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = within(&folder, "store");
    let said = run("adapt", &[MODEL, ROWS, &store, QUESTION]);
    assert!(said.contains("MiB of private memory") && Path::new(&store).is_dir(), "{said}");
    assert!(said.contains("romoted") && said.contains("{\"do\":"), "a verdict, and an answer: {said}");

    let (first, second) = (within(&folder, "first"), within(&folder, "second"));
    let said = run("resume", &[MODEL, ROWS, &first]);
    assert!(said.contains("step 60: held-out loss") && said.contains("step 10: checkpoint"), "{said}");
    let said = run("custom_data", &[MODEL, &second]);
    assert!(said.contains("trained on 7 rows"), "{said}");
    let said = run("swap", &[MODEL, &first, &second, QUESTION]);
    assert!(said.contains("[swapped]"), "{said}");
}
