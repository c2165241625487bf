//! The header that is checked in says what the library exports: the same functions with as many parameters,
//! the same codes and constants, the same fields.

use std::collections::BTreeMap;
use std::path::Path;

/// The export that is in no header: of libraries with debug assertions, to be tested.
const UNTOLD: &str = "engraft_inject_panic";

fn folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All sources, without their tests.
fn sources() -> String {
    let listing = std::fs::read_dir(folder().join("src")).expect("listing the sources");
    let mut files: Vec<_> = listing.map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    let read = |file: &std::path::PathBuf| std::fs::read_to_string(file).expect("reading a source");
    let all: Vec<String> = files.iter().map(read).collect();
    assert!(all.len() >= 10, "the sources were not found");
    all.iter().map(|text| text.split("\n#[cfg(test)]\nmod tests").next().unwrap_or_default()).collect()
}

fn header() -> String {
    std::fs::read_to_string(folder().join("include/engraft.h")).expect("reading the header")
}

/// The parameters between the first brackets of `text`: how many there are.
fn parameters(text: &str) -> usize {
    let within = text.split_once('(').expect("a bracket").1;
    let within = within.split_once(')').expect("a bracket").0;
    within.split(',').filter(|p| !p.trim().is_empty() && p.trim() != "void").count()
}

/// Functions by name, with their number of parameters, where each begins with `marker`.
fn functions(text: &str, marker: &str) -> BTreeMap<String, usize> {
    let found = text.match_indices(marker).map(|(at, _)| &text[at + marker.len()..]);
    let one = |rest: &str| Some((rest.split_once('(')?.0.trim().to_string(), parameters(rest)));
    let found = found.filter_map(one);
    found.filter(|(name, _)| name.starts_with("engraft_") && name != UNTOLD).collect()
}

/// Constants by name: `pub const NAME: i32 = VALUE;` and `#define NAME VALUE`.
fn constants(text: &str) -> BTreeMap<String, String> {
    let one = |line: &str| {
        let rust = || {
            let (name, rest) = line.strip_prefix("pub const ")?.split_once(':')?;
            Some((name, rest.split_once('=')?.1.trim_end_matches(';')))
        };
        let c = || line.strip_prefix("#define ")?.split_once(' ');
        let (name, value) = rust().or_else(c)?;
        let value = value.trim().trim_matches(['(', ')']);
        name.starts_with("ENGRAFT_").then(|| (name.to_string(), value.to_string()))
    };
    text.lines().filter_map(one).collect()
}

/// Names of the fields of the structs that C sees: `pub name: type,` and `type name;`.
fn fields(text: &str) -> Vec<String> {
    let one = |line: &str| {
        let line = line.strip_prefix("    pub ").map(|l| l.split(':').next()).or_else(|| {
            let field = line.strip_prefix("  ").filter(|l| l.ends_with(';') && !l.starts_with(' '))?;
            Some(
                field
                    .trim_end_matches(';')
                    .rsplit([' ', '*'])
                    .next()
                    .map(|n| n.split('[').next().unwrap_or(n)),
            )
        })?;
        line.map(str::to_string)
    };
    let is_field =
        |name: &String| name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    let mut found: Vec<String> = text.lines().filter_map(one).filter(is_field).collect();
    found.sort();
    found
}

#[test]
fn functions_are_those_of_the_library() {
    let (ours, told) = (functions(&sources(), "extern \"C\" fn "), functions(&header(), "int32_t "));
    let versions = functions(&header(), "uint32_t ");
    let told: BTreeMap<_, _> = told.into_iter().chain(versions).collect();
    assert!(ours.len() > 60, "{}", ours.len());
    assert_eq!(ours, told);
}

#[test]
fn constants_are_those_of_the_library() {
    let (ours, mut told) = (constants(&sources()), constants(&header()));
    assert!(ours.len() > 50, "{}", ours.len());
    assert_eq!(ours, told);
    // A code that changed would be seen.
    told.insert("ENGRAFT_BUSY".into(), "-7".into());
    assert_ne!(ours, told);
}

#[test]
fn fields_are_those_of_the_library() {
    let rust: String = {
        let all = sources();
        let structs = all.split("#[repr(C)]\npub struct ").skip(1);
        structs.filter_map(|rest| rest.split_once("\n}")).map(|(body, _)| format!("{body}\n")).collect()
    };
    let ours = fields(&rust);
    assert!(ours.len() > 100, "{}", ours.len());
    assert_eq!(ours, fields(&header()));
}
