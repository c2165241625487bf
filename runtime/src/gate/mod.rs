//! The gate: nobody ships a model that is worse than doing nothing, or than a better prompt.
//!
//! The story, in the order of its files: a [`task`] turns rows into prompts and completions into answers,
//! which are compared as exact [`number`]s or by other [`metrics`]; [`retention`] is text that no training
//! should harm; [`leak`] finds held-out rows that training saw; [`statistics`] says what differences
//! between arms on the same held-out examples mean; and [`verdict`] judges: promote a trained arm, keep
//! prompting with examples, or keep the base, each with its reasons and figures. What is promoted is kept
//! in a [`store`]; a [`report`] is all of it for people.
//!
//! All but the store runs no model and reads no file: figures and strings come in, a verdict goes out, and
//! equal input gives equal bytes.
//!
//! ```
//! use engraft_runtime::gate::metrics::exact_match;
//!
//! // One of the metrics that answers are judged by: white space at the ends doesn't count.
//! assert!(exact_match(" 42\n", "42"));
//! ```

pub mod leak;
pub mod metrics;
pub mod number;
pub mod report;
pub mod retention;
pub mod statistics;
pub mod store;
pub mod task;
pub mod verdict;
