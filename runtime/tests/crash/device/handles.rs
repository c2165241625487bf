//! The device as the runtime's storage.

use super::*;

struct WriteHandle {
    device: Device,
    id: usize,
}

impl Write for WriteHandle {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let is_short = self.device.call(Call::Write)?;
        let count = if is_short { bytes.len().div_ceil(2) } else { bytes.len() };
        self.device.file(self.id, |file| {
            let from = file.seen.len();
            Rc::make_mut(&mut file.seen).extend_from_slice(&bytes[..count]);
            file.dirty.extend(from / PAGE..file.seen.len().div_ceil(PAGE));
        });
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl StorageFile for WriteHandle {
    fn sync(&mut self) -> io::Result<()> {
        let is_abandoned = self.device.file(self.id, |file| file.is_abandoned);
        assert!(!is_abandoned, "a file is synced again whose sync failed");
        if let Err(error) = self.device.call(Call::Sync) {
            self.device.file(self.id, |file| file.is_abandoned = true);
            return Err(error);
        }
        if self.device.0.borrow().lie != Lie::FileSync {
            self.device.file(self.id, |file| {
                file.durable = file.seen.clone();
                file.dirty.clear();
            });
        }
        Ok(())
    }
}

struct Content(Rc<Vec<u8>>);

impl AsRef<[u8]> for Content {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

struct ReadHandle {
    device: Device,
    content: Cursor<Content>,
}

impl Read for ReadHandle {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let is_short = self.device.call(Call::Read)?;
        let count = if is_short { out.len().div_ceil(2) } else { out.len() };
        self.content.read(&mut out[..count])
    }
}

impl Seek for ReadHandle {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.content.seek(to)
    }
}

impl Storage for Device {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        self.call(Call::Create)?;
        let id = self.link(path, Node::File(FileNode::default()))?;
        Ok(Box::new(WriteHandle { device: self.clone(), id }))
    }

    fn open(&self, path: &Path) -> io::Result<Opened> {
        self.call(Call::Open)?;
        let id = self.find(path).ok_or(io::ErrorKind::NotFound)?;
        let state = self.0.borrow();
        let Node::File(file) = &state.nodes[id] else { return Err(io::ErrorKind::InvalidInput.into()) };
        let content = Cursor::new(Content(file.seen.clone()));
        let source = Box::new(ReadHandle { device: self.clone(), content });
        Ok(Opened { source, bytes: file.seen.len() as u64 })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call(Call::Rename)?;
        let ((dir, from), (other, to)) = (self.place(from)?, self.place(to)?);
        assert_eq!(dir, other, "renaming to another directory is not modelled");
        if !self.dir(dir)?.seen.contains_key(&from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.change(dir, Change::Rename(from, to));
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.call(Call::SyncDir)?;
        let id = self.find(dir).ok_or(io::ErrorKind::NotFound)?;
        let mut state = self.0.borrow_mut();
        let forgets = state.lie == Lie::DirSync;
        let Node::Dir(dir) = &mut state.nodes[id] else { return Err(io::ErrorKind::NotADirectory.into()) };
        if !forgets {
            dir.durable = dir.seen.clone();
            dir.unsynced.clear();
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.call(Call::Remove)?;
        self.unlink(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.call(Call::List)?;
        let id = self.find(dir).ok_or(io::ErrorKind::NotFound)?;
        Ok(self.dir(id)?.seen.keys().cloned().collect())
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.call(Call::CreateDir)?;
        self.link(dir, Node::Dir(DirNode::default())).map(drop)
    }

    fn is_dir(&self, path: &Path) -> bool {
        self.find(path).is_some_and(|id| self.dir(id).is_ok())
    }

    fn kind(&self, path: &Path) -> io::Result<Option<EntryKind>> {
        self.call(Call::Kind)?;
        let kind = |id| if self.dir(id).is_ok() { EntryKind::Dir } else { EntryKind::File };
        Ok(self.find(path).map(kind))
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        self.call(Call::RemoveDir)?;
        let id = self.find(dir).ok_or(io::ErrorKind::NotFound)?;
        if !self.dir(id)?.seen.is_empty() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        self.unlink(dir)
    }

    fn lock(&self, path: &Path) -> io::Result<FileLock> {
        self.call(Call::Lock)?;
        match self.find(path) {
            None => drop(self.link(path, Node::File(FileNode::default()))?),
            Some(id) if self.dir(id).is_ok() => return Err(io::ErrorKind::InvalidInput.into()),
            Some(_) => {}
        }
        // The model holds one program at a time: what is tested is that a lock outlives no crash.
        Ok(FileLock::new(()))
    }
}
