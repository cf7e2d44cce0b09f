//! The waits of a session: for its first facts from a server, for a connection, for its turn under the rate.

use std::{
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::future::{Either, select};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    Relay, Told,
    home::{MOVED_PAUSE, find},
    next_kind,
    pending::Pending,
};
use crate::{
    front::postgres::{Server, cancel, conversation::Conversation, count_refusal, options::Options, out::Out, refuse},
    net::{Peer, Stream},
    quota::clock,
    refusal::{Limit, Over, Refusal},
    session::Session,
    tenant::{OverRate, PoolMode, Protocol},
    upstream::postgres::{
        Connection, Home, Lease, Pool, STILL_PATIENCE, TakeError, Taken, Upstream,
        connection::{Parameters, Value},
    },
    wire::postgres::{
        self as wire,
        backend::{self, Report, Severity, Status},
        frontend,
    },
};

/// Cancels for what a client left running, before its backend is ended otherwise.
const CANCELS: u32 = 3;

/// Bytes of a usual greeting: some fifteen parameters.
const GREETING: usize = 512;

/// Most bytes of a server's answer to a preparation.
const PREPARATION_MAX: usize = 1024 * 1024;

/// A session whose parameters are known.
pub(super) struct Begun {
    link: Option<Lease>,
    pool: Arc<Pool>,
    home: Arc<Home>,
    conversation: Conversation,
    mode: PoolMode,
    /// What the client sent before it was told that it is in: some pipeline their first query behind the password.
    early: Vec<u8>,
}

impl Begun {
    /// AuthenticationOk, the parameters, the cancel key, ReadyForQuery: in one write.
    pub(super) fn greeting(&self, keys: &Arc<cancel::Keys>, session: &Session) -> Option<(cancel::Key, Vec<u8>)> {
        // In session mode the server is this client's for good: its own process id keeps pg_backend_pid() true.
        let pid = self.link.as_ref().and_then(|link| link.pid());
        let (key, secret) = keys.issue(session.live(), self.conversation.minor(), pid)?;
        let mut hello = Vec::with_capacity(GREETING);
        hello.extend_from_slice(&backend::AUTHENTICATION_OK);
        for (name, value) in self.conversation.reported().iter() {
            backend::put_parameter(&mut hello, name, value);
        }
        backend::put_key(&mut hello, key.pid, secret.bytes());
        hello.extend_from_slice(&backend::ready_message(Status::Idle));
        Some((key, hello))
    }

    /// With its sockets.
    pub(super) fn into_relay(
        self,
        server: Arc<Server>,
        (id, peer, told): (u64, Peer, Told),
        session: Session,
        client: Stream,
        key: cancel::Key,
    ) -> Relay {
        Relay {
            server,
            id,
            peer,
            told,
            session,
            _key: key,
            client,
            link: self.link,
            pool: self.pool,
            home: self.home,
            conversation: self.conversation,
            mode: self.mode,
            resume: !self.early.is_empty(),
            tail: self.early,
            server_tail: Vec::new(),
            to_client: Pending::default(),
            to_server: Pending::default(),
            held: Vec::new(),
            cancelling: None,
            stopping: None,
            timed_out: None,
            delayed: None,
            spoilt: false,
            armed: super::UNARMED,
            metered: super::Metered::default(),
            bytes_in: 0,
            bytes_out: 0,
            transactions: 0,
        }
    }
}

/// Finds out what the session begins with: from what other sessions with the same parameters were told, else from
/// a server, which also says whether the parameters are good.
pub(super) async fn begin(
    server: &Arc<Server>,
    upstream: &Upstream,
    client: &mut Stream,
    session: &Session,
    options: Options,
    minor: u16,
    mut early: Vec<u8>,
) -> Result<Begun, (Report, &'static str)> {
    let policy = Arc::clone(&session.slot().policy());
    let mode = options.pool_mode.unwrap_or(policy.limits.postgres.pool_mode);
    let mut pool = upstream.pool(session.slot());
    let limits = policy.limits.sql(pool.protocol());
    let Some(mut home) = upstream.home(&pool, &policy.tenant, &options.database) else {
        tracing::error!(org = %session.slot().org(), "its record names no place at Neon for this database: `dynabase tenant provision` makes what is missing");
        let refusal = Refusal::UpstreamDown;
        count_refusal(session.protocol(), &refusal);
        return Err((refuse::fatal(&refusal), refusal.kind()));
    };
    let mut shared = server.shared(&home.database);

    let bare = shared.intern(options.settings);
    let settings = match &options.application_name {
        Some(name) => shared.intern(bare.with("application_name", Value::Raw(name.as_str().into()))),
        None => Arc::clone(&bare),
    };
    let known = if mode == PoolMode::Transaction { shared.profile(&bare) } else { None };
    let mut link = None;
    let reported = match known {
        Some(reported) => reported,
        None => {
            let protocol = session.protocol();
            let refused = |refusal: Refusal| {
                count_refusal(protocol, &refusal);
                (refuse::fatal(&refusal), refusal.kind())
            };
            let deadline = Instant::now() + limits.queue_timeout;
            let taken = {
                // If the client goes away, waiting for its turn is in vain.
                let mut byte = [0; 1];
                let gone = std::pin::pin!(client.read(&mut byte));
                let take = std::pin::pin!(find(server, session, &mut pool, &mut home, deadline));
                match select(take, gone).await {
                    Either::Left((taken, _)) => taken,
                    Either::Right((Ok(1), take)) => {
                        let taken = take.await;
                        early.extend_from_slice(&byte);
                        taken
                    }
                    Either::Right(_) => return Err((refuse::fatal(&Refusal::Draining), "client_gone")),
                }
            };
            shared = server.shared(&home.database);
            let deadline = deadline.max(Instant::now() + Duration::from_secs(1));
            let mut lease =
                taken.map_err(|error| refused(take_refusal(session, pool.protocol(), &error, limits.queue_timeout)))?;
            let scratch =
                Conversation::new(session.live().id, minor, Arc::clone(&shared), Arc::clone(&bare), Arc::default());
            let script = scratch.preparation(&lease.remote);
            prepare(&mut lease, &script, deadline).await.map_err(|error| match error {
                // The client's own parameters are at fault: the server's words say which.
                PrepareError::Refused(mut report) => {
                    report.severity = Severity::Fatal;
                    (*report, "startup")
                }
                PrepareError::Lost => refused(Refusal::UpstreamDown),
            })?;
            let mut down = Out::default();
            let mut scratch = scratch;
            scratch.link(&mut lease.remote, &mut down);
            let reported = Arc::clone(&lease.remote.parameters);
            shared.keep_profile(bare, Arc::clone(&reported));
            if mode == PoolMode::Session {
                link = Some(lease);
            } else {
                lease.release();
            }
            reported
        }
    };
    // Clients with equal settings are told the same by one pointer, which spares comparing it at every link.
    let reported = match &options.application_name {
        Some(name) if reported.value("application_name") != Some(name) => {
            shared.profile(&settings).unwrap_or_else(|| {
                let mut own = Parameters::clone(&reported);
                own.set(b"application_name", name.as_bytes());
                let own = Arc::new(own);
                shared.keep_profile(Arc::clone(&settings), Arc::clone(&own));
                own
            })
        }
        _ => reported,
    };
    let mut conversation = Conversation::new(session.live().id, minor, shared, settings, reported);
    if let Some(lease) = &mut link {
        let script = conversation.preparation(&lease.remote);
        let deadline = Instant::now() + limits.queue_timeout;
        prepare(lease, &script, deadline)
            .await
            .map_err(|_| (refuse::fatal(&Refusal::UpstreamDown), "upstream_down"))?;
        conversation.link(&mut lease.remote, &mut Out::default());
        session.live().set_idle(false);
    }
    Ok(Begun { link, pool, home, conversation, mode, early })
}

/// The refusal for a lease that was not to be had.
fn take_refusal(session: &Session, home: Protocol, error: &TakeError, waited: Duration) -> Refusal {
    match error {
        TakeError::TenantFull { in_use } => {
            let policy = session.slot().policy();
            Refusal::OverLimit(Over {
                limit: Limit::Connections,
                tier: policy.tenant.tier,
                max: policy.limits.connections(home).into(),
                in_use: (*in_use).into(),
                retry_after: Some(waited),
            })
        }
        TakeError::ServerFull | TakeError::Moved | TakeError::Still => Refusal::UpstreamSlow,
        TakeError::Connect(_) => Refusal::UpstreamDown,
    }
}

enum PrepareError {
    /// The server refused a setting.
    Refused(Box<Report>),
    /// The server went away or does not follow the protocol.
    Lost,
}

/// Runs queries of ours on a connection that nobody uses, and waits for their end.
async fn prepare(connection: &mut Connection, queries: &[String], deadline: Instant) -> Result<(), PrepareError> {
    if queries.is_empty() {
        return Ok(());
    }
    // The Query destroys the server's unnamed statement.
    connection.remote.unnamed = None;
    let run = async {
        let mut out = Vec::new();
        queries.iter().for_each(|query| frontend::put_query(&mut out, query));
        connection.stream.write_all(&out).await.ok()?;
        connection.stream.flush().await.ok()?;
        let mut refused = None;
        let mut bytes: Vec<u8> = Vec::new();
        let mut total = 0;
        let mut left = queries.len();
        loop {
            while let Some(head) = wire::head(&bytes).ok()? {
                let Some(message) = bytes.get(..head.len) else { break };
                match head.kind {
                    b'S' => {
                        let (name, value) = backend::parameter(message).ok()?;
                        Arc::make_mut(&mut connection.remote.parameters).set(name, value);
                    }
                    // The first one that fails says what is wrong.
                    b'E' => refused = refused.or_else(|| Some(server_report(message))),
                    b'Z' if left == 1 => return Some(refused),
                    b'Z' => left -= 1,
                    _ => {}
                }
                bytes.drain(..head.len);
            }
            let n = connection.stream.read_buf(&mut bytes).await.ok()?;
            total += n;
            if n == 0 || total > PREPARATION_MAX {
                return None;
            }
        }
    };
    match tokio::time::timeout_at(deadline.into(), run).await {
        Ok(Some(None)) => Ok(()),
        Ok(Some(Some(report))) => Err(PrepareError::Refused(Box::new(report))),
        Ok(None) | Err(_) => Err(PrepareError::Lost),
    }
}

/// Ends what a client that has gone left running, and waits until the server has closed. A cancel that comes before
/// the statement has begun does nothing, so it is sent again; a statement that swallows cancels loses its backend.
pub(super) async fn abandon(upstream: &Upstream, mut lease: Lease, home: &Home) {
    let goodbye = async {
        lease.stream.write_all(&frontend::TERMINATE).await?;
        lease.stream.shutdown().await
    };
    // A server in the middle of a large message may not take it; then the end of the stream has to do.
    let _ = tokio::time::timeout(super::limit::CANCEL_GRACE, goodbye).await;
    for attempt in 0..=CANCELS {
        if attempt < CANCELS {
            home.endpoint.cancel(&lease.key).await;
        } else if let Some(pid) = lease.pid() {
            upstream.terminate(pid, home).await;
        }
        let mut rest = [0; 4096];
        let ended = async { while lease.stream.read(&mut rest).await.is_ok_and(|n| n > 0) {} };
        if tokio::time::timeout(super::limit::CANCEL_GRACE, ended).await.is_ok() {
            return;
        }
    }
}

/// The server's own words about a setting, with the codes that it has for them.
fn server_report(message: &[u8]) -> Report {
    let text = |field| String::from_utf8_lossy(backend::field(message, field).unwrap_or_default()).into_owned();
    let code = match backend::field(message, b'C') {
        Some(b"42704") => "42704",
        Some(b"42501") => "42501",
        Some(b"55P02") => "55P02",
        _ => "22023",
    };
    Report { severity: Severity::Error, code, message: text(b'M'), detail: text(b'D'), hint: text(b'H') }
}

impl Relay {
    /// Waits for a connection and prepares it. Meanwhile the client may cancel, go away, or be told to stop.
    pub(super) async fn wait_for_link(&mut self, taken: Taken) -> Result<(), &'static str> {
        let waited = Instant::now();
        let limit = self.session.slot().policy().limits.sql(self.pool.protocol()).queue_timeout;
        let mut deadline = waited + limit;
        let mut taken = taken;
        let outcome = loop {
            match self.link_or_signal(taken, deadline).await {
                // The database is being moved, or was: it is looked for where it is now.
                Waited::Refused(TakeError::Moved) if waited.elapsed() < STILL_PATIENCE => {
                    tokio::time::sleep(MOVED_PAUSE).await;
                    self.go_home();
                    deadline = Instant::now() + limit;
                    taken = self.pool.try_take(&self.home);
                }
                outcome => break outcome,
            }
        };
        let micros = u64::try_from(waited.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.session.meter().waited_us.fetch_add(micros, Ordering::Relaxed);
        let mut lease = match outcome {
            Waited::Lease(lease) => lease,
            Waited::Refused(error) => {
                let refusal = take_refusal(&self.session, self.pool.protocol(), &error, limit);
                if matches!(error, TakeError::Connect(_)) {
                    return Err(self.end(&refusal).await);
                }
                count_refusal(self.session.protocol(), &refusal);
                return self.refuse(&refuse::error(&refusal)).await;
            }
            Waited::Cancelled => {
                let report = refuse::plain(Severity::Error, "57014", "canceling statement due to user request");
                return self.refuse(&report).await;
            }
            // `signal` says why, at its safe point: nothing of the client is on a server.
            Waited::Signalled => return Ok(()),
            Waited::ClientGone => return Err("client_gone"),
        };
        let script = self.conversation.preparation(&lease.remote);
        let patience = deadline.max(Instant::now() + Duration::from_secs(1));
        if prepare(&mut lease, &script, patience).await.is_err() {
            // What the last client left may be what it refuses; a fresh connection has nothing of that.
            drop(lease);
            let before = Arc::clone(&self.home);
            let found = find(&self.server, &self.session, &mut self.pool, &mut self.home, patience).await;
            let Ok(fresh) = found else {
                return Err(self.end(&Refusal::UpstreamDown).await);
            };
            if !Arc::ptr_eq(&before, &self.home) {
                self.conversation.move_to(self.server.shared(&self.home.database));
            }
            lease = fresh;
            let script = self.conversation.preparation(&lease.remote);
            if prepare(&mut lease, &script, patience).await.is_err() {
                return Err(self.end(&Refusal::UpstreamDown).await);
            }
        }
        let mut down = Out::default();
        self.linked(lease, &mut down);
        down.copy_to(&[], &mut self.to_client.bytes);
        self.resume = true;
        Ok(())
    }

    async fn link_or_signal(&mut self, taken: Taken, deadline: Instant) -> Waited {
        let pool = Arc::clone(&self.pool);
        let home = Arc::clone(&self.home);
        let mut take = Box::pin(pool.take(&home, taken, deadline));
        let live = Arc::clone(self.session.live());
        std::future::poll_fn(|cx| {
            if let Poll::Ready(taken) = take.as_mut().poll(cx) {
                return Poll::Ready(match taken {
                    Ok(lease) => Waited::Lease(lease),
                    Err(error) => Waited::Refused(error),
                });
            }
            if let Poll::Ready(Err(_)) = self.to_client.poll(&mut self.client, cx) {
                return Poll::Ready(Waited::ClientGone);
            }
            live.register(cx);
            if live.take_cancel() {
                return Poll::Ready(Waited::Cancelled);
            }
            if live.stopped().is_some() {
                return Poll::Ready(Waited::Signalled);
            }
            self.poll_gone(cx)
        })
        .await
    }

    /// Whether the client went away while it waits; what it sends meanwhile is kept, up to a buffer's worth.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Waited> {
        if self.tail.len() >= super::READ {
            return Poll::Pending;
        }
        super::SCRATCH.with_borrow_mut(|scratch| {
            loop {
                match super::read(&mut self.client, cx, &mut scratch.read) {
                    Ok(Poll::Pending) => return Poll::Pending,
                    Ok(Poll::Ready(0)) | Err(_) => return Poll::Ready(Waited::ClientGone),
                    Ok(Poll::Ready(n)) => {
                        self.bytes_in += n as u64;
                        self.tail.extend_from_slice(&scratch.read[..n]);
                        if self.tail.len() >= super::READ {
                            return Poll::Pending;
                        }
                    }
                }
            }
        })
    }

    /// The next request is over the rate: it waits where the tier says so, else it is refused.
    pub(super) async fn over_rate(&mut self, over: Over) -> Result<(), &'static str> {
        let rate = *self.session.slot().policy().limits.rate(self.session.protocol());
        let wait = over.retry_after.unwrap_or_default();
        let began = Instant::now();
        let waited = began - **self.delayed.get_or_insert_with(|| Box::new(began));
        if rate.over == OverRate::Delay && waited + wait <= rate.max_delay {
            // The coarse clock may lag by its resolution: a little longer, or the first try after it fails.
            tokio::time::sleep(wait + clock::RESOLUTION).await;
            let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.session.meter().waited_us.fetch_add(micros, Ordering::Relaxed);
            self.resume = true;
            return Ok(());
        }
        self.delayed = None;
        let refusal = Refusal::OverLimit(over);
        count_refusal(self.session.protocol(), &refusal);
        self.refuse(&refuse::error(&refusal)).await
    }

    /// Refuses the message that waits; the session goes on.
    async fn refuse(&mut self, report: &Report) -> Result<(), &'static str> {
        self.session.meter().refused.fetch_add(1, Ordering::Relaxed);
        let mut down = Out::default();
        self.conversation.refuse(next_kind(&self.tail), report, &mut down);
        let done = self.conversation.skip_refused(&self.tail);
        self.tail.drain(..done);
        self.bytes_out += down.len() as u64;
        // Behind what the client has not taken yet.
        down.copy_to(&[], &mut self.to_client.bytes);
        self.resume = true;
        Ok(())
    }
}

enum Waited {
    Lease(Lease),
    Refused(TakeError),
    Cancelled,
    Signalled,
    ClientGone,
}
