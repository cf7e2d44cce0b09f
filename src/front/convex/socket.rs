//! One sync socket, from its upgrade to its end.
//!
//! The token comes in a frame, after the upgrade: until then frames are kept, few and small. Then the caller is
//! admitted, the deployment is dialled, and the kept frames go on in their order ([`super::relay`]). A client that
//! can't be served is answered by a [`Responder`] in the deployment's stead, except where it should come back.
//!
//! # Invariants
//! - A socket is counted among the strangers until its token is known to be good, and with its tenant from then on: in
//!   a client's place, or among the few that wait for one.
//! - No socket stays without a sign of life, and no stranger's for long.

use std::{convert::Infallible, sync::Arc, time::Duration};

use hyper::{HeaderMap, http::uri::PathAndQuery};
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, MissedTickBehavior},
};
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::{
    Server,
    gauge::Gauge,
    line::{Gone, Line, Said},
    refuse::{self, RESTART, words},
    relay::{Relay, SILENT_MAX},
    responder::Responder,
    sessions::Entered,
};
use crate::{
    front::http::{Client, upgrade::Upgrading},
    net::websocket,
    refusal::{Refusal, TokenFault},
    tenant::{OrgId, Protocol},
    wire::convex::{self, Caller, rewrite, write},
};

/// Longest wait for the frame with the token. JS sends it with its first frames.
const TOKEN_WITHIN: Duration = Duration::from_millis(if cfg!(test) { 100 } else { 10_000 });

/// Frames, and their bytes, that are kept until the token comes: a reconnecting client sends its queries and what it
/// has not got answers to.
const KEPT_MAX: usize = 256;
const STRANGER_MAX_BYTES: usize = 1 << 20;

/// Longest frame that a client may send: the largest payload of a tier, and what is around it.
pub(super) const CLIENT_FRAME_MAX: usize = (16 << 20) + (64 << 10);

/// Longest frame of a deployment; it cuts transitions into chunks of 5 MB, old clients get them whole.
const UPSTREAM_FRAME_MAX: usize = 64 << 20;

/// How long a client that shows no token is answered, after the wait for it. This and the next two are shorter in tests,
/// which wait for their ends.
const STRANGER_FOR: Duration = Duration::from_millis(if cfg!(test) { 300 } else { 60_000 });

/// Between two signs of life of ours where there is no deployment to give them.
const PING_EVERY: Duration = Duration::from_millis(if cfg!(test) { 100 } else { 15_000 });

/// How long a bad token's answer takes: Rust and Python come back with the same one for ever.
const BAD_TOKEN_DELAY: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 1_000 });

/// What a socket was asked for with.
pub(super) struct Opening {
    pub client: Client,
    /// Which sync socket, as the client asked for it: its own version is in it.
    pub path: PathAndQuery,
    /// Headers that go on.
    pub headers: HeaderMap,
    /// The organisation that the host stands for.
    pub host_org: Option<OrgId>,
    /// Its place among those who have not shown who they are, until it has.
    pub stranger: Option<OwnedSemaphorePermit>,
}

/// How a socket ends for its client.
#[derive(Debug)]
pub(super) enum Ended {
    /// With a code and a reason; `None` for neither.
    Close(Option<(u16, String)>),
    /// With the news that its token is not taken (`attempted`) or no longer.
    Auth { base: u32, attempted: bool, message: String },
    /// It has gone by itself.
    Gone(&'static str),
}

impl From<Gone> for Ended {
    fn from(gone: Gone) -> Self {
        match gone {
            Gone::Closed(_) => Ended::Gone("client_closed"),
            Gone::Vanished => Ended::Gone("client_gone"),
            Gone::Broken => Ended::Close(Some((refuse::PROTOCOL, "a text frame is expected".into()))),
        }
    }
}

impl Ended {
    pub(super) fn refused(refusal: &Refusal) -> Self {
        let words = words(refusal);
        Ended::Close(Some((words.close, words.reason())))
    }

    /// The client is to come back at once.
    pub(super) fn again(reason: &str) -> Self {
        Ended::Close(Some((RESTART, reason.into())))
    }

    fn label(&self) -> &'static str {
        match self {
            Ended::Close(_) => "closed",
            Ended::Auth { .. } => "token",
            Ended::Gone(why) => why,
        }
    }
}

/// The first frames of a client.
struct Greeting {
    kept: Vec<Utf8Bytes>,
    session: String,
    connections: u32,
    /// The token, and the version that its frame names; `None` if none came.
    token: Option<(String, u32)>,
}

/// Serves one socket.
pub(super) async fn serve(server: Arc<Server>, upgrading: Upgrading, opening: Opening) {
    let Ok(socket) = upgrading.socket_over(|stream| Gauge::new(stream, STRANGER_MAX_BYTES)).await else { return };
    let mut line = Line::new(socket);
    let id = opening.client.id;
    let Err(ended) = converse(&server, &mut line, opening).await;
    tracing::debug!(conn = id, reason = ended.label(), "convex socket ended");
    metrics::counter!("dynabase_convex_sockets_ended_total", "reason" => ended.label()).increment(1);
    match ended {
        Ended::Close(words) => line.close(words).await,
        Ended::Auth { base, attempted, message } => {
            let _ = line.send(write::auth_error(&message, base, attempted)).await;
            line.close(None).await;
        }
        Ended::Gone(_) => {}
    }
}

/// The settings of the client's socket.
pub(super) fn settings() -> tokio_tungstenite::tungstenite::protocol::WebSocketConfig {
    websocket::settings(CLIENT_FRAME_MAX)
}

pub(super) async fn converse(
    server: &Arc<Server>,
    line: &mut Line<Gauge>,
    mut opening: Opening,
) -> Result<Infallible, Ended> {
    let greeting = greet(line, &opening).await?;
    let Some((token, base)) = &greeting.token else {
        let refusal = Refusal::BadToken(TokenFault::Malformed);
        return respond(server, line, opening, greeting, &refusal, None).await;
    };
    let identity = match server.gate.identify(token.as_bytes()).await {
        Ok(identity) if opening.host_org.as_ref().is_none_or(|org| *org == identity.org) => identity,
        Ok(_) => return bad_token(server, &Refusal::BadToken(TokenFault::BadOrg), *base, &opening).await,
        Err(refusal @ Refusal::BadToken(_)) => return bad_token(server, &refusal, *base, &opening).await,
        Err(refusal) => return Err(Ended::refused(&refusal)),
    };
    opening.stranger = None;
    let entered = server.sessions.enter((identity.org.clone(), greeting.session.as_str().into())).await;
    let session = match server.gate.admit(token.as_bytes(), Protocol::Convex).await {
        Ok(session) => session,
        Err(refusal @ (Refusal::BadToken(_) | Refusal::UnknownOrg)) => {
            return bad_token(server, &refusal, *base, &opening).await;
        }
        Err(refusal @ (Refusal::OverLimit(_) | Refusal::Suspended)) => {
            let waiting = server.gate.wait(&identity.org).await.map_err(|refusal| Ended::refused(&refusal))?;
            let Some(_waiting) = waiting else {
                server.refused(&refusal, opening.client.id);
                // With what makes clients come back in no hurry, whatever the reason is.
                return Err(Ended::refused(&Refusal::Full));
            };
            opening.client.admitted();
            let known = Known { token: token.clone(), entered };
            return respond(server, line, opening, greeting, &refusal, Some(known)).await;
        }
        Err(refusal) => return Err(Ended::refused(&refusal)),
    };
    opening.client.admitted();
    line.stream().open();
    let Some(deployment) = server.upstream.deployment(&session.slot().policy().tenant) else {
        let refusal = Refusal::Forbidden { what: "this organization has no Convex deployment" };
        let known = Known { token: token.clone(), entered };
        return respond(server, line, opening, greeting, &refusal, Some(known)).await;
    };
    let settings = websocket::settings(UPSTREAM_FRAME_MAX);
    let Opening { path, headers, client, .. } = opening;
    let upstream = match server.upstream.socket(&deployment, path, headers, settings).await {
        Ok(socket) => Line::new(socket),
        Err(error) => {
            tracing::warn!(conn = client.id, org = %session.slot().org(), %error, "convex deployment");
            return Err(Ended::refused(&Refusal::UpstreamDown));
        }
    };
    let seen = server.sessions.seen(entered.key(), &deployment.audience);
    // What the client saw elsewhere, or nobody here knows where, would make this deployment close the socket.
    let kept = match (seen.is_some(), greeting.kept.split_first()) {
        (false, Some((connect, rest))) => {
            let connect = rewrite::forget_observed(connect).map_err(|error| malformed(error.what))?;
            std::iter::once(connect.into()).chain(rest.iter().cloned()).collect()
        }
        _ => greeting.kept,
    };
    let again = greeting.connections > 0;
    let mut relay = Relay::new(server, session, deployment, entered, seen, upstream, again);
    Err(relay.run(line, kept).await)
}

pub(super) fn malformed(what: &'static str) -> Ended {
    Ended::refused(&Refusal::Malformed { what })
}

/// Reads until the token is there.
async fn greet(line: &mut Line<Gauge>, opening: &Opening) -> Result<Greeting, Ended> {
    let deadline = Instant::now() + TOKEN_WITHIN;
    let mut greeting = Greeting { kept: Vec::new(), session: String::new(), connections: 0, token: None };
    loop {
        let said = tokio::select! {
            said = line.next() => said?,
            () = tokio::time::sleep_until(deadline) => match greeting.kept.is_empty() {
                true => return Err(Ended::Gone("handshake_timeout")),
                false => return Ok(greeting),
            },
            () = opening.client.drain.started() => return Err(Ended::refused(&Refusal::Draining)),
        };
        let Said::Text(text) = said else { continue };
        let frame = convex::client(&text).map_err(|error| malformed(error.what))?;
        match (&frame, greeting.kept.is_empty()) {
            (convex::Client::Connect { session, connections, .. }, true) if session.len() <= 64 => {
                greeting.session = (*session).to_owned();
                greeting.connections = *connections;
            }
            (convex::Client::Connect { .. }, _) | (_, true) => return Err(malformed("Connect comes first, and once")),
            (convex::Client::Authenticate { base, caller: Caller::User { token, .. } }, false) => {
                greeting.token = Some(((*token).to_owned(), *base));
            }
            (convex::Client::Authenticate { base, caller: Caller::Admin }, false) => return Err(no_admin(*base)),
            _ => {}
        }
        greeting.kept.push(text);
        if greeting.token.is_some() {
            return Ok(greeting);
        }
        if greeting.kept.len() > KEPT_MAX {
            return Err(malformed("too much before a token"));
        }
    }
}

/// Administrators' keys open nothing here, whatever they open at the deployment.
pub(super) fn no_admin(base: u32) -> Ended {
    let message = "administrators' keys are not taken here: use a token of your organization".into();
    Ended::Auth { base, attempted: true, message }
}

async fn bad_token(server: &Server, refusal: &Refusal, base: u32, opening: &Opening) -> Result<Infallible, Ended> {
    server.refused(refusal, opening.client.id);
    tokio::select! {
        () = tokio::time::sleep(BAD_TOKEN_DELAY) => {}
        () = opening.client.drain.started() => {}
    }
    Err(Ended::Auth { base, attempted: true, message: words(refusal).message })
}

/// A client that has shown who it is.
struct Known {
    token: String,
    /// Its session's entry: the client may open another socket.
    entered: Entered,
}

impl Known {
    /// Waits until its client has come back on another socket; for ever where nobody is known.
    async fn replaced(known: Option<&Self>) {
        match known {
            Some(known) => known.entered.replaced().await,
            None => std::future::pending().await,
        }
    }
}

/// Is the server for a client that can't be served: until it may be (`known`), or shows a token.
async fn respond(
    server: &Arc<Server>,
    line: &mut Line<Gauge>,
    opening: Opening,
    greeting: Greeting,
    refusal: &Refusal,
    known: Option<Known>,
) -> Result<Infallible, Ended> {
    server.refused(refusal, opening.client.id);
    if known.is_some() {
        line.stream().open();
    }
    let mut responder = Responder::new(words(refusal));
    for text in &greeting.kept {
        let frame = convex::client(text).map_err(|error| malformed(error.what))?;
        for answer in responder.answer(&frame) {
            line.send(answer).await?;
        }
    }
    drop(greeting);
    let mut every = tokio::time::interval_at(Instant::now() + PING_EVERY, PING_EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (begun, mut heard) = (Instant::now(), Instant::now());
    loop {
        let said = tokio::select! {
            said = line.next() => said?,
            _ = every.tick() => {
                if heard.elapsed() >= SILENT_MAX {
                    return Err(Ended::Gone("client_silent"));
                }
                if known.is_none() && begun.elapsed() >= STRANGER_FOR {
                    return Err(Ended::refused(&Refusal::BadToken(TokenFault::Malformed)));
                }
                line.send(write::PING).await?;
                line.ping().await?;
                if let Some(known) = &known
                    && server.gate.admit(known.token.as_bytes(), Protocol::Convex).await.is_ok_and(|session| {
                        server.upstream.deployment(&session.slot().policy().tenant).is_some()
                    })
                {
                    return Err(Ended::again("Retry: there is room now"));
                }
                continue;
            }
            () = Known::replaced(known.as_ref()) => return Err(Ended::Gone("replaced")),
            () = opening.client.drain.started() => return Err(Ended::refused(&Refusal::Draining)),
        };
        heard = Instant::now();
        let Said::Text(text) = said else { continue };
        let frame = convex::client(&text).map_err(|error| malformed(error.what))?;
        match frame {
            convex::Client::Authenticate { caller: Caller::User { .. }, .. } if known.is_none() => {
                return Err(Ended::again("Retry: a token has come"));
            }
            convex::Client::Authenticate { base, caller: Caller::Admin } => return Err(no_admin(base)),
            convex::Client::Connect { .. } => return Err(malformed("Connect comes first, and once")),
            _ => {}
        }
        for answer in responder.answer(&frame) {
            line.send(answer).await?;
        }
    }
}
