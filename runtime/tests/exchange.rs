//! Adapters that travel: files of PEFT itself, llama.cpp's and MLX's formats, there and back, and what
//! is refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::common::TestResult;
use engraft_kernels::{Kernels, KvType};
use engraft_runtime::adapter::exchange::{Exchange, RowOrder};
use engraft_runtime::adapter::foreign::Format;
use engraft_runtime::adapter::{Adapter, LoraConfig, StoredAs, gguf_file, mlx, peft};
use engraft_runtime::generate::{Sequence, StackedAdapter};
use engraft_runtime::model::Proj;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn;
use engraft_runtime::storage::Disk;
use engraft_runtime::{Advice, Error, ErrorKind};
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/peft/golden").join(name)
}

fn base() -> Arc<ModelFile> {
    Arc::new(ModelFile::open(golden("base.gguf")).expect("the golden base"))
}

/// PEFT's own logits: the fixed ids, and those of the last positions, one after another.
fn expected(name: &str) -> (Vec<u32>, Vec<f64>) {
    let text = fs::read_to_string(golden("logits.json")).expect("the golden logits");
    let all: Value = serde_json::from_str(&text).expect("JSON");
    let numbers = |key: &str| {
        all[key].as_array().expect("a list").iter().map(|v| v.as_f64().expect("a number")).collect::<Vec<_>>()
    };
    (numbers("ids").iter().map(|v| *v as u32).collect(), numbers(name))
}

/// The largest difference between our logits and PEFT's.
fn distance(model: &Arc<ModelFile>, adapter: Option<Adapter>, name: &str) -> f64 {
    let (ids, expected) = expected(name);
    let stacked = adapter
        .map(|a| Arc::new(StackedAdapter::new(model, &Kernels::detect(1), &[(a, 1.0)]).expect("it fits")));
    let kernels = Arc::new(Kernels::detect(1));
    let precision = nn::Precision::F32;
    let mut sequence = Sequence::new(model.clone(), kernels, stacked, precision, ids.len(), KvType::F32)
        .expect("a sequence");
    let mut found = Vec::new();
    let kept = expected.len() / model.config().vocab;
    sequence
        .read(&ids, |sequence, rows| {
            for row in rows - kept..rows {
                found.extend_from_slice(sequence.logits_at(row));
            }
            Ok(())
        })
        .expect("ids within the vocabulary");
    assert_eq!(found.len(), expected.len());
    found.iter().zip(&expected).fold(0.0, |m, (a, b)| f64::max(m, (f64::from(*a) - b).abs()))
}

fn imported(dir: &Path, model: &ModelFile) -> Exchange {
    let found = Format::detect(dir).expect("a format").import(dir, model.config()).expect("a good adapter");
    assert_eq!(found.warnings, Vec::<String>::new());
    found.exchange
}

fn adapter(model: &ModelFile, exchange: Exchange) -> Result<Adapter, Error> {
    Adapter::from_exchange(model.config(), model.digest(), exchange)
}

#[test]
fn the_base_computes_as_its_original() {
    assert!(distance(&base(), None, "base") < 1e-4);
}

#[test]
fn adapters_of_peft_compute_as_in_peft() {
    let model = base();
    for name in ["lora", "layers", "patterns", "rslora", "dora"] {
        let exchange = imported(&golden(name), &model);
        let ours = adapter(&model, exchange.clone()).expect("an adapter can hold it");
        assert_eq!(ours.to_exchange(), exchange, "{name}");
        let found = distance(&model, Some(ours), name);
        assert!(found < 1e-4, "{name}: {found}");
        // The control: without the adapter the logits are far away.
        assert!(distance(&model, None, name) > 0.05, "{name}");
    }
}

#[test]
fn rows_in_the_wrong_order_are_noticed() {
    let model = base();
    let mut exchange = imported(&golden("lora"), &model);
    for m in &mut exchange.modules {
        m.b = RowOrder::of(model.config(), m.proj).to_hf(&m.b, m.rank);
    }
    let found = distance(&model, Some(adapter(&model, exchange).expect("it fits")), "lora");
    assert!(found > 1e-2, "{found}");
}

#[test]
fn rotary_rows_are_those_of_the_converter() {
    let model = base();
    let rows = RowOrder::of(model.config(), Proj::K);
    let order: Vec<_> = (0..18).map(|r| rows.hf_row(r)).collect();
    assert_eq!(order, [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15, 16, 24]);
    assert_eq!(RowOrder::of(model.config(), Proj::V).hf_row(5), 5);
    let values: Vec<f32> = (0..64).map(|v| v as f32).collect();
    assert_eq!(rows.to_hf(&rows.from_hf(&values, 2), 2), values);
}

#[test]
fn settings_of_peft_arrive_whole() {
    let model = base();
    let at = |e: &Exchange, layer, proj| {
        let m = e.modules.iter().find(|m| (m.layer, m.proj) == (layer, proj)).expect("a module");
        (m.rank, m.alpha)
    };
    let patterns = imported(&golden("patterns"), &model);
    assert_eq!(at(&patterns, 0, Proj::Q), (2, 6.0));
    assert_eq!(at(&patterns, 1, Proj::Q), (2, 9.0));
    assert_eq!(at(&patterns, 1, Proj::K), (3, 4.0));
    assert_eq!((at(&patterns, 0, Proj::Down), at(&patterns, 1, Proj::Down)), ((1, 6.0), (2, 6.0)));
    let rslora = imported(&golden("rslora"), &model);
    assert!(rslora.rslora && (rslora.scale(&rslora.modules[0]) - 1.5).abs() < 1e-6);
    let dora = imported(&golden("dora"), &model);
    assert!(dora.dora && dora.modules.iter().all(|m| m.magnitude.is_some()));
}

#[test]
fn peft_there_and_back_is_the_same() {
    let model = base();
    let folder = tempfile::tempdir().expect("a folder");
    // Where the folders shall stay, for `make.py check`.
    let kept = std::env::var_os("ENGRAFT_PEFT_OUT").map(PathBuf::from);
    for name in ["lora", "layers", "patterns", "rslora", "dora"] {
        let mut exchange = imported(&golden(name), &model);
        exchange.base_name = "a/base".into();
        let dir = kept.as_deref().unwrap_or(folder.path()).join(name);
        peft::export(&Disk, &dir, &exchange, model.config(), StoredAs::F32).expect("writing");
        assert_eq!(imported(&dir, &model), exchange, "{name}");
        let settings = fs::read_to_string(dir.join(peft::CONFIG_FILE)).expect("the settings");
        let keys: Vec<_> = settings.lines().filter(|l| l.starts_with("  \"")).collect();
        assert!(keys.len() > 15 && keys.is_sorted(), "{settings}");
    }
}

#[test]
fn an_adapter_there_and_back_is_the_same() -> TestResult {
    let model = base();
    let c = model.config();
    let config = LoraConfig::new(c, 3, 5.0, 0.1, &[Proj::Q, Proj::Down], &[1])?;
    let mut x = 0.3_f32;
    let mut noise = || {
        x = (x * 7.31).fract();
        x
    };
    let mut ours = Adapter::init(c, &config, model.digest(), &mut noise)?;
    ours.theta.iter_mut().for_each(|v| *v = noise() - 0.5);
    let folder = tempfile::tempdir()?;
    let dir = folder.path().join("out");
    peft::export(&Disk, &dir, &ours.to_exchange(), c, StoredAs::F32)?;
    assert_eq!(adapter(&model, imported(&dir, &model))?, ours);
    let file = folder.path().join("out.gguf");
    gguf_file::export(&Disk, &file, &ours.to_exchange(), c, StoredAs::F32)?;
    let mut back = adapter(&model, imported(&file, &model))?;
    assert_eq!(back.config.dropout, 0.0, "a GGUF adapter does not say");
    back.config.dropout = ours.config.dropout;
    assert_eq!(back, ours);
    // Half the size in f16, and close.
    gguf_file::export(&Disk, &file, &ours.to_exchange(), c, StoredAs::F16)?;
    let half = adapter(&model, imported(&file, &model))?;
    assert!(half.theta.iter().zip(&ours.theta).all(|(a, b)| (a - b).abs() < 5e-4));
    Ok(())
}

#[test]
fn gguf_adapters_carry_the_multiplier_of_every_module() -> TestResult {
    let model = base();
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("a.gguf");
    for name in ["lora", "rslora", "patterns"] {
        let theirs = imported(&golden(name), &model);
        gguf_file::export(&Disk, &file, &theirs, model.config(), StoredAs::F32)?;
        let back = imported(&file, &model);
        assert!(!back.rslora);
        for (m, n) in theirs.modules.iter().zip(&back.modules) {
            assert_eq!((m.rank, &m.a), (n.rank, &n.a));
            let (s, t) = (theirs.scale(m), back.scale(n));
            assert!(
                m.b.iter().zip(&n.b).all(|(b, d)| (b * s - d * t).abs() <= 1e-6 * (b * s).abs()),
                "{name}"
            );
        }
    }
    let dora = imported(&golden("dora"), &model);
    let error = gguf_file::export(&Disk, &file, &dora, model.config(), StoredAs::F32).expect_err("DoRA");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.advice() == Some(&Advice::WithoutMagnitudes), "{error}");
    Ok(())
}

/// safetensors bytes of f32 tensors.
fn tensors(tensors: &[(String, Vec<usize>, Vec<f32>)]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape, values) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        header.insert(
            name.clone(),
            serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}),
        );
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

#[test]
fn adapters_of_mlx_are_read() -> TestResult {
    let model = base();
    let theirs = imported(&golden("lora"), &model);
    let folder = tempfile::tempdir()?;
    let transposed = |values: &[f32], cols: usize| -> Vec<f32> {
        (0..cols).flat_map(|c| values.iter().skip(c).step_by(cols).copied()).collect()
    };
    let mut all = Vec::new();
    for m in &theirs.modules {
        let (outputs, inputs) = m.proj.shape(model.config());
        let room = if matches!(m.proj, Proj::Gate | Proj::Up | Proj::Down) { "mlp" } else { "self_attn" };
        let name = format!("model.layers.{}.{room}.{}", m.layer, m.proj.hf_name());
        let b = RowOrder::of(model.config(), m.proj).to_hf(&m.b, m.rank);
        all.push((format!("{name}.lora_a"), vec![inputs, m.rank], transposed(&m.a, inputs)));
        all.push((format!("{name}.lora_b"), vec![m.rank, outputs], transposed(&b, m.rank)));
    }
    fs::write(folder.path().join("adapters.safetensors"), tensors(&all))?;
    let settings = r#"{"fine_tune_type": "lora", "num_layers": 2, "model": "x",
                       "lora_parameters": {"rank": 2, "scale": 3.0, "dropout": 0.0}}"#;
    fs::write(folder.path().join("adapter_config.json"), settings)?;
    assert_eq!(Format::detect(folder.path())?, Format::Mlx);
    let ours = adapter(&model, imported(folder.path(), &model))?;
    assert_eq!(ours.config.alpha, 6.0);
    assert!(distance(&model, Some(ours), "lora") < 1e-4);
    let refused = |settings: &str| {
        fs::write(folder.path().join("adapter_config.json"), settings).expect("writing");
        Format::Mlx.import(folder.path(), model.config()).expect_err(settings)
    };
    let full = refused(r#"{"fine_tune_type": "full", "lora_parameters": {"rank": 2, "scale": 1}}"#);
    assert_eq!(full.kind(), ErrorKind::Unsupported);
    let rank = refused(r#"{"lora_parameters": {"rank": 4, "scale": 1}}"#);
    assert!(rank.kind() == ErrorKind::Corrupt && rank.message().contains("rank 2"), "{rank}");
    assert_eq!(refused(r#"{"lora_parameters": {"rank": 2}}"#).kind(), ErrorKind::Corrupt);
    // MLX itself would leave out what belongs to earlier blocks.
    let fewer = refused(r#"{"num_layers": 1, "lora_parameters": {"rank": 2, "scale": 1}}"#);
    assert!(fewer.kind() == ErrorKind::Corrupt && fewer.message().contains("num_layers"), "{fewer}");
    Ok(())
}

/// What is written for MLX is what came from PEFT, whatever its ranks and multipliers.
#[test]
fn adapters_for_mlx_come_back_as_they_were() -> TestResult {
    let model = base();
    for name in ["lora", "layers", "patterns", "rslora", "dora"] {
        let folder = tempfile::tempdir()?;
        let theirs = imported(&golden(name), &model);
        mlx::export(&Disk, folder.path(), &theirs, model.config(), StoredAs::F32)?;
        assert_eq!(Format::detect(folder.path())?, Format::Mlx);
        let ours = imported(folder.path(), &model);
        assert_eq!(ours.modules.len(), theirs.modules.len());
        let found = distance(&model, Some(adapter(&model, ours)?), name);
        assert!(found < 1e-4, "{name}: {found}");
        // mlx_lm adapts the last blocks, and in them what is named; what the file lacks stays the base's.
        let settings: Value =
            serde_json::from_str(&fs::read_to_string(folder.path().join("adapter_config.json"))?)?;
        let first = theirs.modules.iter().map(|m| m.layer).min().expect("modules");
        assert_eq!(settings["num_layers"], model.config().n_layers - first);
        let keys = settings["lora_parameters"]["keys"].as_array().expect("a list");
        let projs: std::collections::BTreeSet<_> = theirs.modules.iter().map(|m| m.proj).collect();
        assert_eq!(keys.len(), projs.len(), "{name}");
    }
    Ok(())
}

/// The golden LoRA with its settings and tensors changed, and what importing it says.
fn refusal(
    settings: impl Fn(&mut serde_json::Map<String, Value>),
    change: impl Fn(&mut Vec<(String, Vec<usize>, Vec<f32>)>),
) -> Error {
    let model = base();
    let folder = tempfile::tempdir().expect("a folder");
    let text = fs::read_to_string(golden("lora/adapter_config.json")).expect("settings");
    let mut object: serde_json::Map<String, Value> = serde_json::from_str(&text).expect("JSON");
    settings(&mut object);
    fs::write(folder.path().join("adapter_config.json"), Value::Object(object).to_string()).expect("writing");
    let bytes = fs::read(golden("lora/adapter_model.safetensors")).expect("tensors");
    let parsed = safetensors::SafeTensors::deserialize(&bytes).expect("PEFT's file");
    let mut all: Vec<_> = parsed
        .iter()
        .map(|(name, t)| {
            let values = t.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            (name.to_string(), t.shape().to_vec(), values)
        })
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    change(&mut all);
    fs::write(folder.path().join("adapter_model.safetensors"), tensors(&all)).expect("writing");
    let read = Format::Peft.import(folder.path(), model.config());
    let error = match read.and_then(|found| adapter(&model, found.exchange)) {
        Ok(_) => return Error::new(ErrorKind::GateRefused, "nothing was wrong"),
        Err(error) => error,
    };
    assert!(error.message().contains(&folder.path().display().to_string()), "it names no file: {error}");
    error
}

#[test]
fn unchanged_files_are_taken() {
    assert_eq!(refusal(|_| (), |_| ()).message(), "nothing was wrong");
}

#[test]
fn foreign_settings_are_refused_by_name() {
    use ErrorKind::{Corrupt, Unsupported};
    for (key, value, kind, word) in [
        ("peft_type", "\"LOHA\"", Unsupported, "LOHA"),
        ("peft_type", "null", Corrupt, "peft_type"),
        ("task_type", "\"SEQ_CLS\"", Unsupported, "SEQ_CLS"),
        ("bias", "\"all\"", Unsupported, "bias"),
        ("fan_in_fan_out", "true", Unsupported, "fan_in_fan_out"),
        ("modules_to_save", "[\"lm_head\"]", Unsupported, "modules_to_save"),
        ("layer_replication", "[[0,1],[0,1]]", Unsupported, "layer_replication"),
        ("use_bdlora", "{\"x\":1}", Unsupported, "use_bdlora"),
        ("init_lora_weights", "\"pissa_niter_4\"", Unsupported, "pissa"),
        ("rank_pattern", "{\".*q_proj\": 4}", Unsupported, "rank_pattern"),
        ("rank_pattern", "{\"q_proj\": 4}", Corrupt, "rank 2"),
        ("r", "4", Corrupt, "say 4"),
        ("r", "\"two\"", Corrupt, "r is not a number"),
        ("lora_alpha", "0", Corrupt, "alpha 0"),
        ("lora_alpha", "-1e300", Corrupt, "alpha"),
        ("lora_dropout", "1.0", Corrupt, "dropout"),
        ("target_modules", "[\"q_proj\"]", Corrupt, "target_modules"),
        ("layers_to_transform", "[0]", Corrupt, "layers_to_transform"),
        ("use_dora", "true", Corrupt, "magnitudes"),
        ("use_rslora", "\"yes\"", Corrupt, "use_rslora"),
    ] {
        let error = refusal(|s| drop(s.insert(key.into(), value.parse().expect("JSON"))), |_| ());
        assert_eq!(error.kind(), kind, "{key}: {error}");
        assert!(error.message().contains(word), "{key} = {value}: {error}");
    }
}

#[test]
fn broken_tensors_are_refused_by_name() {
    type All = Vec<(String, Vec<usize>, Vec<f32>)>;
    use ErrorKind::{BaseMismatch, Corrupt, Unsupported};
    let cases: [(&str, fn(&mut All), ErrorKind, &str); 9] = [
        ("NaN", |t| t[3].2[5] = f32::NAN, Corrupt, "NaN"),
        ("infinity", |t| t[2].2[0] = f32::INFINITY, Corrupt, "inf"),
        ("half a pair", |t| drop(t.remove(1)), Corrupt, "B is missing"),
        ("a cut", |t| t.truncate(26), Corrupt, "no tensors for"),
        (
            "two ranks",
            |t| {
                t[0].1 = vec![1, 2 * t[0].1[1]];
            },
            Corrupt,
            "A has rank 1, B has rank 2",
        ),
        ("another base", |t| (t[0].1[1], t[0].2) = (70, vec![0.0; 140]), BaseMismatch, "own base"),
        (
            "a deeper base",
            |t| {
                let add = |t: &(String, Vec<usize>, Vec<f32>)| {
                    (t.0.replace("layers.0.", "layers.2."), t.1.clone(), t.2.clone())
                };
                let more: All = t.iter().filter(|t| t.0.contains("layers.0.")).map(add).collect();
                t.extend(more);
            },
            BaseMismatch,
            "layers are 0 to 1",
        ),
        ("unknown", |t| t[0].0 = t[0].0.replace("down_proj", "router"), Unsupported, "router"),
        ("embedding", |t| t[0].0 = "base_model.model.lm_head.lora_A.weight".into(), Unsupported, "lm_head"),
    ];
    for (what, change, kind, word) in cases {
        let error = refusal(|_| (), change);
        assert_eq!(error.kind(), kind, "{what}: {error}");
        assert!(error.message().contains(word), "{what}: {error}");
    }
    let magnitudes = refusal(
        |_| (),
        |t| {
            t.push((
                "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector".into(),
                vec![72],
                vec![1.0; 72],
            ))
        },
    );
    assert!(magnitudes.kind() == Corrupt && magnitudes.message().contains("no DoRA"), "{magnitudes}");
}

#[test]
fn foreign_and_corrupt_files_are_told_apart() -> TestResult {
    let model = base();
    let folder = tempfile::tempdir()?;
    let detect = |path: &Path| Format::detect(path).expect_err("no adapter").to_string();
    assert!(detect(folder.path()).contains("adapter_config.json"));
    let text = folder.path().join("x.txt");
    fs::write(&text, "hello")?;
    assert!(detect(&text).contains("not a GGUF"));
    let error = Format::Gguf.import(&golden("base.gguf"), model.config()).expect_err("a model");
    assert!(error.kind() == ErrorKind::Unsupported && error.message().contains("a model"), "{error}");

    let file = folder.path().join("a.gguf");
    let good = imported(&golden("layers"), &model);
    gguf_file::export(&Disk, &file, &good, model.config(), StoredAs::F32)?;
    let whole = fs::read(&file)?;
    let import = |bytes: &[u8]| {
        fs::write(&file, bytes).expect("writing");
        Format::Gguf.import(&file, model.config())
    };
    for n in (1..whole.len() - 31).step_by(37) {
        assert!(import(&whole[..n]).is_err(), "cut at {n}");
    }
    let swapped = |from: &str, to: &str| {
        let at = whole.windows(from.len()).position(|w| w == from.as_bytes()).expect("the word");
        let mut bytes = whole.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        import(&bytes).expect_err(to)
    };
    assert_eq!(swapped("llama", "qwen2").kind(), ErrorKind::BaseMismatch);
    assert!(swapped("lora_a", "lora_c").message().contains("part of a LoRA pair"));
    assert!(swapped("adapter.type", "adapter.kind").message().contains("adapter.type"));
    assert!(swapped("attn_q", "attn_v").kind() == ErrorKind::Corrupt);
    let mut nan = whole.clone();
    let end = nan.len();
    nan[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    let error = import(&nan).expect_err("NaN");
    assert!(error.kind() == ErrorKind::Corrupt && error.message().contains("NaN"), "{error}");
    Ok(())
}

#[test]
fn patterns_that_match_nothing_are_told() -> TestResult {
    let model = base();
    let folder = tempfile::tempdir()?;
    let mut settings: serde_json::Map<String, Value> =
        serde_json::from_str(&fs::read_to_string(golden("lora/adapter_config.json"))?)?;
    settings.insert("alpha_pattern".into(), serde_json::json!({"q_proj": 4, "z_proj": 4, "^q_proj": 4}));
    fs::write(folder.path().join("adapter_config.json"), Value::Object(settings).to_string())?;
    fs::copy(golden("lora/adapter_model.safetensors"), folder.path().join("adapter_model.safetensors"))?;
    let told = Format::Peft.import(folder.path(), model.config())?.warnings;
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("alpha_pattern \"^q_proj\" and 1 more name no module"), "{told:?}");
    Ok(())
}
