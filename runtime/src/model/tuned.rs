//! Every weight of a model as trainable f32, and a handle to weights of either kind.

use std::ops::Range;
use std::sync::Arc;

use engraft_kernels::{Kernels, QMatrix};

use super::config::{ModelConfig, Proj};
use super::gguf::TensorInfo;
use super::weights::{FrozenBlock, ModelFile};

/// Where each tensor lies among a model's parameters: embedding, head (unless tied to it) and last norm, then
/// each block's two norms and its projections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunedLayout {
    d: usize,
    vocab: usize,
    tied: bool,
    n_layers: usize,
    /// Within a block: the norms come before.
    proj: [Range<usize>; 7],
}

impl TunedLayout {
    /// The layout of a model.
    pub fn new(c: &ModelConfig) -> TunedLayout {
        let mut end = 2 * c.d_model;
        let proj = Proj::ALL.map(|p| {
            let (out, inner) = p.shape(c);
            let start = end;
            end += out * inner;
            start..end
        });
        TunedLayout { d: c.d_model, vocab: c.vocab, tied: c.tied, n_layers: c.n_layers, proj }
    }

    /// Parameters in all.
    pub fn len(&self) -> usize {
        self.outer().end + self.n_layers * self.block_len()
    }

    /// Never: a model has parameters.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Everything outside the blocks.
    pub fn outer(&self) -> Range<usize> {
        0..self.output_norm().end
    }

    /// The embedding, `[V, d]`.
    pub fn token_embd(&self) -> Range<usize> {
        0..self.vocab * self.d
    }

    /// The head, `[V, d]`: the embedding itself if the model ties them.
    pub fn output(&self) -> Range<usize> {
        let n = self.vocab * self.d;
        if self.tied { 0..n } else { n..2 * n }
    }

    /// The last norm, `[d]`.
    pub fn output_norm(&self) -> Range<usize> {
        let start = self.output().end;
        start..start + self.d
    }

    /// Parameters of one block.
    pub fn block_len(&self) -> usize {
        self.proj[6].end
    }

    /// Block `l`.
    pub fn block(&self, l: usize) -> Range<usize> {
        let start = self.outer().end + l * self.block_len();
        start..start + self.block_len()
    }

    /// The norms before attention and before the MLP, within a block.
    pub fn norms(&self) -> [Range<usize>; 2] {
        [0..self.d, self.d..2 * self.d]
    }

    /// A projection, `[out, in]`, within a block.
    pub fn proj(&self, p: Proj) -> Range<usize> {
        self.proj[p as usize].clone()
    }

    /// The tensor with a GGUF name; `None` if it isn't trained.
    pub fn tensor(&self, name: &str) -> Option<Range<usize>> {
        match name {
            "token_embd.weight" => return Some(self.token_embd()),
            "output.weight" if !self.tied => return Some(self.output()),
            "output_norm.weight" => return Some(self.output_norm()),
            _ => {}
        }
        let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        let block = self.block(layer.parse().ok().filter(|l| *l < self.n_layers)?);
        let within = match rest.strip_suffix(".weight")? {
            "attn_norm" => self.norms()[0].clone(),
            "ffn_norm" => self.norms()[1].clone(),
            proj => self.proj(Proj::ALL.into_iter().find(|p| p.gguf_name() == proj)?),
        };
        Some(block.start + within.start..block.start + within.end)
    }
}

/// A model whose weights are f32 in memory; its file still tells shapes, tokenizer and metadata.
pub struct TunedModel {
    base: Arc<ModelFile>,
    layout: TunedLayout,
    values: Vec<f32>,
}

impl TunedModel {
    /// The weights of a file, dequantized. Allocates 4 bytes for each parameter.
    pub fn new(base: Arc<ModelFile>, kernels: &Kernels) -> TunedModel {
        let c = base.config();
        let layout = TunedLayout::new(c);
        let mut values = vec![0.0; layout.len()];
        let mut matrix = |at: Range<usize>, w: QMatrix<'_>| {
            kernels.rows(w.cols(), &mut values[at], |r, row| kernels.dequantize_row(&w, r, row));
        };
        matrix(layout.token_embd(), base.token_embd());
        if !c.tied {
            matrix(layout.output(), base.output());
        }
        for l in 0..c.n_layers {
            let (at, block) = (layout.block(l).start, base.block(l));
            for p in Proj::ALL {
                let within = layout.proj(p);
                matrix(at + within.start..at + within.end, block.proj(p));
            }
        }
        values[layout.output_norm()].copy_from_slice(base.output_norm());
        for l in 0..c.n_layers {
            let (block, [first, second]) = (base.block(l), layout.norms());
            let values = &mut values[layout.block(l)];
            values[first].copy_from_slice(block.attn_norm);
            values[second].copy_from_slice(block.ffn_norm);
        }
        TunedModel { base, layout, values }
    }

    /// The file that the weights came from.
    pub fn base(&self) -> &Arc<ModelFile> {
        &self.base
    }

    /// Where each tensor lies.
    pub fn layout(&self) -> &TunedLayout {
        &self.layout
    }

    /// All parameters.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// All parameters, to be changed.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// The values of a tensor of the file; `None` if it isn't trained.
    pub fn tensor(&self, tensor: &TensorInfo) -> Option<&[f32]> {
        self.layout.tensor(&tensor.name).map(|at| &self.values[at])
    }

    /// The token embedding, `[V, d]`.
    pub fn token_embd(&self) -> QMatrix<'_> {
        self.matrix(self.layout.token_embd(), self.layout.vocab, self.layout.d)
    }

    /// The head, `[V, d]`.
    pub fn output(&self) -> QMatrix<'_> {
        self.matrix(self.layout.output(), self.layout.vocab, self.layout.d)
    }

    /// The weights of block `l`.
    ///
    /// # Panics
    /// If `l` is not below `n_layers`.
    pub fn block(&self, l: usize) -> FrozenBlock<'_> {
        let (at, c) = (self.layout.block(l), self.base.config());
        let [first, second] = self.layout.norms();
        let block = &self.values[at.clone()];
        FrozenBlock {
            attn_norm: &block[first],
            ffn_norm: &block[second],
            proj: Proj::ALL.map(|p| {
                let (within, (out, inner)) = (self.layout.proj(p), p.shape(c));
                self.matrix(at.start + within.start..at.start + within.end, out, inner)
            }),
        }
    }

    fn matrix(&self, at: Range<usize>, rows: usize, cols: usize) -> QMatrix<'_> {
        QMatrix::of_f32(rows, cols, &self.values[at]).expect("the layout gives each tensor its own size")
    }
}

/// A model's weights: in its file, or tuned in memory. Cloning shares them.
#[derive(Clone)]
pub enum Weights {
    /// As the file stores them.
    Stored(Arc<ModelFile>),
    /// As f32.
    Tuned(Arc<TunedModel>),
}

impl From<Arc<ModelFile>> for Weights {
    fn from(model: Arc<ModelFile>) -> Weights {
        Weights::Stored(model)
    }
}

impl From<Arc<TunedModel>> for Weights {
    fn from(model: Arc<TunedModel>) -> Weights {
        Weights::Tuned(model)
    }
}

impl Weights {
    /// Whether both are the same weights in memory, not merely equal ones.
    pub fn is(&self, other: &Weights) -> bool {
        match (self, other) {
            (Weights::Stored(a), Weights::Stored(b)) => Arc::ptr_eq(a, b),
            (Weights::Tuned(a), Weights::Tuned(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// The model's file.
    pub fn file(&self) -> &Arc<ModelFile> {
        match self {
            Weights::Stored(model) => model,
            Weights::Tuned(model) => &model.base,
        }
    }

    /// Shapes and constants.
    pub fn config(&self) -> &ModelConfig {
        self.file().config()
    }

    /// Divisors of the rotary frequencies, where the model has them.
    pub fn rope_freqs(&self) -> Option<&[f32]> {
        self.file().rope_freqs()
    }

    /// The token embedding, `[V, d]`.
    pub fn token_embd(&self) -> QMatrix<'_> {
        match self {
            Weights::Stored(model) => model.token_embd(),
            Weights::Tuned(model) => model.token_embd(),
        }
    }

    /// The head, `[V, d]`.
    pub fn output(&self) -> QMatrix<'_> {
        match self {
            Weights::Stored(model) => model.output(),
            Weights::Tuned(model) => model.output(),
        }
    }

    /// Weight of the norm before the head, `[d]`.
    pub fn output_norm(&self) -> &[f32] {
        match self {
            Weights::Stored(model) => model.output_norm(),
            Weights::Tuned(model) => &model.values[model.layout.output_norm()],
        }
    }

    /// The weights of block `l`.
    ///
    /// # Panics
    /// If `l` is not below `n_layers`.
    pub fn block(&self, l: usize) -> FrozenBlock<'_> {
        match self {
            Weights::Stored(model) => model.block(l),
            Weights::Tuned(model) => model.block(l),
        }
    }
}
