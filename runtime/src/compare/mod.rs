//! Compares arms: the base alone, the base with few-shot examples, what is in use, and trained results, all on
//! the same held-out rows. Then the gate gives its verdict.
//!
//! The modules in order: [`material`] holds the rows, split once for all arms. [`shots`] puts examples before
//! them. A [`recipe`] says how an arm is trained and what memory that takes. [`rate`] finds a learning rate if
//! none is given, and [`train`] trains, within what `clock` leaves; `strength` then weakens what forgets too much.
//! [`score`] and [`answers`] measure on held-out rows and on what must be retained ([`retention`]). `panel` takes
//! the arms through these steps, one in memory at a time. `facts` assembles the figures for the gate and its
//! report.
//!
//! ```
//! use engraft_runtime::*;
//!
//! # fn main() -> Result<()> {
//! let base = Base::open("../targets/cli/seedling.gguf")?;
//! let text = Text::of(&base.model)?;
//! let reading = DataOptions { max_seq_length: 128, ..DataOptions::default() };
//! let rows = "../targets/cli/demo/private_train.jsonl".as_ref();
//! let material = Material::read(rows, &text, &reading, Limits::default())?;
//! // The base alone, and behind two examples; the crate's first page trains an arm, too.
//! let contest = Contest { shots: vec![(2, Choice::Seeded(0))], ..Contest::new("example") };
//! let outcome = compare(&base, &material, (&text, &reading), &contest, &mut Nobody)?;
//! assert_eq!(outcome.verdict.arms.len(), 2);
//! # Ok(())
//! # }
//! ```

pub mod answers;
mod clock;
mod facts;
mod folds;
mod in_use;
pub mod material;
mod panel;
pub mod rate;
pub mod recipe;
pub mod retention;
pub mod score;
pub mod shots;
mod strength;
pub mod train;

pub use in_use::InUse;

use std::path::PathBuf;
use std::time::Instant;

use answers::Metric;
use clock::{Clock, Patient};
use material::Material;
use panel::{Arm, Panel};
use recipe::Recipe;
use retention::RetentionSet;
use shots::Choice;

use crate::adapter::Adapter;
use crate::data::{DataOptions, Example};
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::gate::report::Report;
use crate::gate::store::{Candidate, Generation, Writer};
use crate::gate::verdict::{Decision, Thresholds, Verdict, check_thresholds};
use crate::merge;
use crate::model::chat::Message;
use crate::model::text::Text;
use crate::model::weights::ModelFile;
use crate::run::general::Aside;
use crate::run::{Base, Limit, Method, Observer, RunRows, settings};

/// The name of the base's own arm.
pub const ZERO_SHOT: &str = "zero-shot";
/// Default private memory for scoring.
pub const SCORING_BYTES: u64 = 512 << 20;
/// The model file a full fine-tuning arm writes into its folder.
pub const MODEL_FILE: &str = "model.gguf";

/// What to compare, and how.
#[derive(Clone, Debug)]
pub struct Contest {
    /// "compare" or "adapt".
    pub title: String,
    /// What is in use, with the name of its arm; nothing replaces it that isn't better.
    pub active: Option<(String, InUse)>,
    /// Finished adapters to judge as if they were trained here: names of their arms, and files.
    pub given: Vec<(String, PathBuf)>,
    /// Few-shot arms: examples, and how they are chosen.
    pub shots: Vec<(usize, Choice)>,
    /// Arms to train, in order.
    pub recipes: Vec<Recipe>,
    /// Rows the model already knew, replayed among the arms' training rows.
    pub replay: Vec<Example>,
    /// Ordinary text: what protected directions are measured on, and where tuned models stay near their base.
    pub general: Vec<Example>,
    /// Ordinary text that no arm trains on. By what arms forget of it, the look to keep and how strongly a LoRA acts are
    /// chosen. Without any, looks are compared by the task alone, and a LoRA acts at its full strength.
    pub aside: Vec<Aside>,
    /// How answers are compared with the rows' own; `None` compares losses alone.
    pub metric: Option<Metric>,
    /// Most tokens per answer.
    pub answer_tokens: usize,
    /// What must not be forgotten.
    pub retention: Vec<RetentionSet>,
    /// What the gate demands.
    pub thresholds: Thresholds,
    /// Seed of the bootstrap.
    pub seed: u64,
    /// Held-out rows the report shows with every arm's answer.
    pub samples: usize,
    /// Minutes for all of it; training takes what scoring leaves of them. Trainings with a length of their own, in steps
    /// or epochs, also end in time.
    pub minutes: Option<f64>,
    /// The memory for training and scoring. Without a budget, scoring uses whatever is fastest within
    /// [`SCORING_BYTES`].
    pub limit: Limit,
    /// The folder for trained results, with a subfolder per arm. Without it, adapters stay in memory and full
    /// fine-tuning is impossible.
    pub folder: Option<PathBuf>,
    /// The folder for checkpoints of unfinished arms, with a subfolder per arm. The same comparison resumes
    /// from there, and a diverging run rolls back there. It is cleared at the end.
    pub unfinished: Option<PathBuf>,
}

impl Contest {
    /// The rows that all trained arms share.
    pub fn shared(&self) -> RunRows<'_> {
        RunRows { replay: &self.replay, general: &self.general, aside: &self.aside, ..RunRows::default() }
    }

    /// The base alone, compared by losses, with the default thresholds.
    pub fn new(title: &str) -> Contest {
        Contest {
            title: title.to_string(),
            active: None,
            given: Vec::new(),
            shots: Vec::new(),
            recipes: Vec::new(),
            replay: Vec::new(),
            general: Vec::new(),
            aside: Vec::new(),
            metric: None,
            answer_tokens: settings::ANSWER_TOKENS,
            retention: Vec::new(),
            thresholds: Thresholds::default(),
            seed: 0,
            samples: settings::SAMPLES,
            minutes: None,
            limit: Limit::default(),
            folder: None,
            unfinished: None,
        }
    }
}

/// What a measured arm leaves: what would be promoted.
pub enum Product {
    /// An adapter, bound to its base.
    Adapter(Box<Adapter>),
    /// An adapter's file, in the arm's folder.
    File(PathBuf),
    /// Examples to put before every prompt; none if each question has its own.
    FewShot(Vec<Message>),
    /// A complete model.
    Model(PathBuf),
}

/// The result of a comparison.
pub struct Outcome {
    /// The gate's verdict.
    pub verdict: Verdict,
    /// The verdict and everything else, for people.
    pub report: Report,
    /// Products by the arms' names; the base has none.
    pub kept: Vec<(String, Product)>,
}

/// The outcome of promoting a verdict in a store.
#[derive(Debug)]
pub enum Promotion {
    /// The winner is now the active generation.
    Active(Generation),
    /// The verdict keeps what is there; the store is unchanged.
    NothingChanges,
    /// A store can't hold the winning arm, for this reason; the store is unchanged.
    CannotHold(&'static str),
}

impl Outcome {
    /// What this arm left.
    pub fn kept(&self, arm: &str) -> Option<&Product> {
        self.kept.iter().find(|(name, _)| name == arm).map(|(_, kept)| kept)
    }

    /// The product of the winning arm; `None` if nothing changes.
    pub fn winner(&self) -> Option<&Product> {
        match &self.verdict.decision {
            Decision::Promote { arm } | Decision::KeepPrompting { arm, .. } => self.kept(arm),
            Decision::KeepActive { .. } | Decision::KeepBase => None,
        }
    }

    /// Makes the winner a store's active generation.
    ///
    /// # Errors
    /// Those of [`Writer::promote`], and of loading an adapter from its file.
    pub fn promote(&self, writer: &Writer<'_>, model: &ModelFile) -> Result<Promotion> {
        let loaded;
        let candidate = match self.winner() {
            None => return Ok(Promotion::NothingChanges),
            Some(Product::Adapter(adapter)) => Candidate::Adapter(adapter),
            Some(Product::File(file)) => {
                loaded = Adapter::load(file)?;
                Candidate::Adapter(&loaded)
            }
            Some(Product::FewShot(messages)) if !messages.is_empty() => Candidate::FewShot(messages),
            Some(Product::FewShot(_)) => {
                return Ok(Promotion::CannotHold("each question has its own examples"));
            }
            Some(Product::Model(_)) => {
                return Ok(Promotion::CannotHold("a store keeps adapters and examples, not whole models"));
            }
        };
        let (verdict, digest) = (self.verdict.to_json()?, model.digest());
        let base = (&digest, model.config());
        writer.promote(&candidate, verdict.as_bytes(), base, false).map(Promotion::Active)
    }

    /// Keeps the adapters that weren't promoted, with the verdict, as a store's newest tried generations; at most `keep`
    /// in all. Returns their arms and numbers.
    ///
    /// # Errors
    /// Those of [`Writer::keep_tried`], and of loading an adapter from its file.
    pub fn keep_tried(
        &self,
        writer: &Writer<'_>,
        model: &ModelFile,
        keep: usize,
    ) -> Result<Vec<(String, u64)>> {
        let (verdict, digest) = (self.verdict.to_json()?, model.digest());
        let mut kept = Vec::new();
        for (arm, product) in &self.kept {
            let loaded;
            let adapter = match product {
                _ if self.verdict.promoted() == Some(arm) => continue,
                Product::Adapter(adapter) => adapter,
                Product::File(file) => {
                    loaded = Adapter::load(file)?;
                    &loaded
                }
                Product::FewShot(_) | Product::Model(_) => continue,
            };
            let base = (&digest, model.config());
            let generation = writer.keep_tried(adapter, verdict.as_bytes(), base, keep)?;
            kept.extend(generation.map(|generation| (arm.clone(), generation.number)));
        }
        Ok(kept)
    }
}

/// Takes all arms through training and scoring, and judges them.
///
/// # Errors
/// `Misuse` for a full fine-tuning arm without a folder; `DoesNotFit`; `BadData`; `Cancelled`; those of every
/// part.
pub fn compare(
    base: &Base,
    material: &Material,
    (text, options): (&Text, &DataOptions),
    contest: &Contest,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    let started = Instant::now();
    check(base, material, options, contest)?;
    forewarn(material, &contest.thresholds, observer);
    let how = (text, options);
    let clock = Clock::new(contest.minutes, contest.recipes.len() * (1 + material.folds.len()));
    let observer = &mut Patient { observer, clock: &clock };
    let (arms, questions) = match material.folds.is_empty() {
        false => folds::measured(base, material, how, contest, (observer, &clock))?,
        true => {
            let mut panel = Panel::new(base, material, how, contest, (observer, &clock));
            let arms = Arm::of(contest).iter().map(|arm| panel.measured(arm)).collect::<Result<Vec<_>>>()?;
            (arms, panel.questions)
        }
    };
    base.model.check_whole()?;
    let outcome = facts::conclude((base, material, options, contest), &questions, arms, started)?;
    train::clear(contest)?;
    Ok(outcome)
}

/// Checks everything that can be known before training, rather than an hour into it. Writes nothing.
///
/// # Errors
/// `DoesNotFit`, `Misuse`, `BadData`.
pub fn check(base: &Base, material: &Material, options: &DataOptions, contest: &Contest) -> Result<()> {
    check_thresholds(
        &contest.thresholds,
        (contest.recipes.len() + contest.given.len()).max(contest.shots.len()),
    )?;
    for (k, _) in &contest.shots {
        shots::pool(*k, &material.train, options)?;
    }
    let mut held = 0;
    for recipe in &contest.recipes {
        recipe.check(&base.beside(held), material, contest.shared(), &contest.limit)?;
        held += held_bytes(recipe, base, contest.folder.is_some());
        if let (Method::Full(dtype), folder) = (&recipe.settings.method, &contest.folder) {
            merge::tuned::check_type(&base.model, *dtype)?;
            if folder.is_none() {
                let message =
                    format!("{}: full fine-tuning needs a folder to write the model to", recipe.name);
                return Err(Error::new(ErrorKind::Misuse, message));
            }
        }
    }
    Ok(())
}

/// The arms that fit, one after the other; if `searched`, with ranks that fit. If `lenient`, arms that don't
/// fit are reported and left out. A trained arm stays in memory while the next one trains, unless there is a
/// folder.
///
/// # Errors
/// `DoesNotFit` for the first arm that doesn't fit, or, if `lenient` and none is left, for the last.
pub fn fitting(
    recipes: Vec<Recipe>,
    base: &Base,
    material: &Material,
    (shared, limit): (RunRows<'_>, &Limit),
    (searched, lenient, has_folder): (bool, bool, bool),
    observer: &mut dyn Observer,
) -> Result<Vec<Recipe>> {
    let (mut fit, mut held, mut left_out) = (Vec::new(), 0, None);
    for recipe in recipes {
        let beside = base.beside(held);
        let fitted = match searched && recipe.settings.method.lora().is_some() {
            true => recipe.with_largest_rank(&beside, material, shared, limit),
            false => Ok(recipe),
        };
        let planned = fitted.and_then(|recipe| Ok((recipe.check(&beside, material, shared, limit)?, recipe)));
        match planned {
            Ok((planned, recipe)) => {
                let bytes = crate::bytes::show(planned.plan.private_bytes as u64);
                let what = recipe.settings.method.describe();
                observer.note(&format!("{}: {what}; {bytes} of private memory planned", recipe.name));
                held += held_bytes(&recipe, base, has_folder);
                fit.push(recipe);
            }
            Err(error) if lenient && error.kind() == ErrorKind::DoesNotFit => {
                observer.note(&format!("left out: {error}"));
                left_out = Some(error);
            }
            Err(error) => return Err(error),
        }
    }
    match left_out.filter(|_| fit.is_empty()) {
        Some(error) => Err(error),
        None => Ok(fit),
    }
}

/// Bytes an arm holds once trained: its adapter, unless it goes to a folder.
fn held_bytes(recipe: &Recipe, base: &Base, has_folder: bool) -> usize {
    match (&recipe.settings.method, has_folder) {
        (method @ Method::Adapter(_), false) => size_of::<f32>() * method.parameters(base.model.config()),
        _ => 0,
    }
}

/// Refuses rows too few to decide anything, before an hour of training finds out.
///
/// # Errors
/// `GateRefused` that says how many rows it would take.
pub fn check_decidable(material: &Material, thresholds: &Thresholds, fraction: f64) -> Result<()> {
    let (held_out, least) = (material.held_out.samples.len(), thresholds.examples_min);
    if held_out >= least {
        return Ok(());
    }
    let is_split = material.folds.is_empty() && material.held_out.data.source == material.train.data.source;
    let message = match is_split {
        false => format!("{held_out} held-out rows can't decide; it takes {least}"),
        true => format!(
            "{held_out} held-out rows can't decide; it takes {least}, or {} rows in all",
            (least as f64 / fraction).ceil()
        ),
    };
    Err(Error::new(ErrorKind::GateRefused, message).advise(Advice::AnotherSplit))
}

/// Warns about verdicts that are certain before anything is measured; the figures may be wanted anyway.
fn forewarn(material: &Material, thresholds: &Thresholds, observer: &mut dyn Observer) {
    let (rows, least) = (material.held_out.samples.len(), thresholds.examples_min);
    if !material.leaks.is_empty() {
        observer.note("the base will stay, whatever the figures: some held-out rows are also training rows");
    } else if rows < least {
        observer.note(&format!(
            "the base will stay, whatever the figures: there are {rows} held-out rows, but a decision takes {least}"
        ));
    }
}
