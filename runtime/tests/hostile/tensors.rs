//! safetensors, the settings beside them, and the two other formats of adapters.

use engraft_codec::{Element, Kind, Meta, Section, Writer};
use engraft_runtime::ErrorKind::{BaseMismatch, Corrupt, Unsupported};
use engraft_runtime::storage::StdIo;

use crate::common::writer::{self, f32v, strv, u32v};
use crate::hostile::run::{Cases, all};
use crate::hostile::subject::{self, MLX_CONFIG, PEFT_CONFIG, small_mlx, small_peft};

/// JSON becomes maps and vectors of some forty times its text; tensors become f32.
fn heap_max(len: usize) -> usize {
    (1 << 20) + 64 * len
}

fn file(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0x3c; data]].concat()
}

fn tensor(name: &str, dtype: &str, shape: &str, from: impl ToString, to: impl ToString) -> String {
    let (from, to) = (from.to_string(), to.to_string());
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
}

const A: &str = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight";
const B: &str = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight";

/// The good pair with a word of its header exchanged.
fn exchanged(from: &str, to: &str) -> Vec<u8> {
    let good = small_peft();
    let header = String::from_utf8(good[8..good.len() - 144].to_vec()).expect("JSON");
    assert!(header.contains(from), "{from}");
    file(&header.replacen(from, to, 1), 144)
}

#[test]
fn tensors_are_refused_or_used() {
    let mut c = Cases::default();
    c.used("a good pair", small_peft());
    lengths(&mut c);
    headers(&mut c);
    spans(&mut c);
    shapes(&mut c);
    for (from, to, kind) in [
        ("layers.1.", "layers.4.", BaseMismatch),
        ("layers.1.", "layers.16777216.", BaseMismatch),
        ("layers.1.", "layers.99999999999999999999.", Unsupported),
        ("layers.1.", "layers.-1.", Unsupported),
        ("layers.1.", "layers.01.", Unsupported),
        ("layers.1.", "layers.1.1.", Unsupported),
        ("q_proj", "z_proj", Unsupported),
        ("q_proj", "k_proj", Corrupt),
        ("self_attn", "mlp", Unsupported),
        ("lora_A", "lora_C", Unsupported),
        ("lora_A.weight", "lora_A.bias", Unsupported),
        ("lora_A.weight", "lora_embedding_A", Unsupported),
        ("base_model.model.", "\\u001b[2J", Unsupported),
    ] {
        c.refused(format!("{from} as {to}"), kind, "", exchanged(from, to));
    }
    for (name, at, bytes) in [
        ("NaN in A", 144, &[0, 0, 0xc0, 0x7f][..]),
        ("infinity in A", 144, &[0, 0, 0x80, 0x7f]),
        ("NaN in B", 2, &[1, 0x7e]),
        ("infinity in B", 2, &[0, 0xfc]),
    ] {
        let mut good = small_peft();
        let at = good.len() - at;
        good[at..at + bytes.len()].copy_from_slice(bytes);
        c.refused(name, Corrupt, "the adapter is broken", good);
    }
    let good = small_peft();
    for cut in 0..good.len() {
        c.refused(format!("cut to {cut}"), Corrupt, "", &good[..cut]);
    }
    assert!(c.0.len() >= 500, "only {} cases", c.0.len());
    all("safetensors", &c.0, subject::safetensors, heap_max);
}

fn lengths(c: &mut Cases) {
    let good = small_peft();
    let real = (good.len() - 8 - 144) as u64;
    for length in [
        0,
        1,
        2,
        real - 1,
        real + 1,
        real + 144,
        real + 145,
        (16 << 20) - 1,
        16 << 20,
        (16 << 20) + 1,
        100_000_000,
        1 << 32,
        1 << 63,
        u64::MAX - 7,
        u64::MAX,
    ] {
        let bytes = [&length.to_le_bytes(), &good[8..]].concat();
        c.refused(format!("a header of {length} bytes"), Corrupt, "", bytes);
    }
    c.refused("a byte behind", Corrupt, "145 bytes of data", [&good[..], &[0]].concat());
    let blanks = file(&format!("{{}}{}", " ".repeat(1 << 20)), 0);
    c.refused("blanks without end", Corrupt, "target_modules names", blanks);
    c.refused("more than 16 MiB of blanks", Corrupt, "at most", file(&" ".repeat((16 << 20) + 1), 0));
}

fn headers(c: &mut Cases) {
    for (name, text) in [
        ("empty", ""),
        ("a list", "[]"),
        ("a number", "1"),
        ("cut", "{\"a\":"),
        ("two", "{}{}"),
        ("metadata of numbers", r#"{"__metadata__":{"a":1}}"#),
        ("metadata that is a list", r#"{"__metadata__":[]}"#),
        ("metadata twice", r#"{"__metadata__":{},"__metadata__":{}}"#),
        ("a tensor that is a number", r#"{"a":1}"#),
        ("a tensor without a type", r#"{"a":{"shape":[1],"data_offsets":[0,4]}}"#),
        ("a tensor without a shape", r#"{"a":{"dtype":"F32","data_offsets":[0,4]}}"#),
        ("a tensor without a place", r#"{"a":{"dtype":"F32","shape":[1]}}"#),
        ("a place of one", r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}"#),
        ("a place of three", r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}"#),
        ("an unknown key", r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}"#),
        ("a type twice", r#"{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}"#),
        ("a lone surrogate", r#"{"\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#),
    ] {
        c.refused(format!("header: {name}"), Corrupt, "header", file(text, 4));
    }
    for depth in [127, 128, 129, 10_000, 1_000_000] {
        let nested = format!("{{\"a\":{}", "[".repeat(depth));
        c.refused(format!("header: {depth} lists"), Corrupt, "header", file(&nested, 4));
        let nested = format!("{{\"a\":{}", "{\"a\":".repeat(depth));
        c.refused(format!("header: {depth} objects"), Corrupt, "header", file(&nested, 4));
    }
    for n in [100, 10_000, 1 << 20] {
        let key = "k\\u001b".repeat(n);
        c.refused(
            format!("an unknown key of {n}"),
            Corrupt,
            "header",
            file(&format!("{{\"a\":{{\"{key}\":1}}}}"), 4),
        );
        c.refused(
            format!("a type of {n}"),
            Unsupported,
            "is not supported",
            file(&format!("{{{}}}", tensor("a", &key, "[1]", 0, 4)), 4),
        );
        c.refused(
            format!("a name of {n}"),
            Unsupported,
            "part of a LoRA pair",
            file(&format!("{{{}}}", tensor(&key, "F32", "[1]", 0, 4)), 4),
        );
        c.refused(
            format!("a text for a shape of {n}"),
            Corrupt,
            "header",
            file(&format!("{{{}}}", tensor("a", "F32", &format!("\"{key}\""), 0, 4)), 4),
        );
    }
    let a = tensor(A, "F32", "[2,12]", 0, 96);
    c.refused("a name twice", Corrupt, "twice", file(&format!("{{{a},{a}}}"), 96));
    let escaped = a.replacen("base", "\\u0062ase", 1);
    c.refused("a name twice, once escaped", Corrupt, "twice", file(&format!("{{{a},{escaped}}}"), 96));
    let many: Vec<_> = (0..65_538).map(|i| tensor(&i.to_string(), "F32", "[1]", 4 * i, 4 * i + 4)).collect();
    c.refused(
        "65,538 tensors",
        Corrupt,
        "more than 65536",
        file(&format!("{{{}}}", many.join(",")), 4 * 65_538),
    );
}

fn spans(c: &mut Cases) {
    let pair = |a: [i128; 2], b: [i128; 2], data: usize| {
        let a = tensor(A, "F32", "[2,12]", a[0], a[1]);
        let b = tensor(B, "F32", "[12,2]", b[0], b[1]);
        file(&format!("{{{a},{b}}}"), data)
    };
    c.used("a pair of f32", pair([0, 96], [96, 192], 192));
    c.used("a pair in the other order", pair([96, 192], [0, 96], 192));
    for (name, a, b, data) in [
        ("on each other", [0, 96], [0, 96], 96),
        ("an overlap of one byte", [0, 96], [95, 191], 191),
        ("a hole of one byte", [0, 96], [97, 193], 193),
        ("a hole before", [4, 100], [100, 196], 196),
        ("backwards", [96, 0], [96, 192], 192),
        ("one byte short", [0, 95], [95, 191], 191),
        ("one byte long", [0, 97], [97, 193], 193),
        ("within the other", [0, 192], [48, 144], 192),
        ("behind the file", [0, 96], [96, 192], 191),
        ("before the file's end", [0, 96], [96, 192], 193),
        ("far behind the file", [0, 96], [1 << 40, (1 << 40) + 96], 192),
        ("at the end of u64", [0, 96], [u64::MAX as i128 - 96, u64::MAX as i128], 192),
        ("beyond u64", [0, 96], [1 << 64, (1 << 64) + 96], 192),
        ("negative", [-96, 0], [0, 96], 192),
    ] {
        c.refused(format!("places: {name}"), Corrupt, "", pair(a, b, data));
    }
    for (from, to) in
        [("0.5", "96"), ("\"0\"", "96"), ("null", "96"), ("1e400", "96"), ("0", "9e99"), ("[0]", "96")]
    {
        let text = format!("{{{}}}", tensor(A, "F32", "[2,12]", from, to));
        c.refused(format!("a place from {from} to {to}"), Corrupt, "header", file(&text, 96));
    }
}

fn shapes(c: &mut Cases) {
    let of = |dtype: &str, shape: &str, bytes: usize| {
        file(&format!("{{{}}}", tensor(A, dtype, shape, 0, bytes)), bytes)
    };
    for dtype in ["F64", "I64", "U8", "BOOL", "F8_E4M3", "C64", "f32", "", "F32 ", "Q8_0"] {
        c.refused(format!("type {dtype:?}"), Unsupported, "F32, F16 and BF16 are", of(dtype, "[2,12]", 96));
    }
    for shape in ["[]", "[24]", "[24,1,1]", "[1,1,1,1,1,1,1,24]", "[2,3,4]"] {
        let bytes = if shape == "[]" { 4 } else { 96 };
        c.refused(format!("shape {shape}"), Corrupt, "not a matrix", of("F32", shape, bytes));
    }
    for shape in [
        "[0]",
        "[0,12]",
        "[2,0]",
        "[4294967296,4294967296]",
        "[9223372036854775808,2]",
        "[18446744073709551615,2]",
        "[2,18446744073709551615]",
    ] {
        c.refused(format!("shape {shape}"), Corrupt, "is empty or too large", of("F32", shape, 96));
    }
    for shape in ["[1000000000000]", "[2,13]", "[1,12]", "[1099511627776,1099511]"] {
        c.refused(format!("shape {shape}"), Corrupt, "", of("F32", shape, 96));
    }
    for shape in
        ["[-1,12]", "[2.5,12]", "[\"2\",12]", "[18446744073709551616,1]", "[[2,12]]", "{}", "null", "[1e999]"]
    {
        c.refused(format!("shape {shape}"), Corrupt, "header", of("F32", shape, 96));
    }
    for n in [9, 100, 1_000_000] {
        let shape = format!("[{}24]", "1,".repeat(n - 1));
        c.refused(format!("{n} extents"), Corrupt, "at most 8", of("F32", &shape, 96));
    }
    for (name, a, b, kind) in [
        ("another rank in B", [2, 12], [12, 3], Corrupt),
        ("another rank than the settings'", [3, 12], [12, 3], Corrupt),
        ("a rank beyond 256", [257, 12], [12, 257], Corrupt),
        ("other inputs", [2, 13], [12, 2], BaseMismatch),
        ("other outputs", [2, 12], [13, 2], BaseMismatch),
        ("outputs that end within a head", [2, 12], [11, 2], BaseMismatch),
        ("outputs that end in the middle of a head", [2, 12], [10, 2], BaseMismatch),
        ("outputs that end in the middle of a head too much", [2, 12], [14, 2], BaseMismatch),
        ("one output", [2, 12], [1, 2], BaseMismatch),
        ("transposed", [12, 2], [2, 12], Corrupt),
    ] {
        let (first, second) = (4 * a[0] * a[1], 4 * b[0] * b[1]);
        let a = tensor(A, "F32", &format!("{a:?}"), 0, first);
        let b = tensor(B, "F32", &format!("{b:?}"), first, first + second);
        c.refused(name, kind, "", file(&format!("{{{a},{b}}}"), first + second));
    }
    // Reordered as rows of B are, before anybody asks whether they belong there.
    for n in [1, 10, 12, 14] {
        let a = tensor(A, "F32", "[2,12]", 0, 96);
        let b = tensor(B, "F32", "[12,2]", 96, 192);
        let m =
            tensor(&B.replace("B.weight", "magnitude_vector"), "F32", &format!("[{n}]"), 192, 192 + 4 * n);
        let text = format!("{{{a},{b},{m}}}");
        c.refused(format!("{n} magnitudes"), Corrupt, "magnitudes, but no DoRA", file(&text, 192 + 4 * n));
    }
}

/// A key of the settings, and what it is set to: PEFT's and mlx_lm's in one, since both name things alike.
#[test]
fn settings_are_refused_or_used() {
    let mut c = Cases::default();
    c.used("PEFT's", PEFT_CONFIG);
    c.used("mlx_lm's", MLX_CONFIG);
    settings_of_other_adapters(&mut c);
    settings_that_contradict(&mut c);
    settings_without_end(&mut c);
    settings_of_mlx(&mut c);
    assert!(c.0.len() >= 90, "only {} cases", c.0.len());
    all("adapter_config.json", &c.0, subject::adapter_config, heap_max);
}

/// PEFT's good settings with a key set to a value.
fn with(key: &str, value: &str) -> String {
    let own = PEFT_CONFIG.trim_end_matches('}');
    let kept =
        own.split(",\"").filter(|part| !part.trim_start_matches(['{', '"']).starts_with(&format!("{key}\"")));
    let kept = kept.collect::<Vec<_>>().join(",\"");
    let kept = if kept.starts_with('{') { kept } else { format!("{{\"{kept}") };
    format!("{kept},\"{key}\":{value}}}")
}

fn settings_of_other_adapters(c: &mut Cases) {
    let wrong = ["-1", "0.5", "1e300", "16777217", "\"2\"", "[]", "{}", "true"];
    wrong.iter().for_each(|v| c.refused(format!("r of {v}"), Corrupt, "", with("r", v)));
    for v in ["0", "-1", "1e39", "\"4\"", "[4]"] {
        c.refused(format!("alpha of {v}"), Corrupt, "alpha", with("lora_alpha", v));
    }
    for v in ["-0.1", "1", "1e9", "\"0\"", "[]"] {
        c.refused(format!("dropout of {v}"), Corrupt, "", with("lora_dropout", v));
    }
    for key in ["use_rslora", "use_dora"] {
        for v in ["1", "\"true\"", "[]", "{}"] {
            c.refused(format!("{key} of {v}"), Corrupt, key, with(key, v));
        }
    }
    for (key, v) in [
        ("bias", "\"all\""),
        ("bias", "{\"a\":1}"),
        ("task_type", "\"SEQ_CLS\""),
        ("task_type", "[1]"),
        ("peft_type", "\"IA3\""),
        ("fan_in_fan_out", "true"),
        ("modules_to_save", "[\"lm_head\"]"),
        ("layer_replication", "[[0,4]]"),
        ("megatron_config", "{\"a\":1}"),
        ("init_lora_weights", "\"pissa_niter_4\""),
        ("lora_bias", "true"),
        ("rank_pattern", "{\"(a|b)+$\":1}"),
        ("alpha_pattern", "{\".*\":1}"),
        ("alpha_pattern", "{\"q_proj\":1,\"self_attn.q_proj\":2}"),
        ("alpha_pattern", "{\"self_attn.q_proj\":1,\"self_attn\\\\.q_proj\":2}"),
    ] {
        c.refused(format!("{key} of {v}"), Unsupported, "", with(key, v));
    }
}

fn settings_that_contradict(c: &mut Cases) {
    for (key, v) in [
        ("rank_pattern", "[]"),
        ("rank_pattern", "{\"q_proj\":\"1\"}"),
        ("rank_pattern", "{\"q_proj\":3}"),
        ("rank_pattern", "{\"k_proj\":2,\"^model.layers.1.self_attn.q_proj\":3}"),
        ("rank_pattern", "{\"q_proj\":1.5}"),
        ("alpha_pattern", "{\"q_proj\":-1}"),
        ("alpha_pattern", "{\"q_proj\":null}"),
        ("target_modules", "1"),
        ("target_modules", "[1]"),
        ("target_modules", "[\"k_proj\"]"),
        ("target_modules", "[]"),
        ("layers_to_transform", "[0]"),
        ("layers_to_transform", "\"1\""),
        ("layers_to_transform", "[1e30]"),
        ("layers_to_transform", "[-1]"),
        ("peft_type", "1"),
        ("peft_type", "null"),
        ("peft_type", "[]"),
    ] {
        c.refused(format!("{key} of {v}"), Corrupt, "", with(key, v));
    }
}

fn settings_without_end(c: &mut Cases) {
    for key in
        ["bias", "task_type", "peft_type", "init_lora_weights", "modules_to_save", "rank_pattern", "nonsense"]
    {
        let long = "k\\u001b[2J".repeat(50_000);
        let text = with(key, &format!("\"{long}\""));
        // Unknown keys, and names of initializations, are passed over.
        match key {
            "nonsense" | "init_lora_weights" => c.used(format!("{key} without end"), text),
            "rank_pattern" => c.refused(format!("{key} without end"), Corrupt, "", text),
            _ => c.refused(format!("{key} without end"), Unsupported, "", text),
        }
    }
    let names: String = (0..135_000).map(|i| format!("\"{i:04x}\",")).collect();
    c.used("a MiB of targets", with("target_modules", &format!("[{names}\"q_proj\"]")));
    let alphas: String = (0..100_000).map(|i| format!("\"{i:04x}\":1,")).collect();
    c.used("a MiB of alphas", with("alpha_pattern", &format!("{{{alphas}\"q_proj\":1}}")));
    let long = format!("{{\"{0}\":1,\"{0}\":2}}", "k\\u001b".repeat(10_000));
    c.refused("a long key twice", Corrupt, "occurs twice", long);
    c.refused("a key twice", Corrupt, "occurs twice", PEFT_CONFIG.replacen('{', "{\"r\":2,", 1));
    for (name, text) in [
        ("empty", ""),
        ("a list", "[]"),
        ("a text", "\"a\""),
        ("cut", "{\"r\":2"),
        ("a comment", "{}//"),
        ("a mark", "\u{feff}{}"),
        ("no key", "{}"),
    ] {
        c.refused(format!("settings: {name}"), Corrupt, "", text);
    }
    c.refused("not UTF-8", Corrupt, "", b"{\"peft_type\":\"\xff\"}");
    for depth in [127, 128, 1000, 500_000] {
        let nested = format!("{{\"a\":{}1{}}}", "[".repeat(depth), "]".repeat(depth));
        c.refused(format!("{depth} lists"), Corrupt, "", nested);
    }
    c.refused("more than 1 MiB", Corrupt, "too long for a settings", " ".repeat((1 << 20) + 1));
    c.refused("1 MiB of blanks", Corrupt, "", " ".repeat(1 << 20));
}

fn settings_of_mlx(c: &mut Cases) {
    for (key, v) in [
        ("rank", "3"),
        ("rank", "-2"),
        ("rank", "1e300"),
        ("rank", "2.5"),
        ("rank", "\"2\""),
        ("scale", "0"),
        ("scale", "-1"),
        ("scale", "1e39"),
        ("scale", "null"),
        ("dropout", "1"),
        ("dropout", "-1"),
    ] {
        let good = if key == "rank" {
            "\"rank\":2"
        } else if key == "scale" {
            "\"scale\":2.0"
        } else {
            "\"dropout\":0.0"
        };
        c.refused(
            format!("mlx: {key} of {v}"),
            Corrupt,
            "",
            MLX_CONFIG.replace(good, &format!("\"{key}\":{v}")),
        );
    }
}

#[test]
fn tensors_of_mlx_are_refused_or_used() {
    fn subject(bytes: &[u8]) -> engraft_runtime::Result<()> {
        subject::mlx_folder(MLX_CONFIG.as_bytes(), bytes)
    }
    let mut c = Cases::default();
    let good = small_mlx();
    c.used("a good pair", &good[..]);
    (0..good.len()).for_each(|cut| c.refused(format!("cut to {cut}"), Corrupt, "", &good[..cut]));
    let header = String::from_utf8(good[8..good.len() - 144].to_vec()).expect("JSON");
    for (from, to, kind) in [
        ("lora_a", "lora_b", Corrupt),
        ("lora_a", "lora_c", Unsupported),
        ("q_proj", "lm_head", Unsupported),
        ("layers.1.", "layers.4.", Corrupt),
        ("[12,2]", "[2,12]", Corrupt),
        ("[12,2]", "[24]", Corrupt),
        ("[12,2]", "[24,1]", Corrupt),
        ("[12,2]", "[0,0]", Corrupt),
        ("F32", "F64", Unsupported),
        ("[0,96]", "[0,97]", Corrupt),
    ] {
        c.refused(format!("{from} as {to}"), kind, "", file(&header.replacen(from, to, 1), 144));
    }
    for outputs in [10, 11, 14] {
        let data = 96 + 4 * outputs;
        let header =
            header.replace("[2,12]", &format!("[2,{outputs}]")).replace(",144]", &format!(",{data}]"));
        c.refused(format!("{outputs} outputs"), BaseMismatch, "12 x 12", file(&header, data));
    }
    all("tensors of mlx_lm", &c.0, subject, heap_max);
}

/// A good adapter of llama.cpp.
pub(crate) fn gguf_adapter() -> writer::Writer {
    let mut w = writer::Writer::new();
    w.set("general.architecture", strv("llama"));
    w.set("general.type", strv("adapter"));
    w.set("adapter.type", strv("lora"));
    w.set("adapter.lora.alpha", f32v(4.0));
    w.add("blk.1.attn_q.weight.lora_a", engraft_kernels::DType::F32, &[12, 2]);
    w.add("blk.1.attn_q.weight.lora_b", engraft_kernels::DType::F16, &[2, 12]);
    w
}

#[test]
fn adapters_of_llama_cpp_are_refused_or_used() {
    let mut c = Cases::default();
    let good = gguf_adapter();
    c.used("a good pair", good.bytes());
    let bytes = good.bytes();
    (0..bytes.len()).for_each(|cut| c.refused(format!("cut to {cut}"), Corrupt, "", &bytes[..cut]));
    let mut with = |name: &str, kind, part: &str, change: &dyn Fn(&mut writer::Writer)| {
        let mut w = gguf_adapter();
        change(&mut w);
        c.refused(name, kind, part, w.bytes());
    };
    with("no type", Unsupported, "this is a model", &|w| w.remove("general.type"));
    with("a projector", Unsupported, "mmproj", &|w| w.set("general.type", strv("mmproj")));
    with("a type that is a number", Corrupt, "must be a string", &|w| w.set("general.type", u32v(1)));
    with("no kind of adapter", Unsupported, "adapter.type", &|w| w.remove("adapter.type"));
    with("a kind without end", Unsupported, "adapter.type", &|w| {
        w.set("adapter.type", strv("\u{1b}[2J".repeat(99_999)))
    });
    with("an activated LoRA", Unsupported, "activated", &|w| {
        w.set("adapter.alora.invocation_tokens", u32v(1))
    });
    with("another architecture", BaseMismatch, "qwen2", &|w| w.set("general.architecture", strv("qwen2")));
    with("an architecture without end", BaseMismatch, "", &|w| {
        w.set("general.architecture", strv("\u{1b}[2J".repeat(99_999)))
    });
    with("no architecture", BaseMismatch, "", &|w| w.remove("general.architecture"));
    for (name, v) in [("NaN", f32::NAN), ("infinite", f32::INFINITY), ("negative", -1.0)] {
        with(&format!("alpha {name}"), Corrupt, "alpha", &|w| w.set("adapter.lora.alpha", f32v(v)));
    }
    with("alpha as a text", Corrupt, "must be a float", &|w| w.set("adapter.lora.alpha", strv("4")));
    for (name, to) in [
        ("another layer", "blk.4.attn_q.weight.lora_a"),
        ("a layer beyond usize", "blk.99999999999999999999.attn_q.weight.lora_a"),
        ("a layer with a nought", "blk.01.attn_q.weight.lora_a"),
        ("no layer", "blk..attn_q.weight.lora_a"),
        ("a tensor of a model", "blk.1.attn_q.weight"),
        ("a third part", "blk.1.attn_q.weight.lora_c"),
        ("the embedding", "token_embd.weight.lora_a"),
        ("terminal codes", "\u{1b}]0;x"),
    ] {
        let kind = if name == "another layer" { Corrupt } else { Unsupported };
        with(name, kind, "", &|w| w.tensors[0].name = to.into());
    }
    with("without A", Corrupt, "A is missing", &|w| drop(w.tensors.remove(0)));
    with("without B", Corrupt, "B is missing", &|w| drop(w.tensors.remove(1)));
    with("no tensors", Corrupt, "it adapts nothing", &|w| w.tensors.clear());
    for (a, b, kind) in [
        ([12, 3], [2, 12], Corrupt),
        ([13, 2], [2, 12], BaseMismatch),
        ([12, 2], [2, 13], BaseMismatch),
        ([12, 257], [257, 12], Corrupt),
    ] {
        with(&format!("A {a:?} and B {b:?}"), kind, "", &|w| {
            w.tensors.clear();
            w.add("blk.1.attn_q.weight.lora_a", engraft_kernels::DType::F32, &a);
            w.add("blk.1.attn_q.weight.lora_b", engraft_kernels::DType::F16, &b);
        });
    }
    with("NaN in A", Corrupt, "the adapter is broken", &|w| {
        w.tensors[0].data[..4].copy_from_slice(&f32::NAN.to_le_bytes())
    });
    with("infinity in B", Corrupt, "the adapter is broken", &|w| {
        w.tensors[1].data[..2].copy_from_slice(&[0, 0x7c])
    });
    all("GGUF adapters", &c.0, subject::gguf_adapter, heap_max);
}

/// A frame of an adapter whose header the test chooses: a tuple of the file's own fields.
pub(crate) fn engraft(
    layers: &[u32],
    overrides: &[(Option<u32>, u8, Option<u32>, Option<f32>)],
    rank: u32,
    alpha: f32,
) -> Vec<u8> {
    let meta = Meta { kind: Kind::ADAPTER, schema: 4, generation: 0, base_digest: [7; 32] };
    let model = ("llama", 12u32, 65_536u32, 100u32);
    let lora = (rank, alpha, 0.0f32, vec![(0u8, 12u32, 12u32)], layers);
    let trained = ("toy", 1u64, 2u64, 3u64, None::<f32>, None::<f32>);
    let bound = None::<([u8; 32], u32, [f32; 8], [f32; 8])>;
    let header = (model, lora, trained, (0u8, false, overrides), bound);
    let ranks =
        layers.iter().map(|l| overrides.iter().find(|o| o.0 == Some(*l)).and_then(|o| o.2).unwrap_or(rank));
    let theta: usize = ranks.map(|r| 24 * r as usize).sum();
    let sections = [Section::new("theta", Element::F32, theta as u64).expect("a section")];
    let mut frame = Writer::begin(StdIo(Vec::new()), &meta, &header, &sections).expect("a header");
    frame.f32(&vec![0.5; theta]).expect("its elements");
    frame.finish().expect("whole").0
}

#[test]
fn frames_are_refused_or_used() {
    let mut c = Cases::default();
    let good = engraft(&[1], &[], 2, 8.0);
    c.used("a good frame", &good[..]);
    (0..good.len()).for_each(|cut| c.refused(format!("cut to {cut}"), Corrupt, "", &good[..cut]));
    for bit in 0..8 * good.len() {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        c.refused(format!("bit {bit}"), Corrupt, "", bytes);
    }
    for (name, rank, alpha) in [
        ("rank 0", 0, 8.0),
        ("rank 257", 257, 8.0),
        ("alpha 0", 2, 0.0),
        ("alpha NaN", 2, f32::NAN),
        ("alpha infinite", 2, f32::INFINITY),
    ] {
        c.refused(name, Corrupt, "is incomplete", engraft(&[1], &[], rank, alpha));
    }
    for (name, layers) in [
        ("no layers", &[][..]),
        ("layers twice", &[1, 1]),
        ("layers backwards", &[2, 1]),
        ("a layer beyond", &[65_536]),
        ("the last u32", &[u32::MAX]),
    ] {
        c.refused(name, Corrupt, "layer", engraft(layers, &[], 2, 8.0));
    }
    let all_layers: Vec<u32> = (0..65_536).collect();
    let each: Vec<_> = all_layers.iter().map(|l| (Some(*l), 0u8, Some(1 + l % 2), None)).collect();
    let twice = [&each[..30_000], &each[..30_000]].concat();
    c.refused("30,000 overrides, each twice", Corrupt, "in order", engraft(&all_layers, &twice, 1, 8.0));
    // Quadratic work would take minutes: the frame itself is 10 MB.
    c.used("an override of each of 65,536 layers", engraft(&all_layers, &each, 1, 8.0));
    assert!(c.0.len() >= 3400, "only {} cases", c.0.len());
    all("engraft frames", &c.0, subject::frame, |len| (1 << 20) + 64 * len);
}
