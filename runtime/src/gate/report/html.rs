//! Writing HTML so that foreign text can't become markup: tags, attributes' names and raw markup are
//! literals of this program, and everything else is escaped on its way in. Tags are closed by what opened
//! them.

use super::show::visible;

/// Attributes as name and value; values are escaped, and without one it is left out.
pub(super) type Attributes<'a> = &'a [(&'static str, &'a str)];

/// A page, or a part of one, as it is written.
#[derive(Default)]
pub(super) struct Html(String);

impl Html {
    /// Markup of this program.
    pub(super) fn raw(&mut self, markup: &'static str) {
        self.0.push_str(markup);
    }

    /// Text, escaped; what would act unseen is made visible.
    pub(super) fn text(&mut self, text: &str) {
        for c in visible(text).chars() {
            match c {
                '&' => self.0.push_str("&amp;"),
                '<' => self.0.push_str("&lt;"),
                '>' => self.0.push_str("&gt;"),
                '"' => self.0.push_str("&quot;"),
                '\'' => self.0.push_str("&#39;"),
                _ => self.0.push(c),
            }
        }
    }

    /// An element and what is in it.
    pub(super) fn element(
        &mut self,
        tag: &'static str,
        attributes: Attributes,
        body: impl FnOnce(&mut Html),
    ) {
        self.open(tag, attributes, ">");
        body(self);
        self.0.push_str("</");
        self.0.push_str(tag);
        self.0.push('>');
    }

    /// An element with text in it.
    pub(super) fn leaf(&mut self, tag: &'static str, attributes: Attributes, text: &str) {
        self.element(tag, attributes, |h| h.text(text));
    }

    /// An element with nothing in it.
    pub(super) fn void(&mut self, tag: &'static str, attributes: Attributes) {
        self.open(tag, attributes, "/>");
    }

    /// Text from outside, whose own direction of writing must not move its neighbours.
    pub(super) fn foreign(&mut self, text: &str) {
        self.leaf("bdi", &[], text);
    }

    /// The page.
    pub(super) fn finish(self) -> String {
        self.0
    }

    fn open(&mut self, tag: &'static str, attributes: Attributes, end: &str) {
        self.0.push('<');
        self.0.push_str(tag);
        for (name, value) in attributes.iter().filter(|(_, value)| !value.is_empty()) {
            self.0.push(' ');
            self.0.push_str(name);
            self.0.push_str("=\"");
            self.text(value);
            self.0.push('"');
        }
        self.0.push_str(end);
    }
}
