//! A trainer's learned numbers, as a checkpoint stores them.

use crate::error::{Error, ErrorKind, Result};

/// Parameters θ and the moments of those that are trained, in one order.
pub struct Numbers<'a> {
    /// Parameters.
    pub theta: &'a [f32],
    /// First moments.
    pub m: &'a [f32],
    /// Second moments.
    pub v: &'a [f32],
    /// Parameters of the best look; empty if there was none.
    pub best: &'a [f32],
    /// Updates of AdamW.
    pub updates: u64,
    /// Optimizer steps.
    pub steps: u64,
    /// Whether they are consistent: false after a step or restore failed midway.
    pub whole: bool,
}

/// The same, for filling.
pub struct NumbersMut<'a> {
    /// Parameters.
    pub theta: &'a mut [f32],
    /// First moments.
    pub m: &'a mut [f32],
    /// Second moments.
    pub v: &'a mut [f32],
    /// Parameters of the best look.
    pub best: &'a mut Vec<f32>,
    /// Updates of AdamW.
    pub updates: &'a mut u64,
    /// Optimizer steps.
    pub steps: &'a mut u64,
    /// Set while they are being filled; the trainer refuses to step meanwhile.
    pub broken: &'a mut bool,
}

impl Numbers<'_> {
    /// Refuses to write a NaN or an infinity.
    ///
    /// # Errors
    /// [`ErrorKind::NonFinite`], with its place.
    pub fn check(&self) -> Result<()> {
        let refuse = |problem: String| Err(Error::new(ErrorKind::NonFinite, problem));
        if !self.whole {
            return refuse(format!("step {} failed midway", self.steps + 1));
        }
        let parts = [
            ("parameter", self.theta),
            ("first moment", self.m),
            ("second moment", self.v),
            ("parameter of the best look", self.best),
        ];
        for (what, values) in parts {
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                return refuse(format!("step {}: {what} {at} is NaN or infinite", self.steps));
            }
        }
        Ok(())
    }
}
