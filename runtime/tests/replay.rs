//! Replay: the share is exact, runs are reproducible and can be resumed, and what is sampled is the base's.

use std::path::Path;
use std::sync::Arc;

use crate::common::TestResult;
use engraft_kernels::Kernels;
use engraft_runtime::ErrorKind;
use engraft_runtime::data::batches::in_order;
use engraft_runtime::data::{Batch, Batches, Cursor, Example, Mixed, MixedCursor};
use engraft_runtime::eval;
use engraft_runtime::generate::replay::{Sampling, Starts};
use engraft_runtime::model::text::Text;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::nn::Precision;
use engraft_runtime::rng::Rng;

/// Rows of two ids each, the first of which tells the row, from `first` on.
fn rows(first: u32, count: u32) -> Vec<Example> {
    (first..first + count).map(|id| Example { ids: vec![id, 0], mask: vec![false, true] }).collect()
}

fn take(mixed: &mut Mixed<'_>, batches: usize) -> Vec<Batch> {
    let mut batch = Batch::default();
    let mut next = || {
        mixed.next_into(&mut batch);
        batch.clone()
    };
    (0..batches).map(|_| next()).collect()
}

#[test]
fn the_share_is_exact_over_any_stretch() {
    let (data, replay) = (rows(0, 37), rows(1000, 11));
    for share in [0.1, 0.25, 1.0 / 3.0, 0.5, 0.9] {
        for batch_size in [1, 3, 8] {
            let mut mixed = Mixed::new(&data, &replay, share, batch_size, 7, MixedCursor::default());
            let ids: Vec<u32> = take(&mut mixed, 1000).into_iter().flat_map(|b| b.ids).collect();
            assert_eq!(ids.len(), 1000 * batch_size, "every batch is full");
            let mut replayed = 0;
            for (i, id) in ids.iter().enumerate() {
                replayed += u32::from(*id >= 1000);
                let wanted = (i + 1) as f64 * share;
                assert!((f64::from(replayed) - wanted).abs() <= 1.0, "{replayed} of {} at {share}", i + 1);
            }
            // Every row of a kind comes once before any comes again.
            for (first, count) in [(0, 37), (1000, 11)] {
                let own: Vec<u32> =
                    ids.iter().copied().filter(|id| (*id >= 1000) == (first >= 1000)).collect();
                for pass in own.chunks_exact(count as usize) {
                    let mut sorted = pass.to_vec();
                    sorted.sort_unstable();
                    assert_eq!(sorted, (first..first + count).collect::<Vec<_>>());
                }
                assert_ne!(own[..count as usize], own[count as usize..2 * count as usize], "one order");
            }
        }
    }
}

#[test]
fn runs_are_reproducible_and_resume_anywhere() {
    let (data, replay) = (rows(0, 37), rows(1000, 11));
    let new = |seed, cursor| Mixed::new(&data, &replay, 0.3, 4, seed, cursor);
    let whole = take(&mut new(5, MixedCursor::default()), 60);
    assert_eq!(whole, take(&mut new(5, MixedCursor::default()), 60));
    assert_ne!(whole, take(&mut new(6, MixedCursor::default()), 60));
    for at in [1, 9, 17, 59] {
        let mut mixed = new(5, MixedCursor::default());
        take(&mut mixed, at);
        assert_eq!(take(&mut new(5, mixed.cursor()), 60 - at), whole[at..], "resumed after {at}");
    }
    assert_eq!(new(5, MixedCursor::default()).batches_per_epoch(), (37.0_f64 / 2.8).ceil() as usize);
}

#[test]
fn without_replay_nothing_changes() {
    let data = rows(0, 10);
    let plain: Vec<Batch> = Batches::new(&data, 4, 3, Cursor::default()).take(20).collect();
    for (replay, share) in [(rows(1000, 0), 0.5), (rows(1000, 5), 0.0)] {
        let mut mixed = Mixed::new(&data, &replay, share, 4, 3, MixedCursor::default());
        assert_eq!(mixed.batches_per_epoch(), 3);
        assert_eq!(take(&mut mixed, 20), plain);
    }
    let mut empty = Mixed::new(&[], &data, 0.5, 4, 3, MixedCursor::default());
    assert_eq!(take(&mut empty, 1), [Batch::default()], "replay alone is no training");
}

fn seedling() -> Result<Arc<ModelFile>, engraft_runtime::Error> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../targets/cli/seedling.gguf");
    Ok(Arc::new(ModelFile::open(file)?))
}

#[test]
fn samples_are_the_bases_own_words() -> TestResult {
    let model = seedling()?;
    let text = Text::of(&model)?;
    let starts = Starts::of(&text, 64)?;
    let sampling = Sampling { count: 30, tokens: 24, rows_max: 64, seed: 3 };
    let sample = |sampling: Sampling, threads: usize| {
        let kernels = Arc::new(Kernels::detect(threads));
        sampling.run(&model, &kernels, Precision::Int8, &starts, |_| true)
    };
    let rows = sample(sampling, 1)?;
    assert_eq!(rows, sample(sampling, 3)?, "the rows depend on threads");
    assert_ne!(rows, sample(Sampling { seed: 4, ..sampling }, 1)?);
    assert_eq!(rows.len(), 30);
    let (tokens, longest) = sampling.extent(&starts);
    assert!(rows.iter().map(|r| r.ids.len()).sum::<usize>() <= tokens);
    for row in &rows {
        assert!(row.rows() <= longest && longest <= 64 && row.ids.len() == row.mask.len());
        assert!((1..=24).contains(&row.trained_tokens()) && !row.mask[0]);
        // Sampled tokens stand in one run at the end, and only the last may be an end.
        assert!(row.mask.is_sorted());
        let sampled = row.ids.iter().zip(&row.mask).filter(|(_, m)| **m).map(|(id, _)| *id);
        let ends: Vec<bool> = sampled.map(|id| text.tokenizer.is_end(id)).collect();
        assert!(ends[..ends.len() - 1].iter().all(|end| !end));
        assert!(ends.len() == 24 || ends[ends.len() - 1], "cut without reason");
    }
    // The base expects what it said, and is surprised by the same tokens in disorder.
    let mut rng = Rng::new(1, 1);
    let mut disordered = rows.clone();
    disordered.iter_mut().for_each(|row| {
        let first = row.ids.len() - row.trained_tokens();
        rng.shuffle(&mut row.ids[first..]);
    });
    let loss = |rows: &[Example]| {
        let kernels = Arc::new(Kernels::detect(1));
        let mut chain = eval::scoring_chain(model.clone(), kernels, Precision::Int8, 0, 64);
        let all = in_order(rows, 1).map(|b| chain.evaluate(None, &b, |_, _| {}));
        let (sum, count) = all.fold((0.0, 0), |(s, n), e| (s + e.loss_sum, n + e.targets));
        sum / count as f64
    };
    let (own, other) = (loss(&rows), loss(&disordered));
    eprintln!("{own} nats a sampled token, {other} in disorder");
    assert!(own + 1.0 < other, "{own}, {other}");
    let stopped =
        sampling.run(&model, &Arc::new(Kernels::detect(1)), Precision::Int8, &starts, |done| done < 3);
    assert_eq!(stopped.expect_err("stopped").kind(), ErrorKind::Cancelled);
    // A row can be long: it stops within one too.
    let mut told = Vec::new();
    let within = |done| {
        told.push(done);
        told.len() < 3
    };
    let one = Sampling { count: 1, ..sampling };
    let stopped = one.run(&model, &Arc::new(Kernels::detect(1)), Precision::Int8, &starts, within);
    assert_eq!((stopped.expect_err("stopped").kind(), told), (ErrorKind::Cancelled, vec![0, 0, 0]));
    assert_eq!(Starts::of(&text, 1).expect_err("no room").kind(), ErrorKind::Misuse);
    Ok(())
}
