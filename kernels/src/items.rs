//! Work items: the arguments of one kernel call, and what it may rely on. Each item owns its part of the
//! output, so results don't depend on which thread runs it.

use core::slice::{from_raw_parts, from_raw_parts_mut};

use crate::acts::QuantActs;
use crate::block::DType;
use crate::kv::CachedRows;
use crate::view::QMatrix;

/// Decodes part of a stored row to codes, scales and biases; see [`crate::scalar::decode::unpack`].
pub(crate) type UnpackFn = unsafe fn(DType, &[u8], usize, &mut [i8], &mut [f32], &mut [f32]);
/// Decodes part of a stored row to f32; see [`crate::scalar::decode::dequantize`].
pub(crate) type DequantFn = unsafe fn(DType, &[u8], usize, &mut [f32]);
/// Decodes 32 columns of successive rows: (type, rows, bytes per row, first column, out).
pub(crate) type StripFn = unsafe fn(DType, &[u8], usize, usize, &mut [[f32; 32]]);

/// The low-rank part of a product: adds h·b with h `[m, r]` and b `[r, n]`, both row-major.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    /// `[m, r]`, the adapter's scale already in it.
    pub h: &'a [f32],
    /// `[r, n]`.
    pub b: &'a [f32],
    /// Rank r.
    pub rank: usize,
}

/// The left operand of a product.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// f32 `[m, k]`.
    F32(&'a [f32]),
    /// int8 codes in blocks of 32: plain rows for a product of a few rows, else in the ISA's tiles.
    Int8(QuantActs<'a>),
    /// bf16 `[m, k]`, for input gradients where [`crate::Kernels::bf16_gradient`] says so.
    Bf16(&'a [u16]),
}

/// A strip of y[m, n] (+)= c∘(x[m, k] · W[n, k]ᵀ (+ h·b)).
#[derive(Clone, Copy)]
pub(crate) struct NtItem<'a> {
    pub m: usize,
    pub x: Rows<'a>,
    pub w: QMatrix<'a>,
    pub low: Option<LowRank<'a>>,
    /// c `[n]`; 1 where absent.
    pub gain: Option<&'a [f32]>,
    /// Row-major `[m, n]`, written by strips.
    pub y: *mut f32,
    pub accumulate: bool,
    pub unpack: UnpackFn,
    pub strip: StripFn,
    pub dequant: DequantFn,
}

/// A strip of dx[m, k] (+)= dy[m, n] · W[n, k] (+ h·b with b `[r, k]`).
#[derive(Clone, Copy)]
pub(crate) struct NnItem<'a> {
    pub m: usize,
    pub dy: Rows<'a>,
    pub w: QMatrix<'a>,
    pub low: Option<LowRank<'a>>,
    pub dx: *mut f32,
    pub accumulate: bool,
    pub strip: StripFn,
    pub dequant: DequantFn,
}

/// A strip of dw[n, k] (+)= dy[m, n]ᵀ · x[m, k].
#[derive(Clone, Copy)]
pub(crate) struct TnItem<'a> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub dy: &'a [f32],
    pub x: &'a [f32],
    pub dw: *mut f32,
    pub accumulate: bool,
}

/// One head of one sequence. Row strides are in elements; `q`, `k`, `v` point at the head's first element of the
/// first row.
#[derive(Clone, Copy)]
pub(crate) struct Head {
    /// Query rows.
    pub t: usize,
    /// Keys before the first query row (a filled cache); row i sees keys `0..=past + i`.
    pub past: usize,
    /// Elements per head.
    pub hd: usize,
    /// 1/√hd.
    pub scale: f32,
    pub q: *const f32,
    pub q_row: usize,
    pub k: *const f32,
    pub v: *const f32,
    pub kv_row: usize,
    /// Output, stride `q_row`.
    pub o: *mut f32,
    /// `[t]` log-sum-exp of the scaled scores; null when not wanted.
    pub lse: *mut f32,
}

impl Head {
    /// Query row `i`.
    ///
    /// # Safety
    /// There is such a row.
    pub unsafe fn query(&self, i: usize) -> &[f32] {
        // SAFETY: the caller's contract.
        unsafe { from_raw_parts(self.q.add(i * self.q_row), self.hd) }
    }

    /// Key `j`.
    ///
    /// # Safety
    /// There is such a key.
    pub unsafe fn key(&self, j: usize) -> &[f32] {
        // SAFETY: the caller's contract.
        unsafe { from_raw_parts(self.k.add(j * self.kv_row), self.hd) }
    }

    /// Value `j`.
    ///
    /// # Safety
    /// There is such a value.
    pub unsafe fn value(&self, j: usize) -> &[f32] {
        // SAFETY: the caller's contract.
        unsafe { from_raw_parts(self.v.add(j * self.kv_row), self.hd) }
    }

    /// Output row `i`.
    ///
    /// # Safety
    /// There is such a row, and nobody else uses it meanwhile.
    #[allow(clippy::mut_from_ref, reason = "the row is this head's alone: the caller's contract")]
    pub unsafe fn output(&self, i: usize) -> &mut [f32] {
        // SAFETY: the caller's contract.
        unsafe { from_raw_parts_mut(self.o.add(i * self.q_row), self.hd) }
    }
}

/// Gradients of one head: `dq` has stride `q_row`; `dk` and `dv` are `[keys, hd]` of this head alone.
#[derive(Clone, Copy)]
pub(crate) struct HeadGrad {
    /// Stride `q_row`.
    pub d_o: *const f32,
    pub dq: *mut f32,
    pub dk: *mut f32,
    pub dv: *mut f32,
}

/// A single query row of one head against a cache in two parts.
#[derive(Clone, Copy)]
pub(crate) struct CachedHead {
    /// Elements per head.
    pub hd: usize,
    /// 1/√hd.
    pub scale: f32,
    pub q: *const f32,
    /// The first positions; other queries may read them too.
    pub prefix: CachedRows,
    /// The positions after them, ending with the query's own.
    pub own: CachedRows,
    pub o: *mut f32,
}

/// State of the running softmax of one row over vocabulary chunks.
#[derive(Clone, Copy, Debug)]
pub struct SoftmaxState {
    /// Largest logit so far.
    pub max: f32,
    /// Σ e^(logit − max) so far.
    pub sum: f32,
    /// The target's logit, once its chunk has been seen.
    pub target: f32,
}

/// One AdamW step's constants.
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    /// Learning rate of this step.
    pub lr: f32,
    /// β₁.
    pub beta1: f32,
    /// β₂.
    pub beta2: f32,
    /// ε, added to the root of the corrected second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// 1 / (1 − β₁^t).
    pub correct1: f32,
    /// 1 / (1 − β₂^t).
    pub correct2: f32,
    /// Multiplies each gradient first (clipping and averaging).
    pub grad_scale: f32,
}
