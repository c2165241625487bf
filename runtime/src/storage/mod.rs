//! All durable output goes through here: a small trait over files and directories, its implementation on disk,
//! and the one way to commit a file.
//!
//! The trait covers exactly the steps at which a device can fail (create, write, sync, rename, directory sync,
//! read, remove, list), plus the writer's lock. Tests can inject faults beneath the code that must survive
//! them.
//!
//! ```
//! use engraft_runtime::storage::{Disk, commit};
//!
//! # fn main() -> engraft_runtime::Result<()> {
//! let written = commit(&Disk, &std::env::temp_dir(), "engraft-doc.txt", |out| {
//!     out.write_all(b"whole, or not at all").map_err(|e| engraft_runtime::Error::io("writing", e))
//! })?;
//! assert_eq!(written.bytes, 20);
//! # std::fs::remove_file(written.path).unwrap();
//! # Ok(())
//! # }
//! ```

mod lock;

use std::any::Any;
use std::fs;
use std::io::{self, BufWriter, Read, Seek, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use engraft_codec::{Crc32c, embedded_io};

use crate::error::{Error, ErrorKind, Result, kind_of, remedy_of};
pub use lock::{LOCK_FILE, lock_folder};

/// A file being written.
pub trait StorageFile: Write {
    /// Makes the content durable. After a failure the file must be abandoned, never synced again:
    /// the system may have marked its lost pages clean.
    ///
    /// # Errors
    /// Those of the system.
    fn sync(&mut self) -> io::Result<()>;
}

/// A file being read.
pub trait ReadSeek: Read + Seek {}

impl<T: Read + Seek> ReadSeek for T {}

/// An opened file and its length.
pub struct Opened {
    /// The content, at its first byte.
    pub source: Box<dyn ReadSeek>,
    /// Bytes of the file when it was opened.
    pub bytes: u64,
}

/// What exists at a path, without following a symbolic link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link, a pipe or a device: never one of our own.
    Other,
}

/// A lock on a file, held until it is dropped or the process ends.
pub struct FileLock {
    _held: Box<dyn Any + Send>,
}

impl FileLock {
    /// A lock that dropping `held` releases.
    pub fn new(held: impl Any + Send) -> FileLock {
        FileLock { _held: Box::new(held) }
    }
}

/// Files and directories, as far as durable output needs them.
pub trait Storage {
    /// Creates a file, readable and writable by its owner only. The path must not exist, not even as a symbolic
    /// link.
    ///
    /// # Errors
    /// `AlreadyExists`, and those of the system.
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>>;

    /// Opens a regular file for reading.
    ///
    /// # Errors
    /// `NotFound`, `InvalidInput` for anything but a regular file, and those of the system.
    fn open(&self, path: &Path) -> io::Result<Opened>;

    /// Renames a file, replacing `to`, in one step.
    ///
    /// # Errors
    /// Those of the system.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Makes creations, renames and removals in a directory durable.
    ///
    /// # Errors
    /// Those of the system.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// Those of the system.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// The names in a directory, sorted. Names that aren't UTF-8 are never ours and are left out.
    ///
    /// # Errors
    /// Those of the system.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;

    /// Creates one directory, accessible to its owner only.
    ///
    /// # Errors
    /// `AlreadyExists`, and those of the system.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;

    /// Whether the path is a directory (or a link to one).
    fn is_dir(&self, path: &Path) -> bool;

    /// What exists at the path itself; `None` if nothing does.
    ///
    /// # Errors
    /// Those of the system.
    fn kind(&self, path: &Path) -> io::Result<Option<EntryKind>>;

    /// Removes an empty directory.
    ///
    /// # Errors
    /// Those of the system.
    fn remove_dir(&self, dir: &Path) -> io::Result<()>;

    /// Locks a file exclusively, creating it (for its owner only) if needed. The system drops the lock when the
    /// process ends, however it ends.
    ///
    /// # Errors
    /// `WouldBlock` when another holds it, `InvalidInput` for anything but a regular file, and those of
    /// the system.
    fn lock(&self, path: &Path) -> io::Result<FileLock>;

    /// Whether the process that was writing the file is gone; `None` if the system can't tell.
    fn is_abandoned(&self, _path: &Path) -> Option<bool> {
        None
    }
}

/// A committed file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Where it is.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
}

/// Suffix of files not yet committed.
const TEMP_SUFFIX: &str = ".engraft-tmp";
/// Most files written per commit: the first and, if its sync fails, one more under a new name.
const ATTEMPTS_MAX: usize = 2;
/// Bytes gathered before a write reaches the system.
const BUFFER_BYTES: usize = 64 * 1024;

/// Puts a file called `name` into `dir`, whole or not at all: temporary file in the same directory → sync →
/// rename → directory sync → read back and compare. Only then does it return `Ok`. If anything fails before the
/// rename, an older file of that name stays intact. After the rename the new file has the name, and a device
/// that reads it back differently is reported. If a sync fails, the file is abandoned and `write` is called
/// once more for a new one.
///
/// # Errors
/// [`ErrorKind::Misuse`] when `name` isn't a plain file name, [`ErrorKind::Io`], [`ErrorKind::Corrupt`] when
/// the file reads back differently, and the errors of `write`.
pub fn commit(
    storage: &dyn Storage,
    dir: &Path,
    name: &str,
    mut write: impl FnMut(&mut dyn Write) -> Result<()>,
) -> Result<Committed> {
    if !is_plain_name(name) {
        return Err(Error::new(ErrorKind::Misuse, format!("{name:?} is not a plain file name")));
    }
    let path = dir.join(name);
    // Leftovers for the same file from a killed process. Best effort: they do no harm.
    let _ = remove_temporary(storage, dir, &format!(".{name}."), |is_abandoned| is_abandoned == Some(true));
    let mut attempt = 1;
    loop {
        match commit_once(storage, dir, name, &path, &mut write) {
            Err(Failure::Sync(_)) if attempt < ATTEMPTS_MAX => attempt += 1,
            Err(Failure::Sync(error) | Failure::Other(error)) => return Err(error),
            Ok(bytes) => return Ok(Committed { path, bytes }),
        }
    }
}

/// Removes the temporary files a crash left in `dir`. Only for the holder of the directory's lock: where files
/// can't be locked, this would also remove another writer's unfinished file.
///
/// # Errors
/// [`ErrorKind::Io`].
pub fn remove_stray_files(storage: &dyn Storage, dir: &Path) -> Result<usize> {
    remove_temporary(storage, dir, ".", |is_abandoned| is_abandoned != Some(false))
}

/// Removes the temporary files with this name prefix that `may_go` considers abandoned.
fn remove_temporary(
    storage: &dyn Storage,
    dir: &Path,
    prefix: &str,
    may_go: fn(Option<bool>) -> bool,
) -> Result<usize> {
    let names = storage.list(dir).map_err(|e| Error::io(format!("listing {}", dir.display()), e))?;
    let mut removed = 0;
    for name in names.iter().filter(|n| n.starts_with(prefix) && n.ends_with(TEMP_SUFFIX)) {
        let path = dir.join(name);
        if may_go(storage.is_abandoned(&path)) {
            storage.remove(&path).map_err(|e| Error::io(format!("removing {}", path.display()), e))?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Creates a directory and its ancestors, each durable in its parent. Existing ones keep their permissions.
///
/// # Errors
/// [`ErrorKind::Io`].
pub fn create_dir_all(storage: &dyn Storage, dir: &Path) -> Result<()> {
    if dir.as_os_str().is_empty() {
        return Ok(());
    }
    let Some(parent) = dir.parent() else { return Ok(()) };
    // The parent belongs to another owner or is on a read-only file system: we didn't create the directory.
    let is_foreign = |e: &io::Error| {
        use io::ErrorKind::{InvalidInput, PermissionDenied, ReadOnlyFilesystem};
        matches!(e.kind(), InvalidInput | PermissionDenied | ReadOnlyFilesystem)
    };
    let synced = |exists: bool| match storage.sync_dir(parent) {
        Err(e) if exists && is_foreign(&e) => Ok(()),
        synced => synced.map_err(|e| Error::io(format!("syncing the parent of {}", dir.display()), e)),
    };
    // Existing doesn't mean durable: an earlier attempt may have stopped between the two.
    if storage.is_dir(dir) {
        return synced(true);
    }
    create_dir_all(storage, parent)?;
    match storage.create_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && storage.is_dir(dir) => synced(true),
        Err(e) => Err(Error::io(format!("creating directory {}", dir.display()), e)),
        Ok(()) => synced(false),
    }
}

/// Refuses a link, or anything else that isn't a folder, where a folder within an output folder belongs: a link
/// could lead anywhere.
///
/// # Errors
/// [`ErrorKind::Misuse`]; [`ErrorKind::Io`].
pub fn check_dir_within(storage: &dyn Storage, dir: &Path) -> Result<()> {
    match storage.kind(dir) {
        Ok(None | Some(EntryKind::Dir)) => Ok(()),
        Ok(Some(_)) => {
            let message = "a link or a file is where a folder must be created: remove it";
            Err(Error::new(ErrorKind::Misuse, message).at(dir.display()))
        }
        Err(e) => Err(Error::io(format!("inspecting {}", dir.display()), e)),
    }
}

/// [`create_dir_all`] of a folder within an output folder.
///
/// # Errors
/// As [`check_dir_within`] and [`create_dir_all`].
pub fn create_dir_within(storage: &dyn Storage, dir: &Path) -> Result<()> {
    check_dir_within(storage, dir)?;
    create_dir_all(storage, dir)
}

/// Why one attempt failed: after a failed sync another file may be tried; everything else is final.
enum Failure {
    Sync(Error),
    Other(Error),
}

fn commit_once(
    storage: &dyn Storage,
    dir: &Path,
    name: &str,
    path: &Path,
    write: &mut dyn FnMut(&mut dyn Write) -> Result<()>,
) -> std::result::Result<u64, Failure> {
    let other = |doing: &str, e| Failure::Other(Error::io(format!("{doing} {}", path.display()), e));
    let (temp, file) = create_temp(storage, dir, name).map_err(|e| other("creating", e))?;
    // Kept open until renamed: its lock shows others that it is being written.
    let written = write_synced(file, path, write).and_then(|(sum, _open)| {
        storage.rename(&temp, path).map_err(|e| other("renaming into place", e))?;
        Ok(sum)
    });
    let sum = match written {
        Ok(sum) => sum,
        Err(failure) => {
            // Best effort: the failure itself matters more, and `remove_stray_files` cleans up later.
            let _ = storage.remove(&temp);
            return Err(failure);
        }
    };
    let synced = storage.sync_dir(dir);
    synced
        .map_err(|e| Failure::Sync(Error::io(format!("syncing the directory of {}", path.display()), e)))?;
    let read = read_back(storage, path).map_err(|e| other("reading back", e))?;
    if read != sum {
        let message =
            format!("{}: what was read back differs from what was written; check the device", path.display());
        return Err(Failure::Other(Error::new(ErrorKind::Corrupt, message)));
    }
    Ok(sum.bytes)
}

fn write_synced(
    file: Box<dyn StorageFile>,
    path: &Path,
    write: &mut dyn FnMut(&mut dyn Write) -> Result<()>,
) -> std::result::Result<(Sum, Box<dyn StorageFile>), Failure> {
    let io = |doing: &str, e| Error::io(format!("{doing} {}", path.display()), e);
    let mut tally =
        Tally { inner: BufWriter::with_capacity(BUFFER_BYTES, file), crc: Crc32c::new(), bytes: 0 };
    write(&mut tally).map_err(Failure::Other)?;
    let sum = Sum { bytes: tally.bytes, crc: tally.crc.finish() };
    let unbuffered = tally.inner.into_inner().map_err(io::IntoInnerError::into_error);
    let mut file = unbuffered.map_err(|e| Failure::Other(io("writing", e)))?;
    file.sync().map_err(|e| Failure::Sync(io("syncing", e)))?;
    Ok((sum, file))
}

/// A new file under a name no other process or thread uses.
fn create_temp(storage: &dyn Storage, dir: &Path, name: &str) -> io::Result<(PathBuf, Box<dyn StorageFile>)> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    loop {
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!(".{name}.{}-{n}{TEMP_SUFFIX}", std::process::id()));
        match storage.create_new(&path) {
            // Left by an earlier process with the same id.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
            Ok(file) => return Ok((path, file)),
        }
    }
}

fn read_back(storage: &dyn Storage, path: &Path) -> io::Result<Sum> {
    let mut source = storage.open(path)?.source;
    let mut sum = Tally { inner: io::sink(), crc: Crc32c::new(), bytes: 0 };
    io::copy(&mut source, &mut sum)?;
    Ok(Sum { bytes: sum.bytes, crc: sum.crc.finish() })
}

fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let one = matches!(parts.next(), Some(Component::Normal(part)) if part == name);
    one && parts.next().is_none() && !name.contains(['/', '\\', ':', '\0'])
}

#[derive(PartialEq, Eq)]
struct Sum {
    bytes: u64,
    crc: u32,
}

/// Counts and sums what passes through.
struct Tally<W> {
    inner: W,
    crc: Crc32c,
    bytes: u64,
}

impl<W: Write> Write for Tally<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.crc.update(&bytes[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// The file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disk;

impl StorageFile for fs::File {
    fn sync(&mut self) -> io::Result<()> {
        // On Apple systems the standard library asks for F_FULLFSYNC here.
        self.sync_all()
    }
}

impl Storage for Disk {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        let mut options = fs::OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(path)?;
        #[cfg(unix)]
        show_that_it_is_written(&file)?;
        Ok(Box::new(file))
    }

    fn open(&self, path: &Path) -> io::Result<Opened> {
        // Checked before opening: opening a pipe would wait for its other end.
        if !fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let file = fs::File::open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Opened { source: Box::new(file), bytes })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        // Windows has no such call; its rename goes through the file system's journal.
        if cfg!(windows) {
            return Ok(());
        }
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        fs::File::open(dir)?.sync_all()
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            names.extend(entry?.file_name().into_string());
        }
        names.sort_unstable();
        Ok(names)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        #[cfg_attr(not(unix), allow(unused_mut, reason = "modes exist on Unix only"))]
        let mut builder = fs::DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(dir)
    }

    fn is_dir(&self, path: &Path) -> bool {
        path.is_dir()
    }

    fn kind(&self, path: &Path) -> io::Result<Option<EntryKind>> {
        match fs::symlink_metadata(path) {
            Ok(found) if found.is_file() => Ok(Some(EntryKind::File)),
            Ok(found) if found.is_dir() => Ok(Some(EntryKind::Dir)),
            Ok(_) => Ok(Some(EntryKind::Other)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        fs::remove_dir(dir)
    }

    fn lock(&self, path: &Path) -> io::Result<FileLock> {
        if self.kind(path)?.is_some_and(|kind| kind != EntryKind::File) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(path)?;
        try_lock(&file)?;
        Ok(FileLock::new(file))
    }

    #[cfg(unix)]
    fn is_abandoned(&self, path: &Path) -> Option<bool> {
        let is_file = self.kind(path).ok()? == Some(EntryKind::File);
        // Opened for writing: some file systems lock only such files.
        let file = fs::OpenOptions::new().write(true).open(path).ok().filter(|_| is_file)?;
        match try_lock(&file) {
            Ok(()) => Some(true),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Some(false),
            Err(_) => None,
        }
    }
}

/// Locks a new file to show that it is being written, where the file system supports it. Someone who swept
/// abandoned files between creation and lock may have taken it for one.
#[cfg(unix)]
fn show_that_it_is_written(file: &fs::File) -> io::Result<()> {
    let is_taken = try_lock(file).is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock);
    match is_taken || std::os::unix::fs::MetadataExt::nlink(&file.metadata()?) == 0 {
        true => Err(io::ErrorKind::AlreadyExists.into()),
        false => Ok(()),
    }
}

/// The standard library has no file lock on Android.
#[cfg(unix)]
fn try_lock(file: &fs::File) -> io::Result<()> {
    Ok(rustix::fs::flock(file, rustix::fs::FlockOperation::NonBlockingLockExclusive)?)
}

#[cfg(not(unix))]
fn try_lock(file: &fs::File) -> io::Result<()> {
    Ok(file.try_lock()?)
}

/// A standard reader or writer as the codec's I/O traits want it; interrupted calls are repeated.
#[derive(Debug)]
pub struct StdIo<T>(pub T);

/// The codec's I/O errors are the standard library's.
pub type StdIoError = io::Error;

impl<T> embedded_io::ErrorType for StdIo<T> {
    type Error = io::Error;
}

impl<T: Read> embedded_io::Read for StdIo<T> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        repeat_interrupted(|| self.0.read(out))
    }
}

impl<T: Write> embedded_io::Write for StdIo<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        repeat_interrupted(|| self.0.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        repeat_interrupted(|| self.0.flush())
    }
}

fn repeat_interrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// The runtime's error for a frame's, naming its file.
pub fn frame_error(path: &Path, error: engraft_codec::Error<StdIoError>) -> Error {
    let kind = match &error {
        engraft_codec::Error::Io(source) => kind_of(source),
        engraft_codec::Error::WriteZero => ErrorKind::Io,
        engraft_codec::Error::Version { .. } => ErrorKind::Unsupported,
        engraft_codec::Error::Limit(_) | engraft_codec::Error::Misuse(_) => ErrorKind::Misuse,
        _ => ErrorKind::Corrupt,
    };
    let remedy = match &error {
        engraft_codec::Error::Io(source) => remedy_of(source),
        _ => "",
    };
    Error::new(kind, format!("{}: {error}{remedy}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(storage: &dyn Storage, dir: &Path, name: &str, content: &[u8]) -> Result<Committed> {
        commit(storage, dir, name, |w| w.write_all(content).map_err(|e| Error::io("writing", e)))
    }

    #[test]
    fn a_commit_replaces_the_file_and_leaves_no_other() {
        let dir = tempfile::tempdir().unwrap();
        put(&Disk, dir.path(), "a", b"old").unwrap();
        let done = put(&Disk, dir.path(), "a", b"newer").unwrap();
        assert_eq!(done, Committed { path: dir.path().join("a"), bytes: 5 });
        assert_eq!(fs::read(done.path).unwrap(), b"newer");
        assert_eq!(Disk.list(dir.path()).unwrap(), ["a"]);
    }

    #[test]
    fn a_failing_content_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |w: &mut dyn Write| {
            w.write_all(b"half").unwrap();
            Err(Error::new(ErrorKind::NonFinite, "NaN"))
        };
        assert_eq!(commit(&Disk, dir.path(), "a", refused).unwrap_err().kind(), ErrorKind::NonFinite);
        assert!(Disk.list(dir.path()).unwrap().is_empty());
    }

    #[test]
    fn names_stay_inside_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["", ".", "..", "../a", "a/b", "/a", "a\\b", "c:a", "a/"] {
            assert_eq!(put(&Disk, dir.path(), name, b"x").unwrap_err().kind(), ErrorKind::Misuse, "{name:?}");
        }
        assert!(Disk.list(dir.path()).unwrap().is_empty());
    }

    #[test]
    fn stray_files_go_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        for name in [".a.1-0.engraft-tmp", "a", ".hidden", "b.engraft-tmp"] {
            fs::write(dir.path().join(name), b"x").unwrap();
        }
        assert_eq!(remove_stray_files(&Disk, dir.path()).unwrap(), 1);
        assert_eq!(Disk.list(dir.path()).unwrap(), [".hidden", "a", "b.engraft-tmp"]);
    }

    #[cfg(unix)]
    #[test]
    fn what_is_being_written_stays_and_what_was_left_goes_with_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let stray = dir.path().join(".a.1-0.engraft-tmp");
        fs::write(&stray, b"x").unwrap();
        let swept = commit(&Disk, dir.path(), "a", |w| {
            assert!(!stray.exists());
            assert_eq!(remove_stray_files(&Disk, dir.path()).unwrap(), 0);
            w.write_all(b"new").map_err(|e| Error::io("writing", e))
        });
        swept.unwrap();
        assert_eq!(Disk.list(dir.path()).unwrap(), ["a"]);
    }

    #[cfg(unix)]
    #[test]
    fn owner_only_and_links_are_replaced_not_followed() {
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("x/y");
        create_dir_all(&Disk, &dir).unwrap();
        create_dir_all(&Disk, &dir).unwrap();
        assert_eq!((mode(&dir), mode(dir.parent().unwrap())), (0o700, 0o700));

        let outside = root.path().join("outside");
        fs::write(&outside, b"mine").unwrap();
        std::os::unix::fs::symlink(&outside, dir.join("a")).unwrap();
        put(&Disk, &dir, "a", b"new").unwrap();
        assert_eq!(fs::read(&outside).unwrap(), b"mine");
        assert_eq!(mode(&dir.join("a")), 0o600);
        assert_eq!(Disk.open(&dir).err().unwrap().kind(), io::ErrorKind::InvalidInput);
    }
}
