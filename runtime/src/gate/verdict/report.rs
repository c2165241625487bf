//! The verdict for people and machines: reasons with figures, and JSON in a fixed order.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{ArmKind, ArmResult, Court, Leak, Retained, Retention, Thresholds, finite};
use crate::error::{Error, ErrorKind, Result, told};

/// The schema of verdict.json.
pub const SCHEMA: u32 = 1;
/// Leaks that a verdict names; the others are only counted.
pub const LEAKS_NAMED_MAX: usize = 20;

/// What a verdict is valid for. Another model, split, setting or seed needs a new one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Basis {
    /// Digest of the model, in hexadecimal.
    pub model: String,
    /// Digest of the training and held-out data, as split.
    pub data_split: String,
    /// Digest of the settings of all arms.
    pub settings: String,
    /// Seed of the bootstrap.
    pub seed: u64,
}

/// The decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "decision", rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Decision {
    /// The trained arm replaces what is in use.
    Promote {
        /// The arm's name.
        arm: String,
    },
    /// The base with examples in its prompt does as well without training.
    KeepPrompting {
        /// The arm's name.
        arm: String,
        /// Examples in the prompt.
        k: usize,
    },
    /// What is in use stays: nothing is shown to be better.
    KeepActive {
        /// Its arm's name.
        arm: String,
    },
    /// The base alone stays.
    KeepBase,
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Decision::Promote { arm } => write!(f, "PROMOTE({arm})"),
            Decision::KeepPrompting { k, .. } => write!(f, "KEEP_PROMPTING({k})"),
            Decision::KeepActive { arm } => write!(f, "KEEP_ACTIVE({arm})"),
            Decision::KeepBase => write!(f, "KEEP_BASE"),
        }
    }
}

/// The size of the held-out data, and what a decision needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldOut {
    /// Examples with at least one target.
    pub examples: usize,
    /// Targets.
    pub targets: usize,
    /// Examples below which nothing is decided.
    pub examples_min: usize,
    /// Discordant pairs below which accuracy can't tell two arms apart.
    pub discordant_min: usize,
}

/// Paired accuracy of an arm and a rival.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Examples that only the arm solved.
    pub only_arm: usize,
    /// Examples that only the rival solved.
    pub only_rival: usize,
    /// McNemar's exact two-sided p-value.
    pub p_exact: f64,
    /// The mid-p-value, which decides.
    pub p_mid: f64,
    /// Whether the discordant pairs are enough to ever tell.
    pub decidable: bool,
    /// About how many examples would show that the arm is better, if it stays ahead as it is; `null` if it isn't
    /// ahead, or too little.
    #[serde(default)]
    pub examples_to_decide: Option<u64>,
    /// Whether the arm is significantly better.
    pub better: bool,
    /// Whether the arm is significantly worse.
    pub worse: bool,
}

/// An arm against a rival. Gains are in nats per token, positive where the arm is better; `null` where
/// the figure isn't finite.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The rival's name.
    pub against: String,
    /// The rival's held-out NLL minus the arm's.
    pub gain: Option<f64>,
    /// Lower end of the gain's confidence interval, at 1 − `level`.
    pub lower: Option<f64>,
    /// Upper end of the same interval.
    pub upper: Option<f64>,
    /// The level of Holm's step at which the arm was tested.
    pub level: f64,
    /// The smallest level at which the interval lies above the minimum improvement.
    pub p: f64,
    /// Whether the interval lies above the minimum improvement.
    pub better: bool,
    /// Whether the interval at the uncorrected level lies below 0.
    pub worse: bool,
    /// About how many examples would decide a gain of this size.
    pub examples_to_decide: Option<u64>,
    /// Accuracy, where both arms have answers.
    pub accuracy: Option<Accuracy>,
}

impl Comparison {
    pub(super) fn without_figures(against: &str, level: f64, accuracy: Option<Accuracy>) -> Comparison {
        Comparison {
            against: against.to_string(),
            gain: None,
            lower: None,
            upper: None,
            level,
            p: 1.0,
            better: false,
            worse: false,
            examples_to_decide: None,
            accuracy,
        }
    }
}

/// What was found about an arm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArmReport {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: ArmKind,
    /// Held-out NLL, nats per token; `null` for a broken arm.
    pub nll: Option<f64>,
    /// Share of the examples it solved.
    pub accuracy: Option<f64>,
    /// Against zero-shot, what is in use and, for trained arms, each few-shot arm whose loss is a number.
    pub comparisons: Vec<Comparison>,
    /// Its p-value over all rivals, after Holm.
    pub adjusted_p: Option<f64>,
    /// Forgetting; `null` where a figure isn't finite.
    pub retention: Vec<RetentionReport>,
    /// KL(tuned‖base) on the held-out examples, nats per token.
    pub task_kl: Option<f64>,
    /// Whether it may be chosen.
    pub eligible: bool,
    /// Whether it is a trained arm that is significantly worse than zero-shot, by loss or accuracy.
    pub negative_transfer: bool,
    /// Findings, as sentences with their figures.
    pub reasons: Vec<String>,
    /// What the data couldn't decide.
    pub undecided: Vec<String>,
}

/// [`Retention`] as verdict.json has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RetentionReport {
    /// The text's name.
    pub text: String,
    /// Change in NLL, nats per token.
    pub delta_nll: Option<f64>,
    /// KL(tuned‖base), nats per token.
    pub kl: Option<f64>,
    /// Answers, for a task that has them.
    pub retained: Option<RetainedReport>,
}

/// [`Retained`](super::Retained) as verdict.json has it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RetainedReport {
    /// Questions.
    pub questions: usize,
    /// Share that the base answers right.
    pub before: f64,
    /// Share that the tuned model answers right.
    pub after: f64,
    /// The paired test, with the base as the rival.
    pub paired: Accuracy,
}

/// The verdict, as in verdict.json.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The decision.
    #[serde(flatten)]
    pub decision: Decision,
    /// The decision in one plain sentence.
    pub sentence: String,
    /// Why, as sentences with their figures.
    pub reasons: Vec<String>,
    /// What kept an arm from winning only because the data can't decide it.
    pub undecided: Vec<String>,
    /// Held-out rows that training saw.
    pub leak_count: usize,
    /// The first of them.
    pub leaks: Vec<Leak>,
    /// The held-out data.
    pub held_out: HeldOut,
    /// The arms in the order they were given.
    pub arms: Vec<ArmReport>,
    /// The thresholds it was judged by.
    pub thresholds: Thresholds,
    /// What it is valid for.
    pub binding: Basis,
}

impl Verdict {
    /// The name of the promoted arm.
    pub fn promoted(&self) -> Option<&str> {
        match &self.decision {
            Decision::Promote { arm } => Some(arm),
            _ => None,
        }
    }

    /// The promoted arm's name.
    ///
    /// # Errors
    /// `GateRefused` with the sentence, when none was promoted.
    pub fn require_promotion(&self) -> Result<&str> {
        self.promoted().ok_or_else(|| Error::new(ErrorKind::GateRefused, self.sentence.clone()))
    }

    /// The text of verdict.json: indented, fields in the order of this struct, a line end at the end.
    ///
    /// # Errors
    /// None in practice; only the serializer's type is fallible.
    pub fn to_json(&self) -> Result<String> {
        let text = serde_json::to_string_pretty(self);
        let text = text.map_err(|e| Error::new(ErrorKind::NonFinite, format!("writing the verdict: {e}")))?;
        Ok(text + "\n")
    }

    /// Reads verdict.json.
    ///
    /// # Errors
    /// `Corrupt` for text that isn't a verdict, `Unsupported` for one of another schema.
    pub fn from_json(text: &str) -> Result<Verdict> {
        #[derive(Deserialize)]
        struct Versioned {
            schema: u32,
        }
        let corrupt =
            |e: serde_json::Error| Error::new(ErrorKind::Corrupt, format!("not a verdict: {}", told(e)));
        let found: Versioned = serde_json::from_str(text).map_err(corrupt)?;
        if found.schema != SCHEMA {
            let message =
                format!("the verdict has schema {}; this version reads {SCHEMA}: judge again", found.schema);
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        serde_json::from_str(text).map_err(corrupt)
    }
}

/// An arm's own figures, before any comparison.
pub(super) fn measured(arm: &ArmResult, court: &Court<'_>) -> ArmReport {
    let (sum, targets) = arm.nll.iter().fold((0.0, 0), |(s, t), e| (s + e.sum, t + e.targets));
    let solved = |c: &Vec<bool>| c.iter().filter(|c| **c).count() as f64 / c.len() as f64;
    let retained = |r: &Retained| RetainedReport {
        questions: r.after.len(),
        before: solved(&r.before),
        after: solved(&r.after),
        paired: court.paired(&r.after, &r.before, court.thresholds.alpha),
    };
    let retention = |r: &Retention| RetentionReport {
        text: r.text.clone(),
        delta_nll: finite(r.delta_nll),
        kl: finite(r.kl),
        retained: r.retained.as_ref().filter(|r| !r.after.is_empty()).map(retained),
    };
    ArmReport {
        name: arm.name.clone(),
        kind: arm.kind,
        nll: finite(sum / targets as f64),
        accuracy: arm.correct.as_ref().map(solved).and_then(finite),
        comparisons: Vec::new(),
        adjusted_p: None,
        retention: arm.retention.iter().map(retention).collect(),
        task_kl: arm.task_kl.and_then(finite),
        eligible: false,
        negative_transfer: false,
        reasons: Vec::new(),
        undecided: Vec::new(),
    }
}

/// "[0.0123, 0.0456] at 97.5 %".
fn interval(c: &Comparison) -> String {
    let end = |x: Option<f64>| x.map_or("?".to_string(), |x| format!("{x:.4}"));
    format!("[{}, {}] at {:.1} %", end(c.lower), end(c.upper), 100.0 * (1.0 - c.level))
}

pub(super) fn sentence(name: &str, c: &Comparison, kind: ArmKind, rival_is_zero: bool) -> String {
    let Some(gain) = c.gain else { return format!("{name} can't be compared with {}.", c.against) };
    let mut figures = format!("by {:.4} nats per token, {}", gain.abs(), interval(c));
    if c.worse && c.upper.is_none_or(|upper| upper >= 0.0) {
        // The interval is at Holm's level; harm is tested without the correction.
        figures += " (below 0 without Holm's correction)";
    }
    if c.better {
        return format!("{name} beats {} {figures}.", c.against);
    }
    match c.worse {
        true if rival_is_zero && kind.is_trained() => {
            format!("Negative transfer: {name} is worse than {}, the untrained base, {figures}.", c.against)
        }
        true => format!("{name} is worse than {} {figures}.", c.against),
        false => format!("{name} does not beat {}: a gain of {gain:.4}, {}.", c.against, interval(c)),
    }
}

pub(super) fn undecided(name: &str, c: &Comparison) -> String {
    let needed = match c.examples_to_decide {
        Some(n) => format!("about {n} held-out examples would decide a difference of this size"),
        None => "more examples may not decide it".to_string(),
    };
    format!("{name} against {}: {} holds 0; {needed}.", c.against, interval(c))
}

pub(super) fn accuracy_sentence(name: &str, against: &str, a: &Accuracy, held_out: &HeldOut) -> String {
    let counts = format!(
        "{} examples solved only by {name}, {} only by {against}, McNemar's mid-p = {:.4}",
        a.only_arm, a.only_rival, a.p_mid
    );
    if a.worse {
        return format!("{name} solves significantly fewer examples than {against}: {counts}.");
    }
    if a.better {
        return format!("{name} solves significantly more examples than {against}: {counts}.");
    }
    match a.decidable {
        true => format!("{name} isn't significantly less accurate than {against}: {counts}."),
        false => {
            let needed = held_out.discordant_min;
            format!(
                "Accuracy can't tell {name} and {against} apart: {counts}; {needed} discordant pairs are needed."
            )
        }
    }
}

pub(super) fn no_more_solved(name: &str, against: &str, a: &Accuracy) -> String {
    let needed = match a.examples_to_decide {
        Some(n) => format!("about {n} held-out examples would decide a lead of this size"),
        None => "more held-out examples wouldn't show it".to_string(),
    };
    format!(
        "{name} isn't shown to solve more examples than {against}: its lower loss may only mean a better form; \
         {needed}."
    )
}

/// Whether a trained arm forgot little enough. Adds the reasons to its report.
pub(super) fn forgetting(arm: &ArmResult, t: &Thresholds, report: &mut ArmReport) -> bool {
    let name = &arm.name;
    if arm.retention.is_empty() {
        report.undecided.push(format!("What {name} forgot wasn't measured: add a retention text."));
        return false;
    }
    let mut sound = true;
    let mut hold = |what: String, value: f64, ceiling: f64| {
        // NaN counts as above every ceiling.
        let below = value <= ceiling;
        sound &= below;
        let relation = match (below, ceiling.is_finite()) {
            (true, false) => "not judged".to_string(),
            (true, true) => format!("within {ceiling}"),
            (false, _) => format!("above {ceiling}"),
        };
        report.reasons.push(format!("{name}: {what} is {value:.4} nats per token, {relation}."));
    };
    for r in &arm.retention {
        hold(format!("retention ΔNLL on {}", r.text), r.delta_nll, t.retention_nll_max);
        hold(format!("KL(tuned‖base) on {}", r.text), r.kl, t.retention_kl_max);
    }
    if let Some(ceiling) = t.task_kl_max {
        hold("KL(tuned‖base) on the task".to_string(), arm.task_kl.unwrap_or(f64::NAN), ceiling);
    }
    for r in &report.retention {
        let Some(retained) = r.retained else { continue };
        sound &= !retained.paired.worse;
        report.reasons.push(retained_sentence(name, &r.text, &retained));
    }
    sound
}

fn retained_sentence(name: &str, text: &str, r: &RetainedReport) -> String {
    let [before, after] = [r.before, r.after].map(|share| 100.0 * share);
    let verb = if r.paired.worse { "forgets answers" } else { "isn't shown to forget answers" };
    format!(
        "{name} {verb} on {text}: {after:.1} % right, {before:.1} % before; {} lost and {} gained of {}, \
         McNemar's mid-p = {:.4}.",
        r.paired.only_rival, r.paired.only_arm, r.questions, r.paired.p_mid
    )
}
