//! What the runtime writes, as workloads: adapters, exports, the store, the cache of digests.

use std::path::Path;

use engraft_runtime::adapter::binding::PROBES;
use engraft_runtime::adapter::{Adapter, Binding, Fingerprint, LoraConfig, StoredAs, gguf_file, peft};
use engraft_runtime::error::Result;
use engraft_runtime::model::digest_cache::{DigestCache, Stamp};
use engraft_runtime::model::{ModelConfig, Proj};
use engraft_runtime::rng::Rng;
use engraft_runtime::storage::remove_stray_files;

use super::device::{Device, Lie};
use super::harness::{Found, Workload};

const BASE: [u8; 32] = [7; 32];
/// What a reader finds where there is nothing, or no whole thing, and says so.
pub const NOTHING: Found = 0;

type Step = Box<dyn Fn(&Device) -> Result<()>>;

pub fn model() -> ModelConfig {
    ModelConfig {
        architecture: "llama".into(),
        vocab: 16,
        d_model: 64,
        n_layers: 4,
        n_heads: 8,
        n_kv_heads: 2,
        head_dim: 8,
        d_ff: 160,
        rope_dim: 8,
        rope_base: 1e4,
        rope_scale: 1.0,
        rms_eps: 1e-5,
        context_len: 64,
        tied: true,
    }
}

/// An adapter of some 6 KB for each layer.
pub fn adapter(seed: u64, layers: &[usize]) -> Adapter {
    let config = LoraConfig::new(&model(), 8, 16.0, 0.0, &[Proj::Q, Proj::K], layers).unwrap();
    let mut rng = Rng::new(seed, 0);
    let mut adapter = Adapter::init(&model(), &config, BASE, &mut || rng.f32()).unwrap();
    adapter.theta.iter_mut().for_each(|x| *x = rng.f32());
    let fingerprint = |nats: f32| Fingerprint([nats; PROBES]);
    let (base, adapted) = (fingerprint(2.0), fingerprint(1.5));
    adapter.binding = Some(Binding { template: [1; 32], matched: 2 * layers.len(), base, adapted });
    adapter
}

pub fn all() -> Vec<Workload> {
    let mut all = vec![first_save(), save_over(), peft_folder(), peft_again(), gguf_adapter(), digests()];
    all.extend(super::store::all());
    all.extend(super::checkpoints::all());
    all
}

/// Starts in a folder that it may have to itself.
fn tidy(folder: &'static str) -> Step {
    Box::new(move |device| match engraft_runtime::storage::Storage::is_dir(device, Path::new(folder)) {
        true => remove_stray_files(device, Path::new(folder)).map(drop),
        false => Ok(()),
    })
}

fn save(seed: u64) -> Step {
    let adapter = adapter(seed, &[0, 1, 2, 3]);
    Box::new(move |device| adapter.save(device, Path::new("/out/adapter"), StoredAs::F32).map(drop))
}

fn find_adapter(device: &Device) -> std::result::Result<Found, String> {
    let path = Path::new("/out/adapter");
    if device.files().iter().all(|(path, _)| path != "/out/adapter/adapter.engraft") {
        return Ok(NOTHING);
    }
    let loaded = Adapter::load_from(device, path).map_err(|e| e.to_string())?;
    let seeds = [1, 2, 3].into_iter();
    let known = seeds.clone().find(|seed| adapter(*seed, &[0, 1, 2, 3]) == loaded);
    known.map(|seed| seed as Found).ok_or_else(|| "another adapter is loaded".into())
}

/// Into folders that are not there yet.
fn first_save() -> Workload {
    Workload {
        name: "save an adapter",
        start: Device::new(),
        steps: vec![save(1)],
        expected: vec![NOTHING, 1],
        between: None,
        restart: tidy("/out/adapter"),
        find: Box::new(find_adapter),
    }
}

pub fn save_over() -> Workload {
    let start = Device::new();
    save(1)(&start).unwrap();
    Workload {
        name: "save an adapter over another",
        start: start.settled(Lie::None),
        steps: vec![save(2), save(3)],
        expected: vec![1, 2, 3],
        ..first_save()
    }
}

// ---------------------------------------------------------------------------------------------------
// Exports

/// What an export leaves, file by file.
fn files_of(export: &Step) -> Vec<(String, Vec<u8>)> {
    let device = Device::new();
    export(&device).unwrap();
    device.files().into_iter().map(|(path, content)| (path, content.to_vec())).collect()
}

/// The export whose files are there; nothing where one of them is absent. Temporary files aside.
fn find_export(exports: &[Vec<(String, Vec<u8>)>], device: &Device) -> std::result::Result<Found, String> {
    let there = device.files().into_iter().filter(|(path, _)| !path.ends_with(".engraft-tmp"));
    let there: Vec<_> = there.map(|(path, content)| (path, content.to_vec())).collect();
    if there.len() < exports[0].len() {
        return Ok(NOTHING);
    }
    exports.iter().position(|e| *e == there).map(|i| i + 1).ok_or_else(|| "torn, or of two exports".into())
}

fn peft_export(seed: u64, alpha: f32) -> Step {
    let mut adapter = adapter(seed, &[0, 1]);
    adapter.config.alpha = alpha;
    let exchange = adapter.to_exchange();
    Box::new(move |device| peft::export(device, Path::new("/out"), &exchange, &model(), StoredAs::F32))
}

/// Of other settings than what stands there: two files that can't be replaced in one step.
fn peft_folder() -> Workload {
    let exports = [peft_export(1, 16.0), peft_export(2, 8.0)];
    let start = Device::new();
    exports[0](&start).unwrap();
    let files: Vec<_> = exports.iter().map(files_of).collect();
    let [_, second] = exports;
    Workload {
        name: "export a PEFT folder of other settings",
        start: start.settled(Lie::None),
        steps: vec![second],
        expected: vec![1, 2],
        // Refused by every reader: the adapter it was made from is the one to export again.
        between: Some(NOTHING),
        restart: tidy("/out"),
        find: Box::new(move |device| find_export(&files, device)),
    }
}

/// Of the same settings, trained further: the old export or the new one.
fn peft_again() -> Workload {
    let exports = [peft_export(1, 16.0), peft_export(2, 16.0)];
    let files: Vec<_> = exports.iter().map(files_of).collect();
    let [_, second] = exports;
    Workload {
        name: "export a PEFT folder of the same settings",
        steps: vec![second],
        between: None,
        find: Box::new(move |device| find_export(&files, device)),
        ..peft_folder()
    }
}

fn gguf_adapter() -> Workload {
    let export = |seed| -> Step {
        let exchange = adapter(seed, &[0, 1]).to_exchange();
        let path = Path::new("/out/adapter.gguf");
        Box::new(move |d| gguf_file::export(d, path, &exchange, &model(), StoredAs::F32).map(drop))
    };
    let exports = [export(1), export(2)];
    let start = Device::new();
    exports[0](&start).unwrap();
    let files: Vec<_> = exports.iter().map(files_of).collect();
    let [_, second] = exports;
    Workload {
        name: "export a GGUF adapter",
        start: start.settled(Lie::None),
        steps: vec![second],
        expected: vec![1, 2],
        between: None,
        restart: tidy("/out"),
        find: Box::new(move |device| find_export(&files, device)),
    }
}

// ---------------------------------------------------------------------------------------------------
// The cache of digests

/// It may forget, and never says anything wrong.
fn digests() -> Workload {
    let stamp = |file: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        Stamp::of(&std::fs::metadata(path).unwrap())
    };
    let (Some(one), Some(other)) = (stamp("src/lib.rs"), stamp("Cargo.toml")) else {
        unreachable!("these tests run on systems that number their files");
    };
    let put = move |stamp: Stamp, digest: u8| -> Step {
        Box::new(move |device| {
            // Whether it is kept is for the cache to say, and never the end of what needs the digest.
            let _ = DigestCache::new("/cache").put(device, &stamp, &[digest; 32]);
            Ok(())
        })
    };
    let start = Device::new();
    put(one, 1)(&start).unwrap();
    let find = move |device: &Device| {
        let cache = DigestCache::new("/cache");
        let (one, other) = (cache.get(device, &one), cache.get(device, &other));
        let right = one.is_none_or(|d| d == [1; 32]) && other.is_none_or(|d| d == [2; 32]);
        if right { Ok(NOTHING) } else { Err(format!("{one:?} and {other:?} are taken for digests")) }
    };
    Workload {
        name: "keep a digest",
        start: start.settled(Lie::None),
        steps: vec![put(other, 2), put(one, 1)],
        expected: vec![NOTHING; 3],
        between: None,
        restart: tidy("/cache"),
        find: Box::new(find),
    }
}
