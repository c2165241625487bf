//! A cache of model file digests: hashing reads the whole model, which costs more than everything else checked
//! when an adapter is loaded.
//!
//! A file counts as unchanged while its device, inode, size, mtime and ctime are equal, to the nanosecond. One
//! small text file with a checksum holds the latest digests; anything but an intact file of this version is
//! ignored and rewritten. The cache is optional: if it is missing or broken, digests are computed.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::hex;
use crate::storage::{Storage, commit, create_dir_all};

/// Sets this encoding apart from any other use of SHA-256; a change of the encoding changes it.
pub(super) const DIGEST_DOMAIN: &str = "engraft base model, encoding 1\n";
/// The file within the cache's folder.
pub const CACHE_FILE: &str = "digests";
/// Most digests kept, the latest last.
const ENTRIES_MAX: usize = 64;
/// Most bytes of a cache file.
const BYTES_MAX: u64 = 1 << 15;
/// A file changed this recently may change again within the same time stamp, so its digest isn't kept.
const SETTLED: Duration = Duration::from_secs(2);

/// What tells one state of a file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    /// mtime and ctime, each in seconds and nanoseconds.
    times: [i64; 4],
}

impl Stamp {
    /// The stamp of an open file; `None` on systems without inode numbers.
    #[cfg(unix)]
    pub fn of(found: &std::fs::Metadata) -> Option<Stamp> {
        use std::os::unix::fs::MetadataExt;
        Some(Stamp {
            device: found.dev(),
            inode: found.ino(),
            bytes: found.size(),
            times: [found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec()],
        })
    }

    /// The stamp of an open file; `None` on systems without inode numbers.
    #[cfg(not(unix))]
    pub fn of(_: &std::fs::Metadata) -> Option<Stamp> {
        None
    }

    /// Whether the content is the same, as far as device, inode, size and the time of its last change tell.
    pub fn same_content(&self, other: &Stamp) -> bool {
        let of = |s: &Stamp| (s.device, s.inode, s.bytes, s.times[0], s.times[1]);
        of(self) == of(other)
    }

    /// Whether the last change is old enough that another one would show.
    fn is_settled(&self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let latest = self.times[0].max(self.times[2]);
        u64::try_from(latest).is_ok_and(|t| Duration::from_secs(t) + SETTLED < now)
    }

    /// The line of a digest.
    fn line(&self, digest: &[u8; 32]) -> String {
        let [a, b, c, d] = self.times;
        format!("{} {} {} {a} {b} {c} {d} {}\n", self.device, self.inode, self.bytes, hex::encode(digest))
    }
}

/// Digests cached in a folder. Several processes may share one; a lost entry is recomputed.
#[derive(Clone, Debug)]
pub struct DigestCache {
    dir: PathBuf,
}

impl DigestCache {
    /// The cache in a folder, which is created (accessible to its owner only) when the first digest is kept.
    pub fn new(dir: impl Into<PathBuf>) -> DigestCache {
        DigestCache { dir: dir.into() }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.dir
    }

    /// The cached digest for a state of a file.
    pub fn get(&self, storage: &dyn Storage, stamp: &Stamp) -> Option<[u8; 32]> {
        self.entries(storage).into_iter().rev().find(|(s, _)| s == stamp).map(|(_, digest)| digest)
    }

    /// Keeps the digest of a state of a file, unless the file changed a moment ago.
    ///
    /// # Errors
    /// Those of the system. Callers may ignore them: a read-only home costs time, not the run.
    pub fn put(&self, storage: &dyn Storage, stamp: &Stamp, digest: &[u8; 32]) -> Result<()> {
        if !stamp.is_settled() {
            return Ok(());
        }
        let mut entries = self.entries(storage);
        entries.retain(|(s, _)| (s.device, s.inode) != (stamp.device, stamp.inode));
        entries.push((*stamp, *digest));
        let first = entries.len().saturating_sub(ENTRIES_MAX);
        let text = encode(&entries[first..]);
        create_dir_all(storage, &self.dir)?;
        commit(storage, &self.dir, CACHE_FILE, |out| {
            out.write_all(text.as_bytes()).map_err(|e| Error::io("writing", e))
        })
        .map(drop)
    }

    fn entries(&self, storage: &dyn Storage) -> Vec<(Stamp, [u8; 32])> {
        let path = self.dir.join(CACHE_FILE);
        read(storage, &path).and_then(|text| decode(&text)).unwrap_or_default()
    }
}

fn read(storage: &dyn Storage, path: &Path) -> Option<String> {
    let opened = storage.open(path).ok()?;
    let mut text = String::new();
    opened.source.take(BYTES_MAX + 1).read_to_string(&mut text).ok()?;
    (text.len() as u64 <= BYTES_MAX).then_some(text)
}

fn encode(entries: &[(Stamp, [u8; 32])]) -> String {
    // Another encoding gives other digests.
    let mut text = DIGEST_DOMAIN.to_string();
    text.extend(entries.iter().map(|(stamp, digest)| stamp.line(digest)));
    let sum = hex::encode(&Sha256::digest(text.as_bytes()));
    text + &sum + "\n"
}

fn decode(text: &str) -> Option<Vec<(Stamp, [u8; 32])>> {
    let body_bytes = text.strip_suffix('\n')?.rfind('\n')? + 1;
    let (body, sum) = text.split_at(body_bytes);
    if sum.trim_end() != hex::encode(&Sha256::digest(body.as_bytes())) {
        return None;
    }
    body.strip_prefix(DIGEST_DOMAIN)?.lines().map(entry).collect()
}

fn entry(line: &str) -> Option<(Stamp, [u8; 32])> {
    let mut words = line.split(' ');
    let mut number = || words.next()?.parse::<u64>().ok();
    let (device, inode, bytes) = (number()?, number()?, number()?);
    let mut time = || words.next()?.parse::<i64>().ok();
    let times = [time()?, time()?, time()?, time()?];
    let digest = hex::decode(words.next()?)?;
    words.next().is_none().then_some((Stamp { device, inode, bytes, times }, digest))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use crate::storage::Disk;
    use std::fs;

    fn stamp(inode: u64) -> Stamp {
        Stamp { device: 1, inode, bytes: 10, times: [5, 6, -7, 8] }
    }

    #[test]
    fn digests_are_kept_by_every_part_of_a_stamp() {
        let dir = tempfile::tempdir().expect("a folder");
        let cache = DigestCache::new(dir.path().join("a/b"));
        assert_eq!(cache.get(&Disk, &stamp(1)), None);
        cache.put(&Disk, &stamp(1), &[0xa5; 32]).expect("room");
        cache.put(&Disk, &stamp(2), &[7; 32]).expect("room");
        assert_eq!(
            (cache.get(&Disk, &stamp(1)), cache.get(&Disk, &stamp(2))),
            (Some([0xa5; 32]), Some([7; 32]))
        );
        let mut others = [stamp(1); 7];
        others[0].device = 2;
        others[1].inode = 3;
        others[2].bytes = 11;
        (0..4).for_each(|i| others[3 + i].times[i] += 1);
        assert!(others.iter().all(|s| cache.get(&Disk, s).is_none()));
        // A changed file takes its entry's place; the oldest go.
        cache.put(&Disk, &others[2], &[1; 32]).expect("room");
        assert_eq!((cache.get(&Disk, &stamp(1)), cache.get(&Disk, &others[2])), (None, Some([1; 32])));
        (10..10 + ENTRIES_MAX as u64).for_each(|i| cache.put(&Disk, &stamp(i), &[9; 32]).expect("room"));
        assert_eq!((cache.get(&Disk, &others[2]), cache.entries(&Disk).len()), (None, ENTRIES_MAX));
    }

    #[test]
    fn what_changed_just_now_is_not_kept() {
        let dir = tempfile::tempdir().expect("a folder");
        let cache = DigestCache::new(dir.path());
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock").as_secs() as i64;
        for times in [[now, 0, 0, 0], [0, 0, now, 0], [now + 1000, 0, 0, 0]] {
            let fresh = Stamp { times, ..stamp(1) };
            cache.put(&Disk, &fresh, &[1; 32]).expect("room");
            assert_eq!(cache.get(&Disk, &fresh), None);
        }
    }

    #[test]
    fn a_broken_cache_is_ignored_and_written_anew() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a folder");
        let cache = DigestCache::new(dir.path().join("own"));
        cache.put(&Disk, &stamp(1), &[0xa5; 32]).expect("room");
        let file = dir.path().join("own").join(CACHE_FILE);
        let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
        assert_eq!((mode(&file), mode(file.parent().expect("a folder"))), (0o600, 0o700));
        let good = fs::read(&file).expect("reading");
        let mut accepted = 0;
        for at in 0..good.len() {
            for bad in [good[..at].to_vec(), flipped(&good, at)] {
                fs::write(&file, bad).expect("writing");
                accepted += usize::from(cache.get(&Disk, &stamp(1)).is_some_and(|d| d != [0xa5; 32]));
                assert_eq!(cache.entries(&Disk), vec![], "byte {at}");
            }
        }
        assert_eq!(accepted, 0);
        for bad in [vec![b'x'; 1 << 20], vec![0xff; 9]] {
            fs::write(&file, bad).expect("writing");
            cache.put(&Disk, &stamp(3), &[2; 32]).expect("room");
            assert_eq!(cache.get(&Disk, &stamp(3)), Some([2; 32]));
        }
        // Where nothing can be written, nothing is kept.
        let blocked = DigestCache::new(file.join("below a file"));
        assert!(blocked.put(&Disk, &stamp(1), &[1; 32]).is_err());
        assert_eq!(blocked.get(&Disk, &stamp(1)), None);
    }

    fn flipped(good: &[u8], at: usize) -> Vec<u8> {
        let mut bytes = good.to_vec();
        bytes[at] ^= 1 << (at % 8);
        bytes
    }
}
