//! Data files and directories: which file is which part, how one is read, and the seeded split.

use super::formats::{DataOptions, Format, OverLong, Sample};
use super::jsonl::{EachRow, for_each_row, for_each_row_of};
use super::masks::{encode_after, encode_sample, prompting};
use super::{Dataset, Example, SKIPPED_NAMED_MAX, Skipped};
use crate::error::{Error, ErrorKind, Result};
use crate::model::chat::ChatTemplate;
use crate::model::tokenizer::Tokenizer;
use crate::rng::Rng;
use serde_json::Value;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// Rows inspected to detect the format.
const DETECT_ROWS: usize = 100;

/// A part of a data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// `train.jsonl`, or the only `.jsonl` file of the directory.
    Train,
    /// `valid.jsonl`.
    Valid,
    /// `test.jsonl`.
    Test,
}

impl Part {
    /// The file's name in a data directory.
    pub const fn file_name(self) -> &'static str {
        match self {
            Part::Train => "train.jsonl",
            Part::Valid => "valid.jsonl",
            Part::Test => "test.jsonl",
        }
    }
}

/// Where rows come from.
#[derive(Clone, Copy, Debug)]
pub enum Origin<'a> {
    /// A file.
    File(&'a Path),
    /// Lines already in memory, and a name for errors.
    Memory {
        /// Their name in errors; not necessarily a file.
        name: &'a Path,
        /// JSON, one object a line.
        lines: &'a [u8],
    },
}

impl<'a> Origin<'a> {
    /// The name errors use: a file's path.
    pub fn name(self) -> &'a Path {
        match self {
            Origin::File(name) | Origin::Memory { name, .. } => name,
        }
    }

    fn for_each_row(self, row: &mut EachRow<'_>) -> Result<()> {
        match self {
            Origin::File(file) => for_each_row(file, row),
            Origin::Memory { name, lines } => for_each_row_of(lines, name, row),
        }
    }
}

/// What to train on and what to validate with.
#[derive(Clone, Debug)]
pub struct TrainValid {
    /// The rows to train on.
    pub train: Dataset,
    /// Rows held out for validation; none if the fraction is 0.
    pub valid: Dataset,
    /// Whether `valid` was split off `train` by seed rather than read from its own file.
    pub split_by_seed: bool,
    /// Rows of `valid` that also occur in `train`, token for token: they flatter the validation loss.
    pub duplicates: usize,
}

/// The file of a part: `path` itself if it is a file (for [`Part::Train`]), else the part's file in the
/// directory. `None` if the directory has no such file.
///
/// Errors: `Io` for a path that can't be read; `BadData` for a directory with none of the names and not exactly
/// one `.jsonl` file.
pub fn part_file(path: &Path, part: Part) -> Result<Option<PathBuf>> {
    let about = std::fs::metadata(path).map_err(|e| Error::io(format!("opening {}", path.display()), e))?;
    if !about.is_dir() {
        return Ok((part == Part::Train).then(|| path.to_owned()));
    }
    let named = |part: Part| Some(path.join(part.file_name())).filter(|file| file.is_file());
    if part != Part::Train || named(Part::Train).is_some() {
        return Ok(named(part));
    }
    let listing = std::fs::read_dir(path).map_err(|e| Error::io(format!("listing {}", path.display()), e))?;
    let is_jsonl = |file: &PathBuf| file.extension().is_some_and(|e| e == "jsonl") && file.is_file();
    let mut files: Vec<PathBuf> =
        listing.filter_map(|entry| entry.ok().map(|e| e.path())).filter(is_jsonl).collect();
    let reserved = [Part::Valid, Part::Test].iter().any(|p| named(*p).is_some());
    match files.pop() {
        Some(only) if files.is_empty() && !reserved => Ok(Some(only)),
        _ => {
            let place = path.display();
            let message = format!(
                "{place}: it has no train.jsonl, and not exactly one other .jsonl file; name the file to train on"
            );
            Err(Error::new(ErrorKind::BadData, message))
        }
    }
}

/// Reads one file.
///
/// Errors: `Io`; `BadData` if no row has a known format, nothing is left to train on, or a row is too long and
/// [`OverLong::Refuse`] is set. Each names the file and the first reasons.
pub fn load(
    file: &Path,
    tokenizer: &Tokenizer,
    chat: &ChatTemplate,
    options: &DataOptions,
) -> Result<Dataset> {
    load_from(Origin::File(file), tokenizer, chat, options)
}

/// [`load`] for rows from any origin.
///
/// Errors: as [`load`].
pub fn load_from(
    origin: Origin<'_>,
    tokenizer: &Tokenizer,
    chat: &ChatTemplate,
    options: &DataOptions,
) -> Result<Dataset> {
    if options.max_seq_length == 0 {
        return Err(Error::new(ErrorKind::Misuse, "the sequence length must be at least 1"));
    }
    let file = origin.name();
    let format = if options.reader.is_some() { Format::Messages } else { detect(origin, options)? };
    let mut data = Dataset::empty(file, format);
    origin.for_each_row(&mut |line, row| {
        let sample = row.and_then(|row| options.sample(&row, format));
        let encoded =
            sample.and_then(|sample| Ok((encode_sample(&sample, tokenizer, chat, options)?, sample)));
        // Hash the whole row: a different length limit must not move rows across the split.
        let row_key = encoded.as_ref().map_or(0, |(example, _)| key(&example.ids));
        let fitted = encoded.and_then(|(example, sample)| {
            let whole = example.ids.len();
            let fitted = fit(example, options, &mut data.truncated)?;
            let prompting = prompting(&sample, chat, options);
            let placed = fitted.map(|own| after_few_shot(own, whole, &sample, tokenizer, chat, options));
            Ok(placed.transpose()?.map(|example| (example, prompting)))
        });
        match fitted {
            Ok(Some((example, prompting))) => {
                data.prompting = match data.examples.is_empty() {
                    true => prompting,
                    false => std::mem::take(&mut data.prompting).and(&prompting),
                };
                data.examples.push(example);
                data.keys.push(row_key);
                data.lines.push(line as u32);
            }
            Ok(None) => {
                let limit = options.max_seq_length;
                let message = format!(
                    "{}:{line}: longer than {limit} tokens; raise the sequence length, shorten the row, or let rows be truncated",
                    file.display()
                );
                return Err(Error::new(ErrorKind::BadData, message));
            }
            Err(reason) => {
                data.skipped_count += 1;
                if data.skipped.len() < SKIPPED_NAMED_MAX {
                    data.skipped.push(Skipped { file: file.to_owned(), line, reason });
                }
            }
        }
        Ok(true)
    })?;
    if data.examples.is_empty() { Err(nothing_left(&data)) } else { Ok(data) }
}

/// The examples as they were before tokenization, in the same order, of rows loaded from `origin`. Reads the rows
/// again.
///
/// # Errors
/// `Io`; `BadData` when the file changed in between.
pub fn samples_from(origin: Origin<'_>, data: &Dataset, options: &DataOptions) -> Result<Vec<Sample>> {
    let mut wanted: Vec<(usize, usize)> = data.lines.iter().map(|l| *l as usize).zip(0..).collect();
    wanted.sort_unstable();
    let (mut wanted, mut found) = (wanted.into_iter().peekable(), vec![None; data.lines.len()]);
    origin.for_each_row(&mut |line, row| {
        if let Some((_, at)) = wanted.next_if(|(wanted, _)| *wanted == line) {
            found[at] = row.ok().and_then(|row| options.sample(&row, data.format).ok());
        }
        Ok(wanted.peek().is_some())
    })?;
    let changed = || {
        let message = format!("{}: changed while it was being read; start again", data.source.display());
        Error::new(ErrorKind::BadData, message)
    };
    found.into_iter().collect::<Option<Vec<_>>>().ok_or_else(changed)
}

/// Truncates an example at the limit; `None` if that isn't allowed; a reason if no target is left.
fn fit(
    mut example: Example,
    options: &DataOptions,
    truncated: &mut usize,
) -> std::result::Result<Option<Example>, String> {
    let limit = options.max_seq_length.saturating_add(1);
    let cut = example.ids.len() > limit;
    if cut && options.over_long == OverLong::Refuse {
        return Ok(None);
    }
    example.ids.truncate(limit);
    example.mask.truncate(limit);
    if example.trained_tokens() == 0 {
        let within =
            if cut { format!(" within the first {} tokens", options.max_seq_length) } else { String::new() };
        return Err(format!("no token to train on{within}"));
    }
    *truncated += usize::from(cut);
    example.ids.shrink_to_fit();
    example.mask.shrink_to_fit();
    Ok(Some(example))
}

/// A row that had `whole` tokens before truncation, placed after the few-shot messages, if any.
fn after_few_shot(
    own: Example,
    whole: usize,
    sample: &Sample,
    tokenizer: &Tokenizer,
    chat: &ChatTemplate,
    options: &DataOptions,
) -> std::result::Result<Example, String> {
    if options.few_shot.is_empty() {
        return Ok(own);
    }
    let mut example = encode_after(sample, tokenizer, chat, options)?;
    let length = example.ids.len().saturating_sub(whole - own.ids.len());
    example.ids.truncate(length);
    example.mask.truncate(length);
    Ok(example)
}

fn nothing_left(data: &Dataset) -> Error {
    let reasons: Vec<String> =
        data.skipped.iter().take(3).map(|s| format!("line {}: {}", s.line, s.reason)).collect();
    let place = data.source.display();
    let message =
        format!("{place}: no row to train on; {} skipped ({})", data.skipped_count, reasons.join("; "));
    Error::new(ErrorKind::BadData, message)
}

/// The format of the first row that has one.
fn detect(origin: Origin<'_>, options: &DataOptions) -> Result<Format> {
    let mut found = None;
    let mut rows = 0;
    let mut first = String::from("the file has no rows");
    origin.for_each_row(&mut |line, row| {
        rows += 1;
        found = row.as_ref().ok().and_then(|row| options.detect(row));
        if rows == 1 {
            first = format!("line {line}: {}", describe(&row));
        }
        Ok(found.is_none() && rows < DETECT_ROWS)
    })?;
    found.ok_or_else(|| {
        let known: Vec<String> = Format::ALL.iter().map(|f| format!("{:?}", options.keys(*f))).collect();
        let place = origin.name().display();
        let message =
            format!("{place}: no row has the keys of a known format ({}); {first}", known.join(", "));
        Error::new(ErrorKind::BadData, message)
    })
}

/// A row's keys, or what it is instead of an object.
fn describe(row: &std::result::Result<Value, String>) -> String {
    match row {
        Ok(Value::Object(map)) => {
            let keys: Vec<String> = map.keys().take(8).map(|k| k.chars().take(40).collect()).collect();
            format!("keys {keys:?}")
        }
        Ok(_) => "not a JSON object (one object a line is expected, not one list)".into(),
        Err(reason) => reason.clone(),
    }
}

/// Reads the training and validation rows: `train.jsonl` and `valid.jsonl`, or one file split by seed.
///
/// Errors: as [`load`], and `Misuse` for a fraction outside of 0..1.
pub fn load_train_valid(
    path: &Path,
    tokenizer: &Tokenizer,
    chat: &ChatTemplate,
    options: &DataOptions,
) -> Result<TrainValid> {
    let train = part_file(path, Part::Train)?.unwrap_or_else(|| path.to_owned());
    let valid = part_file(path, Part::Valid)?;
    load_parts(Origin::File(&train), valid.as_deref().map(Origin::File), tokenizer, chat, options)
}

/// [`load_train_valid`] for rows from any origin; without `valid`, `train` is split by seed.
///
/// Errors: as [`load_train_valid`].
pub fn load_parts(
    train: Origin<'_>,
    valid: Option<Origin<'_>>,
    tokenizer: &Tokenizer,
    chat: &ChatTemplate,
    options: &DataOptions,
) -> Result<TrainValid> {
    if !(0.0..1.0).contains(&options.valid_fraction) {
        let message = format!("the validation fraction {} is not in 0..1", options.valid_fraction);
        return Err(Error::new(ErrorKind::Misuse, message));
    }
    let data = load_from(train, tokenizer, chat, options)?;
    let split_by_seed = valid.is_none();
    let (train, valid) = match valid {
        Some(valid) => (data, load_from(valid, tokenizer, chat, options)?),
        None => split(data, options.valid_fraction, options.split_seed),
    };
    let known: HashSet<&[u32]> = train.examples.iter().map(|e| e.ids.as_slice()).collect();
    let duplicates = valid.examples.iter().filter(|e| known.contains(e.ids.as_slice())).count();
    Ok(TrainValid { train, valid, split_by_seed, duplicates })
}

/// Splits off a fraction, rounded to whole rows, with at least one row on each side if there are two and the
/// fraction isn't 0. A row's side follows from its full ids and the seed, so adding or moving rows hardly
/// affects the others. Both parts keep the order; skipped rows stay with the first.
pub fn split(data: Dataset, fraction: f64, seed: u64) -> (Dataset, Dataset) {
    let n = data.examples.len();
    let wanted = (n as f64 * fraction.clamp(0.0, 1.0)).round() as usize;
    let count = if fraction <= 0.0 || n < 2 { 0 } else { wanted.clamp(1, n - 1) };
    split_off(data, count, seed)
}

/// [`split`] by number of rows instead of a fraction: returns the rest, and `count` rows (or all, if fewer).
pub fn split_off(data: Dataset, count: usize, seed: u64) -> (Dataset, Dataset) {
    let n = data.examples.len();
    let count = count.min(n);
    let seeded = |key: &u64| Rng::new(*key, seed ^ SPLIT_STREAM).next_u64();
    let mut order: Vec<(u64, usize)> = data.keys.iter().map(seeded).zip(0..).collect();
    order.sort_unstable();
    let mut held = vec![false; n];
    order[..count].iter().for_each(|(_, i)| held[*i] = true);
    let mut valid = Dataset {
        examples: Vec::with_capacity(count),
        skipped: Vec::new(),
        skipped_count: 0,
        truncated: 0,
        ..data.without_examples()
    };
    let mut train = Dataset { examples: Vec::with_capacity(n - count), ..data.without_examples() };
    for (i, (example, held)) in data.examples.into_iter().zip(held).enumerate() {
        let part = if held { &mut valid } else { &mut train };
        part.examples.push(example);
        part.lines.push(data.lines[i]);
        part.keys.push(data.keys[i]);
    }
    (train, valid)
}

/// A hash of the ids.
pub(crate) fn key(ids: &[u32]) -> u64 {
    ids.iter().fold(0, |key, id| Rng::new(key, u64::from(*id)).next_u64())
}

/// The split's random stream.
const SPLIT_STREAM: u64 = 0x5350_4C49;

impl Dataset {
    /// Everything but the examples.
    fn without_examples(&self) -> Dataset {
        Dataset {
            examples: Vec::new(),
            lines: Vec::new(),
            keys: Vec::new(),
            skipped: self.skipped.clone(),
            source: self.source.clone(),
            prompting: self.prompting.clone(),
            ..*self
        }
    }
}
