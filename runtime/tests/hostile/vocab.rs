//! Vocabularies whose tokens make the search for special ones, or the decoding of one, slow.

use engraft_runtime::model::tokenizer::{Special, Tokenizer, TokenizerSpec};
use engraft_runtime::{ErrorKind, Result};

use crate::hostile::run::{Clock, TIME_MAX};

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER: i32 = 4;

/// A vocabulary of SentencePiece's kind: `a`, and tokens of these kinds.
fn tokenizer(tokens: &[(String, i32)]) -> Result<Tokenizer> {
    let (mut texts, mut token_types) = (vec!["<unk>", "a"], vec![2, NORMAL]);
    texts.extend(tokens.iter().map(|(text, _)| text.as_str()));
    token_types.extend(tokens.iter().map(|(_, kind)| kind));
    let scores = vec![0.0; texts.len()];
    Tokenizer::new(&TokenizerSpec {
        model: "llama",
        tokens: texts,
        token_types,
        scores,
        ..Default::default()
    })
}

#[track_caller]
fn in_time<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let clock = Clock::start();
    let result = work();
    let time = clock.time();
    eprintln!("{what}: {} ms", time.as_millis());
    assert!(time <= *TIME_MAX, "{what}: {time:?}");
    result
}

#[test]
fn special_tokens_without_number_are_searched_in_time() {
    let many = |kind| (0..100_000).map(|i| (format!("a{i}"), kind)).collect::<Vec<_>>();
    let long = |end: &str| (1..500).map(|n| ("a".repeat(n) + end, USER)).collect::<Vec<_>>();
    let same = vec![("aa".to_string(), CONTROL); 100_000];
    let text = "a".repeat(20_000);
    for (what, tokens) in [
        ("a hundred thousand control tokens", many(CONTROL)),
        ("a hundred thousand user-defined tokens", many(USER)),
        ("tokens of every length that all but match", long("b")),
        ("a hundred thousand equal tokens", same),
    ] {
        let tokenizer = tokenizer(&tokens).expect("a vocabulary");
        for special in [Special::Plain, Special::Parse] {
            let ids = in_time(&format!("{what}, {special:?}"), || tokenizer.encode(&text, special));
            assert_eq!(
                tokenizer.decode(&ids).is_empty(),
                what.contains("equal") && special == Special::Parse
            );
        }
    }
    let refused = tokenizer(&[("b".repeat(513), CONTROL)]).err().expect("an error");
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(refused.message().contains("512 are allowed"), "{refused}");
}

#[test]
fn a_token_of_broken_bytes_is_decoded_in_time() {
    let (broken, whole) = ("ÿ".repeat(1 << 20), "Ã©");
    // In GPT-2's alphabet ÿ is the byte ff; Ã and © are the two of é.
    let tokens = vec![broken.as_str(), whole, "Ã", "©", "â", "Ĥ¬"];
    let token_types = vec![NORMAL; tokens.len()];
    let spec = TokenizerSpec { model: "gpt2", pre: Some("gpt-2"), tokens, token_types, ..Default::default() };
    let tokenizer = Tokenizer::new(&spec).expect("a vocabulary");
    let text = in_time("a million broken bytes", || tokenizer.decode(&[0]));
    assert!(text.chars().count() == 1 << 20 && text.chars().all(|c| c == '\u{FFFD}'));
    for (ids, wanted) in [
        (&[1][..], "é"),
        (&[2, 3], "é"),
        (&[2, 2, 3], "\u{FFFD}é"),
        (&[4, 5], "€"),
        (&[4, 1], "\u{FFFD}é"),
        (&[3, 2], "\u{FFFD}\u{FFFD}"),
        (&[1, 4], "é\u{FFFD}"),
    ] {
        assert_eq!(tokenizer.decode(ids), wanted, "{ids:?}");
    }
}
