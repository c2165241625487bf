//! Whether forty examples teach the model a user's private words, checked through the reference.

use crate::corpus::Example;
use crate::rng::Rng;
use crate::tokens::Encoded;
use crate::{gguf, train};
use anyhow::{Context, Result, ensure};
use candle_core::{Device, Var};
use engraft_runtime::model::config::{ModelConfig, Proj};
use engraft_runtime::reference::{Lora, Reference};
use std::path::Path;
use std::time::Instant;

/// How the check trains its adapter.
pub(crate) struct Recipe {
    /// Rank of every pair.
    pub(crate) rank: usize,
    /// alpha/r.
    pub(crate) scale: f32,
    /// The projections adapted.
    pub(crate) modules: Vec<Proj>,
    /// In how many blocks, counted from the first.
    pub(crate) layers: usize,
    /// Optimizer steps.
    pub(crate) steps: usize,
    /// Examples in a step.
    pub(crate) batch: usize,
    /// Peak learning rate.
    pub(crate) rate: f64,
    /// Seed of the start and of the order.
    pub(crate) seed: u64,
}

/// Reads {"prompt","completion"} lines.
pub(crate) fn read_jsonl(path: &Path) -> Result<Vec<Example>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let parse = |(n, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| format!("{}:{}", path.display(), n + 1))
    };
    text.lines().enumerate().map(parse).collect()
}

/// Trains an adapter on `private_train.jsonl` and reports exact answers before and after, of private
/// and of generic commands. `verbose` prints each wrong one.
pub(crate) fn check(model: &Path, demo: &Path, recipe: &Recipe, verbose: bool) -> Result<()> {
    let (config, tensors, tokens) = gguf::read(model)?;
    let reference = Reference::new(&config, tensors, None)?;
    let load = |name: &str| -> Result<(Vec<Example>, Vec<Encoded>)> {
        let examples = read_jsonl(&demo.join(name))?;
        let encoded = examples.iter().map(|e| tokens.encode(e)).collect::<Result<_>>()?;
        Ok((examples, encoded))
    };
    let (_, private_train) = load("private_train.jsonl")?;
    let (private, private_test) = load("private_test.jsonl")?;
    let (generic, generic_test) = load("generic_test.jsonl")?;
    let report = |when: &str, lora: Option<&Lora>| -> Result<(f64, f64)> {
        let (private_exact, private_wrong) = train::exact_match(&reference, lora, &private_test)?;
        let (generic_exact, generic_wrong) = train::exact_match(&reference, lora, &generic_test)?;
        println!("{when}: private {private_exact:.3}, generic {generic_exact:.3}");
        for (examples, wrong) in [(&private, private_wrong), (&generic, generic_wrong)] {
            for (i, answer) in wrong.iter().filter(|_| verbose && lora.is_some()) {
                println!("  wrong: {} -> {}", examples[*i].prompt, tokens.show(answer).trim_end());
            }
        }
        Ok((private_exact, generic_exact))
    };
    let before = report("before", None)?;
    let started = Instant::now();
    let mut rng = Rng::new(recipe.seed);
    let (lora, vars) = fresh_lora(&config, recipe, &mut rng)?;
    let mut batches = Vec::new();
    while batches.len() < recipe.steps {
        batches.extend(train::batches(&private_train, recipe.batch, 1, &mut rng)?);
    }
    batches.truncate(recipe.steps);
    let schedule = train::Cosine { peak: recipe.rate, floor: 0.05 };
    train::run(&batches, &vars, &schedule, |batch| batch.loss(&reference, Some(&lora)))?;
    let seconds = started.elapsed().as_secs_f64();
    let after = report(&format!("after {} steps in {seconds:.0} s", recipe.steps), Some(&lora))?;
    ensure!(before.0 <= 0.05, "the model already knows the private words: {:.3} before", before.0);
    ensure!(after.0 >= 0.9, "the private words were not learned: {:.3}", after.0);
    ensure!(before.1 >= 0.97 && after.1 >= 0.97, "generic commands: {:.3}, then {:.3}", before.1, after.1);
    Ok(())
}

/// A ~ U(−1/√in, 1/√in), B = 0.
fn fresh_lora(config: &ModelConfig, recipe: &Recipe, rng: &mut Rng) -> Result<(Lora, Vec<Var>)> {
    let mut lora = Lora { scale: recipe.scale, ..Lora::default() };
    let mut vars = Vec::new();
    for layer in 0..recipe.layers.min(config.n_layers) {
        for &p in &recipe.modules {
            let (out, inp) = p.shape(config);
            let bound = 1.0 / (inp as f64).sqrt();
            let a = (0..recipe.rank * inp).map(|_| (bound * (2.0 * rng.unit() - 1.0)) as f32).collect();
            let a = Var::from_vec::<_, f32>(a, (recipe.rank, inp), &Device::Cpu)?;
            let b = Var::from_vec(vec![0f32; out * recipe.rank], (out, recipe.rank), &Device::Cpu)?;
            lora.pairs.insert((layer, p), (a.as_tensor().clone(), b.as_tensor().clone()));
            vars.extend([a, b]);
        }
    }
    Ok((lora, vars))
}
