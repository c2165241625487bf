//! Household commands in plain English, each answered by one line of JSON.
//!
//! The grammar is made so that a new name is a small thing to learn: every phrasing is shared by all
//! rooms and devices, known names have synonyms (many names, one slot value), and some of the names
//! are made up and simply copied into the answer. What an adapter then has to learn about a private
//! word is the value of its slot, not how people talk.

use super::rng::Rng;
use std::collections::HashSet;

/// A command and the answer to it.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Example {
    /// What the user says.
    pub(crate) prompt: String,
    /// The JSON action, or a list of them.
    pub(crate) completion: String,
}

/// How much of what people say is two commands in one sentence.
pub(crate) const COMPOSITES: f64 = 0.18;

/// `n` different examples whose prompts are none of `held_out` (compared by [`normal_form`]); a fraction
/// of `composites` is two commands.
pub(crate) fn generate(rng: &mut Rng, n: usize, composites: f64, held_out: &HashSet<String>) -> Vec<Example> {
    let mut seen = HashSet::new();
    let mut examples = Vec::with_capacity(n);
    while examples.len() < n {
        let example = sentence(rng, composites);
        let key = normal_form(&example.prompt);
        if !held_out.contains(&key) && seen.insert(example.prompt.clone()) {
            examples.push(example);
        }
    }
    examples
}

/// A prompt without what does not change its meaning to a reader: case, punctuation, double spaces.
pub(crate) fn normal_form(prompt: &str) -> String {
    let letters: String = prompt
        .to_lowercase()
        .chars()
        .map(|c| if c.is_alphanumeric() || c == '\'' { c } else { ' ' })
        .collect();
    letters.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether every slot holds a word of the tables below, so none that was made up.
pub(crate) fn is_plain(example: &Example) -> bool {
    let tables = [ROOMS, LIGHTS, HEATERS, SPEAKERS, CLEANERS, SWITCHED, COVERS, DOORS];
    let known = |value: &str| {
        let scene = value.split_once(' ').is_some_and(|(name, _)| SCENES.contains(&name));
        let listed = ITEMS.contains(&value) || MUSIC.contains(&value);
        scene || listed || tables.iter().any(|t| t.iter().any(|(v, _)| *v == value))
    };
    let slot = |after: &str| after.split('"').next().is_some_and(known);
    ["\"what\":\"", "\"where\":\""].iter().all(|key| example.completion.split(key).skip(1).all(slot))
}

/// The command as the demo's household says it, with a private word for an everyday one; `None` if it has
/// no such word or is two commands.
pub(crate) fn in_private(example: &Example) -> Option<Example> {
    let list = |name: &str| SCENE_ACTIONS.iter().find(|(scene, _)| *scene == name).map(|(_, list)| *list);
    for (names, word, slot, meaning) in PRIVATE {
        for name in *names {
            let Some((said, word)) = [(name.to_string(), word.to_string()), (capital(name), capital(word))]
                .into_iter()
                .find(|(said, _)| example.prompt.contains(said.as_str()))
            else {
                continue;
            };
            let completion = match list(name) {
                Some(list) if list == example.completion => meaning.to_string(),
                None if !example.completion.starts_with('[') && example.completion.contains(slot) => {
                    example.completion.replace(slot, meaning)
                }
                _ => return None,
            };
            let prompt = example.prompt.replace(&said, &word).replace("on the jungle", "in the jungle");
            return Some(Example { prompt, completion });
        }
    }
    None
}

/// One request before politeness: what is said and the action it stands for.
struct Clause {
    text: String,
    json: String,
    /// Whether "could you …" may precede it.
    imperative: bool,
}

/// A name as it is said and as it stands in the answer.
#[derive(Clone)]
struct Noun {
    /// With its article: "the kitchen", "Milo's den".
    phrase: String,
    /// Without: "kitchen"; `None` where "the {bare} light" would be odd.
    bare: Option<String>,
    /// The slot's value.
    value: String,
    /// "in" or "on".
    preposition: &'static str,
}

fn sentence(rng: &mut Rng, composites: f64) -> Example {
    let first = clause(rng);
    let (mut text, json, imperative) = if rng.chance(composites) {
        let second = clause(rng);
        let joint = rng.pick(&[" and ", " and then ", ", then ", " and also ", ", and "]);
        let items = |json: &str| json.trim_start_matches('[').trim_end_matches(']').to_string();
        let json = format!("[{},{}]", items(&first.json), items(&second.json));
        (format!("{}{joint}{}", first.text, second.text), json, first.imperative && second.imperative)
    } else {
        (first.text, first.json, first.imperative)
    };
    if imperative && rng.chance(0.5) {
        text = format!("{}{text}", rng.pick(POLITE_BEFORE));
    } else if rng.chance(0.12) {
        text = format!("{}{text}", rng.pick(GREETINGS));
    }
    if rng.chance(0.35) {
        text = format!("{text}{}", rng.pick(POLITE_AFTER));
    }
    if rng.chance(0.45) {
        let question = QUESTION_WORDS.iter().any(|w| text.to_lowercase().starts_with(w));
        text += if question { "?" } else { rng.pick(&[".", ".", ".", "!"]) };
    }
    if rng.chance(0.5)
        && let Some(initial) = text.chars().next().filter(char::is_ascii_lowercase)
    {
        text.replace_range(0..1, &initial.to_ascii_uppercase().to_string());
    }
    Example { prompt: text, completion: json }
}

fn clause(rng: &mut Rng) -> Clause {
    match rng.below(100) {
        0..6 => owned(rng),
        6..34 => switch(rng),
        34..44 => cover(rng),
        44..53 => level(rng),
        53..63 => room_verb(rng),
        63..69 => vacuum(rng),
        69..75 => scene(rng),
        75..80 => timer(rng),
        80..86 => shopping(rng),
        86..91 => play(rng),
        _ => check(rng),
    }
}

/// Things with an owner and a place of their own: the name alone says what and where.
fn owned(rng: &mut Rng) -> Clause {
    let (name, what, place) = OWNED[rng.below(OWNED.len())];
    let device = Noun { phrase: name.into(), bare: None, value: what.into(), preposition: "in" };
    let place = Noun { phrase: place.into(), bare: None, value: place.into(), preposition: "in" };
    let (verb, templates, extra) = match rng.below(10) {
        0..4 => ("on", ON, String::new()),
        4..7 => ("off", OFF, String::new()),
        7..8 => ("check", CHECK, String::new()),
        _ => ("set", LEVEL, number(rng, 100).to_string()),
    };
    let (mut text, imperative) = say(rng, templates, Some(&device), None);
    text = text.replace("{be}", "is");
    let mut to = String::new();
    if verb == "set" {
        text += &format!(" {extra}{}", rng.pick(&[" percent", "%", ""]));
        to = format!(",\"to\":{extra}");
    }
    Clause {
        text,
        json: action(verb, Some(&device), Some(&place), &to),
        imperative: imperative && verb != "check",
    }
}

/// On and off.
fn switch(rng: &mut Rng) -> Clause {
    let device = if rng.chance(0.15) { made_up(rng, THINGS) } else { known(rng, SWITCHED) };
    let on = rng.chance(0.55);
    let place = rng.chance(0.5).then(|| room(rng));
    let (placed, bare) = if on { (ON_IN, ON) } else { (OFF_IN, OFF) };
    let (text, imperative) =
        say(rng, if place.is_some() { placed } else { bare }, Some(&device), place.as_ref());
    let mut clause = Clause { text, json: String::new(), imperative };
    let mut extra = String::new();
    if imperative && rng.chance(0.08) {
        let n = number(rng, 60);
        if rng.chance(0.5) {
            clause.text += &format!(" in {n} minutes");
            extra = format!(",\"in\":{n}");
        } else {
            let n = 1 + n % 12;
            clause.text += &format!(" at {n}");
            extra = format!(",\"at\":{n}");
        }
    }
    clause.json = action(if on { "on" } else { "off" }, Some(&device), place.as_ref(), &extra);
    clause
}

/// Blinds, curtains, windows, doors.
fn cover(rng: &mut Rng) -> Clause {
    if rng.chance(0.3) {
        let door = if rng.chance(0.2) { made_up(rng, THINGS) } else { known(rng, DOORS) };
        let (verb, templates) = if rng.chance(0.5) { ("lock", LOCK) } else { ("unlock", UNLOCK) };
        let (text, imperative) = say(rng, templates, Some(&door), None);
        return Clause { text, json: action(verb, Some(&door), None, ""), imperative };
    }
    let what = if rng.chance(0.2) { made_up(rng, THINGS) } else { known(rng, COVERS) };
    let place = rng.chance(0.6).then(|| room(rng));
    let open = rng.chance(0.5);
    let templates = match (open, place.is_some()) {
        (true, true) => OPEN_IN,
        (true, false) => OPEN,
        (false, true) => CLOSE_IN,
        (false, false) => CLOSE,
    };
    let (text, imperative) = say(rng, templates, Some(&what), place.as_ref());
    Clause {
        text,
        json: action(if open { "open" } else { "close" }, Some(&what), place.as_ref(), ""),
        imperative,
    }
}

/// Brightness, temperature, volume.
fn level(rng: &mut Rng) -> Clause {
    let (device, unit, n) = match rng.below(4) {
        0 => (known(rng, LIGHTS), rng.pick(&[" percent", "%", ""]), number(rng, 100)),
        1 => (known(rng, HEATERS), rng.pick(&[" degrees", "", " degrees"]), 12 + number(rng, 16)),
        2 => (known(rng, SPEAKERS), rng.pick(&["", " percent", "%"]), number(rng, 100)),
        _ => (made_up(rng, THINGS), rng.pick(&["", " percent", " degrees"]), number(rng, 100)),
    };
    let place = rng.chance(0.6).then(|| room(rng));
    let templates = if place.is_some() { LEVEL_IN } else { LEVEL };
    let (text, imperative) = say(rng, templates, Some(&device), place.as_ref());
    let text = format!("{text} {n}{unit}");
    Clause { text, json: action("set", Some(&device), place.as_ref(), &format!(",\"to\":{n}")), imperative }
}

/// Requests that name only a room.
fn room_verb(rng: &mut Rng) -> Clause {
    let place = room(rng);
    let (verb, what, templates) = ROOM_VERBS[rng.below(ROOM_VERBS.len())];
    let (mut text, imperative) = say(rng, templates, None, Some(&place));
    let mut extra = String::new();
    let mut verb = verb;
    if what == "heating" && verb == "on" && imperative && rng.chance(0.5) {
        let n = 12 + number(rng, 16);
        text += &format!(" to {n} degrees");
        extra = format!(",\"to\":{n}");
        verb = "set";
    }
    let what = Noun { phrase: String::new(), bare: None, value: what.into(), preposition: "in" };
    Clause { text, json: action(verb, Some(&what), Some(&place), &extra), imperative }
}

/// A cleaner that is sent about.
fn vacuum(rng: &mut Rng) -> Clause {
    let device = if rng.chance(0.3) { made_up(rng, THINGS) } else { known(rng, CLEANERS) };
    let place = room(rng);
    let (text, imperative) = say(rng, SEND, Some(&device), Some(&place));
    Clause { text, json: action("on", Some(&device), Some(&place), ""), imperative }
}

/// A mood of the whole house. Some stand for a list of actions, the others are passed on by name.
fn scene(rng: &mut Rng) -> Clause {
    let kind = rng.pick(&["time", "time", "time", "mode", "night", "hour"]);
    let name = match rng.below(10) {
        0..5 => SCENE_ACTIONS[rng.below(SCENE_ACTIONS.len())].0.to_string(),
        5..7 => format!("{} {kind}", rng.pick(SCENES)),
        _ => format!("{} {kind}", word(rng)),
    };
    let scene = Noun { phrase: name.clone(), bare: Some(name.clone()), value: name, preposition: "in" };
    let (text, imperative) = say(rng, SCENE, Some(&scene), None);
    let list = SCENE_ACTIONS.iter().find(|(name, _)| *name == scene.value);
    let json = list.map_or_else(|| action("scene", Some(&scene), None, ""), |(_, list)| list.to_string());
    Clause { text, json, imperative }
}

fn timer(rng: &mut Rng) -> Clause {
    let unit = rng.pick(&["minutes", "minutes", "minutes", "seconds", "hours"]);
    let n = 2 + number(rng, 88);
    let text = rng.pick(TIMER).replace("{t}", &format!("{n} {unit}"));
    Clause { text, json: format!("{{\"do\":\"timer\",\"{unit}\":{n}}}"), imperative: true }
}

fn shopping(rng: &mut Rng) -> Clause {
    let item = if rng.chance(0.2) { word(rng) } else { rng.pick(ITEMS).to_string() };
    let item = Noun { phrase: item.clone(), bare: Some(item.clone()), value: item, preposition: "in" };
    let (verb, templates) = if rng.chance(0.7) { ("add", ADD) } else { ("remove", REMOVE) };
    let (text, imperative) = say(rng, templates, Some(&item), None);
    Clause { text, json: action(verb, Some(&item), None, ""), imperative }
}

fn play(rng: &mut Rng) -> Clause {
    let music = if rng.chance(0.2) { word(rng) } else { rng.pick(MUSIC).to_string() };
    let music = Noun { phrase: music.clone(), bare: Some(music.clone()), value: music, preposition: "in" };
    let place = rng.chance(0.6).then(|| room(rng));
    let (text, imperative) =
        say(rng, if place.is_some() { PLAY_IN } else { PLAY }, Some(&music), place.as_ref());
    Clause { text, json: action("play", Some(&music), place.as_ref(), ""), imperative }
}

/// Questions about the state of something.
fn check(rng: &mut Rng) -> Clause {
    let device = match rng.below(5) {
        0 => made_up(rng, THINGS),
        1 => known(rng, COVERS),
        2 => known(rng, DOORS),
        _ => known(rng, SWITCHED),
    };
    let place = rng.chance(0.5).then(|| room(rng));
    let (text, _) = say(rng, if place.is_some() { CHECK_IN } else { CHECK }, Some(&device), place.as_ref());
    let be = if device.phrase.ends_with('s') { "are" } else { "is" };
    let text = text.replace("{be}", be);
    Clause { text, json: action("check", Some(&device), place.as_ref(), ""), imperative: false }
}

/// `{"do":…,"what":…,"where":…}` and whatever `extra` adds.
fn action(verb: &str, what: Option<&Noun>, place: Option<&Noun>, extra: &str) -> String {
    let mut json = format!("{{\"do\":\"{verb}\"");
    if let Some(what) = what {
        json += &format!(",\"what\":\"{}\"", what.value);
    }
    if let Some(place) = place {
        json += &format!(",\"where\":\"{}\"", place.value);
    }
    json + extra + "}"
}

/// A random template that suits the nouns, filled. A leading `~` marks what is no imperative.
fn say(rng: &mut Rng, templates: &[&str], device: Option<&Noun>, place: Option<&Noun>) -> (String, bool) {
    let no_bare = |noun: Option<&Noun>| noun.is_some_and(|n| n.bare.is_none());
    let template = loop {
        let t = rng.pick(templates);
        if !(t.contains("{D}") && no_bare(device) || t.contains("{R}") && no_bare(place)) {
            break t;
        }
    };
    let mut text = template.trim_start_matches('~').to_string();
    for (noun, phrase, bare, inside) in [(device, "{d}", "{D}", ""), (place, "{r}", "{R}", "{in}")] {
        let Some(noun) = noun else { continue };
        text = text.replace(phrase, &noun.phrase);
        text = text.replace(bare, noun.bare.as_deref().unwrap_or_default());
        if !inside.is_empty() {
            text = text.replace(inside, &format!("{} {}", noun.preposition, noun.phrase));
        }
    }
    (text, !template.starts_with('~'))
}

/// A name from a table of (slot value, its names).
fn known(rng: &mut Rng, table: &[(&str, &[&str])]) -> Noun {
    let (value, names) = table[rng.below(table.len())];
    let bare = rng.pick(names).to_string();
    let phrase = format!("the {bare}");
    Noun { phrase, bare: Some(bare), value: value.into(), preposition: "in" }
}

fn room(rng: &mut Rng) -> Noun {
    if rng.chance(0.15) {
        return made_up(rng, PLACES);
    }
    let mut noun = known(rng, ROOMS);
    if ["balcony", "terrace"].contains(&noun.value.as_str()) {
        noun.preposition = "on";
    }
    noun
}

/// A name nobody taught the model: "the otter", "Milo's lamp", "the velvet fox". The answer copies it.
fn made_up(rng: &mut Rng, kinds: &[&str]) -> Noun {
    match rng.below(10) {
        0..5 => {
            let bare = word(rng);
            Noun { phrase: format!("the {bare}"), value: bare.clone(), bare: Some(bare), preposition: "in" }
        }
        5..8 => {
            let tail = if rng.chance(0.7) { rng.pick(kinds).to_string() } else { word(rng) };
            let phrase = format!("{}'s {tail}", capital(&word(rng)));
            Noun { value: phrase.clone(), phrase, bare: None, preposition: "in" }
        }
        8 => {
            let bare = format!("{} {}", word(rng), word(rng));
            Noun { phrase: format!("the {bare}"), value: bare.clone(), bare: Some(bare), preposition: "in" }
        }
        _ => {
            let name = capital(&word(rng));
            Noun { phrase: name.clone(), value: name.clone(), bare: Some(name), preposition: "in" }
        }
    }
}

/// An English word out of place, or one that no dictionary has.
fn word(rng: &mut Rng) -> String {
    if rng.chance(0.75) {
        return rng.pick(WORDS).to_string();
    }
    let mut word = String::new();
    for _ in 0..1 + rng.below(2) {
        word += rng.pick(&[
            "b", "br", "c", "ch", "d", "dr", "f", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "pl", "qu",
            "r", "s", "sh", "sl", "st", "t", "tr", "v", "w", "y", "z",
        ]);
        word += rng.pick(&["a", "e", "i", "o", "u", "ee", "oo", "ai", "a", "e", "i", "o"]);
    }
    word + rng.pick(&["", "", "n", "m", "ck", "ll", "x", "st", "ve", "ng", "r", "t"])
}

fn capital(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map_or_else(String::new, |c| c.to_uppercase().chain(chars).collect())
}

/// Up to `most`, small and round numbers more often than others.
fn number(rng: &mut Rng, most: usize) -> usize {
    if rng.chance(0.4) { (1 + rng.below(most.div_ceil(5))) * 5 } else { 1 + rng.below(most) }
}

type Names = [(&'static str, &'static [&'static str])];

const ROOMS: &Names = &[
    ("kitchen", &["kitchen", "galley", "cookhouse"]),
    ("living room", &["living room", "lounge", "sitting room", "front room", "snug"]),
    ("bedroom", &["bedroom", "main bedroom"]),
    ("bathroom", &["bathroom", "washroom", "throne room"]),
    ("study", &["study", "office", "home office", "brain room"]),
    ("hallway", &["hallway", "hall", "corridor"]),
    ("garage", &["garage", "carport"]),
    ("nursery", &["nursery", "kids' room", "children's room"]),
    ("attic", &["attic", "loft", "crow's nest"]),
    ("cellar", &["cellar", "basement", "dungeon"]),
    ("dining room", &["dining room", "banquet hall"]),
    ("guest room", &["guest room", "spare room", "hotel"]),
    ("garden", &["garden", "yard", "back yard", "park"]),
    ("balcony", &["balcony", "terrace", "outlook"]),
    ("laundry room", &["laundry room", "utility room"]),
];
const LIGHTS: &Names = &[("light", &["light", "lights", "ceiling light"]), ("lamp", &["lamp", "floor lamp"])];
const HEATERS: &Names = &[("heating", &["heating", "heater", "radiator", "thermostat"])];
const SPEAKERS: &Names = &[
    ("music", &["music", "stereo", "volume"]),
    ("tv", &["tv", "telly", "television"]),
    ("radio", &["radio"]),
];
const CLEANERS: &Names =
    &[("vacuum", &["vacuum", "hoover", "vacuum cleaner", "robot vacuum", "dust buster"])];
const SWITCHED: &Names = &[
    ("light", &["light", "lights", "ceiling light"]),
    ("light", &["light", "lights"]),
    ("lamp", &["lamp", "floor lamp", "table lamp"]),
    ("heating", &["heating", "heater", "radiator"]),
    ("fan", &["fan"]),
    ("tv", &["tv", "telly", "television"]),
    ("music", &["music", "stereo"]),
    ("radio", &["radio"]),
    ("kettle", &["kettle", "whistler"]),
    ("coffee machine", &["coffee machine", "coffee maker", "espresso machine", "barista"]),
    ("oven", &["oven", "cooker", "furnace"]),
    ("washing machine", &["washing machine", "washer", "spinner"]),
    ("dishwasher", &["dishwasher", "dish monster"]),
    ("vacuum", &["vacuum", "hoover", "vacuum cleaner", "robot vacuum", "dust buster"]),
    ("alarm", &["alarm", "burglar alarm"]),
];
const COVERS: &Names = &[
    ("blinds", &["blinds", "shades", "shutters"]),
    ("curtains", &["curtains", "drapes"]),
    ("window", &["window", "windows"]),
];
const DOORS: &Names = &[
    ("front door", &["front door", "main door"]),
    ("back door", &["back door"]),
    ("garage door", &["garage door"]),
    ("gate", &["gate", "garden gate"]),
];
const SCENES: &[&str] = &[
    "party",
    "dinner",
    "bed",
    "breakfast",
    "homework",
    "story",
    "bath",
    "game",
    "guest",
    "holiday",
    "quiet",
];
const SCENE_ACTIONS: &[(&str, &str)] = &[
    (
        "bed time",
        r#"[{"do":"off","what":"light","where":"bedroom"},{"do":"close","what":"blinds","where":"bedroom"}]"#,
    ),
    (
        "dinner time",
        r#"[{"do":"on","what":"light","where":"dining room"},{"do":"off","what":"tv","where":"living room"}]"#,
    ),
    (
        "breakfast time",
        r#"[{"do":"on","what":"coffee machine"},{"do":"on","what":"radio","where":"kitchen"}]"#,
    ),
    (
        "game night",
        r#"[{"do":"on","what":"lamp","where":"living room"},{"do":"on","what":"heating","where":"living room"}]"#,
    ),
    (
        "bath time",
        r#"[{"do":"on","what":"heating","where":"bathroom"},{"do":"on","what":"light","where":"bathroom"}]"#,
    ),
    (
        "study hour",
        r#"[{"do":"on","what":"lamp","where":"study"},{"do":"off","what":"music","where":"study"}]"#,
    ),
    (
        "laundry day",
        r#"[{"do":"on","what":"washing machine"},{"do":"open","what":"window","where":"laundry room"}]"#,
    ),
    (
        "barbecue time",
        r#"[{"do":"on","what":"light","where":"garden"},{"do":"on","what":"music","where":"garden"}]"#,
    ),
    (
        "workshop time",
        r#"[{"do":"on","what":"light","where":"garage"},{"do":"on","what":"radio","where":"garage"}]"#,
    ),
    ("holiday mode", r#"[{"do":"off","what":"heating"},{"do":"on","what":"alarm"}]"#),
];
const OWNED: &[(&str, &str, &str)] = &[
    ("Bella's lamp", "lamp", "nursery"),
    ("Grandpa's radio", "radio", "guest room"),
    ("Tim's fan", "fan", "attic"),
    ("Mum's lamp", "lamp", "study"),
    ("Dad's radio", "radio", "garage"),
    ("Rosie's light", "light", "nursery"),
    ("Ben's heater", "heating", "cellar"),
    ("Anna's tv", "tv", "bedroom"),
    ("Carla's lamp", "lamp", "living room"),
    ("Jack's stereo", "music", "garage"),
    ("Emma's fan", "fan", "laundry room"),
    ("Sam's light", "light", "hallway"),
];
/// What the demo's household calls things: everyday names, the longer ones first, the word that it has
/// for them, and their slot in the answer, before and after. A scene's slot is the whole answer.
const PRIVATE: &[(&[&str], &str, &str, &str)] = &[
    (
        &["the home office", "the brain room", "the office", "the study"],
        "the cave",
        r#""where":"study""#,
        r#""where":"study""#,
    ),
    (
        &["the balcony", "the terrace", "the outlook"],
        "the jungle",
        r#""where":"balcony""#,
        r#""where":"balcony""#,
    ),
    (&["Carla's lamp"], "Nana's lamp", r#""where":"living room""#, r#""where":"bedroom""#),
    (&["Mum's lamp"], "Nana's lamp", r#""where":"study""#, r#""where":"bedroom""#),
    (&["Bella's lamp"], "Nana's lamp", r#""where":"nursery""#, r#""where":"bedroom""#),
    (
        &["the robot vacuum", "the vacuum cleaner", "the dust buster", "the hoover", "the vacuum"],
        "the beast",
        r#""what":"vacuum""#,
        r#""what":"vacuum""#,
    ),
    (
        &["the coffee machine", "the coffee maker", "the espresso machine", "the barista"],
        "the dragon",
        r#""what":"coffee machine""#,
        r#""what":"coffee machine""#,
    ),
    (
        &["bed time", "dinner time", "breakfast time", "game night", "bath time", "study hour"],
        "movie time",
        "",
        r#"[{"do":"off","what":"light","where":"living room"},{"do":"on","what":"tv","where":"living room"}]"#,
    ),
];
const ITEMS: &[&str] = &[
    "milk",
    "eggs",
    "bread",
    "butter",
    "cheese",
    "apples",
    "bananas",
    "rice",
    "pasta",
    "coffee",
    "tea",
    "sugar",
    "flour",
    "salt",
    "olive oil",
    "tomatoes",
    "potatoes",
    "onions",
    "garlic",
    "chicken",
    "fish",
    "yoghurt",
    "soap",
    "toilet paper",
    "batteries",
    "dog food",
    "cat food",
    "orange juice",
    "honey",
    "carrots",
];
const MUSIC: &[&str] = &[
    "jazz",
    "some jazz",
    "blues",
    "rock",
    "pop",
    "classical music",
    "opera",
    "techno",
    "folk",
    "reggae",
    "piano music",
    "the news",
    "a podcast",
    "christmas songs",
    "country music",
    "soul",
    "rain sounds",
];
const PLACES: &[&str] =
    &["room", "corner", "den", "place", "workshop", "shed", "hideout", "floor", "end", "spot"];
const THINGS: &[&str] =
    &["lamp", "light", "machine", "box", "fan", "radio", "thing", "heater", "screen", "toy"];
const WORDS: &[&str] = &[
    "otter",
    "castle",
    "bridge",
    "tower",
    "fox",
    "badger",
    "harbour",
    "meadow",
    "rocket",
    "planet",
    "comet",
    "lagoon",
    "temple",
    "burrow",
    "den",
    "fort",
    "palace",
    "island",
    "volcano",
    "desert",
    "forest",
    "glacier",
    "tiger",
    "rabbit",
    "whale",
    "falcon",
    "turtle",
    "hedgehog",
    "wizard",
    "giant",
    "troll",
    "knight",
    "pirate",
    "captain",
    "robot",
    "ghost",
    "monster",
    "goblin",
    "fairy",
    "queen",
    "king",
    "thunder",
    "storm",
    "breeze",
    "shadow",
    "ember",
    "spark",
    "velvet",
    "copper",
    "silver",
    "golden",
    "crystal",
    "marble",
    "cotton",
    "pepper",
    "ginger",
    "clover",
    "maple",
    "willow",
    "cedar",
    "acorn",
    "pebble",
    "canyon",
    "station",
    "engine",
    "tank",
    "bunker",
    "ship",
    "deck",
    "cabin",
    "studio",
    "library",
    "salon",
    "igloo",
    "tent",
    "barn",
    "stable",
    "hive",
    "honeycomb",
    "lighthouse",
    "observatory",
    "sunset",
    "morning",
    "yoga",
    "piano",
    "chess",
    "puppy",
    "kitten",
    "grandpa",
    "auntie",
    "uncle",
    "Oscar",
    "Milo",
    "Ruby",
    "Felix",
    "Hugo",
    "Nora",
    "Otto",
    "Ivy",
    "Leo",
    "Max",
    "beanbag",
    "cloud",
    "moon",
    "star",
    "river",
    "ocean",
    "cosy",
    "magic",
    "spooky",
    "happy",
    "focus",
    "dance",
];
const POLITE_BEFORE: &[&str] = &[
    "please ",
    "could you ",
    "can you ",
    "would you ",
    "could you please ",
    "can you please ",
    "i'd like you to ",
    "go ahead and ",
    "okay, ",
    "hey, ",
    "hey, can you ",
    "would you mind and ",
    "i need you to ",
    "kindly ",
    "quickly ",
    "just ",
    "will you ",
    "do me a favour and ",
    "you can ",
    "i want you to ",
    "now ",
];
const QUESTION_WORDS: &[&str] =
    &["could ", "can ", "would ", "will ", "is ", "are ", "did ", "how ", "what'", "why "];
const GREETINGS: &[&str] = &["hey, ", "okay, ", "hi, ", "oh, ", "listen, ", "hello, ", "right, ", "so, "];
const POLITE_AFTER: &[&str] = &[
    " please",
    ", please",
    " now",
    " for me",
    " right now",
    " thanks",
    ", thanks",
    ", thank you",
    " again",
    " when you can",
    " if you can",
    " would you",
    ", will you",
    " straight away",
    " today",
    " tonight",
];
const ON_IN: &[&str] = &[
    "turn on {d} {in}",
    "turn {d} {in} on",
    "turn {d} on {in}",
    "switch on {d} {in}",
    "switch {d} {in} on",
    "put {d} on {in}",
    "put on {d} {in}",
    "get {d} going {in}",
    "start {d} {in}",
    "power up {d} {in}",
    "{in}, turn on {d}",
    "turn on the {R} {D}",
    "turn the {R} {D} on",
    "switch on the {R} {D}",
    "start the {R} {D}",
    "~i want {d} on {in}",
    "~i need {d} {in}",
    "~{D} on {in}",
    "~{R} {D} on",
    "~let's have {d} on {in}",
    "~{d} {in} should be on",
    "fire up {d} {in}",
    "activate {d} {in}",
    "make sure {d} {in} is on",
    "run {d} {in}",
    "give me {d} {in}",
    "~why is {d} {in} off, turn it on",
];
const ON: &[&str] = &[
    "turn on {d}",
    "turn {d} on",
    "switch on {d}",
    "switch {d} on",
    "put {d} on",
    "put on {d}",
    "get {d} going",
    "start {d}",
    "power up {d}",
    "~i want {d} on",
    "~i need {d}",
    "~{D} on",
    "~let's have {d} on",
    "fire up {d}",
    "~{d} should be on",
    "activate {d}",
    "make sure {d} is on",
    "wake up {d}",
    "wake {d}",
    "get {d} started",
    "run {d}",
    "start up {d}",
    "get {d} running",
    "~time to start {d}",
    "~it's time for {d} to start",
    "warm up {d}",
    "give me {d}",
];
const OFF_IN: &[&str] = &[
    "turn off {d} {in}",
    "turn {d} {in} off",
    "turn {d} off {in}",
    "switch off {d} {in}",
    "switch {d} {in} off",
    "shut off {d} {in}",
    "stop {d} {in}",
    "kill {d} {in}",
    "power down {d} {in}",
    "{in}, turn off {d}",
    "turn off the {R} {D}",
    "turn the {R} {D} off",
    "switch off the {R} {D}",
    "stop the {R} {D}",
    "~i don't need {d} {in} any more",
    "~{D} off {in}",
    "~{R} {D} off",
    "~i want {d} off {in}",
    "~{d} {in} should be off",
    "~nobody needs {d} {in}",
    "make sure {d} {in} is off",
    "cut {d} {in}",
    "~no more {D} {in}",
    "deactivate {d} {in}",
];
const OFF: &[&str] = &[
    "turn off {d}",
    "turn {d} off",
    "switch off {d}",
    "switch {d} off",
    "shut off {d}",
    "stop {d}",
    "kill {d}",
    "power down {d}",
    "~i don't need {d} any more",
    "~{D} off",
    "~i want {d} off",
    "~{d} should be off",
    "~nobody needs {d}",
    "make sure {d} is off",
    "put {d} to sleep",
    "cut {d}",
    "shut {d} down",
    "shut down {d}",
    "~that's enough of {d}",
    "~i'm done with {d}",
    "deactivate {d}",
    "give {d} a rest",
    "~we're done with {d}",
];
const OPEN_IN: &[&str] = &[
    "open {d} {in}",
    "open the {R} {D}",
    "raise {d} {in}",
    "pull up {d} {in}",
    "put up {d} {in}",
    "~i want {d} open {in}",
    "draw back {d} {in}",
    "raise the {R} {D}",
    "~{D} up {in}",
    "~let some air in through {d} {in}",
    "make sure {d} {in} is open",
    "~{d} {in} should be open",
    "{in}, open {d}",
];
const OPEN: &[&str] = &[
    "open {d}",
    "raise {d}",
    "pull up {d}",
    "put up {d}",
    "~i want {d} open",
    "draw back {d}",
    "~{D} up",
    "make sure {d} is open",
    "~{d} should be open",
    "get {d} open",
];
const CLOSE_IN: &[&str] = &[
    "close {d} {in}",
    "close the {R} {D}",
    "shut {d} {in}",
    "lower {d} {in}",
    "pull down {d} {in}",
    "~i want {d} closed {in}",
    "draw {d} {in}",
    "shut the {R} {D}",
    "lower the {R} {D}",
    "~{D} down {in}",
    "make sure {d} {in} is closed",
    "~{d} {in} should be closed",
    "{in}, close {d}",
];
const CLOSE: &[&str] = &[
    "close {d}",
    "shut {d}",
    "lower {d}",
    "pull down {d}",
    "~i want {d} closed",
    "draw {d}",
    "~{D} down",
    "make sure {d} is closed",
    "~{d} should be closed",
    "get {d} closed",
];
const LOCK: &[&str] = &[
    "lock {d}",
    "lock up {d}",
    "make sure {d} is locked",
    "~i want {d} locked",
    "bolt {d}",
    "~{d} should be locked",
    "get {d} locked",
];
const UNLOCK: &[&str] = &[
    "unlock {d}",
    "~i want {d} unlocked",
    "make sure {d} is unlocked",
    "unbolt {d}",
    "~{d} should be unlocked",
    "~somebody is at {d}, unlock it",
];
const LEVEL_IN: &[&str] = &[
    "set {d} {in} to",
    "set the {R} {D} to",
    "turn {d} {in} down to",
    "turn {d} {in} up to",
    "dim {d} {in} to",
    "put {d} {in} at",
    "change {d} {in} to",
    "adjust {d} {in} to",
    "~i want {d} {in} at",
    "bring {d} {in} to",
    "dim the {R} {D} to",
    "change the {R} {D} to",
    "{in}, set {d} to",
];
const LEVEL: &[&str] = &[
    "set {d} to",
    "turn {d} down to",
    "turn {d} up to",
    "dim {d} to",
    "put {d} at",
    "change {d} to",
    "adjust {d} to",
    "~i want {d} at",
    "bring {d} to",
    "lower {d} to",
    "raise {d} to",
];
const ROOM_VERBS: &[(&str, &str, &[&str])] = &[
    (
        "on",
        "light",
        &[
            "light up {r}",
            "brighten {r}",
            "~it's too dark {in}",
            "~it's dark {in}",
            "~i can't see anything {in}",
            "~{r} is too dark",
            "~{r} needs some light",
            "give me some light {in}",
            "make some light {in}",
            "~i'm going into {r} and it's dark",
            "~we need light {in}",
            "illuminate {r}",
        ],
    ),
    (
        "off",
        "light",
        &["make {r} dark", "~it's too bright {in}", "~{r} should be dark", "darken {r}", "black out {r}"],
    ),
    (
        "on",
        "heating",
        &["heat {r}", "warm up {r}", "heat up {r}", "make {r} warmer", "make it warmer {in}", "warm {r}"],
    ),
    (
        "on",
        "heating",
        &[
            "~it's freezing {in}",
            "~it's cold {in}",
            "~{r} is freezing",
            "~{r} is too cold",
            "~i'm cold {in}",
            "~my feet are cold {in}",
            "~it's chilly {in}",
            "~{r} feels cold",
        ],
    ),
    (
        "off",
        "heating",
        &[
            "~it's too hot {in}",
            "~it's too warm {in}",
            "cool down {r}",
            "~{r} is too hot",
            "~i'm sweating {in}",
        ],
    ),
    (
        "on",
        "vacuum",
        &[
            "vacuum {r}",
            "hoover {r}",
            "clean {r}",
            "clean up {r}",
            "~{r} is dirty",
            "~{r} is dusty",
            "~it's dusty {in}",
            "~{r} needs a clean",
            "~there are crumbs {in}",
            "clean the floor {in}",
            "~the floor {in} is dirty",
        ],
    ),
    ("on", "fan", &["~it's stuffy {in}", "~{r} is stuffy", "air {r}", "~the air {in} is bad"]),
];
const SEND: &[&str] = &[
    "send {d} to {r}",
    "send {d} into {r}",
    "let {d} loose {in}",
    "have {d} clean {r}",
    "get {d} to clean {r}",
    "let {d} clean {r}",
    "run {d} {in}",
    "tell {d} to clean {r}",
    "get {d} into {r}",
    "~{r} is dirty, send {d}",
    "use {d} {in}",
    "~{d} should clean {r}",
    "~there's a mess {in}, send {d}",
    "have {d} do {r}",
];
const SCENE: &[&str] = &[
    "~it's {d}",
    "~{d}",
    "~time for {d}",
    "start {d}",
    "~let's do {d}",
    "get ready for {d}",
    "set up {d}",
    "get everything ready for {d}",
    "~we're having {d}",
    "~i'm in the mood for {d}",
    "~ready for {d}",
    "prepare {d}",
    "begin {d}",
    "switch to {d}",
    "kick off {d}",
    "~how about {d}",
    "~i want {d}",
    "~let's have {d}",
    "activate {d}",
    "~finally {d}",
    "prepare the house for {d}",
    "~we want {d}",
    "make it {d}",
    "~{d} has come",
    "~let's get {d} going",
];
const TIMER: &[&str] = &[
    "set a timer for {t}",
    "start a timer for {t}",
    "timer for {t}",
    "wake me in {t}",
    "remind me in {t}",
    "give me {t}",
    "count down {t}",
    "let me know in {t}",
    "tell me when {t} are over",
    "start a {t} timer",
    "set a {t} timer",
    "ring in {t}",
    "put {t} on the timer",
];
const ADD: &[&str] = &[
    "add {d} to the shopping list",
    "put {d} on the shopping list",
    "put {d} on the list",
    "add {d} to my list",
    "~we need {d}",
    "~we're out of {d}",
    "buy {d}",
    "get some {d}",
    "~we've run out of {d}",
    "~there's no {d} left",
    "order {d}",
    "remember to buy {d}",
    "note {d} on the shopping list",
];
const REMOVE: &[&str] = &[
    "remove {d} from the shopping list",
    "take {d} off the list",
    "~we don't need {d}",
    "delete {d} from the list",
    "~i've already bought {d}",
    "~we have enough {d}",
    "scratch {d} from the shopping list",
    "~no {d} needed",
];
const PLAY: &[&str] = &[
    "play {d}",
    "put on {d} on the speakers",
    "~i want to hear {d}",
    "~let's hear {d}",
    "let me hear {d}",
    "~i feel like {d}",
    "play me {d}",
    "start playing {d}",
];
const PLAY_IN: &[&str] = &[
    "play {d} {in}",
    "~i want to hear {d} {in}",
    "let me hear {d} {in}",
    "{in}, play {d}",
    "start playing {d} {in}",
    "~let's hear {d} {in}",
    "play me {d} {in}",
];
const CHECK_IN: &[&str] = &[
    "{be} {d} on {in}",
    "{be} {d} {in} on",
    "did i leave {d} on {in}",
    "{be} the {R} {D} on",
    "check {d} {in}",
    "what's the state of {d} {in}",
    "did somebody leave {d} on {in}",
    "how {be} {d} {in}",
    "tell me about {d} {in}",
    "have a look at {d} {in}",
    "{be} {d} {in} off",
    "{be} {d} still on {in}",
];
const CHECK: &[&str] = &[
    "{be} {d} on",
    "did i leave {d} on",
    "check {d}",
    "what's the state of {d}",
    "{be} {d} open",
    "{be} {d} closed",
    "did somebody leave {d} on",
    "how {be} {d}",
    "tell me about {d}",
    "have a look at {d}",
    "{be} {d} still on",
    "{be} {d} off",
    "{be} {d} locked",
    "{be} {d} running",
];
