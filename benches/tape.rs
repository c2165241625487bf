//! A tape of block operations, or a plain loop over one arena: which one should run a training step?
//!
//! Both sides call the same functions of `nn` on the same model, parameters and batch:
//!
//! * **loop** is the runtime's own [`Chain`]: blocks forward into saved slots, head with loss, blocks
//!   backward in reverse, gradients added to one flat vector.
//! * **tape** makes every transformer block one candle `CustomOp2` (x `[T, d]`, θ_l) → y and the head a
//!   `CustomOp1` x → loss; candle's autograd orders the backward pass and collects the gradients. The
//!   operations share one set of block buffers, so all that differs is what the tape itself costs.
//!
//! The bench fails unless loss and every gradient agree. What it decides: the loop is worth its hundred
//! lines only if the tape costs time, steady-state allocations or peak memory; a tape that cost none of
//! them would be the better choice, for it would allow other graphs than a chain.
//!
//! `cargo bench --bench tape -- MODEL.gguf [--seq 256] [--steps 5] [--threads 2]` prints one JSON line.
//! Memory and allocations are counted with each side alone in the process, the rates with both alive and
//! their steps interleaved, so that a busy machine slows both alike. A step ends with the gradients: the
//! optimizer, the same for both, is left out.

use std::alloc::{GlobalAlloc, Layout as MemLayout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_core::backprop::GradStore;
use candle_core::{self as candle, CpuStorage, CustomOp1, CustomOp2, Device, Shape, Storage, Tensor, Var};
use engraft_kernels::{Isa, Kernels};
use engraft_runtime::adapter::{Layout, LoraConfig};
use engraft_runtime::data::Batch;
use engraft_runtime::model::Proj;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::block::{self, BlockBufs, Keys};
use engraft_runtime::nn::head::{self, HeadBufs, HeadWeights};
use engraft_runtime::nn::keep::Keep;
use engraft_runtime::nn::{
    BlockPairGrads, BlockPairs, Ctx, Dropout, Pair, PairGrad, Precision, RowMap, rope,
};
use engraft_runtime::plan::{ArenaWords, Request};
use engraft_runtime::rng::Rng;
use engraft_runtime::train::chain::{AdapterView, Chain};

const RANK: usize = 8;
/// Largest difference of two gradients, relative to the largest gradient, that still counts as agreement.
const TOLERANCE: f32 = 1e-6;

fn main() -> Result<()> {
    let a = args()?;
    if a.model.is_empty() {
        println!("SKIPPED: name a GGUF model: cargo bench --bench tape -- MODEL.gguf");
        return Ok(());
    }
    let setup = Arc::new(Setup::new(&a)?);
    let plain = alone(|| LoopSide::new(&setup))?;
    let tape = alone(|| TapeSide::new(&setup))?;
    let agreement = Agreement::of(&plain.gradients, &tape.gradients);
    control(&plain.gradients)?;
    let (plain_rate, tape_rate) = rates(&setup, a.steps)?;
    println!(
        "{}",
        serde_json::json!({
            "model": setup.model.label(), "isa": Isa::detect().name(), "threads": setup.kernels.threads(),
            "seq": a.seq, "steps": a.steps, "rank": RANK, "precision": "int8",
            "loss_per_token": plain.loss / a.seq as f64,
            "loss_equal": plain.loss.to_bits() == tape.loss.to_bits(),
            "gradients": plain.gradients.len(), "gradients_equal": agreement.bits,
            "gradient_difference": agreement.relative,
            "loop": plain.json(plain_rate), "tape": tape.json(tape_rate),
            "tape_rate_of_loop": tape_rate / plain_rate,
        })
    );
    let loss = (plain.loss - tape.loss).abs() <= f64::from(TOLERANCE) * plain.loss.abs();
    ensure!(loss && agreement.relative <= TOLERANCE, "loop and tape disagree");
    Ok(())
}

struct Args {
    model: String,
    seq: usize,
    steps: usize,
    threads: usize,
}

fn args() -> Result<Args> {
    let mut a = Args { model: String::new(), seq: 256, steps: 5, threads: 2 };
    let mut words = std::env::args().skip(1).filter(|w| w != "--bench");
    while let Some(w) = words.next() {
        let mut value = || words.next().with_context(|| format!("{w} needs a value"));
        match w.as_str() {
            "--seq" => a.seq = value()?.parse()?,
            "--steps" => a.steps = value()?.parse()?,
            "--threads" => a.threads = value()?.parse()?,
            _ if w.starts_with("--") => bail!("unknown flag {w}"),
            _ => a.model = w,
        }
    }
    ensure!(a.seq > 0 && a.steps > 0 && a.threads > 0, "--seq, --steps and --threads start at 1");
    Ok(a)
}

/// What both sides are given.
struct Setup {
    model: Arc<ModelFile>,
    kernels: Arc<Kernels>,
    words: ArenaWords,
    layout: Layout,
    lora: LoraConfig,
    theta: Vec<f32>,
    batch: Batch,
}

impl Setup {
    fn new(a: &Args) -> Result<Setup> {
        let model = Arc::new(ModelFile::open(&a.model)?);
        let c = model.config();
        let lora = LoraConfig::new(c, RANK, 16.0, 0.0, &Proj::ALL, &(0..c.n_layers).collect::<Vec<_>>())?;
        let layout = Layout::new(c, &lora);
        let request = Request {
            batch: 1,
            seq: a.seq,
            params: layout.len(),
            rank: RANK,
            kept_blocks: c.n_layers,
            threads: a.threads,
            ..Request::default()
        };
        let mut rng = Rng::new(1, 1);
        // B too is not zero, as it would be at the start of a training: then A has a gradient.
        let theta = (0..layout.len()).map(|_| (rng.f32() - 0.5) * 0.02).collect();
        let vocab = c.vocab as u64;
        let mut ids = || (0..a.seq).map(|_| rng.below(vocab) as u32).collect();
        #[allow(clippy::single_range_in_vec_init, reason = "one sequence: the list of its row range")]
        let batch = Batch { ids: ids(), targets: ids(), seqs: vec![0..a.seq] };
        Ok(Setup {
            kernels: Arc::new(Kernels::with_isa(Isa::detect(), a.threads)),
            words: ArenaWords::new(c, &request),
            lora,
            layout,
            theta,
            batch,
            model,
        })
    }
}

/// One way to run a step.
trait Side {
    /// Sum of the cross-entropies, nats; leaves the gradients for [`Side::gradients`].
    fn step(&mut self) -> Result<f64>;
    /// The last step's gradients in the order of θ.
    fn gradients(&self) -> Result<Vec<f32>>;
}

/// The runtime's loop over slices of one arena.
struct LoopSide {
    setup: Arc<Setup>,
    chain: Chain,
    theta: Vec<f32>,
    grads: Vec<f32>,
}

impl LoopSide {
    fn new(setup: &Arc<Setup>) -> Result<LoopSide> {
        let s = setup.clone();
        let chain = Chain::new(s.model.clone(), s.kernels.clone(), Precision::Int8, s.words.clone());
        Ok(LoopSide { chain, theta: s.theta.clone(), grads: vec![0.0; s.theta.len()], setup: s })
    }
}

impl Side for LoopSide {
    fn step(&mut self) -> Result<f64> {
        let s = &*self.setup;
        let adapter = AdapterView { layout: &s.layout, theta: &self.theta, config: &s.lora, gains: &[] };
        self.grads.fill(0.0);
        Ok(self.chain.accumulate(adapter, &s.batch, Dropout::OFF, &mut self.grads).loss_sum)
    }

    fn gradients(&self) -> Result<Vec<f32>> {
        Ok(self.grads.clone())
    }
}

/// The chain on candle's tape; the operations are made once and used by every step.
struct TapeSide {
    shared: Arc<Shared>,
    thetas: Vec<Var>,
    blocks: Vec<Arc<Box<dyn CustomOp2 + Send + Sync>>>,
    head: Arc<Box<dyn CustomOp1 + Send + Sync>>,
    grads: Option<GradStore>,
}

impl TapeSide {
    fn new(setup: &Arc<Setup>) -> Result<TapeSide> {
        let shared = Arc::new(Shared::new(setup));
        let layers = setup.layout.layers();
        let theta = |l: &usize| {
            let block = setup.layout.block(*l).context("every layer is adapted")?;
            Ok(Var::from_slice(&setup.theta[block.clone()], block.len(), &Device::Cpu)?)
        };
        let op = |l: &usize| -> Arc<Box<dyn CustomOp2 + Send + Sync>> {
            Arc::new(Box::new(BlockOp { shared: shared.clone(), layer: *l }))
        };
        Ok(TapeSide {
            thetas: layers.iter().map(theta).collect::<Result<_>>()?,
            blocks: layers.iter().map(op).collect(),
            head: Arc::new(Box::new(HeadLossOp { shared: shared.clone(), dx: Mutex::new(None) })),
            grads: None,
            shared,
        })
    }

    /// The embedded batch, `[T, d]`.
    fn embedded(&self) -> Result<Tensor> {
        let s = &*self.shared.setup;
        let (t, d) = (s.batch.ids.len(), s.model.config().d_model);
        let embedding = s.model.token_embd();
        let mut x = vec![0.0; t * d];
        s.kernels.rows(d, &mut x, |r, row| {
            s.kernels.dequantize_row(&embedding, s.batch.ids[r] as usize, row);
        });
        Ok(Tensor::from_vec(x, (t, d), &Device::Cpu)?)
    }
}

impl Side for TapeSide {
    fn step(&mut self) -> Result<f64> {
        self.grads = None;
        let mut x = self.embedded()?;
        for (op, theta) in self.blocks.iter().zip(&self.thetas) {
            x = x.apply_op2_arc(theta, op.clone())?;
        }
        let loss = x.apply_op1_arc(self.head.clone())?;
        self.grads = Some(loss.backward()?);
        Ok(loss.to_scalar()?)
    }

    fn gradients(&self) -> Result<Vec<f32>> {
        let grads = self.grads.as_ref().context("no step was taken")?;
        let mut all = Vec::new();
        for theta in &self.thetas {
            all.extend(grads.get(theta).context("a block without gradient")?.to_vec1::<f32>()?);
        }
        Ok(all)
    }
}

/// What the operations of the tape share.
struct Shared {
    setup: Arc<Setup>,
    rope: Vec<f32>,
    pos: Vec<u32>,
    bufs: Mutex<(BlockBufs, HeadBufs)>,
}

impl Shared {
    fn new(setup: &Arc<Setup>) -> Shared {
        let w = &setup.words;
        let mut table = vec![0.0; w.rope];
        rope::table(setup.model.config(), setup.model.rope_freqs(), &mut table);
        Shared {
            rope: table,
            pos: (0..setup.batch.ids.len() as u32).collect(),
            bufs: Mutex::new((BlockBufs::new(&w.block, w.kernel), HeadBufs::new(&w.head))),
            setup: setup.clone(),
        }
    }

    fn ctx(&self) -> Ctx<'_> {
        Ctx::new(&self.setup.kernels, self.setup.model.config(), &self.rope, Precision::Int8)
    }

    fn rows(&self) -> RowMap<'_> {
        RowMap { seqs: &self.setup.batch.seqs, pos: &self.pos }
    }

    fn pairs<'a>(&self, layer: usize, theta: &'a [f32]) -> BlockPairs<'a> {
        Proj::ALL.map(|p| {
            let s = self.setup.layout.slot_in_block(layer, p)?;
            let (a, bt) = (&theta[s.a.clone()], &theta[s.b.clone()]);
            Some(Pair { a, bt, rank: s.rank, scale: self.setup.lora.scale_of(layer, p), gain: None })
        })
    }

    /// One block's gradient, cut into its pairs.
    fn pair_grads<'a>(&self, layer: usize, mut rest: &'a mut [f32]) -> BlockPairGrads<'a> {
        Proj::ALL.map(|p| {
            let s = self.setup.layout.slot_in_block(layer, p)?;
            let (a, tail) = std::mem::take(&mut rest).split_at_mut(s.a.len());
            let (bt, tail) = tail.split_at_mut(s.b.len());
            rest = tail;
            Some(PairGrad { a, bt, m: &mut [], w: None })
        })
    }
}

/// y = block(x; θ_l).
struct BlockOp {
    shared: Arc<Shared>,
    layer: usize,
}

impl CustomOp2 for BlockOp {
    fn name(&self) -> &'static str {
        "block"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &candle::Layout,
        theta: &CpuStorage,
        theta_layout: &candle::Layout,
    ) -> candle::Result<(CpuStorage, Shape)> {
        let s = &*self.shared;
        let (x, theta) = (values(x, x_layout)?, values(theta, theta_layout)?);
        let mut y = vec![0.0; x.len()];
        block::forward(
            &s.ctx(),
            &s.setup.model.block(self.layer),
            &s.pairs(self.layer, theta),
            s.rows(),
            x,
            &mut y,
            &mut lock(&s.bufs)?.0,
            Keys::Batch,
            Dropout::OFF,
        );
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        theta: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle::Result<(Option<Tensor>, Option<Tensor>)> {
        let s = &*self.shared;
        let (storage, layout) = dy.storage_and_layout();
        let mut dx = cpu_values(&storage, layout)?.to_vec();
        drop(storage);
        let mut dtheta = vec![0.0; theta.elem_count()];
        // As in the loop, nothing below the first block needs a gradient.
        let want_dx = self.layer > 0;
        let (x_storage, x_layout) = x.storage_and_layout();
        let (theta_storage, theta_layout) = theta.storage_and_layout();
        block::backward(
            &s.ctx(),
            &s.setup.model.block(self.layer),
            &s.pairs(self.layer, cpu_values(&theta_storage, theta_layout)?),
            s.pair_grads(self.layer, &mut dtheta),
            s.rows(),
            // A LoRA's backward does not read the block's output.
            (cpu_values(&x_storage, x_layout)?, &[]),
            &mut dx,
            &mut lock(&s.bufs)?.0,
            Keep::Inputs,
            Dropout::OFF,
            want_dx,
        );
        let dx = want_dx.then(|| Tensor::from_vec(dx, x.shape(), &Device::Cpu)).transpose()?;
        Ok((dx, Some(Tensor::from_vec(dtheta, theta.shape(), &Device::Cpu)?)))
    }
}

/// The summed cross-entropy of x, in f64 as the loop has it. The head computes its gradient along with
/// the loss, so the forward leaves it here for the backward: recomputing it would double the head.
struct HeadLossOp {
    shared: Arc<Shared>,
    dx: Mutex<Option<Vec<f32>>>,
}

impl CustomOp1 for HeadLossOp {
    fn name(&self) -> &'static str {
        "head_loss"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &candle::Layout) -> candle::Result<(CpuStorage, Shape)> {
        let s = &*self.shared;
        let x = values(x, layout)?;
        let mut dx = vec![0.0; x.len()];
        let w = HeadWeights { norm: s.setup.model.output_norm(), w: s.setup.model.output() };
        let (block, head) = &mut *lock(&s.bufs)?;
        let targets = &s.setup.batch.targets;
        let (loss, _) =
            head::loss(&s.ctx(), &w, x, targets, Some(&mut dx), head, &mut block.kernel, |_, _| {});
        *lock(&self.dx)? = Some(dx);
        Ok((CpuStorage::F64(vec![loss]), Shape::from(())))
    }

    fn bwd(&self, x: &Tensor, _loss: &Tensor, dloss: &Tensor) -> candle::Result<Option<Tensor>> {
        let Some(mut dx) = lock(&self.dx)?.take() else { candle::bail!("one backward per forward") };
        let dloss = dloss.to_scalar::<f64>()? as f32;
        if dloss != 1.0 {
            dx.iter_mut().for_each(|v| *v *= dloss);
        }
        Tensor::from_vec(dx, x.shape(), &Device::Cpu).map(Some)
    }
}

fn lock<T>(m: &Mutex<T>) -> candle::Result<MutexGuard<'_, T>> {
    m.lock().map_err(|_| candle::Error::msg("an operation panicked while it held the buffers"))
}

fn values<'a>(storage: &'a CpuStorage, layout: &candle::Layout) -> candle::Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else { candle::bail!("a strided operand") };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

fn cpu_values<'a>(storage: &'a Storage, layout: &candle::Layout) -> candle::Result<&'a [f32]> {
    let Storage::Cpu(storage) = storage else { candle::bail!("an operand that is not on the CPU") };
    values(storage, layout)
}

/// What a side shows when it is alone in the process.
struct Alone {
    loss: f64,
    gradients: Vec<f32>,
    /// Of the second step.
    allocations: usize,
    /// Of the second step, summed over its allocations.
    bytes: usize,
    /// Largest live heap of construction and two steps, above what was there before.
    peak: usize,
}

impl Alone {
    fn json(&self, rate: f64) -> serde_json::Value {
        serde_json::json!({
            "tokens_per_s": rate, "allocations_per_step": self.allocations,
            "allocated_bytes_per_step": self.bytes, "peak_bytes": self.peak,
        })
    }
}

fn alone<S: Side>(build: impl FnOnce() -> Result<S>) -> Result<Alone> {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let mut side = build()?;
    side.step()?;
    let (allocations, bytes) = (ALLOCATIONS.load(Relaxed), BYTES.load(Relaxed));
    let loss = side.step()?;
    Ok(Alone {
        loss,
        allocations: ALLOCATIONS.load(Relaxed) - allocations,
        bytes: BYTES.load(Relaxed) - bytes,
        peak: PEAK.load(Relaxed) - before,
        gradients: side.gradients()?,
    })
}

/// Tokens per second of loop and tape: medians of `steps` interleaved steps, after one of each.
fn rates(setup: &Arc<Setup>, steps: usize) -> Result<(f64, f64)> {
    let (mut plain, mut tape) = (LoopSide::new(setup)?, TapeSide::new(setup)?);
    plain.step()?;
    tape.step()?;
    let timed = |side: &mut dyn Side| -> Result<f64> {
        let start = Instant::now();
        side.step()?;
        Ok(setup.batch.ids.len() as f64 / start.elapsed().as_secs_f64())
    };
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for _ in 0..steps {
        a.push(timed(&mut plain)?);
        b.push(timed(&mut tape)?);
    }
    Ok((median(a), median(b)))
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

/// How far two gradients agree.
struct Agreement {
    /// To the bit.
    bits: bool,
    /// Largest difference over the largest value; infinite where lengths differ or a value is not finite.
    relative: f32,
}

impl Agreement {
    fn of(a: &[f32], b: &[f32]) -> Agreement {
        if a.len() != b.len() || a.iter().chain(b).any(|v| !v.is_finite()) {
            return Agreement { bits: false, relative: f32::INFINITY };
        }
        let largest = a.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let difference = a.iter().zip(b).fold(0.0f32, |m, (x, y)| m.max((x - y).abs()));
        Agreement {
            bits: a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits()),
            relative: difference / largest.max(f32::MIN_POSITIVE),
        }
    }
}

/// Agreement means something only if the gradients are not all zero and one changed value is noticed.
fn control(gradients: &[f32]) -> Result<()> {
    let zeros = gradients.iter().filter(|v| **v == 0.0).count();
    ensure!(zeros * 2 < gradients.len(), "{zeros} of {} gradients are zero", gradients.len());
    let mut changed = gradients.to_vec();
    let largest = changed.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let last = changed.last_mut().context("no gradients")?;
    *last += 1e-3 * largest;
    let seen = Agreement::of(gradients, &changed);
    ensure!(!seen.bits && seen.relative > TOLERANCE, "the comparison misses a changed gradient");
    Ok(())
}

/// The system's allocator with counters, those of the kernels' threads included.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static HEAP: Counting = Counting;

impl Counting {
    fn took(p: *mut u8, size: usize) -> *mut u8 {
        if !p.is_null() {
            ALLOCATIONS.fetch_add(1, Relaxed);
            BYTES.fetch_add(size, Relaxed);
            PEAK.fetch_max(LIVE.fetch_add(size, Relaxed) + size, Relaxed);
        }
        p
    }
}

// SAFETY: every call goes to the system's allocator with the caller's own arguments and its answer is
// returned as it is; the counters are atomics, which neither allocate nor unwind.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: MemLayout) -> *mut u8 {
        // SAFETY: the caller keeps `alloc`'s contract, which is the system's own.
        Self::took(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: MemLayout) -> *mut u8 {
        // SAFETY: the caller keeps `alloc_zeroed`'s contract, which is the system's own.
        Self::took(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: MemLayout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `p` came from the system's allocator through this one, with this layout.
        unsafe { System.dealloc(p, layout) }
    }

    unsafe fn realloc(&self, p: *mut u8, layout: MemLayout, size: usize) -> *mut u8 {
        // SAFETY: `p` came from the system's allocator through this one, with this layout, and the caller
        // keeps `realloc`'s contract on `size`.
        let new = Self::took(unsafe { System.realloc(p, layout, size) }, size);
        if !new.is_null() {
            LIVE.fetch_sub(layout.size(), Relaxed);
        }
        new
    }
}
