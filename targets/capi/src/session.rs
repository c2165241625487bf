//! Sessions: each reads and continues one sequence, token by token.

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
use engraft_runtime::model::usage::{Prompting, Usage};
use engraft_runtime::nn::Precision;
use engraft_runtime::plan::room;
use engraft_runtime::run::Control;

use crate::adapter::{Adapter, Slot};
use crate::caller::{self, number, or, structs};
use crate::error::{Failure, Result};
use crate::handle::{self, Exclusive, kind};
use crate::model::{self, Model};

/// Keys and values take 2 bytes per element.
pub const ENGRAFT_CACHE_F16: u32 = 0;
/// 4 bytes per element, exact.
pub const ENGRAFT_CACHE_F32: u32 = 1;
/// 8 bits per element, in blocks of 32.
pub const ENGRAFT_CACHE_Q8: u32 = 2;

/// A prompt is put as the session's adapter was trained: into the model's chat template or as a text; as a text without
/// an adapter, or where that isn't known.
pub const ENGRAFT_PROMPT_AS_TRAINED: u32 = 0;
/// A prompt is the user's message in the model's chat template.
pub const ENGRAFT_PROMPT_CHAT: u32 = 1;
/// A prompt is the beginning of a text.
pub const ENGRAFT_PROMPT_TEXT: u32 = 2;

/// The model ended its text.
pub const ENGRAFT_ENDED_MODEL: u32 = 0;
/// The token limit was reached.
pub const ENGRAFT_ENDED_LIMIT: u32 = 1;
/// The context is full.
pub const ENGRAFT_ENDED_CONTEXT: u32 = 2;
/// The caller stopped it.
pub const ENGRAFT_ENDED_CANCELLED: u32 = 3;

/// Default tokens of a context, unless the model has fewer.
const CONTEXT: u32 = 4096;
/// Default tokens to generate.
const PREDICT: u32 = 128;

/// A sequence with its cache. One call at a time; `engraft_session_cancel` may be called from anywhere.
pub struct Session {
    _opaque: [u8; 0],
}

kind!(Session, Value, "session", state);

/// The value behind a session handle.
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
    /// Freed by a trim and made again when needed.
    sequence: Option<Sequence>,
    adapters: Option<Arc<StackedAdapter>>,
    slot: Option<Arc<AdapterSlot>>,
    few_shot: Vec<Message>,
    /// How what is in use is meant to be used.
    usage: Usage,
    talk: Talk,
}

/// What was read and generated, so that a call can continue from it.
#[derive(Default)]
struct Talk {
    /// A chat's turns, without examples.
    turns: Vec<Message>,
    /// A running text, including generated tokens that haven't been read yet.
    ids: Vec<u32>,
}

/// How to make a session. Zero is the default for every field.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct SessionParams {
    /// `sizeof(engraft_session_params)`.
    pub struct_size: u32,
    /// Tokens of the context (0: what the model was trained on, up to 4096).
    pub ctx_size: u32,
    /// `ENGRAFT_CACHE_*`.
    pub cache_type: u32,
    /// Threads (0: as many as there are cores). Give parallel sessions 1 each.
    pub threads: u32,
    /// 1 keeps activations in 32 bits.
    pub exact: u32,
    /// Must be 0.
    pub reserved: u32,
}

/// How to generate text. Zero is the default for every field; a negative `top_p` or `min_p` is off.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct GenerateParams {
    /// `sizeof(engraft_generate_params)`.
    pub struct_size: u32,
    /// Maximum tokens (0: 128; `UINT32_MAX`: until the model stops or the context is full).
    pub n_predict: u32,
    /// `ENGRAFT_PROMPT_*`.
    pub prompting: u32,
    /// 1 continues the session's chat or text, which must be of the same kind; 0 starts over.
    pub keep: u32,
    /// 1 always takes the most likely token; 0 does so without a `temp`, if the adapter's answers were judged so.
    pub greedy: u32,
    /// Draw from this many of the most likely tokens (0: 40; negative: all).
    pub top_k: i32,
    /// Temperature (0: 0.8).
    pub temp: f32,
    /// Draw from the most likely tokens that together have this probability (0: 0.95).
    pub top_p: f32,
    /// Drop tokens below this share of the top token's probability (0: 0.05).
    pub min_p: f32,
    /// Make recent tokens less likely (0: 1, which is off).
    pub repeat_penalty: f32,
    /// Seed for the draws.
    pub seed: u64,
    /// The system message at the start of a chat (no effect when continuing one): UTF-8; NULL for the one that the
    /// adapter was trained with, if there is one.
    pub system: *const c_char,
    /// Bytes of `system`.
    pub system_length: usize,
}

/// Facts about what was generated.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct GenerateInfo {
    /// `sizeof(engraft_generate_info)`.
    pub struct_size: u32,
    /// `ENGRAFT_ENDED_*`.
    pub ended: u32,
    /// Tokens of the prompt, including the template and the examples.
    pub prompt_tokens: u64,
    /// Generated tokens.
    pub tokens: u64,
    /// Seconds to read the prompt.
    pub prompt_seconds: f64,
    /// Seconds to generate.
    pub seconds: f64,
    /// The slot's generation when the last token was computed; 0 without a slot.
    pub generation: u64,
}

structs!(
    SessionParams = "engraft_session_params",
    GenerateParams = "engraft_generate_params",
    GenerateInfo = "engraft_generate_info",
);

/// Receives the text as it is generated: UTF-8 in whole characters, not NUL-terminated. Returning false stops.
/// Called on the thread of the call that it was passed to.
pub type TokenCallback =
    Option<unsafe extern "C" fn(text: *const c_char, length: usize, user: *mut c_void) -> bool>;

impl SessionParams {
    /// Tokens of the context.
    ///
    /// # Errors
    /// `MISUSE` for more than the model was trained on.
    pub(crate) fn capacity(&self, c: &ModelConfig) -> Result<usize> {
        match self.ctx_size as usize {
            0 => Ok(c.context_len.min(CONTEXT as usize)),
            n if (2..=c.context_len).contains(&n) => Ok(n),
            n => {
                let message =
                    format!("ctx_size is {n}, but the model was trained on {} positions", c.context_len);
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
            other => Err(Failure::misuse(format!("cache_type is {other}; use one of ENGRAFT_CACHE_*"))),
        }
    }
}

impl GenerateParams {
    /// How the prompt is put, beside what is in use.
    ///
    /// # Errors
    /// `MISUSE`.
    fn prompting(&self, system: &str, judged: &Prompting) -> Result<Prompting> {
        let own = (!system.is_empty()).then(|| system.to_string());
        match (self.prompting, judged) {
            (ENGRAFT_PROMPT_AS_TRAINED | ENGRAFT_PROMPT_CHAT, Prompting::Chat(system)) => {
                Ok(Prompting::Chat(own.or_else(|| system.clone())))
            }
            (ENGRAFT_PROMPT_CHAT, _) => Ok(Prompting::Chat(own)),
            (ENGRAFT_PROMPT_AS_TRAINED, Prompting::Text(joint)) => Ok(Prompting::Text(joint.clone())),
            (ENGRAFT_PROMPT_AS_TRAINED | ENGRAFT_PROMPT_TEXT, _) => Ok(Prompting::Text(String::new())),
            (other, _) => Err(Failure::misuse(format!("prompting is {other}; use one of ENGRAFT_PROMPT_*"))),
        }
    }

    fn sampler(&self, usage: &Usage) -> Result<Sampler> {
        let share = |value: f32, default: f64, off: f64, name: &str| {
            number(f64::from(value), (default, Some(off)), 0.0..=1.0, name).map(|value| value as f32)
        };
        let positive = |value: f32, default: f64, name: &str| {
            number(f64::from(value), (default, None), 1e-6..=100.0, name).map(|value| value as f32)
        };
        let temp = positive(self.temp, 0.8, "temp")?;
        Ok(Sampler::new(SamplerOptions {
            temp: if self.greedy != 0 || (self.temp == 0.0 && usage.greedy) { 0.0 } else { temp },
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

/// Passes the text on to the caller.
struct Reader<'a> {
    control: &'a Control,
    callback: TokenCallback,
    user: *mut c_void,
}

impl Listener for Reader<'_> {
    fn goes_on(&mut self) -> bool {
        !self.control.is_cancelled()
    }

    fn hear(&mut self, text: &str) -> bool {
        match self.callback {
            Some(callback) if !text.is_empty() => {
                // SAFETY: the crate's contract, for callbacks: this lives only during the call that received
                // the callback.
                unsafe { callback(text.as_ptr().cast(), text.len(), self.user) }
            }
            _ => true,
        }
    }
}

impl State {
    /// The sequence with the current adapters.
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

    /// Refuses examples of the wrong kind: texts before a chat, or a chat before a text.
    fn check_examples(&self, chat: bool) -> Result<()> {
        let texts = self.few_shot.iter().all(|message| message.role == TEXT_ROLE);
        if self.few_shot.is_empty() || texts != chat {
            return Ok(());
        }
        let what = match texts {
            true => "texts; set prompting to ENGRAFT_PROMPT_TEXT",
            false => "a chat; set prompting to ENGRAFT_PROMPT_CHAT",
        };
        Err(Failure::misuse(format!("this session's examples are {what}")))
    }

    /// The token ids of everything before the answer. No text in the prompt becomes a control token.
    fn whole_ids(&self, text: &Text, chat: bool, prompt: &str) -> Result<Vec<u32>> {
        if chat {
            let before = self.talk.turns.iter().take_while(|turn| turn.role == "system").count();
            let (before, turns) = self.talk.turns.split_at(before);
            // The caller's instruction replaces the one that the examples were chosen with.
            let system = before.first().map(|turn| turn.content.as_str());
            return Ok(text.chat_prompt(&[opening(system, &self.few_shot), turns.to_vec()].concat())?);
        }
        let ids = match self.talk.ids.is_empty() {
            true => text.plain_prompt(&self.few_shot, prompt),
            false => [&self.talk.ids[..], &text.tokenizer.encode(prompt, Special::Plain)].concat(),
        };
        match ids.is_empty() {
            false => Ok(ids),
            true => {
                Err(Failure::misuse("the prompt is empty, and this model has no token that begins a text"))
            }
        }
    }

    /// How what is in use is meant to be used.
    fn usage(&self) -> Usage {
        match &self.slot {
            Some(slot) => slot.load().adapters.as_ref().map(|a| a.usage().clone()).unwrap_or_default(),
            None => self.usage.clone(),
        }
    }

    /// Puts a prompt so: as a chat's next turn, or as it is read.
    fn put(&mut self, prompt: &str, prompting: Prompting) -> String {
        match prompting {
            Prompting::Chat(system) => {
                let system = system.filter(|_| self.talk.turns.is_empty());
                self.talk.turns.extend(system.map(|system| Message::new("system", system)));
                self.talk.turns.push(Message::new("user", prompt));
                prompt.to_string()
            }
            Prompting::Text(joint) => format!("{prompt}{joint}"),
            Prompting::Unknown => prompt.to_string(),
        }
    }

    /// Reads the prompt and generates until something ends it. If it is stopped while reading the prompt, the
    /// prompt counts as not asked.
    fn generate(
        &mut self,
        (prompt, system): (&str, &str),
        p: &GenerateParams,
        reader: &mut Reader<'_>,
    ) -> Result<GenerateInfo> {
        let text = self.model.text()?;
        let usage = self.usage();
        let prompting = p.prompting(system, &usage.prompting)?;
        let chat = matches!(prompting, Prompting::Chat(_));
        let mut sampler = p.sampler(&usage)?;
        self.check_examples(chat)?;
        if p.keep == 0 {
            self.talk = Talk::default();
            // Earlier text may have been read with other adapters.
            if let Some(sequence) = &mut self.sequence {
                sequence.truncate(0);
            }
        }
        if if chat { !self.talk.ids.is_empty() } else { !self.talk.turns.is_empty() } {
            let message = "keep is 1, but a chat can't continue a text, or a text a chat; set keep to 0";
            return Err(Failure::misuse(message));
        }
        let turns = self.talk.turns.len();
        let prompt = self.put(prompt, prompting);
        let done = self.whole_ids(&text, chat, &prompt).and_then(|ids| {
            let tokenizer = &text.tokenizer;
            // A chat's answer starts a new text; a continuation keeps its leading blank.
            let decoder = if chat { tokenizer.decoder() } else { tokenizer.decoder_continuing() };
            let (sequence, by) = (self.sequence()?, (tokenizer, decoder));
            let told = go_on(sequence, &ids, &mut sampler, p.limit(), by, reader)?;
            Ok((told, ids))
        });
        let (told, ids) = match done {
            Ok(done) => done,
            Err(failure) => {
                // A prompt that couldn't be answered counts as not asked.
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
            // No token was drawn, so nothing was answered.
            (Ended::Stopped, _) if told.ids.is_empty() => self.talk.turns.truncate(turns),
            (_, true) => self.talk.turns.push(Message::new("assistant", told.text)),
            (_, false) => self.talk.ids = [ids, told.ids].concat(),
        }
        Ok(info)
    }
}

/// Sets all fields to their default. `struct_size` is `sizeof(engraft_session_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_session_default_params(
    params: *mut SessionParams,
    struct_size: usize,
) -> i32 {
    // SAFETY: the crate's contract, for the caller's struct.
    unsafe { caller::defaults("engraft_session_default_params", params, struct_size) }
}

/// Sets all fields to their default. `struct_size` is `sizeof(engraft_generate_params)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_generate_default_params(
    params: *mut GenerateParams,
    struct_size: usize,
) -> i32 {
    // SAFETY: the crate's contract, for the caller's struct.
    unsafe { caller::defaults("engraft_generate_default_params", params, struct_size) }
}

/// Makes a session on a model, with an adapter or, for NULL, with the base alone. `params` may be NULL.
/// `*session` is freed with `engraft_session_free`. `BASE_MISMATCH` for an adapter of another model. An adapter of
/// another model handle is accepted if the digests of both files are equal.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_session_create(
    model: *const Model,
    adapter: *const Adapter,
    params: *const SessionParams,
    session: *mut *mut Session,
) -> i32 {
    let make = |model: &Arc<model::Inner>| {
        // SAFETY: the crate's contract, for the caller's struct.
        let params: SessionParams = unsafe { caller::settings(params) }?;
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
            usage: adapter.map(|adapter| adapter.usage.clone()).unwrap_or_default(),
        };
        state.sequence()?;
        Ok(Value { control: Control::default(), state: Exclusive::new(state) })
    };
    // SAFETY: the crate's contract, for the caller's place.
    unsafe { caller::make("engraft_session_create", model, session, make) }
}

/// Frees a session and ends its threads. `BUSY` while a call runs on it. Does nothing for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_session_free(session: *mut Session) -> i32 {
    handle::free("engraft_session_free", session)
}

/// Uses an adapter, or with NULL the base alone, from the next token on, and no longer follows a slot. What the
/// session has already read stays as computed. `BASE_MISMATCH` for an adapter of another model.
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
        state.usage = adapter.map(|adapter| adapter.usage.clone()).unwrap_or_default();
        Ok(())
    })
}

/// Takes the adapter from a slot from now on, checking the slot before every token; see `engraft_slot_swap`.
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

/// Continues a prompt (UTF-8), or answers it as a chat, and passes the text to `callback` as it is generated.
/// `params`, `callback` and `info` may be NULL; set the `struct_size` of `info` first. Returns `CANCELLED` if the
/// callback returns false or `engraft_session_cancel` was called; `info` is filled then, too. If stopped before
/// the first token, the session continues as if nothing had been asked, but with `keep` 0 it has forgotten what
/// came before. `DOES_NOT_FIT` if the system hasn't enough memory for the cache.
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
        // A cancellation affects only the call that runs when it comes.
        session.control.resume();
        let mut reader = Reader { control: &session.control, callback, user };
        let found = state.generate((prompt, system), &params, &mut reader)?;
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

/// Stops the running call before its next token, if there is one. May be called from anywhere, at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_session_cancel(session: *const Session) -> i32 {
    handle::tell("engraft_session_cancel", session, |session| session.control.cancel())
}

/// Forgets everything that was read and generated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_session_reset(session: *const Session) -> i32 {
    handle::call("engraft_session_reset", session, |session| {
        // The next read empties the cache.
        session.state.enter()?.talk = Talk::default();
        Ok(())
    })
}

/// Frees the memory of the cache and the buffers and forgets what was read and generated; the next call
/// allocates them again. Call it when the system warns of low memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engraft_session_trim(session: *const Session) -> i32 {
    handle::call("engraft_session_trim", session, |session| {
        let mut state = session.state.enter()?;
        (state.sequence, state.talk) = (None, Talk::default());
        Ok(())
    })
}
