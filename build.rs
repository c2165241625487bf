//! Turns the device profiles in `targets/profiles` into a checked static table, and records the commit, target and
//! build profile in the binary. Compiles no C and probes no CPU.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={}", message.replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);

    let folder = root.join("targets/profiles");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=targets/profiles");
    let table = render(&read_profiles(&folder)?);
    std::fs::write(out.join("profiles.rs"), table).map_err(|e| format!("writing profiles.rs: {e}"))?;

    println!("cargo::rustc-env=ENGRAFT_COMMIT={}", commit(&root));
    println!("cargo::rustc-env=ENGRAFT_TARGET={}", variable("TARGET")?);
    println!("cargo::rustc-env=ENGRAFT_PROFILE={}", variable("PROFILE")?);
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    std::env::var(name).map_err(|_| format!("{name} is not set: this program is run by cargo"))
}

/// One device, as described in its file.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Profile {
    name: String,
    ram_mib: u32,
    threads: u32,
    isa_floor: String,
    notes: String,
    thermal: Thermal,
}

/// Work starts below `start_c` and pauses above `stop_c` (degrees Celsius).
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Thermal {
    start_c: u32,
    stop_c: u32,
}

/// The instruction sets that the kernels support.
const ISAS: [&str; 7] = ["scalar", "portable", "avx2", "avx512", "neon", "dotprod", "i8mm"];

/// All profiles in a folder, sorted by file name. An error names the file and key.
pub(crate) fn read_profiles(folder: &Path) -> Result<Vec<Profile>, String> {
    let listing = std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut files: Vec<PathBuf> = listing.filter_map(|entry| entry.ok().map(|e| e.path())).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "toml"));
    files.sort();

    let mut names = BTreeSet::new();
    let mut profiles = Vec::new();
    for file in &files {
        let text = std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        let profile = parse_profile(&text, &stem).map_err(|e| format!("{}: {e}", file.display()))?;
        if !names.insert(profile.name.clone()) {
            return Err(format!("{}: key `name`: `{}` is taken", file.display(), profile.name));
        }
        profiles.push(profile);
    }
    if profiles.is_empty() {
        return Err(format!("{}: there is no profile (*.toml)", folder.display()));
    }
    Ok(profiles)
}

/// Parses a profile from a file's text; `stem` is the file's name without `.toml`.
pub(crate) fn parse_profile(text: &str, stem: &str) -> Result<Profile, String> {
    let p: Profile = toml::from_str(text).map_err(|e| {
        let line = e.span().map_or(1, |s| text[..s.start.min(text.len())].lines().count().max(1));
        format!("line {line}: {}", e.message())
    })?;
    let check = |holds: bool, key: &str, rule: &str| {
        if holds { Ok(()) } else { Err(format!("key `{key}`: {rule}")) }
    };
    check(p.name == stem, "name", "must equal the file's name without .toml")?;
    check((64..=1 << 20).contains(&p.ram_mib), "ram_mib", "must be 64 to 1048576")?;
    check((1..=256).contains(&p.threads), "threads", "must be 1 to 256")?;
    check(ISAS.contains(&p.isa_floor.as_str()), "isa_floor", &format!("must be one of {ISAS:?}"))?;
    check(!p.notes.is_empty() && !p.notes.contains('\n'), "notes", "must be one line of text")?;
    check((20..=120).contains(&p.thermal.stop_c), "thermal.stop_c", "must be 20 to 120 (Celsius)")?;
    check(p.thermal.start_c < p.thermal.stop_c, "thermal.start_c", "must be below thermal.stop_c")?;
    Ok(p)
}

/// The table as a Rust expression of type `&[Profile]`; see `targets/cli/provenance.rs`.
fn render(profiles: &[Profile]) -> String {
    let mut code = String::from("&[\n");
    for p in profiles {
        let Profile { name, ram_mib, threads, isa_floor, notes, thermal: Thermal { start_c, stop_c } } = p;
        let _ = writeln!(
            code,
            "    Profile {{ name: {name:?}, ram_mib: {ram_mib}, threads: {threads}, isa_floor: {isa_floor:?}, \
             start_c: {start_c}, stop_c: {stop_c}, notes: {notes:?} }},"
        );
    }
    code.push_str("]\n");
    code
}

/// The commit of the sources, or "unknown" outside a clone of this repository. A tarball unpacked inside another
/// repository must not claim that repository's commit.
fn commit(root: &Path) -> String {
    let ours = git(root, &["rev-parse", "--show-toplevel"])
        .and_then(|top| Some(Path::new(&top).canonicalize().ok()? == root.canonicalize().ok()?));
    if ours != Some(true) {
        return "unknown".into();
    }
    for watched in ["HEAD", "refs/heads", "packed-refs"] {
        if let Some(path) = git(root, &["rev-parse", "--git-path", watched])
            && root.join(&path).exists()
        {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    git(root, &["rev-parse", "HEAD"]).unwrap_or_else(|| "unknown".into())
}

fn git(root: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").current_dir(root).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_string())
}
