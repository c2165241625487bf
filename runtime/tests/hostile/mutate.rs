//! Changes of good inputs that know what they change: lengths, counts, types and places are exchanged,
//! doubled, dropped and set to the numbers at which arithmetic breaks; records move; and bytes are damaged.
//!
//! A case follows from the seed and its own number alone, so that each can be run again by itself.

use crate::common::writer::{self, Kv, Writer};
use crate::hostile::reseal::reseal;
use crate::hostile::subject::{MLX_CONFIG, PEFT_CONFIG, small_peft};
use crate::hostile::tensors::{engraft, gguf_adapter};

/// SplitMix64.
pub(crate) struct Dice(u64);

impl Dice {
    /// The dice of one case.
    pub(crate) fn new(seed: u64, case: u64) -> Dice {
        let mut dice = Dice(seed ^ case.wrapping_mul(0xd134_2543_de82_ef95));
        dice.roll();
        dice
    }

    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`, which is not 0.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.roll() % n as u64) as usize
    }

    fn one_of<T: Clone>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())].clone()
    }

    /// A number at which something may break.
    fn extreme(&mut self) -> u64 {
        let near = self.roll() % 5;
        match self.below(6) {
            0 => near,
            1 => (1u64 << self.below(64)).wrapping_add(near).wrapping_sub(2),
            2 => u64::MAX - near,
            3 => (u64::MAX / (1 + self.roll() % 64)).wrapping_add(near),
            4 => 1 << self.below(20),
            _ => self.roll() >> self.below(64),
        }
    }
}

/// Damage that knows nothing of a format.
fn damage(bytes: &mut Vec<u8>, dice: &mut Dice) {
    if bytes.is_empty() {
        return bytes.push(dice.roll() as u8);
    }
    let at = dice.below(bytes.len());
    let to = at + dice.below((bytes.len() - at).min(64) + 1);
    match dice.below(8) {
        0 | 1 => bytes[at] ^= 1 << dice.below(8),
        2 => bytes[at] = dice.roll() as u8,
        3 => bytes.truncate(at),
        4 => drop(bytes.drain(at..to)),
        5 => {
            let piece = bytes[at..to].to_vec();
            let place = dice.below(bytes.len());
            bytes.splice(place..place, piece);
        }
        6 => {
            let width = dice.one_of(&[1, 2, 4, 8]);
            let number = dice.extreme().to_le_bytes();
            bytes[at..].iter_mut().zip(&number[..width]).for_each(|(b, n)| *b = *n);
        }
        _ => bytes.extend_from_within(at..to),
    }
}

/// Moves, doubles or drops an item of a list.
fn shuffle<T: Clone>(items: &mut Vec<T>, dice: &mut Dice) {
    if items.is_empty() {
        return;
    }
    let (from, to) = (dice.below(items.len()), dice.below(items.len()));
    match dice.below(3) {
        0 => items.insert(to, items[from].clone()),
        1 => drop(items.remove(from)),
        _ => items.swap(from, to),
    }
}

/// A GGUF file: a model or an adapter.
pub(crate) fn gguf(dice: &mut Dice) -> Vec<u8> {
    let mut w = if dice.below(8) == 0 { gguf_adapter() } else { chatty() };
    for _ in 0..1 + dice.below(3) {
        change_gguf(&mut w, dice);
    }
    let mut bytes = w.bytes();
    bytes.truncate(1 << 20);
    if dice.below(3) == 0 {
        damage(&mut bytes, dice);
    }
    bytes
}

/// The tiny model with a chat template, which is then a part of what is opened.
fn chatty() -> Writer {
    let mut w = writer::tiny();
    w.set("tokenizer.chat_template", writer::strv(TEMPLATES[0]));
    w
}

fn change_gguf(w: &mut Writer, dice: &mut Dice) {
    let extreme = dice.extreme();
    if w.tensors.is_empty() || w.kv.is_empty() {
        return;
    }
    let (kv, t) = (dice.below(w.kv.len()), dice.below(w.tensors.len()));
    match dice.below(20) {
        0 => w.n_kv = Some(extreme),
        1 => w.n_tensors = Some(extreme),
        2 => w.version = dice.one_of(&[0, 1, 2, 2, 2, 3, 4, 0x0300_0000, u32::MAX]),
        3 => w.kv[kv].key_len = Some(extreme),
        4 => w.kv[kv].value.0 = dice.below(15) as u32,
        5 => shuffle(&mut w.kv, dice),
        6 => shuffle(&mut w.tensors, dice),
        7 => {
            let other: Kv = dice.one_of(&w.kv);
            w.kv[kv].value = other.value;
        }
        8 | 9 => change_value(&mut w.kv[kv].value.1, extreme, dice),
        10 => w.kv[kv].value = writer::arrv(dice.below(14) as u32, extreme, &[]),
        11 => damage(&mut w.kv[kv].key, dice),
        12 => damage(&mut w.kv[kv].value.1, dice),
        13 => w.tensors[t].n_dims = Some(extreme as u32 % 8),
        14 => {
            let d = dice.below(w.tensors[t].dims.len().max(1));
            w.tensors[t].dims.get_mut(d).into_iter().for_each(|v| *v = extreme);
        }
        15 => shuffle(&mut w.tensors[t].dims, dice),
        16 => w.tensors[t].dtype = dice.below(48) as u32,
        17 => w.tensors[t].offset = Some(if dice.below(2) == 0 { extreme & !31 } else { extreme }),
        18 => w.tensors[t].name_len = Some(extreme),
        _ => w.tensors[t].name = dice.one_of(&w.tensors).name,
    }
}

/// Another number in the same width, or at one of the places where a number lies in a text or an array.
fn change_value(value: &mut [u8], extreme: u64, dice: &mut Dice) {
    let at = if value.len() > 8 { dice.one_of(&[0, 4, 8, 12, value.len() - 8]) } else { 0 };
    let room = value.len() - at.min(value.len());
    let width = room.min(dice.one_of(&[4, 8]));
    let at = at.min(value.len());
    value[at..at + width].copy_from_slice(&extreme.to_le_bytes()[..width]);
}

/// A frame whose checksums are right again after the change, most of the time.
pub(crate) fn frame(dice: &mut Dice) -> Vec<u8> {
    let overrides = [(None, 0u8, Some(3u32), None), (Some(2), 0, None, Some(9.0f32))];
    let n = dice.below(3);
    let mut bytes = engraft(&[1, 2], &overrides[..n], 2, 8.0);
    let header = u32::from_le_bytes(bytes[64..68].try_into().expect("four bytes")) as usize;
    let table = 80 + header + 4;
    for _ in 0..1 + dice.below(2) {
        let extreme = dice.extreme().to_le_bytes();
        let (at, width) = match dice.below(6) {
            0 => dice.one_of(&[(8, 2), (10, 2), (12, 4), (16, 8), (24, 8), (64, 4), (68, 4), (72, 4)]),
            1 | 2 => (80 + dice.below(header), 1),
            3 => dice.one_of(&[(table, 1), (table + 4, 4), (table + 20, 4), (table + 24, 8)]),
            4 => (table + 36 + dice.below(64), 4),
            _ => (dice.below(bytes.len() - 8), 8),
        };
        bytes[at..at + width].copy_from_slice(&extreme[..width]);
    }
    if dice.below(8) > 0 {
        // The header's length decides where the sums lie: a changed one goes in behind them.
        let length: [u8; 4] = bytes[64..68].try_into().expect("four bytes");
        bytes[64..68].copy_from_slice(&(header as u32).to_le_bytes());
        reseal(&mut bytes).expect("a whole frame");
        if length != bytes[64..68] {
            bytes[64..68].copy_from_slice(&length);
            let crc = engraft_codec::Crc32c::of(&bytes[..76]).to_le_bytes();
            bytes[76..80].copy_from_slice(&crc);
        }
    }
    if dice.below(6) == 0 {
        damage(&mut bytes, dice);
    }
    bytes
}

/// Where the numbers, texts and literals of JSON or TOML stand, and its punctuation.
fn words(text: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let (mut within, mut escaped) = (false, false);
    for c in text.chars() {
        let joins = within || c.is_alphanumeric() || matches!(c, '.' | '-' | '+' | '_');
        match words.last_mut() {
            Some(word)
                if joins
                    && (within || word.ends_with(|l: char| l.is_alphanumeric() || "._-+".contains(l))) =>
            {
                word.push(c);
            }
            _ => words.push(c.into()),
        }
        if c == '"' && !escaped {
            within = !within;
        }
        escaped = within && c == '\\' && !escaped;
    }
    words
}

const NASTY: [&str; 24] = [
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "-0.0",
    "0.1",
    "18446744073709551616",
    "9223372036854775808",
    "16777217",
    "[]",
    "{}",
    "[[[[[[[[",
    "{\"a\":{\"a\":{\"a\":",
    "\"\"",
    "\"\\ud800\"",
    "\"\\u0000\"",
    "\"\u{202e}\u{fff00}\"",
    "\u{feff}",
    "NaN",
    ",",
    ":",
    "}",
    "\"",
];

/// Changes words: exchanged, moved, doubled, dropped, or replaced by what parsers stumble over.
fn reword(text: &str, dice: &mut Dice) -> Vec<u8> {
    let mut words = words(text);
    for _ in 0..1 + dice.below(3) {
        if words.is_empty() {
            break;
        }
        let (at, other) = (dice.below(words.len()), dice.below(words.len()));
        match dice.below(7) {
            0 => words[at] = dice.one_of(&NASTY).into(),
            1 => words[at] = dice.extreme().to_string(),
            2 => words[at] = words[other].clone(),
            3 => shuffle(&mut words, dice),
            4 => {
                let (from, to) = (at.min(other), at.max(other));
                let piece = words[from..to.min(from + 40)].to_vec();
                words.splice(at..at, piece);
            }
            5 => drop(words.drain(at.min(other)..at.max(other).min(at.min(other) + 10))),
            _ => words[at] = words[at].repeat(1 + dice.below(200)),
        }
    }
    let mut bytes = words.concat().into_bytes();
    bytes.truncate(1 << 16);
    if dice.below(6) == 0 {
        damage(&mut bytes, dice);
    }
    bytes
}

/// A safetensors file, whose header's length is right most of the time.
pub(crate) fn safetensors(dice: &mut Dice) -> Vec<u8> {
    let good = small_peft();
    let (header, data) = good[8..].split_at(good.len() - 8 - 144);
    let header = match dice.below(4) {
        0 => header.to_vec(),
        _ => reword(std::str::from_utf8(header).expect("JSON"), dice),
    };
    let length = if dice.below(10) == 0 { dice.extreme() } else { header.len() as u64 };
    let mut data = data.to_vec();
    if dice.below(4) == 0 {
        damage(&mut data, dice);
    }
    [&length.to_le_bytes(), &header[..], &data].concat()
}

/// Settings of PEFT or mlx_lm.
pub(crate) fn adapter_config(dice: &mut Dice) -> Vec<u8> {
    const LONG: &str = r#"{"peft_type":"LORA","r":2,"lora_alpha":4.0,"lora_dropout":0.1,"bias":"none","task_type":"CAUSAL_LM","use_rslora":false,"use_dora":false,"target_modules":["q_proj"],"layers_to_transform":[1],"rank_pattern":{"q_proj":2},"alpha_pattern":{"^model.layers.1.self_attn.q_proj":4},"init_lora_weights":true,"modules_to_save":null,"base_model_name_or_path":"base"}"#;
    let good = dice.one_of(&[PEFT_CONFIG, MLX_CONFIG, LONG, LONG]);
    reword(good, dice)
}

/// Rows of one format, or of several.
pub(crate) fn jsonl(dice: &mut Dice) -> Vec<u8> {
    const ROWS: [&str; 6] = [
        r#"{"text":"a cab \u00e9\ud83d\ude00"}"#,
        r#"{"prompt":"a","completion":"b"}"#,
        r#"{"question":"a","answer":"b #### 1"}"#,
        r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#,
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"tools":[{"name":"f","x":[1,2.5]}]}"#,
        r#"{"text":"abc","extra":[1,{"a":null}]}"#,
    ];
    let mut rows: Vec<Vec<u8>> = (0..1 + dice.below(4)).map(|_| dice.one_of(&ROWS).into()).collect();
    for row in &mut rows {
        if dice.below(2) == 0 {
            *row = reword(std::str::from_utf8(row).expect("a good row"), dice);
        }
    }
    let end = dice.one_of(&["\n", "\n", "\n", "\r\n", "\r", "\n\n"]);
    let mut bytes = rows.join(end.as_bytes());
    if dice.below(8) == 0 {
        bytes.splice(0..0, *b"\xef\xbb\xbf");
    }
    bytes
}

const TEMPLATES: [&str; 5] = [
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'a' \
     }}{% endif %}",
    "{%- set ns = namespace(n=0, list=[], last='') -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}{%- set ns.list = ns.list + \
     [m.role] -%}{%- if m.role == 'user' and loop.first -%}{{ m.content | trim }}{%- elif not loop.last -%}{{ m.content.strip() }}{%- \
     else -%}{{ ns.list | join(',') }}{%- endif -%}{%- endfor -%}",
    "{% macro show(v, n=0) %}{% if v is mapping %}{% for k, x in v.items() %}{{ k }}{{ show(x, n + 1) }}{% endfor %}{% elif n < 9 \
     %}{{ v | tojson(indent=2) }}{% endif %}{% endmacro %}{% if tools %}{{ show(tools[0]) }}{% endif %}",
    "{% set x = [1, (2, 3), {'a': 'b'}] %}{% for i in range(3) %}{{ x[i] ~ loop.index }}{% else %}{% endfor %}{{ \
     messages[0].content.split(' ')[-1].replace('a', 'b').upper() }}{{ raise_exception('no') if not messages }}",
    "{% with a = messages[1:], b = 'x' * 3 %}{{ a[0]['content'].startswith('a') }}{{ b[::-1] | length }}{% endwith %}{% filter upper \
     %}y{% endfilter %}{% set t %}{{ messages[0].content }}{% endset %}{{ t.rstrip('.').find('e') }}",
];

const EXPRESSIONS: [&str; 16] = [
    "ns.x",
    "[x, x]",
    "messages",
    "messages[0].content",
    "'a' * 100000",
    "range(100000)",
    "x | sort",
    "x | reverse | list",
    "(1, 2)",
    "{'a': x}",
    "x.split('a')",
    "x ~ x",
    "tools | tojson",
    "namespace(a=x)",
    "2 ** 100",
    "x == [x]",
];

/// A chat template of whole tags, moved, doubled and dropped, with words of their expressions exchanged.
pub(crate) fn template(dice: &mut Dice) -> Vec<u8> {
    let mut tags: Vec<String> = Vec::new();
    for _ in 0..1 + dice.below(2) {
        let source = dice.one_of(&TEMPLATES);
        tags.extend(source.split_inclusive(['}']).map(str::to_owned));
    }
    for _ in 0..1 + dice.below(4) {
        if tags.is_empty() {
            break;
        }
        let at = dice.below(tags.len());
        match dice.below(7) {
            0 | 1 => shuffle(&mut tags, dice),
            2 => tags[at] = String::from_utf8_lossy(&reword(&tags[at].clone(), dice)).into_owned(),
            3 => tags.insert(at, format!("{{{{ {} }}}}", dice.one_of(&EXPRESSIONS))),
            4 => tags.insert(at, format!("{{% set x = {} %}}", dice.one_of(&EXPRESSIONS))),
            5 => {
                let times = 1 + dice.below(300);
                tags[at] = tags[at].repeat(times);
            }
            _ => {
                let n = dice.extreme() >> 40;
                tags.insert(at, format!("{{% for x in range({n}) %}}"));
                tags.push("{% endfor %}".into());
            }
        }
    }
    let mut bytes = tags.concat().into_bytes();
    if dice.below(6) == 0 {
        damage(&mut bytes, dice);
    }
    bytes
}
