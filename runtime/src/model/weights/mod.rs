//! A model file opened for use: validated hyperparameters and views of weights that stay in the map.

mod digest;
mod hparams;
mod layout;

use std::path::Path;
use std::sync::OnceLock;

use engraft_kernels::QMatrix;
use engraft_kernels::scalar::decode::dequantize;

use crate::error::{ErrorKind, Result};
use crate::model::config::{ModelConfig, Proj};
use crate::model::digest_cache::DigestCache;
use crate::model::gguf::Gguf;
use crate::model::map::Map;
use crate::storage::Disk;

use layout::Layout;

/// A llama-architecture model in a GGUF file. Immutable; share it between threads by reference.
///
/// Private memory: the description of the file, and the norm vectors as f32 (some hundred KiB). The
/// matrices are views of the map.
#[derive(Debug)]
pub struct ModelFile {
    map: Map,
    gguf: Gguf,
    config: ModelConfig,
    layout: Layout,
    /// `[1 + 2·n_layers, d_model]`: the output norm, then attention and MLP norm of each block.
    norms: Vec<f32>,
    /// `[rope_dim / 2]`: divisors of the rotary frequencies.
    rope_freqs: Option<Vec<f32>>,
    digest: OnceLock<[u8; 32]>,
    digest_cache: Option<DigestCache>,
}

/// The frozen weights of one transformer block.
#[derive(Clone, Copy, Debug)]
pub struct FrozenBlock<'m> {
    /// Weight of the RMSNorm before attention, `[d_model]`.
    pub attn_norm: &'m [f32],
    /// Weight of the RMSNorm before the MLP, `[d_model]`.
    pub ffn_norm: &'m [f32],
    /// The projections, in the order of [`Proj::ALL`]; shapes `[out, in]` as [`Proj::shape`] gives them.
    pub proj: [QMatrix<'m>; 7],
}

impl<'m> FrozenBlock<'m> {
    /// The matrix of one projection, `[out, in]`.
    pub fn proj(&self, proj: Proj) -> QMatrix<'m> {
        self.proj[proj as usize]
    }
}

impl ModelFile {
    /// Maps and validates the model at `path`.
    ///
    /// # Errors
    /// Those of [`Map::open`] and [`ModelFile::from_map`].
    pub fn open(path: impl AsRef<Path>) -> Result<ModelFile> {
        ModelFile::from_map(Map::open(path)?)
    }

    /// Checks that the file hasn't changed since it was opened; see [`Map::check_whole`]. Call this before
    /// keeping a result.
    ///
    /// # Errors
    /// `Io`, naming the file.
    pub fn check_whole(&self) -> Result<()> {
        self.map.check_whole()
    }

    /// Validates the model in `map`.
    ///
    /// # Errors
    /// `Corrupt` if the file breaks the format or contradicts itself; `Unsupported` for a model (or part of
    /// one) that can't run here; `NonFinite` for a NaN or infinity in a norm.
    pub fn from_map(map: Map) -> Result<ModelFile> {
        let gguf = Gguf::parse(map.as_bytes(), map.label())?;
        let config = hparams::read(&gguf, map.as_bytes())?;
        let layout = Layout::of(&gguf, &config)?;
        let mut norms = Vec::with_capacity((1 + 2 * config.n_layers) * config.d_model);
        for index in layout.norms() {
            floats_into(&mut norms, &gguf, index, map.as_bytes())?;
        }
        let mut rope_freqs = None;
        if let Some(index) = layout.rope_freqs {
            let mut freqs = Vec::with_capacity(config.rope_dim / 2);
            floats_into(&mut freqs, &gguf, index, map.as_bytes())?;
            if freqs.iter().any(|&f| f <= 0.0) {
                return Err(gguf.error(ErrorKind::Corrupt, "rope_freqs.weight holds a divisor of 0 or below"));
            }
            rope_freqs = Some(freqs);
        }
        map.prefetch();
        let digest = OnceLock::new();
        map.check_whole()?;
        Ok(ModelFile { map, gguf, config, layout, norms, rope_freqs, digest, digest_cache: None })
    }

    /// Lets [`ModelFile::digest`] consult a cache first and store results there. Has no effect on a model that
    /// didn't come from a file.
    #[must_use]
    pub fn with_digest_cache(mut self, cache: DigestCache) -> ModelFile {
        self.digest_cache = Some(cache);
        self
    }

    /// The folder of that cache, for what else is worth keeping about this model.
    pub fn cache_folder(&self) -> Option<&Path> {
        self.digest_cache.as_ref().map(DigestCache::folder)
    }

    /// Shapes and constants.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The validated description of the file, with its metadata.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// The file's bytes, for the array getters of [`Gguf`].
    pub fn bytes(&self) -> &[u8] {
        self.map.as_bytes()
    }

    /// The name that errors give the file.
    pub fn label(&self) -> &str {
        self.map.label()
    }

    /// The file's path, unless the model came from memory.
    pub fn path(&self) -> Option<&Path> {
        self.map.path()
    }

    /// Bytes of the file that are mapped (clean, evictable) rather than read into memory.
    pub fn mapped_bytes(&self) -> usize {
        self.map.mapped_bytes()
    }

    /// Bytes of private memory held for weights: the norms, and the file itself if it isn't mapped.
    pub fn private_bytes(&self) -> usize {
        let floats = self.norms.capacity() + self.rope_freqs.as_ref().map_or(0, Vec::capacity);
        floats * size_of::<f32>() + self.map.private_bytes()
    }

    /// The token embedding, `[vocab, d_model]`.
    pub fn token_embd(&self) -> QMatrix<'_> {
        self.matrix(self.layout.token_embd)
    }

    /// The head, `[vocab, d_model]`; the embedding itself when the model ties them.
    pub fn output(&self) -> QMatrix<'_> {
        self.matrix(self.layout.output.unwrap_or(self.layout.token_embd))
    }

    /// Weight of the RMSNorm before the head, `[d_model]`.
    pub fn output_norm(&self) -> &[f32] {
        self.norm(0)
    }

    /// Divisors of the rotary frequencies, `[rope_dim / 2]`, where the model has them.
    pub fn rope_freqs(&self) -> Option<&[f32]> {
        self.rope_freqs.as_deref()
    }

    /// The weights of block `l`, as views.
    ///
    /// # Panics
    /// If `l` is not below `n_layers`.
    pub fn block(&self, l: usize) -> FrozenBlock<'_> {
        FrozenBlock {
            attn_norm: self.norm(1 + 2 * l),
            ffn_norm: self.norm(2 + 2 * l),
            proj: self.layout.blocks[l].proj.map(|index| self.matrix(index)),
        }
    }

    /// SHA-256 of what an adapter depends on: every tensor (name, type, extents, bytes), the
    /// hyperparameters, and the metadata under `tokenizer.`. Independent of the order of the metadata,
    /// of padding, and of names and licences. The first call computes it, which reads the whole file unless the
    /// [cache](ModelFile::with_digest_cache) has it.
    pub fn digest(&self) -> [u8; 32] {
        let mut unkept = None;
        let digest = *self.digest.get_or_init(|| {
            let compute = || digest::compute(&self.gguf, &self.config, self.map.as_bytes());
            let Some((cache, stamp)) = self.digest_cache.as_ref().zip(self.map.stamp()) else {
                return compute();
            };
            cache.get(&Disk, &stamp).unwrap_or_else(|| {
                let digest = compute();
                // If the file was changed or replaced meanwhile, it is unknown which state was read.
                if self.map.stamp_now() == Some(stamp) {
                    unkept = cache.put(&Disk, &stamp, &digest).err();
                }
                digest
            })
        });
        // Log only after releasing the lock: a logger may ask for the digest.
        if let Some(error) = unkept {
            log::info!("the digest is not kept: {error}");
        }
        digest
    }

    /// SHA-256 of the file's chat template, or of its absence.
    ///
    /// # Errors
    /// `Corrupt` if the template isn't a string.
    pub fn template_digest(&self) -> Result<[u8; 32]> {
        Ok(digest::template(self.gguf.string("tokenizer.chat_template")?))
    }

    fn norm(&self, i: usize) -> &[f32] {
        let d = self.config.d_model;
        &self.norms[i * d..(i + 1) * d]
    }

    fn matrix(&self, index: usize) -> QMatrix<'_> {
        let t = &self.gguf.tensors()[index];
        // The parser derived the range from this very type and shape.
        QMatrix::new(t.dtype, t.rows(), t.cols(), &self.map.as_bytes()[t.range.clone()])
            .expect("a validated tensor's range has the size of its shape")
    }
}

/// Appends a float tensor's elements as f32; refuses block types, NaN and infinities.
fn floats_into(out: &mut Vec<f32>, gguf: &Gguf, index: usize, bytes: &[u8]) -> Result<()> {
    let t = &gguf.tensors()[index];
    let (name, start) = (&t.name, out.len());
    if !t.dtype.is_float() {
        let found = t.dtype.name();
        let message = format!("tensor {name} is of type {found}; a vector must be F32, F16 or BF16");
        return Err(gguf.error(ErrorKind::Unsupported, message));
    }
    out.resize(start + t.rows() * t.cols(), 0.0);
    dequantize(t.dtype, &bytes[t.range.clone()], 0, &mut out[start..]);
    match out[start..].iter().position(|v| !v.is_finite()) {
        Some(i) => {
            let message = format!("tensor {name}: element {i} is {}; the model is broken", out[start + i]);
            Err(gguf.error(ErrorKind::NonFinite, message))
        }
        None => Ok(()),
    }
}
