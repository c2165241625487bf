//! What a store holds answers through the interface as it was judged, without being told how.

use std::ffi::{c_char, c_void};
use std::path::Path;
use std::ptr::{null, null_mut};

use engraft_runtime::adapter::Adapter;
use engraft_runtime::compare::answers::{Manner, Metric, answer, questions};
use engraft_runtime::compare::material::Rows;
use engraft_runtime::compare::score::Subject;
use engraft_runtime::data::load;
use engraft_runtime::gate::store::{Candidate, Store as Folder};
use engraft_runtime::model::text::Text;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::run::Nobody;
use engraft_runtime::storage::Disk;
use engraft_runtime::{Base, DataOptions};

use crate::session::{
    GenerateParams, SessionParams, engraft_session_create, engraft_session_free, engraft_session_generate,
};
use crate::store::{Store, engraft_store_free, engraft_store_load, engraft_store_open};
use crate::tests::{data, made, model, ok, settings, shipped, trainer};
use crate::trainer::{engraft_trainer_free, engraft_trainer_run, engraft_trainer_save};

const TOKENS: usize = 24;

/// Collects the text of an answer.
unsafe extern "C" fn hear(text: *const c_char, length: usize, user: *mut c_void) -> bool {
    // SAFETY: the text has the length that is said, and the other is a string of ours.
    let (text, all) =
        unsafe { (std::slice::from_raw_parts(text.cast::<u8>(), length), &mut *user.cast::<Vec<u8>>()) };
    all.extend_from_slice(text);
    true
}

/// A folder with an adapter that was trained a little, and a store where it is active with a verdict that counted
/// answers.
fn promoted(folder: &Path) {
    let saved = folder.join("adapter");
    let (text, model) = (saved.to_str().expect("UTF-8"), model());
    let data = data(model);
    let trainer = trainer(model, data);
    // SAFETY: handles, and a text of the length that is said.
    unsafe {
        ok(engraft_trainer_run(trainer, 0, None, null_mut()));
        ok(engraft_trainer_save(trainer, text.as_ptr().cast(), text.len()));
        ok(engraft_trainer_free(trainer));
        ok(crate::data::engraft_data_free(data));
        ok(crate::model::engraft_model_free(model));
    }
    let adapter = Adapter::load(&saved).expect("the adapter");
    let file = ModelFile::open(shipped("seedling.gguf")).expect("the model");
    let store = Folder::create(&Disk, &folder.join("store")).expect("a store");
    let verdict = br#"{"arms": [{"name": "lora", "accuracy": 0.5}]}"#;
    let base = (&file.digest(), file.config());
    store.promote(&Candidate::Adapter(&adapter), verdict, base, false).expect("promoting");
}

#[test]
fn fifty_answers_of_a_store_are_those_that_are_judged() {
    let folder = tempfile::tempdir().expect("a folder");
    promoted(folder.path());
    // As the gate lets the adapter answer.
    let base = Base::open(shipped("seedling.gguf")).expect("the model");
    let text = Text::of(&base.model).expect("a tokenizer");
    let reading = DataOptions { max_seq_length: 128, ..DataOptions::default() };
    let file = shipped("demo/private_test.jsonl");
    let rows = load(&file, &text.tokenizer, &text.chat, &reading).expect("the rows");
    let rows = Rows::of(rows, &reading).expect("the rows");
    let asked = questions(&rows, &text);
    let adapter = Adapter::load(&folder.path().join("adapter")).expect("the adapter");
    let subject =
        Subject { adapter: Some(base.stack(&[(adapter, 1.0)]).expect("it fits")), ..Subject::of(&base) };
    let manner = Manner { metric: Some(Metric::Json), tokens: TOKENS, samples: asked.len() };
    let examples = &rows.data.examples;
    let judged =
        answer(&subject, &asked, examples, (manner, &text), 1 << 28, &mut Nobody).expect("answers").samples;
    assert_eq!(judged.len(), 50);

    // As the interface does, by its defaults.
    let (model, place) = (model(), folder.path().join("store"));
    let place = place.to_str().expect("UTF-8");
    // SAFETY: handles, and texts of the lengths that are said.
    unsafe {
        let store: *mut Store =
            made(|out| engraft_store_open(place.as_ptr().cast(), place.len(), null(), out));
        let adapter = made(|out| engraft_store_load(store, model, null(), out));
        let params = SessionParams { threads: 1, ..settings() };
        let session = made(|out| engraft_session_create(model, adapter, &params, out));
        let params = GenerateParams { n_predict: TOKENS as u32, ..settings() };
        for (question, (expected, _)) in asked.iter().zip(&judged) {
            let (prompt, mut said) = (&question.prompt, Vec::new());
            let (text, user) = (prompt.as_ptr().cast(), (&raw mut said).cast());
            ok(engraft_session_generate(session, text, prompt.len(), &params, Some(hear), user, null_mut()));
            assert_eq!(String::from_utf8_lossy(&said).trim(), expected.trim(), "{prompt}");
        }
        // The control: drawn answers are others.
        let (mut drawn, mut others) = (GenerateParams { temp: 2.0, top_k: -1, ..params }, 0);
        (drawn.top_p, drawn.min_p) = (-1.0, -1.0);
        for (question, (expected, _)) in asked.iter().zip(&judged).take(5) {
            let (prompt, mut said) = (&question.prompt, Vec::new());
            let (text, user) = (prompt.as_ptr().cast(), (&raw mut said).cast());
            ok(engraft_session_generate(session, text, prompt.len(), &drawn, Some(hear), user, null_mut()));
            others += usize::from(String::from_utf8_lossy(&said).trim() != expected.trim());
        }
        assert!(others > 0);
        ok(engraft_session_free(session));
        ok(crate::adapter::engraft_adapter_free(adapter));
        ok(engraft_store_free(store));
        ok(crate::model::engraft_model_free(model));
    }
}
