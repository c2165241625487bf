//! Digests as lowercase hexadecimal text.
//!
//! ```
//! use engraft_runtime::hex;
//!
//! assert_eq!(hex::encode(&[0xde, 0xad]), "dead");
//! assert_eq!(hex::decode(&hex::encode(&[7; 32])), Some([7; 32]));
//! ```

use std::fmt::Write as _;

/// Two digits for each byte.
pub fn encode(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a String can't fail.
        let _ = write!(out, "{byte:02x}");
    }
    out
}

/// The first 6 bytes of a digest: enough for a person to tell two apart.
pub fn short(digest: &[u8; 32]) -> String {
    encode(&digest[..6])
}

/// Parses exactly 64 digits of either case into a digest; `None` for any other text.
pub fn decode(text: &str) -> Option<[u8; 32]> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let mut digest = [0; 32];
    if pairs.len() != digest.len() || !rest.is_empty() {
        return None;
    }
    let value = |digit: u8| char::from(digit).to_digit(16);
    for (byte, [high, low]) in digest.iter_mut().zip(pairs) {
        *byte = (value(*high)? << 4 | value(*low)?) as u8;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_come_back_and_other_texts_do_not() {
        let digest: [u8; 32] = std::array::from_fn(|i| (i * 37) as u8);
        let text = encode(&digest);
        assert_eq!((text.len(), &text[..6]), (64, "00254a"));
        assert_eq!(short(&digest), text[..12]);
        assert_eq!((decode(&text), decode(&text.to_uppercase())), (Some(digest), Some(digest)));
        for other in ["", &text[..63], &format!("{text}0"), &text.replace("25", "+5"), &"é".repeat(32)] {
            assert_eq!(decode(other), None, "{other}");
        }
    }
}
