//! Broken, lying and foreign files: each is refused by the rule it breaks, in words that name the
//! file, without a panic and without memory that its size does not warrant.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use engraft_kernels::DType;
use engraft_runtime::Error;
use engraft_runtime::ErrorKind::{self, Corrupt, NonFinite, Unsupported};
use engraft_runtime::model::gguf::{Gguf, MAX_HEADER_BYTES, MAX_STRING_BYTES};
use engraft_runtime::model::map::Map;
use engraft_runtime::model::weights::ModelFile;

use crate::common::writer::*;
use crate::gguf::grid::grid;
use crate::gguf::heap::allocated;

struct Case {
    name: String,
    kind: ErrorKind,
    /// What the message must say.
    part: String,
    bytes: Vec<u8>,
}

#[derive(Default)]
pub(crate) struct Cases(Vec<Case>);

impl Cases {
    /// The tiny model with one change, in both versions.
    pub(crate) fn add(&mut self, name: &str, kind: ErrorKind, part: &str, change: impl FnOnce(&mut Writer)) {
        let mut w = tiny();
        change(&mut w);
        let bytes = w.bytes();
        if w.version == 3 {
            let mut older = bytes.clone();
            older[4..8].copy_from_slice(&2u32.to_le_bytes());
            self.raw(&format!("{name}, in version 2"), kind, part, older);
        }
        self.raw(name, kind, part, bytes);
    }

    pub(crate) fn raw(&mut self, name: &str, kind: ErrorKind, part: &str, bytes: Vec<u8>) {
        self.0.push(Case { name: name.into(), kind, part: part.into(), bytes });
    }
}

pub(crate) const HUGE: [u64; 7] =
    [u64::MAX, u64::MAX - 7, 1 << 63, (1 << 61) + 1, (1 << 58) + 1, (1 << 32) + 1, i64::MAX as u64];

#[test]
fn each_broken_file_is_refused_by_its_rule() {
    let mut cases = Cases::default();
    preamble_and_counts(&mut cases);
    strings_and_keys(&mut cases);
    values_and_arrays(&mut cases);
    alignments(&mut cases);
    tensor_descriptions(&mut cases);
    tensor_places(&mut cases);
    hyperparameters(&mut cases);
    kinds_of_models(&mut cases);
    vocabularies(&mut cases);
    tensors_of_the_model(&mut cases);
    grid(&mut cases);
    assert!(cases.0.len() >= 4000, "only {} cases", cases.0.len());
    let names: HashSet<_> = cases.0.iter().map(|c| &c.name).collect();
    assert_eq!(names.len(), cases.0.len(), "each case has its own name");

    let (mut wrong, mut slowest) = (Vec::new(), (Duration::ZERO, ""));
    for case in &cases.0 {
        let begin = Instant::now();
        let (result, bytes) = allocated(|| open(case.bytes.clone()));
        let time = begin.elapsed();
        slowest = slowest.max((time, &case.name));
        match result {
            // The promise is 100 ms; other processes may have the core meanwhile.
            _ if time > Duration::from_millis(500) => wrong.push(format!("{}: {time:?}", case.name)),
            Ok(_) => wrong.push(format!("{}: accepted", case.name)),
            Err(e) if e.kind() != case.kind || !tells(&e, &case.part) => {
                wrong.push(format!("{}: wanted {:?} {:?}, got {e:?}", case.name, case.kind, case.part));
            }
            Err(e) if !e.message().starts_with(LABEL) => wrong.push(format!("{}: no label: {e}", case.name)),
            Err(e) if e.message().len() > 1024 => wrong.push(format!("{}: long message", case.name)),
            Err(_) if bytes > 32 * case.bytes.len() + 65536 => {
                wrong.push(format!("{}: {bytes} bytes allocated for {}", case.name, case.bytes.len()));
            }
            Err(_) => {}
        }
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.0.len(), wrong.join("\n"));
    eprintln!(
        "{} GGUF files are refused by their rule; slowest {} µs ({})",
        cases.0.len(),
        slowest.0.as_micros(),
        slowest.1
    );
    assert!(open(tiny().bytes()).is_ok(), "the file that all cases are made of is valid");
}

const LABEL: &str = "hostile.gguf";

/// Whether an error names the rule: of what 32 bits can't count, the dimension itself is refused first.
fn tells(error: &Error, part: &str) -> bool {
    let beyond = usize::BITS == 32 && error.message().contains("exceeds this machine's address space");
    beyond || error.message().contains(part)
}

fn open(bytes: Vec<u8>) -> engraft_runtime::Result<ModelFile> {
    ModelFile::from_map(Map::from_vec(LABEL, bytes))
}

fn preamble_and_counts(c: &mut Cases) {
    c.raw("no byte", Corrupt, "magic", vec![]);
    c.raw("three bytes", Corrupt, "magic", b"GGU".to_vec());
    c.raw("magic alone", Corrupt, "version", b"GGUF".to_vec());
    c.raw("a web page", Corrupt, "not a GGUF file", b"<!DOCTYPE html><html>".to_vec());
    c.raw(
        "a Git LFS pointer",
        Corrupt,
        "not a GGUF file",
        b"version https://git-lfs.github.com/spec/v1".to_vec(),
    );
    c.raw("zeros", Corrupt, "not a GGUF file", vec![0; 4096]);
    c.raw("ones", Corrupt, "not a GGUF file", vec![0xff; 4096]);
    for magic in [b"ggml", b"ggjt", b"GGUf", b"\x1b[2J", b"GGUE"] {
        let name = format!("magic {}", magic.escape_ascii());
        c.add(&name, Corrupt, &format!("{}", magic.escape_ascii()), |w| w.magic = *magic);
    }
    c.add("magic reversed", Unsupported, "byte-swapped", |w| w.magic = *b"FUGG");
    for version in [1u32, 2, 3] {
        let name = format!("version {version} swapped");
        c.add(&name, Unsupported, "byte-swapped", |w| w.version = version.swap_bytes());
    }
    for version in [0, 1, 4, 5, 255, u32::MAX] {
        c.add(&format!("version {version}"), Unsupported, "version 2 or 3", |w| w.version = version);
    }
    for n in HUGE.into_iter().chain([65_537, 65_536, 1 << 20]) {
        c.add(&format!("{n} tensors"), Corrupt, "tensors; at most", |w| w.n_tensors = Some(n));
        c.add(&format!("{n} keys"), Corrupt, "metadata keys; at most", |w| w.n_kv = Some(n));
    }
    c.add("one tensor too many", Corrupt, "tensor 11 of 12", |w| w.n_tensors = Some(12));
    c.add("one key too many", Corrupt, "tensor 0 of 11", |w| w.n_kv = Some(19));
    c.add("one key too few", Corrupt, "tensor 0 of 11", |w| w.n_kv = Some(17));
    c.add("no key declared", Corrupt, "tensor 0 of 11", |w| w.n_kv = Some(0));
}

fn strings_and_keys(c: &mut Cases) {
    for len in HUGE.into_iter().chain([MAX_STRING_BYTES + 1]) {
        c.add(&format!("key of {len}"), Corrupt, "key declares", |w| w.kv[3].key_len = Some(len));
        c.add(&format!("string of {len}"), Corrupt, "value declares", |w| {
            w.set("general.name", V(8, len.to_le_bytes().to_vec()));
        });
        c.add(&format!("tensor name of {len}"), Corrupt, "name declares", |w| {
            w.tensors[2].name_len = Some(len)
        });
        c.add(&format!("array element of {len}"), Corrupt, "element 1 declares", |w| {
            w.set("x", arrv(8, 2, &[strv("ok"), V(8, len.to_le_bytes().to_vec())]));
        });
    }
    c.add("string behind the end", Corrupt, "are left", |w| {
        w.set("general.name", V(8, 1_000_000u64.to_le_bytes().to_vec()));
    });
    c.add("empty key", Corrupt, "a key of 0 bytes", |w| w.push("", u32v(1)));
    c.add("long key", Corrupt, "a key of 65536 bytes", |w| w.push(&"k".repeat(65_536), u32v(1)));
    c.add("key twice", Corrupt, "twice", |w| w.push("general.name", strv("again")));
    c.add("key twice, other type", Corrupt, "twice", |w| w.push("llama.block_count", u64v(1)));
    c.add("long key twice", Corrupt, "twice", |w| {
        (0..2).for_each(|_| w.push(&"\u{202e}".repeat(9000), u32v(1)));
    });
    let broken: [&[u8]; 5] = [b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"];
    for (i, bytes) in broken.into_iter().enumerate() {
        c.add(&format!("value not UTF-8 {i}"), Corrupt, "UTF-8", |w| w.set("general.name", strv(bytes)));
        c.add(&format!("key not UTF-8 {i}"), Corrupt, "UTF-8", |w| w.kv[1].key = bytes.to_vec());
        c.add(&format!("tensor name not UTF-8 {i}"), Corrupt, "UTF-8", |w| {
            w.tensors[0].name = bytes.to_vec()
        });
        c.add(&format!("element not UTF-8 {i}"), Corrupt, "UTF-8", |w| w.set("x", arr(&[strv(bytes)])));
    }
}

fn values_and_arrays(c: &mut Cases) {
    for id in [13, 14, 255, 1 << 8, 1 << 31, u32::MAX] {
        c.add(&format!("value type {id}"), Corrupt, "does not exist", |w| w.set("x", V(id, vec![0; 16])));
        c.add(&format!("element type {id}"), Corrupt, "does not exist", |w| {
            w.set("x", arrv(id, 1, &[u64v(0)]))
        });
    }
    for b in [2, 3, 0x80, 0xff] {
        c.add(&format!("bool {b}"), Corrupt, "a bool is 0 or 1", |w| w.set("x", V(7, vec![b])));
        c.add(&format!("bools {b}"), Corrupt, "a bool is 0 or 1", |w| {
            w.set("x", arr(&[boolv(true), V(7, vec![b])]))
        });
    }
    for element in [0u32, 2, 4, 6, 7, 8, 10, 12] {
        for count in [u64::MAX, (1 << 61) + 1, 1 << 62, 1 << 40] {
            let name = format!("{count} elements of type {element}");
            c.add(&name, Corrupt, "needs more than", |w| w.set("x", arrv(element, count, &[u64v(0)])));
        }
    }
    c.add("one head count for two blocks", Corrupt, "has 2 elements for 1 blocks", |w| {
        w.set("llama.attention.head_count_kv", arr(&[i32v(2), i32v(2)]));
    });
    c.add("array of arrays", Unsupported, "arrays of arrays", |w| {
        w.set("x", arr(&[arr(&[u32v(1)])]));
    });
    c.add("empty array of arrays", Unsupported, "arrays of arrays", |w| w.set("x", arrv(9, 0, &[])));
    let wrong = |key: &'static str, v: V| (key, v);
    for (key, v) in [
        wrong("general.architecture", u32v(1)),
        wrong("general.type", u32v(1)),
        wrong("llama.block_count", strv("1")),
        wrong("llama.block_count", f32v(1.0)),
        wrong("llama.block_count", boolv(true)),
        wrong("llama.block_count", i32v(-1)),
        wrong("llama.feed_forward_length", arr(&[f32v(64.0)])),
        wrong("llama.embedding_length", arr(&[u32v(32)])),
        wrong("llama.rope.freq_base", u32v(10_000)),
        wrong("llama.rope.scaling.type", u32v(1)),
        wrong("llama.attention.layer_norm_rms_epsilon", strv("1e-5")),
        wrong("tokenizer.ggml.tokens", arr(&[u32v(1)])),
        wrong("tokenizer.ggml.tokens", strv("a")),
        wrong("tokenizer.ggml.scores", arr(&[i32v(1)])),
        wrong("tokenizer.ggml.token_type", arr(&[f32v(1.0)])),
        wrong("tokenizer.ggml.merges", arr(&[u32v(1)])),
        wrong("tokenizer.ggml.bos_token_id", strv("1")),
        wrong("tokenizer.ggml.bos_token_id", i32v(-1)),
    ] {
        let name = format!("{key} as type {} {:?}", v.0, v.1);
        c.add(&name, Corrupt, &format!("{key}\" must be"), |w| w.set(key, v));
    }
}

fn alignments(c: &mut Cases) {
    for a in [0u32, 3, 31, 33, 48, (1 << 20) + 1, 1 << 21, 1 << 31, u32::MAX] {
        c.add(&format!("alignment {a}"), Corrupt, "general.alignment", |w| {
            w.set("general.alignment", u32v(a))
        });
    }
    for (i, v) in
        [u64v(32), i32v(32), u8v(32), strv("32"), f32v(32.0), arr(&[u32v(32)])].into_iter().enumerate()
    {
        c.add(&format!("alignment type {i}"), Corrupt, "must be of type u32", |w| {
            w.set("general.alignment", v)
        });
    }
    c.add("alignment unlike the layout", Corrupt, "multiple of 4096", |w| {
        w.set("general.alignment", u32v(4096))
    });
    c.add("alignment below the layout", Corrupt, "a hole or an overlap", |w| {
        w.tensor("blk.0.attn_k.weight").dims = vec![32, 15];
        w.tensor("blk.0.attn_k.weight").data.truncate(15 * 18);
        w.set("general.alignment", u32v(2));
    });
}

fn tensor_descriptions(c: &mut Cases) {
    let q = "blk.0.attn_q.weight";
    c.add("empty name", Corrupt, "1 to 63 bytes", |w| w.tensors[1].name.clear());
    c.add("name of 64", Corrupt, "1 to 63 bytes", |w| w.tensors[1].name = vec![b'n'; 64]);
    c.add("name of 1000", Corrupt, "1 to 63 bytes", |w| w.tensors[1].name = vec![b'n'; 1000]);
    c.add("NUL in a name", Corrupt, "without NUL", |w| w.tensors[1].name = b"a\0b".to_vec());
    c.add("name twice", Corrupt, "twice", |w| w.tensors[7].name = w.tensors[8].name.clone());
    for n in [0, 5, 6, 255, 1 << 31, u32::MAX] {
        c.add(&format!("{n} dimensions"), Corrupt, "1 to 4 are allowed", |w| w.tensor(q).n_dims = Some(n));
    }
    for dims in [vec![0], vec![0, 32], vec![32, 0], vec![32, 32, 0], vec![32, 32, 1, 0]] {
        c.add(&format!("dims {dims:?}"), Corrupt, "is 0", |w| w.tensor(q).dims = dims);
    }
    for dims in [
        vec![1 << 40, 1 << 40],
        vec![1 << 32, 1 << 32],
        vec![32, u64::MAX],
        vec![32, 1 << 59],
        vec![1 << 16; 4],
        vec![1 << 21, 1 << 21, 1 << 22],
        vec![1 << 63, 2],
        vec![32, (1 << 63) + 1, 2],
    ] {
        c.add(&format!("dims {dims:?}"), Corrupt, "overflows", |w| w.tensor(q).dims = dims);
    }
    c.add("bytes overflow, elements do not", Corrupt, "overflows", |w| {
        w.tensor("token_embd.weight").dims = vec![1 << 62];
    });
    for dims in [vec![31, 32], vec![33, 32], vec![1], vec![16, 64], vec![u64::MAX]] {
        c.add(&format!("dims {dims:?}"), Corrupt, "not a whole number of Q8_0 blocks", |w| {
            w.tensor(q).dims = dims
        });
    }
    for id in [
        4,
        5,
        9,
        15,
        16,
        17,
        18,
        19,
        21,
        22,
        24,
        25,
        26,
        27,
        28,
        29,
        31,
        33,
        34,
        35,
        36,
        39,
        40,
        255,
        u32::MAX,
    ] {
        c.add(&format!("element type {id} of a tensor"), Unsupported, "is not supported; quantize", |w| {
            w.tensor(q).dtype = id;
        });
    }
}

fn tensor_places(c: &mut Cases) {
    let (q, k) = ("blk.0.attn_q.weight", "blk.0.attn_k.weight");
    // token_embd 1024 bytes and attn_norm 128 bytes come before q, q itself takes 1088.
    for offset in [1, 16, 31, 1153, u64::MAX, (1 << 63) + 1] {
        c.add(&format!("offset {offset}"), Corrupt, "not a multiple of 32", |w| {
            w.tensor(q).offset = Some(offset)
        });
    }
    for offset in [0, 32, 1024, 1120, 1184, 1152 + 4096, 1 << 40, 1 << 63, u64::MAX - 31] {
        c.add(&format!("offset {offset} of q"), Corrupt, "hole or an overlap", |w| {
            w.tensor(q).offset = Some(offset)
        });
    }
    c.add("a tensor on the place of another", Corrupt, "overlap", |w| w.tensor(k).offset = Some(1152));
    c.add("first offset not 0", Corrupt, "overlap", |w| w.tensors[0].offset = Some(32));
    c.add("two tensors swapped", Corrupt, "overlap", |w| {
        (w.tensor(q).offset, w.tensor(k).offset) = (Some(1152 + 288), Some(1152));
    });
    for cut in [1, 2, 32, 63, 64] {
        c.add(&format!("last tensor short of {cut}"), Corrupt, "reach past the file's end", |w| {
            let data = &mut w.tensor("output_norm.weight").data;
            data.truncate(data.len() - cut);
        });
    }
    c.add("rows beyond the file", Corrupt, "reach past the file's end", |w| {
        w.tensor("output_norm.weight").dims = vec![1 << 40];
    });
    c.add("sum of sizes wraps", Corrupt, "reach past the file's end", |w| {
        w.tensors[0].dims = vec![1 << 61];
        w.tensors[1].offset = Some(1 << 63);
        w.tensors[1].dims = vec![1 << 61];
        w.tensors[2].offset = Some(0);
    });
    let bytes = tiny().header();
    c.raw("the header alone", Corrupt, "reach past the file's end", bytes);
}

fn hyperparameters(c: &mut Cases) {
    for name in [
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ] {
        let key = format!("llama.{name}");
        c.add(&format!("{key} missing"), Corrupt, &format!("{key}\" is missing"), |w| w.remove(&key));
    }
    for name in [
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "rope.dimension_count",
        "attention.key_length",
        "attention.value_length",
    ] {
        let key = format!("llama.{name}");
        for v in [0, u64::from(u32::MAX), u64::MAX, 1 << 32] {
            c.add(&format!("{key} {v}"), Corrupt, &format!("{key}: {v} is not in 1 to"), |w| {
                w.set(&key, u64v(v))
            });
        }
    }
    let mut odd = |key: &str, v: u32, part: &str| {
        c.add(&format!("{key} {v}"), Corrupt, part, |w| w.set(key, u32v(v)));
    };
    odd("llama.attention.head_count", 3, "not a multiple of 2");
    odd("llama.attention.head_count", 6, "not a multiple of 6");
    odd("llama.attention.head_count_kv", 3, "not a multiple of 3");
    odd("llama.attention.head_count_kv", 8, "not a multiple of 8");
    odd("llama.rope.dimension_count", 7, "must be even");
    odd("llama.rope.dimension_count", 10, "at most 8");
    odd("llama.embedding_length", 33, "not a multiple of 4");
    for name in
        ["rope.freq_base", "attention.layer_norm_rms_epsilon", "rope.scaling.factor", "rope.scale_linear"]
    {
        let key = format!("llama.{name}");
        for v in [0.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE] {
            c.add(&format!("{key} {v}"), Corrupt, &format!("{key}: "), |w| w.set(&key, f32v(v)));
        }
    }
    c.add("heads too wide together", Corrupt, "too wide", |w| {
        w.set("llama.attention.head_count", u32v(1024));
        w.set("llama.attention.key_length", u32v(1024));
        w.set("llama.attention.value_length", u32v(1024));
    });
}

fn kinds_of_models(c: &mut Cases) {
    c.add("no architecture", Corrupt, "general.architecture\" is missing", |w| {
        w.remove("general.architecture")
    });
    for name in ["qwen2", "gemma3", "mamba", "", "llama4", "LLAMA", "\u{1b}[31mllama"] {
        let shown = format!("architecture \"{}\" is not supported", name.escape_debug());
        c.add(&format!("architecture {name:?}"), Unsupported, &shown, |w| {
            w.set("general.architecture", strv(name))
        });
    }
    c.add("an adapter", Unsupported, "this is an adapter", |w| w.set("general.type", strv("adapter")));
    c.add("a projector", Unsupported, "general.type", |w| w.set("general.type", strv("mmproj")));
    c.add("a part of a split", Unsupported, "split", |w| w.set("split.count", V(2, vec![2, 0])));
    // Parts after the first say nothing else of the model.
    c.add("the second part of a split", Unsupported, "part 2 of a model split into 2 files", |w| {
        w.remove("general.architecture");
        w.set("split.count", V(2, vec![2, 0]));
        w.set("split.no", V(2, vec![1, 0]));
    });
    c.add("no tensors", Unsupported, "only a vocabulary", |w| w.tensors.clear());
    c.add("old quantization", Unsupported, "quantization version 1", |w| {
        w.set("general.quantization_version", u32v(1));
    });
    let mut variant = |key: &str, v: V, part: &str| {
        c.add(&format!("llama.{key}"), Unsupported, part, |w| w.set(&format!("llama.{key}"), v));
    };
    variant("expert_count", u32v(8), "mixture of experts");
    variant("expert_used_count", u32v(2), "mixture of experts");
    variant("expert_count_shared", strv("x"), "mixture of experts");
    variant("attention.sliding_window", u32v(4096), "variant");
    variant("attention.causal", boolv(false), "variant");
    variant("attention.scale", f32v(0.5), "variant");
    variant("attention.clamp_kqv", f32v(8.0), "variant");
    variant("attention.max_alibi_bias", f32v(8.0), "variant");
    variant("logit_scale", f32v(0.5), "variant");
    variant("embedding_scale", f32v(12.0), "variant");
    variant("residual_scale", f32v(0.2), "variant");
    variant("final_logit_softcapping", f32v(30.0), "variant");
    variant("use_parallel_residual", boolv(true), "variant");
    variant("rope.scaling.attn_factor", f32v(1.2), "variant");
    for kind in ["yarn", "longrope", "llama3", "LINEAR", ""] {
        let part = format!("rope scaling of type \"{kind}\"");
        c.add(&part, Unsupported, &part, |w| w.set("llama.rope.scaling.type", strv(kind)));
    }
    c.add("values unlike keys", Unsupported, "16 value elements", |w| {
        w.set("llama.attention.value_length", u32v(16));
    });
}

fn vocabularies(c: &mut Cases) {
    for n in [0, 7, 9, 1 << 31] {
        c.add(&format!("vocab_size {n}"), Corrupt, "8 rows", |w| w.set("llama.vocab_size", u32v(n)));
    }
    for n in [1, 7, 9] {
        c.add(&format!("{n} tokens"), Corrupt, "tokens has", |w| {
            w.set("tokenizer.ggml.tokens", strs(&vec!["a"; n]))
        });
        c.add(&format!("{n} scores"), Corrupt, "scores has", |w| {
            w.set("tokenizer.ggml.scores", arr(&vec![f32v(0.0); n]));
        });
        c.add(&format!("{n} types"), Corrupt, "token_type has", |w| {
            w.set("tokenizer.ggml.token_type", arr(&vec![i32v(1); n]));
        });
    }
    c.add("no tokens in their array", Corrupt, "tokens has 0", |w| {
        w.set("tokenizer.ggml.tokens", arrv(8, 0, &[]))
    });
    for id in ["bos", "eos", "eot", "padding", "unknown", "fim_pre"] {
        for v in [8, u32::MAX] {
            let key = format!("tokenizer.ggml.{id}_token_id");
            c.add(&format!("{key} {v}"), Corrupt, "the vocabulary has 8", |w| w.set(&key, u32v(v)));
        }
    }
    let terminal = "tokenizer.ggml.\u{1b}[2J_token_id";
    c.add("an id named for terminals", Corrupt, "\\u{1b}[2J_token_id\" must be", |w| {
        w.set(terminal, strv("a"))
    });
    let long = format!("tokenizer.ggml.{}_token_id", "a".repeat(60_000));
    c.add("an id of a long name", Corrupt, "aaa…\" must be", |w| w.set(&long, strv("a")));
    c.add("fewer embedding rows than tokens", Corrupt, "8, but token_embd.weight has 7", |w| {
        w.reshape("token_embd.weight", DType::F32, &[32, 7]);
    });
}

fn tensors_of_the_model(c: &mut Cases) {
    for t in tiny().tensors {
        let name = String::from_utf8(t.name.clone()).unwrap();
        c.add(&format!("without {name}"), Corrupt, &format!("tensor {name} is missing"), |w| {
            w.drop_tensor(&name)
        });
        if name == "token_embd.weight" {
            continue;
        }
        let part = format!("tensor {name} has shape");
        c.add(&format!("{name} of 4 dims"), Corrupt, &part, |w| w.tensor(&name).dims.resize(4, 1));
        c.add(&format!("{name} shorter"), Corrupt, &part, |w| {
            let (mut dims, rows) = (t.dims.clone(), t.dims.len() - 1);
            dims[rows] = if rows == 0 { 31 } else { dims[rows] - 1 };
            w.reshape(&name, DType::F32, &dims);
        });
    }
    c.add("embedding of another width", Corrupt, "token_embd.weight has shape", |w| {
        w.reshape("token_embd.weight", DType::F32, &[64, 8]);
    });
    c.add("transposed", Corrupt, "blk.0.ffn_down.weight has shape", |w| {
        w.reshape("blk.0.ffn_down.weight", DType::F32, &[32, 64]);
    });
    c.add("more blocks than tensors", Corrupt, "blk.1.attn_q.weight is missing", |w| {
        w.set("llama.block_count", u32v(2));
    });
    c.add("head of another shape", Corrupt, "output.weight has shape", |w| {
        w.add("output.weight", DType::F32, &[32, 9]);
    });
    c.add("rope_freqs of another shape", Corrupt, "rope_freqs.weight has shape", |w| {
        w.add("rope_freqs.weight", DType::F32, &[8]);
    });
    c.add("rope_freqs of 0", Corrupt, "divisor of 0", |w| {
        w.add("rope_freqs.weight", DType::F32, &[4]);
        w.tensor("rope_freqs.weight").data.fill(0);
    });
    for name in ["blk.0.attn_q.bias", "blk.0.ffn_down.bias"] {
        c.add(name, Unsupported, "biases are not supported", |w| w.add(name, DType::F32, &[32]));
    }
    for name in [
        "blk.1.attn_q.weight",
        "blk.0.ffn_gate_exps.weight",
        "blk.0.attn_q_norm.weight",
        "blk.00.attn_q.weight",
        "rope_factors_long.weight",
        "TOKEN_EMBD.weight",
        "v.patch_embd.weight",
        "\u{1b}]0;title",
    ] {
        let part = format!("\"{}\" (1 in all) has no place", name.escape_debug());
        c.add(&format!("surplus {name:?}"), Unsupported, &part, |w| w.add(name, DType::F32, &[32]));
    }
    c.add("norm of blocks", Unsupported, "a vector must be", |w| {
        w.reshape("output_norm.weight", DType::Q8_0, &[32]);
    });
    for (name, dtype, bytes) in [
        ("blk.0.attn_norm.weight", "NaN", f32::NAN.to_le_bytes().to_vec()),
        ("blk.0.attn_norm.weight", "inf", f32::INFINITY.to_le_bytes().to_vec()),
        ("output_norm.weight", "NaN", vec![0x01, 0x7e]),
        ("output_norm.weight", "inf", vec![0x00, 0x7c]),
        ("blk.0.ffn_norm.weight", "NaN", vec![0xc1, 0x7f]),
        ("blk.0.ffn_norm.weight", "-inf", vec![0x80, 0xff]),
    ] {
        c.add(&format!("{dtype} in {name}"), NonFinite, &format!("element 0 is {dtype}"), |w| {
            w.tensor(name).data[..bytes.len()].copy_from_slice(&bytes);
        });
    }
}

#[test]
fn no_prefix_of_a_file_is_a_file() {
    let whole = tiny().bytes();
    for len in 0..whole.len() {
        let e = open(whole[..len].to_vec()).map(|_| ()).expect_err("a cut file");
        assert_eq!(e.kind(), Corrupt, "{len}: {e}");
        assert!(e.message().starts_with(LABEL), "{len}: {e}");
    }
}

/// What a flipped bit leaves valid is used to the full: every view, string and number, and the digest.
#[test]
fn every_bit_flip_of_the_header_is_refused_or_harmless() {
    let whole = tiny().bytes();
    let (mut refused, mut accepted) = (0, 0);
    for bit in 0..tiny().header().len() * 8 {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        match open(bytes) {
            Err(e) => {
                assert!(e.message().starts_with(LABEL), "bit {bit}: {e}");
                refused += 1;
            }
            Ok(m) => {
                use_it_all(&m);
                accepted += 1;
            }
        }
    }
    // Names, tokens and scores may be anything; lengths, counts, types and shapes may not.
    assert!(refused > 5000 && accepted > 100, "{refused} refused, {accepted} accepted");
}

fn use_it_all(m: &ModelFile) {
    let mut end = m.gguf().data_start();
    for t in m.gguf().tensors() {
        assert!(t.range.start >= end && t.range.end <= m.bytes().len() && t.range.start % 32 == 0);
        end = t.range.end;
    }
    let blocks = (0..m.config().n_layers).flat_map(|l| m.block(l).proj);
    let matrices = blocks.chain([m.token_embd(), m.output()]);
    for q in matrices {
        assert_eq!(q.row(q.rows() - 1).len(), q.row_bytes());
    }
    assert!(m.output_norm().iter().all(|v| v.is_finite()));
    for e in m.gguf().entries() {
        if let Ok(Some(strings)) = m.gguf().strings(&e.key, m.bytes()) {
            strings.for_each(|s| assert!(s.is_ok()));
        }
        if let Ok(Some(ints)) = m.gguf().ints(&e.key, m.bytes()) {
            ints.for_each(drop);
        }
    }
    assert_ne!(m.digest(), [0; 32]);
}

/// Random bytes behind a valid beginning, and random changes of several bytes at once.
#[test]
fn random_damage_never_panics() {
    let whole = tiny().bytes();
    let header = tiny().header().len();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % below
    };
    for _ in 0..20_000 {
        let mut bytes = whole.clone();
        for _ in 0..1 + random(4) {
            let at = random(header - 8);
            match random(4) {
                0 => bytes[at] = random(256) as u8,
                1 => bytes[at..at + 8].fill(0xff),
                2 => bytes[at..at + 4].fill(0),
                _ => bytes.copy_within(random(header - 8)..header, at.min(header - 8)),
            }
            bytes.resize(whole.len(), 0);
        }
        if let Ok(m) = open(bytes) {
            use_it_all(&m);
        }
    }
}

/// A header without end bounds the time that a hostile file can take.
#[test]
fn the_header_has_a_greatest_length() {
    let element = 16 << 20;
    let count = MAX_HEADER_BYTES / element + 1;
    let mut w = Writer::new();
    w.set("x", arrv(8, count as u64, &[]));
    // Zeros not written to stay the system's one page of zeros.
    let mut bytes = vec![0u8; MAX_HEADER_BYTES + 2 * element];
    let header = w.header();
    bytes[..header.len()].copy_from_slice(&header);
    let mut at = header.len();
    for _ in 0..count {
        bytes[at..at + 8].copy_from_slice(&((element - 8) as u64).to_le_bytes());
        at += element;
    }
    let e = Gguf::parse(&bytes, "long.gguf").unwrap_err();
    assert!(e.kind() == Unsupported && e.message().contains("the header exceeds"), "{e}");
}

/// 65,536 entries of the least size, in the worst order, take a moment and no more memory than they are worth.
#[test]
fn many_entries_stay_cheap() {
    let mut w = Writer::new();
    for i in (0..65_536u32).rev() {
        w.push(&format!("{i:05}"), u8v(0));
    }
    let bytes = w.bytes();
    let start = std::time::Instant::now();
    let (g, heap) = allocated(|| Gguf::parse(&bytes, "many.gguf").unwrap());
    assert_eq!(g.entries().len(), 65_536);
    assert!(heap < 16 * bytes.len(), "{heap} bytes for a file of {}", bytes.len());
    assert!(start.elapsed().as_secs() < 5);
}
