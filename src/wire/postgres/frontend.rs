//! Messages from clients: kinds, caps, and the names in Parse, Bind, Describe, Close and Execute.

use super::{super::Error, HEAD, Head, LARGE_MAX, SMALL_MAX, cstr, head, put};

/// Longest statement or portal name we read: PostgreSQL keeps names of any length for prepared statements, but a
/// name that a driver makes is below 64 bytes.
pub const NAME_MAX: usize = 1024;

/// Reads a client message's head and checks its kind and the kind's cap.
///
/// # Errors
/// An unknown kind, or a length over the kind's cap.
#[inline]
pub fn frontend_head(bytes: &[u8]) -> Result<Option<Head>, Error> {
    let Some(found) = head(bytes)? else {
        return match bytes.first() {
            Some(kind) if cap(*kind).is_none() => Err(Error::new("message", "invalid frontend message type")),
            _ => Ok(None),
        };
    };
    match cap(found.kind) {
        Some(cap) if found.len <= cap + 1 => Ok(Some(found)),
        Some(_) => Err(Error::new("message", "invalid message length")),
        None => Err(Error::new("message", "invalid frontend message type")),
    }
}

#[inline]
fn cap(kind: u8) -> Option<usize> {
    match kind {
        b'Q' | b'P' | b'B' | b'F' | b'd' => Some(LARGE_MAX),
        b'C' | b'D' | b'E' | b'H' | b'S' | b'X' | b'c' | b'f' => Some(SMALL_MAX),
        _ => None,
    }
}

/// A Parse message in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parse<'a> {
    /// The statement's name; empty is the unnamed one.
    pub name: &'a [u8],
    /// Query text with its zero, then the count and the OIDs of parameter types: all that decides the statement.
    pub definition: &'a [u8],
    /// The query text.
    pub query: &'a [u8],
}

/// Reads a whole Parse message.
///
/// # Errors
/// Missing terminators, or a count of types that does not fit the length.
pub fn parse(message: &[u8]) -> Result<Parse<'_>, Error> {
    const AT: &str = "Parse";
    let body = &message[HEAD..];
    let (name, definition) = cstr(body).ok_or(Error::new(AT, "invalid string in message"))?;
    let (query, types) = cstr(definition).ok_or(Error::new(AT, "invalid string in message"))?;
    let Some((count, oids)) = types.split_first_chunk::<2>() else {
        return Err(Error::new(AT, "insufficient data left in message"));
    };
    if oids.len() != usize::from(u16::from_be_bytes(*count)) * 4 {
        return Err(Error::new(AT, "invalid message format"));
    }
    Ok(Parse { name, definition, query })
}

/// The two names at the head of a Bind message, as far as it has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bind<'a> {
    /// The portal's name.
    pub portal: &'a [u8],
    /// The statement's name.
    pub statement: &'a [u8],
    /// Bytes from the start of the message to the first byte behind both names.
    pub head_len: usize,
}

/// Reads the names of a Bind message, which need not have arrived whole.
///
/// # Errors
/// Names over [`NAME_MAX`], or none within the message.
pub fn bind(arrived: &[u8], whole: bool) -> Result<Option<Bind<'_>>, Error> {
    const AT: &str = "Bind";
    let body = &arrived[HEAD..];
    if let Some((portal, rest)) = cstr(body)
        && let Some((statement, rest)) = cstr(rest)
    {
        if portal.len() > NAME_MAX || statement.len() > NAME_MAX {
            return Err(Error::new(AT, "name too long"));
        }
        return Ok(Some(Bind { portal, statement, head_len: arrived.len() - rest.len() }));
    }
    if whole {
        Err(Error::new(AT, "invalid string in message"))
    } else if body.len() > 2 * (NAME_MAX + 1) {
        Err(Error::new(AT, "name too long"))
    } else {
        Ok(None)
    }
}

/// What a Describe or Close message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject<'a> {
    /// A prepared statement.
    Statement(&'a [u8]),
    /// A portal.
    Portal(&'a [u8]),
}

/// Reads a whole Describe or Close message.
///
/// # Errors
/// Another subject than `S` or `P`, or a name that does not end where the message ends.
pub fn subject(message: &[u8]) -> Result<Subject<'_>, Error> {
    const AT: &str = "Describe or Close";
    let Some((kind, name)) = message[HEAD..].split_first() else {
        return Err(Error::new(AT, "insufficient data left in message"));
    };
    let name = match cstr(name) {
        Some((name, [])) => name,
        _ => return Err(Error::new(AT, "invalid message format")),
    };
    match kind {
        b'S' => Ok(Subject::Statement(name)),
        b'P' => Ok(Subject::Portal(name)),
        _ => Err(Error::new(AT, "invalid message subtype")),
    }
}

/// The query text of a whole Query message.
///
/// # Errors
/// A text that does not end where the message ends.
pub fn query(message: &[u8]) -> Result<&[u8], Error> {
    match cstr(&message[HEAD..]) {
        Some((text, [])) => Ok(text),
        _ => Err(Error::new("Query", "invalid string in message")),
    }
}

/// The secret text of a whole PasswordMessage, without its zero.
///
/// # Errors
/// No zero at the end, or a zero inside.
pub fn password(message: &[u8]) -> Result<&[u8], Error> {
    match cstr(&message[HEAD..]) {
        Some((text, [])) => Ok(text),
        _ => Err(Error::new("PasswordMessage", "invalid string in message")),
    }
}

/// A whole SASLInitialResponse: mechanism, and the response if it carries one.
///
/// # Errors
/// Lengths that don't fit.
pub fn sasl_initial(message: &[u8]) -> Result<(&[u8], Option<&[u8]>), Error> {
    const AT: &str = "SASLInitialResponse";
    let (mechanism, rest) = cstr(&message[HEAD..]).ok_or(Error::new(AT, "invalid string in message"))?;
    let Some((len, response)) = rest.split_first_chunk::<4>() else {
        return Err(Error::new(AT, "insufficient data left in message"));
    };
    match i32::from_be_bytes(*len) {
        -1 if response.is_empty() => Ok((mechanism, None)),
        len if usize::try_from(len) == Ok(response.len()) => Ok((mechanism, Some(response))),
        _ => Err(Error::new(AT, "invalid message format")),
    }
}

/// Appends a Parse message.
pub fn put_parse(out: &mut Vec<u8>, name: &[u8], definition: &[u8]) {
    put(out, b'P', |out| {
        out.extend_from_slice(name);
        out.push(0);
        out.extend_from_slice(definition);
    });
}

/// Appends the head of a Bind message whose remaining `tail_len` bytes follow unchanged.
pub fn put_bind_head(out: &mut Vec<u8>, portal: &[u8], statement: &[u8], tail_len: usize) {
    out.push(b'B');
    let len = 4 + portal.len() + 1 + statement.len() + 1 + tail_len;
    out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(portal);
    out.push(0);
    out.extend_from_slice(statement);
    out.push(0);
}

/// Appends a Describe (`D`) or Close (`C`) message for a statement.
pub fn put_statement(out: &mut Vec<u8>, kind: u8, name: &[u8]) {
    put(out, kind, |out| {
        out.push(b'S');
        out.extend_from_slice(name);
        out.push(0);
    });
}

/// Appends a simple Query.
pub fn put_query(out: &mut Vec<u8>, text: &str) {
    put(out, b'Q', |out| super::put_cstr(out, text.as_bytes()));
}

/// A Terminate message.
pub const TERMINATE: [u8; 5] = [b'X', 0, 0, 0, 4];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_kinds_have_a_small_cap() {
        let with_len = |kind: u8, len: u32| {
            let mut bytes = vec![kind];
            bytes.extend_from_slice(&len.to_be_bytes());
            bytes
        };
        assert!(frontend_head(&with_len(b'S', 10_000)).is_ok());
        assert!(frontend_head(&with_len(b'S', 10_001)).is_err());
        assert!(frontend_head(&with_len(b'Q', 1 << 29)).is_ok());
        assert!(frontend_head(b"G").is_err(), "an HTTP request is refused at its first byte");
        assert!(frontend_head(&with_len(b'p', 8)).is_err(), "no password outside the login");
    }

    #[test]
    fn names_are_found_in_place() {
        let mut out = Vec::new();
        put_parse(&mut out, b"s1", b"select $1\0\0\x01\0\0\0\x17");
        let found = parse(&out).unwrap();
        assert_eq!((found.name, found.query), (&b"s1"[..], &b"select $1"[..]));
        let mut out = Vec::new();
        put_bind_head(&mut out, b"p", b"s1", 3);
        let head_len = out.len();
        out.extend_from_slice(b"\0\0\0");
        assert_eq!(bind(&out, true).unwrap().unwrap(), Bind { portal: b"p", statement: b"s1", head_len });
        assert_eq!(bind(&out[..7], false), Ok(None));
        assert!(bind(&out[..7], true).is_err());
    }

    #[test]
    fn bodies_that_lie_are_refused() {
        for bad in [&b"P\0\0\0\0s\0q"[..], b"P\0\0\0\0s\0q\0\0", b"P\0\0\0\0s\0q\0\0\x02\0\0\0\0"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
        for bad in [&b"D\0\0\0\0"[..], b"D\0\0\0\0X\0", b"D\0\0\0\0Sa", b"D\0\0\0\0Sa\0b"] {
            assert!(subject(bad).is_err(), "{bad:?}");
        }
        assert!(query(b"Q\0\0\0\0a\0b\0").is_err());
        assert!(sasl_initial(b"p\0\0\0\0X\0\0\0\0\x09a").is_err());
    }
}
