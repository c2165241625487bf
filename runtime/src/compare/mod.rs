//! Arms side by side: the base alone, the base behind examples, and what training makes of it, all on the
//! same held-out rows; then the gate's verdict.
//!
//! The story, in the order of its files: [`material`] is the rows, split once for all arms; [`shots`] puts
//! examples before them; a [`recipe`] says how an arm is trained, and what memory that takes; [`rate`]
//! finds a learning rate where none is given; [`run`] trains; [`score`] and [`answers`] measure, on what was
//! held out and on what must be retained ([`retention`]); and this file takes one arm after the other through
//! them, one in memory at a time, and hands figures to the gate.

pub mod answers;
pub mod material;
pub mod rate;
pub mod recipe;
pub mod retention;
pub mod run;
pub mod score;
pub mod shots;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use sha2::{Digest, Sha256};

use answers::{Manner, Metric, Question};
use material::Material;
use recipe::{Base, Budget, Method, Recipe};
use retention::RetentionSet;
use run::Trained;
use score::Subject;
use shots::Choice;

use crate::adapter::{Adapter, Binding as Bound, Precision as Stored, Prober};
use crate::data::{DataOptions, Example};
use crate::error::{Error, ErrorKind, Result};
use crate::gate::report::{DataFacts, ModelFacts, Output, RateTest, Report, Run, SampleOutputs, Scoring};
use crate::gate::verdict::{
    ArmKind, ArmResult, Binding, Retained, Retention, Thresholds, Verdict, check_thresholds, judge,
};
use crate::generate::StackedAdapter;
use crate::hex;
use crate::merge;
use crate::model::Proj;
use crate::model::chat::Message;
use crate::model::text::Text;
use crate::model::tuned::TunedLayout;
use crate::model::weights::ModelFile;
use crate::nn::divergence::Direction;
use crate::plan::mib;
use crate::storage::{Disk, create_dir_within};

/// The name of the base's own arm.
pub const ZERO_SHOT: &str = "zero-shot";
/// Private memory for scoring where none is asked for.
pub const SCORING_BYTES: u64 = 512 << 20;
/// The model that a full arm writes into its folder.
pub const MODEL_FILE: &str = "model.gguf";

/// Who looks on: shows progress, watches memory, and may stop everything.
pub trait Watcher {
    /// Called often.
    ///
    /// # Errors
    /// `Cancelled` to stop.
    fn go_on(&mut self) -> Result<()>;
    /// Something to tell.
    fn note(&mut self, text: &str);
    /// A step of training.
    fn step(&mut self, arm: &str, step: u64, total: Option<u64>, loss: f64, tokens_per_s: f64);
    /// A look at the validation rows.
    fn look(&mut self, arm: &str, step: u64, loss: f64);
    /// Begins to watch private memory anew.
    fn begin_peak(&mut self);
    /// The most private memory since then, in bytes, where the system tells.
    fn peak_bytes(&mut self) -> Option<u64>;
}

/// What is to be compared, and how.
#[derive(Clone, Debug)]
pub struct Settings {
    /// "compare" or "adapt".
    pub title: String,
    /// Few-shot arms: examples, and how they are chosen.
    pub shots: Vec<(usize, Choice)>,
    /// Arms to train, in order.
    pub recipes: Vec<Recipe>,
    /// How answers are compared with the rows' own; `None` compares losses alone.
    pub metric: Option<Metric>,
    /// Tokens of an answer, at most.
    pub answer_tokens: usize,
    /// What must not be forgotten.
    pub retention: Vec<RetentionSet>,
    /// What the gate demands.
    pub thresholds: Thresholds,
    /// Seed of the bootstrap.
    pub seed: u64,
    /// Held-out rows that the report shows with every arm's answer.
    pub samples: usize,
    /// Bytes of private memory that training and scoring may take. Without one scoring takes what is fastest
    /// within [`SCORING_BYTES`].
    pub memory_budget: Option<u64>,
    /// The folder for what arms train, each in one of its name. Without it adapters stay in memory, and no
    /// whole model can be tuned.
    pub folder: Option<PathBuf>,
}

/// What an arm is once it is measured: what would be promoted.
pub enum Kept {
    /// An adapter, bound to its base.
    Adapter(Box<Adapter>),
    /// The file of one, in the arm's folder.
    File(PathBuf),
    /// Examples to put before every prompt; none where each question has its own.
    FewShot(Vec<Message>),
    /// A model of its own.
    Model(PathBuf),
}

/// Everything that came of a comparison.
pub struct Outcome {
    /// The gate's verdict.
    pub verdict: Verdict,
    /// It and all else, for people.
    pub report: Report,
    /// By the arms' names; the base has nothing to keep.
    pub kept: Vec<(String, Kept)>,
}

impl Outcome {
    /// What an arm left.
    pub fn kept(&self, arm: &str) -> Option<&Kept> {
        self.kept.iter().find(|(name, _)| name == arm).map(|(_, kept)| kept)
    }
}

/// Takes all arms through training and scoring, and judges them.
///
/// # Errors
/// `Misuse` for a full arm without a folder; `DoesNotFit`; `BadData`; `Cancelled`; those of every part.
pub fn compare(
    base: &Base,
    material: &Material,
    (text, options): (&Text, &DataOptions),
    settings: &Settings,
    watcher: &mut dyn Watcher,
) -> Result<Outcome> {
    let started = Instant::now();
    check(base, material, options, settings)?;
    forewarn(material, &settings.thresholds, watcher);
    let questions = answers::questions(&material.held_out, text);
    let (arms, retained) = (Vec::new(), Vec::new());
    let mut court = Court { base, material, text, options, settings, questions, watcher, arms, retained };
    court.zero_shot()?;
    for (k, choice) in &settings.shots {
        court.few_shot(*k, *choice)?;
    }
    for recipe in &settings.recipes {
        court.trained(recipe)?;
    }
    base.model.check_whole()?;
    court.conclude(started)
}

/// What can be known before an hour of training finds it out. Writes nothing.
///
/// # Errors
/// `DoesNotFit`, `Misuse`, `BadData`.
pub fn check(base: &Base, material: &Material, options: &DataOptions, settings: &Settings) -> Result<()> {
    check_thresholds(&settings.thresholds, settings.recipes.len().max(settings.shots.len()))?;
    for (k, _) in &settings.shots {
        shots::pool(*k, &material.train, options)?;
    }
    let mut held = 0;
    for recipe in &settings.recipes {
        recipe.check(&base.beside(held), material, settings.memory_budget)?;
        held += held_bytes(recipe, base, settings);
        if let (Method::Full(dtype), folder) = (&recipe.method, &settings.folder) {
            merge::tuned::check_type(&base.model, *dtype)?;
            if folder.is_none() {
                let message = format!("{}: a whole model needs a folder to be written to", recipe.name);
                return Err(Error::new(ErrorKind::Misuse, message));
            }
        }
    }
    Ok(())
}

/// Bytes that an arm holds once it is trained: its adapter, where no folder takes it.
fn held_bytes(recipe: &Recipe, base: &Base, settings: &Settings) -> usize {
    match (&recipe.method, &settings.folder) {
        (Method::Adapter(_), None) => size_of::<f32>() * recipe.method.parameters(base.model.config()),
        _ => 0,
    }
}

/// Tells what is decided before anything is measured: the figures may be wanted all the same.
fn forewarn(material: &Material, thresholds: &Thresholds, watcher: &mut dyn Watcher) {
    let (rows, least) = (material.held_out.samples.len(), thresholds.examples_min);
    if !material.leaks.is_empty() {
        watcher.note("the base will stay, whatever the figures: held-out rows are among those to train on");
    } else if rows < least {
        watcher.note(&format!(
            "the base will stay, whatever the figures: {rows} held-out rows, and {least} could decide"
        ));
    }
}

/// One arm, measured.
struct Measured {
    result: ArmResult,
    scoring: Scoring,
    run: Option<Run>,
    rate_test: Option<RateTest>,
    kept: Option<Kept>,
    /// Answers to the sample questions.
    samples: Vec<(String, Option<bool>)>,
}

struct Court<'a> {
    base: &'a Base,
    material: &'a Material,
    text: &'a Text,
    options: &'a DataOptions,
    settings: &'a Settings,
    questions: Vec<Question>,
    watcher: &'a mut dyn Watcher,
    arms: Vec<Measured>,
    /// Which answers of each retention task the base has right, once they are needed.
    retained: Vec<Option<Vec<bool>>>,
}

impl Court<'_> {
    fn subject(&self, adapter: Option<Arc<StackedAdapter>>) -> Subject {
        Subject {
            weights: self.base.model.clone().into(),
            adapter,
            kernels: self.base.kernels.clone(),
            precision: self.base.precision,
        }
    }

    /// What scoring may take beside the model, the tokenizer and the rows.
    fn free_bytes(&self) -> usize {
        let budget = self.settings.memory_budget.unwrap_or(SCORING_BYTES);
        usize::try_from(budget).unwrap_or(usize::MAX).saturating_sub(self.base.resident_bytes(self.material))
    }

    /// Refuses what would take more memory than there is for it, where a budget was given.
    fn check(&self, arm: &str, bytes: usize) -> Result<()> {
        let free = self.free_bytes();
        if self.settings.memory_budget.is_none() || bytes <= free {
            return Ok(());
        }
        let message = format!(
            "{arm}: scoring needs {} of private memory beside the data, the budget leaves {}: give fewer \
             examples in the prompt, shorter rows, or more memory",
            mib(bytes),
            mib(free)
        );
        Err(Error::new(ErrorKind::DoesNotFit, message))
    }

    fn zero_shot(&mut self) -> Result<()> {
        let subject = self.subject(None);
        let rows = &self.material.held_out.data.examples;
        let measured = self.measure(ZERO_SHOT, ArmKind::ZeroShot, &subject, rows)?;
        self.arms.push(measured);
        Ok(())
    }

    fn few_shot(&mut self, k: usize, choice: Choice) -> Result<()> {
        let name = match choice {
            Choice::Seeded(0) => format!("{k}-shot"),
            Choice::Seeded(seed) => format!("{k}-shot seed {seed}"),
            Choice::Nearest => format!("{k}-shot nearest"),
        };
        let subject = self.subject(None);
        let (rows, shots) = shots::rows_after(
            (k, choice),
            (&self.material.train, &self.material.held_out),
            (self.text, self.options),
            &subject,
            subject.context(),
        )?;
        let mut measured = self.measure(&name, ArmKind::FewShot { k }, &subject, &rows)?;
        measured.kept = Some(Kept::FewShot(shots));
        self.arms.push(measured);
        Ok(())
    }

    fn trained(&mut self, recipe: &Recipe) -> Result<()> {
        let settings = self.settings;
        let before = settings.recipes.iter().take_while(|r| r.name != recipe.name);
        let held: usize = before.map(|r| held_bytes(r, self.base, settings)).sum();
        let base = self.base.beside(held);
        self.watcher.note(&format!("{}: {}", recipe.name, recipe.method.describe()));
        let (trained, run, rate_test) =
            run::train(recipe, &base, self.material, settings.memory_budget, self.watcher)?;
        let (subject, kept) = match trained {
            Trained::Adapter(mut adapter) => {
                let mut prober = Prober::new(&self.base.model, &self.base.kernels, adapter.layout.rank_max());
                adapter.binding = Some(Bound::of(&adapter, &self.base.model, &mut prober)?);
                let alone = [(*adapter, 1.0)];
                let stacked = StackedAdapter::new(&self.base.model, &self.base.kernels, &alone)?;
                let [(adapter, _)] = alone;
                let kept = match &settings.folder {
                    Some(folder) => Kept::File(save(&adapter, &folder.join(&recipe.name))?),
                    None => Kept::Adapter(Box::new(adapter)),
                };
                (self.subject(Some(Arc::new(stacked))), kept)
            }
            Trained::Full(tuned) => {
                let Method::Full(dtype) = recipe.method else { unreachable!("full weights of a full arm") };
                let folder = settings.folder.clone().unwrap_or_default().join(&recipe.name);
                create_dir_within(&Disk, &folder)?;
                let file = merge::tuned::write(&Disk, &folder, MODEL_FILE, &tuned, dtype)?.path;
                drop(tuned);
                let weights = Arc::new(ModelFile::open(&file)?).into();
                (Subject { weights, ..self.subject(None) }, Kept::Model(file))
            }
        };
        let rows = &self.material.held_out.data.examples;
        let mut measured = self.measure(&recipe.name, ArmKind::Trained, &subject, rows)?;
        self.forgetting(&subject, &mut measured.result)?;
        measured.run = Some(run);
        measured.rate_test = rate_test;
        measured.kept = Some(kept);
        self.arms.push(measured);
        Ok(())
    }

    /// Losses on the held-out rows as this arm reads them, and its answers.
    fn measure(
        &mut self,
        name: &str,
        kind: ArmKind,
        subject: &Subject,
        rows: &[Example],
    ) -> Result<Measured> {
        let free = self.free_bytes();
        let rows_max = rows.iter().map(Example::rows).max().unwrap_or(1);
        self.check(name, subject.losses_bytes(rows_max))?;
        let scored = subject.losses(rows, self.watcher)?;
        let Settings { metric, answer_tokens: tokens, samples, .. } = *self.settings;
        let asked = (Manner { metric, tokens, samples }, self.text);
        let answered = answers::answer(subject, &self.questions, rows, asked, free, self.watcher)?;
        let targets: usize = scored.nll.iter().map(|e| e.targets).sum();
        let nll = scored.nll.iter().map(|e| e.sum).sum::<f64>() / targets as f64;
        let share = answered.correct.as_ref().map(|c| {
            let solved = c.iter().filter(|c| **c).count();
            format!(", {solved} of {} solved in {:.1} s", c.len(), answered.seconds)
        });
        let speed = scored.tokens as f64 / scored.seconds;
        self.watcher.note(&format!(
            "{name}: held-out loss {nll:.4}, {speed:.0} tokens/s{}",
            share.unwrap_or_default()
        ));
        let result = ArmResult {
            name: name.to_string(),
            kind,
            nll: scored.nll,
            correct: answered.correct,
            retention: Vec::new(),
            task_kl: None,
        };
        let scoring = Scoring {
            arm: name.to_string(),
            prefix_tokens: scored.prefix_tokens as u64,
            tokens: scored.tokens as u64,
            nll_seconds: scored.seconds,
            generated_tokens: answered.tokens as u64,
            generate_seconds: answered.seconds,
        };
        let samples = answered.samples;
        Ok(Measured { result, scoring, run: None, rate_test: None, kept: None, samples })
    }

    /// How far a tuned model is from its base, on the task and on what must not be forgotten.
    fn forgetting(&mut self, subject: &Subject, result: &mut ArmResult) -> Result<()> {
        let base = self.subject(None);
        let settings = self.settings;
        let held_out = self.material.held_out.data.examples.iter();
        let all = settings.retention.iter().flat_map(|set| &set.rows).chain(held_out);
        let rows_max = all.map(Example::rows).max().unwrap_or(1);
        self.check(&result.name, subject.beside_bytes(rows_max))?;
        let on_task = subject.beside(&base, &self.material.held_out.data.examples, self.watcher)?;
        result.task_kl = Some(on_task.kl(Direction::Reverse) / on_task.targets as f64);
        if self.retained.is_empty() {
            self.retained = self.retained_by(&base)?;
        }
        let after = self.retained_by(subject)?;
        for ((set, before), after) in settings.retention.iter().zip(&self.retained).zip(after) {
            let found = subject.beside(&base, &set.rows, self.watcher)?;
            let n = found.targets as f64;
            let (delta_nll, kl) = ((found.loss - found.base_loss) / n, found.kl(Direction::Reverse) / n);
            let retained = before.clone().zip(after).map(|(before, after)| Retained { before, after });
            let told = retained.as_ref().map_or(String::new(), |r| {
                let [before, after] = [&r.before, &r.after].map(|c| c.iter().filter(|c| **c).count());
                format!(", {after} of {} solved, {before} before", r.after.len())
            });
            self.watcher.note(&format!(
                "{}: on {} the loss changed by {delta_nll:+.4}, KL(tuned‖base) {kl:.4}{told}",
                result.name, set.name
            ));
            result.retention.push(Retention { text: set.name.clone(), delta_nll, kl, retained });
        }
        Ok(())
    }

    /// Which answers of each retention task a model has right.
    fn retained_by(&mut self, subject: &Subject) -> Result<Vec<Option<Vec<bool>>>> {
        let free = self.free_bytes();
        let (tokens, samples) = (self.settings.answer_tokens, 0);
        let mut all = Vec::with_capacity(self.settings.retention.len());
        for set in &self.settings.retention {
            let Some((questions, metric)) = &set.task else {
                all.push(None);
                continue;
            };
            let asked = (Manner { metric: Some(*metric), tokens, samples }, self.text);
            all.push(answers::answer(subject, questions, &set.rows, asked, free, self.watcher)?.correct);
        }
        Ok(all)
    }

    /// The verdict, and the report of everything.
    fn conclude(self, started: Instant) -> Result<Outcome> {
        let (base, material, settings) = (self.base, self.material, self.settings);
        let binding = Binding {
            model: hex::encode(&base.model.digest()),
            data_split: material.digest.clone(),
            settings: settings_digest(base, settings, self.options),
            seed: settings.seed,
        };
        let results: Vec<ArmResult> = self.arms.iter().map(|arm| arm.result.clone()).collect();
        let verdict = judge(&results, &material.leaks, &settings.thresholds, &binding)?;
        let samples = samples(&self.questions, &self.arms, settings.samples);
        let (mut runs, mut scoring, mut kept, mut rate_test) = (Vec::new(), Vec::new(), Vec::new(), None);
        for arm in self.arms {
            runs.extend(arm.run);
            rate_test = rate_test.or(arm.rate_test);
            scoring.push(arm.scoring);
            kept.extend(arm.kept.map(|kept| (arm.result.name, kept)));
        }
        let report = Report {
            title: settings.title.clone(),
            model: model_facts(&base.model, binding.model)?,
            data: data_facts(material, settings),
            verdict: verdict.clone(),
            runs,
            scoring,
            rate_test,
            samples,
            settings: told_settings(base, settings),
            seconds: started.elapsed().as_secs_f64(),
        };
        Ok(Outcome { verdict, report, kept })
    }
}

/// Commits a bound adapter into its arm's folder.
fn save(adapter: &Adapter, folder: &Path) -> Result<PathBuf> {
    let Some(binding) = &adapter.binding else { unreachable!("bound when it was trained") };
    create_dir_within(&Disk, folder)?;
    Ok(adapter.save_bound(&Disk, folder, Stored::F32, binding)?.path)
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

fn data_facts(material: &Material, settings: &Settings) -> DataFacts {
    let Material { train, valid, held_out, .. } = material;
    DataFacts {
        task: match settings.metric {
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

fn told_settings(base: &Base, settings: &Settings) -> Vec<(String, String)> {
    let mut told = vec![
        ("activations".to_string(), format!("{:?}", base.precision).to_lowercase()),
        ("input gradients".to_string(), format!("{:?}", base.gradient).to_lowercase()),
        ("threads".to_string(), base.kernels.threads().to_string()),
    ];
    if settings.metric.is_some() {
        told.push(("tokens of an answer".to_string(), settings.answer_tokens.to_string()));
    }
    for r in &settings.recipes {
        let replay = match r.replay.len() {
            0 => String::new(),
            n => format!(", {n} rows of replay"),
        };
        let value =
            format!("seed {}, {} rows a step, budget {}{replay}", r.seed, r.batch, told_budget(r.budget));
        told.push((r.name.clone(), value));
    }
    told
}

fn told_budget(budget: Budget) -> String {
    match budget {
        Budget::Steps(n) => format!("{n} steps"),
        Budget::Epochs(n) => format!("{n} epochs"),
        Budget::Tokens(n) => format!("{n} tokens"),
        Budget::Minutes(n) => format!("{n:.1} minutes"),
    }
}

/// Digest of everything that shapes the figures, but the model and the data.
fn settings_digest(base: &Base, settings: &Settings, options: &DataOptions) -> String {
    let retained = |set: &RetentionSet| format!("{set:?}");
    let retention: Vec<String> = settings.retention.iter().map(retained).collect();
    let what = format!(
        "{:?} {:?} {:?} {:?} {:?} {} {:?} {:?} {:?} {} {}",
        (base.precision, base.gradient),
        settings.shots,
        settings.recipes,
        settings.metric,
        settings.thresholds,
        settings.answer_tokens,
        retention,
        (options.mask_prompt, options.raw, options.max_seq_length, options.over_long),
        (options.valid_fraction, options.split_seed),
        settings.memory_budget.unwrap_or_default(),
        env!("CARGO_PKG_VERSION"),
    );
    hex::encode(&Sha256::digest(what))
}
