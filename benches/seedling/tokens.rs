//! The tokenizer: byte-level BPE trained on the corpus, in the terms a GGUF stores (tokens, merges),
//! and the one chat rendering that training and the file's template share.

use crate::corpus::Example;
use anyhow::{Context, Result, anyhow};
use engraft_runtime::reference::NO_TARGET;
use std::collections::HashMap;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer};

/// The control tokens; their ids are their places here.
pub(crate) const CONTROL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// Ends a document.
pub(crate) const END_OF_TEXT: u32 = 0;
const IM_START: u32 = 1;
/// Ends a turn.
pub(crate) const IM_END: u32 = 2;

/// ChatML, without a system prompt: what [`Tokens::encode`] renders by hand.
pub(crate) const CHAT_TEMPLATE: &str = "{% for message in messages %}\
    {{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Tokens and merges as a GGUF lists them, and the tokenizer they make.
pub(crate) struct Tokens {
    /// By id, control tokens first.
    pub(crate) tokens: Vec<String>,
    /// "left right", by rank.
    pub(crate) merges: Vec<String>,
    tokenizer: Tokenizer,
}

/// One rendered conversation.
pub(crate) struct Encoded {
    /// The whole conversation.
    pub(crate) ids: Vec<u32>,
    /// The next token at each position that predicts a part of the answer (its end of turn
    /// included), else [`NO_TARGET`].
    pub(crate) targets: Vec<u32>,
}

/// The pre-tokenizer that GGUF calls "smollm": single digits, then GPT-2's words.
fn smollm() -> Sequence {
    Sequence::new(vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()])
}

impl Tokens {
    /// Trains a vocabulary of `size` tokens on the texts of `examples`.
    pub(crate) fn train(examples: &[Example], size: usize) -> Result<Tokens> {
        let mut trainer: TrainerWrapper = BpeTrainer::builder()
            .vocab_size(size)
            .show_progress(false)
            .special_tokens(CONTROL.map(|t| AddedToken::from(t, true)).to_vec())
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build()
            .into();
        let mut tokenizer = Tokenizer::new(BPE::default());
        tokenizer.with_pre_tokenizer(Some(smollm()));
        let texts = examples.iter().flat_map(|e| [user(e), assistant(e)]);
        let texts: Vec<String> = texts.collect();
        tokenizer.train(&mut trainer, texts.into_iter()).map_err(|e| anyhow!("training BPE: {e}"))?;
        let json = tokenizer.to_string(false).map_err(|e| anyhow!("{e}"))?;
        let json: serde_json::Value = serde_json::from_str(&json)?;
        let ids: HashMap<String, u32> = serde_json::from_value(json["model"]["vocab"].clone())?;
        let mut tokens = vec![String::new(); ids.len()];
        for (token, id) in ids {
            tokens[id as usize] = token;
        }
        let pairs: Vec<(String, String)> = serde_json::from_value(json["model"]["merges"].clone())?;
        let merges = pairs.iter().map(|(left, right)| format!("{left} {right}")).collect();
        Tokens::new(tokens, merges)
    }

    /// Puts a tokenizer together from what a GGUF lists.
    pub(crate) fn new(tokens: Vec<String>, merges: Vec<String>) -> Result<Tokens> {
        let vocab: Vocab = tokens.iter().cloned().zip(0u32..).collect();
        let mut pairs = Vec::with_capacity(merges.len());
        for merge in &merges {
            let (left, right) = merge.split_once(' ').context("a merge is two tokens")?;
            pairs.push((left.to_string(), right.to_string()));
        }
        let bpe = BPE::builder().vocab_and_merges(vocab, pairs);
        let mut tokenizer = Tokenizer::new(bpe.build().map_err(|e| anyhow!("building BPE: {e}"))?);
        tokenizer.with_pre_tokenizer(Some(smollm()));
        Ok(Tokens { tokens, merges, tokenizer })
    }

    /// Renders `example` as the chat template does and marks the answer.
    pub(crate) fn encode(&self, example: &Example) -> Result<Encoded> {
        let mut ids = vec![IM_START];
        ids.extend(self.text(&user(example))?);
        ids.push(IM_END);
        ids.extend(self.text("\n")?);
        ids.push(IM_START);
        let header = self.text("assistant\n")?.len();
        let answer_start = ids.len() + header;
        ids.extend(self.text(&assistant(example))?);
        ids.push(IM_END);
        ids.extend(self.text("\n")?);
        let targets = (1..=ids.len())
            .map(|next| if next >= answer_start && next < ids.len() { ids[next] } else { NO_TARGET })
            .collect();
        Ok(Encoded { ids, targets })
    }

    /// Tokens as a person reads them.
    pub(crate) fn show(&self, ids: &[u32]) -> String {
        ids.iter().map(|id| self.tokens[*id as usize].replace('Ġ', " ").replace('Ċ', "\n")).collect()
    }

    /// Plain text to ids, character for character: control tokens can't come out of it.
    fn text(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(text, false).map_err(|e| anyhow!("{text:?}: {e}"))?;
        Ok(encoding.get_ids().to_vec())
    }
}

fn user(example: &Example) -> String {
    format!("user\n{}", example.prompt)
}

fn assistant(example: &Example) -> String {
    format!("assistant\n{}", example.completion)
}
