//! Few-shot examples: which ones, and how a row looks after them.

use std::collections::HashMap;

use super::material::Rows;
use super::score::Subject;
use crate::data::masks::{TEXT_ROLE, encode_after, is_conversation};
use crate::data::{DataOptions, Example, Sample};
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::model::chat::Message;
use crate::model::text::Text;
use crate::model::tokenizer::Special;
use crate::rng::Rng;
use crate::run::{Base, Observer};

/// Random stream of seeded choices.
const SHOTS_STREAM: u64 = 0x5348_4F54;
/// Most training rows searched for neighbours.
const POOL_MAX: usize = 2000;

/// How examples are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The same for all questions, by seed.
    Seeded(u64),
    /// For each question, the examples with the nearest prompts by cosine of the base's mean hidden states (Liu
    /// et al., arXiv 2101.06804); the nearest comes last.
    Nearest,
}

/// The training rows that can serve as examples; at least `k` are required.
///
/// # Errors
/// `BadData` for fewer.
pub fn pool(k: usize, train: &Rows, options: &DataOptions) -> Result<Vec<usize>> {
    let whole: Vec<usize> = (0..train.samples.len()).filter(|i| is_whole(train, *i, options)).collect();
    if whole.len() >= k {
        return Ok(whole);
    }
    let message = format!(
        "the prompt needs {k} examples, but only {} training rows fit the longest row allowed without being cut",
        whole.len()
    );
    Err(Error::new(ErrorKind::BadData, message).advise(Advice::FewerExamplesOrMoreRows))
}

/// The held-out rows, each after `k` examples. Also the examples themselves if all rows have the same, preceded
/// by the instruction all of them share, if any.
///
/// # Errors
/// `BadData` for fewer training rows than examples; `Misuse` if rows and examples exceed `context`.
pub fn rows_after(
    (k, choice): (usize, Choice),
    (train, held_out): (&Rows, &Rows),
    (text, options): (&Text, &DataOptions),
    base: &Subject,
    context: usize,
) -> Result<(Vec<Example>, Vec<Message>)> {
    let whole = pool(k, train, options)?;
    let (chosen, common): (Vec<Vec<usize>>, _) = match choice {
        Choice::Seeded(seed) => {
            let mut order = whole;
            Rng::new(seed, SHOTS_STREAM).shuffle(&mut order);
            order.truncate(k);
            let as_chat = held_out.samples.first().is_some_and(|s| is_conversation(s, &text.chat, options));
            let examples = order.iter().flat_map(|i| turns(&train.samples[*i], as_chat));
            let common = opening(held_out).into_iter().chain(examples).collect();
            (vec![order; held_out.samples.len()], common)
        }
        Choice::Nearest => (nearest(k, &whole, train, held_out, text, base)?, Vec::new()),
    };
    let before = |i: usize| {
        let as_chat = is_conversation(&held_out.samples[i], &text.chat, options);
        chosen[i].iter().flat_map(|at| turns(&train.samples[*at], as_chat)).collect()
    };
    Ok((rows_behind(held_out, (text, options), context, before)?, common))
}

/// The same prompts with as many examples as fit into the model's context behind every held-out row; one for which not
/// even a single example fits is left out. Says what it changes. Neighbours are left as they are, since each row has its
/// own.
///
/// # Errors
/// Those of [`rows_after`], except that too many examples for the context become fewer.
pub fn fitting(
    prompts: Vec<(usize, Choice)>,
    base: &Base,
    parts: (&Rows, &Rows),
    how: (&Text, &DataOptions),
    observer: &mut dyn Observer,
) -> Result<Vec<(usize, Choice)>> {
    let subject = Subject::of(base);
    let context = subject.context();
    let mut fit = Vec::with_capacity(prompts.len());
    for (asked, choice) in prompts {
        let mut k = asked;
        while k > 0 && choice != Choice::Nearest {
            match rows_after((k, choice), parts, how, &subject, context) {
                Ok(_) => break,
                Err(error) if error.kind() == ErrorKind::Misuse => k -= 1,
                Err(error) => return Err(error),
            }
        }
        let why = format!("the model's context of {context} tokens doesn't hold {asked} examples and a row");
        match k {
            0 => observer.note(&format!("{why}, nor one: examples in the prompt are left out")),
            k if k < asked => observer.note(&format!("{why}: {k} are used")),
            _ => {}
        }
        fit.extend((k > 0).then_some((k, choice)));
    }
    Ok(fit)
}

/// The held-out rows, each behind the same messages. A row with an instruction of its own keeps that one.
///
/// # Errors
/// As [`rows_after`].
pub fn rows_behind_all(
    held_out: &Rows,
    messages: &[Message],
    how: (&Text, &DataOptions),
    context: usize,
) -> Result<Vec<Example>> {
    let is_instruction = |m: &Message| m.role == "system";
    let before = |i: usize| {
        let has_own = matches!(&held_out.samples[i],
            Sample::Chat { messages, .. } if messages.first().is_some_and(is_instruction));
        messages.iter().filter(|m| !(has_own && is_instruction(m))).cloned().collect()
    };
    rows_behind(held_out, how, context, before)
}

/// The held-out rows, each behind the messages of examples that `before` gives for it.
///
/// # Errors
/// `BadData` for a row that can't be encoded so; `Misuse` if one exceeds `context`.
fn rows_behind(
    held_out: &Rows,
    (text, options): (&Text, &DataOptions),
    context: usize,
    before: impl Fn(usize) -> Vec<Message>,
) -> Result<Vec<Example>> {
    let mut rows = Vec::with_capacity(held_out.samples.len());
    for (i, own) in held_out.data.examples.iter().enumerate() {
        let row = behind(own, &held_out.samples[i], before(i), text, options)
            .map_err(|reason| Error::new(ErrorKind::BadData, format!("{}: {reason}", held_out.name(i))))?;
        if row.rows() > context {
            let message = format!(
                "the examples and {} are {} tokens together; the model was trained for {context}",
                held_out.name(i),
                row.rows()
            );
            let error = Error::new(ErrorKind::Misuse, message);
            return Err(error.advise(Advice::FewerExamplesOrShorterRows));
        }
        rows.push(row);
    }
    Ok(rows)
}

/// The instruction every row starts with.
fn opening(rows: &Rows) -> Option<Message> {
    let of = |sample: &Sample| match sample {
        Sample::Chat { messages, .. } => messages.first().filter(|m| m.role == "system").cloned(),
        _ => None,
    };
    let first = rows.samples.first().and_then(of)?;
    rows.samples.iter().all(|sample| of(sample).as_ref() == Some(&first)).then_some(first)
}

/// Whether a row wasn't truncated: half an answer is a bad example.
fn is_whole(rows: &Rows, i: usize, options: &DataOptions) -> bool {
    rows.data.examples[i].ids.len() <= options.max_seq_length
}

/// The messages of an example: its turns without the opening, or one running text.
pub fn turns(sample: &Sample, as_chat: bool) -> Vec<Message> {
    let text = |content: String| vec![Message::new(TEXT_ROLE, content)];
    match sample {
        Sample::Text(content) => text(content.clone()),
        Sample::Pair { prompt, completion, .. } if as_chat => {
            vec![Message::new("user", prompt.as_str()), Message::new("assistant", completion.as_str())]
        }
        Sample::Pair { prompt, completion, joint } => text(format!("{prompt}{joint}{completion}")),
        Sample::Chat { messages, .. } => messages.iter().filter(|m| m.role != "system").cloned().collect(),
    }
}

/// A row after examples, truncated where the row alone was, so the targets stay the same.
fn behind(
    own: &Example,
    sample: &Sample,
    few_shot: Vec<Message>,
    text: &Text,
    options: &DataOptions,
) -> std::result::Result<Example, String> {
    let after = DataOptions { few_shot, ..options.clone() };
    let mut example = encode_after(sample, &text.tokenizer, &text.chat, &after)?;
    let mut targets = own.trained_tokens();
    let last = example.mask.iter().position(|m| {
        targets -= usize::from(*m);
        targets == 0
    });
    let length = last.map_or(0, |at| at + 1);
    example.ids.truncate(length);
    example.mask.truncate(length);
    Ok(example)
}

/// For each held-out row, the `k` rows of `pool` with the most similar prompts.
fn nearest(
    k: usize,
    pool: &[usize],
    train: &Rows,
    held_out: &Rows,
    text: &Text,
    base: &Subject,
) -> Result<Vec<Vec<usize>>> {
    let pool = &pool[..pool.len().min(POOL_MAX)];
    let question = |sample: &Sample| match sample {
        // For a text, only its beginning is known before it is written.
        Sample::Text(text) => text.chars().take(200).collect(),
        other => {
            turns(other, true).into_iter().find(|m| m.role == "user").map_or(String::new(), |m| m.content)
        }
    };
    let mut embedder = base.embedder(base.context())?;
    let mut seen: HashMap<String, Vec<f32>> = HashMap::new();
    let mut embed = |sample: &Sample| -> Result<Vec<f32>> {
        let asked = question(sample);
        if let Some(known) = seen.get(&asked) {
            return Ok(known.clone());
        }
        let mut ids = text.tokenizer.encode(&asked, Special::Plain);
        ids.truncate(base.context());
        let embedding = embedder.embed(&ids)?;
        seen.insert(asked, embedding.clone());
        Ok(embedding)
    };
    let known: Vec<Vec<f32>> = pool.iter().map(|i| embed(&train.samples[*i])).collect::<Result<_>>()?;
    let of = |sample: &Sample| -> Result<Vec<usize>> {
        let own = embed(sample)?;
        let mut order: Vec<usize> = (0..pool.len()).collect();
        let likeness: Vec<f32> = known.iter().map(|e| e.iter().zip(&own).map(|(a, b)| a * b).sum()).collect();
        order.sort_by(|a, b| likeness[*b].total_cmp(&likeness[*a]).then(a.cmp(b)));
        order.truncate(k);
        Ok(order.into_iter().rev().map(|at| pool[at]).collect())
    };
    held_out.samples.iter().map(of).collect()
}
