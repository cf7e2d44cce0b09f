//! From a request to a WebSocket: the handshake of RFC 6455, section 4.2.

use std::io;

use hyper::{
    HeaderMap, Method, Request, Response, StatusCode, Version,
    body::Incoming,
    header::{self, HeaderName, HeaderValue},
    upgrade::OnUpgrade,
};
use hyper_util::{rt::TokioIo, server::conn::auto::upgrade::downcast};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        handshake::derive_accept_key,
        protocol::{Role, WebSocketConfig},
    },
};

use super::{Body, body, patient::Patient};
use crate::net::Stream;

/// Bytes of a `Sec-WebSocket-Key`: 16 random ones in base64.
const KEY_LEN: usize = 24;

/// Whether a request wants to become a WebSocket, well formed or not.
pub fn is_asked(request: &Request<Incoming>) -> bool {
    request.method() == Method::GET && lists(request.headers(), &header::UPGRADE, "websocket")
}

/// A socket that is there once its handshake has been sent.
#[derive(Debug)]
pub struct Upgrading {
    upgrade: OnUpgrade,
    config: WebSocketConfig,
}

/// Answers the handshake: the response to send, and the socket that follows it. No subprotocol and no extension is
/// negotiated, which is always legal and leaves compression out.
///
/// # Errors
/// The response to a request that is no handshake.
pub fn accept(
    request: &mut Request<Incoming>,
    config: WebSocketConfig,
) -> Result<(Response<Body>, Upgrading), Box<Response<Body>>> {
    let headers = request.headers();
    let bad = |message: &str| Box::new(body::error(StatusCode::BAD_REQUEST, "BadWebSocketHandshake", message));
    if request.version() != Version::HTTP_11 || !lists(headers, &header::CONNECTION, "upgrade") {
        return Err(bad("a WebSocket begins with an HTTP/1.1 upgrade"));
    }
    if headers.get(header::SEC_WEBSOCKET_VERSION).map(HeaderValue::as_bytes) != Some(b"13") {
        let mut response = body::error(StatusCode::UPGRADE_REQUIRED, "BadWebSocketVersion", "the version is 13");
        response.headers_mut().insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        return Err(Box::new(response));
    }
    let key = headers.get(header::SEC_WEBSOCKET_KEY).map(HeaderValue::as_bytes);
    let Some(key) = key.filter(|key| key.len() == KEY_LEN) else {
        return Err(bad("Sec-WebSocket-Key is missing or malformed"));
    };
    let accept = HeaderValue::try_from(derive_accept_key(key)).map_err(|_| bad("Sec-WebSocket-Key is malformed"))?;
    let mut response = Response::new(body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    Ok((response, Upgrading { upgrade: hyper::upgrade::on(request), config }))
}

impl Upgrading {
    /// Waits until the handshake has been sent. Call it in a task of its own, not before the response is returned.
    ///
    /// # Errors
    /// The client went away before.
    ///
    /// # Cancel safety
    /// Dropping it closes the connection.
    pub async fn socket(self) -> io::Result<WebSocketStream<Stream>> {
        self.socket_over(|stream| stream).await
    }

    /// The same over what `wrap` makes of the byte stream. What the client sent with its request is not read through it.
    ///
    /// # Errors
    /// As [`Self::socket`].
    ///
    /// # Cancel safety
    /// As [`Self::socket`].
    pub async fn socket_over<S>(self, wrap: impl FnOnce(Stream) -> S) -> io::Result<WebSocketStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let upgraded = self.upgrade.await.map_err(io::Error::other)?;
        let parts = downcast::<TokioIo<Patient>>(upgraded)
            .map_err(|_| io::Error::other("an upgraded connection of another kind"))?;
        let stream = parts.io.into_inner().into_inner();
        let early = parts.read_buf.to_vec();
        Ok(WebSocketStream::from_partially_read(wrap(stream), early, Role::Server, Some(self.config)).await)
    }
}

/// Whether a comma-separated header names `word`, in any case.
fn lists(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|item| item.trim().eq_ignore_ascii_case(word))
}
