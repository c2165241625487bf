//! Attention: of whole sequences forward and backward, and over a cache of earlier keys and values.

use crate::generic::attention::{QUERIES, scratch_words};
use crate::items::{CachedHead, Head, HeadGrad};
use crate::kv::{KV_BLOCK, KvRows, KvType};

use super::share::{Scratch, Shared};
use super::{Kernels, Op};

/// Shape of an attention over one sequence.
#[derive(Clone, Copy, Debug)]
pub struct AttnShape {
    /// Query rows.
    pub t: usize,
    /// Cached keys before them.
    pub past: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads.
    pub n_kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
}

/// f32 words of scratch per thread for attention over `keys` keys.
pub const fn attention_scratch_words(keys: usize, head_dim: usize, backward: bool) -> usize {
    scratch_words(keys, head_dim, backward)
}

/// f32 words of scratch per thread for [`Kernels::attention_cached`] over `keys` keys.
pub fn cached_attention_scratch_words(keys: usize, head_dim: usize) -> usize {
    scratch_words(keys, head_dim, false) + 2 * keys * head_dim
}

impl Kernels {
    /// Causal attention of one sequence: o `[t, heads·hd]` from q of the same shape and k, v `[past + t,
    /// kv·hd]`.
    ///
    /// `lse` `[heads, t]`, if any, receives the log-sum-exp for the backward.
    pub fn attention(
        &self,
        s: AttnShape,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        o: &mut [f32],
        lse: Option<&mut [f32]>,
        scratch: &mut [f32],
    ) {
        let _timed = self.timed(Op::Attention);
        self.check_attention(&s, q, k, v, o);
        let keys = s.past + s.t;
        if let Some(l) = &lse {
            assert_eq!(l.len(), s.n_heads * s.t);
        }
        let lse = Shared(lse.map_or(core::ptr::null_mut(), |l| l.as_mut_ptr()));
        let o = Shared(o.as_mut_ptr());
        let needed = scratch_words(keys, s.head_dim, false);
        let scratch = Scratch::new(scratch, self.threads(), needed);
        self.pool.run(s.n_heads, |i, worker| {
            let (o, lse) = (&o, &lse);
            let mut h = head(&s, i, q, k, v, o.0);
            if !lse.0.is_null() {
                // SAFETY: lse has n_heads·t elements.
                h.lse = unsafe { lse.0.add(i * s.t) };
            }
            let scratch = scratch.of(worker);
            // SAFETY: shapes were checked, head i writes its own columns and lse, the ISA is present.
            unsafe { (self.table.attention)(&h, scratch) }
        });
    }

    /// Causal attention of the `t` newest rows over a cache in two parts, which already ends with those rows: o
    /// `[t, heads·hd]` from q of the same shape and `past + t` keys and values.
    pub fn attention_cached(
        &self,
        s: AttnShape,
        q: &[f32],
        prefix: KvRows<'_>,
        own: KvRows<'_>,
        o: &mut [f32],
        scratch: &mut [f32],
    ) {
        if s.t == 1 {
            let s = AttnShape { past: prefix.positions(s.n_kv_heads * s.head_dim), ..s };
            return self.attention_batched(s, q, prefix, |_| own, o, scratch);
        }
        let (hd, keys, row) = (s.head_dim, s.past + s.t, s.n_kv_heads * s.head_dim);
        check_cached(&s, q, o, prefix, own);
        assert_eq!(prefix.positions(row) + own.positions(row), keys);
        let table = self.table;
        let _timed = self.timed(Op::Attention);
        let scratch = Scratch::new(scratch, self.threads(), cached_attention_scratch_words(keys, hd));
        let o = Shared(o.as_mut_ptr());
        self.pool.run(s.n_heads, |i, worker| {
            let (o, first) = (&o, i / (s.n_heads / s.n_kv_heads) * hd);
            let (kf, rest) = scratch.of(worker).split_at_mut(keys * hd);
            let (vf, rest) = rest.split_at_mut(keys * hd);
            let (prefix, own) = (prefix.head(first, row), own.head(first, row));
            let at = prefix.rows * hd;
            // SAFETY: shapes were checked, head i writes its own columns of o, the ISA is present.
            unsafe {
                (table.kv_expand)(&prefix.k, prefix.rows, hd, &mut kf[..at]);
                (table.kv_expand)(&prefix.v, prefix.rows, hd, &mut vf[..at]);
                (table.kv_expand)(&own.k, own.rows, hd, &mut kf[at..]);
                (table.kv_expand)(&own.v, own.rows, hd, &mut vf[at..]);
                let (q, q_row, o) = (q[i * hd..].as_ptr(), s.n_heads * hd, o.0.add(i * hd));
                let (k, v, scale) = (kf.as_ptr(), vf.as_ptr(), 1.0 / libm::sqrtf(hd as f32));
                let (t, past, lse) = (s.t, s.past, core::ptr::null_mut());
                (table.attention)(&Head { t, past, hd, scale, q, q_row, k, v, kv_row: hd, o, lse }, rest);
            }
        });
    }

    /// Attention of `t` sequences with a common prefix: row r of q `[t, heads·hd]` sees the `past` keys of
    /// `prefix` and those of `own(r)`, which end with its own; o has q's shape.
    ///
    /// A row's result doesn't depend on the other rows, nor on where its positions are split.
    pub fn attention_batched<'a>(
        &self,
        s: AttnShape,
        q: &[f32],
        prefix: KvRows<'_>,
        own: impl Fn(usize) -> KvRows<'a> + Sync,
        o: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (hd, row) = (s.head_dim, s.n_kv_heads * s.head_dim);
        assert!(s.t > 0);
        let (ty, mut longest) = (own(0).ty(), 0);
        for own in (0..s.t).map(&own) {
            check_cached(&s, q, o, prefix, own);
            assert!(own.ty() == ty && !own.k.is_empty(), "a row sees itself at least");
            longest = longest.max(own.positions(row));
        }
        assert_eq!(prefix.positions(row), s.past);
        let width = s.n_heads * hd;
        let _timed = self.timed(Op::Attention);
        let scratch = Scratch::new(scratch, self.threads(), QUERIES * (s.past + longest));
        let o = Shared(o.as_mut_ptr());
        // An item is a few queries of one kv head, which read the prefix together. Items of one head are
        // adjacent, so its prefix rows stay in the cache of the thread that reads them.
        let group = s.n_heads / s.n_kv_heads;
        let (queries, scale) = (s.t * group, 1.0 / libm::sqrtf(hd as f32));
        let per = if s.past > 0 && queries >= QUERIES { QUERIES } else { 1 };
        let items = queries.div_ceil(per);
        self.pool.run(s.n_kv_heads * items, |item, worker| {
            let (o, kv, from) = (&o, item / items, item % items * per);
            let prefix = prefix.head(kv * hd, row);
            let query = |i: usize| {
                let i = (from + i).min(queries - 1);
                let (r, at) = (i / group, i / group * width + (kv * group + i % group) * hd);
                let own = own(r);
                assert!(own.ty() == ty, "the sequences' caches are of one type");
                // The offset lies within o, which is as long as q.
                let (q, o) = (q[at..].as_ptr(), o.0.wrapping_add(at));
                CachedHead { hd, scale, q, prefix, own: own.head(kv * hd, row), o }
            };
            let heads: [CachedHead; QUERIES] = core::array::from_fn(query);
            // SAFETY: shapes were checked, each query writes its own row's columns of o, the ISA is present.
            unsafe { (self.table.attention_decode)(&heads[..per.min(queries - from)], scratch.of(worker)) }
        });
    }

    /// Gradients of [`Kernels::attention`] (with `past == 0`): dq `[t, heads·hd]`, dk and dv
    /// `[t, kv·hd]`, from d_o and the forward's o and lse. `per_head` holds `2·heads·t·hd` words.
    pub fn attention_bwd(
        &self,
        s: AttnShape,
        (q, k, v): (&[f32], &[f32], &[f32]),
        (o, lse, d_o): (&[f32], &[f32], &[f32]),
        (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
        per_head: &mut [f32],
        scratch: &mut [f32],
    ) {
        let _timed = self.timed(Op::Attention);
        self.check_attention(&s, q, k, v, o);
        let (t, hd) = (s.t, s.head_dim);
        assert!(s.past == 0 && d_o.len() == o.len() && dq.len() == q.len());
        assert!(dk.len() == k.len() && dv.len() == v.len() && lse.len() == s.n_heads * t);
        assert!(per_head.len() >= 2 * s.n_heads * t * hd);
        let needed = scratch_words(t, hd, true);
        let scratch = Scratch::new(scratch, self.threads(), needed);
        let (dq, heads) = (Shared(dq.as_mut_ptr()), Shared(per_head.as_mut_ptr()));
        self.pool.run(s.n_heads, |i, worker| {
            let (dq, heads) = (&dq, &heads);
            let mut h = head(&s, i, q, k, v, o.as_ptr().cast_mut());
            h.lse = lse[i * t..].as_ptr().cast_mut();
            // SAFETY: offsets lie within buffers whose lengths were checked; o and lse are only read;
            // head i writes its own columns of dq and its own part of per_head; the ISA is present.
            unsafe {
                let g = HeadGrad {
                    d_o: d_o.as_ptr().add(i * hd),
                    dq: dq.0.add(i * hd),
                    dk: heads.0.add(2 * i * t * hd),
                    dv: heads.0.add((2 * i + 1) * t * hd),
                };
                (self.table.attention_bwd)(&h, &g, scratch.of(worker));
            }
        });
        self.sum_heads(&s, per_head, 0, dk);
        self.sum_heads(&s, per_head, 1, dv);
    }

    /// Adds the query heads' parts of one kv head in ascending order.
    fn sum_heads(&self, s: &AttnShape, per_head: &[f32], which: usize, out: &mut [f32]) {
        let (t, hd, group) = (s.t, s.head_dim, s.n_heads / s.n_kv_heads);
        self.rows(s.n_kv_heads * hd, out, |r, row| {
            for (kv, dst) in row.chunks_exact_mut(hd).enumerate() {
                dst.fill(0.0);
                for h in kv * group..(kv + 1) * group {
                    let src = &per_head[((2 * h + which) * t + r) * hd..][..hd];
                    dst.iter_mut().zip(src).for_each(|(d, s)| *d += s);
                }
            }
        });
    }

    fn check_attention(&self, s: &AttnShape, q: &[f32], k: &[f32], v: &[f32], o: &[f32]) {
        assert!(s.t > 0 && s.n_kv_heads > 0 && s.n_heads.is_multiple_of(s.n_kv_heads));
        assert!(q.len() == s.t * s.n_heads * s.head_dim && o.len() == q.len());
        assert!(k.len() == (s.past + s.t) * s.n_kv_heads * s.head_dim && v.len() == k.len());
    }
}

/// Head `i` of a checked attention.
fn head(s: &AttnShape, i: usize, q: &[f32], k: &[f32], v: &[f32], o: *mut f32) -> Head {
    let hd = s.head_dim;
    let kv = i / (s.n_heads / s.n_kv_heads) * hd;
    Head {
        t: s.t,
        past: s.past,
        hd,
        scale: 1.0 / libm::sqrtf(hd as f32),
        q: q[i * hd..].as_ptr(),
        q_row: s.n_heads * hd,
        k: k[kv..].as_ptr(),
        v: v[kv..].as_ptr(),
        kv_row: s.n_kv_heads * hd,
        // The offset stays within o, which is as long as q.
        o: o.wrapping_add(i * hd),
        lse: core::ptr::null_mut(),
    }
}

fn check_cached(s: &AttnShape, q: &[f32], o: &[f32], prefix: KvRows<'_>, own: KvRows<'_>) {
    assert!(s.t > 0 && s.n_kv_heads > 0 && s.n_heads.is_multiple_of(s.n_kv_heads));
    assert!(q.len() == s.t * s.n_heads * s.head_dim && o.len() == q.len());
    assert!(prefix.k.is_empty() || prefix.ty() == own.ty(), "parts of a cache are of one type");
    let whole = s.head_dim.is_multiple_of(KV_BLOCK);
    assert!(whole || own.ty() != KvType::Q8, "Q8 heads are whole blocks");
}
