//! System limits: a plan within them runs to its end, and one beyond them is refused before anything large is
//! allocated. Nothing is ever killed or aborted.
#![cfg(target_os = "linux")]

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};

use engraft_kernels::DType;

use super::{
    assert_refused, engraft, last_line, memory_is_the_programs, result_of, seedling, shipped, stderr, stdout,
};

#[path = "../../runtime/tests/common/writer.rs"]
#[allow(dead_code, reason = "the model's own tests use the rest")]
mod writer;

/// Runs under limits set with the shell's `ulimit`, in KiB.
fn limited(limits: &[(&str, u64)], arguments: &[&str]) -> Output {
    let limits: String = limits.iter().map(|(flag, kib)| format!("ulimit -S {flag} {kib} && ")).collect();
    let mut command = Command::new("sh");
    command.env("ENGRAFT_CACHE_DIR", Path::new(env!("CARGO_TARGET_TMPDIR")).join("engraft-cache"));
    command.arg("-c").arg(format!("{limits}exec \"$0\" \"$@\"")).arg(env!("CARGO_BIN_EXE_engraft"));
    command.args(arguments).output().expect("running a shell")
}

/// A run whose arena is far larger than the process itself.
fn arguments<'a>(verb: &'a str, model: &'a str, data: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let shape = ["--batch-size", "36", "--rank", "64", "--iters", "2", "-t", "2", "--keep", "inputs"];
    [&[verb, "-m", model, "--data", data, "--json"][..], &shape, more].concat()
}

/// What many tiny rows take is in their lists, not in their tokens.
#[test]
fn many_tiny_rows_stay_within_the_plan() {
    let folder = tempfile::tempdir().expect("a folder");
    let within = |name: &str| folder.path().join(name).display().to_string();
    let rows: String = (0..100_000).map(|i| format!("{{\"text\": \"ab{}\"}}\n", i % 977)).collect();
    std::fs::write(within("tiny.jsonl"), rows).expect("writing");
    let (model, data, out) = (seedling(), within("tiny.jsonl"), within("adapter"));
    let train = ["train", "-m", &model, "--data", &data, "--iters", "2", "-b", "4", "-t", "2"];
    let told = result_of(&[&train[..], &["--adapter-path", &out]].concat());
    let bytes = |key: &str| told[key].as_u64().expect("bytes");
    let (planned, peak) = (bytes("planned_private_bytes"), bytes("peak_private_bytes"));
    let is_close = peak <= planned && planned < 2 * peak;
    assert!(is_close || !memory_is_the_programs(), "{peak} of {planned}");
}

#[test]
fn a_tenth_more_than_planned_is_enough_and_less_is_refused() {
    if !memory_is_the_programs() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("adapter").display().to_string();
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let planned = engraft(&arguments("plan", &model, &data, &["--no-calibration"]));
    let planned = last_line(&planned)["planned_private_bytes"].as_u64().expect("a plan");
    let train = arguments("train", &model, &data, &["--adapter-path", &out]);
    let (enough, too_little) = (planned * 11 / 10 / 1024, planned * 9 / 10 / 1024);

    let done = limited(&[("-d", enough)], &train);
    assert_eq!(done.status.code(), Some(0), "{planned} planned: {}", stderr(&done));
    let peak = last_line(&done)["peak_private_bytes"].as_u64().expect("a peak");
    assert!(peak <= planned, "{peak} held, {planned} planned");
    std::fs::remove_dir_all(&out).expect("removing");
    let done = limited(&[("-v", 1 << 20)], &train);
    assert_eq!(done.status.code(), Some(0), "a GiB of addresses: {}", stderr(&done));
    std::fs::remove_dir_all(&out).expect("removing");

    let mut refusals = 0;
    for kib in [too_little, planned / 2 / 1024, planned / 1024 - 64, 8 << 10, 6 << 10] {
        let refused = limited(&[("-d", kib)], &train);
        let (out_text, err) = (stdout(&refused), stderr(&refused));
        assert_eq!(refused.status.signal(), None, "{kib} KiB: {err}");
        assert_eq!(refused.status.code(), Some(3), "{kib} KiB: {err}");
        assert!(err.contains("RLIMIT_DATA") && err.contains("private memory"), "{kib} KiB: {err}");
        assert!(out_text.contains("does_not_fit"), "{kib} KiB: {out_text}");
        assert!(!Path::new(&out).exists(), "{kib} KiB: something was written");
        refusals += 1;
    }
    // The message says what would fit, and it does.
    let refused = limited(&[("-d", too_little)], &train);
    assert!(stderr(&refused).contains("--batch-size"), "{}", stderr(&refused));
    eprintln!(
        "{planned} bytes planned, {peak} held at most under {enough} KiB; {refusals} limits refused with 3"
    );
}

#[test]
fn what_is_refused_allocates_little() {
    if !memory_is_the_programs() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let out = folder.path().join("adapter").display().to_string();
    // Full fine-tuning takes some 80 MiB. Under hard limits, a late refusal would be an abort.
    let big = ["--batch-size", "256", "--adapter-path", &out, "--fine-tune-type", "full"];
    let arguments = [&["train", "-m", &model, "--data", &data, "-t", "1"][..], &big].concat();
    for limit in [("-d", 16 << 10), ("-v", 192 << 10)] {
        let refused = limited(&[limit], &arguments);
        let err = stderr(&refused);
        assert_eq!((refused.status.signal(), refused.status.code()), (None, Some(3)), "{limit:?}: {err}");
        assert!(err.contains("RLIMIT_"), "{limit:?}: {err}");
    }
}

#[test]
fn a_small_file_whose_cache_is_huge_is_refused() {
    if !memory_is_the_programs() {
        return;
    }
    let mut w = writer::tiny();
    for (key, v) in [
        ("llama.context_length", 1 << 20),
        ("llama.attention.head_count", 1024),
        ("llama.attention.head_count_kv", 1024),
        ("llama.attention.key_length", 64),
        ("llama.attention.value_length", 64),
    ] {
        w.set(key, writer::u32v(v));
    }
    for name in ["attn_q", "attn_k", "attn_v"] {
        w.reshape(&format!("blk.0.{name}.weight"), DType::Q8_0, &[32, 65_536]);
    }
    w.reshape("blk.0.attn_output.weight", DType::Q8_0, &[65_536, 32]);
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("wide.gguf").display().to_string();
    std::fs::write(&model, w.bytes()).expect("a file");
    // It takes more than a GiB, whatever this machine has.
    let generate = ["generate", "-m", &model, "-p", "a", "-c", "1048576", "--json"];
    let refused = limited(&[("-d", 1 << 20)], &generate);
    let err = stderr(&refused);
    assert_eq!((refused.status.signal(), refused.status.code()), (None, Some(3)), "{err}");
    assert!(err.contains("MiB of private memory") && err.contains("--ctx-size"), "{err}");
    assert!(stdout(&refused).contains("does_not_fit"), "{}", stdout(&refused));
}

#[test]
fn a_device_can_be_asked_about() {
    let (model, data) = (seedling(), shipped("demo/private_train.jsonl"));
    let small = engraft(&arguments("plan", &model, &data, &["--no-calibration", "--device", "pi-zero-2w"]));
    assert_eq!(small.status.code(), Some(0), "{}", stderr(&small));
    // The built-in model is small, but full fine-tuning on thousands of rows isn't.
    let more = ["--no-calibration", "--device", "pi-zero-2w"];
    let rows = ["--batch-size", "4096", "--keep", "all", "--kl-weight", "1"];
    let big = [&["plan", "-m", &model][..], &more, &rows].concat();
    let refused = engraft(&big);
    assert_eq!(refused.status.code(), Some(3), "{}", stderr(&refused));
    let err = stderr(&refused);
    assert!(err.contains("--device pi-zero-2w") && err.contains("512 MiB"), "{err}");
}

#[test]
fn a_bench_keeps_its_budget_too() {
    let words = ["--memory-budget", "16 tokens", "the budget is 1.0 MiB", "K fits"];
    assert_refused(&["bench", "-t", "2", "--memory-budget", "1M"], 3, "does_not_fit", &words);
}

#[test]
fn lengths_are_within_the_models_positions() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, text) = (seedling(), folder.path().join("text.txt"));
    std::fs::write(&text, "turn on the light in the kitchen. ".repeat(200)).expect("writing");
    let eval = ["eval", "-m", &model, "--perplexity", &text.display().to_string(), "-t", "2"];
    // The usual window of 512 is more than the model has.
    assert!(result_of(&eval)["tokens"].as_u64() > Some(0));
    let generate = ["generate", "-m", &model, "-p", "x", "--ctx-size", "999"];
    assert_refused(&generate, 2, "usage", &["--ctx-size 999", "give at most 256"]);
}

#[test]
fn an_answer_tells_why_it_ended() {
    let model = seedling();
    let generate = ["generate", "-m", &model, "-p", "turn on the light", "--temp", "0", "--json"];
    let full = engraft(&[&generate[..], &["-n", "-1", "--ctx-size", "8"]].concat());
    assert_eq!(last_line(&full)["stopped"], "context", "{}", stdout(&full));
    assert!(stderr(&full).contains("stopped: the context of 8 tokens is full"), "{}", stderr(&full));
    let short = engraft(&[&generate[..], &["-n", "1"]].concat());
    assert_eq!(last_line(&short)["stopped"], "length", "{}", stdout(&short));
    assert!(!stderr(&short).contains("stopped:"), "{}", stderr(&short));
}
