//! One test body per operation, run for every instruction set of this CPU against the scalar
//! specification, and with 1, 2 and 4 threads for identical bits.

mod common;

use common::{Rng, assert_close, random_bytes, view};
use engraft_kernels::{
    AdamWStep, AttnShape, ColumnSum, DType, GainGradient, Isa, Kernels, KvMut, KvRows, KvType, LowRank, NnOp,
    NtOp, QMatrix, QuantActs, Rows, SoftmaxState, acts_words, attention_scratch_words,
    cached_attention_scratch_words, gemm_scratch_words,
};

/// Runs `f` on the scalar specification and on each ISA with 1, 2 and 4 threads; results of one ISA
/// must be the same bits, and close to the specification.
fn on_every_isa(what: &str, tol: f32, f: impl Fn(&Kernels) -> Vec<f32>) {
    let spec = f(&Kernels::with_isa(Isa::SCALAR, 1));
    for isa in Isa::available() {
        let one = f(&Kernels::with_isa(isa, 1));
        assert_close(&format!("{what} on {}", isa.name()), &one, &spec, tol);
        for threads in [2, 4] {
            let more = f(&Kernels::with_isa(isa, threads));
            let same = one.iter().zip(&more).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{what} on {} differs with {threads} threads", isa.name());
        }
    }
}

fn gemm_scratch(k: &Kernels, cols: usize, rank: usize) -> Vec<f32> {
    vec![0.0; k.threads() * gemm_scratch_words(512, cols, rank)]
}

/// (m, n, k) that divide no tile, that divide all, and the single row of decoding.
const SHAPES: [(usize, usize, usize); 5] =
    [(1, 40, 256), (3, 33, 256), (13, 64, 512), (24, 96, 256), (7, 5, 768)];

fn forward(
    k: &Kernels,
    int8: bool,
    dtype: DType,
    (m, n, cols): (usize, usize, usize),
    rank: usize,
) -> Vec<f32> {
    let mut rng = Rng(7);
    let bytes = random_bytes(dtype, n, cols, &mut rng);
    let w = view(dtype, n, cols, &bytes);
    let (x, h, b) = (rng.vec(m * cols), rng.vec(m * rank), rng.vec(rank * n));
    let mut y = rng.vec(m * n);
    let mut words = vec![0.0; acts_words(m, cols)];
    let rows = if int8 {
        Rows::Int8(k.quantize(&x, m, cols, dtype.group_len() == 16, &mut words))
    } else {
        Rows::F32(&x)
    };
    let low = (rank > 0).then_some(LowRank { h: &h, b: &b, rank });
    let gains = rng.vec(n);
    let gain = (rank == 3).then_some(&*gains);
    let op = NtOp { x: rows, w, low, gain, y: &mut y, accumulate: rank > 0 };
    k.qgemm_nt(m, &mut [op], &mut gemm_scratch(k, cols, rank));
    y
}

#[test]
fn forward_product_f32() {
    for dtype in DType::ALL {
        for shape in SHAPES {
            for rank in [0, 3] {
                let what = format!("{} {shape:?} rank {rank}", dtype.name());
                on_every_isa(&what, 2e-5, |k| forward(k, false, dtype, shape, rank));
            }
        }
    }
    on_every_isa("F32 with a width of no block", 2e-5, |k| forward(k, false, DType::F32, (5, 17, 172), 2));
}

#[test]
fn forward_product_int8() {
    for dtype in DType::ALL.into_iter().filter(|d| !d.is_float()) {
        for shape in SHAPES {
            for rank in [0, 8] {
                let what = format!("int8 {} {shape:?} rank {rank}", dtype.name());
                on_every_isa(&what, 3e-5, |k| forward(k, true, dtype, shape, rank));
            }
        }
    }
}

/// The integer tiles must not saturate: the largest codes of both signs, in all pairs.
#[test]
fn forward_product_int8_extremes() {
    for dtype in [DType::Q8_0, DType::Q4_0, DType::Q5_1, DType::Q6_K, DType::IQ4_NL] {
        for fill in [0x00u8, 0x7f, 0x80, 0xff] {
            on_every_isa(&format!("{} filled with {fill:#x}", dtype.name()), 3e-5, |k| {
                let (m, n, cols) = (4, 32, 256);
                let mut bytes = random_bytes(dtype, n, cols, &mut Rng(3));
                for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
                    let (from, to) = if dtype == DType::Q6_K {
                        (0, 192)
                    } else {
                        (dtype.block_bytes() - 16, dtype.block_bytes())
                    };
                    let from = if dtype == DType::Q8_0 { 2 } else { from };
                    block[from..to].fill(fill);
                }
                let x: Vec<f32> = (0..m * cols).map(|i| if (i / 3) % 2 == 0 { 1.0 } else { -1.0 }).collect();
                let mut words = vec![0.0; acts_words(m, cols)];
                let rows = Rows::Int8(k.quantize(&x, m, cols, dtype.group_len() == 16, &mut words));
                let mut y = vec![0.0; m * n];
                let op = NtOp {
                    x: rows,
                    w: view(dtype, n, cols, &bytes),
                    low: None,
                    gain: None,
                    y: &mut y,
                    accumulate: false,
                };
                k.qgemm_nt(m, &mut [op], &mut gemm_scratch(k, cols, 0));
                y
            });
        }
    }
}

#[test]
fn input_gradient() {
    for dtype in DType::ALL {
        for (m, n, cols) in SHAPES.into_iter().chain([(4, 300, 256)]) {
            for rank in [0, 3] {
                on_every_isa(&format!("nn {} {m}×{n}×{cols} rank {rank}", dtype.name()), 2e-5, |k| {
                    let mut rng = Rng(11);
                    let bytes = random_bytes(dtype, n, cols, &mut rng);
                    let other = random_bytes(DType::F32, 9, cols, &mut rng);
                    let (dy, dy2) = (rng.vec(m * n), rng.vec(m * 9));
                    let (h, b) = (rng.vec(m * rank), rng.vec(rank * cols));
                    let low = (rank > 0).then_some(LowRank { h: &h, b: &b, rank });
                    let ops = [
                        NnOp { dy: Rows::F32(&dy), w: view(dtype, n, cols, &bytes), low },
                        NnOp { dy: Rows::F32(&dy2), w: view(DType::F32, 9, cols, &other), low: None },
                    ];
                    let mut dx = rng.vec(m * cols);
                    k.qgemm_nn(m, &ops, &mut dx, rank > 0, &mut gemm_scratch(k, cols, rank));
                    dx
                });
            }
        }
    }
}

#[test]
fn input_gradient_int8() {
    for dtype in DType::ALL {
        for (m, n, cols) in [(1, 32, 256), (13, 96, 256), (7, 64, 768)] {
            for rank in [0, 3] {
                on_every_isa(&format!("nn int8 {} {m}×{n}×{cols} rank {rank}", dtype.name()), 3e-5, |k| {
                    let mut rng = Rng(13);
                    let bytes = random_bytes(dtype, n, cols, &mut rng);
                    let (dy, h, b) = (rng.vec(m * n), rng.vec(m * rank), rng.vec(rank * cols));
                    let low = (rank > 0).then_some(LowRank { h: &h, b: &b, rank });
                    let mut words = vec![0.0; acts_words(m, n)];
                    let rows = Rows::Int8(k.quantize_gradient(&dy, m, n, &mut words));
                    let op = NnOp { dy: rows, w: view(dtype, n, cols, &bytes), low };
                    let mut dx = rng.vec(m * cols);
                    k.qgemm_nn(m, &[op], &mut dx, rank > 0, &mut gemm_scratch(k, cols, rank));
                    dx
                });
            }
        }
    }
}

#[test]
fn input_gradient_bf16() {
    let mut tried = 0;
    for dtype in DType::ALL {
        for (m, n, cols) in [(1, 32, 256), (13, 96, 256), (7, 320, 768)] {
            for rank in [0, 3] {
                let run = |k: &Kernels| {
                    let mut rng = Rng(17);
                    let bytes = random_bytes(dtype, n, cols, &mut rng);
                    let (dy, h, b) = (rng.vec(m * n), rng.vec(m * rank), rng.vec(rank * cols));
                    let low = (rank > 0).then_some(LowRank { h: &h, b: &b, rank });
                    let mut words = vec![0.0; acts_words(m, n)];
                    let rows = Rows::Bf16(k.round_gradient(&dy, m, n, &mut words));
                    let op = NnOp { dy: rows, w: view(dtype, n, cols, &bytes), low };
                    let mut dx = rng.vec(m * cols);
                    k.qgemm_nn(m, &[op], &mut dx, rank > 0, &mut gemm_scratch(k, cols, rank));
                    dx
                };
                let bytes = random_bytes(dtype, n, cols, &mut Rng(17));
                let has = |isa: &Isa| Kernels::with_isa(*isa, 1).bf16_gradient(&view(dtype, n, cols, &bytes));
                let spec = run(&Kernels::with_isa(Isa::SCALAR, 1));
                for isa in Isa::available().filter(|isa| *isa != Isa::SCALAR && has(isa)) {
                    let one = run(&Kernels::with_isa(isa, 1));
                    let what = format!("nn bf16 {} {m}×{n}×{cols} rank {rank}", dtype.name());
                    assert_close(&what, &one, &spec, 2e-5);
                    assert_eq!(one, run(&Kernels::with_isa(isa, 2)), "{what} differs with 2 threads");
                    tried += 1;
                }
            }
        }
    }
    if tried == 0 {
        eprintln!("SKIPPED: this CPU has no bf16 products");
    }
}

#[test]
fn rank_r_products() {
    for (m, k_len, r) in [(1, 64, 1), (5, 172, 3), (33, 576, 8), (20, 65, 16)] {
        on_every_isa(&format!("skinny_nt {m}×{k_len} rank {r}"), 1e-5, |k| {
            let mut rng = Rng(5);
            let (x, p) = (rng.vec(m * k_len), rng.vec(r * k_len));
            let mut h = vec![0.0; m * r];
            k.skinny_nt(0.5, &x, m, k_len, &p, r, &mut h);
            h
        });
        for accumulate in [false, true] {
            on_every_isa(&format!("skinny_tn {m}×{k_len} rank {r}"), 1e-5, |k| {
                let mut rng = Rng(6);
                let (p, q) = (rng.vec(m * r), rng.vec(m * k_len));
                let mut out = rng.vec(r * k_len);
                k.skinny_tn(&p, &q, m, r, k_len, &mut out, accumulate);
                out
            });
        }
    }
}

#[test]
fn weight_gradient() {
    // Ragged in every direction; more rows than are summed at once; whole tiles.
    for (m, n, cols) in [(1, 1, 1), (5, 13, 172), (33, 40, 65), (300, 25, 96), (513, 7, 33), (24, 96, 256)] {
        for accumulate in [false, true] {
            on_every_isa(&format!("gemm_tn {m}×{n}×{cols} adding {accumulate}"), 1e-5, |k| {
                let mut rng = Rng(17);
                let (dy, x) = (rng.vec(m * n), rng.vec(m * cols));
                let mut dw = rng.vec(n * cols);
                k.gemm_tn(&dy, &x, m, &mut dw, accumulate, &mut gemm_scratch(k, cols, 0));
                dw
            });
        }
    }
}

#[test]
fn sums_of_squares() {
    for n in [0, 1, 63, 64, 65, 10_007] {
        on_every_isa(&format!("sum_squares {n}"), 1e-6, |k| {
            let x = Rng(18).vec(n);
            let plain: f64 = x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
            let sum = k.sum_squares(&x);
            assert!((sum - plain).abs() <= 1e-12 * plain, "{sum} for {plain}");
            vec![sum as f32]
        });
    }
}

#[test]
fn f32_values_are_a_matrix() {
    let values = Rng(19).vec(3 * 40);
    let view = QMatrix::of_f32(3, 40, &values).expect("a matrix");
    let mut row = vec![0.0; 40];
    Kernels::detect(1).dequantize_row(&view, 2, &mut row);
    assert_eq!(row, values[80..]);
    assert!(QMatrix::of_f32(4, 40, &values).is_err());
}

#[test]
fn quantized_activations() {
    let cols = 96;
    for m in [1, 9, 30] {
        on_every_isa("quantize", 0.0, |k| {
            let mut x = Rng(1).vec(m * cols);
            x[..32].fill(0.0);
            let mut words = vec![0.0; acts_words(m, cols)];
            let plain: Vec<f32> = in_order(k.quantize(&x, m, cols, true, &mut words), m, cols);
            let few = in_order(k.quantize(&x, m, cols, false, &mut words), m, cols);
            assert_eq!(few, in_order(k.quantize_gradient(&x, m, cols, &mut words), m, cols));
            plain.into_iter().chain(few).collect()
        });
    }
}

/// Codes, scales and sums row by row, wherever the tile put them.
fn in_order(a: QuantActs<'_>, m: usize, cols: usize) -> Vec<f32> {
    let at = |r: usize, b: usize, blocks: usize| (r / a.tile * blocks + b) * a.tile + r % a.tile;
    let mut all = Vec::new();
    for r in 0..m {
        for b in 0..cols / 32 {
            let i = at(r, b, cols / 32);
            all.extend(a.codes[32 * i..32 * i + 32].iter().map(|c| f32::from(*c)));
            all.extend([a.scale[i], a.bias_sum32[i], a.start32[i] as f32]);
        }
        for g in 0..if a.halves { cols / 16 } else { 0 } {
            let i = at(r, g, cols / 16);
            all.extend([a.bias_sum16[i], a.start16[i] as f32]);
        }
    }
    all
}

#[test]
fn norms_and_elementwise() {
    for d in [8, 64, 100, 576] {
        on_every_isa(&format!("rmsnorm {d}"), 1e-5, |k| {
            let mut rng = Rng(2);
            let (x, w, dy) = (rng.vec(13 * d), rng.vec(d), rng.vec(13 * d));
            let (mut y, mut dx) = (vec![0.0; 13 * d], rng.vec(13 * d));
            k.rmsnorm(&x, &w, 1e-5, &mut y);
            k.rmsnorm_bwd(&x, &w, 1e-5, &dy, &mut dx);
            let mut dw = vec![0.0; d];
            k.rmsnorm_weight_bwd(&x, 1e-5, &dy, &mut dw);
            // One version serves all instruction sets, so the formula stands here.
            let mut plain = vec![0.0; d];
            for (x, dy) in x.chunks_exact(d).zip(dy.chunks_exact(d)) {
                let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / d as f64;
                let inverse = 1.0 / (mean + 1e-5).sqrt();
                plain
                    .iter_mut()
                    .zip(x)
                    .zip(dy)
                    .for_each(|((w, x), dy)| *w += (inverse * f64::from(x * dy)) as f32);
            }
            assert_close("the gradient of a norm's weights", &dw, &plain, 1e-5);
            y.into_iter().chain(dx).chain(dw).collect()
        });
    }
    on_every_isa("rmsnorm's weights, more rows than are summed at once", 1e-5, |k| {
        let mut rng = Rng(12);
        let (x, dy, mut dw) = (rng.vec(300 * 150), rng.vec(300 * 150), rng.vec(150));
        k.rmsnorm_weight_bwd(&x, 1e-5, &dy, &mut dw);
        dw
    });
    for (m, n) in [(3, 5), (7, 160), (40, 300)] {
        on_every_isa(&format!("gains backward {m}×{n}"), 1e-5, |k| {
            let mut rng = Rng(23);
            let (c, by) = (rng.vec(n), rng.vec(n));
            let [dy, y, before] = [0; 3].map(|_| rng.vec(m * n));
            let [mut g, mut u, mut dz] = [0; 3].map(|_| rng.vec(m * n));
            let mut sums = [0; 4].map(|_| rng.vec(n));
            let [apart, here, gate, dots] = &mut sums;
            let apart = ColumnSum { out: apart, by: Some(&by) };
            k.gain_bwd(GainGradient::Apart { dy: &dy, dz: &mut dz }, &y, Some(&before), &c, apart);
            k.gain_bwd(GainGradient::InPlace(&mut dz), &y, None, &c, ColumnSum { out: here, by: None });
            let gate = Some((&*c, ColumnSum { out: gate, by: None }));
            k.swiglu_bwd_gains(&mut g, &mut u, &dy, n, [gate, None]);
            k.column_dots(&dy, &y, n, ColumnSum { out: dots, by: None });
            [g, u, dz].into_iter().chain(sums).flatten().collect()
        });
    }
    for n in [1, 37, 20_000] {
        on_every_isa(&format!("swiglu {n}"), 1e-5, |k| {
            let mut rng = Rng(3);
            let wide = |v: Vec<f32>| v.into_iter().map(|x| x * 30.0).collect::<Vec<f32>>();
            let (mut g, mut u, dh) = (wide(rng.vec(n)), rng.vec(n), rng.vec(n));
            let mut h = vec![0.0; n];
            k.swiglu(&g, &u, &mut h);
            k.swiglu_bwd(&mut g, &mut u, &dh);
            k.axpy(0.25, &u, &mut h);
            g.into_iter().chain(u).chain(h).collect()
        });
    }
}

#[test]
fn rope_turns_and_turns_back() {
    for (heads, hd, half) in [(3, 64, 32), (2, 8, 4), (4, 16, 3)] {
        on_every_isa(&format!("rope {heads}×{hd}/{half}"), 1e-6, |k| {
            let mut rng = Rng(4);
            let x = rng.vec(70 * heads * hd);
            let table: Vec<f32> = (0..70)
                .flat_map(|p| {
                    let angle = move |i: usize| p as f32 * 0.1 / (1 + i) as f32;
                    (0..half).map(move |i| angle(i).cos()).chain((0..half).map(move |i| angle(i).sin()))
                })
                .collect();
            let mut turned = x.clone();
            k.rope(&mut turned, heads, hd, &table, half, |r| r, false);
            let mut back = turned.clone();
            k.rope(&mut back, heads, hd, &table, half, |r| r, true);
            assert_close("rope and back", &back, &x, 1e-5);
            turned
        });
    }
}

#[test]
fn attention_forward_and_backward() {
    for (t, past, heads, kv, hd) in
        [(1, 0, 2, 1, 8), (7, 0, 4, 2, 16), (50, 0, 3, 1, 64), (5, 40, 2, 2, 40), (1, 33, 4, 2, 64)]
    {
        let s = AttnShape { t, past, n_heads: heads, n_kv_heads: kv, head_dim: hd };
        on_every_isa(&format!("attention {s:?}"), 2e-5, |k| {
            let mut rng = Rng(8);
            let (nq, nk) = (t * heads * hd, (past + t) * kv * hd);
            let (q, key, val) = (rng.vec(nq), rng.vec(nk), rng.vec(nk));
            let mut scratch = vec![0.0; k.threads() * attention_scratch_words(past + t, hd, true)];
            let (mut o, mut lse) = (vec![0.0; nq], vec![0.0; heads * t]);
            k.attention(s, &q, &key, &val, &mut o, None, &mut scratch);
            let without = o.clone();
            k.attention(s, &q, &key, &val, &mut o, Some(&mut lse), &mut scratch);
            assert_close("with and without lse", &o, &without, 1e-5);
            if past > 0 {
                return o;
            }
            let d_o = rng.vec(nq);
            let (mut dq, mut dk, mut dv) = (vec![0.0; nq], vec![0.0; nk], vec![0.0; nk]);
            let mut per_head = vec![0.0; 2 * nq];
            k.attention_bwd(
                s,
                (&q, &key, &val),
                (&o, &lse, &d_o),
                (&mut dq, &mut dk, &mut dv),
                &mut per_head,
                &mut scratch,
            );
            o.into_iter().chain(lse).chain(dq).chain(dk).chain(dv).collect()
        });
    }
}

#[test]
fn attention_over_a_cache_of_each_type() {
    for (t, past, heads, kv, hd) in
        [(1, 0, 2, 1, 32), (1, 70, 3, 1, 64), (9, 0, 4, 2, 96), (21, 40, 3, 1, 64), (1, 33, 4, 2, 160)]
    {
        let s = AttnShape { t, past, n_heads: heads, n_kv_heads: kv, head_dim: hd };
        let mut rng = Rng(11);
        let (nq, nk) = (t * heads * hd, (past + t) * kv * hd);
        let (q, key, val) = (rng.vec(nq), rng.vec(nk), rng.vec(nk));
        let mut exact = vec![0.0; nq];
        let words = |k: &Kernels| vec![0.0; k.threads() * cached_attention_scratch_words(past + t, hd)];
        let scalar = Kernels::with_isa(Isa::SCALAR, 1);
        scalar.attention(s, &q, &key, &val, &mut exact, None, &mut words(&scalar));
        for (ty, tol) in [(KvType::F32, 1e-5), (KvType::F16, 1e-3), (KvType::Q8, 2e-2)] {
            let (mut keys, mut values) = (Cache::new(ty, nk), Cache::new(ty, nk));
            keys.rows().store(0, &key);
            values.rows().store(0, &val);
            let (keys, values) = (keys.rows(), values.rows());
            on_every_isa(&format!("attention {s:?} over {ty:?}"), 2e-5, |k| {
                let mut o = vec![0.0; nq];
                let own = KvRows { k: keys.first(nk), v: values.first(nk) };
                k.attention_cached(s, &q, KvRows::NONE, own, &mut o, &mut words(k));
                assert_close(&format!("{ty:?} against f32"), &o, &exact, tol);
                o
            });
        }
    }
}

/// Several sequences behind one prefix: against the specification, and equal to each alone over its unparted
/// cache, to the bit, whichever rows are beside it.
#[test]
fn attention_of_sequences_that_share_a_prefix() {
    for (prefix, owns, heads, kv, hd) in [
        (0, &[1usize, 9, 40][..], 3, 1, 64),
        (70, &[1], 2, 1, 32),
        (33, &[5, 1, 64, 2, 17], 4, 2, 96),
        (50, &[4, 1, 7], 6, 2, 64),
        (21, &[2, 6, 1, 1], 3, 1, 32),
        (1, &[3, 1, 1, 8, 30, 2, 2, 21, 13], 9, 3, 160),
    ] {
        let (t, row, width) = (owns.len(), kv * hd, heads * hd);
        let s = AttnShape { t, past: prefix, n_heads: heads, n_kv_heads: kv, head_dim: hd };
        let longest = prefix + owns.iter().max().expect("some");
        for ty in [KvType::F32, KvType::F16, KvType::Q8] {
            let mut rng = Rng(12);
            let q = rng.vec(t * width);
            // Each sequence's positions are those of the prefix and its own.
            let first: [Vec<f32>; 2] = std::array::from_fn(|_| rng.vec(prefix * row));
            let mut caches: Vec<[Cache; 2]> = Vec::new();
            for own in owns {
                caches.push(std::array::from_fn(|i| {
                    let mut cache = Cache::new(ty, (prefix + own) * row);
                    cache.rows().store(0, &[&first[i][..], &rng.vec(own * row)].concat());
                    cache
                }));
            }
            let rows: Vec<[KvMut<'_>; 2]> =
                caches.iter_mut().map(|c| c.each_mut().map(Cache::rows)).collect();
            let part = |r: usize, from: usize, to: usize| {
                let [k, v] = rows[r].each_ref().map(|x| x.range(from * row..to * row));
                KvRows { k, v }
            };
            let own = |r: usize| part(r, prefix, prefix + owns[r]);
            on_every_isa(&format!("{s:?} with {owns:?} over {ty:?}"), 2e-5, |k| {
                let mut words = vec![0.0; k.threads() * cached_attention_scratch_words(longest, hd)];
                let mut o = vec![0.0; t * width];
                k.attention_batched(s, &q, part(0, 0, prefix), own, &mut o, &mut words);
                for r in 0..t {
                    let mut alone = vec![0.0; width];
                    let one = AttnShape { t: 1, past: prefix + owns[r] - 1, ..s };
                    let (q, all) = (&q[r * width..(r + 1) * width], part(r, 0, prefix + owns[r]));
                    k.attention_cached(one, q, KvRows::NONE, all, &mut alone, &mut words);
                    let same = alone.iter().zip(&o[r * width..]).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "row {r} of {s:?} over {ty:?} is another alone");
                }
                o
            });
            let mut other = first[0].clone();
            other.iter_mut().for_each(|x| *x = -*x);
            if prefix > 1 {
                // The check above would notice another prefix.
                let k = Kernels::with_isa(Isa::SCALAR, 1);
                let (mut cache, mut with, mut without) =
                    (Cache::new(ty, prefix * row), vec![0.0; t * width], vec![0.0; t * width]);
                let mut keys = cache.rows();
                keys.store(0, &other);
                let negated = KvRows { k: keys.first(prefix * row), ..part(0, 0, prefix) };
                let mut words = vec![0.0; cached_attention_scratch_words(longest, hd)];
                k.attention_batched(s, &q, part(0, 0, prefix), own, &mut with, &mut words);
                k.attention_batched(s, &q, negated, own, &mut without, &mut words);
                assert!(with.iter().zip(&without).any(|(a, b)| (a - b).abs() > 1e-2));
            }
        }
    }
}

/// Several query rows over a cache in two parts: as over the same cache in one, to the bit.
#[test]
fn a_parted_cache_is_read_as_one() {
    let (t, past, heads, kv, hd) = (5, 20, 4, 2, 96);
    let s = AttnShape { t, past, n_heads: heads, n_kv_heads: kv, head_dim: hd };
    let (row, n) = (kv * hd, (past + t) * kv * hd);
    for ty in [KvType::F32, KvType::F16, KvType::Q8] {
        let mut rng = Rng(13);
        let q = rng.vec(t * heads * hd);
        let mut caches = [Cache::new(ty, n), Cache::new(ty, n)];
        caches.iter_mut().for_each(|c| c.rows().store(0, &rng.vec(n)));
        let rows = caches.each_mut().map(Cache::rows);
        let part = |from: usize, to: usize| {
            let [k, v] = rows.each_ref().map(|x| x.range(from * row..to * row));
            KvRows { k, v }
        };
        on_every_isa(&format!("{s:?} over {ty:?} in parts"), 2e-5, |k| {
            let mut words = vec![0.0; k.threads() * cached_attention_scratch_words(past + t, hd)];
            let (mut whole, mut parted) = (vec![0.0; q.len()], vec![0.0; q.len()]);
            k.attention_cached(s, &q, KvRows::NONE, part(0, past + t), &mut whole, &mut words);
            k.attention_cached(s, &q, part(0, 13), part(13, past + t), &mut parted, &mut words);
            assert!(whole.iter().zip(&parted).all(|(a, b)| a.to_bits() == b.to_bits()));
            parted
        });
    }
}

/// Storage of one cache type.
struct Cache(KvType, Vec<f32>, Vec<u16>, Vec<i8>);

impl Cache {
    fn new(ty: KvType, n: usize) -> Cache {
        Cache(ty, vec![0.0; n], vec![0; n], vec![0; n])
    }

    fn rows(&mut self) -> KvMut<'_> {
        match self.0 {
            KvType::F32 => KvMut::F32(&mut self.1),
            KvType::F16 => KvMut::F16(&mut self.2),
            KvType::Q8 => KvMut::Q8(&mut self.3, &mut self.1),
        }
    }
}

/// The backward against central differences of the forward, in the specification itself.
#[test]
fn attention_backward_is_the_derivative() {
    const WORDS: usize = attention_scratch_words(5, 4, true);
    let s = AttnShape { t: 5, past: 0, n_heads: 2, n_kv_heads: 1, head_dim: 4 };
    let k = Kernels::with_isa(Isa::SCALAR, 1);
    let mut rng = Rng(9);
    let mut qkv = [rng.vec(40), rng.vec(20), rng.vec(20)];
    let d_o = rng.vec(40);
    let loss = |x: &[Vec<f32>; 3]| -> f64 {
        let mut o = vec![0.0; 40];
        k.attention(s, &x[0], &x[1], &x[2], &mut o, None, &mut [0.0; WORDS]);
        o.iter().zip(&d_o).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let (mut o, mut lse) = (vec![0.0; 40], vec![0.0; 10]);
    k.attention(s, &qkv[0], &qkv[1], &qkv[2], &mut o, Some(&mut lse), &mut [0.0; WORDS]);
    let mut g = [vec![0.0; 40], vec![0.0; 20], vec![0.0; 20]];
    let [dq, dk, dv] = &mut g;
    let outputs = (&mut dq[..], &mut dk[..], &mut dv[..]);
    let scratch = &mut [0.0; WORDS];
    k.attention_bwd(s, (&qkv[0], &qkv[1], &qkv[2]), (&o, &lse, &d_o), outputs, &mut [0.0; 80], scratch);
    for part in 0..3 {
        for i in 0..qkv[part].len() {
            let x0 = qkv[part][i];
            qkv[part][i] = x0 + 1e-2;
            let up = loss(&qkv);
            qkv[part][i] = x0 - 1e-2;
            let down = loss(&qkv);
            qkv[part][i] = x0;
            let slope = ((up - down) / 2e-2) as f32;
            assert!(
                (slope - g[part][i]).abs() < 2e-3,
                "part {part} element {i}: {} against {slope}",
                g[part][i]
            );
        }
    }
}

#[test]
fn cross_entropy_in_chunks() {
    on_every_isa("cross-entropy", 1e-5, |k| {
        let (m, vocab, chunk, d) = (5, 100, 33, 12);
        let mut rng = Rng(10);
        let logits: Vec<f32> = rng.vec(m * vocab).into_iter().map(|v| v * 8.0).collect();
        let targets: Vec<u32> = (0..m as u32).map(|i| i * 23).collect();
        let start = SoftmaxState { max: f32::NEG_INFINITY, sum: 0.0, target: 0.0 };
        let mut state = vec![start; m];
        let mut dx = vec![1.0f32; m * d];
        for first in (0..vocab).step_by(chunk) {
            let n = chunk.min(vocab - first);
            let mut part: Vec<f32> = (0..m).flat_map(|r| logits[r * vocab + first..][..n].to_vec()).collect();
            k.ce_chunk(&mut part, n, first, &targets, &mut state, Some(&mut dx));
        }
        let loss = state.iter().map(|s| s.max + s.sum.ln() - s.target);
        let plain: Vec<f32> = (0..m)
            .map(|r| {
                let row = &logits[r * vocab..][..vocab];
                row.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln() as f32 - row[targets[r] as usize]
            })
            .collect();
        let loss: Vec<f32> = loss.collect();
        assert_close("loss", &loss, &plain, 1e-5);
        loss.into_iter().chain(dx).collect()
    });
}

#[test]
fn adamw_step() {
    on_every_isa("adamw", 1e-6, |k| {
        let n = 40_003;
        let mut rng = Rng(12);
        let (mut p, g, mut m) = (rng.vec(n), rng.vec(n), rng.vec(n));
        let mut v: Vec<f32> = rng.vec(n).into_iter().map(f32::abs).collect();
        let s = AdamWStep {
            lr: 1e-2,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.1,
            correct1: 1.3,
            correct2: 2.0,
            grad_scale: 0.7,
        };
        k.adamw(&mut p, &g, &mut m, &mut v, &s);
        p.into_iter().chain(m).chain(v).collect()
    });
}

#[test]
fn blocks_too_small_for_a_scale_are_zero() {
    for isa in Isa::available() {
        let kernels = Kernels::with_isa(isa, 1);
        for tiny in [0.0, 1e-45, 1e-40, 3e-37] {
            let x: Vec<f32> = (0..64).map(|i| if i < 32 { tiny } else { 1.0 }).collect();
            let mut words = vec![0.0; acts_words(1, 64)];
            let acts = kernels.quantize(&x, 1, 64, false, &mut words);
            assert!(acts.codes[..32].iter().all(|c| *c == 0), "{}: {tiny:e}", isa.name());
            assert!(acts.codes[32..].iter().all(|c| *c == 127), "{}", isa.name());
            assert!(acts.scale.iter().all(|s| s.is_finite()), "{}", isa.name());
        }
    }
}
