//! The keys and values of a sequence's earlier positions, all layers.

use engraft_kernels::{KV_BLOCK, KvMut, KvType};

use crate::error::{Error, ErrorKind, Result};
use crate::model::ModelConfig;
use crate::nn::block::KvLayer;

/// Elements of one kind (keys or values), `[L, capacity, kv·hd]`.
enum Store {
    F32(Vec<f32>),
    F16(Vec<u16>),
    /// Codes, and a scale per 32 of them.
    Q8(Vec<i8>, Vec<f32>),
}

impl Store {
    fn new(ty: KvType, n: usize) -> Store {
        match ty {
            KvType::F32 => Store::F32(vec![0.0; n]),
            KvType::F16 => Store::F16(vec![0; n]),
            KvType::Q8 => Store::Q8(vec![0; n], vec![0.0; n / KV_BLOCK]),
        }
    }

    /// Part `i` of the parts of `n` elements.
    fn part(&mut self, i: usize, n: usize) -> KvMut<'_> {
        match self {
            Store::F32(d) => KvMut::F32(&mut d[i * n..(i + 1) * n]),
            Store::F16(d) => KvMut::F16(&mut d[i * n..(i + 1) * n]),
            Store::Q8(codes, scale) => {
                let blocks = n / KV_BLOCK;
                KvMut::Q8(&mut codes[i * n..(i + 1) * n], &mut scale[i * blocks..(i + 1) * blocks])
            }
        }
    }
}

/// A cache for a fixed number of positions.
pub struct KvCache {
    keys: Store,
    values: Store,
    /// Elements per layer: capacity·kv·hd.
    layer: usize,
}

impl KvCache {
    /// A cache of `capacity` positions.
    ///
    /// # Errors
    /// `Unsupported` for `Q8` where a head is not a multiple of 32.
    pub fn new(c: &ModelConfig, capacity: usize, ty: KvType) -> Result<KvCache> {
        if ty == KvType::Q8 && !c.head_dim.is_multiple_of(KV_BLOCK) {
            let message = format!(
                "a q8 cache needs heads of a multiple of {KV_BLOCK} elements, these have {}; use f16",
                c.head_dim
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let layer = capacity * c.d_kv();
        let n = c.n_layers * layer;
        Ok(KvCache { keys: Store::new(ty, n), values: Store::new(ty, n), layer })
    }

    /// The rows of layer `l`, of which `past` are filled.
    pub fn layer(&mut self, l: usize, past: usize) -> KvLayer<'_> {
        KvLayer { k: self.keys.part(l, self.layer), v: self.values.part(l, self.layer), past }
    }
}
