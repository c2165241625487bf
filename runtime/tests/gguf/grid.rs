//! The same rules, applied to everything they apply to: each key, each tensor, each type, and the values on
//! both sides of each limit. And the holes of other parsers, by their public numbers.

use std::collections::BTreeSet;

use engraft_kernels::DType;
use engraft_runtime::ErrorKind::{Corrupt, Unsupported};
use engraft_runtime::model::gguf::{MAX_STRING_BYTES, ValueType};
use strum::VariantArray;

use crate::common::writer::*;
use crate::gguf::hostile::{Cases, HUGE};

pub(crate) fn grid(c: &mut Cases) {
    typed_keys(c);
    bounded_numbers(c);
    every_key(c);
    every_tensor(c);
    every_extent(c);
    every_type_of_a_tensor(c);
    every_place(c);
    counts(c);
    known_holes(c);
}

/// A value of a type: 1 or "1" or [1], as the type has it.
fn one(t: ValueType) -> V {
    let int = |bytes: usize| V(t.id(), 1u64.to_le_bytes()[..bytes].to_vec());
    match t {
        ValueType::F32 => f32v(1.0),
        ValueType::F64 => f64v(1.0),
        ValueType::String => strv("1"),
        ValueType::Array => arr(&[u32v(1)]),
        _ => int(t.min_bytes()),
    }
}

/// The same with −1.
fn minus_one(t: ValueType) -> V {
    V(t.id(), vec![0xff; t.min_bytes()])
}

const SIGNED: [ValueType; 4] = [ValueType::I8, ValueType::I16, ValueType::I32, ValueType::I64];

/// The greatest value of each number.
const NUMBERS: [(&str, u64); 9] = [
    ("llama.context_length", 1 << 24),
    ("llama.embedding_length", 1 << 16),
    ("llama.block_count", 1024),
    ("llama.feed_forward_length", 1 << 20),
    ("llama.attention.head_count", 1024),
    ("llama.attention.head_count_kv", 1024),
    ("llama.rope.dimension_count", 1024),
    ("llama.attention.key_length", 1024),
    ("llama.attention.value_length", 1024),
];
const FLOATS: [&str; 4] = [
    "llama.rope.freq_base",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.rope.scaling.factor",
    "llama.rope.scale_linear",
];

/// Every type under every key that is read, but those that its getter takes.
fn typed_keys(c: &mut Cases) {
    let others = [
        "llama.vocab_size",
        "split.count",
        "general.quantization_version",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.eot_token_id",
        "tokenizer.ggml.padding_token_id",
        "tokenizer.ggml.unknown_token_id",
    ];
    for &t in ValueType::VARIANTS {
        let mut wrong = |key: &str, v: V| {
            let name = format!("{key} as {} {:?}", t.name(), v.1);
            c.add(&name, Corrupt, &format!("{key}\" must be"), |w| w.set(key, v));
        };
        for key in NUMBERS.iter().map(|(key, _)| *key).chain(others) {
            let may_be_listed = ["head_count", "head_count_kv", "feed_forward_length"];
            let is_listed = t == ValueType::Array && may_be_listed.iter().any(|end| key.ends_with(end));
            if !t.is_integer() && !is_listed {
                wrong(key, one(t));
            } else if SIGNED.contains(&t) {
                wrong(key, minus_one(t));
            }
        }
        if !matches!(t, ValueType::F32 | ValueType::F64) {
            FLOATS.iter().for_each(|key| wrong(key, one(t)));
        }
        if t != ValueType::String {
            ["general.architecture", "general.type", "llama.rope.scaling.type"]
                .iter()
                .for_each(|key| wrong(key, one(t)));
        }
        if t == ValueType::Array {
            continue;
        }
        let eight = || arr(&vec![one(t); 8]);
        let eight = || V(9, [&t.id().to_le_bytes()[..], &eight().1[4..]].concat());
        let arrays = ["tokens", "scores", "token_type", "merges"].map(|k| format!("tokenizer.ggml.{k}"));
        arrays.iter().for_each(|key| wrong(key, one(t)));
        let fits = [
            t == ValueType::String,
            matches!(t, ValueType::F32 | ValueType::F64),
            t.is_integer(),
            t == ValueType::String,
        ];
        arrays.iter().zip(fits).filter(|(_, fits)| !fits).for_each(|(key, _)| wrong(key, eight()));
        if t != ValueType::U32 {
            c.add(&format!("alignment as {}", t.name()), Corrupt, "must be of type u32", |w| {
                w.set("general.alignment", one(t));
            });
        }
    }
}

/// Numbers just outside of their bounds, in every type that holds them.
fn bounded_numbers(c: &mut Cases) {
    for (key, max) in NUMBERS {
        for t in ValueType::VARIANTS.iter().copied().filter(|t| t.is_integer()) {
            let bits = 8 * t.min_bytes() - usize::from(SIGNED.contains(&t));
            let greatest = u64::MAX >> (64 - bits);
            for v in [0, max + 1, max + 2, 2 * max, greatest] {
                if v > greatest || (1..=max).contains(&v) {
                    continue;
                }
                let bytes = v.to_le_bytes()[..t.min_bytes()].to_vec();
                c.add(
                    &format!("{key} {v} as {}", t.name()),
                    Corrupt,
                    &format!("{key}: {v} is not in 1 to"),
                    |w| {
                        w.set(key, V(t.id(), bytes));
                    },
                );
            }
        }
    }
    for (key, least, greatest) in
        [(FLOATS[0], 1.0f32, 1e12f32), (FLOATS[1], 1e-12, 0.1), (FLOATS[2], 1.0, 1e6), (FLOATS[3], 1.0, 1e6)]
    {
        let outside = [least.next_down(), greatest.next_up(), -least, -greatest, -0.0, f32::MIN, f32::NAN];
        for v in outside {
            let part = format!("{key}: ");
            c.add(&format!("{key} {v:e} in f32"), Corrupt, &part, |w| w.set(key, f32v(v)));
            c.add(&format!("{key} {v:e} in f64"), Corrupt, &part, |w| w.set(key, f64v(v.into())));
        }
        c.add(&format!("{key} 1e300"), Corrupt, &format!("{key}: inf"), |w| w.set(key, f64v(1e300)));
    }
    for id in ["bos", "eos", "eot", "padding", "unknown", "fim_suf", "cls"] {
        for (i, v) in
            [u8v(8), u32v(9), u64v(8), u64v(u64::MAX), i32v(8), i64v(i64::MAX)].into_iter().enumerate()
        {
            let key = format!("tokenizer.ggml.{id}_token_id");
            c.add(&format!("{key} beyond, {i}"), Corrupt, "the vocabulary has 8", |w| w.set(&key, v));
        }
    }
    for shift in 0..32 {
        for v in [(1u32 << shift) + 1, (1 << shift) - 1] {
            if !v.is_power_of_two() || u64::from(v) > 1 << 20 {
                c.add(&format!("alignment {v} beside 2^{shift}"), Corrupt, "a power of two up to", |w| {
                    w.set("general.alignment", u32v(v));
                });
            }
        }
    }
}

/// Lies about each key and each value.
fn every_key(c: &mut Cases) {
    let broken: [&[u8]; 5] = [b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"];
    for i in 0..tiny().kv.len() {
        let place = format!("metadata entry {i} of");
        for len in HUGE.into_iter().chain([MAX_STRING_BYTES, MAX_STRING_BYTES + 1]) {
            c.add(&format!("key {i} of {len} bytes"), Corrupt, &place, |w| w.kv[i].key_len = Some(len));
        }
        for id in [13, 14, 255, 256, 1 << 16, 1 << 31, u32::MAX] {
            c.add(&format!("value {i} of type {id}"), Corrupt, &place, |w| w.kv[i].value.0 = id);
        }
        for (n, bytes) in broken.into_iter().enumerate() {
            c.add(&format!("key {i} no UTF-8, {n}"), Corrupt, &place, |w| w.kv[i].key = bytes.to_vec());
        }
        c.add(&format!("key {i} empty"), Corrupt, &place, |w| w.kv[i].key.clear());
        c.add(&format!("key {i} twice"), Corrupt, "twice", |w| w.kv.push(w.kv[i].clone()));
        for count in [u64::MAX, 1 << 62, 1 << 61, 1 << 40] {
            for t in ValueType::VARIANTS.iter().copied().filter(|t| *t != ValueType::Array) {
                let name = format!("value {i} as {count} of {}", t.name());
                c.add(&name, Corrupt, "needs more than", |w| w.kv[i].value = arrv(t.id(), count, &[]));
            }
        }
    }
}

/// Lies about each tensor's name, number of dimensions and element type.
fn every_tensor(c: &mut Cases) {
    let supported: Vec<u32> = DType::ALL.iter().map(|t| t.ggml_id()).collect();
    let n = tiny().tensors.len();
    for i in 0..n {
        let place = format!("tensor {i} of {n}");
        for len in HUGE.into_iter().chain([MAX_STRING_BYTES, MAX_STRING_BYTES + 1]) {
            c.add(&format!("name of tensor {i} of {len} bytes"), Corrupt, &place, |w| {
                w.tensors[i].name_len = Some(len);
            });
        }
        for len in [0, 64, 65, 255, 4096] {
            c.add(&format!("name of tensor {i} is {len} long"), Corrupt, "1 to 63 bytes", |w| {
                w.tensors[i].name = vec![b'n'; len];
            });
        }
        c.add(&format!("NUL in name {i}"), Corrupt, "without NUL", |w| w.tensors[i].name[0] = 0);
        c.add(&format!("NUL behind name {i}"), Corrupt, "without NUL", |w| w.tensors[i].name.push(0));
        c.add(&format!("name {i} no UTF-8"), Corrupt, &place, |w| w.tensors[i].name[0] = 0xff);
        c.add(&format!("name {i} of another"), Corrupt, "twice", |w| {
            w.tensors[i].name = w.tensors[(i + 1) % n].name.clone();
        });
        for dims in [0, 5, 6, 64, 255, 1 << 16, 1 << 31, u32::MAX] {
            c.add(&format!("tensor {i} of {dims} dimensions"), Corrupt, "1 to 4 are allowed", |w| {
                w.tensors[i].n_dims = Some(dims);
            });
        }
        for id in (0..48).filter(|id| !supported.contains(id)).chain([255, 1 << 16, 1 << 31, u32::MAX]) {
            c.add(&format!("tensor {i} of type {id}"), Unsupported, "is not supported; quantize", |w| {
                w.tensors[i].dtype = id;
            });
        }
    }
}

/// Each extent of each tensor as 0, as what overflows, and as what the file can't hold.
fn every_extent(c: &mut Cases) {
    for (i, t) in tiny().tensors.iter().enumerate() {
        let block = DType::from_ggml(t.dtype).expect("a type that is read").block_len() as u64;
        for d in 0..t.dims.len() {
            let mut with = |v: u64, part: &str| {
                c.add(&format!("extent {d} of tensor {i} is {v}"), Corrupt, part, |w| {
                    w.tensors[i].dims[d] = v
                });
            };
            with(0, "is 0");
            with(1 << 63, "overflows");
            with(u64::MAX - 31, "overflows");
            with(1 << 40, "reach past the file's end");
            if d == 0 && block > 1 {
                for v in [1, block - 1, block + 1, t.dims[0] + 15, u64::MAX] {
                    with(v, "not a whole number of");
                }
            }
            for (more, name) in [(1, "one"), (2, "two"), (7, "seven")] {
                // Honest otherwise: the data has room for it.
                let mut dims = t.dims.clone();
                dims[d] += more * if d == 0 { 32 } else { 1 };
                let tensor = String::from_utf8(t.name.clone()).expect("a name");
                let part = if i > 0 { format!("tensor {tensor} has shape") } else { "token_embd".into() };
                c.add(&format!("extent {d} of tensor {i} is {name} more"), Corrupt, &part, |w| {
                    w.reshape(&tensor, DType::F32, &dims);
                });
            }
        }
    }
}

/// Each tensor under each other type over the same bytes.
fn every_type_of_a_tensor(c: &mut Cases) {
    let tensors = tiny().tensors;
    let padded = |size: usize| size.next_multiple_of(32);
    let all = tensors.iter().map(|t| padded(t.data.len())).sum::<usize>();
    let mut before = 0;
    // Behind the last one there is no other whose place would show it.
    for (i, t) in tensors.iter().enumerate().take(tensors.len() - 1) {
        let rows: u64 = t.dims[1..].iter().product();
        for other in DType::ALL.into_iter().filter(|other| other.ggml_id() != t.dtype) {
            let size = other.row_bytes(t.dims[0] as usize).map(|row| row * rows as usize);
            let part = match size {
                None => "not a whole number of",
                Some(size) if before + size > all => "reach past the file's end",
                Some(size) if padded(size) != padded(t.data.len()) => "a hole or an overlap",
                Some(_) => continue,
            };
            c.add(&format!("tensor {i} read as {}", other.name()), Corrupt, part, |w| {
                w.tensors[i].dtype = other.ggml_id();
            });
        }
        before += padded(t.data.len());
    }
}

/// Each tensor somewhere else.
fn every_place(c: &mut Cases) {
    let mut running = 0u64;
    for (i, t) in tiny().tensors.iter().enumerate() {
        for by in [1, 2, 16, 31, 33] {
            c.add(&format!("tensor {i} {by} later"), Corrupt, "not a multiple of 32", |w| {
                w.tensors[i].offset = Some(running + by);
            });
        }
        let elsewhere = [0, 32, running + 32, running + 64, running.wrapping_sub(32), 1 << 40, 1 << 63];
        let elsewhere: BTreeSet<u64> = elsewhere.into_iter().chain([u64::MAX - 31]).collect();
        for offset in elsewhere {
            if offset != running {
                c.add(&format!("tensor {i} at {offset} in place of {running}"), Corrupt, "", |w| {
                    w.tensors[i].offset = Some(offset);
                });
            }
        }
        running = (running + t.data.len() as u64).next_multiple_of(32);
    }
}

/// Fewer and more tensors than there are.
fn counts(c: &mut Cases) {
    for n in 1..11 {
        c.add(&format!("{n} of 11 tensors"), Corrupt, "is missing", |w| w.n_tensors = Some(n));
    }
    for n in 12..40 {
        c.add(&format!("{n} tensors, not 11"), Corrupt, &format!("of {n}"), |w| w.n_tensors = Some(n));
    }
    for n in 19..40 {
        c.add(&format!("{n} keys, not 18"), Corrupt, "", |w| w.n_kv = Some(n));
    }
}

/// What broke other parsers, as far as their reports tell.
fn known_holes(c: &mut Cases) {
    let q = "blk.0.attn_q.weight";
    // Extents written behind an array of four.
    c.add("CVE-2024-21802", Corrupt, "1 to 4 are allowed", |w| {
        w.tensor(q).n_dims = Some(9);
        w.tensor(q).dims = vec![32; 9];
    });
    // An array of strings whose count times their size wraps.
    c.add("CVE-2024-21825", Corrupt, "needs more than", |w| {
        w.set("tokenizer.ggml.tokens", arrv(8, (1 << 60) + 1, &[strv("a")]));
    });
    // A number of tensors whose descriptions' size wraps.
    c.add("CVE-2024-21836", Corrupt, "tensors; at most", |w| w.n_tensors = Some(u64::MAX / 24 + 2));
    // A string's length that wraps when a terminator is added.
    c.add("CVE-2024-23496", Corrupt, "declares", |w| {
        w.set("general.name", V(8, u64::MAX.to_le_bytes().to_vec()))
    });
    // A number of keys whose entries' size wraps.
    c.add("CVE-2024-23605", Corrupt, "metadata keys; at most", |w| w.n_kv = Some(u64::MAX / 13 + 2));
    // A key cut short: what was to be read stays uninitialized, and is released.
    let header = tiny().header();
    c.raw("CVE-2024-32878", Corrupt, "", header[..60].to_vec());
    // A sum of tensors' sizes that wraps.
    c.add("CVE-2025-53630", Corrupt, "reach past the file's end", |w| {
        (w.tensors[0].dims, w.tensors[0].offset) = (vec![1 << 61], Some(0));
        (w.tensors[1].dims, w.tensors[1].offset) = (vec![1 << 61], Some(1 << 63));
    });
    // An alignment of 0, by which padding is divided.
    c.add("CVE-2025-0317", Corrupt, "general.alignment is 0", |w| w.set("general.alignment", u32v(0)));
    // A string's length of version 1, taken for the size of a buffer: the version is not read at all.
    c.add("CVE-2025-66960", Unsupported, "version 2 or 3", |w| {
        w.version = 1;
        w.kv[0].key_len = Some(u64::MAX);
    });
    // Sizes that fit one by one, and wrap with the room for their descriptions.
    c.add("CVE-2026-27940", Corrupt, "reach past the file's end", |w| {
        w.tensors[0].dims = vec![(1 << 62) - 32];
    });
    // Extents whose product of elements fits, and whose bytes wrap.
    c.add("CVE-2026-33298", Corrupt, "overflows", |w| {
        w.tensors[0].dims = vec![1152, (1 << 54) + 1];
    });
    // Offset and size beyond the file, which is read all the same.
    c.add("CVE-2026-7482", Corrupt, "reach past the file's end", |w| {
        w.tensor("output_norm.weight").dims = vec![1 << 20];
    });
}
