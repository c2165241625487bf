//! `engraft demo`: the whole way in under a minute, on the model that is compiled in.
//!
//! Forty commands of a household with words of its own ("the cave" is the study), and the actions they
//! mean. What is measured: how many commands that were never seen are answered exactly, those with
//! private words and those with everyday words, before and after.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::Result;
use clap::{Args, value_parser};
use engraft_kernels::Kernels;
use engraft_runtime::adapter::{Adapter, Layout, LoraConfig};
use engraft_runtime::data::masks::encode_sample;
use engraft_runtime::data::{self, Batch, Batches, Cursor, Example, Sample};
use engraft_runtime::error::{Error, ErrorKind};
use engraft_runtime::generate::replay::complete;
use engraft_runtime::generate::{KvType, Sampler, SamplerOptions, Session as Sequence, StackedAdapter};
use engraft_runtime::model::Proj;
use engraft_runtime::model::chat::{Message, encode_pieces};
use engraft_runtime::model::map::Map;
use engraft_runtime::model::text::Text;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::plan::{ArenaWords, KeepPlan, MemoryPlan, Request};
use engraft_runtime::rng::Rng;
use engraft_runtime::train::optim::AdamWConfig;
use engraft_runtime::train::schedule::{Schedule, Shape};
use engraft_runtime::train::{TrainOptions, Trainer};

use super::prepare::plan_table;
use super::{INIT_STREAM, Session, WATCH_INTERVAL, common};
use crate::json;
use crate::memory::Watch;
use crate::options::{self, ComputeOptions};
use crate::progress::{Progress, Step, Style};

/// A model's tensors begin at multiples of 32 bytes of the file, and rows are read with wide loads.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static MODEL: &Aligned<[u8]> = &Aligned(*include_bytes!("../seedling.gguf"));
const PRIVATE_TRAIN: &str = include_str!("../demo/private_train.jsonl");
const PRIVATE_TEST: &str = include_str!("../demo/private_test.jsonl");
const GENERIC_TEST: &str = include_str!("../demo/generic_test.jsonl");
/// Everyday commands without answers, none of them in the tests. The base's own answers to them are
/// replayed among the forty examples, so that it keeps what it knows.
const EVERYDAY: &str = include_str!("../demo/everyday.txt");

const RANK: usize = 8;
const ALPHA: f32 = 16.0;
const ITERS: u32 = 300;
const BATCH: usize = 8;
const LEARNING_RATE: f32 = 5e-4;
/// Tokens of an answer at most; the right ones are shorter.
const ANSWER_MAX: usize = 96;
/// Private commands that are shown with both answers.
const SAMPLES: usize = 4;

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Optimizer steps (default: as many as the demo needs)
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=100_000))]
    pub(crate) iters: Option<u32>,

    /// Seed of the initial adapter and the order of rows
    #[arg(long, value_name = "N", default_value = "0", value_parser = options::seed)]
    pub(crate) seed: u64,

    #[command(flatten)]
    pub(crate) compute: ComputeOptions,
}

pub(crate) fn run(options: &Options, session: &Session) -> Result<()> {
    let started = Instant::now();
    let demo = Demo::open(options, session)?;
    let (private, generic) = (commands(PRIVATE_TEST)?, commands(GENERIC_TEST)?);
    eprintln!("seedling answers {} private and {} everyday commands ...", private.len(), generic.len());
    let private_before = demo.answers(None, &private)?;
    let generic_before = demo.answers(None, &generic)?;
    let mut examples = commands(PRIVATE_TRAIN)?;
    examples.extend(demo.replay()?);
    let adapter = Arc::new(demo.train(&examples)?);
    let private_after = demo.answers(Some(&adapter), &private)?;
    let generic_after = demo.answers(Some(&adapter), &generic)?;

    let result = json::Demo {
        before_exact: exact(&private, &private_before),
        after_exact: exact(&private, &private_after),
        retention_before: exact(&generic, &generic_before),
        retention_after: exact(&generic, &generic_after),
        seconds: started.elapsed().as_secs_f64(),
    };
    let samples = private.len().div_ceil(SAMPLES).max(1);
    for i in (0..private.len()).step_by(samples) {
        let (before, after) = (&private_before[i], &private_after[i]);
        json::line(&format!("> {}\n  before: {before}\n  after:  {after}", private[i].prompt))?;
    }
    json::line(&table(&result))?;
    if session.json {
        json::emit(&result)?;
    }
    Ok(())
}

/// The model that is compiled in.
///
/// # Errors
/// None, unless the program's own file is damaged.
pub(super) fn built_in() -> Result<Arc<ModelFile>> {
    let map = Map::from_static("seedling.gguf (built in)", &MODEL.0);
    Ok(Arc::new(ModelFile::from_map(map)?))
}

/// One command and the action that it means.
#[derive(serde::Deserialize)]
struct Command {
    prompt: String,
    completion: String,
}

/// The commands of an embedded file.
fn commands(jsonl: &str) -> Result<Vec<Command>> {
    Ok(jsonl.lines().map(serde_json::from_str).collect::<serde_json::Result<_>>()?)
}

/// The fraction answered exactly.
fn exact(commands: &[Command], answers: &[String]) -> f64 {
    let right = commands.iter().zip(answers).filter(|(c, a)| c.completion == **a).count();
    right as f64 / commands.len() as f64
}

fn table(result: &json::Demo) -> String {
    let row = |name: &str, before: f64, after: f64| {
        format!("{name:<38} {:>6.1} % {:>6.1} %\n", before * 100.0, after * 100.0)
    };
    let mut text =
        format!("{:<38} {:>8} {:>8}\n", "commands never seen, answered exactly", "before", "after");
    text += &row("  with the household's private words", result.before_exact, result.after_exact);
    text += &row("  with everyday words", result.retention_before, result.retention_after);
    text + &format!("in {:.1} s", result.seconds)
}

/// The embedded model, and how to compute with it.
struct Demo<'a> {
    options: &'a Options,
    session: &'a Session,
    model: Arc<ModelFile>,
    kernels: Arc<Kernels>,
    text: Text,
    watch: Watch,
}

impl<'a> Demo<'a> {
    fn open(options: &'a Options, session: &'a Session) -> Result<Demo<'a>> {
        let watch = Watch::start(WATCH_INTERVAL);
        let model = built_in()?;
        let text = Text::of(&model)?;
        let kernels = common::kernels(&options.compute)?;
        Ok(Demo { options, session, model, kernels, text, watch })
    }

    /// Everyday commands with the base's own answers.
    fn replay(&self) -> Result<Vec<Command>> {
        let ask = |prompt: &str| Command { prompt: prompt.to_owned(), completion: String::new() };
        let mut commands: Vec<Command> = EVERYDAY.lines().map(ask).collect();
        let answers = self.answers(None, &commands)?;
        commands.iter_mut().zip(answers).for_each(|(c, answer)| c.completion = answer);
        Ok(commands)
    }

    /// The greedy answer to each command.
    fn answers(&self, adapter: Option<&Arc<StackedAdapter>>, commands: &[Command]) -> Result<Vec<String>> {
        let mut sequence = Sequence::new(
            self.model.clone(),
            self.kernels.clone(),
            adapter.cloned(),
            common::precision(&self.options.compute),
            self.model.config().context_len,
            KvType::F16,
        )?;
        let mut sampler = Sampler::new(SamplerOptions::greedy())?;
        commands.iter().map(|c| self.answer(&mut sequence, &mut sampler, c)).collect()
    }

    fn answer(&self, sequence: &mut Sequence, sampler: &mut Sampler, command: &Command) -> Result<String> {
        self.go_on()?;
        let tokenizer = &self.text.tokenizer;
        let messages = [Message::new("user", command.prompt.as_str())];
        let pieces = self.text.chat.render_messages(&messages, true)?;
        let (prompt, _) = encode_pieces(tokenizer, &pieces, &messages);
        let is_end = |id| tokenizer.is_end(id);
        let mut answer = complete(sequence, sampler, &prompt, ANSWER_MAX, is_end, |_| self.go_on().is_ok())?;
        if answer.last().is_some_and(|id| tokenizer.is_end(*id)) {
            answer.pop();
        }
        Ok(tokenizer.decode(&answer))
    }

    /// Plans, shows the plan, and trains an adapter on the commands.
    fn train(&self, commands: &[Command]) -> Result<StackedAdapter> {
        let examples = self.examples(commands)?;
        let config = self.model.config();
        let layers: Vec<usize> = (0..config.n_layers).collect();
        let lora = LoraConfig::new(config, RANK, ALPHA, 0.1, &Proj::ALL, &layers)?;
        let request = self.request(&lora, &examples);
        eprintln!("{}", plan_table(&request, &MemoryPlan::new(config, &request)));
        let mut random = Rng::new(self.options.seed, INIT_STREAM);
        let adapter = Adapter::init(config, &lora, self.model.digest(), &mut || random.f32())?;
        let steps = self.options.iters.unwrap_or(ITERS);
        let mut trainer = Trainer::new(
            self.model.clone(),
            self.kernels.clone(),
            ArenaWords::new(config, &request),
            adapter,
            self.train_options(steps),
        );
        self.steps(&mut trainer, &examples, steps)?;
        Ok(StackedAdapter::new(&self.model, &self.kernels, &[(trainer.into_adapter(), 1.0)])?)
    }

    /// The commands as conversations whose answers are learned.
    fn examples(&self, commands: &[Command]) -> Result<Vec<Example>> {
        let options = data::DataOptions::default();
        let encode = |c: &Command| {
            let (prompt, completion) = (c.prompt.clone(), c.completion.clone());
            let sample = Sample::Pair { prompt, completion, joint: "" };
            encode_sample(&sample, &self.text.tokenizer, &self.text.chat, &options)
                .map_err(|reason| Error::new(ErrorKind::BadData, reason).into())
        };
        commands.iter().map(encode).collect()
    }

    fn request(&self, lora: &LoraConfig, examples: &[Example]) -> Request {
        let config = self.model.config();
        Request {
            batch: BATCH.min(examples.len()),
            seq: examples.iter().map(Example::rows).max().unwrap_or(1),
            params: Layout::new(config, lora).len(),
            full: None,
            gain_words: 0,
            packed: false,
            best: false,
            rank: lora.rank,
            kept_blocks: config.n_layers,
            keep: KeepPlan::default(),
            threads: self.kernels.threads(),
            dropout: true,
            beside_base: false,
            preparation_bytes: 0,
            data_tokens: examples.iter().map(|e| e.ids.len()).sum(),
            data_rows: examples.len(),
            // The tokenizer stays here, for the answers after the training.
            tokenizer_bytes: 0,
            model_bytes: self.model.private_bytes() + self.text.tokenizer.heap_bytes(),
            mapped_bytes: self.model.mapped_bytes(),
        }
    }

    fn train_options(&self, steps: u32) -> TrainOptions {
        let warmup = u64::from(steps / 20);
        TrainOptions {
            adamw: AdamWConfig { beta2: 0.98, weight_decay: 0.01, ..AdamWConfig::default() },
            schedule: Schedule { shape: Shape::Cosine, peak: LEARNING_RATE, warmup, total: steps.into() },
            seed: self.options.seed,
            precision: common::precision(&self.options.compute),
            gradient: common::gradient(&self.options.compute),
            kl: None,
        }
    }

    /// Trains, with a live bar.
    fn steps(&self, trainer: &mut Trainer, examples: &[Example], steps: u32) -> Result<()> {
        let mut batches = Batches::new(examples, BATCH, self.options.seed, Cursor::default());
        let mut batch = [Batch::default()];
        let mut progress = Progress::new(std::io::stderr(), Style::for_stderr(10), steps.into());
        let (started, mut tokens) = (Instant::now(), 0);
        for step in 1..=u64::from(steps) {
            self.go_on()?;
            batches.next_into(&mut batch[0]);
            let report = trainer.step(&batch)?;
            tokens += report.tokens;
            let elapsed_s = started.elapsed().as_secs_f64();
            progress.step(&Step {
                step,
                loss: report.loss,
                tokens_per_s: tokens as f64 / elapsed_s,
                peak_private_bytes: self.watch.sample(),
                elapsed_s,
            });
        }
        progress.finish();
        Ok(())
    }

    /// Whether Ctrl-C was not pressed.
    fn go_on(&self) -> Result<()> {
        match self.session.cancel.load(Ordering::Relaxed) {
            true => Err(common::cancelled("the demo was stopped").into()),
            false => Ok(()),
        }
    }
}
