//! GFLOP/s of the matrix products per element type, ISA and number of rows, beside the gemm crate, candle's
//! QMatMul and what the machine can do at best.
//!
//! `cargo bench --bench kernels -- [--threads 1] [--isa NAME] [--type Q4_1] [--m 256]` prints one JSON
//! line per product on SmolLM2's gate projection (1536 × 576); every figure includes decoding and packing the
//! weights; quantizing the activations is a separate operation. Outputs are checked against the scalar
//! specification before anything is timed.

mod machine;

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use engraft_kernels::{DType, Isa, Kernels, NnOp, NtOp, QMatrix, Rows, acts_words, gemm_scratch_words};
use engraft_runtime::rng::Rng;
use machine::Probe;

const N: usize = 1536;
const K: usize = 576;
/// Measured runs of each operation.
const RUNS: usize = 25;

struct Args {
    threads: usize,
    isas: Vec<Isa>,
    types: Vec<DType>,
    rows: Vec<usize>,
}

fn args() -> Result<Args> {
    let block_types = || DType::ALL.into_iter().filter(|d| d.row_bytes(K).is_some());
    let mut a = Args {
        threads: 1,
        isas: Isa::available().skip(1).collect(),
        types: block_types().collect(),
        rows: vec![1, 8, 256],
    };
    let mut words = std::env::args().skip(1).filter(|w| w != "--bench");
    while let Some(w) = words.next() {
        let value = words.next().with_context(|| format!("{w} needs a value"))?;
        match w.as_str() {
            "--threads" => a.threads = value.parse()?,
            "--isa" => a.isas = vec![Isa::from_name(&value).context("this CPU lacks that ISA")?],
            "--type" => a.types = block_types().filter(|d| d.name() == value).collect(),
            "--m" => a.rows = vec![value.parse()?],
            _ => bail!("unknown flag {w}"),
        }
    }
    Ok(a)
}

/// Random blocks with scales near 0.01; every type's f16 scales are among the first or last bytes.
fn random_bytes(dtype: DType, rng: &mut Rng) -> Result<Vec<u8>> {
    let n = N * dtype.row_bytes(K).context("a width of whole blocks")?;
    if dtype.is_float() {
        let small = |rng: &mut Rng| rng.f32() - 0.5;
        return Ok(match dtype {
            DType::F32 => (0..N * K).flat_map(|_| small(rng).to_le_bytes()).collect(),
            // The upper half of an f32 is a bf16, and small enough an f16.
            _ => (0..N * K).flat_map(|_| [(rng.next_u64() & 0xff) as u8, 0x2c]).collect(),
        });
    }
    let mut bytes: Vec<u8> = (0..n).map(|_| rng.next_u64() as u8).collect();
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        block[..2].copy_from_slice(&[0x1f, 0x21]);
        if dtype.has_bias() {
            block[2..4].copy_from_slice(&[0x1f, 0x21]);
        }
    }
    Ok(bytes)
}

/// Median seconds of several runs, after one uncounted run.
fn median(f: impl FnMut()) -> f64 {
    beside_peak(f, None).0
}

/// Median seconds of several runs, and the median peak rate, probed before each run: on a shared machine both
/// vary together.
fn beside_peak(mut f: impl FnMut(), probe: Option<Probe>) -> (f64, Option<f64>) {
    f();
    let (mut seconds, mut peaks) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        peaks.extend(probe.map(|p| p.rate()));
        let start = Instant::now();
        f();
        seconds.push(start.elapsed().as_secs_f64());
    }
    let middle = |v: &mut Vec<f64>| {
        v.sort_by(f64::total_cmp);
        v.get(v.len() / 2).copied()
    };
    (middle(&mut seconds).unwrap_or(0.0), middle(&mut peaks))
}

struct Case<'a> {
    w: QMatrix<'a>,
    m: usize,
    x: Vec<f32>,
    dy: Vec<f32>,
}

fn forward(k: &Kernels, c: &Case<'_>, x: Rows<'_>, y: &mut [f32], scratch: &mut [f32]) {
    k.qgemm_nt(c.m, &mut [NtOp { x, w: c.w, low: None, gain: None, y, accumulate: false }], scratch);
}

fn close(a: &[f32], b: &[f32]) -> bool {
    let top = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    a.iter().zip(b).all(|(x, y)| (x - y).abs() <= 1e-4 * (1.0 + top))
}

/// One product of a kind, for the reports.
struct Product<'a> {
    k: &'a Kernels,
    w: QMatrix<'a>,
    m: usize,
}

impl Product<'_> {
    fn report(&self, what: &str, seconds: f64, peak: Option<f64>) {
        let rate = 2.0 * (self.m * N * K) as f64 / seconds / 1e9;
        let peak = peak.map(|p| p * self.k.threads() as f64);
        println!(
            "{}",
            serde_json::json!({
                "op": what, "type": self.w.dtype().name(), "isa": self.k.isa().name(),
                "threads": self.k.threads(), "m": self.m, "gflop_per_s": rate, "peak_gflop_per_s": peak,
                "share_of_peak": peak.map(|p| rate / p), "microseconds": seconds * 1e6,
            })
        );
    }
}

fn run(k: &Kernels, spec: &Kernels, c: &Case<'_>) -> Result<()> {
    let product = Product { k, w: c.w, m: c.m };
    let mut scratch = vec![0.0; k.threads() * gemm_scratch_words(N, K, 0)];
    let (mut words, mut spec_words) = (vec![0.0; acts_words(c.m, N)], vec![0.0; acts_words(c.m, N)]);
    let (mut y, mut expected) = (vec![0.0; c.m * N], vec![0.0; c.m * N]);
    for int8 in [true, false] {
        if int8 && c.w.dtype().is_float() {
            continue;
        }
        let rows = |k: &Kernels, words| {
            if int8 {
                Rows::Int8(k.quantize(&c.x, c.m, K, c.w.dtype().group_len() == 16, words))
            } else {
                Rows::F32(&c.x)
            }
        };
        let (x, x_spec) = (rows(k, &mut words), rows(spec, &mut spec_words));
        forward(k, c, x, &mut y, &mut scratch);
        forward(spec, c, x_spec, &mut expected, &mut scratch);
        ensure!(close(&y, &expected), "{} differs from the specification", c.w.dtype().name());
        let probe = if int8 { machine::int8(k.isa()) } else { machine::fma(k.isa()) };
        let (t, peak) = beside_peak(|| forward(k, c, x, &mut y, &mut scratch), probe);
        product.report(if int8 { "forward_int8" } else { "forward_f32" }, t, peak);
    }
    let (mut dx, mut dx_spec) = (vec![0.0; c.m * K], vec![0.0; c.m * K]);
    for (what, probe) in [
        ("input_gradient_int8", machine::int8(k.isa())),
        ("input_gradient_bf16", machine::bf16(k.isa())),
        ("input_gradient_f32", machine::fma(k.isa())),
    ] {
        if what.ends_with("bf16") && !k.bf16_gradient(&c.w) {
            continue;
        }
        let rows = |k: &Kernels, words| match what {
            "input_gradient_int8" => Rows::Int8(k.quantize_gradient(&c.dy, c.m, N, words)),
            "input_gradient_bf16" => Rows::Bf16(k.round_gradient(&c.dy, c.m, N, words)),
            _ => Rows::F32(&c.dy),
        };
        let op = [NnOp { dy: rows(k, &mut words), w: c.w, low: None }];
        k.qgemm_nn(c.m, &op, &mut dx, false, &mut scratch);
        let spec_op = [NnOp { dy: rows(spec, &mut spec_words), w: c.w, low: None }];
        spec.qgemm_nn(c.m, &spec_op, &mut dx_spec, false, &mut scratch);
        ensure!(close(&dx, &dx_spec), "input gradient of {} differs", c.w.dtype().name());
        let (t, peak) = beside_peak(|| k.qgemm_nn(c.m, &op, &mut dx, false, &mut scratch), probe);
        product.report(what, t, peak);
    }
    Ok(())
}

/// The tiles alone: the cost of `m` more rows in a forward product whose panels are already packed.
fn tiles(k: &Kernels, w: QMatrix<'_>, m: usize) {
    let mut rng = Rng::new(4, 0);
    let x: Vec<f32> = (0..2 * m * K).map(|_| rng.f32() - 0.5).collect();
    let mut scratch = vec![0.0; k.threads() * gemm_scratch_words(N, K, 0)];
    let mut y = vec![0.0; 2 * m * N];
    for int8 in [true, false] {
        if int8 && w.dtype().is_float() {
            continue;
        }
        let probe = if int8 { machine::int8(k.isa()) } else { machine::fma(k.isa()) };
        let mut time = |rows: usize| {
            let mut words = vec![0.0; acts_words(rows, K)];
            let x = &x[..rows * K];
            let x = if int8 {
                Rows::Int8(k.quantize(x, rows, K, w.dtype().group_len() == 16, &mut words))
            } else {
                Rows::F32(x)
            };
            let mut once = || {
                let op = NtOp { x, w, low: None, gain: None, y: &mut y[..rows * N], accumulate: false };
                k.qgemm_nt(rows, &mut [op], &mut scratch);
            };
            beside_peak(&mut once, probe)
        };
        let ((one, _), (two, peak)) = (time(m), time(2 * m));
        let what = if int8 { "tile_int8" } else { "tile_f32" };
        Product { k, w, m }.report(what, two - one, peak);
    }
}

/// The time of quantizing activations `[m, 1536]`.
fn quantization(k: &Kernels, m: usize) {
    let mut rng = Rng::new(1, 0);
    let x: Vec<f32> = (0..m * N).map(|_| rng.f32() - 0.5).collect();
    let mut words = vec![0.0; acts_words(m, N)];
    let t = median(|| _ = k.quantize(&x, m, N, false, &mut words));
    println!(
        "{}",
        serde_json::json!({
            "op": "quantize", "isa": k.isa().name(), "threads": k.threads(), "m": m,
            "elements_per_s": (m * N) as f64 / t, "microseconds": t * 1e6,
        })
    );
}

/// candle's QMatMul on the same weights, as a measure of the forward product.
fn candle(w: &QMatrix<'_>, m: usize) -> Result<()> {
    use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
    use candle_core::{Device, Module, Tensor};
    let dtype = match w.dtype() {
        DType::Q4_0 => GgmlDType::Q4_0,
        DType::Q4_1 => GgmlDType::Q4_1,
        DType::Q8_0 => GgmlDType::Q8_0,
        _ => return Ok(()),
    };
    let storage = QStorage::from_data(w.bytes().into(), &Device::Cpu, dtype)?;
    let product = QMatMul::from_qtensor(QTensor::new(storage, (N, K))?)?;
    let mut rng = Rng::new(1, 0);
    let x: Vec<f32> = (0..m * K).map(|_| rng.f32() - 0.5).collect();
    let x = Tensor::from_vec(x, (m, K), &Device::Cpu)?;
    let t = median(|| _ = std::hint::black_box(product.forward(&x)));
    let rate = 2.0 * (m * N * K) as f64 / t / 1e9;
    println!(
        "{}",
        serde_json::json!({ "op": "candle_qmatmul", "type": w.dtype().name(), "m": m, "gflop_per_s": rate })
    );
    Ok(())
}

/// The gemm crate's f32 product of the same shape on one thread, as a measure of the f32 tile.
fn peer(m: usize) -> Result<()> {
    let mut rng = Rng::new(3, 0);
    let mut uniform = |n: usize| (0..n).map(|_| rng.f32() - 0.5).collect::<Vec<f32>>();
    let (x, w, mut y) = (uniform(m * K), uniform(N * K), vec![0.0f32; m * N]);
    let mut run = || {
        // SAFETY: the pointers cover row-major [m, K], [N, K] (read transposed) and [m, N].
        unsafe {
            gemm::gemm(
                m,
                N,
                K,
                y.as_mut_ptr(),
                1,
                N as isize,
                false,
                x.as_ptr(),
                1,
                K as isize,
                w.as_ptr(),
                K as isize,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    };
    let t = median(&mut run);
    let dot: f32 = (0..K).map(|i| x[i] * w[i]).sum();
    ensure!((y[0] - dot).abs() < 1e-3, "gemm gives {}; {dot} is right", y[0]);
    let rate = 2.0 * (m * N * K) as f64 / t / 1e9;
    println!("{}", serde_json::json!({ "op": "gemm_crate_f32", "threads": 1, "m": m, "gflop_per_s": rate }));
    Ok(())
}

fn main() -> Result<()> {
    let a = args()?;
    println!(
        "{}",
        serde_json::json!({ "op": "memory_read", "threads": 1, "gb_per_s": machine::memory_gb_s() })
    );
    for m in &a.rows {
        peer(*m)?;
    }
    let spec = Kernels::with_isa(Isa::SCALAR, 1);
    for isa in &a.isas {
        let k = Kernels::with_isa(*isa, a.threads);
        a.rows.iter().for_each(|m| quantization(&k, *m));
        for dtype in &a.types {
            let mut rng = Rng::new(1, 0);
            let bytes = random_bytes(*dtype, &mut rng)?;
            let w = QMatrix::new(*dtype, N, K, &bytes).map_err(|e| anyhow::anyhow!("{e:?}"))?;
            for m in &a.rows {
                let mut uniform = |n: usize| (0..n).map(|_| rng.f32() - 0.5).collect::<Vec<f32>>();
                let case = Case { w, m: *m, x: uniform(m * K), dy: uniform(m * N) };
                run(&k, &spec, &case)?;
                if *m > 64 {
                    tiles(&k, w, *m);
                }
                // On ARM, candle's product uses instructions that old cores lack.
                if cfg!(target_arch = "x86_64") {
                    candle(&w, *m)?;
                }
            }
        }
    }
    Ok(())
}
