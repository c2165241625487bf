//! A temporary folder for one run.

use std::fs::DirBuilder;
use std::path::{Path, PathBuf};

use engraft_runtime::error::{Error, Result};

/// Names to try before giving up. A name can be taken by a killed run with the same process number, or by
/// somebody else.
const TRIES: u32 = 64;

/// A new folder in the system's temporary folder, accessible only to its owner. Removed with its contents
/// when dropped.
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
            // Never use a folder that exists: it may belong, or link, to somebody else.
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
            log::warn!("{}: can't remove this temporary folder: {e}", self.path.display());
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
