//! Instruction sets as tokens, and the table of kernels compiled for each.
//!
//! Apart from the scalar and portable ones, an [`Isa`] can only come from [`Isa::detect`] or
//! [`Isa::available`], which query the CPU. So holding one proves that its table may run.

use crate::acts::RowTarget;
use crate::block::DType;
use crate::items::{
    AdamWStep, CachedHead, DequantFn, Head, HeadGrad, NnItem, NtItem, SoftmaxState, StripFn, TnItem, UnpackFn,
};
use crate::kv::KvHead;
use crate::{portable, scalar};

/// The kernels of one instruction set. Every function may only run on a CPU that has it.
#[derive(Clone, Copy)]
pub(crate) struct Table {
    /// Columns of a strip of the forward product and of the weight gradient.
    pub nt_strip: usize,
    /// Rows of the integer tile; with 1, rows are plain.
    pub act_tile: usize,
    /// Whether products with int8 activations are faster here.
    pub int8_products: bool,
    /// Whether input gradients are faster with int8 gradients.
    pub int8_gradient: bool,
    pub nt_item: unsafe fn(&NtItem<'_>, usize, &mut [f32]),
    pub nn_item: unsafe fn(&NnItem<'_>, usize, &mut [f32]),
    pub tn_item: unsafe fn(&TnItem<'_>, usize, &mut [f32]),
    pub unpack: UnpackFn,
    pub dequant: DequantFn,
    pub strip: StripFn,
    pub dot_rows: unsafe fn(DType, &[u8], &[i8], &[f32], &[f32], &mut [f32]),
    pub dot_nt: unsafe fn(f32, &[f32], usize, usize, &[f32], usize, &mut [f32]),
    pub outer_tn: unsafe fn(&[f32], &[f32], usize, usize, usize, usize, usize, *mut f32, bool),
    pub quantize_row: unsafe fn(&[f32], bool, RowTarget),
    pub rmsnorm_row: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    pub rmsnorm_bwd_row: unsafe fn(&[f32], &[f32], f32, &[f32], &mut [f32]),
    pub rope_head: unsafe fn(&mut [f32], &[f32], &[f32], f32),
    pub swiglu: unsafe fn(&[f32], &[f32], &mut [f32]),
    pub swiglu_bwd: unsafe fn(&mut [f32], &mut [f32], &[f32]),
    pub swiglu_bwd_gains: unsafe fn(&mut [f32], &mut [f32], &[f32], [&[f32]; 2], [&mut [f32]; 2]),
    pub gain_bwd: unsafe fn(usize, *const f32, (*const f32, *const f32), *const f32, *mut f32, *mut f32),
    pub ce_chunk_row: unsafe fn(&mut [f32], usize, usize, &mut SoftmaxState) -> f32,
    pub axpy: unsafe fn(f32, &[f32], &mut [f32]),
    pub scale: unsafe fn(f32, &mut [f32]),
    pub attention: unsafe fn(&Head, &mut [f32]),
    pub attention_bwd: unsafe fn(&Head, &HeadGrad, &mut [f32]),
    pub attention_decode: unsafe fn(&[CachedHead], &mut [f32]),
    pub kv_expand: unsafe fn(&KvHead, usize, usize, &mut [f32]),
    pub adamw: unsafe fn(&mut [f32], &[f32], &mut [f32], &mut [f32], &AdamWStep),
}

/// The specification.
static SCALAR: Table = Table {
    nt_strip: scalar::products::STRIP,
    act_tile: 1,
    int8_products: true,
    int8_gradient: false,
    nt_item: scalar::products::nt_item,
    nn_item: scalar::products::nn_item,
    tn_item: scalar::products::tn_item,
    unpack: scalar::decode::unpack,
    dequant: scalar::decode::dequantize,
    strip: scalar::products::dequantize_strip,
    dot_rows: scalar::decode::dot_rows,
    dot_nt: scalar::ops::dot_nt,
    outer_tn: scalar::ops::outer_tn,
    quantize_row: scalar::ops::quantize_row_into,
    rmsnorm_row: scalar::ops::rmsnorm_row,
    rmsnorm_bwd_row: scalar::ops::rmsnorm_bwd_row,
    rope_head: scalar::ops::rope_head,
    swiglu: scalar::ops::swiglu,
    swiglu_bwd: scalar::ops::swiglu_bwd,
    swiglu_bwd_gains: scalar::ops::swiglu_bwd_gains,
    gain_bwd: scalar::ops::gain_bwd,
    ce_chunk_row: scalar::ops::ce_chunk_row,
    axpy: scalar::ops::axpy,
    scale: scalar::ops::scale,
    attention: scalar::attention::attention,
    attention_bwd: scalar::attention::attention_bwd,
    attention_decode: scalar::attention::attention_decode,
    kv_expand: scalar::attention::kv_expand,
    adamw: scalar::ops::adamw,
};

/// Its bf16 part.
static SCALAR_BF16: Bf16Table =
    Bf16Table { nn_item: scalar_bf16_nn_item, round_row: scalar::products::round_bf16 };

/// The scalar item reads its rows in any form.
unsafe fn scalar_bf16_nn_item(it: &NnItem<'_>, _: &[u16], c0: usize, scratch: &mut [f32]) {
    // SAFETY: the caller's contract.
    unsafe { scalar::products::nn_item(it, c0, scratch) }
}

/// The input gradient in bf16, for instruction sets that multiply bf16 only on some CPUs.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Table {
    pub nn_item: unsafe fn(&NnItem<'_>, &[u16], usize, &mut [f32]),
    pub round_row: unsafe fn(&[f32], *mut u16),
}

/// Compiles the bf16 part for one ISA.
macro_rules! bf16_table {
    ($table:ident, $simd:ty, $features:literal) => {
        mod $table {
            use super::*;
            use crate::generic::bf16::{self, Bf16};
            use crate::generic::simd::Simd;

            #[target_feature(enable = $features)]
            unsafe fn nn_item(it: &NnItem<'_>, dy: &[u16], c0: usize, scratch: &mut [f32]) {
                // SAFETY: the caller holds the token of this ISA and keeps the callee's contract.
                unsafe {
                    bf16::nn_item::<$simd, { <$simd>::MR }, { <$simd as Simd>::NV }>(it, dy, c0, scratch)
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn round_row(x: &[f32], out: *mut u16) {
                // SAFETY: as above.
                unsafe { bf16::round_row::<$simd>(x, out) }
            }

            pub(super) static TABLE: Bf16Table = Bf16Table { nn_item, round_row };
        }
    };
}

/// Functions compiled for one ISA that call generic ones.
macro_rules! compiled {
    ($features:tt $($name:ident($($arg:ident: $ty:ty),*) $(-> $out:ty)? => $f:path;)*) => {
        $(compiled!(@one $features $name($($arg: $ty),*) $(-> $out)? => $f);)*
    };
    (@one [$($feature:meta)?] $name:ident($($arg:ident: $ty:ty),*) $(-> $out:ty)? => $f:path) => {
        $(#[$feature])?
        unsafe fn $name($($arg: $ty),*) $(-> $out)? {
            // SAFETY: the caller holds the token of this ISA and keeps the callee's contract.
            unsafe { $f($($arg),*) }
        }
    };
}

/// Compiles the generic algorithms for one ISA: functions with its target features, and their table; `products`
/// are the fields specific to this ISA.
macro_rules! isa_table {
    ($table:ident, $simd:ty, $features:tt, functions { $($functions:tt)* }, fields { $($fields:tt)* }) => {
        mod $table {
            use super::*;
            use crate::generic::simd::Simd;
            #[allow(unused_imports, reason = "the portable products are not of these")]
            use crate::generic::{adamw, attention, gemm, rows, simd::Int8, skinny};
            type S = $simd;
            const NV: usize = S::NV;
            const FMR: usize = S::F32_MR;

            compiled!($features
                $($functions)*
                dot_nt(s: f32, x: &[f32], rows: usize, k: usize, p: &[f32], r: usize, h: &mut [f32])
                    => skinny::dot_nt::<S, { S::DOT_TR }>;
                outer_tn(p: &[f32], q: &[f32], m: usize, r: usize, n: usize, n0: usize, cols: usize, out: *mut f32, acc: bool)
                    => skinny::outer_tn::<S, FMR, NV>;
                quantize_row(x: &[f32], halves: bool, t: RowTarget) => rows::quantize_row::<S>;
                rmsnorm_row(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) => rows::rmsnorm_row::<S>;
                rmsnorm_bwd_row(x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) => rows::rmsnorm_bwd_row::<S>;
                rope_head(x: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) => rows::rope_head::<S>;
                swiglu(g: &[f32], u: &[f32], h: &mut [f32]) => rows::swiglu::<S>;
                swiglu_bwd(g: &mut [f32], u: &mut [f32], dh: &[f32]) => rows::swiglu_bwd::<S>;
                swiglu_bwd_gains(g: &mut [f32], u: &mut [f32], dh: &[f32], c: [&[f32]; 2], s: [&mut [f32]; 2])
                    => rows::swiglu_bwd_gains::<S>;
                gain_bwd(n: usize, dy: *const f32, y: (*const f32, *const f32), c: *const f32, dz: *mut f32, s: *mut f32)
                    => rows::gain_bwd::<S>;
                ce_chunk_row(l: &mut [f32], first: usize, target: usize, st: &mut SoftmaxState) -> f32
                    => rows::ce_chunk_row::<S>;
                axpy(a: f32, x: &[f32], y: &mut [f32]) => rows::axpy::<S>;
                scale(a: f32, y: &mut [f32]) => rows::scale::<S>;
                attention(h: &Head, scratch: &mut [f32]) => attention::forward::<S, FMR, NV>;
                attention_bwd(h: &Head, g: &HeadGrad, scratch: &mut [f32]) => attention::backward::<S, FMR, NV>;
                attention_decode(h: &[CachedHead], scratch: &mut [f32]) => attention::decode::<S>;
                kv_expand(kv: &KvHead, rows: usize, hd: usize, out: &mut [f32]) => attention::expand::<S>;
                adamw(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], s: &AdamWStep) => adamw::adamw::<S>;
            );

            pub(super) static TABLE: Table = Table {
                dot_nt, outer_tn, quantize_row, rmsnorm_row, rmsnorm_bwd_row, rope_head, swiglu, swiglu_bwd,
                swiglu_bwd_gains, gain_bwd, ce_chunk_row, axpy, scale, attention, attention_bwd, attention_decode,
                kv_expand, adamw,
                $($fields)*
            };
        }
    };
    ($table:ident, $simd:ty, $features:tt, $decode:ident, $dot_rows:path) => {
        isa_table!($table, $simd, $features,
            functions {
                nt_item(it: &NtItem<'_>, n0: usize, scratch: &mut [f32])
                    => gemm::nt_item::<S, FMR, { S::I8_MR }, NV>;
                nn_item(it: &NnItem<'_>, c0: usize, scratch: &mut [f32])
                    => gemm::nn_item::<S, FMR, { S::I8_MR }, NV>;
                tn_item(it: &TnItem<'_>, k0: usize, scratch: &mut [f32]) => gemm::tn_item::<S, FMR, NV>;
            },
            fields {
                nt_strip: S::NV * S::LANES,
                act_tile: const {
                    assert!(S::I8_MR <= crate::acts::TILE_ROWS_MAX);
                    S::I8_MR
                },
                int8_products: true,
                int8_gradient: S::INT8_GRADIENT,
                nt_item,
                nn_item,
                tn_item,
                unpack: $decode::unpack,
                dequant: $decode::dequantize,
                strip: $decode::dequantize_strip,
                dot_rows: $dot_rows,
            });
    };
}

isa_table!(
    portable_table,
    portable::Portable,
    [],
    functions {},
    fields {
        nt_strip: portable::STRIP,
        act_tile: 1,
        int8_products: false,
        int8_gradient: false,
        nt_item: portable::nt_item,
        nn_item: portable::nn_item,
        tn_item: portable::tn_item,
        unpack: scalar::decode::unpack,
        dequant: scalar::decode::dequantize,
        strip: scalar::products::dequantize_strip,
        dot_rows: scalar::decode::dot_rows,
    }
);

#[cfg(target_arch = "x86_64")]
mod own {
    use std::is_x86_feature_detected as has;

    use super::*;
    use crate::x86_64::{avx2, avx512, decode, dot, dot_avx512};

    isa_table! { avx2_table, avx2::Avx2, [target_feature(enable = "avx2,fma,f16c")], decode, dot::dot_rows_avx2 }
    isa_table! {
        avxvnni_table, avx2::AvxVnni, [target_feature(enable = "avx2,fma,f16c,avxvnni")], decode, dot::dot_rows_avxvnni
    }
    isa_table! {
        avx512_table, avx512::Avx512,
        [target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")],
        decode, dot_avx512::dot_rows_avx512
    }

    bf16_table!(
        avx512_bf16_table,
        avx512::Avx512,
        "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16"
    );

    pub(super) static SETS: [Set; 3] = [
        Set { name: "avx2", table: &avx2_table::TABLE, present: has_avx2, bf16: None },
        Set {
            name: "avxvnni",
            table: &avxvnni_table::TABLE,
            present: || has_avx2() && has!("avxvnni"),
            bf16: None,
        },
        Set {
            name: "avx512",
            table: &avx512_table::TABLE,
            present: has_avx512,
            bf16: Some((&avx512_bf16_table::TABLE, || has!("avx512bf16"))),
        },
    ];

    fn has_avx2() -> bool {
        has!("avx2") && has!("fma") && has!("f16c")
    }

    fn has_avx512() -> bool {
        let vectors = has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
        has_avx2() && vectors && has!("avx512vnni")
    }
}

#[cfg(target_arch = "aarch64")]
mod own {
    use std::arch::is_aarch64_feature_detected as has;

    use super::*;
    use crate::aarch64::{decode, dot, dotprod, i8mm, neon};

    isa_table! { neon_table, neon::Neon, [target_feature(enable = "neon")], decode, dot::dot_rows_neon }
    isa_table! {
        dotprod_table, dotprod::DotProd, [target_feature(enable = "neon,dotprod")], decode, dot::dot_rows_dotprod
    }
    isa_table! {
        i8mm_table, i8mm::I8mm, [target_feature(enable = "neon,dotprod,i8mm")], decode, dot::dot_rows_dotprod
    }

    bf16_table!(i8mm_bf16_table, i8mm::I8mm, "neon,dotprod,i8mm,bf16");

    pub(super) static SETS: [Set; 3] = [
        Set { name: "neon", table: &neon_table::TABLE, present: || has!("neon"), bf16: None },
        Set {
            name: "dotprod",
            table: &dotprod_table::TABLE,
            present: || has!("neon") && has!("dotprod"),
            bf16: None,
        },
        Set {
            name: "i8mm",
            table: &i8mm_table::TABLE,
            present: || has!("neon") && has!("dotprod") && has!("i8mm"),
            bf16: Some((&i8mm_bf16_table::TABLE, || has!("bf16"))),
        },
    ];
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod own {
    pub(super) static SETS: [super::Set; 0] = [];
}

/// An instruction set.
struct Set {
    name: &'static str,
    table: &'static Table,
    /// Whether this CPU has it.
    present: fn() -> bool,
    /// Its bf16 part, and whether this CPU has that too.
    bf16: Option<(&'static Bf16Table, fn() -> bool)>,
}

/// The sets that every CPU has.
static PLAIN: [Set; 2] = [
    Set { name: "scalar", table: &SCALAR, present: || true, bf16: Some((&SCALAR_BF16, || true)) },
    Set { name: "portable", table: &portable_table::TABLE, present: || true, bf16: None },
];

/// An instruction set that this CPU has: its place among the plain ones, then the architecture's own, weakest
/// first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Isa(usize);

impl std::fmt::Debug for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl Isa {
    /// The specification: plain Rust, everywhere.
    pub const SCALAR: Isa = Isa(0);

    /// The fallback for CPUs without their own kernels: plain vectors, and products by the gemm crate.
    pub const PORTABLE: Isa = Isa(1);

    fn set(self) -> &'static Set {
        PLAIN.get(self.0).unwrap_or_else(|| &own::SETS[self.0 - PLAIN.len()])
    }

    /// The instruction sets this CPU has, weakest first.
    pub fn available() -> impl DoubleEndedIterator<Item = Isa> {
        (0..PLAIN.len() + own::SETS.len()).map(Isa).filter(|isa| (isa.set().present)())
    }

    /// The strongest instruction set this CPU has.
    pub fn detect() -> Isa {
        Isa::available().next_back().unwrap_or(Isa::SCALAR)
    }

    /// The available instruction set with this name.
    pub fn from_name(name: &str) -> Option<Isa> {
        Isa::available().find(|i| i.name() == name)
    }

    /// Its name, as [`Isa::from_name`] takes it.
    pub fn name(self) -> &'static str {
        self.set().name
    }

    /// The bf16 part of its kernels, if this CPU has the instructions.
    pub(crate) fn bf16(self) -> Option<&'static Bf16Table> {
        self.set().bf16.filter(|(_, present)| present()).map(|(table, _)| table)
    }

    /// Its kernels.
    pub(crate) fn table(self) -> &'static Table {
        self.set().table
    }

    /// [`scalar::decode::unpack`] on this instruction set.
    ///
    /// # Panics
    /// As the scalar version.
    pub fn unpack(
        self,
        dtype: DType,
        row: &[u8],
        start: usize,
        codes: &mut [i8],
        scale: &mut [f32],
        bias: &mut [f32],
    ) {
        // SAFETY: holding the token proves that the CPU has the instruction set.
        unsafe { (self.table().unpack)(dtype, row, start, codes, scale, bias) }
    }

    /// [`scalar::decode::dequantize`] on this instruction set.
    ///
    /// # Panics
    /// As the scalar version.
    pub fn dequantize(self, dtype: DType, row: &[u8], start: usize, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { (self.table().dequant)(dtype, row, start, out) }
    }

    /// [`scalar::decode::dot_rows`] on this instruction set.
    ///
    /// # Panics
    /// As the scalar version.
    pub fn dot_rows(self, dtype: DType, rows: &[u8], xq: &[i8], xd: &[f32], xs: &[f32], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { (self.table().dot_rows)(dtype, rows, xq, xd, xs, out) }
    }
}
