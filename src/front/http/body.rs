//! Bodies: what is sent, and reading what comes, with a cap and a deadline.

use std::{io, time::Duration};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Empty, Full, combinators::BoxBody};
use hyper::{
    Response, StatusCode,
    body::{Body as _, Incoming},
    header::{self, HeaderValue},
};
use serde_json::json;

/// The body of a response.
pub type Body = BoxBody<Bytes, io::Error>;

/// First allocation for a body that does not say how long it is.
const FIRST: usize = 4 * 1024;

/// A body that is there as a whole.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

/// No body.
pub fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed()
}

/// A JSON text as a response.
pub fn json(status: StatusCode, text: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// An error as Convex and many others write it: `{"code", "message"}`.
pub fn error(status: StatusCode, code: &str, message: &str) -> Response<Body> {
    json(status, json!({"code": code, "message": message}).to_string())
}

/// Bytes of a body over its cap that are still taken from the client.
const DISCARD_MAX: usize = 64 << 20;

/// Why a body could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadError {
    /// It has more bytes than it may, or says so.
    TooLarge,
    /// It did not come in time.
    TooSlow,
    /// The client went away or broke the protocol.
    Gone,
}

/// Reads a whole body of at most `max_bytes`, which has to be there `within`.
///
/// # Errors
/// What kept it from being read. On [`ReadError::TooLarge`] what follows was read and thrown away, up to
/// [`DISCARD_MAX`] bytes: most clients look at the answer only when all they have to say is said.
///
/// # Cancel safety
/// Dropping it loses what was read.
pub async fn read(body: Incoming, max_bytes: usize, within: Duration) -> Result<Bytes, ReadError> {
    tokio::time::timeout(within, collect(body, max_bytes)).await.unwrap_or(Err(ReadError::TooSlow))
}

async fn collect(mut body: Incoming, max_bytes: usize) -> Result<Bytes, ReadError> {
    let said = body.size_hint().upper();
    if body.size_hint().lower() > max_bytes as u64 {
        return Err(discard(body).await);
    }
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| ReadError::Gone)?.into_data() else { continue };
        if data.len() > max_bytes - whole.len() {
            drop(whole);
            return Err(discard(body).await);
        }
        // The usual body is one piece, and is not copied.
        if whole.is_empty() && body.is_end_stream() {
            return Ok(data);
        }
        if whole.is_empty() {
            // What a client says is believed as far as it has been sent: a length alone takes no memory.
            whole.reserve(said.and_then(|said| usize::try_from(said).ok()).unwrap_or(FIRST).min(64 * 1024));
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole.freeze())
}

/// Takes the rest of a body that is too large.
async fn discard(mut body: Incoming) -> ReadError {
    let mut left = DISCARD_MAX;
    while let Some(Ok(frame)) = body.frame().await {
        let len = frame.data_ref().map_or(0, Bytes::len);
        let Some(rest) = left.checked_sub(len) else { break };
        left = rest;
    }
    ReadError::TooLarge
}
