//! `engraft demo`: training, comparison and verdict in under a minute, on the built-in model.
//!
//! The rows are forty commands of a household with private words ("the cave" is the study), with the
//! actions they mean. The gate judges two ways to learn them: an adapter with replay, and every weight
//! trained on the forty rows alone. The demo counts exact answers to unseen commands, with private words
//! and with everyday words, and measures how much worse the everyday ones get, in nats.

mod household;
mod measured;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use clap::{Args, value_parser};
use engraft_kernels::DType;
use engraft_runtime::adapter::LoraConfig;
use engraft_runtime::compare::answers::Metric;
use engraft_runtime::compare::material::{Material, Rows};
use engraft_runtime::compare::recipe::Recipe;
use engraft_runtime::compare::retention::RetentionSet;
use engraft_runtime::compare::score::Subject;
use engraft_runtime::compare::shots::{self, Choice};
use engraft_runtime::compare::{Contest, compare};
use engraft_runtime::data::{DataOptions, Example};
use engraft_runtime::gate::store::Store;
use engraft_runtime::model::Proj;
use engraft_runtime::model::text::Text;
use engraft_runtime::run::{Base, Length, Limit, Looks, Method, Nobody, RunRows, Settings};
use engraft_runtime::storage::Disk;

pub(crate) use household::model as built_in;
use measured::Measured;

use super::compare::Screen;
use super::prepare::plan_table;
use super::{Invocation, adapt};
use crate::json;
use crate::options::{self, ComputeOptions};
use crate::scratch::Scratch;

const LORA: &str = "lora";
const FULL: &str = "full";
/// Name of the everyday commands in the verdict.
const EVERYDAY: &str = "everyday commands";

const RANK: usize = 8;
const ALPHA: f32 = 16.0;
const DROPOUT: f32 = 0.1;
const ITERS: u32 = 300;
const BATCH: usize = 8;
const LORA_RATE: f64 = 5e-4;
/// The default of PyTorch's and Keras's AdamW. At 3e-4 it still loses answers; at 1e-4 hardly any.
const FULL_RATE: f64 = 1e-3;
const WEIGHT_DECAY: f32 = 0.01;
/// Evaluations on the validation rows per run.
const EVALUATIONS: u64 = 10;
/// Examples in the few-shot prompt, if the model's context holds that many.
const SHOTS: usize = 5;
/// Private commands to show with both answers.
const SAMPLES: usize = 4;

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Optimizer steps per arm [default: 300]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=100_000))]
    pub(crate) iters: Option<u32>,

    /// Seed for the initial adapter, the row order and the few-shot examples
    #[arg(long, value_name = "N", default_value = "0", value_parser = options::parse::seed)]
    pub(crate) seed: u64,

    /// Keep the promoted adapter in this store [default: a temporary one, removed at the end]
    #[arg(long, value_name = "DIR")]
    pub(crate) store: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) compute: ComputeOptions,
}

pub(crate) fn run(options: &Options, invocation: &Invocation) -> Result<()> {
    let started = Instant::now();
    let scratch = Scratch::new()?;
    let temporary = scratch.path().join("store");
    let store = Store::create(&Disk, options.store.as_deref().unwrap_or(&temporary))?;
    let writer = store.writer()?;

    let mut demo = Demo::open(options, invocation)?;
    let contest = demo.contest(scratch.path())?;
    let data = (&demo.text, &demo.reading);
    let outcome = compare(&demo.base, &demo.material, data, &contest, &mut demo.screen)?;
    let promoted = adapt::promote(&writer, &outcome, &demo.base.model)?;

    let measured = Measured { outcome: &outcome, seconds: started.elapsed().as_secs_f64() };
    json::line(&measured.samples())?;
    json::line(&measured.table()?)?;
    json::line(&measured.verdict(options.store.as_deref(), promoted.as_ref())?)?;
    invocation.emit(&measured.json()?)
}

/// The built-in model and rows, and how to compute with them.
struct Demo<'a> {
    options: &'a Options,
    base: Base,
    text: Text,
    reading: DataOptions,
    material: Material,
    everyday: Rows,
    screen: Screen,
}

impl<'a> Demo<'a> {
    fn open(options: &'a Options, invocation: &Invocation) -> Result<Demo<'a>> {
        let model = built_in()?;
        let text = Text::of(&model)?;
        let reading = DataOptions { max_seq_length: model.config().context_len, ..DataOptions::default() };
        let base = options.compute.base(model, text.tokenizer.heap_bytes())?;
        Ok(Demo {
            material: household::private(&text, &reading)?,
            everyday: household::everyday(&text, &reading)?,
            screen: Screen::new(invocation.cancel.clone(), None),
            options,
            base,
            text,
            reading,
        })
    }

    /// Two arms to train, what they are compared with, and what they must not forget. That is the everyday
    /// commands: this model knows no running English that it could forget.
    fn contest(&mut self, folder: &Path) -> Result<Contest> {
        let replay =
            household::replay(&Subject::of(&self.base), &self.text, &self.reading, &mut self.screen)?;
        // Some commands mean several actions and are long.
        let shots = vec![(SHOTS, Choice::Seeded(self.options.seed))];
        let parts = (&self.material.train, &self.material.held_out);
        let shots = shots::fitting(shots, &self.base, parts, (&self.text, &self.reading), &mut Nobody)?;
        let recipes = vec![self.lora(replay)?, self.full()];
        let limit = Limit::default();
        let planned = recipes[0].plan(&self.base, &self.material, RunRows::default(), &limit);
        eprintln!("{}", plan_table(&planned.request, &planned.plan));
        Ok(Contest {
            shots,
            recipes,
            metric: Some(Metric::Exact),
            answer_tokens: household::ANSWER_MAX,
            retention: vec![RetentionSet::of_rows(EVERYDAY, &self.everyday, Some(Metric::Exact), &self.text)],
            seed: self.options.seed,
            samples: SAMPLES,
            limit,
            folder: Some(folder.to_path_buf()),
            ..Contest::new("demo")
        })
    }

    /// An adapter, trained on the private commands mixed with replayed everyday ones.
    fn lora(&self, replay: Vec<Example>) -> Result<Recipe> {
        let config = self.base.model.config();
        let layers: Vec<usize> = (0..config.n_layers).collect();
        let lora = LoraConfig::new(config, RANK, ALPHA, DROPOUT, &Proj::ALL, &layers)?;
        Ok(self.recipe(LORA, Method::Adapter(lora), LORA_RATE, replay))
    }

    /// Every weight, trained on the private commands alone. Stored more precisely than the base, so that
    /// any loss comes from training and not from storing.
    fn full(&self) -> Recipe {
        self.recipe(FULL, Method::Full(Some(DType::F16)), FULL_RATE, Vec::new())
    }

    fn recipe(&self, name: &str, method: Method, rate: f64, extra: Vec<Example>) -> Recipe {
        let settings = Settings {
            rate: Some(rate),
            length: Length::Steps(self.options.iters.unwrap_or(ITERS).into()),
            batch: BATCH,
            seed: self.options.seed,
            looks: Looks::Best { times: EVALUATIONS, patience: 0 },
            weight_decay: WEIGHT_DECAY,
            ..Settings::of_arm(method)
        };
        Recipe { extra, ..Recipe::new(name, settings) }
    }
}
