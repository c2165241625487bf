//! Every export turns a panic into its code, refuses NULL and freed handles, and survives arguments that are all
//! zero. The table is compared with the header, so that none is left out.

use std::collections::BTreeSet;
use std::ffi::{CString, c_char};
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut, without_provenance, without_provenance_mut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use engraft::error::{ENGRAFT_MISUSE, ENGRAFT_OK, ENGRAFT_PANIC};
use engraft::{adapter, data, error, gate, handle, log, model, plan, session, store, trainer};

/// An export's first argument.
#[derive(Clone, Copy, Debug, PartialEq)]
enum First {
    NoHandle,
    Model,
    Data,
    Plan,
    Adapter,
    Slot,
    Trainer,
    Gate,
    Session,
    Store,
}

/// An export: its name, its first argument, and a call with that handle and zeros for the rest.
struct Export {
    name: &'static str,
    first: First,
    call: fn(usize) -> i32,
}

/// An argument: a handle's key if it comes first, otherwise zero.
trait Argument {
    fn of(key: usize) -> Self;
}

impl<T> Argument for *const T {
    fn of(key: usize) -> Self {
        without_provenance(key)
    }
}

impl<T> Argument for *mut T {
    fn of(key: usize) -> Self {
        without_provenance_mut(key)
    }
}

impl<F> Argument for Option<F> {
    fn of(_: usize) -> Self {
        None
    }
}

macro_rules! numbers {
    ($($number:ty)+) => {$(
        impl Argument for $number {
            fn of(_: usize) -> Self {
                0
            }
        }
    )+};
}
numbers!(i32 u32 u64 usize);

/// A function of C that returns a code.
trait Callable {
    fn call(self, key: usize) -> i32;
}

macro_rules! callables {
    ($(($first:ident $($rest:ident)*))+) => {$(
        impl<$first: Argument, $($rest: Argument),*> Callable
            for unsafe extern "C" fn($first, $($rest),*) -> i32
        {
            fn call(self, key: usize) -> i32 {
                // SAFETY: numbers are zero and pointers NULL, but for the first one, which is the number of
                // a handle where it is not NULL; nothing is read or written through it.
                unsafe { self($first::of(key), $($rest::of(0)),*) }
            }
        }
    )+};
}
callables!((A)(A B)(A B C)(A B C D)(A B C D E)(A B C D E F)(A B C D E F G)(A B C D E F G H)(A B C D E F G H I));

/// The function as a pointer, whose type has its arguments.
macro_rules! exports {
    ($($first:ident: $($module:ident::$name:ident($($any:tt),+))+;)+) => {
        const EXPORTS: &[Export] = &[$($(Export {
            name: stringify!($name),
            first: First::$first,
            call: |key| ($module::$name as unsafe extern "C" fn($($any),+) -> i32).call(key),
        }),+),+];
    };
}

exports! {
    NoHandle:
        engraft::engraft_version(_, _, _)
        error::engraft_message(_, _, _, _)
        log::engraft_log_set(_, _, _)
        model::engraft_model_default_params(_, _)
        model::engraft_model_open(_, _, _, _)
        data::engraft_data_default_params(_, _)
        plan::engraft_train_default_params(_, _)
        adapter::engraft_adapter_default_params(_, _)
        adapter::engraft_slot_create(_)
        gate::engraft_gate_default_params(_, _)
        session::engraft_session_default_params(_, _)
        session::engraft_generate_default_params(_, _)
        store::engraft_store_default_params(_, _)
        store::engraft_store_open(_, _, _, _);
    Model:
        model::engraft_model_free(_)
        model::engraft_model_get_info(_, _)
        model::engraft_model_name(_, _, _, _)
        model::engraft_model_digest(_, _)
        model::engraft_model_trim(_)
        data::engraft_data_open(_, _, _, _, _)
        data::engraft_data_from_memory(_, _, _, _, _, _, _, _, _)
        plan::engraft_plan_create(_, _, _, _)
        plan::engraft_session_bytes(_, _, _, _)
        trainer::engraft_trainer_create(_, _, _, _)
        gate::engraft_gate_create(_, _, _, _)
        adapter::engraft_adapter_load(_, _, _, _, _)
        session::engraft_session_create(_, _, _, _);
    Data:
        data::engraft_data_free(_)
        data::engraft_data_get_info(_, _)
        data::engraft_data_skipped(_, _, _, _, _);
    Plan:
        plan::engraft_plan_free(_)
        plan::engraft_plan_get_info(_, _)
        plan::engraft_plan_pool(_, _, _, _, _, _)
        plan::engraft_plan_advice(_, _, _, _);
    Adapter:
        adapter::engraft_adapter_free(_)
        adapter::engraft_adapter_get_info(_, _)
        adapter::engraft_adapter_save(_, _, _, _);
    Slot:
        adapter::engraft_slot_free(_)
        adapter::engraft_slot_swap(_, _, _);
    Trainer:
        trainer::engraft_trainer_free(_)
        trainer::engraft_trainer_step(_, _)
        trainer::engraft_trainer_run(_, _, _, _)
        trainer::engraft_trainer_evaluate(_, _)
        trainer::engraft_trainer_progress(_, _)
        trainer::engraft_trainer_save(_, _, _)
        trainer::engraft_trainer_checkpoint(_, _, _)
        trainer::engraft_trainer_restore(_, _, _)
        trainer::engraft_trainer_adapter(_, _)
        trainer::engraft_trainer_cancel(_)
        trainer::engraft_trainer_pause(_)
        trainer::engraft_trainer_resume(_)
        trainer::engraft_trainer_set_thermal(_, _);
    Gate:
        gate::engraft_gate_free(_)
        gate::engraft_gate_run(_, _, _)
        gate::engraft_gate_decision(_, _, _, _, _)
        gate::engraft_gate_verdict(_, _, _, _)
        gate::engraft_gate_report(_, _, _, _)
        gate::engraft_gate_adapter(_, _)
        gate::engraft_gate_cancel(_)
        gate::engraft_gate_pause(_)
        gate::engraft_gate_resume(_)
        gate::engraft_gate_set_thermal(_, _);
    Session:
        session::engraft_session_free(_)
        session::engraft_session_set_adapter(_, _)
        session::engraft_session_follow(_, _)
        session::engraft_session_generate(_, _, _, _, _, _, _)
        session::engraft_session_cancel(_)
        session::engraft_session_reset(_)
        session::engraft_session_trim(_);
    Store:
        store::engraft_store_free(_)
        store::engraft_store_promote(_, _, _)
        store::engraft_store_promote_adapter(_, _, _, _, _)
        store::engraft_store_active(_, _)
        store::engraft_store_load(_, _, _, _)
        store::engraft_store_rollback(_, _)
        store::engraft_store_activate(_, _)
        store::engraft_store_prune(_, _, _)
        store::engraft_store_list(_, _, _, _);
}

/// Exports that accept all zeros: a text without room, no callback.
const CONTENT: [&str; 3] = ["engraft_version", "engraft_message", "engraft_log_set"];

impl Export {
    fn frees(&self) -> bool {
        self.name.ends_with("_free")
    }
}

// ---------------------------------------------------------------------------------------------------
// Handles to call them on

/// Inputs for making handles.
struct World {
    _alone: MutexGuard<'static, ()>,
    folder: tempfile::TempDir,
    model: *mut model::Model,
    data: *mut data::Data,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn text(path: &Path) -> CString {
    CString::new(path.to_str().expect("a path in UTF-8")).expect("a path without NUL")
}

fn ok(code: i32) {
    assert_eq!(code, ENGRAFT_OK, "{}", message(0));
}

/// The message of a handle, or for 0 of this thread.
fn message(key: usize) -> String {
    let (mut buffer, mut length) = ([0u8; 1024], 0);
    // SAFETY: the buffer has as many bytes as is said.
    let code = unsafe {
        error::engraft_message(without_provenance(key), buffer.as_mut_ptr().cast(), buffer.len(), &mut length)
    };
    assert_eq!(code, ENGRAFT_OK);
    String::from_utf8(buffer[..length].to_vec()).expect("a message in UTF-8")
}

impl World {
    fn new() -> World {
        // One test at a time: an injected panic would meet whoever calls next.
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut world = World { _alone: alone, folder, model: null_mut(), data: null_mut() };
        world.model = without_provenance_mut(world.open_model());
        let path = text(&root().join("targets/cli/demo/private_train.jsonl"));
        // SAFETY: the text has the length that is said, and the place is one of ours.
        ok(unsafe {
            let length = path.count_bytes();
            data::engraft_data_open(world.model, path.as_ptr(), length, null(), &mut world.data)
        });
        world
    }

    fn open_model(&self) -> usize {
        let path = text(&root().join("targets/cli/seedling.gguf"));
        let mut made = null_mut();
        // SAFETY: the text has the length that is said, and the place is one of ours.
        ok(unsafe { model::engraft_model_open(path.as_ptr(), path.count_bytes(), null(), &mut made) });
        made.addr()
    }

    fn open_data(&self) -> usize {
        let rows = std::fs::read(root().join("targets/cli/demo/private_train.jsonl")).expect("the rows");
        let mut made = null_mut();
        // SAFETY: the rows have the length that is said, and the place is one of ours.
        ok(unsafe {
            let (at, length, none) = (rows.as_ptr(), rows.len(), null());
            data::engraft_data_from_memory(self.model, at, length, none, 0, none, 0, null(), &mut made)
        });
        made.addr()
    }

    fn open_store(&self) -> usize {
        let path = text(&self.folder.path().join("store"));
        let mut made = null_mut();
        // SAFETY: the text has the length that is said, and the place is one of ours.
        ok(unsafe { store::engraft_store_open(path.as_ptr(), path.count_bytes(), null(), &mut made) });
        made.addr()
    }

    /// A trainer of a few steps, or its plan.
    fn train_params(&self) -> plan::TrainParams {
        let mut params = std::mem::MaybeUninit::<plan::TrainParams>::uninit();
        let size = size_of::<plan::TrainParams>();
        // SAFETY: the struct has the size that is said, and is filled if the code is 0.
        let mut params = unsafe {
            ok(plan::engraft_train_default_params(params.as_mut_ptr(), size));
            params.assume_init()
        };
        (params.steps, params.rank, params.threads) = (1, 1, 1);
        params
    }

    /// A new handle of a kind.
    fn make(&self, first: First) -> usize {
        let (model, data) = (self.model, self.data);
        let params = self.train_params();
        // SAFETY: the places and structs are ours, and everything else is NULL.
        unsafe {
            match first {
                First::NoHandle => 0,
                First::Model => self.open_model(),
                First::Data => self.open_data(),
                First::Store => self.open_store(),
                First::Plan => made(|out| plan::engraft_plan_create(model, data, &params, out)),
                First::Trainer => made(|out| trainer::engraft_trainer_create(model, data, &params, out)),
                First::Gate => made(|out| gate::engraft_gate_create(model, data, null(), out)),
                First::Session => made(|out| session::engraft_session_create(model, null(), null(), out)),
                First::Slot => made(|out| adapter::engraft_slot_create(out)),
                First::Adapter => {
                    let trainer = self.make(First::Trainer);
                    let at = without_provenance_mut::<trainer::Trainer>(trainer);
                    let made = made(|out| trainer::engraft_trainer_adapter(at, out));
                    ok(trainer::engraft_trainer_free(at));
                    made
                }
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        free(First::Data, self.data.addr());
        free(First::Model, self.model.addr());
    }
}

/// The number of the handle made by `make`.
fn made<T>(make: impl FnOnce(*mut *mut T) -> i32) -> usize {
    let mut place = null_mut();
    ok(make(&mut place));
    assert!(!place.is_null());
    place.addr()
}

fn free(first: First, key: usize) -> i32 {
    let export = EXPORTS.iter().find(|export| export.first == first && export.frees());
    export.map_or(ENGRAFT_OK, |export| (export.call)(key))
}

#[cfg(debug_assertions)]
fn inject(name: &str) {
    // SAFETY: the text has the length that is said.
    ok(unsafe { handle::engraft_inject_panic(name.as_ptr().cast::<c_char>(), name.len()) });
}

// ---------------------------------------------------------------------------------------------------

#[test]
fn the_table_has_every_export() {
    let header = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("include/engraft.h"));
    let header = header.expect("reading the header");
    let told: BTreeSet<&str> =
        header.lines().filter_map(|line| Some(line.strip_prefix("int32_t ")?.split_once('(')?.0)).collect();
    let ours: BTreeSet<&str> = EXPORTS.iter().map(|export| export.name).collect();
    assert!(ours.len() > 60, "{}", ours.len());
    assert_eq!(ours, told);
    // The one without a code; it can't fail.
    assert_eq!(engraft::engraft_abi_version(), engraft::ENGRAFT_ABI_VERSION);
}

/// Without debug assertions nothing can be injected, and this would prove nothing.
#[cfg(debug_assertions)]
#[test]
fn a_panic_in_any_export_is_a_code_and_poisons_its_handle() {
    let world = World::new();
    for export in EXPORTS {
        let (name, key) = (export.name, world.make(export.first));
        inject(name);
        assert_eq!((export.call)(key), ENGRAFT_PANIC, "{name}");
        if key == 0 {
            continue;
        }
        // A free that met a panic has freed nothing, and poisons nothing.
        if !export.frees() {
            assert!(message(key).contains("handle.rs:"), "{name}: {}", message(key));
            assert_eq!((export.call)(key), ENGRAFT_PANIC, "{name}, once more");
        }
        assert_eq!(free(export.first, key), ENGRAFT_OK, "{name}");
        assert_eq!(free(export.first, key), ENGRAFT_MISUSE, "{name}");
    }
}

#[test]
fn null_and_freed_handles_are_refused_by_every_export() {
    let world = World::new();
    for export in EXPORTS {
        let wanted = match export.frees() || CONTENT.contains(&export.name) {
            true => ENGRAFT_OK,
            false => ENGRAFT_MISUSE,
        };
        assert_eq!((export.call)(0), wanted, "{} of nothing", export.name);
        if export.first != First::NoHandle {
            let key = world.make(export.first);
            assert_eq!(free(export.first, key), ENGRAFT_OK, "{}", export.name);
            assert_eq!((export.call)(key), ENGRAFT_MISUSE, "{} of what was freed", export.name);
            assert_eq!((export.call)(key + 1), ENGRAFT_MISUSE, "{} of what never was", export.name);
        }
    }
}

/// Passes a handle of every other kind as the first argument.
#[test]
fn handles_of_other_kinds_are_refused_by_every_export() {
    let world = World::new();
    let kinds = [
        First::Model,
        First::Data,
        First::Plan,
        First::Adapter,
        First::Slot,
        First::Trainer,
        First::Gate,
        First::Session,
        First::Store,
    ];
    let handles: Vec<(First, usize)> = kinds.into_iter().map(|kind| (kind, world.make(kind))).collect();
    for export in EXPORTS.iter().filter(|export| export.first != First::NoHandle) {
        for (kind, key) in handles.iter().filter(|(kind, _)| *kind != export.first) {
            assert_eq!((export.call)(*key), ENGRAFT_MISUSE, "{} of a {kind:?}", export.name);
        }
    }
    for (kind, key) in handles {
        assert_eq!(free(kind, key), ENGRAFT_OK, "{kind:?}");
    }
}

/// Passes a handle of the wrong kind as the second one: a plan, which no function takes there.
#[test]
fn handles_of_other_kinds_are_refused_in_the_second_place() {
    let world = World::new();
    let [model, session, slot, store, plan] =
        [First::Model, First::Session, First::Slot, First::Store, First::Plan].map(|kind| world.make(kind));
    let other = without_provenance::<u8>(plan);
    let mut place = [16usize; 1];
    let out = place.as_mut_ptr();
    let told = c"why";
    // SAFETY: numbers, a text of the length that is said, and a place of ours.
    let codes = unsafe {
        let (model, session, slot, store) = (
            without_provenance(model),
            without_provenance(session),
            without_provenance(slot),
            without_provenance(store),
        );
        [
            plan::engraft_plan_create(model, other.cast(), null(), out.cast()),
            trainer::engraft_trainer_create(model, other.cast(), null(), out.cast()),
            gate::engraft_gate_create(model, other.cast(), null(), out.cast()),
            session::engraft_session_create(model, other.cast(), null(), out.cast()),
            session::engraft_session_set_adapter(session, other.cast()),
            session::engraft_session_follow(session, other.cast()),
            adapter::engraft_slot_swap(slot, other.cast(), null_mut()),
            store::engraft_store_promote(store, other.cast(), null_mut()),
            store::engraft_store_promote_adapter(store, other.cast(), told.as_ptr(), 3, null_mut()),
            store::engraft_store_load(store, other.cast(), null(), out.cast()),
        ]
    };
    assert_eq!(codes, [ENGRAFT_MISUSE; 10]);
    // Nothing is there that could be freed.
    assert_eq!(place, [0]);
    for (kind, key) in [
        (First::Model, model),
        (First::Session, session),
        (First::Slot, slot),
        (First::Store, store),
        (First::Plan, plan),
    ] {
        assert_eq!(free(kind, key), ENGRAFT_OK, "{kind:?}");
    }
}

/// The result is always a code, and never that of a panic.
#[test]
fn nothing_but_a_handle_makes_no_export_panic() {
    let world = World::new();
    for export in EXPORTS.iter().filter(|export| export.first != First::NoHandle) {
        let key = world.make(export.first);
        if export.first == First::Gate && export.name == "engraft_gate_run" {
            // All defaults are a long comparison.
            // SAFETY: it is a number that is looked up.
            ok(unsafe { gate::engraft_gate_cancel(without_provenance(key)) });
        }
        let code = (export.call)(key);
        assert!(code <= 0 && code != ENGRAFT_PANIC, "{}: {code}, {}", export.name, message(0));
        let left = if export.frees() { ENGRAFT_MISUSE } else { ENGRAFT_OK };
        assert_eq!(free(export.first, key), left, "{}", export.name);
    }
}
