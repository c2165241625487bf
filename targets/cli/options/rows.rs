//! Which rows a comparison uses, and how to judge answers.

use clap::{Args, value_parser};
use engraft_runtime::compare::answers::Metric;
use engraft_runtime::compare::material::{Folds, Limits};
use engraft_runtime::data::{DataOptions as Reading, OverLong};
use engraft_runtime::gate::task::Task;
use engraft_runtime::run::settings;

use super::{DataOptions, parse};

/// Which rows a comparison uses, and how to judge answers.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Rows and answers")]
pub(crate) struct RowOptions {
    /// Task with numeric answers: sets how to ask the questions and read the answers
    #[arg(long, value_parser = parse::task())]
    task: Option<Task>,

    /// Without a task: also judge answers by comparing them with the rows' answers
    #[arg(long, conflicts_with = "task", value_parser = parse::metric())]
    metric: Option<Metric>,

    /// Maximum tokens per answer
    #[arg(long, value_name = "N", default_value_t = settings::ANSWER_TOKENS as u32, value_parser = value_parser!(u32).range(1..=1 << 16))]
    answer_tokens: u32,

    /// Maximum tokens per row
    #[arg(short = 'c', long, visible_alias = "ctx-size", value_name = "N", default_value_t = settings::ROW_TOKENS_COMPARED as u32, value_parser = value_parser!(u32).range(2..=1 << 20))]
    max_seq_length: u32,

    /// Maximum number of training rows, chosen by --split-seed
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    train_rows: Option<u32>,

    /// Maximum number of held-out rows, chosen by --split-seed
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    held_out_rows: Option<u32>,

    /// Hold each row out in one of K turns, where held-out rows are split off (0: never) [default: 0; for adapt: 5 where
    /// the held-out rows alone couldn't decide]
    #[arg(long, value_name = "K", value_parser = parse::folds)]
    folds: Option<u32>,

    /// Seed for the split and these choices, shared by all arms and --seeds
    #[arg(long, value_name = "N", default_value = "0", value_parser = parse::seed)]
    split_seed: u64,

    /// Number of held-out rows to show in the report with every arm's answer
    #[arg(long, value_name = "N", default_value_t = settings::SAMPLES as u32, value_parser = value_parser!(u32).range(0..=64))]
    pub(crate) samples: u32,
}

impl RowOptions {
    /// How to judge answers, if at all.
    pub(crate) fn metric(&self) -> Option<Metric> {
        self.task.map(Metric::Numeric).or(self.metric)
    }

    /// The metric given for rows without a task.
    pub(crate) fn named_metric(&self) -> Option<Metric> {
        self.metric
    }

    pub(crate) fn answer_tokens(&self) -> usize {
        self.answer_tokens as usize
    }

    /// Seed of the split.
    pub(crate) fn seed(&self) -> u64 {
        self.split_seed
    }

    /// How to read rows, with at most `context` positions each.
    pub(crate) fn reading(&self, data: &DataOptions, context: usize) -> Reading {
        let rows_max = (self.max_seq_length as usize).min(context);
        let plain = data.reading(rows_max, self.split_seed);
        Reading { reader: self.task.map(Task::reader), over_long: OverLong::Truncate, ..plain }
    }

    /// Whether rows are to be held out in turns by the user's word.
    pub(crate) fn asks_for_turns(&self) -> bool {
        self.folds.is_some_and(|turns| turns > 0)
    }

    /// The maximum numbers of rows, and whether they are held out in turns: in a search, where fewer than `least` would
    /// be held out otherwise.
    pub(crate) fn limits(&self, search: bool, least: usize) -> Limits {
        let limit = |n: Option<u32>| n.map(|n| n as usize);
        let folds = match self.folds {
            Some(0) => None,
            Some(turns) => Some(Folds { turns: turns as usize, below: usize::MAX }),
            None => search.then_some(Folds { turns: settings::FOLDS, below: least }),
        };
        Limits { train_rows: limit(self.train_rows), held_out_rows: limit(self.held_out_rows), folds }
    }
}
