//! Options that several verbs share, by topic. Parsing checks each value's range, so verbs see only valid values.
//! The functions that return paths check the files.

mod adapters;
mod arms;
mod compute;
mod data;
mod forgetting;
mod gate;
mod model;
pub(crate) mod parse;
mod rows;
mod shape;
mod training;

pub(crate) use adapters::{AdapterOption, AdapterOptions, adapter_file, import_hint};
pub(crate) use arms::{ArmName, ArmOptions};
pub(crate) use compute::{ComputeOptions, threads_default};
pub(crate) use data::{DataOptions, tell_rows};
pub(crate) use forgetting::{ForgettingOptions, ProtectSource, ReplaySource};
pub(crate) use gate::GateOptions;
pub(crate) use model::{ModelOptions, OptionalModelOptions};
pub(crate) use rows::RowOptions;
pub(crate) use shape::{OptimizerOptions, ShapeOptions};
pub(crate) use training::{MemoryOptions, TuneOptions};

use std::path::Path;

use engraft_runtime::error::{Error, ErrorKind};

/// An error in how the user called the program.
pub(crate) fn misuse(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Misuse, message)
}

/// The kind of an existing file or folder. Pipes and devices are refused: opening one may wait forever, and what is read
/// twice can't come from one.
///
/// # Errors
/// `Io` with the flag if there is no such path; `Misuse` for a pipe or a device.
pub(crate) fn stat(path: &Path, flag: &str) -> Result<std::fs::Metadata, Error> {
    let found = stat_stream(path, flag)?;
    match found.is_file() || found.is_dir() {
        true => Ok(found),
        false => {
            let path = path.display();
            Err(misuse(format!(
                "{flag}: {path} is a pipe; write what comes from it to a file, and name that"
            )))
        }
    }
}

/// The same where a pipe will do, since it is read once and to a limit.
///
/// # Errors
/// As [`stat`], but for pipes.
pub(crate) fn stat_stream(path: &Path, flag: &str) -> Result<std::fs::Metadata, Error> {
    let found = std::fs::metadata(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            Error::new(ErrorKind::Io, format!("{flag}: {} does not exist; check the path", path.display()))
        }
        _ => Error::io(format!("{flag}: {}", path.display()), e),
    })?;
    match is_device(&found) {
        true => Err(misuse(format!("{flag}: {} is a device; name a file", path.display()))),
        false => Ok(found),
    }
}

#[cfg(unix)]
fn is_device(found: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt;
    found.file_type().is_char_device() || found.file_type().is_block_device()
}

#[cfg(not(unix))]
fn is_device(_: &std::fs::Metadata) -> bool {
    false
}
