//! Hyperparameters of a llama-architecture model, as validated from GGUF metadata.

use serde::{Deserialize, Serialize};

/// Shapes and constants of one model. Every field was checked: non-zero, bounded, divisible where
/// divided.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `general.architecture`.
    pub architecture: String,
    /// Rows of the token embedding.
    pub vocab: usize,
    /// Model width d (`embedding_length`).
    pub d_model: usize,
    /// Transformer blocks L (`block_count`).
    pub n_layers: usize,
    /// Query heads (`attention.head_count`).
    pub n_heads: usize,
    /// Key/value heads (`attention.head_count_kv`); divides `n_heads`.
    pub n_kv_heads: usize,
    /// Elements per head (`attention.key_length`, or d / heads).
    pub head_dim: usize,
    /// Hidden width of the MLP (`feed_forward_length`).
    pub d_ff: usize,
    /// Rotated elements per head (`rope.dimension_count`), even, at most `head_dim`.
    pub rope_dim: usize,
    /// Base of the rotary frequencies (`rope.freq_base`).
    pub rope_base: f32,
    /// Linear rope scale divisor (`rope.scaling.factor` where the type is linear), else 1.
    pub rope_scale: f32,
    /// Epsilon of RMSNorm (`attention.layer_norm_rms_epsilon`).
    pub rms_eps: f32,
    /// Positions the model was trained for (`context_length`).
    pub context_len: usize,
    /// Whether the head is the token embedding (no `output.weight`).
    pub tied: bool,
}

impl ModelConfig {
    /// Width of the concatenated query heads: `n_heads * head_dim`.
    pub fn d_q(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of the concatenated key (or value) heads: `n_kv_heads * head_dim`.
    pub fn d_kv(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }
}

/// The seven linear projections of a block, in the order they are stored in an adapter, whose file numbers them
/// in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the field's own names")]
pub enum Proj {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Proj {
    /// All seven, in storage order.
    pub const ALL: [Proj; 7] = [Proj::Q, Proj::K, Proj::V, Proj::O, Proj::Gate, Proj::Up, Proj::Down];

    /// Hugging Face's module name.
    pub const fn hf_name(self) -> &'static str {
        match self {
            Proj::Q => "q_proj",
            Proj::K => "k_proj",
            Proj::V => "v_proj",
            Proj::O => "o_proj",
            Proj::Gate => "gate_proj",
            Proj::Up => "up_proj",
            Proj::Down => "down_proj",
        }
    }

    /// The GGUF tensor's name within `blk.N.`, without `.weight`.
    pub const fn gguf_name(self) -> &'static str {
        match self {
            Proj::Q => "attn_q",
            Proj::K => "attn_k",
            Proj::V => "attn_v",
            Proj::O => "attn_output",
            Proj::Gate => "ffn_gate",
            Proj::Up => "ffn_up",
            Proj::Down => "ffn_down",
        }
    }

    /// The GGUF tensor's name in a layer.
    pub fn tensor_name(self, layer: usize) -> String {
        format!("blk.{layer}.{}.weight", self.gguf_name())
    }

    /// The projection with this module name in any convention (`q_proj`, `attn_q`, or `q`).
    pub fn from_name(name: &str) -> Option<Proj> {
        Proj::ALL.into_iter().find(|p| {
            name == p.hf_name() || name == p.gguf_name() || p.hf_name().strip_suffix("_proj") == Some(name)
        })
    }

    /// (out, in) features in a model.
    pub fn shape(self, c: &ModelConfig) -> (usize, usize) {
        match self {
            Proj::Q => (c.d_q(), c.d_model),
            Proj::K | Proj::V => (c.d_kv(), c.d_model),
            Proj::O => (c.d_model, c.d_q()),
            Proj::Gate | Proj::Up => (c.d_ff, c.d_model),
            Proj::Down => (c.d_model, c.d_ff),
        }
    }
}
