//! Trains *seedling*, the small assistant compiled into `engraft demo`, from scratch in minutes:
//! generates its corpus, trains its tokenizer, trains the model with the reference's autograd, and
//! writes a quantized GGUF.
//!
//! ```text
//! cargo run --release -p engraft-seedling                          # writes targets/cli/seedling.gguf
//! cargo run --release -p engraft-seedling -- --refine              # the second pass again, from the file
//! cargo run --release -p engraft-seedling -- --check-adaptation    # can it learn private words?
//! cargo run --release -p engraft-seedling -- --everyday            # writes targets/cli/demo/everyday.txt
//! cargo run --release -p engraft-seedling -- --development DIR     # other tests, to tune the demo on
//! cargo run --release -p engraft-seedling -- --evaluate FILE       # what does it answer wrongly?
//! ```
//!
//! `RAYON_NUM_THREADS=1` makes training faster: batches are already split over two threads, and candle's
//! own threads would wait for each other after every small operation.

mod adapt;
mod corpus;
mod gguf;
mod rng;
mod tokens;
mod train;

use adapt::Recipe;
use anyhow::{Context, Result, bail};
use candle_core::Tensor;
use corpus::Example;
use engraft_runtime::model::config::Proj;
use engraft_runtime::reference::Reference;
use rng::Rng;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use tokens::{Encoded, Tokens};

const USAGE: &str = "usage: seedling [--check-adaptation [--verbose]] [--model FILE] [--demo DIR] [--seed N] \
    [--everyday] [--development DIR] [--evaluate FILE] [--refine] [--examples N] [--composites X] \
    [--rate X] [--batch N] [--vocab N] \
    [--steps N] [--lora-rate X] [--lora-batch N] [--lora-scale X] \
    [--lora-modules q,k,…] [--lora-layers N]";

/// Commands that the demo replays.
const EVERYDAY: usize = 160;

/// Threads that share a batch.
const LANES: usize = 2;

/// One pass over its own corpus.
struct Pass {
    examples: usize,
    /// The fraction of examples that are two commands.
    composites: f64,
    /// Peak learning rate, and the fraction left at the end.
    rate: f64,
    floor: f64,
}

/// What people say.
const FIRST: Pass = Pass { examples: 130_000, composites: corpus::COMPOSITES, rate: 3e-3, floor: 0.05 };
/// The hard part: two commands in one sentence, which must be kept apart.
const SECOND: Pass = Pass { examples: 96_000, composites: 0.5, rate: 2e-3, floor: 0.0 };

/// Command-line options.
struct Options {
    check: bool,
    everyday: bool,
    development: Option<PathBuf>,
    evaluate: Option<PathBuf>,
    verbose: bool,
    model: PathBuf,
    demo: PathBuf,
    seed: u64,
    refine: bool,
    second: Pass,
    batch: usize,
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
        return write_development(&options.demo, dir);
    }
    if let Some(file) = &options.evaluate {
        return evaluate(&options.model, &adapt::read_jsonl(file)?);
    }
    pretrain(&options)
}

fn options(mut args: impl Iterator<Item = String>) -> Result<Options> {
    fn value<T: FromStr>(flag: &str, args: &mut impl Iterator<Item = String>) -> Result<T> {
        let text = args.next().with_context(|| format!("{flag} wants a value\n{USAGE}"))?;
        text.parse().ok().with_context(|| format!("{flag} {text}: no such value\n{USAGE}"))
    }
    let cli = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../targets/cli");
    let modules = Proj::ALL.to_vec();
    let recipe =
        Recipe { rank: 8, scale: 2.0, modules, layers: 4, steps: 150, batch: 8, rate: 1e-3, seed: 1 };
    let mut o = Options {
        check: false,
        everyday: false,
        development: None,
        evaluate: None,
        verbose: false,
        model: cli.join("seedling.gguf"),
        demo: cli.join("demo"),
        seed: 2024,
        refine: false,
        second: SECOND,
        batch: 24,
        vocab: 768,
        recipe,
    };
    while let Some(flag) = args.next() {
        let args = &mut args;
        match flag.as_str() {
            "--check-adaptation" => o.check = true,
            "--refine" => o.refine = true,
            "--evaluate" => o.evaluate = Some(value(&flag, args)?),
            "--verbose" => o.verbose = true,
            "--everyday" => o.everyday = true,
            "--development" => o.development = Some(value(&flag, args)?),
            "--model" => o.model = value(&flag, args)?,
            "--demo" => o.demo = value(&flag, args)?,
            "--seed" => {
                o.seed = value(&flag, args)?;
                o.recipe.seed = o.seed;
            }
            "--examples" => o.second.examples = value(&flag, args)?,
            "--composites" => o.second.composites = value(&flag, args)?,
            "--batch" => o.batch = value(&flag, args)?,
            "--rate" => o.second.rate = value(&flag, args)?,
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

/// Two passes: the second starts from the file the first wrote.
fn pretrain(o: &Options) -> Result<()> {
    let generic_test = generic_test(&o.demo)?;
    let (everyday, private) = development(&o.demo)?;
    let mut held_out = held_out(&o.demo)?;
    if !o.refine {
        let mut rng = Rng::new(o.seed);
        let examples = corpus::generate(&mut rng, FIRST.examples, FIRST.composites, &held_out);
        let tokens = Tokens::train(&examples, o.vocab)?;
        let tensors = train::fresh(&train::config(tokens.tokens.len()), &mut rng)?;
        pass(o, &FIRST, tensors, &tokens, &examples, &mut rng)?;
    }
    held_out.extend(everyday.iter().chain(&private).map(|e| corpus::normal_form(&e.prompt)));
    let mut rng = Rng::new(o.seed + 1);
    let examples = corpus::generate(&mut rng, o.second.examples, o.second.composites, &held_out);
    let (_, tensors, tokens) = gguf::read(&o.model)?;
    pass(o, &o.second, tensors, &tokens, &examples, &mut rng)?;
    evaluate(&o.model, &everyday)?;
    evaluate(&o.model, &generic_test)
}

/// Trains on `examples` and writes the model.
fn pass(
    o: &Options,
    pass: &Pass,
    tensors: HashMap<String, Tensor>,
    tokens: &Tokens,
    examples: &[Example],
    rng: &mut Rng,
) -> Result<()> {
    for example in &examples[..8.min(examples.len())] {
        eprintln!("  {}  ->  {}", example.prompt, example.completion);
    }
    let corpus = examples.iter().map(|e| tokens.encode(e)).collect::<Result<Vec<_>>>()?;
    let config = train::config(tokens.tokens.len());
    let model = train::Trainable::new(&config, tensors)?;
    let parameters: usize = model.vars.iter().map(|v| v.elem_count()).sum();
    eprintln!("{parameters} parameters, {} tokens of text", corpus.iter().map(length).sum::<usize>());
    let batches = train::batches(&corpus, o.batch, LANES, rng)?;
    let schedule = train::Cosine { peak: pass.rate, floor: pass.floor };
    train::run(&batches, &model.vars, &schedule, |batch| batch.loss(&model.reference, None))?;
    gguf::write(&o.model, &config, &model.tensors, tokens)
}

/// Prints the model's wrong answers, and the share it answers exactly.
fn evaluate(model: &Path, commands: &[Example]) -> Result<()> {
    let (config, tensors, tokens) = gguf::read(model)?;
    let reference = Reference::new(&config, tensors, None)?;
    let encoded = commands.iter().map(|e| tokens.encode(e)).collect::<Result<Vec<_>>>()?;
    let (exact, wrong) = train::exact_match(&reference, None, &encoded)?;
    for (i, answer) in wrong {
        eprintln!("  wrong: {} -> {}", commands[i].prompt, tokens.show(&answer).trim_end());
    }
    println!("{}: {exact:.4} of {} commands answered exactly", model.display(), commands.len());
    Ok(())
}

fn length(sequence: &Encoded) -> usize {
    sequence.ids.len()
}

/// The demo's sentences with answers; neither the corpus nor the replay may contain them.
fn held_out(demo: &Path) -> Result<HashSet<String>> {
    let mut held_out = HashSet::new();
    for name in ["generic_test.jsonl", "private_train.jsonl", "private_test.jsonl"] {
        let examples = adapt::read_jsonl(&demo.join(name))?;
        held_out.extend(examples.iter().map(|e| corpus::normal_form(&e.prompt)));
    }
    Ok(held_out)
}

/// Writes the everyday commands, without answers, whose answers by the base the demo replays. No test sentence
/// is among them.
fn write_everyday(demo: &Path) -> Result<()> {
    let examples = everyday(&held_out(demo)?);
    let prompts: String = examples.iter().flat_map(|e| [e.prompt.as_str(), "\n"]).collect();
    let path = demo.join("everyday.txt");
    std::fs::write(&path, prompts).with_context(|| format!("writing {}", path.display()))
}

fn everyday(held_out: &HashSet<String>) -> Vec<Example> {
    let mut examples = corpus::generate(&mut Rng::new(78), 800, corpus::COMPOSITES, held_out);
    examples.retain(corpus::is_plain);
    examples.truncate(EVERYDAY);
    examples
}

/// Writes tests in the same form as the demo's to `dir`, for choosing its recipe. A build that uses them
/// instead of the demo's measures the recipe on them.
fn write_development(demo: &Path, dir: &Path) -> Result<()> {
    let (everyday, private) = development(demo)?;
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    write_jsonl(&dir.join("generic_test.jsonl"), &everyday)?;
    write_jsonl(&dir.join("private_test.jsonl"), &private)
}

/// A thousand everyday commands and three hundred private ones, none of them in the corpus, the replay or the
/// tests. Short commands recur often; to be harder than a plain draw, these also avoid everything in a large
/// sample.
fn development(demo: &Path) -> Result<(Vec<Example>, Vec<Example>)> {
    let mut known = held_out(demo)?;
    let replay = std::fs::read_to_string(demo.join("everyday.txt")).context("reading everyday.txt")?;
    let sample = corpus::generate(&mut Rng::new(2024), FIRST.examples, FIRST.composites, &known);
    known.extend(sample.iter().map(|e| corpus::normal_form(&e.prompt)));
    known.extend(replay.lines().map(corpus::normal_form));
    let mut drawn = corpus::generate(&mut Rng::new(79), 30_000, corpus::COMPOSITES, &known);
    drawn.retain(corpus::is_plain);
    let (everyday, others) = drawn.split_at(1000.min(drawn.len()));
    let mut private: Vec<Example> = others.iter().filter_map(corpus::in_private).collect();
    private.retain(|e| known.insert(corpus::normal_form(&e.prompt)));
    private.truncate(300);
    Ok((everyday.to_vec(), private))
}

fn write_jsonl(path: &Path, examples: &[Example]) -> Result<()> {
    let lines: Vec<String> = examples.iter().map(serde_json::to_string).collect::<serde_json::Result<_>>()?;
    std::fs::write(path, lines.join("\n") + "\n").with_context(|| format!("writing {}", path.display()))
}

/// The held-out generic commands: read if they exist, else drawn with their own seed.
fn generic_test(demo: &Path) -> Result<Vec<Example>> {
    let path = demo.join("generic_test.jsonl");
    if !path.exists() {
        let mut lines = corpus::generate(&mut Rng::new(77), 400, corpus::COMPOSITES, &HashSet::new());
        lines.retain(corpus::is_plain);
        lines.truncate(120);
        write_jsonl(&path, &lines)?;
    }
    adapt::read_jsonl(&path)
}
