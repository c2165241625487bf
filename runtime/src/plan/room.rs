//! How much private memory this process may use, according to the system: its own limits, those of its control
//! groups, and what the machine has left. A plan over the smallest is refused now rather than killed later.
//!
//! Formats: proc_pid_status(5), proc_pid_limits(5), proc_meminfo(5), cgroups(7), and the kernel's cgroup-v2.rst
//! and cgroup-v1/memory.rst. Only Linux and Android provide these.

use std::path::Path;

use super::{MemoryPlan, Request, mib};
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::model::ModelConfig;

/// Address space reserved per worker: its stack and the allocator's first chunk. If a limit counts reserved
/// rather than touched memory, the plan's bytes per thread are too few.
const RESERVED_PER_WORKER: u64 = (512 + 132) << 10;
/// The address space on 32-bit processors: Linux keeps a quarter of it for itself.
const ADDRESSES: Option<(u64, &str)> = if usize::BITS == 32 { Some((3 << 30, OWN_ADDRESSES)) } else { None };
const OWN_ADDRESSES: &str = "the 32-bit address space";

/// Address space the GNU allocator reserves per allocating thread, and how many threads besides the workers may
/// allocate. If address space is limited, the plan can't use this part.
const ARENA_BYTES: u64 = 64 << 20;
const OTHER_THREADS: u64 = 2;

/// A limit on the private memory of the whole process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes of private memory, including what the process already holds.
    pub bytes: u64,
    /// Who sets the limit, for people: "MemAvailable of /proc/meminfo".
    pub who: String,
}

impl Room {
    /// The smaller of the two; on a tie, `self`.
    #[must_use]
    pub fn or_less(self, other: Option<Room>) -> Room {
        match other {
            Some(other) if other.bytes < self.bytes => other,
            _ => self,
        }
    }
}

impl Room {
    /// Checks a plan against the limit.
    ///
    /// # Errors
    /// `DoesNotFit`, naming the limit, what is needed and what fits.
    pub fn hold(&self, plan: &MemoryPlan, c: &ModelConfig, r: &Request) -> Result<()> {
        plan.check(c, r, usize::try_from(self.bytes).unwrap_or(usize::MAX)).map_err(|e| beyond(e, self))
    }
}

/// The smallest limit on this process once it has `threads` threads; `None` if the system reports none.
pub fn here(threads: usize) -> Option<Room> {
    if !cfg!(any(target_os = "linux", target_os = "android")) {
        return None;
    }
    of(&read_file, threads)
}

fn read_file(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// The same, with `read` supplying the files under `/proc` and `/sys`.
pub fn of(read: &dyn Fn(&str) -> Option<String>, threads: usize) -> Option<Room> {
    let status = Status::read(read);
    let reserved = RESERVED_PER_WORKER * (threads as u64).saturating_sub(1);
    let mut rooms = Vec::new();
    let limits = read("/proc/self/limits").unwrap_or_default();
    if let Some(limit) = soft_limit(&limits, "Max data size") {
        let who = "RLIMIT_DATA (ulimit -d)".to_string();
        rooms.push(Room { bytes: limit.saturating_sub(reserved), who });
    }
    let addresses = soft_limit(&limits, "Max address space").map(|limit| (limit, "RLIMIT_AS (ulimit -v)"));
    for (limit, who) in addresses.into_iter().chain(ADDRESSES) {
        // This already includes the map and the program's own files. A value beyond the processor's address
        // space is an emulator's, not this process's.
        let own = if status.address_space > usize::MAX as u64 { 0 } else { status.address_space };
        let others = own.saturating_sub(status.private);
        let arenas = ARENA_BYTES * (threads as u64 + OTHER_THREADS);
        let bytes = limit.saturating_sub(others.saturating_add(reserved + arenas));
        rooms.push(Room { bytes, who: who.to_string() });
    }
    rooms.extend(groups(read, status.private));
    if let Some(available) = read("/proc/meminfo").and_then(|text| kib(&text, "MemAvailable")) {
        let who = "MemAvailable of /proc/meminfo".to_string();
        rooms.push(Room { bytes: available.saturating_add(status.private), who });
    }
    rooms.into_iter().min_by_key(|room| room.bytes)
}

/// Checks that the machine has room for further bytes of private memory, for work with this many threads.
/// `advice` says what would take less.
///
/// # Errors
/// `DoesNotFit`, naming the limit and what is needed, with the advice.
pub fn hold_bytes(further: usize, threads: usize, advice: Advice) -> Result<()> {
    let held = Status::read(&read_file).private;
    here(threads).map_or(Ok(()), |room| hold_within(&room, held, further, advice))
}

fn hold_within(room: &Room, held: u64, further: usize, advice: Advice) -> Result<()> {
    let need = held.saturating_add(further as u64);
    if need <= room.bytes {
        return Ok(());
    }
    let need = usize::try_from(need).unwrap_or(usize::MAX);
    let message = format!("{} of private memory are needed", mib(need));
    Err(beyond(Error::new(ErrorKind::DoesNotFit, message).advise(advice), room))
}

/// The error for exceeding a limit the caller didn't set.
fn beyond(error: Error, room: &Room) -> Error {
    let left = mib(usize::try_from(room.bytes).unwrap_or(usize::MAX));
    error.at(format!("{} leaves this process {left}", room.who))
}

/// What the process holds, in bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Status {
    private: u64,
    address_space: u64,
}

impl Status {
    fn read(read: &dyn Fn(&str) -> Option<String>) -> Status {
        let text = read("/proc/self/status").unwrap_or_default();
        let of = |name| kib(&text, name).unwrap_or(0);
        Status { private: of("RssAnon").saturating_add(of("VmSwap")), address_space: of("VmSize") }
    }
}

/// The limits of this process's control groups and their ancestors.
fn groups(read: &dyn Fn(&str) -> Option<String>, own: u64) -> Vec<Room> {
    let text = read("/proc/self/cgroup").unwrap_or_default();
    let mut rooms = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(group)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let (root, file, held): (_, _, &[&str]) = match controllers {
            "" => (
                "/sys/fs/cgroup",
                "memory.max",
                &["anon", "shmem", "slab_unreclaimable", "kernel_stack", "pagetables"],
            ),
            c if c.split(',').any(|c| c == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", &["total_rss", "total_shmem"])
            }
            _ => continue,
        };
        // A container may see its own group as the root, under its outside path.
        for folder in Path::new(group).ancestors() {
            let folder = format!("{root}{}", folder.display().to_string().trim_end_matches('/'));
            let path = format!("{folder}/{file}");
            // "max" or a missing file means no limit.
            let Some(limit) = read(&path).and_then(|text| text.trim().parse::<u64>().ok()) else { continue };
            let stat = read(&format!("{folder}/memory.stat")).unwrap_or_default();
            // File caches are evicted under pressure; other processes' memory is not.
            let held: u64 = held.iter().filter_map(|key| word(&stat, key)).fold(0, u64::saturating_add);
            let bytes = limit.saturating_sub(held.saturating_sub(own));
            rooms.push(Room { bytes, who: format!("the control group's {path}") });
        }
    }
    rooms
}

/// The soft limit of a line of `/proc/self/limits`; `None` where it is unlimited.
fn soft_limit(limits: &str, name: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// A value of `name: 12 kB`, in bytes.
fn kib(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// A value of `name 12`.
fn word(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const STATUS: (&str, &str) =
        ("/proc/self/status", "VmSize:\t 204800 kB\nRssAnon:\t 3072 kB\nVmSwap:\t 1024 kB\n");
    const MEMINFO: (&str, &str) = ("/proc/meminfo", "MemTotal: 99 kB\nMemAvailable:  102400 kB\n");

    fn limits(data: &str, address: &str) -> String {
        format!(
            "Limit  Soft  Hard  Units\nMax data size  {data}  unlimited  bytes\nMax address space  {address}  unlimited  bytes\n"
        )
    }

    /// The room where the system tells these files.
    fn told(files: &[(&str, &str)], threads: usize) -> Option<Room> {
        let read = |path: &str| files.iter().find(|(p, _)| *p == path).map(|(_, text)| (*text).to_string());
        of(&read, threads)
    }

    #[track_caller]
    fn assert_room(files: &[(&str, &str)], threads: usize, mib: u64, who: &str) {
        let room = told(files, threads).expect("a limit");
        assert!(room.who.contains(who), "{room:?}");
        assert_eq!(room.bytes, mib * MIB, "{room:?}");
    }

    #[test]
    fn a_system_that_tells_nothing_limits_nothing() {
        let told =
            |files: &[(&str, &str)], threads| told(files, threads).filter(|room| room.who != OWN_ADDRESSES);
        assert_eq!(told(&[], 4), None);
        let unlimited = limits("unlimited", "unlimited");
        assert_eq!(told(&[("/proc/self/limits", &unlimited), ("/proc/meminfo", "MemFree: 1 kB\n")], 4), None);
        assert_eq!(told(&[("/proc/self/cgroup", "0::/a\nbroken\n"), STATUS], 4), None);
    }

    #[test]
    fn what_is_held_already_counts_as_room() {
        assert_room(&[STATUS, MEMINFO], 1, 104, "MemAvailable");
    }

    #[test]
    fn limits_of_the_process_count_what_is_reserved() {
        let data = limits(&(50 * MIB).to_string(), "unlimited");
        assert_room(&[STATUS, MEMINFO, ("/proc/self/limits", &data)], 1, 50, "RLIMIT_DATA");
        let three = told(&[STATUS, ("/proc/self/limits", &data)], 3).expect("a limit");
        assert_eq!(three.bytes, 50 * MIB - 2 * RESERVED_PER_WORKER);
        // 200 MiB of addresses, of which 4 are private, and three arenas to come.
        let address = limits("unlimited", &(448 * MIB).to_string());
        assert_room(&[STATUS, MEMINFO, ("/proc/self/limits", &address)], 1, 60, "RLIMIT_AS");
        let less = limits("unlimited", &MIB.to_string());
        assert_room(&[STATUS, ("/proc/self/limits", &less)], 1, 0, "RLIMIT_AS");
    }

    #[test]
    fn control_groups_are_asked_up_to_the_root() {
        let (max, stat) = ((80 * MIB).to_string(), format!("anon {}\nfile 99999999999\n", 30 * MIB));
        let v2 = [
            STATUS,
            MEMINFO,
            ("/proc/self/cgroup", "0::/user/app\n"),
            ("/sys/fs/cgroup/user/app/memory.max", "max\n"),
            ("/sys/fs/cgroup/user/memory.max", &max),
            ("/sys/fs/cgroup/user/memory.stat", &stat),
        ];
        // Of the 30 held, 4 are our own.
        assert_room(&v2, 1, 54, "/sys/fs/cgroup/user/memory.max");
        let stat = format!("rss 5\ntotal_rss {}\n", 4 * MIB);
        let v1 = [
            STATUS,
            MEMINFO,
            ("/proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/docker/x\n0::/\n"),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", &max),
            ("/sys/fs/cgroup/memory/memory.stat", &stat),
            ("/sys/fs/cgroup/a/memory.max", "1"),
        ];
        assert_room(&v1, 1, 80, "memory.limit_in_bytes");
    }

    #[test]
    fn bytes_are_held_against_this_machine() {
        assert!(hold_bytes(0, 1, Advice::ShorterContext).is_ok());
        let refused = hold_bytes(usize::MAX, 1, Advice::ShorterContext);
        assert_eq!(refused.is_err(), here(1).is_some());
        let named =
            |e: &Error| e.kind() == ErrorKind::DoesNotFit && e.advice() == Some(&Advice::ShorterContext);
        assert!(refused.as_ref().err().is_none_or(named), "{refused:?}");
        // What is held counts as room, and as need.
        let (room, held) = (told(&[STATUS, MEMINFO], 1).expect("a limit"), 4 * MIB);
        assert!(hold_within(&room, held, 100 << 20, Advice::SmallerModel).is_ok());
        assert!(hold_within(&room, held, (100 << 20) + 1, Advice::SmallerModel).is_err());
    }

    #[test]
    fn this_machine_tells_something() {
        let room = here(2);
        assert_eq!(room.is_some(), cfg!(any(target_os = "linux", target_os = "android")));
        assert!(room.is_none_or(|room| room.bytes > MIB && !room.who.is_empty()));
    }
}
