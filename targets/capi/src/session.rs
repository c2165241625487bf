//! Sessions: one sequence being read and continued, token by token.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use engraft_kernels::Kernels;
use engraft_runtime::Advice;
use engraft_runtime::data::masks::TEXT_ROLE;
use engraft_runtime::generate::{
    AdapterSlot, Ended, KvType, Listener, Sampler, SamplerOptions, Sequence, StackedAdapter, go_on,
};
use engraft_runtime::model::ModelConfig;
use engraft_runtime::model::chat::Message;
use engraft_runtime::model::text::{Text, opening};
use engraft_runtime::model::tokenizer::Special;
use engraft_runtime::nn::Precision;
use engraft_runtime::plan::room;
use engraft_runtime::run::Control;

use crate::adapter::{Adapter, Slot};
use crate::caller::{self, Out, number, or, structs};
use crate::error::{Failure, Result};
use crate::handle::{self, Exclusive, Kind};
use crate::model::{self, Model};

/// Keys and values take 2 bytes an element.
pub const ENGRAFT_CACHE_F16: u32 = 0;
/// 4 bytes, exact.
pub const ENGRAFT_CACHE_F32: u32 = 1;
/// 8 bits in blocks of 32.
pub const ENGRAFT_CACHE_Q8: u32 = 2;

/// The model ended its text.
pub const ENGRAFT_ENDED_MODEL: u32 = 0;
/// As many tokens as were asked for.
pub const ENGRAFT_ENDED_LIMIT: u32 = 1;
/// The context is full.
pub const ENGRAFT_ENDED_CONTEXT: u32 = 2;
/// The caller stopped it.
pub const ENGRAFT_ENDED_CANCELLED: u32 = 3;

/// Tokens of a context where nothing is said, unless the model has fewer.
const CONTEXT: u32 = 4096;
/// Tokens to generate where nothing is said.
const PREDICT: u32 = 128;

/// A sequence with its cache. One call at a time; `engraft_session_cancel` from anywhere.
pub struct Session {
    _opaque: [u8; 0],
}

impl Kind for Session {
    type Value = Value;
    const NAME: &'static str = "session";

    fn close(value: &Value) -> bool {
        value.state.close()
    }
}

/// What is behind a session handle.
pub(crate) struct Value {
    control: Control,
    state: Exclusive<State>,
}

/// A session, with or without its cache.
struct State {
    model: Arc<model::Inner>,
    kernels: Arc<Kernels>,
    precision: Precision,
    capacity: usize,
    cache: KvType,
    /// Given back by a trim, and made again when it is needed.
    sequence: Option<Sequence>,
    adapters: Option<Arc<StackedAdapter>>,
    slot: Option<Arc<AdapterSlot>>,
    few_shot: Vec<Message>,
    talk: Talk,
}

/// What was read and said, so that a call may go on from it.
#[derive(Default)]
struct Talk {
    /// A chat's turns, without examples.
    turns: Vec<Message>,
    /// A running text, with what was generated last and not read yet.
    ids: Vec<u32>,
}

/// How a session is made. Zero is the default of everything.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct SessionParams {
    /// `sizeof(engraft_session_params)`.
    pub struct_size: u32,
    /// Tokens of the context (0: what the model was trained for, at most 4096).
    pub ctx_size: u32,
    /// `ENGRAFT_CACHE_*`.
    pub cache_type: u32,
    /// Threads (0: as many as there are cores). Sessions that run side by side take 1 each.
    pub threads: u32,
    /// 1 keeps activations in 32 bits.
    pub exact: u32,
    /// 0.
    pub reserved: u32,
}

/// How text is generated. Zero is the default of everything; a `top_p` or `min_p` below zero is off.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct GenerateParams {
    /// `sizeof(engraft_generate_params)`.
    pub struct_size: u32,
    /// Tokens at most (0: 128; `UINT32_MAX`: until the model ends or the context is full).
    pub n_predict: u32,
    /// 1 puts the prompt into the model's chat template, as the user's message.
    pub chat: u32,
    /// 1 goes on from what the session has read and said, of the same kind, a chat or a text; 0 begins anew.
    pub keep: u32,
    /// 1 always takes the likeliest token.
    pub greedy: u32,
    /// Draws among so many of the likeliest tokens (0: 40; below 0: all).
    pub top_k: i32,
    /// Temperature (0: 0.8).
    pub temp: f32,
    /// Draws among the likeliest tokens that hold this probability together (0: 0.95).
    pub top_p: f32,
    /// Drops tokens below this share of the likeliest one's probability (0: 0.05).
    pub min_p: f32,
    /// Makes recent tokens less likely (0: 1, which is off).
    pub repeat_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
    /// The system message that a chat begins with (where one goes on it has no effect): UTF-8; NULL for none.
    pub system: *const c_char,
    /// Bytes of `system`.
    pub system_length: usize,
}

/// What was generated.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct GenerateInfo {
    /// `sizeof(engraft_generate_info)`.
    pub struct_size: u32,
    /// `ENGRAFT_ENDED_*`.
    pub ended: u32,
    /// Tokens of the prompt, with the template's and the examples'.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub tokens: u64,
    /// Seconds to read the prompt.
    pub prompt_seconds: f64,
    /// Seconds to generate.
    pub seconds: f64,
    /// Swaps of the slot that the last token was computed after; 0 without a slot.
    pub generation: u64,
}

structs!(
    SessionParams = "engraft_session_params",
    GenerateParams = "engraft_generate_params",
    GenerateInfo = "engraft_generate_info",
);

/// Takes the text as it comes: UTF-8 in whole characters, which no NUL ends; false stops. Called on the
/// thread of the call that it was given to.
pub type TokenCallback =
    Option<unsafe extern "C" fn(text: *const c_char, length: usize, user: *mut c_void) -> bool>;

impl SessionParams {
    /// Tokens of the context.
    ///
    /// # Errors
    /// `MISUSE` beyond what the model was trained for.
    pub(crate) fn capacity(&self, c: &ModelConfig) -> Result<usize> {
        match self.ctx_size as usize {
            0 => Ok(c.context_len.min(CONTEXT as usize)),
            n if (2..=c.context_len).contains(&n) => Ok(n),
            n => {
                let message =
                    format!("ctx_size is {n}: the model was trained for {} positions", c.context_len);
                Err(Failure::misuse(message))
            }
        }
    }

    /// # Errors
    /// `MISUSE`.
    pub(crate) fn cache(&self) -> Result<KvType> {
        match self.cache_type {
            ENGRAFT_CACHE_F16 => Ok(KvType::F16),
            ENGRAFT_CACHE_F32 => Ok(KvType::F32),
            ENGRAFT_CACHE_Q8 => Ok(KvType::Q8),
            other => Err(Failure::misuse(format!("{other} is no type of a cache"))),
        }
    }
}

impl GenerateParams {
    fn sampler(&self) -> Result<Sampler> {
        let share = |value: f32, default: f64, off: f64, name: &str| {
            number(f64::from(value), (default, Some(off)), 0.0..=1.0, name).map(|value| value as f32)
        };
        let positive = |value: f32, default: f64, name: &str| {
            number(f64::from(value), (default, None), 1e-6..=100.0, name).map(|value| value as f32)
        };
        let temp = positive(self.temp, 0.8, "temp")?;
        Ok(Sampler::new(SamplerOptions {
            temp: if self.greedy == 0 { temp } else { 0.0 },
            top_k: if self.top_k == 0 { 40 } else { usize::try_from(self.top_k).unwrap_or(0) },
            top_p: share(self.top_p, 0.95, 1.0, "top_p")?,
            min_p: share(self.min_p, 0.05, 0.0, "min_p")?,
            repeat_penalty: positive(self.repeat_penalty, 1.0, "repeat_penalty")?,
            seed: self.seed,
            ..SamplerOptions::default()
        })?)
    }

    pub(crate) fn limit(&self) -> usize {
        match self.n_predict {
            u32::MAX => usize::MAX,
            n => or(n, PREDICT),
        }
    }
}

/// Who is given the text.
pub(crate) struct Reader {
    callback: TokenCallback,
    user: *mut c_void,
}

impl Reader {
    /// Whether to go on.
    pub(crate) fn take(&self, text: &str) -> bool {
        match self.callback {
            Some(callback) if !text.is_empty() => {
                // SAFETY: the crate's contract, for callbacks: this lives as long as the call that was given
                // the callback.
                unsafe { callback(text.as_ptr().cast(), text.len(), self.user) }
            }
            _ => true,
        }
    }
}

impl State {
    /// The sequence, with the adapters of now.
    fn sequence(&mut self) -> Result<&mut Sequence> {
        if self.sequence.is_none() {
            let (file, kernels) = (self.model.file.clone(), self.kernels.clone());
            let adapters = self.adapters.clone();
            let (rank, threads) = (adapters.as_ref().map_or(0, |a| a.rank()), kernels.threads());
            let need = Sequence::bytes(file.config(), self.capacity, rank, threads, self.cache);
            room::hold_bytes(need, threads, Advice::ShorterContext)?;
            let mut made = Sequence::new(file, kernels, adapters, self.precision, self.capacity, self.cache)?;
            if let Some(slot) = &self.slot {
                made.follow(slot.clone());
            }
            self.sequence = Some(made);
        }
        self.sequence.as_mut().ok_or_else(|| Failure::misuse("the session has no sequence"))
    }

    /// Refuses examples of the other kind: texts before a chat, or a chat's before a text.
    fn check_examples(&self, chat: bool) -> Result<()> {
        let texts = self.few_shot.iter().all(|message| message.role == TEXT_ROLE);
        if self.few_shot.is_empty() || texts != chat {
            return Ok(());
        }
        let what = if texts { "texts to be continued: set chat to 0" } else { "a chat's: set chat to 1" };
        Err(Failure::misuse(format!("the examples of this session are {what}")))
    }

    /// The ids of everything up to where the answer begins; the prompt never becomes a control token.
    fn whole_ids(&self, text: &Text, chat: bool, prompt: &str) -> Result<Vec<u32>> {
        if chat {
            let before = self.talk.turns.iter().take_while(|turn| turn.role == "system").count();
            let (before, turns) = self.talk.turns.split_at(before);
            // The caller's instruction stands for the one that the examples were chosen with.
            let system = before.first().map(|turn| turn.content.as_str());
            return Ok(text.chat_prompt(&[opening(system, &self.few_shot), turns.to_vec()].concat())?);
        }
        let ids = match self.talk.ids.is_empty() {
            true => text.plain_prompt(&self.few_shot, prompt),
            false => [&self.talk.ids[..], &text.tokenizer.encode(prompt, Special::Plain)].concat(),
        };
        match ids.is_empty() {
            false => Ok(ids),
            true => Err(Failure::misuse("the prompt is empty, and this model's texts begin with no token")),
        }
    }

    /// Reads the prompt, and goes on until something ends it. A prompt that was stopped in counts as not asked.
    fn generate(
        &mut self,
        (prompt, system): (&str, &str),
        p: &GenerateParams,
        control: &Control,
        reader: &Reader,
    ) -> Result<GenerateInfo> {
        let (text, chat) = (self.model.text()?, p.chat != 0);
        let mut sampler = p.sampler()?;
        self.check_examples(chat)?;
        if p.keep == 0 {
            self.talk = Talk::default();
            // What was read before may have been read with other adapters.
            if let Some(sequence) = &mut self.sequence {
                sequence.truncate(0);
            }
        }
        if if chat { !self.talk.ids.is_empty() } else { !self.talk.turns.is_empty() } {
            let message =
                "keep is 1, and a chat does not go on from a text, nor a text from a chat: set keep to 0";
            return Err(Failure::misuse(message));
        }
        let turns = self.talk.turns.len();
        if chat {
            let system = (turns == 0 && !system.is_empty()).then(|| Message::new("system", system));
            self.talk.turns.extend(system);
            self.talk.turns.push(Message::new("user", prompt));
        }
        let done = self.whole_ids(&text, chat, prompt).and_then(|ids| {
            let tokenizer = &text.tokenizer;
            // A chat's answer is a text of its own; a continuation keeps the blank that it begins with.
            let decoder = if chat { tokenizer.decoder() } else { tokenizer.decoder_continuing() };
            let (sequence, by) = (self.sequence()?, (tokenizer, decoder));
            let heard = &mut Heard { control, reader };
            let told = go_on(sequence, &ids, &mut sampler, p.limit(), by, heard)?;
            Ok((told, ids))
        });
        let (told, ids) = match done {
            Ok(done) => done,
            Err(failure) => {
                // What could not be answered was not asked.
                self.talk.turns.truncate(turns);
                return Err(failure);
            }
        };
        let info = GenerateInfo {
            ended: match told.ended {
                Ended::Model => ENGRAFT_ENDED_MODEL,
                Ended::Limit => ENGRAFT_ENDED_LIMIT,
                Ended::Context => ENGRAFT_ENDED_CONTEXT,
                Ended::Stopped => ENGRAFT_ENDED_CANCELLED,
            },
            prompt_tokens: ids.len() as u64,
            tokens: told.ids.len() as u64,
            prompt_seconds: told.prompt_seconds,
            seconds: told.seconds,
            generation: self.sequence()?.generation().unwrap_or(0),
            ..caller::zeroed()
        };
        match (told.ended, chat) {
            // Not one token was drawn: nothing was answered.
            (Ended::Stopped, _) if told.ids.is_empty() => self.talk.turns.truncate(turns),
            (_, true) => self.talk.turns.push(Message::new("assistant", told.text)),
            (_, false) => self.talk.ids = [ids, told.ids].concat(),
        }
        Ok(info)
    }
}

/// The caller, who hears of every token.
struct Heard<'a> {
    control: &'a Control,
    reader: &'a Reader,
}

impl Listener for Heard<'_> {
    fn goes_on(&mut self) -> bool {
        !self.control.is_cancelled()
    }

    fn hear(&mut self, part: &str) -> bool {
        self.reader.take(part)
    }
}

/// Makes all settings the default. `struct_size` is `sizeof(engraft_session_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_session_default_params(
    params: *mut SessionParams,
    struct_size: usize,
) -> i32 {
    handle::alone("engraft_session_default_params", || {
        // SAFETY: the crate's contract, for the caller's struct.
        unsafe { caller::default_settings(params, struct_size) }
    })
}

/// Makes all settings the default. `struct_size` is `sizeof(engraft_generate_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_generate_default_params(
    params: *mut GenerateParams,
    struct_size: usize,
) -> i32 {
    handle::alone("engraft_generate_default_params", || {
        // SAFETY: the crate's contract, for the caller's struct.
        unsafe { caller::default_settings(params, struct_size) }
    })
}

/// Makes a session on a model, with an adapter or (NULL) with the base alone. `params` may be NULL.
/// `*session` is freed with `engraft_session_free`. `BASE_MISMATCH` for an adapter of another model: of another
/// handle it is taken once the digests of both files are found equal.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_session_create(
    model: *const Model,
    adapter: *const Adapter,
    params: *const SessionParams,
    session: *mut *mut Session,
) -> i32 {
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::clear(session) };
    handle::call("engraft_session_create", model, |model| {
        // SAFETY: the crate's contract, for the caller's place and struct.
        let (out, params) = unsafe { (Out::new(session)?, caller::settings::<SessionParams>(params)?) };
        caller::unused(params.reserved)?;
        let adapter = handle::find_if_given(adapter)?;
        let adapter = adapter.as_ref().map(|adapter| &adapter.value);
        adapter.map_or(Ok(()), |adapter| adapter.check_of(model))?;
        let mut state = State {
            kernels: model::kernels(params.threads)?,
            precision: model::precision(params.exact),
            capacity: params.capacity(model.file.config())?,
            cache: params.cache()?,
            model: model.clone(),
            sequence: None,
            adapters: adapter.and_then(|adapter| adapter.stacked.clone()),
            slot: None,
            talk: Talk::default(),
            few_shot: adapter.map(|adapter| adapter.few_shot.clone()).unwrap_or_default(),
        };
        state.sequence()?;
        out.publish(Value { control: Control::default(), state: Exclusive::new(state) })
    })
}

/// Frees a session and ends its threads. `BUSY` while a call runs on it. NULL is nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_session_free(session: *mut Session) -> i32 {
    handle::free("engraft_session_free", session)
}

/// Uses an adapter, or with NULL the base alone, from the next token on, and no slot any more. What the
/// session has read already stays as it was computed. `BASE_MISMATCH` for an adapter of another model.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_session_set_adapter(
    session: *const Session,
    adapter: *const Adapter,
) -> i32 {
    handle::call("engraft_session_set_adapter", session, |session| {
        let adapter = handle::find_if_given(adapter)?;
        let adapter = adapter.as_ref().map(|adapter| &adapter.value);
        let mut state = session.state.enter()?;
        let state = &mut *state;
        adapter.map_or(Ok(()), |adapter| adapter.check_of(&state.model))?;
        let stacked = adapter.and_then(|adapter| adapter.stacked.clone());
        match (&mut state.sequence, &stacked) {
            (Some(sequence), _) => sequence.set_adapters(stacked.clone())?,
            (None, Some(stacked)) => stacked.check_fits(state.model.file.config())?,
            (None, None) => {}
        }
        (state.adapters, state.slot) = (stacked, None);
        state.few_shot = adapter.map(|adapter| adapter.few_shot.clone()).unwrap_or_default();
        Ok(())
    })
}

/// Takes the adapter from a slot from now on, looked at before every token: see `engraft_slot_swap`.
/// `BASE_MISMATCH` for a slot of another model.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_session_follow(session: *const Session, slot: *const Slot) -> i32 {
    handle::call("engraft_session_follow", session, |session| {
        let place = handle::find(slot)?;
        let mut state = session.state.enter()?;
        place.value.check_of(&state.model)?;
        let slot = place.value.slot.clone();
        if let Some(sequence) = &mut state.sequence {
            sequence.follow(slot.clone());
        }
        state.slot = Some(slot);
        state.few_shot.clear();
        Ok(())
    })
}

/// Continues a prompt (UTF-8), or answers it as a chat, and hands the text to `callback` as it comes.
/// `params`, `callback` and `info` may be NULL; set the `struct_size` of `info` before. Returns `CANCELLED`
/// when the callback answers false or `engraft_session_cancel` was called; `info` is filled then, too. Stopped
/// before the first token, it has none, and the session goes on as if nothing had been asked; with
/// `keep` 0 what came before is forgotten all the same. `DOES_NOT_FIT` where the cache is more than the system leaves.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_session_generate(
    session: *const Session,
    prompt: *const c_char,
    prompt_length: usize,
    params: *const GenerateParams,
    callback: TokenCallback,
    user: *mut c_void,
    info: *mut GenerateInfo,
) -> i32 {
    handle::call("engraft_session_generate", session, |session| {
        // SAFETY: the crate's contract, for the caller's text and struct.
        let (prompt, params) =
            unsafe { (caller::text(prompt, prompt_length, "prompt")?, caller::settings(params)?) };
        // SAFETY: the crate's contract, for the text that the struct names.
        let system = unsafe { caller::text(params.system, params.system_length, "system") }?;
        // SAFETY: the crate's contract, for the caller's struct.
        unsafe { caller::check_answer(info) }?;
        let mut state = session.state.enter()?;
        // A cancellation is of the call that runs when it is asked for.
        session.control.resume();
        let reader = Reader { callback, user };
        let found = state.generate((prompt, system), &params, &session.control, &reader)?;
        if !info.is_null() {
            // SAFETY: the crate's contract, for the caller's struct.
            unsafe { caller::answer(info, found) }?;
        }
        match found.ended {
            ENGRAFT_ENDED_CANCELLED => Err(Failure::cancelled("stopped while generating")),
            _ => Ok(()),
        }
    })
}

/// Stops the call that runs before its next token; without one, nothing happens. From anywhere, at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_session_cancel(session: *const Session) -> i32 {
    handle::call("engraft_session_cancel", session, |session| {
        session.control.cancel();
        Ok(())
    })
}

/// Forgets everything that was read and said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_session_reset(session: *const Session) -> i32 {
    handle::call("engraft_session_reset", session, |session| {
        // The cache is emptied when it is next read into.
        session.state.enter()?.talk = Talk::default();
        Ok(())
    })
}

/// Gives back the memory of the cache and the buffers, and forgets what was read and said; the next call
/// takes them again. For warnings of low memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_session_trim(session: *const Session) -> i32 {
    handle::call("engraft_session_trim", session, |session| {
        let mut state = session.state.enter()?;
        (state.sequence, state.talk) = (None, Talk::default());
        Ok(())
    })
}
