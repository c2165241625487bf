//! `engraft compare`: judges the base alone, the base with examples in its prompt, and trained arms on the same
//! held-out rows.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use engraft_runtime::compare::Outcome;
use engraft_runtime::error::{Error, ErrorKind};
use engraft_runtime::gate::report::Report;
use engraft_runtime::run::{Event, Observer, Stepping};
use engraft_runtime::storage::{Disk, commit, create_dir_all};

use super::{Invocation, WATCH_INTERVAL, common};
use crate::again::{self, Line, Place};
use crate::conditions::Conditions;
use crate::contest::{ContestOptions, Held, Verb};
use crate::json;
use crate::memory::Watch;
use crate::options::{ArmName, misuse};
use crate::progress::{Progress, Step};
use crate::units::show_seconds;

/// Steps between progress lines when stderr isn't a terminal.
const TELL_EVERY: u32 = 50;
/// Time between two lines of a pass over rows.
const MEASURED_EVERY: Duration = Duration::from_secs(5);
/// Columns of the report when the terminal's width is unknown.
const COLUMNS: usize = 100;

/// The verdict, as the gate wrote it.
pub(super) const VERDICT_FILE: &str = "verdict.json";
/// Everything, for machines.
pub(super) const REPORT_JSON: &str = "report.json";
/// Everything, for people.
pub(super) const REPORT_PAGE: &str = "report.html";
/// The folder for arms in training; removed at the end.
pub(super) const UNFINISHED_DIR: &str = "unfinished";

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) contest: ContestOptions,

    /// Folder for verdict.json, report.html, report.json, and what each arm trained
    #[arg(short, long, value_name = "DIR", default_value = "comparison")]
    out: PathBuf,
}

pub(crate) fn run(options: &Options, invocation: &Invocation) -> Result<()> {
    let contest = &options.contest;
    contest.model.path()?;
    contest.data()?;
    if options.out.exists() && !options.out.is_dir() {
        let message = format!("--out: {} is a file; name a folder", options.out.display());
        return Err(misuse(message).into());
    }
    let verb = Verb {
        title: "compare",
        arms: &[ArmName::FewShot, ArmName::Lora, ArmName::Dora, ArmName::Full],
        search: false,
        active: None,
        given: Vec::new(),
        folder: Some(&options.out),
        unfinished: &options.out.join(UNFINISHED_DIR),
    };
    let mut screen = Screen::new(invocation.cancel.clone(), Some(contest.when.watch()?));
    let Held { outcome, lock: _lock, chat } = contest.hold(&verb, &mut screen)?;
    write(&options.out, &outcome)?;
    tell(&outcome.report)?;
    eprintln!("{}: {VERDICT_FILE}, {REPORT_PAGE}, {REPORT_JSON}", options.out.display());
    let (files, place) = ((contest.model.path()?, contest.data()?), Place::Folder(&options.out));
    eprintln!("Type: {}", again::after(&outcome.report, &Line::own(), files, (place, chat)));
    invocation.emit(&json::Compare::of(&outcome, &options.out.display().to_string()))
}

/// Commits the verdict and the reports to a folder.
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

/// Prints the report on stdout.
pub(super) fn tell(report: &Report) -> Result<()> {
    let columns = std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok()).unwrap_or(COLUMNS);
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    Ok(json::line(report.to_text(columns, colour).trim_end())?)
}

/// Shows progress on stderr.
pub(super) struct Screen {
    cancel: Arc<AtomicBool>,
    /// When the run must wait for the machine.
    when: Option<Conditions>,
    progress: Progress,
    /// The run whose progress is shown, and its number of steps if known.
    shown: (String, Option<u64>),
    /// When its progress was first shown, and at which step.
    begun: (Instant, u64),
    measuring: Measuring,
    watch: Watch,
}

/// A pass over rows, told from time to time.
struct Measuring {
    done: usize,
    began: Instant,
    told: Instant,
}

impl Measuring {
    fn new() -> Measuring {
        Measuring { done: 0, began: Instant::now(), told: Instant::now() }
    }

    /// What to tell now, if anything: how far it is, and how long it will take.
    fn heard(&mut self, what: &str, done: usize, all: usize) -> Option<String> {
        if done < self.done || self.done == 0 {
            *self = Measuring::new();
        }
        // A finished pass is followed by another.
        self.done = if done >= all { 0 } else { done };
        if done == 0 || done >= all || self.told.elapsed() < MEASURED_EVERY {
            return None;
        }
        self.told = Instant::now();
        let left = self.began.elapsed().as_secs_f64() / done as f64 * (all - done) as f64;
        Some(format!("{what}: {done} of {all} rows, {} left", show_seconds(left)))
    }
}

impl Screen {
    pub(super) fn new(cancel: Arc<AtomicBool>, when: Option<Conditions>) -> Screen {
        Screen {
            cancel,
            when,
            progress: Progress::on_stderr(TELL_EVERY, None),
            shown: (String::new(), None),
            begun: (Instant::now(), 0),
            measuring: Measuring::new(),
            watch: Watch::start(WATCH_INTERVAL),
        }
    }

    fn step(&mut self, run: &str, at: &Stepping) {
        if (self.shown.0.as_str(), self.shown.1) != (run, at.total) {
            self.progress.finish();
            self.progress = Progress::on_stderr(TELL_EVERY, at.total);
            self.shown = (run.to_string(), at.total);
            self.begun = (Instant::now(), at.step);
        }
        // A resumed run starts at a later step: scale the time of the steps seen here up to all of them.
        let (begun, first) = self.begun;
        let seen = at.step.saturating_sub(first);
        let elapsed_s =
            if seen == 0 { 0.0 } else { begun.elapsed().as_secs_f64() * at.step as f64 / seen as f64 };
        self.progress.step(&Step {
            step: at.step,
            loss: at.report.loss,
            tokens_per_s: at.tokens_per_s(),
            peak_private_bytes: self.watch.sample(),
            elapsed_s,
        });
    }
}

impl Observer for Screen {
    fn go_on(&mut self, save: &mut dyn FnMut() -> Result<(), Error>) -> Result<(), Error> {
        if let Some(when) = &mut self.when {
            when.observe(&self.cancel, &mut self.progress, save)?;
        }
        if !self.cancel.load(Ordering::Relaxed) {
            return Ok(());
        }
        save()?;
        Err(common::cancelled("stopped; nothing was promoted. Run the same command again to continue"))
    }

    fn tell(&mut self, run: &str, event: Event<'_>) {
        match event {
            Event::Note(text) => self.progress.note(text),
            Event::Step(at) => self.step(run, at),
            Event::Look { step, loss, forgot, .. } => {
                let forgot = forgot.map_or(String::new(), |nats| format!("  ordinary text {nats:+.4}"));
                self.progress.note(&format!("{run}: step {step}  validation loss {loss:.4}{forgot}"));
            }
            Event::Measured { what, done, all } => {
                if let Some(told) = self.measuring.heard(what, done, all) {
                    self.progress.note(&told);
                }
            }
            Event::Skipped(why) => self.progress.note(&format!("{run}: skipped: {why}")),
            Event::RolledBack(back) => self.progress.note(&format!("{run}: {}", back.describe())),
            Event::Report(..) | Event::Checkpoint(..) | Event::Saved(_) => {}
        }
    }

    fn begin_peak(&mut self) {
        self.watch = Watch::start(WATCH_INTERVAL);
    }

    fn peak_bytes(&mut self) -> Option<u64> {
        self.watch.sample()
    }
}
