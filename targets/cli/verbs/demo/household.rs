//! The demo's built-in files: a model and a household's commands.

use std::sync::Arc;

use engraft_runtime::compare::material::{Material, Rows};
use engraft_runtime::compare::score::Subject;
use engraft_runtime::data::{DataOptions, Example};
use engraft_runtime::error::{Error, ErrorKind, Result};
use engraft_runtime::generate::batch::Sequences;
use engraft_runtime::model::chat::Message;
use engraft_runtime::model::map::Map;
use engraft_runtime::model::text::Text;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::run::Observer;

/// Tensors begin at multiples of 32 bytes in the file, and kernels read rows with wide loads.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static MODEL: &Aligned<[u8]> = &Aligned(*include_bytes!("../../seedling.gguf"));
const PRIVATE_TRAIN: &str = include_str!("../../demo/private_train.jsonl");
const PRIVATE_TEST: &str = include_str!("../../demo/private_test.jsonl");
const GENERIC_TEST: &str = include_str!("../../demo/generic_test.jsonl");
/// Everyday commands without answers. None of them is in the tests.
const EVERYDAY: &str = include_str!("../../demo/everyday.txt");

/// How many of the forty examples choose a run's best step.
const VALID_ROWS: usize = 4;
/// Maximum tokens of an answer; the right ones are shorter.
pub(super) const ANSWER_MAX: usize = 96;

/// The built-in model.
///
/// # Errors
/// None, unless the program's file is damaged.
pub(crate) fn model() -> Result<Arc<ModelFile>> {
    let map = Map::from_static("seedling.gguf (built in)", &MODEL.0);
    Ok(Arc::new(ModelFile::from_map(map)?))
}

/// A command and the action it means.
#[derive(serde::Deserialize)]
struct Command {
    prompt: String,
    completion: String,
}

/// Forty commands with this household's private words to train on, and others to judge by.
///
/// # Errors
/// None, unless the program's file is damaged.
pub(super) fn private(text: &Text, reading: &DataOptions) -> Result<Material> {
    let all = rows("private_train.jsonl", PRIVATE_TRAIN, text, reading)?;
    let (train, valid) = all.split_off(VALID_ROWS, reading.split_seed);
    let held_out = rows("private_test.jsonl", PRIVATE_TEST, text, reading)?;
    Material::of(train, valid, held_out, reading)
}

/// Commands with everyday words. The model answers these already and must not forget them.
///
/// # Errors
/// None, unless the program's file is damaged.
pub(super) fn everyday(text: &Text, reading: &DataOptions) -> Result<Rows> {
    rows("generic_test.jsonl", GENERIC_TEST, text, reading)
}

/// Other everyday commands with the base's answers. Mixed into training, they preserve what it knows.
///
/// # Errors
/// `Cancelled`.
pub(super) fn replay(
    base: &Subject,
    text: &Text,
    reading: &DataOptions,
    observer: &mut dyn Observer,
) -> Result<Vec<Example>> {
    let asked = |command: &str| -> Result<Vec<u32>> {
        let messages = [Message::new("user", command)];
        text.chat_prompt(&messages)
    };
    let prompts: Vec<Vec<u32>> = EVERYDAY.lines().map(asked).collect::<Result<_>>()?;
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let is_end = |id: u32| text.tokenizer.is_end(id);
    let found = base.answers(&prompts, (ANSWER_MAX, Sequences::SLOTS), &is_end, &|_, _| false, observer)?;
    let answers = found.answers.iter().map(|ids| text.tokenizer.decode(ids));
    let pairs: Vec<_> = EVERYDAY.lines().map(str::to_owned).zip(answers).collect();
    Ok(Rows::of_pairs("everyday.txt", &pairs, text, reading)?.data.examples)
}

fn rows(name: &str, jsonl: &str, text: &Text, reading: &DataOptions) -> Result<Rows> {
    let damaged = |e| Error::new(ErrorKind::Corrupt, format!("{name} (built in): {e}"));
    let pair = |line| serde_json::from_str(line).map(|c: Command| (c.prompt, c.completion)).map_err(damaged);
    let pairs: Vec<_> = jsonl.lines().map(pair).collect::<Result<_>>()?;
    Rows::of_pairs(name, &pairs, text, reading)
}
