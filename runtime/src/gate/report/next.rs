//! What a verdict leaves to do: as data, so that a target can put it into a command, and in words.

use super::super::statistics::REACH;
use super::super::verdict::{ArmReport, Decision, Verdict};
use super::outcome::{beside_zero_shot, forgotten, solves_no_more};
use super::{Report, show};

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Held-out rows are training rows, too: keep them apart.
    SplitApart,
    /// Use what this arm trained.
    Use {
        /// Its name.
        arm: String,
    },
    /// Put this many examples before every question.
    Prompt {
        /// Their number.
        k: usize,
        /// About how many held-out rows could decide whether training does better.
        rows: Option<u64>,
    },
    /// Hold out at least this many rows.
    HoldOut(usize),
    /// An arm learned the task but forgot too much.
    KeepMore {
        /// Its name.
        arm: String,
    },
    /// Training did harm.
    Gentler,
    /// An arm learned the answers' form and gives no more right ones.
    MoreAnswers {
        /// Its name.
        arm: String,
        /// About how many held-out rows would show a lead of the size that it has, if it has one.
        rows: Option<u64>,
    },
    /// Train longer or on more, and hold out about so many rows, if that would decide.
    More {
        /// Held-out rows.
        rows: Option<u64>,
    },
}

impl Report {
    /// What to do next.
    pub fn next(&self) -> Next {
        next(&self.verdict)
    }

    /// The same in one or two sentences.
    pub fn next_step(&self) -> String {
        self.next().words(&self.model.file)
    }
}

pub(super) fn next(verdict: &Verdict) -> Next {
    let too_few = verdict.held_out.examples < verdict.held_out.examples_min;
    match &verdict.decision {
        _ if verdict.leak_count > 0 => Next::SplitApart,
        Decision::Promote { arm } => Next::Use { arm: arm.clone() },
        Decision::KeepPrompting { k, .. } => Next::Prompt { k: *k, rows: more_rows(verdict) },
        Decision::KeepActive { .. } | Decision::KeepBase if too_few => {
            Next::HoldOut(verdict.held_out.examples_min)
        }
        Decision::KeepActive { .. } | Decision::KeepBase => after_refusal(verdict),
    }
}

fn after_refusal(verdict: &Verdict) -> Next {
    let trained = || verdict.arms.iter().filter(|a| a.kind.is_trained());
    let has_won = |a: &ArmReport| !a.comparisons.is_empty() && a.comparisons.iter().all(|c| c.better);
    let only_forgets =
        |a: &&ArmReport| has_won(a) && !a.retention.is_empty() && !forgotten(verdict, a).is_empty();
    if let Some(arm) = trained().find(only_forgets) {
        return Next::KeepMore { arm: arm.name.clone() };
    }
    if trained().any(|a| a.negative_transfer || a.nll.is_none()) {
        return Next::Gentler;
    }
    let learned_a_form =
        |a: &&ArmReport| a.comparisons.iter().all(|c| c.better) && solves_no_more(verdict, a);
    if let Some(arm) = trained().find(learned_a_form) {
        let rows = beside_zero_shot(verdict, arm).and_then(|a| a.examples_to_decide);
        return Next::MoreAnswers { arm: arm.name.clone(), rows };
    }
    Next::More { rows: more_rows(verdict) }
}

/// The fewest held-out rows that may decide one of the open comparisons. `None` when it takes more than
/// [`REACH`] times the rows at hand, which would be useless advice.
fn more_rows(verdict: &Verdict) -> Option<u64> {
    let reach = REACH * verdict.held_out.examples as u64;
    let open = verdict.arms.iter().flat_map(|a| &a.comparisons).filter(|c| !c.better && !c.worse);
    let needed = open.filter(|c| c.gain.is_some_and(|g| g > 0.0)).filter_map(|c| c.examples_to_decide);
    needed.min().filter(|n| *n <= reach)
}

impl Next {
    /// In one or two sentences; `model` is the base's file.
    pub fn words(&self, model: &str) -> String {
        match self {
            Next::SplitApart => {
                "Split the data so that no held-out row is also a training row, then compare again.".into()
            }
            Next::Use { arm } => {
                format!("Use {arm} with {model}: it is in the store, or in the arm's folder.")
            }
            Next::Prompt { k, rows } => {
                let open = rows.map(|n| {
                    let n = show::count(n);
                    format!(" About {n} held-out rows could decide whether training does better.")
                });
                format!("Put the same {k} examples before each question.{}", open.unwrap_or_default())
            }
            Next::HoldOut(least) => format!("Hold out at least {least} examples, then compare again."),
            Next::KeepMore { arm } => format!(
                "{arm} learned the task but forgot too much. Try fewer steps, a lower learning rate, general rows \
                 replayed among yours, or a penalty on moving away from the base."
            ),
            Next::Gentler => "Training did harm. Try a lower learning rate, fewer steps or more data.".into(),
            Next::MoreAnswers { arm, rows } => {
                let how = match rows {
                    Some(n) => format!(
                        "About {} held-out rows would show a lead of this size; more training data or more minutes \
                         may widen it.",
                        show::count(*n)
                    ),
                    None => "There is no lead that more held-out rows could show: it takes more rows to train on, or \
                             more minutes."
                        .to_string(),
                };
                format!(
                    "{arm} makes the right answers likelier but isn't shown to give more of them. {how} Or let the \
                     loss alone decide."
                )
            }
            Next::More { rows: Some(n) } => format!(
                "Hold out more rows: about {} could decide. More training data may help, too.",
                show::count(*n)
            ),
            Next::More { rows: None } => {
                "Try more training data, more steps, or examples in the prompt.".into()
            }
        }
    }
}
