//! Reads hyperparameters from metadata: present, bounded, divisible where divided, and describing a model whose
//! mathematics is implemented here.

use crate::error::{Advice, Error, ErrorKind, Result};
use crate::model::config::ModelConfig;
use crate::model::gguf::{Gguf, Value, quote};

// Far above every model that fits a device, far below what could overflow a product of two.
const MAX_LAYERS: u64 = 1024;
const MAX_WIDTH: u64 = 1 << 16;
const MAX_FF: u64 = 1 << 20;
const MAX_HEADS: u64 = 1024;
const MAX_HEAD_DIM: u64 = 1024;
const MAX_CONTEXT: u64 = 1 << 24;
const MAX_VOCAB: u64 = 1 << 22;

const ARCHITECTURE: &str = "llama";

/// What files may state for each block, as an array.
const PER_BLOCK: [&str; 3] = ["attention.head_count", "attention.head_count_kv", "feed_forward_length"];

/// Reads and validates all hyperparameters, and checks the vocabulary's arrays against them.
pub(super) fn read(gguf: &Gguf, bytes: &[u8]) -> Result<ModelConfig> {
    kind_of_file(gguf)?;
    foreign_mathematics(gguf)?;
    let vocab = vocabulary(gguf, bytes)?;
    let p = Params { gguf, bytes };
    let d_model = p.uint("embedding_length", None, MAX_WIDTH)?;
    let n_heads = p.uint("attention.head_count", None, MAX_HEADS)?;
    let n_kv_heads = p.uint("attention.head_count_kv", Some(n_heads), MAX_HEADS)?;
    if !n_heads.is_multiple_of(n_kv_heads) {
        return Err(p.bad(
            "attention.head_count",
            format_args!("{n_heads} is not a multiple of {n_kv_heads} (head_count_kv)"),
        ));
    }
    let head_dim = head_dim(&p, d_model, n_heads)?;
    let rope_dim = p.uint("rope.dimension_count", Some(head_dim), MAX_HEAD_DIM)?;
    if !rope_dim.is_multiple_of(2) || rope_dim > head_dim {
        return Err(p.bad(
            "rope.dimension_count",
            format_args!("{rope_dim} must be even and at most {head_dim} (the head's width)"),
        ));
    }
    let config = ModelConfig {
        architecture: ARCHITECTURE.to_string(),
        vocab,
        d_model,
        n_layers: p.uint("block_count", None, MAX_LAYERS)?,
        n_heads,
        n_kv_heads,
        head_dim,
        d_ff: p.uint("feed_forward_length", None, MAX_FF)?,
        rope_dim,
        rope_base: p.float("rope.freq_base", Some(10_000.0), 1.0, 1e12)?,
        rope_scale: rope_scale(&p)?,
        rms_eps: p.float("attention.layer_norm_rms_epsilon", None, 1e-12, 0.1)?,
        context_len: p.uint("context_length", None, MAX_CONTEXT)?,
        tied: gguf.tensor("output.weight").is_none(),
    };
    // Widths of concatenated heads: each factor is bounded by 1024, so the product can't overflow.
    if config.d_q() as u64 > MAX_WIDTH {
        return Err(p.bad("attention.head_count", format_args!("{n_heads} heads of {head_dim} are too wide")));
    }
    Ok(config)
}

/// Refuses anything that isn't a model of the supported architecture, saying what it is.
fn kind_of_file(gguf: &Gguf) -> Result<()> {
    let unsupported = |message: String| Err(gguf.error(ErrorKind::Unsupported, message));
    match gguf.string("general.type")? {
        None | Some("model") => {}
        Some("adapter") => {
            let message = "this is an adapter, not a model";
            return Err(gguf.error(ErrorKind::Unsupported, message).advise(Advice::UseAsAdapter));
        }
        Some(other) => return unsupported(format!("general.type is {}, not \"model\"", quote(other))),
    }
    // Only the first part of a split model holds what follows.
    if let Some(parts @ 2..) = gguf.uint("split.count")? {
        let part = gguf.uint("split.no")?.map_or(String::new(), |no| format!("part {} ", no + 1));
        let message = format!("this is {part}of a model split into {parts} files");
        return Err(gguf.error(ErrorKind::Unsupported, message).advise(Advice::JoinParts));
    }
    let architecture = gguf.required("general.architecture", gguf.string("general.architecture")?)?;
    if architecture != ARCHITECTURE {
        return unsupported(format!("architecture {} is not supported; \"llama\" is", quote(architecture)));
    }
    if gguf.tensors().is_empty() {
        return unsupported("it holds only a vocabulary, no weights; use the model's full GGUF file".into());
    }
    // Version 2 is today's layout of the block types; 0 and 1 have other scales and orders.
    let version = gguf.uint("general.quantization_version")?.unwrap_or(2);
    let quantized = gguf.tensors().iter().any(|t| t.dtype.block_len() > 1);
    if version != 2 && quantized {
        return unsupported(format!(
            "quantization version {version} is not supported; quantize the model again"
        ));
    }
    Ok(())
}

/// Refuses metadata that changes the mathematics in unimplemented ways: ignoring it would silently compute a
/// different model.
fn foreign_mathematics(gguf: &Gguf) -> Result<()> {
    let neutral = |key: &str, value: &Value| match key {
        "attention.causal" => *value == Value::Bool(true),
        "use_parallel_residual" => *value == Value::Bool(false),
        "logit_scale" | "embedding_scale" | "residual_scale" => *value == Value::F32(1.0),
        "attention.sliding_window" | "embedding_length_per_layer_input" | "pooling_type" => {
            value.as_uint() == Some(0)
        }
        "attention.scale"
        | "attention.clamp_kqv"
        | "attention.max_alibi_bias"
        | "attn_logit_softcapping"
        | "final_logit_softcapping" => *value == Value::F32(0.0),
        "rope.scaling.attn_factor" => *value == Value::F32(1.0),
        "tensor_data_layout" => matches!(value, Value::String(s) if &**s == "Meta AI original pth"),
        _ if key.starts_with("expert_") => {
            value.as_uint() == Some(0) || matches!(value, Value::F32(_) | Value::Bool(_))
        }
        _ => true,
    };
    for entry in gguf.entries() {
        let Some(key) = entry.key.strip_prefix("llama.") else { continue };
        if neutral(key, &entry.value) {
            continue;
        }
        let what = if key.starts_with("expert_") {
            "a mixture of experts, which is not supported; use a dense model".to_string()
        } else {
            format!("a variant of the architecture that is not supported ({})", shown(&entry.value))
        };
        return Err(gguf.error(ErrorKind::Unsupported, format!("{} declares {what}", quote(&entry.key))));
    }
    Ok(())
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(s) => quote(s),
        Value::F32(v) => v.to_string(),
        Value::Bool(v) => v.to_string(),
        other => other.as_uint().map_or_else(|| other.value_type().name().to_string(), |v| v.to_string()),
    }
}

/// The vocabulary's size: the embedding's rows, which every other statement must match.
fn vocabulary(gguf: &Gguf, bytes: &[u8]) -> Result<usize> {
    let corrupt = |message: String| Err(gguf.error(ErrorKind::Corrupt, message));
    let Some(embedding) = gguf.tensor("token_embd.weight") else {
        return corrupt("tensor token_embd.weight is missing".into());
    };
    let vocab = embedding.rows();
    if vocab as u64 > MAX_VOCAB {
        return corrupt(format!("token_embd.weight has {vocab} rows; at most {MAX_VOCAB} are supported"));
    }
    if let Some(n) = gguf.uint("llama.vocab_size")?
        && n != vocab as u64
    {
        return corrupt(format!("llama.vocab_size is {n}, but token_embd.weight has {vocab} rows"));
    }
    let lengths = [
        ("tokenizer.ggml.tokens", gguf.strings("tokenizer.ggml.tokens", bytes)?.map(|v| v.len())),
        ("tokenizer.ggml.scores", gguf.floats("tokenizer.ggml.scores", bytes)?.map(|v| v.len())),
        ("tokenizer.ggml.token_type", gguf.ints("tokenizer.ggml.token_type", bytes)?.map(|v| v.len())),
    ];
    for (key, len) in lengths {
        if let Some(n) = len.filter(|&n| n != vocab) {
            return corrupt(format!("{key} has {n} elements, but token_embd.weight has {vocab} rows"));
        }
    }
    gguf.strings("tokenizer.ggml.merges", bytes)?;
    for entry in gguf.entries() {
        if entry.key.starts_with("tokenizer.ggml.") && entry.key.ends_with("_token_id") {
            let id = gguf.required(&entry.key, gguf.uint(&entry.key)?)?;
            if id >= vocab as u64 {
                return corrupt(format!(
                    "{} is {id}, but the vocabulary has {vocab} tokens",
                    quote(&entry.key)
                ));
            }
        }
    }
    Ok(vocab)
}

/// Elements per head: stated, or the model's width by the number of heads.
fn head_dim(p: &Params<'_>, d_model: usize, n_heads: usize) -> Result<usize> {
    let stated = p.gguf.get("llama.attention.key_length").is_some();
    if !stated && !d_model.is_multiple_of(n_heads) {
        let message = format_args!("{d_model} is not a multiple of {n_heads} (attention.head_count)");
        return Err(p.bad("embedding_length", message));
    }
    let head_dim = p.uint("attention.key_length", Some(d_model / n_heads), MAX_HEAD_DIM)?;
    let value_dim = p.uint("attention.value_length", Some(d_model / n_heads), MAX_HEAD_DIM)?;
    if value_dim != head_dim {
        let message = format!(
            "heads with {value_dim} value elements and {head_dim} key elements are not supported; they must be equal"
        );
        return Err(p.gguf.error(ErrorKind::Unsupported, message));
    }
    Ok(head_dim)
}

/// The divisor of positions: linear scaling only. Like llama.cpp, treats a missing type as linear and accepts
/// an older key for the factor.
fn rope_scale(p: &Params<'_>) -> Result<f32> {
    let kind = p.gguf.string("llama.rope.scaling.type")?;
    let older = p.float("rope.scale_linear", Some(1.0), 1.0, 1e6)?;
    match kind {
        Some("none") => Ok(1.0),
        None | Some("linear") => p.float("rope.scaling.factor", Some(older), 1.0, 1e6),
        Some(other) => Err(p.gguf.error(
            ErrorKind::Unsupported,
            format!("rope scaling of type {} is not supported; none and linear are", quote(other)),
        )),
    }
}

/// Getters below `llama.`, with bounds.
struct Params<'a> {
    gguf: &'a Gguf,
    bytes: &'a [u8],
}

impl Params<'_> {
    /// An integer in 1..=max.
    fn uint(&self, name: &str, default: Option<usize>, max: u64) -> Result<usize> {
        let key = format!("{ARCHITECTURE}.{name}");
        let stored = match self.gguf.get(&key) {
            Some(Value::Array(_)) if PER_BLOCK.contains(&name) => self.same_in_all(&key)?,
            _ => self.gguf.uint(&key)?,
        };
        let stored = stored.or(default.map(|v| v as u64));
        let value = self.gguf.required(&key, stored)?;
        if !(1..=max).contains(&value) {
            return Err(self.bad(name, format_args!("{value} is not in 1 to {max}")));
        }
        usize::try_from(value)
            .map_err(|_| self.bad(name, format_args!("{value} exceeds this machine's integers")))
    }

    /// The one value of an array with an integer for each block.
    fn same_in_all(&self, key: &str) -> Result<Option<u64>> {
        let blocks = self.gguf.uint("llama.block_count")?;
        let count = self.gguf.array(key)?.map(|array| array.count as u64);
        if count != blocks {
            let (found, blocks) = (count.unwrap_or(0), blocks.unwrap_or(0));
            let message = format!("metadata key {key} has {found} elements for {blocks} blocks");
            return Err(self.gguf.error(ErrorKind::Corrupt, message));
        }
        let mut first = None;
        for value in self.gguf.ints(key, self.bytes)?.into_iter().flatten() {
            if *first.get_or_insert(value) != value {
                let message =
                    format!("metadata key {key} differs from block to block, which is not supported");
                return Err(self.gguf.error(ErrorKind::Unsupported, message));
            }
        }
        Ok(first.and_then(|value| u64::try_from(value).ok()))
    }

    /// A finite float in min..=max.
    fn float(&self, name: &str, default: Option<f32>, min: f32, max: f32) -> Result<f32> {
        let key = format!("{ARCHITECTURE}.{name}");
        let value = self.gguf.required(&key, self.gguf.float(&key)?.or(default))?;
        if !(min..=max).contains(&value) {
            return Err(self.bad(name, format_args!("{value} is not in {min} to {max}")));
        }
        Ok(value)
    }

    fn bad(&self, name: &str, message: std::fmt::Arguments<'_>) -> Error {
        self.gguf.error(ErrorKind::Corrupt, format!("metadata key {ARCHITECTURE}.{name}: {message}"))
    }
}
