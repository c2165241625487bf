//! Trains *seedling*, the small assistant compiled into `engraft demo`, from scratch in minutes:
//! generates its corpus, trains its tokenizer, trains the model with the reference's autograd, and
//! writes a quantized GGUF.
//!
//! ```text
//! cargo run --release --example pretrain                          # writes targets/cli/seedling.gguf
//! cargo run --release --example pretrain -- --check-adaptation    # can it learn private words?
//! cargo run --release --example pretrain -- --everyday            # writes targets/cli/demo/everyday.txt
//! cargo run --release --example pretrain -- --development DIR     # other tests, to tune the demo on
//! ```

mod seedling;

use anyhow::{Context, Result, bail};
use engraft_runtime::model::config::Proj;
use seedling::adapt::{self, Recipe};
use seedling::corpus::{self, Example};
use seedling::rng::Rng;
use seedling::tokens::{Encoded, Tokens};
use seedling::{gguf, train};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;

const USAGE: &str = "usage: pretrain [--check-adaptation [--verbose]] [--model FILE] [--demo DIR] [--seed N] \
    [--everyday] [--development DIR] [--examples N] [--epochs N] [--batch N] [--rate X] [--vocab N] \
    [--steps N] [--lora-rate X] [--lora-batch N] [--lora-scale X] \
    [--lora-modules q,k,…] [--lora-layers N]";

/// Commands that the demo replays.
const EVERYDAY: usize = 160;

/// What the command line may change.
struct Options {
    check: bool,
    everyday: bool,
    development: Option<PathBuf>,
    verbose: bool,
    model: PathBuf,
    demo: PathBuf,
    seed: u64,
    examples: usize,
    epochs: usize,
    batch: usize,
    rate: f64,
    vocab: usize,
    recipe: Recipe,
}

fn main() -> Result<()> {
    let options = options(std::env::args().skip(1))?;
    if options.check {
        return adapt::check(&options.model, &options.demo, &options.recipe, options.verbose);
    }
    if options.everyday {
        return write_everyday(&options.demo);
    }
    if let Some(dir) = &options.development {
        return write_development(&options, dir);
    }
    pretrain(&options)
}

fn options(mut args: impl Iterator<Item = String>) -> Result<Options> {
    fn value<T: FromStr>(flag: &str, args: &mut impl Iterator<Item = String>) -> Result<T> {
        let text = args.next().with_context(|| format!("{flag} wants a value\n{USAGE}"))?;
        text.parse().ok().with_context(|| format!("{flag} {text}: no such value\n{USAGE}"))
    }
    let cli = Path::new(env!("CARGO_MANIFEST_DIR")).join("targets/cli");
    let modules = Proj::ALL.to_vec();
    let recipe =
        Recipe { rank: 8, scale: 2.0, modules, layers: 4, steps: 150, batch: 8, rate: 1e-3, seed: 1 };
    let mut o = Options {
        check: false,
        everyday: false,
        development: None,
        verbose: false,
        model: cli.join("seedling.gguf"),
        demo: cli.join("demo"),
        seed: 2024,
        examples: 130_000,
        epochs: 1,
        batch: 24,
        rate: 3e-3,
        vocab: 768,
        recipe,
    };
    while let Some(flag) = args.next() {
        let args = &mut args;
        match flag.as_str() {
            "--check-adaptation" => o.check = true,
            "--verbose" => o.verbose = true,
            "--everyday" => o.everyday = true,
            "--development" => o.development = Some(value(&flag, args)?),
            "--model" => o.model = value(&flag, args)?,
            "--demo" => o.demo = value(&flag, args)?,
            "--seed" => {
                o.seed = value(&flag, args)?;
                o.recipe.seed = o.seed;
            }
            "--examples" => o.examples = value(&flag, args)?,
            "--epochs" => o.epochs = value(&flag, args)?,
            "--batch" => o.batch = value(&flag, args)?,
            "--rate" => o.rate = value(&flag, args)?,
            "--vocab" => o.vocab = value(&flag, args)?,
            "--steps" => o.recipe.steps = value(&flag, args)?,
            "--lora-rate" => o.recipe.rate = value(&flag, args)?,
            "--lora-batch" => o.recipe.batch = value(&flag, args)?,
            "--lora-scale" => o.recipe.scale = value(&flag, args)?,
            "--lora-layers" => o.recipe.layers = value(&flag, args)?,
            "--lora-modules" => {
                let names: String = value(&flag, args)?;
                let modules: Option<Vec<Proj>> = names.split(',').map(Proj::from_name).collect();
                o.recipe.modules = modules.with_context(|| format!("{flag} {names}: no such projection"))?;
            }
            _ => bail!("{flag}: no such flag\n{USAGE}"),
        }
    }
    Ok(o)
}

fn pretrain(o: &Options) -> Result<()> {
    let generic_test = generic_test(&o.demo)?;
    let mut rng = Rng::new(o.seed);
    let examples = corpus::generate(&mut rng, o.examples, &held_out(&o.demo)?);
    for example in &examples[..8.min(examples.len())] {
        eprintln!("  {}  ->  {}", example.prompt, example.completion);
    }
    let tokens = Tokens::train(&examples, o.vocab)?;
    let encode = |examples: &[Example]| examples.iter().map(|e| tokens.encode(e)).collect::<Result<Vec<_>>>();
    let (corpus, test) = (encode(&examples)?, encode(&generic_test)?);
    let config = train::config(tokens.tokens.len());
    let model = train::Trainable::new(&config, &mut rng)?;
    let parameters: usize = model.vars.iter().map(|v| v.elem_count()).sum();
    eprintln!("{parameters} parameters, {} tokens of text", corpus.iter().map(length).sum::<usize>());
    let mut batches = Vec::new();
    for _ in 0..o.epochs {
        batches.extend(train::batches(&corpus, o.batch, &mut rng)?);
    }
    train::run(&batches, model.vars.clone(), o.rate, 50, |batch| batch.loss(&config, &model.weights, None))?;
    gguf::write(&o.model, &config, &model.weights, &tokens)?;
    let (config, weights, _) = gguf::read(&o.model)?;
    let (exact, wrong) = train::exact_match(&config, &weights, None, &test)?;
    for (i, answer) in wrong {
        eprintln!("  wrong: {} -> {}", generic_test[i].prompt, tokens.show(&answer));
    }
    println!("{}: {exact:.3} of {} held-out commands answered exactly", o.model.display(), test.len());
    Ok(())
}

fn length(sequence: &Encoded) -> usize {
    sequence.ids.len()
}

/// The demo's sentences with answers, which neither the corpus nor the replay may hold.
fn held_out(demo: &Path) -> Result<HashSet<String>> {
    let mut held_out = HashSet::new();
    for name in ["generic_test.jsonl", "private_train.jsonl", "private_test.jsonl"] {
        let examples = adapt::read_jsonl(&demo.join(name))?;
        held_out.extend(examples.iter().map(|e| corpus::normal_form(&e.prompt)));
    }
    Ok(held_out)
}

/// Writes the everyday commands whose answers by the base the demo replays: no test sentence is among
/// them, and no answer is given.
fn write_everyday(demo: &Path) -> Result<()> {
    let examples = everyday(&held_out(demo)?);
    let prompts: String = examples.iter().flat_map(|e| [e.prompt.as_str(), "\n"]).collect();
    let path = demo.join("everyday.txt");
    std::fs::write(&path, prompts).with_context(|| format!("writing {}", path.display()))
}

fn everyday(held_out: &HashSet<String>) -> Vec<Example> {
    let mut examples = corpus::generate(&mut Rng::new(78), 800, held_out);
    examples.retain(corpus::is_plain);
    examples.truncate(EVERYDAY);
    examples
}

/// Writes tests of the same form as the demo's to `dir`, to choose its recipe by: a thousand everyday
/// commands and three hundred private ones, none of which is in the corpus, the replay or the tests.
/// A build with them in the place of the demo's measures the recipe on them.
fn write_development(o: &Options, dir: &Path) -> Result<()> {
    let mut known = held_out(&o.demo)?;
    let replay = std::fs::read_to_string(o.demo.join("everyday.txt")).context("reading everyday.txt")?;
    let corpus = corpus::generate(&mut Rng::new(o.seed), o.examples, &known);
    known.extend(corpus.iter().map(|e| corpus::normal_form(&e.prompt)));
    known.extend(replay.lines().map(corpus::normal_form));
    let mut drawn = corpus::generate(&mut Rng::new(79), 30_000, &known);
    drawn.retain(corpus::is_plain);
    let (everyday, others) = drawn.split_at(1000.min(drawn.len()));
    let mut private: Vec<Example> = others.iter().filter_map(corpus::in_private).collect();
    private.retain(|e| known.insert(corpus::normal_form(&e.prompt)));
    private.truncate(300);
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    write_jsonl(&dir.join("generic_test.jsonl"), everyday)?;
    write_jsonl(&dir.join("private_test.jsonl"), &private)
}

fn write_jsonl(path: &Path, examples: &[Example]) -> Result<()> {
    let lines: Vec<String> = examples.iter().map(serde_json::to_string).collect::<serde_json::Result<_>>()?;
    std::fs::write(path, lines.join("\n") + "\n").with_context(|| format!("writing {}", path.display()))
}

/// The held-out generic commands: read where they exist, else drawn with a seed of their own.
fn generic_test(demo: &Path) -> Result<Vec<Example>> {
    let path = demo.join("generic_test.jsonl");
    if !path.exists() {
        let mut lines = corpus::generate(&mut Rng::new(77), 400, &HashSet::new());
        lines.retain(corpus::is_plain);
        lines.truncate(120);
        write_jsonl(&path, &lines)?;
    }
    adapt::read_jsonl(&path)
}
