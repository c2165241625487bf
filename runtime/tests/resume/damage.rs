//! Cut, flipped, renamed and foreign files; and what a checkpoint costs the device.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::{self, Cursor, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use engraft_codec::{Element, Kind, Meta, Section, Writer};
use engraft_runtime::error::ErrorKind;
use engraft_runtime::run::checkpoint::payload_bytes;
use engraft_runtime::run::{Checkpoints, Course};
use engraft_runtime::storage::{Disk, EntryKind, FileLock, Opened, StdIo, Storage, StorageFile};
use engraft_runtime::train::AnyTrainer;

use super::{Case, PLAIN, TestResult, World, go};

/// Files in memory, to be read only: damage is tried half a million times.
#[derive(Default)]
struct Memory(RefCell<BTreeMap<PathBuf, Rc<[u8]>>>);

struct Shared(Rc<[u8]>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn unused<T>() -> io::Result<T> {
    Err(io::Error::other("reading only"))
}

impl Storage for Memory {
    fn create_new(&self, _: &Path) -> io::Result<Box<dyn StorageFile>> {
        unused()
    }
    fn open(&self, path: &Path) -> io::Result<Opened> {
        let bytes = self.0.borrow().get(path).cloned().ok_or(io::ErrorKind::NotFound)?;
        Ok(Opened { bytes: bytes.len() as u64, source: Box::new(Cursor::new(Shared(bytes))) })
    }
    fn rename(&self, _: &Path, _: &Path) -> io::Result<()> {
        unused()
    }
    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        unused()
    }
    fn remove(&self, _: &Path) -> io::Result<()> {
        unused()
    }
    fn list(&self, _: &Path) -> io::Result<Vec<String>> {
        let name = |path: &PathBuf| path.file_name().map(|n| n.to_string_lossy().into_owned());
        Ok(self.0.borrow().keys().filter_map(name).collect())
    }
    fn create_dir(&self, _: &Path) -> io::Result<()> {
        unused()
    }
    fn is_dir(&self, _: &Path) -> bool {
        true
    }
    fn kind(&self, _: &Path) -> io::Result<Option<EntryKind>> {
        unused()
    }
    fn remove_dir(&self, _: &Path) -> io::Result<()> {
        unused()
    }
    fn lock(&self, _: &Path) -> io::Result<FileLock> {
        unused()
    }
}

/// Two generations of a small run, and what restores them.
struct Damage {
    world: World,
    case: Case,
    storage: Memory,
    good: [Vec<u8>; 2],
    arm: AnyTrainer,
}

impl Damage {
    fn new() -> TestResult<Damage> {
        let (world, folder, case) = (World::new(), tempfile::tempdir()?, Case { steps: 4, ..PLAIN });
        let (mut arm, mut batches) = (world.arm(&case, 1), world.batches(&case));
        let mut course = world.course(&case, folder.path());
        let mut good = [Vec::new(), Vec::new()];
        for (step, bytes) in (1..).zip(&mut good) {
            go(&mut course, &mut arm, &mut batches, &case, step)?;
            *bytes = std::fs::read(course.save(&Disk, &arm, batches.cursor(), true)?.path)?;
        }
        assert!((64 << 10..68 << 10).contains(&good[0].len()), "{} bytes", good[0].len());
        let damage = Damage { world, case, storage: Memory::default(), good, arm };
        damage.put(1, &damage.good[0]);
        Ok(damage)
    }

    fn put(&self, generation: u64, bytes: &[u8]) {
        let path = Path::new("out").join(format!("checkpoint-{generation:08}.engraft"));
        self.storage.0.borrow_mut().insert(path, bytes.into());
    }

    /// Generation and steps of what is restored, and how many were passed over.
    fn restore(&mut self) -> engraft_runtime::Result<(Option<(u64, u64)>, usize)> {
        let checkpoints = Checkpoints::open(&self.storage, Path::new("out"))?;
        let mut course = Course::new(self.world.identity(&self.case)).kept_in(checkpoints);
        let mut batches = self.world.batches(&self.case);
        let restored = course.resume(&self.storage, &mut self.arm, &mut batches)?;
        Ok((restored.found.map(|f| (f.generation, f.steps)), restored.passed_over.len()))
    }

    /// Tries every file that `damaged` gives as the newest; how many were tried, and how many accepted.
    fn count(&mut self, damaged: impl Iterator<Item = Vec<u8>>) -> TestResult<(u64, u64)> {
        let (mut tried, mut accepted) = (0, 0);
        for bytes in damaged {
            self.put(2, &bytes);
            let restored = self.restore()?;
            accepted += u64::from(restored.0 != Some((1, 1)) || restored.1 != 1);
            tried += 1;
        }
        Ok((tried, accepted))
    }
}

fn prefixes(good: &[u8], stride: usize) -> impl Iterator<Item = Vec<u8>> {
    (0..good.len()).step_by(stride).map(|n| good[..n].to_vec())
}

fn flips(good: &[u8], stride: usize) -> impl Iterator<Item = Vec<u8>> {
    (0..8 * good.len()).step_by(stride).map(|bit| {
        let mut bytes = good.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        bytes
    })
}

fn no_damage_is_accepted(prefix_stride: usize, flip_stride: usize) -> TestResult {
    let mut damage = Damage::new()?;
    let good = damage.good[1].clone();
    let (cut, accepted) = damage.count(prefixes(&good, prefix_stride))?;
    println!("{cut} prefixes of {} bytes: {accepted} accepted, else the older generation loads", good.len());
    assert_eq!(accepted, 0);
    let (flipped, accepted) = damage.count(flips(&good, flip_stride))?;
    println!("{flipped} single-bit flips: {accepted} accepted, else the older generation loads");
    assert_eq!(accepted, 0);
    // The negative control: the undamaged file is taken.
    damage.put(2, &good);
    assert_eq!(damage.restore()?, (Some((2, 2)), 0));
    Ok(())
}

#[test]
fn damage_is_passed_over() -> TestResult {
    no_damage_is_accepted(61, 1021)
}

#[test]
#[ignore = "minutes; run: cargo test --test runtime -- --ignored --nocapture every_cut"]
fn every_cut_and_every_flipped_bit_is_passed_over() -> TestResult {
    no_damage_is_accepted(1, 1)
}

#[test]
fn foreign_files_are_passed_over_and_newer_ones_refused() -> TestResult {
    let mut damage = Damage::new()?;
    let [first, second] = damage.good.clone();
    let base = damage.world.model.digest();
    let count = damage.arm.numbers().theta.len();
    let frame = |kind, schema, generation, count: usize| -> TestResult<Vec<u8>> {
        let mut out = Vec::new();
        let meta = Meta { kind, schema, generation, base_digest: base };
        let sections = ["theta", "m", "v"].map(|n| Section::new(n, Element::F32, count as u64));
        let sections = sections.into_iter().collect::<Option<Vec<_>>>().ok_or("a name")?;
        let io = |e: engraft_codec::Error<_>| format!("{e}");
        let mut writer = Writer::begin(StdIo(&mut out), &meta, &0u8, &sections).map_err(io)?;
        for _ in 0..3 {
            writer.f32(&vec![0.0; count]).map_err(io)?;
        }
        writer.finish().map_err(io)?;
        Ok(out)
    };
    let foreign = [
        ("an older one under a newer name", first.clone()),
        ("an adapter", frame(Kind::ADAPTER, 4, 2, count)?),
        ("another header", frame(Kind::CHECKPOINT, 4, 2, count)?),
        ("no frame", b"{}".to_vec()),
        ("nothing", Vec::new()),
        ("one that lies about its length", [&second[..], b"x"].concat()),
    ];
    for (what, bytes) in foreign {
        damage.put(2, &bytes);
        assert_eq!(damage.restore()?, (Some((1, 1)), 1), "{what}");
    }
    // An older version's, and a newer one's.
    for schema in [1, 2, 3, 5] {
        damage.put(2, &frame(Kind::CHECKPOINT, schema, 2, count)?);
        let error = damage.restore().expect_err("a schema of another version");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.message().contains(&format!("schema {schema}")), "{error}");
    }
    // All damaged: nothing is found, and nothing was touched.
    damage.put(1, &second[..100]);
    damage.put(2, &second[..200]);
    let before = damage.arm.numbers().theta.to_vec();
    assert_eq!(damage.restore()?, (None, 2));
    assert_eq!(damage.arm.numbers().theta, before);
    assert!(damage.arm.numbers().whole);
    Ok(())
}

/// The disk, with its writes and syncs counted, and files that can't be read.
#[derive(Clone, Default)]
struct Counting {
    unreadable: Rc<RefCell<Vec<PathBuf>>>,
    bytes: Rc<Cell<u64>>,
    file_syncs: Rc<Cell<u64>>,
    dir_syncs: Rc<Cell<u64>>,
}

struct CountingFile(Box<dyn StorageFile>, Counting);

impl Write for CountingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.0.write(bytes)?;
        self.1.bytes.set(self.1.bytes.get() + n as u64);
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl StorageFile for CountingFile {
    fn sync(&mut self) -> io::Result<()> {
        self.1.file_syncs.set(self.1.file_syncs.get() + 1);
        self.0.sync()
    }
}

impl Storage for Counting {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        Ok(Box::new(CountingFile(Disk.create_new(path)?, self.clone())))
    }
    fn open(&self, path: &Path) -> io::Result<Opened> {
        match self.unreadable.borrow().iter().any(|p| p == path) {
            true => Err(io::Error::from(io::ErrorKind::PermissionDenied)),
            false => Disk.open(path),
        }
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Disk.rename(from, to)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.dir_syncs.set(self.dir_syncs.get() + 1);
        Disk.sync_dir(dir)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        Disk.remove(path)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        Disk.list(dir)
    }
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        Disk.create_dir(dir)
    }
    fn is_dir(&self, path: &Path) -> bool {
        Disk.is_dir(path)
    }
    fn kind(&self, path: &Path) -> io::Result<Option<EntryKind>> {
        Disk.kind(path)
    }
    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        Disk.remove_dir(dir)
    }
    fn lock(&self, path: &Path) -> io::Result<FileLock> {
        Disk.lock(path)
    }
}

/// A file that can't be read is not a damaged one: it stays, and is not begun anew for.
#[test]
fn what_can_not_be_read_now_is_not_lost() -> TestResult {
    let (world, folder, case) = (World::new(), tempfile::tempdir()?, Case { steps: 4, ..PLAIN });
    let (mut arm, mut batches) = (world.arm(&case, 1), world.batches(&case));
    let mut course = world.course(&case, folder.path());
    let mut save = || course.save(&Disk, &arm, batches.cursor(), true).map(|saved| saved.path);
    let (older, newer) = (save()?, save()?);
    let device = Counting::default();
    device.unreadable.borrow_mut().push(newer.clone());
    let mut course = world.course(&case, folder.path());
    let restored = course.resume(&device, &mut arm, &mut batches)?;
    assert_eq!(restored.found.map(|found| found.path), Some(older.clone()));
    assert!(restored.passed_over.iter().any(|p| p.path == newer), "{:?}", restored.passed_over);
    let next = course.save(&device, &arm, batches.cursor(), true)?.path;
    assert!([&older, &newer, &next].iter().all(|path| path.is_file()));
    course.roll_back(&device, &mut arm, &mut batches, "in a test")?;
    course.save(&device, &arm, batches.cursor(), true)?;
    assert!(newer.is_file() && !older.is_file());

    let left = || std::fs::read_dir(folder.path()).map(|entries| entries.flatten().map(|e| e.path()));
    let all: Vec<_> = left()?.collect();
    device.unreadable.borrow_mut().extend(all.clone());
    let mut course = world.course(&case, folder.path());
    let refused = course.resume(&device, &mut arm, &mut batches).unwrap_err();
    assert!(
        refused.kind() == ErrorKind::Io && refused.message().contains(&*newer.to_string_lossy()),
        "{refused}"
    );
    assert!(all.len() == 3 && left()?.count() == 3, "{all:?}");
    Ok(())
}

#[test]
fn a_checkpoint_wears_the_device_by_its_payload() -> TestResult {
    let (world, folder, case) = (World::new(), tempfile::tempdir()?, Case { steps: 4, ..PLAIN });
    let (arm, batches) = (world.arm(&case, 1), world.batches(&case));
    let mut course = world.course(&case, folder.path());
    for k in 0..5 {
        let counting = Counting::default();
        course.save(&counting, &arm, batches.cursor(), k % 2 == 0)?;
        let payload = payload_bytes(arm.numbers().theta.len(), arm.numbers().m.len(), false);
        let ratio = counting.bytes.get() as f64 / payload as f64;
        let syncs = (counting.file_syncs.get(), counting.dir_syncs.get());
        println!(
            "{} bytes written for a payload of {payload}: {ratio:.3}; syncs {syncs:?}",
            counting.bytes.get()
        );
        // The first one makes the folder durable, too.
        let expected = (1, if k == 0 { 2 } else { 1 });
        assert!(ratio <= 1.1 && syncs == expected, "{ratio} {syncs:?}");
    }
    #[cfg(unix)]
    for entry in std::fs::read_dir(folder.path())? {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(entry?.metadata()?.permissions().mode() & 0o777, 0o600);
    }
    Ok(())
}
