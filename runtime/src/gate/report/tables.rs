//! The figures as tables of strings, the same for page and terminal.

use super::super::verdict::{ArmReport, Comparison, RetainedReport, RetentionReport};
use super::outcome::{outcome, zero_shot};
use super::{ArmRun, DataFacts, ModelFacts, Report, Scoring, show};
use crate::bytes;

/// A table whose first column names its rows.
pub(super) struct Table {
    /// What it shows.
    pub(super) caption: &'static str,
    /// The columns' names.
    pub(super) head: Vec<&'static str>,
    /// Cells, as many in each row as there are names.
    pub(super) rows: Vec<Vec<String>>,
}

impl Table {
    /// Leaves out the columns that have nothing but dashes.
    fn new(caption: &'static str, head: &[&'static str], rows: Vec<Vec<String>>) -> Table {
        let told = |column: usize| {
            column == 0
                || rows.iter().any(|r| r.get(column).is_some_and(|c| c != show::DASH && !c.is_empty()))
        };
        let kept: Vec<usize> = (0..head.len()).filter(|c| told(*c)).collect();
        let row = |r: &Vec<String>| kept.iter().map(|c| r.get(*c).cloned().unwrap_or_default()).collect();
        Table { caption, head: kept.iter().map(|c| head[*c]).collect(), rows: rows.iter().map(row).collect() }
    }

    /// Whether a column holds figures, which are set flush right.
    pub(super) fn is_numeric(&self, column: usize) -> bool {
        let figure = |cell: &String| cell.starts_with(|c: char| c.is_ascii_digit() || "+-[–".contains(c));
        column > 0 && self.rows.iter().all(|r| figure(&r[column]))
    }
}

/// The arms: losses, gains, forgetting, and what became of each.
pub(super) fn arms(report: &Report) -> Table {
    let verdict = &report.verdict;
    let head = [
        "Arm",
        "Held-out NLL",
        "Gain over zero-shot",
        "Interval",
        "Accuracy",
        "Retention ΔNLL",
        "Retention KL",
        "Outcome",
    ];
    let row = |arm: &ArmReport| {
        let gain = zero_shot(verdict).and_then(|z| arm.comparisons.iter().find(|c| c.against == z));
        let worst = |figure: fn(&RetentionReport) -> Option<f64>| {
            let all: Option<Vec<f64>> = arm.retention.iter().map(figure).collect();
            all.and_then(|all| all.into_iter().reduce(f64::max))
        };
        vec![
            show::one_line(&arm.name),
            show::nats(arm.nll),
            show::change(gain.and_then(|c| c.gain)),
            gain.map_or(show::DASH.into(), |c| show::interval(c.lower, c.upper)),
            show::percent(arm.accuracy),
            show::change(worst(|r| r.delta_nll)),
            show::nats(worst(|r| r.kl)),
            outcome(verdict, arm),
        ]
    };
    Table::new("Arms: losses and gains, nats per token", &head, verdict.arms.iter().map(row).collect())
}

/// What each trained arm forgot, by text.
pub(super) fn forgetting(report: &Report) -> Table {
    let mut rows = Vec::new();
    for arm in &report.verdict.arms {
        let name = show::one_line(&arm.name);
        for r in &arm.retention {
            let text = show::one_line(&r.text);
            let [before, after] = [|r: RetainedReport| r.before, |r: RetainedReport| r.after]
                .map(|share| show::percent(r.retained.map(share)));
            rows.push(vec![name.clone(), text, show::change(r.delta_nll), show::nats(r.kl), before, after]);
        }
        if arm.task_kl.is_some() {
            let task = "the held-out task".to_string();
            let none = || show::DASH.to_string();
            rows.push(vec![name, task, none(), show::nats(arm.task_kl), none(), none()]);
        }
    }
    let head = ["Arm", "Text", "ΔNLL", "KL(tuned‖base)", "Right before", "Right after"];
    Table::new("Forgetting: nats per token, answers", &head, rows)
}

/// How the runs went.
pub(super) fn runs(report: &Report) -> Table {
    let head = ["Arm", "Trained", "Parameters", "Learning rate", "Steps", "Best step", "Ended"];
    let row = |run: &ArmRun| {
        vec![
            show::one_line(&run.arm),
            show::one_line(&run.what),
            show::count(run.parameters),
            show::number(run.learning_rate),
            show::count(run.steps),
            show::count(run.best_step),
            show::one_line(&run.ended),
        ]
    };
    Table::new("Runs of training", &head, report.runs.iter().map(row).collect())
}

/// Memory as planned and as measured, and speed, of each run.
pub(super) fn memory(report: &Report) -> Table {
    let head = ["Arm", "Memory planned", "Memory measured", "Of plan", "Time in steps", "Tokens/s"];
    let row = |run: &ArmRun| {
        let share = run.peak_bytes.map(|p| p as f64 / run.planned_bytes as f64);
        let of_plan = match share.filter(|s| s.is_finite()) {
            Some(s) if s > 1.0 => format!("{} (above)", show::percent(Some(s))),
            s => show::percent(s),
        };
        vec![
            show::one_line(&run.arm),
            if run.planned_bytes == 0 { show::DASH.into() } else { bytes::show(run.planned_bytes) },
            run.peak_bytes.map_or(show::DASH.into(), bytes::show),
            of_plan,
            show::seconds(run.seconds),
            show::speed(run.tokens, run.seconds),
        ]
    };
    Table::new("Memory and speed of training", &head, report.runs.iter().map(row).collect())
}

/// What scoring took.
pub(super) fn scoring(report: &Report) -> Table {
    let head = [
        "Arm",
        "Prefix tokens",
        "Tokens scored",
        "Time for losses",
        "Scored/s",
        "Tokens generated",
        "Time for answers",
        "Generated/s",
    ];
    let some = |n: u64| if n == 0 { show::DASH.into() } else { show::count(n) };
    let row = |s: &Scoring| {
        vec![
            show::one_line(&s.arm),
            some(s.prefix_tokens),
            some(s.tokens),
            show::seconds(s.nll_seconds),
            show::speed(s.tokens.saturating_add(s.prefix_tokens), s.nll_seconds),
            some(s.generated_tokens),
            show::seconds(s.generate_seconds),
            show::speed(s.generated_tokens, s.generate_seconds),
        ]
    };
    Table::new("Scoring, per arm", &head, report.scoring.iter().map(row).collect())
}

/// What an open or refused comparison looks like: better, worse, or neither.
pub(super) fn word(c: &Comparison) -> &'static str {
    match (c.better, c.worse) {
        _ if c.gain.is_none_or(|g| !g.is_finite()) => "no figure",
        (true, _) => "better",
        (false, true) => "worse",
        (false, false) => "undecided",
    }
}

/// The fine print: names and values under headings.
pub(super) fn facts(report: &Report) -> Vec<(&'static str, Vec<(String, String)>)> {
    let groups = vec![
        ("Model", model(&report.model)),
        ("Data", data(report, &report.data)),
        ("Thresholds", thresholds(report)),
        ("Settings", report.settings.clone()),
        ("What the verdict holds for", binding(report)),
    ];
    let told = |(name, facts): (&'static str, Vec<(String, String)>)| {
        let facts: Vec<_> = facts.into_iter().filter(|(_, v)| !v.is_empty() && v != show::DASH).collect();
        (!facts.is_empty()).then_some((name, facts))
    };
    groups.into_iter().filter_map(told).collect()
}

fn fact(name: &str, value: impl Into<String>) -> (String, String) {
    (name.to_string(), value.into())
}

fn model(m: &ModelFacts) -> Vec<(String, String)> {
    vec![
        fact("Name", &m.name),
        fact("File", &m.file),
        fact("Parameters", show::count(m.parameters)),
        fact("Type", &m.dtype),
        fact("Mapped", bytes::show(m.mapped_bytes)),
        fact("SHA-256", &m.digest),
    ]
}

fn data(report: &Report, d: &DataFacts) -> Vec<(String, String)> {
    let rows = |(rows, targets): (u64, u64)| match rows {
        0 => String::new(),
        _ => format!("{} rows, {} targets", show::count(rows), show::count(targets)),
    };
    let held_out = &report.verdict.held_out;
    vec![
        fact("Task", d.task.clone().unwrap_or_default()),
        fact("Source", &d.source),
        fact("Training", rows(d.train)),
        fact("Validation", rows(d.valid)),
        fact("Held out", rows(d.held_out)),
        fact(
            "Left out",
            if d.skipped == 0 { String::new() } else { format!("{} rows", show::count(d.skipped)) },
        ),
        fact("Examples that count", show::count(held_out.examples as u64)),
        fact("Fewest that could decide", show::count(held_out.examples_min as u64)),
        fact("Fewest discordant pairs for accuracy", show::count(held_out.discordant_min as u64)),
    ]
}

fn thresholds(report: &Report) -> Vec<(String, String)> {
    let t = &report.verdict.thresholds;
    let nats =
        |x: f64| if x.is_finite() { format!("{} nats per token", show::number(x)) } else { "none".into() };
    vec![
        fact("Level of each family of comparisons", show::number(t.alpha)),
        fact("Least improvement", nats(t.improvement_min)),
        fact("Ceiling of retention ΔNLL", nats(t.retention_nll_max)),
        fact("Ceiling of retention KL", nats(t.retention_kl_max)),
        fact("Ceiling of KL on the task", t.task_kl_max.map_or("none".into(), nats)),
        fact("Bootstrap resamples", show::count(t.resamples as u64)),
        fact("More solved examples required", if t.accuracy_required { "yes" } else { "no" }),
        fact("Few-shot arm required", if t.few_shot_required { "yes" } else { "no" }),
    ]
}

fn binding(report: &Report) -> Vec<(String, String)> {
    let b = &report.verdict.binding;
    vec![
        fact("Model", &b.model),
        fact("Data and split", &b.data_split),
        fact("Settings", &b.settings),
        fact("Seed", b.seed.to_string()),
        fact("Whole time", show::seconds(report.seconds)),
    ]
}
