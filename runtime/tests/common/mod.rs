//! What the proofs of the training core share: small random models, and the shared models' files.
#![allow(dead_code, reason = "each test program uses its own part")]

pub mod models;
pub mod referee;
pub mod shared;
pub mod writer;

use std::sync::Arc;

use engraft_kernels::Kernels;
use engraft_runtime::adapter::{Adapter, LoraConfig};
use engraft_runtime::data::{Batch, Example};
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::model::{ModelConfig, Proj};
use engraft_runtime::nn::Precision;
use engraft_runtime::plan::{ArenaWords, Request};
use engraft_runtime::rng::Rng;
use engraft_runtime::train::Chain;

pub type TestResult<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// A fresh adapter whose B is noise, not zero, so that every gradient is alive from the first step.
pub fn adapter(model: &ModelFile, rank: usize, targets: &[Proj], layers: &[usize], dropout: f32) -> Adapter {
    let c = model.config();
    let config =
        LoraConfig::new(c, rank, 2.0 * rank as f32, dropout, targets, layers).expect("a valid setting");
    adapter_of(model, &config)
}

/// The same of any settings; magnitudes are noise around the base's.
pub fn adapter_of(model: &ModelFile, config: &LoraConfig) -> Adapter {
    let mut rng = Rng::new(11, 1);
    let mut adapter = Adapter::init_on(model, &Kernels::detect(1), config, &mut || rng.f32())
        .expect("an adapter of the model");
    let slots: Vec<_> = adapter.layout.slots().collect();
    for (_, _, slot) in slots {
        adapter.theta[slot.b].iter_mut().for_each(|b| *b = 0.05 * rng.normal());
        adapter.theta[slot.m].iter_mut().for_each(|m| *m *= 1.0 + 0.1 * rng.normal());
    }
    adapter
}

/// A batch of random sequences with these numbers of rows; about a third of the rows carry no target,
/// and where there are several sequences, none of the second one does.
pub fn batch(c: &ModelConfig, rows: &[usize], rng: &mut Rng) -> Batch {
    let mut batch = Batch::default();
    for (i, &rows) in rows.iter().enumerate() {
        let ids = (0..=rows).map(|_| rng.below(c.vocab as u64) as u32).collect();
        let mask = (0..=rows).map(|p| p > 0 && i != 1 && (p == rows || rng.below(3) > 0)).collect();
        batch.push(&Example { ids, mask });
    }
    batch
}

/// What training of `adapter` asks of memory.
pub fn request(c: &ModelConfig, adapter: &Adapter, batch: usize, seq: usize, threads: usize) -> Request {
    Request {
        batch,
        seq,
        params: adapter.theta.len(),
        gain_words: adapter.layout.gain_words(),
        rank: adapter.layout.rank_max(),
        kept_blocks: c.n_layers - adapter.layout.layers()[0],
        threads,
        dropout: adapter.config.dropout > 0.0,
        ..Request::default()
    }
}

/// A chain for a tuned model beside its base, one sequence at a time, with adapters of rank 4 at most.
pub fn comparing_chain(
    model: &Arc<ModelFile>,
    kernels: &Arc<Kernels>,
    precision: Precision,
    seq: usize,
) -> Chain {
    let threads = kernels.threads();
    let request = Request { beside_base: true, batch: 1, seq, rank: 4, threads, ..Request::default() };
    let words = ArenaWords::new(model.config(), &request);
    Chain::new(model.clone(), kernels.clone(), precision, words)
}
