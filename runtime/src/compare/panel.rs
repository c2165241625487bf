//! Measures the arms one after the other, one in memory at a time.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::answers::{self, Manner, Question};
use super::facts::Measured;
use super::material::Material;
use super::recipe::Recipe;
use super::score::Subject;
use super::shots::{self, Choice};
use super::strength;
use super::train::train;
use super::{Contest, InUse, MODEL_FILE, Outcome, Product, SCORING_BYTES, ZERO_SHOT, facts, held_bytes};
use crate::adapter::{Adapter, StoredAs};
use crate::bytes::mib;
use crate::data::{DataOptions, Example};
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::gate::report::Scoring;
use crate::gate::verdict::{ArmKind, ArmResult, Retained, Retention};
use crate::generate::StackedAdapter;
use crate::hex;
use crate::merge;
use crate::model::text::Text;
use crate::model::weights::ModelFile;
use crate::nn::divergence::Direction;
use crate::probe::Prober;
use crate::run::checkpoint::stated_digest;
use crate::run::{Base, Method, Observer, Trained};
use crate::storage::{Disk, create_dir_within};

/// The measurements so far, and what they are taken with.
pub(super) struct Panel<'a> {
    pub(super) base: &'a Base,
    material: &'a Material,
    text: &'a Text,
    options: &'a DataOptions,
    pub(super) contest: &'a Contest,
    questions: Vec<Question>,
    pub(super) observer: &'a mut dyn Observer,
    arms: Vec<Measured>,
    /// Which answers the base gets right in each retention task, computed when needed.
    retained: Vec<Option<Vec<bool>>>,
}

impl<'a> Panel<'a> {
    pub(super) fn new(
        base: &'a Base,
        material: &'a Material,
        (text, options): (&'a Text, &'a DataOptions),
        contest: &'a Contest,
        observer: &'a mut dyn Observer,
    ) -> Panel<'a> {
        let questions = answers::questions(&material.held_out, text);
        let (arms, retained) = (Vec::new(), Vec::new());
        Panel { base, material, text, options, contest, questions, observer, arms, retained }
    }

    pub(super) fn subject(&self, adapter: Option<Arc<StackedAdapter>>) -> Subject {
        Subject {
            weights: self.base.model.clone().into(),
            adapter,
            kernels: self.base.kernels.clone(),
            precision: self.base.precision,
        }
    }

    /// The requested bytes, capped by what the machine has left; `None` if nothing was requested and the
    /// machine has room for the defaults.
    fn budget(&self) -> Option<u64> {
        let limit = &self.contest.limit;
        match limit.budget {
            Some(_) => limit.bytes(),
            None => limit.bytes().filter(|room| *room < SCORING_BYTES),
        }
    }

    /// The memory for scoring, beside the model, the tokenizer and the rows.
    fn free_bytes(&self) -> usize {
        let Material { train, valid, held_out, .. } = self.material;
        let rows: usize = [train, valid, held_out].iter().map(|rows| rows.data.heap_bytes()).sum();
        let held = self.base.resident_bytes() + self.material.text_bytes() + rows;
        let budget = self.budget().unwrap_or(SCORING_BYTES);
        usize::try_from(budget).unwrap_or(usize::MAX).saturating_sub(held)
    }

    /// Refuses scoring that exceeds the budget, if there is one.
    pub(super) fn check(&self, arm: &str, bytes: usize) -> Result<()> {
        let free = self.free_bytes();
        if self.budget().is_none() || bytes <= free {
            return Ok(());
        }
        let message = format!(
            "{arm}: scoring needs {} of private memory beside the data; the budget leaves {}",
            mib(bytes),
            mib(free)
        );
        Err(Error::new(ErrorKind::DoesNotFit, message).advise(Advice::FewerExamplesOrShorterRows))
    }

    pub(super) fn zero_shot(&mut self) -> Result<()> {
        let subject = self.subject(None);
        let rows = &self.material.held_out.data.examples;
        let measured = self.measure(ZERO_SHOT, ArmKind::ZeroShot, &subject, rows)?;
        self.arms.push(measured);
        Ok(())
    }

    /// Measures what is in use, if anything is beside the base alone.
    pub(super) fn active(&mut self) -> Result<()> {
        let contest = self.contest;
        let measured = match &contest.active {
            None => return Ok(()),
            Some((name, InUse::FewShot(messages))) => {
                let (rows, subject) = (&self.material.held_out, self.subject(None));
                let how = (self.text, self.options);
                let rows = shots::rows_behind_all(rows, messages, how, subject.context())?;
                let mut measured = self.measure(name, ArmKind::Active, &subject, &rows)?;
                let turns: Vec<_> = messages.iter().map(|m| (&m.role, &m.content)).collect();
                measured.made_before = Some(hex::encode(&stated_digest(&turns)));
                measured
            }
            Some((name, InUse::Adapter(file))) => self.finished(name, ArmKind::Active, file)?,
        };
        self.arms.push(measured);
        Ok(())
    }

    /// Measures a finished adapter that may be promoted.
    pub(super) fn given(&mut self, name: &str, file: &Path) -> Result<()> {
        let mut measured = self.finished(name, ArmKind::Trained, file)?;
        measured.kept = Some(Product::File(file.to_path_buf()));
        self.arms.push(measured);
        Ok(())
    }

    /// The figures of an adapter that was trained before.
    fn finished(&mut self, name: &str, kind: ArmKind, file: &Path) -> Result<Measured> {
        let adapter = Adapter::load(file)?;
        adapter
            .check_base(&self.base.model.digest(), self.base.model.config())
            .map_err(|e| e.at(file.display()))?;
        let computed = adapter.binding.as_ref().map(|binding| binding.adapted.0.to_vec());
        let (subject, _) = self.stacked(adapter)?;
        let rows = &self.material.held_out.data.examples;
        let mut measured = self.measure(name, kind, &subject, rows)?;
        self.forgetting(&subject, &mut measured.result)?;
        measured.made_before = Some(hex::encode(&stated_digest(&computed)));
        Ok(measured)
    }

    pub(super) fn few_shot(&mut self, k: usize, choice: Choice) -> Result<()> {
        let name = match choice {
            Choice::Seeded(0) => format!("{k}-shot"),
            Choice::Seeded(seed) => format!("{k}-shot seed {seed}"),
            Choice::Nearest => format!("{k}-shot nearest"),
        };
        let subject = self.subject(None);
        let parts = (&self.material.train, &self.material.held_out);
        let how = (self.text, self.options);
        let (rows, shots) = shots::rows_after((k, choice), parts, how, &subject, subject.context())?;
        let mut measured = self.measure(&name, ArmKind::FewShot { k }, &subject, &rows)?;
        measured.kept = Some(Product::FewShot(shots));
        self.arms.push(measured);
        Ok(())
    }

    pub(super) fn trained(&mut self, recipe: &Recipe) -> Result<()> {
        let contest = self.contest;
        let before = contest.recipes.iter().take_while(|r| r.name != recipe.name);
        let held: usize = before.map(|r| held_bytes(r, self.base, contest.folder.is_some())).sum();
        let base = self.base.beside(held);
        self.observer.note(&format!("{}: {}", recipe.name, recipe.settings.method.describe()));
        let (trained, run, rate_test) = train(recipe, &base, self.material, contest, self.observer)?;
        let (mut run, mut strength) = (run, None);
        let (subject, kept) = match trained {
            Trained::Adapter(adapter) => {
                let (adapter, factor) = strength::choose(self, *adapter, &recipe.name)?;
                if factor < 1.0 {
                    run.what += &format!(", at {factor} of its strength");
                    strength = Some(f64::from(factor));
                }
                self.adapted(adapter, &recipe.name)?
            }
            Trained::Full(tuned) => {
                let Method::Full(dtype) = recipe.settings.method else {
                    unreachable!("a full fine-tuning arm has tuned weights")
                };
                let folder = contest.folder.clone().unwrap_or_default().join(&recipe.name);
                create_dir_within(&Disk, &folder)?;
                let file = merge::tuned::write(&Disk, &folder, MODEL_FILE, &tuned, dtype)?.path;
                drop(tuned);
                let weights = Arc::new(ModelFile::open(&file)?).into();
                (Subject { weights, ..self.subject(None) }, Product::Model(file))
            }
        };
        let rows = &self.material.held_out.data.examples;
        let kind = if recipe.baseline { ArmKind::Baseline } else { ArmKind::Trained };
        let mut measured = self.measure(&recipe.name, kind, &subject, rows)?;
        self.forgetting(&subject, &mut measured.result)?;
        measured.result.strength = strength;
        measured.run = Some(run);
        measured.rate_test = rate_test;
        measured.kept = Some(kept);
        self.arms.push(measured);
        Ok(())
    }

    /// Binds an adapter to its base, puts it to use and keeps it.
    fn adapted(&self, mut adapter: Adapter, name: &str) -> Result<(Subject, Product)> {
        let mut prober = Prober::new(&self.base.model, &self.base.kernels, adapter.layout.rank_max());
        adapter.binding = Some(prober.bind(&adapter)?);
        let (subject, adapter) = self.stacked(adapter)?;
        let kept = match &self.contest.folder {
            Some(folder) => Product::File(save(&adapter, &folder.join(name))?),
            None => Product::Adapter(Box::new(adapter)),
        };
        Ok((subject, kept))
    }

    /// The base with an adapter, and the adapter again.
    fn stacked(&self, adapter: Adapter) -> Result<(Subject, Adapter)> {
        let alone = [(adapter, 1.0)];
        let subject = self.subject(Some(self.base.stack(&alone)?));
        let [(adapter, _)] = alone;
        Ok((subject, adapter))
    }

    /// This arm's losses on the held-out rows, and its answers.
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
        let scored = subject.losses(rows, self.observer)?;
        let Contest { metric, answer_tokens: tokens, samples, .. } = *self.contest;
        let asked = (Manner { metric, tokens, samples }, self.text);
        let answered = answers::answer(subject, &self.questions, rows, asked, free, self.observer)?;
        let targets: usize = scored.nll.iter().map(|e| e.targets).sum();
        let nll = scored.nll.iter().map(|e| e.sum).sum::<f64>() / targets as f64;
        let share = answered.correct.as_ref().map(|c| {
            let solved = c.iter().filter(|c| **c).count();
            format!(", {solved} of {} solved in {:.1} s", c.len(), answered.seconds)
        });
        let speed = scored.tokens as f64 / scored.seconds;
        self.observer.note(&format!(
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
            strength: None,
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
        Ok(Measured { result, scoring, run: None, rate_test: None, kept: None, made_before: None, samples })
    }

    /// How far a tuned model is from its base, on the task and on the retention sets.
    fn forgetting(&mut self, subject: &Subject, result: &mut ArmResult) -> Result<()> {
        let base = self.subject(None);
        let contest = self.contest;
        let held_out = self.material.held_out.data.examples.iter();
        let all = contest.retention.iter().flat_map(|set| &set.rows).chain(held_out);
        let rows_max = all.map(Example::rows).max().unwrap_or(1);
        self.check(&result.name, subject.beside_bytes(rows_max))?;
        let on_task = subject.beside(&base, &self.material.held_out.data.examples, self.observer)?;
        result.task_kl = Some(on_task.kl(Direction::Reverse) / on_task.targets as f64);
        if self.retained.is_empty() {
            self.retained = self.retained_by(&base)?;
        }
        let after = self.retained_by(subject)?;
        for ((set, before), after) in contest.retention.iter().zip(&self.retained).zip(after) {
            let found = subject.beside(&base, &set.rows, self.observer)?;
            let n = found.targets as f64;
            let (delta_nll, kl) = ((found.loss - found.base_loss) / n, found.kl(Direction::Reverse) / n);
            let retained = before.clone().zip(after).map(|(before, after)| Retained { before, after });
            let told = retained.as_ref().map_or(String::new(), |r| {
                let [before, after] = [&r.before, &r.after].map(|c| c.iter().filter(|c| **c).count());
                format!(", {after} of {} solved, {before} before", r.after.len())
            });
            self.observer.note(&format!(
                "{}: on {} the loss changed by {delta_nll:+.4}, KL(tuned‖base) {kl:.4}{told}",
                result.name, set.name
            ));
            result.retention.push(Retention { text: set.name.clone(), delta_nll, kl, retained });
        }
        Ok(())
    }

    /// Which answers a model gets right in each retention task.
    fn retained_by(&mut self, subject: &Subject) -> Result<Vec<Option<Vec<bool>>>> {
        let free = self.free_bytes();
        let (tokens, samples) = (self.contest.answer_tokens, 0);
        let mut all = Vec::with_capacity(self.contest.retention.len());
        for set in &self.contest.retention {
            let Some((questions, metric)) = &set.task else {
                all.push(None);
                continue;
            };
            let asked = (Manner { metric: Some(*metric), tokens, samples }, self.text);
            all.push(answers::answer(subject, questions, &set.rows, asked, free, self.observer)?.correct);
        }
        Ok(all)
    }

    /// The verdict and the full report.
    pub(super) fn conclude(self, started: Instant) -> Result<Outcome> {
        let Panel { base, material, options, contest, questions, arms, .. } = self;
        facts::conclude((base, material, options, contest), &questions, arms, started)
    }
}

/// Commits a bound adapter into its arm's folder.
fn save(adapter: &Adapter, folder: &Path) -> Result<PathBuf> {
    let Some(binding) = &adapter.binding else { unreachable!("bound when it was trained") };
    create_dir_within(&Disk, folder)?;
    Ok(adapter.save_bound(&Disk, folder, StoredAs::F32, binding)?.path)
}
