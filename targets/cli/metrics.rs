//! metrics.jsonl beside an adapter: one JSON object a line, appended, readable by the owner only.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use engraft_runtime::error::{Error, ErrorKind, Result};
use serde::Serialize;

/// Appends records to a file.
#[derive(Debug)]
pub(crate) struct Metrics {
    file: File,
    path: PathBuf,
}

impl Metrics {
    /// Opens `folder`/metrics.jsonl for appending, and creates it with mode 0600 if it is absent.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; [`ErrorKind::Misuse`] when the name is a link, which could lead outside
    /// the folder.
    pub(crate) fn open(folder: &Path) -> Result<Metrics> {
        let path = folder.join("metrics.jsonl");
        if path.is_symlink() {
            let message = format!("{} is a symbolic link: remove it", path.display());
            return Err(Error::new(ErrorKind::Misuse, message));
        }
        let mut options = OpenOptions::new();
        options.append(true).create(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(&path).map_err(|e| Error::io(format!("opening {}", path.display()), e))?;
        Ok(Metrics { file, path })
    }

    /// Appends one record in one write, so that a line is never split by another writer.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub(crate) fn append(&mut self, record: &impl Serialize) -> Result<()> {
        let failed = |e| Error::io(format!("writing {}", self.path.display()), e);
        let mut line = serde_json::to_vec(record).map_err(|e| failed(e.into()))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(failed)
    }
}

/// What a training run records after a step. Losses in nats.
#[derive(Debug, Default, Serialize)]
pub(crate) struct StepRecord {
    pub(crate) step: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) train_loss: Option<f64>,
    /// Divergence from the base per trained token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kl: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) valid_loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) learning_rate: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) grad_norm: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tokens_per_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) peak_private_bytes: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_appended_line_by_line() {
        let folder = tempfile::tempdir().unwrap();
        for step in [1, 2] {
            let mut metrics = Metrics::open(folder.path()).unwrap();
            metrics.append(&StepRecord { step, train_loss: Some(0.5), ..Default::default() }).unwrap();
        }
        let path = folder.path().join("metrics.jsonl");
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"step\":1,\"train_loss\":0.5}\n{\"step\":2,\"train_loss\":0.5}\n");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    #[cfg(unix)]
    fn links_are_refused() {
        let (folder, outside) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
        std::os::unix::fs::symlink(outside.path(), folder.path().join("metrics.jsonl")).unwrap();
        assert_eq!(Metrics::open(folder.path()).unwrap_err().kind(), ErrorKind::Misuse);
    }
}
