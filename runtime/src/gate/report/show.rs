//! Figures and foreign text as people read them, the same on page and terminal.

use textwrap::core::display_width;
use unicode_width::UnicodeWidthChar;

/// What stands for a figure that there is none of.
pub(super) const DASH: &str = "–";

/// Nats with four decimals.
pub(super) fn nats(x: Option<f64>) -> String {
    match x.filter(|x| x.is_finite()) {
        None => DASH.into(),
        Some(x) if x.abs() >= 1e6 => format!("{x:.3e}"),
        // Adding 0 takes the sign off a zero.
        Some(x) => format!("{:.4}", (x * 1e4).round() / 1e4 + 0.0),
    }
}

/// Nats with their sign, for differences.
pub(super) fn change(x: Option<f64>) -> String {
    let plain = nats(x);
    let positive = plain != DASH && !plain.starts_with('-') && plain != "0.0000";
    if positive { format!("+{plain}") } else { plain }
}

/// "[0.0123, 0.0456]".
pub(super) fn interval(lower: Option<f64>, upper: Option<f64>) -> String {
    let ends = [lower, upper].map(nats);
    if ends.iter().all(|e| e == DASH) { DASH.into() } else { format!("[{}, {}]", ends[0], ends[1]) }
}

/// A share as a percentage.
pub(super) fn percent(x: Option<f64>) -> String {
    x.filter(|x| x.is_finite()).map_or(DASH.into(), |x| format!("{:.1} %", 100.0 * x))
}

/// A count with its thousands set apart: "7,473".
pub(super) fn count(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}

/// A duration: "7.2 s", "2:05 min", "1:02:05 h"; a dash for none.
pub(super) fn seconds(seconds: f64) -> String {
    if !seconds.is_finite() || seconds <= 0.0 {
        return DASH.into();
    }
    if seconds < 59.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    let (hours, minutes, rest) = (whole / 3600, whole / 60 % 60, whole % 60);
    if hours == 0 { format!("{minutes}:{rest:02} min") } else { format!("{hours}:{minutes:02}:{rest:02} h") }
}

/// Tokens per second.
pub(super) fn speed(tokens: u64, seconds: f64) -> String {
    let speed = tokens as f64 / seconds;
    match speed.is_finite() && speed > 0.0 {
        false => DASH.into(),
        true if speed < 10.0 => format!("{speed:.1}"),
        true => count(speed.round() as u64),
    }
}

/// A learning rate, or another number that may be far from 1: "2e-4", "0.05", "12.5".
pub(super) fn number(x: f64) -> String {
    if !x.is_finite() {
        return DASH.into();
    }
    // Three digits by way of the exponent's form; parsing drops the zeros at its end.
    let rounded: f64 = format!("{x:.2e}").parse().unwrap_or(x);
    let plain = rounded == 0.0 || (1e-2..1e5).contains(&rounded.abs());
    if plain { format!("{}", rounded + 0.0) } else { format!("{rounded:e}") }
}

/// The text with every character in sight that acts on what shows it, instead of being shown: controls,
/// and those that turn the direction of text or take no room, as ⟨U+202E⟩. Line ends and tabs stay.
pub(super) fn visible(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match u32::from(c) {
            0x0A | 0x09 => shown.push(c),
            0x0D if chars.peek() == Some(&'\n') => {}
            code if acts(code) => shown.push_str(&format!("⟨U+{code:04X}⟩")),
            _ => shown.push(c),
        }
    }
    shown
}

/// Controls, marks and overrides of direction, what takes no room (but the joiners, which scripts and
/// emoji need), line ends of other kinds, tags and noncharacters.
pub(super) fn acts(code: u32) -> bool {
    matches!(code, 0..=0x1F | 0x7F..=0x9F | 0xAD | 0x61C | 0x180E | 0x200B | 0x200E | 0x200F)
        || matches!(code, 0x2028..=0x202E | 0x2060..=0x206F | 0xFEFF | 0xFFF9..=0xFFFB | 0xFDD0..=0xFDEF)
        || matches!(code, 0xE0000..=0xE007F)
        || code & 0xFFFE == 0xFFFE
}

/// [`visible`] text on one line: line ends and tabs are blanks.
pub(super) fn one_line(text: &str) -> String {
    visible(text).replace(['\n', '\t'], " ")
}

/// Columns that a text takes on a terminal, about: East Asian wide characters and emoji take two,
/// combining ones none.
pub(super) fn columns(text: &str) -> usize {
    display_width(text)
}

/// The text on one line of at most so many columns, with … where it was cut.
pub(super) fn cut(text: &str, columns_max: usize) -> String {
    let line = one_line(text);
    if columns(&line) <= columns_max {
        return line;
    }
    let mut taken = 0;
    let fits = |c: &char| {
        taken += c.width().unwrap_or(0);
        taken < columns_max
    };
    line.chars().take_while(fits).collect::<String>() + "…"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_rounded() {
        let shown = [Some(1.23456), Some(-0.00001), Some(2.5e7), Some(f64::NAN), None].map(nats);
        assert_eq!(shown, ["1.2346", "0.0000", "2.500e7", DASH, DASH]);
        assert_eq!(
            [Some(0.5), Some(-0.5), Some(0.0), None].map(change),
            ["+0.5000", "-0.5000", "0.0000", DASH]
        );
        assert_eq!(interval(Some(0.1), None), format!("[0.1000, {DASH}]"));
        assert_eq!(interval(None, Some(f64::INFINITY)), DASH);
        assert_eq!([Some(0.4231), Some(f64::NAN)].map(percent), ["42.3 %", DASH]);
        assert_eq!([0, 999, 7473, 134_515_008].map(count), ["0", "999", "7,473", "134,515,008"]);
        assert_eq!([1023, 60 << 20, 3 << 29].map(crate::bytes::show), ["1023 B", "60.0 MiB", "1.5 GiB"]);
        let shown = [7.24, 125.0, 3725.0, 0.0, f64::NAN].map(seconds);
        assert_eq!(shown, ["7.2 s", "2:05 min", "1:02:05 h", DASH, DASH]);
        assert_eq!([speed(1000, 2.0), speed(5, 2.0), speed(5, 0.0)], ["500", "2.5", DASH]);
        let shown = [2e-4, 0.05, 12.5, 3.162e-5, 1e7, 0.0, -0.0, f64::INFINITY].map(number);
        assert_eq!(shown, ["2e-4", "0.05", "12.5", "3.16e-5", "1e7", "0", "0", DASH]);
    }

    #[test]
    fn what_acts_is_seen() {
        assert_eq!(visible("a\x1b[31mb\r\nc\td\u{7f}\0\r"), "a⟨U+001B⟩[31mb\nc\td⟨U+007F⟩⟨U+0000⟩⟨U+000D⟩");
        assert_eq!(visible("x\u{202e}y\u{85}\u{feff}"), "x⟨U+202E⟩y⟨U+0085⟩⟨U+FEFF⟩");
        assert_eq!(visible("日本 é 👩\u{200d}🚀"), "日本 é 👩\u{200d}🚀");
        assert_eq!(columns("日本 e\u{301}"), 6);
        assert_eq!(
            (cut("日本語", 4).as_str(), cut("ab\ncd", 9).as_str(), cut("abc", 0).as_str()),
            ("日…", "ab cd", "…")
        );
    }
}
