//! Attention of one head, written as its formulas.

use crate::items::{CachedHead, Head, HeadGrad};
use crate::kv::KvHead;

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// o_i = Σ_j p_ij·v_j with p_i = softmax_j(scale·q_i·k_j) over the keys that row i sees.
///
/// # Safety
/// Pointers cover the shapes; the head's output and lse are written by this call alone.
pub(crate) unsafe fn attention(h: &Head, _: &mut [f32]) {
    for i in 0..h.t {
        let seen = h.past + i + 1;
        // SAFETY: the caller's contract.
        let (q, o) = unsafe { (h.query(i), h.output(i)) };
        // SAFETY: as above.
        let score = |j: usize| dot(q, unsafe { h.key(j) }) * h.scale;
        let top = (0..seen).map(score).fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = (0..seen).map(|j| libm::expf(score(j) - top)).sum();
        if !h.lse.is_null() {
            // SAFETY: as above.
            unsafe { *h.lse.add(i) = top + libm::logf(sum) };
        }
        o.fill(0.0);
        for j in 0..seen {
            let p = libm::expf(score(j) - top) / sum;
            // SAFETY: as above.
            let v = unsafe { h.value(j) };
            o.iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
        }
    }
}

/// Gradients of [`attention`] from its results in `h.o` and `h.lse`: with p and dp = d_o·v, ds = p·(dp − d_o·o)·scale.
///
/// # Safety
/// As for [`attention`]; `g`'s outputs are written by this call alone.
pub(crate) unsafe fn attention_bwd(h: &Head, g: &HeadGrad, _: &mut [f32]) {
    let hd = h.hd;
    // SAFETY: the caller's contract, for every block here.
    let (dk, dv) = unsafe {
        let words = (h.past + h.t) * hd;
        (core::slice::from_raw_parts_mut(g.dk, words), core::slice::from_raw_parts_mut(g.dv, words))
    };
    dk.fill(0.0);
    dv.fill(0.0);
    let (gradient, result) = (Head { q: g.d_o, o: g.dq, ..*h }, Head { q: h.o, ..*h });
    for i in 0..h.t {
        // SAFETY: as above.
        let (q, o, d_o, dq, lse) =
            unsafe { (h.query(i), result.query(i), gradient.query(i), gradient.output(i), *h.lse.add(i)) };
        let d = dot(o, d_o);
        dq.fill(0.0);
        for j in 0..=h.past + i {
            // SAFETY: as above.
            let (k, v) = unsafe { (h.key(j), h.value(j)) };
            let p = libm::expf(dot(q, k) * h.scale - lse);
            let ds = p * (dot(d_o, v) - d) * h.scale;
            for e in 0..hd {
                dq[e] += ds * k[e];
                dk[j * hd + e] += ds * q[e];
                dv[j * hd + e] += p * d_o[e];
            }
        }
    }
}

/// [`attention`] of single query rows over a cache in two parts.
///
/// # Safety
/// Pointers cover the shapes, and the scratch has a word for each key; each output is written by this call alone.
pub(crate) unsafe fn attention_decode(queries: &[CachedHead], scratch: &mut [f32]) {
    for h in queries {
        let keys = h.prefix.rows + h.own.rows;
        let at = |j: usize| match j.checked_sub(h.prefix.rows) {
            None => (&h.prefix, j),
            Some(own) => (&h.own, own),
        };
        let p = &mut scratch[..keys];
        for (j, p) in p.iter_mut().enumerate() {
            let (part, row) = at(j);
            // SAFETY: the caller's contract, for every block here.
            *p = (0..h.hd).map(|e| unsafe { *h.q.add(e) * part.k.get(row, e) }).sum::<f32>() * h.scale;
        }
        let top = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        p.iter_mut().for_each(|p| *p = libm::expf(*p - top));
        let sum: f32 = p.iter().sum();
        for e in 0..h.hd {
            let weighed = |(j, p): (usize, &f32)| {
                let (part, row) = at(j);
                // SAFETY: as above.
                p / sum * unsafe { part.v.get(row, e) }
            };
            // SAFETY: as above.
            unsafe { *h.o.add(e) = p.iter().enumerate().map(weighed).sum() };
        }
    }
}

/// Writes a cached head's `rows` rows as f32 `[rows, hd]`.
///
/// # Safety
/// `out` has rows·hd elements; the pointers cover the shape.
pub(crate) unsafe fn kv_expand(kv: &KvHead, rows: usize, hd: usize, out: &mut [f32]) {
    for (r, out) in out.chunks_exact_mut(hd).take(rows).enumerate() {
        for (e, out) in out.iter_mut().enumerate() {
            // SAFETY: the caller's contract.
            *out = unsafe { kv.get(r, e) };
        }
    }
}
