//! For tests only: the tokenizer's metadata of a GGUF file that is trusted, and where the shared files
//! are.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]

use candle_core::quantized::gguf_file::{Content, Value};
use engraft_runtime::model::tokenizer::TokenizerSpec;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// A file of the shared folder, or none with a loud line.
pub fn shared(file: &str) -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    let path = std::env::var_os("ENGRAFT_SHARED").map_or_else(beside, PathBuf::from).join(file);
    if !path.exists() {
        eprintln!(
            "SKIPPED: {} is not here; set ENGRAFT_SHARED to the folder of shared files",
            path.display()
        );
        return None;
    }
    Some(path)
}

/// The key-value pairs of a GGUF file.
pub struct Metadata {
    values: HashMap<String, Value>,
}

impl Metadata {
    /// Reads a file.
    pub fn read(path: &Path) -> Metadata {
        let mut file = std::io::BufReader::new(std::fs::File::open(path).unwrap());
        Metadata { values: Content::read(&mut file).unwrap().metadata }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(&format!("tokenizer.{key}"))
    }

    fn list(&self, key: &str) -> &[Value] {
        self.get(key).map_or(&[], |v| v.to_vec().unwrap())
    }

    fn texts(&self, key: &str) -> Vec<&str> {
        self.list(key).iter().map(|v| v.to_string().unwrap().as_str()).collect()
    }

    /// What the tokenizer is built from.
    pub fn spec(&self) -> TokenizerSpec<'_> {
        let text = |key| self.get(key).map(|v| v.to_string().unwrap().as_str());
        let id = |key| self.get(key).map(|v| v.to_u32().unwrap());
        let flag = |key| self.get(key).map(|v| v.to_bool().unwrap());
        TokenizerSpec {
            model: text("ggml.model").unwrap(),
            pre: text("ggml.pre"),
            tokens: self.texts("ggml.tokens"),
            scores: self.list("ggml.scores").iter().map(|v| v.to_f32().unwrap()).collect(),
            token_types: self.list("ggml.token_type").iter().map(|v| v.to_i32().unwrap()).collect(),
            merges: self.texts("ggml.merges"),
            bos: id("ggml.bos_token_id"),
            eos: id("ggml.eos_token_id"),
            unk: id("ggml.unknown_token_id"),
            pad: id("ggml.padding_token_id"),
            eot: id("ggml.eot_token_id"),
            add_bos: flag("ggml.add_bos_token"),
            add_eos: flag("ggml.add_eos_token"),
            add_space_prefix: flag("ggml.add_space_prefix"),
            chat_template: text("chat_template"),
        }
    }
}

/// A vocabulary of the shared folder, or none with a loud line.
pub fn vocabulary(name: &str) -> Option<Metadata> {
    shared(&format!("models/vocab/ggml-vocab-{name}.gguf")).map(|path| Metadata::read(&path))
}

/// The chat template of SmolLM2's instruct models, as published.
pub const SMOLLM2_TEMPLATE: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
