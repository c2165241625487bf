//! What was promoted, generation by generation, and which one is active; and what was tried lately and not promoted,
//! as generations that are never active.
//!
//! ```text
//! DIR/lock                              held by the one writer
//! DIR/active                            the pointer, replaced in one step
//! DIR/last/                             reports of the last run, promoted or not
//! DIR/generations/000007/adapter.engraft   or few_shot.json, or neither: the base alone
//!                       /verdict.json      why, as the gate wrote it
//!                       /generation.json   the manifest, written last: without it there is no generation
//! ```
//!
//! Counters decide what is newer, never the clock. A reader takes no lock: a generation never changes
//! once its manifest stands, the pointer is swapped whole, and pruning spares the active generation and
//! the one before it. Symbolic links are never followed within the directory, and no name comes from a
//! file; what is not ours is left alone.

mod record;
mod writer;

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use record::{ContentKind, FileRecord, Generation};
use record::{Pointer, decode};
pub use writer::{Candidate, Pruned, Writer};

use crate::adapter::{ADAPTER_FILE, Adapter};
use crate::data::masks::prompting_behind;
use crate::error::{Advice, Error, ErrorKind, Result, told};
use crate::hex;
use crate::model::ModelConfig;
use crate::model::chat::Message;
use crate::model::usage::Usage;
use crate::storage::{EntryKind, Storage};

/// The examples of a few-shot generation.
pub const FEW_SHOT_FILE: &str = "few_shot.json";
/// The verdict of a generation.
pub const VERDICT_FILE: &str = "verdict.json";
/// The manifest of a generation.
pub const MANIFEST_FILE: &str = "generation.json";
/// The pointer to the active generation.
pub const POINTER_FILE: &str = "active";
/// The file that the writer locks.
pub const LOCK_FILE: &str = "lock";
/// Verdict and reports of the last run into the store, whatever came of it; the store never reads them.
pub const LAST_DIR: &str = "last";
/// The directory of all generations.
pub const GENERATIONS_DIR: &str = "generations";

/// Bytes of a verdict or of few-shot examples, at most.
pub const TEXT_BYTES_MAX: u64 = 16 << 20;
/// Bytes of a manifest or pointer, at most: real ones have a few hundred.
const RECORD_BYTES_MAX: u64 = 64 << 10;
/// The largest number of a generation; what is called by a larger one is none.
const NUMBER_MAX: u64 = 999_999_999;
/// Files of a generation.
const OUR_FILES: [&str; 4] = [ADAPTER_FILE, FEW_SHOT_FILE, VERDICT_FILE, MANIFEST_FILE];

/// A directory of generations.
#[derive(Clone)]
pub struct Store<'s> {
    storage: &'s dyn Storage,
    dir: PathBuf,
}

/// The generation to use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Active {
    /// It, verified.
    pub generation: Generation,
    /// What should have been taken before it, and why it was not: to be told to the user. Empty where all
    /// is well.
    pub passed_over: Vec<String>,
}

/// What a generation puts beside its base, loaded.
#[derive(Clone, Debug, PartialEq)]
pub enum InUse {
    /// An adapter. Its base is not checked: see [`Adapter::check_base`].
    Adapter(Box<Adapter>),
    /// Messages to put before those of the user. Made for [`Generation::base`]: see
    /// [`Generation::check_base`].
    FewShot(Vec<Message>),
    /// Nothing.
    Base,
}

/// A look at everything in the directory.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// All generations, ascending.
    pub generations: Vec<Listed>,
    /// The active one; `None` where none was ever promoted, or none verifies.
    pub active: Option<Active>,
    /// Names that are not ours, relative to the directory; they are left alone.
    pub unknown: Vec<String>,
}

/// One generation in a [`Listing`].
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its number.
    pub number: u64,
    /// Its manifest, or why it has none: unfinished, or damage. The files' contents are not read.
    pub manifest: std::result::Result<Generation, String>,
    /// A folder without a manifest that no pointer names: what a promotion or a pruning left that was cut
    /// short, or is still at it. No generation, so nothing is lost; the next writer removes it.
    pub is_unfinished: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FewShot {
    messages: Vec<Turn>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Turn {
    role: String,
    content: String,
}

impl Generation {
    /// Checks that it was made for the model with this digest.
    ///
    /// # Errors
    /// [`ErrorKind::BaseMismatch`].
    pub fn check_base(&self, digest: &[u8; 32]) -> Result<()> {
        if self.base == *digest {
            return Ok(());
        }
        let message = format!(
            "generation {} was made for another base: {}, and this model is {}",
            self.number,
            hex::short(&self.base),
            hex::short(digest)
        );
        Err(Error::new(ErrorKind::BaseMismatch, message).advise(Advice::OwnBase))
    }
}

impl<'s> Store<'s> {
    /// Opens a store for reading, or before [`Store::writer`].
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] when the directory is none of a store, [`ErrorKind::Corrupt`] when it holds
    /// a link in the place of something of ours, [`ErrorKind::Io`].
    pub fn open(storage: &'s dyn Storage, dir: &Path) -> Result<Store<'s>> {
        let store = Store { storage, dir: dir.to_path_buf() };
        if store.stands(&store.generations_dir(), EntryKind::Dir)? {
            return Ok(store);
        }
        let message = format!("{}: no adapter store: it holds no folder `{GENERATIONS_DIR}`", dir.display());
        Err(Error::new(ErrorKind::Misuse, message))
    }

    /// Opens a store, making what is missing of it, accessible to its owner only.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn create(storage: &'s dyn Storage, dir: &Path) -> Result<Store<'s>> {
        let store = Store { storage, dir: dir.to_path_buf() };
        crate::storage::create_dir_all(storage, dir)?;
        if !store.stands(&store.generations_dir(), EntryKind::Dir)? {
            crate::storage::create_dir_all(storage, &store.generations_dir())?;
        }
        Store::open(storage, dir)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Becomes the one writer, until the value is dropped or the process ends; removes what an earlier
    /// writer left unfinished.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when there is one, naming the lock's file; [`ErrorKind::Io`].
    pub fn writer(&self) -> Result<Writer<'_>> {
        Writer::begin(self)
    }

    /// [`Writer::promote`] for a caller that need not hold the lock longer.
    ///
    /// # Errors
    /// As [`Store::writer`] and [`Writer::promote`].
    pub fn promote(
        &self,
        candidate: &Candidate<'_>,
        verdict: &[u8],
        base: (&[u8; 32], &ModelConfig),
        force_base: bool,
    ) -> Result<Generation> {
        self.writer()?.promote(candidate, verdict, base, force_base)
    }

    /// The generation to use, its files verified; `None` where none was ever promoted. Where the pointer
    /// or its generation is damaged, the newest that verifies is taken (of those not newer than what the
    /// pointer names, if it can be read), and [`Active::passed_over`] says why.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when no generation verifies, [`ErrorKind::Unsupported`] for a pointer of a
    /// newer version, [`ErrorKind::Io`].
    pub fn active(&self) -> Result<Option<Active>> {
        self.find_active(false)
    }

    /// The same, and with `all_read` an error where it depended on something that could not be read: what a
    /// writer goes by must not change with one bad read.
    fn find_active(&self, all_read: bool) -> Result<Option<Active>> {
        let is_final = |e: &Error| match e.kind() {
            ErrorKind::Unsupported => true,
            kind => all_read && kind == ErrorKind::Io,
        };
        let (mut passed_over, mut unread) = (Vec::new(), false);
        let pointer = match self.pointer() {
            Ok(pointer) => pointer,
            Err(e) if is_final(&e) => return Err(e),
            Err(e) => {
                unread |= e.kind() == ErrorKind::Io;
                passed_over.push(e.message().to_owned());
                None
            }
        };
        let is_lost = !passed_over.is_empty();
        let candidates = self.candidates(pointer.as_ref(), is_lost)?;
        if pointer.is_none() && !is_lost && !candidates.is_empty() {
            passed_over.push(format!("{}: there is none", self.dir.join(POINTER_FILE).display()));
        }
        for number in &candidates {
            let named = pointer.as_ref().filter(|p| p.generation == *number);
            match self.verify_named(*number, named) {
                Ok(generation) => return Ok(Some(Active { generation, passed_over })),
                Err(e) if is_final(&e) => return Err(e),
                Err(e) => {
                    unread |= e.kind() == ErrorKind::Io;
                    passed_over.push(e.message().to_owned());
                }
            }
        }
        if passed_over.is_empty() {
            return Ok(None);
        }
        let message = format!(
            "{}: no generation verifies ({}); adapt again, or restore the folder",
            self.dir.display(),
            passed_over.join("; ")
        );
        Err(Error::new(if unread { ErrorKind::Io } else { ErrorKind::Corrupt }, message))
    }

    /// The generations that may be active, best first: none that was only tried. Without a pointer that names it, a
    /// directory without a manifest is a promotion that never came to be.
    fn candidates(&self, pointer: Option<&Pointer>, is_lost: bool) -> Result<Vec<u64>> {
        let was_tried = |n: &u64| self.generation(*n).is_ok_and(|generation| generation.tried);
        let newest_first: Vec<u64> = self.numbers()?.into_iter().rev().filter(|n| !was_tried(n)).collect();
        let Some(pointer) = pointer else {
            let may_be_whole = |n: &u64| is_lost || !self.is_unfinished(*n, None);
            return Ok(newest_first.into_iter().filter(may_be_whole).collect());
        };
        let mut order: Vec<u64> = std::iter::once(pointer.generation).chain(pointer.previous).collect();
        let older = newest_first.into_iter().filter(|n| *n < pointer.generation);
        for number in older {
            if !order.contains(&number) {
                order.push(number);
            }
        }
        Ok(order)
    }

    /// Whether a folder is none of a generation, with a pointer that could be read: see
    /// [`Listed::is_unfinished`].
    fn is_unfinished(&self, number: u64, pointer: Option<&Pointer>) -> bool {
        let is_named = pointer.is_some_and(|p| p.generation == number || p.previous == Some(number));
        let manifest = self.generation_dir(number).join(MANIFEST_FILE);
        !is_named && matches!(self.storage.kind(&manifest), Ok(None))
    }

    /// A generation, all its files read and compared with their digests.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] when there is none of this number, [`ErrorKind::Corrupt`] naming the file,
    /// [`ErrorKind::Io`].
    pub fn verify(&self, number: u64) -> Result<Generation> {
        let pointer = self.pointer().unwrap_or(None);
        self.verify_named(number, pointer.as_ref().filter(|p| p.generation == number))
    }

    /// The same against the pointer too, where it names this generation.
    fn verify_named(&self, number: u64, pointer: Option<&Pointer>) -> Result<Generation> {
        let (generation, manifest) = self.manifest(number)?;
        let dir = self.generation_dir(number);
        for record in &generation.files {
            let found = self.digest(&dir.join(&record.name), &record.name)?;
            if found != *record {
                let message = "differs from what was promoted: damaged, or replaced";
                let place = dir.join(&record.name);
                return Err(Error::new(ErrorKind::Corrupt, message).at(place.display()));
            }
        }
        let mut all = generation.files.clone();
        all.push(manifest);
        if pointer.is_some_and(|p| p.files != all) {
            let message = "is not the generation that was made active";
            return Err(Error::new(ErrorKind::Corrupt, message).at(dir.display()));
        }
        Ok(generation)
    }

    /// A generation as its manifest describes it; its files are not read.
    ///
    /// # Errors
    /// As [`Store::verify`].
    pub fn generation(&self, number: u64) -> Result<Generation> {
        self.manifest(number).map(|(generation, _)| generation)
    }

    /// A manifest, and its own record.
    fn manifest(&self, number: u64) -> Result<(Generation, FileRecord)> {
        let dir = self.generation_dir(number);
        if !self.stands(&dir, EntryKind::Dir)? {
            let message = format!("{}: there is no generation {number}", self.dir.display());
            return Err(Error::new(ErrorKind::Misuse, message));
        }
        let path = dir.join(MANIFEST_FILE);
        let bytes = self.read(&path, RECORD_BYTES_MAX)?;
        let corrupt = |problem: &str| Error::new(ErrorKind::Corrupt, problem).at(path.display());
        let generation: Generation = decode(&bytes).map_err(|e| e.at(path.display()))?;
        let content = match generation.content {
            ContentKind::Adapter => Some(ADAPTER_FILE),
            ContentKind::FewShot => Some(FEW_SHOT_FILE),
            ContentKind::Base => None,
        };
        // Names are compared, never taken from the file: no path can lead out of the directory.
        let names = content.into_iter().chain([VERDICT_FILE]);
        if generation.number != number || !generation.files.iter().map(|f| f.name.as_str()).eq(names) {
            return Err(corrupt("does not describe this generation"));
        }
        Ok((generation, FileRecord::of(MANIFEST_FILE, &bytes)))
    }

    /// Loads what a generation puts beside its base.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], [`ErrorKind::Unsupported`] for an adapter of a newer version,
    /// [`ErrorKind::Io`].
    pub fn load(&self, generation: &Generation) -> Result<InUse> {
        let dir = self.generation_dir(generation.number);
        match generation.content {
            ContentKind::Base => Ok(InUse::Base),
            ContentKind::Adapter => {
                let path = dir.join(ADAPTER_FILE);
                self.must_stand(&path)?;
                let adapter = Adapter::load_from(self.storage, &path)?;
                if adapter.base.digest != generation.base {
                    let message = "names another base than its generation";
                    return Err(Error::new(ErrorKind::Corrupt, message).at(path.display()));
                }
                Ok(InUse::Adapter(Box::new(adapter)))
            }
            ContentKind::FewShot => {
                let path = dir.join(FEW_SHOT_FILE);
                let bytes = self.read(&path, TEXT_BYTES_MAX)?;
                let parsed: FewShot = serde_json::from_slice(&bytes).map_err(|e| {
                    Error::new(ErrorKind::Corrupt, format!("{}: {}", path.display(), told(e)))
                })?;
                let messages = parsed.messages.into_iter();
                Ok(InUse::FewShot(messages.map(|t| Message::new(t.role, t.content)).collect()))
            }
        }
    }

    /// How what a generation holds is meant to be used: as its adapter's file or its examples say, and greedily if its
    /// verdict counted answers.
    ///
    /// # Errors
    /// Those of [`Store::verdict`].
    pub fn usage(&self, generation: &Generation, in_use: &InUse) -> Result<Usage> {
        let told = match in_use {
            InUse::Base => return Ok(Usage::default()),
            InUse::Adapter(adapter) => adapter.meta.usage.clone(),
            InUse::FewShot(messages) => Usage { prompting: prompting_behind(messages), greedy: false },
        };
        // One that can't be parsed, or of another version, counted none.
        let verdict: serde_json::Value =
            serde_json::from_slice(&self.verdict(generation)?).unwrap_or_default();
        let arms = verdict["arms"].as_array();
        let counted = arms.is_some_and(|arms| arms.iter().any(|arm| arm["accuracy"].is_number()));
        Ok(Usage { greedy: told.greedy || counted, ..told })
    }

    /// Where a generation's adapter is; `None` where it puts something else beside its base.
    pub fn adapter_file(&self, generation: &Generation) -> Option<PathBuf> {
        let is_adapter = generation.content == ContentKind::Adapter;
        is_adapter.then(|| self.generation_dir(generation.number).join(ADAPTER_FILE))
    }

    /// The verdict of a generation, as it was given to [`Writer::promote`].
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], [`ErrorKind::Io`].
    pub fn verdict(&self, generation: &Generation) -> Result<Vec<u8>> {
        let path = self.generation_dir(generation.number).join(VERDICT_FILE);
        let bytes = self.read(&path, TEXT_BYTES_MAX)?;
        if !generation.files.contains(&FileRecord::of(VERDICT_FILE, &bytes)) {
            let message = "differs from what was promoted: damaged, or replaced";
            return Err(Error::new(ErrorKind::Corrupt, message).at(path.display()));
        }
        Ok(bytes)
    }

    /// Everything in the directory. Of the generations, only the active one's files are read.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a pointer of a newer version, [`ErrorKind::Io`].
    pub fn list(&self) -> Result<Listing> {
        let active = match self.active() {
            Err(e) if e.kind() == ErrorKind::Corrupt => None,
            other => other?,
        };
        let mut listing = Listing { active, ..Listing::default() };
        // A pointer that can't be read may name any of them.
        let pointer = self.pointer();
        for number in self.numbers()? {
            let manifest = self.generation(number).map_err(|e| e.message().to_owned());
            let is_unfinished = pointer.as_ref().is_ok_and(|p| self.is_unfinished(number, p.as_ref()));
            listing.generations.push(Listed { number, manifest, is_unfinished });
        }
        let ours = |name: &str| [LOCK_FILE, POINTER_FILE, GENERATIONS_DIR, LAST_DIR].contains(&name);
        listing.unknown.extend(self.names(&self.dir)?.into_iter().filter(|name| !ours(name)));
        let numbers: Vec<_> = listing.generations.iter().map(|g| dir_name(g.number)).collect();
        for name in self.names(&self.generations_dir())? {
            let within = format!("{GENERATIONS_DIR}/{name}");
            if !numbers.contains(&name) {
                listing.unknown.push(within);
                continue;
            }
            let others = self.names(&self.generations_dir().join(&name))?;
            let others = others.into_iter().filter(|n| !OUR_FILES.contains(&n.as_str()));
            listing.unknown.extend(others.map(|n| format!("{within}/{n}")));
        }
        Ok(listing)
    }

    fn generations_dir(&self) -> PathBuf {
        self.dir.join(GENERATIONS_DIR)
    }

    fn generation_dir(&self, number: u64) -> PathBuf {
        self.generations_dir().join(dir_name(number))
    }

    /// The numbers of all generations, whole or not, ascending. A link in the place of a generation is none.
    fn numbers(&self) -> Result<Vec<u64>> {
        let is_dir = |n: &u64| {
            self.storage.kind(&self.generation_dir(*n)).is_ok_and(|kind| kind == Some(EntryKind::Dir))
        };
        Ok(self.taken_numbers()?.into_iter().filter(is_dir).collect())
    }

    /// The numbers that something is called by, ascending.
    fn taken_numbers(&self) -> Result<Vec<u64>> {
        let number = |name: &String| {
            name.parse().ok().filter(|n| (1..=NUMBER_MAX).contains(n) && dir_name(*n) == *name)
        };
        let mut found: Vec<u64> = self.names(&self.generations_dir())?.iter().filter_map(number).collect();
        found.sort_unstable();
        Ok(found)
    }

    /// The pointer; `None` where there is none.
    fn pointer(&self) -> Result<Option<Pointer>> {
        let path = self.dir.join(POINTER_FILE);
        if !self.stands(&path, EntryKind::File)? {
            return Ok(None);
        }
        decode(&self.read(&path, RECORD_BYTES_MAX)?).map(Some).map_err(|e| e.at(path.display()))
    }

    fn names(&self, dir: &Path) -> Result<Vec<String>> {
        self.storage.list(dir).map_err(|e| Error::io(format!("listing {}", dir.display()), e))
    }

    /// Whether the path is there, and what it must be.
    fn stands(&self, path: &Path, wanted: EntryKind) -> Result<bool> {
        match self.storage.kind(path) {
            Ok(None) => Ok(false),
            Ok(Some(kind)) if kind == wanted => Ok(true),
            Ok(Some(_)) => {
                let what = if wanted == EntryKind::Dir { "folder" } else { "regular file" };
                let message = format!("no {what} but a link or something else, which a store never holds");
                Err(Error::new(ErrorKind::Corrupt, message).at(path.display()))
            }
            Err(e) => Err(Error::io(format!("looking at {}", path.display()), e)),
        }
    }

    fn must_stand(&self, path: &Path) -> Result<()> {
        match self.stands(path, EntryKind::File)? {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Corrupt, "is missing").at(path.display())),
        }
    }

    /// A small file's content.
    fn read(&self, path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
        self.must_stand(path)?;
        let io = |e| Error::io(format!("reading {}", path.display()), e);
        let opened = self.storage.open(path).map_err(io)?;
        let mut bytes = Vec::new();
        opened.source.take(bytes_max + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > bytes_max {
            let message = format!("has more than {bytes_max} bytes: not written by Engraft");
            return Err(Error::new(ErrorKind::Corrupt, message).at(path.display()));
        }
        Ok(bytes)
    }

    /// The record of a file of any size.
    fn digest(&self, path: &Path, name: &str) -> Result<FileRecord> {
        self.must_stand(path)?;
        let io = |e| Error::io(format!("reading {}", path.display()), e);
        let mut source = self.storage.open(path).map_err(io)?.source;
        let (mut hash, mut bytes, mut part) = (Sha256::new(), 0, vec![0; 64 << 10]);
        loop {
            match source.read(&mut part) {
                Ok(0) => break,
                Ok(n) => {
                    hash.update(&part[..n]);
                    bytes += n as u64;
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(io(e)),
            }
        }
        Ok(FileRecord { name: name.into(), bytes, sha256: hash.finalize().into() })
    }
}

/// A generation's directory: its number, in six digits or more.
fn dir_name(number: u64) -> String {
    format!("{number:06}")
}
