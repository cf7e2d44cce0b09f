//! What a person reads in a reply: texts of errors and plans, which speak of the server's names and numbers.

use super::Mapping;
use crate::{
    front::mongo::{
        commands::ReplyRule,
        rewrite::{ORG, index, put_text as put_string},
    },
    tenant::Isolation,
    wire::{
        Error,
        mongo::bson::{self, Element},
    },
};

/// `CursorNotFound`.
const CURSOR_NOT_FOUND: i64 = 43;

/// A cursor that was made in another session, or in one, or in none.
const OTHERS_CURSOR: [i64; 3] = [50736, 50737, 50738];

/// Deepest nesting of a plan that is rewritten.
pub(super) const PLAN_DEPTH_MAX: usize = 60;

impl Mapping<'_> {
    /// The text of a `getMore` that failed. The server's own names its number of the cursor, and those of sessions.
    pub(super) fn put_cursor_text(
        &self,
        code: Option<i64>,
        element: &Element<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), Error> {
        let id = self.cursor.unwrap_or_default();
        let id = self.mask.cursor(id).map_err(|_| Error { at: "reply", what: "an id that can't be hidden" })?;
        match code {
            Some(CURSOR_NOT_FOUND) => bson::put_str(out, "errmsg", &format!("cursor id {id} not found")),
            Some(code) if OTHERS_CURSOR.contains(&code) => {
                let text = format!("Cannot run getMore on cursor {id}, which was created in another session");
                bson::put_str(out, "errmsg", &text);
            }
            _ => self.put_message(element, out),
        }
        Ok(())
    }

    /// An error's text: also without what it says of the platform's own index, and of a collection's inner number.
    pub(super) fn put_message(&self, element: &Element<'_>, out: &mut Vec<u8>) {
        let Some(text) = element.str().filter(|_| self.isolation == Isolation::Filter) else {
            return self.put_text(element, out);
        };
        let mut text = std::borrow::Cow::Borrowed(text);
        if text.contains(index::PLATFORM) && !text.contains(&format!("{}{}{}", index::PLATFORM, index::MARK, self.org))
        {
            let key = format!("{ORG}: \"{}\", ", self.org);
            text = text.replace(index::PLATFORM, index::ID).replace(&key, "").into();
        }
        if matches!(self.rule, ReplyRule::IndexesMade | ReplyRule::IndexesWished) {
            text = without_numbers(&text).into();
        }
        self.put_mapped(element, &text, out);
    }

    /// A text with the physical prefixes taken out.
    pub(super) fn put_text(&self, element: &Element<'_>, out: &mut Vec<u8>) {
        match element.str() {
            Some(text) => self.put_mapped(element, text, out),
            None => bson::put(out, element),
        }
    }

    pub(super) fn put_mapped(&self, element: &Element<'_>, text: &str, out: &mut Vec<u8>) {
        let Some(name) = element.name() else { return bson::put(out, element) };
        // The end of an index's name in a shared collection: of most texts there is none, and none is made.
        let marked = self.isolation == Isolation::Filter && text.contains(index::MARK);
        let mark = if marked { format!("{}{}", index::MARK, self.org) } else { String::new() };
        put_string(out, name.as_bytes(), |out| {
            for piece in text.split(self.place.prefix()) {
                match marked {
                    true => piece.split(&mark).for_each(|piece| out.extend_from_slice(piece.as_bytes())),
                    false => out.extend_from_slice(piece.as_bytes()),
                }
            }
        });
    }

    /// What an index holds of a document, without `org_id`.
    pub(super) fn put_key(&self, element: &Element<'_>, out: &mut Vec<u8>) -> Result<(), Error> {
        let key = element.document().filter(|_| self.isolation == Isolation::Filter);
        let (Some(key), Some(name)) = (key, element.name()) else {
            bson::put(out, element);
            return Ok(());
        };
        let copy = bson::open_document(out, name);
        for element in key {
            let element = element?;
            if element.key != ORG.as_bytes() {
                bson::put(out, &element);
            }
        }
        bson::close(out, copy);
        Ok(())
    }

    /// A plan: names stand anywhere in it.
    pub(super) fn put_plan(&self, element: &Element<'_>, depth: usize, out: &mut Vec<u8>) -> Result<(), Error> {
        let inner = element.document().or(element.array());
        let (Some(inner), Some(name)) = (inner, element.name()) else {
            match element.str() {
                Some(index::PLATFORM) if self.isolation == Isolation::Filter => {
                    self.put_mapped(element, index::ID, out)
                }
                _ => self.put_text(element, out),
            }
            return Ok(());
        };
        if depth == 0 {
            return Ok(());
        }
        let copy =
            if element.document().is_some() { bson::open_document(out, name) } else { bson::open_array(out, name) };
        for element in inner {
            let element = element?;
            let ours = self.isolation == Isolation::Filter && element.key == ORG.as_bytes();
            if !ours && !matches!(element.key, b"serverInfo" | b"host" | b"shard") {
                self.put_plan(&element, depth - 1, out)?;
            }
        }
        bson::close(out, copy);
        Ok(())
    }
}

/// A text of an index that could not be built, without the numbers by which the server knows builds and collections:
/// `Index build failed: UUID: Collection c ( UUID ) :: …`. One that a document holds stands in quotes.
fn without_numbers(text: &str) -> String {
    let is_number = |word: &str| {
        let word = word.strip_suffix(':').unwrap_or(word);
        word.len() == 36
            && word.bytes().enumerate().all(|(at, byte)| match at {
                8 | 13 | 18 | 23 => byte == b'-',
                _ => byte.is_ascii_hexdigit(),
            })
    };
    let words: Vec<&str> = text.split(' ').filter(|word| !is_number(word)).collect();
    words.join(" ").replace(" ( )", "")
}
