//! The demo's results, for people and machines.

use std::path::Path;

use engraft_runtime::compare::{Outcome, ZERO_SHOT};
use engraft_runtime::error::{Error, ErrorKind, Result};
use engraft_runtime::gate::store::Generation;
use engraft_runtime::gate::verdict::{ArmKind, ArmReport, RetainedReport};
use serde::Serialize;

use super::{FULL, FULL_RATE, LORA};
use crate::json;

/// What an arm kept of the everyday commands.
fn kept(arm: &ArmReport) -> Result<RetainedReport> {
    let missing = || Error::new(ErrorKind::Misuse, "the demo's verdict lacks the everyday commands");
    arm.retention.first().and_then(|r| r.retained).ok_or_else(missing)
}

/// Shares of the everyday commands answered exactly: by the base, and by this arm.
fn everyday(arm: &ArmReport) -> Result<(f64, f64)> {
    let found = kept(arm)?;
    Ok((found.before, found.after))
}

/// A share as a count.
fn count(share: f64, all: usize) -> usize {
    (share * all as f64).round() as usize
}

/// All results.
pub(super) struct Measured<'a> {
    pub(super) outcome: &'a Outcome,
    pub(super) seconds: f64,
}

impl Measured<'_> {
    fn arm(&self, is_it: impl Fn(&ArmReport) -> bool) -> Result<&ArmReport> {
        let missing = || Error::new(ErrorKind::Misuse, "the demo's verdict lacks an arm");
        self.outcome.verdict.arms.iter().find(|arm| is_it(arm)).ok_or_else(missing)
    }

    fn named(&self, name: &str) -> Result<&ArmReport> {
        self.arm(|arm| arm.name == name)
    }

    fn few_shot(&self) -> Result<&ArmReport> {
        self.arm(|arm| matches!(arm.kind, ArmKind::FewShot { .. }))
    }

    /// Some private commands with their answers before and after training.
    pub(super) fn samples(&self) -> String {
        let mut lines = Vec::new();
        for sample in &self.outcome.report.samples {
            lines.push(format!("> {}", sample.prompt));
            for (arm, when) in [(ZERO_SHOT, "before:"), (LORA, "after: ")] {
                let answer = sample.outputs.iter().find(|o| o.arm == arm).map_or("", |o| &o.text);
                lines.push(format!("  {when} {answer}"));
            }
        }
        lines.join("\n")
    }

    /// A table with a column for each arm.
    pub(super) fn table(&self) -> Result<String> {
        let arms = [self.named(ZERO_SHOT)?, self.few_shot()?, self.named(LORA)?, self.named(FULL)?];
        let row = |name: &str, cells: [String; 4]| {
            let cells: String = cells.iter().map(|c| format!(" {c:>9}")).collect();
            format!("{name:<38}{cells}")
        };
        let percent = |share: f64| format!("{:.1} %", share * 100.0);
        let nats = |arm: &ArmReport| arm.retention.first().and_then(|r| r.delta_nll);
        let none = || "-".to_string();
        let cost = arms.map(|arm| nats(arm).map_or_else(none, |n| format!("{n:+.3}")));
        let shots = match arms[1].kind {
            ArmKind::FewShot { k } => format!("{k}-shot"),
            _ => none(),
        };
        let heads = ["before", &shots, LORA, FULL].map(str::to_string);
        let private = arms.map(|arm| percent(arm.accuracy.unwrap_or_default()));
        let (before, lora) = everyday(arms[2])?;
        let kept = [percent(before), none(), percent(lora), percent(everyday(arms[3])?.1)];
        let lines = [
            row("commands never seen, answered exactly", heads),
            row("  with the household's private words", private),
            row("  with everyday words", kept),
            row("everyday words: loss, nats per token", cost),
        ];
        Ok(format!("{}\nin {:.1} s", lines.join("\n"), self.seconds))
    }

    /// What happened, why in figures, and what to type next.
    pub(super) fn verdict(&self, folder: Option<&Path>, promoted: Option<&Generation>) -> Result<String> {
        let full = self.named(FULL)?;
        let mut lines = vec![self.decided()?];
        if let Some(arm) = self.outcome.verdict.promoted() {
            lines.extend(figures(self.named(arm)?, &[" beats ", "within", "forget"]));
        }
        if full.eligible {
            lines.push("Full fine-tuning passed, too: it learned the commands and forgot little.".into());
        } else {
            lines.push(self.refused(full)?);
            lines.extend(figures(full, &[" above ", "does not beat", " forgets "]));
        }
        lines.push(self.next(folder, promoted));
        Ok(lines.join("\n"))
    }

    /// The decision in one sentence.
    fn decided(&self) -> Result<String> {
        let verdict = &self.outcome.verdict;
        if verdict.promoted() != Some(LORA) {
            return Ok(verdict.sentence.clone());
        }
        let all = verdict.held_out.examples;
        let answered = |arm: &ArmReport| count(arm.accuracy.unwrap_or_default(), all);
        let (before, after) = (answered(self.named(ZERO_SHOT)?), answered(self.named(LORA)?));
        let kept = kept(self.named(LORA)?)?;
        let [knew, knows] = [kept.before, kept.after].map(|share| count(share, kept.questions));
        Ok(format!(
            "Promoted: the trained adapter answers {after} of {all} commands it never saw; the model alone answers \
             {before}.\n\
             Not forgotten: of {} everyday commands it answers {knows}; the model alone answers {knew}.",
            kept.questions
        ))
    }

    /// Full fine-tuning, which forgot too much or learned too little.
    fn refused(&self, full: &ArmReport) -> Result<String> {
        let all = self.outcome.verdict.held_out.examples;
        let kept = kept(full)?;
        let [knew, knows] = [kept.before, kept.after].map(|share| count(share, kept.questions));
        Ok(format!(
            "Refused: full fine-tuning (every weight, no replay, learning rate {FULL_RATE:.0e}) answers {} of {all} \
             commands, and {knows} of {} everyday ones; the model alone answers {knew} of those.",
            count(full.accuracy.unwrap_or_default(), all),
            kept.questions
        ))
    }

    /// What to type next.
    fn next(&self, folder: Option<&Path>, promoted: Option<&Generation>) -> String {
        let own = "Train on your own rows: engraft adapt -m MODEL.gguf --data FOLDER --store STORE";
        let folder = folder.map(Path::display);
        match (promoted, folder, self.outcome.verdict.promoted()) {
            (Some(generation), Some(folder), _) => format!(
                "{folder}: generation {} is active now.\n\
                 Use it: engraft generate -m targets/cli/seedling.gguf --store {folder} -p \"it's cold in the cave\"\n{own}",
                generation.number
            ),
            (Some(_), None, _) => format!("Keep it: engraft demo --store STORE\n{own}"),
            (None, _, Some(arm)) => {
                format!(
                    "Nothing kept: a store keeps adapters and prompts, and {arm} is a whole model.\n{own}"
                )
            }
            (None, _, None) => format!("Try the default number of steps: engraft demo\n{own}"),
        }
    }

    /// The same for machines. Fractions of exactly right answers, 0 to 1.
    pub(super) fn json(&self) -> Result<impl Serialize + use<>> {
        let verdict = &self.outcome.verdict;
        // What an arm forgot of the everyday commands, nats per token; `null` if that isn't finite.
        let forgetting = |arm: &ArmReport| {
            let found = arm.retention.first();
            json::object! {
                delta_nll: found.and_then(|r| r.delta_nll),
                /// KL(tuned‖base).
                kl: found.and_then(|r| r.kl),
            }
        };
        let exact = |arm: &ArmReport| arm.accuracy.unwrap_or_default();
        let (lora, full) = (self.named(LORA)?, self.named(FULL)?);
        let (before, after) = everyday(lora)?;
        Ok(json::object! {
            before_exact: exact(self.named(ZERO_SHOT)?),
            after_exact: exact(lora),
            retention_before: before,
            retention_after: after,
            /// `PROMOTE`, `KEEP_PROMPTING` or `KEEP_BASE`, with its arm.
            #[serde(flatten)]
            decision: verdict.decision.clone(),
            /// The decision in one sentence.
            sentence: verdict.sentence.clone(),
            /// Of the base with examples in its prompt.
            few_shot_exact: exact(self.few_shot()?),
            /// Of the adapter, on the everyday commands.
            forgetting: forgetting(lora),
            /// The result of full fine-tuning.
            full: json::object! {
                learning_rate: FULL_RATE,
                after_exact: exact(full),
                retention_after: everyday(full)?.1,
                #[serde(flatten)]
                forgetting: forgetting(full),
                /// Whether it passed the gate.
                eligible: full.eligible,
            },
            seconds: self.seconds,
        })
    }
}

/// An arm's reasons with any of these words, indented.
fn figures(arm: &ArmReport, words: &[&str]) -> Vec<String> {
    let is_told = |reason: &&String| words.iter().any(|word| reason.contains(word));
    arm.reasons.iter().filter(is_told).map(|reason| format!("  {reason}")).collect()
}
