//! Adapters as users see them: every broken or foreign file is refused by name with 6, an adapter's binding is
//! checked again, and a DoRA is exported as the nearest LoRA.

use std::path::{Path, PathBuf};

use engraft_codec::{Element, Kind, Meta, Section, Writer};
use engraft_kernels::DType;
use engraft_runtime::adapter::{Adapter, StoredAs, mlx, peft};
use engraft_runtime::model::gguf::write::Header;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::storage::{Disk, StdIo};
use serde_json::json;

use super::{
    assert_keys, assert_refused, engraft, golden, last_line, program, result_of, seedling, shipped, stderr,
};

/// One pair on v of block 0 of the golden base: 64 inputs, 32 outputs.
#[derive(Clone)]
struct Pair {
    /// Rank and inputs.
    a: (usize, usize),
    /// Outputs and rank.
    b: (usize, usize),
    /// The values of A and B.
    values: [f32; 2],
    /// The first element of B.
    first: f32,
}

const GOOD: Pair = Pair { a: (2, 64), b: (32, 2), values: [0.1, 0.2], first: 0.2 };

/// A file of PEFT, MLX, llama.cpp or Engraft.
type Write = fn(&Path, &Pair) -> PathBuf;

impl Pair {
    fn a(&self) -> Vec<f32> {
        vec![self.values[0]; self.a.0 * self.a.1]
    }

    fn b(&self) -> Vec<f32> {
        let mut b = vec![self.values[1]; self.b.0 * self.b.1];
        b[0] = self.first;
        b
    }
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn safetensors(file: &Path, tensors: [(&str, [usize; 2], Vec<f32>); 2]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape, values) in tensors {
        let start = data.len();
        data.extend(bytes(&values));
        let place = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.into(), place);
    }
    let header = serde_json::Value::Object(header).to_string();
    let whole = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    std::fs::write(file, whole).expect("writing");
}

fn write_peft(folder: &Path, pair: &Pair) -> PathBuf {
    let settings = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 2});
    std::fs::write(folder.join(peft::CONFIG_FILE), settings.to_string()).expect("writing");
    let name = |part| format!("base_model.model.model.layers.0.self_attn.v_proj.lora_{part}.weight");
    let file = folder.join("adapter_model.safetensors");
    let (a, b) = (name("A"), name("B"));
    safetensors(&file, [(&a, [pair.a.0, pair.a.1], pair.a()), (&b, [pair.b.0, pair.b.1], pair.b())]);
    file
}

fn write_mlx(folder: &Path, pair: &Pair) -> PathBuf {
    let settings = json!({"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 1.0}});
    std::fs::write(folder.join(peft::CONFIG_FILE), settings.to_string()).expect("writing");
    let name = |part| format!("model.layers.0.self_attn.v_proj.lora_{part}");
    let file = folder.join(mlx::TENSORS_FILE);
    let (a, b) = (name("a"), name("b"));
    safetensors(&file, [(&a, [pair.a.1, pair.a.0], pair.a()), (&b, [pair.b.1, pair.b.0], pair.b())]);
    file
}

fn write_gguf(folder: &Path, pair: &Pair) -> PathBuf {
    let mut header = Header::new(32);
    header.string("general.type", "adapter");
    header.string("general.architecture", "llama");
    header.string("adapter.type", "lora");
    header.f32("adapter.lora.alpha", 2.0);
    let parts = [("lora_a", [pair.a.1, pair.a.0], pair.a()), ("lora_b", [pair.b.1, pair.b.0], pair.b())];
    for (part, dims, values) in &parts {
        header.tensor(&format!("blk.0.attn_v.weight.{part}"), DType::F32, dims, 4 * values.len());
    }
    let mut file = Vec::new();
    header.write(&mut file).expect("in memory");
    for (_, _, values) in &parts {
        file.extend(bytes(values));
        header.pad(&mut file, 4 * values.len()).expect("in memory");
    }
    let path = folder.join("adapter.gguf");
    std::fs::write(&path, file).expect("writing");
    path
}

/// A frame with correct checksums and any contents: A, then Bᵀ.
fn write_engraft(folder: &Path, pair: &Pair) -> PathBuf {
    let model = ModelFile::open(golden("base.gguf")).expect("the golden base");
    let meta = Meta { kind: Kind::ADAPTER, schema: 4, generation: 0, base_digest: model.digest() };
    let of_model = ("llama", 64_u32, 2_u32, 64_u32);
    let target = (2_u8, pair.b.0 as u32, pair.a.1 as u32);
    let lora = (pair.a.0 as u32, 2.0_f32, 0.0_f32, vec![target], vec![0_u32]);
    let trained = ("", 1_u64, 2_u64, 3_u64, None::<f32>, None::<f32>);
    let theta = [pair.a(), pair.b()].concat();
    let sections = [Section::new("theta", Element::F32, theta.len() as u64).expect("a section")];
    // A plain LoRA, bound to nothing.
    let header = ((of_model, lora, trained), (0_u8, false, 0_u8), None::<u8>);
    let mut writer = Writer::begin(StdIo(Vec::new()), &meta, &header, &sections).expect("in memory");
    writer.f32(&theta).expect("in memory");
    let path = folder.join("adapter.engraft");
    std::fs::write(&path, writer.finish().expect("in memory").0).expect("writing");
    path
}

/// Runs the verb that reads an adapter of this format: `import`, or `export` for our own.
fn reading<'a>(own: bool, base: &'a str, adapter: &'a str, out: &'a str) -> Vec<&'a str> {
    match own {
        true => vec!["export", "-m", base, "--lora", adapter, "--format", "peft", "-o", out],
        false => vec!["import", "-m", base, "--adapter-path", out, "--from", adapter],
    }
}

#[test]
fn broken_and_foreign_adapters_of_every_format_are_refused_with_6() {
    let base = golden("base.gguf");
    let model = ModelFile::open(&base).expect("the golden base");
    assert_eq!((model.config().d_model, model.config().d_kv()), (64, 32), "what the pair is made for");
    let formats: [(&str, Write, bool); 4] = [
        ("peft", write_peft, false),
        ("mlx", write_mlx, false),
        ("gguf", write_gguf, false),
        ("engraft", write_engraft, true),
    ];
    for (format, write, own) in formats {
        let folder = tempfile::tempdir().expect("a folder");
        let home = folder.path().join("home");
        std::fs::create_dir(&home).expect("a folder");
        let out = folder.path().join("out").display().to_string();
        let refused = |adapter: &Path, kind: &str, words: &[&str]| {
            let adapter = adapter.display().to_string();
            assert_refused(&reading(own, &base, &adapter, &out), 6, kind, &[words, &[&adapter]].concat());
            assert!(!Path::new(&out).exists(), "{format}: nothing is written for what is refused");
        };
        let single = |file: PathBuf| if format == "gguf" || own { file } else { home.clone() };
        let faulty = |pair: Pair, kind: &str, words: &[&str]| {
            println!("{format}: {words:?}");
            refused(&single(write(&home, &pair)), kind, words);
        };
        faulty(Pair { first: f32::NAN, ..GOOD }, "corrupt", &["NaN"]);
        faulty(Pair { first: f32::INFINITY, ..GOOD }, "corrupt", &["inf"]);
        // A and B have different ranks; in our own format the parameters must match the stated rank.
        faulty(Pair { b: (32, 3), ..GOOD }, "corrupt", if own { &["parameters"] } else { &["rank"] });
        faulty(Pair { a: (2, 96), ..GOOD }, "base_mismatch", &["own base"]);
        faulty(Pair { b: (48, 2), ..GOOD }, "base_mismatch", &["own base"]);
        faulty(Pair { values: [0.0, 0.2], ..GOOD }, "corrupt", &["does nothing"]);

        let file = write(&home, &GOOD);
        let whole = std::fs::read(&file).expect("reading");
        for cut in [whole.len() - 1, whole.len() / 2, 9] {
            // The padding after a GGUF's last tensor isn't needed.
            let cut = if format == "gguf" { cut.min(whole.len() - 33) } else { cut };
            std::fs::write(&file, &whole[..cut]).expect("writing");
            refused(&single(file.clone()), "corrupt", &[]);
        }
        std::fs::write(&file, "just some text that is long enough to have a header of a hundred bytes or so")
            .expect("writing");
        refused(&single(file.clone()), if format == "gguf" { "unsupported" } else { "corrupt" }, &[]);
        std::fs::write(&file, &whole).expect("writing");
        let adapter = single(file).display().to_string();
        let output = engraft(&reading(own, &base, &adapter, &out));
        assert_eq!(output.status.code(), Some(0), "{format}, the control: {}", stderr(&output));
    }
}

/// A trained adapter of the built-in model.
fn trained(folder: &Path, flags: &[&str]) -> String {
    let adapter = folder.join("trained").display().to_string();
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let run = ["train", "-m", &model, "--data", &data, "--adapter-path", &adapter, "--iters", "6", "-b", "4"];
    result_of(&[&run[..], &["-lr", "2e-3", "-t", "2"], flags].concat());
    adapter
}

/// The built-in model with some bytes replaced, as another file.
fn changed_seedling(folder: &Path, change: impl Fn(&mut Vec<u8>)) -> String {
    let mut bytes = std::fs::read(seedling()).expect("reading");
    change(&mut bytes);
    let file = folder.join("changed.gguf");
    std::fs::write(&file, bytes).expect("writing");
    file.display().to_string()
}

fn find(bytes: &[u8], word: &str) -> usize {
    bytes.windows(word.len()).position(|w| w == word.as_bytes()).expect("the word")
}

#[test]
fn what_differs_from_the_base_is_named_and_can_be_overridden() {
    let folder = tempfile::tempdir().expect("a folder");
    let (adapter, data) = (trained(folder.path(), &[]), shipped("demo/private_train.jsonl"));
    let eval = |model: &str, more: &[&str]| -> Vec<String> {
        let all = ["eval", "-m", model, "--data", &data, "-c", "200", "--lora", &adapter];
        all.iter().chain(more).map(|s| s.to_string()).collect()
    };
    let refused = |model: &str, words: &[&str]| {
        let arguments = eval(model, &[]);
        assert_refused(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), 6, "base_mismatch", words);
        let forced = eval(model, &["--force-base"]);
        let output = engraft(&forced.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert!(stderr(&output).contains("--force-base: "), "{}", stderr(&output));
        assert!(!stderr(&output).contains("say --force-base"), "{}", stderr(&output));
        assert!(words.iter().all(|w| stderr(&output).contains(w)), "{}", stderr(&output));
    };
    let other = |change: &dyn Fn(&mut Vec<u8>)| changed_seedling(folder.path(), change);
    let template = other(&|bytes| {
        let at = find(bytes, "<|im_end|>' + '");
        bytes[at + 2..at + 4].copy_from_slice(b"IM");
    });
    refused(&template, &["another base", "chat template"]);
    let weights = other(&|bytes| {
        let end = bytes.len();
        // Somewhere in the blocks of the last third.
        bytes[end - end / 3..end - end / 3 + 4096].iter_mut().for_each(|b| *b ^= 0x11);
    });
    refused(&weights, &["another base", "nats on fixed tokens"]);
    let token = other(&|bytes| {
        let at = find(bytes, "tokenizer.ggml.merges");
        let merge = at + bytes[at + 60..].iter().position(u8::is_ascii_lowercase).expect("a letter") + 60;
        bytes[merge] ^= 1;
    });
    let output = engraft(&eval(&token, &[]).iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(output.status.code(), Some(6), "{}", stderr(&output));
}

#[test]
fn what_an_unbound_file_does_not_record_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, data) = (trained(folder.path(), &[]), shipped("demo/private_train.jsonl"));
    let told = |adapter: &str| {
        let output = engraft(&["eval", "-m", &seedling(), "--data", &data, "-c", "200", "--lora", adapter]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stderr(&output)
    };
    assert!(!told(&file).contains("doesn't record"));
    let unbound = Adapter { binding: None, ..Adapter::load(Path::new(&file)).expect("the adapter") };
    unbound.save(&Disk, folder.path(), StoredAs::F32).expect("saving");
    let said = told(&folder.path().display().to_string());
    for words in
        ["doesn't record chat template, matched tensors", "train or import the adapter again", "digest"]
    {
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
#[cfg(unix)]
fn digests_are_remembered_where_told_and_a_broken_memory_harms_nothing() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("a folder");
    let adapter = trained(folder.path(), &[]);
    let cache = folder.path().join("cache/of/digests");
    let run = |more: &[&str]| {
        let mut command = program();
        command.env("ENGRAFT_CACHE_DIR", &cache);
        let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
        command.args(["eval", "-m", &model, "--data", &data, "-c", "200", "--lora", &adapter]).args(more);
        let output = command.output().expect("running engraft");
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    };
    run(&["--no-digest-cache"]);
    assert!(!cache.exists());
    run(&[]);
    let file = cache.join("digests");
    let kept = std::fs::read(&file).expect("a cache: the built-in model was not changed this second");
    let mode = |path: &Path| path.metadata().expect("it is there").permissions().mode() & 0o777;
    assert_eq!((mode(&cache), mode(&file)), (0o700, 0o600));
    std::fs::write(&file, &kept[..kept.len() / 2]).expect("writing");
    run(&[]);
    assert_eq!(std::fs::read(&file).expect("reading"), kept);
}

#[test]
fn a_dora_leaves_as_the_nearest_lora_and_its_error_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let dora = trained(folder.path(), &["--fine-tune-type", "dora", "--rank", "4"]);
    let file = path("nearest.gguf");
    let export = ["export", "-m", &model, "--lora", &dora, "--format", "gguf", "-o", &file];
    assert_refused(&export, 6, "unsupported", &["DoRA", "--dora-svd-rank", "merge"]);
    let measured = ["--dora-svd-rank", "24", "--data", &data, "--max-tokens", "400", "-t", "2"];
    let output = engraft(&[&export[..], &measured, &["--json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("layer 3: relative error of q_proj 0."), "{}", stderr(&output));
    let found = last_line(&output)["approximation"].clone();
    assert_keys(&found, &["rank", "relative_error", "projections", "measured"]);
    assert_eq!(found["projections"].as_array().expect("a list").len(), 28);
    let figures = &found["measured"];
    let keys = ["tokens", "nll_base", "nll_adapter", "nll_exported", "mean_kl", "mean_kl_base"];
    assert_keys(figures, &keys);
    let of = |key: &str| figures[key].as_f64().expect(key);
    assert!(of("mean_kl") < 0.5 * of("mean_kl_base"), "{figures}");
    // The written file behaves as measured.
    let back = path("back");
    result_of(&["import", "-m", &model, "--adapter-path", &back, "--from", &file]);
    let loaded = Adapter::load(Path::new(&back)).expect("an adapter");
    assert!(!loaded.config.dora && loaded.binding.is_some() && loaded.config.scale() == 1.0);
    let error = |rank: &str| {
        let less = result_of(&[&export[..], &["--dora-svd-rank", rank]].concat());
        assert!(less["approximation"]["measured"].is_null());
        less["approximation"]["relative_error"].as_f64().expect("an error")
    };
    let errors = [error("2"), error("8"), found["relative_error"].as_f64().expect("an error")];
    assert!(errors.is_sorted_by(|a, b| a > b), "{errors:?}");
    assert_refused(&[&export[..], &["--data", &data]].concat(), 2, "usage", &["--dora-svd-rank"]);
    assert_refused(&[&export[..], &["--dora-svd-rank", "0"]].concat(), 2, "usage", &["--dora-svd-rank"]);
    let plain = ["export", "-m", &model, "--lora", &back, "--format", "gguf", "-o", &file];
    assert_refused(&[&plain[..], &["--dora-svd-rank", "4"]].concat(), 2, "usage", &["plain LoRA"]);
}

#[test]
fn adapters_of_other_tools_lead_to_import() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, theirs) = (seedling(), folder.path().join("theirs"));
    std::fs::create_dir(&theirs).expect("a folder");
    std::fs::write(theirs.join("adapter_config.json"), "{}").expect("writing");
    let file = folder.path().join("adapter.gguf");
    std::fs::copy(&model, &file).expect("copying");
    for (adapter, kind) in [(&theirs, "unsupported"), (&file, "corrupt")] {
        let adapter = adapter.display().to_string();
        let generate = ["generate", "-m", &model, "-p", "x", "--lora", &adapter];
        assert_refused(&generate, 6, kind, &["engraft import", &format!("--from {adapter}")]);
    }
}

#[test]
fn rows_held_out_by_another_seed_are_warned_of() {
    let folder = tempfile::tempdir().expect("a folder");
    let (adapter, data) = (trained(folder.path(), &["--seed", "5"]), shipped("demo/private_train.jsonl"));
    let told = |seed: &str| {
        let eval = ["eval", "-m", &seedling(), "--data", &data, "-c", "200", "--lora", &adapter];
        let output = engraft(&[&eval[..], &["--seed", seed]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stderr(&output)
    };
    let other = told("0");
    assert!(other.contains("held out of the file by --seed 0 and --valid-fraction 0.1"), "{other}");
    assert!(other.contains("trained with --seed 5") && other.contains("use --seed 5"), "{other}");
    assert!(!told("5").contains("warning"));
}
