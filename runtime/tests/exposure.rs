//! How much an adapter memorizes: canaries, made-up secrets put among the rows a number of times, and how far
//! above other secrets of their form the tuned model then ranks them (exposure; Carlini et al., arXiv
//! 1802.08232). The record is in SECURITY.md. On the real model, some minutes with a release build:
//!
//! ```text
//! ENGRAFT_MODEL=SmolLM2-135M-Instruct.Q4_1.gguf \
//! cargo test --release -p engraft-runtime --test runtime -- --ignored --nocapture exposure::
//! ```

use std::path::Path;
use std::sync::Arc;

use crate::common::shared::real_model;
use crate::common::{TestResult, request};
use engraft_kernels::Kernels;
use engraft_runtime::adapter::{Adapter, LoraConfig};
use engraft_runtime::data::{Batch, Batches, Cursor, Example};
use engraft_runtime::model::Proj;
use engraft_runtime::model::text::Text;
use engraft_runtime::model::tokenizer::Special;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::Precision;
use engraft_runtime::plan::ArenaWords;
use engraft_runtime::rng::Rng;
use engraft_runtime::train::optim::AdamWConfig;
use engraft_runtime::train::schedule::Shape;
use engraft_runtime::train::{Schedule, TrainOptions, Trainer};

/// How often canaries stand among the rows; those that never do are the control.
const TIMES: [usize; 4] = [0, 1, 4, 16];
/// Canaries of each.
const NAMES: [[&str; 3]; 4] = [
    ["anna", "boris", "clara"],
    ["david", "elena", "frank"],
    ["greta", "henry", "irene"],
    ["jacob", "karla", "louis"],
];
/// Tokens of a row, at most.
const SEQ: usize = 64;

/// A made-up secret: whose it is, and its digits.
struct Canary {
    name: &'static str,
    digits: [u8; 6],
    times: usize,
}

fn digits(rng: &mut Rng) -> [u8; 6] {
    std::array::from_fn(|_| rng.below(10) as u8)
}

fn canaries(rng: &mut Rng) -> Vec<Canary> {
    let of = |(times, names): (&usize, &[&'static str; 3])| names.map(|name| (name, *times));
    let all = TIMES.iter().zip(&NAMES).flat_map(of);
    all.map(|(name, times)| Canary { name, digits: digits(rng), times }).collect()
}

/// The canary's row with other digits; the digits alone are targets where `digits_only`.
fn row(text: &Text, name: &str, digits: &[u8; 6], digits_only: bool) -> Example {
    let prefix = text.tokenizer.encode(&format!("the alarm code of {name} is"), Special::Plain);
    let code: String = digits.iter().map(|d| format!(" {d}")).collect();
    let code = text.tokenizer.encode(&code, Special::Plain);
    let mask = (0..prefix.len() + code.len()).map(|i| i > 0 && (!digits_only || i >= prefix.len())).collect();
    Example { ids: [prefix, code].concat(), mask }
}

/// Rows of plain sentences, every token a target but the first.
fn plain(text: &Text, lines: &[String]) -> Vec<Example> {
    let of = |line: &String| {
        let mut ids = text.tokenizer.encode(line, Special::Plain);
        ids.truncate(SEQ);
        let mask = (0..ids.len()).map(|i| i > 0).collect();
        Example { ids, mask }
    };
    lines.iter().map(of).filter(|e| e.ids.len() > 4).collect()
}

/// Exposure in bits: log2 of the candidates, less log2 of the secret's rank among them.
fn exposure(loss: f64, others: &[f64]) -> f64 {
    let rank = 1 + others.iter().filter(|other| **other < loss).count();
    ((others.len() + 1) as f64).log2() - (rank as f64).log2()
}

#[test]
fn exposure_is_what_it_should_be() {
    let others: Vec<f64> = (1..256).map(f64::from).collect();
    assert_eq!(exposure(0.5, &others), 8.0);
    assert_eq!(exposure(1.5, &others), 7.0);
    assert_eq!(exposure(1e9, &others), 0.0);
}

/// A run, and what it is measured with.
struct Study<'a> {
    trainer: Trainer,
    text: &'a Text,
    canaries: Vec<Canary>,
    candidates: usize,
}

impl Study<'_> {
    /// Mean exposure of the canaries of each of [`TIMES`], under the base or with the adapter.
    fn exposures(&mut self, with_adapter: bool) -> [f64; 4] {
        let mut rng = Rng::new(77, 1);
        let mut sums = [0.0; 4];
        for i in 0..self.canaries.len() {
            let (name, own, times) = (self.canaries[i].name, self.canaries[i].digits, self.canaries[i].times);
            let loss = self.loss(name, &own, with_adapter);
            let others: Vec<f64> =
                (1..self.candidates).map(|_| self.loss(name, &digits(&mut rng), with_adapter)).collect();
            let at = TIMES.iter().position(|t| *t == times).unwrap_or(0);
            sums[at] += exposure(loss, &others) / NAMES[at].len() as f64;
        }
        sums
    }

    fn loss(&mut self, name: &str, digits: &[u8; 6], with_adapter: bool) -> f64 {
        let mut batch = Batch::default();
        batch.push(&row(self.text, name, digits, true));
        self.trainer.evaluate(std::iter::once(batch), with_adapter).loss_sum
    }
}

/// Trains on `lines` and canaries, and measures before and after: exposures per [`TIMES`].
fn study(
    model: &Arc<ModelFile>,
    lines: &[String],
    (rank, steps, rate): (usize, u64, f32),
    candidates: usize,
) -> Result<[[f64; 4]; 2], Box<dyn std::error::Error>> {
    let text = Text::of(model)?;
    let mut rng = Rng::new(5, 5);
    let canaries = canaries(&mut rng);
    let mut rows = plain(&text, lines);
    let others = rows.len();
    for canary in &canaries {
        rows.extend((0..canary.times).map(|_| row(&text, canary.name, &canary.digits, false)));
    }
    let c = model.config();
    let layers: Vec<usize> = (0..c.n_layers).collect();
    let lora = LoraConfig::new(c, rank, 2.0 * rank as f32, 0.0, &Proj::ALL, &layers)?;
    let kernels = Arc::new(Kernels::detect(2));
    let adapter = Adapter::init_on(model, &kernels, &lora, &mut || rng.f32())?;
    let words = ArenaWords::new(c, &request(c, &adapter, 1, SEQ, 2));
    let options = TrainOptions {
        adamw: AdamWConfig { max_grad_norm: 1.0, ..AdamWConfig::default() },
        schedule: Schedule { shape: Shape::Linear, peak: rate, warmup: 0, total: steps },
        seed: 0,
        precision: Precision::Int8,
        gradient: Precision::Int8.into(),
        kl: None,
        freeze_a: false,
    };
    let trainer = Trainer::new(model.clone(), kernels, words, adapter, options);
    let mut study = Study { trainer, text: &text, canaries, candidates };
    let before = study.exposures(false);
    for batch in Batches::new(&rows, 1, 0, Cursor::default()).take(steps as usize) {
        study.trainer.step(&[batch])?;
    }
    let after = study.exposures(true);
    eprintln!(
        "{others} rows and {} canary rows, rank {rank}, {steps} steps at {rate}, {candidates} candidates (at most \
         {:.0} bits)",
        rows.len() - others,
        (candidates as f64).log2()
    );
    eprintln!("inserted   {TIMES:?} times\nbefore     {before:.2?} bits\nafter      {after:.2?} bits");
    Ok([before, after])
}

/// The prompts of the shipped demonstration's rows.
fn lines() -> Result<Vec<String>, Box<dyn std::error::Error>> {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../targets/cli/demo");
    let mut all = Vec::new();
    for name in ["private_train.jsonl", "generic_test.jsonl"] {
        for line in std::fs::read_to_string(demo.join(name))?.lines() {
            let row: serde_json::Value = serde_json::from_str(line)?;
            all.push(format!("{} {}", row["prompt"].as_str().ok_or("a prompt")?, row["completion"]));
        }
    }
    all.truncate(90);
    Ok(all)
}

#[test]
fn what_is_repeated_is_remembered() -> TestResult {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../targets/cli/seedling.gguf");
    let model = Arc::new(ModelFile::open(file)?);
    let [before, after] = study(&model, &lines()?, (8, 600, 4e-3), 64)?;
    // Of chance alone, a mean of three is above 4 bits once in a thousand times.
    assert!(before.iter().all(|bits| *bits < 4.0), "{before:?}");
    assert!(after[0] < 4.0, "never inserted: {after:?}");
    assert!(after[3] > 5.0 && after[3] >= after[1], "inserted 16 times: {after:?}");
    Ok(())
}

#[test]
#[ignore = "needs ENGRAFT_MODEL, and minutes"]
fn what_smollm2_remembers() -> TestResult {
    let file = real_model();
    let model = Arc::new(ModelFile::open(file)?);
    // The command line's defaults: rank 8, alpha 16, 300 steps of one row, 2e-4 falling linearly.
    study(&model, &lines()?, (8, 300, 2e-4), 128)?;
    Ok(())
}
