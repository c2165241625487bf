//! A device in memory that loses power and that fails.
//!
//! **What a power cut leaves.** A file's pages of 4 KiB are durable once the file was synced. Of pages
//! written since, any subset survives; within a page, any subset of its sectors of 512 bytes, and of one of
//! them a prefix of its bytes. A file that grew is as long as before, as long as written, or anything
//! between; what of its new length holds no surviving page is zeros or garbage.
//!
//! A directory's entries are durable once the directory was synced; syncing a file does not keep its name.
//! Of operations since, any prefix survives, in each directory apart: journals and logs of file systems
//! commit a directory's operations in their order, but nothing orders those of two directories, nor names
//! and the contents of files. So a rename may survive whose file's content did not.
//!
//! **What a failing device does.** The k-th call that a fault applies to fails, alone or with all after it.
//! A file whose sync failed must never be synced again: doing so panics here.

mod handles;

use std::cell::{Ref, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Cursor, Read, Seek, SeekFrom, Write};
use std::path::{Component, Path};
use std::rc::Rc;

use engraft_runtime::rng::Rng;
use engraft_runtime::storage::{EntryKind, FileLock, Opened, Storage, StorageFile};

const PAGE: usize = 4096;
const SECTOR: usize = 512;

/// Which of its duties a broken device forgets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    None,
    FileSync,
    DirSync,
}

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// EIO, of any call.
    Broken,
    /// ENOSPC, of calls that may take room.
    Full,
    /// EINTR, of any call.
    Interrupted,
    /// A read or write of half the bytes; no error.
    Short,
    /// EIO of a sync, of a file or a directory.
    Unsynced,
}

impl Fault {
    pub const ALL: [Fault; 5] =
        [Fault::Broken, Fault::Full, Fault::Interrupted, Fault::Short, Fault::Unsynced];

    fn applies(self, call: Call) -> bool {
        match self {
            Fault::Broken | Fault::Interrupted => true,
            Fault::Full => matches!(
                call,
                Call::Create
                    | Call::Write
                    | Call::Sync
                    | Call::Rename
                    | Call::SyncDir
                    | Call::CreateDir
                    | Call::Lock
            ),
            Fault::Short => matches!(call, Call::Read | Call::Write),
            Fault::Unsynced => matches!(call, Call::Sync | Call::SyncDir),
        }
    }

    fn error(self) -> Option<io::Error> {
        match self {
            Fault::Broken | Fault::Unsynced => Some(io::Error::other("injected: input/output error")),
            Fault::Full => Some(io::ErrorKind::StorageFull.into()),
            Fault::Interrupted => Some(io::ErrorKind::Interrupted.into()),
            Fault::Short => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Create,
    Write,
    Sync,
    Rename,
    SyncDir,
    Remove,
    CreateDir,
    RemoveDir,
    Lock,
    Open,
    Read,
    List,
    Kind,
}

impl Call {
    /// Whether the call can change what a power cut leaves.
    fn changes(self) -> bool {
        !matches!(self, Call::Open | Call::Read | Call::List | Call::Kind)
    }
}

#[derive(Clone, Default)]
struct FileNode {
    durable: Rc<Vec<u8>>,
    seen: Rc<Vec<u8>>,
    dirty: BTreeSet<usize>,
    /// Its sync failed.
    is_abandoned: bool,
}

#[derive(Clone, Default)]
struct DirNode {
    durable: BTreeMap<String, usize>,
    seen: BTreeMap<String, usize>,
    unsynced: Vec<Change>,
}

#[derive(Clone)]
enum Node {
    File(FileNode),
    Dir(DirNode),
}

/// An operation on a directory.
#[derive(Clone)]
enum Change {
    Link(String, usize),
    Unlink(String),
    Rename(String, String),
}

impl Change {
    fn apply(&self, entries: &mut BTreeMap<String, usize>) {
        match self {
            Change::Link(name, node) => drop(entries.insert(name.clone(), *node)),
            Change::Unlink(name) => drop(entries.remove(name)),
            Change::Rename(from, to) => {
                if let Some(node) = entries.remove(from) {
                    entries.insert(to.clone(), node);
                }
            }
        }
    }
}

#[derive(Clone)]
struct State {
    /// The root is the first.
    nodes: Vec<Node>,
    /// Changing calls until the power fails, and those that were.
    left: usize,
    changes: usize,
    is_off: bool,
    /// What fails, after how many calls that it applies to, and whether all after it do.
    fault: Option<(Fault, usize, bool)>,
    has_failed: bool,
    lie: Lie,
}

/// Files in memory. A clone is the same device.
#[derive(Clone)]
pub struct Device(Rc<RefCell<State>>);

impl Device {
    pub fn new() -> Device {
        Device::of(vec![Node::Dir(DirNode::default())], Lie::None)
    }

    fn of(nodes: Vec<Node>, lie: Lie) -> Device {
        let state =
            State { nodes, left: usize::MAX, changes: 0, is_off: false, fault: None, has_failed: false, lie };
        Device(Rc::new(RefCell::new(state)))
    }

    /// Another device with the same content, whose power fails after `left` changing calls.
    pub fn fork(&self, left: usize) -> Device {
        let state = State { left, changes: 0, is_off: false, ..self.0.borrow().clone() };
        Device(Rc::new(RefCell::new(state)))
    }

    /// The same content, all of it durable.
    pub fn settled(&self, lie: Lie) -> Device {
        let device = self.rebuilt(&|_, dir| dir.seen.clone(), &mut |file| file.seen.clone());
        device.0.borrow_mut().lie = lie;
        device
    }

    /// Whether both are the same device.
    pub fn is(&self, other: &Device) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }

    /// Whether a call met the end of the power.
    pub fn is_off(&self) -> bool {
        self.0.borrow().is_off
    }

    /// From now on the `at`-th call fails that the fault applies to, with `lasting` also those after it.
    pub fn fail(&self, fault: Fault, at: usize, lasting: bool) {
        let mut state = self.0.borrow_mut();
        (state.fault, state.has_failed) = (Some((fault, at, lasting)), false);
    }

    /// Ends the fault: whether it ever came.
    pub fn mend(&self) -> bool {
        let mut state = self.0.borrow_mut();
        state.fault = None;
        state.has_failed
    }

    /// Every file's path and content.
    pub fn files(&self) -> Vec<(String, Rc<Vec<u8>>)> {
        let (mut waiting, mut found) = (vec![(String::new(), 0)], Vec::new());
        while let Some((path, id)) = waiting.pop() {
            match &self.0.borrow().nodes[id] {
                Node::File(file) => found.push((path, file.seen.clone())),
                Node::Dir(dir) => {
                    waiting.extend(dir.seen.iter().map(|(name, id)| (format!("{path}/{name}"), *id)));
                }
            }
        }
        found.sort_unstable();
        found
    }

    /// Gives the call its way, or fails it. `Ok(true)` asks for half of it.
    fn call(&self, call: Call) -> io::Result<bool> {
        let mut state = self.0.borrow_mut();
        if call.changes() {
            if state.left <= state.changes {
                state.is_off = true;
                return Err(io::Error::other("the power failed"));
            }
            state.changes += 1;
        }
        let Some((fault, left, lasting)) = state.fault.filter(|(fault, _, _)| fault.applies(call)) else {
            return Ok(false);
        };
        if left > 1 {
            state.fault = Some((fault, left - 1, lasting));
            return Ok(false);
        }
        state.has_failed = true;
        if !lasting {
            state.fault = None;
        }
        fault.error().map_or(Ok(true), Err)
    }

    fn find(&self, path: &Path) -> Option<usize> {
        let state = self.0.borrow();
        path.components().try_fold(0, |id, part| match (&state.nodes[id], part) {
            (_, Component::RootDir) => Some(0),
            (Node::Dir(dir), Component::Normal(name)) => dir.seen.get(name.to_str()?).copied(),
            _ => None,
        })
    }

    /// The directory that a path is in, and its name there.
    fn place(&self, path: &Path) -> io::Result<(usize, String)> {
        let parent = path.parent().and_then(|p| self.find(p)).ok_or(io::ErrorKind::NotFound)?;
        let name = path.file_name().and_then(|n| n.to_str()).ok_or(io::ErrorKind::InvalidInput)?;
        self.dir(parent).map(|_| (parent, name.to_string()))
    }

    fn dir(&self, id: usize) -> io::Result<Ref<'_, DirNode>> {
        let dir = |state: &State| matches!(state.nodes[id], Node::Dir(_));
        if !dir(&self.0.borrow()) {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Ref::map(self.0.borrow(), |state| match &state.nodes[id] {
            Node::Dir(dir) => dir,
            Node::File(_) => unreachable!("asked above"),
        }))
    }

    fn file<T>(&self, id: usize, of: impl FnOnce(&mut FileNode) -> T) -> T {
        match &mut self.0.borrow_mut().nodes[id] {
            Node::File(file) => of(file),
            Node::Dir(_) => unreachable!("handles are of files"),
        }
    }

    fn change(&self, dir: usize, change: Change) {
        match &mut self.0.borrow_mut().nodes[dir] {
            Node::Dir(dir) => {
                change.apply(&mut dir.seen);
                dir.unsynced.push(change);
            }
            Node::File(_) => unreachable!("a place is in a directory"),
        }
    }

    fn link(&self, path: &Path, node: Node) -> io::Result<usize> {
        let (dir, name) = self.place(path)?;
        if self.dir(dir)?.seen.contains_key(&name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.0.borrow_mut().nodes.push(node);
        let id = self.0.borrow().nodes.len() - 1;
        self.change(dir, Change::Link(name, id));
        Ok(id)
    }

    fn unlink(&self, path: &Path) -> io::Result<()> {
        let (dir, name) = self.place(path)?;
        if !self.dir(dir)?.seen.contains_key(&name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.change(dir, Change::Unlink(name));
        Ok(())
    }
}

// ---------------------------------------------------------------------------------------------------
// What a power cut leaves

/// Of directories, by their nodes, how many of the unsynced operations.
type Counts = BTreeMap<usize, usize>;

/// What survives of every unsynced file alike, where the states are enumerated.
#[derive(Clone, Copy)]
enum Fate {
    Nothing,
    Everything,
    /// The length, and zeros or garbage.
    Zeros,
    Garbage,
    /// All but the first page, or all but the second half.
    Later,
    Half,
}

const FATES: [Fate; 6] =
    [Fate::Nothing, Fate::Everything, Fate::Zeros, Fate::Garbage, Fate::Later, Fate::Half];

impl FileNode {
    fn after(&self, fate: Fate) -> Vec<u8> {
        let (from, to) = (self.durable.len(), self.seen.len());
        match fate {
            Fate::Nothing => self.durable.to_vec(),
            Fate::Everything => self.seen.to_vec(),
            Fate::Zeros => self.mixed(to, |_| 0, |_| 0..0),
            Fate::Garbage => self.mixed(to, |i| (i % 251) as u8 ^ 0xa5, |_| 0..0),
            Fate::Later => self.mixed(to, |_| 0, |page| if page == 0 { 0..0 } else { 0..PAGE }),
            Fate::Half => self.mixed(from + (to - from) / 2, |_| 0, |_| 0..PAGE),
        }
    }

    /// Of `bytes` bytes: what was durable, then `fill`, and over it of each dirty page the range `kept`.
    fn mixed(
        &self,
        bytes: usize,
        fill: impl Fn(usize) -> u8,
        kept: impl Fn(usize) -> std::ops::Range<usize>,
    ) -> Vec<u8> {
        let mut content = self.durable.to_vec();
        content.extend((content.len()..bytes).map(fill));
        for page in &self.dirty {
            self.keep(&mut content, page * PAGE, kept(*page));
        }
        content
    }

    fn keep(&self, content: &mut [u8], at: usize, range: std::ops::Range<usize>) {
        let end = (at + range.end).min(content.len()).min(self.seen.len());
        let start = (at + range.start).min(end);
        content[start..end].copy_from_slice(&self.seen[start..end]);
    }

    /// Any size, any subset of pages and of their sectors, and sectors torn within.
    fn torn(&self, rng: &mut Rng) -> Vec<u8> {
        let (from, to) = (self.durable.len(), self.seen.len());
        let grown = (to - from) as u64;
        let bytes = match rng.below(4) {
            0 => from,
            1 => (from + rng.below(grown + 1) as usize).next_multiple_of(PAGE).min(to),
            2 => from + rng.below(grown + 1) as usize,
            _ => to,
        };
        let garbage = rng.below(2) as u8 * rng.below(256) as u8;
        let mut content = self.mixed(bytes, |_| garbage, |_| 0..0);
        for page in &self.dirty {
            let (at, sectors) = (page * PAGE, PAGE / SECTOR);
            match rng.below(3) {
                0 => {}
                1 => self.keep(&mut content, at, 0..PAGE),
                _ => {
                    let survivors = rng.below(1 << sectors);
                    let kept = (0..sectors).filter(|s| survivors >> s & 1 == 1).map(|s| s * SECTOR);
                    kept.for_each(|s| self.keep(&mut content, at, s..s + SECTOR));
                    let torn = rng.below(sectors as u64) as usize * SECTOR;
                    self.keep(&mut content, at, torn..torn + rng.below(SECTOR as u64) as usize);
                }
            }
        }
        content
    }
}

impl DirNode {
    /// The entries of which the first `count` unsynced operations survived.
    fn after(&self, count: usize) -> BTreeMap<String, usize> {
        let mut entries = self.durable.clone();
        self.unsynced[..count].iter().for_each(|change| change.apply(&mut entries));
        entries
    }
}

impl Device {
    /// Distinct states that may be left if the power failed now, with the power back: all that differ in
    /// directories and in the plain fates of files, where those are at most `limit`; else `limit` of them, the
    /// extremes first, then such as chance gives.
    pub fn after_a_cut(&self, limit: usize, rng: &mut Rng) -> Vec<Device> {
        let most = self.unsynced();
        let combinations = most.iter().fold(FATES.len(), |n, (_, of)| n.saturating_mul(of + 1));
        let (mut states, mut known) = (Vec::new(), BTreeSet::new());
        let mut add = |device: Device| {
            if states.len() < limit && known.insert(device.digest()) {
                states.push(device);
            }
        };
        if combinations <= limit {
            for combination in 0..combinations / FATES.len() {
                let mut rest = combination;
                let counts = most.iter().map(|(id, of)| {
                    let count = rest % (of + 1);
                    rest /= of + 1;
                    (*id, count)
                });
                let counts = counts.collect();
                FATES.into_iter().for_each(|fate| add(self.cut(&counts, &mut |file| file.after(fate))));
            }
        } else {
            add(self.cut(&Counts::new(), &mut |file| file.after(Fate::Nothing)));
            FATES.into_iter().for_each(|fate| add(self.cut(&most, &mut |file| file.after(fate))));
        }
        let is_torn = self.0.borrow().nodes.iter().any(|n| matches!(n, Node::File(f) if !f.dirty.is_empty()));
        let tries = if is_torn || combinations > limit { limit } else { 0 };
        for _ in 0..tries {
            let counts = most.iter().map(|(id, of)| (*id, rng.below(*of as u64 + 1) as usize)).collect();
            let fate = FATES.get(rng.below(2 * FATES.len() as u64) as usize);
            add(self.cut(&counts, &mut |file| fate.map_or_else(|| file.torn(rng), |fate| file.after(*fate))));
        }
        states
    }

    /// Directories with operations in doubt, and how many.
    fn unsynced(&self) -> Counts {
        let state = self.0.borrow();
        let count = |(id, node): (usize, &Node)| match node {
            Node::Dir(dir) if !dir.unsynced.is_empty() => Some((id, dir.unsynced.len())),
            _ => None,
        };
        state.nodes.iter().enumerate().filter_map(count).collect()
    }

    fn cut(&self, survivors: &Counts, content: &mut dyn FnMut(&FileNode) -> Vec<u8>) -> Device {
        let entries = |id: usize, dir: &DirNode| dir.after(survivors.get(&id).copied().unwrap_or(0));
        self.rebuilt(&entries, &mut |file| match file.dirty.is_empty() {
            true => file.seen.clone(),
            false => Rc::new(content(file)),
        })
    }

    /// A device of the entries and contents given for each node that can be reached, all durable.
    fn rebuilt(
        &self,
        entries: &dyn Fn(usize, &DirNode) -> BTreeMap<String, usize>,
        content: &mut dyn FnMut(&FileNode) -> Rc<Vec<u8>>,
    ) -> Device {
        let state = self.0.borrow();
        let mut nodes = vec![Node::Dir(DirNode::default())];
        let mut waiting = vec![(0, 0)];
        while let Some((old, new)) = waiting.pop() {
            nodes[new] = match &state.nodes[old] {
                Node::File(file) => {
                    let seen = content(file);
                    Node::File(FileNode { durable: seen.clone(), seen, ..FileNode::default() })
                }
                Node::Dir(dir) => {
                    let mut durable = entries(old, dir);
                    for id in durable.values_mut() {
                        nodes.push(Node::Dir(DirNode::default()));
                        waiting.push((*id, nodes.len() - 1));
                        *id = nodes.len() - 1;
                    }
                    Node::Dir(DirNode { seen: durable.clone(), durable, unsynced: vec![] })
                }
            };
        }
        Device::of(nodes, state.lie)
    }

    /// Tells states apart.
    fn digest(&self) -> u64 {
        let mut hash = DefaultHasher::new();
        let mut waiting = vec![0];
        while let Some(id) = waiting.pop() {
            match &self.0.borrow().nodes[id] {
                Node::File(file) => file.seen.hash(&mut hash),
                Node::Dir(dir) => {
                    dir.seen.len().hash(&mut hash);
                    for (name, id) in &dir.seen {
                        name.hash(&mut hash);
                        waiting.push(*id);
                    }
                }
            }
        }
        hash.finish()
    }
}
