//! `engraft compare`: the base alone, the base behind examples, and what training makes of it, on the same
//! held-out rows, with a verdict.

use std::io::{IsTerminal, Stderr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use clap::Args;
use engraft_runtime::compare::recipe::Base;
use engraft_runtime::compare::{Outcome, Watcher, check, compare};
use engraft_runtime::error::{Error, ErrorKind};
use engraft_runtime::gate::report::Report;
use engraft_runtime::model::text::Text;
use engraft_runtime::storage::{Disk, FileLock, commit, create_dir_all, lock_folder};

use super::{Session, WATCH_INTERVAL, common};
use crate::conditions::Conditions;
use crate::contest::{ArmName, ContestOptions, Defaults};
use crate::json;
use crate::memory::Watch;
use crate::progress::{Progress, Step, Style};

/// Steps between two lines of progress where there is no terminal.
const TELL_EVERY: u32 = 50;
/// Columns of the report where the terminal does not say.
const COLUMNS: usize = 100;

/// The verdict, as the gate wrote it.
pub(super) const VERDICT_FILE: &str = "verdict.json";
/// Everything, for machines.
pub(super) const REPORT_JSON: &str = "report.json";
/// Everything, for people.
pub(super) const REPORT_PAGE: &str = "report.html";

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) contest: ContestOptions,

    /// Folder for verdict.json, report.html, report.json, and what each arm trained
    #[arg(short, long, value_name = "DIR", default_value = "comparison")]
    out: PathBuf,
}

pub(crate) fn run(options: &Options, session: &Session) -> Result<()> {
    options.contest.model.path()?;
    options.contest.data()?;
    if options.out.exists() && !options.out.is_dir() {
        let message = format!("--out: {} is a file: name a folder", options.out.display());
        return Err(crate::options::misuse(message).into());
    }
    let defaults = Defaults {
        title: "compare",
        arms: &[ArmName::FewShot, ArmName::Lora, ArmName::Dora, ArmName::Full],
        search: false,
        folder: Some(&options.out),
    };
    let (outcome, _lock) = hold(&options.contest, &defaults, session)?;
    write(&options.out, &outcome)?;
    tell(&outcome.report)?;
    eprintln!("{}: {VERDICT_FILE}, {REPORT_PAGE}, {REPORT_JSON}", options.out.display());
    if session.json {
        json::emit(&json::Compare::of(&outcome, &options.out.display().to_string()))?;
    }
    Ok(())
}

/// Reads everything, and takes all arms through; with the outcome comes the lock on the folder, if there is one.
pub(super) fn hold(
    options: &ContestOptions,
    defaults: &Defaults<'_>,
    session: &Session,
) -> Result<(Outcome, Option<FileLock>)> {
    let mut watcher = Screen::new(session.cancel.clone(), Some(options.when.watch()?));
    watcher.go_on()?;
    let model = common::open_model(&options.model)?;
    let kernels = common::kernels(&options.compute)?;
    let text = Text::of(&model)?;
    let reading = options.reading(model.config().context_len);
    let material = options.material(&text, &reading)?;
    let base = Base {
        tokenizer_bytes: Text::heap_bytes(&model)?,
        model,
        kernels,
        precision: common::precision(&options.compute),
        gradient: common::gradient(&options.compute),
    };
    let settings = options.settings(defaults, &base, &material, (&text, &reading))?;
    // A refused run leaves no folder.
    check(&base, &material, &reading, &settings)?;
    let lock = match defaults.folder {
        Some(folder) => {
            create_dir_all(&Disk, folder)?;
            Some(lock_folder(&Disk, folder).map_err(|e| e.at("--out"))?)
        }
        None => None,
    };
    Ok((compare(&base, &material, (&text, &reading), &settings, &mut watcher)?, lock))
}

/// Commits verdict and reports into a folder.
pub(super) fn write(folder: &Path, outcome: &Outcome) -> Result<(), Error> {
    create_dir_all(&Disk, folder)?;
    let report = serde_json::to_string_pretty(&outcome.report)
        .map_err(|e| Error::new(ErrorKind::NonFinite, format!("{REPORT_JSON}: {e}")))?;
    let texts = [
        (VERDICT_FILE, outcome.verdict.to_json()?),
        (REPORT_JSON, report + "\n"),
        (REPORT_PAGE, outcome.report.to_html()),
    ];
    for (name, text) in texts {
        commit(&Disk, folder, name, |out| {
            out.write_all(text.as_bytes()).map_err(|e| Error::io(format!("writing {name}"), e))
        })?;
    }
    Ok(())
}

/// The report on stdout.
pub(super) fn tell(report: &Report) -> Result<()> {
    let columns = std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok()).unwrap_or(COLUMNS);
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    Ok(json::line(report.to_text(columns, colour).trim_end())?)
}

/// Shows progress on stderr.
pub(super) struct Screen {
    cancel: Arc<AtomicBool>,
    /// Where the run waits for the machine.
    when: Option<Conditions>,
    progress: Progress<Stderr>,
    /// Of what, and of how many steps where that is known, progress is shown.
    shown: (String, Option<u64>),
    /// When that was first shown, and after how many steps.
    begun: (std::time::Instant, u64),
    watch: Watch,
}

impl Screen {
    pub(super) fn new(cancel: Arc<AtomicBool>, when: Option<Conditions>) -> Screen {
        Screen {
            cancel,
            when,
            progress: Progress::new(std::io::stderr(), Style::for_stderr(TELL_EVERY), None),
            shown: (String::new(), None),
            begun: (std::time::Instant::now(), 0),
            watch: Watch::start(WATCH_INTERVAL),
        }
    }
}

impl Watcher for Screen {
    fn go_on(&mut self) -> Result<(), Error> {
        if let Some(when) = &mut self.when {
            when.go_on(&self.cancel, &mut |notice| self.progress.note(&notice.to_string()))?;
        }
        match self.cancel.load(Ordering::Relaxed) {
            true => Err(common::cancelled("stopped; nothing was promoted")),
            false => Ok(()),
        }
    }

    fn note(&mut self, text: &str) {
        self.progress.note(text);
    }

    fn step(&mut self, arm: &str, step: u64, total: Option<u64>, loss: f64, tokens_per_s: f64) {
        if (self.shown.0.as_str(), self.shown.1) != (arm, total) {
            self.progress.finish();
            self.progress = Progress::new(std::io::stderr(), Style::for_stderr(TELL_EVERY), total);
            self.shown = (arm.to_string(), total);
            self.begun = (std::time::Instant::now(), step);
        }
        // What the steps seen here took tells what all of them did.
        let (begun, first) = self.begun;
        let seen = step.saturating_sub(first);
        let elapsed_s =
            if seen == 0 { 0.0 } else { begun.elapsed().as_secs_f64() * step as f64 / seen as f64 };
        let peak_private_bytes = self.watch.sample();
        self.progress.step(&Step { step, loss, tokens_per_s, peak_private_bytes, elapsed_s });
    }

    fn look(&mut self, arm: &str, step: u64, loss: f64) {
        self.progress.note(&format!("{arm}: step {step}  validation loss {loss:.4}"));
    }

    fn begin_peak(&mut self) {
        self.watch = Watch::start(WATCH_INTERVAL);
    }

    fn peak_bytes(&mut self) -> Option<u64> {
        self.watch.sample()
    }
}
