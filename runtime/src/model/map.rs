//! Holds a model's bytes: a read-only file map, or memory if a map is impossible or unwanted.

use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, MmapOptions};

use crate::error::{Advice, Error, ErrorKind, Result};
use crate::model::digest_cache::Stamp;

/// The bytes of one file, and a label naming it in errors.
///
/// A mapped file costs no private memory: its pages are clean, and the system drops them under
/// pressure. Nothing here ever writes to them.
pub struct Map {
    label: String,
    path: Option<PathBuf>,
    /// The state of the file when it was opened.
    stamp: Option<Stamp>,
    source: Backing,
}

enum Backing {
    /// The map and its file, kept open to query its state.
    Mapped(Mmap, File),
    Owned(Vec<u8>),
    Static(&'static [u8]),
}

impl Map {
    /// Maps the regular file at `path`, read-only and private.
    ///
    /// The file must not be truncated while the map lives. Reading past the new end raises SIGBUS, which a
    /// library can't turn into an error. Within the last remaining page zeros are read without a signal;
    /// [`Map::check_whole`] detects that. Changed bytes, in contrast, can at worst change numbers: every later
    /// read of metadata checks again.
    ///
    /// # Errors
    /// `Io` when the file is missing or unreadable, `Misuse` for a directory or a device, `Corrupt`
    /// for an empty file.
    pub fn open(path: impl AsRef<Path>) -> Result<Map> {
        let path = path.as_ref();
        let (file, _) = open_regular(path)?;
        let stamp = stamp(&file);
        // SAFETY: the map is only ever read, through `&[u8]`. Another process may change the file's bytes
        // meanwhile, but no type here has invalid bit patterns, each string is checked for UTF-8 on every read,
        // and all ranges are checked against the map's fixed length. Truncation raises SIGBUS, which ends the
        // process before a wrong value is seen.
        #[allow(unsafe_code, reason = "mapping a file is unsafe by nature; the reason is above")]
        let mapped = unsafe { MmapOptions::new().map_copy_read_only(&file) };
        let mapped = mapped.map_err(|e| {
            Error::io(format_args!("mapping {}", path.display()), e).advise(Advice::ReadInstead)
        })?;
        if mapped.is_empty() {
            return Err(empty(path));
        }
        Ok(Map::new(path, stamp, Backing::Mapped(mapped, file)))
    }

    /// Reads the whole regular file at `path` into private memory instead of mapping it.
    ///
    /// # Errors
    /// As [`Map::open`]; also `DoesNotFit` if the memory can't be allocated.
    pub fn read(path: impl AsRef<Path>) -> Result<Map> {
        let path = path.as_ref();
        let (file, len) = open_regular(path)?;
        let stamp = stamp(&file);
        let does_not_fit = || {
            let p = path.display();
            let message = format!("{p}: not enough memory for its {len} bytes");
            Error::new(ErrorKind::DoesNotFit, message).advise(Advice::MapInstead)
        };
        let mut bytes = Vec::new();
        let capacity = usize::try_from(len).map_err(|_| does_not_fit())?;
        bytes.try_reserve_exact(capacity).map_err(|_| does_not_fit())?;
        // If the file grows meanwhile, only the planned length is read.
        file.take(len)
            .read_to_end(&mut bytes)
            .map_err(|e| Error::io(format_args!("reading {}", path.display()), e))?;
        if bytes.is_empty() {
            return Err(empty(path));
        }
        Ok(Map::new(path, stamp, Backing::Owned(bytes)))
    }

    /// Checks that the mapped file still has its length and wasn't written to, so everything read from the map
    /// so far is from that file. Costs one system call; memory that isn't a map always passes.
    ///
    /// # Errors
    /// `Io`, naming the file.
    pub fn check_whole(&self) -> Result<()> {
        let Backing::Mapped(map, file) = &self.source else { return Ok(()) };
        let state = file.metadata().map_err(|e| Error::io(format_args!("inspecting {}", self.label), e))?;
        check_length(&self.label, map.len() as u64, state.len())?;
        match Stamp::of(&state).zip(self.stamp).is_some_and(|(now, then)| !now.same_content(&then)) {
            true => Err(Error::new(
                ErrorKind::Io,
                format!(
                    "{}: its content changed while it was in use; results since then are discarded, but what \
                     was saved before remains valid. Run again, and replace models by renaming, never in place",
                    self.label
                ),
            )),
            false => Ok(()),
        }
    }

    /// Bytes that are part of the program, such as the embedded demonstration model.
    pub fn from_static(label: impl Into<String>, bytes: &'static [u8]) -> Map {
        Map { label: label.into(), path: None, stamp: None, source: Backing::Static(bytes) }
    }

    /// Bytes already in memory.
    pub fn from_vec(label: impl Into<String>, bytes: Vec<u8>) -> Map {
        Map { label: label.into(), path: None, stamp: None, source: Backing::Owned(bytes) }
    }

    fn new(path: &Path, stamp: Option<Stamp>, source: Backing) -> Map {
        Map { label: path.display().to_string(), path: Some(path.to_path_buf()), stamp, source }
    }

    /// The file's stamp when it was opened, if the bytes came from a file and the system supports it.
    pub(crate) fn stamp(&self) -> Option<Stamp> {
        self.stamp
    }

    /// The stamp of the file now at that path.
    pub(crate) fn stamp_now(&self) -> Option<Stamp> {
        Stamp::of(&fs::metadata(self.path.as_ref()?).ok()?)
    }

    /// All bytes.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.source {
            Backing::Mapped(m, _) => m,
            Backing::Owned(v) => v,
            Backing::Static(s) => s,
        }
    }

    /// The file's path, if the bytes came from a file.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The name that errors give this file.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Bytes in evictable file pages (a map, or part of the program).
    pub fn mapped_bytes(&self) -> usize {
        match &self.source {
            Backing::Mapped(m, _) => m.len(),
            Backing::Static(s) => s.len(),
            Backing::Owned(_) => 0,
        }
    }

    /// Bytes of private memory held.
    pub fn private_bytes(&self) -> usize {
        match &self.source {
            Backing::Owned(v) => v.capacity(),
            Backing::Mapped(..) | Backing::Static(_) => 0,
        }
    }

    /// Asks the system to start reading the whole file, since every step uses the whole model. This is only a
    /// hint: a failure costs speed alone, so it is logged.
    pub fn prefetch(&self) {
        #[cfg(unix)]
        if let Backing::Mapped(m, _) = &self.source
            && let Err(e) = m.advise(memmap2::Advice::WillNeed)
        {
            log::debug!("{}: no read-ahead: {e}", self.label);
        }
    }
}

impl fmt::Debug for Map {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match &self.source {
            Backing::Mapped(..) => "mapped",
            Backing::Owned(_) => "owned",
            Backing::Static(_) => "static",
        };
        write!(f, "Map({}, {} bytes {how})", self.label, self.as_bytes().len())
    }
}

/// Refuses a mapped file that became shorter.
///
/// # Errors
/// `Io`, naming the file.
pub fn check_length(label: &str, then: u64, now: u64) -> Result<()> {
    if now >= then {
        return Ok(());
    }
    let message = format!(
        "{label}: truncated while in use, from {then} bytes to {now}. What was saved before remains valid; \
         put the file back and run again"
    );
    Err(Error::new(ErrorKind::Io, message).advise(Advice::ReadInstead))
}

/// The state of an open file.
fn stamp(file: &File) -> Option<Stamp> {
    file.metadata().ok().as_ref().and_then(Stamp::of)
}

/// Opens `path` if it is a non-empty regular file; returns its length in bytes.
///
/// The type is checked before opening, since opening a FIFO would wait for a writer.
fn open_regular(path: &Path) -> Result<(File, u64)> {
    let place = path.display();
    let opening = |e| Error::io(format_args!("opening {place}"), e);
    let kind = fs::metadata(path).map_err(opening)?.file_type();
    if kind.is_dir() {
        return Err(Error::new(ErrorKind::Misuse, format!("{place} is a directory; name a file in it")));
    }
    if !kind.is_file() {
        return Err(Error::new(
            ErrorKind::Misuse,
            format!("{place} is not a regular file; copy it into one"),
        ));
    }
    let file = File::open(path).map_err(opening)?;
    let len = file.metadata().map_err(opening)?.len();
    if len == 0 {
        return Err(empty(path));
    }
    Ok((file, len))
}

fn empty(path: &Path) -> Error {
    let place = path.display();
    Error::new(ErrorKind::Corrupt, format!("{place} is empty; a download may have failed, so fetch it again"))
}
