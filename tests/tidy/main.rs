//! Checks that no compiler makes: short functions, reasons next to unsafe code, the direction of dependencies,
//! unreachable files, and a repository that stands alone. Every checker is also fed something bad, which it must
//! find.

mod code;
mod rooms;

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use code::{code_only, is_word, keyword_places, long_functions, skip_blank, unexplained_unsafe};

#[test]
fn functions_are_short() {
    let findings = over_sources(long_functions);
    assert!(findings.is_empty(), "split these functions:\n{}", findings.join("\n"));
}

#[test]
fn unsafe_code_has_reasons() {
    let findings = over_sources(unexplained_unsafe);
    assert!(findings.is_empty(), "write `// SAFETY: why it is sound` right above:\n{}", findings.join("\n"));
}

#[test]
fn dependencies_point_one_way() {
    let manifests = files().into_iter().filter(|f| f.file_name().is_some_and(|n| n == "Cargo.toml"));
    let texts: Vec<_> = manifests.map(|f| (f.display().to_string(), read(&f))).collect();
    assert!(texts.len() >= 4, "the workspace's manifests were not found");
    let findings = wrong_dependencies(&texts);
    assert!(findings.is_empty(), "{}", findings.join("\n"));
}

#[test]
fn every_source_file_is_reached() {
    let files = files();
    let exists = |path: &Path| files.contains(path);
    let findings = dead_files(&files, exists, read);
    assert!(findings.is_empty(), "no `mod` and no target leads to:\n{}", findings.join("\n"));
}

#[test]
fn the_repository_stands_alone() {
    let texts =
        files().into_iter().filter_map(|f| Some((f.clone(), std::fs::read_to_string(root().join(f)).ok()?)));
    let findings: Vec<_> = texts.flat_map(|(file, text)| foreign_words(&file, &text)).collect();
    assert!(findings.is_empty(), "paths of one machine or words of one workplace:\n{}", findings.join("\n"));
}

#[test]
fn the_top_level_is_known() {
    let findings = unknown_top_level(&files());
    assert!(findings.is_empty(), "not part of the layout:\n{}", findings.join("\n"));
}

#[test]
fn the_readme_has_one_test_command() {
    assert_eq!(test_commands(&read(Path::new("README.md"))), 1, "mark exactly one, for .ci/run");
    assert_eq!(test_commands("<!-- ci: the test command -->\n<!-- ci: the test command -->\n"), 2);
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A file of the repository; the path is relative to its root.
fn read(file: &Path) -> String {
    std::fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{}: {e}", file.display()))
}

/// The repository's files relative to its root: those that git tracks or would track, or in a tarball all files
/// except build products.
fn files() -> BTreeSet<PathBuf> {
    if root().join(".git").exists() {
        let listing = Command::new("git")
            .current_dir(root())
            .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .output()
            .expect("running git");
        assert!(listing.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listing.stderr));
        let text = String::from_utf8(listing.stdout).expect("file names in UTF-8");
        let all = text.split('\0').filter(|name| !name.is_empty()).map(PathBuf::from);
        return all.filter(|f| root().join(f).is_file()).collect();
    }
    let mut found = BTreeSet::new();
    walk(root(), &mut found);
    found
}

fn walk(folder: &Path, found: &mut BTreeSet<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("listing a folder") {
        let entry = entry.expect("listing a folder");
        let (path, kind) = (entry.path(), entry.file_type().expect("the type of a file"));
        if kind.is_dir() && entry.file_name() != "target" {
            walk(&path, found);
        } else if kind.is_file() {
            found.insert(path.strip_prefix(root()).expect("a path below the root").to_path_buf());
        }
    }
}

/// Applies a checker to every Rust file; returns its findings with file and line.
fn over_sources(check: fn(&str) -> Vec<(usize, String)>) -> Vec<String> {
    let sources: Vec<_> = files().into_iter().filter(|f| f.extension().is_some_and(|e| e == "rs")).collect();
    assert!(sources.len() >= 10, "the sources were not found");
    let found = |file: &PathBuf| {
        let findings = check(&read(file)).into_iter();
        findings.map(|(line, what)| format!("{}:{line}: {what}", file.display())).collect::<Vec<_>>()
    };
    sources.iter().flat_map(found).collect()
}

// ---------------------------------------------------------------------------------------------------
// The direction of dependencies

/// Which of our crates a crate may depend on, and which foreign crates it must not.
fn law(package: &str) -> Option<(&'static [&'static str], &'static [&'static str])> {
    Some(match package {
        "engraft-kernels" => (&[], &["candle", "tokenizers", "memmap2", "anyhow", "clap", "serde"]),
        "engraft-codec" => (&[], &["candle", "tokenizers", "memmap2", "anyhow", "clap"]),
        "engraft-runtime" => (&["engraft-kernels", "engraft-codec"], &["anyhow", "clap"]),
        // A product may use everything below it, but never another product.
        _ if package.starts_with("engraft") => {
            (&["engraft-kernels", "engraft-codec", "engraft-runtime"], &[])
        }
        _ => return None,
    })
}

/// Violations in manifests given as (path, text). Tests may use any foreign crate, but only those of ours that the
/// law allows.
fn wrong_dependencies(manifests: &[(String, String)]) -> Vec<String> {
    let mut findings = Vec::new();
    for (path, text) in manifests {
        let manifest: toml::Table = text.parse().unwrap_or_else(|e| panic!("{path}: {e}"));
        let Some(package) = manifest.get("package").and_then(|p| p.get("name")?.as_str()) else { continue };
        let Some((ours, without)) = law(package) else {
            findings.push(format!("{path}: no rule for the package {package}: add one here"));
            continue;
        };
        for (name, test_only) in dependencies(&manifest) {
            let is_ours = name.starts_with("engraft");
            if is_ours && !ours.contains(&name.as_str()) {
                findings.push(format!("{path}: {package} must not depend on {name}"));
            }
            if !test_only && without.iter().any(|w| name.starts_with(w)) {
                findings.push(format!("{path}: {package} must do without {name}"));
            }
        }
    }
    findings
}

/// All dependencies of a manifest by their real names, and whether only tests see them.
fn dependencies(manifest: &toml::Table) -> Vec<(String, bool)> {
    let targets = manifest.get("target").and_then(toml::Value::as_table);
    let per_target = targets.into_iter().flat_map(|t| t.values().filter_map(toml::Value::as_table));
    let mut found = Vec::new();
    for table in std::iter::once(manifest).chain(per_target) {
        for (section, test_only) in
            [("dependencies", false), ("build-dependencies", false), ("dev-dependencies", true)]
        {
            for (name, value) in table.get(section).and_then(toml::Value::as_table).into_iter().flatten() {
                let real = value.get("package").and_then(toml::Value::as_str).unwrap_or(name);
                found.push((real.to_string(), test_only));
            }
        }
    }
    found
}

#[test]
fn wrong_dependencies_are_found() {
    let check = |package: &str, rest: &str| {
        let text = format!("[package]\nname = \"{package}\"\n{rest}\n");
        wrong_dependencies(&[("Cargo.toml".into(), text)]).len()
    };
    assert_eq!(
        check("engraft-kernels", "[dependencies]\nhalf = \"2\"\n[dev-dependencies]\ncandle-core = \"1\""),
        0
    );
    assert_eq!(check("engraft-kernels", "[dependencies]\ncandle-core.workspace = true"), 1);
    assert_eq!(check("engraft-kernels", "[dev-dependencies]\nengraft-runtime.workspace = true"), 1);
    assert_eq!(
        check("engraft-codec", "[dependencies]\nx = { package = \"engraft-kernels\", path = \"\" }"),
        1
    );
    assert_eq!(check("engraft-runtime", "[target.'cfg(unix)'.dependencies]\nengraft = { path = \"..\" }"), 1);
    assert_eq!(check("engraft-runtime", "[build-dependencies]\nanyhow = \"1\""), 1);
    assert_eq!(check("engraft-capi", "[dependencies]\nengraft = { path = \"..\" }"), 1);
    assert_eq!(check("engraft", "[dependencies]\nengraft-runtime.workspace = true"), 0);
    assert_eq!(check("other", ""), 1);
}

// ---------------------------------------------------------------------------------------------------
// Files that nothing reaches

/// The Rust files that no target of a manifest and no `mod` or `include!` of a reached file leads to.
fn dead_files(
    files: &BTreeSet<PathBuf>,
    exists: impl Fn(&Path) -> bool,
    read: impl Fn(&Path) -> String,
) -> Vec<String> {
    let mut waiting: Vec<(PathBuf, bool)> = Vec::new();
    for manifest in files.iter().filter(|f| f.file_name().is_some_and(|n| n == "Cargo.toml")) {
        waiting.extend(targets(manifest, &read(manifest), files).into_iter().map(|f| (f, true)));
    }
    let mut reached = BTreeSet::new();
    while let Some((file, is_root)) = waiting.pop() {
        if !exists(&file) || !reached.insert(file.clone()) {
            continue;
        }
        waiting.extend(children(&file, is_root, &read(&file)).into_iter().map(|child| (child, false)));
    }
    let is_dead = |f: &&PathBuf| f.extension().is_some_and(|e| e == "rs") && !reached.contains(*f);
    files.iter().filter(is_dead).map(|f| f.display().to_string()).collect()
}

/// The crate roots of a package: those named in its manifest, and those cargo finds by itself.
fn targets(manifest: &Path, text: &str, files: &BTreeSet<PathBuf>) -> Vec<PathBuf> {
    let folder = manifest.parent().unwrap_or(Path::new(""));
    let table: toml::Table = text.parse().unwrap_or_else(|e| panic!("{}: {e}", manifest.display()));
    let mut roots: Vec<PathBuf> = ["src/lib.rs", "src/main.rs", "build.rs"].map(|f| folder.join(f)).to_vec();
    let build = table.get("package").and_then(|p| p.get("build")?.as_str());
    roots.extend(build.map(|b| folder.join(b)));
    for section in ["lib", "bin", "test", "example", "bench"] {
        let entries = match table.get(section) {
            Some(toml::Value::Array(entries)) => entries.iter().collect(),
            Some(single) => vec![single],
            None => vec![],
        };
        let paths = entries.into_iter().filter_map(|entry| entry.get("path")?.as_str());
        roots.extend(paths.map(|p| folder.join(p)));
    }
    for found in ["tests", "examples", "benches", "src/bin"] {
        let within = |f: &&PathBuf| {
            let inner = f.strip_prefix(folder.join(found)).ok();
            inner.is_some_and(|i| {
                i.components().count() == 1 || (i.ends_with("main.rs") && i.components().count() == 2)
            })
        };
        roots.extend(files.iter().filter(within).cloned());
    }
    roots
}

/// The files that a file's `mod name;`, `#[path = ".."] mod name;` and `include!(..)` may mean.
fn children(file: &Path, is_root: bool, source: &str) -> Vec<PathBuf> {
    let folder = file.parent().unwrap_or(Path::new(""));
    let owns_folder = is_root || file.file_name().is_some_and(|n| n == "mod.rs");
    let own = if owns_folder { folder.to_path_buf() } else { file.with_extension("") };
    let code = code_only(source);
    let mut found = Vec::new();
    for at in keyword_places(&code, "mod") {
        let name_at = skip_blank(&code, at + 3);
        let name_end = (name_at..code.len()).find(|i| !is_word(code[*i])).unwrap_or(code.len());
        if code.get(skip_blank(&code, name_end)) == Some(&b';') {
            let name = &source[name_at..name_end];
            found.extend([own.join(format!("{name}.rs")), own.join(name).join("mod.rs")]);
        }
    }
    for marker in ["#[path = \"", "include!(\""] {
        let named = source.split(marker).skip(1).filter_map(|rest| rest.split('"').next());
        found.extend(named.map(|path| normal(&folder.join(path))));
    }
    found
}

/// The path without `..` and `.`.
fn normal(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::new(), |mut built, part| {
        match part {
            Component::ParentDir => drop(built.pop()),
            Component::CurDir => {}
            other => built.push(other),
        }
        built
    })
}

#[test]
fn dead_files_are_found() {
    let tree = [
        ("Cargo.toml", "[package]\nname = \"x\"\n[[bin]]\nname = \"x\"\npath = \"cli/main.rs\"\n"),
        ("cli/main.rs", "mod a;\nmod b { }\n// mod dead;\n#[path = \"../odd/c.rs\"]\nmod c;\n"),
        ("cli/a.rs", "mod inner;\nconst S: &str = \"mod dead;\";\n"),
        ("cli/a/inner.rs", ""),
        ("odd/c.rs", ""),
        ("cli/dead.rs", ""),
        ("cli/a/dead.rs", ""),
        ("tests/t.rs", "mod common;\n"),
        ("tests/common/mod.rs", ""),
        ("tests/common/dead.rs", ""),
    ];
    let files: BTreeSet<PathBuf> = tree.iter().map(|(name, _)| PathBuf::from(name)).collect();
    let text = |path: &Path| {
        tree.iter().find(|(name, _)| Path::new(name) == path).map_or("", |(_, t)| t).to_string()
    };
    let found = dead_files(&files, |f| files.contains(f), text);
    assert_eq!(found, ["cli/a/dead.rs", "cli/dead.rs", "tests/common/dead.rs"]);
}

// ---------------------------------------------------------------------------------------------------
// A repository that stands alone

/// Lines that name a folder of one machine. The patterns are assembled at run time, so that this file isn't a finding
/// itself.
fn foreign_words(file: &Path, text: &str) -> Vec<String> {
    let slash = "/";
    let patterns = [
        format!("{slash}work{slash}"),
        format!("{slash}tmp{slash}"),
        format!("{slash}home{slash}"),
        format!("{slash}root{slash}"),
    ];
    let hit = |line: &&str| patterns.iter().any(|p| line.contains(p.as_str()));
    let lines = text.lines().enumerate().filter(|(_, line)| hit(line));
    lines.map(|(i, line)| format!("{}:{}: {}", file.display(), i + 1, line.trim())).collect()
}

#[test]
fn foreign_words_are_found() {
    let here = Path::new("a.md");
    assert_eq!(
        foreign_words(here, &format!("fine\nsee {}work{}x\n", '/', '/')),
        ["a.md:2: see /wor".to_string() + "k/x"]
    );
    assert_eq!(foreign_words(here, "work/x, ../shared, /usr/bin, framework/y\n"), Vec::<String>::new());
}

/// Entries of the top level beside those of the layout and the dotfiles.
fn unknown_top_level(files: &BTreeSet<PathBuf>) -> Vec<String> {
    const KNOWN: [&str; 17] = [
        "Cargo.toml",
        "Cargo.lock",
        "build.rs",
        "kernels",
        "runtime",
        "targets",
        "examples",
        "tests",
        "benches",
        "README.md",
        "CHANGELOG.md",
        "ARCHITECTURE.md",
        "SECURITY.md",
        "LICENSE-MIT",
        "LICENSE-APACHE",
        "deny.toml",
        "rustfmt.toml",
    ];
    let first = |f: &PathBuf| f.components().next().map(|c| c.as_os_str().to_string_lossy().into_owned());
    let tops: BTreeSet<String> = files.iter().filter_map(first).collect();
    tops.into_iter().filter(|t| !t.starts_with('.') && !KNOWN.contains(&t.as_str())).collect()
}

#[test]
fn unknown_top_levels_are_found() {
    let files = ["Cargo.toml", ".ci/run", "runtime/src/lib.rs", "notes/plan.md", "x.rs"].map(PathBuf::from);
    assert_eq!(unknown_top_level(&files.into()), ["notes", "x.rs"]);
}

/// Parsers of untrusted files rely on overflow checks. Only the kernels, which see checked shapes, do without.
#[test]
fn release_builds_check_overflow() {
    let manifest = read(Path::new("Cargo.toml"));
    assert_eq!(unchecked_profiles(&manifest), Vec::<String>::new());
    let off = manifest.replacen("overflow-checks = true", "overflow-checks = false", 1);
    assert_eq!(unchecked_profiles(&off), ["release"], "the check sees one that is off");
    let absent = manifest.replacen("overflow-checks = true", "", 1);
    assert_eq!(unchecked_profiles(&absent), ["release"], "release is without unless it says so");
    let other = format!("{manifest}\n[profile.release.package.engraft-runtime]\noverflow-checks = false\n");
    assert_eq!(unchecked_profiles(&other), ["release.package.engraft-runtime"]);
    let own = format!("{manifest}\n[profile.tiny]\ninherits = \"release\"\noverflow-checks = false\n");
    assert_eq!(unchecked_profiles(&own), ["tiny"]);
}

/// Profiles of the workspace under which a parser is built without overflow checks.
fn unchecked_profiles(manifest: &str) -> Vec<String> {
    let manifest: toml::Table = manifest.parse().expect("the workspace's manifest");
    let profiles = manifest.get("profile").and_then(|p| p.as_table()).expect("profiles");
    let checks = |table: &toml::Value| table.get("overflow-checks").and_then(toml::Value::as_bool);
    let mut findings = Vec::new();
    for (name, profile) in profiles {
        // Development profiles check by themselves.
        if checks(profile).is_some_and(|on| !on) || name == "release" && checks(profile).is_none() {
            findings.push(name.clone());
        }
        for (package, own) in profile.get("package").and_then(|p| p.as_table()).into_iter().flatten() {
            if checks(own) == Some(false) && package != "engraft-kernels" {
                findings.push(format!("{name}.package.{package}"));
            }
        }
    }
    findings
}

/// How many commands the README marks as the one that `.ci/run` runs.
fn test_commands(readme: &str) -> usize {
    readme.lines().filter(|line| line.trim() == "<!-- ci: the test command -->").count()
}
