//! How strongly an adapter acts. Its change of the weights, multiplied by a factor below 1, forgets less and mostly
//! keeps what it learned (Wortsman et al., arXiv 2109.01903, on whole weights), at the price of some forward passes.

use super::panel::Panel;
use super::score::Subject;
use crate::adapter::Adapter;
use crate::data::Example;
use crate::error::Result;
use crate::nn::divergence::Direction;
use crate::run::general::Aside;

/// Factors to choose from, ascending.
const FACTORS: [f32; 7] = [0.2, 0.35, 0.5, 0.6, 0.7, 0.85, 1.0];
/// Share of the gate's ceilings that may be used up on the rows set aside: the gate judges by other text.
pub(super) const MARGIN: f64 = 0.8;

/// An adapter as strong as may be.
pub(super) struct Weakened {
    /// The adapter, whose alpha has the factor.
    pub(super) adapter: Adapter,
    /// The factor.
    pub(super) factor: f32,
    /// Whether it forgets little enough so.
    pub(super) is_tolerable: bool,
}

/// Chooses the largest factor whose forgetting on the rows set aside stays within the gate's ceilings, or
/// the smallest there is, and puts it into the adapter's alpha. Where forgetting isn't judged, and for a DoRA, whose
/// magnitudes don't shrink with the factor, it is 1.
///
/// # Errors
/// `Cancelled`; `DoesNotFit`; those of scoring.
pub(super) fn choose(panel: &mut Panel<'_>, adapter: Adapter, name: &str) -> Result<Weakened> {
    let contest = panel.contest;
    let is_judged = contest.thresholds.retention_nll_max.is_finite();
    if contest.aside.is_empty() || adapter.config.dora || !is_judged {
        return Ok(Weakened { adapter, factor: 1.0, is_tolerable: true });
    }
    let mut alone = [(adapter, 1.0)];
    // Factors below `low` are tolerable, those from `high` on aren't: forgetting grows with the factor. Most often the
    // first question, whether all of it is, settles it.
    let (mut low, mut high, mut at) = (0, FACTORS.len(), FACTORS.len() - 1);
    while low < high {
        alone[0].1 = FACTORS[at];
        let subject = panel.subject(Some(panel.base.stack(&alone)?));
        match is_tolerable(panel, &subject, (name, FACTORS[at]))? {
            true => low = at + 1,
            false => high = at,
        }
        at = low + (high - low) / 2;
    }
    let [(mut adapter, _)] = alone;
    let factor = FACTORS[low.saturating_sub(1)];
    adapter.config.scale_alpha(factor);
    if factor < 1.0 {
        let why = "at more it forgets too much of what the model knew";
        panel.observer.note(&format!("{name}: acts at {factor} of its full strength: {why}"));
    }
    Ok(Weakened { adapter, factor, is_tolerable: low > 0 })
}

/// Whether a tuned model's forgetting on all rows set aside is well within the gate's ceilings.
fn is_tolerable(panel: &mut Panel<'_>, subject: &Subject, (name, factor): (&str, f32)) -> Result<bool> {
    let (base, thresholds) = (panel.subject(None), &panel.contest.thresholds);
    let mut all_within = true;
    for Aside { rows, name: set } in &panel.contest.aside {
        panel.check(name, subject.beside_bytes(rows.iter().map(Example::rows).max().unwrap_or(1)))?;
        let found = subject.beside(&base, rows, panel.observer)?;
        let n = found.targets as f64;
        let (delta_nll, kl) = ((found.loss - found.base_loss) / n, found.kl(Direction::Reverse) / n);
        panel.observer.note(&format!(
            "{name} at {factor} of its strength: on {set} the loss changed by {delta_nll:+.4}, KL(tuned‖base) {kl:.4}"
        ));
        // Not a number counts as above every ceiling.
        all_within &=
            delta_nll <= MARGIN * thresholds.retention_nll_max && kl <= MARGIN * thresholds.retention_kl_max;
    }
    Ok(all_within)
}
