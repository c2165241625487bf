//! How to train an arm, and the memory it takes beside the comparison's rows.

use std::borrow::Cow;

use super::material::Material;
use crate::data::Example;
use crate::error::{Error, ErrorKind, Result};
use crate::gate::verdict::ArmKind;
use crate::run::prepare::with_largest_rank;
use crate::run::{Base, Begin, Limit, Method, Planned, RunRows, Settings};

/// Most attempts at one arm.
const ATTEMPTS: usize = 3;
/// What is left of the rate and of the energy in the next attempt.
const GENTLER: f64 = 0.25;
/// The smallest share of the time that is worth another attempt.
const LEAST_LEFT: f64 = 0.25;

/// An arm to train.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// Its name.
    pub name: String,
    /// How it is trained. Without a learning rate a range test finds one.
    pub settings: Settings,
    /// Whether it is only measured, and never promoted.
    pub baseline: bool,
    /// Rows trained on as if they were the material's own, such as answers of the base that it should keep.
    pub extra: Vec<Example>,
}

impl Recipe {
    /// An arm trained on the material's rows alone.
    pub fn new(name: &str, settings: Settings) -> Recipe {
        Recipe { name: name.to_string(), settings, baseline: false, extra: Vec::new() }
    }

    /// What its arm is to the gate.
    pub fn kind(&self) -> ArmKind {
        if self.baseline { ArmKind::Baseline } else { ArmKind::Trained }
    }

    /// What to try after `tried` attempts, the last of them at `rate`, that forgot too much at any strength: a quarter of
    /// the rate and of the energy. `None` after [`ATTEMPTS`], or with little left of `time`: all of it, and what is
    /// left.
    pub(super) fn gentler(
        &self,
        attempt: &Recipe,
        (tried, rate): (usize, f64),
        time: Option<(f64, f64)>,
    ) -> Option<Recipe> {
        let in_time = time.is_none_or(|(all, left)| left >= LEAST_LEFT * all);
        let begin = match attempt.settings.begin {
            Begin::Protected(energy) => Begin::Protected(GENTLER as f32 * energy),
            begin => begin,
        };
        (tried < ATTEMPTS && in_time).then(|| Recipe {
            name: format!("{}-{}", self.name, tried + 1),
            settings: Settings { rate: Some(GENTLER * rate), begin, ..attempt.settings.clone() },
            ..attempt.clone()
        })
    }

    /// The rows to train on: the material's, and the extra ones.
    pub fn rows<'r>(&'r self, material: &'r Material) -> Cow<'r, [Example]> {
        let own = &material.train.data.examples;
        match self.extra.is_empty() {
            true => Cow::Borrowed(own),
            false => Cow::Owned([&own[..], &self.extra].concat()),
        }
    }

    /// The run's memory plan, including all rows of the comparison.
    pub fn plan(&self, base: &Base, material: &Material, shared: RunRows<'_>, limit: &Limit) -> Planned {
        let parts = [&material.train, &material.valid, &material.held_out];
        // A run with extra rows trains on a copy.
        let rows = self.rows(material);
        let beside = if self.extra.is_empty() { &[][..] } else { &parts[0].data.examples };
        let run = RunRows { train: &rows, valid: &parts[1].data.examples, ..shared };
        let others = parts[2].data.examples.iter().chain(beside).chain(&self.extra);
        base.beside(material.text_bytes()).planned(&self.settings, run, others, limit)
    }

    /// Checks the plan against a limit.
    ///
    /// # Errors
    /// `DoesNotFit`, with a setting that fits; `Misuse` for settings full fine-tuning doesn't support.
    pub fn check(
        &self,
        base: &Base,
        material: &Material,
        shared: RunRows<'_>,
        limit: &Limit,
    ) -> Result<Planned> {
        let is_full = matches!(self.settings.method, Method::Full(_));
        if is_full && (self.settings.kl.is_some() || self.settings.begin != Begin::Random) {
            let message =
                format!("{}: only an adapter can have a KL penalty or EVA initialization", self.name);
            return Err(Error::new(ErrorKind::Misuse, message));
        }
        let planned = self.plan(base, material, shared, limit);
        limit.hold(&planned.plan, base.model.config(), &planned.request).map_err(|e| e.at(&self.name))?;
        Ok(planned)
    }

    /// The recipe with the largest rank that fits and that the number of targets supports.
    ///
    /// # Errors
    /// `DoesNotFit` if none fits.
    pub fn with_largest_rank(
        self,
        base: &Base,
        material: &Material,
        shared: RunRows<'_>,
        limit: &Limit,
    ) -> Result<Recipe> {
        let targets = material.train.data.trained_tokens();
        let fits = |settings: &Settings| {
            let recipe = Recipe { settings: settings.clone(), ..self.clone() };
            recipe.check(base, material, shared, limit).map(drop)
        };
        let settings = with_largest_rank(&self.settings, base.model.config(), targets, fits)?;
        Ok(Recipe { settings, ..self })
    }
}
