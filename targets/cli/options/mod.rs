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

pub(crate) use adapters::{AdapterOptions, adapter_file, import_hint};
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

/// Metadata of a path given with a flag.
pub(crate) fn stat(path: &Path, flag: &str) -> Result<std::fs::Metadata, Error> {
    std::fs::metadata(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            Error::new(ErrorKind::Io, format!("{flag}: {} does not exist; check the path", path.display()))
        }
        _ => Error::io(format!("{flag}: {}", path.display()), e),
    })
}
