//! metrics.jsonl next to an adapter: one JSON object per line, appended, readable only by its owner.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use engraft_runtime::error::{Error, ErrorKind, Result};
use engraft_runtime::storage::{Disk, commit};
use serde::{Deserialize, Serialize};

const FILE: &str = "metrics.jsonl";
const LINE_BYTES_MAX: u64 = 1 << 16;

/// Appends records to a file once a folder is given.
#[derive(Debug, Default)]
pub(crate) struct Metrics(Option<(File, PathBuf)>);

impl Metrics {
    /// Opens `folder`/metrics.jsonl for appending. Creates it with mode 0600 if it is missing.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; [`ErrorKind::Misuse`] if it is a link, which could lead outside the folder.
    fn open(&mut self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        if path.is_symlink() {
            let message = format!("{} is a symbolic link; remove it", path.display());
            return Err(Error::new(ErrorKind::Misuse, message));
        }
        let mut options = OpenOptions::new();
        options.append(true).create(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(&path).map_err(|e| Error::io(format!("opening {}", path.display()), e))?;
        self.0 = Some((file, path));
        Ok(())
    }

    /// Begins a run's records. Removes what an earlier start left that never reached its first step.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; [`ErrorKind::Misuse`] if the file is a link.
    pub(crate) fn begin(&mut self, folder: &Path) -> Result<()> {
        self.cut_where(folder, |step| step > 0)
    }

    /// Continues a run's records after `step`. Removes its later records and a line that a crash cut short. Records
    /// of earlier runs stay.
    ///
    /// # Errors
    /// Those of [`Metrics::begin`].
    pub(crate) fn cut(&mut self, folder: &Path, step: u64) -> Result<()> {
        self.cut_where(folder, |recorded| recorded <= step)
    }

    /// Opens the file, cut after the last record of the last run whose step is kept.
    fn cut_where(&mut self, folder: &Path, keeps: impl Fn(u64) -> bool) -> Result<()> {
        self.open(folder)?;
        let path = folder.join(FILE);
        let failed = |e| Error::io(format!("reading {}", path.display()), e);
        let kept = kept_bytes(BufReader::new(File::open(&path).map_err(failed)?), keeps).map_err(failed)?;
        if kept == path.metadata().map_err(failed)?.len() {
            return Ok(());
        }
        commit(&Disk, folder, FILE, |out| {
            let file = File::open(&path).map_err(failed)?;
            io::copy(&mut file.take(kept), out).map_err(failed).map(|_| ())
        })?;
        self.open(folder)
    }

    /// Appends a record in a single write, so that no other writer splits the line. Does nothing before a run begins.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub(crate) fn append(&mut self, record: &impl Serialize) -> Result<()> {
        let Some((file, path)) = &mut self.0 else { return Ok(()) };
        let failed = |e| Error::io(format!("writing {}", path.display()), e);
        let mut line = serde_json::to_vec(record).map_err(|e| failed(e.into()))?;
        line.push(b'\n');
        file.write_all(&line).map_err(failed)
    }
}

/// The number of bytes up to the last record of the last run whose step is kept.
fn kept_bytes(mut lines: impl BufRead, keeps: impl Fn(u64) -> bool) -> io::Result<u64> {
    #[derive(Deserialize)]
    struct Record {
        step: u64,
    }
    let (mut kept, mut end, mut before, mut line) = (0, 0, 0, Vec::new());
    loop {
        line.clear();
        // Records are short; a line without end must not fill the memory.
        if lines.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line)? == 0 {
            return Ok(kept);
        }
        let record = serde_json::from_slice::<Record>(&line);
        if record.as_ref().is_ok_and(|record| record.step < before) {
            // Another run begins here; the one before stays whole.
            kept = end;
        }
        end += line.len() as u64;
        // A line that isn't a record was cut short by a crash.
        let Ok(record) = record else { continue };
        before = record.step;
        if keeps(record.step) && line.ends_with(b"\n") {
            kept = end;
        }
    }
}

/// A training run's record of a step. Losses are in nats.
#[derive(Debug, Default, Serialize)]
pub(crate) struct StepRecord {
    pub(crate) step: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) train_loss: Option<f64>,
    /// Divergence from the base, per trained token.
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
            let mut metrics = Metrics::default();
            metrics.open(folder.path()).unwrap();
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
    fn a_run_that_goes_on_takes_back_what_lies_beyond() {
        let line = |step: u64| format!("{{\"step\":{step},\"train_loss\":0.5}}\n");
        let lines = |steps: &[u64]| steps.iter().map(|s| line(*s)).collect::<String>();
        let earlier = [0, 1, 10, 30];
        let (all, cut) = ([&earlier[..], &[0, 1, 10, 10, 20]].concat(), "{\"step\":30,\"tra");
        for (step, left) in [(20, 9), (19, 8), (10, 8), (9, 6), (0, 5)] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join(FILE);
            std::fs::write(&path, lines(&all) + cut).unwrap();
            let mut metrics = Metrics::default();
            metrics.cut(folder.path(), step).unwrap();
            metrics.append(&StepRecord { step: 99, train_loss: Some(0.5), ..Default::default() }).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), lines(&all[..left]) + &line(99), "{step}");
        }
        for (steps, left) in [(&[0, 1, 40, 0][..], &[0, 1, 40][..]), (&[0, 0], &[]), (&[0, 7], &[0, 7])] {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join(FILE), lines(steps)).unwrap();
            Metrics::default().begin(folder.path()).unwrap();
            assert_eq!(std::fs::read_to_string(folder.path().join(FILE)).unwrap(), lines(left));
        }
    }

    #[test]
    #[cfg(unix)]
    fn links_are_refused() {
        let (folder, outside) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
        std::os::unix::fs::symlink(outside.path(), folder.path().join("metrics.jsonl")).unwrap();
        assert_eq!(Metrics::default().begin(folder.path()).unwrap_err().kind(), ErrorKind::Misuse);
    }
}
