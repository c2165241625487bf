//! Going on: from a finished adapter, and from directions that an earlier run found.

use std::path::Path;
use std::sync::Arc;

use crate::common::TestResult;
use engraft_runtime::adapter::{Adapter, Init, LoraConfig, StoredAs};
use engraft_runtime::data::{TrainValid, load_train_valid};
use engraft_runtime::model::digest_cache::DigestCache;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::run::{Earlier, general};
use engraft_runtime::storage::Disk;
use engraft_runtime::{
    Base, Checkpoints, DataOptions, Error, ErrorKind, Event, Example, Length, Limit, Method, Observer, Run,
    RunRows, Settings, Start, Text,
};

const MODEL: &str = "../targets/cli/seedling.gguf";

/// Rows of the demo, and ordinary ones.
struct Given {
    base: Base,
    data: TrainValid,
    general: Vec<Example>,
}

impl Given {
    fn new(cache: Option<&Path>) -> Result<Given, Error> {
        let mut base = Base::open(MODEL)?;
        if let Some(folder) = cache {
            let model = ModelFile::open(MODEL)?.with_digest_cache(DigestCache::new(folder));
            base.model = Arc::new(model);
        }
        let text = Text::of(&base.model)?;
        let reading = DataOptions { max_seq_length: 64, ..DataOptions::default() };
        let file = "../targets/cli/demo/private_train.jsonl".as_ref();
        let data = load_train_valid(file, &text.tokenizer, &text.chat, &reading)?;
        let general = general::rows(&text, 48)?[..24].to_vec();
        Ok(Given { base, data, general })
    }

    fn rows(&self) -> RunRows<'_> {
        RunRows {
            train: &self.data.train.examples,
            valid: &self.data.valid.examples,
            general: &self.general,
            ..RunRows::default()
        }
    }

    fn settings(&self, steps: u64) -> Result<Settings, Error> {
        let lora = LoraConfig::new(
            self.base.model.config(),
            4,
            8.0,
            0.0,
            &engraft_runtime::model::Proj::ALL,
            &(0..self.base.model.config().n_layers).collect::<Vec<_>>(),
        )?;
        Ok(Settings { length: Length::Steps(steps), ..Settings::new(Method::Adapter(lora)) })
    }

    /// A run to its end: its adapter, and what it told.
    fn run(&self, settings: &Settings, start: Start) -> Result<(Adapter, Vec<String>), Error> {
        let rows = self.rows();
        let planned = self.base.plan(settings, rows, &Limit::default())?;
        let mut heard = Heard::default();
        let (mut run, _) =
            Run::begin("", &self.base, settings.clone(), &planned.request, rows, start, &mut heard)?;
        run.open(rows, &mut heard)?;
        run.go(rows, None, &mut heard)?;
        run.look(rows, &mut heard)?;
        Ok((run.snapshot()?.expect("an adapter"), heard.0))
    }
}

#[derive(Default)]
struct Heard(Vec<String>);

impl Observer for Heard {
    fn go_on(&mut self, _: &mut dyn FnMut() -> Result<(), Error>) -> Result<(), Error> {
        Ok(())
    }

    fn tell(&mut self, _: &str, event: Event<'_>) {
        if let Event::Note(text) = event {
            self.0.push(text.to_string());
        }
    }
}

fn a_of(adapter: &Adapter) -> Vec<u32> {
    adapter
        .layout
        .slots()
        .flat_map(|(_, _, slot)| adapter.theta[slot.a].iter().map(|v| v.to_bits()))
        .collect()
}

/// An adapter goes on where it stood: steps and targets add up, its loss begins where it ended, and directions that were
/// protected stay so.
#[test]
fn a_run_goes_on_with_a_finished_adapter() -> TestResult {
    let given = Given::new(None)?;
    let folder = tempfile::tempdir()?;
    for protects in [false, true] {
        let plain = given.settings(6)?;
        let first = if protects { plain.clone().protected() } else { plain.clone() };
        let (adapter, _) = given.run(&first, Start::Fresh(None))?;
        let saved = adapter.save(&Disk, &folder.path().join("first"), StoredAs::F32)?;
        let earlier = Earlier::open(&saved.path, &given.base.model)?;
        let settings = given.settings(4)?.going_on(earlier);
        assert_eq!(settings.general_kl.is_some(), protects);
        let (further, told) = given.run(&settings, Start::Fresh(None))?;
        assert!(told.iter().all(|note| !note.contains("directions")), "{told:?}");
        let (before, after) = (&adapter.meta, &further.meta);
        assert_eq!((before.steps, after.steps, after.init), (6, 10, before.init));
        assert!(after.tokens > before.tokens && after.seed == before.seed);
        let began = after.valid_loss_before.expect("a loss");
        let ended = before.valid_loss_after.expect("a loss");
        assert!((began - ended).abs() < 1e-6 && began < before.valid_loss_before.expect("a loss"));
        assert_eq!(a_of(&further) == a_of(&adapter), protects, "A is trained unless it is protected");
        assert_ne!(further.theta, adapter.theta);
    }
    Ok(())
}

/// A run that goes on, stops, and resumes ends with the same bits; with another adapter it doesn't resume at all.
#[test]
fn a_run_that_goes_on_resumes_to_the_same_bits() -> TestResult {
    let given = Given::new(None)?;
    let folder = tempfile::tempdir()?;
    let earlier = |steps, name: &str| -> Result<Earlier, Error> {
        let (adapter, _) = given.run(&given.settings(steps)?, Start::Fresh(None))?;
        Earlier::open(&adapter.save(&Disk, &folder.path().join(name), StoredAs::F32)?.path, &given.base.model)
    };
    let settings = given.settings(6)?.going_on(earlier(3, "three")?);
    let (whole, _) = given.run(&settings, Start::Fresh(None))?;
    let checkpoints = || Checkpoints::open(&Disk, &folder.path().join("run"));
    std::fs::create_dir(folder.path().join("run"))?;
    let rows = given.rows();
    let planned = given.base.plan(&settings, rows, &Limit::default())?;
    let start = Start::Fresh(Some(checkpoints()?));
    let (mut run, _) =
        Run::begin("", &given.base, settings.clone(), &planned.request, rows, start, &mut Heard::default())?;
    run.go(rows, Some(2), &mut Heard::default())?;
    run.checkpoint(true, &mut Heard::default())?;
    let other = given.settings(6)?.going_on(earlier(2, "two")?);
    let refused = given.run(&other, Start::Resume(checkpoints()?)).expect_err("another adapter");
    assert!(refused.kind() == ErrorKind::Misuse && refused.to_string().contains("goes on with"), "{refused}");
    let (resumed, _) = given.run(&settings, Start::Resume(checkpoints()?))?;
    assert!(resumed.theta == whole.theta && resumed.meta.steps == 9);

    // A file that changes meanwhile isn't what the plan was made for.
    let (another, _) = given.run(&given.settings(1)?, Start::Fresh(None))?;
    another.save(&Disk, &folder.path().join("three"), StoredAs::F32)?;
    let changed = given.run(&settings, Start::Fresh(None)).expect_err("it has changed");
    assert!(changed.to_string().contains("has changed"), "{changed}");
    Ok(())
}

/// Directions are found once for each model and text, kept beside its digest, and found anew where the file is damaged,
/// or of something else.
#[test]
fn directions_are_found_once() -> TestResult {
    let folder = tempfile::tempdir()?;
    let given = Given::new(Some(folder.path()))?;
    let settings = given.settings(1)?.protected();
    let of = |settings: &Settings, given: &Given| -> Result<(Vec<u32>, bool), Error> {
        let (adapter, told) = given.run(settings, Start::Fresh(None))?;
        assert_eq!(adapter.meta.init, Init::Quiet);
        Ok((a_of(&adapter), told.iter().any(|note| note.contains("measured before"))))
    };
    let (uncached, again) = of(&settings, &Given::new(None)?)?;
    assert!(!again);
    assert_eq!(of(&settings, &given)?, (uncached.clone(), false));
    assert_eq!(of(&settings, &given)?, (uncached.clone(), true));

    let is_directions =
        |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with("directions-");
    let file = std::fs::read_dir(folder.path())?.flatten().find(is_directions).expect("a file").path();
    let mut bytes = std::fs::read(&file)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, &bytes)?;
    assert_eq!(of(&settings, &given)?, (uncached.clone(), false), "a damaged file counts as absent");
    assert_eq!(of(&settings, &given)?, (uncached.clone(), true), "and is replaced");

    let mut other_text = Given::new(Some(folder.path()))?;
    other_text.general.pop();
    let wider = Settings { begin: engraft_runtime::run::Begin::Protected(0.5), ..settings.clone() };
    for (settings, given) in [(&settings, &other_text), (&wider, &given)] {
        let (found, again) = of(settings, given)?;
        assert!(!again && found != uncached);
    }
    Ok(())
}
