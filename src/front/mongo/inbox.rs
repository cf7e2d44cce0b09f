//! What a client has sent and nobody has looked at yet. A sleeping client owns no buffer: bytes are read into one of
//! the thread, and only those of an unfinished message are kept.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::{
    large::{self, Room},
    spare,
};
use crate::{
    net::Stream,
    wire::{
        self,
        mongo::{Header, MORE_TO_COME, OP_COMPRESSED},
    },
};

/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;

/// Bytes that are taken from a client while a request of its runs; drivers send nothing then, beyond writes that want
/// no answer.
const AHEAD_MAX_BYTES: usize = 1 << 20;

/// Where an OP_MSG's flags end.
const FLAGS_END: usize = 20;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

/// Why no further message comes.
#[derive(Debug)]
pub enum Gone {
    /// The client left, or the connection broke.
    Left,
    /// What it sent is no message.
    Malformed(wire::Error),
}

impl From<io::Error> for Gone {
    fn from(_: io::Error) -> Self {
        Gone::Left
    }
}

/// What has come.
#[derive(Debug)]
pub enum Arrived {
    /// A whole message, and the room that it was lent.
    Message(Header, Vec<u8>, Option<Room>),
    /// The head of a large message, which takes so many bytes: nothing more is read before [`Inbox::lend`] or
    /// [`Inbox::skip`].
    Large(usize),
}

/// Whether a message that was thrown away can be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skipped {
    /// Its sender waits for an answer to this number.
    Asked(i32),
    /// It wanted none.
    Silent,
    /// Whether it wanted one stood inside what was compressed.
    Unknown,
}

/// Bytes that came, from `at` on not looked at yet. Whatever is taken out of it, no byte is moved more than a few times:
/// a client that sends thousands of small messages at once costs what their bytes cost.
#[derive(Debug, Default)]
struct Backlog {
    bytes: Vec<u8>,
    at: usize,
    /// Bytes that were moved so far.
    #[cfg(test)]
    moved: usize,
}

impl Backlog {
    fn left(&self) -> &[u8] {
        &self.bytes[self.at..]
    }

    fn push(&mut self, bytes: &[u8]) {
        // What is moved to the front is no more than what was taken from there.
        if self.at >= self.bytes.len() - self.at {
            self.compact();
        }
        if self.bytes.capacity() == 0 {
            self.bytes = spare::take(bytes.len());
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Takes the first `length` bytes, which are there, and says so in a buffer of their own.
    fn take(&mut self, length: usize) -> Vec<u8> {
        let left = self.bytes.len() - self.at;
        if left - length > length {
            let message = self.bytes[self.at..self.at + length].to_vec();
            self.note(length);
            self.at += length;
            return message;
        }
        // A large one, or the last: what is behind it moves, not itself.
        self.compact();
        let rest = self.bytes.split_off(length);
        self.note(rest.len());
        std::mem::replace(&mut self.bytes, rest)
    }

    /// Throws the first bytes away, `max` at most; gives how many.
    fn discard(&mut self, max: usize) -> usize {
        let part = max.min(self.bytes.len() - self.at);
        self.at += part;
        if self.at == self.bytes.len() {
            (self.bytes, self.at) = (Vec::new(), 0);
        }
        part
    }

    /// Room for a message of `length` bytes that has begun: at once, as growing step by step it would come to hold up
    /// to twice its length.
    fn reserve(&mut self, length: usize) {
        self.compact();
        self.bytes.reserve_exact(length.saturating_sub(self.bytes.len()));
    }

    fn compact(&mut self) {
        if self.at > 0 {
            self.bytes.drain(..self.at);
            self.at = 0;
            self.note(self.bytes.len());
        }
    }

    #[cfg(test)]
    fn note(&mut self, bytes: usize) {
        self.moved += bytes;
    }

    #[cfg(not(test))]
    fn note(&mut self, _bytes: usize) {}
}

/// A client's stream and its unfinished message.
#[derive(Debug)]
pub struct Inbox {
    stream: Stream,
    backlog: Backlog,
    /// What the unfinished message was lent, for a large one.
    room: Option<Room>,
}

impl Inbox {
    /// Nothing was read yet.
    pub fn new(stream: Stream) -> Self {
        Self { stream, backlog: Backlog::default(), room: None }
    }

    /// Gives the next whole message of at most `max` bytes, or asks for room for it.
    pub fn poll_message(&mut self, cx: &mut Context<'_>, max: usize) -> Poll<Result<Arrived, Gone>> {
        loop {
            match Header::read(self.backlog.left(), max) {
                Err(fault) => return Poll::Ready(Err(Gone::Malformed(fault))),
                Ok(Some(header)) => {
                    if self.room.is_none()
                        && let Some(bytes) = large::needed(&header, self.backlog.left(), max)
                    {
                        return Poll::Ready(Ok(Arrived::Large(bytes)));
                    }
                    if self.backlog.left().len() >= header.length {
                        let message = self.backlog.take(header.length);
                        return Poll::Ready(Ok(Arrived::Message(header, message, self.room.take())));
                    }
                }
                Ok(None) => {}
            }
            std::task::ready!(self.poll_read(cx))?;
        }
    }

    /// Lends the message that has begun its room.
    pub fn lend(&mut self, room: Room) {
        self.room = Some(room);
        if let Ok(Some(header)) = Header::read(self.backlog.left(), usize::MAX) {
            self.backlog.reserve(header.length);
        }
    }

    /// Whether a large message is coming in.
    pub fn is_lent(&self) -> bool {
        self.room.is_some()
    }

    /// Reads the message that has begun to its end and throws it away.
    ///
    /// # Errors
    /// The client has gone.
    ///
    /// # Cancel safety
    /// None: drop the connection.
    pub async fn skip(&mut self) -> Result<Skipped, Gone> {
        let Some(header) = Header::read(self.backlog.left(), usize::MAX).map_err(Gone::Malformed)? else {
            return Err(Gone::Left);
        };
        // Its flags, which the head that made it large came with or come with the next bytes.
        while self.backlog.left().len() < FLAGS_END.min(header.length) {
            poll_fn(|cx| self.poll_read(cx)).await?;
        }
        let head = self.backlog.left();
        let silent = head[..FLAGS_END.min(head.len())]
            .last_chunk()
            .is_some_and(|flags| u32::from_le_bytes(*flags) & MORE_TO_COME != 0);
        let mut left = header.length;
        loop {
            left -= self.backlog.discard(left);
            if left == 0 {
                break;
            }
            poll_fn(|cx| self.poll_read(cx)).await?;
        }
        Ok(match header.opcode {
            OP_COMPRESSED => Skipped::Unknown,
            _ if silent => Skipped::Silent,
            _ => Skipped::Asked(header.request_id),
        })
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        BUFFER.with_borrow_mut(|buffer| {
            let mut buffer = ReadBuf::new(buffer);
            std::task::ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer))?;
            if buffer.filled().is_empty() {
                return Poll::Ready(Err(Gone::Left));
            }
            self.backlog.push(buffer.filled());
            Poll::Ready(Ok(()))
        })
    }

    /// Waits until the client has gone; what it sends meanwhile is kept for later.
    ///
    /// # Cancel safety
    /// May be dropped at any point.
    pub async fn gone(&mut self) {
        poll_fn(|cx| {
            while self.backlog.left().len() < AHEAD_MAX_BYTES {
                if std::task::ready!(self.poll_read(cx)).is_err() {
                    return Poll::Ready(());
                }
            }
            // Looked at again when the request is done.
            Poll::Pending
        })
        .await;
    }

    /// Sends a whole message.
    ///
    /// # Errors
    /// The client has gone.
    pub async fn send(&mut self, message: &[u8]) -> io::Result<()> {
        self.stream.write_all(message).await?;
        self.stream.flush().await
    }

    /// Ends TLS in order.
    pub async fn shutdown(&mut self) {
        if let Stream::Tls(_) = self.stream {
            let _ = poll_fn(|cx| Pin::new(&mut self.stream).poll_shutdown(cx)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_of_small_messages_cost_what_their_bytes_cost() {
        let (message, count) = ([7; 50], 20_000);
        let mut backlog = Backlog::default();
        let all = message.repeat(count);
        all.chunks(READ_BYTES).for_each(|read| backlog.push(read));
        for _ in 0..count {
            assert_eq!(backlog.take(message.len()), message);
        }
        assert!(backlog.left().is_empty() && backlog.bytes.capacity() == 0, "a sleeping client owns no buffer");
        assert!(backlog.moved < 2 * all.len(), "{} bytes moved for {}", backlog.moved, all.len());
        // Thrown away, and in turns with what comes, as well.
        let mut backlog = Backlog::default();
        for read in all.chunks(READ_BYTES) {
            backlog.push(read);
            while backlog.left().len() >= message.len() {
                assert!(backlog.discard(message.len()) == message.len() || backlog.left().is_empty());
            }
        }
        assert!(backlog.moved < all.len());
    }

    #[test]
    fn a_large_message_is_handed_over_and_not_copied() {
        let mut backlog = Backlog::default();
        backlog.push(&[1; 100]);
        backlog.push(&[2; 10_000]);
        assert_eq!(backlog.take(100), [1; 100]);
        backlog.reserve(20_000);
        backlog.push(&[2; 10_100]);
        let before = backlog.moved;
        assert_eq!(backlog.take(20_000), [2; 20_000]);
        assert_eq!((backlog.moved - before, backlog.left()), (100, &[2; 100][..]));
    }
}
