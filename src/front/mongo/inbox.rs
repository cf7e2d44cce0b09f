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

use super::large::{self, Room};
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

/// A client's stream and its unfinished message.
#[derive(Debug)]
pub struct Inbox {
    stream: Stream,
    bytes: Vec<u8>,
    /// What the unfinished message was lent, for a large one.
    room: Option<Room>,
}

impl Inbox {
    /// Nothing was read yet.
    pub fn new(stream: Stream) -> Self {
        Self { stream, bytes: Vec::new(), room: None }
    }

    /// Gives the next whole message of at most `max` bytes, or asks for room for it.
    pub fn poll_message(&mut self, cx: &mut Context<'_>, max: usize) -> Poll<Result<Arrived, Gone>> {
        loop {
            match Header::read(&self.bytes, max) {
                Err(fault) => return Poll::Ready(Err(Gone::Malformed(fault))),
                Ok(Some(header)) => {
                    if self.room.is_none()
                        && let Some(bytes) = large::needed(&header, &self.bytes, max)
                    {
                        return Poll::Ready(Ok(Arrived::Large(bytes)));
                    }
                    if self.bytes.len() >= header.length {
                        let rest = self.bytes.split_off(header.length);
                        let message = std::mem::replace(&mut self.bytes, rest);
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
        if let Ok(Some(header)) = Header::read(&self.bytes, usize::MAX) {
            // At once: growing step by step, it would come to hold up to twice its length.
            self.bytes.reserve_exact(header.length.saturating_sub(self.bytes.len()));
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
        let Some(header) = Header::read(&self.bytes, usize::MAX).map_err(Gone::Malformed)? else {
            return Err(Gone::Left);
        };
        // Its flags, which the head that made it large came with or come with the next bytes.
        while self.bytes.len() < FLAGS_END.min(header.length) {
            poll_fn(|cx| self.poll_read(cx)).await?;
        }
        let silent = self.bytes[..FLAGS_END.min(self.bytes.len())]
            .last_chunk()
            .is_some_and(|flags| u32::from_le_bytes(*flags) & MORE_TO_COME != 0);
        let mut left = header.length;
        loop {
            let part = left.min(self.bytes.len());
            self.bytes.drain(..part);
            left -= part;
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
            self.bytes.extend_from_slice(buffer.filled());
            Poll::Ready(Ok(()))
        })
    }

    /// Waits until the client has gone; what it sends meanwhile is kept for later.
    ///
    /// # Cancel safety
    /// May be dropped at any point.
    pub async fn gone(&mut self) {
        poll_fn(|cx| {
            while self.bytes.len() < AHEAD_MAX_BYTES {
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
