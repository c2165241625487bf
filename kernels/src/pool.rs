//! A fixed pool of threads. Work is a number of independent items; each item computes its own
//! outputs in a fixed order, so results do not depend on how many threads share the items.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

/// How often an idle worker looks for work before it sleeps: about 50 µs, longer than the serial
/// stretches between two products of a training step.
const SPINS: usize = 20_000;

type Job = &'static (dyn Fn(usize, usize) + Sync);

struct Shared {
    /// Counts jobs; a worker runs when it differs from the last one it saw.
    epoch: AtomicUsize,
    job: Mutex<Option<(Job, usize)>>,
    wake: Condvar,
    next: AtomicUsize,
    /// Workers still inside the current job.
    busy: AtomicUsize,
    stop: AtomicBool,
    panicked: AtomicBool,
}

/// The pool; the calling thread is worker 0.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One job at a time: callers from several threads take turns.
    turn: Mutex<()>,
}

impl Pool {
    /// A pool of `threads` workers, the caller included (at least 1).
    pub fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            job: Mutex::new(None),
            wake: Condvar::new(),
            next: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
        });
        let workers = (1..threads.max(1))
            .filter_map(|w| {
                let shared = shared.clone();
                // A system that refuses a thread leaves a smaller pool, not a failure.
                std::thread::Builder::new()
                    .name(format!("engraft-{w}"))
                    .stack_size(512 * 1024)
                    .spawn(move || worker(&shared, w))
                    .ok()
            })
            .collect();
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
        if items == 0 {
            return;
        }
        if self.workers.is_empty() || items == 1 {
            (0..items).for_each(|i| f(i, 0));
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(|e| e.into_inner());
        let s = &*self.shared;
        let job: &(dyn Fn(usize, usize) + Sync) = &f;
        // SAFETY: the borrow is only lengthened for workers that this call waits for below (`busy`
        // falls to 0 even if one panics), so none uses it after `f` is gone.
        let job: Job = unsafe { std::mem::transmute(job) };
        s.next.store(0, Ordering::Relaxed);
        s.busy.store(self.workers.len(), Ordering::Relaxed);
        {
            let mut slot = s.job.lock().unwrap_or_else(|e| e.into_inner());
            *slot = Some((job, items));
            s.epoch.fetch_add(1, Ordering::Release);
        }
        s.wake.notify_all();
        let own = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| take_items(s, &f, items, 0)));
        let mut spins = 0usize;
        while s.busy.load(Ordering::Acquire) != 0 {
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
        {
            let _slot = self.shared.job.lock().unwrap_or_else(|e| e.into_inner());
            self.shared.stop.store(true, Ordering::Release);
            self.shared.epoch.fetch_add(1, Ordering::Release);
        }
        self.shared.wake.notify_all();
        for w in self.workers.drain(..) {
            // A worker's panic was reported by `run` already.
            let _ = w.join();
        }
    }
}

fn take_items(s: &Shared, f: &(dyn Fn(usize, usize) + Sync), items: usize, worker: usize) {
    loop {
        let i = s.next.fetch_add(1, Ordering::Relaxed);
        if i >= items {
            return;
        }
        f(i, worker);
    }
}

fn worker(s: &Shared, id: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while s.epoch.load(Ordering::Acquire) == seen && spins < SPINS {
            spins += 1;
            std::hint::spin_loop();
        }
        let (job, items) = {
            let mut slot = s.job.lock().unwrap_or_else(|e| e.into_inner());
            while s.epoch.load(Ordering::Acquire) == seen {
                slot = s.wake.wait(slot).unwrap_or_else(|e| e.into_inner());
            }
            seen = s.epoch.load(Ordering::Acquire);
            if s.stop.load(Ordering::Acquire) {
                return;
            }
            match *slot {
                Some(j) => j,
                None => continue,
            }
        };
        let run = std::panic::AssertUnwindSafe(|| take_items(s, job, items, id));
        if std::panic::catch_unwind(run).is_err() {
            s.panicked.store(true, Ordering::Relaxed);
        }
        s.busy.fetch_sub(1, Ordering::Release);
    }
}
