//! A model file's tokenizer and chat template, from its metadata.

use crate::error::Result;
use crate::model::chat::{ChatTemplate, Message, encode_pieces};
use crate::model::tokenizer::{Special, Tokenizer, TokenizerSpec, estimated_heap_bytes};
use crate::model::weights::ModelFile;

/// What `tokenizer.ggml.*` and `tokenizer.chat_template` say, borrowed from the file.
///
/// # Errors
/// Those of the typed getters: a key of the wrong type, text that is not UTF-8.
pub fn spec(model: &ModelFile) -> Result<TokenizerSpec<'_>> {
    let (gguf, bytes) = (model.gguf(), model.bytes());
    let strings = |key: &str| -> Result<Vec<&str>> {
        match gguf.strings(key, bytes)? {
            Some(all) => all.collect(),
            None => Ok(Vec::new()),
        }
    };
    // The parser ensured that every id is below the vocabulary size, which fits u32.
    let id = |key: &str| -> Result<Option<u32>> { Ok(gguf.uint(key)?.map(|v| v as u32)) };
    Ok(TokenizerSpec {
        model: gguf.required("tokenizer.ggml.model", gguf.string("tokenizer.ggml.model")?)?,
        pre: gguf.string("tokenizer.ggml.pre")?,
        tokens: strings("tokenizer.ggml.tokens")?,
        scores: gguf.floats("tokenizer.ggml.scores", bytes)?.map_or_else(Vec::new, Iterator::collect),
        token_types: gguf
            .ints("tokenizer.ggml.token_type", bytes)?
            .map_or_else(Vec::new, |all| all.map(|v| v as i32).collect()),
        merges: strings("tokenizer.ggml.merges")?,
        bos: id("tokenizer.ggml.bos_token_id")?,
        eos: id("tokenizer.ggml.eos_token_id")?,
        unk: id("tokenizer.ggml.unknown_token_id")?,
        pad: id("tokenizer.ggml.padding_token_id")?,
        eot: id("tokenizer.ggml.eot_token_id")?,
        add_bos: gguf.boolean("tokenizer.ggml.add_bos_token")?,
        add_eos: gguf.boolean("tokenizer.ggml.add_eos_token")?,
        add_space_prefix: gguf.boolean("tokenizer.ggml.add_space_prefix")?,
        chat_template: gguf.string("tokenizer.chat_template")?,
    })
}

/// The opening of a conversation: examples, whose system message the user's own replaces.
pub fn opening(system: Option<&str>, examples: &[Message]) -> Vec<Message> {
    let stands = |m: &&Message| system.is_none() || m.role != "system";
    let examples = examples.iter().filter(stands).cloned();
    system.map(|content| Message::new("system", content)).into_iter().chain(examples).collect()
}

/// Tokenizer and chat template of a model.
pub struct Text {
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// Messages to text.
    pub chat: ChatTemplate,
}

impl Text {
    /// Builds both from the model's metadata.
    ///
    /// # Errors
    /// `Unsupported` for a tokenizer this version does not know, `Corrupt` for contradictions; each
    /// names the file.
    pub fn of(model: &ModelFile) -> Result<Text> {
        let spec = spec(model)?;
        let tokenizer = Tokenizer::new(&spec).map_err(|e| e.at(model.label()))?;
        let chat = ChatTemplate::new(spec.chat_template, &tokenizer).map_err(|e| e.at(model.label()))?;
        model.check_whole()?;
        Ok(Text { tokenizer, chat })
    }

    /// The ids of a conversation, up to the assistant's answer. No content becomes a control token.
    ///
    /// # Errors
    /// Those of the template.
    pub fn chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let pieces = self.chat.render_messages(messages, true)?;
        Ok(encode_pieces(&self.tokenizer, &pieces, messages).0)
    }

    /// The ids of a text to continue, after examples, each a paragraph. No part becomes a control token.
    pub fn plain_prompt(&self, examples: &[Message], text: &str) -> Vec<u32> {
        let bos = self.tokenizer.bos().filter(|_| self.tokenizer.add_bos());
        let before: String = examples.iter().map(|m| m.content.trim().to_string() + "\n\n").collect();
        let before = self.tokenizer.encode(&before, Special::Plain);
        bos.into_iter().chain(before).chain(self.tokenizer.encode(text, Special::Plain)).collect()
    }

    /// Heap bytes [`Text::of`] will use, for the memory plan.
    ///
    /// # Errors
    /// As [`spec`].
    pub fn heap_bytes(model: &ModelFile) -> Result<usize> {
        Ok(estimated_heap_bytes(&spec(model)?))
    }
}
