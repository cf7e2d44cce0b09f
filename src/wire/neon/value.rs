//! Postgres' text of a value as JSON.

use super::{
    json::{number_len, write_inside, write_string},
    sink::{Full, Sink},
};

/// How the values of a type are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A number; what JSON has no number for is a string.
    Number,
    /// Embedded as it is.
    Json,
    /// A string.
    Text,
    /// An array of such, with what stands between its elements.
    Array(Element, u8),
}

/// The kinds that arrays hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// As [`Kind::Bool`].
    Bool,
    /// As [`Kind::Number`].
    Number,
    /// As [`Kind::Json`].
    Json,
    /// As [`Kind::Text`].
    Text,
}

/// OIDs from here on are given by a database: what they mean is only known there.
pub const FIRST_OWN_OID: u32 = 16_384;

/// Deepest array: Postgres has at most six dimensions.
const DIMENSIONS_MAX: usize = 8;

/// What stands between the elements of every array but `box[]`.
const COMMA: u8 = b',';

/// The kind of a built-in type; `None` for one that the database gave itself.
pub fn kind(oid: u32) -> Option<Kind> {
    if oid >= FIRST_OWN_OID {
        return None;
    }
    if let Some(element) = array_of(oid) {
        // `box` has its own delimiter, since a comma stands within one.
        let delimiter = if element == BOX { b';' } else { COMMA };
        return Some(Kind::Array(self::element(element), delimiter));
    }
    Some(match element(oid) {
        Element::Bool => Kind::Bool,
        Element::Number => Kind::Number,
        Element::Json => Kind::Json,
        Element::Text => Kind::Text,
    })
}

const BOX: u32 = 603;

/// The kind of an array's elements by their type.
pub fn element(oid: u32) -> Element {
    match oid {
        16 => Element::Bool,
        // int2, int4, float4, float8. Not int8 and numeric: JavaScript would round them.
        21 | 23 | 700 | 701 => Element::Number,
        114 | 3802 => Element::Json,
        _ => Element::Text,
    }
}

/// The element type of a built-in array type (`pg_type.dat`).
fn array_of(oid: u32) -> Option<u32> {
    Some(match oid {
        1000 => 16,
        1005 => 21,
        1007 => 23,
        1021 => 700,
        1022 => 701,
        199 => 114,
        3807 => 3802,
        1020 => BOX,
        // Elements that are text: which one makes no difference. The last is `record[]`, a pseudo-type there.
        143
        | 210
        | 271
        | 629
        | 651
        | 719
        | 775
        | 791
        | 1001..=1003
        | 1006
        | 1008..=1019
        | 1027
        | 1028
        | 1034
        | 1040
        | 1041
        | 1115
        | 1182
        | 1183
        | 1185
        | 1187
        | 1231
        | 1263
        | 1270
        | 1561
        | 1563
        | 2201
        | 2207..=2211
        | 2949
        | 2951
        | 3221
        | 3643..=3645
        | 3735
        | 3770
        | 3905
        | 3907
        | 3909
        | 3911
        | 3913
        | 3927
        | 4073
        | 4090
        | 4097
        | 4192
        | 5039
        | 6150..=6153
        | 6155
        | 6157
        | 10029
        | 2287 => 25,
        _ => return None,
    })
}

/// Why a text was not written as an array.
enum NoArray {
    /// It is no array literal.
    Text,
    Full,
}

impl From<Full> for NoArray {
    fn from(_: Full) -> Self {
        NoArray::Full
    }
}

/// Appends a value's text as JSON.
///
/// # Errors
/// There is no room for it; its beginning was written.
pub fn put(out: &mut Sink<'_>, kind: Kind, text: &[u8]) -> Result<(), Full> {
    match kind {
        Kind::Array(element, delimiter) => {
            let from = out.written();
            match put_array(out, element, delimiter, text) {
                Ok(()) => Ok(()),
                Err(NoArray::Full) => Err(Full),
                // It is still a text.
                Err(NoArray::Text) => {
                    out.truncate(from);
                    write_string(out, text)
                }
            }
        }
        Kind::Bool => put_element(out, Element::Bool, text),
        Kind::Number => put_element(out, Element::Number, text),
        Kind::Json => put_element(out, Element::Json, text),
        Kind::Text => put_element(out, Element::Text, text),
    }
}

fn put_element(out: &mut Sink<'_>, element: Element, text: &[u8]) -> Result<(), Full> {
    match (element, text) {
        (Element::Bool, b"t") => out.put(b"true"),
        (Element::Bool, b"f") => out.put(b"false"),
        (Element::Number, text) if number_len(text) == Some(text.len()) => out.put(text),
        (Element::Json, text) if std::str::from_utf8(text).is_ok() => out.put(text),
        (_, text) => write_string(out, text),
    }
}

/// An array literal as a JSON array; its bounds (`[2:3]=`) are left out.
fn put_array(out: &mut Sink<'_>, element: Element, delimiter: u8, text: &[u8]) -> Result<(), NoArray> {
    let body = match text.first() {
        Some(b'[') => &text[memchr::memchr(b'=', text).ok_or(NoArray::Text)? + 1..],
        _ => text,
    };
    let mut rest = body.strip_prefix(b"{").ok_or(NoArray::Text)?;
    out.put(b"[")?;
    let mut depth = 1;
    let mut scratch = Vec::new();
    // Whether an element or an array may begin here; and whether it would be the first of its array, which may end
    // before it.
    let (mut open, mut first_here) = (true, true);
    loop {
        let (&first, behind) = rest.split_first().ok_or(NoArray::Text)?;
        match first {
            b'{' if open => {
                depth += 1;
                if depth > DIMENSIONS_MAX {
                    return Err(NoArray::Text);
                }
                out.put(b"[")?;
                first_here = true;
                rest = behind;
            }
            b'}' if first_here || !open => {
                out.put(b"]")?;
                depth -= 1;
                (open, first_here) = (false, false);
                rest = behind;
                if depth == 0 {
                    return rest.is_empty().then_some(()).ok_or(NoArray::Text);
                }
            }
            byte if byte == delimiter && !open => {
                out.put(b",")?;
                open = true;
                rest = behind;
            }
            b'"' if open => {
                rest = match element {
                    Element::Text => put_quoted(out, behind)?,
                    Element::Bool | Element::Number | Element::Json => {
                        scratch.clear();
                        let behind = quoted(behind, |piece| {
                            scratch.extend_from_slice(piece);
                            Ok(())
                        })?;
                        put_element(out, element, &scratch)?;
                        behind
                    }
                };
                (open, first_here) = (false, false);
            }
            _ if open => {
                let end = rest.iter().position(|&byte| byte == delimiter || byte == b'}');
                let end = end.ok_or(NoArray::Text)?;
                match &rest[..end] {
                    b"" => return Err(NoArray::Text),
                    b"NULL" => out.put(b"null")?,
                    word => put_element(out, element, word)?,
                }
                rest = &rest[end..];
                (open, first_here) = (false, false);
            }
            _ => return Err(NoArray::Text),
        }
    }
}

/// Writes a quoted text element piece by piece, since it may be as long as the answer; gives what follows it.
fn put_quoted<'a>(out: &mut Sink<'_>, text: &'a [u8]) -> Result<&'a [u8], NoArray> {
    out.put(b"\"")?;
    let behind = quoted(text, |piece| write_inside(out, piece))?;
    out.put(b"\"")?;
    Ok(behind)
}

/// Gives the pieces of a quoted element, of which each begins with a character that a backslash stood before or is the
/// first; then what follows its closing quote.
fn quoted(text: &[u8], mut take: impl FnMut(&[u8]) -> Result<(), Full>) -> Result<&[u8], NoArray> {
    let (mut from, mut at) = (0, 0);
    loop {
        at += memchr::memchr2(b'"', b'\\', &text[at..]).ok_or(NoArray::Text)?;
        take(&text[from..at])?;
        if text[at] == b'"' {
            return Ok(&text[at + 1..]);
        }
        // Whatever is escaped stands for itself.
        text.get(at + 1).ok_or(NoArray::Text)?;
        (from, at) = (at + 1, at + 2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(oid: u32, text: &str) -> String {
        let mut out = Vec::new();
        put(&mut Sink::new(&mut out, usize::MAX), kind(oid).expect("built in"), text.as_bytes()).expect("room");
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn scalars() {
        for (oid, text, wanted) in [
            (16, "t", "true"),
            (16, "f", "false"),
            (23, "-5", "-5"),
            (21, "7", "7"),
            (701, "1.5e-07", "1.5e-07"),
            (701, "NaN", "\"NaN\""),
            (700, "-Infinity", "\"-Infinity\""),
            (20, "9007199254740993", "\"9007199254740993\""),
            (1700, "1.10", "\"1.10\""),
            (114, "{\"a\": [1, 2]}", "{\"a\": [1, 2]}"),
            (3802, "null", "null"),
            (25, "a\"b\n", "\"a\\\"b\\n\""),
            (17, "\\x00ff", "\"\\\\x00ff\""),
            (22, "1 2 3", "\"1 2 3\""),
        ] {
            assert_eq!(json(oid, text), wanted, "{oid} {text}");
        }
    }

    #[test]
    fn arrays() {
        for (oid, text, wanted) in [
            (1007, "{}", "[]"),
            (1007, "{1,NULL,-3}", "[1,null,-3]"),
            (1007, "{{1,2},{3,4}}", "[[1,2],[3,4]]"),
            (1007, "[2:3]={1,2}", "[1,2]"),
            (1007, "[1:1][-2:-1]={{1,2}}", "[[1,2]]"),
            (1009, r#"{a,"b c","d\"e","f\\g","NULL",NULL,""}"#, r#"["a","b c","d\"e","f\\g","NULL",null,""]"#),
            (1000, "{t,f,NULL}", "[true,false,null]"),
            (1016, "{9007199254740993}", "[\"9007199254740993\"]"),
            (1022, "{1.5,NaN,Infinity}", "[1.5,\"NaN\",\"Infinity\"]"),
            (3807, r#"{"{\"a\": 1}",NULL,"null"}"#, r#"[{"a": 1},null,null]"#),
            (1020, "{(1,1),(0,0);(2,2),(1,1)}", "[\"(1,1),(0,0)\",\"(2,2),(1,1)\"]"),
            (1017, r#"{"(1,2)"}"#, r#"["(1,2)"]"#),
            (1009, r#"{"\\\\","\"\"a\b","é\é",""}"#, r#"["\\\\","\"\"ab","éé",""]"#),
            (1000, r#"{"t",f}"#, "[true,false]"),
        ] {
            assert_eq!(json(oid, text), wanted, "{oid} {text}");
        }
    }

    #[test]
    fn what_is_no_array_stays_a_text() {
        for text in [
            "",
            "{",
            "}",
            "{1",
            "{1,",
            "1",
            "{1}x",
            "{1}{2}",
            "{\"a}",
            "[1:2]",
            "{\"a\"b}",
            "{\"a\",}",
            "{1,}",
            "{,1}",
            "{1,,2}",
            "{{},}",
            "{{{{{{{{{{1}}}}}}}}}}",
        ] {
            let out = json(1009, text);
            assert_eq!(serde_json::from_str::<String>(&out).expect("a string"), text);
        }
    }
}
