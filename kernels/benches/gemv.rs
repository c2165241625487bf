//! Bandwidth of `dot_rows` per type and instruction set, over more weights than the caches hold:
//! GB of stored weights read per second, on one thread.
//!
//! `cargo bench -p engraft-kernels --bench gemv [-- COLS [TYPE]]`

use std::hint::black_box;
use std::time::Instant;

use engraft_kernels::{DType, Isa};

const BUFFER_BYTES: usize = 96 << 20;
const PARTS: usize = 96;
const PASSES: usize = 8;

/// GB/s of `run(part)` over all parts of the buffer. A part's time is the best of several passes, so
/// that a shared machine's interruptions drop out; between two visits of a part lies the whole buffer.
fn bandwidth_gb_s(bytes: usize, mut run: impl FnMut(usize)) -> f64 {
    let mut best = [f64::INFINITY; PARTS];
    for _ in 0..PASSES {
        for (part, best) in best.iter_mut().enumerate() {
            let start = Instant::now();
            run(part);
            *best = best.min(start.elapsed().as_secs_f64());
        }
    }
    bytes as f64 / best.iter().sum::<f64>() / 1e9
}

fn main() {
    let numbers: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let cols: usize = numbers.first().map_or(576, |cols| cols.parse().expect("COLS is a number"));
    // Small finite f16s wherever a block keeps its scales; times do not depend on the values.
    let buffer: Vec<u8> =
        (0..BUFFER_BYTES).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 13) as u8 & 0x3b).collect();
    let words = |bytes: &[u8]| {
        bytes.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w)).fold(0, u64::wrapping_add)
    };
    let part = |part: usize| &buffer[part * (BUFFER_BYTES / PARTS)..][..BUFFER_BYTES / PARTS];
    let plain = bandwidth_gb_s(BUFFER_BYTES, |i| _ = black_box(words(black_box(part(i)))));
    println!("plain read: {plain:.1} GB/s");
    let xq: Vec<i8> = (0..cols).map(|k| (k % 255) as i8).collect();
    let (xd, xs) = (vec![0.01; cols / 32], vec![0.5; cols / 16]);
    for dtype in DType::ALL.into_iter().filter(|dtype| !dtype.is_float()) {
        if numbers.get(1).is_some_and(|name| name != dtype.name()) {
            continue;
        }
        let Some(row_bytes) = dtype.row_bytes(cols) else { continue };
        let mut out = vec![0.0; BUFFER_BYTES / PARTS / row_bytes];
        let bytes = out.len() * row_bytes;
        let xs = if dtype.has_bias() { &xs[..cols / dtype.group_len()] } else { &[] };
        print!("{:7} {cols} cols:", dtype.name());
        for isa in Isa::available().filter(|isa| *isa != Isa::SCALAR && *isa != Isa::PORTABLE) {
            let gb_s = bandwidth_gb_s(bytes * PARTS, |i| {
                isa.dot_rows(dtype, &part(i)[..bytes], &xq, &xd, xs, black_box(&mut out))
            });
            print!("  {} {gb_s:5.1} GB/s", isa.name());
        }
        println!();
    }
}
