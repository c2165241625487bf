//! What callers hold, and what stands between them and a panic.
//!
//! A handle is a key into one table, dressed as a pointer that nobody follows. Keys are not given twice, so
//! a handle that was freed finds nothing, in whatever thread and however late. A call takes its share of
//! the value from the table first: freeing it meanwhile takes nothing away from under the call.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, RwLock, TryLockError};

use crate::error::{ENGRAFT_BUSY, ENGRAFT_NOMEM, ENGRAFT_OK, ENGRAFT_PANIC, Failure, Result, remember};

/// Between two keys: keys look aligned, for tools that expect it of pointers.
const STEP: usize = 16;

/// A kind of handle: the type that C sees only the name of.
pub(crate) trait Kind: 'static {
    /// What is behind it.
    type Value: Send + Sync + 'static;
    /// What messages call it.
    const NAME: &'static str;

    /// Turns away the calls that have found it and not begun yet, for it is to be freed; false where one runs.
    fn close(_: &Self::Value) -> bool {
        true
    }
}

/// What a handle stands for.
pub(crate) struct Handle<V> {
    pub(crate) value: V,
    state: Arc<State>,
}

/// What handles of all kinds have.
#[derive(Default)]
struct State {
    poisoned: AtomicBool,
    /// Of the last call that failed.
    message: Mutex<String>,
}

#[derive(Clone)]
struct Entry {
    handle: Arc<dyn Any + Send + Sync>,
    state: Arc<State>,
}

static HANDLES: RwLock<BTreeMap<usize, Entry>> = RwLock::new(BTreeMap::new());
static NEXT: AtomicUsize = AtomicUsize::new(STEP);

/// Puts a value behind a new handle.
pub(crate) fn publish<K: Kind>(value: K::Value) -> Result<*mut K> {
    let key = NEXT.fetch_add(STEP, Ordering::Relaxed);
    let state = Arc::new(State::default());
    let handle = Arc::new(Handle { value, state: state.clone() });
    let mut table = HANDLES.write().unwrap_or_else(PoisonError::into_inner);
    // Keys have gone round: in 32 bits, after some hundred million handles.
    if key == 0 || table.contains_key(&key) {
        return Err(Failure::new(ENGRAFT_NOMEM, "no handle is left: restart the program"));
    }
    table.insert(key, Entry { handle, state });
    Ok(std::ptr::without_provenance_mut(key))
}

fn entry(key: usize) -> Option<Entry> {
    HANDLES.read().unwrap_or_else(PoisonError::into_inner).get(&key).cloned()
}

fn no_handle(key: usize, name: &str) -> Failure {
    let what = if key == 0 { "is NULL" } else { "was freed, or never was one" };
    Failure::misuse(format!("the {name} handle {what}"))
}

/// What a handle stands for, if it is a live one of this kind and unharmed.
pub(crate) fn find<K: Kind>(handle: *const K) -> Result<Arc<Handle<K::Value>>> {
    let key = handle.addr();
    let found = entry(key).ok_or_else(|| no_handle(key, K::NAME))?;
    let of_kind = found.handle.downcast::<Handle<K::Value>>();
    let found = of_kind.map_err(|_| Failure::misuse(format!("a handle that is no {}", K::NAME)))?;
    match found.state.poisoned.load(Ordering::Acquire) {
        false => Ok(found),
        true => Err(Failure::new(
            ENGRAFT_PANIC,
            format!("an earlier call on this {} met a defect of the library: free it", K::NAME),
        )),
    }
}

/// The same of a handle that may be NULL.
pub(crate) fn find_if_given<K: Kind>(handle: *const K) -> Result<Option<Arc<Handle<K::Value>>>> {
    if handle.is_null() { Ok(None) } else { find(handle).map(Some) }
}

/// The message that a handle of any kind keeps.
pub(crate) fn message_of(key: usize) -> Result<String> {
    let found = entry(key).ok_or_else(|| no_handle(key, "given"))?;
    Ok(found.state.message.lock().unwrap_or_else(PoisonError::into_inner).clone())
}

impl State {
    fn tell(&self, failure: &Failure) {
        self.message.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&failure.message);
    }
}

/// An export on a handle: `f` with what it stands for. A failure's message stays with the handle; a panic
/// poisons it. `name` is the export's own.
pub(crate) fn call<K: Kind>(
    name: &'static str,
    handle: *const K,
    f: impl FnOnce(&K::Value) -> Result<()>,
) -> i32 {
    quiet(|| {
        let found = find(handle)?;
        let done = caught(|| {
            inject(name);
            f(&found.value)
        });
        let done = done.unwrap_or_else(|panic| {
            found.state.poisoned.store(true, Ordering::Release);
            told(panic)
        });
        done.inspect_err(|failure| found.state.tell(failure))
    })
}

/// An export without a handle.
pub(crate) fn alone(name: &'static str, f: impl FnOnce() -> Result<()>) -> i32 {
    quiet(|| {
        inject(name);
        f()
    })
}

/// Frees a handle. NULL is nothing; a handle on which a call runs stays.
pub(crate) fn free<K: Kind>(name: &'static str, handle: *mut K) -> i32 {
    alone(name, || {
        let key = handle.addr();
        if key == 0 {
            return Ok(());
        }
        let found = entry(key).ok_or_else(|| no_handle(key, K::NAME))?;
        let of_kind = found.handle.downcast::<Handle<K::Value>>();
        let found = of_kind.map_err(|_| Failure::misuse(format!("a handle that is no {}", K::NAME)))?;
        if !K::close(&found.value) {
            let message = format!("a call runs on this {}: cancel it, and free it afterwards", K::NAME);
            return Err(Failure::new(ENGRAFT_BUSY, message));
        }
        let mut table = HANDLES.write().unwrap_or_else(PoisonError::into_inner);
        let removed = table.remove(&key);
        // What ends with it may take its time, and may free handles itself.
        drop(table);
        drop(removed.ok_or_else(|| no_handle(key, K::NAME))?);
        Ok(())
    })
}

/// Turns what comes of `f`, a panic too, into a code; a failure's message stays with the thread.
fn quiet(f: impl FnOnce() -> Result<()>) -> i32 {
    match caught(f).unwrap_or_else(told) {
        Ok(()) => ENGRAFT_OK,
        Err(failure) => {
            remember(&failure);
            failure.code
        }
    }
}

/// An export that asks about messages: a failure leaves none.
pub(crate) fn unheard(name: &'static str, f: impl FnOnce() -> Result<()>) -> i32 {
    let done = caught(|| {
        inject(name);
        f()
    });
    done.unwrap_or_else(told).map_or_else(|failure| failure.code, |()| ENGRAFT_OK)
}

// ---------------------------------------------------------------------------------------------------
// One call at a time

/// A value that one call at a time may use; another one is turned away, and nobody ever waits.
pub(crate) struct Exclusive<T> {
    /// None once it was closed.
    value: Mutex<Option<T>>,
}

/// The value of an [`Exclusive`], for as long as this lives.
pub(crate) struct Entered<'a, T>(MutexGuard<'a, Option<T>>);

impl<T> Deref for Entered<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().unwrap_or_else(|| unreachable!("whoever enters has looked"))
    }
}

impl<T> DerefMut for Entered<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().unwrap_or_else(|| unreachable!("whoever enters has looked"))
    }
}

impl<T> Exclusive<T> {
    pub(crate) fn new(value: T) -> Exclusive<T> {
        Exclusive { value: Mutex::new(Some(value)) }
    }

    /// The value, for as long as the guard lives.
    pub(crate) fn enter(&self) -> Result<Entered<'_, T>> {
        let guard = self.value.try_lock().map_err(|e| match e {
            TryLockError::WouldBlock => Failure::new(ENGRAFT_BUSY, "another call runs on this handle"),
            TryLockError::Poisoned(_) => {
                Failure::new(ENGRAFT_PANIC, "an earlier call met a defect of the library: free the handle")
            }
        })?;
        match guard.is_some() {
            true => Ok(Entered(guard)),
            false => Err(Failure::misuse("the handle was freed")),
        }
    }

    /// Lets no call in from now on, and ends the value here, threads and locks with it: what steers may hold the
    /// handle a little longer. False where a call is in.
    pub(crate) fn close(&self) -> bool {
        let ended = match self.value.try_lock() {
            Ok(mut guard) => guard.take(),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner().take(),
            Err(TryLockError::WouldBlock) => return false,
        };
        drop(ended);
        true
    }
}

// ---------------------------------------------------------------------------------------------------
// Panics

thread_local! {
    /// Calls of ours that this thread is in, one within another where a callback calls back.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
    /// Where the last panic of this thread was.
    static PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Counts a call of ours.
struct Inside;

impl Inside {
    fn enter() -> Inside {
        let _ = DEPTH.try_with(|depth| depth.set(depth.get() + 1));
        Inside
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let _ = DEPTH.try_with(|depth| depth.set(depth.get() - 1));
    }
}

/// What comes of `f`; a panic is the outer failure.
fn caught<T>(f: impl FnOnce() -> Result<T>) -> std::result::Result<Result<T>, Failure> {
    listen();
    let _inside = Inside::enter();
    catch_unwind(AssertUnwindSafe(f)).map_err(|payload| {
        // What is thrown could throw when it is dropped.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(payload)));
        let place = PLACE.try_with(|place| place.take()).unwrap_or_default();
        Failure::new(ENGRAFT_PANIC, format!("a defect of the library ended the call ({place}): report it"))
    })
}

/// Logs what was caught: not from within the panic, when what it unwinds may be locked still.
fn told<T>(panic: Failure) -> Result<T> {
    ::log::error!("{}", panic.message);
    Err(panic)
}

/// Lets panics of ours be told by code and log instead of on stderr. Others go where they went before.
fn listen() {
    static ONCE: Once = Once::new();
    if ONCE.is_completed() || std::thread::panicking() {
        return;
    }
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let is_worker = std::thread::current().name().is_some_and(|name| name.starts_with("engraft-"));
            if !is_worker && DEPTH.try_with(Cell::get).unwrap_or(0) == 0 {
                return before(info);
            }
            // The place alone: what a panic says may hold what it worked on.
            let place =
                info.location().map_or("nowhere known".into(), |l| format!("{}:{}", l.file(), l.line()));
            if is_worker {
                // Whoever waits for it learns of a panic, not of its place.
                ::log::error!("a panic at {place}");
            }
            let _ = PLACE.try_with(|last| last.replace(place));
        }));
    });
}

#[cfg(debug_assertions)]
static INJECTED: Mutex<String> = Mutex::new(String::new());

/// Panics where the name is the one that was asked for, once.
fn inject(name: &'static str) {
    #[cfg(debug_assertions)]
    {
        let mut asked = INJECTED.lock().unwrap_or_else(PoisonError::into_inner);
        if *asked == name {
            asked.clear();
            drop(asked);
            panic!("injected");
        }
    }
    #[cfg(not(debug_assertions))]
    let _ = name;
}

/// For tests: the next call of the function with this name panics behind its door. In no header, and only in
/// libraries with debug assertions.
#[cfg(debug_assertions)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_inject_panic(name: *const std::ffi::c_char, length: usize) -> i32 {
    alone("engraft_inject_panic", || {
        // SAFETY: the crate's contract, for the caller's text.
        let name = unsafe { crate::caller::text(name, length, "name") }?;
        *INJECTED.lock().unwrap_or_else(PoisonError::into_inner) = name.to_owned();
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{ENGRAFT_CANCELLED, ENGRAFT_MISUSE};

    struct Thing;
    struct Other;

    impl Kind for Thing {
        type Value = Exclusive<u32>;
        const NAME: &'static str = "thing";

        fn close(value: &Exclusive<u32>) -> bool {
            value.close()
        }
    }

    impl Kind for Other {
        type Value = ();
        const NAME: &'static str = "other";
    }

    fn thing() -> *mut Thing {
        publish(Exclusive::new(0)).unwrap()
    }

    #[test]
    fn only_live_handles_of_the_kind_are_taken() {
        let (a, b) = (thing(), thing());
        let ok = |handle: *mut Thing| call("test", handle, |_| Ok(()));
        assert_ne!(a, b);
        assert_eq!(ok(a), ENGRAFT_OK);
        assert_eq!(free("test", a), ENGRAFT_OK);
        assert_eq!((ok(a), free("test", a)), (ENGRAFT_MISUSE, ENGRAFT_MISUSE));
        assert_eq!(
            (ok(std::ptr::null_mut()), free::<Thing>("test", std::ptr::null_mut())),
            (ENGRAFT_MISUSE, 0)
        );
        assert_eq!(ok(std::ptr::without_provenance_mut(b.addr() + 1)), ENGRAFT_MISUSE);
        assert_eq!(call("test", b.cast::<Other>(), |()| Ok(())), ENGRAFT_MISUSE);
        assert_eq!(free("test", b.cast::<Other>()), ENGRAFT_MISUSE);
        assert_eq!(free("test", b), ENGRAFT_OK);
    }

    #[test]
    fn a_second_call_is_turned_away_and_the_first_goes_on() {
        let a = thing();
        let code = call("test", a, |value| {
            let mut inside = value.enter()?;
            assert_eq!(call("test", a, |value| value.enter().map(drop)), ENGRAFT_BUSY);
            let key = a.addr();
            let from_there = std::thread::spawn(move || {
                let a: *mut Thing = std::ptr::without_provenance_mut(key);
                (call("test", a, |value| value.enter().map(drop)), free("test", a))
            });
            assert_eq!(from_there.join().unwrap(), (ENGRAFT_BUSY, ENGRAFT_BUSY));
            *inside += 1;
            Ok(())
        });
        assert_eq!(code, ENGRAFT_OK);
        assert_eq!(call("test", a, |value| value.enter().map(|n| assert_eq!(*n, 1))), ENGRAFT_OK);
        assert_eq!(free("test", a), ENGRAFT_OK);
    }

    /// A call that has found its value when another thread frees the handle, and begins afterwards. What the
    /// value held has ended by then.
    #[test]
    fn what_was_freed_lets_no_late_call_in() {
        struct Holding;

        impl Kind for Holding {
            type Value = Exclusive<Arc<()>>;
            const NAME: &'static str = "holding";

            fn close(value: &Exclusive<Arc<()>>) -> bool {
                value.close()
            }
        }

        let held = Arc::new(());
        let a: *mut Holding = publish(Exclusive::new(held.clone())).unwrap();
        let code = call("test", a, |value| {
            assert_eq!(free("test", a), ENGRAFT_OK);
            assert_eq!(Arc::strong_count(&held), 1);
            value.enter().map(drop)
        });
        assert_eq!(code, ENGRAFT_MISUSE);
    }

    #[test]
    fn a_panic_poisons_and_messages_stay_with_the_handle() {
        let a = thing();
        let refused = call("test", a, |_| Err(Failure::cancelled("on purpose")));
        assert_eq!((refused, message_of(a.addr()).unwrap().as_str()), (ENGRAFT_CANCELLED, "on purpose"));
        let panicked = call("test", a, |value| {
            let _inside = value.enter()?;
            panic!("a secret")
        });
        assert_eq!(panicked, ENGRAFT_PANIC);
        let message = message_of(a.addr()).unwrap();
        assert!(message.contains("handle.rs:") && !message.contains("secret"), "{message}");
        assert_eq!(call("test", a, |_| Ok(())), ENGRAFT_PANIC);
        assert_eq!(free("test", a), ENGRAFT_OK);
        assert!(message_of(a.addr()).is_err());
    }
}
