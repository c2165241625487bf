//! Power cuts and failing devices, below everything that the runtime writes: an acknowledged state is never
//! lost, nothing torn is ever taken, and what cannot be written leaves what was there before.
//!
//! The model of the device is in `device`, what is done to it in `harness`. The writers in `broken` each
//! make one known mistake, and devices that forget a duty make another: all must be caught.
//!
//! ```text
//! cargo test --workspace --test runtime -- --ignored --nocapture crash::    # the long run
//! ```

mod broken;
mod checkpoints;
mod clock;
mod device;
mod harness;
mod store;
mod workloads;

use std::collections::BTreeMap;
use std::time::Instant;

use device::{Fault, Lie};
use harness::{Effort, Tally, cut_everywhere, fail_everywhere, lied_to};

const SHORT: Effort = Effort { states: 200, recovered: 12, again: 4, seed: 1 };

/// Cuts every workload, and tells what came of each.
fn cut_all(effort: Effort) -> Tally {
    let mut total = Tally::default();
    for workload in workloads::all() {
        let (begun, tally) = (Instant::now(), cut_everywhere(&workload, effort));
        let seconds = begun.elapsed().as_secs_f64();
        eprintln!(
            "{}: {} operations cut, {} states, {} violations, {seconds:.1} s",
            workload.name,
            tally.cuts,
            tally.states,
            tally.wrong.len()
        );
        total.add(tally);
    }
    eprintln!("{effort:?}: {} crash states, {} violations", total.states, total.wrong.len());
    total
}

#[test]
fn no_cut_loses_what_was_acknowledged() {
    let total = cut_all(SHORT);
    assert!(total.wrong.is_empty(), "{} of {}: {}", total.wrong.len(), total.states, total.wrong[0]);
    assert!(total.states >= 10_000, "{}", total.states);
}

#[test]
#[ignore = "takes minutes; see the top of this file"]
fn no_cut_loses_what_was_acknowledged_at_length() {
    let mut total = Tally::default();
    for seed in 2.. {
        total.add(cut_all(Effort { states: 40, recovered: 3, again: 4, seed }));
        if total.states >= 200_000 {
            break;
        }
    }
    eprintln!("{} crash states in all", total.states);
    assert!(total.wrong.is_empty(), "{} of {}: {}", total.wrong.len(), total.states, total.wrong[0]);
}

#[test]
fn broken_writers_are_caught() {
    let effort = Effort { recovered: 0, ..SHORT };
    let control = cut_everywhere(&broken::control(), effort);
    assert!(control.wrong.is_empty(), "{}", control.wrong[0]);
    let writers = broken::all();
    assert_eq!(writers.len(), 6);
    for workload in writers {
        let tally = cut_everywhere(&workload, effort);
        eprintln!("{}: {} of {} states are wrong", workload.name, tally.wrong.len(), tally.states);
        assert!(!tally.wrong.is_empty(), "{} is not caught", workload.name);
    }
}

/// What the runtime writes through a device that forgets: each workload that acknowledges must fail.
#[test]
fn devices_that_forget_are_caught() {
    let effort = Effort { states: 20, recovered: 0, ..SHORT };
    for lie in [Lie::FileSync, Lie::DirSync] {
        for workload in workloads::all() {
            let may_lose = workload.expected.windows(2).all(|pair| pair[0] == pair[1])
                || lie == Lie::FileSync && !workload.writes();
            let workload = lied_to(workload, lie);
            let tally = cut_everywhere(&workload, effort);
            eprintln!("{lie:?}, {}: {} of {} wrong", workload.name, tally.wrong.len(), tally.states);
            assert!(may_lose || !tally.wrong.is_empty(), "{lie:?}: {} is not caught", workload.name);
        }
    }
}

#[test]
fn whatever_call_fails_the_state_before_or_after_is_whole() {
    let mut counts = BTreeMap::new();
    for workload in workloads::all() {
        for fault in Fault::ALL {
            for lasting in [false, true] {
                // The standard library repeats interrupted reads and writes for as long as it takes.
                if lasting && fault == Fault::Interrupted {
                    continue;
                }
                let tally = fail_everywhere(&workload, fault, lasting, 3);
                assert!(
                    tally.wrong.is_empty(),
                    "{} of {}: {}",
                    tally.wrong.len(),
                    tally.states,
                    tally.wrong[0]
                );
                let count: &mut (usize, usize) = counts.entry(format!("{fault:?}")).or_default();
                *count = (count.0 + tally.cuts, count.1 + tally.states);
            }
        }
    }
    for (fault, (calls, states)) in counts {
        eprintln!("{fault}: {calls} calls failed, {states} states");
        assert!(calls > 50, "{fault}");
    }
}

/// A failed sync is answered with another file, once; a folder that could not be made durable is refused.
#[test]
fn a_failed_sync_is_answered_with_another_file() {
    let workload = workloads::save_over();
    for (sync, lasting, answered) in [(1, false, false), (2, false, true), (3, false, true), (2, true, false)]
    {
        let device = workload.start.fork(usize::MAX);
        device.fail(Fault::Unsynced, sync, lasting);
        assert_eq!(workload.steps[0](&device).is_ok(), answered, "sync {sync}");
        assert!(device.mend());
        assert_eq!(device.files().len(), 1, "sync {sync}");
    }
}
