//! No clock decides what is newest: the times of files may say anything.

use std::fs::{File, FileTimes};
use std::path::Path;
use std::time::{Duration, SystemTime};

use engraft_runtime::gate::store::Store;
use engraft_runtime::run::Checkpoints;
use engraft_runtime::storage::Disk;

use super::device::Device;
use super::{checkpoints, store};

/// The device's files on the disk.
fn written(device: &Device, root: &Path) {
    for (path, content) in device.files() {
        let path = root.join(path.trim_start_matches('/'));
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(path, &content[..]).expect("writing");
    }
}

/// Gives every file and folder below `dir` the time that `time` makes of their order.
fn set_times(dir: &Path, time: &dyn Fn(u64) -> SystemTime, count: &mut u64) {
    let mut entries: Vec<_> =
        std::fs::read_dir(dir).expect("listing").map(|e| e.expect("an entry").path()).collect();
    entries.sort_unstable();
    for path in entries {
        if path.is_dir() {
            set_times(&path, time, count);
        }
        let times = FileTimes::new().set_modified(time(*count)).set_accessed(time(*count));
        File::open(&path).expect("opening").set_times(times).expect("setting its time");
        *count += 1;
    }
}

#[test]
fn the_times_of_files_decide_nothing() {
    let (begun, epoch) = (SystemTime::now(), SystemTime::UNIX_EPOCH);
    let day = |n: u64| Duration::from_secs(86_400 * n);
    let clocks: [(&str, &dyn Fn(u64) -> SystemTime); 4] = [
        ("1970", &|_| epoch),
        ("the future", &|_| begun + day(36_500)),
        ("backwards", &|n| begun - day(n)),
        ("jumps", &|n| if n % 2 == 0 { epoch + day(n) } else { begun + day(n) }),
    ];
    for (name, time) in clocks {
        let folder = tempfile::tempdir().expect("a folder");
        written(&store::rolled_back(), folder.path());
        written(&checkpoints::begun(), folder.path());
        let mut count = 0;
        set_times(folder.path(), time, &mut count);
        assert!(count > 20, "{count}");
        let held = Store::open(&Disk, &folder.path().join("s")).expect("the store");
        let active = || held.active().expect("a store").expect("an active generation");
        assert_eq!((active().generation.number, active().passed_over.len()), (2, 0), "{name}");
        let writer = held.writer().expect("the lock");
        assert_eq!(writer.prune(1).expect("pruning").removed, [3], "{name}");
        assert_eq!(writer.rollback().expect("rolling back").number, 1, "{name}");
        let newest = Checkpoints::open(&Disk, &folder.path().join("out/run")).expect("the folder");
        let newest = newest.newest_file(&Disk).expect("listing").expect("a checkpoint");
        assert!(newest.ends_with("checkpoint-00000002.engraft"), "{name}: {}", newest.display());
    }
}
