//! The file map: errors by name, and pages that stay clean.

use std::fs;

use engraft_runtime::ErrorKind;
use engraft_runtime::model::map::Map;
use engraft_runtime::model::weights::ModelFile;

use crate::common::writer::tiny;

#[test]
fn refuses_what_is_no_file_with_content() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty.gguf");
    fs::write(&empty, b"").unwrap();
    let missing = dir.path().join("missing.gguf");
    let cases = [
        (dir.path().to_path_buf(), ErrorKind::Misuse, "directory"),
        (empty, ErrorKind::Corrupt, "empty"),
        (missing, ErrorKind::Io, "opening"),
        #[cfg(unix)]
        ("/dev/null".into(), ErrorKind::Misuse, "regular"),
    ];
    for (path, kind, part) in cases {
        for e in [Map::open(&path).unwrap_err(), Map::read(&path).unwrap_err()] {
            assert_eq!(e.kind(), kind, "{e}");
            assert!(e.message().contains(part) && e.message().contains(path.to_str().unwrap()), "{e}");
        }
    }
}

#[test]
fn each_source_holds_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    let bytes = tiny().bytes();
    fs::write(&path, &bytes).unwrap();
    let len = bytes.len();
    let leaked: &'static [u8] = Box::leak(bytes.clone().into_boxed_slice());
    let maps = [
        (Map::open(&path).unwrap(), len, 0),
        (Map::read(&path).unwrap(), 0, len),
        (Map::from_vec("vec", bytes.to_vec()), 0, len),
        (Map::from_static("static", leaked), len, 0),
    ];
    let digest = ModelFile::open(&path).unwrap().digest();
    for (map, mapped, private) in maps {
        assert_eq!((map.mapped_bytes(), map.private_bytes()), (mapped, private), "{map:?}");
        assert_eq!(map.as_bytes(), leaked);
        assert_eq!(ModelFile::from_map(map).unwrap().digest(), digest);
    }
}

/// The base stays clean file pages: after every byte was read, none is private or dirty memory.
#[test]
#[cfg(target_os = "linux")]
fn no_page_is_dirtied() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("clean.gguf");
    fs::write(&path, tiny().bytes()).unwrap();
    let model = ModelFile::open(&path).unwrap();
    model.digest();
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = smaps.lines().skip_while(|l| !l.ends_with("clean.gguf"));
    let head = lines.next().expect("the model is mapped");
    assert!(head.contains(" r--p "), "read-only and private: {head}");
    // A page that was written through a private map becomes an anonymous one. (Private_Dirty would also
    // count pages that whoever wrote the file has not yet put on the disk.)
    let anonymous = lines.find(|l| l.starts_with("Anonymous:")).unwrap();
    assert!(anonymous.ends_with(" 0 kB"), "{anonymous}");
}
