//! The adapter store on the disk: use, damage, links, and two writers. What survives a crash and a failing
//! device is in the tests called `crash`.

use std::path::Path;

use engraft_runtime::adapter::binding::PROBES;
use engraft_runtime::adapter::{ADAPTER_FILE, Adapter, Binding, Fingerprint, LoraConfig, StoredAs};
use engraft_runtime::error::{ErrorKind, Result};
use engraft_runtime::gate::store::{
    Candidate, ContentKind, GENERATIONS_DIR, InUse, LOCK_FILE, MANIFEST_FILE, POINTER_FILE, Store,
    VERDICT_FILE, Writer,
};
use engraft_runtime::model::chat::Message;
use engraft_runtime::model::{ModelConfig, Proj};
use engraft_runtime::rng::Rng;
use engraft_runtime::storage::{Disk, Storage};

const BASE: [u8; 32] = [7; 32];

fn model() -> ModelConfig {
    ModelConfig {
        architecture: "llama".into(),
        vocab: 16,
        d_model: 8,
        n_layers: 2,
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: 4,
        d_ff: 16,
        rope_dim: 4,
        rope_base: 1e4,
        rope_scale: 1.0,
        rms_eps: 1e-5,
        context_len: 64,
        tied: true,
    }
}

fn adapter(seed: u64, base: [u8; 32]) -> Adapter {
    let fingerprint = |nats: f32| Fingerprint([nats; PROBES]);
    let binding =
        Binding { template: [1; 32], matched: 1, base: fingerprint(2.0), adapted: fingerprint(1.5) };
    Adapter { binding: Some(binding), ..unbound(seed, base) }
}

fn unbound(seed: u64, base: [u8; 32]) -> Adapter {
    let config = LoraConfig::new(&model(), 2, 4.0, 0.0, &[Proj::Q], &[1]).unwrap();
    let mut rng = Rng::new(seed, 0);
    Adapter::init(&model(), &config, base, &mut || rng.f32()).unwrap()
}

fn examples() -> Vec<Message> {
    vec![Message::new("user", "the cave?"), Message::new("assistant", "the study")]
}

fn promote(writer: &Writer<'_>, candidate: &Candidate<'_>) -> Result<u64> {
    writer.promote(candidate, b"{\"verdict\":\"x\"}", (&BASE, &model()), false).map(|g| g.number)
}

/// Four generations: an adapter, another, few-shot examples, the base.
fn fill(storage: &dyn Storage, dir: &Path) {
    let store = Store::create(storage, dir).unwrap();
    let writer = store.writer().unwrap();
    assert_eq!(promote(&writer, &Candidate::Adapter(&adapter(1, BASE))).unwrap(), 1);
    assert_eq!(promote(&writer, &Candidate::Adapter(&adapter(2, BASE))).unwrap(), 2);
    assert_eq!(promote(&writer, &Candidate::FewShot(&examples())).unwrap(), 3);
    assert_eq!(promote(&writer, &Candidate::Base).unwrap(), 4);
}

fn active(storage: &dyn Storage, dir: &Path) -> Option<u64> {
    Store::open(storage, dir).unwrap().active().unwrap().map(|a| a.generation.number)
}

#[test]
fn generations_roll_back_one_by_one_and_numbers_never_return() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    fill(&Disk, &dir);
    let store = Store::open(&Disk, &dir).unwrap();
    let writer = store.writer().unwrap();
    for expected in [3, 2, 1] {
        assert_eq!(writer.rollback().unwrap().number, expected);
        assert_eq!(active(&Disk, &dir), Some(expected));
    }
    assert_eq!(writer.rollback().unwrap_err().kind(), ErrorKind::Misuse);
    // What was promoted while 1 was active leads back to 1, not to 4.
    assert_eq!(promote(&writer, &Candidate::Adapter(&adapter(5, BASE))).unwrap(), 5);
    assert_eq!(store.load(&store.verify(5).unwrap()).unwrap(), InUse::Adapter(Box::new(adapter(5, BASE))));
    let pruned = writer.prune(1).unwrap();
    assert_eq!((pruned.removed, pruned.left), (vec![2, 3, 4], vec![]));
    assert_eq!(writer.rollback().unwrap().number, 1);
    // The newest stays beside the active one; without it, its number still isn't given again.
    assert_eq!(writer.prune(1).unwrap().removed, [0_u64; 0]);
    std::fs::remove_dir_all(dir.join(GENERATIONS_DIR).join("000005")).unwrap();
    assert_eq!(promote(&writer, &Candidate::Base).unwrap(), 6);
    assert_eq!(writer.prune(0).unwrap_err().kind(), ErrorKind::Misuse);
}

#[test]
fn damage_falls_back_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    fill(&Disk, &dir);
    let store = Store::open(&Disk, &dir).unwrap();
    store.writer().unwrap().activate(2).unwrap();
    let within = |number: u64, name: &str| dir.join(format!("{GENERATIONS_DIR}/{number:06}/{name}"));
    let found = || store.active().map(|a| a.map(|a| (a.generation.number, a.passed_over.join("\n"))));

    // A truncated adapter: the generation before it.
    let bytes = std::fs::read(within(2, ADAPTER_FILE)).unwrap();
    std::fs::write(within(2, ADAPTER_FILE), &bytes[..bytes.len() - 1]).unwrap();
    let (number, why) = found().unwrap().unwrap();
    assert!(number == 1 && why.contains("000002") && why.contains(ADAPTER_FILE), "{number} {why}");
    assert_eq!(store.verify(2).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(store.writer().unwrap().activate(2).unwrap_err().kind(), ErrorKind::Corrupt);

    // A pointer that is cut: the newest that verifies.
    let pointer = std::fs::read(dir.join(POINTER_FILE)).unwrap();
    std::fs::write(dir.join(POINTER_FILE), &pointer[..pointer.len() - 2]).unwrap();
    std::fs::write(within(4, VERDICT_FILE), "other").unwrap();
    let (number, why) = found().unwrap().unwrap();
    assert!(number == 3 && why.contains("active: ") && why.contains("000004"), "{number} {why}");
    // The next change mends it.
    store.writer().unwrap().activate(3).unwrap();
    assert_eq!(found().unwrap().unwrap(), (3, String::new()));

    // One whose whole content was exchanged for another's, manifest and all, is not what was activated.
    let (theirs, ours) = (within(1, MANIFEST_FILE), within(3, MANIFEST_FILE));
    let own = std::fs::read(&ours).unwrap();
    std::fs::copy(theirs, &ours).unwrap();
    assert_eq!(found().unwrap().unwrap().0, 1);
    std::fs::write(&ours, own).unwrap();

    // Nothing whole: an error, which promoting anew mends.
    for number in [1, 3] {
        std::fs::write(within(number, VERDICT_FILE), "other").unwrap();
    }
    assert_eq!(found().unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(store.writer().unwrap().prune(1).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(promote(&store.writer().unwrap(), &Candidate::Base).unwrap(), 5);
    assert_eq!(found().unwrap().unwrap(), (5, String::new()));
    // What is damaged does not count as one of the newest.
    assert_eq!(store.writer().unwrap().prune(9).unwrap().removed, [1, 2, 3, 4]);
}

#[test]
fn one_writer_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    fill(&Disk, &dir);
    let (one, other) = (Store::open(&Disk, &dir).unwrap(), Store::open(&Disk, &dir).unwrap());
    let held = one.writer().unwrap();
    let refused = other.writer().err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert!(refused.message().contains(&dir.join(LOCK_FILE).display().to_string()), "{refused}");
    // Readers need no lock.
    assert_eq!(active(&Disk, &dir), Some(4));
    drop(held);
    assert!(other.writer().is_ok());
}

#[test]
fn another_base_is_refused_unless_forced() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::create(&Disk, folder.path()).unwrap();
    let (stranger, shape) = (adapter(1, [8; 32]), model());
    let candidate = Candidate::Adapter(&stranger);
    let refused = store.promote(&candidate, b"", (&BASE, &shape), false).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::BaseMismatch);
    assert!(store.active().unwrap().is_none() && store.list().unwrap().generations.is_empty());
    let forced = store.promote(&candidate, b"", (&BASE, &shape), true).unwrap();
    assert_eq!((forced.base, forced.content), ([8; 32], ContentKind::Adapter));
    assert_eq!(forced.check_base(&BASE).unwrap_err().kind(), ErrorKind::BaseMismatch);
    let wider = ModelConfig { d_model: 16, ..shape };
    let refused = store.promote(&candidate, b"", (&BASE, &wider), true).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::BaseMismatch);
}

#[test]
fn an_unbound_adapter_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::create(&Disk, &folder.path().join("store")).unwrap();
    unbound(1, BASE).save(&Disk, folder.path(), StoredAs::F32).unwrap();
    let loaded = Adapter::load(folder.path()).unwrap();
    for force_base in [false, true] {
        let candidate = Candidate::Adapter(&loaded);
        let refused = store.promote(&candidate, b"", (&BASE, &model()), force_base).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Misuse);
        assert!(refused.message().contains("save_bound"), "{refused}");
    }
    assert!(store.active().unwrap().is_none() && store.list().unwrap().generations.is_empty());
    // The control: with a binding it goes in, and out again.
    promote(&store.writer().unwrap(), &Candidate::Adapter(&adapter(1, BASE))).unwrap();
    assert_eq!(store.load(&store.verify(1).unwrap()).unwrap(), InUse::Adapter(Box::new(adapter(1, BASE))));
}

#[test]
fn what_is_unfinished_is_told_from_damage() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    fill(&Disk, &dir);
    let store = Store::open(&Disk, &dir).unwrap();
    let at = |number: u64| dir.join(format!("{GENERATIONS_DIR}/{number:06}"));
    let unfinished = || -> Vec<u64> {
        let listed = store.list().unwrap().generations.into_iter();
        listed
            .filter(|g| g.is_unfinished)
            .inspect(|g| assert!(g.manifest.is_err()))
            .map(|g| g.number)
            .collect()
    };
    assert_eq!(unfinished(), [0_u64; 0]);
    std::fs::create_dir(at(5)).unwrap();
    std::fs::write(at(5).join(ADAPTER_FILE), b"half of it").unwrap();
    assert_eq!(unfinished(), [5]);
    // Where the pointer can't be read it may be the one that is active, and no writer removes it.
    let pointer = std::fs::read(dir.join(POINTER_FILE)).unwrap();
    std::fs::write(dir.join(POINTER_FILE), b"{").unwrap();
    assert_eq!(unfinished(), [0_u64; 0]);
    std::fs::write(dir.join(POINTER_FILE), pointer).unwrap();
    // Nor is the one that a rollback leads to, nor one with a damaged manifest.
    for number in [2, 3] {
        std::fs::write(at(number).join(MANIFEST_FILE), b"{").unwrap();
    }
    std::fs::remove_file(at(3).join(MANIFEST_FILE)).unwrap();
    assert_eq!(unfinished(), [5]);
    drop(store.writer().unwrap());
    assert!(!at(5).exists() && at(3).exists() && at(2).exists());
    assert_eq!(unfinished(), [0_u64; 0]);
}

#[test]
fn what_is_not_ours_stays_and_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    fill(&Disk, &dir);
    let theirs = ["notes.txt", "generations/000001/mine", "generations/7", "generations/0000000"];
    for name in theirs {
        std::fs::write(dir.join(name), b"x").unwrap();
    }
    std::fs::write(dir.join(".active.1-0.engraft-tmp"), b"x").unwrap();
    std::fs::create_dir(dir.join("generations/000009")).unwrap();
    let store = Store::open(&Disk, &dir).unwrap();
    let writer = store.writer().unwrap();
    let pruned = writer.prune(1).unwrap();
    assert_eq!((pruned.removed, pruned.left), (vec![2], vec![1]));
    let mut unknown = store.list().unwrap().unknown;
    unknown.sort_unstable();
    let mut expected = theirs;
    expected.sort_unstable();
    assert_eq!(unknown, expected);
    assert!(!dir.join("generations/000009").exists(), "a promotion that did not end is cleaned up");
    drop(writer);
    let other = folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    assert_eq!(Store::open(&Disk, &other).err().unwrap().kind(), ErrorKind::Misuse);
}

#[cfg(unix)]
#[test]
fn links_are_refused() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let (dir, outside) = (folder.path().join("store"), folder.path().join("outside"));
    fill(&Disk, &dir);
    fill(&Disk, &outside);
    let store = Store::open(&Disk, &dir).unwrap();
    let replace = |name: &str| {
        let (ours, theirs) = (dir.join(name), outside.join(name));
        if ours.is_dir() { std::fs::remove_dir_all(&ours) } else { std::fs::remove_file(&ours) }.unwrap();
        symlink(theirs, ours).unwrap();
    };
    // The same bytes behind a link are not taken.
    replace("generations/000004/verdict.json");
    assert_eq!(store.verify(4).unwrap_err().kind(), ErrorKind::Corrupt);
    replace("generations/000003");
    assert_eq!(store.verify(3).unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(store.list().unwrap().unknown.contains(&"generations/000003".to_string()));
    replace(POINTER_FILE);
    assert_eq!(active(&Disk, &dir), Some(2));
    // Written over, not through; and no number that a link is called by.
    let before = std::fs::read(outside.join(POINTER_FILE)).unwrap();
    symlink(&outside, dir.join("generations/000005")).unwrap();
    assert_eq!(promote(&store.writer().unwrap(), &Candidate::Base).unwrap(), 6);
    assert_eq!(std::fs::read(outside.join(POINTER_FILE)).unwrap(), before);
    store.writer().unwrap().prune(1).unwrap();
    assert_eq!(Store::open(&Disk, &outside).unwrap().list().unwrap().generations.len(), 4);
    replace(LOCK_FILE);
    assert_eq!(store.writer().err().unwrap().kind(), ErrorKind::Corrupt);
    std::fs::remove_dir_all(dir.join(GENERATIONS_DIR)).unwrap();
    symlink(outside.join(GENERATIONS_DIR), dir.join(GENERATIONS_DIR)).unwrap();
    assert_eq!(Store::open(&Disk, &dir).err().unwrap().kind(), ErrorKind::Corrupt);
}

/// Runs itself again under a umask that forbids nothing; by the emulator, if that is what runs it.
#[cfg(unix)]
#[test]
fn everything_is_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    if std::env::var_os("ENGRAFT_TEST_UMASK").is_none() {
        let child = std::process::Command::new("sh")
            .args([
                "-c",
                "umask 000; exec $ENGRAFT_TEST_EMULATOR \"$0\" --exact store::everything_is_for_its_owner_only",
            ])
            .arg(std::env::current_exe().unwrap())
            .env("ENGRAFT_TEST_UMASK", "1")
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && told.contains("1 passed"), "{told}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    fill(&Disk, &dir);
    let (mut waiting, mut seen) = (vec![dir], 0);
    while let Some(path) = waiting.pop() {
        let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, if path.is_dir() { 0o700 } else { 0o600 }, "{}", path.display());
        seen += 1;
        if path.is_dir() {
            waiting.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
    }
    assert_eq!(seen, 4 + 4 + 3 + 3 + 3 + 2);
}

#[test]
fn what_was_only_tried_is_kept_and_never_active() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    let store = Store::create(&Disk, &dir).unwrap();
    let writer = store.writer().unwrap();
    let tried = |seed: u64, keep: usize| {
        let kept =
            writer.keep_tried(&adapter(seed, BASE), b"{\"decision\":\"KEEP_BASE\"}", (&BASE, &model()), keep);
        kept.unwrap().map(|generation| generation.number)
    };
    let numbers = || -> Vec<u64> { store.list().unwrap().generations.iter().map(|g| g.number).collect() };
    // Of a store with nothing else in it, too.
    assert_eq!((tried(1, 2), active(&Disk, &dir)), (Some(1), None));
    assert_eq!(promote(&writer, &Candidate::Adapter(&adapter(2, BASE))).unwrap(), 2);
    assert_eq!(store.generation(2).unwrap().previous, None);
    assert_eq!((tried(3, 2), tried(4, 2), active(&Disk, &dir)), (Some(3), Some(4), Some(2)));
    // The oldest make room, and only of their kind.
    assert_eq!(numbers(), [2, 3, 4]);
    assert_eq!(store.load(&store.verify(4).unwrap()).unwrap(), InUse::Adapter(Box::new(adapter(4, BASE))));
    let refused = writer.activate(4).unwrap_err();
    assert!(refused.kind() == ErrorKind::Misuse && refused.message().contains("tried"), "{refused}");
    // Damage never leads to one, though it is newer than what is left.
    std::fs::write(dir.join(POINTER_FILE), "x").unwrap();
    assert_eq!(active(&Disk, &dir), Some(2));
    // Nor does it count as one of the newest that stay.
    assert_eq!(promote(&writer, &Candidate::Adapter(&adapter(5, BASE))).unwrap(), 5);
    assert_eq!(writer.prune(2).unwrap().removed, [3, 4]);
    assert_eq!((tried(6, 1), tried(7, 0), numbers()), (Some(6), None, vec![2, 5]));
    // It needs what every promotion needs.
    let unbound = writer.keep_tried(&unbound(8, BASE), b"{}", (&BASE, &model()), 1);
    assert_eq!(unbound.unwrap_err().kind(), ErrorKind::Misuse);
}
