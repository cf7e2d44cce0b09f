//! What to write: ranges of the bytes just read, and bytes of our own, in order. Forwarding costs no copy.

use std::{
    io::{self, IoSlice},
    ops::Range,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::AsyncWrite;

use crate::net::Stream;

/// Slices per system call; more are written by the next one.
const SLICES: usize = 16;

/// Several pieces of up to so many bytes are copied into one: gathering them costs the kernel more than that.
const JOINED_MAX: usize = 2048;

/// A list of pieces to write.
#[derive(Debug, Default)]
pub struct Out {
    pieces: Vec<Piece>,
    own: Vec<u8>,
    /// Space for pieces that leave as one.
    joined: Vec<u8>,
}

#[derive(Clone, Debug)]
enum Piece {
    Input(Range<usize>),
    Own(Range<usize>),
}

impl Out {
    /// Adds a range of the input.
    #[inline]
    pub fn input(&mut self, range: Range<usize>) {
        if let Some(Piece::Input(last)) = self.pieces.last_mut()
            && last.end == range.start
        {
            last.end = range.end;
        } else if !range.is_empty() {
            self.pieces.push(Piece::Input(range));
        }
    }

    /// Adds bytes of our own, as written by `write`.
    pub fn own(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.own.len();
        write(&mut self.own);
        let range = start..self.own.len();
        if let Some(Piece::Own(last)) = self.pieces.last_mut() {
            last.end = range.end;
        } else if !range.is_empty() {
            self.pieces.push(Piece::Own(range));
        }
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Bytes to write.
    pub fn len(&self) -> usize {
        self.pieces
            .iter()
            .map(|piece| match piece {
                Piece::Input(range) | Piece::Own(range) => range.len(),
            })
            .sum()
    }

    /// Forgets everything, keeps the memory.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.own.clear();
    }

    /// Appends all that is to be written to `pending`.
    pub fn copy_to(&self, input: &[u8], pending: &mut Vec<u8>) {
        for piece in &self.pieces {
            pending.extend_from_slice(self.slice(input, piece));
        }
    }

    fn slice<'a>(&'a self, input: &'a [u8], piece: &Piece) -> &'a [u8] {
        match piece {
            Piece::Input(range) => &input[range.clone()],
            Piece::Own(range) => &self.own[range.clone()],
        }
    }

    /// Writes what the socket takes at once and leaves the rest in `pending`, which must be empty.
    pub fn write(
        &mut self,
        stream: &mut Stream,
        cx: &mut Context<'_>,
        input: &[u8],
        pending: &mut Vec<u8>,
    ) -> io::Result<()> {
        debug_assert!(pending.is_empty());
        if self.pieces.len() > 1 && self.len() <= JOINED_MAX {
            let mut joined = std::mem::take(&mut self.joined);
            joined.clear();
            self.copy_to(input, &mut joined);
            let written = match Pin::new(stream).poll_write(cx, &joined) {
                Poll::Ready(Ok(0)) => Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(written) => written,
                Poll::Pending => Ok(0),
            };
            let done = written.map(|n| pending.extend_from_slice(&joined[n..]));
            self.joined = joined;
            return done;
        }
        let mut first = 0;
        let mut written = 0;
        while first < self.pieces.len() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let mut count = 0;
            for (slice, piece) in slices.iter_mut().zip(&self.pieces[first..]) {
                let bytes = self.slice(input, piece);
                *slice = IoSlice::new(if count == 0 { &bytes[written..] } else { bytes });
                count += 1;
            }
            let poll = if count == 1 {
                Pin::new(&mut *stream).poll_write(cx, &slices[0])
            } else {
                Pin::new(&mut *stream).poll_write_vectored(cx, &slices[..count])
            };
            let mut n = match poll {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(n)) => n,
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => break,
            };
            while first < self.pieces.len() {
                let left = self.slice(input, &self.pieces[first]).len() - written;
                if n < left {
                    written += n;
                    break;
                }
                n -= left;
                written = 0;
                first += 1;
            }
        }
        for (at, piece) in self.pieces[first..].iter().enumerate() {
            let bytes = self.slice(input, piece);
            pending.extend_from_slice(if at == 0 { &bytes[written..] } else { bytes });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_ranges_become_one_write() {
        let mut out = Out::default();
        out.input(0..5);
        out.input(5..9);
        out.own(|own| own.extend_from_slice(b"xy"));
        out.own(|own| own.push(b'z'));
        out.input(9..9);
        out.input(10..12);
        assert_eq!((out.pieces.len(), out.len()), (3, 14));
        let mut all = Vec::new();
        out.copy_to(b"0123456789ab", &mut all);
        assert_eq!(all, b"012345678xyzab");
    }
}
