//! Options of verbs that compare arms, and how they become settings of the comparison.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum, value_parser};
use engraft_kernels::DType;
use engraft_runtime::adapter::LoraConfig;
use engraft_runtime::compare::Settings;
use engraft_runtime::compare::answers::Metric;
use engraft_runtime::compare::material::{Limits, Material, Rows};
use engraft_runtime::compare::recipe::{Base, Budget, Method, Recipe, choose_rank};
use engraft_runtime::compare::retention::RetentionSet;
use engraft_runtime::compare::shots::Choice;
use engraft_runtime::data::{self, DataOptions as Reading, OverLong};
use engraft_runtime::error::{Error, ErrorKind, Result};
use engraft_runtime::gate::retention;
use engraft_runtime::gate::task::Task;
use engraft_runtime::gate::verdict::Thresholds;
use engraft_runtime::model::text::Text;
use engraft_runtime::plan::room::{self, Room};
use engraft_runtime::plan::show_bytes;
use engraft_runtime::train::{Direction, KlPenalty};

use crate::conditions::WhenOptions;
use crate::options::{self, ComputeOptions, DataOptions, FineTune, ModelOptions, Modules, misuse, stat};
use crate::provenance;
use crate::units;
use crate::verbs::common;

/// Steps of an arm that is given no budget.
const ITERS_DEFAULT: u64 = 300;
/// Evaluations of a run without a better one, after which it ends.
const PATIENCE: u32 = 3;

/// Whose limit it is that a flag sets.
const ASKED: &str = "--memory-budget";

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

/// Which rows, and how answers to them are judged.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Rows and answers")]
struct RowOptions {
    /// A task with numeric answers: how its rows are asked, and how answers are read
    #[arg(long, value_enum)]
    task: Option<TaskName>,

    /// Without a task: compare answers with the rows' own, too
    #[arg(long, value_enum, conflicts_with = "task")]
    metric: Option<MetricName>,

    /// Tokens of an answer at most
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = value_parser!(u32).range(1..=1 << 16))]
    answer_tokens: u32,

    /// Tokens of a row at most
    #[arg(short = 'c', long, visible_alias = "ctx-size", value_name = "N", default_value_t = 512, value_parser = value_parser!(u32).range(2..=1 << 20))]
    max_seq_length: u32,

    /// Training rows at most: a seeded choice of them
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    train_rows: Option<u32>,

    /// Held-out rows at most: likewise
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    held_out_rows: Option<u32>,

    /// Seed of the split and of these choices: one for all arms and their seeds
    #[arg(long, value_name = "N", default_value = "0", value_parser = options::seed)]
    split_seed: u64,

    /// Held-out rows that the report shows with every arm's answer
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = value_parser!(u32).range(0..=64))]
    samples: u32,
}

/// What stands against the base alone.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Arms")]
struct ArmOptions {
    /// Arms beside the base alone: few-shot, lora, dora, full [default: all; of adapt: all but full]
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',')]
    arms: Vec<ArmName>,

    /// Examples in a few-shot prompt
    #[arg(short = 'k', long, value_name = "K", default_value_t = 5, value_parser = value_parser!(u32).range(1..=64))]
    shots: u32,

    /// How examples are chosen
    #[arg(long, value_enum, default_value_t = ShotChoice::Seed)]
    shot_choice: ShotChoice,

    /// Seeds: each trained arm, and each seeded choice of examples, once with each
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0")]
    seeds: Vec<u64>,

    /// Optimizer steps of each trained arm (300, unless another budget is given)
    #[arg(long, value_name = "N", group = "budget", value_parser = value_parser!(u32).range(1..=100_000_000))]
    iters: Option<u32>,

    /// Passes over the training rows
    #[arg(long, value_name = "N", group = "budget", value_parser = options::positive)]
    epochs: Option<f64>,

    /// Tokens to train on
    #[arg(long, value_name = "N", group = "budget", value_parser = value_parser!(u64).range(1..))]
    tokens: Option<u64>,

    /// Minutes to train
    #[arg(long, value_name = "MIN", group = "budget", value_parser = options::positive)]
    minutes: Option<f64>,

    /// Sequences of a step
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..=4096))]
    batch_size: u32,

    /// Learning rate of lora and dora at its highest (also -lr) [default: 2e-4; of adapt: by a range test]
    #[arg(long, visible_alias = "lr", value_name = "RATE", value_parser = options::positive)]
    learning_rate: Option<f64>,

    /// Learning rate of full [default: 2e-5]
    #[arg(long, value_name = "RATE", value_parser = options::positive)]
    full_learning_rate: Option<f64>,

    /// Rank of lora and dora [default: 8; of adapt: the largest that memory and rows carry]
    #[arg(long, visible_alias = "lora-rank", value_name = "R", value_parser = value_parser!(u32).range(1..=256))]
    rank: Option<u32>,

    /// Effect of lora and dora: alpha/r
    #[arg(long, value_name = "X", default_value_t = 2.0, value_parser = options::positive_f32)]
    scale: f32,

    /// Projections to adapt: all, or a list of q, k, v, o, gate, up, down
    #[arg(long, value_name = "LIST", default_value = "all", value_parser = options::modules)]
    lora_modules: Modules,

    /// Share of the adapter's inputs set to zero while training
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = options::below_one)]
    dropout: f64,

    /// Type of the matrices of a fully tuned model
    #[arg(long = "type", value_name = "TYPE", default_value = "Q8_0", value_parser = options::dtype)]
    dtype: DType,

    /// AdamW's decoupled weight decay
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = options::not_negative)]
    weight_decay: f64,

    /// Scale gradients down to this norm (0: never)
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = options::not_negative)]
    max_grad_norm: f64,

    /// Weight of the divergence from the base in each token's loss, of lora and dora (0: none)
    #[arg(long, value_name = "W", default_value_t = 0.0, value_parser = options::kl_weight)]
    kl_weight: f32,

    /// Looks at the validation rows in a run
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = value_parser!(u32).range(1..))]
    evaluations: u32,

    /// Looks without a lower loss that end a run (0: never)
    #[arg(long, value_name = "N", default_value_t = PATIENCE)]
    patience: u32,

    /// Private memory that training may take (60M, 1.5G, or bytes)
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes)]
    pub(crate) memory_budget: Option<u64>,
}

/// What the gate demands.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Gate")]
struct GateOptions {
    /// Two-sided level of the intervals and tests
    #[arg(long, value_name = "P", default_value_t = Thresholds::default().alpha, value_parser = options::positive)]
    level: f64,

    /// What an improvement's lower bound must exceed, nats per token
    #[arg(long, value_name = "NATS", default_value_t = 0.0, value_parser = options::not_negative)]
    improvement_min: f64,

    /// Ceiling of the loss that retention texts may gain, nats per token
    #[arg(long, value_name = "NATS", default_value_t = Thresholds::default().retention_nll_max, value_parser = options::not_negative)]
    retention_nll_max: f64,

    /// Ceiling of KL(tuned‖base) on retention texts, nats per token
    #[arg(long, value_name = "NATS", default_value_t = Thresholds::default().retention_kl_max, value_parser = options::not_negative)]
    retention_kl_max: f64,

    /// Ceiling of KL(tuned‖base) on the task, nats per token (default: none)
    #[arg(long, value_name = "NATS", value_parser = options::not_negative)]
    task_kl_max: Option<f64>,

    /// Where answers are judged, let a lower loss alone win
    #[arg(long)]
    loss_alone: bool,

    /// Held-out rows below which nothing is decided
    #[arg(long, value_name = "N", default_value_t = Thresholds::default().examples_min)]
    examples_min: usize,

    /// Bootstrap resamples
    #[arg(long, value_name = "N", default_value_t = Thresholds::default().resamples)]
    resamples: usize,

    /// Seed of the bootstrap
    #[arg(long, value_name = "N", default_value = "0", value_parser = options::seed)]
    seed: u64,

    /// What must not be forgotten, beside the text that is built in: a text, or rows as .jsonl (may be repeated)
    #[arg(long, value_name = "FILE")]
    retention: Vec<PathBuf>,

    /// How answers to rows of --retention are compared with their own (default: as --metric says)
    #[arg(long, value_enum)]
    retention_metric: Option<RetentionMetric>,

    /// Leave the built-in retention text out
    #[arg(long)]
    no_built_in_retention: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TaskName {
    /// Grade school mathematics, answers behind ####
    Gsm8k,
    /// Word problems, answers in prose
    OrcaMath,
    /// One-step word problems
    Svamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MetricName {
    /// Word for word, white space aside
    Exact,
    /// As JSON, all fields equal
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RetentionMetric {
    /// Word for word, white space aside
    Exact,
    /// As JSON, all fields equal
    Json,
    /// By their numbers, as --task gsm8k
    Gsm8k,
    /// By their numbers, as --task orca-math
    OrcaMath,
    /// By their numbers, as --task svamp
    Svamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ArmName {
    /// Examples in the prompt
    FewShot,
    /// An adapter
    Lora,
    /// An adapter with magnitudes
    Dora,
    /// Every weight
    Full,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ShotChoice {
    /// The same for all questions, by seed
    Seed,
    /// For each question the nearest, by the base's own embeddings
    Nearest,
}

/// What a verb sets that its user did not.
pub(crate) struct Defaults<'a> {
    pub(crate) title: &'a str,
    pub(crate) arms: &'a [ArmName],
    /// Whether rates and ranks that are not given are searched for.
    pub(crate) search: bool,
    /// The folder for whole models; without one, these are refused.
    pub(crate) folder: Option<&'a Path>,
}

impl ContestOptions {
    /// The data's path, which must be given.
    ///
    /// # Errors
    /// `Misuse` without it, `Io` when there is no such file.
    pub(crate) fn data(&self) -> Result<&Path> {
        let missing = || misuse("--data is missing: name a folder that holds train.jsonl, or a .jsonl file");
        self.data.path()?.ok_or_else(missing)
    }

    fn task(&self) -> Option<Task> {
        self.rows.task.map(|task| match task {
            TaskName::Gsm8k => Task::Gsm8k,
            TaskName::OrcaMath => Task::OrcaMath,
            TaskName::Svamp => Task::Svamp,
        })
    }

    /// The metric of rows that are no task's.
    fn metric(&self) -> Option<Metric> {
        self.rows.metric.map(|m| match m {
            MetricName::Exact => Metric::Exact,
            MetricName::Json => Metric::Json,
        })
    }

    fn retention_metric(&self) -> Option<Metric> {
        let given = self.gate.retention_metric.map(|m| match m {
            RetentionMetric::Exact => Metric::Exact,
            RetentionMetric::Json => Metric::Json,
            RetentionMetric::Gsm8k => Metric::Numeric(Task::Gsm8k),
            RetentionMetric::OrcaMath => Metric::Numeric(Task::OrcaMath),
            RetentionMetric::Svamp => Metric::Numeric(Task::Svamp),
        });
        given.or(self.metric())
    }

    /// How rows are read, with at most `context` positions each.
    pub(crate) fn reading(&self, context: usize) -> Reading {
        let rows_max = (self.rows.max_seq_length as usize).min(context);
        let plain = common::data_options(&self.data, rows_max, self.rows.split_seed);
        Reading { reader: self.task().map(Task::reader), over_long: OverLong::Truncate, ..plain }
    }

    /// Reads the rows, and says what there are.
    ///
    /// # Errors
    /// Those of [`Material::read`].
    pub(crate) fn material(&self, text: &Text, reading: &Reading) -> Result<Material> {
        let limit = |n: Option<u32>| n.map(|n| n as usize);
        let limits =
            Limits { train_rows: limit(self.rows.train_rows), held_out_rows: limit(self.rows.held_out_rows) };
        let material = Material::read(self.data()?, text, reading, limits)?;
        for (rows, what) in
            [(&material.train, "train"), (&material.valid, "validate"), (&material.held_out, "decide")]
        {
            common::tell_rows(&rows.data, reading.max_seq_length);
            let (rows, targets) = rows.extent();
            eprintln!("to {what}: {rows} rows with {targets} targets");
        }
        for leak in &material.leaks {
            let how = if leak.exact { "equals" } else { "nearly equals" };
            eprintln!("leak: held-out row {} {how} {}", leak.held_out, leak.train);
        }
        Ok(material)
    }

    /// The settings of the comparison.
    ///
    /// # Errors
    /// `Misuse` for arms that can't be; `DoesNotFit`; those of reading retention texts.
    pub(crate) fn settings(
        &self,
        defaults: &Defaults<'_>,
        base: &Base,
        material: &Material,
        (text, reading): (&Text, &Reading),
    ) -> Result<Settings> {
        let arms = if self.arms.arms.is_empty() { defaults.arms } else { &self.arms.arms };
        let seeds = &self.arms.seeds;
        if let Some(twice) = seeds.iter().enumerate().find_map(|(i, s)| seeds[..i].contains(s).then_some(s)) {
            return Err(misuse(format!(
                "--seeds: {twice} is given twice, which would be one arm under two names"
            )));
        }
        let recipes = self.recipes(arms, defaults, base, material)?;
        Ok(Settings {
            memory_budget: self.limit(&recipes, base, material).map(|limit| limit.bytes),
            title: defaults.title.to_string(),
            shots: if arms.contains(&ArmName::FewShot) { self.shots() } else { Vec::new() },
            recipes,
            metric: self.task().map(Metric::Numeric).or(self.metric()),
            answer_tokens: self.rows.answer_tokens as usize,
            retention: self.retention(text, reading)?,
            thresholds: self.thresholds(arms),
            seed: self.gate.seed,
            samples: self.rows.samples as usize,
            folder: defaults.folder.map(Path::to_path_buf),
        })
    }

    fn shots(&self) -> Vec<(usize, Choice)> {
        let k = self.arms.shots as usize;
        match self.arms.shot_choice {
            ShotChoice::Nearest => vec![(k, Choice::Nearest)],
            ShotChoice::Seed => self.arms.seeds.iter().map(|seed| (k, Choice::Seeded(*seed))).collect(),
        }
    }

    fn thresholds(&self, arms: &[ArmName]) -> Thresholds {
        let gate = &self.gate;
        Thresholds {
            alpha: gate.level,
            improvement_min: gate.improvement_min,
            retention_nll_max: gate.retention_nll_max,
            retention_kl_max: gate.retention_kl_max,
            task_kl_max: gate.task_kl_max,
            examples_min: gate.examples_min,
            resamples: gate.resamples,
            few_shot_required: arms.contains(&ArmName::FewShot),
            accuracy_required: !gate.loss_alone,
        }
    }

    fn budget(&self, runs: usize) -> Budget {
        let a = &self.arms;
        match (a.iters, a.epochs, a.tokens, a.minutes) {
            (Some(n), ..) => Budget::Steps(n.into()),
            (_, Some(n), ..) => Budget::Epochs(n),
            (_, _, Some(n), _) => Budget::Tokens(n),
            (_, _, _, Some(minutes)) => Budget::Minutes(minutes / runs.max(1) as f64),
            _ => Budget::Steps(ITERS_DEFAULT),
        }
    }

    /// The limit that holds here, bytes and whose: the one asked for, and no more than the machine leaves. None
    /// where nobody asked, and the machine has what the arms take unasked.
    fn limit(&self, recipes: &[Recipe], base: &Base, material: &Material) -> Option<Room> {
        let device = self.when.device().and_then(provenance::room);
        let room = room::here(base.kernels.threads()).map(|here| here.or_less(device.clone())).or(device);
        if let Some(bytes) = self.arms.memory_budget {
            return Some(Room { bytes, who: ASKED.into() }.or_less(room));
        }
        let private = |r: &Recipe| r.plan(base, material, None).1.private_bytes as u64;
        room.filter(|room| recipes.iter().any(|r| private(r) > room.bytes))
    }

    /// One recipe for each trained arm and seed.
    fn recipes(
        &self,
        arms: &[ArmName],
        defaults: &Defaults<'_>,
        base: &Base,
        material: &Material,
    ) -> Result<Vec<Recipe>> {
        let kinds = [(ArmName::Lora, "lora"), (ArmName::Dora, "dora"), (ArmName::Full, "full")];
        let kinds: Vec<_> = kinds.into_iter().filter(|(arm, _)| arms.contains(arm)).collect();
        let budget = self.budget(kinds.len() * self.arms.seeds.len());
        let (mut recipes, mut left_out) = (Vec::new(), None);
        for (arm, kind) in kinds {
            for seed in &self.arms.seeds {
                let name = if self.arms.seeds.len() > 1 { format!("{kind}-{seed}") } else { kind.into() };
                let recipe = self.recipe(arm, name, *seed, budget, defaults, base)?;
                match self.fitted(recipe, defaults, base, material) {
                    Ok(recipe) => recipes.push(recipe),
                    // The arms that the budget allows.
                    Err(error) if defaults.search && error.kind() == ErrorKind::DoesNotFit => {
                        eprintln!("left out: {}", error.message());
                        left_out = Some(error);
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        match left_out.filter(|_| recipes.is_empty() && !arms.contains(&ArmName::FewShot)) {
            // Nothing is left to compare the base with.
            Some(error) => Err(error),
            None => Ok(recipes),
        }
    }

    fn recipe(
        &self,
        arm: ArmName,
        name: String,
        seed: u64,
        budget: Budget,
        defaults: &Defaults<'_>,
        base: &Base,
    ) -> Result<Recipe> {
        let (a, c) = (&self.arms, base.model.config());
        let full = arm == ArmName::Full;
        let method = if full {
            Method::Full(Some(a.dtype))
        } else {
            let rank = a.rank.unwrap_or(options::RANK_DEFAULT) as usize;
            let layers: Vec<usize> = (0..c.n_layers).collect();
            let (alpha, dropout) = (a.scale * rank as f32, a.dropout as f32);
            let plain = LoraConfig::new(c, rank, alpha, dropout, &a.lora_modules.0, &layers)?;
            Method::Adapter(LoraConfig { dora: arm == ArmName::Dora, ..plain }.checked(c)?)
        };
        let given = if full { a.full_learning_rate } else { a.learning_rate };
        let usual = options::usual_rate(if full { FineTune::Full } else { FineTune::Lora });
        let rate = given.or((!defaults.search).then_some(usual));
        Ok(Recipe {
            name,
            method,
            rate,
            budget,
            batch: a.batch_size as usize,
            seed,
            evaluations: a.evaluations.into(),
            patience: a.patience.into(),
            weight_decay: a.weight_decay as f32,
            max_grad_norm: a.max_grad_norm as f32,
            kl: (a.kl_weight > 0.0 && !full)
                .then_some(KlPenalty { weight: a.kl_weight, direction: Direction::Forward }),
            replay: Vec::new(),
        })
    }

    /// The recipe with a rank that fits, where none was asked for.
    fn fitted(
        &self,
        mut recipe: Recipe,
        defaults: &Defaults<'_>,
        base: &Base,
        material: &Material,
    ) -> Result<Recipe> {
        if defaults.search && self.arms.rank.is_none() && matches!(recipe.method, Method::Adapter(_)) {
            let limit = self.limit(std::slice::from_ref(&recipe), base, material);
            let bytes = limit.as_ref().map(|limit| limit.bytes);
            let lora = choose_rank(&recipe, base, material, bytes).map_err(|e| blame(e, limit.as_ref()))?;
            recipe.method = Method::Adapter(lora);
        }
        let limit = self.limit(std::slice::from_ref(&recipe), base, material);
        let plan = recipe
            .check(base, material, limit.as_ref().map(|limit| limit.bytes))
            .map_err(|e| blame(e, limit.as_ref()))?;
        eprintln!(
            "{}: {}; {} of private memory planned",
            recipe.name,
            recipe.method.describe(),
            show_bytes(plan.private_bytes as u64)
        );
        Ok(recipe)
    }

    fn retention(&self, text: &Text, reading: &Reading) -> Result<Vec<RetentionSet>> {
        let mut all: Vec<RetentionSet> = Vec::new();
        let rows_max = reading.max_seq_length;
        if !self.gate.no_built_in_retention {
            let passages = retention::passages();
            let passages: Vec<&str> = passages.iter().map(|p| p.text).collect();
            all.push(RetentionSet::of_text(retention::NAME, &passages, text, rows_max)?);
        }
        for file in &self.gate.retention {
            stat(file, "--retention")?;
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let set = if file.extension().is_some_and(|e| e == "jsonl") {
                self.retention_task(file, &name, text, reading).map_err(|e| e.at("--retention"))?
            } else {
                let whole = common::read_text(file)?;
                let passages: Vec<&str> = retention::split(&whole).iter().map(|p| p.text).collect();
                RetentionSet::of_text(&name, &passages, text, rows_max).map_err(|e| e.at(file.display()))?
            };
            if all.iter().any(|known| known.name == name) {
                return Err(misuse(format!("--retention: two texts are called {name}: rename one")));
            }
            all.push(set);
        }
        Ok(all)
    }

    fn retention_task(
        &self,
        file: &Path,
        name: &str,
        text: &Text,
        reading: &Reading,
    ) -> Result<RetentionSet> {
        let metric = self.retention_metric();
        let reader = match metric {
            Some(Metric::Numeric(task)) => Some(task.reader()),
            _ => None,
        };
        let reading = Reading { reader, ..reading.clone() };
        let rows = Rows::of(data::load(file, &text.tokenizer, &text.chat, &reading)?, &reading)?;
        Ok(RetentionSet::of_rows(name, &rows, metric, text))
    }
}

/// An error with whose limit it was, where nobody asked for it.
fn blame(error: Error, limit: Option<&Room>) -> Error {
    match limit {
        Some(limit) if limit.who != ASKED => error.at(&limit.who),
        _ => error,
    }
}

/// The error of arms that a verb can't take.
pub(crate) fn refuse_arm(options: &ContestOptions, arm: ArmName, why: &str) -> Result<()> {
    match options.arms.arms.contains(&arm) {
        true => Err(misuse(why)),
        false => Ok(()),
    }
}
