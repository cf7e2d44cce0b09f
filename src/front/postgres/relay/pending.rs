//! What a socket has not taken yet.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::AsyncWrite;

use crate::{front::postgres::out::Out, net::Stream};

/// Bytes that a socket has not taken yet.
#[derive(Debug, Default)]
pub(super) struct Pending {
    pub(super) bytes: Vec<u8>,
    /// Of `bytes`, which are a few reads' worth at most.
    at: u32,
    /// The stream may hold bytes of its own.
    flush: bool,
}

impl Pending {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Writes until all is taken.
    pub(super) fn poll(&mut self, stream: &mut Stream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(rest @ [_, ..]) = self.bytes.get(self.at as usize..) {
            match ready!(Pin::new(&mut *stream).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.at += u32::try_from(n).unwrap_or(u32::MAX),
            }
            self.flush = stream.is_buffered();
        }
        if !self.bytes.is_empty() {
            *self = Self { flush: self.flush, ..Self::default() };
        }
        if self.flush {
            ready!(Pin::new(stream).poll_flush(cx))?;
            self.flush = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Writes `out` now, as far as it goes.
    pub(super) fn write(
        &mut self,
        out: &mut Out,
        stream: &mut Stream,
        cx: &mut Context<'_>,
        input: &[u8],
    ) -> io::Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        if !self.is_empty() {
            out.copy_to(input, &mut self.bytes);
            return Ok(());
        }
        out.write(stream, cx, input, &mut self.bytes)?;
        self.flush = stream.is_buffered();
        if self.bytes.is_empty()
            && self.flush
            && let Poll::Ready(flushed) = Pin::new(stream).poll_flush(cx)
        {
            flushed?;
            self.flush = false;
        }
        Ok(())
    }
}
