//! The tokenizer, built from a GGUF file's own metadata: GPT-2's byte-level BPE and the Llama
//! SentencePiece vocabulary.
//!
//! The merges live in flat tables: the tokenizers crate's BPE model keeps every token twice as a `String` in
//! hash maps, which takes several times as much private memory. That crate is used here to classify characters,
//! and in the tests as the reference.
//!
//! User text never becomes a control token: those are parsed only under [`Special::Parse`], which is for text a
//! template wrote.

mod bpe;
mod pretokenize;
mod spm;
mod vocab;
mod word;

use crate::error::{Error, ErrorKind, Result};
use crate::model::gguf::quote;
use bpe::{Bpe, ByteAlphabet};
use pretokenize::Pre;
use spm::Spm;
use vocab::{Kind, NONE, SPECIAL_BYTES_MAX, Specials, Vocab};

/// Tokens in a vocabulary, at most: four times the largest known.
const TOKENS_MAX: usize = 1 << 20;
/// Bytes of all tokens' text, at most.
const TEXT_BYTES_MAX: usize = 1 << 28;

/// End-of-generation tokens of known model families, by text.
const END_NAMES: [&str; 12] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|eot|>",
    "<|return|>",
    "<end_of_turn>",
    "<eos>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
];

/// A tokenizer's GGUF metadata (`tokenizer.ggml.*`), borrowed from the map.
#[derive(Clone, Debug, Default)]
pub struct TokenizerSpec<'a> {
    /// `model`: "gpt2" or "llama".
    pub model: &'a str,
    /// `pre`: which words BPE merges within; needed for "gpt2", ignored for "llama".
    pub pre: Option<&'a str>,
    /// `tokens`, in order of id.
    pub tokens: Vec<&'a str>,
    /// `scores`: one per token for "llama", empty otherwise.
    pub scores: Vec<f32>,
    /// `token_type`: one per token, or empty (all normal).
    pub token_types: Vec<i32>,
    /// `merges`: for "gpt2", in order of rank.
    pub merges: Vec<&'a str>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `unknown_token_id`.
    pub unk: Option<u32>,
    /// `padding_token_id`.
    pub pad: Option<u32>,
    /// `eot_token_id`.
    pub eot: Option<u32>,
    /// `add_bos_token`; by default true for "llama" and for Llama 3's pre-tokenizer.
    pub add_bos: Option<bool>,
    /// `add_eos_token`; by default false.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`; by default true for "llama", ignored for "gpt2".
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<&'a str>,
}

/// How to treat control tokens in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// Ordinary text: for whatever a user wrote.
    Plain,
    /// Control tokens: only for what a template wrote.
    Parse,
}

/// A segment of a text that is encoded as one; see [`Tokenizer::encode_segments`].
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// The text.
    pub text: &'a str,
    /// How to treat control tokens in it.
    pub special: Special,
    /// No token may begin before this segment and end within it.
    pub break_before: bool,
}

/// Token ids, and where each ends in the encoded text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spans {
    /// The ids.
    pub ids: Vec<u32>,
    /// Where each token's text ends, in bytes of the concatenated segments; it starts where the previous one
    /// ends. Never decreasing; equal only for tokens that stand for no text (a SentencePiece prefix).
    pub ends: Vec<usize>,
}

/// Collects tokens, turning ends within a run into absolute ends.
struct Sink {
    spans: Spans,
    /// Start of the current run in the whole text.
    base: usize,
    /// Bytes of prefix the run has but the text doesn't.
    prefix: usize,
    /// Places in the run where U+2581 was replaced by a blank, which is two bytes shorter.
    shifts: Vec<usize>,
}

impl Sink {
    fn push(&mut self, id: u32, end: usize) {
        let in_run = end.saturating_sub(self.prefix);
        let shift = 2 * self.shifts.partition_point(|&at| at < in_run);
        self.spans.ids.push(id);
        self.spans.ends.push(self.base + in_run + shift);
    }
}

enum Model {
    Bpe(Bpe),
    Spm(Spm),
}

/// A tokenizer. Encoding and decoding never fail and never panic.
pub struct Tokenizer {
    vocab: Vocab,
    model: Model,
    specials: Specials,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Sorted ids that end a generation.
    ends: Vec<u32>,
    add_bos: bool,
    add_eos: bool,
    add_space_prefix: bool,
}

impl Tokenizer {
    /// Builds the tokenizer.
    ///
    /// Errors: `Corrupt` for metadata that contradicts itself, `Unsupported` for an unknown model or
    /// pre-tokenizer, by name.
    pub fn new(spec: &TokenizerSpec<'_>) -> Result<Tokenizer> {
        check_counts(spec)?;
        let vocab = read_vocab(spec)?;
        let (model, spm) = match spec.model {
            "gpt2" => (Model::Bpe(Bpe::new(&vocab, pre_of(spec)?, &spec.merges)?), false),
            "llama" => (Model::Spm(Spm::new(&vocab, &spec.scores, byte_tokens(spec), spec.unk)), true),
            other => {
                let message =
                    format!("tokenizer.ggml.model {} is not supported (gpt2 and llama are)", quote(other));
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
        };
        let llama3 = spec.pre.and_then(Pre::from_name) == Some(Pre::Llama3) && !spm;
        // SentencePiece's conventional ids, if they are control tokens.
        let conventional = |id: u32| {
            Some(id).filter(|id| spm && vocab.kind(*id) == Kind::Control && (*id as usize) < vocab.len())
        };
        let eos = spec.eos.or_else(|| conventional(2));
        let mut ends: Vec<u32> = [eos, spec.eot].into_iter().flatten().collect();
        ends.extend(
            vocab.ids().filter(|id| vocab.kind(*id) == Kind::Control && is_end_name(vocab.bytes(*id))),
        );
        ends.sort_unstable();
        ends.dedup();
        ends.shrink_to_fit();
        Ok(Tokenizer {
            specials: Specials::new(&vocab),
            bos: spec.bos.or_else(|| conventional(1)),
            eos,
            ends,
            add_bos: spec.add_bos.unwrap_or(spm || llama3),
            add_eos: spec.add_eos.unwrap_or(false),
            add_space_prefix: spm && spec.add_space_prefix.unwrap_or(true),
            vocab,
            model,
        })
    }

    /// Encodes a text; no begin or end token is added.
    pub fn encode(&self, text: &str, special: Special) -> Vec<u32> {
        self.encode_segments(&[Segment { text, special, break_before: false }]).ids
    }

    /// Encodes segments as one text: tokens may span borders unless a break is requested, as when a model was
    /// trained on the whole rendered text. Control tokens never do.
    pub fn encode_segments(&self, segments: &[Segment<'_>]) -> Spans {
        let spans = Spans::default();
        let mut sink = Sink { spans, base: 0, prefix: 0, shifts: Vec::new() };
        let mut run = Stretch { text: String::new(), base: 0, after_special: true };
        let mut base = 0;
        for segment in segments {
            if segment.break_before {
                self.flush(&mut run, base, false, &mut sink);
            }
            let text = segment.text;
            let control = segment.special == Special::Parse;
            let mut at = 0;
            while let Some((start, id)) = self.specials.find(&self.vocab, text.as_bytes(), at, control) {
                run.text.push_str(&text[at..start]);
                self.flush(&mut run, base + start, true, &mut sink);
                at = start + self.vocab.bytes(id).len();
                sink.spans.ids.push(id);
                sink.spans.ends.push(base + at);
                run.base = base + at;
            }
            run.text.push_str(&text[at..]);
            base += text.len();
        }
        self.flush(&mut run, base, false, &mut sink);
        sink.spans
    }

    /// Encodes the text gathered so far, which ends at byte `end` of the whole.
    fn flush(&self, run: &mut Stretch, end: usize, special_follows: bool, sink: &mut Sink) {
        let starts_anew = run.after_special;
        if !run.text.is_empty() || special_follows {
            run.after_special = special_follows;
        }
        if !run.text.is_empty() {
            sink.base = run.base;
            match &self.model {
                Model::Bpe(bpe) => bpe.encode(&self.vocab, &run.text, sink),
                Model::Spm(spm) => {
                    let prefix = self.add_space_prefix && starts_anew;
                    let text = blanks_for_lower_blocks(&run.text, prefix, sink);
                    spm.encode(&self.vocab, &text, sink);
                }
            }
            run.text.clear();
        }
        run.base = end;
    }

    /// The bytes a token stands for; a control token's name; nothing for ids beyond the vocabulary. They may be
    /// part of a UTF-8 character: see [`Decoder`].
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.vocab.bytes(id)
    }

    /// Whether a token is control (or unknown): it stands for no text.
    pub fn is_control(&self, id: u32) -> bool {
        self.vocab.kind(id).is_control()
    }

    /// The control token with a name such as `<|im_start|>`.
    pub fn control_id(&self, name: &str) -> Option<u32> {
        self.vocab.ids().find(|id| self.is_control(*id) && self.vocab.bytes(*id) == name.as_bytes())
    }

    /// The text of tokens. Control tokens produce nothing, invalid UTF-8 becomes U+FFFD, and the blank
    /// SentencePiece puts before a text is removed.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut decoder = self.decoder();
        let mut text: String = ids.iter().map(|id| decoder.push(*id)).collect();
        text.push_str(&decoder.finish());
        text
    }

    /// A streaming decoder for the start of a text.
    pub fn decoder(&self) -> Decoder<'_> {
        Decoder { tokenizer: self, pending: Vec::new(), at_start: self.add_space_prefix }
    }

    /// A streaming decoder for text that continues other text: its first blank stays.
    pub fn decoder_continuing(&self) -> Decoder<'_> {
        Decoder { tokenizer: self, pending: Vec::new(), at_start: false }
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether a token ends a generation: end of text, end of turn and similar, by name.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.binary_search(&id).is_ok()
    }

    /// Whether a text begins with [`Self::bos`] (and there is one).
    pub fn add_bos(&self) -> bool {
        self.add_bos && self.bos.is_some()
    }

    /// Whether the file asks for [`Self::eos`] after a prompt.
    pub fn add_eos(&self) -> bool {
        self.add_eos && self.eos.is_some()
    }

    /// Tokens in the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.vocab.len()
    }

    /// Bytes of heap that the tokenizer holds, counted from its buffers.
    pub fn heap_bytes(&self) -> usize {
        let model = match &self.model {
            Model::Bpe(bpe) => bpe.heap_bytes(),
            Model::Spm(spm) => spm.heap_bytes(),
        };
        self.vocab.heap_bytes() + model + self.specials.heap_bytes() + self.ends.capacity() * 4
    }
}

/// An upper bound on [`Tokenizer::heap_bytes`] from counts in the metadata alone, for the memory plan.
/// Building briefly takes `4 * table_slots(tokens)` more, a few hundred KiB. Encoding takes up to the text's
/// size, plus a few MiB for pathological words.
pub fn estimated_heap_bytes(spec: &TokenizerSpec<'_>) -> usize {
    let n = spec.tokens.len();
    let text: usize = spec.tokens.iter().map(|t| t.len()).sum();
    let index = 4 * vocab::table_slots(n);
    // Unused tokens may count as control tokens by name.
    let special = |t: &&i32| (2..=5).contains(*t);
    let specials = 4 * (spec.token_types.iter().filter(special).count() + 64) * 2;
    let model = match spec.model {
        "llama" => index + 4 * n,
        _ if spec.pre.and_then(Pre::from_name) == Some(Pre::Llama3) => {
            index + bpe::merges_heap_bytes(spec.merges.len())
        }
        _ => bpe::merges_heap_bytes(spec.merges.len()),
    };
    text + 4 * (n + 1) + n + specials + model
}

/// Ordinary text gathered between control tokens and breaks.
struct Stretch {
    text: String,
    /// Its start in the whole text.
    base: usize,
    /// Whether it starts the text or follows a control token: SentencePiece then prepends a blank.
    after_special: bool,
}

/// The run as SentencePiece sees it: U+2581 is the blank, and a blank may be prepended.
fn blanks_for_lower_blocks(run: &str, prefix: bool, sink: &mut Sink) -> String {
    sink.prefix = usize::from(prefix);
    sink.shifts.clear();
    let mut text = String::with_capacity(run.len() + sink.prefix);
    if prefix {
        text.push(' ');
    }
    for c in run.chars() {
        if c == '\u{2581}' {
            sink.shifts.push(text.len() - sink.prefix);
            text.push(' ');
        } else {
            text.push(c);
        }
    }
    text
}

fn is_end_name(name: &[u8]) -> bool {
    END_NAMES.iter().any(|end| end.as_bytes() == name)
}

fn check_counts(spec: &TokenizerSpec<'_>) -> Result<()> {
    let corrupt = |message: String| Err(Error::new(ErrorKind::Corrupt, message));
    let n = spec.tokens.len();
    if n == 0 || n > TOKENS_MAX {
        return corrupt(format!("tokenizer.ggml.tokens holds {n} tokens; 1 to {TOKENS_MAX} are allowed"));
    }
    if !spec.token_types.is_empty() && spec.token_types.len() != n {
        return corrupt(format!(
            "tokenizer.ggml.token_type has {} entries for {n} tokens",
            spec.token_types.len()
        ));
    }
    if spec.model == "llama" && spec.scores.len() != n {
        return corrupt(format!("tokenizer.ggml.scores has {} entries for {n} tokens", spec.scores.len()));
    }
    if let Some(at) = spec.scores.iter().position(|s| !s.is_finite()) {
        return corrupt(format!("tokenizer.ggml.scores[{at}] is not finite"));
    }
    if spec.merges.len() > 4 * TOKENS_MAX {
        return corrupt(format!("tokenizer.ggml.merges holds {} merges", spec.merges.len()));
    }
    let text = spec.tokens.iter().try_fold(0usize, |sum, t| sum.checked_add(t.len()));
    if text.is_none_or(|bytes| bytes > TEXT_BYTES_MAX) {
        return corrupt("tokenizer.ggml.tokens holds more than 256 MiB of text".into());
    }
    let ids = [
        ("bos", spec.bos),
        ("eos", spec.eos),
        ("unknown", spec.unk),
        ("padding", spec.pad),
        ("eot", spec.eot),
    ];
    for (name, id) in ids {
        if let Some(id) = id.filter(|id| *id as usize >= n) {
            return corrupt(format!("tokenizer.ggml.{name}_token_id {id} is beyond the {n} tokens"));
        }
    }
    Ok(())
}

fn pre_of(spec: &TokenizerSpec<'_>) -> Result<Pre> {
    let name = spec.pre.unwrap_or("(none)");
    Pre::from_name(name).ok_or_else(|| {
        let known = "gpt-2, smollm, llama-bpe, qwen2";
        Error::new(
            ErrorKind::Unsupported,
            format!("tokenizer.ggml.pre {} is not supported ({known} are)", quote(name)),
        )
    })
}

/// Reads each token's kind and its text as bytes.
fn read_vocab(spec: &TokenizerSpec<'_>) -> Result<Vocab> {
    let text_bytes = spec.tokens.iter().map(|t| t.len()).sum();
    let mut vocab = Vocab::with_capacity(spec.tokens.len(), text_bytes);
    let alphabet = ByteAlphabet::new();
    let mut bytes = Vec::new();
    for (id, text) in spec.tokens.iter().enumerate() {
        let kind = kind_of(spec, id)?;
        match kind {
            Kind::Byte => bytes = byte_token(text).into_iter().collect(),
            Kind::Normal | Kind::Unused if spec.model == "gpt2" => alphabet.decode(text, &mut bytes),
            Kind::Control | Kind::Unknown => bytes = text.as_bytes().to_vec(),
            _ if spec.model == "llama" => bytes = text.replace('\u{2581}', " ").into_bytes(),
            _ => bytes = text.as_bytes().to_vec(),
        }
        let is_special = kind.is_control() || kind == Kind::UserDefined;
        if is_special && bytes.len() > SPECIAL_BYTES_MAX {
            let n = bytes.len();
            let message = format!(
                "tokenizer.ggml.tokens[{id}]: a control or user-defined token of {n} bytes; {SPECIAL_BYTES_MAX} are allowed"
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        vocab.push(&bytes, kind);
    }
    vocab.shrink();
    Ok(vocab)
}

/// A token's kind. Some converters mark turn and end tokens as user-defined or normal. Known names, and
/// anything like `<|…|>`, count as control; otherwise user text could forge them.
fn kind_of(spec: &TokenizerSpec<'_>, id: usize) -> Result<Kind> {
    let given = spec.token_types.get(id).copied().unwrap_or(1);
    let kind = Kind::from_gguf(given).ok_or_else(|| {
        Error::new(
            ErrorKind::Corrupt,
            format!("tokenizer.ggml.token_type[{id}] is {given}; 0 to 6 are defined"),
        )
    })?;
    let text = spec.tokens[id];
    let named = [spec.bos, spec.eos, spec.eot].contains(&Some(id as u32));
    let marked = text.len() > 4 && text.starts_with("<|") && text.ends_with("|>");
    let forgeable = matches!(kind, Kind::UserDefined | Kind::Normal | Kind::Unused);
    let turn = marked || is_end_name(text.as_bytes()) || matches!(text, "<start_of_turn>" | "<bos>");
    Ok(if forgeable && (named || (turn && kind != Kind::Normal)) { Kind::Control } else { kind })
}

/// The byte of `<0xHH>`.
fn byte_token(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(hex, 16).ok().filter(|_| hex.len() == 2)
}

/// The `<0xHH>` token of each byte, or NONE.
fn byte_tokens(spec: &TokenizerSpec<'_>) -> [u32; 256] {
    let mut ids = [NONE; 256];
    for (text, id) in spec.tokens.iter().zip(0u32..) {
        if let Some(b) = byte_token(text).filter(|_| spec.token_types.get(id as usize) == Some(&6)) {
            ids[usize::from(b)] = id;
        }
    }
    ids
}

/// Turns a stream of tokens into text, whole UTF-8 characters only.
pub struct Decoder<'t> {
    tokenizer: &'t Tokenizer,
    /// The start of an incomplete character: at most three bytes between calls.
    pending: Vec<u8>,
    at_start: bool,
}

impl Decoder<'_> {
    /// The text a token completes; empty for control tokens and partial characters.
    pub fn push(&mut self, id: u32) -> String {
        if self.tokenizer.is_control(id) {
            return String::new();
        }
        let mut bytes = self.tokenizer.token_bytes(id);
        if self.at_start && !bytes.is_empty() {
            self.at_start = false;
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        let mut held = std::mem::take(&mut self.pending);
        held.extend_from_slice(bytes);
        let mut text = String::new();
        let mut chunks = held.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let rest = chunk.invalid();
            let goes_on = std::str::from_utf8(rest).is_err_and(|e| e.error_len().is_none());
            if goes_on && chunks.peek().is_none() {
                self.pending = rest.to_vec();
            } else if !rest.is_empty() {
                text.push('\u{FFFD}');
            }
        }
        text
    }

    /// The rest at the end: U+FFFD for an incomplete character.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}
