//! What is done with an input of each format: everything that its reader allows. An accepted input is used
//! to the full, since a promise of the reader that does not hold shows only then.
//!
//! The fuzzing targets under tests/fuzz include this file by its path, so there is one truth.
#![allow(dead_code, reason = "each fuzzing target uses one of them")]

use std::path::Path;

use engraft_codec::{Element, Frame};
use engraft_runtime::adapter::foreign::Format;
use engraft_runtime::adapter::{Adapter, gguf_file, mlx, peft};
use engraft_runtime::data::{DataOptions, Origin, load_from, samples_from};
use engraft_runtime::model::ModelConfig;
use engraft_runtime::model::chat::{ChatTemplate, Message, encode_pieces};
use engraft_runtime::model::gguf::Gguf;
use engraft_runtime::model::map::Map;
use engraft_runtime::model::text::Text;
use engraft_runtime::model::tokenizer::{Special, Tokenizer, TokenizerSpec};
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::{Error, ErrorKind, Result};

/// How errors must call the input.
pub const LABEL: &str = "hostile";

/// Opens a model file; its views, strings, numbers, tokenizer and template are used.
///
/// # Errors
/// Those of the reader.
pub fn gguf(bytes: &[u8]) -> Result<()> {
    if let Ok(file) = Gguf::parse(bytes, LABEL) {
        use_description(&file, bytes);
    }
    let model = ModelFile::from_map(Map::from_vec(LABEL, bytes.to_vec()))?;
    let blocks = (0..model.config().n_layers).flat_map(|l| model.block(l).proj);
    let matrices = blocks.chain([model.token_embd(), model.output()]);
    for q in matrices {
        assert_eq!(q.row(q.rows() - 1).len(), q.row_bytes());
    }
    assert!(model.output_norm().iter().all(|v| v.is_finite()));
    assert_ne!(model.digest(), [0; 32]);
    model.template_digest()?;
    let planned = Text::heap_bytes(&model)?;
    let Text { tokenizer, chat } = Text::of(&model)?;
    assert!(tokenizer.heap_bytes() <= planned, "more heap than was planned");
    use_tokenizer(&tokenizer);
    use_chat(&chat, &tokenizer).map_err(|e| e.at(LABEL))
}

fn use_description(file: &Gguf, bytes: &[u8]) {
    let mut end = file.data_start();
    for t in file.tensors() {
        assert!(t.range.start >= end && t.range.end <= bytes.len());
        assert!(t.range.start.is_multiple_of(file.alignment().min(t.range.start.max(1))) || end == 0);
        assert!(t.rows().checked_mul(t.cols()).is_some() && file.tensor(&t.name).is_some());
        end = t.range.end;
    }
    for e in file.entries() {
        assert!(file.get(&e.key).is_some());
        if let Ok(Some(strings)) = file.strings(&e.key, bytes) {
            strings.for_each(|s| assert!(s.is_ok()));
        }
        if let Ok(Some(ints)) = file.ints(&e.key, bytes) {
            ints.for_each(drop);
        }
        if let Ok(Some(floats)) = file.floats(&e.key, bytes) {
            floats.for_each(drop);
        }
    }
}

fn use_tokenizer(tokenizer: &Tokenizer) {
    for text in ["", "a cab", "<s>é\u{2581}\0 <|im_end|>", "aaaaaaaaaaaaaaaa  \n"] {
        for special in [Special::Plain, Special::Parse] {
            let ids = tokenizer.encode(text, special);
            assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()));
            tokenizer.decode(&ids);
        }
    }
    (0..tokenizer.vocab_size().min(1000) as u32).for_each(|id| drop(tokenizer.decode(&[id])));
}

fn use_chat(chat: &ChatTemplate, tokenizer: &Tokenizer) -> Result<()> {
    let messages = [
        Message::new("system", "Be brief."),
        Message::new("user", "  a <|im_end|> cab\n"),
        Message::new("assistant", "ab"),
        Message::new("user", ""),
    ];
    let tools = serde_json::json!([{"name": "f", "parameters": {"x": [1, 2.5, null, true]}}]);
    let plain = chat.render_messages(&messages, true);
    let pieces = chat.render_with_tools(&messages, Some(&tools), false)?;
    assert!(pieces.iter().all(|p| !p.text.is_empty()));
    let (ids, sources) = encode_pieces(tokenizer, &pieces, &messages);
    assert_eq!(ids.len(), sources.len());
    plain.map(|_| ())
}

/// Compiles and renders a chat template.
///
/// # Errors
/// Those of the engine.
pub fn template(bytes: &[u8]) -> Result<()> {
    let tokenizer = small_tokenizer();
    let source = String::from_utf8_lossy(bytes);
    let chat = ChatTemplate::new(Some(&source), &tokenizer).map_err(|e| e.at(LABEL))?;
    use_chat(&chat, &tokenizer).map_err(|e| e.at(LABEL))
}

/// A vocabulary of some letters, as SentencePiece has it.
pub fn small_tokenizer() -> Tokenizer {
    let tokens = vec!["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "é", "\u{2581}"];
    let spec = TokenizerSpec {
        model: "llama",
        scores: (0..tokens.len()).map(|i| -(i as f32)).collect(),
        token_types: vec![2, 3, 3, 1, 1, 1, 1, 1, 1],
        tokens,
        ..TokenizerSpec::default()
    };
    Tokenizer::new(&spec).expect("a good vocabulary")
}

/// Reads rows of every format to token ids, and once more to samples.
///
/// # Errors
/// Those of loading.
pub fn jsonl(bytes: &[u8]) -> Result<()> {
    let tokenizer = small_tokenizer();
    let chat = ChatTemplate::new(None, &tokenizer)?;
    let options = DataOptions { max_seq_length: 64, ..DataOptions::default() };
    let origin = Origin::Memory { name: Path::new(LABEL), lines: bytes };
    let data = load_from(origin, &tokenizer, &chat, &options)?;
    for e in &data.examples {
        assert!(e.ids.len() == e.mask.len() && e.ids.len() >= 2 && e.trained_tokens() > 0);
        assert!(e.ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()));
    }
    assert_eq!(samples_from(origin, &data, &options)?.len(), data.examples.len());
    Ok(())
}

/// Verifies a frame and reads every section; as an adapter it is loaded, put into other words, and back.
///
/// # Errors
/// Those of the frame and of the adapter's reader.
pub fn frame(bytes: &[u8]) -> Result<()> {
    let corrupt = |e: String| Error::new(ErrorKind::Corrupt, format!("{LABEL}: {e}"));
    let frame = Frame::verify(bytes, bytes.len() as u64).map_err(|e| corrupt(e.to_string()))?;
    let mut sections = frame.sections(bytes).map_err(|e| corrupt(e.to_string()))?;
    for s in frame.table() {
        let n = usize::try_from(s.count()).expect("the file holds it");
        let read = match s.element() {
            Element::F32 => sections.f32(s.name(), &mut vec![0.0; n]),
            Element::F16 => sections.f16_bits(s.name(), n, drop),
            Element::Bytes => sections.bytes(s.name(), &mut vec![0; n]),
        };
        read.expect("what was verified can be read");
    }
    in_folder(&[(ENGRAFT_FILE, bytes)], |dir| {
        let adapter = Adapter::load(&dir.join(ENGRAFT_FILE))?;
        assert_eq!(adapter.theta.len(), adapter.layout.len());
        let exchange = adapter.to_exchange();
        let model = small_model();
        if let Ok(again) = Adapter::from_exchange(&model, [7; 32], exchange) {
            assert_eq!(again.theta, adapter.theta);
        }
        Ok(())
    })
}

const ENGRAFT_FILE: &str = "hostile.engraft";

/// The model that adapters are read for.
pub fn small_model() -> ModelConfig {
    ModelConfig {
        architecture: "llama".into(),
        vocab: 100,
        d_model: 12,
        n_layers: 4,
        n_heads: 3,
        n_kv_heads: 1,
        head_dim: 4,
        d_ff: 24,
        rope_dim: 4,
        rope_base: 10_000.0,
        rope_scale: 1.0,
        rms_eps: 1e-5,
        context_len: 128,
        tied: true,
    }
}

/// Settings of PEFT that fit the tensors of [`small_peft`].
pub const PEFT_CONFIG: &str =
    r#"{"peft_type":"LORA","r":2,"lora_alpha":4,"target_modules":["q_proj"],"layers_to_transform":[1]}"#;
/// Settings of mlx_lm for the same shapes.
pub const MLX_CONFIG: &str =
    r#"{"fine_tune_type":"lora","lora_parameters":{"rank":2,"scale":2.0,"dropout":0.0}}"#;

/// A pair for q of layer 1 as PEFT names it.
pub fn small_peft() -> Vec<u8> {
    let name = "base_model.model.model.layers.1.self_attn.q_proj.lora_";
    let header = format!(
        r#"{{"{name}A.weight":{{"dtype":"F32","shape":[2,12],"data_offsets":[0,96]}},"{name}B.weight":{{"dtype":"F16","shape":[12,2],"data_offsets":[96,144]}}}}"#
    );
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0x3c; 144]].concat()
}

/// Reads PEFT's tensors beside good settings.
///
/// # Errors
/// Those of the import.
pub fn safetensors(bytes: &[u8]) -> Result<()> {
    peft_folder(PEFT_CONFIG.as_bytes(), bytes)
}

/// Reads settings beside good tensors, as PEFT's and as mlx_lm's.
///
/// # Errors
/// Those of PEFT's import where both refuse.
pub fn adapter_config(bytes: &[u8]) -> Result<()> {
    let by_peft = peft_folder(bytes, &small_peft());
    by_peft.or_else(|e| mlx_folder(bytes, &small_mlx()).map_err(|_| e))
}

/// The pair of [`small_peft`] as mlx_lm has it.
pub fn small_mlx() -> Vec<u8> {
    let name = "model.layers.1.self_attn.q_proj.lora_";
    let header = format!(
        r#"{{"{name}a":{{"dtype":"F32","shape":[12,2],"data_offsets":[0,96]}},"{name}b":{{"dtype":"F16","shape":[2,12],"data_offsets":[96,144]}}}}"#
    );
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0x3c; 144]].concat()
}

/// Imports a folder of PEFT.
///
/// # Errors
/// Those of the import.
pub fn peft_folder(config: &[u8], tensors: &[u8]) -> Result<()> {
    let files = [(peft::CONFIG_FILE, config), (peft::TENSORS_FILE, tensors)];
    in_folder(&files, |dir| {
        // Telling the format reads the settings too.
        let _ = Format::detect(dir);
        used(peft::import(dir, &small_model())?.exchange)
    })
}

/// Imports a folder of mlx_lm.
///
/// # Errors
/// Those of the import.
pub fn mlx_folder(config: &[u8], tensors: &[u8]) -> Result<()> {
    let files = [(peft::CONFIG_FILE, config), (mlx::TENSORS_FILE, tensors)];
    in_folder(&files, |dir| used(mlx::import(dir, &small_model())?.exchange))
}

/// Imports an adapter of llama.cpp.
///
/// # Errors
/// Those of the import.
pub fn gguf_adapter(bytes: &[u8]) -> Result<()> {
    let name = "hostile.gguf";
    in_folder(&[(name, bytes)], |dir| used(gguf_file::import(&dir.join(name), &small_model())?.exchange))
}

/// Makes an adapter of what was imported, and that into the same again.
fn used(exchange: engraft_runtime::adapter::exchange::Exchange) -> Result<()> {
    let adapter = Adapter::from_exchange(&small_model(), [7; 32], exchange.clone())?;
    assert!(adapter.theta.iter().all(|v| v.is_finite()));
    assert_eq!(adapter.to_exchange().modules, exchange.modules);
    Ok(())
}

thread_local! {
    /// In memory where the system has such a place: a million files are a burden to a disk.
    static ROOT: tempfile::TempDir = {
        let mut folder = tempfile::Builder::new();
        folder.prefix(LABEL);
        folder.tempdir_in("/dev/shm").or_else(|_| folder.tempdir()).expect("a folder")
    };
}

/// Runs `f` in a folder that holds these files and no others; `hostile` is a part of its name.
fn in_folder(files: &[(&str, &[u8])], f: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let names: Vec<_> = files.iter().map(|(name, _)| *name).collect();
    let dir = ROOT.with(|root| root.path().join(names.join("+")));
    std::fs::create_dir_all(&dir).expect("a folder");
    for (name, bytes) in files {
        std::fs::write(dir.join(name), bytes).expect("a file");
    }
    f(&dir)
}
