//! `engraft adapter`: lists, checks, promotes, rolls back and prunes in an adapter store. Other verbs load a store's
//! active generation through [`Stored`].

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use clap::{Args, Subcommand, value_parser};
use engraft_runtime::adapter::Adapter;
use engraft_runtime::bytes;
use engraft_runtime::error::{Error, ErrorKind};
use engraft_runtime::gate::store::{Active, ContentKind, Generation, InUse, Listed, Store};
use engraft_runtime::generate::StackedAdapter;
use engraft_runtime::hex;
use engraft_runtime::model::chat::Message;
use engraft_runtime::model::usage::{Prompting, Usage};
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::probe::Prober;
use engraft_runtime::storage::Disk;
use serde::Serialize;

use super::{Invocation, common, promote};
use crate::json;
use crate::options::{self, AdapterOptions, OptionalModelOptions};

/// Generations that pruning keeps.
const KEEP_DEFAULT: u32 = 3;
/// How a folder is described that an interrupted command left behind.
const UNFINISHED: &str = "unfinished: harmless; the next promotion, rollback or pruning removes it";
/// Maximum length of a verdict's word.
const WORD_MAX: usize = 40;

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// List the generations and mark the active one
    #[command(after_help = "Example:\n  engraft adapter ls --store store")]
    Ls(StorePlace),
    /// Show one generation: files, settings, verdict
    #[command(after_help = "Example:\n  engraft adapter show 2 --store store")]
    Show {
        #[command(flatten)]
        place: StorePlace,

        /// Its number [default: the active one]
        #[arg(value_name = "GENERATION", value_parser = value_parser!(u64).range(1..))]
        generation: Option<u64>,
    },
    /// Compare every file with its digest; with -m also check that it fits the model
    #[command(after_help = "Example:\n  engraft adapter verify --store store -m MODEL.gguf")]
    Verify {
        #[command(flatten)]
        place: StorePlace,

        #[command(flatten)]
        model: OptionalModelOptions,
    },
    /// Make the previously active generation active again; run it again to go back further
    #[command(after_help = "Example:\n  engraft adapter rollback --store store")]
    Rollback {
        #[command(flatten)]
        place: StorePlace,

        /// Make this generation active instead, earlier or later
        #[arg(long, value_name = "GENERATION", value_parser = value_parser!(u64).range(1..))]
        to: Option<u64>,
    },
    /// Put an adapter into use: through the gate with --data, or past it with --because
    #[command(
        after_help = "Example:\n  engraft adapter promote letters-adapter --store store -m MODEL.gguf --data letters"
    )]
    Promote(Box<promote::Options>),
    /// Remove old generations, but never the active one or the one before it
    #[command(after_help = "Example:\n  engraft adapter prune --store store --keep 3")]
    Prune {
        #[command(flatten)]
        place: StorePlace,

        /// How many of the newest to keep
        #[arg(long, value_name = "N", default_value_t = KEEP_DEFAULT, value_parser = value_parser!(u32).range(1..))]
        keep: u32,
    },
}

#[derive(Args, Debug)]
struct StorePlace {
    /// The adapter store
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
}

/// What a store adds to the model.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    /// The adapter's file; its base isn't checked yet.
    pub(crate) adapter: Option<PathBuf>,
    /// Messages that go before the user's.
    pub(crate) few_shot: Vec<Message>,
    /// How it was judged.
    usage: Usage,
}

impl Stored {
    /// Loads and reports what is active in the store given with `--store`; empty without the flag.
    ///
    /// # Errors
    /// Those of [`Store::active`]; `BaseMismatch` for examples made for another base, without `--force-base`.
    pub(crate) fn of(model: &ModelFile, options: &AdapterOptions) -> Result<Stored, Error> {
        let Some(dir) = &options.store else { return Ok(Stored::default()) };
        let store = open(dir)?;
        let Some(Active { generation, passed_over }) = store.active()? else {
            eprintln!("{}: nothing was promoted yet; using the model alone", dir.display());
            return Ok(Stored::default());
        };
        tell(&passed_over);
        let number = generation.number;
        eprintln!("{}: generation {number}, {}", dir.display(), describe(generation.content));
        let in_use = store.load(&generation)?;
        let usage = store.usage(&generation, &in_use)?;
        let InUse::FewShot(few_shot) = in_use else {
            return Ok(Stored { adapter: store.adapter_file(&generation), few_shot: Vec::new(), usage });
        };
        if let Err(error) = generation.check_base(&model.digest()) {
            if !options.force_base {
                return Err(error.at(dir.display()));
            }
            eprintln!("--force-base: {}: {}", dir.display(), error.message());
        }
        Ok(Stored { adapter: None, few_shot, usage })
    }

    /// How all that is used is meant to be used: what the store holds, and `adapters` if there are others.
    pub(crate) fn usage(&self, adapters: Option<&StackedAdapter>, options: &AdapterOptions) -> Usage {
        let adapters = adapters.map(StackedAdapter::usage);
        match (options.names_some(), options.store.is_some()) {
            (false, true) => self.usage.clone(),
            (true, true) if !self.few_shot.is_empty() => {
                Usage::of_all(adapters.into_iter().chain([&self.usage]))
            }
            _ => adapters.cloned().unwrap_or_default(),
        }
    }
}

pub(crate) fn run(options: &Options, invocation: &Invocation) -> Result<()> {
    match &options.what {
        What::Ls(place) => list(&open(&place.store)?, invocation),
        What::Show { place, generation } => show(&open(&place.store)?, *generation, invocation),
        What::Verify { place, model } => verify(&open(&place.store)?, model, invocation),
        What::Rollback { place, to } => roll_back(&open(&place.store)?, *to, invocation),
        What::Promote(options) => promote::run(options, invocation),
        What::Prune { place, keep } => prune(&open(&place.store)?, *keep as usize, invocation),
    }
}

fn open(dir: &Path) -> Result<Store<'static>, Error> {
    options::stat(dir, "--store")?;
    Store::open(&Disk, dir).map_err(|e| e.at("--store"))
}

/// Prints which generations weren't used, and why.
fn tell(passed_over: &[String]) {
    for problem in passed_over {
        eprintln!("passed over: {problem}");
    }
}

fn list(store: &Store<'_>, invocation: &Invocation) -> Result<()> {
    let listing = store.list()?;
    let (active, passed_over) = match listing.active {
        Some(found) => (Some(found.generation.number), found.passed_over),
        None => (None, Vec::new()),
    };
    tell(&passed_over);
    let generations: Vec<_> = listing.generations.iter().map(|g| listed(store, g, active)).collect();
    let mut table =
        format!("  {:>10}  {:8}  {:>10}  {:12}  verdict", "generation", "content", "size", "base");
    for (shown, found) in generations.iter().zip(&listing.generations) {
        let mark = if shown.active { '*' } else { ' ' };
        let _ = write!(table, "\n{mark} {:>10}  ", shown.generation);
        let _ = match &found.manifest {
            Ok(generation) => write!(
                table,
                "{:8}  {:>10}  {:12}  {}",
                name(generation.content),
                bytes::show(generation.bytes()),
                hex::short(&generation.base),
                match generation.tried {
                    true => "tried, not promoted",
                    false => shown.verdict.as_deref().unwrap_or("-"),
                }
            ),
            Err(_) if found.is_unfinished => write!(table, "{UNFINISHED}"),
            Err(problem) => write!(table, "unusable: {problem}"),
        };
    }
    json::line(&table)?;
    if active.is_none() {
        let why = if generations.is_empty() { "nothing was promoted yet" } else { "none can be used" };
        json::line(&format!("no generation is active: {why}"))?;
    }
    for name in &listing.unknown {
        json::line(&format!("not part of the store, left alone: {name:?}"))?;
    }
    invocation.emit(&json::object! {
        /// The generation in use; `null` if there is none.
        active: active,
        generations: generations,
        /// Generations that should have been used instead, and why they weren't.
        passed_over: passed_over,
        /// Names in the folder that don't belong to the store.
        unknown: listing.unknown,
    })
}

fn listed(store: &Store<'_>, found: &Listed, active: Option<u64>) -> json::AdapterListed {
    match &found.manifest {
        Ok(generation) => describe_generation(store, generation, active),
        Err(problem) => json::AdapterListed {
            generation: found.number,
            active: active == Some(found.number),
            problem: Some(problem.clone()),
            unfinished: found.is_unfinished,
            ..json::AdapterListed::default()
        },
    }
}

fn describe_generation(
    store: &Store<'_>,
    generation: &Generation,
    active: Option<u64>,
) -> json::AdapterListed {
    let verdict = store.verdict(generation);
    json::AdapterListed {
        generation: generation.number,
        active: active == Some(generation.number),
        content: Some(generation.content),
        bytes: Some(generation.bytes()),
        base: Some(hex::encode(&generation.base)),
        previous: generation.previous,
        tried: generation.tried,
        problem: verdict.as_ref().err().map(|e| e.message().to_owned()),
        verdict: verdict.ok().and_then(|bytes| word(&bytes)),
        unfinished: false,
    }
}

/// A verdict in one word, if it has one that a terminal can show: the value of `verdict` or `decision`, or
/// the name of its kind.
fn word(verdict: &[u8]) -> Option<String> {
    let value: serde_json::Value = serde_json::from_slice(verdict).ok()?;
    let found = ["verdict", "decision"].iter().find_map(|key| value.get(key))?;
    let word = match found {
        serde_json::Value::Object(map) => match map.get("kind") {
            Some(kind) => kind.as_str(),
            None => map.keys().next().map(String::as_str),
        },
        other => other.as_str(),
    }?;
    let shown = word.chars().all(|c| c.is_ascii_graphic() || c == ' ') && word.len() <= WORD_MAX;
    shown.then(|| word.to_owned())
}

fn show(store: &Store<'_>, number: Option<u64>, invocation: &Invocation) -> Result<()> {
    let active = match store.active() {
        // With a number given, an unusable active generation doesn't matter.
        Err(_) if number.is_some() => None,
        found => found?,
    };
    let active_number = active.as_ref().map(|a| a.generation.number);
    let generation = match number {
        Some(number) => store.verify(number)?,
        None => {
            let nothing = || Error::new(ErrorKind::Misuse, "--store: nothing was promoted yet");
            let active = active.ok_or_else(nothing)?;
            tell(&active.passed_over);
            active.generation
        }
    };
    let verdict = serde_json::from_slice(&store.verdict(&generation)?).unwrap_or(serde_json::Value::Null);
    let in_use = store.load(&generation)?;
    let usage = store.usage(&generation, &in_use)?;
    json::line(&page(&generation, active_number, (&in_use, &usage), &verdict))?;
    let (adapter, few_shot) = match in_use {
        InUse::Adapter(adapter) => (Some(settings(&adapter)), None),
        InUse::FewShot(messages) => {
            let turn = |m: Message| json::object! { role: m.role, content: m.content };
            (None, Some(messages.into_iter().map(turn).collect::<Vec<_>>()))
        }
        InUse::Base => (None, None),
    };
    let shown = json::object! {
        #[serde(flatten)]
        listed: describe_generation(store, &generation, active_number),
        files: &generation.files,
        /// `null` unless it is an adapter.
        adapter: adapter,
        /// The examples; `null` unless it is few-shot examples.
        few_shot: few_shot,
        /// verdict.json as stored; `null` if it isn't JSON.
        verdict_json: verdict,
    };
    invocation.emit(&shown)
}

/// A generation for people: what it holds, how it was made, and why it was promoted or not.
fn page(
    generation: &Generation,
    active: Option<u64>,
    (in_use, usage): (&InUse, &Usage),
    verdict: &serde_json::Value,
) -> String {
    let Generation { number, previous, tried, .. } = generation;
    let state = match (active == Some(*number), *tried) {
        (true, _) => "in use",
        (false, true) => "tried and not promoted",
        (false, false) => "promoted before, not in use",
    };
    let mut page = format!("generation {number}: {state}; {}", bytes::show(generation.bytes()));
    let mut add = |what: &str, told: String| page += &format!("\n{what:<10} {told}");
    match in_use {
        InUse::Adapter(adapter) => {
            let (config, meta) = (&adapter.config, &adapter.meta);
            let kind = if config.dora { "DoRA" } else { "LoRA" };
            let size = adapter.theta.len();
            add(
                "adapter",
                format!("{kind}, rank {}, alpha {}; {size} parameters", config.rank, config.alpha),
            );
            add("training", format!("{} steps, {} tokens, seed {}", meta.steps, meta.tokens, meta.seed));
            if let (Some(before), Some(after)) = (meta.valid_loss_before, meta.valid_loss_after) {
                add("validation", format!("loss {before:.4} before, {after:.4} after, nats per token"));
            }
        }
        InUse::FewShot(messages) => {
            add("examples", format!("{} messages before every prompt", messages.len()));
        }
        InUse::Base => add("content", "nothing: the model alone".into()),
    }
    if let Some(told) = used_so(usage) {
        add("use", told);
    }
    add("model", hex::encode(&generation.base)[..12].to_string());
    if let Some(previous) = previous {
        add("before", format!("generation {previous}; a rollback leads there"));
    }
    for key in ["sentence", "because"] {
        if let Some(text) = verdict.get(key).and_then(serde_json::Value::as_str) {
            add("verdict", text.to_string());
        }
    }
    page + "\nEverything, with the figures of the verdict: add --json"
}

/// How it is used unless flags say otherwise; `None` if nobody knows.
fn used_so(usage: &Usage) -> Option<String> {
    let put = match &usage.prompting {
        Prompting::Unknown => return None,
        Prompting::Text(_) => "continues a text".to_string(),
        Prompting::Chat(None) => "answers in the model's chat template".to_string(),
        Prompting::Chat(Some(system)) => format!("answers in the model's chat template, behind {system:?}"),
    };
    Some(if usage.greedy { put + ", with the most likely tokens" } else { put })
}

/// How an adapter was made.
fn settings(adapter: &Adapter) -> impl Serialize + use<> {
    json::object! {
        dora: adapter.config.dora,
        rank: adapter.config.rank,
        alpha: adapter.config.alpha,
        parameters: adapter.theta.len(),
        steps: adapter.meta.steps,
        tokens: adapter.meta.tokens,
        seed: adapter.meta.seed,
        valid_loss_before: adapter.meta.valid_loss_before,
        valid_loss_after: adapter.meta.valid_loss_after,
    }
}

/// Checks that every generation is whole and loads, that it belongs to the model if one is given, and that
/// the pointer is good. An unfinished folder isn't a generation and isn't a problem.
fn verify(store: &Store<'_>, model: &OptionalModelOptions, invocation: &Invocation) -> Result<()> {
    let model = model.given().map(|model| model.open()).transpose()?;
    let (mut good, mut unfinished, mut problems) = (Vec::new(), Vec::new(), Vec::new());
    for found in store.list()?.generations {
        let number = found.number;
        if found.is_unfinished {
            json::line(&format!("generation {number}: {UNFINISHED}"))?;
            unfinished.push(number);
            continue;
        }
        match check(store, number, model.as_ref()) {
            Ok(()) => {
                json::line(&format!("generation {number}: good"))?;
                good.push(number);
            }
            Err(error) => {
                json::line(&format!("generation {number}: {error}"))?;
                problems.push(error.at(format!("generation {number}")));
            }
        }
    }
    let active = match store.active() {
        Ok(None) => None,
        Ok(Some(found)) => {
            let number = found.generation.number;
            for problem in found.passed_over {
                json::line(&format!("active: generation {number}, since {problem}"))?;
                problems.push(Error::new(ErrorKind::Corrupt, problem));
            }
            Some(number)
        }
        Err(error) => {
            problems.push(error);
            None
        }
    };
    invocation.emit(&json::object! {
        active: active,
        /// Generations that are whole and, with `-m`, belong to the model.
        good: good,
        /// Left by interrupted promotions or prunings: harmless, removed by the next writer.
        unfinished: unfinished,
        problems: problems.iter().map(Error::message).collect::<Vec<_>>(),
    })?;
    match problems.into_iter().next() {
        None => Ok(()),
        Some(first) => Err(invocation.after("adapter verify", first)),
    }
}

fn check(store: &Store<'_>, number: u64, model: Option<&Arc<ModelFile>>) -> Result<(), Error> {
    let generation = store.verify(number)?;
    let content = store.load(&generation)?;
    match (model, content) {
        (None, _) => Ok(()),
        (Some(model), InUse::Adapter(adapter)) => {
            let kernels = common::best_kernels();
            let mut prober = Prober::new(model, &kernels, adapter.layout.rank_max());
            prober.check(&adapter).map(|_| ())
        }
        (Some(model), _) => generation.check_base(&model.digest()),
    }
}

fn roll_back(store: &Store<'_>, to: Option<u64>, invocation: &Invocation) -> Result<()> {
    let writer = store.writer()?;
    let was = match store.active() {
        // Activating a named generation can repair a store whose pointer is broken.
        Err(_) if to.is_some() => None,
        found => found?,
    };
    tell(was.as_ref().map_or(&[], |a| &a.passed_over));
    let was = was.map(|a| a.generation.number);
    let now = match to {
        Some(number) => writer.activate(number)?,
        None => writer.rollback()?,
    };
    let from = was.map(|n| format!(" (was {n})")).unwrap_or_default();
    json::line(&format!("active: generation {}{from}, {}", now.number, describe(now.content)))?;
    invocation.emit(&json::object! {
        active: now.number,
        /// The generation that was active before; `null` if there was none.
        was: was,
    })
}

fn prune(store: &Store<'_>, keep: usize, invocation: &Invocation) -> Result<()> {
    let pruned = store.writer()?.prune(keep)?;
    let numbers = |of: &[u64]| of.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    match pruned.removed.is_empty() {
        true => json::line("nothing was removed")?,
        false => json::line(&format!("removed: generations {}", numbers(&pruned.removed)))?,
    }
    if !pruned.left.is_empty() {
        let left = numbers(&pruned.left);
        json::line(&format!("generations {left} are gone, but their folders hold other files"))?;
    }
    invocation.emit(&json::object! {
        removed: pruned.removed,
        /// Generations whose folder stays because it holds other files.
        left: pruned.left,
    })
}

fn name(content: ContentKind) -> &'static str {
    match content {
        ContentKind::Adapter => "adapter",
        ContentKind::FewShot => "few_shot",
        ContentKind::Base => "base",
    }
}

fn describe(content: ContentKind) -> &'static str {
    match content {
        ContentKind::Adapter => "an adapter",
        ContentKind::FewShot => "few-shot examples",
        ContentKind::Base => "the base alone",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_have_a_word_or_none() {
        let of = |text: &str| word(text.as_bytes());
        assert_eq!(of(r#"{"verdict":"KEEP_BASE"}"#).as_deref(), Some("KEEP_BASE"));
        assert_eq!(of(r#"{"decision":{"promote":{"arm":"lora"}}}"#).as_deref(), Some("promote"));
        assert_eq!(of(r#"{"decision":{"kind":"keep_prompting","k":5}}"#).as_deref(), Some("keep_prompting"));
        for other in ["", "{}", "[1]", r#"{"verdict":1}"#, "{\"verdict\":\"\\u001b[2J\"}"] {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
