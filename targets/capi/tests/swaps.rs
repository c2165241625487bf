//! Adapters change while sessions generate: ten thousand swaps of a slot that four threads follow, while adapters are
//! made and freed.

use std::ffi::{CString, c_char, c_void};
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use engraft::adapter::{self, Adapter, Slot};
use engraft::error::{ENGRAFT_OK, engraft_message};
use engraft::model::{self, Model};
use engraft::plan::{self, TrainParams};
use engraft::session::{self, GenerateInfo, GenerateParams, Session, SessionParams};
use engraft::{data, trainer};

const SWAPS: u64 = 10_000;
const THREADS: usize = 4;
/// After this many swaps some session must have finished; otherwise all swaps would be over before the first token.
const SWAPS_OF_AN_ANSWER: u64 = 20;
/// Much longer than an answer takes on any machine.
const PATIENCE: Duration = Duration::from_secs(60);
const PROMPT: &str = "Turn on the lights in the cave.";

/// A handle to send to another thread: a number.
struct Shared<T>(*mut T);

// Whatever T is: derived, these would ask it to be copied, too.
impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Shared<T> {}

// SAFETY: nobody follows it.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: the same.
unsafe impl<T> Sync for Shared<T> {}

fn ok(code: i32) {
    let (mut buffer, mut length) = ([0u8; 512], 0);
    // SAFETY: the buffer has as many bytes as is said.
    unsafe { engraft_message(null(), buffer.as_mut_ptr().cast(), buffer.len(), &mut length) };
    assert_eq!(code, ENGRAFT_OK, "{}", String::from_utf8_lossy(&buffer[..length.min(512)]));
}

/// The handle that a constructor makes.
fn made<T>(make: impl FnOnce(*mut *mut T) -> i32) -> Shared<T> {
    let mut place = null_mut();
    ok(make(&mut place));
    Shared(place)
}

/// A struct with all defaults.
fn defaults<S>(fill: unsafe extern "C" fn(*mut S, usize) -> i32) -> S {
    let mut params = std::mem::MaybeUninit::<S>::uninit();
    // SAFETY: the struct has the size that is said, and is filled if the code is 0.
    unsafe {
        ok(fill(params.as_mut_ptr(), size_of::<S>()));
        params.assume_init()
    }
}

fn open_model() -> Shared<Model> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cli/seedling.gguf");
    let path = CString::new(path.to_str().expect("a path in UTF-8")).expect("a path without NUL");
    // SAFETY: the text has the length that is said.
    made(|out| unsafe { model::engraft_model_open(path.as_ptr(), path.count_bytes(), null(), out) })
}

/// An adapter that changes answers; the higher the rate, the more.
fn train(model: Shared<Model>, learning_rate: f64) -> Shared<Adapter> {
    let rows = include_bytes!("../../cli/demo/private_train.jsonl");
    // SAFETY: the rows have the length that is said.
    let data = made(|out| unsafe {
        let (none, length) = (null(), rows.len());
        data::engraft_data_from_memory(model.0, rows.as_ptr(), length, none, 0, none, 0, null(), out)
    });
    let mut params: TrainParams = defaults(plan::engraft_train_default_params);
    (params.steps, params.learning_rate, params.threads) = (6, learning_rate, 1);
    // SAFETY: everything is ours or NULL.
    unsafe {
        let trainer = made(|out| trainer::engraft_trainer_create(model.0, data.0, &params, out));
        ok(trainer::engraft_trainer_run(trainer.0, 0, None, null_mut()));
        let adapter = made(|out| trainer::engraft_trainer_adapter(trainer.0, out));
        ok(trainer::engraft_trainer_free(trainer.0));
        ok(data::engraft_data_free(data.0));
        adapter
    }
}

fn session(model: Shared<Model>) -> Shared<Session> {
    let mut params: SessionParams = defaults(session::engraft_session_default_params);
    (params.threads, params.ctx_size) = (1, 128);
    // SAFETY: everything is ours or NULL.
    made(|out| unsafe { session::engraft_session_create(model.0, null(), &params, out) })
}

unsafe extern "C" fn hear(text: *const c_char, length: usize, user: *mut c_void) -> bool {
    // SAFETY: `generate` hands over its own text, and the library a text of this length.
    let (heard, part) =
        unsafe { (&mut *user.cast::<Vec<u8>>(), std::slice::from_raw_parts(text.cast::<u8>(), length)) };
    heard.extend_from_slice(part);
    true
}

/// A session's answer, its tokens, and the number of swaps before the last token was computed.
fn generate(session: Shared<Session>) -> (Vec<u8>, u64, u64) {
    let mut params: GenerateParams = defaults(session::engraft_generate_default_params);
    (params.n_predict, params.greedy, params.prompting) = (16, 1, 1);
    let mut heard = Vec::new();
    // SAFETY: numbers alone, for which zeros are values.
    let mut info: GenerateInfo = unsafe { std::mem::zeroed() };
    info.struct_size = size_of::<GenerateInfo>() as u32;
    // SAFETY: texts have the lengths that are said, and all places are ours.
    ok(unsafe {
        let (text, length, user) = (PROMPT.as_ptr().cast(), PROMPT.len(), (&raw mut heard).cast());
        session::engraft_session_generate(session.0, text, length, &params, Some(hear), user, &mut info)
    });
    (heard, info.tokens, info.generation)
}

/// The answer of a session with a fixed adapter.
fn answer_with(model: Shared<Model>, adapter: Option<Shared<Adapter>>) -> Vec<u8> {
    let own = session(model);
    // SAFETY: handles alone.
    unsafe {
        ok(session::engraft_session_set_adapter(own.0, adapter.map_or(null_mut(), |adapter| adapter.0)));
        let (heard, ..) = generate(own);
        ok(session::engraft_session_free(own.0));
        heard
    }
}

/// Swaps two adapters and the base in turn. Sometimes it uses a new adapter whose handle is freed at once: the sessions
/// keep their share of it.
fn swap(slot: Shared<Slot>, adapters: [Shared<Adapter>; 2], model: Shared<Model>, tokens: &AtomicU64) {
    for i in 0..SWAPS {
        let new = (i % (SWAPS / 4) == 0).then(|| train(model, 2e-2).0);
        let next = [adapters[0].0, adapters[1].0, null_mut()][(i % 3) as usize];
        let mut count = 0;
        // SAFETY: handles, and a place of ours.
        unsafe {
            ok(adapter::engraft_slot_swap(slot.0, new.unwrap_or(next), &mut count));
            ok(adapter::engraft_adapter_free(new.unwrap_or(null_mut())));
        }
        assert_eq!(count, i + 1);
        if i % SWAPS_OF_AN_ANSWER == 0 {
            let (before, began) = (tokens.load(Ordering::Acquire), Instant::now());
            while tokens.load(Ordering::Acquire) == before {
                assert!(began.elapsed() < PATIENCE, "nobody generates");
                std::thread::yield_now();
            }
        }
    }
}

#[test]
fn ten_thousand_swaps_while_four_threads_generate() {
    let model = open_model();
    let adapters = [train(model, 1e-2), train(model, 3e-2)];
    let answers = [Some(adapters[0]), Some(adapters[1]), None].map(|adapter| answer_with(model, adapter));
    let told = || answers.each_ref().map(|answer| String::from_utf8_lossy(answer));
    let distinct = answers[0] != answers[1] && answers[1] != answers[2] && answers[0] != answers[2];
    assert!(distinct, "no swap could be seen: {:?}", told());
    // SAFETY: a place of ours.
    let slot = made(|out| unsafe { adapter::engraft_slot_create(out) });
    let sessions: Vec<_> = (0..THREADS).map(|_| session(model)).collect();
    let (done, tokens, mixed) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for session in &sessions {
            // SAFETY: handles.
            ok(unsafe { session::engraft_session_follow(session.0, slot.0) });
            scope.spawn(|| {
                let mut last = 0;
                while !done.load(Ordering::Acquire) {
                    let (heard, some, generation) = generate(*session);
                    tokens.fetch_add(some, Ordering::AcqRel);
                    assert!(generation >= last && generation <= SWAPS, "{generation} after {last}");
                    last = generation;
                    mixed.fetch_add(u64::from(!answers.contains(&heard)), Ordering::Relaxed);
                }
            });
        }
        swap(slot, adapters, model, &tokens);
        done.store(true, Ordering::Release);
    });
    let last = ((SWAPS - 1) % 3) as usize;
    for session in &sessions {
        let (heard, _, generation) = generate(*session);
        assert!(heard == answers[last] && generation == SWAPS);
        // SAFETY: a handle.
        ok(unsafe { session::engraft_session_free(session.0) });
    }
    // Answers of more than one adapter: swaps did come between tokens.
    assert!(mixed.into_inner() > 0, "no swap fell into an answer");
    // SAFETY: handles.
    unsafe {
        ok(adapter::engraft_slot_free(slot.0));
        adapters.iter().for_each(|adapter| ok(adapter::engraft_adapter_free(adapter.0)));
        ok(model::engraft_model_free(model.0));
    }
}
