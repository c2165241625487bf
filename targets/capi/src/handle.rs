//! The handles that callers hold, and the barrier that keeps panics from them.
//!
//! A handle is a key into one table, in the form of a pointer that nobody follows. Keys are never reused, so a
//! freed handle finds nothing, in any thread and however late. A call first takes a share of the value from
//! the table, so freeing the handle meanwhile doesn't affect it.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, RwLock, TryLockError};

use crate::error::{ENGRAFT_BUSY, ENGRAFT_NOMEM, ENGRAFT_OK, ENGRAFT_PANIC, Failure, Result, remember};

/// Distance between keys. It makes keys look aligned, for tools that expect this of pointers.
const STEP: usize = 16;

/// A kind of handle: a type of which C sees only the name.
pub(crate) trait Kind: 'static {
    /// The value behind it.
    type Value: Send + Sync + 'static;
    /// Its name in messages.
    const NAME: &'static str;

    /// Before freeing, turns away calls that have found it but not begun yet. False if one is running.
    fn close(_: &Self::Value) -> bool {
        true
    }
}

/// Declares a [`Kind`], with its value and its name. If calls have a part of the value to themselves, it is the last.
macro_rules! kind {
    ($kind:ident, $value:ty, $name:literal $(, $exclusive:ident)?) => {
        impl $crate::handle::Kind for $kind {
            type Value = $value;
            const NAME: &'static str = $name;

            $(fn close(value: &$value) -> bool {
                value.$exclusive.close()
            })?
        }
    };
}
pub(crate) use kind;

/// The value behind a handle, with its state.
pub(crate) struct Handle<V> {
    pub(crate) value: V,
    state: Arc<State>,
}

/// The state that handles of all kinds have.
#[derive(Default)]
struct State {
    poisoned: AtomicBool,
    /// The message of the last failed call.
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
    // Keys have wrapped around: with 32 bits, after some hundred million handles.
    if key == 0 || table.contains_key(&key) {
        return Err(Failure::new(ENGRAFT_NOMEM, "no handles are left; restart the program"));
    }
    table.insert(key, Entry { handle, state });
    Ok(std::ptr::without_provenance_mut(key))
}

fn entry(key: usize) -> Option<Entry> {
    HANDLES.read().unwrap_or_else(PoisonError::into_inner).get(&key).cloned()
}

fn no_handle(key: usize, name: &str) -> Failure {
    let what = if key == 0 { "is NULL" } else { "was freed or never existed" };
    Failure::misuse(format!("the {name} handle {what}"))
}

/// The value behind a key, if it is live and of this kind.
fn of_kind<K: Kind>(key: usize) -> Result<Arc<Handle<K::Value>>> {
    let found = entry(key).ok_or_else(|| no_handle(key, K::NAME))?;
    let of_kind = found.handle.downcast::<Handle<K::Value>>();
    of_kind.map_err(|_| Failure::misuse(format!("the handle isn't a {} handle", K::NAME)))
}

/// The value behind a handle, if it is live, of this kind and not poisoned.
pub(crate) fn find<K: Kind>(handle: *const K) -> Result<Arc<Handle<K::Value>>> {
    let found = of_kind::<K>(handle.addr())?;
    match found.state.poisoned.load(Ordering::Acquire) {
        false => Ok(found),
        true => Err(Failure::new(
            ENGRAFT_PANIC,
            format!("an earlier call on this {} hit a bug in the library; free it", K::NAME),
        )),
    }
}

/// The same for a handle that may be NULL.
pub(crate) fn find_if_given<K: Kind>(handle: *const K) -> Result<Option<Arc<Handle<K::Value>>>> {
    if handle.is_null() { Ok(None) } else { find(handle).map(Some) }
}

/// The message kept by a handle of any kind.
pub(crate) fn message_of(key: usize) -> Result<String> {
    let found = entry(key).ok_or_else(|| no_handle(key, "given"))?;
    Ok(found.state.message.lock().unwrap_or_else(PoisonError::into_inner).clone())
}

impl State {
    fn tell(&self, failure: &Failure) {
        self.message.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&failure.message);
    }
}

/// Runs an export on a handle: calls `f` with the value behind it. The handle keeps a failure's message; a panic
/// poisons it. `name` is the export's name.
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

/// The same for what can't fail.
pub(crate) fn tell<K: Kind>(name: &'static str, handle: *const K, f: impl FnOnce(&K::Value)) -> i32 {
    call(name, handle, |value| {
        f(value);
        Ok(())
    })
}

/// Runs an export without a handle.
pub(crate) fn alone(name: &'static str, f: impl FnOnce() -> Result<()>) -> i32 {
    quiet(|| {
        inject(name);
        f()
    })
}

/// Frees a handle. Does nothing for NULL, and refuses while a call runs on it.
pub(crate) fn free<K: Kind>(name: &'static str, handle: *mut K) -> i32 {
    alone(name, || {
        let key = handle.addr();
        if key == 0 {
            return Ok(());
        }
        let found = of_kind::<K>(key)?;
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

/// Turns the result of `f`, including a panic, into a code. The thread keeps a failure's message.
fn quiet(f: impl FnOnce() -> Result<()>) -> i32 {
    match caught(f).unwrap_or_else(told) {
        Ok(()) => ENGRAFT_OK,
        Err(failure) => {
            remember(&failure);
            failure.code
        }
    }
}

/// Runs an export that reads messages. A failure leaves no message.
pub(crate) fn unheard(name: &'static str, f: impl FnOnce() -> Result<()>) -> i32 {
    let done = caught(|| {
        inject(name);
        f()
    });
    done.unwrap_or_else(told).map_or_else(|failure| failure.code, |()| ENGRAFT_OK)
}

// ---------------------------------------------------------------------------------------------------
// One call at a time

/// A value that one call at a time may use. Another call is turned away, so nobody ever waits.
pub(crate) struct Exclusive<T> {
    /// None once closed.
    value: Mutex<Option<T>>,
}

/// The value of an [`Exclusive`], for as long as this lives.
pub(crate) struct Entered<'a, T>(MutexGuard<'a, Option<T>>);

impl<T> Deref for Entered<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().unwrap_or_else(|| unreachable!("entering checked this"))
    }
}

impl<T> DerefMut for Entered<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().unwrap_or_else(|| unreachable!("entering checked this"))
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
                Failure::new(ENGRAFT_PANIC, "an earlier call hit a bug in the library; free the handle")
            }
        })?;
        match guard.is_some() {
            true => Ok(Entered(guard)),
            false => Err(Failure::misuse("the handle was freed")),
        }
    }

    /// Lets no more calls in, and drops the value now, with its threads and locks: functions that steer may hold the
    /// handle a little longer. False if a call is inside.
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
    /// How many of our calls this thread is in; they nest if a callback calls back.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
    /// Where this thread last panicked.
    static PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Counts one of our calls.
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

/// The result of `f`; a panic becomes the outer failure.
fn caught<T>(f: impl FnOnce() -> Result<T>) -> std::result::Result<Result<T>, Failure> {
    listen();
    let _inside = Inside::enter();
    catch_unwind(AssertUnwindSafe(f)).map_err(|payload| {
        // The payload could panic when it is dropped.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(payload)));
        let place = PLACE.try_with(|place| place.take()).unwrap_or_default();
        Failure::new(
            ENGRAFT_PANIC,
            format!("a bug in the library ended the call ({place}); please report it"),
        )
    })
}

/// Logs a caught panic. Not done during the panic, when what it unwinds may still be locked.
fn told<T>(panic: Failure) -> Result<T> {
    ::log::error!("{}", panic.message);
    Err(panic)
}

/// Reports our panics by code and log instead of on stderr. Other panics go to the previous hook.
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
            // Only the place: a panic's message may contain user data.
            let place =
                info.location().map_or("unknown place".into(), |l| format!("{}:{}", l.file(), l.line()));
            if is_worker {
                // Those who wait for this thread learn of the panic, but not of its place.
                ::log::error!("a panic at {place}");
            }
            let _ = PLACE.try_with(|last| last.replace(place));
        }));
    });
}

#[cfg(debug_assertions)]
static INJECTED: Mutex<String> = Mutex::new(String::new());

/// Panics once if the name was requested.
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

/// For tests: makes the next call of the function with this name panic. Not in the header, and only in libraries
/// with debug assertions.
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

    /// A call finds its value, another thread frees the handle, and only then the call begins. By then the value
    /// has been dropped.
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
