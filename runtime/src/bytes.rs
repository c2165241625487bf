//! Sizes in memory, for people.
//!
//! ```
//! assert_eq!(engraft_runtime::bytes::show(97 << 20), "97.0 MiB");
//! ```

/// A size for people, by 1024: `97.3 MiB`.
pub fn show(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, "B");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

/// Smallest size shown in MiB; a smaller one would read as 0.0.
const MIB_SHOWN_MIN: usize = (1 << 20) / 20 + 1;

/// Bytes as MiB for people.
pub fn mib(bytes: usize) -> String {
    // Below a tenth, a rounded figure would read as zero, say for a budget given without its unit.
    match bytes < MIB_SHOWN_MIN {
        true => format!("{bytes} bytes"),
        false => format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64),
    }
}
