//! The model's file: Q8_0 matrices, f32 gains, and the metadata a llama loader needs.

use crate::tokens::{CHAT_TEMPLATE, CONTROL, END_OF_TEXT, IM_END, Tokens};
use crate::train;
use anyhow::{Context, Result};
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use engraft_runtime::model::config::{ModelConfig, Proj};
use std::collections::HashMap;
use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

/// Writes the model. Its query and key rows were trained in GGUF's own rotary order, so nothing is
/// permuted.
pub(crate) fn write(
    path: &Path,
    config: &ModelConfig,
    all: &HashMap<String, Tensor>,
    tokens: &Tokens,
) -> Result<()> {
    let mut tensors: Vec<(String, QTensor)> = Vec::new();
    let mut put = |name: &str, dtype: GgmlDType| -> Result<()> {
        let name = format!("{name}.weight");
        let tensor = all.get(&name).with_context(|| format!("no {name}"))?;
        tensors.push((name, QTensor::quantize(tensor, dtype)?));
        Ok(())
    };
    put("token_embd", GgmlDType::Q8_0)?;
    for layer in 0..config.n_layers {
        put(&format!("blk.{layer}.attn_norm"), GgmlDType::F32)?;
        for p in Proj::ALL {
            put(&format!("blk.{layer}.{}", p.gguf_name()), GgmlDType::Q8_0)?;
        }
        put(&format!("blk.{layer}.ffn_norm"), GgmlDType::F32)?;
    }
    put("output_norm", GgmlDType::F32)?;
    let metadata = metadata(config, tokens);
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, x)| (name.as_str(), x)).collect();
    let mut file =
        BufWriter::new(File::create(path).with_context(|| format!("creating {}", path.display()))?);
    gguf_file::write(&mut file, &metadata, &tensors)?;
    Ok(file.into_inner()?.sync_all()?)
}

fn metadata(config: &ModelConfig, tokens: &Tokens) -> Vec<(&'static str, Value)> {
    const NORMAL: i32 = 1;
    const CONTROL_TYPE: i32 = 3;
    /// llama.cpp's LLAMA_FTYPE_MOSTLY_Q8_0.
    const MOSTLY_Q8_0: u32 = 7;
    let int = |n: usize| Value::U32(n as u32);
    let strings = |items: &[String]| Value::Array(items.iter().cloned().map(Value::String).collect());
    let types = (0..tokens.tokens.len()).map(|id| if id < CONTROL.len() { CONTROL_TYPE } else { NORMAL });
    vec![
        ("general.architecture", Value::String("llama".into())),
        ("general.name", Value::String("seedling".into())),
        ("general.license", Value::String("MIT OR Apache-2.0".into())),
        ("general.file_type", Value::U32(MOSTLY_Q8_0)),
        ("general.quantization_version", Value::U32(2)),
        ("general.alignment", Value::U32(32)),
        ("llama.vocab_size", int(config.vocab)),
        ("llama.context_length", int(config.context_len)),
        ("llama.embedding_length", int(config.d_model)),
        ("llama.block_count", int(config.n_layers)),
        ("llama.feed_forward_length", int(config.d_ff)),
        ("llama.attention.head_count", int(config.n_heads)),
        ("llama.attention.head_count_kv", int(config.n_kv_heads)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(config.rms_eps)),
        ("llama.rope.dimension_count", int(config.rope_dim)),
        ("llama.rope.freq_base", Value::F32(config.rope_base)),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("smollm".into())),
        ("tokenizer.ggml.tokens", strings(&tokens.tokens)),
        ("tokenizer.ggml.token_type", Value::Array(types.map(Value::I32).collect())),
        ("tokenizer.ggml.merges", strings(&tokens.merges)),
        ("tokenizer.ggml.bos_token_id", Value::U32(END_OF_TEXT)),
        ("tokenizer.ggml.eos_token_id", Value::U32(IM_END)),
        ("tokenizer.ggml.eot_token_id", Value::U32(IM_END)),
        ("tokenizer.ggml.padding_token_id", Value::U32(END_OF_TEXT)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
        ("tokenizer.chat_template", Value::String(CHAT_TEMPLATE.into())),
    ]
}

/// Reads a file written by [`write`], dequantized: the values its users will compute with.
pub(crate) fn read(path: &Path) -> Result<(ModelConfig, HashMap<String, Tensor>, Tokens)> {
    let mut file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let gguf = gguf_file::Content::read(&mut file)?;
    let list = |key: &str| -> Result<Vec<String>> {
        let values = gguf.metadata.get(key).with_context(|| format!("no {key}"))?.to_vec()?;
        Ok(values.iter().map(|v| v.to_string().cloned()).collect::<candle_core::Result<_>>()?)
    };
    let tokens = Tokens::new(list("tokenizer.ggml.tokens")?, list("tokenizer.ggml.merges")?)?;
    let config = train::config(tokens.tokens.len());
    let mut tensors = HashMap::new();
    for name in gguf.tensor_infos.keys() {
        tensors.insert(name.clone(), gguf.tensor(&mut file, name, &Device::Cpu)?.dequantize(&Device::Cpu)?);
    }
    Ok((config, tensors, tokens))
}
