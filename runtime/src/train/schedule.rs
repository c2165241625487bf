//! Learning rate over the run.

/// Shape of the schedule after its warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// The peak rate throughout.
    Constant,
    /// Linear to zero at the last step.
    Linear,
    /// Half a cosine to zero at the last step (Loshchilov & Hutter, arXiv 1608.03983, without restarts).
    Cosine,
}

impl Shape {
    /// All of them, by the names that [`Shape::name`] gives.
    pub const ALL: [Shape; 3] = [Shape::Constant, Shape::Linear, Shape::Cosine];

    /// Its name, in files and settings.
    pub fn name(self) -> &'static str {
        match self {
            Shape::Constant => "constant",
            Shape::Linear => "linear",
            Shape::Cosine => "cosine",
        }
    }
}

/// Learning rate per step: linear warmup, then the shape.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Shape after warmup.
    pub shape: Shape,
    /// Rate at the end of the warmup.
    pub peak: f32,
    /// Warmup steps.
    pub warmup: u64,
    /// Steps of the whole run.
    pub total: u64,
}

impl Schedule {
    /// The rate of step `step`, counted from 0.
    pub fn rate(&self, step: u64) -> f32 {
        if step < self.warmup {
            return self.peak * (step + 1) as f32 / self.warmup as f32;
        }
        let span = self.total.saturating_sub(self.warmup).max(1) as f32;
        let progress = ((step - self.warmup) as f32 / span).min(1.0);
        match self.shape {
            Shape::Constant => self.peak,
            Shape::Linear => self.peak * (1.0 - progress),
            Shape::Cosine => self.peak * 0.5 * (1.0 + (std::f32::consts::PI * progress).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_then_falls() {
        let s = |shape| Schedule { shape, peak: 1.0, warmup: 4, total: 12 };
        let linear = s(Shape::Linear);
        assert_eq!([0, 1, 3, 4].map(|i| linear.rate(i)), [0.25, 0.5, 1.0, 1.0]);
        assert_eq!(linear.rate(8), 0.5);
        assert_eq!(s(Shape::Constant).rate(11), 1.0);
        assert!((s(Shape::Cosine).rate(8) - 0.5).abs() < 1e-6);
        assert!(s(Shape::Cosine).rate(11) > 0.0, "the last step still moves");
        assert_eq!(Schedule { shape: Shape::Linear, peak: 1.0, warmup: 0, total: 1 }.rate(0), 1.0);
    }
}
