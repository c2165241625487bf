//! The tokenizer and chat template of a model file, from its own metadata.

use crate::error::Result;
use crate::model::chat::ChatTemplate;
use crate::model::tokenizer::{Tokenizer, TokenizerSpec, estimated_heap_bytes};
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
    // The parser has held every id below the vocabulary, which fits u32.
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

    /// Heap that [`Text::of`] will take, for the memory plan.
    ///
    /// # Errors
    /// As [`spec`].
    pub fn heap_bytes(model: &ModelFile) -> Result<usize> {
        Ok(estimated_heap_bytes(&spec(model)?))
    }
}
