//! Names the file when a model is truncated while it is mapped. The system answers a read past the new end
//! with SIGBUS, which by default kills the process without a message. Here it ends with an error.
//!
//! The handler only wakes a thread; meanwhile the failed read is retried over and over. Committed files are
//! safe, because they are put in place whole. Linux and Android only; other systems keep their default.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use engraft_runtime::error::{Error, ErrorKind};
use engraft_runtime::model::map::check_length;
use signal_hook::consts::SIGBUS;
use signal_hook::low_level::{pipe, raise};

use crate::{advice, exit};

/// The mapped files, to find the one that was truncated.
static MAPPED: Mutex<Vec<Mapped>> = Mutex::new(Vec::new());

/// A file and its length before mapping.
struct Mapped {
    label: String,
    file: File,
    bytes: u64,
}

/// Notes a file that is about to be mapped. If it can't be opened, mapping it reports the error.
pub(crate) fn expect(path: &Path) {
    // Opening a pipe would wait for a writer.
    if !path.metadata().is_ok_and(|found| found.is_file()) {
        return;
    }
    let open = || {
        let file = File::open(path)?;
        let bytes = file.metadata()?.len();
        io::Result::Ok(Mapped { label: path.display().to_string(), file, bytes })
    };
    if let (Ok(mapped), Ok(mut all)) = (open(), MAPPED.lock()) {
        all.push(mapped);
    }
}

/// Turns SIGBUS into an error. If that fails, the process dies from the signal as any other would.
pub(crate) fn install(json: bool) {
    if let Err(error) = try_install(json) {
        log::info!("if a mapped file is truncated, the process will end without naming it: {error}");
    }
}

fn try_install(json: bool) -> io::Result<()> {
    // The standard library's handler watches for stack overflows. At any other SIGBUS it restores the default,
    // which would end the process before our handler runs. So trigger it once now, but only if it is installed.
    if is_caught()? {
        raise(SIGBUS)?;
        if is_caught()? {
            return Err(io::Error::other("another handler stays"));
        }
    }
    let (mut heard, written) = UnixStream::pair()?;
    // Copies, because the blocked thread may hold the locks of the standard streams.
    let out = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let err = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let wait = move || {
        if heard.read_exact(&mut [0]).is_ok() {
            tell(cause(), json, out, err);
            std::process::exit(exit::code_of(ErrorKind::Io).into());
        }
    };
    std::thread::Builder::new().name("truncation".into()).stack_size(128 << 10).spawn(wait)?;
    pipe::register(SIGBUS, written)?;
    Ok(())
}

/// Whether SIGBUS has a handler, by the mask in proc_pid_status(5): bit n−1 is signal n.
fn is_caught() -> io::Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let mask = mask.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    let mask = mask.ok_or_else(|| io::Error::other("/proc/self/status has no SigCgt"))?;
    Ok(mask >> (SIGBUS - 1) & 1 == 1)
}

/// The error, naming the truncated file.
fn cause() -> Error {
    let all = MAPPED.lock().unwrap_or_else(PoisonError::into_inner);
    let cut = |m: &Mapped| check_length(&m.label, m.bytes, m.file.metadata().ok()?.len()).err();
    all.iter().find_map(cut).unwrap_or_else(|| {
        let names: Vec<_> = all.iter().map(|m| m.label.as_str()).collect();
        let message = format!(
            "a page of a mapped file ({}) couldn't be read: the device failed, or the file was truncated and restored. \
             What was saved before is safe; check the device and run again",
            names.join(", ")
        );
        Error::new(ErrorKind::Io, message)
    })
}

/// Reports the error. If the streams are closed, there is nobody to tell.
fn tell(error: Error, json: bool, mut out: File, mut err: File) {
    let _ = writeln!(err, "\nerror: {}", advice::told(&error));
    if json && let Some(object) = exit::object(&error.into()) {
        // Generated text may be on this line.
        let _ = writeln!(out, "\n{object}");
    }
}
