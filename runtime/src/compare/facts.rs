//! Assembles a comparison's results for the gate and for people.

use std::time::Instant;

use super::answers::{self, Metric, Question};
use super::material::Material;
use super::recipe::Recipe;
use super::retention::RetentionSet;
use super::shots::Choice;
use super::{Contest, Outcome, Product};
use crate::data::{DataOptions, OverLong};
use crate::error::Result;
use crate::gate::report::{ArmRun, DataFacts, ModelFacts, Output, RateTest, Report, SampleOutputs, Scoring};
use crate::gate::verdict::{ArmResult, Basis, judge};
use crate::hex;
use crate::model::Proj;
use crate::model::tuned::TunedLayout;
use crate::model::weights::ModelFile;
use crate::run::checkpoint::{rows_digest, stated_digest};
use crate::run::setup::stated;
use crate::run::{Base, Length, Settings};

/// One arm, measured.
pub(super) struct Measured {
    pub(super) result: ArmResult,
    pub(super) scoring: Scoring,
    pub(super) run: Option<ArmRun>,
    pub(super) rate_test: Option<RateTest>,
    pub(super) kept: Option<Product>,
    /// What tells an arm apart that was made before the comparison: by its examples, or by what its adapter computes.
    pub(super) made_before: Option<String>,
    /// Answers to the sample questions.
    pub(super) samples: Vec<(String, Option<bool>)>,
}

/// Judges what was measured.
///
/// # Errors
/// Those of the gate.
pub(super) fn conclude(
    (base, material, options, contest): (&Base, &Material, &DataOptions, &Contest),
    questions: &[Question],
    arms: Vec<Measured>,
    started: Instant,
) -> Result<Outcome> {
    let basis = Basis {
        model: hex::encode(&base.model.digest()),
        data_split: material.digest.clone(),
        settings: settings_digest(base, contest, options, &arms),
        seed: contest.seed,
    };
    let results: Vec<ArmResult> = arms.iter().map(|arm| arm.result.clone()).collect();
    let verdict = judge(&results, &material.leaks, &contest.thresholds, &basis)?;
    let samples = samples(questions, &arms, contest.samples);
    let (mut runs, mut scoring, mut kept, mut rate_test) = (Vec::new(), Vec::new(), Vec::new(), None);
    for arm in arms {
        runs.extend(arm.run);
        rate_test = rate_test.or(arm.rate_test);
        scoring.push(arm.scoring);
        kept.extend(arm.kept.map(|kept| (arm.result.name, kept)));
    }
    let report = Report {
        title: contest.title.clone(),
        model: model_facts(&base.model, basis.model)?,
        data: data_facts(material, contest),
        verdict: verdict.clone(),
        runs,
        scoring,
        rate_test,
        samples,
        settings: told_settings(base, contest),
        seconds: started.elapsed().as_secs_f64(),
    };
    Ok(Outcome { verdict, report, kept })
}

/// Sample questions with the answers of all arms.
fn samples(questions: &[Question], arms: &[Measured], count: usize) -> Vec<SampleOutputs> {
    let shown = answers::shown(questions.len(), count);
    let one = |(at, question): (usize, usize)| {
        let outputs = arms.iter().filter_map(|arm| {
            let (text, correct) = arm.samples.get(at)?;
            Some(Output { arm: arm.result.name.clone(), text: text.clone(), correct: *correct })
        });
        let Question { prompt, reference, .. } = &questions[question];
        SampleOutputs { prompt: prompt.clone(), reference: reference.clone(), outputs: outputs.collect() }
    };
    shown.into_iter().enumerate().map(one).filter(|s| !s.outputs.is_empty()).collect()
}

fn model_facts(model: &ModelFile, digest: String) -> Result<ModelFacts> {
    let file = model.path().and_then(|p| p.file_name()).unwrap_or_default().to_string_lossy().into_owned();
    Ok(ModelFacts {
        name: model.gguf().string("general.name")?.unwrap_or_default().to_owned(),
        file,
        digest,
        parameters: TunedLayout::new(model.config()).len() as u64,
        dtype: model.block(0).proj(Proj::Down).dtype().name().to_string(),
        mapped_bytes: model.mapped_bytes() as u64,
    })
}

fn data_facts(material: &Material, contest: &Contest) -> DataFacts {
    let Material { train, valid, held_out, .. } = material;
    DataFacts {
        task: match contest.metric {
            Some(Metric::Numeric(task)) => Some(task.name().to_string()),
            _ => None,
        },
        source: train.data.source.display().to_string(),
        train: train.extent(),
        valid: valid.extent(),
        held_out: held_out.extent(),
        skipped: (train.data.skipped_count + held_out.data.skipped_count) as u64,
    }
}

fn told_settings(base: &Base, contest: &Contest) -> Vec<(String, String)> {
    let mut told = vec![
        ("activations".to_string(), base.precision.name().to_string()),
        ("input gradients".to_string(), base.gradient.name().to_string()),
        ("threads".to_string(), base.kernels.threads().to_string()),
    ];
    if contest.metric.is_some() {
        told.push(("tokens of an answer".to_string(), contest.answer_tokens.to_string()));
    }
    for recipe in &contest.recipes {
        let Settings { seed, batch, length, .. } = recipe.settings;
        let replay = match recipe.extra.len() + contest.replay.len() {
            0 => String::new(),
            n => format!(", {n} rows of replay"),
        };
        let value = format!("seed {seed}, {batch} rows a step, budget {}{replay}", told_length(length));
        told.push((recipe.name.clone(), value));
    }
    told
}

fn told_length(length: Length) -> String {
    match length {
        Length::Steps(n) => format!("{n} steps"),
        Length::Epochs(n) => format!("{n} epochs"),
        Length::Tokens(n) => format!("{n} tokens"),
        Length::Minutes(n) => format!("{n:.1} minutes"),
    }
}

/// Version of the statement about a comparison. Raise it when a name, a value or the meaning of one below
/// changes.
const VERSION: u32 = 2;

/// Digest of everything the figures depend on, except the model and the data. Postcard encodes a tuple as its
/// elements in order.
fn settings_digest(base: &Base, contest: &Contest, options: &DataOptions, arms: &[Measured]) -> String {
    let examples = |(k, choice): &(usize, Choice)| match choice {
        Choice::Seeded(seed) => (*k, Some(*seed)),
        Choice::Nearest => (*k, None),
    };
    let recipe = |recipe: &Recipe| {
        let rows = rows_digest(&recipe.extra);
        (recipe.name.clone(), recipe.baseline, stated(&recipe.settings, base), rows)
    };
    let set = |set: &RetentionSet| {
        let metric = set.task.as_ref().map(|(_, metric)| metric.name());
        (set.name.clone(), rows_digest(&set.rows), metric)
    };
    let computed = (VERSION, env!("CARGO_PKG_VERSION"), base.precision.name(), base.gradient.name());
    let arms = (
        arms.iter().filter_map(|arm| Some((&arm.result.name, arm.made_before.as_ref()?))).collect::<Vec<_>>(),
        contest.shots.iter().map(examples).collect::<Vec<_>>(),
        contest.recipes.iter().map(recipe).collect::<Vec<_>>(),
        rows_digest(&contest.replay),
        rows_digest(&contest.general),
        contest.aside.iter().map(|set| (set.name.clone(), rows_digest(&set.rows))).collect::<Vec<_>>(),
    );
    let judged = (
        contest.metric.map(Metric::name),
        contest.answer_tokens,
        &contest.thresholds,
        contest.retention.iter().map(set).collect::<Vec<_>>(),
    );
    let over_long = match options.over_long {
        OverLong::Truncate => "cut",
        OverLong::Refuse => "refused",
    };
    let read = (options.mask_prompt, options.raw, options.max_seq_length, over_long);
    let split = (options.valid_fraction, options.split_seed);
    hex::encode(&stated_digest(&(computed, arms, judged, read, split, contest.limit.budget)))
}
