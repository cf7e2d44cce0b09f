//! Neon as its clients see it: SQL over HTTP, Postgres over WebSocket.
//!
//! # The journey of a request
//! `POST /sql`: [`login`] reads who asks for what from its headers, and the Postgres front lets the caller in; only then
//! [`crate::wire::neon::request`] reads the queries from its body; [`sql`] begins the session, sends the queries in one go,
//! and writes JSON while the server answers, as far as [`input`] has room for it. A WebSocket becomes a byte stream, which the Postgres front serves as it serves a socket.
//!
//! # Invariants
//! - Every statement goes through the Postgres front's relay: limits, settings and what is kept between two clients
//!   are decided there, once for all ways in.
//! - The body of a caller who was not let in is never read.
//! - All that is held of an answer, rows, heads and tags alike, counts towards what the tier allows for one.
//! - A client that goes away has its statement cancelled.
//! - At a tenant's own host no other tenant's token opens anything.
//!
//! Entry point: [`Server::handle`].

mod branches;
mod input;
mod login;
mod refuse;
mod sql;

use std::{sync::Arc, time::Duration};

use hyper::{Method, Request, Response, StatusCode, body::Incoming};
use moka::sync::Cache;

use super::{
    http::{Body, Client, body, host, upgrade},
    postgres,
};
use crate::{
    net::{
        Conn, Stream,
        websocket::{self, WebSocket},
    },
    session::Transport,
    tenant::{OrgId, Protocol, namespace::org_of_host},
    upstream::neon::Branches,
    wire::neon::value::Kind,
};

/// Own types of databases remembered, some 100 bytes each, and for how long: a type may be dropped and its number given
/// to another.
const TYPES_MAX: u64 = 10_000;
const TYPES_KEPT: Duration = Duration::from_secs(300);

/// What the driver puts in the place of a host's first label for its requests over HTTP, without and with a token as
/// bearer: such a host is nobody's.
const NEUTRAL: [&str; 2] = ["api", "apiauth"];

/// Longest wait for a client to take the end of a WebSocket's handshake.
const UPGRADE_WITHIN: Duration = Duration::from_secs(10);

/// Everything that Neon's clients share. One per process.
#[derive(Debug)]
pub struct Server {
    postgres: Arc<postgres::Server>,
    branches: Arc<Branches>,
    /// Tenants' hosts are below it.
    domain: Option<String>,
    /// What the types are that databases gave themselves, by organisation, logical database and number.
    types: Cache<(OrgId, Arc<str>, u32), Kind>,
}

impl Server {
    /// A front whose sessions `postgres` serves.
    pub fn new(postgres: Arc<postgres::Server>, branches: Arc<Branches>, domain: Option<String>) -> Arc<Self> {
        let types = Cache::builder().max_capacity(TYPES_MAX).time_to_live(TYPES_KEPT).build();
        Arc::new(Self { postgres, branches, domain, types })
    }

    /// The organisation that a host stands for; `None` for a neutral one, where the token alone decides.
    fn host_org(&self, host: &str) -> Option<OrgId> {
        org_of_host(host, self.domain.as_deref()?).filter(|org| !NEUTRAL.contains(&org.as_str()))
    }

    /// Answers one request.
    ///
    /// # Cancel safety
    /// Dropped, what it runs is cancelled.
    pub async fn handle(self: &Arc<Self>, request: Request<Incoming>, client: &Client) -> Response<Body> {
        if upgrade::is_asked(&request) {
            return self.socket(request, client);
        }
        match (request.uri().path(), request.method()) {
            ("/sql", &Method::POST) => sql::answer(self, request, client).await,
            ("/sql", &Method::OPTIONS) => sql::preflight(),
            // Neon's own words, a JSON string.
            ("/sql", _) => body::json(StatusCode::BAD_REQUEST, "\"query is not supported\""),
            ("/neon/branches", _) => branches::answer(self, &self.branches, request, client, None).await,
            (path, _) if path.starts_with("/neon/branches/") => {
                let name = path.trim_start_matches("/neon/branches/").to_owned();
                branches::answer(self, &self.branches, request, client, Some(name)).await
            }
            (path, _) => body::error(StatusCode::NOT_FOUND, "NotFound", &format!("there is nothing at {path}")),
        }
    }

    /// Makes a WebSocket of the request; its task counts as the connection's.
    fn socket(self: &Arc<Self>, mut request: Request<Incoming>, client: &Client) -> Response<Body> {
        let host_org = match host(&request) {
            Ok(host) => host.and_then(|host| self.host_org(host)),
            Err(refusal) => return refuse::rest(&refusal),
        };
        let settings = websocket::settings(websocket::FRAME_MAX);
        let (response, upgrading) = match upgrade::accept(&mut request, settings) {
            Ok(accepted) => accepted,
            Err(response) => return *response,
        };
        let (postgres, client) = (Arc::clone(&self.postgres), client.clone());
        tokio::spawn(async move {
            let Ok(Ok(frames)) = tokio::time::timeout(UPGRADE_WITHIN, upgrading.socket()).await else { return };
            let conn = Conn {
                id: client.id,
                peer: client.peer,
                local: client.transport == Transport::Private,
                stream: Stream::WebSocket(Box::new(WebSocket::new(frames))),
                unauthenticated: client.take_stranger(),
            };
            postgres.serve_as(Protocol::Neon, conn, host_org).await;
        });
        response
    }
}
