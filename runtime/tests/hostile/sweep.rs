//! Mutations by seed: a short run with every test, a long one by hand.
//!
//! `ENGRAFT_MUTATION_SEED` chooses another seed than the fixed one; `ENGRAFT_MUTATION_COUNT` other numbers of
//! inputs than each format's own; `ENGRAFT_MUTATION_CASE` one input alone.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use engraft_runtime::Result;

use crate::hostile::mutate::{self, Dice};
use crate::hostile::run::{Clock, HeapMax, TIME_MAX, watch};
use crate::hostile::subject;

struct Format {
    name: &'static str,
    make: fn(&mut Dice) -> Vec<u8>,
    subject: fn(&[u8]) -> Result<()>,
    heap_max: HeapMax,
    /// Inputs of the short run, and of the long one.
    counts: [u64; 2],
}

fn of_text(len: usize) -> usize {
    (4 << 20) + 200 * len
}

/// A model's template is rendered too.
fn of_templates(len: usize) -> usize {
    (256 << 20) + 64 * len
}

const FORMATS: [Format; 6] = [
    Format {
        name: "gguf",
        make: mutate::gguf,
        subject: subject::gguf,
        heap_max: of_templates,
        counts: [8000, 300_000],
    },
    Format {
        name: "frame",
        make: mutate::frame,
        subject: subject::frame,
        heap_max: of_text,
        counts: [6000, 200_000],
    },
    Format {
        name: "safetensors",
        make: mutate::safetensors,
        subject: subject::safetensors,
        heap_max: of_text,
        counts: [4000, 150_000],
    },
    Format {
        name: "jsonl",
        make: mutate::jsonl,
        subject: subject::jsonl,
        heap_max: of_text,
        counts: [6000, 150_000],
    },
    Format {
        name: "adapter_config",
        make: mutate::adapter_config,
        subject: subject::adapter_config,
        heap_max: of_text,
        counts: [3000, 100_000],
    },
    Format {
        name: "template",
        make: mutate::template,
        subject: subject::template,
        heap_max: of_templates,
        counts: [3000, 100_000],
    },
];

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {text:?}")))
}

/// What a run of one format came to.
struct Told {
    accepted: u64,
    refused: u64,
    problems: Vec<String>,
}

/// Runs `count` inputs of a format; prints what became of them.
fn sweep(format: &Format, seed: u64, count: u64) -> Told {
    let begin = Instant::now();
    let mut told = Told { accepted: 0, refused: 0, problems: Vec::new() };
    let mut slowest = (Duration::ZERO, 0);
    let cases = number("ENGRAFT_MUTATION_CASE").map_or(0..count, |case| case..case + 1);
    for case in cases {
        let bytes = (format.make)(&mut Dice::new(seed, case));
        if number("ENGRAFT_MUTATION_CASE").is_some() {
            let shown: String = String::from_utf8_lossy(&bytes).chars().take(2000).collect();
            eprintln!("{} of case {case}: {shown:?}", format.name);
        }
        match watch(&bytes, format.subject, format.heap_max) {
            Err(problem) => told.problems.push(format!(
                "{}, ENGRAFT_MUTATION_SEED={seed} ENGRAFT_MUTATION_CASE={case}, {} bytes: {problem}",
                format.name,
                bytes.len()
            )),
            Ok(outcome) => {
                slowest = slowest.max((outcome.time, case));
                *if outcome.result.is_ok() { &mut told.accepted } else { &mut told.refused } += 1;
            }
        }
        if told.problems.len() == 10 {
            break;
        }
    }
    eprintln!(
        "{}: seed {seed}, {} inputs in {:.1} s: {} accepted and used, {} refused, {} wrong; slowest {:.1} ms (case {})",
        format.name,
        told.accepted + told.refused + told.problems.len() as u64,
        begin.elapsed().as_secs_f64(),
        told.accepted,
        told.refused,
        told.problems.len(),
        slowest.0.as_secs_f64() * 1e3,
        slowest.1
    );
    told
}

fn sweep_all(run: usize) {
    let seed = number("ENGRAFT_MUTATION_SEED").unwrap_or(0x656e_6772);
    let (mut wrong, mut total) = (String::new(), 0);
    for format in &FORMATS {
        let told = sweep(format, seed, number("ENGRAFT_MUTATION_COUNT").unwrap_or(format.counts[run]));
        total += told.accepted + told.refused;
        told.problems.iter().for_each(|p| writeln!(wrong, "{p}").expect("a string"));
        if number("ENGRAFT_MUTATION_CASE").is_none() {
            let (least, all) = (told.accepted.min(told.refused), told.accepted + told.refused);
            assert!(least * 100 >= all, "{}: too few are accepted or refused to say much", format.name);
        }
    }
    eprintln!("{total} mutated inputs in all");
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn mutations_are_refused_or_used() {
    sweep_all(0);
}

/// `cargo test --workspace --test runtime -- --ignored --nocapture a_million`
#[test]
#[ignore = "a million inputs take some minutes"]
fn a_million_mutations_are_refused_or_used() {
    sweep_all(1);
}

/// `ENGRAFT_FUZZ_SEEDS=FOLDER cargo test --workspace --test runtime -- --ignored seeds_for_fuzzing`
#[test]
#[ignore = "writes files where ENGRAFT_FUZZ_SEEDS says"]
fn seeds_for_fuzzing() {
    let folder = std::env::var_os("ENGRAFT_FUZZ_SEEDS").expect("ENGRAFT_FUZZ_SEEDS names a folder");
    for format in &FORMATS {
        let folder = std::path::Path::new(&folder).join(format.name);
        std::fs::create_dir_all(&folder).expect("a folder");
        for case in 0..200 {
            let bytes = (format.make)(&mut Dice::new(0, case));
            std::fs::write(folder.join(case.to_string()), bytes).expect("a file");
        }
    }
}

/// Readers as they should not be: the sweep must find fault with each.
#[test]
fn broken_readers_are_caught() {
    fn indexes(bytes: &[u8]) -> Result<()> {
        // The header's length, taken at its word.
        std::hint::black_box(bytes[u16::from_le_bytes([bytes[0], bytes[1]]) as usize]);
        Ok(())
    }
    fn trusts_lengths(bytes: &[u8]) -> Result<()> {
        let length = bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        // Capped here alone: the control must not take the machine's memory itself.
        drop(Vec::<u8>::with_capacity(length.min(1 << 33) as usize));
        Ok(())
    }
    fn takes_long(bytes: &[u8]) -> Result<()> {
        let clock = Clock::start();
        while bytes.len().is_multiple_of(7) && clock.time() <= *TIME_MAX {}
        Ok(())
    }
    fn says_too_much(bytes: &[u8]) -> Result<()> {
        let words = String::from_utf8_lossy(bytes);
        Err(engraft_runtime::Error::new(
            engraft_runtime::ErrorKind::Corrupt,
            format!("hostile: {}", words.repeat(20)),
        ))
    }
    fn adds_unchecked(bytes: &[u8]) -> Result<()> {
        let length = bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        std::hint::black_box(length + 8);
        Ok(())
    }
    eprintln!("the panics below are meant:");
    let readers: [(&'static str, fn(&[u8]) -> Result<()>, &str); 5] = [
        ("indexes without a check", indexes, "panics"),
        ("allocates what is declared", trusts_lengths, "allocates"),
        ("takes long", takes_long, "takes"),
        ("quotes without end", says_too_much, "its message"),
        ("adds unchecked", adds_unchecked, "panics"),
    ];
    let told: Vec<_> = readers
        .iter()
        .map(|(name, subject, _)| {
            sweep(
                &Format {
                    name,
                    make: mutate::safetensors,
                    subject: *subject,
                    heap_max: of_text,
                    counts: [0; 2],
                },
                1,
                if *name == "takes long" { 40 } else { 300 },
            )
        })
        .collect();
    for ((name, _, wanted), told) in readers.iter().zip(told) {
        assert!(told.problems.iter().any(|p| p.contains(wanted)), "{name}: {:?}", told.problems);
    }
}
