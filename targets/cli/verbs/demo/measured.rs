//! What the demo measured, for people and machines.

use std::path::Path;

use engraft_runtime::compare::{Outcome, ZERO_SHOT};
use engraft_runtime::error::{Error, ErrorKind, Result};
use engraft_runtime::gate::store::Generation;
use engraft_runtime::gate::verdict::{ArmKind, ArmReport};

use super::{FULL, FULL_RATE, LORA};
use crate::json;

/// Shares of the everyday commands that are answered exactly: before, and by this arm.
fn everyday(arm: &ArmReport) -> Result<(f64, f64)> {
    let missing = || Error::new(ErrorKind::Misuse, "the demo's verdict lacks the everyday commands");
    let found = arm.retention.first().and_then(|r| r.retained).ok_or_else(missing)?;
    Ok((found.before, found.after))
}

/// Everything.
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

    /// Private commands with the answers before and after.
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

    /// One column for each arm.
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

    /// What the gate says, of the winner and of full fine-tuning, and what became active.
    pub(super) fn verdict(&self, folder: Option<&Path>, promoted: Option<&Generation>) -> Result<String> {
        let verdict = &self.outcome.verdict;
        let mut text = format!("gate: {}", verdict.sentence);
        let place = folder.map_or("a temporary store".to_string(), |folder| folder.display().to_string());
        match (promoted, verdict.promoted()) {
            (Some(generation), _) => {
                text += &format!("\n      generation {} of {place} is active", generation.number);
            }
            (None, Some(arm)) => {
                text += &format!("\n      a store keeps adapters and prompts: {arm} is a whole model");
            }
            (None, None) => {}
        }
        let full = self.named(FULL)?;
        if full.eligible {
            return Ok(text + "\ngate: nothing speaks against full");
        }
        text += &format!("\ngate: full is refused (every weight, no replay, learning rate {FULL_RATE:.0e}):");
        let speaks = |r: &&String| [" above ", "does not beat", " forgets "].iter().any(|p| r.contains(p));
        for reason in full.reasons.iter().filter(speaks) {
            text += &format!("\n      {reason}");
        }
        Ok(text)
    }

    /// The same for machines.
    pub(super) fn json(&self) -> Result<json::Demo> {
        let verdict = &self.outcome.verdict;
        let forgetting = |arm: &ArmReport| {
            let found = arm.retention.first();
            json::DemoForgetting { delta_nll: found.and_then(|r| r.delta_nll), kl: found.and_then(|r| r.kl) }
        };
        let exact = |arm: &ArmReport| arm.accuracy.unwrap_or_default();
        let (lora, full) = (self.named(LORA)?, self.named(FULL)?);
        let (before, after) = everyday(lora)?;
        Ok(json::Demo {
            before_exact: exact(self.named(ZERO_SHOT)?),
            after_exact: exact(lora),
            retention_before: before,
            retention_after: after,
            decision: verdict.decision.clone(),
            sentence: verdict.sentence.clone(),
            few_shot_exact: exact(self.few_shot()?),
            forgetting: forgetting(lora),
            full: json::DemoFull {
                learning_rate: FULL_RATE,
                after_exact: exact(full),
                retention_after: everyday(full)?.1,
                forgetting: forgetting(full),
                eligible: full.eligible,
            },
            seconds: self.seconds,
        })
    }
}
