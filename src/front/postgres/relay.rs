//! The sockets of one session: reads, writes, waits. What bytes mean is [`super::conversation`]'s.
//!
//! [`Relay::poll`] is one hand-written future for the busy path: it reads whatever side is ready into the thread's
//! buffer and writes once per direction. Everything that has to wait for something else (a lease, a cancel, a
//! farewell) leaves it as an [`Event`] and is ordinary `async` code here. Dropping a relay at any await is safe: its
//! lease is closed, its places are given back.

mod link;

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    task::JoinHandle,
};

use super::{
    Server, cancel,
    conversation::{Conversation, Fault, Heard, Want},
    count_refusal, farewell,
    handshake::Admitted,
    out::Out,
    refuse,
};
use crate::{
    net::{Peer, Stream},
    quota::{Stop, clock},
    refusal::{Limit, Over, Refusal},
    session::Session,
    tenant::PoolMode,
    upstream::postgres::{Home, Lease, Pool, Taken, Upstream},
    wire::postgres::{
        backend::{Report, Severity},
        head,
    },
};

/// Bytes read at once. Large enough that a big result costs few system calls; one buffer per thread.
const READ: usize = 64 * 1024;

/// Most bytes held back for the server's next answer; and the space for them that a sleeping client keeps.
const HELD_MAX: usize = 16 * 1024;
const HELD_KEPT: usize = 32;

/// Answers owed at once; a client that wants more has to wait for some.
const OWED_MAX: usize = 4096;

/// How long a session that has to end may take to reach a safe point.
const STOP_GRACE: Duration = Duration::from_secs(60);
/// The same where the tenant is suspended or its key revoked.
const CUT_GRACE: Duration = Duration::from_secs(1);

/// How long a server may take to obey a cancel before its backend is terminated.
const CANCEL_GRACE: Duration = Duration::from_secs(1);

/// What [`Relay::armed`] is when the deadline has to be set anew.
const UNARMED: u64 = u64::MAX;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        read: vec![0; READ].into(), up: Out::default(), down: Out::default(),
    });
}

struct Scratch {
    read: Box<[u8]>,
    up: Out,
    down: Out,
}

/// What the busy path can't do by itself.
#[derive(Debug)]
enum Event {
    /// The next message needs a connection that is not there yet.
    Link(Taken),
    /// The next message is over the tenant's rate.
    OverRate(Over),
    /// The client asked to cancel what is running.
    Cancel,
    /// The deadline has passed.
    Due,
    /// The session has to end, and may end now.
    Stop(Stop),
    /// The client has gone or said goodbye.
    ClientGone,
    /// The server has gone; whether it said so itself.
    ServerGone(bool),
    /// One side does not follow the protocol.
    Fault(Fault),
}

/// A session and its sockets. It has to be small: there is one for every client, and most of them sleep
/// (`a_sleeping_client_is_small`).
pub(super) struct Relay {
    server: Arc<Server>,
    id: u64,
    peer: Peer,
    told: Told,
    session: Session,
    /// The cancel key that the client was told.
    _key: cancel::Key,
    client: Stream,
    link: Option<Lease>,
    pool: Arc<Pool>,
    home: Arc<Home>,
    conversation: Conversation,
    mode: PoolMode,
    /// The client's bytes that wait: an unfinished message, or what waits for a connection.
    tail: Vec<u8>,
    /// The server's bytes of an unfinished message.
    server_tail: Vec<u8>,
    to_client: Pending,
    to_server: Pending,
    /// Answers of ours that go out with the server's next ones, in one write: a server would not send them sooner.
    held: Vec<u8>,
    /// There is something in `tail` that can go on without more bytes.
    resume: bool,
    cancelling: Option<JoinHandle<bool>>,
    /// The session has to end: why, and when its patience is over.
    stopping: Option<Box<(Stop, u64)>>,
    /// A statement is being cancelled because it exceeded its time: the errors seen before, and when its backend has
    /// to go if it does not obey.
    timed_out: Option<Box<(u64, u64)>>,
    /// When the first of the delays of the next request began.
    delayed: Option<Box<Instant>>,
    /// The connection must not serve anybody else.
    spoilt: bool,
    /// What the deadline was last set for ([`Relay::arm`]); [`UNARMED`] sets it anew.
    armed: u64,
    /// Totals that have been added to the meter.
    metered: Metered,
    bytes_in: u64,
    bytes_out: u64,
    transactions: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Metered {
    bytes_in: u64,
    bytes_out: u64,
    completed: u64,
    errors: u64,
}

/// Bytes that a socket has not taken yet.
#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    /// Of `bytes`, which are a few reads' worth at most.
    at: u32,
    /// The stream may hold bytes of its own.
    flush: bool,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Writes until all is taken.
    fn poll(&mut self, stream: &mut Stream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(rest @ [_, ..]) = self.bytes.get(self.at as usize..) {
            match ready!(Pin::new(&mut *stream).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.at += u32::try_from(n).unwrap_or(u32::MAX),
            }
            self.flush = stream.is_buffered();
        }
        if !self.bytes.is_empty() {
            *self = Self { flush: self.flush, ..Self::default() };
        }
        if self.flush {
            ready!(Pin::new(stream).poll_flush(cx))?;
            self.flush = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Writes `out` now, as far as it goes.
    fn write(&mut self, out: &mut Out, stream: &mut Stream, cx: &mut Context<'_>, input: &[u8]) -> io::Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        if !self.is_empty() {
            out.copy_to(input, &mut self.bytes);
            return Ok(());
        }
        out.write(stream, cx, input, &mut self.bytes)?;
        self.flush = stream.is_buffered();
        if self.bytes.is_empty()
            && self.flush
            && let Poll::Ready(flushed) = Pin::new(stream).poll_flush(cx)
        {
            flushed?;
            self.flush = false;
        }
        Ok(())
    }
}

/// What the log is told of a session's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// A line.
    Line,
    /// Nothing: it was one request of a connection that has its own line.
    Nothing,
}

/// Makes an admitted client's session and greets it; `None` when it has ended before.
pub(super) async fn begin(
    server: Arc<Server>,
    (id, peer): (u64, Peer),
    mut stream: Stream,
    admitted: Admitted,
    told: Told,
) -> Option<Box<Relay>> {
    let Admitted { session, upstream, options, minor, early } = admitted;
    let reason = match link::begin(&server, &upstream, &mut stream, &session, options, minor, early).await {
        Ok(begun) => {
            if let Some((key, hello)) = begun.greeting(&server.keys, &session)
                && stream.write_all(&hello).await.is_ok()
                && stream.flush().await.is_ok()
            {
                return Some(Box::new(begun.into_relay(server, (id, peer, told), session, stream, key)));
            }
            "client_gone"
        }
        Err((report, reason)) => {
            farewell(&mut stream, &[], &report).await;
            reason
        }
    };
    if told == Told::Line {
        log_end(id, peer, &session, reason, [0; 3]);
    }
    None
}

/// The one line about a session, at its end. `sums`: bytes in, bytes out, transactions.
fn log_end(id: u64, peer: Peer, session: &Session, reason: &'static str, sums: [u64; 3]) {
    let [bytes_in, bytes_out, transactions] = sums;
    let protocol = session.protocol().label();
    metrics::counter!("dynabase_connections_ended_total", "protocol" => protocol, "reason" => reason).increment(1);
    let milliseconds = clock::now_ms().saturating_sub(session.live().opened_ms);
    tracing::info!(
        conn = id, %peer, org = %session.slot().org(), subject = %session.identity().subject, protocol, reason, bytes_in,
        bytes_out, transactions, seconds = Duration::from_millis(milliseconds).as_secs_f64(), "postgres session ended"
    );
}

impl Relay {
    /// Runs to the end.
    pub(super) async fn run(mut self: Box<Self>) {
        loop {
            let event = std::future::poll_fn(|cx| self.poll(cx)).await;
            // Boxed: a sleeping client must not keep the space that these need.
            let Err(reason) = Box::pin(self.handle(event)).await else { continue };
            self.leave();
            self.meter();
            return self.log(reason);
        }
    }

    async fn handle(&mut self, event: Event) -> Result<(), &'static str> {
        match event {
            Event::Link(taken) => self.wait_for_link(taken).await,
            Event::OverRate(over) => self.over_rate(over).await,
            Event::Cancel => {
                self.cancel();
                Ok(())
            }
            Event::Due => self.due().await,
            Event::Stop(stop) => Err(self.stop(stop).await),
            Event::ClientGone => Err("client_gone"),
            Event::ServerGone(told) => Err(self.server_gone(told).await),
            Event::Fault(fault) => Err(self.fault(fault).await),
        }
    }

    /// Where its connections lead.
    fn upstream(&self) -> &Arc<Upstream> {
        self.server.upstream(self.pool.protocol())
    }

    fn log(&self, reason: &'static str) {
        if self.told == Told::Nothing {
            return;
        }
        let sums = [self.bytes_in, self.bytes_out, self.transactions];
        log_end(self.id, self.peer, &self.session, reason, sums);
    }

    /// The busy path. See the module's description.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        SCRATCH.with_borrow_mut(|scratch| match self.poll_with(cx, scratch) {
            Ok(Poll::Pending) => {
                self.arm();
                // Signals that came before the waker was known.
                self.session.live().register(cx);
                match self.signal() {
                    Some(event) => Poll::Ready(event),
                    None => Poll::Pending,
                }
            }
            Ok(ready) => ready,
            Err(event) => Poll::Ready(event),
        })
    }

    fn poll_with(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Result<Poll<Event>, Event> {
        loop {
            if let Some(event) = self.signal() {
                return Err(event);
            }
            if let Some(cancelling) = &mut self.cancelling
                && let Poll::Ready(taken) = Pin::new(cancelling).poll(cx)
            {
                // A request that the server may yet take must not hit whoever comes next.
                self.spoilt |= !matches!(taken, Ok(true));
                self.cancelling = None;
                self.release_if_done();
            }
            if self.to_client.poll(&mut self.client, cx).map_err(client_gone)?.is_ready()
                && self.resume
                && self.to_server.is_empty()
            {
                self.resume = false;
                self.on_client(cx, scratch, 0)?;
                continue;
            }
            let mut progress = false;
            if let Some(link) = &mut self.link {
                let told = |_| Event::ServerGone(false);
                if self.to_server.poll(&mut link.stream, cx).map_err(told)?.is_ready()
                    && self.resume
                    && self.to_client.is_empty()
                {
                    continue;
                }
                if self.to_client.is_empty()
                    && let Poll::Ready(n) = read(&mut link.stream, cx, &mut scratch.read).map_err(told)?
                {
                    if n == 0 {
                        return Err(Event::ServerGone(false));
                    }
                    self.on_server(cx, scratch, n)?;
                    progress = true;
                }
            }
            if self.may_read_client()
                && let Poll::Ready(n) = read(&mut self.client, cx, &mut scratch.read).map_err(client_gone)?
            {
                if n == 0 {
                    return Err(Event::ClientGone);
                }
                self.bytes_in += n as u64;
                self.on_client(cx, scratch, n)?;
                progress = true;
            }
            if !progress {
                return Ok(Poll::Pending);
            }
        }
    }

    /// Whether the client is read. Not while one side does not take what it is sent, nor while a pipeline is longer
    /// than a server would buffer, so that nothing here grows with what a client sends; nor while a cancel is on its
    /// way that could hit the next statement.
    fn may_read_client(&self) -> bool {
        let ledger = self.conversation.ledger();
        self.to_server.is_empty()
            && self.to_client.is_empty()
            && !self.resume
            && !self.conversation.is_holding()
            && ledger.len() < OWED_MAX
            && !(self.cancelling.is_some() && ledger.is_settled())
    }

    /// Takes `n` bytes that the client sent, behind those that waited.
    fn on_client(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch, n: usize) -> Result<(), Event> {
        let Scratch { read, up, down } = scratch;
        let waiting = if self.tail.is_empty() {
            None
        } else {
            self.tail.extend_from_slice(&read[..n]);
            Some(std::mem::take(&mut self.tail))
        };
        let input: &[u8] = waiting.as_deref().unwrap_or(&read[..n]);
        let mut at = 0;
        let event = loop {
            up.clear();
            down.clear();
            let remote = self.link.as_mut().map(|link| &mut link.remote);
            let linked = remote.is_some();
            let step = match self.conversation.hear_client(&input[at..], remote, up, down) {
                Ok(step) => step,
                Err(fault) => return Err(Event::Fault(fault)),
            };
            if linked && let Some(link) = &mut self.link {
                self.to_server.write(up, &mut link.stream, cx, &input[at..]).map_err(|_| Event::ServerGone(false))?;
            }
            if linked && self.held.len() < HELD_MAX && !self.conversation.ledger().is_settled() {
                down.copy_to(&input[at..], &mut self.held);
            } else {
                self.say(cx, down, &input[at..])?;
            }
            at += step.consumed;
            match step.want {
                Want::More | Want::Hold => break None,
                Want::Again if self.to_server.is_empty() => {}
                Want::Again => {
                    self.resume = true;
                    break None;
                }
                Want::Close => break Some(Event::ClientGone),
                Want::Pace => match self.session.take(1) {
                    Ok(()) => {
                        self.delayed = None;
                        self.conversation.pace();
                        self.conversation.set_over_storage(self.over_storage());
                    }
                    Err(over) => break Some(Event::OverRate(over)),
                },
                Want::Link => match self.link_now(cx, down) {
                    Ok(()) => {}
                    Err(event) => break Some(event),
                },
            }
        };
        if at < input.len() {
            self.tail = match waiting {
                Some(mut waiting) => {
                    waiting.drain(..at);
                    waiting
                }
                None => input[at..].to_vec(),
            };
        }
        match event {
            Some(event) => Err(event),
            None => {
                self.release_if_done();
                Ok(())
            }
        }
    }

    /// Takes a connection that can be had at once and needs no preparation: the usual case.
    fn link_now(&mut self, cx: &mut Context<'_>, down: &mut Out) -> Result<(), Event> {
        if self.stopping.is_some() {
            // Nothing new is begun; `signal` ends the session at once.
            return Err(Event::Stop(self.stopping.as_ref().map_or(Stop::Draining, |it| it.0)));
        }
        self.session.take(1).map_err(Event::OverRate)?;
        self.delayed = None;
        self.conversation.pace();
        match self.pool.try_take(&self.home) {
            Taken::Lease(lease) if self.conversation.preparation(&lease.remote).is_empty() => {
                down.clear();
                self.linked(lease, down);
                self.say(cx, down, &[])
            }
            taken => Err(Event::Link(taken)),
        }
    }

    /// Makes a prepared connection this client's.
    fn linked(&mut self, mut lease: Lease, down: &mut Out) {
        self.conversation.link(&mut lease.remote, down);
        self.conversation.set_over_storage(self.over_storage());
        self.link = Some(lease);
        self.session.live().set_idle(false);
        self.transactions += 1;
    }

    fn over_storage(&self) -> Option<Over> {
        let slot = self.session.slot();
        let used = slot.stored(self.pool.protocol());
        let policy = slot.policy();
        let max = policy.limits.sql(self.pool.protocol()).storage;
        (used >= max).then(|| Over {
            limit: Limit::Storage,
            tier: policy.tenant.tier,
            max,
            in_use: used,
            retry_after: None,
        })
    }

    fn say(&mut self, cx: &mut Context<'_>, down: &mut Out, input: &[u8]) -> Result<(), Event> {
        self.bytes_out += (self.held.len() + down.len()) as u64;
        if !self.held.is_empty() {
            self.to_client.bytes.append(&mut self.held);
            down.copy_to(input, &mut self.to_client.bytes);
            let _ = self.to_client.poll(&mut self.client, cx).map_err(client_gone)?;
            return Ok(());
        }
        self.to_client.write(down, &mut self.client, cx, input).map_err(client_gone)
    }

    /// Takes `n` bytes that the server sent, behind those that waited.
    fn on_server(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch, n: usize) -> Result<(), Event> {
        let Scratch { read, down, .. } = scratch;
        let Some(link) = &mut self.link else { return Ok(()) };
        let waiting = if self.server_tail.is_empty() {
            None
        } else {
            self.server_tail.extend_from_slice(&read[..n]);
            Some(std::mem::take(&mut self.server_tail))
        };
        let input: &[u8] = waiting.as_deref().unwrap_or(&read[..n]);
        down.clear();
        if !self.held.is_empty() {
            down.own(|own| own.extend_from_slice(&self.held));
            self.held.clear();
            self.held.shrink_to(HELD_KEPT);
        }
        let held = self.conversation.is_holding();
        let Heard { consumed, fatal } =
            self.conversation.hear_server(input, &mut link.remote, down).map_err(Event::Fault)?;
        self.say(cx, down, input)?;
        self.resume |= held && !self.conversation.is_holding();
        if consumed < input.len() {
            self.server_tail = input[consumed..].to_vec();
        }
        if fatal {
            return Err(Event::ServerGone(true));
        }
        self.release_if_done();
        Ok(())
    }

    /// Gives the connection back once nobody needs it any more.
    fn release_if_done(&mut self) {
        if self.mode == PoolMode::Transaction
            && self.conversation.may_release()
            && self.cancelling.is_none()
            && self.to_server.is_empty()
            && self.server_tail.is_empty()
            && let Some(lease) = self.link.take()
        {
            if self.spoilt || self.conversation.take_spoilt() {
                self.spoilt = false;
                drop(lease);
            } else {
                lease.release();
            }
            self.session.live().set_idle(true);
            self.meter();
        }
    }

    /// Adds what was used since the last time to the tenant's meter, and to its rate what was not asked for before.
    fn meter(&mut self) {
        let now = Metered {
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            completed: self.conversation.ledger().completed(),
            errors: self.conversation.errors(),
        };
        let before = std::mem::replace(&mut self.metered, now);
        let meter = self.session.meter();
        let statements = now.completed - before.completed;
        meter.transactions.fetch_add(1, Ordering::Relaxed);
        meter.requests.fetch_add(statements, Ordering::Relaxed);
        meter.bytes_in.fetch_add(now.bytes_in - before.bytes_in, Ordering::Relaxed);
        meter.bytes_out.fetch_add(now.bytes_out - before.bytes_out, Ordering::Relaxed);
        if now.errors > before.errors {
            meter.errors.fetch_add(now.errors - before.errors, Ordering::Relaxed);
        }
        if statements > 1 {
            self.session.charge(statements - 1);
        }
    }

    /// What others want of this session, if anything.
    fn signal(&mut self) -> Option<Event> {
        if !self.session.live().signalled() && self.stopping.is_none() {
            return None;
        }
        let live = Arc::clone(self.session.live());
        if live.take_cancel() {
            return Some(Event::Cancel);
        }
        if self.stopping.is_none()
            && let Some(stop) = live.stopped()
        {
            let grace = if matches!(stop, Stop::Suspended | Stop::Revoked) { CUT_GRACE } else { STOP_GRACE };
            let at = clock::now_ms() + u64::try_from(grace.as_millis()).unwrap_or(0);
            self.stopping = Some(Box::new((stop, at)));
            self.armed = UNARMED;
        }
        if let Some(stop) = self.stopping.as_ref().map(|it| it.0)
            && self.conversation.is_at_safe_point()
        {
            return Some(Event::Stop(stop));
        }
        live.take_due().then_some(Event::Due)
    }

    /// Sets the deadline for what is happening now, if that has changed.
    fn arm(&mut self) {
        self.forget_timeout();
        let ledger = self.conversation.ledger();
        let busy = self.link.is_some() && !ledger.is_settled();
        // A pipeline without its Sync or half a message holds the connection as an open transaction does.
        let idle = self.link.is_none() || (ledger.is_idle() && self.tail.is_empty());
        let state = ledger.completed() << 2 | u64::from(busy) << 1 | u64::from(idle);
        if state == self.armed {
            return;
        }
        self.armed = state;
        let deadline = match self.timed_out.as_ref().map(|it| it.1) {
            Some(at) => at,
            None if busy || !idle => {
                let policy = self.session.slot().policy();
                let limits = policy.limits.sql(self.pool.protocol());
                let limit = if busy { limits.statement_timeout } else { limits.idle_in_transaction_timeout };
                // The clock may lag; nobody's statement is cut before its time.
                let whole = limit + clock::RESOLUTION;
                clock::now_ms() + u64::try_from(whole.as_millis()).unwrap_or(u64::MAX / 2)
            }
            None => u64::MAX,
        };
        self.session.live().set_deadline(deadline.min(self.stopping.as_ref().map_or(u64::MAX, |it| it.1)));
    }

    /// The statement that was cancelled for its time has ended: the next one has all of its own.
    fn forget_timeout(&mut self) -> bool {
        let Some(errors) = self.timed_out.as_ref().map(|it| it.0) else { return false };
        let busy = self.link.is_some() && !self.conversation.ledger().is_settled();
        let over = !busy || self.conversation.errors() != errors || !self.conversation.is_timed_out();
        if over {
            self.timed_out = None;
            self.conversation.set_timed_out(None);
            self.armed = UNARMED;
        }
        over
    }

    /// Asks the server to cancel what is running, if anything is. The connection stays leased until the server has
    /// taken the request, so that it can't hit another client's statement.
    fn cancel(&mut self) {
        let Some(link) = &self.link else { return };
        if self.cancelling.is_some() || self.conversation.ledger().is_settled() || link.key.is_empty() {
            return;
        }
        let (home, key) = (Arc::clone(&self.home), link.key.clone());
        self.cancelling = Some(tokio::spawn(async move { home.endpoint.cancel(&key).await }));
    }

    /// The deadline has passed: of a statement, of a pause inside a transaction, or of the grace of a stop.
    async fn due(&mut self) -> Result<(), &'static str> {
        if let Some((stop, at)) = self.stopping.as_deref().copied()
            && clock::now_ms() >= at
        {
            self.cancel();
            return Err(self.stop(stop).await);
        }
        if self.forget_timeout() {
            return Ok(());
        }
        let policy = Arc::clone(&self.session.slot().policy());
        let limits = policy.limits.sql(self.pool.protocol());
        let over = |limit, max: Duration| Over {
            limit,
            tier: policy.tenant.tier,
            max: u64::try_from(max.as_millis()).unwrap_or(u64::MAX),
            in_use: u64::try_from(max.as_millis()).unwrap_or(u64::MAX),
            retry_after: None,
        };
        if self.link.is_none() || (self.conversation.ledger().is_idle() && self.tail.is_empty()) {
            return Ok(());
        }
        if self.conversation.ledger().is_settled() {
            let refusal = Refusal::OverLimit(over(Limit::IdleInTransaction, limits.idle_in_transaction_timeout));
            return Err(self.end(&refusal).await);
        }
        let refusal = over(Limit::StatementTimeout, limits.statement_timeout);
        if self.timed_out.is_none() {
            count_refusal(self.session.protocol(), &Refusal::OverLimit(refusal));
            let at = clock::now_ms() + u64::try_from(CANCEL_GRACE.as_millis()).unwrap_or(0);
            self.timed_out = Some(Box::new((self.conversation.errors(), at)));
            self.armed = UNARMED;
            self.conversation.set_timed_out(Some(refusal));
            self.cancel();
            return Ok(());
        }
        // The statement swallows cancels: its backend has to go.
        if let Some(link) = &self.link
            && let Some(pid) = link.pid()
        {
            self.upstream().terminate(pid, &self.home).await;
        }
        Err(self.end(&Refusal::OverLimit(refusal)).await)
    }

    async fn stop(&mut self, stop: Stop) -> &'static str {
        self.end(&Session::farewell(stop)).await
    }

    /// Ends the session with a FATAL report, where the client is between two messages.
    async fn end(&mut self, refusal: &Refusal) -> &'static str {
        count_refusal(self.session.protocol(), refusal);
        self.say_goodbye(&refuse::fatal(refusal)).await;
        refusal.kind()
    }

    async fn say_goodbye(&mut self, report: &Report) {
        if self.to_client.is_empty() && self.conversation.is_between_replies() {
            let held = std::mem::take(&mut self.held);
            farewell(&mut self.client, &held, report).await;
        }
    }

    async fn server_gone(&mut self, told: bool) -> &'static str {
        // What it sent before is with the client already; nothing is ever sent to it again.
        if !told {
            let mut report = refuse::plain(Severity::Fatal, "08006", "the connection to the database was lost");
            report.hint = "The statement may or may not have run: reconnect and look before repeating it.".into();
            self.say_goodbye(&report).await;
        } else {
            let flush = std::future::poll_fn(|cx| self.to_client.poll(&mut self.client, cx));
            // Its own last words; a client that does not take them in time misses them.
            let _ = tokio::time::timeout(super::LINGER, flush).await;
            let _ = tokio::time::timeout(super::LINGER, self.client.shutdown()).await;
        }
        self.link = None;
        "upstream_lost"
    }

    async fn fault(&mut self, fault: Fault) -> &'static str {
        let (report, reason) = match fault {
            Fault::Client(error) => (refuse::plain(Severity::Fatal, "08P01", error.what), "protocol"),
            Fault::Server(error) => {
                tracing::error!(org = %self.session.slot().org(), %error, "the upstream does not follow the protocol");
                (refuse::fatal(&Refusal::UpstreamDown), "upstream_protocol")
            }
            Fault::Unasked => {
                tracing::error!(org = %self.session.slot().org(), "the upstream answered what nobody asked");
                (refuse::fatal(&Refusal::UpstreamDown), "upstream_protocol")
            }
        };
        self.say_goodbye(&report).await;
        reason
    }

    /// Leaves no trace: gives a clean connection back, cancels what still runs, closes everything else.
    fn leave(&mut self) {
        let Some(mut lease) = self.link.take() else { return };
        let ledger = self.conversation.ledger();
        if self.conversation.may_release() && self.cancelling.is_none() && self.to_server.is_empty() {
            // A session-mode client may have left anything behind.
            lease.remote.soiled |= self.mode == PoolMode::Session;
            lease.release();
        } else if ledger.is_settled() || lease.key.is_empty() {
            drop(lease);
        } else {
            let (upstream, home) = (Arc::clone(self.upstream()), Arc::clone(&self.home));
            tokio::spawn(async move { link::abandon(&upstream, lease, &home).await });
        }
    }
}

fn client_gone(_: io::Error) -> Event {
    Event::ClientGone
}

/// Reads what is there, into the thread's buffer.
fn read(stream: &mut Stream, cx: &mut Context<'_>, space: &mut [u8]) -> io::Result<Poll<usize>> {
    let mut buf = ReadBuf::new(space);
    match Pin::new(stream).poll_read(cx, &mut buf) {
        Poll::Ready(Ok(())) => Ok(Poll::Ready(buf.filled().len())),
        Poll::Ready(Err(error)) => Err(error),
        Poll::Pending => Ok(Poll::Pending),
    }
}

/// The kind of the message that waits at the head of `bytes`.
fn next_kind(bytes: &[u8]) -> u8 {
    head(bytes).ok().flatten().map_or(0, |head| head.kind)
}
