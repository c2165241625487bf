//! Makes arms ready and measures them, one in memory at a time.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::answers::{self, Manner, Question};
use super::clock::Clock;
use super::facts::Measured;
use super::material::Material;
use super::recipe::Recipe;
use super::score::Subject;
use super::shots::{self, Choice};
use super::strength::{self, Weakened};
use super::train::train;
use super::{Contest, InUse, MODEL_FILE, Product, SCORING_BYTES, ZERO_SHOT, held_bytes};
use crate::adapter::{Adapter, StoredAs};
use crate::bytes::mib;
use crate::data::{DataOptions, Example};
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::gate::report::{ArmRun, RateTest, Scoring};
use crate::gate::verdict::{ArmKind, ArmResult, Retained, Retention};
use crate::generate::StackedAdapter;
use crate::hex;
use crate::merge;
use crate::model::text::Text;
use crate::model::tuned::TunedModel;
use crate::model::weights::ModelFile;
use crate::nn::divergence::Direction;
use crate::probe::Prober;
use crate::run::checkpoint::stated_digest;
use crate::run::{Base, Method, Observer, Trained};
use crate::storage::{Disk, create_dir_within};

/// Held-out rows that tell how far a tuned model is from its base, where no ceiling depends on it.
const TASK_ROWS: usize = 50;
/// Passes over the rows set aside that strength takes: one where all of it is tolerable, at most four.
const STRENGTH_PASSES: usize = 2;

/// An arm of a contest.
#[derive(Clone, Copy)]
pub(super) enum Arm<'a> {
    /// The base alone.
    ZeroShot,
    /// What is in use.
    Active(&'a str, &'a InUse),
    /// The base behind so many examples.
    FewShot(usize, Choice),
    /// Trained by a recipe.
    Trained(&'a Recipe),
    /// A finished adapter that may be promoted.
    Given(&'a str, &'a Path),
}

impl<'a> Arm<'a> {
    /// All arms of a contest, in the order of its report.
    pub(super) fn of(contest: &'a Contest) -> Vec<Arm<'a>> {
        let active = contest.active.iter().map(|(name, what)| Arm::Active(name, what));
        let shots = contest.shots.iter().map(|(k, choice)| Arm::FewShot(*k, *choice));
        let given = contest.given.iter().map(|(name, file)| Arm::Given(name, file));
        let trained = contest.recipes.iter().map(Arm::Trained);
        std::iter::once(Arm::ZeroShot).chain(active).chain(shots).chain(trained).chain(given).collect()
    }
}

/// An arm that is ready to be measured.
pub(super) struct Made<'a> {
    name: String,
    kind: ArmKind,
    pub(super) subject: Subject,
    /// Whether its weights aren't the base's alone.
    pub(super) is_tuned: bool,
    /// The held-out rows as it sees them.
    rows: Cow<'a, [Example]>,
    kept: Option<Product>,
    run: Option<ArmRun>,
    rate_test: Option<RateTest>,
    strength: Option<f64>,
    made_before: Option<String>,
}

impl<'a> Made<'a> {
    /// An arm that leaves nothing, and sees the held-out rows as they are.
    fn new(name: &str, kind: ArmKind, subject: Subject, material: &'a Material) -> Made<'a> {
        Made {
            name: name.to_string(),
            kind,
            subject,
            is_tuned: false,
            rows: Cow::Borrowed(&material.held_out.data.examples),
            kept: None,
            run: None,
            rate_test: None,
            strength: None,
            made_before: None,
        }
    }

    /// Hands what it leaves to its measurement.
    pub(super) fn left_to(self, measured: &mut Measured) {
        let Made { kept, run, rate_test, strength, made_before, .. } = self;
        measured.result.strength = strength;
        (measured.kept, measured.run) = (kept, run);
        (measured.rate_test, measured.made_before) = (rate_test, made_before);
    }
}

/// The contest, and what its arms are measured with.
pub(super) struct Panel<'a> {
    pub(super) base: &'a Base,
    material: &'a Material,
    text: &'a Text,
    options: &'a DataOptions,
    pub(super) contest: &'a Contest,
    pub(super) questions: Vec<Question>,
    pub(super) observer: &'a mut dyn Observer,
    clock: &'a Clock,
    /// The most that a training was planned to take, in bytes; `None` without one.
    planned: Option<u64>,
    /// Which answers the base gets right in each retention task, computed when needed.
    retained: Vec<Option<Vec<bool>>>,
}

impl<'a> Panel<'a> {
    pub(super) fn new(
        base: &'a Base,
        material: &'a Material,
        (text, options): (&'a Text, &'a DataOptions),
        contest: &'a Contest,
        (observer, clock): (&'a mut dyn Observer, &'a Clock),
    ) -> Panel<'a> {
        let questions = answers::questions(&material.held_out, text);
        let plans = contest.recipes.iter().filter_map(|recipe| {
            let planned = recipe.check(base, material, contest.shared(), &contest.limit).ok()?;
            Some(planned.plan.private_bytes as u64)
        });
        let (planned, retained) = (plans.max(), Vec::new());
        Panel { base, material, text, options, contest, questions, observer, clock, planned, retained }
    }

    pub(super) fn subject(&self, adapter: Option<Arc<StackedAdapter>>) -> Subject {
        Subject { adapter, ..Subject::of(self.base) }
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

    /// What of so many bytes is left beside the model, the tokenizer and the rows.
    fn left_of(&self, bytes: u64) -> usize {
        let Material { train, valid, held_out, .. } = self.material;
        let rows: usize = [train, valid, held_out].iter().map(|rows| rows.data.heap_bytes()).sum();
        let held = self.base.resident_bytes() + self.material.text_bytes() + rows;
        usize::try_from(bytes).unwrap_or(usize::MAX).saturating_sub(held)
    }

    /// The memory for scoring: no more than what training was planned to take.
    fn free_bytes(&self) -> usize {
        let budget = self.budget().unwrap_or(SCORING_BYTES);
        self.left_of(budget.min(self.planned.unwrap_or(budget)))
    }

    /// Refuses scoring that exceeds the budget, if there is one.
    pub(super) fn check(&self, arm: &str, bytes: usize) -> Result<()> {
        let Some(free) = self.budget().map(|budget| self.left_of(budget)) else { return Ok(()) };
        if bytes <= free {
            return Ok(());
        }
        let message = format!(
            "{arm}: scoring needs {} of private memory beside the data; the budget leaves {}",
            mib(bytes),
            mib(free)
        );
        Err(Error::new(ErrorKind::DoesNotFit, message).advise(Advice::FewerExamplesOrShorterRows))
    }

    /// Makes an arm ready and measures it on the held-out rows; if it was tuned, also what it forgot.
    pub(super) fn measured(&mut self, arm: &Arm<'_>) -> Result<Measured> {
        let made = self.made(arm)?;
        let mut measured = self.measure(&made)?;
        self.tell_time();
        if made.is_tuned {
            self.forgetting(&made.subject, &mut measured.result)?;
        }
        made.left_to(&mut measured);
        Ok(measured)
    }

    /// Makes an arm ready: what answers, behind which rows, and what it leaves.
    pub(super) fn made(&mut self, arm: &Arm<'_>) -> Result<Made<'a>> {
        let (contest, material) = (self.contest, self.material);
        match *arm {
            Arm::ZeroShot => Ok(Made::new(ZERO_SHOT, ArmKind::ZeroShot, self.subject(None), material)),
            Arm::Active(name, InUse::Adapter(file)) => self.finished(name, ArmKind::Active, file),
            Arm::Active(name, InUse::FewShot(messages)) => {
                let (rows, subject) = (&material.held_out, self.subject(None));
                let how = (self.text, self.options);
                let rows = shots::rows_behind_all(rows, messages, how, subject.context())?;
                let turns: Vec<_> = messages.iter().map(|m| (&m.role, &m.content)).collect();
                let made_before = Some(hex::encode(&stated_digest(&turns)));
                let made = Made::new(name, ArmKind::Active, subject, material);
                Ok(Made { rows: Cow::Owned(rows), made_before, ..made })
            }
            Arm::FewShot(k, choice) => self.few_shot(k, choice),
            Arm::Trained(recipe) => self.trained(recipe, contest),
            Arm::Given(name, file) => {
                let made = self.finished(name, ArmKind::Trained, file)?;
                Ok(Made { kept: Some(Product::File(file.to_path_buf())), ..made })
            }
        }
    }

    /// An adapter that was trained before.
    fn finished(&mut self, name: &str, kind: ArmKind, file: &Path) -> Result<Made<'a>> {
        let adapter = Adapter::load(file)?;
        adapter
            .check_base(&self.base.model.digest(), self.base.model.config())
            .map_err(|e| e.at(file.display()))?;
        let computed = adapter.binding.as_ref().map(|binding| binding.adapted.0.to_vec());
        let (subject, _) = self.stacked(adapter)?;
        let made_before = Some(hex::encode(&stated_digest(&computed)));
        Ok(Made { made_before, is_tuned: true, ..Made::new(name, kind, subject, self.material) })
    }

    fn few_shot(&mut self, k: usize, choice: Choice) -> Result<Made<'a>> {
        let name = match choice {
            Choice::Seeded(0) => format!("{k}-shot"),
            Choice::Seeded(seed) => format!("{k}-shot seed {seed}"),
            Choice::Nearest => format!("{k}-shot nearest"),
        };
        let subject = self.subject(None);
        let parts = (&self.material.train, &self.material.held_out);
        let how = (self.text, self.options);
        let (rows, shots) = shots::rows_after((k, choice), parts, how, &subject, subject.context())?;
        let made = Made::new(&name, ArmKind::FewShot { k }, subject, self.material);
        Ok(Made { rows: Cow::Owned(rows), kept: Some(Product::FewShot(shots)), ..made })
    }

    /// Trains by a recipe. What forgets too much at any strength is trained again, more gently, while there is time.
    fn trained(&mut self, recipe: &Recipe, contest: &Contest) -> Result<Made<'a>> {
        let before = contest.recipes.iter().take_while(|r| r.name != recipe.name);
        let held: usize = before.map(|r| held_bytes(r, self.base, contest.folder.is_some())).sum();
        let base = self.base.beside(held);
        self.observer.note(&format!("{}: {}", recipe.name, recipe.settings.method.describe()));
        let (mut attempt, mut tried) = (recipe.clone(), 0);
        loop {
            tried += 1;
            let ends = self.training_ends();
            let (trained, run, rate_test) =
                train(&attempt, &base, self.material, contest, (ends, self.observer))?;
            let adapter = match trained {
                Trained::Full(tuned) => {
                    self.clock.judged();
                    return self.tuned(recipe, &tuned, run, rate_test);
                }
                Trained::Adapter(adapter) => *adapter,
            };
            let weakened = strength::choose(self, adapter, &recipe.name)?;
            if !weakened.is_tolerable
                && let Some(gentler) = recipe.gentler(&attempt, (tried, run.learning_rate), self.clock.left())
            {
                let rate = gentler.settings.rate.unwrap_or_default();
                self.observer.note(&format!(
                    "{}: forgets too much at any strength; trained again, at a rate of {rate:.1e}",
                    recipe.name
                ));
                attempt = gentler;
                continue;
            }
            self.clock.judged();
            let Weakened { adapter, factor, .. } = weakened;
            let (mut run, strength) = (run, (factor < 1.0).then_some(f64::from(factor)));
            run.arm.clone_from(&recipe.name);
            if strength.is_some() {
                run.what += &format!(", at {factor} of its strength");
            }
            let (subject, kept) = self.adapted(adapter, &recipe.name)?;
            let made = Made::new(&recipe.name, recipe.kind(), subject, self.material);
            return Ok(Made {
                is_tuned: true,
                kept: Some(kept),
                run: Some(run),
                rate_test,
                strength,
                ..made
            });
        }
    }

    /// When a training has to end.
    fn training_ends(&self) -> Option<Instant> {
        let (held_out, beside) = self.to_judge();
        self.clock.training_ends(held_out, beside)
    }

    /// Tells once how the time is shared, as soon as it is known how long measuring takes.
    fn tell_time(&mut self) {
        let (held_out, beside) = self.to_judge();
        let Some((all, training)) = self.clock.shares(held_out, beside) else { return };
        let minutes = |seconds: f64| format!("{}:{:02}", seconds as u64 / 60, seconds as u64 % 60);
        self.observer.note(&format!(
            "time: {} of {} for training, the rest for measuring and judging",
            minutes(training),
            minutes(all)
        ));
    }

    /// Tokens that a trained arm reads to be judged: alone, and beside its base.
    fn to_judge(&self) -> (usize, usize) {
        let tokens = |rows: &[Example]| rows.iter().map(Example::rows).sum::<usize>();
        let (held_out, contest) = (tokens(&self.material.held_out.data.examples), self.contest);
        let retention: usize = contest.retention.iter().map(|set| tokens(&set.rows)).sum();
        let aside: usize = contest.aside.iter().map(|set| tokens(&set.rows)).sum();
        let on_task = tokens(&self.on_task());
        (held_out, on_task + retention + STRENGTH_PASSES * aside)
    }

    /// A model tuned in every weight, as its file gives it.
    fn tuned(
        &self,
        recipe: &Recipe,
        tuned: &TunedModel,
        run: ArmRun,
        rate_test: Option<RateTest>,
    ) -> Result<Made<'a>> {
        let Method::Full(dtype) = recipe.settings.method else {
            unreachable!("a full fine-tuning arm has tuned weights")
        };
        let folder = self.contest.folder.clone().unwrap_or_default().join(&recipe.name);
        create_dir_within(&Disk, &folder)?;
        let file = merge::tuned::write(&Disk, &folder, MODEL_FILE, tuned, dtype)?.path;
        let weights = Arc::new(ModelFile::open(&file)?).into();
        let made =
            Made::new(&recipe.name, recipe.kind(), Subject { weights, ..self.subject(None) }, self.material);
        Ok(Made { is_tuned: true, kept: Some(Product::Model(file)), run: Some(run), rate_test, ..made })
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

    /// An arm's losses on the held-out rows, and its answers.
    fn measure(&mut self, made: &Made<'_>) -> Result<Measured> {
        let Made { name, subject, rows, .. } = made;
        let free = self.free_bytes();
        let rows_max = rows.iter().map(Example::rows).max().unwrap_or(1);
        self.check(name, subject.losses_bytes(rows_max))?;
        let scored = subject.losses(rows, self.observer)?;
        let Contest { metric, answer_tokens: tokens, samples, .. } = *self.contest;
        let asked = (Manner { metric, tokens, samples }, self.text);
        let answered = answers::answer(subject, &self.questions, rows, asked, free, self.observer)?;
        self.clock.scored((scored.tokens, scored.seconds), answered.seconds);
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
            name: name.clone(),
            kind: made.kind,
            nll: scored.nll,
            correct: answered.correct,
            retention: Vec::new(),
            task_kl: None,
            strength: None,
        };
        let scoring = Scoring {
            arm: name.clone(),
            prefix_tokens: scored.prefix_tokens as u64,
            tokens: scored.tokens as u64,
            nll_seconds: scored.seconds,
            generated_tokens: answered.tokens as u64,
            generate_seconds: answered.seconds,
        };
        let samples = answered.samples;
        Ok(Measured { result, scoring, run: None, rate_test: None, kept: None, made_before: None, samples })
    }

    /// The held-out rows on which a tuned model is compared with its base: all of them if a ceiling depends on it, else
    /// some, evenly spread.
    fn on_task(&self) -> Cow<'a, [Example]> {
        let all = &self.material.held_out.data.examples;
        match self.contest.thresholds.task_kl_max {
            None if all.len() > TASK_ROWS => {
                Cow::Owned(answers::shown(all.len(), TASK_ROWS).into_iter().map(|i| all[i].clone()).collect())
            }
            _ => Cow::Borrowed(all),
        }
    }

    /// How far a tuned model is from its base, on the task and on the retention sets.
    pub(super) fn forgetting(&mut self, subject: &Subject, result: &mut ArmResult) -> Result<()> {
        let base = self.subject(None);
        let contest = self.contest;
        let held_out = self.material.held_out.data.examples.iter();
        let all = contest.retention.iter().flat_map(|set| &set.rows).chain(held_out);
        let rows_max = all.map(Example::rows).max().unwrap_or(1);
        self.check(&result.name, subject.beside_bytes(rows_max))?;
        let held_out = self.on_task();
        let on_task = subject.beside(&base, &held_out, self.observer)?;
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
}

/// Commits a bound adapter into its arm's folder.
fn save(adapter: &Adapter, folder: &Path) -> Result<PathBuf> {
    let Some(binding) = &adapter.binding else { unreachable!("bound when it was trained") };
    create_dir_within(&Disk, folder)?;
    Ok(adapter.save_bound(&Disk, folder, StoredAs::F32, binding)?.path)
}
