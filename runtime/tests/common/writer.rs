//! Writes GGUF files for tests, broken ones too: every count, length and offset can be a lie.

use engraft_kernels::DType;

/// An encoded metadata value: the number of its type, and its bytes.
#[derive(Clone)]
pub(crate) struct V(pub(crate) u32, pub(crate) Vec<u8>);

pub(crate) fn u8v(v: u8) -> V {
    V(0, vec![v])
}
pub(crate) fn u32v(v: u32) -> V {
    V(4, v.to_le_bytes().to_vec())
}
pub(crate) fn i32v(v: i32) -> V {
    V(5, v.to_le_bytes().to_vec())
}
pub(crate) fn f32v(v: f32) -> V {
    V(6, v.to_le_bytes().to_vec())
}
pub(crate) fn boolv(v: bool) -> V {
    V(7, vec![v.into()])
}
pub(crate) fn u64v(v: u64) -> V {
    V(10, v.to_le_bytes().to_vec())
}
pub(crate) fn i64v(v: i64) -> V {
    V(11, v.to_le_bytes().to_vec())
}
pub(crate) fn f64v(v: f64) -> V {
    V(12, v.to_le_bytes().to_vec())
}
pub(crate) fn strv(s: impl AsRef<[u8]>) -> V {
    let s = s.as_ref();
    V(8, [&(s.len() as u64).to_le_bytes(), s].concat())
}
/// An array with a declared element type and count, over the bytes of `items`.
pub(crate) fn arrv(element: u32, count: u64, items: &[V]) -> V {
    let mut bytes = element.to_le_bytes().to_vec();
    bytes.extend(count.to_le_bytes());
    items.iter().for_each(|v| bytes.extend(&v.1));
    V(9, bytes)
}
/// An honest, non-empty array.
pub(crate) fn arr(items: &[V]) -> V {
    arrv(items[0].0, items.len() as u64, items)
}
pub(crate) fn strs(items: &[&str]) -> V {
    arr(&items.iter().map(strv).collect::<Vec<_>>())
}

#[derive(Clone)]
pub(crate) struct Kv {
    pub(crate) key: Vec<u8>,
    /// Declared instead of the key's length.
    pub(crate) key_len: Option<u64>,
    pub(crate) value: V,
}

#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: Vec<u8>,
    pub(crate) name_len: Option<u64>,
    pub(crate) n_dims: Option<u32>,
    pub(crate) dims: Vec<u64>,
    pub(crate) dtype: u32,
    pub(crate) offset: Option<u64>,
    pub(crate) data: Vec<u8>,
}

#[derive(Clone)]
pub(crate) struct Writer {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    pub(crate) n_tensors: Option<u64>,
    pub(crate) n_kv: Option<u64>,
    pub(crate) kv: Vec<Kv>,
    pub(crate) tensors: Vec<Tensor>,
    /// By which data is laid out; `general.alignment` is set apart from it.
    pub(crate) alignment: usize,
}

impl Writer {
    pub(crate) fn new() -> Writer {
        Writer {
            magic: *b"GGUF",
            version: 3,
            n_tensors: None,
            n_kv: None,
            kv: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
        }
    }

    /// Sets a key, in its old place if it has one.
    pub(crate) fn set(&mut self, key: &str, value: V) {
        match self.kv.iter_mut().find(|kv| kv.key == key.as_bytes()) {
            Some(kv) => kv.value = value,
            None => self.push(key, value),
        }
    }

    /// Appends a key, even one that is there already.
    pub(crate) fn push(&mut self, key: &str, value: V) {
        self.kv.push(Kv { key: key.into(), key_len: None, value });
    }

    pub(crate) fn remove(&mut self, key: &str) {
        let before = self.kv.len();
        self.kv.retain(|kv| kv.key != key.as_bytes());
        assert!(self.kv.len() < before, "no key {key}");
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|t| t.name == name.as_bytes()).expect("a tensor of this name")
    }

    pub(crate) fn drop_tensor(&mut self, name: &str) {
        let before = self.tensors.len();
        self.tensors.retain(|t| t.name != name.as_bytes());
        assert!(self.tensors.len() < before, "no tensor {name}");
    }

    pub(crate) fn add(&mut self, name: &str, dtype: DType, dims: &[u64]) {
        let rows: u64 = dims[1..].iter().product();
        let size = dtype.row_bytes(dims[0] as usize).expect("whole blocks") * rows as usize;
        self.tensors.push(Tensor {
            name: name.into(),
            name_len: None,
            n_dims: None,
            dims: dims.to_vec(),
            dtype: dtype.ggml_id(),
            offset: None,
            data: content(dtype, size),
        });
    }

    /// Replaces a tensor by an honest one of another type or shape, in its place.
    pub(crate) fn reshape(&mut self, name: &str, dtype: DType, dims: &[u64]) {
        let mut other = Writer::new();
        other.add(name, dtype, dims);
        *self.tensor(name) = other.tensors.remove(0);
    }

    /// The header alone: all before the padding.
    pub(crate) fn header(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.n_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.n_kv.unwrap_or(self.kv.len() as u64).to_le_bytes());
        for kv in &self.kv {
            out.extend(kv.key_len.unwrap_or(kv.key.len() as u64).to_le_bytes());
            out.extend(&kv.key);
            out.extend(kv.value.0.to_le_bytes());
            out.extend(&kv.value.1);
        }
        let mut running = 0usize;
        for t in &self.tensors {
            out.extend(t.name_len.unwrap_or(t.name.len() as u64).to_le_bytes());
            out.extend(&t.name);
            out.extend(t.n_dims.unwrap_or(t.dims.len() as u32).to_le_bytes());
            t.dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(t.dtype.to_le_bytes());
            out.extend(t.offset.unwrap_or(running as u64).to_le_bytes());
            running = (running + t.data.len()).next_multiple_of(self.alignment);
        }
        out
    }

    /// The whole file. Nothing follows the last tensor's data, so that each prefix is too short.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        for t in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&t.data);
        }
        out
    }
}

/// Finite numbers for floats, arbitrary bytes for blocks.
fn content(dtype: DType, size: usize) -> Vec<u8> {
    match dtype {
        DType::F32 => (0..size / 4).flat_map(|i| (0.5 + (i % 97) as f32 / 64.0).to_le_bytes()).collect(),
        DType::F16 => (0..size / 2).flat_map(|i| (0x3800 + (i % 97) as u16).to_le_bytes()).collect(),
        DType::BF16 => (0..size / 2).flat_map(|i| (0x3f00 + (i % 97) as u16).to_le_bytes()).collect(),
        _ => (0..size).map(|i| (i * 37 % 251) as u8).collect(),
    }
}

/// A valid llama model with one block, as many element types as fit, and a vocabulary of 8.
pub(crate) fn tiny() -> Writer {
    let mut w = Writer::new();
    w.set("general.architecture", strv("llama"));
    w.set("general.name", strv("tiny"));
    for (key, v) in [
        ("llama.vocab_size", 8),
        ("llama.context_length", 64),
        ("llama.embedding_length", 32),
        ("llama.block_count", 1),
        ("llama.feed_forward_length", 64),
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.rope.dimension_count", 8),
    ] {
        w.set(key, u32v(v));
    }
    w.set("llama.rope.freq_base", f32v(10_000.0));
    w.set("llama.attention.layer_norm_rms_epsilon", f32v(1e-5));
    w.set("tokenizer.ggml.model", strv("llama"));
    w.set("tokenizer.ggml.tokens", strs(&["<unk>", "<s>", "</s>", "a", "b", "c", "é", ""]));
    w.set("tokenizer.ggml.scores", arr(&[0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0].map(f32v)));
    w.set("tokenizer.ggml.token_type", arr(&[2, 3, 3, 1, 1, 1, 1, 1].map(i32v)));
    w.set("tokenizer.ggml.bos_token_id", u32v(1));
    w.set("tokenizer.ggml.add_bos_token", boolv(true));
    w.add("token_embd.weight", DType::F32, &[32, 8]);
    w.add("blk.0.attn_norm.weight", DType::F32, &[32]);
    w.add("blk.0.attn_q.weight", DType::Q8_0, &[32, 32]);
    w.add("blk.0.attn_k.weight", DType::Q4_0, &[32, 16]);
    w.add("blk.0.attn_v.weight", DType::F16, &[32, 16]);
    w.add("blk.0.attn_output.weight", DType::Q4_1, &[32, 32]);
    w.add("blk.0.ffn_norm.weight", DType::BF16, &[32]);
    w.add("blk.0.ffn_gate.weight", DType::IQ4_NL, &[32, 64]);
    w.add("blk.0.ffn_up.weight", DType::Q5_0, &[32, 64]);
    w.add("blk.0.ffn_down.weight", DType::Q5_1, &[64, 32]);
    w.add("output_norm.weight", DType::F16, &[32]);
    w
}
