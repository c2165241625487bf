//! What `plan` and `train` share: everything up to and including the memory plan.

use std::sync::Arc;

use engraft_kernels::DType;
use engraft_runtime::adapter::{Case, LoraConfig};
use engraft_runtime::bytes;
use engraft_runtime::data::{Example, TrainValid, load, load_train_valid};
use engraft_runtime::error::Result;
use engraft_runtime::generate::replay::Starts;
use engraft_runtime::merge::tuned::check_type;
use engraft_runtime::model::Proj;
use engraft_runtime::model::text::Text;
use engraft_runtime::model::tuned::TunedLayout;
use engraft_runtime::model::usage::Usage;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::plan::room::{self, Room};
use engraft_runtime::plan::{FullUpdate, MemoryPlan, Request};
use engraft_runtime::run::general;
use engraft_runtime::run::prepare::{Rung, refuse_early};
use engraft_runtime::run::{Extent, Limit, Method, Planned, RunRows, SampledReplay, Setting, Settings, Wear};
use engraft_runtime::train::Direction;
use engraft_runtime::train::calibrate::Pieces;

use crate::json;
use crate::options::{
    DataOptions, ForgettingOptions, ProtectSource, ReplaySource, TuneOptions, stat, tell_rows,
};
use crate::provenance;

/// arXiv 2606.06920 advises against full fine-tuning of models with fewer parameters.
const ADVISED_PARAMS: usize = 500_000_000;

/// A run that is planned but not begun.
pub(crate) struct Prepared {
    pub(crate) model: Arc<ModelFile>,
    pub(crate) settings: Settings,
    /// The rows; `None` without `--data`.
    pub(crate) data: Option<TrainValid>,
    /// The rows to replay among them.
    pub(crate) replay: Replay,
    /// Ordinary text.
    pub(crate) general: Vec<Example>,
    pub(crate) planned: Planned,
    pub(crate) wear: Wear,
    limit: Limit,
}

/// Rows to replay.
pub(crate) enum Replay {
    /// Read from a file; none without `--replay`.
    Rows(Vec<Example>),
    /// Sampled from the base once the plan is accepted.
    Sampled(SampledReplay),
}

impl Replay {
    /// For people; empty if nothing is replayed.
    fn describe(&self, share: f64) -> String {
        let origin = match self {
            Replay::Rows(rows) if rows.is_empty() => return String::new(),
            Replay::Rows(rows) => {
                let tokens: usize = rows.iter().map(|e| e.ids.len()).sum();
                format!("{} rows of {tokens} tokens", rows.len())
            }
            Replay::Sampled(sampled) => {
                let (tokens, rows, _) = sampled.extent();
                format!("{rows} rows sampled from the base, at most {tokens} tokens")
            }
        };
        format!("replay: {origin}; they make up {share} of each batch's rows on average\n")
    }
}

/// Opens the model, reads the data, and plans for `room`. Calls `room` after mapping the model, because the map
/// takes its share where address space is limited. Afterwards the tokenizer is freed and the model's digest
/// known.
///
/// # Errors
/// Those of opening and reading; `Misuse` for an adapter that doesn't fit the model; `DoesNotFit` if this
/// process can't hold even the shortest rows.
pub(crate) fn prepare(tune: &TuneOptions, room: impl FnOnce() -> Option<Room>) -> Result<Prepared> {
    let model = tune.model.open()?;
    let limit = Limit { budget: tune.memory.memory_budget, room: room() };
    let settings = tune.settings(model.config(), tune.earlier(&model)?)?;
    if let Method::Full(dtype) = settings.method {
        check_type(&model, dtype).map_err(|e| e.at("--type"))?;
    }
    let rows_max = (tune.run.max_seq_length as usize).min(model.config().context_len);
    let unknown = Setting {
        model: &model,
        threads: tune.compute.threads as usize,
        extent: Extent::unknown(rows_max),
        sampled: None,
        rows: RunRows::default(),
        tokenizer_bytes: Text::heap_bytes(&model)?,
        held_bytes: 0,
    };
    refuse_early(&settings, &unknown, room::here(unknown.threads))?;
    let (data, replay, general) = std::thread::scope(|scope| {
        // The digest reads the whole file. In parallel with the tokenizer it costs no extra time.
        scope.spawn(|| model.digest());
        read_rows(tune, &model, settings.reads_general(), rows_max)
    })?;
    let prompting = data.as_ref().map(|data| data.train.prompting.clone()).unwrap_or_default();
    let settings = Settings { usage: Usage { prompting, greedy: false }, ..settings };
    let (train, valid) =
        data.as_ref().map_or((&[][..], &[][..]), |data| (&data.train.examples[..], &data.valid.examples[..]));
    let (given, sampled) = match &replay {
        Replay::Rows(rows) => (&rows[..], None),
        Replay::Sampled(sampled) => (&[][..], Some(sampled)),
    };
    let rows = RunRows { train, valid, replay: given, general: &general, aside: &[] };
    let extent = match &data {
        Some(_) => Extent::of(rows, [].iter()),
        None => unknown.extent,
    };
    let setting = Setting { extent, rows, sampled, ..unknown };
    let planned = Planned::new(&settings, &setting, &limit);
    let wear = Wear::new(&settings, model.config(), &planned.request);
    Ok(Prepared { model, settings, data, replay, general, planned, wear, limit })
}

/// The memory that this process may take, or that the named device leaves, whichever is less.
pub(crate) fn room_of(tune: &TuneOptions, device: Option<&str>) -> Option<Room> {
    let device = device.and_then(provenance::room);
    room::here(tune.compute.threads as usize).map(|here| here.or_less(device.clone())).or(device)
}

/// The rows of `--data` and `--replay`. Frees the tokenizer afterwards.
fn read_rows(
    tune: &TuneOptions,
    model: &ModelFile,
    reads_general: bool,
    rows_max: usize,
) -> Result<(Option<TrainValid>, Replay, Vec<Example>)> {
    let forgetting = &tune.forgetting;
    // Checked before reading anything.
    if let Some(ReplaySource::File(file)) = &forgetting.replay {
        stat(file, "--replay")?;
    }
    if tune.data.path()?.is_none() && forgetting.replay.is_none() {
        return Ok((None, Replay::Rows(Vec::new()), Vec::new()));
    }
    let text = Text::of(model)?;
    let data = read_data(tune, &text, rows_max)?;
    let general = match reads_general {
        true => read_general(forgetting, &tune.data, &text, rows_max)?,
        false => Vec::new(),
    };
    Ok((data, read_replay(forgetting, &tune.data, &text, rows_max, tune.seed)?, general))
}

/// The rows of `--replay`, or the starting points for sampling them.
///
/// # Errors
/// Those of reading the file, and of [`Starts::of`].
pub(crate) fn read_replay(
    forgetting: &ForgettingOptions,
    data: &DataOptions,
    text: &Text,
    rows_max: usize,
    seed: u64,
) -> Result<Replay> {
    let none = Replay::Rows(Vec::new());
    if forgetting.share()? == 0.0 {
        return Ok(none);
    }
    match &forgetting.replay {
        None => Ok(none),
        Some(ReplaySource::Base) => {
            let (count, tokens) = forgetting.sampled();
            let starts = Starts::of(text, rows_max).map_err(|e| e.at("--replay base"))?;
            Ok(Replay::Sampled(SampledReplay::new(starts, count, tokens, rows_max, seed)))
        }
        Some(ReplaySource::File(file)) => {
            let options = data.reading(rows_max, seed);
            let rows = load(file, &text.tokenizer, &text.chat, &options).map_err(|e| e.at("--replay"))?;
            tell_rows(&rows, rows_max);
            let (count, targets) = (rows.examples.len(), rows.trained_tokens());
            eprintln!("{}: {count} rows with {targets} trained tokens to replay", file.display());
            Ok(Replay::Rows(rows.examples))
        }
    }
}

/// The rows of `--protect`, or the built-in ones.
///
/// # Errors
/// Those of reading the file.
pub(crate) fn read_general(
    forgetting: &ForgettingOptions,
    data: &DataOptions,
    text: &Text,
    rows_max: usize,
) -> Result<Vec<Example>> {
    let options = data.reading(rows_max.min(general::ROW_TOKENS), 0);
    let built_in = [ProtectSource::General];
    let sources = if forgetting.protects(false) { &forgetting.protect[..] } else { &built_in };
    let mut all = Vec::new();
    for source in sources {
        match source {
            ProtectSource::General => all.extend(general::rows(text, rows_max)?),
            ProtectSource::File(file) => {
                let rows = load(file, &text.tokenizer, &text.chat, &options)
                    .map_err(|e| e.at("--protect"))?
                    .examples;
                all.extend(rows.into_iter().map(general::all_targets));
            }
            ProtectSource::Off => {}
        }
    }
    Ok(all)
}

/// Reads the rows of `--data` as token ids and reports on them.
fn read_data(tune: &TuneOptions, text: &Text, rows_max: usize) -> Result<Option<TrainValid>> {
    let Some(path) = tune.data.path()? else { return Ok(None) };
    let data = load_train_valid(path, &text.tokenizer, &text.chat, &tune.data.reading(rows_max, tune.seed))?;
    tell_rows(&data.train, rows_max);
    if !data.split_by_seed {
        tell_rows(&data.valid, rows_max);
    }
    let (train, valid) = (&data.train, &data.valid);
    let origin = match data.split_by_seed {
        true => format!("split off by --seed {}", tune.seed),
        false => valid.source.display().to_string(),
    };
    eprintln!(
        "{}: {} rows with {} trained tokens; held out: {} rows with {} ({origin})",
        train.source.display(),
        train.examples.len(),
        train.trained_tokens(),
        valid.examples.len(),
        valid.trained_tokens(),
    );
    if data.duplicates > 0 {
        let n = data.duplicates;
        eprintln!(
            "warning: {n} held-out rows are also training rows, so the held-out loss will look too good"
        );
    }
    Ok(Some(data))
}

/// What full fine-tuning trains, with warnings about common problems.
fn describe_full(model: &ModelFile, dtype: Option<DType>) -> String {
    let n = TunedLayout::new(model.config()).len();
    let mut text = format!("full fine-tuning: all {n} weights, in f32");
    let stored = dtype.unwrap_or(model.block(0).proj(Proj::Down).dtype());
    // Fewer than eight bits per element.
    if stored.block_bytes() < stored.block_len() {
        text += &format!(
            "\nwarning: the model will be stored as {}, whose rounding can undo small changes; --type Q8_0 or F16 \
             keeps them",
            stored.name()
        );
    }
    if n >= ADVISED_PARAMS {
        return text;
    }
    format!(
        "{text}\nwarning: this model has fewer than 500M parameters. Full fine-tuning often harms models \
         below 300M and can leave them worse than untrained (arXiv 2606.06920); use --fine-tune-type lora or dora \
         instead"
    )
}

/// What is adapted, with the multiplier of each distinct case.
fn describe_adapter(lora: &LoraConfig) -> String {
    let kind = if lora.dora { "DoRA" } else { "LoRA" };
    let formula = if lora.rslora { "alpha/sqrt(r)" } else { "alpha/r" };
    let line = |case: &Case| {
        let Case { rank, alpha, scale, .. } = case;
        let of = if lora.rslora { format!("{alpha}/sqrt({rank})") } else { format!("{alpha}/{rank}") };
        format!("{kind} on {}: effective multiplier {formula} = {of} = {scale}", members(lora, case))
    };
    lora.cases().iter().map(line).collect::<Vec<_>>().join("\n")
}

/// The projections of a case, with their layers if it doesn't cover all of them.
fn members(lora: &LoraConfig, case: &Case) -> String {
    let name = |proj: &Proj| {
        let layers: Vec<usize> = case.members.iter().filter(|(_, p)| p == proj).map(|(l, _)| *l).collect();
        match layers.len() {
            0 => None,
            n if n == lora.layers.len() => Some(proj.hf_name().to_string()),
            _ => {
                let list: Vec<_> = layers.iter().map(usize::to_string).collect();
                let word = if layers.len() == 1 { "layer" } else { "layers" };
                Some(format!("{} ({word} {})", proj.hf_name(), list.join(", ")))
            }
        }
    };
    lora.targets.iter().filter_map(name).collect::<Vec<_>>().join(", ")
}

impl Prepared {
    /// What is trained and what prevents forgetting, for people.
    pub(crate) fn describe(&self) -> String {
        let what = match &self.settings.method {
            Method::Adapter(lora) => describe_adapter(lora),
            Method::Full(dtype) => describe_full(&self.model, *dtype),
        };
        let mut text = what + "\n" + &self.replay.describe(self.settings.replay_share);
        if let Some(penalty) = self.settings.kl {
            let name = match penalty.direction {
                Direction::Forward => "KL(base‖tuned)",
                Direction::Reverse => "KL(tuned‖base)",
            };
            text += &format!(
                "{name} at weight {}: the base runs forward once more on every batch, and its head beside the tuned \
                 model's\n",
                penalty.weight
            );
        }
        text
    }

    /// The plan for people.
    pub(crate) fn table(&self) -> String {
        plan_table(&self.planned.request, &self.planned.plan)
    }

    /// Checks the plan against `--memory-budget` and the memory that the machine leaves.
    ///
    /// # Errors
    /// `DoesNotFit`, with advice on settings that fit.
    pub(crate) fn check(&self) -> Result<()> {
        let (plan, c, request) = (&self.planned.plan, self.model.config(), &self.planned.request);
        let asked = Limit { room: None, ..self.limit.clone() };
        asked.hold(plan, c, request).map_err(|e| e.at("--memory-budget"))?;
        self.limit.hold(plan, c, request)
    }

    /// What blocks may keep, ordered by memory, with the rates that `pieces` predict.
    pub(crate) fn ladder(&self, pieces: Option<&Pieces>) -> Vec<json::Rung> {
        let kept_blocks = self.planned.request.kept_blocks;
        let rung = |rung: Rung| json::Rung {
            keep: rung.keep.describe(kept_blocks),
            precision: rung.keep.precision.to_string(),
            planned_private_bytes: rung.private_bytes as u64,
            predicted_tokens_per_s: rung.tokens_per_s,
            chosen: rung.chosen,
        };
        self.planned.ladder(self.model.config(), pieces).into_iter().map(rung).collect()
    }

    /// The plan for machines.
    pub(crate) fn json(&self, fits: bool, ladder: Vec<json::Rung>) -> json::Plan {
        let plan = &self.planned.plan;
        json::Plan {
            checkpoint_bytes: self.wear.bytes,
            checkpoint_mb_per_hour: self.wear.mb_per_hour(chosen_rate(&ladder)),
            planned_private_bytes: plan.private_bytes as u64,
            mapped_bytes: plan.mapped_bytes as u64,
            pools: plan.pools.iter().map(|p| (p.name.to_string(), p.bytes as u64)).collect(),
            fits,
            ladder,
        }
    }
}

/// The predicted rate for what this run keeps.
pub(crate) fn chosen_rate(ladder: &[json::Rung]) -> Option<f64> {
    ladder.iter().find(|r| r.chosen)?.predicted_tokens_per_s
}

/// The ladder for people: a line per rung, with the chosen one marked.
pub(crate) fn ladder_table(ladder: &[json::Rung]) -> String {
    let width = ladder.iter().map(|r| r.keep.len()).max().unwrap_or(0).max(20);
    let predicted = ladder.iter().any(|r| r.predicted_tokens_per_s.is_some());
    let rates = if predicted { "  tokens/s (predicted)" } else { "" };
    let mut text = format!("  {:<width$}  {:<5} {:>10}{rates}", "blocks keep", "as", "private");
    for r in ladder {
        let mark = if r.chosen { '*' } else { ' ' };
        let bytes = bytes::show(r.planned_private_bytes);
        text += &format!("\n{mark} {:<width$}  {:<5} {bytes:>10}", r.keep, r.precision);
        text += &r.predicted_tokens_per_s.map_or(String::new(), |t| format!("{t:>10.0}"));
    }
    text
}

/// A plan for people: a line per pool, the total, and the mapped file, which isn't part of it.
pub(crate) fn plan_table(request: &Request, plan: &MemoryPlan) -> String {
    let line = |name: &str, bytes: usize| format!("\n{name:<18} {:>12}", bytes::show(bytes as u64));
    let trained = match request.full {
        None => format!("{} adapter parameters", request.params),
        Some(FullUpdate::AtEnd) => "every weight".to_string(),
        Some(FullUpdate::AtOnce) => "every weight, block by block".to_string(),
    };
    let mut text =
        format!("plan: {} x {} tokens, {trained}, {} threads", request.batch, request.seq, request.threads);
    for pool in plan.pools.iter().filter(|p| p.bytes > 0) {
        text += &line(pool.name, pool.bytes);
    }
    text + &line("private in all", plan.private_bytes) + &line("mapped, evictable", plan.mapped_bytes)
}
