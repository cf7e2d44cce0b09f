//! The HTTP door: one listener for everything that comes over HTTP/1.1, HTTP/2 and WebSocket.
//!
//! The journey of a connection: TLS if its first byte says so; HTTP/1.1 or HTTP/2 by ALPN or by the preface; each
//! request goes by its path to the front that owns it; a WebSocket leaves HTTP and is its front's own from then on.
//! Who asks, and what may be done, is the front's to find out: nothing here reads a credential.
//!
//! # Invariants
//! - No wait is without an end: the first request, a request's head, its body ([`body::read`]), an idle connection, a
//!   client that does not take what it is sent ([`patient`]).
//! - A connection counts as live, in the drain and under the cap on sockets, until its last WebSocket has ended.
//!
//! Entry point: [`Server::serve`].

pub mod body;
mod client;
mod patient;
pub mod upgrade;

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hyper::{Request, Response, StatusCode, body::Incoming, header, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::io::AsyncReadExt;

pub use self::{body::Body, client::Client};
use self::{client::Held, patient::Patient};
use super::neon;
use crate::{
    net::{Conn, Drain, ServerTls, Stream, accept_tls},
    quota::clock,
    refusal::Refusal,
    session::Transport,
};

/// The ALPN names of the door, best first.
pub const ALPN: [&str; 2] = ["h2", "http/1.1"];

/// The head of a request: a token of 16 KiB in a connection string, another as bearer, and what proxies add.
const HEAD_MAX_BYTES: u32 = 64 * 1024;

/// Headers of a request.
const HEADERS_MAX: usize = 100;

/// How long the rest of a request's head may take after its first byte; in HTTP/1.1 also the pause between two
/// requests. Shorter in tests, which wait for it.
const HEAD_WITHIN: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 30 });

/// A connection without a request for this long is asked to go; browsers and drivers open another one without a word.
const IDLE: Duration = Duration::from_secs(120);

/// Requests at a time on one HTTP/2 connection.
const STREAMS_MAX: u32 = 128;

/// An HTTP/2 client is asked for a sign of life this often, and has so long to give one.
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_WITHIN: Duration = Duration::from_secs(10);

/// Bytes of one response that an HTTP/2 connection holds for a client that is slow to read.
const SEND_BUFFER: usize = 64 * 1024;

/// The first byte of a TLS record that carries a handshake; no HTTP request begins so.
const TLS_HANDSHAKE: u8 = 0x16;

/// How the door behaves.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// From the first byte to the head of the first request, TLS included.
    pub first_request_timeout: Duration,
}

/// The fronts behind the door: those that are configured.
#[derive(Debug, Default)]
pub struct Fronts {
    /// Neon.
    pub neon: Option<Arc<neon::Server>>,
    /// Convex: everything that is not another's.
    pub convex: Option<Arc<super::convex::Server>>,
}

impl Fronts {
    /// Whether there is anything to open the door for.
    pub fn any(&self) -> bool {
        let Self { neon, convex } = self;
        neon.is_some() || convex.is_some()
    }
}

/// Everything that HTTP connections share. One per process.
#[derive(Debug)]
pub struct Server {
    fronts: Fronts,
    tls: Option<Arc<ServerTls>>,
    config: Config,
    drain: Drain,
}

/// Which front a request belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Neon,
    Convex,
}

impl Owner {
    fn label(self) -> &'static str {
        match self {
            Owner::Neon => "neon",
            Owner::Convex => "convex",
        }
    }
}

/// What the requests of one connection leave behind, for its log line and its idle clock.
#[derive(Debug, Default)]
struct Activity {
    requests: AtomicU64,
    in_flight: AtomicU32,
    last_ms: AtomicU64,
}

/// One request under way.
struct InFlight(Arc<Activity>);

impl InFlight {
    fn new(activity: &Arc<Activity>) -> Self {
        activity.requests.fetch_add(1, Ordering::Relaxed);
        activity.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(activity))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.last_ms.store(clock::now_ms(), Ordering::Relaxed);
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Server {
    /// A door to the fronts that are there.
    pub fn new(fronts: Fronts, tls: Option<Arc<ServerTls>>, config: Config, drain: Drain) -> Arc<Self> {
        Arc::new(Self { fronts, tls, config, drain })
    }

    /// Serves one connection, and the WebSockets that it becomes, first byte to last.
    pub async fn serve(self: Arc<Self>, conn: Conn) {
        let opened = Instant::now();
        let Conn { id, peer, local, stream, unauthenticated } = conn;
        let activity = Arc::new(Activity::default());
        let first = self.config.first_request_timeout;
        // Boxed, so that the space it needs is gone once requests come.
        let begun = Box::pin(tokio::time::timeout(first, self.secure(stream))).await;
        let reason = match begun {
            Err(_) => "handshake_timeout",
            Ok(Err(reason)) => reason,
            Ok(Ok(stream)) => {
                let transport = if stream.is_tls() || local { Transport::Private } else { Transport::Open };
                let (held, sockets) = Held::new();
                let client = Client::new(id, peer, transport, self.drain.clone(), unauthenticated, held);
                let reason = Box::pin(self.requests(stream, client, &activity, first)).await;
                sockets.ended().await;
                reason
            }
        };
        let requests = activity.requests.load(Ordering::Relaxed);
        metrics::counter!("dynabase_connections_ended_total", "protocol" => "http", "reason" => reason).increment(1);
        tracing::info!(
            conn = id, %peer, reason, requests, seconds = opened.elapsed().as_secs_f64(), "http connection ended"
        );
    }

    /// TLS, if the first byte says so.
    async fn secure(&self, mut stream: Stream) -> Result<Stream, &'static str> {
        let Some(tls) = &self.tls else { return Ok(stream) };
        let mut first = [0; 1];
        match stream.read(&mut first).await {
            Ok(1) => {}
            _ => return Err("probe"),
        }
        let stream = stream.replaying(first.to_vec()).map_err(|_| "tls_failed")?;
        if first[0] != TLS_HANDSHAKE {
            return Ok(stream);
        }
        accept_tls(stream, tls.acceptor()).await.map_err(|_| "tls_failed")
    }

    /// Serves requests until the connection ends; gives the reason.
    async fn requests(
        self: &Arc<Self>,
        stream: Stream,
        client: Client,
        activity: &Arc<Activity>,
        first: Duration,
    ) -> &'static str {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_WITHIN)
            .max_headers(HEADERS_MAX)
            .max_buf_size(HEAD_MAX_BYTES as usize);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_header_list_size(HEAD_MAX_BYTES)
            .max_concurrent_streams(STREAMS_MAX)
            .max_send_buf_size(SEND_BUFFER)
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_WITHIN);
        let service = service_fn(|request: Request<Incoming>| {
            let (server, client, flight) = (Arc::clone(self), client.clone(), InFlight::new(activity));
            async move {
                let response = server.answer(request, &client).await;
                drop(flight);
                Ok::<_, Infallible>(response)
            }
        });
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(Patient::new(stream)), service);
        let mut connection = std::pin::pin!(connection);
        let mut reason = "client_gone";
        let mut draining = false;
        let mut wake = tokio::time::Instant::now() + first;
        loop {
            tokio::select! {
                ended = connection.as_mut() => {
                    return match ended {
                        Ok(()) => reason,
                        Err(error) => broken(&*error),
                    };
                }
                () = self.drain.started(), if !draining => {
                    (draining, reason) = (true, "draining");
                    connection.as_mut().graceful_shutdown();
                }
                () = tokio::time::sleep_until(wake) => {
                    wake = tokio::time::Instant::now() + IDLE;
                    if activity.requests.load(Ordering::Relaxed) == 0 {
                        return "handshake_timeout";
                    }
                    let idle_ms = clock::now_ms().saturating_sub(activity.last_ms.load(Ordering::Relaxed));
                    let busy = activity.in_flight.load(Ordering::Relaxed) > 0;
                    if !busy && u128::from(idle_ms) >= IDLE.as_millis() && !draining {
                        reason = "idle";
                        connection.as_mut().graceful_shutdown();
                    }
                }
            }
        }
    }

    /// Answers one request, by its owner.
    async fn answer(self: &Arc<Self>, request: Request<Incoming>, client: &Client) -> Response<Body> {
        let owner = owner(request.uri().path(), upgrade::is_asked(&request));
        let Fronts { neon, convex } = &self.fronts;
        let response = match (owner, neon, convex) {
            (Owner::Neon, Some(neon), _) => neon.handle(request, client).await,
            (Owner::Convex, _, Some(convex)) => convex.handle(request, client).await,
            (Owner::Neon, None, _) | (Owner::Convex, _, None) => absent(owner),
        };
        metrics::counter!(
            "dynabase_http_responses_total", "owner" => owner.label(), "status" => class(response.status())
        )
        .increment(1);
        response
    }
}

/// Whose a path is. Neon's clients open WebSockets on whatever path they were told; Convex' are below `/api/`.
fn owner(path: &str, upgrade: bool) -> Owner {
    match path {
        "/sql" => Owner::Neon,
        path if path == "/neon" || path.starts_with("/neon/") => Owner::Neon,
        path if upgrade && !path.starts_with("/api/") => Owner::Neon,
        _ => Owner::Convex,
    }
}

/// The host that a request is for, if it says so.
///
/// # Errors
/// [`Refusal::Malformed`]: it names two.
pub fn host<B>(request: &Request<B>) -> Result<Option<&str>, Refusal> {
    let mut named = request.headers().get_all(header::HOST).iter();
    let (host, more) = (named.next().and_then(|host| host.to_str().ok()), named.next());
    if more.is_some() {
        return Err(Refusal::Malformed { what: "two Host headers" });
    }
    // HTTP/2 says it in the URI, and nobody else may say something different.
    let authority = request.uri().authority().map(hyper::http::uri::Authority::as_str);
    match (host, authority) {
        (Some(host), Some(authority)) if !host.eq_ignore_ascii_case(authority) => {
            Err(Refusal::Malformed { what: "two hosts" })
        }
        (host, authority) => Ok(authority.or(host)),
    }
}

fn absent(owner: Owner) -> Response<Body> {
    let (name, section) = match owner {
        Owner::Neon => ("Neon", "upstream.neon"),
        Owner::Convex => ("Convex", "upstream.convex"),
    };
    let message = format!("{name} is not configured here: there is no [{section}] in dynabase's configuration");
    body::error(StatusCode::NOT_FOUND, "NotConfigured", &message)
}

fn class(status: StatusCode) -> &'static str {
    match status.as_u16() {
        100..=199 => "1xx",
        200..=299 => "2xx",
        300..=399 => "3xx",
        400..=499 => "4xx",
        _ => "5xx",
    }
}

/// The metric label of a connection that did not end well: a small closed set.
fn broken(error: &(dyn std::error::Error + 'static)) -> &'static str {
    match error.downcast_ref::<hyper::Error>() {
        Some(error) if error.is_timeout() => "head_timeout",
        Some(error) if error.is_parse_too_large() => "head_too_large",
        Some(error) if error.is_parse() => "protocol",
        Some(error) if patient::is_stall(error) => "client_stalled",
        _ => "client_gone",
    }
}

#[cfg(test)]
mod tests;
