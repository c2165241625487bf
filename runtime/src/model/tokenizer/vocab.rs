//! The vocabulary's text in one flat buffer, an index over it, and the search for special tokens.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use strum::FromRepr;

/// "No id", in tables of ids.
pub(super) const NONE: u32 = u32::MAX;

/// GGUF's `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRepr)]
#[repr(u8)]
pub(super) enum Kind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

impl Kind {
    /// The kind of a GGUF value; 0 ("undefined") counts as normal, as llama.cpp has it.
    pub(super) fn from_gguf(value: i32) -> Option<Kind> {
        Kind::from_repr(value.try_into().ok()?).or((value == 0).then_some(Kind::Normal))
    }

    /// Never produced from user text and never shown to users.
    pub(super) fn is_control(self) -> bool {
        matches!(self, Kind::Control | Kind::Unknown)
    }

    /// Whether merging ordinary text may produce it.
    pub(super) fn is_text(self) -> bool {
        matches!(self, Kind::Normal | Kind::UserDefined | Kind::Unused)
    }
}

/// What each token stands for, as raw bytes, one after another.
pub(super) struct Vocab {
    bytes: Vec<u8>,
    /// n + 1 ends; token i is `bytes[offsets[i]..offsets[i + 1]]`.
    offsets: Vec<u32>,
    kinds: Vec<Kind>,
}

impl Vocab {
    pub(super) fn with_capacity(tokens: usize, bytes: usize) -> Self {
        let mut offsets = Vec::with_capacity(tokens + 1);
        offsets.push(0);
        Vocab { bytes: Vec::with_capacity(bytes), offsets, kinds: Vec::with_capacity(tokens) }
    }

    /// Appends a token. The caller bounds the sum of lengths below 4 GiB.
    pub(super) fn push(&mut self, text: &[u8], kind: Kind) {
        self.bytes.extend_from_slice(text);
        self.offsets.push(self.bytes.len() as u32);
        self.kinds.push(kind);
    }

    pub(super) fn shrink(&mut self) {
        self.bytes.shrink_to_fit();
    }

    pub(super) fn len(&self) -> usize {
        self.kinds.len()
    }

    /// The token's bytes; empty for ids beyond the vocabulary.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        match (self.offsets.get(id), self.offsets.get(id + 1)) {
            (Some(&start), Some(&end)) => &self.bytes[start as usize..end as usize],
            _ => &[],
        }
    }

    /// The token's kind; ids beyond the vocabulary are control.
    pub(super) fn kind(&self, id: u32) -> Kind {
        self.kinds.get(id as usize).copied().unwrap_or(Kind::Control)
    }

    pub(super) fn ids(&self) -> std::ops::Range<u32> {
        0..self.len() as u32
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.bytes.capacity() + self.offsets.capacity() * 4 + self.kinds.capacity()
    }
}

/// Slots of an open-addressing table for n entries: a power of two, at most three quarters full.
pub(super) fn table_slots(n: usize) -> usize {
    (n * 4).div_ceil(3).max(2).next_power_of_two()
}

/// From a token's bytes to its id: open addressing over ids, so no text is stored twice. It uses the standard
/// library's randomly keyed SipHash, so a crafted vocabulary can't make lookups quadratic.
pub(super) struct VocabIndex {
    slots: Vec<u32>,
    hasher: RandomState,
}

impl VocabIndex {
    /// Indexes the tokens ordinary text may become. If texts are equal the last wins, as in llama.cpp.
    pub(super) fn new(vocab: &Vocab) -> Self {
        let slots = vec![NONE; table_slots(vocab.len())];
        let mut index = VocabIndex { slots, hasher: RandomState::new() };
        for id in vocab.ids() {
            if vocab.kind(id).is_text() && !vocab.bytes(id).is_empty() {
                let slot = index.slot(vocab, vocab.bytes(id));
                index.slots[slot] = id;
            }
        }
        index
    }

    /// The slot that holds the text, or the free one where it belongs.
    fn slot(&self, vocab: &Vocab, text: &[u8]) -> usize {
        let mask = self.slots.len() - 1;
        let mut slot = self.hasher.hash_one(text) as usize & mask;
        while self.slots[slot] != NONE && vocab.bytes(self.slots[slot]) != text {
            slot = (slot + 1) & mask;
        }
        slot
    }

    pub(super) fn find(&self, vocab: &Vocab, text: &[u8]) -> Option<u32> {
        let id = self.slots[self.slot(vocab, text)];
        (id != NONE).then_some(id)
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.slots.capacity() * 4
    }
}

/// Most bytes of a control or user-defined token: the search takes up to this many steps per byte of text. Real
/// ones have about 30, runs of blanks more.
pub(super) const SPECIAL_BYTES_MAX: usize = 512;

/// Control and user-defined tokens, searched in text leftmost first and longest first.
pub(super) struct Specials {
    /// Sorted by bytes. If texts are equal, user-defined precedes control, and the first of each kind is kept.
    ids: Vec<u32>,
    /// For each token, the index in `ids` of the longest other token it starts with, or NONE.
    prefixes: Vec<u32>,
    /// `ids[starts[b]..starts[b + 1]]` begin with byte b.
    starts: [u32; 257],
}

impl Specials {
    pub(super) fn new(vocab: &Vocab) -> Self {
        let special = |id: &u32| {
            let kind = vocab.kind(*id);
            (kind.is_control() || kind == Kind::UserDefined) && !vocab.bytes(*id).is_empty()
        };
        let of = |id: u32| (vocab.bytes(id), vocab.kind(id).is_control());
        let mut ids: Vec<u32> = vocab.ids().filter(special).collect();
        ids.sort_unstable_by_key(|&id| (of(id), id));
        ids.dedup_by_key(|id| of(*id));
        ids.shrink_to_fit();
        let mut starts = [0u32; 257];
        for &id in &ids {
            starts[usize::from(vocab.bytes(id)[0]) + 1] += 1;
        }
        for b in 0..256 {
            starts[b + 1] += starts[b];
        }
        let prefixes = prefixes(vocab, &ids);
        Specials { ids, prefixes, starts }
    }

    /// The first special token in `text` at or after byte `from`: (start, id). Finds control tokens only if
    /// `control` is set, user-defined ones always, since they represent text.
    pub(super) fn find(
        &self,
        vocab: &Vocab,
        text: &[u8],
        from: usize,
        control: bool,
    ) -> Option<(usize, u32)> {
        (from..text.len()).find_map(|at| Some((at, self.longest(vocab, &text[at..], control)?)))
    }

    /// The longest special token a text starts with. In sorted order, the last token not after the text starts
    /// with every token the text starts with.
    fn longest(&self, vocab: &Vocab, text: &[u8], control: bool) -> Option<u32> {
        let first = usize::from(text[0]);
        let (start, end) = (self.starts[first] as usize, self.starts[first + 1] as usize);
        let behind = self.ids[start..end].partition_point(|&id| vocab.bytes(id) <= text);
        let mut at = start + behind.checked_sub(1)?;
        let shared = vocab.bytes(self.ids[at]).iter().zip(text).take_while(|(a, b)| a == b).count();
        loop {
            let id = self.ids[at];
            if vocab.bytes(id).len() <= shared && (control || !vocab.kind(id).is_control()) {
                return Some(id);
            }
            at = Some(self.prefixes[at]).filter(|&prefix| prefix != NONE)? as usize;
        }
    }

    pub(super) fn heap_bytes(&self) -> usize {
        (self.ids.capacity() + self.prefixes.capacity()) * 4
    }
}

/// For each sorted token, the index of the longest earlier one it starts with.
fn prefixes(vocab: &Vocab, ids: &[u32]) -> Vec<u32> {
    let mut open: Vec<u32> = Vec::new();
    let mut prefixes = Vec::with_capacity(ids.len());
    for (&id, at) in ids.iter().zip(0..) {
        while open.pop_if(|p| !vocab.bytes(id).starts_with(vocab.bytes(ids[*p as usize]))).is_some() {}
        prefixes.push(open.last().copied().unwrap_or(NONE));
        open.push(at);
    }
    prefixes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every token tried at every place.
    fn tried(vocab: &Vocab, text: &[u8], from: usize, control: bool) -> Option<(usize, u32)> {
        let wanted = |id: &u32| match vocab.kind(*id) {
            Kind::UserDefined => true,
            kind => control && kind.is_control(),
        };
        let order = |id: &u32| (vocab.bytes(*id).len(), vocab.kind(*id).is_control(), std::cmp::Reverse(*id));
        let at = |at: usize| {
            let begins = |id: &u32| !vocab.bytes(*id).is_empty() && text[at..].starts_with(vocab.bytes(*id));
            Some((at, vocab.ids().filter(wanted).filter(begins).max_by_key(order)?))
        };
        (from..text.len()).find_map(at)
    }

    #[test]
    fn the_search_finds_what_trying_every_token_finds() {
        let mut seed = 7u32;
        let mut below = |n: u32| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 16) % n
        };
        let (mut compared, mut found) = (0, 0);
        for _ in 0..300 {
            let mut vocab = Vocab::with_capacity(0, 0);
            for _ in 0..below(40) {
                let token: Vec<u8> = (0..below(6)).map(|_| b"abc"[below(3) as usize]).collect();
                let kinds =
                    [Kind::Normal, Kind::Unknown, Kind::Control, Kind::UserDefined, Kind::UserDefined];
                vocab.push(&token, kinds[below(5) as usize]);
            }
            let specials = Specials::new(&vocab);
            let text: Vec<u8> = (0..60).map(|_| b"abcd"[below(4) as usize]).collect();
            for from in 0..text.len() {
                for control in [false, true] {
                    let wanted = tried(&vocab, &text, from, control);
                    assert_eq!(specials.find(&vocab, &text, from, control), wanted, "{text:?} from {from}");
                    (compared, found) = (compared + 1, found + usize::from(wanted.is_some()));
                }
            }
        }
        eprintln!("{compared} searches compared, {found} of them with a find");
        assert!(found > 10_000 && found < compared);
    }
}
