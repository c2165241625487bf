//! The forward pass: against float64 figures and the referee, with and without the cache, and
//! llama.cpp's perplexities and continuations.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::common::models::{FLOATS, LONG_BLOCKS, SHORT_BLOCKS, Spec};
use crate::common::{TestResult, adapter, adapter_of, batch, referee, request, shared};
use candle_core::{DType, Device, Tensor};
use engraft_kernels::Kernels;
use engraft_runtime::adapter::{Adapter, Gains, LoraConfig};
use engraft_runtime::eval::{perplexity, scoring_chain};
use engraft_runtime::generate::{KvType, Sampler, SamplerOptions, Sequence, StackedAdapter};
use engraft_runtime::model::Proj;
use engraft_runtime::model::text::Text;
use engraft_runtime::model::tokenizer::{Special, Tokenizer};
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::Precision;
use engraft_runtime::plan::ArenaWords;
use engraft_runtime::reference::{Lora, Reference};
use engraft_runtime::rng::Rng;
use engraft_runtime::train::Chain;
use engraft_runtime::train::chain::AdapterView;

type Failure = Box<dyn std::error::Error>;

fn sequence(model: &Arc<ModelFile>, stacked: Option<StackedAdapter>, p: Precision, room: usize) -> Sequence {
    let cache = if p == Precision::F32 { KvType::F32 } else { KvType::F16 };
    Sequence::new(model.clone(), Arc::new(Kernels::detect(1)), stacked.map(Arc::new), p, room, cache)
        .expect("every model takes these caches")
}

/// The largest |a − b|.
fn off(a: &[f32], b: impl IntoIterator<Item = f64>) -> f64 {
    let mut n = 0;
    let mut worst = 0.0f64;
    for (a, b) in a.iter().zip(b) {
        n += 1;
        let d = (f64::from(*a) - b).abs();
        worst = if d.is_nan() { f64::INFINITY } else { worst.max(d) };
    }
    assert_eq!(n, a.len());
    worst
}

fn widened(logits: &[f32]) -> impl Iterator<Item = f64> + '_ {
    logits.iter().map(|v| f64::from(*v))
}

#[test]
fn logits_equal_the_float64_figures() -> TestResult {
    for (model, golden) in [
        ("models/stories260K/stories260K-f32.gguf", "models/stories260K/golden_logits.json"),
        ("models/babyllama/babyllama-tok361-f32.gguf", "models/babyllama/golden_logits_tok361.json"),
    ] {
        let (Some(path), Some(golden)) = (shared::file(model), shared::file(golden)) else { continue };
        let model = Arc::new(ModelFile::open(path)?);
        let cases: Vec<serde_json::Value> = serde_json::from_str(&std::fs::read_to_string(golden)?)?;
        assert!(!cases.is_empty());
        for case in cases {
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone())?;
            let expected: Vec<f64> = serde_json::from_value(case["last_logits"].clone())?;
            let mut whole = sequence(&model, None, Precision::F32, ids.len());
            let prefill = whole.feed(&ids)?.to_vec();
            let error = off(&prefill, expected);
            let mut single = sequence(&model, None, Precision::F32, ids.len());
            for id in &ids {
                single.feed(&[*id])?;
            }
            single.truncate(ids.len() - 1);
            let cached = off(single.feed(&ids[ids.len() - 1..])?, widened(&prefill));
            eprintln!("{}: {} ids, {error:e} off, {cached:e} with the cache", model.label(), ids.len());
            assert!(error < 1e-4 && cached < 1e-4, "{}: {error:e}, {cached:e}", model.label());
            let mut other = ids.clone();
            other[0] = other[1];
            whole.truncate(0);
            assert!(off(whole.feed(&other)?, widened(&prefill)) > 1e-3, "another first token went unnoticed");
        }
    }
    Ok(())
}

#[test]
fn sessions_with_stacked_adapters_equal_the_referee() -> TestResult {
    for spec in [&SHORT_BLOCKS, &LONG_BLOCKS, &FLOATS] {
        let model = spec.model();
        let c = model.config();
        // Longer than one part of a prefill.
        let mut rng = Rng::new(8, 8);
        let ids: Vec<u32> = (0..270).map(|_| rng.below(c.vocab as u64) as u32).collect();
        let one = adapter(&model, 4, &Proj::ALL, &[0, spec.layers - 1], 0.0);
        let reference = referee::reference(&model)?;
        let mut lora = Lora { scale: 1.5 * one.config.scale(), ..Lora::default() };
        for (layer, proj, s) in one.layout.slots() {
            let a = Tensor::from_slice(&one.theta[s.a], (s.rank, s.inputs), &Device::Cpu)?;
            let b = Tensor::from_slice(&one.theta[s.b], (s.rank, s.outputs), &Device::Cpu)?.t()?;
            lora.pairs.insert((layer, proj), (a, b));
        }
        let expected = reference.logits(Some(&lora), &ids)?.get(ids.len() - 1)?;
        let expected: Vec<f32> = expected.to_vec1()?;
        let bare: Vec<f32> = reference.logits(None, &ids)?.get(ids.len() - 1)?.to_vec1()?;
        assert!(off(&bare, widened(&expected)) > 1e-2, "the adapter changes nothing");
        // One adapter at 1.0 and again at 0.5 is one at 1.5.
        for (precision, bound, cached_bound) in [(Precision::F32, 1e-4, 1e-4), (Precision::Int8, 0.2, 0.2)] {
            let stacked = || {
                StackedAdapter::new(&model, &Kernels::detect(2), &[(one.clone(), 1.0), (one.clone(), 0.5)])
            };
            let mut whole = sequence(&model, Some(stacked()?), precision, ids.len());
            let prefill = whole.feed(&ids)?.to_vec();
            let error = off(&prefill, widened(&expected));
            let mut single = sequence(&model, Some(stacked()?), precision, ids.len());
            single.feed(&ids[..200])?;
            ids[200..ids.len() - 1].iter().try_for_each(|id| single.feed(&[*id]).map(drop))?;
            let cached = off(single.feed(&ids[ids.len() - 1..])?, widened(&prefill));
            eprintln!("{} {precision:?}: {error:e} off, {cached:e} with the cache", spec.name);
            assert!(
                error < bound && cached < cached_bound,
                "{} {precision:?}: {error:e} {cached:e}",
                spec.name
            );
        }
    }
    Ok(())
}

/// The model with the adapters' effects added to its weights in f64: W + Σ f·(W′ − W).
fn merged(model: &ModelFile, adapters: &[(Adapter, f32)]) -> Result<Reference, Box<dyn std::error::Error>> {
    let mut tensors = referee::tensors(model)?;
    for layer in 0..model.config().n_layers {
        for proj in Proj::ALL {
            let name = format!("blk.{layer}.{}.weight", proj.gguf_name());
            let base = tensors[&name].to_dtype(DType::F64)?;
            let mut sum = base.clone();
            for (a, factor) in adapters {
                let Some(s) = a.layout.slot(layer, proj) else { continue };
                let tensor = |at: Range<usize>, shape: (usize, usize)| {
                    Tensor::from_slice(&a.theta[at], shape, &Device::Cpu)?.to_dtype(DType::F64)
                };
                let (am, bt) = (tensor(s.a, (s.rank, s.inputs))?, tensor(s.b, (s.rank, s.outputs))?);
                let low = (bt.t()?.matmul(&am)? * f64::from(a.config.scale_of(layer, proj)))?;
                let mut own = (&base + low)?;
                if a.config.dora {
                    let m = tensor(s.m, (s.outputs, 1))?;
                    own = own.broadcast_mul(&(m / own.sqr()?.sum_keepdim(1)?.sqrt()?)?)?;
                }
                sum = (sum + ((own - &base)? * f64::from(*factor))?)?;
            }
            tensors.insert(name, sum.to_dtype(DType::F32)?);
        }
    }
    Ok(Reference::new(model.config(), tensors, model.rope_freqs().map(<[f32]>::to_vec))?)
}

#[test]
fn stacked_loras_and_doras_are_the_sum_of_their_effects() -> TestResult {
    for spec in [&SHORT_BLOCKS, &FLOATS] {
        let model = spec.model();
        let c = model.config();
        let mut rng = Rng::new(8, 8);
        let ids: Vec<u32> = (0..30).map(|_| rng.below(c.vocab as u64) as u32).collect();
        let lora = adapter(&model, 4, &Proj::ALL, &[0, 1], 0.0);
        let dora = |targets: &[Proj], layers: &[usize]| {
            let plain = LoraConfig::new(c, 3, 5.0, 0.0, targets, layers).expect("settings");
            adapter_of(&model, &LoraConfig { dora: true, rslora: true, ..plain })
        };
        let (one, other) = (dora(&Proj::ALL, &[0, 2]), dora(&[Proj::Q, Proj::Down, Proj::O], &[0, 1]));
        for stack in [
            vec![(one.clone(), 1.0)],
            vec![(one.clone(), 0.5)],
            vec![(one.clone(), 0.0)],
            vec![(lora.clone(), 1.0), (one.clone(), 1.0), (other.clone(), -0.7)],
            vec![(other.clone(), -0.7), (one.clone(), 1.0), (lora.clone(), 1.0)],
        ] {
            let kernels = Kernels::detect(2);
            let stacked = StackedAdapter::new(&model, &kernels, &stack)?;
            let reference = merged(&model, &stack)?;
            let expected = reference.logits(None, &ids)?.get(ids.len() - 1)?;
            let expected: Vec<f32> = expected.to_vec1()?;
            let mut whole = sequence(&model, Some(stacked), Precision::F32, ids.len());
            let error = off(whole.feed(&ids)?, widened(&expected));
            eprintln!("{}: {} adapters, {error:e} off", spec.name, stack.len());
            assert!(error < 1e-4, "{}: {error}", spec.name);
        }
    }
    Ok(())
}

#[test]
fn a_dora_alone_infers_as_it_trained() -> TestResult {
    for spec in [&SHORT_BLOCKS, &LONG_BLOCKS, &FLOATS] {
        let model = spec.model();
        let layers: Vec<usize> = (0..spec.layers).collect();
        // A multiplier that is a power of two folds into B without rounding.
        let plain = LoraConfig::new(model.config(), 4, 8.0, 0.0, &Proj::ALL, &layers)?;
        let a = adapter_of(&model, &LoraConfig { dora: true, ..plain });
        let kernels = Arc::new(Kernels::detect(2));
        let request = request(model.config(), &a, 1, 40, 2);
        let words = ArenaWords::new(model.config(), &request);
        let mut chain = Chain::new(model.clone(), kernels.clone(), Precision::Int8, words);
        let mut gains = Gains::new(&model, &kernels, &a.layout, chain.kernel_scratch());
        let of = (&a.layout, &a.config);
        gains.refresh(&model, &kernels, of, &a.theta, chain.gain_scratch(true));
        let trained = AdapterView { layout: &a.layout, theta: &a.theta, config: &a.config, gains: gains.c() };
        let batch = batch(model.config(), &[13, 5, 21], &mut Rng::new(3, 3));
        let expected = chain.evaluate(Some(&trained), &batch, |_, _| {});
        let stacked = StackedAdapter::new(&model, &kernels, &[(a.clone(), 1.0)])?;
        let found = chain.evaluate(Some(&stacked), &batch, |_, _| {});
        let error = (found.loss_sum / expected.loss_sum - 1.0).abs();
        eprintln!("{}: the losses part by {error:e}", spec.name);
        assert!(error < 1e-5, "{}: {error}", spec.name);
    }
    Ok(())
}

#[test]
fn a_long_head_of_floats_fits_a_sessions_scratch() -> TestResult {
    let model = Spec { vocab: 20_000, ..FLOATS }.model();
    let ids = [5, 19_999, 3];
    let reference = referee::reference(&model)?;
    let expected: Vec<f32> = reference.logits(None, &ids)?.get(2)?.to_vec1()?;
    // The float weights stay exact at both precisions; the second's cache is in f16.
    for (precision, bound) in [(Precision::F32, 1e-4), (Precision::Int8, 1e-2)] {
        let mut sequence = sequence(&model, None, precision, 4);
        let error = off(sequence.feed(&ids)?, widened(&expected));
        assert!(error < bound, "{precision:?}: {error:e}");
    }
    Ok(())
}

/// llama-perplexity's figure of `text`, in windows of `ctx`.
fn ppl(path: &Path, text: &str, ctx: usize, threads: usize) -> Result<f64, Failure> {
    let model = Arc::new(ModelFile::open(path)?);
    let (ids, bos) = {
        let t = Text::of(&model)?.tokenizer;
        let bos = t.bos().filter(|_| t.add_bos());
        (bos.into_iter().chain(t.encode(text, Special::Plain)).collect::<Vec<u32>>(), bos)
    };
    let kernels = Arc::new(Kernels::detect(threads));
    let mut chain = scoring_chain(model, kernels, Precision::Int8, 0, ctx);
    let e = perplexity(&mut chain, None, &ids, ctx, bos, |_, _, _| true)?;
    Ok((e.loss_sum / e.targets as f64).exp())
}

fn check_ppl(path: &Path, text: &str, ctx: usize, threads: usize, expected: f64) -> TestResult {
    let got = ppl(path, text, ctx, threads)?;
    let percent = (got / expected - 1.0) * 100.0;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    eprintln!("{name}: {got:.4}, llama.cpp {expected:.4} ({percent:+.3} %)");
    assert!(percent.abs() <= 0.5, "{name}: {got} for {expected}");
    Ok(())
}

const STORIES: &str = "data/text/tinystories60k.txt";

fn stories() -> Result<Option<String>, Failure> {
    let Some(path) = shared::file(STORIES) else { return Ok(None) };
    Ok(Some(std::fs::read_to_string(path)?))
}

#[test]
fn perplexities_are_llama_cpps() -> TestResult {
    let Some(text) = stories()? else { return Ok(()) };
    for (file, expected) in [
        ("stories260K/stories260K-f32", 4.6096),
        ("stories260K/stories260K-Q8_0", 4.6136),
        ("stories260K/stories260K-Q4_0", 4.9573),
        ("babyllama/babyllama-tok361-f32", 2.2728),
        ("babyllama/babyllama-tok361-Q8_0", 2.2739),
        ("babyllama/babyllama-tok361-Q4_K_M", 2.2886),
        ("babyllama/babyllama-tok361-IQ4_NL", 2.3431),
        ("babyllama/babyllama-tok361-Q4_0", 2.3589),
    ] {
        let Some(path) = shared::file(&format!("models/{file}.gguf")) else { continue };
        check_ppl(&path, &text, 256, 1, expected)?;
    }
    Ok(())
}

#[test]
#[ignore = "needs ENGRAFT_MODEL and ENGRAFT_SHARED"]
fn smollm2s_perplexities_are_llama_cpps() -> TestResult {
    let model = shared::real_model();
    let stories = std::fs::read_to_string(shared::needed(STORIES))?;
    check_ppl(&model, &stories, 512, 2, 7.8321)?;
    let wiki = std::fs::read(shared::needed("data/text/wikitext2_head.txt"))?;
    check_ppl(&model, &String::from_utf8_lossy(&wiki[..60_000]), 512, 2, 21.4948)
}

/// Figures of the real model's Q4_1 file requantized by llama-quantize (`--allow-requantize`).
const REQUANTIZED: [(&str, f64); 10] = [
    ("Q4_0", 9.4354),
    ("Q8_0", 7.8682),
    ("Q4_K_M", 8.2203),
    ("Q2_K", 10.8954),
    ("Q3_K_M", 8.8666),
    ("Q5_K_M", 8.1714),
    ("Q6_K", 7.9095),
    ("IQ4_NL", 9.2714),
    ("IQ4_XS", 9.3435),
    ("F16", 7.8201),
];

#[test]
#[ignore = "needs ENGRAFT_SHARED, and ENGRAFT_MODELS_DIR with SmolLM2-135M-Instruct.TYPE.gguf"]
fn requantized_models_perplexities_are_llama_cpps() -> TestResult {
    let dir = PathBuf::from(std::env::var_os("ENGRAFT_MODELS_DIR").expect("set ENGRAFT_MODELS_DIR"));
    let text = std::fs::read_to_string(shared::needed(STORIES))?;
    let mut failures = Vec::new();
    for (name, expected) in REQUANTIZED {
        let path = dir.join(format!("SmolLM2-135M-Instruct.{name}.gguf"));
        let got = ppl(&path, &text, 512, 2)?;
        let percent = (got / expected - 1.0) * 100.0;
        eprintln!("{name}: {got:.4}, llama.cpp {expected:.4} ({percent:+.3} %)");
        if percent.abs() > 0.5 {
            failures.push(format!("{name} {percent:+.3} %"));
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
    Ok(())
}

/// Greedy continuations by llama.cpp, of 32 tokens each.
const CONTINUATIONS: [(&str, &str); 3] = [
    (
        "The capital of France is",
        " Paris.\n\nThe United States has a population of approximately 311 million people.\n\nThe United \
         States has a population of approximately 31",
    ),
    (
        "Photosynthesis is the process by which",
        " plants convert sunlight into energy. This process involves a series of chemical reactions that \
         take place in the leaves of plants. The process of photosynthesis is essential for life on",
    ),
    (
        "def fibonacci(n):",
        "\n    if n == 0:\n        return 1\n    return n * fibonacci(n - 1)\n\nprint(fibonacci(10",
    ),
];

/// A continuation's first tokens must each be the likeliest, or within this many logits of it.
///
/// llama.cpp takes nearly equal tokens by the rounding of the build at hand: with another instruction
/// set, or without flash attention, it goes on from "This process" with "is", as f32 products do (by
/// 0.07), and its F16 model from "Paris." with "The answer" (by 0.22 in f32).
const NEAR_TIE: f32 = 0.25;

/// By how many logits one of the first 16 tokens of `continuation` falls behind the likeliest, at most.
fn behind(sequence: &mut Sequence, prompt: &[u32], continuation: &[u32]) -> Result<f32, Failure> {
    sequence.truncate(0);
    let mut worst = 0.0f32;
    let mut next = prompt;
    for (i, id) in continuation.iter().take(16).enumerate() {
        let logits = sequence.feed(next)?;
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        worst = worst.max(best - logits[*id as usize]);
        next = &continuation[i..=i];
    }
    Ok(worst)
}

/// How many of 32 tokens drawn freely spell the beginning of `expected`.
fn freely(
    sequence: &mut Sequence,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    expected: &str,
) -> Result<usize, Failure> {
    sequence.truncate(0);
    let mut sampler = Sampler::new(SamplerOptions::greedy())?;
    let mut said = vec![sampler.sample(sequence.feed(prompt)?, prompt)];
    while said.len() < 32 {
        let last = said[said.len() - 1];
        said.push(sampler.sample(sequence.feed(&[last])?, &said));
    }
    Ok((0..=32).rfind(|n| expected.starts_with(&tokenizer.decode(&said[..*n]))).unwrap_or(0))
}

#[test]
#[ignore = "needs ENGRAFT_MODEL"]
fn the_real_models_continuations_are_llama_cpps_up_to_near_ties() -> TestResult {
    let path = shared::real_model();
    let model = Arc::new(ModelFile::open(path)?);
    let tokenizer = Text::of(&model)?.tokenizer;
    let mut sequence =
        Sequence::new(model, Arc::new(Kernels::detect(2)), None, Precision::Int8, 128, KvType::F16)?;
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let encode = |text: &str| tokenizer.encode(text, Special::Plain);
    for (i, (prompt, expected)) in CONTINUATIONS.into_iter().enumerate() {
        let ids: Vec<u32> = bos.into_iter().chain(encode(prompt)).collect();
        let worst = behind(&mut sequence, &ids, &encode(expected))?;
        let same = freely(&mut sequence, &tokenizer, &ids, expected)?;
        eprintln!(
            "{prompt:?}: at most {worst:.3} logits behind; {same} of 32 tokens equal when drawn freely"
        );
        assert!(worst <= NEAR_TIE, "{prompt:?}: {worst} logits behind");
        let (_, another) = CONTINUATIONS[(i + 1) % 3];
        let foreign = behind(&mut sequence, &ids, &encode(another))?;
        assert!(foreign > 1.0, "another prompt's continuation went unnoticed ({foreign})");
    }
    Ok(())
}
