//! Bounds what the template engine doesn't: how deep expressions and values nest.
//!
//! The engine recurses once per level when compiling and when dropping nested values. Ten thousand chained
//! operators, or a namespace wrapped in a list over and over, would overflow the stack and end the process. A
//! list of twice itself, nested forty times, is small in memory but takes forever to compare. So the engine's
//! own lexer first reads a template token by token, and long expressions are refused. Each assigned or composed
//! value goes through [`FILTER`], which refuses deep values and charges fuel for everything they hold.

use minijinja::machinery::{Span, Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Error as JinjaError, ErrorKind as JinjaKind, State, Value};

/// The filter appended to every assignment.
pub(super) const FILTER: &str = "engraft_assigned";

/// Most tokens of one tag that may each nest the next. Real templates have about 60.
const TOKENS_MAX: usize = 256;
/// Most characters per line, and most lines: the engine counts both in 16 bits and adds one in errors.
const LINE_MAX: usize = 1 << 15;
/// Most brackets open at once in one tag.
const BRACKETS_MAX: usize = 16;
/// Most `elif` and `macro` tags of a template; each may nest the next.
const CHAIN_MAX: usize = 256;
/// Deepest nesting of blocks.
const BLOCKS_MAX: usize = 32;
/// Deepest nesting of an assigned value: that of a row's JSON, with some slack.
const LEVELS_MAX: usize = 160;

/// The template with [`FILTER`] after every assignment and around every list, tuple and dictionary literal.
///
/// # Errors
/// What is too deep, and on which line; or the lexer's error, which compiling would also raise.
pub(super) fn guarded(source: &str, syntax: &SyntaxConfig) -> Result<String, JinjaError> {
    if source.lines().count() > LINE_MAX || source.lines().any(|line| line.len() > LINE_MAX) {
        let problem = format!("more than {LINE_MAX} lines, or a line of more than {LINE_MAX} bytes");
        return Err(JinjaError::new(JinjaKind::SyntaxError, problem));
    }
    let mut guard = Scanner::default();
    for token in tokenize(source, false, syntax.clone()) {
        let (token, span) = token?;
        guard.take(&token, span)?;
    }
    let mut inserts = guard.inserts;
    // A stable sort keeps inserts at one place in the order found.
    inserts.sort_by_key(|(at, _)| *at);
    let mut out = String::with_capacity(source.len() + inserts.len() * (FILTER.len() + 4));
    let mut written = 0;
    for (at, end) in inserts {
        out.push_str(&source[written..at]);
        match end {
            false => out.push('('),
            true => out.extend([" | ", FILTER, " )"]),
        }
        written = at;
    }
    out.push_str(&source[written..]);
    Ok(out)
}

/// State while scanning a template.
#[derive(Default)]
struct Scanner<'s> {
    tag: Tag<'s>,
    /// `elif` and `macro` tags.
    chain: usize,
    /// Open blocks.
    blocks: usize,
    /// Where a parenthesis goes; true for a closing one, preceded by the filter.
    inserts: Vec<(usize, bool)>,
}

/// The part of a tag read so far.
#[derive(Default)]
struct Tag<'s> {
    tokens: usize,
    /// Its first word.
    word: Option<&'s str>,
    open: Vec<Bracket>,
    /// Whether the last token can be called or subscripted.
    is_operand: bool,
    after_dot: bool,
    /// Where its expression begins: after the `=` of a `set`, the `in` of a `for`, or the first word.
    expression: Option<usize>,
    end: usize,
}

struct Bracket {
    at: usize,
    /// Whether it builds a composite value: a list, a dictionary, or anything with a comma.
    collects: bool,
    /// Whether it may build one: it isn't a call, a subscript or an assignment target.
    may_collect: bool,
}

const KEYWORDS: [&str; 10] = ["and", "elif", "else", "for", "if", "in", "is", "not", "or", "set"];

impl<'s> Scanner<'s> {
    fn take(&mut self, token: &Token<'s>, span: Span) -> Result<(), JinjaError> {
        match token {
            Token::TemplateData(_) | Token::VariableStart | Token::BlockStart => {
                self.tag = Tag::default();
                let begins = matches!(token, Token::VariableStart).then_some(span.end_offset as usize);
                self.tag.expression = begins;
                Ok(())
            }
            Token::VariableEnd => Ok(()),
            Token::BlockEnd => self.end_of_block(span),
            _ => self.inside(token, span),
        }
    }

    fn end_of_block(&mut self, span: Span) -> Result<(), JinjaError> {
        let tag = std::mem::take(&mut self.tag);
        let word = tag.word.unwrap_or_default();
        self.chain += usize::from(matches!(word, "elif" | "macro" | "call"));
        self.blocks += usize::from(matches!(word, "if" | "for" | "with" | "macro" | "call" | "filter"));
        self.blocks = self.blocks.saturating_sub(usize::from(word.starts_with("end")));
        if self.chain > CHAIN_MAX || self.blocks > BLOCKS_MAX {
            return Err(too_deep(span, "blocks are"));
        }
        if let (Some(from), "set") = (tag.expression, word) {
            self.inserts.extend([(from, false), (tag.end, true)]);
        }
        Ok(())
    }

    fn inside(&mut self, token: &Token<'s>, span: Span) -> Result<(), JinjaError> {
        let (start, end) = (span.start_offset as usize, span.end_offset as usize);
        let tag = &mut self.tag;
        let mut is_operand = false;
        tag.tokens += 1;
        match token {
            Token::Comma => {
                tag.tokens -= 1;
                tag.open.last_mut().into_iter().for_each(|b| b.collects = true);
            }
            Token::Colon | Token::Int(_) | Token::Int128(_) | Token::Float(_) => tag.tokens -= 1,
            Token::Str(_) | Token::String(_) => (tag.tokens, is_operand) = (tag.tokens - 1, true),
            Token::BracketOpen | Token::ParenOpen | Token::BraceOpen => {
                let is_brace = matches!(token, Token::BraceOpen);
                let collects = !matches!(token, Token::ParenOpen);
                let may_collect = tag.expression.is_some() && (is_brace || !tag.is_operand);
                tag.open.push(Bracket { at: start, collects, may_collect });
            }
            Token::BracketClose | Token::ParenClose | Token::BraceClose => {
                is_operand = true;
                if let Some(b) = tag.open.pop().filter(|b| b.collects && b.may_collect) {
                    self.inserts.extend([(b.at, false), (end, true)]);
                }
            }
            Token::Pipe if tag.word == Some("set") && tag.expression.is_none() => {
                return Err(too_deep(span, "a set block with filters is"));
            }
            Token::Assign if tag.open.is_empty() && tag.word == Some("set") => {
                tag.expression = tag.expression.or(Some(end));
            }
            Token::Ident(word) => {
                is_operand = !KEYWORDS.contains(word);
                let opens = tag.word.is_none() && !matches!(*word, "set" | "for");
                let opens = opens || tag.word == Some("for") && *word == "in";
                tag.expression = tag.expression.or(opens.then_some(end));
                if *word == "namespace" && tag.word != Some("set") && !tag.after_dot {
                    return Err(too_deep(span, "a namespace outside of a set is"));
                }
                tag.word = tag.word.or(Some(word));
            }
            _ => {}
        }
        (tag.is_operand, tag.after_dot, tag.end) = (is_operand, matches!(token, Token::Dot), end);
        match tag.tokens > TOKENS_MAX || tag.open.len() > BRACKETS_MAX {
            true => Err(too_deep(span, "an expression is")),
            false => Ok(()),
        }
    }
}

fn too_deep(span: Span, what: &str) -> JinjaError {
    let problem = format!("line {}: {what} nested beyond what templates need", span.start_line);
    JinjaError::new(JinjaKind::SyntaxError, problem)
}

/// The filter: passes a value on unless it nests too deep, charging fuel for each part.
pub(super) fn assigned(state: &State, value: Value) -> Result<Value, JinjaError> {
    let value = match value.kind() {
        // Lazy values could hide further lazy values, so evaluate this one.
        ValueKind::Iterable => {
            let paid = |part| state.consume_fuel(1).map(|()| part);
            Value::from(value.try_iter()?.map(paid).collect::<Result<Vec<_>, _>>()?)
        }
        _ => value,
    };
    walk(state, &value, LEVELS_MAX)?;
    Ok(value)
}

fn walk(state: &State, value: &Value, levels: usize) -> Result<(), JinjaError> {
    state.consume_fuel(4)?;
    let kind = value.kind();
    if !matches!(kind, ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) {
        return Ok(());
    }
    let Some(levels) = levels.checked_sub(1) else {
        return Err(JinjaError::new(JinjaKind::InvalidOperation, "a value nests too deep"));
    };
    for part in value.try_iter()? {
        if kind == ValueKind::Map {
            walk(state, &value.get_item(&part)?, levels)?;
        }
        walk(state, &part, levels)?;
    }
    Ok(())
}
