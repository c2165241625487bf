//! A frame of Engraft's own, as it is and with its checksums set right: no fuzzer guesses a checksum.

#![no_main]

#[path = "../../../runtime/tests/hostile/reseal.rs"]
mod reseal;
#[path = "../../../runtime/tests/hostile/subject.rs"]
mod subject;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = subject::frame(bytes);
    let mut bytes = bytes.to_vec();
    if reseal::reseal(&mut bytes).is_some() {
        let _ = subject::frame(&bytes);
    }
});
