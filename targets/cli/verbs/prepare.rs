//! What `plan` and `train` share: everything up to the memory plan, nothing of what the plan is for.

use std::sync::Arc;

use engraft_kernels::DType;
use engraft_runtime::adapter::{Case, Layout, LoraConfig};
use engraft_runtime::data::batches::max_tokens;
use engraft_runtime::data::{Example, TrainValid, load, load_train_valid};
use engraft_runtime::error::Result;
use engraft_runtime::generate::replay::{Sampling, Starts};
use engraft_runtime::merge::tuned::check_type;
use engraft_runtime::model::text::Text;
use engraft_runtime::model::tuned::TunedLayout;
use engraft_runtime::model::weights::ModelFile;
use engraft_runtime::model::{ModelConfig, Proj};
use engraft_runtime::nn;
use engraft_runtime::nn::keep::KeepPrecision;
use engraft_runtime::plan::room::{self, Room};
use engraft_runtime::plan::{FullUpdate, KeepPlan, MemoryPlan, Request, keep, show_bytes};
use engraft_runtime::rng::Rng;
use engraft_runtime::train::Direction;
use engraft_runtime::train::calibrate::Pieces;
use engraft_runtime::train::checkpoint::payload_bytes;
use engraft_runtime::train::eva::EvaWords;

use super::common;
use crate::json;
use crate::options::{
    self, FineTune, Init, Layers, LoraOptions, ReplaySource, RunOptions, StoredAs, TuneOptions, misuse, stat,
};
use crate::provenance;

/// The random stream of sampled replay rows' seed.
const REPLAY_STREAM: u64 = 0x5245_504C;
/// Tokens of the shortest rows that are worth a plan.
const LEAST_SEQ: usize = 16;
/// arXiv 2606.06920 advises against full fine-tuning of models with fewer parameters.
const ADVISED_PARAMS: usize = 500_000_000;

/// A run that is planned, and not begun.
pub(crate) struct Prepared {
    pub(crate) model: Arc<ModelFile>,
    /// The rows; `None` without `--data`.
    pub(crate) data: Option<TrainValid>,
    /// What is replayed among them.
    pub(crate) replay: Option<Replay>,
    /// The adapter; `None` where every weight is trained.
    pub(crate) lora: Option<LoraConfig>,
    /// The type that the trained model's matrices are to be stored as, where one is asked for.
    pub(crate) dtype: Option<DType>,
    pub(crate) request: Request,
    pub(crate) plan: MemoryPlan,
    pub(crate) wear: Wear,
    /// The least of what the machine, or the device asked about, leaves a process.
    room: Option<Room>,
}

/// What checkpoints write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wear {
    /// Of one.
    bytes: u64,
    /// Steps between two; 0 for none but when stopped.
    every: u32,
    /// Tokens of a step, on average; without data at most.
    tokens_per_step: f64,
}

impl Wear {
    fn new(tune: &TuneOptions, c: &ModelConfig, request: &Request) -> Wear {
        let parameters = if request.full.is_some() { TunedLayout::new(c).len() } else { request.params };
        let per_row = match request.data_rows {
            0 => request.seq as f64,
            rows => request.data_tokens as f64 / rows as f64,
        };
        let rows = request.batch as f64 * f64::from(tune.run.grad_accumulation_steps);
        let every = tune.run.checkpoint_every;
        Wear { bytes: payload_bytes(parameters), every, tokens_per_step: rows * per_row }
    }

    /// MB in an hour at this rate.
    fn mb_per_hour(&self, tokens_per_s: Option<f64>) -> Option<f64> {
        let steps_per_hour = 3600.0 * tokens_per_s.filter(|_| self.every > 0)? / self.tokens_per_step;
        Some(1e-6 * self.bytes as f64 * steps_per_hour / f64::from(self.every))
    }

    /// For people.
    pub(crate) fn describe(&self, tokens_per_s: Option<f64>) -> String {
        let each = match self.every {
            0 => "when stopped".to_string(),
            every => format!("each {every} steps"),
        };
        let hourly = self.mb_per_hour(tokens_per_s);
        let hourly = hourly.map_or(String::new(), |mb| format!(", about {mb:.0} MB written in an hour"));
        format!("checkpoints: {} {each}{hourly}", show_bytes(self.bytes))
    }
}

/// Rows to replay.
pub(crate) enum Replay {
    /// Read from a file.
    Rows(Vec<Example>),
    /// Sampled from the base once the plan is accepted.
    Sampled(Starts, Sampling),
}

impl Replay {
    /// Tokens of all rows, rows, and positions of the longest; of sampled ones, at most.
    fn extent(&self) -> (usize, usize, usize) {
        match self {
            Replay::Rows(rows) => (
                rows.iter().map(|e| e.ids.len()).sum(),
                rows.len(),
                rows.iter().map(Example::rows).max().unwrap_or(0),
            ),
            Replay::Sampled(starts, sampling) => {
                let (tokens, longest) = sampling.extent(starts);
                (tokens, sampling.count, longest)
            }
        }
    }
}

/// Opens the model, reads the data, and plans for `room`, which is asked for once the model is mapped: where
/// addresses are limited, the map has taken its share by then. The tokenizer is gone when this returns, and
/// the model's digest is known.
///
/// # Errors
/// Those of opening and reading; `Misuse` for an adapter that does not fit the model; `DoesNotFit` where this
/// process may not even hold what the shortest rows would take.
pub(crate) fn prepare(tune: &TuneOptions, room: impl FnOnce() -> Option<Room>) -> Result<Prepared> {
    tune.check_effects()?;
    let model = common::open_model(&tune.model)?;
    let room = room();
    let lora = match tune.lora.fine_tune_type {
        FineTune::Full => None,
        FineTune::Lora | FineTune::Dora => Some(lora_config(model.config(), &tune.lora)?),
    };
    if lora.is_none() {
        check_type(&model, tune.lora.dtype).map_err(|e| e.at("--type"))?;
    }
    let rows_max = (tune.run.max_seq_length as usize).min(model.config().context_len);
    let tokenizer_bytes = Text::heap_bytes(&model)?;
    let mut request = Request {
        batch: tune.run.batch_size as usize,
        seq: rows_max,
        threads: tune.compute.threads as usize,
        beside_base: tune.retention.penalty().is_some(),
        tokenizer_bytes,
        model_bytes: model.private_bytes(),
        mapped_bytes: model.mapped_bytes(),
        packed: tune.lora.adapter_precision == StoredAs::F16,
        ..trained(model.config(), lora.as_ref(), &tune.run)
    };
    refuse_early(model.config(), &request)?;
    let (data, replay) = std::thread::scope(|scope| {
        // The digest reads the whole file: beside the tokenizer's work it costs no time.
        scope.spawn(|| model.digest());
        read_rows(tune, &model, rows_max)
    })?;
    if let Some(data) = &data {
        let examples = || data.train.examples.iter().chain(&data.valid.examples);
        request.batch = request.batch.min(data.train.examples.len());
        request.seq = data.train.rows_max().max(data.valid.rows_max());
        request.data_tokens = examples().map(|e| e.ids.len()).sum();
        request.data_rows = examples().count();
    }
    request.preparation_bytes =
        preparation_bytes(tune, model.config(), lora.as_ref(), &request, &data, &replay);
    if let Some(replay) = &replay {
        let (tokens, rows, longest) = replay.extent();
        request.data_tokens += tokens;
        request.data_rows += rows;
        request.seq = request.seq.max(longest);
        // Replayed rows fill batches that the data alone would not.
        request.batch = tune.run.batch_size as usize;
    }
    request.keep = keep_plan(tune, model.config(), &request, room.as_ref());
    let plan = MemoryPlan::new(model.config(), &request);
    let wear = Wear::new(tune, model.config(), &request);
    Ok(Prepared { model, data, replay, lora, dtype: tune.lora.dtype, request, plan, wear, room })
}

/// What this process may take, or the device of a profile, whichever is less.
pub(crate) fn room_of(tune: &TuneOptions, device: Option<&str>) -> Option<Room> {
    let device = device.and_then(provenance::room);
    match room::here(tune.compute.threads as usize) {
        Some(here) => Some(here.or_less(device)),
        None => device,
    }
}

/// Refuses what can't fit however short the rows are, before the tokenizer and the rows take any memory.
fn refuse_early(c: &ModelConfig, request: &Request) -> Result<()> {
    let least = Request { batch: 1, seq: request.seq.min(LEAST_SEQ), ..*request };
    let room = room::here(request.threads);
    room::hold(&MemoryPlan::new(c, &least), (c, &least), None, room.as_ref())
}

/// What is held at most before training, beside data: EVA's walk, or the sampling of replay rows. The
/// request is that of the data alone.
fn preparation_bytes(
    tune: &TuneOptions,
    c: &ModelConfig,
    lora: Option<&LoraConfig>,
    request: &Request,
    data: &Option<TrainValid>,
    replay: &Option<Replay>,
) -> usize {
    let eva = |lora: &LoraConfig| {
        let layout = Layout::new(c, lora);
        let (batch, count) = (tune.run.batch_size as usize, tune.lora.eva_batches() as usize);
        let (rows, batches) = match data {
            Some(data) => {
                let examples = &data.train.examples;
                (max_tokens(examples, batch), count.min(examples.len().div_ceil(batch)))
            }
            None => (batch * request.seq, count),
        };
        let words = EvaWords::new(c, &layout, (rows, request.seq, rows * batches), request.threads);
        size_of::<f32>() * (words.total() + layout.len())
    };
    let eva = lora.filter(|_| tune.lora.init == Init::Eva).map_or(0, eva);
    match replay {
        Some(Replay::Sampled(starts, sampling)) => eva.max(sampling.bytes(c, starts, request.threads)),
        _ => eva,
    }
}

/// What is trained, as far as memory depends on it.
fn trained(c: &ModelConfig, lora: Option<&LoraConfig>, run: &RunOptions) -> Request {
    let Some(lora) = lora else {
        // Without a norm to clip by and without sums to wait for, no gradient is needed for long.
        let at_once = run.max_grad_norm == 0.0 && run.grad_accumulation_steps == 1;
        let full = Some(if at_once { FullUpdate::AtOnce } else { FullUpdate::AtEnd });
        return Request { full, kept_blocks: c.n_layers, ..Request::default() };
    };
    let layout = Layout::new(c, lora);
    Request {
        params: layout.len(),
        gain_words: layout.gain_words(),
        rank: lora.rank_max(),
        kept_blocks: c.n_layers - lora.layers[0],
        dropout: lora.dropout > 0.0,
        ..Request::default()
    }
}

/// What blocks keep, as `--keep` says.
fn keep_plan(tune: &TuneOptions, c: &ModelConfig, request: &Request, room: Option<&Room>) -> KeepPlan {
    let precision = match tune.keep_precision {
        options::KeepPrecision::F32 => KeepPrecision::F32,
        options::KeepPrecision::Bf16 => KeepPrecision::Bf16,
    };
    let level = match tune.keep {
        options::Keep::Auto => {
            let budget = tune.memory_budget.map(|b| usize::try_from(b).unwrap_or(usize::MAX));
            let unasked = match request.full {
                None => keep::UNASKED_BYTES,
                // Beside what the weights take anyway.
                Some(_) => MemoryPlan::new(c, request).private_bytes + keep::UNASKED_BYTES,
            };
            let room = room.map_or(usize::MAX, |r| usize::try_from(r.bytes).unwrap_or(usize::MAX));
            return keep::choose(c, request, precision, budget.unwrap_or(unasked).min(room));
        }
        options::Keep::Inputs => nn::keep::Keep::Inputs,
        options::Keep::Attention => nn::keep::Keep::Attention,
        options::Keep::All => nn::keep::Keep::All,
    };
    KeepPlan::uniform(level, precision, request.kept_blocks)
}

/// The rows of `--data` and `--replay`; the tokenizer is gone afterwards.
fn read_rows(
    tune: &TuneOptions,
    model: &ModelFile,
    rows_max: usize,
) -> Result<(Option<TrainValid>, Option<Replay>)> {
    // Checked before anything is read.
    let share = tune.retention.share()?;
    if let Some(ReplaySource::File(file)) = &tune.retention.replay {
        stat(file, "--replay")?;
    }
    if tune.data.path()?.is_none() && tune.retention.replay.is_none() {
        return Ok((None, None));
    }
    let text = Text::of(model)?;
    let data = read_data(tune, &text, rows_max)?;
    Ok((data, if share > 0.0 { read_replay(tune, &text, rows_max)? } else { None }))
}

/// The rows of `--replay`, or what sampling them begins with.
fn read_replay(tune: &TuneOptions, text: &Text, rows_max: usize) -> Result<Option<Replay>> {
    let retention = &tune.retention;
    match &retention.replay {
        None => Ok(None),
        Some(ReplaySource::Base) => {
            let seed = Rng::new(tune.seed, REPLAY_STREAM).next_u64();
            let (count, tokens) = retention.sampled();
            let starts = Starts::of(text, rows_max).map_err(|e| e.at("--replay base"))?;
            Ok(Some(Replay::Sampled(starts, Sampling { count, tokens, rows_max, seed })))
        }
        Some(ReplaySource::File(file)) => {
            let options = common::data_options(&tune.data, rows_max, tune.seed);
            let rows = load(file, &text.tokenizer, &text.chat, &options).map_err(|e| e.at("--replay"))?;
            common::tell_rows(&rows, rows_max);
            eprintln!(
                "{}: {} rows with {} trained tokens to replay",
                file.display(),
                rows.examples.len(),
                rows.trained_tokens()
            );
            Ok(Some(Replay::Rows(rows.examples)))
        }
    }
}

/// The rows of `--data` as token ids, and what there is to say of them.
fn read_data(tune: &TuneOptions, text: &Text, rows_max: usize) -> Result<Option<TrainValid>> {
    let Some(path) = tune.data.path()? else { return Ok(None) };
    let options = common::data_options(&tune.data, rows_max, tune.seed);
    let data = load_train_valid(path, &text.tokenizer, &text.chat, &options)?;
    common::tell_rows(&data.train, rows_max);
    if !data.split_by_seed {
        common::tell_rows(&data.valid, rows_max);
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
        eprintln!(
            "{} of the held-out rows are in the training rows too: they flatter the result",
            data.duplicates
        );
    }
    Ok(Some(data))
}

/// The adapter's settings for this model.
fn lora_config(model: &ModelConfig, options: &LoraOptions) -> Result<LoraConfig> {
    let n = model.n_layers;
    let first = match options.num_layers {
        Layers::All => 0,
        Layers::Last(count) => n.checked_sub(count as usize).ok_or_else(|| {
            misuse(format!("--num-layers {count}: the model has {n} blocks; give at most that many, or -1"))
        })?,
    };
    let layers: Vec<usize> = (first..n).collect();
    let rank = options.rank as usize;
    let targets = &options.lora_modules.0;
    let plain = LoraConfig::new(model, rank, options.alpha, options.dropout as f32, targets, &layers)?;
    let dora = options.fine_tune_type == FineTune::Dora;
    LoraConfig { rslora: options.use_rslora, dora, overrides: options.overrides(), ..plain }.checked(model)
}

/// What full fine-tuning trains, with warnings of what often goes wrong.
fn describe_full(model: &ModelFile, dtype: Option<DType>) -> String {
    let n = TunedLayout::new(model.config()).len();
    let mut text = format!("full fine-tuning: all {n} weights, in f32");
    let stored = dtype.unwrap_or(model.block(0).proj(Proj::Down).dtype());
    if is_coarse(stored) {
        text += &format!(
            "\nwarning: the model will be stored as {}, whose rounding can undo much of what small steps \
             change; --type Q8_0 or F16 keeps it",
            stored.name()
        );
    }
    if n >= ADVISED_PARAMS {
        return text;
    }
    format!(
        "{text}\nwarning: this model has fewer than 500M parameters. Full fine-tuning often harms models \
         below 300M, at times beneath what they did untrained (arXiv 2606.06920); --fine-tune-type lora or \
         dora is the advice below 500M"
    )
}

/// Whether a type has fewer than eight bits an element.
fn is_coarse(dtype: DType) -> bool {
    dtype.block_bytes() < dtype.block_len()
}

/// What is adapted, and the multiplier of each distinct case.
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

/// What stands against forgetting, and what it costs; empty where nothing does.
pub(crate) fn describe_retention(tune: &TuneOptions, prepared: &Prepared) -> Result<String> {
    let mut text = String::new();
    if let Some(replay) = &prepared.replay {
        let (tokens, rows, _) = replay.extent();
        let origin = match replay {
            Replay::Rows(_) => format!("{rows} rows of {tokens} tokens"),
            Replay::Sampled(..) => format!("{rows} rows sampled from the base, at most {tokens} tokens"),
        };
        text += &format!("replay: {origin}; {} of each batch's rows on average\n", tune.retention.share()?);
    }
    if let Some(penalty) = tune.retention.penalty() {
        let name = match penalty.direction {
            Direction::Forward => "KL(base‖tuned)",
            Direction::Reverse => "KL(tuned‖base)",
        };
        text += &format!(
            "{name} at weight {}: the base runs forward once more on every batch, and its head beside the \
             tuned model's\n",
            penalty.weight
        );
    }
    Ok(text)
}

/// The projections of a case; those that are of it in some layers only, with these.
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
    /// What is trained, for people.
    pub(crate) fn describe(&self) -> String {
        self.lora.as_ref().map_or_else(|| describe_full(&self.model, self.dtype), describe_adapter)
    }

    /// The plan for people.
    pub(crate) fn table(&self) -> String {
        plan_table(&self.request, &self.plan)
    }

    /// Holds the plan against `--memory-budget`, and against what the machine leaves.
    ///
    /// # Errors
    /// `DoesNotFit`, with settings that fit.
    pub(crate) fn check(&self, budget: Option<u64>) -> Result<()> {
        let budget = budget.map(|b| (usize::try_from(b).unwrap_or(usize::MAX), "--memory-budget"));
        room::hold(&self.plan, (self.model.config(), &self.request), budget, self.room.as_ref())
    }

    /// What blocks may keep, by memory, with the rates that `pieces` predict.
    pub(crate) fn ladder(&self, pieces: Option<&Pieces>) -> Vec<json::Rung> {
        let (c, asked) = (self.model.config(), &self.request);
        let mut rungs = keep::rungs(KeepPrecision::F32, asked.kept_blocks);
        // Inputs alone are f32 either way.
        rungs.extend(keep::rungs(KeepPrecision::Bf16, asked.kept_blocks).into_iter().skip(1));
        if !rungs.contains(&asked.keep) && asked.keep.blocks() > 0 {
            rungs.push(asked.keep);
        }
        let rung = |keep: KeepPlan| {
            let request = Request { keep, ..*asked };
            json::Rung {
                keep: keep.describe(asked.kept_blocks),
                precision: keep.precision.to_string(),
                planned_private_bytes: MemoryPlan::new(c, &request).private_bytes as u64,
                predicted_tokens_per_s: pieces.map(|p| p.tokens_per_s(c.n_layers, &request)),
                chosen: keep == asked.keep || keep.blocks() + asked.keep.blocks() == 0,
            }
        };
        let mut ladder: Vec<_> = rungs.into_iter().map(rung).collect();
        ladder.sort_by_key(|r| r.planned_private_bytes);
        ladder
    }

    /// The plan for machines.
    pub(crate) fn json(&self, fits: bool, ladder: Vec<json::Rung>) -> json::Plan {
        json::Plan {
            checkpoint_bytes: self.wear.bytes,
            checkpoint_mb_per_hour: self.wear.mb_per_hour(chosen_rate(&ladder)),
            planned_private_bytes: self.plan.private_bytes as u64,
            mapped_bytes: self.plan.mapped_bytes as u64,
            pools: self.plan.pools.iter().map(|p| (p.name.to_string(), p.bytes as u64)).collect(),
            fits,
            ladder,
        }
    }
}

/// The rate that is predicted for what this run keeps.
pub(crate) fn chosen_rate(ladder: &[json::Rung]) -> Option<f64> {
    ladder.iter().find(|r| r.chosen)?.predicted_tokens_per_s
}

/// The ladder for people, a line per rung, the chosen one marked.
pub(crate) fn ladder_table(ladder: &[json::Rung]) -> String {
    let width = ladder.iter().map(|r| r.keep.len()).max().unwrap_or(0).max(20);
    let predicted = ladder.iter().any(|r| r.predicted_tokens_per_s.is_some());
    let rates = if predicted { "  tokens/s (predicted)" } else { "" };
    let mut text = format!("  {:<width$}  {:<5} {:>10}{rates}", "blocks keep", "as", "private");
    for r in ladder {
        let mark = if r.chosen { '*' } else { ' ' };
        let bytes = show_bytes(r.planned_private_bytes);
        text += &format!("\n{mark} {:<width$}  {:<5} {bytes:>10}", r.keep, r.precision);
        text += &r.predicted_tokens_per_s.map_or(String::new(), |t| format!("{t:>10.0}"));
    }
    text
}

/// A plan for people: a line per pool, what they come to, and what is not among them.
pub(crate) fn plan_table(request: &Request, plan: &MemoryPlan) -> String {
    let line = |name: &str, bytes: usize| format!("\n{name:<18} {:>12}", show_bytes(bytes as u64));
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
