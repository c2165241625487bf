//! Valid files: what is read from them, and that candle's reader reads the same.

use std::io::Cursor;

use candle_core::quantized::gguf_file::{Content, Value as CandleValue};
use engraft_kernels::DType;
use engraft_runtime::ErrorKind;
use engraft_runtime::model::Proj;
use engraft_runtime::model::gguf::{Array, Gguf, Value, ValueType};
use engraft_runtime::model::map::Map;
use engraft_runtime::model::weights::ModelFile;

use crate::common::writer::*;
use crate::gguf::shared::gguf_files;

fn model(w: &Writer) -> ModelFile {
    ModelFile::from_map(Map::from_vec("accept.gguf", w.bytes())).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn the_tiny_model_is_read_as_written() {
    for version in [2, 3] {
        let mut w = tiny();
        w.version = version;
        let m = model(&w);
        let c = m.config();
        assert_eq!((c.vocab, c.d_model, c.n_layers, c.n_heads, c.n_kv_heads), (8, 32, 1, 4, 2));
        assert_eq!((c.head_dim, c.d_ff, c.rope_dim, c.context_len, c.tied), (8, 64, 8, 64, true));
        assert_eq!((c.rope_base, c.rope_scale, c.rms_eps), (10_000.0, 1.0, 1e-5));
        assert_eq!(m.output().bytes().as_ptr(), m.token_embd().bytes().as_ptr(), "tied");
        for p in Proj::ALL {
            let q = m.block(0).proj(p);
            assert_eq!((q.rows(), q.cols()), p.shape(c));
            let name = format!("blk.0.{}.weight", p.gguf_name());
            assert_eq!(q.bytes(), &w.tensor(&name).data[..], "{name}");
            assert_eq!(m.block(0).proj(p).bytes().as_ptr(), q.bytes().as_ptr());
        }
        let f32s = |i: usize| 0.5 + i as f32 / 64.0;
        assert!((0..32).all(|i| m.block(0).attn_norm[i] == f32s(i)), "F32 norm");
        assert!((0..32).all(|i| m.output_norm()[i] == 0.5 + i as f32 / 2048.0), "F16 norm");
        assert!((0..32).all(|i| m.block(0).ffn_norm[i] == 0.5 * (1.0 + i as f32 / 128.0)), "BF16 norm");
        let tokens: Vec<_> = m.gguf().strings("tokenizer.ggml.tokens", m.bytes()).unwrap().unwrap().collect();
        let tokens: Vec<&str> = tokens.into_iter().map(Result::unwrap).collect();
        assert_eq!(tokens, ["<unk>", "<s>", "</s>", "a", "b", "c", "é", ""]);
    }
}

#[test]
fn every_element_type_and_alignment_is_placed() {
    for alignment in [1u32, 2, 32, 64, 4096, 1 << 20] {
        let mut w = Writer::new();
        w.alignment = alignment as usize;
        w.set("general.alignment", u32v(alignment));
        let types = if alignment > 4096 { &DType::ALL[..3] } else { &DType::ALL[..] };
        for t in types {
            w.add(t.name(), *t, &[256, 3, 2, 1]);
        }
        let bytes = w.bytes();
        let g = Gguf::parse(&bytes, "types.gguf").unwrap();
        assert_eq!(g.alignment(), alignment as usize);
        for (t, written) in g.tensors().iter().zip(&w.tensors) {
            assert_eq!(t.dtype.name(), &*t.name);
            assert_eq!((t.cols(), t.rows()), (256, 6));
            assert_eq!(bytes[t.range.clone()], written.data);
        }
    }
}

#[test]
fn what_may_be_left_out_has_its_default() {
    let mut w = tiny();
    for key in ["llama.vocab_size", "llama.rope.dimension_count", "llama.rope.freq_base"] {
        w.remove(key);
    }
    for key in ["tokens", "scores", "token_type", "model", "bos_token_id", "add_bos_token"] {
        w.remove(&format!("tokenizer.ggml.{key}"));
    }
    let (m, full) = (model(&w), model(&tiny()));
    assert_eq!(m.config(), full.config());
    // The same for each block is the same as once.
    let mut each = tiny();
    each.set("llama.attention.head_count_kv", arr(&[i32v(2)]));
    each.set("llama.feed_forward_length", arr(&[u32v(64)]));
    assert_eq!(model(&each).config(), full.config());
    w.remove("llama.attention.head_count_kv");
    w.reshape("blk.0.attn_k.weight", DType::Q4_0, &[32, 32]);
    w.reshape("blk.0.attn_v.weight", DType::F16, &[32, 32]);
    assert_eq!(model(&w).config().n_kv_heads, 4);
}

#[test]
fn heads_scaling_and_head_variants() {
    let mut w = tiny();
    w.add("output.weight", DType::BF16, &[32, 8]);
    w.add("rope_freqs.weight", DType::F32, &[4]);
    w.set("llama.rope.scaling.type", strv("linear"));
    w.set("llama.rope.scaling.factor", f32v(4.0));
    w.set("llama.expert_count", u32v(0));
    w.set("llama.embedding_length", u64v(32));
    w.set("llama.block_count", u8v(1));
    w.set("llama.attention.layer_norm_rms_epsilon", f64v(1e-5));
    let m = model(&w);
    assert!(!m.config().tied && m.config().rope_scale == 4.0 && m.config().rms_eps == 1e-5);
    assert_eq!(m.output().dtype(), DType::BF16);
    assert_eq!(m.rope_freqs().unwrap().len(), 4);
    w.set("llama.rope.scaling.type", strv("none"));
    assert_eq!(model(&w).config().rope_scale, 1.0);

    let mut w = tiny();
    w.set("llama.rope.scale_linear", f32v(2.0));
    assert_eq!(model(&w).config().rope_scale, 2.0);
    // Heads wider than the model's width by their number.
    let mut w = tiny();
    w.set("llama.attention.key_length", u32v(16));
    w.set("llama.attention.value_length", u32v(16));
    w.reshape("blk.0.attn_q.weight", DType::Q8_0, &[32, 64]);
    w.reshape("blk.0.attn_k.weight", DType::Q4_0, &[32, 32]);
    w.reshape("blk.0.attn_v.weight", DType::F16, &[32, 32]);
    w.reshape("blk.0.attn_output.weight", DType::Q4_1, &[64, 32]);
    let m = model(&w);
    assert_eq!((m.config().head_dim, m.config().d_q(), m.config().rope_dim), (16, 64, 8));
}

/// An adapter is bound by this digest: all that changes the model changes it, and nothing else does.
#[test]
fn the_digest_covers_the_model_and_nothing_else() {
    let plain = model(&tiny()).digest();
    let changed = |name: &str, f: &dyn Fn(&mut Writer)| {
        let mut w = tiny();
        f(&mut w);
        assert_ne!(model(&w).digest(), plain, "{name}");
    };
    for t in &tiny().tensors {
        let name = String::from_utf8(t.name.clone()).unwrap();
        changed(&name, &|w| w.tensor(&name).data[0] ^= 1);
        changed(&name, &|w| *w.tensor(&name).data.last_mut().unwrap() ^= 1);
    }
    changed("type", &|w| w.tensor("blk.0.attn_k.weight").dtype = DType::IQ4_NL.ggml_id());
    changed("base", &|w| w.set("llama.rope.freq_base", f32v(10_001.0)));
    changed("epsilon", &|w| w.set("llama.attention.layer_norm_rms_epsilon", f32v(1e-6)));
    changed("scale", &|w| w.set("llama.rope.scaling.factor", f32v(2.0)));
    changed("token", &|w| {
        w.set("tokenizer.ggml.tokens", strs(&["<unk>", "<s>", "</s>", "a", "b", "d", "é", ""]))
    });
    changed("cut", &|w| {
        w.set("tokenizer.ggml.tokens", strs(&["<unk>", "<s>", "</s>", "a", "bc", "", "é", ""]))
    });
    changed("bos", &|w| w.set("tokenizer.ggml.bos_token_id", u32v(2)));
    changed("bos type", &|w| w.set("tokenizer.ggml.bos_token_id", i32v(1)));
    changed("template", &|w| w.set("tokenizer.chat_template", strv("{{ x }}")));
    changed("order", &|w| w.tensors.swap(4, 5));

    let mut same = tiny();
    same.version = 2;
    same.set("general.name", strv("another name"));
    same.set("general.alignment", u32v(64));
    same.alignment = 64;
    same.kv.reverse();
    same.remove("llama.vocab_size");
    assert_eq!(model(&same).digest(), plain, "name, alignment, version and order of keys are no part of it");
}

#[test]
fn getters_refuse_another_type_by_name() {
    let mut w = Writer::new();
    w.set("number", i32v(-1));
    w.set("text", strv("x"));
    w.set("list", arr(&[u32v(7), u32v(u32::MAX)]));
    w.set("wide", arr(&[u64v(u64::MAX), u64v(1)]));
    w.set("signed", arr(&[V(1, vec![0xff]), V(1, vec![0x7f])]));
    w.set("doubles", arr(&[f64v(0.5)]));
    let bytes = w.bytes();
    let g = Gguf::parse(&bytes, "getters.gguf").unwrap();
    let errors = [
        g.uint("number").unwrap_err(),
        g.uint("text").unwrap_err(),
        g.float("number").unwrap_err(),
        g.boolean("number").unwrap_err(),
        g.string("list").unwrap_err(),
        g.array("text").unwrap_err(),
        g.strings("list", &bytes).map(|_| ()).unwrap_err(),
        g.floats("list", &bytes).map(|_| ()).unwrap_err(),
        g.ints("doubles", &bytes).map(|_| ()).unwrap_err(),
        g.required("absent", g.uint("absent").unwrap()).unwrap_err(),
    ];
    for e in errors {
        assert_eq!(e.kind(), ErrorKind::Corrupt);
        assert!(e.message().starts_with("getters.gguf: metadata key "), "{e}");
    }
    assert_eq!(g.ints("list", &bytes[..40]).map(|_| ()).unwrap_err().kind(), ErrorKind::Misuse);
    let ints = |key| g.ints(key, &bytes).unwrap().unwrap().collect::<Vec<i64>>();
    assert_eq!(ints("list"), [7, i64::from(u32::MAX)]);
    assert_eq!(ints("wide"), [i64::MAX, 1]);
    assert_eq!(ints("signed"), [-1, 127]);
    assert_eq!(g.floats("doubles", &bytes).unwrap().unwrap().collect::<Vec<_>>(), [0.5]);
}

/// A mapped file can change under its reader: strings then end in an error, not in a panic.
#[test]
fn strings_are_checked_again_when_read() {
    let mut bytes = tiny().bytes();
    let g = Gguf::parse(&bytes, "changed.gguf").unwrap();
    let at = g.array("tokenizer.ggml.tokens").unwrap().unwrap().range.start;
    for (i, v) in [(at, 0xff), (at + 7, 0x80), (at + 8, 0xff)] {
        let old = std::mem::replace(&mut bytes[i], v);
        let items: Vec<_> = g.strings("tokenizer.ggml.tokens", &bytes).unwrap().unwrap().collect();
        assert!(items.len() < 8 || items.iter().any(Result::is_err), "byte {i}");
        assert!(items.last().unwrap().as_ref().unwrap_err().message().contains("changed.gguf"));
        bytes[i] = old;
    }
}

#[test]
fn candle_reads_the_same() {
    let mut w = tiny();
    w.drop_tensor("blk.0.ffn_gate.weight"); // IQ4_NL, which candle does not know.
    let scalars = [V(0, vec![200]), V(1, vec![200]), V(2, vec![1, 200]), V(3, vec![1, 200]), u64v(u64::MAX)];
    for (i, v) in scalars.into_iter().chain([i64v(i64::MIN), f64v(0.1), boolv(false)]).enumerate() {
        w.set(&format!("test.scalar.{i}"), v);
    }
    let bytes = w.bytes();
    let ours = Gguf::parse(&bytes, "tiny.gguf").unwrap();
    assert_eq!(agree(&ours, &bytes), Ok(()));
    // The comparison can fail: another value, another place.
    let mut other = bytes.clone();
    let at = ours.entries()[2].range.start;
    other[at] ^= 1;
    assert!(agree(&ours, &other).is_err());
}

#[test]
fn candle_reads_the_shared_files_the_same() {
    let mut compared = 0;
    for path in gguf_files() {
        let map = Map::open(&path).unwrap();
        let ours = Gguf::parse(map.as_bytes(), map.label()).unwrap_or_else(|e| panic!("{e}"));
        if ours.tensors().iter().any(|t| matches!(t.dtype, DType::IQ4_NL | DType::IQ4_XS)) {
            eprintln!("{}: not compared, candle does not know its element types", map.label());
            continue;
        }
        assert_eq!(agree(&ours, map.as_bytes()), Ok(()), "{}", map.label());
        compared += 1;
    }
    eprintln!("{compared} files agree with candle's reader");
}

#[test]
fn shared_models_open_and_vocabularies_are_refused() {
    for path in gguf_files() {
        let opened = ModelFile::open(&path);
        if path.to_str().unwrap().contains("vocab") {
            let e = opened.map(|_| ()).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Unsupported);
            assert!(e.message().contains("only a vocabulary") || e.message().contains("qwen2"), "{e}");
            continue;
        }
        let m = opened.unwrap_or_else(|e| panic!("{e}"));
        let mut blocks = (0..m.config().n_layers).map(|l| m.block(l));
        assert!(m.config().tied && blocks.all(|b| b.attn_norm.len() == m.config().d_model));
        assert!(m.private_bytes() < 1 << 20 && m.mapped_bytes() == m.bytes().len());
        if path.ends_with("SmolLM2-135M-Instruct.Q4_1.gguf") {
            let c = m.config();
            assert_eq!((c.vocab, c.d_model, c.n_layers, c.n_heads, c.n_kv_heads), (49152, 576, 30, 9, 3));
            assert_eq!((c.head_dim, c.d_ff, c.rope_base, c.context_len), (64, 1536, 100_000.0, 8192));
            assert_eq!(
                (m.token_embd().dtype(), m.block(7).proj(Proj::Down).dtype()),
                (DType::Q8_0, DType::Q4_1)
            );
        }
    }
}

/// Holds our description of a file against candle's, in all that both hold.
fn agree(ours: &Gguf, bytes: &[u8]) -> Result<(), String> {
    let theirs = Content::read(&mut Cursor::new(bytes)).map_err(|e| e.to_string())?;
    let same = |what: &str, equal: bool| if equal { Ok(()) } else { Err(what.to_string()) };
    same("number of keys", ours.entries().len() == theirs.metadata.len())?;
    for e in ours.entries() {
        let candle = theirs.metadata.get(&*e.key).ok_or(format!("candle has no {}", e.key))?;
        same(&e.key, value_agrees(ours, &e.key, &e.value, candle, bytes))?;
    }
    same("number of tensors", ours.tensors().len() == theirs.tensor_infos.len())?;
    same("data start", ours.data_start() as u64 == theirs.tensor_data_offset)?;
    for t in ours.tensors() {
        let candle = theirs.tensor_infos.get(&*t.name).ok_or(format!("candle has no {}", t.name))?;
        let plain = |s: &str| s.replace('_', "").to_uppercase();
        same(&t.name, plain(t.dtype.name()) == plain(&format!("{:?}", candle.ggml_dtype)))?;
        same(&t.name, t.dims.iter().rev().eq(candle.shape.dims()))?;
        same(&t.name, t.range.start as u64 == theirs.tensor_data_offset + candle.offset)?;
        let size = candle.shape.elem_count() / candle.ggml_dtype.block_size() * candle.ggml_dtype.type_size();
        same(&t.name, t.range.len() == size)?;
    }
    Ok(())
}

fn value_agrees(g: &Gguf, key: &str, ours: &Value, theirs: &CandleValue, bytes: &[u8]) -> bool {
    match (ours, theirs) {
        (Value::U8(a), CandleValue::U8(b)) => a == b,
        (Value::I8(a), CandleValue::I8(b)) => a == b,
        (Value::U16(a), CandleValue::U16(b)) => a == b,
        (Value::I16(a), CandleValue::I16(b)) => a == b,
        (Value::U32(a), CandleValue::U32(b)) => a == b,
        (Value::I32(a), CandleValue::I32(b)) => a == b,
        (Value::U64(a), CandleValue::U64(b)) => a == b,
        (Value::I64(a), CandleValue::I64(b)) => a == b,
        (Value::F32(a), CandleValue::F32(b)) => a.to_bits() == b.to_bits(),
        (Value::F64(a), CandleValue::F64(b)) => a.to_bits() == b.to_bits(),
        (Value::Bool(a), CandleValue::Bool(b)) => a == b,
        // candle cuts NULs at the end off.
        (Value::String(a), CandleValue::String(b)) => a.trim_end_matches('\0') == b,
        (Value::Array(a), CandleValue::Array(b)) => array_agrees(g, key, a, b, bytes),
        _ => false,
    }
}

fn array_agrees(g: &Gguf, key: &str, ours: &Array, theirs: &[CandleValue], bytes: &[u8]) -> bool {
    if ours.count != theirs.len() {
        return false;
    }
    match ours.element {
        ValueType::String => g
            .strings(key, bytes)
            .unwrap()
            .unwrap()
            .zip(theirs)
            .all(|(a, b)| matches!(b, CandleValue::String(b) if a.unwrap().trim_end_matches('\0') == b)),
        ValueType::F32 => g
            .floats(key, bytes)
            .unwrap()
            .unwrap()
            .zip(theirs)
            .all(|(a, b)| b.to_f32().is_ok_and(|b| a.to_bits() == b.to_bits())),
        ValueType::I32 => {
            let pairs = g.ints(key, bytes).unwrap().unwrap().zip(theirs);
            pairs.into_iter().all(|(a, b)| matches!(b, CandleValue::I32(b) if a == i64::from(*b)))
        }
        other => panic!("{key}: no test file holds an array of {}", other.name()),
    }
}
