//! The sockets of one session: reads, writes, waits. What bytes mean is [`super::conversation`]'s.
//!
//! [`Relay::poll`] is one hand-written future for the busy path: it reads whatever side is ready into the thread's
//! buffer and writes once per direction. Everything that has to wait for something else (a lease, a cancel, a
//! farewell) leaves it as an [`Event`] and is ordinary `async` code here. Dropping a relay at any await is safe: its
//! lease is closed, its places are given back.

mod end;
mod home;
mod limit;
mod link;
mod pending;

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use tokio::{
    io::{AsyncRead, AsyncWriteExt, ReadBuf},
    task::JoinHandle,
};

use self::{end::log_end, pending::Pending};
use super::{
    Server, cancel,
    conversation::{Conversation, Fault, Heard, Want},
    farewell,
    handshake::Admitted,
    out::Out,
};
use crate::{
    net::{Peer, Stream},
    quota::Stop,
    refusal::Over,
    session::Session,
    tenant::PoolMode,
    upstream::postgres::{Home, Lease, Pool, Taken, Upstream},
    wire::postgres::head,
};

/// Bytes read at once. Large enough that a big result costs few system calls; one buffer per thread.
const READ: usize = 64 * 1024;

/// Most bytes held back for the server's next answer; and the space for them that a sleeping client keeps.
const HELD_MAX: usize = 16 * 1024;
const HELD_KEPT: usize = 32;

/// Answers owed at once; a client that wants more has to wait for some.
const OWED_MAX: usize = 4096;

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
        self.go_home();
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
