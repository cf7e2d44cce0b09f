//! A client and its deployment: frames go through as they came, except those that a limit or the tenant's walls touch.
//!
//! One task does it all, so that frames of ours never meet the deployment's half-way: it waits for either side, for
//! what happens to the session and for the clock; it writes only between two waits.
//!
//! # Invariants
//! - The limits are read from the tenant's present policy at each frame.
//! - What is refused is never sent on, and is answered once; what is sent on is answered by the deployment alone.
//! - No token of a caller goes on: only ours, for this deployment.

use std::{
    borrow::Cow,
    collections::HashSet,
    convert::Infallible,
    future::poll_fn,
    ops::Range,
    sync::{Arc, atomic::Ordering},
    task::Poll,
    time::{Duration, SystemTime},
};

use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::{
    Server,
    books::{Books, Fault, Told},
    gauge::Gauge,
    line::{Gone, Line, Said},
    refuse::words,
    sessions::{Entered, Seen},
    socket::{Ended, malformed, no_admin},
};
use crate::{
    net::Stream,
    quota::{Live, Permit, Slot, Stop, clock},
    refusal::{Limit, Over, Refusal},
    session::Session,
    tenant::{Expiry, Protocol},
    upstream::convex::{Claims, Deployment, SOCKET_TOKEN_TTL},
    wire::convex::{self, Caller, Client, Kind, Modification, client, rewrite, server},
};

/// Between two looks at the clock, and at a client that says nothing. This and the next are shorter in tests, which wait
/// for them.
const LOOK_EVERY: Duration = Duration::from_millis(if cfg!(test) { 100 } else { 30_000 });

/// A client that gave no sign of life for this long is gone; it is asked for one at each look.
pub(super) const SILENT_MAX: Duration = Duration::from_millis(if cfg!(test) { 1_000 } else { 90_000 });

/// How long before our own token ends a socket is asked to come back for a new one.
const RENEW_BEFORE: Duration = Duration::from_secs(120);

/// How long calls under way may take to end when the process goes down.
const LEAVE_WITHIN: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });

/// One relayed socket.
pub(super) struct Relay {
    server: Arc<Server>,
    session: Session,
    deployment: Deployment,
    entered: Entered,
    seen: Arc<Seen>,
    /// Mutations that went on over an earlier socket, each of which may be repeated once.
    repeatable: HashSet<u32>,
    upstream: Line<Stream>,
    books: Books,
    /// Whether this is a reconnect whose subscriptions have not come yet.
    returning: bool,
    /// Why the session has to end, and when at the latest.
    leaving: Option<(Stop, Instant)>,
    /// When our own token for the deployment ends.
    token_until: Option<SystemTime>,
    /// The deployment did not take our token, and is about to close.
    unauthorized: bool,
}

/// A frame from one of the two sides, or something else.
enum Event {
    Client(Result<Said, Gone>),
    Upstream(Result<Said, Gone>),
    Stopped(Stop),
    Replaced,
    Look,
    Late,
}

impl Relay {
    pub(super) fn new(
        server: &Arc<Server>,
        session: Session,
        deployment: Deployment,
        entered: Entered,
        seen: Option<Arc<Seen>>,
        upstream: Line<Stream>,
        again: bool,
    ) -> Self {
        let seen = seen.unwrap_or_else(|| server.sessions.remember(entered.key(), &deployment.audience));
        let repeatable = if again { seen.sent() } else { HashSet::new() };
        Self {
            server: Arc::clone(server),
            repeatable,
            session,
            deployment,
            entered,
            seen,
            upstream,
            books: Books::default(),
            returning: again,
            leaving: None,
            token_until: None,
            unauthorized: false,
        }
    }

    /// Relays until one side ends it: first the frames that were kept.
    pub(super) async fn run(&mut self, line: &mut Line<Gauge>, kept: Vec<Utf8Bytes>) -> Ended {
        let Err(ended) = self.relay(line, kept).await;
        ended
    }

    async fn relay(&mut self, line: &mut Line<Gauge>, kept: Vec<Utf8Bytes>) -> Result<Infallible, Ended> {
        for text in kept {
            self.client_said(text).await?;
            self.tell(line).await?;
        }
        let mut heard = Instant::now();
        let mut look = Instant::now() + LOOK_EVERY;
        loop {
            let leaving = self.leaving;
            let event = tokio::select! {
                said = self.upstream.next() => Event::Upstream(said),
                // What a leaving client says now it will say again.
                said = line.next(), if leaving.is_none() => Event::Client(said),
                stop = stopped(self.session.live()), if leaving.is_none() => Event::Stopped(stop),
                () = self.entered.replaced() => Event::Replaced,
                () = tokio::time::sleep_until(look) => Event::Look,
                () = until(leaving.map(|(_, at)| at)) => Event::Late,
            };
            match event {
                Event::Client(said) => {
                    heard = Instant::now();
                    if let Said::Text(text) = said? {
                        self.client_said(text).await?;
                        self.tell(line).await?;
                    }
                }
                Event::Upstream(Ok(Said::Text(text))) => self.upstream_said(line, text).await?,
                Event::Upstream(Ok(Said::Alive)) => {}
                Event::Upstream(Err(gone)) => return Err(self.upstream_gone(gone)),
                Event::Stopped(stop) => self.leaving = Some((stop, Instant::now() + LEAVE_WITHIN)),
                Event::Replaced => return Err(Ended::Gone("replaced")),
                Event::Look => {
                    look = Instant::now() + LOOK_EVERY;
                    if heard.elapsed() >= SILENT_MAX {
                        return Err(Ended::Gone("client_silent"));
                    }
                    line.ping().await?;
                    self.look()?;
                }
                Event::Late => {}
            }
            self.leave()?;
        }
    }

    /// Ends the session if it has to and nothing stands in the way.
    fn leave(&self) -> Result<(), Ended> {
        let Some((stop, latest)) = self.leaving else { return Ok(()) };
        let free = match stop {
            // The client may still be told where it stands.
            Stop::Expired | Stop::Revoked => self.books.between_frames(),
            Stop::Suspended => true,
            Stop::Shed | Stop::Draining => self.books.between_frames() && self.books.is_quiet(),
        };
        if !free && Instant::now() < latest {
            return Ok(());
        }
        let refusal = Session::farewell(stop);
        Err(match stop {
            Stop::Expired | Stop::Revoked => {
                Ended::Auth { base: self.books.relayed().identity, attempted: false, message: words(&refusal).message }
            }
            Stop::Shed => Ended::again("TooManyConcurrentRequests: the tier allows fewer connections now"),
            Stop::Suspended | Stop::Draining => Ended::refused(&refusal),
        })
    }

    /// Whether our token for the deployment still lasts, and the deployment is still the tenant's.
    fn look(&self) -> Result<(), Ended> {
        let soon = SystemTime::now() + RENEW_BEFORE;
        let policy = self.session.slot().policy();
        let ends = policy.limits.expiry == Expiry::ConnectOnly || self.session.identity().expires_at.is_none();
        if ends && self.token_until.is_some_and(|until| until <= soon) {
            return Err(Ended::again("Retry: time for a new token"));
        }
        if self.server.upstream.deployment(&policy.tenant).as_ref() != Some(&self.deployment) {
            return Err(Ended::again("Retry: the deployment has moved"));
        }
        Ok(())
    }

    /// How the deployment's end of the socket ends the client's.
    fn upstream_gone(&self, gone: Gone) -> Ended {
        match gone {
            _ if self.unauthorized => Ended::Close(None),
            Gone::Closed(Some(frame)) => match u16::from(frame.code) {
                // Codes that say that there was none.
                1005 | 1006 => Ended::again("the deployment closed the socket"),
                code => Ended::Close(Some((code, frame.reason.to_string()))),
            },
            Gone::Closed(None) | Gone::Vanished => Ended::again("the deployment closed the socket"),
            Gone::Broken => Ended::refused(&Refusal::UpstreamDown),
        }
    }

    /// Tells the client what is due from us.
    async fn tell(&mut self, line: &mut Line<Gauge>) -> Result<(), Ended> {
        for frame in self.books.due().map_err(lost)? {
            self.session.meter().bytes_out.fetch_add(frame.len() as u64, Ordering::Relaxed);
            line.send(frame).await?;
        }
        Ok(())
    }

    async fn upstream_said(&mut self, line: &mut Line<Gauge>, text: Utf8Bytes) -> Result<(), Ended> {
        let frame = server(&text).map_err(|error| {
            tracing::warn!(error = error.what, "convex deployment: not the protocol");
            Ended::refused(&Refusal::UpstreamDown)
        })?;
        let meter = self.session.meter();
        meter.bytes_out.fetch_add(text.len() as u64, Ordering::Relaxed);
        match &frame {
            convex::Server::Response { success, .. } => {
                meter.requests.fetch_add(1, Ordering::Relaxed);
                meter.errors.fetch_add(u64::from(!success), Ordering::Relaxed);
            }
            convex::Server::AuthError => {
                let audience = self.deployment.audience.as_str();
                tracing::warn!(audience, "a Convex deployment did not take our token: see `dynabase tenant show`");
                self.unauthorized = true;
            }
            convex::Server::Transition { .. }
            | convex::Server::Chunk { .. }
            | convex::Server::Ping
            | convex::Server::Other => {}
        }
        // The place of a call is free when its answer is on its way, not before.
        let place = self.books.relaying(&frame);
        line.send(text).await?;
        drop(place);
        self.session.live().set_idle(self.books.is_quiet());
        self.tell(line).await
    }

    async fn client_said(&mut self, text: Utf8Bytes) -> Result<(), Ended> {
        self.session.meter().bytes_in.fetch_add(text.len() as u64, Ordering::Relaxed);
        let forwarded = match client(&text).map_err(|error| malformed(error.what))? {
            // The first one was judged when it was kept; another the deployment takes for a fault.
            Client::Connect { .. } => text,
            Client::Authenticate { base, caller } => match caller {
                Caller::Nobody => text,
                Caller::Admin => return Err(no_admin(base)),
                Caller::User { token, at } => {
                    let own = self.token(base, token).await?;
                    rewrite::replace(&text, &at, &own).into()
                }
            },
            Client::ModifyQuerySet { base, new, all, modifications } => {
                let returning = std::mem::take(&mut self.returning) && base == 0;
                self.query_set(&text, new, &all, &modifications, returning)?.map_or(text, Into::into)
            }
            Client::Call { kind, request, component, args } => {
                if self.books.is_called(kind, request) {
                    return Err(malformed("a request id twice"));
                }
                match self.call(&text, kind, request, component, &args) {
                    Ok((rewritten, place)) => {
                        self.books.called(kind, request, place);
                        self.session.live().set_idle(false);
                        rewritten.map_or(text, Into::into)
                    }
                    Err(refusal) => {
                        self.refused(&refusal);
                        self.books.refuse_call(kind, request, &words(&refusal)).map_err(lost)?;
                        return Ok(());
                    }
                }
            }
            // The log of the deployment is not worth an error.
            Client::Event if self.session.take(1).is_err() => return Ok(()),
            Client::Event => text,
        };
        match self.upstream.send(forwarded).await {
            Ok(()) => Ok(()),
            Err(gone) => Err(self.upstream_gone(gone)),
        }
    }

    /// Verifies a token and gives ours for it.
    async fn token(&mut self, base: u32, token: &str) -> Result<String, Ended> {
        match self.server.gate.renew(&mut self.session, token.as_bytes()).await {
            Ok(true) => {}
            Ok(false) => return Err(Ended::again("TenantChanged: another organization's token")),
            Err(refusal @ (Refusal::BadToken(_) | Refusal::UnknownOrg)) => {
                self.refused(&refusal);
                return Err(Ended::Auth { base, attempted: true, message: words(&refusal).message });
            }
            Err(refusal) => return Err(Ended::refused(&refusal)),
        }
        let identity = self.session.identity();
        let longest = SystemTime::now() + SOCKET_TOKEN_TTL;
        let until = match (self.session.slot().policy().limits.expiry, identity.expires_at) {
            (Expiry::Strict, Some(at)) => at.min(longest),
            _ => longest,
        };
        let claims = Claims { subject: &identity.subject, org: &identity.org, credential: token.as_bytes() };
        let own = self.server.upstream.token(&self.deployment, &claims, until);
        self.token_until = Some(until);
        Ok(own)
    }

    /// Judges the changes of a query set one by one. Gives the frame that goes on instead, if it is another: versions
    /// stay the client's, so that the deployment counts as it does.
    fn query_set(
        &mut self,
        text: &str,
        new: u32,
        all: &Range<usize>,
        modifications: &[Modification],
        returning: bool,
    ) -> Result<Option<String>, Ended> {
        let mut told = Vec::new();
        let mut kept: Vec<Cow<'_, str>> = Vec::with_capacity(modifications.len());
        let mut touched = false;
        for modification in modifications {
            match modification {
                Modification::Remove { query, all } if self.books.unsubscribe(*query) => {
                    kept.push(text[all.clone()].into())
                }
                Modification::Remove { query, .. } => told.push(Told::Ended(*query)),
                Modification::Add { query, component, args, all } => {
                    match self.subscription(text, *component, args, all, returning) {
                        Ok((rewritten, place)) => {
                            self.books.subscribed(*query, place);
                            touched |= rewritten.is_some();
                            kept.push(rewritten.map_or_else(|| text[all.clone()].into(), Into::into));
                        }
                        Err(refusal) => {
                            self.refused(&refusal);
                            self.books.refused(*query);
                            told.push(Told::Refused(*query, words(&refusal)));
                        }
                    }
                }
            }
        }
        touched |= !told.is_empty();
        self.books.tell(new, told).map_err(lost)?;
        Ok(touched.then(|| rewrite::replace(text, all, &rewrite::array(kept.iter().map(AsRef::as_ref)))))
    }

    /// Whether a subscription may go on: as what, and in which place.
    fn subscription(
        &self,
        text: &str,
        component: bool,
        args: &Range<usize>,
        all: &Range<usize>,
        returning: bool,
    ) -> Result<(Option<String>, Permit<Slot>), Refusal> {
        let inner = args.start - all.start..args.end - all.start;
        let rewritten = self.judge(&text[all.clone()], component, &inner)?;
        let slot = self.session.slot();
        let policy = slot.policy();
        let max = policy.limits.convex.subscriptions_per_socket;
        let in_use = self.books.subscriptions() as u64;
        if in_use >= u64::from(max) {
            let tier = policy.tenant.tier;
            return Err(Refusal::OverLimit(Over {
                limit: Limit::Subscriptions,
                tier,
                max: max.into(),
                in_use,
                retry_after: None,
            }));
        }
        drop(policy);
        let place = slot.subscription().map_err(Refusal::OverLimit)?;
        self.take(returning)?;
        Ok((rewritten, place))
    }

    /// Whether a call may go on: as what, and in which place.
    fn call(
        &mut self,
        text: &str,
        kind: Kind,
        request: u32,
        component: bool,
        args: &Range<usize>,
    ) -> Result<(Option<String>, Option<Permit<Slot>>), Refusal> {
        let rewritten = self.judge(text, component, args)?;
        // It may have been done: an error now would be a lie, and its client would do it again.
        let repeated = kind == Kind::Mutation && self.repeatable.remove(&request);
        let place = match self.session.slot().write() {
            Ok(place) => Some(place),
            Err(_) if repeated => None,
            Err(over) => return Err(Refusal::OverLimit(over)),
        };
        self.take(repeated)?;
        if kind == Kind::Mutation {
            self.seen.sending(request);
        }
        Ok((rewritten, place))
    }

    /// Takes one call of the rate; a repeated one may run into debt.
    fn take(&self, repeated: bool) -> Result<(), Refusal> {
        let taken = match repeated {
            true => self.session.slot().repeat(Protocol::Convex, clock::now_ns(), 1),
            false => self.session.take(1),
        };
        taken.map_err(Refusal::OverLimit)
    }

    /// What concerns the text alone: its size, components, the organisation's argument. Gives what goes on instead.
    fn judge(&self, text: &str, component: bool, args: &Range<usize>) -> Result<Option<String>, Refusal> {
        let max_bytes = self.session.slot().policy().limits.convex.payload;
        if text.len() as u64 > max_bytes {
            return Err(Refusal::TooLarge { max_bytes });
        }
        if component {
            return Err(Refusal::Forbidden { what: "functions of components are for administrators" });
        }
        let Some(name) = &self.deployment.org_argument else { return Ok(None) };
        let org = self.session.slot().org().as_str();
        let own = rewrite::with_argument(&text[args.clone()], name, org);
        let own = own.map_err(|error| Refusal::Malformed { what: error.what })?;
        Ok(Some(rewrite::replace(text, args, &own)))
    }

    fn refused(&self, refusal: &Refusal) {
        self.session.meter().refused.fetch_add(1, Ordering::Relaxed);
        metrics::counter!("dynabase_refusals_total", "protocol" => "convex", "reason" => refusal.kind()).increment(1);
    }
}

fn lost(Fault(what): Fault) -> Ended {
    Ended::again(what)
}

/// Waits until the session has to end.
async fn stopped(live: &Live) -> Stop {
    poll_fn(|cx| {
        live.register(cx);
        live.stopped().map_or(Poll::Pending, Poll::Ready)
    })
    .await
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
