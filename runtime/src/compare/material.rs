//! The rows of a comparison: training rows, validation rows that choose a run's best step, and held-out rows
//! the gate decides by, which no arm ever sees.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::data::masks::encode_sample;
use crate::data::source::{key, part_file};
use crate::data::{
    DataOptions, Dataset, Format, Origin, Part, Sample, load_from, samples_from, split, split_off,
};
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::gate::leak::{Leak, RowHash, leaks};
use crate::hex;
use crate::model::text::Text;
use crate::rng::mix;

/// Keeps the validation split independent of the held-out split.
const VALID_STREAM: u64 = 0x5641_4C49;
/// Keeps the choice of training rows independent of both.
const TRAIN_STREAM: u64 = 0x5452_4149;
/// Fewer rows than this can't be held out in turns.
const MIN_TURNS_ROWS: usize = 4;

/// Rows, as ids and as samples.
#[derive(Clone, Debug)]
pub struct Rows {
    /// As the model sees them, without examples.
    pub data: Dataset,
    /// As the file has them, in the same order.
    pub samples: Vec<Sample>,
}

impl Rows {
    /// Rows read from a file, with their samples.
    ///
    /// # Errors
    /// Those of [`samples_from`].
    pub fn of(data: Dataset, options: &DataOptions) -> Result<Rows> {
        let source = data.source.clone();
        Rows::from(data, Origin::File(&source), options)
    }

    /// All rows of a file, or of a text in memory.
    ///
    /// # Errors
    /// Those of [`load_from`].
    pub fn read(origin: Origin<'_>, text: &Text, options: &DataOptions) -> Result<Rows> {
        Rows::from(load_from(origin, &text.tokenizer, &text.chat, options)?, origin, options)
    }

    fn from(data: Dataset, origin: Origin<'_>, options: &DataOptions) -> Result<Rows> {
        Ok(Rows { samples: samples_from(origin, &data, options)?, data })
    }

    /// Prompts with completions, from memory; row `i` is called "`name`:`i + 1`".
    ///
    /// # Errors
    /// `BadData`, naming a row that can't be encoded or is longer than the options allow.
    pub fn of_pairs(
        name: &str,
        pairs: &[(String, String)],
        text: &Text,
        options: &DataOptions,
    ) -> Result<Rows> {
        let source = PathBuf::from(name);
        let mut data = Dataset::empty(&source, Format::PromptCompletion);
        let mut samples = Vec::with_capacity(pairs.len());
        for (line, (prompt, completion)) in (1..).zip(pairs) {
            let bad = |reason: &str| Error::new(ErrorKind::BadData, format!("{name}:{line}: {reason}"));
            let (prompt, completion) = (prompt.clone(), completion.clone());
            let sample = Sample::Pair { prompt, completion, joint: "" };
            let example =
                encode_sample(&sample, &text.tokenizer, &text.chat, options).map_err(|why| bad(&why))?;
            if example.rows() > options.max_seq_length {
                return Err(bad(&format!("longer than {} tokens", options.max_seq_length)));
            }
            data.keys.push(key(&example.ids));
            data.lines.push(line);
            data.examples.push(example);
            samples.push(sample);
        }
        Ok(Rows { data, samples })
    }

    /// Splits off `count` rows, chosen by seed: returns the rest and those.
    pub fn split_off(self, count: usize, seed: u64) -> (Rows, Rows) {
        let Rows { data, samples } = self;
        let place: HashMap<u32, usize> = data.lines.iter().copied().zip(0..).collect();
        let (rest, chosen) = split_off(data, count, seed);
        let of = |data: Dataset| {
            let samples = data.lines.iter().map(|line| samples[place[line]].clone()).collect();
            Rows { data, samples }
        };
        (of(rest), of(chosen))
    }

    /// Splits off one of `turns` equal parts; rows that are equal stay together.
    fn split_off_evenly(self, turns: usize, seed: u64) -> (Rows, Rows) {
        let count = self.samples.len().div_ceil(turns);
        if turns == 1 {
            let rest = self.clone().retain(|_| false);
            return (rest, self);
        }
        let (rest, part) = self.split_off(count, seed);
        let taken: HashSet<u64> = part.data.keys.iter().copied().collect();
        let twins: HashSet<u32> = rest
            .data
            .keys
            .iter()
            .zip(&rest.data.lines)
            .filter_map(|(key, line)| taken.contains(key).then_some(*line))
            .collect();
        match twins.is_empty() {
            true => (rest, part),
            false => {
                let also = rest.clone().retain(|line| twins.contains(&line));
                (rest.retain(|line| !twins.contains(&line)), part.followed_by(also))
            }
        }
    }

    /// The rows of some lines.
    fn retain(self, keep: impl Fn(u32) -> bool) -> Rows {
        let Rows { mut data, samples } = self;
        let kept: Vec<bool> = data.lines.iter().map(|line| keep(*line)).collect();
        let chosen = |i: &usize| kept[*i];
        let places: Vec<usize> = (0..kept.len()).filter(chosen).collect();
        data.examples = places.iter().map(|i| data.examples[*i].clone()).collect();
        data.keys = places.iter().map(|i| data.keys[*i]).collect();
        data.lines = places.iter().map(|i| data.lines[*i]).collect();
        Rows { samples: places.iter().map(|i| samples[*i].clone()).collect(), data }
    }

    /// These rows and then others of the same file.
    fn followed_by(mut self, others: Rows) -> Rows {
        self.data.examples.extend(others.data.examples);
        self.data.keys.extend(others.data.keys);
        self.data.lines.extend(others.data.lines);
        self.samples.extend(others.samples);
        self
    }

    /// The name of row `i` for people: "test.jsonl:12".
    pub fn name(&self, i: usize) -> String {
        let file = self.data.source.file_name().unwrap_or_default();
        format!("{}:{}", file.to_string_lossy(), self.data.lines[i])
    }

    /// Rows and targets.
    pub fn extent(&self) -> (u64, u64) {
        (self.data.examples.len() as u64, self.data.trained_tokens() as u64)
    }

    fn hashes(&self, options: &DataOptions) -> Vec<RowHash> {
        let asked = options.reader.is_some() || self.data.format == Format::QuestionAnswer;
        let one = |(i, sample)| RowHash::new(self.name(i), &recognized_by(sample, asked));
        self.samples.iter().enumerate().map(one).collect()
    }
}

/// Limits on the number of rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Most training rows, chosen by seed.
    pub train_rows: Option<usize>,
    /// Most held-out rows, chosen by seed.
    pub held_out_rows: Option<usize>,
    /// Whether each row is held out in turn, where held-out rows are split off from those to train on.
    pub folds: Option<Folds>,
}

/// When each row is held out in turn, and in how many turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Folds {
    /// Turns.
    pub turns: usize,
    /// Only if fewer rows than this would be held out otherwise.
    pub below: usize,
}

/// Where the rows of a comparison come from.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// Training rows; all rows, if the others are `None`.
    pub train: Origin<'a>,
    /// Validation rows; held out if there is no `test`.
    pub valid: Option<Origin<'a>>,
    /// Held-out rows.
    pub test: Option<Origin<'a>>,
}

/// All rows of a comparison.
#[derive(Clone, Debug)]
pub struct Material {
    /// Training rows, also the source of few-shot examples.
    pub train: Rows,
    /// Validation rows, for early stopping and choosing the best step.
    pub valid: Rows,
    /// Held-out rows, for the verdict.
    pub held_out: Rows,
    /// Held-out rows that also occur among the others.
    pub leaks: Vec<Leak>,
    /// If each row is held out in turn: the parts of each turn. Then all rows are held out, in the order of the turns,
    /// and what is kept is trained on all but the validation rows.
    pub folds: Vec<Material>,
    /// Digest of the three parts, hexadecimal.
    pub digest: String,
}

impl Material {
    /// Reads a folder or one file. The held-out rows are test.jsonl, else valid.jsonl, else a seeded part. The
    /// validation rows are valid.jsonl if it isn't held out, else a seeded part of the training rows. `options`
    /// give the parts' size and seed.
    ///
    /// # Errors
    /// Those of [`load`]; `BadData` if a part has no rows left.
    pub fn read(path: &Path, text: &Text, options: &DataOptions, limits: Limits) -> Result<Material> {
        let train = part_file(path, Part::Train)?.unwrap_or_else(|| path.to_owned());
        let (test, valid) = (part_file(path, Part::Test)?, part_file(path, Part::Valid)?);
        let parts = Parts {
            train: Origin::File(&train),
            valid: valid.as_deref().map(Origin::File),
            test: test.as_deref().map(Origin::File),
        };
        Material::read_from(parts, text, options, limits)
    }

    /// [`Material::read`] for parts from any origin.
    ///
    /// # Errors
    /// As [`Material::read`].
    pub fn read_from(
        parts: Parts<'_>,
        text: &Text,
        options: &DataOptions,
        limits: Limits,
    ) -> Result<Material> {
        let read = |part| load_from(part, &text.tokenizer, &text.chat, options);
        let (fraction, seed) = (options.valid_fraction, options.split_seed);
        let rest = read(parts.train)?;
        let (rest, held_out, held_out_from, valid) = match (parts.test, parts.valid) {
            (Some(test), valid) => (rest, read(test)?, test, valid),
            (None, Some(valid)) => (rest, read(valid)?, valid, None),
            (None, None) => {
                let wanted = (rest.examples.len() as f64 * fraction).round() as usize;
                if let Some(folds) = limits.folds.filter(|folds| wanted < folds.below) {
                    let rest = at_most(rest, limits.train_rows, mix(seed ^ TRAIN_STREAM));
                    return Material::in_turns(Rows::from(rest, parts.train, options)?, folds.turns, options);
                }
                let (rest, held_out) = split(rest, fraction, seed);
                (rest, held_out, parts.train, None)
            }
        };
        let (train, valid, valid_from) = match valid {
            Some(valid) => (rest, read(valid)?, valid),
            None => {
                let (train, valid) = split(rest, fraction, mix(seed ^ VALID_STREAM));
                (train, valid, parts.train)
            }
        };
        let train = at_most(train, limits.train_rows, mix(seed ^ TRAIN_STREAM));
        let held_out = at_most(held_out, limits.held_out_rows, seed);
        for (part, what) in [(&train, "to train on"), (&valid, "to validate with"), (&held_out, "held out")] {
            if part.examples.is_empty() {
                let message = format!("{}: no row is left {what}", parts.train.name().display());
                return Err(Error::new(ErrorKind::BadData, message).advise(Advice::AnotherSplit));
            }
        }
        let train = Rows::from(train, parts.train, options)?;
        let valid = Rows::from(valid, valid_from, options)?;
        Material::of(train, valid, Rows::from(held_out, held_out_from, options)?, options)
    }

    /// Material from parts already read.
    ///
    /// # Errors
    /// None in practice.
    pub fn of(train: Rows, valid: Rows, held_out: Rows, options: &DataOptions) -> Result<Material> {
        let mut seen = train.hashes(options);
        seen.extend(valid.hashes(options));
        let leaks = leaks(&seen, &held_out.hashes(options));
        let digest = digest(&[&train, &valid, &held_out]);
        Ok(Material { train, valid, held_out, leaks, folds: Vec::new(), digest })
    }

    /// Material of rows that are each held out in one of several turns.
    ///
    /// # Errors
    /// `BadData` for too few rows.
    fn in_turns(rows: Rows, turns: usize, options: &DataOptions) -> Result<Material> {
        let count = rows.samples.len();
        if count < turns.max(MIN_TURNS_ROWS) {
            let source = rows.data.source.display();
            let message =
                format!("{source}: {count} rows are too few to hold each of them out in {turns} turns");
            return Err(Error::new(ErrorKind::BadData, message).advise(Advice::AnotherSplit));
        }
        let seed = options.split_seed;
        let validated = |rows: Rows| {
            let count = (rows.samples.len() as f64 * options.valid_fraction).round().max(1.0) as usize;
            rows.split_off(count, mix(seed ^ VALID_STREAM))
        };
        let (mut folds, mut rest) = (Vec::with_capacity(turns), rows.clone());
        for left in (1..=turns).rev() {
            let (others, held_out) = rest.split_off_evenly(left, seed);
            rest = others;
            let is_held: HashSet<u32> = held_out.data.lines.iter().copied().collect();
            let (train, valid) = validated(rows.clone().retain(|line| !is_held.contains(&line)));
            folds.push(Material::of(train, valid, held_out, options)?);
        }
        let held_out = folds.iter().map(|fold| fold.held_out.clone()).reduce(Rows::followed_by);
        let (train, valid) = validated(rows);
        let held_out = held_out.expect("at least one turn");
        let digest = digest(&[&train, &valid, &held_out]);
        let leaks = folds.iter().flat_map(|fold| fold.leaks.iter().cloned()).collect();
        Ok(Material { train, valid, held_out, leaks, folds, digest })
    }

    /// Bytes of text held beside the ids.
    pub fn text_bytes(&self) -> usize {
        let parts = [&self.train, &self.valid, &self.held_out];
        let own: usize = parts.iter().flat_map(|r| &r.samples).map(sample_bytes).sum();
        let ids = |fold: &Material| {
            let parts = [&fold.train, &fold.valid, &fold.held_out];
            parts.iter().map(|rows| rows.data.heap_bytes()).sum::<usize>()
        };
        own + self.folds.iter().map(|fold| fold.text_bytes() + ids(fold)).sum::<usize>()
    }

    /// Positions of the longest row.
    pub fn rows_max(&self) -> usize {
        [&self.train, &self.valid, &self.held_out].iter().map(|r| r.data.rows_max()).max().unwrap_or(1)
    }
}

fn at_most(data: Dataset, count: Option<usize>, seed: u64) -> Dataset {
    match count {
        Some(count) if count < data.examples.len() => split_off(data, count, seed).1,
        _ => data,
    }
}

/// What identifies a row: its question if it has one, else all of it.
fn recognized_by(sample: &Sample, asks: bool) -> String {
    match sample {
        Sample::Text(text) => text.clone(),
        Sample::Pair { prompt, .. } if asks => prompt.clone(),
        Sample::Pair { prompt, completion, .. } => format!("{prompt}\n{completion}"),
        Sample::Chat { messages, .. } => {
            let turns = messages.iter().filter(|m| m.role != "system" && (!asks || m.role == "user"));
            turns.map(|m| m.content.as_str()).collect::<Vec<_>>().join("\n")
        }
    }
}

/// Bytes of text in a sample.
fn sample_bytes(sample: &Sample) -> usize {
    match sample {
        Sample::Text(text) => text.len(),
        Sample::Pair { prompt, completion, .. } => prompt.len() + completion.len(),
        Sample::Chat { messages, .. } => messages.iter().map(|m| m.content.len() + m.role.len() + 48).sum(),
    }
}

/// Digest of ids and masks, part by part.
fn digest(parts: &[&Rows]) -> String {
    let mut hash = Sha256::new();
    for rows in parts {
        hash.update((rows.data.examples.len() as u64).to_le_bytes());
        for example in &rows.data.examples {
            hash.update((example.ids.len() as u64).to_le_bytes());
            for (id, target) in example.ids.iter().zip(&example.mask) {
                hash.update((id << 1 | u32::from(*target)).to_le_bytes());
            }
        }
    }
    hex::encode(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Example;

    #[test]
    fn rows_stay_beside_their_samples_when_split() {
        let mut data = Dataset::empty(Path::new("rows"), Format::PromptCompletion);
        let mut samples = Vec::new();
        for id in 0..10 {
            data.examples.push(Example { ids: vec![id, id], mask: vec![false, true] });
            data.lines.push(id + 1);
            data.keys.push(key(&[id]));
            samples.push(Sample::Text(id.to_string()));
        }
        let (rest, chosen) = Rows { data, samples }.split_off(3, 0);
        assert_eq!((rest.samples.len(), chosen.samples.len()), (7, 3));
        let mut seen = Vec::new();
        for rows in [rest, chosen] {
            for (i, sample) in rows.samples.iter().enumerate() {
                let id = rows.data.examples[i].ids[0];
                assert_eq!(*sample, Sample::Text(id.to_string()));
                assert_eq!(rows.name(i), format!("rows:{}", id + 1));
                seen.push(id);
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..10).collect::<Vec<_>>());
    }
}
