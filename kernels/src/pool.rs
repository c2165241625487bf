//! A fixed pool of threads. Work is a number of independent items; each item computes its own
//! outputs in a fixed order, so results don't depend on how many threads share the items.
//!
//! Each thread starts with its own contiguous share, so an operation finds its rows in the cache of the core
//! that handled the same rows before. Threads that finish early take items from the others' shares.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// How often an idle worker polls for work before it sleeps: about 50 µs, longer than the serial code between
/// two products of a training step.
const SPINS: usize = 20_000;

type Job = &'static (dyn Fn(usize, usize) + Sync);

/// Starts a thread, or refuses.
pub(crate) type Start<'a> = dyn FnMut(usize, Box<dyn FnOnce() + Send>) -> Option<JoinHandle<()>> + 'a;

/// The state word: workers inside the job in the low bits, then whether it is open, then its number.
const OPEN: u64 = 1 << 16;
const INSIDE: u64 = OPEN - 1;
const NUMBER: u64 = 1 << 32;

struct Shared {
    /// A worker may join the job while it is open. The caller closes it and then waits only for those inside,
    /// so a worker the system hasn't scheduled delays nothing.
    state: AtomicU64,
    /// Written by the caller while the job is closed and no worker is inside; read by workers inside.
    job: UnsafeCell<Option<(Job, usize)>>,
    /// The next item of each thread's share.
    next: Vec<Share>,
    sleepers: AtomicUsize,
    bed: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
    panicked: AtomicBool,
}

/// Alone on its cache line, since its thread updates it constantly.
#[repr(align(64))]
#[derive(Default)]
struct Share(AtomicUsize);

// SAFETY: `job` is the only field that is not Sync; the protocol of `state` keeps its writer apart from
// its readers.
unsafe impl Sync for Shared {}

/// The pool; the calling thread is worker 0.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One job at a time: callers from several threads take turns.
    turn: Mutex<()>,
}

impl Pool {
    /// A pool of `threads` workers, including the caller (at least 1); fewer if the system refuses threads.
    pub fn new(threads: usize) -> Pool {
        Pool::started_by(threads, &mut |id, work| {
            let thread = std::thread::Builder::new().name(format!("engraft-{id}")).stack_size(512 * 1024);
            thread.spawn(work).ok()
        })
    }

    /// The same with workers started by `start`, which receives a worker's number and its work, and may refuse.
    pub(crate) fn started_by(threads: usize, start: &mut Start<'_>) -> Pool {
        let threads = threads.clamp(1, INSIDE as usize);
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next: (0..threads).map(|_| Share::default()).collect(),
            sleepers: AtomicUsize::new(0),
            bed: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
        });
        let mut workers = Vec::with_capacity(threads - 1);
        for _ in 1..threads {
            // Numbered by actual workers, so numbers stay below `threads()` whichever start fails.
            let (shared, id) = (shared.clone(), workers.len() + 1);
            // A system that refuses a thread leaves a smaller pool, not a failure.
            workers.extend(start(id, Box::new(move || worker(&shared, id))));
        }
        Pool { shared, workers, turn: Mutex::new(()) }
    }

    /// Workers, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(item, worker)` once for each item; returns when all are done.
    ///
    /// # Panics
    /// If `f` panicked in any worker.
    pub fn run<F: Fn(usize, usize) + Sync>(&self, items: usize, f: F) {
        if self.workers.is_empty() || items <= 1 {
            return (0..items).for_each(|i| f(i, 0));
        }
        let _turn = lock(&self.turn);
        let s = &*self.shared;
        let job: &(dyn Fn(usize, usize) + Sync) = &f;
        // SAFETY: the borrow is lengthened only for workers inside the job, and this call closes it and
        // waits until none is, also when `f` panics.
        let job: Job = unsafe { std::mem::transmute(job) };
        // SAFETY: the job is closed and nobody is inside: the last call left it so.
        unsafe { *s.job.get() = Some((job, items)) };
        for (i, share) in s.next.iter().enumerate() {
            share.0.store(first_of(i, items, s.next.len()), Ordering::Relaxed);
        }
        s.state.fetch_add(NUMBER | OPEN, Ordering::SeqCst);
        if s.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&s.bed));
            s.wake.notify_all();
        }
        let own = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| take_items(s, &f, items, 0)));
        s.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0usize;
        while s.state.load(Ordering::Acquire) & INSIDE != 0 {
            spins += 1;
            if spins > SPINS { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        let worker_panicked = s.panicked.swap(false, Ordering::Relaxed);
        if let Err(p) = own {
            std::panic::resume_unwind(p);
        }
        assert!(!worker_panicked, "a kernel worker panicked");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.bed));
        self.shared.wake.notify_all();
        for w in self.workers.drain(..) {
            // A worker's panic was reported by `run` already.
            let _ = w.join();
        }
    }
}

/// A mutex without data can't be left inconsistent by a panic.
fn lock(m: &Mutex<()>) -> MutexGuard<'_, ()> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

/// The first item of a share.
fn first_of(share: usize, items: usize, shares: usize) -> usize {
    share * items / shares
}

/// Runs the items of the worker's own share, then whatever is left of the others'.
fn take_items(s: &Shared, f: &(dyn Fn(usize, usize) + Sync), items: usize, worker: usize) {
    let shares = s.next.len();
    for share in (worker..shares).chain(0..worker) {
        let end = first_of(share + 1, items, shares);
        loop {
            let i = s.next[share].0.fetch_add(1, Ordering::Relaxed);
            if i >= end {
                break;
            }
            f(i, worker);
        }
    }
}

/// Joins the open job if it is not number `last`; returns its number.
fn join(s: &Shared, last: u64) -> Option<u64> {
    let mut state = s.state.load(Ordering::SeqCst);
    while state & OPEN != 0 && state / NUMBER != last {
        match s.state.compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return Some(state / NUMBER),
            Err(now) => state = now,
        }
    }
    None
}

/// Waits for a job to join; none when the pool ends.
fn next_job(s: &Shared, last: u64) -> Option<u64> {
    loop {
        for _ in 0..SPINS {
            if let Some(number) = join(s, last) {
                return Some(number);
            }
            if s.stop.load(Ordering::Relaxed) {
                return None;
            }
            std::hint::spin_loop();
        }
        let bed = lock(&s.bed);
        s.sleepers.fetch_add(1, Ordering::SeqCst);
        // Check again under the lock: a job opened earlier is seen here, and one opened later sees the sleeper
        // counted and wakes it.
        let job = join(s, last);
        if job.is_none() && !s.stop.load(Ordering::SeqCst) {
            drop(s.wake.wait(bed).unwrap_or_else(|e| e.into_inner()));
        }
        s.sleepers.fetch_sub(1, Ordering::SeqCst);
        if job.is_some() {
            return job;
        }
    }
}

fn worker(s: &Shared, id: usize) {
    let mut last = 0;
    while let Some(number) = next_job(s, last) {
        last = number;
        // SAFETY: this worker is inside the job, so the caller does not write it.
        if let Some((job, items)) = unsafe { *s.job.get() } {
            let run = std::panic::AssertUnwindSafe(|| take_items(s, job, items, id));
            if std::panic::catch_unwind(run).is_err() {
                s.panicked.store(true, Ordering::Relaxed);
            }
        }
        s.state.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn every_item_runs_once_in_every_job() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for items in (0..200).chain([1000, 1, 7]) {
                let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                pool.run(items, |i, w| {
                    assert!(w < threads);
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    const PATIENCE: Duration = Duration::from_secs(60);

    /// Whether every thread of the pool takes part in one job: each item waits until all have begun, so no thread
    /// can run two of them.
    fn all_take_part(pool: &Pool, patience: Duration) -> bool {
        let (inside, all_in, gave_up) = (Mutex::new(0), Condvar::new(), AtomicBool::new(false));
        pool.run(pool.threads(), |_, _| {
            let mut here = inside.lock().unwrap();
            *here += 1;
            all_in.notify_all();
            let waited = all_in.wait_timeout_while(here, patience, |here| *here < pool.threads()).unwrap();
            gave_up.fetch_or(waited.1.timed_out(), Ordering::Relaxed);
        });
        !gave_up.into_inner()
    }

    /// Starts a thread for a pool, or one that ends at once.
    fn start(work: Box<dyn FnOnce() + Send>, lives: bool) -> Option<JoinHandle<()>> {
        Some(std::thread::spawn(move || {
            if lives {
                work()
            }
        }))
    }

    #[test]
    fn sleeping_workers_wake() {
        let pool = Pool::new(3);
        for _ in 0..3 {
            let began = Instant::now();
            while pool.shared.sleepers.load(Ordering::SeqCst) < 2 {
                assert!(began.elapsed() < PATIENCE, "idle workers fall asleep");
                std::thread::yield_now();
            }
            assert!(all_take_part(&pool, PATIENCE));
        }
        let dead = Pool::started_by(3, &mut |id, work| start(work, id == 1));
        assert!(
            !all_take_part(&dead, Duration::from_millis(200)),
            "the check misses a worker that never wakes"
        );
    }

    #[test]
    fn refused_threads_leave_no_gap_in_the_numbers() {
        for refused in 1..8u32 {
            let mut asked = 0;
            let pool = Pool::started_by(4, &mut |_, work| {
                asked += 1;
                (refused >> (asked - 1) & 1 == 0).then(|| start(work, true))?
            });
            assert_eq!(pool.threads(), 4 - refused.count_ones() as usize);
            assert!(all_take_part(&pool, PATIENCE));
            let seen: Vec<AtomicUsize> = (0..pool.threads()).map(|_| AtomicUsize::new(0)).collect();
            pool.run(1000, |_, worker| {
                seen[worker].fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(seen.iter().map(|n| n.load(Ordering::Relaxed)).sum::<usize>(), 1000);
        }
    }

    #[test]
    fn panics_come_back_and_the_pool_goes_on() {
        let pool = Pool::new(3);
        let fails = std::panic::AssertUnwindSafe(|| pool.run(9, |i, _| assert!(i != 5, "five")));
        assert!(std::panic::catch_unwind(fails).is_err());
        assert!(all_take_part(&pool, PATIENCE));
    }
}
