//! The adapter store: what survives a crash at any operation, damage, links, and two writers.
//!
//! The crash model is harsher than journalling file systems are: of the directory operations that were
//! not synced, any prefix survives; of file contents that were not synced, nothing, all, or a torn half.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, Cursor, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use engraft_runtime::adapter::binding::PROBES;
use engraft_runtime::adapter::{ADAPTER_FILE, Adapter, Binding, Fingerprint, LoraConfig, Precision};
use engraft_runtime::error::{ErrorKind, Result};
use engraft_runtime::gate::store::{
    Candidate, ContentKind, GENERATIONS_DIR, InUse, LOCK_FILE, MANIFEST_FILE, POINTER_FILE, Store,
    VERDICT_FILE, Writer,
};
use engraft_runtime::model::chat::Message;
use engraft_runtime::model::{ModelConfig, Proj};
use engraft_runtime::rng::Rng;
use engraft_runtime::storage::{Disk, EntryKind, FileLock, Opened, Storage, StorageFile};

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

// ---------------------------------------------------------------------------------------------------
// A device that loses power

/// Which of its duties a broken device forgets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    None,
    FileSync,
    DirSync,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Dir,
    File(usize),
}

#[derive(Clone, Default)]
struct Inode {
    durable: Vec<u8>,
    seen: Vec<u8>,
}

#[derive(Clone, Debug)]
enum Change {
    Put(PathBuf, Node),
    Move(PathBuf, PathBuf),
    Drop(PathBuf),
}

type Tree = BTreeMap<PathBuf, Node>;

#[derive(Clone)]
struct State {
    inodes: Vec<Inode>,
    /// What is durable beyond doubt, and changes since with whether they are.
    base: Tree,
    changes: Vec<(PathBuf, Change, bool)>,
    /// What the running program sees.
    live: Tree,
    /// Changing calls until the power fails.
    left: usize,
    /// Whether the next failing call is the only one, and those after it go well again.
    once: bool,
    calls: usize,
    lie: Lie,
}

/// Files in memory.
#[derive(Clone)]
struct Memory(Rc<RefCell<State>>);

fn apply(tree: &mut Tree, change: &Change) {
    match change {
        Change::Put(path, node) => {
            // Without its directory an entry can't be reached.
            if path.parent().is_some_and(|p| tree.get(p) == Some(&Node::Dir)) {
                tree.insert(path.clone(), *node);
            }
        }
        Change::Move(from, to) => {
            if let Some(node) = tree.remove(from) {
                tree.insert(to.clone(), node);
            }
        }
        Change::Drop(path) => drop(tree.remove(path)),
    }
}

impl Memory {
    fn new(lie: Lie) -> Memory {
        let base = Tree::from([(PathBuf::from("/"), Node::Dir)]);
        let live = base.clone();
        Memory(Rc::new(RefCell::new(State {
            inodes: vec![],
            base,
            changes: vec![],
            live,
            left: usize::MAX,
            once: false,
            calls: 0,
            lie,
        })))
    }

    /// An own copy of everything, that fails after `left` changing calls.
    fn fork(&self, left: usize) -> Memory {
        let state = State { left, calls: 0, ..self.0.borrow().clone() };
        Memory(Rc::new(RefCell::new(state)))
    }

    fn step(&self) -> io::Result<()> {
        let mut state = self.0.borrow_mut();
        if state.left == 0 {
            if std::mem::take(&mut state.once) {
                state.left = usize::MAX;
            }
            return Err(io::Error::other("the power failed"));
        }
        state.left -= 1;
        state.calls += 1;
        Ok(())
    }

    fn change(&self, change: Change) {
        let mut state = self.0.borrow_mut();
        let path = match &change {
            Change::Put(path, _) | Change::Move(_, path) | Change::Drop(path) => path,
        };
        let dir = path.parent().unwrap().to_path_buf();
        apply(&mut state.live, &change);
        state.changes.push((dir, change, false));
    }

    fn at(&self, path: &Path) -> Option<Node> {
        self.0.borrow().live.get(path).copied()
    }

    fn calls(&self) -> usize {
        self.0.borrow().calls
    }

    /// All that may be left after the power failed now, with the power back.
    fn after_the_cut(&self) -> Vec<Memory> {
        let state = self.0.borrow();
        let unsynced = state.changes.iter().filter(|(_, _, synced)| !synced).count();
        let mut outcomes = Vec::new();
        for survivors in 0..=unsynced {
            let (mut tree, mut seen) = (state.base.clone(), 0);
            for (_, change, synced) in &state.changes {
                if *synced || seen < survivors {
                    apply(&mut tree, change);
                }
                seen += usize::from(!synced);
            }
            let torn = |inode: &Inode| {
                let half = inode.seen.len() / 2;
                [&inode.seen[..half], &vec![0; inode.seen.len() - half]].concat()
            };
            let contents: [&dyn Fn(&Inode) -> Vec<u8>; 3] =
                [&|i| i.durable.clone(), &|i| i.seen.clone(), &torn];
            let distinct = if state.inodes.iter().all(|i| i.durable == i.seen) { 1 } else { 3 };
            for content in &contents[..distinct] {
                let settle = |i: &Inode| {
                    let bytes = if i.durable == i.seen { i.seen.clone() } else { content(i) };
                    Inode { durable: bytes.clone(), seen: bytes }
                };
                outcomes.push(Memory(Rc::new(RefCell::new(State {
                    inodes: state.inodes.iter().map(settle).collect(),
                    base: tree.clone(),
                    live: tree.clone(),
                    changes: vec![],
                    left: usize::MAX,
                    once: false,
                    calls: 0,
                    lie: state.lie,
                }))));
            }
        }
        outcomes
    }
}

struct MemoryFile {
    memory: Memory,
    inode: usize,
}

impl Write for MemoryFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.memory.step()?;
        self.memory.0.borrow_mut().inodes[self.inode].seen.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl StorageFile for MemoryFile {
    fn sync(&mut self) -> io::Result<()> {
        self.memory.step()?;
        let mut state = self.memory.0.borrow_mut();
        if state.lie != Lie::FileSync {
            let inode = &mut state.inodes[self.inode];
            inode.durable = inode.seen.clone();
        }
        Ok(())
    }
}

impl Storage for Memory {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        self.step()?;
        if self.at(path).is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.0.borrow_mut().inodes.push(Inode::default());
        let inode = self.0.borrow().inodes.len() - 1;
        self.change(Change::Put(path.into(), Node::File(inode)));
        Ok(Box::new(MemoryFile { memory: self.clone(), inode }))
    }
    fn open(&self, path: &Path) -> io::Result<Opened> {
        match self.at(path) {
            Some(Node::File(inode)) => {
                let content = self.0.borrow().inodes[inode].seen.clone();
                Ok(Opened { bytes: content.len() as u64, source: Box::new(Cursor::new(content)) })
            }
            Some(Node::Dir) => Err(io::ErrorKind::InvalidInput.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step()?;
        assert_eq!(from.parent(), to.parent());
        self.change(Change::Move(from.into(), to.into()));
        Ok(())
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.step()?;
        let mut state = self.0.borrow_mut();
        if state.lie == Lie::DirSync {
            return Ok(());
        }
        state.changes.iter_mut().filter(|(of, _, _)| of == dir).for_each(|(_, _, synced)| *synced = true);
        // Nothing before them is in doubt: these can't be lost any more.
        let settled = state.changes.iter().take_while(|(_, _, synced)| *synced).count();
        let changes: Vec<_> = state.changes.drain(..settled).collect();
        changes.iter().for_each(|(_, change, _)| apply(&mut state.base, change));
        Ok(())
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        self.change(Change::Drop(path.into()));
        Ok(())
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let name = |path: &PathBuf| {
            (path.parent() == Some(dir)).then(|| path.file_name().unwrap().to_str().unwrap().to_string())
        };
        Ok(self.0.borrow().live.keys().filter_map(name).collect())
    }
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.step()?;
        if self.at(dir).is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.change(Change::Put(dir.into(), Node::Dir));
        Ok(())
    }
    fn is_dir(&self, path: &Path) -> bool {
        self.at(path) == Some(Node::Dir)
    }
    fn kind(&self, path: &Path) -> io::Result<Option<EntryKind>> {
        Ok(self.at(path).map(|n| if n == Node::Dir { EntryKind::Dir } else { EntryKind::File }))
    }
    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        self.step()?;
        assert!(self.list(dir)?.is_empty());
        self.change(Change::Drop(dir.into()));
        Ok(())
    }
    fn lock(&self, _: &Path) -> io::Result<FileLock> {
        Ok(FileLock::new(()))
    }
}

/// A change of a store, and which generation must be active before and after.
struct Case {
    name: &'static str,
    run: fn(&Store<'_>) -> Result<()>,
    before: Option<u64>,
    after: u64,
}

fn cases() -> Vec<Case> {
    let case = |name, run, before, after| Case { name, run, before, after };
    vec![
        case(
            "promote an adapter",
            |s| promote(&s.writer()?, &Candidate::Adapter(&adapter(9, BASE))).map(drop),
            Some(4),
            5,
        ),
        case("promote the base", |s| promote(&s.writer()?, &Candidate::Base).map(drop), Some(4), 5),
        case(
            "promote examples",
            |s| promote(&s.writer()?, &Candidate::FewShot(&examples())).map(drop),
            Some(4),
            5,
        ),
        case("roll back", |s| s.writer()?.rollback().map(drop), Some(4), 3),
        case("activate", |s| s.writer()?.activate(1).map(drop), Some(4), 1),
        case("prune", |s| s.writer()?.prune(1).map(drop), Some(4), 4),
    ]
}

/// What must hold of a store that may be either: it reads without a word of complaint, and what was in it
/// is unchanged.
fn check(memory: &Memory, allowed: &[Option<u64>]) -> std::result::Result<(), String> {
    let dir = Path::new("/s");
    let store = Store::open(memory, dir).map_err(|e| e.to_string())?;
    let found = store.active().map_err(|e| e.to_string())?;
    let number = found.as_ref().map(|a| a.generation.number);
    if !allowed.contains(&number) {
        return Err(format!("{number:?} is active, not one of {allowed:?}"));
    }
    let listing = store.list().map_err(|e| e.to_string())?;
    if let Some(damaged) = listing.generations.iter().find(|g| g.manifest.is_err() && !g.is_unfinished) {
        return Err(format!("told as damaged: {damaged:?}"));
    }
    let Some(active) = found else { return Ok(()) };
    // A store's first promotion has no older pointer: losing it alone is told.
    if !active.passed_over.is_empty() && allowed[0].is_some() {
        return Err(format!("{:?}", active.passed_over));
    }
    let content = store.load(&active.generation).map_err(|e| e.to_string())?;
    let expected = match number {
        Some(1) if allowed[0].is_some() => InUse::Adapter(Box::new(adapter(1, BASE))),
        Some(3) => InUse::FewShot(examples()),
        Some(4) => InUse::Base,
        _ => content.clone(),
    };
    if content != expected {
        return Err(format!("generation {number:?} holds something else"));
    }
    Ok(())
}

/// Cuts the power before every call of a change, and again before every call of the recovery. Gives how
/// many states were looked at, and what was wrong.
fn crash_everywhere(start: &Memory, case: &Case, again: bool) -> (usize, Vec<String>) {
    let (mut states, mut wrong) = (0, Vec::new());
    for k in 0.. {
        let memory = start.fork(k);
        let ended = Store::create(&memory, Path::new("/s")).and_then(|s| (case.run)(&s));
        let allowed: &[_] =
            if ended.is_ok() { &[Some(case.after)] } else { &[case.before, Some(case.after)] };
        for cut in memory.after_the_cut() {
            states += 1;
            // Before the folder exists durably, there is nothing to look at.
            if case.before.is_none() && ended.is_err() && cut.at(Path::new("/s/generations")).is_none() {
                continue;
            }
            wrong.extend(check(&cut, allowed).err().map(|e| format!("{} cut at {k}: {e}", case.name)));
            if again {
                states += recover(&cut, allowed, &mut wrong);
            }
        }
        if ended.is_ok() {
            assert!(k < 400 && memory.calls() == k, "the change ended before the power failed");
            return (states, wrong);
        }
    }
    unreachable!()
}

/// Goes on after a cut with another promotion, cut in its turn.
fn recover(after: &Memory, allowed: &[Option<u64>], wrong: &mut Vec<String>) -> usize {
    let mut states = 0;
    for k in 0.. {
        let memory = after.fork(k);
        let store = Store::open(&memory, Path::new("/s")).unwrap();
        let ended = store.writer().and_then(|w| promote(&w, &Candidate::Base));
        match ended {
            Ok(number) => {
                let listing = store.list().unwrap();
                let whole = listing.generations.iter().all(|g| g.manifest.is_ok());
                let is_active = listing.active.is_some_and(|a| a.generation.number == number);
                if !whole || !listing.unknown.is_empty() || !is_active {
                    wrong.push(format!("after recovery: {:?} {:?}", listing.generations, listing.unknown));
                }
                return states;
            }
            Err(_) => {
                let newest = store.list().ok().and_then(|l| l.generations.last().map(|g| g.number));
                let mut allowed = allowed.to_vec();
                allowed.extend([newest, newest.map(|n| n + 1)]);
                for cut in memory.after_the_cut() {
                    states += 1;
                    wrong.extend(check(&cut, &allowed).err().map(|e| format!("again, at {k}: {e}")));
                }
            }
        }
    }
    unreachable!()
}

#[test]
fn a_crash_anywhere_leaves_the_old_state_or_the_new() {
    let full = Memory::new(Lie::None);
    fill(&full, Path::new("/s"));
    let mut total = 0;
    for case in cases() {
        let (states, wrong) = crash_everywhere(&full, &case, true);
        assert!(wrong.is_empty(), "{}: {} of {states}: {}", case.name, wrong.len(), wrong[0]);
        total += states;
    }
    let first = |s: &Store<'_>| promote(&s.writer()?, &Candidate::Adapter(&adapter(1, BASE))).map(drop);
    let first = Case { name: "the first promotion", run: first, before: None, after: 1 };
    let (states, wrong) = crash_everywhere(&Memory::new(Lie::None), &first, false);
    assert!(wrong.is_empty(), "{} of {states}: {}", wrong.len(), wrong[0]);
    eprintln!("{} crash states", total + states);
    assert!(total + states > 10_000, "{total} + {states}");
}

#[test]
fn a_call_that_fails_leaves_the_old_state_or_the_new_and_no_litter() {
    let full = Memory::new(Lie::None);
    fill(&full, Path::new("/s"));
    for case in cases() {
        for k in 0.. {
            let memory = full.fork(k);
            memory.0.borrow_mut().once = true;
            let store = Store::open(&memory, Path::new("/s")).unwrap();
            let ended = (case.run)(&store);
            if memory.0.borrow().once {
                assert!(ended.is_ok(), "no call was left to fail");
                break;
            }
            let allowed =
                if ended.is_ok() { vec![Some(case.after)] } else { vec![case.before, Some(case.after)] };
            check(&memory, &allowed).unwrap_or_else(|e| panic!("{} failing at {k}: {e}", case.name));
            promote(&store.writer().unwrap(), &Candidate::Base).unwrap();
            let listing = store.list().unwrap();
            assert!(listing.unknown.is_empty(), "{} failing at {k}: {:?}", case.name, listing.unknown);
            assert!(listing.generations.iter().all(|g| g.manifest.is_ok()), "{} failing at {k}", case.name);
        }
    }
}

#[test]
fn devices_that_forget_are_caught() {
    for lie in [Lie::FileSync, Lie::DirSync] {
        // The old state is durable; the device begins to forget then.
        let full = Memory::new(Lie::None);
        fill(&full, Path::new("/s"));
        full.0.borrow_mut().lie = lie;
        let caught = cases().iter().map(|case| crash_everywhere(&full, case, false).1.len()).sum::<usize>();
        assert!(caught > 0, "{lie:?}");
    }
}

// ---------------------------------------------------------------------------------------------------
// Use and damage, on the disk

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
    unbound(1, BASE).save(&Disk, folder.path(), Precision::F32).unwrap();
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

/// Runs itself again under a umask that forbids nothing.
#[cfg(unix)]
#[test]
fn everything_is_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    if std::env::var_os("ENGRAFT_TEST_UMASK").is_none() {
        let child = std::process::Command::new("sh")
            .args(["-c", "umask 000; exec \"$0\" --exact everything_is_for_its_owner_only"])
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
