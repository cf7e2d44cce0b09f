//! JSON text (RFC 8259): a scanner that validates and finds, and the writing of strings.

use std::borrow::Cow;

use super::sink::{Full, Sink};

/// Deepest nesting: what `serde_json`, and so the service that clients know, allows.
pub const DEPTH_MAX: usize = 128;

/// What is wrong with a JSON text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The byte at which it shows.
    pub at: usize,
    /// What it is.
    pub what: &'static str,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at byte {}", self.what, self.at)
    }
}

/// A walk through one JSON text.
#[derive(Clone, Debug)]
pub struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scanner<'a> {
    /// At the beginning of `text`.
    pub fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    /// A fault here.
    pub fn fault(&self, what: &'static str) -> Fault {
        Fault { at: self.at, what }
    }

    fn bytes(&self) -> &'a [u8] {
        self.text.as_bytes()
    }

    /// The next byte that is not white space.
    pub fn peek(&mut self) -> Option<u8> {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.bytes().get(self.at) {
            self.at += 1;
        }
        self.bytes().get(self.at).copied()
    }

    /// Passes `byte` if it is next.
    pub fn pass(&mut self, byte: u8) -> bool {
        let is_next = self.peek() == Some(byte);
        if is_next {
            self.at += 1;
        }
        is_next
    }

    /// Passes `byte`, which has to be next.
    ///
    /// # Errors
    /// It is not; `what` says what should be there.
    pub fn expect(&mut self, byte: u8, what: &'static str) -> Result<(), Fault> {
        if self.pass(byte) { Ok(()) } else { Err(self.fault(what)) }
    }

    /// Says that nothing follows.
    ///
    /// # Errors
    /// Something does.
    pub fn end(&mut self) -> Result<(), Fault> {
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(self.fault("trailing characters")),
        }
    }

    /// Passes one value of any kind; gives its text.
    ///
    /// # Errors
    /// It is not JSON, or nested deeper than `depth` more levels.
    pub fn value(&mut self, depth: usize) -> Result<&'a str, Fault> {
        let first = self.peek();
        let from = self.at;
        let Some(depth) = depth.checked_sub(1) else { return Err(self.fault("recursion limit exceeded")) };
        match first {
            Some(b'"') => self.pass_string().map(|_| ())?,
            Some(b'{') => {
                self.at += 1;
                if !self.pass(b'}') {
                    loop {
                        self.peek();
                        self.pass_string()?;
                        self.expect(b':', "expected `:`")?;
                        self.value(depth)?;
                        if !self.pass(b',') {
                            break;
                        }
                    }
                    self.expect(b'}', "expected `,` or `}`")?;
                }
            }
            Some(b'[') => {
                self.at += 1;
                if !self.pass(b']') {
                    loop {
                        self.value(depth)?;
                        if !self.pass(b',') {
                            break;
                        }
                    }
                    self.expect(b']', "expected `,` or `]`")?;
                }
            }
            Some(b't') => self.word("true")?,
            Some(b'f') => self.word("false")?,
            Some(b'n') => self.word("null")?,
            Some(b'-' | b'0'..=b'9') => match number_len(&self.bytes()[self.at..]) {
                Some(len) => self.at += len,
                None => return Err(self.fault("invalid number")),
            },
            Some(_) => return Err(self.fault("expected value")),
            None => return Err(self.fault("EOF while parsing a value")),
        }
        Ok(&self.text[from..self.at])
    }

    /// Passes a string; gives what it says.
    ///
    /// # Errors
    /// Something else is next, or it is malformed.
    pub fn string(&mut self) -> Result<Cow<'a, str>, Fault> {
        self.peek();
        let from = self.at + 1;
        let is_plain = self.pass_string()?;
        let raw = &self.text[from..self.at - 1];
        if is_plain { Ok(Cow::Borrowed(raw)) } else { unescape(raw, from).map(Cow::Owned) }
    }

    /// Passes a string; says whether it has no escapes. Escapes are checked for their shape here, surrogates where
    /// the string is read.
    fn pass_string(&mut self) -> Result<bool, Fault> {
        if self.bytes().get(self.at) != Some(&b'"') {
            return Err(self.fault("expected a string"));
        }
        let mut at = self.at + 1;
        let mut is_plain = true;
        loop {
            match self.bytes().get(at) {
                Some(b'"') => break,
                Some(b'\\') => {
                    is_plain = false;
                    at += match self.bytes().get(at + 1) {
                        Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => 2,
                        Some(b'u')
                            if self
                                .bytes()
                                .get(at + 2..at + 6)
                                .is_some_and(|d| d.iter().all(u8::is_ascii_hexdigit)) =>
                        {
                            6
                        }
                        _ => return Err(Fault { at, what: "invalid escape" }),
                    };
                }
                Some(0..0x20) => return Err(Fault { at, what: "control character in a string" }),
                Some(_) => at += 1,
                None => return Err(Fault { at, what: "EOF while parsing a string" }),
            }
        }
        self.at = at + 1;
        Ok(is_plain)
    }

    fn word(&mut self, word: &str) -> Result<(), Fault> {
        if !self.text[self.at..].starts_with(word) {
            return Err(self.fault("expected value"));
        }
        self.at += word.len();
        Ok(())
    }
}

/// The length of the JSON number that `bytes` begin with.
pub fn number_len(bytes: &[u8]) -> Option<usize> {
    let digits = |at: usize| bytes[at..].iter().take_while(|b| b.is_ascii_digit()).count();
    let mut at = usize::from(bytes.first() == Some(&b'-'));
    let whole = digits(at);
    if whole == 0 || (whole > 1 && bytes[at] == b'0') {
        return None;
    }
    at += whole;
    if bytes.get(at) == Some(&b'.') {
        let fraction = digits(at + 1);
        if fraction == 0 {
            return None;
        }
        at += 1 + fraction;
    }
    if let Some(b'e' | b'E') = bytes.get(at) {
        at += 1 + usize::from(matches!(bytes.get(at + 1), Some(b'+' | b'-')));
        let exponent = bytes.get(at..).map_or(0, |_| digits(at));
        if exponent == 0 {
            return None;
        }
        at += exponent;
    }
    Some(at)
}

/// What an escaped string, well shaped, says.
fn unescape(raw: &str, from: usize) -> Result<String, Fault> {
    let mut text = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some(at) = rest.find('\\') {
        text.push_str(&rest[..at]);
        let fault = Fault { at: from + raw.len() - rest.len() + at, what: "lone surrogate in hex escape" };
        let escape = &rest[at + 1..];
        let (character, len) = match escape.as_bytes().first() {
            Some(b'b') => ('\u{8}', 1),
            Some(b'f') => ('\u{c}', 1),
            Some(b'n') => ('\n', 1),
            Some(b'r') => ('\r', 1),
            Some(b't') => ('\t', 1),
            Some(b'u') => {
                let unit = |text: &str| u32::from_str_radix(text.get(1..5)?, 16).ok();
                let high = unit(escape).ok_or(fault)?;
                match high {
                    0xd800..0xdc00 => {
                        let low = escape.get(5..).and_then(|rest| rest.strip_prefix('\\')).and_then(unit);
                        let low = low.filter(|low| (0xdc00..0xe000).contains(low)).ok_or(fault)?;
                        let code = 0x1_0000 + ((high - 0xd800) << 10) + (low - 0xdc00);
                        (char::from_u32(code).ok_or(fault)?, 11)
                    }
                    code => (char::from_u32(code).ok_or(fault)?, 5),
                }
            }
            Some(&other) => (char::from(other), 1),
            None => return Err(fault),
        };
        text.push(character);
        rest = escape.get(len..).ok_or(fault)?;
    }
    text.push_str(rest);
    Ok(text)
}

/// Appends `text` as a JSON string, however long that gets: for what is short.
pub fn put_string(out: &mut Vec<u8>, text: &[u8]) {
    // There is no more memory than this has room for.
    let _ = write_string(&mut Sink::new(out, usize::MAX), text);
}

/// Writes `text` as a JSON string, of which an escaped byte takes up to six. What is not UTF-8, which only a client
/// encoding that nobody asked for can bring, is replaced.
///
/// # Errors
/// It does not fit; its beginning was written.
pub fn write_string(out: &mut Sink<'_>, text: &[u8]) -> Result<(), Full> {
    out.put(b"\"")?;
    write_inside(out, text)?;
    out.put(b"\"")
}

/// Writes a part of a string, without the quotes around it.
///
/// # Errors
/// As [`write_string`].
pub fn write_inside(out: &mut Sink<'_>, text: &[u8]) -> Result<(), Full> {
    if std::str::from_utf8(text).is_ok() {
        return put_escaped(out, text);
    }
    for chunk in text.utf8_chunks() {
        put_escaped(out, chunk.valid().as_bytes())?;
        if !chunk.invalid().is_empty() {
            out.put("\u{fffd}".as_bytes())?;
        }
    }
    Ok(())
}

fn put_escaped(out: &mut Sink<'_>, text: &[u8]) -> Result<(), Full> {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut from = 0;
    for (at, &byte) in text.iter().enumerate() {
        if byte >= 0x20 && byte != b'"' && byte != b'\\' {
            continue;
        }
        out.put(&text[from..at])?;
        from = at + 1;
        match byte {
            b'"' => out.put(b"\\\"")?,
            b'\\' => out.put(b"\\\\")?,
            b'\n' => out.put(b"\\n")?,
            b'\r' => out.put(b"\\r")?,
            b'\t' => out.put(b"\\t")?,
            0x8 => out.put(b"\\b")?,
            0xc => out.put(b"\\f")?,
            other => {
                let (high, low) = (HEX[usize::from(other >> 4)], HEX[usize::from(other & 15)]);
                out.put(&[b'\\', b'u', b'0', b'0', high, low])?;
            }
        }
    }
    out.put(&text[from..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Result<&str, Fault> {
        let mut scanner = Scanner::new(text);
        let value = scanner.value(DEPTH_MAX)?;
        scanner.end().map(|()| value)
    }

    #[test]
    fn what_serde_reads_is_read_and_what_it_refuses_is_refused() {
        let deep = format!("{}{}", "[".repeat(127), "]".repeat(127));
        let deeper = format!("{}{}", "[".repeat(129), "]".repeat(129));
        for text in [
            "null",
            " true ",
            "false",
            "0",
            "-0",
            "-0.5e+10",
            "1E5",
            "12.50",
            "\"\"",
            r#""a\u00e9\n\/""#,
            "[]",
            "[ ]",
            "{}",
            r#"{"a":[1,{"b":null}],"c":"d"}"#,
            "[1,2 , 3]",
            &deep,
            // Refused.
            "",
            " ",
            "nul",
            "True",
            "01",
            "-",
            "1.",
            ".5",
            "1e",
            "1e+",
            "+1",
            "\"",
            "\"\n\"",
            r#""\x""#,
            r#""\u12""#,
            "[",
            "[1,]",
            "[,1]",
            "[1 2]",
            "{",
            "{a:1}",
            r#"{"a"}"#,
            r#"{"a":1,}"#,
            r#"{"a" 1}"#,
            "1 2",
            "nullx",
            "'a'",
            &deeper,
            "[}",
            "{]",
            "\u{feff}1",
            "NaN",
            "Infinity",
        ] {
            let known = serde_json::from_str::<serde_json::Value>(text).is_ok();
            assert_eq!(value(text).is_ok(), known, "{text:?}");
        }
    }

    #[test]
    fn strings_say_what_serde_reads() {
        for text in [
            r#""""#,
            r#""plain é""#,
            r#""\"\\\/\b\f\n\r\t""#,
            r#""\u0041\u00e9\u20ac""#,
            r#""\ud83d\ude00x""#,
            r#""a\u0000b""#,
            r#""\ud83d""#,
            r#""\ude00""#,
            r#""\ud83dx""#,
            r#""\ud83d\u0041""#,
        ] {
            let known = serde_json::from_str::<String>(text).ok();
            assert_eq!(Scanner::new(text).string().ok().map(Cow::into_owned), known, "{text}");
        }
    }

    #[test]
    fn a_written_string_reads_back() {
        for text in ["", "plain", "\"\\\n\r\t\u{8}\u{c}\u{0}\u{1f}", "é€😀", "</script>"] {
            let mut out = Vec::new();
            put_string(&mut out, text.as_bytes());
            assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text);
        }
        let mut out = Vec::new();
        put_string(&mut out, b"a\xffb");
        assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), "a\u{fffd}b");
    }
}
