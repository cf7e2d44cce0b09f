//! A byte stream, whatever it runs over: an enum, so that no signature carries a type parameter for it.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf},
    net::{TcpStream, UnixStream},
};

use super::{limit::Unauthenticated, websocket::WebSocket};

/// Where a connection comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// An address: the socket's own, or what a trusted PROXY header said.
    Ip(SocketAddr),
    /// A Unix socket.
    Unix,
}

impl Peer {
    /// A TCP peer; an IPv4 address that came mapped into IPv6 is written as IPv4.
    pub(super) fn tcp(addr: SocketAddr) -> Self {
        Peer::Ip(SocketAddr::new(addr.ip().to_canonical(), addr.port()))
    }
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Peer::Ip(addr) => addr.fmt(f),
            Peer::Unix => f.write_str("unix"),
        }
    }
}

/// An accepted socket, not yet anyone's.
#[derive(Debug)]
pub struct Conn {
    /// Unique in this process; for logs.
    pub id: u64,
    /// Where it comes from.
    pub peer: Peer,
    /// Whether bytes stay on this machine without TLS: the socket is loopback or Unix, and no PROXY header says that
    /// the client is elsewhere.
    pub local: bool,
    /// The bytes.
    pub stream: Stream,
    /// Its place among the unauthenticated connections of its source, where that is counted. Drop it once the caller
    /// is admitted.
    pub unauthenticated: Option<Unauthenticated>,
}

/// A socket without TLS.
#[derive(Debug)]
pub enum Raw {
    /// TCP.
    Tcp(TcpStream),
    /// A Unix socket.
    Unix(UnixStream),
    /// An in-memory pipe, for tests.
    Memory(DuplexStream),
    /// Bytes that were already read, then the socket. Turns into the socket with the first read after them.
    Replay(Box<Replay>),
}

/// Bytes to be read again before the socket's own.
#[derive(Debug)]
pub struct Replay {
    left: Bytes,
    /// Taken only when this value is being replaced by it.
    inner: Option<Raw>,
}

impl Replay {
    fn inner(&mut self) -> io::Result<&mut Raw> {
        self.inner.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Raw {
    /// A socket that gives `bytes` first: what was read to find out which protocol follows. Free once they are read.
    pub fn replaying(self, bytes: impl Into<Bytes>) -> Raw {
        let left = bytes.into();
        if left.is_empty() { self } else { Raw::Replay(Box::new(Replay { left, inner: Some(self) })) }
    }
}

/// A byte stream.
#[derive(Debug)]
pub enum Stream {
    /// Without TLS.
    Plain(Raw),
    /// With TLS, as server or client. Boxed: its state is a hundred times larger than a socket.
    Tls(Box<tokio_rustls::TlsStream<Raw>>),
    /// Inside a WebSocket's binary frames, which run over one of the others.
    WebSocket(Box<WebSocket>),
}

impl Stream {
    /// Whether TLS protects the bytes.
    pub fn is_tls(&self) -> bool {
        match self {
            Stream::Plain(_) => false,
            Stream::Tls(_) => true,
            Stream::WebSocket(socket) => socket.is_tls(),
        }
    }

    /// Whether what was written may still be here and not with the system: it takes a flush then.
    pub fn is_buffered(&self) -> bool {
        !matches!(self, Stream::Plain(_))
    }

    /// Reads what has arrived; `Pending` where nothing has, and nobody is woken when something does.
    pub fn read_now(&mut self, space: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            // Asks the readiness that the runtime knows already; polling would also leave a waker behind.
            Stream::Plain(Raw::Tcp(socket)) => match socket.try_read_buf(space) {
                Ok(_) => Poll::Ready(Ok(())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
                Err(error) => Poll::Ready(Err(error)),
            },
            other => Pin::new(other).poll_read(&mut Context::from_waker(std::task::Waker::noop()), space),
        }
    }

    /// A plain stream that gives `bytes` first, as [`Raw::replaying`].
    ///
    /// # Errors
    /// `InvalidInput` for any other stream: its bytes were read from what it carries.
    pub fn replaying(self, bytes: impl Into<Bytes>) -> io::Result<Stream> {
        match self {
            Stream::Plain(raw) => Ok(Stream::Plain(raw.replaying(bytes))),
            Stream::Tls(_) | Stream::WebSocket(_) => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

macro_rules! each {
    ($self:expr, $inner:ident => $call:expr) => {
        match $self.get_mut() {
            Raw::Tcp($inner) => $call,
            Raw::Unix($inner) => $call,
            Raw::Memory($inner) => $call,
            Raw::Replay(replay) => {
                let $inner = replay.inner()?;
                $call
            }
        }
    };
}

impl AsyncRead for Raw {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Raw::Replay(replay) = &mut *self {
            if !replay.left.is_empty() {
                let some = replay.left.len().min(buf.remaining());
                buf.put_slice(&replay.left.split_to(some));
                return Poll::Ready(Ok(()));
            }
            if let Some(inner) = replay.inner.take() {
                *self = inner;
            }
        }
        each!(self, inner => Pin::new(inner).poll_read(cx, buf))
    }
}

impl AsyncWrite for Raw {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, inner => Pin::new(inner).poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, inner => Pin::new(inner).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Raw::Memory(_) => false,
            Raw::Replay(replay) => replay.inner.as_ref().is_some_and(Raw::is_write_vectored),
            Raw::Tcp(_) | Raw::Unix(_) => true,
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, inner => Pin::new(inner).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, inner => Pin::new(inner).poll_shutdown(cx))
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(raw) => Pin::new(raw).poll_read(cx, buf),
            Stream::Tls(tls) => Pin::new(tls.as_mut()).poll_read(cx, buf),
            Stream::WebSocket(socket) => Pin::new(socket.as_mut()).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(raw) => Pin::new(raw).poll_write(cx, buf),
            Stream::Tls(tls) => Pin::new(tls.as_mut()).poll_write(cx, buf),
            Stream::WebSocket(socket) => Pin::new(socket.as_mut()).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(raw) => Pin::new(raw).poll_write_vectored(cx, bufs),
            Stream::Tls(tls) => Pin::new(tls.as_mut()).poll_write_vectored(cx, bufs),
            Stream::WebSocket(socket) => Pin::new(socket.as_mut()).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Stream::Plain(raw) => raw.is_write_vectored(),
            Stream::Tls(tls) => tls.is_write_vectored(),
            Stream::WebSocket(socket) => socket.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(raw) => Pin::new(raw).poll_flush(cx),
            Stream::Tls(tls) => Pin::new(tls.as_mut()).poll_flush(cx),
            Stream::WebSocket(socket) => Pin::new(socket.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(raw) => Pin::new(raw).poll_shutdown(cx),
            Stream::Tls(tls) => Pin::new(tls.as_mut()).poll_shutdown(cx),
            Stream::WebSocket(socket) => Pin::new(socket.as_mut()).poll_shutdown(cx),
        }
    }
}
