//! Turns a row into ids and a mask of its targets.

use super::Example;
use super::formats::{DataOptions, Sample};
use crate::model::chat::{Author, ChatTemplate, Message, Piece, TemplateKind, encode_pieces, is_assistant};
use crate::model::tokenizer::{Segment, Special, Tokenizer};
use crate::model::usage::Prompting;

/// Encodes a row, whole. Targets are
/// - of running text: every token, and the end of text that is put after it;
/// - of a pair joined plainly: the completion and the end of text put after it;
/// - of a conversation (and of a pair, where the model has a chat template): every token that holds a
///   byte of an assistant's content, and the end-of-turn token that follows it;
///
/// without `mask_prompt`: every token. The first token never is one: nothing predicts it.
///
/// The options' few-shot messages are left out: see [`encode_after`].
///
/// The error says why the row can't be used, without quoting it.
pub fn encode_sample(
    sample: &Sample,
    tokenizer: &Tokenizer,
    chat: &ChatTemplate,
    options: &DataOptions,
) -> Result<Example, String> {
    encode(sample, &[], tokenizer, chat, options)
}

/// The role of few-shot examples that are running texts, for rows that aren't conversations.
pub const TEXT_ROLE: &str = "text";

/// Whether a row is encoded as a conversation rather than joined plainly.
pub fn is_conversation(sample: &Sample, chat: &ChatTemplate, options: &DataOptions) -> bool {
    match sample {
        Sample::Text(_) => false,
        Sample::Pair { .. } => !options.raw && chat.kind() == TemplateKind::Model,
        Sample::Chat { .. } => true,
    }
}

/// How a row puts its question.
pub fn prompting(sample: &Sample, chat: &ChatTemplate, options: &DataOptions) -> Prompting {
    match sample {
        Sample::Chat { messages, .. } => Prompting::chat(messages),
        _ if is_conversation(sample, chat, options) => Prompting::Chat(None),
        Sample::Pair { joint, .. } => Prompting::Text((*joint).to_string()),
        Sample::Text(_) => Prompting::Text(String::new()),
    }
}

/// How a question is put behind few-shot examples: as they put theirs.
pub fn prompting_behind(examples: &[Message]) -> Prompting {
    match examples.iter().all(|m| m.role == TEXT_ROLE) {
        true => Prompting::Text(String::new()),
        false => Prompting::Chat(None),
    }
}

/// The same with the options' few-shot messages before the conversation, after its system message. A row that
/// isn't a conversation follows the texts of [`TEXT_ROLE`] messages, each ended by a blank line. The row's own
/// tokens and targets don't change.
///
/// The error says why the row can't be used: examples of the other kind can't precede it.
pub fn encode_after(
    sample: &Sample,
    tokenizer: &Tokenizer,
    chat: &ChatTemplate,
    options: &DataOptions,
) -> Result<Example, String> {
    if !options.mask_prompt {
        return Err("few-shot examples are never scored; score the answers only".into());
    }
    let are_texts = options.few_shot.iter().all(|m| m.role == TEXT_ROLE);
    match (is_conversation(sample, chat, options), are_texts) {
        (true, false) => {}
        (false, true) => {
            let own = encode(sample, &[], tokenizer, chat, options)?;
            return Ok(after_texts(&own, &options.few_shot, tokenizer));
        }
        (true, true) => return Err("the few-shot examples are texts, but this row is a conversation".into()),
        (false, false) => {
            return Err("the few-shot examples are conversations, but this row is not".into());
        }
    }
    encode(sample, &options.few_shot, tokenizer, chat, options)
}

/// A row after texts that aren't targets.
fn after_texts(own: &Example, texts: &[Message], tokenizer: &Tokenizer) -> Example {
    let begins = tokenizer.add_bos() && own.ids.first().copied() == tokenizer.bos();
    let (begin, rest) = own.ids.split_at(usize::from(begins));
    let prefix: String = texts.iter().map(|m| m.content.trim().to_string() + "\n\n").collect();
    let mut ids = begin.to_vec();
    ids.extend(tokenizer.encode(&prefix, Special::Plain));
    let mut mask = vec![false; ids.len()];
    ids.extend_from_slice(rest);
    mask.extend_from_slice(&own.mask[begin.len()..]);
    Example { ids, mask }
}

fn encode(
    sample: &Sample,
    few_shot: &[Message],
    tokenizer: &Tokenizer,
    chat: &ChatTemplate,
    options: &DataOptions,
) -> Result<Example, String> {
    let mut example = match sample {
        Sample::Text(text) => plain(tokenizer, "", text),
        Sample::Pair { prompt, completion, .. } if !options.raw && chat.kind() == TemplateKind::Model => {
            let messages =
                [Message::new("user", prompt.as_str()), Message::new("assistant", completion.as_str())];
            conversation(tokenizer, chat, few_shot, &messages, None)?
        }
        Sample::Pair { prompt, completion, joint } => {
            plain(tokenizer, &format!("{prompt}{joint}"), completion)
        }
        Sample::Chat { messages, tools } => {
            conversation(tokenizer, chat, few_shot, messages, tools.as_ref())?
        }
    };
    if !options.mask_prompt {
        example.mask.fill(true);
    }
    if let Some(first) = example.mask.first_mut() {
        *first = false;
    }
    Ok(example)
}

/// `[begin] prompt completion [end]`, with the completion tokenized separately from the prompt, as when a model
/// completes it.
fn plain(tokenizer: &Tokenizer, prompt: &str, completion: &str) -> Example {
    let segment = |text, break_before| Segment { text, special: Special::Plain, break_before };
    let spans = tokenizer.encode_segments(&[segment(prompt, false), segment(completion, true)]);
    let mut example = Example::default();
    if let Some(bos) = tokenizer.bos().filter(|_| tokenizer.add_bos()) {
        push(&mut example, bos, false);
    }
    for (id, end) in spans.ids.iter().zip(&spans.ends) {
        push(&mut example, *id, *end > prompt.len());
    }
    if let Some(eos) = tokenizer.eos() {
        push(&mut example, eos, true);
    }
    example
}

fn conversation(
    tokenizer: &Tokenizer,
    chat: &ChatTemplate,
    few_shot: &[Message],
    own: &[Message],
    tools: Option<&serde_json::Value>,
) -> Result<Example, String> {
    let opening = own.iter().take_while(|m| m.role == "system").count();
    let mut messages = [&own[..opening], few_shot, &own[opening..]].concat();
    let pieces = chat.render_with_tools(&messages, tools, false).map_err(|e| e.message().to_owned())?;
    let (ids, sources) = encode_pieces(tokenizer, &pieces, &messages);
    // From here on only roles matter, and an example isn't an answer.
    messages[opening..opening + few_shot.len()].iter_mut().for_each(|m| m.role.clear());
    let mask = answer_mask(tokenizer, &ids, &sources, &messages);
    let mut example = Example { ids, mask };
    end_last_turn(&mut example, tokenizer, &pieces, &messages);
    Ok(example)
}

/// Marks the assistant's contents and, after each, the tokens up to its end of turn if only blanks lie between
/// (a turn the template doesn't end has none).
fn answer_mask(tokenizer: &Tokenizer, ids: &[u32], sources: &[Author], messages: &[Message]) -> Vec<bool> {
    let mut mask: Vec<bool> = sources.iter().map(|s| is_assistant(*s, messages)).collect();
    let answers_end =
        |i: usize| is_assistant(sources[i], messages) && sources.get(i + 1) == Some(&Author::Template);
    for last in (0..ids.len()).filter(|i| answers_end(*i)) {
        let blank =
            |id: &&u32| !tokenizer.is_control(**id) && tokenizer.token_bytes(**id).trim_ascii().is_empty();
        let blanks = ids[last + 1..].iter().take_while(blank).count();
        let end = last + 1 + blanks;
        if ids.get(end).is_some_and(|id| tokenizer.is_end(*id)) {
            mask[last + 1..=end].fill(true);
        }
    }
    mask
}

/// If the template leaves the last answer open, appends the end of text: without a trained end the model would
/// never stop.
fn end_last_turn(example: &mut Example, tokenizer: &Tokenizer, pieces: &[Piece], messages: &[Message]) {
    let open = match pieces.iter().rposition(|p| is_assistant(p.source, messages)) {
        Some(last) => pieces[last + 1..].iter().all(|p| p.text.trim().is_empty()),
        None => false,
    };
    if let Some(eos) = tokenizer.eos().filter(|_| open) {
        let answer = example.mask.iter().rposition(|m| *m).map_or(0, |i| i + 1);
        example.ids.truncate(answer);
        example.mask.truncate(answer);
        push(example, eos, true);
    }
}

fn push(example: &mut Example, id: u32, target: bool) {
    example.ids.push(id);
    example.mask.push(target);
}
