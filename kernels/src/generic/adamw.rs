//! AdamW (Loshchilov & Hutter, arXiv 1711.05101), in place.

use super::simd::Simd;
use crate::items::AdamWStep;

/// Updates parameters and moments of one run.
///
/// # Safety
/// Equal lengths; S's features are present.
#[inline(always)]
pub unsafe fn adamw<S: Simd>(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], s: &AdamWStep) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut i = 0;
        while i + S::LANES <= p.len() {
            let gv = S::mul(S::load(g.as_ptr().add(i)), S::splat(s.grad_scale));
            let m1 = S::mul(S::load(m.as_ptr().add(i)), S::splat(s.beta1));
            let m1 = S::fma(gv, S::splat(1.0 - s.beta1), m1);
            let v1 = S::mul(S::load(v.as_ptr().add(i)), S::splat(s.beta2));
            let v1 = S::fma(S::mul(gv, gv), S::splat(1.0 - s.beta2), v1);
            let root = S::add(S::sqrt(S::mul(v1, S::splat(s.correct2))), S::splat(s.eps));
            let step = S::div(S::mul(m1, S::splat(s.correct1)), root);
            let p0 = S::load(p.as_ptr().add(i));
            let decayed = S::mul(p0, S::splat(1.0 - s.lr * s.weight_decay));
            S::store(p.as_mut_ptr().add(i), S::fma(step, S::splat(-s.lr), decayed));
            S::store(m.as_mut_ptr().add(i), m1);
            S::store(v.as_mut_ptr().add(i), v1);
            i += S::LANES;
        }
        if i < p.len() {
            crate::scalar::ops::adamw(&mut p[i..], &g[i..], &mut m[i..], &mut v[i..], s);
        }
    }
}
