//! The programs of examples/, run as their users run them, on the built-in model.

use std::path::Path;
use std::process::Command;

use super::{stderr, stdout};

const MODEL: &str = "targets/cli/seedling.gguf";
const ROWS: &str = "targets/cli/demo/private_train.jsonl";
const QUESTION: &str = "turn on the light in the cave";

/// What an example prints.
fn run(name: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.args(["run", "--quiet", "--offline", "--example", name, "--"]).args(arguments);
    let output = command.output().expect("running cargo");
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

    let (first, second) = (within(&folder, "first"), within(&folder, "second"));
    let said = run("resume", &[MODEL, ROWS, &first]);
    assert!(said.contains("step 60: held-out loss") && said.contains("step 10: checkpoint"), "{said}");
    let said = run("custom_data", &[MODEL, &second]);
    assert!(said.contains("trained on 7 rows"), "{said}");
    let said = run("swap", &[MODEL, &first, &second, QUESTION]);
    assert!(said.contains("[swapped]"), "{said}");
}
