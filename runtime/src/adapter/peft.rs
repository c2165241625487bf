//! PEFT's adapters: a folder of `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Settings that change the computation are honoured or refused by name, never ignored. Only keys PEFT itself
//! doesn't know are skipped, with a warning.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::Read;
use std::path::Path;

use serde_json::{Map as Object, Value, json};

use super::StoredAs;
use super::exchange::{
    Exchange, Matrix, Module, Part, Parts, RowOrder, corrupt, hf_path, module_of, unknown_tensor, unsupported,
};
use super::imported::{Imported, read_json};
use super::params::Init;
use super::safetensors::{self, Tensor};
use crate::error::{Error, ErrorKind, Result, told};
use crate::model::gguf::quote;
use crate::model::{ModelConfig, Proj};
use crate::storage::{Storage, commit, create_dir_all};

/// The settings' file.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The tensors' file.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// Keys that are read here, or change nothing: names, provenance and training settings.
const KNOWN: [&str; 30] = [
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "monteclora_config",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
    "velora_config",
];

/// Keys that change the mathematics or need more than A and B: refused unless off.
const FOREIGN: [&str; 12] = [
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
];

/// Initializations that modify the base, so the adapter no longer fits the base's file.
const CHANGED_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// Reads a folder.
///
/// # Errors
/// `Io`; `Corrupt` if the files break their formats, contradict each other or hold non-finite numbers;
/// `Unsupported` for settings and tensors beyond LoRA on the seven projections; `BaseMismatch` if shapes don't
/// match the model's.
pub fn import(dir: &Path, model: &ModelConfig) -> Result<Imported> {
    let config_file = dir.join(CONFIG_FILE);
    let object = read_json(&config_file)?;
    let mut warnings = Vec::new();
    let settings = PeftSettings::read(&object, &mut warnings).map_err(|e| e.at(config_file.display()))?;
    let file = dir.join(TENSORS_FILE);
    if !file.exists() && dir.join("adapter_model.bin").exists() {
        return Err(unsupported(format!(
            "{}: adapter_model.bin is a pickle, which can run code and is not read; save it again with \
             safe_serialization=True",
            dir.display()
        )));
    }
    let mut parts = Parts::default();
    safetensors::read(&file, |tensor| put(&mut parts, tensor, model))?;
    settings.check_presence(&parts, model).map_err(|e| e.at(dir.display()))?;
    warnings.extend([&settings.ranks, &settings.alphas].iter().filter_map(|p| p.unused(parts.names())));
    let mut exchange = settings.exchange(parts, model).map_err(|e| e.at(dir.display()))?;
    exchange.check(model).map_err(|e| e.at(file.display()))?;
    Ok(Imported { exchange, warnings })
}

/// Sorts a tensor into its pair by its name.
fn put(parts: &mut Parts, tensor: Tensor, model: &ModelConfig) -> Result<()> {
    let unknown = || unknown_tensor(&tensor.name);
    let path = tensor.name.strip_prefix("base_model.model.").unwrap_or(&tensor.name);
    let (path, part) = [
        (".lora_A.weight", Part::A),
        (".lora_B.weight", Part::B),
        (".lora_magnitude_vector", Part::Magnitude),
        (".lora_magnitude_vector.weight", Part::Magnitude),
    ]
    .into_iter()
    .find_map(|(suffix, part)| Some((path.strip_suffix(suffix)?, part)))
    .ok_or_else(unknown)?;
    let module = module_of(path).ok_or_else(unknown)?;
    if module.0 >= model.n_layers {
        let (tensor, last) = (quote(&tensor.name), model.n_layers - 1);
        let message =
            format!("tensor {tensor}: the model's layers are 0 to {last}; use the adapter's own base");
        return Err(Error::new(ErrorKind::BaseMismatch, message));
    }
    let (rows, cols) = match (part, &tensor.shape[..]) {
        (Part::Magnitude, [n]) => (*n, 1),
        _ => tensor.matrix()?,
    };
    parts.put(module, part, Matrix { rows, cols, values: tensor.values })
}

/// The settings that matter.
struct PeftSettings {
    rank: usize,
    alpha: f32,
    dropout: f32,
    rslora: bool,
    init: Init,
    dora: bool,
    base_name: String,
    ranks: Patterns,
    alphas: Patterns,
    /// `None` if all modules are targets, or the value is a regular expression.
    targets: Option<BTreeSet<String>>,
    layers: Option<BTreeSet<usize>>,
    /// Whether modules may be left out of the targets.
    excludes: bool,
}

impl PeftSettings {
    fn read(object: &Object<String, Value>, warnings: &mut Vec<String>) -> Result<PeftSettings> {
        foreign_settings(object)?;
        for key in object.keys() {
            let known = |list: &[&str]| list.contains(&key.as_str());
            if !known(&KNOWN) && !known(&FOREIGN) {
                warnings.push(format!("{CONFIG_FILE}: unknown key {} is ignored", quote(key)));
            }
        }
        let rank = number(object, "r")?.map_or(Ok(8), |r| whole("r", r))?;
        let targets = match object.get("target_modules") {
            Some(Value::Array(items)) => {
                Some(items.iter().map(|v| text("target_modules", v)).collect::<Result<_>>()?)
            }
            Some(Value::String(all)) if all == "all-linear" => None,
            Some(Value::String(_)) => {
                let warning =
                    "target_modules is a regular expression, which is not evaluated: the tensors decide";
                warnings.push(format!("{CONFIG_FILE}: {warning}"));
                None
            }
            None | Some(Value::Null) => None,
            Some(_) => return Err(corrupt("target_modules is neither a list nor a string")),
        };
        let layer = |v: &Value| {
            let n =
                v.as_f64().ok_or_else(|| corrupt("layers_to_transform holds something other than numbers"));
            whole("layers_to_transform", n?)
        };
        let layers = match object.get("layers_to_transform") {
            None | Some(Value::Null) => None,
            Some(Value::Array(items)) => Some(items.iter().map(layer).collect::<Result<_>>()?),
            Some(one) => Some(BTreeSet::from([layer(one)?])),
        };
        Ok(PeftSettings {
            rank,
            alpha: number(object, "lora_alpha")?.unwrap_or(8.0) as f32,
            dropout: number(object, "lora_dropout")?.unwrap_or(0.0) as f32,
            rslora: flag(object, "use_rslora")?,
            init: match object.get("init_lora_weights").and_then(Value::as_str) {
                Some("eva") => Init::Eva,
                _ => Init::Kaiming,
            },
            dora: flag(object, "use_dora")?,
            base_name: object
                .get("base_model_name_or_path")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .into(),
            ranks: Patterns::read(object, "rank_pattern")?,
            alphas: Patterns::read(object, "alpha_pattern")?,
            targets,
            layers,
            excludes: object.get("exclude_modules").is_some_and(|v| !v.is_null()),
        })
    }

    /// Checks the tensors against the settings. Both must name the same modules; otherwise the folder mixes two
    /// adapters or holds half of one.
    fn check_presence(&self, parts: &Parts, model: &ModelConfig) -> Result<()> {
        let Some(targets) = &self.targets else { return Ok(()) };
        let is_target = |(layer, proj)| {
            let path = hf_path(layer, proj);
            ends_of(&path).any(|end| targets.contains(end))
                && self.layers.as_ref().is_none_or(|l| l.contains(&layer))
        };
        if let Some((layer, proj)) = parts.names().find(|m| !is_target(*m)) {
            let path = hf_path(layer, proj);
            return Err(corrupt(format!(
                "it has tensors for {path}, which target_modules and layers_to_transform leave out"
            )));
        }
        if self.excludes {
            return Ok(());
        }
        let mut every = (0..model.n_layers).flat_map(|l| Proj::ALL.map(|p| (l, p)));
        match every.find(|m| is_target(*m) && !parts.has(*m)) {
            None => Ok(()),
            Some((layer, proj)) => Err(corrupt(format!(
                "it has no tensors for {}, which target_modules names: the adapter is incomplete, \
             or made for a shorter model",
                hf_path(layer, proj)
            ))),
        }
    }

    fn exchange(self, parts: Parts, model: &ModelConfig) -> Result<Exchange> {
        let modules = parts.modules(
            |proj| Some(RowOrder::of(model, proj)),
            |layer, proj, found| {
                let path = hf_path(layer, proj);
                let rank = self.ranks.of(&path)?.map_or(Ok(self.rank), |r| whole("rank_pattern", r))?;
                if rank != found {
                    return Err(corrupt(format!(
                        "{path}: tensors have rank {found}, but the settings say {rank}"
                    )));
                }
                Ok(self.alphas.of(&path)?.map_or(self.alpha, |a| a as f32))
            },
        )?;
        let PeftSettings { rslora, dora, init, dropout, base_name, .. } = self;
        Ok(Exchange { rslora, dora, init, dropout, base_name, modules })
    }
}

/// Refuses whatever would compute something other than LoRA on linear layers.
fn foreign_settings(object: &Object<String, Value>) -> Result<()> {
    let of = |key: &str| object.get(key).unwrap_or(&Value::Null);
    match of("peft_type") {
        Value::String(kind) if kind == "LORA" => {}
        Value::String(kind) => {
            return Err(unsupported(format!("peft_type {} is not supported; only LORA is", quote(kind))));
        }
        _ => return Err(corrupt("peft_type is missing: these aren't PEFT settings")),
    }
    match of("task_type") {
        Value::Null => {}
        Value::String(task) if task == "CAUSAL_LM" => {}
        other => {
            return Err(unsupported(format!(
                "task_type {} is not supported; only CAUSAL_LM is",
                told(other)
            )));
        }
    }
    match of("bias") {
        Value::Null => {}
        Value::String(bias) if bias == "none" => {}
        other => {
            return Err(unsupported(format!(
                "bias {}: trained biases are not supported; only \"none\" is",
                told(other)
            )));
        }
    }
    for key in FOREIGN {
        let is_off = match of(key) {
            Value::Null | Value::Bool(false) => true,
            Value::Array(items) => items.is_empty(),
            Value::Object(items) => items.is_empty(),
            _ => false,
        };
        if !is_off {
            return Err(unsupported(format!(
                "{key} is set: it changes the computation and is not supported"
            )));
        }
    }
    if let Value::String(init) = of("init_lora_weights")
        && let Some(kind) = CHANGED_BASE.iter().find(|k| init.to_lowercase().starts_with(*k))
    {
        return Err(unsupported(format!(
            "init_lora_weights {}: {kind} changes the base itself, so the adapter doesn't fit the base's file; save \
             it with path_initial_model_for_weight_conversion",
            quote(init)
        )));
    }
    Ok(())
}

/// A module's name and each of its suffixes after a dot: the ways to name it.
fn ends_of(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(path), |end| Some(end.split_once('.')?.1))
}

/// `rank_pattern` or `alpha_pattern`.
struct Patterns {
    key: &'static str,
    /// By name, without escapes; a name that must match in full begins with `^`.
    values: BTreeMap<String, f64>,
}

impl Patterns {
    fn read(object: &Object<String, Value>, key: &'static str) -> Result<Patterns> {
        let items = match object.get(key) {
            None | Some(Value::Null) => return Ok(Patterns { key, values: BTreeMap::new() }),
            Some(Value::Object(items)) => items,
            Some(_) => return Err(corrupt(format!("{key} is not an object"))),
        };
        let mut values = BTreeMap::new();
        for (pattern, value) in items {
            let plain = pattern.strip_prefix('^').unwrap_or(pattern).replace("\\.", ".");
            if !plain.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.') {
                return Err(unsupported(format!(
                    "{key} {}: module names and their suffixes are supported, regular expressions aren't; write \
                     the modules out",
                    quote(pattern)
                )));
            }
            let value =
                value.as_f64().ok_or_else(|| corrupt(format!("{key} {} is not a number", quote(pattern))))?;
            // A name with escapes and the same name without are one pattern.
            let before = values.insert(pattern.replace("\\.", "."), value);
            if before.is_some_and(|before| before != value) {
                let problem = format!("{key}: {} occurs twice, with different values", quote(pattern));
                return Err(unsupported(problem));
            }
        }
        Ok(Patterns { key, values })
    }

    /// What to tell of the patterns that name none of these modules, if there are any.
    fn unused(&self, modules: impl Iterator<Item = (usize, Proj)>) -> Option<String> {
        let paths: Vec<String> = modules.map(|(layer, proj)| hf_path(layer, proj)).collect();
        let mut names: HashSet<&str> = HashSet::new();
        for path in &paths {
            names.extend(ends_of(path));
        }
        let names_one = |pattern: &str| match pattern.strip_prefix('^') {
            Some(whole) => paths.iter().any(|path| path == whole),
            None => names.contains(pattern),
        };
        let mut unused = self.values.keys().filter(|pattern| !names_one(pattern));
        let first = quote(unused.next()?);
        let others = match unused.count() {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        Some(format!("{CONFIG_FILE}: {} {first}{others} name no module and are ignored", self.key))
    }

    /// The value for a module: from the pattern that equals its name or, without `^`, its suffix.
    fn of(&self, path: &str) -> Result<Option<f64>> {
        let whole = format!("^{path}");
        let mut found: Option<(&str, f64)> = None;
        for name in ends_of(path).chain([&whole[..]]) {
            let Some((pattern, value)) = self.values.get_key_value(name) else { continue };
            if let Some((other, before)) = found
                && before != *value
            {
                let (other, pattern) = (quote(other), quote(pattern));
                let problem =
                    format!("{}: {other} and {pattern} both name {path}, with different values", self.key);
                return Err(unsupported(problem));
            }
            found = Some((pattern, *value));
        }
        Ok(found.map(|(_, value)| value))
    }
}

fn number(object: &Object<String, Value>, key: &str) -> Result<Option<f64>> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(v) => v.as_f64().map(Some).ok_or_else(|| corrupt(format!("{key} is not a number"))),
    }
}

fn flag(object: &Object<String, Value>, key: &str) -> Result<bool> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(on)) => Ok(*on),
        Some(_) => Err(corrupt(format!("{key} is neither true nor false"))),
    }
}

fn text(key: &str, value: &Value) -> Result<String> {
    value
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| corrupt(format!("{key} holds something other than strings")))
}

/// A number that must be whole and within the range of any adapter.
pub(super) fn whole(key: &str, value: f64) -> Result<usize> {
    if value >= 0.0 && value <= f64::from(1 << 24) && value.fract() == 0.0 {
        return Ok(value as usize);
    }
    Err(corrupt(format!("{key} {value} is not a whole number in range")))
}

/// Writes the folder.
///
/// # Errors
/// `NonFinite` for numbers that overflow f16; `Io`.
pub fn export(
    storage: &dyn Storage,
    dir: &Path,
    exchange: &Exchange,
    model: &ModelConfig,
    precision: StoredAs,
) -> Result<()> {
    let tensors: Vec<_> = exchange.modules.iter().flat_map(|m| tensors_of(m, model)).collect();
    write(storage, dir, (TENSORS_FILE, &tensors, precision), &config_of(exchange, model))
}

/// Commits a folder of tensors and settings: tensors first, so the presence of settings means a whole adapter. Two files
/// can't be replaced in one step, so differing settings already there are removed before anything else. An interrupted
/// export then leaves a folder that is refused, never the tensors of one adapter with the settings of another.
pub(super) fn write(
    storage: &dyn Storage,
    dir: &Path,
    (file, tensors, precision): (&str, &[Tensor], StoredAs),
    config: &Value,
) -> Result<()> {
    let mut config = serde_json::to_string_pretty(config)
        .map_err(|e| Error::new(ErrorKind::Misuse, format!("{CONFIG_FILE}: {e}")))?;
    config.push('\n');
    create_dir_all(storage, dir)?;
    remove_other(storage, dir, config.as_bytes())?;
    commit(storage, dir, file, |out| safetensors::write(out, tensors, precision))?;
    commit(storage, dir, CONFIG_FILE, |out| {
        out.write_all(config.as_bytes()).map_err(|e| Error::io(format!("writing {CONFIG_FILE}"), e))
    })?;
    Ok(())
}

/// Durably removes settings that differ from these.
fn remove_other(storage: &dyn Storage, dir: &Path, config: &[u8]) -> Result<()> {
    let path = dir.join(CONFIG_FILE);
    let io = |e| Error::io(format!("replacing {}", path.display()), e);
    if storage.kind(&path).map_err(io)?.is_none() {
        return Ok(());
    }
    let mut found = Vec::new();
    let read =
        storage.open(&path).and_then(|o| o.source.take(config.len() as u64 + 1).read_to_end(&mut found));
    if read.is_ok() && found == config {
        return Ok(());
    }
    storage.remove(&path).map_err(io)?;
    storage.sync_dir(dir).map_err(io)
}

fn tensors_of(m: &Module, model: &ModelConfig) -> Vec<Tensor> {
    let (outputs, inputs) = m.proj.shape(model);
    let rows = RowOrder::of(model, m.proj);
    let path = format!("base_model.model.{}", hf_path(m.layer, m.proj));
    let mut tensors = vec![
        Tensor::of(&path, "lora_A.weight", &[m.rank, inputs], m.a.clone()),
        Tensor::of(&path, "lora_B.weight", &[outputs, m.rank], rows.to_hf(&m.b, m.rank)),
    ];
    if let Some(magnitude) = &m.magnitude {
        tensors.push(Tensor::of(&path, "lora_magnitude_vector", &[outputs], rows.to_hf(magnitude, 1)));
    }
    tensors
}

/// The settings; serde_json keeps the keys of an object sorted, as PEFT writes them.
fn config_of(exchange: &Exchange, model: &ModelConfig) -> Value {
    let modules = &exchange.modules;
    // The most common values are the defaults, so a uniform adapter has no patterns.
    let rank = commonest(modules.iter().map(|m| m.rank));
    let alpha = f32::from_bits(commonest(modules.iter().map(|m| m.alpha.to_bits())));
    let mut ranks = Object::new();
    let mut alphas = Object::new();
    for m in modules {
        let path = || hf_path(m.layer, m.proj);
        if m.rank != rank {
            ranks.insert(path(), m.rank.into());
        }
        if m.alpha.to_bits() != alpha.to_bits() {
            alphas.insert(path(), short(m.alpha));
        }
    }
    let (targets, layers) = targets_of(modules, model);
    let init = match exchange.init {
        // PEFT knows no name for it; A is in the file.
        Init::Kaiming | Init::Quiet => Value::Bool(true),
        Init::Eva => "eva".into(),
    };
    let base = Some(&exchange.base_name).filter(|name| !name.is_empty());
    json!({
        "alpha_pattern": alphas,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": init,
        "layers_pattern": null,
        "layers_to_transform": layers,
        "lora_alpha": short(alpha),
        "lora_dropout": short(exchange.dropout),
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": ranks,
        "revision": null,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": exchange.dora,
        "use_rslora": exchange.rslora,
    })
}

/// The modules as names plus layers where that describes them fully, else each by its path.
fn targets_of(modules: &[Module], model: &ModelConfig) -> (Vec<String>, Option<Vec<usize>>) {
    let layers: BTreeSet<_> = modules.iter().map(|m| m.layer).collect();
    let projs: BTreeSet<_> = modules.iter().map(|m| m.proj).collect();
    if layers.len() * projs.len() != modules.len() {
        return (modules.iter().map(|m| hf_path(m.layer, m.proj)).collect(), None);
    }
    let some = (layers.len() < model.n_layers).then(|| layers.into_iter().collect());
    (projs.iter().map(|p| p.hf_name().to_string()).collect(), some)
}

fn commonest<T: Ord + Copy + Default>(values: impl Iterator<Item = T>) -> T {
    let mut counts = BTreeMap::new();
    for v in values {
        *counts.entry(v).or_insert(0_usize) += 1;
    }
    counts.into_iter().max_by_key(|(_, n)| *n).map(|(v, _)| v).unwrap_or_default()
}

/// The shortest decimal form of an f32, an integer if whole: 0.1 rather than 0.10000000149011612.
pub(super) fn short(value: f32) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e9 {
        return (value as i64).into();
    }
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}
