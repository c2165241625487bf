//! The identity of a base model: what an adapter trained on it depends on, and nothing else.

use sha2::{Digest, Sha256};

use crate::model::config::ModelConfig;
use crate::model::digest_cache::DIGEST_DOMAIN;
use crate::model::gguf::Gguf;

/// SHA-256 over tensors in the order of the file, hyperparameters, and tokenizer metadata in the order
/// of its keys. Every variable part is preceded by its length, so no two models share an encoding.
pub(super) fn compute(gguf: &Gguf, config: &ModelConfig, bytes: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(DIGEST_DOMAIN.as_bytes());
    hash.update((gguf.tensors().len() as u64).to_le_bytes());
    for t in gguf.tensors() {
        sized(&mut hash, t.name.as_bytes());
        hash.update(t.dtype.ggml_id().to_le_bytes());
        hash.update((t.dims.len() as u64).to_le_bytes());
        for &d in &t.dims {
            hash.update((d as u64).to_le_bytes());
        }
        sized(&mut hash, &bytes[t.range.clone()]);
    }
    hyperparameters(&mut hash, config);
    for entry in gguf.entries_by_key().filter(|e| e.key.starts_with("tokenizer.")) {
        sized(&mut hash, entry.key.as_bytes());
        hash.update(entry.value.value_type().id().to_le_bytes());
        // Little-endian, as the format requires, and the same in both of its versions.
        sized(&mut hash, &bytes[entry.range.clone()]);
    }
    hash.finalize().into()
}

/// SHA-256 of a chat template, or of its absence.
pub(super) fn template(text: Option<&str>) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"engraft chat template\n");
    hash.update([u8::from(text.is_some())]);
    hash.update(text.unwrap_or_default().as_bytes());
    hash.finalize().into()
}

/// The effective values: stating a default or omitting it gives the same model.
fn hyperparameters(hash: &mut Sha256, c: &ModelConfig) {
    sized(hash, c.architecture.as_bytes());
    for n in [c.vocab, c.d_model, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.d_ff, c.rope_dim] {
        hash.update((n as u64).to_le_bytes());
    }
    for f in [c.rope_base, c.rope_scale, c.rms_eps] {
        hash.update(f.to_bits().to_le_bytes());
    }
}

fn sized(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}
