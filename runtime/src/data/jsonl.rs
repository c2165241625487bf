//! Lines of JSON from a file, one at a time and of bounded length.

use crate::error::{Error, Result};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// Bytes of a line, at most.
pub const LINE_BYTES_MAX: usize = 1 << 24;

/// Most values per line: each takes about sixteen times the memory of its text.
const VALUES_MAX: usize = 1 << 20;

/// Called for each row with its line number and its value, or the reason there is none. Return false to stop.
pub type EachRow<'a> = dyn FnMut(usize, std::result::Result<Value, String>) -> Result<bool> + 'a;

/// Calls `row` for every line that isn't blank, with its number from 1: a JSON value, or the reason there is
/// none (too long, not UTF-8, not JSON). A byte order mark and CRLF are allowed. Stops at the first error or
/// where `row` returns false.
///
/// Errors: `Io` for a file that can't be read, and those of `row`.
pub fn for_each_row(path: &Path, row: &mut EachRow<'_>) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::io(format!("opening {}", path.display()), e))?;
    for_each_row_of(BufReader::with_capacity(1 << 16, file), path, row)
}

/// [`for_each_row`] for any reader; errors call it `path`.
///
/// Errors: as [`for_each_row`].
pub fn for_each_row_of(mut reader: impl BufRead, path: &Path, row: &mut EachRow<'_>) -> Result<()> {
    let mut line = Vec::new();
    let mut number = 0;
    loop {
        line.clear();
        let fits = read_line(&mut reader, &mut line)
            .map_err(|e| Error::io(format!("reading {}", path.display()), e))?;
        let Some(fits) = fits else { return Ok(()) };
        number += 1;
        let text = if number == 1 { line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&line) } else { &line };
        if fits && text.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let value = if fits { parse(text) } else { Err(format!("longer than {LINE_BYTES_MAX} bytes")) };
        if !row(number, value)? {
            return Ok(());
        }
    }
}

fn parse(text: &[u8]) -> std::result::Result<Value, String> {
    let text = std::str::from_utf8(text).map_err(|e| format!("not UTF-8 at byte {}", e.valid_up_to() + 1))?;
    if text.len() > VALUES_MAX && separators(text) >= VALUES_MAX {
        return Err(format!("more than {VALUES_MAX} values"));
    }
    // The error's text may quote the row, so only its place is used.
    serde_json::from_str(text).map_err(|e| {
        let what = match e.classify() {
            serde_json::error::Category::Eof => "JSON that ends too early",
            _ => "not JSON",
        };
        format!("{what}, at column {}", e.column())
    })
}

/// Counts what separates values or opens lists and objects.
fn separators(text: &str) -> usize {
    let (mut within, mut escaped, mut count) = (false, false, 0);
    for b in text.bytes() {
        match b {
            _ if escaped => escaped = false,
            b'\\' if within => escaped = true,
            b'"' => within = !within,
            b',' | b':' | b'[' | b'{' if !within => count += 1,
            _ => {}
        }
    }
    count
}

/// Reads a line without its end. None at the end of the file; false if it was too long and was skipped.
fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<Option<bool>> {
    let (mut any, mut fits) = (false, true);
    loop {
        let chunk = match reader.fill_buf() {
            Ok(chunk) => chunk,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        if chunk.is_empty() {
            return Ok(any.then_some(fits));
        }
        any = true;
        let end = chunk.iter().position(|b| *b == b'\n');
        let part = &chunk[..end.unwrap_or(chunk.len())];
        fits = fits && line.len() + part.len() <= LINE_BYTES_MAX;
        if fits {
            line.extend_from_slice(part);
        }
        let used = part.len() + usize::from(end.is_some());
        reader.consume(used);
        if end.is_some() {
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            return Ok(Some(fits));
        }
    }
}
