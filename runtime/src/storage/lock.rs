//! One writer per folder: whoever locks the file `lock` in it.

use std::io;
use std::path::Path;

use super::{FileLock, Storage, remove_stray_files};
use crate::error::{Error, ErrorKind, Result};

/// The file a folder's writer locks. It stays when the writer is gone: removing it would let two writers lock
/// two different files of that name.
pub const LOCK_FILE: &str = "lock";

/// Locks an existing folder and removes unfinished files an interrupted writer left there. The system releases
/// the lock when the result is dropped or the process ends, however it ends. No process id is stored, since ids
/// are reused.
///
/// # Errors
/// [`ErrorKind::Busy`] when another writer holds it, [`ErrorKind::Misuse`] if something other than a file has
/// its name, [`ErrorKind::Io`]. Nothing else in the folder has then been touched.
pub fn lock_folder(storage: &dyn Storage, folder: &Path) -> Result<FileLock> {
    let path = folder.join(LOCK_FILE);
    let place = path.display();
    let lock = storage.lock(&path).map_err(|e| match e.kind() {
        io::ErrorKind::WouldBlock => {
            let message = format!(
                "{place}: another process is writing to this folder; wait for it to finish, or use another folder"
            );
            Error::new(ErrorKind::Busy, message)
        }
        io::ErrorKind::InvalidInput => {
            Error::new(ErrorKind::Misuse, format!("{place} is not a regular file: remove it"))
        }
        _ => Error::io(format!("locking {place}"), e),
    })?;
    let strays = remove_stray_files(storage, folder)?;
    if strays > 0 {
        log::info!("{}: removed {strays} unfinished files", folder.display());
    }
    Ok(lock)
}
