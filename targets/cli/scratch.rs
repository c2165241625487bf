//! A folder for the length of a run.

use std::fs::DirBuilder;
use std::path::{Path, PathBuf};

use engraft_runtime::error::{Error, Result};

/// Names that are tried before giving up: each that is taken was left by a killed run of the same process
/// number, or put there by somebody.
const TRIES: u32 = 64;

/// A new folder among the system's temporary ones, its owner's alone. It goes with everything in it when
/// dropped.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes the folder.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) fn new() -> Result<Scratch> {
        let mut builder = DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        let among = std::env::temp_dir();
        let mut taken = 0;
        loop {
            let path = among.join(format!("engraft-{}-{taken}", std::process::id()));
            // Never one that exists: it, or where it links to, is somebody else's.
            match builder.create(&path) {
                Ok(()) => return Ok(Scratch { path }),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && taken < TRIES => taken += 1,
                Err(e) => return Err(Error::io(format!("making a folder in {}", among.display()), e)),
            }
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.path) {
            log::warn!("{}: left behind: {e}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_stays() {
        let (one, other) = (Scratch::new().unwrap(), Scratch::new().unwrap());
        assert_ne!(one.path(), other.path());
        std::fs::create_dir(one.path().join("a")).unwrap();
        std::fs::write(one.path().join("a/b"), "c").unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(one.path().metadata().unwrap().permissions().mode() & 0o777, 0o700);
        }
        let (one_was, other_was) = (one.path().to_owned(), other.path().to_owned());
        drop(one);
        assert!(!one_was.exists() && other_was.exists());
    }
}
