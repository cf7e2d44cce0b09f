//! A WebSocket as a byte stream: binary frames carry the bytes, where they are cut means nothing.
//!
//! Text frames are a protocol error, Close is the end of the stream, pings are answered. What the bytes are is not
//! known here.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Sink, Stream as Frames};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{self, Message, error::Error, protocol::WebSocketConfig},
};

use super::Stream;

/// Longest frame, and message of several frames, that a client may send: it is held whole until its last byte is
/// there. Clients send one frame per write of theirs; 16 MiB is more than any statement that a tier lets through.
pub const FRAME_MAX: usize = 16 << 20;

/// Bytes per frame that we send: a client holds a frame whole too.
const SENT_MAX: usize = 64 * 1024;

/// A socket's own read buffer, allocated for as long as it lives: small, because most sockets sleep.
const READ_BUFFER: usize = 4 * 1024;

/// The settings of a socket whose messages have at most `message_max` bytes.
pub fn settings(message_max: usize) -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        // Written through: whoever sends decides when a frame leaves.
        .write_buffer_size(0)
        // One message that the peer has not taken, and answers to its pings.
        .max_write_buffer_size(2 * message_max.max(SENT_MAX) + 1024)
        .max_message_size(Some(message_max))
        .max_frame_size(Some(message_max))
}

/// The byte stream.
#[derive(Debug)]
pub struct WebSocket {
    frames: WebSocketStream<Stream>,
    /// What of the last frame was not read yet.
    left: Bytes,
    ended: bool,
}

impl WebSocket {
    /// The bytes of a socket whose handshake is done.
    pub fn new(frames: WebSocketStream<Stream>) -> Self {
        Self { frames, left: Bytes::new(), ended: false }
    }

    /// Whether TLS protects the bytes.
    pub fn is_tls(&self) -> bool {
        self.frames.get_ref().is_tls()
    }
}

/// A transport's own error stays what it is; everything else is the peer's fault.
fn fault(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        Error::ConnectionClosed | Error::AlreadyClosed => io::ErrorKind::BrokenPipe.into(),
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}

impl AsyncRead for WebSocket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            if !self.left.is_empty() {
                let some = self.left.len().min(buf.remaining());
                buf.put_slice(&self.left[..some]);
                self.left.advance(some);
                return Poll::Ready(Ok(()));
            }
            if self.ended {
                return Poll::Ready(Ok(()));
            }
            match ready!(Pin::new(&mut self.frames).poll_next(cx)) {
                Some(Ok(Message::Binary(bytes))) => self.left = bytes,
                // Pings are answered below us; both mean that the peer is there and nothing else.
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Text(_) | Message::Frame(_))) => {
                    self.ended = true;
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "a text frame")));
                }
                Some(Ok(Message::Close(_))) | None => self.ended = true,
                Some(Err(Error::ConnectionClosed | Error::AlreadyClosed)) => self.ended = true,
                // Clients that leave without the closing handshake, which is most of them.
                Some(Err(Error::Protocol(tungstenite::error::ProtocolError::ResetWithoutClosingHandshake))) => {
                    self.ended = true;
                }
                Some(Err(error)) => return Poll::Ready(Err(fault(error))),
            }
        }
    }
}

impl AsyncWrite for WebSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(Pin::new(&mut self.frames).poll_ready(cx)).map_err(fault)?;
        let some = &buf[..buf.len().min(SENT_MAX)];
        Pin::new(&mut self.frames).start_send(Message::Binary(Bytes::copy_from_slice(some))).map_err(fault)?;
        Poll::Ready(Ok(some.len()))
    }

    /// All of it in one frame, as far as it goes: some clients expect what belongs together in one.
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let len = bufs.iter().map(|buf| buf.len()).sum::<usize>().min(SENT_MAX);
        if len == 0 {
            return Poll::Ready(Ok(0));
        }
        ready!(Pin::new(&mut self.frames).poll_ready(cx)).map_err(fault)?;
        let mut frame = BytesMut::with_capacity(len);
        for buf in bufs {
            frame.extend_from_slice(&buf[..buf.len().min(len - frame.len())]);
        }
        Pin::new(&mut self.frames).start_send(Message::Binary(frame.freeze())).map_err(fault)?;
        Poll::Ready(Ok(len))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.frames).poll_flush(cx).map_err(fault)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match ready!(Pin::new(&mut self.frames).poll_close(cx)) {
            Ok(()) | Err(Error::ConnectionClosed | Error::AlreadyClosed) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(fault(error))),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{SinkExt, StreamExt};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio_tungstenite::tungstenite::protocol::Role;

    use super::*;
    use crate::net::Raw;

    async fn pair() -> (WebSocketStream<DuplexStream>, Stream) {
        let (near, far) = duplex(1 << 20);
        let client = WebSocketStream::from_raw_socket(far, Role::Client, None).await;
        let inner = Stream::Plain(Raw::Memory(near));
        let frames = WebSocketStream::from_raw_socket(inner, Role::Server, Some(settings(FRAME_MAX))).await;
        (client, Stream::WebSocket(Box::new(WebSocket::new(frames))))
    }

    #[tokio::test]
    async fn frames_are_bytes_wherever_they_are_cut() {
        let (mut client, mut server) = pair().await;
        for part in [&b"he"[..], b"", b"llo", b"!"] {
            client.send(Message::binary(part.to_vec())).await.unwrap();
        }
        client.send(Message::Ping(Bytes::from_static(b"there?"))).await.unwrap();
        let mut read = [0; 6];
        server.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"hello!");
        let long = vec![7; SENT_MAX + 1];
        server.write_all(&long).await.unwrap();
        server.flush().await.unwrap();
        let mut got = Vec::new();
        while got.len() < long.len() {
            if let Message::Binary(bytes) = client.next().await.unwrap().unwrap() {
                got.extend_from_slice(&bytes);
            }
        }
        assert_eq!(got, long);
        client.close(None).await.unwrap();
        assert_eq!(server.read(&mut read).await.unwrap(), 0, "Close is the end");
    }

    #[tokio::test]
    async fn text_is_a_fault() {
        let (mut client, mut server) = pair().await;
        client.send(Message::text("hello")).await.unwrap();
        let error = server.read(&mut [0; 4]).await.expect_err("text");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(server.read(&mut [0; 4]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_frame_over_the_cap_is_a_fault_before_it_is_held() {
        let (mut client, mut server) = pair().await;
        // Only the head is sent: a fault must not need the payload.
        let mut head = vec![0x82, 0xff];
        head.extend_from_slice(&(FRAME_MAX as u64 + 1).to_be_bytes());
        head.extend_from_slice(&[0; 4]);
        client.get_mut().write_all(&head).await.unwrap();
        assert_eq!(server.read(&mut [0; 4]).await.expect_err("too long").kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn a_client_that_vanishes_is_the_end_and_no_fault() {
        let (client, mut server) = pair().await;
        drop(client);
        assert_eq!(server.read(&mut [0; 4]).await.unwrap(), 0);
    }
}
