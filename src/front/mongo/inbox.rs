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

use crate::{
    net::Stream,
    wire::{self, mongo::Header},
};

/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;

/// Bytes that are taken from a client while a request of its runs; drivers send nothing then, beyond writes that want
/// no answer.
const AHEAD_MAX_BYTES: usize = 1 << 20;

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

/// A client's stream and its unfinished message.
#[derive(Debug)]
pub struct Inbox {
    stream: Stream,
    bytes: Vec<u8>,
}

impl Inbox {
    /// Nothing was read yet.
    pub fn new(stream: Stream) -> Self {
        Self { stream, bytes: Vec::new() }
    }

    /// Gives the next whole message of at most `max` bytes.
    pub fn poll_message(&mut self, cx: &mut Context<'_>, max: usize) -> Poll<Result<(Header, Vec<u8>), Gone>> {
        loop {
            match Header::read(&self.bytes, max) {
                Err(fault) => return Poll::Ready(Err(Gone::Malformed(fault))),
                Ok(Some(header)) if self.bytes.len() >= header.length => {
                    let rest = self.bytes.split_off(header.length);
                    return Poll::Ready(Ok((header, std::mem::replace(&mut self.bytes, rest))));
                }
                Ok(_) => {}
            }
            std::task::ready!(self.poll_read(cx))?;
        }
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
