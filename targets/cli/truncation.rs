//! A model file that becomes shorter while it is mapped: the system answers a read behind its new end with
//! SIGBUS, whose default is death without a word. Here it ends the process with an error that names the file.
//!
//! The handler only wakes a thread; the read that failed is tried again and again meanwhile. What a run has
//! committed stands, since files are put in place whole. Linux and Android only: elsewhere the system's way
//! stays.

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

/// The files that are mapped, to find the one that was cut.
static MAPPED: Mutex<Vec<Mapped>> = Mutex::new(Vec::new());

/// A file as it was before it was mapped.
struct Mapped {
    label: String,
    file: File,
    bytes: u64,
}

/// Notes a file that is about to be mapped. One that can't be opened is left to whoever maps it.
pub(crate) fn expect(path: &Path) {
    let open = || {
        let file = File::open(path)?;
        let bytes = file.metadata()?.len();
        io::Result::Ok(Mapped { label: path.display().to_string(), file, bytes })
    };
    if let (Ok(mapped), Ok(mut all)) = (open(), MAPPED.lock()) {
        all.push(mapped);
    }
}

/// Makes SIGBUS an error. Where that can't be had, the process dies of it as any other would.
pub(crate) fn install(json: bool) {
    if let Err(error) = try_install(json) {
        log::info!("a file that is cut while it is mapped will end the process unnamed: {error}");
    }
}

fn try_install(json: bool) -> io::Result<()> {
    // The standard library looks out for stack overflows. Its handler, hearing of anything else, restores the
    // default, which would end the process before ours says a word. So let it hear of something else now, and
    // only while it is there to hear it.
    if is_caught()? {
        raise(SIGBUS)?;
        if is_caught()? {
            return Err(io::Error::other("another handler stays"));
        }
    }
    let (mut heard, written) = UnixStream::pair()?;
    // Own copies: the thread that can't go on may hold the locks of the standard streams.
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

/// Whether a handler stands for SIGBUS, as proc_pid_status(5) tells: a mask, bit n−1 for signal n.
fn is_caught() -> io::Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let mask = mask.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    let mask = mask.ok_or_else(|| io::Error::other("/proc/self/status tells no SigCgt"))?;
    Ok(mask >> (SIGBUS - 1) & 1 == 1)
}

/// Which file it was.
fn cause() -> Error {
    let all = MAPPED.lock().unwrap_or_else(PoisonError::into_inner);
    let cut = |m: &Mapped| check_length(&m.label, m.bytes, m.file.metadata().ok()?.len()).err();
    all.iter().find_map(cut).unwrap_or_else(|| {
        let names: Vec<_> = all.iter().map(|m| m.label.as_str()).collect();
        let message = format!(
            "a page of a mapped file ({}) could not be read: the device failed, or the file was cut and put back. \
             What was saved before stands; check the device, and run again",
            names.join(", ")
        );
        Error::new(ErrorKind::Io, message)
    })
}

/// Closed streams can't be told to anyone.
fn tell(error: Error, json: bool, mut out: File, mut err: File) {
    let _ = writeln!(err, "\nerror: {}", advice::told(&error));
    if json && let Some(object) = exit::object(&error.into()) {
        // A generated text may stand on the line.
        let _ = writeln!(out, "\n{object}");
    }
}
