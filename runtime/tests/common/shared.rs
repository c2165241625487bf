//! Files beside the repository, where there are any; each absence is said aloud.

use std::path::PathBuf;

/// A file of the shared folder, or `None` with a loud line.
pub fn file(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("ENGRAFT_SHARED")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared"), PathBuf::from);
    let path = root.join(name);
    if !path.exists() {
        eprintln!("SKIPPED: {} is absent; set ENGRAFT_SHARED to the folder that holds it", path.display());
        return None;
    }
    Some(path)
}

/// A file of the shared folder, for a test that somebody asked for by name: it fails without the file, for it would
/// prove nothing.
pub fn needed(name: &str) -> PathBuf {
    file(name).unwrap_or_else(|| panic!("{name} is missing from the folder that ENGRAFT_SHARED names"))
}

/// The real model. Tests that need it are ignored until somebody asks for them, and fail without it.
pub fn real_model() -> PathBuf {
    let path = std::env::var_os("ENGRAFT_MODEL");
    path.expect("set ENGRAFT_MODEL to SmolLM2-135M-Instruct.Q4_1.gguf").into()
}
