//! The verdict: promote a trained arm, keep prompting with examples, or keep the base as it is.
//!
//! How it is reached:
//!
//! 1. A leak between training and held-out data, or too few held-out examples, ends it: the base stays.
//! 2. Each trained arm is compared with zero-shot, with every sound few-shot arm and with what is in use, if
//!    anything is, on the same examples, by its gain in nats per token and a paired bootstrap interval. It
//!    must beat them all, so its largest p-value counts. Holm's step-down corrects these p-values over the
//!    trained arms; an arm wins when its lower bounds, at the level of its step, exceed the threshold.
//!    Few-shot arms against zero-shot and what is in use form a second family. Baselines are compared like
//!    trained arms and never win, so they cost the others nothing. An arm whose loss isn't a number can
//!    neither win nor be a rival. It still counts as a member of its family, so that no other member's level
//!    rises.
//! 3. Where answers are judged, a winner must also solve significantly more examples than zero-shot
//!    (McNemar's mid-p at the same step's level): a lower loss may only mean a better form. A winner is
//!    turned down for significantly worse accuracy (McNemar's mid-p), and for any fewer right answers than
//!    what is in use. A trained winner is also turned down
//!    for forgetting: retention ΔNLL or KL above its ceiling, significantly fewer right answers to a
//!    retention task, or nothing measured. These tests aren't corrected for their number: a correction
//!    would make harm harder to see.
//! 4. Of the remaining arms, the trained one that answers most right is promoted; of equals, and where answers
//!    aren't judged, the one with the lowest held-out NLL. Without one, the best few-shot arm by the same rule is
//!    kept; without that, what is in use, or else the base.

mod choice;
mod report;

pub use report::{
    Accuracy, ArmReport, Basis, Comparison, Decision, HeldOut, LEAKS_NAMED_MAX, RetainedReport,
    RetentionReport, SCHEMA, Verdict,
};

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::leak::Leak;
use super::statistics::{Bootstrap, McNemar, discordant_min, examples_min, holm};
use crate::error::{Error, ErrorKind, Result};

/// What the gate demands.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Thresholds {
    /// Two-sided level of each family of comparisons.
    pub alpha: f64,
    /// What the lower bound of an improvement must exceed, nats per token.
    pub improvement_min: f64,
    /// Ceiling of the change in NLL on each retention text, nats per token; see [`KeepGeneral`].
    #[serde(with = "ceiling")]
    pub retention_nll_max: f64,
    /// Ceiling of KL(tuned‖base) on each retention text, nats per token. ΔNLL shows harm; KL also catches
    /// a model whose gains on some tokens hide its losses on others. By Pinsker's inequality, 0.5 nats
    /// let at most √(0.5/2) = half of the next tokens' probability move.
    #[serde(with = "ceiling")]
    pub retention_kl_max: f64,
    /// Ceiling of KL(tuned‖base) on the task, nats per token. None by default: training is meant to move
    /// the model there.
    pub task_kl_max: Option<f64>,
    /// With fewer held-out examples than this, nothing is decided: percentile intervals get too narrow.
    /// Never below [`examples_min`] of the level.
    pub examples_min: usize,
    /// Bootstrap resamples.
    pub resamples: usize,
    /// Whether a trained arm must be compared with a few-shot arm that has a finite loss.
    pub few_shot_required: bool,
    /// Whether an arm whose answers are judged must also solve significantly more examples than zero-shot.
    /// A lower loss may only mean a better form, which even rows with shuffled labels teach.
    pub accuracy_required: bool,
}

impl Default for Thresholds {
    fn default() -> Self {
        let (retention_nll_max, retention_kl_max) = KeepGeneral::default().ceilings();
        Thresholds {
            alpha: 0.05,
            improvement_min: 0.0,
            retention_nll_max,
            retention_kl_max,
            task_kl_max: None,
            examples_min: 20,
            resamples: 10_000,
            few_shot_required: true,
            accuracy_required: true,
        }
    }
}

/// How much of ordinary text a promoted adapter must keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeepGeneral {
    /// Nothing that anyone would notice: 0.03 nats, 3 % of perplexity, which is what a step between neighbouring
    /// quantization types costs.
    #[default]
    Strict,
    /// 0.1 nats, 11 % of perplexity. On SmolLM2-135M, adapters in protected directions that learn a hard format best
    /// cost 0.08 nats of the built-in text.
    Moderate,
    /// Anything: what is forgotten is reported, not judged. For a model that will only ever do the one task.
    Off,
}

impl KeepGeneral {
    /// Ceilings of the change in NLL and of KL(tuned‖base) on each retention text, nats per token.
    pub fn ceilings(self) -> (f64, f64) {
        match self {
            KeepGeneral::Strict => (0.03, 0.5),
            KeepGeneral::Moderate => (0.1, 0.5),
            KeepGeneral::Off => (f64::INFINITY, f64::INFINITY),
        }
    }
}

/// A ceiling in JSON, where no ceiling, infinity, is `null`.
mod ceiling {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(ceiling: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        super::finite(*ceiling).serialize(serializer)
    }

    pub fn deserialize<'d, D: Deserializer<'d>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(deserializer)?.unwrap_or(f64::INFINITY))
    }
}

/// What kind of arm it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ArmKind {
    /// The base alone, against which all others are measured. There is exactly one.
    ZeroShot,
    /// The base after `k` solved examples.
    FewShot {
        /// Examples in the prompt, at least 1.
        k: usize,
    },
    /// Trained parameters.
    Trained,
    /// Trained parameters that are measured and never promoted.
    Baseline,
    /// What is in use, such as a store's active generation. At most one; nothing replaces it that isn't better.
    Active,
}

impl ArmKind {
    /// Whether its parameters were trained here.
    pub fn is_trained(self) -> bool {
        matches!(self, ArmKind::Trained | ArmKind::Baseline)
    }
}

/// The loss of one held-out example.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ExampleNll {
    /// Sum of cross-entropies over its targets, nats.
    pub sum: f64,
    /// Targets; the same for all arms.
    pub targets: usize,
}

/// What an arm forgot on one retention text, taken as a whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Retention {
    /// The text's name.
    pub text: String,
    /// NLL of the tuned model less that of the base, nats per token.
    pub delta_nll: f64,
    /// KL(tuned‖base), nats per token.
    pub kl: f64,
    /// For a task with answers, which of them are right.
    pub retained: Option<Retained>,
}

/// Which answers to a retention task are right, in the order of its questions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retained {
    /// The base's.
    pub before: Vec<bool>,
    /// The tuned model's.
    pub after: Vec<bool>,
}

/// An arm's measurements. Index i of all lists is held-out example i, in the same order for all arms.
#[derive(Clone, Debug, PartialEq)]
pub struct ArmResult {
    /// A name that no other arm has.
    pub name: String,
    /// What it is.
    pub kind: ArmKind,
    /// Losses per example.
    pub nll: Vec<ExampleNll>,
    /// Whether each example was solved, where the task can tell.
    pub correct: Option<Vec<bool>>,
    /// Forgetting; for trained arms, where it was measured.
    pub retention: Vec<Retention>,
    /// KL(tuned‖base) on the held-out examples, nats per token, where it was measured.
    pub task_kl: Option<f64>,
    /// The factor below 1 that a trained adapter's effect was held to.
    pub strength: Option<f64>,
}

impl ArmResult {
    /// Whether a loss isn't a number, so that the arm can't be judged.
    fn is_broken(&self) -> bool {
        self.nll.iter().any(|e| !e.sum.is_finite())
    }
}

/// Judges the arms. Equal arguments give equal verdicts, to the byte of [`Verdict::to_json`].
///
/// # Errors
/// `Misuse` for thresholds out of range, arms without exactly one zero-shot, equal names, or lists that
/// don't match; `BadData` for held-out data without a target; `NonFinite` when zero-shot has no finite
/// loss. A trained or few-shot arm without a finite loss isn't an error: it is turned down, and others
/// aren't compared with it.
pub fn judge(
    arms: &[ArmResult],
    leaks: &[Leak],
    thresholds: &Thresholds,
    binding: &Basis,
) -> Result<Verdict> {
    let zero = check_arms(arms)?;
    let trained = family(arms, |k| *k == ArmKind::Trained);
    let shots = family(arms, |k| matches!(k, ArmKind::FewShot { .. }));
    let baselines = family(arms, |k| *k == ArmKind::Baseline);
    let active = family(arms, |k| *k == ArmKind::Active);
    let sound = |members: &[usize]| -> Vec<usize> {
        members.iter().copied().filter(|arm| !arms[*arm].is_broken()).collect()
    };
    let in_place = [vec![zero], sound(&active)].concat();
    let rivals = [in_place.clone(), sound(&shots)].concat();

    let examples = arms[zero].nll.iter().filter(|e| e.targets > 0).count();
    let largest = trained.len().max(shots.len());
    check_thresholds(thresholds, largest)?;
    let held_out = HeldOut {
        examples,
        targets: arms[zero].nll.iter().map(|e| e.targets).sum(),
        examples_min: thresholds.examples_min.max(examples_min(thresholds.alpha, largest)),
        discordant_min: discordant_min(thresholds.alpha),
    };
    let court =
        Court { arms, thresholds, seed: binding.seed, zero, active: active.first().copied(), held_out };
    let mut reports: Vec<ArmReport> = arms.iter().map(|arm| report::measured(arm, &court)).collect();
    for (members, rivals) in
        [(&active, &vec![zero]), (&shots, &in_place), (&trained, &rivals), (&baselines, &rivals)]
    {
        for (arm, findings) in members.iter().zip(court.compare(members, rivals)) {
            court.weigh(*arm, findings, &mut reports[*arm]);
        }
    }
    Ok(choice::conclude(&court, reports, leaks, binding))
}

/// The indices of a kind of arms.
fn family(arms: &[ArmResult], is_member: impl Fn(&ArmKind) -> bool) -> Vec<usize> {
    (0..arms.len()).filter(|i| is_member(&arms[*i].kind)).collect()
}

/// Checks thresholds for `members` arms in the larger family. Call it before training, which may take hours.
///
/// # Errors
/// `Misuse`.
pub fn check_thresholds(t: &Thresholds, members: usize) -> Result<()> {
    let misuse = |what: &str| Err(Error::new(ErrorKind::Misuse, format!("the gate's thresholds: {what}")));
    if !(t.alpha > 0.0 && t.alpha < 1.0) {
        return misuse("alpha must lie between 0 and 1");
    }
    let ceilings = [t.retention_nll_max, t.retention_kl_max, t.task_kl_max.unwrap_or(0.0)];
    if !(t.improvement_min.is_finite() && t.improvement_min >= 0.0) {
        return misuse("the minimum improvement must be 0 or more");
    }
    if ceilings.iter().any(|c| c.is_nan()) {
        return misuse("a ceiling isn't a number");
    }
    if t.resamples == 0 || t.resamples > 1_000_000 {
        return misuse("resamples must be 1 to 1,000,000");
    }
    if t.alpha / (2.0 * members.max(1) as f64) * (t.resamples as f64 + 1.0) < 1.0 {
        let few = format!("{} resamples can't reach level {}", t.resamples, t.alpha);
        return misuse(&format!("{few} with {members} arms: use more"));
    }
    Ok(())
}

/// Returns the index of zero-shot.
fn check_arms(arms: &[ArmResult]) -> Result<usize> {
    let misuse = |what: String| Err(Error::new(ErrorKind::Misuse, format!("the gate's arms: {what}")));
    let zeros = family(arms, |k| *k == ArmKind::ZeroShot);
    let [zero] = zeros[..] else {
        return misuse(format!("{} of them are zero-shot; give exactly one", zeros.len()));
    };
    let base = &arms[zero];
    if family(arms, |k| *k == ArmKind::Active).len() > 1 {
        return misuse("two are in use; give at most one".into());
    }
    let mut names = HashSet::new();
    for arm in arms {
        if !names.insert(&arm.name) {
            return misuse(format!("two are named {}", arm.name));
        }
        if arm.kind == (ArmKind::FewShot { k: 0 }) {
            return misuse(format!("{} has no shots", arm.name));
        }
        let same = arm.nll.len() == base.nll.len()
            && arm.nll.iter().zip(&base.nll).all(|(a, b)| a.targets == b.targets);
        if !same {
            return misuse(format!("{} was not scored on the targets of {}", arm.name, base.name));
        }
        let unequal = |r: &Retention| r.retained.as_ref().is_some_and(|r| r.before.len() != r.after.len());
        if arm.retention.iter().any(unequal) {
            return misuse(format!("{} and its base answered different retention tasks", arm.name));
        }
        if arm.correct.as_ref().is_some_and(|c| c.len() != arm.nll.len()) {
            return misuse(format!(
                "{} answered a different number of examples than it was scored on",
                arm.name
            ));
        }
    }
    if base.nll.iter().all(|e| e.targets == 0) {
        return Err(Error::new(ErrorKind::BadData, "the held-out data has no target to score"));
    }
    match base.is_broken() {
        false => Ok(zero),
        true => Err(Error::new(ErrorKind::NonFinite, format!("the loss of {} isn't a number", base.name))),
    }
}

/// What all comparisons share.
struct Court<'a> {
    arms: &'a [ArmResult],
    thresholds: &'a Thresholds,
    seed: u64,
    zero: usize,
    /// What is in use, if anything is.
    active: Option<usize>,
    held_out: HeldOut,
}

/// An arm's comparisons, and its step in its family.
struct Findings {
    comparisons: Vec<Comparison>,
    adjusted: f64,
    won: bool,
}

impl Court<'_> {
    /// Compares each member of a family with all rivals, by Holm over the members.
    fn compare(&self, members: &[usize], rivals: &[usize]) -> Vec<Findings> {
        let against = |arm: usize| rivals.iter().map(move |r| self.bootstrap(arm, *r)).collect();
        let all: Vec<Vec<Option<Bootstrap>>> = members.iter().map(|arm| against(*arm)).collect();
        // An arm must beat all rivals: the intersection-union test takes the largest p-value.
        let p_of = |boot: &Option<Bootstrap>| boot.as_ref().map_or(1.0, Bootstrap::p_above_zero);
        let p: Vec<f64> = all.iter().map(|b| b.iter().map(p_of).fold(0.0, f64::max)).collect();
        let steps = holm(&p, self.thresholds.alpha);
        let findings = members.iter().zip(&all).zip(steps).map(|((arm, boots), step)| {
            let pairs = rivals.iter().zip(boots);
            let comparisons: Vec<_> =
                pairs.map(|(r, boot)| self.comparison(*arm, *r, boot.as_ref(), step.level)).collect();
            let won = step.rejected && comparisons.iter().all(|c| c.better);
            Findings { comparisons, adjusted: step.adjusted, won }
        });
        findings.collect()
    }

    /// The gain of an arm over a rival (the rival's loss minus the arm's, per token), minus the required
    /// improvement.
    fn bootstrap(&self, arm: usize, rival: usize) -> Option<Bootstrap> {
        let least = self.thresholds.improvement_min;
        let pair = |(a, r): (&ExampleNll, &ExampleNll)| {
            let targets = a.targets as f64;
            (r.sum - a.sum - least * targets, targets)
        };
        let pairs: Vec<_> = self.arms[arm].nll.iter().zip(&self.arms[rival].nll).map(pair).collect();
        Bootstrap::new(&pairs, self.thresholds.resamples, self.seed)
    }

    fn comparison(&self, arm: usize, rival: usize, boot: Option<&Bootstrap>, level: f64) -> Comparison {
        let (a, r) = (&self.arms[arm], &self.arms[rival]);
        // With several arms, accuracy is tested at the same Holm step as the loss.
        let accuracy = a.correct.as_ref().zip(r.correct.as_ref()).map(|(x, y)| self.paired(x, y, level));
        let mut c = Comparison::without_figures(&r.name, level, accuracy);
        let Some(boot) = boot else { return c };
        let least = self.thresholds.improvement_min;
        let (lower, upper) = boot.interval(level);
        // Harm is tested at the uncorrected level, against no change rather than the minimum improvement.
        let harm_upper = boot.interval(self.thresholds.alpha).1 + least;
        c.gain = finite(boot.mean() + least);
        (c.lower, c.upper) = (finite(lower + least), finite(upper + least));
        c.p = boot.p_above_zero();
        c.better = lower > 0.0 && lower.is_finite();
        c.worse = harm_upper < 0.0;
        c.examples_to_decide = to_decide(boot.mean(), (lower, upper), self.held_out.examples);
        c
    }

    /// McNemar's test of an arm's right answers against a rival's: better at `level`, worse at the
    /// uncorrected level.
    fn paired(&self, arm: &[bool], rival: &[bool], level: f64) -> Accuracy {
        let test = McNemar::new(arm, rival);
        Accuracy {
            only_arm: test.only_first,
            only_rival: test.only_second,
            p_exact: test.p_exact,
            p_mid: test.p_mid,
            decidable: test.discordant() >= self.held_out.discordant_min,
            examples_to_decide: test.examples_to_decide(arm.len(), level),
            better: test.p_mid <= level && test.only_first > test.only_second,
            worse: test.p_mid <= self.thresholds.alpha && test.only_first < test.only_second,
        }
    }

    /// Turns an arm's comparisons and forgetting into reasons, and decides whether it may win.
    fn weigh(&self, arm: usize, findings: Findings, report: &mut ArmReport) {
        let (result, t) = (&self.arms[arm], self.thresholds);
        let mut sound = findings.won;
        let broken = result.is_broken();
        if broken {
            report.reasons.push(format!("{} is broken: its held-out loss isn't a number.", result.name));
        }
        for c in findings.comparisons.iter().filter(|_| !broken) {
            let rival_is_zero = c.against == self.arms[self.zero].name;
            report.reasons.push(report::sentence(&result.name, c, result.kind, rival_is_zero));
            if !c.better && !c.worse {
                report.undecided.push(report::undecided(&result.name, c));
            }
            let harm = c.worse || c.accuracy.is_some_and(|a| a.worse);
            report.negative_transfer |= harm && rival_is_zero && result.kind.is_trained();
        }
        for c in &findings.comparisons {
            let Some(a) = c.accuracy else { continue };
            report.reasons.push(report::accuracy_sentence(&result.name, &c.against, &a, &self.held_out));
            sound &= !a.worse && !self.falls_behind(c);
            let must_gain = t.accuracy_required && c.against == self.arms[self.zero].name;
            if must_gain && !a.better && !a.worse {
                report.undecided.push(report::no_more_solved(&result.name, &c.against, &a));
                sound = false;
            }
        }
        if findings.comparisons.iter().all(|c| c.better) && !findings.won {
            report.reasons.push(format!(
                "{} beats its rivals alone, but not after Holm's correction: adjusted p = {:.4}.",
                result.name, findings.adjusted
            ));
        }
        match result.kind {
            ArmKind::Trained | ArmKind::Baseline => {
                sound &= report::forgetting(result, t, report);
                sound &= self.beside_few_shot(&result.name, report);
            }
            // It needn't win anything to stay.
            ArmKind::Active => sound = true,
            ArmKind::ZeroShot | ArmKind::FewShot { .. } => {}
        }
        if let Some(factor) = result.strength {
            let why = "the largest tried at which ordinary text stays within the ceilings";
            report.reasons.push(format!("{} acts at {factor:.2} of its full strength, {why}.", result.name));
        }
        if result.kind == ArmKind::Baseline {
            report
                .reasons
                .push(format!("{} is a baseline: it is measured, and never promoted.", result.name));
            sound = false;
        }
        report.adjusted_p = Some(findings.adjusted);
        report.comparisons = findings.comparisons;
        report.eligible = sound && !broken;
    }

    /// Whether an arm answers fewer examples right than what is in use, be it by chance: what works isn't replaced
    /// for a lower loss.
    fn falls_behind(&self, c: &Comparison) -> bool {
        let is_active = self.active.is_some_and(|active| self.arms[active].name == c.against);
        is_active && c.accuracy.is_some_and(|a| a.only_arm < a.only_rival)
    }

    /// Adds which few-shot arms a trained one wasn't compared with, and returns whether enough are left.
    fn beside_few_shot(&self, name: &str, report: &mut ArmReport) -> bool {
        let shots = || self.arms.iter().filter(|a| matches!(a.kind, ArmKind::FewShot { .. }));
        for shot in shots().filter(|a| a.is_broken()) {
            let problem = "its held-out loss isn't a number";
            report.reasons.push(format!("{name} isn't compared with {}: {problem}.", shot.name));
        }
        if !self.thresholds.few_shot_required || shots().any(|a| !a.is_broken()) {
            return true;
        }
        let why = match shots().next() {
            None => "Few-shot prompting wasn't measured",
            Some(_) => "No few-shot arm has a finite loss",
        };
        report.undecided.push(format!("{why}, so nothing shows that {name} is needed."));
        false
    }
}

/// `None` for values that JSON can't write as a number.
fn finite(x: f64) -> Option<f64> {
    x.is_finite().then_some(x)
}

/// About how many examples it takes for the interval around this mean to exclude 0: its width falls
/// with √n.
fn to_decide(mean: f64, (lower, upper): (f64, f64), examples: usize) -> Option<u64> {
    let towards_zero = if mean > 0.0 { mean - lower } else { upper - mean };
    let ratio = towards_zero / mean.abs();
    let needed = examples as f64 * ratio * ratio;
    (needed.is_finite() && needed < 1e12).then(|| needed.ceil().max(1.0) as u64)
}

#[cfg(test)]
mod tests;
