//! Data: JSON rows as token ids, from files or from memory.

use std::ffi::c_char;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engraft_runtime::Error;
use engraft_runtime::compare::material::Parts;
use engraft_runtime::data::source::part_file;
use engraft_runtime::data::{DataOptions, Origin, OverLong, Part, TrainValid, load_parts};
use engraft_runtime::gate::task::Task;
use engraft_runtime::model::digest_cache::Stamp;
use engraft_runtime::run::settings;

use crate::caller::{self, at_most, or, structs};
use crate::error::{ENGRAFT_BAD_DATA, Failure, Result};
use crate::handle::{self, kind};
use crate::model::{self, Model};

/// The rows belong to no known task.
pub const ENGRAFT_TASK_NONE: u32 = 0;
/// GSM8K: answers after `####`.
pub const ENGRAFT_TASK_GSM8K: u32 = 1;
/// Orca-Math: answers in prose.
pub const ENGRAFT_TASK_ORCA_MATH: u32 = 2;
/// SVAMP: one-step word problems.
pub const ENGRAFT_TASK_SVAMP: u32 = 3;

/// Maximum tokens per row.
const ROW_TOKENS_MAX: u32 = 1 << 20;

/// Rows for training and validation. Immutable; any number of threads may use it at once.
pub struct Data {
    _opaque: [u8; 0],
}

kind!(Data, Arc<Inner>, "data");

/// The value behind a data handle.
pub(crate) struct Inner {
    pub(crate) model: Arc<model::Inner>,
    pub(crate) rows: TrainValid,
    pub(crate) options: DataOptions,
    pub(crate) task: Option<Task>,
    source: Given,
    /// The source's files before reading; without a stamp if the system doesn't number files.
    stamps: Vec<(PathBuf, Option<Stamp>)>,
}

/// Where rows came from, so that the gate can read them again.
struct Given {
    train: Source,
    valid: Option<Source>,
    test: Option<Source>,
}

/// Where a part came from.
enum Source {
    File(PathBuf),
    Memory(Vec<u8>),
}

/// How to read rows. Zero is the default for every field.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct DataParams {
    /// `sizeof(engraft_data_params)`.
    pub struct_size: u32,
    /// Maximum tokens per row; longer rows are cut (0: 256). Limited to what the model was trained on.
    pub max_seq_length: u32,
    /// 1 trains on every token instead of only on answers.
    pub no_mask_prompt: u32,
    /// 1 joins prompt and completion without the model's chat template.
    pub raw: u32,
    /// `ENGRAFT_TASK_*`: how to ask the questions and read the answers.
    pub task: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Share of the rows to hold out if no validation rows are given (0: 0.1; negative: none).
    pub valid_fraction: f64,
    /// Seed for that choice.
    pub split_seed: u64,
}

/// Facts about the rows.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct DataInfo {
    /// `sizeof(engraft_data_info)`.
    pub struct_size: u32,
    /// 1 if the validation rows were split off by seed.
    pub split_by_seed: u32,
    /// Training rows.
    pub train_rows: u64,
    /// Tokens in the training rows that count in the loss.
    pub train_tokens: u64,
    /// Validation rows.
    pub valid_rows: u64,
    /// Tokens in the validation rows that count in the loss.
    pub valid_tokens: u64,
    /// Skipped rows; `engraft_data_skipped` names them.
    pub skipped: u64,
    /// Rows that were cut.
    pub truncated: u64,
    /// Validation rows that are also training rows, which make the result look too good.
    pub duplicates: u64,
    /// Positions of the longest row.
    pub rows_max: u64,
}

structs!(DataParams = "engraft_data_params", DataInfo = "engraft_data_info");

impl Given {
    fn parts(&self) -> Parts<'_> {
        Parts {
            train: self.train.origin(Part::Train),
            valid: self.valid.as_ref().map(|source| source.origin(Part::Valid)),
            test: self.test.as_ref().map(|source| source.origin(Part::Test)),
        }
    }

    fn sources(&self) -> impl Iterator<Item = &Source> {
        [Some(&self.train), self.valid.as_ref(), self.test.as_ref()].into_iter().flatten()
    }

    /// Stamps that change when one of its files changes.
    ///
    /// # Errors
    /// `IO`.
    fn stamps(&self) -> Result<Vec<(PathBuf, Option<Stamp>)>> {
        let stamp = |source: &Source| {
            let Source::File(path) = source else { return None };
            let found = std::fs::metadata(path).map_err(|e| Error::io(path.display().to_string(), e).into());
            Some(found.map(|found| (path.clone(), Stamp::of(&found))))
        };
        self.sources().filter_map(stamp).collect()
    }
}

impl Source {
    fn origin(&self, part: Part) -> Origin<'_> {
        match self {
            Source::File(path) => Origin::File(path),
            Source::Memory(lines) => Origin::Memory { name: Path::new(part.file_name()), lines },
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Source::File(_) => 0,
            Source::Memory(lines) => lines.capacity(),
        }
    }
}

impl Inner {
    fn new(model: &Arc<model::Inner>, params: &DataParams, source: Given) -> Result<Inner> {
        caller::unused(params.reserved)?;
        let task = match params.task {
            ENGRAFT_TASK_NONE => None,
            ENGRAFT_TASK_GSM8K => Some(Task::Gsm8k),
            ENGRAFT_TASK_ORCA_MATH => Some(Task::OrcaMath),
            ENGRAFT_TASK_SVAMP => Some(Task::Svamp),
            other => return Err(Failure::misuse(format!("task is {other}; use one of ENGRAFT_TASK_*"))),
        };
        let rows_max = at_most(params.max_seq_length, ROW_TOKENS_MAX, "max_seq_length")?;
        let rows_max = or(rows_max, settings::ROW_TOKENS as u32).min(model.file.config().context_len);
        let fraction = (settings::VALID_FRACTION, Some(0.0));
        let options = DataOptions {
            reader: task.map(Task::reader),
            mask_prompt: params.no_mask_prompt == 0,
            raw: params.raw != 0,
            max_seq_length: rows_max,
            over_long: OverLong::Truncate,
            valid_fraction: caller::number(params.valid_fraction, fraction, 0.0..=0.999, "valid_fraction")?,
            split_seed: params.split_seed,
            ..DataOptions::default()
        };
        let (text, stamps) = (model.text()?, source.stamps()?);
        let Parts { train, valid, .. } = source.parts();
        let rows = load_parts(train, valid, &text.tokenizer, &text.chat, &options)?;
        Ok(Inner { model: model.clone(), rows, options, task, source, stamps })
    }

    /// Where the rows come from.
    pub(crate) fn parts(&self) -> Parts<'_> {
        self.source.parts()
    }

    /// Refuses files that have changed since they were opened. Call it after reading them again.
    ///
    /// # Errors
    /// `BAD_DATA`, `IO`.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        let now = self.source.stamps()?;
        let changed = |((_, then), (_, now)): &(&(_, Option<Stamp>), &(_, Option<Stamp>))| {
            then.zip(*now).is_some_and(|(then, now)| !then.same_content(&now))
        };
        let Some((_, (path, _))) = self.stamps.iter().zip(&now).find(changed) else { return Ok(()) };
        let message = format!("{}: changed since it was opened; open the data again", path.display());
        Err(Failure::new(ENGRAFT_BAD_DATA, message))
    }

    /// Private memory in addition to the ids.
    pub(crate) fn text_bytes(&self) -> usize {
        self.source.sources().map(Source::bytes).sum()
    }

    /// Private memory of the ids.
    pub(crate) fn rows_bytes(&self) -> usize {
        self.rows.train.heap_bytes() + self.rows.valid.heap_bytes()
    }

    /// # Errors
    /// `MISUSE` for data that was read for another model.
    pub(crate) fn check_of(&self, model: &Arc<model::Inner>) -> Result<()> {
        match Arc::ptr_eq(&self.model, model) {
            true => Ok(()),
            false => Err(Failure::misuse("the data was read for another model handle; read it for this one")),
        }
    }

    fn info(&self) -> DataInfo {
        let TrainValid { train, valid, split_by_seed, duplicates } = &self.rows;
        DataInfo {
            struct_size: 0,
            split_by_seed: u32::from(*split_by_seed),
            train_rows: train.examples.len() as u64,
            train_tokens: train.trained_tokens() as u64,
            valid_rows: valid.examples.len() as u64,
            valid_tokens: valid.trained_tokens() as u64,
            skipped: self.skipped_count(),
            truncated: (train.truncated + valid.truncated) as u64,
            duplicates: *duplicates as u64,
            rows_max: train.rows_max().max(valid.rows_max()) as u64,
        }
    }

    /// After a split, the training rows hold the count of skipped rows.
    fn skipped_count(&self) -> u64 {
        (self.rows.train.skipped_count + self.rows.valid.skipped_count) as u64
    }
}

/// Sets all fields to their default. `struct_size` is `sizeof(engraft_data_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_data_default_params(params: *mut DataParams, struct_size: usize) -> i32 {
    // SAFETY: the crate's contract, for the caller's struct.
    unsafe { caller::defaults("engraft_data_default_params", params, struct_size) }
}

/// Reads rows from a file, or from a folder with `train.jsonl` and optionally `valid.jsonl` and `test.jsonl`.
/// `params` may be NULL. `*data` is freed with `engraft_data_free`. A gate reads the files again and refuses
/// them if they have changed, so leave them unchanged until it has run.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_data_open(
    model: *const Model,
    path: *const c_char,
    path_length: usize,
    params: *const DataParams,
    data: *mut *mut Data,
) -> i32 {
    let make = |model: &Arc<model::Inner>| {
        // SAFETY: the crate's contract, for the caller's path and struct.
        let (path, params) = unsafe { (caller::path(path, path_length, "path")?, caller::settings(params)?) };
        let part = |part: Part| Ok::<_, Failure>(part_file(&path, part)?.map(Source::File));
        let train = part(Part::Train)?.unwrap_or_else(|| Source::File(path.clone()));
        let given = Given { train, valid: part(Part::Valid)?, test: part(Part::Test)? };
        Ok(Arc::new(Inner::new(model, &params, given)?))
    };
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::make("engraft_data_open", model, data, make) }
}

/// Reads rows from memory: JSON, one object per line, as in such files. `valid` and `test` may be NULL; then a
/// share of `train` is split off for them. The library keeps a copy of everything. `params` may be NULL.
/// `*data` is freed with `engraft_data_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_data_from_memory(
    model: *const Model,
    train: *const u8,
    train_length: usize,
    valid: *const u8,
    valid_length: usize,
    test: *const u8,
    test_length: usize,
    params: *const DataParams,
    data: *mut *mut Data,
) -> i32 {
    let make = |model: &Arc<model::Inner>| {
        // SAFETY: the crate's contract, for the caller's struct and bytes.
        let (params, train, valid, test) = unsafe {
            (
                caller::settings(params)?,
                caller::bytes(train, train_length, "train")?,
                caller::bytes(valid, valid_length, "valid")?,
                caller::bytes(test, test_length, "test")?,
            )
        };
        let copy = |part: &[u8], what: &str| caller::copied(part, what).map(Source::Memory);
        let copy_if_given = |part: &[u8], what: &str| match part {
            [] => Ok(None),
            part => copy(part, what).map(Some),
        };
        let (train, valid) = (copy(train, "train")?, copy_if_given(valid, "valid")?);
        let given = Given { train, valid, test: copy_if_given(test, "test")? };
        Ok(Arc::new(Inner::new(model, &params, given)?))
    };
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::make("engraft_data_from_memory", model, data, make) }
}

/// Frees data, now or as soon as no trainer or gate uses it. Does nothing for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_data_free(data: *mut Data) -> i32 {
    handle::free("engraft_data_free", data)
}

/// Gets facts about the rows. Set `struct_size` first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_data_get_info(data: *const Data, info: *mut DataInfo) -> i32 {
    handle::call("engraft_data_get_info", data, |data| {
        // SAFETY: the crate's contract, for the caller's struct.
        unsafe { caller::answer(info, data.info()) }
    })
}

/// Copies the place of the `index`-th skipped row and why it was skipped, but never its text. Only the first
/// thousand of a part are known; a larger index is `MISUSE`. See `engraft_message` for the buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_data_skipped(
    data: *const Data,
    index: usize,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> i32 {
    handle::call("engraft_data_skipped", data, |data| {
        let mut named = data.rows.train.skipped.iter().chain(&data.rows.valid.skipped);
        let unknown = || Failure::misuse(format!("skipped row {index} isn't known"));
        let row = named.nth(index).ok_or_else(unknown)?;
        // SAFETY: the crate's contract, for the caller's buffer.
        unsafe { caller::copy_text(&row.to_string(), buffer, capacity, length) }
    })
}
