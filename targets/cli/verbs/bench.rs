//! `engraft bench`: measures in a few seconds how fast this machine trains, reads a prompt and generates.
//! Before timing anything, it compares results with the scalar specification.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::{Args, value_parser};
use engraft_kernels::{Isa, Kernels, Op};
use engraft_runtime::adapter::LoraConfig;
use engraft_runtime::bytes;
use engraft_runtime::data::Batch;
use engraft_runtime::error::{Error, ErrorKind};
use engraft_runtime::generate::{KvType, Sequence};
use engraft_runtime::model::Proj;
use engraft_runtime::nn::Precision;
use engraft_runtime::plan::Request;
use engraft_runtime::rng::Rng;
use engraft_runtime::run::setup::trainer_at;
use engraft_runtime::run::{
    Base, Extent, Limit, Method, Nobody, Planned, RunRows, Setting, Settings, settings,
};
use engraft_runtime::train::AnyTrainer;

use super::{Invocation, common, demo};
use crate::json;
use crate::options::{ComputeOptions, OptionalModelOptions};

/// Maximum tokens of the training sequence and the prompt, and of the answer.
const SEQ: usize = 256;
const DECODE: usize = 64;
/// Tokens of the shortest training sequence that gives a useful figure.
const SEQ_MIN: usize = 16;
/// Rows to verify.
const VERIFIED: usize = 4;
/// Relative error of the loss that rounding to int8 explains, compared with the scalar specification.
const LOSS_BOUND: f64 = 2e-2;
/// A learning rate that changes little.
const RATE: f64 = 1e-4;
/// Time for each measurement, and its maximum number of repeats.
const EACH: Duration = Duration::from_millis(2500);
const REPEATS: usize = 7;

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) model: OptionalModelOptions,

    /// Private memory that the training step may use
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = crate::units::parse_bytes)]
    pub(crate) memory_budget: u64,

    /// Rank of the adapter
    #[arg(long, value_name = "R", default_value_t = settings::RANK as u32, value_parser = value_parser!(u32).range(1..=256))]
    pub(crate) rank: u32,

    #[command(flatten)]
    pub(crate) compute: ComputeOptions,
}

pub(crate) fn run(options: &Options, invocation: &Invocation) -> Result<()> {
    let model = options.model.given().map_or_else(demo::built_in, |model| model.open())?;
    let base = options.compute.base(model, 0)?;
    let bench = Bench { options, invocation, settings: settings(&base, options.rank as usize)?, base };
    let planned = bench.fitting()?;
    bench.verify()?;
    let result = bench.measure(&planned)?;
    json::line(&table(&result))?;
    invocation.emit(&result)
}

fn table(r: &json::Bench) -> String {
    let mut text = format!(
        "{} on {} threads, {} of private memory planned\n",
        r.isa,
        r.threads,
        bytes::show(r.planned_private_bytes)
    );
    let line = |what: String, rate: f64| format!("{what:<34} {rate:>9.1} tokens/s\n");
    text += &line(format!("training step, 1 x {} tokens", r.train_tokens), r.train_tokens_per_s);
    text += &line(format!("prompt of {} tokens", r.prefill_tokens), r.prefill_tokens_per_s);
    text += &line(format!("{} generated tokens", r.decode_tokens), r.decode_tokens_per_s);
    text += "share of the training step:";
    // In this order, with names for machines.
    let shares = Op::ALL.iter().zip(&r.shares).map(|(op, (_, share))| (op.words(), share));
    for (words, share) in shares.filter(|(_, share)| **share >= 0.001) {
        text += &format!("\n  {words:<32} {:>9.1} %", share * 100.0);
    }
    text
}

/// Settings of the training step.
fn settings(base: &Base, rank: usize) -> Result<Settings> {
    let c = base.model.config();
    let layers: Vec<usize> = (0..c.n_layers).collect();
    let lora = LoraConfig::new(c, rank, settings::SCALE * rank as f32, 0.0, &Proj::ALL, &layers)?;
    Ok(Settings { seed: 1, ..Settings::new(Method::Adapter(lora)) })
}

/// The model, how to compute with it, and what to train.
struct Bench<'a> {
    options: &'a Options,
    invocation: &'a Invocation,
    settings: Settings,
    base: Base,
}

impl Bench<'_> {
    /// Compares the loss of a few rows with that of the scalar specification in f32.
    fn verify(&self) -> Result<()> {
        let rows = VERIFIED.min(self.base.model.config().context_len);
        let batch = [self.batch(rows)];
        let request = self.planned(rows, &Limit::default()).request;
        let loss = |base: &Base| -> Result<f64> {
            let e = self.trainer(base, &request)?.evaluate(batch.iter().cloned());
            Ok(e.loss_sum / e.targets as f64)
        };
        let specified = Base {
            kernels: Arc::new(Kernels::with_isa(Isa::SCALAR, self.base.kernels.threads())),
            precision: Precision::F32,
            gradient: Precision::F32.into(),
            ..self.base.clone()
        };
        let (expected, found) = (loss(&specified)?, loss(&self.base)?);
        let error = (found - expected).abs() / expected;
        if error < LOSS_BOUND {
            return Ok(());
        }
        let isa = self.base.kernels.isa().name();
        let message = format!(
            "{isa} computes wrongly here: the loss is {found} instead of {expected}; please report this"
        );
        Err(Error::new(ErrorKind::NonFinite, message).into())
    }

    fn measure(&self, planned: &Planned) -> Result<json::Bench> {
        let (train_rate, shares) = self.train(&planned.request)?;
        let (prompt, answer) = (self.prompt_tokens(), self.answer_tokens());
        let (prefill_rate, decode_rate) = self.generate(prompt, answer)?;
        Ok(json::Bench {
            isa: self.base.kernels.isa().name(),
            threads: self.base.kernels.threads(),
            train_tokens: planned.request.seq,
            train_tokens_per_s: train_rate,
            planned_private_bytes: planned.plan.private_bytes as u64,
            prefill_tokens: prompt,
            prefill_tokens_per_s: prefill_rate,
            decode_tokens: answer,
            decode_tokens_per_s: decode_rate,
            shares,
        })
    }

    fn answer_tokens(&self) -> usize {
        DECODE.min(self.base.model.config().context_len / 2)
    }

    fn prompt_tokens(&self) -> usize {
        SEQ.min(self.base.model.config().context_len - self.answer_tokens())
    }

    /// The plan for the longest sequence that fits, halving from 256, which keeps as much as fits.
    ///
    /// # Errors
    /// `DoesNotFit` if the shortest sequence doesn't fit.
    fn fitting(&self) -> Result<Planned> {
        let budget = self.options.memory_budget;
        let limit = Limit { budget: Some(budget), room: None };
        let mut seq = SEQ.min(self.base.model.config().context_len);
        loop {
            let planned = self.planned(seq, &limit);
            let least = planned.plan.private_bytes as u64;
            if least <= budget {
                return Ok(planned);
            }
            if seq <= SEQ_MIN {
                let message = format!(
                    "--memory-budget: a training step of {seq} tokens needs {} of private memory, but the budget is \
                     {}; --memory-budget {}K fits",
                    bytes::show(least),
                    bytes::show(budget),
                    least.div_ceil(1 << 10)
                );
                return Err(Error::new(ErrorKind::DoesNotFit, message).into());
            }
            seq /= 2;
        }
    }

    fn planned(&self, seq: usize, limit: &Limit) -> Planned {
        let setting = Setting {
            model: &self.base.model,
            threads: self.base.kernels.threads(),
            extent: Extent::unknown(seq),
            sampled: None,
            rows: RunRows::default(),
            tokenizer_bytes: 0,
            held_bytes: 0,
        };
        Planned::new(&self.settings, &setting, limit)
    }

    /// Random tokens, each the target of the previous one.
    fn batch(&self, rows: usize) -> Batch {
        let mut rng = Rng::new(2, 2);
        let ids: Vec<u32> =
            (0..=rows).map(|_| rng.below(self.base.model.config().vocab as u64) as u32).collect();
        let all = 0..rows;
        Batch { targets: ids[1..].to_vec(), ids: ids[..rows].to_vec(), seqs: vec![all] }
    }

    fn trainer(&self, base: &Base, request: &Request) -> Result<AnyTrainer> {
        Ok(trainer_at(base, &self.settings, request, RunRows::default(), RATE, ("bench", &mut Nobody))?)
    }

    /// Tokens per second of a training step, and the share of each kind of work.
    fn train(&self, request: &Request) -> Result<(f64, Vec<(String, f64)>)> {
        let mut trainer = self.trainer(&self.base, request)?;
        let batch = [self.batch(request.seq)];
        trainer.step(&batch)?;
        self.base.kernels.reset_profile();
        let started = Instant::now();
        let rate = self.median_rate(request.seq, || Ok(trainer.step(&batch).map(|_| ())?))?;
        let total = started.elapsed().as_nanos() as f64;
        let shares =
            self.base.kernels.profile().map(|(op, ns)| (format!("{op:?}"), ns as f64 / total)).collect();
        Ok((rate, shares))
    }

    /// Tokens per second of reading a prompt, and of generating after it.
    fn generate(&self, prompt: usize, answer: usize) -> Result<(f64, f64)> {
        let precision = self.options.compute.precision;
        let (model, kernels) = (self.base.model.clone(), self.base.kernels.clone());
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

    /// The median rate of some work on `tokens` tokens, repeated while time allows.
    fn median_rate(&self, tokens: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        let (started, mut rates) = (Instant::now(), Vec::with_capacity(REPEATS));
        while rates.is_empty() || (rates.len() < REPEATS && started.elapsed() < EACH) {
            if self.invocation.is_cancelled() {
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
