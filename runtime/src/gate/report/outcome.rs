//! What a verdict means for each arm, in a few words.

use super::super::verdict::{Accuracy, ArmKind, ArmReport, Comparison, Decision, RetentionReport, Verdict};
use super::{Report, show};

impl Report {
    /// Model and task, as far as they have names.
    pub(super) fn heading(&self) -> String {
        let model = if self.model.name.is_empty() { &self.model.file } else { &self.model.name };
        let task = self.data.task.as_deref().unwrap_or(&self.data.source);
        let parts = [self.title.as_str(), model, task].map(show::one_line);
        parts.into_iter().filter(|p| !p.is_empty()).collect::<Vec<_>>().join(" · ")
    }

    /// All reasons, by arm, then what was undecided and what leaked.
    pub(super) fn reasons(&self) -> Vec<(String, Vec<String>)> {
        let v = &self.verdict;
        let of_arm = |r: &String| v.arms.iter().any(|a| a.reasons.contains(r));
        let general: Vec<String> =
            v.reasons.iter().filter(|r| **r != v.sentence && !of_arm(r)).cloned().collect();
        let mut groups = vec![("In general".to_string(), general)];
        groups.extend(v.arms.iter().map(|a| (show::one_line(&a.name), a.reasons.clone())));
        groups.push(("Undecided".to_string(), v.undecided.clone()));
        let how = |exact: bool| if exact { "equals" } else { "nearly equals" };
        let mut leaks: Vec<String> =
            v.leaks.iter().map(|l| format!("{} {} {}", l.held_out, how(l.exact), l.train)).collect();
        if v.leak_count > v.leaks.len() {
            leaks.push(format!("and {} more", show::count((v.leak_count - v.leaks.len()) as u64)));
        }
        groups.push(("Held-out rows in the training data".to_string(), leaks));
        groups.retain(|(_, reasons)| !reasons.is_empty());
        groups
    }
}

/// The name of the chosen arm; empty for a verdict without zero-shot.
pub(super) fn chosen(verdict: &Verdict) -> &str {
    match &verdict.decision {
        Decision::Promote { arm } | Decision::KeepPrompting { arm, .. } | Decision::KeepActive { arm } => arm,
        Decision::KeepBase => zero_shot(verdict).unwrap_or_default(),
    }
}

/// The name of the base alone.
pub(super) fn zero_shot(verdict: &Verdict) -> Option<&str> {
    verdict.arms.iter().find(|a| a.kind == ArmKind::ZeroShot).map(|a| a.name.as_str())
}

/// The rivals that arms were compared with: zero-shot first.
pub(super) fn rivals(verdict: &Verdict) -> Vec<&str> {
    let mut found: Vec<&str> = zero_shot(verdict).into_iter().collect();
    for c in verdict.arms.iter().flat_map(|a| &a.comparisons) {
        if !found.contains(&c.against.as_str()) {
            found.push(&c.against);
        }
    }
    found
}

/// How an arm stands, and why.
pub(super) fn outcome(verdict: &Verdict, arm: &ArmReport) -> String {
    if arm.name == chosen(verdict) {
        return match arm.kind {
            ArmKind::Trained | ArmKind::Baseline => "promoted".into(),
            ArmKind::FewShot { k } => format!("kept, with its {k} examples"),
            ArmKind::ZeroShot | ArmKind::Active => "kept".into(),
        };
    }
    match arm.kind {
        ArmKind::ZeroShot => return "what the others must beat".into(),
        ArmKind::Active if arm.eligible => return "in use until now".into(),
        _ => {}
    }
    if verdict.leak_count > 0 {
        return "void: held-out rows leaked".into();
    }
    if verdict.held_out.examples < verdict.held_out.examples_min {
        return "undecided: too few held-out examples".into();
    }
    if arm.eligible {
        return "eligible, not the best".into();
    }
    let mut why = refusals(verdict, arm);
    if why.is_empty() {
        why.push("not eligible".into());
    }
    if arm.negative_transfer {
        why[0] = format!("negative transfer: {}", why[0]);
    }
    why.join("; ")
}

/// What kept an arm from being chosen.
fn refusals(verdict: &Verdict, arm: &ArmReport) -> Vec<String> {
    if arm.nll.is_none() {
        return vec!["its loss isn't a number".into()];
    }
    let mut why = Vec::new();
    for c in arm.comparisons.iter().filter(|c| !c.better) {
        why.push(format!("{} {}", if c.worse { "worse than" } else { "doesn't beat" }, c.against));
    }
    let active = verdict.arms.iter().find(|a| a.kind == ArmKind::Active).map(|a| a.name.as_str());
    let is_behind = |c: &Comparison| {
        let fewer = Some(c.against.as_str()) == active;
        c.accuracy.is_some_and(|a| a.worse || fewer && a.only_arm < a.only_rival)
    };
    for c in arm.comparisons.iter().filter(|c| is_behind(c)) {
        why.push(format!("less accurate than {}", c.against));
    }
    if solves_no_more(verdict, arm) {
        why.push("not shown to solve more than zero-shot".into());
    }
    let level = verdict.thresholds.alpha;
    if arm.comparisons.iter().all(|c| c.better) && arm.adjusted_p.is_some_and(|p| p > level) {
        why.push("doesn't win after Holm's correction".into());
    }
    if arm.kind.is_trained() {
        why.extend(forgotten(verdict, arm));
        let is_few = |a: &ArmReport| matches!(a.kind, ArmKind::FewShot { .. }) && a.nll.is_some();
        if verdict.thresholds.few_shot_required && !verdict.arms.iter().any(is_few) {
            why.push("no few-shot arm to compare with".into());
        }
    }
    if arm.kind == ArmKind::Baseline {
        why.push("only a baseline".into());
    }
    why
}

/// Whether an arm's answers must be better than zero-shot's, but are neither better nor worse.
pub(super) fn solves_no_more(verdict: &Verdict, arm: &ArmReport) -> bool {
    let answers = beside_zero_shot(verdict, arm);
    verdict.thresholds.accuracy_required && answers.is_some_and(|a| !a.better && !a.worse)
}

/// An arm's answers against zero-shot's.
pub(super) fn beside_zero_shot(verdict: &Verdict, arm: &ArmReport) -> Option<Accuracy> {
    let zero = zero_shot(verdict);
    arm.comparisons.iter().find(|c| Some(c.against.as_str()) == zero)?.accuracy
}

/// Where a trained arm exceeds its ceilings for forgetting.
pub(super) fn forgotten(verdict: &Verdict, arm: &ArmReport) -> Vec<String> {
    let t = &verdict.thresholds;
    if arm.retention.is_empty() {
        return vec!["forgetting wasn't measured".into()];
    }
    let mut why = Vec::new();
    let above = |x: Option<f64>, ceiling: f64| x.is_none_or(|x| x.is_nan() || x > ceiling);
    let mut tell = |what: &str, ceiling: f64, figure: fn(&RetentionReport) -> Option<f64>| {
        let texts = arm.retention.iter().filter(|r| above(figure(r), ceiling)).map(|r| r.text.as_str());
        let texts = texts.collect::<Vec<_>>().join(", ");
        if !texts.is_empty() {
            why.push(format!("{what} above {} on {texts}", show::number(ceiling)));
        }
    };
    tell("forgets: ΔNLL", t.retention_nll_max, |r| r.delta_nll);
    tell("drifts: KL", t.retention_kl_max, |r| r.kl);
    let lost = |r: &&RetentionReport| r.retained.is_some_and(|r| r.paired.worse);
    let lost: Vec<&str> = arm.retention.iter().filter(lost).map(|r| r.text.as_str()).collect();
    if !lost.is_empty() {
        why.push(format!("forgets: fewer right answers on {}", lost.join(", ")));
    }
    if let Some(ceiling) = t.task_kl_max.filter(|c| above(arm.task_kl, *c)) {
        why.push(format!("drifts: KL on the task above {}", show::number(ceiling)));
    }
    why
}

/// The warning above the arms' figures when rows leaked.
pub(super) fn caveat(verdict: &Verdict) -> Option<&'static str> {
    (verdict.leak_count > 0).then_some("Rows leaked: no figure here means anything, however good it looks.")
}

/// Short warnings that nobody should miss.
pub(super) fn warnings(verdict: &Verdict) -> Vec<String> {
    let mut found = Vec::new();
    match verdict.leak_count {
        0 => {}
        1 => found.push("Leak: 1 held-out row is in the training data".to_string()),
        n => found.push(format!("Leak: {n} held-out rows are in the training data")),
    }
    let harmed: Vec<&str> =
        verdict.arms.iter().filter(|a| a.negative_transfer).map(|a| a.name.as_str()).collect();
    if !harmed.is_empty() {
        found.push(format!("Negative transfer: {}", harmed.join(", ")));
    }
    match verdict.undecided.len() {
        0 => {}
        1 => found.push("Undecided: 1 question".to_string()),
        n => found.push(format!("Undecided: {n} questions")),
    }
    found
}
