//! The keys and values of earlier positions, in all layers, of one sequence or several.

use engraft_kernels::{KV_BLOCK, Kv, KvMut, KvRows, KvType};

use crate::error::{Error, ErrorKind, Result};
use crate::model::ModelConfig;

/// Elements of one kind (keys or values), `[L, capacity, kv·hd]`.
enum Cells {
    F32(Vec<f32>),
    F16(Vec<u16>),
    /// Codes, and a scale per 32 of them.
    Q8(Vec<i8>, Vec<f32>),
}

impl Cells {
    fn new(ty: KvType, n: usize) -> Cells {
        match ty {
            KvType::F32 => Cells::F32(vec![0.0; n]),
            KvType::F16 => Cells::F16(vec![0; n]),
            KvType::Q8 => Cells::Q8(vec![0; n], vec![0.0; n / KV_BLOCK]),
        }
    }

    /// Chunk `i` of `n` elements, for reading.
    fn rows(&self, i: usize, n: usize) -> Kv<'_> {
        match self {
            Cells::F32(d) => Kv::F32(&d[i * n..(i + 1) * n]),
            Cells::F16(d) => Kv::F16(&d[i * n..(i + 1) * n]),
            Cells::Q8(codes, scale) => {
                let blocks = n / KV_BLOCK;
                Kv::Q8(&codes[i * n..(i + 1) * n], &scale[i * blocks..(i + 1) * blocks])
            }
        }
    }

    /// Chunk `i` of `n` elements.
    fn part(&mut self, i: usize, n: usize) -> KvMut<'_> {
        match self {
            Cells::F32(d) => KvMut::F32(&mut d[i * n..(i + 1) * n]),
            Cells::F16(d) => KvMut::F16(&mut d[i * n..(i + 1) * n]),
            Cells::Q8(codes, scale) => {
                let blocks = n / KV_BLOCK;
                KvMut::Q8(&mut codes[i * n..(i + 1) * n], &mut scale[i * blocks..(i + 1) * blocks])
            }
        }
    }
}

/// A cache for a fixed number of positions.
pub struct KvCache {
    keys: Cells,
    values: Cells,
    ty: KvType,
    /// Elements per layer: capacity·kv·hd.
    layer: usize,
}

impl KvCache {
    /// A cache of `capacity` positions.
    ///
    /// # Errors
    /// `Unsupported` for `Q8` if a head's size isn't a multiple of 32.
    pub fn new(c: &ModelConfig, capacity: usize, ty: KvType) -> Result<KvCache> {
        if ty == KvType::Q8 && !c.head_dim.is_multiple_of(KV_BLOCK) {
            let message = format!(
                "a q8 cache needs heads of a multiple of {KV_BLOCK} elements; these have {}; use f16",
                c.head_dim
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let layer = capacity * c.d_kv();
        let n = c.n_layers * layer;
        Ok(KvCache { keys: Cells::new(ty, n), values: Cells::new(ty, n), ty, layer })
    }

    /// Bytes of a cache of `capacity` positions.
    pub fn bytes(c: &ModelConfig, capacity: usize, ty: KvType) -> usize {
        // Saturates where 32 bits would overflow.
        let n = c.n_layers.saturating_mul(capacity).saturating_mul(c.d_kv());
        match ty {
            KvType::F32 => n.saturating_mul(8),
            KvType::F16 => n.saturating_mul(4),
            KvType::Q8 => n.saturating_mul(2).saturating_add((n / KV_BLOCK).saturating_mul(8)),
        }
    }

    /// How it stores its elements.
    pub fn ty(&self) -> KvType {
        self.ty
    }

    /// All positions of layer `l`, for reading.
    pub fn rows(&self, l: usize) -> KvRows<'_> {
        KvRows { k: self.keys.rows(l, self.layer), v: self.values.rows(l, self.layer) }
    }

    /// Keys and values of layer `l`, `[capacity, kv·hd]` each.
    pub fn layer(&mut self, l: usize) -> (KvMut<'_>, KvMut<'_>) {
        self.part(l, 0, 1)
    }

    /// The same of sequence `i` of `n` that share the capacity evenly.
    pub fn part(&mut self, l: usize, i: usize, n: usize) -> (KvMut<'_>, KvMut<'_>) {
        (self.keys.part(l * n + i, self.layer / n), self.values.part(l * n + i, self.layer / n))
    }
}
