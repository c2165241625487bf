//! A model file: its description, views, tokenizer and chat template.

#![no_main]

#[path = "../../../runtime/tests/hostile/subject.rs"]
mod subject;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = subject::gguf(bytes);
});
