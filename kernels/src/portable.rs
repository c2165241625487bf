//! The fallback for CPUs without their own kernels: vectors of four floats, which the compiler maps to whatever
//! the CPU has, and f32 matrix products through the gemm crate.

use gemm::Parallelism;

use crate::block::DType;
use crate::generic::gemm::{NN_CHUNK, NN_STRIP, take};
use crate::generic::simd::Simd;
use crate::items::{LowRank, NnItem, NtItem, Rows, TnItem};
use crate::scalar::{decode, products};

/// Columns of an output strip, the same as the scalar products, which handle everything that isn't f32.
pub(crate) const STRIP: usize = products::STRIP;

/// Rows multiplied at once, which keeps gemm's packing small.
const ROWS: usize = 128;

/// Four floats at a time.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type F = [f32; 4];

/// `$body` for each lane; with closures, unrolling would depend on the optimizer.
macro_rules! lanes {
    ($i:ident => $body:expr) => {{
        let mut out = [0.0f32; 4];
        for $i in 0..4 {
            out[$i] = $body;
        }
        out
    }};
}

/// Methods of [`Simd`] from vectors to a vector that are one expression.
macro_rules! lane_operations {
    ($($(#[$doc:meta])* $name:ident($($arg:ident),*) => $value:expr;)*) => {
        $(
            $(#[$doc])*
            #[inline(always)]
            unsafe fn $name($($arg: F),*) -> F {
                $value
            }
        )*
    };
}

impl Simd for Portable {
    type F = F;
    const LANES: usize = 4;
    const F32_MR: usize = 4;
    const NV: usize = 1;
    const DOT_TR: usize = 2;

    lane_operations! {
        zero() => [0.0; 4];
        add(a, b) => lanes!(i => a[i] + b[i]);
        sub(a, b) => lanes!(i => a[i] - b[i]);
        mul(a, b) => lanes!(i => a[i] * b[i]);
        div(a, b) => lanes!(i => a[i] / b[i]);
        /// Rounds twice: without an FMA instruction, a single rounding would cost a function call.
        fma(a, b, c) => lanes!(i => a[i] * b[i] + c[i]);
        max(a, b) => lanes!(i => if a[i] > b[i] { a[i] } else { b[i] });
        min(a, b) => lanes!(i => if a[i] < b[i] { a[i] } else { b[i] });
        abs(a) => lanes!(i => a[i].abs());
        sqrt(a) => lanes!(i => a[i].sqrt());
        pow2(n) => lanes!(i => f32::from_bits(((n[i] as i32 + 127) as u32) << 23));
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> F {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> F {
        // SAFETY: the trait's contract: p is readable for 4 f32; so in all blocks here.
        unsafe { p.cast::<F>().read() }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> F {
        // SAFETY: as above.
        lanes!(i => half::f16::from_bits(unsafe { *p.add(i) }).to_f32())
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> F {
        // SAFETY: as above.
        lanes!(i => f32::from(unsafe { *p.add(i) }))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: F) {
        // SAFETY: as above.
        unsafe { p.cast::<F>().write(v) }
    }
    /// For numbers below 2^22: adding 1.5 · 2^23 leaves no fractional bits. NaN stays.
    #[inline(always)]
    unsafe fn round(a: F) -> F {
        const MAGIC: f32 = 12_582_912.0;
        lanes!(i => (a[i] + MAGIC) - MAGIC)
    }
    #[inline(always)]
    unsafe fn sum(a: F) -> f32 {
        (a[0] + a[2]) + (a[1] + a[3])
    }
    #[inline(always)]
    unsafe fn hmax(a: F) -> f32 {
        a[0].max(a[1]).max(a[2].max(a[3]))
    }
    #[inline(always)]
    unsafe fn deinterleave(a: F, b: F) -> (F, F) {
        ([a[0], a[2], b[0], b[2]], [a[1], a[3], b[1], b[3]])
    }
    #[inline(always)]
    unsafe fn interleave(even: F, odd: F) -> (F, F) {
        ([even[0], odd[0], even[1], odd[1]], [even[2], odd[2], even[3], odd[3]])
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, src_row: usize, dst: *mut f32, dst_row: usize) {
        for i in 0..4 {
            for j in 0..4 {
                // SAFETY: the caller's rows; words of any meaning are moved as such.
                unsafe {
                    dst.add(j * dst_row + i).cast::<u32>().write(*src.add(i * src_row + j).cast::<u32>())
                };
            }
        }
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: F) {
        for i in 0..4 {
            // SAFETY: as above.
            unsafe { *p.add(i) = v[i] as i8 };
        }
    }
}

/// A matrix operand: its first element, and the elements from one row, and from one column, to the next.
type Operand = (*const f32, usize, usize);

/// dst[m, n] (+)= a[m, k] · b[k, n]; rows of dst are `dst_row` apart.
///
/// # Safety
/// The operands cover their shapes, and nobody else uses dst meanwhile.
unsafe fn product(
    (m, n, k): (usize, usize, usize),
    (dst, dst_row): (*mut f32, usize),
    add: bool,
    (a, a_row, a_col): Operand,
    (b, b_row, b_col): Operand,
) {
    for m0 in (0..m).step_by(ROWS) {
        // SAFETY: the caller's contract; strides of slices are below isize::MAX.
        unsafe {
            gemm::gemm(
                ROWS.min(m - m0),
                n,
                k,
                dst.add(m0 * dst_row),
                1,
                dst_row as isize,
                add,
                a.add(m0 * a_row),
                a_col as isize,
                a_row as isize,
                b,
                b_col as isize,
                b_row as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    }
}

/// A strip of the forward product; see [`NtItem`].
///
/// # Safety
/// The item's shapes were checked, `n0` is a multiple of [`STRIP`] below `w.rows()`, no other item writes the strip,
/// and the scratch has `nt_scratch_words`.
pub(crate) unsafe fn nt_item(it: &NtItem<'_>, n0: usize, mut scratch: &mut [f32]) {
    let Rows::F32(x) = it.x else {
        // SAFETY: the caller's contract.
        return unsafe { products::nt_item(it, n0, scratch) };
    };
    let (n, k) = (it.w.rows(), it.w.cols());
    let valid = STRIP.min(n - n0);
    let panel = take(&mut scratch, valid * k);
    for (i, row) in panel.chunks_exact_mut(k).enumerate() {
        dequantize(it.w.dtype(), it.w.row(n0 + i), 0, row);
        if let Some(c) = it.gain {
            row.iter_mut().for_each(|w| *w *= c[n0 + i]);
        }
    }
    // SAFETY: the caller's contract; panel and b are as large as their shapes say.
    unsafe {
        let y = (it.y.add(n0), n);
        product((it.m, valid, k), y, it.accumulate, (x.as_ptr(), k, 1), (panel.as_ptr(), 1, k));
        let Some(LowRank { h, b, rank }) = it.low else { return };
        let (mut b, mut b_row) = (b.as_ptr().add(n0), n);
        if let Some(c) = it.gain {
            let scaled = take(&mut scratch, rank * valid);
            for (j, row) in scaled.chunks_exact_mut(valid).enumerate() {
                for (i, to) in row.iter_mut().enumerate() {
                    *to = *b.add(j * n + i) * c[n0 + i];
                }
            }
            (b, b_row) = (scaled.as_ptr(), valid);
        }
        product((it.m, valid, rank), y, true, (h.as_ptr(), rank, 1), (b, b_row, 1));
    }
}

/// A strip of the input gradient; see [`NnItem`].
///
/// # Safety
/// As for [`nt_item`], with `nn_scratch_words`.
pub(crate) unsafe fn nn_item(it: &NnItem<'_>, c0: usize, mut scratch: &mut [f32]) {
    let Rows::F32(dy) = it.dy else {
        // SAFETY: the caller's contract.
        return unsafe { products::nn_item(it, c0, scratch) };
    };
    let (n, k) = (it.w.rows(), it.w.cols());
    let valid = NN_STRIP.min(k - c0);
    let panel = take(&mut scratch, NN_CHUNK * NN_STRIP);
    for n0 in (0..n).step_by(NN_CHUNK) {
        let rows = NN_CHUNK.min(n - n0);
        for (i, row) in panel.chunks_exact_mut(NN_STRIP).take(rows).enumerate() {
            dequantize(it.w.dtype(), it.w.row(n0 + i), c0, &mut row[..valid]);
        }
        // SAFETY: the caller's contract.
        unsafe {
            let (dy, w) = ((dy.as_ptr().add(n0), n, 1), (panel.as_ptr(), NN_STRIP, 1));
            product((it.m, valid, rows), (it.dx.add(c0), k), it.accumulate || n0 > 0, dy, w);
        }
    }
    let Some(LowRank { h, b, rank }) = it.low else { return };
    // SAFETY: the caller's contract.
    unsafe {
        let b = (b.as_ptr().add(c0), k, 1);
        product((it.m, valid, rank), (it.dx.add(c0), k), true, (h.as_ptr(), rank, 1), b);
    }
}

/// A strip of the weight gradient; see [`TnItem`].
///
/// # Safety
/// As for [`nt_item`], without scratch.
pub(crate) unsafe fn tn_item(it: &TnItem<'_>, c0: usize, _: &mut [f32]) {
    let (n, k) = (it.n, it.k);
    let valid = STRIP.min(k - c0);
    // SAFETY: the caller's contract.
    unsafe {
        let x = (it.x.as_ptr().add(c0), k, 1);
        product((n, valid, it.m), (it.dw.add(c0), k), it.accumulate, (it.dy.as_ptr(), 1, n), x);
    }
}

/// Elements of a stored row as floats, checked once.
fn dequantize(dtype: DType, row: &[u8], start: usize, out: &mut [f32]) {
    match dtype.is_float() {
        true => decode::dequantize(dtype, row, start, out),
        false => decode::dequantize_blocks(dtype, row, start, out),
    }
}
