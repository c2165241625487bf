//! Few rows: each is held out once, and trained on in all other turns (k-fold cross-validation, Stone 1974). What is
//! promoted is then trained on all of them: the turns judge the way of training, not one of their own adapters.

use std::path::Path;

use super::Contest;
use super::answers::Question;
use super::clock::Clock;
use super::facts::Measured;
use super::material::Material;
use super::panel::{Arm, Panel};
use super::train::TURN;
use crate::data::DataOptions;
use crate::error::Result;
use crate::model::text::Text;
use crate::run::{Base, Observer};

/// Measures all arms in turns, one for each fold, then makes once more what would be kept, on all rows. Returns the
/// arms and the questions that their samples answer.
///
/// # Errors
/// Those of training and scoring.
pub(super) fn measured(
    base: &Base,
    material: &Material,
    (text, options): (&Text, &DataOptions),
    contest: &Contest,
    (observer, clock): (&mut dyn Observer, &Clock),
) -> Result<(Vec<Measured>, Vec<Question>)> {
    let (mut arms, mut questions) = (Vec::new(), Vec::new());
    for (turn, fold) in material.folds.iter().enumerate() {
        observer.note(&format!("turn {} of {}", turn + 1, material.folds.len()));
        let contest = in_turn(contest, turn);
        let mut panel = Panel::new(base, fold, (text, options), &contest, (observer, clock));
        for (i, arm) in Arm::of(&contest).iter().enumerate() {
            // What it would leave has not seen all rows.
            let found = Measured { kept: None, ..panel.measured(arm)? };
            match arms.get_mut(i) {
                None => arms.push(found),
                Some(so_far) => join(so_far, found),
            }
        }
        if turn == 0 {
            questions = panel.questions;
        }
    }
    observer.note("on all rows");
    let mut panel = Panel::new(base, material, (text, options), contest, (observer, clock));
    for (arm, measured) in Arm::of(contest).iter().zip(&mut arms) {
        let made = panel.made(arm)?;
        if made.is_tuned {
            panel.forgetting(&made.subject, &mut measured.result)?;
        }
        made.left_to(measured);
    }
    Ok((arms, questions))
}

/// Of so many rows set aside, one is read in a turn: all of them would take longer than a turn's training.
const THINNED: usize = 4;

/// The contest of one turn: what arms forget is measured on those that are kept.
fn in_turn(contest: &Contest, turn: usize) -> Contest {
    let within = |folder: &Path| folder.join(format!("{TURN}{}", turn + 1));
    Contest {
        retention: Vec::new(),
        aside: contest.aside.iter().map(|set| set.thinned(THINNED)).collect(),
        // Only the first turn's answers are shown.
        samples: if turn == 0 { contest.samples } else { 0 },
        folder: None,
        unfinished: contest.unfinished.as_deref().map(within),
        ..contest.clone()
    }
}

/// Adds the figures of another turn's rows.
fn join(so_far: &mut Measured, found: Measured) {
    so_far.result.nll.extend(found.result.nll);
    if let (Some(all), Some(more)) = (&mut so_far.result.correct, found.result.correct) {
        all.extend(more);
    }
    let (all, more) = (&mut so_far.scoring, found.scoring);
    all.prefix_tokens = all.prefix_tokens.max(more.prefix_tokens);
    all.tokens += more.tokens;
    all.nll_seconds += more.nll_seconds;
    all.generated_tokens += more.generated_tokens;
    all.generate_seconds += more.generate_seconds;
}
