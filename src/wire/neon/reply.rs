//! Results and errors, from the server's messages to JSON.

use super::{
    json::put_string,
    sink::{Full, Sink},
    value::{self, Kind},
};
use crate::wire::{
    Error,
    postgres::{HEAD, backend::field, cstr},
};

/// How rows are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// As arrays, not objects.
    pub arrays: bool,
    /// Values as Postgres' text.
    pub raw: bool,
}

/// Why a row was not written to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFault {
    /// The server's message is not the protocol.
    Malformed(Error),
    /// As JSON it is longer than it may be.
    TooLarge,
}

impl From<Error> for RowFault {
    fn from(error: Error) -> Self {
        RowFault::Malformed(error)
    }
}

impl From<Full> for RowFault {
    fn from(_: Full) -> Self {
        RowFault::TooLarge
    }
}

/// The words around the columns in an answer's beginning, in bytes.
const HEAD_WORDS: usize = 24;

/// The columns of a result.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Columns {
    /// What stands before each value: its key in an object.
    keys: Vec<Vec<u8>>,
    oids: Vec<u32>,
    kinds: Vec<Option<Kind>>,
    /// The `fields` of the answer.
    fields: Vec<u8>,
}

impl Columns {
    /// Reads a whole RowDescription.
    ///
    /// # Errors
    /// It breaks off.
    pub fn parse(message: &[u8]) -> Result<Self, Error> {
        const CUT: Error = Error::new("RowDescription", "insufficient data left in message");
        let body = message.get(HEAD..).ok_or(CUT)?;
        let (count, mut rest) = body.split_first_chunk::<2>().ok_or(CUT)?;
        let mut columns = Self::default();
        for at in 0..u16::from_be_bytes(*count) {
            let (name, behind) = cstr(rest).ok_or(CUT)?;
            let (numbers, behind) = behind.split_first_chunk::<18>().ok_or(CUT)?;
            rest = behind;
            let four = |at: usize| [numbers[at], numbers[at + 1], numbers[at + 2], numbers[at + 3]];
            let table = u32::from_be_bytes(four(0));
            let column = i16::from_be_bytes([numbers[4], numbers[5]]);
            let oid = u32::from_be_bytes(four(6));
            let size = i16::from_be_bytes([numbers[10], numbers[11]]);
            let modifier = i32::from_be_bytes(four(12));
            let mut key = Vec::with_capacity(name.len() + 3);
            put_string(&mut key, name);
            if at > 0 {
                columns.fields.push(b',');
            }
            columns.fields.extend_from_slice(b"{\"name\":");
            columns.fields.extend_from_slice(&key);
            columns.fields.extend_from_slice(
                format!(
                    ",\"dataTypeID\":{oid},\"tableID\":{table},\"columnID\":{column},\"dataTypeSize\":{size},\
                     \"dataTypeModifier\":{modifier},\"format\":\"text\"}}"
                )
                .as_bytes(),
            );
            key.push(b':');
            columns.keys.push(key);
            columns.oids.push(oid);
            columns.kinds.push(value::kind(oid));
        }
        Ok(columns)
    }

    /// Bytes that it takes.
    pub fn size(&self) -> usize {
        let keys: usize = self.keys.iter().map(|key| key.capacity() + size_of::<Vec<u8>>()).sum();
        keys + self.fields.len() + self.oids.len() * (size_of::<u32>() + size_of::<Option<Kind>>())
    }

    /// Bytes of the answer's beginning.
    pub fn head_len(&self) -> usize {
        self.fields.len() + HEAD_WORDS
    }

    /// The types that only the database knows.
    pub fn unknown(&self) -> impl Iterator<Item = u32> {
        self.oids.iter().zip(&self.kinds).filter(|(_, kind)| kind.is_none()).map(|(oid, _)| *oid)
    }

    /// Says what a type is.
    pub fn learn(&mut self, oid: u32, kind: Kind) {
        for (known, slot) in self.oids.iter().zip(&mut self.kinds) {
            if *known == oid {
                *slot = Some(kind);
            }
        }
    }

    /// Appends a whole DataRow as JSON. A type that nobody knows is text.
    ///
    /// # Errors
    /// It breaks off, has another number of columns, or finds no room: its beginning was written.
    pub fn put_row(&self, out: &mut Sink<'_>, shape: Shape, message: &[u8]) -> Result<(), RowFault> {
        const CUT: Error = Error::new("DataRow", "insufficient data left in message");
        let body = message.get(HEAD..).ok_or(CUT)?;
        let (count, mut rest) = body.split_first_chunk::<2>().ok_or(CUT)?;
        if usize::from(u16::from_be_bytes(*count)) != self.keys.len() {
            return Err(Error::new("DataRow", "another number of columns than announced").into());
        }
        out.put(if shape.arrays { b"[" } else { b"{" })?;
        for (at, (key, kind)) in self.keys.iter().zip(&self.kinds).enumerate() {
            if at > 0 {
                out.put(b",")?;
            }
            if !shape.arrays {
                out.put(key)?;
            }
            let (len, behind) = rest.split_first_chunk::<4>().ok_or(CUT)?;
            let len = i32::from_be_bytes(*len);
            if len < 0 {
                out.put(b"null")?;
                rest = behind;
                continue;
            }
            let (text, behind) = behind.split_at_checked(usize::try_from(len).unwrap_or(usize::MAX)).ok_or(CUT)?;
            rest = behind;
            let kind = if shape.raw { Kind::Text } else { kind.unwrap_or(Kind::Text) };
            value::put(out, kind, text)?;
        }
        out.put(if shape.arrays { b"]" } else { b"}" })?;
        Ok(())
    }

    /// Appends the answer's beginning, up to its first row.
    pub fn put_head(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"fields\":[");
        out.extend_from_slice(&self.fields);
        out.extend_from_slice(b"],\"rows\":[");
    }
}

/// Appends the answer's end, behind its last row. `tag` is what the server said was done; empty for an empty query.
pub fn put_tail(out: &mut Vec<u8>, tag: &[u8], arrays: bool) {
    let mut words = tag.split(|&byte| byte == b' ');
    let command = words.next().unwrap_or_default();
    // `INSERT` carries an OID that is always 0 before the count.
    let count = words.next_back().filter(|word| !word.is_empty() && word.iter().all(u8::is_ascii_digit));
    out.extend_from_slice(b"],\"command\":");
    put_string(out, command);
    out.extend_from_slice(b",\"rowCount\":");
    out.extend_from_slice(count.unwrap_or(b"null"));
    out.extend_from_slice(if arrays { b",\"rowAsArray\":true}" } else { b",\"rowAsArray\":false}" });
}

/// The keys of an error and the fields of an ErrorResponse that they carry, after `message`.
const FIELDS: [(&str, u8); 16] = [
    ("code", b'C'),
    ("detail", b'D'),
    ("hint", b'H'),
    ("position", b'P'),
    ("internalPosition", b'p'),
    ("internalQuery", b'q'),
    ("severity", b'S'),
    ("where", b'W'),
    ("table", b't'),
    ("column", b'c'),
    ("schema", b's'),
    ("dataType", b'd'),
    ("constraint", b'n'),
    ("file", b'F'),
    ("line", b'L'),
    ("routine", b'R'),
];

/// An ErrorResponse as JSON, with every key there is.
pub fn error(message: &[u8]) -> Vec<u8> {
    let mut out = b"{\"message\":".to_vec();
    put_string(&mut out, field(message, b'M').unwrap_or_default());
    for (key, kind) in FIELDS {
        out.extend_from_slice(b",\"");
        out.extend_from_slice(key.as_bytes());
        out.extend_from_slice(b"\":");
        match field(message, kind) {
            Some(text) => put_string(&mut out, text),
            None => out.extend_from_slice(b"null"),
        }
    }
    out.push(b'}');
    out
}

/// An error that is not the database's: without code and severity, as clients know it.
pub fn plain_error(text: &str) -> Vec<u8> {
    let mut out = b"{\"message\":".to_vec();
    put_string(&mut out, text.as_bytes());
    for (key, _) in FIELDS {
        out.extend_from_slice(b",\"");
        out.extend_from_slice(key.as_bytes());
        out.extend_from_slice(if matches!(key, "code" | "severity") { b"\":\"\"" } else { b"\":null" });
    }
    out.push(b'}');
    out
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::wire::postgres::{
        backend::{Report, Severity},
        put, put_cstr,
    };

    fn description(columns: &[(&str, u32)]) -> Vec<u8> {
        let mut out = Vec::new();
        put(&mut out, b'T', |out| {
            out.extend_from_slice(&u16::try_from(columns.len()).unwrap().to_be_bytes());
            for (name, oid) in columns {
                put_cstr(out, name.as_bytes());
                out.extend_from_slice(&[0, 0, 0, 9, 0, 2]);
                out.extend_from_slice(&oid.to_be_bytes());
                out.extend_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]);
            }
        });
        out
    }

    fn row(values: &[Option<&str>]) -> Vec<u8> {
        let mut out = Vec::new();
        put(&mut out, b'D', |out| {
            out.extend_from_slice(&u16::try_from(values.len()).unwrap().to_be_bytes());
            for value in values {
                match value {
                    None => out.extend_from_slice(&(-1i32).to_be_bytes()),
                    Some(text) => {
                        out.extend_from_slice(&u32::try_from(text.len()).unwrap().to_be_bytes());
                        out.extend_from_slice(text.as_bytes());
                    }
                }
            }
        });
        out
    }

    fn everything(out: &mut Vec<u8>) -> Sink<'_> {
        Sink::new(out, usize::MAX)
    }

    #[test]
    fn a_result_is_json_in_all_four_shapes() {
        let columns = Columns::parse(&description(&[("n", 23), ("a\"b", 25), ("m", 20_000)])).unwrap();
        assert_eq!(columns.unknown().collect::<Vec<_>>(), [20_000]);
        for (arrays, raw, wanted) in [
            (false, false, json!({"n": 5, "a\"b": null, "m": "x"})),
            (true, false, json!([5, null, "x"])),
            (false, true, json!({"n": "5", "a\"b": null, "m": "x"})),
            (true, true, json!(["5", null, "x"])),
        ] {
            let shape = Shape { arrays, raw };
            let mut out = Vec::new();
            columns.put_head(&mut out);
            let whole = row(&[Some("5"), None, Some("x")]);
            columns.put_row(&mut Sink::new(&mut out, usize::MAX), shape, &whole).unwrap();
            put_tail(&mut out, b"SELECT 1", arrays);
            let answer: Value = serde_json::from_slice(&out).unwrap();
            assert_eq!(answer["rows"], json!([wanted]));
            assert_eq!(answer["rowAsArray"], json!(arrays));
            assert_eq!(
                answer["fields"][0],
                json!({"name": "n", "dataTypeID": 23, "tableID": 9, "columnID": 2, "dataTypeSize": -1, "dataTypeModifier": -1, "format": "text"})
            );
        }
    }

    #[test]
    fn tags_are_taken_apart() {
        for (tag, command, count) in [
            ("INSERT 0 5", "INSERT", json!(5)),
            ("SELECT 0", "SELECT", json!(0)),
            ("CREATE TABLE", "CREATE", json!(null)),
            ("BEGIN", "BEGIN", json!(null)),
            ("REFRESH MATERIALIZED VIEW", "REFRESH", json!(null)),
            ("", "", json!(null)),
        ] {
            let mut out = b"{\"rows\":[".to_vec();
            put_tail(&mut out, tag.as_bytes(), false);
            let answer: Value = serde_json::from_slice(&out).unwrap();
            assert_eq!((&answer["command"], &answer["rowCount"]), (&json!(command), &count), "{tag}");
        }
    }

    #[test]
    fn errors_have_every_key() {
        let report = Report {
            severity: Severity::Error,
            code: "42P01",
            message: "no \"x\"".into(),
            detail: String::new(),
            hint: "h".into(),
        };
        let mut message = Vec::new();
        report.put(&mut message);
        let said: Value = serde_json::from_slice(&error(&message)).unwrap();
        assert_eq!(said["code"], "42P01");
        assert_eq!(said["message"], "no \"x\"");
        assert_eq!(said["severity"], "ERROR");
        assert_eq!(said["hint"], "h");
        assert_eq!(said.as_object().unwrap().len(), 17);
        assert_eq!(said["position"], Value::Null);
        let plain: Value = serde_json::from_slice(&plain_error("x")).unwrap();
        assert_eq!((plain["code"].as_str(), plain.as_object().unwrap().len()), (Some(""), 17));
    }

    #[test]
    fn messages_that_break_off_are_faults() {
        let whole = description(&[("n", 23)]);
        for len in HEAD..whole.len() {
            assert!(Columns::parse(&whole[..len]).is_err(), "{len}");
        }
        let columns = Columns::parse(&whole).unwrap();
        let (whole, mut out) = (row(&[Some("55")]), Vec::new());
        let malformed = |done| matches!(done, Err(RowFault::Malformed(_)));
        for len in HEAD..whole.len() {
            assert!(malformed(columns.put_row(&mut everything(&mut out), Shape::default(), &whole[..len])), "{len}");
        }
        assert!(malformed(columns.put_row(&mut everything(&mut out), Shape::default(), &row(&[]))));
    }

    #[test]
    fn escapes_are_counted_as_they_are_written() {
        let columns = Columns::parse(&description(&[("n", 23), ("t", 25), ("a", 1009), ("j", 114)])).unwrap();
        let list = format!(r#"{{{},"\\\"",NULL}}"#, "\u{2}".repeat(9));
        let whole = row(&[Some("55"), Some(&"\u{1}".repeat(20)), Some(&list), Some(r#"{"a":[1,2]}"#)]);
        for shape in [(false, false), (false, true), (true, false), (true, true)] {
            let shape = Shape { arrays: shape.0, raw: shape.1 };
            let mut out = b"before".to_vec();
            columns.put_row(&mut everything(&mut out), shape, &whole).unwrap();
            assert!(serde_json::from_slice::<Value>(&out[6..]).is_ok() && out.len() > 2 * whole.len());
            for max in 6..=out.len() {
                let mut bounded = b"before".to_vec();
                let done = columns.put_row(&mut Sink::new(&mut bounded, max), shape, &whole);
                assert_eq!(done.is_ok(), max == out.len(), "{max} of {}", out.len());
                assert!(done.is_ok() || done == Err(RowFault::TooLarge));
                assert!(bounded.len() <= max && bounded.capacity() <= max.max(8) && out.starts_with(&bounded), "{max}");
            }
        }
    }
}
