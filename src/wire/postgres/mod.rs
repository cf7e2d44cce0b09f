//! PostgreSQL frontend/backend protocol 3.0 and 3.2: message heads, and the few bodies that a proxy has to read.
//!
//! The relay must not build an owned message per frame (`pgwire` does; `benches/codec.rs` compares): it looks at
//! five-byte heads in the read buffer and forwards by length. Bodies are read in place, and only where a name, a
//! tag or a state hides in them.
//!
//! Source: PostgreSQL documentation, chapter "Frontend/Backend Protocol"; caps from `src/include/libpq/libpq.h`.

pub mod backend;
pub mod frontend;
pub mod startup;

use super::Error;

/// Bytes of a message head: kind and length.
pub const HEAD: usize = 5;

/// Longest message of a kind that may be long: PostgreSQL's MaxAllocSize, less one.
pub const LARGE_MAX: usize = (1 << 30) - 1;

/// Longest message of every other kind: PostgreSQL's PQ_SMALL_MESSAGE_LIMIT.
pub const SMALL_MAX: usize = 10_000;

/// A message's kind and its length on the wire, kind byte included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The kind byte.
    pub kind: u8,
    /// Bytes of the whole message: 1 + the length field.
    pub len: usize,
}

/// Reads a head. The length is checked against the largest cap only; callers know their kinds' caps.
///
/// # Errors
/// A length below 4 or above [`LARGE_MAX`].
#[inline]
pub fn head(bytes: &[u8]) -> Result<Option<Head>, Error> {
    let Some(&[kind, a, b, c, d]) = bytes.first_chunk::<HEAD>() else { return Ok(None) };
    let len = u32::from_be_bytes([a, b, c, d]) as usize;
    if !(4..=LARGE_MAX).contains(&len) {
        return Err(Error::new("message", "invalid length"));
    }
    Ok(Some(Head { kind, len: len + 1 }))
}

/// Splits a zero-terminated string off `bytes`.
pub fn cstr(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = memchr::memchr(0, bytes)?;
    Some((&bytes[..end], &bytes[end + 1..]))
}

/// Appends a message: kind, length, body as written by `body`.
pub fn put(out: &mut Vec<u8>, kind: u8, body: impl FnOnce(&mut Vec<u8>)) {
    out.push(kind);
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    body(out);
    let len = u32::try_from(out.len() - at).unwrap_or(u32::MAX);
    out[at..at + 4].copy_from_slice(&len.to_be_bytes());
}

/// Appends `text` and its terminating zero. A zero inside the text ends it, as it would at the reader.
pub fn put_cstr(out: &mut Vec<u8>, text: &[u8]) {
    out.extend_from_slice(text.split(|&b| b == 0).next().unwrap_or_default());
    out.push(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lying_lengths_are_refused_before_anything_is_waited_for() {
        assert_eq!(head(b"Q\0\0\0"), Ok(None));
        for len in [0u32, 3, 1 << 30, u32::MAX] {
            let mut bytes = vec![b'Q'];
            bytes.extend_from_slice(&len.to_be_bytes());
            assert!(head(&bytes).is_err(), "{len}");
        }
        assert_eq!(head(b"S\0\0\0\x04"), Ok(Some(Head { kind: b'S', len: 5 })));
    }

    #[test]
    fn a_zero_cannot_smuggle_a_second_string() {
        let mut out = Vec::new();
        put(&mut out, b'S', |out| put_cstr(out, b"a\0b"));
        assert_eq!(out, b"S\0\0\0\x06a\0");
    }
}
