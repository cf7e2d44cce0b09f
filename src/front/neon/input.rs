//! What the session says, read into bounded room.
//!
//! # Invariants
//! - A message is measured by its head, before the rest of it is read.
//! - What an answer is made of never takes more than the answer may have; texts of errors and notices never take more
//!   than [`TEXT_MAX`], whatever their length: the rest of them passes by.

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::wire::{
    neon::{
        reply::RowFault,
        sink::Full,
        value::{self, FIRST_OWN_OID, Kind},
    },
    postgres::{HEAD, head},
};

/// Bytes kept of any message that is not part of the answer: an error's text is for people and logs.
pub const TEXT_MAX: usize = 64 * 1024;

/// Bytes that are made room for at a time: a length alone takes no memory.
const STEP: usize = 64 * 1024;

/// Why there is no result.
#[derive(Debug, PartialEq, Eq)]
pub enum Failure {
    /// The server's ErrorResponse, or the relay's.
    Server(Vec<u8>),
    /// The answer is longer than it may be.
    TooLarge,
    /// COPY takes a conversation.
    Copy,
    /// The session ended without a word, or what was said is not the protocol.
    Lost,
}

impl From<Full> for Failure {
    fn from(_: Full) -> Self {
        Failure::TooLarge
    }
}

impl From<RowFault> for Failure {
    fn from(fault: RowFault) -> Self {
        match fault {
            RowFault::Malformed(_) => Failure::Lost,
            RowFault::TooLarge => Failure::TooLarge,
        }
    }
}

/// Messages from the session, and what is left of the answer's room.
pub struct Input<'a, R> {
    reader: &'a mut R,
    bytes: BytesMut,
    left: usize,
}

impl<'a, R: AsyncRead + Unpin> Input<'a, R> {
    /// Reads for an answer of at most `max_bytes`.
    pub fn new(reader: &'a mut R, max_bytes: usize) -> Self {
        Self { reader, bytes: BytesMut::new(), left: max_bytes }
    }

    /// What is left of the answer's room.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Takes from the answer's room.
    ///
    /// # Errors
    /// [`Failure::TooLarge`] when there is not so much.
    pub fn charge(&mut self, bytes: usize) -> Result<(), Failure> {
        self.left = self.left.checked_sub(bytes).ok_or(Failure::TooLarge)?;
        Ok(())
    }

    /// The next message. An error, a notice and the like come cut where they are too long.
    ///
    /// # Errors
    /// The session ended, or a part of the answer is longer than the room that is left.
    pub async fn message(&mut self) -> Result<BytesMut, Failure> {
        let found = loop {
            match head(&self.bytes).map_err(|_| Failure::Lost)? {
                Some(found) => break found,
                None => self.more(STEP).await?,
            }
        };
        let room = match found.kind {
            b'T' | b'D' => self.left,
            _ => TEXT_MAX,
        };
        if found.len <= room {
            self.fill(found.len).await?;
            return Ok(self.bytes.split_to(found.len));
        }
        match found.kind {
            b'T' | b'D' => Err(Failure::TooLarge),
            b'E' | b'N' | b'A' | b'S' => {
                self.fill(TEXT_MAX).await?;
                let beginning = self.bytes.split_to(TEXT_MAX);
                self.pass(found.len - TEXT_MAX).await?;
                Ok(cut(beginning))
            }
            // Nothing else is ever so long.
            _ => Err(Failure::Lost),
        }
    }

    /// Reads until `len` bytes are there.
    async fn fill(&mut self, len: usize) -> Result<(), Failure> {
        while self.bytes.len() < len {
            self.more(len - self.bytes.len()).await?;
        }
        Ok(())
    }

    /// Reads `len` bytes and forgets them.
    async fn pass(&mut self, mut len: usize) -> Result<(), Failure> {
        loop {
            let here = len.min(self.bytes.len());
            self.bytes.advance(here);
            len -= here;
            if len == 0 {
                return Ok(());
            }
            self.more(STEP).await?;
        }
    }

    async fn more(&mut self, wanted: usize) -> Result<(), Failure> {
        self.bytes.reserve(wanted.min(STEP));
        match self.reader.read_buf(&mut self.bytes).await {
            Ok(1..) => Ok(()),
            Ok(0) | Err(_) => Err(Failure::Lost),
        }
    }

    /// Passes everything up to ReadyForQuery.
    ///
    /// # Errors
    /// The session's, after it was ready again; or it ended.
    pub async fn until_ready(&mut self) -> Result<(), Failure> {
        let mut failure = None;
        loop {
            let message = match self.message().await {
                Ok(message) => message,
                // The session's last words were its refusal.
                Err(lost) => return Err(failure.unwrap_or(lost)),
            };
            match message[0] {
                b'Z' => return failure.map_or(Ok(()), Err),
                b'E' => failure = Some(Failure::Server(message.to_vec())),
                _ => {}
            }
        }
    }

    /// Reads the answer to [`types_question`], which is not part of the client's.
    ///
    /// # Errors
    /// The session's; or it ended.
    pub async fn types(&mut self) -> Result<Vec<(u32, Kind)>, Failure> {
        self.left = TEXT_MAX;
        let mut known = Vec::new();
        loop {
            let message = self.message().await?;
            match message[0] {
                b'Z' => return Ok(known),
                b'E' => return Err(Failure::Server(message.to_vec())),
                b'D' => known.extend(message.get(HEAD + 2..).and_then(type_row)),
                _ => {}
            }
        }
    }
}

/// Ends a message that was broken off: at a character, its last text and itself.
fn cut(mut message: BytesMut) -> BytesMut {
    let is_inside = |byte: &u8| byte & 0xc0 == 0x80;
    while message.len() > HEAD && message.last().is_some_and(is_inside) {
        message.truncate(message.len() - 1);
    }
    if message.len() > HEAD && message.last().is_some_and(|byte| *byte >= 0xc0) {
        message.truncate(message.len() - 1);
    }
    message.extend_from_slice(&[0, 0]);
    let len = u32::try_from(message.len() - 1).unwrap_or(u32::MAX);
    message[1..HEAD].copy_from_slice(&len.to_be_bytes());
    message
}

/// What asks the database about its own types: number, element type, what separates elements.
pub fn types_question(oids: &[u32]) -> String {
    let list: Vec<String> = oids.iter().map(u32::to_string).collect();
    format!(
        "select t.oid::pg_catalog.int8, t.typelem::pg_catalog.int8, e.typdelim from pg_catalog.pg_type t \
         join pg_catalog.pg_type e on e.oid operator(pg_catalog.=) t.typelem \
         where t.typcategory operator(pg_catalog.=) 'A' and t.oid in ({})",
        list.join(",")
    )
}

/// One row of the answer: three texts, each behind its length.
fn type_row(mut rest: &[u8]) -> Option<(u32, Kind)> {
    let mut text = || {
        let len = usize::try_from(rest.split_first_chunk::<4>().map(|(len, _)| i32::from_be_bytes(*len))?).ok()?;
        rest.advance(4);
        let (text, behind) = rest.split_at_checked(len)?;
        rest = behind;
        std::str::from_utf8(text).ok()
    };
    let (oid, element, delimiter) = (text()?.parse().ok()?, text()?.parse().ok()?, *text()?.as_bytes().first()?);
    let element = if element < FIRST_OWN_OID { value::element(element) } else { value::Element::Text };
    Some((oid, Kind::Array(element, delimiter)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::postgres::{backend::field, put};

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        put(&mut out, kind, |out| out.extend_from_slice(body));
        out
    }

    /// Says `head`, and then nothing: whoever waits for the rest waits for ever.
    async fn at_its_head(kind: u8, len: u32, max: usize) -> Result<BytesMut, Failure> {
        let (mut near, mut far) = tokio::io::duplex(64);
        let mut bytes = vec![kind];
        bytes.extend_from_slice(&len.to_be_bytes());
        tokio::io::AsyncWriteExt::write_all(&mut near, &bytes).await.unwrap();
        let told = Input::new(&mut far, max).message().await;
        drop(near);
        told
    }

    #[tokio::test]
    async fn a_part_of_the_answer_is_refused_by_its_head_alone() {
        for kind in [b'D', b'T'] {
            assert_eq!(at_its_head(kind, 150_000_000, 10 << 20).await, Err(Failure::TooLarge));
        }
        assert_eq!(at_its_head(b'C', 150_000_000, 10 << 20).await, Err(Failure::Lost), "no tag is so long");
    }

    #[tokio::test]
    async fn what_was_charged_is_no_longer_there() {
        let row = message(b'D', &[0; 100]);
        let mut reader = &row[..];
        let mut input = Input::new(&mut reader, 150);
        input.charge(60).unwrap();
        assert_eq!(input.message().await, Err(Failure::TooLarge));
        assert_eq!(input.charge(91), Err(Failure::TooLarge));
    }

    #[tokio::test]
    async fn a_long_error_is_cut_at_a_character_and_what_follows_is_read() {
        for shift in 0..3 {
            let mut body = b"SERROR\0C22000\0M".to_vec();
            body.extend(std::iter::repeat_n(b'x', shift));
            body.extend_from_slice("€".repeat(1 << 20).as_bytes());
            body.extend_from_slice(b"\0\0");
            let bytes = [message(b'E', &body), message(b'N', &body), message(b'Z', b"I")].concat();
            let mut reader = &bytes[..];
            let mut input = Input::new(&mut reader, 0);
            let error = input.message().await.unwrap();
            assert!(error.len() <= TEXT_MAX + 2, "{}", error.len());
            assert_eq!(head(&error).unwrap().unwrap().len, error.len());
            assert_eq!(field(&error, b'C'), Some(&b"22000"[..]));
            let text = std::str::from_utf8(field(&error, b'M').unwrap()).unwrap();
            assert!(text.len() > TEXT_MAX - 100 && text.ends_with('€'));
            assert_eq!(input.message().await.unwrap()[0], b'N');
            assert_eq!(input.message().await.unwrap()[0], b'Z');
        }
    }

    #[tokio::test]
    async fn a_message_that_breaks_off_is_a_lost_session() {
        let whole = message(b'C', b"SELECT 1\0");
        for len in 0..whole.len() {
            let mut reader = &whole[..len];
            assert_eq!(Input::new(&mut reader, 100).message().await, Err(Failure::Lost), "{len}");
        }
    }
}
