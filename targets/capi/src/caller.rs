//! Everything that reads or writes the caller's memory: texts, bytes, structs, out parameters.

use std::ffi::c_char;
use std::mem::MaybeUninit;
use std::path::PathBuf;

use crate::error::{ENGRAFT_NOMEM, ENGRAFT_TOO_SMALL, ENGRAFT_UNSUPPORTED_VERSION, Failure, Result};
use crate::handle::{Kind, alone, call, publish};

/// A struct that claims more bytes than this was never initialized.
const STRUCT_BYTES_MAX: usize = 1 << 16;

/// The caller's bytes.
///
/// # Safety
/// `data` is NULL or readable for `length` bytes as long as the result is used.
pub(crate) unsafe fn bytes<'a>(data: *const u8, length: usize, what: &str) -> Result<&'a [u8]> {
    if length == 0 {
        return Ok(&[]);
    }
    if data.is_null() {
        return Err(Failure::misuse(format!("{what} is NULL, but its length is {length}")));
    }
    if isize::try_from(length).is_err() {
        return Err(Failure::misuse(format!("{what} can't be {length} bytes long")));
    }
    // SAFETY: it is not NULL, not longer than memory, and readable as the caller of this says.
    Ok(unsafe { std::slice::from_raw_parts(data, length) })
}

/// The caller's text; empty if it is NULL with length 0.
///
/// # Safety
/// As [`bytes`].
pub(crate) unsafe fn text<'a>(text: *const c_char, length: usize, what: &str) -> Result<&'a str> {
    // SAFETY: the same contract as this function's.
    let bytes = unsafe { bytes(text.cast(), length, what) }?;
    std::str::from_utf8(bytes)
        .map_err(|e| Failure::misuse(format!("{what} isn't UTF-8 at byte {}", e.valid_up_to())))
}

/// The caller's path, which must not be empty.
///
/// # Safety
/// As [`bytes`].
pub(crate) unsafe fn path(path: *const c_char, length: usize, what: &str) -> Result<PathBuf> {
    // SAFETY: the same contract as this function's.
    let path = unsafe { text(path, length, what) }?;
    if path.is_empty() || path.contains('\0') {
        return Err(Failure::misuse(format!("{what} is empty or contains a NUL")));
    }
    Ok(PathBuf::from(path))
}

/// A copy of the caller's bytes, if there is memory for it.
pub(crate) fn copied(bytes: &[u8], what: &str) -> Result<Vec<u8>> {
    let mut copy = Vec::new();
    copy.try_reserve_exact(bytes.len()).map_err(|_| {
        Failure::new(ENGRAFT_NOMEM, format!("no memory for the {} bytes of {what}", bytes.len()))
    })?;
    copy.extend_from_slice(bytes);
    Ok(copy)
}

/// Copies a text into the caller's buffer, as documented at `engraft_message`.
///
/// # Safety
/// `buffer` is NULL or writable for `capacity` bytes, `length` NULL or writable.
pub(crate) unsafe fn copy_text(
    text: &str,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> Result<()> {
    if !length.is_null() {
        // SAFETY: it is not NULL, and writable as the caller of this says.
        unsafe { length.write(text.len()) };
    }
    if capacity == 0 {
        return Ok(());
    }
    if buffer.is_null() {
        return Err(Failure::misuse(format!("buffer is NULL, but capacity is {capacity}")));
    }
    // Never cut a character in half.
    let end = (0..=text.len().min(capacity - 1)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    // SAFETY: end + 1 ≤ capacity bytes are written, all of which are writable as the caller of this says; a
    // text of ours does not overlap with the caller's buffer.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), buffer.cast::<u8>(), end);
        buffer.add(end).write(0);
    }
    if end == text.len() {
        return Ok(());
    }
    let message = format!("the text of {} bytes and its NUL don't fit into {capacity}", text.len());
    Err(Failure::new(ENGRAFT_TOO_SMALL, message))
}

/// Writes a value that the caller may not want.
///
/// # Safety
/// `out` is NULL or writable, and aligned.
pub(crate) unsafe fn put<T>(out: *mut T, value: T) {
    if !out.is_null() {
        // SAFETY: it is not NULL, and writable as the caller of this says.
        unsafe { out.write(value) };
    }
}

/// Runs an export that makes a handle from another one: `f` returns the value behind it. The handle goes to `place`,
/// where NULL is put before anything can fail, so that a caller who frees it anyway frees NULL.
///
/// # Safety
/// `place` is NULL, or writable and aligned until this returns.
pub(crate) unsafe fn make<H: Kind, K: Kind>(
    name: &'static str,
    from: *const H,
    place: *mut *mut K,
    f: impl FnOnce(&H::Value) -> Result<K::Value>,
) -> i32 {
    // SAFETY: the same contract as this function's.
    unsafe { put(place, std::ptr::null_mut()) };
    // SAFETY: the same.
    call(name, from, |value| unsafe { fill(place, || f(value)) })
}

/// The same for a handle that is made from no other.
///
/// # Safety
/// As [`make`].
pub(crate) unsafe fn make_alone<K: Kind>(
    name: &'static str,
    place: *mut *mut K,
    f: impl FnOnce() -> Result<K::Value>,
) -> i32 {
    // SAFETY: the same contract as this function's.
    unsafe { put(place, std::ptr::null_mut()) };
    // SAFETY: the same.
    alone(name, || unsafe { fill(place, f) })
}

/// # Safety
/// As [`make`].
unsafe fn fill<K: Kind>(place: *mut *mut K, f: impl FnOnce() -> Result<K::Value>) -> Result<()> {
    if place.is_null() {
        return Err(Failure::misuse(format!("the place for the {} handle is NULL", K::NAME)));
    }
    let handle = publish(f()?)?;
    // SAFETY: it is not NULL, and writable as the caller of this says.
    unsafe { place.write(handle) };
    Ok(())
}

// ---------------------------------------------------------------------------------------------------
// Structs that grow

/// A struct that the caller allocates and that later versions may extend.
///
/// # Safety
/// It is `repr(C)` and begins with a `u32`, its size in bytes. Any bytes are a valid value, so it has only
/// numbers and pointers. The last field ends where the struct ends; otherwise later fields would hide in padding.
pub(crate) unsafe trait Struct: Copy {
    /// Its name in messages.
    const NAME: &'static str;
    /// Its bytes in version 1. Every caller has at least these.
    const BYTES_MIN: usize;
}

/// Declares [`Struct`]s that all exist since version 1.
macro_rules! structs {
    ($($name:ident = $text:literal),+ $(,)?) => {$(
        // SAFETY: numbers and pointers in `repr(C)`, size first, ordered so that nothing is padded.
        unsafe impl $crate::caller::Struct for $name {
            const NAME: &'static str = $text;
            const BYTES_MIN: usize = size_of::<$name>();
        }
    )+};
}
pub(crate) use structs;

/// All zeros, which means all defaults.
pub(crate) fn zeroed<S: Struct>() -> S {
    // SAFETY: any bytes are a valid value, as the trait says.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

/// How many bytes the caller's struct has.
///
/// # Safety
/// `given` is readable for as many bytes as its first field says, and for that field.
unsafe fn size_of_given<S: Struct>(given: *const S) -> Result<usize> {
    // SAFETY: the first field is a u32, as the trait says, and readable as the caller of this says.
    let size = unsafe { given.cast::<u32>().read_unaligned() } as usize;
    match (S::BYTES_MIN..=STRUCT_BYTES_MAX).contains(&size) {
        true => Ok(size),
        false => Err(Failure::misuse(format!(
            "struct_size of {} is {size}, but must be at least {}; set it with its default function",
            S::NAME,
            S::BYTES_MIN
        ))),
    }
}

/// The caller's settings, or all defaults for NULL. Fields that only the caller's version knows must be zero.
///
/// # Safety
/// `given` is NULL, or readable for as many bytes as its first field says.
pub(crate) unsafe fn settings<S: Struct>(given: *const S) -> Result<S> {
    if given.is_null() {
        return Ok(zeroed());
    }
    // SAFETY: it is not NULL, and the rest is handed on.
    let size = unsafe { size_of_given(given) }?;
    // SAFETY: as many bytes are readable, as the caller of this says.
    let all = unsafe { bytes(given.cast::<u8>(), size, S::NAME) }?;
    let known = size.min(size_of::<S>());
    if all[known..].iter().any(|byte| *byte != 0) {
        let message = format!("{} sets fields that this version doesn't know; update the library", S::NAME);
        return Err(Failure::new(ENGRAFT_UNSUPPORTED_VERSION, message));
    }
    let mut own = MaybeUninit::<S>::zeroed();
    // SAFETY: `known` bytes are within both, which do not overlap; whatever they are is a valid value.
    unsafe {
        std::ptr::copy_nonoverlapping(all.as_ptr(), own.as_mut_ptr().cast::<u8>(), known);
        Ok(own.assume_init())
    }
}

/// Refuses a nonzero reserved field.
pub(crate) fn unused(reserved: u32) -> Result<()> {
    match reserved {
        0 => Ok(()),
        _ => Err(Failure::new(
            ENGRAFT_UNSUPPORTED_VERSION,
            "reserved isn't 0; set it to 0, or update the library",
        )),
    }
}

/// Refuses a result struct whose size was never set, before the work begins.
///
/// # Safety
/// `out` is NULL, or readable for as many bytes as its first field says, and for that field.
pub(crate) unsafe fn check_answer<S: Struct>(out: *const S) -> Result<()> {
    // SAFETY: the same contract as this function's, if it isn't NULL.
    if out.is_null() { Ok(()) } else { unsafe { size_of_given(out) }.map(drop) }
}

/// Fills the caller's struct with as many fields as its version has. Fields unknown to this version become zero.
///
/// # Safety
/// `out` is NULL, or readable and writable for as many bytes as its first field says.
pub(crate) unsafe fn answer<S: Struct>(out: *mut S, value: S) -> Result<()> {
    if out.is_null() {
        return Err(Failure::misuse(format!("{} is NULL", S::NAME)));
    }
    // SAFETY: it is not NULL, and the rest is handed on.
    let size = unsafe { size_of_given(out) }?;
    let known = size.min(size_of::<S>());
    // SAFETY: `size` bytes are writable, as the caller of this says, and `known` of the value are there; the
    // two do not overlap. The size stays the caller's.
    unsafe {
        let (to, from) = (out.cast::<u8>(), std::ptr::from_ref(&value).cast::<u8>());
        let first = size_of::<u32>();
        std::ptr::copy_nonoverlapping(from.add(first), to.add(first), known - first);
        to.add(known).write_bytes(0, size - known);
    }
    Ok(())
}

/// Runs an export that sets all fields of the caller's struct of `size` bytes to their default, zero, and its size.
///
/// # Safety
/// `out` is NULL or writable for `size` bytes.
pub(crate) unsafe fn defaults<S: Struct>(name: &'static str, out: *mut S, size: usize) -> i32 {
    // SAFETY: the same contract as this function's.
    alone(name, || unsafe { default_settings(out, size) })
}

/// # Safety
/// As [`defaults`].
unsafe fn default_settings<S: Struct>(out: *mut S, size: usize) -> Result<()> {
    if out.is_null() {
        return Err(Failure::misuse(format!("{} is NULL", S::NAME)));
    }
    if !(S::BYTES_MIN..=STRUCT_BYTES_MAX).contains(&size) {
        return Err(Failure::misuse(format!(
            "the size of {} is {size}, but must be at least {}; pass sizeof",
            S::NAME,
            S::BYTES_MIN
        )));
    }
    // SAFETY: it is not NULL, and writable for as many bytes as the caller of this says; these are more than
    // the first field has.
    unsafe {
        out.cast::<u8>().write_bytes(0, size);
        out.cast::<u32>().write_unaligned(size as u32);
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------------
// Numbers whose zero is the default

/// The number, or its default if it is zero.
pub(crate) fn or(value: u32, default: u32) -> usize {
    if value == 0 { default as usize } else { value as usize }
}

/// Refuses a number above its limit.
pub(crate) fn at_most(value: u32, max: u32, name: &str) -> Result<u32> {
    match value <= max {
        true => Ok(value),
        false => Err(Failure::misuse(format!("{name} is {value}, but must be at most {max}"))),
    }
}

/// A number in a range, or its default if it is zero. If `off` is given, a negative number means that.
pub(crate) fn number(
    value: f64,
    (default, off): (f64, Option<f64>),
    range: std::ops::RangeInclusive<f64>,
    name: &str,
) -> Result<f64> {
    if value == 0.0 {
        return Ok(default);
    }
    match off {
        Some(off) if value < 0.0 => Ok(off),
        _ if range.contains(&value) => Ok(value),
        _ => {
            let message = format!("{name} is {value}, but must be {} to {}", range.start(), range.end());
            Err(Failure::misuse(message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ENGRAFT_MISUSE;

    #[derive(Clone, Copy, Debug, PartialEq)]
    #[repr(C)]
    struct Sample {
        struct_size: u32,
        number: u32,
    }

    structs!(Sample = "sample");

    /// A later version of it.
    #[repr(C)]
    struct Later {
        now: Sample,
        then: u32,
    }

    fn read(size: u32, then: u32) -> std::result::Result<Sample, i32> {
        let later = Later { now: Sample { struct_size: size, number: 7 }, then };
        // SAFETY: the sizes below are at most that of `Later`.
        unsafe { settings(std::ptr::from_ref(&later).cast::<Sample>()) }.map_err(|failure| failure.code)
    }

    #[test]
    fn structs_of_other_versions() {
        assert_eq!(read(8, 1).map(|s| s.number), Ok(7));
        assert_eq!(read(12, 0).map(|s| s.number), Ok(7));
        assert_eq!(read(12, 1), Err(ENGRAFT_UNSUPPORTED_VERSION));
        assert_eq!((read(4, 0), read(0, 0), read(u32::MAX, 0)), {
            let misuse = Err(ENGRAFT_MISUSE);
            (misuse, misuse, misuse)
        });
        // SAFETY: NULL is allowed.
        let none = unsafe { settings::<Sample>(std::ptr::null()) };
        assert_eq!(none.map(|s| s.number), Ok(0));
    }

    #[test]
    fn answers_and_defaults_stay_within_the_caller_s_struct() {
        let mut later = Later { now: Sample { struct_size: 12, number: 1 }, then: 9 };
        let at = std::ptr::from_mut(&mut later).cast::<Sample>();
        // SAFETY: 12 bytes are there, and said to be.
        unsafe { answer(at, Sample { struct_size: 0, number: 5 }) }.unwrap();
        assert_eq!((later.now.struct_size, later.now.number, later.then), (12, 5, 0));
        (later.now.struct_size, later.then) = (8, 9);
        let at = std::ptr::from_mut(&mut later).cast::<Sample>();
        // SAFETY: 8 of 12 bytes are said to be there.
        unsafe { answer(at, Sample { struct_size: 0, number: 6 }) }.unwrap();
        assert_eq!((later.now.number, later.then), (6, 9));
        let at = std::ptr::from_mut(&mut later).cast::<Sample>();
        // SAFETY: as before.
        unsafe { default_settings(at, 8) }.unwrap();
        assert_eq!((later.now.struct_size, later.now.number, later.then), (8, 0, 9));
        let at = std::ptr::from_mut(&mut later).cast::<Sample>();
        // SAFETY: refused before anything is written.
        assert_eq!(unsafe { default_settings(at, 4) }.unwrap_err().code, ENGRAFT_MISUSE);
    }

    #[test]
    fn texts_are_copied_whole_or_cut_between_characters() {
        let copy = |capacity: usize| {
            let (mut buffer, mut length) = ([b'x'; 8], 0);
            // SAFETY: the buffer has 8 bytes, and no capacity below is larger.
            let done = unsafe { copy_text("añ", buffer.as_mut_ptr().cast(), capacity, &mut length) };
            (done.map_err(|failure| failure.code), length, buffer)
        };
        assert_eq!(copy(4), (Ok(()), 3, *b"a\xc3\xb1\0xxxx"));
        assert_eq!(copy(3), (Err(ENGRAFT_TOO_SMALL), 3, *b"a\0xxxxxx"));
        assert_eq!(copy(1), (Err(ENGRAFT_TOO_SMALL), 3, *b"\0xxxxxxx"));
        assert_eq!(copy(0), (Ok(()), 3, *b"xxxxxxxx"));
        // SAFETY: NULL is allowed.
        let none = unsafe { copy_text("a", std::ptr::null_mut(), 5, std::ptr::null_mut()) };
        assert_eq!(none.unwrap_err().code, ENGRAFT_MISUSE);
    }

    #[test]
    fn texts_of_the_caller_are_checked() {
        // SAFETY: the lengths are those of the texts, or NULL is given.
        unsafe {
            assert_eq!(text(c"abc".as_ptr(), 2, "it"), Ok("ab"));
            assert_eq!(text(std::ptr::null(), 0, "it"), Ok(""));
            assert_eq!(text(std::ptr::null(), 1, "it").unwrap_err().code, ENGRAFT_MISUSE);
            assert_eq!(text(c"a\xff".as_ptr(), 2, "it").unwrap_err().code, ENGRAFT_MISUSE);
            assert_eq!(text(c"a".as_ptr(), usize::MAX, "it").unwrap_err().code, ENGRAFT_MISUSE);
            assert!(path(c"".as_ptr(), 0, "it").is_err());
        }
    }

    #[test]
    fn zero_is_the_default_and_the_range_holds() {
        let of = |value| number(value, (0.8, Some(0.0)), 0.0..=1.0, "it").map_err(|failure| failure.code);
        assert_eq!((of(0.0), of(-1.0), of(0.5)), (Ok(0.8), Ok(0.0), Ok(0.5)));
        assert_eq!((of(2.0), of(f64::NAN)), (Err(ENGRAFT_MISUSE), Err(ENGRAFT_MISUSE)));
    }
}
