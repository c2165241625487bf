//! The template engine, set up as Hugging Face's templates expect, and the marks that trace contents through
//! it.

use super::{Author, Piece, guard};
use crate::error::{Error, ErrorKind, Result, told};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs};
use minijinja::{AutoEscape, Environment, Error as JinjaError, ErrorKind as JinjaKind, State, Value};
use minijinja::{filters, functions};
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

/// Prefix of the message when a template raises an exception.
pub(super) const RAISED: &str = "the template refuses: ";

type JinjaResult<T = Value> = std::result::Result<T, JinjaError>;

/// The index used for marks around tools' texts.
const TOOLS: u32 = u32::MAX;
/// First character of plane 15, private use; every mark consists of characters of that plane.
const PLANE: u32 = 0xF_0000;
const LEAD: char = '\u{F_FF00}';
const OPEN: char = '\u{F_FF01}';
const CLOSE: char = '\u{F_FF02}';
/// Bytes of a mark: lead, 10 of nonce, kind, 4 of index; 4 bytes each.
const MARK_BYTES: usize = 16 * 4;

/// Marks no message can contain, since they carry random bits of this process.
#[derive(Clone)]
pub(super) struct Marks {
    /// The lead and the nonce.
    prefix: String,
}

/// A mark found in a text.
#[derive(Clone, Copy, PartialEq)]
struct Mark {
    opens: bool,
    index: u32,
}

impl Marks {
    pub(super) fn new() -> Self {
        let mut prefix = String::from(LEAD);
        // Each state is seeded by the operating system; five draws of 30 bits.
        for i in 0..5u32 {
            let bits = RandomState::new().hash_one(i);
            prefix.extend([bits, bits >> 15].map(|b| private(b as u32 & 0x7FFF)));
        }
        Marks { prefix }
    }

    fn mark(&self, mark: Mark) -> String {
        let mut text = self.prefix.clone();
        text.push(if mark.opens { OPEN } else { CLOSE });
        text.extend((0..4).map(|i| private((mark.index >> (8 * i)) & 0xFF)));
        text
    }

    /// A content between its marks. Empty content stays empty, because templates test for it.
    pub(super) fn wrap(&self, index: u32, content: &str) -> String {
        if content.is_empty() {
            return String::new();
        }
        let (open, close) = (Mark { opens: true, index }, Mark { opens: false, index });
        format!("{}{content}{}", self.mark(open), self.mark(close))
    }

    /// The tools, with every string value between marks.
    pub(super) fn wrap_strings(&self, value: &serde_json::Value) -> serde_json::Value {
        use serde_json::Value as Json;
        match value {
            Json::String(text) => Json::String(self.wrap(TOOLS, text)),
            Json::Array(items) => Json::Array(items.iter().map(|v| self.wrap_strings(v)).collect()),
            Json::Object(map) => {
                Json::Object(map.iter().map(|(k, v)| (k.clone(), self.wrap_strings(v))).collect())
            }
            other => other.clone(),
        }
    }

    /// The mark at the beginning of a text.
    fn at_start(&self, text: &str) -> Option<Mark> {
        let rest = text.strip_prefix(self.prefix.as_str())?;
        let mut chars = rest.chars();
        let opens = match chars.next()? {
            OPEN => true,
            CLOSE => false,
            _ => return None,
        };
        let mut index = 0;
        for i in 0..4 {
            index |= (chars.next()? as u32).checked_sub(PLANE).filter(|b| *b < 256)? << (8 * i);
        }
        Some(Mark { opens, index })
    }

    /// The next mark and where it begins.
    fn find(&self, text: &str) -> Option<(usize, Mark)> {
        let mut from = 0;
        while let Some(at) = text[from..].find(self.prefix.as_str()) {
            if let Some(mark) = self.at_start(&text[from + at..]) {
                return Some((from + at, mark));
            }
            from += at + self.prefix.len();
        }
        None
    }

    /// The text without its marks.
    fn bare(&self, text: &str) -> String {
        let mut bare = String::with_capacity(text.len());
        let mut rest = text;
        while let Some((at, _)) = self.find(rest) {
            bare.push_str(&rest[..at]);
            rest = &rest[at + MARK_BYTES..];
        }
        bare.push_str(rest);
        bare
    }

    /// Cuts rendered text at the marks.
    pub(super) fn split(&self, rendered: &str) -> Result<Vec<Piece>> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut source = Author::Template;
        let mut rest = rendered;
        loop {
            let found = self.find(rest);
            let text = found.map_or(rest, |(at, _)| &rest[..at]);
            // A fragment of a mark still shows its characters; a template must not cut there.
            if text.contains(LEAD) && source == Author::Template {
                return Err(cut_apart());
            }
            match pieces.last_mut().filter(|last| last.source == source) {
                Some(last) => last.text.push_str(text),
                None if !text.is_empty() => pieces.push(Piece { text: text.to_owned(), source }),
                None => {}
            }
            let Some((at, mark)) = found else { break };
            if mark.opens != (source == Author::Template) {
                return Err(cut_apart());
            }
            source = match mark {
                Mark { opens: false, .. } => Author::Template,
                Mark { index: TOOLS, .. } => Author::Tools,
                Mark { index, .. } => Author::Content { message: index as usize },
            };
            rest = &rest[at + MARK_BYTES..];
        }
        if source != Author::Template { Err(cut_apart()) } else { Ok(pieces) }
    }

    /// The template's own words for an error message, with an ellipsis for each user's text. `None` if they
    /// can't be told apart.
    pub(super) fn without_contents(&self, detail: &str) -> Option<String> {
        let words = |piece: Piece| match piece.source {
            Author::Template => piece.text,
            _ => "…".into(),
        };
        Some(told(self.split(detail).ok()?.into_iter().map(words).collect::<String>()))
    }

    /// Trims characters from the start, ignoring marks.
    fn trim_start(&self, text: &str, drop: &dyn Fn(char) -> bool) -> String {
        let mut kept = String::new();
        let mut rest = text;
        loop {
            if self.at_start(rest).is_some() {
                kept.push_str(&rest[..MARK_BYTES]);
                rest = &rest[MARK_BYTES..];
            } else if rest.starts_with(drop) {
                rest = &rest[rest.chars().next().map_or(0, char::len_utf8)..];
            } else {
                return kept + rest;
            }
        }
    }

    /// Trims characters from the end, ignoring marks.
    fn trim_end(&self, text: &str, drop: &dyn Fn(char) -> bool) -> String {
        let mut kept = Vec::new();
        let mut rest = text;
        loop {
            let mark = rest.len().checked_sub(MARK_BYTES).filter(|at| rest.is_char_boundary(*at));
            if let Some(at) = mark.filter(|at| self.at_start(&rest[*at..]).is_some()) {
                kept.push(&rest[at..]);
                rest = &rest[..at];
            } else if rest.ends_with(drop) {
                rest = &rest[..rest.len() - rest.chars().next_back().map_or(0, char::len_utf8)];
            } else {
                return std::iter::once(rest).chain(kept.into_iter().rev()).collect();
            }
        }
    }

    /// Restores, in each part of a split text, the marks that the split cut off.
    fn balance(&self, parts: Vec<&str>) -> Vec<Value> {
        let mut open: Option<u32> = None;
        let mut balanced = Vec::with_capacity(parts.len());
        for part in parts {
            let mut text = open.map(|index| self.mark(Mark { opens: true, index })).unwrap_or_default();
            text.push_str(part);
            let mut rest = part;
            while let Some((at, mark)) = self.find(rest) {
                open = mark.opens.then_some(mark.index);
                rest = &rest[at + MARK_BYTES..];
            }
            if let Some(index) = open {
                text.push_str(&self.mark(Mark { opens: false, index }));
            }
            balanced.push(Value::from(text));
        }
        balanced
    }
}

fn private(bits: u32) -> char {
    char::from_u32(PLANE + bits).unwrap_or(LEAD)
}

fn cut_apart() -> Error {
    let message = "the model's chat template cuts a message's content apart, \
             so its text can't be told from the template's";
    Error::new(ErrorKind::Unsupported, message)
}

/// Most frames open at once; a macro takes four.
const RECURSION_MAX: usize = 200;
/// Filters that nest lists in lists. They would bypass the guard, and no chat template needs them.
const NESTING_FILTERS: [&str; 5] = ["batch", "slice", "groupby", "zip", "chain"];
/// Tests that read a whole text without charging fuel. No chat template needs them.
const UNPAID_TESTS: [&str; 2] = ["lower", "upper"];

/// The syntax: as lenient as Jinja2, with the settings Hugging Face changes.
///
/// # Errors
/// Never in practice: the delimiters are the engine's defaults.
fn syntax() -> JinjaResult<SyntaxConfig> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

/// An engine set up as Hugging Face sets up Jinja: blocks trimmed, no escaping, Python's methods.
/// `strftime_now` stays undefined: templates that use it then fall back to a fixed date, so a conversation
/// renders the same every day.
///
/// Holds the template `source` as `chat`, with its [guards](super::guard).
///
/// # Errors
/// Templates the engine can't compile, or that nest too deep.
pub(super) fn environment(marks: &Marks, source: &str) -> JinjaResult<Environment<'static>> {
    let mut env = Environment::new();
    let syntax = syntax()?;
    let guarded = guard::guarded(source, &syntax)?;
    env.set_syntax(syntax);
    env.set_recursion_limit(RECURSION_MAX);
    NESTING_FILTERS.iter().for_each(|filter| env.remove_filter(filter));
    UNPAID_TESTS.iter().for_each(|test| env.remove_test(test));
    env.add_filter(guard::FILTER, guard::assigned);
    // These two duplicate a value, and may occur where the guard adds no filter.
    env.add_function("dict", |state: &State, value: Option<Value>, items: Kwargs| {
        guard::assigned(state, functions::dict(value, items)?)
    });
    env.add_filter("map", |state: &mut State, value: Value, args: Rest<ValueOrKwargs>| {
        let mapped = filters::map(state, value, args)?;
        guard::assigned(state, Value::from(mapped))
    });
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.add_function("raise_exception", |message: String| -> JinjaResult {
        Err(JinjaError::new(JinjaKind::InvalidOperation, format!("{RAISED}{message}")))
    });
    env.add_filter("tojson", to_json);
    let held = marks.clone();
    env.add_filter("trim", move |state: &State, text: String, chars: Option<String>| {
        strip(&held, state, &text, chars.as_deref(), (true, true))
    });
    let held = marks.clone();
    env.set_unknown_method_callback(move |state, value, method, args| {
        python_method(&held, state, value, method, args)
    });
    env.add_template_owned("chat", guarded)?;
    Ok(env)
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(state: &State, value: Value, args: Kwargs) -> JinjaResult {
    let indent: Option<usize> = args.get("indent")?;
    // Templates don't depend on Python's other arguments.
    let _: (Option<Value>, Option<Value>) = (args.get("ensure_ascii")?, args.get("sort_keys")?);
    let wrong = |e: serde_json::Error| JinjaError::new(JinjaKind::InvalidOperation, e.to_string());
    let mut out = Paid { state, bytes: Vec::new() };
    match indent {
        Some(n) => {
            let blanks = " ".repeat(n.min(16));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(blanks.as_bytes());
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, pretty);
            serde::Serialize::serialize(&value, &mut serializer).map_err(wrong)?;
        }
        None => {
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, Spaced);
            serde::Serialize::serialize(&value, &mut serializer).map_err(wrong)?;
        }
    }
    Ok(Value::from(String::from_utf8_lossy(&out.bytes).into_owned()))
}

/// Output that charges fuel per byte: a value that repeats itself many times serializes to a long text.
struct Paid<'s, 't, 'env> {
    state: &'s State<'t, 'env>,
    bytes: Vec<u8>,
}

impl std::io::Write for Paid<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.state.consume_fuel(fuel(bytes.len())).map_err(std::io::Error::other)?;
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The fuel for reading or writing this many bytes.
fn fuel(bytes: usize) -> u64 {
    1 + bytes as u64 / 64
}

/// ", " between items and ": " after keys.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

/// The Python string, dictionary and list methods that templates call.
fn python_method(
    marks: &Marks,
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> JinjaResult {
    // The engine charges fuel for a method's result, not for what it reads.
    if value.kind() != ValueKind::String {
        state.consume_fuel(4 * value.len().unwrap_or(1) as u64)?;
    }
    match (value.kind(), method) {
        (ValueKind::String, _) => {
            string_method(marks, state, value.as_str().unwrap_or_default(), method, args)
        }
        (ValueKind::Map, "items") => state.apply_filter("items", std::slice::from_ref(value)),
        (ValueKind::Map, "keys") => Ok(Value::from(value.try_iter()?.collect::<Vec<_>>())),
        (ValueKind::Map, "values") => Ok(Value::from(
            value.try_iter()?.map(|key| value.get_item(&key)).collect::<JinjaResult<Vec<_>>>()?,
        )),
        (ValueKind::Map, "get") => {
            let found = value.get_item(args.first().unwrap_or(&Value::UNDEFINED))?;
            Ok(if found.is_undefined() { args.get(1).cloned().unwrap_or(Value::from(())) } else { found })
        }
        (ValueKind::Seq, "count") => {
            // Comparing nested lists could run forever without using fuel.
            let is_part =
                |v: &Value| matches!(v.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable);
            Ok(Value::from(value.try_iter()?.filter(|v| !is_part(v) && Some(v) == args.first()).count()))
        }
        _ => Err(JinjaError::from(JinjaKind::UnknownMethod)),
    }
}

fn string_method(marks: &Marks, state: &mut State, text: &str, method: &str, args: &[Value]) -> JinjaResult {
    let arg = |i: usize| args.get(i).and_then(Value::as_str);
    let chars = arg(0);
    state.consume_fuel(fuel(text.len()))?;
    Ok(match method {
        "strip" => Value::from(strip(marks, state, text, chars, (true, true))?),
        "lstrip" => Value::from(strip(marks, state, text, chars, (true, false))?),
        "rstrip" => Value::from(strip(marks, state, text, chars, (false, true))?),
        "startswith" | "endswith" => Value::from(affix(state, &marks.bare(text), method, args.first())?),
        "split" | "rsplit" => Value::from(marks.balance(split(state, text, method, arg(0), args.get(1))?)),
        "splitlines" => Value::from(marks.balance(paid(state, text.lines())?)),
        "upper" | "lower" | "title" | "capitalize" => state.apply_filter(method, &[Value::from(text)])?,
        "replace" => match (arg(0), arg(1)) {
            (Some(_), Some(_)) => {
                state.apply_filter("replace", &[Value::from(text), args[0].clone(), args[1].clone()])?
            }
            _ => return Err(JinjaError::from(JinjaKind::MissingArgument)),
        },
        "find" => {
            let bare = marks.bare(text);
            let at = arg(0).and_then(|needle| bare.find(needle)).map(|at| bare[..at].chars().count() as i64);
            Value::from(at.unwrap_or(-1))
        }
        "count" => {
            Value::from(arg(0).filter(|n| !n.is_empty()).map_or(0, |needle| text.matches(needle).count()))
        }
        "isdigit" => {
            let bare = marks.bare(text);
            Value::from(!bare.is_empty() && bare.chars().all(char::is_numeric))
        }
        "join" => {
            state.apply_filter("join", &[args.first().cloned().unwrap_or_default(), Value::from(text)])?
        }
        _ => return Err(JinjaError::from(JinjaKind::UnknownMethod)),
    })
}

/// Strips characters, or blanks, from the requested ends.
fn strip(
    marks: &Marks,
    state: &State,
    text: &str,
    chars: Option<&str>,
    (start, end): (bool, bool),
) -> JinjaResult<String> {
    state.consume_fuel(fuel(text.len()) + chars.map_or(0, str::len) as u64)?;
    // Sorted for binary search: with a set as long as the text, a linear search would be quadratic.
    let mut set: Vec<char> = chars.unwrap_or_default().chars().collect();
    set.sort_unstable();
    set.dedup();
    let drop = |c: char| if chars.is_some() { set.binary_search(&c).is_ok() } else { c.is_whitespace() };
    let text = if start { marks.trim_start(text, &drop) } else { text.to_owned() };
    Ok(if end { marks.trim_end(&text, &drop) } else { text })
}

/// `startswith` and `endswith`, for one text or any of several.
fn affix(state: &State, bare: &str, method: &str, wanted: Option<&Value>) -> JinjaResult<bool> {
    let has =
        |affix: &str| if method == "startswith" { bare.starts_with(affix) } else { bare.ends_with(affix) };
    let Some(wanted) = wanted else { return Err(JinjaError::from(JinjaKind::MissingArgument)) };
    match wanted.as_str() {
        Some(affix) => Ok(has(affix)),
        None => {
            for affix in wanted.try_iter()? {
                state.consume_fuel(fuel(affix.as_str().map_or(0, str::len)))?;
                if affix.as_str().is_some_and(has) {
                    return Ok(true);
                }
            }
            Ok(false)
        }
    }
}

/// Parts of a text; each costs fuel for its marks and its list entry.
fn paid<'t>(state: &State, parts: impl Iterator<Item = &'t str>) -> JinjaResult<Vec<&'t str>> {
    parts.map(|part| state.consume_fuel(fuel(4 * MARK_BYTES)).map(|()| part)).collect()
}

fn split<'t>(
    state: &State,
    text: &'t str,
    method: &str,
    separator: Option<&str>,
    times: Option<&Value>,
) -> JinjaResult<Vec<&'t str>> {
    let times = times.and_then(Value::as_i64).and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX - 1);
    Ok(match separator {
        Some("") => return Err(JinjaError::new(JinjaKind::InvalidOperation, "empty separator")),
        Some(separator) if method == "split" => paid(state, text.splitn(times.saturating_add(1), separator))?,
        Some(separator) => {
            let mut parts = paid(state, text.rsplitn(times.saturating_add(1), separator))?;
            parts.reverse();
            parts
        }
        None => paid(state, text.split_whitespace())?,
    })
}
