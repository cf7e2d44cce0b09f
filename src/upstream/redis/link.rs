//! One connection to the server, fed by many clients or by one.
//!
//! Clients append requests under a short lock ([`Link::lock`]) and say in the same breath what becomes of the
//! replies ([`Pending`]); the link's task writes them in one piece, walks the replies once and hands each span to
//! its client's [`Outbox`]. While replies are outstanding, new requests gather and leave with the next wake-up:
//! the server works on one command at a time anyway, so nothing is delayed, and one write serves many clients.
//!
//! Large values pass in pieces, and a client that does not read is waited for ([`Task::holds`]):
//! - A reply that needs no rewriting is handed on as it comes. While more than
//!   [`BEHIND_BYTES`](super::outbox::BEHIND_BYTES) wait for its client the link does not read, so the server waits.
//! - A shared link takes no more requests then: new ones go to a new link, and this one goes on at the client's pace.
//!   If others' replies are outstanding on it, they wait for [`PATIENCE`] only, all pauses of one client's replies
//!   together; after that it reads on, so that the others get theirs, and what the slow client does not take waits in
//!   memory: up to [`PASSED_MAX_BYTES`], at which the link waits again, for [`STRAIN`], and then lets the slow client go.
//!   All that waits is within the caps of [`held`](super::held), too.
//! - Whose reply was large is expected to get more ([`Outbox::widen`]): its next commands go to a link of its own,
//!   where nobody is behind it.
//! - A client that takes nothing for [`STALL_MAX`] is let go.
//! - A large request comes in pieces on a dedicated link ([`State::partial`]): its bytes leave before anything is
//!   expected for them, and a link with half a request is never used again, only closed.

use std::{
    cell::RefCell,
    collections::{HashSet, VecDeque},
    future::poll_fn,
    io,
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use atomic_waker::AtomicWaker;
use parking_lot::{Mutex, MutexGuard};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    Place, Version,
    again::{self, Elsewhere, Group},
    held::{Share, TENANT_MAX_BYTES},
    ledger::Ledger,
    message,
    outbox::Outbox,
    reply::{Shape, Transaction, strip},
};
use crate::{
    net::Stream,
    quota::clock,
    wire::resp::{self, put_error},
};

/// Bytes read at once: large enough that one read serves many clients.
const READ_BYTES: usize = 64 << 10;

/// Unsent request bytes over which clients wait before they add more.
pub const OUT_HIGH_BYTES: usize = 1 << 20;

/// Unsent request bytes that leave at once although replies are outstanding.
const OUT_EAGER_BYTES: usize = 16 << 10;

/// Longest reply that we have to see whole because names stand in it. Redis' own replies of a million keys fit.
const WHOLE_MAX_BYTES: usize = TENANT_MAX_BYTES;

/// Bytes that wait for a client because others' replies are behind its own. Who asks for more at once than this, and
/// reads slowly, does it at others' cost.
const PASSED_MAX_BYTES: usize = 64 << 20;

/// How long, in all for one client's replies, a shared connection lets others wait for a client that does not read.
const PATIENCE: Duration = Duration::from_millis(20);

/// How long others wait for a client for which [`PASSED_MAX_BYTES`] wait already to take some of it.
const STRAIN: Duration = Duration::from_secs(2);

/// How long a client may take nothing of a large reply before it is let go.
const STALL_MAX: Duration = Duration::from_secs(120);

/// Reads of one wake-up before other tasks get their turn.
const READS_PER_TURN: usize = 4;

/// Write buffer kept between bursts.
const KEPT_BYTES: usize = 64 << 10;

/// How often an unused shared link is looked at; unused for two looks, it is closed.
const IDLE_LOOK: Duration = Duration::from_secs(30);

/// How long a link to a server that does not serve any more may wait for outstanding replies.
const RETIRE: Duration = Duration::from_secs(5);

/// Bytes of scripts that a link can load elsewhere.
const LOADS_MAX_BYTES: usize = 4 << 20;

/// What a command gets that a server refused because it serves no more; it has not run.
const UNAVAILABLE: &[u8] = b"-ERR upstream unavailable\r\n";

/// The text that commands get whose reply was lost with the connection. Nothing is sent again: it may have run.
pub const LOST: &str = "ERR upstream connection lost; the command may or may not have been executed";

thread_local! {
    /// No connection owns a read buffer: each thread has one.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

/// What becomes of replies.
#[derive(Debug)]
pub enum How {
    /// They pass.
    Raw,
    /// They are swallowed.
    Discard,
    /// They lose their prefix.
    Strip(Shape),
    /// They are the frames of one transaction.
    Transaction(Box<Transaction>),
    /// Nothing comes from the server: these bytes are the reply, in its place among the others.
    Local(Box<[u8]>),
    /// The reply is the number of keys, asked when this many creations were done.
    Count(u64),
    /// A reply that is no error is replaced by these bytes.
    Instead(Box<[u8]>),
    /// A pair of how many keys were created, of so many that were reserved, and the reply.
    Learn(u64),
    /// Confirmations on a subscriber's link.
    Confirm,
}

/// Replies outstanding for one client.
#[derive(Debug)]
pub struct Pending {
    /// Whose.
    pub to: Arc<Outbox>,
    /// How many commands of the client they answer.
    pub count: usize,
    /// How many keys the commands may create, for the ledger.
    pub creates: u64,
    /// What becomes of them.
    pub how: How,
    /// The requests, where they may have to be sent elsewhere.
    pub group: Option<Group>,
}

/// Where a link goes, and how its task finds what is elsewhere.
#[derive(Debug)]
pub struct Home {
    /// The tenant.
    pub place: Weak<Place>,
    /// Its slot.
    pub slot: u16,
    /// The server.
    pub address: Arc<str>,
    /// The protocol version.
    pub version: Version,
}

/// What the link is for.
#[derive(Clone, Debug)]
pub enum Role {
    /// Requests and replies of many clients.
    Shared,
    /// Requests and replies of one client, with pushes between them.
    Dedicated(Arc<Outbox>),
    /// Messages for one client.
    Subscriber(Arc<Outbox>),
}

/// See the module.
#[derive(Debug)]
pub struct Link {
    state: Mutex<State>,
    waker: AtomicWaker,
    role: Mutex<Role>,
    prefix: Box<[u8]>,
    ledger: Arc<Ledger>,
    used: AtomicU64,
    /// The server's id of the connection, where somebody asked for it.
    id: i64,
    /// Databases whose events a subscriber listens to: the server's number, the tenant's.
    listened: Mutex<Vec<(u32, u32)>>,
}

/// What clients append to.
#[derive(Debug, Default)]
pub struct State {
    /// Request bytes not yet taken by the link's task.
    pub out: Vec<u8>,
    fresh: Vec<Pending>,
    stalled: Vec<Arc<Outbox>>,
    closed: bool,
    /// Nothing more is taken; what is outstanding is waited for.
    retired: bool,
    /// A request is under way in pieces: what is in `out` leaves although no reply to it is expected yet.
    pub partial: bool,
    /// Requests are kept until they are answered.
    keeps: bool,
    /// Where in `out` the next group begins.
    mark: usize,
    /// Scripts loaded through this connection, and the ledger's `scripts_lost` when that was true.
    loaded: (HashSet<[u8; 40]>, u64),
}

impl State {
    /// Whether a script has to be loaded before it is called; says so once.
    pub fn must_load(&mut self, sha: &[u8; 40], lost: u64) -> bool {
        if self.loaded.1 != lost {
            self.loaded.0.clear();
            self.loaded.1 = lost;
        }
        self.loaded.0.insert(*sha)
    }

    /// Adds what becomes of the requests just appended; runs of the same kind become one entry.
    #[inline]
    pub fn expect(&mut self, to: &Arc<Outbox>, count: usize, creates: u64, how: How) {
        let group = if self.keeps { self.group(count, &how) } else { None };
        if let (How::Raw, Some(last), None) = (&how, self.fresh.last_mut(), &group)
            && matches!(last.how, How::Raw)
            && Arc::ptr_eq(&last.to, to)
        {
            last.count += count;
            last.creates += creates;
            return;
        }
        self.fresh.push(Pending { to: Arc::clone(to), count, creates, how, group });
    }

    /// The requests appended since the last group.
    #[cold]
    fn group(&mut self, count: usize, how: &How) -> Option<Group> {
        let bytes: Box<[u8]> = self.out[self.mark..].into();
        self.mark = self.out.len();
        let frames = match how {
            How::Local(_) | How::Confirm | How::Count(_) => return None,
            How::Transaction(transaction) => transaction.acks + 1,
            How::Discard => count,
            How::Raw | How::Strip(_) | How::Instead(_) | How::Learn(_) => 1,
        };
        Some(Group { bytes, frames })
    }

    /// Whether scripts have to be sent with every call, since it may have to be made elsewhere.
    pub fn keeps_groups(&self) -> bool {
        self.keeps
    }

    /// Whether so much waits to be sent that the client should wait; if so it will be woken.
    pub fn is_full(&mut self, client: &Arc<Outbox>) -> bool {
        self.is_over(OUT_HIGH_BYTES, client)
    }

    /// The same for another number of bytes.
    pub fn is_over(&mut self, max: usize, client: &Arc<Outbox>) -> bool {
        let full = self.out.len() > max;
        if full && !self.stalled.iter().any(|other| Arc::ptr_eq(other, client)) {
            self.stalled.push(Arc::clone(client));
        }
        full
    }
}

impl Link {
    /// A link whose task ([`Self::run`]) is to be spawned by the caller.
    pub fn new(role: Role, prefix: &[u8], ledger: Arc<Ledger>) -> Arc<Self> {
        Self::with_id(role, prefix, ledger, 0)
    }

    /// The same for a connection that the server knows as `id`.
    pub fn with_id(role: Role, prefix: &[u8], ledger: Arc<Ledger>, id: i64) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            waker: AtomicWaker::new(),
            role: Mutex::new(role),
            prefix: prefix.into(),
            ledger,
            used: AtomicU64::new(0),
            id,
            listened: Mutex::default(),
        })
    }

    /// The server's id of this connection, 0 if it was not asked.
    pub fn id(&self) -> i64 {
        self.id
    }

    /// Says that events of a database may come, and what the tenant calls it.
    pub fn listen(&self, index: u32, number: u32) {
        let mut listened = self.listened.lock();
        if !listened.contains(&(index, number)) {
            listened.push((index, number));
        }
    }

    /// The state to append to, or `None` once the connection is lost. Call [`Self::wake`] after dropping it.
    pub fn lock(&self) -> Option<MutexGuard<'_, State>> {
        let state = self.state.lock();
        (!state.closed && !state.retired).then_some(state)
    }

    /// The state for replies of our own, which have their place among the outstanding ones to the end.
    pub fn lock_for_local(&self) -> Option<MutexGuard<'_, State>> {
        let state = self.state.lock();
        (!state.closed).then_some(state)
    }

    /// Keeps every request until it is answered, since it may have to be sent elsewhere.
    pub fn keep_groups(&self) {
        self.state.lock().keeps = true;
    }

    /// Takes nothing more, and ends once everything is answered.
    fn retire(&self) {
        self.state.lock().retired = true;
        self.waker.wake();
    }

    /// Tells the link's task that there is something new.
    pub fn wake(&self) {
        self.waker.wake();
    }

    /// Closes the connection; what is outstanding is lost.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.waker.wake();
    }

    /// Closes a connection of one client without letting the client go with it.
    pub fn part(&self) {
        {
            let mut role = self.role.lock();
            if let Role::Dedicated(client) | Role::Subscriber(client) = &mut *role {
                *client = Arc::default();
            }
        }
        self.close();
    }

    /// Whether the connection is lost or closed.
    pub fn is_closed(&self) -> bool {
        let state = self.state.lock();
        state.closed || state.retired
    }

    /// Gives a dedicated link to another client.
    pub fn hand_to(&self, client: Arc<Outbox>) {
        *self.role.lock() = Role::Dedicated(client);
    }

    /// Relays until the connection ends.
    pub async fn run(self: Arc<Self>, stream: Stream, home: Home) {
        let mut views = home.place.upgrade().and_then(|place| place.watch());
        let (slot, address) = (home.slot, Arc::clone(&home.address));
        let mut share = Share::default();
        if let Some(place) = home.place.upgrade() {
            share.join(&place.held);
        }
        let mut retired = None;
        let mut task = Task {
            may_move: views.is_some(),
            home,
            elsewhere: None,
            again: None,
            loads: (Vec::new(), 0),
            behind: None,
            piece: false,
            share,
            link: &self,
            stream,
            queue: VecDeque::new(),
            writing: Vec::new(),
            written: 0,
            carry: Vec::new(),
            scanned: 0,
            reply: resp::Reply::default(),
            scratch: Vec::new(),
        };
        // The first look after a pause: a link that is new has not been used either.
        let mut look = tokio::time::interval_at(tokio::time::Instant::now() + IDLE_LOOK, IDLE_LOOK);
        let mut seen = 0;
        let reason = loop {
            let turn = tokio::select! {
                ended = poll_fn(|cx| task.poll(cx)) => Some(ended),
                _ = look.tick() => None,
                owner = owner(&mut views, slot), if retired.is_none() => {
                    if owner.is_some_and(|owner| owner != address) {
                        self.retire();
                        retired = Some(tokio::time::Instant::now() + RETIRE);
                    }
                    continue;
                }
                () = until(retired) => Some(Some(io::Error::other("the server serves no more"))),
            };
            match turn {
                Some(error) => break error,
                None => {
                    let used = self.used.load(Ordering::Relaxed);
                    let shared = matches!(*self.role.lock(), Role::Shared);
                    if shared && used == seen && task.queue.is_empty() {
                        let mut state = self.state.lock();
                        if state.fresh.is_empty() && state.out.is_empty() {
                            state.closed = true;
                            break None;
                        }
                    }
                    seen = used;
                }
            }
        };
        if let Some(error) = reason {
            tracing::debug!(%error, "a Redis upstream connection ended");
        }
        task.fail();
    }
}

/// The next owner of a slot that is heard of.
async fn owner(
    views: &mut Option<tokio::sync::watch::Receiver<Arc<super::nodes::View>>>,
    slot: u16,
) -> Option<Arc<str>> {
    match views {
        Some(receiver) => match receiver.changed().await {
            Ok(()) => receiver.borrow_and_update().of(slot).cloned(),
            Err(_) => {
                *views = None;
                std::future::pending().await
            }
        },
        None => std::future::pending().await,
    }
}

async fn until(time: Option<tokio::time::Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// A client that does not take what waits for it; see [`Task::holds`].
struct Behind {
    to: Arc<Outbox>,
    /// How long it was waited for before this pause.
    waited: Duration,
    /// When this pause began.
    since: Option<tokio::time::Instant>,
    /// The link takes no more requests because of it.
    retired: bool,
    timer: Pin<Box<tokio::time::Sleep>>,
}

impl Behind {
    fn new(to: Arc<Outbox>) -> Self {
        let timer = Box::pin(tokio::time::sleep(PATIENCE));
        Self { to, waited: Duration::ZERO, since: None, retired: false, timer }
    }

    /// It took something.
    fn go_on(&mut self) {
        self.waited += self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
    }

    /// Whether it was waited for as long as `max`.
    fn is_over(&mut self, max: Duration, cx: &mut Context<'_>) -> bool {
        let until = *self.since.get_or_insert_with(tokio::time::Instant::now) + max;
        if self.timer.deadline() != until {
            self.timer.as_mut().reset(until);
        }
        self.timer.as_mut().poll(cx).is_ready()
    }
}

struct Task<'a> {
    /// The server may stop serving the tenant.
    may_move: bool,
    home: Home,
    /// The group at the head was refused, since its slot is there.
    elsewhere: Option<Elsewhere>,
    /// The group at the head is being run elsewhere.
    again: Option<again::Running>,
    /// Requests that load the scripts that were loaded here, and how many.
    loads: (Vec<u8>, usize),
    /// The client at the head that does not read.
    behind: Option<Behind>,
    /// What is being written is a piece of a request.
    piece: bool,
    /// What `carry` counts among all that is large.
    share: Share,
    link: &'a Arc<Link>,
    stream: Stream,
    queue: VecDeque<Pending>,
    writing: Vec<u8>,
    written: usize,
    /// The unfinished reply that the last read ended in.
    carry: Vec<u8>,
    /// Bytes of `carry` that `reply` has walked.
    scanned: usize,
    reply: resp::Reply,
    scratch: Vec<u8>,
}

impl Task<'_> {
    /// Ready with the reason when the connection is over; `None` when we closed it.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Error>> {
        self.link.waker.register(cx.waker());
        for _ in 0..READS_PER_TURN {
            loop {
                if self.gather() {
                    return Poll::Ready(None);
                }
                if let Err(error) = self.write(cx) {
                    return Poll::Ready(Some(error));
                }
                // What was appended behind a piece has no reply to wait for that would bring us back.
                if !self.writing.is_empty() || !std::mem::take(&mut self.piece) {
                    break;
                }
            }
            if let Some(again) = &mut self.again {
                match again.as_mut().poll(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(result) => {
                        if let Err(error) = self.resume(result) {
                            return Poll::Ready(Some(error));
                        }
                        continue;
                    }
                }
            }
            if self.holds(cx) {
                return Poll::Pending;
            }
            match self.read(cx) {
                Ok(true) => {}
                Ok(false) => return Poll::Pending,
                Err(error) => return Poll::Ready(Some(error)),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Takes what clients appended; gives whether the link is closed.
    fn gather(&mut self) -> bool {
        let outstanding = !self.queue.is_empty();
        {
            let mut state = self.link.state.lock();
            if state.closed {
                return true;
            }
            // Requests and what is expected of them are taken together: what is in the queue has been sent.
            if self.writing.is_empty()
                && (!state.fresh.is_empty() || state.partial && !state.out.is_empty())
                && (!outstanding
                    || state.out.is_empty()
                    || state.out.len() >= OUT_EAGER_BYTES
                    || !self.queue_is_shared())
            {
                self.queue.extend(state.fresh.drain(..));
                self.link.used.fetch_add(1, Ordering::Relaxed);
                std::mem::swap(&mut self.writing, &mut state.out);
                self.piece = state.partial;
                state.mark = 0;
                state.stalled.drain(..).for_each(|client| client.wake());
            }
            if state.retired && self.queue.is_empty() && state.fresh.is_empty() && self.writing.is_empty() {
                state.closed = true;
                return true;
            }
        }
        self.locals();
        false
    }

    fn queue_is_shared(&self) -> bool {
        matches!(*self.link.role.lock(), Role::Shared)
    }

    /// Whether reading has to wait for the client whose reply is coming; see the module.
    fn holds(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(head) = self.queue.front() else {
            self.behind = None;
            return false;
        };
        if !head.to.is_behind(cx) {
            match &mut self.behind {
                Some(behind) if Arc::ptr_eq(&behind.to, &head.to) => behind.go_on(),
                behind => *behind = None,
            }
            return false;
        }
        let to = Arc::clone(&head.to);
        to.widen(clock::now_ms());
        let shared = self.queue_is_shared();
        let others = shared && {
            let state = self.link.state.lock();
            self.queue.iter().chain(&state.fresh).any(|other| !Arc::ptr_eq(&other.to, &to))
        };
        let mut behind = match self.behind.take() {
            Some(behind) if Arc::ptr_eq(&behind.to, &to) => behind,
            _ => Behind::new(Arc::clone(&to)),
        };
        // Nobody comes to stand behind it, and who stands there waits for a short time only.
        if shared && !behind.retired && (!others || behind.is_over(PATIENCE.saturating_sub(behind.waited), cx)) {
            behind.retired = true;
            behind.since = None;
            self.link.retire();
        }
        let passes = behind.retired && others;
        let held = !passes || to.waiting() > PASSED_MAX_BYTES;
        let patience = match (behind.retired || !shared, passes) {
            (_, true) => Some(STRAIN),
            (true, false) => Some(STALL_MAX),
            (false, false) => None,
        };
        if let (true, Some(patience)) = (held, patience)
            && behind.is_over(patience, cx)
        {
            tracing::debug!("a client does not read what it asked for");
            to.lose();
            return false;
        }
        self.behind = Some(behind);
        held
    }

    /// Gives up on a reply that would have to be seen whole, where there is no memory for it: its client is let go,
    /// the others go on.
    fn swallow(&mut self, carry: &mut Vec<u8>) -> io::Result<()> {
        if !self.queue_is_shared() {
            return Err(io::Error::other("a reply over the cap"));
        }
        carry.drain(..self.scanned);
        self.scanned = 0;
        if let Some(head) = self.queue.front_mut() {
            if let How::Transaction(transaction) = &head.how {
                head.count = transaction.acks + 1;
            }
            head.how = How::Raw;
            head.group = None;
            head.to.lose();
        }
        self.link.ledger.shrink();
        Ok(())
    }

    /// Delivers replies of our own that stand at the head.
    fn locals(&mut self) {
        while let Some(Pending { how: How::Local(_), .. }) = self.queue.front() {
            if let Some(Pending { to, count, how: How::Local(bytes), .. }) = self.queue.pop_front() {
                to.deliver(count, |out| out.extend_from_slice(&bytes));
            }
        }
    }

    fn write(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while self.written < self.writing.len() {
            match Pin::new(&mut self.stream).poll_write(cx, &self.writing[self.written..]) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(n)) => self.written += n,
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(()),
            }
        }
        if self.written > 0 {
            self.written = 0;
            self.writing.clear();
            if self.writing.capacity() > KEPT_BYTES {
                self.writing = Vec::new();
            }
            if let Poll::Ready(Err(error)) = Pin::new(&mut self.stream).poll_flush(cx) {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Reads once and passes on what is complete; gives whether anything came.
    fn read(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        BUFFER.with_borrow_mut(|buffer| {
            let mut target = ReadBuf::new(buffer);
            match Pin::new(&mut self.stream).poll_read(cx, &mut target) {
                Poll::Pending => return Ok(false),
                Poll::Ready(result) => result?,
            }
            let bytes = target.filled();
            if bytes.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // Requests may have been appended and answered since we last looked (a link is only written by its
            // own task, so their entries are in the queue already).
            if self.carry.is_empty() {
                let used = self.walk(bytes)?;
                self.carry.extend_from_slice(&bytes[used..]);
            } else {
                let mut carry = std::mem::take(&mut self.carry);
                carry.extend_from_slice(bytes);
                let used = self.walk(&carry)?;
                carry.drain(..used);
                if !self.share.set(carry.len()) || carry.len() > WHOLE_MAX_BYTES {
                    self.swallow(&mut carry)?;
                    self.share.set(carry.len());
                }
                if carry.is_empty() && carry.capacity() > KEPT_BYTES {
                    carry = Vec::new();
                }
                self.carry = carry;
            }
            Ok(true)
        })
    }

    /// Walks replies; gives how many bytes are done with. The rest belongs to an unfinished reply.
    fn walk(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let fault = |fault: resp::Fault| io::Error::other(fault.0);
        let mut at = 0;
        loop {
            self.locals();
            if at >= bytes.len() || self.again.is_some() {
                return Ok(at);
            }
            let mid_reply = self.reply.is_begun() && self.scanned == 0;
            let subscriber = match (&*self.link.role.lock(), bytes[at]) {
                (Role::Subscriber(client), _) => Some((Arc::clone(client), true)),
                (Role::Dedicated(client), b'>') if !mid_reply => Some((Arc::clone(client), false)),
                (Role::Shared, b'>') if !mid_reply => {
                    return Err(io::Error::other("a push on a shared connection"));
                }
                _ => None,
            };
            if let Some((client, confirms)) = subscriber {
                let Some(frame) = self.frame(&bytes[at..]).map_err(fault)? else { return Ok(at) };
                let frame = &bytes[at..at + frame];
                at += frame.len();
                self.message(&client, confirms, frame);
                continue;
            }
            let Some(head) = self.queue.front_mut() else {
                return Err(io::Error::other("a reply that nobody asked for"));
            };
            if let How::Raw = head.how {
                // Spans of whole and partial replies go out in one piece, up to an error, whose text is looked at.
                let start = at;
                let mut answered = 0;
                let mut stuck = false;
                while answered < head.count && at < bytes.len() {
                    if !self.reply.is_begun() && matches!(bytes[at], b'-' | b'!' | b'>') {
                        break;
                    }
                    let (used, done) = self.reply.advance(&bytes[at..]).map_err(fault)?;
                    at += used;
                    if !done {
                        stuck = true;
                        break;
                    }
                    self.reply = resp::Reply::default();
                    answered += 1;
                }
                if at > start {
                    let span = &bytes[start..at];
                    head.to.deliver(answered, |out| out.extend_from_slice(span));
                }
                head.count -= answered;
                if head.count == 0 {
                    self.retire();
                    continue;
                }
                if stuck || at >= bytes.len() {
                    return Ok(at);
                }
                if bytes[at] == b'>' {
                    continue;
                }
                let Some(len) = self.frame(&bytes[at..]).map_err(fault)? else { return Ok(at) };
                let frame = &bytes[at..at + len];
                at += len;
                if self.may_move {
                    self.whole_moving(frame)?;
                    continue;
                }
                let Some(head) = self.queue.front_mut() else { return Ok(at) };
                head.to.deliver(1, |out| strip(Shape::Raw, frame, &self.link.prefix, out));
                if frame.starts_with(b"-NOSCRIPT") || frame.starts_with(b"-ERR Error compiling script") {
                    self.link.ledger.scripts_lost.fetch_add(1, Ordering::Relaxed);
                }
                head.count -= 1;
                if head.count == 0 {
                    self.retire();
                }
                continue;
            }
            let Some(len) = self.frame(&bytes[at..]).map_err(fault)? else { return Ok(at) };
            let frame = &bytes[at..at + len];
            at += len;
            if self.may_move {
                self.whole_moving(frame)?;
            } else {
                self.whole(frame);
            }
        }
    }

    /// The same as [`Self::whole`] where another server may have taken over: what this one refuses for that reason was
    /// not run, and is run there, or told to the client in words that mean nothing else.
    fn whole_moving(&mut self, frame: &[u8]) -> io::Result<()> {
        let shared = self.queue_is_shared();
        let mut frame = frame;
        if frame.starts_with(b"-READONLY") || frame.starts_with(b"-CLUSTERDOWN") || frame.starts_with(b"-MASTERDOWN") {
            if let Some(place) = self.home.place.upgrade() {
                place.failed(&self.home.address);
            }
            self.link.retire();
            if !shared {
                return Err(io::Error::other("the server serves no more"));
            }
            frame = UNAVAILABLE;
        } else if let Some(elsewhere) = Elsewhere::parse(frame, &self.home.address, self.home.slot) {
            // What a connection of one client holds can't be taken elsewhere: the client connects again.
            if !shared {
                if let (false, Some(place)) = (elsewhere.once, self.home.place.upgrade()) {
                    place.doubt(&self.home.address);
                }
                return Err(io::Error::other("the slot is elsewhere"));
            }
            self.elsewhere.get_or_insert(elsewhere);
        }
        self.whole(frame);
        Ok(())
    }

    /// Takes what came of a group that was run elsewhere, and goes on with what had come meanwhile.
    fn resume(&mut self, result: Result<Vec<Vec<u8>>, super::DialError>) -> io::Result<()> {
        self.again = None;
        match result {
            Ok(answers) => {
                if let Some(head) = self.queue.front_mut() {
                    match &mut head.how {
                        How::Transaction(transaction) => {
                            transaction.acks = answers.len() - 1;
                            transaction.refused = None;
                        }
                        _ => head.count = answers.len(),
                    }
                }
                answers.iter().for_each(|answer| self.whole(answer));
            }
            Err(error) => {
                tracing::debug!(%error, "a command could not be run elsewhere");
                if let Some(head) = self.queue.front() {
                    match head.how {
                        How::Discard => head.to.deliver(head.count, |_| {}),
                        _ => head.to.deliver(head.count, |out| put_error(out, LOST)),
                    }
                }
                self.retire();
            }
        }
        let mut carry = std::mem::take(&mut self.carry);
        let used = self.walk(&carry)?;
        carry.drain(..used);
        self.carry = carry;
        Ok(())
    }

    /// After the last frame of the head: it is done, or runs elsewhere.
    fn finish(&mut self) {
        let group = self.queue.front_mut().and_then(|head| head.group.take());
        match (self.elsewhere.take(), group) {
            (Some(to), Some(group)) => {
                let (place, version) = (Weak::clone(&self.home.place), self.home.version);
                self.again = Some(again::run(place, version, to, self.loads.clone(), group));
            }
            (_, group) => {
                if let Some(group) = group
                    && group.bytes.starts_with(b"*3\r\n$6\r\nSCRIPT")
                    && self.loads.0.len() + group.bytes.len() <= LOADS_MAX_BYTES
                {
                    self.loads.0.extend_from_slice(&group.bytes);
                    self.loads.1 += 1;
                }
                self.retire();
            }
        }
    }

    /// The length of the whole reply at the start of `bytes`, or `None` until more came.
    fn frame(&mut self, bytes: &[u8]) -> Result<Option<usize>, resp::Fault> {
        let (used, done) = self.reply.advance(&bytes[self.scanned..])?;
        self.scanned += used;
        if !done {
            return Ok(None);
        }
        let len = self.scanned;
        self.scanned = 0;
        self.reply = resp::Reply::default();
        Ok(Some(len))
    }

    /// Passes on one whole reply that is not simply passed.
    fn whole(&mut self, frame: &[u8]) {
        let Some(head) = self.queue.front_mut() else { return };
        let prefix = &self.link.prefix;
        let silent = self.elsewhere.is_some() && head.group.is_some();
        if frame.starts_with(b"-NOSCRIPT") {
            self.link.ledger.scripts_lost.fetch_add(1, Ordering::Relaxed);
        }
        match &mut head.how {
            How::Transaction(transaction) => {
                self.scratch.clear();
                if !transaction.frame(frame, prefix, &mut self.scratch) {
                    return;
                }
                if !silent {
                    let scratch = &self.scratch;
                    head.to.deliver(head.count, |out| out.extend_from_slice(scratch));
                    head.count = 1;
                }
                if self.scratch.capacity() > KEPT_BYTES {
                    self.scratch = Vec::new();
                }
            }
            _ if silent => {}
            // Nothing is known to be answered before all of it is known to have been run.
            How::Discard if head.group.is_some() => {
                if head.count == 1 {
                    let frames = head.group.as_ref().map_or(1, |group| group.frames);
                    head.to.deliver(frames, |_| {});
                }
            }
            How::Raw => head.to.deliver(1, |out| strip(Shape::Raw, frame, prefix, out)),
            How::Learn(reserved) => {
                let (made, reply) = learned(frame);
                match made {
                    Some(made) => {
                        let reserved = i64::try_from(*reserved).unwrap_or(i64::MAX);
                        // Nobody gives keys back by creating fewer than none.
                        self.link.ledger.learned(reserved.saturating_sub(made.max(0)));
                    }
                    None => self.link.ledger.shrink(),
                }
                head.to.deliver(1, |out| strip(Shape::Raw, reply, prefix, out));
            }
            How::Strip(shape) => {
                let shape = *shape;
                head.to.deliver(1, |out| strip(shape, frame, prefix, out));
            }
            How::Instead(bytes) => head.to.deliver(1, |out| match frame.first() {
                Some(b'-') => strip(Shape::Raw, frame, prefix, out),
                _ => out.extend_from_slice(bytes),
            }),
            How::Count(done) => {
                let text = frame.strip_prefix(b":").and_then(|rest| rest.strip_suffix(b"\r\n"));
                if let Some(keys) = text.and_then(|t| std::str::from_utf8(t).ok()).and_then(|t| t.parse().ok()) {
                    self.link.ledger.counted(keys, *done);
                } else {
                    self.link.ledger.not_counted();
                }
            }
            // `Local` and `Confirm` never come here; a reply is swallowed rather than given to the wrong one.
            How::Discard | How::Local(_) | How::Confirm => head.to.deliver(1, |_| {}),
        }
        if silent && matches!(head.how, How::Transaction(_)) {
            return self.finish();
        }
        head.count -= 1;
        if head.count == 0 {
            // A group that runs elsewhere is as unanswered as before.
            if silent {
                head.count = head.group.as_ref().map_or(1, |group| group.frames);
            }
            self.finish();
        }
    }

    /// Passes on one frame of a subscriber's connection.
    fn message(&mut self, client: &Arc<Outbox>, confirms: bool, frame: &[u8]) {
        let mut cursor = resp::Cursor { rest: frame };
        let kind = match (cursor.item(), cursor.item()) {
            (Some(resp::Item::Many(..)), Some(resp::Item::Bulk(kind))) => kind,
            _ => &[],
        };
        let pushed = !confirms
            || matches!(kind, b"message" | b"pmessage" | b"smessage" | b"invalidate" | b"tracking-redir-broken");
        let prefix = &self.link.prefix;
        let listened = self.link.listened.lock().clone();
        if pushed {
            return client.deliver(0, |out| message::strip(frame, prefix, &listened, out));
        }
        let is_error = frame.first() == Some(&b'-');
        let mut answered = 1;
        if let Some(head) = self.queue.front_mut() {
            // One error stands for all confirmations of its command.
            answered = if is_error { head.count } else { 1 };
            head.count -= answered;
            if head.count == 0 {
                self.retire();
            }
        }
        client.deliver(answered, |out| message::strip(frame, prefix, &listened, out));
    }

    fn retire(&mut self) {
        if let Some(done) = self.queue.pop_front()
            && done.creates > 0
        {
            self.link.ledger.done(done.creates);
        }
    }

    /// Tells everybody who waits that the connection is lost.
    fn fail(&mut self) {
        let stalled = {
            let mut state = self.link.state.lock();
            state.closed = true;
            state.out = Vec::new();
            self.queue.extend(state.fresh.drain(..));
            std::mem::take(&mut state.stalled)
        };
        let shared = matches!(*self.link.role.lock(), Role::Shared);
        let mut torn = self.reply.is_begun();
        let mut creates = 0;
        for Pending { to, count, how, creates: created, group: _ } in self.queue.drain(..) {
            creates += created;
            match how {
                How::Local(bytes) => to.deliver(count, |out| out.extend_from_slice(&bytes)),
                How::Discard => to.deliver(count, |_| {}),
                How::Count(_) => self.link.ledger.not_counted(),
                // Half a reply has gone out: nothing that follows could be understood.
                How::Raw if torn => to.lose(),
                _ if !shared => to.lose(),
                How::Transaction(_) => to.deliver(count, |out| put_error(out, LOST)),
                _ => to.deliver(count, |out| (0..count).for_each(|_| put_error(out, LOST))),
            }
            torn = false;
        }
        if creates > 0 {
            self.link.ledger.done(creates);
        }
        match &*self.link.role.lock() {
            Role::Shared => {}
            Role::Dedicated(client) | Role::Subscriber(client) => client.lose(),
        }
        stalled.iter().for_each(|client| client.wake());
    }
}

/// Takes a pair of a number and a reply apart; anything else is a reply.
fn learned(frame: &[u8]) -> (Option<i64>, &[u8]) {
    let mut cursor = resp::Cursor { rest: frame };
    match (cursor.item(), cursor.item()) {
        (Some(resp::Item::Many(b'*', 2)), Some(resp::Item::Other(text))) => {
            let number = text.strip_prefix(b":").and_then(|n| std::str::from_utf8(n).ok()?.trim_end().parse().ok());
            (number, if number.is_some() { cursor.rest } else { frame })
        }
        _ => (None, frame),
    }
}
