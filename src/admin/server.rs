//! The HTTP/1 server behind [`super::spawn`].

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{Arc, mpsc::SyncSender},
    time::Duration,
};

use http_body_util::{BodyExt, Full, LengthLimitError, Limited, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Bytes, Incoming},
    header::{self, HeaderValue},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    State, Token, branches, metrics,
    route::{self, Access, Endpoint, Route},
    tally::Tally,
    tenants::{View, Wanted},
    transitions,
};
use crate::{
    net::{AcceptLimits, Address, Conn, Drain, ListenConfig, Listener, listen},
    quota::{Slot, clock},
    refusal::Refusal,
    tenant::OrgId,
};

/// Connections at once: some Prometheus servers, load balancers' checks, a few people.
const CONNECTIONS_MAX: u32 = 64;

/// Headers of a request in bytes, and their number; a token and what proxies add fits many times.
const HEADER_MAX_BYTES: usize = 16 * 1024;
const HEADERS_MAX: usize = 64;

/// Body of a request in bytes: a few words of JSON.
const BODY_MAX_BYTES: usize = 64 * 1024;

/// How long headers, and then the body, may take to arrive; also how long a connection may idle between requests.
/// Shorter in tests, which wait for it.
const READ_WITHIN: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 10 });

/// How long the catalog may take to say who an organisation is.
const CATALOG_WITHIN: Duration = Duration::from_secs(5);

/// A connection is closed after its present request from here on, so that who reads its answer forever holds no place.
const CONNECTION_AGE: Duration = Duration::from_secs(300);
const CONNECTION_END: Duration = Duration::from_secs(10);

/// How long requests that run may go on when the interface stops.
const STOP_WITHIN: Duration = Duration::from_secs(1);

/// How often meters are added up when nobody scrapes.
const SETTLE_EVERY: Duration = Duration::from_secs(60);

pub(super) type Answer = Response<BoxBody<Bytes, Infallible>>;

pub(super) struct Server {
    state: Arc<State>,
    drain: Drain,
    token: Token,
    tally: Mutex<Tally>,
    /// Of the interface itself, not of the data path.
    stop: Drain,
}

impl Server {
    pub(super) fn new(state: Arc<State>, drain: Drain, token: Token, top_orgs: usize, stop: Drain) -> Self {
        Self { state, drain, token, tally: Mutex::new(Tally::new(top_orgs)), stop }
    }

    /// The thread's whole life. Says where it listens, or why it does not, once.
    pub(super) fn run(self, listen: SocketAddr, told: &SyncSender<io::Result<SocketAddr>>) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                let _ = told.send(Err(error));
                return;
            }
        };
        runtime.block_on(async {
            let bound = Listener::bind(&ListenConfig::new(Address::Tcp(listen)));
            let listener = match bound {
                Ok(listener) => {
                    let addr = SocketAddr::new(listen.ip(), listener.port().unwrap_or(listen.port()));
                    let _ = told.send(Ok(addr));
                    listener
                }
                Err(error) => {
                    let _ = told.send(Err(error));
                    return;
                }
            };
            let server = Arc::new(self);
            let limits = Arc::new(AcceptLimits::new(CONNECTIONS_MAX, 0));
            let accepting = listen::run(listener, limits, server.stop.clone(), {
                let server = Arc::clone(&server);
                move |conn| Arc::clone(&server).serve(conn)
            });
            tokio::select! {
                () = accepting => {}
                () = server.settle() => {}
            }
            let _ = server.stop.drained(STOP_WITHIN).await;
        });
    }

    /// Adds meters up and lets old ones go; runs until dropped.
    async fn settle(&self) {
        let mut every = tokio::time::interval_at(Instant::now() + SETTLE_EVERY, SETTLE_EVERY);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            let mut tally = self.tally.lock();
            tally.settle(&self.state.meters, &self.state.table.slots());
            tally.retire(self.state.meters.sweep(clock::now_ms()));
            self.state.recorder.run_upkeep();
        }
    }

    async fn serve(self: Arc<Self>, conn: Conn) {
        let stop = self.stop.clone();
        let service = service_fn(move |request| {
            let server = Arc::clone(&self);
            async move { Ok::<_, Infallible>(server.answer(request).await) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(READ_WITHIN)
            .max_headers(HEADERS_MAX)
            .max_header_size(HEADER_MAX_BYTES)
            .serve_connection(TokioIo::new(conn.stream), service);
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => Some(ended),
            () = tokio::time::sleep(CONNECTION_AGE) => None,
            () = stop.started() => None,
        };
        let ended = match ended {
            Some(ended) => ended,
            None => {
                connection.as_mut().graceful_shutdown();
                tokio::time::timeout(CONNECTION_END, connection).await.unwrap_or(Ok(()))
            }
        };
        if let Err(error) = ended {
            tracing::debug!(peer = %conn.peer, %error, "admin connection ended");
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Answer {
        let (parts, body) = request.into_parts();
        let (routes, [segment, name]) = route::find(parts.uri.path());
        let open = routes.first().is_some_and(|route| route.access == Access::Anyone);
        // Before anything else, so that a stranger does not even learn which paths there are.
        if !open && !self.authorized(parts.headers.get(header::AUTHORIZATION)) {
            let mut answer =
                fault(StatusCode::UNAUTHORIZED, "unauthorized", "send the admin token: Authorization: Bearer TOKEN");
            answer
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"dynabase admin\""));
            return answer;
        }
        if routes.is_empty() {
            return fault(StatusCode::NOT_FOUND, "not_found", "no such path; /openapi.json lists them");
        }
        let wanted = if parts.method == Method::HEAD { Method::GET } else { parts.method.clone() };
        let Some(route) = routes.iter().find(|route| route.endpoint.method() == wanted) else {
            return not_allowed(&routes);
        };
        let body = match read_body(body).await {
            Ok(body) => body,
            Err(answer) => return *answer,
        };
        match route.endpoint {
            Endpoint::Live => text("text/plain; charset=utf-8", "ok".to_owned()),
            Endpoint::Ready => self.ready(),
            Endpoint::Metrics => {
                let body = metrics::render(&self.state, &mut self.tally.lock(), self.drain.is_draining());
                text("text/plain; version=0.0.4; charset=utf-8", body)
            }
            Endpoint::Tenants => match Wanted::parse(parts.uri.query().unwrap_or_default()) {
                Ok(wanted) => json_of(StatusCode::OK, &json!(wanted.page(self.state.table.slots()))),
                Err(message) => fault(StatusCode::BAD_REQUEST, "bad_query", message),
            },
            Endpoint::Tenant => self.tenant(segment).await,
            Endpoint::Holdings => transitions::holdings(&self.state, segment).await,
            Endpoint::Create
            | Endpoint::Delete
            | Endpoint::Suspend
            | Endpoint::Resume
            | Endpoint::Restore
            | Endpoint::Purge
            | Endpoint::Rotate => transitions::live(&self.state, route.endpoint, segment, &body).await,
            Endpoint::Branches | Endpoint::MakeBranch | Endpoint::RemoveBranch => match self.slot(segment).await {
                Ok(slot) => match route.endpoint {
                    Endpoint::MakeBranch => branches::make(&self.state, &slot, &body).await,
                    Endpoint::RemoveBranch => branches::remove(&self.state, &slot, name).await,
                    _ => branches::list(&self.state, &slot).await,
                },
                Err(answer) => *answer,
            },
            Endpoint::Tier => transitions::begin(&self.state, segment, &body).await,
            Endpoint::Transition => transitions::show(&self.state, segment).await,
            Endpoint::Events => transitions::events(&self.state),
            Endpoint::OpenApi => json_of(StatusCode::OK, &route::openapi()),
        }
    }

    fn authorized(&self, header: Option<&HeaderValue>) -> bool {
        let token = header.and_then(|value| {
            let (scheme, token) = value.as_bytes().split_at_checked("Bearer ".len())?;
            scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
        });
        token.is_some_and(|token| self.token.matches(token))
    }

    fn ready(&self) -> Answer {
        let reasons = self.state.not_ready(self.drain.is_draining());
        let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let said: Vec<Value> =
            reasons.iter().map(|(code, message)| json!({ "code": code, "message": message })).collect();
        json_of(status, &json!({ "ready": reasons.is_empty(), "reasons": said }))
    }

    async fn tenant(&self, org: &str) -> Answer {
        match self.slot(org).await {
            Ok(slot) => json_of(StatusCode::OK, &json!(View::of(&slot))),
            Err(answer) => *answer,
        }
    }

    async fn slot(&self, org: &str) -> Result<Arc<Slot>, Box<Answer>> {
        let Some(org) = OrgId::parse(org) else {
            return Err(Box::new(fault(StatusCode::BAD_REQUEST, "bad_org", "not an organisation id")));
        };
        let (status, code, message) = match tokio::time::timeout(CATALOG_WITHIN, self.state.table.slot(&org)).await {
            Ok(Ok(slot)) => return Ok(slot),
            Ok(Err(Refusal::UnknownOrg)) => {
                (StatusCode::NOT_FOUND, "unknown_org", "the catalog knows no such organisation")
            }
            Ok(Err(_)) | Err(_) => {
                (StatusCode::SERVICE_UNAVAILABLE, "catalog_down", "the catalog can't be asked right now")
            }
        };
        Err(Box::new(fault(status, code, message)))
    }
}

/// The path is there, the method is not.
fn not_allowed(routes: &[&Route]) -> Answer {
    let methods: Vec<String> = routes.iter().map(|route| route.endpoint.method().to_string()).collect();
    let message = match methods.as_slice() {
        [one] if one == "GET" => "this path is read with GET".to_owned(),
        [one] => format!("this path is written with {one}"),
        several => format!("this path takes {}", several.join(", ")),
    };
    let allow = methods.join(", ").replace("GET", "GET, HEAD");
    let mut answer = fault(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", &message);
    if let Ok(allow) = HeaderValue::from_str(&allow) {
        answer.headers_mut().insert(header::ALLOW, allow);
    }
    answer
}

/// Reads the body to its end, within cap and deadline.
async fn read_body(body: Incoming) -> Result<Bytes, Box<Answer>> {
    if body.is_end_stream() {
        return Ok(Bytes::new());
    }
    let reading = Limited::new(body, BODY_MAX_BYTES).collect();
    match tokio::time::timeout(READ_WITHIN, reading).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            Err(Box::new(fault(StatusCode::PAYLOAD_TOO_LARGE, "too_large", "the body is over 64 KiB")))
        }
        Ok(Err(_)) => Err(Box::new(fault(StatusCode::BAD_REQUEST, "bad_body", "the body can't be read"))),
        Err(_) => Err(Box::new(fault(StatusCode::REQUEST_TIMEOUT, "slow", "the body took too long"))),
    }
}

pub(super) fn fault(status: StatusCode, code: &str, message: &str) -> Answer {
    json_of(status, &json!({ "error": { "code": code, "message": message } }))
}

pub(super) fn json_of(status: StatusCode, value: &Value) -> Answer {
    let mut answer = text("application/json", value.to_string());
    *answer.status_mut() = status;
    answer
}

fn text(content_type: &'static str, body: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body)).boxed());
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    // What it shows is of this moment.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}
