//! What `compare` and `adapt` share: from their options to an outcome.

use std::path::{Path, PathBuf};

use clap::Args;
use engraft_runtime::compare::material::Material;
use engraft_runtime::compare::recipe::Recipe;
use engraft_runtime::compare::{Contest, InUse, Outcome, check, check_decidable, compare, fitting, shots};
use engraft_runtime::data::{DataOptions as Reading, Example, Format};
use engraft_runtime::error::{ErrorKind, Result};
use engraft_runtime::model::text::Text;
use engraft_runtime::plan::room;
use engraft_runtime::run::general::{self, Aside};
use engraft_runtime::run::{Base, Limit, Method, Observer, RunRows};
use engraft_runtime::storage::{Disk, FileLock, create_dir_all, lock_folder};

use crate::conditions::WhenOptions;
use crate::options::{
    ArmName, ArmOptions, ComputeOptions, DataOptions, GateOptions, ModelOptions, RowOptions, misuse,
    tell_rows,
};
use crate::provenance;
use crate::verbs::prepare::{Replay, read_general, read_replay};

/// What is compared, on what, and by what measure.
#[derive(Args, Clone, Debug)]
pub(crate) struct ContestOptions {
    #[command(flatten)]
    pub(crate) model: ModelOptions,

    /// Settings as a TOML file: keys are the long flags, and flags given here win
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) config: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) data: DataOptions,

    #[command(flatten)]
    rows: RowOptions,

    #[command(flatten)]
    arms: ArmOptions,

    #[command(flatten)]
    gate: GateOptions,

    #[command(flatten)]
    pub(crate) when: WhenOptions,

    #[command(flatten)]
    pub(crate) compute: ComputeOptions,
}

/// The parts of a comparison that the verb decides.
pub(crate) struct Verb<'a> {
    pub(crate) title: &'a str,
    /// The arms to compare when none are named.
    pub(crate) arms: &'a [ArmName],
    /// Whether to search for rates and ranks that aren't given, and leave out arms that don't fit.
    pub(crate) search: bool,
    /// What is in use, with the name of its arm.
    pub(crate) active: Option<(String, InUse)>,
    /// Finished adapters to judge, each with the name of its arm.
    pub(crate) given: Vec<(String, PathBuf)>,
    /// The folder for trained arms. Without one, adapters stay in memory and no whole model can be tuned.
    pub(crate) folder: Option<&'a Path>,
    /// The folder for checkpoints of unfinished arms.
    pub(crate) unfinished: &'a Path,
}

/// What a finished comparison leaves to its verb.
pub(crate) struct Held {
    pub(crate) outcome: Outcome,
    /// Whether the rows are conversations, so that prompts need the model's chat template.
    pub(crate) chat: bool,
    /// The lock on the folder, if there is one.
    pub(crate) lock: Option<FileLock>,
}

impl ContestOptions {
    /// The data's path, which must be given.
    ///
    /// # Errors
    /// `Misuse` without it, `Io` when there is no such file.
    pub(crate) fn data(&self) -> Result<&Path> {
        let missing = || misuse("--data is missing; name a folder that holds train.jsonl, or a .jsonl file");
        self.data.path()?.ok_or_else(missing)
    }

    /// Refuses an arm that the verb doesn't support.
    ///
    /// # Errors
    /// `Misuse`.
    pub(crate) fn refuse_arm(&self, arm: ArmName, why: &str) -> Result<()> {
        match self.arms.arms.contains(&arm) {
            true => Err(misuse(why)),
            false => Ok(()),
        }
    }

    /// Reads everything, trains and measures all arms, and judges them.
    ///
    /// # Errors
    /// Those of every step.
    pub(crate) fn hold(&self, verb: &Verb<'_>, observer: &mut dyn Observer) -> Result<Held> {
        self.arms.check()?;
        observer.ask()?;
        let model = self.model.open()?;
        let base = Base {
            held_bytes: Text::heap_bytes(&model)?,
            kernels: self.compute.kernels()?,
            precision: self.compute.precision,
            gradient: self.compute.gradient(),
            model,
        };
        let text = Text::of(&base.model)?;
        let reading = self.rows.reading(&self.data, base.model.config().context_len);
        let material = self.material(verb.search, &text, &reading)?;
        // A finished adapter may have been trained on all rows, after turns of its own: they can't judge it.
        if !material.folds.is_empty() && (self.arms.goes_on() || !verb.given.is_empty()) {
            let what = if self.arms.goes_on() { "--from" } else { "--folds" };
            return Err(misuse(format!(
                "{what}: the adapter may have seen every row that would be held out in turns; add a test.jsonl with rows \
                 that it hasn't"
            )));
        }
        if verb.search {
            check_decidable(&material, &self.gate.thresholds(false), reading.valid_fraction)?;
        }
        let contest = self.contest(verb, &base, &material, (&text, &reading), observer)?;
        // Before the folder is made: a refused run must leave none behind.
        check(&base, &material, &reading, &contest)?;
        let lock = match verb.folder {
            Some(folder) => {
                create_dir_all(&Disk, folder)?;
                Some(lock_folder(&Disk, folder).map_err(|e| e.at("--out"))?)
            }
            None => None,
        };
        let chat = material.train.data.format != Format::Text;
        let outcome = compare(&base, &material, (&text, &reading), &contest, observer)?;
        Ok(Held { outcome, chat, lock })
    }

    /// Reads the rows and prints how many there are of each kind.
    fn material(&self, search: bool, text: &Text, reading: &Reading) -> Result<Material> {
        let limits = self.rows.limits(search, self.gate.thresholds(false).examples_min);
        let material = Material::read(self.data()?, text, reading, limits)?;
        for (rows, what) in
            [(&material.train, "train"), (&material.valid, "validate"), (&material.held_out, "decide")]
        {
            tell_rows(&rows.data, reading.max_seq_length);
            let (rows, targets) = rows.extent();
            eprintln!("to {what}: {rows} rows with {targets} targets");
        }
        if self.rows.asks_for_turns() && material.folds.is_empty() {
            let file = material.held_out.data.source.display();
            return Err(misuse(format!(
                "--folds has no effect: {file} holds the rows that decide; leave it out"
            )));
        }
        if !material.folds.is_empty() {
            eprintln!(
                "few rows: each is held out in one of {} turns, and what is promoted is trained on all",
                material.folds.len()
            );
        }
        for leak in &material.leaks {
            let how = if leak.exact { "equals" } else { "nearly equals" };
            eprintln!("leak: held-out row {} {how} {}", leak.held_out, leak.train);
        }
        Ok(material)
    }

    fn contest(
        &self,
        verb: &Verb<'_>,
        base: &Base,
        material: &Material,
        (text, reading): (&Text, &Reading),
        observer: &mut dyn Observer,
    ) -> Result<Contest> {
        let arms = self.arms.or(verb.arms);
        let limit = self.limit(base);
        let recipes = self.arms.recipes(arms, (verb.search, 1 + material.folds.len()), &base.model)?;
        let replay = self.replay(base, (text, reading), &limit, observer)?;
        let (general, aside) = self.ordinary(verb.search, &recipes, (text, reading))?;
        warn_of_full(&recipes, base, observer);
        let shared = RunRows { replay: &replay, general: &general, aside: &aside, ..RunRows::default() };
        let shots = if arms.contains(&ArmName::FewShot) { self.arms.few_shot() } else { Vec::new() };
        let parts = (&material.train, &material.held_out);
        let shots = shots::fitting(shots, base, parts, (text, reading), observer)?;
        let prompts = !shots.is_empty();
        // If no arm fits, examples in the prompt can still be compared with the base.
        let how = (verb.search && !self.arms.has_rank(), verb.search, verb.folder.is_some());
        let recipes = match fitting(recipes, base, material, (shared, &limit), how, observer) {
            Err(error) if verb.search && prompts && error.kind() == ErrorKind::DoesNotFit => Vec::new(),
            recipes => recipes?,
        };
        Ok(Contest {
            title: verb.title.to_string(),
            active: verb.active.clone(),
            given: verb.given.clone(),
            shots,
            recipes,
            replay,
            general,
            aside,
            metric: self.rows.metric(),
            answer_tokens: self.rows.answer_tokens(),
            retention: self.gate.retention(text, reading, self.rows.named_metric())?,
            thresholds: self.gate.thresholds(prompts),
            seed: self.gate.seed,
            samples: self.rows.samples as usize,
            minutes: self.arms.minutes,
            limit,
            folder: verb.folder.map(Path::to_path_buf),
            unfinished: Some(verb.unfinished.to_path_buf()),
        })
    }

    /// Ordinary text to train with, if an arm needs any, and, for a search that is judged by such text, some that no
    /// training sees.
    fn ordinary(
        &self,
        search: bool,
        recipes: &[Recipe],
        (text, reading): (&Text, &Reading),
    ) -> Result<(Vec<Example>, Vec<Aside>)> {
        let trains = recipes.iter().any(|recipe| recipe.settings.reads_general());
        let calibrates = search && !recipes.is_empty() && self.gate.judges_built_in();
        if !trains && !calibrates {
            return Ok((Vec::new(), Vec::new()));
        }
        let all = read_general(&self.arms.forgetting, &self.data, text, reading.max_seq_length)?;
        let (general, aside) = if calibrates { general::set_aside(all) } else { (all, Vec::new()) };
        Ok((if trains { general } else { Vec::new() }, aside))
    }

    /// The budget asked for, and the memory that the machine or the named device leaves.
    fn limit(&self, base: &Base) -> Limit {
        let device = self.when.device().and_then(provenance::room);
        let room = room::here(base.kernels.threads()).map(|here| here.or_less(device.clone())).or(device);
        Limit { budget: self.arms.memory.memory_budget, room }
    }

    /// The rows to replay among the training rows.
    fn replay(
        &self,
        base: &Base,
        (text, reading): (&Text, &Reading),
        limit: &Limit,
        observer: &mut dyn Observer,
    ) -> Result<Vec<Example>> {
        let seed = self.rows.seed();
        match read_replay(&self.arms.forgetting, &self.data, text, reading.max_seq_length, seed)? {
            Replay::Rows(rows) => Ok(rows),
            Replay::Sampled(sampled) => {
                sampled.check(base, limit)?;
                let rows = sampled.rows(base, observer)?;
                observer.note(&format!("sampled {} rows from the base to replay", rows.len()));
                Ok(rows)
            }
        }
    }
}

/// Parameters below which tuning every weight mostly does harm (arXiv 2606.06920).
const TOO_FEW_PARAMETERS: usize = 500_000_000;

/// Warns before a small model is tuned in every weight.
fn warn_of_full(recipes: &[Recipe], base: &Base, observer: &mut dyn Observer) {
    let full = recipes.iter().find(|r| matches!(r.settings.method, Method::Full(_)));
    let parameters = full.map_or(0, |full| full.settings.method.parameters(base.model.config()));
    if let Some(full) = full.filter(|_| parameters < TOO_FEW_PARAMETERS) {
        observer.note(&format!(
            "{}: tuned in every weight, models as small as this one ({} million parameters) often end up worse than \
             untouched",
            full.name,
            parameters / 1_000_000
        ));
    }
}
