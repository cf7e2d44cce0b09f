//! A WebSocket as both sides of a relay use it: text frames in and out, every wait bounded.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Bytes, Error, Message, Utf8Bytes, error::ProtocolError, protocol::CloseFrame},
};

/// Longest time that a peer may take to take one frame. JS' own patience with a silent socket is 60 s.
const TAKE_WITHIN: Duration = Duration::from_secs(60);

/// Longest wait for a peer's part of the closing handshake.
const CLOSE_WITHIN: Duration = Duration::from_secs(2);

/// A socket.
#[derive(Debug)]
pub struct Line<S>(WebSocketStream<S>);

/// What a peer says.
#[derive(Debug)]
pub enum Said {
    /// A frame.
    Text(Utf8Bytes),
    /// That it is there.
    Alive,
}

/// Why a peer says nothing more.
#[derive(Debug)]
pub enum Gone {
    /// It closed, with these words.
    Closed(Option<CloseFrame>),
    /// It vanished, or took nothing for too long.
    Vanished,
    /// It broke the protocol: a binary frame, one that is too long, no UTF-8.
    Broken,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Line<S> {
    pub fn new(socket: WebSocketStream<S>) -> Self {
        Self(socket)
    }

    /// The byte stream beneath.
    pub fn stream(&mut self) -> &mut S {
        self.0.get_mut()
    }

    /// What the peer says next.
    ///
    /// # Errors
    /// It says nothing more.
    ///
    /// # Cancel safety
    /// May be dropped at any point: an unfinished frame stays in the socket.
    pub async fn next(&mut self) -> Result<Said, Gone> {
        match self.0.next().await {
            Some(Ok(Message::Text(text))) => Ok(Said::Text(text)),
            // A ping was answered by the socket itself.
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => Ok(Said::Alive),
            Some(Ok(Message::Close(frame))) => Err(Gone::Closed(frame)),
            Some(Ok(Message::Binary(_) | Message::Frame(_))) => Err(Gone::Broken),
            Some(Err(Error::Io(_) | Error::ConnectionClosed | Error::AlreadyClosed)) | None => Err(Gone::Vanished),
            Some(Err(Error::Protocol(ProtocolError::ResetWithoutClosingHandshake))) => Err(Gone::Vanished),
            Some(Err(_)) => Err(Gone::Broken),
        }
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// The peer is gone, or does not take it.
    ///
    /// # Cancel safety
    /// Not to be dropped before its end.
    pub async fn send(&mut self, text: impl Into<Utf8Bytes>) -> Result<(), Gone> {
        self.message(Message::Text(text.into())).await
    }

    /// Asks the peer for a sign of life.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn ping(&mut self) -> Result<(), Gone> {
        self.message(Message::Ping(Bytes::new())).await
    }

    async fn message(&mut self, message: Message) -> Result<(), Gone> {
        match tokio::time::timeout(TAKE_WITHIN, self.0.send(message)).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Gone::Vanished),
        }
    }

    /// Closes, with a code and a reason or without, and waits a moment for the peer to do the same, so that it has read
    /// everything before the connection ends.
    pub async fn close(mut self, words: Option<(u16, String)>) {
        let frame = words.map(|(code, reason)| CloseFrame { code: code.into(), reason: reason.into() });
        let closing = async {
            if self.0.close(frame).await.is_ok() {
                while let Some(Ok(_)) = self.0.next().await {}
            }
        };
        let _ = tokio::time::timeout(CLOSE_WITHIN, closing).await;
    }
}
