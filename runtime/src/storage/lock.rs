//! One writer to a folder: whoever holds the lock on the file `lock` in it.

use std::io;
use std::path::Path;

use super::{FileLock, Storage, remove_stray_files};
use crate::error::{Error, ErrorKind, Result};

/// The file in a folder that its writer locks. It stays when the writer is gone: to remove it would let two
/// writers lock two files of one name.
pub const LOCK_FILE: &str = "lock";

/// Takes the lock of a folder that exists, and removes what a writer left there that came to no end. The system
/// gives it back when the result is dropped or the process ends, however it ends; no process id is stored that
/// could be another's by then.
///
/// # Errors
/// [`ErrorKind::Busy`] when another writer holds it, [`ErrorKind::Misuse`] where something else than a file
/// has its name, [`ErrorKind::Io`]. Nothing else in the folder has been touched then.
pub fn lock_folder(storage: &dyn Storage, folder: &Path) -> Result<FileLock> {
    let path = folder.join(LOCK_FILE);
    let place = path.display();
    let lock = storage.lock(&path).map_err(|e| match e.kind() {
        io::ErrorKind::WouldBlock => {
            let message = format!(
                "{place}: another process writes to this folder; wait for it to end, or name another folder"
            );
            Error::new(ErrorKind::Busy, message)
        }
        io::ErrorKind::InvalidInput => {
            Error::new(ErrorKind::Misuse, format!("{place} is no regular file: remove it"))
        }
        _ => Error::io(format!("locking {place}"), e),
    })?;
    let strays = remove_stray_files(storage, folder)?;
    if strays > 0 {
        log::info!("{}: removed {strays} unfinished files", folder.display());
    }
    Ok(lock)
}
