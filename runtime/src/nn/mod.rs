//! The network on slices: each block's forward and backward side by side, and the head with its loss.
//!
//! Nothing here allocates, logs or fails. Shapes were validated earlier, buffers come from the arena, and every
//! gradient overwrites its value's buffer after the value's last use.
//!
//! ```
//! use engraft_runtime::ModelFile;
//! use engraft_runtime::nn::rope;
//!
//! # fn main() -> engraft_runtime::Result<()> {
//! let model = ModelFile::open("../targets/cli/seedling.gguf")?;
//! let mut table = vec![0.0; rope::table_words(model.config(), 16)];
//! rope::table(model.config(), model.rope_freqs(), &mut table);
//! // Position 0 turns nothing: cosine 1, sine 0.
//! assert!(table[0] == 1.0);
//! # Ok(())
//! # }
//! ```

pub mod block;
pub mod divergence;
pub mod dora;
pub mod head;
pub mod keep;
pub mod linear;
pub mod rope;

use std::ops::Range;

use engraft_kernels::{Kernels, QMatrix, Rows};
use strum::IntoStaticStr;

use crate::model::ModelConfig;

/// How matrix products treat their left operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum Precision {
    /// Activations in int8 blocks of 32 wherever the weights are quantized blocks.
    Int8,
    /// f32 throughout; the weights' exact values.
    F32,
}

impl Precision {
    /// All of them, by the names that [`Precision::name`] gives.
    pub const ALL: [Precision; 2] = [Precision::Int8, Precision::F32];

    /// Its name, in files and settings.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// How input gradients treat dy and W. Shapes that don't divide into blocks of 32 are computed in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum GradientPrecision {
    /// Both in int8, dy in blocks along its rows and W's columns in groups of 32 rows, as in SwitchBack
    /// (Wortsman et al., arXiv 2304.13013).
    Int8,
    /// Both rounded to bf16 if the CPU multiplies bf16, else in f32.
    Bf16,
    /// f32 throughout.
    F32,
}

impl GradientPrecision {
    /// All of them, by the names that [`GradientPrecision::name`] gives.
    pub const ALL: [GradientPrecision; 3] =
        [GradientPrecision::Int8, GradientPrecision::Bf16, GradientPrecision::F32];

    /// Its name, in files and settings.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

impl From<Precision> for GradientPrecision {
    fn from(p: Precision) -> Self {
        match p {
            Precision::Int8 => GradientPrecision::Int8,
            Precision::F32 => GradientPrecision::F32,
        }
    }
}

/// What every function in this module needs.
#[derive(Clone, Copy)]
pub struct Ctx<'a> {
    /// The kernels and their threads.
    pub kernels: &'a Kernels,
    /// The model's shapes.
    pub config: &'a ModelConfig,
    /// Cosines and sines per position; see [`rope::table`].
    pub rope: &'a [f32],
    /// How products are computed.
    pub precision: Precision,
    /// How input gradients are computed.
    pub gradient: GradientPrecision,
}

impl<'a> Ctx<'a> {
    /// A context that computes input gradients at the products' precision.
    pub fn new(
        kernels: &'a Kernels,
        config: &'a ModelConfig,
        rope: &'a [f32],
        precision: Precision,
    ) -> Ctx<'a> {
        Ctx { kernels, config, rope, precision, gradient: precision.into() }
    }

    /// The same with another precision for input gradients.
    pub fn with_gradient(self, gradient: GradientPrecision) -> Ctx<'a> {
        Ctx { gradient, ..self }
    }
}

impl Ctx<'_> {
    /// Whether products with w take int8 activations.
    pub fn is_int8(&self, w: &QMatrix<'_>) -> bool {
        self.precision == Precision::Int8 && self.kernels.int8_product(w)
    }

    /// A gradient dy `[m, out]` of a product with w, in the form [`Kernels::qgemm_nn`] reads; rounded values go
    /// to `words`.
    pub fn gradient_rows<'a>(
        &self,
        dy: &'a [f32],
        m: usize,
        w: &QMatrix<'_>,
        words: &'a mut [f32],
    ) -> Rows<'a> {
        let n = w.rows();
        match self.gradient {
            GradientPrecision::Int8 if self.kernels.int8_gradient(w) => {
                Rows::Int8(self.kernels.quantize_gradient(dy, m, n, words))
            }
            GradientPrecision::Bf16 if self.kernels.bf16_gradient(w) => {
                Rows::Bf16(self.kernels.round_gradient(dy, m, n, words))
            }
            _ => Rows::F32(dy),
        }
    }
}

/// The rows of a micro-batch: sequences one after another, without padding.
#[derive(Clone, Copy)]
pub struct RowMap<'a> {
    /// Row range of each sequence.
    pub seqs: &'a [Range<usize>],
    /// Position of each row within its sequence.
    pub pos: &'a [u32],
}

impl RowMap<'_> {
    /// Total rows.
    pub fn rows(&self) -> usize {
        self.pos.len()
    }
}

/// One projection's adapter: y += scale·(x·Aᵀ)·Bᵀ; if there is a gain, y is then multiplied by it.
#[derive(Clone, Copy)]
pub struct Pair<'a> {
    /// A `[r, in]`.
    pub a: &'a [f32],
    /// Bᵀ `[r, out]`: along `out`, as every product reads it.
    pub bt: &'a [f32],
    /// r.
    pub rank: usize,
    /// s: alpha / r, or alpha / √r with rsLoRA.
    pub scale: f32,
    /// DoRA's part.
    pub gain: Option<Gain<'a>>,
}

/// DoRA's factors for the output rows of a projection.
#[derive(Clone, Copy)]
pub struct Gain<'a> {
    /// c = m/‖W + s·B·A‖ `[out]`.
    pub c: &'a [f32],
    /// m `[out]`; only the backward reads it.
    pub m: &'a [f32],
}

/// The adapter of one block, by projection.
pub type BlockPairs<'a> = [Option<Pair<'a>>; 7];

/// Adapters as blocks read them: a single one, or several stacked.
pub trait Adapted {
    /// The pairs of block `layer`; none if it isn't adapted.
    fn pairs(&self, layer: usize) -> BlockPairs<'_>;
}

/// Gradients of one projection: of its adapter, shaped as [`Pair`], or of its weights.
pub struct PairGrad<'a> {
    /// dA `[r, in]`, added to.
    pub a: &'a mut [f32],
    /// dBᵀ `[r, out]`, added to.
    pub bt: &'a mut [f32],
    /// dm `[out]`, added to; empty without DoRA.
    pub m: &'a mut [f32],
    /// dW `[out, in]`, if the weights are trained.
    pub w: Option<WeightGrad<'a>>,
}

/// The gradient of a stored tensor.
pub struct WeightGrad<'a> {
    /// Shaped as the tensor.
    pub dw: &'a mut [f32],
    /// Whether to add to it instead of overwriting it.
    pub accumulate: bool,
}

impl<'a> WeightGrad<'a> {
    /// The values to add to, zeroed first unless accumulating.
    pub(crate) fn begun(self) -> &'a mut [f32] {
        if !self.accumulate {
            self.dw.fill(0.0);
        }
        self.dw
    }
}

/// Gradients of one block's adapter.
pub type BlockPairGrads<'a> = [Option<PairGrad<'a>>; 7];

/// Gradients of one block, and of its norms if they are trained.
pub struct BlockGrads<'a> {
    /// By projection.
    pub pairs: BlockPairGrads<'a>,
    /// Of the norm before attention and of that before the MLP, `[d]` each.
    pub norms: [Option<WeightGrad<'a>>; 2],
}

impl<'a> From<BlockPairGrads<'a>> for BlockGrads<'a> {
    fn from(pairs: BlockPairGrads<'a>) -> Self {
        BlockGrads { pairs, norms: [None, None] }
    }
}

/// Dropout on the adapter's branch: which elements are dropped depends only on these numbers.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// Probability of dropping an element; 0 is off.
    pub p: f32,
    /// Different for each seed, step, micro-batch and block.
    pub key: u64,
}

impl Dropout {
    /// No dropout.
    pub const OFF: Dropout = Dropout { p: 0.0, key: 0 };
}
