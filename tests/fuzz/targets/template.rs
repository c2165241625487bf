//! A chat template, compiled and rendered.

#![no_main]

#[path = "../../../runtime/tests/hostile/subject.rs"]
mod subject;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = subject::template(bytes);
});
