//! The tensors of a PEFT adapter, beside good settings.

#![no_main]

#[path = "../../../runtime/tests/hostile/subject.rs"]
mod subject;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = subject::safetensors(bytes);
});
