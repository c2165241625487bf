//! Model files beside the repository, where there are any.

use std::path::{Path, PathBuf};

/// All GGUF files below the shared folder's `models`, and the one that `ENGRAFT_MODEL` names.
pub(crate) fn gguf_files() -> Vec<PathBuf> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    let root = std::env::var_os("ENGRAFT_SHARED").map_or(default, PathBuf::from).join("models");
    let mut files = Vec::new();
    walk(&root, &mut files);
    files.extend(std::env::var_os("ENGRAFT_MODEL").map(PathBuf::from));
    files.sort();
    if files.is_empty() {
        eprintln!("SKIPPED: no model files; set ENGRAFT_SHARED or ENGRAFT_MODEL");
    }
    files
}

fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for path in entries.flatten().map(|e| e.path()) {
        if path.is_dir() {
            walk(&path, files);
        } else if path.extension().is_some_and(|e| e == "gguf") {
            files.push(path);
        }
    }
}
