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

/// The real model, or `None` with a loud line.
pub fn real_model() -> Option<PathBuf> {
    let path = std::env::var_os("ENGRAFT_MODEL").map(PathBuf::from);
    if path.is_none() {
        eprintln!("SKIPPED: set ENGRAFT_MODEL to SmolLM2-135M-Instruct.Q4_1.gguf to hold the real model");
    }
    path
}
