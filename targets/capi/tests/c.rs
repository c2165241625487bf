//! The library as C programs see it. The system's compiler builds smoke.c with the header and the archive; it goes
//! through a whole life and every misuse. The shared library exports exactly what the header declares.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// With musl there is no unwinder from gcc.
const UNWINDER: &str = if cfg!(target_env = "musl") { "-lunwind" } else { "-lgcc_eh" };

/// What a Rust archive needs of a Linux system, as `rustc --print native-static-libs` says. Linked statically, the
/// linker warns of what asks for users and hosts by name, which nothing here does.
const LIBRARIES: &[&str] = if cfg!(target_feature = "crt-static") {
    &["-static", "-Wl,--no-warnings", UNWINDER, "-lpthread", "-lm", "-ldl"]
} else {
    &["-lgcc_s", "-lutil", "-lpthread", "-lm", "-ldl"]
};

fn folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A library that was built with this test, next to it.
fn library(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this test's path");
    let beside = test.parent().expect("a folder").join(name);
    assert!(beside.exists(), "{}: not built; crate-type in Cargo.toml makes it", beside.display());
    beside
}

/// The compiler for the machine that this test was built for, which isn't the host if the test is emulated.
fn compiler() -> String {
    std::env::var("ENGRAFT_TEST_CC").unwrap_or_else(|_| "cc".to_string())
}

/// A compiled program, run under this test's emulator if there is one.
fn runnable(path: &Path) -> Command {
    let Some(emulator) = std::env::var_os("ENGRAFT_TEST_EMULATOR") else { return Command::new(path) };
    let mut command = Command::new(emulator);
    command.arg(path);
    command
}

/// Whether a tool is available for the machine that this test was built for; says so if it isn't.
fn is_here(tool: &str, probe: &str) -> bool {
    match Command::new(tool).arg(probe).output() {
        Ok(answer) if probe != "-dumpmachine" || text(&answer.stdout).starts_with(std::env::consts::ARCH) => {
            true
        }
        Ok(answer) => {
            eprintln!("SKIPPED: {tool} is for {}, not for this test", text(&answer.stdout).trim());
            false
        }
        Err(error) => {
            eprintln!("SKIPPED: {tool} can't be run: {error}");
            false
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Fails with the program's whole output.
fn passed(what: &str, output: &Output) -> String {
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{what}: {}\n{out}{err}", output.status);
    assert!(err.is_empty(), "{what}: nothing should be on stderr\n{err}");
    out
}

#[test]
fn a_c_program_goes_through_a_whole_life() {
    if !is_here(&compiler(), "-dumpmachine") {
        return;
    }
    let made = tempfile::tempdir().expect("a temporary folder");
    let program = made.path().join("smoke");
    let mut compile = Command::new(compiler());
    compile.args(["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-g"]);
    // As the library was built: only then has it something to inject panics with.
    if cfg!(debug_assertions) {
        compile.arg("-DPANIC_INJECTION");
    }
    compile.arg("-I").arg(folder().join("include")).arg(folder().join("tests/smoke.c"));
    compile.arg(library("libengraft.a")).args(LIBRARIES).arg("-o").arg(&program);
    passed("cc", &compile.output().expect("running cc"));

    let run = |model: &str, files: &str| {
        let files = made.path().join(files);
        std::fs::create_dir(&files).expect("a folder");
        let (model, rows) = (folder().join(model), folder().join("../cli/demo/private_train.jsonl"));
        runnable(&program).arg(model).arg(rows).arg(&files).output().expect("running the program")
    };
    let said = passed("smoke", &run("../cli/seedling.gguf", "files"));
    assert!(said.contains(" 0 checks failed"), "{said}");
    // Without a model every later call is given NULL. The checks fail, and nothing worse happens.
    let failed = run("no such model", "nothing");
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
}

/// The example for newcomers works.
#[test]
fn the_example_adapts_and_answers() {
    if !is_here(&compiler(), "-dumpmachine") {
        return;
    }
    let made = tempfile::tempdir().expect("a temporary folder");
    let program = made.path().join("adapt");
    let mut compile = Command::new(compiler());
    compile
        .args(["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I"])
        .arg(folder().join("include"));
    compile.arg(folder().join("../../examples/adapt.c")).arg(library("libengraft.a")).args(LIBRARIES);
    passed("cc", &compile.arg("-o").arg(&program).output().expect("running cc"));

    let cli = folder().join("../cli");
    let mut run = runnable(&program);
    run.arg(cli.join("seedling.gguf")).arg(cli.join("demo/private_train.jsonl")).arg(made.path().join("out"));
    let output = run.arg("Turn on the lights in the cave.").output().expect("running the example");
    let (answer, progress) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{}: {answer}{progress}", output.status);
    assert!(progress.contains("step 30/30") && answer.contains("\"do\":\"on\""), "{answer}{progress}");
    assert!(made.path().join("out/adapter.engraft").is_file());
}

/// C++ compiles the header, too: no name may clash with C++ keywords.
#[test]
fn the_header_is_c_plus_plus_too() {
    if !is_here("c++", "--version") {
        return;
    }
    let mut check = Command::new("c++");
    check.args([
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        "-fsyntax-only",
        "-x",
        "c++-header",
    ]);
    passed("c++", &check.arg(folder().join("include/engraft.h")).output().expect("running c++"));
}

#[test]
fn the_shared_library_exports_what_the_header_says() {
    if cfg!(target_feature = "crt-static") {
        eprintln!("SKIPPED: with a static C library no shared one is built");
        return;
    }
    if !is_here("nm", "--version") {
        return;
    }
    let mut listing = Command::new("nm");
    listing.args(["--dynamic", "--defined-only", "--format=posix"]).arg(library("libengraft.so"));
    let listing = passed("nm", &listing.output().expect("running nm"));
    let exported: BTreeSet<&str> = listing.lines().filter_map(|line| line.split(' ').next()).collect();
    let header = std::fs::read_to_string(folder().join("include/engraft.h")).expect("reading the header");
    let one = |line: &str| {
        let types = ["int32_t ", "uint32_t ", "const char *"];
        let rest = types.iter().find_map(|kind| line.strip_prefix(kind))?;
        rest.split_once('(').map(|(name, _)| name.to_string())
    };
    let mut told: BTreeSet<String> = header.lines().filter_map(one).collect();
    assert!(told.len() > 60, "{}", told.len());
    if cfg!(debug_assertions) {
        told.insert("engraft_inject_panic".into());
    }
    assert_eq!(exported, told.iter().map(String::as_str).collect());
}
