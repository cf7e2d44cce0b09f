//! Calls, files and HTTP actions: one request in, one out.
//!
//! The caller is admitted, the call is counted (a batch as many), the organisation is written in where the deployment is
//! shared, and our own token takes the place of the caller's. The answer goes through as it comes; the request's places
//! are held until its last byte has gone.
//!
//! # Invariants
//! - A body that goes on as it comes keeps coming, or its request ends: it holds a place of its tenant's.
//! - Whoever shows no credential has a part of the tenant's limits only, together with all others of that kind.

use std::{
    io,
    pin::Pin,
    sync::{Arc, OnceLock, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    HeaderMap, Method, Request, Response,
    body::{Body as HttpBody, Frame, Incoming, SizeHint},
    header::{self, HeaderName, HeaderValue},
    http::uri::PathAndQuery,
};

use tokio::time::Sleep;

use super::{
    Server,
    arguments::{Own, query_url},
    bearer,
    endpoint::Endpoint,
    forwarded, query, say_where,
};
use crate::{
    front::http::{
        Body, Client,
        body::{self, ReadError},
    },
    quota::{Permit, Slot, clock},
    refusal::{Refusal, TokenFault},
    session::{Session, Visit},
    tenant::{OrgId, Protocol},
    upstream::convex::{Claims, Deployment, DialError, Sending},
    usage::Meter,
};

/// What may stand around a payload: Convex allows its functions' bodies so many bytes more than their arguments.
const ENVELOPE_BYTES: u64 = 2000;

/// Longest time for a body that is read whole.
const BODY_WITHIN: Duration = Duration::from_secs(30);

/// A body that goes on as it comes has to bring so many bytes, or end, each time that it was waited for so long. Shorter
/// in tests, which wait for it.
const PROGRESS_WITHIN: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 15_000 });
const PROGRESS_BYTES: u64 = 4 * 1024;

/// Headers that go on with a call or a file.
const CALL_HEADERS: [HeaderName; 12] = [
    HeaderName::from_static("convex-client"),
    HeaderName::from_static("digest"),
    header::USER_AGENT,
    header::CONTENT_TYPE,
    header::ACCEPT,
    header::ACCEPT_ENCODING,
    header::ORIGIN,
    header::RANGE,
    header::IF_RANGE,
    header::IF_NONE_MATCH,
    header::IF_MODIFIED_SINCE,
    header::CACHE_CONTROL,
];

/// Headers of one connection, and those that say where a client is, which we alone say.
const OWN_HEADERS: [&str; 17] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "content-length",
    "host",
    "authorization",
    "forwarded",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-real-ip",
];

/// Who asks.
enum Caller {
    /// The bearer of this credential.
    Known(Box<Session>, Vec<u8>),
    /// Nobody, at a tenant's own host; with what an application may take for a credential of its own.
    Nobody(Visit, Option<HeaderValue>),
}

impl Caller {
    fn slot(&self) -> &Arc<Slot> {
        match self {
            Caller::Known(session, _) => session.slot(),
            Caller::Nobody(visit, _) => visit.slot(),
        }
    }

    fn meter(&self) -> &Arc<Meter> {
        match self {
            Caller::Known(session, _) => session.meter(),
            Caller::Nobody(visit, _) => visit.meter(),
        }
    }
}

/// What goes on.
struct Outgoing {
    path: PathAndQuery,
    body: Sending,
    /// Function calls that it is.
    units: u64,
    /// Whether it counts among the writes under way.
    write: bool,
    /// What turned out to be wrong with its body.
    fault: Arc<OnceLock<Refusal>>,
}

impl Server {
    /// Relays one request.
    pub(super) async fn relay(
        &self,
        endpoint: Endpoint,
        request: Request<Incoming>,
        client: &Client,
    ) -> Result<Response<Body>, Refusal> {
        let host_org = self.host_org(&request)?;
        let caller = self.caller(endpoint, request.headers(), host_org.as_ref(), client).await?;
        let slot = Arc::clone(caller.slot());
        let deployment = self
            .upstream
            .deployment(&slot.policy().tenant)
            .ok_or(Refusal::Forbidden { what: "this organization has no Convex deployment" })?;
        let method = request.method().clone();
        let headers = match endpoint {
            Endpoint::HttpAction => end_to_end(request.headers(), client),
            _ => forwarded(request.headers(), client.peer, &CALL_HEADERS),
        };
        let outgoing = outgoing(endpoint, request, &deployment, &slot, caller.meter()).await?;
        let places = match (outgoing.write, &caller) {
            (true, Caller::Known(..)) => vec![slot.write().map_err(Refusal::OverLimit)?],
            (true, Caller::Nobody(..)) => slot.guest_write().map_err(Refusal::OverLimit)?.into(),
            (false, _) => Vec::new(),
        };
        let now = clock::now_ns();
        match &caller {
            Caller::Known(..) => slot.admit(Protocol::Convex, now, outgoing.units),
            Caller::Nobody(..) => slot.admit_guest(now, outgoing.units),
        }
        .map_err(Refusal::OverLimit)?;
        self.send(method, headers, outgoing, &deployment, caller, places).await
    }

    /// Who asks: by token; without one only where the protocol has none, and only at a tenant's own host.
    async fn caller(
        &self,
        endpoint: Endpoint,
        headers: &HeaderMap,
        host_org: Option<&OrgId>,
        client: &Client,
    ) -> Result<Caller, Refusal> {
        let action = endpoint == Endpoint::HttpAction;
        let authorization = headers.get(header::AUTHORIZATION);
        let token = match bearer(headers) {
            // A webhook's own scheme.
            Err(Refusal::BadToken(_)) if action && host_org.is_some() => None,
            other => other?,
        };
        if let Some(token) = token {
            self.gate.may_carry(client.transport)?;
            let theirs = |org: &OrgId| host_org.is_none_or(|host| host == org);
            match self.gate.identify(token).await {
                Ok(identity) if theirs(&identity.org) => {
                    let session = self.gate.admit_as(identity, Protocol::Convex).await?;
                    client.admitted();
                    return Ok(Caller::Known(Box::new(session), token.to_vec()));
                }
                Ok(_) => return Err(Refusal::BadToken(TokenFault::BadOrg)),
                // For an HTTP action a bad token is no token, as at Convex.
                Err(Refusal::BadToken(_)) if action && host_org.is_some() => {}
                Err(refusal) => return Err(refusal),
            }
        }
        let open =
            matches!(endpoint, Endpoint::HttpAction | Endpoint::Upload | Endpoint::Download | Endpoint::Timestamp);
        match host_org {
            Some(org) if open => {
                // A token that is none here is not shown to the application either: it may be one elsewhere.
                let own = authorization.filter(|value| action && !looks_like_a_token(value)).cloned();
                let visit = self.gate.visit(org, Protocol::Convex).await?;
                Ok(Caller::Nobody(visit, own))
            }
            _ => Err(Refusal::BadToken(TokenFault::Malformed)),
        }
    }

    async fn send(
        &self,
        method: Method,
        mut headers: HeaderMap,
        outgoing: Outgoing,
        deployment: &Deployment,
        caller: Caller,
        places: Vec<Permit<Slot>>,
    ) -> Result<Response<Body>, Refusal> {
        let authorization = match &caller {
            Caller::Known(session, credential) => {
                let identity = session.identity();
                let claims = Claims { subject: &identity.subject, org: &identity.org, credential };
                let own = self.upstream.authorization(deployment, &claims, identity.expires_at);
                Some(own.ok_or(Refusal::Internal)?)
            }
            Caller::Nobody(_, own) => own.clone(),
        };
        if let Some(value) = authorization {
            headers.insert(header::AUTHORIZATION, value);
        }
        let mut request = Request::new(outgoing.body);
        *request.method_mut() = method;
        *request.uri_mut() = deployment.origin.uri(outgoing.path);
        *request.headers_mut() = headers;
        let meter = Arc::clone(caller.meter());
        meter.requests.fetch_add(outgoing.units, Ordering::Relaxed);
        let answer = self.upstream.request(request).await;
        if let Some(fault) = outgoing.fault.get() {
            return Err(*fault);
        }
        let answer = answer.map_err(|error| {
            tracing::warn!(org = %caller.slot().org(), %error, "convex deployment");
            match error {
                DialError::Slow => Refusal::UpstreamSlow,
                DialError::Unreachable(_) | DialError::Broken(_) | DialError::Refused(_) => Refusal::UpstreamDown,
            }
        })?;
        let (mut parts, body) = answer.into_parts();
        for name in &OWN_HEADERS[..9] {
            parts.headers.remove(*name);
        }
        meter.errors.fetch_add(u64::from(parts.status.is_server_error()), Ordering::Relaxed);
        let body = Answering { body, meter, _caller: caller, _places: places };
        Ok(Response::from_parts(parts, body.boxed()))
    }
}

/// Three parts with dots between: a JSON web token, or one of our own keys.
fn looks_like_a_token(value: &HeaderValue) -> bool {
    let bytes = value.as_bytes();
    bytes.iter().filter(|b| **b == b'.').count() == 2 || memchr::memmem::find(bytes, b"dyk_").is_some()
}

/// An HTTP action's headers: all that are the application's.
fn end_to_end(from: &HeaderMap, client: &Client) -> HeaderMap {
    let mut headers = from.clone();
    // RFC 9110, 7.6.1: what Connection names is for one connection too.
    let named: Vec<String> = from
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(',').map(|name| name.trim().to_ascii_lowercase()))
        .collect();
    for name in named.iter().map(String::as_str).chain(OWN_HEADERS) {
        headers.remove(name);
    }
    say_where(&mut headers, client.peer);
    headers
}

/// What goes on of a request.
async fn outgoing(
    endpoint: Endpoint,
    request: Request<Incoming>,
    deployment: &Deployment,
    slot: &Arc<Slot>,
    meter: &Arc<Meter>,
) -> Result<Outgoing, Refusal> {
    let (payload, upload) = {
        let limits = &slot.policy().limits.convex;
        (limits.payload, limits.upload)
    };
    let own = Own { name: deployment.org_argument.as_deref(), org: slot.org().as_str() };
    let (parts, incoming) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let asked = parts.uri.query().unwrap_or_default();
    let fault = Arc::default();
    let (path, body, units, write): (String, Sending, u64, bool) = match endpoint {
        Endpoint::QueryByUrl => (query_url(asked, &own)?, empty(), 1, false),
        Endpoint::Download => (path, empty(), 1, false),
        Endpoint::Timestamp => (path, empty(), 1, false),
        Endpoint::Upload => {
            let token = query::pairs(asked).find(|(key, _)| key == "token").map(|(_, value)| query::encode(&value));
            let token = token.ok_or(Refusal::Malformed { what: "an upload needs its token" })?;
            let body = arriving(incoming, &parts.headers, upload, &fault, meter)?;
            (format!("{path}?token={token}"), body, 1, true)
        }
        Endpoint::HttpAction => {
            let body = arriving(incoming, &parts.headers, payload, &fault, meter)?;
            let path = if asked.is_empty() { path } else { format!("{path}?{asked}") };
            (path, body, 1, true)
        }
        Endpoint::Query | Endpoint::Write | Endpoint::Run | Endpoint::Batch => {
            if parts.headers.contains_key(header::CONTENT_ENCODING) {
                return Err(Refusal::Malformed { what: "a call's body may not be compressed" });
            }
            let max = usize::try_from(payload.saturating_add(ENVELOPE_BYTES)).unwrap_or(usize::MAX);
            let bytes = body::read(incoming, max, BODY_WITHIN).await.map_err(|error| match error {
                ReadError::TooLarge => Refusal::TooLarge { max_bytes: payload },
                ReadError::TooSlow | ReadError::Gone => Refusal::Malformed { what: "the body did not come" },
            })?;
            meter.bytes_in.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            let text = std::str::from_utf8(&bytes).map_err(|_| Refusal::Malformed { what: "the body is no text" })?;
            let (rewritten, units) = match endpoint {
                Endpoint::Batch => own.batch(text)?,
                _ => (own.call(text)?, 1),
            };
            let sent = rewritten.map_or_else(|| bytes.clone(), Bytes::from);
            (path, Full::new(sent).map_err(|never| match never {}).boxed_unsync(), units, writes(endpoint))
        }
        Endpoint::About | Endpoint::Keys | Endpoint::Preflight | Endpoint::Sync => return Err(Refusal::Internal),
    };
    let path = PathAndQuery::try_from(path).map_err(|_| Refusal::Malformed { what: "the path can't be read" })?;
    Ok(Outgoing { path, body, units, write, fault })
}

/// `/api/run` may call anything.
fn writes(endpoint: Endpoint) -> bool {
    matches!(endpoint, Endpoint::Write | Endpoint::Run)
}

fn empty() -> Sending {
    Full::new(Bytes::new()).map_err(|never| match never {}).boxed_unsync()
}

/// A body that goes on as it comes.
fn arriving(
    body: Incoming,
    headers: &HeaderMap,
    max_bytes: u64,
    fault: &Arc<OnceLock<Refusal>>,
    meter: &Arc<Meter>,
) -> Result<Sending, Refusal> {
    let said = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if said.is_some_and(|said| said > max_bytes) || body.size_hint().lower() > max_bytes {
        return Err(Refusal::TooLarge { max_bytes });
    }
    Ok(Arriving::new(body, max_bytes, fault, meter).boxed_unsync())
}

/// A client's body, counted on its way: one that is longer than it may be, or no longer comes, breaks off.
struct Arriving<B> {
    body: B,
    max_bytes: u64,
    left: u64,
    /// Bytes since `late` was set.
    brought: u64,
    /// When it is too slow, from the first time on that it was waited for.
    late: Option<Pin<Box<Sleep>>>,
    fault: Arc<OnceLock<Refusal>>,
    meter: Arc<Meter>,
}

impl<B> Arriving<B> {
    fn new(body: B, max_bytes: u64, fault: &Arc<OnceLock<Refusal>>, meter: &Arc<Meter>) -> Self {
        let (fault, meter) = (Arc::clone(fault), Arc::clone(meter));
        Self { body, max_bytes, left: max_bytes, brought: 0, late: None, fault, meter }
    }

    fn broken(&self, fault: Refusal) -> io::Error {
        // The first one is what happened.
        let _ = self.fault.set(fault);
        io::Error::other("the client's body was broken off")
    }
}

impl<B> HttpBody for Arriving<B>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: std::error::Error + Send + Sync + 'static,
{
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
            let late = self.late.get_or_insert_with(|| Box::pin(tokio::time::sleep(PROGRESS_WITHIN)));
            ready!(late.as_mut().poll(cx));
            return Poll::Ready(Some(Err(self.broken(Refusal::Malformed { what: "the body did not come" }))));
        };
        let Some(frame) = frame else { return Poll::Ready(None) };
        let frame = frame.map_err(io::Error::other)?;
        let len = frame.data_ref().map_or(0, |data| data.len() as u64);
        let Some(left) = self.left.checked_sub(len) else {
            let max_bytes = self.max_bytes;
            return Poll::Ready(Some(Err(self.broken(Refusal::TooLarge { max_bytes }))));
        };
        self.left = left;
        self.brought += len;
        if self.brought >= PROGRESS_BYTES {
            (self.brought, self.late) = (0, None);
        }
        self.meter.bytes_in.fetch_add(len, Ordering::Relaxed);
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A deployment's body on its way to the client; holds the request's places.
struct Answering {
    body: Incoming,
    meter: Arc<Meter>,
    _caller: Caller,
    _places: Vec<Permit<Slot>>,
}

impl HttpBody for Answering {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let Some(frame) = ready!(Pin::new(&mut self.body).poll_frame(cx)) else { return Poll::Ready(None) };
        let frame = frame.map_err(io::Error::other)?;
        let len = frame.data_ref().map_or(0, |data| data.len() as u64);
        self.meter.bytes_out.fetch_add(len, Ordering::Relaxed);
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client that sends `first`, then one byte each `every`, for ever.
    async fn sent(first: &'static [u8], every: Duration) -> Option<Refusal> {
        let (sender, mut receiver) = tokio::sync::mpsc::channel::<Bytes>(1);
        let client = tokio::spawn(async move {
            let mut next = Bytes::from_static(first);
            while sender.send(next).await.is_ok() {
                tokio::time::sleep(every).await;
                next = Bytes::from_static(b"x");
            }
        });
        let frames = futures_util::stream::poll_fn(move |cx| {
            receiver.poll_recv(cx).map(|it| it.map(|data| Ok::<_, io::Error>(Frame::data(data))))
        });
        let fault = Arc::default();
        let mut body = Arriving::new(http_body_util::StreamBody::new(frames), 1000, &fault, &Arc::default());
        let reading = async { while let Some(Ok(_)) = body.frame().await {} };
        tokio::time::timeout(Duration::from_secs(10), reading).await.expect("it does not go on for ever");
        client.abort();
        fault.get().copied()
    }

    #[tokio::test]
    async fn a_body_that_stops_or_drips_is_given_up() {
        let slow = Some(Refusal::Malformed { what: "the body did not come" });
        assert_eq!(sent(b"x", Duration::from_secs(3600)).await, slow);
        assert_eq!(sent(b"x", Duration::from_millis(20)).await, slow, "a byte now and then is no progress");
        assert_eq!(sent(&[b'x'; 1001], Duration::ZERO).await, Some(Refusal::TooLarge { max_bytes: 1000 }));
    }

    #[test]
    fn only_what_is_no_token_is_an_applications_own() {
        for (value, token) in
            [("Bearer a.b.c", true), ("Bearer dyk_abc", true), ("Basic eDp5", false), ("Bearer whsec_x", false)]
        {
            assert_eq!(looks_like_a_token(&HeaderValue::from_static(value)), token, "{value}");
        }
    }
}
