//! The arms that are compared with the base alone, and how to train them.

use clap::{Args, ValueEnum, value_parser};
use engraft_kernels::DType;
use engraft_runtime::compare::recipe::Recipe;
use engraft_runtime::compare::shots::Choice;
use engraft_runtime::error::Result;
use engraft_runtime::model::ModelConfig;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::run::{Begin, Earlier, Length, Looks, Method, Settings, settings};

use super::shape::refuse_beside_protection;
use super::{ForgettingOptions, MemoryOptions, OptimizerOptions, ShapeOptions, misuse, parse};

/// The arms that are compared with the base alone.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Arms")]
pub(crate) struct ArmOptions {
    /// Arms to compare with the model alone: few-shot, lora, dora, full [default: all; for adapt: few-shot and lora]
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',')]
    pub(crate) arms: Vec<ArmName>,

    /// Trained arms that may be promoted; the others are only measured [default: all but full]
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',')]
    candidates: Vec<ArmName>,

    /// Examples in the few-shot prompt
    #[arg(short = 'k', long, value_name = "K", default_value_t = settings::SHOTS as u32, value_parser = value_parser!(u32).range(1..=64))]
    shots: u32,

    /// How to choose the examples
    #[arg(long, value_enum, default_value_t = ShotChoice::Seed)]
    shot_choice: ShotChoice,

    /// Repeat every arm, and the choice of examples, with each of these seeds
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0")]
    seeds: Vec<u64>,

    /// Optimizer steps per trained arm [default: 300, unless another budget is given]
    #[arg(long, value_name = "N", group = "budget", value_parser = value_parser!(u32).range(1..=100_000_000))]
    iters: Option<u32>,

    /// Passes over the training rows, per trained arm
    #[arg(long, value_name = "N", group = "budget", value_parser = parse::positive)]
    epochs: Option<f64>,

    /// Tokens to train on, per trained arm
    #[arg(long, value_name = "N", group = "budget", value_parser = value_parser!(u64).range(1..))]
    tokens: Option<u64>,

    /// Minutes for everything: training, which all trained arms share, takes what scoring leaves
    #[arg(long, value_name = "MIN", group = "budget", value_parser = parse::positive)]
    pub(crate) minutes: Option<f64>,

    /// Peak learning rate of lora and dora (also -lr) [default: 2e-4; with --protect: 2e-3; for adapt without it: chosen by a range test]
    #[arg(long, visible_alias = "lr", value_name = "RATE", value_parser = parse::positive)]
    learning_rate: Option<f64>,

    /// Peak learning rate of full [default: 2e-5]
    #[arg(long, value_name = "RATE", value_parser = parse::positive)]
    full_learning_rate: Option<f64>,

    /// Rank of lora and dora [default: 8; with --protect: up to 64; for adapt: the largest that fits]
    #[arg(long, visible_alias = "lora-rank", value_name = "R", value_parser = value_parser!(u32).range(1..=256))]
    rank: Option<u32>,

    /// Factor on the effect of lora and dora: alpha/r
    #[arg(long, value_name = "X", default_value_t = settings::SCALE, value_parser = parse::positive_f32)]
    scale: f32,

    /// Type of the matrices in a fully tuned model
    #[arg(long = "type", value_name = "TYPE", default_value = "Q8_0", value_parser = parse::dtype)]
    dtype: DType,

    /// Evaluations on the validation rows per run
    #[arg(long, value_name = "N", default_value_t = settings::EVALUATIONS as u32, value_parser = value_parser!(u32).range(1..))]
    evaluations: u32,

    /// End a run after this many evaluations without a lower loss (0: never)
    #[arg(long, value_name = "N", default_value_t = settings::PATIENCE as u32)]
    patience: u32,

    #[command(flatten)]
    shape: ShapeOptions,

    #[command(flatten)]
    optimizer: OptimizerOptions,

    #[command(flatten)]
    pub(crate) forgetting: ForgettingOptions,

    #[command(flatten)]
    pub(crate) memory: MemoryOptions,
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

impl ArmName {
    /// The arm that goes on with this adapter.
    fn of(earlier: &Earlier) -> ArmName {
        if earlier.lora.dora { ArmName::Dora } else { ArmName::Lora }
    }

    /// The name of a trained arm; `None` for one that is only prompted.
    fn trained(self) -> Option<&'static str> {
        match self {
            ArmName::FewShot => None,
            ArmName::Lora => Some("lora"),
            ArmName::Dora => Some("dora"),
            ArmName::Full => Some("full"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ShotChoice {
    /// The same for all questions, by seed
    Seed,
    /// For each question the nearest, by the base's embeddings
    Nearest,
}

impl ArmOptions {
    /// The arms that the user named, or the verb's usual ones.
    pub(crate) fn or<'a>(&'a self, usual: &'a [ArmName]) -> &'a [ArmName] {
        if self.arms.is_empty() { usual } else { &self.arms }
    }

    /// Whether the rank is settled: it was named, or an adapter to go on with has it.
    pub(crate) fn has_rank(&self) -> bool {
        self.rank.is_some() || self.goes_on()
    }

    /// Whether arms go on with a finished adapter.
    pub(crate) fn goes_on(&self) -> bool {
        self.shape.from.is_some()
    }

    /// Refuses options that would do nothing, or the same thing twice.
    ///
    /// # Errors
    /// `Misuse`.
    pub(crate) fn check(&self) -> Result<()> {
        self.shape.check()?;
        self.forgetting.check()?;
        if let Some(left_out) =
            self.candidates.iter().find(|c| !(self.arms.is_empty() || self.arms.contains(c)))
        {
            let name = left_out.trained().unwrap_or("few-shot");
            return Err(misuse(format!("--candidates: {name} isn't among --arms; add it there")));
        }
        let seeds = &self.seeds;
        match seeds.iter().enumerate().find_map(|(i, s)| seeds[..i].contains(s).then_some(s)) {
            None => Ok(()),
            Some(twice) => {
                let message = format!(
                    "--seeds: {twice} is given twice, which would train the same arm twice; remove one"
                );
                Err(misuse(message))
            }
        }
    }

    /// Few-shot prompts: how many examples, and how to choose them.
    pub(crate) fn few_shot(&self) -> Vec<(usize, Choice)> {
        let k = self.shots as usize;
        match self.shot_choice {
            ShotChoice::Nearest => vec![(k, Choice::Nearest)],
            ShotChoice::Seed => self.seeds.iter().map(|seed| (k, Choice::Seeded(*seed))).collect(),
        }
    }

    /// One recipe for each trained arm and seed; each is trained in so many turns. With `search`, a range test chooses
    /// the rates that aren't given.
    ///
    /// # Errors
    /// `Misuse` for options that don't fit the model.
    pub(crate) fn recipes(
        &self,
        arms: &[ArmName],
        (search, turns): (bool, usize),
        model: &ModelFile,
    ) -> Result<Vec<Recipe>> {
        let earlier = self.shape.earlier(self.rank.is_some(), model)?;
        let kinds =
            [ArmName::Lora, ArmName::Dora, ArmName::Full].into_iter().filter(|arm| arms.contains(arm));
        let kinds: Vec<_> = kinds.filter_map(|arm| Some((arm, arm.trained()?))).collect();
        let is_same = |earlier: &Earlier| kinds.iter().any(|(arm, _)| *arm == ArmName::of(earlier));
        if let Some(left_out) = earlier.as_ref().filter(|earlier| !is_same(earlier)) {
            let arm = ArmName::of(left_out).trained().unwrap_or_default();
            return Err(misuse(format!("--from: the adapter is a {arm}; add {arm} to --arms")));
        }
        let runs = kinds.len() * self.seeds.len();
        let mut recipes = Vec::with_capacity(runs);
        for (arm, kind) in kinds {
            for seed in &self.seeds {
                let name = if self.seeds.len() > 1 { format!("{kind}-{seed}") } else { kind.into() };
                let settings =
                    self.settings(arm, (search, earlier.as_ref()), runs * turns, model.config())?;
                let settings = Settings { seed: *seed, ..settings };
                recipes.push(Recipe { baseline: !self.is_candidate(arm), ..Recipe::new(&name, settings) });
            }
        }
        Ok(recipes)
    }

    /// Whether an arm may be promoted.
    fn is_candidate(&self, arm: ArmName) -> bool {
        match self.candidates.is_empty() {
            // Tuned in every weight, small models mostly lose (arXiv 2606.06920).
            true => arm != ArmName::Full,
            false => self.candidates.contains(&arm),
        }
    }

    fn settings(
        &self,
        arm: ArmName,
        (search, earlier): (bool, Option<&Earlier>),
        runs: usize,
        model: &ModelConfig,
    ) -> Result<Settings> {
        let is_full = arm == ArmName::Full;
        let earlier = earlier.filter(|earlier| arm == ArmName::of(earlier));
        // Magnitudes act on every input, so that a DoRA can't be kept to some directions.
        let protects = arm == ArmName::Lora && self.forgetting.protects_from(earlier, search)?;
        if protects {
            refuse_beside_protection(&self.shape)?;
        }
        let method = if is_full {
            Method::Full(Some(self.dtype))
        } else {
            let usual = if protects { settings::protected_rank(model) } else { settings::RANK };
            let rank = self.rank.map_or(usual, |rank| rank as usize);
            Method::Adapter(self.shape.lora(model, rank, self.scale * rank as f32, arm == ArmName::Dora)?)
        };
        let given = if is_full { self.full_learning_rate } else { self.learning_rate };
        let plain = Settings { begin: self.shape.begin(), ..Settings::of_arm(method) };
        let plain = match (protects, search) {
            (true, _) => self.forgetting.protect(plain),
            (false, true) => Settings { rate: None, ..plain },
            (false, false) => plain,
        };
        let plain = match earlier {
            Some(earlier) => plain.going_on(earlier.clone()),
            None => plain,
        };
        let plain = self.optimizer.apply(plain);
        let plain = match is_full {
            true => Settings { begin: Begin::Random, lora_plus_ratio: 1.0, ..plain },
            false => {
                Settings { stored: self.shape.adapter_precision, kl: self.forgetting.penalty(), ..plain }
            }
        };
        Ok(Settings {
            length: self.length(runs),
            rate: given.or(plain.rate),
            replay_share: self.forgetting.share()?,
            keep: self.memory.keep,
            keep_precision: self.memory.keep_precision,
            looks: Looks::Best { times: self.evaluations.into(), patience: self.patience.into() },
            ..plain
        })
    }

    fn length(&self, runs: usize) -> Length {
        match (self.iters, self.epochs, self.tokens, self.minutes) {
            (Some(n), ..) => Length::Steps(n.into()),
            (_, Some(n), ..) => Length::Epochs(n),
            (_, _, Some(n), _) => Length::Tokens(n),
            (_, _, _, Some(minutes)) => Length::Minutes(minutes / runs.max(1) as f64),
            _ => Length::Steps(settings::STEPS),
        }
    }
}
