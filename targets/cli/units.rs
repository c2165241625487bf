//! Sizes, shares and durations as people write and read them.

use std::time::Duration;

/// Parses a size such as `1048576`, `60M`, `1.5G`, `512KiB` or `60MB`. K, M, G and KiB, MiB, GiB count by
/// 1024, as memory limits do; KB, MB, GB by 1000.
///
/// # Errors
/// A message for people if the text isn't a size of 1 byte to 2^53.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        other => return Err(format!("unknown unit `{other}`: write a size such as 60M, 1.5G or 1048576")),
    };
    let number: f64 = number.parse().map_err(|_| "write a size such as 60M, 1.5G or 1048576".to_string())?;
    let bytes = number * factor as f64;
    if !(1.0..=9_007_199_254_740_992.0).contains(&bytes) {
        return Err("the size must be at least one byte and at most 2^53".into());
    }
    Ok(bytes as u64)
}

/// Parses a duration such as `90`, `90s`, `30m` or `4h`.
///
/// # Errors
/// A message for people if the text isn't a duration of at most a year.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let refused = || "write a time such as 90s, 30m or 4h".to_string();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let seconds: u64 = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(refused()),
    };
    let number: u64 = number.parse().map_err(|_| refused())?;
    let whole = number.checked_mul(seconds).filter(|s| *s <= 366 * 24 * 3600);
    whole.map(Duration::from_secs).ok_or_else(|| "the time must be at most a year".to_string())
}

/// Parses a share of a whole, from 0 to 1.
///
/// # Errors
/// A message for people if the text isn't one.
pub(crate) fn parse_share(text: &str) -> Result<f64, String> {
    let share: Option<f64> = text.parse().ok();
    share.filter(|s| (0.0..=1.0).contains(s)).ok_or_else(|| "write a share from 0 to 1".to_string())
}

/// A number with so many significant digits, as far as it has a fraction.
pub(crate) fn show_digits(value: f64, digits: usize) -> String {
    let whole = if value.abs() >= 1.0 { (value.abs().log10().floor() as usize).saturating_add(1) } else { 1 };
    format!("{value:.*}", digits.saturating_sub(whole))
}

/// A duration for people: `7s`, `2:05`, `1:02:05`.
pub(crate) fn show_seconds(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".into();
    }
    let whole = seconds.round() as u64;
    let (hours, minutes, rest) = (whole / 3600, whole / 60 % 60, whole % 60);
    match (hours, minutes) {
        (0, 0) => format!("{rest}s"),
        (0, _) => format!("{minutes}:{rest:02}"),
        _ => format!("{hours}:{minutes:02}:{rest:02}"),
    }
}

#[cfg(test)]
mod tests {
    use engraft_runtime::bytes;

    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("60M", 60 << 20),
            ("60 MiB", 60 << 20),
            ("60MB", 60_000_000),
            ("1.5G", 3 << 29),
            ("1048576", 1 << 20),
            ("512k", 512 << 10),
            ("7B", 7),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "0", "-1M", "1e3", "60Q", "1.2.3", "99999999G", "0.1", "inf", "nan", "é"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn digits_are_significant() {
        let shown = [98.24749, 101.1123, 3.078419, 0.51, 123456.7, f64::INFINITY].map(|x| show_digits(x, 5));
        assert_eq!(shown, ["98.247", "101.11", "3.0784", "0.5100", "123457", "inf"]);
    }

    #[test]
    fn durations_and_shares_are_read() {
        for (text, seconds) in [("90", 90), ("90s", 90), ("30m", 1800), ("4h", 14400), ("0s", 0)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "s", "-1s", "1.5h", "4d", "9999999h", "99999999999999999999h", "é"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        assert_eq!((parse_share("0.25"), parse_share("1")), (Ok(0.25), Ok(1.0)));
        for text in ["", "-0.1", "1.1", "nan", "25%"] {
            assert!(parse_share(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_and_durations_are_shown() {
        assert_eq!(bytes::show(1023), "1023 B");
        assert_eq!(bytes::show(60 << 20), "60.0 MiB");
        assert_eq!(bytes::show(3 << 29), "1.5 GiB");
        assert_eq!(show_seconds(7.4), "7s");
        assert_eq!(show_seconds(125.0), "2:05");
        assert_eq!(show_seconds(3725.0), "1:02:05");
        assert_eq!(show_seconds(f64::INFINITY), "-");
    }
}
