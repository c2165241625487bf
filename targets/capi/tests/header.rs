//! The checked-in header must equal what cbindgen makes from the current sources.
//!
//! After a change of the interface: `ENGRAFT_WRITE_HEADER=1 cargo test --workspace --test header`.

use std::path::{Path, PathBuf};

use cbindgen::{Builder, Config};

fn folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// What cbindgen makes from these files and their modules. Passing the crate instead would run cargo to find its
/// dependencies.
fn made_of(sources: &[PathBuf]) -> String {
    let config = Config::from_file(folder().join("cbindgen.toml")).expect("cbindgen.toml is sound");
    let builder = sources.iter().fold(Builder::new().with_config(config), |b, file| b.with_src(file));
    let mut text = Vec::new();
    builder.generate().expect("the sources are sound").write(&mut text);
    String::from_utf8(text).expect("a header is UTF-8")
}

fn sources() -> Vec<PathBuf> {
    vec![folder().join("src/lib.rs")]
}

#[test]
fn the_header_is_made_of_the_sources() {
    let file = folder().join("include/engraft.h");
    let made = made_of(&sources());
    if std::env::var_os("ENGRAFT_WRITE_HEADER").is_some() {
        std::fs::write(&file, &made).expect("writing the header");
    }
    let told = std::fs::read_to_string(&file).expect("reading the header");
    let differs = told.lines().zip(made.lines()).position(|(a, b)| a != b);
    let at = differs.map_or_else(|| told.lines().count().min(made.lines().count()), |line| line + 1);
    assert!(told == made, "line {at}: regenerate include/engraft.h as this file's head says");
    assert!(made.matches("\nint32_t engraft_").count() > 60, "the functions were not found");
}

#[test]
fn a_new_function_is_seen() {
    let one_more = tempfile::Builder::new().suffix(".rs").tempfile().expect("a file");
    let text = "#[unsafe(no_mangle)]\npub unsafe extern \"C\" fn engraft_extra(x: i32) -> i32 {\n    x\n}\n";
    std::fs::write(one_more.path(), text).expect("writing");
    let mut files = sources();
    let before = made_of(&files);
    files.push(one_more.path().to_path_buf());
    let after = made_of(&files);
    assert!(!before.contains("engraft_extra") && after.contains("int32_t engraft_extra(int32_t x);"));
}
