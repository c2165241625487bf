//! Exact numbers found in running text: no floats, so that 0.1 + 0.2 of a gold answer is 0.3.
//!
//! What is read as one number:
//!
//! - digits with a decimal point, `.5` too; a point without digits behind it ends a sentence (`5.` is 5);
//! - thousands in groups of exactly three behind one to three digits, separated by one and the same of
//!   `,` `'` `’` `_`, a no-break or thin space, LaTeX's `\,`, `{,}` and `\!`, or by points where there are
//!   two groups at least (`1.234.567`); `1,2` and `10,5` are two numbers each;
//! - a sign: `-`, `+`, and what stands for minus in Unicode, directly before the number or its `$`, or with
//!   spaces behind it after `=`, `#`, `:`, `{`, `(`, `$` or at the beginning; after a letter, a digit or a
//!   closing bracket it is no sign (`5-3` holds 5 and 3);
//! - fractions: `3/4`, `\frac{3}{4}` (`\dfrac`, `\tfrac`, `\frac34`), `½`; mixed numbers `2 1/2`,
//!   `2\frac{1}{2}`, `2½`; a zero denominator makes no number;
//! - powers: `1.5e3`, `2 \times 10^{3}`, `2 × 10^3`; and the words thousand, million, billion, trillion.
//!
//! Currency signs, `%`, units and Markdown around a number are passed over: 50 % is 50. Digits directly
//! behind a Latin letter or `_` are part of a name (`H2O`), except behind a LaTeX command. Numbers written
//! as words are not read. Digits of other scripts count as their values. Runs of more than
//! [`DIGITS_MAX`] digits, exponents beyond ±[`EXPONENT_MAX`], and fractions whose parts exceed 128 bits
//! are no numbers.

use std::fmt;

/// Digits of a number, at most.
pub const DIGITS_MAX: usize = 1000;
/// Powers of ten, at most.
pub const EXPONENT_MAX: i32 = 1000;

/// An exact number in its one canonical form: `-12.5`, `0`, or a reduced fraction `3/7` where no finite
/// decimal exists. Equal numbers have equal forms.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Number(String);

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Number {
    /// The last number in a text.
    pub fn last_in(text: &str) -> Option<Number> {
        scan(&normalize(text)).pop().map(|f| f.value)
    }

    fn new(negative: bool, magnitude: String) -> Number {
        Number(if negative && magnitude != "0" { format!("-{magnitude}") } else { magnitude })
    }
}

/// A number, and the character at which it starts.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) start: usize,
    pub(super) value: Number,
}

/// The characters of a text with one spelling for digits, minus signs and LaTeX's spaces and fractions.
pub(super) fn normalize(text: &str) -> Vec<char> {
    const SPELLINGS: [(&str, &str); 12] = [
        ("{,}", ","),
        ("\\!", ""),
        ("\\,", "\u{202f}"),
        ("\\$", "$"),
        ("\\%", "%"),
        ("\\ ", " "),
        ("\\left", ""),
        ("\\right", ""),
        ("\\dfrac", "\\frac"),
        ("\\tfrac", "\\frac"),
        ("\\cfrac", "\\frac"),
        ("\r", ""),
    ];
    let plain = SPELLINGS.iter().fold(text.to_string(), |t, (from, to)| match t.contains(from) {
        true => t.replace(from, to),
        false => t,
    });
    plain.chars().map(one_spelling).collect()
}

fn one_spelling(c: char) -> char {
    // Fullwidth, Arabic-Indic, Persian, Devanagari and Bengali zeros: nine more follow each.
    const ZEROS: [u32; 5] = [0xFF10, 0x0660, 0x06F0, 0x0966, 0x09E6];
    let code = u32::from(c);
    if let Some(digit) = ZEROS.iter().find_map(|zero| code.checked_sub(*zero).filter(|d| *d < 10)) {
        return char::from_digit(digit, 10).unwrap_or(c);
    }
    match c {
        '\u{2212}' | '\u{2010}' | '\u{2011}' | '\u{2013}' | '\u{FF0D}' | '\u{FE63}' => '-',
        '\u{FF0E}' => '.',
        '\u{FF0C}' => ',',
        '\u{2044}' | '\u{2215}' | '\u{FF0F}' => '/',
        '\u{FF1D}' => '=',
        '\u{FF05}' => '%',
        '\u{2019}' => '\'',
        '\u{00A0}' | '\u{2009}' => '\u{202f}',
        other => other,
    }
}

/// All numbers of a normalized text in their order, in time linear in its length.
pub(super) fn scan(chars: &[char]) -> Vec<Found> {
    let text = Text(chars);
    let (mut found, mut i) = (Vec::new(), 0);
    while i < chars.len() {
        match text.signed(i) {
            Some((value, end)) => {
                found.extend(value.map(|value| Found { start: i, value }));
                i = end.max(i + 1);
            }
            None => i += 1,
        }
    }
    found
}

/// A decimal's magnitude: `digits · 10^exponent`, digits of value 0 to 9.
#[derive(Clone)]
struct Decimal {
    digits: Vec<u8>,
    exponent: i32,
}

impl Decimal {
    fn canonical(mut self) -> String {
        let zeros = self.digits.iter().take_while(|d| **d == 0).count();
        self.digits.drain(..zeros);
        if self.digits.is_empty() {
            return "0".into();
        }
        while self.digits.last() == Some(&0) {
            self.digits.pop();
            self.exponent += 1;
        }
        let text: String = self.digits.iter().map(|d| char::from(b'0' + d)).collect();
        if self.exponent >= 0 {
            return text + &"0".repeat(self.exponent as usize);
        }
        let places = self.exponent.unsigned_abs() as usize;
        match text.len().checked_sub(places) {
            Some(whole) if whole > 0 => format!("{}.{}", &text[..whole], &text[whole..]),
            _ => format!("0.{}{text}", "0".repeat(places - text.len())),
        }
    }

    /// `self · 10^shift` as an integer, where that is one of 128 bits.
    fn integer(&self, shift: i32) -> Option<u128> {
        let digit = |n: u128, d: &u8| n.checked_mul(10)?.checked_add(u128::from(*d));
        let value = self.digits.iter().try_fold(0, digit)?;
        let power = u32::try_from(self.exponent.checked_add(shift)?).ok()?;
        value.checked_mul(10u128.checked_pow(power)?)
    }

    fn times(&mut self, factor: u8) {
        let mut carry = 0;
        for d in self.digits.iter_mut().rev() {
            let product = *d * factor + carry;
            (*d, carry) = (product % 10, product / 10);
        }
        if carry > 0 {
            self.digits.insert(0, carry);
        }
    }
}

/// A magnitude n/d in canonical form; `None` for d = 0.
fn ratio(n: u128, d: u128) -> Option<String> {
    if d == 0 {
        return None;
    }
    let (mut a, mut b) = (n, d);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    let (n, d) = (n / a, d / a);
    let (mut rest, mut twos, mut fives) = (d, 0i32, 0i32);
    while rest % 2 == 0 {
        (rest, twos) = (rest / 2, twos + 1);
    }
    while rest % 5 == 0 {
        (rest, fives) = (rest / 5, fives + 1);
    }
    if rest != 1 {
        return Some(format!("{n}/{d}"));
    }
    let places = twos.max(fives);
    let digits = n.to_string().bytes().map(|b| b - b'0').collect();
    let mut decimal = Decimal { digits, exponent: -places };
    (twos..places).for_each(|_| decimal.times(2));
    (fives..places).for_each(|_| decimal.times(5));
    Some(decimal.canonical())
}

fn divide(n: &Decimal, d: &Decimal) -> Option<String> {
    let shift = (-n.exponent).max(-d.exponent).max(0);
    ratio(n.integer(shift)?, d.integer(shift)?)
}

struct Text<'a>(&'a [char]);

impl Text<'_> {
    fn at(&self, i: usize) -> char {
        self.0.get(i).copied().unwrap_or('\0')
    }

    fn before(&self, i: usize) -> char {
        i.checked_sub(1).map_or('\0', |p| self.at(p))
    }

    fn is_digit(&self, i: usize) -> bool {
        self.at(i).is_ascii_digit()
    }

    fn starts_with(&self, i: usize, word: &str) -> bool {
        word.chars().enumerate().all(|(k, c)| self.at(i + k) == c)
    }

    fn past(&self, mut i: usize, is_skipped: impl Fn(char) -> bool) -> usize {
        while i < self.0.len() && is_skipped(self.at(i)) {
            i += 1;
        }
        i
    }

    /// Just past one blank, if there is one.
    fn past_blank(&self, i: usize) -> usize {
        i + usize::from(self.at(i) == ' ' || self.at(i) == '\u{202f}')
    }

    /// A number with its sign at `i`, and where it ends; the number is `None` where the characters look
    /// like one but have no value.
    fn signed(&self, i: usize) -> Option<(Option<Number>, usize)> {
        let mut p = i;
        let sign = self.at(i);
        if sign == '-' || sign == '+' {
            p = self.after_sign(i)?;
        }
        let (magnitude, end) = self.unsigned(p)?;
        let negative = (sign == '-') != self.starts_with(p, "\\frac{-");
        Some((magnitude.map(|m| Number::new(negative, m)), end))
    }

    fn after_sign(&self, i: usize) -> Option<usize> {
        let before = self.before(i);
        if before.is_alphanumeric() || matches!(before, ')' | ']' | '}' | '-' | '+' | '_' | '\'') {
            return None;
        }
        let mut p = i + 1;
        if self.at(p) == ' ' {
            let held = self.0[..i].iter().rev().find(|c| **c != ' ').copied().unwrap_or('\n');
            let is_first = self.0[..i].iter().all(|c| *c == ' ');
            if !is_first && !matches!(held, '=' | '#' | ':' | '{' | '(' | '$') {
                return None;
            }
            p = self.past(p, |c| c == ' ');
        }
        Some(p + usize::from(matches!(self.at(p), '$' | '€' | '£' | '¥' | '₹')))
    }

    fn unsigned(&self, i: usize) -> Option<(Option<String>, usize)> {
        if self.starts_with(i, "\\frac") {
            let (n, d, end) = self.frac(i)?;
            return Some((divide(&n, &d), end));
        }
        if let Some((n, d)) = vulgar(self.at(i)) {
            return Some((ratio(n, d), i + 1));
        }
        if !self.is_digit(i) && self.at(i) != '.' {
            return None;
        }
        if self.is_part_of_a_name(i) {
            // The whole run, so that a name of digits isn't read from its second one on.
            return self.is_digit(i).then(|| (None, self.past(i, |c| c.is_ascii_digit())));
        }
        let (decimal, end) = self.decimal(i)?;
        let Some(decimal) = decimal else { return Some((None, end)) };
        Some(self.behind(&decimal, end))
    }

    /// What follows a decimal and belongs to it.
    fn behind(&self, decimal: &Decimal, end: usize) -> (Option<String>, usize) {
        if let Some((value, end)) = self.mixed(decimal, end) {
            return (value, end);
        }
        let slash = self.past_blank(end);
        let is_fraction = self.at(slash) == '/' && self.is_digit(self.past_blank(slash + 1));
        let below = is_fraction.then(|| self.decimal(self.past_blank(slash + 1))).flatten();
        if let Some((d, end)) = below {
            return (d.and_then(|d| divide(decimal, &d)), end);
        }
        let (power, end) = self.power(end).unwrap_or((Some(0), end));
        let (words, end) = self.scale_word(end);
        let exponent = power.and_then(|p| decimal.exponent.checked_add(p)?.checked_add(words));
        let bounded = exponent.filter(|e| e.abs() <= EXPONENT_MAX + DIGITS_MAX as i32);
        (bounded.map(|exponent| Decimal { exponent, ..decimal.clone() }.canonical()), end)
    }

    /// `2 1/2`, `2\frac{1}{2}`, `2½`: a whole number with a proper fraction behind it.
    fn mixed(&self, whole: &Decimal, end: usize) -> Option<(Option<String>, usize)> {
        if whole.exponent != 0 {
            return None;
        }
        let p = self.past_blank(end);
        let (n, d, end) = if let Some((n, d)) = vulgar(self.at(p)) {
            (n, d, p + 1)
        } else if self.starts_with(p, "\\frac") {
            let (n, d, end) = self.frac(p)?;
            (n.integer(0)?, d.integer(0)?, end)
        } else if p > end && self.is_digit(p) {
            let (n, slash) = self.decimal(p)?;
            if self.at(slash) != '/' || !self.is_digit(slash + 1) {
                return None;
            }
            let (d, end) = self.decimal(slash + 1)?;
            (n?.integer(0)?, d?.integer(0)?, end)
        } else {
            return None;
        };
        if n >= d {
            return None;
        }
        let sum = || whole.integer(0)?.checked_mul(d)?.checked_add(n);
        Some((sum().and_then(|n| ratio(n, d)), end))
    }

    /// `\frac{a}{b}` or `\frac12`, and where it ends.
    fn frac(&self, i: usize) -> Option<(Decimal, Decimal, usize)> {
        // A minus in the numerator is the whole fraction's: `signed` sees to it.
        let start = i + "\\frac".len();
        let (n, end) = match self.starts_with(start, "{-") {
            true => self.group_from(start + 2)?,
            false => self.group(start)?,
        };
        let (d, end) = self.group(end)?;
        Some((n, d, end))
    }

    fn group(&self, i: usize) -> Option<(Decimal, usize)> {
        let i = self.past_blank(i);
        if self.at(i) != '{' {
            let digit = self.at(i).to_digit(10)? as u8;
            return Some((Decimal { digits: vec![digit], exponent: 0 }, i + 1));
        }
        self.group_from(i + 1)
    }

    /// The rest of a group behind its brace.
    fn group_from(&self, i: usize) -> Option<(Decimal, usize)> {
        let (decimal, end) = self.decimal(self.past_blank(i))?;
        let close = self.past_blank(end);
        (self.at(close) == '}').then_some((decimal?, close + 1))
    }

    /// Whether digits at `i` stand directly behind a Latin letter that is not a LaTeX command's.
    fn is_part_of_a_name(&self, i: usize) -> bool {
        let is_letter = |c: char| c.is_ascii_alphabetic();
        if self.before(i) == '_' {
            return true;
        }
        if !is_letter(self.before(i)) {
            return false;
        }
        let first = self.0[..i].iter().rposition(|c| !is_letter(*c));
        first.is_none_or(|p| self.at(p) != '\\')
    }

    /// Digits with thousands separators and a decimal part; the decimal is `None` for too many digits.
    fn decimal(&self, i: usize) -> Option<(Option<Decimal>, usize)> {
        let mut end = self.past(i, |c| c.is_ascii_digit());
        let lead = end - i;
        let leads_decimals = self.at(i) == '.' && self.is_digit(i + 1);
        let before = self.before(i);
        if lead == 0 && (!leads_decimals || before.is_alphanumeric() || before == '.') {
            return None;
        }
        let mut pointed = false;
        if (1..=3).contains(&lead) && self.at(i) != '0' {
            let separator = self.at(end);
            if matches!(separator, ',' | '\'' | '_' | '\u{202f}') {
                end = self.past_groups(end, separator);
            } else if separator == '.' && self.past_groups(end, '.') >= end + 8 {
                (end, pointed) = (self.past_groups(end, '.'), true);
            }
        }
        let point = end;
        if !pointed && self.at(point) == '.' && self.is_digit(point + 1) {
            end = self.past(point + 1, |c| c.is_ascii_digit());
        }
        let places = (end - point).saturating_sub(1);
        let digits = self.0[i..end].iter().filter_map(|c| c.to_digit(10));
        if end - i > 2 * DIGITS_MAX || digits.clone().count() > DIGITS_MAX {
            return Some((None, end));
        }
        let digits = digits.map(|d| d as u8).collect();
        Some((Some(Decimal { digits, exponent: -(places as i32) }), end))
    }

    /// Past all groups of a separator and exactly three digits.
    fn past_groups(&self, mut end: usize, separator: char) -> usize {
        let is_group = |p: usize| {
            self.at(p) == separator && (1..=3).all(|k| self.is_digit(p + k)) && !self.is_digit(p + 4)
        };
        while is_group(end) {
            end += 4;
        }
        end
    }

    /// A power of ten behind a decimal, and where it ends; `None` inside for one out of bounds.
    fn power(&self, end: usize) -> Option<(Option<i32>, usize)> {
        let digits_at = if matches!(self.at(end), 'e' | 'E') {
            end + 1
        } else {
            let p = self.past_blank(end);
            let times =
                ["\\times", "\\cdot", "×", "·", "*", "x"].into_iter().find(|t| self.starts_with(p, t))?;
            let ten = self.past_blank(p + times.chars().count());
            if !self.starts_with(ten, "10^") {
                return None;
            }
            ten + 3 + usize::from(self.at(ten + 3) == '{')
        };
        let sign = self.at(digits_at);
        let first = digits_at + usize::from(sign == '-' || sign == '+');
        let last = self.past(first, |c| c.is_ascii_digit());
        if last == first || self.at(last).is_ascii_alphabetic() {
            return None;
        }
        let text: String = self.0[first..last.min(first + 9)].iter().collect();
        let value = text.parse::<i32>().ok().filter(|v| last - first < 9 && *v <= EXPONENT_MAX);
        let close = last + usize::from(self.at(digits_at.saturating_sub(1)) == '{' && self.at(last) == '}');
        Some((value.map(|v| if sign == '-' { -v } else { v }), close))
    }

    /// The power of ten that a word behind a number stands for, and where it ends.
    fn scale_word(&self, end: usize) -> (i32, usize) {
        const WORDS: [(&str, i32); 4] = [("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12)];
        let p = self.past_blank(end);
        for (word, power) in WORDS {
            let len = word.len();
            let is_it = word.chars().enumerate().all(|(k, c)| self.at(p + k).to_ascii_lowercase() == c);
            if is_it && !self.at(p + len).is_ascii_alphabetic() {
                return (power, p + len);
            }
        }
        (0, end)
    }
}

/// Unicode's common fractions.
fn vulgar(c: char) -> Option<(u128, u128)> {
    Some(match c {
        '½' => (1, 2),
        '¼' => (1, 4),
        '¾' => (3, 4),
        '⅓' => (1, 3),
        '⅔' => (2, 3),
        '⅕' => (1, 5),
        '⅛' => (1, 8),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All numbers of a text, by one space.
    fn all(text: &str) -> String {
        scan(&normalize(text)).iter().map(|f| f.value.to_string()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn numbers_are_read_as_documented() {
        for (text, expected) in [
            ("5", "5"),
            ("5.", "5"),
            ("005.500", "5.5"),
            (".5 and 0.50", "0.5 0.5"),
            ("...5", "5"),
            ("1,234,567.80", "1234567.8"),
            ("1.234.567", "1234567"),
            ("1'000 1’000 1_000 1\u{a0}000 1{,}000 1\\,000 1,\\!000", "1000 1000 1000 1000 1000 1000 1000"),
            ("1,2 10,5 1,2345 1234,567", "1 2 10 5 1 2345 1234 567"),
            ("0,500", "0 500"),
            ("5-3 and 5 - 3 and 5 -3", "5 3 5 3 5 -3"),
            ("-5 −5 –5 +5 -$5 $-5 \\$5 -0", "-5 -5 -5 5 -5 -5 5 0"),
            ("x = - 5; y=-5; (-5)", "-5 -5 -5"),
            ("text\n- 5 apples", "5"),
            ("3/4 6/8 3 / 4 1/3 -2/6 10/5", "0.75 0.75 0.75 1/3 -1/3 2"),
            ("\\frac{3}{4} \\dfrac12 -\\tfrac{ 1 }{3} \\frac{x}{4}", "0.75 0.5 -1/3 4"),
            ("½ 2½ 2 1/2 2\\frac{1}{2} 2 3/2", "0.5 2.5 2.5 2.5 2 1.5"),
            ("5/0 and 7", "7"),
            ("1.5e3 2E-2 2 \\times 10^{3} 2 × 10^3 3*10^-1 5e 5em", "1500 0.02 2000 2000 0.3 5 5"),
            ("3 million, 2.5 Thousand, 1 millionaire", "3000000 2500 1"),
            ("H2O x5 a_7 \\boxed5 5kg 5th 50% 7\\%", "5 5 5 50 7"),
            ("５ ٣ ३", "5 3 3"),
            ("", ""),
            ("no digits - none", ""),
            ("答案是5。", "5"),
            ("0.1/0.3", "1/3"),
            ("2e5000 3", "3"),
        ] {
            assert_eq!(all(text), expected, "{text}");
        }
        assert_eq!(Number::last_in("1 and 2.50"), Number::last_in("5/2"));
    }

    #[test]
    fn hostile_texts_take_linear_time_and_end() {
        let long = "9".repeat(DIGITS_MAX);
        assert_eq!(all(&long), long);
        assert_eq!(all(&format!("{long}9 7")), "7");
        assert_eq!(all(&format!("1/{long} 7")), "7");
        let third = format!("{}/3", u128::MAX - 1);
        assert_eq!(all(&third), third, "2^128 − 2 has the remainder 2 by 3");
        assert_eq!(all(&format!("1/{}", 1u128 << 127)).len(), 129, "127 places, exactly");
        for part in [
            "-", "- ", "\\frac{", "1,", "1,111,", "$", "9", "a", "5/", ".", "1 1/", "e", "9e", "=-", "½",
            "1.111",
        ] {
            let text = part.repeat(100_000);
            let _ = scan(&normalize(&text));
        }
    }
}
