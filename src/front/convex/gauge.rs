//! A byte stream from a stranger: until it is told who the client is, it gives up after so many bytes. A WebSocket
//! holds a frame whole, and a frame may be as large as the largest tier's payload.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::net::Stream;

/// The stream.
#[derive(Debug)]
pub struct Gauge {
    stream: Stream,
    /// Bytes that may still be read; `None` for a client that is known.
    left: Option<usize>,
}

impl Gauge {
    /// A stranger's stream, of which `max_bytes` are read.
    pub fn new(stream: Stream, max_bytes: usize) -> Self {
        Self { stream, left: Some(max_bytes) }
    }

    /// The client is known.
    pub fn open(&mut self) {
        self.left = None;
    }
}

impl AsyncRead for Gauge {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if let Some(left) = &mut self.left {
            match left.checked_sub(buf.filled().len() - before) {
                Some(now) => *left = now,
                None => return Poll::Ready(Err(io::Error::other("too much from a stranger"))),
            }
        }
        read
    }
}

impl AsyncWrite for Gauge {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
