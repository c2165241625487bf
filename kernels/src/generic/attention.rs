//! Causal attention of one head of one sequence, forward and backward, through the f32 tile.
//!
//! A block of query rows meets all keys it may see; only that block's probabilities exist at a time,
//! so the extra memory is O(keys). The backward recomputes them from the saved log-sum-exp.

use super::rows::{dot, exp_sum, max};
use super::simd::Simd;
use super::tile::{f32_tile, row_pointers, store_tile};
use crate::items::{CachedHead, Head, HeadGrad};
use crate::kv::{KV_BLOCK, KvHead, KvType};

/// Query rows handled at once.
pub const Q_BLOCK: usize = 24;

const fn round_up(n: usize, to: usize) -> usize {
    n.div_ceil(to) * to
}

/// Words from one row of scores to the next: whole strips plus a cache line, since rows a power of two apart
/// would all map to the same set of the L1 cache.
const fn score_row(keys: usize) -> usize {
    round_up(keys, 32) + 16
}

/// f32 words of scratch for a head with `keys` keys (the widest ISA's padding).
pub const fn scratch_words(keys: usize, hd: usize, backward: bool) -> usize {
    let (kp, hp) = (round_up(keys, 32), round_up(hd, 32));
    let forward = kp * hd + kp * hp + Q_BLOCK * score_row(keys);
    if backward {
        forward + kp * hd + Q_BLOCK * score_row(keys) + 2 * Q_BLOCK * hp + 64
    } else {
        forward + 64
    }
}

/// Packs rows `[n, hd]` as strips of NR rows, transposed: strip s is `[hd][NR]`, zero-padded.
#[inline(always)]
unsafe fn pack_transposed<S: Simd>(
    src: *const f32,
    row: usize,
    n: usize,
    hd: usize,
    nr: usize,
    dst: &mut [f32],
) {
    for r0 in (0..n.next_multiple_of(nr)).step_by(S::LANES) {
        let to = &mut dst[r0 / nr * nr * hd + r0 % nr..];
        let rows = S::LANES.min(n.saturating_sub(r0));
        let whole = if rows == S::LANES { hd / S::LANES * S::LANES } else { 0 };
        // SAFETY: the caller's rows; padding rows are not read.
        unsafe {
            for c in (0..whole).step_by(S::LANES) {
                S::transpose(src.add(r0 * row + c), row, to.as_mut_ptr().add(c * nr), nr);
            }
            for c in whole..hd {
                for j in 0..S::LANES {
                    to[c * nr + j] = if j < rows { *src.add((r0 + j) * row + c) } else { 0.0 };
                }
            }
        }
    }
}

/// Copies rows `[n, hd]` to a row length of `hp`, zero-padded.
#[inline(always)]
unsafe fn pack_rows(src: *const f32, row: usize, n: usize, hd: usize, hp: usize, dst: &mut [f32]) {
    for r in 0..n {
        // SAFETY: the caller's rows.
        let s = unsafe { core::slice::from_raw_parts(src.add(r * row), hd) };
        dst[r * hp..r * hp + hd].copy_from_slice(s);
        dst[r * hp + hd..(r + 1) * hp].fill(0.0);
    }
}

/// out[rows, keys] = a[rows, hd] · packed strips.
#[inline(always)]
unsafe fn rows_by_strips<S: Simd, const MR: usize, const NV: usize>(
    a: *const f32,
    a_row: usize,
    rows: usize,
    strips: &[f32],
    hd: usize,
    keys: usize,
    out: &mut [f32],
    out_row: usize,
) {
    let nr = NV * S::LANES;
    // SAFETY: the caller's rows; strips cover the keys, out rows are padded to whole strips.
    unsafe {
        for m0 in (0..rows).step_by(MR) {
            let n = MR.min(rows - m0);
            let ap = row_pointers::<f32, MR>(a.add(m0 * a_row), a_row, n);
            for s in 0..keys.div_ceil(nr) {
                let mut acc = [[S::zero(); NV]; MR];
                f32_tile::<S, MR, NV>(&mut acc, hd, &ap, 1, strips.as_ptr().add(s * hd * nr), nr);
                let to = out.as_mut_ptr().add(m0 * out_row + s * nr);
                store_tile::<S, MR, NV>(&acc, n, nr, to, out_row, false);
            }
        }
    }
}

/// dst[rows, hd] (+)= a · b[keys, hp], with a[m][k] at `a + m·a_row + k·a_step`.
#[inline(always)]
unsafe fn rows_by_rows<S: Simd, const MR: usize, const NV: usize>(
    a: *const f32,
    a_row: usize,
    a_step: usize,
    rows: usize,
    keys: usize,
    b: &[f32],
    hd: usize,
    hp: usize,
    dst: *mut f32,
    dst_row: usize,
    accumulate: bool,
) {
    let nr = NV * S::LANES;
    // SAFETY: the caller's rows; b rows are padded to hp, a multiple of the strip.
    unsafe {
        for m0 in (0..rows).step_by(MR) {
            let n = MR.min(rows - m0);
            let ap = row_pointers::<f32, MR>(a.add(m0 * a_row), a_row, n);
            for c in (0..hd).step_by(nr) {
                let mut acc = [[S::zero(); NV]; MR];
                f32_tile::<S, MR, NV>(&mut acc, keys, &ap, a_step, b.as_ptr().add(c), hp);
                let to = dst.add(m0 * dst_row + c);
                store_tile::<S, MR, NV>(&acc, n, nr.min(hd - c), to, dst_row, accumulate);
            }
        }
    }
}

/// Forward of one head.
///
/// # Safety
/// Pointers cover the shapes; the head's output and lse are written by this call alone; the scratch
/// has [`scratch_words`]; S's features are present.
#[inline(always)]
pub unsafe fn forward<S: Simd, const MR: usize, const NV: usize>(h: &Head, scratch: &mut [f32]) {
    let nr = NV * S::LANES;
    let keys = h.past + h.t;
    let (kp, hp) = (round_up(keys, nr), round_up(h.hd, nr));
    let sr = score_row(keys);
    let (kt, rest) = scratch.split_at_mut(kp * h.hd);
    let (vp, rest) = rest.split_at_mut(keys * hp);
    // SAFETY: the caller's contract.
    unsafe {
        pack_transposed::<S>(h.k, h.kv_row, keys, h.hd, nr, kt);
        pack_rows(h.v, h.kv_row, keys, h.hd, hp, vp);
        for i0 in (0..h.t).step_by(Q_BLOCK) {
            let rows = Q_BLOCK.min(h.t - i0);
            let seen = h.past + i0 + rows;
            let p = &mut rest[..rows * sr];
            rows_by_strips::<S, MR, NV>(h.q.add(i0 * h.q_row), h.q_row, rows, kt, h.hd, seen, p, sr);
            for r in 0..rows {
                let own = h.past + i0 + r + 1;
                let row = &mut p[r * sr..r * sr + seen];
                let top = max::<S>(&row[..own]) * h.scale;
                let sum = exp_sum::<S>(&mut row[..own], h.scale, top);
                super::rows::scale::<S>(1.0 / sum, &mut row[..own]);
                row[own..].fill(0.0);
                if !h.lse.is_null() {
                    *h.lse.add(i0 + r) = top + libm::logf(sum);
                }
            }
            let o = h.o.add(i0 * h.q_row);
            rows_by_rows::<S, MR, NV>(p.as_ptr(), sr, 1, rows, seen, vp, h.hd, hp, o, h.q_row, false);
        }
    }
}

/// Backward of one head; `h.o` and `h.lse` hold the forward's results.
///
/// # Safety
/// As for [`forward`]; `g`'s outputs are written by this call alone.
#[inline(always)]
pub unsafe fn backward<S: Simd, const MR: usize, const NV: usize>(
    h: &Head,
    g: &HeadGrad,
    scratch: &mut [f32],
) {
    let nr = NV * S::LANES;
    let keys = h.past + h.t;
    let (kp, hp) = (round_up(keys, nr), round_up(h.hd, nr));
    let sr = score_row(keys);
    let (kt, rest) = scratch.split_at_mut(kp * h.hd);
    let (vt, rest) = rest.split_at_mut(kp * h.hd);
    let (kr, rest) = rest.split_at_mut(keys * hp);
    let (qr, rest) = rest.split_at_mut(Q_BLOCK * hp);
    let (dor, rest) = rest.split_at_mut(Q_BLOCK * hp);
    let (p, ds) = rest.split_at_mut(Q_BLOCK * sr);
    // SAFETY: the caller's contract.
    unsafe {
        pack_transposed::<S>(h.k, h.kv_row, keys, h.hd, nr, kt);
        pack_transposed::<S>(h.v, h.kv_row, keys, h.hd, nr, vt);
        pack_rows(h.k, h.kv_row, keys, h.hd, hp, kr);
        for i in 0..keys * h.hd {
            *g.dk.add(i) = 0.0;
            *g.dv.add(i) = 0.0;
        }
        for i0 in (0..h.t).step_by(Q_BLOCK) {
            let rows = Q_BLOCK.min(h.t - i0);
            let seen = h.past + i0 + rows;
            let (q, d_o) = (h.q.add(i0 * h.q_row), g.d_o.add(i0 * h.q_row));
            pack_rows(q, h.q_row, rows, h.hd, hp, qr);
            pack_rows(d_o, h.q_row, rows, h.hd, hp, dor);
            // P = exp(scale·Q·Kᵀ − lse); dP = dO·Vᵀ; dS = P∘(dP − Σ dO∘O)·scale
            rows_by_strips::<S, MR, NV>(q, h.q_row, rows, kt, h.hd, seen, p, sr);
            rows_by_strips::<S, MR, NV>(d_o, h.q_row, rows, vt, h.hd, seen, ds, sr);
            for r in 0..rows {
                let own = h.past + i0 + r + 1;
                let at = (i0 + r) * h.q_row;
                let o = core::slice::from_raw_parts(h.o.add(at).cast_const(), h.hd);
                let d = dot::<S>(o, core::slice::from_raw_parts(g.d_o.add(at), h.hd));
                exp_sum::<S>(&mut p[r * sr..r * sr + own], h.scale, *h.lse.add(i0 + r));
                p[r * sr + own..r * sr + seen].fill(0.0);
                softmax_bwd::<S>(&p[r * sr..r * sr + own], d, h.scale, &mut ds[r * sr..r * sr + own]);
                ds[r * sr + own..r * sr + seen].fill(0.0);
            }
            let dq = g.dq.add(i0 * h.q_row);
            rows_by_rows::<S, MR, NV>(ds.as_ptr(), sr, 1, rows, seen, kr, h.hd, hp, dq, h.q_row, false);
            rows_by_rows::<S, MR, NV>(ds.as_ptr(), 1, sr, seen, rows, qr, h.hd, hp, g.dk, h.hd, true);
            rows_by_rows::<S, MR, NV>(p.as_ptr(), 1, sr, seen, rows, dor, h.hd, hp, g.dv, h.hd, true);
        }
    }
}

/// ds = p∘(ds − d)·scale.
#[inline(always)]
unsafe fn softmax_bwd<S: Simd>(p: &[f32], d: f32, scale: f32, ds: &mut [f32]) {
    // SAFETY: equal lengths; S's features are present.
    unsafe {
        let mut i = 0;
        while i + S::LANES <= p.len() {
            let q = ds.as_mut_ptr().add(i);
            let t = S::mul(S::sub(S::load(q), S::splat(d)), S::splat(scale));
            S::store(q, S::mul(S::load(p.as_ptr().add(i)), t));
            i += S::LANES;
        }
        for j in i..p.len() {
            ds[j] = p[j] * (ds[j] - d) * scale;
        }
    }
}

/// Queries that read shared rows together.
pub const QUERIES: usize = 4;

/// Element types as constants, so each gets its own loops.
const F32: u8 = 0;
const F16: u8 = 1;
const Q8: u8 = 2;

/// LANES elements of a cached row from element `i` of the head.
#[inline(always)]
unsafe fn load_kv<S: Simd, const T: u8>(kv: &KvHead, row: usize, i: usize) -> S::F {
    // SAFETY: the caller's row; Q8 heads are whole blocks, so no vector crosses one.
    unsafe {
        let at = row * kv.row + i;
        match T {
            F32 => S::load(kv.data.cast::<f32>().add(at)),
            F16 => S::load_f16(kv.data.cast::<u16>().add(at)),
            _ => {
                let scale = *kv.scale.add(row * (kv.row / KV_BLOCK) + i / KV_BLOCK);
                S::mul(S::load_i8(kv.data.cast::<i8>().add(at)), S::splat(scale))
            }
        }
    }
}

/// Attention of single query rows, without packing. All of them have the first one's prefix.
///
/// Each query's sums run in order of position, wherever the cache is split and however many queries there are.
///
/// # Safety
/// Pointers cover the shapes, keys and values are of one type; there are at most [`QUERIES`] queries, and the
/// scratch has a word for each key of each; S's features are present.
#[inline(always)]
pub unsafe fn decode<S: Simd>(queries: &[CachedHead], scratch: &mut [f32]) {
    let Some(first) = queries.first() else { return };
    // SAFETY: the caller's contract.
    unsafe {
        match first.own.k.ty {
            KvType::F32 => decode_as::<S, F32>(queries, scratch),
            KvType::F16 => decode_as::<S, F16>(queries, scratch),
            KvType::Q8 => decode_as::<S, Q8>(queries, scratch),
        }
    }
}

#[inline(always)]
unsafe fn decode_as<S: Simd, const T: u8>(queries: &[CachedHead], mut scratch: &mut [f32]) {
    // SAFETY: the caller's contract.
    unsafe {
        if let Ok(queries) = <&[CachedHead; QUERIES]>::try_from(queries) {
            return match S::LANES {
                16 => decode_group::<S, T, QUERIES, 4>(queries, scratch),
                _ => decode_group::<S, T, QUERIES, 2>(queries, scratch),
            };
        }
        for query in queries {
            let own = super::gemm::take(&mut scratch, query.prefix.rows + query.own.rows);
            decode_group::<S, T, 1, 4>(&[*query], own);
        }
    }
}

/// Q queries at once, WIDE vectors of their outputs at a time: as many sums as overlap in registers.
#[inline(always)]
unsafe fn decode_group<S: Simd, const T: u8, const Q: usize, const WIDE: usize>(
    queries: &[CachedHead; Q],
    scratch: &mut [f32],
) {
    let (shared, hd) = (queries[0].prefix, queries[0].hd);
    let mut p = [scratch.as_mut_ptr(); Q];
    for i in 1..Q {
        p[i] = p[i - 1].wrapping_add(shared.rows + queries[i - 1].own.rows);
    }
    let weights = p.map(|p| p.cast_const());
    let last = queries[Q - 1].own.rows + shared.rows;
    assert!(scratch.len() >= (p[Q - 1] as usize - p[0] as usize) / size_of::<f32>() + last);
    // SAFETY: the caller's contract; each query's scores lie in its own stretch of the scratch.
    unsafe {
        score::<S, T, Q>(&shared.k, shared.rows, hd, &queries.each_ref().map(|h| h.q), &p);
        for (h, p) in queries.iter().zip(p) {
            score::<S, T, 1>(&h.own.k, h.own.rows, hd, &[h.q], &[p.add(shared.rows)]);
            let p = core::slice::from_raw_parts_mut(p, shared.rows + h.own.rows);
            let top = max::<S>(p) * h.scale;
            let sum = exp_sum::<S>(p, h.scale, top);
            super::rows::scale::<S>(1.0 / sum, p);
        }
        let o = queries.each_ref().map(|h| h.o);
        weigh::<S, T, Q, WIDE>(&shared.v, shared.rows, hd, &weights, &o, true);
        for (h, w) in queries.iter().zip(weights) {
            weigh::<S, T, 1, 4>(&h.own.v, h.own.rows, hd, &[w.add(shared.rows)], &[h.o], false);
        }
    }
}

/// p[j] = q·k[j] for each of Q queries.
#[inline(always)]
unsafe fn score<S: Simd, const T: u8, const Q: usize>(
    k: &KvHead,
    rows: usize,
    hd: usize,
    q: &[*const f32; Q],
    p: &[*mut f32; Q],
) {
    let whole = hd / S::LANES * S::LANES;
    // SAFETY: the caller's contract.
    unsafe {
        if hd == FEW * S::LANES {
            return score_few::<S, T, Q>(k, rows, q, p);
        }
        for j in 0..rows {
            let mut acc = [S::zero(); Q];
            for i in (0..whole).step_by(S::LANES) {
                let key = load_kv::<S, T>(k, j, i);
                for n in 0..Q {
                    acc[n] = S::fma(S::load(q[n].add(i)), key, acc[n]);
                }
            }
            let mut sums = sums_of::<S, Q>(acc);
            for n in 0..Q {
                for i in whole..hd {
                    sums[n] += *q[n].add(i) * k.get(j, i);
                }
                *p[n].add(j) = sums[n];
            }
        }
    }
}

/// Vectors of a head whose queries stay in registers.
const FEW: usize = 4;

/// [`score`] of heads of [`FEW`] vectors.
#[inline(always)]
unsafe fn score_few<S: Simd, const T: u8, const Q: usize>(
    k: &KvHead,
    rows: usize,
    q: &[*const f32; Q],
    p: &[*mut f32; Q],
) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut own = [[S::zero(); FEW]; Q];
        for n in 0..Q {
            for i in 0..FEW {
                own[n][i] = S::load(q[n].add(i * S::LANES));
            }
        }
        for j in 0..rows {
            let mut acc = [S::zero(); Q];
            for i in 0..FEW {
                let key = load_kv::<S, T>(k, j, i * S::LANES);
                for n in 0..Q {
                    acc[n] = S::fma(own[n][i], key, acc[n]);
                }
            }
            let sums = sums_of::<S, Q>(acc);
            for n in 0..Q {
                *p[n].add(j) = sums[n];
            }
        }
    }
}

/// The sum of each vector's lanes, in the order of [`Simd::sum`].
#[inline(always)]
unsafe fn sums_of<S: Simd, const Q: usize>(acc: [S::F; Q]) -> [f32; Q] {
    // SAFETY: the caller's contract.
    unsafe {
        let mut sums = [0.0; Q];
        if Q == 4 {
            sums.copy_from_slice(&S::sum4([acc[0], acc[1 % Q], acc[2 % Q], acc[3 % Q]]));
        } else {
            for n in 0..Q {
                sums[n] = S::sum(acc[n]);
            }
        }
        sums
    }
}

/// o (+)= Σ_j w[j]·v[j] for each of Q queries; `begin` for the first rows.
#[inline(always)]
unsafe fn weigh<S: Simd, const T: u8, const Q: usize, const WIDE: usize>(
    v: &KvHead,
    rows: usize,
    hd: usize,
    w: &[*const f32; Q],
    o: &[*mut f32; Q],
    begin: bool,
) {
    let whole = hd / S::LANES * S::LANES;
    // SAFETY: the caller's contract; vectors past the whole ones are neither read nor written.
    unsafe {
        for c in (0..whole).step_by(WIDE * S::LANES) {
            let wide = WIDE.min((whole - c) / S::LANES);
            let mut acc = [[S::zero(); WIDE]; Q];
            if !begin {
                for n in 0..Q {
                    for i in 0..WIDE {
                        if i < wide {
                            acc[n][i] = S::load(o[n].add(c + i * S::LANES));
                        }
                    }
                }
            }
            for j in 0..rows {
                for i in 0..WIDE {
                    if i < wide {
                        let value = load_kv::<S, T>(v, j, c + i * S::LANES);
                        for n in 0..Q {
                            acc[n][i] = S::fma(S::splat(*w[n].add(j)), value, acc[n][i]);
                        }
                    }
                }
            }
            for n in 0..Q {
                for i in 0..WIDE {
                    if i < wide {
                        S::store(o[n].add(c + i * S::LANES), acc[n][i]);
                    }
                }
            }
        }
        for n in 0..Q {
            for i in whole..hd {
                let mut sum = if begin { 0.0 } else { *o[n].add(i) };
                for j in 0..rows {
                    sum += *w[n].add(j) * v.get(j, i);
                }
                *o[n].add(i) = sum;
            }
        }
    }
}

/// Writes a cached head's `rows` rows as f32 `[rows, hd]`.
///
/// # Safety
/// `out` has rows·hd elements; the pointers cover the shape; S's features are present.
#[inline(always)]
pub unsafe fn expand<S: Simd>(kv: &KvHead, rows: usize, hd: usize, out: &mut [f32]) {
    // SAFETY: the caller's contract.
    unsafe {
        match kv.ty {
            KvType::F32 => expand_as::<S, F32>(kv, rows, hd, out),
            KvType::F16 => expand_as::<S, F16>(kv, rows, hd, out),
            KvType::Q8 => expand_as::<S, Q8>(kv, rows, hd, out),
        }
    }
}

#[inline(always)]
unsafe fn expand_as<S: Simd, const T: u8>(kv: &KvHead, rows: usize, hd: usize, out: &mut [f32]) {
    let whole = hd / S::LANES * S::LANES;
    for r in 0..rows {
        let out = &mut out[r * hd..(r + 1) * hd];
        // SAFETY: the caller's contract.
        unsafe {
            for i in (0..whole).step_by(S::LANES) {
                S::store(out.as_mut_ptr().add(i), load_kv::<S, T>(kv, r, i));
            }
            for i in whole..hd {
                out[i] = kv.get(r, i);
            }
        }
    }
}
