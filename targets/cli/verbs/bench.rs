//! `engraft bench`: what this machine does, in a few seconds: a training step, reading a prompt, and
//! generating. Outputs are compared with those of the scalar specification before anything is timed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::{Args, value_parser};
use engraft_kernels::{Isa, Kernels};
use engraft_runtime::adapter::{Adapter, LoraConfig};
use engraft_runtime::data::Batch;
use engraft_runtime::error::{Error, ErrorKind};
use engraft_runtime::generate::{KvType, Session as Sequence};
use engraft_runtime::model::Proj;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::Precision;
use engraft_runtime::plan::{ArenaWords, MemoryPlan, Request, keep, show_bytes};
use engraft_runtime::rng::Rng;
use engraft_runtime::train::optim::AdamWConfig;
use engraft_runtime::train::schedule::{Schedule, Shape};
use engraft_runtime::train::{TrainOptions, Trainer};

use super::{Session, common, demo};
use crate::json;
use crate::options::{ComputeOptions, ModelOptions};

/// Tokens of the training sequence and of the prompt, and tokens generated, at most.
const SEQ: usize = 256;
const DECODE: usize = 64;
/// Tokens of the shortest training sequence that tells anything.
const SEQ_MIN: usize = 16;
/// Rows that are verified.
const VERIFIED: usize = 4;
/// How far the loss of these rows may be from the scalar specification's: what rounding to int8 does.
const LOSS_BOUND: f64 = 2e-2;
/// Time that is given to each measure, and how often it is repeated at most.
const EACH: Duration = Duration::from_millis(2500);
const REPEATS: usize = 7;

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) model: ModelOptions,

    /// Private memory that the training step may plan
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = crate::units::parse_bytes)]
    pub(crate) memory_budget: u64,

    /// Rank of the adapter
    #[arg(long, value_name = "R", default_value_t = 8, value_parser = value_parser!(u32).range(1..=256))]
    pub(crate) rank: u32,

    #[command(flatten)]
    pub(crate) compute: ComputeOptions,
}

pub(crate) fn run(options: &Options, session: &Session) -> Result<()> {
    let model = match options.model.is_given() {
        true => common::open_model(&options.model)?,
        false => demo::built_in()?,
    };
    let kernels = common::kernels(&options.compute)?;
    let bench = Bench { options, session, model, kernels };
    let request = bench.fitting_request()?;
    bench.verify()?;
    let result = bench.measure(&request)?;
    json::line(&table(&result))?;
    if session.json {
        json::emit(&result)?;
    }
    Ok(())
}

fn table(r: &json::Bench) -> String {
    let mut text = format!(
        "{} on {} threads, {} of private memory planned\n",
        r.isa,
        r.threads,
        show_bytes(r.planned_private_bytes)
    );
    let line = |what: String, rate: f64| format!("{what:<34} {rate:>9.1} tokens/s\n");
    text += &line(format!("training step, 1 x {} tokens", r.train_tokens), r.train_tokens_per_s);
    text += &line(format!("prompt of {} tokens", r.prefill_tokens), r.prefill_tokens_per_s);
    text += &line(format!("{} generated tokens", r.decode_tokens), r.decode_tokens_per_s);
    text += "share of the training step:";
    for (name, share) in r.shares.iter().filter(|(_, share)| *share >= 0.001) {
        text += &format!("\n  {name:<32} {:>9.1} %", share * 100.0);
    }
    text
}

/// A model, and how to compute with it.
struct Bench<'a> {
    options: &'a Options,
    session: &'a Session,
    model: Arc<ModelFile>,
    kernels: Arc<Kernels>,
}

impl Bench<'_> {
    /// Compares the loss of a few rows with the scalar specification's in f32.
    fn verify(&self) -> Result<()> {
        let rows = VERIFIED.min(self.model.config().context_len);
        let batch = [self.batch(rows)];
        let scalar = Isa::available().find(|isa| isa.name() == "scalar").unwrap_or_else(Isa::detect);
        let request = self.request(rows);
        let loss = |kernels: &Arc<Kernels>, exact| -> Result<f64> {
            let e = self.trainer(kernels, &request, exact)?.evaluate(batch.iter().cloned(), true);
            Ok(e.loss_sum / e.targets as f64)
        };
        let specified = Arc::new(Kernels::with_isa(scalar, self.kernels.threads()));
        let (expected, found) = (loss(&specified, Some(Precision::F32))?, loss(&self.kernels, None)?);
        let error = (found - expected).abs() / expected;
        if error < LOSS_BOUND {
            return Ok(());
        }
        let isa = self.kernels.isa().name();
        let message =
            format!("the loss under {isa} is {found}, by the specification {expected}: report this");
        Err(Error::new(ErrorKind::NonFinite, message).into())
    }

    fn measure(&self, request: &Request) -> Result<json::Bench> {
        let planned = MemoryPlan::new(self.model.config(), request).private_bytes;
        let (train_rate, shares) = self.train(request)?;
        let (prompt, answer) = (self.prompt_tokens(), self.answer_tokens());
        let (prefill_rate, decode_rate) = self.generate(prompt, answer)?;
        Ok(json::Bench {
            isa: self.kernels.isa().name(),
            threads: self.kernels.threads(),
            train_tokens: request.seq,
            train_tokens_per_s: train_rate,
            planned_private_bytes: planned as u64,
            prefill_tokens: prompt,
            prefill_tokens_per_s: prefill_rate,
            decode_tokens: answer,
            decode_tokens_per_s: decode_rate,
            shares,
        })
    }

    fn answer_tokens(&self) -> usize {
        DECODE.min(self.model.config().context_len / 2)
    }

    fn prompt_tokens(&self) -> usize {
        SEQ.min(self.model.config().context_len - self.answer_tokens())
    }

    /// The longest sequence, in halves of 256, whose plan fits, with the most kept that fits too.
    ///
    /// # Errors
    /// `DoesNotFit` where the shortest does not.
    fn fitting_request(&self) -> Result<Request> {
        let c = self.model.config();
        let budget = usize::try_from(self.options.memory_budget).unwrap_or(usize::MAX);
        let needed = |seq: usize| MemoryPlan::new(c, &self.request(seq)).private_bytes;
        let mut seq = SEQ.min(c.context_len);
        while seq > SEQ_MIN && needed(seq) > budget {
            seq /= 2;
        }
        let least = needed(seq);
        if least > budget {
            let message = format!(
                "--memory-budget: a training step of {seq} tokens needs {} of private memory, the budget is {}; \
                 --memory-budget {}K fits",
                show_bytes(least as u64),
                show_bytes(budget as u64),
                least.div_ceil(1 << 10)
            );
            return Err(Error::new(ErrorKind::DoesNotFit, message).into());
        }
        let request = self.request(seq);
        Ok(Request { keep: keep::choose(c, &request, Default::default(), budget), ..request })
    }

    /// Random tokens, each the target of the one before.
    fn batch(&self, rows: usize) -> Batch {
        let mut rng = Rng::new(2, 2);
        let ids: Vec<u32> = (0..=rows).map(|_| rng.below(self.model.config().vocab as u64) as u32).collect();
        let all = 0..rows;
        Batch { targets: ids[1..].to_vec(), ids: ids[..rows].to_vec(), seqs: vec![all] }
    }

    fn lora(&self) -> Result<LoraConfig> {
        let (c, rank) = (self.model.config(), self.options.rank as usize);
        let layers: Vec<usize> = (0..c.n_layers).collect();
        Ok(LoraConfig::new(c, rank, 2.0 * rank as f32, 0.0, &Proj::ALL, &layers)?)
    }

    fn request(&self, seq: usize) -> Request {
        let (c, rank) = (self.model.config(), self.options.rank as usize);
        let params = self.lora().map_or(0, |l| engraft_runtime::adapter::Layout::new(c, &l).len());
        Request {
            batch: 1,
            seq,
            params,
            rank,
            kept_blocks: c.n_layers,
            threads: self.kernels.threads(),
            model_bytes: self.model.private_bytes(),
            mapped_bytes: self.model.mapped_bytes(),
            ..Request::default()
        }
    }

    fn trainer(&self, kernels: &Arc<Kernels>, r: &Request, exact: Option<Precision>) -> Result<Trainer> {
        let c = self.model.config();
        let mut random = Rng::new(1, super::INIT_STREAM);
        let adapter = Adapter::init(c, &self.lora()?, self.model.digest(), &mut || random.f32())?;
        let options = TrainOptions {
            adamw: AdamWConfig::default(),
            schedule: Schedule { shape: Shape::Constant, peak: 1e-4, warmup: 0, total: 100 },
            seed: 0,
            precision: exact.unwrap_or(common::precision(&self.options.compute)),
            gradient: exact.map_or(common::gradient(&self.options.compute), Into::into),
            kl: None,
        };
        let words = ArenaWords::new(c, r);
        Ok(Trainer::new(self.model.clone(), kernels.clone(), words, adapter, options))
    }

    /// Tokens per second of a step, and the share of each class of work in it.
    fn train(&self, request: &Request) -> Result<(f64, Vec<(String, f64)>)> {
        let mut trainer = self.trainer(&self.kernels, request, None)?;
        let batch = [self.batch(request.seq)];
        trainer.step(&batch)?;
        self.kernels.reset_profile();
        let started = Instant::now();
        let rate = self.median_rate(request.seq, || Ok(trainer.step(&batch).map(|_| ())?))?;
        let total = started.elapsed().as_nanos() as f64;
        let shares = self.kernels.profile().map(|(op, ns)| (format!("{op:?}"), ns as f64 / total)).collect();
        Ok((rate, shares))
    }

    /// Tokens per second of a prompt, and of tokens after it.
    fn generate(&self, prompt: usize, answer: usize) -> Result<(f64, f64)> {
        let precision = common::precision(&self.options.compute);
        let (model, kernels) = (self.model.clone(), self.kernels.clone());
        let mut sequence = Sequence::new(model, kernels, None, precision, prompt + answer, KvType::F16)?;
        let ids = self.batch(prompt).ids;
        sequence.feed(&ids)?;
        let prefill = self.median_rate(prompt, || {
            sequence.truncate(0);
            Ok(sequence.feed(&ids).map(|_| ())?)
        })?;
        let decode = self.median_rate(answer, || {
            sequence.truncate(prompt);
            for i in 0..answer {
                sequence.feed(&ids[i % prompt..][..1])?;
            }
            Ok(())
        })?;
        Ok((prefill, decode))
    }

    /// The median rate of a piece of work over `tokens`, repeated while time allows.
    fn median_rate(&self, tokens: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        let (started, mut rates) = (Instant::now(), Vec::with_capacity(REPEATS));
        while rates.is_empty() || (rates.len() < REPEATS && started.elapsed() < EACH) {
            if self.session.cancel.load(std::sync::atomic::Ordering::Relaxed) {
                return Err(common::cancelled("the bench was stopped").into());
            }
            let one = Instant::now();
            work()?;
            rates.push(tokens as f64 / one.elapsed().as_secs_f64());
        }
        rates.sort_by(f64::total_cmp);
        Ok(rates[rates.len() / 2])
    }
}
