//! The one writer of a store: promote, keep what was tried, roll back, prune.
//!
//! Each changes what is active by one rename of the pointer, and only after everything that the new
//! pointer names is durable and was read back. A crash at any moment leaves what was active before or
//! what is active after.

use std::path::Path;

use super::record::{Pointer, encode};
use super::{
    ContentKind, FEW_SHOT_FILE, FewShot, FileRecord, Generation, LOCK_FILE, MANIFEST_FILE, NUMBER_MAX,
    OUR_FILES, POINTER_FILE, Store, TEXT_BYTES_MAX, Turn, VERDICT_FILE, dir_name,
};
use crate::adapter::{ADAPTER_FILE, Adapter, StoredAs};
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::model::ModelConfig;
use crate::model::chat::Message;
use crate::storage::{EntryKind, FileLock, commit, remove_stray_files};

/// What is to be promoted.
#[derive(Clone, Copy, Debug)]
pub enum Candidate<'a> {
    /// An adapter, stored exactly; its [`Adapter::binding`] must have been taken.
    Adapter(&'a Adapter),
    /// Messages to put before those of the user.
    FewShot(&'a [Message]),
    /// The base alone.
    Base,
}

/// What pruning did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Generations that are gone, ascending.
    pub removed: Vec<u64>,
    /// Generations whose files are gone, but whose folder holds others, which were left alone.
    pub left: Vec<u64>,
}

/// The right to change a store.
pub struct Writer<'s> {
    store: &'s Store<'s>,
    _lock: FileLock,
}

impl<'s> Writer<'s> {
    pub(super) fn begin(store: &'s Store<'s>) -> Result<Writer<'s>> {
        let path = store.dir.join(LOCK_FILE);
        store.stands(&path, EntryKind::File)?;
        let lock = store.storage.lock(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::WouldBlock => {
                let message = "another process is writing to this store; wait for it to finish";
                Error::new(ErrorKind::Busy, message).at(path.display())
            }
            _ => Error::io(format!("locking {}", path.display()), e),
        })?;
        let writer = Writer { store, _lock: lock };
        writer.clean_up()?;
        Ok(writer)
    }

    /// Removes temporary files, and generations whose promotion did not end.
    fn clean_up(&self) -> Result<()> {
        let store = self.store;
        remove_stray_files(store.storage, &store.dir)?;
        // A pointer that can't be read may name any of them.
        let Ok(pointer) = store.pointer() else { return Ok(()) };
        for number in store.numbers()? {
            if store.is_unfinished(number, pointer.as_ref()) {
                self.remove_generation(number)?;
            } else if pointer.is_none() {
                // A first promotion that failed may stand, and not durably, where another is to follow it.
                let dir = store.generation_dir(number);
                let synced = store.storage.sync_dir(&dir);
                synced.map_err(|e| Error::io(format!("syncing {}", dir.display()), e))?;
            }
        }
        Ok(())
    }

    /// Writes a generation for the model of this digest and shape, verifies it, and makes it active.
    /// `verdict` is kept as it is. With `force_base` an adapter may name another base of the same shapes;
    /// using it takes the same override.
    ///
    /// # Errors
    /// [`ErrorKind::BaseMismatch`]; [`ErrorKind::Misuse`] for an adapter without a binding, a verdict or
    /// examples beyond [`TEXT_BYTES_MAX`], or no example; [`ErrorKind::NonFinite`] for an adapter with a NaN;
    /// [`ErrorKind::Io`], [`ErrorKind::Corrupt`] when a file reads back differently. What was active
    /// before still is.
    pub fn promote(
        &self,
        candidate: &Candidate<'_>,
        verdict: &[u8],
        (digest, model): (&[u8; 32], &ModelConfig),
        force_base: bool,
    ) -> Result<Generation> {
        let generation = self.write(candidate, verdict, (digest, model), force_base, false)?;
        self.point_to(&generation).inspect_err(|_| {
            // Once the pointer names it, it must stay, even if the device did not take the pointer.
            if self.store.pointer().is_ok_and(|p| p.is_none_or(|p| p.generation != generation.number)) {
                let _ = self.remove_generation(generation.number);
            }
        })?;
        Ok(generation)
    }

    /// Keeps an adapter that wasn't promoted, with the verdict that says why, as a generation that is never active; and
    /// removes the oldest of such until at most `keep` are left.
    ///
    /// # Errors
    /// As [`Writer::promote`].
    pub fn keep_tried(
        &self,
        adapter: &Adapter,
        verdict: &[u8],
        base: (&[u8; 32], &ModelConfig),
        keep: usize,
    ) -> Result<Option<Generation>> {
        let kept = match keep {
            0 => None,
            _ => Some(self.write(&Candidate::Adapter(adapter), verdict, base, false, true)?),
        };
        let numbers = self.store.numbers()?.into_iter();
        let tried: Vec<u64> =
            numbers.filter(|n| self.store.generation(*n).is_ok_and(|generation| generation.tried)).collect();
        for number in &tried[..tried.len().saturating_sub(keep)] {
            self.remove_generation(*number)?;
        }
        Ok(kept)
    }

    /// Writes and verifies a generation, which isn't active yet.
    fn write(
        &self,
        candidate: &Candidate<'_>,
        verdict: &[u8],
        (digest, model): (&[u8; 32], &ModelConfig),
        force_base: bool,
        tried: bool,
    ) -> Result<Generation> {
        if let Candidate::Adapter(adapter) = candidate {
            match adapter.check_base(digest, model) {
                Err(_) if force_base => adapter.check_shapes(model)?,
                checked => checked?,
            }
            check_bound(adapter)?;
        }
        let size = |what: &str, bytes: usize| match bytes as u64 <= TEXT_BYTES_MAX {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Misuse, format!("{what} exceeds {TEXT_BYTES_MAX} bytes"))),
        };
        size("the verdict", verdict.len())?;
        let examples = match candidate {
            Candidate::FewShot(messages) => few_shot(messages)?,
            _ => Vec::new(),
        };
        size("the few-shot prefix", examples.len())?;
        let previous = match self.store.active() {
            // A store that is damaged through and through is mended by promoting anew.
            Err(e) if e.kind() == ErrorKind::Corrupt => None,
            active => active?.map(|a| a.generation.number),
        };
        let number = self.next_number()?;
        let written =
            self.write_generation(number, candidate, (&examples, verdict), digest, (previous, tried));
        written.and_then(|()| self.store.verify(number)).inspect_err(|_| {
            // Best effort: the failure itself matters more, and the next writer cleans up.
            let _ = self.remove_generation(number);
        })
    }

    /// One more than any number that a generation has or had.
    fn next_number(&self) -> Result<u64> {
        let store = self.store;
        let number = self.highest()?.saturating_add(1);
        if number > NUMBER_MAX {
            let message = "no number is left for another generation; begin a new store";
            return Err(Error::new(ErrorKind::Misuse, message).at(store.dir.display()));
        }
        Ok(number)
    }

    /// The highest number that a generation has or had; 0 before the first.
    fn highest(&self) -> Result<u64> {
        let store = self.store;
        let highest = store.pointer().ok().flatten().map_or(0, |p| p.highest);
        Ok(store.taken_numbers()?.into_iter().fold(highest, u64::max))
    }

    /// Everything of a generation, the manifest last.
    fn write_generation(
        &self,
        number: u64,
        candidate: &Candidate<'_>,
        (examples, verdict): (&[u8], &[u8]),
        digest: &[u8; 32],
        place: (Option<u64>, bool),
    ) -> Result<()> {
        let store = self.store;
        let (parent, dir) = (store.generations_dir(), store.generation_dir(number));
        store.storage.create_dir(&dir).map_err(|e| Error::io(format!("creating {}", dir.display()), e))?;
        let synced = store.storage.sync_dir(&parent);
        synced.map_err(|e| Error::io(format!("syncing {}", parent.display()), e))?;
        let (content, base, mut files) = match candidate {
            Candidate::Adapter(adapter) => {
                adapter.save(store.storage, &dir, StoredAs::F32)?;
                let record = store.digest(&dir.join(ADAPTER_FILE), ADAPTER_FILE)?;
                (ContentKind::Adapter, adapter.base.digest, vec![record])
            }
            Candidate::FewShot(_) => {
                self.put(&dir, FEW_SHOT_FILE, examples)?;
                (ContentKind::FewShot, *digest, vec![FileRecord::of(FEW_SHOT_FILE, examples)])
            }
            Candidate::Base => (ContentKind::Base, *digest, vec![]),
        };
        self.put(&dir, VERDICT_FILE, verdict)?;
        files.push(FileRecord::of(VERDICT_FILE, verdict));
        let manifest = encode(&Generation::new(number, content, base, place, files))?;
        self.put(&dir, MANIFEST_FILE, &manifest)
    }

    /// Makes the generation active that was active when the active one was promoted. May be repeated,
    /// until the first.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] when there is none before, or it was pruned; [`ErrorKind::Corrupt`] when it
    /// does not verify; [`ErrorKind::Io`].
    pub fn rollback(&self) -> Result<Generation> {
        let store = self.store;
        let misuse = |message: String| Error::new(ErrorKind::Misuse, message).at(store.dir.display());
        let active = store.find_active(true)?.ok_or_else(|| misuse("nothing was ever promoted".into()))?;
        let number = active.generation.number;
        let Some(previous) = active.generation.previous else {
            return Err(misuse(format!("generation {number} is the first: nothing was active before it")));
        };
        if !store.stands(&store.generation_dir(previous), EntryKind::Dir)? {
            let message =
                format!("generation {previous}, which was active before generation {number}, was pruned");
            return Err(misuse(message).advise(Advice::AnotherGeneration));
        }
        self.activate(previous)
    }

    /// Makes any generation active that verifies and was promoted once.
    ///
    /// # Errors
    /// As [`Store::verify`]; [`ErrorKind::Misuse`] for one that was only tried.
    pub fn activate(&self, number: u64) -> Result<Generation> {
        let generation = self.store.verify(number)?;
        if generation.tried {
            let message = format!("generation {number} was tried and never promoted; promote it first");
            return Err(Error::new(ErrorKind::Misuse, message).at(self.store.dir.display()));
        }
        self.point_to(&generation)?;
        Ok(generation)
    }

    /// Swaps the pointer, in one step.
    fn point_to(&self, generation: &Generation) -> Result<()> {
        let store = self.store;
        let (_, manifest) = store.manifest(generation.number)?;
        let highest = self.highest()?.max(generation.number);
        let mut files = generation.files.clone();
        files.push(manifest);
        let pointer = Pointer::new(generation.number, generation.previous, highest, files);
        self.put(&store.dir, POINTER_FILE, &encode(&pointer)?)
    }

    /// Removes all generations but the newest `keep` that are whole and were promoted, the active one, and the one
    /// that a rollback leads to.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] for a `keep` of 0; [`ErrorKind::Corrupt`] when no generation verifies: then
    /// nothing is removed; [`ErrorKind::Io`].
    pub fn prune(&self, keep: usize) -> Result<Pruned> {
        if keep == 0 {
            return Err(Error::new(ErrorKind::Misuse, "pruning keeps at least one generation"));
        }
        let store = self.store;
        let Some(active) = store.find_active(true)? else { return Ok(Pruned::default()) };
        // A pointer that fell back is written anew first: what it named may be about to go.
        if !active.passed_over.is_empty() {
            self.point_to(&active.generation)?;
        }
        let numbers = store.numbers()?;
        let mut kept = Vec::new();
        for number in numbers.iter().rev() {
            if kept.len() == keep {
                break;
            }
            match store.verify(*number) {
                Ok(generation) if generation.tried => {}
                Ok(_) => kept.push(*number),
                Err(e) if e.kind() == ErrorKind::Corrupt => {}
                // What can't be read now is not known to be damaged.
                Err(e) => return Err(e),
            }
        }
        kept.push(active.generation.number);
        kept.extend(active.generation.previous);
        let mut pruned = Pruned::default();
        for number in numbers.into_iter().filter(|n| !kept.contains(n)) {
            match self.remove_generation(number)? {
                true => pruned.removed.push(number),
                false => pruned.left.push(number),
            }
        }
        Ok(pruned)
    }

    /// Removes our files of a generation, and its directory where nothing else is in it: whether it was.
    /// The manifest goes first, for good: what is left by a crash is no generation any more.
    fn remove_generation(&self, number: u64) -> Result<bool> {
        let store = self.store;
        let dir = store.generation_dir(number);
        let io = |path: &Path, e| Error::io(format!("removing {}", path.display()), e);
        let sync = || store.storage.sync_dir(&dir).map_err(|e| io(&dir, e));
        for name in OUR_FILES.iter().rev() {
            let path = dir.join(name);
            if store.storage.kind(&path).map_err(|e| io(&path, e))? == Some(EntryKind::File) {
                store.storage.remove(&path).map_err(|e| io(&path, e))?;
                if *name == MANIFEST_FILE {
                    sync()?;
                }
            }
        }
        remove_stray_files(store.storage, &dir)?;
        sync()?;
        if !store.names(&dir)?.is_empty() {
            return Ok(false);
        }
        store.storage.remove_dir(&dir).map_err(|e| io(&dir, e))?;
        let parent = store.generations_dir();
        store.storage.sync_dir(&parent).map_err(|e| io(&parent, e))?;
        log::debug!("generation {} is removed", dir_name(number));
        Ok(true)
    }

    fn put(&self, dir: &Path, name: &str, content: &[u8]) -> Result<()> {
        let path = dir.join(name);
        let write = |out: &mut dyn std::io::Write| {
            out.write_all(content).map_err(|e| Error::io(format!("writing {}", path.display()), e))
        };
        commit(self.store.storage, dir, name, write).map(|_| ())
    }
}

/// Refuses an adapter that couldn't be checked against a model later: a broken one would go unnoticed.
fn check_bound(adapter: &Adapter) -> Result<()> {
    if adapter.binding.is_some() {
        return Ok(());
    }
    let message = "the adapter is not bound to its base: its file says nothing of what it computes there, as \
                   an older file or one of Adapter::save; save it with Adapter::save_bound, load that file and \
                   promote it";
    Err(Error::new(ErrorKind::Misuse, message))
}

/// The examples' file.
fn few_shot(messages: &[Message]) -> Result<Vec<u8>> {
    if messages.is_empty() {
        return Err(Error::new(ErrorKind::Misuse, "a few-shot prefix without an example; promote the base"));
    }
    let turn = |m: &Message| Turn { role: m.role.clone(), content: m.content.clone() };
    let file = FewShot { messages: messages.iter().map(turn).collect() };
    let failed = |e: serde_json::Error| Error::new(ErrorKind::Misuse, format!("the few-shot prefix: {e}"));
    serde_json::to_vec_pretty(&file).map_err(failed)
}
