//! Convex as clients see it: its HTTP API and its sync sockets.
//!
//! [`Server::handle`] takes every request of the HTTP door that is not Neon's. `endpoint` is the table of what there is;
//! `api` relays calls, files and HTTP actions; `socket` and `relay` hold the conversation of a sync socket, with `books`
//! and `responder` as its pure parts; `sessions` knows sockets by their client's session; `refuse` says no.
//!
//! Tenants reach what users of a Convex app reach. What needs an administrator's key is refused, by path and by key.

mod api;
mod arguments;
mod books;
mod cors;
mod endpoint;
mod gauge;
mod line;
mod query;
mod refuse;
mod relay;
mod responder;
mod sessions;
mod socket;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use hyper::{
    HeaderMap, Request, Response,
    body::Incoming,
    header::{self, HeaderName, HeaderValue},
    http::uri::PathAndQuery,
};
use tokio::sync::Semaphore;

use self::{
    endpoint::{Access, Endpoint},
    sessions::Sessions,
    socket::Opening,
};
use super::http::{Body, Client, body, host, upgrade};
use crate::{
    net::Peer,
    refusal::{Refusal, TokenFault},
    session::Gate,
    tenant::OrgId,
    upstream::convex::Upstream,
};

/// Sync sockets whose client has not shown who it is: each reads at most a megabyte, and stays for a minute. Those of
/// known tenants count with their tenant, served or not.
const STRANGERS_MAX: usize = 1024;

/// Serves Convex clients. One per process.
#[derive(Debug)]
pub struct Server {
    gate: Arc<Gate>,
    upstream: Arc<Upstream>,
    sessions: Arc<Sessions>,
    strangers: Arc<Semaphore>,
}

impl Server {
    /// A front that admits through `gate` and sends on to `upstream`'s deployments.
    pub fn new(gate: Arc<Gate>, upstream: Arc<Upstream>) -> Arc<Self> {
        Arc::new(Self { gate, upstream, sessions: Arc::default(), strangers: Arc::new(Semaphore::new(STRANGERS_MAX)) })
    }

    /// Answers one request. A sync socket goes on in a task that keeps `client`.
    pub async fn handle(self: &Arc<Self>, mut request: Request<Incoming>, client: &Client) -> Response<Body> {
        let found = endpoint::find(request.method(), request.uri().path());
        let headers = request.headers().clone();
        let answered = match found.access {
            Access::Nobody => Ok(self.open(found.endpoint, &headers)),
            Access::Administrators => Err(Refusal::Forbidden { what: "this is for administrators of the deployment" }),
            Access::Absent => Err(Refusal::Forbidden { what: "there is no such path" }),
            Access::Tenants if has_admin_key(&request) => {
                Err(Refusal::Forbidden { what: "administrators' keys are not taken here" })
            }
            Access::Tenants => match found.endpoint {
                Endpoint::Sync => self.upgrade(&mut request, client),
                endpoint => self.relay(endpoint, request, client).await,
            },
        };
        answered.unwrap_or_else(|refusal| {
            self.refused(&refusal, client.id);
            refuse::response(&refusal, &headers)
        })
    }

    /// What is asked without a token, and answered here.
    fn open(&self, endpoint: Endpoint, headers: &HeaderMap) -> Response<Body> {
        match endpoint {
            Endpoint::Preflight => cors::preflight(headers),
            Endpoint::Keys => {
                let mut response = body::json(hyper::StatusCode::OK, self.upstream.jwks().to_owned());
                response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("public, max-age=300"));
                response
            }
            _ => {
                let mut response = Response::new(body::full(concat!("dynabase ", env!("CARGO_PKG_VERSION"))));
                response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
                cors::allow(response.headers_mut(), headers);
                response
            }
        }
    }

    fn upgrade(self: &Arc<Self>, request: &mut Request<Incoming>, client: &Client) -> Result<Response<Body>, Refusal> {
        self.gate.may_carry(client.transport)?;
        let stranger = Arc::clone(&self.strangers).try_acquire_owned().map_err(|_| Refusal::Full)?;
        let host_org = self.host_org(request)?;
        let (response, upgrading) = match upgrade::accept(request, socket::settings()) {
            Ok(accepted) => accepted,
            Err(response) => return Ok(*response),
        };
        let opening = Opening {
            client: client.clone(),
            path: PathAndQuery::try_from(request.uri().path())
                .map_err(|_| Refusal::Malformed { what: "the path can't be read" })?,
            headers: forwarded(request.headers(), client.peer, &SOCKET_HEADERS),
            host_org,
            stranger: Some(stranger),
        };
        // Owned by the connection: the door waits for the last clone of `client`.
        tokio::spawn(socket::serve(Arc::clone(self), upgrading, opening));
        Ok(response)
    }

    /// The organisation that the request's host stands for; `None` on a neutral host.
    fn host_org<B>(&self, request: &Request<B>) -> Result<Option<OrgId>, Refusal> {
        Ok(host(request)?.and_then(|host| self.upstream.host_org(host)))
    }

    fn refused(&self, refusal: &Refusal, conn: u64) {
        metrics::counter!("dynabase_refusals_total", "protocol" => "convex", "reason" => refusal.kind()).increment(1);
        tracing::debug!(conn, %refusal, "convex: refused");
    }
}

/// Headers of a socket's request that the deployment gets to see.
const SOCKET_HEADERS: [HeaderName; 2] = [HeaderName::from_static("convex-client"), header::USER_AGENT];

/// `X-Forwarded-For`, whose first entry Convex takes for the client's address.
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The chosen headers, and where the client is: said by us alone.
fn forwarded(from: &HeaderMap, peer: Peer, chosen: &[HeaderName]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for name in chosen {
        for value in from.get_all(name) {
            headers.append(name.clone(), value.clone());
        }
    }
    say_where(&mut headers, peer);
    headers
}

fn say_where(headers: &mut HeaderMap, peer: Peer) {
    let address = match peer {
        Peer::Ip(address) => address.ip().to_string(),
        Peer::Unix => "127.0.0.1".into(),
    };
    if let Ok(value) = HeaderValue::try_from(address) {
        headers.insert(FORWARDED_FOR, value);
    }
}

/// Whether a request comes with a key that a deployment would take from an administrator.
fn has_admin_key(request: &Request<Incoming>) -> bool {
    let by_header = request.headers().get_all(header::AUTHORIZATION).iter().any(|value| {
        let scheme = value.as_bytes().split(|b| *b == b' ').next().unwrap_or_default();
        scheme.eq_ignore_ascii_case(b"convex")
    });
    by_header || request.uri().query().is_some_and(|text| query::pairs(text).any(|(key, _)| key == "adminKey"))
}

/// The bearer token of a request.
fn bearer(headers: &HeaderMap) -> Result<Option<&[u8]>, Refusal> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), more) = (values.next(), values.next()) else { return Ok(None) };
    if more.is_some() {
        return Err(Refusal::Malformed { what: "two Authorization headers" });
    }
    match value.as_bytes().split_at_checked(7) {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"bearer ") => Ok(Some(token.trim_ascii())),
        _ => Err(Refusal::BadToken(TokenFault::Malformed)),
    }
}
