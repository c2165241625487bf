//! `adapter.engraft`: what was saved is what is loaded, and anything else is refused by kind.

use std::fs;
use std::path::Path;

use engraft_codec::embedded_io::{ErrorKind as IoKind, ErrorType, Write};
use engraft_codec::{Element, Kind, Meta, Section, Writer};
use engraft_runtime::adapter::{
    ADAPTER_FILE, Adapter, BaseIdentity, Binding, Fingerprint, Layout, LoraConfig, Override, StoredAs,
    TrainedWith,
};
use engraft_runtime::model::usage::{Prompting, Usage};
use engraft_runtime::model::{ModelConfig, Proj};
use engraft_runtime::storage::{Disk, Storage};
use engraft_runtime::{Advice, ErrorKind};

fn model(d_model: usize, n_layers: usize) -> ModelConfig {
    ModelConfig {
        architecture: "llama".into(),
        vocab: 100,
        d_model,
        n_layers,
        n_heads: 3,
        n_kv_heads: 1,
        head_dim: d_model / 3,
        d_ff: d_model * 2,
        rope_dim: d_model / 3,
        rope_base: 10_000.0,
        rope_scale: 1.0,
        rms_eps: 1e-5,
        context_len: 128,
        tied: true,
    }
}

/// Uniform numbers in [0, 1) of a small generator.
fn uniform(mut state: u64) -> impl FnMut() -> f32 {
    move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    }
}

fn adapter() -> Adapter {
    let model = model(12, 4);
    let config = LoraConfig::new(&model, 2, 8.0, 0.05, &[Proj::V, Proj::Q, Proj::Down], &[3, 1, 3]).unwrap();
    let mut adapter = Adapter::init(&model, &config, [7; 32], &mut uniform(1)).unwrap();
    let mut b = uniform(2);
    for (_, _, slot) in adapter.layout.clone().slots() {
        adapter.theta[slot.b].fill_with(|| b() - 0.5);
    }
    adapter.meta.base_name = "toy".into();
    adapter.meta.steps = 300;
    adapter.meta.valid_loss_after = Some(1.25);
    adapter.meta.usage = Usage { prompting: Prompting::Chat(Some("Be brief.".into())), greedy: true };
    adapter
}

fn save(adapter: &Adapter, dir: &Path, precision: StoredAs) -> Vec<u8> {
    let committed = adapter.save(&Disk, dir, precision).unwrap();
    let bytes = fs::read(&committed.path).unwrap();
    assert_eq!(bytes.len() as u64, committed.bytes);
    bytes
}

fn load_bytes(dir: &Path, bytes: &[u8]) -> Result<Adapter, engraft_runtime::Error> {
    let path = dir.join("candidate");
    fs::write(&path, bytes).unwrap();
    Adapter::load(&path)
}

#[test]
fn f32_round_trips_exactly_from_file_and_directory() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = adapter();
    save(&adapter, dir.path(), StoredAs::F32);
    assert_eq!(Adapter::load(dir.path()).unwrap(), adapter);
    assert_eq!(Adapter::load(&dir.path().join(ADAPTER_FILE)).unwrap(), adapter);
    assert_eq!(Disk.list(dir.path()).unwrap(), [ADAPTER_FILE]);
}

#[test]
fn f16_round_trips_to_its_rounding() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = adapter();
    save(&adapter, dir.path(), StoredAs::F16);
    let loaded = Adapter::load(dir.path()).unwrap();
    assert_eq!(loaded.config, adapter.config);
    assert_eq!((&loaded.layout, &loaded.base), (&adapter.layout, &adapter.base));
    assert_eq!(loaded.theta.len(), adapter.theta.len());
    for (a, b) in adapter.theta.iter().zip(&loaded.theta) {
        assert!((a - b).abs() <= a.abs() / 2048.0 + 6e-8, "{a} {b}");
    }
}

#[test]
fn f16_in_a_file_is_what_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let forged = Forged { f16: true, ..Forged::default() };
    let loaded = load_bytes(dir.path(), &forged.bytes()).unwrap();
    assert_eq!((loaded.config.rank, loaded.binding, loaded.theta), (2, None, forged.theta));
}

#[test]
fn a_binding_round_trips_and_its_nonsense_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (base, adapted) = (Fingerprint([1.5; 8]), Fingerprint([-0.25; 8]));
    let bound = Binding { template: [9; 32], matched: 6, base, adapted };
    let mut adapter = adapter();
    adapter.save_bound(&Disk, dir.path(), StoredAs::F32, &bound).unwrap();
    adapter.binding = Some(bound);
    assert_eq!(Adapter::load(dir.path()).unwrap(), adapter);
    save(&adapter, dir.path(), StoredAs::F16);
    assert_eq!(Adapter::load(dir.path()).unwrap().binding, adapter.binding);
    for (what, wrong) in [
        ("7 of its 6", Binding { matched: 7, ..bound }),
        ("0 of its 6", Binding { matched: 0, ..bound }),
        ("NaN", Binding { adapted: Fingerprint([f32::NAN; 8]), ..bound }),
        ("infinity", Binding { base: Fingerprint([f32::INFINITY; 8]), ..bound }),
    ] {
        adapter.save_bound(&Disk, dir.path(), StoredAs::F32, &wrong).unwrap();
        let error = Adapter::load(dir.path()).expect_err(what);
        assert!(error.kind() == ErrorKind::Corrupt && error.message().contains(what), "{error}");
    }
}

#[test]
fn rounding_first_stores_exactly_what_was_rounded() {
    let dir = tempfile::tempdir().unwrap();
    let mut adapter = varied(true);
    let before = adapter.theta.clone();
    adapter.round_to(StoredAs::F32).unwrap();
    assert_eq!(adapter.theta, before);
    adapter.round_to(StoredAs::F16).unwrap();
    assert_ne!(adapter.theta, before);
    save(&adapter, dir.path(), StoredAs::F16);
    assert_eq!(Adapter::load(dir.path()).unwrap(), adapter);
}

/// Every kind of setting.
fn varied(dora: bool) -> Adapter {
    let model = model(12, 4);
    let plain = LoraConfig::new(&model, 2, 8.0, 0.0, &[Proj::Q, Proj::Down], &[1, 3]).unwrap();
    let of = |layer, proj, rank, alpha| Override { layer, proj, rank, alpha };
    let overrides = vec![
        of(Some(3), Proj::Q, Some(5), None),
        of(None, Proj::Down, Some(3), None),
        of(None, Proj::Down, None, Some(9.0)),
    ];
    let config = LoraConfig { rslora: true, dora, overrides, ..plain }.checked(&model).unwrap();
    assert_eq!(config.overrides.len(), 2, "one place, one override");
    let layout = Layout::new(&model, &config);
    let mut number = uniform(9);
    let theta = (0..layout.len()).map(|_| number() - 0.5).collect();
    let base = BaseIdentity::new([7; 32], &model);
    Adapter { config, layout, theta, base, meta: TrainedWith::default(), binding: None }
}

#[test]
fn ranks_alphas_rslora_and_magnitudes_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    for dora in [false, true] {
        let adapter = varied(dora);
        save(&adapter, dir.path(), StoredAs::F32);
        assert_eq!(Adapter::load(dir.path()).unwrap(), adapter);
        save(&adapter, dir.path(), StoredAs::F16);
        let loaded = Adapter::load(dir.path()).unwrap();
        assert_eq!((&loaded.config, &loaded.layout), (&adapter.config, &adapter.layout));
        let (mut rounded, mut rows) = (0, 0);
        for (_, _, slot) in adapter.layout.slots() {
            assert_eq!(loaded.theta[slot.m.clone()], adapter.theta[slot.m.clone()], "magnitudes stay f32");
            rows += slot.m.len();
            rounded += slot.a.filter(|i| loaded.theta[*i] != adapter.theta[*i]).count();
        }
        assert!(rounded > 0);
        assert_eq!(rows, if dora { 2 * (12 + 12) } else { 0 });
    }
}

#[test]
fn each_projection_has_its_rank_and_multiplier() {
    let config = varied(false).config;
    let of = |layer, proj| (config.rank_of(layer, proj), config.alpha_of(layer, proj));
    assert_eq!([of(1, Proj::Q), of(3, Proj::Q)], [(2, 8.0), (5, 8.0)]);
    assert_eq!([of(1, Proj::Down), of(3, Proj::Down)], [(3, 9.0); 2]);
    assert_eq!(config.scale_of(3, Proj::Q), 8.0 / 5f32.sqrt());
    assert_eq!((config.scale(), config.rank_max()), (8.0 / 2f32.sqrt(), 5));
    let cases: Vec<_> = config.cases().into_iter().map(|c| (c.rank, c.alpha, c.members.len())).collect();
    assert_eq!(cases, [(2, 8.0, 1), (3, 9.0, 2), (5, 8.0, 1)]);
    let layout = Layout::new(&model(12, 4), &config);
    assert_eq!((layout.block(1), layout.block(3)), (Some(0..156), Some(156..156 + 228)));
    assert_eq!(layout.slot(3, Proj::Down).unwrap().a, 156 + 120..156 + 192);
    let rows: Vec<_> = layout.slots().map(|(_, _, s)| s.rows()).collect();
    assert_eq!(rows, [0..12, 12..24, 24..36, 36..48]);
}

#[test]
fn overrides_that_reach_nothing_or_contradict_are_misuse() {
    let model = model(12, 4);
    let plain = LoraConfig::new(&model, 2, 8.0, 0.0, &[Proj::Q], &[1, 3]).unwrap();
    let of = |layer, proj, rank, alpha| Override { layer, proj, rank, alpha };
    let q = |rank| of(None, Proj::Q, Some(rank), None);
    for (what, overrides) in [
        ("not adapted", vec![of(None, Proj::K, Some(4), None)]),
        ("not an adapted layer", vec![of(Some(2), Proj::Q, Some(4), None)]),
        ("rank 0", vec![q(0)]),
        ("rank 257", vec![q(257)]),
        ("alpha", vec![of(None, Proj::Q, None, Some(f32::NAN))]),
        ("nothing", vec![of(None, Proj::Q, None, None)]),
        ("two ranks", vec![q(3), q(4)]),
    ] {
        let error = LoraConfig { overrides, ..plain.clone() }.checked(&model).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Misuse, "{what}: {error}");
        assert!(error.message().contains("_proj"), "{what}: {error}");
    }
    assert!(LoraConfig { overrides: vec![q(256)], ..plain }.checked(&model).is_ok(), "positive control");
}

#[test]
fn initial_values_follow_the_formula() {
    let model = model(12, 4);
    let config = LoraConfig::new(&model, 4, 8.0, 0.0, &Proj::ALL, &[0, 1, 2, 3]).unwrap();
    assert_eq!(config.scale(), 2.0);
    let adapter = Adapter::init(&model, &config, [7; 32], &mut uniform(3)).unwrap();
    let mut largest = 0.0_f32;
    for (_, proj, slot) in adapter.layout.slots() {
        let bound = 1.0 / (proj.shape(&model).1 as f32).sqrt();
        assert!(adapter.theta[slot.b].iter().all(|b| *b == 0.0));
        for a in &adapter.theta[slot.a] {
            largest = largest.max(a.abs() / bound);
        }
    }
    assert!(largest > 0.98 && largest <= 1.0, "{largest}");
}

#[test]
fn layout_is_layers_then_projections_then_a_then_b() {
    let model = model(12, 4);
    let config = LoraConfig::new(&model, 2, 8.0, 0.0, &[Proj::Down, Proj::K], &[3, 1]).unwrap();
    let layout = Layout::new(&model, &config);
    // K: in 12, out 4; Down: in 24, out 12.
    assert_eq!(layout.block(1), Some(0..2 * (12 + 4) + 2 * (24 + 12)));
    assert_eq!((layout.len(), layout.block(0), layout.block(3)), (208, None, Some(104..208)));
    let slot = layout.slot(3, Proj::Down).unwrap();
    assert_eq!((slot.a, slot.b, slot.inputs, slot.outputs), (136..184, 184..208, 24, 12));
    assert_eq!(layout.slot(3, Proj::Q), None);
    let mut next = 0;
    for (layer, proj, slot) in layout.slots() {
        assert_eq!(layout.slot(layer, proj), Some(slot.clone()));
        assert_eq!((slot.a.start, slot.a.end), (next, slot.b.start));
        next = slot.b.end;
    }
    assert_eq!(next, layout.len());
}

#[test]
fn settings_out_of_range_are_misuse() {
    let model = model(12, 4);
    let q = [Proj::Q];
    let kind = |rank, alpha, dropout, targets: &[Proj], layers: &[usize]| {
        LoraConfig::new(&model, rank, alpha, dropout, targets, layers).map_err(|e| e.kind()).err()
    };
    assert_eq!(kind(256, 1.0, 0.0, &q, &[0]), None);
    for (rank, alpha, dropout) in
        [(0, 1.0, 0.0), (257, 1.0, 0.0), (8, 0.0, 0.0), (8, f32::NAN, 0.0), (8, 1.0, 1.0), (8, 1.0, f32::NAN)]
    {
        assert_eq!(kind(rank, alpha, dropout, &q, &[0]), Some(ErrorKind::Misuse), "{rank} {alpha} {dropout}");
    }
    assert_eq!(kind(8, 1.0, 0.0, &[], &[0]), Some(ErrorKind::Misuse));
    assert_eq!(kind(8, 1.0, 0.0, &q, &[]), Some(ErrorKind::Misuse));
    assert_eq!(kind(8, 1.0, 0.0, &q, &[4]), Some(ErrorKind::Misuse));
}

#[test]
fn every_cut_and_a_flip_in_every_byte_is_corrupt() {
    let dir = tempfile::tempdir().unwrap();
    let good = save(&adapter(), dir.path(), StoredAs::F16);
    assert!(load_bytes(dir.path(), &good).is_ok());
    for at in 0..good.len() {
        let cut = load_bytes(dir.path(), &good[..at]).unwrap_err();
        assert_eq!(cut.kind(), ErrorKind::Corrupt, "cut to {at}: {cut}");
        let mut flipped = good.clone();
        flipped[at] ^= 1 << (at % 8);
        let error = load_bytes(dir.path(), &flipped).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "flip in {at}: {error}");
        assert!(error.message().contains("candidate"), "{error}");
    }
}

#[test]
fn foreign_and_missing_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(load_bytes(dir.path(), b"GGUF and more").unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(load_bytes(dir.path(), b"").unwrap_err().kind(), ErrorKind::Corrupt);
    let missing = Adapter::load(dir.path()).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::Io);
    assert!(missing.message().contains(ADAPTER_FILE), "{missing}");
}

#[test]
fn another_base_is_refused_with_both_digests() {
    let adapter = adapter();
    let here = model(12, 4);
    adapter.check_base(&[7; 32], &here).unwrap();
    let error = adapter.check_base(&[0xab; 32], &here).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BaseMismatch);
    for part in ["070707070707", "abababababab", "toy"] {
        assert!(error.message().contains(part), "{error}");
    }
    assert_eq!(error.advice(), Some(&Advice::OwnBase));
    for other in [model(12, 5), model(24, 4), ModelConfig { d_ff: 30, ..model(12, 4) }] {
        let error = adapter.check_base(&[7; 32], &other).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BaseMismatch, "{error}");
    }
}

#[test]
fn nonfinite_parameters_are_never_saved() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let dir = tempfile::tempdir().unwrap();
        let mut adapter = adapter();
        adapter.theta[17] = bad;
        let error = adapter.save(&Disk, dir.path(), StoredAs::F32).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NonFinite);
        assert!(error.message().contains("17"), "{error}");
        assert!(Disk.list(dir.path()).unwrap().is_empty());
    }
    let dir = tempfile::tempdir().unwrap();
    let mut large = adapter();
    large.theta[0] = 1e6;
    assert_eq!(large.save(&Disk, dir.path(), StoredAs::F16).unwrap_err().kind(), ErrorKind::NonFinite);
    assert_eq!(large.round_to(StoredAs::F16).unwrap_err().kind(), ErrorKind::NonFinite);
    large.save(&Disk, dir.path(), StoredAs::F32).unwrap();
}

#[test]
fn contradicting_parts_are_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    let spoil: [fn(&mut Adapter); 4] = [
        |a| a.theta.truncate(5),
        |a| a.config.rank = 3,
        |a| a.config.targets[1] = Proj::K,
        |a| a.base.digest = [0; 32],
    ];
    for edit in spoil {
        let mut adapter = adapter();
        edit(&mut adapter);
        assert_eq!(adapter.save(&Disk, dir.path(), StoredAs::F32).unwrap_err().kind(), ErrorKind::Misuse);
    }
}

/// Frames with right checksums and wrong content: only validation stands in their way.
#[test]
fn whole_frames_with_wrong_content_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let good = Forged::default();
    // A positive control, of the version before: it says nothing of usage.
    assert_eq!(load_bytes(dir.path(), &good.bytes()).unwrap().meta.usage, Usage::default());
    type Edit = fn(&mut Forged);
    let wrong: [(&str, Edit); 15] = [
        ("NaN", |f| f.theta[3] = f32::NAN),
        ("infinity", |f| f.theta[3] = f32::INFINITY),
        ("too few", |f| f.theta.truncate(47)),
        ("parameters of another rank", |f| f.theta.resize(72, 0.5)),
        ("another rank than its parameters", |f| f.rank = 3),
        ("no digest", |f| f.meta.base_digest = [0; 32]),
        ("checkpoint", |f| f.meta.kind = Kind::CHECKPOINT),
        ("rank 0", |f| f.rank = 0),
        ("rank 257", |f| f.rank = 257),
        ("alpha", |f| f.alpha = f32::NAN),
        ("unknown projection", |f| f.targets[0].0 = 7),
        ("zero shape", |f| f.targets[0].1 = 0),
        ("huge shape", |f| f.targets[0].1 = u32::MAX),
        ("layer beyond the model", |f| f.layers[0] = 4),
        ("layer twice", |f| f.layers.push(1)),
    ];
    for (what, edit) in wrong {
        let mut forged = Forged::default();
        edit(&mut forged);
        let error = load_bytes(dir.path(), &forged.bytes()).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
    }
    for (schema, remedy) in [(3, "again"), (6, "update")] {
        let other = Forged { meta: Meta { schema, ..good.meta }, ..Forged::default() };
        let error = load_bytes(dir.path(), &other.bytes()).unwrap_err();
        assert!(error.kind() == ErrorKind::Unsupported && error.message().contains(remedy), "{error}");
    }
}

/// An adapter file written past the runtime's own checks: rank 2 on q (12 × 12) of layer 1 of 4.
struct Forged {
    meta: Meta,
    rank: u32,
    alpha: f32,
    targets: Vec<(u8, u32, u32)>,
    layers: Vec<u32>,
    theta: Vec<f32>,
    /// Whether theta is stored in f16.
    f16: bool,
}

impl Default for Forged {
    fn default() -> Self {
        let meta = Meta { kind: Kind::ADAPTER, schema: 4, generation: 0, base_digest: [7; 32] };
        let targets = vec![(0, 12, 12)];
        Forged { meta, rank: 2, alpha: 8.0, targets, layers: vec![1], theta: vec![0.5; 48], f16: false }
    }
}

impl Forged {
    /// The header is a tuple of the file's own fields: postcard encodes it like the struct.
    fn bytes(&self) -> Vec<u8> {
        let model = ("llama", 12u32, 4u32, 100u32);
        let lora = (self.rank, self.alpha, 0.0f32, &self.targets, &self.layers);
        let trained = ("toy", 1u64, 2u64, 3u64, None::<f32>, None::<f32>);
        let section = |name, element, count: usize| Section::new(name, element, count as u64).unwrap();
        let element = if self.f16 { Element::F16 } else { Element::F32 };
        let sections = [section("theta", element, self.theta.len())];
        let variant = (false, false, 0_u8);
        let header = ((model, lora, trained), variant, None::<u8>);
        let mut writer = Writer::begin(Bytes(Vec::new()), &self.meta, &header, &sections).unwrap();
        match self.f16 {
            // 0.5, which is all that these tests store so.
            true => writer.f16_bits(&vec![0x3800; self.theta.len()]).unwrap(),
            false => writer.f32(&self.theta).unwrap(),
        }
        writer.finish().unwrap().0
    }
}

struct Bytes(Vec<u8>);

impl ErrorType for Bytes {
    type Error = IoKind;
}

impl Write for Bytes {
    fn write(&mut self, bytes: &[u8]) -> Result<usize, IoKind> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<(), IoKind> {
        Ok(())
    }
}

#[test]
fn zeros_signs_and_extremes_come_back_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let mut adapter = adapter();
    let extremes = [0.0, -0.0, 65504.0, -65504.0, 6.1e-5, 5.960_464_5e-8, -5.960_464_5e-8, 1e-12];
    adapter.theta.iter_mut().zip(extremes.iter().cycle()).for_each(|(t, v)| *t = *v);
    adapter.round_to(StoredAs::F16).unwrap();
    save(&adapter, dir.path(), StoredAs::F16);
    let bits = |theta: &[f32]| theta.iter().map(|t| t.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&Adapter::load(dir.path()).unwrap().theta), bits(&adapter.theta));
}

#[cfg(unix)]
#[test]
fn files_and_directories_are_the_owners_only() {
    use std::os::unix::fs::PermissionsExt;
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("adapters/mine");
    save(&adapter(), &dir, StoredAs::F32);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&dir), mode(&dir.join(ADAPTER_FILE))), (0o700, 0o600));
}
