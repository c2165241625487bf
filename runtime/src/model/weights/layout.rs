//! Which tensor is which: every tensor the hyperparameters imply, with exactly the implied shape, and no
//! others.

use crate::error::{ErrorKind, Result};
use crate::model::config::{ModelConfig, Proj};
use crate::model::gguf::{Gguf, quote};

/// Indices into [`Gguf::tensors`].
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) token_embd: usize,
    /// `None` when the head is the embedding.
    pub(super) output: Option<usize>,
    pub(super) output_norm: usize,
    pub(super) rope_freqs: Option<usize>,
    pub(super) blocks: Vec<BlockLayout>,
}

#[derive(Debug)]
pub(super) struct BlockLayout {
    attn_norm: usize,
    ffn_norm: usize,
    /// In the order of [`Proj::ALL`].
    pub(super) proj: [usize; 7],
}

impl Layout {
    /// Finds every tensor.
    ///
    /// # Errors
    /// `Corrupt` for a missing tensor or a wrong shape, `Unsupported` for an extra one.
    pub(super) fn of(gguf: &Gguf, c: &ModelConfig) -> Result<Layout> {
        let mut seats = Seats { gguf, taken: vec![false; gguf.tensors().len()] };
        let layout = Layout {
            token_embd: seats.take("token_embd.weight", &[c.d_model, c.vocab])?,
            output: seats.take_if_present("output.weight", &[c.d_model, c.vocab])?,
            output_norm: seats.take("output_norm.weight", &[c.d_model])?,
            rope_freqs: seats.take_if_present("rope_freqs.weight", &[c.rope_dim / 2])?,
            blocks: (0..c.n_layers).map(|l| block(&mut seats, c, l)).collect::<Result<_>>()?,
        };
        seats.none_left()?;
        Ok(layout)
    }

    /// All norm vectors: the output's, then each block's for attention and for the MLP.
    pub(super) fn norms(&self) -> impl Iterator<Item = usize> {
        let of_blocks = self.blocks.iter().flat_map(|b| [b.attn_norm, b.ffn_norm]);
        std::iter::once(self.output_norm).chain(of_blocks)
    }
}

fn block(seats: &mut Seats<'_>, c: &ModelConfig, l: usize) -> Result<BlockLayout> {
    let mut proj = [0; 7];
    for (index, p) in proj.iter_mut().zip(Proj::ALL) {
        let (out, inner) = p.shape(c);
        *index = seats.take(&p.tensor_name(l), &[inner, out])?;
    }
    Ok(BlockLayout {
        attn_norm: seats.take(&format!("blk.{l}.attn_norm.weight"), &[c.d_model])?,
        ffn_norm: seats.take(&format!("blk.{l}.ffn_norm.weight"), &[c.d_model])?,
        proj,
    })
}

/// The file's tensors, and which of them are already assigned.
struct Seats<'a> {
    gguf: &'a Gguf,
    taken: Vec<bool>,
}

impl Seats<'_> {
    fn take(&mut self, name: &str, dims: &[usize]) -> Result<usize> {
        self.take_if_present(name, dims)?.ok_or_else(|| {
            self.gguf.error(
                ErrorKind::Corrupt,
                format!("tensor {name} is missing; the hyperparameters imply it, with shape {dims:?}"),
            )
        })
    }

    fn take_if_present(&mut self, name: &str, dims: &[usize]) -> Result<Option<usize>> {
        let Some(index) = self.gguf.tensor_index(name) else { return Ok(None) };
        let found = &*self.gguf.tensors()[index].dims;
        if found != dims {
            return Err(self.gguf.error(
                ErrorKind::Corrupt,
                format!("tensor {name} has shape {found:?}; the hyperparameters imply {dims:?}"),
            ));
        }
        self.taken[index] = true;
        Ok(Some(index))
    }

    fn none_left(&self) -> Result<()> {
        let left = self.taken.iter().filter(|&&taken| !taken).count();
        let Some(first) = self.taken.iter().position(|&taken| !taken) else { return Ok(()) };
        let name = &self.gguf.tensors()[first].name;
        let why = if name.ends_with(".bias") {
            "biases are not supported"
        } else {
            "ignoring it would compute a different model"
        };
        Err(self.gguf.error(
            ErrorKind::Unsupported,
            format!("tensor {} ({left} in all) has no place in a llama model: {why}", quote(name)),
        ))
    }
}
