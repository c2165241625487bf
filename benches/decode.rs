//! Tokens per second of prefill and decode, per model file.
//!
//! `cargo bench --bench decode -- MODEL.gguf ... [--threads 2] [--isa NAME] [--cache-type f16|f32|q8]
//! [--prompt 256] [--tokens 64] [--repetitions 5] [--batched] [--tuned]` prints one JSON line per model: every
//! run's rates and their medians, as benches/peers/llama_cpp.py prints llama.cpp's. Before anything is timed,
//! the logits after a prompt read at once are checked against those after the same prompt read token by token.
//!
//! With `--batched` the line instead holds the tokens per second of several simultaneous sequences, by their
//! number and the length of their common prefix. With `--tuned`, all weights are f32.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use engraft_kernels::{Isa, Kernels};
use engraft_runtime::generate::{KvType, Prefix, Sequence, Sequences};
use engraft_runtime::model::tuned::{TunedModel, Weights};
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::Precision;
use engraft_runtime::rng::Rng;

struct Args {
    models: Vec<String>,
    threads: usize,
    isa: Isa,
    cache: KvType,
    prompt: usize,
    tokens: usize,
    repetitions: usize,
    batched: bool,
    tuned: bool,
}

fn args() -> Result<Args> {
    let mut a = Args {
        models: Vec::new(),
        threads: 2,
        isa: Isa::detect(),
        cache: KvType::F16,
        prompt: 256,
        tokens: 64,
        repetitions: 5,
        batched: false,
        tuned: false,
    };
    let mut words = std::env::args().skip(1).filter(|w| w != "--bench");
    while let Some(w) = words.next() {
        let mut value = || words.next().with_context(|| format!("{w} needs a value"));
        match w.as_str() {
            "--threads" => a.threads = value()?.parse()?,
            "--isa" => a.isa = Isa::from_name(&value()?).context("this CPU lacks that ISA")?,
            "--cache-type" => {
                a.cache = match value()?.as_str() {
                    "f32" => KvType::F32,
                    "q8" => KvType::Q8,
                    _ => KvType::F16,
                }
            }
            "--prompt" => a.prompt = value()?.parse::<usize>()?.max(1),
            "--tokens" => a.tokens = value()?.parse::<usize>()?.max(1),
            "--repetitions" => a.repetitions = value()?.parse::<usize>()?.max(1),
            "--batched" => a.batched = true,
            "--tuned" => a.tuned = true,
            _ if w.starts_with("--") => bail!("unknown flag {w}"),
            _ => a.models.push(w),
        }
    }
    Ok(a)
}

/// Largest difference of the logits after `ids` read at once and read one by one, over their spread.
fn disagreement(session: &mut Sequence, ids: &[u32]) -> Result<f32> {
    session.truncate(0);
    let at_once = session.feed(ids)?.to_vec();
    session.truncate(0);
    let mut one_by_one = Vec::new();
    for id in ids {
        one_by_one = session.feed(&[*id])?.to_vec();
    }
    let top = at_once.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    let low = at_once.iter().fold(f32::INFINITY, |m, v| m.min(*v));
    let difference = at_once.iter().zip(&one_by_one).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    Ok(difference / (top - low))
}

fn rate(tokens: usize, run: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    run()?;
    Ok(tokens as f64 / start.elapsed().as_secs_f64())
}

fn median(rates: &[f64]) -> f64 {
    let mut sorted = rates.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn run(a: &Args, path: &str, kernels: &Arc<Kernels>) -> Result<()> {
    let file = Arc::new(ModelFile::open(path)?);
    let vocab = file.config().vocab as u64;
    let model: Weights = if a.tuned { Arc::new(TunedModel::new(file, kernels)).into() } else { file.into() };
    if a.batched {
        return batched(a, path, &model, kernels);
    }
    let capacity = a.prompt.max(a.tokens).max(32);
    let mut session = Sequence::new(model, kernels.clone(), None, Precision::Int8, capacity, a.cache)?;
    let mut rng = Rng::new(2, 2);
    let ids: Vec<u32> = (0..capacity).map(|_| rng.below(vocab) as u32).collect();
    let off = disagreement(&mut session, &ids[..32])?;
    ensure!(
        off < 0.05,
        "{path}: reading a prompt at once or token by token changes logits by {off} of their spread"
    );
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for i in 0..=a.repetitions {
        session.truncate(0);
        let p = rate(a.prompt, || session.feed(&ids[..a.prompt]).map(drop).map_err(Into::into))?;
        session.truncate(0);
        let d = rate(a.tokens, || {
            ids[..a.tokens].iter().try_for_each(|id| session.feed(&[*id]).map(drop)).map_err(Into::into)
        })?;
        // The first run warms the caches and the map.
        if i > 0 {
            prefill.push(p);
            decode.push(d);
        }
    }
    println!(
        "{}",
        serde_json::json!({
            "system": "engraft", "model": path.rsplit('/').next(), "isa": a.isa.name(),
            "threads": kernels.threads(), "n_prompt": a.prompt, "n_gen": a.tokens,
            "prefill_tokens_per_second_median": median(&prefill), "prefill_tokens_per_second": prefill,
            "decode_tokens_per_second_median": median(&decode), "decode_tokens_per_second": decode,
        })
    );
    Ok(())
}

/// Sequences at once.
const SLOTS: [usize; 7] = [1, 4, 8, 16, 32, 48, 64];
/// Tokens of the common prefix.
const PREFIXES: [usize; 2] = [0, 1000];

/// Rates of several simultaneous sequences with one-token prompts, not counting the reading of the prefix.
fn batched(a: &Args, path: &str, model: &Weights, kernels: &Arc<Kernels>) -> Result<()> {
    let mut rng = Rng::new(2, 2);
    let vocab = model.config().vocab as u64;
    let mut rows = Vec::new();
    for prefix in PREFIXES {
        let ids: Vec<u32> = (0..prefix).map(|_| rng.below(vocab) as u32).collect();
        let prefix = Prefix::read(model.clone(), kernels.clone(), None, Precision::Int8, a.cache, &ids)?;
        let prefix = Arc::new(prefix);
        for slots in SLOTS {
            let (own, kernels) = (model.clone(), kernels.clone());
            let mut batch =
                Sequences::new(own, kernels, None, Precision::Int8, prefix.clone(), slots, a.tokens)?;
            let prompts: Vec<Vec<u32>> = (0..slots).map(|_| vec![rng.below(vocab) as u32]).collect();
            let mut rates = Vec::new();
            for i in 0..=a.repetitions {
                let (start, mut steps) = (Instant::now(), 0);
                // Timed from the last prompt on, when every step advances all sequences, unless one ends in a
                // cycle.
                let mut read = start;
                let answers = batch.complete(
                    &prompts,
                    a.tokens,
                    |_| false,
                    |_| {
                        steps += 1;
                        if steps == slots {
                            read = Instant::now();
                        }
                        true
                    },
                )?;
                let tokens = answers.iter().map(Vec::len).sum::<usize>() - slots;
                if i > 0 {
                    rates.push(tokens as f64 / read.elapsed().as_secs_f64());
                }
            }
            rows.push(serde_json::json!({
                "prefix": ids.len(), "slots": slots,
                "tokens_per_second_median": median(&rates), "tokens_per_second": rates,
            }));
        }
    }
    println!(
        "{}",
        serde_json::json!({
            "system": "engraft", "model": path.rsplit('/').next(), "isa": a.isa.name(), "tuned": a.tuned,
            "threads": kernels.threads(), "n_gen": a.tokens, "batched": rows,
        })
    );
    Ok(())
}

fn main() -> Result<()> {
    let a = args()?;
    if a.models.is_empty() {
        println!("SKIPPED: name GGUF models: cargo bench --bench decode -- MODEL.gguf ...");
    }
    let kernels = Arc::new(Kernels::with_isa(a.isa, a.threads));
    a.models.iter().try_for_each(|m| run(&a, m, &kernels))
}
