//! Data: formats, masks, refusals, splits and batches, on small hand-made files and on the real ones.

use crate::vocab_file::{SMOLLM2_TEMPLATE, shared, vocabulary};
use engraft_runtime::data::batches::{NO_TARGET, in_order};
use engraft_runtime::data::jsonl::LINE_BYTES_MAX;
use engraft_runtime::data::source::part_file;
use engraft_runtime::data::{
    Batch, Batches, Cursor, DataOptions, Dataset, Example, Format, OverLong, Part, load, load_train_valid,
    split,
};
use engraft_runtime::model::chat::{ChatTemplate, Message, TemplateKind};
use engraft_runtime::model::tokenizer::{Tokenizer, TokenizerSpec};
use engraft_runtime::{Error, ErrorKind};
use std::path::{Path, PathBuf};

/// A vocabulary of single bytes with ChatML's tokens, so that the tests need no file: id = byte for
/// ASCII, 128 end of text, 129 and 130 begin and end of turn.
fn byte_tokenizer() -> Tokenizer {
    let tokens: Vec<String> = (0..128u32)
        .map(|b| match b {
            0x21..=0x7E => char::from(b as u8).to_string(),
            0..=0x20 => char::from_u32(0x100 + b).unwrap().to_string(),
            _ => char::from_u32(0x121).unwrap().to_string(),
        })
        .chain(["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(String::from))
        .collect();
    let mut token_types = vec![1; 128];
    token_types.extend([3; 3]);
    let tokens = tokens.iter().map(String::as_str).collect();
    let (model, pre, eos) = ("gpt2", Some("smollm"), Some(128));
    Tokenizer::new(&TokenizerSpec { model, pre, tokens, token_types, eos, ..TokenizerSpec::default() })
        .unwrap()
}

struct Room {
    folder: tempfile::TempDir,
    tokenizer: Tokenizer,
    chat: ChatTemplate,
    options: DataOptions,
}

impl Room {
    fn new(instruct: bool) -> Room {
        let tokenizer = byte_tokenizer();
        let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
        let chat = ChatTemplate::new(instruct.then_some(template), &tokenizer).unwrap();
        let options = DataOptions { max_seq_length: 4096, ..DataOptions::default() };
        Room { folder: tempfile::tempdir().unwrap(), tokenizer, chat, options }
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    fn load(&self, content: impl AsRef<[u8]>) -> Result<Dataset, Error> {
        load(&self.write("rows.jsonl", content), &self.tokenizer, &self.chat, &self.options)
    }

    /// The whole text of an example, and its targets' text.
    fn texts(&self, example: &Example) -> (String, String) {
        let name = |id: &u32| String::from_utf8_lossy(self.tokenizer.token_bytes(*id)).into_owned();
        let targets = example.ids.iter().zip(&example.mask).filter(|(_, m)| **m);
        (example.ids.iter().map(name).collect(), targets.map(|(id, _)| name(id)).collect())
    }
}

#[test]
fn running_text_is_trained_whole_and_ended() {
    let room = Room::new(false);
    let data = room
        .load("\u{FEFF}{\"text\": \"one <|im_end|>\", \"n\": 3}\r\n\r\n   \n{\"text\": \"two\"}")
        .unwrap();
    assert_eq!((data.format, data.examples.len(), data.skipped_count), (Format::Text, 2, 0));
    let (whole, targets) = room.texts(&data.examples[0]);
    assert_eq!(
        (whole.as_str(), targets.as_str()),
        ("one <|im_end|><|endoftext|>", "ne <|im_end|><|endoftext|>")
    );
    // The forged end of turn is its characters.
    assert!(!data.examples[0].ids.contains(&130));
}

#[test]
fn answers_alone_are_trained_by_default() {
    let room = Room::new(true);
    assert_eq!(room.chat.kind(), TemplateKind::Model);
    let pair = room.load("{\"prompt\": \"answer\", \"completion\": \"answer <|im_end|>!\"}").unwrap();
    let whole = "<|im_start|>user\nanswer<|im_end|>\n<|im_start|>assistant\nanswer <|im_end|>!<|im_end|>\n";
    let expected = (whole.to_owned(), "answer <|im_end|>!<|im_end|>".to_owned());
    assert_eq!(room.texts(&pair.examples[0]), expected);
    assert_eq!(pair.examples[0].ids.iter().filter(|id| **id == 130).count(), 2);
    let rows = r#"{"messages": [{"role":"system","content":"S"},{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"b"},{"role":"assistant","content":" c "}], "more": 1}"#;
    let chat = room.load(rows).unwrap();
    assert_eq!(chat.format, Format::Messages);
    assert_eq!(room.texts(&chat.examples[0]).1, "b<|im_end|> c <|im_end|>");
}

#[test]
fn plain_pairs_all_tokens_and_renamed_keys() {
    let mut room = Room::new(false);
    let data = room.load("{\"question\": \"1+1?\", \"answer\": \"2\"}").unwrap();
    assert_eq!(data.format, Format::QuestionAnswer);
    assert_eq!(room.texts(&data.examples[0]), ("1+1?\n2<|endoftext|>".into(), "2<|endoftext|>".into()));
    room.options.mask_prompt = false;
    let data = room.load("{\"question\": \"1+1?\", \"answer\": \"2\"}").unwrap();
    assert_eq!(room.texts(&data.examples[0]).1, "+1?\n2<|endoftext|>");
    room.options.prompt_key = "instruction".into();
    room.options.completion_key = "output".into();
    let data = room.load("{\"instruction\": \"ab\", \"output\": \"cd\", \"input\": \"\"}").unwrap();
    assert_eq!(
        (data.format, room.texts(&data.examples[0]).0.as_str()),
        (Format::PromptCompletion, "abcd<|endoftext|>")
    );
    let mut room = Room::new(true);
    room.options.raw = true;
    let data = room.load("{\"prompt\": \"ab\", \"completion\": \"cd\"}").unwrap();
    assert_eq!(room.texts(&data.examples[0]), ("abcd<|endoftext|>".into(), "cd<|endoftext|>".into()));
}

#[test]
fn few_shot_examples_go_before_a_row_and_are_no_targets() {
    let mut room = Room::new(true);
    let row = r#"{"messages": [{"role":"system","content":"S"},{"role":"user","content":"a"},{"role":"assistant","content":"bcd"}]}"#;
    let plain = room.load(row).unwrap();
    room.options.few_shot = vec![Message::new("user", "q"), Message::new("assistant", "r")];
    let after = room.load(row).unwrap();
    let turn = |role: &str, content: &str| format!("<|im_start|>{role}\n{content}<|im_end|>\n");
    let whole = [turn("system", "S"), turn("user", "q"), turn("assistant", "r"), turn("user", "a")].concat();
    let whole = whole + &turn("assistant", "bcd");
    assert_eq!(room.texts(&after.examples[0]), (whole.clone(), "bcd<|im_end|>".into()));
    // The split goes by the row alone, and so does the limit: what it cuts is cut after the examples too.
    assert_eq!(plain.keys, after.keys);
    room.options.max_seq_length = plain.examples[0].ids.len() - 5;
    let cut = room.load(row).unwrap();
    let kept = whole.strip_suffix("cd<|im_end|>\n").unwrap();
    assert_eq!(room.texts(&cut.examples[0]), (kept.into(), "b".into()));
    // What is no conversation has no place for examples, and all tokens would be the examples' too.
    assert_eq!(room.load("{\"text\": \"x y\"}").unwrap_err().kind(), ErrorKind::BadData);
    room.options.mask_prompt = false;
    assert_eq!(room.load(row).unwrap_err().kind(), ErrorKind::BadData);
}

#[test]
fn an_answer_that_the_template_leaves_open_gets_an_end() {
    let mut room = Room::new(true);
    let open = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    room.chat = ChatTemplate::new(Some(open), &room.tokenizer).unwrap();
    let data = room.load("{\"prompt\": \"q\", \"completion\": \"a\"}").unwrap();
    assert_eq!(
        room.texts(&data.examples[0]),
        ("user: q\nassistant: a<|endoftext|>".into(), "a<|endoftext|>".into())
    );
}

#[test]
fn every_bad_row_is_counted_and_named() {
    let mut room = Room::new(true);
    room.options.max_seq_length = 60;
    let mut content = Vec::new();
    let rows: [(&[u8], &str); 11] = [
        (b"{\"prompt\": \"p\", \"completion\": \"c\"}", ""),
        (b"{\"prompt\": \"p\", \"completion\": \"c\"", "ends too early"),
        (b"[1, 2]", "not a JSON object"),
        (b"secret words", "not JSON"),
        (b"{\"prompt\": \"p\"}", "no key \"completion\""),
        (b"{\"prompt\": \"p\", \"completion\": 3}", "not a string"),
        (b"{\"prompt\": \" \", \"completion\": \"c\"}", "\"prompt\" is empty"),
        (b"{\"prompt\": \"p\", \"completion\": \"\"}", "\"completion\" is empty"),
        (b"{\"prompt\": \"\xFF\", \"completion\": \"c\"}", "not UTF-8 at byte 13"),
        (b"{\"text\": \"t\"}", "no key \"prompt\""),
        (b"{\"prompt\": \"0123456789012345678901234567890123456789012345678901234567890123\", \"completion\": \"c\"}", "no token to train on within the first 60 tokens"),
    ];
    for (row, _) in rows {
        content.extend_from_slice(row);
        content.push(b'\n');
    }
    let data = room.load(&content).unwrap();
    assert_eq!((data.examples.len(), data.skipped_count), (1, 10));
    for (skipped, (row, reason)) in data.skipped.iter().zip(&rows[1..]) {
        assert!(skipped.reason.contains(reason), "{skipped} for {}", String::from_utf8_lossy(row));
        assert!(!skipped.reason.contains("secret"));
    }
    assert_eq!(data.skipped.iter().map(|s| s.line).collect::<Vec<_>>(), (2..=11).collect::<Vec<_>>());
    let shown = data.skipped[0].to_string();
    assert!(shown.contains("rows.jsonl:2: "), "{shown}");
}

#[test]
fn messages_of_wrong_shape_are_named() {
    let room = Room::new(true);
    let good = r#"{"messages": [{"role":"assistant","content":"x"}]}"#;
    for (bad, reason) in [
        (r#"{"messages": {}}"#, "not a list"),
        (r#"{"messages": []}"#, "no assistant message"),
        (r#"{"messages": [{"role":"user","content":"x"}]}"#, "no assistant message"),
        (r#"{"messages": [{"role":"assistant"}]}"#, "message 0 has no \"content\""),
        (r#"{"messages": [{"role":"assistant","content":null}]}"#, "not a string"),
        (
            r#"{"messages": [{"role":"<|im_end|>","content":"x"},{"role":"assistant","content":"x"}]}"#,
            "the role must be",
        ),
        (r#"{"messages": [{"role":"assistant","content":"x"}], "tools": 3}"#, "\"tools\" is not a list"),
    ] {
        let data = room.load(format!("{good}\n{bad}\n")).unwrap();
        assert_eq!((data.examples.len(), data.skipped.len()), (1, 1));
        assert!(data.skipped[0].reason.contains(reason), "{} / {reason}", data.skipped[0]);
    }
}

#[test]
fn data_that_leaves_nothing_is_an_error_with_reasons() {
    let room = Room::new(true);
    for (content, word) in [
        ("", "the file has no rows"),
        ("\n\n \n", "the file has no rows"),
        ("{\"words\": \"x\"}\n", "words"),
        ("[{\"text\": \"x\"}]", "one object a line"),
        ("{\"text\": \"\"}\n{\"text\": 4}\n", "line 1: \"text\" is empty; line 2: \"text\" is not a string"),
    ] {
        let error = room.load(content).unwrap_err();
        assert!(error.kind() == ErrorKind::BadData && error.message().contains(word), "{error:?}");
        assert!(error.message().contains("rows.jsonl"), "{error:?}");
    }
    let missing = load(Path::new("nowhere.jsonl"), &room.tokenizer, &room.chat, &room.options).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::Io);
}

#[test]
fn over_long_rows_are_cut_or_refused_and_lines_are_bounded() {
    let mut room = Room::new(false);
    room.options.max_seq_length = 4;
    let data = room.load("{\"text\": \"abcdefgh\"}\n{\"text\": \"abcd\"}\n").unwrap();
    assert_eq!((data.truncated, data.rows_max()), (1, 4));
    assert_eq!(room.texts(&data.examples[0]).0, "abcde");
    assert_eq!(room.texts(&data.examples[1]).0, "abcd<|endoftext|>");
    room.options.over_long = OverLong::Refuse;
    let error = room.load("{\"text\": \"abcd\"}\n{\"text\": \"abcdefgh\"}\n").unwrap_err();
    assert!(error.kind() == ErrorKind::BadData && error.message().contains("rows.jsonl:2: "), "{error:?}");
    let mut content = format!("{{\"text\": \"{}\"}}\n", "x".repeat(LINE_BYTES_MAX)).into_bytes();
    content.extend_from_slice(b"{\"text\": \"ab\"}");
    let data = room.load(&content).unwrap();
    assert_eq!((data.examples.len(), data.skipped.len(), data.skipped[0].line), (1, 1, 1));
    assert!(data.skipped[0].reason.contains("longer than"));
}

fn rows(n: usize) -> String {
    (0..n).map(|i| format!("{{\"text\": \"row {i} {}\"}}\n", "z".repeat(i % 7))).collect()
}

#[test]
fn splits_are_seeded_stable_and_whole() {
    let room = Room::new(false);
    let data = room.load(rows(200)).unwrap();
    let ids = |d: &Dataset| d.examples.iter().map(|e| e.ids.clone()).collect::<Vec<_>>();
    let (train, valid) = split(data.clone(), 0.1, 7);
    assert_eq!((train.examples.len(), valid.examples.len()), (180, 20));
    let mut all = [ids(&train), ids(&valid)].concat();
    let mut whole = ids(&data);
    all.sort();
    whole.sort();
    assert_eq!(all, whole);
    assert_eq!(ids(&split(data.clone(), 0.1, 7).1), ids(&valid));
    assert_ne!(ids(&split(data.clone(), 0.1, 8).1), ids(&valid));
    let mut reversed = data.clone();
    reversed.examples.reverse();
    reversed.keys.reverse();
    let mut other = ids(&split(reversed, 0.1, 7).1);
    other.reverse();
    assert_eq!(other, ids(&valid));
    assert_eq!(split(data.clone(), 0.0, 7).1.examples.len(), 0);
    assert_eq!(split(room.load(rows(2)).unwrap(), 0.001, 7).1.examples.len(), 1);
    assert_eq!(split(room.load(rows(1)).unwrap(), 0.9, 7).1.examples.len(), 0);
}

#[test]
fn directories_give_their_parts_and_duplicates_are_told() {
    let mut room = Room::new(false);
    let folder = room.folder.path().to_owned();
    let read = |room: &Room| load_train_valid(&folder, &room.tokenizer, &room.chat, &room.options);
    assert_eq!(read(&room).unwrap_err().kind(), ErrorKind::BadData);
    room.write("letters.jsonl", rows(20));
    let one = read(&room).unwrap();
    assert_eq!((one.train.examples.len(), one.valid.examples.len(), one.split_by_seed), (18, 2, true));
    room.write("other.jsonl", rows(3));
    assert!(read(&room).unwrap_err().message().contains("train.jsonl"));
    room.write("train.jsonl", rows(10));
    room.write("valid.jsonl", "{\"text\": \"row 3 zzz\"}\n{\"text\": \"new\"}\n");
    let two = read(&room).unwrap();
    assert_eq!((two.train.examples.len(), two.valid.examples.len()), (10, 2));
    assert_eq!((two.split_by_seed, two.duplicates), (false, 1));
    assert_eq!(part_file(&folder, Part::Test).unwrap(), None);
    room.options.valid_fraction = 1.0;
    assert_eq!(read(&room).unwrap_err().kind(), ErrorKind::Misuse);
}

#[test]
fn batches_predict_the_next_token_and_cover_an_epoch() {
    let room = Room::new(false);
    let data = room.load(rows(23)).unwrap();
    let mut batch = Batch::default();
    batch.push(&Example { ids: vec![5, 6, 7], mask: vec![false, false, true] });
    batch.push(&Example { ids: vec![8, 9], mask: vec![false, true] });
    assert_eq!(
        (batch.ids, batch.targets, batch.seqs),
        (vec![5, 6, 8], vec![NO_TARGET, 7, 9], vec![0..2, 2..3])
    );
    let batches = Batches::new(&data.examples, 4, 1, Cursor::default());
    let (per_epoch, most) = (batches.batches_per_epoch(), batches.max_tokens());
    assert_eq!(per_epoch, 6);
    let two: Vec<Batch> = batches.take(2 * per_epoch).collect();
    assert!(two.iter().all(|b| b.rows() <= most && b.seqs.last().unwrap().end == b.rows()));
    let trained = |batches: &[Batch]| batches.iter().map(Batch::trained_tokens).sum::<usize>();
    assert_eq!(trained(&two[..6]), data.trained_tokens());
    assert_eq!(trained(&two[6..]), data.trained_tokens());
    assert_ne!(two[..6], two[6..]);
    assert_eq!(trained(&in_order(&data.examples, 5).collect::<Vec<_>>()), data.trained_tokens());
    assert_eq!(Batches::new(&[], 4, 1, Cursor::default()).next(), None);
}

#[test]
fn a_cursor_resumes_exactly() {
    let room = Room::new(false);
    let data = room.load(rows(11)).unwrap();
    let straight: Vec<Batch> = Batches::new(&data.examples, 3, 9, Cursor::default()).take(20).collect();
    for stop in 0..20 {
        let mut first = Batches::new(&data.examples, 3, 9, Cursor::default());
        first.by_ref().take(stop).for_each(drop);
        let resumed = Batches::new(&data.examples, 3, 9, first.cursor());
        assert_eq!(resumed.take(20 - stop).collect::<Vec<_>>(), straight[stop..], "{stop}");
    }
    let other: Vec<Batch> = Batches::new(&data.examples, 3, 10, Cursor::default()).take(20).collect();
    assert_ne!(other, straight);
}

#[test]
fn real_data_loads_whole() {
    let Some(metadata) = vocabulary("smollm2") else { return };
    let tokenizer = Tokenizer::new(&metadata.spec()).unwrap();
    let chat = ChatTemplate::new(Some(SMOLLM2_TEMPLATE), &tokenizer).unwrap();
    let options = DataOptions { max_seq_length: 2048, ..DataOptions::default() };
    let Some(gsm8k) = shared("data/gsm8k") else { return };
    let start = std::time::Instant::now();
    let data = load_train_valid(&gsm8k, &tokenizer, &chat, &options).unwrap();
    eprintln!("gsm8k: {} trained tokens in {:?}", data.train.trained_tokens(), start.elapsed());
    assert_eq!((data.train.format, data.split_by_seed), (Format::QuestionAnswer, true));
    assert_eq!(data.train.examples.len() + data.valid.examples.len(), 7473);
    assert_eq!((data.train.skipped_count, data.train.truncated, data.valid.examples.len()), (0, 0, 747));
    let example = &data.train.examples[0];
    let masked = |wanted: bool| -> Vec<u32> {
        example.ids.iter().zip(&example.mask).filter(|(_, m)| **m == wanted).map(|(id, _)| *id).collect()
    };
    let answer = masked(true);
    assert_eq!(answer.last().copied(), tokenizer.eos());
    let text = tokenizer.decode(&answer);
    assert!(text.contains("####") && !text.contains("SmolLM"), "{text}");
    assert!(tokenizer.decode(&masked(false)).contains("named SmolLM"));
    let test = load(&gsm8k.join("test.jsonl"), &tokenizer, &chat, &options).unwrap();
    assert_eq!(test.examples.len(), 1319);
    let Some(letters) = shared("data/personal") else { return };
    let options = DataOptions { max_seq_length: 256, ..options };
    let data = load_train_valid(&letters, &tokenizer, &chat, &options).unwrap();
    assert_eq!(data.train.format, Format::Text);
    assert_eq!((data.train.examples.len(), data.valid.examples.len()), (220, 25));
    assert!(data.train.truncated > 0 && data.train.rows_max() == 256);
    let Some(list) = shared("data/instruct/rasbt_instruction_1100.json") else { return };
    let error = load(&list, &tokenizer, &chat, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadData);
}
