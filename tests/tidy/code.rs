//! Checks of Rust's text: short functions, and reasons next to unsafe code. Comments and strings are blanked out first,
//! as far as these checks need it.

/// Lines of a function, signature and closing brace included.
const FUNCTION_LINES_MAX: usize = 70;

/// The source with comments, strings and characters blanked out, byte for byte and line for line.
pub(crate) fn code_only(source: &str) -> Vec<u8> {
    let s = source.as_bytes();
    let mut code = s.to_vec();
    let mut i = 0;
    while i < s.len() {
        let end = match s[i] {
            b'/' if s.get(i + 1) == Some(&b'/') => {
                i + s[i..].iter().position(|b| *b == b'\n').unwrap_or(s.len() - i)
            }
            b'/' if s.get(i + 1) == Some(&b'*') => end_of_block_comment(s, i),
            b'"' => end_of_string(s, i),
            b'r' if !follows_word(s, i, true) && raw_hashes(s, i).is_some() => end_of_raw(s, i),
            b'\'' => end_of_char(s, i),
            _ => {
                i += 1;
                continue;
            }
        };
        for b in &mut code[i..end] {
            if *b != b'\n' {
                *b = b' ';
            }
        }
        i = end.max(i + 1);
    }
    code
}

pub(crate) fn is_word(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b == b'_'
}

/// Whether the byte at `i` continues a word; the prefixes of byte and C strings don't count as one.
fn follows_word(s: &[u8], i: usize, string_prefix: bool) -> bool {
    if i == 0 || !is_word(s[i - 1]) {
        return false;
    }
    let prefixed = string_prefix && (s[i - 1] == b'b' || s[i - 1] == b'c');
    !prefixed || (i >= 2 && is_word(s[i - 2]))
}

fn end_of_block_comment(s: &[u8], start: usize) -> usize {
    let (mut depth, mut i) = (0, start);
    while i + 1 < s.len() {
        match &s[i..i + 2] {
            b"/*" => (depth, i) = (depth + 1, i + 2),
            b"*/" => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            return i;
        }
    }
    s.len()
}

fn end_of_string(s: &[u8], start: usize) -> usize {
    let mut i = start + 1;
    while i < s.len() && s[i] != b'"' {
        i += if s[i] == b'\\' { 2 } else { 1 };
    }
    (i + 1).min(s.len())
}

/// How many `#` a raw string that starts with the `r` at `i` has; `None` when none starts there.
fn raw_hashes(s: &[u8], i: usize) -> Option<usize> {
    let hashes = s[i + 1..].iter().take_while(|b| **b == b'#').count();
    (s.get(i + 1 + hashes) == Some(&b'"')).then_some(hashes)
}

fn end_of_raw(s: &[u8], start: usize) -> usize {
    let hashes = raw_hashes(s, start).unwrap_or(0);
    let mut close = vec![b'"'];
    close.extend(std::iter::repeat_n(b'#', hashes));
    let body = start + 2 + hashes;
    s[body..].windows(close.len()).position(|w| w == close).map_or(s.len(), |at| body + at + close.len())
}

/// The end of a character literal; for a lifetime, which has no closing quote, just past the quote.
fn end_of_char(s: &[u8], start: usize) -> usize {
    if s.get(start + 1) == Some(&b'\\') {
        return s[start + 3..].iter().position(|b| *b == b'\'').map_or(s.len(), |at| start + 4 + at);
    }
    let text = String::from_utf8_lossy(&s[start + 1..(start + 5).min(s.len())]).into_owned();
    let first = text.chars().next().map_or(1, char::len_utf8);
    if s.get(start + 1 + first) == Some(&b'\'') { start + first + 2 } else { start + 1 }
}

/// The places of a keyword as a whole word.
pub(crate) fn keyword_places(code: &[u8], keyword: &str) -> Vec<usize> {
    let k = keyword.as_bytes();
    let is_place = |i: &usize| {
        code[*i..].starts_with(k)
            && (*i == 0 || !is_word(code[*i - 1]))
            && code.get(*i + k.len()).is_none_or(|b| !is_word(*b))
    };
    (0..code.len()).filter(is_place).collect()
}

fn line_of(code: &[u8], at: usize) -> usize {
    code[..at].iter().filter(|b| **b == b'\n').count() + 1
}

pub(crate) fn skip_blank(code: &[u8], mut at: usize) -> usize {
    while code.get(at).is_some_and(u8::is_ascii_whitespace) {
        at += 1;
    }
    at
}

// ---------------------------------------------------------------------------------------------------
// Short functions

pub(crate) fn long_functions(source: &str) -> Vec<(usize, String)> {
    let code = code_only(source);
    let mut findings = Vec::new();
    for at in keyword_places(&code, "fn") {
        let name_at = skip_blank(&code, at + 2);
        // Without a name it is a type such as `fn(usize)`.
        if !code.get(name_at).is_some_and(|b| is_word(*b) || *b == b'$') {
            continue;
        }
        let Some((open, close)) = body_of(&code, name_at) else { continue };
        let lines = line_of(&code, close) - line_of(&code, at) + 1;
        if lines > FUNCTION_LINES_MAX {
            let signature = String::from_utf8_lossy(&code[name_at..open]);
            let name = signature.split(['(', '<']).next().unwrap_or_default().trim().to_string();
            findings.push((line_of(&code, at), format!("fn {name} has {lines} lines")));
        }
    }
    findings
}

/// The braces of the body that follows a signature; `None` for a declaration, which ends in `;`.
fn body_of(code: &[u8], from: usize) -> Option<(usize, usize)> {
    let mut nested = 0;
    let open = (from..code.len()).find_map(|i| {
        match code[i] {
            b'(' | b'[' => nested += 1,
            b')' | b']' => nested -= 1,
            b'{' if nested == 0 => return Some(Some(i)),
            b';' if nested == 0 => return Some(None),
            _ => {}
        }
        None
    })??;
    let mut depth = 0;
    let close = (open..code.len()).find(|i| {
        match code[*i] {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => {}
        }
        depth == 0
    })?;
    Some((open, close))
}

#[test]
fn long_functions_are_found() {
    let body = |lines: usize| {
        format!("/// {{\nfn f<'a>(x: [u8; 4], c: char) {{\n{}}}\n", "    g('{', \"}\");\n".repeat(lines))
    };
    assert_eq!(long_functions(&body(FUNCTION_LINES_MAX - 2)), []);
    assert_eq!(long_functions(&body(FUNCTION_LINES_MAX - 1)), [(2, "fn f has 71 lines".to_string())]);
    let macro_made = body(FUNCTION_LINES_MAX).replace("fn f", "fn $name");
    assert_eq!(long_functions(&macro_made).len(), 1);
    let declared =
        format!("trait T {{\n    fn f(&self, x: [u8; 4]);\n    type F = fn(usize);\n{}}}\n", "\n".repeat(99));
    assert_eq!(long_functions(&declared), []);
    let hidden = format!("const S: &str = r#\"\nfn f() {{\n{}}}\n\"#;\n", "x\n".repeat(99));
    assert_eq!(long_functions(&hidden), []);
}

// ---------------------------------------------------------------------------------------------------
// Reasons beside unsafe code

pub(crate) fn unexplained_unsafe(source: &str) -> Vec<(usize, String)> {
    let code = code_only(source);
    let text = String::from_utf8_lossy(&code).into_owned();
    let code_lines: Vec<&str> = text.lines().collect();
    let source_lines: Vec<&str> = source.lines().collect();
    let mut findings = Vec::new();
    for at in keyword_places(&code, "unsafe") {
        let next = &code[skip_blank(&code, at + 6)..];
        let line = line_of(&code, at);
        if (next.starts_with(b"{") || next.starts_with(b"impl"))
            && !is_explained(&source_lines, &code_lines, line - 1)
        {
            findings.push((line, source_lines[line - 1].trim().to_string()));
        }
    }
    findings
}

/// Whether a reason stands right above a line (counted from 0), or above the statement it is part of.
fn is_explained(source: &[&str], code: &[&str], line: usize) -> bool {
    let mut start = line;
    loop {
        if has_reason_above(source, start) {
            return true;
        }
        let starts_statement = |above: &str| above.is_empty() || above.ends_with([';', '{', '}', ',', ']']);
        if start == 0 || starts_statement(code[start - 1].trim()) {
            return false;
        }
        start -= 1;
    }
}

/// Whether the comment lines right above a line (attributes in between are fine) give a reason.
fn has_reason_above(source: &[&str], line: usize) -> bool {
    let above = source[..line].iter().rev().map(|l| l.trim());
    let comment = above.skip_while(|l| l.starts_with("#[")).take_while(|l| l.starts_with("//"));
    comment.into_iter().any(|l| l.split_once("SAFETY:").is_some_and(|(_, reason)| reason.trim().len() >= 8))
}

#[test]
fn unexplained_unsafe_is_found() {
    let good = "// SAFETY: the caller checked the length.\nlet x =\n    unsafe { f() };\n\
                // SAFETY: it holds no pointer,\n// and no cell.\n#[cfg(unix)]\nunsafe impl Send for X {}\n\
                /// Takes.\nunsafe fn f() {}\ntype F = unsafe fn(usize);\n// unsafe { }\n";
    assert_eq!(unexplained_unsafe(good), []);
    for bad in [
        "fn g() {\n    unsafe { f() }\n}\n",
        "// SAFETY:\nunsafe { f() }\n",
        "// SAFETY: far away from it.\n\nunsafe { f() }\n",
        "// SAFETY: of another statement.\nlet a = 1;\nunsafe { f() }\n",
        "unsafe impl Send for X {}\n",
        "let s = \"// SAFETY: only a text.\"; unsafe { f() }\n",
    ] {
        assert_eq!(unexplained_unsafe(bad).len(), 1, "{bad}");
    }
}
