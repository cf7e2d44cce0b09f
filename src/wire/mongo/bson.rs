//! BSON by its spans: elements are found in place, never decoded into a tree, and copied byte for byte.
//!
//! Reading: [`Document::new`] checks the frame, [`Document::iter`] walks the elements and checks each length as it
//! goes, [`validate`] walks everything below as well. Writing: the `put_*` functions append elements to a buffer;
//! [`open`] and [`close`] back-patch the length of a document.
//!
//! Nothing here looks for duplicate keys by itself, as stored documents may hold them: where a key decides something,
//! the caller asks [`Document::has_duplicate_key`].

use hashbrown::HashSet;

use super::super::Error;

/// Deepest nesting: servers refuse about 180 levels, drivers write a dozen.
pub const DEPTH_MAX: usize = 100;

/// Smallest document: its length and the final NUL.
const EMPTY_BYTES: usize = 5;

/// Keys that are compared pairwise before a set is made.
const PAIRWISE_KEYS: usize = 12;

/// A type byte.
pub mod kind {
    /// 64-bit floating point.
    pub const DOUBLE: u8 = 0x01;
    /// UTF-8 string.
    pub const STRING: u8 = 0x02;
    /// Embedded document.
    pub const DOCUMENT: u8 = 0x03;
    /// Array.
    pub const ARRAY: u8 = 0x04;
    /// Binary data.
    pub const BINARY: u8 = 0x05;
    /// Undefined (deprecated).
    pub const UNDEFINED: u8 = 0x06;
    /// ObjectId.
    pub const OBJECT_ID: u8 = 0x07;
    /// Boolean.
    pub const BOOL: u8 = 0x08;
    /// UTC date in milliseconds.
    pub const DATE: u8 = 0x09;
    /// Null.
    pub const NULL: u8 = 0x0a;
    /// Regular expression.
    pub const REGEX: u8 = 0x0b;
    /// DBPointer (deprecated).
    pub const DB_POINTER: u8 = 0x0c;
    /// JavaScript.
    pub const JAVASCRIPT: u8 = 0x0d;
    /// Symbol (deprecated).
    pub const SYMBOL: u8 = 0x0e;
    /// JavaScript with scope (deprecated).
    pub const JAVASCRIPT_SCOPE: u8 = 0x0f;
    /// 32-bit integer.
    pub const INT32: u8 = 0x10;
    /// Internal timestamp.
    pub const TIMESTAMP: u8 = 0x11;
    /// 64-bit integer.
    pub const INT64: u8 = 0x12;
    /// 128-bit decimal.
    pub const DECIMAL128: u8 = 0x13;
    /// Less than everything.
    pub const MIN_KEY: u8 = 0xff;
    /// Greater than everything.
    pub const MAX_KEY: u8 = 0x7f;
}

const fn fault(what: &'static str) -> Error {
    Error::new("BSON", what)
}

/// A document's bytes, its frame checked: the length is the slice's, the last byte is NUL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document<'a>(&'a [u8]);

impl<'a> Document<'a> {
    /// The document that `bytes` is, exactly.
    ///
    /// # Errors
    /// The frame is not one.
    pub fn new(bytes: &'a [u8]) -> Result<Self, Error> {
        let (document, rest) = Self::split(bytes)?;
        if rest.is_empty() { Ok(document) } else { Err(fault("bytes behind a document")) }
    }

    /// The document that `bytes` begins with, and what follows.
    ///
    /// # Errors
    /// It is cut short or its length lies.
    pub fn split(bytes: &'a [u8]) -> Result<(Self, &'a [u8]), Error> {
        let length = length(bytes)?;
        if length < EMPTY_BYTES {
            return Err(fault("a document shorter than an empty one"));
        }
        let (document, rest) = bytes.split_at_checked(length).ok_or(fault("a document longer than its message"))?;
        if document[length - 1] != 0 {
            return Err(fault("a document without its final NUL"));
        }
        Ok((Self(document), rest))
    }

    /// Its bytes.
    pub fn bytes(self) -> &'a [u8] {
        self.0
    }

    /// What stands between its length and its final NUL: the elements, fit to be copied into another document.
    pub fn elements(self) -> &'a [u8] {
        &self.0[4..self.0.len() - 1]
    }

    /// Whether it has no element.
    pub fn is_empty(self) -> bool {
        self.elements().is_empty()
    }

    /// Walks its elements; after an error nothing follows.
    pub fn iter(self) -> Elements<'a> {
        Elements { rest: self.elements() }
    }

    /// The first element of that name.
    ///
    /// # Errors
    /// An element before it is no BSON.
    pub fn get(self, key: &str) -> Result<Option<Element<'a>>, Error> {
        for element in self {
            let element = element?;
            if element.key == key.as_bytes() {
                return Ok(Some(element));
            }
        }
        Ok(None)
    }

    /// Whether two of its own elements have one name.
    ///
    /// # Errors
    /// An element is no BSON.
    pub fn has_duplicate_key(self) -> Result<bool, Error> {
        let mut few: [&[u8]; PAIRWISE_KEYS] = [&[]; PAIRWISE_KEYS];
        let mut many: HashSet<&[u8]> = HashSet::new();
        for (at, element) in self.iter().enumerate() {
            let key = element?.key;
            if at < PAIRWISE_KEYS {
                if few[..at].contains(&key) {
                    return Ok(true);
                }
                few[at] = key;
            } else {
                if many.is_empty() {
                    many.extend(few);
                }
                if !many.insert(key) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

impl<'a> IntoIterator for Document<'a> {
    type Item = Result<Element<'a>, Error>;
    type IntoIter = Elements<'a>;

    fn into_iter(self) -> Elements<'a> {
        self.iter()
    }
}

/// One element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Element<'a> {
    /// Its type byte: [`kind`].
    pub kind: u8,
    /// Its name, not necessarily UTF-8.
    pub key: &'a [u8],
    /// Its value as it stands on the wire.
    pub value: &'a [u8],
    /// All of it: type, name with NUL, value.
    pub span: &'a [u8],
}

impl<'a> Element<'a> {
    /// Its name, where it is UTF-8.
    pub fn name(&self) -> Option<&'a str> {
        std::str::from_utf8(self.key).ok()
    }

    /// The text of a string (not of a symbol), where it is UTF-8.
    pub fn str(&self) -> Option<&'a str> {
        (self.kind == kind::STRING).then(|| self.text()).flatten()
    }

    /// The bytes of a string, UTF-8 or not.
    pub fn str_bytes(&self) -> Option<&'a [u8]> {
        (self.kind == kind::STRING).then(|| &self.value[4..self.value.len() - 1])
    }

    fn text(&self) -> Option<&'a str> {
        std::str::from_utf8(&self.value[4..self.value.len() - 1]).ok()
    }

    /// An embedded document (not an array).
    pub fn document(&self) -> Option<Document<'a>> {
        (self.kind == kind::DOCUMENT).then_some(Document(self.value))
    }

    /// An array, as the document that it is on the wire.
    pub fn array(&self) -> Option<Document<'a>> {
        (self.kind == kind::ARRAY).then_some(Document(self.value))
    }

    /// Subtype and bytes of binary data.
    pub fn binary(&self) -> Option<(u8, &'a [u8])> {
        (self.kind == kind::BINARY).then(|| (self.value[4], &self.value[5..]))
    }

    /// A boolean.
    pub fn bool(&self) -> Option<bool> {
        (self.kind == kind::BOOL).then(|| self.value[0] != 0)
    }

    /// A 64-bit integer, and only that.
    pub fn i64(&self) -> Option<i64> {
        (self.kind == kind::INT64).then(|| self.fixed()).flatten().map(i64::from_le_bytes)
    }

    /// A whole number of any numeric type that has one; `None` for other types, fractions and what is beyond `i64`.
    pub fn whole(&self) -> Option<i64> {
        match self.kind {
            kind::INT32 => self.fixed().map(|bytes| i32::from_le_bytes(bytes).into()),
            kind::INT64 => self.fixed().map(i64::from_le_bytes),
            kind::DOUBLE => {
                let number = f64::from_le_bytes(self.fixed()?);
                // Both bounds are exact as doubles; the upper one is the first that does not fit.
                let fits = number.fract() == 0.0
                    && (-9_223_372_036_854_775_808.0..9_223_372_036_854_775_808.0).contains(&number);
                #[allow(clippy::cast_possible_truncation, reason = "whole and within i64, as just checked")]
                fits.then_some(number as i64)
            }
            kind::DECIMAL128 => decimal_whole(self.fixed()?),
            _ => None,
        }
    }

    /// Whether it is a number.
    pub fn is_number(&self) -> bool {
        matches!(self.kind, kind::INT32 | kind::INT64 | kind::DOUBLE | kind::DECIMAL128)
    }

    /// Whether the server takes it for true: `true`, or a number that is not zero.
    pub fn truthy(&self) -> bool {
        match self.kind {
            kind::BOOL => self.value[0] != 0,
            kind::DOUBLE => self.fixed().is_some_and(|bytes| f64::from_le_bytes(bytes) != 0.0),
            kind::INT32 | kind::INT64 => self.value.iter().any(|&b| b != 0),
            kind::DECIMAL128 => decimal_whole(self.fixed().unwrap_or_default()) != Some(0),
            _ => false,
        }
    }

    fn fixed<const N: usize>(&self) -> Option<[u8; N]> {
        self.value.try_into().ok()
    }
}

/// A Decimal128 in its common (binary integer) form as a whole number.
fn decimal_whole(bytes: [u8; 16]) -> Option<i64> {
    let bits = u128::from_le_bytes(bytes);
    // Combination bits 11…: infinity, NaN, or a coefficient that is defined to be zero.
    if (bits >> 125) & 0b11 == 0b11 {
        return None;
    }
    let exponent = i32::try_from((bits >> 113) & 0x3fff).ok()? - 6176;
    let mut coefficient = bits & ((1 << 113) - 1);
    if coefficient == 0 {
        return Some(0);
    }
    for _ in 0..exponent.unsigned_abs() {
        coefficient = if exponent > 0 {
            coefficient.checked_mul(10).filter(|&it| it <= i64::MAX as u128)?
        } else if coefficient.is_multiple_of(10) {
            coefficient / 10
        } else {
            return None;
        };
    }
    let whole = i64::try_from(coefficient).ok()?;
    Some(if bits >> 127 == 1 { -whole } else { whole })
}

/// The elements of a document.
#[derive(Clone, Debug)]
pub struct Elements<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Elements<'a> {
    type Item = Result<Element<'a>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let element = element(self.rest);
        self.rest = match &element {
            Ok(element) => &self.rest[element.span.len()..],
            Err(_) => &[],
        };
        Some(element)
    }
}

/// The element that `bytes` begins with.
fn element(bytes: &[u8]) -> Result<Element<'_>, Error> {
    let kind = bytes[0];
    let name = name_bytes(&bytes[1..]).ok_or(fault("an element name without its end"))?;
    let rest = &bytes[1 + name + 1..];
    let size = size(kind, rest)?;
    let value = rest.get(..size).ok_or(fault("a value longer than its document"))?;
    match kind {
        kind::DOCUMENT | kind::ARRAY => {
            Document::new(value)?;
        }
        kind::BOOL if value[0] > 1 => return Err(fault("a boolean that is neither")),
        kind::STRING | kind::JAVASCRIPT | kind::SYMBOL if value[size - 1] != 0 => {
            return Err(fault("a string without its final NUL"));
        }
        _ => {}
    }
    Ok(Element { kind, key: &bytes[1..=name], value, span: &bytes[..1 + name + 1 + size] })
}

/// Bytes before the first NUL. Most names are shorter than eight bytes, for which one word is faster than a search.
fn name_bytes(bytes: &[u8]) -> Option<usize> {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x8080_8080_8080_8080;
    if let Some(word) = bytes.first_chunk::<8>() {
        let word = u64::from_le_bytes(*word);
        // The lowest bit that is set belongs to the first byte that is zero; only bits above it may be wrong.
        let zeros = word.wrapping_sub(ONES) & !word & HIGH;
        if zeros != 0 {
            return usize::try_from(zeros.trailing_zeros() / 8).ok();
        }
        return memchr::memchr(0, &bytes[8..]).map(|at| at + 8);
    }
    bytes.iter().position(|&byte| byte == 0)
}

/// Bytes of a value of type `kind` at the beginning of `rest`, which may be shorter.
fn size(kind: u8, rest: &[u8]) -> Result<usize, Error> {
    let plus = |more: usize, least: usize| match length(rest)? {
        bytes if bytes < least => Err(fault("a length that is too small")),
        bytes => bytes.checked_add(more).ok_or(fault("a length beyond all bounds")),
    };
    Ok(match kind {
        kind::UNDEFINED | kind::NULL | kind::MIN_KEY | kind::MAX_KEY => 0,
        kind::BOOL => 1,
        kind::INT32 => 4,
        kind::DOUBLE | kind::DATE | kind::TIMESTAMP | kind::INT64 => 8,
        kind::OBJECT_ID => 12,
        kind::DECIMAL128 => 16,
        kind::STRING | kind::JAVASCRIPT | kind::SYMBOL => plus(4, 1)?,
        kind::DB_POINTER => plus(4 + 12, 1)?,
        kind::BINARY => plus(4 + 1, 0)?,
        kind::DOCUMENT | kind::ARRAY => plus(0, EMPTY_BYTES)?,
        // Its length, a string's length and NUL, an empty document.
        kind::JAVASCRIPT_SCOPE => plus(0, 4 + 4 + 1 + EMPTY_BYTES)?,
        kind::REGEX => {
            let pattern = memchr::memchr(0, rest).ok_or(fault("a pattern without its end"))? + 1;
            let options = memchr::memchr(0, &rest[pattern..]).ok_or(fault("options without their end"))? + 1;
            pattern + options
        }
        _ => return Err(fault("an unknown type")),
    })
}

/// The signed length that `bytes` begins with.
fn length(bytes: &[u8]) -> Result<usize, Error> {
    let head = bytes.first_chunk().ok_or(fault("cut short"))?;
    usize::try_from(i32::from_le_bytes(*head)).map_err(|_| fault("a negative length"))
}

/// Checks a document and everything below it: every length, every type, no deeper than `depth_max`.
///
/// # Errors
/// What is wrong.
pub fn validate(document: Document<'_>, depth_max: usize) -> Result<(), Error> {
    for element in document {
        validate_element(&element?, depth_max)?;
    }
    Ok(())
}

/// Checks what is below an element whose document may have `depth_max` levels, its own among them.
///
/// # Errors
/// What is wrong.
pub fn validate_element(element: &Element<'_>, depth_max: usize) -> Result<(), Error> {
    let Some(inner) = inner(element)? else { return Ok(()) };
    if depth_max <= 1 {
        return Err(fault("nested too deeply"));
    }
    // No deeper than `depth_max`, so that the stack holds it.
    validate(inner, depth_max - 1)
}

/// The document inside an element: itself, an array, or the scope of a function.
fn inner<'a>(element: &Element<'a>) -> Result<Option<Document<'a>>, Error> {
    if element.kind == kind::JAVASCRIPT_SCOPE {
        let code = &element.value[4..];
        let code_bytes = length(code)?.checked_add(4).ok_or(fault("a length beyond all bounds"))?;
        let scope = code.get(code_bytes..).ok_or(fault("a function longer than its value"))?;
        return Document::new(scope).map(Some);
    }
    Ok(element.document().or(element.array()))
}

/// A document under construction; [`close`] ends it.
#[must_use = "an open document has no length yet"]
#[derive(Debug)]
pub struct Open(usize);

/// Begins a document that is no element: a message's body, a statement.
pub fn open(out: &mut Vec<u8>) -> Open {
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    Open(at)
}

/// Begins an embedded document.
pub fn open_document(out: &mut Vec<u8>, key: &str) -> Open {
    put_head(out, kind::DOCUMENT, key.as_bytes());
    open(out)
}

/// Begins an array; its elements are named `0`, `1`, … ([`Index`]).
pub fn open_array(out: &mut Vec<u8>, key: &str) -> Open {
    put_head(out, kind::ARRAY, key.as_bytes());
    open(out)
}

/// Ends what `open` began.
pub fn close(out: &mut Vec<u8>, open: Open) {
    out.push(0);
    let bytes = i32::try_from(out.len() - open.0).unwrap_or(i32::MAX);
    out[open.0..open.0 + 4].copy_from_slice(&bytes.to_le_bytes());
}

/// The name of an array's element without an allocation.
#[derive(Debug)]
pub struct Index {
    digits: [u8; 20],
    from: usize,
}

impl Index {
    /// Of element `number`.
    pub fn new(mut number: usize) -> Self {
        let mut it = Self { digits: [b'0'; 20], from: 20 };
        loop {
            it.from -= 1;
            it.digits[it.from] = b'0' + u8::try_from(number % 10).unwrap_or_default();
            number /= 10;
            if number == 0 {
                return it;
            }
        }
    }

    /// Its digits.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.digits[self.from..]).unwrap_or_default()
    }
}

/// Type and name of an element; its value has to follow. A NUL inside the name would end it: callers write names of
/// their own, or names that came off the wire.
pub fn put_head(out: &mut Vec<u8>, kind: u8, key: &[u8]) {
    debug_assert!(!key.contains(&0), "a name holds no NUL");
    out.push(kind);
    out.extend_from_slice(key);
    out.push(0);
}

/// An element copied under its own name.
pub fn put(out: &mut Vec<u8>, element: &Element<'_>) {
    out.extend_from_slice(element.span);
}

/// An element's value under another name.
pub fn put_as(out: &mut Vec<u8>, key: &str, element: &Element<'_>) {
    put_head(out, element.kind, key.as_bytes());
    out.extend_from_slice(element.value);
}

/// A string.
pub fn put_str(out: &mut Vec<u8>, key: &str, text: &str) {
    put_head(out, kind::STRING, key.as_bytes());
    let bytes = i32::try_from(text.len() + 1).unwrap_or(i32::MAX);
    out.extend_from_slice(&bytes.to_le_bytes());
    out.extend_from_slice(text.as_bytes());
    out.push(0);
}

/// A 32-bit integer.
pub fn put_i32(out: &mut Vec<u8>, key: &str, number: i32) {
    put_head(out, kind::INT32, key.as_bytes());
    out.extend_from_slice(&number.to_le_bytes());
}

/// A 64-bit integer.
pub fn put_i64(out: &mut Vec<u8>, key: &str, number: i64) {
    put_head(out, kind::INT64, key.as_bytes());
    out.extend_from_slice(&number.to_le_bytes());
}

/// A double.
pub fn put_f64(out: &mut Vec<u8>, key: &str, number: f64) {
    put_head(out, kind::DOUBLE, key.as_bytes());
    out.extend_from_slice(&number.to_le_bytes());
}

/// A boolean.
pub fn put_bool(out: &mut Vec<u8>, key: &str, value: bool) {
    put_head(out, kind::BOOL, key.as_bytes());
    out.push(value.into());
}

/// Null.
pub fn put_null(out: &mut Vec<u8>, key: &str) {
    put_head(out, kind::NULL, key.as_bytes());
}

/// A date in milliseconds since 1970.
pub fn put_date(out: &mut Vec<u8>, key: &str, at_ms: i64) {
    put_head(out, kind::DATE, key.as_bytes());
    out.extend_from_slice(&at_ms.to_le_bytes());
}

/// An ObjectId.
pub fn put_object_id(out: &mut Vec<u8>, key: &str, id: &[u8; 12]) {
    put_head(out, kind::OBJECT_ID, key.as_bytes());
    out.extend_from_slice(id);
}

/// Binary data.
pub fn put_binary(out: &mut Vec<u8>, key: &str, subtype: u8, bytes: &[u8]) {
    put_head(out, kind::BINARY, key.as_bytes());
    out.extend_from_slice(&i32::try_from(bytes.len()).unwrap_or(i32::MAX).to_le_bytes());
    out.push(subtype);
    out.extend_from_slice(bytes);
}

/// A whole document.
pub fn put_document(out: &mut Vec<u8>, key: &str, document: Document<'_>) {
    put_head(out, kind::DOCUMENT, key.as_bytes());
    out.extend_from_slice(document.bytes());
}

/// A whole array.
pub fn put_array(out: &mut Vec<u8>, key: &str, array: Document<'_>) {
    put_head(out, kind::ARRAY, key.as_bytes());
    out.extend_from_slice(array.bytes());
}

#[cfg(test)]
mod tests;
