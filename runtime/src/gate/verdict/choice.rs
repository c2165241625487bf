//! The decision, and the sentence that says it in plain words. Figures stand in the reasons.

use super::report::{ArmReport, Basis, Decision, LEAKS_NAMED_MAX, SCHEMA, Verdict};
use super::{ArmKind, Court};
use crate::gate::leak::Leak;

/// How each sentence begins when the base stays.
const BASE_STAYS: &str = "Nothing promoted, the model stays as it is";
/// How it begins when something is in use.
const ACTIVE_STAYS: &str = "Nothing promoted, what is in use stays";
/// Arms that the sentence says something about; the reasons name the others.
const ARMS_TOLD: usize = 3;

/// Chooses an arm and says why.
pub(super) fn conclude(court: &Court<'_>, arms: Vec<ArmReport>, leaks: &[Leak], binding: &Basis) -> Verdict {
    let held_out = court.held_out;
    let mut undecided: Vec<String> = Vec::new();
    let (unchanged, stays) = unchanged(court);
    let (decision, sentence) = if let Some(first) = leaks.first() {
        (unchanged, leak_sentence(stays, first, leaks.len()))
    } else if held_out.examples < held_out.examples_min {
        let sentence = format!(
            "{stays}: {} held-out examples are too few to decide; at least {} are needed.",
            held_out.examples, held_out.examples_min
        );
        undecided.push(sentence.clone());
        (unchanged, sentence)
    } else {
        choose(court, &arms)
    };
    if !matches!(decision, Decision::Promote { .. }) {
        undecided.extend(arms.iter().filter(|a| !a.eligible).flat_map(|a| a.undecided.iter().cloned()));
    }
    let reasons =
        std::iter::once(sentence.clone()).chain(arms.iter().flat_map(|a| a.reasons.iter().cloned()));
    Verdict {
        schema: SCHEMA,
        decision,
        reasons: reasons.collect(),
        sentence,
        undecided,
        leak_count: leaks.len(),
        leaks: leaks.iter().take(LEAKS_NAMED_MAX).cloned().collect(),
        held_out,
        arms,
        thresholds: *court.thresholds,
        binding: binding.clone(),
    }
}

/// The decision that changes nothing, and how its sentence begins.
fn unchanged(court: &Court<'_>) -> (Decision, &'static str) {
    match court.active.map(|active| &court.arms[active]).filter(|active| !active.is_broken()) {
        Some(active) => (Decision::KeepActive { arm: active.name.clone() }, ACTIVE_STAYS),
        None => (Decision::KeepBase, BASE_STAYS),
    }
}

fn leak_sentence(stays: &str, first: &Leak, count: usize) -> String {
    let how = if first.exact { "equals" } else { "nearly equals" };
    let rows = if count == 1 { "row is" } else { "rows are" };
    format!(
        "{stays}: {count} held-out {rows} in the training data ({} {how} {}), so no figure can be trusted.",
        first.held_out, first.train
    )
}

/// The eligible trained arm that answers most right (of equals, or where answers aren't judged, the one with the
/// lowest loss), else the few-shot arm by the same rule, else what is in use or the base. Ties go to the arm given
/// first.
fn choose(court: &Court<'_>, arms: &[ArmReport]) -> (Decision, String) {
    let best = |is_member: &dyn Fn(&ArmKind) -> bool| {
        let members = arms.iter().filter(|a| a.eligible && is_member(&a.kind));
        let loss = |a: &ArmReport| a.nll.unwrap_or(f64::INFINITY);
        let right = |a: &ArmReport| solved(court, &a.name).map_or(0, |(right, _)| right);
        members.min_by(|a, b| right(b).cmp(&right(a)).then(loss(a).total_cmp(&loss(b))))
    };
    if let Some(arm) = best(&|k| *k == ArmKind::Trained) {
        return (Decision::Promote { arm: arm.name.clone() }, promoted(court, arm));
    }
    let trained = arms.iter().any(|a| a.kind.is_trained());
    if let Some(arm) = best(&|k| matches!(k, ArmKind::FewShot { .. }))
        && let ArmKind::FewShot { k } = arm.kind
    {
        let others = if trained { "no trained arm passed the gate" } else { "no arm was trained" };
        let sentence =
            format!("Keep prompting: the model does better with {k} examples in its prompt, and {others}.");
        return (Decision::KeepPrompting { arm: arm.name.clone(), k }, sentence);
    }
    let turned_down = |a: &&ArmReport| match trained {
        true => a.kind.is_trained(),
        false => matches!(a.kind, ArmKind::FewShot { .. }),
    };
    let mut why: Vec<String> = arms.iter().filter(turned_down).map(|a| obstacle(court, a)).collect();
    if why.is_empty() {
        why.push("there is nothing to compare it with".into());
    }
    why.truncate(ARMS_TOLD);
    let (unchanged, stays) = unchanged(court);
    (unchanged, format!("{stays}: {}.", why.join("; ")))
}

fn promoted(court: &Court<'_>, arm: &ArmReport) -> String {
    let (name, zero) = (&arm.name, &court.arms[court.zero].name);
    match (solved(court, name), solved(court, zero)) {
        (Some((right, all)), Some((before, _))) if right > before => format!(
            "Promoted: {name} answers {right} of {all} held-out examples right; the model alone answers {before}.{}",
            ordinary_text(arm)
        ),
        _ => {
            let prompted = arm.comparisons.iter().any(|c| c.against != *zero);
            let prompted = if prompted { ", with or without examples in its prompt" } else { "" };
            let ordinary = ordinary_text(arm);
            format!(
                "Promoted: {name} predicts the held-out text better than the model alone{prompted}.{ordinary}"
            )
        }
    }
}

/// What became of ordinary text, in words, by the retention text that suffered most; empty where none was measured.
fn ordinary_text(arm: &ArmReport) -> String {
    match arm.retention.iter().map(|r| worse_percent(r.delta_nll)).reduce(f64::max) {
        None => String::new(),
        Some(worse) if worse < 0.5 => " It writes ordinary text as well as before.".into(),
        Some(worse) => format!(" It writes ordinary text about {worse:.0} % worse than before."),
    }
}

/// A change of NLL, nats per token, as the percentage by which perplexity rises.
fn worse_percent(delta_nll: Option<f64>) -> f64 {
    100.0 * delta_nll.map_or(f64::INFINITY, f64::exp_m1)
}

/// How many examples an arm solved, and of how many, where its answers were judged.
fn solved(court: &Court<'_>, name: &str) -> Option<(usize, usize)> {
    let correct = court.arms.iter().find(|a| a.name == name)?.correct.as_ref()?;
    Some((correct.iter().filter(|c| **c).count(), correct.len()))
}

/// What kept an arm from being chosen: the plainest of its reasons, without figures.
fn obstacle(court: &Court<'_>, arm: &ArmReport) -> String {
    let name = &arm.name;
    let zero = &court.arms[court.zero].name;
    let few_shot = |a: &super::ArmResult| matches!(a.kind, ArmKind::FewShot { .. }) && !a.is_broken();
    let answers = arm.comparisons.iter().find(|c| c.against == *zero).and_then(|c| c.accuracy);
    let behind = arm.comparisons.iter().find(|c| !c.better);
    let fewer = arm.comparisons.iter().find(|c| c.accuracy.is_some_and(|a| a.worse) || court.falls_behind(c));
    let active = court.active.map(|active| court.arms[active].name.as_str());
    let rival = |against: &str| match () {
        () if against == zero => "the model alone",
        () if Some(against) == active => "what is in use",
        () => "examples in the prompt",
    };
    if arm.nll.is_none() {
        return format!("the loss of {name} isn't a number");
    }
    if arm.negative_transfer {
        return format!("{name} does worse than the model alone");
    }
    if let Some(c) = behind {
        return format!("{name} isn't shown to do better than {}", rival(&c.against));
    }
    if let Some(c) = fewer {
        return format!("{name} answers fewer examples right than {}", rival(&c.against));
    }
    if court.thresholds.accuracy_required && answers.is_some_and(|a| !a.better) {
        return format!("{name} isn't shown to answer more examples right than the model alone");
    }
    if arm.adjusted_p.is_some_and(|p| p > court.thresholds.alpha) {
        return format!("{name} leads by too little for so many arms");
    }
    if court.thresholds.few_shot_required && !court.arms.iter().any(few_shot) {
        return format!("{name} wasn't compared with examples in the prompt");
    }
    if arm.kind == ArmKind::Baseline {
        return format!("{name} is only a baseline");
    }
    let ceiling = court.thresholds.retention_nll_max;
    match arm.retention.iter().map(|r| worse_percent(r.delta_nll)).reduce(f64::max) {
        None => format!("what {name} forgets wasn't measured"),
        Some(worse) if worse > worse_percent(Some(ceiling)) && worse < 1e3 => format!(
            "{name} forgets too much of what the model knew: it writes ordinary text about {worse:.1} % worse, and \
             {:.1} % are allowed",
            worse_percent(Some(ceiling))
        ),
        Some(_) => format!("{name} forgets too much of what the model knew"),
    }
}
