//! Tokens per second of a training step, and the share of each operation.
//!
//! `cargo bench --bench step -- MODEL.gguf [--seq 256] [--batch 1] [--threads 2] [--isa NAME]
//! [--steps 8] [--fine-tune-type lora|dora|full] [--max-grad-norm 1] [--precision int8|f32]
//! [--gradient-precision int8|bf16|f32] [--keep inputs|attention|all|N]
//! [--keep-precision f32|bf16]` prints one JSON line: the planned memory, every step's rate, their
//! median, and the shares of the time. `--keep N` is the best pattern within N bytes of planned memory.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use engraft_kernels::{Isa, Kernels};
use engraft_runtime::adapter::{Adapter, LoraConfig};
use engraft_runtime::data::Batch;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::model::{ModelConfig, Proj};
use engraft_runtime::nn::keep::{Keep, KeepPrecision};
use engraft_runtime::nn::{GradientPrecision, Precision};
use engraft_runtime::plan::{ArenaWords, FullUpdate, KeepPlan, MemoryPlan, Request, keep};
use engraft_runtime::rng::Rng;
use engraft_runtime::train::optim::AdamWConfig;
use engraft_runtime::train::schedule::{Schedule, Shape};
use engraft_runtime::train::{FullTrainer, StepReport, TrainOptions, Trainer};

struct Args {
    model: String,
    seq: usize,
    batch: usize,
    threads: usize,
    isa: Isa,
    steps: usize,
    precision: Precision,
    gradient: GradientPrecision,
    kind: String,
    max_grad_norm: f32,
    keep: String,
    keep_precision: KeepPrecision,
}

fn args() -> Result<Args> {
    let mut a = Args {
        model: String::new(),
        seq: 256,
        batch: 1,
        threads: 2,
        isa: Isa::detect(),
        steps: 8,
        precision: Precision::Int8,
        gradient: GradientPrecision::Int8,
        kind: "lora".into(),
        max_grad_norm: 1.0,
        keep: "inputs".into(),
        keep_precision: KeepPrecision::F32,
    };
    let mut words = std::env::args().skip(1).filter(|w| w != "--bench");
    while let Some(w) = words.next() {
        let mut value = || words.next().with_context(|| format!("{w} needs a value"));
        match w.as_str() {
            "--seq" => a.seq = value()?.parse()?,
            "--batch" => a.batch = value()?.parse()?,
            "--threads" => a.threads = value()?.parse()?,
            "--steps" => a.steps = value()?.parse()?,
            "--isa" => a.isa = Isa::from_name(&value()?).context("this CPU lacks that ISA")?,
            "--precision" => {
                a.precision = if value()? == "f32" { Precision::F32 } else { Precision::Int8 };
            }
            "--gradient-precision" => {
                a.gradient = match value()?.as_str() {
                    "f32" => GradientPrecision::F32,
                    "bf16" => GradientPrecision::Bf16,
                    _ => GradientPrecision::Int8,
                };
            }
            "--fine-tune-type" => a.kind = value()?,
            "--max-grad-norm" => a.max_grad_norm = value()?.parse()?,
            "--keep" => a.keep = value()?,
            "--keep-precision" => {
                let bf16 = value()? == "bf16";
                a.keep_precision = if bf16 { KeepPrecision::Bf16 } else { KeepPrecision::F32 };
            }
            _ if w.starts_with("--") => bail!("unknown flag {w}"),
            _ => a.model = w,
        }
    }
    Ok(a)
}

/// The pattern given by `--keep`.
fn pattern(a: &Args, c: &ModelConfig, r: &Request) -> Result<KeepPlan> {
    let uniform = |level| KeepPlan::uniform(level, a.keep_precision, r.kept_blocks);
    Ok(match a.keep.as_str() {
        "inputs" => uniform(Keep::Inputs),
        "attention" => uniform(Keep::Attention),
        "all" => uniform(Keep::All),
        bytes => keep::choose(c, r, a.keep_precision, bytes.parse()?),
    })
}

/// What is trained.
enum Arm {
    Adapter(Box<Trainer>),
    Full(Box<FullTrainer>),
}

impl Arm {
    fn step(&mut self, batch: &[Batch]) -> engraft_runtime::Result<StepReport> {
        match self {
            Arm::Adapter(trainer) => trainer.step(batch),
            Arm::Full(trainer) => trainer.step(batch),
        }
    }
}

fn options(a: &Args) -> TrainOptions {
    TrainOptions {
        adamw: AdamWConfig { max_grad_norm: a.max_grad_norm, ..AdamWConfig::default() },
        schedule: Schedule { shape: Shape::Constant, peak: 1e-4, warmup: 0, total: 100 },
        seed: 0,
        precision: a.precision,
        gradient: a.gradient,
        kl: None,
        freeze_a: false,
    }
}

/// Full fine-tuning of every weight, as [`trainer`].
fn full_trainer(a: &Args, kernels: &Arc<Kernels>) -> Result<(Arm, usize, String, u64)> {
    let model = Arc::new(ModelFile::open(&a.model)?);
    let c = model.config();
    let full = if a.max_grad_norm > 0.0 { FullUpdate::AtEnd } else { FullUpdate::AtOnce };
    let mut request = Request {
        batch: a.batch,
        seq: a.seq,
        full: Some(full),
        kept_blocks: c.n_layers,
        threads: a.threads,
        model_bytes: model.private_bytes(),
        ..Request::default()
    };
    request.keep = pattern(a, c, &request)?;
    let (planned, kept) = (MemoryPlan::new(c, &request).private_bytes, request.keep.describe(c.n_layers));
    let (words, ids) = (ArenaWords::new(c, &request), c.vocab.min(40_000) as u64);
    let trainer = FullTrainer::new(model, kernels.clone(), words, options(a));
    Ok((Arm::Full(Box::new(trainer)), planned, kept, ids))
}

/// The trainer, its planned bytes, what it keeps, and how many token ids the bench may draw.
fn trainer(a: &Args, kernels: &Arc<Kernels>) -> Result<(Arm, usize, String, u64)> {
    if a.kind == "full" {
        return full_trainer(a, kernels);
    }
    let model = Arc::new(ModelFile::open(&a.model)?);
    let c = model.config();
    let lora = LoraConfig::new(c, 8, 16.0, 0.0, &Proj::ALL, &(0..c.n_layers).collect::<Vec<_>>())?;
    let lora = LoraConfig { dora: a.kind == "dora", ..lora };
    let mut rng = Rng::new(1, 1);
    let adapter = Adapter::init_on(&model, kernels, &lora, &mut || rng.f32())?;
    let mut request = Request {
        batch: a.batch,
        seq: a.seq,
        params: adapter.theta.len(),
        gain_words: adapter.layout.gain_words(),
        rank: 8,
        kept_blocks: c.n_layers,
        threads: a.threads,
        model_bytes: model.private_bytes(),
        ..Request::default()
    };
    request.keep = pattern(a, c, &request)?;
    let planned = MemoryPlan::new(c, &request).private_bytes;
    let kept = request.keep.describe(c.n_layers);
    let words = ArenaWords::new(c, &request);
    let ids = c.vocab.min(40_000) as u64;
    let trainer = Trainer::new(model, kernels.clone(), words, adapter, options(a));
    Ok((Arm::Adapter(Box::new(trainer)), planned, kept, ids))
}

/// The largest resident size of this process, mapped files included; `None` if the system can't tell.
fn peak_rss_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()? / 1024.0)
}

fn main() -> Result<()> {
    let a = args()?;
    if a.model.is_empty() {
        println!("SKIPPED: name a GGUF model: cargo bench --bench step -- MODEL.gguf");
        return Ok(());
    }
    let kernels = Arc::new(Kernels::with_isa(a.isa, a.threads));
    let (mut trainer, planned, kept, below) = trainer(&a, &kernels)?;
    let mut rng = Rng::new(2, 2);
    let n = a.batch * a.seq;
    let ids: Vec<u32> = (0..n).map(|_| rng.below(below) as u32).collect();
    let targets = (0..n).map(|_| rng.below(below) as u32).collect();
    let seqs = (0..a.batch).map(|b| b * a.seq..(b + 1) * a.seq).collect();
    let batch = [Batch { ids, targets, seqs }];
    trainer.step(&batch)?;
    kernels.reset_profile();
    let start = Instant::now();
    let mut rates = Vec::new();
    for _ in 0..a.steps {
        let step = Instant::now();
        trainer.step(&batch)?;
        rates.push(n as f64 / step.elapsed().as_secs_f64());
    }
    let total = start.elapsed().as_nanos() as f64;
    let mut sorted = rates.clone();
    sorted.sort_by(f64::total_cmp);
    let shares: serde_json::Map<_, _> =
        kernels.profile().map(|(op, ns)| (format!("{op:?}"), (ns as f64 / total).into())).collect();
    println!(
        "{}",
        serde_json::json!({
            "adapter": a.kind, "isa": a.isa.name(), "threads": kernels.threads(), "seq": a.seq, "batch": a.batch,
            "precision": format!("{:?}", a.precision), "keep": kept,
            "keep_precision": a.keep_precision.to_string(), "planned_private_bytes": planned,
            "tokens_per_s": sorted[sorted.len() / 2],
            "peak_rss_mib": peak_rss_mib(), "best": sorted.last(), "all": rates, "shares": shares,
        })
    );
    Ok(())
}
