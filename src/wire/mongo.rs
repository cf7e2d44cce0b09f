//! MongoDB's wire protocol: OP_MSG, OP_COMPRESSED, and of the legacy OP_QUERY what the first hello still uses.
//!
//! [`Header::read`] tells how long a message is, `compress` opens OP_COMPRESSED, [`Message::parse`] finds the
//! sections of an OP_MSG, [`Query::parse`] a legacy hello; the `put_*` functions write. [`bson`] walks and writes
//! documents in place. Nothing here knows what a tenant is.

pub mod bson;
pub mod compress;

use self::bson::Document;
use super::Error;

/// A header's length.
pub const HEADER_BYTES: usize = 16;

/// The longest message that servers take, header included.
pub const MESSAGE_MAX_BYTES: usize = 48_000_000;

/// Most sections of kind 1: `bulkWrite` has two, everything else one.
pub const SECTIONS_MAX: usize = 4;

/// Longest name of a section of kind 1.
const IDENTIFIER_MAX_BYTES: usize = 64;

/// The message is followed by a CRC-32C.
pub const CHECKSUM_PRESENT: u32 = 1;
/// No reply is wanted, or another one follows.
pub const MORE_TO_COME: u32 = 1 << 1;
/// Several replies to one request are understood.
pub const EXHAUST_ALLOWED: u32 = 1 << 16;
/// Flags of which an unknown one must be refused.
const REQUIRED_FLAGS: u32 = 0xffff;

/// Legacy reply.
pub const OP_REPLY: i32 = 1;
/// Legacy query.
pub const OP_QUERY: i32 = 2004;
/// A compressed message.
pub const OP_COMPRESSED: i32 = 2012;
/// Everything else.
pub const OP_MSG: i32 = 2013;

const fn fault(what: &'static str) -> Error {
    Error::new("message", what)
}

/// What stands before every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// All of the message in bytes, header included: between [`HEADER_BYTES`] and the cap that was given.
    pub length: usize,
    /// The sender's number.
    pub request_id: i32,
    /// The number of the request that this answers.
    pub response_to: i32,
    /// What follows.
    pub opcode: i32,
}

impl Header {
    /// Reads a header; `None` while fewer than its bytes are there.
    ///
    /// # Errors
    /// The length is shorter than a header or longer than `max`.
    pub fn read(bytes: &[u8], max: usize) -> Result<Option<Self>, Error> {
        let Some(head) = bytes.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let word = |at: usize| i32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        match usize::try_from(word(0)) {
            Ok(length) if length > max => Err(fault("longer than the cap")),
            Ok(length) if length >= HEADER_BYTES => {
                Ok(Some(Self { length, request_id: word(4), response_to: word(8), opcode: word(12) }))
            }
            _ => Err(fault("shorter than its header")),
        }
    }
}

/// A header with a length that [`end`] fills in. Gives where it stands.
pub fn begin(out: &mut Vec<u8>, request_id: i32, response_to: i32, opcode: i32) -> usize {
    let at = out.len();
    for word in [0, request_id, response_to, opcode] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    at
}

/// Writes the length of the message that [`begin`] began at `at`.
pub fn end(out: &mut [u8], at: usize) {
    let length = i32::try_from(out.len() - at).unwrap_or(i32::MAX);
    out[at..at + 4].copy_from_slice(&length.to_le_bytes());
}

/// An OP_MSG by its parts.
#[derive(Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Flag bits.
    pub flags: u32,
    /// The section of kind 0.
    pub body: Document<'a>,
    sections: [(&'a str, &'a [u8]); SECTIONS_MAX],
    count: usize,
}

impl<'a> Message<'a> {
    /// Parses what follows the header of an OP_MSG; `header` is needed for the checksum. Each document of a section
    /// of kind 1 has a good frame; what is in it is not looked at.
    ///
    /// # Errors
    /// It is no OP_MSG: unknown flags, section kinds or lengths, no or two bodies, two sections of one name, a wrong
    /// checksum.
    pub fn parse(header: &[u8; HEADER_BYTES], payload: &'a [u8]) -> Result<Self, Error> {
        let (head, mut rest) = payload.split_first_chunk().ok_or(fault("an OP_MSG without flags"))?;
        let flags = u32::from_le_bytes(*head);
        if flags & REQUIRED_FLAGS & !(CHECKSUM_PRESENT | MORE_TO_COME) != 0 {
            return Err(fault("an unknown flag"));
        }
        if flags & CHECKSUM_PRESENT != 0 {
            let (covered, sum) = rest.split_last_chunk().ok_or(fault("an OP_MSG without its checksum"))?;
            let computed = crc32c::crc32c_append(crc32c::crc32c(header), &payload[..payload.len() - 4]);
            if computed != u32::from_le_bytes(*sum) {
                return Err(fault("a wrong checksum"));
            }
            rest = covered;
        }
        let mut body = None;
        let (mut sections, mut count) = ([("", &[][..]); SECTIONS_MAX], 0);
        while let Some((kind, after)) = rest.split_first() {
            match kind {
                0 => {
                    let (document, left) = Document::split(after)?;
                    if body.replace(document).is_some() {
                        return Err(fault("two bodies"));
                    }
                    rest = left;
                }
                1 => {
                    let (section, left) = section(after)?;
                    if sections[..count].iter().any(|(name, _)| *name == section.0) {
                        return Err(fault("two sections of one name"));
                    }
                    *sections.get_mut(count).ok_or(fault("too many sections"))? = section;
                    count += 1;
                    rest = left;
                }
                _ => return Err(fault("a section of an unknown kind")),
            }
        }
        let body = body.ok_or(fault("an OP_MSG without a body"))?;
        Ok(Self { flags, body, sections, count })
    }

    /// The sections of kind 1: name, and documents back to back.
    pub fn sections(&self) -> &[(&'a str, &'a [u8])] {
        &self.sections[..self.count]
    }

    /// Whether the sender waits for no reply.
    pub fn more_to_come(&self) -> bool {
        self.flags & MORE_TO_COME != 0
    }
}

/// A section of kind 1, and what follows it.
type Section<'a> = ((&'a str, &'a [u8]), &'a [u8]);

fn section(bytes: &[u8]) -> Result<Section<'_>, Error> {
    let head = bytes.first_chunk().ok_or(fault("a section cut short"))?;
    let size = usize::try_from(i32::from_le_bytes(*head)).ok().filter(|&size| size >= 4);
    let size = size.ok_or(fault("a section of no length"))?;
    let (section, rest) = bytes.split_at_checked(size).ok_or(fault("a section longer than its message"))?;
    let named = &section[4..];
    let near = &named[..named.len().min(IDENTIFIER_MAX_BYTES + 1)];
    let end = memchr::memchr(0, near).ok_or(fault("a section without a name"))?;
    let name = std::str::from_utf8(&named[..end]).map_err(|_| fault("a section's name that is no text"))?;
    let documents = &named[end + 1..];
    let mut walk = documents;
    while !walk.is_empty() {
        walk = Document::split(walk)?.1;
    }
    Ok(((name, documents), rest))
}

/// Begins an OP_MSG with one body; the document has to be appended, then [`end`].
pub fn begin_message(out: &mut Vec<u8>, request_id: i32, response_to: i32) -> usize {
    let at = begin(out, request_id, response_to, OP_MSG);
    out.extend_from_slice(&0_u32.to_le_bytes());
    out.push(0);
    at
}

/// A legacy query on a command collection.
#[derive(Debug, PartialEq, Eq)]
pub struct Query<'a> {
    /// The database.
    pub database: &'a str,
    /// The command, out of `$query` where it stood there.
    pub command: Document<'a>,
}

impl<'a> Query<'a> {
    /// Parses what follows the header of an OP_QUERY; `None` for a query that is no command.
    ///
    /// # Errors
    /// It is no OP_QUERY.
    pub fn parse(payload: &'a [u8]) -> Result<Option<Self>, Error> {
        let named = payload.get(4..).ok_or(fault("an OP_QUERY cut short"))?;
        let end = memchr::memchr(0, named).ok_or(fault("an OP_QUERY without a collection"))?;
        let name = std::str::from_utf8(&named[..end]).map_err(|_| fault("a collection that is no text"))?;
        // How many to skip and to return mean nothing to a command.
        let documents = named.get(end + 1 + 8..).ok_or(fault("an OP_QUERY cut short"))?;
        let (mut command, rest) = Document::split(documents)?;
        if !rest.is_empty() {
            // The selector.
            Document::new(rest)?;
        }
        if let Some(Ok(first)) = command.iter().next()
            && matches!(first.key, b"$query" | b"query")
            && let Some(inner) = first.document()
        {
            command = inner;
        }
        Ok(name.strip_suffix(".$cmd").map(|database| Self { database, command }))
    }
}

/// Begins an OP_REPLY with one document, which has to be appended, then [`end`]. `failed` says that the query could
/// not be run.
pub fn begin_reply(out: &mut Vec<u8>, response_to: i32, failed: bool) -> usize {
    /// The document tells of a failure.
    const QUERY_FAILURE: i32 = 2;
    /// `getMore`s may wait: always set by servers.
    const AWAIT_CAPABLE: i32 = 8;
    let at = begin(out, 0, response_to, OP_REPLY);
    out.extend_from_slice(&if failed { QUERY_FAILURE } else { AWAIT_CAPABLE }.to_le_bytes());
    out.extend_from_slice(&0_i64.to_le_bytes());
    out.extend_from_slice(&0_i32.to_le_bytes());
    out.extend_from_slice(&1_i32.to_le_bytes());
    at
}

#[cfg(test)]
mod tests;
