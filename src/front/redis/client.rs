//! One client's conversation: read a burst, send its commands on in one piece, write what came back.
//!
//! A client's commands go to one connection at a time, so its replies come in order; it changes the connection only
//! while nothing is outstanding. Everything that can be decided on the spot happens in [`Client::process`], without
//! an await and without an allocation per command; what can't is copied out and done in `slow` once all earlier
//! replies are in.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use hashbrown::{HashMap, HashSet, hash_map::Entry};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{Server, commands::Row, keys::Found, refuse, registry::Card, tracking::Tracking};
use crate::{
    net::{Peer, Stream, limit::Unauthenticated},
    quota::{Permit, Slot, clock},
    session::{Session, Transport},
    upstream::redis::{
        Database, Outbox, Place, Script, Version,
        held::{Share, TENANT_MAX_BYTES},
        link::{How, Link},
        reply::Shape,
    },
    wire::resp::{
        self, ARGS_MAX, ARGS_MAX_UNAUTHENTICATED, BULK_MAX, BULK_MAX_UNAUTHENTICATED, Progress, Request, put_error,
    },
};

/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;

/// Commands outstanding for one client: enough for any pipeline to keep the server busy, few enough to bound what
/// comes back.
const WINDOW: usize = 1024;

/// The same while replies are large.
const WINDOW_LARGE: usize = 16;

/// A delivery from which on replies are large, in bytes.
const LARGE_BYTES: usize = 64 << 10;

/// Bytes waiting for the client over which no more of its commands are taken.
const WAITING_HIGH_BYTES: usize = 1 << 20;

/// Buffer kept for an unfinished command between reads.
const KEPT_BYTES: usize = 4 << 10;

/// Bytes of commands of one transaction, kept until EXEC.
pub const TRANSACTION_MAX_BYTES: usize = 64 << 20;

thread_local! {
    /// No client owns a read buffer: each thread has one.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

/// A transaction being queued here, to be sent in one piece.
#[derive(Debug, Default)]
pub struct Queue {
    /// The commands, rewritten.
    pub bytes: Vec<u8>,
    /// What becomes of each command's result; `None` for commands of ours.
    pub elements: Vec<Option<Shape>>,
    /// Keys that they may create.
    pub creates: u64,
    /// A command was refused: EXEC will be, too.
    pub dirty: bool,
    /// Scripts that must be loaded before, each once however often it is called.
    pub scripts: HashMap<[u8; 40], Arc<Script>>,
    script_bytes: usize,
}

impl Queue {
    /// Has a script loaded before.
    pub fn load(&mut self, script: &Arc<Script>) {
        if let Entry::Vacant(entry) = self.scripts.entry(script.sha) {
            self.script_bytes += script.text.len();
            entry.insert(Arc::clone(script));
        }
    }

    /// Bytes that it holds.
    pub fn held(&self) -> usize {
        self.bytes.len() + self.script_bytes
    }
}

/// An upstream connection for this client alone.
pub struct Own {
    /// It.
    pub link: Arc<Link>,
    /// The protocol version it speaks.
    pub version: Version,
    /// Its place among the tenant's.
    pub _permit: Permit<Slot>,
}

/// `CLIENT REPLY`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replies {
    /// As usual.
    On,
    /// None.
    Off,
    /// None for the next command, then as usual.
    Skip,
}

/// The names a client listens to.
#[derive(Debug, Default)]
pub struct Subscriptions {
    /// `SUBSCRIBE`.
    pub channels: HashSet<Box<[u8]>>,
    /// `PSUBSCRIBE`.
    pub patterns: HashSet<Box<[u8]>>,
    /// `SSUBSCRIBE`.
    pub shards: HashSet<Box<[u8]>>,
}

impl Subscriptions {
    /// All of them.
    pub fn count(&self) -> usize {
        self.channels.len() + self.patterns.len() + self.shards.len()
    }

    /// Bytes of all their names.
    pub fn bytes(&self) -> usize {
        [&self.channels, &self.patterns, &self.shards].into_iter().flatten().map(|name| name.len()).sum()
    }
}

/// What an admitted client has.
pub struct Tenancy {
    /// Its admission.
    pub session: Session,
    /// Its tenant on the server.
    pub place: Arc<Place>,
    /// Its logical database.
    pub database: Arc<Database>,
}

/// A command that can't be done on the spot.
pub struct Held {
    /// What it is.
    pub row: &'static Row,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its arguments.
    pub args: Vec<resp::Arg>,
}

/// Why processing stopped.
pub enum Step {
    /// The bytes ran out.
    More,
    /// Too much is outstanding.
    Wait,
    /// A command for `slow`.
    Held(Held),
    /// The shared connection has to be made.
    Connect,
    /// The memory has to be measured before more is written.
    Measure,
    /// The tenant's other databases have to be counted before a key is created.
    Count,
    /// The client is over its rate and its tier delays.
    Delay(Duration),
    /// The unfinished command is to be sent on in pieces.
    Stream,
    /// Large values are expected: a connection of our own, so that nobody waits behind them.
    Own,
    /// The client is to be let go once everything is written.
    Close,
}

/// One client.
pub struct Client {
    pub(super) server: Arc<Server>,
    pub(super) id: u64,
    pub(super) peer: Peer,
    pub(super) transport: Transport,
    /// Its place among its network's unauthenticated connections, until it logs in.
    pub(super) unauthenticated: Option<Unauthenticated>,
    stream: Stream,
    pub(super) outbox: Arc<Outbox>,
    writing: Vec<u8>,
    written: usize,
    pub(super) carry: Vec<u8>,
    pub(super) request: Request,
    pub(super) found: Found,
    /// Arguments of the command being taken.
    pub(super) request_args: usize,
    pub(super) tenancy: Option<Tenancy>,
    pub(super) card: Option<Arc<Card>>,
    pub(super) version: Version,
    pub(super) shared: Option<Arc<Link>>,
    pub(super) own: Option<Own>,
    pub(super) subscriber: Option<Own>,
    pub(super) subscriptions: Subscriptions,
    pub(super) watching: bool,
    /// Bytes of the commands that made it watch.
    pub(super) watched: usize,
    pub(super) tracking: Option<Tracking>,
    pub(super) queue: Option<Queue>,
    pub(super) replies: Replies,
    /// The upstream could not be reached just now: commands of this burst get this instead.
    pub(super) down: Option<String>,
    /// The memory was just measured.
    pub(super) measured: bool,
    /// The tenant's databases were just counted.
    pub(super) counted: bool,
    pub(super) closing: bool,
    /// The unfinished command is to be held whole, since it can't be sent on in pieces now.
    pub(super) whole: bool,
    /// There was no connection of our own just now.
    declined: bool,
    /// What `carry` and `queue` count among all that is large.
    pub(super) share: Share,
    /// `carry` may begin with whole commands.
    pub(super) resume: bool,
    pub(super) ended: bool,
}

/// What a wait ended with.
enum Event {
    Step(Step),
    Ended,
}

impl Client {
    pub(super) fn new(
        server: Arc<Server>,
        id: u64,
        peer: Peer,
        transport: Transport,
        stream: Stream,
        unauthenticated: Option<Unauthenticated>,
    ) -> Self {
        Self {
            server,
            id,
            peer,
            transport,
            unauthenticated,
            stream,
            outbox: Arc::default(),
            writing: Vec::new(),
            written: 0,
            carry: Vec::new(),
            request: Request::default(),
            found: Found::default(),
            request_args: 0,
            tenancy: None,
            card: None,
            version: Version::Two,
            shared: None,
            own: None,
            subscriber: None,
            subscriptions: Subscriptions::default(),
            watching: false,
            watched: 0,
            tracking: None,
            queue: None,
            replies: Replies::On,
            down: None,
            measured: false,
            counted: false,
            closing: false,
            whole: false,
            declined: false,
            share: Share::default(),
            resume: false,
            ended: false,
        }
    }

    /// Serves it to its end.
    pub(super) async fn run(&mut self) {
        let drain = self.server.drain.clone();
        let mut started = std::pin::pin!(drain.started());
        let login_timeout = self.server.config.login_timeout;
        let mut login = std::pin::pin!(tokio::time::sleep(login_timeout));
        let mut draining = false;
        while !self.ended {
            let unknown = self.tenancy.is_none();
            let event = tokio::select! {
                biased;
                event = poll_fn(|cx| self.poll(cx)) => event,
                () = &mut started, if !draining => {
                    draining = true;
                    self.farewell(&crate::refusal::Refusal::Draining);
                    continue;
                }
                () = &mut login, if unknown => return,
            };
            match event {
                Event::Ended => break,
                Event::Step(step) => self.step(step).await,
            }
        }
        if let Stream::Tls(_) = self.stream {
            let _ = tokio::time::timeout(Duration::from_secs(1), tokio::io::AsyncWriteExt::shutdown(&mut self.stream))
                .await;
        }
    }

    /// Says why the client is let go, after what is outstanding, and closes.
    fn farewell(&mut self, refusal: &crate::refusal::Refusal) {
        if !self.closing {
            let (text, _) = refuse::render(refusal);
            let mut bytes = Vec::new();
            put_error(&mut bytes, &text);
            self.say(&bytes);
            self.closing = true;
        }
    }

    /// Appends a reply of ours after all that is outstanding.
    pub(super) fn say(&mut self, bytes: &[u8]) {
        match self.replies {
            Replies::Off => return,
            Replies::Skip => {
                self.replies = Replies::On;
                return;
            }
            Replies::On => {}
        }
        self.say_always(bytes);
    }

    /// The same whatever `CLIENT REPLY` says.
    pub(super) fn say_always(&mut self, bytes: &[u8]) {
        let link = self.current();
        let mut sending = link.as_ref().and_then(|link| link.lock_for_local());
        let mut state = self.outbox.lock();
        match &mut sending {
            Some(sending) if state.unanswered > 0 => {
                state.unanswered += 1;
                drop(state);
                sending.expect(&self.outbox, 1, 0, How::Local(bytes.into()));
            }
            _ => {
                state.bytes.extend_from_slice(bytes);
                return;
            }
        }
        drop(sending);
        if let Some(link) = &link {
            link.wake();
        }
    }

    /// The connection that commands go to now.
    pub(super) fn current(&self) -> Option<Arc<Link>> {
        self.own.as_ref().map(|own| &own.link).or(self.shared.as_ref()).cloned()
    }

    async fn step(&mut self, step: Step) {
        match step {
            Step::More | Step::Wait => {}
            Step::Close => self.closing = true,
            Step::Connect => self.connect().await,
            Step::Measure => self.measure().await,
            Step::Count => self.count().await,
            Step::Delay(time) => tokio::time::sleep(time).await,
            Step::Own => self.declined = !self.lend().await,
            Step::Stream => {
                if self.drained().await {
                    self.stream().await;
                }
            }
            Step::Held(held) => {
                if self.drained().await {
                    self.release_if_free();
                    self.slow(held).await;
                }
            }
        }
    }

    /// Waits until everything outstanding is answered, writing it meanwhile; false when the client is gone.
    pub(super) async fn drained(&mut self) -> bool {
        poll_fn(|cx| {
            self.outbox.register(cx);
            if self.flush(cx).is_err() || self.outbox.lock().lost {
                self.ended = true;
                return Poll::Ready(false);
            }
            if self.outbox.lock().unanswered == 0 { Poll::Ready(true) } else { Poll::Pending }
        })
        .await
    }

    /// Whether the client is to be let go: at once (`ended`), or with a word and after what is outstanding.
    pub(super) fn must_stop(&mut self, cx: &Context<'_>) -> bool {
        if let Some(tenancy) = &self.tenancy {
            tenancy.session.live().register(cx);
            if tenancy.session.live().signalled()
                && let Some(stop) = tenancy.session.live().stopped()
            {
                self.farewell(&Session::farewell(stop));
            }
        }
        self.ended |= self.card.as_ref().is_some_and(|card| card.killed.load(Ordering::Acquire));
        self.ended || self.closing
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        self.outbox.register(cx);
        if self.must_stop(cx) && self.ended {
            return Poll::Ready(Event::Ended);
        }
        loop {
            if self.flush(cx).is_err() {
                return Poll::Ready(Event::Ended);
            }
            let (unanswered, waiting, largest, lost) = {
                let state = self.outbox.lock();
                (state.unanswered, state.bytes.len(), state.largest, state.lost)
            };
            if lost {
                return Poll::Ready(Event::Ended);
            }
            let waiting = waiting + self.writing.len() - self.written;
            if self.closing {
                // A client that blocks or listens has no reply to wait for.
                let idle = unanswered == 0 || self.own.is_some() || self.subscriber.is_some();
                return if idle && waiting == 0 { Poll::Ready(Event::Ended) } else { Poll::Pending };
            }
            let window = if largest > LARGE_BYTES { WINDOW_LARGE } else { WINDOW };
            if unanswered >= window || waiting > WAITING_HIGH_BYTES {
                return Poll::Pending;
            }
            let step = if std::mem::take(&mut self.resume) {
                self.process_carry()
            } else {
                match self.read(cx) {
                    Poll::Pending => {
                        // An idle client keeps no connection to itself.
                        if self.own.is_some() && self.outbox.lock().unanswered == 0 {
                            self.release_if_free();
                        }
                        return Poll::Pending;
                    }
                    Poll::Ready(Err(_)) => return Poll::Ready(Event::Ended),
                    Poll::Ready(Ok(step)) => step,
                }
            };
            match step {
                Step::More => {}
                Step::Wait => {
                    // Woken by the next reply, or by the connection that was full.
                    self.resume = true;
                    return match self.flush(cx) {
                        Ok(()) => Poll::Pending,
                        Err(_) => Poll::Ready(Event::Ended),
                    };
                }
                step => {
                    self.resume = !self.carry.is_empty();
                    return Poll::Ready(Event::Step(step));
                }
            }
        }
    }

    /// Writes what waits, as far as the client takes it.
    pub(super) fn flush(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        loop {
            if self.written == self.writing.len() {
                self.writing.clear();
                self.written = 0;
                self.outbox.take(&mut self.writing);
                if self.writing.is_empty() {
                    if self.outbox.lock().unanswered == 0 {
                        if self.writing.capacity() > 0 {
                            self.writing = Vec::new();
                        }
                        if let Some(tenancy) = &self.tenancy {
                            tenancy.session.live().set_idle(true);
                        }
                    }
                    return Ok(());
                }
                if let Some(tenancy) = &self.tenancy {
                    tenancy.session.meter().bytes_out.fetch_add(self.writing.len() as u64, Ordering::Relaxed);
                }
            }
            match Pin::new(&mut self.stream).poll_write(cx, &self.writing[self.written..]) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(n)) => self.written += n,
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(()),
            }
            if self.written == self.writing.len()
                && let Poll::Ready(Err(error)) = Pin::new(&mut self.stream).poll_flush(cx)
            {
                return Err(error);
            }
        }
    }

    fn read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Step>> {
        BUFFER.with_borrow_mut(|buffer| {
            let mut target = ReadBuf::new(buffer);
            match Pin::new(&mut self.stream).poll_read(cx, &mut target) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(result) => result?,
            }
            let bytes = target.filled();
            if bytes.is_empty() {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            if let Some(tenancy) = &self.tenancy {
                tenancy.session.meter().bytes_in.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            }
            if self.carry.is_empty() {
                let (used, step) = self.process(bytes);
                self.carry.extend_from_slice(&bytes[used..]);
                Poll::Ready(Ok(if self.is_too_much() { Step::Close } else { step }))
            } else {
                self.carry.extend_from_slice(bytes);
                Poll::Ready(Ok(self.process_carry()))
            }
        })
    }

    /// Reads once, behind what is in `carry`.
    pub(super) fn read_into(&mut self, cx: &mut Context<'_>, carry: &mut Vec<u8>) -> Poll<io::Result<()>> {
        BUFFER.with_borrow_mut(|buffer| {
            let mut target = ReadBuf::new(buffer);
            match Pin::new(&mut self.stream).poll_read(cx, &mut target) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(result) => result?,
            }
            if target.filled().is_empty() {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            if let Some(tenancy) = &self.tenancy {
                tenancy.session.meter().bytes_in.fetch_add(target.filled().len() as u64, Ordering::Relaxed);
            }
            carry.extend_from_slice(target.filled());
            Poll::Ready(Ok(()))
        })
    }

    fn process_carry(&mut self) -> Step {
        let carry = std::mem::take(&mut self.carry);
        let (used, step) = self.process(&carry);
        let mut carry = carry;
        if used > 0 {
            carry.drain(..used);
            if carry.len() <= KEPT_BYTES && carry.capacity() > KEPT_BYTES {
                carry.shrink_to(KEPT_BYTES);
            }
        }
        if carry.is_empty() {
            carry = Vec::new();
        }
        self.carry = carry;
        if self.is_too_much() { Step::Close } else { step }
    }

    /// Counts what is held of large commands; says so to the client, and forgets it, when all together are too much.
    fn is_too_much(&mut self) -> bool {
        let queued = self.queue.as_ref().map_or(0, Queue::held);
        if self.share.set(self.carry.len() + queued) {
            return false;
        }
        self.carry = Vec::new();
        self.drop_queue();
        self.share.set(0);
        self.farewell(&crate::refusal::Refusal::TooLarge { max_bytes: TENANT_MAX_BYTES as u64 });
        true
    }

    /// Takes as many commands of `bytes` as it can; gives how many bytes are done with.
    fn process(&mut self, bytes: &[u8]) -> (usize, Step) {
        let wide = self.outbox.is_wide(clock::now_ms) && self.tenancy.is_some();
        // A connection of our own that holds no state any more goes back as soon as nothing is outstanding.
        if !wide && self.own.is_some() && self.outbox.lock().unanswered == 0 {
            self.release_if_free();
        }
        if wide
            && self.own.is_none()
            && self.queue.is_none()
            && !std::mem::take(&mut self.declined)
            && self.outbox.lock().unanswered == 0
        {
            return (0, Step::Own);
        }
        let link = self.current();
        let mut used = 0;
        let mut burst = super::request::Burst::new(self, link.as_ref());
        let step = loop {
            let rest = &bytes[used..];
            let (args_max, bulk_max) = match burst.client.tenancy {
                Some(_) => (ARGS_MAX, BULK_MAX),
                None => (ARGS_MAX_UNAUTHENTICATED, BULK_MAX_UNAUTHENTICATED),
            };
            match burst.client.request.advance(rest, args_max, bulk_max) {
                Ok(Progress::Complete(len)) => {
                    burst.client.whole = false;
                    if !burst.client.request.args.is_empty() {
                        match burst.command(&rest[..len]) {
                            Ok(()) => {}
                            // Done later, from the same bytes.
                            Err(step @ (Step::Connect | Step::Measure | Step::Count | Step::Delay(_) | Step::Wait)) => {
                                burst.client.request.reset();
                                break step;
                            }
                            Err(step) => {
                                used += len;
                                burst.client.request.reset();
                                break step;
                            }
                        }
                    }
                    used += len;
                    burst.client.request.reset();
                }
                Ok(Progress::Inline(len)) => {
                    let line = &rest[..len];
                    // Another protocol's first line: somebody's browser was made to send it.
                    if [&b"POST "[..], b"Host:"].iter().any(|word| line.starts_with(word)) {
                        break Step::Close;
                    }
                    match resp::split_inline(line) {
                        Ok(words) if words.is_empty() => {
                            used += len;
                            burst.client.request.reset();
                        }
                        Ok(words) => {
                            let mut encoded = Vec::new();
                            resp::put_request(&mut encoded, &words.iter().map(Vec::as_slice).collect::<Vec<_>>());
                            burst.client.request.reset();
                            let (args_max, bulk_max) = (args_max.max(words.len()), bulk_max.max(len));
                            if burst.client.request.advance(&encoded, args_max, bulk_max)
                                != Ok(Progress::Complete(encoded.len()))
                            {
                                break Step::Close;
                            }
                            let result = burst.command(&encoded);
                            burst.client.request.reset();
                            match result {
                                Ok(()) => used += len,
                                Err(
                                    step @ (Step::Connect | Step::Measure | Step::Count | Step::Delay(_) | Step::Wait),
                                ) => {
                                    break step;
                                }
                                Err(step) => {
                                    used += len;
                                    break step;
                                }
                            }
                        }
                        Err(fault) => {
                            burst.fault(fault);
                            used = bytes.len();
                            break Step::Close;
                        }
                    }
                }
                Ok(Progress::Incomplete) => {
                    if burst.client.streams(rest) {
                        break Step::Stream;
                    }
                    if burst.too_large() {
                        used = bytes.len();
                        break Step::Close;
                    }
                    break Step::More;
                }
                Err(fault) => {
                    burst.fault(fault);
                    used = bytes.len();
                    break Step::Close;
                }
            }
        };
        burst.end();
        if let Some(tenancy) = &self.tenancy {
            tenancy.session.live().set_idle(false);
        }
        if let Some(card) = &self.card {
            card.seen_ms.store(clock::now_ms(), Ordering::Relaxed);
        }
        (used, step)
    }

    /// Forgets an open transaction: what it would have created is not under way any more.
    pub(super) fn drop_queue(&mut self) {
        if let (Some(queue), Some(tenancy)) = (self.queue.take(), &self.tenancy) {
            tenancy.database.ledger.done(queue.creates);
        }
    }

    /// Gives the connection of our own back if it holds no state; nothing is outstanding.
    pub(super) fn release_if_free(&mut self) {
        if self.own.is_some() && !self.watching && self.tracking.is_none() && self.queue.is_none() {
            self.release();
        }
    }

    /// Gives the connection of our own back.
    pub(super) fn release(&mut self) {
        if let (Some(own), Some(tenancy)) = (self.own.take(), &self.tenancy) {
            tenancy.database.give_back(own.version, own.link);
        }
    }

    /// Makes the shared connection, or remembers that there is none.
    pub(super) async fn connect(&mut self) {
        let Some(tenancy) = &self.tenancy else { return };
        match tenancy.place.shared(&tenancy.database, self.version).await {
            Ok(link) => self.shared = Some(link),
            Err(_) => {
                self.shared = None;
                self.down = Some(refuse::render(&crate::refusal::Refusal::UpstreamDown).0);
            }
        }
    }

    /// Counts how the client looks to its tenant.
    pub(super) fn note(&self, field: impl Fn(&Card) -> &AtomicU32, value: usize) {
        if let Some(card) = &self.card {
            field(card).store(u32::try_from(value).unwrap_or(u32::MAX), Ordering::Relaxed);
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.outbox.leave();
        self.drop_queue();
        // A blocked command must not pop an element for nobody; a watch must not outlive its client.
        if let Some(own) = self.own.take() {
            own.link.part();
        }
        if let Some(own) = self.subscriber.take() {
            own.link.part();
        }
        if let (Some(card), Some(tenancy)) = (&self.card, &self.tenancy) {
            self.server.registry.leave(&tenancy.session.identity().org, card.id);
        }
    }
}
