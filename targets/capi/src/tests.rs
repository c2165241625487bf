//! What the header promises for several calls, tested through the exports.

use std::ffi::{c_char, c_void};
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::adapter::{
    Adapter, AdapterParams, Slot, engraft_adapter_free, engraft_adapter_load, engraft_adapter_save,
    engraft_slot_create, engraft_slot_free, engraft_slot_swap,
};
use crate::caller::{self, Struct};
use crate::data::{Data, engraft_data_free, engraft_data_from_memory, engraft_data_open};
use crate::error::{
    ENGRAFT_BAD_DATA, ENGRAFT_BASE_MISMATCH, ENGRAFT_CANCELLED, ENGRAFT_DOES_NOT_FIT, ENGRAFT_MISUSE,
    ENGRAFT_OK,
};
use crate::gate::{
    ENGRAFT_ARM_FEW_SHOT, ENGRAFT_ARM_LORA, ENGRAFT_DECISION_NONE, Gate, GateParams, engraft_gate_create,
    engraft_gate_decision, engraft_gate_free, engraft_gate_run, engraft_gate_verdict,
};
use crate::model::{Model, engraft_model_free, engraft_model_open};
use crate::plan::TrainParams;
use crate::progress::Progress;
use crate::session::{
    ENGRAFT_ENDED_CANCELLED, ENGRAFT_PROMPT_CHAT, GenerateInfo, GenerateParams, Session, SessionParams,
    engraft_session_cancel, engraft_session_create, engraft_session_follow, engraft_session_free,
    engraft_session_generate, engraft_session_set_adapter,
};
use crate::trainer::{
    Trainer, engraft_trainer_adapter, engraft_trainer_create, engraft_trainer_free, engraft_trainer_save,
    engraft_trainer_step,
};

pub(crate) fn ok(code: i32) {
    let (mut buffer, mut length) = ([0u8; 512], 0);
    // SAFETY: the buffer has as many bytes as is said.
    unsafe { crate::error::engraft_message(null(), buffer.as_mut_ptr().cast(), buffer.len(), &mut length) };
    assert_eq!(code, ENGRAFT_OK, "{}", String::from_utf8_lossy(&buffer[..length.min(buffer.len())]));
}

/// The handle that a constructor makes.
pub(crate) fn made<T>(make: impl FnOnce(*mut *mut T) -> i32) -> *mut T {
    let mut place = null_mut();
    ok(make(&mut place));
    place
}

/// All defaults, or a result to be filled.
fn with_size<S: Struct>(mut empty: S) -> S {
    // SAFETY: a struct of this trait begins with a `u32`, its size.
    unsafe { (&raw mut empty).cast::<u32>().write(size_of::<S>() as u32) };
    empty
}

pub(crate) fn settings<S: Struct>() -> S {
    with_size(caller::zeroed())
}

pub(crate) fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../cli").join(name)
}

fn open_model(path: &Path) -> *mut Model {
    let path = path.to_str().expect("a path in UTF-8");
    // SAFETY: the text has the length that is said.
    made(|out| unsafe { engraft_model_open(path.as_ptr().cast(), path.len(), null(), out) })
}

pub(crate) fn model() -> *mut Model {
    open_model(&shipped("seedling.gguf"))
}

/// The first rows of the demo.
fn rows(count: usize) -> String {
    let all = std::fs::read_to_string(shipped("demo/private_train.jsonl")).expect("the rows");
    all.split_inclusive('\n').take(count).collect()
}

pub(crate) fn data(model: *mut Model) -> *mut Data {
    let rows = rows(12);
    // SAFETY: the rows have the length that is said.
    made(|out| unsafe {
        let (none, length) = (null(), rows.len());
        engraft_data_from_memory(model, rows.as_ptr(), length, none, 0, none, 0, null(), out)
    })
}

pub(crate) fn trainer(model: *mut Model, data: *mut Data) -> *mut Trainer {
    let params = TrainParams { steps: 20, rank: 1, threads: 1, learning_rate: 1e-2, ..settings() };
    // SAFETY: handles, and a struct of ours.
    made(|out| unsafe { engraft_trainer_create(model, data, &params, out) })
}

fn session(model: *mut Model, adapter: *mut Adapter) -> (i32, *mut Session) {
    let (params, mut session) = (SessionParams { threads: 1, ..settings() }, null_mut());
    // SAFETY: handles, and a struct and a place of ours.
    let code = unsafe { engraft_session_create(model, adapter, &params, &mut session) };
    (code, session)
}

/// The same model with one weight changed: the same shapes, and undamaged.
fn twin(folder: &Path) -> *mut Model {
    let mut bytes = std::fs::read(shipped("seedling.gguf")).expect("the model");
    let at = bytes.len() / 4 * 3;
    bytes[at] ^= 1;
    let path = folder.join("twin.gguf");
    std::fs::write(&path, bytes).expect("room for a model");
    open_model(&path)
}

#[test]
fn an_adapter_of_another_model_is_refused_everywhere() {
    let folder = tempfile::tempdir().expect("a folder");
    let (own, again, other) = (model(), model(), twin(folder.path()));
    let data = data(own);
    let trainer = trainer(own, data);
    // SAFETY: handles, and places of ours.
    unsafe {
        let adapter = made(|out| engraft_trainer_adapter(trainer, out));
        // The same file behind another handle is the same model.
        let ((code, mine), (plain, foreign)) = (session(again, adapter), session(other, null_mut()));
        assert_eq!((code, plain), (ENGRAFT_OK, ENGRAFT_OK));
        assert_eq!(session(other, adapter).0, ENGRAFT_BASE_MISMATCH);
        assert_eq!(engraft_session_set_adapter(foreign, adapter), ENGRAFT_BASE_MISMATCH);
        ok(engraft_session_set_adapter(mine, adapter));
        ok(engraft_session_set_adapter(foreign, null()));

        let filled: *mut Slot = made(|out| engraft_slot_create(out));
        ok(engraft_slot_swap(filled, adapter, null_mut()));
        ok(engraft_session_follow(mine, filled));
        assert_eq!(engraft_session_follow(foreign, filled), ENGRAFT_BASE_MISMATCH);
        let followed: *mut Slot = made(|out| engraft_slot_create(out));
        ok(engraft_session_follow(foreign, followed));
        assert_eq!(engraft_slot_swap(followed, adapter, null_mut()), ENGRAFT_BASE_MISMATCH);
        ok(engraft_slot_swap(followed, null(), null_mut()));

        [mine, foreign].into_iter().for_each(|session| ok(engraft_session_free(session)));
        [filled, followed].into_iter().for_each(|slot| ok(engraft_slot_free(slot)));
        ok(engraft_adapter_free(adapter));
        ok(engraft_trainer_free(trainer));
        ok(engraft_data_free(data));
        [own, again, other].into_iter().for_each(|model| ok(engraft_model_free(model)));
    }
}

#[test]
fn a_prompt_that_is_stopped_in_has_its_figures_and_counts_as_not_asked() {
    let model = model();
    let (code, session) = session(model, null_mut());
    ok(code);
    let generate = |prompt: &str, keep: u32| {
        let params =
            GenerateParams { n_predict: 1, greedy: 1, prompting: ENGRAFT_PROMPT_CHAT, keep, ..settings() };
        let mut info = settings::<GenerateInfo>();
        let (text, length) = (prompt.as_ptr().cast(), prompt.len());
        // SAFETY: the text has the length that is said, and everything else is ours or NULL.
        let code =
            unsafe { engraft_session_generate(session, text, length, &params, None, null_mut(), &mut info) };
        (code, info)
    };
    let (done, key) = (AtomicBool::new(false), session.addr());
    // Cancel all the time, so that sooner or later it hits while the prompt is read.
    let info = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                // SAFETY: a number.
                ok(unsafe { engraft_session_cancel(std::ptr::without_provenance(key)) });
            }
        });
        let prompt = "Turn on the lights in the cave. ".repeat(12);
        let mut stopped = (0..1000).map(|_| generate(&prompt, 0)).filter(|(code, _)| *code != ENGRAFT_OK);
        let found = stopped.find(|(_, info)| info.tokens == 0);
        done.store(true, Ordering::Release);
        let (code, info) = found.expect("a prompt that was stopped in");
        assert_eq!((code, info.ended), (ENGRAFT_CANCELLED, ENGRAFT_ENDED_CANCELLED));
        info
    });
    assert!(info.prompt_tokens > 50, "{}", info.prompt_tokens);
    let (code, next) = generate("And in the kitchen?", 1);
    ok(code);
    assert!(next.prompt_tokens < info.prompt_tokens, "{} tokens", next.prompt_tokens);
    // SAFETY: handles.
    unsafe {
        ok(engraft_session_free(session));
        ok(engraft_model_free(model));
    }
}

/// Counts down; false at nothing.
unsafe extern "C" fn countdown(_: *const Progress, user: *mut c_void) -> bool {
    // SAFETY: this is always passed together with a number.
    let left = unsafe { &mut *user.cast::<i64>() };
    *left -= 1;
    *left != 0
}

#[test]
fn a_comparison_that_is_stopped_or_whose_rows_changed_leaves_no_verdict() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, file) = (model(), folder.path().join("rows.jsonl"));
    std::fs::write(&file, rows(8)).expect("room for rows");
    let path = file.to_str().expect("a path in UTF-8");
    // SAFETY: the text has the length that is said.
    let data = made(|out| unsafe { engraft_data_open(model, path.as_ptr().cast(), path.len(), null(), out) });
    let retention = "Buy bread.";
    let params = GateParams {
        arms: ENGRAFT_ARM_LORA,
        steps: 2,
        rank: 1,
        evaluations: 1,
        resamples: 100,
        threads: 1,
        no_built_in_retention: 1,
        protect_off: 1,
        learning_rate: 1e-3,
        retention: retention.as_ptr().cast::<c_char>(),
        retention_length: retention.len(),
        ..settings()
    };
    // SAFETY: handles, and structs of ours.
    let gate: *mut Gate = made(|out| unsafe { engraft_gate_create(model, data, &params, out) });
    let run = |left: &mut i64| {
        let (mut decision, mut length) = (99, 0);
        // SAFETY: everything is ours.
        unsafe {
            let code = engraft_gate_run(gate, Some(countdown), (&raw mut *left).cast());
            ok(engraft_gate_decision(gate, &mut decision, null_mut(), 0, null_mut()));
            (code, decision != ENGRAFT_DECISION_NONE, engraft_gate_verdict(gate, null_mut(), 0, &mut length))
        }
    };
    let nothing = |code: i32| (code, false, ENGRAFT_MISUSE);
    let mut left = 0;
    assert_eq!(run(&mut left), (ENGRAFT_OK, true, ENGRAFT_OK));
    let events = -left;
    assert!(events > 2, "{events}");
    // At the first event, and at the last, after which nothing checks whether to continue.
    assert_eq!(run(&mut 1), nothing(ENGRAFT_CANCELLED));
    assert_eq!(run(&mut events.clone()), nothing(ENGRAFT_CANCELLED));
    assert_eq!(run(&mut (events + 1)), (ENGRAFT_OK, true, ENGRAFT_OK));
    std::fs::write(&file, rows(9)).expect("room for rows");
    assert_eq!(run(&mut 0), nothing(ENGRAFT_BAD_DATA));
    // SAFETY: handles.
    unsafe {
        ok(engraft_gate_free(gate));
        ok(engraft_data_free(data));
        ok(engraft_model_free(model));
    }
}

/// Settings that allow no comparison are refused before any row is read.
#[test]
fn a_gate_s_settings_are_checked_when_it_is_made() {
    let model = model();
    let data = data(model);
    let of = |params: GateParams| {
        let mut gate: *mut Gate = std::ptr::without_provenance_mut(16);
        // SAFETY: handles, and a struct and a place of ours.
        let code = unsafe { engraft_gate_create(model, data, &params, &mut gate) };
        assert_eq!(gate.is_null(), code != ENGRAFT_OK);
        // SAFETY: a handle, or NULL.
        ok(unsafe { engraft_gate_free(gate) });
        code
    };
    let plain = settings::<GateParams>;
    for params in [
        GateParams { answer_tokens: u32::MAX, ..plain() },
        GateParams { shots: 65, ..plain() },
        GateParams { batch_size: 4097, ..plain() },
        GateParams { rank: 257, ..plain() },
        GateParams { arms: 8, ..plain() },
        GateParams { metric: 3, ..plain() },
        GateParams { level: 0.9, ..plain() },
        GateParams { minutes: f64::NAN, ..plain() },
        GateParams { learning_rate: 2.0, ..plain() },
        GateParams { kl_weight: -1.0, ..plain() },
        // Nothing would measure what training forgets.
        GateParams { no_built_in_retention: 1, ..plain() },
    ] {
        assert_eq!(of(params), ENGRAFT_MISUSE);
    }
    assert_eq!(of(plain()), ENGRAFT_OK);
    assert_eq!(
        of(GateParams { no_built_in_retention: 1, arms: ENGRAFT_ARM_FEW_SHOT, ..plain() }),
        ENGRAFT_OK
    );

    // No memory for the arm, and nothing else to compare the base with.
    let params = GateParams {
        arms: ENGRAFT_ARM_LORA,
        memory_budget: 1 << 20,
        threads: 1,
        learning_rate: 1e-3,
        ..plain()
    };
    // SAFETY: handles, and structs of ours.
    unsafe {
        let gate: *mut Gate = made(|out| engraft_gate_create(model, data, &params, out));
        assert_eq!(engraft_gate_run(gate, None, null_mut()), ENGRAFT_DOES_NOT_FIT);
        ok(engraft_gate_free(gate));
        ok(engraft_data_free(data));
        ok(engraft_model_free(model));
    }
}

/// A file keeps an adapter as trained, for its base, so an adapter in different use can't be saved.
#[test]
fn what_a_file_would_not_tell_is_not_saved() {
    let folder = tempfile::tempdir().expect("a folder");
    let (own, other) = (model(), twin(folder.path()));
    let data = data(own);
    let trainer = trainer(own, data);
    let (to, again) = (folder.path().join("adapter"), folder.path().join("again"));
    let text =
        |path: &Path| (path.to_str().expect("UTF-8").as_ptr().cast::<c_char>(), path.as_os_str().len());
    let ((saved, length), (kept, kept_length)) = (text(&to), text(&again));
    let load = |model, params: AdapterParams| {
        // SAFETY: a handle, a text of the length that is said, and a struct and a place of ours.
        made(|out| unsafe { engraft_adapter_load(model, saved, length, &params, out) })
    };
    // SAFETY: handles, and texts of the lengths that are said.
    unsafe {
        // An adapter that never learned can't be loaded.
        ok(engraft_trainer_step(trainer, &mut settings::<Progress>()));
        ok(engraft_trainer_save(trainer, saved, length));
        for (adapter, wanted) in [
            (load(own, settings()), ENGRAFT_OK),
            (load(own, AdapterParams { scale: 0.5, ..settings() }), ENGRAFT_MISUSE),
            (load(other, AdapterParams { force_base: 1, ..settings() }), ENGRAFT_BASE_MISMATCH),
        ] {
            assert_eq!(engraft_adapter_save(adapter, kept, kept_length, 0), wanted);
            ok(engraft_adapter_free(adapter));
        }
        ok(engraft_trainer_free(trainer));
        ok(engraft_data_free(data));
        [own, other].into_iter().for_each(|model| ok(engraft_model_free(model)));
    }
}

#[test]
fn a_chat_does_not_go_on_from_a_text_nor_a_text_from_a_chat() {
    let model = model();
    let (code, session) = session(model, null_mut());
    ok(code);
    let generate = |chat: u32, keep: u32| {
        let params = GenerateParams { n_predict: 1, greedy: 1, prompting: chat, keep, ..settings() };
        // SAFETY: the text has the length that is said, and everything else is ours or NULL.
        unsafe { engraft_session_generate(session, c"Hi".as_ptr(), 2, &params, None, null_mut(), null_mut()) }
    };
    let codes =
        [(1, 0), (1, 1), (0, 1), (0, 0), (0, 1), (1, 1), (1, 0)].map(|(chat, keep)| generate(chat, keep));
    let (good, bad) = (ENGRAFT_OK, ENGRAFT_MISUSE);
    assert_eq!(codes, [good, good, bad, good, good, bad, good]);
    // SAFETY: handles.
    unsafe {
        ok(engraft_session_free(session));
        ok(engraft_model_free(model));
    }
}
