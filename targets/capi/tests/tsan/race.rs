//! A data race, for tsan.sh to find: a tool that lets this pass proves nothing. It is a program of its own, since
//! no test may hold one; nothing else runs it.

struct Shared(*mut u64);

// SAFETY: none, as is the purpose: both threads below write through it at once.
unsafe impl Sync for Shared {}

fn main() {
    let mut number = 0_u64;
    let shared = Shared(&raw mut number);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let shared = &shared;
                for i in 0..1000 {
                    // SAFETY: the place outlives both threads. That both write is the race.
                    unsafe { shared.0.write_volatile(i) };
                }
            });
        }
    });
}
